"""Runs the migrations on the app's own engine, all of them in one transaction, on either database."""

from alembic import context
from flask import current_app

from database import transaction

db = current_app.extensions["migrate"].db


def migrate(**where) -> None:
    context.configure(target_metadata=db.metadata, transactional_ddl=True, **where)
    with context.begin_transaction():
        context.run_migrations()


if context.is_offline_mode():  # `flask --app app db upgrade --sql` prints the SQL instead of running it.
    migrate(url=db.engine.url, literal_binds=True, dialect_opts={"paramstyle": "named"})
else:
    with transaction():
        migrate(connection=db.session.connection())
