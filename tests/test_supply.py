"""What comes from others: packages that may have known vulnerabilities, and vendored files."""

import hashlib
import os
import re
import subprocess
import sys
from importlib.metadata import version

from cast import ROOT
from standins import MarketStandIn

HOLE = {
    "id": "PYSEC-2026-1",
    "aliases": [],
    "summary": "",
    "details": "Anybody may do anything.",
    "fixed_in": ["99.0"],
    "link": "",
    "source": "",
    "withdrawn": None,
}


def audit(**surroundings) -> tuple[int, list[str]]:
    """What `.ci/audit.py` answers and says of the environment that the tests run in."""
    command = [sys.executable, ROOT / ".ci" / "audit.py"]
    done = subprocess.run(command, env=os.environ | surroundings, capture_output=True, text=True, timeout=150)
    assert done.stderr == ""
    return done.returncode, done.stdout.splitlines()


def test_a_known_vulnerability_fails_the_audit():
    with MarketStandIn() as internet:
        internet.pypi("flask", body={"vulnerabilities": [HOLE]})
        internet.pypi("click", body="", status=404)
        failed, (hole, count) = audit(**internet.environment)
    assert failed
    assert hole == f"flask {version('flask')}: PYSEC-2026-1, mended in 99.0."
    numbers = re.fullmatch(r"(\d+) of (\d+) packages were looked up; known vulnerabilities: 1\.", count)
    assert int(numbers[1]) == int(numbers[2]) - 1 > 50


def test_an_audit_that_can_ask_nobody_says_so_and_lets_it_pass(tmp_path):
    nobody = dict.fromkeys(("HTTPS_PROXY", "https_proxy"), "http://127.0.0.1:1")
    passed, said = audit(**nobody, XDG_CACHE_HOME=str(tmp_path))
    assert (passed, said) == (0, ["PyPI could not be asked for known vulnerabilities: nothing was audited."])


SAYS = {
    "MIT": "Permission is hereby granted, free of charge",
    "MPL-2.0": "Mozilla Public License, version 2.0",
    "Public domain": "Quandl declared that data public domain",
}


def test_what_is_vendored_is_listed_unchanged_and_its_licence_is_there():
    listed = set()
    row = r"^\| `(.+)` \| .+ \| (.+?), (.+) \| `([0-9a-f]{64})` \|$"
    for file, licence, texts, digest in re.findall(row, (ROOT / "VENDORED.md").read_text(), re.M):
        listed.add(ROOT / file)
        assert hashlib.sha256((ROOT / file).read_bytes()).hexdigest() == digest, file
        text, *others = [(ROOT / path).read_text() for path in re.findall(r"\]\((.+?)\)", texts)]
        assert SAYS[licence] in text, file
        assert all(others), file
    vendored = [path for folder in ("static", "tests") for path in (ROOT / folder / "vendor").rglob("*")]
    ours = re.compile("README.md|LICENSE.*")
    files = {path for path in vendored if path.is_file() and not ours.fullmatch(path.name)}
    assert listed == files | {ROOT / "sample_market" / "prices.csv"}
