"""Orders that rest: what they are, when a price makes one due, and what becomes of those that hang on it.

`settle` is all there is to waiting. It takes the open orders of an account and the prices since it was last
looked at, and answers what is filled; it has no thread, no clock and no database, and knows nothing of where
the prices come from. So the books are the same whoever looks and whenever. What a fill does to cash and
holdings is `Account.settle` in models.py; `Account.place` decides what is filled at once.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import date, datetime
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from fractions import Fraction
from typing import Annotated, Literal, NamedTuple

import sqlalchemy as sa
from pydantic import BaseModel
from sqlalchemy import CheckConstraint, ForeignKey, Index, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column
from typing_extensions import TypedDict

from corporate import CorporateAction, times
from database import Amount, Id, Moment, Quantity, UserId, db, within
from messages import (
    ACCOUNT_LIMIT,
    HUNDRED,
    ORDER_LIMIT,
    UNIT,
    Action,
    Dollars,
    OrderType,
    Percent,
    Price,
    Refused,
    RunNumber,
    Shares,
    Symbol,
    Time,
    TimeInForce,
    means,
    now,
    plain,
    rounded,
    told,
    value_of,
)

ORDERS_LIMIT = 500
"""So many orders of an account can be open or held."""

STOP_CAP = Decimal("1.04")
"""A stop that buys pays at the most this much above its stop, so that what it holds back is always enough."""


WORKING = sa.text("closed_at IS NULL")


class Passed(NamedTuple):
    """What one ticker cost in one moment of the market, in dollars; of a single price all three are the same.

    `number` is that of the quote it comes from, on the live market. Nothing is bought at a price that its
    source saw too long ago (`only_for_sales`).
    """

    market_time: datetime
    open: Decimal
    high: Decimal
    low: Decimal
    source: str
    number: int | None = None
    only_for_sales: bool = False

    @classmethod
    def at(cls, market_time: datetime, price: Decimal, source: str, *more) -> "Passed":
        """One price alone."""
        return cls(market_time, price, price, price, source, *more)


class Tick(NamedTuple):
    """A moment of the market: the splits and dividends in force from then on, which come first, and what each
    ticker cost that had a price in it. `shown_at` is when a running clock showed it, if not now."""

    moment: datetime
    prices: dict[str, Passed]
    actions: Sequence[CorporateAction] = ()
    shown_at: datetime | None = None


class Due(NamedTuple):
    """An order that is due and can be filled, with the price that makes it due, in dollars."""

    order: "PlacedOrder"
    passed: Passed
    market_price: Decimal


class OrderAnswer(TypedDict):
    """An order as a bot sees it; what its type has not is `null`."""

    id: Annotated[str, means("The order's number", examples=["7"])]
    ticker: Symbol
    action: Action
    order_type: OrderType
    quantity: Shares
    limit_price: Annotated[Price | None, means("The most to pay or the least to take, in dollars")]
    stop_price: Annotated[Price | None, means("The price that wakes it, in dollars; a trailing one moves")]
    trail_percent: Annotated[Percent | None, means("How far the stop trails, in percent")]
    trail_amount: Annotated[Price | None, means("How far the stop trails, in dollars")]
    time_in_force: TimeInForce
    status: Literal["open", "held", "filled", "canceled", "expired", "replaced"]
    reason: Annotated[str | None, means("Why it was canceled, in a sentence")]
    reserved_cash: Annotated[Dollars, means("What is held back for it, in dollars")]
    placed_at: Time
    market_time: Annotated[Time, means("The market's own time when it was placed")]
    closed_at: Time | None
    trade_id: Annotated[str | None, means("The trade that filled it")]
    price: Annotated[Price | None, means("What it was filled at, in dollars")]
    parent_id: Annotated[str | None, means("The order that brought it")]
    replaces: Annotated[str | None, means("The order in whose place it is")]
    run: RunNumber


class OrdersAnswer(TypedDict):
    orders: list[OrderAnswer]
    next_cursor: Annotated[str | None, means("`cursor` of the next page; `null` on the last one")]


class CanceledAnswer(TypedDict):
    canceled: list[OrderAnswer]


class PlacedOrder(db.Model):
    """An order that may wait, in one state at any time: open or held, and then closed for ever.

    One that a purchase brings (`parent_id`) is held until that is filled. `stop_price` of a trailing order
    is where its stop is by now. `is_triggered` says that the market has jumped over both its stop and its
    limit, and so that it waits like a limit order. `day` is the market's day on which it was placed,
    `quote_number` the last live quote that it has seen, `commission` the part of `reserved_cash` that is for
    the broker, and `asked` what its client sent, hashed.
    """

    __tablename__ = "ibkr_orders"

    id: Mapped[Id]
    user_id: Mapped[UserId]
    run: Mapped[int]
    ticker: Mapped[str] = mapped_column(sa.String(20))
    action: Mapped[str] = mapped_column(sa.String(4))
    order_type: Mapped[str] = mapped_column(sa.String(13))
    quantity: Mapped[Quantity]
    limit_price: Mapped[Amount | None]
    stop_price: Mapped[Amount | None]
    trail_percent: Mapped[Amount | None]
    trail_amount: Mapped[Amount | None]
    is_triggered: Mapped[bool]
    time_in_force: Mapped[str] = mapped_column(sa.String(3))
    day: Mapped[date]
    status: Mapped[str] = mapped_column(sa.String(8))
    reason: Mapped[str | None] = mapped_column(sa.String(300))
    reserved_cash: Mapped[Amount]
    commission: Mapped[Amount]
    parent_id: Mapped[int | None] = mapped_column(ForeignKey("ibkr_orders.id"))
    replaces: Mapped[int | None] = mapped_column(ForeignKey("ibkr_orders.id"))
    idempotency_key: Mapped[str | None] = mapped_column(sa.String(255))
    asked: Mapped[str | None] = mapped_column(sa.String(64))
    quote_number: Mapped[int | None]
    placed_at: Mapped[Moment]
    market_time: Mapped[Moment]
    closed_at: Mapped[Moment | None]
    trade_id: Mapped[int | None] = mapped_column(ForeignKey("ibkr_trades.id"))
    price: Mapped[Amount | None]

    __table_args__ = (
        UniqueConstraint("user_id", "run", "idempotency_key"),
        UniqueConstraint("trade_id"),
        Index(None, "user_id", "id"),
        Index("ix_ibkr_orders_working", "user_id", "id", postgresql_where=WORKING, sqlite_where=WORKING),
        CheckConstraint("action IN ('buy', 'sell')", name="action"),
        CheckConstraint(
            "order_type IN ('market', 'limit', 'stop', 'stop_limit', 'trailing_stop')", name="order_type"
        ),
        CheckConstraint("time_in_force IN ('gtc', 'day', 'ioc', 'fok')", name="time_in_force"),
        CheckConstraint(
            "status IN ('open', 'held', 'filled', 'canceled', 'expired', 'replaced')", name="status"
        ),
        CheckConstraint(
            "(status IN ('open', 'held')) = (closed_at IS NULL) "
            "AND (status = 'filled') = (trade_id IS NOT NULL) AND (status = 'filled') = (price IS NOT NULL)",
            name="one_state",
        ),
        CheckConstraint("closed_at IS NULL OR reserved_cash = 0", name="closed_holds_nothing"),
        within("quantity", UNIT, ORDER_LIMIT),
        within("limit_price", UNIT, ORDER_LIMIT),
        within("stop_price", UNIT, ORDER_LIMIT),
        within("trail_percent", UNIT, HUNDRED),
        within("trail_amount", UNIT, ORDER_LIMIT),
        within("reserved_cash", 0, ACCOUNT_LIMIT),
        within("commission", 0, ACCOUNT_LIMIT),
        within("price", UNIT, ORDER_LIMIT),
        {"sqlite_autoincrement": True},
    )

    def __str__(self) -> str:
        """For the log."""
        what = f"{self.action} {plain(self.quantity)} {self.ticker} {self.order_type}"
        return f"order {self.id}: user {self.user_id} {what} is {self.status}"

    @property
    def created_at(self) -> datetime:
        """As a trade has it."""
        return self.placed_at

    def is_for(self, *asked) -> bool:
        """Whether it came of what is asked: the same in meaning, whatever its bytes were."""
        return self.asked == fingerprint(*asked)

    # When a price makes it due.

    @property
    def is_working(self) -> bool:
        """Whether it is not closed."""
        return self.status in ("open", "held")

    @property
    def is_limit(self) -> bool:
        return self.order_type == "limit" or self.is_triggered

    @property
    def trails(self) -> bool:
        return self.order_type == "trailing_stop" and not self.is_triggered

    @property
    def sign(self) -> int:
        return 1 if self.action == "buy" else -1

    @property
    def limit(self) -> Decimal | None:
        """The worst price that it takes: its own limit, or for a stop that buys a cap that is not shown."""
        if self.limit_price is None and self.action == "buy":
            return rounded(self.stop_price * STOP_CAP)
        return self.limit_price

    @property
    def entry_price(self) -> Decimal | None:
        """At about what a purchase that waits will be filled, if it says so: its exits lie around that."""
        return self.limit_price or (self.stop_price if self.order_type == "stop" else None)

    @property
    def own_price(self) -> Decimal:
        """The price that it waits for."""
        return self.limit if self.is_limit else self.stop_price

    @property
    def waits_for_a_fall(self) -> bool:
        return self.is_limit == (self.action == "buy")

    def within_limit(self, price: Decimal, limit: Decimal | None) -> Decimal:
        """A `price` that was slipped, but not beyond the limit."""
        if limit is None:
            return price
        return min(price, limit) if self.action == "buy" else max(price, limit)

    def is_due_at_open(self, passed: Passed) -> bool:
        price = self.own_price
        return passed.open <= price if self.waits_for_a_fall else passed.open >= price

    def due_price(self, passed: Passed) -> Decimal | None:
        """What the market asks when it makes the order due: at the open, or else the order's own price."""
        price = self.own_price
        if passed.low > price if self.waits_for_a_fall else passed.high < price:
            return None
        return passed.open if self.is_due_at_open(passed) else price

    def is_jumped_over(self, market_price: Decimal) -> bool:
        """Whether a stop that is due is worse than its limit: it cannot be filled, and waits for that."""
        if self.is_limit or self.limit is None:
            return False
        return market_price > self.limit if self.action == "buy" else market_price < self.limit

    def can_fill(self, passed: Passed) -> bool:
        market_price = self.due_price(passed)
        return market_price is not None and not self.is_jumped_over(market_price)

    def goes_before(self, pair: "PlacedOrder", passed: Passed) -> bool:
        """Which of two orders that cancel each other is filled, where both could be: the one that the open
        makes due, or else the worse, which is the stop."""
        at_open, pair_at_open = self.is_due_at_open(passed), pair.is_due_at_open(passed)
        return self.order_type != "limit" if at_open == pair_at_open else at_open

    def trail(self, price: Decimal) -> None:
        """Move the stop of a trailing order after the best `price` of a bar, never back."""
        far = self.trail_amount or price * self.trail_percent / HUNDRED
        stop = rounded(price + far if self.action == "buy" else price - far)
        better = min if self.action == "buy" else max
        self.stop_price = stop if self.stop_price is None else better(self.stop_price, stop)

    def split(self, ratio: Fraction) -> bool:
        """Be for so many more shares, at prices so much lower; False, and as it was, if no order can be like
        that."""
        changed = {"quantity": times(self.quantity, ratio, ROUND_FLOOR)}
        for name in ("limit_price", "stop_price", "trail_amount"):
            if price := getattr(self, name):
                changed[name] = times(price, 1 / ratio)
        is_possible = all(UNIT <= amount < ORDER_LIMIT for amount in changed.values())
        for name, amount in changed.items() if is_possible else ():
            setattr(self, name, amount)
        return is_possible

    # What the audit asks.

    def is_filled_by(self, trade) -> bool:
        """Whether a trade is what fills it: due at the market's price there, and at the price it promises."""
        own = (self.id, self.run, self.ticker, self.action, self.quantity, self.price)
        if own != (trade.order_id, trade.run, trade.ticker, trade.trade_type, trade.quantity, trade.price):
            return False
        if self.limit_price is not None and self.sign * (trade.price - self.limit_price) > 0:
            return False
        if self.order_type == "market":
            return True
        beyond = self.sign * (trade.market_price - self.own_price)
        if self.is_limit:
            return beyond <= 0 and trade.price in (self.limit, trade.market_price)
        return beyond >= 0

    def holds_back_what_it_must(self) -> bool:
        """What a purchase may cost; of a trailing one, whose stop has moved since, at least that."""
        if self.action == "sell":
            return self.reserved_cash <= self.commission
        needed = value_of(self.quantity, self.limit, ROUND_CEILING) + self.commission
        moved = self.order_type == "trailing_stop"
        return self.reserved_cash >= needed if moved else self.reserved_cash == needed

    # What hangs on what.

    @property
    def group(self) -> int:
        """An order and its legs have the same."""
        return self.parent_id or self.id

    def close(self, status: str, orders: Iterable["PlacedOrder"], reason=None, moment=None) -> None:
        """End it at `moment`, or now, for a `reason`, and with it what hangs on it among `orders`.

        The legs of a purchase go live when it is filled, and end with it otherwise. Of two legs, or of two
        sales that came together, the one ends with the other.
        """
        self.status, self.reason = status, reason and reason[:300]
        self.closed_at, self.reserved_cash = moment or now(), Decimal(0)
        for other in orders:
            if other is self or other.group != self.group or not other.is_working:
                continue
            if self.action == "buy" and status == "filled":
                other.status, other.quote_number = "open", self.quote_number
            elif self.action == "buy" or other.action == "sell":
                ended = status if status == "expired" else "canceled"
                other.close(ended, (), f"Order {self.id} was {status}.", self.closed_at)

    def pair_among(self, orders: Iterable["PlacedOrder"]) -> "PlacedOrder | None":
        """The open sale that ends with this one."""
        if self.action == "buy":
            return None
        pairs = (o for o in orders if o is not self and o.group == self.group and o.status == "open")
        return next(pairs, None)

    def as_asked(self, legs: list["PlacedOrder"]) -> dict:
        """It and its `legs` in the words in which it could be placed again."""
        same = ("ticker", "action", "quantity", "order_type", "limit_price", "stop_price", "time_in_force")
        asked = {name: getattr(self, name) for name in same}
        for leg in legs:
            if leg.order_type == "limit":
                asked["take_profit"] = {"limit_price": leg.limit_price}
            else:
                asked["stop_loss"] = {"stop_price": leg.stop_price, "limit_price": leg.limit_price}
        return asked

    # The database.

    @classmethod
    def working(cls, user_id: int) -> list["PlacedOrder"]:
        """The user's open and held orders, in the order of their ids."""
        own = sa.select(cls).where(cls.user_id == user_id, cls.closed_at.is_(None))
        return list(db.session.scalars(own.order_by(cls.id)))

    @classmethod
    def of(cls, user_id: int, order_id: str) -> "PlacedOrder":
        """The user's own order of that number; `Refused` if there is none."""
        is_number = re.fullmatch("[0-9]{1,18}", order_id)
        own = sa.select(cls).filter_by(user_id=user_id, id=int(order_id) if is_number else 0)
        order = db.session.scalar(own)
        if order is None:
            raise Refused("not_found", f"You have no order {order_id}.")
        return order

    @classmethod
    def number_under(cls, user_id: int, run: int, key: str) -> int | None:
        """The number of the order that was placed under `key`."""
        return db.session.scalar(sa.select(cls.id).filter_by(user_id=user_id, run=run, idempotency_key=key))

    @classmethod
    def relatives(cls, orders: Iterable["PlacedOrder"]) -> Sequence["PlacedOrder"]:
        """These orders, their legs or what they came with, and what replaced them, in the order of ids."""
        groups, ids = {order.group for order in orders}, {order.id for order in orders}
        related = cls.id.in_(groups) | cls.parent_id.in_(groups) | cls.replaces.in_(ids)
        return db.session.scalars(sa.select(cls).where(related).order_by(cls.id)).all()

    @classmethod
    def page(
        cls, user_id, *, run, status, limit, ticker=None, cursor=None,
        tickers=(), action=None, since=None, until=None, oldest_first=False,
    ) -> Sequence["PlacedOrder"]:  # fmt: skip
        """The newest `limit` orders of a run with an id below `cursor` that pass the filters."""
        orders = sa.select(cls).where(cls.user_id == user_id, cls.run == run)
        if status != "all":
            is_working = cls.closed_at.is_(None)
            orders = orders.where(is_working if status == "open" else ~is_working)
        if ticker or tickers:
            orders = orders.where(cls.ticker.in_(tickers or [ticker]))
        if cursor:
            orders = orders.where(cls.id < cursor)
        if action:
            orders = orders.where(cls.action == action)
        if since:
            orders = orders.where(cls.placed_at > since)
        if until:
            orders = orders.where(cls.placed_at < until)
        order = cls.id if oldest_first else cls.id.desc()
        return db.session.scalars(orders.order_by(order).limit(limit)).all()

    def to_dict(self) -> OrderAnswer:
        numbers = {name: getattr(self, name) for name in ("id", "trade_id", "parent_id", "replaces")}
        return told(OrderAnswer, self, **{name: number and str(number) for name, number in numbers.items()})


def fingerprint(asked: BaseModel, *of: str) -> str:
    """What is the same for two requests that mean the same."""
    words = [type(asked).__name__ + asked.model_dump_json(exclude_none=True), *of]
    return hashlib.sha256("\n".join(words).encode()).hexdigest()


DayOf = Callable[[str, datetime], date]
"""`day_of(ticker, moment)`: the day of the ticker's market in which a moment falls."""


def settle(
    orders: list[PlacedOrder], ticks: Iterable[Tick], day_of: DayOf
) -> Iterator[tuple[Tick, Due | CorporateAction]]:
    """Show `ticks` to the working `orders` of an account, and yield each that is due and can be filled.

    Whoever takes it closes it at once, filled or canceled. Ticks come in the order of time, and within one
    orders are judged in the order of their ids; one that goes live, or has been jumped over, is judged from
    the next step on. Splits and dividends are yielded on the way, for whoever takes them to book.
    """
    calm = None
    for tick in ticks:
        moment, prices, *_ = tick
        for action in tick.actions:
            yield tick, action
            calm = None  # A split moves what orders wait for.
        if calm is None:
            calm = calm_prices(orders)
            days = [order for order in orders if order.time_in_force == "day" and order.is_working]
        ended = [order for order in days if day_of(order.ticker, moment) != order.day]
        for order in ended:
            if order.is_working:
                order.close("expired", orders, moment=tick.shown_at)
        moved = {
            ticker
            for ticker, floor, ceiling in calm
            if (passed := prices.get(ticker)) and not (floor < passed.low and passed.high < ceiling)
        }
        if not ended and not moved:
            continue
        calm, jumped = None, []
        for order in [order for order in orders if order.status == "open" and order.ticker in moved]:
            if order.status != "open":
                continue  # Its pair was filled a moment ago.
            passed = prices[order.ticker]
            order.quote_number = passed.number
            if passed.only_for_sales and order.action == "buy":
                continue
            market_price = order.due_price(passed)
            if market_price is None:
                if order.trails:
                    order.trail(passed.low if order.action == "buy" else passed.high)
            elif order.is_jumped_over(market_price):
                jumped.append(order)
            else:
                pair = order.pair_among(orders)
                if not (pair and pair.can_fill(passed) and pair.goes_before(order, passed)):
                    yield tick, Due(order, passed, market_price)
        for order in jumped:  # Afterwards, so that its pair is judged by what it was in this tick.
            order.is_triggered = order.status == "open"


def calm_prices(orders: list[PlacedOrder]) -> list[tuple[str, Decimal, Decimal]]:
    """Of each ticker the prices between which nothing happens to its open orders.

    Thirty days of minutes with fifty orders are two million looks: that much work is saved in most minutes.
    """
    calm, none, any_price = {}, Decimal(-1), Decimal("Infinity")
    for order in orders:
        if order.status != "open":
            continue
        floor, ceiling = (order.own_price, any_price) if order.waits_for_a_fall else (none, order.own_price)
        if order.trails:
            reach = Decimal(1) if order.trail_amount else 1 + order.sign * order.trail_percent / HUNDRED
            best = (order.stop_price + order.sign * (UNIT - (order.trail_amount or 0))) / reach
            floor, ceiling = (best, ceiling) if order.action == "buy" else (floor, best)
        if order.quote_number is not None:  # Every quote is noted down.
            floor = any_price
        others = calm.get(order.ticker, (none, any_price))
        calm[order.ticker] = max(floor, others[0]), min(ceiling, others[1])
    return [(ticker, *prices) for ticker, prices in calm.items()]
