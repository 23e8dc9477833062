"""TradingView's webhook: an order whose key is in its body, since an alert can set no header."""

import json
import re
import socket
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from threading import Barrier

import pytest
import requests
from cast import ADMIN, ROOT, Here, Server, Trader, exact

PATH = "/api/v1/webhook/tradingview"
TEXT = {"Content-Type": "text/plain; charset=utf-8"}


class TradingView:
    """Sends alerts to a broker as TradingView does: text, and no header that says who it is."""

    def __init__(self, server: Server, address="198.51.100.1"):
        self.server, self.session = server, requests.Session()
        self.session.headers = TEXT | {"X-Forwarded-For": address}

    def posts(self, body, **headers) -> requests.Response:
        """Post that text, or the JSON of it, and hear the answer, which must be as the server says."""
        text = body if isinstance(body, str | bytes) else json.dumps(body)
        answer = self.session.post(f"{self.server.url}{PATH}", data=text, headers=headers, timeout=60)
        self.server.witness.hears(answer)
        return answer

    def alerts(self, trader: Trader, action="buy", ticker="AAPL", headers=None, **more) -> requests.Response:
        """Post an order with the trader's key."""
        alert = {"key": trader.key, "ticker": ticker, "action": action}
        return self.posts(alert | more, **(headers or {}))


@pytest.fixture
def tradingview(server) -> TradingView:
    return TradingView(server)


def refused(answer: requests.Response, status: int) -> dict:
    assert answer.status_code == status, answer.text
    return exact(answer)


# What an alert can say


def test_an_alert_buys_and_sells_all_of_it(alice, tradingview):
    alice.sees("AAPL", at="150.25")
    bought = exact(tradingview.alerts(alice, "BUY", quantity="10"))
    assert (bought["trade_type"], bought["quantity"], bought["price"]) == ("buy", 10, Decimal("150.25"))
    assert alice.holdings == {"AAPL": (10, Decimal("1502.5"))}
    sold = exact(tradingview.alerts(alice, "sell", quantity="ALL"))
    assert (sold["quantity"], alice.holdings, alice.cash) == (10, {}, 100000)
    assert alice.audit()["ok"]


def test_an_alert_trades_for_dollars_and_at_a_limit(alice, tradingview):
    alice.sees("AAPL", at=150)
    assert exact(tradingview.alerts(alice, notional="300"))["quantity"] == 2
    assert exact(tradingview.alerts(alice, quantity=1, price="151"))["price"] == 151
    low = refused(tradingview.alerts(alice, quantity=1, price=149), 409)
    assert (low["code"], low["market_price"]) == ("price_below_market", 150)
    assert alice.cash == 100000 - 300 - 151


@pytest.mark.parametrize(
    ("symbol", "ticker"),
    [
        ("NASDAQ:AAPL", "AAPL"),
        ("nasdaq_dly:aapl", "AAPL"),
        ("NYSE_DL:IBM", "IBM"),
        ("BTCUSD", "BTC-USD"),
        ("COINBASE:BTCUSD", "BTC-USD"),
        ("ETH/USD", "ETH-USD"),
    ],
)
def test_a_ticker_may_be_written_as_tradingview_writes_it(alice, tradingview, symbol, ticker):
    alice.sees(ticker, at=2)
    assert exact(tradingview.alerts(alice, ticker=symbol, quantity=1))["ticker"] == ticker


@pytest.mark.parametrize(
    "symbol", ["XETR:SAP", "NASDAQ:NYSE:AAPL", ":AAPL:", "NASDAQ:", "{{ticker}}", 7, ["AAPL"]]
)
def test_a_ticker_that_may_mean_another_share_is_refused(alice, tradingview, symbol):
    problem = refused(tradingview.alerts(alice, ticker=symbol, quantity=1), 400)
    assert [error["field"] for error in problem["errors"]] == ["ticker"]
    assert alice.trades == []


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/json", "application/x-www-form-urlencoded", "multipart/form-data", ""]
)
def test_an_alert_may_be_of_any_content_type(alice, tradingview, kind):
    alice.sees("AAPL", at=1)
    answer = tradingview.alerts(alice, quantity=1, headers={"Content-Type": kind})
    assert answer.status_code == 200, answer.text


# Once


def test_an_alert_that_is_sent_again_with_its_id_is_booked_once(alice, tradingview):
    alice.sees("AAPL", at=100)
    first, second = (tradingview.alerts(alice, quantity=1, id="Long AAPL 2012") for _ in "12")
    assert first.json() == second.json()
    assert ("Idempotent-Replayed" in first.headers, second.headers["Idempotent-Replayed"]) == (False, "true")
    assert alice.order("buy", 1, "AAPL", key="Long AAPL 2012").headers["Idempotent-Replayed"] == "true"
    assert len(alice.trades) == 1
    other = refused(tradingview.alerts(alice, quantity=2, id="Long AAPL 2012"), 422)
    assert (other["code"], other["trade_id"]) == ("idempotency_key_reused", first.json()["id"])
    assert alice.cash == 99900


def test_the_id_counts_before_the_header(alice, tradingview):
    alice.sees("AAPL", at=100)
    for id in ("one", "two", None):
        tradingview.alerts(alice, quantity=1, id=id, headers={"Idempotency-Key": "one"})
    assert len(alice.trades) == 2


def test_alerts_without_an_id_are_booked_each(alice, tradingview):
    alice.sees("AAPL", at=100)
    for _ in range(2):
        assert "Idempotent-Replayed" not in tradingview.alerts(alice, quantity=1).headers
    assert len(alice.trades) == 2


def test_of_many_alerts_with_one_id_at_once_one_is_booked(alice, server):
    alice.sees("AAPL", at=100)
    senders = [TradingView(server) for _ in range(16)]
    barrier = Barrier(len(senders))

    def send(sender: TradingView) -> requests.Response:
        barrier.wait(30)
        return sender.alerts(alice, quantity=1, id="once")

    with ThreadPoolExecutor(len(senders)) as pool:
        answers = list(pool.map(send, senders))
    assert Counter(answer.status_code for answer in answers) == {200: 16}
    assert len({answer.text for answer in answers}) == 1
    assert sum("Idempotent-Replayed" not in answer.headers for answer in answers) == 1
    assert (alice.cash, len(alice.trades)) == (99900, 1)


@pytest.mark.parametrize(
    ("fault", "status", "booked"),
    [
        ("rate_limited", 429, 0),
        ("error_before_commit", 503, 0),
        ("error_after_commit", 503, 1),
        ("latency=1", 200, 1),
    ],
)
def test_an_alert_can_be_drilled(alice, tradingview, fault, status, booked):
    alice.sees("AAPL", at=100)
    answer = tradingview.alerts(alice, quantity=1, headers={"X-Simulate-Fault": fault})
    assert (answer.status_code, len(alice.trades)) == (status, booked)


@pytest.mark.parametrize("where", ["query", "body"])
def test_an_alert_is_no_rehearsal(alice, server, where):
    alert = {"key": alice.key, "ticker": "AAPL", "action": "buy", "quantity": 1}
    query, more = ("?dry_run=true", {}) if where == "query" else ("", {"dry_run": True})
    answer = requests.post(f"{server.url}{PATH}{query}", json=alert | more, timeout=30)
    assert refused(answer, 400)["errors"][0]["field"] == "dry_run"
    assert alice.trades == []


# Whose key


def test_a_key_in_the_header_is_neither_needed_nor_taken(alice, bob, tradingview):
    alice.sees("AAPL", at=100)
    header = {"Authorization": f"Bearer {bob.key}"}
    assert tradingview.alerts(alice, quantity=1, headers=header).status_code == 200
    order = {"ticker": "AAPL", "action": "buy", "quantity": 1}
    assert refused(tradingview.posts(order, **header), 401)["code"] == "unauthorized"
    assert (len(alice.trades), bob.trades) == (1, [])


@pytest.mark.parametrize(
    "key", [None, 7, 1.5, True, [], ["KEY"], {"key": "KEY"}, "", "short", "k" * 60_000, "\ud800" * 9, "é" * 9]
)
def test_what_is_no_key_is_refused(alice, tradingview, key):
    key = json.loads(json.dumps(key).replace("KEY", alice.key))
    order = {"key": key, "ticker": "AAPL", "action": "buy", "quantity": 1}
    problem = refused(tradingview.posts(order), 401)
    assert problem["code"] == "unauthorized"
    assert "`key`" in problem["detail"]
    assert alice.trades == []


def test_a_key_that_has_ended_and_the_admins_open_nothing(alice, server, tradingview):
    url, admin = f"{server.url}/api/v1/users/{alice.user_id}", {"Authorization": f"Bearer {ADMIN}"}
    old, new = alice.key, requests.post(f"{url}/rotate-key", headers=admin, timeout=30).json()["api_key"]
    assert tradingview.alerts(alice, quantity=1).status_code == 401
    alice.key = new
    assert tradingview.alerts(alice, quantity=1).status_code == 200
    assert requests.delete(url, headers=admin, timeout=30).status_code == 200
    assert tradingview.alerts(alice, quantity=1).status_code == 401
    order = {"key": ADMIN, "ticker": "AAPL", "action": "buy", "quantity": 1}
    problem = refused(tradingview.posts(order), 403)
    assert problem["code"] == "forbidden"
    for key in (old, new, ADMIN):
        assert key not in server.log() + problem["detail"]


@pytest.mark.parametrize("body", ['{"key": "guess-%s", "ticker": "AAPL"}', '{"key": "guess-%s', "[%s]"])
def test_wrong_keys_count_against_the_address_and_right_ones_are_let_in(alice, server, body):
    guesser = TradingView(server, f"203.0.113.{len(body)}, 198.51.100.{len(body)}")
    for tries in range(500):  # Each of the two processes counts to a hundred.
        if (answer := guesser.posts(body % tries)).status_code == 429:
            break
        assert answer.status_code == (400 if body.endswith("s") else 401)
    problem = refused(answer, 429)
    assert (tries >= 100, problem["code"], problem["rate_limit"]) == (True, "rate_limited", 100)
    assert guesser.alerts(alice, quantity=1).status_code == 200
    others = TradingView(server, f"198.51.100.{len(body) + 100}")
    assert [others.posts(body % "x").status_code for _ in range(9)] != [429] * 9


def test_alerts_count_against_the_limit_of_their_key(database):
    with Here(database.url, RATE_LIMIT="5 per year") as server:
        alice, tradingview = server.trader(), TradingView(server)
        left = [tradingview.alerts(alice, quantity=1).headers["RateLimit-Remaining"] for _ in range(5)]
        assert left == ["4", "3", "2", "1", "0"]
        assert refused(tradingview.alerts(alice, quantity=1), 429)["rate_limit"] == 5
        assert alice.ask("GET", "/api/v1/balance").status_code == 429


# The key is told to nobody

HOSTILE = {
    "broken JSON": '{"key": "KEY", "ticker": "AAPL"',
    "no JSON": "buy AAPL with KEY",
    "a key without quotes": '{"key": KEY}',
    "a word that is no number": '{"key": "KEY", "quantity": NaN}',
    "a member twice": '{"key": "KEY", "ticker": "AAPL", "ticker": "AAPL", "action": "buy", "quantity": 1}',
    "the key twice": '{"key": "KEY", "key": "KEY", "ticker": "AAPL", "action": "buy", "quantity": 1}',
    "not UTF-8": b'{"key": "KEY", "ticker": "\xff"}',
    "a list": '["KEY"]',
    "a text": '"KEY"',
    "a key in a list": '{"key": ["KEY"]}',
    "a key in an object": '{"key": {"key": "KEY"}}',
    "all in an object": '{"alert": {"key": "KEY", "ticker": "AAPL", "action": "buy", "quantity": 1}}',
    "a deep nest": '{"key": "KEY", "ticker": ' + '{"a":' * 9000 + "1" + "}" * 9001,
    "a key as a member": '{"key": "KEY", "KEY": 1, "ticker": "AAPL", "action": "buy", "quantity": 1}',
    "a key as a ticker": '{"key": "KEY", "ticker": "KEY", "action": "buy", "quantity": 1}',
    "a key within a ticker": '{"key": "KEY", "ticker": "NASDAQ:KEY", "action": "buy", "quantity": 1}',
    "a key as an action": '{"key": "KEY", "ticker": "AAPL", "action": "KEY", "quantity": 1}',
    "a key as a quantity": '{"key": "KEY", "ticker": "AAPL", "action": "buy", "quantity": "KEY"}',
    "a key as an id": '{"key": "KEY", "ticker": "AAPL", "action": "buy", "quantity": 1, "id": "KEY"}',
    "a key in a list of quantities": '{"key": "KEY", "ticker": "AAPL", "action": "buy", "quantity": ["KEY"]}',
    "no order": '{"key": "KEY"}',
    "too much": '{"key": "KEY", "id": "' + "x" * 66_000 + '"}',
    "nothing": "",
}


@pytest.fixture(scope="module")
def carol(server) -> Trader:
    """Somebody whose key could be a ticker's."""
    email = "carol-of-the-alerts@example.com"
    answer = requests.post(
        f"{server.url}/api/v1/users",
        json={"email": email, "key": "SESAME-OPEN-2012"},
        headers={"Authorization": f"Bearer {ADMIN}"},
        timeout=30,
    )
    return Trader(server, email, "SESAME-OPEN-2012", answer.json()["user_id"])


@pytest.mark.parametrize("name", HOSTILE)
def test_whatever_the_body_it_is_refused_and_the_key_told_to_nobody(carol, server, name):
    hostile = HOSTILE[name]
    if isinstance(hostile, bytes):
        body = hostile.replace(b"KEY", carol.key.encode())
    else:
        body = hostile.replace("KEY", carol.key)
    answer = TradingView(server, "192.0.2.1").posts(body, Connection="close")
    assert answer.status_code in (400, 401, 413), answer.text
    told = (answer.text + str(answer.headers) + server.log()).lower()
    assert carol.key.lower() not in told
    assert "traceback" not in told
    assert (carol.trades, carol.cash) == ([], 100000)


def test_a_trade_stands_in_the_log_without_the_key(alice, server, tradingview):
    alice.sees("AAPL", at=100)
    bought = tradingview.alerts(
        alice, quantity=1, id=f"id-{alice.user_id}", headers={"X-Request-Id": f"tv-{alice.user_id}"}
    )
    assert alice.cash == 99900
    (line,) = [line for line in server.log().splitlines() if line.endswith(f" [tv-{alice.user_id}]")]
    assert f'"POST {PATH} HTTP/1.1" 200 ' in line
    assert f" trade {bought.json()['id']}: user {alice.user_id} buy 1 AAPL" in line
    assert alice.key not in server.log()
    assert f"id-{alice.user_id}" not in server.log()


def test_a_body_that_breaks_off_is_no_alert(alice, server):
    alert = json.dumps({"key": alice.key, "ticker": "AAPL", "action": "buy", "quantity": 1}).encode()
    head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    for framing in (f"Content-Length: {len(alert) + 1}\r\n\r\n", "Transfer-Encoding: chunked\r\n\r\n"):
        chunk = b"" if "Length" in framing else f"{len(alert):x}\r\n".encode()
        with socket.create_connection(("127.0.0.1", server.port), timeout=9) as client:
            client.sendall((head + framing).encode() + chunk + alert)
            client.shutdown(socket.SHUT_WR)
            answer = b"".join(iter(lambda: client.recv(4096), b"")).decode()
        assert answer.startswith("HTTP/1.1 400 "), answer
        assert alice.key not in answer + server.log()
    assert alice.trades == []


# The page and the description


def test_the_alert_is_described_with_its_key_in_the_body_and_none_in_the_header(server):
    description = requests.get(f"{server.url}/openapi.json", timeout=30).json()
    door, trade = (description["paths"][path]["post"] for path in (PATH, "/api/v1/trade"))
    assert (door["security"], trade["security"]) == ([], [{"trader": []}])
    assert ("415" in door["responses"], "415" in trade["responses"]) == (False, True)
    alert, order = (description["components"]["schemas"][name] for name in ("Alert", "Order"))
    assert alert["properties"].keys() - order["properties"].keys() == {"key", "id"}
    assert set(alert["required"]) == {"key", "ticker", "action"}


PAGE = (ROOT / "docs" / "tradingview.md").read_text()


def filled_in(message: str, trader: Trader) -> str:
    """A message of the page as TradingView sends it."""
    placeholders = {"ticker": "AAPL", "timenow": "2026-11-27T10:00:00Z"}
    placeholders |= {"strategy.order.action": "buy", "strategy.order.contracts": "2"}
    placeholders |= {"strategy.order.id": "Long"}
    message = message.replace("YOUR-API-KEY", trader.key)
    return re.sub(r"{{([a-z.]+)}}", lambda found: placeholders[found[1]], message)


def test_the_messages_to_paste_trade(alice, tradingview):
    messages = re.findall("```json\n(.*?)```", PAGE, re.S)
    alice.sees("AAPL", at=100)
    bought = [exact(tradingview.posts(filled_in(message, alice)))["quantity"] for message in messages]
    assert bought == [2, 10]


def test_the_page_names_every_member_and_every_exchange(app):
    from tradingview import EXCHANGES, Alert

    (row,) = re.findall(r"^\| `ticker` \|.*$", PAGE, re.M)
    assert {name for name in EXCHANGES.split("|") if f"`{name}`" not in row} == set()
    assert set(re.findall(r"^\| `(\w+)` \|", PAGE, re.M)) == set(Alert.model_fields)


def test_the_session_on_the_page_answers_as_printed(program):
    """Run line by line against `python app.py`, in a copy of the program as a newcomer has it."""
    (session,) = re.findall(r"```console\n(.*?)```", PAGE, re.S)
    lines = re.findall(r"^\$ (.+)\n((?:(?!\$ ).*\n?)*)", session, re.M)
    server = Server("", command=[sys.executable, "app.py"])
    server.folder = program
    said, define = "", ""
    with server:
        for line, _ in lines:
            here = line.replace("http://127.0.0.1:8000", server.url)
            define = here if line.startswith("alert()") else define
            shell = subprocess.run(
                ["bash", "-c", f"{define}\n{here}"], capture_output=True, text=True, timeout=30
            )
            said += f"$ {line}\n{shell.stdout}"
    timeless = [re.sub(r'"timestamp":"202[6-9]-[^"]+"', "", text) for text in (said, session)]
    assert timeless[0] == timeless[1], said
    assert len(lines) == 8
