"""The commands of whoever runs the server: `flask --app app user`, `audit` and `record`, and `python app.py`.

They ask the same models as the routes. `settle`, which does what a request does, is in app.py.
"""

import csv
import logging
import signal
import sys
from collections.abc import Callable
from contextlib import suppress

import click
import sqlalchemy as sa
from flask import Blueprint, Flask, current_app
from flask.cli import AppGroup
from sqlalchemy.exc import DBAPIError
from werkzeug.serving import WSGIRequestHandler, make_server

from alpaca_face import broker
from database import OutcomeUnknown, database_says
from messages import NewAccount, Refused, checked, iso, plain
from models import User
from pricing import NoSuchTicker, SourceFailed, Yahoo
from recorded import ONE, Bar, ticker_from, written
from results import Books

commands = Blueprint("commands", __name__, cli_group=None)


class Command(click.Command):
    """A command that ends with one clear line where the program says no."""

    def invoke(self, context):
        try:
            return super().invoke(context)
        except Refused as refusal:
            raise click.ClickException(refusal.detail) from None
        except DBAPIError as error:
            raise click.ClickException(database_says(error)) from None
        except (OutcomeUnknown, sa.exc.TimeoutError):
            sentence = "The database does not answer; look first what has happened."
            raise click.ClickException(sentence) from None


users = AppGroup("user", help="Open and close accounts.")
commands.cli.add_command(users)


@users.command("add", cls=Command)
@click.argument("email")
@click.option("--cash", help="Dollars to begin with; without it, STARTING_CASH.")
@click.option("--key", help="The API key; without it one is made.")
def add_user(email: str, cash: str | None, key: str | None):
    """Open an account for EMAIL and print its API key, once."""
    account = checked(NewAccount, {"email": email, "cash": cash, "key": key or None})
    cash = current_app.config["STARTING_CASH"] if account.cash is None else account.cash
    user_id, key = User.open(account.email, cash, account.key)
    click.echo(f"User {user_id} ({account.email}) has {plain(cash)} dollars.")
    click.echo(f"API key, shown this once: {key}")


@users.command("list", cls=Command)
def list_users():
    """List the accounts: id, email, cash, and whether it is closed."""
    for user, cash in User.all():
        closed = f"  closed {iso(user.closed_at)}" if user.closed_at else ""
        click.echo(f"{user.id:>6}  {user.email:<40} {plain(cash):>20}{closed}")


@users.command("rotate-key", cls=Command)
@click.argument("email")
def rotate_key(email: str):
    """Give EMAIL a new API key and print it, once; the old one is refused from now on."""
    user = User.with_open_account(f"of {email}", email=email.lower())
    click.echo(f"API key, shown this once: {User.rotate_key(user.id)}")


@users.command("close", cls=Command)
@click.argument("email")
def close_user(email: str):
    """Close the account of EMAIL: its key is refused from now on, its trades stay."""
    User.close(User.with_open_account(f"of {email}", email=email.lower()).id)
    click.echo(f"The account of {email} is closed.")


@commands.cli.command("audit", cls=Command)
def audit_all():
    """Replay every trade of every account and compare the books to the last digit."""
    differences = count = 0
    for user, _ in User.all():
        report = Books.of(user.id).audit(broker.market.has_asked)
        count += report["trades"]
        differences += len(report["differences"])
        for sentence in report["differences"]:
            click.echo(f"User {user.id}: {sentence}")
    click.echo(f"{count} trades replayed, {differences} differences.")
    sys.exit(1 if differences else 0)


@commands.cli.command("record")
@click.argument("tickers", nargs=-1, required=True)
@click.option("--period", default="1y", show_default=True, help="1mo, 6mo, 1y, 5y, max, ...")
@click.option("--output", type=click.File("w", lazy=True), required=True, help="The CSV file to write.")
def record(tickers: tuple[str, ...], period: str, output):
    """Record daily bars of TICKERS from Yahoo, for SAMPLE_MARKET to replay, with their splits and dividends.

    Prices are those of the day, as they were before any later split.
    """
    yahoo, rows, warnings = Yahoo(current_app.instance_path), {}, []
    with click.progressbar(tickers, label="Recording", item_show_func=str) as bar:
        for text in bar:
            try:
                ticker = ticker_from(text)  # As the file will be read.
                days, odd = yahoo.daily_bars(ticker, period)
            except (ValueError, SourceFailed, NoSuchTicker) as error:
                reason = str(error) or "Yahoo knows no such ticker"
                raise click.ClickException(f"{text}: {reason}.") from None
            if odd:
                warnings.append(f"{ticker}: left out {odd} days whose close is 0 to 8 decimals, or no price.")
            for day, (*numbers, dividend, split) in days.items():
                row = ["" if number is None else plain(number) for number in numbers]
                row += [plain(dividend) if dividend else "", written(split) if split != ONE else ""]
                rows[f"{day}T00:00:00Z", ticker] = row
    writer = csv.writer(output, lineterminator="\n")
    writer.writerow(["timestamp", "ticker", *Bar._fields[1:]])
    writer.writerows([*when_and_what, *numbers] for when_and_what, numbers in sorted(rows.items()))
    for warning in warnings:
        click.echo(warning, err=True)
    click.echo(f"{len(rows)} bars are in {output.name}.")


class Handler(WSGIRequestHandler):
    timeout = 10  # Seconds for a client that connects and sends nothing; the end would wait for it.

    def version_string(self) -> str:
        return "simulator"  # Which versions run here is nobody's business.


def serve(app: Flask, host: str, port: int, prepare: Callable, what: str) -> None:
    """`python app.py`: prepare everything, say in one line what is served, and serve it."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    logging.getLogger("alembic").setLevel(logging.ERROR)
    try:
        with app.app_context():
            prepare()
    except Refused as refusal:
        sys.exit(refusal.detail)
    except DBAPIError as error:
        sys.exit(database_says(error))
    try:
        server = make_server(host, port, app, threaded=True, request_handler=Handler)
    except (SystemExit, OSError, UnicodeError):  # Werkzeug has said why, where it is the first.
        sys.exit(f"HOST={host} PORT={port} cannot be served.")
    print(what, flush=True)
    server.daemon_threads = False  # So that it answers what is in flight before it ends.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with suppress(KeyboardInterrupt):
        server.serve_forever()
