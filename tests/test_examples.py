"""The example bots run through the recorded year as a user would run them, with an exact result."""

import subprocess
import sys

import pytest
from cast import ROOT, Server, exact


@pytest.fixture(scope="module")
def server(new_database_on):
    """As a newcomer has it: SQLite, and the recorded year pays its dividends."""
    with Server(new_database_on("sqlite").migrate().url, CORPORATE_ACTIONS="") as server:
        yield server


RESULT = """\
starting_cash             100000
equity                    99001.502
total_return_percent      -1
annual_return_percent     -1
annual_volatility_percent 16.15
sharpe_ratio              0.01867626
sortino_ratio             0.02460732
exposure_percent          37.45
max_drawdown_percent      12.45
trades                    6
realized_pnl              -998.498
dividends                 421.35
winning_sales             1
losing_sales              2
even_sales                0
win_rate_percent          33.33
profit_factor             0.91414409
commission                0
fees_percent              0
"""


def test_the_crossover_bot_makes_exactly_this_of_the_recorded_year(alice, tmp_path):
    bot = [sys.executable, ROOT / "examples" / "crossover.py", "--backtest"]
    done = subprocess.run(
        [*bot, "--url", alice.server.url, "--key", alice.key],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
    )
    assert done.stderr == ""
    assert done.stdout.startswith(RESULT)  # And a picture, where matplotlib is installed.
    assert alice.audit()["ok"]
    assert exact(alice.ask("GET", "/api/v1/market"))["now"] == "2013-03-01T00:00:00Z"


BREAKOUT = """\
2012-04-02 buy   153 at 618.63
2012-04-16 sell  153 at 580.13
2012-08-16 buy   140 at 636.34
2012-08-27 sell  140 at 674.4
2012-09-06 buy   139 at 676.27
2012-10-05 sell  139 at 652.59
equity                    96146.38
total_return_percent      -3.85
max_drawdown_percent      8.36
trades                    6
win_rate_percent          33.33
"""


def test_the_breakout_bot_leaves_its_brackets_and_makes_exactly_this_of_the_year(alice):
    bot = [sys.executable, ROOT / "examples" / "breakout.py", "--url", alice.server.url, "--key", alice.key]
    done = subprocess.run(bot, capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == (BREAKOUT, "")
    assert alice.audit()["ok"]
    assert [trade["order_id"] is not None for trade in alice.trades] == [True] * 6
