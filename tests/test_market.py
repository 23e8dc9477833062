"""A market that the bot's tests control: clock, pins, runs, results, drills, a file of one's own."""

import json
import random
import sys
import time
from contextlib import ExitStack
from decimal import Decimal

import pytest
import requests
from cast import ADMIN, Here, Server, exact, in_process
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session


def stop_clock(trader, at):
    answer = exact(trader.ask("PUT", "/api/v1/market/clock", json={"at": at}))
    assert "code" not in answer, answer
    return answer


def advance(trader, bars=1):
    return exact(trader.ask("POST", "/api/v1/market/advance", json={"bars": bars}))


def test_a_stopped_clock_shows_the_recorded_close(alice):
    assert stop_clock(alice, "2012-06-01T00:00:00Z")["now"] == "2012-06-01T00:00:00Z"
    price = alice.get("/api/v1/price/AAPL")
    assert (price["price"], price["timestamp"]) == (Decimal("560.99"), "2012-06-01T00:00:00Z")
    assert price["valid_until"] is None


def test_between_two_bars_the_clock_stops_at_the_earlier_one(alice):
    assert stop_clock(alice, "2012-06-03T15:00:00+02:00")["now"] == "2012-06-01T00:00:00Z"


def test_a_stopped_clock_moves_on_by_bars_and_ends_at_the_last(alice):
    stop_clock(alice, "2012-06-01T00:00:00Z")
    assert advance(alice)["now"] == "2012-06-04T00:00:00Z"
    assert advance(alice, 3)["now"] == "2012-06-07T00:00:00Z"
    assert advance(alice, 100_000)["now"] == "2013-03-01T00:00:00Z"


def test_a_running_clock_cannot_be_advanced(alice):
    stop_clock(alice, "2012-06-01T00:00:00Z")
    assert stop_clock(alice, None)["clock"] == "wall"
    assert advance(alice)["code"] == "clock_is_running"


def test_two_accounts_never_see_each_others_clock_or_pins(alice, bob):
    stop_clock(alice, "2012-06-01T00:00:00Z")
    stop_clock(bob, "2012-06-04T00:00:00Z")
    alice.sees("IBM", at=1)
    assert alice.get("/api/v1/price/AAPL")["price"] == Decimal("560.99")
    assert bob.get("/api/v1/price/AAPL")["price"] == Decimal("564.29")
    assert bob.get("/api/v1/price/IBM")["price"] != 1
    assert bob.get("/api/v1/market")["pins"] == {}


def test_a_pin_holds_until_it_is_let_go(alice):
    stop_clock(alice, "2012-06-01T00:00:00Z")
    alice.sees("AAPL", at="150.25")
    assert alice.get("/api/v1/market")["pins"] == {"AAPL": Decimal("150.25")}
    assert alice.buys(1, "AAPL")["price"] == Decimal("150.25")
    assert exact(alice.ask("DELETE", "/api/v1/market/prices/AAPL"))["pins"] == {}
    assert alice.get("/api/v1/price/AAPL")["price"] == Decimal("560.99")


def test_every_process_and_restart_agrees_on_a_stopped_clocks_price(new_database):
    database = new_database().migrate()
    with Server(database.url, workers=3) as server:
        alice = server.trader()
        stop_clock(alice, "2012-11-05T00:00:00Z")
        before = {
            alice.ask("GET", "/api/v1/price/GOOG", headers={"Connection": "close"}).text for _ in range(12)
        }
    with Server(database.url) as server:
        alice.server = server
        assert {alice.ask("GET", "/api/v1/price/GOOG").text} == before


def test_a_trade_after_the_clock_moved_is_not_kept_waiting(server, alice, monkeypatch):
    """A process may know alice with her clock as it was. It looks again at once, without a pause."""
    stop_clock(alice, "2012-06-01T00:00:00Z")
    with in_process(alice) as (program, ask):
        monkeypatch.setattr(random, "uniform", lambda low, high: pytest.fail("It pauses."))
        order = {"ticker": "AAPL", "action": "buy", "quantity": 1}
        for price in (560.99, 562.83):
            trade = json.loads(ask("POST", "/api/v1/trade", json=order).text)
            assert (trade["price"], trade["market_price"]) == (price, price)
            advance(alice)  # In another process.
            (held,) = json.loads(ask("GET", "/api/v1/portfolio").text)["holdings"]
            assert held["current_price"] == float(alice.get("/api/v1/price/AAPL")["price"])
            advance(alice)


def pinning(trader, method, before):
    """`method`, and at each call the trader pins IBM at another price, from 1 on, in another process."""
    prices = iter(range(1, 99))

    def pinned_and_called(*arguments):
        if before:
            trader.sees("IBM", at=next(prices))
        answer = method(*arguments)
        if not before:
            trader.sees("IBM", at=next(prices))
        return answer

    return pinned_and_called


def test_a_portfolio_is_answered_though_pins_change_all_the_time(server, alice, monkeypatch):
    with in_process(alice) as (program, ask):
        always = pinning(alice, program["Account"].with_holdings, before=True)
        monkeypatch.setattr(program["Account"], "with_holdings", always)
        assert [ask("GET", "/api/v1/portfolio").status_code for _ in range(3)] == [200] * 3


def test_a_key_that_goes_while_a_portfolio_is_priced_opens_nothing_more(alice, monkeypatch):
    """Nor is it a fault: what was read with it is not told."""
    with in_process(alice) as (program, ask):
        quotes = type(program["market"]).quotes

        def priced(*asked):
            gets_a_new_key(alice)
            return quotes(*asked)

        monkeypatch.setattr(type(program["market"]), "quotes", priced)
        monkeypatch.setattr(type(program["market"]), "is_ahead_of", lambda *_: True)
        answer = ask("GET", "/api/v1/portfolio")
    assert (answer.status_code, json.loads(answer.text)["code"]) == (401, "unauthorized")


def lose_connection():
    """What SQLAlchemy raises when the database has hung up."""
    raise OperationalError("", {}, Exception("gone"), connection_invalidated=True)


def once_after(first, method):
    """`method`, but for the first call, which does `first()` instead."""
    calls = iter([first])
    return lambda *arguments, **options: next(calls, lambda: method(*arguments, **options))()


def test_a_trade_is_booked_though_pins_change_all_the_time(alice, monkeypatch):
    """They change after the key was looked up, and before the account is locked."""
    with in_process(alice) as (program, ask):
        always = pinning(alice, program["Account"].with_key, before=False)
        monkeypatch.setattr(program["Account"], "with_key", always)
        monkeypatch.setattr(random, "uniform", lambda low, high: pytest.fail("It pauses."))
        order = {"ticker": "IBM", "action": "buy", "quantity": 1}
        booked = [json.loads(ask("POST", "/api/v1/trade", json=order).text) for _ in range(3)]
    assert [trade["price"] for trade in booked] == [1, 2, 3]


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_an_audit_whose_connection_is_lost_at_its_end_is_asked_for_again(alice, monkeypatch, method):
    with in_process(alice) as (program, ask):
        session = program["db"].session
        monkeypatch.setattr(session, "close", once_after(lose_connection, session.close))
        assert ask(method, "/api/v1/account/audit").status_code == 200


def test_a_drill_that_takes_time_happens_once(server, alice, monkeypatch):
    stop_clock(alice, "2012-06-01T00:00:00Z")
    with in_process(alice) as (program, ask):
        slept, sleep = [], time.sleep
        ask("GET", "/api/v1/portfolio")
        advance(alice)  # In another process: this one knows her clock as it was.
        monkeypatch.setattr(
            program["Account"], "locked", once_after(lose_connection, program["Account"].locked)
        )
        monkeypatch.setattr(time, "sleep", lambda seconds: (slept.append(seconds), sleep(seconds)))
        order = {"ticker": "AAPL", "action": "buy", "quantity": 1}
        drill = {"X-Simulate-Fault": "latency=7"}
        assert ask("POST", "/api/v1/trade", json=order, headers=drill).status_code == 200
        assert slept.count(0.007) == 1


def test_a_clock_whose_answer_met_a_lost_connection_has_moved_once(server, alice, monkeypatch):
    stop_clock(alice, "2012-06-01T00:00:00Z")
    with in_process(alice) as (program, ask):
        alice.sees("IBM", at=1)
        pins = sys.modules["models"].Pin
        monkeypatch.setattr(pins, "in_force", once_after(lose_connection, pins.in_force))
        moved = json.loads(ask("POST", "/api/v1/market/advance").text)
        assert moved["now"] == "2012-06-04T00:00:00Z"
    assert alice.get("/api/v1/market")["now"] == "2012-06-04T00:00:00Z"


class BreaksOff:
    """A body that cannot be read to its end, and when it is read again seems to end where it broke off."""

    def __init__(self):
        self.parts = [b"", b'{"ticker": "AAPL", "action": "buy", "quantity": 1}', None]

    def read(self, *_):
        part = self.parts.pop()
        if part is None:
            raise OSError
        return part


def test_a_body_that_broke_off_is_never_an_order(alice, monkeypatch):
    with in_process(alice) as (program, ask):
        ask("GET", "/api/v1/portfolio")  # Now the key is looked up just before a refusal. That fails once.
        monkeypatch.setattr(
            program["Account"], "with_key", once_after(lose_connection, program["Account"].with_key)
        )
        answer = ask(
            "POST",
            "/api/v1/trade",
            headers={"Content-Type": "application/json", "Transfer-Encoding": "chunked"},
            environ_overrides={"wsgi.input": BreaksOff(), "wsgi.input_terminated": True},
        )
        assert answer.status_code == 400
    assert alice.trades == []


def test_a_ticker_that_begins_as_the_clock_moves_can_be_traded_at_once(new_database, tmp_path):
    file = tmp_path / "prices.csv"
    days = [f"2020-01-0{day}T00:00:00Z,{ticker},{day}" for day, ticker in ((1, "OLD"), (2, "NEW"))]
    file.write_text("\n".join(["timestamp,ticker,price", *days]))
    with Here(new_database().migrate().url, SAMPLE_MARKET=file) as server:
        alice = server.trader()
        stop_clock(alice, "2020-01-01T00:00:00Z")
        assert alice.buys(1, "NEW")["code"] == "unknown_ticker"
        advance(alice)
        assert alice.buys(1, "NEW")["price"] == 2


# Starting over


def test_a_new_run_begins_with_cash_alone_and_the_past_stays_readable(alice):
    alice.sees("AAPL", at=10).buys(5, "AAPL")
    answer = exact(alice.ask("POST", "/api/v1/account/reset", json={"cash": "250.5"}))
    assert answer == {"user_id": alice.user_id, "run": 2, "cash_balance": Decimal("250.5")}
    assert (alice.cash, alice.holdings, alice.trades) == (Decimal("250.5"), {}, [])
    assert alice.buys(1, "AAPL")["run"] == 2
    (old,) = alice.get("/api/v1/trades", run=1)["trades"]
    assert (old["run"], old["quantity"]) == (1, 5)
    assert alice.audit() == {"ok": True, "trades": 2, "differences": []}


def test_without_an_amount_a_new_run_begins_with_the_starting_cash(alice):
    assert exact(alice.ask("POST", "/api/v1/account/reset"))["cash_balance"] == 100_000


# How did it do?


def test_the_summary_follows_a_worked_example(server):
    """1,000 dollars; points 1000, 1200 (peak), 900, 1100: a fall of 25 % from the peak."""
    alice = server.trader(cash=1000)
    alice.sees("AAPL", at=100).buys(5, "AAPL")  # cash 500, 5 AAPL at 100: 1000
    alice.sees("AAPL", at=140).sells(1, "AAPL")  # cash 640, 4 at 140: 1200; profit 40
    alice.sees("AAPL", at=65).sells(1, "AAPL")  # cash 705, 3 at 65: 900; loss 35
    alice.sees("AAPL", at=100).sells(1, "AAPL")  # cash 805, 2 at 100: 1005; profit 0
    alice.sees("AAPL", at="147.5")  # now: 805 + 295 = 1100
    history = alice.get("/api/v1/account/history", resolution="trade")
    assert [point["equity"] for point in history["points"]] == [1000, 1200, 900, 1005, 1100]
    figures = {
        "starting_cash": 1000,
        "equity": 1100,
        "total_return_percent": 10,
        "max_drawdown_percent": 25,
        "trades": 4,
        "realized_pnl": 5,
        "win_rate_percent": Decimal("33.33"),
        "profit_factor": Decimal("1.14285714"),
        "commission": 0,
    }
    assert figures.items() <= history["summary"].items()


def test_the_starting_cash_is_the_first_peak(server):
    alice = server.trader(cash=1000)
    alice.sees("AAPL", at=100).buys(1, "AAPL", at=200)
    history = alice.get("/api/v1/account/history")
    assert history["summary"]["max_drawdown_percent"] == 10


def test_ratios_without_a_value_are_null(alice):
    history = alice.get("/api/v1/account/history")
    assert (history["run"], len(history["points"])) == (1, 1)
    assert history["summary"]["win_rate_percent"] is history["summary"]["profit_factor"] is None


def test_the_last_point_is_the_portfolio_and_past_points_keep_their_prices(alice):
    """What is held beside the traded ticker is valued at the bar, or the pin, of that moment."""
    stop_clock(alice, "2012-06-01T00:00:00Z")
    alice.buys(10, "AAPL")
    advance(alice)
    alice.sees("MSFT", at=20).buys(1, "MSFT")
    advance(alice)
    alice.sees("MSFT", at=30).buys(1, "IBM")
    history = alice.get("/api/v1/account/history", resolution="trade")
    assert [point["timestamp"][:10] for point in history["points"]] == [
        "2012-06-01",
        "2012-06-04",
        "2012-06-05",
        "2012-06-05",
    ]
    values = [point["market_value"] for point in history["points"]]
    assert values[:2] == [Decimal("5609.9"), 10 * Decimal("564.29") + 20]
    assert values[2] == 10 * Decimal("562.83") + 30 + alice.get("/api/v1/price/IBM")["price"]
    assert history["points"][-1]["equity"] == history["summary"]["equity"] == alice.portfolio["equity"]


def test_an_ended_run_keeps_its_result(alice):
    stop_clock(alice, "2012-06-01T00:00:00Z")
    alice.buys(10, "AAPL")
    advance(alice)
    result = alice.get("/api/v1/account/history")
    alice.ask("POST", "/api/v1/account/reset")
    advance(alice, 50)
    alice.sees("AAPL", at=1)
    assert alice.get("/api/v1/account/history", run=1) == result


# Costs


def test_costs_apply_to_every_account_and_are_told(new_database):
    costs = {"COMMISSION_BPS": "10", "COMMISSION_MIN": "1", "SLIPPAGE_BPS": "50"}
    with Here(new_database().migrate().url, **costs) as server:
        alice = server.trader(cash=1000).sees("AAPL", at=100)
        assert alice.get("/api/v1/rules")["costs"] == {
            "commission_bps": 10,
            "commission_min": 1,
            "slippage_bps": 50,
        }
        bought = alice.buys(2, "AAPL")
        assert (bought["price"], bought["commission"]) == (Decimal("100.5"), 1)
        assert alice.holdings == {"AAPL": (2, 202)}
        sold = alice.sells(1, "AAPL", at=100)
        assert (sold["commission"], sold["realized_pnl"], sold["cash_balance"]) == (1, -2, 897)
        assert alice.get("/api/v1/account/history")["summary"]["commission"] == 2
        assert alice.audit()["ok"]


# Fault drills


@pytest.mark.parametrize("fault", ["price_unavailable", "rate_limited", "error_before_commit"])
def test_a_drilled_failure_books_nothing_and_leaves_the_key_usable(alice, fault):
    alice.sees("AAPL", at=1)
    before = alice.books
    response = alice.order("buy", 1, "AAPL", key="k", fault=fault)
    assert response.status_code == (429 if fault == "rate_limited" else 503)
    assert response.headers["Retry-After"]
    assert alice.books == before
    assert alice.buys(1, "AAPL", key="k")["quantity"] == 1


def test_an_error_after_commit_books_once_and_the_retry_shows_the_trade(alice):
    alice.sees("AAPL", at=1)
    lost = alice.order("buy", 1, "AAPL", key="k", fault="error_after_commit")
    assert (lost.status_code, lost.json()["code"]) == (503, "outcome_unknown")
    (booked,) = alice.trades
    assert alice.buys(1, "AAPL", key="k") == booked
    assert alice.trades == [booked]


def test_a_drilled_latency_delays_the_trade(alice):
    response = alice.sees("AAPL", at=1).order("buy", 1, "AAPL", fault="latency=300")
    assert response.status_code == 200
    assert response.elapsed.total_seconds() > 0.3


# A file of one's own


def test_a_file_of_ones_own_is_replayed(new_database, tmp_path):
    file = tmp_path / "market.csv"
    file.write_text(
        "timestamp,ticker,price\n2020-01-01T00:00:00Z,ABC,1.5\n"
        "2020-01-02T00:00:00Z,ABC,2\n2020-01-02T00:00:00Z,XYZ,0.00000001\n"
    )
    with Here(new_database().migrate().url, SAMPLE_MARKET=file) as server:
        alice = server.trader()
        stop_clock(alice, "2020-01-01T12:00:00Z")
        assert alice.get("/api/v1/price/abc")["price"] == Decimal("1.5")
        assert alice.get("/api/v1/price/xyz")["code"] == "unknown_ticker"
        advance(alice)
        assert alice.get("/api/v1/price/xyz")["price"] == Decimal("0.00000001")


# What was once wrong


def test_a_body_in_chunks_is_read_like_any_other(alice):
    def chunks():
        yield b'{"cash"'
        yield b": 5}"

    path = "/api/v1/account/reset"
    answer = alice.ask("POST", path, data=chunks(), headers={"Content-Type": "application/json"})
    assert exact(answer)["cash_balance"] == 5


@pytest.mark.parametrize("by", ["gunicorn", "app.py"])
@pytest.mark.parametrize(("spaces", "status"), [(0, 200), (1, 413), (10**6, 413)])
def test_a_body_in_chunks_may_be_as_long_as_any_other(alice, database, by, spaces, status):
    """What stands behind the limit is not cut off in silence."""
    order = b'{"ticker": "AAPL", "action": "buy", "quantity": 1}'
    body = order.ljust(64 * 1024 + spaces)
    headers = {"Content-Type": "application/json"}
    with ExitStack() as stack:
        if by == "app.py":
            alice.server = stack.enter_context(Here(database.url))
        answer = alice.ask("POST", "/api/v1/trade", data=iter([body[:100], body[100:]]), headers=headers)
        assert answer.status_code == status, answer.text
        assert len(alice.trades) == (status == 200)


@pytest.mark.parametrize("path", ["trades.csv", "orders.csv"])
def test_who_reads_slowly_keeps_no_connection_to_the_database(alice, path):
    alice.sees("AAPL", at=1).buys(1, "AAPL")
    alice.rests("buy", 1, "AAPL", limit_price="0.5")
    with in_process(alice) as (program, ask):
        heading, *rows = ask("GET", f"/api/v1/{path}").iter_encoded()  # All of them: one page.
        assert len(rows) == 1
        with program["app"].app_context():
            lines = ask("GET", f"/api/v1/{path}").iter_encoded()
            assert next(lines) == heading
            assert next(lines) == rows[0]
            assert program["db"].engine.pool.checkedout() == 0


def test_an_answer_counts_though_its_connection_is_lost_right_after_it(alice, monkeypatch):
    with in_process(alice) as (_, ask):
        database = sys.modules["database"]
        autocommit = database.psycopg2.extensions.connection.autocommit

        def switch(connection, on):
            if not on:
                connection.close()
            autocommit.__set__(connection, on)

        switched = property(autocommit.__get__, switch)
        monkeypatch.setattr(database.Watched, "autocommit", switched, raising=False)
        assert ask("GET", "/api/v1/portfolio").status_code == 200


def test_nobody_takes_a_second_connection_while_he_holds_one(alice, monkeypatch):
    """Four who do would wait for each other: a process has four."""
    alice.sees("AAPL", at=1).buys(1, "AAPL")
    alice.rests("buy", 1, "AAPL", limit_price="0.5")
    with in_process(alice, ADMIN_API_KEY=ADMIN) as (program, ask):
        in_use, market, models = [], program["market"], sys.modules["models"]
        read_only = models.read_only

        def noted(*statement, **values):
            in_use.append(program["db"].engine.pool.checkedout())
            return read_only(*statement, **values)

        def has_news(account):
            in_use.append(program["db"].engine.pool.checkedout())
            return True

        monkeypatch.setattr(models, "read_only", noted)
        monkeypatch.setattr(market, "is_ahead_of", has_news)
        for path in ("balance", "portfolio", "price/AAPL", "orders", "trades", "account/history"):
            assert ask("GET", f"/api/v1/{path}").status_code == 200
        order = {"ticker": "AAPL", "action": "buy", "quantity": 1}
        assert ask("POST", "/api/v1/trade", json=order).status_code == 200
        assert ask("GET", "/alpaca/v2/positions").status_code == 200
        admin = {"Authorization": f"Bearer {ADMIN}"}
        path = f"/api/v1/users/{alice.user_id}/corrections"
        wanted = {"ticker": "AAPL", "quantity": 1, "reason": "A transfer"}
        assert ask("POST", path, json=wanted, headers=admin).status_code == 201
        assert set(in_use) == {0}


@pytest.mark.parametrize("quantity", [str(Decimal(0.1)), f"0.1{'0' * 400}", "1e-1", "1000000000e-10"])
def test_digits_of_a_text_are_rounded_however_many_there_are(alice, quantity):
    assert alice.sees("AAPL", at=1).buys(quantity, "AAPL")["quantity"] == Decimal("0.1")


def test_a_rehearsal_with_a_key_that_was_used_is_answered_as_the_trade_would_be(alice):
    trade = alice.sees("AAPL", at=1).buys(1, "AAPL", key="k")
    alice.sees("AAPL", at=2)
    rehearsal = alice.order("buy", 1, "AAPL", key="k", params={"dry_run": "true"})
    assert exact(rehearsal) == trade | {"id": None, "dry_run": True}
    assert rehearsal.headers["Idempotent-Replayed"] == "true"
    other = alice.order("buy", 2, "AAPL", key="k", params={"dry_run": "true"})
    assert (other.status_code, exact(other)["code"]) == (422, "idempotency_key_reused")


def test_pages_of_a_run_go_on_when_a_new_one_begins(alice):
    alice.sees("AAPL", at=1)
    first, _ = alice.buys(1, "AAPL"), alice.buys(1, "AAPL")
    cursor = alice.get("/api/v1/trades", limit=1)["next_cursor"]
    alice.ask("POST", "/api/v1/account/reset")
    assert [trade["id"] for trade in alice.get("/api/v1/trades", cursor=cursor)["trades"]] == [first["id"]]


def test_digits_beyond_pythons_default_precision_stay_exact(server):
    alice = server.trader(cash="89999999999.99999999").sees("AAPL", at="0.00000001")
    alice.buys("9999999999.99999999", "AAPL")
    alice.sees("AAPL", at="9999999999.99999999")
    portfolio = alice.portfolio
    assert portfolio["market_value"] == Decimal("99999999999999999800")
    assert portfolio["unrealized_pnl"] == Decimal("99999999999999999700")
    assert portfolio["equity"] == Decimal("100000000089999999699.99999999")


def test_a_clock_that_is_moved_is_seen_by_every_process_at_once(alice, server):
    key = {"Authorization": f"Bearer {alice.key}", "Connection": "close"}
    alice.buys(1, "AAPL")
    for day in range(1, 13):
        now = stop_clock(alice, f"2012-03-{day:02}T00:00:00Z")["now"]
        for _ in range(3):  # Each over a new connection, so that both processes are asked.
            seen = requests.get(f"{server.url}/api/v1/portfolio", headers=key, timeout=9).json()
            assert seen["holdings"][0]["price_timestamp"] == now


# Files as people have them


SPREADSHEET = (
    b"\xef\xbb\xbfDatum;Date;Ticker;Open;High;Low;Close;Volume\r\n"
    b"x;2024-03-08;IBM;11,5;13;11;12,25;7\r\n;;;;;;;\r\nx;2024-03-07;IBM;10;12;9;11,50000000476837;\r\n"
)
YFINANCE = (
    b"Price,Close,Close,High,High,Low,Low,Open,Open,Volume,Volume\n"
    b"Ticker,AAPL,IBM,AAPL,IBM,AAPL,IBM,AAPL,IBM,AAPL,IBM\nDate,,,,,,,,,,\n"
    b"2024-03-07,170.73,11.5,171.24,12.0,170.1,9.0,171.2,10.0,100,200\n2024-03-08,,12.25,,13.0,,11.0,,11.5,,7\n"
)
FOLDER = {
    "IBM.csv": b"Date,Open,High,Low,Close,Adj Close,Volume\n2024-03-07,10,12,9,11.5,11,200\n",
    "ibm-later.csv": b"time,symbol,close\n1709856000,ibm,12.25\n",
    "readme.txt": b"no prices",
}


@pytest.mark.parametrize(
    "files",
    [{"market.csv": SPREADSHEET}, {"market.csv": YFINANCE}, FOLDER],
    ids=["a spreadsheet's", "yfinance's", "a folder of bars"],
)
def test_a_file_is_replayed_as_people_have_it(new_database, tmp_path, files):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    path = tmp_path if len(files) > 1 else tmp_path / "market.csv"
    with Here(new_database().migrate().url, SAMPLE_MARKET=path) as server:
        alice = server.trader()
        state = stop_clock(alice, "2024-03-07T00:00:00Z")
        assert (state["first_bar"], state["last_bar"]) == ("2024-03-07T00:00:00Z", "2024-03-08T00:00:00Z")
        assert state["tickers"] == (["AAPL", "IBM"] if b"AAPL" in files.get("market.csv", b"") else ["IBM"])
        assert alice.buys(2, "IBM")["market_price"] == Decimal("11.5")
        assert advance(alice, 5)["now"] == "2024-03-08T00:00:00Z"
        assert alice.sells(2, "IBM")["realized_pnl"] == Decimal("1.5")


@pytest.mark.parametrize(("year", "here", "after"), [(2010, 3, 3), (2013, 1, 2)], ids=["after", "before"])
def test_a_clock_outside_a_file_that_was_changed_stands_at_its_nearest_bar(
    new_database, tmp_path, year, here, after
):
    file, database = tmp_path / "market.csv", new_database().migrate()
    file.write_text("date,ABC\n2012-06-01,5\n2012-06-02,6\n")
    with Here(database.url, SAMPLE_MARKET=file) as server:
        alice = server.trader()
        stop_clock(alice, "2012-06-01T00:00:00Z")
        alice.buys(1, "ABC")
    file.write_text(f"date,ABC\n{year}-01-01,1\n{year}-01-02,2\n{year}-01-03,3\n")
    first, at, then = (f"{year}-01-0{day}T00:00:00Z" for day in (1, here, after))
    with Here(database.url, SAMPLE_MARKET=file) as alice.server:
        assert alice.get("/api/v1/market").items() >= {"clock": "manual", "now": at}.items()
        price = alice.get("/api/v1/price/ABC")
        assert (price["price"], price["timestamp"], price["valid_until"]) == (here, at, None)
        assert alice.portfolio["holdings"][0]["price_timestamp"] == at
        assert alice.buys(1, "ABC")["price"] == here
        assert alice.get("/api/v1/account/history")["points"][-1]["timestamp"] == at
        assert alice.audit()["ok"]
        assert advance(alice)["now"] == then
        outside = alice.ask("PUT", "/api/v1/market/clock", json={"at": "2012-06-01T00:00:00Z"})
        assert exact(outside)["code"] == "invalid_request"
        assert stop_clock(alice, first)["now"] == first
        assert stop_clock(alice, None)["clock"] == "wall"


def test_a_holding_whose_ticker_a_changed_file_has_no_more_is_valued_and_sold_at_its_last_trade(
    new_database, tmp_path
):
    database, file = new_database().migrate(), tmp_path / "prices.csv"
    file.write_text("date,GONE,HERE\n2020-01-01,10,5\n2020-01-02,11,6\n")
    with Here(database.url, SAMPLE_MARKET=file) as server:
        alice = server.trader()
        stop_clock(alice, "2020-01-02T00:00:00Z")
        assert alice.buys(4, "GONE")["price"] == 11
    file.write_text("date,HERE\n2020-01-01,5\n2020-01-02,6\n")
    with Here(database.url, SAMPLE_MARKET=file) as server:
        alice.server = server
        (held,) = alice.portfolio["holdings"]
        assert (held["current_price"], held["stale"], alice.portfolio["equity"]) == (11, True, 100_000)
        assert held["market_time"] == "2020-01-02T00:00:00Z"
        assert alice.buys(1, "GONE")["code"] == "stale_price"
        assert alice.buys(1, "NEVER")["code"] == "unknown_ticker"
        assert alice.sells(4, "GONE")["market_price"] == 11
        assert alice.holdings == {}
        assert alice.ask("DELETE", "/api/v1/market/prices/NEVER").status_code == 404
        assert alice.audit()["ok"]


def test_many_prices_are_had_at_once(alice):
    alice.ask("PUT", "/api/v1/market/clock", json={"at": "2012-06-01T00:00:00Z"})
    alice.sees("IBM", at="150.25")
    answer = alice.get("/api/v1/prices", tickers="ibm,AAPL,NOPE,IBM,btc/usd")
    assert [quote["ticker"] for quote in answer["prices"]] == ["IBM", "AAPL", "BTC-USD"]
    assert answer["prices"] == [alice.get(f"/api/v1/price/{t}") for t in ("IBM", "AAPL", "BTC-USD")]
    assert answer["missing"] == {"NOPE": "unknown_ticker"}
    for tickers in (",".join(f"T{n}" for n in range(101)), "", ",", "AAPL,", "A B", "AAPL,A/D"):
        response = alice.ask("GET", "/api/v1/prices", params={"tickers": tickers})
        assert (response.status_code, response.json()["code"]) == (400, "invalid_request")
    hundred = ",".join(f"T{n}" for n in range(100))
    assert len(alice.get("/api/v1/prices", tickers=f"{hundred},t1")["missing"]) == 100


def test_the_price_of_the_sample_market_is_of_its_bar_and_never_stale(alice):
    """However long ago the recorded past is. A pin is taken in any spelling that a price is."""
    alice.ask("PUT", "/api/v1/market/clock", json={"at": "2012-06-02T00:00:00Z"})
    quote = alice.get("/api/v1/price/AAPL")
    assert (quote["market_time"], quote["stale"]) == ("2012-06-01T00:00:00Z", False)
    for path in ("btc/usd", "BTC%2FUSD"):
        response = alice.ask("PUT", f"/api/v1/market/prices/{path}", json={"price": 5})
        assert response.json()["pins"] == {"BTC-USD": 5}
        response = alice.ask("DELETE", f"/api/v1/market/prices/{path}")
        assert response.json()["pins"] == {}


def test_a_pin_on_a_ticker_that_a_changed_file_has_no_more_can_be_let_go(new_database, tmp_path):
    database, file = new_database().migrate(), tmp_path / "prices.csv"
    file.write_text("date,GONE,HERE\n2020-01-01,10,5\n")
    with Here(database.url, SAMPLE_MARKET=file) as server:
        alice = server.trader().sees("GONE", at=7)
    file.write_text("date,HERE\n2020-01-01,5\n")
    with Here(database.url, SAMPLE_MARKET=file) as alice.server:
        assert alice.get("/api/v1/market")["pins"] == {"GONE": 7}
        assert exact(alice.ask("DELETE", "/api/v1/market/prices/GONE"))["pins"] == {}
        assert alice.get("/api/v1/price/GONE")["code"] == "unknown_ticker"


# A COMMIT whose answer is lost, and what may happen before the server looks again


def starts_over_with_nothing(trader):
    assert trader.ask("POST", "/api/v1/account/reset", json={"cash": 10}).status_code == 200


def starts_over(trader):
    assert trader.ask("POST", "/api/v1/account/reset").status_code == 200


def gets_a_new_key(trader):
    path = f"{trader.server.url}/api/v1/users/{trader.user_id}/rotate-key"
    answer = requests.post(path, headers={"Authorization": f"Bearer {ADMIN}"}, timeout=30)
    trader.session.headers["Authorization"] = f"Bearer {answer.json()['api_key']}"


@pytest.mark.parametrize("key", [None, "k"])
@pytest.mark.parametrize("meanwhile", [starts_over, starts_over_with_nothing, gets_a_new_key])
def test_what_became_of_a_trade_is_unknown_when_all_has_changed_before_it_is_looked_up(
    server, alice, monkeypatch, meanwhile, key
):
    """It is never booked once more in another run, and never answered as if it had been refused."""
    stop_clock(alice, "2012-06-01T00:00:00Z")
    with in_process(alice) as (program, ask):
        commit = Session.commit

        def commits_and_loses_the_answer(session):
            monkeypatch.setattr(Session, "commit", commit)
            session.commit()
            session.close()
            meanwhile(alice)
            lose_connection()

        monkeypatch.setattr(Session, "commit", commits_and_loses_the_answer)
        order = {"ticker": "AAPL", "action": "buy", "quantity": 1}
        answer = ask("POST", "/api/v1/trade", json=order, headers={"Idempotency-Key": key} if key else {})
    assert (answer.status_code, json.loads(answer.text)["code"]) == (503, "outcome_unknown")
    assert len(alice.get("/api/v1/trades", run=1)["trades"]) == 1
    assert alice.audit() == {"ok": True, "trades": 1, "differences": []}


def test_a_market_of_ones_own_has_books_of_its_own(program, tmp_path):
    (tmp_path / "my market.csv").write_text("timestamp,ticker,price\n2024-03-01,XYZ,5\n")
    settings = {"DATABASE_URL": "", "SAMPLE_MARKET": tmp_path / "my market.csv"}
    server = Server("", command=[sys.executable, "app.py"], **settings)
    server.folder = program
    with server:
        assert f"{server.url}/api/v1/price/XYZ" in server.log()  # A ticker that there is.
    assert (program / "instance" / "sample-my-market.db").exists()
    assert not (program / "instance" / "sample.db").exists()
