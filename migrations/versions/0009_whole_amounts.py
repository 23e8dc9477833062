"""Whole amounts: SQLite takes no fraction of 10^-8 any more. PostgreSQL's NUMERIC has none.

Triggers, no CHECKs: to add a CHECK to a table of SQLite is to make it anew, with its other CHECKs, its
triggers and the next of its ids, and to copy every trade. What is text or a blob the bounds keep out already,
as it sorts above every number.
"""

from alembic import op

revision = "0009"
down_revision = "0008"

AMOUNTS = {
    "ibkr_balances": ["cash_balance", "starting_cash"],
    "ibkr_stock_balances": ["quantity", "cost_basis"],
    "ibkr_trades": [
        *("quantity", "price", "total_amount", "commission", "realized_pnl", "cash_after", "market_price")
    ],
    "ibkr_quotes": ["price"],
    "ibkr_runs": ["starting_cash", "cash_balance"],
    "ibkr_pins": ["price"],
}


def upgrade():
    if op.get_context().dialect.name == "sqlite":
        for table, columns in AMOUNTS.items():
            broken = " OR ".join(f"typeof(NEW.{column}) NOT IN ('integer', 'null')" for column in columns)
            for change in ("INSERT", "UPDATE"):
                op.execute(
                    f"CREATE TRIGGER {table}_whole_on_{change.lower()} BEFORE {change} ON {table} "
                    f"WHEN {broken} BEGIN SELECT RAISE(ABORT, 'amounts are integers of 10^-8'); END"
                )


def downgrade():
    if op.get_context().dialect.name == "sqlite":
        for table in AMOUNTS:
            for change in ("insert", "update"):
                op.execute(f"DROP TRIGGER {table}_whole_on_{change}")
