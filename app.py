"""IBKR Broker Simulator: a REST service that pretends to be a broker.

    App               settings, the Flask app, how often a request is tried
    Errors            every answer that is not a success, as problem+json
    Reading requests  who asks, and for what
    Routes            the API; `trade` is the heart of the program, start reading there
    Commands          what `flask user` and `python app.py` do

What an account may do with its money is in `models.py`, where prices come from in `pricing.py`, how
statements reach the database in `database.py`, and what it takes to stand in public (ids, limits, headers)
in `public.py`.
"""

import csv
import hmac
import io
import json
import logging
import os
import platform
import random
import re
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from decimal import Decimal
from functools import cache, lru_cache
from json.encoder import encode_basestring_ascii as quoted
from uuid import uuid4

import click
import flask_swagger_ui
import psutil
import sqlalchemy as sa
from dotenv import load_dotenv
from flask import Blueprint, Flask, Response, g, request, stream_with_context
from flask.cli import AppGroup
from flask.json.provider import JSONProvider
from flask_migrate import Migrate, upgrade
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from sqlalchemy.exc import DBAPIError, InterfaceError, InternalError, OperationalError
from werkzeug.exceptions import HTTPException
from werkzeug.serving import WSGIRequestHandler, make_server

import openapi
import public
from database import ANSWER_SECONDS, OutcomeUnknown, Watched, db
from models import (
    ACCOUNT_LIMIT,
    ORDER_LIMIT,
    Account,
    Action,
    ApiKey,
    Books,
    Cash,
    Controls,
    Costs,
    Email,
    Market,
    Moment,
    Order,
    OrderAmount,
    Pin,
    QuoteExpired,
    Refused,
    Ticker,
    Trade,
    User,
    checked_cash,
    checked_ticker,
    iso,
    now,
    plain,
    unauthorized,
)
from pricing import (
    BAR_SECONDS,
    SAMPLE_FILE,
    AlphaVantage,
    BadFile,
    LiveMarket,
    NoSuchTicker,
    SampleMarket,
    SourceFailed,
    Yahoo,
    no_such_ticker,
    yahoo_is_reachable,
)

VERSION = "1.0.0"

# --------------------------------------------------------------------------------------------- App

load_dotenv()
# One line a request, which says what a trade has booked, and one a failed source. Where in the code a line
# comes from is not looked up: that takes time.
logging._srcfile = None
logging.basicConfig(level=logging.INFO, format="%(message)s%(request_id)s")
logging.getLogger().handlers[0].addFilter(public.with_request_id)


def setting(name: str, default: str | None, checked=str):
    """The setting `name` from the environment or `.env`, checked; a bad one ends the program."""
    text = os.environ.get(name) or default
    try:
        return text and checked(text)
    except (ValueError, ArithmeticError) as error:
        raise SystemExit(f"{name} cannot be used: {error}") from None  # Its value may hold a password.


def checked_number(low: int, high: int):
    def checked(text: str) -> int:
        if not (text.isascii() and text.isdigit() and low <= int(text) <= high):
            raise ValueError(f"it must be a whole number from {low} to {high}.")
        return int(text)

    return checked


def checked_cost(most: int):
    def checked(text: str) -> Decimal:
        cost = checked_cash(text)
        if cost > most:
            raise ValueError(f"it must be from 0 to {most}.")
        return cost

    return checked


def checked_sources(text: str) -> list[str]:
    sources = [source.strip() for source in text.lower().split(",")]
    if sources != ["sample"] and not set(sources) <= {"yahoo", "alphavantage"}:
        raise ValueError("name yahoo, alphavantage or both, or sample alone.")
    return sources


def checked_database(url: str) -> str:
    """`url` as SQLAlchemy wants it: psycopg2 must be named, and postgres:// is Heroku's spelling.

    Of several hosts (`@a:5432,b:5432/name`), as PostgreSQL's own tools take them, each becomes a `host=`.
    """
    scheme, separator, rest = url.partition("://")
    if scheme in ("postgres", "postgresql") and rest:
        if several := re.fullmatch(r"([^/?]*@)?([^/?@]*,[^/?@]*)/?([^?]*)\??(.*)", rest):
            login, hosts, name, options = several.groups("")
            rest = f"{login}/{name}?{options}&host=" + hosts.replace(",", "&host=")
        return f"postgresql+psycopg2://{rest}"
    if scheme == "sqlite" and rest.strip("/"):
        if public.ON_HOST:
            logging.warning(
                "WARNING: SQLite on a host's disk: ALL ACCOUNTS AND TRADES ARE LOST AT THE NEXT DEPLOY OR "
                "RESTART. Set DATABASE_URL to a PostgreSQL."
            )
        return url
    raise ValueError("it must begin with postgresql://, postgres:// or sqlite:///.")


HOST = setting("HOST", "127.0.0.1")
PORT = setting("PORT", "8000", checked_number(1, 65535))
STARTING_CASH = setting("STARTING_CASH", "100000", checked_cash)
ADMIN_API_KEY = setting("ADMIN_API_KEY", None, public.checked_admin_key)
ALPHAVANTAGE_API_KEY = setting("ALPHAVANTAGE_API_KEY", None)
COSTS = Costs(
    setting("COMMISSION_BPS", "0", checked_cost(10_000)),
    setting("COMMISSION_MIN", "0", checked_cost(1_000_000)),
    setting("SLIPPAGE_BPS", "0", checked_cost(10_000)),
)
CORS_ORIGINS = setting("CORS_ORIGINS", None, public.checked_origins) or set()
RATE_LIMIT = setting("RATE_LIMIT", "60000 per minute", public.checked_limit)
counter = setting("RATELIMIT_STORAGE_URI", "memory://", public.Counter)
PRICE_CACHE_SECONDS = setting("PRICE_CACHE_SECONDS", "180", checked_number(1, 86_400))

if __name__ == "__main__" and not os.environ.get("PRICE_SOURCES") and not yahoo_is_reachable():
    print("Yahoo Finance cannot be reached: serving the recorded sample market instead.")
    os.environ["PRICE_SOURCES"] = "sample"

PRICE_SOURCES = setting("PRICE_SOURCES", "yahoo,alphavantage", checked_sources)
EMBEDDED = "sqlite:///sample.db" if PRICE_SOURCES == ["sample"] else "sqlite:///simulator.db"
DATABASE_URL = setting("DATABASE_URL", EMBEDDED, checked_database)


class Simulator(Flask):
    """Flask, with one addition: a request that met a passing fault of the database is tried again."""

    TRIES = 6
    SECONDS = 3

    def dispatch_request(self):
        """Answer the request, from the top again after a lost race or a lost connection.

        Every route writes in one transaction at the most, and does nothing after it that can fail, so to
        repeat it whole is safe; a trade looks its idempotency key up first, under the lock, and so finds out
        what became of a COMMIT whose answer was lost. A client does not wait for ever: six tries, the second
        at once, and no further one after three seconds, except for a trade that had to wait for its lock so
        long that its price ran out.
        """
        unknown = None
        deadline = time.monotonic() + self.SECONDS
        for attempt in range(1, self.TRIES + 1):
            try:
                return self.answer(may_trust=attempt == 1)
            except (DBAPIError, sa.exc.TimeoutError, QuoteExpired, OutcomeUnknown, Refused) as error:
                unknown = unknown or (isinstance(error, OutcomeUnknown) and error)
                late = time.monotonic() > deadline and not isinstance(error, QuoteExpired)
                over = attempt == self.TRIES or late
                if over or not is_passing(error):
                    if unknown:
                        raise unknown from error
                    raise
            if attempt > 1:
                time.sleep(random.uniform(0.5, 1) * 0.05 * 2**attempt)

    def answer(self, may_trust: bool):
        """Try once. A "no" to one who was let in on trust is said only when the key was looked up."""
        try:
            admit(may_trust)
            return super().dispatch_request()
        except (Refused, HTTPException):
            look_up_if_on_trust()
            raise


def is_passing(error: Exception) -> bool:
    """Whether the same request may well succeed a moment later, and does no harm if it is made twice."""
    if isinstance(error, Refused | sa.exc.TimeoutError):
        return False
    if isinstance(error, OutcomeUnknown):
        # A trade looks its key up first; nothing else that writes has one.
        return request.method in ("GET", "HEAD") or request.endpoint == "trade"
    if isinstance(error, QuoteExpired):
        return True
    serialization_failure, deadlock, lock_timeout = "40001", "40P01", "55P03"
    return error.connection_invalidated or getattr(error.orig, "pgcode", None) in (
        serialization_failure,
        deadlock,
        lock_timeout,
    )


class ExactJSON(JSONProvider):
    """JSON with a newline at the end, and with the exact digits of Decimals.

    The standard library writes no Decimals. simplejson does, and takes three times as long, which for a
    large portfolio was half of the whole answer.
    """

    def dumps(self, document, **options) -> str:
        return in_json(document) + "\n"


def in_json(value) -> str:
    return WRITERS.get(type(value), json.dumps)(value)


def object_in_json(members: dict) -> str:
    # What `in_json` does, without its call for each value: in a large portfolio that is felt.
    values = [WRITERS.get(type(value), json.dumps)(value) for value in members.values()]
    return object_with(*members) % tuple(values)


@lru_cache
def object_with(*names: str) -> str:
    """The JSON of an object with members of these names, but for their values."""
    return "{" + ", ".join(quoted(name).replace("%", "%%") + ": %s" for name in names) + "}"


def list_in_json(items: list) -> str:
    return "[" + ", ".join(map(in_json, items)) + "]"


WRITERS = {str: quoted, Decimal: plain, dict: object_in_json, list: list_in_json}


app = Simulator("app")  # By name: `instance/` is then beside this file, wherever it is started from.
app.json = ExactJSON(app)
app.wsgi_app = gate = public.Gate(app.wsgi_app, CORS_ORIGINS)
app.url_map.merge_slashes = False  # A broker redirects nobody.
app.config["MAX_CONTENT_LENGTH"] = 64 * 1024
app.config["SQLALCHEMY_DATABASE_URI"] = DATABASE_URL
app.config["SQLALCHEMY_ENGINE_OPTIONS"] = {
    "isolation_level": "AUTOCOMMIT",  # database.py says BEGIN where statements belong together.
    "pool_size": 4,  # More would wait for each other in Python. Of two workers: 8; some databases let 15 in.
    "max_overflow": 0,
    "pool_timeout": 3,
    "pool_reset_on_return": None,  # `transaction` in database.py gives none back that is not over.
    "connect_args": {"timeout": 15}
    if DATABASE_URL.startswith("sqlite")
    else {
        "tcp_user_timeout": 2000,  # Milliseconds until a machine that is gone without a word is given up.
        "connect_timeout": ANSWER_SECONDS,
        "cursor_factory": Watched,
    },
}
db.init_app(app)
Migrate(app, db)

YAHOO_FOLDER = os.path.join(app.instance_path, "yfinance")

if PRICE_SOURCES == ["sample"]:
    try:
        market = SampleMarket(setting("SAMPLE_MARKET", str(SAMPLE_FILE)))
    except (BadFile, OSError) as error:
        raise SystemExit(f"SAMPLE_MARKET cannot be used: {error}") from None
else:
    sources = {"yahoo": Yahoo(YAHOO_FOLDER)}
    if ALPHAVANTAGE_API_KEY:
        sources["alphavantage"] = AlphaVantage(ALPHAVANTAGE_API_KEY)
    market = LiveMarket(app, [sources[s] for s in PRICE_SOURCES if s in sources], PRICE_CACHE_SECONDS)
    if not market.sources:
        sys.exit("PRICE_SOURCES=alphavantage cannot be used without ALPHAVANTAGE_API_KEY.")

# ------------------------------------------------------------------------------------------ Errors

STATUS = {
    "invalid_json": 400,
    "invalid_request": 400,
    "unauthorized": 401,
    "forbidden": 403,
    "unknown_ticker": 404,
    "not_found": 404,
    "method_not_allowed": 405,
    "already_exists": 409,
    "price_below_market": 409,
    "price_above_market": 409,
    "insufficient_funds": 409,
    "insufficient_shares": 409,
    "unsupported_currency": 409,
    "limit_exceeded": 409,
    "market_is_live": 409,
    "clock_is_running": 409,
    "too_large": 413,
    "unsupported_media_type": 415,
    "idempotency_key_reused": 422,
    "rate_limited": 429,
    "internal_error": 500,
    "price_unavailable": 503,
    "database_unavailable": 503,
    "outcome_unknown": 503,
}
"""Every `code` that an answer can carry, and its status."""

SENTENCES = {
    "not_found": "There is nothing at this path.",
    "method_not_allowed": "This path does not answer this method; `Allow` names those it does.",
    "too_large": "A request's body has 64 KiB at the most.",
    "internal_error": "The server met a fault of its own; it is in its log.",
}

CODE = {status: code for code, status in STATUS.items()} | {400: "invalid_request", 404: "not_found"}


def problem(code: str, detail: str, **members) -> Response:
    """An RFC 9457 answer: what went wrong in a sentence, and its numbers as members."""
    status = STATUS[code]
    document = {
        "type": "about:blank",
        "title": code.replace("_", " ").capitalize(),
        "status": status,
        "detail": detail,
        "code": code,
        **members,
    }
    response = Response(app.json.dumps(document), status, content_type="application/problem+json")
    if status == 401:
        response.headers["WWW-Authenticate"] = "Bearer"
    if status in (429, 503):
        response.headers["Retry-After"] = str(members.get("retry_after", 1))  # Seconds.
    return response


@app.errorhandler(Refused)
def refused(refusal: Refused) -> Response:
    return problem(refusal.code, refusal.detail, **refusal.members)


@app.errorhandler(HTTPException)
def http_problem(error: HTTPException) -> Response:
    """Flask's own refusals: no such path, a wrong method, a body that is too large, a bug of ours."""
    code = CODE.get(error.code, "invalid_request")
    response = problem(code, SENTENCES.get(code, error.description))
    if getattr(error, "valid_methods", None):
        response.headers["Allow"] = ", ".join(sorted(error.valid_methods))
    return response


@app.errorhandler(OperationalError)
@app.errorhandler(InterfaceError)
@app.errorhandler(InternalError)  # A standby, say, which takes no writes.
@app.errorhandler(sa.exc.TimeoutError)
def database_unavailable(error: Exception) -> Response:
    app.logger.error("The database does not answer: %s", type(getattr(error, "orig", error)).__name__)
    return problem("database_unavailable", "The database does not answer; try again in a moment.")


@app.errorhandler(OutcomeUnknown)
def outcome_unknown(error: OutcomeUnknown) -> Response:
    return problem(
        "outcome_unknown",
        "The connection to the database broke while this was being written. A trade can be sent again "
        "with its Idempotency-Key; for all else look first what has happened.",
    )


@app.errorhandler(QuoteExpired)
def quote_expired(error: QuoteExpired) -> Response:
    return problem("price_unavailable", "Prices change faster than this could be answered.")


# -------------------------------------------------------------------------------- Reading requests


let_in: dict[str, tuple] = {}
"""The accounts that this process has let in lately, by the hashes of their keys."""

LOOK_THEMSELVES = [("POST", "trade"), ("GET", "portfolio")]
"""Requests whose own statements find nothing unless the account still has this key."""

FAULT = "X-Simulate-Fault"
"""The header that asks for a drill, see `drilled_fault`. Some take time, so nobody has one on trust."""


def admit(may_trust: bool) -> None:
    """Let the request in: find out whose key it carries, which account that is, and how its market is set.

    A request that looks at the key itself, together with all else, may be let in on trust if its key was
    before: a question less to the database. `g.is_on_trust` stands until it has looked, and nothing is
    answered before that: neither a success nor, see `look_up_if_on_trust`, a refusal.
    """
    if not request.path.startswith("/api/"):
        return
    claim_database()
    scheme, _, key = request.headers.get("Authorization", "").partition(" ")
    key = key.strip() if scheme.lower() == "bearer" else ""
    g.key_hash, g.is_on_trust = User.hash(key), False
    is_admin = ADMIN_API_KEY and hmac.compare_digest(g.key_hash, User.hash(ADMIN_API_KEY))
    looks_itself = (request.method, request.endpoint) in LOOK_THEMSELVES and FAULT not in request.headers
    trusted = let_in.get(g.key_hash) if may_trust and looks_itself else None
    account = trusted or (User.with_key(g.key_hash) if key and not is_admin else None)
    if not (is_admin or account):
        let_in.pop(g.key_hash, None)  # A key that has ended is from now on a wrong one.
        counter.count(f"wrong keys from {public.client_address()}", public.WRONG_KEYS)
        raise unauthorized()
    if account:
        if len(let_in) >= 10_000:
            let_in.clear()
        let_in[g.key_hash] = account
        g.account, g.user_id, g.is_on_trust = account, account.user_id, trusted is not None
        pins = Pin.in_force(g.user_id) if account.pin_changes else {}
        g.controls = Controls(account.market_clock, account.pin_changes, pins)
    counter.count(f"user {account.user_id}" if account else "admin", RATE_LIMIT)
    is_admins_path = re.match("/api/v1/users(/|$)", request.path)
    if is_admins_path and not is_admin:
        raise Refused("forbidden", "Accounts are managed with the server's ADMIN_API_KEY, if it has one.")
    if is_admin and not is_admins_path:
        raise Refused("forbidden", "The admin's key manages accounts; it has none of its own to trade with.")


def look_up_if_on_trust() -> None:
    """Before a "no", which may be meant for nobody. `QuoteExpired` if it is another's or the market moved."""
    if g.get("is_on_trust"):
        told = g.user_id, g.controls
        admit(may_trust=False)
        if (g.user_id, g.controls) != told:
            raise QuoteExpired


@cache
def claim_database() -> None:
    """Once a process: take the database for the market that is served, or refuse to serve from it."""
    Market.claim("sample" if market.is_sample else "live")


def read(model: type[BaseModel]) -> BaseModel:
    """The request's JSON body as a `model`; refused unless every member is known and in order."""
    if request.mimetype != "application/json":
        raise Refused("unsupported_media_type", "Send JSON: `Content-Type: application/json`.")
    return checked(model, parsed(body()))


def body() -> bytes:
    """The request's body, whole: a server passes on one that was cut short."""
    if "unreadable" in g:
        raise g.unreadable  # Read again, it would seem to end where it broke off.
    try:
        content = request.get_data()
    except Exception as error:  # Each server raises its own for a bad chunk; all are the client's.
        refusal = Refused("invalid_json", "The body could not be read to its end.")
        g.unreadable = error if isinstance(error, HTTPException) else refusal
        raise g.unreadable from error
    if request.content_length not in (None, len(content)):
        raise Refused(
            "invalid_json",
            f"The body has {len(content)} bytes and Content-Length said {request.content_length}.",
        )
    return content


def parsed(content: bytes):
    """The JSON document in `content`, every number of it an exact Decimal."""
    try:
        return json.loads(
            content.decode(),
            parse_int=Decimal,
            parse_float=Decimal,
            parse_constant=no_constant,
            object_pairs_hook=unique_members,
        )
    except (ValueError, ArithmeticError, RecursionError) as error:
        reason = str(error) if type(error) is ValueError else "It cannot be parsed."
        raise Refused("invalid_json", f"The body is not valid JSON. {reason}") from error


def no_constant(name: str):
    raise ValueError(f"{name} is no JSON number.")


def unique_members(pairs: list) -> dict:
    members = dict(pairs)
    if len(members) < len(pairs):
        raise ValueError("A member appears twice.")
    return members


def checked(model: type[BaseModel], document) -> BaseModel:
    """`document` as a `model`, or `invalid_request` with one entry in `errors` for each bad field."""
    try:
        return model.model_validate(document)
    except ValidationError as error:
        raise invalid(
            {
                "field": ".".join(map(str, entry["loc"])) or "body",
                "message": entry["msg"].removeprefix("Value error, "),
            }
            for entry in error.errors(include_url=False, include_context=False)[:20]
        ) from None


def invalid(errors: Iterable[dict]) -> Refused:
    errors = list(errors)
    sentence = "; ".join(f"{error['field']}: {error['message']}" for error in errors)
    return Refused("invalid_request", f"{sentence}.", errors=errors)


def query(model: type[BaseModel]) -> BaseModel:
    """The query string as a `model`; a parameter that is unknown or comes twice is refused."""
    values = request.args.to_dict(flat=False) if request.query_string else {}
    return checked(model, {name: v[0] if len(v) == 1 else v for name, v in values.items()})


def idempotency_key() -> str | None:
    """The request's `Idempotency-Key`, if it carries one."""
    key = request.headers.get("Idempotency-Key")
    if key is not None and not re.fullmatch(r"[ -~]{1,255}", key):
        raise invalid(
            [{"field": "Idempotency-Key", "message": "must be 1 to 255 printable ASCII characters"}]
        )
    return key


class NoOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")


class TradeOptions(NoOptions):
    dry_run: bool = Field(False, description="Answer as the trade would, and write nothing")


def whole(number):
    """A JSON number as the integer that it is; `true` and 1.5 are none."""
    if not isinstance(number, Decimal) or number != number.to_integral_value():
        raise ValueError("must be a whole number")
    return int(number) if abs(number) < 10**18 else 10**18


class PathTicker(NoOptions):
    ticker: Ticker


class RunOption(NoOptions):
    run: int = Field(None, ge=1, lt=2**31, description="The run of the account; without it, the current one")


class Filters(RunOption):
    """Which trades to show."""

    ticker: Ticker = None
    action: Action = None
    since: Moment = Field(None, description="The earliest time to show, inclusive")
    until: Moment = Field(None, description="The time before which to show, exclusive")


class Page(Filters):
    limit: int = Field(50, ge=1, le=500, description="Trades on a page")
    cursor: int = Field(None, ge=1, lt=2**63, description="`next_cursor` of the page before")


class Reset(NoOptions):
    cash: Cash = Field(STARTING_CASH, description="Dollars to begin with")


class NewAccount(Reset):
    email: Email = Field(examples=["alice@example.com"])
    key: ApiKey = None


class Clock(NoOptions):
    at: Moment | None


class Advance(NoOptions):
    bars: int = Field(1, ge=1, le=100_000)

    _whole = field_validator("bars", mode="before")(whole)


class PinnedPrice(NoOptions):
    price: OrderAmount


# ------------------------------------------------------------------------------------------ Routes


@app.get("/api/v1/balance")
def balance():
    """Your cash, in dollars."""
    query(NoOptions)
    return {"user_id": g.user_id, "cash_balance": g.account.cash_balance}


@app.get("/api/v1/price/<ticker>")
def price(ticker: str):
    """What one share or coin costs, and until when that holds.

    Until `valid_until` trades are judged by this price, whatever the market does meanwhile.
    """
    query(NoOptions)
    return market.quote(checked(PathTicker, {"ticker": ticker}).ticker, g.controls).to_dict()


@app.get("/api/v1/portfolio")
def portfolio():
    """Your cash and holdings of one moment, valued at the market, with profit and loss.

    A holding whose price cannot be had in time shows `null` there, as do the totals that need it.
    """
    query(NoOptions)
    account, holdings = Account.with_holdings(g.user_id, g.key_hash)
    g.is_on_trust = False
    quotes = market.quotes([holding.ticker for holding in holdings], account.controls(g.controls))
    return account.portfolio(holdings, quotes)


@app.post("/api/v1/trade")
def trade():
    """Buy or sell, in full and at once, or be refused with the reason.

    A limit order (with `price`) is booked at the price it names: at or above the market price for a
    buy, at or below it for a sale. A market order (without) is booked at the market price. With an
    `Idempotency-Key` an order is safe to send again: it is booked once, and answered the same.
    """
    order, options, key, fault = read(Order), query(TradeOptions), idempotency_key(), drilled_fault()
    try:
        quote = market.quote(order.ticker, g.controls)  # Before the lock: no locked row waits for Yahoo.
    except Refused:
        look_up_if_on_trust()
        if key and (earlier := Trade.with_key(g.user_id, key)):
            return replay(earlier, order, options)  # Which needs no price.
        raise

    # One of its own makes an order without a key as safe to repeat in here as one with.
    key = key or g.setdefault("own_key", f"request {uuid4()}")
    with Account.locked(g.user_id, g.key_hash, order.ticker, key) as (account, position, earlier):
        g.is_on_trust = False
        if earlier:
            return replay(earlier, order, options)
        if (controls := account.controls(g.controls)) is not g.controls:
            quote = market.quote(order.ticker, controls)  # Of the sample market, which takes no time.
        booked = g.booked = account.fill(order, quote, position, COSTS)
        if fault == "error_before_commit":
            raise Refused("database_unavailable", "A drill: this trade failed and was not booked.")
        if options.dry_run:
            return Trade.to_dict(booked) | REHEARSED
        account.record(booked, position, key)
    if fault == "error_after_commit":
        raise Refused("outcome_unknown", "A drill: the answer to this trade was lost. Was it booked?")
    log_booked(booked, order)
    return Trade.to_dict(booked)


def log_booked(trade, order: Order) -> None:
    request.environ["broker.booked"] = f" trade {trade.id}: user {g.user_id} {order}"


REHEARSED = {"id": None, "dry_run": True}


def replay(earlier: tuple, order: Order, options: TradeOptions):
    """The first answer once more, for a key that has been used; refused if for another order."""
    if not Trade.is_for(earlier, order):
        raise Refused(
            "idempotency_key_reused",
            f"This Idempotency-Key belongs to trade {earlier.id}, which came of another order.",
            trade_id=str(earlier.id),
        )
    if "booked" in g and g.booked.created_at == earlier.created_at:
        log_booked(earlier, order)  # By us, a moment ago: the answer to our COMMIT was lost.
        return Trade.to_dict(earlier)
    answer = Trade.to_dict(earlier) | (REHEARSED if options.dry_run else {})
    return answer, {"Idempotent-Replayed": "true"}


@app.get("/api/v1/trades")
def trades():
    """Your trades, newest first, a page at a time.

    Follow `next_cursor` until it is `null`: nothing is skipped or repeated, whoever trades meanwhile.
    """
    page = query(Page)
    if page.cursor:
        last = Trade.of(g.user_id, page.cursor)
        if last is None:
            raise invalid([{"field": "cursor", "message": "must be the `next_cursor` of a page of yours"}])
        page.run = page.run or last.run  # The run that the first page was of, if a new one began since.
    rows = Trade.page(g.user_id, **page.model_dump(exclude={"limit"}), limit=page.limit + 1)
    shown = rows[: page.limit]
    return {
        "trades": [Trade.to_dict(row) for row in shown],
        "next_cursor": str(shown[-1].id) if len(rows) > page.limit else None,
    }


@app.get("/api/v1/trades.csv")
def trades_csv():
    """All your trades that pass the filters, newest first, as CSV."""
    filters = query(Filters).model_dump()
    filters["run"] = filters["run"] or g.account.run  # One run from end to end.

    def lines() -> Iterator[str]:
        cursor, size = None, 1000
        yield ",".join(Trade.CSV_COLUMNS) + "\r\n"
        while rows := Trade.page(g.user_id, **filters, cursor=cursor, limit=size):
            text = io.StringIO()
            csv.writer(text).writerows(Trade.to_csv(row) for row in rows)
            yield text.getvalue()
            cursor = rows[-1].id

    return Response(
        stream_with_context(lines()),
        content_type="text/csv; charset=utf-8",
        headers={"Content-Disposition": "attachment; filename=trades.csv"},
    )


@app.get("/api/v1/trades/<id>")
def one_trade(id: str):
    """One of your trades."""
    query(NoOptions)
    row = Trade.of(g.user_id, int(id)) if re.fullmatch("[0-9]{1,18}", id) else None
    if row is None:
        raise Refused("not_found", f"You have no trade {id}.")
    return Trade.to_dict(row)


@app.post("/api/v1/account/reset")
def reset():
    """Start over: a new run of the account, with `cash` dollars and no holdings.

    The key stays, and so do the trades of earlier runs.
    """
    query(NoOptions)
    start = read(Reset) if body() else Reset()
    with Account.locked(g.user_id, g.key_hash) as (account, _, _):
        account.start_over(start.cash, market.time(Controls(account.market_clock)))
    return {"user_id": g.user_id, "run": account.run, "cash_balance": account.cash_balance}


@app.get("/api/v1/account/history")
def account_history():
    """How a run went: one point of the equity curve a trade and one for now, and a summary.

    Past holdings are valued at what the market asked then: the recorded bar or the pin of that moment
    on the sample market, the last quote that this server had published by then on the live one.
    """
    run = query(RunOption).run
    books = Books.of(g.user_id)
    run = run or books.account.run
    if run not in books.runs:
        raise Refused("not_found", f"Your account has no run {run}.")
    portfolio = None
    if run == books.account.run:
        quotes = market.quotes([holding.ticker for holding in books.holdings], g.controls)
        portfolio = books.account.portfolio(books.holdings, quotes)
    past_price = market.past(g.user_id, {trade.ticker for trade in books.trades.get(run, [])})
    return books.history(run, past_price, portfolio, market.time(g.controls))


@app.get("/api/v1/account/audit")
def audit():
    """Whether your books hold: every trade replayed from the start, and compared to the last digit."""
    query(NoOptions)
    return Books.of(g.user_id).audit()


@app.get("/api/v1/rules")
def rules():
    """The rules of trading, the costs, limits, scales and price sources in force."""
    query(NoOptions)
    return {
        "rules": [
            "A buy's price must be at or above the market price, a sell's at or below it.",
            "A trade is booked at the price that the order names; without one, at the market price.",
            "Cash must cover a buy, the holding a sell: no margin, no short selling.",
            "Only tickers quoted in US dollars trade.",
            "A trade is booked in full and at once, or not at all.",
        ],
        "order_types": ["limit", "market"],
        "costs": {
            "commission_bps": COSTS.commission_bps,
            "commission_min": COSTS.commission_min,
            "slippage_bps": COSTS.slippage_bps,
        },
        "limits": {
            "order": ORDER_LIMIT,
            "account": ACCOUNT_LIMIT,
            "body_bytes": app.config["MAX_CONTENT_LENGTH"],
        },
        "scales": {"quantity": 8, "price": 8, "total_amount": 8, "percent": 2},
        "starting_cash": STARTING_CASH,
        "price_sources": PRICE_SOURCES,
        "price_cache_seconds": BAR_SECONDS if market.is_sample else PRICE_CACHE_SECONDS,
    }


# The sample market, under the control of each account for itself.


def need_sample_market() -> None:
    if not market.is_sample:
        raise Refused("market_is_live", "Only the sample market can be controlled: PRICE_SOURCES=sample.")


def drilled_fault() -> str | None:
    """The fault that the header `X-Simulate-Fault` asks for; some happen at once, in here."""
    fault = request.headers.get(FAULT)
    if fault is None:
        return None
    need_sample_market()
    if latency := re.fullmatch("latency=([0-9]{1,5})", fault):
        if not g.get("has_slept"):  # Once, however often the request is tried.
            g.has_slept = True
            time.sleep(min(int(latency[1]), 10_000) / 1000)
    elif fault == "price_unavailable":
        raise Refused("price_unavailable", "A drill: no source gave a price in time.")
    elif fault == "rate_limited":
        raise Refused("rate_limited", "A drill: you ask too often.")
    elif fault not in ("error_before_commit", "error_after_commit"):
        raise invalid(
            [
                {
                    "field": FAULT,
                    "message": "must be price_unavailable, rate_limited, error_before_commit, "
                    "error_after_commit or latency=MILLISECONDS",
                }
            ]
        )
    return fault


def market_under(controls: Controls) -> dict:
    return {
        "source": market.name,
        "clock": "manual" if controls.clock else "wall",
        "now": iso(market.time(controls)),
        "first_bar": iso(market.bars[0]),
        "last_bar": iso(market.bars[-1]),
        "tickers": sorted(market.closes),
        "pins": controls.pins,
    }


@app.get("/api/v1/market")
def market_state():
    """Your sample market: its clock, its recorded time, its tickers and the prices that you pinned."""
    query(NoOptions)
    need_sample_market()
    return market_under(g.controls)


@app.put("/api/v1/market/clock")
def set_clock():
    """Stop your clock at a bar of the recorded past, or let it run again (`null`).

    Between two bars it stops at the earlier one.
    """
    query(NoOptions)
    need_sample_market()
    at = read(Clock).at
    if at and not market.bars[0] <= at <= market.bars[-1]:
        span = f"from {iso(market.bars[0])} to {iso(market.bars[-1])}"
        raise invalid([{"field": "at", "message": f"must be a time {span}"}])
    with Account.locked(g.user_id, g.key_hash) as (account, _, _):
        account.change(market_clock=at and market.bar_at(at))
        controls = account.controls()
    return market_under(controls)


@app.post("/api/v1/market/advance")
def advance():
    """Move your stopped clock on by some bars; past the last one it does not go."""
    query(NoOptions)
    need_sample_market()
    bars = (read(Advance) if body() else Advance()).bars
    with Account.locked(g.user_id, g.key_hash) as (account, _, _):
        if account.market_clock is None:
            raise Refused("clock_is_running", "Stop the clock first: PUT /api/v1/market/clock.")
        account.change(market_clock=market.bar_after(account.market_clock, bars))
        controls = account.controls()
    return market_under(controls)


@app.put("/api/v1/market/prices/<ticker>")
def pin_price(ticker: str):
    """Pin the price of a ticker, in dollars, for your account alone."""
    query(NoOptions)
    need_sample_market()
    return pinned(ticker, read(PinnedPrice).price)


@app.delete("/api/v1/market/prices/<ticker>")
def unpin_price(ticker: str):
    """Let a pinned price go again."""
    query(NoOptions)
    need_sample_market()
    return pinned(ticker, None)


def pinned(ticker: str, price: Decimal | None):
    ticker = checked(PathTicker, {"ticker": ticker}).ticker
    if ticker not in market.closes:
        raise no_such_ticker(ticker)
    with Account.locked(g.user_id, g.key_hash) as (account, _, _):
        account.pin(ticker, price)
        controls = account.controls()
    return market_under(controls)


# For whoever runs the server; `admit` lets only the admin's key come here.


@app.post("/api/v1/users")
def open_account():
    """Open an account and answer its API key, this once."""
    query(NoOptions)
    new = read(NewAccount)
    user_id, api_key = User.open(new.email, new.cash, new.key)
    return {"user_id": user_id, "email": new.email, "cash_balance": new.cash, "api_key": api_key}, 201


@app.get("/api/v1/users")
def accounts():
    """Every account, closed ones too."""
    query(NoOptions)
    return {"users": [User.to_dict(user) for user in User.all()]}


@app.post("/api/v1/users/<int(max=9223372036854775807):user_id>/rotate-key")
def new_key(user_id: int):
    """Give an account a new API key, answered this once; the old one is refused from now on."""
    query(NoOptions)
    return {"user_id": user_id, "api_key": User.rotate_key(user_id)}


@app.delete("/api/v1/users/<int(max=9223372036854775807):user_id>")
def close_account(user_id: int):
    """Close an account: its key is refused from now on, its trades stay."""
    query(NoOptions)
    User.close(user_id)
    return {"user_id": user_id, "closed": True}


@app.get("/")
def dashboard():
    """The dashboard: a page to look at an account and to trade by hand."""
    return page("index.html")


@app.get("/docs")
def docs():
    """The API to read and to try out with your key, in the browser."""
    return page("docs.html")


def page(file: str) -> Response:
    """One of our pages, which the browser lets speak to this server alone."""
    response = app.send_static_file(file)
    response.headers["Cache-Control"] = "no-cache"
    response.headers["Content-Security-Policy"] = (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return response


# Swagger UI's own files come from its package: /docs asks no other host for anything.
swagger_ui = os.path.join(os.path.dirname(flask_swagger_ui.__file__), "dist")
app.register_blueprint(Blueprint("docs", "app", static_folder=swagger_ui, static_url_path="/docs"))


@app.get("/openapi.json")
@cache
def openapi_json():
    """This API as an OpenAPI 3.1 document, made from the program itself."""
    return openapi.document(app, VERSION, STATUS)


@app.get("/health")
def health():
    """Whether the server and its database work, and what this process has seen so far.

    Never waits for a price source, and half a second at the most for the database.
    """
    database = database_health()
    healthy = database["status"] == "healthy"
    memory, started = psutil.virtual_memory(), process_started(os.getpid())
    return {
        "status": "healthy" if healthy else "unhealthy",
        "timestamp": iso(now()),
        "version": VERSION,
        "uptime_seconds": round((now() - started).total_seconds()),
        "process": {"pid": os.getpid(), "started_at": iso(started)},
        "server_info": {
            "platform": platform.system(),
            "platform_version": platform.release(),
            "architecture": platform.machine(),
            "python_version": platform.python_version(),
            "cpu_count": os.cpu_count(),
            "memory_total_gb": round(memory.total / 2**30, 2),
            "memory_available_gb": round(memory.available / 2**30, 2),
            "cpu_percent": psutil.cpu_percent(),
        },
        "database": database,
        "prices": market.health(),
        "requests": gate.seen.health(),
    }, 200 if healthy else 503


@cache
def process_started(pid: int) -> datetime:
    return datetime.fromtimestamp(psutil.Process(pid).create_time(), UTC)


pinging = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ping")


def database_health() -> dict:
    """Ping the database in a thread of its own: one that hangs must not hang this answer as well."""

    database = db.engine

    def ping() -> float:
        started = time.perf_counter()
        with database.connect() as connection:
            connection.exec_driver_sql("SELECT 1")
        return round((time.perf_counter() - started) * 1000, 2)

    engine = database.dialect.name
    answer = pinging.submit(ping)
    try:
        latency = answer.result(timeout=0.5)
    except (TimeoutError, DBAPIError, sa.exc.TimeoutError):
        answer.cancel()  # If the ping before this one still hangs, this one is not needed either.
        return {"status": "unhealthy", "engine": engine, "latency_ms": None}
    return {"status": "healthy", "engine": engine, "latency_ms": latency}


# ---------------------------------------------------------------------------------------- Commands


class Commands(AppGroup):
    """Commands that end with one clear line where the program says no."""

    def invoke(self, context):
        try:
            return super().invoke(context)
        except Refused as refusal:
            raise click.ClickException(refusal.detail) from None
        except DBAPIError as error:
            raise click.ClickException(database_says(error)) from None


def database_says(error: DBAPIError) -> str:
    reason = str(error.orig).splitlines()[0]
    return f"The database cannot be used (is it up to date? flask --app app db upgrade): {reason}"


users = Commands("user", help="Open and close accounts.")
app.cli.add_command(users)


@users.command("add")
@click.argument("email")
@click.option("--cash", default=plain(STARTING_CASH), show_default=True, help="Dollars to begin with.")
@click.option("--key", help="The API key; without it one is made.")
def add_user(email: str, cash: str, key: str | None):
    """Open an account for EMAIL and print its API key, once."""
    account = checked(NewAccount, {"email": email, "cash": cash} | ({"key": key} if key else {}))
    user_id, key = User.open(account.email, account.cash, account.key)
    click.echo(f"User {user_id} ({account.email}) has {plain(account.cash)} dollars.")
    click.echo(f"API key, shown this once: {key}")


@users.command("list")
def list_users():
    """List the accounts: id, email, cash, and whether it is closed."""
    for user in User.all():
        closed = f"  closed {iso(user.closed_at)}" if user.closed_at else ""
        click.echo(f"{user.id:>6}  {user.email:<40} {plain(user.cash_balance):>20}{closed}")


@users.command("rotate-key")
@click.argument("email")
def rotate_key(email: str):
    """Give EMAIL a new API key and print it, once; the old one is refused from now on."""
    click.echo(f"API key, shown this once: {User.rotate_key(User.id_of(email))}")


@users.command("close")
@click.argument("email")
def close_user(email: str):
    """Close the account of EMAIL: its key is refused from now on, its trades stay."""
    User.close(User.id_of(email))
    click.echo(f"The account of {email} is closed.")


@app.cli.command("audit")
def audit_all():
    """Replay every trade of every account and compare the books to the last digit."""
    differences = count = 0
    for user in User.all():
        report = Books.of(user.id).audit()
        count += report["trades"]
        differences += len(report["differences"])
        for sentence in report["differences"]:
            click.echo(f"User {user.id}: {sentence}")
    click.echo(f"{count} trades replayed, {differences} differences.")
    sys.exit(1 if differences else 0)


@app.cli.command("record")
@click.argument("tickers", nargs=-1, required=True)
@click.option("--period", default="1y", show_default=True, help="1mo, 6mo, 1y, 5y, max, ...")
@click.option("--output", type=click.File("w", lazy=True), required=True, help="The CSV file to write.")
def record(tickers: tuple[str, ...], period: str, output):
    """Record daily closes of TICKERS from Yahoo, for SAMPLE_MARKET to replay."""
    yahoo, rows = Yahoo(YAHOO_FOLDER), []
    with click.progressbar(tickers, label="Recording", item_show_func=str) as bar:
        for text in bar:
            try:
                ticker = checked_ticker(text)
                closes = yahoo.closes(ticker, period)
            except (ValueError, SourceFailed, NoSuchTicker) as error:
                reason = str(error) or "Yahoo knows no such ticker"
                raise click.ClickException(f"{text}: {reason}.") from None
            rows += [(f"{date}T00:00:00Z", ticker, plain(price)) for date, price in closes]
    writer = csv.writer(output, lineterminator="\n")
    writer.writerow(["timestamp", "ticker", "price"])
    writer.writerows(sorted(set(rows)))
    click.echo(f"{len(rows)} prices are in {output.name}.")


TEST_USER, TEST_KEY = "test@example.com", "test-api-key-123"


def prepare() -> None:
    """Get the database ready. Only the embedded one is migrated, and given the test user, unasked.

    On a host, which is public, it has no test user either: everybody knows that key.
    """
    if DATABASE_URL == EMBEDDED:
        upgrade()
        if not public.ON_HOST and not User.with_key(User.hash(TEST_KEY)):
            with suppress(Refused):
                User.open(TEST_USER, STARTING_CASH, TEST_KEY)
    claim_database()


class Handler(WSGIRequestHandler):
    timeout = 10  # Seconds for a client that connects and sends nothing; the end would wait for it.

    def version_string(self) -> str:
        return "simulator"  # Which versions run here is nobody's business.


def serve() -> None:
    """`python app.py`: prepare everything, say in one line what is served, and serve it."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    logging.getLogger("alembic").setLevel(logging.ERROR)
    try:
        with app.app_context():
            prepare()
        server = make_server(HOST, PORT, app, threaded=True, request_handler=Handler)
    except Refused as refusal:
        sys.exit(refusal.detail)
    except DBAPIError as error:
        sys.exit(database_says(error))
    except OSError as error:
        sys.exit(f"HOST={HOST} PORT={PORT} cannot be served: {error}")
    url = f"http://{HOST}:{PORT}"
    print(
        f"Serving {', '.join(PRICE_SOURCES)} prices on {url}. Try: "
        f"curl -H 'Authorization: Bearer {TEST_KEY}' {url}/api/v1/price/AAPL",
        flush=True,
    )
    server.daemon_threads = False  # So that it answers what is in flight before it ends.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with suppress(KeyboardInterrupt):
        server.serve_forever()


if __name__ == "__main__":
    serve()
