"""Orders, many at once: no dollar and no share is promised twice, and what is closed stays as it is."""

import random
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pytest
from cast import Database, Server, Trader, exact, flask, wait_for_a_whole_minute
from test_races import MANY, all_trades, assert_books_hold, at_once, copies

SALE = {"price_above_market", "insufficient_shares"}
PURCHASE = {"price_below_market", "insufficient_funds"}
EXPECTED = SALE | PURCHASE | {"not_open", "not_replaceable", "clock_is_running", "invalid_request"}


def outcomes(responses) -> Counter:
    """How often each outcome came: `ok`, or the code of the problem."""
    return Counter("ok" if r.status_code in (200, 201) else r.json()["code"] for r in responses)


def assert_orders_hold(trader: Trader):
    """Every promise is covered, and every fill is one trade, of the order's own size and price."""
    assert_books_hold(trader)
    orders, balance = trader.orders, trader.get("/api/v1/balance")
    working = [order for order in orders if order["status"] in ("open", "held")]
    assert balance["reserved_cash"] == sum(order["reserved_cash"] for order in working)
    assert 0 <= balance["reserved_cash"] <= balance["cash_balance"]
    filled = {order["trade_id"]: order for order in orders if order["status"] == "filled"}
    trades = {trade["id"]: trade for trade in all_trades(trader) if trade["order_id"]}
    assert filled.keys() == trades.keys()
    assert len(filled) == sum(order["status"] == "filled" for order in orders)
    for id, order in filled.items():
        trade = trades[id]
        assert (trade["order_id"], trade["ticker"], trade["trade_type"]) == (
            order["id"],
            order["ticker"],
            order["action"],
        )
        assert (trade["quantity"], trade["price"]) == (order["quantity"], order["price"])
    reasons = [order["reason"] or "" for order in orders]
    assert not [reason for reason in reasons if reason.startswith(("This costs", "This sells"))]
    replaced = Counter(order["replaces"] for order in orders if order["replaces"])
    assert set(replaced.values()) <= {1}
    assert replaced.keys() == {order["id"] for order in orders if order["status"] == "replaced"}
    ended = Counter(
        order["parent_id"] or order["id"]
        for order in orders
        if order["action"] == "sell" and order["status"] == "filled"
    )
    assert set(ended.values()) <= {1}, "Of two sales that cancel each other both were filled."
    available = {h["ticker"]: h["available_quantity"] for h in trader.portfolio["holdings"]}
    assert all(quantity >= 0 for quantity in available.values())


class Crowd:
    """What fifty clients of one account do, and what all of them together have seen of its orders."""

    def __init__(self):
        self.lock, self.seen, self.closed = threading.Lock(), {}, {}
        self.answers = Counter()

    def ask(self, trader: Trader, method: str, path: str, **options) -> dict:
        """Ask, and hold the orders in the answer against what was known of them before."""
        known = dict(self.closed)
        response = trader.ask(method, path, **options)
        answer = exact(response)
        with self.lock:
            self.answers[answer.get("code", "ok")] += 1
        if answer.get("code") == "database_unavailable":
            return {}  # On a slow machine fifty may wait longer than anybody is let wait.
        assert response.status_code < 500, response.text
        assert answer.get("code", "ok") in EXPECTED | {"ok"}, response.text
        orders = [answer] if "time_in_force" in answer else []
        orders += answer.get("orders", []) + answer.get("canceled", [])
        for order in orders:
            assert known.get(order["id"], order) == order, "A closed order has changed."
            with self.lock:
                self.seen[order["id"]] = order
                if order["closed_at"]:
                    assert self.closed.setdefault(order["id"], order) == order, "It ended twice."
        return answer

    def one(self, dice: random.Random) -> dict:
        """An order, and most often one that nobody has seen closed."""
        with self.lock:
            working = sorted(self.seen.keys() - self.closed.keys())
            return self.seen[dice.choice(working if working and dice.random() < 0.8 else sorted(self.seen))]

    def act(self, trader: Trader, number: int) -> None:
        dice = random.Random(number)
        for _ in range(10):
            twice = [self.place, self.change]
            dice.choice([*twice, *twice, self.trade, self.move, self.look])(trader, dice)

    def place(self, trader, dice):
        price, quantity = dice.randrange(80, 121), f"{dice.randrange(1, 4)}.{dice.randrange(10**8):08}"
        order = {"ticker": dice.choice(("AAPL", "IBM")), "action": dice.choice(("buy", "sell"))}
        order |= dice.choice(
            (
                {"order_type": "limit", "limit_price": price},
                {"order_type": "stop", "stop_price": price},
                {"order_type": "stop_limit", "stop_price": price, "limit_price": price + 2},
                {"order_type": "trailing_stop", "trail_percent": dice.randrange(1, 20)},
                {"order_type": "limit", "limit_price": price, "time_in_force": "ioc"},
                {"order_type": "limit", "limit_price": price, "time_in_force": "day"},
                {"order_type": "limit", "limit_price": price, "stop_loss": {"stop_price": price - 5}},
            )
        )
        if order["action"] == "buy" and "stop_loss" in order:
            order["take_profit"] = {"limit_price": price + 5}
        self.ask(trader, "POST", "/api/v1/orders", json=order | {"quantity": quantity})

    def change(self, trader, dice):
        order = self.one(dice)
        path = f"/api/v1/orders/{order['id']}"
        price = {"limit_price" if order["limit_price"] else "stop_price": dice.randrange(80, 121)}
        if dice.random() < 0.05:
            self.ask(trader, "DELETE", "/api/v1/orders")
        elif dice.random() < 0.15:  # Many a change comes too late, and some must come in time.
            self.ask(trader, "DELETE", path)
        else:
            self.ask(trader, "PATCH", path, json=price)

    def trade(self, trader, dice):
        order = {"ticker": dice.choice(("AAPL", "IBM")), "action": dice.choice(("buy", "sell"))}
        self.ask(trader, "POST", "/api/v1/trade", json=order | {"quantity": dice.randrange(1, 5)})

    def move(self, trader, dice):
        """Prices go up and down, pinned or recorded, and the clock runs, stands, jumps or goes on."""
        pin = {"price": dice.randrange(80, 121)}
        at = dice.choice((None, "2012-06-01T00:00:00Z", "2012-09-03T00:00:00Z"))
        method, path, body = dice.choice(
            (
                ("PUT", "prices/AAPL", pin),
                ("PUT", "prices/IBM", pin),
                ("DELETE", "prices/IBM", None),
                ("PUT", "clock", {"at": at}),
                ("POST", "advance", {"bars": dice.randrange(1, 20)}),
            )
        )
        self.ask(trader, method, f"/api/v1/market/{path}", json=body)

    def look(self, trader, dice):
        balance = self.ask(trader, "GET", "/api/v1/balance")
        if not balance:
            return
        assert 0 <= balance["reserved_cash"] <= balance["cash_balance"]
        assert balance["buying_power"] == balance["cash_balance"] - balance["reserved_cash"]
        for holding in self.ask(trader, "GET", "/api/v1/portfolio").get("holdings", []):
            assert 0 <= holding["available_quantity"] <= holding["quantity"]
        self.ask(trader, "GET", "/api/v1/orders", params={"status": "all", "limit": 500})
        self.ask(trader, "GET", f"/api/v1/orders/{self.one(dice)['id']}")
        assert trader.audit()["differences"] == []


def test_fifty_clients_of_one_account_promise_nothing_twice_while_the_clock_moves(server):
    alice, crowd = server.trader(cash=3000).sees("AAPL", at=100).sees("IBM", at=100), Crowd()
    alice.buys(10, "AAPL")
    crowd.place(alice, random.Random(1))
    at_once(copies(alice), crowd.act)
    assert crowd.answers["ok"] > 100
    assert {"filled", "canceled", "replaced"} <= {order["status"] for order in alice.orders}
    assert_orders_hold(alice)
    alice.ask("DELETE", "/api/v1/orders")
    assert alice.get("/api/v1/balance")["reserved_cash"] == 0
    assert_orders_hold(alice)


def test_fifty_copies_of_an_order_under_one_key_are_one_order(alice):
    alice.sees("AAPL", at=100)
    responses = at_once(copies(alice), lambda a, _: a.asks_for("buy", 3, "AAPL", key="once", limit_price=90))
    assert outcomes(responses) == {"ok": MANY}
    assert len({response.text for response in responses}) == 1
    assert sum("Idempotent-Replayed" not in response.headers for response in responses) == 1
    assert len(alice.orders) == 1
    assert alice.get("/api/v1/balance")["reserved_cash"] == 270


def test_fifty_copies_of_an_order_that_is_filled_at_once_are_one_trade(alice):
    alice.sees("AAPL", at=100)
    responses = at_once(copies(alice), lambda a, _: a.asks_for("buy", 3, "AAPL", "market", key="once"))
    assert outcomes(responses) == {"ok": MANY}
    assert (len(alice.orders), len(alice.trades), alice.cash) == (1, 1, 99700)


def test_of_fifty_orders_and_trades_under_one_key_one_is_taken(alice):
    alice.sees("AAPL", at=1)

    def place_or_trade(trader, number):
        if number % 2:
            return trader.order("buy", 1, "AAPL", key="mine")
        return trader.asks_for("buy", number + 1, "AAPL", key="mine", limit_price="0.5")

    responses = at_once(copies(alice), place_or_trade)
    assert outcomes(responses).keys() == {"ok", "idempotency_key_reused"}
    taken = {response.text for response in responses if response.status_code in (200, 201)}
    assert len(taken) == 1  # A trade may have come with copies.
    assert len(alice.orders) + len(alice.trades) == 1


@pytest.mark.parametrize("other", ["order", "trade"])
def test_cash_for_one_is_promised_to_one(server, other):
    alice = server.trader(cash=100).sees("AAPL", at=100)

    def place_or_trade(trader, number):
        if number % 2 and other == "trade":
            return trader.order("buy", 1, "AAPL")
        return trader.asks_for("buy", 2, "AAPL", limit_price=50)

    responses = at_once(copies(alice), place_or_trade)
    assert outcomes(responses) == {"ok": 1, "insufficient_funds": MANY - 1}
    assert alice.get("/api/v1/balance")["buying_power"] == 0
    assert_orders_hold(alice)


def test_a_lot_is_held_back_once(alice):
    alice.sees("AAPL", at=100).buys(7, "AAPL")

    def place_or_trade(trader, number):
        if number % 2:
            return trader.order("sell", 7, "AAPL")
        return trader.asks_for("sell", 7, "AAPL", limit_price=110, stop_loss={"stop_price": 90})

    responses = at_once(copies(alice), place_or_trade)
    assert outcomes(responses) == {"ok": 1, "insufficient_shares": MANY - 1}
    assert_orders_hold(alice)


@pytest.mark.parametrize("price", [110, 90], ids=["the gain", "the loss"])
def test_a_lot_that_is_held_back_whole_is_sold_once_whoever_sees_it(alice, price):
    alice.sees("AAPL", at=100).buys(7, "AAPL")
    alice.rests("sell", 7, "AAPL", limit_price=110, stop_loss={"stop_price": 90})
    at_once(copies(alice), lambda a, n: a.sees("AAPL", at=price) if n % 2 else a.trades)
    assert sorted(order["status"] for order in alice.orders) == ["canceled", "filled"]
    assert (alice.holdings, alice.cash) == ({}, 100000 + 7 * (price - 100))
    assert_orders_hold(alice)


def test_of_fifty_who_change_or_cancel_one_order_exactly_one_wins(alice):
    alice.sees("AAPL", at=100)
    path = f"/api/v1/orders/{alice.rests('buy', 3, 'AAPL', limit_price=90)['id']}"

    def change_or_cancel(trader, number):
        if number % 2:
            return trader.ask("DELETE", path)
        return trader.ask("PATCH", path, json={"limit_price": 40 + number})

    responses = at_once(copies(alice), change_or_cancel)
    assert outcomes(responses) == {"ok": 1, "not_open": MANY - 1}
    working = [order for order in alice.orders if not order["closed_at"]]
    was_replaced = alice.get(path)["status"] == "replaced"
    assert len(working) == was_replaced
    assert_orders_hold(alice)


def test_of_fifty_who_cancel_one_order_exactly_one_does(alice):
    alice.sees("AAPL", at=100)
    path = f"/api/v1/orders/{alice.rests('buy', 3, 'AAPL', limit_price=90)['id']}"
    responses = at_once(copies(alice), lambda a, _: a.ask("DELETE", path))
    assert outcomes(responses) == {"ok": 1, "not_open": MANY - 1}
    (order,) = alice.orders
    assert (order["status"], alice.get("/api/v1/balance")["reserved_cash"]) == ("canceled", 0)


def test_the_places_below_the_limit_of_open_orders_are_given_once(alice):
    alice.sees("AAPL", at=100)
    for _ in range(165):
        alice.rests(
            "buy", 1, "AAPL", limit_price=1, take_profit={"limit_price": 3}, stop_loss={"stop_price": "0.5"}
        )
    responses = at_once(copies(alice, 16), lambda a, _: a.asks_for("buy", 1, "AAPL", limit_price=1))
    assert outcomes(responses) == {"ok": 5, "limit_exceeded": 11}


def long_unseen(database: Database, trader: Trader, hours=2):
    """As if nobody had looked at the account's orders for so long: the wall clock passes a bar a minute."""
    ago = datetime.now(UTC) - timedelta(hours=hours)
    if database.engine.dialect.name == "sqlite":
        ago = ago.replace(tzinfo=None)
    statement = "UPDATE ibkr_balances SET settled_at = :ago WHERE user_id = :id AND settled_at IS NOT NULL"
    assert database.run(statement, ago=ago, id=trader.user_id) == 1


def test_fifty_who_look_at_once_fill_what_is_due_once(alice, database):
    price = alice.get("/api/v1/price/AAPL")["price"]
    alice.buys(20, "AAPL")
    for _ in range(10):
        alice.rests("buy", 1, "AAPL", limit_price=str(round(price - 1, 2)))
        alice.rests("sell", 1, "AAPL", limit_price=str(round(price + 1, 2)))
    long_unseen(database, alice)
    looks = ["balance", "portfolio", "orders", "trades", "account/history", "market"]
    responses = at_once(copies(alice), lambda a, n: a.ask("GET", f"/api/v1/{looks[n % len(looks)]}"))
    assert outcomes(responses) == {"ok": MANY}
    filled = [order for order in alice.orders if order["status"] == "filled"]
    assert len(filled) >= 10
    assert_orders_hold(alice)


def test_orders_that_end_while_a_trade_waits_for_its_turn_are_no_fault(alice, database):
    """It finds the prices moved and the market changed, and no order left to show them to."""
    wait_for_a_whole_minute()
    alice.sees("AAPL", at=100)
    alice.rests("buy", 1, "IBM", limit_price=1, time_in_force="day")
    (other,) = copies(alice, 1)
    with ThreadPoolExecutor() as pool:
        traded = pool.submit(other.order, "buy", 1, "AAPL", fault="latency=2000")
        time.sleep(0.7)  # It is let in by now.
        alice.sees("MSFT", at=5)
        long_unseen(database, alice)
        assert traded.result().status_code == 200, traded.result().text
    assert alice.orders[0]["status"] == "expired"


def test_an_account_that_ends_its_orders_while_others_are_settled_is_no_fault(new_database):
    """`flask settle` may be a long time on its way through the accounts that had open orders."""
    database = new_database().migrate()
    with Server(database.url, workers=1) as server:
        first, second = (server.trader(name=name).sees("AAPL", at=100) for name in ("alice", "bob"))
        for trader in (first, second):
            trader.rests("buy", 1, "AAPL", limit_price=1)
        long_unseen(database, first)
    lock = {
        "sqlite": "BEGIN IMMEDIATE",
        "postgresql": f"SELECT * FROM ibkr_balances WHERE user_id = {first.user_id} FOR UPDATE",
    }
    with database.engine.connect() as elsewhere, ThreadPoolExecutor() as pool:
        elsewhere.exec_driver_sql(lock[database.engine.dialect.name])
        settled = pool.submit(flask, "settle", DATABASE_URL=database.url, PRICE_SOURCES="sample")
        time.sleep(2.5)  # It waits for the first account by now.
        elsewhere.exec_driver_sql(
            f"UPDATE ibkr_balances SET settled_at = NULL WHERE user_id = {second.user_id}"
        )
        elsewhere.commit()
        done = settled.result()
    assert done.returncode == 0, done.stderr
    assert "open orders" in done.stdout
    database.engine.dispose()


def test_an_account_that_is_busy_keeps_no_other_from_being_settled(new_database_on):
    """PostgreSQL locks accounts one by one; who waits for one too long is told, and the next one follows."""
    database = new_database_on("postgresql").migrate()
    with Server(database.url, workers=1) as server:
        busy, idle = (server.trader(name=name).sees("AAPL", at=100) for name in ("alice", "bob"))
        for trader in (busy, idle):
            trader.rests("buy", 1, "IBM", limit_price=1, time_in_force="day")
            long_unseen(database, trader)
    with database.engine.connect() as elsewhere:
        elsewhere.exec_driver_sql(f"SELECT * FROM ibkr_balances WHERE user_id = {busy.user_id} FOR UPDATE")
        done = flask("settle", DATABASE_URL=database.url, PRICE_SOURCES="sample")
    assert done.returncode == 1
    assert f"User {busy.user_id}: OperationalError" in done.stderr
    assert "The open orders of 1 accounts" in done.stdout
    states = dict(database.run("SELECT user_id, status FROM ibkr_orders"))
    assert states == {busy.user_id: "open", idle.user_id: "expired"}
    database.engine.dispose()


def test_orders_that_race_a_new_run_belong_to_one_run_or_the_other(alice):
    alice.sees("AAPL", at=10)

    def place_or_reset(trader, number):
        if number % 8 == 0:
            return [trader.ask("POST", "/api/v1/account/reset", json={"cash": 50})]
        return [trader.asks_for("buy", 1, "AAPL", limit_price=price) for price in (9, 10, 8)]

    responses = sum(at_once(copies(alice, 32), place_or_reset), [])
    assert outcomes(responses).keys() <= {"ok", "insufficient_funds"}
    placed = {response.json()["id"] for response in responses if response.status_code == 201}
    runs = [alice.get("/api/v1/orders", run=run, status="all", limit=500)["orders"] for run in range(1, 6)]
    assert {order["id"] for run in runs for order in run} == placed
    assert all(order["closed_at"] for run in runs[:-1] for order in run)
    assert_orders_hold(alice)


def test_an_order_placed_in_a_restarted_server_is_settled_by_the_others(new_database):
    """What is open stays open over a restart, and two servers on one database fill it once."""
    database = new_database().migrate()
    with Server(database.url, workers=1) as one, Server(database.url, workers=1) as two:
        alice = one.trader().sees("AAPL", at=100)
        there = Trader(two, alice.email, alice.key, alice.user_id)
        order = alice.rests("buy", 1, "AAPL", limit_price=90)
        one.stop()
        one.start()
        traders = [alice, there] * 8
        at_once(traders, lambda t, n: t.sees("AAPL", at=95 - n))
        assert there.get(f"/api/v1/orders/{order['id']}")["status"] == "filled"
        assert_orders_hold(there)
    database.engine.dispose()
