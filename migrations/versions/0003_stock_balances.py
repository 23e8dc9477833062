"""Stock balances: what each user holds, and what it cost."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"

AMOUNT = sa.Numeric(20, 8).with_variant(sa.BigInteger(), "sqlite")


def upgrade():
    # SQLite has no exact decimal, and keeps integers of 10^-8.
    on_sqlite = op.get_context().dialect.name == "sqlite"
    unit, dollar = (1, 10**8) if on_sqlite else ("0.00000001", 1)
    limit = 90_000_000_000 * dollar
    op.create_table(
        "ibkr_stock_balances",
        sa.Column("user_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("ticker", sa.String(20), nullable=False),
        sa.Column("quantity", AMOUNT, nullable=False),
        sa.Column("cost_basis", AMOUNT, nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("user_id", "ticker", name="pk_ibkr_stock_balances"),
        sa.ForeignKeyConstraint(["user_id"], ["ibkr_users.id"], name="fk_ibkr_stock_balances_user_id"),
        sa.CheckConstraint(
            f"quantity >= {unit} AND quantity < {limit}", name=op.f("ck_ibkr_stock_balances_quantity")
        ),
        sa.CheckConstraint(
            f"cost_basis >= 0 AND cost_basis < {limit}", name=op.f("ck_ibkr_stock_balances_cost_basis")
        ),
    )


def downgrade():
    op.drop_table("ibkr_stock_balances")
