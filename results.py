"""What came of it: the audit, which proves the books, and the history, which says how a run went.

`Books` is all that is written of one account. Nothing here writes, or asks anybody for a price.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from itertools import accumulate, groupby, pairwise
from typing import Annotated, NamedTuple

import sqlalchemy as sa
from typing_extensions import TypedDict

from corporate import ACTIONS, CorporateAction
from database import db, snapshot
from messages import (
    ACCOUNT_LIMIT,
    HUNDRED,
    Dollars,
    Percent,
    Ratio,
    Refused,
    Resolution,
    RunNumber,
    Time,
    iso,
    means,
    now,
    percent,
    plain,
    rounded,
    told,
    value_of,
)
from models import BY_ITSELF, Account, Holding, Pin, PortfolioAnswer, Run, Stretch, Trade, in_lieu
from orders import PlacedOrder

# ----------------------------------------------------------------------------------------- Answers


class AuditAnswer(TypedDict):
    """Whether the books hold."""

    ok: Annotated[bool, means("Whether they do")]
    trades: Annotated[int, means("How many were replayed")]
    differences: Annotated[list[str], means("A sentence for each")]


class Point(TypedDict):
    timestamp: Annotated[Time, means("The market's time")]
    cash: Dollars
    market_value: Dollars | None
    equity: Dollars | None


class Summary(TypedDict):
    """The figures of a run, from all of its curve, whatever points of it are shown.

    Those of its days are `null` where it has had fewer than two, as is all that would be divided by zero.
    """

    starting_cash: Dollars
    equity: Dollars | None
    total_return_percent: Annotated[Percent | None, means("Profit, in percent of the starting cash")]
    annual_return_percent: Annotated[Percent | None, means("What it comes to in 252 days at that pace")]
    annual_volatility_percent: Annotated[
        Percent | None, means("Standard deviation of the daily returns x the root of 252")
    ]
    sharpe_ratio: Annotated[
        Ratio | None, means("Mean of the daily returns / their standard deviation x the root of 252")
    ]
    sortino_ratio: Annotated[
        Ratio | None, means("The same, divided by the root of the mean square of the negative ones")
    ]
    exposure_percent: Annotated[Percent | None, means("Days that ended with a holding, in percent")]
    max_drawdown_percent: Annotated[Percent, means("The deepest fall of equity from a peak, in percent")]
    trades: Annotated[int, means("Purchases and sales")]
    realized_pnl: Dollars
    dividends: Annotated[Dollars, means("What dividends brought, in dollars")]
    winning_sales: Annotated[int, means("Sales that brought a profit")]
    losing_sales: Annotated[int, means("Sales that brought a loss")]
    even_sales: Annotated[int, means("Sales that brought neither")]
    win_rate_percent: Annotated[Percent | None, means("Sales that brought a profit, in percent")]
    profit_factor: Annotated[Ratio | None, means("What winning sales gained / what losing sales lost")]
    commission: Dollars
    fees_percent: Annotated[Percent | None, means("Commission, in percent of the starting cash")]


class HistoryAnswer(TypedDict):
    """How a run went."""

    run: RunNumber
    points: list[Point]
    summary: Summary


# --------------------------------------------------------------------------------------- The curve


class Step(NamedTuple):
    """A moment of a run at which prices were known: of a trade, of a bar or a day that passed, or its end.

    The markets make these (`replay`). Where they know no price, that of the last trade counts.
    """

    timestamp: datetime
    prices: dict[str, Decimal]
    trade: sa.Row | None = None


class Past(NamedTuple):
    """What is written of a run, each in the order of time; the pins are those of all runs."""

    trades: Sequence[sa.Row]
    stretches: Sequence[sa.Row]
    pins: Sequence[sa.Row]


class Mark(NamedTuple):
    """What an account was worth at a step, in dollars; None where that is not known."""

    timestamp: datetime
    cash: Decimal
    market_value: Decimal | None
    equity: Decimal | None
    is_trade: bool
    holds: bool

    def to_dict(self) -> Point:
        return told(Point, self)


ZERO, ONE = Decimal(0), Decimal(1)


def curve_of(cash: Decimal, steps: Iterable[Step]) -> Iterator[Mark]:
    """What an account that began with `cash` dollars was worth at each step.

    The ticker that was traded counts with its `market_price`, by which the trade was judged. Splits and
    dividends of one moment are one mark: with the first of them the prices are without all.
    """
    held, last_traded, last, was_action = defaultdict(Decimal), {}, None, False
    for timestamp, prices, trade in steps:
        if trade:
            held[trade.ticker] += Trade.change(trade)
            if not held[trade.ticker]:
                del held[trade.ticker]
            if trade.market_price:
                last_traded[trade.ticker] = trade.market_price
            if trade.order_type:  # Splits and dividends judge by no price: the ticker may be pinned.
                prices = prices | {trade.ticker: trade.market_price}
            cash = trade.cash_after
        worth = (value_of(size, prices.get(t) or last_traded.get(t, ZERO)) for t, size in held.items())
        value = sum(worth, ZERO)
        mark = Mark(timestamp, cash, value, cash + value, trade is not None, bool(held))
        is_action = trade is not None and trade.trade_type in ACTIONS
        if last and not (is_action and was_action and timestamp == last.timestamp):
            yield last
        last, was_action = mark, is_action
    if last:
        yield last


def last_of_days(curve: Iterable[Mark]) -> list[Mark]:
    """The last mark of each of the market's days, in UTC.

    A day ends when the next mark is of another date: one that the clock was turned back to is a day again.
    """
    return [list(day)[-1] for _, day in groupby(curve, key=lambda mark: mark.timestamp.date())]


def thinned(curve: list[Mark], resolution: Resolution) -> list[Mark]:
    """The marks to show: all (`bar`), the last of each day (`day`), or of trades and the end (`trade`)."""
    if resolution == "trade":
        return [mark for mark in curve[:-1] if mark.is_trade] + curve[-1:]
    return last_of_days(curve) if resolution == "day" else curve


# ------------------------------------------------------------------------------------- The figures

DAYS_A_YEAR = 252
"""On which shares are traded."""

A_YEAR = Decimal(DAYS_A_YEAR).sqrt()
"""A year's standard deviation, in those of a day."""


def max_drawdown(start: Decimal, equities: Iterable[Decimal]) -> Decimal:
    """The deepest fall below the highest equity before, as a part of that; `start` is the first peak."""
    equities = [start, *equities]
    peaks = accumulate(equities, max)
    falls = ((peak - equity) / peak for peak, equity in zip(peaks, equities, strict=True) if peak)
    return max(falls, default=ZERO)


def ratio(part: Decimal, whole: Decimal) -> Decimal | None:
    """`part` / `whole`, to 8 decimals; None of nothing, and of what is beyond all sense."""
    return rounded(part / whole) if abs(part) < ACCOUNT_LIMIT * whole else None


def percent_if_sane(part: Decimal) -> Decimal | None:
    """`part` of 1 in percent, to 2 decimals; None of what is beyond all sense."""
    return percent(part, ONE) if part * HUNDRED < ACCOUNT_LIMIT else None


def daily_figures(start: Decimal, days: list[Mark]) -> dict[str, Decimal | None]:
    """What the equity at the end of each day says, after `start` dollars at the beginning of the first.

    A day's return is its equity / the day's before - 1; there is no risk-free rate. Percentages have 2
    decimals and ratios 8. None is what has fewer than two days or a zero below the line, or would be
    90,000,000,000 or more.

    - annual return: (equity / starting cash) ^ (252 / days) - 1;
    - annual volatility: the sample standard deviation of the returns x root of 252;
    - Sharpe ratio: the mean of the returns / their sample standard deviation x root of 252;
    - Sortino ratio: the mean of the returns / root of the mean over all days of the squares of those
      returns that are negative x root of 252;
    - exposure: days that ended with a holding / days.
    """
    annual = volatility = sharpe = sortino = exposure = None
    equities, count = [start, *(day.equity for day in days)], len(days)
    if count >= 2:
        exposure = percent(Decimal(sum(day.holds for day in days)), Decimal(count))
        if start and equities[-1]:
            growth = (equities[-1] / start) ** (Decimal(DAYS_A_YEAR) / count)
            annual = percent_if_sane(growth - 1)
    if count >= 2 and all(equities[:-1]):
        returns = [today / yesterday - 1 for yesterday, today in pairwise(equities)]
        mean = sum(returns) / count
        deviation = (sum((one - mean) * (one - mean) for one in returns) / (count - 1)).sqrt()
        downside = (sum(one * one for one in returns if one < 0) / Decimal(count)).sqrt()
        volatility = percent_if_sane(deviation * A_YEAR)
        sharpe, sortino = ratio(mean * A_YEAR, deviation), ratio(mean * A_YEAR, downside)
    return {
        "annual_return_percent": annual,
        "annual_volatility_percent": volatility,
        "sharpe_ratio": sharpe,
        "sortino_ratio": sortino,
        "exposure_percent": exposure,
    }


# --------------------------------------------------------------------------------------- The books


def total_of(trade: Trade) -> Decimal:
    """What a trade's `total_amount` has to be, in dollars."""
    if trade.trade_type == "correction":
        return trade.total_amount
    if trade.trade_type == "split":
        return in_lieu(trade)
    return value_of(trade.quantity, trade.price, ROUND_CEILING if trade.trade_type == "buy" else ROUND_FLOOR)


@dataclass
class Books:
    """All that is written of one account, read at one moment."""

    account: Account
    holdings: Sequence[sa.Row]
    runs: dict[int, Run | Account]
    trades: dict[int, list[sa.Row]]
    stretches: dict[int, list[sa.Row]]
    pins: Sequence[sa.Row]
    orders: Sequence[PlacedOrder]
    actions: dict[str, CorporateAction]

    @classmethod
    def of(cls, user_id: int) -> "Books":
        def rows_of(kind) -> Sequence[sa.Row]:
            own = sa.select(kind.__table__).filter_by(user_id=user_id).order_by(kind.id)
            return db.session.execute(own).all()

        with snapshot():
            account = db.session.get(Account, user_id)
            holdings = db.session.execute(sa.select(Holding.__table__).filter_by(user_id=user_id)).all()
            ended = db.session.scalars(sa.select(Run).filter_by(user_id=user_id).order_by(Run.run))
            runs = {run.run: run for run in ended}
            trades, stretches = defaultdict(list), defaultdict(list)
            for trade in rows_of(Trade):
                trades[trade.run].append(trade)
            for stretch in rows_of(Stretch):
                stretches[stretch.run].append(stretch)
            pins = rows_of(Pin)
            own_orders = sa.select(PlacedOrder).filter_by(user_id=user_id).order_by(PlacedOrder.id)
            orders = db.session.scalars(own_orders).all()
            actions = {f"{BY_ITSELF} {action.number}": action for action in CorporateAction.after(0)}
        return cls(account, holdings, runs | {account.run: account}, trades, stretches, pins, orders, actions)

    def audit(self, has_asked: Callable[[sa.Row, Sequence[sa.Row]], bool]) -> AuditAnswer:
        """Replay the trades from the start and compare: every balance, holding and cost, and every order.

        `has_asked(trade, pins)` is the market's word that it asked a trade's `market_price`, for those that
        fill an order.

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
            account = Account(run=number, cash_balance=run.starting_cash)
            held = {}
            for row in self.trades.get(number, []):
                trade = Trade(**row._asdict())
                holding = held.setdefault(trade.ticker, Holding.none(trade.user_id, trade.ticker))
                compare(f"Trade {row.id}: total_amount", row.total_amount, total_of(trade))
                if trade.trade_type in ACTIONS and not self.is_due(trade, holding):
                    differences.append(f"Trade {row.id} is a {trade.trade_type} that nobody has told.")
                book = {"buy": account.buy, "sell": account.sell}.get(trade.trade_type, account.receive)
                try:
                    book(trade, holding)
                except Refused as refused:
                    differences.append(f"Trade {row.id} should have been refused: {refused}")
                compare(f"Trade {row.id}: realized_pnl", row.realized_pnl, trade.realized_pnl)
                compare(f"Trade {row.id}: cash_after", row.cash_after, account.cash_balance)
            compare(f"Run {number}: cash_balance", run.cash_balance, account.cash_balance)
        booked = {holding.ticker: holding for holding in self.holdings}  # And `held` is the current run's.
        none = Holding.none(self.account.user_id, "")
        for ticker in sorted(booked.keys() | held.keys()):
            for name in ("quantity", "cost_basis"):
                pair = (getattr(side.get(ticker, none), name) for side in (booked, held))
                compare(f"{ticker}: {name}", *pair)
        differences += self.wrong_orders(has_asked)
        count = sum(map(len, self.trades.values()))
        return {"ok": not differences, "trades": count, "differences": differences}

    def is_due(self, trade: Trade, holding: Holding) -> bool:
        """Whether a split or dividend is as it was published; a recorded one is for no more than is held."""
        if trade.price_source == "sample":
            return trade.quantity <= holding.quantity
        told = self.actions.get(trade.idempotency_key)
        return told is not None and trade.same_as(Trade.of_action(trade, told, trade.quantity, now()))

    def wrong_orders(self, has_asked) -> Iterator[str]:
        """A sentence for each order that is not in one state, was filled when it was not due, or holds back
        something else than it has to."""
        orders = {order.id: order for order in self.orders}
        trades = {trade.id: trade for run in self.trades.values() for trade in run}
        for trade in trades.values():
            if trade.order_id and getattr(orders.get(trade.order_id), "trade_id", None) != trade.id:
                yield f"Trade {trade.id} fills order {trade.order_id}, which knows nothing of it."
        for order in self.orders:
            parent, trade = orders.get(order.parent_id), trades.get(order.trade_id)
            if order.status == "filled":
                if trade is None or not order.is_filled_by(trade):
                    yield f"Order {order.id} is filled by trade {order.trade_id}, which is no fill of it."
                elif not has_asked(trade, self.pins):
                    at = f"{plain(trade.market_price)} at {iso(trade.market_time)}"
                    yield f"Order {order.id} was filled where {order.ticker} did not cost {at}."
            elif order.is_working:
                if order.run != self.account.run:
                    yield f"Order {order.id} is {order.status} in a run that is over."
                is_held = parent is not None and parent.action == "buy" and parent.is_working
                if (order.status == "held") != is_held:
                    other = f"order {order.parent_id} {parent and parent.status}"
                    yield f"Order {order.id} is {order.status}, and {other}."
                if not order.holds_back_what_it_must():
                    held = plain(order.reserved_cash)
                    yield f"Order {order.id} holds back {held}, which is not what it may cost."
        working = [order for order in self.orders if order.is_working]
        filled = [order.group for order in self.orders if order.status == "filled" and order.action == "sell"]
        for group in {group for group in filled if filled.count(group) > 1}:
            yield f"Two orders that cancel each other, of order {group}, are filled."
        self.account.orders = working
        if self.account.buying_power < 0:
            yield f"Open orders hold back {plain(self.account.reserved_cash)}, which is more than the cash."
        held = {holding.ticker: holding.quantity for holding in self.holdings}
        for ticker in sorted({order.ticker for order in working}):
            if self.account.reserved_shares(ticker) > held.get(ticker, 0):
                yield f"Open orders hold back more {ticker} than there is."
        if (self.account.settled_at is None) != (not working):
            yield f"{len(working)} orders are open, and the account says otherwise."

    def past(self, number: int) -> Past:
        """All that a market needs to replay run `number`."""
        return Past(self.trades[number], self.stretches[number], self.pins)

    def history(
        self, number: int, steps: Iterable[Step], portfolio: PortfolioAnswer | None, resolution: Resolution
    ) -> HistoryAnswer:
        """How run `number` went: its equity curve, and the figures that sum all of it up.

        `steps` are what a market makes of `past(number)`. The curve ends with `portfolio`, the account now;
        a run that has ended is valued at its end. `resolution` thins the points that are shown, and never
        the figures. Dollars, and percentages:

        - total return: equity / starting cash - 1;
        - maximum drawdown: the deepest fall of equity below its highest point before, as a part of that
          point; the starting cash is the first;
        - winning, losing and even sales: those with a `realized_pnl` above, below and of 0;
        - win rate: winning sales / all sales;
        - profit factor: the sum of all profits / the sum of all losses of sales, to 8 decimals;
        - fees: commission / starting cash;
        - and `daily_figures`.
        """
        start, trades = self.runs[number].starting_cash, self.trades[number]
        *curve, end = curve_of(start, steps)
        if curve and not curve[-1].is_trade and curve[-1].timestamp == end.timestamp:
            curve.pop()  # The bar at which the clock stands.
        if portfolio:
            end = end._replace(market_value=portfolio["market_value"], equity=portfolio["equity"])
        curve.append(end)

        known = [mark for mark in curve if mark.equity is not None]
        sales = [trade.realized_pnl for trade in trades if trade.trade_type == "sell"]
        profits, losses = [pnl for pnl in sales if pnl > 0], [-pnl for pnl in sales if pnl < 0]
        lost, commission = sum(losses, ZERO), sum((trade.commission for trade in trades), ZERO)
        return {
            "run": number,
            "points": [mark.to_dict() for mark in thinned(curve, resolution)],
            "summary": {
                "starting_cash": start,
                "equity": end.equity,
                "total_return_percent": None if end.equity is None else percent(end.equity - start, start),
                **daily_figures(start, last_of_days(known)),
                "max_drawdown_percent": percent(max_drawdown(start, [mark.equity for mark in known]), ONE),
                "trades": sum(trade.trade_type in ("buy", "sell") for trade in trades),
                "realized_pnl": sum((trade.realized_pnl or ZERO for trade in trades), ZERO),
                "dividends": sum((t.total_amount for t in trades if t.trade_type == "dividend"), ZERO),
                "winning_sales": len(profits),
                "losing_sales": len(losses),
                "even_sales": len(sales) - len(profits) - len(losses),
                "win_rate_percent": percent(Decimal(len(profits)), Decimal(len(sales))),
                "profit_factor": rounded(sum(profits) / lost) if lost else None,
                "commission": commission,
                "fees_percent": percent(commission, start),
            },
        }
