"""Many at once: every race has one winner, and the books hold, on both databases and over two workers."""

import random
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from decimal import Decimal
from threading import Barrier, Lock

import pytest
import requests
from cast import ADMIN, Trader, in_process

MANY = 50


def at_once(actors: list[Trader], act) -> list:
    """What `act(actor, number)` answered for each actor, all let go at the same moment."""
    barrier = Barrier(len(actors))

    def wait_and_act(actor, number):
        actor.ask("GET", "/api/v1/balance")  # Its connection stands before the start.
        barrier.wait(30)
        return act(actor, number)

    with ThreadPoolExecutor(len(actors)) as pool:
        return list(pool.map(wait_and_act, actors, range(len(actors))))


def copies(trader: Trader, count=MANY) -> list[Trader]:
    """The same account, asked over `count` connections."""
    return [Trader(trader.server, trader.email, trader.key, trader.user_id) for _ in range(count)]


def outcomes(responses) -> Counter:
    """How often each outcome came: 200, or the code of the problem."""
    return Counter(200 if r.status_code == 200 else r.json()["code"] for r in responses)


def assert_books_hold(trader: Trader):
    assert trader.audit()["differences"] == []
    portfolio = trader.portfolio
    cost = sum(holding["cost_basis"] for holding in portfolio["holdings"])
    started = trader.get("/api/v1/account/history")["summary"]["starting_cash"]
    realized = sum(trade["realized_pnl"] or 0 for trade in all_trades(trader))
    assert portfolio["cash_balance"] + cost == started + realized
    assert portfolio["realized_pnl"] == realized


def all_trades(trader: Trader) -> list[dict]:
    trades, cursor = [], {}
    while cursor is not None:
        page = trader.get("/api/v1/trades", limit=500, **cursor)
        trades += page["trades"]
        cursor = page["next_cursor"] and {"cursor": page["next_cursor"]}
    return trades


def test_fifty_copies_of_an_order_book_one_trade_and_get_the_same_answer(alice):
    alice.sees("AAPL", at=100)
    responses = at_once(copies(alice), lambda a, _: a.order("buy", 3, "AAPL", 101, key="once"))
    assert outcomes(responses) == {200: MANY}
    assert len({response.text for response in responses}) == 1
    assert sum("Idempotent-Replayed" not in response.headers for response in responses) == 1
    assert len(alice.trades) == 1
    assert (alice.cash, alice.holdings) == (99697, {"AAPL": (3, 303)})


def test_of_fifty_orders_under_one_key_one_is_booked_and_the_others_hear_of_it(alice):
    alice.sees("AAPL", at=1)
    responses = at_once(copies(alice), lambda a, n: a.order("buy", n + 1, "AAPL", key="mine"))
    assert outcomes(responses) == {200: 1, "idempotency_key_reused": MANY - 1}
    assert len(alice.trades) == 1
    assert_books_hold(alice)


def test_of_fifty_buys_with_cash_for_one_one_is_booked(server):
    alice = server.trader(cash=100).sees("AAPL", at=100)
    responses = at_once(copies(alice), lambda a, _: a.order("buy", 1, "AAPL"))
    assert outcomes(responses) == {200: 1, "insufficient_funds": MANY - 1}
    assert (alice.cash, alice.holdings) == (0, {"AAPL": (1, 100)})


def test_of_fifty_sales_of_one_lot_one_is_booked(alice):
    alice.sees("AAPL", at=100).buys(7, "AAPL")
    responses = at_once(copies(alice), lambda a, _: a.order("sell", 7, "AAPL"))
    assert outcomes(responses) == {200: 1, "insufficient_shares": MANY - 1}
    assert (alice.cash, alice.holdings) == (100000, {})


def test_fifty_first_buys_of_a_ticker_make_one_holding(alice, database):
    alice.sees("IBM", at=2)
    responses = at_once(copies(alice), lambda a, _: a.order("buy", "1.5", "IBM"))
    assert outcomes(responses) == {200: MANY}
    assert alice.holdings == {"IBM": (75, 150)}
    rows = "SELECT count(*) FROM ibkr_stock_balances WHERE user_id = :id"
    assert database.run(rows, id=alice.user_id) == [(1,)]
    assert_books_hold(alice)


def test_opposite_orders_on_one_account_do_not_block_each_other(alice):
    alice.sees("AAPL", at=10).sees("IBM", at=20)
    for ticker in ("AAPL", "IBM"):
        alice.buys(100, ticker)

    def swap(trader, number):
        bought, sold = ("AAPL", "IBM") if number % 2 else ("IBM", "AAPL")
        return [trader.order("buy", 1, bought), trader.order("sell", 1, sold)]

    started = time.monotonic()
    responses = sum(at_once(copies(alice, 32), swap), [])
    assert outcomes(responses) == {200: 64}
    assert time.monotonic() - started < 10
    assert alice.holdings == {"AAPL": (100, 1000), "IBM": (100, 2000)}
    assert_books_hold(alice)


def test_one_hot_account_conserves_every_cent_and_share(server):
    """Sixteen threads buy and sell for one account, at prices that leave crooked remainders."""
    alice = server.trader(cash=2000).sees("AAPL", at="33.33333333").sees("IBM", at="7.00000007")

    def trade(trader, number):
        dice, responses = random.Random(number), []
        for _ in range(20):
            action, ticker = dice.choice(("buy", "buy", "sell")), dice.choice(("AAPL", "IBM"))
            quantity = Decimal(dice.randrange(1, 5 * 10**8)).scaleb(-8)
            responses.append(trader.order(action, quantity, ticker))
        return responses

    responses = sum(at_once(copies(alice, 16), trade), [])
    counts = outcomes(responses)
    assert counts.keys() <= {200, "insufficient_funds", "insufficient_shares"}
    trades = all_trades(alice)
    assert len(trades) == counts[200] > 100
    held = Counter()
    for booked in trades:
        held[booked["ticker"]] += booked["quantity"] * (1 if booked["trade_type"] == "buy" else -1)
    assert {ticker: quantity for ticker, (quantity, _) in alice.holdings.items()} == +held
    assert_books_hold(alice)


def test_the_audit_sees_one_moment_while_others_trade(alice):
    alice.sees("AAPL", at=1)

    def audit_or_trade(trader, number):
        if number % 2:
            return [trader.audit()["differences"] for _ in range(15)]
        return [trader.buys(1, "AAPL").get("code") or [] for _ in range(15)]

    assert sum(at_once(copies(alice, 16), audit_or_trade), []) == [[]] * 16 * 15


def test_trades_that_race_a_new_run_belong_to_one_run_or_the_other(alice):
    alice.sees("AAPL", at=1)

    def trade_or_reset(trader, number):
        if number % 8 == 0:
            return [trader.ask("POST", "/api/v1/account/reset", json={"cash": 50})]
        return [trader.order("buy", 3, "AAPL") for _ in range(5)]

    responses = sum(at_once(copies(alice, 32), trade_or_reset), [])
    assert outcomes(responses).keys() <= {200, "insufficient_funds"}
    runs = [alice.get("/api/v1/trades", run=run, limit=500)["trades"] for run in range(1, 6)]
    booked = sum(r.status_code == 200 for r in responses) - 4
    assert sum(map(len, runs)) == booked
    assert alice.audit() == {"ok": True, "trades": booked, "differences": []}


def test_many_accounts_write_at_the_same_time(server):
    """SQLite takes one writer at a time; the others wait, and nobody hears of a locked database."""
    traders = [server.trader().sees("AAPL", at=5) for _ in range(32)]
    answers = at_once(traders, lambda t, _: [t.order("buy", 1, "AAPL") for _ in range(8)])
    assert outcomes(sum(answers, [])) == {200: 256}
    assert {trader.cash for trader in traders} == {99960}


@pytest.mark.parametrize("end", [("POST", "/rotate-key"), ("DELETE", "")], ids=["a new key", "closed"])
def test_a_key_ends_when_the_trade_under_way_is_over(server, alice, database, end):
    """So that none is booked with it after the answer that it has ended."""
    method, path = end
    url = f"{server.url}/api/v1/users/{alice.user_id}{path}"
    admin = {"Authorization": f"Bearer {ADMIN}"}
    lock = {
        "sqlite": "BEGIN IMMEDIATE",
        "postgresql": f"SELECT * FROM ibkr_balances WHERE user_id = {alice.user_id} FOR UPDATE",
    }
    with database.engine.connect() as trade, ThreadPoolExecutor(1) as pool:
        trade.exec_driver_sql(lock[database.engine.dialect.name])
        ended = pool.submit(requests.request, method, url, headers=admin, timeout=30)
        time.sleep(0.5)
        assert not ended.done()
        over = datetime.now(UTC)
        trade.rollback()
        assert ended.result().status_code == 200
    assert alice.ask("GET", "/api/v1/balance").status_code == 401
    (closed,) = database.run("SELECT closed_at FROM ibkr_users WHERE id = :id", id=alice.user_id)
    if method == "DELETE":
        assert datetime.fromisoformat(str(closed[0])).replace(tzinfo=UTC) >= over


def test_a_turn_that_does_not_come_is_waited_for_once(server, alice, monkeypatch):
    with in_process(alice) as (program, ask):
        assert ask("GET", "/api/v1/portfolio").status_code == 200  # It is known by now.
        database = sys.modules["database"]
        monkeypatch.setattr(database, "TURN_SECONDS", 1)
        order = {"ticker": "AAPL", "action": "buy", "quantity": 1}
        account = alice.user_id if server.database_url.startswith("postgresql") else None
        with database.turns.setdefault(account, Lock()):
            started = time.monotonic()
            answer = ask("POST", "/api/v1/trade", json=order)
            assert (answer.status_code, "database_unavailable" in answer.text) == (503, True)
            assert 1 <= time.monotonic() - started < 1.9
