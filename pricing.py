"""What the market asks: live prices from Yahoo Finance and Alpha Vantage, or the recorded sample.

Both kinds of market answer `look_up(ticker, account)` with a `Quote`, or with a `Refused` that says
`unknown_ticker` (a source said that there is no such thing), `unsupported_price` (it is too small for the
books) or `price_unavailable` (nobody answered). These are never mixed up: a bot gives up on the first and
tries again on the last. Read `LiveMarket` first, then the sources that it asks, then `SampleMarket`.
"""

import json
import logging
import re
import threading
import time
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from contextvars import copy_context
from datetime import UTC, date, datetime, timedelta, timezone, tzinfo
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from functools import cached_property, lru_cache
from itertools import accumulate, pairwise, takewhile
from math import ceil, prod
from operator import attrgetter, itemgetter, mul
from pathlib import Path
from urllib.parse import quote as escaped
from zoneinfo import ZoneInfo

import requests
import sqlalchemy as sa
from urllib3.exceptions import HTTPError

from corporate import ACTIONS, CorporateAction, ratio_from, times
from database import snapshot
from messages import (
    ORDER_LIMIT,
    SHARE_CLASS,
    TIMEFRAMES,
    UNIT,
    BarOptions,
    MarketAnswer,
    Refused,
    checked_decimal,
    invalid,
    now,
    rounded,
)
from models import Account, Quote, Trade, bad_price
from orders import Passed, PlacedOrder, Tick
from recorded import EPOCH, FIELDS, ONE, TERM_LIMIT, VOLUME_LIMIT, ZERO, Bar, is_ratio, read
from results import Past, Step

log = logging.getLogger(__name__)

REQUEST_SECONDS = 2
"""One HTTP request to a source takes no longer; a cookie or crumb, which Yahoo wants first, half of it."""

QUESTION_SECONDS = 8
"""Nobody waits longer for a price, whatever hangs."""

PAUSE_SECONDS = 15
"""A source that failed for `FAILURES_TO_PAUSE` tickers in a row, or asked us to slow down, rests."""

FAILURES_TO_PAUSE = 3

LATE = timedelta(days=30)
"""So late a split or a dividend may come to Yahoo and is booked all the same."""

BAD_SECONDS = 60
"""How long it is remembered that a ticker is unknown or its price bad: asking Yahoo can cost 13 requests."""

CACHE_SIZE = 5_000
"""Tickers in the cache of one process."""

BARS_HELD = 100_000
"""Past bars in the memory of one process: about 70 MB."""

ANSWER_BYTES = 4_000_000
"""A longer answer is no price. Past bars take 100 bytes each, and Yahoo has 25,000 days of some."""

COIN = r"([A-Z0-9]+)-([A-Z]{3})"
"""A coin and the currency that it is priced in."""

NEW_YORK = ZoneInfo("America/New_York")


class SourceFailed(Exception):
    """A source gave no price; the text says why, in words that are safe to show (no URL, no key)."""

    retry_after = 1
    """In so many seconds it may answer."""


class RateLimited(SourceFailed):
    """A source asked us to slow down."""


class BadAnswer(SourceFailed):
    """A source is there, and what it says of this ticker is no price."""

    code = "price_unavailable"
    retry_after = BAD_SECONDS


class TooSmall(BadAnswer):
    """A price that is nothing once it is rounded to what the books can hold."""

    code = "unsupported_price"


class NoSuchTicker(Exception):
    """A source answered that there is no such ticker."""

    code = "unknown_ticker"


def priced(ticker: str, price, currency: str | None, source: str, seen: datetime | None) -> Quote:
    """A quote of this moment, if `price` can be one: a number above 0, rounded to 8 decimals.

    `seen` is when the source itself last saw it; where that is not known or yet to come, it is this moment.
    """
    try:
        exact = checked_decimal(price)
        price = rounded(exact)
    except (InvalidOperation, ValueError):
        raise BadAnswer("its price is no number") from None
    if 0 < exact < UNIT:
        raise TooSmall("its price is too small")
    if not 0 < price < ORDER_LIMIT:
        raise BadAnswer("its price is out of range")
    if currency is not None and not (isinstance(currency, str) and re.fullmatch("[A-Za-z]{1,10}", currency)):
        raise BadAnswer("its currency is no currency")
    moment = now()
    when = {"timestamp": moment, "market_time": min(seen or moment, moment)}
    return Quote(ticker=ticker, price=price, currency=currency, source=source, **when)


def since_1970(seconds) -> datetime | None:
    """The moment that is so many seconds after 1970 began, if it can be one."""
    is_moment = isinstance(seconds, Decimal) and 0 < seconds < 10**11
    return datetime.fromtimestamp(int(seconds), UTC) if is_moment else None


def local_time(text, zone="UTC") -> datetime | None:
    """The moment in `2024-03-08 15:04:05` of a time zone, or the end of the day in `2024-03-08`, if any."""
    try:
        moment = datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone)).astimezone(UTC)
        return moment + timedelta(days=len(text) == len("2024-03-08"))
    except (TypeError, ValueError, OverflowError, LookupError, OSError):
        return None


DAY = TIMEFRAMES["1d"]
A_MONDAY = datetime.min.replace(tzinfo=UTC)
"""The year 1 began on one; so do weeks."""

AS_THEY_ARE = timedelta.resolution
"""The step of bars that are not put together: each begins where it begins."""


def last_bars(bars: list[Bar], step: timedelta, clock: datetime, asked: BarOptions) -> list[Bar]:
    """The last of those `asked` for that can be put together from `bars`, one for each `step`, up to `clock`.

    `bars` are ordered by time. No more of them is looked at than what is answered is made of.
    """

    def begins(bar: Bar) -> datetime:
        return bar.timestamp - (bar.timestamp - A_MONDAY) % step

    time_of, found = attrgetter("timestamp"), []
    last = bisect_right(bars, clock, key=time_of)
    if asked.end:
        last = bisect_left(bars, asked.end, hi=last, key=begins)
    while last and len(found) < asked.limit:
        begin = begins(bars[last - 1])
        if asked.start and begin < asked.start:
            break
        first = bisect_left(bars, begin, hi=last, key=time_of)
        found.append(joined(begin, bars[first:last]))
        last = first
    return found[::-1]


def joined(begin: datetime, bars: list[Bar]) -> Bar:
    """The one bar that `bars` make, which follow each other."""
    high, low = max(bar.high for bar in bars), min(bar.low for bar in bars)
    return Bar(begin, bars[0].open, high, low, bars[-1].close, sum(bar.volume for bar in bars))


def no_such_ticker(ticker: str) -> Refused:
    return Refused("unknown_ticker", f"There is no ticker {ticker} here.", ticker=ticker)


def no_price(ticker: str, seconds: int = 1) -> Refused:
    """The refusal of a ticker that nobody was there to price; in so many seconds somebody may be."""
    sentence = f"No source gave a price for {ticker} in time."
    return Refused("price_unavailable", sentence, ticker=ticker, retry_after=seconds)


def refusal_of(ticker: str, code: str, until: datetime) -> Refused:
    return no_such_ticker(ticker) if code == "unknown_ticker" else bad_price(code, ticker, until)


# -------------------------------------------------------------------------------- The live market


class LiveMarket:
    """Asks its sources in order and holds what they answer for `hold_seconds`.

    The way of a question: this process's dict; the quotes that other processes have published; what is
    remembered of bad tickers; the sources. Questions run in a few threads of their own, one at a time for
    each ticker, so that a hundred bots that ask at once cause one request, and a source that hangs holds up
    nobody but those who wait for it.
    """

    is_sample = False

    def __init__(
        self, app, sources: list["Source"], hold_seconds: int, max_age_days: int, with_actions: bool = True
    ):
        self.app, self.sources, self.with_actions = app, sources, with_actions
        self.yahoo = next((source for source in sources if isinstance(source, Yahoo)), None)
        self.hold = timedelta(seconds=hold_seconds)
        self.max_age = timedelta(days=max_age_days)
        self.held: dict[str, Quote] = {}
        self.held_bars: dict[BarsQuestion, tuple[list[Bar] | str, datetime]] = {}
        self.refused: dict[str, tuple[str, datetime]] = {}
        self.asking: dict[str | BarsQuestion, Future] = {}
        self.lock = threading.RLock()
        self.threads = ThreadPoolExecutor(max_workers=8, thread_name_prefix="price")
        self.hits = self.misses = 0

    def look_up(self, ticker: str, account=None) -> Quote | Refused:
        """The quote of `ticker` in force, in the currency that it names, or why there is none.

        Where no source prices it, the first one's word decides: `unknown_ticker` when it knows no such
        ticker, `price_unavailable` when it did not answer or gave no price, `unsupported_price` when that is
        too small. A ticker that was ever priced keeps its last price in all cases but one: that the first
        source did not answer.
        """
        try:
            return self.held_quote(ticker) or self.waited_for(self.ask(ticker), ticker)
        except Refused as refusal:
            return refusal

    def waited_for(self, question: Future, ticker: str):
        try:
            return question.result(QUESTION_SECONDS)
        except (TimeoutError, CancelledError):
            question.cancel()  # If no thread has come to it by now, none needs to.
            raise no_price(ticker) from None

    def quotes(self, tickers: list[str], account=None) -> dict[str, Quote]:
        """The quotes of those `tickers` that can be had in two seconds, asked for side by side."""
        answers = self.answers(tickers, REQUEST_SECONDS)
        return {ticker: quote for ticker, quote in answers.items() if isinstance(quote, Quote)}

    def look_ups(self, tickers: list[str], account=None) -> dict[str, Quote | Refused]:
        """What `look_up` says of each of `tickers`, asked for side by side."""
        answers = self.answers(tickers, QUESTION_SECONDS)
        for answer in answers.values():
            if not isinstance(answer, Quote | Refused):
                raise answer
        return answers

    def answers(self, tickers: list[str], seconds: float) -> dict[str, Quote | Exception]:
        """What comes of the questions about `tickers` within `seconds`."""
        answers = {ticker: self.held_quote(ticker) for ticker in tickers}
        questions = {ticker: self.ask(ticker) for ticker, quote in answers.items() if not quote}
        answered = wait(questions.values(), seconds).done
        for ticker, question in questions.items():
            if question in answered and not question.cancelled():
                answers[ticker] = question.exception() or question.result()
            else:
                answers[ticker] = no_price(ticker)
        return answers

    def held_quote(self, ticker: str) -> Quote | None:
        quote = self.held.get(ticker)
        if quote and quote.valid_until > now():
            self.hits += 1
            return quote
        self.misses += 1
        return None

    def ask(self, about: "str | BarsQuestion", find: Callable | None = None) -> Future:
        """The question `about` a ticker, or its bars, that is under way, or a new one."""
        with self.lock:
            question = self.asking.get(about)
            if question is None:
                in_this_request = copy_context().run  # So that a log line over there carries its id.
                question = self.threads.submit(in_this_request, find or self.find, about)
                self.asking[about] = question
                question.add_done_callback(lambda _: self.asking.pop(about))
            return question

    def find(self, ticker: str) -> Quote:
        with self.app.app_context():
            quote = self.published_quote(ticker)
        self.remember(self.held, ticker, quote)
        return quote

    def remember(self, cache: dict, about, answer, most: int = CACHE_SIZE, size: Callable = len) -> None:
        """Put `answer` into `cache`, and drop the oldest where it has grown too large."""
        with self.lock:
            cache.pop(about, None)
            cache[about] = answer
            while size(cache.values()) > most:
                del cache[next(iter(cache))]

    def published_quote(self, ticker: str) -> Quote:
        """The quote that all processes agree on: the last one published, or a new one that we publish.

        Two processes cannot publish the same `number` of a ticker: who comes second takes what the
        first one published. So one quote at most is in force at any moment.
        """
        while True:
            last = Quote.latest(ticker)
            if last and last.valid_until > now():
                return last
            quote = self.new_quote(ticker, last)
            quote.number = last.number + 1 if last else 1
            if quote.publish():
                return quote

    def new_quote(self, ticker: str, last: Quote | None) -> Quote:
        """What the sources say, or the `last` price once more where they have no good one.

        Nobody is stuck with a holding: at that last price it is valued and sold, and nothing is bought. It
        is published like any other, so that all processes say so until they look again.
        """
        code, until = self.refused.get(ticker, ("", now()))
        if last is None and until > now():
            raise refusal_of(ticker, code, until)
        try:
            quote = self.quote_from_sources(ticker, last)
            if last and last.currency == "USD" != quote.currency:
                raise NoSuchTicker  # With a price in dollars: who holds it is not stuck with it.
        except (NoSuchTicker, BadAnswer) as verdict:
            until = now() + timedelta(seconds=BAD_SECONDS)
            if last:
                gone = isinstance(verdict, NoSuchTicker)
                return last.once_more("stale_price" if gone else verdict.code, until)
            self.remember(self.refused, ticker, (verdict.code, until))
            raise refusal_of(ticker, verdict.code, until) from None
        except SourceFailed as failure:
            raise no_price(ticker, failure.retry_after) from None
        quote.valid_until = quote.timestamp + self.hold
        told = quote.actions if self.with_actions else ()
        quote.actions = [action for action in told if is_credible(action, quote, last)]
        if quote.timestamp - quote.market_time > self.max_age:
            quote.refusal = "stale_price"
        return quote

    def quote_from_sources(self, ticker: str, last: Quote | None) -> Quote:
        """The quote of the first source that has one; else what the first of all raised.

        A source is told when it priced the ticker last: since then there may have been splits and dividends.
        """
        failures = []
        for source in self.sources:
            try:
                since = last and last.timestamp
                if last and last.source != source.name:
                    with snapshot():  # Which gives its connection back before the source is asked.
                        since = Quote.last_look(ticker, source.name)
                return source.quote(ticker, since)
            except (NoSuchTicker, SourceFailed) as failure:
                failures.append(failure)
        first = failures[0]
        first.retry_after = min(getattr(failure, "retry_after", BAD_SECONDS) for failure in failures)
        raise first

    def past_bars(self, ticker: str, asked: BarOptions, account=None) -> list[Bar]:
        """The last of Yahoo's bars `asked` for, in the ticker's own currency; raises `Refused`.

        What Yahoo answers is held as long as a quote, for all questions that reach back as far.
        """
        if not self.yahoo:
            sentence = "Past prices are Yahoo's, which is not among this server's PRICE_SOURCES."
            raise Refused("price_unavailable", sentence, ticker=ticker, retry_after=BAD_SECONDS)
        weeks = asked.timeframe == "1w"  # Put together from days: Yahoo's own may begin on any day.
        about = ticker, "1d" if weeks else asked.timeframe, days_back(asked)
        found, until = self.held_bars.get(about, ([], EPOCH))
        if until <= now():
            found, until = self.waited_for(self.ask(about, self.find_bars), ticker)
        if isinstance(found, str):
            raise refusal_of(ticker, found, until)
        return last_bars(found, TIMEFRAMES["1w"] if weeks else AS_THEY_ARE, now(), asked)

    def find_bars(self, about: "BarsQuestion") -> tuple[list[Bar] | str, datetime]:
        """Yahoo's bars, or the code of its refusal, and until when they hold."""
        try:
            answer = self.yahoo.unless_it_rests(self.yahoo.bars, *about), now() + self.hold
        except (NoSuchTicker, BadAnswer) as verdict:
            answer = verdict.code, now() + timedelta(seconds=BAD_SECONDS)
        except SourceFailed as failure:
            raise no_price(about[0], failure.retry_after) from None
        self.remember(self.held_bars, about, answer, BARS_HELD, lambda all: sum(len(b) + 1 for b, _ in all))
        return answer

    def time(self, account=None, moment: datetime | None = None) -> datetime:
        return moment or now()

    def may_have_moved(self, account: Account) -> bool:
        """What `has_moved` says, as far as it is known without asking: there a lock is held."""
        return bool(account.orders) or self.has_news_for(account)

    def has_news_for(self, account: Account) -> bool:
        return self.with_actions and account.latest_action > account.actions_seen

    def is_ahead_of(self, account: Account) -> bool:
        """Whether splits or dividends were published by now that the account has not had."""
        with snapshot():
            return self.with_actions and CorporateAction.latest() > account.actions_seen

    def has_moved(self, account: Account) -> bool:
        """Whether there are splits and dividends that the account has not had, or prices that its open orders
        have not seen; asks for those that ran out.
        """
        if self.has_news_for(account):
            return True
        if not account.settled_at:
            return False
        moment, seen, ended = now(), {}, False
        with snapshot():
            orders = PlacedOrder.working(account.user_id)
        for order in orders:
            ended |= order.time_in_force == "day" and self.day(order.ticker, moment) != order.day
            if order.status == "open":
                seen[order.ticker] = order.quote_number
        self.quotes(list(seen))  # Which publishes those that are new.
        with snapshot():
            return ended or bool(Quote.after(seen))

    def since_settled(self, account: Account, moment: datetime) -> list[Tick]:
        """Each quote that was published since the account's open orders saw one, and each split and dividend
        that it has not had, in the order of time: they come with the quote that is the first without them.
        """
        seen = {order.ticker: order.quote_number for order in account.orders if order.status == "open"}
        # A price that is published once more keeps its old time: orders see it when they were placed, then.
        placed = max((order.placed_at for order in account.orders), default=moment)
        ticks = []
        for quote in Quote.after(seen):
            market_time = quote.market_time or quote.timestamp
            passed = Passed.at(market_time, quote.price, quote.source, quote.number, quote.stale)
            ticks.append(Tick(max(quote.timestamp, placed), {quote.ticker: passed}))
        actions = CorporateAction.after(account.actions_seen) if self.with_actions else ()
        news = [Tick(action.published_at, {}, [action]) for action in actions]
        ticks = sorted([*news, *ticks], key=attrgetter("moment"))
        return [*ticks, Tick(moment, {})]  # By which a day may have ended.

    def day(self, ticker: str, moment: datetime) -> date:
        """The day of trading in `ticker`: a coin's is UTC's, a share's ends at 16:00 in New York."""
        if re.fullmatch(COIN, ticker):
            return moment.date()
        day = (moment.astimezone(NEW_YORK) + timedelta(hours=8)).date()
        weekend = {5: 2, 6: 1}  # What is placed then waits for Monday.
        return day + timedelta(days=weekend.get(day.weekday(), 0))

    def has_asked(self, trade: sa.Row, pins=()) -> bool:
        """Whether a quote of that price was ever published; of recorded prices nothing is known here."""
        return trade.price_source == "sample" or Quote.was_published(trade.ticker, trade.market_price)

    def replay(self, past: Past, end: datetime, market_time: datetime) -> Iterator[Step]:
        """The trades of a run, and the last published quote of each day (UTC) on which there was one.

        Only what it trades counts, from its first trade to `end`. All is valued at the quotes that had been
        published by then. A split is booked when somebody looks: until then the holding is one of old shares,
        and so is the price.
        """
        quotes, waiting, prices = [], deque(past.trades), {}
        splits = [trade for trade in past.trades if trade.trade_type == "split"]

        def next_trade() -> Step:
            trade = waiting.popleft()
            if trade.trade_type == "split":
                splits.remove(trade)
                prices[trade.ticker] = trade.price
            return Step(trade.created_at, prices, trade)

        def of_old_shares(quote: sa.Row) -> Decimal:
            ahead = [s for s in splits if s.ticker == quote.ticker and s.market_time <= quote.timestamp]
            return times(quote.price, prod(ratio_from(split.ratio) for split in ahead))

        if waiting:
            tickers = {trade.ticker for trade in waiting}
            quotes = Quote.published(tickers, waiting[0].created_at, end)
        last_of_days = {quote.timestamp.date(): quote for quote in quotes}
        for quote in quotes:
            while waiting and waiting[0].created_at < quote.timestamp:
                yield next_trade()
            prices[quote.ticker] = of_old_shares(quote)
            if quote is last_of_days[quote.timestamp.date()]:
                yield Step(quote.timestamp, prices)
        while waiting:
            yield next_trade()
        yield Step(market_time, prices)

    def health(self) -> dict:
        """What this process has seen: hits and misses of its cache, and each source's record."""
        return {
            "cache": {"hits": self.hits, "misses": self.misses, "tickers": len(self.held)},
            **{source.name: source.health() for source in self.sources},
        }


class Source:
    """One place that prices come from: asks, counts, and lets a failing place rest for a while.

    Each kind brings an `ask(ticker, since)` of its own, which answers a `Quote` or raises `NoSuchTicker`,
    `RateLimited`, `BadAnswer` or `SourceFailed`. It rests only when it fails for all: when it says that we
    ask too often, or gave no answer for different tickers in a row. One bad ticker is its own.
    """

    name: str

    def __init__(self):
        self.answers = self.failures = 0
        self.last_error = None
        self.failed: set[str] = set()  # For these tickers in a row it gave no answer at all.
        self.rests_until = 0.0
        self.is_in_doubt = False  # It has rested and not answered since.
        self.lock, self.finding_out = threading.Lock(), threading.Lock()

    def quote(self, ticker: str, since: datetime | None = None) -> Quote:
        return self.unless_it_rests(self.ask, ticker, since)

    def unless_it_rests(self, ask: Callable, ticker: str, *more):
        """Ask, unless it rests; after a rest one question at a time finds out whether it is back."""
        seconds = self.rests_until - time.monotonic()
        if seconds > 0:
            failure = SourceFailed("it rests")
            failure.retry_after = ceil(seconds)
            raise failure
        if not self.is_in_doubt:
            return self.counted(ask, ticker, *more)
        if not self.finding_out.acquire(blocking=False):
            raise SourceFailed("it rests")
        try:
            return self.counted(ask, ticker, *more)
        finally:
            self.finding_out.release()

    def counted(self, ask: Callable, ticker: str, *more):
        try:
            answer = ask(ticker, *more)
        except NoSuchTicker:
            self.is_there(answers=1)
            raise
        except SourceFailed as failure:
            self.note(ticker, failure)
            raise
        self.is_there(answers=1)
        return answer

    def is_there(self, answers: int = 0) -> None:
        with self.lock:
            self.answers += answers
            self.failed.clear()
            self.is_in_doubt = False

    def note(self, ticker: str, failure: SourceFailed) -> None:
        """Count a failure, and rest if it was the one too many."""
        self.last_error = {"timestamp": now(), "ticker": ticker, "error": str(failure)}
        log.warning("%s gave no price for %s: %s", self.name, ticker, failure)
        self.failures += 1
        if isinstance(failure, BadAnswer):
            return self.is_there()
        with self.lock:
            self.failed.add(ticker)
            if len(self.failed) >= FAILURES_TO_PAUSE or isinstance(failure, RateLimited):
                self.failed.clear()
                self.is_in_doubt = True
                self.rests_until = time.monotonic() + PAUSE_SECONDS
                failure.retry_after = PAUSE_SECONDS

    def health(self) -> dict:
        return {
            "answers": self.answers,
            "failures": self.failures,
            "last_error": self.last_error,
            "resting": time.monotonic() < self.rests_until,
        }


def parsed(body: bytes | str) -> dict:
    """The JSON in an answer, its numbers as exact Decimals."""
    try:
        return json.loads(body, parse_float=Decimal, parse_int=Decimal)
    except (ValueError, ArithmeticError, RecursionError):
        raise BadAnswer("its answer is no JSON") from None


def failure_of(status: int) -> SourceFailed:
    """What an HTTP status means that comes with no price: 5xx is the source's fault, 4xx the ticker's."""
    if status == 429:
        return RateLimited("it says that we ask too often")
    return (SourceFailed if status >= 500 else BadAnswer)(f"it answered HTTP {status}")


class Yahoo(Source):
    """Yahoo Finance, asked by yfinance: its session has the cookie and the crumb that Yahoo wants.

    The chart's `meta.regularMarketPrice` costs one request and says 189.84, where `fast_info` fetches a
    year of candles and says 189.83999633789062.
    """

    name = "yahoo_finance"
    URL = "https://query2.finance.yahoo.com/v8/finance/chart/"

    def __init__(self, folder: str):
        super().__init__()
        self.folder = Path(folder, "yfinance")  # Where its cookie is kept.
        self.first_turn = threading.Lock()
        self.turns_lost = 0
        self.is_reached = False  # Something of Yahoo has answered: its cookie, say.

    @cached_property
    def session(self):
        """yfinance's own session, capped. Importing yfinance costs 70 MB and a second, so only here."""
        import yfinance
        from curl_cffi import CurlOpt
        from curl_cffi.requests import Session

        class CappedSession(Session):
            """yfinance waits 30 seconds for a cookie, whatever it is told. Not here."""

            def request(self, method, url, **options):
                options["timeout"] = REQUEST_SECONDS / 2
                if url.startswith(Yahoo.URL):
                    options |= {"timeout": REQUEST_SECONDS, "allow_redirects": False}
                response = super().request(method, url, **options)
                yahoo.is_reached = True
                return response

        yahoo = self
        logging.getLogger("yfinance").setLevel(logging.CRITICAL)  # A failure is one line, and ours.
        yfinance.set_tz_cache_location(str(self.folder))
        most = {CurlOpt.MAXFILESIZE_LARGE: ANSWER_BYTES}
        return yfinance.data.YfData(CappedSession(impersonate="chrome", curl_options=most))

    def ask(self, ticker: str, since: datetime | None = None) -> Quote:
        """The price of now, and with it the splits and dividends of today; on the first question of a day
        those of the time `since` the last one, and of a while before, as some come late.
        """
        period = {"range": "1d"}
        if since and since.date() < now().date():
            period = {"period1": int((since - LATE).timestamp()), "period2": int(time.time())}
        try:
            chart = self.chart(ticker, **period, interval="1d", events="div,split")
            meta = chart["meta"]
            seen = since_1970(meta.get("regularMarketTime"))
            quote = priced(ticker, meta["regularMarketPrice"], meta["currency"], self.name, seen)
            quote.actions = actions_told(chart, quote)
            return quote
        except (KeyError, TypeError, AttributeError):
            raise BadAnswer("its answer has no price") from None

    def daily_bars(self, ticker: str, period: str) -> tuple[dict[date, list], int]:
        """The days of a `period` such as `1y`, and how many are left out as their close is no price.

        Each has its open, high, low and close in dollars of that day (only the close is never None), its
        volume, its dividend and its split. A day is the exchange's own, and of two answers for one day the
        last counts. What happened on a day without a bar is the next one's.
        """
        chart = self.chart(ticker, range=period, interval="1d", events="div,split")
        try:
            currency, bars, odd, zone = chart["meta"]["currency"], {}, 0, zone_of(chart["meta"])
            if currency != "USD":
                raise SourceFailed(f"{ticker} is quoted in {currency}, not in USD")
            splits, dividends = events_of(ticker, chart)
            splits = [(moment.astimezone(zone).date(), split) for moment, split in splits]
            split_since = later_splits(splits)
            for moment, numbers in candles(chart):
                numbers = as_traded(numbers, split_since(moment.date()))
                if numbers[CLOSE] is None:
                    odd += 1
                else:
                    bars[moment.date()] = [*numbers, ZERO, ONE]
        except STRANGE:
            raise SourceFailed("its answer has no prices") from None
        if not bars:
            raise SourceFailed("its answer has no prices")
        days = sorted(bars)
        for day, split in splits:
            for following in days[bisect_left(days, day) :][:1]:
                bars[following][SPLIT] *= split
        for moment, dividend in dividends:
            for following in days[bisect_left(days, moment.astimezone(zone).date()) :][:1]:
                bars[following][DIVIDEND] += dividend
        if not all(is_ratio(bar[SPLIT]) and bar[DIVIDEND] < ORDER_LIMIT for bar in bars.values()):
            raise SourceFailed("its splits or dividends are too many")
        return bars, odd

    def bars(self, ticker: str, timeframe: str, days: int) -> list[Bar]:
        """The bars of the last `days` that have a price, in the ticker's own currency.

        A day is the exchange's own, at T00:00:00Z. Of two answers for one time the last counts, and what
        begins between two minutes is no bar but the price of now.
        """
        until, bars, midnight = int(time.time()), {}, datetime.min.time()
        chart = self.chart(ticker, period1=until - days * 86_400, period2=until, interval=timeframe)
        try:
            for moment, (open, high, low, close, volume) in candles(chart):
                begin = moment.astimezone(UTC)
                if timeframe == "1d":
                    begin = datetime.combine(moment.date(), midnight, UTC)
                if close and not begin.second:
                    prices = [price or close for price in (open, high, low, close)]
                    bars[begin] = Bar(begin, prices[0], max(prices), min(prices), close, volume)
        except STRANGE:
            raise BadAnswer("its answer has no bars") from None
        return sorted(bars.values())

    @contextmanager
    def turn(self):
        """Until anything of Yahoo has answered, one thread asks at a time, and where it gets no answer, those
        who wait behind it do not ask: each would take as long as a Yahoo that hangs takes to fail.
        """
        if self.is_reached:
            yield
            return
        turns_lost = self.turns_lost
        if not self.first_turn.acquire(timeout=2 * REQUEST_SECONDS):
            raise SourceFailed("it has not answered yet")
        try:
            if self.turns_lost > turns_lost and not self.is_reached:
                raise SourceFailed("it did not answer who asked before")
            yield
        except Exception:
            self.turns_lost += 1
            raise
        finally:
            self.first_turn.release()

    def chart(self, ticker: str, **period: str | int) -> dict:
        with self.turn():
            try:
                response = self.session.get(self.URL + escaped(ticker), period)
            except Exception as error:  # yfinance raises whatever it stumbles over in a strange answer.
                if type(error).__name__ == "YFRateLimitError":
                    raise RateLimited("it says that we ask too often") from None
                if getattr(error, "code", None) == 63:  # How curl says so: CURLE_FILESIZE_EXCEEDED.
                    raise BadAnswer("its answer is too long") from None
                raise SourceFailed(f"no answer ({type(error).__name__})") from None
        if response.status_code not in (200, 404):
            raise failure_of(response.status_code)
        answer = parsed(response.content)
        try:
            if response.status_code == 200:
                return answer["chart"]["result"][0]
            if answer["chart"]["error"]["code"] == "Not Found":
                raise NoSuchTicker
        except (KeyError, IndexError, TypeError):
            pass
        raise BadAnswer(f"it answered HTTP {response.status_code} and no chart")


class AlphaVantage(Source):
    """Alpha Vantage: shares by GLOBAL_QUOTE, coins such as BTC-USD by CURRENCY_EXCHANGE_RATE.

    It says "no" with HTTP 200 and a `Note` or `Information`. GLOBAL_QUOTE names no currency: a ticker
    without an exchange's suffix counts as quoted in US dollars, one with (SAP.DE) in none that we know. Of a
    class of shares (BRK-B) it may have the one spelling or the other (BRK.B).
    """

    name = "alphavantage"
    URL = "https://www.alphavantage.co/query"

    def __init__(self, api_key: str):
        super().__init__()
        self.api_key = api_key

    def ask(self, ticker: str, since: datetime | None = None) -> Quote:
        try:
            if coin := re.fullmatch(COIN, ticker):
                pair = {"from_currency": coin[1], "to_currency": coin[2]}
                answer = self.answer_to(function="CURRENCY_EXCHANGE_RATE", **pair)
                if "Error Message" in answer and "apikey" not in answer["Error Message"]:
                    raise NoSuchTicker
                rate = answer["Realtime Currency Exchange Rate"]
                seen = local_time(rate.get("6. Last Refreshed"), rate.get("7. Time Zone", "UTC"))
                return priced(ticker, rate["5. Exchange Rate"], rate["3. To_Currency Code"], self.name, seen)
            answer = self.answer_to(function="GLOBAL_QUOTE", symbol=ticker)
            if answer["Global Quote"] == {} and re.fullmatch(SHARE_CLASS, ticker):
                answer = self.answer_to(function="GLOBAL_QUOTE", symbol=ticker.replace("-", "."))
            share = answer["Global Quote"]
            if share == {}:
                raise NoSuchTicker
            currency = None if "." in ticker else "USD"
            seen = local_time(share.get("07. latest trading day"))
            return priced(ticker, share["05. price"], currency, self.name, seen)
        except (KeyError, TypeError, AttributeError):
            raise BadAnswer("its answer has no price") from None

    def answer_to(self, **question) -> dict:
        """Its JSON. Exceptions of requests carry the URL, and so the key: only their names go on."""
        question |= {"apikey": self.api_key}
        how = {"timeout": REQUEST_SECONDS, "allow_redirects": False, "stream": True}
        try:
            with requests.get(self.URL, question, **how) as response:
                body, deadline = b"", time.monotonic() + REQUEST_SECONDS
                while part := response.raw.read1(ANSWER_BYTES, decode_content=True):
                    body += part
                    if len(body) > ANSWER_BYTES:
                        raise BadAnswer("its answer is too long")
                    if time.monotonic() > deadline:
                        raise SourceFailed("its answer is too slow")
        except (requests.RequestException, HTTPError) as error:
            raise SourceFailed(f"no answer ({type(error).__name__})") from None
        if response.status_code != 200:
            raise failure_of(response.status_code)
        answer = parsed(body)
        if not isinstance(answer, dict):
            raise BadAnswer("its answer has no price")
        if answer.keys() & {"Note", "Information"}:
            raise RateLimited("it says that we ask too often")
        return answer


BarsQuestion = tuple[str, str, int]
"""What Yahoo is asked for: the ticker, the timeframe, and for how many days back."""

YAHOO_HAS = {"1m": 7, "5m": 59, "15m": 59, "1h": 729}
"""Days of such bars in one request; it refuses those that reach further back. Of days it has all."""


def days_back(asked: BarOptions) -> int:
    """How many days back to ask Yahoo for, a power of two, so that similar questions share an answer.

    Shares trade a quarter of the hours of two days in three, and ten days of holidays are the most.
    """
    step = TIMEFRAMES[asked.timeframe]
    back = asked.limit * step * (2 if step >= DAY else 8) + 10 * DAY
    back += max(now() - (asked.end or now()), timedelta(0))
    if asked.start:
        back = min(back, now() - asked.start)
    return min(1 << max(back.days, 7).bit_length(), YAHOO_HAS.get(asked.timeframe, 36_000))


CLOSE, DIVIDEND, SPLIT = (Bar._fields[1:].index(field) for field in ("close", "dividend", "split"))
STRANGE = (LookupError, AttributeError, TypeError, ValueError, ArithmeticError)
"""What is raised over a chart that is not made as Yahoo makes them."""


def candles(chart: dict) -> Iterator[tuple[datetime, list[Decimal | None]]]:
    """The rows of a chart that have a close: when each begins, by the exchange's clock, and its open, high,
    low, close and volume. A price that the books cannot have is None.
    """
    moments, columns = chart.get("timestamp", []), chart["indicators"]["quote"][0]
    zone, unknown = zone_of(chart["meta"]), [None] * len(moments)
    # Which row is which in a list of another length, nobody knows.
    lists = [v if len(v := columns.get(field) or ()) == len(moments) else unknown for field in FIELDS]
    for at, *prices, volume in zip(moments, *lists, strict=True):
        if prices[-1] is not None:
            if not abs(at) < 10**11:  # Before it is an integer: that of 1e999999999 has a billion digits.
                raise ValueError("its time is none")
            moment = (EPOCH + timedelta(seconds=int(at))).astimezone(zone)
            is_volume = isinstance(volume, Decimal) and 0 <= volume < VOLUME_LIMIT
            yield moment, [*map(price_meant, prices), rounded(volume) if is_volume else Decimal(0)]


MOST_SPLITS = 100
"""In one answer. No share has had as many, and exact ratios that are multiplied grow longer and longer."""


def events_of(ticker: str, chart: dict) -> tuple[list[tuple], list[tuple]]:
    """The splits and dividends in Yahoo's `chart` of a ticker, if it was asked for with `events=div,split`:
    from when on each is in force (UTC), in that order, and the new shares for an old one, or what it pays.

    Yahoo divides what was paid, like all its prices, by the ratio of each split that came later; here it is
    what a share of that day was paid, in the ticker's own currency, to 8 decimals. A split is an exact ratio
    from 1:10000 to 10000:1. What cannot be one, or is yet to come, is left out, and the log says so. Of two
    of one moment the last counts. Nothing is raised, whatever Yahoo says.
    """
    found, left_out = {"splits": {}, "dividends": {}}, Counter()
    try:
        events = chart.get("events") or {}
        listed = [(kind, event) for kind in found for event in (events.get(kind) or {}).values()]
    except AttributeError:
        listed, left_out["events", "they are no events"] = [], 1
    for kind, event in listed:
        try:
            what = ratio_of(event) if kind == "splits" else amount_of(event, chart["meta"].get("currency"))
            found[kind][moment_of(event)] = what
        except ValueError as reason:
            left_out[kind, str(reason)] += 1
    splits, dividends = sorted(found["splits"].items()), []
    if len(splits) > MOST_SPLITS:
        found, splits, left_out["events", "no share has had so many splits"] = {"dividends": {}}, [], 1
    split_since = later_splits(splits)
    for moment, amount in sorted(found["dividends"].items()):
        paid = to_decimal(amount * split_since(moment))
        if 0 < paid < ORDER_LIMIT:
            dividends.append((moment, paid))
        else:
            left_out["dividends", NO_DIVIDEND] += 1
    for (kind, reason), count in left_out.items():
        log.warning("%s: left out %d %s of %s: %s", Yahoo.name, count, kind, ticker, reason)
    return splits, dividends


NO_DIVIDEND = f"what it pays is not above 0 and below {ORDER_LIMIT}, to 8 decimals"


def moment_of(event: dict) -> datetime:
    """When an event of Yahoo's is in force: when its exchange opens."""
    seconds = number_in(event, "date")
    if not -(10**10) < seconds <= int(time.time()):  # Dividends are known from 1962 on.
        raise ValueError("its date is no time, or yet to come")
    return EPOCH + timedelta(seconds=int(seconds))


def ratio_of(event: dict) -> Fraction:
    new, old = number_in(event, "numerator"), number_in(event, "denominator")
    # Compared and rounded before it is a fraction: that of 1e-999999999 would have a billion digits.
    terms = [Fraction(rounded(term)) if 0 < term < TERM_LIMIT else 0 for term in (new, old)]
    split = Fraction(*terms) if all(terms) else Fraction()
    if not is_ratio(split) or split == ONE:
        raise ValueError("its ratio is not from 1:10000 to 10000:1, or 1:1")
    return split


def amount_of(event: dict, currency: str | None) -> Fraction:
    """What a dividend pays, in the `currency` that the ticker's price has; Yahoo may name another."""
    amount = number_in(event, "amount")
    if not 0 < amount < ORDER_LIMIT:
        raise ValueError(NO_DIVIDEND)
    if event.get("currency") not in (None, "", currency):
        raise ValueError("it is paid in another currency")
    return Fraction(round(amount, 16))


def number_in(event: dict, member: str) -> Decimal:
    number = event.get(member) if isinstance(event, dict) else None
    if not isinstance(number, Decimal):
        raise ValueError(f"it has no {member}, or one that is no number")
    return number


def later_splits(splits: list[tuple]) -> Callable[[datetime | date], Fraction]:
    """Says of a moment how many shares one of then has become by all `splits` that came later."""
    moments = [moment for moment, _ in splits]
    ratios = list(accumulate((ratio for _, ratio in reversed(splits)), mul, initial=ONE))
    return lambda moment: ratios[len(moments) - bisect_right(moments, moment)]


def as_traded(numbers: list[Decimal | None], split: Fraction) -> list[Decimal | None]:
    """A candle as it was before that `split`, for which Yahoo has adjusted it: its prices are higher by the
    ratio, its volume is less. What the books cannot have then is None, or 0.
    """
    if split == ONE:
        return numbers
    *prices, volume = numbers
    prices = [price and to_decimal(Fraction(price) * split) for price in prices]
    volume = to_decimal(Fraction(volume) / split)
    prices = [price if price and 0 < price < ORDER_LIMIT else None for price in prices]
    return [*prices, volume if volume < VOLUME_LIMIT else ZERO]


def to_decimal(amount: Fraction) -> Decimal:
    """`amount` to 8 decimals, half-even."""
    return Decimal(round(amount * 10**8)).scaleb(-8)


def actions_told(chart: dict, quote: Quote) -> list[CorporateAction]:
    """The splits and dividends of a chart, the oldest first, as they came with a `quote`."""
    splits, dividends = events_of(quote.ticker, chart)
    known = {"source": quote.source, "published_at": quote.timestamp}
    known |= {"price": quote.price if quote.currency == "USD" else UNIT}  # What else is it in dollars?
    actions = [CorporateAction.split(quote.ticker, ratio, ex_at=at, **known) for at, ratio in splits]
    actions += [CorporateAction.dividend(quote.ticker, amount, ex_at=at, **known) for at, amount in dividends]
    return sorted(actions, key=attrgetter("ex_at", "kind"))


def is_credible(action: CorporateAction, quote: Quote, last: Quote | None) -> bool:
    """Whether a dividend is in dollars and less than a share of that day cost, now or last; if not, a line in
    the log says so. A split always is.
    """
    if action.kind == "split":
        return True
    if quote.currency != "USD":
        log.warning("%s: left out a %s: it is not paid in USD", quote.source, action)
        return False
    splits = [(split.ex_at, split.ratio) for split in quote.actions if split.kind == "split"]
    since = later_splits(splits)(action.ex_at)
    price = max(quote.price, last.price if last and last.currency == "USD" else 0)
    if action.amount * since.denominator < price * since.numerator:
        return True
    log.warning("%s: left out a %s: a share costs less", quote.source, action)
    return False


def zone_of(meta: dict) -> tzinfo:
    """The exchange's clock: by the name of its zone, or where this machine has none of that name by the
    offset that it has today.
    """
    try:
        return ZoneInfo(meta["exchangeTimezoneName"])
    except (KeyError, ValueError, TypeError, OSError):
        offset = meta.get("gmtoffset") or 0
        return timezone(timedelta(seconds=int(offset) if abs(offset) < 86_400 else 0))


def price_meant(number) -> Decimal | None:
    """A price of a candle, if it is one that the books can have.

    Yahoo keeps them in 32 bits and writes them in 64 (189.83999633789062); the shortest number with the
    same 32 bits (189.84) is what was meant.
    """
    from numpy import float32  # Comes with yfinance, and is as slow to import.

    if not isinstance(number, Decimal) or not 0 < number < ORDER_LIMIT:
        return None
    price = rounded(Decimal(str(float32(number))))
    return price if 0 < price < ORDER_LIMIT else None


def yahoo_is_reachable(seconds: float = 3) -> bool:
    """Whether Yahoo answers anything at all within `seconds`, name look-up included."""
    answered = threading.Event()

    def knock():
        with suppress(requests.RequestException):
            requests.head(Yahoo.URL, timeout=seconds)
            answered.set()

    threading.Thread(target=knock, daemon=True).start()
    return answered.wait(seconds)


# ------------------------------------------------------------------------------- The offline market

SAMPLE_FILE = Path(__file__).parent / "sample_market" / "prices.csv"

BAR_SECONDS = 60
"""The sample market moves on by one recorded bar a minute, and begins again after the last."""


def minute_of(moment: datetime) -> int:
    """How many bars the wall clock has shown since 1970."""
    return int(moment.timestamp()) // BAR_SECONDS


def step_of(bars: list[Bar]) -> timedelta:
    """How far apart two of `bars` are at the least; a single one counts as a day's."""
    return min((later.timestamp - bar.timestamp for bar, later in pairwise(bars)), default=DAY)


def since_last_jump(past: Past) -> Sequence[sa.Row]:
    """The stretches of a run, without those that its clock left by a jump before the first trade."""
    stretches = past.stretches
    first = len(stretches) - 1
    if past.trades:
        begun = past.trades[0].created_at
        first = bisect_right(stretches, begun, key=attrgetter("begun_at")) - 1
    for stretch, before in pairwise(reversed(stretches[: first + 1])):
        if stretch.first_bar is None or stretch.first_bar != before.last_bar:
            break
        first -= 1
    return stretches[max(first, 0) :]


def at_the_bar(bar: Step, trades: list[sa.Row]) -> list[Step]:
    """A bar and the trades made there: first the splits and dividends with which it begins, and those within
    it, which had another price than its close.
    """

    def is_within(trade: sa.Row) -> bool:
        return trade.trade_type in ACTIONS or trade.market_price not in (None, bar.prices[trade.ticker])

    within = len(list(takewhile(is_within, trades)))
    return [Step(bar.timestamp, bar.prices, trade) for trade in (*trades[:within], None, *trades[within:])]


class SampleMarket:
    """Recorded prices, as a pure function of the clock: every process and restart agrees on them.

    `path` is a file or a folder that `recorded.read` reads; `series` has the bars of each ticker, `bars`
    the times of them all. A ticker costs its last close, at that bar or before, and is unknown before its
    first. `actions` has the splits and dividends in force from a bar on, by its place, and `acting` the
    places in order; where the clock goes back over a split, or round to the first bar, it takes it back.
    """

    is_sample = True
    name = "sample"

    def __init__(self, path: Path = SAMPLE_FILE, with_actions: bool = True):
        self.series: dict[str, list[Bar]] = read(path)
        self.bars: list[datetime] = sorted({bar.timestamp for bars in self.series.values() for bar in bars})
        self.spacing = {ticker: step_of(bars) for ticker, bars in self.series.items()}
        self.actions: dict[int, list[CorporateAction]] = defaultdict(list)
        for ticker, bars in self.series.items() if with_actions else ():
            for bar in bars:
                if bar.dividend or bar.split != 1:  # As in few.
                    self.actions[self.number_at(bar.timestamp)] += self.actions_in(ticker, bar)
        self.actions.pop(0, None)  # Nobody comes to the first bar from before it.
        self.actions = dict(sorted(self.actions.items()))
        self.acting = list(self.actions)
        if taken_back := self.on_the_way(len(self.bars) - 1, 0):
            self.actions[0], self.acting = taken_back, [0, *self.acting]

    def actions_in(self, ticker: str, bar: Bar) -> list[CorporateAction]:
        """The dividend and the split that a recorded bar begins with; the dividend is for the old shares."""
        known = {"ex_at": bar.timestamp, "price": bar.close, "source": self.name}
        dividend = [CorporateAction.dividend(ticker, bar.dividend, **known)] if bar.dividend else []
        return dividend + ([CorporateAction.split(ticker, bar.split, **known)] if bar.split != 1 else [])

    def on_the_way(self, here: int, there: int) -> list[CorporateAction]:
        """What a clock meets that goes from one place to another.

        Back, it takes the splits back, the last one first, at what a share costs where it arrives, in the
        shares that there are until the next one is taken back.
        """
        if here <= there:
            met = self.acting[bisect_right(self.acting, here) : bisect_right(self.acting, there)]
            return [action for place in met for action in self.actions[place]]
        bar, prices, back = self.bars[there], {}, []
        for place in self.actions:
            for split in self.actions[place] if there < place <= here else ():
                if split.kind == "split":
                    price = prices.get(split.ticker) or self.price(split.ticker, bar)
                    back.append(split.undone(price, bar))
                    prices[split.ticker] = times(back[-1].price, 1 / split.ratio)
        return back[::-1]

    def acted_by(self, minute: int) -> int:
        """How many of `acting` the running clock has shown from 1970 until that minute."""
        round, place = divmod(minute, len(self.bars))
        return round * len(self.acting) + bisect_right(self.acting, place)

    def number_at(self, moment: datetime) -> int:
        """The place in `bars` of the last one that is not after `moment`, or of the first one."""
        return max(bisect_right(self.bars, moment) - 1, 0)

    def bar_at(self, moment: datetime) -> datetime:
        """The last bar that is not after `moment`, or the first one."""
        return self.bars[self.number_at(moment)]

    def bar_after(self, bar: datetime, count: int) -> datetime:
        """The bar that comes `count` bars after `bar`, or the last one."""
        return self.bars[min(bisect_right(self.bars, bar) - 1 + count, len(self.bars) - 1)]

    def clock(self, account: Account) -> datetime | None:
        """The bar at which the account's clock stands, if it was stopped: the nearest one, as the file may
        have been changed since.
        """
        return account.market_clock and self.bar_at(account.market_clock)

    def time(self, account: Account, moment: datetime | None = None) -> datetime:
        """The market's time, at `moment` or now: the account's stopped clock, or the bar that is shown."""
        return self.clock(account) or self.bar_shown(moment or now())

    def bar_shown(self, moment: datetime) -> datetime:
        return self.bars[minute_of(moment) % len(self.bars)]

    def state(self, account: Account) -> MarketAnswer:
        return {
            "source": self.name,
            "clock": "manual" if account.market_clock else "wall",
            "now": self.time(account),
            "first_bar": self.bars[0],
            "last_bar": self.bars[-1],
            "tickers": list(self.series),
            "pins": account.pins,
        }

    def has_moved(self, account: Account) -> bool:
        """Whether its clock runs and has passed what it has not had: prices for its open orders, or else a
        split or a dividend of anything.
        """
        if account.market_clock:
            return False
        minute = minute_of(now())
        if account.settled_at:
            return minute > minute_of(account.settled_at)
        return bool(account.acted_at) and self.acted_by(minute_of(account.acted_at)) < self.acted_by(minute)

    may_have_moved = is_ahead_of = has_moved

    def since_settled(self, account: Account, moment: datetime) -> Iterator[Tick]:
        """The bars that the running clock has shown since the account has seen one, until `moment`."""
        seen = account.settled_at or account.acted_at
        return self.ticks(account, range(minute_of(seen) + 1, minute_of(moment) + 1))

    def bars_between(self, account: Account, bar: datetime) -> Iterator[Tick]:
        """The bars that the account's stopped clock passes on its way from where it stands on to `bar`."""
        return self.ticks(account, range(self.number_at(self.clock(account)) + 1, self.number_at(bar) + 1))

    def ticks(self, account: Account, minutes: range) -> Iterator[Tick]:
        """What the tickers of the account's open orders cost in each of `minutes`, which are places in
        `bars`, counted on for a clock that goes round: the row of the file, if it has one, or what the
        account has pinned. With it come the splits and dividends; without open orders there is nothing else.
        """
        tickers, pins = {order.ticker for order in account.orders}, account.pins
        known = {}  # The clock may pass a bar a thousand times.
        for minute in minutes:
            place = minute % len(self.bars)
            if not tickers and place not in self.actions:
                continue
            if place not in known:
                bar = self.bars[place]
                passed = {ticker: self.passed_in(ticker, bar, pins.get(ticker)) for ticker in tickers}
                known[place] = bar, {ticker: prices for ticker, prices in passed.items() if prices}
            shown_at = None if account.market_clock else EPOCH + minute * timedelta(seconds=BAR_SECONDS)
            yield Tick(*known[place], self.actions.get(place, ()), shown_at)

    def passed_in(self, ticker: str, bar: datetime, pin: Decimal | None) -> Passed | None:
        if pin:
            return Passed.at(bar, pin, self.name)
        row = self.row_at(ticker, bar)
        return row and Passed(bar, row.open, row.high, row.low, self.name)

    def landing(self, account: Account, moment: datetime, left: datetime) -> list[Tick]:
        """The bar to which the clock has jumped from the one it has `left`: the splits and dividends between
        them, and one price for each ticker, its close or what is pinned.
        """
        bar, pins, passed = self.time(account, moment), account.pins, {}
        for ticker in {order.ticker for order in account.orders}:
            row = self.row_at(ticker, bar)
            if price := pins.get(ticker) or (row and row.close):
                passed[ticker] = Passed.at(bar, price, self.name)
        return [Tick(bar, passed, self.on_the_way(self.number_at(left), self.number_at(bar)))]

    def pinned(self, account: Account, ticker: str, moment: datetime) -> list[Tick]:
        """The one price that a ticker has from now on, as it was pinned or let go."""
        bar = self.time(account, moment)
        price = account.pins.get(ticker) or self.price(ticker, bar)
        return [Tick(bar, {ticker: Passed.at(bar, price, self.name)})] if price else []

    def has_asked(self, trade: sa.Row, pins: Sequence[sa.Row]) -> bool:
        """Whether a ticker cost what a trade says in its bar, or was pinned so, as far as the file knows."""
        row = self.row(trade.ticker, trade.market_time) if trade.price_source == self.name else None
        low, high = (row.low, row.high) if row else (0, ORDER_LIMIT)
        if row and row.timestamp < trade.market_time:
            low = high = row.close
        pinned = any((pin.ticker, pin.price) == (trade.ticker, trade.market_price) for pin in pins)
        return pinned or low <= trade.market_price <= high

    def day(self, ticker: str, moment: datetime) -> date:
        """The day of the market in which a bar falls."""
        return moment.date()

    def look_up(self, ticker: str, account: Account) -> Quote | Refused:
        """The price of `ticker` in dollars at the account's clock, or what the account pinned it at."""
        return self.look_ups([ticker], account)[ticker]

    def quotes(self, tickers: list[str], account: Account) -> dict[str, Quote]:
        """The quotes of those `tickers` that there are, all of the same moment."""
        minute = now().replace(second=0, microsecond=0)
        clock, pins = self.clock(account), account.pins
        quotes = {
            t: self.quote_at(t, minute, clock, pins.get(t)) or self.last_traded(t, account) for t in tickers
        }
        return {ticker: quote for ticker, quote in quotes.items() if quote}

    def quote_of(self, ticker: str, price: Decimal, timestamp: datetime, seen: datetime, **more) -> Quote:
        own = {"currency": "USD", "source": self.name, "timestamp": timestamp, "market_time": seen}
        return Quote(ticker=ticker, price=price, **own, **more)

    def last_traded(self, ticker: str, account: Account) -> Quote | None:
        """What a ticker cost in the account's last trade of it, where a changed file has it no more."""
        if trade := Trade.latest_in(ticker, account):
            seen = trade.market_price, trade.created_at, trade.market_time
            return self.quote_of(ticker, *seen, refusal="stale_price")
        return None

    def look_ups(self, tickers: list[str], account: Account) -> dict[str, Quote | Refused]:
        """What `look_up` says of each of `tickers`, at one moment."""
        quotes = self.quotes(tickers, account)
        return {ticker: quotes.get(ticker) or no_such_ticker(ticker) for ticker in tickers}

    @lru_cache(maxsize=10_000)  # noqa: B019 - a process has one market, for as long as it lives.
    def quote_at(
        self, ticker: str, minute: datetime, clock: datetime | None, pin: Decimal | None
    ) -> Quote | None:
        """What `ticker` costs in this `minute`, or at an account's stopped `clock`, if it has no `pin` there.

        Asked for a thousand holdings in each portfolio, so it is remembered. It depends on nothing else.
        """
        market_time = clock or self.bar_shown(minute)
        price = pin or self.price(ticker, market_time)
        until = None if clock else minute + timedelta(seconds=BAR_SECONDS)
        return price and self.quote_of(ticker, price, clock or minute, market_time, valid_until=until)

    def replay(self, past: Past, end: datetime, market_time: datetime) -> Iterator[Step]:
        """The trades of a run, and each bar that the account's clock has passed, in order.

        All is valued at the bar's close, or at what was pinned then. Trades of a time of which no stretch
        tells, as in older databases, stand alone. Of a clock that runs round and round while nobody trades,
        two rounds count: more would repeat them, with the same falls, for as long as an account is left.
        """
        closes = {ticker: self.closes(ticker) for ticker in {trade.ticker for trade in past.trades}}
        waiting, pins, pinned = deque(past.trades), deque(past.pins), {}

        def prices_at(bar: int, moment: datetime) -> dict[str, Decimal | None]:
            while pins and pins[0].created_at <= moment:
                pin = pins.popleft()
                pinned[pin.ticker] = pin.price
            return {t: pinned.get(t) or closes[t][bar] for t in closes}

        def stand_alone(until: datetime) -> Iterator[Step]:
            while waiting and waiting[0].created_at <= until:
                trade = waiting.popleft()
                prices = prices_at(self.number_at(trade.market_time), trade.created_at)
                yield Step(trade.market_time, prices, trade)

        for stretch, following in pairwise([*since_last_jump(past), None]):
            until = following.begun_at if following else end
            yield from stand_alone(stretch.begun_at)
            passed = self.passed(stretch, until)
            if stretch.first_bar is None and len(waiting) == len(past.trades):  # There is nothing at stake.
                first = self.place(waiting[0], stretch) if waiting else passed.stop
                passed = range(max(passed.start, first), passed.stop)
            quiet = 0
            for place in passed:
                bar, due = place % len(self.bars), []
                while waiting and waiting[0].created_at <= until and self.place(waiting[0], stretch) <= place:
                    due.append(waiting.popleft())
                quiet = 0 if due else quiet + 1
                if quiet <= 2 * len(self.bars):
                    yield from at_the_bar(Step(self.bars[bar], prices_at(bar, stretch.begun_at)), due)
        yield from stand_alone(end)
        yield Step(market_time, prices_at(self.number_at(market_time), end))

    def passed(self, stretch: sa.Row, until: datetime) -> range:
        """The places of the bars that were passed, which are their numbers in `bars`.

        Where the clock ran they are minutes since 1970, whose remainders are those numbers.
        """
        if stretch.first_bar is None:
            return range(minute_of(stretch.begun_at), minute_of(until) + 1)
        return range(self.number_at(stretch.first_bar), self.number_at(stretch.last_bar) + 1)

    def place(self, trade: sa.Row, stretch: sa.Row) -> int:
        """The place in `passed` of a trade's bar; where the clock ran, when it last showed that."""
        bar = self.number_at(trade.market_time)
        if stretch.first_bar is None:
            booked = minute_of(trade.created_at)
            return booked - (booked - bar) % len(self.bars)
        return bar

    def closes(self, ticker: str) -> list[Decimal | None]:
        """The last close of `ticker` at each of `bars`."""
        closes = {bar.timestamp: bar.close for bar in self.series.get(ticker, [])}
        return list(accumulate(map(closes.get, self.bars), lambda last, close: close or last))

    def row(self, ticker: str, bar: datetime) -> Bar | None:
        """The last row of `ticker` at `bar` or before."""
        bars = self.series.get(ticker, [])
        past = bisect_right(bars, bar, key=itemgetter(0))
        return bars[past - 1] if past else None

    def row_at(self, ticker: str, bar: datetime) -> Bar | None:
        """The row of `ticker` at `bar` itself."""
        row = self.row(ticker, bar)
        return row if row and row.timestamp == bar else None

    def price(self, ticker: str, bar: datetime) -> Decimal | None:
        """What `ticker` cost last at `bar`, in dollars."""
        row = self.row(ticker, bar)
        return row and row.close

    def past_bars(self, ticker: str, asked: BarOptions, account: Account) -> list[Bar]:
        """The last of the recorded bars `asked` for, up to the account's clock; raises `Refused`."""
        if ticker not in self.series:
            raise no_such_ticker(ticker)
        step, recorded = TIMEFRAMES[asked.timeframe], self.spacing[ticker]
        if step < recorded:
            there_are = ", ".join(name for name, step in TIMEFRAMES.items() if step >= recorded) or "none"
            sentence = f"must not be finer than {ticker} is recorded; there are: {there_are}"
            raise invalid([{"field": "timeframe", "message": sentence}])
        if step == recorded < DAY:
            step = AS_THEY_ARE  # The hours of an exchange may begin at half past.
        return last_bars(self.series[ticker], step, self.time(account), asked)

    def health(self) -> dict:
        return {self.name: {"tickers": len(self.series), "bars": len(self.bars)}}
