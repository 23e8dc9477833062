"""A pooler between the broker and PostgreSQL, and a standby that takes over: nothing acknowledged is lost.

All settings are read off docs/high-availability.md, so what it prints is what is tested.
"""

import configparser
import re
import shutil
import socket
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
from cast import ROOT, Database, Server, flask
from postgres import COPY, PostgresServer, free_port
from sqlalchemy import text
from test_deploy import program_named
from test_faults import eventually, under_load
from test_races import at_once, copies, outcomes

PAGE = (ROOT / "docs" / "high-availability.md").read_text()


def printed(title: str) -> str:
    """The block of the page whose first line is the comment `title`."""
    return re.search(rf"^```\w+\n(?:#|--) {title}\n(.*?)^```", PAGE, re.M | re.S)[1]


ONE_OR_TWO, POOLED = re.findall(r"^DATABASE_URL=(\S+)$", PAGE, re.M)


def one_or_two(one: int, two: int) -> str:
    """The page's URL of two servers, at these ports."""
    return ONE_OR_TWO.replace("one:5432", f"127.0.0.1:{one}").replace("two:5432", f"127.0.0.1:{two}")


# PgBouncer


class PgBouncer:
    """Debian's PgBouncer with the page's settings, between the broker and `postgres`."""

    def __init__(self, program: str, postgres: PostgresServer):
        self.program, self.port, self.process = program, free_port(), None
        self.run_as = postgres.run_as  # PgBouncer refuses to run as root, too.
        self.folder = Path(tempfile.mkdtemp(prefix="broker-pgbouncer-"))
        self.folder.chmod(0o755)
        users = self.folder / "userlist.txt"
        users.write_text('"broker" "secret"\n')
        settings = configparser.ConfigParser()
        settings.read_string(printed("pgbouncer.ini"))
        here = {"listen_port": self.port, "auth_file": users, "unix_socket_dir": ""}
        settings.read_dict(
            {"databases": {"broker": f"host=127.0.0.1 port={postgres.port}"}, "pgbouncer": here}
        )
        with (self.folder / "pgbouncer.ini").open("w") as file:
            settings.write(file)

    def start(self) -> "PgBouncer":
        command = [self.program, "--quiet", self.folder / "pgbouncer.ini"]
        self.process = subprocess.Popen(command, stderr=subprocess.DEVNULL, **self.run_as)
        eventually(self.listens)
        return self

    def listens(self) -> bool:
        with socket.socket() as caller:
            return caller.connect_ex(("127.0.0.1", self.port)) == 0

    def kill(self):
        self.process.kill()
        self.process.wait()

    def __enter__(self):
        return self.start()

    def __exit__(self, *_):
        self.kill()
        shutil.rmtree(self.folder)


@pytest.fixture(scope="module")
def pooler(postgres):
    with PgBouncer(program_named("pgbouncer"), postgres) as pooler:
        yield pooler


@pytest.fixture(scope="module")
def behind(pooler, postgres):
    """The database behind the pooler, looked at directly; its tables were made through the pooler."""
    postgres.execute("CREATE ROLE broker LOGIN")
    postgres.execute("CREATE DATABASE broker OWNER broker")
    behind = Database(postgres.url("broker").replace("postgres@", "broker@"))
    yield behind
    behind.engine.dispose()


@pytest.fixture(scope="module")
def pooled(pooler, behind):
    url = POOLED.replace("6432", str(pooler.port))
    Database(url).migrate()
    with Server(url) as server:
        yield server


def test_through_a_pooler_one_trades_as_without_it(pooled):
    alice = pooled.trader().sees("AAPL", at=100)
    alice.buys(3, "AAPL", at=101, key="k")
    assert alice.order("buy", 3, "AAPL", 101, key="k").headers["Idempotent-Replayed"] == "true"
    alice.sells(1, "AAPL")
    assert (alice.cash, alice.holdings) == (99797, {"AAPL": (2, 202)})
    assert alice.audit() == {"ok": True, "trades": 2, "differences": []}
    assert alice.ask("POST", "/api/v1/account/reset", json={"cash": 5}).json()["run"] == 2
    assert alice.get("/api/v1/account/history", run=1)["summary"]["trades"] == 2


def test_a_connection_that_has_forgotten_what_was_prepared_is_no_fault(pooled):
    with Server(pooled.database_url, workers=1) as server:
        alice = server.trader()
        for number in range(4):
            assert alice.order("buy", 1, "AAPL", key=str(number)).status_code == 200
            Database(server.database_url).run(
                "DEALLOCATE ALL"
            )  # On the connection that the pooler has used last.
        assert len(alice.trades) == 4


def test_of_fifty_buys_through_a_pooler_with_cash_for_one_one_is_booked(pooled):
    alice = pooled.trader(cash=100).sees("AAPL", at=100)
    responses = at_once(copies(alice), lambda a, _: a.order("buy", 1, "AAPL"))
    assert outcomes(responses) == {200: 1, "insufficient_funds": 49}
    assert (alice.cash, alice.holdings) == (0, {"AAPL": (1, 100)})
    assert alice.audit()["ok"]


def test_the_limit_for_a_lock_holds_through_a_pooler(pooled, behind):
    alice = pooled.trader().sees("AAPL", at=100)
    with behind.engine.connect() as elsewhere:
        lock = text("SELECT * FROM ibkr_balances WHERE user_id = :id FOR UPDATE")
        elsewhere.execute(lock, {"id": alice.user_id})
        refused = alice.order("buy", 1, "AAPL")
    assert (refused.status_code, refused.json()["code"]) == (503, "database_unavailable")
    assert 3 <= refused.elapsed.total_seconds() < 3.9


def test_a_commit_whose_answer_is_lost_behind_a_pooler_ends_in_the_truth(pooled, postgres):
    alice = pooled.trader().sees("AAPL", at=1)

    def wait_for(standby: str):
        postgres.execute(f"ALTER SYSTEM SET synchronous_standby_names = '{standby}'")
        postgres.execute("SELECT pg_reload_conf()")
        time.sleep(0.3)

    wait_for("nobody")  # A COMMIT is then done, and not answered.
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(alice.order, "buy", 1, "AAPL")
        cut = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
        try:
            eventually(lambda: postgres.execute(cut))
        finally:
            wait_for("")
        assert asked.result().status_code == 200
    assert [trade["id"] for trade in alice.trades] == [asked.result().json()["id"]]


def test_no_trade_is_lost_when_a_pooler_dies(pooled, pooler):
    with under_load(pooled.trader().sees("AAPL", at=1)):
        pooler.kill()
        pooler.start()


# A standby


class Pair:
    """Two servers, `one` and `two`: a primary and a standby, which may change places."""

    def __init__(self, servers: ExitStack):
        self.servers, self.ports = servers, {"one": free_port(), "two": free_port()}
        self.primary, self.standby = self.start("one", PostgresServer), None
        self.primary.execute("CREATE ROLE broker LOGIN")
        self.primary.execute("CREATE DATABASE broker OWNER broker")
        self.url = one_or_two(**self.ports)
        hosts = "&".join(f"host=127.0.0.1:{port}" for port in self.ports.values())
        self.url_of_sqlalchemy = f"postgresql://broker:secret@/broker?{hosts}&target_session_attrs=read-write"

    def start(self, name: str, make, *primary) -> PostgresServer:
        settings = dict(line.split(" = ") for line in printed("postgresql.conf").splitlines())
        folder = Path(tempfile.mkdtemp(prefix=f"broker-{name}-"))
        options = {"port": self.ports[name], "settings": settings | {"cluster_name": name}}
        return self.servers.enter_context(make(*primary, folder, **options))

    def has_a_standby(self) -> None:
        """Make a standby, where the old primary was, if none is left."""
        if not self.standby:
            (name,) = self.ports.keys() - {self.primary.settings["cluster_name"]}
            self.standby = self.start(name, PostgresServer.standby_of, self.primary)
            follows = printed("on the primary, once the standby follows it").replace("two", name)
            self.run(follows, self.primary)
            in_step = "SELECT 1 FROM pg_stat_replication WHERE sync_state = 'sync'"
            eventually(lambda: self.primary.execute(in_step))

    def take_over(self) -> None:
        self.run(printed("on the standby, once the old primary is dead"), self.standby)
        self.primary, self.standby = self.standby, None

    @staticmethod
    def run(block: str, server: PostgresServer) -> None:
        for statement in block.strip().rstrip(";").split(";"):
            server.execute(statement)


@pytest.fixture(scope="module")
def pair():
    with ExitStack() as servers:
        yield Pair(servers)


@pytest.fixture(scope="module")
def server(pair):
    Database(pair.url_of_sqlalchemy).migrate()
    with Server(pair.url) as server:
        yield server


def test_a_standby_takes_over_and_every_acknowledged_trade_is_there_once(pair, server):
    pair.has_a_standby()
    alice, bob = (server.trader(name=name).sees("AAPL", at=1) for name in ("alice", "bob"))
    with under_load(alice), under_load(bob):
        pair.standby.crash()  # Whatever is acknowledged from here on will be lost.
        time.sleep(1)
        pair.primary.crash()
        pair.standby.start()
        pair.take_over()
    audit = flask("audit", DATABASE_URL=pair.url_of_sqlalchemy, PRICE_SOURCES="sample")
    assert (audit.returncode, audit.stdout.split(", ")[1]) == (0, "0 differences.\n")


def test_a_primary_that_lives_on_beside_the_new_one_acknowledges_nothing(pair, server):
    pair.has_a_standby()
    old = pair.primary
    with under_load(server.trader().sees("AAPL", at=1)):
        pair.take_over()
        eventually(lambda: old.execute("SELECT 1 FROM pg_stat_activity WHERE wait_event = 'SyncRep'"))
        time.sleep(0.5)
        old.crash()


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="Linux alone gives a machine up early.")
def test_a_machine_that_is_gone_without_a_word_is_passed_over(pair, server):
    """A full queue of connections drops what comes, as a machine does that has lost its power."""
    alice = server.trader()
    with ExitStack() as stack:
        gone = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(3):
            caller = stack.enter_context(socket.socket())
            caller.setblocking(False)
            caller.connect_ex(gone.getsockname())
        url = one_or_two(gone.getsockname()[1], pair.primary.port)
        listed = flask("user", "list", DATABASE_URL=url, PRICE_SOURCES="sample")
    assert alice.email in listed.stdout, listed.stderr


def test_a_standby_is_made_as_the_page_says():
    assert " ".join(COPY) in PAGE
