"""The API described as OpenAPI 3.1, read off the program itself so that the two cannot drift apart.

What a route is for is in its docstring. What it takes and how it refuses is in its code, `query(Page)`,
`read(Order)`, `Refused("not_found", ...)`: `calls` finds these, in the route and in every function of ours
that it calls. What it answers is named here, in `MEMBERS` and `SHAPES`: no answer passes through them, which
would cost time, but the tests hold every answer to them.
"""

import ast
import inspect
import re
import textwrap
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from flask import Flask
from pydantic import BaseModel
from werkzeug.routing import IntegerConverter, Rule

HERE = Path(__file__).parent
ABOUT = "Trades as a broker would book them. Amounts are exact decimals in US dollars, times are UTC."


def members(kind: str, unit: str, example, **names: str) -> dict:
    """The schemas of members that have a kind, a unit and an example in common; each has its own meaning."""
    schema = {"type": kind} | ({} if example is None else {"examples": [example]})
    return {
        name: schema | {"description": f"{meaning} ({unit})" if unit else meaning}
        for name, meaning in names.items()
    }


TIMES = members(
    *("string", "RFC 3339, UTC", "2012-06-01T00:00:00Z"),
    timestamp="When this was so; of a price, when it was taken",
    valid_until="Until when trades are judged by this price",
    price_timestamp="When `current_price` was taken",
    now="The market's time, in the recorded past",
    first_bar="Where the recorded market begins",
    last_bar="Where it ends",
    started_at="Since when it runs",
    created_at="When the account was opened",
    closed_at="When it was closed",
)
MEMBERS = (
    {name: schema | {"format": "date-time"} for name, schema in TIMES.items()}
    | members(
        *("number", "US dollars, exact, at most 8 decimals", 1502.5),
        cash_balance="Cash; on a trade, after it",
        cash="Cash",
        total_amount="Quantity x price",
        commission="What the broker took",
        commission_min="The least commission",
        cost_basis="What the holding cost, with commission",
        total_invested_value="What the holdings cost",
        market_value="What a sale would bring",
        equity="Cash and market value",
        unrealized_pnl="Profit of what is held",
        realized_pnl="Profit of what was sold",
        total_pnl="Realised and unrealised profit",
        starting_cash="What a run begins with",
        account="Cash and each holding stay below this",
        order="A quantity and a price stay below this",
        limit="The amount to stay below",
        required="What the order needs: dollars or shares",
        available="What there is: dollars or shares",
    )
    | members(
        *("number", "dollars for one share or coin, exact, at most 8 decimals", 150.25),
        price="Price",
        market_price="What the market asks",
        current_price="What the market asks now",
        average_price="Cost basis / quantity",
    )
    | members("number", "shares or coins, exact, at most 8 decimals", 10, quantity="Quantity")
    | members(
        *("number", "percent", 1.25),
        unrealized_pnl_percent="Unrealised profit of the cost basis",
        total_return_percent="Profit of the starting cash",
        max_drawdown_percent="The deepest fall of equity from a peak",
        win_rate_percent="Sales that brought a profit",
        cpu_percent="How busy the processor is",
    )
    | members(
        *("number", "hundredths of a percent", 5),
        commission_bps="Commission",
        slippage_bps="What a market order loses to the market price",
    )
    | members("number", "GiB", 1.5, memory_total_gb="Memory", memory_available_gb="Memory to spare")
    | members("number", "ms", 1.5, latency_ms="Time to answer", p50="Median", p95="Of 95 %", p99="Of 99 %")
    | members("number", "", 1.25, profit_factor="What winning sales gained / what losing sales lost")
    | members(
        *("integer", "", 1),
        user_id="The account's number",
        run="Counts how often the account has started over",
        trades="How many trades",
        body_bytes="Bytes of a request's body at the most",
        price_cache_seconds="How long a quote holds",
        status="The answer's status once more",
        uptime_seconds="How long this process has run",
        cpu_count="Processors",
        count="Requests answered",
        errors="Of these, answered with a status of 500 or above",
        pid="The process that answers, one of several",
        rate_limit="How many requests are answered in a window of time",
        retry_after="Seconds until the next window",
    )
    | members(
        *("string", "", "42"),
        id="The trade's number; `null` when rehearsed",
        trade_id="The trade that the key belongs to",
        next_cursor="`cursor` of the next page; `null` on the last one",
    )
    | members("string", "", "AAPL", ticker="Ticker")
    | members("string", "", "USD", currency="ISO code, as far as the source names one")
    | members("string", "", "alice@example.com", email="Email address")
    | members(
        *("string", "", None),
        api_key="The API key; it is shown this once",
        version="The program's version",
        type="`about:blank`",
        title="The code, to read",
        code="What a bot goes by; it never changes",
        detail="What is wrong, in a sentence",
        field="Which field",
        message="What is wrong with it",
        engine="Which database",
        platform="Operating system",
        platform_version="Its version",
        architecture="Processor's kind",
        python_version="Python's version",
    )
    | members("boolean", "", True, ok="Whether the books hold", closed="Closed", dry_run="Only rehearsed")
)

SHAPES = {
    "Balance": "user_id cash_balance",
    "Price": "ticker price currency? source=Source timestamp valid_until?",
    "Holding": "ticker quantity average_price cost_basis current_price? market_value? unrealized_pnl? "
    "unrealized_pnl_percent? price_timestamp?",
    "Portfolio": "user_id cash_balance holdings=[Holding] total_invested_value market_value? equity? "
    "unrealized_pnl? realized_pnl total_pnl?",
    "Trade": "id? user_id ticker trade_type=Action quantity price total_amount commission realized_pnl? "
    "cash_balance market_price price_source=Source timestamp run dry_run~",
    "Trades": "trades=[Trade] next_cursor?",
    "Run": "user_id run cash_balance",
    "Point": "timestamp cash market_value? equity?",
    "Summary": "starting_cash equity? total_return_percent? max_drawdown_percent trades realized_pnl "
    "win_rate_percent? profit_factor? commission",
    "History": "run points=[Point] summary=Summary",
    "Audit": "ok trades differences=[Sentence]",
    "Costs": "commission_bps commission_min slippage_bps",
    "Limits": "order account body_bytes",
    "Scales": "quantity=Decimals price=Decimals total_amount=Decimals percent=Decimals",
    "Rules": "rules=[Sentence] order_types=[OrderType] costs=Costs limits=Limits scales=Scales starting_cash "
    "price_sources=[Source] price_cache_seconds",
    "Market": "source=Source clock=Clock now first_bar last_bar tickers=[Symbol] pins=Pins",
    "OpenedAccount": "user_id email cash_balance api_key",
    "Account": "user_id email created_at closed_at? cash_balance",
    "Accounts": "users=[Account]",
    "NewKey": "user_id api_key",
    "ClosedAccount": "user_id closed",
    "Server": "platform platform_version architecture python_version cpu_count? memory_total_gb "
    "memory_available_gb cpu_percent",
    "Database": "status=Health engine latency_ms?",
    "Latency": "p50 p95 p99",
    "Requests": "count errors latency_ms=Latency",
    "Process": "pid started_at",
    "ServerHealth": "status=Health timestamp version uptime_seconds process=Process server_info=Server "
    "database=Database prices=Prices requests=Requests",
    "BadField": "field message",
    "Problem": "type title status detail code errors=[BadField]~ required~ available~ price~ market_price~ "
    "limit~ ticker~ currency?~ trade_id~ rate_limit~ retry_after~",
}
"""What answers consist of. `?` may be null, `~` may be missing, `=` names a shape, `[...]` is a list."""

ANSWERS = {
    "Balance": "balance",
    "Price": "price",
    "Portfolio": "portfolio",
    "Trade": "trade one_trade",
    "Trades": "trades",
    "Run": "reset",
    "History": "account_history",
    "Audit": "audit",
    "Rules": "rules",
    "Market": "market_state set_clock advance pin_price unpin_price",
    "OpenedAccount": "open_account",
    "Accounts": "accounts",
    "NewKey": "new_key",
    "ClosedAccount": "close_account",
    "ServerHealth": "health",
    "OpenAPI": "openapi_json",
    "text/csv": "trades_csv",
    "text/html": "dashboard docs",
}
"""Which routes answer what."""


def one_of(*values: str) -> dict:
    return {"type": "string", "enum": list(values)}


SIMPLE = {
    "Action": one_of("buy", "sell"),
    "Clock": one_of("wall", "manual"),
    "Health": one_of("healthy", "unhealthy"),
    "OrderType": one_of("limit", "market"),
    "Source": one_of("yahoo_finance", "yahoo", "alphavantage", "sample"),
    "Symbol": MEMBERS["ticker"],
    "Decimals": {"type": "integer", "description": "Decimals at the most"},
    "Sentence": {"type": "string"},
    "Pins": {"type": "object", "additionalProperties": MEMBERS["price"]},
    "Prices": {"type": "object", "description": "What the cache and each price source have seen"},
    "OpenAPI": {"type": "object"},
    "text/csv": {"type": "string"},
    "text/html": {"type": "string"},
}


def shape(name: str) -> dict:
    """The JSON schema of one of `SHAPES`."""
    required, properties = [], {}
    for member, is_list, of, marks in re.findall(r"(\w+)(?:=(\[?)(\w+)\]?)?([?~]*)", SHAPES[name]):
        schema = MEMBERS[member] if not of else SIMPLE.get(of, {"$ref": f"#/components/schemas/{of}"})
        if is_list:
            schema = {"type": "array", "items": schema}
        if "?" in marks:
            schema = schema | {"type": [schema["type"], "null"]}
        properties[member] = schema
        required += [] if "~" in marks else [member]
    return {"type": "object", "properties": properties, "required": required}


KEYS = {
    "trader": "The API key of an account.",
    "admin": "The server's `ADMIN_API_KEY`, which manages accounts.",
}
TAGS = {
    "/api/": "trading",
    "/api/v1/account": "results",
    "/api/v1/market": "sample market",
    "/api/v1/users": "accounts (admin)",
    "/": "server",
}
REQUEST_HEADERS = {
    "X-Request-Id": {
        "description": "Comes back, and stands on the log's lines of this request; without a usable one "
        "(1 to 128 letters, digits and `. _ - : / + = @`) the request is given one",
        "schema": {"type": "string"},
    },
    "Idempotency-Key": {
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


def calls(function, app: Flask, found: dict[str, set] | None = None) -> dict[str, set]:
    """The first arguments with which `function`, and all of ours that it calls, calls each name."""
    found = defaultdict(set) if found is None else found
    function = inspect.unwrap(function)
    code = getattr(function, "__code__", None)
    if not code or Path(code.co_filename).parent != HERE or code in found["seen"]:
        return found
    found["seen"].add(code)
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            first = node.args[0] if node.args else None
            is_text = isinstance(first, ast.Constant)
            argument = first.value if is_text else meant(first, function)
            found[ast.unparse(node.func)] |= {argument} if isinstance(argument, str | type) else set()
            for called in (node.func, *node.args):  # A function that is handed on is called as well.
                calls(meant(called, function), app, found)
        elif isinstance(node, ast.Raise):
            handlers = app.error_handler_spec[None][None]
            calls(handlers.get(meant(node.exc, function)), app, found)
    return found


def meant(node, function):
    """What a name in `function` stands for; `account.fill` and `self.fill` are found on their class."""
    names = function.__globals__
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        owner = node.value.id
        if owner in ("self", "cls"):
            owner = function.__qualname__.split(".")[0]
        thing = names.get(owner, names.get(owner.capitalize()))
        return getattr(thing if isinstance(thing, type) else type(thing), node.attr, None)
    return None


def statuses(view) -> set[int]:
    """With what a route answers where nothing is refused: the second part of what it returns, or 200."""
    returned = [n.value for n in ast.walk(ast.parse(inspect.getsource(view))) if isinstance(n, ast.Return)]
    parts = [node for value in returned if isinstance(value, ast.Tuple) for node in ast.walk(value.elts[1])]
    return {part.value for part in parts if isinstance(part, ast.Constant)} or {200}


def schema_of(model: type[BaseModel]) -> dict:
    """Pydantic's schema of a request, without its titles and the None that stands for "left out"."""

    def tidy(schema: dict) -> dict:
        return {
            name: part
            for name, part in schema.items()
            if name != "title" and (name, part) != ("default", None)
        }

    schema = tidy(model.model_json_schema())
    return schema | {"properties": {name: tidy(own) for name, own in schema.get("properties", {}).items()}}


def fields_of(model: type[BaseModel]) -> Iterable[tuple[str, dict]]:
    return schema_of(model)["properties"].items()


def headers(names: Iterable[str]) -> dict:
    return {name: {"$ref": f"#/components/headers/{name}"} for name in names}


def problem(status: int, codes: list[str]) -> dict:
    """A refusal, with all the codes that it may carry."""
    title = codes[0].replace("_", " ").capitalize()
    example = {"type": "about:blank", "title": title, "status": status, "detail": "Why.", "code": codes[0]}
    schema = {"$ref": f"#/components/schemas/Problem{status}"}
    return {
        "description": ", ".join(f"`{code}`" for code in codes),
        "headers": headers(OF_STATUS.get(status, [])),
        "content": {"application/problem+json": {"schema": schema, "example": example}},
    }


def parameters(rule: Rule, called: dict[str, set]) -> Iterable[dict]:
    """What a route takes beside a body: headers, parts of its path, the query."""
    for name in sorted(REQUEST_HEADERS.keys() & (called["request.headers.get"] | {"X-Request-Id"})):
        yield {"name": name, "in": "header", **REQUEST_HEADERS[name]}
    checked = {name: schema for model in called["checked"] for name, schema in fields_of(model)}
    for name, converter in rule._converters.items():
        schema = checked.get(name, {"type": "string"})
        if isinstance(converter, IntegerConverter):
            schema = {"type": "integer", "minimum": 0, "maximum": converter.max}
        yield {"name": name, "in": "path", "required": True, "schema": schema}
    for model in called["query"]:
        for name, schema in fields_of(model):
            yield {"name": name, "in": "query", "schema": schema}


def successes(view, called: dict[str, set]) -> dict[str, dict]:
    """What a route answers where nothing is refused, by status."""
    answer = next(name for name, endpoints in ANSWERS.items() if view.__name__ in endpoints.split())
    kind = answer if "/" in answer else "application/json"
    replays = "Idempotency-Key" in called["request.headers.get"]
    told = {
        "description": inspect.getdoc(view).splitlines()[0],
        "headers": headers(["Idempotent-Replayed"] * replays),
        "content": {kind: {"schema": SIMPLE.get(answer, {"$ref": f"#/components/schemas/{answer}"})}},
    }
    return {str(status): told for status in sorted(statuses(view))}


def refusals(
    rule: Rule, called: dict[str, set], guard: set[str], status_of: dict[str, int]
) -> dict[str, dict]:
    """How a route says no, by status; `guard` are the codes of what stands before each of the API's."""
    codes = {"internal_error"} | called["Refused"] | called["problem"]
    if called["read"]:
        codes |= {"too_large"}
    if rule.arguments:
        codes |= {"not_found"}
    if rule.rule.startswith("/api/"):
        codes |= {"database_unavailable"} | guard
    by_status = defaultdict(list)
    for code in sorted(codes & status_of.keys()):
        by_status[status_of[code]].append(code)
    return {str(status): problem(status, by_status[status]) for status in sorted(by_status)}


def operation(rule: Rule, view, called: dict[str, set], responses: dict[str, dict]) -> dict:
    """One route with one method."""
    summary, _, description = inspect.getdoc(view).partition("\n")
    tag = TAGS[max((path for path in TAGS if rule.rule.startswith(path)), key=len)]
    is_api = rule.rule.startswith("/api/")
    for response in responses.values():
        response["headers"] |= headers(["X-Request-Id", *COUNTED] if is_api else ["X-Request-Id"])
    told = {
        "operationId": rule.endpoint,
        "summary": summary,
        "description": description.strip(),
        "tags": [tag],
        "security": [{"admin" if "admin" in tag else "trader": []}] if is_api else [],
        "parameters": list(parameters(rule, called)),
        "responses": responses,
    }
    for model in called["read"]:
        schema = {"$ref": f"#/components/schemas/{model.__name__}"}
        must = model.__name__ not in called  # `Reset()`: it has a default for a body that is left out.
        told["requestBody"] = {"required": must, "content": {"application/json": {"schema": schema}}}
    return told


def schemas(bodies: set[type[BaseModel]], status_of: dict[str, int]) -> dict[str, dict]:
    """All that requests and answers consist of; a problem once a status, with the codes that this has."""
    told = {model.__name__: schema_of(model) for model in bodies} | {name: shape(name) for name in SHAPES}
    whole = told.pop("Problem")
    for status in set(status_of.values()):
        codes = [code for code in status_of if status_of[code] == status]
        own = {"status": {"type": "integer", "const": status}, "code": one_of(*codes)}
        told[f"Problem{status}"] = whole | {"properties": whole["properties"] | own}
    return told


def document(app: Flask, version: str, status_of: dict[str, int]) -> dict:
    """The OpenAPI document of `app`; `status_of` knows the status of every refusal."""
    guard = calls(app.dispatch_request, app)["Refused"]
    paths, bodies = defaultdict(dict), set()
    for rule in app.url_map.iter_rules():
        if rule.endpoint.endswith("static"):
            continue
        view = app.view_functions[rule.endpoint]
        called = calls(view, app)
        bodies |= called["read"]
        responses = successes(view, called) | refusals(rule, called, guard, status_of)
        path = re.sub(r"<(?:[^<>]*:)?(\w+)>", r"{\1}", rule.rule)
        for method in rule.methods - {"HEAD", "OPTIONS"}:
            paths[path][method.lower()] = operation(rule, view, called, responses)
    security = {
        name: {"type": "http", "scheme": "bearer", "description": text} for name, text in KEYS.items()
    }
    told = {
        name: {"description": text, "schema": {"type": "string"}} for name, text in RESPONSE_HEADERS.items()
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "IBKR Broker Simulator", "version": version, "description": ABOUT},
        "servers": [{"url": "/"}],
        "tags": [{"name": tag} for tag in TAGS.values()],
        "paths": paths,
        "components": {"schemas": schemas(bodies, status_of), "headers": told, "securitySchemes": security},
    }
