"""What the tests stand on: real servers on real databases, and people who trade on them.

A test that takes `alice` runs twice, on SQLite and on PostgreSQL, over HTTP against gunicorn with two
workers that serve the sample market. `TEST_DATABASE_URL` names a PostgreSQL of one's own; without it one
is started from the development requirements.
"""

import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from contextlib import ExitStack, contextmanager
from decimal import Decimal
from fcntl import LOCK_EX, LOCK_SH, LOCK_UN, flock
from functools import cache, partial
from pathlib import Path

import psutil
import pytest
import requests
import simplejson
from postgres import PostgresServer, signal_each
from sqlalchemy import create_engine, text
from sqlalchemy.engine import make_url
from urllib3 import Retry

ROOT = Path(__file__).parent.parent
ADMIN = "the-admin-key-of-the-tests"
SETTINGS = {
    line.removeprefix("# ").split("=")[0]
    for line in (ROOT / ".env.example").read_text().splitlines()
    if "=" in line and line.removeprefix("# ").split("=")[0].isupper()
}


LONGEST = "prices faults dashboard openapi deploy commands public races high_availability input".split()
"""Of the files that are run side by side these begin first, so that none is left over at the end."""

GATE, ROOM = (open(ROOT / name) for name in ("pyproject.toml", "README.md"))  # Any two files to lock will do.


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    rank = {f"test_{name}": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(LONGEST)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """While a test that is marked `alone` runs, the other processes of the test run wait: it measures."""
    flock(GATE, LOCK_EX)  # Whoever waits for the room keeps those who come later from it.
    flock(ROOM, LOCK_EX if item.get_closest_marker("alone") else LOCK_SH)
    flock(GATE, LOCK_UN)
    try:
        return (yield)
    finally:
        flock(ROOM, LOCK_UN)


def environment(**settings) -> dict:
    """This process's environment with these settings and no others, whatever .env says."""
    kept = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    return kept | dict.fromkeys(SETTINGS, "") | {name: str(value) for name, value in settings.items()}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextmanager
def loaded(**settings):
    """What app.py makes of these settings, in this process: a new one takes a second to load the program."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT)
        for name, value in environment(**settings).items():
            patch.setenv(name, value)
        yield runpy.run_path(str(ROOT / "app.py"), run_name="app")


@contextmanager
def in_process(trader: "Trader"):
    """The program in this process, beside the trader's server, and `ask(method, path, ...)` to ask it."""
    with loaded(DATABASE_URL=trader.server.database_url, PRICE_SOURCES="sample") as program:
        client, key = program["app"].test_client(), {"Authorization": f"Bearer {trader.key}"}

        def ask(method: str, path: str, headers=None, **options):
            return client.open(path, method=method, headers=key | (headers or {}), **options)

        yield program, ask
        with program["app"].app_context():
            program["db"].engine.dispose()


def flask(*arguments: str, **settings) -> subprocess.CompletedProcess:
    """`flask --app app ARGUMENTS`."""
    with loaded(**settings) as program:
        done = program["app"].test_cli_runner().invoke(args=arguments)
        with program["app"].app_context():
            program["db"].engine.dispose()
    return subprocess.CompletedProcess(arguments, done.exit_code, done.stdout, done.stderr)


class Server:
    """The broker in processes of its own: gunicorn, or `python app.py` where `command` says so."""

    def __init__(self, database_url: str, *, workers=2, threads=16, command=None, **settings):
        self.database_url, self.port = database_url, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.settings = {
            "DATABASE_URL": database_url,
            "PRICE_SOURCES": "sample",
            "ADMIN_API_KEY": ADMIN,
            "RATE_LIMIT": "1000000000 per day",
            "PORT": self.port,
        } | settings
        options = ["--bind", f"127.0.0.1:{self.port}", "--workers", str(workers), "--threads", str(threads)]
        self.command = command or [
            *(sys.executable, "-m", "gunicorn", "app:app", "--worker-class", "gthread"),
            *("--no-control-socket", "--log-level", "warning", "--graceful-timeout", "5"),
            *("--keep-alive", "60", *options),
        ]
        self.folder = ROOT
        self.output = tempfile.TemporaryFile("a+")
        self.process = None

    def start(self) -> "Server":
        self.process = subprocess.Popen(
            self.command,
            cwd=self.folder,
            env=environment(**self.settings),
            stdout=self.output,
            stderr=subprocess.STDOUT,
        )
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                requests.get(f"{self.url}/health", timeout=5)
                return self
            except (requests.ConnectionError, requests.Timeout):
                time.sleep(0.05)
        self.stop()
        raise RuntimeError(f"The server did not start:\n{self.log()}")

    def stop(self) -> None:
        """End it at once; how it ends in peace, which takes longer, is a test of its own."""
        if self.process and self.process.poll() is None:
            parent = psutil.Process(self.process.pid)
            signal_each(signal.SIGKILL, [parent, *parent.children(recursive=True)])
            self.process.wait()

    def log(self) -> str:
        self.output.seek(0)
        return self.output.read()

    def __enter__(self):
        return self.start()

    def __exit__(self, *_):
        self.stop()

    def trader(self, cash="100000", name="alice") -> "Trader":
        """Somebody with a new account."""
        email = f"{name}-{uuid.uuid4().hex[:12]}@example.com"
        answer = requests.post(
            f"{self.url}/api/v1/users",
            json={"email": email, "cash": cash},
            headers={"Authorization": f"Bearer {ADMIN}"},
            timeout=30,
        )
        assert answer.status_code == 201, answer.text
        return Trader(self, email, answer.json()["api_key"], answer.json()["user_id"])


class Trader:
    """A person (or a bot) with an account, who speaks to the broker over HTTP."""

    def __init__(self, server: Server, email: str, key: str, user_id: int):
        self.server, self.email, self.key, self.user_id = server, email, key, user_id
        self.session = requests.Session()
        self.session.headers["Authorization"] = f"Bearer {key}"
        # A server may close a connection that it keeps alive, after a 413 say; a GET is then sent again.
        # An answer is taken as it is, whatever its Retry-After says.
        again = Retry(connect=0, read=2, respect_retry_after_header=False)
        self.session.mount("http://", requests.adapters.HTTPAdapter(max_retries=again))

    def ask(self, method: str, path: str, **options) -> requests.Response:
        return self.session.request(method, f"{self.server.url}{path}", timeout=60, **options)

    def get(self, path: str, **parameters):
        """The JSON at `path`, its numbers as exact Decimals."""
        return exact(self.ask("GET", path, params=parameters))

    def order(self, action, quantity, ticker, at=None, key=None, fault=None, **options):
        """Send an order and answer the raw response."""
        order = {"ticker": ticker, "action": action, "quantity": str(quantity)}
        headers = {"Idempotency-Key": key, "X-Simulate-Fault": fault}
        return self.ask(
            "POST",
            "/api/v1/trade",
            json=order | ({} if at is None else {"price": str(at)}),
            headers={name: value for name, value in headers.items() if value},
            **options,
        )

    def buys(self, quantity, ticker, at=None, **options):
        return exact(self.order("buy", quantity, ticker, at, **options))

    def sells(self, quantity, ticker, at=None, **options):
        return exact(self.order("sell", quantity, ticker, at, **options))

    def sees(self, ticker, at) -> "Trader":
        """Pin the price that the market asks of this trader."""
        answer = self.ask("PUT", f"/api/v1/market/prices/{ticker}", json={"price": str(at)})
        assert answer.status_code == 200, answer.text
        return self

    @property
    def cash(self) -> Decimal:
        return self.get("/api/v1/balance")["cash_balance"]

    @property
    def portfolio(self) -> dict:
        return self.get("/api/v1/portfolio")

    @property
    def holdings(self) -> dict:
        """Quantity and cost basis of each ticker."""
        return {h["ticker"]: (h["quantity"], h["cost_basis"]) for h in self.portfolio["holdings"]}

    @property
    def trades(self) -> list[dict]:
        return self.get("/api/v1/trades", limit=500)["trades"]

    @property
    def books(self) -> tuple:
        """All that a refused request must leave as it was."""
        return self.cash, self.holdings, self.trades

    def audit(self) -> dict:
        return self.get("/api/v1/account/audit")


def exact(response: requests.Response):
    """The JSON of a response, its numbers as Decimals with the very digits that were sent."""
    document = simplejson.loads(response.text, parse_int=Decimal, parse_float=Decimal)
    if isinstance(document, dict) and "code" in document:
        assert response.headers["Content-Type"] == "application/problem+json"
        assert document["status"] == response.status_code
    return document


class Database:
    """A new, migrated database on one of the two engines, and a way to look into it."""

    def __init__(self, url: str):
        self.url = url
        scheme = make_url(url)
        if scheme.drivername == "postgresql":
            scheme = scheme.set(drivername="postgresql+psycopg2")
        self.engine = create_engine(scheme)

    def migrate(self) -> "Database":
        done = flask("db", "upgrade", DATABASE_URL=self.url)
        assert done.returncode == 0, done.stderr
        return self

    def run(self, statement: str, **values):
        """Execute one statement behind the broker's back."""
        with self.engine.begin() as connection:
            result = connection.execute(text(statement), values)
            return result.all() if result.returns_rows else result.rowcount


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
