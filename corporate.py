"""Splits and dividends: what they are, and how the live market's are published.

What they do to a holding is `Account.undergo` in models.py, and to an open order `PlacedOrder.split`.
"""

import logging
from collections.abc import Sequence
from datetime import datetime, timedelta
from decimal import ROUND_HALF_EVEN, Decimal
from fractions import Fraction
from operator import attrgetter

import sqlalchemy as sa
from sqlalchemy import BigInteger, CheckConstraint, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from database import Amount, Moment, db, within
from messages import ORDER_LIMIT, UNIT, rounded

log = logging.getLogger(__name__)

ACTIONS = ("dividend", "split")
WHAT_IS_TOLD = ("ex_at", "numerator", "denominator", "amount")

CLOSE_BY = timedelta(days=5)
"""A split or dividend that is not where it was, but so near, is the same one, corrected. Some funds pay every
week."""


def times(amount: Decimal, ratio: Fraction, rounding: str = ROUND_HALF_EVEN) -> Decimal:
    """`amount` x `ratio`, to 8 decimals."""
    return rounded(amount * ratio.numerator / ratio.denominator, rounding)


def ratio_text(ratio: Fraction) -> str:
    """`10:1`, as it is announced: ten new shares for one old."""
    return f"{ratio.numerator}:{ratio.denominator}"


def ratio_from(text: str) -> Fraction:
    return Fraction(text.replace(":", "/"))


class CorporateAction(db.Model):
    """A split, by its exact ratio, or a dividend, in dollars for a share.

    From `ex_at` on the market's price is without it: whoever bought before gets it. `price` is what the
    ticker cost then. One that a live source told is a row, `number` counts them all, and every process books
    the same. One of the sample market is no row and has no `number`: it stands in the recorded file, and its
    `ex_at` is the bar.
    """

    __tablename__ = "ibkr_corporate_actions"
    __table_args__ = (
        UniqueConstraint("ticker", "kind", "ex_at"),
        CheckConstraint("kind IN ('split', 'dividend')", name="kind"),
        CheckConstraint(
            "(kind = 'split') = (numerator IS NOT NULL) AND (kind = 'split') = (denominator IS NOT NULL) "
            "AND (kind = 'dividend') = (amount IS NOT NULL)",
            name="one_of_two",
        ),
        CheckConstraint("numerator > 0 AND denominator > 0", name="ratio"),
        within("amount", UNIT, ORDER_LIMIT),
        within("price", UNIT, ORDER_LIMIT),
    )

    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    ticker: Mapped[str] = mapped_column(sa.String(20))
    kind: Mapped[str] = mapped_column(sa.String(8))
    ex_at: Mapped[Moment]
    numerator: Mapped[int | None] = mapped_column(BigInteger)
    denominator: Mapped[int | None] = mapped_column(BigInteger)
    amount: Mapped[Amount | None]
    price: Mapped[Amount]
    source: Mapped[str] = mapped_column(sa.String(20))
    published_at: Mapped[Moment]

    def __str__(self) -> str:
        """For the log."""
        what = ratio_text(self.ratio) if self.kind == "split" else f"of {self.amount.normalize():f} dollars"
        return f"{self.kind} {what} in {self.ticker} on {self.ex_at.date()}"

    @classmethod
    def split(cls, ticker: str, ratio: Fraction, **more) -> "CorporateAction":
        parts = {"numerator": ratio.numerator, "denominator": ratio.denominator}
        return cls(ticker=ticker, kind="split", **parts, **more)

    @classmethod
    def dividend(cls, ticker: str, amount: Decimal, **more) -> "CorporateAction":
        return cls(ticker=ticker, kind="dividend", amount=amount, **more)

    @property
    def ratio(self) -> Fraction:
        return Fraction(self.numerator, self.denominator)

    def undone(self, price: Decimal | None, moment: datetime) -> "CorporateAction":
        """What takes a recorded split back, where a clock goes back over it to a bar at that `moment`."""
        price = min(max(price or times(self.price, self.ratio), UNIT), ORDER_LIMIT - UNIT)
        known = {"ex_at": moment, "price": price, "source": self.source}
        return CorporateAction.split(self.ticker, 1 / self.ratio, **known)

    @classmethod
    def after(cls, number: int) -> Sequence["CorporateAction"]:
        """What was published after that one, the oldest first; of one moment the dividends come first."""
        newer = db.session.scalars(sa.select(cls).where(cls.number > number))
        return sorted(newer, key=attrgetter("ex_at", "kind", "ticker"))

    @classmethod
    def publish(cls, told: Sequence["CorporateAction"]) -> None:
        """Add what a source `told` of one ticker and has not told before.

        What was published stays: where the source now says something else of that day, or has moved it to
        another one close by, that is logged.
        """
        told_now = {(action.kind, action.ex_at) for action in told}
        for action in told:
            near = cls.ex_at.between(action.ex_at - CLOSE_BY, action.ex_at + CLOSE_BY)
            own = sa.select(cls).filter_by(ticker=action.ticker, kind=action.kind).where(near)
            known = {other.ex_at: other for other in db.session.scalars(own)}
            moved = [
                other
                for other in known.values()
                if (other.kind, other.ex_at) not in told_now or other.ex_at.date() == action.ex_at.date()
            ]
            if earlier := known.get(action.ex_at) or next(iter(moved), None):
                if any(getattr(earlier, name) != getattr(action, name) for name in WHAT_IS_TOLD):
                    log.warning("%s tells a %s now: the %s stays", action.source, action, earlier)
                continue
            action.number = cls.latest() + 1
            db.session.add(action)
            db.session.flush()

    @classmethod
    def latest(cls) -> int:
        """The number of the one published last."""
        return db.session.scalar(sa.select(sa.func.max(cls.number))) or 0
