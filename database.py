"""How statements reach the database: one behaviour on PostgreSQL and on SQLite.

`transaction` is all that the rest of the program needs to understand; how it is kept fast and safe, `send`
and what follows it, may be read last. Nothing here knows of accounts and trades.
"""

import hashlib
import os
import socket
import sqlite3
import time
from collections import namedtuple
from contextlib import contextmanager, suppress
from datetime import UTC
from decimal import Decimal
from functools import cache
from threading import Lock, Thread
from weakref import WeakValueDictionary

import psycopg2.extensions
import sqlalchemy as sa
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import BigInteger
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import DeclarativeBase

# ------------------------------------------------------------------------------------------- Values


class ScaledInteger(sa.types.TypeDecorator):
    """A decimal as an integer of 10^-8.

    SQLite has no exact decimal: its NUMERIC is a float, and 12345678901.12345678 comes back as ...695.
    """

    impl = BigInteger
    cache_ok = True

    def process_bind_param(self, value, dialect):
        return None if value is None else int(value.scaleb(8))

    def process_literal_param(self, value, dialect):
        return str(self.process_bind_param(value, dialect))

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


db = SQLAlchemy(model_class=Base, disable_autonaming=True)


# -------------------------------------------------------------------------------------- Connections


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


ANSWER_SECONDS = 6
"""How long PostgreSQL may be silent: longer than its own time limits, below."""


class Watched(psycopg2.extensions.cursor):
    """A cursor that does not wait for PostgreSQL for ever.

    A server that hangs keeps its connections open, and libpq has no limit for an answer. So one thread looks
    after all cursors that wait, and closes the connection of those that have waited too long. Psycopg's wait
    callback would need no thread, but takes Python's lock five times for each answer, where others want it.
    """

    waiting: dict["Watched", float] = {}

    def execute(self, *statement):
        self.waiting[self] = time.monotonic() + ANSWER_SECONDS
        try:
            return super().execute(*statement)
        finally:
            del self.waiting[self]


@cache
def start_watching(process: int) -> None:
    """Once a process: a thread does not survive a fork."""

    def watch():
        while True:
            time.sleep(0.5)
            for cursor, deadline in list(Watched.waiting.items()):
                if deadline < time.monotonic():
                    with suppress(psycopg2.Error, OSError):  # It has its answer after all.
                        socket.socket(fileno=os.dup(cursor.connection.fileno())).shutdown(socket.SHUT_RDWR)

    Thread(target=watch, daemon=True).start()


READ_ONLY, NO_SUCH_NAME, NAME_IS_TAKEN, PLAN_IS_OLD = "25006", "26000", "42P05", "0A000"


@sa.event.listens_for(sa.Engine, "handle_error")
def leave_the_connection(context):
    """Have the next try connect anew where this one met a standby, which takes no writes, or something that
    we had not prepared: a pooler has lent us another connection, or a migration has changed a table."""
    code = getattr(context.original_exception, "pgcode", None)
    if code in (NO_SUCH_NAME, NAME_IS_TAKEN):
        Prepared.is_possible = False
    if code in (READ_ONLY, NO_SUCH_NAME, NAME_IS_TAKEN, PLAN_IS_OLD):
        context.is_disconnect = True


def connected() -> sa.Connection:
    """A connection for single statements, each of which is a transaction by itself."""
    return db.engine.connect()


def send(connection: sa.Connection, *statements, **values) -> list[tuple]:
    """Execute `statements` one after the other with these `values`; answers the last one's rows.

    They are plain text, or those at the end of models.py, which every request needs: what is needed less
    often goes by `connection.execute`. PostgreSQL gets all of them in one message: on a busy account it is
    the messages to and fro that the next trade waits for.
    """
    script = [written(statement, connection.dialect) for statement in statements]
    cursor = connection.connection.cursor()
    try:
        if connection.dialect.name == "sqlite":
            for statement in script:
                cursor.execute(statement.sql, statement.bound(values))
        elif Prepared.is_possible:
            prepare(connection, script)
            cursor.execute("; ".join([statement.call for statement in script]), values)
        else:
            cursor.execute("; ".join([statement.sql for statement in script]), values)
        return script[-1].rows(cursor.fetchall()) if cursor.description else []
    except connection.dialect.dbapi.Error as error:
        # SQLAlchemy judges and raises it as if it had sent this itself. Private, but its version is pinned.
        connection._handle_dbapi_exception(error, None, None, cursor, None)


@cache
def written(statement, dialect: sa.Dialect) -> "Prepared | Converted":
    """`statement` in the words of one database; to write it takes longer than the database's answer."""
    return (Converted if dialect.name == "sqlite" else Prepared)(statement, dialect)


class Prepared:
    """A statement that PostgreSQL is told of once a connection, by PREPARE, and that is then called by name.

    PostgreSQL plans each text that it gets anew, which is most of its work on a trade; what was prepared it
    has planned. A pooler that lends another connection for each transaction makes that impossible: there the
    name may be unknown, or taken already. When that is seen, all is sent as text from then on.
    """

    is_possible = True

    def __init__(self, statement, dialect: sa.Dialect):
        if isinstance(statement, str):  # Such as BEGIN, which has no plan.
            self.sql, self.prepare, self.call = statement, None, statement
            return
        self.sql = str(statement.compile(dialect=dialect))
        numbered = statement.compile(dialect=type(dialect)(paramstyle="numeric_dollar"))
        name = "s" + hashlib.sha256(self.sql.encode()).hexdigest()[:16]
        self.prepare = f"PREPARE {name} AS {numbered}"
        self.call = f"EXECUTE {name}({', '.join(f'%({value})s' for value in numbered.positiontup)})"
        self.row = namedtuple("Row", statement.exported_columns.keys())

    def rows(self, rows: list) -> list[tuple]:
        return list(map(self.row._make, rows))


def prepare(connection: sa.Connection, script: list[Prepared]) -> None:
    """PREPARE those statements that this connection has not sent before."""
    known = connection.info.setdefault("prepared", {None})
    new = {statement.prepare for statement in script} - known
    if new:
        connection.exec_driver_sql("; ".join(new))
        known |= new


class Converted:
    """A statement for SQLite, which has no exact decimals and no time zones: the types above convert them."""

    def __init__(self, statement, dialect: sa.Dialect):
        if isinstance(statement, str):
            self.sql, self.writers = statement, {}
            return
        compiled = statement.compile(dialect=type(dialect)(paramstyle="named"))
        columns = statement.exported_columns
        self.sql = str(compiled)
        self.row = namedtuple("Row", columns.keys())
        kinds = {name: bind.type.dialect_impl(dialect) for name, bind in compiled.binds.items()}
        self.writers = {name: kind.bind_processor(dialect) or as_it_is for name, kind in kinds.items()}
        kinds = [column.type.dialect_impl(dialect) for column in columns]
        self.readers = [kind.result_processor(dialect, None) or as_it_is for kind in kinds]

    def bound(self, values: dict) -> dict:
        return {name: write(values[name]) for name, write in self.writers.items()}

    def rows(self, rows: list) -> list[tuple]:
        return [self.row(*(read(v) for read, v in zip(self.readers, row, strict=True))) for row in rows]


def as_it_is(value):
    return value


# ------------------------------------------------------------------------------------- Transactions


LIMITS = "SET LOCAL lock_timeout = '3s'; SET LOCAL statement_timeout = '5s'"
"""How long PostgreSQL tries. Said in each transaction: a pooler lends its connections out for one at a time,
refuses what is asked on connecting, and forgets what was set in the transaction before."""

BEGIN = {"postgresql": f"BEGIN; {LIMITS}", "sqlite": "BEGIN IMMEDIATE"}
"""How a transaction that may write begins. SQLite knows no row locks: this takes the whole database's lock
at once, for of two that begin without it, and want to write later, one must fail."""

SNAPSHOT = {"postgresql": f"BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; {LIMITS}", "sqlite": "BEGIN"}
"""How one begins that reads several times and sees the same moment each time."""


class OutcomeUnknown(Exception):
    """The connection was lost while COMMIT was under way: it may have happened, or not."""


@contextmanager
def transaction(*first, begin=BEGIN, **values):
    """All statements of the block happen when it ends, or, on any exception, not one.

    Yields the connection, and the rows of the last of the `first` statements, which are sent along with
    the BEGIN. The block may `commit` itself, with its last writes. The engine is in AUTOCOMMIT, so that
    single statements need none of this.
    """
    with db.engine.connect() as connection:
        try:
            rows = send(connection, begin[connection.dialect.name], *first, **values)
            yield connection, rows
            if is_open(connection):
                commit(connection)
        except BaseException:
            roll_back(connection)
            raise


def is_open(connection: sa.Connection) -> bool:
    """Whether the transaction still waits for its COMMIT, as the driver knows it."""
    driver = connection.connection.dbapi_connection
    if connection.dialect.name == "sqlite":
        return driver.in_transaction
    return driver.get_transaction_status() != psycopg2.extensions.TRANSACTION_STATUS_IDLE


def commit(connection: sa.Connection, *writes, then=(), **values) -> list[tuple]:
    """Send the last `writes` of the transaction with its COMMIT, `then` what reads their outcome."""
    try:
        return send(connection, *writes, "COMMIT", *then, **values)
    except DBAPIError as error:
        if error.connection_invalidated:
            raise OutcomeUnknown from error
        raise


def roll_back(connection: sa.Connection) -> None:
    """Undo what the transaction has done. A connection that cannot is closed, which undoes it as well."""
    if not connection.invalidated:
        try:
            connection.exec_driver_sql("ROLLBACK")
        except DBAPIError:
            connection.invalidate()


TURN_SECONDS = 5
"""Nobody waits longer for the trades before his own."""

turns = WeakValueDictionary()


@contextmanager
def turn(user_id: int):
    """Wait until the requests of this process that came first are done with the account.

    They would wait for its lock in the database just the same, but each with a connection in its hand
    that others need. SQLite has one lock for all accounts: there everybody is in one queue.
    """
    lock = turns.setdefault(user_id if db.engine.dialect.name == "postgresql" else None, Lock())
    if not lock.acquire(timeout=TURN_SECONDS):
        raise sa.exc.TimeoutError("Too many requests wait for this.")
    try:
        yield
    finally:
        lock.release()
