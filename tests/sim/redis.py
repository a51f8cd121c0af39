"""The model of Redis: `quota.script` beside its bucket (the record of the beginning, keys that expire), and what befalls servers."""

from __future__ import annotations

import copy
from collections.abc import Callable

import msgspec

from mesh.questions import TokenQuestion
from quota.bucket import Ask, Bucket, Reply, apply, forget_at, fresh, left_over, reborn
from quota.clock import FORGETFUL, StoreClock, catch_up, tell
from quota.slots import SlotAsk, SlotReply, Slots, apply_slots, slots_caught_up, slots_forget_at
from quota.store import bucket_key
from tests.sim.world import World

Apply = Callable[[Bucket, Ask, int], Reply]
ApplySlots = Callable[[Slots, SlotAsk, int], SlotReply]
Tell = Callable[[StoreClock, Ask, int], int]
EPSILON = 1e-6


class Broken(AssertionError):
    """Something that must hold does not."""


class Redis:
    """One server by one name: after a failover another one has it."""

    def __init__(self, world: World, apply_: Apply = apply, tell_: Tell = tell, apply_slots_: ApplySlots = apply_slots) -> None:
        self.world = world
        self.apply = apply_
        self.tell = tell_
        self.apply_slots = apply_slots_
        self.offset = 0.0
        """Seconds by which its wall clock is wrong."""
        self.was_set = False
        """Whether its clock was ever set."""
        self.run = 0
        self.record: tuple[int, StoreClock] | None = None
        """Whose beginning is on record, and its clock."""
        self.buckets: dict[str, tuple[int, Bucket, int | None]] = {}
        """When the store had begun, the bucket, and when its key expires."""
        self.slots: dict[str, tuple[int, Slots, int]] = {}
        """The same, of concurrency limits."""
        self.ready_at = 0.0
        self.decided: dict[tuple[str, str, int], float] = {}
        """When each ask was carried out first: bucket, holder, number."""
        self.granted: dict[str, int] = {}
        """Tokens that were granted and lent, by bucket."""
        self.windows: dict[tuple[str, str, int], int] = {}
        """The window, named by its end, that each ask was carried out in."""
        self.charged: dict[tuple[str, str], float] = {}
        """Tokens that were charged after answers, by bucket and holder."""
        self.debts_lost: dict[str, float] = {}
        """Debts that went with the data, by bucket."""
        self.levels: dict[str, tuple[float, float]] = {}
        """When each bucket was used last, and its level then."""
        self._last: dict[tuple[str, str, int], Reply] = {}
        """The answer to each holder's latest ask."""

    @property
    def wall(self) -> int:
        """Microseconds, as TIME says."""
        return int((self.world.now + 1e6 + self.offset) * 1e6)

    def time_of(self, question: TokenQuestion) -> int:
        """Microseconds that a question's bucket lives by: the store's time, which stands still for it when it was set back."""
        own = self.record is not None and self.record[0] == self.run
        now = self.wall + (self.record[1].ahead if self.record is not None and own else 0)
        saved = self.buckets.get(bucket_key(question.limit.name, question.key))
        return max(now, saved[1].stamp) if saved is not None else now

    def stall(self, seconds: float) -> None:
        """It does nothing for a while; what comes meanwhile is done then."""
        self.ready_at = max(self.ready_at, self.world.now + seconds)

    def fail_over(self) -> None:
        """Another server takes over. Whatever it has of the buckets, they were another run's."""
        self.run += 1

    def restart_empty(self) -> None:
        """All is lost, the record too."""
        self.run += 1
        self.record = None
        for key, (_, bucket, _) in self.buckets.items():
            self._lose(key, bucket)
        self.buckets.clear()
        self.slots.clear()

    def _lose(self, key: str, bucket: Bucket) -> None:
        self.debts_lost[key] = self.debts_lost.get(key, 0.0) + max(0.0, -bucket.level)
        self.levels.pop(key, None)
        if self.was_set:
            # It may have ended before its time, and with it who had asked what: what is lent twice is charged twice.
            self._last = {at: reply for at, reply in self._last.items() if at[0] != key}

    def debt(self, key: str, rate: float) -> float:
        """What a bucket is short of just now."""
        at, level = self.levels.get(key, (0.0, 0.0))
        return max(0.0, -level - (self.world.now - at) * rate)

    def execute(self, key: str, ask: Ask) -> Reply:
        """Carries an ask out, as the script does."""
        wall = self.wall
        clock, now = self._clock(ask, wall)
        born = clock.born
        saved = self.buckets.get(key)
        if saved is not None and saved[2] is not None and wall >= saved[2]:
            self._lose(key, saved[1])
            saved = None
        if saved is not None and saved[0] == born:
            bucket = saved[1]
        elif saved is not None and ask.windows and saved[1].ends > now:
            bucket = saved[1]
            bucket.stamp, bucket.lost = min(bucket.stamp, now), clock.lost
        elif ask.windows:
            begin, end, _ = ask.windows
            bucket = Bucket(left_over(begin if now < end else end, ask.burst, clock.since), now, clock.lost)
        else:
            bucket = fresh(ask.rate, ask.burst, clock.since + ask.ttl, now)
            bucket.lost = clock.lost
            if saved is not None:
                reborn(saved[1], ask.burst, bucket)
        catch_up(bucket, clock, now)
        beside = copy.deepcopy(bucket) if ask.charged else None
        reply = self.apply(bucket, ask, now)
        if beside is not None and not reply.stale:
            self._note_charge(key, bucket, reply, beside, ask, now)
        if reply.stale or ask.peek:
            return msgspec.structs.replace(reply, era=clock.era)
        last = self._last.get((key, ask.holder, born))
        if last is not None and last.seq == ask.seq:
            if reply != last:
                raise Broken(f"{key}: the ask {ask.seq} of {ask.holder}, which came twice, was carried out twice")
            return reply
        self._last[key, ask.holder, born] = reply
        self.decided[key, ask.holder, ask.seq] = self.world.now
        self.windows[key, ask.holder, ask.seq] = reply.ends
        self.granted[key] = self.granted.get(key, 0) + reply.granted + reply.lent
        till = forget_at(bucket, ask.rate, ask.burst)
        self.buckets[key] = (born, bucket, None if till is None else wall + max(till - now, 0) + FORGETFUL)
        self._check(key, bucket, ask)
        return msgspec.structs.replace(reply, now=now, era=clock.era)

    def _clock(self, ask: Ask | SlotAsk, wall: int) -> tuple[StoreClock, int]:
        if self.record is None or self.record[0] != self.run:
            self.record = (self.run, StoreClock(born=wall, era=wall, since=wall))
        clock = self.record[1]
        return clock, self.tell(clock, ask, wall)  # type: ignore[arg-type]

    def execute_slots(self, key: str, ask: SlotAsk) -> SlotReply:
        """Carries an ask for slots out, as the script does."""
        wall = self.wall
        clock, now = self._clock(ask, wall)
        saved = self.slots.get(key)
        if saved is not None and (wall >= saved[2] or saved[0] != clock.born):
            saved = None
        slots = saved[1] if saved is not None else Slots(clock.since + ask.ttl, now, clock.lost)
        slots_caught_up(slots, clock.lost)
        reply = self.apply_slots(slots, ask, now)
        if reply.stale or ask.peek:
            return reply
        self.slots[key] = (clock.born, slots, wall + max(slots_forget_at(slots) - now, 0) + FORGETFUL)
        return msgspec.structs.replace(reply, now=now, era=clock.era)

    def _note_charge(self, key: str, bucket: Bucket, reply: Reply, beside: Bucket, ask: Ask, now: int) -> None:
        """What was charged: by how much less is there, on lease and granted than if the ask had said nothing of it."""
        known = beside.holders.get(ask.holder)
        granted = 0 if known is not None and known.seq >= ask.seq else reply.granted
        without = apply(beside, msgspec.structs.replace(ask, charged=0, settled=0), now)
        granted_without = 0 if granted == 0 and reply.granted else without.granted
        charged = beside.level + beside.outstanding + granted_without - bucket.level - bucket.outstanding - granted
        self.charged[key, ask.holder] = self.charged.get((key, ask.holder), 0.0) + charged + reply.forgiven * (charged > 0)
        if bucket.level < -EPSILON and granted:
            raise Broken(f"{key}: {granted} tokens were granted, and it owes {-bucket.level}")

    def _check(self, key: str, bucket: Bucket, ask: Ask) -> None:
        """What `quota.bucket` says holds at every instant."""
        self.levels[key] = self.world.now, bucket.level
        refundable = sum(entry[1] for holder in bucket.holders.values() for entry in holder.rooms)
        whole = bucket.level + bucket.outstanding + refundable
        if bucket.level < -ask.debt - EPSILON or whole > ask.burst + EPSILON:
            raise Broken(f"{key}: level {bucket.level} + outstanding {bucket.outstanding} + refundable {refundable} > burst {ask.burst}")
