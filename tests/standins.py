"""Stand-ins for Yahoo Finance, Alpha Vantage and PyPI, so that the real clients run without internet.

One server plays them all. It is a proxy, so a child process that gets `market.environment` sends it
every request, and it is the server at the other end of each one too, with a certificate made at
start that only that environment trusts. The code under test and yfinance are as they always are.

    with MarketStandIn() as market:
        market.yahoo("AAPL", price="189.84")
        subprocess.run([sys.executable, "app.py"], env=os.environ | market.environment)
"""

import json
import ssl
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

HOSTS = ["yahoo.com", "*.yahoo.com", "*.finance.yahoo.com", "alphavantage.co", "*.alphavantage.co"]
HOSTS += ["pypi.org"]
CHART = "/v8/finance/chart/"
NO_SUCH_TICKER = (
    '{"chart":{"result":null,"error":{"code":"Not Found",'
    '"description":"No data found, symbol may be delisted"}}}'
)
DAYS_OF_BARS = {"1m": 8, "5m": 60, "15m": 60, "1h": 730}
REACHES_TOO_FAR = (
    '{"chart":{"result":null,"error":{"code":"Unprocessable Entity",'
    '"description":"data not available for startTime and endTime"}}}'
)
NO_SUCH_RATE = '{"Error Message": "Invalid API call. Please retry or visit the documentation."}'


@dataclass
class Answer:
    """What is said about one ticker, and how badly. `delay` is in seconds.

    `seen` is Yahoo's time of the price, as JSON: seconds since 1970; without it, now.
    """

    price: str | Callable[[], str] = "189.84"
    currency: str | None = "USD"
    seen: str | None = None
    body: str | dict | None = None
    status: int = 200
    hang: bool = False
    redirect: str | None = None
    delay: float = 0


class MarketStandIn:
    """Yahoo Finance and Alpha Vantage on 127.0.0.1, saying what a test tells them to say."""

    def __init__(self):
        self._lock = threading.Lock()
        self._requests = []
        self._released = threading.Event()
        self.reset()

    # What the market says

    def yahoo(self, ticker: str, price="189.84", **answer):
        """Set Yahoo's answer for a ticker: see `Answer`.

        The price's digits are sent as they are written; a function is asked for each request.
        """
        self._yahoo[ticker.upper()] = Answer(price, **answer)

    def bars(self, ticker: str, interval: str, *rows: tuple, zone="America/New_York"):
        """Set Yahoo's bars of a ticker: when each begins, open, high, low, close, volume.

        Times are datetimes, numbers are floats or None.
        """
        self._bars[ticker.upper(), interval] = zone, rows

    def split(self, ticker: str, moment: datetime, numerator: float, denominator: float = 1.0):
        """Add a split to Yahoo's answer, for those who ask for events: so many shares for so many old."""
        ratio = {"numerator": numerator, "denominator": denominator}
        ratio["splitRatio"] = f"{numerator:g}:{denominator:g}"
        self._add_event(ticker, "splits", moment, ratio)

    def dividend(self, ticker: str, moment: datetime, amount: float):
        """Add a dividend: what Yahoo says is paid for each of the shares that there are today."""
        self._add_event(ticker, "dividends", moment, {"amount": amount})

    def events(self, ticker: str, events):
        """Set what Yahoo says instead of all splits and dividends of a ticker: anything that JSON can say."""
        self._events[ticker.upper()] = events

    def _add_event(self, ticker: str, kind: str, moment: datetime, event: dict):
        seconds = int(moment.timestamp())
        events = self._events.setdefault(ticker.upper(), {})
        events.setdefault(kind, {})[str(seconds)] = {**event, "date": seconds}

    def yahoo_default(self, price="189.84", **answer):
        """Set Yahoo's answer for every ticker that has none of its own (else: no such ticker)."""
        self._yahoo_default = Answer(price, **answer)

    def alphavantage(self, symbol: str, body: str | dict, **answer):
        """Set Alpha Vantage's answer for a share ("AAPL") or a pair of currencies ("BTC-USD")."""
        self._alphavantage[symbol.upper()] = Answer(body=body, **answer)

    def pypi(self, package: str, **answer):
        """Set what PyPI says of a package: see `Answer`. It has nothing against any other."""
        self._pypi[package] = Answer(**answer)

    def hang_all(self, domain: str = ""):
        """Accept every connection and request to `domain` from now on, and answer none."""
        self._hanging = domain

    def hangs(self, host: str) -> bool:
        return self._hanging is not None and host.endswith(self._hanging)

    def answer_again(self):
        """Answer new requests, and hang up on those that were left hanging."""
        self._hanging = None
        self._release()

    def reset(self):
        """Forget what was set and what was seen."""
        self._yahoo = {}
        self._yahoo_default = Answer(status=404)
        self._bars = {}
        self._events = {}
        self._alphavantage = {}
        self._pypi = {}
        self.answer_again()
        self.clear()

    # What was asked

    @property
    def requests(self) -> list[tuple[str, str]]:
        """Every request so far: the host and the path with its query."""
        with self._lock:
            return list(self._requests)

    def count(self, ticker: str) -> int:
        """How often Yahoo was asked for the chart of a ticker."""
        paths = [urlsplit(path).path for _, path in self.requests]
        return sum(unquote(path).upper() == (CHART + ticker).upper() for path in paths)

    def clear(self):
        """Forget the requests seen so far; the answers stay."""
        with self._lock:
            self._requests.clear()

    # Start and stop

    def start(self):
        self._folder = tempfile.TemporaryDirectory(prefix="market-")
        certificate, key = write_certificate(Path(self._folder.name))
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(certificate, key)
        self._server = Server(("127.0.0.1", 0), Handler)
        self._server.market, self._server.tls = self, tls
        self.port = self._server.server_port
        proxy = f"http://127.0.0.1:{self.port}"
        proxies = {"HTTPS_PROXY": proxy, "HTTP_PROXY": proxy, "NO_PROXY": "127.0.0.1,localhost"}
        self.environment = {
            **proxies,
            **{name.lower(): value for name, value in proxies.items()},  # these win where both are
            "REQUESTS_CA_BUNDLE": str(certificate),
            "CURL_CA_BUNDLE": str(certificate),
            "XDG_CACHE_HOME": str(Path(self._folder.name, "cache")),
        }
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def stop(self):
        self._server.shutdown()
        self._server.server_close()
        self._hanging = ""  # connections that are still open get no more answers
        self._release()
        self._folder.cleanup()

    def __enter__(self):
        return self.start()

    def __exit__(self, *_):
        self.stop()

    # For the handler

    def _release(self):
        released, self._released = self._released, threading.Event()
        released.set()

    def _note(self, host: str, path: str):
        with self._lock:
            self._requests.append((host, path))

    def _answer_from_yahoo(self, ticker: str) -> Answer:
        return self._yahoo.get(ticker.upper(), self._yahoo_default)

    def _answer_from_pypi(self, path: str) -> Answer:
        return self._pypi.get(path.split("/")[2], Answer(body={"vulnerabilities": []}))

    def _answer_from_alphavantage(self, query: dict[str, str]) -> Answer:
        if query.get("function") == "CURRENCY_EXCHANGE_RATE":
            pair = f"{query.get('from_currency')}-{query.get('to_currency')}"
            return self._alphavantage.get(pair.upper(), Answer(body=NO_SUCH_RATE))
        symbol = query.get("symbol", "").upper()
        return self._alphavantage.get(symbol, Answer(body={"Global Quote": {}}))


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 512  # hundreds of clients may connect at one moment

    def handle_error(self, request, client_address):
        if not isinstance(sys.exception(), OSError):  # a client that hung up is no error here
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """One connection: CONNECT to some host, then TLS and HTTP as that host would speak them."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    host = None

    def do_CONNECT(self):
        self.host = self.path.rpartition(":")[0]
        if self.server.market.hangs(self.host):
            return self.hang()
        self.send_response(HTTPStatus.OK)
        self.end_headers()
        self.connection = self.server.tls.wrap_socket(self.connection, server_side=True)
        self.rfile = self.connection.makefile("rb", self.rbufsize)
        self.wfile = self.connection.makefile("wb", self.wbufsize)
        self.close_connection = False

    def finish(self):
        super().finish()
        self.connection.close()  # the server closes only what it had before TLS

    def do_GET(self):
        url = urlsplit(self.path)
        host = self.host or url.hostname or "127.0.0.1"
        path = f"{url.path}?{url.query}" if url.query else url.path
        query = {name: values[-1] for name, values in parse_qs(url.query).items()}
        self.server.market._note(host, path)
        if self.server.market.hangs(host):
            return self.hang()
        if host.endswith("alphavantage.co") and url.path == "/query":
            return self.give(self.server.market._answer_from_alphavantage(query))
        if host == "pypi.org":
            return self.give(self.server.market._answer_from_pypi(url.path))
        if host == "fc.yahoo.com":
            return self.send_text(404, "", {"Set-Cookie": cookie()})  # Yahoo's own is a 404 too
        if host.endswith("finance.yahoo.com"):
            return self.do_finance(url.path, query)
        self.send_text(404, "Not Found")

    def do_POST(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.do_GET()

    def do_finance(self, path: str, query: dict[str, str]):
        answers = self.server.market._answer_from_yahoo
        if path == "/v1/test/getcrumb":
            self.send_text(200, "crumb", {"Content-Type": "text/plain"})
        elif path.startswith(CHART):
            ticker = unquote(path.removeprefix(CHART))
            bars = self.server.market._bars.get((ticker.upper(), query.get("interval")), ("UTC", ()))
            answer = answers(ticker)
            if answer.body is None and answer.status == 200 and reaches_too_far(query):
                answer = Answer(status=422, body=REACHES_TOO_FAR)
            events = self.server.market._events.get(ticker.upper()) if "events" in query else None
            self.give(answer, lambda answer: chart(ticker, answer, query, *bars, events))
        elif path == "/v7/finance/quote":
            asked = [(ticker, answers(ticker)) for ticker in query.get("symbols", "").split(",")]
            known = ",".join(meta(*one) for one in asked if one[1].status == 200)
            self.send_text(200, f'{{"quoteResponse":{{"result":[{known}],"error":null}}}}')
        else:
            self.send_text(404, "Not Found")

    def give(self, answer: Answer, write: Callable[[Answer], str] | None = None):
        """Answer as the test has asked for: late, never, elsewhere, wrong or right."""
        time.sleep(answer.delay)
        if answer.hang:
            self.hang()
        elif answer.redirect:
            self.send_text(302, "", {"Location": answer.redirect})
        elif answer.body is None:
            self.send_text(answer.status, write(answer))
        elif isinstance(answer.body, str):
            self.send_text(answer.status, answer.body)
        else:
            self.send_text(answer.status, json.dumps(answer.body))

    def hang(self):
        self.server.market._released.wait()
        self.close_connection = True

    def send_text(self, status: int, text: str, headers: dict[str, str] | None = None):
        body = text.encode()
        self.send_response(status)
        headers = {"Content-Type": "application/json", **(headers or {})}
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        """Say nothing: `MarketStandIn.requests` knows it all."""


def reaches_too_far(query: dict[str, str]) -> bool:
    """Whether Yahoo has no bars that are so fine for so many days."""
    days = DAYS_OF_BARS.get(query["interval"], 99 * 366)
    return "period1" in query and int(query["period1"]) < time.time() - days * 86_400


def chart(ticker: str, answer: Answer, query: dict[str, str], zone: str, rows: tuple, events=None) -> str:
    """Yahoo's chart: a price and the bars of a period, or why there are none, as Yahoo says it.

    Where it has no bars it leaves their times out, and its events where there are none.
    """
    if answer.status == 200:
        rows = [row for row in rows if row[0].timestamp() >= int(query.get("period1", 0))]
        times = {"timestamp": [int(row[0].timestamp()) for row in rows]} if rows else {}
        fields = enumerate(("open", "high", "low", "close", "volume"), 1) if rows else ()
        quote = {field: [row[column] for row in rows] for column, field in fields}
        times |= {"events": events} if events is not None else {}
        bars = json.dumps(times | {"indicators": {"quote": [quote]}}).removeprefix("{")
        return f'{{"chart":{{"result":[{{"meta":{meta(ticker, answer, zone)},{bars}],"error":null}}}}'
    if answer.status == 404:
        return NO_SUCH_TICKER
    return HTTPStatus(answer.status).phrase  # "Too Many Requests" is what Yahoo says, as text


def meta(ticker: str, answer: Answer, zone="UTC") -> str:
    """The facts about a ticker, written by hand so that the price keeps its exact digits."""
    price = answer.price() if callable(answer.price) else answer.price
    kind = "CRYPTOCURRENCY" if ticker.upper().endswith("-USD") else "EQUITY"
    facts = {"currency": answer.currency, "symbol": ticker.upper(), "instrumentType": kind}
    facts["exchangeTimezoneName"] = zone
    seen = int(time.time()) if answer.seen is None else answer.seen
    numbers = f', "regularMarketTime": {seen}, "regularMarketPrice": {price}}}'
    return json.dumps(facts).removesuffix("}") + numbers


def cookie() -> str:
    """The cookie that yfinance waits for; one without an expiry date makes it fail."""
    expires = datetime.now(UTC) + timedelta(days=365)
    return f"A3=stand-in; Domain=.yahoo.com; Path=/; Secure; Expires={expires:%a, %d %b %Y %T} GMT"


def write_certificate(folder: Path) -> tuple[Path, Path]:
    """Make a certificate for the hosts that vouches for itself: it is its own CA file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Market stand-in")])
    names = x509.SubjectAlternativeName([x509.DNSName(host) for host in HOSTS])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=7))
        .add_extension(names, critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    files = folder / "certificate.pem", folder / "key.pem"
    files[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    files[1].write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return files
