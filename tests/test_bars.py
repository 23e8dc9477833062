"""Past prices: what a bot warms its indicators up with, on the sample market and on live prices.

`live` is one process on SQLite that asks Yahoo; no test asks for a ticker that another has asked for.
"""

import csv
import itertools
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from types import SimpleNamespace
from urllib.parse import parse_qs, urlsplit

import pytest
from cast import ROOT, Here, Server, exact
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from standins import MarketStandIn

sys.path.insert(0, str(ROOT))

import pricing
from messages import TIMEFRAMES, BarOptions
from models import Account
from recorded import Bar

names = itertools.count(1)


def new_ticker() -> str:
    return f"BAR{next(names)}"


def bars_of(trader, ticker="AAPL", **asked) -> list[dict]:
    response = trader.ask("GET", f"/api/v1/bars/{ticker}", params=asked)
    assert response.status_code == 200, response.text
    return exact(response)["bars"]


def refused(trader, ticker="AAPL", **asked) -> tuple[int, str, str]:
    problem = exact(trader.ask("GET", f"/api/v1/bars/{ticker}", params=asked))
    return problem["status"], problem["code"], problem["detail"]


def times(bars) -> list[str]:
    """When they begin, without seconds."""
    return [bar["timestamp"].removesuffix("Z").removesuffix(":00").removesuffix("T00:00") for bar in bars]


def numbers(bar) -> list[Decimal]:
    return [bar[field] for field in ("open", "high", "low", "close", "volume")]


def decimals(*texts) -> list[Decimal]:
    return [Decimal(text) for text in texts]


def stop_clock(trader, at):
    answer = exact(trader.ask("PUT", "/api/v1/market/clock", json={"at": at}))
    assert "code" not in answer, answer


# --------------------------------------------------------------------------------- The sample market


@pytest.fixture(scope="module")
def closes() -> list[tuple[str, Decimal]]:
    """The recorded days of AAPL: the date and the close."""
    with open(ROOT / "sample_market" / "prices.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["ticker"] == "AAPL"]
    return [(row["timestamp"][:10], Decimal(row["price"])) for row in rows]


@pytest.fixture
def in_june(alice):
    """Alice, whose clock stands on a Wednesday."""
    stop_clock(alice, "2012-06-06T00:00:00Z")
    return alice


def test_a_bot_warms_up_with_one_request(in_june, closes):
    answer = in_june.get("/api/v1/bars/AAPL")
    until_now = [close for close in closes if close[0] <= "2012-06-06"]
    assert (answer["ticker"], answer["timeframe"], len(until_now)) == ("AAPL", "1d", 68)
    assert [(bar["timestamp"][:10], bar["close"]) for bar in answer["bars"]] == until_now
    assert all(numbers(bar) == [bar["close"]] * 4 + [0] for bar in answer["bars"])


def test_a_question_without_a_limit_is_answered_with_the_last_hundred(alice, closes):
    stop_clock(alice, "2013-03-01T00:00:00Z")
    assert [bar["close"] for bar in bars_of(alice)] == [close for _, close in closes[-100:]]
    assert bars_of(alice, limit=1) == bars_of(alice)[-1:]
    assert len(bars_of(alice, limit=10_000)) == len(closes)


def test_no_bar_is_later_than_the_clock(in_june):
    assert times(bars_of(in_june, limit=2)) == ["2012-06-05", "2012-06-06"]
    assert times(bars_of(in_june, start="2012-06-06T00:00:00Z", end="2013-01-01T00:00:00Z")) == ["2012-06-06"]
    assert bars_of(in_june, start="2012-06-06T00:00:01Z") == []
    in_june.ask("POST", "/api/v1/market/advance")
    assert times(bars_of(in_june, limit=2)) == ["2012-06-06", "2012-06-07"]


def test_the_running_clock_shows_the_file_up_to_its_bar(alice):
    before = alice.get("/api/v1/market")["now"]
    last = bars_of(alice, limit=1)[0]["timestamp"]
    after = alice.get("/api/v1/market")["now"]
    assert last in (before, after)


def test_bars_are_recorded_ones_whatever_is_pinned(in_june):
    before = bars_of(in_june)
    in_june.sees("AAPL", at="1")
    assert in_june.get("/api/v1/price/AAPL")["price"] == 1
    assert bars_of(in_june) == before


def test_a_start_counts_and_an_end_does_not(in_june):
    first, last = "2012-05-31T00:00:00Z", "2012-06-04T02:00:00+02:00"
    assert times(bars_of(in_june, start=first, end=last)) == ["2012-05-31", "2012-06-01"]
    assert times(bars_of(in_june, start=first, end=last, limit=1)) == ["2012-06-01"]
    assert times(bars_of(in_june, end="2012-06-04T00:00:01Z", limit=1)) == ["2012-06-04"]
    assert bars_of(in_june, start=last, end=first) == bars_of(in_june, start=first, end=first) == []


def test_weeks_begin_on_monday_and_the_one_under_way_has_what_was_seen(in_june, closes):
    whole, under_way = bars_of(in_june, timeframe="1w", limit=2)
    assert times([whole, under_way]) == ["2012-05-28", "2012-06-04"]
    for bar, days in ((whole, ("2012-05-28", "2012-06-03")), (under_way, ("2012-06-04", "2012-06-06"))):
        seen = [close for day, close in closes if days[0] <= day <= days[1]]
        assert numbers(bar) == [seen[0], max(seen), min(seen), seen[-1], 0]
    assert times(bars_of(in_june, timeframe="1w", start="2012-06-04T00:00:00Z")) == ["2012-06-04"]
    assert bars_of(in_june, timeframe="1w", start="2012-06-05T00:00:00Z") == []
    assert times(bars_of(in_june, timeframe="1w", end="2012-06-06T00:00:00Z", limit=1)) == ["2012-06-04"]


def test_a_timeframe_counts_in_any_case(in_june):
    answer = in_june.get("/api/v1/bars/aapl", timeframe="1W")
    assert (answer["ticker"], answer["timeframe"]) == ("AAPL", "1w")


@pytest.mark.parametrize("timeframe", ["1m", "5m", "15m", "1h"])
def test_what_is_finer_than_the_file_is_refused_with_what_there_is(in_june, timeframe):
    status, code, sentence = refused(in_june, timeframe=timeframe)
    assert (status, code) == (400, "invalid_request")
    assert sentence == "timeframe: must not be finer than AAPL is recorded; there are: 1d, 1w."


WRONG = [
    ("limit", "0"), ("limit", "10001"), ("limit", "-1"), ("limit", "1.5"), ("limit", "many"), ("limit", ""),
    ("limit", "9" * 1000), ("limit", "１"), ("timeframe", "2d"), ("timeframe", ""), ("timeframe", "day"),
    ("timeframe", "1d "), ("start", "2012-06-01"), ("start", "yesterday"), ("start", "0"),
    ("end", "2012-06-31T00:00:00Z"), ("end", "0001-01-01T00:00:00+14:00"), ("page", "1"),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), WRONG, ids=lambda text: text[:20])
def test_a_wrong_question_is_refused_with_the_field_that_is_wrong(alice, field, value):
    status, code, sentence = refused(alice, **{field: value})
    assert (status, code, sentence.split(":")[0]) == (400, "invalid_request", field)


def test_a_field_that_comes_twice_is_refused(alice):
    assert refused(alice, limit=[1, 2])[:2] == (400, "invalid_request")


@pytest.mark.parametrize("start", ["0001-01-01T00:00:00Z", "9999-12-31T23:59:59.999999Z"])
@pytest.mark.parametrize("end", ["0001-01-01T00:00:00Z", "9999-12-31T23:59:59.999999Z"])
@pytest.mark.parametrize("timeframe", ["1d", "1w"])
def test_the_ends_of_time_are_times(in_june, start, end, timeframe):
    all_asked = start < "2" < end
    assert bool(bars_of(in_june, start=start, end=end, timeframe=timeframe)) == all_asked


def test_a_ticker_that_there_is_not_is_unknown(alice):
    assert refused(alice, "NOPE")[:2] == (404, "unknown_ticker")
    for ticker in ("!", "A" * 21, "A B"):
        assert refused(alice, ticker)[:2] == (400, "invalid_request")


# A file of one's own


@pytest.fixture
def replayed(new_database, tmp_path):
    """A trader on a server that replays files with this content, by name; the clock stands at the end."""

    @contextmanager
    def replaying(**files: str):
        for name, content in files.items():
            (tmp_path / f"{name}.csv").write_text(content)
        with Here(new_database().migrate().url, SAMPLE_MARKET=tmp_path) as server:
            alice = server.trader()
            stop_clock(alice, alice.get("/api/v1/market")["last_bar"])
            yield alice

    return replaying


def rows(first: str, step: timedelta, count: int) -> str:
    """A file of one ticker: the close counts 1, 2, 3, and the rest is around it."""
    begins = datetime.fromisoformat(first)
    lines = [
        f"{(begins + step * n).isoformat()},{n + 1}.25,{n + 2},{n + 0.5},{n + 1},{n}" for n in range(count)
    ]
    return "\n".join(["date,open,high,low,close,volume", *lines])


@pytest.mark.parametrize("engine_name", ["sqlite"], indirect=True, scope="session")
def test_files_of_ones_own_have_the_bars_that_can_be_put_together_from_theirs(replayed):
    files = {
        "MINUTES": rows("2024-03-08T14:30:00Z", timedelta(minutes=1), 40),
        "SEVENS": rows("2024-03-08T14:30:00Z", timedelta(minutes=7), 3),
        "HOURS": rows("2024-03-07T14:30:00Z", timedelta(hours=1), 3),
        "ONE": rows("2024-03-08T09:00:00Z", timedelta(days=1), 1),
        "NEWYORK": rows("2024-03-06T05:00:00Z", timedelta(days=1), 3),
        "MONTHS": rows("2024-01-01T00:00:00Z", timedelta(days=31), 3),
        "BRK.B": rows("2024-03-07", timedelta(days=1), 2),
        "pair": "timestamp,ticker,price\n2024-03-07,BTC/USD,1.50000000\n",
        "LATER": rows("2024-03-08T14:45:00Z", timedelta(minutes=1), 40),
    }
    with replayed(**files) as alice:
        stop_clock(alice, "2024-03-08T14:44:00Z")

        last_but_one, under_way = bars_of(alice, "MINUTES", timeframe="5m", limit=2)
        assert times([last_but_one, under_way]) == ["2024-03-08T14:35", "2024-03-08T14:40"]
        assert numbers(under_way) == decimals("11.25", 16, "10.5", 15, 10 + 11 + 12 + 13 + 14)
        assert numbers(last_but_one) == decimals("6.25", 11, "5.5", 10, 5 + 6 + 7 + 8 + 9)
        assert len(bars_of(alice, "MINUTES", timeframe="1m")) == 15
        assert times(bars_of(alice, "MINUTES", timeframe="1h")) == ["2024-03-08T14:00"]

        assert "there are: 15m, 1h, 1d, 1w." in refused(alice, "SEVENS", timeframe="5m")[2]
        assert times(bars_of(alice, "SEVENS", timeframe="15m")) == ["2024-03-08T14:30"]

        # The hours of an exchange begin where they do, and its days at midnight.
        assert times(bars_of(alice, "HOURS", timeframe="1h"))[:2] == ["2024-03-07T14:30", "2024-03-07T15:30"]
        assert times(bars_of(alice, "NEWYORK")) == ["2024-03-06", "2024-03-07", "2024-03-08"]

        assert "there are: 1d, 1w." in refused(alice, "ONE", timeframe="1h")[2]
        assert times(bars_of(alice, "ONE")) == ["2024-03-08"]
        assert "there are: none." in refused(alice, "MONTHS", timeframe="1w")[2]

        for written in ("BRK.B", "brk/b", "BRK-B", "brk%2Fb"):
            assert alice.get(f"/api/v1/bars/{written}")["ticker"] == "BRK-B"
            assert len(bars_of(alice, written)) == 2
        answer = alice.ask("GET", "/api/v1/bars/btc/usd").text
        assert answer == (
            '{"ticker":"BTC-USD","timeframe":"1d","bars":[{"timestamp":"2024-03-07T00:00:00Z",'
            '"open":1.5,"high":1.5,"low":1.5,"close":1.5,"volume":0}]}\n'
        )

        assert bars_of(alice, "LATER", timeframe="1m") == []
        stop_clock(alice, "2024-03-08T14:45:00Z")
        assert times(bars_of(alice, "LATER", timeframe="1m")) == ["2024-03-08T14:45"]


def begin_of(moment: datetime, timeframe: str) -> datetime:
    """Where the bar begins in which `moment` is, by the calendar."""
    if timeframe.endswith("m"):
        return moment.replace(minute=moment.minute // int(timeframe[:-1]) * int(timeframe[:-1]), second=0)
    begin = moment.replace(minute=0, second=0)
    begin = begin if timeframe == "1h" else begin.replace(hour=0)
    return begin - timedelta(days=begin.weekday()) if timeframe == "1w" else begin


FIRST = datetime(2024, 2, 26, 22, 7, tzinfo=UTC)
PRICES = st.integers(1, 10**12).map(lambda digits: Decimal(digits).scaleb(-8))
moments = st.integers(0, 20_000).map(lambda minutes: FIRST + timedelta(minutes=minutes))


@st.composite
def market_and_question(draw):
    series = []
    for begins in sorted(draw(st.sets(moments, min_size=1, max_size=60))):
        low, open, close, high = sorted(draw(st.lists(PRICES, min_size=4, max_size=4)))
        series.append(Bar(begins, *draw(st.permutations([open, close]))[:1], high, low, close, draw(PRICES)))
    asked = {"timeframe": draw(st.sampled_from(list(TIMEFRAMES))), "limit": Decimal(draw(st.integers(1, 9)))}
    for side in ("start", "end"):
        if draw(st.booleans()):
            asked[side] = draw(moments).isoformat()
    return series, asked, draw(moments)


@settings(max_examples=500, suppress_health_check=list(HealthCheck))
@given(market_and_question())
def test_random_bars_are_put_together_as_by_the_calendar(tmp_path, generated):
    series, asked, clock = generated
    file = tmp_path / "ABC.csv"
    fields = "timestamp,open,high,low,close,volume"
    file.write_text("\n".join([fields, *(",".join(map(str, bar.to_dict().values())) for bar in series)]))
    market = pricing.SampleMarket(file)
    clock = max(clock, series[0].timestamp)
    account = Account(market_clock=clock)

    spacing = [later.timestamp - bar.timestamp for bar, later in itertools.pairwise(series)]
    own, step = min(spacing, default=timedelta(days=1)), TIMEFRAMES[asked["timeframe"]]
    question = BarOptions(**asked)
    if step < own:
        with pytest.raises(pricing.Refused, match="must not be finer than ABC is recorded"):
            market.past_bars("ABC", question, account)
        return
    groups = defaultdict(list)
    for bar in series:
        if bar.timestamp <= clock:
            as_recorded = step == own < timedelta(days=1)
            begin = bar.timestamp if as_recorded else begin_of(bar.timestamp, asked["timeframe"])
            groups[begin].append(bar)
    expected = [
        Bar(
            begin,
            group[0].open,
            max(bar.high for bar in group),
            min(bar.low for bar in group),
            group[-1].close,
            sum(bar.volume for bar in group),
        )
        for begin, group in groups.items()
        if asked.get("start", "") <= begin.isoformat() < asked.get("end", "3")
    ]
    assert market.past_bars("ABC", question, account) == expected[-question.limit :]


class Counted(list):
    """Knows how many of its things were looked at."""

    seen = 0

    def __getitem__(self, place):
        found = super().__getitem__(place)
        self.seen += len(found) if isinstance(place, slice) else 1
        return found

    def __iter__(self):
        pytest.fail("It looks at all.")


@pytest.mark.parametrize("asked", [{}, {"end": "2024-01-10T00:00:00Z"}, {"start": "2024-03-08T00:00:00Z"}])
def test_a_short_question_looks_at_a_few_of_many_bars(asked):
    begins = datetime(2024, 1, 1, tzinfo=UTC)
    bars = Counted(Bar(begins + timedelta(minutes=n), *[Decimal(n)] * 5) for n in range(100_000))
    question = BarOptions(timeframe="1m", limit=Decimal(10), **asked)
    found = pricing.last_bars(bars, timedelta(minutes=1), begins + timedelta(days=68), question)
    assert len(found) == 10
    assert 10 < bars.seen < 400


# ----------------------------------------------------------------------------------- The live market


@pytest.fixture(scope="module")
def stand_in():
    with MarketStandIn() as market:
        yield market


@pytest.fixture
def market(stand_in):
    """Yahoo, who knows no ticker yet."""
    stand_in.reset()
    return stand_in


@pytest.fixture(scope="module")
def serving(program, stand_in, new_database_on):
    """Makes servers of the copied program, which find the stand-in where they look for Yahoo."""

    def new(**settings) -> Server:
        of_the_copy = {"GUNICORN_CMD_ARGS": f"--chdir {program}", "PRICE_SOURCES": "yahoo"}
        url = new_database_on("sqlite").migrate().url
        return Server(url, workers=1, threads=20, **stand_in.environment | of_the_copy | settings)

    return new


@pytest.fixture(scope="module")
def live(serving):
    with serving() as server:
        yield server


@pytest.fixture
def bot(live, market):
    """A trader for whom Yahoo has just answered, so that it is not about to rest."""
    bot, ticker = live.trader(name="bot"), new_ticker()
    market.yahoo(ticker, "1")
    assert bot.ask("GET", f"/api/v1/price/{ticker}").status_code == 200
    market.clear()
    return bot


NOW = datetime.now(UTC).replace(second=0, microsecond=0)
TODAY = NOW.replace(hour=0, minute=0)
AN_HOUR_AGO = NOW - timedelta(hours=1)
ROW = (1.37000000476837, 190.5, 1.25, 189.83999633789062, 700)


def known(market, interval="1d", *rows, **more) -> str:
    """A ticker that Yahoo knows, with these bars."""
    ticker = new_ticker()
    market.yahoo(ticker)
    market.bars(ticker, interval, *rows, **more)
    return ticker


@pytest.mark.parametrize("timeframe", ["1m", "5m", "15m", "1h"])
def test_live_bars_are_yahoos_in_one_request_without_the_noise_of_floats(bot, market, timeframe):
    step = TIMEFRAMES[timeframe]
    ticker = known(market, timeframe, *((AN_HOUR_AGO - step * n, *ROW) for n in (2, 1, 0)))
    answer = bot.get(f"/api/v1/bars/{ticker.lower()}", timeframe=timeframe)
    assert (answer["ticker"], answer["timeframe"], len(answer["bars"])) == (ticker, timeframe, 3)
    assert [datetime.fromisoformat(bar["timestamp"]) for bar in answer["bars"]] == [
        AN_HOUR_AGO - step * n for n in (2, 1, 0)
    ]
    assert numbers(answer["bars"][0]) == decimals("1.37", "190.5", "1.25", "189.84", 700)
    ((_, path),) = market.requests
    assert parse_qs(urlsplit(path).query)["interval"] == [timeframe]


def test_bars_are_held_like_quotes_for_all_questions_that_reach_as_far_back(bot, market):
    days = [TODAY - timedelta(days=n) for n in (4, 3, 2, 1)]
    ticker = known(market, "1d", *((day, *ROW) for day in days), zone="UTC")
    written = [f"{day:%Y-%m-%d}" for day in days]
    assert times(bars_of(bot, ticker)) == written
    assert times(bars_of(bot, ticker, limit=90, start="2000-01-01T00:00:00Z")) == written
    assert times(bars_of(bot, ticker, limit=95, end=f"{written[1]}T00:00:01Z")) == written[:2]
    assert times(bars_of(bot, ticker, timeframe="1W", limit=10, end="9999-12-31T23:59:59Z"))
    assert market.count(ticker) == 1
    assert (
        times(bars_of(bot, ticker, start=f"{written[1]}T00:00:00Z", end=f"{written[3]}T00:00:00Z"))
        == (written[1:3])
    )
    assert market.count(ticker) == 2  # It reaches back a few days alone, and so is asked for as such.


def test_a_hundred_bots_that_ask_at_once_cause_one_request(bot, market):
    ticker = known(market, "1d", (TODAY, *ROW), zone="UTC")
    market.yahoo(ticker, delay=0.5)
    with ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(lambda _: bars_of(bot, ticker), range(10)))
    assert [len(answer) for answer in answers] == [1] * 10
    assert market.count(ticker) == 1


def test_a_day_is_the_exchanges_own_and_none_begins_after_now(bot, market):
    midnight_in_tokyo = datetime(2024, 3, 7, 15, tzinfo=UTC)
    tokyo = known(market, "1d", (midnight_in_tokyo, *ROW), zone="Asia/Tokyo")
    assert times(bars_of(bot, tokyo, limit=1000)) == ["2024-03-08"]
    new_york = known(market, "1d", (datetime(2024, 3, 8, 14, 30, tzinfo=UTC), *ROW))
    assert times(bars_of(bot, new_york, limit=1000)) == ["2024-03-08"]
    ahead = TODAY + timedelta(days=1)
    early = known(market, "1d", (TODAY, *ROW), (ahead, *ROW), zone="UTC")
    assert times(bars_of(bot, early)) == [f"{TODAY:%Y-%m-%d}"]
    early = known(market, "1m", (AN_HOUR_AGO, *ROW), (ahead, *ROW))
    assert len(bars_of(bot, early, timeframe="1m")) == 1


def test_rows_without_a_price_are_left_out_and_prices_that_are_missing_are_the_close(bot, market):
    day = timedelta(days=1)
    rows = [
        (TODAY - 9 * day, None, None, None, None, None),
        (TODAY - 8 * day, None, None, None, 5, None),
        (TODAY - 7 * day, 1, 2, 3, 0, 4),
        (TODAY - 6 * day, 1, 1, 1, 2, -4),  # Its high is below its close.
        (TODAY - 5 * day, "x", [], {}, True, 1),
        (TODAY - 4 * day, 1, 1, 1, 1e300, 1),
        (TODAY - 3 * day, 1, 1, 1, 1, 1),
        (TODAY - 3 * day + timedelta(hours=9), 2, 2, 2, 2, 2),  # Of one day the last counts.
    ]
    bars = bars_of(bot, known(market, "1d", *rows, zone="UTC"))
    assert times(bars) == [f"{TODAY - n * day:%Y-%m-%d}" for n in (8, 6, 3)]
    assert [numbers(bar) for bar in bars] == [[5, 5, 5, 5, 0], [1, 2, 1, 2, 0], [2] * 5]


def test_the_price_of_now_is_no_bar(bot, market):
    rows = [(AN_HOUR_AGO, *ROW), (AN_HOUR_AGO + timedelta(seconds=17), 9, 9, 9, 9, 0)]
    assert len(bars_of(bot, known(market, "5m", *rows), timeframe="5m")) == 1


def test_live_weeks_are_put_together_from_days(bot, market):
    days = [(datetime(2024, 3, n, 14, 30, tzinfo=UTC), n, n + 2, n - 1, n + 1, 10) for n in (7, 8, 11, 12)]
    ticker = known(market, "1d", *days)
    bars = bars_of(bot, ticker, timeframe="1w", limit=1000)
    assert times(bars) == ["2024-03-04", "2024-03-11"]
    assert [numbers(bar) for bar in bars] == [[7, 10, 6, 9, 20], [11, 14, 10, 13, 20]]
    assert times(bars_of(bot, ticker, timeframe="1w", limit=1000, start="2024-03-11T00:00:00Z")) == [
        "2024-03-11"
    ]


@pytest.mark.parametrize("timeframe", TIMEFRAMES)
@pytest.mark.parametrize(
    "asked",
    [
        {"limit": 10_000},
        {"start": "0001-01-01T00:00:00Z", "limit": 10_000},
        {"end": "0001-01-01T00:00:00Z"},
        {"start": "9999-12-31T23:59:59Z"},
        {"end": "9999-12-31T23:59:59Z"},
    ],
)
def test_however_far_a_question_reaches_yahoo_is_asked_for_what_it_has(bot, market, timeframe, asked):
    """The stand-in refuses what Yahoo refuses: minutes of more than eight days, say."""
    days = timeframe in ("1d", "1w")
    ticker = known(market, "1d" if days else timeframe, (AN_HOUR_AGO, *ROW), zone="UTC")
    nothing = {"0001-01-01T00:00:00Z"} & {asked.get("end")} or {"9999-12-31T23:59:59Z"} & {asked.get("start")}
    assert len(bars_of(bot, ticker, timeframe=timeframe, **asked)) == (0 if nothing else 1)


@pytest.mark.parametrize(("timeframe", "days"), [("1m", 1), ("15m", 5), ("1h", 20), ("1d", 140), ("1w", 690)])
def test_so_far_back_is_asked_that_a_hundred_bars_of_a_share_are_found(bot, market, timeframe, days):
    """A share that trades for six and a half hours, on five days a week."""
    ticker = known(market, "1d" if timeframe in ("1d", "1w") else timeframe)
    bars_of(bot, ticker, timeframe=timeframe)
    ((_, path),) = market.requests
    asked = parse_qs(urlsplit(path).query)
    assert int(asked["period2"][0]) - int(asked["period1"][0]) >= days * 86_400


def test_the_last_bar_before_a_day_long_ago_is_found(bot, market):
    days = [datetime(2010, 3, day, 14, 30, tzinfo=UTC) for day in (4, 5)]
    ticker = known(market, "1d", *((day, *ROW) for day in days))
    assert times(bars_of(bot, ticker, end="2010-03-06T00:00:00Z", limit=1)) == ["2010-03-05"]


def test_a_ticker_without_any_row_has_no_bars(bot, market):
    assert bars_of(bot, known(market)) == []


def test_bars_in_another_currency_are_shown(bot, market):
    ticker = known(market, "1d", (TODAY, *ROW), zone="UTC")
    market.yahoo(ticker, currency="EUR")
    assert len(bars_of(bot, ticker)) == 1


def test_a_ticker_that_yahoo_does_not_know_is_unknown_and_that_is_remembered(bot, market):
    ticker = new_ticker()
    assert refused(bot, ticker)[:2] == (404, "unknown_ticker")
    asked = market.count(ticker)  # yfinance tries another cookie.
    assert refused(bot, ticker)[:2] == (404, "unknown_ticker")
    assert market.count(ticker) == asked


STRANGE = {
    "no JSON": "<html>",
    "no chart": "{}",
    "a list": "[]",
    "no meta": '{"chart": {"result": [{"timestamp": [1], "indicators": {"quote": [{"close": [1]}]}}]}}',
    "no indicators": '{"chart": {"result": [{"meta": {}, "timestamp": [1]}]}}',
    "a number for times": '{"chart": {"result": [{"meta": {}, "timestamp": 7,'
    ' "indicators": {"quote": [{}]}}]}}',
    "no such time": '{"chart": {"result": [{"meta": {}, "timestamp": [1e300],'
    ' "indicators": {"quote": [{"close": [1]}]}}]}}',
    "no time": '{"chart": {"result": [{"meta": {}, "timestamp": [null],'
    ' "indicators": {"quote": [{"close": [1]}]}}]}}',
    "not a number": '{"chart": {"result": [{"meta": {}, "timestamp": [NaN],'
    ' "indicators": {"quote": [{"close": [1]}]}}]}}',
    "a word for rows": '{"chart": {"result": [{"meta": {}, "timestamp": [1], "indicators": "x"}]}}',
}


@pytest.mark.parametrize("body", STRANGE.values(), ids=STRANGE)
def test_a_strange_answer_is_no_bars_and_that_tickers_own(bot, live, market, body):
    bad = [new_ticker() for _ in range(4)]
    for ticker in bad:
        market.yahoo(ticker, body=body)
        response = bot.ask("GET", f"/api/v1/bars/{ticker}")
        assert (response.status_code, exact(response)["code"]) == (503, "price_unavailable")
        assert 50 < int(response.headers["Retry-After"]) <= 60
    assert bars_of(bot, known(market, "1d", (TODAY, *ROW), zone="UTC"))
    assert "Traceback" not in live.log()


def test_a_yahoo_that_asks_to_slow_down_rests_for_bars_and_for_prices(serving, market):
    with serving() as server:
        alice, ticker, other = server.trader(), new_ticker(), known(market)
        market.yahoo(ticker, status=429)
        response = alice.ask("GET", f"/api/v1/bars/{ticker}")
        assert (response.status_code, exact(response)["code"]) == (503, "price_unavailable")
        assert 0 < int(response.headers["Retry-After"]) <= 15
        market.clear()
        assert refused(alice, other)[:2] == (503, "price_unavailable")
        assert alice.ask("GET", f"/api/v1/price/{other}").status_code == 503
        assert market.requests == []


def test_a_yahoo_that_hangs_holds_nobody_up_for_long(bot, market):
    ticker = new_ticker()
    market.yahoo(ticker, hang=True)
    assert refused(bot, ticker)[:2] == (503, "price_unavailable")
    assert bars_of(bot, known(market, "1d", (TODAY, *ROW), zone="UTC"))


def test_without_yahoo_there_are_no_bars(serving, market):
    with serving(PRICE_SOURCES="alphavantage", ALPHAVANTAGE_API_KEY="a-key") as server:
        status, code, sentence = refused(server.trader())
    assert (status, code) == (503, "price_unavailable")
    assert "PRICE_SOURCES" in sentence
    assert market.requests == []


def test_the_bars_that_a_process_holds_have_an_end(monkeypatch):
    """A market in memory, whose Yahoo has ten bars of each ticker."""
    yahoo = pricing.Yahoo("")
    begin = datetime(2024, 3, 8, tzinfo=UTC)
    days = [Bar(begin + timedelta(days=n), *decimals(1, 1, 1, 1, 0)) for n in range(10)]
    monkeypatch.setattr(yahoo, "bars", lambda ticker, *_: [] if ticker.startswith("EMPTY") else days)
    monkeypatch.setattr(pricing, "BARS_HELD", 35)
    market = pricing.LiveMarket(SimpleNamespace(), [yahoo], 180, 7)
    for ticker in ("A", "B", "C", "EMPTY1", "EMPTY2", "EMPTY3"):
        market.past_bars(ticker, BarOptions())
    assert [ticker for ticker, *_ in market.held_bars] == ["B", "C", "EMPTY1", "EMPTY2", "EMPTY3"]
