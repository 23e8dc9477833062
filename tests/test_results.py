"""How did it do? The equity curve of a run, of all that its clock passed, and the figures that sum it up."""

import hashlib
import json
import sys
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path

import numpy
import pytest
from cast import Database, Here, exact, flask, loaded
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent.parent))

from messages import ACCOUNT_LIMIT
from models import Stretch, Trade
from pricing import SampleMarket
from results import Mark, Past, curve_of, daily_figures, max_drawdown

RESOLUTIONS = ["trade", "day", "bar"]
DAILY = [
    "annual_return_percent",
    "annual_volatility_percent",
    "sharpe_ratio",
    "sortino_ratio",
    "exposure_percent",
]
PRICES = """timestamp,ABC,FALL,RARE
2020-01-01,100,100,10
2020-01-02,80,51,
2020-01-03,100,100,20
2020-01-04T00:00,90,100,
2020-01-04T18:00,110,100,20
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    file = tmp_path_factory.mktemp("market") / "prices.csv"
    file.write_text(PRICES)
    return file


@pytest.fixture(scope="module")
def server(new_database, file):
    """A broker that serves the prices above, with a commission of 0.1 %."""
    with Here(new_database().migrate().url, SAMPLE_MARKET=file, COMMISSION_BPS=10) as server:
        yield server


@pytest.fixture
def alice(server):
    """Somebody with 1,001 dollars, at the first bar."""
    return goes_to("2020-01-01", server.trader(cash=1001))


def goes_to(day, trader):
    answer = trader.ask("PUT", "/api/v1/market/clock", json={"at": day and f"{day}T00:00:00Z"})
    assert answer.status_code == 200, answer.text
    return trader


def advance(trader, bars=1):
    answer = trader.ask("POST", "/api/v1/market/advance", json={"bars": bars})
    assert answer.status_code == 200, answer.text


def starts_over(trader, cash=1001):
    assert trader.ask("POST", "/api/v1/account/reset", json={"cash": cash}).status_code == 200


def history(trader, resolution=None, run=None):
    chosen = {"resolution": resolution, "run": run}
    return trader.get("/api/v1/account/history", **{n: value for n, value in chosen.items() if value})


def equities(trader, resolution=None):
    return [point["equity"] for point in history(trader, resolution)["points"]]


def drawdowns(trader, run=None):
    return [history(trader, each, run)["summary"]["max_drawdown_percent"] for each in RESOLUTIONS]


# What is shown


def test_a_curve_has_a_point_for_each_bar_that_passed_and_for_each_trade(alice):
    alice.buys(10, "ABC")  # For 1,000 dollars and a commission of 1.
    advance(alice, 2)
    advance(alice)
    alice.sells(10, "ABC")  # For 900, less 0.9.
    advance(alice)
    shown = history(alice, "bar")["points"]
    assert [(point["timestamp"][8:13], point["cash"], point["equity"]) for point in shown] == [
        ("01T00", 1001, 1001),
        ("01T00", 0, 1000),
        ("02T00", 0, 800),
        ("03T00", 0, 1000),
        ("04T00", 0, 900),
        ("04T00", Decimal("899.1"), Decimal("899.1")),
        ("04T18", Decimal("899.1"), Decimal("899.1")),
    ]
    assert equities(alice, "trade") == [1000, Decimal("899.1"), Decimal("899.1")]
    assert equities(alice, "day") == equities(alice) == [1000, 800, 1000, Decimal("899.1")]
    assert equities(alice, "BAR") == equities(alice, "bar")


def test_a_resolution_that_there_is_not_is_refused(alice):
    answer = alice.ask("GET", "/api/v1/account/history?resolution=week")
    assert (answer.status_code, exact(answer)["code"]) == (400, "invalid_request")


def test_a_ticker_without_a_row_at_a_bar_keeps_its_price(alice):
    alice.buys(10, "RARE")
    advance(alice, 4)
    assert [point["market_value"] for point in history(alice, "bar")["points"]] == [
        0,
        100,
        100,
        200,
        200,
        200,
    ]


def test_a_ticker_counts_with_its_pin_while_that_stands(alice):
    alice.buys(10, "ABC")
    alice.sees("ABC", at=70)
    advance(alice, 2)
    alice.ask("DELETE", "/api/v1/market/prices/ABC")
    assert equities(alice, "bar") == [1001, 1000, 700, 700, 700, 1000]


def test_a_date_that_the_clock_is_turned_back_to_is_a_day_again(alice):
    alice.buys(10, "ABC")
    advance(alice)
    goes_to("2020-01-01", alice)
    advance(alice)
    shown = history(alice)["points"]
    assert [point["timestamp"][8:10] for point in shown] == ["01", "02", "01", "02"]
    assert [point["equity"] for point in shown] == [1000, 800, 1000, 800]


def test_the_days_before_the_first_trade_count_from_the_last_jump_on(alice):
    """So a back-test has the same figures on an old account as on a new one."""
    for first in (True, False):
        if not first:
            starts_over(alice)
            goes_to("2020-01-01", alice)
        advance(alice, 2)
        alice.sees("RARE", at=20).buys(10, "ABC")
        advance(alice)
        assert [point["timestamp"][8:10] for point in history(alice)["points"]] == ["01", "02", "03", "04"]
        assert history(alice)["summary"]["exposure_percent"] == 50


def test_a_clock_that_runs_shows_nothing_before_the_first_trade(server):
    bob = server.trader(cash=1001)
    assert len(history(bob, "bar")["points"]) == 1
    bob.sees("ABC", at=100).buys(10, "ABC")
    assert equities(bob, "bar")[0] == 1001
    assert equities(bob, "trade") == [1000, 1000]


# What was seen is not forgotten


def recovers(trader):
    advance(trader, 2)


def is_turned_back(trader):
    advance(trader)
    goes_to("2020-01-01", trader)


def jumps_on(trader):
    advance(trader)
    goes_to("2020-01-03", trader)


def runs_again(trader):
    advance(trader)
    goes_to(None, trader)
    trader.sees("FALL", at=100)


def was_jumped_to(trader):
    goes_to("2020-01-02", trader)
    goes_to("2020-01-03", trader)


def was_pinned(trader):
    trader.sees("FALL", at=51)
    trader.sees("FALL", at=100)


def was_let_go(trader):
    trader.sees("FALL", at=51)
    trader.ask("DELETE", "/api/v1/market/prices/FALL")


WAYS = [recovers, is_turned_back, jumps_on, runs_again, was_jumped_to, was_pinned, was_let_go]


@pytest.mark.parametrize("way", WAYS)
def test_a_fall_between_two_trades_is_told_whatever_the_clock_does_then(server, way):
    alice = goes_to("2020-01-01", server.trader(cash=1000))
    alice.buys("1", "ABC", at=100)  # Which costs 0.1: the peak stays the 1,000 at the beginning.
    starts_over(alice, 1001)
    alice.buys(10, "FALL")
    way(alice)
    fall = (Decimal(1001 - 510) / 1001 * 100).quantize(Decimal("0.01"))
    assert drawdowns(alice) == [fall] * 3
    alice.sells(10, "FALL")
    assert drawdowns(alice) == [fall] * 3
    starts_over(alice)
    alice.buys(1, "ABC")
    assert drawdowns(alice, run=2) == [fall] * 3


def test_a_fall_of_49_percent_is_49_percent(alice):
    alice.sees("RARE", at="100.1").buys(1, "FALL", at=100)
    alice.sells(1, "FALL")
    starts_over(alice, "100.1")
    alice.buys(1, "FALL")
    alice.sees("FALL", at="100.1").sees("FALL", at="51.051").sees("FALL", at="100.1")
    assert drawdowns(alice) == [49, 49, 49]


def test_an_ended_run_keeps_its_curve_and_its_figures(alice):
    alice.buys(10, "ABC")
    alice.sees("ABC", at=90)
    advance(alice, 3)
    kept = [history(alice, each) for each in RESOLUTIONS]
    starts_over(alice)
    alice.sees("ABC", at=1)
    advance(alice)
    assert [history(alice, each, run=1) for each in RESOLUTIONS] == kept


def test_a_long_back_test_is_a_single_row(server, alice):
    before = rows_of(server, alice)
    for _ in range(4):
        advance(alice)
    assert len(rows_of(server, alice)) == len(before)
    assert rows_of(server, alice)[-1][-2:] == ("2020-01-01", "2020-01-04")


def rows_of(server, trader):
    asked = f"SELECT id, first_bar, last_bar FROM ibkr_stretches WHERE user_id = {trader.user_id} ORDER BY id"
    return [(row[0], str(row[1])[:10], str(row[2])[:10]) for row in Database(server.database_url).run(asked)]


# The figures


def test_the_figures_of_the_days_follow_a_worked_example():
    """Equity 1000, 800, 1000, 1100: returns of 0, -20 %, 25 % and 10 %, with a mean of 3.75 %.

    Squares of what they differ from that: 14.0625 + 564.0625 + 451.5625 + 39.0625 = 1068.75 (%^2); by 3:
    356.25, whose root is 18.8746 %; x root of 252 (15.8745): 299.62 %. Sharpe: 3.75 / 18.8746 x 15.8745.
    Sortino: the mean square of the negative ones is 400 / 4, its root 10 %; 3.75 / 10 x 15.8745 = 5.9529.
    A year has 63 times these four days: 1.1 ^ 63 = 405.2651.
    """
    figures = daily_figures(Decimal(1000), days(1000, 800, 1000, 1100))
    assert figures == {
        "annual_return_percent": Decimal("40426.51"),
        "annual_volatility_percent": Decimal("299.62"),
        "sharpe_ratio": Decimal("3.15394490"),
        "sortino_ratio": Decimal("5.95294045"),
        "exposure_percent": 100,
    }


def days(*amounts, holds=True):
    return [
        Mark(datetime(2020, 1, 1, tzinfo=UTC) + timedelta(days=n), amount, Decimal(0), amount, False, holds)
        for n, amount in enumerate(map(Decimal, amounts))
    ]


def test_the_summary_has_the_figures_of_its_own_day_points(alice):
    alice.buys(5, "ABC")
    advance(alice, 2)
    alice.sells(2, "ABC")
    advance(alice, 2)
    result = history(alice)
    shown = days(*(point["equity"] for point in result["points"]))
    assert daily_figures(Decimal(1001), shown).items() <= result["summary"].items()


def test_fees_sales_and_exposure_are_counted(server):
    alice = goes_to("2020-01-01", server.trader(cash=1000))
    alice.sees("ABC", at=100).buys(4, "ABC")  # With commission 100.1 each.
    alice.sees("ABC", at=200).sells(1, "ABC")
    alice.sees("ABC", at=50).sells(1, "ABC")
    alice.sees("ABC", at="50.05").sells(1, "ABC")
    alice.sees("ABC", at="100.2002002").sells(1, "ABC", at="100.2002002")
    advance(alice, 3)
    summary = history(alice)["summary"]
    sales = [summary[f"{kind}_sales"] for kind in ("winning", "losing", "even")]
    pnls = [trade["realized_pnl"] for trade in alice.trades if trade["trade_type"] == "sell"]
    assert sales == [sum(p > 0 for p in pnls), sum(p < 0 for p in pnls), sum(p == 0 for p in pnls)]
    assert sum(sales) == 4
    assert summary["win_rate_percent"] == 100 * sales[0] / Decimal(4)
    assert summary["fees_percent"] == (summary["commission"] / 10).quantize(Decimal("0.01"))
    assert summary["exposure_percent"] == 0  # It was sold before the first day ended.


def test_what_has_fewer_than_two_days_or_nothing_below_the_line_is_null(server):
    alice = goes_to("2020-01-01", server.trader(cash=1000))
    alice.buys(1, "ABC")
    assert {history(alice)["summary"][name] for name in DAILY} == {None}
    bob = goes_to("2020-01-01", server.trader(cash=0))
    advance(bob, 3)
    summary = history(bob)["summary"]
    assert {summary[name] for name in (*DAILY[:4], "fees_percent")} == {None}
    assert summary["exposure_percent"] == 0
    still = daily_figures(Decimal(7), days(7, 7, 7))
    assert [still[name] for name in DAILY[:4]] == [0, 0, None, None]
    assert daily_figures(Decimal(9), days(12, 16))["sharpe_ratio"] is None  # A third twice: no deviation.
    thirds = daily_figures(Decimal(3**9), days(*(3**9 * Decimal(4**n) / 3**n for n in range(1, 10))))
    assert (thirds["sharpe_ratio"], thirds["annual_volatility_percent"]) == (None, 0)


def test_figures_beyond_all_sense_are_null_and_no_fault(server):
    alice = goes_to("2020-01-01", server.trader(cash="0.00000003"))
    alice.sees("ABC", at="0.00000001").buys(1, "ABC")
    alice.sees("ABC", at="9999999999.99999999")
    advance(alice)
    alice.sees("ABC", at="0.00000001")
    advance(alice)
    summary = history(alice)["summary"]
    assert summary["annual_volatility_percent"] is None
    alice.sees("ABC", at="9999999999.99999999")
    assert history(alice)["summary"]["annual_return_percent"] is None


amounts = st.decimals("0", "1e21", places=8)
curves = st.tuples(amounts, st.lists(amounts, max_size=6))


@given(curves)
def test_no_curve_is_a_fault(curve):
    start, equities = curve
    for figure in daily_figures(start, days(*equities)).values():
        assert figure is None or abs(figure) <= ACCOUNT_LIMIT
    assert 0 <= max_drawdown(start, equities) <= 1


cents = st.integers(5_000, 20_000).map(lambda cents: Decimal(cents) / 100)


@given(cents, st.lists(cents, min_size=2, max_size=60), st.booleans())
def test_the_figures_are_what_numpy_makes_of_the_same_days(start, equities, holds):
    figures = daily_figures(start, days(*equities, holds=holds))
    curve = numpy.array([start, *equities], dtype=float)
    returns = curve[1:] / curve[:-1] - 1
    deviation, downside = returns.std(ddof=1), numpy.sqrt((numpy.minimum(returns, 0) ** 2).mean())
    year = numpy.sqrt(252)
    expected = {
        "annual_return_percent": ((curve[-1] / curve[0]) ** (252 / len(equities)) - 1) * 100,
        "annual_volatility_percent": deviation * year * 100,
        "sharpe_ratio": returns.mean() / deviation * year if len(set(returns)) > 1 else None,
        "sortino_ratio": returns.mean() / downside * year if downside else None,
        "exposure_percent": 100 * holds,
    }
    for name, value in expected.items():
        if value is None or (name == "annual_return_percent" and value >= float(ACCOUNT_LIMIT)):
            assert figures[name] is None
        else:
            assert float(figures[name]) == pytest.approx(value, rel=1e-6, abs=0.0051)
    fall = (1 - curve / numpy.maximum.accumulate(curve)).max()
    assert float(max_drawdown(start, equities)) == pytest.approx(fall, abs=1e-12)


# A clock that runs, without waiting for it


def at(minutes):
    return datetime(2026, 1, 1, tzinfo=UTC) + timedelta(minutes=minutes)


def stretch(begun, first=None, last=None):
    return Stretch(run=1, first_bar=first, last_bar=last, begun_at=at(begun))


def trade(action, quantity, price, booked, bar, cash):
    amounts = {"quantity": Decimal(quantity), "market_price": Decimal(price), "cash_after": Decimal(cash)}
    return Trade(ticker="ABC", trade_type=action, created_at=at(booked), market_time=bar, **amounts)


def replayed(market, trades, stretches, end, market_time, pins=()):
    steps = market.replay(Past(trades, stretches, pins), at(end), market_time)
    return [
        (mark.timestamp.strftime("%dT%H"), mark.equity, mark.is_trade)
        for mark in curve_of(Decimal(100), steps)
    ]


@pytest.fixture(scope="module")
def market(file):
    return SampleMarket(file)


def test_a_clock_that_runs_passes_a_bar_a_minute_and_begins_again(market):
    """Five bars: seven minutes show the first two again."""
    begun = next(minute for minute in range(5) if market.bar_shown(at(minute)) == market.bars[0])
    bought = trade("buy", 1, 100, begun + 0.5, market.bars[0], 0)
    curve = replayed(market, [bought], [stretch(begun - 3)], begun + 6.5, market.bars[1])
    assert [equity for _, equity, _ in curve] == [100, 100, 80, 100, 90, 110, 100, 80, 80]
    assert [is_trade for *_, is_trade in curve].index(True) == 1


def test_a_clock_that_is_left_running_for_weeks_counts_two_rounds(market):
    """The fall from 110, the last bar, to 80, the second, is seen in the second round alone."""
    begun = next(minute for minute in range(5) if market.bar_shown(at(minute)) == market.bars[0])
    bought = trade("buy", 1, 100, begun + 0.5, market.bars[0], 0)
    curve = replayed(market, [bought], [stretch(begun)], begun + 50_000, market.bars[0])
    equities = [equity for _, equity, _ in curve]
    assert equities == [100, 100, *([80, 100, 90, 110, 100] * 2), 100]
    sold = trade("sell", 1, 90, begun + 50_003.5, market.bars[3], 90)
    curve = replayed(market, [bought, sold], [stretch(begun)], begun + 50_004, market.bars[4])
    assert [equity for _, equity, _ in curve] == [*equities[:-1], 90, 90, 90, 90]


def test_a_fill_that_is_settled_later_stands_at_its_bar(market):
    """Booked two minutes after the bar at which an order was filled, at another price than its close."""
    begun = next(minute for minute in range(5) if market.bar_shown(at(minute)) == market.bars[0])
    bought = trade("buy", 1, 100, begun + 0.5, market.bars[0], 0)
    sold = trade("sell", 1, 95, begun + 3.5, market.bars[1], 95)
    curve = replayed(market, [bought, sold], [stretch(begun)], begun + 3.6, market.bars[3])
    assert [equity for _, equity, _ in curve] == [100, 100, 95, 95, 95, 95, 95]


def test_a_fill_within_a_bar_is_not_shown_as_held_at_its_close(market):
    first, second = market.bars[:2]
    bought, sold = trade("buy", 1, 100, 1, first, 0), trade("sell", 1, 95, 2, second, 95)
    curve = replayed(market, [bought, sold], [stretch(0, first, second)], 3, second)
    assert [equity for _, equity, _ in curve] == [100, 100, 95, 95, 95]


# Live prices


def test_live_there_is_a_point_for_each_day_with_a_published_price(new_database, file):
    """Bought at 100 days ago, seen at 90 and then at 51 the day after, at 100 yesterday and today."""
    database = new_database().migrate()
    settings = {"DATABASE_URL": database.url, "PRICE_SOURCES": "yahoo"}
    now = datetime.now(UTC)
    noon = now.replace(hour=0, minute=0, second=0) - timedelta(days=5, hours=-12)
    with loaded(**settings) as program:
        with program["app"].app_context():
            user_id, key = program["User"].open("alice@example.com", Decimal(1000))
            put(program, database, user_id, noon, now)
        client = program["app"].test_client()
        for resolution, shown in {
            "trade": [1000, 1000],
            "bar": [1000, 510, 1000, 1000, 1000],
            "day": [1000, 510, 1000, 1000],
        }.items():
            answer = client.get(
                f"/api/v1/account/history?resolution={resolution}", headers={"Authorization": f"Bearer {key}"}
            )
            assert answer.status_code == 200, answer.text
            result = json.loads(answer.data)
            assert [point["equity"] for point in result["points"]] == shown
            assert result["summary"]["max_drawdown_percent"] == 49
            assert result["summary"]["exposure_percent"] == 100
        with program["app"].app_context():
            program["db"].engine.dispose()


def put(program, database, user_id, noon, now):
    """Write a purchase and the quotes that were published since, as they would be after four days."""
    tables = program["db"].metadata.tables
    own = {"user_id": user_id, "ticker": "ABC"}
    money = dict.fromkeys(["price", "total_amount", "market_price"], Decimal(100))
    booked = own | money | {"run": 1, "trade_type": "buy", "order_type": "market", "quantity": Decimal(10)}
    booked |= {"total_amount": Decimal(1000), "commission": Decimal(0), "cash_after": Decimal(0)}
    booked |= {"price_source": "yahoo_finance", "idempotency_key": "one", "market_time": noon}
    held = own | {"quantity": Decimal(10), "cost_basis": Decimal(1000), "updated_at": noon}
    day = timedelta(days=1)
    seen = [
        (noon - day, 70),
        (noon - timedelta(seconds=1), 100),
        (noon + day, 90),
        (noon + 1.1 * day, 51),
        (now - day, 100),
        (now, 100),
    ]
    with database.engine.begin() as connection:
        connection.execute(tables["ibkr_trades"].insert(), booked | {"created_at": noon})
        connection.execute(tables["ibkr_stock_balances"].insert(), held)
        connection.execute(tables["ibkr_balances"].update(), {"cash_balance": Decimal(0)})
        for number, (moment, price) in enumerate(seen, 1):
            quote = {"ticker": "ABC", "number": number, "price": Decimal(price), "currency": "USD"}
            quote |= {"source": "yahoo_finance", "timestamp": moment, "market_time": moment}
            connection.execute(
                tables["ibkr_quotes"].insert(), quote | {"valid_until": moment + timedelta(hours=1)}
            )


# Databases that are older than this

OLD = """
users (id, email, api_key_hash, created_at) VALUES (1, 'a@b.c', :key_hash, :first)
market (id, kind) VALUES (1, 'sample')
balances (user_id, cash_balance, starting_cash, run, updated_at, market_clock)
    VALUES (1, :dollars, :dollars, 2, :first, :first)
runs (user_id, run, starting_cash, cash_balance, market_time, ended_at)
    VALUES (1, 1, :dollars, 0, :third, :first)
trades (user_id, run, ticker, trade_type, order_type, quantity, price, total_amount, commission, cash_after,
    market_price, price_source, idempotency_key, market_time, created_at)
    VALUES (1, 1, 'FALL', 'buy', 'market', :shares, :price, :dollars, 0, 0,
    :price, 'sample', 'a', :first, :first)
"""
"""Somebody who bought 10 FALL at 100, for all that there was, and started over two bars later."""


def test_what_an_older_database_does_not_know_was_not_passed(new_database, file):
    database = new_database()
    assert flask("db", "upgrade", "0009", DATABASE_URL=database.url).returncode == 0
    unit = 10**8 if database.engine.dialect.name == "sqlite" else 1
    values = {"dollars": 1000 * unit, "shares": 10 * unit, "price": 100 * unit}
    values |= {"first": "2020-01-01 00:00:00Z", "third": "2020-01-03 00:00:00Z"}
    values |= {"key_hash": hashlib.sha256(b"the key").hexdigest()}
    if unit > 1:
        values |= {name: values[name].rstrip("Z") for name in ("first", "third")}
    for row in OLD.strip().replace("\n    ", " ").splitlines():
        database.run(f"INSERT INTO ibkr_{row}", **{n: v for n, v in values.items() if f":{n}" in row})
    assert flask("db", "upgrade", DATABASE_URL=database.url).returncode == 0
    with loaded(DATABASE_URL=database.url, PRICE_SOURCES="sample", SAMPLE_MARKET=file) as program:
        client, key = program["app"].test_client(), {"Authorization": "Bearer the key"}

        def shown(run):
            answer = client.get(f"/api/v1/account/history?run={run}&resolution=bar", headers=key)
            points = json.loads(answer.data)["points"]
            return [(point["timestamp"][8:10], point["equity"]) for point in points]

        assert shown(1) == [("01", 1000), ("03", 1000)]
        client.post("/api/v1/market/advance", headers=key)
        assert shown(2) == [("01", 1000), ("02", 1000)]
        with program["app"].app_context():
            program["db"].engine.dispose()
