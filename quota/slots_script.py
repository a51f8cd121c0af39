"""Concurrency limits once more, in Lua: what Redis runs for a `SlotAsk`, as a part of `quota.script`. `quota.slots` says what it means; the
tests compare the two.

The record of a limit's slots is a msgpack array: when the store had begun, `closed`, `stamp`, `pressed`, `lost`, and the holders, each an
array of its name, `seq`, `out`, `busy`, `wanted`, `until`, `caller`, `weight`, `reserve` and the last answer.
"""

from __future__ import annotations

from typing import Final

from quota.slots import PRESSED, REMEMBERED

_FUNCTIONS: Final = r"""
local slots = {}
do
  local SEQ, OUT, BUSY, WANTED, UNTIL, CALLER, WEIGHT, RESERVE, REPLY = 2, 3, 4, 5, 6, 7, 8, 9, 10

  function slots.read(fields)
    return {slots = true, holder = fields[2], seq = fields[3], keep = fields[4], busy = fields[5], need = fields[6], extra = fields[7],
            refused = fields[8], sharers = fields[9], limit = fields[10], ttl = fields[11], strict = fields[12], caller = fields[13],
            weight = fields[14], reserve = fields[15], peek = fields[16], era = fields[17], seen = fields[18], least = fields[19],
            most = fields[20]}
  end

  local function outstanding(state)
    local sum = 0
    for _, holder in ipairs(state.holders) do sum = sum + holder[OUT] end
    return sum
  end

  local function active(state, now)
    local count = 0
    for _, holder in ipairs(state.holders) do
      if holder[UNTIL] > now then count = count + 1 end
    end
    return math.max(1, count)
  end

  local function free(state, ask, now)
    if now < state.closed then return 0 end
    local ordinary = 0
    if ask.reserve > 0 then
      for _, holder in ipairs(state.holders) do
        if holder[RESERVE] > 0 then ordinary = ordinary + holder[OUT] end
      end
    end
    return math.max(0, math.min(ask.limit - outstanding(state), ask.limit - ask.reserve - ordinary))
  end

  local function fill(wants, room)
    table.sort(wants, function(one, other) return one[1] / one[2] < other[1] / other[2] end)
    local weight, level = 0, 0
    for _, want in ipairs(wants) do weight = weight + want[2] end
    for _, want in ipairs(wants) do
      level = want[1] / want[2]
      if level * weight >= room then return room / weight end
      room = room - want[1]
      weight = weight - want[2]
    end
    return level
  end

  local function share(state, ask, holder)
    local wants, by, among, apart, total = {}, {}, {}, 0, 0
    for _, each in ipairs(state.holders) do
      if (each[RESERVE] > 0) ~= (holder[RESERVE] > 0) then
        apart = apart + each[OUT]
      elseif each[CALLER] == holder[CALLER] then
        total = total + each[OUT]
      end
      if (each[RESERVE] > 0) == (holder[RESERVE] > 0) and each[WANTED] > 0 then
        local want = by[each[CALLER]]
        if not want then
          want = {0, each[WEIGHT]}
          by[each[CALLER]] = want
          wants[#wants + 1] = want
        end
        want[1] = want[1] + each[WANTED]
        if each[CALLER] == holder[CALLER] then among[#among + 1] = {each[WANTED], 1} end
      end
    end
    local room = ask.limit
    if holder[RESERVE] > 0 then room = ask.limit - math.max(holder[RESERVE], apart) end
    local whole = 0
    for _, want in ipairs(wants) do whole = whole + want[2] end
    for _, want in ipairs(wants) do
      if want[1] * whole < room * want[2] then want[1] = want[1] + math.ceil(math.sqrt(want[1])) end
    end
    local mine = fill(wants, room) * holder[WEIGHT]
    local most, rest = math.min(holder[WANTED], fill(among, mine)), math.ceil(mine - 1e-6) - total
    if rest < 0 then return math.floor(most + 1e-6), rest end
    return math.max(1, math.ceil(most - 1e-6)), rest
  end

  local function reply_of(state, ask, holder, held, now)
    local most, busy, elsewhere = ask.limit, 0, outstanding(state)
    if holder then elsewhere = elsewhere - holder[OUT] end
    if holder and state.pressed > now then most = (share(state, ask, holder)) end
    for _, each in ipairs(state.holders) do busy = busy + each[BUSY] end
    return {ask.seq, held, free(state, ask, now), elsewhere, busy, most, state.pressed > now, active(state, now), now, false, 0}
  end

  function slots.apply(state, ask, now)
    now = math.max(now, state.stamp)
    local ceiling = now + ask.ttl
    local kept, holder = {}, nil
    for _, each in ipairs(state.holders) do
      each[UNTIL] = math.min(each[UNTIL], ceiling)
      local stays = true
      if each[UNTIL] <= now then
        each[OUT], each[BUSY], each[WANTED] = 0, 0, 0
        stays = each[UNTIL] + @REMEMBERED@ > now
      end
      if stays then kept[#kept + 1] = each end
      if stays and each[1] == ask.holder then holder = each end
    end
    state.holders = kept
    if ask.peek then
      local held = 0
      if holder then held = holder[OUT] end
      return reply_of(state, ask, holder, held, now)
    end
    if holder and ask.seq <= holder[SEQ] then
      if ask.seq == holder[SEQ] and #holder[REPLY] > 0 then return holder[REPLY] end
      return {ask.seq, 0, 0, 0, 0, 0, false, 0, now, true, 0}
    end
    if not holder then
      holder = {ask.holder, 0, 0, 0, 0, 0, ask.caller, 1, 0, {}}
      kept[#kept + 1] = holder
    end
    state.stamp = now
    local going_on = holder[UNTIL] > now or now < state.closed
    local others = outstanding(state) - holder[OUT]
    local busy = 0
    if going_on or not ask.strict then busy = ask.busy end
    local held = math.max(0, math.min(math.max(ask.keep, busy), ask.limit - others))
    holder[OUT] = math.max(held, busy)
    holder[BUSY] = ask.busy
    holder[WANTED] = math.min(math.max(ask.limit, ask.busy), ask.busy + ask.need + ask.refused)
    holder[CALLER], holder[WEIGHT], holder[RESERVE] = ask.caller, ask.weight, ask.reserve
    holder[UNTIL] = now
    if holder[OUT] > 0 or ask.need > 0 or ask.extra > 0 then holder[UNTIL] = now + ask.ttl end
    if ask.refused > 0 then state.pressed = now + @PRESSED@ end
    local available = free(state, ask, now)
    local room = available
    if state.pressed > now then
      local most, rest = share(state, ask, holder)
      room = math.max(0, math.min(available, most - holder[OUT], rest))
    end
    local granted = math.min(ask.need, room)
    if granted < ask.need then
      state.pressed = now + @PRESSED@
    elseif state.pressed <= now and ask.extra > 0 then
      local sharers = math.max(ask.sharers, active(state, now))
      granted = granted + math.max(0, math.min(ask.extra, math.floor((available - granted) / (sharers + 1))))
    end
    holder[OUT] = holder[OUT] + granted
    holder[SEQ] = ask.seq
    holder[REPLY] = reply_of(state, ask, holder, held + granted, now)
    return holder[REPLY]
  end

  function slots.forget_at(state)
    local till = math.max(state.closed, state.stamp)
    for _, holder in ipairs(state.holders) do till = math.max(till, holder[UNTIL] + @REMEMBERED@) end
    return till
  end

  function slots.caught_up(state, lost)
    for _, holder in ipairs(state.holders) do
      if holder[UNTIL] ~= 0 then holder[UNTIL] = holder[UNTIL] + lost - state.lost end
    end
    state.lost = lost
  end

  function slots.serve(key, clock, ask, now, outlives)
    local state = nil
    local saved = redis.call('GET', key)
    if saved then
      local readable, kept = pcall(cmsgpack.unpack, saved)
      if not readable or type(kept) ~= 'table' or type(kept[6]) ~= 'table' then
        return redis.error_reply('TOLLHOUSE ' .. key .. ' holds no bucket')
      end
      if kept[1] == clock.born then
        state = {closed = kept[2], stamp = kept[3], pressed = kept[4], lost = kept[5], holders = kept[6]}
      end
    end
    if not state then state = {closed = clock.since + ask.ttl, stamp = now, pressed = 0, lost = clock.lost, holders = {}} end
    slots.caught_up(state, clock.lost)
    local reply = slots.apply(state, ask, now)
    if not ask.peek and not reply[10] then
      local till = slots.forget_at(state)
      redis.call('SET', key, cmsgpack.pack({clock.born, state.closed, state.stamp, state.pressed, state.lost, state.holders}), 'PX',
                 string.format('%.0f', math.ceil((math.max(1, till - now) + outlives) / 1000) + 1))
      reply[9] = now
    end
    reply[11] = clock.era
    return cmsgpack.pack(reply)
  end
end
"""

SLOTS: Final = _FUNCTIONS.replace("@REMEMBERED@", str(REMEMBERED)).replace("@PRESSED@", str(PRESSED))
"""A table `slots` of functions: `read` an ask's fields, `apply`, `forget_at`, `caught_up`, and `serve` an ask from a key."""

SLOTS_MODEL: Final = r"""
local kept = cmsgpack.unpack(ARGV[1])
local ask = slots.read(cmsgpack.unpack(ARGV[2]))
local state = {closed = kept[1], stamp = kept[2], pressed = kept[3], lost = kept[4], holders = kept[5]}
slots.caught_up(state, tonumber(ARGV[4]))
local reply = slots.apply(state, ask, tonumber(ARGV[3]))
return cmsgpack.pack({reply, {state.closed, state.stamp, state.pressed, state.lost, state.holders}, slots.forget_at(state)})
"""
"""Over a state and a time that are given, for the tests."""
