"""A standby that takes over: nothing acknowledged is lost.

All settings are read off docs/high-availability.md, so what it prints is what is tested.
"""

import re
import socket
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from conftest import ROOT, Database, Server, flask
from postgres import COPY, PostgresServer, free_port
from test_faults import eventually, under_load

PAGE = (ROOT / "docs" / "high-availability.md").read_text()


def printed(title: str) -> str:
    """The block of the page whose first line is the comment `title`."""
    return re.search(rf"^```\w+\n(?:#|--) {title}\n(.*?)^```", PAGE, re.M | re.S)[1]


(ONE_OR_TWO,) = re.findall(r"^DATABASE_URL=(\S+)$", PAGE, re.M)


def one_or_two(one: int, two: int) -> str:
    """The page's URL of two servers, at these ports."""
    return ONE_OR_TWO.replace("one:5432", f"127.0.0.1:{one}").replace("two:5432", f"127.0.0.1:{two}")


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
