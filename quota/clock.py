"""The time that a store's buckets live by: its wall clock, held to what lessees measured on clocks that nobody sets.

Redis has no other clock to tell than its machine's wall clock, which may be set. A lessee knows how much time has passed since an answer:
at least what its own clock (CLOCK_BOOTTIME) says since the answer came, at most what it says since the question went out, and the time
that the next question is under way. Set forward, the store's clock would fill buckets that nobody gave the time to; set back, it would
stand still until it has caught up. So the store's time is corrected by the first ask whose lessee knows better, to the earlier of what it
may be.

A clock that was set forward by more than `FORGETFUL` has ended keys as well: buckets may be missing that are not full. From then on
a bucket that is missing counts as empty at that moment (`StoreClock.since`), as after a failover; those that are there go on.

Pure, in whole microseconds. `quota.script` is this module once more, in Lua.
"""

from __future__ import annotations

from typing import Final

import msgspec

from quota.bucket import Ask, Bucket

SLACK: Final = 500_000
"""How long an ask may be under way: one that is carried out later has been given up by then. A clock that is set forward by less is not
noticed."""
FORGETFUL: Final = 10_000_000
"""Keys outlive their buckets by this much."""

BEYOND: Final = 20_000_000
"""No bucket is ahead of the store's time by so much, unless it was used while the clock was set forward and nobody had noticed. It is
refilled from now on, and not when the store's time has come there."""


class StoreClock(msgspec.Struct):
    """The beginning of a store, on its own time, and how far that is from its wall clock. Kept beside the buckets."""

    born: int
    era: int
    """Names the time in which `Reply.now` was told: another one after each correction, since what was told before it is off."""
    since: int
    """When a bucket that is missing was empty at the latest: as `born`, or later."""
    ahead: int = 0
    """Microseconds that the store's time is ahead of its wall clock."""
    lost: int = 0
    """Microseconds in all by which the store's time was behind, and was put right. No bucket is refilled for them: what was granted
    meanwhile may have come from a bucket that was full."""


def tell(clock: StoreClock, ask: Ask, wall: int) -> int:
    """The store's time for `ask`, when its wall clock says `wall`; corrects `clock`, if the asker knows better."""
    now = wall + clock.ahead
    if ask.peek or ask.era != clock.era or ask.seen <= 0:
        return now
    least = ask.seen + ask.least - ask.least // 1024
    most = ask.seen + ask.most + ask.most // 1024
    if now < least:
        clock.ahead += least - now
        clock.lost += least - now
        clock.era += 1
        return least
    if now > most + SLACK:
        # The asker knows no more than that it is between the two: less is refilled for no time that has not passed.
        clock.ahead -= now - least
        clock.era += 1
        if now - most > FORGETFUL:
            clock.since = most
        return least
    return now


def catch_up(bucket: Bucket, clock: StoreClock, now: int) -> None:
    """Passes over what the store has lost since the bucket was used last, and brings back a bucket that was used in a time that was none.
    To be done before `quota.bucket.apply`."""
    bucket.stamp = max(bucket.stamp, min(now, bucket.stamp + clock.lost - bucket.lost))
    if bucket.stamp > now + BEYOND and not bucket.ends:
        bucket.stamp = now
    bucket.lost = clock.lost
