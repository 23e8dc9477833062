"""What TradingView's alerts say: an order, and in its body the key, for they can set no header.

What becomes of an alert is `execute` in app.py, as for `trade`. docs/tradingview.md has the text to paste.
"""

import re
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from alpaca_face import ticker_of
from messages import API_KEY, ApiKey, Order, checked_order_key, content, means, parsed, text_like

EXCHANGES = "AMEX|NASDAQ|NYSE|BITSTAMP|COINBASE|CRYPTO|KRAKEN"
"""Whose tickers mean the same here: SAP is another share at XETR than at NYSE."""


def ticker_in(symbol: str) -> str:
    """The ticker that TradingView's `symbol` means: `BTC-USD` for `BTCUSD` and `COINBASE:BTCUSD`."""
    if not isinstance(symbol, str):
        raise ValueError("must be a ticker such as AAPL or BTCUSD")
    exchange, _, ticker = symbol.rpartition(":")
    if exchange and not re.fullmatch(f"({EXCHANGES})(_DLY?)?", exchange.upper()):  # _DLY: with a delay.
        raise ValueError(f"must have no exchange before it but {EXCHANGES.replace('|', ', ')}")
    return ticker_of(ticker)


def sent_key() -> str:
    """The API key in the request's body, or "" where that has none; `Refused` if it is no JSON."""
    alert = parsed(content())
    key = alert.get("key") if isinstance(alert, dict) else None
    return key if isinstance(key, str) and re.fullmatch(API_KEY, key) else ""


class Alert(Order):
    """An order with its key, as TradingView sends it."""

    key: ApiKey = Field(description="Your API key", repr=False)
    ticker: Annotated[
        str, BeforeValidator(ticker_in), text_like(".+", examples=["AAPL", "NASDAQ:AAPL", "BTCUSD"])
    ]
    id: Annotated[str, AfterValidator(checked_order_key), text_like("[ -~]{1,255}")] | None = means(
        "The order's `Idempotency-Key`; it counts before the header", default=None
    )

    @model_validator(mode="before")
    @classmethod
    def keeps_its_key_to_itself(cls, alert):
        """Answers quote what is wrong, so the key, which `admit` has found, must stand nowhere else."""
        if isinstance(alert, dict):
            others = [text for name, value in alert.items() if name != "key" for text in (name, value)]
            if any(alert["key"].lower() in text.lower() for text in others if isinstance(text, str)):
                raise ValueError("the key must stand nowhere but in `key`")
        return alert
