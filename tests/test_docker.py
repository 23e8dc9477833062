"""In a container, as far as can be told without one: what the image holds is put into a folder, and its
commands are run there, and those of compose.yaml against the real PostgreSQL of the tests.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
import requests
import yaml
from cast import ROOT, SETTINGS, Server, environment, free_port

DOCKERFILE = (ROOT / "Dockerfile").read_text()
IGNORED = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
COMPOSE = (ROOT / "compose.yaml").read_text()
SERVICES = yaml.safe_load(COMPOSE)["services"]
PROCFILE = dict(line.split(": ", 1) for line in (ROOT / "Procfile").read_text().splitlines())
INSTRUCTIONS = [line.split(maxsplit=1) for line in DOCKERFILE.splitlines() if line and line[0] != "#"]
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"


def said(instruction: str) -> str:
    """What the one instruction of that name in the Dockerfile says."""
    (found,) = [rest for name, rest in INSTRUCTIONS if name == instruction]
    return found


def command(instruction: str) -> list[str]:
    """The words of a command, which is written as JSON so that no shell stands between."""
    return json.loads(said(instruction)[said(instruction).index("[") :])


def run(command: list[str], **settings) -> int:
    """What a command ends with, given these settings."""
    return subprocess.run(
        command, env=environment(PATH=PATH, **settings), capture_output=True, timeout=60
    ).returncode


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> Path:
    """A folder with what `COPY . .` leaves in the image, and nothing else."""
    assert ["COPY", ". ."] in INSTRUCTIONS
    everything, *kept, caches = IGNORED
    assert (everything, caches, {line[0] for line in kept}) == ("*", "**/__pycache__", {"!"})
    folder = tmp_path_factory.mktemp("image")
    for pattern in kept:
        found = list(ROOT.glob(pattern.removeprefix("!")))
        assert found, f"There is no {pattern.removeprefix('!')} to put into the image."
        for path in found:
            if path.is_dir():
                shutil.copytree(path, folder / path.name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(path, folder)
    (folder / "instance").mkdir()
    return folder


@pytest.fixture
def container(image, postgres):
    """The broker as the image starts it, in that folder, on an empty database."""
    url = postgres.create_database(f"docker_{uuid.uuid4().hex}")
    server = Server(url, command=command("CMD"), PATH=PATH)
    server.folder = image
    with server:
        yield server


def test_the_image_has_all_that_it_takes_to_trade_and_says_how_it_is(container):
    alice = container.trader()
    assert alice.buys(1, "AAPL")["trade_type"] == "buy"
    for page in ("/", "/docs", "/static/dashboard.js", "/openapi.json"):
        assert requests.get(container.url + page, timeout=30).status_code == 200
    check = command("HEALTHCHECK")
    assert run(check, PORT=container.port) == 0
    container.stop()
    assert run(check, PORT=container.port) != 0


def test_a_container_whose_database_is_away_is_not_healthy(image, tmp_path):
    nowhere = f"postgresql://simulator@127.0.0.1:{free_port()}/simulator"
    serve = ["sh", "-c", command("CMD")[2].split(" && ")[1]]  # The tables are there already.
    server = Server(nowhere, command=serve, PATH=PATH)
    server.folder = image
    with server:
        assert run(command("HEALTHCHECK"), PORT=server.port) != 0


def test_the_image_runs_the_commands_that_hosts_run_and_not_as_root():
    assert command("CMD") == ["sh", "-c", f"{PROCFILE['release']} && exec {PROCFILE['web']}"]
    names = [name for name, _ in INSTRUCTIONS]
    assert names[0] == "FROM"
    assert said("USER") not in ("root", "0")
    assert names.index("USER") > max(n for n, name in enumerate(names) if name in ("RUN", "COPY"))
    assert set(names) == set("FROM WORKDIR COPY RUN USER ENV EXPOSE HEALTHCHECK CMD".split())


def test_no_secret_and_no_database_gets_into_the_image(image):
    assert not {".env", ".git", "tests", ".venv"} & {path.name for path in image.iterdir()}
    assert list((image / "instance").iterdir()) == []
    assert not re.search("KEY|PASSWORD|SECRET", DOCKERFILE)


def test_compose_starts_the_image_when_its_postgresql_answers(postgres):
    simulator, database = SERVICES["simulator"], SERVICES["database"]
    assert simulator["depends_on"] == {"database": {"condition": "service_healthy"}}
    user = database["environment"]["POSTGRES_USER"]
    assert simulator["environment"]["DATABASE_URL"].startswith(f"postgresql://{user}:")
    assert simulator["environment"]["DATABASE_URL"].endswith(f"@database/{user}")  # It is named as its user.
    form, program, *options = database["healthcheck"]["test"]
    assert (form, options[-1]) == ("CMD", f"--username={user}")
    is_ready = [str(postgres.binary(program)), *options]
    assert (run(is_ready, PGPORT=postgres.port), run(is_ready, PGPORT=free_port())) == (0, 2)


def test_compose_has_no_secret_of_its_own_and_lets_nobody_in_from_outside():
    simulator, database = SERVICES["simulator"], SERVICES["database"]
    secrets = re.findall(r"^ +\w*(?:PASSWORD|ADMIN_API_KEY): (.+)$", COMPOSE, re.M)
    assert sorted(secrets) == ["${ADMIN_API_KEY:?}", "${POSTGRES_PASSWORD:?}"]  # Without them it ends.
    assert simulator["environment"].keys() <= SETTINGS
    assert [port.rsplit(":", 1)[1] for port in simulator["ports"]] == [said("EXPOSE")]
    assert said("ENV") == f"PORT={said('EXPOSE')}"
    assert (simulator["ports"][0].startswith("127.0.0.1:"), "ports" in database) == (True, False)
    (volume,) = database["volumes"]
    assert volume.split(":")[0] in yaml.safe_load(COMPOSE)["volumes"]


def test_the_guide_sets_what_compose_wants(tmp_path):
    guide = (ROOT / "docs" / "deploy.md").read_text().split("\n## Docker\n")[1].split("\n## ")[0]
    (block,) = re.findall("```sh\n(.*?)```", guide, re.S)
    settings, start = block.rstrip().rsplit("\n", 1)
    assert start.startswith("docker compose up ")
    subprocess.run(["bash", "-euc", settings], cwd=tmp_path, check=True, timeout=30)
    written = dict(line.split("=", 1) for line in (tmp_path / ".env").read_text().splitlines())
    assert written.keys() == set(re.findall(r"\${(\w+):\?", COMPOSE))
    assert {re.fullmatch("[0-9a-f]{64}", value) is not None for value in written.values()} == {True}
