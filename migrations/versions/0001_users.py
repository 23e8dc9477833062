"""Users: who may trade. Of an API key only its SHA-256 is kept."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade():
    op.create_table(
        "ibkr_users",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("email", sa.String(254), nullable=False),
        sa.Column("api_key_hash", sa.String(64), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("closed_at", sa.DateTime(timezone=True)),
        sa.PrimaryKeyConstraint("id", name="pk_ibkr_users"),
        sa.UniqueConstraint("email", name="uq_ibkr_users_email"),
        sa.UniqueConstraint("api_key_hash", name="uq_ibkr_users_api_key_hash"),
        sqlite_autoincrement=True,
    )


def downgrade():
    op.drop_table("ibkr_users")
