"""Orders that rest, and of each account until when its open orders have seen the prices."""

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"

ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
AMOUNT = sa.Numeric(20, 8).with_variant(sa.BigInteger(), "sqlite")
TIME = sa.DateTime(timezone=True)
AMOUNTS = [
    *("quantity", "limit_price", "stop_price", "trail_percent", "trail_amount"),
    *("reserved_cash", "commission", "price"),
]


def upgrade():
    # SQLite has no exact decimal, and keeps integers of 10^-8.
    on_sqlite = op.get_context().dialect.name == "sqlite"
    unit, dollar = (1, 10**8) if on_sqlite else ("0.00000001", 1)
    order_limit, account_limit = 10_000_000_000 * dollar, 90_000_000_000 * dollar
    bounds = dict.fromkeys(AMOUNTS, (unit, order_limit)) | {
        "trail_percent": (unit, 100 * dollar),
        "reserved_cash": (0, account_limit),
        "commission": (0, account_limit),
    }
    words = {
        "action": "action IN ('buy', 'sell')",
        "order_type": "order_type IN ('market', 'limit', 'stop', 'stop_limit', 'trailing_stop')",
        "time_in_force": "time_in_force IN ('gtc', 'day', 'ioc', 'fok')",
        "status": "status IN ('open', 'held', 'filled', 'canceled', 'expired', 'replaced')",
        "one_state": "(status IN ('open', 'held')) = (closed_at IS NULL) "
        "AND (status = 'filled') = (trade_id IS NOT NULL) AND (status = 'filled') = (price IS NOT NULL)",
        "closed_holds_nothing": "closed_at IS NULL OR reserved_cash = 0",
    }
    words |= {name: f"{name} >= {low} AND {name} < {high}" for name, (low, high) in bounds.items()}
    op.create_table(
        "ibkr_orders",
        sa.Column("id", ID, nullable=False),
        sa.Column("user_id", ID, nullable=False),
        sa.Column("run", sa.Integer(), nullable=False),
        sa.Column("ticker", sa.String(20), nullable=False),
        sa.Column("action", sa.String(4), nullable=False),
        sa.Column("order_type", sa.String(13), nullable=False),
        sa.Column("quantity", AMOUNT, nullable=False),
        sa.Column("limit_price", AMOUNT),
        sa.Column("stop_price", AMOUNT),
        sa.Column("trail_percent", AMOUNT),
        sa.Column("trail_amount", AMOUNT),
        sa.Column("is_triggered", sa.Boolean(), nullable=False),
        sa.Column("time_in_force", sa.String(3), nullable=False),
        sa.Column("day", sa.Date(), nullable=False),
        sa.Column("status", sa.String(8), nullable=False),
        sa.Column("reason", sa.String(300)),
        sa.Column("reserved_cash", AMOUNT, nullable=False),
        sa.Column("commission", AMOUNT, nullable=False),
        sa.Column("parent_id", ID),
        sa.Column("replaces", ID),
        sa.Column("idempotency_key", sa.String(255)),
        sa.Column("asked", sa.String(64)),
        sa.Column("quote_number", sa.Integer()),
        sa.Column("placed_at", TIME, nullable=False),
        sa.Column("market_time", TIME, nullable=False),
        sa.Column("closed_at", TIME),
        sa.Column("trade_id", ID),
        sa.Column("price", AMOUNT),
        sa.PrimaryKeyConstraint("id", name="pk_ibkr_orders"),
        sa.ForeignKeyConstraint(["user_id"], ["ibkr_users.id"], name="fk_ibkr_orders_user_id"),
        sa.ForeignKeyConstraint(["parent_id"], ["ibkr_orders.id"], name="fk_ibkr_orders_parent_id"),
        sa.ForeignKeyConstraint(["replaces"], ["ibkr_orders.id"], name="fk_ibkr_orders_replaces"),
        sa.ForeignKeyConstraint(["trade_id"], ["ibkr_trades.id"], name="fk_ibkr_orders_trade_id"),
        sa.UniqueConstraint(
            "user_id", "run", "idempotency_key", name="uq_ibkr_orders_user_id_run_idempotency_key"
        ),
        sa.UniqueConstraint("trade_id", name="uq_ibkr_orders_trade_id"),
        *(sa.CheckConstraint(check, name=op.f(f"ck_ibkr_orders_{name}")) for name, check in words.items()),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_ibkr_orders_user_id_id", "ibkr_orders", ["user_id", "id"])
    working = sa.text("closed_at IS NULL")
    op.create_index(
        "ix_ibkr_orders_working",
        "ibkr_orders",
        ["user_id", "id"],
        postgresql_where=working,
        sqlite_where=working,
    )
    op.add_column("ibkr_balances", sa.Column("settled_at", TIME))
    if on_sqlite:
        broken = " OR ".join(f"typeof(NEW.{column}) NOT IN ('integer', 'null')" for column in AMOUNTS)
        for change in ("INSERT", "UPDATE"):
            op.execute(
                f"CREATE TRIGGER ibkr_orders_whole_on_{change.lower()} BEFORE {change} ON ibkr_orders "
                f"WHEN {broken} BEGIN SELECT RAISE(ABORT, 'amounts are integers of 10^-8'); END"
            )


def downgrade():
    op.drop_column("ibkr_balances", "settled_at")
    op.drop_table("ibkr_orders")
