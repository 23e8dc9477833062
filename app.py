"""IBKR Broker Simulator: a REST service that pretends to be a broker.

    App               the settings in force, the Flask app, how often a request is tried
    Errors            every answer that is not a success, as problem+json
    Who asks          whose key a request carries
    Routes            the API; `trade` and `execute` are the heart of the program, start reading there
    Commands          what `flask settle` and `python app.py` do; the others are in `commands.py`

A request comes in through `Gate`, `Simulator.dispatch_request` (which may try it again), `admit` and the
decorators of its route. What an account may do with its money is in `models.py`, how an order waits in
`orders.py`, what came of it all in `results.py`, where prices come from in `pricing.py`, what comes in and
goes out in `messages.py`, and what it takes to stand in public (limits, headers) in `public.py`. Programs
that were written for Alpaca find its routes in `alpaca_face.py`, in front of the same books; what an alert of
TradingView's says is in `tradingview.py`.
"""

import hmac
import logging
import os
import random
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from decimal import Decimal
from functools import cache, partial, wraps
from typing import Annotated, Literal, get_args

import click
import flask_swagger_ui
import sqlalchemy as sa
from flask import Blueprint, Flask, Response, g, request
from flask_migrate import Migrate, upgrade
from sqlalchemy.exc import DatabaseError, DataError, DBAPIError, IntegrityError, InterfaceError
from werkzeug.exceptions import HTTPException
from werkzeug.routing import IntegerConverter

import alpaca_face
import openapi
import public
import tradingview
from commands import Command, commands, serve
from database import (
    OutcomeUnknown,
    database_health,
    db,
    is_read_only,
    log_once_committed,
    lost_a_race,
    snapshot,
    transaction,
    use_database,
)
from messages import (
    ACCOUNT_LIMIT,
    CODE,
    ORDER_LIMIT,
    REHEARSED,
    SENTENCES,
    STATUS,
    Advance,
    BalanceAnswer,
    BarOptions,
    BarsAnswer,
    ChangedOrder,
    Clock,
    ClosedAccount,
    Correction,
    ExactJSON,
    Filters,
    HealthAnswer,
    HistoryOptions,
    Listed,
    MarketAnswer,
    NewAccount,
    NewKey,
    NewOrder,
    OpenedAccount,
    Order,
    OrderFilters,
    OrderPage,
    OrderType,
    Page,
    PathTicker,
    PinnedPrice,
    Refused,
    Reset,
    Resolution,
    RulesAnswer,
    RunAnswer,
    TradeOptions,
    csv_answer,
    invalid,
    iso,
    now,
    refuses,
    takes,
    told,
    unauthorized,
)
from models import (
    Account,
    AdvanceAnswer,
    Costs,
    MarketOfDatabase,
    PortfolioAnswer,
    PricesAnswer,
    Quote,
    QuoteAnswer,
    QuoteExpired,
    Trade,
    TradeAnswer,
    TradesAnswer,
    User,
    UsersAnswer,
    unless_refused,
)
from orders import ORDERS_LIMIT, CanceledAnswer, OrderAnswer, OrdersAnswer, PlacedOrder, Tick, fingerprint
from pricing import (
    BAR_SECONDS,
    SAMPLE_FILE,
    AlphaVantage,
    LiveMarket,
    SampleMarket,
    Yahoo,
    no_such_ticker,
    yahoo_is_reachable,
)
from recorded import BadFile
from results import AuditAnswer, Books, HistoryAnswer
from settings import read_settings
from tradingview import Alert

VERSION = "1.0.0"

# --------------------------------------------------------------------------------------------- App

public.log_with_request_ids()

settings = read_settings()
PRICE_SOURCES = settings.PRICE_SOURCES
if __name__ == "__main__" and "PRICE_SOURCES" not in settings.model_fields_set and not yahoo_is_reachable():
    print(
        "Yahoo Finance cannot be reached: serving the recorded sample market instead. "
        "Commands want PRICE_SOURCES=sample in front, then."
    )
    PRICE_SOURCES = ["sample"]
EMBEDDED = "sqlite:///simulator.db"
if PRICE_SOURCES == ["sample"]:  # A market of one's own has books of its own.
    name = settings.SAMPLE_MARKET and re.sub("[^A-Za-z0-9]", "-", settings.SAMPLE_MARKET.stem)
    EMBEDDED = f"sqlite:///sample-{name}.db" if name else "sqlite:///sample.db"
DATABASE_URL = settings.DATABASE_URL or EMBEDDED
if public.ON_HOST and DATABASE_URL.startswith("sqlite"):
    logging.warning(
        "WARNING: SQLite on a host's disk: ALL ACCOUNTS AND TRADES ARE LOST AT THE NEXT DEPLOY OR RESTART. "
        "Set DATABASE_URL to a PostgreSQL."
    )
COSTS = Costs(settings.COMMISSION_BPS, settings.COMMISSION_MIN, settings.SLIPPAGE_BPS)
counter = settings.RATELIMIT_STORAGE_URI  # Parsed into a `public.Counter`.
ADMIN_KEY_HASH = settings.ADMIN_API_KEY and User.hash(settings.ADMIN_API_KEY)


class Simulator(Flask):
    """Flask, with one addition: a request that met a passing fault of the database is tried again."""

    TRIES = 6
    SECONDS = 3

    def dispatch_request(self):
        """Answer the request, from the top again after a lost race or a lost connection.

        Every route writes in one transaction at the most, or in several of which each has a key of its own,
        and does nothing after it that can fail, so to repeat it whole is safe; a trade looks its idempotency
        key up first, under the lock, and so finds out what became of a COMMIT whose answer was lost. A client
        does not wait for ever: six tries, the second at once, and no further one after three seconds, except
        for a trade that had to wait for its lock so long that its price ran out.
        """
        unknown = None
        deadline = time.monotonic() + self.SECONDS
        for attempt in range(1, self.TRIES + 1):
            try:
                admit()
                return super().dispatch_request()
            except (Refused, sa.exc.TimeoutError) as refusal:
                if unknown:  # What was not known then is not known by a refusal now.
                    raise unknown from refusal
                raise
            except (DBAPIError, QuoteExpired, OutcomeUnknown) as error:
                db.session.close()
                unknown = unknown or (isinstance(error, OutcomeUnknown) and error)
                late = time.monotonic() > deadline and not isinstance(error, QuoteExpired)
                if attempt == self.TRIES or late or not is_passing(error):
                    raise unknown or error from error
            if attempt > 1:
                time.sleep(random.uniform(0.5, 1) * 0.05 * 2**attempt)


class AsciiNumber(IntegerConverter):
    regex = "[0-9]+"  # Python's digits are those of all scripts.


def is_passing(error: Exception) -> bool:
    """Whether the same request may well succeed a moment later, and does no harm if it is made twice."""
    if isinstance(error, OutcomeUnknown):
        # What is booked under a key looks that up first; nothing else that writes has one.
        return request.method in ("GET", "HEAD") or "order_key" in g
    return isinstance(error, QuoteExpired) or lost_a_race(error)


app = Simulator("app")  # By name: `instance/` is then beside this file, wherever it is started from.
app.json = ExactJSON(app)
app.wsgi_app = gate = public.Gate(alpaca_face.tidied(app.wsgi_app), settings.CORS_ORIGINS or set())
app.url_map.converters["int"] = AsciiNumber
app.url_map.merge_slashes = False  # A broker redirects nobody.
app.config["MAX_CONTENT_LENGTH"] = 64 * 1024
app.config |= {"STARTING_CASH": settings.STARTING_CASH, "ADMIN_KEY_HASH": ADMIN_KEY_HASH}
use_database(app, DATABASE_URL)
Migrate(app, db, os.path.join(app.root_path, "migrations"))  # Its own default is below the working folder.

if PRICE_SOURCES == ["sample"]:
    try:
        market = SampleMarket(settings.SAMPLE_MARKET or SAMPLE_FILE, settings.CORPORATE_ACTIONS)
    except (BadFile, OSError) as error:
        raise SystemExit(f"SAMPLE_MARKET cannot be used: {error}") from None
else:
    sources = {"yahoo": Yahoo(app.instance_path)}
    if settings.ALPHAVANTAGE_API_KEY:
        sources["alphavantage"] = AlphaVantage(settings.ALPHAVANTAGE_API_KEY)
    market = LiveMarket(
        app,
        [sources[s] for s in PRICE_SOURCES if s in sources],
        settings.PRICE_CACHE_SECONDS,
        settings.MAX_PRICE_AGE_DAYS,
        settings.CORPORATE_ACTIONS,
    )
    if not market.sources:
        sys.exit("PRICE_SOURCES=alphavantage cannot be used without ALPHAVANTAGE_API_KEY.")

# ------------------------------------------------------------------------------------------ Errors


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
    kind = "application/problem+json"
    if request.path.startswith(alpaca_face.PREFIX):
        (document, status), kind = alpaca_face.error(code, status, detail, members), "application/json"
    response = app.json.response(document)
    response.status_code, response.content_type = status, kind
    if status == 401:
        response.headers["WWW-Authenticate"] = "Bearer"
    if status in (429, 503, 504):
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


@app.errorhandler(DatabaseError)  # A standby's, say, which takes no writes, or for a table that is not there.
@app.errorhandler(InterfaceError)
@app.errorhandler(sa.exc.TimeoutError)
def database_unavailable(error: Exception) -> Response:
    if isinstance(error, IntegrityError | DataError):
        raise error  # The database is well, and this a bug of ours.
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


# ---------------------------------------------------------------------------------------- Who asks


def admit() -> None:
    """Let the request in: find out whose key it carries and which account that is, and count it."""
    is_alpacas = request.path.startswith(f"{alpaca_face.PREFIX}v")  # All but its description.
    if not is_alpacas and not request.path.startswith("/api/"):
        return
    claim_database()
    scheme, _, key = request.headers.get("Authorization", "").partition(" ")
    key = key.strip() if scheme.lower() == "bearer" else ""
    unreadable = None
    if request.path == "/api/v1/webhook/tradingview" and request.method == "POST":
        try:
            key = tradingview.sent_key()
        except (Refused, HTTPException) as error:
            key, unreadable = "", error  # Which counts as a wrong key.
    if is_alpacas:
        key = key or alpaca_face.sent_key()
        is_told_everybody = request.path.startswith("/alpaca/v1beta3/crypto/")  # What coins cost.
        if not key and market.is_sample and is_told_everybody:
            g.account = Account(user_id=0, pin_changes=0)  # It has the wall clock and no pins.
            return counter.count(f"address {public.client_address()}", settings.RATE_LIMIT)
    g.key_hash = User.hash(key)
    is_admin = ADMIN_KEY_HASH and hmac.compare_digest(g.key_hash, ADMIN_KEY_HASH)
    account = Account.with_key(g.key_hash) if key and not is_admin else None
    if not (is_admin or account):
        counter.count(f"wrong keys from {public.client_address()}", public.WRONG_KEYS)
        raise unreadable or unauthorized()
    counter.count(f"user {account.user_id}" if account else "admin", settings.RATE_LIMIT)
    is_admins_path = re.match("/api/v1/users(/|$)", request.path)
    if is_admins_path and not is_admin:
        raise Refused("forbidden", "Accounts are managed with the server's ADMIN_API_KEY, if it has one.")
    if is_admin and not is_admins_path:
        raise Refused("forbidden", "The admin's key manages accounts; it has none of its own to trade with.")
    if account:
        g.account, g.user_id = up_to_date(account, g.key_hash), account.user_id


def up_to_date(account: Account, key_hash: str | None = None) -> Account:
    """The account, once its open orders have seen all prices and its splits and dividends are booked: before
    anything of it is read. A standby, which takes no writes, tells one without open orders as it is.
    """
    if not market.has_moved(account):  # Asked before the lock: no locked row waits for Yahoo.
        return account
    while True:
        try:
            with transaction(account.user_id):
                settled = locked(account.user_id, key_hash)
            if not market.is_sample or not market.has_moved(settled):  # A day at a time: see `catch_up`.
                break
        except OutcomeUnknown:
            pass  # Whatever came of it, we look again.
        except DBAPIError as error:
            if account.settled_at or not is_read_only(error):
                raise
            return account
    return Account.with_key(key_hash) or account


def locked(user_id: int, key_hash: str | None, ticker: str = "", order_key: str = "") -> Account:
    """The account, locked, with all booked that the market has done to it: whatever changes one begins here.

    Its owner must still have the API key with that hash; an admin, who has no such key, passes None.
    """
    key_hash = key_hash or User.locked(user_id).api_key_hash
    account = Account.locked(user_id, key_hash, ticker, order_key)
    catch_up(account)
    return account


def catch_up(account: Account, moment: datetime | None = None) -> None:
    """Show its open orders all prices since they last saw some, and book its splits and dividends.

    On the sample market a day of them at a time: one that was left for a year holds up nobody for long.
    """
    if market.may_have_moved(account):
        moment = moment or now()
        if market.is_sample:
            moment = min(moment, (account.settled_at or account.acted_at) + timedelta(days=1))
        show(account, market.since_settled(account, moment), moment)


def show(account: Account, ticks: Iterable[Tick], moment: datetime) -> list[Trade]:
    """Show `ticks` to its open orders and its holdings; answers the trades that come of it."""
    trades = account.settle(ticks, market.day, COSTS, moment)
    for trade in trades:
        why = f"order {trade.order_id} is filled by " if trade.order_id else ""
        log_once_committed(f"{why}{trade}")
    return trades


@cache
def claim_database() -> None:
    """Once a process: take the database for the market that is served, or refuse to serve from it."""
    MarketOfDatabase.claim("sample" if market.is_sample else "live")


# ------------------------------------------------------------------------------------------ Routes
# The sample market, under the control of each account for itself.


def need_sample_market() -> None:
    if not market.is_sample:
        raise Refused("market_is_live", "Only the sample market can be controlled: PRICE_SOURCES=sample.")


@app.get("/api/v1/market")
@takes()
@refuses("market_is_live")
def market_state() -> MarketAnswer:
    """Your sample market: its clock, its recorded time, its tickers and the prices that you pinned."""
    need_sample_market()
    return market.state(g.account)


@app.put("/api/v1/market/clock")
@takes(Clock)
@refuses("market_is_live", "outcome_unknown")
def set_clock(clock: Clock) -> MarketAnswer:
    """Stop your clock at a bar of the recorded past, or let it run again (`null`).

    Between two bars it stops at the earlier one.
    """
    need_sample_market()
    at = clock.at
    if at and not market.bars[0] <= at <= market.bars[-1]:
        span = f"from {iso(market.bars[0])} to {iso(market.bars[-1])}"
        raise invalid([{"field": "at", "message": f"must be a time {span}"}])
    with transaction(g.user_id):
        account, moment = locked(g.user_id, g.key_hash), now()
        catch_up(account, moment)  # For the minute may have changed as well.
        left = market.time(account, moment)
        account.stop_clock(at and market.bar_at(at))
        landed = now()
        show(account, market.landing(account, landed, left), landed)
        return market.state(account)  # Read before it is committed: so it is safe to repeat.


@app.post("/api/v1/market/advance")
@takes(Advance, body_may_miss=True)
@refuses("unknown_ticker", "market_is_live", "clock_is_running", "outcome_unknown")
def advance(step: Advance) -> AdvanceAnswer:
    """Move your stopped clock on by some bars; past the last one it does not go.

    Your open orders see each bar on the way, and `fills` are the trades that came of it, splits and dividends
    too. With `tickers` the answer has their prices after it: so a back-test is one request a bar.
    """
    need_sample_market()
    tickers = step.tickers or []
    for ticker in tickers:
        if ticker not in market.series:
            raise no_such_ticker(ticker)
    with transaction(g.user_id):
        account = locked(g.user_id, g.key_hash)
        clock = market.clock(account)
        if clock is None:
            raise Refused("clock_is_running", "Stop the clock first: PUT /api/v1/market/clock.")
        bar = market.bar_after(clock, step.bars)
        fills = show(account, market.bars_between(account, bar), now())
        account.advance(bar)
        prices = {ticker: quote.price for ticker, quote in market.quotes(tickers, account).items()}
        # Read before it is committed: so it is safe to repeat.
        answer = market.state(account) | {"fills": [trade.to_dict() for trade in fills]}
        return answer | ({"prices": prices} if step.tickers else {})


@app.put("/api/v1/market/prices/<path:ticker>")
@takes(PinnedPrice, path=PathTicker)
@refuses("unknown_ticker", "market_is_live", "outcome_unknown")
def pin_price(pinned: PinnedPrice, ticker: str) -> MarketAnswer:
    """Pin the price of a ticker, in dollars, for your account alone."""
    return pin(ticker, pinned.price)


@app.delete("/api/v1/market/prices/<path:ticker>")
@takes(path=PathTicker)
@refuses("unknown_ticker", "market_is_live", "outcome_unknown")
def unpin_price(ticker: str) -> MarketAnswer:
    """Let a pinned price go again."""
    return pin(ticker, None)


def pin(ticker: str, price: Decimal | None) -> MarketAnswer:
    need_sample_market()
    letting_go = price is None and ticker in g.account.pins  # Also of a ticker that the file has no more.
    if ticker not in market.series and not letting_go:
        raise no_such_ticker(ticker)
    with transaction(g.user_id):
        account = locked(g.user_id, g.key_hash)
        if price is None and ticker not in account.pins:
            return market.state(account)  # Nothing is let go, and so it is no new price.
        account.pin(ticker, price)
        if account.settled_at:  # This price alone is new; of the others, orders have seen what they had.
            show(account, market.pinned(account, ticker, account.settled_at), account.settled_at)
        return market.state(account)  # Read before it is committed: so it is safe to repeat.


FAULT = "X-Simulate-Fault"
"""The header that asks for a drill."""


def drillable(route):
    """A `route` that books and fails the way `X-Simulate-Fault` asks, on the sample market alone."""

    @wraps(route)
    def drilled(*asked, **more):
        fault = request.headers.get(FAULT)
        if fault is None:
            return route(*asked, **more)
        fault = fault.lower()
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
            faults = "price_unavailable, rate_limited, error_before_commit, error_after_commit"
            raise invalid([{"field": FAULT, "message": f"must be {faults} or latency=MILLISECONDS"}])
        if fault == "error_before_commit":
            sa.event.listen(db.session(), "before_commit", fail_where_booked)
        answer = route(*asked, **more)
        if fault == "error_after_commit" and "tried" in g:
            raise Refused("outcome_unknown", "A drill: the answer to this trade was lost. Was it booked?")
        return answer

    drilled.headers = [FAULT]
    return drilled


def fail_where_booked(_) -> None:
    if "tried" in g:
        raise Refused("database_unavailable", "A drill: this trade failed and was not booked.")


# What accounts ask, and what they trade.


@app.get("/api/v1/balance")
@takes()
def balance() -> BalanceAnswer:
    """Your cash, and what of it is held back for open orders, in dollars."""
    account = Account.with_orders(g.user_id) if g.account.settled_at else g.account
    return told(BalanceAnswer, account)


@app.get("/api/v1/prices")
@takes(query=Listed)
def prices(listed: Listed) -> PricesAnswer:
    """What up to 100 tickers cost, asked side by side; why not, for those that have no price."""
    answers = market.look_ups(listed.tickers, g.account)
    quotes = [quote.to_dict() for quote in answers.values() if isinstance(quote, Quote)]
    missing = {ticker: no.code for ticker, no in answers.items() if isinstance(no, Refused)}
    return {"prices": quotes, "missing": missing}


@app.get("/api/v1/price/<path:ticker>")
@takes(path=PathTicker)
@refuses("unknown_ticker", "unsupported_price", "price_unavailable")
def price(ticker: str) -> QuoteAnswer:
    """What one share or coin costs, and until when that holds.

    Until `valid_until` trades are judged by this price, whatever the market does meanwhile.
    """
    return unless_refused(market.look_up(ticker, g.account)).to_dict()


@app.get("/api/v1/bars/<path:ticker>")
@takes(query=BarOptions, path=PathTicker)
@refuses("unknown_ticker", "price_unavailable")
def bars(asked: BarOptions, ticker: str) -> BarsAnswer:
    """What one share or coin cost in the past: the last bars of those asked for, oldest first.

    A bar has the time at which it begins, in UTC: a day at midnight, a week on Monday. Where `start` is not
    before `end` there is none. On the sample market there is none after your account's clock, whatever you
    pinned.
    """
    found = market.past_bars(ticker, asked, g.account)
    return {"ticker": ticker, "timeframe": asked.timeframe, "bars": [bar.to_dict() for bar in found]}


@app.get("/api/v1/portfolio")
@takes()
def portfolio() -> PortfolioAnswer:
    """Your cash and holdings of one moment, valued at the market, with profit and loss.

    A holding whose price cannot be had in time shows `null` there, as do the totals that need it.
    """
    account, holdings, quotes = at_the_market()
    return account.portfolio(holdings, quotes)


def at_the_market() -> tuple[Account, Sequence, dict[str, Quote]]:
    """Your account, its holdings and what they cost, once the splits that came with the prices are booked."""
    for _ in range(3):
        account, holdings = Account.with_holdings(g.user_id, g.key_hash)
        quotes = market.quotes([holding.ticker for holding in holdings], account)
        db.session.close()  # Pins were read with it, and what follows takes a connection of its own.
        if not market.is_ahead_of(account):
            break  # Else the prices are of other shares. A standby cannot book them, and tells what it has.
        if newest := Account.with_key(g.key_hash):
            up_to_date(newest, g.key_hash)
    return account, holdings, quotes


OF_AN_ORDER = (
    *("unknown_ticker", "insufficient_funds", "insufficient_shares", "unsupported_currency"),
    *("unsupported_price", "stale_price", "limit_exceeded", "idempotency_key_reused", "outcome_unknown"),
)
OF_A_TRADE = (*OF_AN_ORDER, "price_below_market", "price_above_market", "market_is_live")


@app.post("/api/v1/trade")
@takes(Order, query=TradeOptions, order_key=True)
@refuses(*OF_A_TRADE)
@drillable
def trade(order: Order, options: TradeOptions, order_key: str) -> TradeAnswer:
    """Buy or sell, in full and at once, or be refused with the reason.

    A limit order (with `price`) is booked at the price it names: at or above the market price for a
    buy, at or below it for a sale; one that may wait for its price is placed at `/api/v1/orders`. A market
    order (without) is booked at the market price, less favourable by the slippage that is in force. With an
    `Idempotency-Key` an order is safe to send again: it is booked once, and answered the same.
    """
    return execute(order, order_key, options.dry_run)


@app.post("/api/v1/webhook/tradingview")
@takes(Alert, order_key=True, webhook=True)
@refuses(*OF_A_TRADE)
@drillable
def trade_on_alert(alert: Alert, order_key: str) -> TradeAnswer:
    """Trade as an alert of TradingView's says, which has the API key in its body.

    It is an order like any other at `/api/v1/trade`, with `key` for the header, and `id` for the
    `Idempotency-Key`. Any content type will do. A ticker may have its exchange before it, and `BTCUSD` is
    `BTC-USD`.
    """
    return execute(alert, alert.id or order_key)


def execute(order: Order, order_key: str, dry_run: bool = False) -> TradeAnswer:
    """Trade at once, and only once under the key."""
    # `Simulator.dispatch_request` has called `admit`, which fills `g`, and may call this again.
    # The price comes before the lock: no locked row waits for Yahoo. Where it is a refusal, `fill` raises it.
    quote = market.look_up(order.ticker, g.account)

    with transaction(g.user_id, keep=not dry_run):
        account = locked(g.user_id, g.key_hash, order.ticker, order_key)
        if earlier := earlier_under_key(account):  # Its first answer needs no price.
            answer, headers = replay(earlier, earlier.is_for(order), Trade.to_dict)
            return answer | (REHEARSED if dry_run else {}), headers
        quote = quote_for(account, order.ticker, quote)
        booked = account.fill(order, quote, account.holding(order.ticker), COSTS)
        if dry_run:
            return booked.to_dict() | REHEARSED
        account.book(booked, account.holding(order.ticker), order_key)
        g.tried = booked

    request.environ["broker.booked"] = f" {booked}"
    return booked.to_dict()


def earlier_under_key(account: Account) -> Trade | PlacedOrder | None:
    """What came under this request's key before."""
    if "tried" in g and g.tried.run != account.run:
        raise OutcomeUnknown  # An earlier try may have booked it in a run that is over.
    if account.earlier_order:
        return db.session.get(PlacedOrder, account.earlier_order)
    return account.earlier_trade and db.session.get(Trade, account.earlier_trade)


def quote_for(account: Account, ticker: str, quote: Quote | Refused) -> Quote | Refused:
    """The `quote`, or a new one where the account has moved its clock or a pin since `admit`: no network."""
    seen = g.account
    if (account.market_clock, account.pin_changes) == (seen.market_clock, seen.pin_changes):
        return quote
    quote = market.look_up(ticker, account)
    catch_up(account)  # For the minute may have changed as well.
    return quote


def replay(earlier: Trade | PlacedOrder, is_same: bool, tell: Callable) -> tuple[dict, dict]:
    """The first answer once more, for a key that has been used; refused if for another order."""
    if not is_same:
        what = "trade" if isinstance(earlier, Trade) else "order"
        raise Refused(
            "idempotency_key_reused",
            f"This Idempotency-Key belongs to {what} {earlier.id}, which came of another order.",
            **{f"{what}_id": str(earlier.id)},
        )
    if "tried" in g and g.tried.created_at == earlier.created_at:
        request.environ["broker.booked"] = f" {earlier}"
        return tell(earlier), {}  # By us, a moment ago: the answer to our COMMIT was lost.
    return tell(earlier), {"Idempotent-Replayed": "true"}


@app.get("/api/v1/trades")
@takes(query=Page)
def trades(page: Page) -> TradesAnswer:
    """Your trades, newest first, a page at a time.

    Follow `next_cursor` until it is `null`: nothing is skipped or repeated, whoever trades meanwhile.
    """
    return page_of("trades", Trade, page)


def page_of(name: str, kind: type[Trade] | type[PlacedOrder], page: Page | OrderPage) -> dict:
    """Those of yours on a `page`, the newest first, and the cursor of the next one."""
    run = page.run or g.account.run
    if page.cursor:
        last = db.session.get(kind, page.cursor)
        if last is None or last.user_id != g.user_id:
            raise invalid([{"field": "cursor", "message": "must be the `next_cursor` of a page of yours"}])
        run = page.run or last.run  # The run that the first page was of, if a new one began since.
    chosen = page.model_dump(exclude={"limit"}) | {"run": run}
    found = kind.page(g.user_id, **chosen, limit=page.limit + 1)
    next_cursor = str(found[-2].id) if len(found) > page.limit else None
    return {name: [one.to_dict() for one in found[: page.limit]], "next_cursor": next_cursor}


def read_page(kind: type[Trade] | type[PlacedOrder], **chosen) -> Sequence:
    """A page of yours whose connection is given back: a client who reads slowly keeps none."""
    with snapshot():
        return kind.page(g.user_id, **chosen)


CSV_COLUMNS = ["id", "run", "timestamp"]
CSV_COLUMNS += [n for n in TradeAnswer.__annotations__ if n not in (*CSV_COLUMNS, "user_id", "dry_run")]


@app.get("/api/v1/trades.csv")
@takes(query=Filters)
def trades_csv(filters: Filters) -> Annotated[Response, "text/csv"]:
    """All your trades that pass the filters, newest first, as CSV."""
    chosen = filters.model_dump() | {"run": filters.run or g.account.run}  # One run from end to end.
    return csv_answer("trades.csv", CSV_COLUMNS, partial(read_page, Trade, **chosen))


@app.get("/api/v1/trades/<id>")
@takes()
def one_trade(id: str) -> TradeAnswer:
    """One of your trades."""
    trade = db.session.get(Trade, int(id)) if re.fullmatch("[0-9]{1,18}", id) else None
    if trade is None or trade.user_id != g.user_id:
        raise Refused("not_found", f"You have no trade {id}.")
    return trade.to_dict()


# Orders that rest.


@app.post("/api/v1/orders")
@takes(NewOrder, order_key=True)
@refuses(*OF_AN_ORDER, "market_is_live")
@drillable
def place_order(asked: NewOrder, order_key: str) -> tuple[OrderAnswer, Literal[201]]:
    """Place an order that may wait: it is filled at once if the market is there already, or else rests.

    What it may cost is held back until it is filled or canceled. With an `Idempotency-Key` it is placed
    once, however often it is sent.
    """
    answer, headers = place(asked, order_key)
    return answer, 201, headers


def place(asked: NewOrder, order_key: str, tell: Callable = PlacedOrder.to_dict) -> tuple[dict, dict]:
    """Place an order, once under its key; what its face tells of it, and the answer's headers."""
    quote = market.look_up(asked.ticker, g.account)  # Before the lock: no locked row waits for Yahoo.

    with transaction(g.user_id):
        account = locked(g.user_id, g.key_hash, asked.ticker, order_key)
        if earlier := earlier_under_key(account):
            return replay(earlier, earlier.is_for(asked), tell)
        quote = quote_for(account, asked.ticker, quote)
        day = market.day(asked.ticker, market.time(account))
        own = {"idempotency_key": order_key, "asked": fingerprint(asked)}
        g.tried = account.place(asked, quote, COSTS, day, **own)
        answer = tell(g.tried)  # Read before it is committed: so it is safe to repeat.

    request.environ["broker.booked"] = f" {g.tried}"
    return answer, {}


@app.patch("/api/v1/orders/<id>")
@takes(ChangedOrder, order_key=True)
@refuses(*OF_AN_ORDER, "not_found", "not_open", "not_replaceable")
def replace_order(changed: ChangedOrder, order_key: str, id: str) -> OrderAnswer:
    """Put a changed order in the place of an open one, in one step.

    It has a new id and `replaces` the old one, whose money and shares are free for it. What the old one
    brought moves on with it, and follows its quantity.
    """
    return replace(id, changed, order_key)


def replace(
    id: str, changed: ChangedOrder, order_key: str, tell: Callable = PlacedOrder.to_dict
) -> tuple[dict, dict]:
    """Replace an order, once under the key; what its face tells of the new one, and the answer's headers."""
    with snapshot():  # Which gives its connection back: none waits for Yahoo.
        old = PlacedOrder.of(g.user_id, id)
    ticker, id, changed = old.ticker, str(old.id), changed.taken(old.action)
    quote = market.look_up(ticker, g.account)

    with transaction(g.user_id):
        account = locked(g.user_id, g.key_hash, ticker, order_key)
        if earlier := earlier_under_key(account):
            return replay(earlier, earlier.is_for(changed, id), tell)
        quote = quote_for(account, ticker, quote)
        order = open_order(id)
        day = market.day(ticker, market.time(account))
        own = {"idempotency_key": order_key, "asked": fingerprint(changed, id)}
        g.tried = account.replace(order, changed, quote, COSTS, day, **own)
        answer = tell(g.tried)

    request.environ["broker.booked"] = f" {g.tried}"
    return answer, {}


def open_order(id: str) -> PlacedOrder:
    """The order of your locked account, if it is not closed."""
    order = PlacedOrder.of(g.user_id, id)
    if not order.is_working:
        raise Refused("not_open", f"Order {id} is {order.status} already.", order_status=order.status)
    return order


@app.delete("/api/v1/orders/<id>")
@takes()
@refuses("not_found", "not_open", "outcome_unknown")
def cancel_order(id: str) -> OrderAnswer:
    """Cancel an open order, and what hangs on it."""
    return cancel(id)[0].to_dict()


def cancel(id: str | None = None) -> list[PlacedOrder]:
    """Cancel that open order of the account, or all of them."""
    with transaction(g.user_id):
        account = locked(g.user_id, g.key_hash)
        orders = [open_order(id)] if id else [o for o in account.orders if o.is_working]
        account.cancel(*orders)
    return orders


@app.delete("/api/v1/orders")
@takes()
@refuses("outcome_unknown")
def cancel_orders() -> CanceledAnswer:
    """Cancel all your open orders."""
    return {"canceled": [order.to_dict() for order in cancel()]}


@app.get("/api/v1/orders")
@takes(query=OrderPage)
def orders(page: OrderPage) -> OrdersAnswer:
    """Your orders of a run, newest first, a page at a time; those that are open, if you ask no others."""
    return page_of("orders", PlacedOrder, page)


@app.get("/api/v1/orders.csv")
@takes(query=OrderFilters)
def orders_csv(filters: OrderFilters) -> Annotated[Response, "text/csv"]:
    """All your orders of a run that pass the filters, newest first, as CSV."""
    chosen = filters.model_dump() | {"run": filters.run or g.account.run}
    columns = list(OrderAnswer.__annotations__)
    return csv_answer("orders.csv", columns, partial(read_page, PlacedOrder, **chosen))


@app.get("/api/v1/orders/<id>")
@takes()
def one_order(id: str) -> OrderAnswer:
    """One of your orders."""
    return PlacedOrder.of(g.user_id, id).to_dict()


# How a bot did, and starting over.


@app.post("/api/v1/account/reset")
@takes(Reset, body_may_miss=True)
@refuses("outcome_unknown")
def reset(start: Reset) -> RunAnswer:
    """Start over: a new run of the account, with `cash` dollars and no holdings.

    The key stays, and so do the trades of earlier runs.
    """
    cash = settings.STARTING_CASH if start.cash is None else start.cash
    with transaction(g.user_id):
        account = locked(g.user_id, g.key_hash)
        account.start_over(cash, market.time(account))
    return {"user_id": g.user_id, "run": account.run, "cash_balance": account.cash_balance}


@app.get("/api/v1/account/history")
@takes(query=HistoryOptions)
@refuses("not_found")
def account_history(options: HistoryOptions) -> HistoryAnswer:
    """How a run went: its equity curve, and figures that sum all of it up.

    A curve has a point for each trade, one for each bar that your clock has passed (on the live market: for
    each day on which this server published a price of what the run trades), and one for now. Past holdings
    are valued at what the market asked then: the recorded bar or the pin of that moment, or the last quote
    published by then. What was passed stays, also when you turn the clock back. `resolution` thins the
    points that are shown and never the figures: `bar` shows all, `day` the last of each of the market's days
    (UTC), `trade` those of trades and of now.
    """
    return history(options.run, options.resolution)


def history(number: int | None, resolution: Resolution) -> HistoryAnswer:
    """How that run went, or without a number the current one."""
    is_current, quotes = number in (None, g.account.run), {}
    for _ in range(3):
        if is_current:
            priced, _, quotes = at_the_market()  # First, as with a price may come a split.
        books = Books.of(g.user_id)
        if not is_current or books.account.updated_at == priced.updated_at:
            break  # Else something was booked in between, for which there is no price.
    account, number = books.account, number or books.account.run
    if number not in books.runs:
        raise Refused("not_found", f"Your account has no run {number}.")
    run, portfolio = books.runs[number], None
    if run is account:
        portfolio = account.portfolio(books.holdings, quotes)
        moment = now()
        market_time = market.time(account, moment)
    else:
        moment, market_time = run.ended_at, run.market_time
    steps = market.replay(books.past(number), moment, market_time)
    return books.history(number, steps, portfolio, resolution)


@app.get("/api/v1/account/audit")
@takes()
def audit() -> AuditAnswer:
    """Whether your books hold: every trade and order replayed from the start, to the last digit."""
    return Books.of(g.user_id).audit(market.has_asked)


BOOKED_BY_ITSELF = (
    "A split multiplies what was held before its day, the cost stays, and open orders follow its ratio.",
    "A dividend is paid in cash for what was held before its day.",
)


@app.get("/api/v1/rules")
@takes()
def rules() -> RulesAnswer:
    """The rules of trading, the costs, limits, scales and price sources in force."""
    return {
        "rules": [
            "A buy's price must be at or above the market price, a sell's at or below it.",
            "A trade is booked at the price that the order names; without one, at the market price.",
            "Cash must cover a buy, the holding a sell: no margin, no short selling.",
            "Only tickers quoted in US dollars trade.",
            "A price that its source saw too long ago, or knows no more, is good for selling only.",
            "A trade is booked in full and at once, or not at all.",
            "An order may rest: what it may cost is held back, and only later prices fill it.",
            "A limit is filled at its limit, a stop at its stop or where the market opens beyond it.",
            *(BOOKED_BY_ITSELF if settings.CORPORATE_ACTIONS else ()),
        ],
        "order_types": list(get_args(OrderType)),
        "costs": vars(COSTS),
        "limits": {
            "order": ORDER_LIMIT,
            "account": ACCOUNT_LIMIT,
            "open_orders": ORDERS_LIMIT,
            "body_bytes": app.config["MAX_CONTENT_LENGTH"],
        },
        "scales": {"quantity": 8, "price": 8, "total_amount": 8, "percent": 2},
        "starting_cash": settings.STARTING_CASH,
        "price_sources": PRICE_SOURCES,
        "price_cache_seconds": BAR_SECONDS if market.is_sample else settings.PRICE_CACHE_SECONDS,
        "corporate_actions": settings.CORPORATE_ACTIONS,
    }


# For whoever runs the server; `admit` lets only the admin's key come here.


@app.post("/api/v1/users")
@takes(NewAccount)
@refuses("already_exists", "outcome_unknown")
def open_account(new: NewAccount) -> tuple[OpenedAccount, Literal[201]]:
    """Open an account and answer its API key, this once."""
    cash = settings.STARTING_CASH if new.cash is None else new.cash
    user_id, api_key = User.open(new.email, cash, new.key)
    return {"user_id": user_id, "email": new.email, "cash_balance": cash, "api_key": api_key}, 201


@app.get("/api/v1/users")
@takes()
def accounts() -> UsersAnswer:
    """Every account, closed ones too."""
    return {"users": [user.to_dict(cash) for user, cash in User.all()]}


@app.post("/api/v1/users/<int(max=9223372036854775807):user_id>/rotate-key")
@takes()
@refuses("not_found", "outcome_unknown")
def new_key(user_id: int) -> NewKey:
    """Give an account a new API key, answered this once; the old one is refused from now on."""
    return {"user_id": user_id, "api_key": User.rotate_key(user_id)}


@app.delete("/api/v1/users/<int(max=9223372036854775807):user_id>")
@takes()
@refuses("not_found", "outcome_unknown")
def close_account(user_id: int) -> ClosedAccount:
    """Close an account: its key is refused from now on, its trades stay."""
    User.close(user_id)
    return {"user_id": user_id, "closed": True}


@app.post("/api/v1/users/<int(max=9223372036854775807):user_id>/corrections")
@takes(Correction, order_key=True)
@refuses(
    *("not_found", "insufficient_funds", "insufficient_shares", "limit_exceeded"),
    *("idempotency_key_reused", "outcome_unknown"),
)
def correct(wanted: Correction, order_key: str, user_id: int) -> tuple[TradeAnswer, Literal[201]]:
    """Change a holding and the cash of an account where no trade can: a share that was renamed, say.

    It is a trade of its own type, which its owner sees with the `reason`. Shares that are added cost nothing,
    those that are taken away take their part of the cost with them.
    """
    g.user_id = user_id
    with snapshot():
        key_hash = User.with_open_account(f"with the id {user_id}", id=user_id).api_key_hash
    if account := Account.with_key(key_hash):
        up_to_date(account)
    with transaction(user_id):
        account = locked(user_id, None, wanted.ticker, order_key)
        if earlier := earlier_under_key(account):
            answer, headers = replay(earlier, earlier.is_for(wanted), Trade.to_dict)
            return answer, 201, headers
        g.tried = account.correct(wanted, market.time(account))
        account.book(g.tried, account.holding(wanted.ticker), order_key)
    request.environ["broker.booked"] = f" {g.tried}"
    return g.tried.to_dict(), 201


@app.get("/")
def dashboard() -> Annotated[Response, "text/html"]:
    """The dashboard: a page to look at an account and to trade by hand."""
    return own_page("index.html")


@app.get("/docs")
def docs() -> Annotated[Response, "text/html"]:
    """The API to read and to try out with your key, in the browser."""
    return own_page("docs.html")


def own_page(file: str) -> Response:
    """One of our pages, which the browser lets speak to this server alone."""
    response = app.send_static_file(file)
    response.headers.update(public.OWN_PAGE)
    return response


# Swagger UI's own files come from its package: /docs asks no other host for anything.
swagger_ui = os.path.join(os.path.dirname(flask_swagger_ui.__file__), "dist")
app.register_blueprint(Blueprint("docs", "app", static_folder=swagger_ui, static_url_path="/docs"))


@app.get("/openapi.json")
@cache
def openapi_json() -> dict:
    """This API as an OpenAPI 3.1 document, made from the program itself."""
    return openapi.Document(app, VERSION).document


@app.get("/alpaca/openapi.json")
@cache
def alpaca_openapi_json() -> dict:
    """What of Alpaca's API is served here, as an OpenAPI 3.1 document."""
    return openapi.AlpacaDocument(app, VERSION).document


# For bots that were written for Alpaca: the same books in its words.
app.extensions["broker"] = alpaca_face.Broker(
    market, drillable(place), replace, cancel, history, at_the_market
)
app.register_blueprint(alpaca_face.face, url_prefix=alpaca_face.PREFIX)
app.register_blueprint(commands)


@app.get("/health")
def health() -> tuple[HealthAnswer, Literal[200, 503]]:
    """Whether the server and its database work, and what this process has seen so far.

    Never waits for a price source, and half a second at the most for the database.
    """
    database = database_health()
    healthy = database["status"] == "healthy"
    started = public.process_started(os.getpid())
    return {
        "status": "healthy" if healthy else "unhealthy",
        "timestamp": now(),
        "version": VERSION,
        "uptime_seconds": round((now() - started).total_seconds()),
        "process": {"pid": os.getpid(), "started_at": started},
        "server_info": public.server_info(),
        "database": database,
        "prices": market.health(),
        "requests": gate.health(),
    }, 200 if healthy else 503


# ---------------------------------------------------------------------------------------- Commands


@app.cli.command("settle", cls=Command)
def settle_all():
    """Show the open orders of every account the prices of now: for a scheduler, as nothing else looks."""
    claim_database()
    failures, found = 0, User.with_open_orders()
    for user in found:
        try:
            account = Account.with_key(user.api_key_hash)
            if account and account.settled_at:  # It may have ended them, or got a new key, meanwhile.
                up_to_date(account, user.api_key_hash)
        except (Refused, DBAPIError, sa.exc.TimeoutError) as error:  # The others are looked at all the same.
            failures += 1
            click.echo(f"User {user.id}: {type(error).__name__}; at the next look, then.", err=True)
    click.echo(f"The open orders of {len(found) - failures} accounts have seen the prices of now.")
    sys.exit(1 if failures else 0)


TEST_USER, TEST_KEY = "test@example.com", "test-api-key-123"


def prepare() -> None:
    """Get the database ready. Only the embedded one is migrated, and given the test user, unasked.

    On a host, which is public, it has no test user either: everybody knows that key.
    """
    if DATABASE_URL == EMBEDDED:
        upgrade()
        if not public.ON_HOST and not Account.with_key(User.hash(TEST_KEY)):
            with suppress(Refused):
                User.open(TEST_USER, settings.STARTING_CASH, TEST_KEY)
    claim_database()


if __name__ == "__main__":
    url = f"http://{settings.HOST}:{settings.PORT}"
    ticker = "AAPL" if not market.is_sample or "AAPL" in market.series else next(iter(market.series))
    serve(
        app,
        settings.HOST,
        settings.PORT,
        prepare,
        f"Serving {', '.join(PRICE_SOURCES)} prices on {url}. Try: "
        f"curl -H 'Authorization: Bearer {TEST_KEY}' {url}/api/v1/price/{ticker}",
    )
