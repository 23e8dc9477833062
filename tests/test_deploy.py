"""On a host, which gives few connections, through a pooler perhaps."""

import os
import shutil
import subprocess
import sys
import tempfile
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import ROOT, Database, Server, free_port
from sqlalchemy import inspect
from sqlalchemy.engine import make_url
from standins import write_certificate

PROCFILE = dict(line.split(": ", 1) for line in (ROOT / "Procfile").read_text().splitlines())
BIN = Path(sys.executable).parent


def program_named(name: str, package: str | None = None) -> str:
    """Where a program is that a test needs; in CI it must be there."""
    found = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")
    if not found:
        missing = pytest.fail if os.environ.get("CI") else pytest.skip
        missing(f"There is no {name} here: apt-get install {package or name}")
    return found


def small_database(postgres) -> Database:
    """An empty database whose owner may do nothing else and has 15 connections: Supabase's smallest size."""
    name = f"host_{uuid.uuid4().hex}"
    url = make_url(postgres.create_database(name))
    superuser = Database(url.render_as_string())
    superuser.run(f"CREATE ROLE {name} LOGIN CONNECTION LIMIT 15")
    superuser.run(f"ALTER DATABASE {name} OWNER TO {name}")
    superuser.engine.dispose()
    return Database(url.set(username=name).render_as_string())


def host(command: str, url: str, **settings) -> Server:
    """The broker as a host starts it: a command for the shell, the settings, and the PORT to listen on."""
    path = f"{BIN}:{os.environ['PATH']}"
    return Server(url, command=["bash", "-c", command], RENDER="true", PATH=path, **settings)


@pytest.fixture(scope="module")
def hosted(postgres):
    url = small_database(postgres).url.replace("postgresql://", "postgres://")  # Heroku's spelling.
    with host(f"{PROCFILE['release']} && exec {PROCFILE['web']}", url) as server:
        yield server


def crowd_trades(server: Server) -> None:
    """More bots at once than there are connections: none is turned away, and the books hold."""
    traders = [server.trader() for _ in range(8)]
    with ThreadPoolExecutor(64) as bots:
        orders = [bots.submit(traders[n % 8].order, "buy", 1, "IBM") for n in range(192)]
    assert [order.result().status_code for order in orders] == [200] * 192
    assert [trader.audit() for trader in traders] == [{"ok": True, "trades": 24, "differences": []}] * 8


def test_a_crowd_is_served_over_the_few_connections_of_a_small_host(hosted):
    crowd_trades(hosted)


# Supabase


@contextmanager
def pooler(to_port: int, user: str):
    """PgBouncer as strict as it gets: each transaction on another connection, TLS, nothing ignored."""
    bouncer, port = program_named("pgbouncer"), free_port()
    with tempfile.TemporaryDirectory(prefix="broker-pooler-") as name:
        folder = Path(name)
        certificate, key = write_certificate(folder)
        (folder / "pgbouncer.ini").write_text(
            f"[databases]\n* = host=127.0.0.1 port={to_port} user={user}\n"
            f"[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\n"
            f"auth_type = any\npool_mode = transaction\ndefault_pool_size = 12\n"
            f"client_tls_sslmode = require\n"
            f"client_tls_cert_file = {certificate}\nclient_tls_key_file = {key}\n"
        )
        as_nobody = ["--user", "nobody"] if os.geteuid() == 0 else []  # It will not run as root.
        for path in (folder, *folder.iterdir()):
            path.chmod(0o755)
        process = subprocess.Popen([bouncer, "--quiet", *as_nobody, folder / "pgbouncer.ini"])
        try:
            yield port
        finally:
            process.kill()
            process.wait()


def test_supabase_takes_the_paste_and_its_pooler_the_crowd(postgres):
    database = small_database(postgres)
    with database.engine.connect() as editor:
        editor.connection.cursor().execute((ROOT / "database_setup.sql").read_text())
    for table in inspect(database.engine).get_table_names():  # What the editor offers to do.
        database.run(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY")
    url = make_url(database.url)
    with pooler(postgres.port, url.username) as port:
        pooled = url.set(port=port, query={"sslmode": "require"}).render_as_string()
        with host(f"{PROCFILE['release']} && exec {PROCFILE['web']}", pooled) as server:
            assert "Running upgrade" not in server.log()
            crowd_trades(server)
