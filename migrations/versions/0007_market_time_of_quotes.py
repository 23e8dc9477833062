"""When a quote's source last saw its price, and why nothing is bought at it, if so."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade():
    op.add_column("ibkr_quotes", sa.Column("market_time", sa.DateTime(timezone=True)))
    op.add_column("ibkr_quotes", sa.Column("refusal", sa.String(20)))


def downgrade():
    op.drop_column("ibkr_quotes", "refusal")
    op.drop_column("ibkr_quotes", "market_time")
