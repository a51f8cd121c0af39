"""The token bucket once more, in Lua: what Redis runs for an ask. `quota.bucket` says what it means; the tests compare the two.

Asks for slots of a concurrency limit (`quota.slots`) are carried out by the same script (`quota.slots_script`).

`KEYS[1]` is the bucket, `KEYS[2]` the record of when this store began (both with one hash tag, so that Redis Cluster has them in one
place); `ARGV[1]` is the `Ask` as a msgpack array, `ARGV[2]` is `full` or `empty`: what buckets hold in a store that has no record yet.
The answer is the `Reply` as a msgpack array.

The store's beginning is known without trusting the connection: the record holds the server's run id. When it is another than the one
that the script reads from `INFO server`, the server was restarted or another one took over, and what was spent last may be missing: the
store begins anew, and every bucket of an earlier beginning is treated as if it were not on record. Buckets that are not on record fill
from one lease after the beginning, since lessees may hold tokens of before until then.

The server's own clock is used (`TIME`), held to what lessees measured (`quota.clock`): the record has the store's beginning and how far
its time is from the wall clock's. That and writing in one script needs replication by effects, which Redis has by itself since 5.0.
"""

from __future__ import annotations

import hashlib
from typing import Final

from quota.bucket import CHARGES_KEPT, ROOMS, WINDOW
from quota.clock import BEYOND, FORGETFUL, SLACK
from quota.slots_script import SLOTS, SLOTS_MODEL

_BUCKET: Final = r"""
local floor, ceil, min, max = math.floor, math.ceil, math.min, math.max
local SEQ, GENERATION, OUT, SPENT, RETURNED, UNTIL, KEEP, LENT, ROOM, REPLY, CHARGED = 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12

local function outstanding(bucket)
  local sum = 0
  for _, holder in ipairs(bucket.holders) do sum = sum + holder[OUT] end
  return sum
end

local function microseconds(tokens, rate)
  if tokens <= 0 or rate <= 0 then return 0 end
  return ceil(tokens / rate * 1e6)
end

local function narrow(bucket, room)
  for _, holder in ipairs(bucket.holders) do
    for _, entry in ipairs(holder[ROOM]) do
      entry[2] = max(0, min(entry[2], room))
      room = room - entry[2]
    end
  end
end

local function advance(bucket, rate, burst, now)
  while true do
    local first = nil
    for _, holder in ipairs(bucket.holders) do
      if holder[OUT] > 0 and holder[UNTIL] <= now and (first == nil or holder[UNTIL] < first) then first = holder[UNTIL] end
    end
    local at = now
    if first ~= nil then at = max(bucket.stamp, first) end
    local cap = burst - outstanding(bucket)
    bucket.level = min(bucket.level + (at - bucket.stamp) * rate / 1e6, max(0, cap))
    bucket.stamp = at
    narrow(bucket, cap - bucket.level)
    for _, holder in ipairs(bucket.holders) do
      if holder[OUT] > 0 and holder[UNTIL] <= at then holder[OUT] = 0 end
    end
    if first == nil then break end
  end
  local kept = {}
  for _, holder in ipairs(bucket.holders) do
    if holder[UNTIL] <= now then
      holder[GENERATION], holder[SPENT], holder[RETURNED], holder[LENT] = 0, 0, 0, 0
    end
    if holder[UNTIL] > now or holder[KEEP] > now then kept[#kept + 1] = holder end
  end
  bucket.holders = kept
end

local function refund(bucket, holder, seq, tokens)
  for _, entry in ipairs(holder[ROOM]) do
    if entry[1] == seq then
      local back = max(0, min(tokens, entry[2]))
      entry[2] = entry[2] - back
      bucket.level = bucket.level + back
    end
  end
end

local function settle(bucket, holder, ask)
  if ask.acked < holder[SEQ] then
    local lost = min(holder[LENT], holder[OUT])
    holder[OUT] = holder[OUT] - lost
    bucket.level = bucket.level + lost
    for _, entry in ipairs(holder[ROOM]) do
      if entry[1] == holder[SEQ] then
        bucket.level = bucket.level + entry[2]
        entry[2] = 0
      end
    end
  end
  if holder[GENERATION] ~= 0 and holder[GENERATION] == ask.generation then
    local returned = max(0, min(ask.returned - holder[RETURNED], holder[OUT]))
    holder[OUT] = holder[OUT] - returned
    bucket.level = bucket.level + returned
    holder[OUT] = holder[OUT] - max(0, min(ask.spent - holder[SPENT], holder[OUT]))
    holder[SPENT] = ask.spent
    holder[RETURNED] = ask.returned
  else
    holder[OUT], holder[SPENT], holder[RETURNED] = 0, 0, 0
    holder[GENERATION] = ask.seq
  end
end

local function full(bucket, ask)
  if bucket.ends > 0 then
    if bucket.level < ask.burst then return bucket.ends - bucket.stamp end
    return 0
  end
  return microseconds(ask.burst - bucket.level, ask.rate)
end

local function turn(bucket, ask, now)
  if #ask.windows == 0 then
    bucket.ends, bucket.size = 0, 0
    return
  end
  if bucket.ends == 0 then
    bucket.level = min(bucket.level, ask.burst - outstanding(bucket))
  elseif now < bucket.ends then
    bucket.level = bucket.level + (ask.burst - bucket.size)
  else
    bucket.level = ask.burst
    for _, holder in ipairs(bucket.holders) do
      holder[OUT], holder[UNTIL], holder[ROOM] = 0, min(holder[UNTIL], now), {}
    end
  end
  bucket.size = ask.burst
  bucket.ends = ask.windows[2]
  if now >= bucket.ends then bucket.ends = ask.windows[3] end
end

local function charge(bucket, holder, ask)
  local before = holder[CHARGED] or 0
  local due = ask.charged - max(before, ask.settled)
  holder[CHARGED] = max(before, ask.charged)
  if due <= 0 then return 0 end
  local after = bucket.level - due
  bucket.level = max(after, min(bucket.level, -ask.debt))
  return floor(bucket.level - after)
end

local function reborn(level, holders, bucket, burst)
  if level < 0 then bucket.level = min(bucket.level, burst) + level end
  for _, before in ipairs(holders) do
    if (before[CHARGED] or 0) > 0 then
      bucket.holders[#bucket.holders + 1] =
        {before[1], 0, 0, 0, 0, 0, 0, bucket.stamp + @CHARGES_KEPT@, 0, {}, {}, before[CHARGED]}
    end
  end
end

local function grant(bucket, ask)
  local granted = 0
  for _, need in ipairs(ask.needs) do
    local tokens, count = need[1], need[2]
    local fitting = max(0, min(count, floor(bucket.level / tokens)))
    if fitting > 0 then
      granted = granted + fitting * tokens
      bucket.level = max(0, bucket.level - fitting * tokens)
    end
    if fitting < count then
      if bucket.ends > 0 and tokens <= ask.burst then return granted, bucket.ends - bucket.stamp end
      if tokens > ask.burst or ask.rate <= 0 then return granted, -1 end
      return granted, max(1, microseconds(tokens - bucket.level, ask.rate))
    end
  end
  return granted, 0
end

local function lend(bucket, holder, ask, seen)
  local sharers = max(seen, ask.sharers)
  if ask.extra <= 0 or ask.burst < 2 * sharers then return 0 end
  local share = floor(ask.burst / (2 * sharers)) - holder[OUT]
  return max(0, min(ask.extra, share, floor(bucket.level / sharers)))
end

local function active(bucket, now)
  local count = 0
  for _, holder in ipairs(bucket.holders) do
    if holder[UNTIL] > now then count = count + 1 end
  end
  return max(1, count)
end

local function apply(bucket, ask, now)
  now = max(now, bucket.stamp)
  if #ask.windows > 0 and (now < ask.windows[1] or now >= ask.windows[3]) then
    return {ask.seq, 0, 0, 0, 0, 0, 0, 0, 0, now, true, 0, -1}
  end
  if #ask.windows > 0 or bucket.ends > 0 then turn(bucket, ask, now) end
  advance(bucket, ask.rate, ask.burst, now)
  if ask.target >= 0 then
    local before, out = floor(bucket.level), outstanding(bucket)
    bucket.level = max(0, min(ask.target, ask.burst - out))
    narrow(bucket, 0)
    return {ask.seq, 0, before, 0, bucket.level, 0, full(bucket, ask), out, active(bucket, now), now, false, 0, bucket.ends}
  end
  local holder = nil
  for _, each in ipairs(bucket.holders) do
    if each[1] == ask.holder then holder = each end
  end
  if ask.peek then
    local level = bucket.level
    local granted, wait = grant(bucket, ask)
    bucket.level = level
    local generation, out = 0, 0
    if holder then generation, out = holder[GENERATION], holder[OUT] end
    return {ask.seq, generation, granted, 0, floor(level), wait, full(bucket, ask),
            outstanding(bucket) - out, active(bucket, now), now, false, 0, bucket.ends, 0}
  end
  if holder and ask.seq <= holder[SEQ] then
    if ask.seq == holder[SEQ] and #holder[REPLY] > 0 then return holder[REPLY] end
    return {ask.seq, 0, 0, 0, floor(bucket.level), 0, 0, 0, 0, now, true, 0, 0, 0}
  end
  if not holder then
    holder = {ask.holder, 0, 0, 0, 0, 0, 0, 0, 0, {}, {}, 0}
    bucket.holders[#bucket.holders + 1] = holder
  end
  settle(bucket, holder, ask)
  local cap = ask.burst - outstanding(bucket)
  if bucket.level > cap + 1e-6 then
    bucket.level = max(0, cap)
    narrow(bucket, 0)
  end
  for _, each in ipairs(ask.refunds) do refund(bucket, holder, each[1], each[2]) end
  local forgiven = charge(bucket, holder, ask)
  local granted, wait = grant(bucket, ask)
  if granted > 0 then
    local rooms = holder[ROOM]
    rooms[#rooms + 1] = {ask.seq, granted}
    if #rooms > @ROOMS@ then table.remove(rooms, 1) end
  end
  if #ask.needs > 0 or ask.extra > 0 then
    holder[UNTIL] = now + ask.ttl
    if bucket.ends > 0 then holder[UNTIL] = min(holder[UNTIL], bucket.ends) end
  elseif holder[OUT] == 0 then
    holder[UNTIL] = now
  end
  if holder[CHARGED] > 0 then
    holder[KEEP] = max(now, holder[UNTIL]) + @CHARGES_KEPT@
  else
    holder[KEEP] = max(now, holder[UNTIL]) + @WINDOW@
  end
  local sharers = active(bucket, now)
  holder[LENT] = 0
  if wait == 0 then holder[LENT] = lend(bucket, holder, ask, sharers) end
  holder[OUT] = holder[OUT] + holder[LENT]
  bucket.level = bucket.level - holder[LENT]
  holder[SEQ] = ask.seq
  holder[REPLY] = {ask.seq, holder[GENERATION], granted, holder[LENT], floor(bucket.level), wait,
                   full(bucket, ask), outstanding(bucket) - holder[OUT], sharers, now, false, 0, bucket.ends, forgiven}
  return holder[REPLY]
end

local function forget_at(bucket, rate, burst)
  if rate <= 0 and bucket.ends == 0 then return nil end
  local till, keep = bucket.stamp, bucket.stamp
  for _, holder in ipairs(bucket.holders) do
    till, keep = max(till, holder[UNTIL]), max(keep, holder[KEEP])
  end
  if bucket.ends > 0 then return max(keep, bucket.ends) end
  return max(keep, till + ceil((burst - min(bucket.level, burst)) / rate * 1e6))
end
"""

_CLOCK: Final = r"""
local function tell(clock, ask, wall)
  local now = wall + clock.ahead
  if ask.peek or ask.era ~= clock.era or ask.seen <= 0 then return now end
  local least = ask.seen + ask.least - floor(ask.least / 1024)
  local most = ask.seen + ask.most + floor(ask.most / 1024)
  if now < least then
    clock.ahead, clock.lost, clock.era = clock.ahead + least - now, clock.lost + least - now, clock.era + 1
    return least
  end
  if now > most + @SLACK@ then
    clock.ahead, clock.era = clock.ahead - (now - least), clock.era + 1
    if now - most > @FORGETFUL@ then clock.since = most end
    return least
  end
  return now
end

local function catch_up(bucket, clock, now)
  bucket.stamp = max(bucket.stamp, min(now, bucket.stamp + clock.lost - bucket.lost))
  if bucket.stamp > now + @BEYOND@ and (bucket.ends or 0) == 0 then bucket.stamp = now end
  bucket.lost = clock.lost
end

local function read(packed)
  local fields = cmsgpack.unpack(packed)
  if fields[1] == 'slots' then return slots.read(fields) end
  return {holder = fields[1], seq = fields[2], acked = fields[3], generation = fields[4], spent = fields[5], returned = fields[6],
          refunds = fields[7], needs = fields[8], extra = fields[9], sharers = fields[10], ttl = fields[11], rate = fields[12],
          burst = fields[13], peek = fields[14], era = fields[15], seen = fields[16], least = fields[17], most = fields[18],
          windows = fields[19], target = fields[20], charged = fields[21], settled = fields[22], debt = fields[23]}
end
"""

_STORE: Final = r"""
local ask = read(ARGV[1])
local time = redis.call('TIME')
local wall = time[1] * 1000000 + time[2]

local run = string.match(redis.call('INFO', 'server'), 'run_id:(%x+)')
if not run then return redis.error_reply('TOLLHOUSE the server does not tell its run id') end
local record = redis.call('GET', KEYS[2])
local clock = nil
if record then
  local known, born, era, since, ahead, lost = string.match(record, '^(%x+):(%d+):(%d+):(%d+):(-?%d+):(%d+)$')
  if known == run then
    clock = {born = tonumber(born), era = tonumber(era), since = tonumber(since), ahead = tonumber(ahead), lost = tonumber(lost)}
  end
end
if not clock then
  clock = {born = wall, era = wall, since = wall, ahead = 0, lost = 0}
  if not record and ARGV[2] == 'full' then clock.born, clock.since = 1, 1 end
end
local now = tell(clock, ask, wall)
local kept = run .. string.format(':%.0f:%.0f:%.0f:%.0f:%.0f', clock.born, clock.era, clock.since, clock.ahead, clock.lost)
if kept ~= record then redis.call('SET', KEYS[2], kept) end
if ask.slots then return slots.serve(KEYS[1], clock, ask, now, @FORGETFUL@) end

local bucket, before = nil, nil
local saved = redis.call('GET', KEYS[1])
if saved then
  local readable, state = pcall(cmsgpack.unpack, saved)
  if not readable or type(state) ~= 'table' or type(state[2]) ~= 'number' or type(state[4]) ~= 'table' then
    return redis.error_reply('TOLLHOUSE ' .. KEYS[1] .. ' holds no bucket')
  end
  local ends, size = state[6] or 0, state[7] or 0
  if state[1] == clock.born then
    bucket = {level = state[2], stamp = state[3], holders = state[4], lost = state[5], ends = ends, size = size}
  elseif #ask.windows > 0 and ends > now then
    bucket = {level = state[2], stamp = min(state[3], now), holders = state[4], lost = clock.lost, ends = ends, size = size}
  end
  before = state
end
if not bucket and #ask.windows > 0 then
  bucket = {level = 0, stamp = now, holders = {}, lost = clock.lost, ends = 0, size = 0}
  local begin = ask.windows[1]
  if now >= ask.windows[2] then begin = ask.windows[2] end
  if begin >= clock.since then bucket.level = ask.burst end
elseif not bucket then
  local since = clock.since + ask.ttl
  bucket = {level = min(ask.burst, max(0, now - since) * ask.rate / 1e6), stamp = max(now, since), holders = {}, lost = clock.lost,
            ends = 0, size = 0}
  if before then reborn(before[2], before[4], bucket, ask.burst) end
end
catch_up(bucket, clock, now)
local reply = apply(bucket, ask, now)
if not ask.peek and not reply[11] then
  local state = cmsgpack.pack({clock.born, bucket.level, bucket.stamp, bucket.holders, bucket.lost, bucket.ends, bucket.size})
  local till = forget_at(bucket, ask.rate, ask.burst)
  if till then
    redis.call('SET', KEYS[1], state, 'PX', string.format('%.0f', ceil((max(1, till - now) + @FORGETFUL@) / 1000) + 1))
  else
    redis.call('SET', KEYS[1], state)
  end
end
local early = bucket.stamp - now
if early > 0 then
  if reply[6] > 0 then reply[6] = reply[6] + early end
  if reply[7] > 0 then reply[7] = reply[7] + early end
end
if not ask.peek and not reply[11] then reply[10] = now end
reply[12] = clock.era
return cmsgpack.pack(reply)
"""

_MODEL: Final = r"""
local state = cmsgpack.unpack(ARGV[1])
local ask = read(ARGV[2])
local bucket = {level = state[1], stamp = state[2], holders = state[3], ends = state[4], size = state[5]}
local reply = apply(bucket, ask, tonumber(ARGV[3]))
local changed = {bucket.level, bucket.stamp, bucket.holders, bucket.ends, bucket.size}
return cmsgpack.pack({reply, changed, forget_at(bucket, ask.rate, ask.burst) or -1})
"""

_CLOCK_MODEL: Final = r"""
local state = cmsgpack.unpack(ARGV[1])
local clock = {born = state[1], era = state[2], since = state[3], ahead = state[4], lost = state[5]}
local bucket = {stamp = state[6], lost = state[7]}
local now = tell(clock, read(ARGV[2]), tonumber(ARGV[3]))
catch_up(bucket, clock, now)
return cmsgpack.pack({now, {clock.born, clock.era, clock.since, clock.ahead, clock.lost, bucket.stamp, bucket.lost}})
"""

_NUMBERS: Final = {
    "@ROOMS@": ROOMS,
    "@CHARGES_KEPT@": CHARGES_KEPT,
    "@WINDOW@": WINDOW,
    "@SLACK@": SLACK,
    "@FORGETFUL@": FORGETFUL,
    "@BEYOND@": BEYOND,
}


def _filled(*parts: str) -> bytes:
    text = "".join(parts)
    for name, number in _NUMBERS.items():
        text = text.replace(name, str(number))
    return text.encode()


SCRIPT: Final = _filled(_BUCKET, SLOTS, _CLOCK, _STORE)
"""What Redis runs for an ask."""
DIGEST: Final = hashlib.sha1(SCRIPT, usedforsecurity=False).hexdigest().encode()
"""The name by which EVALSHA knows it."""
MODEL_SCRIPT: Final = _filled(_BUCKET, SLOTS, _CLOCK, _MODEL)
"""The same functions over a state and a time that are given (`ARGV`: state, ask, microseconds), so that they can be compared with
`quota.bucket` step by step. Not used in production."""
CLOCK_SCRIPT: Final = _filled(_BUCKET, SLOTS, _CLOCK, _CLOCK_MODEL)
"""As `MODEL_SCRIPT`, for `quota.clock`."""
SLOTS_SCRIPT: Final = _filled(SLOTS, SLOTS_MODEL)
"""As `MODEL_SCRIPT`, for `quota.slots`."""
