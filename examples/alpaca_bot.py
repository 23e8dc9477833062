"""A bot as they are written for Alpaca, with alpaca-py: one look at the market, and what follows from it.

    pip install alpaca-py
    python examples/alpaca_bot.py

It holds ten AAPL, bought with a bracket, while the average of the last ten days is above that of thirty.
But for `url_override` it would trade at Alpaca. `BROKER_URL` and `APCA_API_SECRET_KEY` name other places and
accounts than the test user's on this machine.
"""

import os
from datetime import UTC, datetime, timedelta
from uuid import uuid4

from alpaca.data.historical import StockHistoricalDataClient
from alpaca.data.requests import StockBarsRequest
from alpaca.data.timeframe import TimeFrame
from alpaca.trading.client import TradingClient
from alpaca.trading.requests import MarketOrderRequest, StopLossRequest, TakeProfitRequest

BROKER = os.environ.get("BROKER_URL", "http://127.0.0.1:8000/alpaca")
KEY = os.environ.get("APCA_API_SECRET_KEY", "test-api-key-123")
trading = TradingClient("any", KEY, url_override=BROKER)
data = StockHistoricalDataClient("any", KEY, url_override=BROKER)

start = datetime.now(UTC) - timedelta(days=60)
asked = StockBarsRequest(symbol_or_symbols="AAPL", timeframe=TimeFrame.Day, start=start)
closes = data.get_stock_bars(asked).df["close"]
rises = closes.tail(10).mean() > closes.tail(30).mean()
held = {position.symbol: position.qty for position in trading.get_all_positions()}

if rises and "AAPL" not in held:
    order = trading.submit_order(
        MarketOrderRequest(
            symbol="AAPL", qty=10, side="buy", time_in_force="gtc", order_class="bracket",
            take_profit=TakeProfitRequest(limit_price=round(closes.iloc[-1] * 1.10, 2)),
            stop_loss=StopLossRequest(stop_price=round(closes.iloc[-1] * 0.95, 2)),
            client_order_id=str(uuid4()),  # With it, to send the order again books nothing twice.
        )
    )  # fmt: skip
    print(f"bought {order.filled_qty} at {order.filled_avg_price}")
elif not rises and "AAPL" in held:
    trading.cancel_orders()  # The bracket holds the shares back.
    print(f"sold {trading.close_position('AAPL').qty}")
else:
    print(f"nothing to do with {held.get('AAPL', 0)} AAPL and {trading.get_account().cash} dollars")
