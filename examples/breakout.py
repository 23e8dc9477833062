"""A small bot that leaves its orders with the broker: it buys a breakout, and a bracket takes it out again.

    python examples/breakout.py                        # a recorded year, on the sample market

It warms up with one request for past bars, then steps bar by bar: the high of the last bars is where a stop
buys, and with it come a take-profit above and a stop-loss below, of which one cancels the other. Whether
they are filled is the broker's business; the bot only reads `fills`.
"""

import argparse
from collections import deque
from decimal import Decimal

import requests

CENT = Decimal("0.01")


class Broker:
    """The broker's API. Numbers stay exact: JSON's are read as Decimals."""

    def __init__(self, url: str, key: str):
        self.url = url
        self.session = requests.Session()
        self.session.headers["Authorization"] = f"Bearer {key}"

    def call(self, method: str, path: str, **options) -> dict:
        response = self.session.request(method, f"{self.url}/api/v1{path}", timeout=30, **options)
        answer = response.json(parse_float=Decimal)
        if not response.ok:
            raise SystemExit(f"{method} {path}: {answer['detail']}")
        return answer


def backtest(broker: Broker, ticker: str, window: int = 20) -> None:
    """Step a fresh account through the recorded year, one request a bar and one for each change of orders."""
    market = broker.call("GET", "/market")
    broker.call("POST", "/account/reset", json={})
    broker.call("PUT", "/market/clock", json={"at": market["first_bar"]})
    broker.call("POST", "/market/advance", json={"bars": window})
    past = broker.call("GET", f"/bars/{ticker}", params={"limit": window})["bars"]
    highs = deque([bar["high"] for bar in past], maxlen=window)
    while True:
        if not broker.call("GET", "/orders")["orders"]:  # Nothing is held, and nothing waits to be.
            leave_a_bracket(broker, ticker, max(highs))
        step = broker.call("POST", "/market/advance", json={"tickers": [ticker]})
        highs.append(step["prices"][ticker])
        for fill in step["fills"]:
            print(f"{step['now'][:10]} {fill['trade_type']:4} {fill['quantity']:>4} at {fill['price']}")
        if step["now"] == market["last_bar"]:
            return


def leave_a_bracket(broker: Broker, ticker: str, high: Decimal) -> None:
    """Buy when the price breaks through `high`, and sell 6 % above or 3 % below it."""
    cash = broker.call("GET", "/balance")["buying_power"]
    broker.call(
        "POST",
        "/orders",
        json={
            "ticker": ticker,
            "action": "buy",
            "order_type": "stop",
            "quantity": str(int(cash * Decimal("0.95") / high)),
            "stop_price": str(high + CENT),
            "take_profit": {"limit_price": str((high * Decimal("1.06")).quantize(CENT))},
            "stop_loss": {"stop_price": str((high * Decimal("0.97")).quantize(CENT))},
        },
    )


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--url", default="http://127.0.0.1:8000")
    options.add_argument("--key", default="test-api-key-123")
    options.add_argument("--ticker", default="AAPL")
    options = options.parse_args()
    broker = Broker(options.url, options.key)
    backtest(broker, options.ticker)
    summary = broker.call("GET", "/account/history")["summary"]
    for name in ("equity", "total_return_percent", "max_drawdown_percent", "trades", "win_rate_percent"):
        print(f"{name:25} {summary[name]}")
