"""Orders that rest come to the same whoever looks, and when, and to what the broker on paper says.

Streams of random operations are played on a random market, once without a look in between, once a bar at a
time with a look at every bar, and once with looks at random. What came of each order, every fill, the cash,
the holdings and the states must be equal to the last digit, to each other and to `oracle.py`.
"""

import csv
import random
import sqlite3
from collections import Counter
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from functools import partial
from itertools import zip_longest

import pytest
from cast import ADMIN, Server, exact, loaded
from oracle import Broker, No, fixed
from sqlalchemy import event

CASH = "8000"
FREE, DEAR = ("0", "0", "0"), ("7.5", "1.25", "12.5")
TICKERS = {"AAPL": (100, 2), "BTC-USD": (27_000, 8), "PENNY": (Decimal("0.07"), 6), "LATE": (40, 4)}

LATE = 15  # Bars before its first. No jump goes back there: a ticker that vanishes is another story.


def recorded_market(seed=5, bars=220) -> dict:
    """Some bars a day, some of them missing, with gaps between one and the next."""
    chance, times = random.Random(seed), []
    day = datetime(2024, 3, 4, 14, tzinfo=UTC)
    while len(times) < bars:
        times += [day + timedelta(hours=2 * n) for n in range(chance.randint(1, 4))]
        day += timedelta(days=1)
    tape = {}
    for ticker, (price, digits) in TICKERS.items():
        rows, close = {}, float(price)
        for time in times[LATE if ticker == "LATE" else 0 :]:
            walk = [close := close * chance.lognormvariate(0, 0.02) for _ in range(4)]
            if chance.random() < 0.85:
                o, c = walk[0], walk[-1]
                rows[time] = tuple(f"{x:.{digits}f}" for x in (o, max(walk), min(walk), c))
        tape[ticker] = rows
    return tape


TAPE = recorded_market()


@pytest.fixture(scope="module")
def market_file(tmp_path_factory):
    return recorded_to(tmp_path_factory.mktemp("market") / "market.csv", TAPE)


def recorded_to(file, tape, actions=None):
    with open(file, "w", newline="") as opened:
        rows = csv.writer(opened)
        rows.writerow(["timestamp", "ticker", "open", "high", "low", "close", "dividend", "split"])
        for ticker, bars in tape.items():
            for time, bar in bars.items():
                action = (actions or {}).get(ticker, {}).get(time, {})
                rows.writerow([time.isoformat(), ticker, *bar, action.get("dividend"), action.get("split")])
    return file


# --------------------------------------------------------------------------- What somebody may do


def stream(seed: int, costs, length=38) -> tuple[list, dict]:
    """Operations that make some sense where the market stands, and what the broker on paper says of them."""
    return played_on(Broker(TAPE, costs, CASH), random.Random(seed), anything, length)


def played_on(broker, chance, anything, length) -> tuple[list, dict]:
    operations, outcomes = [], []
    while len(operations) < length:
        operation = first_of_all(chance, broker) if not operations else anything(chance, broker)
        if operation:
            operations.append(operation)
            outcomes.append(broker.asked(operation))
    return operations, broker.picture() | {"outcomes": outcomes}


def first_of_all(chance, broker):
    return "clock", chance.choice(broker.times[:-60])


def anything(chance, broker):
    kinds = {order: 60, trade: 7, cancel: 3, replace: 7, advance: 20, jump: 2, pin: 3, let_go: 2, rare: 1}
    return chance.choices(list(kinds), list(kinds.values()))[0](chance, broker)


def written(amount, digits=8) -> str:
    return f"{round(float(amount), digits):.{digits}f}"


def near(chance, price, low, high, exactly=()) -> str:
    """A price in the neighbourhood, or now and then one of those that would be met `exactly`."""
    if exactly and chance.random() < 0.2:
        return chance.choice(exactly)
    return written(float(price) * chance.uniform(low, high), chance.choice([2, 4, 8]) if price > 1 else 8)


def coming(broker, ticker) -> list[str]:
    """What the ticker will cost in the next few bars."""
    here = broker.times.index(broker.clock)
    rows = [broker.tape[ticker].get(time, ()) for time in broker.times[here : here + 6]]
    return [price for row in rows for price in row]


def some_market(chance, broker):
    ticker = chance.choice(list(broker.tape))
    try:
        return ticker, broker.price(ticker)
    except No:
        return ticker, None


def order(chance, broker):
    ticker, price = some_market(chance, broker)
    if price is None:
        return "order", {"ticker": ticker, "action": "buy", "order_type": "market", "quantity": "1"}
    action, kind = (
        side(chance, broker, ticker),
        chance.choice(["market", "limit", "limit", "limit", "stop", "stop_limit", "trailing_stop"]),
    )
    body = {"ticker": ticker, "action": action, "order_type": kind} | size(
        chance, broker, ticker, action, price
    )
    if kind == "market" and action == "buy" and chance.random() < 0.3:
        body["notional"] = written(chance.uniform(1, 3000), 2)
        del body["quantity"]
    ahead, behind = ((1.0, 1.04), (0.96, 1.0)) if action == "buy" else ((0.96, 1.0), (1.0, 1.04))
    if chance.random() < 0.15:
        ahead, behind = behind, ahead  # Which is due at once.
    if kind == "limit":
        body["limit_price"] = near(chance, price, *behind, coming(broker, ticker))
    if kind in ("stop", "stop_limit"):
        body["stop_price"] = near(chance, price, *ahead, coming(broker, ticker))
    if kind == "stop_limit":
        body["limit_price"] = near(chance, Fraction(body["stop_price"]), 0.98, 1.02)
    if kind == "trailing_stop" and chance.random() < 0.5:
        body["trail_percent"] = written(chance.uniform(0.5, 6), chance.choice([0, 2, 8]) or 1)
    elif kind == "trailing_stop":
        body["trail_amount"] = near(chance, price / 30, 0.2, 2)
    in_force = chance.choices(["gtc", "day", "ioc", "fok", None], [50, 12, 4, 4, 30])[0]
    body |= {"time_in_force": in_force} if in_force else {}
    if action == "buy" and chance.random() < 0.75 or (kind == "limit" and chance.random() < 0.5):
        body |= exits(chance, body, price)
    return "order", body


def exits(chance, body, price) -> dict:
    entry = Fraction(body.get("limit_price") or body.get("stop_price") or price)
    profit = {"take_profit": {"limit_price": near(chance, entry, 1.0, 1.03)}}
    loss = {"stop_loss": {"stop_price": near(chance, entry, 0.97, 1.0)}}
    if chance.random() < 0.3:
        loss["stop_loss"]["limit_price"] = near(chance, Fraction(loss["stop_loss"]["stop_price"]), 0.97, 1.0)
    if body["action"] == "sell":
        return loss
    return chance.choice([profit, loss, profit | loss, profit | loss, profit | loss])


def side(chance, broker, ticker) -> str:
    return "sell" if broker.available(ticker) > 0 and chance.random() < 0.6 else "buy"


def size(chance, broker, ticker, action, price) -> dict:
    dollars = chance.choice([chance.uniform(1, 4), chance.uniform(50, 2000), chance.uniform(50, 2000)])
    quantity = written(max(dollars / float(price), 1e-8), chance.choice([0, 3, 8]))
    if action == "sell":
        share = float(broker.available(ticker)) * chance.choice([0.25, 0.5, 0.9, 1.1])
        quantity = chance.choice([written(share, 3), written(share), "all"])
    return {"quantity": quantity if quantity == "all" or float(quantity) else written(dollars / float(price))}


def trade(chance, broker):
    ticker, price = some_market(chance, broker)
    if price is None:
        return None
    action = side(chance, broker, ticker)
    body = {"ticker": ticker, "action": action} | size(chance, broker, ticker, action, price)
    if chance.random() < 0.4:
        body["price"] = near(chance, price, *((0.999, 1.01) if action == "buy" else (0.99, 1.001)))
    elif chance.random() < 0.3:
        body = {"ticker": ticker, "action": action, "notional": written(chance.uniform(1, 2000), 2)}
    return "trade", body


def one_of_mine(chance, broker) -> int | None:
    """Mostly an order that is still open."""
    live = [o["number"] for o in broker.live()]
    all_of_them = [o["number"] for o in broker.orders]
    chosen = chance.choice(live if live and chance.random() < 0.9 else all_of_them or [0])
    return len(all_of_them) - chosen


def cancel(chance, broker):
    return "cancel", one_of_mine(chance, broker)


def replace(chance, broker):
    back = one_of_mine(chance, broker)
    if back >= len(broker.orders):
        return "replace", back, {"quantity": "1"}
    old, body = broker.orders[-1 - back], {}
    if chance.random() < (0.1 if old["parent"] else 0.5):
        body["quantity"] = written(float(old["quantity"]) * chance.uniform(0.5, 1.3), chance.choice([3, 8]))
    for name, member in (("limit", "limit_price"), ("stop", "stop_price")):
        if old[name] and chance.random() < 0.7:
            body[member] = near(chance, old[name], 0.97, 1.03)
    return ("replace", back, body) if body and float(body.get("quantity", 1)) else None


def advance(chance, broker):
    return "advance", chance.choice([1, 2, 4, 8])


def jump(chance, broker):
    here = broker.times.index(broker.clock)
    there = here + chance.choice([-20, -5, -1, 0, 1, 2, 10])
    all_are_known = max(min(rows) for rows in broker.tape.values())
    times = [time for time in broker.times[max(there, 0) :][:1] if time >= all_are_known]
    return ("clock", *times) if times else None


def pin(chance, broker):
    ticker, price = some_market(chance, broker)
    waiting = [
        str(fixed(o[name]))
        for o in broker.live()
        for name in ("limit", "stop")
        if o["ticker"] == ticker and o[name]
    ]
    return ("pin", ticker, near(chance, price, 0.92, 1.08, waiting)) if price else None


def let_go(chance, broker):
    return "let go", chance.choice(list(broker.pins or broker.tape))


def rare(chance, broker):
    return chance.choice([("cancel all",), ("reset", CASH)])


# ------------------------------------------------------------------------------------ How it is played


def play(trader, operations, look) -> dict:
    """Play the operations and answer all that is then to be seen, in the words of the broker on paper.

    `look(bars)` says how many bars to advance at a time, and may look at the account.
    """
    outcomes = [does(trader, look, *operation) for operation in operations]
    runs = range(1, 2 + sum(operation[0] == "reset" for operation in operations))
    return seen(trader, outcomes, runs)


def seen(trader, outcomes, runs) -> dict:
    orders = trader.all_of("orders", runs, status="all")
    numbers = {o["id"]: number for number, o in enumerate(orders, 1)}
    fills = trader.all_of("trades", runs)
    balance, portfolio = trader.get("/balance"), trader.get("/portfolio")
    assert balance["buying_power"] == balance["cash_balance"] - balance["reserved_cash"]
    assert trader.get("/account/audit")["differences"] == []
    return {
        "outcomes": [numbers.get(outcome, outcome) for outcome in outcomes],
        "cash": balance["cash_balance"],
        "reserved": balance["reserved_cash"],
        "realized": portfolio["realized_pnl"],
        "holdings": {
            h["ticker"]: (h["quantity"], h["cost_basis"], h["available_quantity"])
            for h in portfolio["holdings"]
        },
        "fills": [
            {
                "order": fill["order_id"] and numbers[fill["order_id"]],
                "run": fill["run"],
                "ticker": fill["ticker"],
                "side": fill["trade_type"],
                "quantity": fill["quantity"],
                "price": fill["price"],
                "market": fill["market_price"],
                "time": datetime.fromisoformat(fill["market_time"]),
                "total": fill["total_amount"],
                "commission": fill["commission"],
                "cash": fill["cash_balance"],
                "realized": fill["realized_pnl"],
                "ratio": fill["ratio"],
                "reason": fill["reason"],
                "source": fill["price_source"],
            }
            for fill in fills
        ],
        "orders": [
            {name: o[name] for name in SAME}
            | {
                "number": numbers[o["id"]],
                "parent": o["parent_id"] and numbers[o["parent_id"]],
                "replaces": o["replaces"] and numbers[o["replaces"]],
            }
            for o in orders
        ],
    }


SAME = (
    *("run", "ticker", "action", "order_type", "status", "quantity", "limit_price", "stop_price"),
    *("trail_percent", "trail_amount", "reserved_cash", "price"),
)


def does(trader, look, what, *rest):
    """The id of the order that was made, True if it was done, or the code of the refusal."""
    if what == "advance":
        bars = rest[0]
        while bars:
            step = look(trader, bars)
            answer = trader.send("POST", "/market/advance", {"bars": step})
            bars -= step
        return "code" not in answer or answer["code"]
    look(trader, 1)
    if what in ("cancel", "replace"):
        ids = trader.order_ids()
        path = f"/orders/{ids[-1 - rest[0]] if rest[0] < len(ids) else 10**15}"
    answer = {
        "order": lambda body: trader.send("POST", "/orders", body),
        "trade": lambda body: trader.send("POST", "/trade", body),
        "cancel": lambda back: trader.send("DELETE", path),
        "cancel all": lambda: trader.send("DELETE", "/orders"),
        "replace": lambda back, body: trader.send("PATCH", path, body),
        "clock": lambda time: trader.send("PUT", "/market/clock", {"at": time.isoformat()}),
        "pin": lambda ticker, price: trader.send("PUT", f"/market/prices/{ticker}", {"price": price}),
        "let go": lambda ticker: trader.send("DELETE", f"/market/prices/{ticker}"),
        "reset": lambda cash: trader.send("POST", "/account/reset", {"cash": cash}),
        "correct": lambda body: trader.is_corrected(body),
    }[what](*rest)
    return answer.get("code") or (answer["id"] if what in ("order", "replace") else True)


def nobody_looks(trader, bars):
    return bars


def somebody_looks_at_every_bar(trader, bars):
    trader.get("/balance")
    return 1


PLACES = ("/balance", "/portfolio", "/orders", "/trades", "/orders?status=all", "/account/history")


def somebody_looks_now_and_then(trader, bars):
    if trader.chance.random() < 0.4:
        trader.get(trader.chance.choice(PLACES))
    return trader.chance.randint(1, bars)


class Somebody:
    """Who trades; `ask(method, path, json=...)` asks the program, in this process or over HTTP."""

    def __init__(self, ask, database, user_id):
        self.ask, self.database, self.user_id = ask, database, user_id
        self.chance = random.Random(1)

    def send(self, method, path, body=None, **options):
        options |= {} if body is None else {"json": body}
        return exact(self.ask(method, f"/api/v1{path}", **options))

    def is_corrected(self, body):
        """By the admin."""
        headers = {"Authorization": f"Bearer {ADMIN}"}
        return self.send("POST", f"/users/{self.user_id}/corrections", body, headers=headers)

    def get(self, path, **query):
        query = "&".join(f"{name}={value}" for name, value in query.items())
        answer = self.send("GET", path + (f"?{query}" if query else ""))
        assert "code" not in answer, answer
        return answer

    def order_ids(self) -> list[str]:
        """Read behind the program's back: to ask it would be a look."""
        rows = "SELECT id FROM ibkr_orders WHERE user_id = :id ORDER BY id"
        return [str(id) for (id,) in self.database.run(rows, id=self.user_id)]

    def all_of(self, kind, runs, **query) -> list[dict]:
        """The account's orders or trades of these runs, the oldest first."""
        pages = [self.get(f"/{kind}", run=run, limit=500, **query)[kind] for run in runs]
        return [one for page in pages for one in reversed(page)]


def do_not_wait_for_the_disk(connection, _):
    """Nobody pulls the plug here."""
    sqlite = isinstance(connection, sqlite3.Connection)
    connection.cursor().execute("PRAGMA synchronous = OFF" if sqlite else "SET synchronous_commit = off")
    connection.commit()


def named(costs) -> dict:
    return dict(zip(("COMMISSION_BPS", "COMMISSION_MIN", "SLIPPAGE_BPS"), costs, strict=True))


@contextmanager
def in_this_process(database, market_file, costs):
    market = {"PRICE_SOURCES": "sample", "SAMPLE_MARKET": market_file, "RATE_LIMIT": "1000000000 per day"}
    with loaded(DATABASE_URL=database.url, ADMIN_API_KEY=ADMIN, **market, **named(costs)) as program:
        app, client = program["app"], program["app"].test_client()
        with app.app_context():
            event.listen(program["db"].engine, "connect", do_not_wait_for_the_disk)

        def new_account():
            with app.app_context():
                email = f"{random.getrandbits(64)}@example.com"
                user_id, key = program["User"].open(email, Decimal(CASH))
            own = {"Authorization": f"Bearer {key}"}

            def ask(method, path, headers=own, **options):
                return client.open(path, method=method, headers=headers, **options)

            return Somebody(ask, database, user_id)

        yield new_account
        with app.app_context():
            program["db"].engine.dispose()


def differences(seen: dict, expected: dict) -> list[str]:
    """What is not as the broker on paper has it, in the order in which it happened."""
    told = []
    for name in expected:
        both = seen[name], expected[name]
        if both[0] == both[1]:
            continue
        if isinstance(both[0], list):
            pairs = zip_longest(*both)
            told += [f"{name}[{i}]: {a} is not {b}" for i, (a, b) in enumerate(pairs) if a != b]
        else:
            told.append(f"{name}: {both[0]} is not {both[1]}")
    return told


def fills_compared(new_account, stream, seeds, looks) -> Counter:
    """Play streams, each with all of its `looks`, and answer how many rows of each kind were right."""
    fills = Counter()
    for seed in seeds:
        operations, expected = stream(seed)
        for look in looks(seed):
            come_to = play(new_account(), operations, look)
            assert differences(come_to, expected) == [], f"seed {seed}, {look.__name__}: {operations}"
            fills.update(fill["side"] for fill in come_to["fills"])
    return fills


def once(seed):
    return [somebody_looks_now_and_then if seed % 4 else somebody_looks_at_every_bar]


def twice(seed):
    return [nobody_looks, *once(seed)]


@pytest.mark.parametrize("costs", [FREE, DEAR], ids=["free", "with costs"])
def test_orders_come_to_the_same_whoever_looks(new_database, engine_name, market_file, costs):
    """What comes out is that of the broker on paper, and so the same on both databases and for all looks.

    On SQLite each stream is played twice, on PostgreSQL other streams are, once each.
    """
    sqlite = engine_name == "sqlite"
    seeds = range(28) if sqlite else range(200, 218)
    with in_this_process(new_database().migrate(), market_file, costs) as new_account:
        fills = fills_compared(new_account, partial(stream, costs=costs), seeds, twice if sqlite else once)
    assert fills.total() > (900 if sqlite else 300)


def test_orders_come_to_the_same_over_two_workers(new_database, market_file):
    database = new_database().migrate()
    with Server(database.url, SAMPLE_MARKET=market_file, **named(DEAR)) as server:

        def new_account():
            trader = server.trader(cash=CASH)
            return Somebody(trader.ask, database, trader.user_id)

        assert fills_compared(new_account, partial(stream, costs=DEAR), range(100, 103), twice).total() > 90
