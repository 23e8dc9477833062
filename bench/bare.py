"""The program without rehearsals, drills, costs and a market under control, to see what those cost a trade
that uses none of them. `compare.py` serves it beside the whole one.
"""

from datetime import timedelta
from decimal import Decimal
from types import SimpleNamespace

import app as program
from models import Controls, Quote, now


class NoCosts:
    commission = staticmethod(lambda total: Decimal(0))
    slipped = staticmethod(lambda action, price: price)


def quote(ticker: str, controls) -> Quote:
    minute = now().replace(second=0, microsecond=0)
    price = market.closes[ticker][-1][1]
    return Quote(ticker, price, "USD", market.name, minute, minute + timedelta(minutes=1))


market, app = program.market, program.app
market.quote = quote
no_options, wall_clock = SimpleNamespace(dry_run=False), Controls()
program.query = lambda model: no_options
program.Controls = lambda *_: wall_clock
program.drilled_fault = lambda: None
program.COSTS = NoCosts
