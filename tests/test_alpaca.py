"""Programs written for Alpaca run unchanged but for their URL, and what they do is in the same books.

The clients are the real ones: alpaca-py here, and alpaca-trade-api, whose requirements contradict the
broker's own, in an environment of its own. What they are told is compared with what the native face says.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from tempfile import TemporaryDirectory
from uuid import uuid4
from zoneinfo import ZoneInfo

import pytest
import requests
from alpaca.common.exceptions import APIError
from alpaca.data import historical
from alpaca.data import requests as wanted
from alpaca.data.timeframe import TimeFrame, TimeFrameUnit
from alpaca.trading.client import TradingClient
from alpaca.trading.requests import (
    ClosePositionRequest,
    GetAssetsRequest,
    GetCalendarRequest,
    GetOrdersRequest,
    GetPortfolioHistoryRequest,
    LimitOrderRequest,
    MarketOrderRequest,
    ReplaceOrderRequest,
    StopLimitOrderRequest,
    StopLossRequest,
    StopOrderRequest,
    TakeProfitRequest,
    TrailingStopOrderRequest,
)
from cast import ROOT, Here, Server, Trader, exact, loaded
from standins import MarketStandIn

JUNE = "2012-06-01T00:00:00Z"
NEW_YORK = ZoneInfo("America/New_York")


def url_of(trader: Trader) -> str:
    return f"{trader.server.url}/alpaca"


def trading_as(trader: Trader) -> TradingClient:
    return TradingClient("any", trader.key, url_override=url_of(trader))


def ask(trader: Trader, method: str, path: str, **options) -> requests.Response:
    return trader.session.request(method, f"{url_of(trader)}{path}", timeout=60, **options)


def stop_clock(trader: Trader, at: str = JUNE) -> None:
    assert trader.ask("PUT", "/api/v1/market/clock", json={"at": at}).status_code == 200


@pytest.fixture
def carla(alice) -> Trader:
    """Alice, whose clock stands in June 2012."""
    stop_clock(alice)
    return alice


@pytest.fixture
def trading(carla) -> TradingClient:
    return trading_as(carla)


@pytest.fixture
def stocks(carla):
    return historical.StockHistoricalDataClient("any", carla.key, url_override=url_of(carla))


@pytest.fixture
def coins(carla):
    return historical.CryptoHistoricalDataClient("any", carla.key, url_override=url_of(carla))


def native(trader: Trader, order) -> dict:
    """The order as the broker's own face tells it."""
    return trader.get(f"/api/v1/orders/{order.id.int & (1 << 48) - 1}")


def amount(text) -> Decimal | None:
    return None if text is None else Decimal(text)


def is_the_same(order, told: dict) -> bool:
    """Whether an order of alpaca-py's says what the native face says, to the last digit."""
    names = {"qty": "quantity", "limit_price": "limit_price", "stop_price": "stop_price"}
    names |= {"trail_percent": "trail_percent", "trail_price": "trail_amount", "filled_avg_price": "price"}
    here = {name: amount(getattr(order, name)) for name in names}
    status = {"open": "new"}.get(told["status"], told["status"])
    words = (order.side.value, order.type.value, order.time_in_force.value, order.status.value)
    return here == {name: told[other] for name, other in names.items()} and words == (
        told["action"], told["order_type"], told["time_in_force"], status,
    )  # fmt: skip


# Who asks


def test_the_key_comes_as_a_secret_a_bearer_or_a_password(carla):
    stop = {"url_override": url_of(carla)}
    ways = [
        TradingClient("any", carla.key, **stop),
        TradingClient(oauth_token=carla.key, **stop),
        TradingClient("any", carla.key, url_override=f"{url_of(carla)}/"),
    ]
    assert {client.get_account().account_number for client in ways} == {f"SIM{carla.user_id:09}"}
    basic = historical.StockHistoricalDataClient("any", carla.key, use_basic_auth=True, **stop)
    asked = wanted.StockLatestQuoteRequest(symbol_or_symbols="AAPL")
    assert list(basic.get_stock_latest_quote(asked)) == ["AAPL"]


@pytest.mark.parametrize(
    "headers",
    [{}, {"APCA-API-SECRET-KEY": "wrong-key"}, {"Authorization": "Basic !"}, {"APCA-API-KEY-ID": "k"}],
)
def test_a_wrong_key_is_told_so_in_alpacas_words(server, headers):
    answer = requests.get(f"{server.url}/alpaca/v2/account", headers=headers, timeout=60)
    assert answer.status_code == 401
    assert answer.json() == {
        "code": 40110000, "message": "Send your API key as APCA-API-SECRET-KEY.", "problem": "unauthorized",
    }  # fmt: skip
    assert answer.headers["Content-Type"] == "application/json"


def test_coins_are_priced_for_everybody_and_shares_are_not(server):
    coins = historical.CryptoHistoricalDataClient(url_override=f"{server.url}/alpaca")
    asked = wanted.CryptoBarsRequest(
        symbol_or_symbols=["BTC/USD"], timeframe=TimeFrame.Day, start=datetime.now(UTC) - timedelta(days=9)
    )
    assert len(coins.get_crypto_bars(asked)["BTC/USD"]) == 9
    assert requests.get(f"{server.url}/alpaca/v2/stocks/bars?symbols=AAPL", timeout=60).status_code == 401
    wrong = {"APCA-API-SECRET-KEY": "wrong-key"}
    path = "/alpaca/v1beta3/crypto/us/latest/quotes?symbols=BTC/USD"
    assert requests.get(server.url + path, headers=wrong, timeout=60).status_code == 401


def test_answers_have_the_headers_of_the_native_face(carla):
    answer = ask(carla, "GET", "/v2/account")
    assert {"X-Request-Id", "RateLimit-Limit", "RateLimit-Remaining"} <= set(answer.headers)
    assert answer.headers["Cache-Control"] == "no-store"


# The account


def test_the_account_says_what_the_books_say(carla, trading):
    carla.buys("33.33333333", "AAPL")
    trading.submit_order(
        LimitOrderRequest(symbol="IBM", qty=10, side="buy", time_in_force="gtc", limit_price=9)
    )
    account, balance, portfolio = trading.get_account(), carla.get("/api/v1/balance"), carla.portfolio
    assert amount(account.cash) == balance["cash_balance"]
    assert amount(account.buying_power) == balance["buying_power"] == balance["cash_balance"] - 90
    assert amount(account.equity) == amount(account.portfolio_value) == portfolio["equity"]
    assert amount(account.long_market_value) == portfolio["market_value"]
    assert (account.status.value, account.multiplier, account.shorting_enabled) == ("ACTIVE", "1", False)
    yesterday = carla.get("/api/v1/bars/AAPL", end=JUNE, limit=1)["bars"][0]["close"]
    today = carla.get("/api/v1/price/AAPL")["price"]
    change = (Decimal("33.33333333") * (today - yesterday)).quantize(Decimal("1e-8"))
    assert amount(account.equity) - amount(account.last_equity) == change


def test_a_position_says_what_the_portfolio_says(carla, trading):
    carla.buys("2.5", "AAPL").get("id")
    carla.sees("AAPL", "700.25")
    (held,), (told,) = trading.get_all_positions(), carla.portfolio["holdings"]
    names = {"qty": "quantity", "qty_available": "available_quantity", "avg_entry_price": "average_price"}
    names |= {"cost_basis": "cost_basis", "market_value": "market_value", "current_price": "current_price"}
    names |= {"unrealized_pl": "unrealized_pnl"}
    assert {name: amount(getattr(held, name)) for name in names} == {n: told[o] for n, o in names.items()}
    part = told["unrealized_pnl"] / told["cost_basis"]
    assert amount(held.unrealized_plpc) == part.quantize(Decimal("1e-8"))
    assert (held.symbol, held.side.value, held.exchange.value) == ("AAPL", "long", "NASDAQ")
    assert trading.get_open_position(held.asset_id) == held == trading.get_open_position("AAPL")


@pytest.mark.parametrize("spelling", ["BTC/USD", "BTCUSD", "BTC-USD", "btc/usd"])
def test_a_coin_is_one_however_it_is_spelt(carla, trading, spelling):
    order = trading.submit_order(
        MarketOrderRequest(symbol=spelling, notional=1000, side="buy", time_in_force="gtc")
    )
    assert order.symbol == "BTC/USD"
    assert list(carla.holdings) == ["BTC-USD"]
    held = trading.get_open_position(spelling)
    assert (held.symbol, held.exchange.value, held.asset_class.value) == ("BTCUSD", "CRYPTO", "crypto")
    assert trading.get_asset(spelling).id == held.asset_id == order.asset_id
    assert trading.get_asset(str(held.asset_id)).symbol == "BTC/USD"
    assert [o.id for o in trading.get_orders(GetOrdersRequest(status="all", symbols=[spelling]))] == [
        order.id
    ]
    assert trading.close_position(spelling).qty == held.qty
    assert carla.holdings == {}


def test_the_assets_are_those_that_are_recorded(carla, trading):
    coins = trading.get_all_assets(GetAssetsRequest(asset_class="crypto", status="active"))
    assert {asset.symbol for asset in coins} >= {"BTC/USD", "DOGE/USD"}
    shares = trading.get_all_assets(GetAssetsRequest(asset_class="us_equity"))
    assert len(coins) + len(shares) == len(carla.get("/api/v1/market")["tickers"])
    aapl = next(asset for asset in shares if asset.symbol == "AAPL")
    assert (aapl.tradable, aapl.fractionable, aapl.shortable, aapl.marginable) == (True, True, False, False)
    assert trading.get_all_assets(GetAssetsRequest(status="inactive")) == []


def test_the_market_is_always_open_and_its_days_are_weekdays(carla, trading):
    clock = trading.get_clock()
    assert clock.is_open
    assert abs(clock.timestamp - datetime.now(UTC)) < timedelta(minutes=1)
    assert clock.next_close > clock.timestamp
    assert clock.next_close.astimezone(NEW_YORK).hour == 16
    days = trading.get_calendar(GetCalendarRequest(start=date(2012, 6, 1), end=date(2012, 6, 30)))
    assert [day.date.day for day in days[:3]] == [1, 4, 5]
    assert len(days) == 21
    assert (days[0].open.hour, days[0].close.hour) == (9, 16)


def test_configurations_are_what_they_are(trading):
    before = trading.get_account_configurations()
    assert before.no_shorting
    before.no_shorting = False
    assert trading.set_account_configurations(before).no_shorting


def test_fills_are_activities(carla, trading):
    for quantity in (1, 2, 3):
        carla.buys(quantity, "AAPL")
    order = trading.submit_order(MarketOrderRequest(symbol="AAPL", qty=4, side="sell", time_in_force="day"))
    fills = trading.get("/account/activities", {"activity_types": "FILL"})
    assert [fill["qty"] for fill in fills] == ["4", "3", "2", "1"]
    assert fills[0]["order_id"] == str(order.id)
    assert Decimal(fills[0]["price"]) == carla.trades[0]["price"]
    for direction, quantities in {"desc": ["4", "3", "2", "1"], "asc": ["1", "2", "3", "4"]}.items():
        page = {"direction": direction, "page_size": 3}
        first = trading.get("/account/activities/FILL", page)
        rest = trading.get("/account/activities/FILL", page | {"page_token": first[-1]["id"]})
        assert [fill["qty"] for fill in first + rest] == quantities
    assert ask(carla, "GET", "/v2/account/activities?page_token=nonsense").status_code == 422
    assert trading.get("/account/activities/DIV") == []


def test_the_portfolio_history_ends_with_the_equity_of_now(carla, trading):
    start = datetime.now(UTC)
    for bars in (1, 5, 5):
        carla.buys(10, "AAPL")
        carla.ask("POST", "/api/v1/market/advance", json={"bars": bars})
    history = trading.get_portfolio_history(GetPortfolioHistoryRequest(period="1M"))
    assert history.equity[-1] == float(carla.portfolio["equity"])
    assert history.base_value == 100_000
    assert history.timestamp == sorted(set(history.timestamp))
    assert start.timestamp() - 1 <= history.timestamp[-1] <= datetime.now(UTC).timestamp()
    assert len(history.equity) >= 4
    assert [round(p, 6) for p in history.profit_loss] == [round(e - 100_000, 6) for e in history.equity]


# Orders


def every_order(price: Decimal) -> dict:
    """One order of each kind, by what becomes of it where the market is at `price`."""
    aapl, gtc = {"symbol": "AAPL", "time_in_force": "gtc"}, {"time_in_force": "gtc"}
    low, high = round(float(price) * 0.9, 2), round(float(price) * 1.1, 2)
    gain, loss = TakeProfitRequest(limit_price=high), StopLossRequest(stop_price=low, limit_price=low - 1)
    buys, sells = aapl | {"qty": 1, "side": "buy"}, aapl | {"qty": 1, "side": "sell"}
    return {
        "a fractional market order": MarketOrderRequest(**buys | {"qty": 100 / 3, "time_in_force": "day"}),
        "a notional one": MarketOrderRequest(**aapl, notional=25.5, side="buy"),
        "a notional sale": MarketOrderRequest(**aapl, notional=10.01, side="sell"),
        "a marketable limit": LimitOrderRequest(**buys, limit_price=high),
        "a limit that rests": LimitOrderRequest(**buys | {"qty": 0.1 + 0.2}, limit_price=low),
        "a limit that is killed": LimitOrderRequest(**buys | {"time_in_force": "ioc"}, limit_price=low),
        "fill or kill": LimitOrderRequest(**buys | {"time_in_force": "fok"}, limit_price=high),
        "a stop": StopOrderRequest(**buys, stop_price=high),
        "a stop that sells": StopOrderRequest(**sells, stop_price=low),
        "a stop limit": StopLimitOrderRequest(**sells, stop_price=low, limit_price=low - 1),
        "a trailing stop in percent": TrailingStopOrderRequest(**sells, trail_percent=2.5),
        "a trailing stop in dollars": TrailingStopOrderRequest(**sells, trail_price=3.3),
        "a bracket": MarketOrderRequest(**buys, order_class="bracket", take_profit=gain, stop_loss=loss),
        "a bracket that rests": LimitOrderRequest(
            **buys, limit_price=low + 1, order_class="bracket", take_profit=gain, stop_loss=loss
        ),
        "one that triggers another": MarketOrderRequest(**buys, order_class="oto", stop_loss=loss),
        "one that cancels the other": LimitOrderRequest(
            **aapl, qty=1, side="sell", order_class="oco", take_profit=gain, stop_loss=loss
        ),
        "a coin": MarketOrderRequest(symbol="BTC/USD", qty=0.1, side="buy", **gtc),
    }


def test_every_kind_of_order_is_in_the_books_as_it_was_asked_for(carla, trading):
    orders = every_order(carla.get("/api/v1/price/AAPL")["price"])
    for kind, asked in orders.items():
        placed = trading.submit_order(asked)
        assert is_the_same(placed, native(carla, placed)), kind
        assert trading.get_order_by_id(placed.id) == placed
        assert trading.get_order_by_client_id(placed.client_order_id) == placed
        orders[kind] = placed
    assert orders["a fractional market order"].qty == "33.33333333"
    assert orders["a limit that rests"].qty == "0.3"
    assert orders["a marketable limit"].filled_avg_price == str(carla.get("/api/v1/price/AAPL")["price"])
    assert orders["a limit that is killed"].status.value == "canceled"
    assert orders["a limit that rests"].status.value == "new"
    bracket = orders["a bracket that rests"]
    assert [(leg.type.value, leg.status.value) for leg in bracket.legs] == [
        ("limit", "held"),
        ("stop_limit", "held"),
    ]
    classes = {"a bracket": ("bracket", 2), "one that triggers another": ("oto", 1), "a coin": ("simple", 0)}
    classes |= {"one that cancels the other": ("oco", 1)}
    for kind, (name, count) in classes.items():
        assert (orders[kind].order_class.value, len(orders[kind].legs or [])) == (name, count)
        for leg in orders[kind].legs or []:
            assert is_the_same(leg, native(carla, leg)), kind
            assert trading.get_order_by_id(leg.id).order_class.value == name
    assert carla.audit()["ok"]


def test_orders_are_listed_as_they_are_filtered(carla, trading):
    for symbol, side, price in (("AAPL", "buy", 9), ("IBM", "buy", 9), ("AAPL", "buy", 8)):
        trading.submit_order(
            LimitOrderRequest(symbol=symbol, qty=1, side=side, time_in_force="gtc", limit_price=price)
        )
    done = trading.submit_order(MarketOrderRequest(symbol="AAPL", qty=2, side="buy", time_in_force="day"))
    sale = trading.submit_order(MarketOrderRequest(symbol="AAPL", qty=2, side="sell", time_in_force="day"))

    def listed(**filters) -> list:
        return [
            (order.symbol, order.qty, order.limit_price)
            for order in trading.get_orders(GetOrdersRequest(**filters))
        ]

    resting = [("AAPL", "1", "8"), ("IBM", "1", "9"), ("AAPL", "1", "9")]
    assert listed() == listed(status="open") == resting
    assert listed(direction="asc") == resting[::-1]
    assert listed(symbols=["IBM"]) == resting[1:2]
    assert listed(limit=2) == resting[:2]
    assert listed(status="closed") == [("AAPL", "2", None)] * 2
    assert [o.id for o in trading.get_orders(GetOrdersRequest(status="all", side="sell"))] == [sale.id]
    assert len(listed(status="all")) == 5
    assert listed(status="all", until=done.submitted_at) == resting
    assert listed(status="all", after=done.submitted_at) == [("AAPL", "2", None)]


def test_legs_are_nested_where_that_is_asked_and_never_hidden(trading):
    asked = MarketOrderRequest(
        symbol="AAPL", qty=1, side="buy", time_in_force="gtc", order_class="bracket",
        take_profit=TakeProfitRequest(limit_price=900), stop_loss=StopLossRequest(stop_price=1),
    )  # fmt: skip
    bracket = trading.submit_order(asked)
    flat = trading.get_orders(GetOrdersRequest(status="all"))
    assert {order.id for order in flat} == {bracket.id, *(leg.id for leg in bracket.legs)}
    assert all(order.legs is None for order in flat)
    assert trading.get_orders(GetOrdersRequest(status="all", nested=True)) == [bracket]
    still_open = trading.get_orders(GetOrdersRequest(status="open", nested=True))
    assert {order.id for order in still_open} == {leg.id for leg in bracket.legs}


def test_an_order_is_replaced_and_canceled(carla, trading):
    asked = LimitOrderRequest(symbol="AAPL", qty=1, side="buy", time_in_force="gtc", limit_price=9)
    old = trading.submit_order(asked)
    new = trading.replace_order_by_id(
        old.id, ReplaceOrderRequest(qty=2, limit_price=8.5, client_order_id="new")
    )
    old = trading.get_order_by_id(old.id)
    assert (new.qty, new.limit_price, new.replaces, new.client_order_id) == ("2", "8.5", old.id, "new")
    assert (old.status.value, old.replaced_by) == ("replaced", new.id)
    assert is_the_same(new, native(carla, new))
    trading.cancel_order_by_id(new.id)
    assert trading.get_order_by_id(new.id).status.value == "canceled"
    for again in (
        trading.cancel_order_by_id,
        lambda id: trading.replace_order_by_id(id, ReplaceOrderRequest(qty=3)),
    ):
        with pytest.raises(APIError) as refusal:
            again(new.id)
        assert (refusal.value.status_code, json.loads(str(refusal.value))["problem"]) == (422, "not_open")


def test_what_cannot_be_replaced_says_so(trading):
    trading.submit_order(MarketOrderRequest(symbol="AAPL", qty=1, side="buy", time_in_force="day"))
    asked = TrailingStopOrderRequest(symbol="AAPL", qty=1, side="sell", time_in_force="gtc", trail_percent=5)
    trailing = trading.submit_order(asked)
    with pytest.raises(APIError) as refusal:
        trading.replace_order_by_id(trailing.id, ReplaceOrderRequest(trail=3))
    assert refusal.value.status_code == 422
    assert "cancel the order and place another" in refusal.value.message


def test_all_orders_are_canceled_at_once(carla, trading):
    for price in (7, 8, 9):
        trading.submit_order(
            LimitOrderRequest(symbol="AAPL", qty=1, side="buy", time_in_force="gtc", limit_price=price)
        )
    canceled = trading.cancel_orders()
    assert [answer.status for answer in canceled] == [200] * 3
    assert trading.get_orders() == []
    assert carla.get("/api/v1/orders")["orders"] == []
    assert {o.status.value for o in trading.get_orders(GetOrdersRequest(status="closed"))} == {"canceled"}


def test_a_position_is_closed_in_part_and_in_whole(carla, trading):
    carla.buys(10, "AAPL")
    assert trading.close_position("AAPL", ClosePositionRequest(percentage="33.3")).qty == "3.33"
    assert trading.close_position("AAPL", ClosePositionRequest(qty="0.67")).qty == "0.67"
    assert carla.holdings["AAPL"][0] == 6
    closing = trading.close_position("AAPL")
    assert (closing.qty, closing.side.value, closing.status.value) == ("6", "sell", "filled")
    assert is_the_same(closing, native(carla, closing))
    assert carla.holdings == {}
    with pytest.raises(APIError) as refusal:
        trading.close_position("AAPL")
    assert (refusal.value.status_code, refusal.value.code) == (404, 40410000)
    assert carla.audit()["ok"]


def test_all_positions_are_closed_and_each_says_what_came_of_it(carla, trading):
    for ticker in ("AAPL", "IBM", "BTC-USD"):
        carla.buys(2, ticker)
    sale = LimitOrderRequest(symbol="IBM", qty=2, side="sell", time_in_force="gtc", limit_price=999)
    trading.submit_order(sale)
    told = {item.symbol: item for item in trading.close_all_positions()}
    assert {symbol: item.status for symbol, item in told.items()} == {"AAPL": 200, "BTCUSD": 200, "IBM": 403}
    assert told["IBM"].body.message.startswith("You have no IBM to sell")
    assert list(carla.holdings) == ["IBM"]
    (last,) = trading.close_all_positions(cancel_orders=True)
    assert (last.status, last.body.qty, last.body.status.value) == (200, "2", "filled")
    assert carla.holdings == {}
    assert trading.close_all_positions() == []
    assert carla.audit()["ok"]


def test_a_client_order_id_is_placed_once_whoever_asks(carla, trading):
    asked = MarketOrderRequest(symbol="AAPL", qty=1, side="buy", time_in_force="day", client_order_id="mine")
    first = trading.submit_order(asked)
    assert trading.submit_order(asked) == first
    assert len(carla.trades) == 1
    same = {"ticker": "AAPL", "action": "buy", "quantity": 1, "order_type": "market", "time_in_force": "day"}
    again = carla.ask("POST", "/api/v1/orders", json=same, headers={"Idempotency-Key": "mine"})
    assert (again.json()["id"], again.headers["Idempotent-Replayed"]) == (native(carla, first)["id"], "true")
    asked.qty = 2
    with pytest.raises(APIError) as refusal:
        trading.submit_order(asked)
    assert refusal.value.status_code == 422
    assert refusal.value.message.startswith("This client_order_id belongs to order ")
    placed = carla.ask("POST", "/api/v1/orders", json=same, headers={"Idempotency-Key": "theirs"}).json()
    assert trading.get_order_by_client_id("theirs").id.int & (1 << 48) - 1 == int(placed["id"])


# Errors

REFUSED = {
    "insufficient funds": ({"qty": 1e6}, "insufficient_funds", "This costs "),
    "insufficient shares": ({"side": "sell"}, "insufficient_shares", "This sells 1 AAPL and you have 0"),
    "an unknown symbol": ({"symbol": "NOPE"}, "unknown_ticker", "There is no ticker NOPE"),
    "an option": ({"symbol": "AAPL240119C00100000"}, "invalid_request", "symbol: options are not"),
    "an auction": ({"time_in_force": "opg"}, "invalid_request", "order: there are no auctions"),
    "a short sale": (
        {"position_intent": "sell_to_open", "side": "sell"},
        *("invalid_request", "order: nothing is sold short"),
    ),
    "a bracket that sells": (
        {"side": "sell", "order_class": "bracket"}
        | {"take_profit": {"limit_price": 1}, "stop_loss": {"stop_price": 900}},
        *("invalid_request", "order: a sale brings nothing but a stop_loss"),
    ),
    "no size": ({"qty": None}, "invalid_request", "order: give either"),
    "a size of nothing": ({"qty": 0}, "invalid_request", "qty: must be above 0"),
    "no such type": ({"type": "twap"}, "invalid_request", "type: Input should be"),
    "a trail of nothing": (
        {"type": "trailing_stop", "trail_price": 0},
        *("invalid_request", "trail_price: must be"),
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_a_refusal_is_one_that_the_client_can_read(carla, trading, reason):
    change, problem, sentence = REFUSED[reason]
    status = 403 if problem.startswith("insufficient") else 422
    before = carla.books
    with pytest.raises(APIError) as refusal:
        trading.post("/orders", {"symbol": "AAPL", "qty": 1, "side": "buy", "time_in_force": "day"} | change)
    error = refusal.value
    told = json.loads(str(error))["problem"]
    assert (error.status_code, error.code, told) == (status, status * 100_000 + 10_000, problem)
    assert error.message.startswith(sentence)
    assert carla.books == before


def test_what_is_not_there_is_404(trading):
    for path in (
        f"/orders/{uuid4()}",
        "/orders/17",
        "/positions/AAPL",
        "/assets/NOPE",
        "/watchlists",
        "/nothing",
    ):
        with pytest.raises(APIError) as refusal:
            trading.get(path)
        assert (refusal.value.status_code, refusal.value.code) == (404, 40410000), path
        assert refusal.value.message


def sloppy(key_of_another: str) -> dict[str, list]:
    """Values that no client should send, for a query or a body."""
    words = [
        "",
        " ",
        "0",
        "-1",
        "1e999",
        "NaN",
        "Infinity",
        "999999999999999999999",
        "null",
        "'; DROP TABLE x",
    ]
    words += [
        "\x00",
        "\ud7ff",
        "AAPL,,IBM",
        "a" * 150,
        "../../etc",
        "BTC/USD/EUR",
        "2012-13-45",
        "9999-12-31",
    ]
    words += [
        "0001-01-01T00:00:00Z",
        "2012-06-01T00:00:00+25:00",
        "1.1.1",
        "99999999.9999999999999999",
        key_of_another,
    ]
    others = [
        None,
        True,
        0,
        -5,
        1e300,
        1e-300,
        [],
        {},
        [[[]]],
        {"limit_price": []},
        [1, "2"],
        {"a": {"b": 1}},
    ]
    return {"words": words, "others": others}


NAMES = ["symbols", "timeframe", "start", "end", "limit", "page_token", "sort", "status", "after", "until"]
NAMES += ["direction", "nested", "side", "qty", "percentage", "cancel_orders", "activity_types", "date"]
NAMES += ["page_size", "period", "client_order_id", "asset_class"]
MEMBERS = ["symbol", "qty", "notional", "side", "type", "time_in_force", "limit_price", "stop_price"]
MEMBERS += [
    "trail_percent",
    "trail_price",
    "trail",
    "order_class",
    "take_profit",
    "stop_loss",
    "client_order_id",
]
MEMBERS += ["position_intent", "extended_hours"]
BODIES = [
    b"",
    b"{",
    b"[]",
    b"null",
    b"1",
    b'"x"',
    b'{"qty":NaN}',
    b"\xff\xfe",
    b'{"symbol":"AAPL","symbol":"IBM"}',
]
BODIES += [b'{"a":' * 2000]
ORDER = {
    "symbol": "AAPL",
    "qty": "1",
    "side": "buy",
    "type": "limit",
    "limit_price": "1",
    "time_in_force": "day",
}


def routes(app) -> list[tuple[str, str]]:
    """Every route of this face, with a method."""
    return sorted(
        (method, rule.rule.removeprefix("/alpaca"))
        for rule in app.app.url_map.iter_rules()
        for method in rule.methods - {"HEAD", "OPTIONS"}
        if rule.endpoint.startswith("alpaca.")
    )


def filled_in(path: str, value: str) -> str:
    """A route's path with a `value` for each of its parts."""
    for part in ("<path:symbol>", "<symbol>", "<id>", "<activity>"):
        path = path.replace(part, value)
    for kinds in ("<any(bars, quotes, trades):kind>", "<any(bars, quotes, trades, orderbooks):kind>"):
        path = path.replace(kinds, "bars")
    return path


def is_in_alpacas_shape(answer: requests.Response) -> bool:
    if answer.ok:
        return True
    told = answer.json()
    return (
        answer.status_code < 500
        and told["code"] == answer.status_code * 100_000 + 10_000
        and isinstance(told["message"], str)
        and bool(told["message"])
        and isinstance(told["problem"], str)
        and answer.headers["Content-Type"] == "application/json"
    )


def test_no_request_however_sloppy_meets_a_fault_or_an_error_of_another_shape(app, engine_name, alice, bob):
    """Each word is tried on one of the two databases: which it is makes no difference to how it is read."""
    stop_clock(alice)
    stop_clock(bob)
    alice.buys(1, "AAPL")
    placed = ask(bob, "POST", "/v2/orders", json=ORDER).json()["id"]
    values, wrong, count = sloppy(placed), [], 0
    values["words"] = values["words"][engine_name == "sqlite" :: 2]

    def tried(method: str, path: str, **options) -> None:
        nonlocal count
        answer, count = ask(alice, method, path, **options), count + 1
        if not is_in_alpacas_shape(answer):
            wrong.append((method, path, str(options)[:200], answer.status_code, answer.text[:200]))

    for method, route in routes(app):
        path = filled_in(route, "AAPL")
        for word in values["words"]:
            if path != filled_in(route, "x"):
                tried(method, filled_in(route, requests.utils.quote(word, safe="/")))
            tried(method, path, params=dict.fromkeys(NAMES, word))
        for number, name in enumerate(NAMES):
            for word in values["words"][number % 5 :: 5]:
                tried(method, path, params={"symbols": "AAPL", name: word})
        tried("PUT", path)
        if method in ("POST", "PATCH"):
            for body in BODIES:
                tried(method, path, data=body, headers={"Content-Type": "application/json"})
            tried(method, path, data=ORDER)
            for number, name in enumerate(MEMBERS):
                for value in values["words"][number % 3 :: 3] + values["others"]:
                    tried(method, path, json=ORDER | {name: value})
    assert not wrong, f"{len(wrong)} of {count}: {wrong[:5]}"
    assert count > 50 * len(routes(app)) / 2
    assert trading_as(bob).get_order_by_id(placed).status.value == "new"
    assert alice.audit()["ok"]


def test_a_body_that_is_too_large_and_a_method_that_is_none_have_alpacas_shape_too(carla):
    form = ask(carla, "POST", "/v2/orders", data={"symbol": "AAPL"})
    method = ask(carla, "PUT", "/v2/account")
    large = ask(carla, "POST", "/v2/orders", data=b" " * 70_000, headers={"Content-Type": "application/json"})
    for answer, status, problem in (
        (large, 413, "too_large"), (form, 415, "unsupported_media_type"), (method, 405, "method_not_allowed"),
    ):  # fmt: skip
        assert (answer.status_code, answer.json()["code"], answer.json()["problem"]) == (
            status,
            status * 100_000 + 10_000,
            problem,
        )
    assert "GET" in method.headers["Allow"]


def test_a_fault_of_ours_and_too_many_requests_have_alpacas_shape_too(alice, monkeypatch):
    with loaded(
        DATABASE_URL=alice.server.database_url, PRICE_SOURCES="sample", RATE_LIMIT="2 per minute"
    ) as program:
        client, key = program["app"].test_client(), {"APCA-API-SECRET-KEY": alice.key}
        monkeypatch.setattr(type(program["market"]), "quotes", lambda *_: 1 / 0)
        answers = [client.get(f"/alpaca/v2/{path}", headers=key) for path in ("positions", "clock", "clock")]
        fault, fine, limited = [(answer.status_code, json.loads(answer.text)) for answer in answers]
        assert fault[0] == 500
        assert (fault[1]["code"], fault[1]["problem"]) == (50010000, "internal_error")
        assert fine[0] == 200
        assert (limited[0], limited[1]["code"], limited[1]["problem"]) == (429, 42910000, "rate_limited")
        assert int(answers[2].headers["Retry-After"]) > 0
        with program["app"].app_context():
            program["db"].engine.dispose()


# Bars


def bars_of(stocks, symbols="AAPL", timeframe=TimeFrame.Day, **options) -> dict:
    asked = wanted.StockBarsRequest(symbol_or_symbols=symbols, timeframe=timeframe, **options)
    return stocks.get_stock_bars(asked).data


def days_ago(days: int) -> datetime:
    return datetime.now(UTC) - timedelta(days=days)


def recorded(trader: Trader, count: int, ticker="AAPL", timeframe="1d") -> list[dict]:
    return trader.get(f"/api/v1/bars/{ticker}", limit=count, timeframe=timeframe)["bars"]


def ohlcv(bars) -> list[tuple]:
    return [(bar.open, bar.high, bar.low, bar.close, bar.volume) for bar in bars]


def ohlcv_of(bars: list[dict]) -> list[tuple]:
    return [tuple(float(bar[name]) for name in ("open", "high", "low", "close", "volume")) for bar in bars]


def today() -> date:
    """The last weekday in New York."""
    day = datetime.now(NEW_YORK).date()
    return day - timedelta(days=max(day.weekday() - 4, 0))


def test_the_last_sixty_days_end_with_the_bar_of_now(carla, stocks):
    bars = bars_of(stocks, start=days_ago(60))["AAPL"]
    days = [bar.timestamp.astimezone(NEW_YORK) for bar in bars]
    assert days[-1].date() == today()
    assert all((day.hour, day.minute) == (0, 0) and day.weekday() < 5 for day in days)
    weekdays = [d for n in range(60, -1, -1) if (d := today() - timedelta(days=n)).weekday() < 5]
    assert [day.date() for day in days][-40:] == weekdays[-40:]
    assert ohlcv(bars) == ohlcv_of(recorded(carla, len(bars)))
    assert bars[-1].close == float(carla.get("/api/v1/price/AAPL")["price"])


def test_bars_and_quotes_go_into_data_frames(carla, stocks, coins):
    asked = wanted.StockBarsRequest(
        symbol_or_symbols=["AAPL", "IBM"], timeframe=TimeFrame.Day, start=days_ago(30)
    )
    frame = stocks.get_stock_bars(asked).df
    assert list(frame.columns) == ["open", "high", "low", "close", "volume", "trade_count", "vwap"]
    assert not frame.isna().any().any()
    assert list(frame.loc["IBM"]["close"]) == [
        float(b["close"]) for b in recorded(carla, len(frame.loc["IBM"]), "IBM")
    ]
    minutes = {"symbol_or_symbols": "AAPL", "start": datetime.now(UTC) - timedelta(minutes=5)}
    quotes = stocks.get_stock_quotes(wanted.StockQuotesRequest(**minutes)).df
    trades = stocks.get_stock_trades(wanted.StockTradesRequest(**minutes)).df
    assert list(quotes["ask_price"]) == list(quotes["bid_price"]) == list(trades["price"])
    assert list(trades["price"]) == [float(bar["close"]) for bar in recorded(carla, len(trades))]
    asked = wanted.CryptoBarsRequest(symbol_or_symbols="BTC/USD", timeframe=TimeFrame.Day, start=days_ago(10))
    frame = coins.get_crypto_bars(asked).df.loc["BTC/USD"]
    gaps = {later - day for day, later in zip(frame.index, frame.index[1:], strict=False)}
    assert gaps == {timedelta(days=1)}
    assert list(frame["close"]) == [float(bar["close"]) for bar in recorded(carla, len(frame), "BTC-USD")]


def test_a_range_of_the_recorded_time_has_its_own_dates_and_ends_at_the_clock(carla, stocks):
    bars = bars_of(stocks, start=datetime(2012, 5, 25), end=datetime(2012, 7, 1))["AAPL"]
    told = carla.get("/api/v1/bars/AAPL", start="2012-05-25T00:00:00Z", limit=100)["bars"]
    assert ohlcv(bars) == ohlcv_of(told)
    assert [bar.timestamp.astimezone(NEW_YORK).date().isoformat() for bar in bars] == [
        bar["timestamp"][:10] for bar in told
    ]
    answer = ask(carla, "GET", "/v2/stocks/AAPL/bars?timeframe=1Day&start=2012-05-30&end=2012-05-31")
    assert [bar["t"][:10] for bar in answer.json()["bars"]] == ["2012-05-30", "2012-05-31"]


@pytest.mark.parametrize(
    ("timeframe", "gap"),
    [
        (TimeFrame(5, TimeFrameUnit.Minute), timedelta(minutes=5)),
        (TimeFrame(1, TimeFrameUnit.Hour), timedelta(hours=1)),
        (TimeFrame(1, TimeFrameUnit.Week), timedelta(weeks=1)),
    ],
)
def test_a_timeframe_finer_than_the_recorded_one_has_the_recorded_bars_at_its_own_distance(
    carla, stocks, timeframe, gap
):
    bars = bars_of(stocks, timeframe=timeframe, start=datetime.now(UTC) - 9 * gap)["AAPL"]
    times = [bar.timestamp.astimezone(NEW_YORK).replace(tzinfo=None) for bar in bars]
    assert {later - time for time, later in zip(times, times[1:], strict=False)} == {gap}
    name = "1w" if gap.days == 7 else "1d"
    assert ohlcv(bars) == ohlcv_of(recorded(carla, len(bars), timeframe=name))
    assert len(bars) in (9, 10)


def test_months_are_put_together_from_days(carla, stocks):
    bars = bars_of(stocks, timeframe=TimeFrame.Month, start=days_ago(200))["AAPL"]
    may = [bar for bar in recorded(carla, 100) if bar["timestamp"].startswith("2012-05")]
    assert (bars[-2].open, bars[-2].close) == (float(may[0]["open"]), float(may[-1]["close"]))
    assert bars[-2].high == max(float(bar["high"]) for bar in may)
    assert bars[-1].timestamp.astimezone(NEW_YORK).date() == datetime.now(NEW_YORK).date().replace(day=1)


def test_a_stopped_clock_has_no_bar_before_the_first_and_the_wall_clock_wraps(alice):
    def count() -> int:
        asked = {"timeframe": "1Day", "start": days_ago(3000).isoformat(), "limit": 10_000, "symbols": "AAPL"}
        return len(ask(alice, "GET", "/v2/stocks/bars", params=asked).json()["bars"]["AAPL"])

    assert abs(count() - 3000 * 5 / 7) < 5
    stop_clock(alice, "2012-03-07T00:00:00Z")
    assert count() == len(recorded(alice, 100)) < 10


def test_a_ticker_before_its_first_bar_is_none_yet(alice, tmp_path):
    rows = ["timestamp,ticker,price", "2012-06-01,AAPL,10", "2012-06-04,AAPL,11", "2012-06-04,LATE,12"]
    (tmp_path / "prices.csv").write_text("\n".join(rows))
    with loaded(
        DATABASE_URL=alice.server.database_url, PRICE_SOURCES="sample", SAMPLE_MARKET=tmp_path / "prices.csv"
    ) as program:
        stop_clock(alice)
        client, key = program["app"].test_client(), {"APCA-API-SECRET-KEY": alice.key}
        for path in ("bars/latest", "trades/latest", "snapshot"):
            answer = client.get(f"/alpaca/v2/stocks/LATE/{path}", headers=key)
            assert (answer.status_code, json.loads(answer.text)["problem"]) == (404, "unknown_ticker")
        bars = client.get("/alpaca/v2/stocks/bars?symbols=LATE,AAPL&start=2020-01-01", headers=key)
        assert {s: len(b) for s, b in json.loads(bars.text)["bars"].items()} == {"AAPL": 1}
        with program["app"].app_context():
            program["db"].engine.dispose()


def test_pages_of_bars_come_to_what_one_answer_has(carla):
    asked = {"timeframe": "1Day", "symbols": "AAPL,IBM,BTC/USD", "start": days_ago(60).isoformat()}
    whole = ask(carla, "GET", "/v2/stocks/bars", params=asked).json()
    for sort in ("asc", "desc"):
        paged, token = {}, None
        while True:
            page = {"limit": 7, "page_token": token, "sort": sort}
            answer = ask(carla, "GET", "/v2/stocks/bars", params=asked | page).json()
            for symbol, bars in answer["bars"].items():
                paged.setdefault(symbol, []).extend(bars)
            if not (token := answer["next_page_token"]):
                break
        assert {s: bars[:: 1 if sort == "asc" else -1] for s, bars in paged.items()} == whole["bars"]
    assert whole["next_page_token"] is None


def test_what_is_newest_is_the_price_of_the_native_face(carla, stocks, coins):
    carla.sees("IBM", "123.45")
    prices = {
        ticker: float(carla.get(f"/api/v1/price/{ticker}")["price"]) for ticker in ("AAPL", "IBM", "BTC-USD")
    }
    several = {"symbol_or_symbols": ["AAPL", "IBM", "NOPE"]}
    quotes = stocks.get_stock_latest_quote(wanted.StockLatestQuoteRequest(**several))
    trades = stocks.get_stock_latest_trade(wanted.StockLatestTradeRequest(**several))
    assert {s: (q.bid_price, q.ask_price) for s, q in quotes.items()} == {
        s: (prices[s],) * 2 for s in ("AAPL", "IBM")
    }
    assert {symbol: trade.price for symbol, trade in trades.items()} == {
        s: prices[s] for s in ("AAPL", "IBM")
    }
    assert abs(quotes["AAPL"].timestamp - datetime.now(UTC)) < timedelta(minutes=1)
    snapshot = stocks.get_stock_snapshot(wanted.StockSnapshotRequest(symbol_or_symbols="AAPL"))["AAPL"]
    before, last = recorded(carla, 2)
    assert (
        snapshot.daily_bar.close
        == snapshot.minute_bar.close
        == snapshot.latest_trade.price
        == float(last["close"])
    )
    assert snapshot.previous_daily_bar.close == float(before["close"])
    bar = stocks.get_stock_latest_bar(wanted.StockLatestBarRequest(symbol_or_symbols="AAPL"))["AAPL"]
    assert bar.close == prices["AAPL"]
    one = {"symbol_or_symbols": "BTC/USD"}
    assert (
        coins.get_crypto_latest_quote(wanted.CryptoLatestQuoteRequest(**one))["BTC/USD"].ask_price
        == prices["BTC-USD"]
    )
    assert (
        coins.get_crypto_snapshot(wanted.CryptoSnapshotRequest(**one))["BTC/USD"].latest_trade.price
        == prices["BTC-USD"]
    )
    book = coins.get_crypto_latest_orderbook(wanted.CryptoLatestOrderbookRequest(**one))["BTC/USD"]
    assert book.asks[0].price == prices["BTC-USD"]
    with pytest.raises(APIError) as refusal:
        stocks.get_stock_latest_quote(wanted.StockLatestQuoteRequest(symbol_or_symbols="NOPE"))
    assert refusal.value.status_code == 404


# Live prices


@pytest.fixture(scope="module")
def yahoo():
    with MarketStandIn() as stand_in:
        yield stand_in


@pytest.fixture(scope="module")
def dora(program, yahoo, new_database) -> Iterator[Trader]:
    """Somebody whose prices are Yahoo's."""
    settings = yahoo.environment | {"PRICE_SOURCES": "yahoo", "GUNICORN_CMD_ARGS": f"--chdir {program}"}
    with Server(new_database().migrate().url, workers=1, **settings) as server:
        yield server.trader(name="dora")


def test_live_prices_trade_and_have_the_dates_of_their_exchange(dora, yahoo):
    yahoo.yahoo("LIVE", "100.5")
    opening = datetime.combine(date(2026, 3, 2), time(9, 30), NEW_YORK)
    days = [opening + timedelta(days=n) for n in range(30) if (opening + timedelta(days=n)).weekday() < 5]
    yahoo.bars("LIVE", "1d", *[(day, 10 + n, 12 + n, 9 + n, 11 + n, 1000) for n, day in enumerate(days)])
    trading, stocks = (
        trading_as(dora),
        historical.StockHistoricalDataClient("a", dora.key, url_override=url_of(dora)),
    )
    order = trading.submit_order(MarketOrderRequest(symbol="LIVE", qty=2, side="buy", time_in_force="day"))
    assert is_the_same(order, native(dora, order))
    assert (order.status.value, order.filled_avg_price) == ("filled", "100.5")
    (held,), account = trading.get_all_positions(), trading.get_account()
    assert (held.market_value, held.lastday_price, held.change_today) == ("201", None, None)
    assert account.equity == account.last_equity == "100000"
    assert trading.get_portfolio_history().equity[-1] == 100_000
    yahoo.yahoo("PENCE", "70", currency="GBp")
    yahoo.yahoo("OLD", "70", seen="1500000000")
    for ticker in ("PENCE", "OLD"):
        dora.get(f"/api/v1/price/{ticker}")
    listed = {asset.symbol: asset.tradable for asset in trading.get_all_assets()}
    assert listed == {"LIVE": True, "PENCE": False, "OLD": False}
    assert listed == {symbol: trading.get_asset(symbol).tradable for symbol in listed}
    bars = bars_of(stocks, "LIVE", start=days[0], end=days[-1])["LIVE"]
    told = dora.get("/api/v1/bars/LIVE", start="2026-03-03T00:00:00Z", limit=500)["bars"]
    assert ohlcv(bars) == ohlcv_of(told)  # Its first day began at midnight, before `start`.
    assert [bar.timestamp.astimezone(NEW_YORK).date().isoformat() for bar in bars] == [
        bar["timestamp"][:10] for bar in told
    ]
    march, *_ = bars_of(stocks, "LIVE", TimeFrame.Month, start=datetime(2026, 3, 1), end=days[-1])["LIVE"]
    assert (march.open, march.close, march.volume) == (10, 11 + len(days) - 1, 1000 * len(days))


def test_half_hours_of_live_prices_are_put_together(dora, yahoo):
    yahoo.yahoo("HALF", "100.5")
    begin = datetime.now(UTC).replace(minute=0, second=0, microsecond=0) - timedelta(hours=3)
    quarters = [(begin + timedelta(minutes=15 * n), 10 + n, 20 + n, 5 + n, 11 + n, 100) for n in range(4)]
    yahoo.bars("HALF", "15m", *quarters)
    stocks = historical.StockHistoricalDataClient("any", dora.key, url_override=url_of(dora))
    bars = bars_of(stocks, "HALF", TimeFrame(30, TimeFrameUnit.Minute), start=begin)["HALF"]
    assert ohlcv(bars) == [(10, 21, 5, 12, 200), (12, 23, 7, 14, 200)]
    assert [bar.timestamp - begin for bar in bars] == [timedelta(0), timedelta(minutes=30)]


def test_a_price_that_cannot_be_had_is_504_and_one_that_is_not_there_is_none(dora, yahoo):
    yahoo.yahoo("AWAY", status=500)
    order = {"symbol": "AWAY", "qty": "1", "side": "buy", "type": "market", "time_in_force": "day"}
    answer = ask(dora, "POST", "/v2/orders", json=order)
    assert (answer.status_code, answer.json()["problem"]) == (504, "price_unavailable")
    assert int(answer.headers["Retry-After"]) > 0
    assert ask(dora, "GET", "/v2/assets/GONE").status_code == 404
    path = f"{url_of(dora)}/v1beta3/crypto/us/latest/quotes?symbols=BTC/USD"
    assert requests.get(path, timeout=60).status_code == 401


@pytest.mark.parametrize("token", ["garbage", "5.", "1.99999999999999999"])
def test_a_token_of_no_page_is_refused(carla, token):
    answer = ask(carla, "GET", f"/v2/stocks/bars?symbols=AAPL&timeframe=1Day&page_token={token}")
    assert answer.status_code == 422


def test_a_made_up_token_shows_nothing_that_is_yet_to_come(alice):
    ask_for = "/v2/stocks/bars?symbols=AAPL&timeframe=1Day&limit=1&page_token=0."
    later = datetime.now(UTC) + timedelta(minutes=3)
    shown = ask(alice, "GET", f"{ask_for}{int(later.timestamp() * 10**6)}").json()
    now = ask(alice, "GET", f"{ask_for}{int(datetime.now(UTC).timestamp() * 10**6)}").json()
    assert shown["bars"] == now["bars"]


def test_a_market_may_reach_to_the_end_of_all_dates(new_database, tmp_path):
    file = tmp_path / "market.csv"
    file.write_text("date,ticker,price\n2024-01-01,ABC,5\n9999-12-31,ABC,3\n")
    with Here(new_database().migrate().url, SAMPLE_MARKET=file) as server:
        query = "symbols=ABC&timeframe=1Day&start=2025-01-01"
        assert ask(server.trader(), "GET", f"/v2/stocks/bars?{query}").status_code == 200


# A strategy, through the recorded year


class OverAlpaca:
    """What the strategy does, said by alpaca-py."""

    def __init__(self, trader: Trader):
        self.client = trading_as(trader)

    def cash(self) -> Decimal:
        return Decimal(self.client.get_account().buying_power)

    def held(self) -> Decimal:
        return sum(
            (Decimal(p.qty) for p in self.client.get_all_positions() if p.symbol == "AAPL"), Decimal(0)
        )

    def open_orders(self) -> int:
        return len(self.client.get_orders(GetOrdersRequest(status="open", limit=500)))

    def bracket(self, quantity, limit, gain, loss):
        self.client.submit_order(
            LimitOrderRequest(
                symbol="AAPL", qty=float(quantity), side="buy", time_in_force="gtc", limit_price=float(limit),
                order_class="bracket", take_profit=TakeProfitRequest(limit_price=float(gain)),
                stop_loss=StopLossRequest(stop_price=float(loss)),
            )
        )  # fmt: skip

    def breakout(self, quantity, stop):
        asked = {"symbol": "AAPL", "qty": float(quantity), "side": "buy", "time_in_force": "day"}
        self.client.submit_order(StopOrderRequest(**asked, stop_price=float(stop)))

    def trailing(self, quantity, percent):
        asked = {"symbol": "AAPL", "qty": float(quantity), "side": "sell", "time_in_force": "gtc"}
        self.client.submit_order(TrailingStopOrderRequest(**asked, trail_percent=float(percent)))

    def market(self, notional):
        asked = {"symbol": "AAPL", "notional": float(notional), "side": "buy", "time_in_force": "day"}
        self.client.submit_order(MarketOrderRequest(**asked))

    def cancel(self):
        self.client.cancel_orders()

    def close(self):
        self.client.close_position("AAPL")


class OverNative:
    """The same in the broker's own words."""

    def __init__(self, trader: Trader):
        self.trader = trader

    def place(self, **asked):
        order = {"ticker": "AAPL", "action": "buy", "time_in_force": "gtc"} | asked
        answer = self.trader.ask("POST", "/api/v1/orders", json=order)
        assert answer.status_code == 201, answer.text

    def cash(self) -> Decimal:
        return self.trader.get("/api/v1/balance")["buying_power"]

    def held(self) -> Decimal:
        return self.trader.holdings.get("AAPL", (Decimal(0),))[0]

    def open_orders(self) -> int:
        return len(self.trader.get("/api/v1/orders", limit=500)["orders"])

    def bracket(self, quantity, limit, gain, loss):
        legs = {"take_profit": {"limit_price": str(gain)}, "stop_loss": {"stop_price": str(loss)}}
        self.place(quantity=str(quantity), order_type="limit", limit_price=str(limit), **legs)

    def breakout(self, quantity, stop):
        self.place(quantity=str(quantity), order_type="stop", stop_price=str(stop), time_in_force="day")

    def trailing(self, quantity, percent):
        order = {"quantity": str(quantity), "order_type": "trailing_stop", "trail_percent": str(percent)}
        self.place(action="sell", **order)

    def market(self, notional):
        self.place(notional=str(notional), order_type="market", time_in_force="day")

    def cancel(self):
        self.trader.ask("DELETE", "/api/v1/orders")

    def close(self):
        self.place(action="sell", quantity="all", order_type="market", time_in_force="day")


def run_strategy(trader: Trader, face, days: int) -> tuple:
    """Limits, stops, brackets and trailing stops through so many days of the tape, or all; answers all that
    came of it."""
    market = trader.get("/api/v1/market")
    stop_clock(trader, market["first_bar"])
    cent, curve = Decimal("0.01"), []
    for day in range(days):
        price = trader.get("/api/v1/price/AAPL")["price"].quantize(cent)
        if day % 20 == 19:
            face.cancel()
            if face.held():
                face.close()
        elif day % 5 == 0 and face.cash() > 20_000:
            legs = (price * Decimal("1.06")).quantize(cent), (price * Decimal("0.95")).quantize(cent)
            face.bracket(Decimal("7.5"), (price * Decimal("0.99")).quantize(cent), *legs)
        elif day % 5 == 1:
            face.breakout(Decimal("1.25"), (price * Decimal("1.01")).quantize(cent))
        elif day % 5 == 2:
            face.market(Decimal("333.33"))
            face.trailing(Decimal("0.25"), Decimal("2.5"))
        if day % 5 == 4:
            curve.append((face.open_orders(), face.held(), trader.portfolio["equity"]))
        step = trader.ask("POST", "/api/v1/market/advance", json={"bars": 1})
        if exact(step)["now"] == market["last_bar"]:
            break
    assert trader.audit()["ok"]
    return story_of(trader), curve


def story_of(trader: Trader) -> tuple:
    """All orders and trades of a trader, numbered from his first, without the moments of the wall clock."""
    orders = trader.get("/api/v1/orders", status="all", limit=500)["orders"][::-1]
    trades = trader.trades[::-1]
    places = {order["id"]: place for place, order in enumerate(orders)}
    fills = {trade["id"]: place for place, trade in enumerate(trades)}
    told = [
        {n: v for n, v in order.items() if n not in ("id", "placed_at", "closed_at", "reason")}
        | {name: places.get(order[name]) for name in ("parent_id", "replaces")}
        | {"trade_id": fills.get(order["trade_id"])}
        for order in orders
    ]
    booked = [
        {n: v for n, v in trade.items() if n not in ("id", "user_id", "timestamp")}
        | {"order_id": places.get(trade["order_id"])}
        for trade in trades
    ]
    return told, booked, trader.portfolio["equity"], trader.cash


@pytest.mark.parametrize(("engine", "days", "least"), [("sqlite", 400, 60), ("postgresql", 80, 15)])
def test_a_strategy_makes_the_same_books_each_time_and_on_each_face(broker_on, engine, days, least):
    """On SQLite through the whole year, on PostgreSQL through a season of it, and there twice."""
    server = broker_on(engine)
    first, again, plain = (server.trader(name=name) for name in ("first", "again", "plain"))
    story, curve = run_strategy(first, OverAlpaca(first), days)
    orders, trades, *_ = story
    assert {order["status"] for order in orders} >= {"filled", "canceled", "expired"}
    assert len(trades) > least
    assert len(curve) > 4 * least // 5
    if engine == "postgresql":
        assert run_strategy(again, OverAlpaca(again), days) == (story, curve)
    assert run_strategy(plain, OverNative(plain), days) == (story, curve)


# Programs that are not ours

OLD_CLIENT = "alpaca-trade-api==3.2.0"


@pytest.fixture(scope="session")
def old_client() -> Iterator[Path]:
    """A Python that has alpaca-trade-api: it wants some older packages than yfinance does, and finds the
    others where this one has them."""
    with TemporaryDirectory(prefix="broker-old-client-") as folder:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        python = Path(folder) / "bin" / "python"
        (own,) = Path(folder).glob("lib/python*/site-packages")
        (own / "others.pth").write_text(str(Path(pytest.__file__).parent.parent))
        pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check"]
        command = [*pip, "install", "--quiet", OLD_CLIENT]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        if done.returncode and not os.environ.get("CI"):
            pytest.skip(f"{OLD_CLIENT} cannot be installed here.")
        assert done.returncode == 0, done.stderr
        yield python


OLD_BOT = """
import json
from datetime import date, timedelta
import alpaca_trade_api as tradeapi
from alpaca_trade_api.rest import APIError, TimeFrame

api = tradeapi.REST()
start = (date.today() - timedelta(days=40)).isoformat()
told = {"cash": api.get_account().cash}
told["is_open"] = api.get_clock().is_open
told["bought"] = api.submit_order("AAPL", qty=3, side="buy")._raw["status"]
told["notional"] = api.submit_order("AAPL", notional=100.5, side="buy").qty
resting = api.submit_order("AAPL", 1, "buy", "limit", "gtc", limit_price=9, client_order_id="rests")
told["found"] = api.get_order_by_client_order_id("rests").id == api.get_order(resting.id).id == resting.id
told["replaced"] = api.replace_order(resting.id, qty=2).qty
told["open"] = len(api.list_orders(nested=True))
api.cancel_all_orders()
told["open then"] = len(api.list_orders())
told["coin"] = api.submit_order("BTCUSD", 0.5, "buy", "market", "gtc").symbol
told["positions"] = sorted(p.symbol for p in api.list_positions())
told["price"] = api.get_latest_trade("AAPL").price
told["quote"] = api.get_latest_quotes(["AAPL"])["AAPL"].ap
told["bar"] = api.get_latest_bar("AAPL").c
told["snapshot"] = api.get_snapshot("AAPL").daily_bar.c
told["bars"] = list(api.get_bars("AAPL", TimeFrame.Day, start, adjustment="raw").df["close"])
told["both"] = sorted(set(api.get_bars(["AAPL", "IBM"], TimeFrame.Day, start).df["symbol"]))
told["coins"] = list(api.get_crypto_bars("BTC/USD", TimeFrame.Day, start).df["close"])
told["fills"] = [a.qty for a in api.get_activities(activity_types="FILL")]
told["equity"] = api.get_portfolio_history(period="1M", timeframe="1D").equity[-1]
told["days"] = len(api.get_calendar("2012-06-01", "2012-06-08"))
told["asset"] = api.get_asset("AAPL").tradable
told["closed"] = api.close_position("AAPL").side
told["rest"] = [p.status for p in api.close_all_positions()]
for order in ({"qty": 1e6, "side": "buy"}, {"qty": 1, "side": "sell"}):
    try:
        api.submit_order("IBM", **order)
    except APIError as error:
        told[order["side"]] = [error.status_code, error.code, str(error)]
print(json.dumps(told))
"""


def test_the_old_client_trades_too(carla, old_client):
    place = {"APCA_API_BASE_URL": url_of(carla), "APCA_API_DATA_URL": url_of(carla)}
    key = {"APCA_API_KEY_ID": "any", "APCA_API_SECRET_KEY": carla.key}
    done = subprocess.run(
        [old_client, "-c", OLD_BOT], env=os.environ | place | key, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    price = float(carla.get("/api/v1/price/AAPL")["price"])
    for name in ("price", "quote", "bar", "snapshot"):
        assert told.pop(name) == price, name
    bars, coins = told.pop("bars"), told.pop("coins")
    assert bars == [float(bar["close"]) for bar in recorded(carla, len(bars))]
    assert coins == [float(bar["close"]) for bar in recorded(carla, len(coins), "BTC-USD")]
    assert (len(bars) > 25, len(coins) > 38) == (True, True)
    buy, sell, notional = told.pop("buy"), told.pop("sell"), told.pop("notional")
    assert buy[:2] == sell[:2] == [403, 40310000]
    assert buy[2].startswith("This costs ")
    assert told.pop("equity") == pytest.approx(100_000, abs=0.001)
    assert told == {
        "cash": "100000", "is_open": True, "bought": "filled", "found": True, "replaced": "2", "open": 1,
        "open then": 0, "coin": "BTC/USD", "positions": ["AAPL", "BTCUSD"], "both": ["AAPL", "IBM"],
        "fills": ["0.5", notional, "3"], "days": 6, "asset": True, "closed": "sell", "rest": [200],
    }  # fmt: skip
    assert carla.holdings == {}


WRITTEN_FOR_ALPACA = """
import sys
from alpaca.data.historical import CryptoHistoricalDataClient
from alpaca.data.requests import CryptoLatestQuoteRequest
from alpaca.trading.client import TradingClient
from alpaca.trading.requests import MarketOrderRequest

client = TradingClient("AK", sys.argv[1], paper=True)
order = client.submit_order(MarketOrderRequest(symbol="AAPL", qty=2, side="buy", time_in_force="day"))
asked = CryptoLatestQuoteRequest(symbol_or_symbols="BTC/USD")
quote = CryptoHistoricalDataClient().get_crypto_latest_quote(asked)
print(order.status.value, quote["BTC/USD"].ask_price > 0, __name__)
"""


def run_example(trader: Trader, *command) -> str:
    surroundings = os.environ | {"BROKER_URL": url_of(trader), "APCA_API_SECRET_KEY": trader.key}
    done = subprocess.run(
        [sys.executable, *map(str, command)], env=surroundings, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_program_with_alpacas_hosts_written_into_it_is_led_here(carla, tmp_path):
    bot = tmp_path / "bot.py"
    bot.write_text(WRITTEN_FOR_ALPACA)
    assert (
        run_example(carla, ROOT / "examples" / "alpaca_redirect.py", bot, carla.key)
        == "filled True __main__\n"
    )
    assert carla.holdings["AAPL"][0] == 2


@pytest.mark.parametrize("bot", ["alpaca_bot.py", "alpaca_requests.py"])
def test_the_example_bots_do_what_they_say(carla, bot):
    said = run_example(carla, ROOT / "examples" / bot)
    bars = [bar["close"] for bar in recorded(carla, 30)]
    rises = sum(bars[-10:]) / 10 > sum(bars) / 30
    assert (carla.holdings != {}) == rises
    assert ("bought" if rises else "nothing to do") in said
    stop_clock(carla, "2012-08-20T00:00:00Z")
    said = run_example(carla, ROOT / "examples" / bot)
    assert "AAPL" in carla.holdings
    assert said


def test_a_drill_fails_an_order_of_this_face_as_well(alice):
    order = {"symbol": "IBM", "qty": "1", "side": "buy", "type": "market", "client_order_id": "drilled"}
    after = ask(alice, "POST", "/v2/orders", json=order, headers={"X-Simulate-Fault": "error_after_commit"})
    assert (after.status_code, after.json()["problem"]) == (504, "outcome_unknown")
    again = ask(alice, "POST", "/v2/orders", json=order)
    assert (again.status_code, again.json()["status"]) == (200, "filled")
    assert len(alice.trades) == 1
    before = ask(
        alice,
        "POST",
        "/v2/orders",
        json=order | {"client_order_id": "another"},
        headers={"X-Simulate-Fault": "error_before_commit"},
    )
    assert before.json()["problem"] == "database_unavailable"
    assert len(alice.trades) == 1
