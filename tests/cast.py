"""Who plays in the tests: real servers on real databases, and people who trade on them."""

import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from contextlib import contextmanager
from decimal import Decimal
from functools import cached_property, partial
from pathlib import Path
from threading import Thread

import psutil
import pytest
import requests
import simplejson
from postgres import signal_each
from sqlalchemy import create_engine, text
from sqlalchemy.engine import make_url
from urllib3 import Retry
from werkzeug.serving import WSGIRequestHandler, make_server
from witness import Witness

ROOT = Path(__file__).parent.parent
ADMIN = "the-admin-key-of-the-tests"
SETTINGS = {
    line.removeprefix("# ").split("=")[0]
    for line in (ROOT / ".env.example").read_text().splitlines()
    if "=" in line and line.removeprefix("# ").split("=")[0].isupper()
}

WITNESSES: dict[frozenset, Witness] = {}


def environment(**settings) -> dict:
    """This process's environment with these settings and no others, whatever .env says."""
    kept = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    return kept | dict.fromkeys(SETTINGS, "") | {name: str(value) for name, value in settings.items()}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def wait_for_a_whole_minute(seconds=10) -> None:
    """Wait for the next one, where this one ends soon: prices change with it, and may fill or end orders."""
    left = 60 - time.time() % 60
    time.sleep(left if left < seconds else 0)


@contextmanager
def loaded(**settings):
    """What app.py makes of these settings, in this process: a new one takes a second to load the program."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT)
        for name, value in environment(**settings).items():
            patch.setenv(name, value)
        yield runpy.run_path(str(ROOT / "app.py"), run_name="app")


@contextmanager
def in_process(trader: "Trader", **settings):
    """The program in this process, beside the trader's server, and `ask(method, path, ...)` to ask it."""
    settings |= {"DATABASE_URL": trader.server.database_url, "PRICE_SOURCES": "sample"}
    with loaded(**settings) as program:
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
            # In some minutes of its round the running clock passes a dividend: tests of other things are not
            # to depend on when they run.
            "CORPORATE_ACTIONS": "off",
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

    @cached_property
    def witness(self) -> Witness:
        """Holds each answer to this server's own description.

        To describe itself takes a server half a second, so those with the same settings share a witness:
        which answers there are does not depend on where the database and the server are.
        """
        where = "DATABASE_URL", "PORT"
        kind = frozenset((name, str(value)) for name, value in self.settings.items() if name not in where)
        if kind not in WITNESSES:
            WITNESSES[kind] = Witness(requests.get(f"{self.url}/openapi.json", timeout=30).json())
        return WITNESSES[kind]

    def trader(self, cash="100000", name="alice") -> "Trader":
        """Somebody with a new account."""
        email = f"{name}-{uuid.uuid4().hex[:12]}@example.com"
        answer = requests.post(
            f"{self.url}/api/v1/users",
            json={"email": email, "cash": cash},
            headers={"Authorization": f"Bearer {ADMIN}"},
            timeout=30,
        )
        self.witness.hears(answer)
        assert answer.status_code == 201, answer.text
        return Trader(self, email, answer.json()["api_key"], answer.json()["user_id"])


class Here(Server):
    """The broker in this process, behind the web server of `python app.py`.

    It begins in a tenth of a second, where processes of its own take two: for what depends on settings and
    files, not on several processes or on how one ends.
    """

    def start(self) -> "Here":
        with loaded(**self.settings) as self.program:
            make = partial(make_server, "127.0.0.1", self.port, self.program["app"])
        self.http = make(threaded=True, request_handler=Quiet)
        Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def stop(self) -> None:
        self.http.shutdown()
        self.http.server_close()
        with self.program["app"].app_context():
            self.program["db"].engine.dispose()


class Quiet(WSGIRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_request(self, *_):
        """The program has a line of its own for each request."""


class Trader:
    """A person (or a bot) with an account, who speaks to the broker over HTTP."""

    def __init__(self, server: Server, email: str, key: str, user_id: int):
        self.server, self.email, self.key, self.user_id = server, email, key, user_id
        self.heard = set()  # Which answers of the description, by path, method and status.
        self.session = requests.Session()
        self.session.headers["Authorization"] = f"Bearer {key}"
        # A server may close a connection that it keeps alive, after a 413 say; a GET is then sent again.
        # An answer is taken as it is, whatever its Retry-After says.
        again = Retry(connect=0, read=2, respect_retry_after_header=False)
        self.session.mount("http://", requests.adapters.HTTPAdapter(max_retries=again))

    def ask(self, method: str, path: str, **options) -> requests.Response:
        """Ask and hear the answer, which must be as the server describes it."""
        response = self.session.request(method, f"{self.server.url}{path}", timeout=60, **options)
        self.heard.add(self.server.witness.hears(response))
        return response

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

    def asks_for(self, action, quantity, ticker, order_type="limit", key=None, fault=None, **prices):
        """Place an order that may rest and answer the raw response."""
        order = {"ticker": ticker, "action": action, "quantity": quantity, "order_type": order_type}
        headers = {"Idempotency-Key": key, "X-Simulate-Fault": fault}
        headers = {name: value for name, value in headers.items() if value}
        return self.ask("POST", "/api/v1/orders", json=order | prices, headers=headers)

    def rests(self, action, quantity, ticker, order_type="limit", **prices) -> dict:
        """Place an order, which is taken, and answer it."""
        placed = self.asks_for(action, quantity, ticker, order_type, **prices)
        assert placed.status_code == 201, placed.text
        return exact(placed)

    def buys(self, quantity, ticker, at=None, **options):
        return exact(self.order("buy", quantity, ticker, at, **options))

    def sells(self, quantity, ticker, at=None, **options):
        return exact(self.order("sell", quantity, ticker, at, **options))

    def places(self, action, quantity, ticker, order_type, key=None, **more):
        """Place an order that may wait, and answer it, or why not."""
        order = {"ticker": ticker, "action": action, "quantity": str(quantity), "order_type": order_type}
        headers = {"Idempotency-Key": key} if key else {}
        return exact(self.ask("POST", "/api/v1/orders", json=order | more, headers=headers))

    def cancels(self, order: dict):
        return exact(self.ask("DELETE", f"/api/v1/orders/{order['id']}"))

    def replaces(self, order: dict, **changes):
        return exact(self.ask("PATCH", f"/api/v1/orders/{order['id']}", json=changes))

    def finds(self, order: dict) -> dict:
        """How an order stands by now."""
        return self.get(f"/api/v1/orders/{order['id']}")

    def goes_to(self, moment: str) -> "Trader":
        """Stop the clock at a recorded time."""
        answer = self.ask("PUT", "/api/v1/market/clock", json={"at": moment})
        assert answer.status_code == 200, answer.text
        return self

    def advances(self, bars=1, **more) -> dict:
        return exact(self.ask("POST", "/api/v1/market/advance", json={"bars": bars} | more))

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
    def orders(self) -> list[dict]:
        """Every order of this run, closed ones too, the newest first."""
        orders, cursor = [], {}
        while cursor is not None:
            page = self.get("/api/v1/orders", status="all", limit=500, **cursor)
            orders += page["orders"]
            cursor = page["next_cursor"] and {"cursor": page["next_cursor"]}
        return orders

    @property
    def books(self) -> tuple:
        """All that a refused request must leave as it was."""
        return self.get("/api/v1/balance"), self.holdings, self.trades, self.orders

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
