"""The Lua of concurrency limits does what the Python that the simulation runs does."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import redis

from quota.script import SCRIPT, SLOTS_SCRIPT
from quota.slots import TTL, SlotAsk, SlotReply, Slots, apply_slots, slots_caught_up, slots_forget_at
from tests import servers

START = 1_700_000_000_000_000


@pytest.fixture(scope="module")
def client() -> Iterator[redis.Redis]:
    with servers.redis() as server:
        yield redis.Redis.from_url(server.url, protocol=2)


def state(slots: Slots) -> list[Any]:
    holders = [
        [
            name, holder.seq, holder.out, holder.busy, holder.wanted, holder.until, holder.caller, holder.weight, holder.reserve,
            list(msgspec.structs.astuple(holder.reply)) if holder.reply else [],
        ]
        for name, holder in slots.holders.items()
    ]  # fmt: skip
    return [slots.closed, slots.stamp, slots.pressed, slots.lost, holders]


def asks(seed: int) -> Iterator[tuple[SlotAsk, int, int]]:
    """Asks of several holders for several callers, some honest and some not, with the time of each and what the store has lost."""
    rng = random.Random(seed)
    now, lost = START, 0
    limit = rng.choice([1, 3, 10, 500])
    reserve = rng.choice([0, 0, 1, limit // 2])
    kinds = [("a", "", 1, 0), ("b", "", 1, reserve), ("c", "x", 3, reserve), ("gateway/γ", "y", 1, reserve), ("d", "y", 1, reserve)]
    seqs = {name: 0 for name, *_ in kinds}
    for _ in range(80):
        now += rng.choice([0, 1, 777, 31_234, 500_000, 2_000_001, 9_000_000, 16_000_000, -3_000])
        lost += rng.choice([0, 0, 0, 0, 0, 0, 700_000])
        name, caller, weight, held_back = rng.choice(kinds)
        seqs[name] = max(1, seqs[name] + rng.choice([1, 1, 1, 1, 0, -1, 2]))
        keep = rng.randrange(limit + 1)
        yield SlotAsk(
            name, seqs[name], keep, rng.randrange(keep + 1), rng.choice([0, 0, 1, 2, limit]), rng.choice([0, 1, limit]),
            rng.choice([0, 0, 0, 1, 7]), rng.choice([1, 2, 3]), limit, TTL, rng.random() < 0.3, caller, weight, held_back,
            rng.random() < 0.1,
        ), now, lost  # fmt: skip


@pytest.mark.parametrize("seed", range(60))
def test_the_lua_slots_do_what_the_python_slots_do(client: redis.Redis, seed: int) -> None:
    slots = Slots(START + 3_000_000, START)
    lua = state(slots)
    encode, decode = msgspec.msgpack.encode, msgspec.msgpack.decode
    for ask, now, lost in asks(seed):
        slots_caught_up(slots, lost)
        reply = apply_slots(slots, ask, now)
        answer, lua, forget = decode(client.eval(SLOTS_SCRIPT, 0, encode(lua), encode(ask), str(now), str(lost)))
        assert msgspec.convert(answer, SlotReply) == reply, ask
        assert lua == state(slots), ask
        assert forget == slots_forget_at(slots)


def run(client: redis.Redis, ask: SlotAsk, key: str = "slots", start: str = "full") -> SlotReply:
    return msgspec.msgpack.decode(client.eval(SCRIPT, 2, key, "slots@born", msgspec.msgpack.encode(ask), start), type=SlotReply)


def plain(seq: int, need: int, keep: int = 0, holder: str = "a", **more: Any) -> SlotAsk:
    return SlotAsk(holder, seq, keep, keep, need, 0, 0, 1, more.pop("limit", 5), more.pop("ttl", TTL), **more)


def test_the_script_keeps_slots_and_lets_them_go(client: redis.Redis) -> None:
    client.flushall()
    assert run(client, plain(1, 3)).held == 3
    assert run(client, plain(1, 3)).held == 3  # once more: the same answer
    other = run(client, plain(1, 4, holder="b"))
    assert (other.held, other.elsewhere, other.pressed) == (2, 3, True)
    assert 24_000 < client.pttl("slots") <= 25_100
    assert run(client, plain(2, 0, 1)).held == 1
    look = run(client, plain(0, 0, holder="", peek=True))
    assert (look.free, look.elsewhere, look.busy) == (2, 3, 1)


def test_after_another_run_nothing_is_lent_for_a_lease_and_what_is_held_is_believed(client: redis.Redis) -> None:
    client.flushall()
    assert run(client, plain(1, 3)).held == 3
    client.set("slots@born", "0" * 40 + ":1:1:1:0:0")  # as after a failover: the record is another server's
    assert run(client, plain(2, 1, 3)).held == 3
    assert run(client, plain(1, 1, holder="b")).held == 0


def test_a_store_without_a_record_lends_nothing_at_first(client: redis.Redis) -> None:
    client.flushall()
    assert run(client, plain(1, 1), start="empty").held == 0


def test_a_key_of_somebody_else_is_an_error(client: redis.Redis) -> None:
    client.flushall()
    client.set("slots", "something")
    with pytest.raises(redis.ResponseError, match="holds no bucket"):
        run(client, plain(1, 1))
