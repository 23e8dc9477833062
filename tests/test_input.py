"""Rubbish: whatever a client sends, it gets a clear no, and nothing has changed."""

import json
import socket

import pytest
from cast import exact
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

ORDER = {"ticker": "AAPL", "action": "buy", "quantity": "1"}
JSON = {"Content-Type": "application/json"}

NOT_JSON = [
    b"",
    b"{",
    b"\x00",
    b"\xff\xfe{\x00}\x00",
    json.dumps(ORDER).encode("utf-16"),
    b"[" * 60_000,
    b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
    b'{"ticker":"AAPL","action":"buy","quantity":NaN}',
    b'{"ticker":"AAPL","action":"buy","quantity":Infinity}',
    b'{"ticker":"AAPL","action":"buy","quantity":1,"quantity":2}',
    b'{"ticker":"AAPL","action":"buy","quantity":1e999999999999999999999}',
    b'{"ticker":"AAPL","action":"buy","quantity":01}',
]

WRONG_ORDERS = [
    [],
    "AAPL",
    None,
    7,
    {},
    ORDER | {"quantity": 0},
    ORDER | {"quantity": -1},
    ORDER | {"quantity": "-0"},
    ORDER | {"quantity": True},
    ORDER | {"quantity": None},
    ORDER | {"quantity": []},
    ORDER | {"quantity": {"$gt": 0}},
    ORDER | {"quantity": " 1"},
    ORDER | {"quantity": "1_0"},
    ORDER | {"quantity": "1e"},
    ORDER | {"quantity": "all"},
    ORDER | {"quantity": "1e9999"},
    ORDER | {"quantity": "9999999999.9999999951", "action": "sell"},
    ORDER | {"price": "9999999999.999999995"},
    ORDER | {"price": "0.000000004"},
    ORDER | {"notional": 1},
    ORDER | {"quantity": "9999999999." + "9" * 40, "action": "sell"},
    ORDER | {"quantity": "9" * 40 + "." + "9" * 40 + "e-30", "action": "sell"},
    ORDER | {"quantity": None, "notional": "0.000000009"},
    ORDER | {"quantity": None, "notional": "all"},
    ORDER | {"action": None},
    ORDER | {"action": "ＢＵＹ"},
    ORDER | {"tikcer": None},
    ORDER | {"quantity": "１"},
    ORDER | {"quantity": "NaN"},
    ORDER | {"quantity": "0.000000001"},
    ORDER | {"quantity": "10000000000"},
    ORDER | {"quantity": "9" * 5000},
    ORDER | {"price": "free"},
    ORDER | {"action": "short"},
    ORDER | {"action": ["buy"]},
    ORDER | {"ticker": ""},
    ORDER | {"ticker": "A" * 21},
    ORDER | {"ticker": "AAPL\n"},
    ORDER | {"ticker": "AAPL\x00"},
    ORDER | {"ticker": "ıbm"},
    ORDER | {"ticker": "ААPL"},  # Cyrillic
    ORDER | {"ticker": ".."},
    ORDER | {"ticker": "\ud800"},
    ORDER | {"ticker": 1},
    ORDER | {"tikcer": "AAPL"},
    ORDER | {"\ud800": 1},
]


def refused(response, *statuses) -> dict:
    assert response.status_code in statuses, response.text
    problem = exact(response)
    assert problem.keys() >= {"type", "title", "status", "detail", "code"}
    assert len(problem["detail"]) > 10
    assert "Traceback" not in response.text
    return problem


@pytest.fixture(scope="module")
def carol(server):
    """Somebody who holds one share, and whom nothing below may cost a cent."""
    trader = server.trader(name="carol").sees("AAPL", at=100)
    trader.buys(1, "AAPL")
    return trader


@pytest.fixture(autouse=True)
def nothing_changes(carol):
    before = carol.books
    yield
    assert carol.books == before
    assert "Traceback" not in carol.server.log()


@pytest.mark.parametrize("body", NOT_JSON, ids=lambda body: repr(body[:40]))
def test_a_body_that_is_no_json_is_refused(carol, body):
    response = carol.ask("POST", "/api/v1/trade", data=body, headers=JSON)
    assert refused(response, 400)["code"] == "invalid_json"


@pytest.mark.parametrize("order", WRONG_ORDERS, ids=lambda order: repr(order)[:60])
def test_a_wrong_order_is_refused_with_the_field_that_is_wrong(carol, order):
    response = carol.ask("POST", "/api/v1/trade", data=json.dumps(order), headers=JSON)
    problem = refused(response, 400)
    assert problem["code"] == "invalid_request"
    assert problem["errors"][0].keys() == {"field", "message"}


def test_the_numbers_of_json_are_refused_by_their_value(carol):
    for number in (
        "1e9999999",
        "-1e9999999",
        "1e999999999999999999",
        "1e400",
        "-1e400",
        "1e-400",
        "-0",
        "9" * 5000,
        "1e10",
        "0.1e-8",
    ):
        body = '{"ticker":"AAPL","action":"buy","quantity":' + number + "}"
        response = carol.ask("POST", "/api/v1/trade", data=body, headers=JSON)
        assert refused(response, 400)["errors"][0]["field"] == "quantity"


def test_a_body_must_say_that_it_is_json_and_stay_below_64_kib(carol):
    body = json.dumps(ORDER)
    assert refused(carol.ask("POST", "/api/v1/trade", data=body), 415)
    assert refused(carol.ask("POST", "/api/v1/trade", data=body, headers={"Content-Type": "text/json"}), 415)
    assert refused(carol.ask("POST", "/api/v1/trade", data=b" " * 65_537, headers=JSON), 413)


@pytest.mark.parametrize(
    "query",
    [
        "limit=5_0", "limit=%2B5", "limit=%EF%BC%95", "cursor=1_0", "run=%D9%A1",
        "limit=0", "limit=501", "limit=x", "limit=1&limit=2", "limit=" + "9" * 3000, "cursor=x",
        "cursor=-1",
        "cursor=99999999999999999999", "since=yesterday", "since=2026-01-01", "since=1700000000",
        "until=0001-01-01T00:00:00%2B14:00", "until=2026-13-01T00:00:00Z", "action=hold", "ticker=%00",
        "run=0",
        "run=99999999999", "unknown=1", "ticker=%ff", "since=2026-01-01T99:99:99Z",
    ],
)  # fmt: skip
def test_a_wrong_query_is_refused(carol, query):
    for path in ("/api/v1/trades", "/api/v1/trades.csv"):
        problem = refused(carol.ask("GET", f"{path}?{query}"), 400)
        assert problem["code"] == "invalid_request"


@pytest.mark.parametrize("key", [b"", b"\xff", "ü".encode(), b"x" * 256])
def test_an_idempotency_key_is_1_to_255_printable_characters(carol, key):
    response = carol.ask("POST", "/api/v1/trade", json=ORDER, headers={"Idempotency-Key": key})
    refused(response, 400)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/api/v1/nothing", 404), ("DELETE", "/api/v1/balance", 405), ("GET", "/api/v1/trade", 405),
        ("GET", "/api/v1/trades/x", 404), ("GET", "/api/v1/trades/-1", 404),
        ("GET", "/api/v1/trades/1e3", 404),
        ("GET", "/api/v1/trades/99999999999999999999", 404), ("GET", "/api/v1/price/..%2f..%2fetc", 400),
        ("GET", "/api/v1/price/%00", 400), ("GET", "/api/v1/price/AA PL", 400),
        ("GET", "/api/v1/price/..", 404),
        ("GET", "/api/v1/price/" + "A" * 1000, 400), ("PUT", "/api/v1/market/prices/NOPE", 415),
        ("DELETE", "/api/v1/market/prices/NOPE", 404), ("POST", "/api/v1/market/advance", 409),
        ("GET", "/api/v1/account/history?run=7", 404),
        ("GET", "/api/v1/balance/", 404), ("GET", "/health?x=1", 200), ("BREW", "/api/v1/balance", 405),
    ],
)  # fmt: skip
def test_a_wrong_path_or_method_is_refused(carol, method, path, status):
    response = carol.ask(method, path)
    assert response.status_code == status, response.text
    if status != 200:
        refused(response, status)
    if status == 405:
        assert response.headers["Allow"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/api/v1/account/reset", {"cash": -1}),
        ("/api/v1/account/reset", {"cash": "1e-9"}),
        ("/api/v1/account/reset", {"cash": "-1e-9"}),
        ("/api/v1/account/reset", {"cash": "90000000000"}),
        ("/api/v1/account/reset", {"cash": True}),
        ("/api/v1/account/reset", {"money": 1}),
        ("/api/v1/market/advance", {"bars": 0}),
        ("/api/v1/market/advance", {"bars": 1.5}),
        ("/api/v1/market/advance", {"bars": True}),
        ("/api/v1/market/advance", {"bars": 10**30}),
    ],
    ids=str,
)
def test_a_wrong_control_is_refused(carol, path, body):
    assert refused(carol.ask("POST", path, json=body), 400)["code"] == "invalid_request"


@pytest.mark.parametrize("at", ["yesterday", 5, True, "1999-01-01T00:00:00Z", "2030-01-01T00:00:00Z", ""])
def test_a_wrong_clock_is_refused(carol, at):
    refused(carol.ask("PUT", "/api/v1/market/clock", json={"at": at}), 400)
    refused(carol.ask("PUT", "/api/v1/market/clock", json={}), 400)


@pytest.mark.parametrize("fault", ["", "nonsense", "latency=", "latency=-5", "latency=1e9"])
def test_an_unknown_drill_is_refused(carol, fault):
    headers = {"X-Simulate-Fault": fault}
    refused(carol.ask("POST", "/api/v1/trade", json=ORDER, headers=headers), 400)


RAW = {
    "a short body": b"Content-Length: 500\r\n\r\n" + json.dumps(ORDER).encode(),
    "a bad chunk": b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
    "a whole order and a bad chunk": b"Transfer-Encoding: chunked\r\n\r\n"
    + f"{len(json.dumps(ORDER)):x}\r\n{json.dumps(ORDER)}\r\nzz\r\n\r\n".encode(),
    "a cut chunk": b"Transfer-Encoding: chunked\r\n\r\n40\r\n" + json.dumps(ORDER).encode(),
    "as much as may be and a bad chunk": b"Transfer-Encoding: chunked\r\n\r\n10000\r\n"
    + json.dumps(ORDER).ljust(64 * 1024).encode()
    + b"\r\nzz\r\n\r\n",
    "no length": b"\r\n",
    "a negative length": b"Content-Length: -1\r\n\r\n",
    "two lengths": b"Content-Length: 3\r\nContent-Length: 4\r\n\r\n{}  ",
    "a huge header": b"X-Big: " + b"x" * 60_000 + b"\r\n\r\n",
    "length and chunks": b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
}


@pytest.mark.parametrize("name", RAW)
def test_bytes_that_are_hardly_http_book_nothing(carol, name):
    for _ in range(8):  # By now every process knows her, and would let her in on trust.
        assert carol.ask("GET", "/api/v1/portfolio", headers={"Connection": "close"}).status_code == 200
    with socket.create_connection(("127.0.0.1", carol.server.port), timeout=10) as connection:
        connection.sendall(
            b"POST /api/v1/trade HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            + f"Authorization: Bearer {carol.key}\r\n".encode()
            + RAW[name]
        )
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        while part := connection.recv(65536):
            answer += part
    assert answer == b"" or answer.startswith((b"HTTP/1.1 4", b"HTTP/1.0 4")), answer[:200]


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
members = st.dictionaries(
    st.sampled_from(["ticker", "action", "quantity", "price", "cash", "at", "bars", "extra"]), anything
)
paths = st.sampled_from(
    [
        ("POST", "/api/v1/trade?dry_run=true"), ("PUT", "/api/v1/market/prices/ZZZ"),
        ("POST", "/api/v1/users"), ("GET", "/api/v1/trades"),
    ]
)  # fmt: skip


@settings(max_examples=150, suppress_health_check=list(HealthCheck))
@given(
    paths, st.one_of(members, anything), st.dictionaries(st.text(max_size=5), st.text(max_size=9), max_size=2)
)
def test_no_request_whatever_is_answered_with_a_500(carol, target, document, query):
    method, path = target
    response = carol.ask(method, path, data=json.dumps(document), headers=JSON, params=query)
    assert response.status_code < 500, response.text


@settings(max_examples=150, suppress_health_check=list(HealthCheck))
@given(st.binary(max_size=200), st.text(st.characters(codec="latin-1"), max_size=30))
def test_no_bytes_whatever_are_answered_with_a_500(carol, body, key):
    headers = JSON | {
        "Idempotency-Key": "".join(c for c in key if c not in "\r\n\0").strip().encode("latin-1")
    }
    response = carol.ask("POST", "/api/v1/trade", data=body, headers=headers)
    assert 400 <= response.status_code < 500, response.text


@pytest.mark.parametrize(
    "number", ["1e9999999", "-1e9999999", "89999999999." + "9" * 60, "1e999999999999999999"]
)
def test_no_number_is_too_long_to_be_refused(carol, number):
    asked = {
        ("POST", "/api/v1/trade"): ("price", '"ticker":"AAPL","action":"buy","quantity":1'),
        ("POST", "/api/v1/trade?dry_run=true"): ("notional", '"ticker":"AAPL","action":"buy"'),
        ("POST", "/api/v1/account/reset"): ("cash", ""),
        ("POST", "/api/v1/market/advance"): ("bars", ""),
        ("PUT", "/api/v1/market/prices/IBM"): ("price", ""),
    }
    for (method, path), (field, rest) in asked.items():
        body = "{" + ", ".join(filter(None, [rest, f'"{field}":{number}'])) + "}"
        problem = refused(carol.ask(method, path, data=body, headers=JSON), 400)
        assert problem["errors"][0]["field"] == field
