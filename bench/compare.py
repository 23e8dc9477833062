"""How fast the simulator is, beside what one would otherwise use and beside the limit.

    apt-get install wrk
    .venv/bin/pip install -r requirements-dev.txt -r bench/requirements.txt
    .venv/bin/python bench/compare.py [--quick] [--rounds N] [--beside FOLDER] [--only app,beside]

A PostgreSQL of its own, a copy of the same books for each contender: this app under gunicorn (the Procfile's
command) and under granian, the FastAPI twin (`twin.py`), and pgbench with the statements of a trade, which is
what PostgreSQL itself can do; with --beside another checkout of this program, such as the commit before. wrk
loads one after the other, in rounds; medians are compared. Only the ratios mean something: server, database
and load share the machine's processors.
"""

import argparse
import hashlib
import json
import os
import re
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from datetime import UTC, datetime
from decimal import Decimal
from functools import partial
from pathlib import Path

import psutil
import requests
import sqlalchemy as sa

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT / "tests"))

from cast import Server, environment  # noqa: E402
from postgres import PostgresServer  # noqa: E402

CLIENTS, USERS, HOLDINGS, WORKERS = 16, 1000, 20, 2
TURNS = 2  # Of each contender in a round, one after the other: A B A B, as the machine's speed drifts.
WIDE = {10: USERS + 1, 100: USERS + 2, 1000: USERS + 3}  # The accounts with so many holdings.
LONG = {1_000: USERS + 4, 100_000: USERS + 5, 1_000_000: USERS + 6}  # And with so many trades.
PRICE, QUANTITY = Decimal("100.25"), Decimal(1000)

BIN = Path(sys.executable).parent
GUNICORN = [BIN / "gunicorn", "app:app", "--bind", "127.0.0.1:PORT", "--log-level", "warning"]


def procfile(root: Path) -> list:
    """What the Procfile of the program in `root` says, with two workers."""
    options = re.search("^web: gunicorn app:app (.*)$", (root / "Procfile").read_text(), re.M)[1]
    return [*GUNICORN, *options.split(), "--workers", WORKERS]


SERVERS = {
    "app": procfile(ROOT),
    "granian": [
        *(BIN / "granian", "app:app", "--interface", "wsgi", "--port", "PORT", "--log-level", "warning"),
        *("--workers", WORKERS, "--blocking-threads", 8),
    ],
    "twin": [
        *(BIN / "uvicorn", "twin:app", "--app-dir", HERE, "--port", "PORT", "--log-level", "warning"),
        *("--workers", WORKERS, "--no-access-log"),
    ],
}


def instead(program: str) -> list:
    """The app's command with another program of this folder, such as `empty`."""
    command = [f"{program}:app" if word == "app:app" else word for word in SERVERS["app"]]
    return [*command, "--pythonpath", HERE]


SERVERS["empty"] = instead("empty")
ROOTS = dict.fromkeys(SERVERS, ROOT)  # Where each of them is started; `main` adds the one beside.
CONTENDERS = ["app", "beside", "granian", "empty", "twin", "pgbench", "raw"]
RATIOS = "app/beside app/twin granian/twin empty/twin app/pgbench app/raw empty/raw".split()
WORKER_CLASSES = {
    "sync": ["--worker-class", "sync"],
    **{f"gthread, {n} threads": ["--worker-class", "gthread", "--threads", n] for n in (4, 8, 16)},
}
MANY, HOT = ("TRADE", 1, USERS), ("TRADE", 1, 1)  # What is asked, the first account and how many.
TASKS = {
    "trade, many users": MANY,
    "trade, one hot account": HOT,
    "balance": ("/api/v1/balance", 1, USERS),
    "price from the cache": ("/api/v1/price/T0007", 1, USERS),
    "health": ("/health", 1, USERS),
    f"portfolio of {HOLDINGS}": ("/api/v1/portfolio", 1, USERS),
    **{f"portfolio of {n}": ("/api/v1/portfolio", user, 1) for n, user in WIDE.items()},
}

# What the database has to do for a buy with an idempotency key, in this order. Text of its own: whatever
# words the program finds for it, the limit that it is held against stays the same.
STATEMENTS = [
    "BEGIN",
    "SELECT user_id FROM ibkr_balances WHERE user_id = :user_id FOR UPDATE",
    """SELECT b.cash_balance, b.starting_cash, b.run, b.market_clock, b.pin_changes,
        h.quantity, h.cost_basis, t.id
    FROM ibkr_balances b JOIN ibkr_users u ON u.id = b.user_id
    LEFT JOIN ibkr_stock_balances h ON h.user_id = b.user_id AND h.ticker = :ticker
    LEFT JOIN ibkr_trades t ON t.user_id = b.user_id AND t.idempotency_key = :idempotency_key
    WHERE b.user_id = :user_id AND u.api_key_hash = :key_hash AND u.closed_at IS NULL""",
    "UPDATE ibkr_balances SET cash_balance = :cash_after, updated_at = :created_at WHERE user_id = :user_id",
    """UPDATE ibkr_stock_balances SET quantity = :held, cost_basis = :cost_basis, updated_at = :created_at
    WHERE user_id = :user_id AND ticker = :ticker""",
    """INSERT INTO ibkr_trades (user_id, run, ticker, trade_type, order_type, quantity, price, total_amount,
        commission, realized_pnl, cash_after, market_price, price_source, idempotency_key, market_time,
        created_at)
    VALUES (:user_id, :run, :ticker, :trade_type, :order_type, :quantity, :price, :total_amount,
        :commission, :realized_pnl, :cash_after, :market_price, :price_source, :idempotency_key, :market_time,
        :created_at)""",
    "COMMIT",
    "SELECT id FROM ibkr_trades WHERE user_id = :user_id AND idempotency_key = :idempotency_key",
]
SQLITE_STATEMENTS = [s.replace("BEGIN", "BEGIN IMMEDIATE").removesuffix("FOR UPDATE") for s in STATEMENTS]


def values(user, ticker: str, key: str, scale=1) -> dict:
    """What those statements carry when `user` buys half a share. SQLite's amounts have a `scale` of 10^8."""
    who = {"user_id": user, "ticker": ticker, "idempotency_key": key}
    kind = {"run": 1, "trade_type": "buy", "order_type": "limit", "price_source": "sample"}
    prices = dict.fromkeys(("price", "market_price"), 100.25 * scale)
    sums = {"total_amount": 50.125 * scale, "commission": 0, "realized_pnl": None}
    holding = {"quantity": 0.5 * scale, "held": 1000.5 * scale, "cost_basis": 100300.125 * scale}
    times = dict.fromkeys(("created_at", "market_time"), "2026-01-01 12:00:00.123456")
    return who | kind | prices | sums | holding | {"cash_after": 100199.875 * scale} | times


KEY_HASHES = [
    hashlib.sha256(f"bench-key-{user}".encode()).hexdigest() for user in range(max(LONG.values()) + 1)
]


# --------------------------------------------------------------------------------------- The books


def flask(root: Path, *arguments: str, **settings) -> str:
    """What `flask --app app ARGUMENTS` of the program in `root` printed."""
    command = [BIN / "flask", "--app", "app", *arguments]
    return finished(command, 600, root, **environment(**settings))


def books(url: str, root: Path = ROOT) -> None:
    """Tables as the program in `root` makes them, with accounts 1 to 1,000 with 20 holdings each, the wide
    ones, and those for long histories."""
    flask(root, "db", "upgrade", DATABASE_URL=url)
    engine, at = sa.create_engine(url.replace("postgresql:", "postgresql+psycopg2:")), datetime.now(UTC)
    amounts = PRICE, QUANTITY, PRICE * QUANTITY
    if engine.dialect.name == "sqlite":
        amounts = (int(amount * 10**8) for amount in amounts)
    price, quantity, cost = amounts
    users, accounts, holdings, trades = [], [], [], []
    for user in range(1, len(KEY_HASHES)):
        held = HOLDINGS if user <= USERS else next((n for n, u in WIDE.items() if u == user), 0)
        start = cost * (held + 1)
        email = f"user-{user}@example.com"
        users.append({"id": user, "email": email, "api_key_hash": KEY_HASHES[user], "created_at": at})
        own = {"user_id": user, "run": 1}
        accounts.append(own | {"cash_balance": cost, "starting_cash": start, "updated_at": at})
        for n in range(1, held + 1):
            holding = {"user_id": user, "ticker": f"T{n:04}", "quantity": quantity}
            holdings.append(holding | {"cost_basis": cost, "updated_at": at})
            order = {"trade_type": "buy", "order_type": "limit", "price": price, "total_amount": cost}
            market = {"market_price": price, "price_source": "sample", "market_time": at, "created_at": at}
            rest = {"commission": 0, "realized_pnl": None, "cash_after": start - n * cost}
            trades.append(own | holding | order | market | rest | {"idempotency_key": f"seed {n}"})
    rows = {"users": users, "balances": accounts, "stock_balances": holdings, "trades": trades}
    with engine.begin() as connection:
        for name, of_table in rows.items():
            table = sa.Table(f"ibkr_{name}", sa.MetaData(), autoload_with=connection, resolve_fks=False)
            connection.execute(sa.insert(table), of_table)
    engine.dispose()


def lengthen(url: str, user: int, trades: int) -> int:
    """Give `user` so many trades, one share bought, one sold, and so on; answers the id of the first."""
    engine = sa.create_engine(url.replace("postgresql:", "postgresql+psycopg2:"))
    with engine.begin() as connection:
        connection.exec_driver_sql(
            """INSERT INTO ibkr_trades (user_id, run, ticker, trade_type, order_type, quantity, price,
                total_amount, commission, realized_pnl, cash_after, market_price, price_source,
                idempotency_key, market_time, created_at)
            SELECT %(user)s, 1, 'T0001', CASE WHEN n %% 2 = 1 THEN 'buy' ELSE 'sell' END, 'limit', 1, 100.25,
                100.25, 0, CASE WHEN n %% 2 = 0 THEN 0 END, 100250 - n %% 2 * 100.25, 100.25, 'sample',
                'long ' || n, now(), now()
            FROM generate_series(1, %(trades)s) n""",
            {"user": user, "trades": trades},
        )
        oldest = connection.scalar(sa.text(f"SELECT min(id) FROM ibkr_trades WHERE user_id = {user}"))
    engine.dispose()
    return oldest


# ------------------------------------------------------------------------------------- The contenders


def serving(command: list, url: str, folder: Path, root: Path = ROOT, **settings) -> Server:
    """A server of the program in `root` that is not started yet; PORT in its command becomes its port."""
    server = Server(url, **{"SAMPLE_MARKET": folder / "market.csv"} | settings)
    server.command = [str(word).replace("PORT", str(server.port)) for word in command]
    server.folder = root
    return server


def finished(command: list, seconds: int, folder: Path | None = None, **variables) -> str:
    """What `command` printed, which may take `seconds` and then some."""
    done = subprocess.run(
        list(map(str, command)),
        cwd=folder,
        env=os.environ | {name: str(value) for name, value in variables.items()},
        capture_output=True,
        text=True,
        timeout=seconds + 60,
    )
    return (
        done.stdout if done.returncode == 0 else sys.exit(f"{command[0]} failed: {done.stdout}{done.stderr}")
    )


def wrk(server: Server, task: tuple, seconds: float) -> float:
    """Answers a second with 16 clients. Every answer must be a success."""
    ask, first, users = task
    command = ["wrk", "-t1", f"-c{CLIENTS}", f"-d{seconds}s", "--timeout", "10s", "-s", HERE / "load.lua"]
    printed = finished([*command, server.url], seconds, ASK=ask, FIRST=first, USERS=users)
    result = json.loads(re.search("RESULT (.*)", printed)[1])
    if result["failed"]:
        print(f"! {result['failed']} of {result['count']} failed: {ask} at {server.command[0]}", flush=True)
    return result["count"] / result["seconds"]


def pgbench(postgres: PostgresServer, database: str, task: tuple, seconds: float, folder: Path) -> float:
    """Trades a second of PostgreSQL alone: the same statements, as text, as psycopg2 sends them."""
    _, first, users = task
    given = values(":user", "T00:n", ":a-:b") | {"key_hash": "sha256"}
    literals = {
        n: "NULL" if v is None else f"'{v}'" if isinstance(v, str) else str(v) for n, v in given.items()
    }
    literals["key_hash"] = "encode(sha256('bench-key-:user'), 'hex')"
    literals["user_id"] = ":user"
    lines = [f"\\set user random({first}, {first + users - 1})", f"\\set n random(10, {HOLDINGS})"]
    lines += [f"\\set {name} random(1, 1000000000)" for name in "ab"]
    for statement in STATEMENTS:
        lines.append(re.sub(":([a-z_]+)", lambda name: literals[name[1]], statement) + ";")
    script = folder / "trade.sql"
    script.write_text("\n".join(lines))
    command = [postgres.binary("pgbench"), "-M", "simple", "-n", "-c", CLIENTS, "-T", seconds, "-f", script]
    return float(re.search(r"tps = ([0-9.]+)", finished([*command, postgres.url(database)], seconds))[1])


def sqlite_opened(path: str) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=15)
    for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
        connection.execute(f"PRAGMA {pragma}")
    return connection


def raw_trade(connection: sqlite3.Connection, key: str, number: int) -> None:
    """The statements of a trade and nothing else."""
    user = number % USERS + 1
    given = values(user, f"T{number % HOLDINGS + 1:04}", key, 10**8) | {"key_hash": KEY_HASHES[user]}
    for statement in SQLITE_STATEMENTS:
        connection.execute(statement, given).fetchall()


def raw_sqlite(path: str, seconds: float) -> float:
    """Trades a second of a bare loop in one process."""
    connection, count, end = sqlite_opened(path), 0, time.monotonic() + seconds
    while time.monotonic() < end:
        raw_trade(connection, f"raw {end}-{count}", count)
        count += 1
    connection.close()
    return count / seconds


# ------------------------------------------------------------------------------------ What is measured


def rounds(title: str, contenders: dict, tasks: dict, count: int, seconds: float) -> None:
    """Load the contenders in `count` interleaved rounds; print the medians of what each of them reached, and
    of the ratios of what two reached side by side."""
    rates = {name: {task: [] for task in tasks} for name in contenders}
    for number in range(count + 1):
        print(f"{title}: round {number} of {count}" if number else f"{title}: warming up", flush=True)
        for task in tasks:
            for name in list(contenders)[:: -1 if number % 2 else 1] * (TURNS if number else 1):
                rate = contenders[name](tasks[task], seconds if number else 1)
                if number and rate:
                    rates[name][task].append(rate)
    ratios = [pair for pair in RATIOS if set(pair.split("/")) <= rates.keys()]
    rows = [[title, *rates, *ratios]]
    for task in tasks:
        found = {name: of[task] for name, of in rates.items()}
        for pair in ratios:
            one, other = (found[name] for name in pair.split("/"))
            # Side by side: the same turn of the same round. None, where one of them was not loaded.
            found[pair] = [a / b for a, b in zip(one, other, strict=False)]
        rows.append([task, *(statistics.median(each) if each else "" for each in found.values())])
    table(rows)


def table(rows: list[list]) -> None:
    """Print `rows`, the first of which is the heading, as Markdown."""
    shown = [[f"{c:,.{2 if c < 20 else 0}f}" if isinstance(c, float) else c for c in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    shown.insert(1, ["-" * width for width in widths])
    print()
    for row in shown:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |")
    print(flush=True)


def milliseconds(server: Server, path: str, user: int, times: int = 20) -> float:
    """How long one answer takes, of `times` in a row the median."""
    session, taken = requests.Session(), []
    session.headers["Authorization"] = f"Bearer bench-key-{user}"
    for _ in range(times):
        started = time.perf_counter()
        assert session.get(server.url + path, timeout=60).status_code == 200
        taken.append((time.perf_counter() - started) * 1000)
    return statistics.median(taken)


def first_answer(server: Server) -> float:
    """Seconds from the start of the command to the first answer about an account."""
    started = time.monotonic()
    with server:
        milliseconds(server, "/api/v1/balance", 1, times=1)
        return time.monotonic() - started


def memory(folder: Path, url: str) -> list[list]:
    """A live worker before and after its first question to Yahoo, which a closed port answers."""
    live = serving(
        SERVERS["app"], url, folder, PRICE_SOURCES="yahoo", SAMPLE_MARKET="", HTTPS_PROXY="http://127.0.0.1:9"
    )
    rows = [["a worker's memory, MB", "RSS", "USS"]]
    with live:
        workers = psutil.Process(live.process.pid).children()
        for when, path in (("before yfinance", "/api/v1/balance"), ("with yfinance", "/api/v1/price/AAPL")):
            for _ in range(12):
                requests.get(live.url + path, headers={"Authorization": "Bearer bench-key-1"}, timeout=30)
            used = max((worker.memory_full_info() for worker in workers), key=lambda used: used.rss)
            rows.append([when, used.rss / 1e6, used.uss / 1e6])
    return rows


def paging(url: str, server: Server, lengths: list[int]) -> list[list]:
    rows = [["history, ms a page of 50", "first", "middle", "last", "last / first"]]
    for length in lengths:
        user = LONG[length]
        oldest = lengthen(url, user, length)
        cursors = ["", f"&cursor={oldest + length // 2}", f"&cursor={oldest + 50}"]
        first, middle, last = (milliseconds(server, f"/api/v1/trades?limit=50{c}", user) for c in cursors)
        rows.append([f"{length:,} trades", first, middle, last, last / first])
    return rows


def compare(postgres: PostgresServer, folder: Path, names: list[str], count: int, seconds: float) -> None:
    books(postgres.create_database("app"))
    if "beside" in names:
        books(postgres.create_database("beside"), ROOTS["beside"])
    for name in {"twin", "pgbench"} & set(names):
        finished([postgres.binary("createdb"), "-T", "app", "--maintenance-db", postgres.url(), name], 60)
    urls = {n: postgres.url(n if n in ("beside", "twin") else "app") for n in names}
    with ExitStack() as running:
        servers = {
            name: running.enter_context(serving(SERVERS[name], urls[name], folder, ROOTS[name]))
            for name in names
            if name in SERVERS
        }
        some = {
            "empty": lambda task, seconds: (
                wrk(servers["empty"], task, seconds) if task == TASKS["price from the cache"] else None
            ),
            "pgbench": lambda task, seconds: (
                pgbench(postgres, "pgbench", task, seconds, folder) if task[0] == "TRADE" else None
            ),
        }
        contenders = {n: some.get(n) or partial(wrk, servers[n]) for n in names if n != "raw"}
        rounds("PostgreSQL, a second", contenders, TASKS, count, seconds)
    for name in [name for name in ("app", "beside", "twin") if name in names]:
        audit = flask(ROOTS[name], "audit", DATABASE_URL=urls[name], PRICE_SOURCES="sample")
        print(f"The books of the {name} after that: {audit.splitlines()[-1]}")


def sqlite(folder: Path, names: list[str], count: int, seconds: float) -> None:
    files = {n: f"{folder}/{n}.db" for n in names if n in ("app", "beside", "empty", "raw")}
    with ExitStack() as running:
        contenders = {}
        for name, file in files.items():
            url, root = f"sqlite:///{file}", ROOTS.get(name, ROOT)
            books(url, root)
            if name in SERVERS:
                server = running.enter_context(serving(SERVERS[name], url, folder, root, RAW=file))
                contenders[name] = partial(wrk, server)
            else:
                contenders[name] = lambda _, seconds: raw_sqlite(files["raw"], seconds)
        rounds("SQLite, a second", contenders, {"trade": MANY}, count, seconds)


def worker_classes(url: str, folder: Path, count: int, seconds: float) -> None:
    with ExitStack() as running:
        options = WORKER_CLASSES.items()
        commands = {n: [*GUNICORN, "--workers", WORKERS, "--no-control-socket", *o] for n, o in options}
        servers = {n: running.enter_context(serving(c, url, folder)) for n, c in commands.items()}
        some = {task: TASKS[task] for task in list(TASKS)[:4]}
        contenders = {n: partial(wrk, server) for n, server in servers.items()}
        rounds("gunicorn, a second", contenders, some, count, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one short round, and no history of a million")
    parser.add_argument("--rounds", type=int, help="how many rounds (default: 3, or 1 with --quick)")
    parser.add_argument("--beside", type=Path, metavar="FOLDER", help="another checkout of this program")
    parser.add_argument("--only", help=f"load these of {','.join(CONTENDERS)}, and measure nothing else")
    options = parser.parse_args()
    if options.beside:
        ROOTS["beside"] = options.beside.resolve()
        SERVERS["beside"] = procfile(ROOTS["beside"])
    there = [name for name in CONTENDERS if name != "beside" or options.beside]
    chosen = options.only.split(",") if options.only else there
    if not set(chosen) <= set(there):
        parser.error(f"--only takes some of {','.join(there)}")
    names = [name for name in there if name in chosen]
    seconds, count = (1, options.rounds or 1) if options.quick else (2, options.rounds or 3)
    with tempfile.TemporaryDirectory(prefix="broker-bench-") as folder:
        folder = Path(folder)
        folder.chmod(0o755)  # PostgreSQL may have to run as another user.
        lines = [f"2020-01-01T00:00:00Z,T{n:04},{PRICE}" for n in range(1, max(WIDE) + 1)]
        (folder / "market.csv").write_text("\n".join(["timestamp,ticker,price", *lines]))
        with PostgresServer(folder / "postgres", settings={"max_connections": "300"}) as postgres:
            compare(postgres, folder, names, count, seconds)
            sqlite(folder, names, count, seconds)
            if options.only:
                return
            url = postgres.url("app")
            worker_classes(url, folder, count, seconds)
            gunicorn = serving(SERVERS["app"], url, folder)
            python = serving([sys.executable, "app.py"], url, folder)
            rows = [["first answer", "seconds"], ["gunicorn", first_answer(gunicorn)]]
            table([*rows, ["python app.py", first_answer(python)]])
            live = f"sqlite:///{folder}/live.db"
            books(live)
            table(memory(folder, live))
            with serving(SERVERS["app"], url, folder) as app:
                table(paging(url, app, list(LONG)[: 2 if options.quick else 3]))


if __name__ == "__main__":
    main()
