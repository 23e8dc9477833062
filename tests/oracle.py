"""A broker on paper: what must become of a list of operations, worked out once more in another way.

It shares no line with the program. Amounts are fractions, orders are dicts, and there are no balances: what
an account has is added up from its fills whenever somebody wants to know. `replay` plays a whole list of
operations from the start, each taking effect at once, and answers all that can be seen of it from outside.

    tape        {ticker: {time: (open, high, low, close)}}, as recorded
    actions     {ticker: {time: {"dividend": "0.25", "split": "3:2"}}}: what stands beside the prices
    costs       commission in basis points, least commission in dollars, slippage in basis points
    operations  ("order", body), ("trade", body), ("cancel", back), ("cancel all",),
                ("replace", back, body), ("advance", bars), ("clock", time), ("pin", ticker, price),
                ("let go", ticker), ("reset", cash), ("correct", body)

A body is that of the API. An order is named by how many came after it: 0 is the youngest. Each row of the
books is a fill here, that of a split, a dividend or a correction too, with the word for it as its side.
"""

from decimal import Decimal
from fractions import Fraction
from math import ceil, floor

SCALE = 10**8
MOST = 90 * 10**9  # Neither cash nor a holding reaches it.


def up(amount):
    return Fraction(ceil(amount * SCALE), SCALE)


def down(amount):
    return Fraction(floor(amount * SCALE), SCALE)


def nearest(amount):
    """Half-even, as `round` is."""
    return Fraction(round(amount * SCALE), SCALE)


def fixed(amount):
    """The fraction as a decimal number."""
    return None if amount is None else Decimal(amount.numerator * SCALE // amount.denominator).scaleb(-8)


class No(Exception):
    """A refusal; its text is the code."""


def number(text):
    return None if text is None else Fraction(str(text))


def as_ratio(text):
    new, old = text.split(":")
    return Fraction(int(new), int(old))


def replay(tape, costs, cash, operations, actions=None) -> dict:
    broker = Broker(tape, costs, cash, actions)
    outcomes = [broker.asked(operation) for operation in operations]
    return broker.picture() | {"outcomes": outcomes}


class Broker:
    def __init__(self, tape, costs, cash, actions=None):
        self.actions = actions or {}
        self.tape, self.bps, self.least, self.slippage = tape, *map(Fraction, costs)
        self.times = sorted({time for rows in tape.values() for time in rows})
        self.clock, self.pins, self.steps = self.times[0], {}, 0
        self.run, self.start, self.orders, self.fills = 1, number(cash), [], []

    # What the market asks.

    def price(self, ticker):
        return self.pins.get(ticker) or self.close_of(ticker)

    def close_of(self, ticker):
        rows = self.tape.get(ticker, {})
        past = [time for time in rows if time <= self.clock]
        if not past:
            raise No("unknown_ticker")
        return number(rows[max(past)][3])

    def slipped(self, side, price):
        slip = price * self.slippage / 10_000
        return up(price + slip) if side == "buy" else max(down(price - slip), Fraction(1, SCALE))

    def commission(self, total):
        return up(max(total * self.bps / 10_000, self.least))

    # What the account has, added up.

    def cash(self):
        flows = (
            (-f["total"] if f["side"] == "buy" else f["total"]) - f["commission"]
            for f in self.fills
            if f["run"] == self.run
        )
        return self.start + sum(flows)

    def holding(self, ticker):
        quantity = cost = Fraction(0)
        for f in self.fills:
            if (f["run"], f["ticker"]) != (self.run, ticker) or f["side"] == "dividend":
                continue
            if f["side"] == "buy":
                quantity, cost = quantity + f["quantity"], cost + f["total"] + f["commission"]
            elif f["side"] == "split":
                quantity = down(quantity * f["ratio"])
                cost = cost if quantity else Fraction(0)
            else:
                change = -f["quantity"] if f["side"] == "sell" else f["quantity"]
                cost -= nearest(cost * -change / quantity) if change < 0 else 0
                quantity += change
        return quantity, cost

    def live(self):
        return [o for o in self.orders if o["status"] in ("open", "held")]

    def partner(self, order):
        """The live order that ends when this one does."""
        by_number = {o["number"]: o for o in self.live()}
        parent = by_number.get(order["parent"])
        if parent and parent["side"] == "sell":
            return parent
        family = order["parent"] if order["parent"] else order["side"] == "sell" and order["number"]
        kin = [o for o in by_number.values() if family and o["parent"] == family and o is not order]
        return kin[0] if kin else None

    def legs(self, order):
        return [o for o in self.live() if o["parent"] == order["number"]]

    def reserved(self, order):
        """Cash that the order is seen to hold back: of a pair the larger sum, and on the first of the two."""
        if order["status"] not in ("open", "held"):
            return Fraction(0)
        other = self.partner(order)
        if other is None:
            return order["needs"]
        return max(order["needs"], other["needs"]) if order["number"] < other["number"] else Fraction(0)

    def reserved_cash(self):
        return sum((self.reserved(o) for o in self.live()), Fraction(0))

    def reserved_shares(self, ticker):
        sales = [o for o in self.live() if (o["side"], o["status"], o["ticker"]) == ("sell", "open", ticker)]
        seconds = [o for o in sales if (other := self.partner(o)) and other["number"] < o["number"]]
        return sum((o["quantity"] for o in sales if o not in seconds), Fraction(0))

    def available(self, ticker):
        return self.holding(ticker)[0] - self.reserved_shares(ticker)

    def needs(self, order):
        """Dollars to hold back: the worst that a buy can cost, what a sale can cost beyond its proceeds."""
        if order["side"] == "buy":
            total = up(order["quantity"] * (order["limit"] or self.hidden_limit(order)))
            return total + self.commission(total)
        total = down(order["quantity"] * (order["limit"] or order["stop"]))
        return max(Fraction(0), self.commission(total) - total)

    @staticmethod
    def hidden_limit(order):
        """A resting buy at a stop does not pay more than 4 % above it."""
        return nearest(order["stop"] * Fraction(104, 100))

    def must_hold(self, order):
        """No more is promised than there is."""
        if order["side"] == "sell" and self.available(order["ticker"]) < 0:
            raise No("insufficient_shares")
        if self.cash() < self.reserved_cash():
            raise No("insufficient_funds")

    # One operation.

    def asked(self, operation):
        """The number of the order it made, True if it was done, or the code of the refusal."""
        what, *rest = operation
        before = [dict(order) for order in self.orders], len(self.fills)
        try:
            return getattr(self, "do_" + what.replace(" ", "_"))(*rest)
        except No as refusal:
            self.orders, fills = before
            del self.fills[fills:]
            return str(refusal)

    def do_trade(self, body):
        ticker, side, named = body["ticker"], body["action"], number(body.get("price"))
        market = self.price(ticker)
        price = named or self.slipped(side, market)
        quantity = self.size(body, ticker, price)
        if side == "buy" and price < market:
            raise No("price_below_market")
        if side == "sell" and price > market:
            raise No("price_above_market")
        self.book(None, ticker, side, quantity, price, market)
        self.must_hold({"side": side, "ticker": ticker})
        return True

    def size(self, body, ticker, price):
        if body.get("notional"):
            quantity = down(number(body["notional"]) / price)
            if not quantity:
                raise No("limit_exceeded")
            return quantity
        if body["quantity"] != "all":
            return number(body["quantity"])
        if self.available(ticker) <= 0:
            raise No("insufficient_shares")
        return self.available(ticker)

    def book(self, order, ticker, side, quantity, price, market):
        total = (up if side == "buy" else down)(quantity * price)
        more = {"order": order and order["number"], "commission": self.commission(total)}
        self.record(ticker, side, quantity, total, price=price, market=market, **more)

    def record(self, ticker, side, quantity, total, **more):
        """A row of the books. What it is seen to have gained is what cash and cost changed by."""
        before = self.cash() + self.holding(ticker)[1]
        fill = {
            "order": None,
            "run": self.run,
            "ticker": ticker,
            "side": side,
            "quantity": quantity,
            "price": None,
            "market": None,
            "time": self.clock,
            "total": total,
            "commission": Fraction(0),
            "ratio": None,
            "reason": None,
            "source": "admin" if side == "correction" else "sample",
        } | more
        self.fills.append(fill)
        fill["cash"] = self.cash()
        fill["realized"] = None if side == "buy" else fill["cash"] + self.holding(ticker)[1] - before

    def do_correct(self, body):
        ticker, quantity, cash = body["ticker"], number(body["quantity"]), number(body["cash"])
        if self.holding(ticker)[0] + quantity < 0:
            raise No("insufficient_shares")
        if max(self.holding(ticker)[0] + quantity, self.cash() + cash) >= MOST:
            raise No("limit_exceeded")
        self.record(ticker, "correction", quantity, cash, reason=body["reason"])
        self.must_hold({"side": "sell", "ticker": ticker})
        return True

    def do_order(self, body):
        limit, stop = number(body.get("limit_price")), number(body.get("stop_price"))
        profit, loss = body.get("take_profit"), body.get("stop_loss")
        order = {
            "ticker": body["ticker"],
            "side": body["action"],
            "kind": body["order_type"],
            "limit": limit,
            "stop": stop,
            "percent": number(body.get("trail_percent")),
            "amount": number(body.get("trail_amount")),
            "tif": body.get("time_in_force", "gtc"),
            "parent": None,
            "replaces": None,
        }
        legs = []
        if profit:
            legs.append({"kind": "limit", "limit": number(profit["limit_price"]), "stop": None})
        if loss:
            stop, limit = number(loss["stop_price"]), number(loss.get("limit_price"))
            legs.append({"kind": "stop_limit" if limit else "stop", "limit": limit, "stop": stop})
        if legs:
            is_exit = order["side"] == "buy" or (order["kind"] == "limit" and not profit)
            if not is_exit or order["tif"] in ("ioc", "fok"):
                raise No("invalid_request")
            self.must_stand_apart(order, legs)
        market = self.price(order["ticker"])
        if legs and order["kind"] == "market":
            self.must_stand_apart(order | {"limit": market}, legs)
        trailed = self.trailed(order, market)
        if trailed is not None and trailed <= 0:
            raise No("invalid_request")
        order["stop"] = trailed or order["stop"]
        price = self.slipped(order["side"], market) if order["kind"] == "market" else None
        order["quantity"] = self.size(body, order["ticker"], price)
        self.enter(order)
        placed = [order]
        for leg in legs:
            more = {"side": "sell", "percent": None, "amount": None, "parent": order["number"]}
            leg = self.enter(order | leg | more, status="held" if order["side"] == "buy" else "open")
            placed += [leg] if order["side"] == "sell" else []
        self.judge_at_once(placed, market)
        return order["number"]

    @staticmethod
    def must_stand_apart(order, legs):
        """The profit is above the price at which one enters, and the loss below."""
        own = order["limit"] or (order["kind"] != "trailing_stop" and order["stop"])
        profits = [leg["limit"] for leg in legs if leg["kind"] == "limit"]
        losses = [leg["stop"] for leg in legs if leg["kind"] != "limit"]
        middle = [own] if own else []
        pairs = [*zip(profits, losses, strict=False)]
        pairs += [(profit, own) for profit in profits for own in middle]
        pairs += [(own, loss) for loss in losses for own in middle]
        if any(higher <= lower for higher, lower in pairs):
            raise No("invalid_request")

    def enter(self, order, status="open"):
        order |= {
            "number": len(self.orders) + 1,
            "run": self.run,
            "status": status,
            "since": self.steps,
            "jumped": None,
            "date": self.clock.date(),
            "price": None,
        }
        order["needs"] = self.needs(order) if order["kind"] != "market" else Fraction(0)
        self.orders.append(order)
        return order

    def trailed(self, order, price):
        """Where a trailing stop stands that has seen this price."""
        if order["kind"] != "trailing_stop":
            return None
        sign = 1 if order["side"] == "buy" else -1
        if order["amount"]:
            return price + sign * order["amount"]
        return nearest(price * (1 + sign * order["percent"] / 100))

    def judge_at_once(self, orders, market):
        """What a placing comes to at the market's price: one of the orders is filled, or they rest."""
        for order in orders:
            price = self.at_once(order, market)
            if price == "jumped":
                order["jumped"] = self.steps
            elif price is not None:
                self.fill(order, price, market)
                return self.must_hold(order)
        self.must_hold(orders[0])
        if orders[0]["tif"] in ("ioc", "fok"):
            self.close(orders[0], "canceled")

    def at_once(self, order, market):
        """What an order is filled at that the market's price makes due when it is placed."""
        buys, limit = order["side"] == "buy", order["limit"]
        beyond = limit is not None and (market > limit if buys else market < limit)
        if order["kind"] == "limit":
            return None if beyond else market
        if order["kind"] == "trailing_stop":
            return None
        if order["stop"] is not None and (market < order["stop"] if buys else market > order["stop"]):
            return None
        if beyond:
            return "jumped"
        price = self.slipped(order["side"], market)
        return price if limit is None else min(price, limit) if buys else max(price, limit)

    def fill(self, order, price, market):
        other = self.partner(order)
        self.book(order, order["ticker"], order["side"], order["quantity"], price, market)
        order["status"], order["price"] = "filled", price
        if other:
            other["status"] = "canceled"
        for leg in self.legs(order):
            leg["status"], leg["since"] = "open", self.steps

    def close(self, order, status):
        """An order ends unfilled, and with it whatever depends on it."""
        other, legs = self.partner(order), self.legs(order)
        order["status"] = status
        for dependent in [*legs, *([other] if other else [])]:
            dependent["status"] = status

    def named(self, back):
        if back >= len(self.orders):
            raise No("not_found")
        return self.orders[-1 - back]

    def do_cancel(self, back):
        order = self.named(back)
        if order not in self.live():
            raise No("not_open")
        self.close(order, "canceled")
        return True

    def do_cancel_all(self):
        for order in self.live():
            order["status"] = "canceled"
        return True

    def do_replace(self, back, body):
        old = self.named(back)
        if old not in self.live():
            raise No("not_open")
        if old["kind"] == "trailing_stop":
            raise No("not_replaceable")
        is_leg = old["parent"] is not None
        fields = {"quantity": "quantity", "limit_price": "limit", "stop_price": "stop"}
        changes = {fields[name]: number(text) for name, text in body.items()}
        if (is_leg and "quantity" in changes) or any(old[name] is None for name in changes):
            raise No("invalid_request")
        legs, status, other = self.legs(old), old["status"], self.partner(old)
        new = dict(old) | changes | {"replaces": old["number"]}
        if legs:
            self.must_stand_apart(new, legs)
        elif is_leg:
            parent = next(o for o in self.orders if o["number"] == old["parent"])
            waits = parent in self.live()
            family = [new, *([other] if other and other is not parent else [])]
            self.must_stand_apart(parent if waits else parent | {"limit": None, "stop": None}, family)
        old["status"] = "replaced"
        self.enter(new, status)
        for leg in legs:
            leg |= {"parent": new["number"], "quantity": new["quantity"]}
            leg["needs"] = self.needs(leg)
        if status == "open":
            self.judge_at_once([new], self.price(new["ticker"]))
        self.must_hold(new)
        return new["number"]

    def do_reset(self, cash):
        self.do_cancel_all()
        self.run, self.start = self.run + 1, number(cash)
        return True

    # Time and prices.

    def do_advance(self, bars):
        here = self.times.index(self.clock)
        for time in self.times[here + 1 : here + 1 + bars]:
            self.passes(time)
            bars = {t: tuple(map(number, rows[time][:3])) for t, rows in self.tape.items() if time in rows}
            self.step(bars | self.pinned())
        return True

    def do_clock(self, time):
        self.passes(time)
        closes = {t: (number(rows[time][3]),) * 3 for t, rows in self.tape.items() if time in rows}
        self.step(closes | self.pinned())
        return True

    # Splits and dividends.

    def passes(self, there):
        """The clock goes there. What it passes on the way is booked where it stands in the tape; on the way
        back splits are taken back, the last one first, all where the clock arrives: at what a share costs
        there, in the shares that there are until the next one is taken back.
        """
        here = self.clock
        for time, ticker, kind, text in self.between(here, there):
            self.clock = time
            if kind == "dividend":
                self.pay(ticker, number(text))
            else:
                self.split(ticker, as_ratio(text))
        self.clock = there
        back, prices = [], {}
        for _, ticker, kind, text in self.between(there, here):
            if kind == "split":
                price = prices[ticker] if ticker in prices else self.close_of(ticker)
                prices[ticker] = nearest(price / as_ratio(text))
                back.append((ticker, 1 / as_ratio(text), price))
        for taken_back in reversed(back):
            self.split(*taken_back)

    def between(self, before, last):
        """The actions after one time until the other: by time, by ticker, and a dividend before a split."""
        return sorted(
            (time, ticker, kind, text)
            for ticker, rows in self.actions.items()
            for time, row in rows.items()
            for kind, text in row.items()
            if before < time <= last
        )

    def pay(self, ticker, dollars):
        quantity, _ = self.holding(ticker)
        total = down(quantity * dollars)
        if quantity and self.cash() + total < MOST:
            self.record(ticker, "dividend", quantity, total, price=dollars, market=self.close_of(ticker))

    def split(self, ticker, ratio, price=None):
        """Nothing happens to an account that would be too rich then."""
        quantity, _ = self.holding(ticker)
        new = quantity * ratio
        if quantity:
            price = price or self.close_of(ticker)
            total = down((new - down(new)) * price)
            if max(down(new), self.cash() + total) >= MOST:
                return
            self.record(ticker, "split", quantity, total, price=price, market=price, ratio=ratio)
        for order in [o for o in self.live() if o["ticker"] == ticker]:
            self.adjust(order, ratio)

    def adjust(self, order, ratio):
        """An order after a split. One that ends at it has its new numbers as well, if there can be such."""
        names = [name for name in ("limit", "stop", "amount") if order[name] is not None]
        new = {name: nearest(order[name] / ratio) for name in names}
        new["quantity"] = down(order["quantity"] * ratio)
        can_be = all(0 < n < 10**10 for n in new.values())
        order |= new if can_be else {}
        if order["status"] == "canceled":
            return  # With one of those before it.
        order["needs"] = self.needs(order)
        if not can_be or self.cash() < self.reserved_cash():
            self.close(order, "canceled")

    def pinned(self):
        return {ticker: (price,) * 3 for ticker, price in self.pins.items()}

    def do_pin(self, ticker, price):
        self.pins[ticker] = number(price)
        self.step({ticker: (self.pins[ticker],) * 3})
        return True

    def do_let_go(self, ticker):
        if self.pins.pop(ticker, None):
            try:
                self.step({ticker: (self.price(ticker),) * 3})
            except No:
                pass  # It has not been recorded yet.
        return True

    def step(self, bars):
        """One moment of the market: {ticker: (open, high, low)}."""
        self.steps += 1
        for order in list(self.orders):
            if order["status"] not in ("open", "held"):
                continue
            if order["tif"] == "day" and order["date"] != self.clock.date():
                self.close(order, "expired")
            elif order["status"] == "open" and order["since"] < self.steps and order["ticker"] in bars:
                self.judge(order, bars[order["ticker"]])

    def judge(self, order, bar):
        outcome, other = self.due(order, bar), self.partner(order)
        if outcome == "jumped":
            order["jumped"] = self.steps
        elif outcome is None:
            trails = order["kind"] == "trailing_stop" and not order["jumped"]
            if trails and order["side"] == "buy":
                order["stop"] = min(order["stop"], self.trailed(order, bar[2]))
            elif trails:
                order["stop"] = max(order["stop"], self.trailed(order, bar[1]))
        else:
            price, market, by_open = outcome
            rival = self.due(other, bar) if other else None
            if isinstance(rival, tuple):
                is_first = by_open if by_open != rival[2] else order["kind"] != "limit"
                if not is_first:
                    return
            total = (up if order["side"] == "buy" else down)(order["quantity"] * price)
            gain = (total if order["side"] == "sell" else -total) - self.commission(total)
            if self.cash() + gain < 0:
                self.close(order, "canceled")
            else:
                self.fill(order, price, market)

    def due(self, order, bar):
        """(price, market's price, whether the open was enough), None, or "jumped" where a stop was met and
        its limit was not.
        """
        opened, high, low = bar
        buys, kind = order["side"] == "buy", order["kind"]
        waits = order["jumped"] is not None and order["jumped"] < self.steps
        limit = order["limit"]
        if limit is None and buys and kind in ("stop", "trailing_stop"):
            limit = self.hidden_limit(order)
        if kind == "limit" or waits:
            by_open = opened <= limit if buys else opened >= limit
            reached = low <= limit if buys else high >= limit
            return (limit, opened if by_open else limit, by_open) if reached else None
        stop = order["stop"]
        by_open = opened >= stop if buys else opened <= stop
        if not (high >= stop if buys else low <= stop):
            return None
        market = opened if by_open else stop
        if limit is not None and (market > limit if buys else market < limit):
            return "jumped"
        price = self.slipped(order["side"], market)
        if limit is not None:
            price = min(price, limit) if buys else max(price, limit)
        return price, market, by_open

    # What is seen.

    def picture(self) -> dict:
        now = [f for f in self.fills if f["run"] == self.run]
        held = {ticker: self.holding(ticker) for ticker in sorted({f["ticker"] for f in now})}
        amounts = ("quantity", "price", "market", "commission", "total", "cash", "realized")
        return {
            "cash": fixed(self.cash()),
            "reserved": fixed(self.reserved_cash()),
            "realized": fixed(sum((f["realized"] or 0 for f in now), Fraction(0))),
            "holdings": {
                ticker: (fixed(quantity), fixed(cost), fixed(self.available(ticker)))
                for ticker, (quantity, cost) in held.items()
                if quantity
            },
            "fills": [
                f
                | {name: fixed(f[name]) for name in amounts}
                | {"ratio": f["ratio"] and "{}:{}".format(*f["ratio"].as_integer_ratio())}
                for f in self.fills
            ],
            "orders": [
                {
                    "number": o["number"],
                    "run": o["run"],
                    "ticker": o["ticker"],
                    "action": o["side"],
                    "order_type": o["kind"],
                    "status": o["status"],
                    "quantity": fixed(o["quantity"]),
                    "limit_price": fixed(o["limit"]),
                    "stop_price": fixed(o["stop"]),
                    "trail_percent": fixed(o["percent"]),
                    "trail_amount": fixed(o["amount"]),
                    "reserved_cash": fixed(self.reserved(o)),
                    "price": fixed(o["price"]),
                    "parent": o["parent"],
                    "replaces": o["replaces"],
                }
                for o in self.orders
            ],
        }
