"""What an operator types: `flask user`, `flask audit`, `python app.py`, and settings that are wrong."""

import json
import re
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest
import requests
from cast import ADMIN, ROOT, Here, Server, Trader, environment, flask, free_port, loaded
from standins import MarketStandIn

sys.path.insert(0, str(Path(__file__).parent.parent))

import recorded


def user(database, *arguments, **settings):
    return flask("user", *arguments, DATABASE_URL=database.url, PRICE_SOURCES="sample", **settings)


def test_an_account_is_opened_listed_rekeyed_and_closed(database, server, engine_name):
    email = "carol-of-the-commands@example.com"
    added = user(database, "add", email, "--cash", "1234.5")
    assert added.returncode == 0, added.stderr
    key = added.stdout.split()[-1]
    assert re.fullmatch(r"[0-9a-f]{64}", key)
    carol = Trader(server, email, key, 0)
    assert str(carol.cash) == "1234.5"
    assert email in user(database, "list").stdout

    new_key = user(database, "rotate-key", email).stdout.split()[-1]
    assert carol.ask("GET", "/api/v1/balance").status_code == 401
    carol = Trader(server, email, new_key, 0)
    assert carol.ask("GET", "/api/v1/balance").status_code == 200

    assert user(database, "close", email).returncode == 0
    assert carol.ask("GET", "/api/v1/balance").status_code == 401
    again = user(database, "close", email)
    assert (again.returncode, again.stderr) == (1, f"Error: There is no open account of {email}.\n")


def test_a_key_is_kept_as_its_hash_alone(alice, database):
    (row,) = database.run("SELECT * FROM ibkr_users WHERE id = :id", id=alice.user_id)
    assert alice.key not in str(row)


@pytest.mark.parametrize(
    "arguments",
    [
        ("not-an-email",),
        ("d@example.com", "--cash", "-1"),
        ("d@example.com", "--cash", "90000000000"),
        ("d@example.com", "--cash", "NaN"),
        ("d@example.com", "--key", "short"),
    ],
)
def test_an_account_that_cannot_be_opened_is_one_clear_line(database, arguments):
    before = database.run("SELECT count(*) FROM ibkr_users")
    done = user(database, "add", *arguments)
    assert done.returncode == 1
    assert re.fullmatch(r"Error: .+\n", done.stderr)
    assert database.run("SELECT count(*) FROM ibkr_users") == before


def test_an_email_in_use_is_refused_and_nothing_is_made(alice, database):
    count = "SELECT (SELECT count(*) FROM ibkr_users) - (SELECT count(*) FROM ibkr_balances)"
    done = user(database, "add", alice.email)
    assert done.returncode == 1
    assert done.stderr == f"Error: The email {alice.email} or its API key is already in use.\n"
    assert database.run(count) == [(0,)]


def test_accounts_are_managed_over_http(server):
    dave = server.trader(cash="7.5", name="dave")
    admin = {"Authorization": "Bearer the-admin-key-of-the-tests"}
    base = f"{server.url}/api/v1/users"
    listed = requests.get(base, headers=admin, timeout=9).json()["users"]
    assert {"user_id": dave.user_id, "email": dave.email, "cash_balance": 7.5}.items() <= listed[-1].items()
    rotated = requests.post(f"{base}/{dave.user_id}/rotate-key", headers=admin, timeout=9).json()
    assert dave.ask("GET", "/api/v1/balance").status_code == 401
    dave = Trader(server, dave.email, rotated["api_key"], dave.user_id)
    assert dave.ask("GET", "/api/v1/balance").status_code == 200
    assert requests.delete(f"{base}/{dave.user_id}", headers=admin, timeout=9).json()["closed"] is True
    assert dave.ask("GET", "/api/v1/balance").status_code == 401
    assert requests.delete(f"{base}/{dave.user_id}", headers=admin, timeout=9).status_code == 404
    taken = requests.post(base, json={"email": dave.email}, headers=admin, timeout=9)
    assert (taken.status_code, taken.json()["code"]) == (409, "already_exists")


FIRSTS = {
    "trade": ("POST", "trade", {"json": {"ticker": "AAPL", "action": "buy", "quantity": 1}}),
    "portfolio": ("GET", "portfolio", {}),
    "options": ("OPTIONS", "trade", {}),
    "too large": ("POST", "trade", {"data": "x" * 70_000, "headers": {"Content-Type": "application/json"}}),
}


@pytest.mark.parametrize("first", FIRSTS)
@pytest.mark.parametrize("ends", ["rotate-key", "close"])
def test_a_key_that_has_ended_opens_nothing_though_every_process_knew_it(server, database, ends, first):
    dave = server.trader(name="dave").sees("AAPL", at=10)
    order = {"json": {"ticker": "AAPL", "action": "buy", "quantity": 1}}
    address = f"10.9.0.{dave.user_id % 256}"  # His own: so many wrong keys from one would be slowed down.
    key = {"Authorization": f"Bearer {dave.key}", "Connection": "close", "X-Forwarded-For": address}

    def ask(method, path, **options) -> int:
        options["headers"] = key | options.get("headers", {})
        return requests.request(method, f"{server.url}/api/v1/{path}", timeout=9, **options).status_code

    for number in range(20):  # Each over a new connection, so that both processes let him in.
        assert ask("POST", "trade", headers={"Idempotency-Key": str(number)}, **order) == 200
        assert ask("GET", "portfolio") == 200
    assert user(database, ends, dave.email).returncode == 0
    method, path, options = FIRSTS[first]  # The first answer of a process is the one that it could get wrong.
    assert [ask(method, path, **options) for _ in range(8)] == [401] * 8
    for _ in range(4):
        assert ask("POST", "trade", **order) == 401
        assert ask("POST", "trade", headers={"Idempotency-Key": "7"}, **order) == 401
        assert ask("POST", "trade?dry_run=true", **order) == 401
        assert ask("POST", "trade", data="no JSON") == 401
        assert ask("POST", "trade", json=order["json"] | {"ticker": "NOPE"}) == 401
        assert ask("POST", "trade", headers={"X-Simulate-Fault": "rate_limited"}, **order) == 401
        assert ask("GET", "portfolio") == 401
    own = {"user_id": dave.user_id}
    assert database.run("SELECT count(*) FROM ibkr_trades WHERE user_id = :user_id", **own) == [(20,)]


def test_a_key_that_ended_and_was_given_to_another_account_opens_that_one(server):
    """Though a process may have let the first owner in with it."""
    admin = {"Authorization": f"Bearer {ADMIN}"}
    first, users = server.trader(name="first"), f"{server.url}/api/v1/users"
    own = {"Authorization": f"Bearer {first.key}", "Connection": "close"}

    def whose() -> list[int]:
        asked = [requests.get(f"{server.url}/api/v1/portfolio", headers=own, timeout=9) for _ in range(8)]
        return [answer.json()["user_id"] for answer in asked]

    assert whose() == [first.user_id] * 8
    assert requests.post(f"{users}/{first.user_id}/rotate-key", headers=admin, timeout=9).status_code == 200
    second = {"email": f"second-{first.email}", "key": first.key}
    opened = requests.post(users, json=second, headers=admin, timeout=9).json()
    assert whose() == [opened["user_id"]] * 8


def test_the_audit_command_finds_nothing_on_honest_books(alice, database):
    alice.sees("AAPL", at=10).buys(3, "AAPL")
    done = flask("audit", DATABASE_URL=database.url, PRICE_SOURCES="sample")
    assert done.returncode == 0, done.stdout
    assert done.stdout.endswith("trades replayed, 0 differences.\n")


def python_app_py(**settings) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "app.py"],
        cwd=ROOT,
        env=environment(PRICE_SOURCES="sample", **settings),
        capture_output=True,
        text=True,
        timeout=30,
    )


@pytest.mark.parametrize(
    "bad",
    [
        {"PORT": "abc"},
        {"PORT": "70000"},
        {"PRICE_SOURCES": "bloomberg"},
        {"PRICE_SOURCES": "yahoo,sample"},
        {"PRICE_SOURCES": "alphavantage"},
        {"DATABASE_URL": "mysql://localhost/x"},
        {"DATABASE_URL": "postgresql://user:password@host:port/x"},
        {"DATABASE_URL": "sqlite:///:memory:"},
        {"DATABASE_URL": "sqlite:///file::memory:?uri=true"},
        {"DATABASE_URL": "sqlite:///?mode=memory"},
        {"DATABASE_URL": "sqlite://file.db"},
        {"ADMIN_API_KEY": "the admin's long key"},
        {"ADMIN_API_KEY": "the-schlüssel-of-the-admin"},
        {"PRICE_CACHE_SECONDS": "0"},
        {"STARTING_CASH": "-5"},
        {"COMMISSION_BPS": "NaN"},
        {"SLIPPAGE_BPS": "10000.1"},
        {"SAMPLE_MARKET": "/nowhere.csv"},
        {"CORS_ORIGINS": "https://example.com/"},
        {"RATE_LIMIT": "0 per minute"},
        {"RATELIMIT_STORAGE_URI": "redis://127.0.0.1:port"},
    ],
    ids=str,
)
def test_a_bad_setting_ends_the_program_with_one_clear_line(bad):
    with pytest.raises(SystemExit) as end, loaded(**{"PRICE_SOURCES": "sample"} | bad):
        pass
    (line,) = end.value.code.splitlines()
    assert line.startswith(list(bad)[-1]), line


def test_blanks_around_a_setting_are_not_part_of_it(new_database):
    """Such as the end of the line that a secret often has."""
    with Here(new_database().migrate().url, ADMIN_API_KEY=f" {ADMIN}\n", STARTING_CASH=" 7 ") as server:
        assert server.trader(cash=None).cash == 7


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"PORT": "abc"}, "PORT cannot be used: "),
        ({"DYNO": "web.1", "ADMIN_API_KEY": "fifteen-letters"}, "ADMIN_API_KEY cannot be used: "),
        ({"DATABASE_URL": "postgresql://nobody@127.0.0.1:1/x"}, "The database cannot be used "),
        ({"DATABASE_URL": "sqlite:////nowhere/x.db"}, "The database cannot be used "),
    ],
    ids=str,
)
def test_python_app_py_ends_with_one_line_and_the_exit_code_1(bad, says):
    done = python_app_py(**bad)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(says), line


def test_the_test_user_is_never_made_on_a_database_that_was_named(new_database):
    database = new_database().migrate()
    with Server(database.url, command=[sys.executable, "app.py"]):
        assert database.run("SELECT count(*) FROM ibkr_users") == [(0,)]


def test_the_commands_work_from_any_folder(tmp_path):
    url, empty = f"sqlite:///{tmp_path}/database.db", tmp_path / "empty"
    empty.mkdir()
    for command in (["db", "upgrade"], ["db", "check"], ["user", "list"]):
        done = subprocess.run(
            [sys.executable, "-m", "flask", "--app", ROOT / "app.py", *command],
            cwd=empty,
            env=environment(DATABASE_URL=url, PRICE_SOURCES="sample"),
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
    assert not list(empty.iterdir())


@pytest.mark.parametrize("command", ["audit", "settle", "user list", "user add a@example.com"])
def test_a_command_without_a_database_ends_with_one_clear_line(new_database, command):
    for url in (new_database().url, "postgresql://nobody@127.0.0.1:1/x"):
        done = flask(*command.split(), DATABASE_URL=url, PRICE_SOURCES="sample")
        assert done.returncode == 1
        (line,) = done.stderr.splitlines()
        assert line.startswith("Error: The database cannot be used")


def test_a_command_for_the_other_market_ends_with_one_clear_line(new_database):
    url = new_database().migrate().url
    assert flask("settle", DATABASE_URL=url, PRICE_SOURCES="sample").returncode == 0
    done = flask("settle", DATABASE_URL=url, PRICE_SOURCES="yahoo")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("Error: This database holds sample prices")


def test_a_database_without_tables_is_one_clear_line(new_database):
    done = python_app_py(DATABASE_URL=new_database().url)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr


def test_a_server_without_tables_is_not_available_and_no_fault(new_database):
    with Here(new_database().url) as server:
        for key in (ADMIN, "some-key"):
            headers = {"Authorization": f"Bearer {key}"}
            for path in ("/api/v1/users", "/api/v1/balance", "/alpaca/v2/account"):
                answer = requests.get(f"{server.url}{path}", headers=headers, timeout=30)
                if answer.status_code != 403:  # The admin has no account, and others are no admin.
                    assert answer.status_code == 503, answer.text


def test_a_host_that_cannot_be_found_is_said_with_its_name(new_database):
    done = python_app_py(HOST="nowhere.invalid", DATABASE_URL=new_database().migrate().url)
    assert done.returncode == 1
    assert "HOST=nowhere.invalid" in done.stderr.splitlines()[-1]


def test_a_file_that_is_no_database_is_not_available_and_no_fault(tmp_path):
    file = tmp_path / "file.db"
    file.write_text("This is a letter to my mother, and no database at all." * 100)
    with Here(f"sqlite:///{file}") as server:
        headers = {"Authorization": "Bearer some-key"}
        answer = requests.get(f"{server.url}/api/v1/balance", headers=headers, timeout=30)
        assert (answer.status_code, answer.json()["code"]) == (503, "database_unavailable")


def test_a_database_of_a_later_version_is_no_fault_of_the_port(tmp_path):
    """What Alembic says of it is the last line, and nothing of where it would have been served."""
    folder = tmp_path / "program"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".*", "instance", "tests", "bench"))
    url = f"sqlite:///{folder}/instance/sample.db"
    (folder / "instance").mkdir()
    assert flask("db", "upgrade", DATABASE_URL=url, PRICE_SOURCES="sample").returncode == 0
    with closing(sqlite3.connect(folder / "instance" / "sample.db")) as database, database:
        database.execute("UPDATE alembic_version SET version_num = '9999'")
    done = subprocess.run(
        [sys.executable, "app.py"],
        cwd=folder,
        env=environment(PRICE_SOURCES="sample", PORT=free_port()),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert "9999" in done.stderr
    assert "PORT" not in done.stderr


@pytest.mark.parametrize("error", ["sa.exc.TimeoutError()", "OutcomeUnknown()"])
def test_a_command_whose_database_does_not_answer_ends_with_one_clear_line(new_database, monkeypatch, error):
    with loaded(DATABASE_URL=new_database().migrate().url, PRICE_SOURCES="sample") as program:
        reason = eval(error, program)

        def fails(*_):
            raise reason

        monkeypatch.setattr(program["User"], "all", fails)
        done = program["app"].test_cli_runner().invoke(args=["user", "list"])
    assert (done.exit_code, done.stderr.count("The database does not answer")) == (1, 1)


def test_no_account_has_the_admins_own_key(server, database):
    """It would never be let in."""
    done = user(database, "add", "the-admin@example.com", "--key", ADMIN, ADMIN_API_KEY=ADMIN)
    assert (done.returncode, done.stderr.count("already in use")) == (1, 1)
    new = {"email": "the-admin@example.com", "key": ADMIN}
    headers = {"Authorization": f"Bearer {ADMIN}"}
    answer = requests.post(f"{server.url}/api/v1/users", json=new, headers=headers, timeout=30)
    assert (answer.status_code, answer.json()["code"]) == (409, "already_exists")


# A recorder of prices


DAY_1 = 1_577_975_400  # 2020-01-02, 9:30 in New York.
DAYS = [DAY_1, DAY_1 + 86_400, DAY_1 + 2 * 86_400]


def candles(moments=DAYS, zone="America/New_York", offset=-18_000, **lists) -> str:
    """Yahoo's chart with these lists (open, high, ...), of three days if nothing else is said."""
    meta = {"currency": "USD", "exchangeTimezoneName": zone, "gmtoffset": offset}
    result = {"meta": meta, "timestamp": moments, "indicators": {"quote": [lists]}}
    return json.dumps({"chart": {"error": None, "result": [result]}})


@pytest.fixture(scope="module")
def yahoo():
    with MarketStandIn() as stand_in:
        yield stand_in


@pytest.fixture
def record(yahoo, program, tmp_path):
    """Records what Yahoo says of these tickers; answers what the command did, and the lines of the file."""

    def record(**charts: str | None) -> tuple[subprocess.CompletedProcess, list[str] | None]:
        for ticker, chart in charts.items():
            yahoo.yahoo(ticker.replace(".", "-"), body=chart)  # Yahoo knows BRK-B alone.
        file = tmp_path / "market.csv"
        done = subprocess.run(
            [sys.executable, "-m", "flask", "--app", "app", "record", *charts, "--output", file],
            cwd=program,
            env=environment(**yahoo.environment),
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert "Traceback" not in done.stderr
        return done, file.read_text().splitlines() if file.exists() else None

    yahoo.reset()
    return record


def test_bars_are_recorded_without_the_noise_of_floats(record):
    prices = {"open": [1.37000000476837, 2, 3], "high": [2.5, 3, 4], "low": [1.25, 1, 2]}
    done, lines = record(ABC=candles(close=[189.83999633789062, 2, 3], volume=[7, 8, 9], **prices))
    assert done.stdout.splitlines()[-1].startswith("3 bars are in ")
    assert (lines[:2], done.stderr) == (
        [
            "timestamp,ticker,open,high,low,close,volume,dividend,split",
            "2020-01-02T00:00:00Z,ABC,1.37,2.5,1.25,189.84,7,,",
        ],
        "",
    )


def test_a_day_is_the_exchanges_own(record):
    midnight = [1_585_522_800, 1_577_836_800]  # In London, whose summer had begun by the first.
    _, lines = record(
        TOKYO=candles([1_577_926_800], "Asia/Tokyo", 32_400, close=[1]),
        LONDON=candles(midnight, "Europe/London", 0, close=[1, 2]),
        OFFSET=candles([1_577_926_800], "Nowhere/City", 32_400, close=[1]),
        UTC=candles([1_577_926_800], None, None, close=[1]),
    )
    days = [tuple(line.split(",")[:2]) for line in lines[1:]]
    assert days == [
        ("2020-01-01T00:00:00Z", "LONDON"),
        ("2020-01-02T00:00:00Z", "OFFSET"),
        ("2020-01-02T00:00:00Z", "TOKYO"),
        ("2020-01-02T00:00:00Z", "UTC"),
        ("2020-03-30T00:00:00Z", "LONDON"),
    ]


def test_what_is_recorded_of_odd_answers_loads(record, tmp_path):
    good = {"close": [1, 2, 3]}
    charts = {
        "NULLS": (candles(close=[1, None, 3], open=[None] * 3), [1, 3]),
        "ZEROS": (candles(close=[0, 2, 3], open=[0, 0, 0], high=[0, 0, 0], low=[0, 0, 0]), [2, 3]),
        "DUST": (candles(close=[1.7e-9, 1.2e-8, 1]), ["0.00000001", 1]),
        "TWICE": (candles([DAY_1, DAY_1 + 60, DAYS[1]], **good), [2, 3]),
        "SHORT": (candles(**good, open=[1], high=[9, 9], volume=[1, 2, 3, 4]), [1, 2, 3]),
        "NO-LISTS": (candles(**good, open=None, low=[]), [1, 2, 3]),
        "HUGE": (candles(close=[1e10, 1e300, 5], volume=[-1, 1, 1e30]), [5]),
        "WORDS": (candles(close=["x", True, 3], open=["y", {}, []], volume=["z", [], True]), [3]),
        "NAN": (candles(close=[float("nan"), float("inf"), 3]), [3]),
        "BRK.B": (candles(**good), [1, 2, 3]),
    }
    done, _ = record(**{ticker: chart for ticker, (chart, _) in charts.items()})
    assert done.returncode == 0, done.stderr
    market = recorded.read(tmp_path / "market.csv")
    assert {ticker: [bar.close for bar in bars] for ticker, bars in market.items()} == {
        ticker.replace(".", "-"): [Decimal(close) for close in closes]
        for ticker, (_, closes) in charts.items()
    }
    assert {bar.volume for bars in market.values() for bar in bars} == {0}
    assert done.stderr.splitlines() == [
        f"{ticker}: left out {days} days whose close is 0 to 8 decimals, or no price."
        for ticker, days in [("ZEROS", 1), ("DUST", 1), ("HUGE", 2), ("WORDS", 2), ("NAN", 2)]
    ]


@pytest.mark.parametrize(
    "chart",
    [
        candles(close=[1.7e-9, -1, None]),
        candles(close=[1, 2]),
        candles([1e300, 1, 2], close=[1, 2, 3]),
        candles(zone=None, offset="x", close=[1, 2, 3]),
    ],
    ids=["no price", "too few", "no such time", "no zone"],
)
def test_a_ticker_of_which_nothing_is_left_is_refused_and_no_file_is_made(record, chart):
    done, lines = record(GOOD=candles(close=[1, 2, 3]), BAD=chart)
    assert (done.returncode, lines) == (1, None)
    assert done.stderr.splitlines()[-1] == "Error: BAD: its answer has no prices."


# With splits and dividends


def opens(day: int) -> datetime:
    """When New York opens, so many days after 2020-01-02; the third and fourth are a weekend."""
    return datetime.fromtimestamp(DAY_1, UTC) + timedelta(days=day)


def test_prices_are_recorded_as_they_were_before_a_split(record, yahoo):
    yahoo.bars(
        "ABC",
        "1d",
        (opens(0), 10.0, 10.5, 9.5, 10.0, 1000),
        (opens(1), 10.0, 11.25, 10.0, 11.0, 5),
        (opens(4), 11.0, 12.0, 11.0, 12.0, 700),
        (opens(5), 12.0, 12.0, 12.0, 12.5, 800),
    )
    yahoo.dividend("ABC", opens(1), 0.025)
    yahoo.split("ABC", opens(4), 10.0)
    yahoo.dividend("ABC", opens(5), 0.3)
    done, lines = record(ABC=None)
    assert (done.returncode, done.stderr) == (0, "")
    assert lines[1:] == [
        "2020-01-02T00:00:00Z,ABC,100,105,95,100,100,,",
        "2020-01-03T00:00:00Z,ABC,100,112.5,100,110,0.5,0.25,",
        "2020-01-06T00:00:00Z,ABC,11,12,11,12,700,,10:1",
        "2020-01-07T00:00:00Z,ABC,12,12,12,12.5,800,0.3,",
    ]
    assert [path.partition("?")[2] for _, path in yahoo.requests if "/ABC" in path] == [
        "range=1y&interval=1d&events=div%2Csplit&crumb=crumb"
    ]


def test_what_was_recorded_is_worth_through_all_splits_what_yahoo_says(record, yahoo, tmp_path):
    """Who holds shares from the first bar on has the growth of Yahoo's adjusted prices, by the file alone."""
    adjusted = [3.0, 3.3, 3.6, 3.9, 4.2, 4.5]
    rows = [(opens(day), close, close, close, close, 0) for day, close in enumerate(adjusted)]
    yahoo.bars("ABC", "1d", *rows)
    for day, *ratio in ((1, 3.0, 2.0), (3, 1.0, 8.0), (5, 10.0, 1.0)):
        yahoo.split("ABC", opens(day), *ratio)
        yahoo.dividend("ABC", opens(day), 0.01)
    record(ABC=None)
    bars = recorded.read(tmp_path / "market.csv")["ABC"]
    assert [bar.split for bar in bars] == [1, Fraction(3, 2), 1, Fraction(1, 8), 1, 10]
    assert [bar.dividend for bar in bars] == [0, Decimal("0.0125"), 0, Decimal("0.1"), 0, Decimal("0.01")]
    held, worth = Fraction(1), []
    for bar in bars:
        held *= bar.split
        worth.append(held * Fraction(bar.close) / Fraction(bars[0].close))
    assert worth == [Fraction(str(close)) / 3 for close in adjusted]


def test_what_happens_on_a_day_without_a_bar_is_the_next_ones(record, yahoo):
    yahoo.bars("ABC", "1d", *[(opens(day), *[6.0] * 4, 1) for day in (0, 4, 5)])
    yahoo.bars("XYZ", "1d", *[(opens(day), *[6.0] * 4, 1) for day in (0, 1)])
    for day in (2, 3, 4):
        yahoo.split("ABC", opens(day), 3.0, 2.0)
        yahoo.dividend("ABC", opens(day), 1.0)
    yahoo.split("XYZ", opens(4), 2.0)
    _, lines = record(ABC=None, XYZ=None)
    assert lines[1:] == [
        "2020-01-02T00:00:00Z,ABC,20.25,20.25,20.25,20.25,0.2962963,,",
        "2020-01-02T00:00:00Z,XYZ,12,12,12,12,0.5,,",
        "2020-01-03T00:00:00Z,XYZ,12,12,12,12,0.5,,",
        "2020-01-06T00:00:00Z,ABC,6,6,6,6,1,4.75,27:8",
        "2020-01-07T00:00:00Z,ABC,6,6,6,6,1,,",
    ]


def test_an_event_is_of_the_exchanges_own_day(record, yahoo):
    opens = [datetime(2020, 1, day, 23, tzinfo=UTC) for day in (1, 2)]  # At 10:00 of the next day.
    yahoo.bars("ABC", "1d", *[(moment, 1, 1, 1, 1, 1) for moment in opens], zone="Australia/Sydney")
    yahoo.split("ABC", opens[1], 2.0)
    _, lines = record(ABC=None)
    assert [(line[:10], line.rpartition(",")[2]) for line in lines[1:]] == [
        ("2020-01-02", ""),
        ("2020-01-03", "2:1"),
    ]


def test_a_price_that_the_books_cannot_have_before_a_split_is_left_out(record, yahoo):
    rows = [(0, 2e-6, 1), (1, 1e-8, 1), (4, 1, 1)]
    yahoo.bars("ABC", "1d", *[(opens(day), None, None, 9e9, close, size) for day, close, size in rows])
    yahoo.split("ABC", opens(4), 1.0, 10.0)
    yahoo.bars("XYZ", "1d", *[(opens(day), 1, 2e9, 1, 1, 1) for day in (0, 4)])
    yahoo.split("XYZ", opens(4), 10.0)
    done, lines = record(ABC=None, XYZ=None)
    assert "ABC: left out 1 days whose close is 0 to 8 decimals, or no price." in done.stderr
    assert lines[1:] == [
        "2020-01-02T00:00:00Z,ABC,,,900000000,0.0000002,10,,",
        "2020-01-02T00:00:00Z,XYZ,10,,10,10,0.1,,",
        "2020-01-06T00:00:00Z,ABC,,,9000000000,1,1,,1:10",
        "2020-01-06T00:00:00Z,XYZ,1,2000000000,1,1,1,,10:1",
    ]


def test_splits_that_no_file_could_have_are_refused_and_no_file_is_made(record, yahoo):
    yahoo.bars("ABC", "1d", *[(opens(day), 1, 1, 1, 1, 1) for day in (0, 4)])
    for day in (2, 3):
        yahoo.split("ABC", opens(day), 1000.0)
    done, lines = record(ABC=None)
    assert (done.returncode, lines) == (1, None)
    assert done.stderr.splitlines()[-1] == "Error: ABC: its splits or dividends are too many."
