"""Splits, dividends and corrections come to the same whoever looks, and to what the broker on paper says.

Streams of random operations are played on a random market in which hardly ten bars pass without a split. What
came of each order, every row of the books, the cash, the holdings and the states must be equal to the last
digit to `oracle.py`, however often somebody looks.

Where the rules leave a question, the broker on paper takes it so:

- A row is booked for whoever holds the ticker, also where what it comes to is rounded down to nothing.
- A pin stays as it is through a split, which is booked at the recorded price.
- What is taken back on the way back is taken back in the opposite order, all of it where the clock arrives.
- Orders are changed in the order of their ids, and the cash must cover all that is held back after each of
  them. A sale holds back anew, too, what its least commission takes beyond its proceeds. An order that ends
  takes with it what a cancel would. It has its new numbers, but for one that cannot have such.
- A correction is made at the account's own time. It leaves open orders what they hold back, or is refused as
  a trade would be.
- An action that is too much for an account leaves its orders alone as well.
"""

import random
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from functools import partial
from itertools import cycle

import pytest
from cast import Server
from oracle import Broker, as_ratio, down, fixed, replay
from test_books_whoever_looks import (
    CASH,
    DEAR,
    FREE,
    Somebody,
    advance,
    cancel,
    differences,
    does,
    fills_compared,
    in_this_process,
    jump,
    let_go,
    named,
    near,
    nobody_looks,
    once,
    order,
    pin,
    play,
    played_on,
    rare,
    recorded_to,
    replace,
    seen,
    some_market,
    trade,
    twice,
    written,
)

SPLITS = ("10:1", "3:2", "1:8", "7:3", "1:3")
MONDAY = datetime(2024, 3, 4, tzinfo=UTC)


def hours(count):
    return [MONDAY + timedelta(hours=8 * n) for n in range(count)]


# ------------------------------------------------------------------------------------------ By hand


def market(*rows, ticker="ABC") -> tuple[dict, dict]:
    """A tape of one ticker and its actions, from (price, action) a row."""
    times = hours(len(rows))
    tape = {ticker: {time: (price,) * 4 for time, (price, _) in zip(times, rows, strict=True)}}
    return tape, {ticker: {time: action for time, (_, action) in zip(times, rows, strict=True)}}


def buy(quantity, **more):
    return "trade", {"ticker": "ABC", "action": "buy", "quantity": quantity} | more


def rests(action, quantity, kind, **prices):
    return "order", {"ticker": "ABC", "action": action, "order_type": kind, "quantity": quantity} | prices


def by_hand(*operations, rows, cash="1000", costs=FREE):
    tape, actions = market(*rows)
    return replay(tape, costs, cash, operations, actions)


def rows_of(picture, *names):
    return [tuple(str(row[name]) for name in names) for row in picture["fills"]]


DIVIDED = [("90", {}), ("30", {"dividend": "1.5", "split": "3:1"}), ("30", {})]


def test_paper_pays_a_dividend_on_the_shares_before_the_split_of_its_bar():
    picture = by_hand(buy("0.33333333"), ("advance", 1), rows=DIVIDED)
    assert rows_of(picture, "side", "quantity", "price", "market", "ratio", "total", "realized", "cash") == [
        ("buy", "0.33333333", "90.00000000", "90.00000000", "None", "29.99999970", "None", "970.00000030"),
        ("dividend", "0.33333333", "1.50000000", "30.00000000", "None", *["0.49999999"] * 2, "970.50000029"),
        ("split", "0.33333333", *["30.00000000"] * 2, "3:1", *["0E-8"] * 2, "970.50000029"),
    ]
    assert picture["holdings"] == {"ABC": tuple(map(Decimal, ("0.99999999", "29.9999997", "0.99999999")))}


def test_paper_pays_out_what_a_split_rounds_off():
    rows = [("7", {}), ("3", {"split": "7:3"}), ("24", {"split": "1:8"})]
    picture = by_hand(buy("0.00000002"), ("advance", 2), rows=rows)
    assert rows_of(picture, "side", "quantity", "total", "realized", "ratio") == [
        ("buy", "2E-8", "1.4E-7", "None", "None"),
        ("split", "2E-8", "2E-8", "2E-8", "7:3"),  # 4.67 became 4; 0.67 at 3 dollars are 2.
        ("split", "4E-8", "1.2E-7", "-2E-8", "1:8"),  # 0.5 became 0; 0.5 at 24 dollars are 12.
    ]
    assert picture["holdings"] == {}


def test_paper_takes_splits_back_and_dividends_not():
    rows = [("60", {}), ("6", {"split": "10:1"}), ("4", {"split": "3:2", "dividend": "1"}), ("4", {})]
    there, back = ("clock", hours(4)[3]), ("clock", hours(1)[0])
    picture = by_hand(buy("1"), there, back, rows=rows)
    assert rows_of(picture, "side", "quantity", "price", "ratio", "cash", "time") == [
        ("buy", "1.00000000", "60.00000000", "None", "940.00000000", str(hours(4)[0])),
        ("split", "1.00000000", "6.00000000", "10:1", "940.00000000", str(hours(4)[1])),
        ("dividend", "10.00000000", "1.00000000", "None", "950.00000000", str(hours(4)[2])),
        ("split", "10.00000000", "4.00000000", "3:2", "950.00000000", str(hours(4)[2])),
        ("split", "15.00000000", "6.00000000", "2:3", "950.00000000", str(hours(4)[0])),
        ("split", "10.00000000", "60.00000000", "1:10", "950.00000000", str(hours(4)[0])),
    ]
    assert picture["holdings"] == {"ABC": (1, 60, 1)}


def test_paper_changes_orders_at_a_split_and_holds_back_anew():
    rows = [("90", {}), ("30", {"split": "3:1"}), ("30", {})]
    exits = {"take_profit": {"limit_price": "100"}, "stop_loss": {"stop_price": "50"}}
    entry = rests("buy", "0.33333333", "limit", limit_price="80", **exits)
    trailing = rests("buy", "1", "trailing_stop", trail_amount="20")
    picture = by_hand(entry, trailing, ("advance", 1), rows=rows, costs=("0", "1", "0"))
    told = [(o["quantity"], o["limit_price"], o["stop_price"], o["reserved_cash"]) for o in picture["orders"]]
    assert [[n and str(n.normalize()) for n in numbers] for numbers in told] == [
        ["0.99999999", "26.66666667", None, "27.66666641"],  # 26.666666403..., and a dollar of commission
        ["0.99999999", "33.33333333", None, 0],
        ["0.99999999", None, "16.66666667", 0],
        ["3", None, "36.66666667", "115.40000002"],  # 3 at 38.13333334 at the most, 4 % above its stop
    ]
    assert [o["status"] for o in picture["orders"]] == ["open", "held", "held", "open"]


@pytest.mark.parametrize(
    ("order", "ratio"),
    [
        (rests("buy", "0.00000007", "limit", limit_price="80"), "1:8"),
        (rests("buy", "2", "limit", limit_price="0.00000005"), "10:1"),
        (rests("buy", "2000000000", "limit", limit_price="0.00000007"), "10:1"),
        (rests("buy", "2", "stop", stop_price="200"), "1:100000000"),
        (rests("buy", "2", "trailing_stop", trail_amount="0.00000004"), "10:1"),
    ],
)
def test_paper_ends_an_order_that_a_split_makes_impossible(order, ratio):
    picture = by_hand(order, ("advance", 1), rows=[("90", {}), ("90", {"split": ratio})])
    assert [o["status"] for o in picture["orders"]] == ["canceled"]
    assert picture["reserved"] == 0


def test_paper_ends_an_order_for_which_rounding_leaves_too_little_cash():
    rows = [("30", {}), ("10", {"split": "3:1"})]
    lots = rests("buy", "100", "limit", limit_price="0.05")  # In thirds 0.01666667, 5.00000001 for them all
    for cash, status in (("5.00000000", "canceled"), ("5.00000100", "open")):
        picture = by_hand(lots, ("advance", 1), rows=rows, cash=cash)
        assert [o["status"] for o in picture["orders"]] == [status]


def test_paper_gives_and_takes_at_a_correction():
    given = ("correct", {"ticker": "ABC", "quantity": "2", "cash": "-1.5", "reason": "a rename"})
    taken = ("correct", {"ticker": "ABC", "quantity": "-1", "cash": "40", "reason": "a merger"})
    too_much = ("correct", {"ticker": "ABC", "quantity": "-3", "cash": "0", "reason": "too much"})
    held = rests("sell", "2", "limit", limit_price="99")
    rows = [("90", {})]
    picture = by_hand(buy("1"), given, taken, too_much, held, taken, rows=rows)
    assert picture["outcomes"] == [True, True, True, "insufficient_shares", 1, "insufficient_shares"]
    assert rows_of(picture, "quantity", "price", "total", "realized", "cash", "reason")[1:] == [
        ("2.00000000", "None", "-1.50000000", "-1.50000000", "908.50000000", "a rename"),
        ("-1.00000000", "None", "40.00000000", "10.00000000", "948.50000000", "a merger"),
    ]


# ---------------------------------------------------------------------------------- At the limits

EDGES = {
    "ABC": ("90", "1:8"),
    "TENS": ("90", "10:1"),
    "MANY": ("90", "1:10000"),
    "DUST": ("0.00000001", "10:1"),
}


def edges() -> tuple[dict, dict]:
    """A bar for buying, one with a split, and one with a dividend of 20 dollars that few can be paid."""
    times, tape, actions = hours(3), {}, {}
    for ticker, (price, ratio) in EDGES.items():
        tape[ticker] = {time: (price,) * 4 for time in times}
        actions[ticker] = {times[1]: {"split": ratio}, times[2]: {"dividend": "20"}}
    return tape, actions


def of(ticker, *operations):
    return [(what, body | {"ticker": ticker}) for what, body in operations]


EXITS = {"take_profit": {"limit_price": "99"}, "stop_loss": {"stop_price": "0.00000004"}}
AT_THE_LIMITS = [
    of("ABC", rests("buy", "0.00000007", "limit", limit_price="80")),
    of("ABC", rests("buy", "0.00000008", "limit", limit_price="80")),
    of("ABC", buy("0.00000007"), rests("sell", "0.00000007", "limit", limit_price="100")),
    of("ABC", buy("0.00000009"), rests("sell", "0.00000007", "limit", limit_price="100")),
    of("ABC", buy("0.00000008"), rests("sell", "0.00000008", "stop", stop_price="50")),
    of("TENS", rests("buy", "2", "limit", limit_price="0.00000005")),
    of("TENS", rests("buy", "2", "limit", limit_price="0.00000006")),
    of("TENS", rests("buy", "1000000000", "limit", limit_price="0.00000007")),
    of("TENS", rests("buy", "999999999.99999999", "limit", limit_price="0.00000007")),
    of("TENS", rests("buy", "2", "trailing_stop", trail_amount="0.00000004")),
    of("TENS", rests("buy", "2", "limit", limit_price="0.00000009", **EXITS)),
    of("TENS", rests("buy", "2", "limit", limit_price="0.00000005", **EXITS)),
    of("TENS", buy("2"), rests("sell", "2", "limit", limit_price="99", stop_loss=EXITS["stop_loss"])),
    of("MANY", rests("buy", "0.0001", "stop", stop_price="1000000")),
    of("MANY", rests("buy", "0.0001", "stop", stop_price="999999.99999999")),
    of("MANY", rests("buy", "0.0001", "stop_limit", stop_price="200", limit_price="1000000")),
    of("DUST", buy("8999999999.99999999"), rests("sell", "1", "limit", limit_price="5")),
    of("DUST", buy("9000000000"), rests("sell", "1", "limit", limit_price="5")),
]


@pytest.mark.parametrize("costs", [FREE, DEAR], ids=["free", "with costs"])
def test_what_a_split_makes_impossible_ends_and_harms_nothing(new_database, tmp_path, costs):
    tape, actions = edges()
    file = recorded_to(tmp_path / "edges.csv", tape, actions)
    with in_this_process(new_database().migrate(), file, costs) as new_account:
        for operations in AT_THE_LIMITS:
            operations = [("clock", hours(1)[0]), *operations, ("advance", 1), ("advance", 1)]
            expected = replay(tape, costs, CASH, operations, actions)
            answer = play(new_account(), operations, nobody_looks)
            assert differences(answer, expected) == [], operations


# -------------------------------------------------------------------------------------- At random


def recorded_splits(seed=19, bars=140) -> tuple[dict, dict]:
    """Prices as they were, with a split or a dividend every few bars, and sometimes both."""
    chance, times = random.Random(seed), hours(bars)
    tape, actions = {}, {}
    for ticker, (price, digits) in {"TENS": (300, 2), "AAPL": (90, 8), "BITS": (0.7, 8)}.items():
        splits = cycle(chance.sample(SPLITS, len(SPLITS)))
        tape[ticker], actions[ticker], close = {}, {}, price
        for time in times:
            if time > times[2] and chance.random() < 0.1:
                continue
            action = {}
            if chance.random() < 0.1:
                dollars = written(close * chance.uniform(0, 0.03), chance.choice([2, 8]))
                action |= {"dividend": dollars} if float(dollars) else {}
            if chance.random() < 0.13:
                action["split"] = next(splits)
                close /= as_ratio(action["split"])
            walk = [close := close * chance.lognormvariate(0, 0.02) for _ in range(4)]
            bar = walk[0], max(walk), min(walk), close
            tape[ticker][time] = tuple(f"{price:.{digits}f}" for price in bar)
            actions[ticker] |= {time: action} if action else {}
    return tape, actions


TAPE, ACTIONS = recorded_splits()


@pytest.fixture(scope="module")
def split_file(tmp_path_factory):
    return recorded_to(tmp_path_factory.mktemp("market") / "market.csv", TAPE, ACTIONS)


def stream(seed, costs, length=45):
    return played_on(Broker(TAPE, costs, CASH, ACTIONS), random.Random(seed), anything, length)


def anything(chance, broker):
    kinds = {order: 40, all_in: 3, trade: 14, correct: 8, cancel: 2, replace: 4}
    kinds |= {advance: 28, jump: 8, pin: 1, let_go: 1, rare: 1}
    return chance.choices(list(kinds), list(kinds.values()))[0](chance, broker)


def all_in(chance, broker):
    """An order that holds back all the cash there is: rounding at a split may leave too little for it."""
    ticker, price = some_market(chance, broker)
    limit = near(chance, price, 0.5, 0.99)
    free = broker.cash() - broker.reserved_cash()
    quantity = down((free - broker.least) / (1 + broker.bps / 10_000) / Fraction(limit))
    body = {"ticker": ticker, "action": "buy", "order_type": "limit", "limit_price": limit}
    return ("order", body | {"quantity": str(fixed(quantity))}) if quantity > 0 else None


def correct(chance, broker):
    ticker, _ = some_market(chance, broker)
    held = float(broker.holding(ticker)[0])
    taken = [written(-held * part) for part in (0.3, 0.9, 1.0, 1.1)]
    quantity = chance.choice(["0", "0.33333333", "7", *taken])
    cash = chance.choice(["0", written(chance.uniform(-300, 300), chance.choice([2, 8])), "-20000"])
    body = {"ticker": ticker, "quantity": quantity, "cash": cash, "reason": "a delisting"}
    return ("correct", body) if float(quantity) or float(cash) else None


@pytest.mark.parametrize("costs", [FREE, DEAR], ids=["free", "with costs"])
def test_splits_come_to_the_same_whoever_looks(new_database, engine_name, split_file, costs):
    """On SQLite each stream is played twice, on PostgreSQL other streams are, once each."""
    sqlite = engine_name == "sqlite"
    seeds = range(7) if sqlite else range(100, 105)
    with in_this_process(new_database().migrate(), split_file, costs) as new_account:
        looks = twice if sqlite else once
        fills = fills_compared(new_account, partial(stream, costs=costs), seeds, looks)
    assert min(fills[side] for side in ("buy", "sell", "split", "dividend", "correction")) > 2


def test_splits_come_to_the_same_over_two_workers(new_database, split_file):
    database = new_database().migrate()
    with Server(database.url, SAMPLE_MARKET=split_file, CORPORATE_ACTIONS="on", **named(DEAR)) as server:

        def new_account():
            trader = server.trader(cash=CASH)
            return Somebody(trader.ask, database, trader.user_id)

        assert fills_compared(new_account, partial(stream, costs=DEAR), range(200, 201), twice)["split"] > 5


def test_the_books_hold_at_every_step(new_database, split_file):
    with in_this_process(new_database().migrate(), split_file, DEAR) as new_account:
        for seed in (300,):
            operations, _ = stream(seed, DEAR)
            trader, broker, outcomes, expected = new_account(), Broker(TAPE, DEAR, CASH, ACTIONS), [], []
            for operation in operations:
                expected.append(broker.asked(operation))
                outcomes.append(does(trader, nobody_looks, *operation))
                answer = seen(trader, outcomes, range(1, broker.run + 1))
                told = differences(answer, broker.picture() | {"outcomes": expected})
                assert told == [], f"seed {seed}, after {operation}"
                summary = trader.get("/account/history")["summary"]
                rows = [f for f in broker.fills if f["run"] == broker.run]
                assert summary["trades"] == sum(f["side"] in ("buy", "sell") for f in rows)
                assert summary["dividends"] == sum(f["total"] for f in rows if f["side"] == "dividend")


# ----------------------------------------------------------------------- On a market that stands still

ROUND = (*SPLITS, "1:10", "2:3", "8:1", "3:7", "3:1")


def standing_still(bars=90) -> tuple[dict, dict]:
    """Prices that change at splits alone, and exactly. After ten splits they are where they were."""
    tape, actions = {}, {}
    for turn, (ticker, price) in enumerate({"ABC": Fraction(210), "XYZ": Fraction(777, 100)}.items()):
        splits = cycle(ROUND)
        tape[ticker], actions[ticker] = {}, {}
        for bar, time in enumerate(hours(bars)):
            if bar % (4 + turn) == 3:
                actions[ticker][time] = {"split": next(splits)}
                price /= as_ratio(actions[ticker][time]["split"])
            tape[ticker][time] = (str(fixed(price)),) * 4
    return tape, actions


@pytest.mark.parametrize("ways", ["forth", "forth and back"])
def test_the_curve_does_not_jump_at_a_split(new_database, tmp_path, ways):
    """Where prices change at splits alone, an account without costs is worth what it began with, always.

    A row of the books may round off 10^-8 dollars, and so may the value of a holding. On the way back all is
    booked at the price of where the clock arrives: there a row may be wrong by 10^-8 shares.
    """
    tape, actions = standing_still()
    file = recorded_to(tmp_path / "still.csv", tape, actions)
    kinds = {order: 4, all_in: 1, at_market: 6, cancel: 1, advance: 6, jump if "back" in ways else leap: 3}
    dearest = max(Decimal(bar[0]) for bars in tape.values() for bar in bars.values())
    a_row = Decimal("1e-8") * (1 + dearest if "back" in ways else 1)

    def anything(chance, broker):
        return chance.choices(list(kinds), list(kinds.values()))[0](chance, broker)

    def assert_worth_what_it_began_with(trader, points):
        rows = len(trader.get("/trades", limit=500)["trades"])
        assert [p for p in points if abs(p["equity"] - Decimal(CASH)) > (rows + 2) * a_row] == []

    splits = 0
    with in_this_process(new_database().migrate(), file, FREE) as new_account:
        for seed in range(2):
            broker, trader = Broker(tape, FREE, CASH, actions), new_account()
            operations, expected = played_on(broker, random.Random(seed), anything, 40)
            for operation in operations:
                does(trader, nobody_looks, *operation)
                assert_worth_what_it_began_with(trader, [trader.get("/portfolio")])
            history = trader.get("/account/history", resolution="bar")
            assert_worth_what_it_began_with(trader, history["points"])
            splits += sum(fill["side"] == "split" for fill in expected["fills"])
    assert splits > 10


def leap(chance, broker):
    here = broker.times.index(broker.clock)
    return "clock", broker.times[min(here + chance.choice([3, 10]), len(broker.times) - 1)]


def at_market(chance, broker):
    what, body = trade(chance, broker)
    return what, {name: value for name, value in body.items() if name != "price"}
