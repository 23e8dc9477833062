"""What recorded time each account's clock has passed; of those that there are, from now on."""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"

ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade():
    op.create_table(
        "ibkr_stretches",
        sa.Column("id", ID, nullable=False),
        sa.Column("user_id", ID, nullable=False),
        sa.Column("run", sa.Integer(), nullable=False),
        sa.Column("first_bar", sa.DateTime(timezone=True)),
        sa.Column("last_bar", sa.DateTime(timezone=True)),
        sa.Column("begun_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_ibkr_stretches"),
        sa.ForeignKeyConstraint(["user_id"], ["ibkr_users.id"], name="fk_ibkr_stretches_user_id"),
        sa.CheckConstraint(
            "(first_bar IS NULL) = (last_bar IS NULL)", name=op.f("ck_ibkr_stretches_both_or_none")
        ),
        sa.CheckConstraint("first_bar <= last_bar", name=op.f("ck_ibkr_stretches_in_order")),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_ibkr_stretches_user_id_run_id", "ibkr_stretches", ["user_id", "run", "id"])
    op.execute(
        "INSERT INTO ibkr_stretches (user_id, run, first_bar, last_bar, begun_at) "
        "SELECT user_id, run, market_clock, market_clock, CURRENT_TIMESTAMP FROM ibkr_balances"
    )


def downgrade():
    op.drop_table("ibkr_stretches")
