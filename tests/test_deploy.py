"""On a host: the files that hosts read, and docs/deploy.md, as far as one machine can tell.

The schemas of the files are not here: Render and Railway publish theirs without a licence, Heroku has only
prose. So each file is read and must fit the others and the program, and the commands in it are run: `hosted`
is a broker started by Render's command, as somebody to whom PostgreSQL gives few connections.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from copy import copy
from pathlib import Path

import pytest
import requests
import yaml
from cast import ADMIN, ROOT, SETTINGS, Database, Server, environment, free_port
from sqlalchemy import inspect
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError
from standins import write_certificate

GUIDE = (ROOT / "docs" / "deploy.md").read_text()
PROCFILE = dict(line.split(": ", 1) for line in (ROOT / "Procfile").read_text().splitlines())
RENDER = yaml.safe_load((ROOT / "render.yaml").read_text())
RAILWAY = json.loads((ROOT / "railway.json").read_text())
HEROKU = json.loads((ROOT / "app.json").read_text())
GITHUB = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text())
UNIT = (ROOT / "deploy" / "simulator.service").read_text()
SITE = (ROOT / "deploy" / "nginx.conf").read_text()
BIN = Path(sys.executable).parent


def program_named(name: str, package: str | None = None) -> str:
    """Where a program is that a test needs; in CI it must be there."""
    found = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")
    if not found:
        missing = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        missing(f"There is no {name} here: apt-get install {package or name}")
    return found


def blocks(heading: str, language: str) -> list[str]:
    """The blocks of code under a heading of the guide."""
    section = GUIDE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.findall(rf"```{language}\n(.*?)```", section, re.S)


def shell(lines: str, folder=ROOT, path="", **settings) -> str:
    """Run lines of the guide, and answer what they print."""
    done = subprocess.run(
        ["bash", "-euc", lines],
        cwd=folder,
        env=environment(PATH=f"{path}:{os.environ['PATH']}", **settings),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, f"{lines}\n{done.stdout}{done.stderr}"
    return done.stdout


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
    with host(RENDER["services"][0]["startCommand"], url) as server:
        yield server


@pytest.fixture(scope="module")
def installed(program) -> Path:
    """The program with the environment in which its own server or a newcomer runs it."""
    (program / ".venv").mkdir()
    (program / ".venv" / "bin").symlink_to(BIN)
    (program / "instance").mkdir(exist_ok=True)
    return program


def crowd_trades(server: Server) -> None:
    """More bots at once than there are connections: none is turned away, and the books hold."""
    traders = [server.trader() for _ in range(8)]
    with ThreadPoolExecutor(64) as bots:
        orders = [bots.submit(traders[n % 8].order, "buy", 1, "IBM") for n in range(192)]
    assert [order.result().status_code for order in orders] == [200] * 192
    assert [trader.audit() for trader in traders] == [{"ok": True, "trades": 24, "differences": []}] * 8


# The guide


def test_the_first_account_is_opened_without_a_shell(hosted):
    own = {"URL": hosted.url, "ADMIN_API_KEY": ADMIN, "API_KEY": ""}
    lines = re.findall(r"^\$ (.+)\n(\{.+\n)?", "".join(blocks("The first account", "console")), re.M)
    assert [line.split()[0] for line, _ in lines].count("curl") == 4
    for line, printed in lines:
        if line.partition("=")[0] in own:
            continue  # What everybody fills in.
        answer = shell(line, **own)
        own["API_KEY"] = json.loads(answer).get("api_key", own["API_KEY"])
        assert re.sub("[0-9a-f]{64}", "5f0c7a91...64 characters", answer) == printed, line


def test_a_crowd_is_served_over_the_few_connections_of_a_small_host(hosted):
    crowd_trades(hosted)


def test_postgresql_is_backed_up_while_it_serves_and_restored(hosted, postgres, installed):
    hosted.trader().sees("AAPL", at=10).buys(1, "AAPL")
    back_up, restore = blocks("Back up and restore", "sh")[:2]
    old, new = Database(hosted.database_url.replace("postgres://", "postgresql://")), small_database(postgres)
    said = shell(
        back_up + restore,
        folder=installed,
        path=postgres.binary("pg_dump").parent,
        DATABASE_URL=old.url,
        NEW_DATABASE_URL=new.url,
    )
    (count,) = old.run("SELECT count(*) FROM ibkr_trades")[0]
    assert said.endswith(f"{count} trades replayed, 0 differences.\n")
    tables = inspect(old.engine).get_table_names()
    assert len(tables) > 5
    for table in tables:
        rows = f"SELECT * FROM {table} ORDER BY 1"
        assert new.run(rows) == old.run(rows), table
    with pytest.raises(DBAPIError, match="append-only"):
        new.run("DELETE FROM ibkr_trades")


@pytest.mark.parametrize("engine_name", ["sqlite"], indirect=True, scope="session")
def test_sqlite_is_backed_up_while_it_serves_and_restored(alice, database, installed):
    program_named("sqlite3")
    back_up, restore = blocks("Back up and restore", "sh")[2:]
    file, live = installed / "instance" / "simulator.db", Path(make_url(database.url).database)
    file.symlink_to(live)
    before = alice.sees("AAPL", at=1).buys(1, "AAPL")
    over = threading.Event()

    def trade_on():
        while not over.is_set():
            alice.buys(1, "AAPL")

    with ThreadPoolExecutor() as pool:
        trading = pool.submit(trade_on)
        shell(back_up, installed)
        over.set()
        trading.result()
    file.unlink()
    for part in ("", "-wal", "-shm"):  # What a server leaves that was killed.
        shutil.copy(f"{live}{part}", f"{file}{part}")
    said = shell(restore, installed)
    trades = Database(f"sqlite:///{file}").run("SELECT id FROM ibkr_trades")
    assert int(before["id"]) in [id for (id,) in trades]
    assert said.endswith(f"{len(trades)} trades replayed, 0 differences.\n")


# The files that hosts read


def test_every_host_runs_the_same_two_commands():
    release, web = PROCFILE["release"], PROCFILE["web"]
    assert RENDER["services"][0]["startCommand"] == f"{release} && exec {web}"
    assert (RAILWAY["deploy"]["preDeployCommand"], RAILWAY["deploy"]["startCommand"]) == ([release], web)
    assert f"\nExecStartPre=/opt/simulator/.venv/bin/{release}\n" in UNIT
    assert f"\nExecStart=/opt/simulator/.venv/bin/{web} --bind 127.0.0.1:8000\n" in UNIT


def words(part) -> set[str]:
    """Every name in a host's file, but for those of our own settings."""
    if isinstance(part, dict):
        return (part.keys() - SETTINGS).union(*map(words, part.values()))
    return set().union(*map(words, part)) if isinstance(part, list) else set()


def test_the_hosts_files_use_the_words_that_hosts_know():
    """As their references name them: Render says healthCheckPath, and Railway healthcheckPath."""
    assert words(RENDER) <= set(
        "services type name runtime region plan buildCommand preDeployCommand startCommand healthCheckPath "
        "envVars key value sync generateValue fromDatabase property databases ipAllowList".split()
    )
    assert words(RAILWAY) <= set(
        "$schema build builder buildCommand deploy preDeployCommand startCommand healthcheckPath "
        "healthcheckTimeout restartPolicyType restartPolicyMaxRetries".split()
    )
    assert words(HEROKU) <= set(
        "name description keywords website repository success_url buildpacks url formation web quantity size "
        "addons plan env generator value required".split()
    )


def test_the_hosts_files_name_what_there_is(app):
    (service,), (database,) = RENDER["services"], RENDER["databases"]
    given = {entry["key"]: entry for entry in service["envVars"]}
    assert given["DATABASE_URL"]["fromDatabase"] == {"name": database["name"], "property": "connectionString"}
    assert given["ADMIN_API_KEY"]["generateValue"] is True
    assert HEROKU["env"]["ADMIN_API_KEY"]["generator"] == "secret"
    # Railway builds a Dockerfile wherever it finds one; the others are told to build for Python.
    assert (ROOT / "Dockerfile").exists() == (RAILWAY["build"]["builder"] == "DOCKERFILE")
    assert (service["runtime"], HEROKU["buildpacks"]) == ("python", [{"url": "heroku/python"}])
    assert given.keys() | HEROKU["env"].keys() <= SETTINGS
    paths = {service["healthCheckPath"], RAILWAY["deploy"]["healthcheckPath"], HEROKU["success_url"]}
    assert paths <= {rule.rule for rule in app.app.url_map.iter_rules()}
    assert (
        f"With Python {(ROOT / '.python-version').read_text().strip()} or" in (ROOT / "README.md").read_text()
    )


def test_github_runs_what_ci_runs_on_the_pythons_that_the_readme_names():
    (job,) = GITHUB["jobs"].values()
    named = re.search(r"CI runs them all on Python (.+)\.\n", (ROOT / "README.md").read_text())[1]
    versions = re.findall(r"3\.\d+", named)
    assert job["strategy"]["matrix"] == {"python": versions}
    assert versions[0] == (ROOT / ".python-version").read_text().strip()

    checkout, python, *commands = job["steps"]
    assert checkout["uses"].startswith("actions/checkout@")
    assert python["uses"].startswith("actions/setup-python@")
    assert python["with"] == {"python-version": "${{ matrix.python }}"}
    assert commands[-1] == {"run": ".ci/run"}
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    wanted = re.search("for program in (.+); do", (ROOT / ".ci" / "run").read_text())[1].split()
    assert set(wanted) <= set(re.findall(r"[\w-]+", " ".join(step["run"] for step in commands)))


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


# One's own server


@contextmanager
def nginx(to_port: int):
    """The real nginx with our site, on another port, before whatever listens on `to_port`."""
    program, port = program_named("nginx"), free_port()
    site = re.sub(r"listen .*:80;", "", SITE).replace("listen 80;", f"listen 127.0.0.1:{port};")
    with tempfile.TemporaryDirectory(prefix="broker-nginx-") as folder:
        Path(folder, "nginx.conf").write_text(
            f"daemon off; master_process off; pid {folder}/pid; error_log stderr;\nevents {{}}\n"
            f"http {{ access_log off; client_body_temp_path {folder}/in; proxy_temp_path {folder}/out;\n"
            + site.replace("127.0.0.1:8000", f"127.0.0.1:{to_port}")
            + "}\n"
        )
        process = subprocess.Popen([program, "-c", f"{folder}/nginx.conf", "-e", "stderr"])
        try:
            deadline = time.monotonic() + 10
            while time.monotonic() < deadline:
                try:
                    socket.create_connection(("127.0.0.1", port)).close()
                    break
                except ConnectionRefusedError:
                    assert process.poll() is None, "nginx does not understand deploy/nginx.conf."
                    time.sleep(0.01)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait()


def test_nginx_passes_a_crowd_on_and_the_programs_own_answers(hosted):
    public = copy(hosted)
    with nginx(hosted.port) as public.url:
        crowd_trades(public)
        too_large = public.trader().ask("POST", "/api/v1/trade", json="x" * 70_000)
    assert (too_large.status_code, too_large.json()["code"]) == (413, "too_large")


def test_nginx_says_who_asks_and_passes_no_half_answer_as_a_whole_one():
    """Behind it something that dies in the middle of an answer, as a worker may that is killed."""
    asked = []

    def answer_by_half():
        connection, _ = listener.accept()
        with connection:
            asked.extend(connection.recv(65536).decode().split("\r\n"))
            connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n")

    with socket.create_server(("127.0.0.1", 0)) as listener, nginx(listener.getsockname()[1]) as url:
        threading.Thread(target=answer_by_half, daemon=True).start()
        with pytest.raises(requests.exceptions.ChunkedEncodingError):
            requests.get(f"{url}/api/v1/trades.csv", headers={"X-Forwarded-For": "1.2.3.4"}, timeout=10)
    assert asked[0] == "GET /api/v1/trades.csv HTTP/1.1"
    assert {"X-Forwarded-For: 1.2.3.4, 127.0.0.1", "X-Forwarded-Proto: http", "Host: 127.0.0.1"} <= set(asked)


def test_systemd_understands_the_unit(installed, tmp_path):
    unit = tmp_path / "simulator.service"
    unit.write_text(UNIT.replace("/opt/simulator", str(installed)))
    command = [program_named("systemd-analyze", package="systemd"), "verify", unit]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, "simulator" in done.stderr) == (0, False), done.stderr


def test_the_unit_reaches_postgresql_with_the_settings_of_the_guide(postgres, installed):
    """Through a socket, with no password; PGUSER is here what the user `simulator` is there."""
    name = small_database(postgres).engine.url.database
    (settings,) = re.findall(r"sudo tee /etc/simulator.env (<<EOF\n.*?\nEOF\n)", GUIDE, re.S)
    settings = dict(line.split("=", 1) for line in shell(f"cat {settings}").splitlines())
    assert re.fullmatch("[0-9a-f]{64}", settings["ADMIN_API_KEY"])
    here = f"/{name}?host={postgres.directory}&port={postgres.port}"
    settings["DATABASE_URL"] = settings["DATABASE_URL"].replace("/simulator?host=/var/run/postgresql", here)
    command = re.search("^ExecStartPre=(.+)$", UNIT, re.M)[1].replace("/opt/simulator", str(installed))
    shell(command, installed, PGUSER=name, **settings)
    tables = inspect(Database(postgres.url(name)).engine).get_table_names()
    assert "ibkr_trades" in tables
