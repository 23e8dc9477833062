"""What it takes to stand in public: careful headers, and limits on how often each may ask."""

import logging
import os
import re
import threading
import time

from flask import g, request
from limits import RateLimitItem, parse, parse_many
from limits.storage import storage_from_string

from messages import Refused

log = logging.getLogger(__name__)

ON_HOST = any(re.match("DYNO$|RENDER$|RAILWAY_", name) for name in os.environ)
"""Whether this runs on Heroku, Render or Railway: in public, behind a proxy, on a disk that is not kept."""


def checked_admin_key(key: str) -> str:
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
            raise Refused(
                "rate_limited",
                f"{most} requests in {seconds} seconds are the limit; go on in {g.rest}.",
                rate_limit=most,
                retry_after=g.rest,
            )

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
