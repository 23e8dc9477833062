"""Splits and dividends on live prices: Yahoo's, published once for all, booked to whoever held before.

The real yfinance asks a stand-in for Yahoo; three processes on each of the two databases.
"""

import itertools
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pytest
from cast import Database, Server
from sqlalchemy import inspect
from standins import MarketStandIn

HOLD_SECONDS = 1
names = itertools.count(1)


@pytest.fixture(scope="module")
def yahoo():
    with MarketStandIn() as stand_in:
        yield stand_in


@pytest.fixture(scope="module")
def live(program, yahoo, new_database):
    settings = {"PRICE_SOURCES": "yahoo", "PRICE_CACHE_SECONDS": HOLD_SECONDS, "CORPORATE_ACTIONS": "on"}
    copied = {"GUNICORN_CMD_ARGS": f"--chdir {program}"}
    database = new_database().migrate()
    with Server(database.url, workers=3, **yahoo.environment, **copied, **settings) as server:
        yield server


@pytest.fixture
def alice(live):
    return live.trader()


@pytest.fixture
def bob(live):
    return live.trader(name="bob")


@pytest.fixture
def ticker():
    return f"CORP{next(names)}"


def ago(**time) -> datetime:
    return datetime.now(UTC).replace(microsecond=0) - timedelta(**time)


def seen(moment: datetime) -> str:
    return str(int(moment.timestamp()))


def later() -> None:
    """When the quotes of now hold no longer."""
    time.sleep(HOLD_SECONDS + 0.1)


def of_types(trader, *types) -> list[tuple]:
    """Those trades, oldest first: for how many shares, at what price, the ratio, the cash."""
    told = ("trade_type", "quantity", "price", "ratio", "total_amount", "realized_pnl")
    return [tuple(t[name] for name in told) for t in trader.trades[::-1] if t["trade_type"] in types]


@pytest.mark.parametrize(
    ("new", "old", "price", "left", "rounded_off"),
    [(10, 1, "120.888", "103.3", "0"), (3, 2, "805.92", "15.495", "0"), (1, 8, "9671.04", "1.29125", "0")],
)
def test_a_split_multiplies_what_was_held_before_its_day(
    alice, yahoo, ticker, new, old, price, left, rounded_off
):
    yahoo.yahoo(ticker, "1208.88", seen=seen(ago(hours=2)))
    alice.buys("10.33", ticker)
    cost = alice.holdings[ticker][1]
    yahoo.split(ticker, ago(hours=1), new, old)
    yahoo.yahoo(ticker, price)
    later()
    portfolio = alice.portfolio  # The very answer that asks for the price tells of the split.
    (holding,) = portfolio["holdings"]
    assert (holding["quantity"], holding["cost_basis"]) == (Decimal(left), cost)
    assert portfolio["equity"] == Decimal(100_000)
    booked = ("split", Decimal("10.33"), Decimal(price), f"{new}:{old}", Decimal(rounded_off), Decimal(0))
    assert of_types(alice, "split") == [booked]
    assert alice.get("/api/v1/account/history")["summary"]["max_drawdown_percent"] == 0
    assert alice.audit()["ok"]


def test_what_a_split_rounds_off_is_paid_in_cash_at_the_new_price(alice, yahoo, ticker):
    yahoo.yahoo(ticker, "1000", seen=seen(ago(hours=2)))
    alice.buys("0.00000003", ticker)
    cash = alice.cash
    yahoo.split(ticker, ago(hours=1), 1, 2)
    yahoo.yahoo(ticker, "2000.5")
    later()
    assert alice.holdings[ticker][0] == Decimal("0.00000001")
    paid = Decimal("0.00001000")  # Half of 10^-8 x 2000.5, rounded down.
    assert of_types(alice, "split")[0][4:] == (paid, paid)
    assert alice.cash == cash + paid
    assert alice.audit()["ok"]


def test_a_dividend_is_cash_for_those_who_bought_before_its_day_and_for_nobody_else(
    alice, bob, yahoo, ticker
):
    yahoo.yahoo(ticker, "100", seen=seen(ago(hours=2)))
    alice.buys(7, ticker)
    yahoo.dividend(ticker, ago(hours=1), 0.2425)
    yahoo.yahoo(ticker, "99.75")
    later()
    bob.buys(7, ticker)
    assert bob.cash == 100_000 - 7 * Decimal("99.75")
    assert alice.cash == 100_000 - 700 + 7 * Decimal("0.2425")
    assert of_types(bob, "dividend") == []
    paid = Decimal("1.6975")
    assert of_types(alice, "dividend") == [("dividend", 7, Decimal("0.2425"), None, paid, paid)]
    assert alice.get("/api/v1/account/history")["summary"]["dividends"] == paid
    assert alice.audit()["ok"]
    assert bob.audit()["ok"]


def test_of_a_split_and_a_dividend_on_one_day_the_dividend_is_for_the_old_shares(alice, yahoo, ticker):
    yahoo.yahoo(ticker, "300", seen=seen(ago(hours=2)))
    alice.buys(4, ticker)
    yahoo.split(ticker, ago(hours=1), 3)
    yahoo.dividend(ticker, ago(hours=1), 1.5)
    yahoo.yahoo(ticker, "99.5")
    later()
    assert alice.holdings[ticker] == (12, 1200)
    assert [row[:2] + row[4:5] for row in of_types(alice, "split", "dividend")] == [
        ("dividend", 4, 6),
        ("split", 4, 0),
    ]


def test_one_that_comes_late_is_for_what_was_held_before_its_day(alice, yahoo, ticker):
    """Two were sold meanwhile, at the new price, and so in new shares."""
    yahoo.yahoo(ticker, "1200", seen=seen(ago(hours=3)))
    alice.buys(10, ticker)
    yahoo.yahoo(ticker, "120")
    later()
    alice.sells(2, ticker)
    yahoo.split(ticker, ago(hours=2), 10)
    yahoo.dividend(ticker, ago(hours=2, minutes=30), 0.1)  # Of the old shares: 1 dollar, says the split.
    later()
    assert alice.holdings[ticker][0] == 98
    assert [row[:3] for row in of_types(alice, "split", "dividend")] == [
        ("dividend", 10, 1),
        ("split", 10, 120),
    ]
    assert alice.audit()["ok"]


def test_a_late_split_takes_no_more_than_there_is(alice, yahoo, ticker):
    yahoo.yahoo(ticker, "10", seen=seen(ago(hours=3)))
    alice.buys(80, ticker)
    yahoo.yahoo(ticker, "80")
    later()
    alice.sells(60, ticker)
    yahoo.split(ticker, ago(hours=2), 1, 8)
    later()
    assert alice.holdings[ticker][0] == Decimal("2.5")
    assert alice.audit()["ok"]


def test_sales_for_which_a_late_split_leaves_no_shares_are_canceled(alice, yahoo, ticker):
    yahoo.yahoo(ticker, "10", seen=seen(ago(hours=3)))
    alice.buys(80, ticker)
    yahoo.yahoo(ticker, "80")
    later()
    promised = [alice.rests("sell", quantity, ticker, limit_price=900) for quantity in (8, 2, 60)]
    yahoo.split(ticker, ago(hours=2), 1, 8)
    later()
    assert [alice.finds(order)["status"] for order in promised] == ["open", "open", "canceled"]
    assert alice.finds(promised[2])["reason"] == "A split of 1:8 has left too few shares."
    assert alice.portfolio["holdings"][0]["available_quantity"] == 0
    assert alice.audit()["ok"]


def test_a_split_that_is_told_twice_is_one(alice, yahoo, ticker):
    yahoo.yahoo(ticker, "100", seen=seen(ago(hours=2)))
    alice.buys(10, ticker)
    hour_ago = ago(hours=1)
    yahoo.split(ticker, hour_ago, 2)
    yahoo.split(ticker, hour_ago.replace(second=(hour_ago.second + 1) % 60), 2)
    yahoo.yahoo(ticker, "50")
    later()
    assert alice.holdings[ticker][0] == 20


def test_the_audit_finds_a_dividend_that_nobody_has_told(alice, live, yahoo, ticker):
    yahoo.yahoo(ticker, "100", seen=seen(ago(hours=2)))
    alice.buys(10, ticker)
    yahoo.dividend(ticker, ago(hours=1), 0.5)
    later()
    assert alice.portfolio["cash_balance"] == 99_005
    assert alice.audit()["ok"]
    database = Database(live.database_url)
    names = [c["name"] for c in inspect(database.engine).get_columns("ibkr_trades") if c["name"] != "id"]
    again = {"idempotency_key": "'forged'", "cash_after": "cash_after + total_amount"}
    values = ", ".join(again.get(name, name) for name in names)
    database.run(
        f"INSERT INTO ibkr_trades ({', '.join(names)}) SELECT {values} FROM ibkr_trades "
        f"WHERE user_id = {alice.user_id} AND trade_type = 'dividend'"
    )
    paid = (
        f"SELECT MAX(cash_after) FROM ibkr_trades WHERE user_id = {alice.user_id} AND trade_type = 'dividend'"
    )
    database.run(f"UPDATE ibkr_balances SET cash_balance = ({paid}) WHERE user_id = {alice.user_id}")
    (difference,) = alice.audit()["differences"]
    assert difference.endswith("is a dividend that nobody has told.")


def test_what_yahoo_corrects_afterwards_is_logged_and_stays_as_it_was_booked(alice, live, yahoo, ticker):
    yahoo.yahoo(ticker, "100", seen=seen(ago(hours=2)))
    alice.buys(10, ticker)
    yahoo.split(ticker, ago(hours=1), 2)
    yahoo.yahoo(ticker, "50")
    later()
    assert alice.holdings[ticker][0] == 20
    yahoo.events(ticker, {})
    yahoo.split(ticker, ago(minutes=30), 3)  # Another day in the real world, and another ratio.
    later()
    assert alice.holdings[ticker][0] == 20
    assert f"split 2:1 in {ticker} on {ago(hours=1).date()} stays" in live.log()
    assert len(of_types(alice, "split")) == 1


def test_after_a_month_in_which_nobody_asked_all_is_booked_from_one_question(alice, live, yahoo, ticker):
    yahoo.yahoo(ticker, "400", seen=seen(ago(days=5)))  # Older ones are good for selling only.
    alice.buys(10, ticker)
    back = "SET timestamp = :then, valid_until = :then WHERE ticker = :ticker"
    Database(live.database_url).run(
        f"UPDATE ibkr_quotes {back}", then=f"{ago(days=31):%Y-%m-%d %H:%M:%S}", ticker=ticker
    )
    yahoo.dividend(ticker, ago(days=4), 0.25)
    yahoo.split(ticker, ago(days=2), 4)
    yahoo.dividend(ticker, ago(days=1), 0.3)
    yahoo.yahoo(ticker, "101")
    yahoo.clear()
    later()
    assert alice.portfolio["holdings"][0]["quantity"] == 40
    assert yahoo.count(ticker) == 1
    paths = [path for _, path in yahoo.requests if ticker in path]
    assert f"period1={seen(ago(days=61))[:6]}" in paths[0]
    assert [row[:3] for row in of_types(alice, "split", "dividend")] == [
        ("dividend", 10, 1),
        ("split", 10, 101),
        ("dividend", 40, Decimal("0.3")),
    ]
    assert alice.audit()["ok"]


def test_open_orders_follow_a_split_and_see_the_new_price_after_it(alice, yahoo, ticker):
    yahoo.yahoo(ticker, "1000", seen=seen(ago(hours=2)))
    alice.buys(10, ticker)
    bid = alice.rests("buy", 3, ticker, limit_price=900)
    stop = alice.rests("sell", 10, ticker, "stop", stop_price=800)
    yahoo.split(ticker, ago(hours=1), 10)
    yahoo.yahoo(ticker, "100")
    later()
    assert alice.holdings[ticker][0] == 100
    told = ("status", "quantity", "limit_price", "stop_price", "reserved_cash")
    assert [alice.finds(bid)[name] for name in told] == ["open", 30, 90, None, 2700]
    assert [alice.finds(stop)[name] for name in told] == ["open", 100, None, 80, 0]
    assert alice.audit()["ok"]


def test_a_crowd_that_looks_at_once_books_a_split_once(live, alice, bob, yahoo, ticker):
    yahoo.yahoo(ticker, "1000", seen=seen(ago(hours=2)))
    alice.buys(10, ticker)
    bob.buys(20, ticker)
    yahoo.split(ticker, ago(hours=1), 10)
    yahoo.dividend(ticker, ago(hours=1), 1)
    yahoo.yahoo(ticker, "100")
    later()
    asks = [
        lambda: alice.get("/api/v1/portfolio"),
        lambda: alice.order("buy", 1, ticker),
        lambda: alice.get("/api/v1/balance"),
        lambda: bob.get("/api/v1/portfolio"),
        lambda: bob.get("/api/v1/account/history"),
        lambda: bob.order("sell", 1, ticker),
    ]
    with ThreadPoolExecutor(24) as crowd:
        answers = list(crowd.map(lambda ask: ask(), asks * 8))
    bought, sold = ([a.status_code for a in answers[place::6]].count(200) for place in (1, 5))
    assert min(bought, sold) > 0
    for trader, held in ((alice, 10), (bob, 20)):
        rows = of_types(trader, "split", "dividend")
        assert [row[:2] for row in rows] == [("dividend", held), ("split", held)]
        assert trader.audit()["ok"]
    assert alice.holdings[ticker][0] == 100 + bought
    assert bob.holdings[ticker][0] == 200 - sold


def test_a_split_that_was_published_by_a_process_that_died_is_booked_by_the_next(
    program, yahoo, new_database, ticker
):
    settings = {"PRICE_SOURCES": "yahoo", "PRICE_CACHE_SECONDS": HOLD_SECONDS, "CORPORATE_ACTIONS": "on"}
    server = Server(
        new_database().migrate().url, **yahoo.environment, GUNICORN_CMD_ARGS=f"--chdir {program}", **settings
    )
    with server:
        alice, bob = server.trader(), server.trader(name="bob")
        yahoo.yahoo(ticker, "1000", seen=seen(ago(hours=2)))
        alice.buys(10, ticker)
        yahoo.split(ticker, ago(hours=1), 10)
        yahoo.yahoo(ticker, "100")
        later()
        assert bob.get(f"/api/v1/price/{ticker}")["price"] == 100
    yahoo.events(ticker, {})  # It is told no more: what was published is enough.
    with server:
        assert alice.get("/api/v1/balance")["cash_balance"] == 90_000
        assert len(of_types(alice, "split")) == 1
        assert alice.holdings[ticker] == (100, 10_000)


def test_what_cannot_be_is_left_out_and_logged_and_takes_nothing_from_the_price(alice, live, yahoo):
    past, to_come = int(ago(hours=1).timestamp()), int(ago(days=-1).timestamp())
    nan = float("nan")
    ratios = [(0, 1, past), (-10, 1, past), (1e9, 1, past), (nan, 1, past), (1, nan, past), (10, 1, to_come)]
    amounts = [(-1, past), (1e9, past), (nan, past), (100, past), (1, to_come)]  # 100 is all that it costs.
    strange = [
        *({"splits": {"1": {"date": at, "numerator": n, "denominator": d}}} for n, d, at in ratios),
        *({"dividends": {"1": {"date": at, "amount": amount}}} for amount, at in amounts),
        *({"dividends": "all", "splits": 7}, [1, 2, 3]),
    ]
    tickers = [f"STRANGE{number}" for number in range(len(strange))]
    for ticker, events in zip(tickers, strange, strict=True):
        yahoo.yahoo(ticker, "100", seen=seen(ago(hours=2)))
        alice.buys(10, ticker)
        yahoo.events(ticker, events)
        yahoo.yahoo(ticker, "99")
    later()
    assert [p["price"] for p in alice.get("/api/v1/prices", tickers=",".join(tickers))["prices"]] == [99] * 13
    assert alice.holdings == dict.fromkeys(tickers, (10, 1000))
    assert alice.cash == 100_000 - 13 * 1000
    log = live.log().splitlines()
    assert [t for t in tickers if not any("left out" in line and f"{t}" in line for line in log)] == []


def test_without_corporate_actions_none_is_booked(program, yahoo, new_database_on, ticker):
    settings = {"PRICE_SOURCES": "yahoo", "PRICE_CACHE_SECONDS": HOLD_SECONDS, "CORPORATE_ACTIONS": "off"}
    copied = {"GUNICORN_CMD_ARGS": f"--chdir {program}"}
    database = new_database_on("sqlite").migrate()
    with Server(database.url, **yahoo.environment, **copied, **settings) as server:
        alice = server.trader()
        assert alice.get("/api/v1/rules")["corporate_actions"] is False
        yahoo.yahoo(ticker, "100", seen=seen(ago(hours=2)))
        alice.buys(10, ticker)
        yahoo.split(ticker, ago(hours=1), 2)
        yahoo.yahoo(ticker, "50")
        later()
        assert alice.holdings[ticker] == (10, 1000)
    assert database.run("SELECT * FROM ibkr_corporate_actions") == []  # Nor will be, once it is on.


# Prices that were asked for between a day and its late publication


@pytest.mark.parametrize("late", ["split", "dividend"])
@pytest.mark.parametrize("action", ["buy", "sell"])
@pytest.mark.parametrize("looks", [True, False], ids=["looked at", "left alone"])
def test_what_an_order_brings_before_a_late_one_is_told_is_the_same_whoever_looks(
    alice, bob, yahoo, ticker, late, action, looks
):
    """It was bought or sold at a price without it. Nothing else was booked since before that day."""
    yahoo.yahoo(ticker, "100", seen=seen(ago(hours=3)))
    alice.buys(4, ticker)
    database, yesterday = Database(alice.server.database_url), ago(days=1)
    if database.engine.dialect.name == "sqlite":
        yesterday = yesterday.replace(tzinfo=None)
    set_back = "UPDATE ibkr_balances SET updated_at = :then WHERE user_id = :id"
    assert database.run(set_back, then=yesterday, id=alice.user_id) == 1
    limit = {"buy": "99.5", "sell": "100.5"}[action]
    alice.rests(action, 3, ticker, limit_price=limit)
    later()
    yahoo.yahoo(ticker, limit, seen=seen(ago(minutes=30)))
    bob.get(f"/api/v1/price/{ticker}")
    if looks:
        assert len(alice.trades) == 2
    later()
    if late == "split":
        yahoo.split(ticker, ago(hours=1), 2, 1)
    else:
        yahoo.dividend(ticker, ago(hours=1), 1.0)
    bob.get(f"/api/v1/price/{ticker}")
    booked = [(trade["trade_type"], trade["quantity"]) for trade in alice.trades]
    assert booked == [(late, 4), (action, 3), ("buy", 4)]
    held = 4 + (4 if late == "split" else 0) + (3 if action == "buy" else -3)
    assert alice.holdings[ticker][0] == held
    assert alice.audit()["ok"]


@pytest.mark.parametrize("replaced", ["entry", "stop_loss", "take_profit"])
@pytest.mark.parametrize(("new", "old"), [(2, 1), (1, 2)])
def test_exits_are_for_what_their_entry_is_for_when_a_late_split_finds_one_of_them_replaced(
    alice, bob, yahoo, ticker, replaced, new, old
):
    yahoo.yahoo(ticker, "20", seen=seen(ago(hours=3)))
    legs = {"take_profit": {"limit_price": 60}, "stop_loss": {"stop_price": 4}}
    entry = alice.rests("buy", 10, ticker, limit_price=8, **legs)
    later()
    yahoo.yahoo(ticker, "20", seen=seen(ago(minutes=30)))
    bob.get(f"/api/v1/price/{ticker}")
    of_type = {order["order_type"]: order for order in alice.orders if order["parent_id"]}
    chosen = {"entry": entry, "stop_loss": of_type["stop"], "take_profit": of_type["limit"]}[replaced]
    price = "stop_price" if replaced == "stop_loss" else "limit_price"
    alice.replaces(chosen, **{price: str(chosen[price] + 1)})
    later()
    yahoo.split(ticker, ago(hours=1), new, old)
    bob.get(f"/api/v1/price/{ticker}")
    working = [order for order in alice.orders if order["status"] in ("open", "held")]
    assert len(working) == 3
    assert len({order["quantity"] for order in working}) == 1
    assert alice.audit()["ok"]
    later()
    yahoo.yahoo(ticker, "3.5", seen=seen(ago(minutes=1)))  # In the new shares, and below each entry.
    assert len(alice.trades) == 1
    (held,) = alice.portfolio["holdings"]
    assert held["quantity"] == working[0]["quantity"]
    assert held["available_quantity"] == 0
    assert alice.audit()["ok"]
    later()
    yahoo.yahoo(ticker, "1000")
    assert alice.portfolio["holdings"] == []
    assert alice.audit()["ok"]
