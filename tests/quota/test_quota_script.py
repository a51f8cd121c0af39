from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import redis

from quota.bucket import Ask, Bucket, Reply, apply, forget_at
from quota.clock import FORGETFUL, StoreClock, catch_up, tell
from quota.script import CLOCK_SCRIPT, DIGEST, MODEL_SCRIPT, SCRIPT
from tests import servers

START = 1_700_000_000_000_000


@pytest.fixture(scope="module", params=servers.REDIS_SERVERS)
def client(request: pytest.FixtureRequest) -> Iterator[redis.Redis]:
    with servers.redis(program=request.param) as server:
        yield redis.Redis.from_url(server.url, protocol=2)


def state(bucket: Bucket) -> list[Any]:
    holders = [
        [
            name, holder.seq, holder.generation, holder.out, holder.spent, holder.returned, holder.until, holder.keep, holder.lent,
            [list(entry) for entry in holder.rooms], list(msgspec.structs.astuple(holder.reply)) if holder.reply else [],
            holder.charged,
        ]
        for name, holder in bucket.holders.items()
    ]  # fmt: skip
    return [bucket.level, bucket.stamp, holders, bucket.ends, bucket.size]


def questions(seed: int) -> Iterator[tuple[Ask, int]]:
    """Asks of three holders, some honest and some not, with the time of each."""
    rng = random.Random(seed)
    now = START
    rate = rng.choice([0.1, 1 / 3, 10.0, 1000.0, 7.77])
    burst = rng.choice([1, 3, 20, 500, 100_000])
    seqs = dict.fromkeys(("a", "b", "gateway/γ"), 0)
    length = rng.choice([0, 0, 4_000_000, 20_000_000])
    charged = dict.fromkeys(seqs, 0)
    charging = rng.random() < 0.5
    for _ in range(60):
        now += rng.choice([0, 1, 777, 31_234, 500_000, 2_000_001, 9_000_000, -3_000])
        holder = rng.choice(list(seqs))
        seqs[holder] = max(1, seqs[holder] + rng.choice([1, 1, 1, 1, 0, -1, 2]))
        seq = seqs[holder]
        if rng.random() < 0.05:
            burst = max(1, burst + rng.choice([-2, 5]))
        target = rng.choice([0, 1, burst, 2 * burst]) if rng.random() < 0.05 else -1
        begin = now - now % length + length * rng.choice([0, 0, 0, 0, -1, 1]) if length else 0
        windows = (begin, begin + length, begin + 2 * length) if length and rng.random() < 0.97 else ()
        filled = 0.0 if windows else rate
        before = charged[holder]
        if charging:
            charged[holder] += rng.choice([0, 0, 1, 7, burst, 3 * burst])
        yield Ask(
            holder, seq, seq - rng.choice([1, 1, 1, 2]), rng.choice([seq - 1, 1, 0, max(0, seq - 2)]), rng.randrange(0, 30),
            rng.randrange(0, 10), tuple((seq - rng.randrange(1, 5), rng.randrange(0, 6)) for _ in range(rng.choice([0, 0, 1, 2]))),
            tuple((rng.randrange(1, max(2, burst // 3)), rng.randrange(1, 4)) for _ in range(rng.choice([0, 1, 1, 2]))),
            rng.choice([-1, 0, 0, 5, burst]), rng.choice([1, 1, 2, 3]), rng.choice([2_000_000, 3_000_000]), filled, burst,
            rng.random() < 0.1, windows=windows, target=target,
            charged=charged[holder], settled=rng.choice([0, before]) if charging else 0,
            debt=rng.choice([0, burst, 10 * burst]) if charging else 0,
        ), now  # fmt: skip


@pytest.mark.parametrize("seed", range(60))
def test_the_lua_bucket_does_what_the_python_bucket_does(client: redis.Redis, seed: int) -> None:
    bucket = Bucket(0.0, START)
    lua = state(bucket)
    encode, decode = msgspec.msgpack.encode, msgspec.msgpack.decode
    for ask, now in questions(seed):
        reply = apply(bucket, ask, now)
        answer, lua, forget = decode(client.eval(MODEL_SCRIPT, 0, encode(lua), encode(ask), str(now)))
        assert msgspec.convert(answer, Reply) == reply, ask
        assert lua == state(bucket), ask
        until = forget_at(bucket, ask.rate, ask.burst)
        assert forget == (-1 if until is None else until)


def test_a_debt_and_who_was_charged_outlive_a_restart_that_kept_the_data(client: redis.Redis) -> None:
    client.flushall()
    told = msgspec.structs.replace(plain(1, 1, rate=10.0, ttl=100_000), charged=50, debt=200)
    assert run(client, told).level == -30
    _, born, *rest = client.get("bucket@born").decode().split(":")
    client.set("bucket@born", ":".join(["0" * 40, born, *rest]))  # as after a restart: the record is another run's
    reply = run(client, msgspec.structs.replace(told, seq=2, acked=0))
    assert (reply.granted, reply.level) == (0, -30)  # charged once, and owed still
    client.flushall()
    assert run(client, told, start="empty").level == -50  # without its data the debt is gone; what is told again is charged again


@pytest.mark.parametrize("seed", range(40))
def test_the_lua_clock_does_what_the_python_clock_does(client: redis.Redis, seed: int) -> None:
    rng = random.Random(seed)
    clock, bucket, wall = StoreClock(born=START, era=START, since=START), Bucket(0.0, START), START
    seen = era = START
    for _ in range(60):
        wall += rng.choice([0, 1_000, 700_000, 9_000_000, 3_600_000_000, -3_600_000_000, -400_000])
        least = rng.choice([0, 1_000, 1_048_577, 40_000_000])
        most = least + rng.choice([0, 3_000, 700_000])
        ask = Ask("a", 1, 0, 0, 0, 0, (), (), 0, 1, 1, 1.0, 1, rng.random() < 0.1, era, seen, least, most)
        held = [*msgspec.structs.astuple(clock), bucket.stamp, bucket.lost]
        got = client.eval(CLOCK_SCRIPT, 0, msgspec.msgpack.encode(held), msgspec.msgpack.encode(ask), str(wall))
        now = tell(clock, ask, wall)
        catch_up(bucket, clock, now)
        assert msgspec.msgpack.decode(got) == [now, [*msgspec.structs.astuple(clock), bucket.stamp, bucket.lost]], ask
        if rng.random() < 0.7:
            seen, era = now, clock.era


def run(client: redis.Redis, ask: Ask, key: str = "bucket", start: str = "full") -> Reply:
    return msgspec.msgpack.decode(client.eval(SCRIPT, 2, key, "bucket@born", msgspec.msgpack.encode(ask), start), type=Reply)


def plain(seq: int, need: int, **more: Any) -> Ask:
    fields: dict[str, Any] = {"rate": 0.001, "burst": 20, "ttl": 2_000_000, "extra": 0, "peek": False, **more}
    return Ask(
        "a", seq, seq - 1, 0, 0, 0, (), ((need, 1),), fields["extra"], 1, fields["ttl"], fields["rate"], fields["burst"], fields["peek"]
    )


def test_the_script_keeps_its_state_and_lets_it_go_when_the_bucket_is_full(client: redis.Redis) -> None:
    client.flushall()
    assert run(client, plain(1, 15)).level == 5
    assert run(client, plain(2, 15)).granted == 0
    assert client.script_exists(DIGEST.decode()) == [True]
    remaining = client.pttl("bucket")
    outlives = FORGETFUL // 1000
    assert 14_900_000 < remaining - outlives <= 15_010_000  # 15 tokens at a thousandth a second
    run(client, plain(1, 1, rate=1000.0), "quick")
    assert 4_000 < client.pttl("quick") - outlives <= 7_100


def test_a_look_changes_nothing(client: redis.Redis) -> None:
    client.flushall()
    assert run(client, plain(0, 5, peek=True)).granted == 5
    assert not client.exists("bucket")


def test_a_store_without_a_record_is_empty_unless_it_is_said_to_be_new(client: redis.Redis) -> None:
    client.flushall()
    assert run(client, plain(1, 1), start="empty").granted == 0
    client.flushall()
    assert run(client, plain(1, 1), start="full").granted == 1


def test_another_run_id_empties_all_buckets_for_a_lease_and_fills_them_from_then(client: redis.Redis) -> None:
    client.flushall()
    assert run(client, plain(1, 1, rate=1000.0)).level == 19
    client.set("bucket@born", "0" * 40 + ":1:1:1:0:0")  # as after a failover: the record is another server's
    assert run(client, plain(2, 1, rate=1000.0), start="full").granted == 0
    assert run(client, plain(1, 1, rate=1000.0), "unknown", start="full").granted == 0
    run_id = client.info("server")["run_id"]
    seconds, micros = client.time()
    born = seconds * 1_000_000 + micros - 2_010_000
    client.set("bucket@born", f"{run_id}:{born}:{born}:{born}:0:0")
    assert 9 <= run(client, plain(1, 1, rate=1000.0), "later").level <= 19
