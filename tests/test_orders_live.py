"""Orders that rest on live prices: judged by each quote that anybody asked for, and by a fresh one at a look.

The real yfinance asks a stand-in for Yahoo; three processes on each of the two databases.
"""

import itertools
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import pytest
from cast import Server, environment
from standins import MarketStandIn

sys.path.insert(0, str(Path(__file__).parent.parent))

from pricing import LiveMarket

HOLD_SECONDS = 1
names = itertools.count(1)


@pytest.fixture(scope="module")
def yahoo():
    with MarketStandIn() as stand_in:
        yield stand_in


@pytest.fixture(scope="module")
def live_database(new_database):
    return new_database().migrate()


@pytest.fixture(scope="module")
def live(program, yahoo, live_database):
    settings = {"PRICE_SOURCES": "yahoo", "PRICE_CACHE_SECONDS": HOLD_SECONDS}
    copied = {"GUNICORN_CMD_ARGS": f"--chdir {program}"}
    with Server(live_database.url, workers=3, **yahoo.environment, **copied, **settings) as server:
        yield server


@pytest.fixture
def alice(live):
    return live.trader()


@pytest.fixture
def bob(live):
    return live.trader(name="bob")


@pytest.fixture
def ticker():
    return f"LIVE{next(names)}"


def later() -> None:
    """When the quotes of now hold no longer."""
    time.sleep(HOLD_SECONDS + 0.1)


def test_a_look_asks_for_a_fresh_price_and_fills_what_it_makes_due(alice, yahoo, ticker):
    yahoo.yahoo(ticker, "100")
    limit = alice.places("buy", 10, ticker, "limit", limit_price=95, stop_loss={"stop_price": 90})
    assert limit["status"] == "open"
    later()
    yahoo.yahoo(ticker, "94.5")
    assert alice.get("/api/v1/balance")["cash_balance"] == 100_000 - 950
    (trade,) = alice.trades
    assert (trade["price"], trade["order_id"]) == (95, limit["id"])
    assert trade["price_source"] == "yahoo_finance"
    later()
    yahoo.yahoo(ticker, "80")
    assert alice.get("/api/v1/portfolio")["holdings"] == []
    assert alice.trades[0]["price"] == 80
    assert alice.audit()["ok"]


def test_a_price_that_somebody_else_asked_for_counts_though_it_is_gone(alice, bob, yahoo, ticker):
    yahoo.yahoo(ticker, "100")
    order = alice.places("buy", 1, ticker, "limit", limit_price=90)
    later()
    yahoo.yahoo(ticker, "89")
    bob.get(f"/api/v1/price/{ticker}")
    later()
    yahoo.yahoo(ticker, "120")
    assert alice.finds(order)["price"] == 90
    assert alice.trades[0]["market_price"] == 89


def test_a_price_from_before_the_placing_fills_nothing(alice, bob, yahoo, ticker):
    yahoo.yahoo(ticker, "50")
    bob.get(f"/api/v1/price/{ticker}")
    later()
    yahoo.yahoo(ticker, "100")
    order = alice.places("buy", 1, ticker, "limit", limit_price=60)
    later()
    assert alice.finds(order)["status"] == "open"


def test_each_price_is_shown_once(alice, yahoo, ticker):
    yahoo.yahoo(ticker, "100")
    alice.buys(1, ticker)
    order = alice.places("sell", 1, ticker, "trailing_stop", trail_percent=10)
    for price in ("95", "120", "115"):
        later()
        yahoo.yahoo(ticker, price)
        assert alice.finds(order)["status"] == "open"
    assert alice.finds(order)["stop_price"] == 108


def test_a_price_that_is_said_once_more_ends_no_day(alice, yahoo, ticker, live_database):
    """Of a ticker that goes bad the last price is published again, with the time that it had."""
    other = f"{ticker}Z"
    yahoo.yahoo(ticker, "100")
    yahoo.yahoo(other, "50")
    alice.places("buy", 1, other, "limit", limit_price=40)
    alice.places("buy", 1, ticker, "limit", limit_price=1)
    live_database.run(
        "UPDATE ibkr_quotes SET timestamp = '2024-03-08 20:00:00.000000' WHERE ticker = :t", t=other
    )
    day = alice.places("buy", 1, ticker, "limit", limit_price=90, time_in_force="day")
    later()
    yahoo.yahoo(other, "null")
    assert alice.finds(day)["status"] == "open"
    assert alice.get(f"/api/v1/price/{other}")["stale"]
    assert alice.finds(day)["status"] == "open"


def test_a_published_price_counts_while_its_source_is_gone(alice, bob, yahoo, ticker):
    yahoo.yahoo(ticker, "100")
    order = alice.places("buy", 1, ticker, "limit", limit_price=90)
    later()
    yahoo.yahoo(ticker, "89")
    bob.get(f"/api/v1/price/{ticker}")
    later()
    yahoo.yahoo(ticker, status=503)
    assert alice.finds(order)["status"] == "filled"


def test_where_nobody_looks_the_scheduler_does(alice, yahoo, ticker, program, live_database):
    yahoo.yahoo(ticker, "100")
    order = alice.places("buy", 1, ticker, "stop", stop_price=110)
    later()
    yahoo.yahoo(ticker, "111")
    settings = {
        "DATABASE_URL": live_database.url,
        "PRICE_SOURCES": "yahoo",
        "PRICE_CACHE_SECONDS": HOLD_SECONDS,
    }
    done = subprocess.run(
        [sys.executable, "-m", "flask", "--app", "app", "settle"],
        cwd=program,
        env=environment(**yahoo.environment, **settings),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "have seen the prices of now" in done.stdout
    row = "SELECT status FROM ibkr_orders WHERE id = :id"
    assert live_database.run(row, id=int(order["id"])) == [("filled",)]


def test_nothing_is_bought_at_a_price_that_its_source_saw_long_ago(alice, yahoo, ticker):
    yahoo.yahoo(ticker, "100")
    order = alice.places("buy", 1, ticker, "limit", limit_price=95)
    later()
    yahoo.yahoo(ticker, "90", seen=str(int(time.time()) - 30 * 86400))
    assert alice.finds(order)["status"] == "open"
    later()
    yahoo.yahoo(ticker, "94")
    assert alice.finds(order)["status"] == "filled"


def test_a_day_order_ends_with_its_day_though_no_price_comes(alice, yahoo, ticker, live_database):
    yahoo.yahoo(ticker, "100")
    order = alice.places("buy", 1, ticker, "limit", limit_price=95, time_in_force="day")
    assert order["status"] == "open"
    live_database.run("UPDATE ibkr_orders SET day = '2020-01-01' WHERE id = :id", id=int(order["id"]))
    assert alice.finds(order)["status"] == "expired"
    assert alice.get("/api/v1/balance")["reserved_cash"] == 0


@pytest.mark.parametrize(
    ("ticker", "moment", "day"),
    [
        ("AAPL", "2024-03-08T20:59:59Z", "2024-03-08"),  # A Friday, at 15:59:59 in New York.
        ("AAPL", "2024-03-08T21:00:00Z", "2024-03-11"),
        ("AAPL", "2024-03-10T12:00:00Z", "2024-03-11"),
        ("AAPL", "2024-03-11T19:59:59Z", "2024-03-11"),  # In summer time.
        ("AAPL", "2024-03-11T20:00:00Z", "2024-03-12"),
        ("BRK-B", "2024-03-11T20:00:00Z", "2024-03-12"),
        ("BTC-USD", "2024-03-09T23:59:59Z", "2024-03-09"),
        ("BTC-USD", "2024-03-10T00:00:00Z", "2024-03-10"),
    ],
)
def test_a_day_of_shares_ends_at_four_in_new_york_and_one_of_coins_at_midnight(ticker, moment, day):
    assert str(LiveMarket.day(None, ticker, datetime.fromisoformat(moment))) == day


def test_an_alert_looks_like_any_request_even_if_it_is_refused_itself(alice, yahoo, ticker, live_database):
    yahoo.yahoo(ticker, "100")
    order = alice.places("buy", 1, ticker, "stop", stop_price=110)
    later()
    yahoo.yahoo(ticker, "111")
    alert = {"key": alice.key, "ticker": ticker, "action": "sell", "quantity": 50}
    assert alice.ask("POST", "/api/v1/webhook/tradingview", json=alert).status_code == 409
    row = "SELECT status FROM ibkr_orders WHERE id = :id"
    assert live_database.run(row, id=int(order["id"])) == [("filled",)]
