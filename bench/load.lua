-- Endless requests of one kind, which the environment names: ASK is a path to GET, or TRADE.
-- USERS is how many accounts take turns at random; FIRST the number of the first of them.

local path, users, first = os.getenv("ASK"), tonumber(os.getenv("USERS")), tonumber(os.getenv("FIRST"))
local threads, count = 0, 0

function setup(thread)
  threads = threads + 1
  thread:set("number", threads)
end

function init()
  local noise = io.open("/dev/urandom"):read(6)
  local seed = 0
  for i = 1, #noise do seed = seed * 256 + noise:byte(i) end
  math.randomseed(seed)
  prefix = string.format("%x-%d-", seed, number)
end

function request()
  count = count + 1
  local headers = {Authorization = "Bearer bench-key-" .. first + math.random(users) - 1}
  if path ~= "TRADE" then return wrk.format("GET", path, headers) end
  headers["Content-Type"] = "application/json"
  headers["Idempotency-Key"] = prefix .. count
  local action = math.random(2) == 1 and "buy" or "sell"
  local order = '{"ticker": "T%04d", "action": "%s", "quantity": "1.5", "price": 100.25}'
  return wrk.format("POST", "/api/v1/trade", headers, order:format(math.random(20), action))
end

function done(summary, latency)
  local e = summary.errors
  local failed = e.status + e.connect + e.read + e.write + e.timeout
  print(string.format('RESULT {"count": %d, "failed": %d, "seconds": %f, "p50": %f, "p99": %f}', summary.requests,
    failed, summary.duration / 1e6, latency:percentile(50) / 1e3, latency:percentile(99) / 1e3))
end
