"""Orders that make no sense: each gets a clear no, and neither money nor shares are held back for it."""

import json
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pytest
import requests
from cast import ADMIN, Here, Server, Trader
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_input import JSON, refused
from test_order_races import long_unseen

LIMIT = {"ticker": "AAPL", "action": "buy", "quantity": 1, "order_type": "limit", "limit_price": 90}
MARKET = {"ticker": "AAPL", "action": "buy", "quantity": 1, "order_type": "market"}
STOP = {"ticker": "AAPL", "action": "sell", "quantity": 1, "order_type": "stop", "stop_price": 80}
TRAILING = {"ticker": "AAPL", "action": "sell", "quantity": 1, "order_type": "trailing_stop"}
SALE = LIMIT | {"action": "sell", "limit_price": 120}
GAIN, LOSS = {"limit_price": 120}, {"stop_price": 80}

WRONG_ORDERS = [
    [],
    None,
    {},
    LIMIT | {"limit_price": None},
    LIMIT | {"limit_price": 0},
    LIMIT | {"limit_price": -90},
    LIMIT | {"limit_price": "NaN"},
    LIMIT | {"limit_price": "Infinity"},
    LIMIT | {"limit_price": True},
    LIMIT | {"limit_price": "1e-9"},
    LIMIT | {"limit_price": "10000000000"},
    LIMIT | {"limit_price": "9" * 60},
    LIMIT | {"limit_price": "9999999999." + "9" * 40},
    LIMIT | {"limit_price": [90]},
    LIMIT | {"stop_price": 95},
    LIMIT | {"trail_percent": 1},
    LIMIT | {"price": 90},
    LIMIT | {"quantity": None},
    LIMIT | {"quantity": None, "notional": 100},
    LIMIT | {"quantity": "all"},
    LIMIT | {"notional": 100},
    LIMIT | {"order_type": None},
    LIMIT | {"order_type": "iceberg"},
    LIMIT | {"order_type": ["limit"]},
    LIMIT | {"time_in_force": "opg"},
    LIMIT | {"time_in_force": 1},
    LIMIT | {"client_order_id": "x"},
    LIMIT | {"action": "short"},
    LIMIT | {"ticker": "A" * 21},
    LIMIT | {"status": "filled"},
    LIMIT | {"parent_id": 1},
    MARKET | {"limit_price": 90},
    MARKET | {"stop_price": 90},
    MARKET | {"quantity": None},
    MARKET | {"quantity": None, "notional": "1e-9"},
    MARKET | {"quantity": None, "notional": -5},
    STOP | {"stop_price": None},
    STOP | {"stop_price": 0},
    STOP | {"stop_price": -80},
    STOP | {"stop_price": "-0"},
    STOP | {"stop_price": "NaN"},
    STOP | {"stop_price": "1e400"},
    STOP | {"stop_price": "1e10"},
    STOP | {"limit_price": 79},
    STOP | {"order_type": "stop_limit"},
    STOP | {"order_type": "stop_limit", "stop_price": None, "limit_price": 79},
    STOP | {"quantity": None, "notional": 100},
    TRAILING,
    TRAILING | {"trail_percent": 1, "trail_amount": 1},
    TRAILING | {"trail_percent": 100},
    TRAILING | {"trail_percent": 0},
    TRAILING | {"trail_percent": -1},
    TRAILING | {"trail_amount": 100},
    TRAILING | {"trail_amount": "1e10"},
    TRAILING | {"trail_amount": 1, "stop_price": 80},
    TRAILING | {"action": "buy", "trail_amount": "9999999999.99"},
    LIMIT | {"take_profit": GAIN, "stop_loss": {"stop_price": 120}},
    LIMIT | {"take_profit": {"limit_price": 90}},
    LIMIT | {"take_profit": {"limit_price": 89}, "stop_loss": LOSS},
    LIMIT | {"stop_loss": {"stop_price": 90}},
    LIMIT | {"take_profit": {"limit_price": 70}, "stop_loss": LOSS},
    LIMIT | {"take_profit": {}},
    LIMIT | {"take_profit": []},
    LIMIT | {"take_profit": 120},
    LIMIT | {"take_profit": GAIN | {"stop_price": 1}},
    LIMIT | {"take_profit": {"limit_price": "NaN"}},
    LIMIT | {"stop_loss": {"limit_price": 80}},
    LIMIT | {"stop_loss": {"stop_price": 0}},
    LIMIT | {"stop_loss": LOSS | {"limit_price": -1}},
    LIMIT | {"stop_loss": LOSS, "time_in_force": "ioc"},
    LIMIT | {"take_profit": GAIN, "time_in_force": "fok"},
    MARKET | {"take_profit": {"limit_price": 100}},
    MARKET | {"stop_loss": {"stop_price": 100}},
    MARKET | {"action": "sell", "stop_loss": LOSS},
    STOP | {"stop_loss": LOSS},
    SALE | {"take_profit": GAIN},
    SALE | {"take_profit": GAIN, "stop_loss": LOSS},
    SALE | {"stop_loss": {"stop_price": 120}},
]

NOT_AN_ORDER = [
    "0",
    "-1",
    "1e3",
    "10" * 15,
    "\u0661",
    "1.0",
    "x",
    "%00",
    "0x1",
    "+1",
    "1_0",
    "9" * 18,
    "9" * 19,
]

WRONG_CHANGES = [
    [],
    None,
    {},
    {"quantity": None},
    {"quantity": 0},
    {"quantity": "all"},
    {"limit_price": -1},
    {"limit_price": "NaN"},
    {"limit_price": "9" * 60},
    {"stop_price": 80},
    {"trail_percent": 1},
    {"time_in_force": "day"},
    {"action": "sell"},
    {"limit_price": 120},
    {"limit_price": 79},
]


@pytest.fixture(scope="module")
def carol(server):
    """Somebody with five shares and open orders of each kind, whom nothing below may cost a cent."""
    trader = server.trader(name="carol").sees("AAPL", at=100)
    trader.buys(5, "AAPL")
    trader.rests("buy", 2, "AAPL", limit_price=90, take_profit=GAIN, stop_loss=LOSS)
    trader.rests("sell", 1, "AAPL", limit_price=130, stop_loss={"stop_price": 70})
    trader.rests("sell", 1, "AAPL", "trailing_stop", trail_percent=50)
    return trader


def books(trader) -> tuple:
    """All that a refused request must leave as it was, and what is promised to whom."""
    portfolio = trader.portfolio
    return (
        trader.get("/api/v1/balance"),
        portfolio["holdings"][0]["available_quantity"],
        trader.books,
        trader.orders,
    )


@pytest.fixture(autouse=True)
def nothing_changes(carol):
    before = books(carol)
    yield
    after = books(carol)
    assert after == before
    assert "Traceback" not in carol.server.log()


def the(trader, order_type: str, action="sell") -> dict:
    """Her order of this kind."""
    return next(o for o in trader.orders if (o["order_type"], o["action"]) == (order_type, action))


# Placing


@pytest.mark.parametrize("order", WRONG_ORDERS, ids=lambda order: json.dumps(order)[:90])
def test_a_wrong_order_is_refused_with_the_field_that_is_wrong(carol, order):
    response = carol.ask("POST", "/api/v1/orders", data=json.dumps(order), headers=JSON)
    problem = refused(response, 400)
    assert problem["code"] == "invalid_request"
    assert problem["errors"][0].keys() == {"field", "message"}


def test_numbers_that_json_has_and_an_order_has_not_are_refused(carol):
    for number in ("NaN", "-Infinity", "1e999999999", "-1e400", "1e-400", "9" * 5000, "0.1e-8", "-0"):
        body = json.dumps(STOP | {"stop_price": 12345}).replace("12345", number)
        refused(carol.ask("POST", "/api/v1/orders", data=body, headers=JSON), 400)


def test_money_and_shares_that_are_held_back_are_not_there_twice(carol):
    for order in (
        SALE | {"quantity": 4},
        STOP | {"quantity": 4},
        TRAILING | {"trail_amount": 5, "quantity": "3.00000001"},
        MARKET | {"action": "sell", "quantity": 4},
        SALE | {"quantity": 4, "stop_loss": LOSS, "time_in_force": "day"},
        SALE | {"quantity": 4, "time_in_force": "ioc"},
    ):
        problem = refused(carol.ask("POST", "/api/v1/orders", json=order), 409)
        assert (problem["code"], problem["available"]) == ("insufficient_shares", 3)
        assert "2 of it held back for open orders" in problem["detail"]
    assert carol.sells(4, "AAPL")["code"] == "insufficient_shares"
    for order in (
        LIMIT | {"quantity": 1200},
        LIMIT
        | {"action": "buy", "order_type": "stop", "limit_price": None, "stop_price": 150, "quantity": 700},
        LIMIT | {"quantity": "9999999999.99999999", "limit_price": "9999999999.99999999"},
        LIMIT | {"quantity": 1200, "time_in_force": "fok"},
    ):
        problem = refused(carol.ask("POST", "/api/v1/orders", json=order), 409)
        assert (problem["code"], problem["available"]) == ("insufficient_funds", 99320)
        assert "180 of it held back for open orders" in problem["detail"]
    assert carol.buys(994, "AAPL")["code"] == "insufficient_funds"


def test_what_cannot_be_sold_short_or_is_unknown_is_refused(carol):
    assert refused(carol.asks_for("sell", 1, "IBM", limit_price=9999), 409)["code"] == "insufficient_shares"
    assert (
        refused(carol.asks_for("sell", "all", "IBM", limit_price=9999), 409)["code"] == "insufficient_shares"
    )
    assert refused(carol.asks_for("buy", 1, "NOPE", limit_price=1), 404)["code"] == "unknown_ticker"


# Hers and others'


@pytest.mark.parametrize("id", NOT_AN_ORDER)
def test_what_is_no_order_is_not_found(carol, id):
    path = f"/api/v1/orders/{id}"
    assert refused(carol.ask("GET", path), 404)["code"] == "not_found"
    assert refused(carol.ask("DELETE", path), 404)["code"] == "not_found"
    assert refused(carol.ask("PATCH", path, json={"limit_price": 5}), 404)["code"] == "not_found"


def test_an_order_of_somebody_else_is_not_found_and_not_touched(carol, bob):
    for order in carol.orders:
        path = f"/api/v1/orders/{order['id']}"
        for method, body in (("GET", None), ("DELETE", None), ("PATCH", {"limit_price": 5})):
            assert refused(bob.ask(method, path, json=body), 404)["code"] == "not_found"
    assert bob.ask("DELETE", "/api/v1/orders").json() == {"canceled": []}
    for cursor in (10**9, carol.orders[0]["id"]):
        assert bob.get("/api/v1/orders", status="all", cursor=cursor)["code"] == "invalid_request"


# Changing


@pytest.mark.parametrize("change", WRONG_CHANGES, ids=json.dumps)
def test_a_wrong_change_is_refused(carol, change):
    path = f"/api/v1/orders/{the(carol, 'limit', 'buy')['id']}"
    response = carol.ask("PATCH", path, data=json.dumps(change), headers=JSON)
    assert refused(response, 400)["code"] == "invalid_request"


@pytest.mark.parametrize(
    ("order_type", "price"),
    [("limit", "90"), ("limit", "85"), ("stop", "90"), ("stop", "95"), ("stop", "125")],
)
def test_what_a_purchase_brings_cannot_be_turned_upside_down(carol, order_type, price):
    entry = the(carol, "limit", "buy")
    leg = next(o for o in carol.orders if (o["parent_id"], o["order_type"]) == (entry["id"], order_type))
    response = carol.ask("PATCH", f"/api/v1/orders/{leg['id']}", json={f"{order_type}_price": price})
    assert refused(response, 400)["code"] == "invalid_request"


def test_two_sales_of_which_one_cancels_the_other_cannot_change_sides(carol):
    for order in carol.orders:
        if order["order_type"] == "limit" and order["limit_price"] == 130:
            refused(carol.ask("PATCH", f"/api/v1/orders/{order['id']}", json={"limit_price": 70}), 400)
        if order["order_type"] == "stop" and order["stop_price"] == 70:
            refused(carol.ask("PATCH", f"/api/v1/orders/{order['id']}", json={"stop_price": 130}), 400)


def test_the_quantity_of_what_was_brought_follows_its_entry(carol):
    for order in carol.orders:
        if order["parent_id"]:
            answer = carol.ask("PATCH", f"/api/v1/orders/{order['id']}", json={"quantity": 1})
            assert refused(answer, 400)["errors"][0]["field"] == "quantity"


def test_a_trailing_order_is_not_changed(carol):
    path = f"/api/v1/orders/{the(carol, 'trailing_stop')['id']}"
    for change in ({"quantity": 1}, {"stop_price": 60}, {"limit_price": 60}):
        assert refused(carol.ask("PATCH", path, json=change), 409)["code"] == "not_replaceable"


def test_an_order_cannot_be_changed_into_one_that_lacks_money_or_shares(carol):
    entry, sale = the(carol, "limit", "buy"), the(carol, "limit")
    answer = carol.ask("PATCH", f"/api/v1/orders/{entry['id']}", json={"quantity": 1200})
    assert refused(answer, 409)["code"] == "insufficient_funds"
    answer = carol.ask("PATCH", f"/api/v1/orders/{sale['id']}", json={"quantity": 5})
    assert refused(answer, 409)["code"] == "insufficient_shares"


# Looking


@pytest.mark.parametrize(
    "query",
    ["status=held", "status=", "limit=0", "limit=501", "limit=x", "cursor=-1", "cursor=x", "cursor=0",
     "run=0", "cursor=" + "9" * 30, "ticker=%00", "status=open&status=all", "unknown=1", "limit=%EF%BC%95"],
)  # fmt: skip
def test_a_wrong_query_is_refused(carol, query):
    assert refused(carol.ask("GET", f"/api/v1/orders?{query}"), 400)["code"] == "invalid_request"


# Anything

numbers = st.one_of(
    st.decimals(-(10**11), 10**11, allow_nan=False).map(str),
    st.sampled_from(
        ["1e-8", "9" * 60, "0." + "9" * 39, "0", "-1", "1e-9", "NaN", "1e10", "9999999999.99999999"]
    ),
    st.floats(allow_nan=False, allow_infinity=False),
    st.none() | st.booleans() | st.text(max_size=3) | st.lists(st.integers(), max_size=2),
)
PRICES = ("limit_price", "stop_price", "trail_percent", "trail_amount")
legs = st.one_of(
    st.none(), st.dictionaries(st.sampled_from(["limit_price", "stop_price"]), numbers, max_size=2), numbers
)
orders = st.fixed_dictionaries(
    {
        "ticker": st.sampled_from(["AAPL", "IBM", "NOPE", "aapl"]),
        "action": st.sampled_from(["buy", "sell"]),
        "quantity": numbers,
        "order_type": st.sampled_from(["market", "limit", "stop", "stop_limit", "trailing_stop"]),
    },
    optional={name: numbers for name in (*PRICES, "notional")}
    | {
        "take_profit": legs,
        "stop_loss": legs,
        "time_in_force": st.sampled_from(["gtc", "day", "ioc", "fok", "x", None]),
    },
)


@pytest.fixture(scope="module")
def dave(server):
    """Somebody whose orders may be taken, however strange."""
    trader = server.trader(name="dave", cash="89999999999").sees("AAPL", at="0.00000001").sees("IBM", at=100)
    trader.buys("9999999999", "AAPL")
    trader.buys(10, "IBM")
    return trader


@settings(max_examples=100, suppress_health_check=list(HealthCheck))
@given(orders, st.dictionaries(st.sampled_from(["quantity", *PRICES[:2]]), numbers, min_size=1))
def test_whatever_is_placed_and_changed_is_answered_and_keeps_its_promises(dave, order, change):
    placed = dave.ask("POST", "/api/v1/orders", data=json.dumps(order), headers=JSON)
    assert placed.status_code < 500, placed.text
    for one in dave.get("/api/v1/orders", limit=3)["orders"]:
        path = f"/api/v1/orders/{one['id']}"
        changed = dave.ask("PATCH", path, data=json.dumps(change), headers=JSON)
        assert changed.status_code < 500, changed.text
    balance = dave.get("/api/v1/balance")
    assert 0 <= balance["reserved_cash"] <= balance["cash_balance"]
    assert dave.ask("DELETE", "/api/v1/orders").status_code == 200
    assert dave.get("/api/v1/balance")["reserved_cash"] == 0
    assert dave.audit()["differences"] == []


# What orders do to what comes after them


def test_a_key_of_one_kind_of_request_is_no_key_of_another(alice):
    alice.sees("AAPL", at=100)
    order = alice.asks_for("buy", 1, "AAPL", key="order", limit_price=50).json()["id"]
    other = alice.rests("buy", 1, "AAPL", limit_price=50)["id"]
    path = f"/api/v1/orders/{order}"
    alice.buys(1, "AAPL", key="trade")
    changed = alice.ask("PATCH", path, json={"limit_price": 60}, headers={"Idempotency-Key": "change"})
    before = alice.books, alice.orders
    for key in ("order", "change", "trade"):
        if key != "trade":
            assert refused(alice.order("buy", 1, "AAPL", key=key), 422)["code"] == "idempotency_key_reused"
        if key != "order":
            assert refused(alice.asks_for("buy", 1, "AAPL", key=key, limit_price=50), 422)
        headers = {"Idempotency-Key": key}
        assert refused(
            alice.ask("PATCH", f"/api/v1/orders/{other}", json={"limit_price": 60}, headers=headers), 422
        )
        assert refused(alice.ask("PATCH", path, json={"limit_price": 61}, headers=headers), 422)
    assert (alice.books, alice.orders) == before
    again = alice.ask("PATCH", path, json={"limit_price": "60.0"}, headers={"Idempotency-Key": "change"})
    assert (again.text, again.headers["Idempotent-Replayed"]) == (changed.text, "true")
    again = alice.asks_for("BUY", "1.0", "aapl", key="order", limit_price="5e1", time_in_force="GTC")
    assert (again.status_code, again.json()["id"]) == (201, order)
    assert (alice.books, alice.orders) == before


def test_a_closed_order_is_neither_changed_nor_canceled(alice):
    alice.sees("AAPL", at=100)
    filled = alice.rests("buy", 1, "AAPL", limit_price=100)
    replaced = alice.rests("buy", 1, "AAPL", limit_price=90)
    alice.ask("PATCH", f"/api/v1/orders/{replaced['id']}", json={"limit_price": 80})
    canceled = alice.rests("buy", 1, "AAPL", limit_price=90, time_in_force="ioc")
    before = alice.books, alice.orders
    for order, status in ((filled, "filled"), (replaced, "replaced"), (canceled, "canceled")):
        path = f"/api/v1/orders/{order['id']}"
        for method, body in (("DELETE", None), ("PATCH", {"limit_price": 70})):
            problem = refused(alice.ask(method, path, json=body), 409)
            assert (problem["code"], problem["order_status"]) == ("not_open", status)
    assert (alice.books, alice.orders) == before


def test_an_account_has_five_hundred_open_orders_and_legs_count(alice):
    alice.sees("AAPL", at=100)
    bracket = {"limit_price": 1, "take_profit": {"limit_price": 3}, "stop_loss": {"stop_price": "0.5"}}
    for _ in range(166):
        alice.rests("buy", 1, "AAPL", **bracket)
    before = alice.books, len(alice.orders), alice.get("/api/v1/balance")
    problem = refused(alice.asks_for("buy", 1, "AAPL", **bracket), 409)
    assert (problem["code"], problem["limit"]) == ("limit_exceeded", 500)
    assert (alice.books, len(alice.orders), alice.get("/api/v1/balance")) == before
    last = [alice.rests("buy", 1, "AAPL", limit_price=1) for _ in range(2)][-1]
    for _ in range(20):
        assert refused(alice.asks_for("buy", 1, "AAPL", limit_price=1), 409)["code"] == "limit_exceeded"
    changed = alice.ask("PATCH", f"/api/v1/orders/{last['id']}", json={"limit_price": 2})
    assert changed.status_code == 200  # One goes and one comes.
    assert alice.asks_for("buy", 1, "AAPL", "market").status_code == 201  # Which is over at once.
    canceled = alice.ask("DELETE", "/api/v1/orders").json()["canceled"]
    assert (len(canceled), alice.get("/api/v1/balance")["reserved_cash"]) == (500, 0)


def test_the_clock_may_jump_and_run_beside_open_orders(alice):
    alice.sees("AAPL", at=100)
    order = alice.rests("buy", 1, "AAPL", limit_price=1)
    for at in ("2012-06-01T00:00:00Z", "2012-03-01T00:00:00Z", None, "2012-12-31T23:59:59+00:00", None):
        response = alice.ask("PUT", "/api/v1/market/clock", json={"at": at})
        assert response.status_code in (200, 400), response.text
        alice.ask("POST", "/api/v1/market/advance", json={"bars": 100_000})
    refused(alice.ask("PUT", "/api/v1/market/clock", json={"at": "1999-01-01T00:00:00Z"}), 400)
    assert alice.get(f"/api/v1/orders/{order['id']}")["status"] == "open"


def test_a_new_run_ends_all_orders_and_keeps_them_readable(alice):
    alice.sees("AAPL", at=100).buys(2, "AAPL")
    alice.rests("buy", 1, "AAPL", limit_price=1, take_profit=GAIN)
    alice.rests("sell", 2, "AAPL", limit_price=120, stop_loss=LOSS)
    assert alice.ask("POST", "/api/v1/account/reset", json={"cash": 7}).status_code == 200
    assert alice.get("/api/v1/balance")["buying_power"] == 7
    assert alice.orders == []
    earlier = alice.get("/api/v1/orders", run=1, status="all")["orders"]
    assert [order["status"] for order in earlier] == ["canceled"] * 4
    assert {order["reserved_cash"] for order in earlier} == {0}
    path = f"/api/v1/orders/{earlier[0]['id']}"
    assert refused(alice.ask("DELETE", path), 409)["code"] == "not_open"
    assert refused(alice.ask("PATCH", path, json={"limit_price": 5}), 409)["code"] == "not_open"


def of_admin(trader, method: str, path: str) -> dict:
    url = f"{trader.server.url}/api/v1/users/{trader.user_id}{path}"
    response = requests.request(method, url, headers={"Authorization": f"Bearer {ADMIN}"}, timeout=30)
    assert response.status_code == 200, response.text
    return response.json()


def test_orders_outlive_a_new_key_and_end_with_the_account(alice, database):
    alice.sees("AAPL", at=100)
    order = alice.rests("buy", 1, "AAPL", limit_price=90, take_profit=GAIN)
    new = Trader(alice.server, alice.email, of_admin(alice, "POST", "/rotate-key")["api_key"], alice.user_id)
    assert alice.ask("DELETE", f"/api/v1/orders/{order['id']}").status_code == 401
    assert new.get(f"/api/v1/orders/{order['id']}") == order
    of_admin(alice, "DELETE", "")
    assert new.ask("GET", "/api/v1/orders").status_code == 401
    states = "SELECT status, reason FROM ibkr_orders WHERE user_id = :id"
    assert set(database.run(states, id=alice.user_id)) == {("canceled", "The account was closed.")}


# The limits of what an account can have


def test_a_fill_that_would_break_a_limit_of_the_books_cancels_its_order_with_the_reason(server):
    alice = server.trader(cash="89999999999").sees("AAPL", at=1)
    alice.buys(10, "AAPL")
    sale = alice.rests("sell", 10, "AAPL", limit_price=2, stop_loss={"stop_price": "0.5"})
    alice.sees("AAPL", at=3)
    (loss, gain) = alice.orders[:2]
    assert (gain["id"], gain["status"], loss["status"]) == (sale["id"], "canceled", "canceled")
    assert "cash stays below 90000000000" in gain["reason"]


def test_a_purchase_that_would_hold_too_many_shares_is_canceled_when_it_is_due(server):
    alice = server.trader(cash="1000").sees("AAPL", at="0.00000001")
    for _ in range(8):
        alice.buys("9999999999", "AAPL")
    alice.sees("AAPL", at="0.00000002")
    first, second = (alice.rests("buy", "9999999999", "AAPL", limit_price="0.00000001") for _ in range(2))
    alice.sees("AAPL", at="0.00000001")
    second, first = alice.orders[:2]
    assert (first["status"], second["status"]) == ("filled", "canceled")
    assert "A holding stays below 90000000000" in second["reason"]
    assert (alice.get("/api/v1/balance")["reserved_cash"], alice.audit()["ok"]) == (0, True)


@pytest.mark.parametrize("leg", [False, True])
def test_a_sale_that_would_bring_more_than_there_can_be_is_no_fault_whatever_its_commission(
    new_database, leg
):
    database = new_database().migrate()
    with Here(database.url, COMMISSION_BPS=10) as server:
        alice = server.trader().sees("AAPL", at="0.01")
        most = {"limit_price": "9999999999.99999999"}
        if leg:
            alice.rests("buy", 100_000, "AAPL", "market", take_profit=most)
        else:
            alice.buys(100_000, "AAPL")
            alice.rests("sell", 100_000, "AAPL", **most)
        alice.sees("AAPL", at=most["limit_price"])
        assert alice.orders[0]["status"] == "canceled"
        assert "cash stays below 90000000000" in alice.orders[0]["reason"]
    database.engine.dispose()


# What a restart may change


@contextmanager
def restarted(server: Server, **settings):
    """The server, as somebody starts it anew who has changed these settings."""
    server.stop()
    server.settings |= settings
    server.start()
    yield


@pytest.fixture
def market_file(tmp_path):
    """Writes a market's file of a thousand days, with what each ticker costs on the n-th of them."""

    def write(name: str, **columns) -> str:
        file = tmp_path / name
        days = [datetime(2020, 1, 1, tzinfo=UTC) + timedelta(days=n) for n in range(1000)]
        rows = [",".join(["date", *columns])]
        for number, day in enumerate(days):
            rows.append(",".join([f"{day:%Y-%m-%d}", *(str(price(number)) for price in columns.values())]))
        file.write_text("\n".join(rows))
        return str(file)

    return write


def test_orders_in_a_ticker_that_the_file_has_no_more_rest_and_can_be_canceled(new_database, market_file):
    database = new_database().migrate()
    both, one = (
        market_file("both.csv", IBM=lambda n: 100, GONE=lambda n: 10),
        market_file("one.csv", IBM=lambda n: 100),
    )
    with Here(database.url, SAMPLE_MARKET=both) as server:
        alice = server.trader()
        alice.buys(2, "GONE")
        buy = alice.rests("buy", 1, "GONE", limit_price=5, take_profit={"limit_price": 20})
        sale = alice.rests("sell", 1, "GONE", limit_price=20, stop_loss={"stop_price": 5})
        nothing = alice.rests("buy", 1, "IBM", limit_price=50)
        with restarted(server, SAMPLE_MARKET=one):
            long_unseen(database, alice)
            assert {order["status"] for order in alice.orders} == {"open", "held"}
            assert alice.get("/api/v1/balance")["reserved_cash"] == 55
            (holding,) = alice.portfolio["holdings"]
            assert (holding["available_quantity"], holding["stale"]) == (1, True)
            refused(alice.asks_for("buy", 1, "GONE", limit_price=5), 409)  # Good for selling only.
            refused(alice.ask("PATCH", f"/api/v1/orders/{buy['id']}", json={"limit_price": 4}), 409)
            path = f"/api/v1/orders/{sale['id']}"
            sale = alice.ask("PATCH", path, json={"limit_price": 30}).json()
            for at in ("2020-06-01T00:00:00Z", None):
                assert alice.ask("PUT", "/api/v1/market/clock", json={"at": at}).status_code == 200
                alice.ask("POST", "/api/v1/market/advance", json={"bars": 9})
            for order in (buy, sale, nothing):
                assert alice.ask("DELETE", f"/api/v1/orders/{order['id']}").status_code == 200
            assert alice.sells("all", "GONE")["price"] == 10
            assert alice.audit()["ok"]
    database.engine.dispose()


def test_an_order_in_a_ticker_that_is_gone_shows_the_others_no_price_of_the_past(new_database, market_file):
    """Its price is that of her last trade in it, an hour ago; the market has cost 50 since, and 100 now."""
    database = new_database().migrate()
    minute = int(datetime.now(UTC).timestamp()) // 60 % 1000

    def price(number):
        return 100 if (number - minute) % 1000 < 100 else 50

    both, one = market_file("both.csv", IBM=price, GONE=lambda n: 10), market_file("one.csv", IBM=price)
    with Here(database.url, SAMPLE_MARKET=both) as server:
        alice = server.trader()
        alice.buys(2, "GONE")
        with restarted(server, SAMPLE_MARKET=one):
            trades_an_hour_ago(database)
            order = alice.rests("buy", 1, "IBM", limit_price=60)
            alice.rests("sell", 1, "GONE", limit_price=20)
            assert alice.get(f"/api/v1/orders/{order['id']}")["status"] == "open"
    database.engine.dispose()


def trades_an_hour_ago(database) -> None:
    """Book her only trade once more, as if an hour ago: trades themselves cannot be changed."""
    (row,) = database.run("SELECT * FROM ibkr_trades")
    columns = [name for name in row._fields if name != "id"]
    now = {
        "sqlite": "datetime(created_at, '-1 hour') || '.000000'",
        "postgresql": "created_at - interval '1 hour'",
    }
    changed = {"created_at": now[database.engine.dialect.name], "idempotency_key": "'an hour ago'"}
    copied = [changed.get(name, name) for name in columns]
    copy = f"INSERT INTO ibkr_trades ({', '.join(columns)}) SELECT {', '.join(copied)} FROM ibkr_trades"
    database.run(copy)


def test_costs_that_a_restart_changes_are_those_of_the_fill(new_database):
    """What was held back for an order may then be too little: it is canceled, and says so."""
    database = new_database().migrate()
    with Here(database.url) as server:
        alice = server.trader(cash=1000).sees("AAPL", at=100)
        alice.rests("buy", 1, "AAPL", limit_price=50)
        first = alice.rests("buy", 10, "AAPL", limit_price=95)
        with restarted(server, COMMISSION_BPS=100, SLIPPAGE_BPS=50):
            alice.sees("AAPL", at=95)
            assert alice.get(f"/api/v1/orders/{first['id']}")["status"] == "canceled"
            assert alice.sees("AAPL", at=50).orders[1]["status"] == "filled"
            assert alice.cash == Decimal("949.5")
            assert alice.get("/api/v1/balance")["reserved_cash"] == 0
            assert alice.audit()["ok"]
    database.engine.dispose()
