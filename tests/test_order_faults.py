"""Orders while things break: each is placed once, filled once, and nothing stays held back for nothing."""

import tempfile
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest
import requests
from cast import Server, Trader, exact, wait_for_a_whole_minute
from postgres import PostgresServer
from test_faults import Broken, eventually, workers
from test_order_races import assert_orders_hold, long_unseen


@pytest.fixture(scope="module")
def broken():
    """A broker of its own, whose PostgreSQL may die."""
    with PostgresServer(Path(tempfile.mkdtemp(prefix="broker-order-faults-"))) as postgres:
        broken = Broken(postgres)
        with closing(broken.proxy.listener), broken.server:
            yield broken
        broken.database.engine.dispose()


@pytest.fixture
def carol(broken) -> Trader:
    wait_for_a_whole_minute()  # The COMMIT that fails is to be that of a request, and not of what it brings.
    return broken.server.trader(name="carol").sees("AAPL", at=100)


def insists(ask) -> dict:
    """The answer to `ask()`, asked again while there is none; as a bot should."""

    def answer():
        with suppress(requests.ConnectionError, requests.exceptions.ChunkedEncodingError):
            response = ask()
            assert response.status_code in (200, 201, 409, 503), response.text
            return response.status_code != 503 and exact(response)

    return eventually(answer, 30)


@contextmanager
def under_orders(trader: Trader, threads=4):
    """While the block runs, bots place orders and change them, and the price goes up and down.

    Then each key stands for one order, as it was answered, and all promises are kept.
    """
    done, placed, changed = threading.Event(), [], []

    bracket = {"limit_price": 99, "take_profit": {"limit_price": 101}, "stop_loss": {"stop_price": 90}}

    def copy():
        return Trader(trader.server, trader.email, trader.key, trader.user_id)

    def place():
        bot = copy()
        while not done.is_set():
            key = uuid.uuid4().hex
            order = insists(lambda key=key: bot.asks_for("buy", 1, "AAPL", key=key, **bracket))
            placed.append(order)
            path = f"/api/v1/orders/{order['id']}"
            headers = {"Idempotency-Key": f"{key} changed"}
            change = {"json": {"limit_price": 98}, "headers": headers}
            changed.append(insists(lambda path=path, change=change: bot.ask("PATCH", path, **change)))

    def move():
        bot = copy()
        while not done.is_set():
            for price in (100, 97, 102):
                insists(
                    lambda price=price: bot.ask(
                        "PUT", "/api/v1/market/prices/AAPL", json={"price": str(price)}
                    )
                )

    with ThreadPoolExecutor(threads + 1) as pool:
        bots = [*(pool.submit(place) for _ in range(threads)), pool.submit(move)]
        try:
            eventually(lambda: len(placed) > threads)
            yield
            count = len(placed)
            eventually(lambda: len(placed) > count + threads)
            eventually(lambda: any("id" in answer for answer in changed), 60)  # Most changes come too late.
        finally:
            done.set()
        for bot in bots:
            bot.result()
    entries = [order for order in trader.orders if order["action"] == "buy"]
    replaced = [answer for answer in changed if "id" in answer]
    assert {answer["code"] for answer in changed if "code" in answer} <= {"not_open"}
    assert sorted(order["id"] for order in entries) == sorted(order["id"] for order in (*placed, *replaced))
    assert replaced
    assert trader.trades
    trader.ask("DELETE", "/api/v1/orders")
    assert_orders_hold(trader)
    assert trader.get("/api/v1/balance")["reserved_cash"] == 0


# Killed processes


def test_killed_workers_place_and_fill_each_order_once(alice, server):
    with under_orders(alice.sees("AAPL", at=100)):
        for _ in range(4):
            eventually(lambda: len(workers(server)) == 2)
            workers(server)[0].kill()
            threading.Event().wait(0.3)


def test_a_killed_postgres_loses_and_doubles_no_order(broken, carol):
    with under_orders(carol):
        for _ in range(2):
            broken.postgres.crash()
            broken.postgres.start()


# A COMMIT whose outcome is unknown

CUTS = ["unsent", "unanswered", "late"]


@pytest.mark.parametrize("order_type", ["limit", "market"])
@pytest.mark.parametrize("key", [None, "k"], ids=["without a key", "with a key"])
@pytest.mark.parametrize("failure", CUTS)
def test_an_order_that_is_cut_at_commit_ends_in_the_truth(broken, carol, failure, key, order_type):
    prices = {"limit_price": 90} if order_type == "limit" else {}
    broken.proxy.fail_at_commit = failure
    response = carol.asks_for("buy", 2, "AAPL", order_type, key=key, **prices)
    assert broken.proxy.fail_at_commit is None
    assert response.status_code == 201, response.text
    assert "Idempotent-Replayed" not in response.headers
    assert carol.orders == [exact(response)]
    assert len(carol.trades) == (order_type == "market")
    assert_orders_hold(carol)


@pytest.mark.parametrize("failure", CUTS)
def test_a_change_that_is_cut_at_commit_is_made_once(broken, carol, failure):
    old = carol.rests("buy", 2, "AAPL", limit_price=90)
    broken.proxy.fail_at_commit = failure
    path = f"/api/v1/orders/{old['id']}"
    response = carol.ask("PATCH", path, json={"limit_price": 80}, headers={"Idempotency-Key": "k"})
    assert broken.proxy.fail_at_commit is None
    assert response.status_code == 200, response.text
    assert [order["status"] for order in carol.orders] == ["open", "replaced"]
    assert carol.orders[0] == exact(response)
    assert carol.get("/api/v1/balance")["reserved_cash"] == 160


@pytest.mark.parametrize(("failure", "placed"), [("unsent", 0), ("unanswered", 1)])
@pytest.mark.parametrize("change", [False, True], ids=["placed", "changed"])
def test_a_database_that_stays_away_leaves_the_outcome_to_the_next_try(
    broken, carol, failure, placed, change
):
    old, proxy, key = carol.rests("buy", 1, "AAPL", limit_price=50), broken.proxy, {"Idempotency-Key": "k"}

    def ask():
        if change:
            path = f"/api/v1/orders/{old['id']}"
            return carol.ask("PATCH", path, json={"limit_price": 60}, headers=key)
        return carol.asks_for("buy", 2, "AAPL", key="k", limit_price=90)

    proxy.stays_away, proxy.fail_at_commit = True, failure
    try:
        response = ask()
        assert (response.status_code, response.json()["code"]) == (503, "outcome_unknown")
    finally:
        proxy.stays_away = proxy.is_away = False
    assert len(carol.orders) == 1 + placed
    again = ask()
    assert again.status_code in (200, 201)
    assert again.headers.get("Idempotent-Replayed") == ("true" if placed else None)
    assert [order["id"] for order in carol.orders] == [again.json()["id"], old["id"]]
    assert_orders_hold(carol)


@pytest.mark.parametrize("failure", CUTS)
def test_a_cancellation_that_is_cut_at_commit_says_that_it_does_not_know(broken, carol, failure):
    path = f"/api/v1/orders/{carol.rests('buy', 2, 'AAPL', limit_price=90)['id']}"
    broken.proxy.fail_at_commit = failure
    response = carol.ask("DELETE", path)
    assert (response.status_code, response.json()["code"]) == (503, "outcome_unknown")
    eventually(lambda: carol.ask("DELETE", path).status_code == 409)
    assert carol.get(path)["status"] == "canceled"
    assert carol.get("/api/v1/balance")["reserved_cash"] == 0


@pytest.mark.parametrize("failure", CUTS)
def test_a_look_whose_settlement_is_cut_at_commit_sees_each_fill_once(broken, carol, failure):
    price = carol.get("/api/v1/price/IBM")["price"]
    carol.rests("buy", 1, "IBM", limit_price=str(price - 1))
    carol.rests("buy", 1, "IBM", "stop", stop_price=str(price + 1))
    long_unseen(broken.database, carol)
    broken.proxy.fail_at_commit = failure
    first = carol.ask("GET", "/api/v1/balance")
    assert first.status_code == 200
    assert broken.proxy.fail_at_commit is None
    assert carol.ask("GET", "/api/v1/balance").text == first.text
    assert carol.trades
    assert_orders_hold(carol)


# Drills


@pytest.mark.parametrize("order_type", ["limit", "market"])
def test_drills_fail_an_order_the_way_they_say(alice, order_type):
    alice.sees("AAPL", at=100)
    prices = {"limit_price": 90} if order_type == "limit" else {}

    def place(fault=None):
        return alice.asks_for("buy", 1, "AAPL", order_type, key="k", fault=fault, **prices)

    for fault, status, code in (
        ("price_unavailable", 503, "price_unavailable"),
        ("rate_limited", 429, "rate_limited"),
        ("error_before_commit", 503, "database_unavailable"),
    ):
        response = place(fault)
        assert (response.status_code, response.json()["code"]) == (status, code)
        assert response.headers["Retry-After"]
        assert (alice.orders, alice.trades, alice.get("/api/v1/balance")["buying_power"]) == ([], [], 100000)
    lost = place("error_after_commit")
    assert (lost.status_code, lost.json()["code"]) == (503, "outcome_unknown")
    (order,) = alice.orders
    again = place()
    assert (again.status_code, again.headers["Idempotent-Replayed"]) == (201, "true")
    assert (exact(again), alice.orders) == (order, [order])
    assert place("nonsense").status_code == 400
    assert_orders_hold(alice)


def test_a_drill_undoes_no_fill_that_was_seen_before(alice, database):
    """An order that fails is undone with what it did, and not with what the prices did to others."""
    price = alice.get("/api/v1/price/IBM")["price"]
    alice.rests("buy", 1, "IBM", limit_price=str(price - 1))
    alice.rests("buy", 1, "IBM", "stop", stop_price=str(price + 1))
    long_unseen(database, alice)
    alice.asks_for("buy", 1, "AAPL", "market", fault="error_before_commit")
    statement = "SELECT count(*) FROM ibkr_trades WHERE user_id = :id"
    ((count,),) = database.run(statement, id=alice.user_id)
    assert count >= 1
    assert len(alice.trades) == count
    assert_orders_hold(alice)


# A database that is read and not written


LOOKS = ["balance", "portfolio", "orders", "orders?status=all", "orders.csv", "trades", "trades.csv"]
LOOKS += ["account/history", "account/audit", "market", "price/AAPL"]


def test_a_standby_answers_for_orders_that_have_nothing_new_to_see(broken):
    """What is due is booked by whoever looks, which a standby cannot: then it is unavailable."""
    without, still, due = (broken.server.trader(name=name).sees("AAPL", at=100) for name in "abc")
    for trader in (still, due):
        trader.buys(2, "AAPL")
        trader.rests("buy", 1, "AAPL", limit_price=90)
        trader.rests("sell", 1, "AAPL", limit_price=120, stop_loss={"stop_price": 80})
    still.ask("PUT", "/api/v1/market/clock", json={"at": "2012-06-01T00:00:00Z"})
    long_unseen(broken.database, due)
    folder = Path(tempfile.mkdtemp(prefix="broker-order-standby-"))
    with PostgresServer.standby_of(broken.postgres, folder) as standby:
        with Server(standby.url("faults"), workers=1) as server:

            def there(trader):
                return Trader(server, trader.email, trader.key, trader.user_id)

            for trader in (without, still):
                for look in LOOKS:
                    answer = there(trader).ask("GET", f"/api/v1/{look}")
                    assert answer.status_code == 200, f"{look}: {answer.text}"
            assert there(still).get("/api/v1/balance") == still.get("/api/v1/balance")
            assert there(still).orders == still.orders
            path = f"/api/v1/orders/{still.orders[0]['id']}"
            asked = [("GET", "/api/v1/balance", due), ("GET", "/api/v1/orders", due)]
            asked += [("DELETE", path, still), ("DELETE", "/api/v1/orders", still)]
            for method, path, trader in asked:
                answer = there(trader).ask(method, path)
                assert (answer.status_code, answer.json()["code"]) == (503, "database_unavailable")
            answer = there(still).asks_for("buy", 1, "AAPL", limit_price=90)
            assert (answer.status_code, answer.json()["code"]) == (503, "database_unavailable")
            assert "Traceback" not in server.log()
    assert len(due.orders) == 3  # Where it can be written to, all goes on.
    assert_orders_hold(due)
