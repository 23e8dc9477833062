"""A small bot: buys when the short moving average of a price rises above the long one, else sells.

    python examples/crossover.py --backtest            # a recorded year, on the sample market
    python examples/crossover.py --seconds 180         # whatever the server serves, price by price

It speaks to the broker over HTTP alone, so the very same code trades live and through the past: in a
back-test only `next_bar` differs, which moves the account's stopped clock on instead of waiting.
"""

import argparse
import time
from collections import deque
from contextlib import suppress
from decimal import Decimal
from uuid import uuid4

import requests


class Broker:
    """The few calls that the bot needs. Numbers stay exact: JSON's are read as Decimals."""

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

    def trade(self, action: str, ticker: str, quantity: int) -> dict:
        """A market order. With a key of its own it could be sent again without being booked twice."""
        return self.call(
            "POST",
            "/trade",
            json={"ticker": ticker, "action": action, "quantity": quantity},
            headers={"Idempotency-Key": str(uuid4())},
        )


def decide(prices: deque, short: int) -> str:
    """`buy` while the average of the last `short` prices is above that of all of them, else `sell`."""
    recent = list(prices)[-short:]
    return "buy" if sum(recent) / len(recent) > sum(prices) / len(prices) else "sell"


def run(broker: Broker, ticker: str, next_bar, short: int = 10, long: int = 30) -> None:
    """Trade `ticker` until `next_bar` says that there is no more."""
    prices, held = deque(maxlen=long), 0
    while True:
        price = broker.call("GET", f"/price/{ticker}")["price"]
        prices.append(price)
        if len(prices) == long:
            wanted = decide(prices, short)
            if wanted == "buy" and not held:
                held = int(broker.call("GET", "/balance")["cash_balance"] * Decimal("0.99") / price)
                broker.trade("buy", ticker, held)
            elif wanted == "sell" and held:
                broker.trade("sell", ticker, held)
                held = 0
        if not next_bar():
            return


def backtest(broker: Broker, ticker: str) -> None:
    """A fresh account, the clock at the first bar, and one bar after the other to the last."""
    market = broker.call("GET", "/market")
    broker.call("POST", "/account/reset", json={})
    broker.call("PUT", "/market/clock", json={"at": market["first_bar"]})

    def next_bar() -> bool:
        return broker.call("POST", "/market/advance", json={})["now"] < market["last_bar"]

    run(broker, ticker, next_bar)


def report(broker: Broker) -> None:
    """Print how it went, and draw the equity curve where matplotlib is installed."""
    history = broker.call("GET", "/account/history")
    for name, value in history["summary"].items():
        print(f"{name:25} {value}")
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return
    pyplot.plot([float(point["equity"]) for point in history["points"]])
    pyplot.title("Equity in dollars, day by day")
    pyplot.savefig("equity.png")
    print("The equity curve is in equity.png.")


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--url", default="http://127.0.0.1:8000")
    options.add_argument("--key", default="test-api-key-123")
    options.add_argument("--ticker", default="AAPL")
    options.add_argument("--backtest", action="store_true", help="replay the recorded year")
    options.add_argument("--seconds", type=float, default=180, help="between two looks at the price")
    options = options.parse_args()
    broker = Broker(options.url, options.key)
    if options.backtest:
        backtest(broker, options.ticker)
    else:
        with suppress(KeyboardInterrupt):  # Ctrl-C ends the trading and prints the result.
            run(broker, options.ticker, next_bar=lambda: time.sleep(options.seconds) or True)
    report(broker)
