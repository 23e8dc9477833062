"""The API's description is true: every answer keeps to it, and what is made from it works."""

import re
import shutil
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import pytest
import requests
import simplejson
from cast import ADMIN, Trader
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from openapi_spec_validator import validate

sys.path.insert(0, str(Path(__file__).parent.parent))

from messages import ACCOUNT_LIMIT, HUNDRED, ORDER_LIMIT, UNIT, checked_amount, number_below

TOOLS = Path(sys.executable).parent
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def description(server) -> dict:
    return requests.get(f"{server.url}/openapi.json", timeout=30).json()


def test_the_description_is_valid(description):
    validate(description)


def test_a_validator_that_reckons_with_floats_takes_every_amount_in_cents(description):
    schemas = description["components"]["schemas"]
    quantity = Draft202012Validator(schemas["Order"]["properties"]["quantity"])
    assert [cents for cents in range(1, 100_001) if not quantity.is_valid(cents / 100)] == []
    assert all(
        quantity.is_valid(taken) for taken in (None, "all", "1E-7", 0.8118999999999996, "0.30000000000000004")
    )
    for wrong in (0, -0.01, 10_000_000_000, "-1", "ten"):
        assert not quantity.is_valid(wrong)


AMOUNTS = {
    "an amount": (ORDER_LIMIT, UNIT),
    "a percentage": (HUNDRED, UNIT),
    "cash": (ACCOUNT_LIMIT, Decimal(0)),
}


@pytest.mark.parametrize("kind", AMOUNTS)
@given(data=st.data())
def test_each_text_that_is_described_as_an_amount_is_taken_as_one(kind, data):
    limit, least = AMOUNTS[kind]
    described = number_below(limit, least).json_schema["anyOf"]
    pattern = data.draw(st.sampled_from([one["pattern"] for one in described if "pattern" in one]))
    text = data.draw(st.from_regex(re.compile(pattern, re.ASCII), fullmatch=True))
    checked_amount(text, limit=limit, least=least)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("an amount", "9999999999.99"),
        ("an amount", "9e8"),
        ("a percentage", "99.5"),
        ("a percentage", "9.5e0"),
        ("cash", "89999999999.5"),
        ("cash", "0"),
        ("cash", "1e9"),
    ],
)
def test_amounts_up_to_their_limit_are_described(kind, text):
    limit, least = AMOUNTS[kind]
    Draft202012Validator(number_below(limit, least).json_schema).validate(text)


def test_every_route_is_described_and_nothing_else(app, description):
    served = {
        (method.lower(), re.sub(r"<(?:\w+[^:>]*:)?(.+?)>", r"{\1}", rule.rule))
        for rule in app.app.url_map.iter_rules()
        for method in rule.methods - {"HEAD", "OPTIONS"}
        if not rule.endpoint.endswith("static")
        and not rule.endpoint.startswith("alpaca.")  # Alpaca has its own.
    }
    told = {(method, path) for path, methods in description["paths"].items() for method in methods}
    assert told == served


def test_every_code_is_described_with_its_status(app, description):
    """With the routes that answer it, but for the one of the routes that there are not."""
    told = {
        code: int(status)
        for methods in description["paths"].values()
        for operation in methods.values()
        for status, response in operation["responses"].items()
        if "application/problem+json" in response["content"]
        for code in re.findall(r"`(\w+)`", response["description"])
    }
    assert told | {"method_not_allowed": 405} == app.STATUS
    for code, status in app.STATUS.items():
        assert code in description["components"]["schemas"][f"Problem{status}"]["properties"]["code"]["enum"]


def test_the_face_for_alpacas_clients_is_described_beside_it(server, app):
    answer = requests.get(f"{server.url}/alpaca/openapi.json", timeout=30)
    told = answer.json()
    validate(told)
    served = {
        re.sub(r"<(?:[^<>]*:)?(\w+)>", r"{\1}", rule.rule)
        for rule in app.app.url_map.iter_rules()
        if rule.endpoint.startswith("alpaca.")
    }
    assert set(told["paths"]) == served > {"/alpaca/v2/orders", "/alpaca/v2/account"}
    order = told["paths"]["/alpaca/v2/orders"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert {"symbol", "side", "client_order_id"} < set(
        told["components"]["schemas"][order["$ref"].split("/")[-1]]["properties"]
    )
    operations = [operation for methods in told["paths"].values() for operation in methods.values()]
    parts = [part for operation in operations for part in operation["parameters"] if part["in"] == "path"]
    assert {(part["name"], part["schema"]["type"]) for part in parts} == {
        (name, "string") for name in ("activity", "id", "kind", "symbol")
    }


def test_each_route_tells_its_own_refusals(description):
    """As read off the program: through functions, methods, exception handlers and the guard."""
    trade = description["paths"]["/api/v1/trade"]["post"]
    told = {status: response["description"] for status, response in trade["responses"].items()}
    for status, code in {"409": "insufficient_shares", "422": "idempotency_key_reused"}.items():
        assert f"`{code}`" in told[status]
    reset = description["paths"]["/api/v1/account/reset"]["post"]["responses"]
    assert (
        "`outcome_unknown`" in reset["503"]["description"]
    )  # Raised by `transaction`, named by its handler.
    assert "`unauthorized`" in told["401"]
    taken = ["Idempotency-Key", "X-Request-Id", "X-Simulate-Fault", "dry_run"]
    assert [p["name"] for p in trade["parameters"]] == taken
    assert "Idempotent-Replayed" in trade["responses"]["200"]["headers"]
    assert "409" not in description["paths"]["/api/v1/balance"]["get"]["responses"]
    for path, methods in description["paths"].items():
        for operation in methods.values():
            assert path.startswith("/api/") == ("429" in operation["responses"])


def test_every_route_answers_as_described(description, alice, server):
    """Each success that is described is heard here, and the refusals that a trader can bring about."""
    admin = Trader(server, "", ADMIN, 0)
    for path in ("/", "/docs", "/openapi.json", "/alpaca/openapi.json", "/health"):
        alice.ask("GET", path)
    alice.ask("PUT", "/api/v1/market/clock", json={"at": None})
    alice.ask("POST", "/api/v1/market/advance")
    alice.ask("PUT", "/api/v1/market/clock", json={"at": "2012-06-01T00:00:00Z"})
    alice.ask("PUT", "/api/v1/market/clock", json={"at": "yesterday"})
    alice.ask("POST", "/api/v1/market/advance", json={"bars": 2})
    alice.ask("PUT", "/api/v1/market/prices/IBM", json={"price": "150.25"})
    for path in (
        "price/IBM",
        "price/NOPE",
        "price/!",
        "price/A%2FB",
        "prices?tickers=IBM,NOPE",
        "bars/IBM?timeframe=1w&limit=2",
        "bars/IBM?timeframe=1m",
        "bars/NOPE",
        "prices",
        "account/history",
        "rules",
        "market",
        "trades/0",
    ):
        alice.ask("GET", f"/api/v1/{path}")
    for order in (("buy", 10, "IBM"), ("buy", 3, "AAPL", "700.5"), ("sell", "2.5", "IBM")):
        alice.order(*order)
    for order in (("buy", 10, "IBM", 1), ("sell", 1, "IBM", 900), ("buy", 10**9, "IBM"), ("sell", 99, "IBM")):
        assert alice.order(*order).status_code == 409
    alice.order("buy", 1, "NOPE")
    alice.ask("POST", "/api/v1/trade", data="{", headers=JSON)
    alice.ask("POST", "/api/v1/trade", data="{}")
    alice.ask("POST", "/api/v1/trade", data=" " * 70_000, headers=JSON | {"Connection": "close"})
    for fault in ("rate_limited", "price_unavailable", "error_before_commit", "error_after_commit"):
        alice.order("buy", 1, "IBM", fault=fault)
    alice.order("buy", 1, "IBM", key="one")
    assert alice.order("buy", 1, "IBM", key="one").headers["Idempotent-Replayed"] == "true"
    assert alice.order("buy", 2, "IBM", key="one").status_code == 422
    alert = {"key": alice.key, "ticker": "IBM", "action": "buy", "quantity": 1, "id": "two"}
    for status, more in (
        (200, {}),
        (422, {"quantity": 2}),
        (401, {"key": None}),
        (404, {"ticker": "NOPE", "id": None}),
    ):
        assert alice.ask("POST", "/api/v1/webhook/tradingview", json=alert | more).status_code == status
    alice.ask("POST", "/api/v1/trade?dry_run=true", json={"ticker": "IBM", "action": "buy", "quantity": 1})
    resting = {"ticker": "IBM", "action": "buy", "quantity": 1, "order_type": "limit", "limit_price": 5}
    placed = alice.ask("POST", "/api/v1/orders", json=resting | {"take_profit": {"limit_price": 9}}).json()
    changed = alice.ask("PATCH", f"/api/v1/orders/{placed['id']}", json={"limit_price": 6}).json()
    for path in ("orders", "orders.csv", f"orders/{changed['id']}", "orders/0"):
        alice.ask("GET", f"/api/v1/{path}")
    for order in (changed, changed, {"id": "0"}):
        alice.ask("DELETE", f"/api/v1/orders/{order['id']}")
    alice.ask("PATCH", f"/api/v1/orders/{placed['id']}", json={"limit_price": 6})
    alice.ask("POST", "/api/v1/orders", json=resting)
    alice.ask("DELETE", "/api/v1/orders")
    newest = alice.get("/api/v1/trades", limit=1)["trades"][0]["id"]
    paths = ("balance", "portfolio", f"trades/{newest}", "trades.csv", "account/history", "account/audit")
    for path in (*paths, "users", "balance?what=1", "account/history?run=9"):
        alice.ask("GET", f"/api/v1/{path}")
    alice.ask("DELETE", "/api/v1/market/prices/IBM")
    alice.ask("POST", "/api/v1/account/reset")
    new = admin.ask("POST", "/api/v1/users", json={"email": f"new-{alice.email}"}).json()
    admin.ask("POST", "/api/v1/users", json={"email": f"new-{alice.email}"})
    admin.ask("POST", f"/api/v1/users/{new['user_id']}/rotate-key")
    wrong = {"ticker": "IBM", "quantity": 1, "cash": "-0.5", "reason": "It was promised."}
    admin.ask("POST", f"/api/v1/users/{new['user_id']}/corrections", json=wrong)
    admin.ask("DELETE", f"/api/v1/users/{new['user_id']}")
    admin.ask("DELETE", f"/api/v1/users/{new['user_id']}")
    assert admin.ask("DELETE", f"/api/v1/users/{10**30}").status_code == 404
    admin.ask("GET", "/api/v1/users")
    admin.ask("GET", "/api/v1/balance")
    del alice.session.headers["Authorization"]
    alice.ask("GET", "/api/v1/balance")
    described = {
        (path, method, int(status))
        for path, methods in description["paths"].items()
        for method, operation in methods.items()
        for status in operation["responses"]
        if status.startswith("2")
    }
    assert described <= alice.heard | admin.heard


def without_drills(description: dict, key: str) -> dict:
    """The description less the header that asks for the 5xx which must not be found, and a key for alerts."""
    copy = simplejson.loads(simplejson.dumps(description))
    copy["components"]["schemas"]["Alert"]["properties"]["key"] = {"const": key}
    for path in ("/api/v1/trade", "/api/v1/webhook/tradingview", "/api/v1/orders"):
        order = copy["paths"][path]["post"]
        order["parameters"] = [p for p in order["parameters"] if p["name"] != "X-Simulate-Fault"]
    return copy


SCHEMATHESIS = """
[checks.positive_data_acceptance]
expected-statuses = [200, 201, 401, 403, 404, 409, 422]

# Well formed, and refused for what it means: a page that is not one's own, a time that is not recorded, an
# order without a size or with a price that its type has not, tickers of which one is too long or a hundred
# too many, bars finer than recorded, a correction of nothing.
[[operations]]
include-name = [
  "GET /api/v1/trades", "GET /api/v1/orders", "GET /api/v1/prices", "PUT /api/v1/market/clock",
  "POST /api/v1/trade", "POST /api/v1/webhook/tradingview", "GET /api/v1/bars/{ticker}",
  "POST /api/v1/orders", "PATCH /api/v1/orders/{id}",
  "POST /api/v1/users/{user_id}/corrections",
]
[operations.checks.positive_data_acceptance]
expected-statuses = [200, 201, 400, 401, 403, 404, 409, 422]
"""


@pytest.mark.parametrize("who", ["trader", "admin"])
def test_random_requests_find_no_fault_and_no_answer_that_is_not_described(who, description, alice, tmp_path):
    (tmp_path / "openapi.json").write_text(simplejson.dumps(without_drills(description, alice.key)))
    (tmp_path / "schemathesis.toml").write_text(SCHEMATHESIS)
    key, paths = (alice.key, "^(?!/api/v1/users)") if who == "trader" else (ADMIN, "^/api/v1/users")
    command = [TOOLS / "schemathesis", "run", "openapi.json", "--url", alice.server.url, "--checks", "all"]
    command += ["-H", f"Authorization: Bearer {key}", "--include-path-regex", paths, "--no-color"]
    command += ["--phases", "examples,coverage,fuzzing", "--max-examples", "5", "--seed", "1"]
    command += ["--generation-database", "none"]
    command += ["-H", f"X-Forwarded-For: {who}"]  # Each has a hundred wrong keys a minute, and tries some.
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    tested = int(re.search(r"Tested: (\d+)", run.stdout)[1])
    told = [
        method
        for path in description["paths"]
        if re.match(paths, path)
        for method in description["paths"][path]
    ]
    assert tested == len(told)


def test_a_client_made_from_the_description_trades(description, alice, tmp_path, monkeypatch):
    (tmp_path / "openapi.json").write_text(simplejson.dumps(description))
    made = subprocess.run(
        [TOOLS / "openapi-python-client", "generate", "--path", "openapi.json", "--meta", "none"]
        + ["--output-path", "broker_client", "--fail-on-warning"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        env={"PATH": f"{TOOLS}:{Path(shutil.which('env')).parent}"},
    )
    assert made.returncode == 0, made.stdout + made.stderr
    alice.sees("IBM", at="150.25")
    bot = f"""
from broker_client import AuthenticatedClient
from broker_client.api.trading import trade
from broker_client.models import Order, OrderAction
client = AuthenticatedClient(base_url="{alice.server.url}", token="{alice.key}")
order = Order(ticker="IBM", action=OrderAction.BUY, quantity="10", price="150.25")
print(trade.sync(client=client, body=order, idempotency_key="one").total_amount)
"""
    ran = subprocess.run(
        [sys.executable, "-c", bot], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert ran.stdout == "1502.5\n", ran.stdout + ran.stderr
    assert alice.holdings["IBM"] == (10, 1502.5)


def test_the_page_is_served_whole_and_asks_nobody_else(server):
    page = requests.get(f"{server.url}/docs", timeout=30)
    policy = page.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "http" not in page.text + policy
    for asset in re.findall(r'(?:src|href)="([^"]+)"', page.text):
        assert requests.get(server.url + asset, timeout=30).status_code == 200, asset
    script = requests.get(f"{server.url}/static/docs.js", timeout=30).text
    assert "http" not in script
    assert 'url: "/openapi.json"' in script
