"""Buying and selling over HTTP, on both databases."""

from decimal import Decimal

import pytest
import requests


def test_a_limit_buy_is_booked_at_the_price_that_it_names(alice):
    alice.sees("AAPL", at="150")
    trade = alice.buys(10, "aapl", at="150.25")
    assert trade["price"] == Decimal("150.25")
    assert trade["market_price"] == 150
    assert trade["total_amount"] == Decimal("1502.5")
    assert trade["realized_pnl"] is None
    assert trade["cash_balance"] == alice.cash == Decimal("98497.5")
    assert alice.holdings == {"AAPL": (10, Decimal("1502.5"))}


def test_a_market_order_is_booked_at_the_market_price(alice):
    alice.sees("AAPL", at="150.125")
    assert alice.buys(2, "AAPL")["price"] == Decimal("150.125")
    assert alice.sells(1, "AAPL")["price"] == Decimal("150.125")


def test_a_sale_realises_its_profit_at_average_cost(alice):
    alice.sees("AAPL", at=100).buys(10, "AAPL")
    alice.sees("AAPL", at=200).buys(10, "AAPL")
    alice.sees("AAPL", at=180)
    assert alice.sells(5, "AAPL", at=170)["realized_pnl"] == 5 * (170 - 150)
    assert alice.holdings == {"AAPL": (15, 2250)}
    assert alice.portfolio["realized_pnl"] == 100


def test_selling_all_leaves_no_holding(alice, database):
    alice.sees("AAPL", at=3).buys(3, "AAPL")
    alice.sells(3, "AAPL")
    assert alice.holdings == {}
    assert database.run("SELECT * FROM ibkr_stock_balances WHERE user_id = :id", id=alice.user_id) == []


def test_the_smallest_quantity_trades_and_rounding_never_makes_money(alice):
    alice.sees("BTC-USD", at="42910.12345678")
    bought = alice.buys("0.00000001", "BTC-USD")
    assert bought["total_amount"] == Decimal("0.00042911")
    sold = alice.sells("0.00000001", "BTC-USD")
    assert sold["total_amount"] == Decimal("0.0004291")
    assert sold["realized_pnl"] == Decimal("-0.00000001")


def test_digits_survive_where_a_float_would_lose_them(server):
    alice = server.trader(cash="12345678901.12345678")
    assert alice.cash == Decimal("12345678901.12345678")
    alice.sees("AAPL", at="0.00000001").buys(1, "AAPL")
    assert alice.cash == Decimal("12345678901.12345677")
    assert '"cash_balance":12345678901.12345677' in alice.ask("GET", "/api/v1/balance").text


def test_a_json_number_and_a_string_mean_the_same(alice):
    alice.sees("AAPL", at=1)
    for quantity in ("1.10", "11e-1", '"1.1"'):
        body = f'{{"ticker": "AAPL", "action": "buy", "quantity": {quantity}}}'
        trade = alice.ask("POST", "/api/v1/trade", data=body, headers={"Content-Type": "application/json"})
        assert '"quantity":1.1,' in trade.text


REFUSALS = [
    ("buy", 1, "149.99", "price_below_market", "You offer 149.99 and AAPL costs 150."),
    ("sell", 1, "150.01", "price_above_market", "You ask 150.01 and AAPL brings 150."),
    ("buy", 10, "150.25", "insufficient_funds", "This costs 1502.5 and you have 850."),
    ("sell", 2, "150", "insufficient_shares", "This sells 2 AAPL and you have 1."),
]


@pytest.mark.parametrize(("action", "quantity", "price", "code", "sentence"), REFUSALS)
def test_a_refusal_says_its_arithmetic_and_changes_nothing(server, action, quantity, price, code, sentence):
    alice = server.trader(cash=1000)
    alice.sees("AAPL", at=150).buys(1, "AAPL")
    before = alice.books
    response = alice.order(action, quantity, "AAPL", price)
    assert response.status_code == 409
    assert response.json()["code"] == code
    assert response.json()["detail"] == sentence
    assert alice.books == before


def test_a_refusal_carries_its_numbers(server):
    alice = server.trader(cash=1000).sees("AAPL", at=150)
    refusal = alice.buys(10, "AAPL")
    assert (refusal["required"], refusal["available"]) == (1500, 1000)


def test_no_account_reaches_ninety_thousand_million(server):
    alice = server.trader(cash="89999999999.99999999").sees("AAPL", at=1)
    alice.buys(1, "AAPL")
    alice.sees("AAPL", at=2)
    before = alice.books
    assert alice.sells(1, "AAPL")["code"] == "limit_exceeded"
    assert alice.books == before


def test_an_unknown_ticker_is_not_found(alice):
    assert alice.buys(1, "NOPE")["code"] == "unknown_ticker"
    assert alice.ask("GET", "/api/v1/price/NOPE").status_code == 404


def test_a_price_carries_its_source_and_when_it_holds(alice):
    price = alice.get("/api/v1/price/aapl")
    assert (price["ticker"], price["currency"], price["source"]) == ("AAPL", "USD", "sample")
    assert price["timestamp"] < price["valid_until"]


def test_the_portfolio_adds_up(alice):
    alice.sees("AAPL", at=100).sees("IBM", at=50)
    alice.buys(10, "AAPL")
    alice.buys(3, "IBM", at=60)
    alice.sees("AAPL", at="133.33333333")
    portfolio = alice.portfolio
    assert [holding["ticker"] for holding in portfolio["holdings"]] == ["AAPL", "IBM"]
    apple = portfolio["holdings"][0]
    assert apple["market_value"] == Decimal("1333.3333333")
    assert apple["unrealized_pnl_percent"] == Decimal("33.33")
    assert portfolio["total_invested_value"] == 1180
    assert portfolio["market_value"] == Decimal("1483.3333333")
    assert portfolio["equity"] == portfolio["cash_balance"] + portfolio["market_value"]
    assert portfolio["total_pnl"] == portfolio["unrealized_pnl"] + portfolio["realized_pnl"]


# History


def test_paging_neither_skips_nor_repeats_while_others_trade(alice, bob):
    alice.sees("AAPL", at=1)
    bob.sees("AAPL", at=1)
    ids = [alice.buys(1, "AAPL")["id"] for _ in range(7)]
    seen, cursor = [], None
    while True:
        page = alice.get("/api/v1/trades", limit=2, **({"cursor": cursor} if cursor else {}))
        seen += [trade["id"] for trade in page["trades"]]
        cursor = page["next_cursor"]
        alice.buys(1, "AAPL")
        bob.buys(1, "AAPL")
        if cursor is None:
            break
    assert seen == ids[::-1]


def test_trades_are_filtered_by_ticker_action_and_time(alice):
    alice.sees("AAPL", at=1).sees("IBM", at=1)
    first, second, third = alice.buys(2, "AAPL"), alice.buys(2, "IBM"), alice.sells(1, "AAPL")

    def ids(**filters):
        return [trade["id"] for trade in alice.get("/api/v1/trades", **filters)["trades"]]

    assert ids(ticker="aapl") == [third["id"], first["id"]]
    assert ids(action="sell") == [third["id"]]
    assert ids(since=second["timestamp"]) == [third["id"], second["id"]]
    assert ids(until=second["timestamp"]) == [first["id"]]


def test_the_csv_has_all_trades_with_their_digits(alice):
    alice.sees("AAPL", at="0.1")
    alice.buys("0.00000001", "AAPL")
    alice.buys(3, "AAPL")
    response = alice.ask("GET", "/api/v1/trades.csv", params={"action": "buy"})
    header, newest, oldest = response.text.splitlines()
    assert response.headers["Content-Type"] == "text/csv; charset=utf-8"
    assert header.startswith("id,run,timestamp,ticker,trade_type,quantity,price")
    assert ",AAPL,buy,3,0.1,0.3,0,,99999.69999999,0.1,sample" in newest
    assert ",AAPL,buy,0.00000001,0.1,0.00000001,0,," in oldest


def test_nobody_sees_what_is_anothers(alice, bob):
    trade = alice.sees("AAPL", at=1).buys(1, "AAPL", key="mine")
    alice.buys(1, "AAPL")
    assert bob.ask("GET", f"/api/v1/trades/{trade['id']}").status_code == 404
    assert bob.ask("GET", "/api/v1/trades", params={"cursor": trade["id"]}).status_code == 400
    assert alice.get(f"/api/v1/trades/{trade['id']}") == trade
    assert bob.sees("AAPL", at=1).buys(5, "AAPL", key="mine")["quantity"] == 5


# Idempotency


def test_a_repeated_order_is_booked_once_and_answered_the_same(alice):
    alice.sees("AAPL", at=100)
    first = alice.order("buy", "10", "AAPL", "100", key="k")
    again = alice.order("buy", "10.0", "aapl", "100.00", key="k")
    assert (again.status_code, again.text) == (200, first.text)
    assert again.headers["Idempotent-Replayed"] == "true"
    assert "Idempotent-Replayed" not in first.headers
    assert len(alice.trades) == 1


def test_a_key_with_another_order_is_refused(alice):
    alice.sees("AAPL", at=100).buys(10, "AAPL", key="k")
    for order in (("buy", 11, "AAPL"), ("sell", 10, "AAPL"), ("buy", 10, "IBM"), ("buy", 10, "AAPL", 100)):
        response = alice.order(*order, key="k")
        assert (response.status_code, response.json()["code"]) == (422, "idempotency_key_reused")
    assert len(alice.trades) == 1


def test_a_refused_order_does_not_use_its_key_up(server):
    alice = server.trader(cash=100).sees("AAPL", at=150)
    assert alice.buys(1, "AAPL", key="k")["code"] == "insufficient_funds"
    alice.sees("AAPL", at=50)
    assert alice.buys(1, "AAPL", key="k")["total_amount"] == 50


# Rehearsal


def test_a_rehearsal_answers_as_the_trade_would_and_writes_nothing(alice):
    alice.sees("AAPL", at=100)
    before = alice.books
    rehearsal = alice.buys(3, "AAPL", key="k", params={"dry_run": "true"})
    assert alice.books == before
    trade = alice.buys(3, "AAPL", key="k")
    assert rehearsal.pop("dry_run") is True
    assert rehearsal | {"id": trade["id"], "timestamp": trade["timestamp"]} == trade


# Who may come in


@pytest.mark.parametrize("header", [None, "Bearer", "Bearer wrong", "Basic dGVzdA==", "Bearer \xff\xfe"])
def test_without_a_good_key_nobody_comes_in(server, header):
    headers = {"Authorization": header.encode("latin-1")} if header else {}
    for path in ("/api/v1/balance", "/api/v1/trade", "/api/v1/users", "/api/nothing"):
        response = requests.get(f"{server.url}{path}", headers=headers, timeout=10)
        assert response.status_code == 401
        assert response.headers["WWW-Authenticate"] == "Bearer"
        assert response.json()["code"] == "unauthorized"


def test_private_answers_are_not_to_be_stored(alice, server):
    assert alice.ask("GET", "/api/v1/balance").headers["Cache-Control"] == "no-store"
    assert requests.get(f"{server.url}/api/v1/x", timeout=9).headers["Cache-Control"] == "no-store"


def test_a_users_key_manages_no_accounts(alice):
    response = alice.ask("GET", "/api/v1/users")
    assert (response.status_code, response.json()["code"]) == (403, "forbidden")


def test_health_says_how_the_server_is(server, engine_name):
    health = requests.get(f"{server.url}/health", timeout=10).json()
    assert health["status"] == health["database"]["status"] == "healthy"
    assert health["database"]["engine"] == engine_name
    assert health["server_info"].keys() == {
        "platform",
        "platform_version",
        "architecture",
        "python_version",
        "cpu_count",
        "memory_total_gb",
        "memory_available_gb",
        "cpu_percent",
    }
    assert health["requests"].keys() == {"count", "errors", "latency_ms"}
