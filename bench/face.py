"""What an order through the face for Alpaca's clients costs beside the same one on the native face.

    .venv/bin/python bench/face.py [ORDERS]

One client, by turns on either face, over HTTP against gunicorn on a PostgreSQL of its own: market orders, and
limits that rest and are canceled. What is printed is the median time of each, and their ratio.
"""

import sys
import tempfile
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from cast import Database, Server  # noqa: E402
from postgres import PostgresServer  # noqa: E402

ORDERS = int(sys.argv[1]) if len(sys.argv) > 1 else 500
NATIVE = {"ticker": "AAPL", "action": "buy", "quantity": "0.01", "time_in_force": "gtc"}
ALPACA = {"symbol": "AAPL", "side": "buy", "qty": "0.01", "time_in_force": "gtc"}


def main() -> None:
    with (
        tempfile.TemporaryDirectory(prefix="bench-face-") as folder,
        PostgresServer(Path(folder), settings={"unix_socket_directories": folder}) as postgres,
        Server(Database(postgres.create_database("face")).migrate().url) as server,
    ):
        session = server.trader().session

        def milliseconds(method: str, path: str, order: dict | None = None) -> tuple[float, dict | None]:
            started = time.perf_counter()
            answer = session.request(method, f"{server.url}{path}", json=order, timeout=60)
            assert answer.ok, answer.text
            return (time.perf_counter() - started) * 1000, answer.json() if answer.content else None

        faces = {"/api/v1/orders": (NATIVE, "order_type"), "/alpaca/v2/orders": (ALPACA, "type")}
        took = {(kind, path): [] for kind in ("market", "limit", "cancel") for path in faces}
        for _ in range(ORDERS):
            for path, (order, type_name) in faces.items():
                took["market", path].append(milliseconds("POST", path, order | {type_name: "market"})[0])
                resting = order | {type_name: "limit", "limit_price": "5"}
                spent, placed = milliseconds("POST", path, resting)
                took["limit", path].append(spent)
                took["cancel", path].append(milliseconds("DELETE", f"{path}/{placed['id']}")[0])
        for kind in ("market", "limit", "cancel"):
            native, alpaca = (median(took[kind, path]) for path in faces)
            print(f"{kind:7} native {native:6.2f} ms   alpaca {alpaca:6.2f} ms   {alpaca / native:.2f}")


if __name__ == "__main__":
    main()
