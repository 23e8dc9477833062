"""The ledger: who has an account, what is in it, and every trade that was ever booked.

Read `Account` first (what may happen to its money: `locked`, `fill`, `book`), then `Holding` and `Trade`
(what remains for ever). `results.py` proves it all and sums it up. The rules (`fill`, `buy`, `sell`, `add`)
are methods of the mapped classes and touch no database. Nothing here asks anybody for a price.

The books obey one equation for each run of each account, to the last digit, always:

    cash_balance + sum of cost_basis = starting_cash + sum of realized_pnl
"""

import hashlib
import logging
import secrets
from collections import namedtuple
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import date, datetime
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from functools import cache
from math import ceil, prod
from typing import Annotated, NotRequired
from uuid import uuid4

import sqlalchemy as sa
from flask import current_app
from sqlalchemy import BigInteger, CheckConstraint, Index, PoolProxiedConnection, UniqueConstraint, bindparam
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Mapped, make_transient_to_detached, mapped_column
from typing_extensions import TypedDict

from corporate import CorporateAction, ratio_from, ratio_text, times
from database import (
    NAME_IS_TAKEN,
    NO_SUCH_NAME,
    TIME_LIMITS,
    Amount,
    Id,
    Moment,
    Quantity,
    UserId,
    as_sqlalchemy_has_it,
    db,
    snapshot,
    transaction,
    within,
)
from messages import (
    ACCOUNT_LIMIT,
    ORDER_LIMIT,
    UNIT,
    ChangedOrder,
    Correction,
    Dollars,
    MarketAnswer,
    NewOrder,
    Order,
    Percent,
    Price,
    Refused,
    RunNumber,
    Shares,
    Sized,
    Source,
    SourceOrAdmin,
    Symbol,
    Time,
    TradeType,
    UserNumber,
    checked,
    invalid,
    iso,
    means,
    now,
    percent,
    plain,
    rounded,
    told,
    unauthorized,
    upside_down,
    value_of,
)
from orders import ORDERS_LIMIT, DayOf, Passed, PlacedOrder, Tick, settle

log = logging.getLogger(__name__)

BY_ITSELF = "\N{SECTION SIGN}"
"""With it begin the keys of splits and dividends; no client's key can have it."""

# ------------------------------------------------------------------------------------------- Users


class UserAnswer(TypedDict):
    """An account as the admin sees it."""

    user_id: UserNumber
    email: Annotated[str, means("Email address", examples=["alice@example.com"])]
    created_at: Annotated[Time, means("When the account was opened")]
    closed_at: Annotated[Time | None, means("When it was closed")]
    cash_balance: Dollars


class UsersAnswer(TypedDict):
    users: list[UserAnswer]


class User(db.Model):
    """Somebody with an API key. The key itself is nowhere, only its SHA-256."""

    __tablename__ = "ibkr_users"
    __table_args__ = {"sqlite_autoincrement": True}

    id: Mapped[Id]
    email: Mapped[str] = mapped_column(sa.String(254), unique=True)
    api_key_hash: Mapped[str] = mapped_column(sa.String(64), unique=True)
    created_at: Mapped[Moment]
    closed_at: Mapped[Moment | None]

    @staticmethod
    def hash(api_key: str) -> str:
        return hashlib.sha256(api_key.encode()).hexdigest()

    @classmethod
    def open(cls, email: str, cash: Decimal, api_key: str | None = None) -> tuple[int, str]:
        """Make a user and the account, both or neither, and answer the id and the API key."""
        api_key = api_key or secrets.token_hex(32)
        user = cls(email=email, api_key_hash=cls.hash(api_key), created_at=now())
        taken = Refused("already_exists", f"The email {email} or its API key is already in use.")
        if user.api_key_hash == current_app.config["ADMIN_KEY_HASH"]:
            raise taken
        try:
            with transaction():
                db.session.add(user)
                db.session.flush()  # Which gives it its id.
                cash = {"cash_balance": cash, "starting_cash": cash}
                seen = {"actions_seen": CorporateAction.latest(), "acted_at": now(), "pin_changes": 0}
                account = Account(user_id=user.id, run=1, updated_at=now(), **seen, **cash)
                db.session.add(account)
                Stretch.begin(account)
        except IntegrityError as error:
            raise taken from error
        return user.id, api_key

    @classmethod
    def with_open_account(cls, said: str, **which) -> "User":
        """The one user of whom that is true; `Refused`, as `said`, where there is no such open account."""
        user = db.session.scalar(sa.select(cls).filter_by(**which, closed_at=None))
        if user is None:
            raise Refused("not_found", f"There is no open account {said}.")
        return user

    @classmethod
    def all(cls) -> Sequence[tuple["User", Decimal]]:
        """Every user with the cash in the account, in the order of their ids."""
        return db.session.execute(sa.select(cls, Account.cash_balance).join(Account).order_by(cls.id)).all()

    @classmethod
    def with_open_orders(cls) -> Sequence["User"]:
        """Those whose orders wait for a price."""
        waiting = sa.select(cls).join(Account).where(Account.settled_at.is_not(None), cls.closed_at.is_(None))
        return db.session.scalars(waiting.order_by(cls.id)).all()

    @classmethod
    def rotate_key(cls, user_id: int) -> str:
        """Give the user a new API key and answer it; the old one is refused from now on."""
        api_key = secrets.token_hex(32)
        with transaction(user_id):
            cls.locked(user_id).api_key_hash = cls.hash(api_key)
        return api_key

    @classmethod
    def close(cls, user_id: int) -> None:
        """Close the account: its key is refused from now on, its trades stay."""
        with transaction(user_id):
            user = cls.locked(user_id)
            user.closed_at = now()  # Once the trade under way is over.
            db.session.get(Account, user_id).settled_at = None
            for order in PlacedOrder.working(user_id):
                order.close("canceled", (), "The account was closed.")

    @classmethod
    def locked(cls, user_id: int) -> "User":
        """The user, at a moment when no trade of his is under way; `Refused` if there is no open account."""
        # The row alone: as an object of the session it would stand in the way of `Account.will_change`.
        if db.engine.dialect.name == "postgresql":
            db.session.execute(sa.text(TIME_LIMITS))
        db.session.execute(LOCK_ACCOUNT, {"user_id": user_id})
        return cls.with_open_account(f"with the id {user_id}", id=user_id)

    def to_dict(self, cash_balance: Decimal) -> UserAnswer:
        return told(UserAnswer, self, user_id=self.id, cash_balance=cash_balance)


# ---------------------------------------------------------------------------------------- Holdings


def too_much(sentence: str, limit: Decimal | int = ACCOUNT_LIMIT) -> Refused:
    return Refused("limit_exceeded", sentence, limit=limit)


class HoldingAnswer(TypedDict):
    """A holding at the market; `null` where that needs a price and there is none."""

    ticker: Symbol
    quantity: Shares
    available_quantity: Annotated[Shares, means("What no open order holds back")]
    average_price: Annotated[Price, means("Cost basis / quantity, in dollars")]
    cost_basis: Annotated[Dollars, means("What the holding cost, with commission, in dollars")]
    current_price: Annotated[Price | None, means("What the market asks now, in dollars")]
    market_value: Annotated[Dollars | None, means("What a sale would bring, in dollars")]
    unrealized_pnl: Annotated[Dollars | None, means("Its profit, in dollars")]
    unrealized_pnl_percent: Annotated[Percent | None, means("Its profit, in percent of the cost basis")]
    price_timestamp: Annotated[Time | None, means("When `current_price` was taken")]
    market_time: Annotated[Time | None, means("When its source itself last saw it")]
    stale: Annotated[bool | None, means("Whether it is too old to buy at")]


class Holding(db.Model):
    """So much of one ticker in one account, and what it cost. A holding of zero has no row."""

    __tablename__ = "ibkr_stock_balances"

    user_id: Mapped[UserId] = mapped_column(primary_key=True)
    ticker: Mapped[str] = mapped_column(sa.String(20), primary_key=True)
    quantity: Mapped[Quantity]
    cost_basis: Mapped[Amount]
    updated_at: Mapped[Moment]

    __table_args__ = (within("quantity", UNIT, ACCOUNT_LIMIT), within("cost_basis", 0, ACCOUNT_LIMIT))

    @classmethod
    def none(cls, user_id: int, ticker: str) -> "Holding":
        """What somebody holds who has none of `ticker`."""
        return cls(user_id=user_id, ticker=ticker, quantity=Decimal(0), cost_basis=Decimal(0))

    def add(self, quantity: Decimal, cost: Decimal) -> None:
        """Put `quantity` in, which cost `cost` dollars, commission included."""
        if max(self.quantity + quantity, self.cost_basis + cost) >= ACCOUNT_LIMIT:
            raise too_much(f"A holding stays below {ACCOUNT_LIMIT} shares and dollars of cost.")
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

    def to_dict(self, quote: "Quote | None", reserved: Decimal | None = None) -> HoldingAnswer:
        """Valued at `quote`, in dollars. Of `self` it needs no more than a row of the table has."""
        value = quote and value_of(self.quantity, quote.price)
        profit = quote and value - self.cost_basis
        return {
            "ticker": self.ticker,
            "quantity": self.quantity,
            "available_quantity": self.quantity - reserved if reserved else self.quantity,
            "average_price": rounded(self.cost_basis / self.quantity),
            "cost_basis": self.cost_basis,
            "current_price": quote and quote.price,
            "market_value": value,
            "unrealized_pnl": profit,
            "unrealized_pnl_percent": quote and percent(profit, self.cost_basis),
            "price_timestamp": quote and quote.timestamp,
            "market_time": quote and quote.market_time,
            "stale": quote and quote.stale,
        }


# ------------------------------------------------------------------------------------------ Trades


class TradeAnswer(TypedDict):
    """A trade as a bot sees it."""

    id: Annotated[str | None, means("The trade's number; `null` when rehearsed", examples=["42"])]
    user_id: UserNumber
    ticker: Symbol
    trade_type: TradeType
    quantity: Annotated[Shares, means("Shares or coins; of a split or dividend those it is for")]
    price: Annotated[Price | None, means("What it was booked at, in dollars; a dividend's for one share")]
    total_amount: Annotated[Dollars, means("Quantity x price, in dollars; what a split rounds off, in cash")]
    commission: Annotated[Dollars, means("What the broker took, in dollars")]
    realized_pnl: Annotated[Dollars | None, means("Its profit, in dollars; a purchase has none")]
    cash_balance: Annotated[Dollars, means("Cash after it, in dollars")]
    market_price: Annotated[Price | None, means("What the market asked, in dollars")]
    price_source: SourceOrAdmin
    timestamp: Annotated[Time, means("When it was booked")]
    market_time: Annotated[Time, means("The market's own time of the price that it was judged by")]
    run: RunNumber
    order_id: Annotated[str | None, means("The resting order that it filled, if it did")]
    ratio: Annotated[str | None, means("A split's: new shares for old ones", examples=["10:1"])]
    reason: Annotated[str | None, means("A correction's, in the admin's words")]
    dry_run: NotRequired[Annotated[bool, means("Only rehearsed")]]


class Trade(db.Model):
    """One purchase or sale, booked for ever: rows are added, never changed. So are a split, a dividend, and
    what an admin corrects.

    `price` is what the trade was booked at, `market_price` what the market asked at that moment; both
    in dollars. `realized_pnl` is the profit of a sale: total - commission - the cost of what was sold.
    `asked` is what its order said instead of a quantity (`all`, or `notional 1000`), and `order_id` the
    resting order that it filled, where there is one.

    A split (`ratio`) and a dividend (`price`, for one share) are for the `quantity` that was held before,
    and `total_amount` is the cash that they bring. A correction has no price: its `quantity` and
    `total_amount` are what it adds, or takes away. None of the three is of an order.
    """

    __tablename__ = "ibkr_trades"

    id: Mapped[Id]
    user_id: Mapped[UserId]
    run: Mapped[int]
    ticker: Mapped[str] = mapped_column(sa.String(20))
    trade_type: Mapped[str] = mapped_column(sa.String(10))
    order_type: Mapped[str | None] = mapped_column(sa.String(6))
    quantity: Mapped[Quantity]
    price: Mapped[Amount | None]
    total_amount: Mapped[Amount]
    commission: Mapped[Amount]
    realized_pnl: Mapped[Amount | None]
    cash_after: Mapped[Amount]
    market_price: Mapped[Amount | None]
    price_source: Mapped[str] = mapped_column(sa.String(20))
    idempotency_key: Mapped[str] = mapped_column(sa.String(255))
    asked: Mapped[str | None] = mapped_column(sa.String(40))
    order_id: Mapped[int | None] = mapped_column(BigInteger)
    ratio: Mapped[str | None] = mapped_column(sa.String(40))
    reason: Mapped[str | None] = mapped_column(sa.String(300))
    market_time: Mapped[Moment]
    created_at: Mapped[Moment]

    __table_args__ = (
        UniqueConstraint("user_id", "run", "idempotency_key"),
        Index(None, "user_id", "id"),
        CheckConstraint(
            "trade_type IN ('buy', 'sell', 'split', 'dividend', 'correction')", name="trade_type"
        ),
        CheckConstraint("order_type IN ('limit', 'market')", name="order_type"),
        CheckConstraint("(order_type IS NOT NULL) = (trade_type IN ('buy', 'sell'))", name="ordered"),
        CheckConstraint("(trade_type <> 'buy') = (realized_pnl IS NOT NULL)", name="realized_but_on_buy"),
        CheckConstraint(
            "(price IS NULL) = (trade_type = 'correction') "
            "AND (market_price IS NULL) = (trade_type = 'correction')",
            name="priced",
        ),
        CheckConstraint(
            "(ratio IS NOT NULL) = (trade_type = 'split') "
            "AND (reason IS NOT NULL) = (trade_type = 'correction')",
            name="explained",
        ),
        within("quantity", UNIT, ACCOUNT_LIMIT, signed_in="correction"),
        within("price", UNIT, ORDER_LIMIT),
        within("total_amount", 0, ACCOUNT_LIMIT, signed_in="correction"),
        within("commission", 0, ACCOUNT_LIMIT),
        within("realized_pnl", -ACCOUNT_LIMIT, ACCOUNT_LIMIT),
        within("cash_after", 0, ACCOUNT_LIMIT),
        within("market_price", UNIT, ORDER_LIMIT),
        {"sqlite_autoincrement": True},
    )

    def __str__(self) -> str:
        """For the log."""
        if self.trade_type not in ("buy", "sell"):
            what = f"{self.trade_type} {self.ratio}" if self.ratio else self.trade_type
            of = f"of {plain(self.quantity)} {self.ticker} and {plain(self.total_amount)} dollars"
            return f"trade {self.id}: user {self.user_id} {what} {of}"
        price = "the market" if self.order_type == "market" else f"{self.price.normalize():f}"
        what = f"{self.trade_type} {self.quantity.normalize():f} {self.ticker} at {price}"
        return f"trade {self.id}: user {self.user_id} {what}"

    def is_for(self, order, *_) -> bool:
        """Whether it came of `order`: the same in meaning, whatever its bytes were."""
        if isinstance(order, Correction):
            asked = (order.ticker, "correction", order.quantity, order.cash, order.reason)
            return asked == (self.ticker, self.trade_type, self.quantity, self.total_amount, self.reason)
        if not isinstance(order, Order):
            return False
        limit = self.price if self.order_type == "limit" else None
        size = self.asked or self.quantity
        asked = (order.ticker, order.action, order.asked or order.quantity, order.price)
        return asked == (self.ticker, self.trade_type, size, limit)

    @classmethod
    def of_action(
        cls, account: "Account", action: CorporateAction, quantity: Decimal, moment: datetime
    ) -> "Trade":
        """A split or a dividend for `quantity` shares."""
        trade = cls(
            user_id=account.user_id,
            run=account.run,
            ticker=action.ticker,
            trade_type=action.kind,
            quantity=quantity,
            commission=Decimal(0),
            market_price=action.price,
            price_source=action.source,
            market_time=action.ex_at,
            created_at=moment,
        )
        if action.kind == "split":
            trade.ratio, trade.price = ratio_text(action.ratio), action.price
            trade.total_amount = in_lieu(trade)
        else:
            trade.price, trade.total_amount = action.amount, value_of(quantity, action.amount)
        return trade

    def change(self: "Trade | sa.Row") -> Decimal:
        """By how much it changes its holding. A split's shares are rounded down to 8 decimals."""
        if self.trade_type == "split":
            return times(self.quantity, ratio_from(self.ratio), ROUND_FLOOR) - self.quantity
        signs = {"buy": 1, "sell": -1, "dividend": 0, "correction": 1}
        return self.quantity * signs[self.trade_type]

    def same_as(self, other: "Trade") -> bool:
        same = ("ticker", "trade_type", "ratio", "price", "total_amount", "market_price", "market_time")
        return all(getattr(self, name) == getattr(other, name) for name in same)

    @classmethod
    def latest_in(cls, ticker: str, account: "Account") -> "Trade | None":
        """The last trade in `ticker` of the account's run."""
        own = sa.select(cls).filter_by(user_id=account.user_id, run=account.run, ticker=ticker)
        return db.session.scalar(own.where(cls.market_price.is_not(None)).order_by(cls.id.desc()).limit(1))

    @classmethod
    def page(
        cls, user_id, *, ticker, action, since, until, run, cursor, limit, oldest_first=False
    ) -> Sequence["Trade"]:
        """The newest `limit` trades with an id below `cursor`, of one run, that pass the filters.

        With `oldest_first` the oldest ones, with an id above it. Paging by id neither skips nor repeats
        while others trade, and the last page costs no more than the first.
        """
        trades = sa.select(cls).where(cls.user_id == user_id, cls.run == run)
        if cursor:
            trades = trades.where(cls.id > cursor if oldest_first else cls.id < cursor)
        if ticker:
            trades = trades.where(cls.ticker == ticker)
        if action is not None:
            trades = trades.where(cls.trade_type.in_([action] if isinstance(action, str) else action))
        if since:
            trades = trades.where(cls.created_at >= since)
        if until:
            trades = trades.where(cls.created_at < until)
        order = cls.id if oldest_first else cls.id.desc()
        return db.session.scalars(trades.order_by(order).limit(limit)).all()

    def to_dict(self) -> TradeAnswer:
        numbers = {"id": self.id and str(self.id), "order_id": self.order_id and str(self.order_id)}
        return told(TradeAnswer, self, cash_balance=self.cash_after, timestamp=self.created_at, **numbers)


# ------------------------------------------------------------------------------------- The markets


class QuoteAnswer(TypedDict):
    """What one share or coin costs."""

    ticker: Symbol
    price: Price
    currency: Annotated[str | None, means("ISO code, as far as the source names one", examples=["USD"])]
    source: Source
    timestamp: Annotated[Time, means("When the price was taken")]
    valid_until: Annotated[Time | None, means("Until when trades are judged by this price")]
    market_time: Annotated[Time, means("When the source itself last saw this price")]
    stale: Annotated[bool, means("Whether it is too old to buy at; a holding can be sold at it")]


class PricesAnswer(TypedDict):
    """What several shares or coins cost."""

    prices: Annotated[list[QuoteAnswer], means("In the order in which they were asked for")]
    missing: Annotated[dict[str, str], means("The `code` of why not, by ticker")]


def bad_price(code: str, ticker: str, until: datetime) -> Refused:
    """Why a ticker has no price until that moment: what its sources say is none, or is too small."""
    if code == "unsupported_price":
        sentence = f"{ticker} costs less than {UNIT:f} dollars, the least that there is here."
        return Refused(code, sentence, ticker=ticker)
    seconds = max(1, ceil((until - now()).total_seconds()))
    return Refused(code, f"What the sources say of {ticker} is no price.", ticker=ticker, retry_after=seconds)


class Quote(db.Model):
    """What a source said that one share or coin costs, in `currency`, and until when that holds.

    A live quote that a server has answered is a row, so that all its processes judge trades by the same one,
    and so that the past can be valued later. `number` counts the quotes of a ticker. A quote of the sample
    market is no row and has no `number`: it follows from the clock, and holds for ever on a stopped one
    (`valid_until` is None). `market_time` is when the source itself last saw the price,
    the recorded bar say. `refusal` is the code of what buyers are told, where nothing is bought at it.
    """

    __tablename__ = "ibkr_quotes"

    ticker: Mapped[str] = mapped_column(sa.String(20), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    price: Mapped[Amount]
    currency: Mapped[str | None] = mapped_column(sa.String(10))
    source: Mapped[str] = mapped_column(sa.String(20))
    timestamp: Mapped[Moment]
    valid_until: Mapped[Moment]
    market_time: Mapped[Moment | None]
    refusal: Mapped[str | None] = mapped_column(sa.String(20))

    __table_args__ = (within("price", UNIT, ORDER_LIMIT),)

    actions = ()  # The splits and dividends that its source told with it.

    @property
    def stale(self) -> bool:
        return self.refusal is not None

    @classmethod
    def latest(cls, ticker: str) -> "Quote | None":
        """The latest quote of `ticker` that any process has published, whether it still holds or not."""
        found = read_only(LATEST_QUOTE, ticker=ticker)
        if not found:
            return None
        quote = cls(**found[0]._asdict())
        quote.market_time = quote.market_time or quote.timestamp  # Older versions did not write it down.
        return quote

    @classmethod
    def published(cls, tickers: Iterable[str], since: datetime, until: datetime) -> Sequence[sa.Row]:
        """The quotes of `tickers` in dollars from `since` to `until`, the oldest first."""
        chosen = cls.ticker.in_(tickers), cls.currency == "USD", cls.timestamp.between(since, until)
        quotes = sa.select(cls.ticker, cls.timestamp, cls.price).where(*chosen)
        return db.session.execute(quotes.order_by(cls.timestamp, cls.number)).all()

    @classmethod
    def latest_of_all(cls) -> Sequence["Quote"]:
        """The latest quote of every ticker that was ever priced."""
        latest = sa.select(cls.ticker, sa.func.max(cls.number)).group_by(cls.ticker)
        is_latest = sa.tuple_(cls.ticker, cls.number).in_(latest)
        return db.session.scalars(sa.select(cls).where(is_latest).order_by(cls.ticker)).all()

    @classmethod
    def after(cls, numbers: dict[str, int]) -> Sequence["Quote"]:
        """The quotes of each ticker that were published after the one of that number, the oldest first."""
        newer = [(cls.ticker == ticker) & (cls.number > number) for ticker, number in numbers.items()]
        quotes = sa.select(cls).where(sa.or_(sa.false(), *newer), cls.currency == "USD")
        return db.session.scalars(quotes.order_by(cls.timestamp, cls.ticker, cls.number)).all()

    @classmethod
    def was_published(cls, ticker: str, price: Decimal) -> bool:
        found = sa.select(cls.number).filter_by(ticker=ticker, price=price).limit(1)
        return db.session.scalar(found) is not None

    def once_more(self, refusal: str, valid_until: datetime) -> "Quote":
        """The same price for a while longer, at which nothing is bought."""
        same = ("ticker", "price", "currency", "source", "timestamp", "market_time")
        copied = {name: getattr(self, name) for name in same}
        return Quote(**copied, refusal=refusal, valid_until=valid_until)

    @classmethod
    def last_look(cls, ticker: str, source: str) -> datetime | None:
        """When that source priced `ticker` last."""
        latest = sa.select(sa.func.max(cls.timestamp))
        return db.session.scalar(latest.filter_by(ticker=ticker, source=source))

    def publish(self) -> bool:
        """Publish this quote to all processes, with the splits and dividends that came with it. False if
        another process was first, with the same `number` or that of a split or dividend.
        """
        try:
            with transaction():
                db.session.add(self)
                CorporateAction.publish(self.actions)
        except IntegrityError:
            return False
        return True

    def refused_to_buyers(self) -> Refused:
        """Why nothing is bought at this price, at which a holding can still be sold."""
        if self.refusal != "stale_price":
            return bad_price(self.refusal, self.ticker, self.valid_until)
        sentence = f"{self.ticker} was last priced at {iso(self.market_time)}; that is only good for selling."
        numbers = {"market_price": self.price, "market_time": self.market_time}
        return Refused("stale_price", sentence, ticker=self.ticker, **numbers)

    def to_dict(self) -> QuoteAnswer:
        return told(QuoteAnswer, self)


class MarketOfDatabase(db.Model):
    """Which market this database belongs to, `live` or `sample`: their prices never meet in one."""

    __tablename__ = "ibkr_market"
    __table_args__ = (CheckConstraint("id = 1", name="one_row"),)

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    kind: Mapped[str] = mapped_column(sa.String(6))

    @classmethod
    def claim(cls, kind: str) -> None:
        """Take the database for this market; `Refused` if it belongs to the other one."""
        owner = db.session.get(cls, 1)  # A standby can be read, though not written to.
        if owner is None:
            with suppress(IntegrityError), transaction():  # Another process may be faster.
                db.session.add(cls(id=1, kind=kind))
            owner = db.session.get(cls, 1)
        db.session.close()
        if owner.kind != kind:
            sentence = f"This database holds {owner.kind} prices and this server serves {kind} ones"
            raise Refused("price_unavailable", f"{sentence}; give each its own DATABASE_URL.")


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
    created_at: Mapped[Moment]

    @classmethod
    def in_force(cls, user_id: int) -> dict[str, Decimal]:
        """The prices that the user has pinned now, by ticker."""
        last = sa.select(sa.func.max(cls.id)).filter_by(user_id=user_id).group_by(cls.ticker)
        pins = sa.select(cls).where(cls.id.in_(last), cls.price.is_not(None)).order_by(cls.ticker)
        return {pin.ticker: pin.price for pin in db.session.scalars(pins)}


class Stretch(db.Model):
    """Recorded time that the clock of an account's sample market has passed, with the pins of one moment.

    A clock that an account moves on by itself has passed every bar from `first_bar` to `last_bar`. Both are
    NULL where it ran: from `begun_at` until the next stretch begins, or the run ends, by one bar a minute.
    A new stretch begins with the run, and whenever the clock jumps, is let run, or a pin changes; to
    advance makes the last one longer, so that a back-test of 10,000 bars is a row. What is written stays:
    a fall that was seen is not forgotten when the clock is turned back. On live prices nobody reads it.
    """

    __tablename__ = "ibkr_stretches"
    __table_args__ = (
        Index(None, "user_id", "run", "id"),
        CheckConstraint("(first_bar IS NULL) = (last_bar IS NULL)", name="both_or_none"),
        CheckConstraint("first_bar <= last_bar", name="in_order"),
        {"sqlite_autoincrement": True},
    )

    id: Mapped[Id]
    user_id: Mapped[UserId]
    run: Mapped[int]
    first_bar: Mapped[Moment | None]
    last_bar: Mapped[Moment | None]
    begun_at: Mapped[Moment]

    @classmethod
    def begin(cls, account: "Account") -> None:
        """Begin a stretch where the account's clock and pins are now."""
        here = account.market_clock
        own = {"user_id": account.user_id, "run": account.run}
        db.session.add(cls(**own, first_bar=here, last_bar=here, begun_at=now()))

    @classmethod
    def extend(cls, account: "Account") -> None:
        """Have the last stretch reach to where the account's clock is now.

        Where that cannot be, as the recorded file was changed for one of another time, a new one begins.
        """
        table, here = cls.__table__, account.market_clock
        last = sa.select(sa.func.max(cls.id)).filter_by(user_id=account.user_id, run=account.run)
        can_reach = (table.c.id == last.scalar_subquery()) & (table.c.first_bar <= here)
        if not db.session.execute(sa.update(table).where(can_reach).values(last_bar=here)).rowcount:
            cls.begin(account)


def in_lieu(split: Trade | sa.Row) -> Decimal:
    """The cash for what a split's shares are rounded down by, in dollars."""
    ratio = ratio_from(split.ratio)
    left = split.quantity * ratio.numerator - (split.quantity + Trade.change(split)) * ratio.denominator
    return rounded(left * split.price / ratio.denominator, ROUND_FLOOR)  # Divided last: thrice a third is 1.


Quoted = Quote | Refused
"""What a market answers: a price, or why there is none."""


class QuoteExpired(Exception):
    """The quote ran out while the request was under way."""


def unless_refused(quote: Quoted) -> Quote:
    if isinstance(quote, Refused):
        raise quote
    return quote


def usable(quote: Quoted, action: str) -> Quote:
    """The `quote`, if it judges an order of this `action` now.

    Raises `Refused`, or `QuoteExpired` when the market has moved on since the quote was taken.
    """
    quote = unless_refused(quote)
    if quote.valid_until and quote.valid_until <= now():
        raise QuoteExpired
    if quote.currency != "USD":
        its_own = quote.currency or "an unknown currency"
        sentence = f"{quote.ticker} is quoted in {its_own}; only tickers quoted in USD trade."
        raise Refused("unsupported_currency", sentence, currency=quote.currency)
    if quote.refusal and action == "buy":
        raise quote.refused_to_buyers()
    return quote


def need(code: str, what: str, required: Decimal, owned: Decimal, reserved: Decimal) -> None:
    """Raises `Refused` where what is owned, less what is reserved for open orders, is not enough."""
    if required > owned - reserved:
        held_back = f", {plain(reserved)} of it held back for open orders" if reserved else ""
        sentence = f"This {what} and you have {plain(owned)}{held_back}."
        raise Refused(code, sentence, required=required, available=owned - reserved)


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


# ------------------------------------------------------------------------------------- The account


class AdvanceAnswer(MarketAnswer):
    fills: Annotated[list[TradeAnswer], means("The trades on the way: of open orders, splits and dividends")]
    prices: NotRequired[Annotated[dict[str, Price], means("Of the tickers that were asked for")]]


class TradesAnswer(TypedDict):
    trades: list[TradeAnswer]
    next_cursor: Annotated[str | None, means("`cursor` of the next page; `null` on the last one")]


class Run(db.Model):
    """A run of an account that has ended: what it began with, and where it stood when it ended."""

    __tablename__ = "ibkr_runs"

    user_id: Mapped[UserId] = mapped_column(primary_key=True)
    run: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    starting_cash: Mapped[Amount]
    cash_balance: Mapped[Amount]
    market_time: Mapped[Moment]
    ended_at: Mapped[Moment]

    __table_args__ = (within("starting_cash", 0, ACCOUNT_LIMIT), within("cash_balance", 0, ACCOUNT_LIMIT))


class PortfolioAnswer(TypedDict):
    """An account at the market; totals are `null` where a price that they need is not to be had."""

    user_id: UserNumber
    cash_balance: Dollars
    holdings: list[HoldingAnswer]
    total_invested_value: Annotated[Dollars, means("What the holdings cost, in dollars")]
    market_value: Annotated[Dollars | None, means("What a sale of all would bring, in dollars")]
    equity: Annotated[Dollars | None, means("Cash and market value, in dollars")]
    unrealized_pnl: Annotated[Dollars | None, means("Profit of what is held, in dollars")]
    realized_pnl: Annotated[Dollars, means("Profit of what was sold, in dollars")]
    total_pnl: Annotated[Dollars | None, means("Realised and unrealised profit, in dollars")]


class Account(db.Model):
    """A user's cash, and the rules by which it changes. Where one refuses, the transaction is undone.

    `run` counts how often the account has started over; `starting_cash` is what this run began with.
    Of its sample market, `market_clock` is where the clock stands, if it was stopped, and `pin_changes` is
    how many rows it has in `ibkr_pins`: whether a pin has moved is seen without reading them. `settled_at` is
    NULL where it has no open orders; else, while its clock runs, until when these have seen the prices.
    Of splits and dividends, `actions_seen` is the number of the last published one that it has had, and
    `acted_at` until when it has had the recorded ones, while its clock runs.
    """

    __tablename__ = "ibkr_balances"

    user_id: Mapped[UserId] = mapped_column(primary_key=True)
    cash_balance: Mapped[Amount]
    starting_cash: Mapped[Amount]
    run: Mapped[int]
    updated_at: Mapped[Moment]
    market_clock: Mapped[Moment | None]
    pin_changes: Mapped[int] = mapped_column(server_default="0")
    settled_at: Mapped[Moment | None]
    actions_seen: Mapped[int] = mapped_column(server_default="0")
    acted_at: Mapped[Moment | None]

    __table_args__ = (within("cash_balance", 0, ACCOUNT_LIMIT), within("starting_cash", 0, ACCOUNT_LIMIT))

    # What it knows besides: its open and held orders, what was booked under a key before (both when locked),
    # the number of the last split or dividend that was published for anybody, and in `held` the holdings that
    # were read so far, by ticker.
    orders = ()
    earlier_trade = earlier_order = None
    knows_all_held = False
    latest_action = 0

    @property
    def reserved_cash(self) -> Decimal:
        """Dollars that are held back for open orders."""
        return sum((order.reserved_cash for order in self.orders), Decimal(0))

    @property
    def buying_power(self) -> Decimal:
        """Dollars that a purchase can cost."""
        return self.cash_balance - self.reserved_cash

    def reserved_shares(self, ticker: str, but: int | None = None) -> Decimal:
        """What open sales hold back of `ticker`, less those of one group.

        Of two that cancel each other only one can be filled: they are a group, and hold back once.
        """
        sales = [o for o in self.orders if (o.ticker, o.action, o.status) == (ticker, "sell", "open")]
        groups = {order.group: order.quantity for order in sales if order.group != but}
        return sum(groups.values(), Decimal(0))

    def fill(self, order: Order, quote: Quote | Refused, holding: Holding, costs: Costs = Costs()) -> Trade:
        """Decide `order` at the market's `quote`: change this account and `holding`, answer the trade.

        A limit order is booked at the price it names, a market order at the market's, slipped. Raises
        `Refused`, or `QuoteExpired` when the market has moved on since the quote was taken.
        """
        quote = usable(quote, order.action)
        price = order.price or costs.slipped(order.action, quote.price)
        quantity = self.quantity_of(order, price, holding)
        trade = self.exchange(order.action, quantity, price, quote, holding, costs)
        trade.order_type, trade.asked = "limit" if order.price else "market", order.asked
        return trade

    def exchange(
        self, action: str, quantity: Decimal, price: Decimal, quote: Quote, holding: Holding, costs: Costs
    ) -> Trade:
        """Buy or sell `quantity` at `price`, where the market asks what `quote` says."""
        if price >= ORDER_LIMIT:
            raise too_much(f"A price stays below {ORDER_LIMIT}.", ORDER_LIMIT)
        total = value_of(quantity, price, ROUND_CEILING if action == "buy" else ROUND_FLOOR)
        trade = Trade(
            user_id=self.user_id,
            run=self.run,
            ticker=quote.ticker,
            trade_type=action,
            quantity=quantity,
            price=price,
            total_amount=total,
            commission=costs.commission(total),
            market_price=quote.price,
            price_source=quote.source,
            market_time=quote.market_time,
            created_at=now(),
        )
        if action == "buy":
            self.buy(trade, holding)
        else:
            self.sell(trade, holding)
        trade.cash_after = self.cash_balance
        return trade

    def quantity_of(self, order: Sized, price: Decimal, holding: Holding) -> Decimal:
        """How much `order` trades at `price`: what it says, all that is free, or what its dollars come to."""
        quantity = order.quantity
        if order.notional:
            quantity = rounded(order.notional / price, ROUND_FLOOR)
        elif order.quantity == "all":
            quantity = holding.quantity - self.reserved_shares(order.ticker)
            if not quantity:
                sentence = f"You have no {order.ticker} to sell."
                raise Refused("insufficient_shares", sentence, available=quantity)
        if not UNIT <= quantity < ORDER_LIMIT:
            sentence = f"That comes to {plain(quantity)}; a quantity is above 0 and below {ORDER_LIMIT}."
            raise too_much(sentence, ORDER_LIMIT)
        return quantity

    def buy(self, trade: Trade, holding: Holding) -> None:
        """Pay for `trade` and put the shares into `holding`."""
        if trade.price < trade.market_price:
            sentence = f"You offer {plain(trade.price)} and {trade.ticker} costs {plain(trade.market_price)}."
            numbers = {"price": trade.price, "market_price": trade.market_price}
            raise Refused("price_below_market", sentence, **numbers)
        cost = trade.total_amount + trade.commission
        self.need_cash(cost)
        holding.add(trade.quantity, cost)
        self.cash_balance -= cost

    def sell(self, trade: Trade, holding: Holding) -> None:
        """Take the shares out of `holding` and put what `trade` brings into cash."""
        if trade.price > trade.market_price:
            sentence = f"You ask {plain(trade.price)} and {trade.ticker} brings {plain(trade.market_price)}."
            numbers = {"price": trade.price, "market_price": trade.market_price}
            raise Refused("price_above_market", sentence, **numbers)
        self.need_shares(trade.quantity, holding)
        proceeds = trade.total_amount - trade.commission
        if self.buying_power + proceeds < 0:
            raise Refused(
                "insufficient_funds",
                f"The commission of {plain(trade.commission)} is more than the {plain(trade.total_amount)} "
                f"that this brings and the {plain(self.buying_power)} that you have.",
                required=trade.commission,
                available=self.buying_power + trade.total_amount,
            )
        if max(trade.total_amount, self.cash_balance + proceeds) >= ACCOUNT_LIMIT:
            had = f"This brings {plain(proceeds)}, you have {plain(self.cash_balance)}"
            raise too_much(f"{had}, and cash stays below {ACCOUNT_LIMIT}.")
        cost = holding.cost_of(trade.quantity)
        if proceeds - cost < -ACCOUNT_LIMIT:
            raise too_much(f"A loss ends at {ACCOUNT_LIMIT}.")
        holding.remove(trade.quantity, cost)
        trade.realized_pnl = proceeds - cost
        self.cash_balance += proceeds

    def need_cash(self, cost: Decimal) -> None:
        """Raises `Refused` where it has less than `cost` dollars that are not held back."""
        need("insufficient_funds", f"costs {plain(cost)}", cost, self.cash_balance, self.reserved_cash)

    def need_shares(self, quantity: Decimal, holding: Holding, but: int | None = None) -> None:
        """Raises `Refused` where `holding` has less than `quantity` that no other group holds back."""
        what = f"sells {plain(quantity)} {holding.ticker}"
        reserved = self.reserved_shares(holding.ticker, but)
        need("insufficient_shares", what, quantity, holding.quantity, reserved)

    # Orders that rest.

    def place(
        self, wanted: NewOrder, quote: Quoted, costs: Costs, day: date, old: PlacedOrder | None = None, **own
    ) -> PlacedOrder:
        """Fill `wanted` at once where the market is there already, or let it rest; `Refused` if it cannot.

        Written are the order, its legs (the sales that hang on it), and the trade that fills it. A limit is
        filled at the market's price, which is the better one, a stop that the market has passed at the
        market's, slipped. `day` is the market's day, `old` the order in whose place it comes.
        """
        order, legs = self.write(wanted, usable(quote, wanted.action), costs, day, old, own)
        for candidate in (order, *legs):
            if candidate.status == "open" and order.status == "open":
                self.fill_at_once(candidate, quote, costs)
        for resting in (order, *legs[:1]):
            if resting.is_working:
                self.hold_back(resting, costs)
        if order.status == "open" and order.time_in_force in ("ioc", "fok"):
            order.close("canceled", self.orders, f"The market was at {plain(quote.price)}.")
        if sum(one.is_working for one in self.orders) > ORDERS_LIMIT:
            raise too_much(f"An account has at most {ORDERS_LIMIT} open and held orders.", ORDERS_LIMIT)
        # With others open, from what these have seen; else from its quote on, or on a stopped clock from now.
        self.are_settled(self.settled_at or (quote.timestamp if quote.valid_until else now()))
        return order

    def write(
        self, wanted: NewOrder, quote: Quote, costs: Costs, day: date, old: PlacedOrder | None, own: dict
    ) -> tuple[PlacedOrder, list[PlacedOrder]]:
        """Write `wanted` as an order, with its legs, or with those of the `old` one."""
        names = ("ticker", "action", "order_type", "time_in_force")
        names += ("limit_price", "stop_price", "trail_percent", "trail_amount")
        slipped = costs.slipped(wanted.action, quote.price)
        same = {"user_id": self.user_id, "run": self.run, "day": day, "quote_number": quote.number}
        same |= {"placed_at": now(), "market_time": quote.market_time, "is_triggered": False}
        same |= {"reserved_cash": Decimal(0), "commission": Decimal(0)}
        same |= {"quantity": self.quantity_of(wanted, slipped, self.holding(wanted.ticker))}
        order = PlacedOrder(**{name: getattr(wanted, name) for name in names}, **same, **own, status="open")
        if order.order_type == "trailing_stop":
            order.trail(quote.price)
            if not UNIT <= order.stop_price < ORDER_LIMIT:
                raise invalid([{"field": "body", "message": "the stop would be at no price"}])
        if order.order_type == "market" and (wrong := wanted.is_upside_down(quote.price)):
            raise invalid([{"field": "body", "message": wrong}])
        if old:
            order.replaces, order.parent_id, order.status = old.id, old.parent_id, old.status
            order.is_triggered = old.is_triggered and old.stop_price == order.stop_price
            legs = [one for one in self.orders if one.parent_id == old.id and one.is_working]
            old.close("replaced", ())
        else:
            same |= {"ticker": order.ticker, "action": "sell", "time_in_force": order.time_in_force}
            same |= {"status": "held" if order.action == "buy" else "open"}
            legs = [PlacedOrder(**same, **leg) for leg in wanted.legs]
        db.session.add(order)
        db.session.flush()  # Which gives it its id.
        for leg in legs:
            leg.parent_id, leg.quantity, leg.market_time = order.id, order.quantity, order.market_time
            db.session.add(leg)
        db.session.flush()
        self.orders = [*(one for one in self.orders if one not in legs), order, *legs]
        return order, legs

    def fill_at_once(self, order: PlacedOrder, quote: Quote, costs: Costs) -> None:
        """Fill an order that is being placed, if the market is there already, and for no other price."""
        price, passed = quote.price, Passed.at(quote.market_time, quote.price, quote.source)
        if order.order_type != "market" and order.due_price(passed) is None:
            return
        if not order.is_limit:
            if order.limit_price and order.is_jumped_over(price):
                order.is_triggered = True
                return
            price = order.within_limit(costs.slipped(order.action, price), order.limit_price)
        self.fill_placed(order, price, quote, costs)

    def fill_placed(
        self, order: PlacedOrder, price: Decimal, quote: Quote, costs: Costs, moment: datetime | None = None
    ) -> Trade:
        """Book the trade that fills `order`, out of what was held back for it, at `moment` or now."""
        orders, pair, holding = self.orders, order.pair_among(self.orders), self.holding(order.ticker)
        self.orders = [other for other in orders if other not in (order, pair)]
        try:
            trade = self.exchange(order.action, order.quantity, price, quote, holding, costs)
        finally:
            self.orders = orders
        trade.created_at = moment or trade.created_at
        trade.order_id, trade.order_type = order.id, "limit" if order.is_limit else "market"
        self.book(trade, holding, f"order {uuid4()}")
        order.trade_id, order.price = trade.id, price
        order.close("filled", orders, moment=moment)
        return trade

    def hold_back(self, order: PlacedOrder, costs: Costs) -> None:
        """Reserve what the fill of `order` may need, so that no fill ever fails for it.

        A purchase: what it costs at its worst price. A sale: its shares, and what the least commission may
        take beyond what it brings at its limit, or else its stop; two that cancel each other hold back once.
        """
        if order.action == "buy":
            total = value_of(order.quantity, order.limit, ROUND_CEILING)
            order.commission = costs.commission(total)
            self.need_cash(total + order.commission)
            order.reserved_cash = total + order.commission
            return
        if order.status == "open":
            self.need_shares(order.quantity, self.holding(order.ticker), order.group)
        sales = [o for o in self.orders if o.group == order.group and o.action == "sell" and o.is_working]
        most = Decimal(0)
        for sale in sales:
            brings = value_of(sale.quantity, sale.limit or sale.stop_price)
            most = max(most, costs.commission(brings) - brings)
            sale.commission = sale.reserved_cash = Decimal(0)
        self.need_cash(most)
        sales[0].commission = sales[0].reserved_cash = most

    def replace(
        self, order: PlacedOrder, changed: ChangedOrder, quote: Quoted, costs: Costs, day: date, **own
    ) -> PlacedOrder:
        """Put a new order in the place of `order`, different by `changed`."""
        if order.order_type == "trailing_stop":
            raise Refused("not_replaceable", "A trailing order is canceled and placed anew instead.")
        changes = changed.model_dump(exclude_none=True)
        if order.parent_id and "quantity" in changes:
            raise invalid([{"field": "quantity", "message": "follows that of the order that brought it"}])
        legs = [one for one in self.orders if one.parent_id == order.id and one.is_working]
        wanted = checked(NewOrder, order.as_asked(legs) | changes)
        if order.action == "sell":
            others = [o for o in self.orders if o is not order and o.group == order.group and o.is_working]
            sales = [o for o in (*others, wanted) if o.action == "sell"]
            gain = next((o.limit_price for o in sales if o.order_type == "limit"), None)
            loss = next((o.stop_price for o in sales if o.order_type != "limit"), None)
            entry = next((o.entry_price for o in others if o.action == "buy"), None)
            if wrong := upside_down(gain, loss, entry):
                raise invalid([{"field": "body", "message": wrong}])
        return self.place(wanted, quote, costs, day, old=order, **own)

    def cancel(self, *orders: PlacedOrder) -> None:
        """Close `orders`, and what hangs on them."""
        for order in orders:
            if order.is_working:
                order.close("canceled", self.orders)
        self.are_settled(self.settled_at)

    def settle(self, ticks: Iterable[Tick], day_of: DayOf, costs: Costs, moment: datetime) -> list[Trade]:
        """Show what has passed by `moment` to the working orders, and book what is due, splits and dividends
        too; answers the trades.

        All was held back, so a fill is refused only for a limit of the books, or a least commission above
        all the cash: then the order is canceled for that reason.
        """
        trades = []
        self.will_change()
        for tick, due in settle(self.orders, ticks, day_of):
            if isinstance(due, CorporateAction):
                trades += self.undergo(due, costs, tick.shown_at or moment)
                continue
            order, passed, market_price = due
            price = order.own_price
            if not order.is_limit:
                price = order.within_limit(costs.slipped(order.action, market_price), order.limit)
            seen = {"source": passed.source, "market_time": passed.market_time}
            quote = Quote(ticker=order.ticker, price=market_price, **seen)
            try:
                trades.append(self.fill_placed(order, price, quote, costs, tick.shown_at))
            except Refused as refusal:
                order.close("canceled", self.orders, refusal.detail, tick.shown_at)
        self.acted_at = moment
        self.are_settled(moment)
        return trades

    def are_settled(self, moment: datetime) -> None:
        """Write down until when its working orders have seen the prices, if there are any."""
        self.will_change()
        self.settled_at = moment if any(order.is_working for order in self.orders) else None

    # Splits, dividends and corrections.

    def undergo(self, action: CorporateAction, costs: Costs, moment: datetime) -> list[Trade]:
        """Book what a split or a dividend does to the holding, at `moment`, and to open orders.

        Answers the trade, if anything was held. What would come to a limit of the books is left away.
        """
        self.actions_seen = max(self.actions_seen, action.number or 0)
        holding, trades = self.holding(action.ticker), []
        if entitled := self.entitled(action, holding, moment):
            trade = Trade.of_action(self, action, entitled, moment)
            try:
                self.receive(trade, holding)
            except Refused as refusal:
                log.warning("user %s: %s is left away: %s", self.user_id, action, refusal.detail)
                return []
            self.book(trade, holding, f"{BY_ITSELF} {action.number or uuid4()}")
            trades.append(trade)
        if action.kind == "split":
            self.split_orders(action, costs)
        return trades

    def entitled(self, action: CorporateAction, holding: Holding, moment: datetime) -> Decimal:
        """The shares that a split or a dividend is for: those held before its `ex_at`.

        A recorded one comes when the account's clock does, at that `moment`, before anything is traded there;
        but where nothing was booked for a while (`CORPORATE_ACTIONS`) something may have been. A published
        one may be late: what was traded meanwhile was traded at prices without it. A late split is for as
        many shares as those have become by other splits since, and takes no more away than there are.
        """
        if action.number is None and self.updated_at < moment:
            return holding.quantity  # Nothing was booked since, as it mostly is.
        is_later = Trade.created_at >= moment if action.number is None else Trade.market_time >= action.ex_at
        own = sa.select(Trade).filter_by(user_id=self.user_id, run=self.run, ticker=action.ticker)
        since = db.session.scalars(own.where(is_later)).all()
        before = max(holding.quantity - sum(trade.change() for trade in since), Decimal(0))
        if action.kind == "dividend":
            return before
        later = prod(ratio_from(trade.ratio) for trade in since if trade.ratio)
        before = times(before, later, ROUND_FLOOR)
        return min(before, holding.quantity) if action.ratio < 1 else before

    def receive(self, trade: Trade, holding: Holding) -> None:
        """Take in what is neither bought nor sold: its shares, which cost nothing, and its cash.

        Its profit is that cash, less what shares cost that a correction takes away, or that are the last.
        """
        change, cash, taken = trade.change(), trade.total_amount, Decimal(0)
        if trade.trade_type == "correction":
            taken = max(-change, Decimal(0))
            self.need_shares(taken, holding)
            self.need_cash(-cash)
        left = holding.quantity + change
        if max(left, self.cash_balance + cash) >= ACCOUNT_LIMIT:
            raise too_much(f"A holding and cash stay below {ACCOUNT_LIMIT}.")
        cost = holding.cost_of(taken) if left else holding.cost_basis
        if cash - cost < -ACCOUNT_LIMIT:
            raise too_much(f"A loss ends at {ACCOUNT_LIMIT}.")
        holding.remove(-change, cost)
        trade.realized_pnl = cash - cost
        self.cash_balance += cash
        trade.cash_after = self.cash_balance

    def split_orders(self, action: CorporateAction, costs: Costs) -> None:
        """Have open orders ask for the same in new shares, and hold back anew what that may cost."""
        orders = [order for order in self.orders if order.is_working and order.ticker == action.ticker]
        split = f"A split of {ratio_text(action.ratio)}"
        # Where it comes late, what was placed meanwhile was meant in new shares.
        old = [order for order in orders if action.number is None or order.market_time < action.ex_at]
        for order in old:
            # What its pair has ended is split, too.
            if not order.split(action.ratio) and order.is_working:
                order.close("canceled", self.orders, f"{split} leaves no such order.")
        groups = {order.group for order in old}
        orders = [order for order in orders if order.is_working and order.group in groups]
        for order in orders:  # Of a group some may be new: exits are for as much as their entry.
            group = [other for other in orders if other.group == order.group]
            entry = [other for other in group if other.action == "buy"]
            order.quantity = next((o.quantity for o in entry or group if o in old), order.quantity)
        for order in orders:
            try:
                if order.is_working:
                    order.reserved_cash = Decimal(0)
                    self.hold_back(order, costs)
            except Refused as refusal:
                order.close("canceled", self.orders, refusal.detail)
        for order in reversed(self.orders):  # A late one may take shares that were promised since.
            if self.reserved_shares(action.ticker) <= self.holding(action.ticker).quantity:
                break
            if (order.ticker, order.action, order.status) == (action.ticker, "sell", "open"):
                order.close("canceled", self.orders, f"{split} has left too few shares.")

    def correct(self, wanted: Correction, market_time: datetime) -> Trade:
        """Change the account as an admin wants it, where neither the market nor a trade can."""
        holding = self.holding(wanted.ticker)
        trade = Trade(
            user_id=self.user_id,
            run=self.run,
            ticker=wanted.ticker,
            trade_type="correction",
            quantity=wanted.quantity,
            total_amount=wanted.cash,
            commission=Decimal(0),
            price_source="admin",
            reason=wanted.reason,
            market_time=market_time,
            created_at=now(),
        )
        self.receive(trade, holding)
        return trade

    # The database.

    @classmethod
    def with_key(cls, key_hash: str) -> "Account | None":
        """The account of whoever has this key, as it is now.

        The hash is looked up, so timing tells nothing of the key.
        """
        found = read_only(ACCOUNT_WITH_KEY, key_hash=key_hash)
        return cls(**found[0]._asdict()) if found else None

    @classmethod
    def locked(cls, user_id: int, key_hash: str, ticker: str = "", order_key: str = "") -> "Account":
        """The account, locked until the transaction ends: whatever changes one begins here.

        The account's row is locked first and all is read after that, so whoever comes second waits and then
        sees what the first one did; a join in the locking statement would still see the holding as it was
        before the wait. What else a trade needs is read along: what it holds of `ticker`, and the numbers of
        the trade and of the order that came under `order_key` in this run. `Refused` if the API key is no
        longer the one with this hash. The account is not the session's: see `will_change`.
        """
        own = {"user_id": user_id, "key_hash": key_hash, "ticker": ticker, "order_key": order_key}
        is_locked = db.engine.dialect.name == "sqlite"  # All of it, by BEGIN IMMEDIATE.
        lock = [] if is_locked else [TIME_LIMITS, LOCK_ACCOUNT]
        found = send(db.session.connection().connection, *lock, LOCKED_ACCOUNT, **own)
        if not found:
            raise unauthorized()
        columns = found[0]._asdict()
        held = {name: columns.pop(name) or Decimal(0) for name in ("quantity", "cost_basis")}
        account = cls(**columns)
        account.held = {ticker: Holding(user_id=user_id, ticker=ticker, **held)}
        account.orders = PlacedOrder.working(user_id) if account.settled_at else []
        return account

    def holding(self, ticker: str) -> Holding:
        """What this locked account has of `ticker`, always as the same object. `locked` has read one; the
        first question for another reads all the rest in one statement.
        """
        if ticker not in self.held and not self.knows_all_held:
            own = sa.select(Holding.ticker, Holding.quantity, Holding.cost_basis)
            for row in db.session.execute(own.filter_by(user_id=self.user_id)):
                self.held.setdefault(row.ticker, Holding(user_id=self.user_id, **row._asdict()))
            self.knows_all_held = True
        if ticker not in self.held:
            self.held[ticker] = Holding.none(self.user_id, ticker)
        return self.held[ticker]

    @classmethod
    def with_orders(cls, user_id: int) -> "Account":
        """The account and its working orders, of one moment, unlocked."""
        is_working = (PlacedOrder.user_id == cls.user_id) & PlacedOrder.closed_at.is_(None)
        both = sa.select(cls, PlacedOrder).outerjoin(PlacedOrder, is_working)
        rows = db.session.execute(both.where(cls.user_id == user_id).order_by(PlacedOrder.id)).all()
        account = rows[0][0]
        account.orders = [order for _, order in rows if order]
        return account

    def book(self, trade: Trade, holding: Holding, order_key: str) -> None:
        """Write the cash, the holding and the trade, and give the trade its id.

        The objects are not added to the session: `send` writes them, by the names of their columns, and
        `transaction` commits at its end. The cash is the trade's `cash_after`, the time its `created_at`.
        """
        trade.idempotency_key = order_key
        if not holding.quantity:
            write_holding = DELETE_HOLDING
        elif holding.quantity == trade.change():
            write_holding = INSERT_HOLDING  # There was none before.
        else:
            write_holding = UPDATE_HOLDING
        values = dict.fromkeys(TRADE_COLUMNS) | vars(trade)  # What was not set is NULL, as in a session.
        values |= {"held": holding.quantity, "cost_basis": holding.cost_basis}
        writes = [UPDATE_CASH, write_holding, INSERT_TRADE]
        trade.id = send(db.session.connection().connection, *writes, **values)[0].id

    @classmethod
    def with_holdings(cls, user_id: int, key_hash: str) -> tuple["Account", list[sa.Row]]:
        """The account and its holdings by ticker, of one moment, unlocked: one statement reads both, if no
        order is open. That takes less than half as long.

        A mapped object for each of a thousand holdings would take six times as long as its row does.
        `Refused` if the account's API key is no longer the one with this hash.
        """
        found = read_only(ACCOUNT_WITH_HOLDINGS, user_id=user_id, key_hash=key_hash)
        if not found:
            raise unauthorized()
        own, *holdings = found
        account = cls(**{column.name: getattr(own, column.name) for column in ACCOUNT})
        if account.settled_at:
            with snapshot():
                account = cls.with_orders(user_id)
                held = sa.select(*HOLDING).filter_by(user_id=user_id).order_by("ticker")
                holdings = db.session.execute(held).all()
        return account, holdings

    def portfolio(self, holdings: Sequence, quotes: dict[str, Quote]) -> PortfolioAnswer:
        """The account valued at `quotes`: dollars, profit and loss, and percentages of the cost.

        The realised profit follows from the books' equation, and so needs no look at the trades. A
        holding is worth what selling it would bring.
        """
        quotes = {ticker: quote for ticker, quote in quotes.items() if quote.currency == "USD"}
        reserved = {order.ticker: self.reserved_shares(order.ticker) for order in self.orders}
        rows = [Holding.to_dict(h, quotes.get(h.ticker), reserved.get(h.ticker)) for h in holdings]
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

    def will_change(self) -> None:
        """Have the session write what is changed of it from here on, as if it had read it."""
        if self not in db.session:
            make_transient_to_detached(self)
            db.session.add(self)

    def start_over(self, cash: Decimal, market_time: datetime) -> None:
        """End this run and begin the next with `cash` dollars and no holdings. The trades stay."""
        ended = {"starting_cash": self.starting_cash, "cash_balance": self.cash_balance, "ended_at": now()}
        db.session.add(Run(user_id=self.user_id, run=self.run, market_time=market_time, **ended))
        db.session.execute(sa.delete(Holding).filter_by(user_id=self.user_id))
        self.cancel(*self.orders)
        self.run += 1
        self.cash_balance = self.starting_cash = cash
        Stretch.begin(self)

    def stop_clock(self, bar: datetime | None) -> None:
        """Stop the clock of this account's sample market at `bar`, or let it run again."""
        self.will_change()
        self.market_clock = bar
        Stretch.begin(self)

    def advance(self, bar: datetime) -> None:
        """Move this account's stopped clock on to `bar`, past all that are between."""
        self.will_change()
        self.market_clock = bar
        Stretch.extend(self)

    def pin(self, ticker: str, price: Decimal | None) -> None:
        """Fix `ticker` at `price` dollars on this account's sample market, or let it go."""
        db.session.add(Pin(user_id=self.user_id, ticker=ticker, price=price, created_at=now()))
        self.will_change()
        self.pin_changes += 1
        Stretch.begin(self)

    @property
    def pins(self) -> dict[str, Decimal]:
        """The prices that are pinned on its sample market now, by ticker."""
        return Pin.in_force(self.user_id) if self.pin_changes else {}


# ---------------------------------------------------------------------- What every request pays for
# The statements that find a key, and lock, read and book for a trade, in SQLAlchemy's words. Below them is
# how they are sent, a shorter way than a session's: sent one by one by SQLAlchemy's `execute`, trades come at
# about half the speed. Who skips that misses nothing but speed, and how a driver's errors become
# SQLAlchemy's.

HAS_THE_KEY = (User.api_key_hash == bindparam("key_hash")) & User.closed_at.is_(None)
OWN_ACCOUNT = Account.user_id == bindparam("user_id")
OWN_HOLDING = (Holding.user_id == bindparam("user_id")) & (Holding.ticker == bindparam("ticker"))
TRADE_UNDER_KEY, ORDER_UNDER_KEY = (
    (booked.user_id == bindparam("user_id"))
    & (booked.run == Account.run)
    & (booked.idempotency_key == bindparam("order_key"))
    for booked in (Trade, PlacedOrder)
)
ACCOUNT, TRADE_COLUMNS = Account.__table__.columns, Trade.__table__.columns.keys()

LATEST_OR_0 = sa.func.coalesce(sa.func.max(CorporateAction.number), sa.literal_column("0"))
LATEST_ACTION = sa.select(LATEST_OR_0).scalar_subquery().label("latest_action")

ACCOUNT_WITH_KEY = sa.select(*ACCOUNT, LATEST_ACTION).join(User).where(HAS_THE_KEY)
LOCK_ACCOUNT = sa.select(Account.user_id).where(OWN_ACCOUNT).with_for_update()
LOCKED_ACCOUNT = (
    sa.select(*ACCOUNT, Holding.quantity, Holding.cost_basis)
    .add_columns(Trade.id.label("earlier_trade"), PlacedOrder.id.label("earlier_order"), LATEST_ACTION)
    .join_from(Account, User)
    .outerjoin(Holding, OWN_HOLDING)
    .outerjoin(Trade, TRADE_UNDER_KEY)
    .outerjoin(PlacedOrder, ORDER_UNDER_KEY)
    .where(OWN_ACCOUNT, HAS_THE_KEY)
)
HELD = {"quantity": bindparam("held"), "cost_basis": bindparam("cost_basis")}
HELD |= {"updated_at": bindparam("created_at")}
CASH = {"cash_balance": bindparam("cash_after"), "updated_at": bindparam("created_at")}
UPDATE_CASH = sa.update(Account).where(OWN_ACCOUNT).values(CASH)
INSERT_HOLDING = sa.insert(Holding).values(user_id=bindparam("user_id"), ticker=bindparam("ticker"), **HELD)
UPDATE_HOLDING = sa.update(Holding).where(OWN_HOLDING).values(HELD)
DELETE_HOLDING = sa.delete(Holding).where(OWN_HOLDING)
WITHOUT_ID = {name: bindparam(name) for name in TRADE_COLUMNS if name != "id"}
INSERT_TRADE = sa.insert(Trade).values(WITHOUT_ID).returning(Trade.id)
# The account is the first row, which is of no holding; in those of the holdings it has no columns.
HOLDING = [Holding.ticker, Holding.quantity, Holding.cost_basis]
ACCOUNT_WITH_HOLDINGS = sa.union_all(
    sa.select(*(sa.type_coerce(sa.null(), column.type).label(column.name) for column in HOLDING), *ACCOUNT)
    .join_from(Account, User)
    .where(OWN_ACCOUNT, HAS_THE_KEY),
    sa.select(*HOLDING, *(sa.null() for _ in ACCOUNT))
    .join(User, User.id == Holding.user_id)
    .where(Holding.user_id == bindparam("user_id"), HAS_THE_KEY),
).order_by(sa.nulls_first(sa.column("ticker")))
OF_TICKER = Quote.ticker == bindparam("ticker")
LATEST_NUMBER = sa.select(sa.func.max(Quote.number)).where(OF_TICKER).scalar_subquery()
LATEST_QUOTE = sa.select(Quote.__table__).where(OF_TICKER, Quote.number == LATEST_NUMBER)


def read_only(statement, **values) -> list[tuple]:
    """The rows of one statement, which is a transaction by itself and so needs no BEGIN and no COMMIT."""
    engine = db.engine
    try:
        connection = engine.raw_connection()
    except engine.dialect.dbapi.Error as error:
        raise as_sqlalchemy_has_it(error) from error
    begins = engine.dialect.name == "postgresql"
    try:
        if begins:  # As psycopg2 does by itself, and a connection of SQLite does not.
            connection.driver_connection.autocommit = True
        return send(connection, statement, **values)
    except engine.dialect.dbapi.Error as error:  # It was closed while it waited in the pool.
        raise as_sqlalchemy_has_it(error, connection) from error
    finally:
        if begins and connection.is_valid:
            try:
                connection.driver_connection.autocommit = False
            except engine.dialect.dbapi.Error:  # Lost since: the answer is there, and counts.
                connection.invalidate()
        connection.close()


def send(connection: PoolProxiedConnection, *statements, **values) -> list[tuple]:
    """Execute `statements` one after the other with these `values`; answers the last one's rows.

    PostgreSQL gets all of them in one message: on a busy account it is the messages to and fro that the next
    trade waits for.
    """
    dialect = db.engine.dialect
    script = [written(statement, dialect) for statement in statements]
    try:
        cursor = connection.cursor()
        if dialect.name == "sqlite":
            for statement in script:
                own = {n: write(values[n]) for n, write in statement.writers}
                cursor.execute(statement.sql, values | own)
        elif Written.can_prepare:
            known = connection.info.setdefault("prepared", {None})  # None: what needs no PREPARE.
            if new := {statement.prepare for statement in script} - known:
                cursor.execute("; ".join(new))
                known |= new
            cursor.execute("; ".join([statement.call for statement in script]), values)
        else:
            cursor.execute("; ".join([statement.sql for statement in script]), values)
        rows = cursor.fetchall() if cursor.description else []
        for place, read in script[-1].readers:
            rows = [(*row[:place], read(row[place]), *row[place + 1 :]) for row in rows]
        return list(map(script[-1].row._make, rows))
    except dialect.dbapi.Error as error:
        Written.can_prepare &= getattr(error, "pgcode", None) not in (NO_SUCH_NAME, NAME_IS_TAKEN)
        raise as_sqlalchemy_has_it(error, connection) from error


class Written:
    """A statement in the words of one database; to write it takes longer than the database's answer.

    SQLite has no exact decimals and no time zones: the types of the columns convert them. PostgreSQL is told
    of a statement once a connection, by PREPARE, and it is then called by name: each text that it gets it
    plans anew, which is most of its work on a trade. A pooler that lends another connection for each
    transaction makes that impossible: there the name may be unknown, or taken already. When that is seen,
    all is sent as text from then on.
    """

    can_prepare = True

    def __init__(self, statement, dialect: sa.Dialect):
        if isinstance(statement, str):  # Such as TIME_LIMITS, which have no plan.
            self.sql, self.prepare, self.call = statement, None, statement
            return
        style = "named" if dialect.name == "sqlite" else "pyformat"
        compiled = statement.compile(dialect=type(dialect)(paramstyle=style))
        numbered = statement.compile(dialect=type(dialect)(paramstyle="numeric_dollar"))
        self.sql, columns = str(compiled), statement.exported_columns
        name = "s" + hashlib.sha256(self.sql.encode()).hexdigest()[:16]
        self.prepare = f"PREPARE {name} AS {numbered}"
        self.call = f"EXECUTE {name}({', '.join(f'%({value})s' for value in numbered.positiontup)})"
        self.row = namedtuple("Row", columns.keys())
        self.readers, self.writers = [], []
        if dialect.name == "sqlite":
            kinds = [column.type.dialect_impl(dialect) for column in columns]
            reads = [kind.result_processor(dialect, None) for kind in kinds]
            self.readers = [(place, read) for place, read in enumerate(reads) if read]
            kinds = {n: bind.type.dialect_impl(dialect) for n, bind in compiled.binds.items()}
            writes = {n: kind.bind_processor(dialect) for n, kind in kinds.items()}
            self.writers = [(n, write) for n, write in writes.items() if write]


written = cache(Written)
