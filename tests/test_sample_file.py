"""A file of recorded prices is the market; one that is wrong ends the program with one line."""

import sys
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path

import pytest
from cast import loaded

sys.path.insert(0, str(Path(__file__).parent.parent))

from models import Account
from pricing import SAMPLE_FILE, SampleMarket
from recorded import Bar

DAYS = [datetime(2024, 3, 7, tzinfo=UTC) + timedelta(days) for days in range(3)]


def test_a_file_that_cannot_be_read_ends_the_program_with_its_line(tmp_path):
    file = tmp_path / "market.csv"
    file.write_text("timestamp,ticker,price\n2024-03-07,ABC,1.5\n2024-03-08,ABC,-1\n")
    with pytest.raises(SystemExit) as end, loaded(PRICE_SOURCES="sample", SAMPLE_MARKET=file):
        pass
    reason = "the price -1 is not above 0 and below 10000000000, to 8 decimals"
    assert end.value.code == f"SAMPLE_MARKET cannot be used: {file}, line 3: {reason}."


def test_a_folder_without_prices_ends_the_program_with_its_name(tmp_path):
    with pytest.raises(SystemExit) as end, loaded(PRICE_SOURCES="sample", SAMPLE_MARKET=tmp_path):
        pass
    assert end.value.code == f"SAMPLE_MARKET cannot be used: {tmp_path} has no CSV files."


def test_the_bundled_market_is_whole():
    market = SampleMarket(SAMPLE_FILE)
    assert len(market.bars) == 251
    assert {len(bars) for bars in market.series.values()} == {251}


def test_the_bundled_shares_pay_what_they_paid_and_nothing_else_does():
    paid = {
        ticker: [(f"{bar.timestamp:%Y-%m-%d}", f"{bar.dividend:.2f}") for bar in bars if bar.dividend]
        for ticker, bars in SampleMarket(SAMPLE_FILE).series.items()
    }
    assert {ticker: dividends for ticker, dividends in paid.items() if dividends} == {
        "AAPL": [("2012-08-09", "2.65"), ("2012-11-07", "2.65"), ("2013-02-07", "2.65")],
        "IBM": [(day, "0.85") for day in ("2012-05-08", "2012-08-08", "2012-11-07", "2013-02-06")],
        "MSFT": [
            ("2012-05-15", "0.20"),
            ("2012-08-14", "0.20"),
            ("2012-11-13", "0.23"),
            ("2013-02-19", "0.23"),
        ],
    }
    assert {bar.split for bars in SampleMarket(SAMPLE_FILE).series.values() for bar in bars} == {1}


@pytest.fixture
def market(tmp_path):
    """ABC on two days and XYZ on the second and third."""
    (tmp_path / "ABC.csv").write_text(
        "Date,Open,High,Low,Close,Volume\n2024-03-07,1,3,.5,2,100\n2024-03-08,2,4,1.5,3,\n"
    )
    (tmp_path / "XYZ.csv").write_text("date,price\n2024-03-09,8\n2024-03-08,7\n")
    return SampleMarket(tmp_path)


def test_the_market_keeps_the_bars_of_each_ticker_and_the_times_of_them_all(market):
    assert market.bars == DAYS
    assert market.series["ABC"][0] == Bar(DAYS[0], *map(Decimal, ("1", "3", "0.5", "2", "100")))


def test_a_ticker_costs_its_last_close(market):
    assert [market.price("ABC", day) for day in DAYS] == [2, 3, 3]
    assert [market.price("XYZ", day) for day in DAYS] == [None, 7, 8]


@pytest.mark.parametrize(
    ("stopped", "stands"),
    [(DAYS[0] - timedelta(999), 0), (DAYS[1] + timedelta(hours=5), 1), (DAYS[2] + timedelta(999), 2)],
    ids=["before", "between", "after"],
)
def test_a_clock_that_was_stopped_elsewhere_stands_at_the_nearest_bar(market, stopped, stands):
    account = Account(market_clock=stopped, pin_changes=0)
    assert market.time(account) == DAYS[stands]
    quote = market.look_up("ABC", account)
    assert (quote.timestamp, quote.market_time) == (DAYS[stands], DAYS[stands])
    assert quote.price == market.price("ABC", DAYS[stands])
    assert market.quotes(["ABC"], account) == {"ABC": quote}
