"""The face that Alpaca's clients know: the same books, asked and answered in Alpaca's words.

    Words             how Alpaca spells tickers, ids and amounts, and its errors
    Account           the routes of an account and what is known of it
    Orders            what is asked, what becomes of it
    Positions         what is held, and closing it
    Dates             when the bars of a recorded market are said to be
    Market data       bars, quotes, trades, snapshots

Programs written for alpaca-py or alpaca-trade-api run against `http://127.0.0.1:8000/alpaca`. Nothing is
decided here: orders are placed and settled by `Account` in models.py, through the functions that app.py has
for its own routes (`Broker`), and prices come from the market in pricing.py.
"""

import re
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, date, datetime, timedelta
from datetime import time as time_of_day
from decimal import ROUND_FLOOR, Decimal
from functools import partial
from itertools import groupby
from math import prod
from operator import itemgetter
from typing import Annotated, Any, Literal, NamedTuple
from uuid import UUID, uuid4

from flask import Blueprint, current_app, g, request
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, model_validator
from werkzeug.local import LocalProxy

from corporate import times
from database import db
from messages import (
    HUNDRED,
    SHARE_CLASS,
    UNIT,
    ActionWord,
    BarOptions,
    ChangedOrder,
    NewOrder,
    OrderStatus,
    OrderType,
    Refused,
    checked,
    checked_decimal,
    checked_order_key,
    checked_ticker,
    in_lower_case,
    now,
    parsed,
    plain,
    rounded,
    takes,
    text_like,
    whole_number,
)
from models import Account, PortfolioAnswer, Quote, Trade, User, unless_refused
from orders import PlacedOrder
from pricing import A_MONDAY, DAY, NEW_YORK, LiveMarket, SampleMarket, joined, no_such_ticker
from recorded import EPOCH, ONE, Bar

PREFIX = "/alpaca/"

face = Blueprint("alpaca", __name__)


class Broker(NamedTuple):
    """What app.py lends to this face: its market, and what its own routes do with orders."""

    market: SampleMarket | LiveMarket
    place: Callable
    replace: Callable
    cancel: Callable
    history: Callable
    at_the_market: Callable


broker: Broker = LocalProxy(lambda: current_app.extensions["broker"])

# ------------------------------------------------------------------------------------------- Words

OPTION = "[A-Z]{1,6}[0-9]{6}[CP][0-9]{8}"
COIN_PAIR = "([A-Z0-9]{3,})USD"
"""As positions spell it, `BTCUSD`; no share in dollars has six letters."""


def ticker_of(symbol: str) -> str:
    """The ticker that Alpaca's `symbol` means: `BTC-USD` for `BTC/USD` and `BTCUSD`."""
    if not isinstance(symbol, str):
        raise ValueError("must be a symbol such as AAPL or BTC/USD")
    if re.fullmatch(OPTION, symbol.upper()):
        raise ValueError("options are not traded here")
    ticker = checked_ticker(symbol.strip())
    coin = re.fullmatch(COIN_PAIR, ticker)
    return f"{coin[1]}-USD" if coin else ticker


def is_coin(ticker: str) -> bool:
    return ticker.endswith("-USD")


def symbol_of(ticker: str, between: str = "/") -> str:
    """How Alpaca spells a ticker: BTC/USD, in a position BTCUSD, and BRK.B."""
    if share := re.fullmatch(SHARE_CLASS, ticker):
        return f"{share[1]}.{share[2]}"
    return between.join(ticker.rsplit("-", 1)) if is_coin(ticker) else ticker


ACCOUNT_IDS, ORDER_IDS, TRADE_IDS = (kind << 112 | 8 << 76 | 8 << 60 for kind in (1, 2, 3))
"""An id here is a UUID that says what it is of, and the number that this has in the books."""

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.-=^"
ASSETS = 4
"""And that of an asset the ticker: a number whose digits are its letters, 20 of which take 108 bits."""


def uuid_of(kind: int, number: int | None) -> str | None:
    return number and str(UUID(int=kind + number))


def number_in(text: str, kind: int) -> int:
    """The number in a UUID of that kind, or 0."""
    try:
        number = UUID(text).int - kind
    except ValueError:
        return 0
    return number if 0 < number < 1 << 48 else 0


def asset_id(ticker: str) -> str:
    number = 0
    for letter in ticker:
        number = number * (len(LETTERS) + 1) + LETTERS.index(letter) + 1
    return str(UUID(int=(ASSETS << 112) + number))


def ticker_at(path: str) -> str:
    """The ticker that a symbol or an asset's id in a path means; raises `Refused`."""
    try:
        kind, number = divmod(UUID(path).int, 1 << 112)
    except ValueError:
        kind, number = 0, 0
    letters = ""
    while kind == ASSETS and number:
        number, letter = divmod(number, len(LETTERS) + 1)
        letters = LETTERS[letter - 1] + letters
    try:
        return checked_ticker(letters) if letters else ticker_of(path)
    except ValueError:
        raise Refused("not_found", f"There is no asset {path}.") from None


def text(amount: Decimal | None) -> str | None:
    """Money is a string on this face, with its exact digits."""
    return None if amount is None else plain(amount)


def part_of(part: Decimal | None, whole: Decimal | None) -> str | None:
    """`part` of `whole`: 0.01 is one percent."""
    return None if part is None or not whole else plain(rounded(part / whole))


# Errors.

STATUS = {
    "insufficient_funds": 403,
    "insufficient_shares": 403,
    "invalid_request": 422,
    "already_exists": 422,
    "price_unavailable": 504,
}
"""Where Alpaca's status is another than ours; our 409 is its 422."""

SENTENCES = {
    "unauthorized": "Send your API key as APCA-API-SECRET-KEY.",
    "outcome_unknown": "The connection to the database broke while this was being written. An order with a "
    "client_order_id can be sent again; for all else look first what has happened.",
}
FIELDS = {"ticker": "symbol", "action": "side", "quantity": "qty", "order_type": "type"}
FIELDS |= {"trail_amount": "trail_price", "body": "order"}


def error(code: str, status: int, detail: str, members: dict) -> tuple[dict, int]:
    """What `app.problem` answers below /alpaca: Alpaca's document, with our `code` as its `problem`.

    Both clients send again what was answered with 504: so it stands only where that is safe.
    """
    status = STATUS.get(code, 422 if status == 409 else status)
    if code == "unknown_ticker" and "/orders" in request.path:
        status = 422
    if code == "outcome_unknown" and g.get("is_repeatable"):
        status = 504
    for entry in members.get("errors", ()):
        entry["field"] = ".".join(FIELDS.get(part, part) for part in entry["field"].split("."))
    told = [f"{entry['field']}: {entry['message']}" for entry in members.get("errors", ())]
    message = f"{'; '.join(told)}." if told else SENTENCES.get(code, detail)
    message = message.replace("Idempotency-Key", "client_order_id").replace("trail_amount", "trail_price")
    return {"code": int(f"{status}10000"), "message": message, "problem": code, **members}, status


# Who asks, and where.


def tidied(wsgi_app: Callable) -> Callable:
    """`wsgi_app`, with URLs without the slash too many that a base with one at its end brings:
    `/alpaca//v2/orders`.
    """

    def tidying(environ: dict, start_response):
        path = environ["PATH_INFO"]
        if path.startswith("/alpaca//"):
            environ["PATH_INFO"] = PREFIX + path.lstrip("/")[7:].lstrip("/")
        return wsgi_app(environ, start_response)

    return tidying


def sent_key() -> str:
    """The API key as Alpaca's clients send it: as the secret, or as the password."""
    password = request.authorization and request.authorization.password
    return request.headers.get("APCA-API-SECRET-KEY") or password or ""


# Reading requests. What clients send besides is passed over: `feed`, `adjustment`, `extended_hours`, ...


class Asked(BaseModel):
    model_config = ConfigDict(extra="ignore")

    @model_validator(mode="before")
    @classmethod
    def without_nothing(cls, document):
        if not isinstance(document, dict):
            return document
        return {name: value for name, value in document.items() if value not in (None, "")}


def checked_moment(value) -> date | datetime:
    """A time as clients write it: RFC 3339, with a space for the T or the +, or a date alone."""
    try:
        is_date = re.fullmatch("[0-9]{4}-[0-9]{2}-[0-9]{2}", value)
        moment = datetime.fromisoformat(re.sub(r" ([0-9]{2}:[0-9]{2})$", r"+\1", value.upper()))
        if not 1900 < moment.year < 2900:  # A few days can be added to it.
            raise ValueError
        return moment.date() if is_date else moment.replace(tzinfo=moment.tzinfo or UTC).astimezone(UTC)
    except (TypeError, AttributeError, ValueError):
        raise ValueError("must be a time such as 2012-06-01T00:00:00Z, or a date") from None


def midnight(day: date, ticker: str = "") -> datetime:
    """Where a date begins, in UTC: a coin's in London, all others in New York."""
    return datetime.combine(day, time_of_day(), UTC if is_coin(ticker) else NEW_YORK).astimezone(UTC)


def as_moment(value: date | datetime | None, ticker: str = "") -> datetime | None:
    return midnight(value, ticker) if type(value) is date else value


def checked_symbols(value) -> dict[str, str]:
    """The tickers by the symbols that were asked for, each once."""
    if not isinstance(value, str):
        raise ValueError("must be symbols with commas between them")
    symbols = [symbol.strip() for symbol in value.split(",") if symbol.strip()]
    if not 1 <= len(symbols) <= 100:
        raise ValueError("must be 1 to 100 symbols")
    return {symbol: ticker_of(symbol) for symbol in symbols}


Number = Annotated[Decimal, BeforeValidator(checked_decimal)]
Moment = Annotated[Any, BeforeValidator(checked_moment), text_like(".*", examples=["2012-06-01"])]
Symbols = Annotated[
    dict[str, str], BeforeValidator(checked_symbols), text_like(".+", examples=["AAPL,BTC/USD"])
]
OrderKey = Annotated[str, AfterValidator(checked_order_key)]
Sort = Annotated[Literal["asc", "desc"], BeforeValidator(in_lower_case)]

# ----------------------------------------------------------------------------------------- Account


def valued() -> tuple[Account, PortfolioAnswer]:
    """The account, and its holdings at the market."""
    account, holdings, quotes = broker.at_the_market()
    return account, account.portfolio(holdings, quotes)


def price_yesterday(ticker: str) -> Decimal | None:
    """What the ticker cost at the end of the recorded market's day before, in shares of today; live, nobody
    wrote it down."""
    market = broker.market
    if not market.is_sample:
        return None
    here = market.time(g.account)
    then = midnight(here.date(), "-USD") - timedelta.resolution
    met = market.on_the_way(market.number_at(then), market.number_at(here))
    splits = [action.ratio for action in met if (action.kind, action.ticker) == ("split", ticker)]
    price = market.price(ticker, then)
    return price and times(price, 1 / prod(splits, start=ONE))


NONE_OF_IT = ("accrued_fees", "daytrading_buying_power", "last_maintenance_margin")
NONE_OF_IT += ("options_buying_power", "short_market_value", "sma")
NOT_SO = ("account_blocked", "pattern_day_trader", "shorting_enabled")
NOT_SO += ("trade_suspended_by_user", "trading_blocked", "transfers_blocked")


@face.get("/v2/account")
def account() -> dict:
    """Your account: no margin, no shorts, and so all that is not held back is buying power."""
    own, portfolio = valued()
    equity, worth, free = portfolio["equity"], text(portfolio["market_value"]), text(own.buying_power)
    gain = sum((gain_today(held) or Decimal(0) for held in portfolio["holdings"]), Decimal(0))
    powers = ("buying_power", "effective_buying_power", "non_marginable_buying_power", "regt_buying_power")
    worths = ("initial_margin", "long_market_value", "maintenance_margin", "position_market_value")
    return {
        "id": uuid_of(ACCOUNT_IDS, g.user_id),
        "account_number": f"SIM{g.user_id:09}",
        "status": "ACTIVE",
        "crypto_status": "ACTIVE",
        "created_at": db.session.get(User, g.user_id).created_at,
        "currency": "USD",
        "cash": text(own.cash_balance),
        "equity": text(equity),
        "portfolio_value": text(equity),
        "last_equity": text(None if equity is None else equity - gain),
        "multiplier": "1",
        "daytrade_count": 0,
        "options_approved_level": 0,
        "options_trading_level": 0,
        **dict.fromkeys(powers, free),
        **dict.fromkeys(worths, worth),
        **dict.fromkeys(NONE_OF_IT, "0"),
        **dict.fromkeys(NOT_SO, False),
    }


@face.route("/v2/account/configurations", methods=["GET", "PATCH"])
def configurations() -> dict:
    """What can be set on an account of Alpaca's; here it is as it is, and a change is passed over."""
    return {
        "fractional_trading": True,
        "max_margin_multiplier": "1",
        "max_options_trading_level": 0,
        "no_shorting": True,
        "suspend_trade": False,
        "trade_confirm_email": "none",
        "dtbp_check": "entry",
        "pdt_check": "entry",
        "ptp_no_exception_entry": False,
    }


PERIOD_DAYS = {"D": 1, "W": 7, "M": 30, "A": 365, "Y": 365}


class Span(Asked):
    start: Moment = None
    end: Moment = None


class HistoryAsked(Span):
    period: str = "1M"


@face.get("/v2/account/portfolio/history")
@takes(query=HistoryAsked)
def portfolio_history(asked: HistoryAsked) -> dict:
    """Your equity, day by day; the days of a recorded market are dated as its bars are."""
    moment, history = now(), broker.history(None, "day")
    points, base = history["points"], history["summary"]["starting_cash"]
    equity_on = {at: point["equity"] for at, point in zip(dates_of(points, moment), points, strict=True)}
    days = re.fullmatch("([0-9]{1,3})([DWMAY])", asked.period.upper())
    begin = moment - timedelta(days=int(days[1]) * PERIOD_DAYS[days[2]] if days else 36_500)
    begin, end = as_moment(asked.start) or begin, as_moment(asked.end) or moment
    shown = {at: equity for at, equity in equity_on.items() if begin <= at <= end and equity is not None}
    worth = list(shown.values())
    return {
        "timestamp": [int(at.timestamp()) for at in shown],
        "equity": worth,
        "profit_loss": [equity - base for equity in worth],
        "profit_loss_pct": [rounded((equity - base) / base) if base else None for equity in worth],
        "base_value": base,
        "base_value_asof": None,
        "timeframe": "1D",
        "cashflow": {},
    }


def dates_of(points: list[dict], moment: datetime) -> list[datetime]:
    """When each point of an equity curve is said to be, which ends at `moment`: days, the last as it is."""
    times, market = [point["timestamp"] for point in points], broker.market
    if not market.is_sample:
        return [midnight(at.astimezone(NEW_YORK).date()) for at in times[:-1]] + [moment]
    recorded = sorted({bar.date() for bar in market.bars})
    back, dates, later = 0, [moment], times[-1]
    for at in times[-2::-1]:
        passed = bisect_left(recorded, later.date()) - bisect_left(recorded, at.date())
        back, later = back + passed % len(recorded), at
        dates.append(dated(moment, DAYS, back, is_a_coin=False) if back else moment)
    return dates[::-1]


ACTIVITIES = {"FILL": ["buy", "sell"], "DIV": ["dividend"], "SPLIT": ["split"], "JNLC": ["correction"]}
"""Alpaca's types of activities, and the trades here that are such."""


class ActivitiesAsked(Asked):
    activity_types: str = ",".join(ACTIVITIES)
    after: Moment = None
    until: Moment = None
    date: Moment = None
    direction: Sort = "desc"
    page_size: whole_number(1, 100) = 100
    page_token: str = ""


@face.get("/v2/account/activities")
@face.get("/v2/account/activities/<activity>")
@takes(query=ActivitiesAsked)
def activities(asked: ActivitiesAsked, activity: str = "") -> list[dict]:
    """What was bought and sold, and splits, dividends and an admin's corrections."""
    kinds = (activity or asked.activity_types).upper().split(",")
    types = [trade_type for kind in kinds for trade_type in ACTIVITIES.get(kind, ())]
    since, until = as_moment(asked.after), as_moment(asked.until)
    if asked.date:
        since = as_moment(asked.date)
        until = since + DAY
    filters = {"since": since, "until": until, "ticker": None, "action": types, "run": g.account.run}
    cursor = number_in(asked.page_token.rpartition("::")[2], TRADE_IDS) or None
    if asked.page_token and not cursor:
        raise Refused("invalid_request", "page_token: must be the id of a page's last activity")
    page = {"cursor": cursor, "limit": asked.page_size, "oldest_first": asked.direction == "asc"}
    return [activity_out(trade) for trade in Trade.page(g.user_id, **filters, **page)]


def activity_out(trade: Trade) -> dict:
    """A trade as an activity; one that came without an order is the fill of its own."""
    own, is_dividend = uuid_of(TRADE_IDS, trade.id), trade.trade_type == "dividend"
    (kind,) = [kind for kind, types in ACTIVITIES.items() if trade.trade_type in types]
    told = {"id": f"{trade.created_at:%Y%m%d%H%M%S}000::{own}", "activity_type": kind}
    told |= {"symbol": symbol_of(trade.ticker)}
    if kind == "FILL":
        return told | {
            "transaction_time": trade.created_at,
            "type": "fill",
            "price": text(trade.price),
            **dict.fromkeys(("qty", "cum_qty"), text(trade.quantity)),
            "side": trade.trade_type,
            "leaves_qty": "0",
            "order_id": uuid_of(ORDER_IDS, trade.order_id) or own,
            "order_status": "filled",
        }
    return told | {
        "date": trade.created_at.date().isoformat(),
        "net_amount": text(trade.total_amount),
        "qty": text(trade.quantity if is_dividend else trade.change()),
        "per_share_amount": text(trade.price) if is_dividend else None,
        "description": trade.reason or trade.ratio or "",
        "status": "executed",
    }


@face.get("/v2/clock")
def clock() -> dict:
    """The time; the market is always open."""
    moment = now().astimezone(NEW_YORK)

    def following(hour: time_of_day) -> str:
        days = (moment.date() + timedelta(days=n) for n in range(4))
        times = (datetime.combine(day, hour, NEW_YORK) for day in days if day.weekday() < 5)
        return next(at.isoformat() for at in times if at > moment)

    times = {"next_open": following(time_of_day(9, 30)), "next_close": following(time_of_day(16))}
    return {"timestamp": moment.isoformat(), "is_open": True, **times}


@face.get("/v2/calendar")
@takes(query=Span)
def calendar(asked: Span) -> list[dict]:
    """The weekdays from `start` to `end`, ten years of them at the most; nobody has holidays here."""
    start, end = (at.date() if isinstance(at, datetime) else at for at in (asked.start, asked.end))
    start = start or (end or now().date()) - timedelta(days=365)
    end = end or start + timedelta(days=730)
    days = (start + timedelta(days=n) for n in range(min((end - start).days, 3660) + 1))
    hours = {"open": "09:30", "close": "16:00", "session_open": "0400", "session_close": "2000"}
    return [{"date": day.isoformat(), **hours} for day in days if day.weekday() < 5]


class AssetsAsked(Asked):
    status: str = "active"
    asset_class: str = ""


@face.get("/v2/assets")
@takes(query=AssetsAsked)
def assets(asked: AssetsAsked) -> list[dict]:
    """What can be traded: on the sample market all that is recorded, live what was asked for before."""
    if asked.status == "inactive":
        return []
    if broker.market.is_sample:
        listed = [asset(ticker) for ticker in broker.market.series]
    else:
        listed = [asset(quote.ticker, is_bought_at(quote)) for quote in Quote.latest_of_all()]
    return [a for a in listed if asked.asset_class in ("", a["class"])]


@face.get("/v2/assets/<path:symbol>")
def one_asset(symbol: str) -> dict:
    """One share or coin, by its symbol or its asset id."""
    quote = unless_refused(broker.market.look_up(ticker_at(symbol), g.account))
    return asset(quote.ticker, is_bought_at(quote))


def is_bought_at(quote: Quote) -> bool:
    return quote.currency == "USD" and not quote.stale


def asset(ticker: str, is_tradable: bool = True) -> dict:
    return {
        "id": asset_id(ticker),
        **what_it_is(ticker, "class"),
        "symbol": symbol_of(ticker),
        "name": symbol_of(ticker),
        "status": "active",
        "tradable": is_tradable,
        "fractionable": True,
        "maintenance_margin_requirement": 100,
        "attributes": [],
        **dict.fromkeys(("marginable", "shortable", "easy_to_borrow"), False),
        **dict.fromkeys(("min_order_size", "min_trade_increment", "price_increment"), plain(UNIT)),
    }


def what_it_is(ticker: str, name: str = "asset_class") -> dict:
    """Alpaca's clients take none but its own exchanges."""
    coin = is_coin(ticker)
    return {name: "crypto" if coin else "us_equity", "exchange": "CRYPTO" if coin else "NASDAQ"}


# ------------------------------------------------------------------------------------------ Orders


class OrderAsked(Asked):
    """An order in Alpaca's words."""

    symbol: Annotated[str, BeforeValidator(ticker_of)]
    side: ActionWord
    type: Annotated[OrderType, BeforeValidator(in_lower_case)] = "market"
    qty: Number | None = None
    notional: Number | None = None
    limit_price: Any = None
    stop_price: Any = None
    trail_price: Any = None
    trail_percent: Any = None
    time_in_force: Annotated[Any, BeforeValidator(in_lower_case)] = "day"
    order_class: Annotated[Any, BeforeValidator(in_lower_case)] = "simple"
    take_profit: Any = None
    stop_loss: Any = None
    position_intent: Annotated[Any, BeforeValidator(in_lower_case)] = None
    client_order_id: OrderKey | None = None

    @model_validator(mode="after")
    def is_of_a_kind_that_there_is(self):
        legs = [leg for leg in (self.take_profit, self.stop_loss) if leg]
        if self.time_in_force in ("opg", "cls"):
            raise ValueError("there are no auctions here: time_in_force is day, gtc, ioc or fok")
        if self.position_intent in ("sell_to_open", "buy_to_close"):
            raise ValueError("nothing is sold short here, and so nothing bought back")
        if self.order_class not in ("simple", "bracket", "oco", "oto"):
            raise ValueError("order_class is simple, bracket, oco or oto; options are not traded here")
        if self.order_class == "simple" and legs:
            raise ValueError("take_profit and stop_loss need an order_class: bracket, oco or oto")
        if self.order_class == "oto" and len(legs) != 1:
            raise ValueError("an oto order has either take_profit or stop_loss")
        if self.order_class == "bracket" and len(legs) != 2:
            raise ValueError("a bracket has both take_profit and stop_loss")
        if self.order_class == "oco" and (self.side != "sell" or not self.stop_loss):
            raise ValueError("an oco order sells, at a take_profit or a stop_loss: there are no shorts")
        return self

    def meant(self) -> NewOrder:
        """The same order in the words of the ledger. An oco is a limit sale with a stop."""
        same = ("notional", "limit_price", "stop_price", "trail_percent", "time_in_force", "stop_loss")
        asked = {name: getattr(self, name) for name in same} | {"ticker": self.symbol, "action": self.side}
        asked |= {"order_type": self.type, "quantity": self.qty, "trail_amount": self.trail_price}
        if self.order_class != "oco":
            return checked(NewOrder, asked | {"take_profit": self.take_profit})
        gain = self.take_profit.get("limit_price") if isinstance(self.take_profit, dict) else None
        return checked(NewOrder, asked | {"order_type": "limit", "limit_price": self.limit_price or gain})


def order_key(sent: str | None) -> str:
    """The key under which an order is placed once; only one that the client knows makes it safe to repeat."""
    g.is_repeatable = sent is not None
    g.order_key = sent or g.get("order_key") or str(uuid4())
    return g.order_key


@face.post("/v2/orders")
@takes(OrderAsked)
def place_order(asked: OrderAsked) -> dict:
    """Place an order; a `client_order_id` that comes again with the same order answers the first one."""
    return broker.place(asked.meant(), order_key(asked.client_order_id), tell=order_out)[0]


class OrdersAsked(Asked):
    status: OrderStatus = "open"
    limit: whole_number(1, 500) = 50
    after: Moment = None
    until: Moment = None
    direction: Sort = "desc"
    nested: bool = False
    symbols: Symbols | None = None
    side: ActionWord | None = None


@face.get("/v2/orders")
@takes(query=OrdersAsked)
def orders(asked: OrdersAsked) -> list[dict]:
    """Your orders; with `nested` a leg stands in the order that brought it, if that is among them."""
    filters = {"since": as_moment(asked.after), "until": as_moment(asked.until), "action": asked.side}
    filters |= {"tickers": list((asked.symbols or {}).values()), "oldest_first": asked.direction == "asc"}
    found = PlacedOrder.page(g.user_id, run=g.account.run, status=asked.status, limit=asked.limit, **filters)
    relatives, ids = relatives_of(*found), {order.id for order in found}
    shown = [order for order in found if not (asked.nested and order.parent_id in ids)]
    return [order_out(order, relatives, asked.nested) for order in shown]


@face.get("/v2/orders:by_client_order_id")
def order_by_client_id() -> dict:
    """One of your orders, by the id that you gave it."""
    sent = request.args.get("client_order_id", "")
    number = re.fullmatch("[ -~]{1,255}", sent) and PlacedOrder.number_under(g.user_id, g.account.run, sent)
    return order_out(PlacedOrder.of(g.user_id, str(number or number_of(sent))))


@face.get("/v2/orders/<id>")
def one_order(id: str) -> dict:
    """One of your orders."""
    return order_out(PlacedOrder.of(g.user_id, number_of(id)))


def number_of(id: str) -> str:
    """The number of the order with this id; `Refused` if it is none of ours."""
    number = number_in(id, ORDER_IDS)
    if not number:
        raise Refused("not_found", "You have no such order.")
    return str(number)


class ChangeAsked(Asked):
    qty: Any = None
    limit_price: Any = None
    stop_price: Any = None
    trail: Any = None
    time_in_force: Annotated[Any, BeforeValidator(in_lower_case)] = None
    client_order_id: OrderKey | None = None


@face.patch("/v2/orders/<id>")
@takes(ChangeAsked)
def replace_order(asked: ChangeAsked, id: str) -> dict:
    """Put a changed order, with an id of its own, in the place of an open one."""
    old = PlacedOrder.of(g.user_id, number_of(id))
    if asked.trail is not None or asked.time_in_force not in (None, old.time_in_force):
        sentence = "trail and time_in_force cannot be changed: cancel the order and place another."
        raise Refused("not_replaceable", sentence)
    changes = {"quantity": asked.qty, "limit_price": asked.limit_price, "stop_price": asked.stop_price}
    changed, key = checked(ChangedOrder, changes), order_key(asked.client_order_id)
    return broker.replace(str(old.id), changed, key, tell=order_out)[0]


@face.delete("/v2/orders/<id>")
def cancel_order(id: str) -> tuple[str, int]:
    """Cancel an open order, and what hangs on it."""
    broker.cancel(number_of(id))
    return "", 204


@face.delete("/v2/orders")
def cancel_orders() -> tuple[list[dict], int]:
    """Cancel all your open orders."""
    canceled = broker.cancel()
    return [{"id": uuid_of(ORDER_IDS, order.id), "status": 200} for order in canceled], 207


def relatives_of(*orders: PlacedOrder) -> tuple[dict[int, list[PlacedOrder]], dict[int, int]]:
    """What belongs to some orders: each with its legs, by the `group`; what replaced it, by its id."""
    groups, successors = defaultdict(list), {}
    for order in PlacedOrder.relatives(orders):
        groups[order.group].append(order)
        successors[order.replaces] = order.id
    return groups, successors


def order_out(order: PlacedOrder, relatives: tuple[dict, dict] | None = None, nested: bool = True) -> dict:
    """An order in Alpaca's words."""
    groups, successors = relatives = relatives or relatives_of(order)
    group = groups[order.group]
    legs = [one for one in group if one.parent_id and one.status != "replaced"]
    is_oco = any(one.id == order.group and one.action == "sell" for one in group)
    kind = "oco" if legs and is_oco else ("simple", "oto", "bracket")[len(legs)]
    shown = [] if order.parent_id or not nested else legs
    endings = ("filled", "expired", "canceled", "replaced")
    ended = {f"{status}_at": order.closed_at if order.status == status else None for status in endings}
    return {
        "id": uuid_of(ORDER_IDS, order.id),
        "client_order_id": order.idempotency_key or uuid_of(ORDER_IDS, order.id),
        "created_at": order.placed_at,
        "updated_at": order.closed_at or order.placed_at,
        "submitted_at": order.placed_at,
        **ended,
        "failed_at": None,
        "replaced_by": uuid_of(ORDER_IDS, successors.get(order.id)),
        "replaces": uuid_of(ORDER_IDS, order.replaces),
        "asset_id": asset_id(order.ticker),
        "symbol": symbol_of(order.ticker),
        "asset_class": what_it_is(order.ticker)["asset_class"],
        "notional": None,
        "qty": text(order.quantity),
        "filled_qty": text(order.quantity) if order.status == "filled" else "0",
        "filled_avg_price": text(order.price),
        "order_class": kind,
        "order_type": order.order_type,
        "type": order.order_type,
        "side": order.action,
        "position_intent": "buy_to_open" if order.action == "buy" else "sell_to_close",
        "time_in_force": order.time_in_force,
        "limit_price": text(order.limit_price),
        "stop_price": text(order.stop_price),
        "trail_percent": text(order.trail_percent),
        "trail_price": text(order.trail_amount),
        "hwm": None,
        "status": "new" if order.status == "open" else order.status,
        "extended_hours": False,
        "legs": [order_out(leg, relatives) for leg in shown] or None,
        "reason": order.reason,
    }


# --------------------------------------------------------------------------------------- Positions


def gain_today(held: dict) -> Decimal | None:
    """How much more what is held now is worth than it was at the end of the day before, held or not."""
    then, current = price_yesterday(held["ticker"]), held["current_price"]
    return then and current and rounded(held["quantity"] * (current - then))


def position(held: dict) -> dict:
    then, gain = price_yesterday(held["ticker"]), gain_today(held)
    worth_then = then and rounded(held["quantity"] * then)
    return {
        "asset_id": asset_id(held["ticker"]),
        "symbol": symbol_of(held["ticker"], between=""),
        **what_it_is(held["ticker"]),
        "asset_marginable": False,
        "side": "long",
        "qty": text(held["quantity"]),
        "qty_available": text(held["available_quantity"]),
        "avg_entry_price": text(held["average_price"]),
        "cost_basis": text(held["cost_basis"]),
        "market_value": text(held["market_value"]),
        "current_price": text(held["current_price"]),
        "unrealized_pl": text(held["unrealized_pnl"]),
        "unrealized_plpc": part_of(held["unrealized_pnl"], held["cost_basis"]),
        "lastday_price": text(then),
        "change_today": part_of(gain, worth_then),
        "unrealized_intraday_pl": text(gain),
        "unrealized_intraday_plpc": part_of(gain, worth_then),
    }


@face.get("/v2/positions")
def positions() -> list[dict]:
    """What you hold, at the market."""
    return [position(held) for held in valued()[1]["holdings"]]


@face.get("/v2/positions/<path:symbol>")
def one_position(symbol: str) -> dict:
    """What you hold of one share or coin."""
    return position(holding(ticker_at(symbol)))


def holding(ticker: str) -> dict:
    held = next((held for held in valued()[1]["holdings"] if held["ticker"] == ticker), None)
    if held is None:
        raise Refused("not_found", f"You have no position in {symbol_of(ticker)}.")
    return held


class CloseAsked(Asked):
    qty: Number | None = None
    percentage: Number | None = None

    @model_validator(mode="after")
    def is_one_of_them(self):
        if self.qty is not None and self.percentage is not None:
            raise ValueError("give either qty or percentage")
        if self.percentage is not None and not 0 < self.percentage <= HUNDRED:
            raise ValueError("percentage is above 0 and at most 100")
        return self


@face.delete("/v2/positions/<path:symbol>")
@takes(query=CloseAsked)
def close_position(asked: CloseAsked, symbol: str) -> dict:
    """Sell what you hold of one share or coin and no open order holds back, or part of it, at the market."""
    if "closing" not in g:  # A second try may find it sold by the first.
        g.closing = holding(ticker_at(symbol))
    size = "all" if asked.qty is None else asked.qty
    if asked.percentage is not None and asked.percentage != HUNDRED:
        size = rounded(g.closing["quantity"] * asked.percentage / HUNDRED, ROUND_FLOOR)
    return close(g.closing["ticker"], size)


def close(ticker: str, size: Decimal | str) -> dict:
    """One key for each position: whatever is repeated, none is sold twice."""
    asked = {"ticker": ticker, "action": "sell", "quantity": size, "order_type": "market"}
    own_key = f"{order_key(None)} {ticker}"
    return broker.place(checked(NewOrder, asked | {"time_in_force": "day"}), own_key, tell=order_out)[0]


class CloseAllAsked(Asked):
    cancel_orders: bool = False


@face.delete("/v2/positions")
@takes(query=CloseAllAsked)
def close_positions(asked: CloseAllAsked) -> tuple[list[dict], int]:
    """Sell all that you hold, at the market; each position says what came of it."""
    order_key(None)  # A try that is lost while orders are canceled is made again as well.
    if asked.cancel_orders:
        broker.cancel()
    if "closing" not in g:
        g.closing = [held["ticker"] for held in valued()[1]["holdings"]]
    answer = []
    for ticker in g.closing:
        try:
            body, status = close(ticker, "all"), 200
        except Refused as refusal:
            refused = current_app.handle_user_exception(refusal)
            body, status = parsed(refused.get_data()), refused.status_code
        answer.append({"symbol": symbol_of(ticker, between=""), "status": status, "body": body})
    return answer, 207


# ------------------------------------------------------------------------------------------- Dates
# The recorded market is in the past and bots ask for "the last sixty days": so its current bar is dated now,
# and the k-th bar before it k sessions earlier. A range within the recorded time has the recorded dates.


class Timeframe(NamedTuple):
    """How long a bar is: so many minutes, hours, days, weeks or months."""

    count: int
    unit: str

    @property
    def step(self) -> timedelta:
        """How long it is, in a month of 30 days."""
        return timedelta(days=30) * self.count if self.unit == "month" else self.count * LONG[self.unit]

    @property
    def has_dates(self) -> bool:
        return self.unit in ("day", "week", "month")

    def begins(self, moment: datetime, back: int = 0) -> datetime:
        """Where, in UTC, the bar begins that is `back` bars before the one that `moment` is in."""
        if self.unit == "month":
            months = ((moment.year * 12 + moment.month - 1) // self.count - back) * self.count
            return datetime(months // 12, months % 12 + 1, 1, tzinfo=UTC)
        return moment - (moment - A_MONDAY) % self.step - back * self.step


LONG = {unit: timedelta(**{f"{unit}s": 1}) for unit in ("minute", "hour", "day", "week")}
DAYS, MINUTES = Timeframe(1, "day"), Timeframe(1, "minute")
UNITS = {"min": "minute", "t": "minute", "hour": "hour", "h": "hour", "day": "day", "d": "day"}
UNITS |= {"week": "week", "w": "week", "month": "month", "M": "month"}
MOST = {"minute": 59, "hour": 23, "day": 1, "week": 1, "month": 12}


def checked_timeframe(value) -> Timeframe:
    """`15Min`, `1Hour`, `1Day`, `1Week`, `3Month`, or with one letter: `15T`, `1H`."""
    parts = isinstance(value, str) and re.fullmatch("([0-9]{1,2})([A-Za-z]{1,5})", value)
    unit = parts and UNITS.get(parts[2] if parts[2] == "M" else parts[2].lower())
    if not unit or not 1 <= int(parts[1]) <= MOST[unit]:
        raise ValueError("must be 1 to 59Min, 1 to 23Hour, 1Day, 1Week or 1 to 12Month")
    return Timeframe(int(parts[1]), unit)


def dated(moment: datetime, frame: Timeframe, back: int, is_a_coin: bool) -> datetime:
    """When the bar begins that is `back` bars before the one of `moment`.

    Days of shares are weekdays, and begin in New York as at Alpaca.
    """
    if not frame.has_dates:
        return frame.begins(moment, back)
    zone = UTC if is_a_coin else NEW_YORK
    today = midnight(moment.astimezone(zone).date(), "-USD")
    first = frame.begins(today, back)
    if frame.unit == "day" and not is_a_coin:
        weeks, weekday = divmod((today - A_MONDAY).days, 7)
        weeks, weekday = divmod(weeks * 5 + min(weekday, 4) - back, 5)
        first = A_MONDAY + timedelta(weeks=weeks, days=weekday)
    return first.replace(tzinfo=zone)


def put_together(bars: Sequence[Bar], frame: Timeframe, spacing: timedelta) -> Sequence[Bar]:
    """One bar for each `frame`; bars that are as long already, or longer, are left as they are."""
    if frame.step <= spacing:
        return bars
    groups = groupby(bars, lambda bar: frame.begins(bar.timestamp))
    return [joined(begin, list(group)) for begin, group in groups]


class Found(NamedTuple):
    """Bars, the oldest first, of which a page is made: there may be a million of them."""

    places: Sequence[int]
    bar: Callable[[int], Bar]


def found_bars(ticker: str, asked: "BarsAsked", moment: datetime) -> Found:
    """The bars of one ticker `asked` for, as they are dated at `moment`; raises `Refused`."""
    market, frame = broker.market, asked.timeframe
    start, end = as_moment(asked.start, ticker), as_moment(asked.end, ticker)
    if not market.is_sample:
        bars = live_bars(ticker, asked, start, end or moment)
        return as_found(bars, ticker, frame, start, end or moment)
    if ticker not in market.series:
        raise no_such_ticker(ticker)
    tape, spacing = market.series[ticker], market.spacing[ticker]
    passed = bisect_right(tape, market.time(g.account, moment), key=itemgetter(0))
    past = put_together(tape[:passed], frame, spacing)
    if start and market.bars[0] <= start <= (end or start) and (end or start) - DAY <= market.bars[-1]:
        return as_found(past, ticker, frame, start, end or moment)
    loop, coin = put_together(tape, frame, spacing), is_coin(ticker)
    # The wall clock has shown the recorded time again and again since 1970.
    start, end = max(start or EPOCH, EPOCH), end or moment
    is_over = g.account.market_clock or not past
    many = len(past) if is_over else (moment - EPOCH) // frame.step

    def date_of(back: int) -> datetime:
        return dated(moment, frame, back, coin)

    newest = bisect_left(range(many), True, key=lambda back: date_of(back) <= end)
    beyond = bisect_left(range(many), True, key=lambda back: date_of(back) < start)

    def bar(back: int) -> Bar:
        place = back if back < len(past) else (back - len(past)) % len(loop)
        return (past if back < len(past) else loop)[-1 - place]._replace(timestamp=date_of(back))

    return Found(range(beyond - 1, newest - 1, -1), bar)


def as_found(bars: Sequence[Bar], ticker: str, frame: Timeframe, start, end: datetime) -> Found:
    """Bars with the dates that they have; a date begins where Alpaca has it begin."""
    if frame.has_dates:
        bars = [bar._replace(timestamp=midnight(bar.timestamp.date(), ticker)) for bar in bars]
    bars = [bar for bar in bars if (not start or start <= bar.timestamp) and bar.timestamp <= end]
    return Found(range(len(bars)), bars.__getitem__)


def live_bars(ticker: str, asked: "BarsAsked", start: datetime | None, end: datetime) -> Sequence[Bar]:
    """Yahoo's, in the longest of our timeframes that those asked for can be put together from."""
    count, unit = asked.timeframe
    minutes = next(n for n in (15, 5, 1) if count % n == 0)
    name = {"minute": f"{minutes}m", "hour": "1h", "day": "1d", "week": "1w", "month": "1d"}[unit]
    start = start and asked.timeframe.begins(start.astimezone(UTC))
    options = {"timeframe": name, "start": start, "end": end.astimezone(UTC) + timedelta.resolution}
    limit = 10_000 if start else min(asked.limit * (count if unit != "month" else 31), 10_000)
    bars = broker.market.past_bars(ticker, BarOptions.model_construct(**options, limit=limit), g.account)
    return bars if name == f"{count}{unit[0]}" else put_together(bars, asked.timeframe, timedelta(0))


# ------------------------------------------------------------------------------------- Market data


class BarsAsked(Span):
    timeframe: Annotated[
        Any, BeforeValidator(checked_timeframe), text_like("[0-9]{1,2}[A-Za-z]{1,5}", examples=["1Day"])
    ] = DAYS
    limit: whole_number(1, 10_000) = 1000
    sort: Sort = "asc"
    page_token: str = ""

    @model_validator(mode="after")
    def ends_after_it_starts(self):
        if self.start and self.end and as_moment(self.start) > as_moment(self.end) + DAY:
            raise ValueError("start must not be after end")
        return self


class SymbolsAsked(Asked):
    symbols: Symbols


class ManyBarsAsked(BarsAsked, SymbolsAsked):
    pass


def one(symbol: str) -> dict[str, str]:
    """The symbol in a path, as if it stood in a query."""
    try:
        return {symbol: ticker_of(symbol)}
    except ValueError:
        raise Refused("unknown_ticker", f"There is no ticker {symbol} here.") from None


def page_of(kind: str, symbols: dict[str, str], asked: BarsAsked) -> dict:
    """A page of `bars`, or of the quotes or trades that they stand for, by symbol; the next one's token.

    The token has the moment at which the first page was asked for: what is dated back from it stays there.
    """
    place = re.fullmatch(r"([0-9]{1,9})\.([0-9]{1,16})", asked.page_token)
    if asked.page_token and not place:
        raise Refused("invalid_request", "page_token: must be the next_page_token of a page")
    skip, moment = 0, now()
    if place:
        skip, moment = int(place[1]), min(moment, EPOCH + timedelta(microseconds=int(place[2])))
    if kind != "bars":
        asked.timeframe = MINUTES
    questions = {symbol: partial(found_bars, ticker, asked, moment) for symbol, ticker in symbols.items()}
    found = unless_all_refuse(questions)
    told, left, before, total = {}, asked.limit, skip, 0
    for symbol, (places, bar) in found.items():
        if not asked.start:  # The last ones: nobody wants all that there ever were.
            places = places[-min(max(asked.limit // len(found), 1), 1000) :]
        places = places if asked.sort == "asc" else places[::-1]
        if chosen := places[before : before + left]:
            told[symbol] = [OF_BAR[kind](bar(place)) for place in chosen]
        left, before, total = left - len(chosen), max(before - len(places), 0), total + len(places)
    end, micros = skip + asked.limit, (moment - EPOCH) // timedelta.resolution
    return {kind: told, "next_page_token": f"{end}.{micros}" if end < total else None}


def unless_all_refuse(questions: dict[str, Callable]) -> dict:
    """The answers to those `questions` that have one; where none has, the first refusal is raised."""
    answers, refusals = {}, []
    for name, ask in questions.items():
        try:
            answers[name] = ask()
        except Refused as refusal:
            refusals.append(refusal)
    if refusals and not answers:
        raise refusals[0]
    return answers


def bar_out(bar: Bar) -> dict:
    """Nobody counted the trades; what they cost on average is taken from the bar's own prices."""
    average = rounded((bar.high + bar.low + bar.close) / 3)
    names = {"o": bar.open, "h": bar.high, "l": bar.low, "c": bar.close, "v": bar.volume}
    return {"t": bar.timestamp, **names, "n": 0, "vw": average}


def quote_out(price: Decimal, at: datetime) -> dict:
    """There is one price, at which anybody buys and sells as much as he likes; sizes are round numbers."""
    sides = {"ap": price, "as": 100, "ax": "V", "bp": price, "bs": 100, "bx": "V"}
    return {"t": at, **sides, "c": ["R"], "z": "C"}


def trade_out(price: Decimal, at: datetime, size: Decimal = Decimal(100)) -> dict:
    return {"t": at, "p": price, "s": size, "x": "V", "i": int(at.timestamp()), "c": ["@"], "z": "C"}


def book_out(price: Decimal, at: datetime) -> dict:
    return {"t": at, "a": [{"p": price, "s": 100}], "b": [{"p": price, "s": 100}]}


OF_BAR = {
    "bars": bar_out,
    "quotes": lambda bar: quote_out(bar.close, bar.timestamp),
    "trades": lambda bar: trade_out(bar.close, bar.timestamp, bar.volume),
}
OF_QUOTE = {"quotes": quote_out, "trades": trade_out, "orderbooks": book_out}


@face.get("/v2/stocks/<any(bars, quotes, trades):kind>")
@face.get("/v1beta3/crypto/us/<any(bars, quotes, trades):kind>")
@takes(query=ManyBarsAsked)
def history_of_many(asked: ManyBarsAsked, kind: str) -> dict:
    """Past bars, or the quotes or trades that they stand for, of several shares or coins."""
    return page_of(kind, asked.symbols, asked)


@face.get("/v2/stocks/<symbol>/<any(bars, quotes, trades):kind>")
@takes(query=BarsAsked)
def history_of_one(asked: BarsAsked, symbol: str, kind: str) -> dict:
    """Past bars, or the quotes or trades that they stand for, of one share."""
    page = page_of(kind, one(symbol), asked)
    return {"symbol": symbol, kind: page[kind].get(symbol, []), "next_page_token": page["next_page_token"]}


@face.get("/v2/stocks/<any(bars, quotes, trades):kind>/latest")
@face.get("/v1beta3/crypto/us/latest/<any(bars, quotes, trades, orderbooks):kind>")
@takes(query=SymbolsAsked)
def latest_of_many(asked: SymbolsAsked, kind: str) -> dict:
    """The last bar, quote or trade of several shares or coins."""
    return {kind: latest(kind, asked.symbols)}


@face.get("/v2/stocks/<symbol>/<any(bars, quotes, trades):kind>/latest")
def latest_of_one(symbol: str, kind: str) -> dict:
    """The last bar, quote or trade of one share."""
    return {"symbol": symbol, kind.removesuffix("s"): latest(kind, one(symbol))[symbol]}


def latest(kind: str, symbols: dict[str, str]) -> dict:
    """What is newest, by symbol; those that have no price are not there, unless none has."""
    if kind == "bars":
        questions = {symbol: partial(last_bars, ticker, MINUTES) for symbol, ticker in symbols.items()}
        return {symbol: bar_out(bars[-1]) for symbol, bars in unless_all_refuse(questions).items()}
    return {symbol: OF_QUOTE[kind](quote.price, seen_at(quote)) for symbol, quote in newest(symbols).items()}


def newest(symbols: dict[str, str]) -> dict[str, Quote]:
    answers = broker.market.look_ups(list(symbols.values()), g.account)
    return unless_all_refuse({s: partial(unless_refused, answers[ticker]) for s, ticker in symbols.items()})


def seen_at(quote: Quote) -> datetime:
    """When a price is from: that of a recorded market is from now."""
    return now() if broker.market.is_sample else quote.market_time


def last_bars(ticker: str, frame: Timeframe, count: int = 1) -> list[Bar]:
    """The last `count` bars of a ticker, the oldest first, at least one; raises `Refused`."""
    found = found_bars(ticker, BarsAsked.model_construct(timeframe=frame, limit=count), now())
    if not found.places:
        raise no_such_ticker(ticker)
    return [found.bar(place) for place in found.places[-count:]]


@face.get("/v2/stocks/snapshots")
@takes(query=SymbolsAsked)
def snapshots(asked: SymbolsAsked) -> dict:
    """What is newest of several shares."""
    return snapshots_of(asked.symbols)


@face.get("/v1beta3/crypto/us/snapshots")
@takes(query=SymbolsAsked)
def coin_snapshots(asked: SymbolsAsked) -> dict:
    """What is newest of several coins."""
    return {"snapshots": snapshots_of(asked.symbols)}


@face.get("/v2/stocks/<symbol>/snapshot")
def one_snapshot(symbol: str) -> dict:
    """What is newest of one share."""
    return {"symbol": symbol} | snapshots_of(one(symbol))[symbol]


def snapshots_of(symbols: dict[str, str]) -> dict:
    """Prices, with the bars that there are."""
    told = {}
    for symbol, quote in newest(symbols).items():
        bars = {"minuteBar": None, "dailyBar": None, "prevDailyBar": None}
        with suppress(Refused):
            bars["minuteBar"] = bar_out(last_bars(quote.ticker, MINUTES)[-1])
            *before, today = last_bars(quote.ticker, DAYS, 2)
            bars |= {"dailyBar": bar_out(today), "prevDailyBar": bar_out(before[0]) if before else None}
        price = quote.price, seen_at(quote)
        told[symbol] = {"latestTrade": trade_out(*price), "latestQuote": quote_out(*price), **bars}
    return told
