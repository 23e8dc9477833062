"""The rules of trading, without a database: an account, an order, a quote, and what becomes of them."""

import sys
from datetime import timedelta
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent.parent))

from messages import ACCOUNT_LIMIT, UNIT, Order, Refused, now, plain
from models import Account, Costs, Holding, Quote, QuoteExpired, Trade, in_lieu


def account(cash="1000"):
    return Account(user_id=1, run=1, cash_balance=Decimal(cash), starting_cash=Decimal(cash))


def holding(quantity="0", cost="0"):
    return Holding(ticker="AAPL", quantity=Decimal(quantity), cost_basis=Decimal(cost))


def order(action, quantity, price=None):
    limit = {} if price is None else {"price": str(price)}
    return Order(ticker="AAPL", action=action, quantity=str(quantity), **limit)


def quote(price, currency="USD", **more):
    kind = {"ticker": "AAPL", "source": "sample"}
    return Quote(price=Decimal(price), currency=currency, timestamp=now(), **kind, **more)


def test_buying_takes_cash_and_adds_to_the_cost_of_the_holding():
    alice, apple = account("1000"), holding("1", "90")
    trade = alice.fill(order("buy", 2, "110"), quote("100"), apple)
    assert (trade.price, trade.total_amount, trade.cash_after) == (110, 220, 780)
    assert (alice.cash_balance, apple.quantity, apple.cost_basis) == (780, 3, 310)


def test_selling_takes_its_share_of_the_cost_out():
    alice, apple = account("0"), holding("3", "100")
    trade = alice.fill(order("sell", 1), quote("50"), apple)
    assert apple.cost_basis == Decimal("66.66666667")
    assert trade.realized_pnl == Decimal("16.66666667")


def test_the_last_share_takes_all_of_the_cost_that_is_left():
    alice, apple = account("0"), holding("3", "100")
    for _ in range(3):
        alice.fill(order("sell", 1), quote("50"), apple)
    assert (apple.quantity, apple.cost_basis, alice.cash_balance) == (0, 0, 150)


def test_a_buy_rounds_up_and_a_sale_rounds_down():
    alice, apple = account("1"), holding()
    tiny = order("buy", "0.00000001")
    assert alice.fill(tiny, quote("0.00000001"), apple).total_amount == UNIT
    assert alice.fill(order("sell", "0.00000001"), quote("0.00000001"), apple).total_amount == 0


def test_commission_costs_a_buyer_and_a_seller():
    costs = Costs(commission_bps=Decimal(10), commission_min=Decimal(1))
    alice, apple = account("10000"), holding()
    bought = alice.fill(order("buy", 10), quote("500"), apple, costs)
    assert (bought.commission, apple.cost_basis, alice.cash_balance) == (5, 5005, 4995)
    sold = alice.fill(order("sell", 1), quote("500"), apple, costs)
    assert (sold.commission, sold.realized_pnl) == (1, 500 - 1 - Decimal("500.5"))


def test_slippage_moves_market_orders_only_and_against_the_trader():
    costs = Costs(slippage_bps=Decimal(50))
    alice, apple = account("10000"), holding("10", "1")
    assert alice.fill(order("buy", 1), quote("100"), apple, costs).price == Decimal("100.5")
    assert alice.fill(order("sell", 1), quote("100"), apple, costs).price == Decimal("99.5")
    assert alice.fill(order("buy", 1, 100), quote("100"), apple, costs).price == 100


def test_a_commission_that_neither_the_sale_nor_the_cash_covers_is_refused():
    alice, apple = account("1"), holding("1", "1")
    with pytest.raises(Refused, match="more than"):
        alice.fill(order("sell", 1), quote("1"), apple, Costs(commission_min=Decimal(3)))


@pytest.mark.parametrize(
    ("wanted", "asked", "code"),
    [
        (order("buy", 1, "99.99999999"), quote("100"), "price_below_market"),
        (order("sell", 1, "100.00000001"), quote("100"), "price_above_market"),
        (order("buy", "10.00000001"), quote("100"), "insufficient_funds"),
        (order("sell", "5.00000001"), quote("100"), "insufficient_shares"),
        (order("buy", 1), quote("100", "EUR"), "unsupported_currency"),
        (order("buy", 1), quote("100", None), "unsupported_currency"),
    ],
)
def test_a_refused_order_changes_nothing(wanted, asked, code):
    alice, apple = account("1000"), holding("5", "400")
    with pytest.raises(Refused) as refusal:
        alice.fill(wanted, asked, apple)
    assert refusal.value.code == code
    assert (alice.cash_balance, apple.quantity, apple.cost_basis) == (1000, 5, 400)


def test_a_quote_that_has_expired_judges_no_trade():
    with pytest.raises(QuoteExpired):
        account().fill(order("buy", 1), quote("1", valid_until=now()), holding())
    account().fill(order("buy", 1), quote("1", valid_until=now() + timedelta(seconds=9)), holding())


def test_a_loss_that_the_books_cannot_hold_is_refused_and_changes_nothing():
    """The commission comes on top of all that a holding may have cost."""
    alice, gone = account("9000000"), holding("1", ACCOUNT_LIMIT - 10)
    costs = Costs(commission_min=Decimal(11) + 1)
    with pytest.raises(Refused) as refusal:
        alice.fill(order("sell", 1), quote("1"), gone, costs)
    assert refusal.value.code == "limit_exceeded"
    assert (alice.cash_balance, gone.quantity, gone.cost_basis) == (9_000_000, 1, ACCOUNT_LIMIT - 10)
    fill = alice.fill(order("sell", 1), quote("1"), gone, Costs(commission_min=Decimal(11)))
    assert fill.realized_pnl == -ACCOUNT_LIMIT


@pytest.mark.parametrize("field", ["quantity", "cost_basis"])
def test_a_holding_stays_below_the_limit_of_an_account(field):
    full = holding(**{"quantity": "1", "cost": "1"})
    setattr(full, field, ACCOUNT_LIMIT - 1)
    with pytest.raises(Refused, match="stays below"):
        account("10").fill(order("buy", 1), quote("1"), full)


def test_digits_are_shown_plainly():
    shown = [plain(Decimal(n)) for n in ("1E-8", "1E+2", "10.50", "-0", "-0.00", "1499.95000000")]
    assert shown == ["0.00000001", "100", "10.5", "0", "0", "1499.95"]


amounts = st.decimals("0.00000001", "9999999999", places=8)
deals = st.lists(st.tuples(st.booleans(), amounts, amounts), max_size=25)


@settings(max_examples=300)
@given(st.decimals("0", "89999999999", places=8), deals)
def test_the_books_agree_with_exact_fractions_whatever_is_traded(cash, orders):
    """An oracle of its own: cash and cost as fractions, rounded by integer division alone."""
    alice, apple = account(cash), holding()
    unit = 10**8
    cash_units, shares, cost = int(cash * unit), 0, 0
    realized = 0
    for is_buy, quantity, price in orders:
        if not is_buy and shares:
            quantity = Decimal(int(quantity * unit) % shares + 1) / unit
        exact = Fraction(quantity) * Fraction(price) * unit
        total = -(-exact.numerator // exact.denominator) if is_buy else exact.numerator // exact.denominator
        try:
            trade = alice.fill(
                order("buy" if is_buy else "sell", f"{quantity:f}", f"{price:f}"), quote(price), apple
            )
        except Refused:
            continue
        if is_buy:
            cash_units, shares, cost = cash_units - total, shares + int(quantity * unit), cost + total
        else:
            sold = int(quantity * unit)
            taken = cost if sold == shares else round(Fraction(cost * sold, shares))
            cash_units, shares, cost = cash_units + total, shares - sold, cost - taken
            realized += total - taken
            assert trade.realized_pnl * unit == total - taken
        assert trade.total_amount * unit == total
        assert (alice.cash_balance * unit, apple.quantity * unit, apple.cost_basis * unit) == (
            cash_units,
            shares,
            cost,
        )
        assert min(cash_units, shares, cost) >= 0
        assert cash_units + cost == int(cash * unit) + realized


@settings(max_examples=300)
@given(amounts, amounts, st.integers(1, 10_000), st.integers(1, 10_000))
def test_a_split_makes_no_money_and_loses_none(quantity, price, new, old):
    """What its shares are rounded down by is paid at the new price; the cost stays while there are any."""
    alice, apple = account("5"), holding(f"{quantity:f}", "100")
    trade = Trade(trade_type="split", quantity=quantity, ratio=f"{new}:{old}", price=price)
    trade.total_amount = in_lieu(trade)
    exact = Fraction(quantity) * new / old
    if exact >= ACCOUNT_LIMIT:
        with pytest.raises(Refused, match="stay below"):
            alice.receive(trade, apple)
        return
    alice.receive(trade, apple)
    left = exact - Fraction(apple.quantity)
    assert 0 <= left < Fraction(UNIT)
    assert Fraction(alice.cash_balance) == 5 + left * Fraction(price) // Fraction(UNIT) * Fraction(UNIT)
    assert apple.cost_basis == (100 if apple.quantity else 0)
    assert alice.cash_balance + apple.cost_basis == 105 + trade.realized_pnl


def test_a_third_of_a_unit_at_three_dollars_is_paid_out_in_full():
    split = Trade(trade_type="split", quantity=UNIT, ratio="1:3", price=Decimal(3))
    assert (split.change(), in_lieu(split)) == (-UNIT, UNIT)
