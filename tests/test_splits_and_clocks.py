"""Splits and clocks that jump, run round and turn meanwhile; what comes late, and what is pinned."""

import inspect
import json
import time
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from types import SimpleNamespace

import pytest
import requests
from cast import ADMIN, Database, Here, Server, flask, loaded
from standins import MarketStandIn

PRICES = """timestamp,ticker,price,split,dividend
2020-01-01,OLD,1000,,
2020-01-01,XYZ,100,,
2020-01-02,XYZ,100,,
2020-01-03,XYZ,100,,
2020-01-04,XYZ,100,,
2020-01-05,XYZ,10,10:1,
2020-01-06,XYZ,10,,
2020-01-07,XYZ,10,,1
2020-01-08,XYZ,10,,
2020-01-01,REV,1,,
2020-01-05,REV,8,1:8,
2020-01-01,FEW,100,,
2020-01-05,FEW,100,,
2020-01-08,FEW,50,,
"""


def day(number: int) -> str:
    return f"2020-01-{number:02}T00:00:00Z"


@pytest.fixture(scope="module")
def recorded(new_database_on, tmp_path_factory):
    file = tmp_path_factory.mktemp("market") / "prices.csv"
    file.write_text(PRICES)
    settings = {"SAMPLE_MARKET": file, "CORPORATE_ACTIONS": "on"}
    with Here(new_database_on("sqlite").migrate().url, **settings) as server:
        yield server


@pytest.fixture
def alice(recorded):
    return recorded.trader()


def corrects(trader, **change):
    path = f"{trader.server.url}/api/v1/users/{trader.user_id}/corrections"
    return requests.post(path, json=change, headers={"Authorization": f"Bearer {ADMIN}"}, timeout=30)


def equities(trader) -> list:
    return [p["equity"] for p in trader.get("/api/v1/account/history", resolution="bar")["points"]]


def test_the_curve_does_not_jump_where_a_clock_that_has_passed_a_split_goes_back_over_it(alice):
    alice.goes_to(day(1))
    alice.buys(10, "XYZ")
    alice.advances(5)  # Over the split to the sixth.
    alice.goes_to(day(2))
    assert alice.holdings["XYZ"][0] == 10
    assert set(equities(alice)) == {100_000}


def test_the_curve_does_not_jump_where_a_running_clock_is_stopped_beyond_a_split(alice, recorded):
    alice.goes_to(day(1))
    alice.buys(10, "XYZ")
    alice.ask("PUT", "/api/v1/market/clock", json={"at": None})
    for number in (1, 6, 2, 8, 3):
        alice.goes_to(day(number))
        alice.ask("PUT", "/api/v1/market/clock", json={"at": None})
    curve = equities(alice)
    dividends = sum(t["total_amount"] for t in alice.trades if t["trade_type"] == "dividend")
    assert min(curve) >= 100_000
    assert max(curve) <= 100_000 + dividends


def test_a_correction_makes_no_jump_in_the_curve_of_a_recorded_market(alice):
    alice.goes_to(day(1))
    alice.buys(10, "FEW")  # It will cost half at the end of the file.
    assert corrects(alice, ticker="FEW", cash="1", reason="a present").status_code == 201
    alice.advances(1)
    history = alice.get("/api/v1/account/history", resolution="bar")
    assert {p["equity"] for p in history["points"]} <= {100_000, 100_001}
    assert {p["timestamp"][:4] for p in history["points"]} == {"2020"}


def test_of_two_splits_of_which_the_earlier_comes_late_both_count(program, new_database_on):
    """It is for the shares that the old ones have become since."""
    settings = {"PRICE_SOURCES": "yahoo", "PRICE_CACHE_SECONDS": 1, "CORPORATE_ACTIONS": "on"}
    url, hour = new_database_on("sqlite").migrate().url, timedelta(hours=1)
    moment = datetime.now(UTC).replace(microsecond=0)
    with MarketStandIn() as yahoo:
        copied = {"GUNICORN_CMD_ARGS": f"--chdir {program}"}
        with Server(url, workers=1, **yahoo.environment, **copied, **settings) as server:
            alice = server.trader()
            yahoo.yahoo("TWICE", "1000", seen=str(int((moment - 96 * hour).timestamp())))
            alice.buys(10, "TWICE")
            yahoo.split("TWICE", moment - hour, 10)
            yahoo.yahoo("TWICE", "50")  # All of it is in the price.
            time.sleep(1.1)
            assert alice.holdings["TWICE"][0] == 100
            yahoo.split("TWICE", moment - 48 * hour, 2)
            time.sleep(1.1)
            assert alice.holdings["TWICE"][0] == 200


def set_back(trader, minutes: int) -> None:
    """As if all of it had been so many minutes earlier."""
    database = Database(trader.server.database_url)
    at = f"{datetime.now(UTC) - timedelta(minutes=minutes):%Y-%m-%d %H:%M:%S.000000}"
    database.run("DROP TRIGGER IF EXISTS ibkr_trades_no_update")
    balances = "ibkr_balances SET acted_at = :at, settled_at = CASE WHEN settled_at > 0 THEN :at END"
    changes = ("ibkr_stretches SET begun_at = :at", "ibkr_trades SET created_at = :at", balances)
    for change in (*changes, "ibkr_pins SET created_at = :at"):
        database.run(f"UPDATE {change} WHERE user_id = :id", at=at, id=trader.user_id)


def test_what_was_in_force_before_a_purchase_is_not_booked_when_actions_are_switched_on(
    new_database_on, recorded
):
    """While nothing is booked (off, or another file) shares come all the same."""
    url, same = new_database_on("sqlite").migrate().url, {"SAMPLE_MARKET": recorded.settings["SAMPLE_MARKET"]}
    with Here(url, CORPORATE_ACTIONS="off", **same) as server:
        alice = server.trader()
        set_back(alice, 60 * 24)  # The account is a day old,
        alice.buys(1, "XYZ")  # and the share a moment.
    with Here(url, CORPORATE_ACTIONS="on", **same) as server:
        alice.server = server
        assert len(alice.trades) <= 2  # The minute may have turned, and brought one.


def test_the_curve_does_not_jump_where_an_open_order_was_filled_rounds_ago(alice):
    """It has the time at which a running clock showed its bar, as splits have."""
    alice.ask("PUT", "/api/v1/market/clock", json={"at": None})
    alice.sees("FEW", 100)
    alice.buys(1000 / alice.get("/api/v1/price/XYZ")["price"], "XYZ")
    alice.rests("buy", "0.01", "FEW", limit_price=60)  # 50 is what it costs in every round.
    alice.ask("DELETE", "/api/v1/market/prices/FEW")
    set_back(alice, 3 * 8)
    dividends = sum(t["total_amount"] for t in alice.trades if t["trade_type"] == "dividend")
    curve = equities(alice)
    assert min(curve) > 99_999
    assert max(curve) < 100_001 + dividends


def test_an_account_that_was_left_for_days_has_all_that_its_clock_has_passed(alice):
    """It is booked a day at a time, by one request all the same."""
    alice.ask("PUT", "/api/v1/market/clock", json={"at": None})
    alice.buys(1, "XYZ")
    set_back(alice, 3 * 24 * 60)
    lines = alice.ask("GET", "/api/v1/trades.csv", params={"action": "dividend"}).text.splitlines()[1:]
    assert 3 * 24 * 60 / 8 - 1 <= len(lines) <= 3 * 24 * 60 / 8 + 1
    assert alice.audit()["ok"]


def test_a_correction_comes_after_all_that_the_clock_has_passed(alice):
    alice.ask("PUT", "/api/v1/market/clock", json={"at": None})
    alice.buys(1, "XYZ")
    set_back(alice, 3 * 24 * 60)
    booked = corrects(alice, ticker="XYZ", cash="1", reason="a present").json()
    trades = [trade for trade in alice.trades if int(trade["id"]) > int(booked["id"])]
    assert len(trades) <= 2  # The minute may have turned.


def test_a_database_that_takes_no_writes_tells_what_was_booked_by_then(alice, recorded):
    """Where orders are open, more than a dividend may have come of it: that needs one that does."""
    bob = recorded.trader(name="bob")
    for trader in (alice, bob):
        trader.buys(1, "OLD")
    bob.rests("buy", 1, "OLD", limit_price=1)
    before = alice.get("/api/v1/balance"), alice.holdings
    for trader in (alice, bob):
        set_back(trader, 24 * 60)
    file = recorded.database_url.removeprefix("sqlite:///")
    read_only = f"sqlite:///file:{file}?mode=ro&uri=true"
    same = {"SAMPLE_MARKET": recorded.settings["SAMPLE_MARKET"], "CORPORATE_ACTIONS": "on"}
    with Here(read_only, **same) as there:
        here, alice.server = alice.server, there
        assert (alice.get("/api/v1/balance"), alice.holdings) == before
        assert len(alice.trades) == 1
        bob.server = there
        answer = bob.ask("GET", "/api/v1/balance")
        assert (answer.status_code, answer.json()["code"]) == (503, "database_unavailable")
    alice.server = bob.server = here
    assert bob.get("/api/v1/balance")["reserved_cash"] == 1
    assert alice.audit()["ok"]


def test_the_scheduler_books_the_splits_that_an_account_with_orders_has_passed(alice, recorded):
    alice.ask("PUT", "/api/v1/market/clock", json={"at": None})
    alice.buys(8, "XYZ")
    alice.rests("buy", 1, "OLD", limit_price=1)
    set_back(alice, 3 * 8)
    count = Database(recorded.database_url).run
    booked = "SELECT count(*) FROM ibkr_trades WHERE trade_type IN ('split', 'dividend') AND user_id = :id"
    assert count(booked, id=alice.user_id) == [(0,)]
    done = flask("settle", **{n: v for n, v in recorded.settings.items() if n != "PORT"})
    assert done.returncode == 0, done.stdout
    ((trades,),) = count(booked, id=alice.user_id)
    assert trades >= 6  # A split, its undoing and a dividend in each of three rounds, or two and a part.
    assert alice.audit()["ok"]


def test_a_dividend_makes_no_dip_in_the_curve_where_its_ticker_is_pinned(alice):
    """Its mark is valued at the bar's close, the marks before and after it at the pin."""
    alice.goes_to(day(6))
    alice.sees("XYZ", 200).buys(10, "XYZ")
    alice.advances(2)
    assert min(equities(alice)) >= 100_000


@pytest.fixture
def wall(new_database_on, recorded, monkeypatch):
    """The program in this process, on the recorded market, with a wall clock of the test's own: `clock` has
    its seconds, `ask` asks as somebody with an account, and `turns` moves the clock on meanwhile."""
    url, file = new_database_on("sqlite").migrate().url, recorded.settings["SAMPLE_MARKET"]
    with loaded(DATABASE_URL=url, PRICE_SOURCES="sample", SAMPLE_MARKET=file) as program:
        import models
        import orders
        import pricing

        round = 8 * 60
        clock = [(int(time.time()) // round + 2) * round]
        routes = inspect.unwrap(program["set_clock"]).__globals__

        class Wall(datetime):
            @classmethod
            def now(cls, zone=None):
                return datetime.fromtimestamp(clock[0], UTC)

        monkeypatch.setattr(pricing, "datetime", Wall)
        for module in (models, orders, pricing):
            monkeypatch.setattr(module, "now", Wall.now)
        monkeypatch.setitem(routes, "now", Wall.now)
        with program["app"].app_context():
            _, key = program["User"].open("late@example.com", Decimal(100_000))

        def ask(method, path, **body):
            headers = {"Authorization": f"Bearer {key}"}
            client = program["app"].test_client()
            answer = client.open(path, method=method, headers=headers, json=body or None)
            return answer.status_code, json.loads(answer.text)

        def turns(before=0, after=0, locked=routes["locked"]):
            """The clock moves on while the next request waits for its lock, and again right after that."""

            def slowly(*asked):
                monkeypatch.setitem(routes, "locked", locked)
                clock[0] += before
                account = locked(*asked)
                clock[0] += after
                return account

            monkeypatch.setitem(routes, "locked", slowly)

        yield SimpleNamespace(clock=clock, ask=ask, turns=turns, market=program["market"], routes=routes)
        with program["app"].app_context():
            program["db"].session.close()
            program["db"].engine.dispose()


def test_a_split_is_booked_when_the_minute_turns_while_a_running_clock_is_stopped(wall):
    """A slow catch-up takes from 3:59 to 4:00, when the split comes."""
    wall.clock[0] += 60
    order = {"ticker": "XYZ", "action": "buy", "quantity": "10"}
    assert wall.ask("POST", "/api/v1/trade", **order)[0] == 200
    wall.clock[0] += 3 * 60 - 1
    wall.turns(after=1)
    assert wall.ask("PUT", "/api/v1/market/clock", at=day(6))[0] == 200
    (held,) = wall.ask("GET", "/api/v1/portfolio")[1]["holdings"]
    assert held["quantity"] == 100


@pytest.mark.parametrize("after", [0, 60], ids=["and no more", "to where a split is taken back"])
@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("PUT", "/api/v1/market/prices/OLD", {"price": 7}),
        ("PUT", "/api/v1/market/clock", {"at": day(6)}),
        ("POST", "/api/v1/trade", {"ticker": "OLD", "action": "buy", "quantity": 1}),
        ("POST", "/api/v1/account/reset", {"cash": 5}),
        ("DELETE", "/api/v1/orders", {}),
    ],
    ids=["a pin", "a clock", "a trade", "a reset", "a cancel"],
)
def test_the_last_open_order_is_filled_as_the_minute_turns_while_an_account_is_changed(
    wall, method, path, body, after
):
    """FEW costs 50 in the last bar of a round; the account has no open order then, and is no worse for it."""
    wall.clock[0] += 6 * 60 + 59
    order = {"ticker": "FEW", "action": "buy", "quantity": 1, "order_type": "limit", "limit_price": 60}
    assert wall.ask("POST", "/api/v1/orders", **order)[1]["status"] == "open"
    wall.turns(before=1, after=after)
    assert wall.ask(method, path, **body)[0] == 200
    (order,) = wall.ask("GET", "/api/v1/orders?status=all&run=1")[1]["orders"]
    assert (order["status"], order["price"]) == ("filled", 60)
    if path.endswith("clock"):
        wall.ask("PUT", path, at=None)
    wall.ask("POST", "/api/v1/trade", ticker="XYZ", action="buy", quantity="0.01")
    wall.clock[0] += 8 * 60 * 3
    assert len(wall.ask("GET", "/api/v1/trades?action=dividend")[1]["trades"]) >= 3
    assert wall.ask("GET", "/api/v1/account/audit")[1]["ok"]


def test_an_order_that_is_filled_when_the_minute_and_a_pin_change_cannot_be_replaced_any_more(
    wall, monkeypatch
):
    wall.clock[0] += 6 * 60 + 59
    order = {"ticker": "FEW", "action": "buy", "quantity": 1, "order_type": "limit", "limit_price": 60}
    assert wall.ask("POST", "/api/v1/orders", **order)[1]["status"] == "open"

    look_up = wall.market.look_up

    def meanwhile(*asked):  # After the key was looked up, and before the account is locked.
        monkeypatch.setattr(wall.market, "look_up", look_up)
        assert wall.ask("PUT", "/api/v1/market/prices/OLD", price=7)[0] == 200
        wall.turns(after=1)
        return look_up(*asked)

    monkeypatch.setattr(wall.market, "look_up", meanwhile)
    status, told = wall.ask("PATCH", "/api/v1/orders/1", limit_price=61)
    assert (status, told["code"], told["order_status"]) == (409, "not_open", "filled")
    assert wall.ask("GET", "/api/v1/account/audit")[1]["ok"]


@pytest.mark.parametrize("path", ["portfolio", "account/history"])
def test_new_shares_are_valued_at_their_own_price_when_the_minute_turns_between_them(wall, monkeypatch, path):
    wall.clock[0] += 3 * 60 + 59
    wall.ask("POST", "/api/v1/trade", ticker="XYZ", action="buy", quantity=10)
    quotes = wall.market.quotes

    def priced(*asked):
        monkeypatch.setattr(wall.market, "quotes", quotes)
        found = quotes(*asked)
        wall.clock[0] += 1  # To 4:00, when the split comes.
        return found

    monkeypatch.setattr(wall.market, "quotes", priced)
    told = wall.ask("GET", f"/api/v1/{path}")[1]
    assert told.get("summary", told)["equity"] == 100_000


def test_a_history_has_the_price_of_what_was_bought_while_it_was_asked_for(wall, monkeypatch):
    wall.clock[0] += 60
    books = wall.routes["Books"].of

    def of(user_id):
        monkeypatch.setattr(wall.routes["Books"], "of", books)
        wall.ask("POST", "/api/v1/trade", ticker="OLD", action="buy", quantity=1)
        return books(user_id)

    monkeypatch.setattr(wall.routes["Books"], "of", of)
    summary = wall.ask("GET", "/api/v1/account/history")[1]["summary"]
    assert (summary["trades"], summary["equity"]) == (1, 100_000)


def test_a_drawdown_that_was_seen_does_not_shrink_at_a_correction(alice):
    alice.goes_to(day(7))
    alice.buys(500, "FEW")  # It costs half in the next bar.

    def drawdown():
        return alice.get("/api/v1/account/history")["summary"]["max_drawdown_percent"]

    alice.advances(1)
    assert drawdown() == 25
    assert corrects(alice, ticker="FEW", cash="1000", reason="a present").status_code == 201
    assert drawdown() == 25


def test_the_day_before_a_split_is_told_to_alpacas_clients_in_shares_of_today(alice):
    alice.goes_to(day(4))
    alice.buys(10, "XYZ")
    alice.advances(1)
    account, (position,) = (
        alice.session.get(f"{alice.server.url}/alpaca/v2/{path}", timeout=30).json()
        for path in ("account", "positions")
    )
    assert account["equity"] == account["last_equity"] == "100000"
    told = ("qty", "current_price", "lastday_price", "change_today", "unrealized_intraday_pl")
    assert [position[name] for name in told] == ["100", "10", "10", "0", "0"]
