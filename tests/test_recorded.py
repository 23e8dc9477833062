"""Recorded prices are read as people have them, or refused with the file, the line and the reason."""

import random
import sys
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent.parent))

import recorded
from recorded import BadFile, Bar

DAY = datetime(2024, 3, 7, tzinfo=UTC)
DAYS = [DAY, DAY + timedelta(days=1)]
LONG = "timestamp,ticker,price\n"
ROW = "2024-03-07,ABC,1.5\n"


@pytest.fixture
def read(tmp_path):
    """Reads a file that has this content, and may have this name."""

    def read(content: str | bytes, name: str = "market.csv"):
        file = tmp_path / name
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        return recorded.read(file)

    return read


def closes(market) -> dict:
    return {ticker: [float(bar.close) for bar in bars] for ticker, bars in market.items()}


def times(market, ticker="ABC") -> list[datetime]:
    return [bar.timestamp for bar in market[ticker]]


def bar(moment, *numbers) -> Bar:
    return Bar(moment, *map(Decimal, numbers))


MANY = settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], database=None)

# ------------------------------------------------------------------------------------------ Layouts

ABC_BARS = [bar(DAYS[0], "1", "3", "0.5", "2", "100"), bar(DAYS[1], "2", "4", "1.5", "3", "0")]

BARS_WITH = {
    "a ticker column": """
        date,ticker,open,high,low,close,volume
        2024-03-07,ABC,1,3,.5,2,100
        2024-03-08,abc,2,4,1.5,3,""",
    "a symbol column": """
        Date,Symbol,Open,High,Low,Close,Volume
        2024-03-07,ABC,1,3,.5,2,100
        2024-03-08,ABC,2,4,1.5,3,NaN""",
    "another order": """
        CLOSE,volume,High,low,OPEN,TICKER,DATE
        2,100,3,.5,1,ABC,2024-03-07
        3,0,4,1.5,2,ABC,2024-03-08""",
    "the ticker in the file's name": """
        Date,Open,High,Low,Close,Volume
        2024-03-07,1,3,.5,2,100
        2024-03-08,2,4,1.5,3,0""",
    "backtesting.py's unnamed dates": """
        ,Open,High,Low,Close,Volume
        2024-03-07,1,3,.5,2,100
        2024-03-08,2,4,1.5,3,0""",
    "Yahoo's other columns": """
        Date,Open,High,Low,Adj Close,Close,Volume,Dividends,Stock Splits
        2024-03-07,1,3,.5,1.9,2,100,0.0,0.0
        2024-03-08,2,4,1.5,2.9,3,0,0.0,0.0""",
    "a row counter": """
        ,Date,Open,High,Low,Close,Volume
        0,2024-03-07,1,3,.5,2,100
        1,2024-03-08,2,4,1.5,3,0""",
    "Stooq's brackets": """
        <TICKER>,<PER>,<DATE>,<TIME>,<OPEN>,<HIGH>,<LOW>,<CLOSE>,<VOLUME>,<OPENINT>
        ABC,D,20240307,000000,1,3,.5,2,100,0
        ABC,D,20240308,000000,2,4,1.5,3,0,0""",
    "Investing's price for the close": """
        "Date","Price","Open","High","Low","Volume","Change %"
        "2024-03-08","3","2","4","1.5","","0.1%"
        "2024-03-07","2","1","3",".5","100","0.2%\"""",
}


@pytest.mark.parametrize("what", BARS_WITH)
def test_bars_are_read_with(read, what):
    name = "market.csv" if "ABC" in BARS_WITH[what] else "abc.csv"
    assert read(BARS_WITH[what], name) == {"ABC": ABC_BARS}


def test_a_price_a_row_makes_bars_without_a_range(read):
    market = read(f"{LONG}2024-03-07T00:00:00Z,ABC,1.5\n2024-03-08T00:00:00Z,ABC,2\n")
    assert market == {"ABC": [bar(DAYS[0], *["1.5"] * 4, 0), bar(DAYS[1], *["2"] * 4, 0)]}


def test_a_date_and_a_price_are_of_the_ticker_that_names_the_file(read):
    assert closes(read("Date,Close\n2024-03-07,1.5\n", "brk.b.CSV")) == {"BRK-B": [1.5]}
    assert closes(read("price,time\n1.5,2024-03-07\n", "^GSPC.csv")) == {"^GSPC": [1.5]}


def test_a_wide_file_has_a_column_for_each_ticker_and_may_have_gaps(read):
    market = read("Unnamed: 0,AAPL,date,low,brk.b,Adj Close\n0,1,2024-03-07,2,NaN,7\n1,,2024-03-08,3,4,8\n")
    assert closes(market) == {"AAPL": [1], "BRK-B": [4], "LOW": [2, 3]}
    assert times(market, "BRK-B") == [DAYS[1]]


def test_what_else_a_wide_file_has_is_not_taken_for_tickers(read):
    assert closes(read("Date,Time,AAPL,Volume,Dividends\n2024-03-07,00:00,1,500,0\n")) == {"AAPL": [1]}


def test_a_close_comes_before_a_price(read):
    assert closes(read("date,price,close,ticker\n2024-03-07,1,2,ABC\n")) == {"ABC": [2]}


def test_files_are_ordered_by_time_whatever_the_order_of_their_rows(read):
    heading = "Timestamp,Ticker,Price\n"
    market = read(f"{heading}2024-03-08,BB,4\n2024-03-07,BB,3\n2024-03-07,AA,1\n2024-03-08,AA,2\n")
    assert list(market) == ["AA", "BB"]
    assert closes(market) == {"AA": [1, 2], "BB": [3, 4]}
    assert times(market, "BB") == DAYS


def test_files_that_were_joined_repeat_their_heading(read):
    assert closes(read(f"{LONG}2024-03-07,AA,1\n{LONG}2024-03-07,BB,2\n")) == {"AA": [1], "BB": [2]}


def test_a_folder_is_read_whole(tmp_path):
    (tmp_path / "AAA.csv").write_text("Date,Close\n2024-03-08,2\n2024-03-07,1\n")
    (tmp_path / "bbb.CSV").write_text("Date;Close\n2024-03-07;3,5\n")
    (tmp_path / "wide.csv").write_text("Date,AAA,CCC\n2024-03-06,9,8\n2024-03-07,1,7\n")
    (tmp_path / "._AAA.csv").write_bytes(b"\0\5")  # as macOS leaves them
    (tmp_path / "readme.txt").write_text("not a price\n")
    (tmp_path / "old.csv").mkdir()
    market = recorded.read(str(tmp_path))
    assert closes(market) == {"AAA": [9, 1, 2], "BBB": [3.5], "CCC": [8, 7]}


def test_of_two_files_with_the_same_close_the_one_that_has_bars_is_kept(tmp_path):
    for one, other in (("a.csv", "b.csv"), ("b.csv", "a.csv")):
        (tmp_path / one).write_text("date,ABC\n2024-03-07,2\n")
        (tmp_path / other).write_text("date,ticker,open,high,low,close,volume\n2024-03-07,ABC,1,3,.5,2,100\n")
        assert recorded.read(tmp_path) == {"ABC": ABC_BARS[:1]}


# ----------------------------------------------------------------------- What pandas and yfinance write


def yahoo_bars(zone=None, name="Date") -> pd.DataFrame:
    """One ticker, as yfinance has it; the second bar lacks its high."""
    index = pd.DatetimeIndex(["2024-03-07", "2024-03-08"], name=name, tz=zone)
    columns = {"Open": [1.37000000476837, 2], "High": [3, None], "Low": [1, 1.5]}
    return pd.DataFrame({**columns, "Close": [1.5, 2.5], "Volume": [100, 200]}, index=index)


def downloaded(*tickers: str, group_by="column", zone=None) -> pd.DataFrame:
    """What yfinance.download answers; it puts tickers together in the same way."""
    table = pd.concat([yahoo_bars(zone) for _ in tickers], axis=1, keys=tickers, names=["Ticker", "Price"])
    return table if group_by == "ticker" else table.swaplevel(0, 1, axis=1).sort_index(level=0, axis=1)


YAHOO = [bar(DAYS[0], "1.37", "3", "1", "1.5", "100"), bar(DAYS[1], "2", "2.5", "1.5", "2.5", "200")]
BOTH = {"AAPL": YAHOO, "BRK-B": YAHOO}


@pytest.mark.parametrize("group_by", ["column", "ticker"])
@pytest.mark.parametrize("tickers", [["AAPL"], ["AAPL", "BRK-B"]])
def test_what_yfinance_downloads_is_read_whichever_way_it_is_grouped(read, group_by, tickers):
    table = downloaded(*tickers, group_by=group_by)
    unnamed = table.rename_axis(index=None)
    for content in (
        table.to_csv(),
        unnamed.to_csv(),
        unnamed.rename_axis(columns=[None, None]).to_csv(),
        table.reset_index().to_csv(),
        table.reset_index().to_csv(index=False),
        table.to_csv(sep=";", decimal=","),
        table.to_csv(sep="\t"),
    ):
        assert read(content) == {ticker: YAHOO for ticker in tickers}, content


@pytest.mark.parametrize(
    "content",
    [
        yahoo_bars().to_csv(),
        yahoo_bars(name=None).to_csv(),
        yahoo_bars(name="Datetime").rename_axis(columns="Price").to_csv(),
        yahoo_bars().reset_index().to_csv(),
        yahoo_bars(name=None).reset_index().to_csv(index=False),
        yahoo_bars(name=None).reset_index().to_csv(),
        yahoo_bars(name="Unnamed: 0").to_csv(),
        yahoo_bars(zone="UTC").to_csv(),
        yahoo_bars().assign(**{"Adj Close": 1, "Dividends": 0.0, "Stock Splits": 0.0}).to_csv(),
    ],
)
def test_one_ticker_of_yfinance_is_read(read, content):
    assert read(content, "AAPL.csv") == {"AAPL": YAHOO}


def test_panels_are_read(read):
    table = downloaded(*BOTH)
    assert read(table.stack(level="Ticker").to_csv()) == BOTH
    assert read(table.stack(level="Ticker").reset_index().to_csv()) == BOTH
    assert read(pd.concat([yahoo_bars().assign(note="", Ticker=ticker) for ticker in BOTH]).to_csv()) == BOTH
    assert closes(read(table["Close"].to_csv())) == {"AAPL": [1.5, 2.5], "BRK-B": [1.5, 2.5]}


def test_an_index_of_new_york_is_read_as_the_moments_that_it_names(read):
    market = read(downloaded("AAPL", zone="America/New_York").to_csv())
    assert times(market, "AAPL") == [day + timedelta(hours=5) for day in DAYS]


def test_an_unnamed_index_of_seconds_is_read_but_a_row_counter_is_no_time(read):
    table = yahoo_bars(name=None)
    table.index = [day.timestamp() for day in DAYS]
    assert read(table.to_csv(), "AAPL.csv") == {"AAPL": YAHOO}
    table.index = range(2)
    with pytest.raises(BadFile, match="line 2: '0' is no time, and no column is called"):
        read(table.to_csv(), "AAPL.csv")


# ------------------------------------------------------------------------------ Splits and dividends


def events(market, ticker="ABC") -> list[tuple[str, str]]:
    """The dividend and split of each bar, as digits and ratios; empty where there is none."""
    return [
        (
            f"{bar.dividend.normalize():f}" if bar.dividend else "",
            recorded.written(bar.split).replace("1:1", ""),
        )
        for bar in market[ticker]
    ]


def days(count: int) -> list[str]:
    return [f"{DAY + timedelta(days=number):%Y-%m-%d}" for number in range(count)]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (
            "market.csv",
            "timestamp,ticker,price,dividend,split\n{},ABC,100,,\n{},ABC,10,0.25,10:1\n{},ABC,10,,\n",
        ),
        (
            "market.csv",
            "DIVIDENDS,Splits,date,symbol,open,close\n0,0,{},ABC,9,9\n.25,10.0,{},abc,9,9\n,1,{},ABC,9,9\n",
        ),
        ("ABC.csv", "Date,Close,Dividend,Split\n{},100,nan,nan\n{},10,0.250,20:2\n{},10,0.0,1:1\n"),
        ("abc.csv", "Date;Price;Dividends;Splits\n{};100;;\n{};10;0,25;10,0\n{};10;0,0;0,0\n"),
        ("ABC.csv", "Date,Close,Dividends,Stock Splits\n{},100,0.0,0.0\n{},10,0.25,10.0\n{},10,0.0,0.0\n"),
    ],
    ids=["long", "bars", "one ticker", "decimal commas", "yfinance's, not adjusted"],
)
def test_a_row_may_have_a_dividend_and_a_split(read, name, content):
    assert events(read(content.format(*days(3)), name)) == [("", ""), ("0.25", "10:1"), ("", "")]


def with_events(table: pd.DataFrame) -> pd.DataFrame:
    return table.assign(**{"Dividends": [0.0, 0.24], "Stock Splits": [0.0, 2.0]})


@pytest.mark.parametrize("group_by", ["column", "ticker"])
def test_what_yfinance_downloads_with_actions_is_read_whichever_way_it_is_grouped(read, group_by):
    """The first ticker is split, and its price falls; the second is adjusted."""
    falls = with_events(yahoo_bars())
    prices = ["Open", "High", "Low", "Close"]
    falls[prices] = falls[prices].mul([2, 0.5], axis=0)
    tables = [falls, with_events(yahoo_bars())]
    table = pd.concat(tables, axis=1, keys=["AAPL", "BRK-B"], names=["Ticker", "Price"])
    if group_by == "column":
        table = table.swaplevel(0, 1, axis=1).sort_index(level=0, axis=1)
    market = read(table.to_csv())
    assert events(market, "AAPL") == [("", ""), ("0.24", "2:1")]
    assert events(market, "BRK-B") == [("", ""), ("0.24", "")]


def test_in_a_wide_file_they_are_neither_tickers_nor_events(read):
    market = read("Date,ABC,dividend,Dividends,split,Splits,Stock Splits\n2024-03-07,1,2,2,2,2,2\n")
    assert market == {"ABC": [bar(DAY, 1, 1, 1, 1, 0)]}


def test_bars_are_shown_with_their_time_and_five_numbers(read):
    (of_abc,) = read("date,ticker,price,dividend,split\n2024-03-07,ABC,1,1,2\n")["ABC"]
    assert of_abc.to_dict() == dict(zip(("timestamp", *recorded.FIELDS), (DAY, 1, 1, 1, 1, 0), strict=True))


@pytest.mark.parametrize(
    ("text", "ratio"),
    [
        ("10", "10:1"),
        ("1e1", "10:1"),
        ("1.5", "3:2"),
        ("0.125", "1:8"),
        ("3:2", "3:2"),
        ("1:10000", "1:10000"),
        ("10000:1", "10000:1"),
        ("0.0001", "1:10000"),
        ("10000.000", "10000:1"),
        ("1001:1000", "1001:1000"),
        ("0.333333", "1:3"),
        ("0.3333333333333333", "1:3"),
        ("0.6666666666666666", "2:3"),
        ("0.666667", "2:3"),
        ("333.333333", "1000:3"),
        ("2.10489510489511", "301:143"),  # As 903/429 in binary, to 14 decimals.
        ("1.281", "1281:1000"),
        ("0.3333", "3333:10000"),
        ("1500.333333", "1500333333:1000000"),
        ("0.33333", "33333:100000"),
        ("0.333334", "166667:500000"),
        ("1.0009990009990008", "1000999:1000000"),  # 1002/1001 has longer terms.
        pytest.param("1.5" + "0" * 100_000, "3:2", id="very long"),
        pytest.param("1." + "0" * 100_000 + "1", "1:1", id="nearly one"),
    ],
)
def test_a_split_is_the_exact_ratio_that_was_meant(read, text, ratio):
    (of_abc,) = read(f"date,ticker,price,split\n2024-03-07,ABC,1,{text}\n")["ABC"]
    assert recorded.written(of_abc.split) == ratio


@MANY
@given(st.integers(1, 1000), st.integers(1, 1000), st.integers(6, 15))
def test_a_ratio_of_small_terms_is_found_in_what_programs_write(new, old, places):
    ratio = Fraction(new, old)
    assert recorded.split_from(repr(new / old)) == ratio
    assert recorded.split_from(f"{new / old:.{places}f}") == ratio
    assert recorded.split_from(f"{new}:{old}") == ratio


@pytest.mark.parametrize(
    ("text", "dividend"),
    [
        ("0.25", "0.25"),
        ("1e-3", "0.001"),
        ("0.123456785", "0.12345678"),
        ("0.123456795", "0.1234568"),
        ("0.000000005", ""),
        ("9999999999.99999999", "9999999999.99999999"),
        ("-0", ""),
    ],
)
def test_a_dividend_is_rounded_to_8_decimals_half_even(read, text, dividend):
    assert events(read(f"date,ticker,price,dividend\n2024-03-07,ABC,1,{text}\n")) == [(dividend, "")]


def test_a_row_without_a_price_gives_its_event_to_the_next_that_has_one(read):
    """Of its own ticker, in whatever order the rows are; what none follows is lost."""
    rows = """date,ticker,price,dividend,split
        2024-03-12,ABC,,9,9
        2024-03-11,ABC,5,1,2
        2024-03-10,XYZ,5,,
        2024-03-10,ABC,,0.5,3:2
        2024-03-09,ABC,nan,0.25,
        2024-03-08,ABC,5,0.125,
        2024-03-01,ABC,,,1:8
        """
    market = read(rows)
    assert events(market) == [("0.125", "1:8"), ("1.75", "3:1")]
    assert events(market, "XYZ") == [("", "")]


def test_rows_of_one_time_have_their_event_once(tmp_path):
    heading = "date,ticker,open,close,dividend,split\n"
    (tmp_path / "a.csv").write_text(f"{heading}2024-03-07,ABC,1,1,0.5,\n2024-03-07,ABC,2,1,0.50,2\n")
    (tmp_path / "b.csv").write_text(f"{heading}2024-03-07,ABC,,1,,2:1\n2024-03-07,ABC,,1,,\n")
    (tmp_path / "c.csv").write_text("date,ABC\n2024-03-07,1\n")
    market = recorded.read(tmp_path)
    assert events(market) == [("0.5", "2:1")]
    assert market["ABC"][0].open == 2


@pytest.mark.parametrize(
    ("before", "open", "close", "split", "counts"),
    [
        (100, 10, 10, "10.0", True),
        (100, 10, 40, "10.0", True),  # By its open, whatever the day made of it.
        (100, None, 10, "10.0", True),
        (100, 100, 100, "10.0", False),
        (100, 98, 98, "10.0", False),
        (100, 31, 31, "10.0", True),  # Nearer to a tenth than to all, as logarithms go;
        (100, 32, 32, "10.0", False),  # the root of ten is 3.162.
        (100, 1, 1, "10.0", True),
        (100, 1000, 1000, "10.0", False),
        (1, 8, 8, "0.125", True),
        (1, 1, 1, "0.125", False),
        (1, 0.125, 0.125, "0.125", False),
        (100, 65, 65, "1.5", True),
        (100, 90, 90, "1.5", False),
    ],
)
def test_a_split_of_yfinance_counts_where_the_price_moves_with_it(read, before, open, close, split, counts):
    rows = f"Date,Open,Close,Stock Splits\n2024-03-07,,{before},0\n2024-03-08,{open},{close},{split}\n"
    assert read(rows, "ABC.csv")["ABC"][1].split == (Fraction(split) if counts else 1)


def test_a_split_of_yfinance_without_a_price_moves_the_next(read):
    rows = "Date,Close,Stock Splits\n2024-03-07,100,4.0\n2024-03-08,,5.0\n2024-03-09,,2.0\n2024-03-10,{},0\n"
    assert events(read(rows.format(10), "ABC.csv")) == [("", ""), ("", "10:1")]
    assert events(read(rows.format(100), "ABC.csv")) == [("", ""), ("", "")]


def test_a_split_is_believed_beside_one_of_yfinance(read):
    rows = "Date,Close,split,Stock Splits\n2024-03-07,100,,\n2024-03-08,99,2,2.0\n"
    assert events(read(rows, "ABC.csv")) == [("", ""), ("", "2:1")]


EVENTS = "date,ticker,price,dividend,split\n"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("2024-03-07,ABC,1,-0.01,", "the dividend -0.01 is not from 0 to below 10000000000"),
        ("2024-03-07,ABC,1,10000000000,", "the dividend 10000000000 is not from 0"),
        ("2024-03-07,ABC,1,1e400,", "the dividend 1e400 is not from 0"),
        ("2024-03-07,ABC,1,much,", "'much' is no number"),
        ("2024-03-07,ABC,1,inf,", "'inf' is no number"),
        ("2024-03-07,ABC,,much,", "'much' is no number"),
        ("2024-03-07,ABC,1,,-2", "the split -2 is not from 1:10000 to 10000:1"),
        ("2024-03-07,ABC,1,,1e9", "the split 1e9 is not"),
        ("2024-03-07,ABC,1,,10000.1", "the split 10000.1 is not"),
        ("2024-03-07,ABC,1,,0.00009", "the split 0.00009 is not"),
        ("2024-03-07,ABC,1,,1e-900", "the split 1e-900 is not"),
        ("2024-03-07,ABC,1,,10001:1", "the split 10001:1 is not"),
        ("2024-03-07,ABC,1,,1:10001", "the split 1:10001 is not"),
        ("2024-03-07,ABC,1,,0:1", "the split 0:1 is not"),
        ("2024-03-07,ABC,1,,1:0", "'1:0' is no number"),
        ("2024-03-07,ABC,1,,two", "'two' is no number"),
        ("2024-03-07,ABC,1,,1.5:1", "'1.5:1' is no number"),
        ("2024-03-07,ABC,1,,\uff11:1", "'\uff11:1' is no number"),
        pytest.param(f"2024-03-07,ABC,1,,{'9' * 5000}:1", "'9{40}' is no number", id="a long ratio"),
        ("tomorrow,ABC,,1,", "'tomorrow' is no time"),
        ("2024-03-07,A B,,1,", "'A B' is no ticker"),
        ("2024-03-06,ABC,1,0.5,", "ABC has two dividends at 2024-03-06T00:00:00.00:00: 0.25 and 0.5"),
        ("2024-03-06,ABC,1,,1:3", "ABC has two splits at 2024-03-06T00:00:00.00:00: 3:2 and 1:3"),
    ],
)
def test_a_bad_event_is_refused_with_its_line_and_the_reason(read, row, reason):
    with pytest.raises(BadFile, match=rf"market\.csv, line 3: {reason}.*\.$") as refusal:
        read(f"{EVENTS}2024-03-06,ABC,1,0.25,1.5\n{row}\n")
    assert str(refusal.value).isprintable()


@pytest.mark.parametrize(
    "row", ["2024-03-0{},ABC,,9999999999,", "2024-03-0{},ABC,,,1000", "2024-03-0{},ABC,,,0.001"]
)
def test_what_adds_up_to_more_than_there_can_be_is_refused(read, tmp_path, row):
    rows = "\n".join(row.format(day) for day in (7, 8))
    reason = "ABC has too many dividends or splits until 2024-03-09T00:00:00+00:00."
    with pytest.raises(BadFile) as refusal:
        read(f"{EVENTS}{rows}\n2024-03-09,ABC,1,,\n")
    assert str(refusal.value) == f"{tmp_path / 'market.csv'}: {reason}"


def test_two_columns_of_one_thing_are_refused(read):
    with pytest.raises(BadFile, match="line 1: there are two columns dividends of MARKET"):
        read("date,close,dividend,dividends\n2024-03-07,1,1,1\n")


# ------------------------------------------------------------------------- Encodings, separators, gaps

PLAIN = f"{LONG}2024-03-07T00:00:00Z,ABC,1.5\n2024-03-08T00:00:00Z,ABC,2.5\n"


@pytest.mark.parametrize(
    "content",
    [
        PLAIN.encode("utf-8-sig"),
        b"\xff\xfe" + PLAIN.encode("utf-16-le"),
        b"\xfe\xff" + PLAIN.encode("utf-16-be"),
        PLAIN.replace("\n", "\r\n").encode("utf-16"),
        PLAIN.replace("\n", "\r\n"),
        PLAIN.replace("\n", "\r"),
        PLAIN.rstrip("\n"),
        PLAIN.replace(",", ";"),
        PLAIN.replace(",", ";").replace(".", ","),
        PLAIN.replace(",", "\t").replace(".", ","),
        PLAIN.replace(",", " , ").replace("\n", " \n"),
        "".join(f'"{line}" \n'.replace(",", '" , "') for line in PLAIN.splitlines()),
        PLAIN.replace("\n", "\n\n  \n,,\n"),
        PLAIN.replace("\n", ",\n"),
        PLAIN.replace("5\n", "5,,\n"),
        PLAIN.replace("\n", "\n,NaN,\n", 1),
        "\n\n" + PLAIN,
    ],
)
def test_a_file_is_the_same_in_each_encoding_and_with_each_separator(read, content):
    assert closes(read(content)) == {"ABC": [1.5, 2.5]}
    assert times(read(content)) == DAYS


@pytest.mark.parametrize("no", ["", " ", "NaN", "nan", "null", "NULL", "None", "N/A", "NA", "#N/A", "<NA>"])
def test_rows_without_a_price_are_passed_over(read, no):
    assert closes(read(f"{PLAIN}2024-03-09,ABC,{no}\n")) == {"ABC": [1.5, 2.5]}
    market = read(f"Date,Open,Close,Volume\n2024-03-07,{no},2,{no}\n2024-03-08,1,{no},7\n", "ABC.csv")
    assert market == {"ABC": [bar(DAY, 2, 2, 2, 2, 0)]}


def test_rows_that_end_early_and_footers_have_no_price(read):
    assert closes(read(f"{PLAIN}2024-03-09,ABC\n2024-03-10\nFrom somewhere,,\n")) == {"ABC": [1.5, 2.5]}


# ------------------------------------------------------------------------------- Times and numbers


@pytest.mark.parametrize("column", ["timestamp", "TIME", "Date", "datetime"])
@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("2024-03-07T00:00:00Z", DAY),
        ("2024-03-07t00:00:00z", DAY),
        ("2024-03-07", DAY),
        ("2024-03-07 00:00:00", DAY),
        ("2024-03-07T00:00", DAY),
        ("2024-03-07 00:00:00-05:00", DAY + timedelta(hours=5)),
        ("2024-03-07T09:30:00+0530", DAY + timedelta(hours=4)),
        ("2024-03-07 00:00:00+00", DAY),
        ("2024-03-07T00:00:00.250Z", DAY + timedelta(milliseconds=250)),
        ("2024-03-07 00:00:00.123456789", DAY + timedelta(microseconds=123456)),
        ("20240307", DAY),
        ("20240307.0", DAY),
        ("20240307.00", DAY),
        ("2024.03.07 09:30", DAY + timedelta(hours=9, minutes=30)),
        ("1709769600", DAY),
        ("1709769600.0", DAY),
        ("1709769600000", DAY),
        ("1709769600250", DAY + timedelta(milliseconds=250)),
        ("1712010112345", datetime(2024, 4, 1, 22, 21, 52, 345000, UTC)),  # begins like a date
        ("100000000000", datetime(1973, 3, 3, 9, 46, 40, tzinfo=UTC)),
        ("0", datetime(1970, 1, 1, tzinfo=UTC)),
        ("-86400", datetime(1969, 12, 31, tzinfo=UTC)),
        ("0001-01-01", datetime(1, 1, 1, tzinfo=UTC)),
        ("9999-12-31T23:59:59Z", datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)),
    ],
)
def test_a_time_is_read_as_it_is_written(read, column, text, moment):
    assert times(read(f"{column},ticker,price\n{text},ABC,1\n")) == [moment]


@pytest.mark.parametrize(
    ("heading", "row"),
    [
        ("date,time,close", "2024-03-07,09:30,1"),
        ("<TICKER>,<PER>,<DATE>,<TIME>,<CLOSE>", "ABC,60,20240307,093000,1"),
        ("Time,Close,Date", "09:30:00,1,2024-03-07"),
        ("<DATE>\t<TIME>\t<CLOSE>", "2024.03.07\t09:30:00\t1"),
    ],
)
def test_a_date_and_a_time_beside_it_are_one_moment(read, heading, row):
    assert times(read(f"{heading}\n{row}\n", name="ABC.csv")) == [DAY + timedelta(hours=9, minutes=30)]


def test_a_date_without_its_time_is_a_day(read):
    assert times(read("date,time,ticker,close\n2024-03-07,,ABC,1\n")) == [DAY]


def test_days_keep_their_offsets_where_the_clocks_change(read):
    market = read(f"{LONG}2024-03-08 00:00:00-05:00,ABC,1\n2024-03-11 00:00:00-04:00,ABC,2\n")
    assert [moment.hour for moment in times(market)] == [5, 4]


@pytest.mark.parametrize(
    ("text", "price"),
    [
        ("1.37000000476837", "1.37"),
        ("1.2345e-05", "0.00001234"),
        ("1.2355E-5", "0.00001236"),
        ("+1.5", "1.5"),
        (".5", "0.5"),
        ("7.", "7"),
        ("1e9", "1000000000"),
        ("0.00000001", "0.00000001"),
        ("0.0000000051", "0.00000001"),
        ("0.000000015", "0.00000002"),
        ("9999999999.99999999", "9999999999.99999999"),
        pytest.param("1." + "0" * 200_000, "1", id="very long"),
    ],
)
def test_a_price_is_rounded_to_8_decimals_half_even(read, text, price):
    assert read(f"{LONG}2024-03-07,ABC,{text}\n")["ABC"][0].close == Decimal(price)


def test_a_bar_embraces_its_open_and_close(read):
    market = read("Date,Open,High,Low,Close\n2024-03-07,2.00000002,2.00000001,1.5,1\n", "ABC.csv")
    assert market == {"ABC": [bar(DAY, "2.00000002", "2.00000002", "1", "1", 0)]}


@pytest.mark.parametrize(
    ("text", "ticker"),
    [
        ("BRK.B", "BRK-B"),
        ("brk/b", "BRK-B"),
        ("BTC/USD", "BTC-USD"),
        ("SAP.DE", "SAP.DE"),
        ("VOD.L", "VOD.L"),
        ("ABCDEF.B", "ABCDEF.B"),
        ("eurusd=x", "EURUSD=X"),
        ("^GSPC", "^GSPC"),
        ("7203", "7203"),
        ("A" * 20, "A" * 20),
    ],
)
def test_a_ticker_is_spelled_as_yahoo_spells_it(read, text, ticker):
    assert list(read(f"{LONG}2024-03-07,{text},1\n")) == [ticker]
    assert list(read(f"date,{text}\n2024-03-07,1\n")) == [ticker]


# ---------------------------------------------------------------------------------- What is refused


@pytest.mark.parametrize(
    ("content", "line", "reason"),
    [
        (f"{LONG}{ROW}2024-03-07,abc,2\n", 3, "ABC has two prices at 2024-03-07T00:00:00.00:00: 1.5 and 2"),
        (f"{LONG}{ROW}\n2024-03-06 19:00:00-05:00,ABC,2\n", 4, "ABC has two prices .*: 1.5 and 2"),
        (f"{LONG}{ROW}2024-03-08,ABC,abc\n", 3, "'abc' is no number"),
        (f"{LONG}2024-03-08,ABC,-1\n", 2, "the price -1 is not above 0"),
        (f"{LONG}2024-03-08,ABC,0\n", 2, "the price 0 is not above 0"),
        (f"{LONG}2024-03-08,ABC,0.000000005\n", 2, "is not above 0"),
        (f"{LONG}2024-03-08,ABC,1.7e-9\n", 2, "the price 1.7e-9 is not above 0"),
        (f"{LONG}2024-03-08,ABC,10000000000\n", 2, "below 10000000000"),
        (f"{LONG}2024-03-08,ABC,9999999999.999999995\n", 2, "below 10000000000"),
        (f"{LONG}2024-03-08,ABC,1e999\n", 2, "below 10000000000"),
        (f"{LONG}2024-03-08,ABC,1e9999999999999999999999\n", 2, "is no number"),
        (f"{LONG}2024-03-08,ABC,1_000\n", 2, "'1_000' is no number"),
        (f"{LONG}2024-03-08,ABC,inf\n", 2, "'inf' is no number"),
        (f"{LONG}2024-03-08,ABC,\uff11\uff12\n", 2, "is no number"),
        (f'{LONG}2024-03-08,ABC,"1,5"\n', 2, "'1,5' is no number"),
        (f"{LONG}2024-03-08,ABC,1,5\n", 2, "more cells than the heading"),
        (f"{LONG}2024-03-08,ABC,$1\n", 2, "is no number"),
        ("date;AAA;BBB\n2024-03-07;1;1.000,5\n", 2, "'1.000.5' is no number"),
        ("date,ticker,open,close\n2024-03-07,ABC,0,1\n", 2, "the price 0 is not above 0"),
        ("date,ticker,high,close\n2024-03-07,ABC,x,1\n", 2, "'x' is no number"),
        ("date,ticker,close,volume\n2024-03-07,ABC,1,many\n", 2, "'many' is no number"),
        ("date,ticker,close,volume\n2024-03-07,ABC,1,-5\n", 2, "the volume -5 is not from 0"),
        ("date,ticker,close,volume\n2024-03-07,ABC,1,1e18\n", 2, "the volume 1e18 is not"),
        (f"{LONG}07/03/2024,ABC,1\n", 2, "'07/03/2024' is no time"),
        (f"{LONG}2024-02-30,ABC,1\n", 2, "is no time"),
        (f"{LONG},ABC,1\n", 2, "'' is no time"),
        (f"{LONG}0000-01-01,ABC,1\n", 2, "is no time .* in the years 1 to 9999"),
        (f"{LONG}9999-12-31T23:00:00-05:00,ABC,1\n", 2, "in the years 1 to 9999"),
        (f"{LONG}0001-01-01T00:00:00+05:00,ABC,1\n", 2, "in the years 1 to 9999"),
        (f"{LONG}1709769600000000000,ABC,1\n", 2, "in the years 1 to 9999"),
        pytest.param(f"{LONG}{'9' * 5000},ABC,1\n", 2, "in the years 1 to 9999", id="a long time"),
        (f"{LONG}\uff12\uff10\uff12\uff14-03-07,ABC,1\n", 2, "is no time"),
        (f"{LONG}2024-03-08,A B,1\n", 2, "'A B' is no ticker"),
        (f"{LONG}2024-03-08,,1\n", 2, "'' is no ticker"),
        (f"{LONG}2024-03-08,--,1\n", 2, "'--' is no ticker"),
        (f"{LONG}2024-03-08,\u0131bm,1\n", 2, "is no ticker"),
        (f"{LONG}2024-03-08,{'A' * 21},1\n", 2, "is no ticker"),
        pytest.param(f"{LONG}2024-03-08,{'A' * 5000},1\n", 2, "is no ticker", id="a long ticker"),
        ("Price,Close,High\n,,AAA\nDate,,\n2024-03-07,1,2\n", 1, "no column close or price"),
        ("date,AAA,aaa\n2024-03-07,1,1\n", 1, "there are two columns close of AAA"),
        ("date,Close,Close\n2024-03-07,1,1\n", 1, "there are two columns close of MARKET"),
        ("Price,Close,Close\nTicker,AAA,A A\nDate,,\n2024-03-07,1,1\n", 1, "'A A' is no ticker"),
        ("date,open,high,low,volume\n2024-03-07,1,1,1,1\n", 1, "no column close or price"),
        ("date,Adj Close\n2024-03-07,1\n", 1, "no column close or price"),
        ("Price,High\nTicker,AAA\nDate,\n2024-03-07,1\n", 1, "no column close or price"),
        ("date,ticker,AAA\n2024-03-07,AAA,1\n", 1, "no column close or price"),
        ("ticker,price\nABC,1\n", 1, "no column timestamp, time, date or datetime"),
        (ROW * 2, 1, "no column timestamp, time, date or datetime"),
        ("", 1, "no column close or price"),
        (LONG, 1, "it has no prices"),
        (f"{LONG}2024-03-08,ABC,\n\n", 2, "it has no prices"),
        (f'{LONG}2024-03-08,"ABC,1\n2024-03-09,ABC,1\n', 2, "a quote is not closed"),
        pytest.param(f'{LONG}2024-03-08,ABC,"{"1" * 140_000}"\n', 2, "field larger", id="a long cell"),
        (f"{LONG}{ROW}".encode() + b"2024-03-08,A\0,1\n", 3, "a byte that is no text"),
        (f"{LONG}{ROW}".encode() + b"2024-03-08,ABC,\xff\n", 3, "a byte that is no text"),
        (f"\n{LONG}".encode("utf-16") + b"\x00\xd8\n\x00", 3, "a byte that is no text"),
        (PLAIN.encode("utf-16") + b"1", 4, "a byte that is no text"),
        (PLAIN.encode("utf-32"), 1, "a byte that is no text"),
    ],
)
def test_a_bad_file_is_refused_with_its_line_and_the_reason(read, tmp_path, content, line, reason):
    with pytest.raises(BadFile, match=rf"line {line}: .*{reason}.*\.$") as refusal:
        read(content)
    assert str(refusal.value).startswith(f"{tmp_path / 'market.csv'}, line ")
    assert str(refusal.value).isprintable()
    assert len(str(refusal.value)) < len(str(tmp_path)) + 180


def test_the_name_of_a_file_without_tickers_must_be_one(read):
    with pytest.raises(BadFile, match=r"daily_IBM\.csv, line 1: 'daily_IBM' is no ticker"):
        read("timestamp,close\n2024-03-07,1\n", "daily_IBM.csv")


def test_the_same_row_twice_is_one_bar(read):
    assert closes(read(LONG + ROW * 2)) == {"ABC": [1.5]}


def test_two_files_of_a_folder_must_agree(tmp_path):
    (tmp_path / "a.csv").write_text(LONG + ROW)
    (tmp_path / "b.csv").write_text("date,ABC,DEF\n2024-03-06,1,1\n2024-03-07,2,2\n")
    with pytest.raises(BadFile, match=r"b\.csv, line 3: ABC has two prices at .*: 1\.5 and 2\."):
        recorded.read(tmp_path)


def test_a_folder_without_files_is_refused_by_its_name(tmp_path):
    with pytest.raises(BadFile, match=f"{tmp_path} has no CSV files"):
        recorded.read(tmp_path)


def test_a_file_that_is_not_there_is_an_error_of_the_system(tmp_path):
    with pytest.raises(FileNotFoundError):
        recorded.read(tmp_path / "none.csv")


# ------------------------------------------------------------------------------ Whatever bytes there are

GOOD = [
    PLAIN.encode(),
    f"{EVENTS}2024-03-07,ABC,9,0.25,\n2024-03-08,ABC,,,3:2\n2024-03-09,ABC,6,0.1,0.333333\n".encode(),
    with_events(yahoo_bars()).to_csv().encode(),
    PLAIN.encode("utf-16"),
    PLAIN.replace(",", ";").replace(".", ",").encode("utf-8-sig"),
    downloaded("AAPL", "IBM").to_csv().encode(),
    downloaded("AAPL", "IBM", group_by="ticker").reset_index().to_csv().encode(),
    b'"date","AAPL","IBM"\r\n"1709769600",1e-5,NaN\r\n',
]
PIECES = [b"", *b', ; \n \r " \0 \xff e - . : date price split'.split(b" "), b"\xef\xbb\xbf", b"9" * 400]


def is_read_or_refused(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    try:
        market = recorded.read(file)
    except BadFile as refusal:
        market, sentence = {}, str(refusal)
        names_the_line = sentence.startswith(f"{file}, line ") and len(sentence.splitlines()) == 1
    assert market or names_the_line
    for ticker, bars in market.items():
        assert ticker == ticker.upper() != ""
        assert [] != bars == sorted(bars)
        assert len({bar.timestamp for bar in bars}) == len(bars)
        for bar in bars:
            assert 0 < bar.low <= min(bar.open, bar.close)
            assert max(bar.open, bar.close) <= bar.high < 10**10
            assert bar.volume >= 0
            assert 0 <= bar.dividend < 10**10
            assert Fraction(1, 10_000) <= bar.split <= 10_000
            assert bar.timestamp.tzinfo is UTC


@MANY
@given(
    st.binary(max_size=200) | st.text(max_size=100).map(lambda text: (LONG + text).encode("utf-8", "ignore"))
)
def test_any_bytes_are_read_or_refused(tmp_path, content):
    is_read_or_refused(tmp_path / "ABC.csv", content)


@MANY
@given(st.integers(0))
def test_good_files_that_were_damaged_are_read_or_refused(tmp_path, seed):
    chance = random.Random(seed)
    content = bytearray(chance.choice(GOOD))
    for _ in range(chance.randint(1, 5)):
        at = chance.randrange(len(content) + 1)
        content[at : at + chance.choice((0, 0, 1, 10))] = chance.choice((*PIECES, chance.randbytes(1)))
    is_read_or_refused(tmp_path / "ABC.csv", bytes(content))
