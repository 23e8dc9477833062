"""Runs a program that was written for Alpaca, and leads it here instead: nothing of it is changed.

    python examples/alpaca_redirect.py BOT.py [what the bot takes]

It changes the host of what the program asks through `requests`, as alpaca-py and alpaca-trade-api do. It
cannot catch websockets (there are none here), other ways of asking (httpx, aiohttp, a program in another
language), and processes that the program starts. `BROKER_URL` names another place than this machine. The
broker must know the program's secret: `flask --app app user add EMAIL --key SECRET` opens an account with it.
"""

import os
import re
import runpy
import sys

import requests

BROKER = os.environ.get("BROKER_URL", "http://127.0.0.1:8000/alpaca")
HOST = re.compile(r"https://(paper-api|api|data)\.alpaca\.markets")
ask = requests.Session.request


def ask_here(session, method, url, *more, **options):
    return ask(session, method, HOST.sub(BROKER, str(url), count=1), *more, **options)


if __name__ == "__main__":
    requests.Session.request = ask_here
    sys.argv = sys.argv[1:]
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")
