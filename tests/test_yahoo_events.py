"""The splits and dividends that Yahoo's chart has: exact, of their own day, and nothing that cannot be."""

import json
import sys
import time
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))

from pricing import candles, events_of, parsed

DAY = datetime(2024, 5, 10, 13, 30, tzinfo=UTC)


def seconds(day: int) -> int:
    return int((DAY + timedelta(days=day)).timestamp())


def split(day: int, numerator=10.0, denominator=1.0) -> dict:
    return {"date": seconds(day), "numerator": numerator, "denominator": denominator}


def dividend(day: int, amount=0.25) -> dict:
    return {"date": seconds(day), "amount": amount}


def said(splits=(), dividends=()) -> str:
    """Yahoo's chart with these events, each under the text of its date."""
    events = {"splits": splits, "dividends": dividends}
    listed = {kind: {str(number): event for number, event in enumerate(of)} for kind, of in events.items()}
    return json.dumps({"meta": {}, "events": listed})


def found(chart: str):
    """The splits and dividends in it, by the days since `DAY`."""
    splits, dividends = events_of("ABC", parsed(chart))
    assert all(moment.tzinfo is UTC for moment, _ in (*splits, *dividends))
    return [[((moment - DAY).days, what) for moment, what in of] for of in (splits, dividends)]


def test_events_come_in_their_order_with_exact_ratios_and_dollars():
    splits = [split(9, 1.0, 8.0), split(0), split(4, 3.0, 2.0)]
    chart = said(splits, [dividend(11), dividend(10, 0.094643)])
    assert found(chart) == [
        [(0, Fraction(10)), (4, Fraction(3, 2)), (9, Fraction(1, 8))],
        [(10, Decimal("0.094643")), (11, Decimal("0.25"))],
    ]


def test_a_dividend_is_what_a_share_of_its_day_was_paid():
    """On the day of a split it is not adjusted for that one; 1/3 is rounded to 8 decimals in the end."""
    splits = [split(4, 3.0, 2.0), split(9, 10.0, 9.0)]
    dividends = [dividend(3), dividend(4), dividend(9), dividend(10)]
    expected = ["0.41666667", "0.27777778", "0.25", "0.25"]
    assert [str(amount) for _, amount in found(said(splits, dividends))[1]] == [
        text.ljust(10, "0") for text in expected
    ]


def test_dividends_of_long_ago_are_known():
    chart = said(dividends=[{"date": -252_322_200, "amount": 0.001}])  # In 1962.
    assert events_of("KO", parsed(chart))[1] == [(datetime(1962, 1, 2, 14, 30, tzinfo=UTC), Decimal("0.001"))]


def test_of_two_of_one_moment_the_last_counts():
    chart = said([split(0), split(0, 2.0)], [dividend(1), dividend(1, 0.5)])
    assert found(chart) == [[(0, 2)], [(1, Decimal("0.5"))]]


def test_a_dividend_that_is_paid_in_another_currency_is_left_out_and_logged(caplog):
    """Yahoo names it where it is not that of the price: of an American share of a Japanese company, say."""
    paid = [dividend(n) | {"currency": currency} for n, currency in enumerate(["USD", "", None, "JPY"])]
    chart = json.loads(said(dividends=paid)) | {"meta": {"currency": "USD"}}
    assert [day for day, _ in found(json.dumps(chart))[1]] == [0, 1, 2]
    assert "left out 1 dividends of ABC: it is paid in another currency" in caplog.text


@pytest.mark.parametrize("events", ["{}", "null", '{"splits": {}}', '{"dividends": null}'])
def test_a_chart_without_events_has_none_and_nobody_is_told(caplog, events):
    assert events_of("ABC", parsed(f'{{"events": {events}}}')) == ([], [])
    assert events_of("ABC", {}) == ([], [])
    assert not caplog.records


GOOD = [[(0, Fraction(10))], [(1, Decimal("0.25"))]]
RATIO = "left out 1 splits of ABC: its ratio is not from 1:10000 to 10000:1, or 1:1"
PAID = "left out 1 dividends of ABC: what it pays is not above 0 and below 10000000000, to 8 decimals"
DATE = "its date is no time, or yet to come"


@pytest.mark.parametrize(
    ("splits", "dividends", "says"),
    [
        ([split(2, 0)], [], RATIO),
        ([split(2, -10.0)], [], RATIO),
        ([split(2, -10.0, -1.0)], [], RATIO),
        ([split(2, 1e9)], [], RATIO),
        ([split(2, 1, 1e9)], [], RATIO),
        ([split(2, 1, 1e-300)], [], RATIO),
        ([split(2, 10001)], [], RATIO),
        ([split(2, 1, 0)], [], RATIO),
        ([split(2, 4.0, 4.0)], [], RATIO),
        ([split(2, 1e13, 1e13 - 1)], [], RATIO),
        ([split(2, float("nan"))], [], "splits of ABC: it has no numerator, or one that is no number"),
        ([split(2, 10, float("inf"))], [], "splits of ABC: it has no denominator, or one that is no number"),
        ([split(2, "10")], [], "it has no numerator"),
        ([split(2, True)], [], "it has no numerator"),
        ([split(2, [10])], [], "it has no numerator"),
        ([{"date": seconds(2), "splitRatio": "10:1"}], [], "it has no numerator"),
        ([{"numerator": 10, "denominator": 1}], [], "splits of ABC: it has no date"),
        ([{**split(2), "date": str(seconds(2))}], [], "it has no date"),
        (["10:1"], [], "it has no numerator"),
        ([None], [], "it has no numerator"),
        ([{**split(2), "date": -1e300}], [], DATE),
        ([{**split(2), "date": int(time.time()) + 86_400}], [], DATE),
        ([], [{**dividend(2), "date": int(time.time()) + 86_400}], DATE),
        ([], [{**dividend(2), "date": 1e300}], DATE),
        ([], [dividend(2, 0)], PAID),
        ([], [dividend(2, -0.25)], PAID),
        ([], [dividend(2, 1e10)], PAID),
        ([], [dividend(2, 1e-9)], PAID),
        ([], [dividend(-1, 2e9)], PAID),  # Ten times as much before the split.
        ([], [dividend(2, "0.25")], "dividends of ABC: it has no amount, or one that is no number"),
        ([], [{"date": seconds(2)}], "it has no amount"),
    ],
)
def test_what_cannot_be_is_left_out_and_logged_once_and_the_rest_counts(caplog, splits, dividends, says):
    assert found(said([*splits, split(0)], [*dividends, dividend(1)])) == GOOD
    (line,) = caplog.messages
    assert line.startswith("yahoo_finance: left out 1 ")
    assert says in line
    assert caplog.records[0].levelname == "WARNING"


@pytest.mark.parametrize(
    "events", ["[1]", '"x"', "7", "true", '{"splits": [1]}', '{"splits": {}, "dividends": "x"}']
)
def test_what_is_no_events_at_all_is_left_out_whole(caplog, events):
    assert events_of("ABC", parsed(f'{{"events": {events}}}')) == ([], [])
    assert caplog.messages == ["yahoo_finance: left out 1 events of ABC: they are no events"]


@pytest.mark.parametrize("chart", [[], "x", None, 7])
def test_no_chart_at_all_has_no_events(chart):
    assert events_of("ABC", chart) == ([], [])


def test_many_that_cannot_be_are_one_line(caplog):
    assert found(said([split(day, 0) for day in range(50)] + [split(0)], [dividend(1)])) == GOOD
    assert len(caplog.messages) == 1
    assert "left out 50 splits" in caplog.messages[0]


def test_more_splits_than_can_be_are_believed_in_nothing(caplog):
    """Nor are the dividends: nobody knows what they are adjusted for."""
    assert found(said([split(day, 3.0, 2.0) for day in range(-101, 0)], [dividend(1)])) == [[], []]
    assert caplog.messages == ["yahoo_finance: left out 1 events of ABC: no share has had so many splits"]


@pytest.mark.parametrize(("time", "offset", "rows"), [("1e400000", "0", None), ("0", "1e400000", 1)])
def test_a_time_of_a_million_digits_is_not_written_out(time, offset, rows):
    """As an integer it would take minutes."""
    chart = f'{{"timestamp": [{time}], "meta": {{"gmtoffset": {offset}}}'
    chart = parsed(chart + ', "indicators": {"quote": [{"close": [1.5]}]}}')
    if rows:
        assert len(list(candles(chart))) == rows
    else:
        with pytest.raises(ValueError, match="its time is none"):
            list(candles(chart))


def test_a_number_of_a_billion_digits_is_no_ratio():
    chart = said([split(0)], [dividend(1)]).replace('"numerator": 10.0', '"numerator": 1e-999999999')
    assert found(chart) == [[], [(1, Decimal("0.25"))]]
    chart = said([split(0)], [dividend(1)]).replace('"denominator": 1.0', f'"denominator": 1.{"0" * 99_999}1')
    assert found(chart) == GOOD
