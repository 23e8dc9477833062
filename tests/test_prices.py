"""Live prices: the real yfinance and the real requests, with stand-ins for Yahoo Finance and Alpha Vantage.

`bot` trades on one process on SQLite, which asks both sources; `crowd` is three processes on each of
the two databases, which ask Yahoo alone. Quotes hold for two seconds on both.
"""

import http.client
import itertools
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from threading import Barrier

import pytest
import requests
import simplejson
from cast import Database, Server, environment, exact, free_port
from simplejson import RawJSON
from standins import MarketStandIn

HOLD_SECONDS = 2
SECRET = "ALPHAVANTAGE0KEY0OF0THE0TESTS"
names = itertools.count(1)


def new_ticker() -> str:
    """A ticker that no server has been asked for before."""
    return f"NEW{next(names)}"


@pytest.fixture(scope="module")
def stand_in():
    with MarketStandIn() as market:
        yield market


@pytest.fixture
def market(stand_in):
    """Yahoo and Alpha Vantage, who know no ticker yet."""
    stand_in.reset()
    return stand_in


@pytest.fixture(scope="module")
def live_server(program, stand_in):
    """Makes servers of the copied program that find the stand-ins where they look for the real ones."""

    def new(database: Database, sources="yahoo", **settings) -> Server:
        from_the_copy = {"GUNICORN_CMD_ARGS": f"--chdir {program}", "PRICE_CACHE_SECONDS": HOLD_SECONDS}
        return Server(
            database.url, **stand_in.environment, **from_the_copy | {"PRICE_SOURCES": sources} | settings
        )

    return new


@pytest.fixture(scope="module")
def run(program, stand_in):
    """Runs Python in the copied program, to its end."""

    def python(*arguments, **settings) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=program,
            env=environment(**stand_in.environment | settings),
            capture_output=True,
            text=True,
            timeout=60,
        )

    return python


@pytest.fixture(scope="module")
def database_of_bot(tmp_path_factory):
    return Database(f"sqlite:///{tmp_path_factory.mktemp('bot')}/live.db").migrate()


@pytest.fixture(scope="module")
def live(live_server, database_of_bot):
    both = {"sources": "yahoo,alphavantage", "ALPHAVANTAGE_API_KEY": SECRET}
    with live_server(database_of_bot, **both, workers=1, threads=32) as server:
        yield server


@pytest.fixture
def bot(live, market):
    """A trader on a server whose two sources have just answered, so that neither is about to rest."""
    bot = live.trader(name="bot")
    only_alphavantage, only_yahoo = new_ticker(), new_ticker()
    market.alphavantage(only_alphavantage, share("1"))
    market.yahoo(only_yahoo, "1")
    assert price_of(bot, only_alphavantage)["source"] == "alphavantage"
    assert price_of(bot, only_yahoo)["source"] == "yahoo_finance"
    market.clear()
    return bot


@pytest.fixture(scope="module")
def live_database(new_database):
    return new_database().migrate()


@pytest.fixture(scope="module")
def crowd(live_server, live_database):
    with live_server(live_database, workers=3, threads=100) as server:
        server.trader()  # The first request takes the database for the live market.
        yield server


def share(price: str, day=None) -> dict:
    """What Alpha Vantage says of a share."""
    seen = {} if day is None else {"07. latest trading day": day}
    return {"Global Quote": {"01. symbol": "X", "05. price": price} | seen}


def coin(price: str, currency: str, refreshed=None, zone=None) -> dict:
    """What Alpha Vantage says of a coin."""
    rate = {"3. To_Currency Code": currency, "5. Exchange Rate": price}
    seen = {} if refreshed is None else {"6. Last Refreshed": refreshed, "7. Time Zone": zone}
    return {"Realtime Currency Exchange Rate": rate | seen}


def asks(trader, ticker) -> requests.Response:
    return trader.ask("GET", f"/api/v1/price/{ticker}")


def price_of(trader, ticker) -> dict:
    response = asks(trader, ticker)
    assert response.status_code == 200, response.text
    return exact(response)


def refusal(response) -> tuple[int, str]:
    return response.status_code, exact(response)["code"]


def moment(text: str) -> datetime:
    return datetime.fromisoformat(text)


def wait_until(text: str) -> None:
    """Sleep until the moment `text` is past."""
    time.sleep(max(0, (moment(text) - datetime.now(UTC)).total_seconds()) + 0.01)


# What a price is


@pytest.mark.parametrize("digits", ["189.84", "0.00000001", "9999999999.99999999", "67012.123456785", "1e3"])
def test_a_price_has_the_very_digits_that_yahoo_sent(bot, market, digits):
    ticker = new_ticker()
    market.yahoo(ticker, digits)
    quote = price_of(bot, ticker)
    assert quote["price"] == Decimal(digits).quantize(Decimal("0.00000001"))
    assert (quote["ticker"], quote["currency"], quote["source"]) == (ticker, "USD", "yahoo_finance")
    bought = bot.buys("0.00000001", ticker)
    assert (bought["market_price"], bought["price_source"]) == (quote["price"], "yahoo_finance")


def test_a_price_costs_yahoo_one_request_and_holds_for_its_time(bot, market):
    ticker = new_ticker()
    market.yahoo(ticker, "10")
    first = price_of(bot, ticker)
    assert [path.partition("?")[0] for _, path in market.requests] == [f"/v8/finance/chart/{ticker}"]
    held = moment(first["valid_until"]) - moment(first["timestamp"])
    assert held.total_seconds() == HOLD_SECONDS
    market.yahoo(ticker, "11")
    again = price_of(bot, ticker)
    bot.buys(1, ticker)
    if datetime.now(UTC) < moment(first["valid_until"]):
        assert again == first
        assert market.count(ticker) == 1
    wait_until(first["valid_until"])
    assert price_of(bot, ticker)["price"] == 11
    assert market.count(ticker) == 2


NOW = datetime.now(UTC).replace(microsecond=0)
A_YEAR_AGO = NOW - timedelta(days=400)


@pytest.mark.parametrize("days", [0, 6, 8, 400])
def test_a_price_has_the_time_at_which_yahoo_last_saw_it(bot, market, days):
    ticker, seen = new_ticker(), NOW - timedelta(days=days)
    market.yahoo(ticker, "10", seen=str(int(seen.timestamp())))
    quote = price_of(bot, ticker)
    assert (moment(quote["market_time"]), quote["stale"]) == (seen, days > 7)
    assert datetime.now(UTC) - moment(quote["timestamp"]) < timedelta(seconds=10)


@pytest.mark.parametrize(
    "seen", ["null", '"yesterday"', "NaN", "-5", "0", "1e300", "true", "[1]", "99999999999"]
)
def test_a_time_that_can_be_none_is_the_time_of_the_quote(bot, market, seen):
    ticker = new_ticker()
    market.yahoo(ticker, "10", seen=seen)
    quote = price_of(bot, ticker)
    assert (quote["market_time"], quote["stale"]) == (quote["timestamp"], False)


ALPHA_VANTAGE_SAW = {
    "DAY": (
        share("5", "2024-03-08"),
        "2024-03-09T00:00:00Z",
    ),  # Wherever the exchange is, by then it is over.
    "UTC-USD": (coin("5", "USD", "2024-03-08 15:04:05", "UTC"), "2024-03-08T15:04:05Z"),
    "NY-USD": (coin("5", "USD", "2024-03-08 15:04:05", "US/Eastern"), "2024-03-08T20:04:05Z"),
    "LOST-USD": (coin("5", "USD", "2024-03-08 15:04:05", "../../nowhere"), None),
    "LATER-USD": (coin("5", "USD", "2999-03-08 15:04:05", "UTC"), None),
    "WORD": (share("5", "Friday"), None),
    "ODD": (share("5", 7), None),
    "END": (share("5", "9999-12-31"), None),
    "LATER": (share("5", "2999-12-31"), None),
    "NONE": (share("5"), None),
}


@pytest.mark.parametrize("ticker", ALPHA_VANTAGE_SAW)
def test_a_price_has_the_time_at_which_alpha_vantage_last_saw_it(bot, market, ticker):
    body, seen = ALPHA_VANTAGE_SAW[ticker]
    ticker = f"{new_ticker()}-USD" if ticker.endswith("-USD") else new_ticker()
    market.alphavantage(ticker, body)
    quote = price_of(bot, ticker)
    assert quote["source"] == "alphavantage"
    assert (quote["market_time"], quote["stale"]) == (seen or quote["timestamp"], seen is not None)


def test_a_quote_that_was_published_before_there_were_market_times_is_of_its_own_time(
    crowd, live_database, market
):
    alice, ticker = crowd.trader(), new_ticker()
    taken = datetime.now(UTC)
    live_database.run(
        "INSERT INTO ibkr_quotes (ticker, number, price, currency, source, timestamp, valid_until) "
        "VALUES (:ticker, 1, 500000000, 'USD', 'yahoo_finance', :taken, :end)",
        ticker=ticker,
        taken=taken.replace(tzinfo=None).isoformat(" "),
        end=(taken + timedelta(hours=1)).replace(tzinfo=None).isoformat(" "),
    )
    quote = price_of(alice, ticker)
    assert quote["market_time"] == quote["timestamp"]


def test_a_ticker_is_asked_for_by_its_own_name(bot, market):
    for ticker in ("^GSPC", "BRK-B", "EURUSD=X", "A..B"):
        market.yahoo(ticker, "5")
        assert price_of(bot, ticker.lower())["ticker"] == ticker
        assert market.count(ticker) == 1


def test_what_can_be_no_ticker_never_reaches_a_source(live, bot, market):
    for ticker in (
        "..",
        ".",
        "^",
        "A/D",
        "A/B/C",
        "AAPL,IBM",
        "../../v1",
        "A?b=c",
        "A#b",
        "A B",
        "AAPL\n",
        "É",
        "ı",
        "",
        "A" * 21,
    ):
        assert refusal(bot.order("buy", 1, ticker, key=None)) == (400, "invalid_request")
    for path in ("..", "%2e%2e", "%2E%2E%2Fv1", "A%2FD", "A%00", "A%20B", "%C4%B1"):
        connection = http.client.HTTPConnection("127.0.0.1", live.port, timeout=10)
        connection.request("GET", f"/api/v1/price/{path}", headers=dict(bot.session.headers))
        assert connection.getresponse().status in (400, 404)
        connection.close()
    assert market.requests == []


def test_yfinance_is_not_loaded_before_a_price_is_asked_for(run):
    script = "import app, sys; print({'yfinance', 'pandas', 'curl_cffi'} & sys.modules.keys())"
    done = run("-c", script, PRICE_SOURCES="yahoo", DATABASE_URL="sqlite:///unused.db")
    assert done.stdout == "set()\n", done.stderr


# When there is no price


def test_a_ticker_that_nobody_knows_is_unknown_and_remembered_as_such(bot, market):
    ticker = new_ticker()
    assert refusal(asks(bot, ticker)) == (404, "unknown_ticker")
    assert market.count(ticker) > 0
    market.clear()
    market.yahoo(ticker, "5")
    assert refusal(asks(bot, ticker)) == (404, "unknown_ticker")
    assert refusal(bot.order("buy", 1, ticker)) == (404, "unknown_ticker")
    assert market.requests == []


GOOD_PRICE = '{"chart": {"result": [{"meta": {"regularMarketPrice": 5, "currency": "USD"}}]}}'
NO_PRICES = {
    "a number that is none": {"price": "NaN"},
    "infinity": {"price": "Infinity"},
    "nothing for money": {"price": "0"},
    "less than nothing": {"price": "-189.84"},
    "too little to write down": {"price": "0.000000001"},
    "more than all the money": {"price": "10000000000"},
    "a price out of this world": {"price": "1e400"},
    "a price out of every world": {"price": "1e99999999999999999999"},
    "a word": {"price": '"lots"'},
    "an empty word": {"price": '""'},
    "the word NaN": {"price": '"NaN"'},
    "yes": {"price": "true"},
    "null": {"price": "null"},
    "a list": {"price": "[189.84]"},
    "an object": {"price": '{"raw": 189.84}'},
    "no price at all": {"body": {"chart": {"result": [{"meta": {"currency": "USD"}}], "error": None}}},
    "a price of no currency": {"body": {"chart": {"result": [{"meta": {"regularMarketPrice": 5}}]}}},
    "a number for a currency": {"currency": 840},
    "an empty currency": {"currency": ""},
    "a currency with a zero byte": {"currency": "US\0"},
    "half a character for a currency": {"currency": "\ud800"},
    "no result": {"body": {"chart": {"result": [], "error": None}}},
    "null for a result": {"body": {"chart": {"result": None, "error": None}}},
    "another document": {"body": "[]"},
    "a number for a document": {"body": "1"},
    "a web page": {"body": "<html><h1>We will be back</h1></html>"},
    "nothing": {"body": ""},
    "half of a document": {"body": '{"chart": {"result": [{"meta": {"regularMarketPrice": 18'},
    "brackets without end": {"body": "[" * 100_000},
    "a giant": {"body": GOOD_PRICE.replace("{", '{"padding": "' + "x" * 5_000_000 + '", ', 1)},
    "a way elsewhere": {"redirect": "https://query2.finance.yahoo.com/v8/finance/chart/OTHER"},
    "its own failure": {"status": 500},
    "a gateway's failure": {"status": 502},
    "a closed door": {"status": 403},
    "a web page that is not found": {"status": 404, "body": "<html>Not found</html>"},
    "another 404": {"status": 404, "body": {"chart": {"error": {"code": "Internal", "description": "?"}}}},
    "silence": {"hang": True},
}


NO_PRICES |= {
    "a little less than can be written down": {"price": "9.9e-9"},
    "a currency that is none": {"currency": True},
}

OF_THE_SOURCE = {"its own failure", "a gateway's failure", "silence"}
"""What is no word about the ticker: it may be asked for again at once."""


@pytest.mark.parametrize("way", NO_PRICES)
def test_yahoo_gives_no_price_and_so_there_is_none_for_now(bot, market, way):
    """For a minute, where it answered at all. The healthy tickers beside it are priced meanwhile.

    They are new ones, so that each is a question to Yahoo; here in a row, which takes less than a minute.
    """
    ticker = new_ticker()
    market.yahoo("OTHER", "5")
    market.yahoo(ticker, **NO_PRICES[way])
    for _ in range(4):
        started = time.monotonic()
        response = asks(bot, ticker)
        assert time.monotonic() - started < 10
        wait = response.headers.get("Retry-After")
        if "to write down" in way or "written down" in way:
            assert (refusal(response), wait) == ((409, "unsupported_price"), None)
        else:
            assert refusal(response) == (503, "price_unavailable")
            assert wait == "1" if way in OF_THE_SOURCE else 50 < int(wait) <= 60
        healthy = new_ticker()
        market.yahoo(healthy, "5")
        assert price_of(bot, healthy)["source"] == "yahoo_finance"
    market.clear()
    market.yahoo(ticker, "5")
    if way in OF_THE_SOURCE:
        assert price_of(bot, ticker)["price"] == 5
    else:
        assert asks(bot, ticker).status_code == response.status_code
        assert bot.order("buy", 1, ticker).status_code == response.status_code
        assert market.requests == []


def test_a_portfolio_without_a_price_shows_null_and_the_rest(bot, market):
    ticker, other = new_ticker(), new_ticker()
    market.yahoo(ticker, "10")
    market.yahoo(other, "20")
    bot.buys(3, ticker)
    bot.buys(1, other)
    valid_until = max(price_of(bot, t)["valid_until"] for t in (ticker, other))
    market.yahoo(ticker, status=500)
    market.yahoo(other, "21")
    wait_until(valid_until)
    response = bot.ask("GET", "/api/v1/portfolio")
    assert response.status_code == 200
    portfolio = exact(response)
    lost, priced = portfolio["holdings"]
    assert (lost["ticker"], lost["quantity"], lost["cost_basis"], lost["average_price"]) == (
        ticker,
        3,
        30,
        10,
    )
    for name in ("current_price", "market_value", "unrealized_pnl", "unrealized_pnl_percent"):
        assert lost[name] is None
    assert (priced["current_price"], priced["unrealized_pnl_percent"]) == (21, 5)
    for name in ("market_value", "equity", "unrealized_pnl", "total_pnl"):
        assert portfolio[name] is None
    assert (portfolio["total_invested_value"], portfolio["realized_pnl"]) == (50, 0)
    assert portfolio["cash_balance"] == 100_000 - 50


ONE_QUESTION_IS_GIVEN_UP = """
import threading, time
from app import app
from pricing import LiveMarket, Source

class Slow(Source):
    name = "slow"
    def ask(self, ticker, since=None):
        time.sleep(0.6)
        raise AssertionError("of no use")

market = LiveMarket(app, [Slow()], 180, 7)
busy = [market.ask(f"BUSY{n}") for n in range(market.threads._max_workers)]
threading.Timer(0.2, market.ask("AAPL").cancel).start()
print(market.quotes(["AAPL"]))
"""


def test_a_portfolio_survives_that_somebody_else_gives_its_question_up(run, database_of_bot):
    done = run("-c", ONE_QUESTION_IS_GIVEN_UP, DATABASE_URL=database_of_bot.url, PRICE_SOURCES="yahoo")
    assert done.stdout == "{}\n", done.stderr


# The second source


def test_alpha_vantage_is_asked_where_yahoo_gives_no_price(bot, market):
    ticker = new_ticker()
    market.yahoo(ticker, status=500)
    market.alphavantage(ticker, share("189.8400"))
    quote = price_of(bot, ticker)
    assert (quote["price"], quote["currency"], quote["source"]) == (Decimal("189.84"), "USD", "alphavantage")
    assert bot.buys(1, ticker)["price_source"] == "alphavantage"
    assert [host for host, _ in market.requests][-1] == "www.alphavantage.co"
    assert "alphavantage" not in [host for host, _ in market.requests][0]


def test_a_replay_needs_no_price(bot, market):
    ticker = new_ticker()
    market.yahoo(ticker, "10")
    first = bot.buys(1, ticker, key="k")
    wait_until(price_of(bot, ticker)["valid_until"])
    market.yahoo(ticker, status=500)
    again = bot.order("buy", 1, ticker, key="k")
    assert (exact(again), again.headers["Idempotent-Replayed"]) == (first, "true")
    assert refusal(bot.order("buy", 1, ticker, key="another")) == (503, "price_unavailable")


def test_alpha_vantage_is_left_alone_while_yahoo_answers(bot, market):
    ticker = new_ticker()
    market.yahoo(ticker, "10")
    market.alphavantage(ticker, share("11"))
    assert price_of(bot, ticker)["price"] == 10
    assert len(market.requests) == 1


def test_alpha_vantage_prices_a_coin_by_its_exchange_rate(bot, market):
    market.yahoo("BTC-USD", status=500)
    market.alphavantage("BTC-USD", coin("67012.12345678", "USD"))
    quote = price_of(bot, "BTC-USD")
    assert (quote["price"], quote["currency"]) == (Decimal("67012.12345678"), "USD")
    assert "function=CURRENCY_EXCHANGE_RATE" in market.requests[-1][1]
    assert bot.buys("0.5", "BTC-USD")["total_amount"] == Decimal("33506.06172839")


UNKNOWN, BROKEN, BAD, SMALL = {"status": 404}, {"status": 500}, {"price": "0"}, {"price": "1e-9"}


@pytest.mark.parametrize(
    ("first_says", "second_says", "verdict"),
    [
        (UNKNOWN, {"Global Quote": {}}, (404, "unknown_ticker")),
        (UNKNOWN, "<html>", (404, "unknown_ticker")),
        (UNKNOWN, {"Error Message": "Invalid API call."}, (404, "unknown_ticker")),
        (BROKEN, {"Global Quote": {}}, (503, "price_unavailable")),
        (BROKEN, {"Error Message": "Invalid API call."}, (503, "price_unavailable")),
        (BROKEN, "<html>", (503, "price_unavailable")),
        (BAD, {"Global Quote": {}}, (503, "price_unavailable")),
        (SMALL, {"Global Quote": {}}, (409, "unsupported_price")),
        (SMALL, share("0"), (409, "unsupported_price")),
    ],
)
def test_the_first_source_decides_whether_a_ticker_is_unknown(bot, market, first_says, second_says, verdict):
    ticker = new_ticker()
    market.yahoo(ticker, **first_says)
    market.alphavantage(ticker, second_says)
    assert refusal(asks(bot, ticker)) == verdict


ALPHA_VANTAGE_SAYS = {
    "AAPL": (share("189.84"), "189.84000000 USD"),
    "SAP.DE": (share("120.5"), "120.50000000 None"),
    "BTC-USD": (coin("67012.5", "USD"), "67012.50000000 USD"),
    "BTC-EUR": (coin("61000", "EUR"), "61000.00000000 EUR"),
    "NONE": ({"Global Quote": {}}, "NoSuchTicker"),
    "NO-USD": ({"Error Message": "Invalid API call."}, "NoSuchTicker"),
    "KEY-USD": ({"Error Message": "the parameter apikey is invalid or missing."}, "BadAnswer"),
    "KEY": ({"Error Message": "the parameter apikey is invalid or missing."}, "BadAnswer"),
    "NOTE": ({"Note": "Our standard API call frequency is 5 calls per minute."}, "RateLimited"),
    "INFO": ({"Information": f"We have detected your API key as {SECRET}."}, "RateLimited"),
    "INFO-USD": ({"Information": "Our standard API rate limit is 25 requests per day."}, "RateLimited"),
    "NAN": (share("NaN"), "BadAnswer"),
    "ZERO": (share("0.0000"), "BadAnswer"),
    "MINUS": (share("-1"), "BadAnswer"),
    "SMALL": (share("0.000000001"), "TooSmall"),
    "WORD": (share("lots"), "BadAnswer"),
    "EMPTY": (share(""), "BadAnswer"),
    "TRUE": (share(True), "BadAnswer"),
    "LESS": ({"Global Quote": {"01. symbol": "X"}}, "BadAnswer"),
    "LIST": ({"Global Quote": ["189.84"]}, "BadAnswer"),
    "OTHER": ("[]", "BadAnswer"),
    "HTML": ("<html>", "BadAnswer"),
    "GIANT": ('{"Note": "' + "x" * 5_000_000 + '"}', "BadAnswer"),
}
ASK_ALPHA_VANTAGE = """
import sys
from pricing import AlphaVantage
for ticker in sys.argv[2:]:
    try:
        quote = AlphaVantage(sys.argv[1]).quote(ticker)
        print(quote.price, quote.currency)
    except Exception as refusal:
        print(type(refusal).__name__)
"""


def test_alpha_vantage_says_no_in_many_words_and_they_are_told_apart(run, market):
    for ticker, (body, _) in ALPHA_VANTAGE_SAYS.items():
        market.alphavantage(ticker, body)
    done = run("-c", ASK_ALPHA_VANTAGE, SECRET, *ALPHA_VANTAGE_SAYS)
    verdicts = dict(zip(ALPHA_VANTAGE_SAYS, done.stdout.splitlines(), strict=True))
    assert verdicts == {ticker: verdict for ticker, (_, verdict) in ALPHA_VANTAGE_SAYS.items()}
    assert SECRET not in done.stderr


def test_the_key_of_alpha_vantage_is_told_to_nobody(live, bot, market):
    answers = []
    for answer in (
        {"body": {"Error Message": f"the parameter apikey {SECRET} is invalid"}},
        {"body": "", "hang": True},
        {"body": "", "redirect": f"https://www.alphavantage.co/elsewhere?apikey={SECRET}"},
    ):
        ticker = new_ticker()
        market.yahoo(ticker, status=500)
        market.alphavantage(ticker, **answer)
        response = asks(bot, ticker)
        assert refusal(response) == (503, "price_unavailable")
        id = response.headers["X-Request-Id"]
        health = requests.get(f"{live.url}/health", timeout=10)
        assert health.json()["prices"]["alphavantage"]["last_error"]["ticker"] == ticker
        answers += [response.text, str(response.headers), health.text]
        lines = [line for line in live.log().splitlines() if f" {ticker}:" in line]
        assert [line.split()[0] for line in lines] == ["yahoo_finance", "alphavantage"]
        assert all(line.endswith(f" [{id}]") for line in lines)  # Though another thread wrote them.
        calm = new_ticker()
        market.alphavantage(calm, share("1"))
        assert price_of(bot, calm)["source"] == "alphavantage"
    assert any(f"apikey={SECRET}" in path for _, path in market.requests)
    assert SECRET not in "".join(answers) + live.log()


# What is not what it was: nobody is stuck with a holding


def holding_of(trader, ticker) -> dict:
    return next(h for h in trader.portfolio["holdings"] if h["ticker"] == ticker)


def test_at_a_stale_price_nothing_is_bought_and_a_holding_is_sold(crowd, market):
    alice, ticker = crowd.trader(), new_ticker()
    wait_until_warm(crowd, alice, market)
    market.yahoo(ticker, "10")
    quote = price_of(alice, ticker)
    alice.buys(100, ticker)
    market.yahoo(ticker, "9", seen=str(int(A_YEAR_AGO.timestamp())))
    wait_until(quote["valid_until"])
    response = alice.order("buy", 1, ticker)
    assert refusal(response) == (409, "stale_price")
    told = exact(response)
    assert (moment(told["market_time"]), told["market_price"]) == (A_YEAR_AGO, 9)
    held = holding_of(alice, ticker)
    assert (held["current_price"], held["stale"], moment(held["market_time"])) == (9, True, A_YEAR_AGO)
    assert alice.portfolio["equity"] == 100_000 - 100
    sold = alice.sells(40, ticker)
    assert (sold["price"], sold["realized_pnl"]) == (9, -40)
    assert refusal(alice.order("sell", 1, ticker, at="9.01")) == (409, "price_above_market")
    assert alice.audit()["ok"]
    points = alice.get("/api/v1/account/history", resolution="trade")["points"]
    bought, sold, _ = (moment(point["timestamp"]) for point in points)
    assert bought < sold  # The curve goes by the clock, however old a price is.


GONE = {
    "unknown": ({"status": 404}, (409, "stale_price")),
    "no price": ({"price": "null"}, (503, "price_unavailable")),
    "refused": ({"status": 422}, (503, "price_unavailable")),
    "too small": ({"price": "1e-9"}, (409, "unsupported_price")),
    "in another currency": ({"currency": "EUR"}, (409, "stale_price")),
    "in none": ({"currency": None}, (409, "stale_price")),
}


@pytest.mark.parametrize("way", GONE)
def test_a_ticker_that_goes_bad_keeps_its_last_price_for_its_holders(crowd, market, way):
    alice, bob, ticker = crowd.trader(), crowd.trader(), new_ticker()
    wait_until_warm(crowd, alice, market)
    answer, verdict = GONE[way]
    market.yahoo(ticker, "10", seen=str(int((NOW - timedelta(days=1)).timestamp())))
    before = price_of(alice, ticker)
    alice.buys(100, ticker)
    market.yahoo(ticker, **answer)
    wait_until(before["valid_until"])
    quotes = {get(crowd, alice, f"/api/v1/price/{ticker}").text for _ in range(12)}
    assert len(quotes) == 1, "The processes do not agree."
    quote = price_of(alice, ticker)
    assert quote == before | {"stale": True, "valid_until": quote["valid_until"]}
    for _ in range(6):
        order = {"ticker": ticker, "action": "buy", "quantity": 1}
        response = requests.post(
            f"{crowd.url}/api/v1/trade",
            json=order,
            headers={"Authorization": f"Bearer {bob.key}", "Connection": "close"},
            timeout=30,
        )
        assert refusal(response) == verdict
    if way == "unknown":
        assert exact(response)["market_time"] == before["market_time"]
    if verdict[0] == 503:
        left = moment(quote["valid_until"]) - datetime.now(UTC)
        assert 0 <= int(response.headers["Retry-After"]) - left.total_seconds() < 2
    held = holding_of(alice, ticker)
    assert (held["current_price"], held["stale"], held["market_time"]) == (10, True, before["market_time"])
    assert (alice.portfolio["equity"], alice.portfolio["total_pnl"]) == (100_000, 0)
    assert refusal(alice.order("sell", 1, ticker, at="10.01")) == (409, "price_above_market")
    assert alice.sells(40, ticker)["market_price"] == 10
    assert alice.sells(60, ticker, at="9.5")["realized_pnl"] == -30
    assert alice.get("/api/v1/account/history")["summary"]["equity"] == 100_000 - 30
    assert alice.audit()["ok"]


def test_a_source_that_does_not_answer_leaves_no_price_behind(crowd, market):
    alice, ticker = crowd.trader(), new_ticker()
    wait_until_warm(crowd, alice, market)
    market.yahoo(ticker, "10")
    valid_until = price_of(alice, ticker)["valid_until"]
    alice.buys(1, ticker)
    market.yahoo(ticker, status=500)
    wait_until(valid_until)
    for response in (asks(alice, ticker), alice.order("sell", 1, ticker)):
        assert refusal(response) == (503, "price_unavailable")
    held = holding_of(alice, ticker)
    assert (held["current_price"], held["stale"], alice.portfolio["equity"]) == (None, None, None)


def test_the_first_source_decides_that_a_holding_keeps_its_last_price(bot, market):
    for second_says in ({"status": 500}, {"body": {"Global Quote": {}}}):
        ticker = new_ticker()
        market.yahoo(ticker, "10")
        market.alphavantage(ticker, **{"body": "", **second_says})
        valid_until = price_of(bot, ticker)["valid_until"]
        market.yahoo(ticker, status=404)
        wait_until(valid_until)
        assert price_of(bot, ticker)["stale"] is True
    market.alphavantage(ticker, share("11"))
    other = new_ticker()
    market.yahoo(other, "10")
    market.alphavantage(other, share("11"))
    valid_until = price_of(bot, other)["valid_until"]
    market.yahoo(other, price="null")
    wait_until(valid_until)
    quote = price_of(bot, other)  # Where the second has a price, there is one.
    assert (quote["price"], quote["stale"]) == (11, False)


A_TICKER_COMES_BACK = """
import pricing
from app import app
pricing.BAD_SECONDS = 0.3

class Moody(pricing.Source):
    name, says = "moody", "10"
    def ask(self, ticker, since=None):
        return pricing.priced(ticker, self.says, "USD", self.name, None)

def show():
    quote = market.look_up("MOODY")
    print(f"{quote.price:.0f} {quote.refusal}")

source = Moody()
market = pricing.LiveMarket(app, [source], 0.01, 7)
for source.says in ("10", "0", "11"):
    show()
    pricing.time.sleep(0.1)
pricing.time.sleep(0.3)
show()
"""


def test_a_ticker_that_comes_back_is_an_ordinary_one_again(run, database_of_bot):
    done = run("-c", A_TICKER_COMES_BACK, DATABASE_URL=database_of_bot.url, PRICE_SOURCES="yahoo")
    assert done.stdout == "10 None\n10 price_unavailable\n10 price_unavailable\n11 None\n", done.stderr


# Not in dollars


@pytest.mark.parametrize(("ticker", "currency"), [("VOD.L", "GBp"), ("7203.T", "JPY"), ("ODD", None)])
def test_what_is_not_quoted_in_dollars_is_shown_and_never_traded(bot, market, ticker, currency):
    market.yahoo(ticker, "72.5", currency=currency)
    quote = price_of(bot, ticker)
    assert (quote["price"], quote["currency"]) == (Decimal("72.5"), currency)
    before = bot.books
    for order in (bot.order("buy", 1, ticker), bot.order("buy", 1, ticker, at=1000)):
        assert refusal(order) == (409, "unsupported_currency")
        assert order.json()["currency"] == currency
    assert bot.books == before


@pytest.mark.parametrize(
    ("ticker", "body", "currency"),
    [("SAP.DE", share("120.5"), None), ("BTC-EUR", coin("61000", "EUR"), "EUR")],
)
def test_what_alpha_vantage_does_not_quote_in_dollars_is_not_traded(bot, market, ticker, body, currency):
    market.yahoo(ticker, status=500)
    market.alphavantage(ticker, body)
    assert price_of(bot, ticker)["currency"] == currency
    assert refusal(bot.order("buy", "0.001", ticker)) == (409, "unsupported_currency")


# A source that fails is left in peace


@pytest.fixture
def fresh(live_server, database_of_bot, market):
    """A server of which nobody has asked anything yet."""
    both = {"sources": "yahoo,alphavantage", "ALPHAVANTAGE_API_KEY": SECRET}
    with live_server(database_of_bot, **both, workers=1) as server:
        yield server


def health_of(server) -> dict:
    return requests.get(f"{server.url}/health", timeout=10).json()["prices"]


def test_a_source_that_asks_us_to_slow_down_is_not_asked_again(fresh, market):
    alice, ticker = fresh.trader(), new_ticker()
    market.yahoo(ticker, status=429)
    market.alphavantage(ticker, {"Information": "Our standard API rate limit is 25 requests per day."})
    assert refusal(asks(alice, ticker)) == (503, "price_unavailable")
    for name in ("yahoo_finance", "alphavantage"):
        source = health_of(fresh)[name]
        assert (source["failures"], source["resting"]) == (1, True)
        assert source["last_error"]["ticker"] == ticker
        assert source["last_error"]["error"] == "it says that we ask too often"
    market.clear()
    market.yahoo_default("5")
    waits = []
    for _ in range(3):
        response = asks(alice, new_ticker())
        assert refusal(response) == (503, "price_unavailable")
        waits.append(int(response.headers["Retry-After"]))
        time.sleep(1)
    assert market.requests == []
    assert 15 >= waits[0] > waits[1] > waits[2] > 9
    assert health_of(fresh)["yahoo_finance"]["failures"] == 1


def test_a_source_that_fails_three_times_in_a_row_rests(fresh, market):
    alice = fresh.trader()
    good, bad = [new_ticker()], [new_ticker() for _ in range(6)]
    for ticker in good + bad:
        market.alphavantage(ticker, share("7"))
    market.yahoo(good[0], "5")
    market.yahoo_default(status=500)
    for ticker in (bad[0], bad[1], good[0], bad[2], bad[3]):
        price_of(alice, ticker)
    assert not health_of(fresh)["yahoo_finance"]["resting"]
    price_of(alice, bad[4])
    yahoo = health_of(fresh)["yahoo_finance"]
    assert (yahoo["answers"], yahoo["failures"], yahoo["resting"]) == (1, 5, True)
    assert yahoo["last_error"]["error"] == "it answered HTTP 500"
    market.clear()
    assert price_of(alice, bad[5])["source"] == "alphavantage"
    assert [host for host, _ in market.requests] == ["www.alphavantage.co"]


def test_one_ticker_that_fails_again_and_again_rests_no_source(fresh, market):
    alice, bad = fresh.trader(), new_ticker()
    market.yahoo(bad, status=500)
    for _ in range(5):
        assert refusal(asks(alice, bad)) == (503, "price_unavailable")
    yahoo = health_of(fresh)["yahoo_finance"]
    assert (yahoo["failures"], yahoo["resting"]) == (5, False)


def test_on_a_cold_server_a_ticker_that_hangs_takes_nothing_from_another(fresh, market):
    """Whoever comes second does so when Yahoo has answered with its cookie, though with no price yet."""
    alice, slow, quick = fresh.trader(), new_ticker(), new_ticker()
    market.yahoo(slow, hang=True)
    market.yahoo(quick, "5")
    with ThreadPoolExecutor(1) as pool:
        hanging = pool.submit(get, fresh, alice, f"/api/v1/price/{slow}")
        deadline = time.monotonic() + 20
        while not any(slow in path for _, path in market.requests):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert get(fresh, alice, f"/api/v1/price/{quick}").status_code == 200
        assert not hanging.done()
        assert refusal(hanging.result()) == (503, "price_unavailable")


A_SOURCE_IS_FOUND_OUT_ABOUT = """
import pricing, threading
pricing.PAUSE_SECONDS = 0.2

class Moody(pricing.Source):
    name, asked, words = "moody", [], {}
    def ask(self, ticker, since=None):
        self.asked.append(ticker)
        pricing.time.sleep(0.1)
        word = self.words.get(ticker, pricing.SourceFailed("no answer"))
        if isinstance(word, Exception):
            raise word
        return word

def ask(ticker):
    try:
        return source.quote(ticker)
    except (pricing.SourceFailed, pricing.NoSuchTicker) as failure:
        return str(failure) or "unknown"

def ask_all(*tickers):
    with pricing.ThreadPoolExecutor(len(tickers)) as threads:
        return ", ".join(sorted(threads.map(ask, tickers)))

source = Moody()
ask("A"), ask("B")
source.words["A"] = pricing.%s
ask("A"), ask("B"), ask("C")
print(ask("A"), len(source.asked))
ask("B"), ask("C"), ask("D")
print(ask("A"), len(source.asked))
pricing.time.sleep(0.25)
print(ask_all("B", "B", "B", "B"), len(source.asked))
print(ask_all("A", "A", "A", "A"), len(source.asked))
print(ask_all("A", "A", "A", "A"), len(source.asked))
"""


@pytest.mark.parametrize("word", ["BadAnswer('bad')", "NoSuchTicker('bad')"])
def test_one_question_at_a_time_finds_out_whether_a_source_is_back(run, word):
    """It fails for B, C and D. For A it says that this is no ticker or has no price, and so it is there."""
    done = run("-c", A_SOURCE_IS_FOUND_OUT_ABOUT % word)
    assert done.stdout.splitlines() == [
        "bad 6",
        "it rests 9",
        "it rests, it rests, it rests, no answer 10",
        "bad, it rests, it rests, it rests 11",
        "bad, bad, bad, bad 15",
    ], done.stderr


A_SOURCE_RECOVERS = """
import pricing
pricing.PAUSE_SECONDS = 0.2

class Moody(pricing.Source):
    name, asked, works = "moody", 0, False
    def ask(self, ticker, since=None):
        self.asked += 1
        if not self.works:
            raise pricing.RateLimited("slow down")
        return "a quote"

def ask():
    try:
        return source.quote("AAPL")
    except pricing.SourceFailed as failure:
        return str(failure)

source = Moody()
print(ask(), ask(), source.asked, sep=", ")
source.works = True
pricing.time.sleep(0.25)
print(ask(), ask(), source.asked, sep=", ")
"""


def test_a_source_is_asked_again_after_its_rest(run):
    done = run("-c", A_SOURCE_RECOVERS)
    assert done.stdout == "slow down, it rests, 1\na quote, a quote, 3\n", done.stderr


# As people write them


@pytest.mark.parametrize("written", ["BRK.B", "brk/b", "BRK%2FB", "BRK-B"])
def test_a_class_of_shares_has_one_spelling_in_the_books(bot, market, written):
    market.yahoo("BRK-B", "5")
    assert price_of(bot, written)["ticker"] == "BRK-B"
    ticker = written.replace("%2F", "/")
    assert bot.buys(1, ticker)["ticker"] == "BRK-B"
    assert [trade["ticker"] for trade in bot.get("/api/v1/trades", ticker=ticker)["trades"]] == ["BRK-B"]
    assert bot.sells(1, ticker)["quantity"] == 1


def test_a_pair_of_currencies_may_have_a_slash(bot, market):
    market.yahoo("ETH-USD", "5")
    assert price_of(bot, "eth/usd")["ticker"] == "ETH-USD"
    assert bot.buys(1, "ETH/USD")["ticker"] == "ETH-USD"


def test_alpha_vantage_is_asked_by_both_spellings_of_a_class(bot, market):
    for ticker, known_as in (("BFA-B", "BFA.B"), ("BFB-B", "BFB-B")):
        market.alphavantage(known_as, share("5"))
        quote = price_of(bot, ticker.replace("-", "."))
        assert (quote["ticker"], quote["currency"], quote["source"]) == (ticker, "USD", "alphavantage")
        assert bot.buys(1, ticker)["ticker"] == ticker
    assert refusal(asks(bot, "BFC.B")) == (404, "unknown_ticker")


def test_many_prices_are_asked_for_at_once_and_each_has_its_own_fate(bot, market):
    dear, slow, cheap, bad, small, nobody, foreign = (new_ticker() for _ in range(7))
    market.yahoo(dear, "100")
    market.yahoo("BRK-A", "7")
    market.yahoo(slow, status=500)
    market.yahoo(cheap, "1")
    market.yahoo(bad, "null")
    market.yahoo(small, "1e-9")
    market.yahoo(foreign, "3", currency="EUR")
    asked = [dear, "brk/a", dear.lower(), slow, cheap, bad, small, f" {nobody}", foreign, "BRK.A"]
    answer = bot.get("/api/v1/prices", tickers=",".join(asked))
    assert [quote["ticker"] for quote in answer["prices"]] == [dear, "BRK-A", cheap, foreign]
    assert answer["prices"][0] == price_of(bot, dear)
    assert answer["missing"] == {
        slow: "price_unavailable",
        bad: "price_unavailable",
        small: "unsupported_price",
        nobody: "unknown_ticker",
    }


def test_many_prices_are_asked_for_side_by_side(bot, market):
    tickers = [new_ticker() for _ in range(8)]
    for ticker in tickers:
        market.yahoo(ticker, "5", delay=0.8)
    started = time.monotonic()
    assert len(bot.get("/api/v1/prices", tickers=",".join(tickers))["prices"]) == 8
    assert time.monotonic() - started < 0.8 * 8 / 2


# Many at once


def at_once(count: int, act) -> list:
    """What `act(0)`, `act(1)`, ... answer, each in a thread of its own, begun at the same moment."""
    barrier = Barrier(count)

    def begin(number):
        barrier.wait()
        return act(number)

    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(begin, range(count)))


def get(server, trader, path) -> requests.Response:
    """Ask over a connection of its own, which any process of the server may accept."""
    headers = {"Authorization": f"Bearer {trader.key}", "Connection": "close"}
    return requests.get(f"{server.url}{path}", headers=headers, timeout=60)


def wait_until_warm(crowd, trader, market) -> None:
    """Every process has imported yfinance, which may take seconds, and has Yahoo's cookie."""
    market.yahoo_default("5")
    while {get(crowd, trader, f"/api/v1/price/{new_ticker()}").status_code for _ in range(30)} != {200}:
        time.sleep(0.5)


def test_a_hundred_who_ask_at_once_cost_one_request_a_process(crowd, market):
    alice, ticker, prices = crowd.trader(), new_ticker(), itertools.count(100)
    wait_until_warm(crowd, alice, market)
    market.yahoo(ticker, lambda: str(next(prices)), delay=0.3)
    answers = at_once(100, lambda _: get(crowd, alice, f"/api/v1/price/{ticker}"))
    assert {answer.status_code for answer in answers} == {200}
    quotes = {answer.text for answer in answers}
    assert len(quotes) <= 2, "They took so long that more than one quote ran out."
    assert market.count(ticker) <= 3 * len(quotes)


def test_a_quote_is_honoured_by_every_process_until_it_ends(crowd, live_database, market):
    """The price rises at each request to Yahoo, so whoever judges by another quote refuses the buy."""
    ticker, cents = new_ticker(), itertools.count(10_000)
    market.yahoo(ticker, lambda: str(Decimal(next(cents)) / 100))
    traders = [crowd.trader(name=f"bot{n}", cash=10_000_000) for n in range(10)]
    honoured, refused, seen, trades = [], [], [], []

    def trade(number: int):
        last = time.monotonic() + 30  # A quote that ends before the answer is here counts for neither.
        while len(honoured) + len(refused) < 200 and time.monotonic() < last:
            quote = exact(get(crowd, traders[number], f"/api/v1/price/{ticker}"))
            seen.append((quote["timestamp"], quote["valid_until"], quote["price"]))
            order = {"ticker": ticker, "action": "buy", "quantity": "1", "price": str(quote["price"])}
            headers = {"Authorization": f"Bearer {traders[number].key}", "Connection": "close"}
            answer = requests.post(f"{crowd.url}/api/v1/trade", json=order, headers=headers, timeout=60)
            in_time = datetime.now(UTC) < moment(quote["valid_until"])
            if answer.status_code == 200:
                trades.append(exact(answer))
            if in_time:
                (honoured if answer.status_code == 200 else refused).append(answer.text)
            time.sleep(0.22)

    at_once(len(traders), trade)
    assert refused == []
    assert len(honoured) >= 200
    rows = live_database.run(
        "SELECT timestamp, valid_until, price FROM ibkr_quotes WHERE ticker = :ticker ORDER BY number",
        ticker=ticker,
    )
    assert len(rows) >= 3
    assert len(set(seen)) <= len(rows)
    for (_, end, _), (start, _, _) in itertools.pairwise(sorted(set(seen))):
        assert moment(start) >= moment(end), "Two quotes held at the same time."
    for trade in trades:
        in_force = [q for q in set(seen) if moment(q[0]) <= moment(trade["timestamp"]) < moment(q[1])]
        if in_force:  # Else it was made at a quote that nobody else was told of.
            assert [trade["market_price"]] == [price for _, _, price in in_force]


def test_two_hundred_who_wait_for_yahoo_hold_up_nobody_else(crowd, market):
    alice, tickers = crowd.trader(), [new_ticker() for _ in range(200)]
    wait_until_warm(crowd, alice, market)
    market.hang_all()
    begun, seconds = time.monotonic(), []
    with ThreadPoolExecutor(len(tickers)) as threads:
        waiting = [threads.submit(get, crowd, alice, f"/api/v1/price/{ticker}") for ticker in tickers]
        while not all(question.done() for question in waiting):
            for path in ("/health", "/api/v1/balance"):
                started = time.monotonic()
                assert get(crowd, alice, path).status_code == 200
                seconds.append(time.monotonic() - started)
    assert {refusal(question.result()) for question in waiting} == {(503, "price_unavailable")}
    assert 2 <= time.monotonic() - begun < 10
    assert len(seconds) > 4
    assert max(seconds) < 2  # As a rule a sixth of one. Whoever is held up waits with them, for four.


TWENTY_THOUSAND_UNKNOWN_TICKERS = """
import gc, json, random, string, psutil
from app import app
from models import Quote
from pricing import LiveMarket, NoSuchTicker, Source

class Nobody(Source):
    name = "nobody"
    def ask(self, ticker, since=None):
        raise NoSuchTicker

Quote.latest = lambda ticker: None  # The database is not what is measured.
market = LiveMarket(app, [Nobody()], 180, 7)

def ask(count):
    for _ in range(count):
        ticker = "".join(random.choices(string.ascii_uppercase, k=20))
        assert market.look_up(ticker).code == "unknown_ticker"

def megabytes():
    gc.collect()
    return psutil.Process().memory_info().rss / 2**20

ask(200)
before = megabytes()
ask(20_000)
grown = megabytes() - before
print(json.dumps({"grown": grown, "remembered": len(market.refused), "left": len(market.asking)}))
"""


def test_twenty_thousand_unknown_tickers_do_not_fill_the_memory(run, database_of_bot):
    done = run("-c", TWENTY_THOUSAND_UNKNOWN_TICKERS, DATABASE_URL=database_of_bot.url, PRICE_SOURCES="yahoo")
    assert done.returncode == 0, done.stderr
    memory = json.loads(done.stdout)
    assert memory["grown"] < 32
    assert memory["remembered"] <= 5_000
    assert memory["left"] == 0


# Live and recorded prices never meet


def test_a_database_belongs_to_one_market_for_ever(run, program, server, crowd, live_server, database):
    server.trader()
    for kind, url, sources, other in (
        ("sample", database.url, "yahoo", "live"),
        ("live", crowd.database_url, "sample", "sample"),
    ):
        done = run(program / "app.py", DATABASE_URL=url, PRICE_SOURCES=sources, PORT=free_port())
        assert done.returncode == 1
        sentence = f"This database holds {kind} prices and this server serves {other} ones; "
        assert (done.stdout, done.stderr) == ("", f"{sentence}give each its own DATABASE_URL.\n")
    with live_server(database, workers=1) as wrong:
        response = requests.get(f"{wrong.url}/api/v1/balance", timeout=10)
        assert refusal(response) == (503, "price_unavailable")
        assert "holds sample prices" in response.json()["detail"]


# python app.py


def by_hand(program, stand_in) -> Server:
    """`python app.py` with no settings at all: prices from wherever they can be had."""
    settings = stand_in.environment | {"PRICE_SOURCES": "", "ADMIN_API_KEY": ""}
    command = ["sh", "-c", f"cd {program} && exec {sys.executable} app.py"]
    return Server("", command=command, **settings)


def told(server) -> list[str]:
    """What it has said of itself: all but the lines of the requests."""
    return [line for line in server.log().splitlines() if not line.startswith("127.0.0.1 ")]


def ask_by_hand(server, ticker) -> dict:
    headers = {"Authorization": "Bearer test-api-key-123"}
    return exact(requests.get(f"{server.url}/api/v1/price/{ticker}", headers=headers, timeout=20))


def test_python_app_py_serves_live_prices_where_yahoo_can_be_reached(program, market):
    market.yahoo("AAPL", "189.84")
    with by_hand(program, market) as server:
        quote = ask_by_hand(server, "aapl")
        assert (quote["price"], quote["source"]) == (Decimal("189.84"), "yahoo_finance")
        assert [line.partition(" on ")[0] for line in told(server)] == ["Serving yahoo, alphavantage prices"]
    assert (program / "instance" / "simulator.db").exists()


def test_python_app_py_serves_the_sample_where_yahoo_does_not_answer(program, market):
    market.hang_all()
    started = time.monotonic()
    with by_hand(program, market) as server:
        assert time.monotonic() - started < 15
        assert ask_by_hand(server, "AAPL")["source"] == "sample"
        first, second = told(server)
        assert first.startswith(
            "Yahoo Finance cannot be reached: serving the recorded sample market instead."
        )
        assert second.startswith("Serving sample prices on ")
    assert (program / "instance" / "sample.db").exists()


@pytest.mark.parametrize("engine_name", ["sqlite"], indirect=True, scope="session")
def test_a_cold_server_turns_to_alpha_vantage_soon_while_all_of_yahoo_hangs(
    live_server, new_database, market
):
    """Not even the cookie comes, which yfinance asks for one thread after the other."""
    tickers = [new_ticker() for _ in range(10)]
    for ticker in tickers:
        market.alphavantage(ticker, share("12.5"))
    market.hang_all("yahoo.com")
    keys = {"ALPHAVANTAGE_API_KEY": "k", "sources": "yahoo,alphavantage", "workers": 1, "threads": 20}
    with live_server(new_database().migrate(), **keys) as server:
        alice = server.trader()
        answers = at_once(10, lambda number: get(server, alice, f"/api/v1/price/{tickers[number]}"))
    assert [answer.json().get("source") for answer in answers] == ["alphavantage"] * 10
    assert max(answer.elapsed.total_seconds() for answer in answers) < 10


# A recorder of prices


def candles(*closes: str, currency="USD", first=1_577_975_400) -> str:
    """Yahoo's chart of some days, with its closes as it writes them; the first is 2020-01-02."""
    chart = {
        "meta": {"currency": currency},
        "timestamp": [first + day * 86_400 for day in range(len(closes))],
        "indicators": {"quote": [{"close": [RawJSON(close) for close in closes]}]},
    }
    return simplejson.dumps({"chart": {"error": None, "result": [chart]}})


def test_a_market_is_recorded_from_yahoo_and_can_be_replayed(run, market, tmp_path):
    market.yahoo("AAPL", body=candles("189.83999633789062", "null", "190.5"))
    market.yahoo("BTC-USD", body=candles("67123.453125", "67000", "66999.9921875", first=1_577_923_200))
    file = tmp_path / "market.csv"
    done = run(
        "-m", "flask", "--app", "app", "record", "aapl", "BTC-USD", "--period", "1mo", "--output", file
    )
    assert done.returncode == 0, done.stderr
    assert "range=1mo" in " ".join(path for _, path in market.requests)
    assert file.read_text().splitlines() == [
        "timestamp,ticker,open,high,low,close,volume,dividend,split",
        "2020-01-02T00:00:00Z,AAPL,,,,189.84,0,,",
        "2020-01-02T00:00:00Z,BTC-USD,,,,67123.45,0,,",
        "2020-01-03T00:00:00Z,BTC-USD,,,,67000,0,,",
        "2020-01-04T00:00:00Z,AAPL,,,,190.5,0,,",
        "2020-01-04T00:00:00Z,BTC-USD,,,,66999.99,0,,",
    ]
    replayed = run(
        "-c", "import app; print(len(app.market.bars))", PRICE_SOURCES="sample", SAMPLE_MARKET=file
    )
    assert replayed.stdout == "3\n"


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (None, "Yahoo knows no such ticker"),
        ({"status": 500}, "HTTP 500"),
        ({"body": candles("150", currency="GBp")}, "quoted in GBp"),
        ({"body": '{"chart": {"result": [{"meta": {"currency": "USD"}}]}}'}, "no prices"),
    ],
)
def test_what_cannot_be_recorded_is_one_clear_line_and_no_file(run, market, tmp_path, answer, sentence):
    if answer:
        market.yahoo("VOD.L", **answer)
    file = tmp_path / "market.csv"
    done = run("-m", "flask", "--app", "app", "record", "VOD.L", "--output", file)
    assert done.returncode == 1
    assert sentence in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not file.exists()
