"""A concurrency limit: how many requests may be in progress at once, who holds the slots, and what a `SlotAsk` does to them.

Pure: slots, an ask and the time go in, a reply comes out and the slots have changed. `quota.slots_script` is this module once more, in
Lua, for Redis; the tests compare the two step by step.

A holder (a lessee, for one caller) has slots on lease, and begins no more requests than it has slots. An ask says how many it *keeps* of
those that it has, so that what it does not name comes back, and how many more it *needs* for requests that wait, or would like as *extra*.
It keeps to what it named until it hears the answer. So what is on lease is never less than what may be in progress, whatever gets lost,
comes late or comes twice; new slots are lent only as long as all that is on lease stays within the limit.

A lease that ends at the store has ended for its holder before, by more than half a second (`USABLE`). Requests that go on all the same are
counted again by the holder's next ask (`busy`), also beyond the limit: then nothing is lent until there is room. With `strict`, whoever
was late gets what is left, and cuts off the others.

Under pressure (somebody was refused within `PRESSED`) each holder is told how many it may hold at most: the weighted max-min share of the
limit by what everybody wants. A holder above its share begins nothing new and gives back what becomes free; a slot in use is not taken
from anybody.

Times are whole microseconds on the store's clock.
"""

from __future__ import annotations

import math
from typing import Final

import msgspec

TTL: Final = 10_000_000
"""How long a lease of slots lasts."""
USABLE: Final = 0.94
"""The part of it that its holder uses, from when it sent the ask: the rest is for clocks that go wrong, or are set by half a second."""
REMEMBERED: Final = 5_000_000
"""How long a holder is remembered after its last lease, so that an ask that comes late is known to be old."""
PRESSED: Final = 2_000_000
"""How long a refusal counts as pressure."""


class SlotAsk(msgspec.Struct, frozen=True, array_like=True, tag="slots"):
    """What a holder wants of one limit's slots. On the wire an array in this order: the script reads it by index."""

    holder: str
    seq: int
    """Above all earlier ones of this holder, from 1."""
    keep: int
    """Slots of its lease that it goes on holding; the rest is given back."""
    busy: int
    """Requests in progress."""
    need: int
    """More slots, for requests that wait."""
    extra: int
    """More slots beyond these, if there are plenty."""
    refused: int
    """Requests that were refused without asking, since the last ask."""
    sharers: int
    """How many lessees there are, as far as the asker knows."""
    limit: int
    """Slots in all."""
    ttl: int
    """Microseconds that a lease lasts."""
    strict: bool = False
    """What goes on after its lease is not counted beyond the limit: the holder ends it."""
    caller: str = ""
    """Whose share it is taken from; empty where callers have none."""
    weight: int = 1
    reserve: int = 0
    """Slots that are held back from this caller and all others that say so."""
    peek: bool = False
    """Look, and change nothing."""
    era: int = 0
    seen: int = 0
    least: int = 0
    most: int = 0
    """As in `quota.bucket.Ask`."""


class SlotReply(msgspec.Struct, frozen=True, array_like=True):
    """What came of an ask."""

    seq: int
    held: int
    """Slots that the holder has now, within the limit: it begins nothing while as many requests or more are in progress."""
    free: int
    """Slots that nobody has, as far as this caller may have them."""
    elsewhere: int
    """Slots that other holders have."""
    busy: int
    """Requests in progress, as all holders told last."""
    most: int
    """How many this holder may hold at most, for now."""
    pressed: bool
    """Whether somebody was refused lately."""
    holders: int
    now: int
    """The store's time when it was carried out."""
    stale: bool = False
    """True when a later ask of this holder was there first: nothing was done."""
    era: int = 0
    """As in `quota.bucket.Reply`."""


class SlotHolder:
    """What the slots' record knows about one lessee, for one caller."""

    __slots__ = ("busy", "caller", "out", "reply", "reserve", "seq", "until", "wanted", "weight")

    def __init__(self, caller: str) -> None:
        self.seq = 0
        self.out = 0
        """Slots on lease, and requests in progress beyond them."""
        self.busy = 0
        self.wanted = 0
        """Requests in progress, that wait, or that were refused, as it told last."""
        self.until = 0
        """When the lease ends."""
        self.caller = caller
        self.weight = 1
        self.reserve = 0
        self.reply: SlotReply | None = None


class Slots:
    """One limit's slots. Only `apply_slots` writes to it."""

    __slots__ = ("closed", "holders", "lost", "pressed", "stamp")

    def __init__(self, closed: int, stamp: int, lost: int = 0) -> None:
        """`closed`: nothing is lent before this moment, for holders may have leases that are not on record."""
        self.closed = closed
        self.stamp = stamp
        self.lost = lost
        """`quota.clock.StoreClock.lost` when it was used last."""
        self.pressed = 0
        """Until when there is pressure."""
        self.holders: dict[str, SlotHolder] = {}

    @property
    def outstanding(self) -> int:
        """Slots that are on lease."""
        return sum(holder.out for holder in self.holders.values())


def slots_forget_at(slots: Slots) -> int:
    """From when on the record need not be kept."""
    return max([slots.closed, slots.stamp, *(holder.until + REMEMBERED for holder in slots.holders.values())])


def slots_caught_up(slots: Slots, lost: int) -> None:
    """The store has lost time (`StoreClock.lost`): leases of meanwhile last longer by as much. To be done before `apply_slots`."""
    for holder in slots.holders.values():
        if holder.until:
            holder.until += lost - slots.lost
    slots.lost = lost


def apply_slots(slots: Slots, ask: SlotAsk, now: int) -> SlotReply:
    """Carries `ask` out at time `now` and says what came of it. A clock that went back counts as standing still."""
    now = max(now, slots.stamp)
    _expire(slots, ask, now)
    holder = slots.holders.get(ask.holder)
    if ask.peek:
        return _reply(slots, ask, holder, holder.out if holder is not None else 0, now)
    if holder is not None and ask.seq <= holder.seq:
        if ask.seq == holder.seq and holder.reply is not None:
            return holder.reply
        return SlotReply(ask.seq, 0, 0, 0, 0, 0, False, 0, now, stale=True)
    if holder is None:
        holder = slots.holders[ask.holder] = SlotHolder(ask.caller)
    slots.stamp = now
    going_on = holder.until > now or now < slots.closed
    others = slots.outstanding - holder.out
    busy = ask.busy if going_on or not ask.strict else 0
    held = max(0, min(max(ask.keep, busy), ask.limit - others))
    holder.out = max(held, busy)
    holder.busy = ask.busy
    holder.wanted = min(max(ask.limit, ask.busy), ask.busy + ask.need + ask.refused)
    holder.caller, holder.weight, holder.reserve = ask.caller, ask.weight, ask.reserve
    asks = ask.need > 0 or ask.extra > 0
    holder.until = now + ask.ttl if holder.out or asks else now
    if ask.refused:
        slots.pressed = now + PRESSED
    free = _free(slots, ask, now)
    room = free
    if slots.pressed > now:
        most, rest = share(slots, ask, holder)
        room = max(0, min(free, most - holder.out, rest))
    granted = min(ask.need, room)
    if granted < ask.need:
        slots.pressed = now + PRESSED
    elif slots.pressed <= now and ask.extra > 0:
        sharers = max(ask.sharers, _active(slots, now))
        granted += max(0, min(ask.extra, (free - granted) // (sharers + 1)))
    holder.out += granted
    holder.seq = ask.seq
    holder.reply = _reply(slots, ask, holder, held + granted, now)
    return holder.reply


def _expire(slots: Slots, ask: SlotAsk, now: int) -> None:
    """Leases that have ended come back; one never lasts longer than it can from now."""
    for name, holder in list(slots.holders.items()):
        holder.until = min(holder.until, now + ask.ttl)
        if holder.until <= now:
            holder.out = holder.busy = holder.wanted = 0
            if holder.until + REMEMBERED <= now:
                del slots.holders[name]


def _free(slots: Slots, ask: SlotAsk, now: int) -> int:
    if now < slots.closed:
        return 0
    ordinary = sum(each.out for each in slots.holders.values() if each.reserve) if ask.reserve else 0
    return max(0, min(ask.limit - slots.outstanding, ask.limit - ask.reserve - ordinary))


def _active(slots: Slots, now: int) -> int:
    return max(1, sum(holder.until > now for holder in slots.holders.values()))


def share(slots: Slots, ask: SlotAsk, holder: SlotHolder) -> tuple[int, int]:
    """The most that `holder` may hold: the weighted max-min share, of the limit for its caller, of that for itself; and how many more its
    caller may have in all. Rounded up, but for a holder whose caller has more than its share.

    For a caller that wants less than its share there is room for a few more (the square root of what it wants), so that it hardly ever
    waits for others to end something.
    """
    wants: dict[str, list[float]] = {}
    among: list[tuple[float, float]] = []
    room = apart = total = 0.0
    for each in slots.holders.values():
        if (each.reserve > 0) != (holder.reserve > 0):
            apart += each.out
            continue
        total += each.out if each.caller == holder.caller else 0
        if each.wanted > 0:
            want = wants.setdefault(each.caller, [0.0, float(each.weight)])
            want[0] += each.wanted
            if each.caller == holder.caller:
                among.append((float(each.wanted), 1.0))
    room = ask.limit - max(float(holder.reserve), apart) if holder.reserve else float(ask.limit)
    whole = sum(weight for _, weight in wants.values())
    asked = [(want + (math.ceil(math.sqrt(want)) if want * whole < room * weight else 0), weight) for want, weight in wants.values()]
    mine = fill(asked, room) * holder.weight
    most, rest = min(float(holder.wanted), fill(among, mine)), math.ceil(mine - 1e-6) - int(total)
    return (math.floor(most + 1e-6) if rest < 0 else max(1, math.ceil(most - 1e-6))), rest


def fill(wants: list[tuple[float, float]], room: float) -> float:
    """The level to which `room` fills those that want (how much, weight): each gets what it wants, or its weight times the level."""
    wants = sorted(wants, key=lambda each: each[0] / each[1])
    weight = sum(own for _, own in wants)
    level = 0.0
    for want, own in wants:
        level = want / own
        if level * weight >= room:
            return room / weight
        room -= want
        weight -= own
    return level


def _reply(slots: Slots, ask: SlotAsk, holder: SlotHolder | None, held: int, now: int) -> SlotReply:
    pressed = slots.pressed > now
    most = share(slots, ask, holder)[0] if pressed and holder is not None else ask.limit
    busy = sum(each.busy for each in slots.holders.values())
    elsewhere = slots.outstanding - (holder.out if holder is not None else 0)
    return SlotReply(ask.seq, held, _free(slots, ask, now), elsewhere, busy, most, pressed, _active(slots, now), now)
