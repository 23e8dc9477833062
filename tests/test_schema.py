"""The tables come from migrations alone, the same on both databases."""

import pytest
from cast import ROOT, flask
from sqlalchemy import inspect, text
from sqlalchemy.exc import DBAPIError


def columns(database) -> dict:
    looked = inspect(database.engine)
    return {table: {c["name"] for c in looked.get_columns(table)} for table in looked.get_table_names()}


def test_the_schema_goes_up_and_down_and_up_again(new_database):
    database = new_database()
    for step in (["upgrade"], ["check"], ["downgrade", "base"], ["upgrade"], ["check"]):
        done = flask("db", *step, DATABASE_URL=database.url)
        assert done.returncode == 0, done.stderr


def everything(database) -> dict:
    """All that is in a database: its schema and its rows."""
    tables = inspect(database.engine).get_table_names()
    schema = "SELECT sql FROM sqlite_master WHERE sql NOT NULL ORDER BY 1"
    if database.engine.dialect.name == "postgresql":
        schema = "SELECT tgname, proname FROM pg_trigger JOIN pg_proc p ON p.oid = tgfoid ORDER BY 1, 2"
    rows = {table: sorted(map(repr, database.run(f"SELECT * FROM {table}"))) for table in tables}
    return {"columns": columns(database), "schema": database.run(schema), "rows": rows}


@pytest.mark.parametrize("goal", ["base", "0003", "0005"])
def test_going_down_loses_accounts_and_trades_only_for_whoever_says_so(new_database, goal, caplog):
    database = new_database().migrate()
    insert = "INSERT INTO ibkr_"
    database.run(
        insert + "users (id, email, api_key_hash, created_at) VALUES (1, 'a@b.c', 'x', '2026-01-01')"
    )
    database.run(
        insert + "runs (user_id, run, starting_cash, cash_balance, market_time, ended_at) "
        "VALUES (1, 1, 5, 5, '2026-01-01', '2026-01-01')"
    )
    before = everything(database)
    refused = flask("db", "downgrade", goal, DATABASE_URL=database.url)
    assert refused.returncode == 1
    (line,) = [line for line in caplog.messages if "lose-data" in line]
    assert "ibkr_runs" in line
    assert ("ibkr_users" in line) == (goal == "base")
    assert "Traceback" not in refused.stderr
    assert everything(database) == before

    done = flask("db", "downgrade", "-x", "lose-data", goal, DATABASE_URL=database.url)
    assert done.returncode == 0, done.stderr
    assert "ibkr_runs" not in columns(database)


def test_tables_of_another_program_stop_the_upgrade_and_stay_as_they_are(new_database):
    """docs/upgrading.md says so to those who come from one: with its own notes of migrations, and without."""
    database = new_database()
    database.run("CREATE TABLE ibkr_users (id INTEGER PRIMARY KEY, api_key VARCHAR(255))")
    database.run("INSERT INTO ibkr_users VALUES (1, 'theirs')")
    for notes in ([], ["CREATE TABLE alembic_version (version_num VARCHAR(32))"]):
        for statement in notes:
            database.run(statement)
            database.run("INSERT INTO alembic_version VALUES ('4f1d0c2ab9e7')")
        before = everything(database)
        assert flask("db", "upgrade", DATABASE_URL=database.url).returncode == 1
        assert everything(database) == before


def test_prices_alone_keep_nobody_from_going_down(new_database):
    database = new_database().migrate()
    database.run("INSERT INTO ibkr_market (id, kind) VALUES (1, 'sample')")
    assert flask("db", "downgrade", "base", DATABASE_URL=database.url).returncode == 0


def test_the_tables_have_the_columns_that_were_promised(database):
    tables = columns(database)
    assert tables["ibkr_users"] == {"id", "email", "api_key_hash", "created_at", "closed_at"}
    assert tables["ibkr_balances"] >= {"user_id", "cash_balance", "starting_cash", "run", "updated_at"}
    assert tables["ibkr_stock_balances"] == {"user_id", "ticker", "quantity", "cost_basis", "updated_at"}
    assert tables["ibkr_trades"] >= set(
        "id user_id run ticker trade_type quantity price total_amount commission realized_pnl cash_after "
        "market_price price_source idempotency_key created_at".split()
    )


def test_the_paste_makes_what_the_migrations_make(engine_name, new_database):
    if engine_name == "sqlite":
        pytest.skip("database_setup.sql is for PostgreSQL")
    migrated, pasted = new_database().migrate(), new_database()
    with pasted.engine.connect() as connection:
        connection.connection.cursor().execute((ROOT / "database_setup.sql").read_text())

    def dump(database):
        looked = inspect(database.engine)
        checks = {
            table: (
                looked.get_columns(table, include_identity=True) and columns(database)[table],
                sorted(map(str, looked.get_check_constraints(table))),
                sorted(map(str, looked.get_foreign_keys(table))),
                sorted(map(str, looked.get_unique_constraints(table))),
                sorted(map(str, looked.get_indexes(table))),
            )
            for table in looked.get_table_names()
        }
        types = "SELECT table_name, column_name, data_type, is_nullable, column_default FROM "
        return (
            checks,
            sorted(database.run(types + "information_schema.columns WHERE table_schema = 'public'")),
            database.run("SELECT tgname FROM pg_trigger WHERE NOT tgisinternal ORDER BY 1"),
        )

    assert dump(pasted) == dump(migrated)
    for command in ("upgrade", "check"):
        done = flask("db", command, DATABASE_URL=pasted.url)
        assert done.returncode == 0, done.stderr


def test_the_paste_is_what_alembic_prints():
    printed = flask("db", "upgrade", "--sql", DATABASE_URL="postgresql://host/name").stdout
    paste = (ROOT / "database_setup.sql").read_text()
    assert printed.strip() in paste


def test_trades_are_append_only_whoever_writes(alice, database):
    alice.sees("AAPL", at=1).buys(1, "AAPL")
    for statement in ("UPDATE ibkr_trades SET quantity = 2", "DELETE FROM ibkr_trades"):
        with pytest.raises(DBAPIError, match="append-only"):
            database.run(statement)


@pytest.mark.parametrize("value", ["-1", "'NaN'", "90000000000 * 100000000", "NULL"])
def test_no_account_can_be_written_wrong_whoever_writes(alice, database, engine_name, value):
    alice.sees("AAPL", at=1).buys(1, "AAPL")
    before = alice.books
    tables = {"ibkr_balances": ["cash_balance"], "ibkr_stock_balances": ["quantity", "cost_basis"]}
    for table, names in tables.items():
        for name in names:
            with pytest.raises(DBAPIError), database.engine.begin() as connection:
                connection.execute(
                    text(f"UPDATE {table} SET {name} = {value} WHERE user_id = {alice.user_id}")
                )
    assert alice.books == before


ROWS = {
    "ibkr_users": "(id, email, api_key_hash, created_at) VALUES (1, 'a@b.c', 'x', '2026-01-01')",
    "ibkr_balances": "(user_id, cash_balance, starting_cash, run, updated_at) "
    "VALUES (1, 9, 9, 2, '2026-01-01')",
    "ibkr_stock_balances": "(user_id, ticker, quantity, cost_basis, updated_at) "
    "VALUES (1, 'AAPL', 9, 9, '2026-01-01')",
    "ibkr_trades": "(id, user_id, run, ticker, trade_type, order_type, quantity, price, total_amount, "
    "commission, realized_pnl, cash_after, market_price, price_source, idempotency_key, market_time, "
    "created_at) VALUES (7, 1, 1, 'AAPL', 'sell', 'limit', 9, 9, 9, 9, 9, 9, 9, 'sample', 'one', "
    "'2026-01-01', '2026-01-01')",
    "ibkr_quotes": "(ticker, number, price, currency, source, timestamp, valid_until) "
    "VALUES ('AAPL', 1, 9, 'USD', 'sample', '2026-01-01', '2026-01-01')",
    "ibkr_runs": "(user_id, run, starting_cash, cash_balance, market_time, ended_at) "
    "VALUES (1, 1, 9, 9, '2026-01-01', '2026-01-01')",
    "ibkr_pins": "(id, user_id, ticker, price, created_at) VALUES (7, 1, 'AAPL', 9, '2026-01-01')",
}
"""A row of each table, as it was before amounts had to be whole."""

BEFORE, WHOLE = "0006", "0009"


def test_amounts_on_sqlite_are_whole_whoever_writes_and_what_was_there_stays(app, new_database_on):
    database = new_database_on("sqlite")
    assert flask("db", "upgrade", BEFORE, DATABASE_URL=database.url).returncode == 0
    for table, row in ROWS.items():
        database.run(f"INSERT INTO {table} {row}")
    assert flask("db", "upgrade", "0008", DATABASE_URL=database.url).returncode == 0
    before = everything(database)
    assert flask("db", "upgrade", WHOLE, DATABASE_URL=database.url).returncode == 0
    after = everything(database)
    assert [after["rows"][table] for table in ROWS] == [before["rows"][table] for table in ROWS]
    assert set(before["schema"]) <= set(after["schema"])

    database.migrate()
    tried = 0
    for table in [app.db.metadata.tables[name] for name in ROWS]:
        names = [column.name for column in table.columns]
        for amount in [c.name for c in table.columns if str(c.type) == "NUMERIC(20, 8)"]:
            half = [f"{name} + 0.5" if name == amount else name for name in names]
            insert = f"INSERT INTO {table} ({', '.join(names)}) SELECT {', '.join(half)} FROM {table}"
            for statement in (insert, f"UPDATE {table} SET {amount} = {amount} + 0.5"):
                with pytest.raises(DBAPIError, match="integers of 10|CHECK|append-only"):
                    database.run(statement)
            tried += 1
    assert tried == 15


def test_an_account_needs_its_user(database):
    orphan = (
        "INSERT INTO ibkr_balances (user_id, cash_balance, starting_cash, run, updated_at) "
        "VALUES (987654321, 0, 0, 1, '2026-01-01')"
    )
    with database.engine.connect() as connection:
        if database.engine.dialect.name == "sqlite":
            connection.exec_driver_sql("PRAGMA foreign_keys = ON")
        with pytest.raises(DBAPIError):
            connection.exec_driver_sql(orphan)


def test_what_was_booked_stays_when_a_key_becomes_one_of_its_run(new_database_on):
    """SQLite copies the table for that: rows, checks, triggers and the next id stay."""
    database = new_database_on("sqlite")
    assert flask("db", "upgrade", BEFORE, DATABASE_URL=database.url).returncode == 0
    for table, row in ROWS.items():
        database.run(f"INSERT INTO {table} {row}")
    before = everything(database)
    assert flask("db", "upgrade", "0008", DATABASE_URL=database.url).returncode == 0
    after = everything(database)
    for table in ROWS:
        for old, new in zip(before["rows"][table], after["rows"][table], strict=True):
            assert new.startswith(old.rstrip(")"))
    told, tells = ("\n".join(sql for (sql,) in at["schema"]) for at in (before, after))
    checks = [line for line in told.splitlines() if "CHECK" in line]
    assert len(checks) > 10
    assert all(line.strip(" \t,") in tells for line in checks)
    assert tells.count("append-only") == 2
    assert tells.count("AUTOINCREMENT") == told.count("AUTOINCREMENT")
