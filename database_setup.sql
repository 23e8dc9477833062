-- The schema of the IBKR Broker Simulator for PostgreSQL, in one paste (Supabase's SQL editor).
-- Printed by: DATABASE_URL=postgresql://host/name flask --app app db upgrade --sql
-- It also notes the revision, so a later `flask --app app db upgrade` goes on from here.

BEGIN;

CREATE TABLE alembic_version (
    version_num VARCHAR(32) NOT NULL, 
    CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)
);

-- Running upgrade  -> 0001

CREATE TABLE ibkr_users (
    id BIGSERIAL NOT NULL, 
    email VARCHAR(254) NOT NULL, 
    api_key_hash VARCHAR(64) NOT NULL, 
    created_at TIMESTAMP WITH TIME ZONE NOT NULL, 
    closed_at TIMESTAMP WITH TIME ZONE, 
    CONSTRAINT pk_ibkr_users PRIMARY KEY (id), 
    CONSTRAINT uq_ibkr_users_email UNIQUE (email), 
    CONSTRAINT uq_ibkr_users_api_key_hash UNIQUE (api_key_hash)
);

INSERT INTO alembic_version (version_num) VALUES ('0001') RETURNING alembic_version.version_num;

-- Running upgrade 0001 -> 0002

CREATE TABLE ibkr_balances (
    user_id BIGINT NOT NULL, 
    cash_balance NUMERIC(20, 8) NOT NULL, 
    starting_cash NUMERIC(20, 8) NOT NULL, 
    run INTEGER NOT NULL, 
    updated_at TIMESTAMP WITH TIME ZONE NOT NULL, 
    CONSTRAINT pk_ibkr_balances PRIMARY KEY (user_id), 
    CONSTRAINT fk_ibkr_balances_user_id FOREIGN KEY(user_id) REFERENCES ibkr_users (id), 
    CONSTRAINT ck_ibkr_balances_cash_balance CHECK (cash_balance >= 0 AND cash_balance < 90000000000), 
    CONSTRAINT ck_ibkr_balances_starting_cash CHECK (starting_cash >= 0 AND starting_cash < 90000000000)
);

UPDATE alembic_version SET version_num='0002' WHERE alembic_version.version_num = '0001';

-- Running upgrade 0002 -> 0003

CREATE TABLE ibkr_stock_balances (
    user_id BIGINT NOT NULL, 
    ticker VARCHAR(20) NOT NULL, 
    quantity NUMERIC(20, 8) NOT NULL, 
    cost_basis NUMERIC(20, 8) NOT NULL, 
    updated_at TIMESTAMP WITH TIME ZONE NOT NULL, 
    CONSTRAINT pk_ibkr_stock_balances PRIMARY KEY (user_id, ticker), 
    CONSTRAINT fk_ibkr_stock_balances_user_id FOREIGN KEY(user_id) REFERENCES ibkr_users (id), 
    CONSTRAINT ck_ibkr_stock_balances_quantity CHECK (quantity >= 0.00000001 AND quantity < 90000000000), 
    CONSTRAINT ck_ibkr_stock_balances_cost_basis CHECK (cost_basis >= 0 AND cost_basis < 90000000000)
);

UPDATE alembic_version SET version_num='0003' WHERE alembic_version.version_num = '0002';

-- Running upgrade 0003 -> 0004

CREATE TABLE ibkr_trades (
    id BIGSERIAL NOT NULL, 
    user_id BIGINT NOT NULL, 
    run INTEGER NOT NULL, 
    ticker VARCHAR(20) NOT NULL, 
    trade_type VARCHAR(4) NOT NULL, 
    order_type VARCHAR(6) NOT NULL, 
    quantity NUMERIC(20, 8) NOT NULL, 
    price NUMERIC(20, 8) NOT NULL, 
    total_amount NUMERIC(20, 8) NOT NULL, 
    commission NUMERIC(20, 8) NOT NULL, 
    realized_pnl NUMERIC(20, 8), 
    cash_after NUMERIC(20, 8) NOT NULL, 
    market_price NUMERIC(20, 8) NOT NULL, 
    price_source VARCHAR(20) NOT NULL, 
    idempotency_key VARCHAR(255) NOT NULL, 
    market_time TIMESTAMP WITH TIME ZONE NOT NULL, 
    created_at TIMESTAMP WITH TIME ZONE NOT NULL, 
    CONSTRAINT pk_ibkr_trades PRIMARY KEY (id), 
    CONSTRAINT fk_ibkr_trades_user_id FOREIGN KEY(user_id) REFERENCES ibkr_users (id), 
    CONSTRAINT uq_ibkr_trades_user_id_idempotency_key UNIQUE (user_id, idempotency_key), 
    CONSTRAINT ck_ibkr_trades_trade_type CHECK (trade_type IN ('buy', 'sell')), 
    CONSTRAINT ck_ibkr_trades_order_type CHECK (order_type IN ('limit', 'market')), 
    CONSTRAINT ck_ibkr_trades_realized_on_sell CHECK ((trade_type = 'sell') = (realized_pnl IS NOT NULL)), 
    CONSTRAINT ck_ibkr_trades_quantity CHECK (quantity >= 0.00000001 AND quantity < 10000000000), 
    CONSTRAINT ck_ibkr_trades_price CHECK (price >= 0.00000001 AND price < 10000000000), 
    CONSTRAINT ck_ibkr_trades_total_amount CHECK (total_amount >= 0 AND total_amount < 90000000000), 
    CONSTRAINT ck_ibkr_trades_commission CHECK (commission >= 0 AND commission < 90000000000), 
    CONSTRAINT ck_ibkr_trades_realized_pnl CHECK (realized_pnl >= -90000000000 AND realized_pnl < 90000000000), 
    CONSTRAINT ck_ibkr_trades_cash_after CHECK (cash_after >= 0 AND cash_after < 90000000000), 
    CONSTRAINT ck_ibkr_trades_market_price CHECK (market_price >= 0.00000001 AND market_price < 10000000000)
);

CREATE INDEX ix_ibkr_trades_user_id_id ON ibkr_trades (user_id, id);

CREATE FUNCTION ibkr_trades_append_only() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'ibkr_trades is append-only'; END $$;

CREATE TRIGGER ibkr_trades_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON ibkr_trades EXECUTE FUNCTION ibkr_trades_append_only();

UPDATE alembic_version SET version_num='0004' WHERE alembic_version.version_num = '0003';

-- Running upgrade 0004 -> 0005

CREATE TABLE ibkr_quotes (
    ticker VARCHAR(20) NOT NULL, 
    number INTEGER NOT NULL, 
    price NUMERIC(20, 8) NOT NULL, 
    currency VARCHAR(10), 
    source VARCHAR(20) NOT NULL, 
    timestamp TIMESTAMP WITH TIME ZONE NOT NULL, 
    valid_until TIMESTAMP WITH TIME ZONE NOT NULL, 
    CONSTRAINT pk_ibkr_quotes PRIMARY KEY (ticker, number), 
    CONSTRAINT ck_ibkr_quotes_price CHECK (price >= 0.00000001 AND price < 10000000000)
);

CREATE TABLE ibkr_market (
    id INTEGER NOT NULL, 
    kind VARCHAR(6) NOT NULL, 
    CONSTRAINT pk_ibkr_market PRIMARY KEY (id), 
    CONSTRAINT ck_ibkr_market_one_row CHECK (id = 1)
);

UPDATE alembic_version SET version_num='0005' WHERE alembic_version.version_num = '0004';

-- Running upgrade 0005 -> 0006

CREATE TABLE ibkr_runs (
    user_id BIGINT NOT NULL, 
    run INTEGER NOT NULL, 
    starting_cash NUMERIC(20, 8) NOT NULL, 
    cash_balance NUMERIC(20, 8) NOT NULL, 
    market_time TIMESTAMP WITH TIME ZONE NOT NULL, 
    ended_at TIMESTAMP WITH TIME ZONE NOT NULL, 
    CONSTRAINT pk_ibkr_runs PRIMARY KEY (user_id, run), 
    CONSTRAINT fk_ibkr_runs_user_id FOREIGN KEY(user_id) REFERENCES ibkr_users (id), 
    CONSTRAINT ck_ibkr_runs_starting_cash CHECK (starting_cash >= 0 AND starting_cash < 90000000000), 
    CONSTRAINT ck_ibkr_runs_cash_balance CHECK (cash_balance >= 0 AND cash_balance < 90000000000)
);

CREATE TABLE ibkr_pins (
    id BIGSERIAL NOT NULL, 
    user_id BIGINT NOT NULL, 
    ticker VARCHAR(20) NOT NULL, 
    price NUMERIC(20, 8), 
    created_at TIMESTAMP WITH TIME ZONE NOT NULL, 
    CONSTRAINT pk_ibkr_pins PRIMARY KEY (id), 
    CONSTRAINT fk_ibkr_pins_user_id FOREIGN KEY(user_id) REFERENCES ibkr_users (id), 
    CONSTRAINT ck_ibkr_pins_price CHECK (price >= 0.00000001 AND price < 10000000000)
);

CREATE INDEX ix_ibkr_pins_user_id_id ON ibkr_pins (user_id, id);

ALTER TABLE ibkr_balances ADD COLUMN market_clock TIMESTAMP WITH TIME ZONE;

ALTER TABLE ibkr_balances ADD COLUMN pin_changes INTEGER DEFAULT '0' NOT NULL;

UPDATE alembic_version SET version_num='0006' WHERE alembic_version.version_num = '0005';

-- Running upgrade 0006 -> 0007

ALTER TABLE ibkr_quotes ADD COLUMN market_time TIMESTAMP WITH TIME ZONE;

ALTER TABLE ibkr_quotes ADD COLUMN refusal VARCHAR(20);

UPDATE alembic_version SET version_num='0007' WHERE alembic_version.version_num = '0006';

-- Running upgrade 0007 -> 0008

ALTER TABLE ibkr_trades ADD COLUMN asked VARCHAR(40);

ALTER TABLE ibkr_trades ADD COLUMN order_id BIGINT;

ALTER TABLE ibkr_trades DROP CONSTRAINT uq_ibkr_trades_user_id_idempotency_key;

ALTER TABLE ibkr_trades ADD CONSTRAINT uq_ibkr_trades_user_id_run_idempotency_key UNIQUE (user_id, run, idempotency_key);

UPDATE alembic_version SET version_num='0008' WHERE alembic_version.version_num = '0007';

-- Running upgrade 0008 -> 0009

UPDATE alembic_version SET version_num='0009' WHERE alembic_version.version_num = '0008';

-- Running upgrade 0009 -> 0010

CREATE TABLE ibkr_stretches (
    id BIGSERIAL NOT NULL, 
    user_id BIGINT NOT NULL, 
    run INTEGER NOT NULL, 
    first_bar TIMESTAMP WITH TIME ZONE, 
    last_bar TIMESTAMP WITH TIME ZONE, 
    begun_at TIMESTAMP WITH TIME ZONE NOT NULL, 
    CONSTRAINT pk_ibkr_stretches PRIMARY KEY (id), 
    CONSTRAINT fk_ibkr_stretches_user_id FOREIGN KEY(user_id) REFERENCES ibkr_users (id), 
    CONSTRAINT ck_ibkr_stretches_both_or_none CHECK ((first_bar IS NULL) = (last_bar IS NULL)), 
    CONSTRAINT ck_ibkr_stretches_in_order CHECK (first_bar <= last_bar)
);

CREATE INDEX ix_ibkr_stretches_user_id_run_id ON ibkr_stretches (user_id, run, id);

INSERT INTO ibkr_stretches (user_id, run, first_bar, last_bar, begun_at) SELECT user_id, run, market_clock, market_clock, CURRENT_TIMESTAMP FROM ibkr_balances;

UPDATE alembic_version SET version_num='0010' WHERE alembic_version.version_num = '0009';

-- Running upgrade 0010 -> 0011

CREATE TABLE ibkr_orders (
    id BIGSERIAL NOT NULL, 
    user_id BIGINT NOT NULL, 
    run INTEGER NOT NULL, 
    ticker VARCHAR(20) NOT NULL, 
    action VARCHAR(4) NOT NULL, 
    order_type VARCHAR(13) NOT NULL, 
    quantity NUMERIC(20, 8) NOT NULL, 
    limit_price NUMERIC(20, 8), 
    stop_price NUMERIC(20, 8), 
    trail_percent NUMERIC(20, 8), 
    trail_amount NUMERIC(20, 8), 
    is_triggered BOOLEAN NOT NULL, 
    time_in_force VARCHAR(3) NOT NULL, 
    day DATE NOT NULL, 
    status VARCHAR(8) NOT NULL, 
    reason VARCHAR(300), 
    reserved_cash NUMERIC(20, 8) NOT NULL, 
    commission NUMERIC(20, 8) NOT NULL, 
    parent_id BIGINT, 
    replaces BIGINT, 
    idempotency_key VARCHAR(255), 
    asked VARCHAR(64), 
    quote_number INTEGER, 
    placed_at TIMESTAMP WITH TIME ZONE NOT NULL, 
    market_time TIMESTAMP WITH TIME ZONE NOT NULL, 
    closed_at TIMESTAMP WITH TIME ZONE, 
    trade_id BIGINT, 
    price NUMERIC(20, 8), 
    CONSTRAINT pk_ibkr_orders PRIMARY KEY (id), 
    CONSTRAINT fk_ibkr_orders_user_id FOREIGN KEY(user_id) REFERENCES ibkr_users (id), 
    CONSTRAINT fk_ibkr_orders_parent_id FOREIGN KEY(parent_id) REFERENCES ibkr_orders (id), 
    CONSTRAINT fk_ibkr_orders_replaces FOREIGN KEY(replaces) REFERENCES ibkr_orders (id), 
    CONSTRAINT fk_ibkr_orders_trade_id FOREIGN KEY(trade_id) REFERENCES ibkr_trades (id), 
    CONSTRAINT uq_ibkr_orders_user_id_run_idempotency_key UNIQUE (user_id, run, idempotency_key), 
    CONSTRAINT uq_ibkr_orders_trade_id UNIQUE (trade_id), 
    CONSTRAINT ck_ibkr_orders_action CHECK (action IN ('buy', 'sell')), 
    CONSTRAINT ck_ibkr_orders_order_type CHECK (order_type IN ('market', 'limit', 'stop', 'stop_limit', 'trailing_stop')), 
    CONSTRAINT ck_ibkr_orders_time_in_force CHECK (time_in_force IN ('gtc', 'day', 'ioc', 'fok')), 
    CONSTRAINT ck_ibkr_orders_status CHECK (status IN ('open', 'held', 'filled', 'canceled', 'expired', 'replaced')), 
    CONSTRAINT ck_ibkr_orders_one_state CHECK ((status IN ('open', 'held')) = (closed_at IS NULL) AND (status = 'filled') = (trade_id IS NOT NULL) AND (status = 'filled') = (price IS NOT NULL)), 
    CONSTRAINT ck_ibkr_orders_closed_holds_nothing CHECK (closed_at IS NULL OR reserved_cash = 0), 
    CONSTRAINT ck_ibkr_orders_quantity CHECK (quantity >= 0.00000001 AND quantity < 10000000000), 
    CONSTRAINT ck_ibkr_orders_limit_price CHECK (limit_price >= 0.00000001 AND limit_price < 10000000000), 
    CONSTRAINT ck_ibkr_orders_stop_price CHECK (stop_price >= 0.00000001 AND stop_price < 10000000000), 
    CONSTRAINT ck_ibkr_orders_trail_percent CHECK (trail_percent >= 0.00000001 AND trail_percent < 100), 
    CONSTRAINT ck_ibkr_orders_trail_amount CHECK (trail_amount >= 0.00000001 AND trail_amount < 10000000000), 
    CONSTRAINT ck_ibkr_orders_reserved_cash CHECK (reserved_cash >= 0 AND reserved_cash < 90000000000), 
    CONSTRAINT ck_ibkr_orders_commission CHECK (commission >= 0 AND commission < 90000000000), 
    CONSTRAINT ck_ibkr_orders_price CHECK (price >= 0.00000001 AND price < 10000000000)
);

CREATE INDEX ix_ibkr_orders_user_id_id ON ibkr_orders (user_id, id);

CREATE INDEX ix_ibkr_orders_working ON ibkr_orders (user_id, id) WHERE closed_at IS NULL;

ALTER TABLE ibkr_balances ADD COLUMN settled_at TIMESTAMP WITH TIME ZONE;

UPDATE alembic_version SET version_num='0011' WHERE alembic_version.version_num = '0010';

-- Running upgrade 0011 -> 0012

CREATE TABLE ibkr_corporate_actions (
    number INTEGER NOT NULL, 
    ticker VARCHAR(20) NOT NULL, 
    kind VARCHAR(8) NOT NULL, 
    ex_at TIMESTAMP WITH TIME ZONE NOT NULL, 
    numerator BIGINT, 
    denominator BIGINT, 
    amount NUMERIC(20, 8), 
    price NUMERIC(20, 8) NOT NULL, 
    source VARCHAR(20) NOT NULL, 
    published_at TIMESTAMP WITH TIME ZONE NOT NULL, 
    CONSTRAINT pk_ibkr_corporate_actions PRIMARY KEY (number), 
    CONSTRAINT uq_ibkr_corporate_actions_ticker_kind_ex_at UNIQUE (ticker, kind, ex_at), 
    CONSTRAINT ck_ibkr_corporate_actions_kind CHECK (kind IN ('split', 'dividend')), 
    CONSTRAINT ck_ibkr_corporate_actions_one_of_two CHECK ((kind = 'split') = (numerator IS NOT NULL) AND (kind = 'split') = (denominator IS NOT NULL) AND (kind = 'dividend') = (amount IS NOT NULL)), 
    CONSTRAINT ck_ibkr_corporate_actions_ratio CHECK (numerator > 0 AND denominator > 0), 
    CONSTRAINT ck_ibkr_corporate_actions_amount CHECK (amount >= 0.00000001 AND amount < 10000000000), 
    CONSTRAINT ck_ibkr_corporate_actions_price CHECK (price >= 0.00000001 AND price < 10000000000)
);

ALTER TABLE ibkr_balances ADD COLUMN actions_seen INTEGER DEFAULT '0' NOT NULL;

ALTER TABLE ibkr_balances ADD COLUMN acted_at TIMESTAMP WITH TIME ZONE;

UPDATE ibkr_balances SET acted_at = CURRENT_TIMESTAMP;

ALTER TABLE ibkr_trades ADD COLUMN ratio VARCHAR(40);

ALTER TABLE ibkr_trades ADD COLUMN reason VARCHAR(300);

ALTER TABLE ibkr_trades DROP CONSTRAINT ck_ibkr_trades_trade_type;

ALTER TABLE ibkr_trades ADD CONSTRAINT ck_ibkr_trades_trade_type CHECK (trade_type IN ('buy', 'sell', 'split', 'dividend', 'correction'));

ALTER TABLE ibkr_trades DROP CONSTRAINT ck_ibkr_trades_realized_on_sell;

ALTER TABLE ibkr_trades ADD CONSTRAINT ck_ibkr_trades_realized_but_on_buy CHECK ((trade_type <> 'buy') = (realized_pnl IS NOT NULL));

ALTER TABLE ibkr_trades ADD CONSTRAINT ck_ibkr_trades_ordered CHECK ((order_type IS NOT NULL) = (trade_type IN ('buy', 'sell')));

ALTER TABLE ibkr_trades ADD CONSTRAINT ck_ibkr_trades_priced CHECK ((price IS NULL) = (trade_type = 'correction') AND (market_price IS NULL) = (trade_type = 'correction'));

ALTER TABLE ibkr_trades ADD CONSTRAINT ck_ibkr_trades_explained CHECK ((ratio IS NOT NULL) = (trade_type = 'split') AND (reason IS NOT NULL) = (trade_type = 'correction'));

ALTER TABLE ibkr_trades DROP CONSTRAINT ck_ibkr_trades_quantity;

ALTER TABLE ibkr_trades ADD CONSTRAINT ck_ibkr_trades_quantity CHECK ((quantity >= 0.00000001 OR trade_type = 'correction') AND quantity > -90000000000 AND quantity < 90000000000);

ALTER TABLE ibkr_trades DROP CONSTRAINT ck_ibkr_trades_total_amount;

ALTER TABLE ibkr_trades ADD CONSTRAINT ck_ibkr_trades_total_amount CHECK ((total_amount >= 0 OR trade_type = 'correction') AND total_amount > -90000000000 AND total_amount < 90000000000);

ALTER TABLE ibkr_trades ALTER COLUMN trade_type TYPE VARCHAR(10);

ALTER TABLE ibkr_trades ALTER COLUMN order_type DROP NOT NULL;

ALTER TABLE ibkr_trades ALTER COLUMN price DROP NOT NULL;

ALTER TABLE ibkr_trades ALTER COLUMN market_price DROP NOT NULL;

UPDATE alembic_version SET version_num='0012' WHERE alembic_version.version_num = '0011';

COMMIT;
