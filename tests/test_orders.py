"""Orders that rest: what makes them due, what they are filled at, and what hangs on what."""

import sys
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path

import pytest
from cast import Database, Here

sys.path.insert(0, str(Path(__file__).parent.parent))

from models import Account, Costs
from orders import Passed, PlacedOrder, Tick, settle

BARS = """timestamp,ticker,open,high,low,close,volume
2024-03-04T10:00:00Z,XYZ,100,100,100,100,1
2024-03-04T11:00:00Z,XYZ,101,104,97,102,1
2024-03-04T12:00:00Z,XYZ,102,111,90,105,1
2024-03-04T13:00:00Z,OTHER,50,50,50,50,1
2024-03-05T10:00:00Z,XYZ,80,130,80,130,1
2024-03-06T10:00:00Z,XYZ,130,130,120,125,1
"""


# Without a database: orders, prices, and what comes of them.


def resting(action, order_type, id=1, **more):
    more = {name: Decimal(number) for name, number in more.items()}
    kind = {"ticker": "XYZ", "action": action, "order_type": order_type, "time_in_force": "gtc"}
    order = PlacedOrder(id=id, **kind, quantity=Decimal(1), status="open", day=date(2024, 3, 4))
    order.is_triggered = False
    for name, value in more.items():
        setattr(order, name, value)
    return order


def bar(*prices) -> Passed:
    opened, high, low = map(Decimal, prices)
    return Passed(datetime(2024, 3, 4, tzinfo=UTC), opened, high, low, "sample")


def shown(orders, *bars):
    """The ids of the orders that are filled, with the price that makes them due."""
    filled = []
    ticks = [Tick(one.market_time, {"XYZ": one}) for one in bars]
    for _, due in settle(orders, ticks, lambda *_: None):
        due.order.close("filled", orders)
        filled.append((due.order.id, due.market_price))
    return filled


@pytest.mark.parametrize(
    ("order", "prices", "due"),
    [
        (resting("buy", "limit", limit_price=95), (100, 104, 96), None),
        (resting("buy", "limit", limit_price=95), (100, 104, 95), 95),
        (resting("buy", "limit", limit_price=95), (94, 104, 90), 94),
        (resting("sell", "limit", limit_price=105), (100, 104, 96), None),
        (resting("sell", "limit", limit_price=105), (100, 105, 96), 105),
        (resting("sell", "limit", limit_price=105), (106, 107, 96), 106),
        (resting("buy", "stop", stop_price=105), (100, 104, 96), None),
        (resting("buy", "stop", stop_price=105), (100, 105, 96), 105),
        (resting("buy", "stop", stop_price=105), (107, 110, 96), 107),
        (resting("sell", "stop", stop_price=95), (100, 104, 96), None),
        (resting("sell", "stop", stop_price=95), (100, 104, 95), 95),
        (resting("sell", "stop", stop_price=95), (90, 104, 89), 90),
    ],
)
def test_a_bar_makes_an_order_due_where_it_reaches_it(order, prices, due):
    assert shown([order], bar(*prices)) == ([] if due is None else [(1, due)])


def test_a_stop_that_the_open_has_jumped_over_waits_like_a_limit_from_the_next_bar_on():
    order = resting("buy", "stop_limit", stop_price=105, limit_price=106)
    assert shown([order], bar(110, 110, 100)) == []
    assert order.is_triggered
    assert shown([order], bar(110, 112, 107), bar(108, 109, 106)) == [(1, 106)]


def test_a_trailing_stop_is_judged_by_the_stop_that_it_had_before_the_bar():
    order = resting("sell", "trailing_stop", stop_price=90, trail_percent=10)
    assert shown([order], bar(100, 120, 91)) == []
    assert order.stop_price == 108
    assert shown([order], bar(115, 118, 109)) == []
    assert order.stop_price == 108
    assert shown([order], bar(112, 200, 108)) == [(1, 108)]


@pytest.mark.parametrize(
    ("prices", "filled"),
    [((100, 112, 95), 1), ((100, 109, 89), 2), ((100, 112, 89), 2), ((111, 112, 80), 1), ((85, 112, 80), 2)],
)
def test_of_two_that_cancel_each_other_the_open_decides_or_else_the_stop(prices, filled):
    gain = resting("sell", "limit", id=1, limit_price=110)
    loss = resting("sell", "stop", id=2, stop_price=90)
    gain.parent_id = loss.parent_id = 9
    assert [id for id, _ in shown([gain, loss], bar(*prices))] == [filled]
    assert {gain.status, loss.status} == {"filled", "canceled"}


@pytest.mark.parametrize("ids", [(1, 2), (2, 1)])
def test_a_stop_that_is_jumped_over_leaves_the_bar_to_its_pair_whichever_came_first(ids):
    gain = resting("sell", "limit", id=ids[0], limit_price=110)
    loss = resting("sell", "stop_limit", id=ids[1], stop_price=95, limit_price="94.9")
    gain.parent_id = loss.parent_id = 9
    orders = sorted([gain, loss], key=lambda order: order.id)
    assert shown(orders, bar(90, 115, 90)) == [(gain.id, 110)]


def test_a_trailing_stop_moves_wherever_a_bar_is_better_by_a_hair_than_the_best_before():
    for action, best, better in (("sell", 100, "100.00000003"), ("buy", 100, "99.99999997")):
        for trail in ({"trail_percent": 10}, {"trail_amount": 10}):
            order = resting(action, "trailing_stop", **trail)
            order.trail(Decimal(best))
            stop = order.stop_price
            assert shown([order], bar(best, best, best)) == []
            assert order.stop_price == stop
            assert shown([order], bar(best, max(best, Decimal(better)), min(best, Decimal(better)))) == []
            assert order.stop_price != stop


def test_what_a_purchase_brought_goes_live_with_its_fill_and_sees_the_next_bar_first():
    entry = resting("buy", "limit", id=1, limit_price=95)
    loss = resting("sell", "stop", id=2, stop_price=90)
    loss.parent_id, loss.status = 1, "held"
    assert shown([entry, loss], bar(100, 100, 80)) == [(1, 95)]
    assert loss.status == "open"
    assert shown([entry, loss], bar(85, 100, 80)) == [(2, 85)]


def test_what_two_sales_of_one_group_hold_back_is_held_back_once():
    alice = Account(user_id=1, run=1, cash_balance=Decimal(10), starting_cash=Decimal(10))
    gain = resting("sell", "limit", id=1, limit_price=110)
    loss = resting("sell", "stop", id=2, stop_price=90)
    loss.parent_id = 1
    alice.orders = [gain, loss, resting("sell", "limit", id=3, limit_price=99)]
    assert alice.reserved_shares("XYZ") == 2
    assert alice.reserved_shares("XYZ", but=1) == 1


def test_a_bar_that_nothing_happens_in_costs_no_look_at_an_order():
    class Unseen(PlacedOrder):
        def due_price(self, passed):
            raise AssertionError("looked at")

    order = resting("buy", "limit", limit_price=5)
    order.__class__ = Unseen
    assert shown([order], *[bar(100, 104, 96)] * 10) == []


# On a server.


@pytest.fixture(scope="module")
def exchange(new_database_on, engine_name, tmp_path_factory):
    """A broker whose market is the handful of bars above."""
    file = tmp_path_factory.mktemp("market") / "bars.csv"
    file.write_text(BARS)
    with Here(new_database_on(engine_name).migrate().url, SAMPLE_MARKET=file) as server:
        yield server


@pytest.fixture
def carol(exchange):
    return exchange.trader(name="carol").goes_to("2024-03-04T10:00:00Z")


def test_a_resting_limit_is_filled_at_its_limit_and_says_by_which_bar(carol):
    order = carol.places("buy", 10, "XYZ", "limit", limit_price="98.5")
    assert (order["status"], order["reserved_cash"]) == ("open", 985)
    assert carol.get("/api/v1/balance") == {
        "user_id": carol.user_id,
        "cash_balance": 100_000,
        "reserved_cash": 985,
        "buying_power": 99_015,
    }
    (fill,) = carol.advances(1)["fills"]
    assert (fill["price"], fill["market_price"], fill["order_id"]) == (
        Decimal("98.5"),
        Decimal("98.5"),
        order["id"],
    )
    assert fill["market_time"] == "2024-03-04T11:00:00Z"
    filled = carol.finds(order)
    assert (filled["status"], filled["trade_id"], filled["price"]) == ("filled", fill["id"], Decimal("98.5"))
    assert carol.get("/api/v1/balance")["reserved_cash"] == 0
    assert carol.audit()["ok"]


def test_what_is_marketable_is_filled_at_once_at_the_markets_better_price(carol):
    order = carol.places("buy", 10, "XYZ", "limit", limit_price=150)
    assert (order["status"], order["price"], order["reserved_cash"]) == ("filled", 100, 0)
    stopped = carol.places("sell", 4, "XYZ", "stop", stop_price=120)
    assert (stopped["status"], stopped["price"]) == ("filled", 100)
    assert carol.cash == 100_000 - 1000 + 400


def test_a_stop_is_filled_at_the_open_that_lies_beyond_it(carol):
    carol.buys(10, "XYZ")
    carol.places("sell", 10, "XYZ", "stop", stop_price=85)
    (fill,) = carol.advances(5)["fills"]
    assert (fill["price"], fill["market_price"], fill["market_time"]) == (80, 80, "2024-03-05T10:00:00Z")


def test_a_bracket_holds_its_exits_until_the_entry_is_filled_and_lets_one_cancel_the_other(carol):
    entry = carol.places(
        *("buy", 10, "XYZ", "limit"),
        limit_price=98,
        take_profit={"limit_price": 110},
        stop_loss={"stop_price": 85},
    )
    loss, gain, _ = carol.get("/api/v1/orders")["orders"]
    assert [(leg["status"], leg["parent_id"]) for leg in (gain, loss)] == [("held", entry["id"])] * 2
    carol.advances(1)
    assert [carol.finds(order)["status"] for order in (entry, gain, loss)] == ["filled", "open", "open"]
    assert carol.portfolio["holdings"][0]["available_quantity"] == 0
    refused = carol.sells(1, "XYZ")
    assert refused["detail"] == "This sells 1 XYZ and you have 10, 10 of it held back for open orders."
    (fill,) = carol.advances(1)["fills"]
    assert (fill["price"], fill["order_id"], fill["realized_pnl"]) == (110, gain["id"], 120)
    assert carol.finds(loss)["status"] == "canceled"
    assert carol.finds(loss)["reason"] == f"Order {gain['id']} was filled."


def test_a_purchase_that_is_filled_at_once_has_its_exits_live_from_the_next_price_on(carol):
    carol.places("buy", 1, "XYZ", "market", stop_loss={"stop_price": 99})
    (loss,) = carol.get("/api/v1/orders")["orders"]
    assert loss["status"] == "open"
    assert [fill["price"] for fill in carol.advances(1)["fills"]] == [99]


def test_shares_that_an_order_holds_back_are_there_for_no_other(carol):
    carol.buys(10, "XYZ")
    carol.places("sell", 6, "XYZ", "limit", limit_price=200)
    refused = carol.places("sell", 6, "XYZ", "stop", stop_price=50)
    assert (refused["code"], refused["required"], refused["available"]) == ("insufficient_shares", 6, 4)
    assert carol.places("sell", "all", "XYZ", "stop", stop_price=50)["quantity"] == 4
    assert carol.places("sell", "all", "XYZ", "stop", stop_price=50)["code"] == "insufficient_shares"


def test_a_sale_and_its_stop_hold_their_shares_back_once(carol):
    carol.buys(10, "XYZ")
    gain = carol.places("sell", 10, "XYZ", "limit", limit_price=110, stop_loss={"stop_price": 90})
    loss = carol.get("/api/v1/orders")["orders"][0]
    assert (gain["status"], loss["status"], loss["parent_id"]) == ("open", "open", gain["id"])
    carol.cancels(loss)
    assert carol.finds(gain)["status"] == "canceled"
    assert carol.portfolio["holdings"][0]["available_quantity"] == 10


def test_a_jump_of_the_clock_shows_the_one_price_where_it_lands(carol):
    low = carol.places("buy", 1, "XYZ", "limit", limit_price=91)
    high = carol.places("buy", 1, "XYZ", "stop", stop_price=104)
    carol.goes_to("2024-03-04T12:00:00Z")
    assert carol.finds(low)["status"] == "open"
    assert carol.finds(high)["price"] == 105


def test_a_pin_is_a_price_and_so_is_letting_it_go(carol):
    order = carol.places("buy", 1, "XYZ", "limit", limit_price=60)
    held = carol.places("buy", 1, "XYZ", "limit", limit_price=50)
    carol.sees("XYZ", at=55)
    assert carol.finds(order)["price"] == 60
    carol.advances(1)
    assert carol.finds(held)["status"] == "open"
    sold = carol.places("sell", 1, "XYZ", "limit", limit_price=102)
    carol.ask("DELETE", "/api/v1/market/prices/XYZ")
    assert carol.finds(sold)["price"] == 102


def test_a_day_ends_with_the_next_bar_of_another_date_before_that_is_looked_at(carol):
    carol.advances(1)
    day = carol.places(
        "buy", 1, "XYZ", "limit", limit_price=85, time_in_force="day", stop_loss={"stop_price": 70}
    )
    gtc = carol.places("buy", 1, "XYZ", "limit", limit_price=85)
    carol.advances(2)
    assert carol.finds(day)["status"] == "open"
    carol.advances(1)
    assert [carol.finds(order)["status"] for order in (day, gtc)] == ["expired", "filled"]
    assert carol.get("/api/v1/orders")["orders"] == []


@pytest.mark.parametrize("time_in_force", ["ioc", "fok"])
def test_at_once_or_not_at_all(carol, time_in_force):
    order = carol.places("buy", 1, "XYZ", "limit", limit_price=90, time_in_force=time_in_force)
    assert (order["status"], order["reason"]) == ("canceled", "The market was at 100.")
    assert (
        carol.places("buy", 1, "XYZ", "limit", limit_price=100, time_in_force=time_in_force)["price"] == 100
    )
    assert carol.places("buy", 10**6, "XYZ", "limit", limit_price=90, time_in_force=time_in_force)[
        "code"
    ] == ("insufficient_funds")


def test_a_replacement_may_use_what_the_old_order_held_back(carol):
    old = carol.places("buy", 1000, "XYZ", "limit", limit_price=99, stop_loss={"stop_price": 80})
    new = carol.replaces(old, limit_price=95, quantity=1050)
    assert (new["replaces"], new["reserved_cash"], new["status"]) == (old["id"], 99_750, "open")
    loss = carol.get("/api/v1/orders")["orders"][1]
    assert (loss["parent_id"], loss["quantity"], loss["status"]) == (new["id"], 1050, "held")
    assert (carol.finds(old)["status"], carol.finds(old)["reserved_cash"]) == ("replaced", 0)
    before = carol.books
    assert carol.replaces(new, quantity=2000)["code"] == "insufficient_funds"
    assert carol.replaces(old, quantity=1)["code"] == "not_open"
    assert carol.books == before
    assert carol.replaces(new, limit_price=101, quantity=2)["price"] == 100


@pytest.mark.parametrize("legs", [{"take_profit": {"limit_price": 110}}, {"stop_loss": {"stop_price": 80}}])
def test_an_exit_that_stands_alone_can_be_replaced_while_it_is_held(carol, legs):
    entry = carol.places("buy", 1, "XYZ", "limit", limit_price=98, **legs)
    leg = carol.get("/api/v1/orders")["orders"][0]
    price, wanted, wrong = ("limit_price", 101, 98) if "take_profit" in legs else ("stop_price", 82, 98)
    assert carol.replaces(leg, **{price: wrong})["code"] == "invalid_request"
    new = carol.replaces(leg, **{price: wanted})
    assert (new["status"], new["parent_id"], new[price]) == ("held", entry["id"], wanted)


def test_a_changed_quantity_is_rounded_as_a_new_one_is(carol):
    order = carol.places("buy", 1, "XYZ", "limit", limit_price=90)
    order = carol.replaces(order, quantity="1.999999999")
    assert order["quantity"] == Decimal("1.99999999")
    path, key = f"/api/v1/orders/{order['id']}", {"Idempotency-Key": "changed"}
    first = carol.ask("PATCH", path, json={"quantity": "2.999999999"}, headers=key)
    same = carol.ask("PATCH", path, json={"quantity": 2.99999999}, headers=key)
    assert (first.status_code, same.json()["id"]) == (200, first.json()["id"])
    before, order = carol.books, first.json()
    assert carol.replaces(order, quantity="0.000000009")["code"] == "invalid_request"
    assert carol.books == before


def test_a_page_of_a_run_goes_on_after_a_reset(carol):
    placed = [carol.places("buy", 1, "XYZ", "limit", limit_price=9)["id"] for _ in range(3)]
    page = carol.get("/api/v1/orders", status="all", limit=2)
    carol.ask("POST", "/api/v1/account/reset")
    rest = carol.get("/api/v1/orders", status="all", limit=2, cursor=page["next_cursor"])
    assert [order["id"] for order in rest["orders"]] == placed[:1]


def test_two_exits_cannot_be_put_upside_down(carol):
    carol.places(
        "buy",
        1,
        "XYZ",
        "limit",
        limit_price=98,
        take_profit={"limit_price": 110},
        stop_loss={"stop_price": 85},
    )
    loss, gain, _ = carol.get("/api/v1/orders")["orders"]
    before = carol.books
    assert carol.replaces(loss, stop_price=110)["code"] == "invalid_request"
    assert carol.replaces(gain, limit_price=85)["code"] == "invalid_request"
    assert carol.replaces(gain, quantity=2)["code"] == "invalid_request"
    assert carol.books == before
    assert carol.replaces(gain, limit_price=99)["status"] == "held"


def test_a_key_places_one_order_and_is_good_for_no_other(carol):
    first = carol.places("buy", 1, "XYZ", "limit", key="mine", limit_price=90)
    assert carol.places("buy", "1.0", "xyz", "LIMIT", key="mine", limit_price="90.00") == first
    assert (
        carol.places("buy", 2, "XYZ", "limit", key="mine", limit_price=90)["code"] == "idempotency_key_reused"
    )
    assert carol.buys(1, "XYZ", key="mine")["order_id"] == first["id"]
    carol.buys(1, "XYZ", key="traded")
    refused = carol.places("buy", 1, "XYZ", "market", key="traded")
    assert (refused["code"], refused["trade_id"]) == ("idempotency_key_reused", carol.trades[0]["id"])
    assert len(carol.orders) == 1


def test_money_that_an_order_holds_back_is_not_there_for_a_trade(carol):
    carol.places("buy", 900, "XYZ", "limit", limit_price=99)
    refused = carol.buys(200, "XYZ")
    assert refused["detail"] == (
        "This costs 20000 and you have 100000, 89100 of it held back for open orders."
    )
    assert (refused["required"], refused["available"]) == (20_000, 10_900)


def test_a_stop_that_buys_holds_back_four_percent_more_and_pays_no_more_than_that(carol):
    order = carol.places("buy", 10, "XYZ", "stop", stop_price=110)
    assert (order["reserved_cash"], order["limit_price"]) == (1144, None)
    carol.goes_to("2024-03-05T10:00:00Z")  # Where it closes at 130.
    assert carol.finds(order)["status"] == "open"
    carol.sees("XYZ", at=114)
    assert carol.finds(order)["price"] == Decimal("114.4")


def test_a_reset_cancels_all_and_the_orders_of_the_run_stay_readable(carol):
    order = carol.places("buy", 1, "XYZ", "limit", limit_price=90)
    carol.ask("POST", "/api/v1/account/reset")
    assert carol.orders == []
    assert carol.get("/api/v1/orders", run=1, status="closed")["orders"] == [carol.finds(order)]
    assert carol.finds(order)["status"] == "canceled"
    assert carol.get("/api/v1/balance")["reserved_cash"] == 0


def test_orders_are_paged_and_filtered(carol):
    carol.advances(3)
    placed = [carol.places("buy", 1, t, "limit", limit_price=9)["id"] for t in ("XYZ", "OTHER", "XYZ")]
    page = carol.get("/api/v1/orders", limit=2)
    assert [order["id"] for order in page["orders"]] == [placed[2], placed[1]]
    assert page["next_cursor"] == placed[1]
    assert carol.get("/api/v1/orders", limit=1, ticker="xyz")["next_cursor"] == placed[2]
    assert carol.get("/api/v1/orders", limit=1, cursor=placed[1])["orders"][0]["id"] == placed[0]
    lines = carol.ask("GET", "/api/v1/orders.csv").text.splitlines()
    assert [line.split(",")[0] for line in lines] == ["id", *reversed(placed)]
    assert carol.ask("DELETE", "/api/v1/orders").json()["canceled"][0]["id"] == placed[0]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("reserved_cash = reserved_cash + 1 WHERE status = 'open' AND action = 'buy'", "holds back"),
        ("reserved_cash = reserved_cash + 1 WHERE status = 'held'", "holds back"),
        ("quantity = quantity + 1 WHERE status = 'open' AND action = 'buy'", "holds back"),
        ("limit_price = limit_price + 1 WHERE status = 'open' AND action = 'buy'", "holds back"),
        ("status = 'open' WHERE status = 'held'", "is open, and order"),
        ("status = 'held', reserved_cash = 0 WHERE status = 'open' AND action = 'buy'", "holds back"),
        ("run = 7 WHERE status = 'open'", "in a run that is over"),
        ("limit_price = limit_price - 1 WHERE status = 'filled'", "is no fill of it"),
        ("price = price - 1 WHERE status = 'filled'", "is no fill of it"),
        ("quantity = quantity - 1 WHERE status = 'filled'", "is no fill of it"),
        ("ticker = 'OTHER' WHERE status = 'filled'", "is no fill of it"),
        ("status = 'canceled', trade_id = NULL, price = NULL WHERE status = 'filled'", "knows nothing of it"),
        ("status = 'canceled', closed_at = placed_at, reserved_cash = 0 WHERE closed_at IS NULL", "0 orders"),
    ],
)
def test_the_audit_finds_an_order_that_was_changed_by_hand(exchange, carol, change, told):
    carol.places("buy", 10, "XYZ", "limit", limit_price=98)
    carol.advances(1)
    carol.places("buy", 5, "XYZ", "limit", limit_price=91, stop_loss={"stop_price": 70})
    assert carol.audit()["ok"]
    Database(exchange.database_url).run(f"UPDATE ibkr_orders SET {change} AND user_id = {carol.user_id}")
    assert any(told in sentence for sentence in carol.audit()["differences"])


def test_slippage_moves_a_stop_and_not_beyond_its_limit():
    order = resting("sell", "stop_limit", stop_price=95, limit_price="94.9")
    assert order.within_limit(Costs(slippage_bps=Decimal(5)).slipped("sell", Decimal(95)), order.limit) == (
        Decimal("94.9525")
    )
    assert order.within_limit(Costs(slippage_bps=Decimal(500)).slipped("sell", Decimal(95)), order.limit) == (
        Decimal("94.9")
    )


def test_minutes_that_passed_while_nobody_looked_are_shown_when_somebody_does(exchange):
    """The wall clock shows a bar a minute; the last look is moved into the past behind the broker's back."""
    dave = exchange.trader(name="dave")
    dave.goes_to("2024-03-06T10:00:00Z")
    order = dave.places("buy", 1, "XYZ", "limit", limit_price=91)
    dave.ask("PUT", "/api/v1/market/clock", json={"at": None})
    if dave.finds(order)["status"] == "filled":
        pytest.skip("the clock landed on a bar that fills it")
    day = dave.places("buy", 1, "XYZ", "limit", limit_price="0.01", time_in_force="day")
    Database(exchange.database_url).run(
        "UPDATE ibkr_balances SET settled_at = :then WHERE user_id = :me",
        then=datetime.now(UTC).replace(tzinfo=None) - timedelta(days=1),
        me=dave.user_id,
    )
    filled = dave.finds(order)
    assert filled["status"] == "filled"
    assert dave.trades[0]["market_time"] in ("2024-03-04T12:00:00Z", "2024-03-05T10:00:00Z")
    assert filled["closed_at"] == dave.trades[0]["timestamp"]  # When it was filled, and not when he looked.
    ended = dave.finds(day)
    assert ended["status"] == "expired"
    assert datetime.fromisoformat(ended["closed_at"]) < datetime.now(UTC) - timedelta(hours=22)
