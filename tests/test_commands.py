"""What an operator types: `flask user`, `flask audit`, `python app.py`, and settings that are wrong."""

import re
import subprocess
import sys

import pytest
import requests
from cast import ADMIN, ROOT, Server, Trader, environment, flask, loaded


def user(database, *arguments):
    return flask("user", *arguments, DATABASE_URL=database.url, PRICE_SOURCES="sample")


def test_an_account_is_opened_listed_rekeyed_and_closed(database, server, engine_name):
    email = "carol@example.com"
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


def test_a_database_without_tables_is_one_clear_line(new_database):
    done = python_app_py(DATABASE_URL=new_database().url)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
