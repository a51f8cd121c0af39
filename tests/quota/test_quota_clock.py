"""A store's time, when its wall clock is set: what lessees know corrects it, and no bucket gains by that."""

from __future__ import annotations

from typing import Any

import pytest

from quota.bucket import Ask, Bucket
from quota.clock import BEYOND, FORGETFUL, SLACK, StoreClock, catch_up, tell

T = 1_700_000_000_000_000
S = 1_000_000


def ask(seen: int, least: int, most: int, era: int = T, **more: Any) -> Ask:
    return Ask("a", 1, 0, 0, 0, 0, (), (), 0, 1, 1, 1.0, 1, more.get("peek", False), era, seen, least, most)


@pytest.mark.parametrize(
    ("what", "asked", "wall", "now", "era", "lost"),
    [
        ("nothing is wrong", ask(T, 9 * S, 10 * S), T + 10 * S, T + 10 * S, T, 0),
        ("who asks first knows nothing", ask(0, 0, 0), T + 3600 * S, T + 3600 * S, T, 0),
        ("what was told before a correction", ask(T, S, S, T - 1), T + 3600 * S, T + 3600 * S, T, 0),
        ("a look", ask(T, S, S, peek=True), T + 3600 * S, T + 3600 * S, T, 0),
        ("an ask that was under way for long", ask(T, S, S), T + S + S // 1024 + SLACK, T + S + S // 1024 + SLACK, T, 0),
        ("set forward", ask(T, 1024, S), T + 60 * S, T + 1023, T + 1, 0),
        ("set back", ask(T, 1024, S), T - 3600 * S, T + 1023, T + 1, 3600 * S + 1023),
    ],
)
def test_the_time_of_an_ask(what: str, asked: Ask, wall: int, now: int, era: int, lost: int) -> None:
    clock = StoreClock(born=T, era=T, since=T)
    assert (tell(clock, asked, wall), clock.era, clock.lost) == (now, era, lost)
    assert wall + clock.ahead == now
    assert tell(clock, ask(0, 0, 0), wall + S) == now + S, "for all that come after"


def test_only_a_long_way_forward_makes_missing_buckets_empty() -> None:
    for seconds, since in ((FORGETFUL // S, T), (FORGETFUL // S + 2, T + S + S // 1024)):
        clock = StoreClock(born=T, era=T, since=T)
        tell(clock, ask(T, S, S), T + seconds * S + S)
        assert clock.since == since


def test_nothing_is_refilled_for_time_that_was_lost() -> None:
    clock = StoreClock(born=T, era=T, since=T, lost=7 * S)
    used, unused = Bucket(0.0, T), Bucket(0.0, T, lost=7 * S)
    catch_up(used, clock, T + 10 * S)
    catch_up(unused, clock, T + 10 * S)
    assert (used.stamp, unused.stamp, used.lost) == (T + 7 * S, T, 7 * S)
    long_ago = Bucket(0.0, T + 9 * S)
    catch_up(long_ago, clock, T + 10 * S)
    assert long_ago.stamp == T + 10 * S


def test_a_bucket_that_was_used_in_a_time_that_was_none_is_refilled_from_now_on() -> None:
    for ahead, stamp in ((3600 * S, T), (BEYOND, T + BEYOND), (-S, T - S)):
        bucket = Bucket(1.0, T + ahead)
        catch_up(bucket, StoreClock(born=T, era=T, since=T), T)
        assert bucket.stamp == stamp
