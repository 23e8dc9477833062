"""The program without rehearsals, drills, costs and a market under control, to see what those cost a trade
that uses none of them. `compare.py` serves it beside the whole one. It is the one part of the bench that
knows the program from within, and does not start where that has changed.
"""

from datetime import UTC, datetime, timedelta
from decimal import Decimal
from types import SimpleNamespace

import app as program


class NoCosts:
    commission = staticmethod(lambda total: Decimal(0))
    slipped = staticmethod(lambda action, price: price)


def quote(ticker: str, controls):
    minute = datetime.now(UTC).replace(second=0, microsecond=0)
    price = market.series[ticker][-1].close
    return Quote(ticker, price, "USD", market.name, minute, minute + timedelta(minutes=1))


market, app = program.market, program.app
no_options, wall_clock = SimpleNamespace(dry_run=False), program.Controls()
Quote = type(market.quote("T0001", wall_clock))
market.quote = quote
stand_ins = {
    "query": lambda model: no_options,
    "Controls": lambda *_: wall_clock,
    "drilled_fault": lambda: None,
    "COSTS": NoCosts,
}
for name, stand_in in stand_ins.items():
    getattr(program, name)  # One that is there no longer would be left out unnoticed.
    setattr(program, name, stand_in)
