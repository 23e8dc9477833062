"""Splits and dividends as they are published, and trades that are neither purchase nor sale.

What a trade may be is relaxed. SQLite changes no constraint, but where nothing that is stored becomes wrong
its words may be edited in place, as its documentation of ALTER TABLE describes: no trade is touched.
"""

import sqlalchemy as sa
from alembic import context, op
from alembic.util import CommandError

revision = "0012"
down_revision = "0011"

AMOUNT = sa.Numeric(20, 8).with_variant(sa.BigInteger(), "sqlite")
TIME = sa.DateTime(timezone=True)
NULLABLE = ["order_type", "price", "market_price"]


def upgrade():
    unit, order_limit, account_limit = limits()
    op.create_table(
        "ibkr_corporate_actions",
        sa.Column("number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("ticker", sa.String(20), nullable=False),
        sa.Column("kind", sa.String(8), nullable=False),
        sa.Column("ex_at", TIME, nullable=False),
        sa.Column("numerator", sa.BigInteger()),
        sa.Column("denominator", sa.BigInteger()),
        sa.Column("amount", AMOUNT),
        sa.Column("price", AMOUNT, nullable=False),
        sa.Column("source", sa.String(20), nullable=False),
        sa.Column("published_at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("number", name="pk_ibkr_corporate_actions"),
        sa.UniqueConstraint("ticker", "kind", "ex_at", name="uq_ibkr_corporate_actions_ticker_kind_ex_at"),
        *(
            sa.CheckConstraint(check, name=op.f(f"ck_ibkr_corporate_actions_{name}"))
            for name, check in {
                "kind": "kind IN ('split', 'dividend')",
                "one_of_two": "(kind = 'split') = (numerator IS NOT NULL) "
                "AND (kind = 'split') = (denominator IS NOT NULL) "
                "AND (kind = 'dividend') = (amount IS NOT NULL)",
                "ratio": "numerator > 0 AND denominator > 0",
                "amount": f"amount >= {unit} AND amount < {order_limit}",
                "price": f"price >= {unit} AND price < {order_limit}",
            }.items()
        ),
    )
    if on_sqlite():
        for change in ("INSERT", "UPDATE"):
            op.execute(
                f"CREATE TRIGGER ibkr_corporate_actions_whole_on_{change.lower()} "
                f"BEFORE {change} ON ibkr_corporate_actions "
                "WHEN typeof(NEW.amount) NOT IN ('integer', 'null') "
                "OR typeof(NEW.price) NOT IN ('integer', 'null') "
                "BEGIN SELECT RAISE(ABORT, 'amounts are integers of 10^-8'); END"
            )
    op.add_column(
        "ibkr_balances", sa.Column("actions_seen", sa.Integer(), server_default="0", nullable=False)
    )
    op.add_column("ibkr_balances", sa.Column("acted_at", TIME))
    op.execute("UPDATE ibkr_balances SET acted_at = CURRENT_TIMESTAMP")
    op.add_column("ibkr_trades", sa.Column("ratio", sa.String(40)))
    op.add_column("ibkr_trades", sa.Column("reason", sa.String(300)))
    relax()
    if not on_sqlite():
        op.alter_column("ibkr_trades", "trade_type", type_=sa.String(10))
        for column in NULLABLE:
            op.alter_column("ibkr_trades", column, nullable=True)


def downgrade():
    of_new_kinds = "ibkr_trades WHERE trade_type NOT IN ('buy', 'sell')"
    if op.get_bind().scalar(sa.text(f"SELECT EXISTS (SELECT 1 FROM {of_new_kinds})")):
        if "lose-data" not in context.get_x_argument():
            raise CommandError(
                "This would lose splits, dividends and corrections in ibkr_trades, without which the books "
                "no longer add up. Nothing was changed; to lose them, say `-x lose-data`."
            )
        forget(of_new_kinds)
    if not on_sqlite():
        op.alter_column("ibkr_trades", "trade_type", type_=sa.String(4))
        for column in NULLABLE:
            op.alter_column("ibkr_trades", column, nullable=False)
    relax(backwards=True)
    for table, column in [
        *[("ibkr_trades", "reason"), ("ibkr_trades", "ratio")],
        *[("ibkr_balances", "acted_at"), ("ibkr_balances", "actions_seen")],
    ]:
        op.drop_column(table, column)
    op.drop_table("ibkr_corporate_actions")


def on_sqlite() -> bool:
    return op.get_context().dialect.name == "sqlite"


def limits():
    """The least amount, and what an order's and an account's stay below; SQLite has units of 10^-8."""
    dollar = 10**8 if on_sqlite() else 1
    return 1 if on_sqlite() else "0.00000001", 10_000_000_000 * dollar, 90_000_000_000 * dollar


CHECKS = [
    (
        {"trade_type": "trade_type IN ('buy', 'sell')"},
        {"trade_type": "trade_type IN ('buy', 'sell', 'split', 'dividend', 'correction')"},
    ),
    (
        {"realized_on_sell": "(trade_type = 'sell') = (realized_pnl IS NOT NULL)"},
        {
            "realized_but_on_buy": "(trade_type <> 'buy') = (realized_pnl IS NOT NULL)",
            "ordered": "(order_type IS NOT NULL) = (trade_type IN ('buy', 'sell'))",
            "priced": "(price IS NULL) = (trade_type = 'correction') "
            "AND (market_price IS NULL) = (trade_type = 'correction')",
            "explained": "(ratio IS NOT NULL) = (trade_type = 'split') "
            "AND (reason IS NOT NULL) = (trade_type = 'correction')",
        },
    ),
    (
        {"quantity": "quantity >= {unit} AND quantity < {order_limit}"},
        {
            "quantity": "(quantity >= {unit} OR trade_type = 'correction') "
            "AND quantity > -{account_limit} AND quantity < {account_limit}"
        },
    ),
    (
        {"total_amount": "total_amount >= 0 AND total_amount < {account_limit}"},
        {
            "total_amount": "(total_amount >= 0 OR trade_type = 'correction') "
            "AND total_amount > -{account_limit} AND total_amount < {account_limit}"
        },
    ),
]
"""What the trades were checked by, and are from now on."""

COLUMNS = [("trade_type VARCHAR(4) NOT NULL", "trade_type VARCHAR(10) NOT NULL")]
COLUMNS += [(f"{column} NOT NULL", column) for column in ("\torder_type VARCHAR(6)", "\tprice BIGINT")]
COLUMNS += [("\tmarket_price BIGINT NOT NULL", "\tmarket_price BIGINT")]
"""The same of their columns, in SQLite's words."""


def relax(backwards: bool = False) -> None:
    """Have the trades checked as `CHECKS` says from now on, or as before."""
    unit, order_limit, account_limit = limits()
    bounds = {"unit": unit, "order_limit": order_limit, "account_limit": account_limit}
    pairs = [
        [{f"ck_ibkr_trades_{n}": c.format(**bounds) for n, c in side.items()} for side in pair]
        for pair in CHECKS
    ]
    if not on_sqlite():
        for old, new in [pair[::-1] if backwards else pair for pair in pairs]:
            for name in old:
                op.drop_constraint(op.f(name), "ibkr_trades", type_="check")
            for name, check in new.items():
                op.create_check_constraint(op.f(name), "ibkr_trades", check)
        return
    pairs = [
        [", ".join(f"CONSTRAINT {n} CHECK ({c})" for n, c in side.items()) for side in pair] for pair in pairs
    ]
    run = op.get_bind().exec_driver_sql
    sql = run("SELECT sql FROM sqlite_master WHERE name = 'ibkr_trades'").scalar()
    for old, new in [pair[::-1] if backwards else pair for pair in [*COLUMNS, *pairs]]:
        assert sql.count(old) == 1, old
        sql = sql.replace(old, new)
    version = run("PRAGMA schema_version").scalar()
    run("PRAGMA writable_schema = ON")
    run("UPDATE sqlite_master SET sql = ? WHERE name = 'ibkr_trades'", (sql,))
    run(f"PRAGMA schema_version = {version + 1}")  # So that every connection reads it anew.
    run("PRAGMA writable_schema = OFF")
    assert run("PRAGMA integrity_check").scalar() == "ok"


def forget(kinds: str) -> None:
    """Delete those trades, which nothing else may."""
    run = op.get_bind().exec_driver_sql
    if on_sqlite():
        guard = run("SELECT sql FROM sqlite_master WHERE name = 'ibkr_trades_no_delete'").scalar()
        run("DROP TRIGGER ibkr_trades_no_delete")
        run(f"DELETE FROM {kinds}")
        run(guard)
    else:
        run("ALTER TABLE ibkr_trades DISABLE TRIGGER ibkr_trades_append_only")
        run(f"DELETE FROM {kinds}")
        run("ALTER TABLE ibkr_trades ENABLE TRIGGER ibkr_trades_append_only")
