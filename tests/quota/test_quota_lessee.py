from __future__ import annotations

from typing import Any

import msgspec
import pytest
from quota_world import FaultyStore, World, limit

from mesh.questions import Grant, TokenQuestion
from quota.bucket import Ask, Reply
from quota.lease import LONGEST
from quota.lessee import QuotaLessee
from quota.memory import MemoryStore
from quota.store import Done, Failure


class Setting:
    """A world with a store and a lessee."""

    def __init__(self, **more: Any) -> None:
        self.world = World()
        self.memory = MemoryStore(clock=self.world.store_clock)
        self.store = FaultyStore(self.world, self.memory)
        self.lessee = self.world.lessee(self.store, **more)

    def get(self, question: TokenQuestion, lessee: QuotaLessee | None = None) -> Grant | None:
        """The answer, if there is one by now."""
        lessee = lessee or self.lessee
        grant = lessee.take(question, self.world.now)
        if grant is not None:
            return grant
        got: list[Grant] = []
        lessee.ask(question, got.append)
        return got[0] if got else None

    def run(self, question: TokenQuestion, rate: float, seconds: float) -> tuple[int, int, int]:
        """Requests at an even rate. Returns how many there were, how many were admitted and how many asks that took."""
        before, admitted, total = self.store.asks, 0, int(rate * seconds)
        for _ in range(total):
            grant = self.get(question)
            admitted += grant is not None and grant.admitted
            self.world.advance(1 / rate)
        return total, admitted, self.store.asks - before


def q(burst: int = 20, tokens: int = 10, key: str = "x", cost: int = 1, **more: Any) -> TokenQuestion:
    return TokenQuestion(limit(burst=burst, tokens=tokens, **more), (key,), cost)


@pytest.mark.parametrize(
    ("tokens", "burst", "rate", "most"),
    [(1000, 2000, 800.0, 10), (1000, 2000, 100.0, 20), (1000, 2000, 5000.0, 25), (100, 400, 50.0, 25), (10, 20, 5.0, 300)],
)
def test_asks_for_each_thousand_requests(tokens: int, burst: int, rate: float, most: int) -> None:
    setting = Setting()
    question = q(burst, tokens)
    setting.run(question, rate, 3)
    total, admitted, asks = setting.run(question, rate, 10)
    assert asks / total * 1000 <= most
    assert admitted >= min(total, tokens * 10) * 0.97


@pytest.mark.parametrize(("burst", "tokens", "sharers"), [(5, 1000, 1), (5, 1000, 5), (40, 1000, 1), (2000, 1000, 3)])
def test_a_flood_gets_all_that_comes_back(burst: int, tokens: int, sharers: int) -> None:
    setting = Setting(sharers=sharers)
    setting.run(q(burst, tokens), 3000, 2)
    _, admitted, _ = setting.run(q(burst, tokens), 3000, 3)
    assert 0.75 * 3 * tokens <= admitted <= 3 * tokens + burst


def test_a_flood_is_refused_without_asking_and_all_that_comes_back_is_given_out() -> None:
    setting = Setting()
    question = q(5, 10)
    setting.run(question, 500, 1)
    _, admitted, asks = setting.run(question, 500, 10)
    assert 95 <= admitted <= 101
    assert asks <= 230


def test_a_refusal_says_when_to_come_back() -> None:
    setting = Setting()
    question = q(3, 1)
    answers = [setting.get(question) for _ in range(5)]
    assert [answer.admitted for answer in answers if answer] == [True] * 3 + [False] * 2
    last = answers[-1]
    assert last is not None and 0.9 < last.retry_after <= 1.0 and 2.9 < last.reset <= 3.0
    asks = setting.store.asks
    setting.world.advance(0.5)
    assert setting.lessee.take(question, 0.0) is not None and setting.store.asks == asks
    setting.world.advance(0.6)
    again = setting.get(question)
    assert again is not None and again.admitted


@pytest.mark.parametrize(
    ("question", "admitted"), [(q(cost=21), False), (q(cost=0), True), (q(tokens=0), False), (q(burst=0), False), (q(cost=20), True)]
)
def test_questions_at_the_edge(question: TokenQuestion, admitted: bool) -> None:
    grant = Setting().get(question)
    assert grant is not None and grant.admitted is admitted and not grant.error


def test_requests_that_wait_share_the_next_ask() -> None:
    setting = Setting()
    question = q(2000, 1000)
    setting.store.fates = ["slow"]
    got: list[Grant] = []
    for _ in range(50):
        setting.lessee.ask(question, got.append)
    assert not got and setting.store.asks == 1
    setting.world.advance(0.2)
    assert len(got) == 50 and all(grant.admitted for grant in got) and setting.store.asks == 2


def test_limits_too_small_to_share_are_never_over() -> None:
    setting = Setting(sharers=3)
    others = [setting.lessee, setting.world.lessee(setting.store, sharers=3), setting.world.lessee(setting.store, sharers=3)]
    question = q(5, 1)
    grants = [setting.get(question, others[at % 3]) for at in range(12)]
    assert sum(grant.admitted for grant in grants if grant) == 5
    assert setting.lessee.state()["tokens"] == 0


def test_unused_tokens_are_given_back_when_idle_and_on_close() -> None:
    setting = Setting()
    question = q(400, 10)
    setting.run(question, 50, 2)
    assert setting.lessee.state()["tokens"] > 0
    setting.world.advance(8)
    assert setting.lessee.state()["tokens"] == 0
    setting.world.advance(60)
    other = setting.world.lessee(setting.store)
    whole = setting.get(q(400, 10, cost=400), other)
    assert whole is not None and whole.admitted  # nothing of it is out any more


def test_close_gives_everything_back() -> None:
    import asyncio

    setting = Setting()
    question = q(400, 10)
    setting.run(question, 50, 2)
    assert setting.lessee.state()["tokens"] > 0
    asyncio.run(setting.lessee.close())
    assert setting.lessee.take(question, 0.0) is None
    late = setting.get(question)
    assert late is not None and not late.admitted and late.error == "the lessee is closed"
    setting.world.advance(10 + LONGEST)
    whole = setting.get(q(400, 10, cost=400), setting.world.lessee(setting.store))
    assert whole is None or whole.admitted or whole.retry_after < 31.0


def test_tokens_are_not_spent_after_the_end_of_their_lease() -> None:
    setting = Setting()
    question = q(400, 100)
    setting.run(question, 100, 2)
    held = setting.lessee.state()["tokens"]
    assert held > 20
    setting.store.fates = ["lost ask"] * 1000
    setting.world.advance(3.97)  # the lease of 4 s was renewed not long before
    ends = next(iter(setting.lessee._leases.values())).until
    (bucket, _), *_ = setting.memory._buckets.values()
    assert ends * 1e6 < bucket.holders[setting.lessee.holder].until
    setting.world.advance(max(0.0, ends - setting.world.now) + 0.001)
    assert setting.lessee.take(question, 0.0) is None


def test_a_lost_answer_costs_nothing_but_its_wait() -> None:
    setting = Setting()
    setting.store.fates = ["lost answer"]
    question = q(5, 1, timeout=1.0)
    assert setting.get(question) is None
    setting.world.advance(0.3)
    again = setting.get(question)
    assert again is not None and again.admitted and again.remaining == 4


def test_what_is_granted_too_late_is_given_back() -> None:
    setting = Setting()
    setting.store.fates = ["slow"]
    question = q(5, 1, timeout=0.1, interval=1000.0)
    got: list[Grant] = []
    setting.lessee.ask(question, got.append)
    setting.world.advance(0.3)
    assert [grant.admitted for grant in got] == [False] and got[0].error
    setting.world.advance(1.0)
    whole = setting.get(q(5, 1, cost=5, interval=1000.0))
    assert whole is not None and whole.admitted


@pytest.mark.parametrize(("burst", "warm"), [(5, 0), (400, 50)])
def test_give_back_undoes_a_spending_once(burst: int, warm: int) -> None:
    setting = Setting()
    setting.run(q(burst, 1), 100, warm / 100)
    one = q(burst, 1)
    before = setting.get(one)
    assert before is not None and before.admitted
    setting.lessee.give_back(one)
    setting.lessee.give_back(one)
    setting.lessee.give_back(q(burst, 1))
    after = setting.get(q(burst, 1))
    assert after is not None and after.admitted and after.remaining == before.remaining


def test_what_the_store_believes_to_be_spent_is_not_given_back_from_the_tokens_in_hand() -> None:
    setting = Setting()
    setting.run(q(400, 1), 100, 0.5)
    early, late = q(400, 1), q(400, 1)
    assert setting.get(early)
    setting.world.advance(2.5)  # renewed: it is reported now
    assert setting.get(late)
    held = setting.lessee.state()["tokens"]
    setting.lessee.give_back(early)
    assert setting.lessee.state()["tokens"] == held
    setting.lessee.give_back(late)
    assert setting.lessee.state()["tokens"] == held + 1


def test_a_new_lease_replaces_the_tokens_of_one_that_ended() -> None:
    setting = Setting()
    setting.run(q(400, 100), 100, 2)
    assert setting.lessee.state()["tokens"] > 0
    setting.store.fates = ["lost ask"] * 1000
    setting.world.advance(9.0)
    setting.store.fates = []
    assert setting.get(q(400, 100)) is not None
    (bucket, _), *_ = setting.memory._buckets.values()
    assert setting.lessee.state()["tokens"] == bucket.outstanding


def test_a_look_spends_nothing() -> None:
    setting = Setting()
    got: list[Grant] = []
    for _ in range(9):
        setting.lessee.peek(q(5, 1), got.append)
    assert [(grant.admitted, grant.remaining) for grant in got] == [(True, 5)] * 9
    setting.lessee.peek(q(5, 1, cost=9), got.append)
    assert not got[-1].admitted


def test_new_numbers_for_a_limit_take_hold_at_once() -> None:
    setting = Setting()
    assert setting.get(q(5, 1)) is not None
    for _ in range(10):
        setting.get(q(5, 1))
    setting.world.advance(1.0)
    setting.run(q(5, 1000), 100, 0.1)
    _, admitted, _ = setting.run(q(5, 1000), 100, 1)
    assert admitted == 100


class Gone:
    """A store that never answers but with failures."""

    def __init__(self) -> None:
        self.asks = 0

    def ask(self, key: str, ask: Ask, done: Done, *, strict: bool = False) -> None:
        self.asks += 1
        done(Failure("it is gone"))

    def state(self) -> dict[str, Any]:
        return {}

    async def close(self) -> None:
        return None


@pytest.mark.parametrize(
    ("mode", "admitted", "error"), [("Allow", 12, "it is gone"), ("Deny", 0, "it is gone"), ("Local", 5, "")]
)  # fmt: skip
def test_each_failure_mode_when_the_store_is_gone(mode: str, admitted: int, error: str) -> None:
    world = World()
    lessee = world.lessee(Gone(), sharers=2)
    got: list[Grant] = []
    for _ in range(12):
        question = q(10, 2, failure_mode=mode)
        assert lessee.take(question, world.now) is None
        lessee.ask(question, got.append)
    assert sum(grant.admitted for grant in got) == admitted
    assert {grant.error for grant in got} == {error}
    assert lessee.state()["failures"] == {mode: 12}
    if mode == "Local":
        assert got[-1].retry_after == pytest.approx(1.0)  # half of 2 a second
        world.advance(1.001)
        lessee.ask(q(10, 2, failure_mode=mode), got.append)
        assert got[-1].admitted


def test_that_the_store_fails_is_told_once_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    world = World()
    lessee = world.lessee(Gone())
    got: list[Grant] = []
    for told in (1, 1, 1, 2):
        lessee.ask(q(10, 2, failure_mode="Local"), got.append)
        assert [record.getMessage() for record in caplog.records] == [
            "the store of buckets cannot be asked (it is gone); limits go by their failureMode until it can"
        ] * told
        world.advance(20.1)


def test_the_number_of_buckets_and_of_those_who_wait_is_bounded() -> None:
    setting = Setting(max_buckets=10, max_waiting=5)
    for at in range(100):
        grant = setting.get(q(key=str(at)))
        assert grant is not None and grant.admitted
    assert setting.lessee.state()["buckets"] == 10
    setting.store.fates = ["slow"] * 100
    got: list[Grant] = []
    for at in range(8):
        setting.lessee.ask(q(key=f"w{at}", timeout=1.0), got.append)
    assert [grant.error for grant in got] == ["too many requests wait"] * 3
    setting.world.advance(0.5)
    assert len(got) == 8 and setting.lessee.state()["waiting"] == 0


def test_a_bucket_that_made_room_for_another_is_not_fuller_for_it() -> None:
    setting = Setting(max_buckets=1)
    question = q(5, 1, cost=5, interval=1000.0)
    answers = []
    for at in range(4):
        answers.append(setting.get(question))
        setting.get(q(key=f"another {at}"))
    assert [answer.admitted for answer in answers if answer] == [True, False, False, False]


def test_buckets_that_nobody_asks_about_are_forgotten() -> None:
    setting = Setting()
    for at in range(50):
        setting.get(q(key=str(at)))
    setting.world.advance(30.0)
    assert setting.lessee.state()["buckets"] == 0


def test_the_memory_store_keeps_every_bucket_that_is_not_full() -> None:
    world = World()
    store = MemoryStore(max_buckets=3, clock=world.store_clock)
    lessee = world.lessee(store)
    got: list[Grant] = []
    for at in range(4):
        lessee.ask(q(5, 1, key=str(at)), got.append)
    assert [grant.admitted for grant in got] == [True, True, True, False] and "too many" in got[3].error
    world.advance(20.0)
    lessee.ask(q(5, 1, key="4"), got.append)
    assert got[-1].admitted


def test_a_lease_lasts_as_long_as_it_was_asked_for_whatever_the_limit_says_by_then() -> None:
    """The store lent for three seconds, and expects nothing back after them."""
    setting = Setting(sharers=1)
    short, long = q(60, 60, interval=1.0), q(60, 60, interval=10.0)
    setting.run(short, 50, 2)
    lease = setting.lessee._leases[short.limit.name, short.key]
    flight = lease.next_ask("me", 10_000, setting.world.now, 1, None, renewing=True)
    assert flight.ask.ttl == 3_000_000
    lease.set_limit(long.limit)
    assert lease.ttl == LONGEST
    reply = setting.memory._buckets[lease.key][0]
    answer = Reply(10_000, lease.generation, 0, 5, 10, 0, 0, 0, 1, reply.stamp)
    lease.answered(answer, setting.world.now)
    assert lease.until <= flight.sent + 3.0


def test_what_is_in_hand_of_a_limit_that_is_lowered_goes_back() -> None:
    setting = Setting()
    high, low = q(1000, 1000), q(4, 4)
    setting.run(high, 300, 3)
    lease = setting.lessee._leases[high.limit.name, high.key]
    assert lease.tokens > 20
    setting.get(low)
    assert lease.tokens <= 2
    setting.world.advance(0.1)
    bucket = setting.memory._buckets[lease.key][0]
    assert bucket.outstanding <= 2 and bucket.level <= 4
    admitted = sum(grant is not None and grant.admitted for grant in (setting.get(low) for _ in range(50)))
    assert admitted <= 4


def test_what_was_lent_by_a_limit_that_was_lowered_meanwhile_goes_back() -> None:
    setting = Setting()
    high, low = q(1000, 1000), q(4, 4)
    setting.run(high, 300, 3)
    lease = setting.lessee._leases[high.limit.name, high.key]
    flight = lease.next_ask("me", 10_000, setting.world.now, 1, None, renewing=True)
    lease.set_limit(low.limit)
    lease.answered(Reply(10_000, lease.generation, 0, 300, 10, 0, 0, 0, 1, 0), setting.world.now)
    assert flight.ask.burst == 1000 and lease.tokens <= 2


def test_who_is_refused_without_a_bucket_is_counted_too() -> None:
    setting = Setting()
    blocked = TokenQuestion(msgspec.structs.replace(limit(), tokens=0), ("x",))
    for _ in range(3):
        grant = setting.get(blocked)
        assert grant is not None and not grant.admitted
    (found,) = setting.lessee.usage()["top"]
    assert (found["refused"], found["tokens"]) == (3, 0)
    setting.world.advance(600)
    assert setting.store.asks == 0
    open_again = setting.get(q())
    assert open_again is not None and open_again.admitted


def test_a_bucket_that_was_reset_is_asked_about_again() -> None:
    setting = Setting()
    question = q(1, 1, interval=3600.0)
    assert [getattr(setting.get(question), "admitted", None) for _ in range(2)] == [True, False]
    asks = setting.store.asks
    setting.get(question)
    assert setting.store.asks == asks
    setting.get(TokenQuestion(msgspec.structs.replace(question.limit, reset=1.0), question.key))
    assert setting.store.asks == asks + 1
