"""A trade keeps what its order said instead of a quantity, and an idempotency key is one of its run."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"

OLD = ("uq_ibkr_trades_user_id_idempotency_key", ["user_id", "idempotency_key"])
NEW = ("uq_ibkr_trades_user_id_run_idempotency_key", ["user_id", "run", "idempotency_key"])


def upgrade():
    op.add_column("ibkr_trades", sa.Column("asked", sa.String(40)))
    op.add_column("ibkr_trades", sa.Column("order_id", sa.BigInteger()))
    change_key(OLD, NEW)


def downgrade():
    change_key(NEW, OLD)
    op.drop_column("ibkr_trades", "order_id")
    op.drop_column("ibkr_trades", "asked")


def change_key(old, new):
    if op.get_context().dialect.name == "sqlite":
        told, tell = (f"CONSTRAINT {name} UNIQUE ({', '.join(columns)})" for name, columns in (old, new))
        copy_table("ibkr_trades", told, tell)
    else:
        op.drop_constraint(old[0], "ibkr_trades", type_="unique")
        op.create_unique_constraint(new[0], "ibkr_trades", new[1])


def copy_table(table, told, tell):
    """SQLite changes no constraint: the table is copied into one that says `tell` where it `told`.

    All else that it says stays word for word, checks and AUTOINCREMENT too, as do its indexes and triggers.
    """
    run = op.get_bind().exec_driver_sql
    own = run("SELECT type, sql FROM sqlite_master WHERE tbl_name = ? AND sql IS NOT NULL", (table,)).all()
    (made,) = [sql for kind, sql in own if kind == "table"]
    assert told in made
    columns = ", ".join(row.name for row in run(f"PRAGMA table_info({table})"))
    run(made.replace(table, "copied", 1).replace(told, tell))
    run(f"INSERT INTO copied ({columns}) SELECT {columns} FROM {table}")
    run(f"DROP TABLE {table}")
    run(f"ALTER TABLE copied RENAME TO {table}")
    for kind, sql in own:
        if kind != "table":
            run(sql)
