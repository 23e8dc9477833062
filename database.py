"""The database: one behaviour on PostgreSQL and on SQLite.

`db.session` is Flask-SQLAlchemy's, and `transaction` is what writes: all of its block happens, or nothing.
How connections are prepared and watched may be read last. Nothing here knows of accounts and trades.
"""

import logging
import os
import socket
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from decimal import Decimal
from functools import cache, wraps
from threading import Lock, Thread
from typing import Annotated
from weakref import WeakValueDictionary

import psycopg2.extensions
import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import BigInteger, CheckConstraint, ForeignKey
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import DeclarativeBase, mapped_column

from messages import DatabaseHealth

log = logging.getLogger(__name__)

# ------------------------------------------------------------------------------------------- Values


class ScaledInteger(sa.types.TypeDecorator):
    """A decimal as an integer of 10^-8.

    SQLite has no exact decimal: its NUMERIC is a float, and 12345678901.12345678 comes back as ...695.
    """

    impl = BigInteger
    cache_ok = True

    def process_bind_param(self, value, dialect):
        return None if value is None else int(value.scaleb(8))

    def process_result_value(self, value, dialect):
        return None if value is None else Decimal(value).scaleb(-8)


EXACT = sa.Numeric(20, 8).with_variant(ScaledInteger(), "sqlite")
"""A decimal with 8 digits behind the point."""


class UtcDateTime(sa.types.TypeDecorator):
    """A moment in UTC. SQLite keeps no time zone, so one is taken off there and put back on."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value, dialect):
        if value is None or dialect.name != "sqlite":
            return value
        return value.astimezone(UTC).replace(tzinfo=None)

    def process_result_value(self, value, dialect):
        if value is None:
            return None
        return value.astimezone(UTC) if value.tzinfo else value.replace(tzinfo=UTC)


Amount = Annotated[Decimal, mapped_column(EXACT)]
"""Dollars, with 8 decimals."""

Quantity = Annotated[Decimal, mapped_column(EXACT)]
"""Shares or coins, with 8 decimals."""

Moment = Annotated[datetime, mapped_column(UtcDateTime)]
"""A moment in UTC."""

Id = Annotated[int, mapped_column(BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True)]
"""A number that grows with each row. SQLite counts only a column that is called INTEGER."""

UserId = Annotated[int, mapped_column(ForeignKey("ibkr_users.id"))]


def within(name: str, low: Decimal | int, high: Decimal, signed_in: str | None = None) -> CheckConstraint:
    """A CHECK that `low` <= the column `name` < `high`. The upper bound also keeps NaN out.

    In trades of the type `signed_in` it may be below 0, down to -`high`.
    """
    column = sa.column(name, EXACT)
    checks = [column >= Decimal(low), column < high]
    if signed_in:
        checks = [sa.or_(checks[0], sa.column("trade_type") == signed_in), column > -high, checks[1]]
    return CheckConstraint(sa.and_(*checks), name=name)


class Base(DeclarativeBase):
    """Names every constraint, so that a migration can drop one again."""

    metadata = sa.MetaData(
        naming_convention={
            "pk": "pk_%(table_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
        }
    )


db = SQLAlchemy(model_class=Base, disable_autonaming=True, session_options={"expire_on_commit": False})
"""What was written is answered as it was written, and not read again."""


# ------------------------------------------------------------------------------------- Transactions


class OutcomeUnknown(Exception):
    """The connection was lost while COMMIT was under way: it may have happened, or not."""


TURN_SECONDS = 5
"""Nobody waits longer for those before him."""

turns: WeakValueDictionary[int | None, Lock] = WeakValueDictionary()
"""By user, and one for all that belongs to none; an entry lives as long as somebody waits or works."""


@contextmanager
def transaction(user_id: int | None = None, keep: bool = True):
    """What `db.session` does in the block happens when it ends, by `return` too; on an exception, nothing.

    Nor does anything where it is not to `keep`, for a rehearsal.

    Whoever writes to the account `user_id` waits here for those of this process that came first. They would
    wait for its lock in the database just the same, but each with a connection in his hand that others need.
    SQLite has one lock for all accounts: there everybody is in one queue.
    """
    session = db.session()
    session.close()
    to_log = session.info["to_log"] = []
    turn = turns.setdefault(user_id if db.engine.dialect.name == "postgresql" else None, Lock())
    committing = False
    if not turn.acquire(timeout=TURN_SECONDS):
        raise sa.exc.TimeoutError("Too many requests wait for this.")
    try:
        session.connection(execution_options={"begin": "BEGIN IMMEDIATE"})  # Which SQLite alone heeds.
        yield
        if keep:
            session.flush()
            committing = True
            session.commit()
            for line in to_log:
                log.info(line)
    except DBAPIError as error:
        if committing and error.connection_invalidated:
            raise OutcomeUnknown from error
        raise
    finally:
        session.close()  # What was not committed is undone.
        turn.release()


def log_once_committed(line: str) -> None:
    """One line in the log, if the transaction that is under way is committed."""
    db.session().info["to_log"].append(line)


@contextmanager
def snapshot():
    """All that `db.session` reads in the block is of one moment."""
    db.session.close()
    try:
        if db.engine.dialect.name == "postgresql":  # A transaction of SQLite is of one moment anyway.
            db.session.connection(execution_options={"isolation_level": "REPEATABLE READ"})
        yield
    finally:
        db.session.close()


TIME_LIMITS = "SET LOCAL lock_timeout = '3s'; SET LOCAL statement_timeout = '5s'"
"""How long PostgreSQL tries. Said in each transaction that locks an account: a pooler lends its connections
out for one at a time, refuses what is asked on connecting, and forgets what was set in the one before."""


@sa.event.listens_for(sa.Engine, "connect")
def prepare_connection(dbapi_connection, _):
    """PostgreSQL: somebody must watch for one that hangs.

    SQLite: WAL lets readers read while one writes, FULL has a trade on disk before it is acknowledged.
    """
    if isinstance(dbapi_connection, sqlite3.Connection):
        for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
            dbapi_connection.execute(f"PRAGMA {pragma}")
    else:
        start_watching(os.getpid())


def begin_on_sqlite(connection: sa.Connection) -> None:
    """SQLite knows no row locks: who will write takes the whole database's lock at once, by BEGIN IMMEDIATE.

    Of two that begin without it, and want to write later, one must fail.
    """
    connection.exec_driver_sql(connection.get_execution_options().get("begin", "BEGIN"))


# -------------------------------------------------------------------------------------- Connections

ANSWER_SECONDS = 6
"""How long PostgreSQL may be silent: longer than its own time limits, above."""


def use_database(app: Flask, url: str) -> None:
    """Connect `app` to the database at `url`, as SQLAlchemy writes it."""
    if url.startswith("sqlite"):
        arguments = {"timeout": 15, "isolation_level": None}  # None: `begin` says when a transaction begins.
    else:
        arguments = {
            "tcp_user_timeout": 2000,  # Milliseconds until a machine that is gone without a word is given up.
            "connect_timeout": ANSWER_SECONDS,
            "connection_factory": Watched,
            "cursor_factory": WatchedCursor,
        }
    app.config["SQLALCHEMY_DATABASE_URI"] = url
    app.config["SQLALCHEMY_ENGINE_OPTIONS"] = {
        "pool_size": 4,  # More would wait for each other in Python. Some databases let no more than 15 in.
        "max_overflow": 0,
        "pool_timeout": 3,
        "connect_args": arguments,
    }
    db.init_app(app)
    if url.startswith("sqlite"):
        with app.app_context():
            sa.event.listen(db.engine, "begin", begin_on_sqlite)


waiting: dict[psycopg2.extensions.connection, float] = {}
"""The connections that wait for PostgreSQL, and until when."""


def watched(method):
    """`method` of a connection or a cursor, which does not wait for PostgreSQL for ever.

    A server that hangs keeps its connections open, and libpq has no limit for an answer. So one thread looks
    after all that wait, and closes the connection of those that have waited too long. Psycopg's wait
    callback would need no thread, but takes Python's lock five times for each answer, where others want it.
    """

    @wraps(method)
    def waits(self, *arguments):
        connection = getattr(self, "connection", self)
        waiting[connection] = time.monotonic() + ANSWER_SECONDS
        try:
            return method(self, *arguments)
        finally:
            del waiting[connection]

    return waits


class Watched(psycopg2.extensions.connection):
    commit = watched(psycopg2.extensions.connection.commit)
    rollback = watched(psycopg2.extensions.connection.rollback)


class WatchedCursor(psycopg2.extensions.cursor):
    execute = watched(psycopg2.extensions.cursor.execute)


@cache
def start_watching(process: int) -> None:
    """Once a process: a thread does not survive a fork."""

    def watch():
        while True:
            time.sleep(0.5)
            for connection, deadline in list(waiting.items()):
                if deadline < time.monotonic():
                    with suppress(psycopg2.Error, OSError):  # It has its answer after all.
                        socket.socket(fileno=os.dup(connection.fileno())).shutdown(socket.SHUT_RDWR)

    Thread(target=watch, daemon=True).start()


READ_ONLY, NO_SUCH_NAME, NAME_IS_TAKEN, PLAN_IS_OLD = "25006", "26000", "42P05", "0A000"
"""What PostgreSQL says of itself, or of statements that were prepared."""

SERIALIZATION_FAILURE, DEADLOCK, LOCK_TIMEOUT = "40001", "40P01", "55P03"
"""And of those who want the same at once."""


def is_unusable(error: Exception) -> bool:
    """Whether the next try has to connect anew: this one met a standby, which takes no writes, or something
    that was not prepared, for a pooler has lent us another connection or a migration has changed a table."""
    return getattr(error, "pgcode", None) in (READ_ONLY, NO_SUCH_NAME, NAME_IS_TAKEN, PLAN_IS_OLD)


def lost_a_race(error: DBAPIError) -> bool:
    """Whether it met another transaction or a connection that is gone: the next try may go well."""
    lost = getattr(error.orig, "pgcode", None) in (SERIALIZATION_FAILURE, DEADLOCK, LOCK_TIMEOUT)
    return lost or error.connection_invalidated


def is_read_only(error: DBAPIError) -> bool:
    """Whether the database takes no writes: a standby, or a file that is not ours to change."""
    code = getattr(error.orig, "pgcode", None) or getattr(error.orig, "sqlite_errorname", "")
    return code == READ_ONLY or code.startswith("SQLITE_READONLY")


@sa.event.listens_for(sa.Engine, "handle_error")
def leave_the_connection(context: sa.engine.ExceptionContext) -> None:
    context.is_disconnect = context.is_disconnect or is_unusable(context.original_exception)


def as_sqlalchemy_has_it(error: Exception, connection: sa.PoolProxiedConnection | None = None) -> DBAPIError:
    """What SQLAlchemy would raise for a driver's `error`; a lost `connection` is given up, too."""
    dialect = db.engine.dialect
    lost = True  # If there was none to be had.
    if connection:
        lost = is_unusable(error) or dialect.is_disconnect(error, connection.driver_connection, None)
    if connection and lost:
        connection.invalidate(error)
        db.engine.dispose()  # Those that wait in the pool are as old.
    kind = dialect.dbapi.Error
    return DBAPIError.instance("", None, error, kind, connection_invalidated=lost, dialect=dialect)


pinging = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ping")


def database_health() -> DatabaseHealth:
    """Ping the database in a thread of its own: one that hangs must not hang this answer as well."""
    database = db.engine

    def ping() -> float:
        started = time.perf_counter()
        with database.connect() as connection:
            connection.exec_driver_sql("SELECT 1")
        return round((time.perf_counter() - started) * 1000, 2)

    answer = pinging.submit(ping)
    try:
        status, latency = "healthy", answer.result(timeout=0.5)
    except (TimeoutError, DBAPIError, sa.exc.TimeoutError):
        answer.cancel()  # If the ping before this one still hangs, this one is not needed either.
        status, latency = "unhealthy", None
    return {"status": status, "engine": database.dialect.name, "latency_ms": latency}


def database_says(error: DBAPIError) -> str:
    """The one line for whoever started the program."""
    reason = str(error.orig).splitlines()[0]
    return f"The database cannot be used (is it up to date? flask --app app db upgrade): {reason}"
