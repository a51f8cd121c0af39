"""Limits by the calendar: which windows there are, and that each has its tokens once, whatever is on lease when it ends."""

from __future__ import annotations

import asyncio
import datetime
import time
from typing import Any, Literal
from zoneinfo import ZoneInfo

import msgspec
import pytest
import redis
from hypothesis import given, settings
from hypothesis import strategies as st
from quota_world import World, limit

from mesh.model import QuotaLimit
from mesh.questions import Grant, TokenQuestion
from mesh.quota_windows import Calendar
from quota.bucket import Ask, Reply
from quota.calendar import window, windows
from quota.lessee import QuotaLessee
from quota.memory import MemoryStore
from quota.redis_store import RedisStore
from quota.script import SCRIPT
from quota.store import bucket_key
from tests import servers

Unit = Literal["Second", "Minute", "Hour", "Day", "Week", "Month"]


def at(text: str, zone: str = "UTC") -> float:
    return datetime.datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone)).timestamp()


def shown(moment: float, zone: str) -> str:
    return datetime.datetime.fromtimestamp(moment, ZoneInfo(zone)).isoformat()


@pytest.mark.parametrize(
    ("unit", "zone", "now", "begin", "end", "hours"),
    [
        ("Day", "Europe/Berlin", "2026-03-29T12:00", "2026-03-29T00:00:00+01:00", "2026-03-30T00:00:00+02:00", 23),
        ("Day", "Europe/Berlin", "2026-10-25T23:59", "2026-10-25T00:00:00+02:00", "2026-10-26T00:00:00+01:00", 25),
        ("Day", "Asia/Kolkata", "2026-01-01T00:00", "2026-01-01T00:00:00+05:30", "2026-01-02T00:00:00+05:30", 24),
        ("Day", "America/Havana", "2026-11-01T12:00", "2026-11-01T00:00:00-04:00", "2026-11-02T00:00:00-05:00", 25),
        ("Day", "Africa/Cairo", "2026-04-24T12:00", "2026-04-24T01:00:00+03:00", "2026-04-25T00:00:00+03:00", 23),
        ("Day", "Pacific/Apia", "2011-12-29T12:00", "2011-12-29T00:00:00-10:00", "2011-12-31T00:00:00+14:00", 24),
        ("Week", "Europe/Berlin", "2026-03-29T12:00", "2026-03-23T00:00:00+01:00", "2026-03-30T00:00:00+02:00", 167),
        ("Month", "UTC", "2026-02-28T23:59", "2026-02-01T00:00:00+00:00", "2026-03-01T00:00:00+00:00", 28 * 24),
        ("Month", "UTC", "2028-02-29T00:00", "2028-02-01T00:00:00+00:00", "2028-03-01T00:00:00+00:00", 29 * 24),
        ("Month", "America/New_York", "2026-03-01T00:00", "2026-03-01T00:00:00-05:00", "2026-04-01T00:00:00-04:00", 31 * 24 - 1),
        ("Month", "UTC", "2026-12-31T12:00", "2026-12-01T00:00:00+00:00", "2027-01-01T00:00:00+00:00", 31 * 24),
        ("Hour", "Asia/Kolkata", "2026-01-01T10:59", "2026-01-01T10:00:00+05:30", "2026-01-01T11:00:00+05:30", 1),
        ("Minute", "UTC", "2026-01-01T10:59:59", "2026-01-01T10:59:00+00:00", "2026-01-01T11:00:00+00:00", 1 / 60),
        ("Second", "UTC", "2026-01-01T10:59:59", "2026-01-01T10:59:59+00:00", "2026-01-01T11:00:00+00:00", 1 / 3600),
    ],
)
def test_windows(unit: Unit, zone: str, now: str, begin: str, end: str, hours: float) -> None:
    found = window(Calendar(unit, zone), at(now, zone))
    assert (shown(found[0], zone), shown(found[1], zone)) == (begin, end)
    assert found[1] - found[0] == pytest.approx(hours * 3600)


ZONES = ("UTC", "Europe/Berlin", "America/Havana", "America/St_Johns", "Africa/Cairo", "Asia/Beirut", "Australia/Lord_Howe", "Pacific/Apia")


@settings(max_examples=400, deadline=None)
@given(
    st.sampled_from(("Minute", "Hour", "Day", "Week", "Month")),
    st.sampled_from(ZONES),
    st.floats(at("1970-02-01"), at("2037-01-01")),
)
def test_windows_follow_each_other_and_leave_nothing_out(unit: Unit, zone: str, now: float) -> None:
    calendar = Calendar(unit, zone)
    begin, end = window(calendar, now)
    assert begin <= now < end
    first, second, third = windows(calendar, int(now * 1e6))
    assert (first, second) == (round(begin * 1e6), round(end * 1e6)) and second < third
    inside = window(calendar, (begin + end) / 2)
    assert inside[1] == end or unit == "Hour"  # an hour in which a clock is set by half of one is two


def question(tokens: int = 100, unit: Unit = "Minute", **more: Any) -> TokenQuestion:
    made = limit(tokens=tokens, burst=tokens, interval=60.0, timeout=2.0, **more)
    return TokenQuestion(msgspec.structs.replace(made, calendar=Calendar(unit)), ("x",), 1)


class Fleet:
    """Lessees of one store in memory, in virtual time."""

    def __init__(self, count: int) -> None:
        self.world = World()
        self.store = MemoryStore(clock=self.world.store_clock)
        wall = lambda: self.world.store_clock() / 1e6  # noqa: E731
        self.lessees = [self.world.lessee(self.store, sharers=count, wall=wall) for _ in range(count)]

    def admitted(self, asked: TokenQuestion, requests: int) -> int:
        answers: list[Grant] = []
        for each in range(requests):
            lessee = self.lessees[each % len(self.lessees)]
            own = TokenQuestion(asked.limit, asked.key, asked.cost)
            grant = lessee.take(own, 0.0)
            lessee.ask(own, answers.append) if grant is None else answers.append(grant)
        return sum(grant.admitted for grant in answers)

    def to_the_next_window(self, calendar: Calendar) -> None:
        now = self.world.store_clock()
        self.world.advance((windows(calendar, now)[1] - now) / 1e6)


@pytest.fixture
def fleet() -> Fleet:
    return Fleet(3)


def test_a_window_has_its_tokens_once_and_what_is_left_of_one_is_not_there_in_the_next(fleet: Fleet) -> None:
    asked = question()
    assert asked.limit.calendar is not None
    fleet.to_the_next_window(asked.limit.calendar)
    assert fleet.admitted(asked, 30) == 30  # the rest stays, in part on lease
    fleet.world.advance(2.0)
    assert fleet.admitted(asked, 30) == 30
    fleet.to_the_next_window(asked.limit.calendar)
    total = fleet.admitted(asked, 150)
    for _ in range(50):
        fleet.world.advance(0.6)
        total += fleet.admitted(asked, 20)
    assert total == 100


def test_who_is_refused_is_told_when_the_window_ends(fleet: Fleet) -> None:
    asked = question(tokens=1)
    assert asked.limit.calendar is not None
    fleet.to_the_next_window(asked.limit.calendar)
    fleet.world.advance(20.0)
    answers: list[Grant] = []
    for _ in range(3):
        own = TokenQuestion(asked.limit, asked.key, asked.cost)
        grant = fleet.lessees[0].take(own, 0.0)
        fleet.lessees[0].ask(own, answers.append) if grant is None else answers.append(grant)
    assert [grant.admitted for grant in answers] == [True, False, False]
    assert [round(grant.retry_after) for grant in answers] == [0, 40, 40]
    assert [round(grant.reset) for grant in answers] == [40, 40, 40]


def with_tokens(asked: TokenQuestion, tokens: int) -> TokenQuestion:
    return TokenQuestion(msgspec.structs.replace(asked.limit, tokens=tokens, burst=tokens), asked.key, asked.cost)


def test_a_limit_that_is_raised_or_lowered_goes_on_from_what_was_used(fleet: Fleet) -> None:
    asked = question(tokens=10)
    assert asked.limit.calendar is not None
    fleet.to_the_next_window(asked.limit.calendar)
    assert fleet.admitted(asked, 20) == 10
    raised = with_tokens(asked, 15)
    fleet.world.advance(1.0)
    assert fleet.admitted(raised, 20) == 5
    lowered = with_tokens(asked, 4)
    fleet.world.advance(1.0)
    assert fleet.admitted(lowered, 20) == 0
    for tokens in (15, 4, 15, 4, 15):  # gateways that have heard of it, and others
        fleet.world.advance(1.0)
        assert fleet.admitted(with_tokens(asked, tokens), 6) == 0
    fleet.to_the_next_window(asked.limit.calendar)
    assert fleet.admitted(lowered, 20) == 4


def test_a_clock_that_is_days_off_is_put_right_by_the_store(fleet: Fleet) -> None:
    asked = question(unit="Day")
    wrong = fleet.world.lessee(fleet.store, wall=lambda: fleet.world.store_clock() / 1e6 - 5 * 86_400)
    answers: list[Grant] = []
    wrong.ask(asked, answers.append)
    assert [(grant.admitted, grant.error) for grant in answers] == [(True, "")]


# Redis


@pytest.fixture(scope="module")
def client() -> Any:
    with servers.redis() as server, redis.Redis.from_url(server.url) as found:
        yield found


def run(
    client: redis.Redis, seq: int, limit: QuotaLimit, begin: int, length: int = 3_600_000_000, need: int = 1, start: str = "full"
) -> Reply:
    at = (begin, begin + length, begin + 2 * length)
    fields = Ask("a", seq, seq - 1, 0, 0, 0, (), ((need, 1),), 0, 1, 3_000_000, 0.0, limit.burst, windows=at)
    key = bucket_key(limit.name, ("x",))
    return msgspec.msgpack.decode(client.eval(SCRIPT, 2, key, "born", msgspec.msgpack.encode(fields), start), type=Reply)


def now_of(client: redis.Redis) -> int:
    seconds, micros = client.time()
    return int(seconds) * 1_000_000 + int(micros)


def test_a_window_that_began_before_the_store_has_nothing_and_the_next_one_all(client: redis.Redis) -> None:
    client.flushall()
    made, now = question().limit, now_of(client)
    reply = run(client, 1, made, now - 1_000_000, start="empty")
    assert (reply.granted, reply.level) == (0, 0) and 3_590_000_000 < reply.wait < 3_600_000_000
    while now_of(client) < now + 200_000:
        time.sleep(0.01)
    later = run(client, 1, msgspec.structs.replace(made, name="b"), now - 2_000_000, 2_200_000, start="empty")
    assert (later.granted, later.level) == (1, 99)  # it began after the record was written


def test_after_a_failover_what_is_on_record_of_a_window_goes_on(client: redis.Redis) -> None:
    client.flushall()
    made, begin = question().limit, now_of(client) - 1_000_000
    assert run(client, 1, made, begin, need=60).level == 40
    client.set("born", "0" * 40 + ":1:1:1:0:0")  # the record is another server's
    assert run(client, 2, made, begin, need=50).granted == 0
    assert run(client, 3, made, begin, need=40).granted == 40
    client.set("born", "0" * 40 + ":1:1:1:0:0")
    client.delete(bucket_key(made.name, ("x",)))
    assert run(client, 4, made, begin).granted == 0  # nobody knows what was spent of it


def test_a_window_is_kept_until_it_ends(client: redis.Redis) -> None:
    client.flushall()
    made, begin = question().limit, now_of(client) - 1_000_000
    run(client, 1, made, begin)
    assert 3_600_000 < client.pttl(bucket_key(made.name, ("x",))) < 3_611_000


def test_a_window_that_is_not_named_is_refused_with_the_time(client: redis.Redis) -> None:
    client.flushall()
    now = now_of(client)
    reply = run(client, 1, question().limit, now + 10_000_000)
    assert reply.ends == -1 and reply.stale and now <= reply.now < now + 10_000_000
    assert not client.exists(bucket_key(question().limit.name, ("x",)))


def test_gateways_over_redis_admit_each_second_what_it_has() -> None:
    async def main(url: str) -> dict[int, int]:
        made = question(tokens=5, unit="Second")
        stores = [RedisStore(url + "?start=full") for _ in range(2)]
        lessees = [QuotaLessee(store, holder=f"g{at}", sharers=2) for at, store in enumerate(stores)]
        counted: dict[int, int] = {}
        end = time.time() + 3.2
        while time.time() < end:
            for lessee in lessees:
                future: asyncio.Future[Grant] = asyncio.get_running_loop().create_future()
                lessee.ask(TokenQuestion(made.limit, made.key, 1), future.set_result)
                before = time.time()
                grant = await future
                assert not grant.error
                if grant.admitted and int(before) == int(time.time()):
                    counted[int(before)] = counted.get(int(before), 0) + 1
            await asyncio.sleep(0.002)
        for lessee, store in zip(lessees, stores, strict=True):
            await lessee.close()
            await store.close()
        return counted

    with servers.redis() as server:
        counted = asyncio.run(main(server.url))
    assert len(counted) >= 3 and max(counted.values()) == 5
