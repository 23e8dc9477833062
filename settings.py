"""The settings, one line each: its name, its kind, its default, and what it means.

They come from the environment, or from `.env` beside this file; one that is empty counts as left out. A bad
one ends the program with its name and the reason. Its value, which may be a password, is not shown.
"""

import os
import re
from decimal import Decimal
from pathlib import Path
from typing import Annotated

import sqlalchemy as sa
from dotenv import load_dotenv
from limits import RateLimitItem
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

import public
from messages import checked_cash, whole_number


def checked_sources(text: str) -> list[str]:
    sources = list(dict.fromkeys(source.strip() for source in text.lower().split(",")))
    if sources != ["sample"] and not set(sources) <= {"yahoo", "alphavantage"}:
        raise ValueError("name yahoo, alphavantage or both, or sample alone.")
    return sources


def checked_database(url: str) -> str:
    """`url` as SQLAlchemy wants it: psycopg2 must be named, and postgres:// is Heroku's spelling.

    Of several hosts (`@a:5432,b:5432/name`), as PostgreSQL's own tools take them, each becomes a `host=`.
    """
    scheme, _, rest = url.partition("://")
    if scheme in ("postgres", "postgresql") and rest:
        if several := re.fullmatch(r"([^/?]*@)?([^/?@]*,[^/?@]*)/?([^?]*)\??(.*)", rest):
            login, hosts, name, options = several.groups("")
            rest = f"{login}/{name}?{options}&host=" + hosts.replace(",", "&host=")
        url = f"postgresql+psycopg2://{rest}"
    elif scheme != "sqlite":
        raise ValueError("it must begin with postgresql://, postgres:// or sqlite:///.")
    try:
        parsed = sa.make_url(url)
    except (ValueError, sa.exc.ArgumentError):
        raise ValueError("it is no URL: its port, say, is no number.") from None
    if scheme == "sqlite" and (parsed.host or not parsed.database or re.search(":memory:|mode=memory", url)):
        raise ValueError("it must name a file after sqlite:///.")
    return url


Sources = Annotated[list[str], BeforeValidator(checked_sources)]
Database = Annotated[str, AfterValidator(checked_database)]
Dollars = Annotated[Decimal, BeforeValidator(checked_cash)]
BasisPoints = Annotated[Dollars, Field(le=10_000)]
AdminKey = Annotated[str, AfterValidator(public.checked_admin_key)]
Limit = Annotated[RateLimitItem, BeforeValidator(public.checked_limit)]
Counter = Annotated[public.Counter, BeforeValidator(public.Counter)]
Origins = Annotated[set[str], BeforeValidator(public.checked_origins)]


def means(meaning: str, default=None):
    """A setting's default, as one would write it, and what the setting means."""
    return Field(default, description=meaning)


class Settings(BaseModel):
    model_config = ConfigDict(validate_default=True, arbitrary_types_allowed=True)

    DATABASE_URL: Database | None = means(
        "`postgresql://` (one host or several), `postgres://` or `sqlite:///`"
    )
    HOST: str = means("where `python app.py` listens", "127.0.0.1")
    PORT: whole_number(1, 65_535) = means("where `python app.py` listens; gunicorn takes it too", "8000")
    PRICE_SOURCES: Sources = means("asked in this order; or `sample`, alone", "yahoo,alphavantage")
    ALPHAVANTAGE_API_KEY: str | None = means("without it that source is skipped")
    PRICE_CACHE_SECONDS: whole_number(1, 86_400) = means("how long a quote holds", "180")
    MAX_PRICE_AGE_DAYS: whole_number(1, 36_500) = means(
        "nothing is bought at a live price that its source last saw longer ago", "7"
    )
    SAMPLE_MARKET: Path | None = means("another file, or a folder of files, for the recorded market")
    CORPORATE_ACTIONS: bool = means("`off` leaves splits and dividends away", "on")
    STARTING_CASH: Dollars = means("dollars of a new account", "100000")
    COMMISSION_BPS: BasisPoints = means("commission, in hundredths of a percent", "0")
    COMMISSION_MIN: Annotated[Dollars, Field(le=1_000_000)] = means("the least commission, in dollars", "0")
    SLIPPAGE_BPS: BasisPoints = means("what a market order loses to the market price", "0")
    ADMIN_API_KEY: AdminKey | None = means("opens the endpoints under `/api/v1/users`")
    RATE_LIMIT: Limit = means("what one API key may ask", "60000 per minute")
    RATELIMIT_STORAGE_URI: Counter = means("or a Redis, where processes count together", "memory://")
    CORS_ORIGINS: Origins | None = means("origins whose pages may call the API, or `*`")


def read_settings() -> Settings:
    load_dotenv(Path(__file__).with_name(".env"))
    try:
        return Settings.model_validate(
            {name: text.strip() for name, text in os.environ.items() if text.strip()}
        )
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
        reason = fault["msg"].removeprefix("Value error, ")
        raise SystemExit(f"{fault['loc'][0]} cannot be used: {reason}") from None
