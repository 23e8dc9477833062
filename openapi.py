"""The API described as OpenAPI 3.1, put together from what the program says of itself.

What a route is for is in its docstring, what it takes and refuses in its decorators, what it answers in its
return annotation; `messages.py` and `models.py` say what those consist of, and pydantic makes schemas of it.
"""

import inspect
import re
from collections import defaultdict
from collections.abc import Iterable
from typing import Annotated, get_args, get_origin, get_type_hints

from flask import Flask
from pydantic import BaseModel, TypeAdapter
from werkzeug.routing import Rule

from messages import ORDER_KEY, STATUS, Problem

ABOUT = "Trades as a broker would book them. Amounts are exact decimals in US dollars, times are UTC."
KEYS = {
    "trader": "The API key of an account.",
    "admin": "The server's `ADMIN_API_KEY`, which manages accounts.",
}
TAGS = {
    "/api/": "trading",
    "/api/v1/account": "results",
    "/api/v1/market": "sample market",
    "/api/v1/users": "accounts (admin)",
    "/alpaca/": "as Alpaca's clients know it",
    "/": "server",
}
REQUEST_HEADERS = {
    "X-Request-Id": {
        "description": "Comes back, and stands on the log's lines of this request; without a usable one "
        "(1 to 128 letters, digits and `. _ - : / + = @`) the request is given one",
        "schema": {"type": "string"},
    },
    ORDER_KEY: {
        "description": "Makes the order safe to repeat for ever: it is booked once, and answered the same",
        "schema": {"type": "string", "maxLength": 255, "pattern": "^[!-~]([ -~]*[!-~])?$"},
    },
    "X-Simulate-Fault": {
        "description": "A drill, on the sample market only: this request fails that way",
        "schema": {
            "type": "string",
            "pattern": "^(price_unavailable|rate_limited|error_before_commit|error_after_commit"
            "|latency=[0-9]{1,5})$",
            "examples": ["error_after_commit", "latency=500"],
        },
    },
}
RESPONSE_HEADERS = {
    "X-Request-Id": "The request's id, for whoever reads the log",
    "RateLimit-Limit": "How many requests are answered in a window of time",
    "RateLimit-Remaining": "How many are left of them",
    "RateLimit-Reset": "Seconds until the next window",
    "Idempotent-Replayed": "`true` when this is the first answer once more",
    "WWW-Authenticate": "`Bearer`",
    "Retry-After": "Seconds to wait",
}
COUNTED = ["RateLimit-Limit", "RateLimit-Remaining", "RateLimit-Reset"]
OF_STATUS = {401: ["WWW-Authenticate"], 429: ["Retry-After"], 503: ["Retry-After"]}
OF_ALL = {"internal_error"}
OF_API = {"invalid_request", "unauthorized", "forbidden", "rate_limited"}
OF_API |= {"price_unavailable", "database_unavailable"}
OF_BODIES = {"invalid_json", "too_large", "unsupported_media_type"}
"""What every route may refuse, every one under /api/, and every one that takes a body."""


class Document:
    """The description of one app."""

    is_alpacas = False

    def __init__(self, app: Flask, version: str):
        self.schemas, self.paths = {}, defaultdict(dict)
        for rule in app.url_map.iter_rules():
            is_ours = rule.endpoint.startswith("alpaca.") == self.is_alpacas
            if is_ours and not rule.endpoint.endswith("static"):
                path = re.sub(r"<(?:[^<>]*:)?(\w+)>", r"{\1}", rule.rule)
                for method in sorted(rule.methods - {"HEAD", "OPTIONS"}):
                    self.paths[path][method.lower()] = self.operation(rule, app.view_functions[rule.endpoint])
        self.tell_problems()
        bearer, word = {"type": "http", "scheme": "bearer"}, {"schema": {"type": "string"}}
        security = {name: bearer | {"description": text} for name, text in KEYS.items()}
        told = {name: {"description": text} | word for name, text in RESPONSE_HEADERS.items()}
        self.document = {
            "openapi": "3.1.0",
            "info": {"title": "IBKR Broker Simulator", "version": version, "description": ABOUT},
            "servers": [{"url": "/"}],
            "tags": [{"name": tag} for tag in TAGS.values()],
            "paths": self.paths,
            "components": {"schemas": self.schemas, "headers": told, "securitySchemes": security},
        }

    def operation(self, rule: Rule, route) -> dict:
        """One route with one method."""
        summary, _, description = inspect.getdoc(route).partition("\n")
        tag = TAGS[max((path for path in TAGS if rule.rule.startswith(path)), key=len)]
        is_api = rule.rule.startswith("/api/")
        takes = getattr(route, "takes", dict.fromkeys(("body", "query", "path", "webhook")))
        has_key_in_header = is_api and not takes["webhook"]
        responses = self.successes(route) | self.refusals(rule, route, takes)
        for response in responses.values():
            response["headers"] |= headers(["X-Request-Id", *COUNTED] if is_api else ["X-Request-Id"])
        told = {
            "operationId": rule.endpoint,
            "summary": summary,
            "description": description.strip(),
            "tags": [tag],
            "security": [{"admin" if "admin" in tag else "trader": []}] if has_key_in_header else [],
            "parameters": list(self.parameters(rule, route, takes)),
            "responses": responses,
        }
        if takes["body"]:
            content = {"application/json": {"schema": self.schema(takes["body"])}}
            told["requestBody"] = {"required": not takes["body_may_miss"], "content": content}
        return told

    def parameters(self, rule: Rule, route, takes: dict) -> Iterable[dict]:
        """What a route takes beside a body: headers, parts of its path, the query."""
        for name in sorted(["X-Request-Id", *getattr(route, "headers", [])]):
            yield {"name": name, "in": "header", **REQUEST_HEADERS[name]}
        parts = self.fields_of(takes["path"])
        for name in sorted(rule.arguments):
            number = {"type": "integer", "minimum": 0, "maximum": 2**63 - 1}
            kind = number if re.search(rf"<int[^<>]*:{name}>", rule.rule) else {"type": "string"}
            yield {"name": name, "in": "path", "required": True, "schema": parts.get(name, kind)}
        for name, schema in self.fields_of(takes["query"]).items():
            required = takes["query"].model_fields[name].is_required()
            yield {"name": name, "in": "query", "required": required, "schema": schema}

    def successes(self, route) -> dict[str, dict]:
        """What a route answers where nothing is refused, by status."""
        answer, statuses = get_type_hints(route, include_extras=True)["return"], [200]
        if get_origin(answer) is tuple:
            answer, statuses = get_args(answer)[0], get_args(get_args(answer)[1])
        kind, schema = "application/json", None
        if get_origin(answer) is Annotated:
            kind, schema = answer.__metadata__[0], {"type": "string"}
        told = {
            "description": inspect.getdoc(route).splitlines()[0],
            "headers": headers(["Idempotent-Replayed"] * (ORDER_KEY in getattr(route, "headers", []))),
            "content": {kind: {"schema": schema or self.schema(answer)}},
        }
        return {str(status): told for status in statuses}

    def refusals(self, rule: Rule, route, takes: dict) -> dict[str, dict]:
        """How a route says no, by status, with all the codes that each may carry."""
        codes = OF_ALL | set(getattr(route, "refuses", ()))
        codes |= OF_API if rule.rule.startswith("/api/") else set()
        codes |= OF_BODIES if takes["body"] else set()
        codes -= {"unsupported_media_type"} if takes["webhook"] else set()
        codes |= {"not_found"} if rule.arguments else set()
        statuses = sorted({STATUS[code] for code in codes})
        return {str(s): problem(s, sorted(code for code in codes if STATUS[code] == s)) for s in statuses}

    def schema(self, answer) -> dict:
        """A reference to the schema of a request or an answer, which is told among the components."""
        schema = TypeAdapter(answer).json_schema(ref_template="#/components/schemas/{model}")
        self.schemas |= {name: tidy(part) for name, part in schema.pop("$defs", {}).items()}
        if "title" not in schema:
            return schema
        name = answer.__name__
        self.schemas[name] = tidy(schema)
        return {"$ref": f"#/components/schemas/{name}"}

    def fields_of(self, model: type[BaseModel] | None) -> dict[str, dict]:
        return tidy(model.model_json_schema()).get("properties", {}) if model else {}

    def tell_problems(self) -> None:
        """A problem once a status, with the codes that this has."""
        self.schema(Problem)
        whole = self.schemas.pop("Problem")
        for status in set(STATUS.values()):
            codes = [code for code in STATUS if STATUS[code] == status]
            own = {"status": {"type": "integer", "const": status}, "code": {"type": "string", "enum": codes}}
            self.schemas[f"Problem{status}"] = whole | {"properties": whole["properties"] | own}


class AlpacaDocument(Document):
    """The face that Alpaca's clients know: what is served and what it takes.

    What is answered has the shape that Alpaca's own description gives it.
    """

    is_alpacas = True

    def __init__(self, *about):
        super().__init__(*about)
        for path, methods in self.paths.items():  # One function may serve several.
            for method, operation in methods.items():
                operation["operationId"] = re.sub(r"\W+", "_", method + path).strip("_")

    def fields_of(self, model: type[BaseModel] | None) -> dict[str, dict]:
        """Without defaults, which are there as what they are read into."""
        told = super().fields_of(model)
        return {field: {n: v for n, v in told[field].items() if n != "default"} for field in told}

    def successes(self, route) -> dict[str, dict]:
        return {"2XX": {"description": "As Alpaca describes it", "headers": {}}}

    def refusals(self, rule: Rule, route, takes: dict) -> dict[str, dict]:
        """Alpaca's errors have one shape; `problem` is the code that the other face would give."""
        shape = {"code": {"type": "integer"}, "message": {"type": "string"}, "problem": {"type": "string"}}
        schema = {"type": "object", "properties": shape, "required": list(shape)}
        content = {"application/json": {"schema": schema}}
        return {"default": {"description": "Why not", "headers": {}, "content": content}}


def tidy(schema: dict) -> dict:
    """Pydantic's schema without its titles, and without the None that stands for "left out"."""

    def less(schema: dict) -> dict:
        return {n: v for n, v in schema.items() if n != "title" and (n, v) != ("default", None)}

    told = less(schema)
    if "properties" in schema:
        told["properties"] = {name: less(part) for name, part in schema["properties"].items()}
    return told


def headers(names: Iterable[str]) -> dict:
    return {name: {"$ref": f"#/components/headers/{name}"} for name in names}


def problem(status: int, codes: list[str]) -> dict:
    title = codes[0].replace("_", " ").capitalize()
    example = {"type": "about:blank", "title": title, "status": status, "detail": "Why.", "code": codes[0]}
    schema = {"$ref": f"#/components/schemas/Problem{status}"}
    return {
        "description": ", ".join(f"`{code}`" for code in codes),
        "headers": headers(OF_STATUS.get(status, [])),
        "content": {"application/problem+json": {"schema": schema, "example": example}},
    }
