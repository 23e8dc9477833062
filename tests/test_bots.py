"""Bots as they are: they keep their books in binary floats, and write words and numbers as they have them."""

import json
import random
from decimal import ROUND_DOWN, ROUND_HALF_EVEN, Decimal

import pytest
from cast import exact
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

JSON = {"Content-Type": "application/json"}
UNIT = Decimal("0.00000001")


def sends(trader, order: dict, **options):
    """The order as a program writes it that has floats: with all their digits, and null for None."""
    return exact(trader.ask("POST", "/api/v1/trade", data=json.dumps(order), headers=JSON, **options))


def buy(**more):
    return {"ticker": "ETH-USD", "action": "buy"} | more


def sale(**more):
    return {"ticker": "ETH-USD", "action": "sell"} | more


@pytest.fixture
def bot(alice):
    return alice.sees("ETH-USD", at=100)


def test_what_a_bots_book_of_floats_says_can_be_sold(bot):
    for quantity in (1.3119, 0.5, 0.2):
        sends(bot, buy(quantity=quantity))
    sends(bot, sale(quantity=0.7))
    book = 1.3119 + 0.5 + 0.2 - 0.7  # 1.3119000000000003
    assert len(str(book)) > 10
    assert sends(bot, sale(quantity=book))["quantity"] == Decimal("1.3119")
    assert bot.holdings == {}


@pytest.mark.parametrize("quantity", [0.8118999999999996, 0.0017569999999999997, 22.799999999999997, 1 / 3])
def test_a_purchase_is_rounded_down_and_a_sale_to_the_nearest(bot, quantity):
    bought = sends(bot, buy(quantity=quantity))["quantity"]
    assert bought == Decimal(str(quantity)).quantize(UNIT, ROUND_DOWN)
    sends(bot, buy(quantity=1))
    sold = sends(bot, sale(quantity=quantity))["quantity"]
    assert sold == Decimal(str(quantity)).quantize(UNIT, ROUND_HALF_EVEN)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.floats(1, 50_000), st.floats(0.01, 900), st.floats(1, 9))
def test_a_size_of_cash_by_price_is_always_taken(bot, cash, price, k):
    size = cash / (price * k)
    answer = sends(bot, buy(quantity=size), params={"dry_run": "true"})
    assert answer.get("code", "insufficient_funds") in ("insufficient_funds", "invalid_request")
    assert answer.get("quantity", 0) <= Decimal(str(size))
    assert ("errors" in answer) == (Decimal(str(size)) < UNIT)


@pytest.mark.parametrize(
    "number", ["1E-7", "1e-7", "2.5e+1", '"1E-7"', '"2.5e1"', "0.00000001", "10.000000001"]
)
def test_numbers_may_have_exponents_and_more_digits(bot, number):
    order = '{"ticker":"ETH-USD","action":"buy","quantity":' + number + "}"
    taken = exact(bot.ask("POST", "/api/v1/trade", data=order, headers=JSON))["quantity"]
    assert taken == Decimal(number.strip('"')).quantize(UNIT, ROUND_DOWN)


def test_prices_and_cash_are_rounded_to_the_nearest(bot):
    order = buy(quantity=1, price=100 * 1.001)  # 100.10 and some 14 digits of noise
    assert sends(bot, order)["price"] == Decimal(str(100 * 1.001)).quantize(UNIT)
    answer = exact(bot.ask("POST", "/api/v1/account/reset", json={"cash": 0.1 + 0.2}))
    assert answer["cash_balance"] == Decimal("0.3")


def test_null_counts_as_left_out(bot):
    order = {"ticker": "ETH-USD", "action": "buy", "quantity": 1, "price": None, "notional": None}
    assert sends(bot, order)["price"] == 100
    assert exact(bot.ask("POST", "/api/v1/account/reset", json={"cash": None}))["cash_balance"] == 100_000
    bot.ask("PUT", "/api/v1/market/clock", json={"at": "2012-06-01T00:00:00Z"})
    assert (
        exact(bot.ask("POST", "/api/v1/market/advance", json={"bars": None}))["now"] == "2012-06-04T00:00:00Z"
    )
    assert sends(bot, order | {"unknown": None})["errors"][0]["field"] == "unknown"


def test_words_count_in_any_case(bot):
    assert sends(bot, buy(quantity=2, action="BUY"))["trade_type"] == "buy"
    assert sends(bot, sale(quantity="ALL", action="Sell"))["quantity"] == 2
    assert len(bot.get("/api/v1/trades", action="SELL")["trades"]) == 1
    assert bot.order("buy", 1, "ETH-USD", fault="Rate_Limited").json()["code"] == "rate_limited"


def test_a_byte_order_mark_before_the_json_is_passed_over(bot):
    body = b"\xef\xbb\xbf" + json.dumps(buy(quantity=1)).encode()
    assert exact(bot.ask("POST", "/api/v1/trade", data=body, headers=JSON))["quantity"] == 1


def test_dollars_buy_and_sell_what_they_come_to(bot):
    bot.sees("ETH-USD", at="2999.99")
    bought = sends(bot, buy(notional=1000))
    assert bought["quantity"] == Decimal("0.33333444")  # 0.333334444...
    assert bought["total_amount"] <= 1000
    sold = sends(bot, sale(notional=500.005))
    assert sold["quantity"] == (Decimal("500.005") / Decimal("2999.99")).quantize(UNIT, ROUND_DOWN)
    assert sends(bot, sale(notional=900))["code"] == "insufficient_shares"
    assert sends(bot, buy(notional=200_000))["code"] == "insufficient_funds"
    assert sends(bot, buy(notional="0.00000001"))["code"] == "limit_exceeded"  # It comes to nothing.
    assert sends(bot, buy(notional=10, quantity=1))["code"] == "invalid_request"
    assert bot.audit()["ok"]


def test_all_sells_what_no_float_can_name(bot):
    bot.sees("DOGE-USD", at="0.00002345")
    sends(bot, {"ticker": "DOGE-USD", "action": "buy", "quantity": "1234567890.12345613"})
    order = {"ticker": "DOGE-USD", "action": "sell"}
    assert sends(bot, order | {"quantity": 1234567890.1234562})["code"] == "insufficient_shares"
    assert sends(bot, order | {"quantity": "all"})["quantity"] == Decimal("1234567890.12345613")
    assert bot.holdings == {}
    assert sends(bot, order | {"quantity": "all"})["code"] == "insufficient_shares"
    assert sends(bot, buy(quantity="all"))["code"] == "invalid_request"


@pytest.mark.parametrize("size", [{"notional": 1000}, {"quantity": "all"}])
def test_a_repeated_order_for_dollars_or_for_all_is_the_same_whatever_the_price_is_by_then(bot, size):
    sends(bot, buy(quantity=5))
    order = sale(**size) if "quantity" in size else buy(**size)
    first = exact(keyed(bot, order))
    bot.sees("ETH-USD", at=250)
    again = keyed(bot, order)
    assert again.headers["Idempotent-Replayed"] == "true"
    assert exact(again) == first
    other = order | {"quantity": str(first["quantity"])}
    other.pop("notional", None)
    assert keyed(bot, other).json()["code"] == "idempotency_key_reused"


def keyed(trader, order: dict, key="k"):
    return trader.ask(
        "POST", "/api/v1/trade", data=json.dumps(order), headers=JSON | {"Idempotency-Key": key}
    )


def test_two_numbers_that_are_taken_as_the_same_are_the_same_order(bot):
    assert keyed(bot, buy(quantity=0.1 + 0.2)).status_code == 200
    assert keyed(bot, buy(quantity="0.30000000")).headers["Idempotent-Replayed"] == "true"


def test_a_key_is_one_of_its_run(bot):
    """A back-test that numbers its orders books them anew after a reset."""
    first = exact(keyed(bot, buy(quantity=1), "bt-0001"))
    bot.ask("POST", "/api/v1/account/reset")
    bot.sees("ETH-USD", at=100)
    second = keyed(bot, buy(quantity=1), "bt-0001")
    assert "Idempotent-Replayed" not in second.headers
    assert exact(second)["run"] == first["run"] + 1
    assert keyed(bot, buy(quantity=1), "bt-0001").json()["id"] == second.json()["id"]
    assert len(bot.trades) == 1
    assert bot.audit()["ok"]


def test_a_bot_with_a_book_of_floats_trades_through_the_recorded_year(alice):
    """Nothing is refused but for money, shares and prices, and its own book says how much to sell."""
    chance, book, cash = random.Random(7), {}, 100_000.0
    alice.ask("PUT", "/api/v1/market/clock", json={"at": "2012-03-01T00:00:00Z"})
    prices = {}
    for number in range(1_000):
        if number % 4 == 0:
            alice.ask("POST", "/api/v1/market/advance")
            prices = {}
        ticker = chance.choice(["AAPL", "IBM", "GOOG", "BTC-USD", "DOGE-USD", "SPY"])
        if ticker not in prices:
            prices[ticker] = float(alice.get(f"/api/v1/price/{ticker}")["price"])
        price, held = prices[ticker], book.get(ticker, 0.0)
        kind = chance.choice(["buy", "buy for dollars", "sell all it has", "sell half", "sell some dollars"])
        if kind == "buy":
            order = {"action": "buy", "quantity": cash * chance.random() / 9 / price, "price": price * 1.001}
        elif kind == "buy for dollars":
            order = {"action": "buy", "notional": cash * chance.random() / 9}
        elif kind == "sell some dollars":
            order = {"action": "sell", "notional": held * price * chance.random()}
        else:
            order = {"action": "sell", "quantity": held if kind == "sell all it has" else held / 2}
            order["price"] = price * 0.999
        answer = sends(alice, {"ticker": ticker} | order)
        if "code" in answer:
            nothing = not (order.get("quantity") or order.get("notional")) or held < 2e-8
            allowed = ("insufficient_funds", "insufficient_shares", "limit_exceeded")
            assert answer["code"] in allowed or nothing, (order, answer)
            assert answer["code"] != "insufficient_shares" or held < 1e-6, (held, order, answer)
            continue
        sign = 1 if answer["trade_type"] == "buy" else -1
        book[ticker] = held + sign * float(answer["quantity"])
        cash -= sign * float(answer["total_amount"])
        if kind == "sell all it has":
            assert ticker not in alice.holdings or alice.holdings[ticker][0] < Decimal("0.000001")
            book[ticker] = 0.0 if ticker not in alice.holdings else book[ticker]
    assert alice.audit()["ok"]
    assert len(alice.trades) > 300
