"""What comes in and what goes out: numbers, checks, requests, answers, and the JSON that they travel in.

    Numbers and times   how exact amounts are, how large, and how they are written
    Refusals            a "no" is an exception with a sentence
    Checks              what a ticker, an amount, an email address may be
    Requests            what can be asked, each as one class
    Answers             the words that answers are made of; each thing's own answer stands beside it
    JSON and CSV        read with exact digits, and written with them
    Reading requests    the decorator `takes`

Nothing here touches the ledger or asks for a price.
"""

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime, timedelta
from decimal import ROUND_FLOOR, ROUND_HALF_EVEN, Decimal, DefaultContext, setcontext
from functools import wraps
from typing import Annotated, Literal, NotRequired
from uuid import uuid4

import orjson
from flask import Response, g, request, stream_with_context
from flask.json.provider import JSONProvider
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from typing_extensions import TypedDict
from werkzeug.exceptions import HTTPException, RequestEntityTooLarge

# ------------------------------------------------------------------------------- Numbers and times

UNIT = Decimal("0.00000001")
"""The smallest step of every amount, price and quantity: 8 decimals."""

ORDER_LIMIT = Decimal(10_000_000_000)
"""An order's quantity and price stay below this."""

ACCOUNT_LIMIT = Decimal(90_000_000_000)
"""An account's cash, and the quantity and the cost of each of its holdings, stay below this.

SQLite keeps amounts as integers of 10^-8, and 9.22e18 is the largest integer that it has.
"""

TIMEFRAMES = {
    "1m": timedelta(minutes=1),
    "5m": timedelta(minutes=5),
    "15m": timedelta(minutes=15),
    "1h": timedelta(hours=1),
    "1d": timedelta(days=1),
    "1w": timedelta(weeks=1),
}
"""How long a bar can be, by its name."""

DefaultContext.prec = 60
setcontext(DefaultContext)
"""Two amounts multiply to 38 digits, and Python's 28 would round some away. Every thread that begins
after this line takes its precision from `DefaultContext`."""


def now() -> datetime:
    """The time, in UTC."""
    return datetime.now(UTC)


def rounded(amount: Decimal, rounding: str = ROUND_HALF_EVEN) -> Decimal:
    """`amount` to 8 decimals."""
    return amount.quantize(UNIT, rounding)


def value_of(quantity: Decimal, price: Decimal, rounding: str = ROUND_FLOOR) -> Decimal:
    """What `quantity` at `price` comes to, in dollars, to 8 decimals.

    Rounded down it is what a sale brings, rounded up what a purchase costs: rounding never makes money.
    """
    return rounded(quantity * price, rounding)


CENT, HUNDRED = Decimal("0.01"), Decimal(100)


def percent(part: Decimal, whole: Decimal) -> Decimal | None:
    """`part` of `whole` in percent, to 2 decimals; of nothing there is no percentage."""
    return (part * HUNDRED / whole).quantize(CENT) if whole else None


def plain(number: Decimal) -> str:
    """The exact digits of `number`: no exponent, no trailing zeros, no minus before a zero."""
    if not number:
        return "0"
    text = str(number)
    if "E" in text:
        text = f"{number:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def iso(moment: datetime) -> str:
    """`moment` as RFC 3339, in UTC, ending in `Z`."""
    return moment.astimezone(UTC).isoformat().replace("+00:00", "Z")


def moment_from(text: str) -> datetime:
    """The moment in an RFC 3339 text such as `2012-06-01T00:00:00Z`, in UTC; else ValueError."""
    rfc3339 = r"[0-9]{4}(-[0-9]{2}){2}[Tt]([0-9]{2}:){2}[0-9]{2}(\.[0-9]+)?([Zz]|[+-][0-9]{2}:[0-9]{2})"
    if not isinstance(text, str) or not re.fullmatch(rfc3339, text):
        raise ValueError("must be a time such as 2012-06-01T00:00:00Z")
    try:
        return datetime.fromisoformat(text.upper()).astimezone(UTC)
    except OverflowError as error:
        raise ValueError("must be a year from 1 to 9999") from error


# ---------------------------------------------------------------------------------------- Refusals


STATUS = {
    "invalid_json": 400,
    "invalid_request": 400,
    "unauthorized": 401,
    "forbidden": 403,
    "unknown_ticker": 404,
    "not_found": 404,
    "method_not_allowed": 405,
    "already_exists": 409,
    "price_below_market": 409,
    "price_above_market": 409,
    "insufficient_funds": 409,
    "insufficient_shares": 409,
    "unsupported_currency": 409,
    "unsupported_price": 409,
    "stale_price": 409,
    "limit_exceeded": 409,
    "market_is_live": 409,
    "clock_is_running": 409,
    "not_open": 409,
    "not_replaceable": 409,
    "too_large": 413,
    "unsupported_media_type": 415,
    "idempotency_key_reused": 422,
    "rate_limited": 429,
    "internal_error": 500,
    "price_unavailable": 503,
    "database_unavailable": 503,
    "outcome_unknown": 503,
}
"""Every `code` that an answer can carry, and its status."""

SENTENCES = {
    "not_found": "There is nothing at this path.",
    "method_not_allowed": "This path does not answer this method; `Allow` names those it does.",
    "too_large": "A request's body has 64 KiB at the most.",
    "internal_error": "The server met a fault of its own; it is in its log.",
}

CODE = {400: "invalid_request", 404: "not_found", 405: "method_not_allowed", 413: "too_large"}
CODE |= {415: "unsupported_media_type", 500: "internal_error"}
"""The `code` of an error that Flask itself raises, by its status."""


class Refused(Exception):
    """A "no", with the reason in a sentence and its numbers: `Refused(code, detail, required=...)`."""

    def __init__(self, code: str, detail: str, **members):
        super().__init__(detail)
        self.code, self.detail, self.members = code, detail, members


def unauthorized() -> Refused:
    return Refused("unauthorized", "Send your API key: `Authorization: Bearer <key>`, or in an alert `key`.")


def invalid(errors: Iterable[dict]) -> Refused:
    """The refusal of a request with one entry in `errors` for each bad field."""
    errors = list(errors)
    sentence = "; ".join(f"{error['field']}: {error['message']}" for error in errors)
    return Refused("invalid_request", f"{sentence}.", errors=errors)


# ------------------------------------------------------------------------------------------ Checks

TICKER = r"([.\-=^]*[A-Za-z0-9][A-Za-z0-9.\-=^]*|[A-Za-z]{1,5}/[A-Ca-c]|[A-Za-z0-9]{1,10}/[A-Za-z0-9]{3,9})"
SHARE_CLASS = "([A-Z]{1,5})[./-]([ABC])"
EMAIL = "[!-?A-~]+@[!-?A-~]+"
API_KEY = "[!-~]{8,255}"


def checked_ticker(text: str) -> str:
    """`text` as the books spell it, if it can be a ticker: `BRK-B` for `brk.b`, `BTC-USD` for `BTC/USD`.

    Checked first: `"ı".upper()` is `"I"`.
    """
    if len(text) > 20 or not re.fullmatch(TICKER, text):
        parts = "two parts such as BRK/B and BTC/USD"
        raise ValueError(f"must be 1 to 20 letters, digits and . - = ^, or {parts}")
    text = text.upper()
    share = re.fullmatch(SHARE_CLASS, text)
    return f"{share[1]}-{share[2]}" if share else text.replace("/", "-")


def checked_tickers(text) -> list[str]:
    """The tickers in `AAPL, IBM`, each once, in that order."""
    if not isinstance(text, str):
        raise ValueError("must be tickers with commas between them")
    tickers = list(dict.fromkeys(checked_ticker(part.strip()) for part in text.split(",")))
    if len(tickers) > 100:
        raise ValueError("must be 100 tickers at the most")
    return tickers


def checked_decimal(value) -> Decimal:
    """The Decimal in a string, as JSON writes numbers; a JSON number was parsed as one already."""
    if isinstance(value, str) and re.fullmatch(r"-?[0-9]+(\.[0-9]+)?([eE][-+]?[0-9]{1,9})?", value):
        value = Decimal(value)
    if not isinstance(value, Decimal):
        raise ValueError("must be a number or a decimal string")
    return value


def checked_amount(value, rounding=ROUND_HALF_EVEN, least=UNIT, limit=ORDER_LIMIT) -> Decimal:
    """A price, or with another rounding a quantity, to 8 decimals: bots keep their books in binary floats."""
    value = checked_decimal(value)
    # Compared before it is rounded: a number may have a million digits before its point.
    exact = value.quantize(UNIT, rounding) if -limit < value < limit else value
    if not least <= exact < limit or (value and not exact):
        raise ValueError(f"must be {'above 0 and' if least else f'0, or from {UNIT:f} to'} below {limit}")
    return exact


def checked_cash(value) -> Decimal:
    """What an account begins with, in dollars."""
    return abs(checked_amount(value, least=Decimal(0), limit=ACCOUNT_LIMIT))  # JSON knows -0


def checked_change(value) -> Decimal:
    """By how much the admin changes a holding or the cash, up or down, to 8 decimals."""
    amount = checked_decimal(value)
    size = checked_amount(amount.copy_abs(), least=Decimal(0), limit=ACCOUNT_LIMIT)
    return -size if size and amount < 0 else size


def checked_reason(text: str) -> str:
    if not 1 <= len(text.strip()) <= 300 or not text.isprintable():
        raise ValueError("must be a sentence of 1 to 300 characters")
    return text.strip()


def checked_email(text: str) -> str:
    if len(text) > 254 or not re.fullmatch(EMAIL, text):
        raise ValueError("must be an email address such as alice@example.com")
    return text.lower()


def checked_key(text: str) -> str:
    if not re.fullmatch(API_KEY, text):
        raise ValueError("must be 8 to 255 printable ASCII characters without spaces")
    return text


def checked_order_key(text: str) -> str:
    if not re.fullmatch("[ -~]{1,255}", text):
        raise ValueError("must be 1 to 255 printable ASCII characters")
    return text


def whole(number):
    """The integer in a JSON number or in ASCII digits; `true`, 1.5 and `5_0` are none."""
    if isinstance(number, str) and re.fullmatch("[0-9]+", number):
        number = Decimal(number)
    if not isinstance(number, Decimal) or number != number.to_integral_value():
        raise ValueError("must be a whole number")
    return int(number) if -(10**20) < number < 10**20 else 10**20


def in_lower_case(word):
    return word.lower() if isinstance(word, str) else word


AnyCase = BeforeValidator(in_lower_case)


def means(description: str, *default, **more):
    return Field(*default, description=description, **more)


def text_like(pattern: str, **more) -> WithJsonSchema:
    """What a check says, for /openapi.json."""
    return WithJsonSchema({"type": "string", "pattern": f"^{pattern}$", **more})


def number_below(limit: Decimal, least: float = 1e-8) -> WithJsonSchema:
    """What `checked_amount` takes, with exponents and with digits beyond the eighth decimal."""
    numbers = [{"type": "number", "minimum": 1e-8, "exclusiveMaximum": int(limit)}]
    numbers += [] if least else [{"type": "number", "enum": [0]}]
    too_small = r"(?!0+(\.(0{1,7}|0{8}[0-9]*))?$)" if least else r"(?!0+\.0{8}0*[1-9])"
    most = str(int(limit) - 1)  # 9999999999, say: its first digit is the only one that is not a 9.
    more = len(most) - 1
    digits = rf"^{too_small}(?!{most}\.9{{8}})[0-{most[0]}]?[0-9]{{1,{more}}}(\.[0-9]+)?$"
    exponent = rf"^[1-9](\.[0-9]{{1,7}})?[eE](-[1-7]|\+?[0-{more - 1}])$"
    texts = [{"type": "string", "pattern": pattern} for pattern in (digits, exponent)]
    return WithJsonSchema({"anyOf": [*numbers, *texts]})


def whole_number(low: int, high: int):
    return Annotated[int, Field(ge=low, le=high), BeforeValidator(whole)]


Ticker = Annotated[str, AfterValidator(checked_ticker), text_like(TICKER, maxLength=20, examples=["AAPL"])]
Tickers = Annotated[
    list[str], BeforeValidator(checked_tickers), text_like(f"{TICKER}(,{TICKER})*", examples=["AAPL,IBM"])
]
Action = Literal["buy", "sell"]
ActionWord = Annotated[Action, AnyCase, means("In any case")]
TradeType = Literal["buy", "sell", "split", "dividend", "correction"]
Resolution = Literal["trade", "day", "bar"]
ResolutionWord = Annotated[Resolution, AnyCase]
OrderStatus = Annotated[Literal["open", "closed", "all"], AnyCase]
OrderAmount = Annotated[Decimal, BeforeValidator(checked_amount), number_below(ORDER_LIMIT)]
OrderType = Literal["market", "limit", "stop", "stop_limit", "trailing_stop"]
TimeInForce = Annotated[
    Literal["gtc", "day", "ioc", "fok"], means("How long it waits: day, or until canceled; or not")
]
TrailPercent = Annotated[
    Decimal, BeforeValidator(lambda p: checked_amount(p, limit=HUNDRED)), number_below(HUNDRED)
]
Notional = Annotated[
    Decimal, BeforeValidator(lambda dollars: checked_amount(dollars, ROUND_FLOOR)), number_below(ORDER_LIMIT)
]
Cash = Annotated[Decimal, BeforeValidator(checked_cash), number_below(ACCOUNT_LIMIT, least=0)]
UP_OR_DOWN = WithJsonSchema({"type": ["number", "string"]})
SignedAmount = Annotated[Decimal, BeforeValidator(checked_change), UP_OR_DOWN]
Reason = Annotated[str, AfterValidator(checked_reason), Field(max_length=300)]
Email = Annotated[str, AfterValidator(checked_email), text_like(EMAIL, maxLength=254)]
ApiKey = Annotated[str, AfterValidator(checked_key), text_like(API_KEY)]
RequestedTime = Annotated[datetime, BeforeValidator(moment_from)]
Timeframe = Literal[*TIMEFRAMES]

# ---------------------------------------------------------------------------------------- Requests


class Asked(BaseModel):
    """A request. A member that is `null` counts as left out; an unknown one is refused even then."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def without_nulls(cls, document):
        if not isinstance(document, dict):
            return document
        return {n: v for n, v in document.items() if v is not None or n not in cls.model_fields}


class NoOptions(Asked):
    """A request that says nothing more."""


class Sized(Asked):
    """What to trade, and how much of it: a quantity, or the dollars that it should come to."""

    ticker: Ticker = means("What to trade", examples=["AAPL"])
    action: ActionWord
    quantity: Annotated[Decimal, number_below(ORDER_LIMIT)] | Literal["all"] | None = means(
        "Shares or coins; in a sale also `all`. Rounded to 8 decimals, in a purchase down", None
    )
    notional: Notional | None = means("Instead of a quantity: dollars, rounded down to 8 decimals", None)

    @field_validator("quantity", mode="before")
    @classmethod
    def taken(cls, quantity, fields: ValidationInfo):
        """`all`, or the quantity as it is taken: a purchase must not come to more than was asked."""
        is_purchase = fields.data.get("action") == "buy"
        if isinstance(quantity, str) and quantity.lower() == "all":
            if is_purchase:
                raise ValueError("must be a number in a purchase")
            return "all"
        return checked_amount(quantity, ROUND_FLOOR if is_purchase else ROUND_HALF_EVEN)

    @model_validator(mode="after")
    def needs_a_size(self):
        if (self.quantity is None) == (self.notional is None):
            raise ValueError("give either quantity or notional")
        return self

    @property
    def asked(self) -> str | None:
        """What it says instead of a quantity."""
        if self.notional:
            return f"notional {plain(self.notional)}"
        return "all" if self.quantity == "all" else None


class Order(Sized):
    """What a bot asks to be traded at once."""

    price: OrderAmount | None = means(
        "Dollars each: the most to pay, or the least to take. Without it: the market price", default=None
    )


class TakeProfit(Asked):
    limit_price: OrderAmount


class StopLoss(Asked):
    stop_price: OrderAmount
    limit_price: OrderAmount | None = means("The least to take, where it is not any price", default=None)


PRICES_OF = {
    "market": (),
    "limit": ("limit_price",),
    "stop": ("stop_price",),
    "stop_limit": ("stop_price", "limit_price"),
    "trailing_stop": ("trail_percent", "trail_amount"),
}
"""Which prices an order of each type has; a trailing one has one of the two."""


def upside_down(gain: Decimal | None, loss: Decimal | None, price: Decimal | None) -> str | None:
    """What is wrong with exits at a `gain` and a `loss`, in a sentence, for what was bought at `price`."""
    if gain and loss and gain <= loss:
        return "take_profit must be above stop_loss"
    if gain and price and gain <= price:
        return f"take_profit must be above {plain(price)}"
    if loss and price and loss >= price:
        return f"stop_loss must be below {plain(price)}"
    return None


class NewOrder(Sized):
    """An order that may wait."""

    order_type: Annotated[OrderType, BeforeValidator(in_lower_case)]
    limit_price: OrderAmount | None = means("The most to pay, or the least to take, in dollars", default=None)
    stop_price: OrderAmount | None = means("The price that wakes it, in dollars", default=None)
    trail_percent: TrailPercent | None = means("How far the stop trails, in percent", default=None)
    trail_amount: OrderAmount | None = means("How far the stop trails, in dollars", default=None)
    time_in_force: Annotated[TimeInForce, BeforeValidator(in_lower_case)] | None = "gtc"
    take_profit: TakeProfit | None = means("In a purchase: a limit sale that comes with it", default=None)
    stop_loss: StopLoss | None = means("In a purchase, or a limit sale: a stop that sells", default=None)

    @model_validator(mode="after")
    def has_what_its_type_needs(self):
        kind, prices = self.order_type, PRICES_OF[self.order_type]
        given = [name for names in PRICES_OF.values() for name in names if getattr(self, name) is not None]
        if strange := [name for name in given if name not in prices]:
            raise ValueError(f"a {kind} order has no {strange[0]}")
        if kind == "trailing_stop" and len(set(given)) != 1:
            raise ValueError("give either trail_percent or trail_amount")
        if missing := [name for name in prices if name not in given and kind != "trailing_stop"]:
            raise ValueError(f"a {kind} order needs a {missing[0]}")
        if self.notional and kind != "market":
            raise ValueError("notional is for market orders")
        return self

    @model_validator(mode="after")
    def brings_what_can_end_it(self):
        gain, loss = self.take_profit, self.stop_loss
        if not gain and not loss:
            return self
        if self.action == "sell" and (gain or self.order_type != "limit"):
            raise ValueError("a sale brings nothing but a stop_loss, and that with a limit: no short selling")
        if self.time_in_force not in ("gtc", "day"):
            raise ValueError("what brings other orders is gtc or day")
        if wrong := self.is_upside_down(self.limit_price or self.stop_price):
            raise ValueError(wrong)
        return self

    def is_upside_down(self, price: Decimal | None) -> str | None:
        """What is wrong with what it brings, if that is on the wrong side of its `price` or of each other."""
        gain = self.take_profit and self.take_profit.limit_price
        loss = self.stop_loss and self.stop_loss.stop_price
        return upside_down(gain, loss, price)

    @property
    def legs(self) -> list[dict]:
        """The type and the prices of the sales that it brings."""
        legs = []
        if self.take_profit:
            legs.append({"order_type": "limit", "limit_price": self.take_profit.limit_price})
        if loss := self.stop_loss:
            kind = "stop_limit" if loss.limit_price else "stop"
            legs.append({"order_type": kind, "stop_price": loss.stop_price, "limit_price": loss.limit_price})
        return legs


class ChangedOrder(Asked):
    """What is to be different."""

    quantity: Annotated[Decimal, BeforeValidator(checked_decimal), number_below(ORDER_LIMIT)] | None = None
    limit_price: OrderAmount | None = None
    stop_price: OrderAmount | None = None

    @model_validator(mode="after")
    def changes_something(self):
        if not self.model_dump(exclude_none=True):
            raise ValueError("give a quantity, limit_price or stop_price")
        return self

    def taken(self, action: Action) -> "ChangedOrder":
        """As it is taken: a purchase must not come to more than was asked. `Refused` if that is nothing."""
        if self.quantity is None:
            return self
        try:
            rounding = ROUND_FLOOR if action == "buy" else ROUND_HALF_EVEN
            return self.model_copy(update={"quantity": checked_amount(self.quantity, rounding)})
        except ValueError as error:
            raise invalid([{"field": "quantity", "message": str(error)}]) from None


class TradeOptions(Asked):
    dry_run: bool = Field(False, description="Answer as the trade would, and write nothing")


class PathTicker(Asked):
    ticker: Ticker


class BarOptions(Asked):
    """Which past prices to show."""

    timeframe: Annotated[Timeframe, AnyCase] = means("How long a bar is, in any case", "1d")
    start: RequestedTime = Field(None, description="The earliest beginning of a bar to show, inclusive")
    end: RequestedTime = Field(None, description="The time before which bars to show begin, exclusive")
    limit: whole_number(1, 10_000) = Field(100, description="So many at the most: the last ones")


class Listed(Asked):
    tickers: Tickers = Field(description="1 to 100 tickers, with commas between them")


class RunOption(Asked):
    run: whole_number(1, 2**31 - 1) = means("The account's run; without it, the current one", default=None)


class HistoryOptions(RunOption):
    resolution: ResolutionWord = means("A point for each trade, day or bar, in any case", "day")


class Filters(RunOption):
    """Which trades to show."""

    ticker: Ticker = None
    action: Annotated[TradeType, AnyCase] = means("Of which type, in any case", None)
    since: RequestedTime = Field(None, description="The earliest time to show, inclusive")
    until: RequestedTime = Field(None, description="The time before which to show, exclusive")


class Page(Filters):
    limit: whole_number(1, 500) = Field(50, description="Trades on a page")
    cursor: whole_number(1, 2**63 - 1) = Field(None, description="`next_cursor` of the page before")


class OrderFilters(RunOption):
    """Which orders to show."""

    status: OrderStatus = means("`open` includes what is held", "open")
    ticker: Ticker = None


class OrderPage(OrderFilters):
    limit: whole_number(1, 500) = Field(50, description="Orders on a page")
    cursor: whole_number(1, 2**63 - 1) = Field(None, description="`next_cursor` of the page before")


class Reset(Asked):
    cash: Cash | None = means("Dollars to begin with; without it, the server's `STARTING_CASH`", None)


class NewAccount(Reset):
    email: Email = Field(examples=["alice@example.com"])
    key: ApiKey | None = None


class Correction(Asked):
    """What is to change in an account."""

    ticker: Ticker = means("Whose holding changes", examples=["AAPL"])
    quantity: SignedAmount = means("Shares or coins to add, or below 0 to take away", default=Decimal(0))
    cash: SignedAmount = means("Dollars to add, or below 0 to take away", default=Decimal(0))
    reason: Reason = means("Why, for all to read", examples=["FB is called META now"])

    @model_validator(mode="after")
    def changes_something(self):
        if not self.quantity and not self.cash:
            raise ValueError("give a quantity or cash to change")
        return self


class Clock(BaseModel):
    """Here `null` means something: that the clock runs."""

    model_config = ConfigDict(extra="forbid")

    at: RequestedTime | None


class Advance(Asked):
    bars: whole_number(1, 100_000) | None = 1
    tickers: list[Ticker] | None = Field(None, max_length=100, description="Whose prices to answer")


class PinnedPrice(Asked):
    price: OrderAmount


# ----------------------------------------------------------------------------------------- Answers


def told(answer: type, thing, **otherwise) -> dict:
    """An `answer` about `thing`: its attributes of the same names, and what is said `otherwise`."""
    names = [name for name in answer.__annotations__ if name not in answer.__optional_keys__]
    return {name: otherwise[name] if name in otherwise else getattr(thing, name) for name in names}


def number(description: str, example: float):
    """An exact number in an answer. A meaning of its own is told by `means`."""
    schema = {"type": "number", "description": description, "examples": [example]}
    return Annotated[Decimal, WithJsonSchema(schema)]


Dollars = number("US dollars, exact, at most 8 decimals", 1502.5)
Price = number("Dollars for one share or coin, exact, at most 8 decimals", 150.25)
Shares = number("Shares or coins, exact, at most 8 decimals", 10)
Percent = number("Percent, with 2 decimals", 1.25)
Ratio = number("A ratio, with 8 decimals", 1.14285714)
BasisPoints = number("Hundredths of a percent", 5)
Milliseconds = Annotated[float, means("Milliseconds")]
Gigabytes = Annotated[float, means("GiB")]
Time = Annotated[datetime, means("RFC 3339, UTC", examples=["2012-06-01T00:00:00Z"])]
UserNumber = Annotated[int, means("The account's number", examples=[1])]
RunNumber = Annotated[int, means("Counts how often the account has started over", examples=[1])]
Symbol = Annotated[str, means("Ticker", examples=["AAPL"])]
Secret = Annotated[str, means("The API key; it is shown this once")]
Source = Literal["yahoo_finance", "yahoo", "alphavantage", "sample"]
SourceOrAdmin = Literal["yahoo_finance", "yahoo", "alphavantage", "sample", "admin"]
Health = Literal["healthy", "unhealthy"]
Decimals = Annotated[int, means("Decimals at the most")]

REHEARSED = {"id": None, "dry_run": True}
"""What an answer has on top when nothing was booked."""


class BalanceAnswer(TypedDict):
    user_id: UserNumber
    cash_balance: Dollars
    reserved_cash: Annotated[Dollars, means("Held back for open orders, in dollars")]
    buying_power: Annotated[Dollars, means("Cash that is not held back, in dollars")]


class RunAnswer(TypedDict):
    user_id: UserNumber
    run: RunNumber
    cash_balance: Dollars


class CostsAnswer(TypedDict):
    commission_bps: BasisPoints
    commission_min: Annotated[Dollars, means("The least commission, in dollars")]
    slippage_bps: Annotated[BasisPoints, means("What a market order loses, in hundredths of a percent")]


class LimitsAnswer(TypedDict):
    order: Annotated[Dollars, means("A quantity and a price stay below this")]
    account: Annotated[Dollars, means("Cash and each holding stay below this")]
    open_orders: Annotated[int, means("Open and held orders of an account at the most")]
    body_bytes: Annotated[int, means("Bytes of a request's body at the most")]


class ScalesAnswer(TypedDict):
    quantity: Decimals
    price: Decimals
    total_amount: Decimals
    percent: Decimals


class RulesAnswer(TypedDict):
    rules: list[str]
    order_types: list[OrderType]
    costs: CostsAnswer
    limits: LimitsAnswer
    scales: ScalesAnswer
    starting_cash: Dollars
    price_sources: list[Source]
    price_cache_seconds: Annotated[int, means("How long a quote holds")]
    corporate_actions: Annotated[bool, means("Whether splits and dividends are booked")]


class BarAnswer(TypedDict):
    timestamp: Annotated[Time, means("Where the bar begins; weeks on a Monday")]
    open: Annotated[Price, means("The first price, in the currency that the ticker is quoted in")]
    high: Annotated[Price, means("The highest price")]
    low: Annotated[Price, means("The lowest price")]
    close: Annotated[Price, means("The last price so far")]
    volume: Annotated[Shares, means("Shares or coins that changed hands; 0 where nobody counted")]


class BarsAnswer(TypedDict):
    ticker: Symbol
    timeframe: Timeframe
    bars: Annotated[list[BarAnswer], means("Oldest first; the last one may not be over")]


class MarketAnswer(TypedDict):
    source: Source
    clock: Literal["wall", "manual"]
    now: Annotated[Time, means("The market's time, in the recorded past")]
    first_bar: Annotated[Time, means("Where the recorded market begins")]
    last_bar: Annotated[Time, means("Where it ends")]
    tickers: list[Symbol]
    pins: dict[str, Price]


class OpenedAccount(TypedDict):
    user_id: UserNumber
    email: str
    cash_balance: Dollars
    api_key: Secret


class NewKey(TypedDict):
    user_id: UserNumber
    api_key: Secret


class ClosedAccount(TypedDict):
    user_id: UserNumber
    closed: bool


class ServerInfo(TypedDict):
    platform: Annotated[str, means("Operating system")]
    platform_version: str
    architecture: Annotated[str, means("Processor's kind")]
    python_version: str
    cpu_count: int | None
    memory_total_gb: Gigabytes
    memory_available_gb: Gigabytes
    cpu_percent: float


class ProcessInfo(TypedDict):
    pid: Annotated[int, means("The process that answers, one of several")]
    started_at: Time


class DatabaseHealth(TypedDict):
    status: Health
    engine: str
    latency_ms: Milliseconds | None


class Percentiles(TypedDict):
    p50: Annotated[float, means("Milliseconds, the median")]
    p95: Annotated[float, means("Milliseconds, of 95 %")]
    p99: Annotated[float, means("Milliseconds, of 99 %")]


class RequestsAnswer(TypedDict):
    count: Annotated[int, means("Requests answered")]
    errors: Annotated[int, means("Of these, answered with a status of 500 or above")]
    latency_ms: Percentiles


class HealthAnswer(TypedDict):
    status: Health
    timestamp: Time
    version: Annotated[str, means("The program's version")]
    uptime_seconds: Annotated[int, means("How long this process has run")]
    process: ProcessInfo
    server_info: ServerInfo
    database: DatabaseHealth
    prices: Annotated[dict, means("What the cache and each price source have seen")]
    requests: RequestsAnswer


class BadField(TypedDict):
    field: Annotated[str, means("Which field")]
    message: Annotated[str, means("What is wrong with it")]


class Problem(TypedDict):
    """Why not, after RFC 9457; the numbers of a refusal are members of their own."""

    type: Annotated[str, means("`about:blank`")]
    title: Annotated[str, means("The code, to read")]
    status: Annotated[int, means("The answer's status once more")]
    detail: Annotated[str, means("What is wrong, in a sentence")]
    code: Annotated[str, means("What a bot goes by; it never changes")]
    errors: NotRequired[list[BadField]]
    required: NotRequired[Annotated[Dollars, means("What the order needs: dollars or shares")]]
    available: NotRequired[Annotated[Dollars, means("What there is: dollars or shares")]]
    price: NotRequired[Price]
    market_price: NotRequired[Annotated[Price, means("What the market asks, in dollars")]]
    limit: NotRequired[Annotated[Dollars, means("The amount to stay below")]]
    ticker: NotRequired[Symbol]
    currency: NotRequired[Annotated[str | None, means("ISO code, as far as the source names one")]]
    market_time: NotRequired[Annotated[Time, means("When the source itself last saw the price")]]
    trade_id: NotRequired[Annotated[str, means("The trade that the key belongs to")]]
    order_id: NotRequired[Annotated[str, means("The order that the key belongs to")]]
    order_status: NotRequired[Annotated[str, means("How the order was closed")]]
    rate_limit: NotRequired[Annotated[int, means("How many requests are answered in a window of time")]]
    retry_after: NotRequired[Annotated[int, means("Seconds until it may go better")]]


# ------------------------------------------------------------------------------------ JSON and CSV


class ExactJSON(JSONProvider):
    """JSON with the exact digits of Decimals, times in UTC ending in `Z`, and a newline at the end."""

    def dumps(self, document, **options) -> bytes:
        return orjson.dumps(document, in_json, orjson.OPT_APPEND_NEWLINE | orjson.OPT_PASSTHROUGH_DATETIME)


def in_json(value: Decimal | datetime) -> orjson.Fragment | str:
    """What orjson would not write as we do."""
    return orjson.Fragment(plain(value)) if isinstance(value, Decimal) else iso(value)


def parsed(content: bytes):
    """The JSON document in `content`, every number of it an exact Decimal."""
    try:
        text = content.decode("utf-8-sig")  # Some editors begin a file with a byte order mark.
        numbers = {"parse_int": Decimal, "parse_float": Decimal, "parse_constant": no_constant}
        return json.loads(text, **numbers, object_pairs_hook=unique_members)
    except (ValueError, ArithmeticError, RecursionError) as error:
        reason = str(error) if type(error) is ValueError else "It cannot be parsed."
        reason = "It is not in UTF-8." if isinstance(error, UnicodeDecodeError) else reason
        raise Refused("invalid_json", f"The body is not valid JSON. {reason}") from error


def no_constant(name: str):
    raise ValueError(f"{name} is no JSON number.")


def unique_members(pairs: list) -> dict:
    members = dict(pairs)
    if len(members) < len(pairs):
        raise ValueError("A member appears twice.")
    return members


def csv_answer(name: str, columns: list[str], page: Callable) -> Response:
    """All rows that `page(cursor=, limit=)` answers, a thousand at a time."""

    def lines() -> Iterator[str]:
        cursor = None
        yield ",".join(columns) + "\r\n"
        while found := page(cursor=cursor, limit=1000):
            text = io.StringIO()
            csv.writer(text).writerows(csv_row(row.to_dict(), columns) for row in found)
            yield text.getvalue()
            cursor = found[-1].id

    headers = {"Content-Disposition": f"attachment; filename={name}"}
    return Response(stream_with_context(lines()), content_type="text/csv; charset=utf-8", headers=headers)


def csv_row(shown: dict, columns: list[str]) -> list[str]:
    """A line of CSV, its numbers and times written as in JSON."""
    write = {Decimal: plain, datetime: iso}
    return [write.get(type(shown[name]), lambda value: value)(shown[name]) for name in columns]


# -------------------------------------------------------------------------------- Reading requests


def takes(body=None, query=NoOptions, path=None, body_may_miss=False, order_key=False, webhook=False):
    """What a route takes: it is checked first, handed to the route, and told by /openapi.json.

    The route is called with the `body`, the `query` and the order's key, as far as it takes them, and with
    the parts of its `path`. An unknown member or parameter is refused, as is one that comes twice. The body
    of a `webhook` may call itself what it likes, and the API key is in it.
    """

    def decorate(route):
        @wraps(route)
        def reading(**parts):
            asked = [read(body, body_may_miss, webhook)] if body else []
            values = request.args.to_dict(flat=False) if request.query_string else {}
            options = checked(query, {name: v[0] if len(v) == 1 else v for name, v in values.items()})
            asked += [options] if query is not NoOptions else []
            asked += [idempotency_key()] if order_key else []
            return route(*asked, **(dict(checked(path, parts)) if path else parts))

        reading.takes = {"body": body, "query": query, "path": path}
        reading.takes |= {"body_may_miss": body_may_miss, "webhook": webhook}
        reading.headers = [*getattr(route, "headers", []), *([ORDER_KEY] if order_key else [])]
        return reading

    return decorate


def refuses(*codes: str):
    """The codes of a route's own refusals, for /openapi.json, less those that every route has."""

    def decorate(route):
        route.refuses = codes
        return route

    return decorate


def content() -> bytes:
    """The request's body, whole; refused if it was cut short."""
    try:
        content = request.get_data()
        # Without a length said before, what is too long is cut off in silence.
        is_full = request.content_length is None and len(content) >= request.max_content_length
        if is_full and request.environ["wsgi.input"].read(1):
            raise RequestEntityTooLarge
    except HTTPException:
        raise
    except Exception as error:  # Each server raises its own for a bad chunk; all are the client's.
        raise Refused("invalid_json", "The body could not be read to its end.") from error
    if request.content_length not in (None, len(content)):  # A server passes on one that was cut short.
        sentence = f"The body has {len(content)} bytes and Content-Length said {request.content_length}."
        raise Refused("invalid_json", sentence)
    return content


def read(model: type[BaseModel], may_miss: bool, any_type: bool) -> BaseModel:
    """The request's JSON body as a `model`; refused unless every member is known and in order."""
    body = content()
    if may_miss and not body:
        return model()
    if not any_type and request.mimetype != "application/json":
        raise Refused("unsupported_media_type", "Send JSON: `Content-Type: application/json`.")
    return checked(model, parsed(body))


def checked(model: type[BaseModel], document) -> BaseModel:
    """`document` as a `model`, or `invalid_request` with one entry in `errors` for each bad field."""
    try:
        return model.model_validate(document)
    except ValidationError as error:
        raise invalid(
            {
                # Half of a surrogate pair, which JSON can name a member, has no UTF-8.
                "field": ".".join(map(str, entry["loc"])).encode(errors="replace").decode() or "body",
                "message": entry["msg"].removeprefix("Value error, "),
            }
            for entry in error.errors(include_url=False, include_context=False)[:20]
        ) from None


ORDER_KEY = "Idempotency-Key"


def idempotency_key() -> str:
    """The key under which an order is booked: the request's `Idempotency-Key`, or one of its own.

    One of its own makes an order without a key as safe to repeat within the server as one with.
    """
    key = request.headers.get(ORDER_KEY)
    if key is None:
        return g.setdefault("order_key", f"request {uuid4()}")
    try:
        g.order_key = checked_order_key(key)
    except ValueError as error:
        raise invalid([{"field": ORDER_KEY, "message": str(error)}]) from None
    return g.order_key
