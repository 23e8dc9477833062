"""Balances: each user's cash. The upper bounds also keep NaN out, which sorts above every number."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

AMOUNT = sa.Numeric(20, 8).with_variant(sa.BigInteger(), "sqlite")


def upgrade():
    # SQLite has no exact decimal, and keeps integers of 10^-8.
    dollar = 10**8 if op.get_context().dialect.name == "sqlite" else 1
    limit = 90_000_000_000 * dollar
    op.create_table(
        "ibkr_balances",
        sa.Column("user_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("cash_balance", AMOUNT, nullable=False),
        sa.Column("starting_cash", AMOUNT, nullable=False),
        sa.Column("run", sa.Integer(), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("user_id", name="pk_ibkr_balances"),
        sa.ForeignKeyConstraint(["user_id"], ["ibkr_users.id"], name="fk_ibkr_balances_user_id"),
        sa.CheckConstraint(
            f"cash_balance >= 0 AND cash_balance < {limit}", name=op.f("ck_ibkr_balances_cash_balance")
        ),
        sa.CheckConstraint(
            f"starting_cash >= 0 AND starting_cash < {limit}", name=op.f("ck_ibkr_balances_starting_cash")
        ),
    )


def downgrade():
    op.drop_table("ibkr_balances")
