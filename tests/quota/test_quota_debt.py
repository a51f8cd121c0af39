from __future__ import annotations

from typing import Any

import pytest
from quota_world import FaultyStore, World, limit

from mesh.model import QuotaLimit
from mesh.questions import Grant, TokenQuestion
from mesh.quota_cost import Usage
from quota.bucket import Ask, Bucket, apply
from quota.memory import MemoryStore

SECOND = 1_000_000


def charging(**more: Any) -> QuotaLimit:
    return limit(usage=Usage(source="header", most=1000), most_debt=more.pop("most_debt", 200), **more)


def ask(seq: int, holder: str = "a", **more: Any) -> Ask:
    fields: dict[str, Any] = {"needs": (), "charged": 0, "settled": 0, "debt": 200, **more}
    return Ask(
        holder, seq, seq - 1, 0, 0, 0, (), fields["needs"], 0, 1, 2 * SECOND, 10.0, 20,
        charged=fields["charged"], settled=fields["settled"], debt=fields["debt"],
    )  # fmt: skip


def test_a_charge_leaves_a_debt_and_nothing_is_granted_until_it_is_paid() -> None:
    bucket = Bucket(20.0, 0)
    reply = apply(bucket, ask(1, charged=50, needs=((1, 1),)), 0)
    assert (reply.level, reply.granted, reply.wait, reply.forgiven) == (-30, 0, 3_100_000, 0)
    assert apply(bucket, ask(2, charged=50, needs=((1, 1),)), 3 * SECOND).granted == 0
    assert apply(bucket, ask(3, charged=50, needs=((1, 1),)), 3 * SECOND + 100_000).granted == 1


def test_what_is_told_again_is_charged_once_and_what_is_more_is_charged() -> None:
    bucket = Bucket(20.0, 0)
    apply(bucket, ask(1, charged=5), 0)
    assert apply(bucket, ask(1, charged=5), 0).level == 15
    assert apply(bucket, ask(2, charged=8), 0).level == 12
    assert apply(bucket, ask(1, "b", charged=1000, settled=998), 0).level == 10  # a holder that the bucket does not know


def test_a_debt_is_bounded_and_what_goes_beyond_is_told() -> None:
    bucket = Bucket(20.0, 0)
    reply = apply(bucket, ask(1, charged=1_000, debt=100), 0)
    assert (reply.level, reply.forgiven) == (-100, 880)
    assert apply(bucket, ask(2, charged=1_001, debt=50), 0).level == -100  # a lower bound later pays nothing


def taken(lessee: Any, question: TokenQuestion) -> Grant:
    got: list[Grant] = []
    grant = lessee.take(question, 0.0)
    if grant is not None:
        return grant
    lessee.ask(question, got.append)
    return got[0]


def test_a_debt_is_paid_before_anybody_is_let_through() -> None:
    world = World()
    store = MemoryStore(clock=world.store_clock)
    one, other = world.lessee(store, sharers=2), world.lessee(store, sharers=2)
    question = TokenQuestion(charging(), ("caller",))
    assert taken(one, question).admitted
    one.charge(question, 49)  # 50 in all, of 20 that are there: 30 are owed, at 10 a second
    for lessee in (one, other):
        refused = taken(lessee, question)
        assert not refused.admitted
        assert 3.0 < refused.retry_after < 3.2
        assert refused.remaining == 0
    world.advance(2.9)
    assert not taken(one, question).admitted
    assert not taken(other, question).admitted
    world.advance(0.3)
    assert taken(one, question).admitted


def test_what_is_in_hand_pays_first() -> None:
    world = World()
    lessee = world.lessee(MemoryStore(clock=world.store_clock))
    question = TokenQuestion(charging(tokens=1000, burst=1000), ("caller",))
    for _ in range(50):
        assert taken(lessee, question).admitted
        world.advance(0.01)
    asks, (lease,) = lessee.asks, lessee._leases.values()
    assert lease.tokens > 5
    before = lease.tokens
    lessee.charge(question, 3)
    assert (lease.tokens, lessee.asks) == (before - 3, asks)
    lessee.charge(question, 2 * before)
    assert not lease.owes  # told to the store, which has them
    assert lessee.charged == 3 + 2 * before


@pytest.mark.parametrize("fate", FaultyStore.FATES)
def test_a_charge_is_made_once_whatever_becomes_of_its_ask(fate: str) -> None:
    world = World()
    memory = MemoryStore(clock=world.store_clock)
    store = FaultyStore(world, memory)
    lessee = world.lessee(store)
    rule = charging(tokens=1, interval=1000.0, burst=100, timeout=1.0)
    question = TokenQuestion(rule, ("caller",))
    assert taken(lessee, question).admitted
    store.fates.append(fate)
    lessee.charge(question, 60)
    world.advance(5.0)
    ((bucket, _),) = memory._buckets.values()
    assert round(bucket.level + bucket.outstanding) == 39
    assert not any(lease.owes for lease in lessee._leases.values())


def test_what_may_have_been_charged_is_given_up_before_it_could_be_charged_twice() -> None:
    world = World()
    memory = MemoryStore(clock=world.store_clock)
    store = FaultyStore(world, memory)
    lessee = world.lessee(store)
    question = TokenQuestion(charging(tokens=1, interval=1000.0, burst=100, timeout=1.0), ("caller",))
    assert taken(lessee, question).admitted
    store.fates += ["lost answer"] + ["lost ask"] * 100
    lessee.charge(question, 60)
    world.advance(65.0)
    store.fates.clear()
    world.advance(70.0)
    ((bucket, _),) = memory._buckets.values()
    assert round(bucket.level + bucket.outstanding) == 39
    assert lessee.uncharged == {"forgiven": 0, "lost": 60}


def test_a_local_bucket_owes_as_well() -> None:
    world = World()
    store = FaultyStore(world, MemoryStore(clock=world.store_clock))
    lessee = world.lessee(store)
    question = TokenQuestion(charging(failure_mode="Local"), ("caller",))
    store.fates += ["lost ask"] * 50
    got: list[Grant] = []
    lessee.ask(question, got.append)
    world.advance(0.3)
    assert got[0].admitted
    lessee.charge(question, 60)
    lessee.ask(question, got.append)
    world.advance(0.3)
    assert not got[1].admitted
    assert 3.0 < got[1].retry_after < 5.0
