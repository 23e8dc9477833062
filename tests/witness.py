"""Holds what a server answers to what it says of itself at /openapi.json.

`Trader.ask` has every answer of every test held, so that what no test of the description thinks of is held
as well: a refusal in the middle of a race, a database that fails, a limit.
"""

import re
from urllib.parse import urlsplit

import requests
import simplejson
from jsonschema import Draft202012Validator

PROBLEM = "application/problem+json"

KNOWN_GAPS = {
    # The description promises these of every answer under /api/. But a request is counted when it is known
    # whose key it carries, and without a database that is not known.
    "database_unavailable": {"RateLimit-Limit", "RateLimit-Remaining", "RateLimit-Reset"}
}
"""Headers that are described and may be missing all the same, by the answer's code."""


def closed(schema):
    """`schema` with no member allowed that it does not name."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    own = {"additionalProperties": False} if isinstance(schema.get("properties"), dict) else {}
    return {name: closed(part) for name, part in schema.items()} | own


def part_of_a_path(part: re.Match) -> str:
    """What may stand for a `{name}`: a ticker may be written with a slash."""
    return ".+" if part[1] == "ticker" else "[^/]+"


class Witness:
    """Knows one description, made ready for many answers."""

    def __init__(self, description: dict):
        self.components = closed(description["components"])
        self.headers = set(description["components"]["headers"])
        # What is written out goes before what has a place for anything: trades.csv is not the id of a trade.
        self.paths = [
            (re.compile(re.sub(r"\\{(\w+)\\}", part_of_a_path, re.escape(path))), path, methods)
            for path, methods in sorted(description["paths"].items(), key=lambda item: item[0].count("{"))
        ]
        self.validators = {}

    def hears(self, response: requests.Response) -> tuple[str, str, int]:
        """Which answer of the description this is: its path, method and status."""
        asked, method = urlsplit(response.url).path, response.request.method.lower()
        status, kind = response.status_code, response.headers["Content-Type"].split(";")[0]
        routes = ((path, methods) for pattern, path, methods in self.paths if pattern.fullmatch(asked))
        path, methods = next(routes, (asked, {}))
        heard = path, method, status
        if "X-Request-Id" not in response.headers:
            # The web server itself, in its own words: so it answers what is hardly HTTP, and nothing else.
            assert (status, kind) == (400, "text/html"), f"{heard} has no request id"
        elif method in methods:
            told = methods[method]["responses"].get(str(status))
            assert told, f"{heard} is not described: {response.text}"
            self.compare(heard, response, kind, told)
        elif not path.startswith("/static/") or status != 200:  # A file of our pages is no part of the API.
            # Of a path or a method that there is not, only the refusals can be described: one for all.
            assert kind == PROBLEM, f"{heard} is of no route and answers {kind}"
            self.validate(heard, response, {"$ref": f"#/components/schemas/Problem{status}"})
        return heard

    def compare(self, heard, response: requests.Response, kind: str, told: dict) -> None:
        """Kind, headers, members and code of an answer with those that are `told` of it."""
        assert [kind] == list(told["content"]), f"{heard} is described as another kind than {kind}"
        code = None
        if kind.endswith("json"):
            code = self.validate(heard, response, told["content"][kind]["schema"]).get("code")
        if kind == PROBLEM:
            assert f"`{code}`" in told["description"], f"{heard} is described without the code {code}"
        sent, due = self.headers & set(response.headers), set(told["headers"])
        optional = {"Idempotent-Replayed"} | KNOWN_GAPS.get(code, set())
        assert sent <= due <= sent | optional, f"{heard} has the headers {sent} and is described with {due}"

    def validate(self, heard, response: requests.Response, schema: dict) -> dict:
        """The JSON of an answer, which keeps to `schema`."""
        name = repr(schema)
        if name not in self.validators:  # Made once: to make one takes longer than to use it.
            whole = {"components": self.components, **closed(schema)}
            checker = Draft202012Validator.FORMAT_CHECKER
            self.validators[name] = Draft202012Validator(whole, format_checker=checker)
        document = simplejson.loads(response.text)
        faults = [error.message for error in self.validators[name].iter_errors(document)]
        assert not faults, f"{heard} answers {response.text}, but {faults}"
        return document
