"""Trades: every purchase and sale, for ever. Rows are added; triggers refuse to change or delete one."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"

ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
AMOUNT = sa.Numeric(20, 8).with_variant(sa.BigInteger(), "sqlite")


def upgrade():
    # SQLite has no exact decimal, and keeps integers of 10^-8.
    on_sqlite = op.get_context().dialect.name == "sqlite"
    unit, dollar = (1, 10**8) if on_sqlite else ("0.00000001", 1)
    order_limit, account_limit = 10_000_000_000 * dollar, 90_000_000_000 * dollar

    def within(column, low, high):
        return sa.CheckConstraint(
            f"{column} >= {low} AND {column} < {high}", name=op.f(f"ck_ibkr_trades_{column}")
        )

    op.create_table(
        "ibkr_trades",
        sa.Column("id", ID, nullable=False),
        sa.Column("user_id", ID, nullable=False),
        sa.Column("run", sa.Integer(), nullable=False),
        sa.Column("ticker", sa.String(20), nullable=False),
        sa.Column("trade_type", sa.String(4), nullable=False),
        sa.Column("order_type", sa.String(6), nullable=False),
        sa.Column("quantity", AMOUNT, nullable=False),
        sa.Column("price", AMOUNT, nullable=False),
        sa.Column("total_amount", AMOUNT, nullable=False),
        sa.Column("commission", AMOUNT, nullable=False),
        sa.Column("realized_pnl", AMOUNT),
        sa.Column("cash_after", AMOUNT, nullable=False),
        sa.Column("market_price", AMOUNT, nullable=False),
        sa.Column("price_source", sa.String(20), nullable=False),
        sa.Column("idempotency_key", sa.String(255), nullable=False),
        sa.Column("market_time", sa.DateTime(timezone=True), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_ibkr_trades"),
        sa.ForeignKeyConstraint(["user_id"], ["ibkr_users.id"], name="fk_ibkr_trades_user_id"),
        sa.UniqueConstraint("user_id", "idempotency_key", name="uq_ibkr_trades_user_id_idempotency_key"),
        sa.CheckConstraint("trade_type IN ('buy', 'sell')", name=op.f("ck_ibkr_trades_trade_type")),
        sa.CheckConstraint("order_type IN ('limit', 'market')", name=op.f("ck_ibkr_trades_order_type")),
        sa.CheckConstraint(
            "(trade_type = 'sell') = (realized_pnl IS NOT NULL)", name=op.f("ck_ibkr_trades_realized_on_sell")
        ),
        within("quantity", unit, order_limit),
        within("price", unit, order_limit),
        within("total_amount", 0, account_limit),
        within("commission", 0, account_limit),
        within("realized_pnl", -account_limit, account_limit),
        within("cash_after", 0, account_limit),
        within("market_price", unit, order_limit),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_ibkr_trades_user_id_id", "ibkr_trades", ["user_id", "id"])
    if on_sqlite:
        for change in ("UPDATE", "DELETE"):
            op.execute(
                f"CREATE TRIGGER ibkr_trades_no_{change.lower()} BEFORE {change} ON ibkr_trades "
                "BEGIN SELECT RAISE(ABORT, 'ibkr_trades is append-only'); END"
            )
    else:
        op.execute(
            "CREATE FUNCTION ibkr_trades_append_only() RETURNS trigger LANGUAGE plpgsql AS "
            "$$ BEGIN RAISE EXCEPTION 'ibkr_trades is append-only'; END $$"
        )
        op.execute(
            "CREATE TRIGGER ibkr_trades_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON ibkr_trades "
            "EXECUTE FUNCTION ibkr_trades_append_only()"
        )


def downgrade():
    op.drop_table("ibkr_trades")
    if op.get_context().dialect.name != "sqlite":
        op.execute("DROP FUNCTION ibkr_trades_append_only()")
