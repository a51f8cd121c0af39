from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from quota_world import FaultyStore, Ledger, World, limit

from mesh.questions import TokenQuestion
from quota.bucket import Ask, Bucket, Reply, apply, forget_at, fresh
from quota.memory import MemoryStore

SECOND = 1_000_000


def ask(holder: str = "a", seq: int = 1, **more: object) -> Ask:
    fields: dict[str, object] = {
        "acked": seq - 1, "generation": 0, "spent": 0, "returned": 0, "refunds": (), "needs": (), "extra": 0, "sharers": 1,
        "ttl": 2 * SECOND, "rate": 10.0, "burst": 20,
    }  # fmt: skip
    return Ask(holder, seq, **{**fields, **more})  # type: ignore[arg-type]


def refundable(bucket: Bucket) -> float:
    return sum(entry[1] for holder in bucket.holders.values() for entry in holder.rooms)


def test_needs_are_granted_from_the_front_for_as_long_as_they_fit() -> None:
    bucket = Bucket(20.0, 0)
    reply = apply(bucket, ask(needs=((3, 2), (10, 3))), 0)
    assert (reply.granted, reply.lent, reply.level) == (16, 0, 4)
    assert reply.wait == 600_000  # 10 are needed, 4 are there, 10 a second come back


def test_what_was_lent_is_not_refilled_until_it_is_spent_or_its_lease_ends() -> None:
    bucket = Bucket(20.0, 0)
    assert apply(bucket, ask(needs=((1, 1),), extra=10), 0).lent == 10
    assert apply(bucket, ask("b", peek=True), SECOND).level == 10  # 20 less the 10 that are out
    assert apply(bucket, ask("b", peek=True), 4 * SECOND).level == 20  # the lease ended at 2 s, and 1 s fills the rest


def test_a_repeated_ask_gets_the_same_answer_and_an_older_one_nothing() -> None:
    bucket = Bucket(20.0, 0)
    first = apply(bucket, ask(seq=1, needs=((1, 1),), extra=5), 0)
    assert apply(bucket, ask(seq=1, needs=((1, 1),), extra=5), 10) == first
    apply(bucket, ask(seq=2, needs=((1, 1),), generation=1), 20)
    stale = apply(bucket, ask(seq=1, needs=((1, 1),), extra=5), 30)
    assert stale.stale and stale.granted == 0 and stale.lent == 0


def test_what_a_lost_answer_lent_and_granted_comes_back() -> None:
    bucket = Bucket(20.0, 0)
    apply(bucket, ask(seq=1, needs=((5, 1),), extra=10), 0)
    reply = apply(bucket, ask(seq=2, acked=0, needs=((1, 1),)), 0)
    assert (reply.level, bucket.outstanding) == (19, 0)


def test_limits_too_small_to_share_are_not_lent() -> None:
    bucket = Bucket(3.0, 0)
    assert apply(bucket, ask(needs=((1, 1),), extra=3, burst=3, sharers=2), 0).lent == 0
    assert apply(bucket, ask("b", burst=3, sharers=2, needs=((1, 3),)), 0).granted == 2


def test_all_refunds_together_bring_back_no_more_than_there_was_room_for() -> None:
    bucket = Bucket(10.0, 0)
    for holder in "ab":
        apply(bucket, ask(holder, needs=((5, 1),), burst=10), 0)
    apply(bucket, ask("c", needs=((5, 1),), burst=10), SECOND // 2)  # 5 came back meanwhile, and go
    for holder in "ab":
        apply(bucket, ask(holder, 2, refunds=((1, 5),), burst=10), SECOND // 2)
    assert bucket.level == 5


def test_a_clock_that_went_back_stands_still() -> None:
    bucket = Bucket(0.0, 5 * SECOND)
    assert apply(bucket, ask(needs=((1, 1),)), SECOND).now == 5 * SECOND
    assert apply(bucket, ask(seq=2, needs=((1, 1),)), 5 * SECOND + 100_000).granted == 1


@pytest.mark.parametrize(("born", "level"), [(0, 20.0), (9 * SECOND, 10.0), (10 * SECOND, 0.0), (11 * SECOND, 0.0)])
def test_a_bucket_that_is_not_on_record_fills_from_the_stores_beginning(born: int, level: float) -> None:
    assert fresh(10.0, 20, born, 10 * SECOND).level == level


def test_a_bucket_is_forgotten_when_it_is_full_and_nobody_needs_remembering() -> None:
    bucket = Bucket(20.0, 0)
    apply(bucket, ask(needs=((20, 1),)), 0)
    at = forget_at(bucket, 10.0, 20)
    assert at is not None and at == 7 * SECOND  # the holder is remembered for 5 s after its lease of 2 s


numbers = st.integers(0, 12)
asks = st.tuples(
    st.sampled_from("abc"),
    st.integers(-1, 1),  # what becomes of the answer: kept, kept, lost
    numbers, numbers,  # spent, returned more
    st.lists(st.tuples(st.integers(1, 6), st.integers(0, 8)), max_size=2),
    st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), max_size=3),
    st.integers(-2, 15), st.integers(1, 3), st.integers(0, 3 * SECOND), st.booleans(),
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(st.lists(asks, min_size=1, max_size=40), st.integers(1, 30), st.sampled_from([0.5, 3.0, 10.0]))
def test_level_outstanding_and_refundable_never_pass_the_burst(steps: list[tuple], burst: int, rate: float) -> None:  # type: ignore[type-arg]
    bucket = Bucket(float(burst), 0)
    now = 0
    last: dict[str, Reply] = {}
    seqs = dict.fromkeys("abc", 0)
    for holder, kept, spent, returned, refunds, needs, extra, sharers, pause, doubled in steps:
        now += pause
        seqs[holder] += 1
        known = last.get(holder)
        question = ask(
            holder, seqs[holder], acked=known.seq if known else 0, generation=known.generation if known else 0, spent=spent,
            returned=returned, refunds=tuple((max(1, seqs[holder] - back), tokens) for back, tokens in refunds), needs=tuple(needs),
            extra=extra, sharers=sharers, rate=rate, burst=burst,
        )  # fmt: skip
        reply = apply(bucket, question, now)
        if doubled:
            assert apply(bucket, question, now + 1) == reply
        if kept >= 0:
            last[holder] = reply
        assert bucket.level >= 0
        assert all(each.out >= 0 for each in bucket.holders.values())
        assert bucket.level + bucket.outstanding + refundable(bucket) <= burst + 1e-9
        assert reply.level == math.floor(bucket.level) or doubled


events = st.one_of(
    st.tuples(st.just("requests"), st.integers(0, 2), st.integers(1, 30), st.integers(1, 3)),
    st.tuples(st.just("wait"), st.sampled_from([0.001, 0.01, 0.1, 0.3, 1.0, 3.1, 8.0]), st.just(0), st.just(0)),
    st.tuples(st.just("give back"), st.integers(0, 2), st.integers(0, 50), st.just(0)),
    st.tuples(st.just("fates"), st.sampled_from(FaultyStore.FATES), st.sampled_from([1, 2, 40]), st.just(0)),
    st.tuples(st.just("the bucket is forgotten"), st.integers(0, 2), st.just(0), st.just(0)),
    st.tuples(st.just("the store's clock stands still"), st.sampled_from([0.1, 1.0, 5.0]), st.just(0), st.just(0)),
)


@settings(max_examples=400, deadline=None)
@given(
    st.lists(events, min_size=5, max_size=60),
    st.sampled_from([(10, 1.0, 20), (1, 1.0, 3), (100, 1.0, 500), (5, 1.0, 1), (50, 1.0, 60)]),
    st.booleans(),
)
def test_no_window_admits_more_than_burst_and_rate_times_time(events: list[tuple], numbers: tuple, patient: bool) -> None:  # type: ignore[type-arg]
    tokens, interval, burst = numbers
    world = World()
    store = FaultyStore(world, MemoryStore(clock=world.store_clock))
    lessees = [world.lessee(store, sharers=3, max_buckets=1) for _ in range(3)]
    owners: dict[int, int] = {}
    ledger = Ledger(world, store)
    rule = limit(tokens=tokens, interval=interval, burst=burst, timeout=1e9 if patient else 0.2)
    for kind, what, count, cost in events:
        if kind == "requests":
            for _ in range(count):
                question = TokenQuestion(rule, ("caller",), cost)
                owners[id(question)] = what
                ledger.request(lessees[what], question)
        elif kind == "wait":
            world.advance(what)
        elif kind == "give back" and count < len(ledger.admitted):
            ledger.give_back(lessees[owners[id(ledger.admitted[-1 - count][1])]], len(ledger.admitted) - 1 - count)
        elif kind == "fates":
            store.fates.extend([what] * count)
        elif kind == "the bucket is forgotten":
            lessees[what].ask(TokenQuestion(rule, ("another",)), lambda grant: None)
        elif kind == "the store's clock stands still":
            world.store_behind += what
            world.advance(what)
    world.advance(20.0)
    assert ledger.worst(rule.rate) <= burst + 1e-6


@given(st.integers(1, 1000), st.integers(0, 1000), st.integers(0, 1000), st.integers(0, 2000))
def test_a_reset_never_makes_a_bucket_hold_more_than_its_burst_leaves_room_for(burst: int, level: int, extra: int, target: int) -> None:
    bucket = Bucket(float(min(level, burst)), 1_000_000)
    lent = apply(bucket, Ask("a", 1, 0, 0, 0, 0, (), ((1, 1),), extra, 1, 3_000_000, 0.001, burst), 1_000_000)
    reply = apply(bucket, Ask("", 0, 0, 0, 0, 0, (), (), 0, 1, 3_000_000, 0.001, burst, target=target), 1_000_001)
    refundable = sum(entry[1] for holder in bucket.holders.values() for entry in holder.rooms)
    assert bucket.level == reply.level == max(0, min(target, burst - lent.lent)) and refundable == 0
    assert bucket.level + bucket.outstanding <= burst and reply.elsewhere == lent.lent
