"""On the open internet: headers, other origins, floods, wrong keys, and what the log says of it all."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from datetime import datetime

import psutil
import pytest
import redis
import requests
from cast import ADMIN, Server, exact, free_port

ANSWERS = {
    "a page": ("GET", "/", 200),
    "another page": ("GET", "/docs", 200),
    "a file of it": ("GET", "/static/dashboard.js", 200),
    "no such file": ("GET", "/static/nothing.js", 404),
    "no such path": ("GET", "/nothing", 404),
    "the health": ("GET", "/health", 200),
    "an answer": ("GET", "/api/v1/balance", 200),
    "a file to download": ("GET", "/api/v1/trades.csv", 200),
    "a bad request": ("POST", "/api/v1/trade", 415),
    "a wrong method": ("DELETE", "/api/v1/balance", 405),
    "a drill": ("POST", "/api/v1/trade", 503),
}


# Security headers


@pytest.mark.parametrize("name", ANSWERS)
def test_every_answer_tells_browsers_to_be_careful(alice, name):
    method, path, status = ANSWERS[name]
    order = {"json": {"ticker": "AAPL", "action": "buy", "quantity": 1}} if name == "a drill" else {}
    fault = {"X-Simulate-Fault": "price_unavailable"}
    answer = alice.ask(method, path, headers=fault, **order)
    assert answer.status_code == status
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["X-Frame-Options"] == "DENY"
    assert answer.headers["Referrer-Policy"] == "no-referrer"
    policy = answer.headers["Content-Security-Policy"]
    assert policy.count("default-src 'none'") == 1
    assert ("script-src 'self'" in policy) == name.endswith(" page")
    assert "Strict-Transport-Security" not in answer.headers
    assert not re.search(r"\d", answer.headers["Server"])


def test_a_browser_that_came_over_https_is_told_to_stay_there(alice):
    for path in ("/", "/api/v1/balance", "/nothing"):
        answer = alice.ask("GET", path, headers={"X-Forwarded-Proto": "https"})
        assert answer.headers["Strict-Transport-Security"] == "max-age=31536000"


def test_an_answer_has_one_date(program):
    """A file has one of its own, and the web server gives each answer one."""
    server = Server("", command=[sys.executable, "app.py"])
    server.folder = program
    with server:
        for path in ("/", "/docs", "/static/dashboard.js", "/health", "/nothing"):
            raw = requests.get(server.url + path, timeout=30).raw
            assert len(raw.headers.getlist("Date")) == 1, path


# Request ids and the log


@pytest.mark.parametrize("sent", ["7f3a-order.1", "a" * 128, "A:b/c+d=e@f_g"])
def test_a_request_id_comes_back(alice, sent):
    for path in ("/", "/health", "/static/dashboard.js", "/nothing", "/api/v1/balance", "/api/v1/nothing"):
        assert alice.ask("GET", path, headers={"X-Request-Id": sent}).headers["X-Request-Id"] == sent


@pytest.mark.parametrize("sent", [None, "", "a" * 129, "a b", 'a"b', "a\\b", "a\tb", b"\xfc", "a%0ab"])
def test_a_request_without_a_usable_id_is_given_one(alice, sent):
    ids = {alice.ask("GET", "/health", headers={"X-Request-Id": sent}).headers["X-Request-Id"] for _ in "12"}
    assert len(ids) == 2
    assert all(re.fullmatch("[0-9a-f]{32}", id) for id in ids)


def test_the_log_has_a_line_a_request_with_its_id_and_what_it_booked_and_no_key(alice, server):
    bought = alice.sees("AAPL", at=10).ask(
        "POST",
        "/api/v1/trade",
        json={"ticker": "AAPL", "action": "buy", "quantity": 1},
        headers={"X-Request-Id": f"buys-{alice.user_id}", "Idempotency-Key": f"secret-{alice.user_id}"},
    )
    assert alice.cash == 99990  # Its connection goes on only when the line of the request before is written.
    (line,) = [line for line in server.log().splitlines() if line.endswith(f" [buys-{alice.user_id}]")]
    assert '127.0.0.1 "POST /api/v1/trade HTTP/1.1" 200 ' in line
    assert f" trade {bought.json()['id']}: user {alice.user_id} buy 1 AAPL at the market " in line
    assert alice.key not in server.log()
    assert f"secret-{alice.user_id}" not in server.log()


@pytest.mark.parametrize("path", ["/", "/docs", "/docs/swagger-ui.css", "/static/dashboard.js"])
def test_a_file_has_no_version_that_a_client_could_insist_on(server, path):
    """It would be answered 412, with the file for a problem."""
    assert requests.get(server.url + path, headers={"If-Match": '"x"'}, timeout=9).status_code == 200


def test_what_a_client_asks_for_is_harmless_in_the_log(server):
    with socket.create_connection(("127.0.0.1", server.port), timeout=9) as client:
        client.sendall(b'GET /"forged HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n')
        while client.recv(4096):
            pass
    (line,) = [line for line in server.log().splitlines() if "forged" in line]
    assert line.startswith(r'127.0.0.1 "GET /\"forged HTTP/1.1" 404 ')


def test_the_log_has_a_line_for_what_only_browsers_ask_whatever_the_server(app, caplog):
    """`RAW_URI` is gunicorn's alone, and what a browser asks first never comes to the app."""
    gate = app.public.Gate(lambda environ, start: [], {ORIGIN})
    asked = {"REQUEST_METHOD": "OPTIONS", "PATH_INFO": "/a\nb", "QUERY_STRING": "c=1"}
    asked |= {"SERVER_PROTOCOL": "HTTP/1.1", "wsgi.url_scheme": "http", "REMOTE_ADDR": "127.0.0.1"}
    asked |= {"HTTP_ORIGIN": ORIGIN, "HTTP_ACCESS_CONTROL_REQUEST_METHOD": "POST"}
    with caplog.at_level("INFO"):
        gate(asked, lambda status, headers: None)
    assert caplog.messages[0].startswith(r'127.0.0.1 "OPTIONS /a\nb HTTP/1.1" 204 ')


@pytest.mark.parametrize("command", [None, [sys.executable, "app.py"]], ids=["gunicorn", "python"])
def test_no_line_of_the_log_shows_a_key_that_somebody_put_into_a_url(command, new_database_on):
    asked = ["GET /health?key=SECRET HTTP/1.1", "PUT /health?key=SECRET HTTP/1.1"]
    asked += ["GET /no%3Fkey=SECRET HTTP/1.1", "GET http://[/no?key=SECRET HTTP/1.1"]
    asked += ["GET /no path?key=SECRET HTTP/1.1", "GET /no?key=SECRET"]
    database = new_database_on("sqlite").migrate()
    with Server(database.url, command=command, workers=1) as server:
        for line in asked:
            with socket.create_connection(("127.0.0.1", server.port), timeout=9) as client:
                client.sendall(f"{line}\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
                while client.recv(4096):
                    pass
        log = server.log()
    assert "SECRET" not in log
    for told in ('"GET /health HTTP/1.1" 200 ', '"PUT /health HTTP/1.1" 405 ', '"GET /no HTTP/1.1" 404 '):
        assert told in log


def test_an_id_that_comes_twice_does_not_make_one_trade_of_two(alice):
    order = {"ticker": "AAPL", "action": "buy", "quantity": 1}
    alice.sees("AAPL", at=10)
    for _ in range(2):
        answer = alice.ask("POST", "/api/v1/trade", json=order, headers={"X-Request-Id": "the-same"})
        assert "Idempotent-Replayed" not in answer.headers
    assert len(alice.trades) == 2


def test_the_health_says_which_process_answers_and_since_when(server):
    answers = [requests.get(f"{server.url}/health", timeout=9).json()["process"] for _ in range(20)]
    told = {(process["pid"], process["started_at"]) for process in answers}
    workers = {child.pid: child for child in psutil.Process(server.process.pid).children()}
    assert len(told) == len({pid for pid, _ in told})  # Each says the same whenever it is asked.
    for pid, since in told:
        assert abs(datetime.fromisoformat(since).timestamp() - workers[pid].create_time()) < 0.1


# Other origins

ORIGIN = "https://bots.example"
on_one_database = pytest.mark.parametrize("engine_name", ["sqlite"], indirect=True, scope="session")
"""For what has nothing to do with the database."""


def asks_from(origin: str, server: Server, method="OPTIONS") -> requests.Response:
    """What a browser sends for a page of `origin`: first, without a key, whether it may trade at all."""
    headers = {"Origin": origin} | ({"Access-Control-Request-Method": "POST"} if method == "OPTIONS" else {})
    return requests.request(method, f"{server.url}/api/v1/trade", headers=headers, timeout=9)


@on_one_database
def test_no_page_of_another_origin_may_call_unless_it_is_named(server, limited):
    for broker, origin in ((server, ORIGIN), (limited, "https://evil.example"), (limited, "null")):
        for answer in (asks_from(origin, broker), asks_from(origin, broker, "POST")):
            assert answer.status_code == 401
            assert not [name for name in answer.headers if name.startswith("Access-Control-")]


@on_one_database
def test_a_page_of_a_named_origin_may_call_and_read_what_a_bot_needs(limited):
    for origin in (ORIGIN, "http://localhost:3000"):
        asked = asks_from(origin, limited)
        assert (asked.status_code, asked.text) == (204, "")
        assert asked.headers["Access-Control-Allow-Origin"] == origin
        assert "Authorization" in asked.headers["Access-Control-Allow-Headers"]
        assert "POST" in asked.headers["Access-Control-Allow-Methods"]
        plain = requests.options(f"{limited.url}/api/v1/trade", headers={"Origin": origin}, timeout=9)
        assert plain.status_code == 401  # Only a browser's question is answered before it is known who asks.
        answer = asks_from(origin, limited, "POST")
        assert (answer.status_code, answer.headers["Vary"]) == (401, "Origin")
        assert answer.headers["Access-Control-Allow-Origin"] == origin
        shown = answer.headers["Access-Control-Expose-Headers"]
        assert {"Retry-After", "RateLimit-Remaining", "Idempotent-Replayed", "X-Request-Id"} <= set(
            shown.split(", ")
        )


# Limits


@pytest.fixture(scope="session")
def limited(database):
    """A broker in one process that lets nobody ask more than ten times in two seconds."""
    origins = f"{ORIGIN}, http://localhost:3000"
    with Server(database.url, workers=1, RATE_LIMIT="10 per 2 second", CORS_ORIGINS=origins) as server:
        yield server


def rate(answer: requests.Response) -> tuple[int, ...]:
    """The limit, what is left of it, and the seconds until it begins anew."""
    return tuple(int(answer.headers[f"RateLimit-{name}"]) for name in ("Limit", "Remaining", "Reset"))


@on_one_database
def test_who_has_a_key_that_has_ended_does_not_use_up_what_its_owner_may_ask(limited):
    erin = limited.trader(name="erin")
    erin.order("buy", 1, "AAPL")
    new_key = requests.post(
        f"{limited.url}/api/v1/users/{erin.user_id}/rotate-key",
        headers={"Authorization": f"Bearer {ADMIN}"},
        timeout=9,
    ).json()["api_key"]
    old = [erin.order("buy", 1, "AAPL") for _ in range(3)]
    assert {answer.status_code for answer in old} == {401}
    assert [rate(answer)[0] for answer in old[1:]] == [100, 100]  # They count as wrong keys.
    erin.session.headers["Authorization"] = f"Bearer {new_key}"
    assert erin.order("buy", 1, "AAPL").status_code == 200


@on_one_database
def test_who_has_a_key_that_has_ended_hears_so_and_nothing_of_its_owners_limit(limited):
    frank = limited.trader(name="frank")
    assert 429 in (frank.order("buy", 1, "AAPL").status_code for _ in range(30))
    url = f"{limited.url}/api/v1/users/{frank.user_id}"
    assert requests.delete(url, headers={"Authorization": f"Bearer {ADMIN}"}, timeout=9).status_code == 200
    assert [frank.order("buy", 1, "AAPL").status_code for _ in range(3)] == [401] * 3


@on_one_database
def test_who_asks_too_often_is_refused_whatever_has_changed_meanwhile(limited):
    gina = limited.trader(name="gina")
    asked = (gina.ask("GET", "/api/v1/portfolio") for _ in range(30))
    time.sleep(next(rate(answer)[2] for answer in asked if answer.status_code == 429))
    for _ in range(9):
        assert gina.order("sell", 1, "AAPL").status_code == 409
    moved = gina.ask("PUT", "/api/v1/market/clock", json={"at": "2012-06-01T00:00:00Z"})
    assert (moved.status_code, rate(moved)[1]) == (200, 0)
    assert gina.order("buy", 1, "AAPL").status_code == 429


@on_one_database
def test_who_asks_too_often_is_told_when_to_go_on(limited):
    greedy, modest = limited.trader(name="greedy"), limited.trader(name="modest")
    answers = [greedy.order("sell", 1, "AAPL")]
    while answers[-1].status_code != 429 and len(answers) < 100:
        answers.append(greedy.order("sell", 1, "AAPL"))
    *answered, refused = answers[-11:]  # Of one window: no other could have been refused so soon.
    assert {answer.status_code for answer in answered} == {409}  # Whatever comes of it, it counts.
    assert [rate(answer)[:2] for answer in answered] == [(10, left) for left in range(9, -1, -1)]
    problem, (limit, left, seconds) = exact(refused), rate(refused)
    assert (problem["code"], problem["rate_limit"], limit, left) == ("rate_limited", 10, 10, 0)
    assert seconds in (1, 2)
    assert refused.headers["Retry-After"] == str(problem["retry_after"]) == str(seconds)
    described = requests.get(f"{limited.url}/openapi.json", timeout=9).json()["components"]["schemas"]
    assert problem.keys() <= described["Problem429"]["properties"].keys()
    assert modest.ask("GET", "/api/v1/balance").status_code == 200
    for path in ("/health", "/"):
        answer = greedy.ask("GET", path)
        assert answer.status_code == 200
        assert "RateLimit-Limit" not in answer.headers
    time.sleep(seconds)
    assert greedy.ask("GET", "/api/v1/balance").status_code == 200


def test_wrong_keys_are_slowed_down_and_right_ones_from_the_same_address_are_not(server, alice):
    def answer(key: str, address: str) -> requests.Response:
        headers = {"Authorization": f"Bearer {key}", "X-Forwarded-For": address}
        return requests.get(f"{server.url}/api/v1/balance", headers=headers, timeout=9)

    for tries in range(500):  # Each of the two processes counts to a hundred.
        if (refused := answer(f"guess-{tries}", f"10.0.0.{tries}, 203.0.113.7")).status_code == 429:
            break
        assert refused.status_code == 401
    assert (tries >= 100, refused.json()["code"], refused.json()["rate_limit"]) == (True, "rate_limited", 100)
    assert 1 <= int(refused.headers["Retry-After"]) <= 60
    assert refused.headers["Retry-After"] == refused.headers["RateLimit-Reset"]
    assert [answer(alice.key, "203.0.113.7").status_code for _ in range(20)] == [200] * 20
    assert [answer("guess", "203.0.113.8").status_code for _ in range(20)] == [401] * 20


# Limits that processes share


class Redis:
    """A Redis of its own, from Debian's packages."""

    def __init__(self, folder):
        self.port, self.folder = free_port(), folder
        self.url = f"redis://127.0.0.1:{self.port}"

    def start(self):
        options = ["--port", str(self.port), "--save", "", "--dir", str(self.folder)]
        self.process = subprocess.Popen(["redis-server", *options], stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            try:
                return self.client.ping()
            except redis.ConnectionError:
                time.sleep(0.02)
        raise RuntimeError("Redis did not start.")

    @property
    def client(self) -> redis.Redis:
        return redis.from_url(self.url)

    def kill(self):
        self.process.kill()
        self.process.wait()


@pytest.fixture
def redis_server(tmp_path):
    if not shutil.which("redis-server"):
        sentence = "There is no redis-server here to count in: apt-get install redis-server"
        pytest.fail(sentence) if os.environ.get("CI") == "true" else pytest.skip(sentence)
    server = Redis(tmp_path)
    server.start()
    yield server
    server.kill()


@on_one_database
def test_processes_share_a_limit_through_redis_and_serve_without_it(database, redis_server):
    settings = {"RATE_LIMIT": "10 per year", "RATELIMIT_STORAGE_URI": redis_server.url, "workers": 1}
    with Server(database.url, **settings) as one, Server(database.url, **settings) as two:
        greedy = one.trader(name="greedy")

        def answer(server) -> requests.Response:
            headers = {"Authorization": f"Bearer {greedy.key}"}
            response = requests.get(f"{server.url}/api/v1/balance", headers=headers, timeout=9)
            assert response.elapsed.total_seconds() < 1
            return response

        assert [rate(answer(server))[1] for server in [one, two] * 5] == list(range(9, -1, -1))
        assert [answer(server).status_code for server in (one, two)] == [429, 429]
        names = b" ".join(redis_server.client.keys()).decode()
        assert f"user {greedy.user_id} in" in names
        assert greedy.key not in names

        redis_server.process.send_signal(signal.SIGSTOP)  # It hangs, and then it is gone.
        assert [answer(server).status_code for server in (one, two)] == [200, 200]
        redis_server.kill()
        assert [rate(answer(server))[1] for server in (one, two, one)] == [8, 8, 7]  # Each counts alone.
        assert one.log().count("No answer from Redis (TimeoutError): each process counts alone [") == 1
        assert one.log().count("No answer from Redis") < 3  # Not everybody has to wait to find out.

        redis_server.start()
        deadline = time.monotonic() + 10
        while not redis_server.client.keys():
            assert answer(one).status_code in (200, 429)
            assert time.monotonic() < deadline
            time.sleep(0.2)


# What is unsafe


@on_one_database
def test_on_a_host_there_is_no_test_key_and_a_database_that_will_be_lost_is_told(program, limited):
    server = Server("", command=[sys.executable, "app.py"], RENDER="true", CORS_ORIGINS="*")
    server.folder = program
    with server:
        headers = {"Authorization": "Bearer test-api-key-123", "Origin": "https://anybody.example"}
        answer = requests.get(f"{server.url}/api/v1/balance", headers=headers, timeout=9)
        assert answer.status_code == 401
        assert answer.headers["Access-Control-Allow-Origin"] == "*"
        assert answer.headers["Server"] == "simulator"
        assert server.trader().cash == 100000
        (warning,) = [line for line in server.log().splitlines() if line.startswith("WARNING")]
        assert "SQLite" in warning
        assert "ALL ACCOUNTS AND TRADES ARE LOST" in warning
    assert "WARNING" not in limited.log()  # Which has a file as well, but on no host.


@pytest.fixture(scope="module")
def public(app):
    return app.public


def test_a_short_admin_key_is_warned_of_and_a_long_one_is_not(public, caplog):
    for key, warnings in (("sixteen-letters!", 0), ("fifteen-letters", 1)):
        assert public.checked_admin_key(key) == key
        assert caplog.text.count("ADMIN_API_KEY is short") == warnings
    assert "fifteen-letters" not in caplog.text


def test_settings_for_the_public_are_checked_for_their_form(public):
    wrong = {
        public.checked_origins: ["example.com", "https://example.com/", "https://example.com,", "null", "**"],
        public.checked_limit: ["lots", "600", "-1 per minute", "0 per minute", "5 per minute; 60 per hour"],
        public.Counter: ["127.0.0.1", "memcached://127.0.0.1", "memory://x", "redis://127.0.0.1:port"],
    }
    for checked, texts in wrong.items():
        for text in texts:
            with pytest.raises(ValueError, match=r"\w{3}"):
                checked(text)
    assert public.checked_origins("https://a.example, http://[::1]:3000") == {
        "https://a.example",
        "http://[::1]:3000",
    }
    assert public.checked_limit("600 per minute") == public.checked_limit("600/minute")


def test_the_memory_of_who_asked_does_not_grow_for_ever(public):
    counter = public.Counter("memory://")
    for name in range(3 * counter.NAMES):
        counter.add(f"wrong keys from {name}", 60)
    assert len(counter.own) == counter.NAMES
    assert counter.add(f"wrong keys from {name}", 60) == 2


@on_one_database
def test_a_kept_connection_is_closed_now_and_then_so_that_another_worker_may_take_it(alice):
    answers = [alice.ask("GET", "/api/v1/rules") for _ in range(600)]
    assert {answer.status_code for answer in answers} == {200}
    closed = sum(answer.headers["Connection"] == "close" for answer in answers)
    assert 1 <= closed <= 60, closed
