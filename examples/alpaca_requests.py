"""The bot of alpaca_bot.py without Alpaca's client: the same requests, by hand.

python examples/alpaca_requests.py
"""

import os
from datetime import UTC, datetime, timedelta
from uuid import uuid4

import requests

BROKER = os.environ.get("BROKER_URL", "http://127.0.0.1:8000/alpaca")
session = requests.Session()
session.headers["APCA-API-SECRET-KEY"] = os.environ.get("APCA_API_SECRET_KEY", "test-api-key-123")


def call(method: str, path: str, **options):
    answer = session.request(method, f"{BROKER}/v2{path}", timeout=30, **options)
    told = answer.json() if answer.content else None
    if not answer.ok:
        raise SystemExit(f"{method} {path}: {told['message']}")
    return told


start = (datetime.now(UTC) - timedelta(days=60)).date().isoformat()
bars = call("GET", "/stocks/AAPL/bars", params={"timeframe": "1Day", "start": start})["bars"]
closes = [bar["c"] for bar in bars]
rises = sum(closes[-10:]) / 10 > sum(closes[-30:]) / 30
held = {position["symbol"]: position["qty"] for position in call("GET", "/positions")}

if rises and "AAPL" not in held:
    order = {"symbol": "AAPL", "qty": "10", "side": "buy", "type": "market", "time_in_force": "gtc"}
    order |= {"order_class": "bracket", "client_order_id": str(uuid4())}
    order |= {"take_profit": {"limit_price": f"{closes[-1] * 1.10:.2f}"}}
    order |= {"stop_loss": {"stop_price": f"{closes[-1] * 0.95:.2f}"}}
    order = call("POST", "/orders", json=order)
    print(f"bought {order['filled_qty']} at {order['filled_avg_price']}")
elif not rises and "AAPL" in held:
    call("DELETE", "/orders")  # The bracket holds the shares back.
    print(f"sold {call('DELETE', '/positions/AAPL')['qty']}")
else:
    print(f"nothing to do with {held.get('AAPL', 0)} AAPL and {call('GET', '/account')['cash']} dollars")
