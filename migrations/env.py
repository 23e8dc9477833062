"""Runs the migrations on the app's own engine, all of them in one transaction, on either database.

One that would lose accounts or trades is refused, unless somebody says so:
`flask --app app db downgrade -x lose-data base`.
"""

import sqlalchemy as sa
from alembic import context
from alembic.util import CommandError
from flask import current_app

from database import transaction

db = current_app.extensions["migrate"].db

PRICES = {"ibkr_market", "ibkr_quotes", "ibkr_corporate_actions"}
"""Tables that hold nothing of anybody's account, and so may go."""


def migrate(**where) -> None:
    context.configure(target_metadata=db.metadata, transactional_ddl=True, **where)
    with context.begin_transaction():
        context.run_migrations()


def tables_with_rows(connection: sa.Connection) -> set[str]:
    tables = [name for name in sa.inspect(connection).get_table_names() if name.startswith("ibkr_")]
    return {name for name in tables if connection.scalar(sa.text(f"SELECT EXISTS (SELECT 1 FROM {name})"))}


if context.is_offline_mode():  # `flask --app app db upgrade --sql` prints the SQL instead of running it.
    migrate(url=db.engine.url, literal_binds=True, dialect_opts={"paramstyle": "named"})
else:
    with transaction():
        connection = db.session.connection()
        needed = tables_with_rows(connection) - PRICES
        migrate(connection=connection)
        # Compared afterwards, so that no migration has to say what it drops; the exception brings it back.
        lost = needed - set(sa.inspect(connection).get_table_names())
        if lost and "lose-data" not in context.get_x_argument():
            raise CommandError(
                f"This would lose what is in {', '.join(sorted(lost))}. Nothing was changed; "
                "to lose it, say `-x lose-data`."
            )
