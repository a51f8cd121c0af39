"""The token bucket: what a limit has left, who holds what on lease, and what an `Ask` does to it.

Pure: a bucket, an ask and the time go in, a reply comes out and the bucket has changed. `quota.script` is this module
once more, in Lua, for Redis; the tests compare the two step by step.

What holds at every instant: *level + outstanding + refundable <= burst*, where outstanding is what holders have on lease
and refundable is what may still come back of tokens that were spent for nothing. Tokens are taken out of the level
before they are lent, nothing is refilled in the place of tokens that are out, and a token that was neither returned nor
reported by the end of its lease counts as spent. Each admission uses up a token that was either in that sum at the
start of a window or refilled within it, so in any window a limit admits at most *burst + rate x time*, whatever gets
lost, comes late or comes twice.

An ask has two parts. Its *needs* are requests that wait for an answer: their tokens are spent at once, for good. Its
*extra* is the lease: tokens for the requests to come.

A holder numbers its asks upwards. The number makes them idempotent: the last one asked again gets the same answer, an
older one gets nothing. `acked` names the last answer that the holder received; when a later one went out, it was lost
and will never be used, so what it lent comes back at once.

A limit by the calendar (`Ask.windows`) has its tokens anew in each window, and none are refilled within it. Leases end with their window,
and nothing of an old window comes back in a new one: in each window it admits at most its tokens.
What answers have cost beyond what was taken in advance is charged whether it is there or not: the level may go below zero, down to a
bound, and nothing is granted or lent until it is above again (`quota.debt`).

Times are whole microseconds on the store's clock.
"""

from __future__ import annotations

import math
from typing import Final

import msgspec

WINDOW: Final = 5_000_000
"""How long a holder is remembered after its last lease, and with it the answer to its last ask."""
CHARGES_KEPT: Final = 60_000_000
"""The same for a holder that has charged something: by then it knows what became of its last ask, or has given the charge up."""
ROOMS: Final = 4
"""How many asks of a holder can be refunded: its latest ones."""
NEVER: Final = -1
"""`Reply.wait` when more was needed than the bucket can ever hold."""


ASTRAY: Final = -1
"""`Reply.ends` when it is none of the windows that the ask names: nothing was done, and `Reply.now` tells the time."""


class Ask(msgspec.Struct, frozen=True, array_like=True):
    """What a holder wants of one bucket. On the wire an array in this order: the script reads it by index."""

    holder: str
    seq: int
    """Above all earlier ones of this holder, from 1."""
    acked: int
    """Number of the last ask whose answer was received; 0 for none."""
    generation: int
    """`Reply.generation` of that answer: `spent` and `returned` count from where it began."""
    spent: int
    """Tokens of the lease that were spent, in all."""
    returned: int
    """Tokens of the lease that are given back, in all."""
    refunds: tuple[tuple[int, int], ...]
    """(number of an earlier ask, tokens): granted needs that were not spent after all."""
    needs: tuple[tuple[int, int], ...]
    """(tokens, how many requests): what waits, in order. Granted from the front for as long as it fits."""
    extra: int
    """Tokens to lend beyond the needs."""
    sharers: int
    """How many lessees there are, as far as the asker knows; the bucket counts its own."""
    ttl: int
    """Microseconds that a lease lasts."""
    rate: float
    """Tokens per second."""
    burst: int
    peek: bool = False
    """Look, and change nothing."""
    era: int = 0
    """`Reply.era` of the last answer from this store; 0 for none."""
    seen: int = 0
    """`Reply.now` of that answer."""
    least: int = 0
    """Microseconds, by the asker's clock, since that answer came."""
    most: int = 0
    """Microseconds, by the asker's clock, since the ask went out that it answered."""
    windows: tuple[int, ...] = ()
    """`quota.calendar.windows`, as far as the asker knows the time; empty for a limit that is refilled. `rate` is 0 with it."""
    target: int = -1
    """Of an operator who resets the bucket: how many tokens it is to hold, as far as its burst leaves room. Nothing else is done then, and
    the answer's `granted` is what it held before. Negative in all other asks."""
    charged: int = 0
    """Tokens that answers have cost beyond what was paid from the lease, in all; only ever more (`quota.debt`)."""
    settled: int = 0
    """Of these, what needs charging no more: an answer has said that it was."""
    debt: int = 0
    """The most tokens that a charge may leave the bucket short of."""


class Reply(msgspec.Struct, frozen=True, array_like=True):
    """What came of an ask."""

    seq: int
    generation: int
    granted: int
    """Tokens for the needs: spent."""
    lent: int
    """Tokens added to the lease."""
    level: int
    """Whole tokens left in the bucket; negative for a debt."""
    wait: int
    """Microseconds until the first need that did not fit can; 0 when all did; `NEVER`."""
    full: int
    """Microseconds until the bucket is full."""
    elsewhere: int
    """Tokens that other holders have on lease."""
    sharers: int
    """Lessees active at this bucket."""
    now: int
    """The store's time when it was carried out."""
    stale: bool = False
    """True when a later ask of this holder was there first: nothing was done."""
    era: int = 0
    """Names the time that `now` belongs to (`quota.clock`); 0 where no clock can be set."""
    ends: int = 0
    """When the window of a limit by the calendar ends; 0 for others, and `ASTRAY`."""
    forgiven: int = 0
    """Whole tokens that were not charged, because the bucket had all the debt that it may."""


class Holder:
    """What the bucket knows about one lessee."""

    __slots__ = ("charged", "generation", "keep", "lent", "out", "reply", "returned", "rooms", "seq", "spent", "until")

    def __init__(self) -> None:
        self.seq = 0
        self.generation = 0
        self.out = 0
        """Tokens on lease."""
        self.spent = 0
        self.returned = 0
        self.until = 0
        """When the lease ends."""
        self.keep = 0
        """When the holder is forgotten."""
        self.lent = 0
        """Of `out`, what the last answer lent."""
        self.rooms: list[list[float]] = []
        """[number of an ask, how much of what it was granted could still come back without passing the burst]."""
        self.reply: Reply | None = None
        self.charged = 0
        """`Ask.charged` as far as it has been carried out."""


class Bucket:
    """One bucket's state. Only `apply` writes to it."""

    __slots__ = ("ends", "holders", "level", "lost", "size", "stamp")

    def __init__(self, level: float, stamp: int, lost: int = 0) -> None:
        self.level = level
        self.stamp = stamp
        self.lost = lost
        """`quota.clock.StoreClock.lost` when it was used last."""
        self.holders: dict[str, Holder] = {}
        self.ends = 0
        """When the window ends that `level` is of; 0 for a bucket that is refilled."""
        self.size = 0
        """How many tokens the window has, as its limit said last."""

    @property
    def outstanding(self) -> int:
        """Tokens that are out on lease."""
        return sum(holder.out for holder in self.holders.values())


def fresh(rate: float, burst: int, born: int, now: int) -> Bucket:
    """The bucket that is not on record: it was empty at `born`, and has been filling since; before `born` its time stands still.

    `born` is when the store began, and a lease later where holders may still spend what an earlier store lent them.
    """
    return Bucket(min(burst, max(0, now - born) * rate / 1e6), max(now, born))


def left_over(begin: int, burst: int, since: int) -> float:
    """The level of a window's bucket that is not on record: all is there if the window began when the store had; else nobody knows how much
    of it was spent, and none is."""
    return float(burst) if begin >= since else 0.0


def forget_at(bucket: Bucket, rate: float, burst: int) -> int | None:
    """When the bucket is full, nothing is out and nobody needs remembering: from then on it need not be kept."""
    if rate <= 0 and not bucket.ends:
        return None
    until = keep = bucket.stamp
    for holder in bucket.holders.values():
        until = max(until, holder.until)
        keep = max(keep, holder.keep)
    if bucket.ends:
        return max(keep, bucket.ends)
    return max(keep, until + math.ceil((burst - min(bucket.level, burst)) / rate * 1e6))


def apply(bucket: Bucket, ask: Ask, now: int) -> Reply:
    """Carries out `ask` at time `now` and says what came of it. A clock that went back counts as standing still."""
    now = max(now, bucket.stamp)
    if ask.windows and not ask.windows[0] <= now < ask.windows[2]:
        return Reply(ask.seq, 0, 0, 0, 0, 0, 0, 0, 0, now, stale=True, ends=ASTRAY)
    if ask.windows or bucket.ends:
        _turn(bucket, ask, now)
    _advance(bucket, ask.rate, ask.burst, now)
    if ask.target >= 0:
        return _reset(bucket, ask, now)
    holder = bucket.holders.get(ask.holder)
    if ask.peek:
        return _peek(bucket, ask, holder, now)
    if holder is not None and ask.seq <= holder.seq:
        if ask.seq == holder.seq and holder.reply is not None:
            return holder.reply
        return Reply(ask.seq, 0, 0, 0, math.floor(bucket.level), 0, 0, 0, 0, now, stale=True)
    if holder is None:
        holder = bucket.holders[ask.holder] = Holder()
    _settle(bucket, holder, ask)
    cap = ask.burst - bucket.outstanding
    if bucket.level > cap + 1e-6:  # the limit was lowered while these tokens were out
        bucket.level = max(0, cap)
        _narrow(bucket, 0)
    for seq, tokens in ask.refunds:
        _refund(bucket, holder, seq, tokens)
    forgiven = _charge(bucket, holder, ask)
    granted, wait = _grant(bucket, ask)
    if granted:
        holder.rooms = [*holder.rooms, [float(ask.seq), float(granted)]][-ROOMS:]
    if ask.needs or ask.extra > 0:
        holder.until = min(now + ask.ttl, bucket.ends) if bucket.ends else now + ask.ttl
    elif holder.out == 0:
        holder.until = now
    holder.keep = max(now, holder.until) + (CHARGES_KEPT if holder.charged else WINDOW)
    sharers = max(1, sum(other.until > now for other in bucket.holders.values()))
    holder.lent = 0 if wait else _lend(bucket, holder, ask, sharers)
    holder.out += holder.lent
    bucket.level -= holder.lent
    holder.seq = ask.seq
    holder.reply = Reply(
        ask.seq,
        holder.generation,
        granted,
        holder.lent,
        math.floor(bucket.level),
        wait,
        _full(bucket, ask),
        bucket.outstanding - holder.out,
        sharers,
        now,
        ends=bucket.ends,
        forgiven=forgiven,
    )
    return holder.reply


def _turn(bucket: Bucket, ask: Ask, now: int) -> None:
    """Brings a bucket into the window that `now` is in. Within a window, a limit that has become another goes on from what was used."""
    if not ask.windows:
        bucket.ends = bucket.size = 0
        return
    _, end, after = ask.windows
    if bucket.ends == 0:
        bucket.level = min(bucket.level, ask.burst - bucket.outstanding)
    elif now < bucket.ends:
        bucket.level += ask.burst - bucket.size
    else:
        bucket.level = ask.burst
        for holder in bucket.holders.values():
            holder.out = 0
            holder.until = min(holder.until, now)
            holder.rooms = []
    bucket.size = ask.burst
    bucket.ends = end if now < end else after


def _advance(bucket: Bucket, rate: float, burst: int, now: int) -> None:
    """Refills up to `now`, stopping at each lease that ends on the way: what it had out frees room only from then on."""
    while True:
        ends = [holder.until for holder in bucket.holders.values() if holder.out and holder.until <= now]
        at = max(bucket.stamp, min(ends)) if ends else now
        cap = burst - bucket.outstanding
        bucket.level = min(bucket.level + (at - bucket.stamp) * rate / 1e6, max(0, cap))
        bucket.stamp = at
        _narrow(bucket, cap - bucket.level)
        for holder in bucket.holders.values():
            if holder.out and holder.until <= at:
                holder.out = 0
        if not ends:
            break
    for name, holder in list(bucket.holders.items()):
        if holder.until <= now:
            holder.generation = holder.spent = holder.returned = holder.lent = 0
            if holder.keep <= now:
                del bucket.holders[name]


def _narrow(bucket: Bucket, room: float) -> None:
    """All refunds together may never bring back more than would have fitted at each moment since: as if it had never been spent."""
    for holder in bucket.holders.values():
        for entry in holder.rooms:
            entry[1] = max(0, min(entry[1], room))
            room -= entry[1]


def _settle(bucket: Bucket, holder: Holder, ask: Ask) -> None:
    """Takes in what the holder reports about its lease."""
    if ask.acked < holder.seq:
        lost = min(holder.lent, holder.out)
        holder.out -= lost
        bucket.level += lost
        for entry in holder.rooms:
            if entry[0] == holder.seq:
                bucket.level += entry[1]
                entry[1] = 0
    if holder.generation and holder.generation == ask.generation:
        returned = max(0, min(ask.returned - holder.returned, holder.out))
        holder.out -= returned
        bucket.level += returned
        holder.out -= max(0, min(ask.spent - holder.spent, holder.out))
        holder.spent = ask.spent
        holder.returned = ask.returned
    else:
        holder.out = holder.spent = holder.returned = 0
        holder.generation = ask.seq


def _refund(bucket: Bucket, holder: Holder, seq: int, tokens: int) -> None:
    """Undoes a spending, as far as the bucket has had room for it ever since."""
    for entry in holder.rooms:
        if entry[0] == seq:
            back = max(0, min(tokens, entry[1]))
            entry[1] -= back
            bucket.level += back


def _charge(bucket: Bucket, holder: Holder, ask: Ask) -> int:
    """Takes what answers have cost, once, down to the debt that there may be. Returns how much that leaves uncharged."""
    due = ask.charged - max(holder.charged, ask.settled)
    holder.charged = max(holder.charged, ask.charged)
    if due <= 0:
        return 0
    after = bucket.level - due
    bucket.level = max(after, min(bucket.level, -ask.debt))
    return math.floor(bucket.level - after)


def reborn(saved: Bucket, burst: int, bucket: Bucket) -> None:
    """What `bucket`, of a store that began anew, takes over of the one that an earlier store has left: its debt, which begins to be paid
    when the new bucket begins to fill, and what each holder was charged."""
    if saved.level < 0:
        bucket.level = min(bucket.level, burst) + saved.level
    for name, before in saved.holders.items():
        if before.charged:
            holder = bucket.holders[name] = Holder()
            holder.charged, holder.keep = before.charged, bucket.stamp + CHARGES_KEPT


def _grant(bucket: Bucket, ask: Ask) -> tuple[int, int]:
    """Spends for the needs, from the front. Returns the tokens, and how long the first that did not fit must wait."""
    granted = 0
    for tokens, count in ask.needs:
        fitting = max(0, min(count, math.floor(bucket.level / tokens)))
        if fitting:
            granted += fitting * tokens
            bucket.level = max(0, bucket.level - fitting * tokens)
        if fitting < count:
            if bucket.ends and tokens <= ask.burst:
                return granted, bucket.ends - bucket.stamp
            if tokens > ask.burst or ask.rate <= 0:
                return granted, NEVER
            return granted, max(1, _microseconds(tokens - bucket.level, ask.rate))
    return granted, 0


def _lend(bucket: Bucket, holder: Holder, ask: Ask, seen: int) -> int:
    """How much to lend: no more than a half of the burst among all, and a fair part of what is there."""
    sharers = max(seen, ask.sharers)
    if ask.extra <= 0 or ask.burst < 2 * sharers:
        return 0
    share = ask.burst // (2 * sharers) - holder.out
    return max(0, min(ask.extra, share, math.floor(bucket.level / sharers)))


def _peek(bucket: Bucket, ask: Ask, holder: Holder | None, now: int) -> Reply:
    """What the needs would get, with the level as it is."""
    level = bucket.level
    granted, wait = _grant(bucket, ask)
    bucket.level = level
    return Reply(
        ask.seq,
        holder.generation if holder else 0,
        granted,
        0,
        math.floor(level),
        wait,
        _full(bucket, ask),
        bucket.outstanding - (holder.out if holder else 0),
        max(1, sum(other.until > now for other in bucket.holders.values())),
        now,
        ends=bucket.ends,
    )


def _reset(bucket: Bucket, ask: Ask, now: int) -> Reply:
    """Makes the bucket hold so many tokens. What is out on lease stays out, and keeps its place; what was spent before can't be undone any
    more."""
    before = math.floor(bucket.level)
    out = bucket.outstanding
    bucket.level = max(0, min(ask.target, ask.burst - out))
    _narrow(bucket, 0)
    sharers = max(1, sum(other.until > now for other in bucket.holders.values()))
    return Reply(ask.seq, 0, before, 0, bucket.level, 0, _full(bucket, ask), out, sharers, now, ends=bucket.ends)


def _full(bucket: Bucket, ask: Ask) -> int:
    """How long until the bucket is full."""
    if bucket.ends:
        return bucket.ends - bucket.stamp if bucket.level < ask.burst else 0
    return _microseconds(ask.burst - bucket.level, ask.rate)


def _microseconds(tokens: float, rate: float) -> int:
    """How long `tokens` take to be refilled."""
    if tokens <= 0 or rate <= 0:
        return 0
    return math.ceil(tokens / rate * 1e6)
