"""Runs that have ended, and each account's control of the sample market: a clock and pinned prices."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"

ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
AMOUNT = sa.Numeric(20, 8).with_variant(sa.BigInteger(), "sqlite")


def upgrade():
    # SQLite has no exact decimal, and keeps integers of 10^-8.
    on_sqlite = op.get_context().dialect.name == "sqlite"
    unit, dollar = (1, 10**8) if on_sqlite else ("0.00000001", 1)
    order_limit, account_limit = 10_000_000_000 * dollar, 90_000_000_000 * dollar
    op.create_table(
        "ibkr_runs",
        sa.Column("user_id", ID, nullable=False),
        sa.Column("run", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("starting_cash", AMOUNT, nullable=False),
        sa.Column("cash_balance", AMOUNT, nullable=False),
        sa.Column("market_time", sa.DateTime(timezone=True), nullable=False),
        sa.Column("ended_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("user_id", "run", name="pk_ibkr_runs"),
        sa.ForeignKeyConstraint(["user_id"], ["ibkr_users.id"], name="fk_ibkr_runs_user_id"),
        sa.CheckConstraint(
            f"starting_cash >= 0 AND starting_cash < {account_limit}", name=op.f("ck_ibkr_runs_starting_cash")
        ),
        sa.CheckConstraint(
            f"cash_balance >= 0 AND cash_balance < {account_limit}", name=op.f("ck_ibkr_runs_cash_balance")
        ),
    )
    op.create_table(
        "ibkr_pins",
        sa.Column("id", ID, nullable=False),
        sa.Column("user_id", ID, nullable=False),
        sa.Column("ticker", sa.String(20), nullable=False),
        sa.Column("price", AMOUNT),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_ibkr_pins"),
        sa.ForeignKeyConstraint(["user_id"], ["ibkr_users.id"], name="fk_ibkr_pins_user_id"),
        sa.CheckConstraint(f"price >= {unit} AND price < {order_limit}", name=op.f("ck_ibkr_pins_price")),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_ibkr_pins_user_id_id", "ibkr_pins", ["user_id", "id"])
    op.add_column("ibkr_balances", sa.Column("market_clock", sa.DateTime(timezone=True)))
    op.add_column("ibkr_balances", sa.Column("pin_changes", sa.Integer(), server_default="0", nullable=False))


def downgrade():
    op.drop_column("ibkr_balances", "pin_changes")
    op.drop_column("ibkr_balances", "market_clock")
    op.drop_table("ibkr_pins")
    op.drop_table("ibkr_runs")
