"""Quotes: what the market was said to cost, so that all processes judge by the same price.

`ibkr_market` has one row: whether this database belongs to the live or to the sample market.
"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"

AMOUNT = sa.Numeric(20, 8).with_variant(sa.BigInteger(), "sqlite")


def upgrade():
    # SQLite has no exact decimal, and keeps integers of 10^-8.
    on_sqlite = op.get_context().dialect.name == "sqlite"
    unit, dollar = (1, 10**8) if on_sqlite else ("0.00000001", 1)
    op.create_table(
        "ibkr_quotes",
        sa.Column("ticker", sa.String(20), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("price", AMOUNT, nullable=False),
        sa.Column("currency", sa.String(10)),
        sa.Column("source", sa.String(20), nullable=False),
        sa.Column("timestamp", sa.DateTime(timezone=True), nullable=False),
        sa.Column("valid_until", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("ticker", "number", name="pk_ibkr_quotes"),
        sa.CheckConstraint(
            f"price >= {unit} AND price < {10_000_000_000 * dollar}", name=op.f("ck_ibkr_quotes_price")
        ),
    )
    op.create_table(
        "ibkr_market",
        sa.Column("id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("kind", sa.String(6), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_ibkr_market"),
        sa.CheckConstraint("id = 1", name=op.f("ck_ibkr_market_one_row")),
    )


def downgrade():
    op.drop_table("ibkr_market")
    op.drop_table("ibkr_quotes")
