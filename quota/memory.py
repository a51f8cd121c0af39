"""Buckets in this process's memory: for `tollhouse up`, and for tests."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from quota.bucket import Ask, Bucket, apply, forget_at
from quota.slots import SlotAsk, Slots, apply_slots, slots_forget_at
from quota.store import Done, Failure, SlotsDone

_LOOK = 8


class MemoryStore:
    """Carries asks out at once. Its lessees live in the same process, so a bucket that is not on record is full."""

    def __init__(self, *, max_buckets: int = 100_000, clock: Callable[[], int] | None = None) -> None:
        """`clock` gives microseconds since the epoch; if not given, the wall clock as it is now, and CLOCK_BOOTTIME from then on. Beyond
        `max_buckets` that are not full, new ones are refused."""
        began = time.time_ns() - time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        self._clock = clock or (lambda: (began + time.clock_gettime_ns(time.CLOCK_BOOTTIME)) // 1000)
        self._max = max_buckets
        self._buckets: dict[str, tuple[Bucket, int | None]] = {}
        """With when each can be forgotten; those used longest ago come first."""
        self._slots: dict[str, tuple[Slots, int]] = {}
        """The same, of concurrency limits."""
        self._asks = 0
        self._refused = 0

    def ask(self, key: str, ask: Ask, done: Done, *, strict: bool = False) -> None:
        """See `quota.store.Store`. Every ask is as good as acknowledged: `strict` changes nothing."""
        now = self._clock()
        self._asks += 1
        entry = self._buckets.pop(key, None)
        if ask.peek:
            if entry is not None:
                self._buckets[key] = entry
            done(apply(entry[0] if entry else Bucket(float(ask.burst), now), ask, now))
            return
        if entry is None and not self._room(now):
            self._refused += 1
            done(Failure("too many buckets are in use", sent=False))
            return
        bucket = entry[0] if entry else Bucket(float(ask.burst), now)
        reply = apply(bucket, ask, now)
        self._buckets[key] = (bucket, forget_at(bucket, ask.rate, ask.burst))
        done(reply)

    def ask_slots(self, key: str, ask: SlotAsk, done: SlotsDone, *, strict: bool = False) -> None:
        """See `quota.store.Store`."""
        now = self._clock()
        self._asks += 1
        kept = self._slots.pop(key, None)
        slots = kept[0] if kept is not None else Slots(0, now)
        if ask.peek or (kept is None and not self._room_for_slots(now)):
            if kept is not None:
                self._slots[key] = kept
            done(apply_slots(slots, ask, now) if ask.peek else Failure("too many limits are in use"))
            return
        reply = apply_slots(slots, ask, now)
        self._slots[key] = (slots, slots_forget_at(slots))
        done(reply)

    def _room_for_slots(self, now: int) -> bool:
        for key in [key for key, _ in zip(self._slots, range(_LOOK), strict=False)]:
            kept = self._slots.pop(key)
            if kept[1] > now:
                self._slots[key] = kept
        return len(self._slots) < self._max

    def _room(self, now: int) -> bool:
        """Forgets a few buckets that mean nothing any more. False when all room is taken by buckets that do."""
        for key in [key for key, _ in zip(self._buckets, range(_LOOK), strict=False)]:
            entry = self._buckets.pop(key)
            if entry[1] is None or entry[1] > now:
                self._buckets[key] = entry
        return len(self._buckets) < self._max

    def state(self) -> dict[str, Any]:
        """How the store is doing, for `status`."""
        return {"store": "memory", "buckets": len(self._buckets), "asks": self._asks, "refused": self._refused}

    async def close(self) -> None:
        """Nothing is waiting."""
