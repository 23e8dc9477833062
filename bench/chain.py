"""How many of our own functions one warm market order goes through, from the request to the answer.

    .venv/bin/python bench/chain.py [--without-key] [FOLDER]

FOLDER is a checkout of this program, by default the one around this file, and our own is what stands in the
code files directly in it. The order comes from Flask's test client and goes to a PostgreSQL of its own. A
call is what `sys.setprofile` reports as one in the thread of the request, and so is a generator that goes
on, such as the end of a `with` block. Comprehensions, generator expressions and lambdas are none: they are
read with the function that they stand in. A change of file is a call in another file than the one before.
"""

import argparse
import io
import os
import subprocess
import sys
import tempfile
from contextlib import redirect_stderr
from itertools import pairwise
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))

from cast import environment  # noqa: E402
from postgres import PostgresServer  # noqa: E402

KEY, WARM_UP, COUNTED = "bench-key-of-the-chain", 20, 3
ORDER = b'{"ticker": "AAPL", "action": "buy", "quantity": 1}'  # As bytes: the client has the app write JSON.


def chain(folder: Path, with_key: bool) -> list[tuple[str, str]]:
    """The file and the name of each function that is called, in this order."""
    sys.path.insert(0, str(folder))
    with redirect_stderr(io.StringIO()):  # Where the program's log goes from now on.
        from app import app
    client, chains = app.test_client(), []

    def called(frame, event, _) -> None:
        file, code = Path(frame.f_code.co_filename), frame.f_code
        if event == "call" and file.parent == folder and not code.co_name.startswith("<"):
            chains[-1].append((file.name, code.co_qualname))

    for number in range(WARM_UP + COUNTED):
        headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
        headers |= {"Idempotency-Key": f"order {number}"} if with_key else {}
        chains.append([])
        sys.setprofile(called)
        response = client.post("/api/v1/trade", data=ORDER, headers=headers, buffered=True)
        sys.setprofile(None)
        assert response.status_code == 200, response.text
    return min(chains[WARM_UP:], key=len)  # Where a minute turns, prices are looked up anew.


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, default=HERE.parent)
    parser.add_argument("--without-key", action="store_true", help="send no Idempotency-Key")
    options = parser.parse_args()
    folder = options.folder.resolve()
    with tempfile.TemporaryDirectory(prefix="broker-chain-") as place:
        Path(place).chmod(0o755)  # PostgreSQL may have to run as another user.
        with PostgresServer(Path(place) / "postgres") as postgres:
            os.environ |= environment(DATABASE_URL=postgres.create_database("chain"), PRICE_SOURCES="sample")
            for command in ("db upgrade", f"user add chain@example.com --key {KEY}"):
                flask = [sys.executable, "-m", "flask", "--app", "app", *command.split()]
                subprocess.run(flask, cwd=folder, check=True, capture_output=True)
            calls = chain(folder, not options.without_key)
    for file, name in calls:
        print(f"{file}:{name}")
    functions, files = len(set(calls)), len({file for file, _ in calls})
    changes = sum(one[0] != other[0] for one, other in pairwise(calls))
    print(f"{len(calls)} calls, {functions} different functions, {files} files, {changes} changes of file")


if __name__ == "__main__":
    main()
