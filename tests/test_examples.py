"""The example bot runs through the recorded year as a user would run it, with an exact result."""

import subprocess
import sys

from cast import ROOT, exact

RESULT = """\
starting_cash             100000
equity                    98580.152
total_return_percent      -1.42
annual_return_percent     -1.43
annual_volatility_percent 16.17
sharpe_ratio              -0.00762956
sortino_ratio             -0.01004506
exposure_percent          37.45
max_drawdown_percent      12.5
trades                    6
realized_pnl              -1419.848
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
