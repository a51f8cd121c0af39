"""A lessee's slots, with time that passes when the test says, and a store that is there or not."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from quota_world import World

from mesh.model import QuotaLimit
from mesh.questions import Grant, SlotGrant, SlotQuestion, TokenQuestion
from quota.lessee import QuotaLessee
from quota.memory import MemoryStore
from quota.slot_lessee import CALLERS
from quota.slots import SlotAsk, fill
from quota.store import Failure, SlotsDone


def limit(concurrency: int = 4, **more: Any) -> QuotaLimit:
    return QuotaLimit(name="shop/orders/at-once", level="route", per=(), tokens=0, concurrency=concurrency, **more)


class Away:
    """A store that can be away."""

    def __init__(self, world: World) -> None:
        self.inner = MemoryStore(clock=world.store_clock)
        self.away = False
        self.asks = 0

    def ask_slots(self, key: str, ask: SlotAsk, done: SlotsDone, *, strict: bool = False) -> None:
        self.asks += 1
        if self.away:
            done(Failure("away"))
        else:
            self.inner.ask_slots(key, ask, done, strict=strict)

    def state(self) -> dict[str, Any]:
        return {}


class One:
    """A world with two lessees at one store."""

    def __init__(self, **more: Any) -> None:
        self.world = World()
        self.store = Away(self.world)
        self.one = self.world.lessee(self.store, sharers=2)
        self.other = self.world.lessee(self.store, sharers=2)
        self.limit = limit(**more)

    def get(self, lessee: QuotaLessee | None = None, concurrency: int = 0) -> Grant:
        wanted = msgspec.structs.replace(self.limit, concurrency=concurrency) if concurrency else self.limit
        question = TokenQuestion(wanted, ("k",))
        lessee = lessee or self.one
        grant = lessee.take(question, 0.0)
        if grant is None:
            found: list[Grant] = []
            lessee.ask(question, found.append)
            (grant,) = found
        return grant


def slots(grants: list[Grant]) -> list[SlotGrant]:
    return [each for each in grants if isinstance(each, SlotGrant)]


def test_steady_traffic_asks_seldom_and_what_is_idle_goes_back() -> None:
    made = One(concurrency=40)
    for _ in range(1000):
        held = slots([made.get() for _ in range(3)])
        made.world.advance(0.01)
        for each in held:
            each.slot.release()
    assert made.store.asks < 15
    made.world.advance(2.5)
    assert made.one.slots.held == 0


def test_a_lease_is_renewed_for_as_long_as_something_is_in_progress() -> None:
    made = One()
    (held,) = slots([made.get()])
    made.world.advance(120.0)
    assert made.one.slots.in_use == 1 and made.one.slots.lapsed == 0
    assert len(slots([made.get(made.other) for _ in range(6)])) == 3
    held.slot.release()
    made.world.advance(2.5)
    assert len(slots([made.get(made.other) for _ in range(6)])) == 1


@pytest.mark.parametrize(("mode", "admitted", "error"), [("Deny", 0, True), ("Allow", 6, True), ("Local", 2, False)])
def test_without_the_store_the_failure_mode_answers_and_what_it_admits_is_counted_later(mode: Any, admitted: int, error: bool) -> None:
    made = One(failure_mode=mode)
    made.store.away = True
    grants = [made.get() for _ in range(6)]
    assert len(slots(grants)) == admitted and bool(grants[0].error) is error
    made.store.away = False
    made.world.advance(1.5)
    assert len(slots([made.get(made.other) for _ in range(6)])) == max(0, 4 - admitted)
    for each in slots(grants):
        each.slot.release()
    made.world.advance(3.0)
    assert made.one.slots.in_use == 0


def test_requests_that_outlive_their_lease_go_on_and_are_counted_again() -> None:
    made = One()
    held = slots([made.get() for _ in range(3)])
    made.store.away = True
    made.world.advance(9.3)
    assert made.one.slots.lapsed == 0
    assert made.get(made.one).admitted is False  # there is no slot in hand that could be used
    made.world.advance(1.0)
    assert made.one.slots.lapsed == 3 and made.one.slots.in_use == 3
    made.store.away = False
    assert len(slots([made.get(made.other) for _ in range(4)])) == 4  # the store has given up on them
    made.world.advance(1.0)
    assert not made.get().admitted and not made.get(made.other).admitted
    for each in held:
        each.slot.release()
    made.world.advance(3.0)
    assert made.one.slots.held == 0


def test_a_strict_limit_cuts_off_what_outlives_its_lease() -> None:
    made = One(strict=True)
    cut: list[int] = []
    held = slots([made.get() for _ in range(3)])
    for number, each in enumerate(held):
        each.slot.on_cut(lambda number=number: cut.append(number))
    made.world.advance(60.0)
    made.store.away = True
    made.world.advance(9.5)
    assert sorted(cut) == [0, 1, 2] and made.one.slots.in_use == 0
    for each in held:
        each.slot.release()
        each.slot.on_cut(lambda: cut.append(9))
    assert cut[3:] == [9, 9, 9]


def test_a_limit_that_is_lowered_takes_nothing_away_and_lets_nothing_in() -> None:
    made = One()
    held = slots([made.get() for _ in range(4)])
    assert not made.get(concurrency=2).admitted
    made.world.advance(30.0)
    assert made.one.slots.in_use == 4
    for each in held[:2]:
        each.slot.release()
    made.world.advance(0.1)
    assert not made.get(concurrency=2).admitted
    held[2].slot.release()
    made.world.advance(0.1)
    assert made.get(concurrency=2).admitted


def test_one_gateway_does_not_keep_another_out() -> None:
    made = One(concurrency=10)
    held = slots([made.get() for _ in range(10)])
    assert not made.get(made.other).admitted
    theirs: list[SlotGrant] = []
    for _ in range(20):  # both have always more to do
        made.world.advance(0.03)
        held.pop(0).slot.release()
        held += slots([made.get() for _ in range(3)])
        theirs += slots([made.get(made.other) for _ in range(3)])
        made.world.advance(0.03)
    assert len(held) == 5 and len(theirs) == 5


@pytest.mark.parametrize(
    ("wants", "room", "level"),
    [
        ([(3.0, 1.0), (3.0, 1.0)], 10.0, 3.0),
        ([(8.0, 1.0), (8.0, 1.0)], 10.0, 5.0),
        ([(2.0, 1.0), (9.0, 1.0), (9.0, 1.0)], 10.0, 4.0),
        ([(9.0, 1.0), (9.0, 3.0)], 8.0, 2.0),
        ([], 8.0, 0.0),
    ],
)
def test_shares_are_weighted_and_max_min(wants: list[tuple[float, float]], room: float, level: float) -> None:
    assert fill(wants, room) == pytest.approx(level)


def test_callers_that_are_many_share_one_lease_and_bound_the_record() -> None:
    made = One(concurrency=1000)
    for _ in range(2):
        grants = []
        for number in range(200):
            question = SlotQuestion(made.limit, ("k",), 1, f"caller {number}")
            grant = made.one.take(question, 0.0)
            if grant is None:
                found: list[Grant] = []
                made.one.ask(question, found.append)
                (grant,) = found
            grants.append(grant)
        assert len(slots(grants)) == 200
        assert len(made.one.slots.leases()) == CALLERS + 1
        (kept,) = made.store.inner._slots.values()
        assert len(kept[0].holders) == CALLERS + 1
        for each in slots(grants):
            each.slot.release()
        assert made.one.slots.in_use == 0
    made.world.advance(20.0)
    assert made.one.slots.leases() == [] and made.one.slots._groups == {}


def test_what_is_held_back_is_for_those_who_are_named() -> None:
    made = One(concurrency=4)
    held: list[Grant] = []
    for caller, reserve in [("a", 1)] * 6 + [("b", 0)] * 3:
        made.one.ask(SlotQuestion(made.limit, ("k",), 1, caller, 1, reserve), held.append)
    assert [each.admitted for each in held] == [True] * 3 + [False] * 3 + [True, False, False]
