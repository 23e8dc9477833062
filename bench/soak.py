"""Trade for a while as processes die, then hold every answer against the books.

    python bench/soak.py [--database sqlite|postgresql|both] [--clients 64] [--accounts 16]
                         [--trades 20000] [--no-faults]

Clients send orders with an idempotency key and, after a 503 or a lost connection, send them again with
the same key until there is an answer. Some of the orders rest: they are changed, canceled, and filled as
one ticker's price goes up and down. Clocks go to and fro over splits and dividends. Meanwhile workers are
killed and PostgreSQL crashes. What was acknowledged is then replayed with arithmetic of its own
(fractions; nothing of the broker's) and compared with what the tables hold. Needs the development
requirements; starts and ends all it needs, on loopback.
"""

import argparse
import multiprocessing
import random
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from fractions import Fraction
from pathlib import Path

import psutil
import requests
import simplejson

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from cast import Database, Server, flask
from postgres import PostgresServer

TICKERS = {"AAPL": "33.33333333", "IBM": "7.00000007", "MSFT": "0.12345678"}
RESTING = "NVDA"
"""The ticker of the orders that rest; it costs 98 to 102."""

DAYS = [f"2024-06-0{day}T00:00:00Z" for day in (3, 4, 5)]
SPLITS = {"AAPL": (DAYS[1], Fraction(3, 2)), "IBM": (DAYS[2], Fraction(1, 3))}
DIVIDENDS = {"MSFT": (DAYS[1], "0.00123457"), "AAPL": (DAYS[2], "0.07"), RESTING: (DAYS[2], "0.5")}
"""What is booked when a clock passes the day, in a file whose prices do not matter: all are pinned."""

PROCESSES, WORKERS, WORKER_KILLS, CRASHES = 4, 3, 12, 6
UNIT = Fraction(1, 10**8)
ANSWERED = multiprocessing.Value("i", 0)


# The clients


def client(number, url, account, wanted, deadline, ended) -> None:
    """Trade until `wanted` trades of all clients are acknowledged; put what happened into `ended`."""
    dice, session = random.Random(number), requests.Session()
    session.headers["Authorization"] = f"Bearer {account['api_key']}"
    count = 0
    while ANSWERED.value < wanted and time.monotonic() < deadline:
        count += 1
        if dice.random() < 0.3:
            rest(session, url, account["user_id"], f"{number}-{count}", dice, deadline, ended)
            continue
        key, ticker = f"{number}-{count}", dice.choice(list(TICKERS))
        order = {
            "ticker": ticker,
            "action": dice.choice(("buy", "buy", "sell")),
            "quantity": f"{dice.randrange(1, 9)}.{dice.randrange(10**8):08}",
        }
        if dice.random() < 0.5:  # A limit order: at the market, or a little worse for its trader.
            order["price"] = TICKERS[ticker]
        asked = "POST", f"{url}/api/v1/trade"
        ended.append((account["user_id"], key, order, *insist(session, asked, order, key, deadline)))


def rest(session, url, user_id, key, dice, deadline, ended) -> None:
    """Place an order that may rest, then change it, cancel it, or move the price that it waits for."""
    price, action = dice.randrange(97, 103), dice.choice(("buy", "buy", "sell"))
    order = {"ticker": RESTING, "action": action, "order_type": "limit", "limit_price": str(price)}
    order["quantity"] = f"0.{dice.randrange(1, 10**8):08}"
    if action == "buy" and dice.random() < 0.5:
        order |= {"take_profit": {"limit_price": price + 2}, "stop_loss": {"stop_price": price - 2}}
    result = insist(session, ("POST", f"{url}/api/v1/orders"), order, key, deadline)
    ended.append((user_id, key, order, *result))
    path = f"{url}/api/v1/orders/{(result[0] or {}).get('id')}"  # One that was refused is changed in vain.
    what = dice.choice(("change", "cancel", "move", "move", "clock"))
    if what == "change":
        change = {"limit_price": str(dice.randrange(97, 103))}
        result = insist(session, ("PATCH", path), change, f"{key} changed", deadline)
        ended.append((user_id, f"{key} changed", order | change, *result))
    elif what == "cancel":
        insist(session, ("DELETE", path), None, key, deadline)
    elif what == "clock":
        insist(session, ("PUT", f"{url}/api/v1/market/clock"), {"at": dice.choice(DAYS)}, key, deadline)
    else:
        pin = {"price": dice.randrange(98, 103)}
        insist(session, ("PUT", f"{url}/api/v1/market/prices/{RESTING}"), pin, key, deadline)


def insist(session, asked, order, key, deadline) -> tuple[dict | None, list[str], list[float]]:
    """The final answer to the order (None: there was none in time), each status, each latency."""
    statuses, latencies = [], []
    while time.monotonic() < deadline + 30:
        started = time.perf_counter()
        try:
            headers = {"Idempotency-Key": key}
            response = session.request(*asked, json=order, headers=headers, timeout=40)
        except requests.RequestException:
            statuses.append("lost connections")
        else:
            code = response.json()["code"] if response.status_code == 503 else ""
            statuses.append(f"{response.status_code} {code}".strip())
            latencies.append(time.perf_counter() - started)
            if response.status_code < 500:
                with ANSWERED.get_lock():
                    ANSWERED.value += response.status_code < 300 and asked[0] == "POST"
                return simplejson.loads(response.text, use_decimal=True), statuses, latencies
        time.sleep(0.1)
    return None, statuses, latencies


def clients(numbers, url, accounts, wanted, deadline, results) -> None:
    """One process of clients, a thread each."""
    ended = []
    threads = [
        threading.Thread(target=client, args=(n, url, accounts[n % len(accounts)], wanted, deadline, ended))
        for n in numbers
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    results.put(ended)


# The faults


def break_things(server, postgres, wanted, done, counts) -> None:
    """Kill a worker, and now and then PostgreSQL, at moments that are spread over the run."""
    faults = [("killed workers", (i + 1) / (WORKER_KILLS + 1)) for i in range(WORKER_KILLS)]
    if postgres:
        faults += [("crashes of PostgreSQL", (i + 0.5) / CRASHES) for i in range(CRASHES)]
    for fault, progress in sorted(faults, key=lambda fault: fault[1]):
        while ANSWERED.value < wanted * progress and not done.is_set():
            time.sleep(0.05)
        if done.is_set():
            return
        if fault == "killed workers":
            workers = psutil.Process(server.process.pid).children()
            if not workers:
                continue
            random.choice(workers).kill()
        else:
            postgres.crash()
            time.sleep(random.uniform(0, 2))
            postgres.start()
        counts[fault] += 1


# The reckoning


def judge(database, accounts, ended) -> dict[str, int]:
    """Compare the answers with the books: counts of what is lost, doubled, wrong, ... All should be 0."""
    booked, verdict = defaultdict(list), Counter()
    resting = {row.id: row for row in database.run("SELECT * FROM ibkr_orders")}
    fills = [row for row in database.run("SELECT * FROM ibkr_trades ORDER BY id") if row.order_id]
    for row in database.run("SELECT * FROM ibkr_trades WHERE order_id IS NULL"):
        if row.trade_type in ("split", "dividend"):
            booked[row.user_id].append((row.id, row, None))
            verdict["splits and dividends"] += 1
        else:
            booked[row.user_id, row.idempotency_key].append(row)
    for row in resting.values():
        if row.idempotency_key:  # What it brought has none.
            booked[row.user_id, row.idempotency_key].append(row)
    unit = UNIT if database.engine.dialect.name == "sqlite" else 1

    def same(row, answer, order) -> bool:
        if "order_type" in order:
            pairs = [(row.quantity * unit, order["quantity"]), (row.limit_price * unit, order["limit_price"])]
            same_words = (row.ticker, row.action, str(row.id)) == (
                order["ticker"],
                order["action"],
                answer["id"],
            )
            return same_words and all(Fraction(a) == Fraction(b) for a, b in pairs)
        pairs = [(row.quantity * unit, order["quantity"]), (row.price * unit, answer["price"])]
        pairs += [(row.total_amount * unit, answer["total_amount"])]
        pairs += [(row.cash_after * unit, answer["cash_balance"])]
        pairs += [((row.realized_pnl or 0) * unit, answer["realized_pnl"] or 0)]
        return (row.ticker, row.trade_type, str(row.id)) == (
            order["ticker"],
            order["action"],
            answer["id"],
        ) and all(Fraction(a) == Fraction(b) for a, b in pairs)

    for user_id, key, order, answer, _, _ in ended:
        rows = booked.pop((user_id, key), [])
        verdict["doubled"] += len(rows) > 1
        if answer is None:
            verdict["never answered"] += 1
        elif "code" in answer:
            verdict[f"refused: {answer['code']}"] += 1
            verdict["refused, yet booked"] += len(rows)
        elif not rows:
            verdict["lost"] += 1
        else:
            verdict["acknowledged"] += 1
            verdict["wrong"] += not same(rows[0], answer, order)
            if "order_type" not in order:
                booked[user_id].append((rows[0].id, order, answer))
    verdict["booked, nobody asked"] = sum(len(rows) for key, rows in booked.items() if type(key) is tuple)

    for row in fills:  # Each by what its order says, and at no worse price.
        order = resting[row.order_id]
        price, limit = Fraction(row.price * unit), Fraction((order.limit_price or row.price) * unit)
        verdict["wrong"] += (order.status, order.trade_id) != ("filled", row.id)
        verdict["wrong"] += price > limit if order.action == "buy" else price < limit
        numbers = ("total_amount", "cash_after", "realized_pnl")
        answer = {name: Fraction((getattr(row, name) or 0) * unit) for name in numbers}
        answer["cash_balance"] = answer.pop("cash_after")
        filled = {"ticker": order.ticker, "action": order.action, "quantity": order.quantity * unit}
        booked[row.user_id].append((row.id, filled | {"price": price}, answer))
    verdict["fills"] = len(fills)
    verdict["wrong"] += len(fills) != sum(order.status == "filled" for order in resting.values())

    for account in accounts:
        cash, held, wrong = replay(account, booked[account["user_id"]], unit)
        own = {"id": account["user_id"]}
        (row,) = database.run("SELECT cash_balance FROM ibkr_balances WHERE user_id = :id", **own)
        wrong += Fraction(row.cash_balance * unit) != cash
        reserved = [o.reserved_cash * unit for o in resting.values() if o.user_id == account["user_id"]]
        wrong += sum(map(Fraction, reserved)) > cash
        rows = database.run("SELECT * FROM ibkr_stock_balances WHERE user_id = :id", **own)
        holdings = {r.ticker: [Fraction(r.quantity * unit), Fraction(r.cost_basis * unit)] for r in rows}
        wrong += holdings != {ticker: pair for ticker, pair in held.items() if pair[0]}
        verdict["wrong"] += wrong
    return verdict


def replay(account, trades, unit) -> tuple[Fraction, dict, int]:
    """Cash, holdings and the number of wrong answers, from the orders alone, in booking order.

    A split or a dividend, which nobody has ordered, is held against what the file says.
    """
    cash, held, wrong = Fraction(account["cash_balance"]), defaultdict(lambda: [Fraction(0), Fraction(0)]), 0
    for _, order, answer in sorted(trades, key=lambda trade: trade[0]):
        if answer is None:
            holding, price = held[order.ticker], Fraction(order.price * unit)
            quantity = Fraction(order.quantity * unit)
            wrong += quantity != holding[0]
            if order.trade_type == "split":
                ratio, said = SPLITS[order.ticker][1], Fraction(order.ratio.replace(":", "/"))
                wrong += said not in (ratio, 1 / ratio)
                holding[0] = quantity * said / UNIT // 1 * UNIT
                paid = (quantity * said - holding[0]) * price / UNIT // 1 * UNIT
            else:
                wrong += price != Fraction(DIVIDENDS[order.ticker][1])
                paid = quantity * price / UNIT // 1 * UNIT
            cash += paid
            profit = paid if holding[0] else paid - holding[1]
            holding[1] -= paid - profit
            shown = (order.total_amount, order.cash_after, order.realized_pnl)
            wrong += tuple(Fraction(number * unit) for number in shown) != (paid, cash, profit)
            continue
        quantity = Fraction(order["quantity"])
        price = Fraction(TICKERS[order["ticker"]] if order["ticker"] in TICKERS else order["price"])
        holding, profit = held[order["ticker"]], Fraction(0)
        exact = quantity * price / UNIT
        if order["action"] == "buy":
            total = -(-exact // 1) * UNIT
            cash -= total
            holding[0] += quantity
            holding[1] += total
        else:
            total = exact // 1 * UNIT
            cost = round(holding[1] * quantity / holding[0] / UNIT) * UNIT  # Half-even, as is `round`.
            profit = total - (cost if quantity < holding[0] else holding[1])
            holding[0] -= quantity
            holding[1] -= total - profit
            cash += total
        wrong += min(cash, *holding) < 0
        shown = (answer["total_amount"], answer["cash_balance"], answer["realized_pnl"] or 0)
        wrong += tuple(map(Fraction, shown)) != (total, cash, profit)
    return cash, held, wrong


# The run


def soak(engine: str, options) -> bool:
    """One run on one database; prints its table and answers whether the books hold."""
    with tempfile.TemporaryDirectory() as folder:
        if engine == "sqlite":
            return run(engine, Database(f"sqlite:///{folder}/soak.db"), None, options)
    with PostgresServer(Path(tempfile.mkdtemp(prefix="soak-"))) as postgres:
        return run(engine, Database(postgres.create_database("soak")), postgres, options)


def market() -> str:
    lines = ["timestamp,ticker,price,dividend,split"]
    for ticker in (*TICKERS, RESTING):
        for day in DAYS:
            split = SPLITS.get(ticker, ("", 0))
            dividend = DIVIDENDS.get(ticker, ("", 0))
            ratio = f"{split[1].numerator}:{split[1].denominator}" if split[0] == day else ""
            lines.append(f"{day},{ticker},99.99999999,{dividend[1] if dividend[0] == day else ''},{ratio}")
    return "\n".join(lines)


def run(engine, database, postgres, options) -> bool:
    database.migrate()
    counts, done, results, ended = Counter(), threading.Event(), multiprocessing.Queue(), []
    ANSWERED.value = 0
    file = Path(tempfile.mkdtemp(prefix="soak-market-")) / "market.csv"
    file.write_text(market())
    settings = {"SAMPLE_MARKET": file, "CORPORATE_ACTIONS": "on"}
    with Server(database.url, workers=WORKERS, threads=32, **settings) as server:
        traders = [server.trader(cash="1000").goes_to(DAYS[0]) for _ in range(options.accounts)]
        for trader in traders:
            for ticker, price in (TICKERS | {RESTING: 100}).items():
                trader.sees(ticker, at=price)
        accounts = [{"user_id": t.user_id, "api_key": t.key, "cash_balance": 1000} for t in traders]
        started = time.monotonic()
        common = (server.url, accounts, options.trades, started + options.seconds, results)
        processes = [
            multiprocessing.Process(target=clients, args=(range(p, options.clients, PROCESSES), *common))
            for p in range(PROCESSES)
        ]
        for process in processes:
            process.start()
        faults = threading.Thread(target=break_things, args=(server, postgres, options.trades, done, counts))
        if options.faults:
            faults.start()
        for _ in processes:
            ended += results.get()
        seconds = time.monotonic() - started
        done.set()
        if options.faults:
            faults.join()
        log = server.log()
    verdict = judge(database, accounts, ended)
    audit = flask("audit", DATABASE_URL=database.url, PRICE_SOURCES="sample", SAMPLE_MARKET=file)
    database.engine.dispose()
    statuses = Counter(status for *_, statuses, _ in ended for status in statuses)
    latencies = sorted(latency for *_, latencies in ended for latency in latencies)
    bad = ("lost", "doubled", "wrong", "refused, yet booked", "booked, nobody asked", "never answered")
    table = {"acknowledged": verdict.pop("acknowledged", 0)} | {name: verdict.pop(name, 0) for name in bad}
    table |= verdict | {"answers of 500": statuses["500"]}
    again = {name: count for name, count in statuses.items() if name[0] not in "24"}
    table |= {f"{name}, asked again": count for name, count in again.items() if name != "500"}
    table |= counts | {"tracebacks in the log": log.count("Traceback")}
    for percentile in (50, 95, 99):
        table[f"latency p{percentile}"] = f"{latencies[len(latencies) * percentile // 100] * 1000:.0f} ms"
    table["longest answer"] = f"{latencies[-1] * 1000:.0f} ms"
    table["trades a second"] = f"{table['acknowledged'] / seconds:.0f}"
    table["audit"] = audit.stdout.strip().splitlines()[-1] if audit.stdout else audit.stderr.strip()
    print(f"\n{engine}: {options.clients} clients, {options.accounts} accounts, {seconds:.0f} s")
    for name, value in table.items():
        print(f"  {name:<32} {value}")
    if "Traceback" in log:
        print(log[log.index("Traceback") :][:6000], file=sys.stderr)
    return not (any(table[name] for name in bad) or statuses["500"] or audit.returncode)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--database", choices=["sqlite", "postgresql", "both"], default="both")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--accounts", type=int, default=16)
    parser.add_argument("--trades", type=int, default=20_000, help="acknowledged trades to reach")
    parser.add_argument("--seconds", type=int, default=900, help="the longest that clients may trade")
    parser.add_argument("--faults", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args()
    engines = ["sqlite", "postgresql"] if options.database == "both" else [options.database]
    sys.exit(not all([soak(engine, options) for engine in engines]))


if __name__ == "__main__":
    main()
