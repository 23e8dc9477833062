"""What the tests stand on; who plays in them is in cast.py.

A test that takes `alice` runs twice, on SQLite and on PostgreSQL, over HTTP against gunicorn with two
workers that serve the sample market. `TEST_DATABASE_URL` names a PostgreSQL of one's own; without it one
is started from the development requirements.
"""

import os
import shutil
import tempfile
import uuid
from contextlib import ExitStack
from functools import cache, partial
from pathlib import Path

import pytest
from cast import ROOT, Database, Server, Trader
from hypothesis import settings
from hypothesis.configuration import set_hypothesis_home_dir
from postgres import PostgresServer
from sqlalchemy import create_engine, text
from sqlalchemy.engine import make_url


def pytest_configure(config):
    """Hypothesis would keep what it learns in the working folder, and mind how long an example takes."""
    settings.register_profile("patient", deadline=None)
    settings.load_profile("patient")
    folder = tempfile.TemporaryDirectory(prefix="broker-hypothesis-")
    set_hypothesis_home_dir(folder.name)
    config.add_cleanup(folder.cleanup)


@pytest.fixture(scope="module")
def app():
    """The program, imported; its settings are those of the sample market."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PRICE_SOURCES", "sample")
        patch.syspath_prepend(ROOT)
        import app

        yield app


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    """A copy of the program: what it keeps under instance/, such as Yahoo's cookie, goes with it."""
    folder = tmp_path_factory.mktemp("program")
    for file in ROOT.glob("*.py"):
        shutil.copy(file, folder)
    for part in ("migrations", "sample_market", "static"):
        shutil.copytree(ROOT / part, folder / part)
    return folder


@pytest.fixture(scope="session")
def postgres():
    """The PostgreSQL server of this test run."""
    folder = Path(tempfile.mkdtemp(prefix="broker-postgres-"))
    with PostgresServer(folder, settings={"unix_socket_directories": str(folder)}) as server:
        yield server


def new_postgres_url(postgres) -> str:
    own = os.environ.get("TEST_DATABASE_URL")
    name = f"test_{uuid.uuid4().hex}"
    if not own:
        return postgres.create_database(name)
    engine = create_engine(make_url(own).set(drivername="postgresql+psycopg2"), isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    return make_url(own).set(database=name).render_as_string(hide_password=False)


@pytest.fixture(scope="session", params=["sqlite", "postgresql"])
def engine_name(request):
    return request.param


@pytest.fixture(scope="session")
def new_database_on(request):
    """Makes empty databases: `new_database_on("sqlite").migrate()`."""
    with tempfile.TemporaryDirectory() as folder:

        def new(engine_name: str) -> Database:
            if engine_name == "sqlite":
                return Database(f"sqlite:///{folder}/{uuid.uuid4().hex}.db")
            needed = None if os.environ.get("TEST_DATABASE_URL") else request.getfixturevalue("postgres")
            return Database(new_postgres_url(needed))

        yield new


@pytest.fixture(scope="session")
def new_database(new_database_on, engine_name):
    """Makes empty databases of the engine that is on test: `new_database().migrate()`."""
    return partial(new_database_on, engine_name)


@pytest.fixture(scope="session")
def broker_on(new_database_on):
    """A broker on each engine, started when it is first needed: `broker_on("sqlite").url`."""
    with ExitStack() as servers:
        yield cache(
            lambda engine_name: servers.enter_context(Server(new_database_on(engine_name).migrate().url))
        )


@pytest.fixture(scope="session")
def server(broker_on, engine_name) -> Server:
    """The broker that serves the sample market to all tests that only need some account on it."""
    return broker_on(engine_name)


@pytest.fixture(scope="session")
def database(server) -> Database:
    """The server's database."""
    return Database(server.database_url)


@pytest.fixture
def alice(server) -> Trader:
    return server.trader()


@pytest.fixture
def bob(server) -> Trader:
    return server.trader(name="bob")
