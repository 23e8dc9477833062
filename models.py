"""The ledger: who has an account, what is in it, and every trade that was ever booked.

Read `Order` first (what a bot asks for), then `Account` (what may happen to its money: `locked`, `fill`,
`record`), then `Trade` (what remains of it for ever). How statements reach the database is in
`database.py`. Nothing here knows of HTTP or of where prices come from.

The books obey one equation for each run of each account, to the last digit, always:

    cash_balance + sum of cost_basis = starting_cash + sum of realized_pnl
"""

import hashlib
import re
import secrets
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import ROUND_CEILING, ROUND_FLOOR, ROUND_HALF_EVEN, Decimal, DefaultContext, setcontext
from functools import lru_cache
from typing import Annotated, Literal

import sqlalchemy as sa
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema
from sqlalchemy import BigInteger, CheckConstraint, ForeignKey, Index, UniqueConstraint, bindparam
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Mapped, mapped_column

from database import EXACT, SNAPSHOT, UtcDateTime, commit, connected, db, send, transaction, turn

# -------------------------------------------------------------------------------------------- Units

UNIT, CENT, HUNDRED = Decimal("0.00000001"), Decimal("0.01"), Decimal(100)
"""`UNIT` is the smallest step of every amount, price and quantity: 8 decimals."""

ORDER_LIMIT = Decimal(10_000_000_000)
"""An order's quantity and price stay below this."""

ACCOUNT_LIMIT = Decimal(90_000_000_000)
"""An account's cash, and the quantity and the cost of each of its holdings, stay below this.

SQLite keeps amounts as integers of 10^-8, and 9.22e18 is the largest integer that it has.
"""

DefaultContext.prec = 60
setcontext(DefaultContext)
"""Two amounts multiply to 38 digits, and Python's 28 would round some away. Every thread that begins
after this line takes its precision from `DefaultContext`."""


def rounded(amount: Decimal, rounding: str = ROUND_HALF_EVEN) -> Decimal:
    """`amount` to 8 decimals."""
    return amount.quantize(UNIT, rounding)


def value_of(quantity: Decimal, price: Decimal, rounding: str = ROUND_FLOOR) -> Decimal:
    """What `quantity` at `price` comes to, in dollars, to 8 decimals.

    Rounded down it is what a sale brings, rounded up what a purchase costs: rounding never makes money.
    """
    return rounded(quantity * price, rounding)


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


def now() -> datetime:
    """The time, in UTC."""
    return datetime.now(UTC)


@lru_cache
def iso(moment: datetime | None) -> str | None:
    """`moment` as RFC 3339, in UTC, ending in `Z`."""
    return moment and moment.astimezone(UTC).isoformat().replace("+00:00", "Z")


def moment_from(text: str) -> datetime:
    """The moment in an RFC 3339 text such as `2012-06-01T00:00:00Z`, in UTC; else ValueError."""
    if not isinstance(text, str) or not re.fullmatch(
        r"[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt][0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]+)?([Zz]|[+-][0-9]{2}:[0-9]{2})",
        text,
    ):
        raise ValueError("must be a time such as 2012-06-01T00:00:00Z")
    try:
        return datetime.fromisoformat(text.upper()).astimezone(UTC)
    except OverflowError as error:
        raise ValueError("must be a year from 1 to 9999") from error


Amount = Annotated[Decimal, mapped_column(EXACT)]
"""Dollars, with 8 decimals."""

Quantity = Annotated[Decimal, mapped_column(EXACT)]
"""Shares or coins, with 8 decimals."""

Time = Annotated[datetime, mapped_column(UtcDateTime)]
"""A moment in UTC."""

Id = Annotated[int, mapped_column(BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True)]
"""A number that grows with each row. SQLite counts only a column that is called INTEGER."""

UserId = Annotated[int, mapped_column(ForeignKey("ibkr_users.id"))]


def within(name: str, low: Decimal | int, high: Decimal) -> CheckConstraint:
    """A CHECK that `low` <= the column `name` < `high`. The upper bound also keeps NaN out."""
    column = sa.column(name, EXACT)
    return CheckConstraint(sa.and_(column >= Decimal(low), column < high), name=name)


# ------------------------------------------------------------------------------------------- Orders


class Refused(Exception):
    """A "no", with the reason in a sentence and its numbers: `Refused(code, detail, required=...)`."""

    def __init__(self, code: str, detail: str, **members):
        super().__init__(detail)
        self.code, self.detail, self.members = code, detail, members


def unauthorized() -> Refused:
    return Refused("unauthorized", "Send your API key: `Authorization: Bearer <key>`.")


TICKER = r"[.\-=^]*[A-Za-z0-9][A-Za-z0-9.\-=^]*"
EMAIL = "[!-?A-~]+@[!-?A-~]+"
API_KEY = "[!-~]{8,255}"


def checked_ticker(text: str) -> str:
    """`text` in upper case, if it can be a ticker. Checked first: `"ı".upper()` is `"I"`."""
    if len(text) > 20 or not re.fullmatch(TICKER, text):
        raise ValueError("must be 1 to 20 letters, digits and . - = ^")
    return text.upper()


def checked_decimal(value) -> Decimal:
    """The Decimal in a JSON number (which was parsed as one) or in a string of plain digits."""
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,20}(\.[0-9]{1,20})?", value):
        value = Decimal(value)
    if not isinstance(value, Decimal):
        raise ValueError("must be a number or a decimal string")
    return value


def checked_scale(value: Decimal) -> Decimal:
    if value != rounded(value):
        raise ValueError("must have at most 8 decimals")
    return rounded(value)


def checked_amount(value) -> Decimal:
    """An order's quantity or price."""
    value = checked_decimal(value)
    if not 0 < value < ORDER_LIMIT:
        raise ValueError(f"must be above 0 and below {ORDER_LIMIT}")
    return checked_scale(value)


def checked_cash(value) -> Decimal:
    """What an account begins with, in dollars."""
    value = checked_decimal(value)
    if not 0 <= value < ACCOUNT_LIMIT:
        raise ValueError(f"must be from 0 to below {ACCOUNT_LIMIT}")
    return abs(checked_scale(value))  # JSON knows -0


def checked_email(text: str) -> str:
    if len(text) > 254 or not re.fullmatch(EMAIL, text):
        raise ValueError("must be an email address such as alice@example.com")
    return text.lower()


def checked_key(text: str) -> str:
    if not re.fullmatch(API_KEY, text):
        raise ValueError("must be 8 to 255 printable ASCII characters without spaces")
    return text


def text_like(pattern: str, **more) -> WithJsonSchema:
    """What a check says, for /openapi.json."""
    return WithJsonSchema({"type": "string", "pattern": f"^{pattern}$", **more})


def number_below(limit: Decimal, **more) -> WithJsonSchema:
    number = {"type": "number", "exclusiveMaximum": int(limit), "multipleOf": 1e-8, **more}
    not_zero = r"(?!0+(\.0+)?$)" if "exclusiveMinimum" in more else ""
    digits = {"type": "string", "pattern": rf"^{not_zero}[0-9]{{1,10}}(\.[0-9]{{1,8}})?$"}
    return WithJsonSchema({"anyOf": [number, digits]})


Ticker = Annotated[str, AfterValidator(checked_ticker), text_like(TICKER, maxLength=20, examples=["AAPL"])]
Action = Literal["buy", "sell"]
OrderAmount = Annotated[
    Decimal, BeforeValidator(checked_amount), number_below(ORDER_LIMIT, exclusiveMinimum=0)
]
Cash = Annotated[Decimal, BeforeValidator(checked_cash), number_below(ACCOUNT_LIMIT, minimum=0)]
Email = Annotated[str, AfterValidator(checked_email), text_like(EMAIL, maxLength=254)]
ApiKey = Annotated[str, AfterValidator(checked_key), text_like(API_KEY)]
Moment = Annotated[datetime, BeforeValidator(moment_from)]


class Order(BaseModel):
    """What a bot asks for."""

    model_config = ConfigDict(extra="forbid")

    ticker: Ticker = Field(description="What to trade", examples=["AAPL"])
    action: Action
    quantity: OrderAmount = Field(description="Shares or coins", examples=["10"])
    price: OrderAmount = Field(
        None,
        description="Dollars each: the most to pay, or the least to take. Without it: the market price",
        examples=["150.25"],
    )

    def __str__(self) -> str:
        return f"{self.action} {plain(self.quantity)} {self.ticker} at {self.price or 'the market'}"


# ------------------------------------------------------------------------------------------- Tables


class User(db.Model):
    """Somebody with an API key. The key itself is nowhere, only its SHA-256."""

    __tablename__ = "ibkr_users"
    __table_args__ = {"sqlite_autoincrement": True}

    id: Mapped[Id]
    email: Mapped[str] = mapped_column(sa.String(254), unique=True)
    api_key_hash: Mapped[str] = mapped_column(sa.String(64), unique=True)
    created_at: Mapped[Time]
    closed_at: Mapped[Time | None]

    @staticmethod
    def hash(api_key: str) -> str:
        return hashlib.sha256(api_key.encode()).hexdigest()

    @classmethod
    def with_key(cls, key_hash: str) -> tuple | None:
        """The account of whoever has this key: user_id, cash_balance, run, market_clock, pin_changes.

        The hash is looked up, so timing tells nothing of the key.
        """
        with connected() as connection:
            found = send(connection, USER_WITH_KEY, key_hash=key_hash)
        return found[0] if found else None

    @classmethod
    def open(cls, email: str, cash: Decimal, api_key: str | None = None) -> tuple[int, str]:
        """Make a user and the balance, both or neither, and answer the id and the API key."""
        api_key = api_key or secrets.token_hex(32)
        try:
            with transaction() as (connection, _):
                user_id = connection.scalar(
                    sa.insert(cls).returning(cls.id),
                    {"email": email, "api_key_hash": cls.hash(api_key), "created_at": now()},
                )
                connection.execute(
                    sa.insert(Balance),
                    {
                        "user_id": user_id,
                        "cash_balance": cash,
                        "starting_cash": cash,
                        "run": 1,
                        "updated_at": now(),
                    },
                )
        except IntegrityError as taken:
            raise Refused("already_exists", f"The email {email} or its API key is already in use.") from taken
        return user_id, api_key

    @classmethod
    def id_of(cls, email: str) -> int:
        """The id of the open account of `email`; `Refused` if there is none."""
        with connected() as connection:
            user_id = connection.scalar(
                sa.select(cls.id).where(cls.email == email.lower(), cls.closed_at.is_(None))
            )
        if user_id is None:
            raise Refused("not_found", f"There is no open account of {email}.")
        return user_id

    @classmethod
    def all(cls) -> Sequence[sa.Row]:
        """Every user with the cash in the account, in the order of their ids."""
        columns = (cls.id, cls.email, cls.created_at, cls.closed_at, Balance.cash_balance)
        with connected() as connection:
            return connection.execute(sa.select(*columns).join(Balance).order_by(cls.id)).all()

    @classmethod
    def rotate_key(cls, user_id: int) -> str:
        """Give the user a new API key and answer it; the old one is refused from now on."""
        api_key = secrets.token_hex(32)
        cls.change(user_id, lambda: {"api_key_hash": cls.hash(api_key)})
        return api_key

    @classmethod
    def close(cls, user_id: int) -> None:
        """Close the account: its key is refused from now on, its trades stay."""
        cls.change(user_id, lambda: {"closed_at": now()})

    @classmethod
    def change(cls, user_id: int, values: Callable[[], dict]) -> None:
        """Write the `values` of the moment at which no trade of the user is under way."""
        with turn(user_id), transaction(LOCK_ACCOUNT, user_id=user_id) as (connection, _):
            is_open = (cls.id == user_id) & cls.closed_at.is_(None)
            if not connection.execute(sa.update(cls).where(is_open).values(values())).rowcount:
                raise Refused("not_found", f"There is no open account with the id {user_id}.")

    @staticmethod
    def to_dict(user: sa.Row) -> dict:
        """What the admin sees of a row of `all`."""
        return {
            "user_id": user.id,
            "email": user.email,
            "created_at": iso(user.created_at),
            "closed_at": iso(user.closed_at),
            "cash_balance": user.cash_balance,
        }


class Balance(db.Model):
    """A user's cash. An `Account` is one in memory, and has the rules by which it changes.

    `run` counts how often the account has started over; `starting_cash` is what this run began with.
    `market_clock` and `pin_changes` are its controls of the sample market, see `Controls`.
    """

    __tablename__ = "ibkr_balances"

    user_id: Mapped[UserId] = mapped_column(primary_key=True)
    cash_balance: Mapped[Amount]
    starting_cash: Mapped[Amount]
    run: Mapped[int]
    updated_at: Mapped[Time]
    market_clock: Mapped[Time | None]
    pin_changes: Mapped[int] = mapped_column(server_default="0")

    __table_args__ = (within("cash_balance", 0, ACCOUNT_LIMIT), within("starting_cash", 0, ACCOUNT_LIMIT))


class Holding(db.Model):
    """So much of one ticker in one account, and what it cost. A holding of zero has no row."""

    __tablename__ = "ibkr_stock_balances"

    user_id: Mapped[UserId] = mapped_column(primary_key=True)
    ticker: Mapped[str] = mapped_column(sa.String(20), primary_key=True)
    quantity: Mapped[Quantity]
    cost_basis: Mapped[Amount]
    updated_at: Mapped[Time]

    __table_args__ = (within("quantity", UNIT, ACCOUNT_LIMIT), within("cost_basis", 0, ACCOUNT_LIMIT))

    @staticmethod
    def to_dict(holding: tuple, quote: "Quote | None") -> dict:
        """A row valued at `quote`, in dollars; `None` where that needs a price and there is none."""
        value = quote and value_of(holding.quantity, quote.price)
        profit = quote and value - holding.cost_basis
        return {
            "ticker": holding.ticker,
            "quantity": holding.quantity,
            "average_price": rounded(holding.cost_basis / holding.quantity),
            "cost_basis": holding.cost_basis,
            "current_price": quote and quote.price,
            "market_value": value,
            "unrealized_pnl": profit,
            "unrealized_pnl_percent": quote and percent(profit, holding.cost_basis),
            "price_timestamp": quote and iso(quote.timestamp),
        }


class Trade(db.Model):
    """One purchase or sale, booked for ever: rows are added, never changed. A `Fill` is one in memory.

    `price` is what the trade was booked at, `market_price` what the market asked at that moment; both
    in dollars. `realized_pnl` is the profit of a sale: total - commission - the cost of what was sold.
    """

    __tablename__ = "ibkr_trades"

    id: Mapped[Id]
    user_id: Mapped[UserId]
    run: Mapped[int]
    ticker: Mapped[str] = mapped_column(sa.String(20))
    trade_type: Mapped[str] = mapped_column(sa.String(4))
    order_type: Mapped[str] = mapped_column(sa.String(6))
    quantity: Mapped[Quantity]
    price: Mapped[Amount]
    total_amount: Mapped[Amount]
    commission: Mapped[Amount]
    realized_pnl: Mapped[Amount | None]
    cash_after: Mapped[Amount]
    market_price: Mapped[Amount]
    price_source: Mapped[str] = mapped_column(sa.String(20))
    idempotency_key: Mapped[str] = mapped_column(sa.String(255))
    market_time: Mapped[Time]
    created_at: Mapped[Time]

    __table_args__ = (
        UniqueConstraint("user_id", "idempotency_key"),
        Index(None, "user_id", "id"),
        CheckConstraint("trade_type IN ('buy', 'sell')", name="trade_type"),
        CheckConstraint("order_type IN ('limit', 'market')", name="order_type"),
        CheckConstraint("(trade_type = 'sell') = (realized_pnl IS NOT NULL)", name="realized_on_sell"),
        within("quantity", UNIT, ORDER_LIMIT),
        within("price", UNIT, ORDER_LIMIT),
        within("total_amount", 0, ACCOUNT_LIMIT),
        within("commission", 0, ACCOUNT_LIMIT),
        within("realized_pnl", -ACCOUNT_LIMIT, ACCOUNT_LIMIT),
        within("cash_after", 0, ACCOUNT_LIMIT),
        within("market_price", UNIT, ORDER_LIMIT),
        {"sqlite_autoincrement": True},
    )

    @staticmethod
    def is_for(trade: tuple, order: Order) -> bool:
        """Whether a trade came of `order`: the same in meaning, whatever its bytes were."""
        limit = trade.price if trade.order_type == "limit" else None
        return (order.ticker, order.action, order.quantity, order.price) == (
            trade.ticker,
            trade.trade_type,
            trade.quantity,
            limit,
        )

    @classmethod
    def with_key(cls, user_id: int, key: str) -> tuple | None:
        """The trade that the user booked under the idempotency key `key`, in any run."""
        with connected() as connection:
            found = send(connection, TRADE_WITH_KEY, user_id=user_id, key=key)
        return found[0] if found else None

    @classmethod
    def of(cls, user_id: int, trade_id: int) -> sa.Row | None:
        """The trade `trade_id`, if it is the user's own."""
        own = (cls.user_id == user_id) & (cls.id == trade_id)
        with connected() as connection:
            return connection.execute(sa.select(cls.__table__).where(own)).first()

    @classmethod
    def page(cls, user_id, *, ticker, action, since, until, run, cursor, limit) -> Sequence[sa.Row]:
        """The newest `limit` trades with an id below `cursor`, of one run, that pass the filters.

        Paging by id neither skips nor repeats while others trade, and the last page costs no more
        than the first.
        """
        if run is None:
            run = sa.select(Balance.run).where(Balance.user_id == user_id).scalar_subquery()
        statement = sa.select(cls.__table__).where(cls.user_id == user_id, cls.run == run)
        if cursor:
            statement = statement.where(cls.id < cursor)
        if ticker:
            statement = statement.where(cls.ticker == ticker)
        if action:
            statement = statement.where(cls.trade_type == action)
        if since:
            statement = statement.where(cls.created_at >= since)
        if until:
            statement = statement.where(cls.created_at < until)
        with connected() as connection:
            return connection.execute(statement.order_by(cls.id.desc()).limit(limit)).all()

    CSV_COLUMNS = (
        "id",
        "run",
        "timestamp",
        "ticker",
        "trade_type",
        "quantity",
        "price",
        "total_amount",
        "commission",
        "realized_pnl",
        "cash_balance",
        "market_price",
        "price_source",
    )

    @staticmethod
    def to_csv(trade: sa.Row) -> list[str]:
        """The trade as a line of CSV, its numbers with the same digits as in JSON."""
        shown = Trade.to_dict(trade)
        return [plain(v) if isinstance(v, Decimal) else v for v in map(shown.get, Trade.CSV_COLUMNS)]

    @staticmethod
    def to_dict(trade: "sa.Row | Fill") -> dict:
        """What a bot sees of the trade, which is a row of the table or a `Fill`."""
        return {
            "id": trade.id and str(trade.id),
            "user_id": trade.user_id,
            "ticker": trade.ticker,
            "trade_type": trade.trade_type,
            "quantity": trade.quantity,
            "price": trade.price,
            "total_amount": trade.total_amount,
            "commission": trade.commission,
            "realized_pnl": trade.realized_pnl,
            "cash_balance": trade.cash_after,
            "market_price": trade.market_price,
            "price_source": trade.price_source,
            "timestamp": iso(trade.created_at),
            "run": trade.run,
        }


class Run(db.Model):
    """A run of an account that has ended: what it began with, and where it stood when it ended."""

    __tablename__ = "ibkr_runs"

    user_id: Mapped[UserId] = mapped_column(primary_key=True)
    run: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    starting_cash: Mapped[Amount]
    cash_balance: Mapped[Amount]
    market_time: Mapped[Time]
    ended_at: Mapped[Time]

    __table_args__ = (within("starting_cash", 0, ACCOUNT_LIMIT), within("cash_balance", 0, ACCOUNT_LIMIT))


class Pin(db.Model):
    """A price of the sample market that an account has fixed, or let go again (`price` is NULL).

    Rows are only added, so that the past can be valued by what was pinned then.
    """

    __tablename__ = "ibkr_pins"
    __table_args__ = (
        Index(None, "user_id", "id"),
        within("price", UNIT, ORDER_LIMIT),
        {"sqlite_autoincrement": True},
    )

    id: Mapped[Id]
    user_id: Mapped[UserId]
    ticker: Mapped[str] = mapped_column(sa.String(20))
    price: Mapped[Amount | None]
    created_at: Mapped[Time]

    @classmethod
    def in_force(cls, user_id: int, connection: sa.Connection | None = None) -> dict[str, Decimal]:
        """The prices that the user has pinned now, by ticker; within a transaction over its `connection`."""
        last = sa.select(sa.func.max(cls.id)).where(cls.user_id == user_id).group_by(cls.ticker)
        pins = sa.select(cls.ticker, cls.price).where(cls.id.in_(last), cls.price.is_not(None))
        with nullcontext(connection) if connection else connected() as connection:
            return {pin.ticker: pin.price for pin in connection.execute(pins.order_by(cls.ticker))}

    @classmethod
    def of(cls, user_id: int) -> Sequence[sa.Row]:
        """Every pin that the user has set or let go, the oldest first."""
        pins = sa.select(cls.ticker, cls.price, cls.created_at).where(cls.user_id == user_id)
        with connected() as connection:
            return connection.execute(pins.order_by(cls.id)).all()


@dataclass(frozen=True)
class Controls:
    """How an account has set its sample market. The default is the wall clock and no pins.

    `changes` counts the rows in `ibkr_pins`: whether a pin has moved is seen without reading them.
    """

    clock: datetime | None = None
    changes: int = 0
    pins: dict[str, Decimal] = field(default_factory=dict)


@dataclass(frozen=True)
class Costs:
    """What the broker takes: commission on every trade, slippage on market orders."""

    commission_bps: Decimal = Decimal(0)
    commission_min: Decimal = Decimal(0)
    slippage_bps: Decimal = Decimal(0)

    def commission(self, total: Decimal) -> Decimal:
        """Dollars for a trade of `total` dollars, rounded up."""
        share = total * self.commission_bps / 10_000
        return rounded(max(share, self.commission_min), ROUND_CEILING)

    def slipped(self, action: str, price: Decimal) -> Decimal:
        """What a market order gets at a market price of `price`: a little worse, rounded against it."""
        slip = price * self.slippage_bps / 10_000
        if action == "buy":
            return rounded(price + slip, ROUND_CEILING)
        return max(rounded(price - slip, ROUND_FLOOR), UNIT)


@dataclass(slots=True)
class Quote:
    """What a source said that one share or coin costs, in `currency`, and until when that holds.

    `market_time` is the moment of the recorded past that a quote of the sample market is of.
    """

    ticker: str
    price: Decimal
    currency: str | None
    source: str
    timestamp: datetime
    valid_until: datetime | None = None
    number: int | None = None
    market_time: datetime | None = None

    @property
    def is_in_dollars(self) -> bool:
        return self.currency == "USD"

    def to_dict(self) -> dict:
        return {
            "ticker": self.ticker,
            "price": self.price,
            "currency": self.currency,
            "source": self.source,
            "timestamp": iso(self.timestamp),
            "valid_until": iso(self.valid_until),
        }


class PublishedQuote(db.Model):
    """A live quote that a server has answered.

    Every one is a row, so that all its processes judge trades by the same one, and so that the past can
    be valued later. `number` counts the quotes of a ticker.
    """

    __tablename__ = "ibkr_quotes"

    ticker: Mapped[str] = mapped_column(sa.String(20), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    price: Mapped[Amount]
    currency: Mapped[str | None] = mapped_column(sa.String(10))
    source: Mapped[str] = mapped_column(sa.String(20))
    timestamp: Mapped[Time]
    valid_until: Mapped[Time]

    __table_args__ = (within("price", UNIT, ORDER_LIMIT),)

    @classmethod
    def latest(cls, ticker: str) -> Quote | None:
        """The latest quote of `ticker` that any process has published, whether it still holds or not."""
        with connected() as connection:
            found = send(connection, LATEST_QUOTE, ticker=ticker)
        return Quote(**found[0]._asdict()) if found else None

    @classmethod
    def past(cls, tickers) -> Sequence[sa.Row]:
        """Every quote of `tickers` ever published, the oldest first."""
        columns = (cls.ticker, cls.timestamp, cls.price)
        statement = sa.select(*columns).where(cls.ticker.in_(list(tickers))).order_by(cls.number)
        with connected() as connection:
            return connection.execute(statement).all()

    @classmethod
    def add(cls, quote: Quote) -> bool:
        """Make `quote` that of all processes; False if another one came first with its `number`."""
        row = {column.name: getattr(quote, column.name) for column in cls.__table__.columns}
        try:
            with connected() as connection:
                connection.execute(sa.insert(cls), row)
        except IntegrityError:
            return False
        return True


class Market(db.Model):
    """Which market this database belongs to, `live` or `sample`: their prices never meet in one."""

    __tablename__ = "ibkr_market"
    __table_args__ = (CheckConstraint("id = 1", name="one_row"),)

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    kind: Mapped[str] = mapped_column(sa.String(6))

    @classmethod
    def claim(cls, kind: str) -> None:
        """Take the database for this market; `Refused` if it belongs to the other one."""
        with connected() as connection:
            owner = connection.scalar(sa.select(cls.kind))  # A standby can be read, though not written to.
            if owner is None:
                with suppress(IntegrityError):  # Another process was faster.
                    connection.execute(sa.insert(cls), {"id": 1, "kind": kind})
                owner = connection.scalar(sa.select(cls.kind))
        if owner != kind:
            raise Refused(
                "price_unavailable",
                f"This database holds {owner} prices and this server serves {kind} ones; "
                "give each its own DATABASE_URL.",
            )


# ------------------------------------------------------------------------------------- The account
# Plain objects: the rules touch no database, and change nothing when they refuse.


@dataclass
class Position:
    """So much of one ticker, in shares or coins, and what it cost, in dollars."""

    quantity: Decimal = Decimal(0)
    cost_basis: Decimal = Decimal(0)

    def add(self, quantity: Decimal, cost: Decimal) -> None:
        """Put `quantity` in, which cost `cost` dollars, commission included."""
        if max(self.quantity + quantity, self.cost_basis + cost) >= ACCOUNT_LIMIT:
            raise Refused(
                "limit_exceeded",
                f"A holding stays below {ACCOUNT_LIMIT} shares and dollars of cost.",
                limit=ACCOUNT_LIMIT,
            )
        self.quantity += quantity
        self.cost_basis += cost

    def cost_of(self, quantity: Decimal) -> Decimal:
        """What `quantity` of it cost: its share, and for the last share all that is left."""
        if quantity == self.quantity:
            return self.cost_basis
        return rounded(self.cost_basis * quantity / self.quantity)

    def remove(self, quantity: Decimal, cost: Decimal) -> None:
        self.quantity -= quantity
        self.cost_basis -= cost


@dataclass
class Fill:
    """What became of an order: a trade with all that `Trade` has columns for."""

    user_id: int
    run: int
    ticker: str
    trade_type: str
    order_type: str
    quantity: Decimal
    price: Decimal
    total_amount: Decimal
    commission: Decimal
    market_price: Decimal
    price_source: str
    market_time: datetime
    created_at: datetime
    realized_pnl: Decimal | None = None
    cash_after: Decimal | None = None
    idempotency_key: str | None = None
    id: int | None = None


@dataclass
class Account:
    """A user's cash, and the rules by which it changes."""

    user_id: int
    run: int
    cash_balance: Decimal
    starting_cash: Decimal
    market_clock: datetime | None = None
    pin_changes: int = 0
    connection: sa.Connection | None = None

    def fill(self, order: Order, quote: Quote, position: Position, costs: Costs = Costs()) -> Fill:
        """Decide `order` at the market's `quote`: change this account and `position`, answer the trade.

        A limit order is booked at the price it names, a market order at the market's, slipped. Raises
        `Refused`, or `QuoteExpired` when the market has moved on since the quote was taken.
        """
        moment = now()
        if quote.valid_until and quote.valid_until <= moment:
            raise QuoteExpired
        if not quote.is_in_dollars:
            raise Refused(
                "unsupported_currency",
                f"{order.ticker} is quoted in {quote.currency or 'an unknown currency'}; "
                "only tickers quoted in USD trade.",
                currency=quote.currency,
            )
        price = order.price or costs.slipped(order.action, quote.price)
        if price >= ORDER_LIMIT:
            raise Refused("limit_exceeded", f"A price stays below {ORDER_LIMIT}.", limit=ORDER_LIMIT)
        rounding = ROUND_CEILING if order.action == "buy" else ROUND_FLOOR
        total = value_of(order.quantity, price, rounding)
        fill = Fill(
            user_id=self.user_id,
            run=self.run,
            ticker=order.ticker,
            trade_type=order.action,
            order_type="limit" if order.price else "market",
            quantity=order.quantity,
            price=price,
            total_amount=total,
            commission=costs.commission(total),
            market_price=quote.price,
            price_source=quote.source,
            market_time=quote.market_time or moment,
            created_at=moment,
        )
        if order.action == "buy":
            self.buy(fill, position)
        else:
            self.sell(fill, position)
        fill.cash_after = self.cash_balance
        return fill

    def buy(self, fill: Fill, position: Position) -> None:
        """Pay for `fill` and put the shares into `position`."""
        if fill.price < fill.market_price:
            raise Refused(
                "price_below_market",
                f"You offer {plain(fill.price)} and {fill.ticker} costs {plain(fill.market_price)}.",
                price=fill.price,
                market_price=fill.market_price,
            )
        cost = fill.total_amount + fill.commission
        if cost > self.cash_balance:
            raise Refused(
                "insufficient_funds",
                f"This costs {plain(cost)} and you have {plain(self.cash_balance)}.",
                required=cost,
                available=self.cash_balance,
            )
        position.add(fill.quantity, cost)
        self.cash_balance -= cost

    def sell(self, fill: Fill, position: Position) -> None:
        """Take the shares out of `position` and put what `fill` brings into cash."""
        if fill.price > fill.market_price:
            raise Refused(
                "price_above_market",
                f"You ask {plain(fill.price)} and {fill.ticker} brings {plain(fill.market_price)}.",
                price=fill.price,
                market_price=fill.market_price,
            )
        if fill.quantity > position.quantity:
            raise Refused(
                "insufficient_shares",
                f"This sells {plain(fill.quantity)} {fill.ticker} and you have {plain(position.quantity)}.",
                required=fill.quantity,
                available=position.quantity,
            )
        proceeds = fill.total_amount - fill.commission
        if self.cash_balance + proceeds < 0:
            raise Refused(
                "insufficient_funds",
                f"The commission of {plain(fill.commission)} is more than the {plain(fill.total_amount)} "
                f"that this brings and the {plain(self.cash_balance)} that you have.",
                required=fill.commission,
                available=self.cash_balance + fill.total_amount,
            )
        if max(fill.total_amount, self.cash_balance + proceeds) >= ACCOUNT_LIMIT:
            raise Refused(
                "limit_exceeded",
                f"This brings {plain(proceeds)}, you have {plain(self.cash_balance)}, "
                f"and cash stays below {ACCOUNT_LIMIT}.",
                limit=ACCOUNT_LIMIT,
            )
        cost = position.cost_of(fill.quantity)
        if proceeds - cost < -ACCOUNT_LIMIT:
            raise Refused("limit_exceeded", f"A loss ends at {ACCOUNT_LIMIT}.", limit=ACCOUNT_LIMIT)
        position.remove(fill.quantity, cost)
        fill.realized_pnl = proceeds - cost
        self.cash_balance += proceeds

    # The database.

    @classmethod
    @contextmanager
    def locked(cls, user_id: int, key_hash: str, ticker: str | None = None, key: str | None = None):
        """The transaction: everything that changes an account happens in `with Account.locked(...)`.

        Yields the account, its position in `ticker`, and the trade that it booked under the idempotency
        key `key`, or None. The account's row is locked first and all is read after that, so whoever
        comes second waits and then sees what the first one did; a join in the locking statement would
        still see the holding as it was before the wait. Leaving the block commits, unless `record` has; an
        exception on the way undoes it all. `Refused` if the account's API key is no longer the one with
        this hash.
        """
        own = {"user_id": user_id, "key_hash": key_hash, "ticker": ticker, "key": key}
        with turn(user_id), transaction(LOCK_ACCOUNT, LOCKED_ACCOUNT, **own) as (connection, rows):
            if not rows:
                raise unauthorized()
            row = rows[0]
            market = row.market_clock, row.pin_changes
            account = cls(user_id, row.run, row.cash_balance, row.starting_cash, *market, connection)
            position = Position(row.quantity, row.cost_basis) if row.quantity else Position()
            yield account, position, row.earlier and send(connection, TRADE_WITH_KEY, **own)[0]

    @classmethod
    def with_holdings(cls, user_id: int, key_hash: str) -> tuple["Account", list[tuple]]:
        """The account and its holdings by ticker, of one moment, unlocked: one statement reads both.

        `Refused` if the account's API key is no longer the one with this hash.
        """
        with connected() as connection:
            rows = send(connection, ACCOUNT_WITH_HOLDINGS, user_id=user_id, key_hash=key_hash)
        if not rows:
            raise unauthorized()
        own, *holdings = rows
        cash, starting_cash = own.quantity, own.cost_basis
        return cls(user_id, own.run, cash, starting_cash, own.market_clock, own.pin_changes), holdings

    def portfolio(self, holdings: Sequence, quotes: dict[str, Quote]) -> dict:
        """The account valued at `quotes`: dollars, profit and loss, and percentages of the cost.

        The realised profit follows from the books' equation, and so needs no look at the trades. A
        holding is worth what selling it would bring.
        """
        quotes = {ticker: quote for ticker, quote in quotes.items() if quote.is_in_dollars}
        rows = [Holding.to_dict(holding, quotes.get(holding.ticker)) for holding in holdings]
        cost = sum((row["cost_basis"] for row in rows), Decimal(0))
        realized = self.cash_balance + cost - self.starting_cash
        values = [row["market_value"] for row in rows]
        value = None if None in values else sum(values, Decimal(0))
        return {
            "user_id": self.user_id,
            "cash_balance": self.cash_balance,
            "holdings": rows,
            "total_invested_value": cost,
            "market_value": value,
            "equity": None if value is None else self.cash_balance + value,
            "unrealized_pnl": None if value is None else value - cost,
            "realized_pnl": realized,
            "total_pnl": None if value is None else value - cost + realized,
        }

    def record(self, fill: Fill, position: Position, key: str) -> None:
        """Write the cash, the holding and the trade, commit them, and give the trade its id."""
        fill.idempotency_key = key
        if not position.quantity:
            write_holding = DELETE_HOLDING
        elif fill.trade_type == "buy" and position.quantity == fill.quantity:
            write_holding = INSERT_HOLDING  # There was none before.
        else:
            write_holding = UPDATE_HOLDING
        fill.id = commit(
            self.connection,
            *(UPDATE_CASH, write_holding, INSERT_TRADE),
            then=[TRADE_ID],
            **vars(fill),
            held=position.quantity,
            cost_basis=position.cost_basis,
        )[0].id

    def start_over(self, cash: Decimal, market_time: datetime) -> None:
        """End this run and begin the next with `cash` dollars and no holdings. The trades stay."""
        self.connection.execute(
            sa.insert(Run),
            {
                "user_id": self.user_id,
                "run": self.run,
                "starting_cash": self.starting_cash,
                "cash_balance": self.cash_balance,
                "market_time": market_time,
                "ended_at": now(),
            },
        )
        self.connection.execute(sa.delete(Holding).where(Holding.user_id == self.user_id))
        self.change(run=self.run + 1, cash_balance=cash, starting_cash=cash)

    def pin(self, ticker: str, price: Decimal | None) -> None:
        """Fix `ticker` at `price` dollars on this account's sample market, or let it go."""
        self.connection.execute(
            sa.insert(Pin), {"user_id": self.user_id, "ticker": ticker, "price": price, "created_at": now()}
        )
        self.change(pin_changes=self.pin_changes + 1)

    def controls(self, known: Controls | None = None) -> Controls:
        """How the account's sample market is set: as `known`, if that is still so, else read anew."""
        if known and (known.clock, known.changes) == (self.market_clock, self.pin_changes):
            return known
        return Controls(self.market_clock, self.pin_changes, Pin.in_force(self.user_id, self.connection))

    def change(self, **values) -> None:
        """Write `values` to the account's row."""
        for name, value in values.items():
            setattr(self, name, value)
        own = Balance.user_id == self.user_id
        self.connection.execute(sa.update(Balance).where(own).values(**values, updated_at=now()))


class QuoteExpired(Exception):
    """The quote ran out, or the account's market was set otherwise, while the request was under way."""


# ------------------------------------------------------------------------------------- The results


@dataclass
class Books:
    """All that is written of one account, read at one moment."""

    account: Account
    holdings: Sequence[sa.Row]
    runs: dict[int, Run | Account]
    trades: dict[int, list[sa.Row]]

    @classmethod
    def of(cls, user_id: int) -> "Books":
        with transaction(begin=SNAPSHOT) as (connection, _):
            own = {"user_id": user_id}
            row = connection.execute(sa.select(Balance.__table__).filter_by(**own)).one()
            holdings = connection.execute(sa.select(Holding.__table__).filter_by(**own)).all()
            runs = connection.execute(sa.select(Run.__table__).filter_by(**own).order_by(Run.run))
            trades = defaultdict(list)
            for trade in connection.execute(sa.select(Trade.__table__).filter_by(**own).order_by(Trade.id)):
                trades[trade.run].append(trade)
            ended = {run.run: run for run in runs}
        account = Account(user_id, row.run, row.cash_balance, row.starting_cash)
        return cls(account, holdings, ended | {account.run: account}, trades)

    def audit(self) -> dict:
        """Replay the trades from the start and compare: every balance, holding and cost.

        Answers `{"ok", "trades", "differences"}`, with a sentence for each difference. Every run begins
        with its starting cash and no holdings, and must end with what the account says that it had.
        """
        differences = [
            f"{len(self.trades[run])} trades are of run {run}, which this account has not had."
            for run in self.trades.keys() - self.runs.keys()
        ]

        def compare(what: str, booked, replayed) -> None:
            if booked != replayed:
                booked, replayed = (None if n is None else plain(n) for n in (booked, replayed))
                differences.append(f"{what} is {booked}, and the trades make it {replayed}.")

        for number, run in self.runs.items():
            account = Account(self.account.user_id, number, run.starting_cash, run.starting_cash)
            held = defaultdict(Position)
            for row in self.trades.get(number, []):
                fill = Fill(**row._mapping)
                is_buy = fill.trade_type == "buy"
                total = value_of(fill.quantity, fill.price, ROUND_CEILING if is_buy else ROUND_FLOOR)
                compare(f"Trade {row.id}: total_amount", row.total_amount, total)
                try:
                    (account.buy if is_buy else account.sell)(fill, held[fill.ticker])
                except Refused as refused:
                    differences.append(f"Trade {row.id} should have been refused: {refused}")
                compare(f"Trade {row.id}: realized_pnl", row.realized_pnl, fill.realized_pnl)
                compare(f"Trade {row.id}: cash_after", row.cash_after, account.cash_balance)
            compare(f"Run {number}: cash_balance", run.cash_balance, account.cash_balance)
        booked = {holding.ticker: holding for holding in self.holdings}  # And `held` is the current run's.
        for ticker in sorted(booked.keys() | held.keys()):
            for name in ("quantity", "cost_basis"):
                pair = (getattr(side.get(ticker, Position()), name) for side in (booked, held))
                compare(f"{ticker}: {name}", *pair)
        count = sum(map(len, self.trades.values()))
        return {"ok": not differences, "trades": count, "differences": differences}

    def history(self, number: int, past_price, portfolio: dict | None, market_time: datetime) -> dict:
        """How run `number` went: its equity curve and the figures that sum it up.

        One point a trade: cash, and the holdings at what the market asked at that moment, which
        `past_price(ticker, moment, market_time)` knows (the ticker that was traded: its own
        `market_price`). The last point is `portfolio`, the account now; a run that has ended is valued
        at its end. Dollars, and percentages:

        - total return: equity / starting cash - 1;
        - maximum drawdown: the deepest fall of equity below its highest point before, as a part of that
          point; the starting cash is the first;
        - win rate: sales with a profit above 0 / all sales;
        - profit factor: the sum of all profits / the sum of all losses of sales.
        """
        run, trades = self.runs[number], self.trades.get(number, [])
        points, held, prices = [], defaultdict(Decimal), {}

        def add_point(moment: datetime, market_time: datetime, cash: Decimal, traded: str | None):
            for ticker in held.keys() - {traded}:
                prices[ticker] = past_price(ticker, moment, market_time) or prices[ticker]
            value = sum((value_of(held[t], prices[t]) for t in held if held[t]), Decimal(0))
            points.append(
                {"timestamp": iso(market_time), "cash": cash, "market_value": value, "equity": cash + value}
            )

        for trade in trades:
            held[trade.ticker] += trade.quantity if trade.trade_type == "buy" else -trade.quantity
            prices[trade.ticker] = trade.market_price
            add_point(trade.created_at, trade.market_time, trade.cash_after, trade.ticker)
        if portfolio:
            now_worth = {name: portfolio[name] for name in ("market_value", "equity")}
            points.append({"timestamp": iso(market_time), "cash": run.cash_balance, **now_worth})
        else:
            add_point(run.ended_at, run.market_time, run.cash_balance, None)

        equity, start = points[-1]["equity"], run.starting_cash
        peak, drawdown = start, Decimal(0)
        for point in points:
            if point["equity"] is not None and peak:
                peak = max(peak, point["equity"])
                drawdown = max(drawdown, (peak - point["equity"]) / peak)
        sales = [trade.realized_pnl for trade in trades if trade.trade_type == "sell"]
        profits = sum((sale for sale in sales if sale > 0), Decimal(0))
        losses = -sum((sale for sale in sales if sale < 0), Decimal(0))
        return {
            "run": number,
            "points": points,
            "summary": {
                "starting_cash": start,
                "equity": equity,
                "total_return_percent": None if equity is None else percent(equity - start, start),
                "max_drawdown_percent": percent(drawdown, Decimal(1)),
                "trades": len(trades),
                "realized_pnl": sum(sales, Decimal(0)),
                "win_rate_percent": percent(Decimal(sum(s > 0 for s in sales)), Decimal(len(sales))),
                "profit_factor": rounded(profits / losses) if losses else None,
                "commission": sum((trade.commission for trade in trades), Decimal(0)),
            },
        }


# -------------------------------------------------------------------------------------- Statements
# Built once: building one costs Python more than sending it. All of them are plain SQL in SQLAlchemy's
# words, and go over a connection, not a session: there is no second copy of a row that could be stale.

HAS_THE_KEY = (User.api_key_hash == bindparam("key_hash")) & User.closed_at.is_(None)
USER_WITH_KEY = (
    sa.select(Balance.user_id, Balance.cash_balance, Balance.run, Balance.market_clock, Balance.pin_changes)
    .join(User, User.id == Balance.user_id)
    .where(HAS_THE_KEY)
)
TRADE_COLUMNS = Trade.__table__.columns.keys()
LOCK_ACCOUNT = sa.select(Balance.user_id).where(Balance.user_id == bindparam("user_id")).with_for_update()
LOCKED_ACCOUNT = (
    sa.select(
        Balance.cash_balance,
        Balance.starting_cash,
        Balance.run,
        Balance.market_clock,
        Balance.pin_changes,
        Holding.quantity,
        Holding.cost_basis,
        Trade.id.label("earlier"),
    )
    .join(User, User.id == Balance.user_id)
    .outerjoin(Holding, (Holding.user_id == Balance.user_id) & (Holding.ticker == bindparam("ticker")))
    .outerjoin(Trade, (Trade.user_id == Balance.user_id) & (Trade.idempotency_key == bindparam("key")))
    .where(Balance.user_id == bindparam("user_id"), HAS_THE_KEY)
)
# The account comes first, as the holding of no ticker: its cash, and the cash that it began with.
ACCOUNT_WITH_HOLDINGS = sa.union_all(
    sa.select(
        sa.null().label("ticker"),
        Balance.cash_balance.label("quantity"),
        Balance.starting_cash.label("cost_basis"),
        Balance.run,
        Balance.market_clock,
        Balance.pin_changes,
    )
    .join(User, User.id == Balance.user_id)
    .where(Balance.user_id == bindparam("user_id"), HAS_THE_KEY),
    sa.select(Holding.ticker, Holding.quantity, Holding.cost_basis, sa.null(), sa.null(), sa.null())
    .join(User, User.id == Holding.user_id)
    .where(Holding.user_id == bindparam("user_id"), HAS_THE_KEY),
).order_by(sa.nulls_first(sa.column("ticker")))
TRADE_WITH_KEY = sa.select(Trade.__table__).where(
    Trade.user_id == bindparam("user_id"), Trade.idempotency_key == bindparam("key")
)
OWN_HOLDING = (Holding.user_id == bindparam("user_id")) & (Holding.ticker == bindparam("ticker"))
UPDATE_CASH = (
    sa.update(Balance)
    .where(Balance.user_id == bindparam("user_id"))
    .values(cash_balance=bindparam("cash_after"), updated_at=bindparam("created_at"))
)
HELD = {
    "quantity": bindparam("held"),
    "cost_basis": bindparam("cost_basis"),
    "updated_at": bindparam("created_at"),
}
INSERT_HOLDING = sa.insert(Holding).values(user_id=bindparam("user_id"), ticker=bindparam("ticker"), **HELD)
UPDATE_HOLDING = sa.update(Holding).where(OWN_HOLDING).values(HELD)
DELETE_HOLDING = sa.delete(Holding).where(OWN_HOLDING)
LATEST_NUMBER = sa.select(sa.func.max(PublishedQuote.number)).where(
    PublishedQuote.ticker == bindparam("ticker")
)
LATEST_QUOTE = sa.select(PublishedQuote.__table__).where(
    PublishedQuote.ticker == bindparam("ticker"), PublishedQuote.number == LATEST_NUMBER.scalar_subquery()
)
INSERT_TRADE = sa.insert(Trade).values({n: bindparam(n) for n in TRADE_COLUMNS if n != "id"})
TRADE_ID = sa.select(Trade.id).where(
    Trade.user_id == bindparam("user_id"), Trade.idempotency_key == bindparam("idempotency_key")
)
