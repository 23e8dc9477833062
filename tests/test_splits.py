"""Splits and dividends of the recorded market, and what an admin corrects."""

from decimal import Decimal
from inspect import unwrap

import pytest
import requests
from cast import ADMIN, Database, Here, Trader, exact, flask
from sqlalchemy import inspect
from sqlalchemy.exc import DBAPIError

DAYS = [f"2024-06-{day:02}T00:00:00Z" for day in (3, 4, 5, 6, 7, 10)]
FILE = """date,ticker,price,dividend,split
2024-06-03,XYZ,1200,,
2024-06-04,XYZ,1210,,
2024-06-05,XYZ,121,,10:1
2024-06-06,XYZ,122,0.5,
2024-06-07,XYZ,84,0.3,1.5
2024-06-10,XYZ,660,,1:8
2024-06-03,OTHER,100,,
2024-06-10,OTHER,101,1,
"""


@pytest.fixture(scope="module")
def recorded(new_database, tmp_path_factory):
    file = tmp_path_factory.mktemp("recorded") / "market.csv"
    file.write_text(FILE)
    with Here(new_database().migrate().url, SAMPLE_MARKET=file, CORPORATE_ACTIONS="on") as server:
        yield server


@pytest.fixture
def carol(recorded) -> Trader:
    """Somebody whose clock stands at the first bar."""
    return recorded.trader(name="carol").goes_to(DAYS[0])


def corrects(server, user_id, key=None, **wanted):
    headers = {"Authorization": f"Bearer {ADMIN}"} | ({"Idempotency-Key": key} if key else {})
    answer = requests.post(
        f"{server.url}/api/v1/users/{user_id}/corrections", json=wanted, headers=headers, timeout=30
    )
    server.witness.hears(answer)
    return answer


def rows(trader) -> list[tuple]:
    """Those trades that are no purchase and no sale, oldest first."""
    told = ("trade_type", "quantity", "ratio", "price", "total_amount", "market_time")
    trades = [t for t in trader.trades[::-1] if t["trade_type"] not in ("buy", "sell")]
    return [tuple(trade[name] for name in told) for trade in trades]


def test_a_clock_that_passes_the_day_books_what_it_brings(carol):
    carol.buys(10, "XYZ")
    assert [fill["trade_type"] for fill in carol.advances(2)["fills"]] == ["split"]
    assert carol.holdings["XYZ"] == (100, 12_000)
    carol.advances(2)
    assert rows(carol) == [
        ("split", 10, "10:1", 121, 0, DAYS[2]),
        ("dividend", 100, None, Decimal("0.5"), 50, DAYS[3]),
        ("dividend", 100, None, Decimal("0.3"), 30, DAYS[4]),  # Before the split of that day.
        ("split", 100, "3:2", 84, 0, DAYS[4]),
    ]
    assert carol.cash == 88_000 + 80
    assert carol.audit() == {"ok": True, "trades": 5, "differences": []}


def test_equity_does_not_jump_at_a_split_and_no_drawdown_comes_of_one(carol):
    carol.buys(10, "XYZ")
    carol.advances(2)
    summary = carol.get("/api/v1/account/history", resolution="bar")["summary"]
    assert summary["equity"] == 100_100
    assert summary["max_drawdown_percent"] == 0
    carol.advances(3)
    history = carol.get("/api/v1/account/history", resolution="bar")
    assert min(point["equity"] for point in history["points"]) == 100_000
    assert history["summary"]["dividends"] == history["summary"]["realized_pnl"] == 80
    assert history["summary"]["trades"] == 1
    assert history["summary"]["win_rate_percent"] is None  # A dividend is no sale.


def test_who_jumps_over_the_day_has_it_and_who_goes_back_gives_it_back(carol):
    carol.buys(10, "XYZ")
    carol.goes_to(DAYS[4])
    assert carol.holdings["XYZ"][0] == 150
    carol.goes_to(DAYS[1])
    assert carol.holdings["XYZ"] == (10, 12_000)
    assert [row[:3] for row in rows(carol)][-2:] == [("split", 150, "2:3"), ("split", 100, "1:10")]
    assert carol.cash == 88_080  # Dividends stay.
    assert carol.audit()["ok"]


def test_what_is_bought_on_the_day_is_bought_without_it(carol):
    carol.goes_to(DAYS[2]).buys(10, "XYZ")
    assert rows(carol) == []
    carol.advances(1)
    assert [row[0] for row in rows(carol)] == ["dividend"]


def test_open_orders_follow_a_split_before_they_see_its_price(carol):
    carol.buys(10, "XYZ")
    bid = carol.rests("buy", 2, "XYZ", limit_price=1100, take_profit={"limit_price": 1300})
    stop = carol.rests("sell", 10, "XYZ", "stop", stop_price=1000)
    trailing = carol.rests("buy", 1, "XYZ", "trailing_stop", trail_amount=50)
    carol.advances(2)
    told = ("status", "quantity", "limit_price", "stop_price", "trail_amount", "reserved_cash")
    leg = next(order for order in carol.orders if order["parent_id"] == bid["id"])
    assert [carol.finds(bid)[name] for name in told] == ["open", 20, 110, None, None, 2200]
    assert [leg[name] for name in told[:3]] == ["held", 20, 130]
    assert [carol.finds(stop)[name] for name in told] == ["open", 100, None, 100, None, 0]
    assert [carol.finds(trailing)[name] for name in told[:5]] == ["open", 10, None, 125, 5]
    assert carol.audit()["ok"]


def test_an_order_of_which_a_split_leaves_nothing_is_canceled_with_the_reason(carol):
    carol.goes_to(DAYS[4]).buys(10, "XYZ")
    dust = carol.rests("buy", "0.00000007", "XYZ", limit_price=80)
    carol.advances(1)
    found = carol.finds(dust)
    assert (found["status"], found["reason"]) == ("canceled", "A split of 1:8 leaves no such order.")
    assert found["quantity"] == Decimal("0.00000007")
    assert carol.get("/api/v1/balance")["reserved_cash"] == 0


def test_a_holding_of_which_a_split_leaves_nothing_ends_with_its_cost(carol):
    carol.goes_to(DAYS[4]).buys("0.00000007", "XYZ")
    cost = 100_000 - carol.cash
    carol.advances(1)
    assert carol.holdings == {}
    (split,) = [trade for trade in carol.trades if trade["trade_type"] == "split"]
    assert split["total_amount"] == Decimal("0.00000577")  # 0.875 of 10^-8 shares, at 660.
    assert split["realized_pnl"] == split["total_amount"] - cost
    assert carol.audit()["ok"]


def test_a_reset_leaves_the_splits_of_the_run_before_behind(carol):
    carol.buys(10, "XYZ")
    carol.advances(2)
    carol.ask("POST", "/api/v1/account/reset", json={"cash": 500})
    assert carol.holdings == {}
    assert rows(carol) == []
    assert len(carol.get("/api/v1/trades", run=1, action="SPLIT")["trades"]) == 1
    assert carol.audit()["ok"]


def test_a_rehearsal_leaves_no_split_behind(recorded, carol):
    """On a running clock that has passed one since anybody looked."""
    carol.buys(10, "XYZ")
    carol.ask("PUT", "/api/v1/market/clock", json={"at": None})
    before = len(rows(carol))
    order = {"ticker": "OTHER", "action": "buy", "quantity": 1}
    assert exact(carol.ask("POST", "/api/v1/trade?dry_run=true", json=order))["id"] is None
    assert carol.audit()["ok"]
    assert len(rows(carol)) - before <= 3


def test_the_log_tells_what_came_of_a_tick_once_it_is_committed_and_of_a_rehearsal_nothing(
    recorded, carol, caplog, monkeypatch
):
    carol.buys(10, "XYZ")
    order = carol.rests("buy", 1, "OTHER", limit_price=50)
    with caplog.at_level("INFO"):
        carol.advances(2)
        carol.sees("OTHER", at=49)
        told = [line for line in caplog.messages if f": user {carol.user_id} " in line]
    split, fill = (line for line in told if not line.startswith("127.0.0.1"))
    assert split.endswith(f": user {carol.user_id} split 10:1 of 10 XYZ and 0 dollars")
    assert fill.startswith(f"order {order['id']} is filled by trade ")
    caplog.clear()
    carol.ask("PUT", "/api/v1/market/clock", json={"at": None})
    app = recorded.program["app"]
    routes = unwrap(app.view_functions["set_clock"]).__globals__
    locked = routes["locked"]

    def brings_something(*asked):
        account = locked(*asked)
        routes["log_once_committed"]("what is undone")
        return account

    monkeypatch.setitem(routes, "locked", brings_something)
    rehearsal = {"ticker": "OTHER", "action": "buy", "quantity": 1}
    with caplog.at_level("INFO"):
        carol.ask("POST", "/api/v1/trade?dry_run=true", json=rehearsal)
        assert "what is undone" not in caplog.messages
        carol.ask("POST", "/api/v1/trade", json=rehearsal)
        assert "what is undone" in caplog.messages


def test_trades_are_told_by_type_and_in_csv(carol):
    carol.buys(10, "XYZ")
    carol.advances(3)
    (split,) = carol.get("/api/v1/trades", action="split")["trades"]
    assert (split["ratio"], split["order_id"], split["commission"]) == ("10:1", None, 0)
    lines = carol.ask("GET", "/api/v1/trades.csv", params={"action": "dividend"}).text.splitlines()
    assert len(lines) == 2
    assert ",dividend,100,0.5,50,0,50," in lines[1]


def test_the_rules_say_that_they_are_booked(carol):
    rules = carol.get("/api/v1/rules")
    assert rules["corporate_actions"] is True
    assert any("split" in rule for rule in rules["rules"])


def test_alpacas_activities_tell_them(recorded, carol):
    carol.buys(10, "XYZ")
    carol.advances(3)
    corrects(recorded, carol.user_id, ticker="XYZ", cash="-1.5", reason="A fee.")
    answer = carol.session.get(f"{recorded.url}/alpaca/v2/account/activities", timeout=30).json()
    told = ("activity_type", "qty", "per_share_amount", "net_amount", "description")
    assert [tuple(activity.get(name) for name in told) for activity in answer[:3]] == [
        ("JNLC", "0", None, "-1.5", "A fee."),
        ("DIV", "100", "0.5", "50", ""),
        ("SPLIT", "90", None, "0", "10:1"),
    ]
    only = carol.session.get(f"{recorded.url}/alpaca/v2/account/activities/DIV", timeout=30).json()
    assert [activity["activity_type"] for activity in only] == ["DIV"]


def test_an_admin_corrects_a_holding_and_it_is_a_trade_for_all_to_see(recorded, carol):
    carol.buys(10, "XYZ")
    reason = "XYZ is called OTHER now."
    gone = exact(corrects(recorded, carol.user_id, ticker="XYZ", quantity=-4, reason=reason))
    told = ("trade_type", "quantity", "total_amount", "realized_pnl", "price", "price_source", "reason")
    assert [gone[name] for name in told] == ["correction", -4, 0, -4800, None, "admin", reason]
    corrects(recorded, carol.user_id, ticker="OTHER", quantity="4", cash="0.25", reason=reason)
    assert carol.holdings == {"XYZ": (6, 7200), "OTHER": (4, 0)}
    assert carol.cash == 88_000 + Decimal("0.25")
    assert carol.trades[1] == gone
    assert carol.audit() == {"ok": True, "trades": 3, "differences": []}
    assert carol.get("/api/v1/account/history")["summary"]["equity"] == carol.portfolio["equity"]


def test_a_correction_takes_nothing_that_is_not_there_or_is_held_back(recorded, carol):
    carol.buys(10, "XYZ")
    carol.rests("sell", 8, "XYZ", limit_price=2000)
    carol.rests("buy", 1, "XYZ", limit_price=1000)
    before = carol.books
    for wanted, code in (
        ({"quantity": -3}, "insufficient_shares"),
        ({"cash": -87_001}, "insufficient_funds"),
        ({"cash": "89999999999"}, "limit_exceeded"),
        ({"quantity": "89999999999"}, "limit_exceeded"),
        ({}, "invalid_request"),
        ({"quantity": 0, "cash": 0}, "invalid_request"),
        ({"quantity": "1e999999999"}, "invalid_request"),
        ({"quantity": 1, "reason": " "}, "invalid_request"),
        ({"quantity": 1, "reason": "two\nlines"}, "invalid_request"),
        ({"quantity": 1, "reason": "x" * 301}, "invalid_request"),
        ({"quantity": 1, "price": 3}, "invalid_request"),
    ):
        answer = corrects(recorded, carol.user_id, **{"ticker": "XYZ", "reason": "Why not."} | wanted)
        assert answer.json()["code"] == code, answer.text
    assert carol.books == before
    assert corrects(recorded, 10**9, ticker="XYZ", cash=1, reason="Nobody.").status_code == 404
    own = {"ticker": "XYZ", "cash": 1, "reason": "Me."}
    answer = carol.ask("POST", f"/api/v1/users/{carol.user_id}/corrections", json=own)
    assert answer.json()["code"] == "forbidden"


def test_a_correction_that_is_sent_again_with_its_key_is_booked_once(recorded, carol):
    wanted = {"ticker": "XYZ", "quantity": 2, "reason": "They were promised."}
    first = corrects(recorded, carol.user_id, "one", **wanted)
    again = corrects(recorded, carol.user_id, "one", **wanted)
    assert again.headers["Idempotent-Replayed"] == "true"
    assert again.json() == first.json()
    assert carol.holdings["XYZ"][0] == 2
    assert corrects(recorded, carol.user_id, "one", **wanted | {"quantity": 3}).status_code == 422
    order = carol.order("buy", 2, "XYZ", key="one")
    assert order.json()["code"] == "idempotency_key_reused"


def test_a_correction_is_booked_though_the_account_gets_a_new_key_meanwhile(recorded, carol, monkeypatch):
    """Whose key that is does not concern the admin."""
    with_key, user = recorded.program["Account"].with_key, recorded.program["User"]

    def found(key_hash):
        account = with_key(key_hash)
        if account and account.user_id == carol.user_id:
            monkeypatch.setattr(recorded.program["Account"], "with_key", with_key)
            user.rotate_key(carol.user_id)
        return account

    monkeypatch.setattr(recorded.program["Account"], "with_key", found)
    answer = corrects(recorded, carol.user_id, ticker="XYZ", cash="1", reason="a present")
    assert (answer.status_code, answer.json()["cash_balance"]) == (201, 100_001)


def test_the_bundled_year_pays_what_apple_paid(new_database):
    with Here(new_database().migrate().url, CORPORATE_ACTIONS="") as server:
        dora = server.trader(name="dora").goes_to("2012-03-01T00:00:00Z")
        dora.buys(10, "AAPL")
        dora.advances(300)
        assert [(row[5][:10], row[3]) for row in rows(dora)] == [
            (day, Decimal("2.65")) for day in ("2012-08-09", "2012-11-07", "2013-02-07")
        ]
        assert dora.audit()["ok"]


def test_trades_of_the_new_types_are_lost_only_for_whoever_says_so(new_database, caplog, tmp_path):
    file = tmp_path / "market.csv"
    file.write_text(FILE)
    database = new_database().migrate()
    with Here(database.url, SAMPLE_MARKET=file, CORPORATE_ACTIONS="on") as server:
        dora = server.trader(name="dora").goes_to(DAYS[0])
        dora.buys(10, "XYZ")
        dora.advances(2)
    assert flask("db", "downgrade", "0011", DATABASE_URL=database.url).returncode == 1
    assert any("lose splits, dividends and corrections" in line for line in caplog.messages)
    assert flask("db", "check", DATABASE_URL=database.url).returncode == 0
    down = flask("db", "downgrade", "-x", "lose-data", "0011", DATABASE_URL=database.url)
    assert down.returncode == 0, down.stderr
    assert [row.trade_type for row in database.run("SELECT trade_type FROM ibkr_trades")] == ["buy"]
    assert flask("db", "upgrade", DATABASE_URL=database.url).returncode == 0


WRONG = {
    "an unknown type": {"trade_type": "'gift'"},
    "a purchase without a price": {"price": "NULL"},
    "a purchase of less than nothing": {"quantity": "-1"},
    "a purchase with a ratio": {"ratio": "'2:1'"},
    "a purchase with a reason": {"reason": "'why'"},
    "a purchase with a profit": {"realized_pnl": "1"},
    "a purchase of no type of order": {"order_type": "NULL"},
    "a split without its ratio": {"trade_type": "'split'", "order_type": "NULL", "realized_pnl": "0"},
    "a dividend with a ratio": {
        "trade_type": "'dividend'", "order_type": "NULL", "realized_pnl": "0", "ratio": "'2:1'"
    },
    "a correction without its reason": {
        "trade_type": "'correction'", "order_type": "NULL", "realized_pnl": "0", "price": "NULL",
        "market_price": "NULL",
    },
    "a correction with a price": {
        "trade_type": "'correction'", "order_type": "NULL", "realized_pnl": "0", "reason": "'why'"
    },
}  # fmt: skip


def test_no_trade_can_be_written_wrong_whoever_writes(recorded, carol):
    carol.buys(10, "XYZ")
    database = Database(recorded.database_url)
    names = [column["name"] for column in inspect(database.engine).get_columns("ibkr_trades")]
    names.remove("id")

    def copy(key: str, **changed) -> None:
        values = [changed.get(name, f"'{key}'" if name == "idempotency_key" else name) for name in names]
        database.run(
            f"INSERT INTO ibkr_trades ({', '.join(names)}) SELECT {', '.join(values)} FROM ibkr_trades "
            f"WHERE user_id = {carol.user_id} AND trade_type = 'buy'"
        )

    for what, changed in WRONG.items():
        with pytest.raises(DBAPIError, match="(?i)check|violates"):
            copy(what, **changed)
    right = {"trade_type": "'split'", "order_type": "NULL", "realized_pnl": "0", "ratio": "'2:1'"}
    copy("right", **right)
