"""The service that one would otherwise write: FastAPI and asyncpg, on the same tables, same guarantees.

It is what bench/compare.py measures the simulator against: an API key's SHA-256 is looked up, an idempotency
key is looked up under the account's lock, the holding is read after the lock, every amount is an exact
Decimal from the request's text to the answer's. It also does what the simulator does for every request: an
id, a line in the log, careful headers, a count against a limit. It has the endpoints of the bench, no others.
"""

import csv
import hashlib
import json
import logging
import os
import platform
import re
import time
from collections import Counter
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal
from secrets import token_hex
from typing import Annotated, Literal

import asyncpg
import psutil
import simplejson
from fastapi import Depends, FastAPI, Header, Request
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field, ValidationError

UNIT, ZERO, EXACT = Decimal("0.00000001"), Decimal(0), Context(prec=60)
Amount = Annotated[Decimal, Field(gt=0, lt=10_000_000_000, decimal_places=8)]
PRICES = {row["ticker"]: Decimal(row["price"]) for row in csv.DictReader(open(os.environ["SAMPLE_MARKET"]))}
STARTED = time.monotonic()
RATE_LIMIT, RATE_SECONDS = 1_000_000_000, 60
CAREFUL = [
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
    (b"cache-control", b"no-store"),
]
asked = Counter()
log = logging.getLogger("twin")
logging.basicConfig(level=logging.INFO, format="%(message)s")


class Gate:
    """The id, the line in the log and the headers of every request."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        started, status = time.perf_counter(), 500
        sent = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        own_id = sent if re.fullmatch("[A-Za-z0-9._:/+=@-]{1,128}", sent) else token_hex(16)

        async def send_more(message):
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                more = scope["state"].get("rate", [])
                message["headers"] = [
                    *message["headers"],
                    *CAREFUL,
                    *more,
                    (b"x-request-id", own_id.encode()),
                ]
            await send(message)

        try:
            await self.app(scope, receive, send_more)
        finally:
            milliseconds = (time.perf_counter() - started) * 1000
            line = f"{scope['method']} {scope['path']} HTTP/{scope['http_version']}"
            booked = scope["state"].get("booked", "")
            address = scope["client"][0]
            log.info(
                "%s %s %s %.1f ms %s [%s]", address, json.dumps(line), status, milliseconds, booked, own_id
            )


class Order(BaseModel):
    model_config = ConfigDict(extra="forbid")

    ticker: str = Field(pattern=r"^[A-Za-z0-9.\-=^]{1,20}$")
    action: Literal["buy", "sell"]
    quantity: Amount
    price: Amount


class Refused(Exception):
    def __init__(self, status: int, code: str, detail: str, **members):
        self.status, self.code, self.detail, self.members = status, code, detail, members


def digits(number: Decimal) -> simplejson.RawJSON:
    text = f"{number:f}"
    return simplejson.RawJSON(text.rstrip("0").rstrip(".") if "." in text else text)


def exact(document, status=200, media_type="application/json", headers=None) -> Response:
    """JSON whose numbers are the Decimals' own digits."""
    content = simplejson.dumps(document, use_decimal=False, default=digits) + "\n"
    return Response(content, status, headers, media_type)


def rounded(amount: Decimal, rounding=None) -> Decimal:
    return amount.quantize(UNIT, rounding, EXACT)


def iso(moment: datetime) -> str:
    return moment.isoformat().replace("+00:00", "Z")


@asynccontextmanager
async def lifespan(app: FastAPI):
    limits = {"lock_timeout": "3s", "statement_timeout": "5s"}
    async with asyncpg.create_pool(os.environ["DATABASE_URL"], server_settings=limits) as app.state.pool:
        yield


app = FastAPI(lifespan=lifespan)
app.add_middleware(Gate)


@app.exception_handler(Refused)
async def refused(request: Request, no: Refused):
    problem = {
        "type": "about:blank",
        "title": no.code,
        "status": no.status,
        "detail": no.detail,
        "code": no.code,
    }
    return exact(problem | no.members, no.status, "application/problem+json")


async def authenticated(request: Request, authorization: Annotated[str, Header()] = "") -> int:
    """The id of the user whose key the request carries."""
    key = hashlib.sha256(authorization.removeprefix("Bearer ").encode()).hexdigest()
    user_id = await request.app.state.pool.fetchval(
        "SELECT id FROM ibkr_users WHERE api_key_hash = $1 AND closed_at IS NULL", key
    )
    if user_id is None:
        raise Refused(401, "unauthorized", "Send your API key: `Authorization: Bearer <key>`.")
    window, past = divmod(int(time.time()), RATE_SECONDS)
    if len(asked) > 10_000:
        asked.clear()
    asked[user_id, window] += 1
    left, rest = RATE_LIMIT - asked[user_id, window], RATE_SECONDS - past
    if left < 0:
        raise Refused(429, "rate_limited", f"Go on in {rest} seconds.", retry_after=rest)
    request.state.rate = [
        (b"ratelimit-limit", b"%d" % RATE_LIMIT),
        (b"ratelimit-remaining", b"%d" % left),
        (b"ratelimit-reset", b"%d" % rest),
    ]
    return user_id


UserId = Annotated[int, Depends(authenticated)]


def market_price(ticker: str) -> Decimal:
    if ticker not in PRICES:
        raise Refused(404, "unknown_ticker", f"There is no ticker {ticker} here.", ticker=ticker)
    return PRICES[ticker]


@app.get("/api/v1/balance")
async def balance(request: Request, user_id: UserId):
    cash = await request.app.state.pool.fetchval(
        "SELECT cash_balance FROM ibkr_balances WHERE user_id = $1", user_id
    )
    return exact({"user_id": user_id, "cash_balance": cash})


@app.get("/api/v1/price/{ticker}")
async def price(ticker: str, user_id: UserId):
    minute = datetime.now(UTC).replace(second=0, microsecond=0)
    quote = {"ticker": ticker.upper(), "price": market_price(ticker.upper()), "currency": "USD"}
    times = {"timestamp": iso(minute), "valid_until": iso(minute + timedelta(minutes=1))}
    return exact(quote | {"source": "sample"} | times)


@app.get("/api/v1/portfolio")
async def portfolio(request: Request, user_id: UserId):
    rows = await request.app.state.pool.fetch(
        """SELECT cash_balance, starting_cash, ticker, quantity, cost_basis
        FROM ibkr_balances LEFT JOIN ibkr_stock_balances USING (user_id)
        WHERE user_id = $1 ORDER BY ticker""",
        user_id,
    )
    minute = iso(datetime.now(UTC).replace(second=0, microsecond=0))
    holdings, cash, start = [], rows[0]["cash_balance"], rows[0]["starting_cash"]
    for row in rows:
        if row["ticker"] is None:
            continue
        quantity, cost, price = row["quantity"], row["cost_basis"], PRICES.get(row["ticker"])
        value = price and rounded(EXACT.multiply(quantity, price), ROUND_FLOOR)
        profit = price and value - cost
        percent = price and cost and EXACT.divide(profit * 100, cost).quantize(Decimal("0.01"), None, EXACT)
        holdings.append(
            {
                "ticker": row["ticker"],
                "quantity": quantity,
                "average_price": rounded(EXACT.divide(cost, quantity)),
                "cost_basis": cost,
                "current_price": price,
                "market_value": value,
                "unrealized_pnl": profit,
                "unrealized_pnl_percent": percent,
                "price_timestamp": minute,
            }
        )
    cost = sum((holding["cost_basis"] for holding in holdings), ZERO)
    values = [holding["market_value"] for holding in holdings]
    value = None if None in values else sum(values, ZERO)
    realized = cash + cost - start
    return exact(
        {
            "user_id": user_id,
            "cash_balance": cash,
            "holdings": holdings,
            "total_invested_value": cost,
            "market_value": value,
            "equity": None if value is None else cash + value,
            "unrealized_pnl": None if value is None else value - cost,
            "realized_pnl": realized,
            "total_pnl": None if value is None else value - cost + realized,
        }
    )


@app.post("/api/v1/trade")
async def trade(
    request: Request, user_id: UserId, idempotency_key: Annotated[str, Header(min_length=1, max_length=255)]
):
    try:
        order = Order.model_validate(json.loads(await request.body(), parse_float=Decimal))
    except (ValidationError, ValueError) as error:
        raise Refused(400, "invalid_request", str(error)) from None
    ticker, quantity, price = order.ticker.upper(), order.quantity, order.price
    asked = market_price(ticker)
    async with request.app.state.pool.acquire() as connection, connection.transaction():
        account = await connection.fetchrow(
            "SELECT cash_balance, run FROM ibkr_balances WHERE user_id = $1 FOR UPDATE", user_id
        )
        earlier = await connection.fetchrow(
            "SELECT * FROM ibkr_trades WHERE user_id = $1 AND idempotency_key = $2", user_id, idempotency_key
        )
        if earlier:
            first = tuple(earlier[name] for name in ("ticker", "trade_type", "quantity", "price"))
            if (ticker, order.action, quantity, price) != first:
                raise Refused(422, "idempotency_key_reused", "This Idempotency-Key belongs to another order.")
            return exact(answer(earlier), headers={"Idempotent-Replayed": "true"})
        held = await connection.fetchrow(
            "SELECT quantity, cost_basis FROM ibkr_stock_balances WHERE user_id = $1 AND ticker = $2",
            user_id,
            ticker,
        )
        had, basis = held or (ZERO, ZERO)
        cash, realized, now = account["cash_balance"], None, datetime.now(UTC)
        if order.action == "buy":
            total = rounded(EXACT.multiply(quantity, price), ROUND_CEILING)
            if price < asked:
                raise Refused(409, "price_below_market", f"You offer {price} and {ticker} costs {asked}.")
            if total > cash:
                raise Refused(409, "insufficient_funds", f"This costs {total} and you have {cash}.")
            cash, left, basis = cash - total, had + quantity, basis + total
        else:
            total = rounded(EXACT.multiply(quantity, price), ROUND_FLOOR)
            if price > asked:
                raise Refused(409, "price_above_market", f"You ask {price} and {ticker} brings {asked}.")
            if quantity > had:
                raise Refused(
                    409, "insufficient_shares", f"This sells {quantity} {ticker} and you have {had}."
                )
            taken = basis if quantity == had else rounded(EXACT.divide(EXACT.multiply(basis, quantity), had))
            cash, left, basis, realized = cash + total, had - quantity, basis - taken, total - taken
        await connection.execute(
            "UPDATE ibkr_balances SET cash_balance = $2, updated_at = $3 WHERE user_id = $1",
            user_id,
            cash,
            now,
        )
        if left:
            await connection.execute(
                """INSERT INTO ibkr_stock_balances (user_id, ticker, quantity, cost_basis, updated_at)
                VALUES ($1, $2, $3, $4, $5) ON CONFLICT (user_id, ticker)
                DO UPDATE SET quantity = $3, cost_basis = $4, updated_at = $5""",
                *(user_id, ticker, left, basis, now),
            )
        else:
            await connection.execute(
                "DELETE FROM ibkr_stock_balances WHERE user_id = $1 AND ticker = $2", user_id, ticker
            )
        booked = await connection.fetchrow(
            """INSERT INTO ibkr_trades (user_id, run, ticker, trade_type, order_type, quantity, price,
                total_amount, commission, realized_pnl, cash_after, market_price, price_source,
                idempotency_key, market_time, created_at)
            VALUES ($1, $2, $3, $4, 'limit', $5, $6, $7, 0, $8, $9, $10, 'sample', $11, $12, $12)
            RETURNING *""",
            *(user_id, account["run"], ticker, order.action, quantity, price, total),
            *(realized, cash, asked, idempotency_key, now),
        )
    request.state.booked = (
        f"trade {booked['id']}: user {user_id} {order.action} {quantity} {ticker} at {price}"
    )
    return exact(answer(booked))


def answer(row: asyncpg.Record) -> dict:
    shown = (
        "user_id",
        "ticker",
        "trade_type",
        "quantity",
        "price",
        "total_amount",
        "commission",
        "realized_pnl",
    )
    return {
        "id": str(row["id"]),
        **{name: row[name] for name in shown},
        "cash_balance": row["cash_after"],
        "market_price": row["market_price"],
        "price_source": row["price_source"],
        "timestamp": iso(row["created_at"]),
        "run": row["run"],
    }


@app.get("/health")
async def health(request: Request):
    started = time.perf_counter()
    await request.app.state.pool.fetchval("SELECT 1", timeout=0.5)
    latency = round((time.perf_counter() - started) * 1000, 2)
    memory = psutil.virtual_memory()
    return {
        "status": "healthy",
        "timestamp": iso(datetime.now(UTC)),
        "uptime_seconds": round(time.monotonic() - STARTED),
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
        "database": {"status": "healthy", "engine": "postgresql", "latency_ms": latency},
    }
