"""Recorded prices from CSV files, in the layouts in which people have them.

`read` takes a file or a folder, finds out where each file has its times and prices, and makes bars of
them all. Whatever a file holds, it is read wholly and rightly, or refused with the line and the reason.

Prices are those of their day, and a split or a dividend stands in the row of the day from which on it is in
force. What a column `split` says is believed. Yahoo's prices, and so yfinance's, are adjusted for all splits
that came later: nobody's shares must be multiplied whose price did not fall. So a split in yfinance's column
`Stock Splits` counts only where the price moves with it. Whether prices are adjusted for dividends, too
(yfinance's `auto_adjust`), cannot be seen in them, and dividends always count.
"""

import csv
import re
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from decimal import ROUND_HALF_EVEN, Decimal
from fractions import Fraction
from functools import lru_cache
from itertools import chain, islice
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
SECONDS, DATE = re.compile(r"-?[0-9]+(\.[0-9]+)?"), re.compile(r"((?:19|20)[0-9]{6})(\.0+)?")
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([Ee][+-]?[0-9]{1,3})?")
RATIO = re.compile(r"([0-9]{1,12}):([0-9]{1,12})")
TICKER = re.compile(r"(?=.*[A-Za-z0-9])[A-Za-z0-9.=^-]{1,20}|[A-Za-z0-9]{1,10}/[A-Za-z0-9]{1,9}")

ZERO, UNIT, VOLUME_LIMIT = Decimal(0), Decimal("1e-8"), Decimal(10**18)
ONE = Fraction(1)

# Prices are between the two: these are the first that would be rounded to 0 and to 10,000,000,000.
LEAST, MOST = Decimal("0.000000005"), Decimal("9999999999.999999995")

# A split multiplies by so much at the most, or divides. Its two terms have up to 12 digits.
SPLIT_LIMIT, TERM_LIMIT = 10_000, 10**12

# What stands where there is no number.
NOTHING = {"", "nan", "null", "none", "n/a", "na", "#n/a", "<na>"}

# The columns of times, the most telling first.
TIMES = ("timestamp", "datetime", "date", "time")

# What pandas calls an index without a name: the times, if no other column has them, or else a counter.
UNNAMED = {"", "index", "unnamed: 0"}

# What a wide file may have beside its tickers, and looks like one.
NOT_TICKERS = {*TIMES, *UNNAMED, "volume", "adjclose", "dividend", "dividends", "split", "splits"}


class BadFile(Exception):
    """A file that is refused, in one line that names it, its line and the reason."""


class Bar(NamedTuple):
    """What a ticker cost in the time that begins at `timestamp`, in dollars, and what came with that time:
    a dividend in dollars a share, and so many new shares for an old one.
    """

    timestamp: datetime
    open: Decimal
    high: Decimal
    low: Decimal
    close: Decimal
    volume: Decimal
    dividend: Decimal = ZERO
    split: Fraction = ONE

    def to_dict(self) -> dict[str, datetime | Decimal]:
        """Its time and the five numbers, as bars are shown."""
        return dict(zip(("timestamp", *FIELDS), self, strict=False))


FIELDS = ("open", "high", "low", "close", "volume")


class Event(NamedTuple):
    """What a row says beside its prices. `claimed` is a split that counts where the price moves with it."""

    dividend: Decimal = ZERO
    split: Fraction = ONE
    claimed: Fraction = ONE


NO_EVENT = Event()

# The columns of an event, and which of its members each is.
EVENTS = {"dividend": 0, "dividends": 0, "split": 1, "splits": 1, "stock splits": 2}


class Layout(NamedTuple):
    """Where a row has its time (or its date, and then its time), its ticker, and the five numbers of each
    ticker (of None: the one that it names), and its event, if there are any. -1 is nowhere: each row is given
    an empty cell as its last.
    """

    time: list[int]
    time_is_named: bool
    ticker: int
    bars: dict[str | None, list[int]]
    events: dict[str | None, list[int]]


def read(path: Path | str) -> dict[str, list[Bar]]:
    """The bars in a CSV file, or in all CSV files of a folder, by ticker and in the order of time."""
    path = Path(path)
    files = [path]
    if path.is_dir():
        names = sorted(file for file in path.iterdir() if not file.name.startswith("."))
        files = [file for file in names if file.suffix.lower() == ".csv" and file.is_file()]
        if not files:
            raise BadFile(f"{path} has no CSV files.")
    market: dict[str, dict[datetime, Bar]] = defaultdict(dict)
    events: dict[str, dict[datetime, Event]] = defaultdict(dict)
    for file in files:
        read_file(file, market, events)
    series = {ticker: sorted(bars.values()) for ticker, bars in sorted(market.items())}
    for ticker, of_ticker in events.items():
        try:
            put_in_force(series.get(ticker, []), of_ticker)
        except ValueError as error:
            raise BadFile(f"{path}: {ticker} has {error}.") from None
    return series


def read_file(
    file: Path, market: dict[str, dict[datetime, Bar]], events: dict[str, dict[datetime, Event]]
) -> None:
    """Adds the bars and events of one file to those of the others. A row without either says nothing,
    whatever else it has: so the third line of yfinance's heading, too, is passed over, and so are footers.
    """
    rows, has_prices = rows_of(file), False
    line, first = next(rows, (1, [""]))
    heading, ahead = [first], list(islice(rows, 1))
    if ahead and is_second_heading(ahead[0][1]):
        heading.append(ahead.pop()[1])
    try:
        layout, width = layout_of(heading, file.stem), max(map(len, heading))
        for line, row in chain(ahead, rows):  # noqa: B007 - the refusal names the line.
            if row in heading:  # Files that were joined repeat it.
                continue
            if any(row[width:]):
                raise ValueError("it has more cells than the heading")
            row += [""] * (width + 1)
            for ticker, columns in layout.bars.items():
                if bar := bar_of(row, columns, layout):
                    has_prices = True
                    ticker = ticker or ticker_from(row[layout.ticker])
                    known = market[ticker].setdefault(bar.timestamp, bar)
                    if known is not bar:
                        market[ticker][bar.timestamp] = the_one_of(known, bar, ticker)
            for ticker, columns in layout.events.items():
                event = event_from(*[row[column] for column in columns])
                if event != NO_EVENT:
                    ticker, moment = ticker or ticker_from(row[layout.ticker]), moment_of(row, layout)
                    known = events[ticker].get(moment, NO_EVENT)
                    events[ticker][moment] = both_of(known, event, ticker, moment)
        if not has_prices:
            raise ValueError("it has no prices")
    except ValueError as error:
        raise BadFile(f"{file}, line {line}: {error}.") from None


def rows_of(file: Path) -> Iterator[tuple[int, list[str]]]:
    """The line number and the cells of each row that has any. A `,` that parts none is a decimal comma."""
    with open(file, "rb") as data:
        encoding = "utf-16" if data.read(2) in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    with open(file, encoding=encoding, errors="replace") as lines:
        first = next((line for line in lines if line.strip()), "")
        separator = max(",;\t", key=first.count)
        lines.seek(0)
        for number, line in enumerate(lines, 1):
            try:
                if "\0" in line or "\ufffd" in line:
                    raise ValueError("it has a byte that is no text")
                if separator != ",":
                    line = line.replace(",", ".")
                if line.count('"') % 2:
                    raise ValueError("a quote is not closed")
                row = line.split(separator)
                if '"' in line:
                    row = next(csv.reader([line], delimiter=separator, skipinitialspace=True))
            except (ValueError, csv.Error) as error:
                raise BadFile(f"{file}, line {number}: {error}.") from None
            row = [cell.strip() for cell in row]
            if any(row):
                yield number, row


def is_second_heading(row: list[str]) -> bool:
    """Whether a second line goes on with the heading, as pandas writes it for tables of several tickers."""
    if row[0].lower() in {"ticker", "price", "symbols", "attributes"}:
        return True
    others = [cell for cell in row[1:] if cell]
    return not row[0] and not any(NUMBER.fullmatch(cell) or cell.lower() in NOTHING for cell in others)


def layout_of(heading: list[list[str]], file_ticker: str) -> Layout:
    """Where files with this heading have what. Columns come in any order and case; others are ignored.
    Beside the prices, though not in wide files, may be dividend (or dividends) and split (or splits, or
    yfinance's Stock Splits).

    A price a row    timestamp,ticker,price
    Bars             date,ticker,open,high,low,close,volume (or symbol)
    Bars of one      date,open,high,low,close,volume (the file is called AAPL.csv; price is close here, too)
    Wide             date,AAPL,IBM
    yfinance's       Price,Close,Close,Open,Open   or   Ticker,AAPL,AAPL,IBM,IBM
                     Ticker,AAPL,IBM,AAPL,IBM           Price,Open,Close,Open,Close
    """
    width = max(map(len, heading))
    heading = [row + [""] * (width - len(row)) for row in heading]
    names = [[cell.strip("<> ").lower() for cell in row] for row in heading]
    time = [row.index(name) for name in TIMES for row in names if name in row]
    both = len(time) == 2 and {"date", "time"} <= set(names[0])  # As in MetaTrader's and Stooq's files.
    time, time_is_named = time[: both + 1], bool(time)
    if not time_is_named:
        unnamed = [column for column, name in enumerate(names[0][:2]) if name in UNNAMED]
        if not unnamed and len(heading) == 1:
            raise ValueError("there is no column timestamp, time, date or datetime")
        time = [max(unnamed, default=0)]

    ticker, fields, tickers = -1, names[0], [file_ticker] * width
    if len(heading) == 2:  # The first column is the index, whatever the two lines call it.
        fields, tickers = names[1], heading[0]
        if {"close", "price"} & set(names[0]):
            fields, tickers = names[0], heading[1]
        fields = ["", *fields[1:]]
    elif {"ticker", "symbol"} & set(fields):
        ticker, tickers = fields.index("ticker" if "ticker" in fields else "symbol"), [None] * width
    elif not {"close", "price"} & set(fields) and not {"open", "high", "low"} <= set(fields):
        fields = ["close" if TICKER.fullmatch(n) and n not in NOT_TICKERS else "" for n in fields]
        tickers = heading[0]

    bars: dict[str | None, list[int]] = defaultdict(lambda: [-1] * len(FIELDS))
    events: dict[str | None, list[int]] = defaultdict(lambda: [-1] * len(NO_EVENT))
    for column, (name, field) in enumerate(zip(tickers, fields, strict=True)):
        if field == "price" and "close" not in fields:
            field = "close"
        if (field in FIELDS or field in EVENTS) and name != "":
            name = name and ticker_from(name)
            columns = (bars if field in FIELDS else events)[name]
            place = FIELDS.index(field) if field in FIELDS else EVENTS[field]
            if columns[place] >= 0:
                raise ValueError(f"there are two columns {field}" + (f" of {name}" if name else ""))
            columns[place] = column
    bars = {name: columns for name, columns in bars.items() if columns[FIELDS.index("close")] >= 0}
    if not bars:
        raise ValueError("there is no column close or price")
    return Layout(time, time_is_named, ticker, bars, {name: events[name] for name in bars if name in events})


def bar_of(row: list[str], columns: list[int], layout: Layout) -> Bar | None:
    """The bar in those columns of a row, if there is a price. Prices that it lacks are its close. Its high
    and low embrace its open and close, which adjusted prices miss in the last digit.
    """
    open, high, low, close, volume = [row[column] for column in columns]
    close = price_from(close)
    if not close:
        return None
    moment = moment_of(row, layout)
    if not (open or high or low or volume):  # As in most files, and quicker.
        return Bar(moment, close, close, close, close, ZERO)
    open = price_from(open) or close
    high = max(price_from(high) or close, open, close)
    low = min(price_from(low) or close, open, close)
    return Bar(moment, open, high, low, close, amount_from(volume, "volume", VOLUME_LIMIT))


def moment_of(row: list[str], layout: Layout) -> datetime:
    time = " ".join(row[column] for column in layout.time).strip()
    if not layout.time_is_named and len(time) < 8:
        raise ValueError(f"{time[:40]!r} is no time, and no column is called timestamp, time or date")
    return time_from(time)


def the_one_of(known: Bar, bar: Bar, ticker: str) -> Bar:
    """Which of two bars of one time counts: with the same close, the one that says more."""
    if known.close != bar.close:
        prices = f"{known.close.normalize():f} and {bar.close.normalize():f}"
        raise ValueError(f"{ticker} has two prices at {bar.timestamp.isoformat()}: {prices}")
    return max(known, bar, key=lambda bar: (bar.high - bar.low, bar.volume, bar))


def both_of(known: Event, event: Event, ticker: str, moment: datetime) -> Event:
    """What two rows of one time say together; what both say happened once."""
    for name, one, other, none in zip(("dividends", "splits", "splits"), known, event, NO_EVENT, strict=True):
        if one != other and none not in (one, other):
            ours = f"{written(one)} and {written(other)}"
            raise ValueError(f"{ticker} has two {name} at {moment.isoformat()}: {ours}")
    return Event(*(known[place] if known[place] != NO_EVENT[place] else event[place] for place in range(3)))


def written(amount: Decimal | Fraction) -> str:
    """A dividend as digits, a split as 10:1."""
    if isinstance(amount, Fraction):
        return f"{amount.numerator}:{amount.denominator}"
    return f"{amount.normalize():f}"


def put_in_force(bars: list[Bar], events: dict[datetime, Event]) -> None:
    """Gives the events of a ticker to its `bars`: each to that of its time, or else to the next."""
    for moment, event in sorted(events.items()):
        place = bisect_left(bars, moment, key=attrgetter("timestamp"))
        if place == len(bars):
            break
        bar, split = bars[place], event.split
        if split == ONE and place and moves_with(event.claimed, bars[place - 1], bar):
            split = event.claimed
        bar = bar._replace(dividend=bar.dividend + event.dividend, split=bar.split * split)
        if not (bar.dividend < MOST and is_ratio(bar.split)):
            raise ValueError(f"too many dividends or splits until {bar.timestamp.isoformat()}")
        bars[place] = bar


def moves_with(split: Fraction, before: Bar, bar: Bar) -> bool:
    """Whether the price moved by more than half of what the split makes of it, as logarithms go: then it is
    the split that has moved it.
    """
    moved = (Fraction(before.close) / Fraction(bar.open)) ** 2
    return moved > split > ONE or moved < split < ONE


@lru_cache(maxsize=10_000)
def ticker_from(text: str) -> str:
    """Yahoo's spelling of a ticker: BRK-B also for BRK.B and BRK/B, BTC-USD for BTC/USD."""
    if not TICKER.fullmatch(text):
        raise ValueError(f"{text[:40]!r} is no ticker")
    return re.sub(r"^([A-Z]{1,5})\.([ABC])$", r"\1-\2", text.upper().replace("/", "-"))


@lru_cache(maxsize=10_000)
def time_from(text: str) -> datetime:
    """A moment in UTC, which also holds where no zone is written. 20240308 is a date, other numbers are
    seconds since 1970, or milliseconds from 100,000,000,000 on.
    """
    try:
        date = DATE.fullmatch(text)
        if SECONDS.fullmatch(text) and not date:
            number = float(text)
            unit = "seconds" if abs(number) < 1e11 else "milliseconds"
            return EPOCH + timedelta(**{unit: number})
        iso = re.sub(r"^([0-9]{4})\.([0-9]{2})\.([0-9]{2})", r"\1-\2-\3", date[1] if date else text.upper())
        moment = datetime.fromisoformat(iso)
        return moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)
    except (ValueError, OverflowError):
        sentence = f"{text[:40]!r} is no time such as 2012-06-01T00:00:00Z in the years 1 to 9999"
        raise ValueError(sentence) from None


@lru_cache(maxsize=10_000)
def price_from(text: str) -> Decimal | None:
    price = number_from(text)
    if price is None:
        return None
    if not LEAST < price < MOST:
        raise ValueError(f"the price {text[:40]} is not above 0 and below 10000000000, to 8 decimals")
    return price.quantize(UNIT, ROUND_HALF_EVEN)


def amount_from(text: str, what: str, limit: Decimal) -> Decimal:
    amount = number_from(text) or ZERO
    if not ZERO <= amount < limit:
        raise ValueError(f"the {what} {text[:40]} is not from 0 to below {limit:.0f}")
    return amount.quantize(UNIT, ROUND_HALF_EVEN)


@lru_cache(maxsize=10_000)
def event_from(dividend: str, split: str, claimed: str) -> Event:
    """The event in these cells of a row; most have none."""
    return Event(amount_from(dividend, "dividend", MOST), split_from(split), split_from(claimed))


def split_from(text: str) -> Fraction:
    """So many new shares for an old one: 10:1 and 10.0 are ten. A number of which a ratio is written so is
    that ratio; 0 is no split.
    """
    ratio = RATIO.fullmatch(text)
    if ratio and int(ratio[2]):
        split = Fraction(int(ratio[1]), int(ratio[2]))
    else:
        number = number_from(text)
        if not number:
            return ONE
        split = simple_ratio(number) if UNIT < number <= SPLIT_LIMIT else Fraction()
    if not is_ratio(split):
        raise ValueError(f"the split {text[:40]} is not from 1:{SPLIT_LIMIT} to {SPLIT_LIMIT}:1")
    return split


def is_ratio(split: Fraction) -> bool:
    return 1 <= split * SPLIT_LIMIT <= SPLIT_LIMIT**2 and max(split.as_integer_ratio()) < TERM_LIMIT


def simple_ratio(number: Decimal) -> Fraction:
    """The ratio that was meant by a number from 0.00000001 to 10,000: 0.333333 and 0.3333333333333333 are
    one to three. No two ratios with terms up to 1,000 are the same number in six decimals; else a number
    means itself.
    """
    places = -number.as_tuple().exponent
    ratio = Fraction(round(number, min(max(places, 0), 20)))
    simple = ratio.limit_denominator(1000)
    lost = ratio / 2**52  # By whoever divided in floats,
    if places >= 6:
        lost += Fraction(1, 2 * 10 ** min(places, 20))  # and whoever rounded what was written.
    if simple.numerator <= 1000 and abs(simple - ratio) <= lost:
        return simple
    return Fraction(number.quantize(UNIT, ROUND_HALF_EVEN))


def number_from(text: str) -> Decimal | None:
    """A number as programs write it, 1.2345e-05 too, but not `inf`, `1_000` or digits of other scripts."""
    if NUMBER.fullmatch(text):
        return Decimal(text)
    if text.lower() in NOTHING:
        return None
    raise ValueError(f"{text[:40]!r} is no number")
