"""What it takes to stand in public: careful headers, a line in the log for each request, limits on how often
each may ask, and what /health tells of the machine.
"""

import logging
import os
import platform
import re
import threading
import time
from collections import deque
from contextvars import ContextVar
from datetime import UTC, datetime
from functools import cache
from json.encoder import encode_basestring_ascii as quoted
from secrets import token_hex

import psutil
from flask import g, request
from limits import RateLimitItem, parse, parse_many
from limits.storage import storage_from_string

from messages import Refused, RequestsAnswer, ServerInfo

log = logging.getLogger(__name__)

ON_HOST = any(re.match("DYNO$|RENDER$|RAILWAY_", name) for name in os.environ)
"""Whether this runs on Heroku, Render or Railway: in public, behind a proxy, on a disk that is not kept."""


def checked_admin_key(key: str) -> str:
    if not re.fullmatch("[!-~]+", key):
        raise ValueError("it must be printable ASCII without blanks: no other key can come with a request.")
    if len(key) < 16 and ON_HOST:
        raise ValueError("it must have 16 characters or more, for it opens every account.")
    if len(key) < 16:
        log.warning("WARNING: ADMIN_API_KEY is short, and opens every account. Do not go public with it.")
    return key


# ----------------------------------------------------------------------------------------- Headers

CAREFUL = [
    ("Referrer-Policy", "no-referrer"),
    ("X-Content-Type-Options", "nosniff"),
    ("X-Frame-Options", "DENY"),
]
NO_SOURCES = ("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'")
OWN_PAGE = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
}
NOT_TO_KEEP = ("Cache-Control", "no-store")
STAY_WITH_HTTPS = ("Strict-Transport-Security", "max-age=31536000")
EXPOSED = (
    "Access-Control-Expose-Headers",
    "Idempotent-Replayed, RateLimit-Limit, RateLimit-Remaining, RateLimit-Reset, Retry-After, X-Request-Id",
)
ALLOWED = [
    ("Access-Control-Allow-Methods", "GET, POST, PUT, PATCH, DELETE"),
    (
        "Access-Control-Allow-Headers",
        "Authorization, Content-Type, Idempotency-Key, X-Request-Id, X-Simulate-Fault, "
        "APCA-API-KEY-ID, APCA-API-SECRET-KEY",
    ),
    ("Access-Control-Max-Age", "600"),
]


def checked_origins(text: str) -> set[str]:
    origins = {origin.strip() for origin in text.split(",")}
    if not all(re.fullmatch(r"\*|https?://[a-z0-9.:\[\]-]+", origin) for origin in origins):
        raise ValueError("name origins as browsers send them, such as https://example.com, or * for all.")
    return origins


# ---------------------------------------------------------------------------------------- The gate

# One line a request, which says what a trade has booked, and one a failed source.
request_id: ContextVar[str] = ContextVar("request_id", default="")


def with_request_id(line: logging.LogRecord) -> bool:
    """Put the request's id on a line of the log, in whatever thread it is written."""
    line.request_id = request_id.get() and f" [{request_id.get()}]"
    return True


def without_query(line: logging.LogRecord) -> bool:
    """Cut a web server's line at its first `?`: it quotes what it cannot read, such as `GET /a b?key=...`,
    and somebody may have put a key into a query.
    """
    line.msg, line.args = line.getMessage().partition("?")[0], ()
    return True


def log_with_request_ids() -> None:
    """Begin the log, before anything else does."""
    logging.basicConfig(level=logging.INFO, format="%(message)s%(request_id)s")
    logging.getLogger().handlers[0].addFilter(with_request_id)
    for web_server in ("gunicorn.error", "werkzeug"):
        logging.getLogger(web_server).addFilter(without_query)


class Gate:
    """Stands in front of `app`: gives each request its id and its line in the log, each answer its headers.

    It speaks WSGI, where all this takes a quarter of what it took within Flask.
    """

    def __init__(self, app, origins: set[str]):
        self.app, self.origins = app, origins
        self.count = self.errors = 0
        self.last = deque(maxlen=1000)  # Of the last requests, how many milliseconds they took.

    def __call__(self, environ: dict, start_response):
        started, answered = time.perf_counter(), "500"
        sent = environ.get("HTTP_X_REQUEST_ID")
        is_safe_to_log = sent and re.fullmatch("[A-Za-z0-9._:/+=@-]{1,128}", sent)
        own_id = sent if is_safe_to_log else token_hex(16)
        request_id.set(own_id)
        environ.pop("HTTP_IF_MATCH", None)  # Nothing is changed by its version here; files would answer 412.
        welcome = ("*", environ.get("HTTP_ORIGIN"))  # `*` can be all of them, as the key is no cookie.
        origin = next((origin for origin in welcome if origin in self.origins), None)

        def start(status: str, headers: list, *failure):
            nonlocal answered
            answered = status[:3]
            headers = [*headers, *CAREFUL, *environ.get("broker.limit", ()), ("X-Request-Id", own_id)]
            if environ["PATH_INFO"].startswith(("/api/", "/alpaca/")):
                headers.append(NOT_TO_KEEP)
            else:  # What is served from a file has a date of its own, beside the web server's.
                headers = [header for header in headers if header[0] != "Date"]
            if all(name != "Content-Security-Policy" for name, _ in headers):  # A page brings its own.
                headers.append(NO_SOURCES)
            if "https" in (environ["wsgi.url_scheme"], environ.get("HTTP_X_FORWARDED_PROTO")):
                headers.append(STAY_WITH_HTTPS)  # Forging it gains nothing: over HTTP browsers ignore it.
            if self.origins:
                headers.append(("Vary", "Origin"))
            if origin:
                headers += [("Access-Control-Allow-Origin", origin), EXPOSED]
            return start_response(status, headers, *failure)

        method = environ["REQUEST_METHOD"]
        is_preflight = method == "OPTIONS" and "HTTP_ACCESS_CONTROL_REQUEST_METHOD" in environ
        try:
            if origin and is_preflight:
                start("204 No Content", ALLOWED)  # A browser asks, without a key, whether its page may ask.
                return []
            return self.app(environ, start)
        finally:
            milliseconds = (time.perf_counter() - started) * 1000
            self.count += 1
            self.errors += answered >= "500"
            self.last.append(milliseconds)
            path = environ["PATH_INFO"].partition("?")[0]  # A query can hide there, too: sent as %3F.
            asked = f"{method} {path} {environ['SERVER_PROTOCOL']}"
            address, booked = environ.get("REMOTE_ADDR"), environ.get("broker.booked", "")
            log.info("%s %s %s %.1f ms%s", address, quoted(asked), answered, milliseconds, booked)

    def health(self) -> RequestsAnswer:
        last = sorted(self.last.copy()) or [0.0]
        percentiles = {f"p{p}": round(last[len(last) * p // 100], 2) for p in (50, 95, 99)}
        return {"count": self.count, "errors": self.errors, "latency_ms": percentiles}


# ------------------------------------------------------------------------------------------ Limits

WRONG_KEYS = parse("100 per minute")
"""From one address. Right keys from there are answered all the same: they may be a neighbour's."""


def checked_limit(text: str) -> RateLimitItem:
    limits = parse_many(text)
    if len(limits) > 1 or limits[0].amount < 1:
        raise ValueError("name one limit, such as 600 per minute.")
    return limits[0]


class Counter:
    """Counts requests in Redis, if `uri` names one, and by itself while that does not answer.

    It needs one question a request: the window of time is part of the name that is counted, and how much
    of it is left is a matter of the clock. By itself means a dict: the memory that comes with `limits`
    starts a thread a hundred times a second to sweep, at 55 microseconds of processor a request.
    """

    REST_SECONDS = 2
    NAMES = 10_000  # In the dict; the oldest go, most of which are of windows that are over.

    def __init__(self, uri: str):
        self.redis, self.own, self.lock, self.rests_until = None, {}, threading.Lock(), 0.0
        if uri == "memory://":
            return
        if not re.match("rediss?://", uri):
            raise ValueError("it must begin with redis://, rediss:// or be memory://.")
        try:
            self.redis = storage_from_string(uri, socket_connect_timeout=0.1, socket_timeout=0.1)  # Seconds.
        except ValueError:
            raise ValueError("it is no address of a Redis.") from None

    def count(self, who: str, limit: RateLimitItem) -> None:
        """Count this request, once however often it is tried, and refuse it when that is over the limit."""
        most, seconds = limit.amount, limit.get_expiry()
        if g.get("counted_for") != who:
            window, past = divmod(int(time.time()), seconds)
            g.counted_for, g.used, g.rest = who, self.add(f"{who} in {window}", seconds), seconds - past
            request.environ["broker.limit"] = [
                ("RateLimit-Limit", str(most)),
                ("RateLimit-Remaining", str(max(most - g.used, 0))),
                ("RateLimit-Reset", str(g.rest)),
            ]
        if g.used > most:
            sentence = f"{most} requests in {seconds} seconds are the limit; go on in {g.rest}."
            raise Refused("rate_limited", sentence, rate_limit=most, retry_after=g.rest)

    def add(self, name: str, seconds: int) -> int:
        if self.redis and time.monotonic() >= self.rests_until:
            try:
                return self.redis.incr(name, seconds)
            except self.redis.base_exceptions as error:
                self.rests_until = time.monotonic() + self.REST_SECONDS
                log.warning("No answer from Redis (%s): each process counts alone", type(error).__name__)
        with self.lock:
            self.own[name] = used = self.own.get(name, 0) + 1
            if len(self.own) > self.NAMES:
                del self.own[next(iter(self.own))]
        return used


def client_address() -> str:
    """Where the request comes from.

    A proxy appends the address that asked it to X-Forwarded-For: the last one there is true, and those
    before it are whatever the client wrote. Where no proxy stands in front all of it may be forged, so it
    counts only on a host that has one, or when the one who asks is on this machine, such as nginx.
    """
    if ON_HOST or request.remote_addr in (None, "", "127.0.0.1", "::1"):
        return request.access_route[-1] if request.access_route else ""
    return request.remote_addr


# ------------------------------------------------------------------------------------------ Health


def server_info() -> ServerInfo:
    memory = psutil.virtual_memory()
    return {
        "platform": platform.system(),
        "platform_version": platform.release(),
        "architecture": platform.machine(),
        "python_version": platform.python_version(),
        "cpu_count": os.cpu_count(),
        "memory_total_gb": round(memory.total / 2**30, 2),
        "memory_available_gb": round(memory.available / 2**30, 2),
        "cpu_percent": psutil.cpu_percent(),
    }


@cache
def process_started(pid: int) -> datetime:
    return datetime.fromtimestamp(psutil.Process(pid).create_time(), UTC)
