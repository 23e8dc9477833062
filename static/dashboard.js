"use strict";

/* The dashboard: one account, seen and used through the same API as a bot's.

     Numbers      exact decimals as text, from the answer's bytes to the screen
     Server       one function asks it everything; what may go wrong is a Problem
     Drawing      text nodes are changed where they differ; nothing is ever parsed as HTML
     Curves       the only place where an amount becomes a float, because pixels are
     Refreshing   every five seconds, while somebody looks
     Orders       placed with an Idempotency-Key, and so safe to send again; and canceled
     Sample market, Account, Accounts (the admin's), Start

   Read `refresh` first. */

const REFRESH_SECONDS = 5;
const HEALTH_SECONDS = 60;
const ANSWER_SECONDS = 10;
const CSV_SECONDS = 120;
const RETRY_AFTER_SECONDS = [1, 2, 4];
const TRADES_ON_A_PAGE = 25;
const MOST_AT_ONCE = 500; // Trades or orders, as the server has it; no account has more open orders.
const DAYS_OF_A_CHART = 250;
const MOST_POINTS = 5000; // A run that has more is asked for by the day.
const TEST_KEY = "test-api-key-123";
const FACES = ["sign-in", "dashboard", "accounts"]; // A visitor's, a trader's, the admin's.
const SOURCES = { sample: "Sample market", yahoo: "Yahoo Finance", yahoo_finance: "Yahoo Finance", alphavantage: "Alpha Vantage" };

const $ = (id) => document.getElementById(id);
const sleep = (seconds) => new Promise((wake) => setTimeout(wake, seconds * 1000));

/* ---------------------------------------------------------------------------------------- Numbers
   A number is the text of its own digits ("1499.95"), or null. Where it must be added or rounded it is
   a BigInt of 10^-8, the smallest step that the broker knows. */

const DECIMALS = 8;

/** JSON with every number as a string of its digits: JSON.parse would make binary floats of them. */
function parseExactly(json) {
  const stringOrNumber = /"[^"\\]*(?:\\.[^"\\]*)*"|-?[0-9][0-9.eE+-]*/g;
  return JSON.parse(json.replace(stringOrNumber, (token) => (token[0] === '"' ? token : `"${token}"`)));
}

function units(number) {
  const [whole, part = ""] = number.replace("-", "").split(".");
  const size = BigInt(whole + part.padEnd(DECIMALS, "0").slice(0, DECIMALS));
  return number.startsWith("-") ? -size : size;
}

/** `amount` units as text with `decimals` decimals, half-even. */
function rounded(amount, decimals) {
  const size = amount < 0n ? -amount : amount;
  const step = 10n ** BigInt(DECIMALS - decimals);
  let steps = size / step;
  const twice = 2n * (size % step);
  if (twice > step || (twice === step && steps % 2n)) steps += 1n;
  const digits = String(steps).padStart(decimals + 1, "0");
  const text = decimals ? `${digits.slice(0, -decimals)}.${digits.slice(-decimals)}` : digits;
  return amount < 0n && steps ? `-${text}` : text;
}

/** Thousands grouped, a real minus, and a plus where it is asked for: "−1,234.50". */
function grouped(number, plus = "") {
  const negative = number.startsWith("-");
  const [whole, part] = number.replace("-", "").split(".");
  const sign = negative ? "−" : /[1-9]/.test(number) ? plus : "";
  return sign + whole.replace(/\B(?=([0-9]{3})+$)/g, ",") + (part ? `.${part}` : "");
}

/** `number` with `least` to `most` decimals. What is not nothing never shows as 0.00. */
function shown(number, least, most, plus) {
  const part = number.split(".")[1] ?? "";
  let text = number;
  if (part.length > most) {
    text = rounded(units(number), most);
    if (!/[1-9]/.test(text)) text = number;
  } else if (part.length < least) {
    text = rounded(units(number), least);
  }
  return grouped(text, plus);
}

const money = (number) => shown(number, 2, 2);
const profit = (number) => shown(number, 2, 2, "+");
const price = (number) => shown(number, 2, 8);
const average = (number) => shown(number, 4, units(number) < 10n ** 8n ? 8 : 4);
const quantity = (number) => shown(number, 0, 8);
const percent = (number) => shown(number, 2, 2, "+");
const usd = (number) => `${money(number)} USD`;
const exactly = (number) => `${price(number)} USD`;

const direction = (number) => (!number || !/[1-9]/.test(number) ? "" : number.startsWith("-") ? "loss" : "gain");
const isAmount = (text) => /^[0-9]{1,20}(\.[0-9]{1,8})?$/.test(text);
const day = (timestamp) => timestamp.slice(0, 10);
const clockTime = (timestamp) => timestamp.slice(0, 19).replace("T", " ");

/* ----------------------------------------------------------------------------------------- Server */

/** What a request met instead of an answer: the server's own sentence, or that there was none. */
class Problem extends Error {
  constructor(detail, status = 0, document = {}) {
    super(detail);
    this.status = status;
    this.code = document.code;
    this.document = document;
  }

  get isAway() { return this.status === 0 || this.status >= 500; }
  get mayPass() { return this.isAway || this.status === 429; }
}

let key = sessionStorage.getItem("key");
let serverAhead = 0; // Milliseconds: prices age by the server's clock, whatever this computer's says.

async function fetched(path, { method = "GET", body, headers = {}, seconds = ANSWER_SECONDS } = {}) {
  const options = { method, cache: "no-store", headers: { ...headers }, signal: AbortSignal.timeout(seconds * 1000) };
  if (key && path.startsWith("/api/")) options.headers.Authorization = `Bearer ${key}`;
  if (body !== undefined) {
    options.headers["Content-Type"] = "application/json";
    options.body = body;
  }
  try {
    const response = await fetch(path, options);
    const date = Date.parse(response.headers.get("Date"));
    if (date) serverAhead = date - Date.now();
    return [response, await response.text()];
  } catch {
    throw new Problem("The server does not answer.");
  }
}

/** The answer to a request, its numbers exact; a Problem if it is not a success. */
async function ask(path, options) {
  const [response, text] = await fetched(path, options);
  let document;
  try {
    document = parseExactly(text);
  } catch {
    throw new Problem(`The server does not answer as it should (status ${response.status}).`, response.ok ? 502 : response.status);
  }
  if (!response.ok) throw new Problem(document.detail ?? `The server answered ${response.status}.`, response.status, document);
  return { ...document, replayed: response.headers.has("Idempotent-Replayed") };
}

/** The answer, or null where the server has no such endpoint for this market. */
async function askIfThere(path) {
  try {
    return await ask(path);
  } catch (problem) {
    if (problem.status === 404 || problem.code === "market_is_live") return null;
    throw problem;
  }
}

/* ---------------------------------------------------------------------------------------- Drawing */

/** Set a node's text, class and tooltip, touching only what differs: no flicker, no lost selection. */
function draw(node, text, look = "", exact = "") {
  if (node.textContent !== text) node.textContent = text;
  if (node.dataset.look !== look) {
    if (node.dataset.look) node.classList.remove(node.dataset.look);
    if (look) node.classList.add(look);
    node.dataset.look = look;
  }
  if (node.title !== exact) node.title = exact;
}

/** Draw `number` by `format`; the exact digits are in the tooltip where the format rounds. */
function drawNumber(node, number, format, look = "") {
  if (number === null || number === undefined) return draw(node, "–", "muted", "No price at the moment");
  const text = format(number);
  const isExact = units(text.replace(/[+,]/g, "").replace("−", "-")) === units(number);
  draw(node, text, look, isExact ? "" : quantity(number));
}

const drawProfit = (node, number, format = profit) => drawNumber(node, number, format, direction(number));
const drawIfAny = (node, number, ...how) => ((number ?? null) === null ? draw(node, "") : drawNumber(node, number, ...how));

/** Make the rows of `body` those of `items`: rows are kept by their key, so focus and scroll stay. */
function drawRows(body, items, keyOf, columns) {
  const keys = new Set(items.map(keyOf));
  const rows = new Map();
  for (const row of [...body.rows]) {
    if (keys.has(row.dataset.key)) rows.set(row.dataset.key, row);
    else row.remove();
  }
  items.forEach((item, place) => {
    const row = rows.get(keyOf(item)) ?? newRow(keyOf(item), columns);
    columns.forEach(([, drawCell], i) => drawCell(row.cells[i], item));
    if (body.rows[place] !== row) body.insertBefore(row, body.rows[place] ?? null);
  });
  columns.forEach((_, i) => alignDecimals([...body.rows].map((row) => row.cells[i])));
}

/** Line up the decimal points of a column: what a number lacks in decimals follows it unseen (`data-lacks`). */
function alignDecimals(cells) {
  const numbers = cells.filter((cell) => /^[+−]?[0-9,]+(\.[0-9]+)?$/.test(cell.textContent));
  const parts = numbers.map((cell) => cell.textContent.match(/\.[0-9]+|$/)[0]);
  const longest = parts.reduce((one, other) => (other.length > one.length ? other : one), "");
  numbers.forEach((cell, i) => {
    const lacks = longest.slice(parts[i].length);
    if (cell.dataset.lacks !== lacks) cell.dataset.lacks = lacks;
  });
}

function newRow(key, columns) {
  const row = document.createElement("tr");
  row.dataset.key = key;
  for (const [tag] of columns) {
    const cell = document.createElement(tag);
    if (tag === "th") cell.scope = "row";
    row.append(cell);
  }
  return row;
}

/** The one element that lives in a cell, made the first time. */
function within(cell, tag) {
  return cell.firstElementChild ?? cell.appendChild(document.createElement(tag));
}

function drawButton(cell, text, label, act) {
  const button = within(cell, "button");
  draw(button, text);
  button.type = "button";
  button.setAttribute("aria-label", label);
  button.onclick = act;
}

function drawTime(cell, timestamp) {
  if (!timestamp) return draw(cell, "");
  const time = within(cell, "time");
  time.dateTime = timestamp;
  draw(time, clockTime(timestamp));
}

const SIDES = { buy: "Buy", sell: "Sell", split: "Split", dividend: "Dividend", correction: "Correction" };
const side = (action) => SIDES[action] ?? action;
const isOrdered = ({ trade_type: type }) => type === "buy" || type === "sell"; // The rest happens to a holding.

function age(timestamp) {
  const seconds = Math.max(0, Math.floor((Date.now() + serverAhead - Date.parse(timestamp)) / 1000));
  if (seconds < 60) return `${seconds} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min`;
  if (seconds < 86400) return `${Math.floor(seconds / 3600)} h`;
  return `${Math.floor(seconds / 86400)} d`;
}

const HOLDING_COLUMNS = [
  ["th", (cell, h) => drawButton(cell, h.ticker, `${h.ticker}, chart of its price`, () => openChart(h.ticker))],
  ["td", (cell, h) => drawNumber(cell, h.quantity, quantity)],
  ["td", (cell, h) => drawNumber(cell, h.current_price, price)],
  ["td", (cell, h) => drawNumber(cell, h.average_price, average)],
  ["td", (cell, h) => drawNumber(cell, h.market_value, money)],
  ["td", (cell, h) => drawProfit(cell, h.unrealized_pnl)],
  ["td", (cell, h) => drawProfit(cell, h.unrealized_pnl_percent, percent)],
  ["td", (cell, h) => {
    const time = within(cell, "time");
    time.dateTime = h.price_timestamp ?? "";
    time.dataset.stale = h.stale ? h.market_time : "";
    drawAge(time);
  }],
  ["td", (cell, h) => {
    const free = direction(h.available_quantity) ? h.available_quantity : h.quantity; // Else the refusal says why not.
    drawButton(cell, "Sell…", `Sell ${h.ticker}…`, () => fillTicket("sell", h.ticker, free));
  }],
];

const TRADE = {
  booked: ["td", (cell, t) => drawTime(cell, t.timestamp)],
  marketTime: ["td", (cell, t) => drawTime(cell, t.market_time)],
  side: ["td", (cell, t) => draw(cell, t.ratio ? `${side(t.trade_type)} ${t.ratio}` : side(t.trade_type))],
  ticker: ["td", (cell, t) => draw(cell, t.ticker)],
  quantity: ["td", (cell, t) => drawIfAny(cell, t.quantity, quantity)],
  price: ["td", (cell, t) => drawIfAny(cell, t.price, price)],
  total: ["td", (cell, t) => drawIfAny(cell, t.total_amount, money)],
  commission: ["td", (cell, t) => drawIfAny(cell, t.commission, money)],
  profit: ["td", (cell, t) => drawIfAny(cell, t.realized_pnl, profit, direction(t.realized_pnl))],
  cash: ["td", (cell, t) => drawNumber(cell, t.cash_balance, money)],
  source: ["td", (cell, t) => draw(cell, SOURCES[t.price_source] ?? t.price_source ?? "")],
  number: ["td", (cell, t) => draw(cell, t.id)],
  order: ["td", (cell, t) => draw(cell, t.reason ?? t.order_id ?? "", t.reason ? "reason" : "")],
};
const TRADE_COLUMNS = Object.values(TRADE);
const MARK_COLUMNS = [TRADE.marketTime, TRADE.side, TRADE.quantity, TRADE.price, TRADE.profit];

const TYPES = { market: "Market", limit: "Limit", stop: "Stop", stop_limit: "Stop limit", trailing_stop: "Trailing stop" };

const ORDER_COLUMNS = [
  ["th", (cell, o) => draw(cell, o.id)],
  ["td", (cell, o) => draw(cell, o.ticker)],
  ["td", (cell, o) => draw(cell, side(o.action))],
  ["td", (cell, o) => draw(cell, o.parent_id ? `${o.order_type === "limit" ? "Take-profit" : "Stop-loss"} of order ${o.parent_id}` : TYPES[o.order_type])],
  ["td", (cell, o) => drawNumber(cell, o.quantity, quantity)],
  ["td", (cell, o) => drawIfAny(cell, o.limit_price, price)],
  ["td", (cell, o) => drawIfAny(cell, o.stop_price, price)],
  ["td", (cell, o) => draw(cell, o.trail_percent ? `${quantity(o.trail_percent)} %` : o.trail_amount ? exactly(o.trail_amount) : "")],
  ["td", (cell, o) => draw(cell, o.time_in_force === "day" ? "day" : "until canceled")],
  ["td", (cell, o) => draw(cell, o.status, "", o.status === "held" ? `Goes live when order ${o.parent_id} is filled` : "")],
  ["td", (cell, o) => draw(cell, heldBack(o))],
  ["td", (cell, o) => drawButton(cell, "Cancel", `Cancel order ${o.id}`, () => cancel(o))],
];

const SUMMARY = [
  ["Started with", "starting_cash", usd],
  ["Equity", "equity", usd],
  ["Return", "total_return_percent", (number) => `${percent(number)} %`, direction],
  ["Return a year", "annual_return_percent", (number) => `${percent(number)} %`, direction],
  ["Largest drawdown", "max_drawdown_percent", (number) => `${money(number)} %`],
  ["Volatility a year", "annual_volatility_percent", (number) => `${money(number)} %`],
  ["Sharpe ratio", "sharpe_ratio", (number) => shown(number, 2, 2)],
  ["Sortino ratio", "sortino_ratio", (number) => shown(number, 2, 2)],
  ["Days with holdings", "exposure_percent", (number) => `${money(number)} %`],
  ["Trades", "trades", quantity],
  ["Realised profit", "realized_pnl", (number) => `${profit(number)} USD`, direction],
  ["Winning sales", "win_rate_percent", (number) => `${money(number)} %`],
  ["Profit factor", "profit_factor", (number) => shown(number, 2, 2)],
  ["Dividends", "dividends", usd],
  ["Commission", "commission", usd],
];

function drawPortfolio(portfolio) {
  if (portfolio.equity === null) draw($("equity"), "–", "muted", "A holding has no price at the moment");
  else drawNumber($("equity"), portfolio.equity, money);
  drawChange(portfolio);
  drawNumber($("cash"), portfolio.cash_balance, money);
  drawNumber($("market-value"), portfolio.market_value, money);
  drawNumber($("cost"), portfolio.total_invested_value, money);
  drawProfit($("unrealized"), portfolio.unrealized_pnl);
  drawProfit($("realized"), portfolio.realized_pnl);
  drawProfit($("total"), portfolio.total_pnl);

  const holdings = portfolio.holdings;
  drawRows($("holdings-rows"), holdings, (holding) => holding.ticker, HOLDING_COLUMNS);
  draw($("holdings-count"), holdings.length ? String(holdings.length) : "");
  $("holdings-none").hidden = holdings.length > 0;
  $("holdings").querySelector(".scroll").hidden = holdings.length === 0;
}

/** The profit since the run began, in dollars and percent: equity less profit is what it began with. */
function drawChange({ equity, total_pnl: total, holdings }) {
  $("since").hidden = equity === null;
  if (equity === null) {
    const unpriced = holdings.filter((holding) => holding.current_price === null).map((holding) => holding.ticker);
    return draw($("change"), `No price at the moment for ${unpriced.join(", ")}.`, "muted");
  }
  const start = units(equity) - units(total);
  const share = start > 0n ? ` (${percent(rounded((units(total) * 100n * 10n ** 8n) / start, 2))} %)` : "";
  draw($("change"), `${profit(total)} USD${share}`, direction(total) || "muted");
}

function drawTrades({ trades, next_cursor: next }) {
  drawRows($("trades-rows"), trades, (trade) => trade.id, TRADE_COLUMNS);
  const page = seen.cursors.length;
  $("trades-none").hidden = trades.length > 0;
  $("trades").querySelector(".scroll").hidden = trades.length === 0;
  $("pages").hidden = page === 1 && next === null;
  draw($("page-number"), `Page ${page}`);
  $("newer").setAttribute("aria-disabled", String(page === 1)); // Not `disabled`, which would drop the focus.
  $("older").setAttribute("aria-disabled", String(next === null));
  seen.nextCursor = next;
}

/** What is not there for other orders: a purchase's dollars, a sale's shares; of two that cancel each other, once. */
function heldBack(order) {
  if (order.status === "held") return "–";
  const pair = seen.orders.find((other) => order.parent_id && other.status === "open"
    && [other.id, other.parent_id].includes(order.parent_id) && units(other.id) < units(order.id));
  const cash = direction(order.reserved_cash) ? [usd(order.reserved_cash)] : [];
  if (order.action === "buy") return cash.join();
  return [pair ? `with order ${pair.id}` : `${quantity(order.quantity)} ${order.ticker}`, ...cash].join(" and ");
}

function drawOrders({ orders }) {
  seen.orders = orders;
  const hadFocus = $("orders").querySelector(".scroll").contains(document.activeElement);
  drawRows($("orders-rows"), orders, (order) => order.id, ORDER_COLUMNS);
  const cash = orders.reduce((sum, order) => sum + units(order.reserved_cash), 0n);
  draw($("orders-count"), orders.length ? `${orders.length}${cash ? ` · ${usd(rounded(cash, 8))} held back` : ""}` : "");
  $("orders-none").hidden = orders.length > 0;
  $("orders").querySelector(".scroll").hidden = orders.length === 0;
  $("cancel-all").setAttribute("aria-disabled", String(orders.length === 0));
  // Not to the next Cancel: whoever presses Enter twice would cancel that too.
  if (hadFocus && !(orders.length && $("orders").contains(document.activeElement))) $("orders-heading").focus({ preventScroll: true });
}

function drawSummary(history) {
  const list = $("summary");
  if (!list.children.length) {
    for (const [label] of SUMMARY) {
      const pair = list.appendChild(document.createElement("div"));
      pair.appendChild(document.createElement("dt")).textContent = label;
      pair.appendChild(document.createElement("dd"));
    }
  }
  SUMMARY.forEach(([, member, format, look = () => ""], i) => {
    const value = history.summary[member] ?? null;
    const node = list.children[i].lastElementChild;
    if (value === null) draw(node, "–", "muted", "Nothing to work it out from yet");
    else draw(node, format(value), look(value));
  });
}

/** The choice among the account's runs, the current one first. */
function drawRuns() {
  const choice = $("run-select");
  const { run, shownRun } = seen;
  draw($("run-heading"), shownRun ? `Run ${shownRun} (earlier)` : `Run ${run}`);
  $("run-choice").hidden = run < 2;
  if (choice.options.length === run) return;
  choice.replaceChildren();
  for (let number = run; number >= 1; number -= 1) {
    choice.add(new Option(number === run ? `run ${number} (current)` : `run ${number}`, String(number)));
  }
  choice.value = String(shownRun ?? run);
}

function drawSources() {
  const { sources, portfolio, market } = seen;
  let text = sources.length ? `Prices: ${sources.join(", then ")}` : "";
  const taken = (portfolio?.holdings ?? []).map((holding) => holding.price_timestamp).filter(Boolean).sort();
  if (text && key && taken.length) text += market?.clock === "manual" ? `, of ${day(taken[0])}` : `, the oldest ${age(taken[0])} old`;
  draw($("prices-from"), text);
  $("sample-band").hidden = !seen.isSample;
}

/** How long ago a price was taken; on a stopped sample clock its date, since that is long past. */
function drawAge(time) {
  const timestamp = time.dateTime;
  if (!timestamp) return draw(time, "no price", "muted");
  if (time.dataset.stale) return draw(time, `stale, of ${day(time.dataset.stale)}`, "loss", clockTime(time.dataset.stale) + " UTC");
  draw(time, seen.market?.clock === "manual" ? day(timestamp) : `${age(timestamp)} ago`, "", clockTime(timestamp) + " UTC");
}

function drawAges() {
  $("holdings-rows").querySelectorAll("time").forEach(drawAge);
  drawSources();
  if (seen.updated) draw($("updated"), `Updated ${seen.updated} UTC`);
}

/* ----------------------------------------------------------------------------------------- Curves */

let plot = null;
let curvePoints = [];
let chartPlot = null;
let chartBars = [];
let chartMarks = [];

const float = (number) => (number === null ? null : Number(number));
const epoch = (timestamp) => Date.parse(timestamp) / 1000; // Seconds.
const short = (timestamp) => clockTime(timestamp).slice(0, 16);

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

/** What both charts have: over time, or over the order of the points; dates are UTC. */
function chartOptions(host, isOverTime, ends) {
  const axis = {
    stroke: () => colour("--muted"),
    grid: { stroke: () => colour("--line"), width: 1 },
    ticks: { stroke: () => colour("--line"), width: 1, size: 4 },
    font: "12px system-ui, sans-serif",
  };
  const dates = (_, ticks, __, ___, apart) => ticks.map((tick) => {
    const text = new Date(tick * 1000).toISOString();
    return apart >= 86400 ? text.slice(0, 10) : text.slice(apart >= 3600 ? 5 : 11, 16).replace("T", " ");
  });
  const steps = (_, ticks) => ticks.map(ends);
  const wholeSteps = [1, 10, 100, 1000, 10000, 100000].flatMap((step) => [step, 2 * step, 5 * step]);
  return {
    width: host.clientWidth,
    height: host.clientHeight,
    tzDate: (time) => uPlot.tzDate(new Date(time * 1000), "Etc/UTC"),
    padding: [8, 36, 0, 0], // Room for half of the last date.
    legend: { show: false },
    cursor: { y: false, drag: { x: false, y: false }, points: { size: 7 } },
    scales: { x: { time: isOverTime, range: (_, low, high) => (low === high ? [low - 1, high + 1] : [low, high]) } },
    axes: [
      { ...axis, size: 30, space: 90, ...(isOverTime ? { values: dates } : { incrs: wholeSteps, values: steps }) },
      {
        ...axis,
        values: (_, ticks) => ticks.map((tick) => (tick === null ? "" : tick.toLocaleString("en-US", { maximumFractionDigits: 8 }))),
        size: (_, labels) => 16 + 7.5 * Math.max(4, ...(labels ?? []).map((label) => label.length)),
      },
    ],
  };
}

/** The curve from the starting cash on, over time; over the order of the points where the market's time has jumped back. */
function drawCurve({ points, summary }) {
  if (!points.length) return;
  const start = { timestamp: points[0].timestamp, equity: summary.starting_cash };
  curvePoints = withFalls([start, ...points]);
  const at = curvePoints.map((point) => epoch(point.timestamp));
  const runsOn = at.every((time, i) => i === 0 || time >= at[i - 1]) && at.at(-1) > at[0];
  const lines = [
    runsOn ? at : curvePoints.map((_, i) => i),
    curvePoints.map((point) => float(point.equity)),
    curvePoints.map(() => float(start.equity)),
    curvePoints.map((point) => (point.fall === null ? null : -float(point.fall))),
  ];
  const isShort = points.length <= 2;
  $("curve-note").hidden = runsOn && !isShort;
  draw($("curve-note"), isShort
    ? "The curve has one point for each trade and each bar that passed, and one for now."
    : "One step for each point: the market’s clock has gone back in this run, or stood still.");
  const said = points.at(-1)?.equity;
  $("curve").setAttribute("aria-label", `Equity curve from ${usd(summary.starting_cash)} to ${said ? usd(said) : "an unknown value"}, ` +
    `${points.length} points` + (summary.max_drawdown_percent ? `, largest drawdown ${money(summary.max_drawdown_percent)} percent` : ""));
  if (plot?.runsOn === runsOn) {
    plot.setData(lines);
  } else {
    plot?.destroy();
    plot = new uPlot(curveOptions(runsOn), lines, $("curve"));
    plot.runsOn = runsOn;
  }
  readOut(plot.cursor.idx);
}

/** The points, each with how far its equity lies below the highest before it, in percent. */
function withFalls(points) {
  let peak = 0n;
  return points.map((point) => {
    if (point.equity === null) return { ...point, fall: null };
    const equity = units(point.equity);
    if (equity > peak) peak = equity;
    return { ...point, fall: peak ? rounded(((peak - equity) * 100n * 10n ** 8n) / peak, 2) : "0" };
  });
}

/** The drawdown hangs in the lowest quarter, on an axis of its own; the equity keeps above it. */
function curveOptions(runsOn) {
  const options = chartOptions($("curve"), runsOn, (tick) =>
    (tick === 0 ? "start" : tick === curvePoints.length - 1 ? (seen.shownRun ? "end" : "now") : String(tick)));
  const [over, equityAxis] = options.axes;
  let lowest = 0;
  const aboveTheFall = (_, low, high) => {
    const [bottom, top] = low === high ? [low * 0.99 - 1, high * 1.01 + 1] : uPlot.rangeNum(low, high, 0.1, true);
    lowest = bottom;
    return [bottom - (top - bottom) / 3, top];
  };
  const noRise = (_, ticks) => ticks.map((tick) => (tick > 0 ? null : tick));
  const noFall = (_, ticks) => ticks.map((tick) => (tick < lowest ? null : tick));
  return {
    ...options,
    padding: [8, 0, 0, 0],
    scales: {
      ...options.scales,
      y: { range: aboveTheFall },
      fall: { range: (_, low) => [Math.min(low, -1) * 1.1, Math.min(low, -1) * -3.3] }, // One percent at the least: less is no fall to see.
    },
    axes: [
      over,
      { ...equityAxis, filter: noFall, ticks: { ...equityAxis.ticks, filter: noFall }, grid: { ...equityAxis.grid, filter: noFall } },
      {
        ...equityAxis, scale: "fall", side: 1, space: 18, size: 52, grid: { show: false },
        filter: noRise, ticks: { ...equityAxis.ticks, filter: noRise },
        values: (_, ticks) => ticks.map((tick) => (tick === null ? "" : `${String(tick).replace("-", "−")} %`)),
      },
    ],
    series: [
      {},
      {
        stroke: () => colour("--accent"), fill: () => colour("--fill"), fillTo: () => lowest, width: 2,
        points: { show: (_, __, from, to) => to - from < 30, size: 5 },
      },
      { stroke: () => colour("--edge"), width: 1, dash: [4, 4], points: { show: false } },
      { scale: "fall", stroke: () => colour("--loss"), fill: () => colour("--fall"), width: 1, points: { show: false } },
    ],
    hooks: { setCursor: [(chart) => readOut(chart.cursor.idx)] },
  };
}

/** The point under the pointer in words, or the last one: the exact digits, which the curve has not. */
function readOut(index) {
  const point = curvePoints[index ?? curvePoints.length - 1];
  if (!point) return draw($("readout"), "");
  const fall = direction(point.fall) ? ` · ${money(point.fall)} % below its peak` : "";
  draw($("readout"), `${short(point.timestamp)} · ${point.equity === null ? "no price" : usd(point.equity)}${fall}`);
}

async function openChart(ticker) {
  if (seen.chartOf !== ticker) closeChart();
  seen.chartOf = ticker;
  draw($("chart-heading"), ticker);
  $("chart-plot").setAttribute("aria-label", `Price of ${ticker}`);
  $("chart").hidden = false;
  $("chart-heading").focus();
  await refreshChart();
}

/** Leave no chart; the focus goes back to the row that it was opened from, if that is still there. */
function closeChart() {
  const hadFocus = $("chart").contains(document.activeElement);
  const row = [...$("holdings-rows").rows].find((one) => one.dataset.key === seen.chartOf);
  seen.chartOf = null;
  $("chart").hidden = true;
  chartPlot?.destroy();
  chartPlot = null;
  $("chart-rows").replaceChildren();
  for (const id of ["chart-heading", "chart-readout", "chart-said"]) draw($(id), "");
  if (hadFocus) (row?.querySelector("button") ?? $("holdings-heading")).focus();
}

async function refreshChart() {
  const ticker = seen.chartOf;
  if (!ticker) return;
  const name = encodeURIComponent(ticker);
  try {
    const [{ bars }, { trades }] = await Promise.all([
      ask(`/api/v1/bars/${name}?limit=${DAYS_OF_A_CHART}`), ask(`/api/v1/trades?ticker=${name}&limit=${MOST_AT_ONCE}`),
    ]);
    if (ticker === seen.chartOf) drawChart(ticker, bars, trades);
  } catch (problem) {
    if (!(problem instanceof Problem)) throw problem;
    if (ticker === seen.chartOf) draw($("chart-said"), problem.message, "loss");
  }
}

/** A holding's price by the day, with a mark for each of the trades since; the table below says the same in words. */
function drawChart(ticker, bars, trades) {
  if (!bars.length) return draw($("chart-said"), `There are no past prices of ${ticker}.`);
  const marks = trades.filter((trade) => epoch(trade.market_time) >= epoch(bars[0].timestamp));
  const ordered = marks.filter(isOrdered);
  const bought = ordered.filter((trade) => trade.trade_type === "buy").length;
  const counted = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;
  const [first, last] = [bars[0], bars.at(-1)];
  draw($("chart-said"), `${counted(bars.length, "day")} from ${day(first.timestamp)} (${exactly(first.close)}) to ` +
    `${day(last.timestamp)} (${exactly(last.close)}), with ▲ ${counted(bought, "purchase")} and ▼ ${counted(ordered.length - bought, "sale")}.`);
  drawRows($("chart-rows"), marks, (trade) => trade.id, MARK_COLUMNS);
  const lines = [bars.map((bar) => epoch(bar.timestamp)), bars.map((bar) => float(bar.close))];
  chartBars = bars;
  chartMarks = ordered.map((trade) => ({ at: epoch(trade.market_time), price: float(trade.price), isBuy: trade.trade_type === "buy" }));
  if (chartPlot) chartPlot.setData(lines);
  else chartPlot = new uPlot(priceOptions(), lines, $("chart-plot"));
  readPrice(chartPlot.cursor.idx);
}

function priceOptions() {
  const options = chartOptions($("chart-plot"), true);
  const withMarks = (low, high, own) => [Math.min(low, ...own), Math.max(high, ...own)];
  return {
    ...options,
    scales: {
      x: { range: (_, low, high) => options.scales.x.range(_, ...withMarks(low, high, chartMarks.map((mark) => mark.at))) },
      y: { range: (_, low, high) => uPlot.rangeNum(...withMarks(low, high, chartMarks.map((mark) => mark.price)), 0.15, true) },
    },
    series: [{}, { stroke: () => colour("--accent"), width: 2, points: { show: (_, __, from, to) => to - from < 30, size: 5 } }],
    hooks: { draw: [drawMarks], setCursor: [(chart) => readPrice(chart.cursor.idx)] },
  };
}

/** A triangle that touches the price of its trade: a purchase from below, a sale from above. */
function drawMarks({ ctx, valToPos }) {
  const size = 6 * devicePixelRatio;
  for (const { at, price, isBuy } of chartMarks) {
    const x = valToPos(at, "x", true);
    const y = valToPos(price, "y", true);
    const tail = y + (isBuy ? 2 : -2) * size;
    ctx.beginPath();
    ctx.moveTo(x, y);
    ctx.lineTo(x - size, tail);
    ctx.lineTo(x + size, tail);
    ctx.closePath();
    ctx.lineWidth = 2 * devicePixelRatio;
    ctx.strokeStyle = colour("--card");
    ctx.stroke();
    ctx.fillStyle = colour(isBuy ? "--gain" : "--loss");
    ctx.fill();
  }
}

function readPrice(index) {
  const bar = chartBars[index ?? chartBars.length - 1];
  draw($("chart-readout"), bar ? `${day(bar.timestamp)} · ${exactly(bar.close)}` : "");
}

/** The charts have the colours and the width that the page has. */
function fit(drawn, host) {
  const { clientWidth: width, clientHeight: height } = host;
  if (drawn && width && (drawn.width !== width || drawn.height !== height)) drawn.setSize({ width, height });
}

function fitCharts() {
  fit(plot, $("curve"));
  fit(chartPlot, $("chart-plot"));
}

/* ------------------------------------------------------------------------------------- Refreshing */

/** What the page knows. `cursors` are the pages of trades turned to so far, the first being null. */
const seen = {
  sources: [], isSample: false, portfolio: null, market: null, updated: "",
  run: 1, shownRun: null, cursors: [null], nextCursor: null, historyOf: "", refreshes: 0, healthAt: 0,
  orders: [], chartOf: null, longRun: null, isAdmins: false,
};

let refreshing = null;
let refreshAgain = false;

/** Ask for everything that is shown and draw it. One at a time: a second call waits, and asks anew. */
function refresh() {
  if (refreshing) {
    refreshAgain = true;
    return refreshing;
  }
  refreshing = refreshOnce().finally(() => {
    refreshing = null;
    if (refreshAgain) {
      refreshAgain = false;
      return refresh();
    }
  });
  return refreshing;
}

async function refreshOnce() {
  const askedWith = key;
  try {
    await refreshHealth();
    if (key) await (seen.isAdmins ? refreshAccounts : refreshAccount)(askedWith);
    sayAway("");
  } catch (problem) {
    if (key !== askedWith) return;
    if (!(problem instanceof Problem)) throw problem;
    if (problem.code === "forbidden" && !seen.isAdmins) {
      seen.isAdmins = true; // No other key is refused an account.
      return refreshOnce();
    }
    const isSignedOut = problem.status === 401;
    if (isSignedOut) signOut("The server does not know this key, or no longer.");
    sayAway(isSignedOut ? "" : problem.message);
  }
}

/** Where prices come from; open to all, so that the sign-in form can say it too. */
async function refreshHealth() {
  if (Date.now() - seen.healthAt < HEALTH_SECONDS * 1000) return;
  let health;
  try {
    health = await ask("/health");
  } catch (problem) {
    if (problem.status === 0) throw problem;
    health = problem.document; // Unhealthy is 503, and still says everything.
  }
  const sources = Object.entries(health.prices ?? {}).filter(([source]) => source in SOURCES);
  seen.isSample = sources.some(([source]) => source === "sample");
  seen.sources = sources.map(([source, { resting }]) => SOURCES[source] + (resting ? " (resting after failures)" : ""));
  seen.healthAt = Date.now();
  drawSources();
}

const timeOfDay = () => clockTime(new Date(Date.now() + serverAhead).toISOString()).slice(11);

async function refreshAccount(askedWith) {
  const [portfolio, orders, trades, market] = await Promise.all([
    ask("/api/v1/portfolio"), ask(`/api/v1/orders?limit=${MOST_AT_ONCE}`), pageOfTrades(),
    seen.isSample ? askIfThere("/api/v1/market") : null,
  ]);
  if (key !== askedWith) return;
  Object.assign(seen, { portfolio, market, updated: timeOfDay() });
  show("dashboard");
  drawPortfolio(portfolio);
  drawOrders(orders);
  if (trades.cursor === seen.cursors.at(-1) && trades.run === seen.shownRun) drawTrades(trades);
  drawMarket();
  drawAges();
  const state = `${seen.shownRun} ${portfolio.cash_balance} ${portfolio.equity} ${trades.trades[0]?.id} ${market?.now}`;
  seen.refreshes += 1;
  if (state !== seen.historyOf || seen.refreshes % 12 === 0) {
    await refreshHistory(state);
    await refreshChart();
  }
  if (quoteMayChange) await refreshQuote();
}

/** The page of trades that is turned to, with the cursor and run that it was asked for. */
async function pageOfTrades() {
  const cursor = seen.cursors.at(-1);
  const run = seen.shownRun;
  const query = new URLSearchParams({ limit: TRADES_ON_A_PAGE, ...(cursor && { cursor }), ...(run && { run }) });
  try {
    return { ...(await ask(`/api/v1/trades?${query}`)), cursor, run };
  } catch (problem) {
    if (problem.status !== 400 || !cursor) throw problem;
    seen.cursors = [null]; // The server knows this page no more: its database is another one.
    return pageOfTrades();
  }
}

/** The run, its curve and its figures: long for a busy bot, so asked for when something has changed. */
async function refreshHistory(state) {
  const shownRun = seen.shownRun;
  const resolution = seen.longRun === (shownRun ?? seen.run) ? "day" : "bar";
  const query = new URLSearchParams({ resolution, ...(shownRun && { run: shownRun }) });
  const history = await askIfThere(`/api/v1/account/history?${query}`);
  if (shownRun !== seen.shownRun || !key) return;
  $("overview").querySelector(".run").hidden = $("overview").querySelector("figure").hidden = !history;
  if (!history) return;
  if (!shownRun && Number(history.run) !== seen.run) {
    const startedOver = seen.historyOf !== "";
    seen.run = Number(history.run);
    if (startedOver) turnTo([null]);
  }
  seen.historyOf = state;
  if (history.points.length > MOST_POINTS) seen.longRun = Number(history.run);
  drawRuns();
  drawSummary(history);
  drawCurve(history);
}

/** Say that the server is away, with its reason; nothing once it is back. What was seen stays. */
function sayAway(reason) {
  const old = seen.updated ? ` What you see is of ${seen.updated} UTC.` : "";
  const text = reason && `${reason}${old} Trying again every ${REFRESH_SECONDS} seconds.`;
  if ($("away").textContent !== text) $("away").textContent = text;
  $("away").hidden = !reason;
}

function turnTo(cursors) {
  seen.cursors = cursors;
  seen.nextCursor = null;
  return refresh();
}

function showRun(run) {
  seen.shownRun = run === seen.run ? null : run;
  draw($("start-over-result"), "");
  turnTo([null]);
}

/* ----------------------------------------------------------------------------------------- Orders */

let sending = false;
let canceling = false;
let quoted = null; // The last price answer for the ticket's ticker.
let quoteMayChange = false; // Not for a ticker that nobody knows: that is asked once.

const ticketTicker = () => $("ticker").value.trim().toUpperCase();
const ticketAction = () => $("order-form").elements.action.value;
const ticketType = () => $("type").value;
const ticketRests = () => !["market", "now"].includes(ticketType());

const TYPE_NOTES = {
  market: "Filled at once, at the market’s price.",
  now: "Filled at once at this price, or refused.",
  limit: "Waits for this price or a better one.",
  stop: "Waits until the market comes to the stop, then takes its price.",
  stop_limit: "Waits for the stop, and from then on for the limit.",
  trailing_stop: "A stop that follows the market, and never back.",
};

/** Which input an error of the API is about. */
const INPUTS = {
  ticker: "ticker", quantity: "quantity", notional: "quantity", price: "price", limit_price: "price", stop_price: "stop",
  trail_percent: "trail", "take_profit.limit_price": "take-profit", "stop_loss.stop_price": "stop-loss",
};

/** What is written there; nothing for what the type of order has not. */
const written = (id) => ($(id).matches(":disabled") ? "" : $(id).value.trim());

function fillTicket(action, ticker, amount) {
  $("order-form").reset();
  $("order-form").elements.action.value = action;
  $("ticker").value = ticker;
  $("quantity").value = amount;
  drawTicket();
  refreshQuote();
  $("quantity").focus();
  $("quantity").select();
}

async function refreshQuote() {
  const ticker = ticketTicker();
  quoteMayChange = false;
  const isTicker = /^[A-Z0-9.\-=^/]{1,20}$/.test(ticker) && /[A-Z0-9]/.test(ticker);
  if (!isTicker) {
    quoted = null;
    draw($("quote"), ticker ? "A ticker has letters, digits and . - = ^ / only." : "Name a ticker to see its price.");
    return drawTicket();
  }
  try {
    const quote = await ask(`/api/v1/price/${encodeURIComponent(ticker)}`);
    if (ticker !== ticketTicker()) return;
    quoted = { ...quote, asked: ticker }; // BRK.B is answered as BRK-B.
    quoteMayChange = true;
    const taken = seen.market?.clock === "manual" ? day(quote.timestamp) : `${age(quote.timestamp)} ago`;
    const old = quote.stale ? `; stale, its market last saw it on ${day(quote.market_time)}` : "";
    draw($("quote"), `${quote.ticker}: ${price(quote.price)} ${quote.currency ?? "(currency unknown)"}, ${taken}${old}`);
  } catch (problem) {
    if (!(problem instanceof Problem)) throw problem;
    if (ticker !== ticketTicker()) return;
    quoted = null;
    quoteMayChange = problem.mayPass;
    draw($("quote"), problem.message);
  }
  drawTicket();
}

/** The fields that the type of order has, the button's words, and what it comes to before commission. */
function drawTicket() {
  const buying = ticketAction() === "buy";
  for (const field of $("order-form").querySelectorAll("[data-types]")) {
    const { types, side: only } = field.dataset;
    field.disabled = field.hidden = !types.split(" ").includes(ticketType()) || (only ?? ticketAction()) !== ticketAction();
  }
  $("rehearse").hidden = ticketRests();
  draw($("type-note"), TYPE_NOTES[ticketType()]);
  draw($("place"), buying ? "Place buy order" : "Place sell order");
  const each = written("price") || written("stop") || (quoted?.asked === ticketTicker() ? quoted.price : "");
  const amount = $("quantity").value.trim();
  const known = isAmount(each) && isAmount(amount);
  const total = known ? rounded((units(each) * units(amount)) / 10n ** 8n, 8) : "";
  draw($("estimate"), known ? `${buying ? "Costs" : "Brings"} about ${usd(total)}, before commission.` : "");
}

function sayOrder(text, look) {
  draw($("order-result"), text, look);
}

/** The order in the ticket as it goes out, amounts as the text that was typed. What is undefined does not go out. */
function ticketOrder() {
  const size = written("quantity");
  const sized = size.startsWith("$") ? { notional: size.slice(1).trim() } : { quantity: size };
  const order = { ticker: ticketTicker(), action: ticketAction(), ...sized };
  const limit = written("price") || undefined;
  if (!ticketRests()) return JSON.stringify({ ...order, price: limit });
  const gain = written("take-profit");
  const loss = written("stop-loss");
  return JSON.stringify({
    ...order,
    order_type: ticketType(),
    limit_price: limit,
    stop_price: written("stop") || undefined,
    trail_percent: written("trail") || undefined,
    time_in_force: $("time-in-force").value,
    take_profit: gain ? { limit_price: gain } : undefined,
    stop_loss: loss ? { stop_price: loss } : undefined,
  });
}

/** The key under which `order` goes out: the one it had, while what became of it is not known. */
function keyFor(order) {
  const open = JSON.parse(sessionStorage.getItem("open-order") ?? "{}");
  if (open.order === order) return open.key;
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  const fresh = crypto.randomUUID?.() ?? [...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join("");
  sessionStorage.setItem("open-order", JSON.stringify({ order, key: fresh }));
  return fresh;
}

async function sendOrder(isRehearsal) {
  if (sending || !$("order-form").reportValidity()) return;
  sending = true;
  $("order-form").setAttribute("aria-busy", "true");
  for (const name of Object.values(INPUTS)) $(name).removeAttribute("aria-invalid");
  const order = ticketOrder();
  try {
    if (ticketRests()) {
      sayOrder(...orderSentence(await place("/api/v1/orders", order), JSON.parse(order)));
    } else {
      const trade = isRehearsal
        ? await ask("/api/v1/trade?dry_run=true", { method: "POST", body: order })
        : await place("/api/v1/trade", order);
      sayOrder(sentence(trade, isRehearsal), isRehearsal ? "" : "gain");
    }
    if (!isRehearsal) $("quantity").value = ""; // So that a second press does not buy twice.
    drawTicket();
  } catch (problem) {
    if (!(problem instanceof Problem)) throw problem;
    sayOrder(...refusal(problem, isRehearsal));
    for (const { field } of problem.document.errors ?? []) {
      if (field in INPUTS) $(INPUTS[field]).setAttribute("aria-invalid", "true");
    }
  } finally {
    sending = false;
    $("order-form").removeAttribute("aria-busy");
  }
  if (!isRehearsal) refresh();
}

/** Place `order`, again and again under one key while no clear answer comes; a Problem in the end. */
async function place(path, order) {
  const headers = { "Idempotency-Key": keyFor(order) };
  for (const pause of [...RETRY_AFTER_SECONDS, null]) {
    try {
      const placed = await ask(path, { method: "POST", body: order, headers });
      sessionStorage.removeItem("open-order");
      return placed;
    } catch (problem) {
      if (!problem.mayPass) sessionStorage.removeItem("open-order");
      if (!problem.mayPass || pause === null) throw problem;
      sayOrder(`${problem.message} Sending the order again under the same key…`);
      await sleep(pause);
    }
  }
}

function sentence(trade, isRehearsal) {
  const [verb, would] = trade.trade_type === "buy" ? ["Bought", "would buy"] : ["Sold", "would sell"];
  const what = `${quantity(trade.quantity)} ${trade.ticker} at ${price(trade.price)} USD for ${exactly(trade.total_amount)}`;
  const costs = direction(trade.commission) ? `, commission ${exactly(trade.commission)}` : "";
  const gained = trade.realized_pnl === null ? "" : ` Profit: ${shown(trade.realized_pnl, 2, 8, "+")} USD.`;
  if (isRehearsal) return `This ${would} ${what}${costs}.${gained} Cash after it: ${exactly(trade.cash_balance)}. Nothing has been booked.`;
  if (trade.replayed) return `Booked already, as trade ${trade.id}: ${verb.toLowerCase()} ${what}${costs}. It is booked once.`;
  return `${verb} ${what}${costs}.${gained} Cash: ${exactly(trade.cash_balance)}. Trade ${trade.id}.`;
}

/** What to say about an order that may wait, and how it should look. */
function orderSentence(order, { take_profit: gain, stop_loss: loss }) {
  const what = `${order.action} ${quantity(order.quantity)} ${order.ticker}`;
  if (order.replayed) return [`Placed already, as order ${order.id}: ${what}. It is ${order.status}, and placed once.`, "gain"];
  if (order.status === "filled") return [`Order ${order.id} was filled at once, as trade ${order.trade_id}: ${what} at ${exactly(order.price)}.`, "gain"];
  if (order.status !== "open") return [`Order ${order.id} was ${order.status}. ${order.reason ?? ""}`, "loss"];
  const held = direction(order.reserved_cash) ? ` ${exactly(order.reserved_cash)} are held back for it.` : "";
  const brought = [gain && "take-profit", loss && "stop-loss"].filter(Boolean).join(" and ");
  return [`Order ${order.id} waits: ${what}.${held}${brought ? ` When it is filled, its ${brought} will wait.` : ""}`, "gain"];
}

/** Cancel an order and what hangs on it, or all. */
async function cancel(order) {
  if (canceling) return;
  canceling = true;
  try {
    if (order) {
      await ask(`/api/v1/orders/${order.id}`, { method: "DELETE" });
      const legs = seen.orders.filter((other) => other.parent_id === order.id && order.action === "buy").length;
      draw($("orders-result"), `Order ${order.id} is canceled${legs ? `, and the ${legs === 1 ? "sale" : "sales"} that hung on it` : ""}.`);
    } else {
      const { canceled } = await ask("/api/v1/orders", { method: "DELETE" });
      draw($("orders-result"), canceled.length === 1 ? "1 order is canceled." : `${canceled.length} orders are canceled.`);
    }
  } catch (problem) {
    if (!(problem instanceof Problem)) throw problem;
    draw($("orders-result"), problem.message + (problem.isAway ? " Whether it was canceled is not known: see below, or try again." : ""), "loss");
  } finally {
    canceling = false;
  }
  await refresh();
}

/** What to say about an order that was not taken, and how it should look. */
function refusal(problem, isRehearsal) {
  const isOpen = problem.isAway && problem.code !== "price_unavailable" && !isRehearsal;
  const advice = isOpen
    ? " Whether the order was booked is not known. Place it again, unchanged: it goes out under the same key and is booked once at the most."
    : "";
  return [problem.message + advice, "loss"];
}

/* ---------------------------------------------------------------------------------- Sample market */

function drawMarket() {
  const { market } = seen;
  const stopped = market?.clock === "manual";
  $("clock").hidden = !market;
  const tickers = [...new Set([...(market?.tickers ?? []), ...seen.portfolio.holdings.map((holding) => holding.ticker)])];
  const options = $("tickers").options;
  if (tickers.join() !== [...options].map((option) => option.value).join()) {
    $("tickers").replaceChildren(...tickers.map((ticker) => new Option(ticker, ticker)));
  }
  if (!market) return;
  draw($("clock-now"), `${clockTime(market.now).slice(0, 16)} UTC`);
  draw($("clock-state"), stopped ? "stopped" : "running");
  draw($("clock-toggle"), stopped ? "Let it run" : "Stop the clock");
  $("clock").querySelectorAll(".step").forEach((button) => { button.disabled = !stopped; });
  const date = $("clock-at");
  date.min = day(market.first_bar);
  date.max = day(market.last_bar);
  if (!date.value) date.value = day(market.now);
  const pins = Object.entries(market.pins ?? {}).map(([ticker, pinned]) => `${ticker} ${price(pinned)}`);
  draw($("pins"), pins.length ? `Pinned prices, USD: ${pins.join(", ")}` : "");
}

async function control(path, method, body) {
  try {
    await ask(`/api/v1/market/${path}`, { method, body: JSON.stringify(body) });
    draw($("clock-result"), "");
  } catch (problem) {
    if (!(problem instanceof Problem)) throw problem;
    draw($("clock-result"), problem.message, "loss");
  }
  await refresh();
}

/* ---------------------------------------------------------------------------------------- Account */

/** Show one of the page's three faces. */
function show(face) {
  for (const one of FACES) $(one).hidden = one !== face;
  $("sign-out").hidden = !key;
  fitCharts();
}

async function signIn(text) {
  $("sign-in-problem").textContent = "";
  if (!/^[!-~]{1,255}$/.test(text)) {
    $("sign-in-problem").textContent = "A key has printable ASCII characters only, and no spaces.";
    return;
  }
  forget();
  key = text;
  sessionStorage.setItem("key", key);
  await refresh();
  const face = FACES.find((one) => !$(one).hidden);
  if (face !== "sign-in") $(face).querySelector("h2").focus({ preventScroll: true });
}

/** Only the server knows whether it has the test user, and it tells whoever has the key: so try it. */
async function useTestAccount() {
  await signIn(TEST_KEY);
  if (key) return;
  draw($("sign-in-problem"), "This server has no test account: only one that keeps its accounts in its own file does, " +
    "and never one in public. Ask whoever runs it for a key.");
}

/** Leave nothing of an account on the page or in the tab. */
function forget() {
  key = null;
  sessionStorage.clear();
  Object.assign(seen, {
    portfolio: null, market: null, updated: "", run: 1, shownRun: null, cursors: [null], nextCursor: null, historyOf: "",
    orders: [], longRun: null, isAdmins: false,
  });
  closeChart();
  plot?.destroy();
  plot = null;
  curvePoints = [];
  quoted = null;
  for (const id of ["holdings-rows", "orders-rows", "trades-rows", "run-select", "summary", "tickers", "accounts-rows"]) $(id).replaceChildren();
  for (const id of ["order-form", "start-over-form", "clock-form", "sign-in-form", "account-form"]) $(id).reset();
  for (const id of ["updated", "order-result", "orders-count", "orders-result", "start-over-result", "clock-result"]) draw($(id), "");
  for (const id of ["csv-result", "readout", "accounts-count", "accounts-result"]) draw($(id), "");
  for (const id of ["equity", "change", "cash", "market-value", "cost", "unrealized", "realized", "total"]) draw($(id), "");
  askToStartOver(false);
  askFirst(null);
  showNewKey("");
  drawTicket();
  drawSources();
}

function signOut(reason = "") {
  forget();
  show("sign-in");
  $("sign-in-problem").textContent = reason;
  $("key").focus();
}

function askToStartOver(isAsking) {
  $("start-over-form").hidden = !isAsking;
  $("start-over").setAttribute("aria-expanded", String(isAsking));
}

async function startOver() {
  const cash = $("start-cash").value.trim();
  try {
    await ask("/api/v1/account/reset", { method: "POST", body: JSON.stringify(cash ? { cash } : {}) });
    askToStartOver(false);
    $("start-over-form").reset();
    $("start-over").focus();
    Object.assign(seen, { shownRun: null, cursors: [null] });
    draw($("start-over-result"), "A new run has begun.");
  } catch (problem) {
    if (!(problem instanceof Problem)) throw problem;
    const advice = problem.isAway ? " Look at the run’s number before you try again." : "";
    draw($("start-over-result"), problem.message + advice, "loss");
  }
  await refresh();
}

async function downloadCsv() {
  const run = seen.shownRun;
  try {
    const [response, text] = await fetched(`/api/v1/trades.csv${run ? `?run=${run}` : ""}`, { seconds: CSV_SECONDS });
    if (!response.ok) throw new Problem(parseExactly(text).detail ?? `The server answered ${response.status}.`, response.status);
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: "text/csv;charset=utf-8" }));
    link.download = `trades-run-${run ?? seen.run}.csv`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
    draw($("csv-result"), "");
  } catch (problem) {
    draw($("csv-result"), problem instanceof Problem ? problem.message : "The download failed.", "loss");
  }
}

/* --------------------------------------------------------------------------------------- Accounts
   For whoever runs the server. A new key is on the page until it is put away, and nowhere else. */

const ACCOUNT_COLUMNS = [
  ["th", (cell, a) => draw(cell, a.email)],
  ["td", (cell, a) => draw(cell, a.user_id)],
  ["td", (cell, a) => drawNumber(cell, a.cash_balance, money)],
  ["td", (cell, a) => draw(cell, day(a.created_at), "", clockTime(a.created_at) + " UTC")],
  ["td", (cell, a) => draw(cell, a.closed_at ? day(a.closed_at) : "", "", a.closed_at ? clockTime(a.closed_at) + " UTC" : "")],
  ["td", (cell, a) => (a.closed_at ? draw(cell, "") : drawButton(cell, "New key…", `New key for ${a.email}…`, () => askFirst({
    question: `Give ${a.email} a new key? The old one is refused from then on.`,
    yes: "Yes, make a new key",
    act: () => manage("POST", `/${a.user_id}/rotate-key`, `${a.email} has a new key.`),
  })))],
  ["td", (cell, a) => (a.closed_at ? draw(cell, "") : drawButton(cell, "Close…", `Close ${a.email}…`, () => askFirst({
    question: `Close the account of ${a.email}? Its key is refused from then on, its trades stay. This cannot be undone.`,
    yes: "Yes, close it",
    act: () => manage("DELETE", `/${a.user_id}`, `The account of ${a.email} is closed.`),
  })))],
];

let managing = false;
let asked = null; // What is asked before it is done, or null.

async function refreshAccounts(askedWith) {
  const { users } = await ask("/api/v1/users");
  if (key !== askedWith) return;
  seen.updated = timeOfDay();
  show("accounts");
  drawRows($("accounts-rows"), users, (user) => user.user_id, ACCOUNT_COLUMNS);
  draw($("accounts-count"), String(users.length));
  drawAges();
}

function askFirst(what) {
  asked = what;
  $("confirm-form").hidden = !what;
  draw($("confirm-question"), what?.question ?? "");
  draw($("confirm-yes"), what?.yes ?? "");
  if (what) $("confirm-no").focus();
}

function leaveIt() {
  askFirst(null);
  $("accounts-heading").focus();
}

async function addAccount() {
  const email = $("email").value.trim();
  const cash = $("account-cash").value.trim() || undefined;
  const isAdded = await manage("POST", "", `${email} has an account.`, { email, cash });
  if (isAdded) $("account-form").reset();
}

/** Change the accounts, say what came of it, and show the key if there is a new one; whether it was done. */
async function manage(method, path, done, body) {
  if (managing) return false;
  managing = true;
  const askedWith = key;
  showNewKey("");
  try {
    const answer = await ask(`/api/v1/users${path}`, { method, body: body && JSON.stringify(body) });
    if (key !== askedWith) return false;
    draw($("accounts-result"), done, "gain");
    showNewKey(answer.api_key ?? "");
    return true;
  } catch (problem) {
    if (!(problem instanceof Problem)) throw problem;
    const advice = problem.isAway ? " Whether it was done is not known: see below. Where a key was lost, make a new one." : "";
    if (key === askedWith) draw($("accounts-result"), problem.message + advice, "loss");
    return false;
  } finally {
    managing = false;
    refresh();
  }
}

function showNewKey(text) {
  $("new-key").hidden = !text;
  draw($("new-key-text"), text);
  draw($("copy-result"), "");
  if (text) $("copy-key").focus();
}

/** Copy the key; where the browser forbids it, as it does without HTTPS, select it for whoever presses Ctrl+C. */
async function copyKey() {
  try {
    await navigator.clipboard.writeText($("new-key-text").textContent);
    draw($("copy-result"), "Copied.");
  } catch {
    getSelection().selectAllChildren($("new-key-text"));
    draw($("copy-result"), "Selected: press Ctrl+C or ⌘C.");
  }
}

/* ------------------------------------------------------------------------------------------ Start */

function onSubmit(id, act) {
  $(id).addEventListener("submit", (event) => {
    event.preventDefault();
    act();
  });
}

function onClick(id, act) {
  $(id).addEventListener("click", act);
}

function start() {
  onSubmit("sign-in-form", () => signIn($("key").value.trim()));
  onClick("use-test-key", useTestAccount);
  onClick("sign-out", () => signOut());

  let typing = 0;
  onSubmit("order-form", () => sendOrder(false));
  onClick("rehearse", () => sendOrder(true));
  onClick("cancel-all", () => seen.orders.length && cancel());
  onClick("chart-close", closeChart);
  $("order-form").addEventListener("input", (event) => {
    drawTicket();
    event.target.removeAttribute("aria-invalid");
    if (event.target !== $("ticker")) return;
    clearTimeout(typing);
    typing = setTimeout(refreshQuote, 600);
  });

  onClick("newer", () => seen.cursors.length > 1 && turnTo(seen.cursors.slice(0, -1)));
  onClick("older", () => seen.nextCursor && turnTo([...seen.cursors, seen.nextCursor]));
  $("run-select").addEventListener("change", (event) => showRun(Number(event.target.value)));
  onClick("csv", downloadCsv);

  onClick("start-over", () => {
    const isAsking = $("start-over-form").hidden;
    askToStartOver(isAsking);
    draw($("start-over-result"), "");
    if (isAsking) $("keep-going").focus();
  });
  onClick("keep-going", () => {
    askToStartOver(false);
    $("start-over").focus();
  });
  onSubmit("start-over-form", startOver);

  onSubmit("account-form", addAccount);
  onSubmit("confirm-form", () => {
    const { act } = asked;
    leaveIt();
    act();
  });
  onClick("confirm-no", leaveIt);
  onClick("copy-key", copyKey);
  onClick("hide-key", () => {
    showNewKey("");
    $("accounts-heading").focus();
  });

  onClick("clock-toggle", () => control("clock", "PUT", { at: seen.market.clock === "manual" ? null : seen.market.now }));
  onSubmit("clock-form", () => control("clock", "PUT", { at: `${$("clock-at").value}T00:00:00Z` }));
  $("clock").querySelectorAll(".step").forEach((button) => {
    button.addEventListener("click", () => control("advance", "POST", { bars: Number(button.value) }));
  });

  const sizes = new ResizeObserver(fitCharts);
  for (const id of ["curve", "chart-plot"]) sizes.observe($(id));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => [plot, chartPlot].forEach((drawn) => drawn?.redraw()));
  document.addEventListener("visibilitychange", () => document.hidden || refresh());
  setInterval(() => document.hidden || refreshing || refresh(), REFRESH_SECONDS * 1000);
  setInterval(() => document.hidden || drawAges(), 1000);

  $("sign-out").hidden = !key;
  $("sign-in").hidden = Boolean(key);
  $("test-account").hidden = !["127.0.0.1", "localhost", "[::1]", "0.0.0.0"].includes(location.hostname);
  drawTicket();
  refresh();
}

start();
