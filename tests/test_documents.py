"""The documents are true: what README, docs/ and .env.example say is compared with the program, or run."""

import json
import re
import subprocess
import sys

from cast import ROOT, SETTINGS, Server

README = (ROOT / "README.md").read_text()
DOCS = {page.stem: page.read_text() for page in (ROOT / "docs").glob("*.md")}
APP = (ROOT / "app.py").read_text()
LIVE = {
    "id": r'"id":"\d+"',
    "trade_id": r'"trade_id":"\d+"',
    "a moment": r'"(?:timestamp|placed_at|closed_at)":"202[6-9]-[^"]+"',
}


def test_the_endpoints_in_the_documents_are_the_routes(app):
    told = re.findall(r"^\| `([A-Z]+ /[^`]*)` \| (.+) \|$", DOCS["api"] + DOCS["alpaca"], re.M)
    assert len(told) == len(set(told))
    served = {
        (method + " " + re.sub(r"<(?:\w+[^:>]*:)?(.+?)>", r"{\1}", rule.rule), view.__doc__.splitlines()[0])
        for rule in app.app.url_map.iter_rules()
        for view in [app.app.view_functions[rule.endpoint]]
        for method in rule.methods - {"HEAD", "OPTIONS"}
        if not rule.endpoint.endswith("static")
    }
    assert set(told) == served


def test_the_error_codes_in_the_documents_are_those_of_the_program(app):
    told = {
        code: int(status)
        for status, codes in re.findall(r"^\| (\d{3}) \| (.+) \|$", DOCS["api"], re.M)
        for code in re.findall(r"`(\w+)`", codes)
    }
    assert told == app.STATUS


def test_every_code_that_is_raised_has_a_status(app):
    source = "".join(file.read_text() for file in ROOT.glob("*.py"))
    assert set(re.findall(r'Refused\(\s*"(\w+)"', source)) <= app.STATUS.keys()


def test_the_settings_are_told_where_they_are_looked_for(app):
    """In docs/settings.md with default and meaning, and in .env.example with the default."""
    fields = app.settings.__class__.model_fields
    rows = re.findall(r"^\| `([A-Z_]+)` \| (.+?) \| (.+) \|$", DOCS["settings"], re.M)
    assert {name: (default, meaning) for name, default, meaning in rows} == {
        name: (f"`{field.default}`" if field.default else "none", field.description)
        for name, field in fields.items()
    }
    example = dict(re.findall(r"^# ([A-Z_]+)=(.*)$", (ROOT / ".env.example").read_text(), re.M))
    assert example == {name: field.default or "" for name, field in fields.items()}
    assert example.keys() == SETTINGS


def anchors(page) -> set[str]:
    """The headings of a page, as links name them."""
    headings = re.findall("^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


def test_links_between_the_documents_lead_somewhere():
    pages = [*ROOT.glob("*.md"), *ROOT.glob("[a-z]*/*.md")]
    links = [
        (page, *link.split("#"))
        for page in pages
        for link in re.findall(r"\]\((?!http)(.+?)\)", page.read_text())
    ]
    assert len(links) > 30
    for page, path, *anchor in links:
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), (page, path)
        assert not anchor or anchor[0] in anchors(target), (page, path, anchor)


def sessions() -> list[tuple[str, str]]:
    """Each line of the sessions after its `$`, with the answer that is printed below it.

    Those of the guide to deployment and of TradingView's alerts are run by tests of their own.
    """
    others = ("deploy", "tradingview")
    pages = [README, *(page for name, page in sorted(DOCS.items()) if name not in others)]
    lines = "\n".join(re.findall(r"```console\n(.*?)```", "\n".join(pages), re.S))
    return re.findall(r"^\$ (.+)\n((?:(?!\$ ).*\n?)*)", lines, re.M)


def masked(text: str) -> str:
    for name, pattern in LIVE.items():
        text = re.sub(pattern, name, text)
    return text.strip()


def test_the_sessions_in_the_documents_answer_as_printed(program):
    """Run line by line against `python app.py`, in a copy of the program as a newcomer has it."""
    server = Server("", command=[sys.executable, "app.py"], CORPORATE_ACTIONS="")
    server.folder = program
    with server:
        assert f"Serving sample prices on {server.url}. Try: curl" in server.log()
        (define, _), *lines = sessions()
        define = define.replace("http://127.0.0.1:8000", server.url)
        assert len(lines) > 20
        wrong = []
        for line, answer in lines:
            shell = subprocess.run(
                ["bash", "-c", f"{define}\n{line}"], capture_output=True, text=True, timeout=30
            )
            if masked(shell.stdout) != masked(answer):
                wrong.append(f"$ {line}\n{shell.stdout}")
        assert not wrong, "The documents would have to say:\n" + "".join(wrong)


def test_the_first_lines_of_curl_can_be_pasted_one_by_one(program):
    session = README.split("## A first session")[1].split("## ")[0]
    lines = session.split("```sh\n")[1].split("```")[0].splitlines()
    printed = json.loads(session.split("```json\n")[1].split("```")[0])
    assert not any("'" in line for line in lines), "Windows knows no single quotes."
    server = Server("", command=[sys.executable, "app.py"], CORPORATE_ACTIONS="")
    server.folder = program
    with server:
        answers = [
            subprocess.run(
                ["sh", "-c", line.replace("http://127.0.0.1:8000", server.url)],
                capture_output=True, text=True, timeout=30,
            ).stdout
            for line in lines
        ]  # fmt: skip
    price, bars, trade, order, portfolio, trades = answers
    assert '"ticker":"AAPL","price":' in price
    assert bars.count('"open":') == 3
    assert '"trade_type":"buy","quantity":1,' in trade
    assert list(json.loads(trade)) == list(printed)
    assert '"status":"open"' in order
    assert '"holdings":[{"ticker":"AAPL","quantity":1,' in portfolio
    assert json.loads(trades)["trades"][0] == json.loads(trade)


def test_the_readme_is_read_in_one_sitting():
    assert len(README.splitlines()) < 150


def test_contributors_are_told_the_two_commands_of_the_readme():
    commands = re.findall(r"^python3 -m venv .+$", README, re.M)
    assert len(commands) == 2
    assert re.findall(r"^python3 -m venv .+$", (ROOT / "CONTRIBUTING.md").read_text(), re.M) == commands
