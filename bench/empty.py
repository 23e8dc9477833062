"""What gunicorn and Flask take before this program does anything: a route that answers an empty object, and
one that executes the statements of a trade on SQLite first. `compare.py` serves it beside the whole program.
"""

import itertools
import os
from functools import cache
from threading import Lock

from compare import raw_trade, sqlite_opened
from flask import Flask

app, lock, numbers = Flask("empty"), Lock(), itertools.count()
connection = cache(sqlite_opened)  # After the fork.


@app.get("/health")
@app.get("/api/v1/price/<ticker>")
def nothing(ticker=None):
    return {}


@app.post("/api/v1/trade")
def trade():
    number = next(numbers)
    with lock:
        raw_trade(connection(os.environ["RAW"]), f"{os.getpid()} {number}", number)
    return {}
