"""What two accounts do alike on live prices comes to the same, though one is looked at all the time.

Splits and dividends are told at once or late. The clock is the test's own, and so are Yahoo's charts: what
yfinance makes of its answers is tried in test_splits_live.py.
"""

import json
import random
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from types import SimpleNamespace

import pytest
import time_machine
from cast import ADMIN, loaded

BEGIN = datetime(2026, 3, 2, 15, tzinfo=UTC)
MINUTES = [2, 5, 30, 120, 600, 1500]
STEPS = 40


@pytest.fixture(scope="module")
def live(new_database):
    """The program in this process: `prices`, `currencies` and `events` are what Yahoo says of each ticker.

    `connections` are those to the database that were in use, each time that Yahoo was asked.
    """
    settings = {"PRICE_SOURCES": "yahoo", "PRICE_CACHE_SECONDS": 60, "ADMIN_API_KEY": ADMIN}
    settings |= {"COMMISSION_BPS": "7.5", "SLIPPAGE_BPS": "5", "CORPORATE_ACTIONS": "on"}
    database = new_database().migrate()
    with loaded(DATABASE_URL=database.url, **settings) as program:
        prices, events, currencies, connections = {}, {}, {}, []
        client = program["app"].test_client()

        def chart(ticker, **period):
            connections.append(program["db"].engine.pool.checkedout())
            meta = {"currency": currencies.get(ticker, "USD"), "regularMarketPrice": prices[ticker]}
            meta |= {"regularMarketTime": Decimal(int(datetime.now(UTC).timestamp()))}
            return {"meta": meta, "events": events.get(ticker, {})}

        def ask(key, method, path, **body):
            headers = {"Authorization": f"Bearer {key}"}
            path = path if path.startswith("/") else f"/api/v1/{path}"
            answer = client.open(path, method=method, headers=headers, json=body or None)
            assert answer.status_code < 500, answer.text
            return json.loads(answer.text or "{}", parse_float=Decimal)

        program["market"].yahoo.chart = chart
        said = {"prices": prices, "events": events, "currencies": currencies}
        yield SimpleNamespace(**said, connections=connections, ask=ask, database=database)
        with program["app"].app_context():
            program["db"].engine.dispose()


class Tape:
    """Prices that go up and down, and what its tickers split and pay, told at once or late."""

    def __init__(self, live, dice: random.Random, seed: int):
        self.live, self.dice, self.untold = live, dice, []
        self.prices = {f"X{seed}A": Decimal(100), f"X{seed}B": Decimal(100)}

    def goes_on(self, moment: datetime) -> None:
        for ticker, price in self.prices.items():
            self.prices[ticker] = max(price * Decimal(self.dice.randint(97, 103)) / 100, Decimal("0.01"))
        if self.dice.random() < 0.3:
            ticker, late = self.dice.choice([*self.prices]), self.dice.choice([0, 60, 300, 3000])
            happened = {"date": Decimal(int(moment.timestamp()) - 60)}
            if self.dice.random() < 0.5:
                new, old = self.dice.choice([(2, 1), (10, 1), (1, 3), (3, 2)])
                self.prices[ticker] *= Decimal(old) / new
                kind, what = "splits", {"numerator": Decimal(new), "denominator": Decimal(old)}
            else:
                kind, what = "dividends", {"amount": round(self.prices[ticker] / 50, 4) or Decimal("0.0001")}
                self.prices[ticker] *= Decimal("0.98")
            self.untold.append((moment + timedelta(minutes=late), ticker, kind, happened | what))
        for told in [one for one in self.untold if one[0] <= moment]:
            self.untold.remove(told)
            _, ticker, kind, event = told
            self.live.events.setdefault(ticker, {}).setdefault(kind, {})[str(event["date"])] = event
        self.live.prices |= {ticker: round(price, 4) for ticker, price in self.prices.items()}

    def near(self, ticker: str, low: float, high: float) -> str:
        return str(round(self.prices[ticker] * Decimal(str(self.dice.uniform(low, high))), 3) or "0.001")


def something_to_do(dice: random.Random, tape: Tape) -> tuple:
    """A trade, an order, or of an open one its place and how it is to change, if not to be canceled."""
    ticker, quantity = dice.choice([*tape.prices]), str(dice.randint(1, 60))
    action = dice.choice(["buy", "buy", "sell"])
    same = {"ticker": ticker, "action": action, "quantity": quantity}
    kinds = "limit limit stop stop_limit trailing_stop trade cancel limit_price quantity"
    kind = dice.choice(kinds.split())
    if kind in ("cancel", "limit_price", "quantity"):
        change = {"limit_price": tape.near(ticker, 0.9, 1.1)} if kind == "limit_price" else {}
        return dice.randint(0, 20), change | ({"quantity": quantity} if kind == "quantity" else {})
    if kind == "trade":
        return "trade", same
    prices = {"limit_price": tape.near(ticker, 0.93, 1.05), "stop_price": tape.near(ticker, 0.95, 1.05)}
    names = {"limit": ["limit_price"], "stop": ["stop_price"], "stop_limit": [*prices]}.get(kind, [])
    order = same | {"order_type": kind} | {name: prices[name] for name in names}
    order |= {} if names else {"trail_percent": dice.randint(1, 5)}
    if names and action == "buy" and dice.random() < 0.6:
        order["take_profit"] = {"limit_price": tape.near(ticker, 1.05, 1.15)}
        order["stop_loss"] = {"stop_price": tape.near(ticker, 0.85, 0.94)}
    return "orders", order | ({"time_in_force": "day"} if dice.random() < 0.2 else {})


def does(live, key: str, what, body: dict) -> tuple:
    if isinstance(what, int):
        orders = live.ask(key, "GET", "orders?limit=500")["orders"]
        if not orders:
            return ()
        path = f"orders/{orders[what % len(orders)]['id']}"
        answer = live.ask(key, "PATCH" if body else "DELETE", path, **body)
    else:
        answer = live.ask(key, "POST", what, **body)
    return answer.get("code"), answer.get("status"), answer.get("quantity")


def story_of(live, key: str) -> tuple:
    """All orders, trades and holdings, without their numbers and the moments of the wall clock."""
    told = ("order_type", "action", "quantity", "limit_price", "stop_price", "status", "reserved_cash")
    orders = live.ask(key, "GET", "orders?status=all&limit=500")["orders"]
    booked = ("trade_type", "ticker", "quantity", "price", "total_amount", "realized_pnl", "market_time")
    trades = live.ask(key, "GET", "trades?limit=500")["trades"]
    portfolio = live.ask(key, "GET", "portfolio")
    assert all(held["available_quantity"] >= 0 for held in portfolio["holdings"])
    assert live.ask(key, "GET", "account/audit")["ok"]
    return (
        [tuple(order[name] for name in told) for order in orders],
        [tuple(trade[name] for name in booked) for trade in trades],
        portfolio["cash_balance"],
        portfolio["holdings"],
    )


@pytest.mark.parametrize("seed", range(6, 14))
def test_what_two_do_alike_comes_to_the_same_whoever_is_looked_at(live, seed):
    dice, moment = random.Random(seed), BEGIN + timedelta(days=200 * seed)
    tape = Tape(live, dice, seed)
    with time_machine.travel(moment, tick=True) as clock:
        left_alone, looked_at, another = (
            live.ask(ADMIN, "POST", "users", email=f"{name}{seed}@example.com", cash=20_000)["api_key"]
            for name in ("alone", "looked", "another")
        )
        for _ in range(STEPS):
            moment += timedelta(minutes=dice.choice(MINUTES))
            clock.move_to(moment)
            tape.goes_on(moment)
            for ticker in tape.prices:
                live.ask(another, "GET", f"price/{ticker}")
            live.ask(looked_at, "GET", "balance")
            if dice.random() < 0.55:
                what, body = something_to_do(dice, tape)
                assert does(live, left_alone, what, body) == does(live, looked_at, what, body)
        alone, looked = story_of(live, left_alone), story_of(live, looked_at)
        assert alone == looked
        assert len(alone[1]) > 3


def test_nobody_keeps_a_connection_to_the_database_while_a_source_is_asked(live):
    """A process has four, and Yahoo may take seconds: all others would wait with those who ask."""
    live.prices |= dict.fromkeys(("HELD", "WAITS", "ENDED", "MOVED"), Decimal(100))
    moment = BEGIN - timedelta(days=400)
    with time_machine.travel(moment, tick=True) as clock:
        key = live.ask(ADMIN, "POST", "users", email="waits@example.com")["api_key"]
        live.ask(key, "POST", "trade", ticker="HELD", action="buy", quantity=10)
        rests = {"action": "buy", "quantity": 1, "ticker": "WAITS", "order_type": "limit", "limit_price": 1}
        order = live.ask(key, "POST", "orders", **rests)["id"]
        ended = live.ask(key, "POST", "orders", **rests | {"ticker": "ENDED"})["id"]
        uuid = live.ask(key, "GET", "/alpaca/v2/orders")[0]["id"]
        live.ask(key, "DELETE", f"orders/{ended}")
        live.ask(key, "GET", "price/MOVED")
        live.database.run("UPDATE ibkr_quotes SET source = 'alpha_vantage' WHERE ticker = 'MOVED'")
        requests = [
            ("GET", "price/MOVED", {}),  # From one source to another.
            ("PATCH", f"orders/{order}", {"limit_price": 2}),
            ("PATCH", f"orders/{ended}", {"limit_price": 2}),
            ("PATCH", f"/alpaca/v2/orders/{uuid}", {"limit_price": "2"}),
            ("POST", "orders", rests),
            ("POST", "trade", {"ticker": "HELD", "action": "buy", "quantity": 1}),
            ("POST", "/alpaca/v2/orders", {"symbol": "HELD", "side": "buy", "qty": "1", "type": "market"}),
            ("DELETE", "/alpaca/v2/positions/HELD?qty=1", {}),
            ("DELETE", "/alpaca/v2/positions", {}),
            ("POST", "trade", {"ticker": "HELD", "action": "buy", "quantity": 1}),
            *(("GET", path, {}) for path in ("portfolio", "balance", "account/history", "account/metrics")),
            *(("GET", path, {}) for path in ("price/HELD", "prices?tickers=HELD,WAITS", "account/audit")),
            *(("GET", f"/alpaca/v2/{path}", {}) for path in ("positions", "positions/HELD", "account")),
            *(("GET", f"/alpaca/v2/{path}", {}) for path in ("assets/HELD", "account/portfolio/history")),
        ]
        asked = {}
        for method, path, body in requests:
            moment += timedelta(minutes=2)
            clock.move_to(moment)
            live.events.setdefault("HELD", {}).setdefault("dividends", {})[path] = {
                "date": Decimal(int(moment.timestamp()) - 60),
                "amount": Decimal(1),
            }
            live.connections.clear()
            live.ask(key, method, path, **body)
            asked[method, path] = set(live.connections)
        assert {name: seen for name, seen in asked.items() if seen != {0}} == {}


def test_a_leg_that_was_replaced_before_a_late_split_is_for_as_many_shares_as_its_pair(live):
    live.prices["LATESPLIT"], moment = Decimal(100), BEGIN - timedelta(days=100)
    with time_machine.travel(moment, tick=True) as clock:
        key = live.ask(ADMIN, "POST", "users", email="late-split@example.com")["api_key"]
        exits = {"take_profit": {"limit_price": 150}, "stop_loss": {"stop_price": 9}}
        bought = {"ticker": "LATESPLIT", "action": "buy", "quantity": 10, "order_type": "market"}
        live.ask(key, "POST", "orders", **bought, **exits)
        clock.move_to(moment + timedelta(hours=1))  # The split is in force, and nobody has told it.
        live.prices["LATESPLIT"] = Decimal(10)
        (loss,) = [o for o in live.ask(key, "GET", "orders")["orders"] if o["order_type"] == "stop"]
        live.ask(key, "PATCH", f"orders/{loss['id']}", stop_price=5)
        clock.move_to(moment + timedelta(hours=2))
        happened = {"date": Decimal(int(moment.timestamp()) + 1800)}
        split = happened | {"numerator": Decimal(10), "denominator": Decimal(1)}
        live.events["LATESPLIT"] = {"splits": {"1": split}}
        live.ask(key, "GET", "price/LATESPLIT")
        orders = live.ask(key, "GET", "orders")["orders"]
        (held,) = live.ask(key, "GET", "portfolio")["holdings"]
        assert live.ask(key, "GET", "account/audit")["ok"]
    assert held["quantity"] == 100
    assert [order["quantity"] for order in orders] == [100, 100]


class Transferred:
    """Somebody to whom the admin has given shares, by a correction; they are quoted in another currency."""

    def __init__(self, live, ticker: str, price: int, currency: str, quantity: str):
        self.live, self.ticker = live, ticker
        opened = live.ask(ADMIN, "POST", "users", email=f"{ticker.lower()}@example.com", cash=1000)
        self.key = opened["api_key"]
        given = {"ticker": ticker, "quantity": quantity, "reason": "A transfer"}
        live.ask(ADMIN, "POST", f"users/{opened['user_id']}/corrections", **given)
        self.sees(price, currency)

    def sees(self, price: int, currency: str, **events):
        """What Yahoo says from now on, with an event that happened half an hour ago, if any."""
        self.live.prices[self.ticker], self.live.currencies[self.ticker] = Decimal(price), currency
        happened = {"date": Decimal(int(datetime.now(UTC).timestamp()) - 1800)}
        self.live.events[self.ticker] = {kind: {"1": happened | event} for kind, event in events.items()}
        self.get(f"price/{self.ticker}")

    def get(self, path: str):
        return self.live.ask(self.key, "GET", path)


@pytest.mark.parametrize(
    ("ticker", "before", "after", "amount"),
    [("PENCE", (72, "GBp"), (72, "GBp"), "4.5"), ("ONCEYEN", (1500, "JPY"), (10, "USD"), "200")],
    ids=["paid in pence", "believed for its price in yen"],
)
def test_a_dividend_is_booked_in_dollars_alone(live, ticker, before, after, amount):
    with time_machine.travel(BEGIN - timedelta(days=300), tick=True) as clock:
        bob = Transferred(live, ticker, *before, quantity="100")
        clock.shift(timedelta(hours=1))
        bob.sees(*after, dividends={"amount": Decimal(amount)})
        assert [trade["trade_type"] for trade in bob.get("trades")["trades"]] == ["correction"]


def test_a_split_of_what_costs_no_dollars_is_worth_none(live):
    with time_machine.travel(BEGIN - timedelta(days=150), tick=True) as clock:
        bob = Transferred(live, "SPLITP", 14400, "GBp", quantity="1000.00000001")
        clock.shift(timedelta(hours=1))
        bob.sees(9600, "GBp", splits={"numerator": Decimal(3), "denominator": Decimal(2)})
        trades, history = bob.get("trades")["trades"], bob.get("account/history")
        (held,) = bob.get("portfolio")["holdings"]
    assert [trade["trade_type"] for trade in trades] == ["split", "correction"]
    assert (trades[0]["total_amount"], held["quantity"]) == (0, Decimal("1500.00000001"))
    assert all((point["equity"] or 1000) < Decimal("1000.01") for point in history["points"])


def test_a_quote_that_is_not_in_dollars_is_no_drawdown(live):
    with time_machine.travel(BEGIN - timedelta(days=200), tick=True) as clock:
        bob = Transferred(live, "YEN", 1500, "JPY", quantity="100")
        for price, currency in ((1500, "JPY"), (10, "USD")):
            clock.shift(timedelta(days=1))
            bob.sees(price, currency)
        history = bob.get("account/history")
    assert {point["equity"] for point in history["points"]} <= {1000, 2000}
    assert history["summary"]["max_drawdown_percent"] == 0
