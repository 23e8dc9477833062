"""What came of it: the audit, which proves the books, and the history, which says how a run went.

`Books` is all that is written of one account. Nothing here writes, or asks anybody for a price.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from typing import Annotated

import sqlalchemy as sa
from typing_extensions import TypedDict

from database import db, snapshot
from messages import Dollars, Percent, Refused, RunNumber, Shares, Time, means, plain
from models import Account, Holding, PortfolioAnswer, Run, Trade, percent, rounded, value_of

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
    starting_cash: Dollars
    equity: Dollars | None
    total_return_percent: Annotated[Percent | None, means("Profit, in percent of the starting cash")]
    max_drawdown_percent: Annotated[Percent, means("The deepest fall of equity from a peak, in percent")]
    trades: int
    realized_pnl: Dollars
    win_rate_percent: Annotated[Percent | None, means("Sales that brought a profit, in percent")]
    profit_factor: Annotated[Shares | None, means("What winning sales gained / what losing sales lost")]
    commission: Dollars


class HistoryAnswer(TypedDict):
    """How a run went."""

    run: RunNumber
    points: list[Point]
    summary: Summary


# --------------------------------------------------------------------------------------- The books


@dataclass
class Books:
    """All that is written of one account, read at one moment."""

    account: Account
    holdings: Sequence[sa.Row]
    runs: dict[int, Run | Account]
    trades: dict[int, list[sa.Row]]

    @classmethod
    def of(cls, user_id: int) -> "Books":
        with snapshot():
            account = db.session.get(Account, user_id)
            holdings = db.session.execute(sa.select(Holding.__table__).filter_by(user_id=user_id)).all()
            ended = db.session.scalars(sa.select(Run).filter_by(user_id=user_id).order_by(Run.run))
            runs = {run.run: run for run in ended}
            trades = defaultdict(list)
            all_trades = sa.select(Trade.__table__).filter_by(user_id=user_id).order_by(Trade.id)
            for trade in db.session.execute(all_trades):
                trades[trade.run].append(trade)
        return cls(account, holdings, runs | {account.run: account}, trades)

    def audit(self) -> AuditAnswer:
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
            account = Account(run=number, cash_balance=run.starting_cash)
            held = {}
            for row in self.trades.get(number, []):
                trade = Trade(**row._asdict())
                holding = held.setdefault(trade.ticker, Holding.none(trade.user_id, trade.ticker))
                is_buy = trade.trade_type == "buy"
                total = value_of(trade.quantity, trade.price, ROUND_CEILING if is_buy else ROUND_FLOOR)
                compare(f"Trade {row.id}: total_amount", row.total_amount, total)
                try:
                    (account.buy if is_buy else account.sell)(trade, holding)
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
        count = sum(map(len, self.trades.values()))
        return {"ok": not differences, "trades": count, "differences": differences}

    def history(
        self, number: int, past_price, portfolio: PortfolioAnswer | None, market_time: datetime
    ) -> HistoryAnswer:
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
                {"timestamp": market_time, "cash": cash, "market_value": value, "equity": cash + value}
            )

        for trade in trades:
            held[trade.ticker] += trade.quantity if trade.trade_type == "buy" else -trade.quantity
            prices[trade.ticker] = trade.market_price
            # A live price may have been seen before the last trade; there the market's time is the clock's.
            at = trade.market_time if trade.price_source == "sample" else trade.created_at
            add_point(trade.created_at, at, trade.cash_after, trade.ticker)
        if portfolio:
            now_worth = {name: portfolio[name] for name in ("market_value", "equity")}
            points.append({"timestamp": market_time, "cash": run.cash_balance, **now_worth})
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
