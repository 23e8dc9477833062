"""Killed at any moment: no half trade, no lost answer, and all heals by itself.

Workers are killed, PostgreSQL is killed, frozen and cut off in the middle of a COMMIT, the server is told
to end, and somebody changes the books by hand. `broken` is a broker of its own, whose PostgreSQL may die.
"""

import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from decimal import Decimal
from pathlib import Path

import psutil
import pytest
import requests
from cast import ADMIN, ROOT, Database, Server, Trader, environment, exact, flask
from postgres import PostgresServer
from sqlalchemy import text
from sqlalchemy.engine import make_url

ROUTES = ["balance", "portfolio", "trades", "trades/1", "trades.csv", "price/AAPL", "rules", "market"]
ROUTES += ["account/history", "account/audit"]


class Proxy:
    """Stands between the broker and PostgreSQL, and can fail at the next COMMIT that goes by.

    `fail_at_commit` is `"unsent"` (the COMMIT never arrives), `"unanswered"` (it is done, and the answer
    is lost) or `"late"` (the broker loses the connection at once, and the COMMIT is done a second later).
    With `stays_away` no connection is let through after that.
    """

    def __init__(self, port: int):
        self.to = ("127.0.0.1", port)
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port = self.listener.getsockname()[1]
        self.fail_at_commit, self.stays_away, self.is_away = None, False, False
        self.clients = []
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        with suppress(OSError):  # The listener was closed: the test is over.
            while True:
                client, _ = self.listener.accept()
                try:
                    if self.is_away:
                        raise ConnectionRefusedError
                    server = socket.create_connection(self.to)
                except ConnectionRefusedError:
                    client.close()
                    continue
                self.clients.append(client)
                threading.Thread(target=self.forward, args=(client, server), daemon=True).start()
                threading.Thread(target=self.answer, args=(server, client), daemon=True).start()

    def forward(self, client, server):
        with cut_at_the_end(client, server):
            while sent := client.recv(65536):
                failure = b"COMMIT\0" in sent and self.fail_at_commit
                if failure:
                    self.fail_at_commit, self.is_away = None, self.stays_away
                    cut(*(self.clients if self.is_away else [client]))  # Before anything is answered.
                    if failure == "unsent":
                        return
                    time.sleep(1 if failure == "late" else 0)
                server.sendall(sent)
                if failure:
                    time.sleep(0.2)
                    return

    @staticmethod
    def answer(server, client):
        with cut_at_the_end(client, server):
            while received := server.recv(65536):
                client.sendall(received)


def cut(*connections):
    """Shut down, not closed: a connection that another thread still reads would stay open."""
    for connection in connections:
        with suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)


@contextmanager
def cut_at_the_end(*connections):
    with suppress(OSError):
        yield
    cut(*connections)


class Broken:
    """A broker on a PostgreSQL that is its own, behind a proxy."""

    def __init__(self, postgres: PostgresServer):
        self.postgres, self.proxy = postgres, Proxy(postgres.port)
        self.database = Database(postgres.create_database("faults")).migrate()
        url = make_url(self.database.url).set(port=self.proxy.port).render_as_string()
        self.server = Server(url)


@pytest.fixture(scope="module")
def broken():
    with PostgresServer(Path(tempfile.mkdtemp(prefix="broker-faults-"))) as postgres:
        broken = Broken(postgres)
        with closing(broken.proxy.listener), broken.server:
            yield broken
        broken.database.engine.dispose()


@pytest.fixture
def carol(broken) -> Trader:
    """Somebody whose database will fail."""
    return broken.server.trader(name="carol").sees("AAPL", at=100)


def workers(server: Server) -> list[psutil.Process]:
    return psutil.Process(server.process.pid).children()


def eventually(what, seconds=15):
    """Wait until `what()` is true and answer it."""
    deadline = time.monotonic() + seconds
    while not (result := what()):
        assert time.monotonic() < deadline, f"This did not happen in {seconds} seconds."
        time.sleep(0.05)
    return result


def insists(trader: Trader, key: str) -> dict:
    """Buy one AAPL and ask again, with the same key, until there is an answer; as a bot should."""

    def answer():
        with suppress(requests.ConnectionError, requests.exceptions.ChunkedEncodingError):
            response = trader.order("buy", 1, "AAPL", key=key)
            assert response.status_code in (200, 503), response.text
            return response.status_code == 200 and exact(response)

    return eventually(answer, 30)


@contextmanager
def under_load(trader: Trader, threads=6):
    """While the block runs, bots trade for `trader`; then every order was booked once, as answered."""
    done, answers = threading.Event(), []

    def trade():
        bot = Trader(trader.server, trader.email, trader.key, trader.user_id)
        while not done.is_set():
            answers.append(insists(bot, key=uuid.uuid4().hex))

    with ThreadPoolExecutor(threads) as pool:
        bots = [pool.submit(trade) for _ in range(threads)]
        try:
            eventually(lambda: len(answers) > threads)
            yield
            count = len(answers)
            eventually(lambda: len(answers) > count + threads)
        finally:
            done.set()
        for bot in bots:
            bot.result()
    assert trader.audit() == {"ok": True, "trades": len(answers), "differences": []}
    assert trader.holdings["AAPL"][0] == len(answers)
    lines = trader.ask("GET", "/api/v1/trades.csv").text.splitlines()[1:]
    assert {line.split(",")[0] for line in lines} == {answer["id"] for answer in answers}


# Killed processes


def test_killed_processes_leave_no_half_trade_and_lose_none(alice, server):
    with under_load(alice.sees("AAPL", at=1)):
        for _ in range(5):
            eventually(lambda: len(workers(server)) == 2)
            workers(server)[0].kill()
            time.sleep(0.3)
        server.stop()
        server.start()


def test_a_killed_postgres_heals_without_a_lost_trade(broken, carol):
    with under_load(carol):
        for _ in range(2):
            broken.postgres.crash()
            broken.postgres.start()


@pytest.mark.parametrize("command", [None, [sys.executable, "app.py"]], ids=["gunicorn", "app.py"])
def test_sigterm_answers_what_is_in_flight_and_a_replay_outlives_the_restart(tmp_path, command):
    server = Server(Database(f"sqlite:///{tmp_path}/books.db").migrate().url, command=command)
    with server, ThreadPoolExecutor() as pool:
        alice = server.trader()
        alice.session.headers["Connection"] = "close"  # An idle connection would be waited for as well.
        alice.sees("AAPL", at=100)
        in_flight = pool.submit(alice.order, "buy", 1, "AAPL", key="k", fault="latency=1000")
        time.sleep(0.4)
        server.process.terminate()
        first = in_flight.result()
        assert first.status_code == 200
        server.process.wait(15)
        server.start()
        again = alice.order("buy", 1, "AAPL", key="k")
        assert (again.text, again.headers["Idempotent-Replayed"]) == (first.text, "true")
        assert alice.audit()["trades"] == 1


# The database, away


def test_without_a_database_every_route_says_so_quickly_and_heals(broken, carol):
    carol.buys(1, "AAPL", key="before")
    broken.postgres.crash()
    try:
        for worker in workers(broken.server):
            worker.kill()  # Those that come in their place have never seen a database.
        eventually(lambda: len(workers(broken.server)) == 2)
        assert requests.get(f"{broken.server.url}/health", timeout=15).status_code == 503  # They start.
        with ThreadPoolExecutor() as pool:
            asked = [pool.submit(carol.ask, "GET", f"/api/v1/{route}") for route in ROUTES]
            asked += [pool.submit(carol.order, "buy", 1, "AAPL", key=key) for key in (None, "away")]
            asked += [pool.submit(carol.ask, "POST", "/api/v1/account/reset")]
            responses = [future.result() for future in asked]
        for response in responses:
            assert (response.status_code, response.json()["code"]) == (503, "database_unavailable")
            assert int(response.headers["Retry-After"]) > 0
            assert response.elapsed.total_seconds() < 6
    finally:
        broken.postgres.start()
    assert eventually(lambda: carol.ask("GET", "/api/v1/balance").status_code == 200)
    assert requests.get(f"{broken.server.url}/health", timeout=2).json()["status"] == "healthy"
    assert insists(carol, "away")["cash_balance"] == 99800
    assert carol.audit() == {"ok": True, "trades": 2, "differences": []}


def test_a_frozen_postgres_holds_no_request_for_long(broken, carol):
    broken.postgres.pause()
    try:
        with ThreadPoolExecutor() as pool:
            asked = [pool.submit(carol.ask, "GET", f"/api/v1/{route}") for route in ROUTES[:3]]
            asked += [pool.submit(carol.order, "buy", 1, "AAPL", key=key) for key in (None, "frozen")]
            for _ in range(3):
                health = requests.get(f"{broken.server.url}/health", timeout=5)
                assert (health.status_code, health.json()["status"]) == (503, "unhealthy")
                # It promises half a second; to wait for PostgreSQL would take the six until it is given up.
                assert health.elapsed.total_seconds() < 4
            for response in (future.result() for future in asked):
                assert response.status_code == 503, response.text
                assert response.elapsed.total_seconds() < 12
    finally:
        broken.postgres.resume()
    eventually(lambda: carol.ask("GET", "/api/v1/balance").status_code == 200)
    eventually(lambda: requests.get(f"{broken.server.url}/health", timeout=5).status_code == 200)
    insists(carol, "frozen")
    assert carol.audit()["ok"]


def test_python_app_py_says_in_one_line_that_the_database_is_away():
    with socket.create_server(("127.0.0.1", 0)) as silent:  # Takes connections and never answers.
        url = f"postgresql://nobody@127.0.0.1:{silent.getsockname()[1]}/x"
        done = subprocess.run(
            [sys.executable, "app.py"],
            cwd=ROOT,
            env=environment(PRICE_SOURCES="sample", PORT=1, DATABASE_URL=url),
            capture_output=True,
            text=True,
            timeout=60,  # It gives up after six; else it would wait for ever.
        )
    assert done.returncode == 1
    assert done.stderr.startswith("The database ")
    assert len(done.stderr.splitlines()) == 1, done.stderr


# A COMMIT whose outcome is unknown


@pytest.mark.parametrize("key", [None, "k"], ids=["without a key", "with a key"])
@pytest.mark.parametrize("failure", ["unsent", "unanswered", "late"])
def test_a_connection_cut_at_commit_ends_in_the_truth(broken, carol, failure, key):
    broken.proxy.fail_at_commit = failure
    response = carol.order("buy", 2, "AAPL", key=key)
    assert broken.proxy.fail_at_commit is None
    assert response.status_code == 200, response.text
    assert "Idempotent-Replayed" not in response.headers
    (trade,) = carol.trades
    assert trade == exact(response)
    assert f" trade {trade['id']}: user {carol.user_id} buy 2 AAPL " in broken.server.log()
    assert carol.cash == 99800
    assert carol.audit()["ok"]


@pytest.mark.parametrize("failure", ["unsent", "unanswered", "late"])
def test_an_alert_without_an_id_is_booked_once_when_its_commit_is_cut(broken, carol, failure):
    broken.proxy.fail_at_commit = failure
    alert = {"key": carol.key, "ticker": "AAPL", "action": "buy", "quantity": 2}
    response = carol.ask("POST", "/api/v1/webhook/tradingview", json=alert)
    assert broken.proxy.fail_at_commit is None
    assert response.status_code == 200, response.text
    assert (carol.trades, carol.cash) == ([exact(response)], 99800)
    assert carol.audit()["ok"]


@pytest.mark.parametrize("key", [None, "k"], ids=["without a key", "with a key"])
@pytest.mark.parametrize(("failure", "booked"), [("unsent", 0), ("unanswered", 1)])
def test_a_database_that_stays_away_after_commit_leaves_the_outcome_unknown(
    broken, carol, failure, booked, key
):
    proxy = broken.proxy
    proxy.stays_away, proxy.fail_at_commit = True, failure
    try:
        response = carol.order("buy", 2, "AAPL", key=key)
        assert (response.status_code, response.json()["code"]) == (503, "outcome_unknown")
        assert response.headers["Retry-After"]
        assert response.elapsed.total_seconds() < 8
    finally:
        proxy.stays_away = proxy.is_away = False
    assert len(carol.trades) == booked
    if key:
        again = carol.order("buy", 2, "AAPL", key=key)
        assert again.headers.get("Idempotent-Replayed") == ("true" if booked else None)
        assert [trade["id"] for trade in carol.trades] == [again.json()["id"]]
    assert carol.audit()["ok"]


# Transactions that the database gives up


def ask_as_at_alpaca(trader: Trader, method: str, path: str, **options) -> requests.Response:
    return trader.session.request(method, f"{trader.server.url}/alpaca/v2{path}", timeout=60, **options)


ALPACA_ORDER = {"symbol": "AAPL", "qty": "2", "side": "buy", "type": "market", "time_in_force": "day"}


@pytest.mark.parametrize("failure", ["unsent", "unanswered", "late"])
def test_what_is_asked_as_at_alpaca_is_done_once_when_its_commit_is_cut(broken, carol, failure):
    requests_made = [
        ("POST", "/orders", {"json": ALPACA_ORDER}),
        ("POST", "/orders", {"json": ALPACA_ORDER | {"symbol": "IBM"}}),
        ("DELETE", "/positions/AAPL", {"params": {"percentage": "50"}}),
        ("DELETE", "/positions", {}),
    ]
    for method, path, options in requests_made:
        broken.proxy.fail_at_commit = failure
        answer = ask_as_at_alpaca(carol, method, path, **options)
        assert broken.proxy.fail_at_commit is None
        assert answer.ok, answer.text
    assert [item["status"] for item in answer.json()] == [200, 200]
    assert [(t["trade_type"], t["ticker"], t["quantity"]) for t in reversed(carol.trades)] == [
        ("buy", "AAPL", 2), ("buy", "IBM", 2), ("sell", "AAPL", 1), ("sell", "AAPL", 1), ("sell", "IBM", 2),
    ]  # fmt: skip
    assert carol.holdings == {}
    assert carol.audit()["ok"]


@pytest.mark.parametrize("key", [None, "k"], ids=["without a key", "with a key"])
def test_alpacas_clients_send_again_only_what_books_nothing_twice(broken, carol, key):
    """They do so on a 504."""
    order = ALPACA_ORDER | ({"client_order_id": key} if key else {})
    proxy = broken.proxy
    proxy.stays_away, proxy.fail_at_commit = True, "unanswered"
    try:
        answer = ask_as_at_alpaca(carol, "POST", "/orders", json=order)
        told = answer.json()
        assert (answer.status_code, told["problem"]) == (504 if key else 503, "outcome_unknown")
        assert "client_order_id" in told["message"]
        assert answer.headers["Retry-After"]
    finally:
        proxy.stays_away = proxy.is_away = False
    eventually(lambda: carol.cash == 99800)
    if key:
        assert ask_as_at_alpaca(carol, "POST", "/orders", json=order).json()["filled_qty"] == "2"
    assert len(carol.trades) == 1


@pytest.fixture
def giving_up(broken):
    """Lets PostgreSQL give up the first `times` bookings of a trade with the SQLSTATE `code`."""
    database = broken.database

    def give_up(code: str, times: int):
        database.run("CREATE SEQUENCE tried")  # A sequence keeps counting when a transaction is undone.
        database.run(
            "CREATE FUNCTION give_up() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
            f"IF nextval('tried') <= {times} THEN RAISE EXCEPTION 'again' USING ERRCODE = '{code}'; "
            "END IF; RETURN NEW; END $$"
        )
        database.run(
            "CREATE TRIGGER give_up BEFORE INSERT ON ibkr_trades FOR EACH ROW EXECUTE FUNCTION give_up()"
        )

    yield give_up
    database.run("DROP FUNCTION give_up CASCADE")
    database.run("DROP SEQUENCE tried")


@pytest.mark.parametrize("code", ["40001", "40P01", "55P03"])
def test_a_transaction_that_the_database_gives_up_is_repeated(carol, giving_up, code):
    giving_up(code, times=2)
    assert carol.buys(3, "AAPL")["cash_balance"] == 99700
    assert carol.holdings == {"AAPL": (3, 300)}
    assert carol.audit() == {"ok": True, "trades": 1, "differences": []}


def test_a_transaction_that_is_always_given_up_ends_as_unavailable(carol, giving_up):
    giving_up("40001", times=1000)
    response = carol.order("buy", 3, "AAPL")
    assert (response.status_code, response.json()["code"]) == (503, "database_unavailable")
    assert response.elapsed.total_seconds() < 8
    assert (carol.cash, carol.holdings, carol.trades) == (100000, {}, [])


def test_a_lock_held_elsewhere_is_waited_for_and_then_refused_not_failed(broken, carol):
    with broken.database.engine.connect() as elsewhere, ThreadPoolExecutor() as pool:
        lock = text("SELECT * FROM ibkr_balances WHERE user_id = :id FOR UPDATE")
        elsewhere.execute(lock, {"id": carol.user_id})
        refused = carol.order("buy", 1, "AAPL", key="k")
        assert (refused.status_code, refused.json()["code"]) == (503, "database_unavailable")
        assert refused.elapsed.total_seconds() < 5  # PostgreSQL gives up first, before we give it up.
        waiting = pool.submit(carol.order, "buy", 1, "AAPL", key="k")
        time.sleep(0.5)
        assert not waiting.done()
        elsewhere.rollback()
        assert waiting.result().status_code == 200
    assert len(carol.trades) == 1


@pytest.mark.parametrize(("method", "path"), [("POST", "/rotate-key"), ("DELETE", "")])
def test_an_admin_waits_for_a_lock_held_elsewhere_no_longer_than_a_trade(broken, carol, method, path):
    url = f"{broken.server.url}/api/v1/users/{carol.user_id}{path}"
    with broken.database.engine.connect() as elsewhere:
        lock = text("SELECT * FROM ibkr_balances WHERE user_id = :id FOR UPDATE")
        elsewhere.execute(lock, {"id": carol.user_id})
        refused = requests.request(method, url, headers={"Authorization": f"Bearer {ADMIN}"}, timeout=30)
    assert (refused.status_code, refused.json()["code"]) == (503, "database_unavailable")
    assert refused.elapsed.total_seconds() < 5  # PostgreSQL gives up first, before we give it up.
    assert carol.cash == 100000


def test_a_crowd_that_waits_for_one_account_keeps_no_connection_from_the_others(broken, carol):
    bob = broken.server.trader(name="bob").sees("AAPL", at=100)
    with broken.database.engine.connect() as elsewhere, ThreadPoolExecutor(15) as pool:
        lock = text("SELECT * FROM ibkr_balances WHERE user_id = :id FOR UPDATE")
        elsewhere.execute(lock, {"id": carol.user_id})
        crowd = [pool.submit(carol.order, "buy", 1, "AAPL") for _ in range(15)]
        time.sleep(0.5)
        # Without a connection for him he is refused, or answered when the crowd is: after three seconds.
        for _ in range(2):
            for answer in (bob.order("buy", 1, "AAPL"), bob.ask("GET", "/api/v1/portfolio")):
                assert answer.status_code == 200
        assert not any(order.done() for order in crowd)
        elsewhere.rollback()
        assert {order.result().status_code for order in crowd} == {200}
    assert carol.audit() == {"ok": True, "trades": 15, "differences": []}


def test_admins_who_wait_for_one_account_leave_the_others_their_connections(broken, carol):
    bob = broken.server.trader(name="bob")
    url = f"{broken.server.url}/api/v1/users/{carol.user_id}/rotate-key"
    admin = {"Authorization": f"Bearer {ADMIN}"}
    with broken.database.engine.connect() as elsewhere, ThreadPoolExecutor(12) as pool:
        lock = text("SELECT * FROM ibkr_balances WHERE user_id = :id FOR UPDATE")
        elsewhere.execute(lock, {"id": carol.user_id})
        waiting = [pool.submit(requests.post, url, headers=admin, timeout=30) for _ in range(12)]
        time.sleep(0.5)
        for _ in range(3):
            assert bob.ask("GET", "/api/v1/portfolio").status_code == 200
        assert not any(rotation.done() for rotation in waiting)
        elsewhere.rollback()
        assert {rotation.result().status_code for rotation in waiting} == {200}


def test_a_database_that_takes_no_writes_is_unavailable_not_a_fault_of_ours(broken, carol):
    """A standby is such a one, and a host makes one of a database whose disk is full."""

    postgres = broken.postgres
    postgres.execute("ALTER DATABASE faults SET default_transaction_read_only = on")
    postgres.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = 'faults'")
    try:
        refused = carol.order("buy", 1, "AAPL")
        assert (refused.status_code, refused.json()["code"]) == (503, "database_unavailable")
        assert carol.cash == 100000
        with Server(broken.server.database_url, workers=1) as new:  # Which has seen no other database.
            balance = requests.get(
                f"{new.url}/api/v1/balance", headers={"Authorization": f"Bearer {carol.key}"}, timeout=9
            )
        assert balance.status_code == 200
    finally:
        postgres.execute("ALTER DATABASE faults SET default_transaction_read_only = off")
    # A connection that takes no writes is not used again, though the server keeps it.
    assert [carol.order("buy", 1, "AAPL").status_code for _ in range(20)] == [200] * 20


# Books that somebody changed by hand


@contextmanager
def changed_by_hand(database, change: str, back: str, user_id: int):
    """The books with `change`, made around the triggers that keep trades as they are."""
    if database.engine.dialect.name == "sqlite":
        triggers = database.run("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'")
        off, on = [f"DROP TRIGGER {name}" for name, _ in triggers], [create for _, create in triggers]
    else:
        off, on = ([f"ALTER TABLE ibkr_trades {able} TRIGGER USER"] for able in ("DISABLE", "ENABLE"))

    def run(statement):
        with database.engine.begin() as connection:
            for step in (*off, f"{statement} WHERE user_id = {user_id}", *on):
                connection.exec_driver_sql(step)

    run(change)
    try:
        yield
    finally:
        run(back)


HANDS = [
    ("ibkr_balances", "cash_balance", "Run 1: cash_balance"),
    ("ibkr_stock_balances", "quantity", "AAPL: quantity"),
    ("ibkr_stock_balances", "cost_basis", "AAPL: cost_basis"),
    ("ibkr_trades", "total_amount", "total_amount"),
    ("ibkr_trades", "price", "total_amount"),
    ("ibkr_trades", "cash_after", "cash_after"),
    ("ibkr_trades", "run", "1 trades are of run 2"),
]


def test_the_audit_finds_what_was_changed_by_hand_to_the_last_digit(alice, database):
    alice.sees("AAPL", at=100).buys(2, "AAPL")
    digit = 1 if database.engine.dialect.name == "sqlite" else Decimal("0.00000001")
    for table, column, found in HANDS:
        by = 1 if column == "run" else digit
        changes = (f"UPDATE {table} SET {column} = {column} {sign} {by:f}" for sign in "+-")
        with changed_by_hand(database, *changes, alice.user_id):
            report = alice.audit()
            assert not report["ok"], column
            assert any(found in difference for difference in report["differences"]), report
            if column == "cash_balance":
                command = flask("audit", DATABASE_URL=database.url, PRICE_SOURCES="sample")
                assert command.returncode == 1
                assert f"User {alice.user_id}: {report['differences'][0]}\n" in command.stdout
    assert alice.audit()["ok"]


def test_a_table_may_change_while_prepared_statements_know_it(broken, carol):
    assert carol.buys(1, "AAPL")["run"] == 1
    broken.database.engine.dispose()  # PostgreSQL has crashed since.
    for kind in ("bigint", "integer"):
        broken.database.run(f"ALTER TABLE ibkr_balances ALTER run TYPE {kind}")
        for _ in range(4):
            assert carol.order("buy", 1, "AAPL").status_code == 200
            assert carol.ask("GET", "/api/v1/balance").status_code == 200
    assert carol.audit() == {"ok": True, "trades": 9, "differences": []}
