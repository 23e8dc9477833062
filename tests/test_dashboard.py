"""The dashboard in a real browser: Chromium signs in, trades, looks and is left without a server.

Every test ends with what must be true of all of them: nothing complained on the console, nothing was
asked of any other server, and the key was in no address. The page sees the API alone, which is
tested on both databases elsewhere, so one of them is enough here.
"""

import os
import re
import shutil
import sys
import uuid
from contextlib import contextmanager
from decimal import Decimal
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from cast import ADMIN, ROOT, Here, Server, Trader
from playwright.sync_api import Browser, Page, Route, expect, sync_playwright

pytestmark = pytest.mark.parametrize("engine_name", ["sqlite"], indirect=True, scope="session")

AXE = ROOT / "tests" / "vendor" / "axe-core" / "axe.min.js"
NO_BROWSER = "There is no chromium here to look at the dashboard with: apt-get install chromium"
QUIET = [  # Without these a browser calls home, and a container has no GPU and no sandbox.
    *("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"),
    *("--disable-sync", "--no-first-run", "--disable-quic"),
]
MARKUP = "<b id=injected>B</b>"

expect.set_options(timeout=15_000)


class Visit:
    """Somebody at the dashboard, and all that the browser asked for and complained of meanwhile."""

    def __init__(self, page: Page, trader: Trader):
        self.page, self.trader, self.url = page, trader, trader.server.url
        self.asked, self.complaints, self.overlooked = [], [], []
        page.set_default_timeout(15_000)
        page.on("request", lambda request: self.asked.append(request.url))
        page.on("framenavigated", lambda frame: self.asked.append(frame.url))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("console", self.hear)

    def hear(self, message) -> None:
        if message.type == "error":
            self.complaints.append(message.text)

    def overlook(self, complaint: str) -> None:
        """Let pass what the test itself provokes: the browser logs every refusal as an error."""
        self.overlooked.append(complaint)

    @property
    def unexpected(self) -> list[str]:
        return [text for text in self.complaints if not any(known in text for known in self.overlooked)]

    def opens_the_page(self) -> "Visit":
        self.page.goto(self.url)
        expect(self["sign-in"]).to_be_visible()
        return self

    def signs_in(self, opens="dashboard") -> "Visit":
        self.opens_the_page()
        self["key"].fill(self.trader.key)
        self.presses("Open")
        expect(self[opens]).to_be_visible()
        return self

    def __getitem__(self, name: str):
        """The element with this id."""
        return self.page.locator(f"#{name}")

    def presses(self, name: str) -> "Visit":
        self.page.get_by_role("button", name=name, exact=True).click()
        return self

    def writes_an_order(self, action, quantity, ticker, at="") -> "Visit":
        self.page.get_by_role("radio", name=action.capitalize()).check()
        self["ticker"].fill(ticker)
        self["quantity"].fill(str(quantity))
        self["type"].select_option("now" if at else "market")
        if at:
            self["price"].fill(str(at))
        return self

    def writes_an_order_that_rests(self, action, quantity, ticker, order_type, **prices) -> "Visit":
        self.writes_an_order(action, quantity, ticker)["type"].select_option(order_type)
        for name, price in prices.items():
            self[name.replace("_", "-")].fill(str(price))
        return self

    def tabs_to(self, name: str) -> "Visit":
        """Press Tab until the element with this id or name has the focus, and shows it."""
        for _ in range(60):
            self.page.keyboard.press("Tab")
            at = "[document.activeElement.id, document.activeElement.ariaLabel]"
            outline = "getComputedStyle(document.activeElement).outlineStyle"
            if name in self.page.evaluate(at):
                assert self.page.evaluate(outline) == "solid", f"{name} does not show that it has the focus"
                return self
        raise AssertionError(f"Tab never comes to {name}.")

    def types(self, *keys: str) -> "Visit":
        """A word as it is, a key by its name."""
        for key in keys:
            is_key = key in ("Enter", "Space", "ArrowDown", "Shift+Tab")
            self.page.keyboard.press(key) if is_key else self.page.keyboard.type(key)
        return self

    def reads(self, name: str, words) -> "Visit":
        """Wait until the element with this id says `words`, which may be a part of it or a pattern."""
        expect(self[name]).to_contain_text(words)
        expect(self[name]).to_be_visible()
        return self

    def row(self, table: str) -> list[str]:
        """The cells of a table's first row."""
        return self[table].locator("tr").first.locator("th, td").all_inner_texts()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    chromium = shutil.which("chromium")
    if chromium is None and os.environ.get("CI") == "true":
        pytest.fail(NO_BROWSER)
    if chromium is None:
        pytest.skip(NO_BROWSER)
    # Beside its profile, which Playwright keeps elsewhere, it writes into the home folder.
    own = {"HOME": str(tmp_path_factory.mktemp("home"))}
    elsewhere = {name: value for name, value in os.environ.items() if not name.startswith("XDG_")} | own
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=QUIET, env=elsewhere)
        yield browser
        browser.close()


@contextmanager
def visiting(browser: Browser, trader: Trader, **options):
    """A new window for a trader, which ends with what must be true of every visit."""
    options = {"viewport": {"width": 1280, "height": 900}, "timezone_id": "Asia/Tokyo"} | options
    with browser.new_context(**options) as context:
        visit = Visit(context.new_page(), trader)
        yield visit
        visit.page.unroute_all(behavior="wait")
        asked = [url for url in visit.asked if urlsplit(url).scheme not in ("data", "blob", "about")]
        assert asked
        assert [url for url in asked if not url.startswith(f"{visit.url}/")] == []
        assert [url for url in visit.asked if trader.key in url] == []
        assert visit.unexpected == []


@pytest.fixture
def visit(browser, alice) -> Visit:
    """Alice on 1 June 2012, when AAPL closed at 560.99; the page is not open yet."""
    answer = alice.ask("PUT", "/api/v1/market/clock", json={"at": "2012-06-01T00:00:00Z"})
    assert answer.status_code == 200, answer.text
    with visiting(browser, alice) as visit:
        yield visit


# Signing in


def test_a_visitor_without_a_key_is_told_who_gives_one(visit):
    visit.opens_the_page().reads("sign-in", "Buy and sell shares and coins with simulated dollars")
    visit.reads("sign-in", "flask --app app user add EMAIL").presses("Use the test account")
    visit.reads("sign-in-problem", "This server has no test account").reads("sign-in", "No key yet?")
    visit.overlook("401 (UNAUTHORIZED)")


def test_a_visitor_from_elsewhere_is_offered_no_test_account(browser, alice):
    with visiting(browser, alice) as visit:
        visit.url = visit.url.replace("127.0.0.1", "broker.localhost")
        visit.opens_the_page().reads("sign-in", "flask --app app user add EMAIL")
        expect(visit["use-test-key"]).to_be_hidden()


@pytest.mark.usefixtures("engine_name")  # The embedded one is SQLite.
def test_the_test_account_is_one_click_on_a_computer_of_ones_own(browser, program):
    server = Server("", command=[sys.executable, "app.py"])
    server.folder = program
    with server, visiting(browser, Trader(server, "test@example.com", "test-api-key-123", 1)) as visit:
        visit.opens_the_page().presses("Use the test account").reads("equity", "100,000.00")
        expect(visit["equity-heading"]).to_be_focused()


def test_a_key_opens_its_account(visit):
    visit.signs_in()
    visit.reads("equity", "100,000.00").reads("cash", "100,000.00").reads("run-heading", "Run 1")
    visit.reads("holdings-none", "No holdings").reads("trades-none", "No trades")
    visit.reads("prices-from", "Sample market").reads("sample-band", "not today’s prices")


def test_an_unknown_key_is_refused_in_a_sentence(visit):
    visit.opens_the_page()
    visit["key"].fill("nobody-has-this-key")
    visit.presses("Open").reads("sign-in-problem", "The server does not know this key")
    expect(visit["dashboard"]).to_be_hidden()
    visit.overlook("401 (UNAUTHORIZED)")


def test_the_key_stays_in_the_tab_until_it_is_forgotten(visit):
    visit.signs_in()
    visit.page.reload()
    visit.reads("equity", "100,000.00")
    stored = "[sessionStorage.getItem('key'), sessionStorage.length, localStorage.length, document.cookie]"
    assert visit.page.evaluate(stored) == [visit.trader.key, 1, 0, ""]
    visit.presses("Forget the key")
    expect(visit["sign-in"]).to_be_visible()
    assert visit.page.evaluate(stored) == [None, 0, 0, ""]
    assert visit.trader.key not in visit.page.content()
    expect(visit["equity"]).to_be_empty()


def test_the_page_can_ask_no_other_server(visit):
    """Not only does it not: the browser is told to refuse, even for this server's other name."""
    visit.signs_in()
    elsewhere = visit.url.replace("127.0.0.1", "localhost")
    ask = "url => fetch(url, { mode: 'no-cors' }).then(() => 'answered', () => 'refused')"
    assert visit.page.evaluate(ask, f"{elsewhere}/health") == "refused"
    visit.overlook("Content Security Policy")


# Orders


def test_an_order_is_booked_and_shown(visit):
    alice = visit.trader
    visit.signs_in().writes_an_order("buy", 10, "aapl").reads("quote", "AAPL: 560.99 USD, 2012-06-01")
    visit.reads("estimate", "Costs about 5,609.90 USD").presses("Place buy order")
    visit.reads("order-result", "Bought 10 AAPL at 560.99 USD for 5,609.90 USD. Cash: 94,390.10 USD.")
    visit.reads("cash", "94,390.10").reads("market-value", "5,609.90").reads("equity", "100,000.00")
    assert visit.row("holdings-rows")[:7] == [
        *("AAPL", "10", "560.99", "560.9900", "5,609.90", "0.00", "0.00")
    ]
    assert visit.row("trades-rows")[1:11] == [
        *("2012-06-01 00:00:00", "Buy", "AAPL", "10", "560.99", "5,609.90", "0.00", ""),
        *("94,390.10", "Sample market"),
    ]
    assert alice.holdings == {"AAPL": (10, Decimal("5609.9"))}


def test_dollars_buy_and_all_sells(visit):
    visit.signs_in().writes_an_order("buy", "$1000", "aapl").presses("Place buy order")
    visit.reads("order-result", "Bought 1.78256296 AAPL at 560.99 USD")
    visit.writes_an_order("sell", "all", "AAPL").presses("Place sell order")
    visit.reads("order-result", "Sold 1.78256296 AAPL at 560.99 USD")
    assert visit.trader.holdings == {}


def test_a_price_that_is_good_for_selling_only_is_shown_as_stale(browser, new_database, tmp_path):
    """Of a holding whose ticker a changed file has no more."""
    database, file = new_database().migrate(), tmp_path / "prices.csv"
    file.write_text("date,GONE,HERE\n2020-01-01,10,5\n2020-01-02,11,6\n")
    with Here(database.url, SAMPLE_MARKET=file) as server:
        alice = server.trader()
        alice.ask("PUT", "/api/v1/market/clock", json={"at": "2020-01-02T00:00:00Z"})
        assert alice.buys(4, "GONE")["price"] == 11
    file.write_text("date,HERE\n2020-01-01,5\n2020-01-02,6\n")
    with Here(database.url, SAMPLE_MARKET=file) as alice.server, visiting(browser, alice) as visit:
        visit.signs_in().reads("equity", "100,000.00")
        assert "stale, of 2020-01-02" in visit.row("holdings-rows")
        visit.writes_an_order("buy", 1, "GONE").reads("quote", "stale, its market last saw it on 2020-01-02")


def test_a_ticker_is_written_as_people_write_it(visit):
    visit.signs_in().writes_an_order("buy", 2, "btc/usd").reads("quote", "BTC-USD: ")
    visit.reads("estimate", "Costs about").presses("Place buy order").reads(
        "order-result", "Bought 2 BTC-USD"
    )


def test_a_sale_shows_its_profit(visit):
    visit.trader.buys(10, "AAPL")
    visit.trader.sees("AAPL", at="570.99")
    visit.signs_in().reads("unrealized", "+100.00").presses("Sell AAPL…")
    expect(visit["quantity"]).to_have_value("10")
    visit["quantity"].fill("4")
    visit.presses("Place sell order").reads("order-result", "Sold 4 AAPL at 570.99 USD")
    visit.reads("order-result", "Profit: +40.00 USD.").reads("realized", "+40.00").reads("total", "+100.00")
    assert visit.trader.holdings["AAPL"][0] == 6


def test_a_refusal_shows_the_servers_sentence_and_books_nothing(visit):
    alice = visit.trader
    before = alice.books
    sentence = alice.order("buy", 1000, "AAPL").json()["detail"]
    visit.signs_in().writes_an_order("buy", 1000, "AAPL").presses("Place buy order")
    visit.reads("order-result", sentence)
    assert alice.books == before
    visit.overlook("Failed to load resource")


def test_a_rehearsal_tells_the_outcome_and_books_nothing(visit):
    before = visit.trader.books
    visit.signs_in().writes_an_order("buy", 10, "AAPL").presses("Rehearse")
    visit.reads("order-result", "This would buy 10 AAPL at 560.99 USD for 5,609.90 USD.")
    visit.reads("order-result", "Cash after it: 94,390.10 USD. Nothing has been booked.")
    assert visit.trader.books == before


def test_an_order_whose_answer_is_lost_is_sent_again_and_booked_once(visit):
    keys = []

    def lose_the_first_answer(route: Route):
        keys.append(route.request.headers["idempotency-key"])
        answer = route.fetch()  # The server books it either way.
        route.abort() if len(keys) == 1 else route.fulfill(response=answer)

    visit.page.route("**/api/v1/trade", lose_the_first_answer)
    visit.page.clock.install()
    visit.signs_in().writes_an_order("buy", 1, "AAPL").presses("Place buy order")
    visit.reads("order-result", "Sending the order again under the same key…")
    visit.page.clock.fast_forward("00:01")
    visit.reads("order-result", "Booked already").reads("order-result", "It is booked once.")
    assert len(keys) == 2
    assert len(set(keys)) == 1
    assert len(visit.trader.trades) == 1
    visit.overlook("net::ERR_FAILED")


def test_an_order_is_placed_by_keyboard_alone(visit):
    visit.opens_the_page().tabs_to("key").types(visit.trader.key, "Enter")
    expect(visit["equity-heading"]).to_be_focused()
    visit.tabs_to("ticker").types("AAPL").tabs_to("quantity").types("3")
    visit.tabs_to("type").types("ArrowDown").tabs_to("price").types("600")
    visit.tabs_to("rehearse").types("Space").reads("order-result", "This would buy 3 AAPL at 600.00 USD")
    expect(visit["rehearse"]).to_be_focused()
    visit.types("Shift+Tab", "Enter").reads("order-result", "Bought 3 AAPL")
    assert visit.trader.holdings["AAPL"][0] == 3


# Orders that rest


def test_a_bracket_is_placed_seen_and_canceled_by_keyboard_alone(visit):
    alice = visit.trader
    visit.signs_in().reads("orders-none", "No open orders")
    visit.tabs_to("ticker").types("AAPL").tabs_to("quantity").types("3").tabs_to("type").types("Limit that")
    visit.tabs_to("price").types("500").tabs_to("take-profit").types("650").tabs_to("stop-loss").types("450")
    visit.types("Enter").reads("order-result", "waits: buy 3 AAPL. 1,500.00 USD are held back for it.")
    visit.reads("order-result", "When it is filled, its take-profit and stop-loss will wait.")
    stop, gain, entry = alice.get("/api/v1/orders")["orders"]
    assert [order["status"] for order in (entry, gain, stop)] == ["open", "held", "held"]
    assert (entry["limit_price"], gain["limit_price"], stop["stop_price"]) == (500, 650, 450)

    visit.reads("orders-count", "3 · 1,500.00 USD held back")
    rows = visit["orders-rows"].locator("tr")
    cells = [rows.nth(i).locator("th, td").all_inner_texts() for i in range(3)]
    legs = f"Stop-loss of order {entry['id']}", f"Take-profit of order {entry['id']}"
    assert [row[:7] for row in cells] == [
        [stop["id"], "AAPL", "Sell", legs[0], "3", "", "450.00"],
        [gain["id"], "AAPL", "Sell", legs[1], "3", "650.00", ""],
        [entry["id"], "AAPL", "Buy", "Limit", "3", "500.00", ""],
    ]
    held, waits = ["until canceled", "held", "–"], ["until canceled", "open", "1,500.00 USD"]
    assert [row[8:11] for row in cells] == [held, held, waits]

    visit.tabs_to(f"Cancel order {stop['id']}").tabs_to(f"Cancel order {entry['id']}").types("Enter")
    visit.reads("orders-result", f"Order {entry['id']} is canceled, and the sales that hung on it.")
    expect(visit["orders-result"]).to_have_role("status")
    visit.reads("orders-none", "No open orders")
    expect(visit["orders-heading"]).to_be_focused()
    assert alice.get("/api/v1/orders")["orders"] == []
    assert alice.get("/api/v1/balance")["reserved_cash"] == 0


def test_a_stop_that_was_filled_is_among_the_trades(visit):
    alice = visit.trader
    alice.buys(10, "AAPL")
    visit.signs_in().writes_an_order_that_rests("sell", 4, "AAPL", "stop", stop="550")
    expect(visit["take-profit"]).to_be_hidden()
    visit.presses("Place sell order").reads("order-result", "waits: sell 4 AAPL.")
    visit.reads("orders-rows", "4 AAPL")
    [order] = alice.get("/api/v1/orders")["orders"]
    alice.sees("AAPL", at="540")
    visit.page.reload()
    visit.reads("trades-rows", "540.00").reads("orders-none", "No open orders")
    filled = visit.row("trades-rows")
    assert (filled[2:6], filled[8], filled[12]) == (["Sell", "AAPL", "4", "540.00"], "−83.96", order["id"])
    assert alice.get(f"/api/v1/orders/{order['id']}")["status"] == "filled"
    assert alice.holdings["AAPL"][0] == 6


def test_what_is_held_back_is_shown_once_and_not_offered_for_sale(visit):
    alice = visit.trader
    alice.buys(7, "AAPL")
    bracket = {"take_profit": {"limit_price": 650}, "stop_loss": {"stop_price": 450}}
    entry = {"ticker": "AAPL", "action": "buy", "quantity": 3, "order_type": "market"}
    assert alice.ask("POST", "/api/v1/orders", json=entry | bracket).json()["status"] == "filled"
    stop, gain = alice.get("/api/v1/orders")["orders"]
    visit.signs_in().reads("orders-rows", f"with order {gain['id']}")
    rows = visit["orders-rows"].locator("tr")
    held_back = [rows.nth(i).locator("th, td").all_inner_texts()[9:11] for i in range(2)]
    assert held_back == [["open", f"with order {gain['id']}"], ["open", "3 AAPL"]]
    visit.presses("Sell AAPL…")
    expect(visit["quantity"]).to_have_value("7")
    visit.presses(f"Cancel order {stop['id']}").reads("orders-none", "No open orders")
    visit.presses("Sell AAPL…")
    expect(visit["quantity"]).to_have_value("10")


def test_each_type_of_order_has_its_own_prices_and_is_placed_with_them(visit):
    alice = visit.trader
    alice.buys(10, "AAPL")
    visit.signs_in()
    fields = {
        "market": [], "now": ["price"], "limit": ["price"], "stop": ["stop"], "stop_limit": ["stop", "price"],
        "trailing_stop": ["trail"],
    }  # fmt: skip
    for order_type, names in fields.items():
        visit.writes_an_order_that_rests("buy", 1, "AAPL", order_type)
        shown = [name for name in ("stop", "price", "trail") if visit[name].is_visible()]
        rests = order_type not in ("market", "now")
        asks = [visit[name].is_visible() for name in ("time-in-force", "take-profit", "stop-loss")]
        assert (shown, asks, visit["rehearse"].is_hidden()) == (names, [rests] * 3, rests), order_type

    visit.writes_an_order_that_rests("buy", 1, "AAPL", "stop_limit", stop=600, price="610.5")
    visit["time-in-force"].select_option("day")
    visit.presses("Place buy order").reads("orders-rows", "610.50")
    visit.writes_an_order_that_rests("sell", 2, "AAPL", "trailing_stop", trail="2.5")
    visit.presses("Place sell order").reads("orders-rows", "2.5 %")
    visit.writes_an_order_that_rests("sell", 1, "AAPL", "limit", price="500")
    visit.presses("Place sell order").reads("order-result", "was filled at once, as trade")
    trailing, stop_limit = alice.get("/api/v1/orders")["orders"]
    kinds = ("order_type", "stop_price", "limit_price", "trail_percent", "time_in_force")
    assert [stop_limit[kind] for kind in kinds] == ["stop_limit", 600, Decimal("610.5"), None, "day"]
    assert trailing["trail_percent"] == Decimal("2.5")
    assert alice.holdings["AAPL"][0] == 9

    visit.presses("Cancel all").reads("orders-result", "2 orders are canceled.")
    visit.reads("orders-none", "No open orders")
    assert alice.get("/api/v1/orders")["orders"] == []


def test_an_order_that_rests_and_whose_answer_is_lost_is_placed_once(visit):
    keys = []

    def lose_the_first_answer(route: Route):
        if route.request.method != "POST":
            return route.continue_()
        keys.append(route.request.headers["idempotency-key"])
        answer = route.fetch()
        return route.abort() if len(keys) == 1 else route.fulfill(response=answer)

    visit.page.route("**/api/v1/orders", lose_the_first_answer)
    visit.page.clock.install()
    visit.signs_in().writes_an_order_that_rests("buy", 1, "AAPL", "limit", price=500)
    visit.presses("Place buy order").reads("order-result", "Sending the order again under the same key…")
    visit.page.clock.fast_forward("00:01")
    visit.reads("order-result", "Placed already").reads("order-result", "It is open, and placed once.")
    assert len(keys) == 2
    assert len(set(keys)) == 1
    assert len(visit.trader.get("/api/v1/orders")["orders"]) == 1
    visit.overlook("net::ERR_FAILED")


def test_refusals_of_orders_that_rest_are_sentences(visit):
    alice = visit.trader
    asked = {"ticker": "AAPL", "action": "buy", "quantity": 1000, "order_type": "limit", "limit_price": 500}
    too_much = alice.ask("POST", "/api/v1/orders", json=asked).json()["detail"]
    wrong = {"quantity": 1, "take_profit": {"limit_price": 400}}
    upside_down = alice.ask("POST", "/api/v1/orders", json=asked | wrong).json()["detail"]
    visit.signs_in().writes_an_order_that_rests("buy", 1000, "AAPL", "limit", price=500)
    visit.presses("Place buy order").reads("order-result", too_much)
    visit.writes_an_order_that_rests("buy", 1, "AAPL", "limit", price=500, take_profit=400)
    visit.presses("Place buy order").reads("order-result", upside_down)
    visit["take-profit"].fill("many")
    visit.presses("Place buy order")
    expect(visit["take-profit"]).to_have_attribute("aria-invalid", "true")
    assert alice.get("/api/v1/orders", status="all")["orders"] == []

    visit["take-profit"].fill("")
    visit.presses("Place buy order").reads("orders-rows", "AAPL")
    [order] = alice.get("/api/v1/orders")["orders"]
    visit.page.route("**/api/v1/orders?*", lambda route: route.abort())  # So that the page still shows it.
    alice.ask("DELETE", "/api/v1/orders")
    visit.presses(f"Cancel order {order['id']}").reads(
        "orders-result", f"Order {order['id']} is canceled already."
    )
    visit.overlook("Failed to load resource")


# What is shown


def pixels_of(page: Page, colour="--accent", chart="curve") -> int:
    """How many pixels of a chart have this colour, which the axes have not."""
    return page.evaluate(
        """([colour, chart]) => {
            const canvas = document.querySelector(`#${chart} canvas`);
            if (!canvas) return 0;
            const hex = getComputedStyle(document.documentElement).getPropertyValue(colour).trim();
            const accent = [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
            const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
            let found = 0;
            for (let at = 0; at < data.length; at += 4)
                found += data[at + 3] > 200 && accent.every((part, i) => Math.abs(part - data[at + i]) < 12);
            return found;
        }""",
        [colour, chart],
    )


def test_the_equity_curve_is_drawn_and_grows(visit):
    alice = visit.trader
    alice.buys(50, "AAPL")
    alice.ask("POST", "/api/v1/market/advance", json={"bars": 20})
    alice.sells(10, "AAPL")
    equity = f"{alice.portfolio['equity']:,.2f}"
    visit.signs_in()
    expect(visit["curve"].locator("canvas")).to_be_visible()
    visit.reads("readout", f"{equity} USD")
    points = len(alice.get("/api/v1/account/history", resolution="bar")["points"])
    assert points > 20
    said = f"from 100,000.00 USD to {equity} USD, {points} points"
    assert said in visit["curve"].get_attribute("aria-label")
    assert pixels_of(visit.page) > 300
    before = alice.portfolio["equity"]
    visit.presses("+20").reads("clock-now", "2012-07-30")
    assert alice.portfolio["equity"] != before
    visit.reads("readout", f"{alice.portfolio['equity']:,.2f} USD")
    assert pixels_of(visit.page) > 300


def test_a_curve_of_very_many_bars_is_asked_for_by_the_day(visit):
    """A run with so many takes long to make, so here the server's answer is lengthened on the way."""
    asked = []

    def lengthened(route: Route):
        asked.append(re.search("resolution=([a-z]+)", route.request.url)[1])
        answer = route.fetch()
        history = answer.json()
        route.fulfill(response=answer, json=history | {"points": history["points"][-1:] * 5001})

    visit.page.route("**/api/v1/account/history?*", lengthened)
    visit.signs_in().reads("readout", "100,000.00 USD").presses("+1 bar").reads("clock-now", "2012-06-04")
    visit.reads("readout", "2012-06-04")
    assert asked == ["bar", "day"]


def test_the_drawdown_hangs_below_the_equity_curve(visit):
    alice = visit.trader
    alice.buys(100, "AAPL")
    for price in ("600", "540"):
        alice.sees("AAPL", at=price)
        alice.buys(1, "AAPL")
    fall = alice.get("/api/v1/account/history")["summary"]["max_drawdown_percent"]
    assert fall > 5
    visit.signs_in().reads("readout", f"{fall:.2f} % below its peak")
    assert pixels_of(visit.page, "--loss") > 50


def test_a_chart_of_a_holding_marks_its_purchases_and_sales(visit):
    alice = visit.trader
    alice.buys(10, "AAPL")
    alice.buys(1, "IBM")
    alice.ask("POST", "/api/v1/market/advance", json={"bars": 10})
    visit.signs_in().tabs_to("AAPL, chart of its price").types("Enter")
    expect(visit["chart-heading"]).to_be_focused()
    visit.reads("chart-heading", "AAPL").reads("chart-said", "with ▲ 1 purchase and ▼ 0 sales.")
    [last] = alice.get("/api/v1/bars/AAPL", limit=1)["bars"]
    visit.reads("chart-said", f"to 2012-06-15 ({last['close']} USD)")
    assert pixels_of(visit.page, chart="chart-plot") > 300
    assert pixels_of(visit.page, "--gain", "chart-plot") > 20
    assert pixels_of(visit.page, "--loss", "chart-plot") == 0

    visit.writes_an_order("sell", 10, "AAPL").presses("Place sell order")
    visit.reads("chart-said", "with ▲ 1 purchase and ▼ 1 sale.")
    assert pixels_of(visit.page, "--loss", "chart-plot") > 20
    rows = visit["chart-rows"].locator("tr")
    assert rows.nth(1).locator("td").all_inner_texts() == ["2012-06-01 00:00:00", "Buy", "10", "560.99", ""]
    assert visit.row("chart-rows")[:4] == ["2012-06-15 00:00:00", "Sell", "10", str(last["close"])]

    visit["chart-close"].press("Enter")
    expect(visit["chart"]).to_be_hidden()
    expect(visit["holdings-heading"]).to_be_focused()  # The holding is sold, and its row is gone.
    visit.page.get_by_role("button", name="IBM, chart of its price").press("Enter")
    visit.reads("chart-heading", "IBM").reads("chart-said", "with ▲ 1 purchase")
    visit["chart-close"].press("Enter")
    expect(visit.page.get_by_role("button", name="IBM, chart of its price")).to_be_focused()


def test_a_chart_that_the_server_refuses_says_why(visit):
    visit.trader.buys(1, "AAPL")
    refused = '{"status": 503, "detail": "No source gave past prices in time.", "code": "price_unavailable"}'
    visit.page.route("**/api/v1/bars/**", lambda route: route.fulfill(status=503, body=refused))
    visit.signs_in().presses("AAPL, chart of its price")
    visit.reads("chart-said", "No source gave past prices in time.")
    visit.overlook("Failed to load resource")


def test_amounts_are_shown_with_their_exact_digits(browser, server):
    """0.1 + 0.2, and more dollars than a binary float can tell apart."""
    alice = server.trader(cash="89999999999.12345679").sees("BTC-USD", at="1.1")
    for quantity in ("0.1", "0.2", "0.00000001"):
        alice.buys(quantity, "BTC-USD")
    with visiting(browser, alice) as visit:
        visit.signs_in().reads("cash", "89,999,999,998.79")
        expect(visit["cash"]).to_have_attribute("title", "89,999,999,998.79345677")
        expect(visit["trades-rows"].locator("tr")).to_have_count(3)
        assert visit.row("holdings-rows")[1:4] == ["0.30000001", "1.10", "1.1000"]
        assert visit.row("trades-rows")[4] == "0.00000001"
        decimal_points = visit.page.evaluate(
            """() => [...document.querySelectorAll("#trades-rows td:nth-child(5)")].map((cell) => {
                const [range, at] = [document.createRange(), cell.textContent.indexOf(".")];
                range.setStart(cell.firstChild, at);
                range.setEnd(cell.firstChild, at + 1);
                return Math.round(range.getBoundingClientRect().x);
            })"""
        )
        assert len(decimal_points) == 3
        assert len(set(decimal_points)) == 1
        everything = visit.page.evaluate(
            """() => [document.body.innerText, ...[...document.querySelectorAll("[title], [aria-label]")]
                .flatMap((node) => [node.title, node.getAttribute("aria-label")])].join(" ")"""
        )
        assert re.findall(r"\S*\.\d{9,}\S*|\S*\de[-+]?\d\S*|NaN|undefined|Infinity|null", everything) == []


def test_the_figures_of_a_run_are_those_of_its_history(visit):
    alice = visit.trader
    alice.buys(50, "AAPL")
    alice.advances(5)
    alice.sells(10, "AAPL")
    summary = alice.get("/api/v1/account/history")["summary"]
    visit.signs_in().reads("summary", "Sharpe ratio")
    words = visit["summary"].inner_text().replace("−", "-").replace(",", "").split("\n")
    figures = {
        "Return a year": f"{summary['annual_return_percent']:+.2f} %",
        "Volatility a year": f"{summary['annual_volatility_percent']:.2f} %",
        "Sharpe ratio": f"{summary['sharpe_ratio']:.2f}",
        "Sortino ratio": f"{summary['sortino_ratio']:.2f}",
        "Days with holdings": f"{summary['exposure_percent']:.2f} %",
    }
    words = [word for word in words if word]
    assert {name: words[words.index(name) + 1] for name in figures} == figures


def test_what_happens_to_a_holding_is_no_sale(visit):
    """Nobody orders a split, a dividend or a correction, so here they are put into the answer on the way."""
    alice = visit.trader
    alice.buys(10, "AAPL")
    alice.advances(5)
    reason = "A quantity that was written twice is taken back."
    happened = [
        {"trade_type": "correction", "quantity": -5, "price": None, "market_price": None, "reason": reason},
        {"trade_type": "dividend", "quantity": 10, "price": 2.65, "total_amount": 26.5},
        {"trade_type": "split", "quantity": 70, "price": 0, "ratio": "7:1"},
    ]
    nothing = {"market_time": "2012-06-04T00:00:00Z", "realized_pnl": None, "order_id": None}

    def lengthened(route: Route):
        answer = route.fetch()
        [trade] = answer.json()["trades"]
        more = [trade | nothing | {"id": str(99 - i)} | event for i, event in enumerate(happened)]
        route.fulfill(response=answer, json=answer.json() | {"trades": [*more, trade]})

    visit.page.route("**/api/v1/trades?*", lengthened)
    visit.signs_in().reads("trades-rows", reason)
    rows = visit["trades-rows"].locator("tr")
    cells = [rows.nth(i).locator("td").all_inner_texts() for i in range(4)]
    assert [[row[2], *row[4:6], row[8], row[12]] for row in cells] == [
        ["Correction", "−5", "", "", reason],
        ["Dividend", "10", "2.65", "", ""],
        ["Split 7:1", "70", "0.00", "", ""],
        ["Buy", "10", "560.99", "", ""],
    ]
    assert re.findall("null|undefined|NaN", visit["trades"].inner_text()) == []
    visit.presses("AAPL, chart of its price").reads("chart-said", "with ▲ 1 purchase and ▼ 0 sales.")
    assert pixels_of(visit.page, "--gain", "chart-plot") > 20
    assert pixels_of(visit.page, "--loss", "chart-plot") == 0


def test_older_trades_are_a_page_away(visit):
    alice = visit.trader.sees("IBM", at=1)
    for quantity in range(1, 28):
        alice.buys(quantity, "IBM")
    visit.signs_in()
    expect(visit["trades-rows"].locator("tr")).to_have_count(25)
    visit.presses("Older").reads("page-number", "Page 2")
    expect(visit["trades-rows"].locator("tr")).to_have_count(2)
    assert [row.split("\t")[4] for row in visit["trades-rows"].inner_text().split("\n")] == ["2", "1"]
    visit.presses("Newer").reads("page-number", "Page 1")
    expect(visit["trades-rows"].locator("tr")).to_have_count(25)


def test_the_trades_download_as_csv(visit):
    visit.trader.buys(10, "AAPL")
    visit.trader.sells(4, "AAPL")
    visit.signs_in()
    with visit.page.expect_download() as download:
        visit.presses("Download CSV")
    assert download.value.suggested_filename == "trades-run-1.csv"
    assert download.value.path().read_bytes() == visit.trader.ask("GET", "/api/v1/trades.csv").content


def test_markup_in_an_error_an_email_and_a_ticker_shows_as_text(browser, server):
    """The server takes no such ticker, so here its answers are changed on the way."""
    alice = server.trader(name="<b/id=injected>alice")
    alice.sees("AAPL", at=1).buys(1, "AAPL")
    assert alice.email.startswith("<b/id=injected>")

    def with_markup(route: Route):
        answer = route.fetch()
        body = answer.text().replace('"AAPL"', f'"{MARKUP}"')
        body = re.sub(r'"detail": *"', f'"detail": "{MARKUP}{alice.email} ', body)
        route.fulfill(response=answer, body=body)

    with visiting(browser, alice) as visit:
        visit.page.route("**/api/v1/**", with_markup)
        visit.signs_in().reads("holdings-rows", MARKUP).reads("trades-rows", MARKUP)
        assert (
            visit["tickers"]
            .locator("option")
            .evaluate_all("all => all.map((one) => one.value)")
            .count(MARKUP)
        )
        visit.presses(f"Sell {MARKUP}…").presses("Place sell order")
        visit.reads("order-result", f"{MARKUP}{alice.email}")
        visit.writes_an_order("buy", 1, "NOBODY").reads("quote", f"{MARKUP}{alice.email}")
        visit.presses("Rehearse").reads("order-result", f"{MARKUP}{alice.email}")
        expect(visit["injected"]).to_have_count(0)
        visit.overlook("Failed to load resource")


# The run and the clock


def test_a_run_ends_only_when_asked_twice(visit):
    alice = visit.trader
    alice.buys(10, "AAPL")
    before = alice.books
    visit.signs_in().presses("Start over…").reads("start-over-question", "This cannot be undone.")
    expect(visit["keep-going"]).to_be_focused()
    visit.presses("No, keep this run")
    expect(visit["start-over-form"]).to_be_hidden()
    visit.presses("Start over…")
    visit["start-cash"].fill("2500.50")
    assert alice.books == before
    visit.presses("Yes, start over").reads("start-over-result", "A new run has begun.")
    visit.reads("run-heading", "Run 2").reads("equity", "2,500.50").reads("holdings-none", "No holdings")
    assert (alice.cash, alice.holdings, alice.trades) == (Decimal("2500.5"), {}, [])
    visit["run-select"].select_option("run 1")
    visit.reads("run-heading", "Run 1 (earlier)").reads("trades-rows", "AAPL")


def test_the_sample_clock_is_stopped_and_stepped(visit):
    alice = visit.trader
    alice.buys(10, "AAPL")
    visit.signs_in().reads("clock-state", "stopped").presses("Let it run").reads("clock-state", "running")
    expect(visit.page.get_by_role("button", name="+1 bar")).to_be_disabled()
    visit.presses("Stop the clock").reads("clock-state", "stopped")
    visit["clock-at"].fill("2012-06-01")
    visit.presses("Go").reads("clock-now", "2012-06-01 00:00 UTC").reads("equity", "100,000.00")
    visit.presses("+1 bar").reads("clock-now", "2012-06-04 00:00 UTC").reads("equity", "100,033.00")
    assert visit.row("holdings-rows")[2] == "564.29"
    assert alice.get("/api/v1/market")["now"] == "2012-06-04T00:00:00Z"
    visit.presses("+5").reads("clock-now", "2012-06-11 00:00 UTC")


# The admin's accounts


@pytest.fixture
def admin(browser, server):
    """Whoever runs the server, with the admin's key."""
    with visiting(browser, Trader(server, "", ADMIN, 0)) as visit:
        visit.overlook("403 (FORBIDDEN)")  # So the page learns whose key it is.
        yield visit


def test_the_admin_opens_an_account_renews_its_key_and_closes_it(admin, server):
    email = f"carol-{uuid.uuid4().hex[:12]}@example.com"
    admin.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    admin.signs_in(opens="accounts")
    expect(admin["accounts-heading"]).to_be_focused()
    admin["email"].fill(email)
    admin["account-cash"].fill("2500.50")
    admin.presses("Add account").reads("accounts-result", f"{email} has an account.")
    admin.reads("accounts-rows", email)

    carol = Trader(server, email, admin["new-key-text"].inner_text(), 0)
    assert carol.cash == Decimal("2500.5")
    admin.presses("Copy").reads("copy-result", "Copied.")
    assert admin.page.evaluate("navigator.clipboard.readText()") == carol.key
    row = admin["accounts-rows"].locator("tr", has_text=email)
    assert row.locator("th, td").all_inner_texts()[2:5:2] == ["2,500.50", ""]

    admin.presses(f"New key for {email}…").presses("Yes, make a new key")
    admin.reads("accounts-result", f"{email} has a new key.").reads("new-key", "shown this once")
    renewed = Trader(server, email, admin["new-key-text"].inner_text(), 0)
    assert (carol.ask("GET", "/api/v1/balance").status_code, renewed.cash) == (401, Decimal("2500.5"))
    stored = "[sessionStorage.getItem('key'), sessionStorage.length, localStorage.length, document.cookie]"
    assert admin.page.evaluate(stored) == [ADMIN, 1, 0, ""]
    assert [url for url in admin.asked if carol.key in url or renewed.key in url] == []
    admin.presses("Done, hide it")
    assert not any(key in admin.page.content() for key in (carol.key, renewed.key))

    admin.presses(f"Close {email}…").reads("confirm-question", "This cannot be undone.")
    expect(admin["confirm-no"]).to_be_focused()
    admin.presses("No, leave it")
    assert renewed.cash == Decimal("2500.5")
    admin.presses(f"Close {email}…").presses("Yes, close it")
    admin.reads("accounts-result", f"The account of {email} is closed.")
    expect(row.locator("td").nth(3)).to_have_text(re.compile("^20.{8}$"))
    expect(row.get_by_role("button")).to_have_count(0)
    assert renewed.ask("GET", "/api/v1/balance").status_code == 401


def test_a_key_that_the_browser_will_not_copy_is_selected(admin, server):
    """Without HTTPS it has no clipboard for a page, but on the computer itself."""
    admin.page.add_init_script("Object.defineProperty(navigator, 'clipboard', { value: undefined })")
    email = server.trader().email
    admin.signs_in(opens="accounts").presses(f"New key for {email}…").presses("Yes, make a new key")
    admin.presses("Copy").reads("copy-result", "press Ctrl+C")
    key = admin["new-key-text"].inner_text()
    assert (len(key), admin.page.evaluate("getSelection().toString()")) == (64, key)


def test_what_the_admin_may_not_do_is_said_in_a_sentence(admin, server):
    taken = server.trader().email
    admin.signs_in(opens="accounts")["email"].fill(taken)
    admin.presses("Add account").reads("accounts-result", "is already in use")
    admin["account-cash"].fill("a lot")
    admin.presses("Add account").reads("accounts-result", re.compile("cash"))
    expect(admin["new-key"]).to_be_hidden()
    admin.overlook("Failed to load resource")


# Without a server


def test_the_page_says_that_the_server_is_away_and_comes_back_by_itself(browser, server):
    alice = server.trader().sees("AAPL", at=100)
    alice.buys(1, "AAPL")
    with visiting(browser, alice) as visit:
        visit.page.clock.install()
        visit.signs_in().reads("cash", "99,900.00")
        expect(visit["away"]).to_be_hidden()
        server.stop()
        try:
            visit.page.clock.fast_forward("00:05")
            visit.reads("away", re.compile(r"^The server does not answer\. What you see is of .{8} UTC\."))
            visit.reads("away", "Trying again every 5 seconds.").reads("cash", "99,900.00")
            assert no_sideways_scroll(visit.page)
        finally:
            server.start()
        alice.buys(1, "AAPL")
        visit.page.clock.fast_forward("00:05")
        visit.reads("cash", "99,800.00")
        expect(visit["away"]).to_be_hidden()
        visit.overlook("Failed to load resource: net::ERR_")


# For everybody, on everything


def no_sideways_scroll(page: Page) -> bool:
    return page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")


def test_a_phone_needs_no_sideways_scroll(browser, alice):
    for ticker in ("AAPL", "BTC-USD", "GOOG", "IBM", "MSFT"):
        alice.sees(ticker, at="1234.12345678").buys("1.00000001", ticker)
    phone = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
    with visiting(browser, alice, **phone) as visit:
        visit.opens_the_page()
        assert no_sideways_scroll(visit.page)
        visit.signs_in().reads("holdings-count", "5")
        assert no_sideways_scroll(visit.page)
        visit.writes_an_order("buy", "1000000000", "BTC-USD").presses("Rehearse")
        visit.reads("order-result", re.compile(".+")).presses("Start over…")
        visit.writes_an_order_that_rests("buy", "1.00000001", "BTC-USD", "stop_limit", stop=2000, price=2100)
        visit["take-profit"].fill("9999999999.12345678")
        visit.presses("Place buy order").reads("orders-rows", "Take-profit")
        visit.presses("BTC-USD, chart of its price")
        expect(visit["chart-plot"].locator("canvas")).to_be_visible()
        expect(visit["curve"].locator("canvas")).to_be_visible()
        assert visit.page.evaluate("document.documentElement.clientWidth") == 390
        assert no_sideways_scroll(visit.page)
        visit.overlook("Failed to load resource")


def found_by_axe(page: Page) -> list[str]:
    """What axe calls serious or critical."""
    found = page.evaluate("axe.run(document, { resultTypes: ['violations'] })")
    assert found["passes"], "axe has looked at nothing"
    return [
        f"{violation['id']}: {node['html']}"
        for violation in found["violations"]
        for node in violation["nodes"]
        if violation["impact"] in ("serious", "critical")
    ]


@pytest.mark.parametrize("colours", ["light", "dark"])
def test_axe_finds_nothing_serious(visit, colours):
    alice = visit.trader
    for ticker in ("AAPL", "GOOG", "IBM"):
        alice.buys(10, ticker)
    alice.sells(4, "IBM")
    alice.sees("AAPL", at=600).sees("GOOG", at=100)
    visit.page.emulate_media(color_scheme=colours)
    visit.page.add_init_script(path=AXE)
    serious_violations = partial(found_by_axe, visit.page)
    visit.opens_the_page()
    assert serious_violations() == []
    visit.signs_in().writes_an_order("buy", 1000, "AAPL").presses("Place buy order")
    visit.reads("order-result", "This costs").reads("readout", "USD").presses("Start over…")
    assert serious_violations() == []
    visit.writes_an_order_that_rests("buy", 1, "IBM", "stop_limit", stop=300, price=310, stop_loss=200)
    visit.presses("Place buy order").reads("orders-rows", "Stop-loss").presses("IBM, chart of its price")
    visit.reads("chart-rows", "Sell")
    assert serious_violations() == []
    visit.presses("Cancel all").reads("orders-result", "2 orders are canceled.")
    assert serious_violations() == []
    visit.page.evaluate("sayAway('The server does not answer.')")
    assert serious_violations() == []
    visit.overlook("Failed to load resource")


def test_the_admins_page_is_for_everybody_too(admin, server):
    email = server.trader().email
    admin.page.add_init_script(path=AXE)
    admin.signs_in(opens="accounts").presses(f"New key for {email}…").presses("Yes, make a new key")
    admin.reads("new-key", "shown this once").presses(f"Close {email}…")
    for colours in ("light", "dark"):
        admin.page.emulate_media(color_scheme=colours)
        assert found_by_axe(admin.page) == []
    admin.page.set_viewport_size({"width": 390, "height": 844})
    assert no_sideways_scroll(admin.page)


# A picture of it


def width_of(picture: Path) -> int:
    """In pixels, as a PNG's header has it."""
    header = picture.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(header[16:20])


def test_the_readmes_picture_can_be_taken_again(browser, alice, tmp_path):
    """`DASHBOARD_PICTURE=docs/dashboard.png pytest -n0 -k picture` takes it; all else leaves it alone."""
    alice.goes_to("2012-03-01T00:00:00Z")
    alice.buys(40, "AAPL")
    alice.buys(20, "GOOG")
    alice.buys(60, "IBM")
    alice.buys(30, "SPY")
    alice.advances(30)
    alice.sells(15, "AAPL")
    alice.buys(400, "MSFT")
    alice.advances(40)
    alice.sells(8, "GOOG")
    alice.buys("1.5", "ETH-USD")
    alice.advances(55)
    with visiting(browser, alice) as visit:
        visit.signs_in().reads("readout", "2012").reads("holdings-count", "6")
        visit.writes_an_order_that_rests(
            "buy", 20, "AAPL", "limit", price=640, take_profit=720, stop_loss=600
        )
        visit.reads("quote", "AAPL: ").reads("estimate", "Costs about 12,800.00 USD")
        visit.page.evaluate("document.activeElement.blur()")
        below = visit["orders"].bounding_box()["y"]
        table = visit["trades"].locator(".scroll")
        assert table.evaluate("table => table.scrollWidth <= table.clientWidth")  # Nothing is cut off.
        picture = tmp_path / "dashboard.png"
        visit.page.screenshot(
            path=picture, full_page=True, clip={"x": 0, "y": 0, "width": 1280, "height": below}
        )
    if wanted := os.environ.get("DASHBOARD_PICTURE"):
        shutil.copy(picture, wanted)
    assert width_of(picture) == width_of(ROOT / "docs" / "dashboard.png") == 1280


# The API's page


def test_the_api_is_tried_out_on_its_page(browser, alice):
    with visiting(browser, alice) as visit:
        visit.opens_the_page().page.get_by_role("link", name="API documentation").click()
        visit.page.get_by_role("button", name="Authorize").first.click()
        dialog = visit.page.locator(".dialog-ux")
        dialog.locator(".auth-container", has_text="trader").locator("input").fill(alice.key)
        dialog.get_by_role("button", name="Apply credentials").first.click()
        dialog.get_by_role("button", name="Close").last.click()
        trade = visit.page.locator("#operations-trading-trade")
        trade.locator(".opblock-summary-control").click()
        trade.get_by_role("button", name="Try it out").click()
        trade.locator("textarea").fill('{"ticker": "AAPL", "action": "buy", "quantity": "2"}')
        trade.get_by_role("button", name="Execute").click()
        expect(trade.locator(".live-responses-table .response-col_status").last).to_contain_text("200")
    assert alice.holdings["AAPL"][0] == 2
