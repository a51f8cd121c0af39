"""Who gets how many of a concurrency limit's slots while there are too few, in simulated fleets; and code that is wrong about it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import msgspec
import pytest

import quota.slots
from quota.slots import SlotAsk, SlotReply, Slots, apply_slots
from tests.sim.redis import ApplySlots, Broken
from tests.sim.shares import Caller, SharedStory
from tests.sim.slots import CALM

N = 30
STORIES: dict[str, list[Caller]] = {
    "three alike": [Caller("a", 60), Caller("b", 60), Caller("c", 60)],
    "one of more weight": [Caller("a", 60), Caller("b", 60), Caller("c", 60, 3)],
    "one that wants little": [Caller("a", 120), Caller("b", 60), Caller("c", 4)],
    "one that comes late": [Caller("a", 120), Caller("b", 60, since=CALM)],
    "some held back": [Caller("a", 120, 1, 6), Caller("b", 60, 1, 6), Caller("c", 2)],
    "alone": [Caller("a", 120)],
}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def wrong_with_shares(name: str, seed: int, apply_slots_: ApplySlots = apply_slots) -> str:
    """What is wrong with who got how much; empty when nothing is."""
    callers = STORIES[name]
    story = SharedStory(seed, N, callers, apply_slots_=apply_slots_)
    try:
        story.run()
    except Broken as broken:
        return str(broken)
    held_back = max(each.reserve for each in callers)
    room = N - held_back
    greedy = [each for each in callers if each.demand > N]
    modest = [each for each in callers if each.demand <= N]
    left = room - sum(each.demand for each in modest if held_back == 0 or each.reserve)
    whole = sum(each.weight for each in greedy)
    for each in greedy:
        due = left * each.weight / whole
        if not 0.8 * due <= story.shares[each.name] <= 1.15 * due + 1:
            return f"{each.name} had {story.shares[each.name]:.1f} in progress, and {due:.1f} are its share"
    for each in modest:
        refused = story.refusals[each.name] / (story.refusals[each.name] + story.passed[each.name])
        if refused > (0.02 if held_back else 0.2):
            return f"{each.name} was refused {refused:.2f} of its requests, and wants less than its share"
    if sum(story.shares.values()) < 0.85 * (room + sum(each.demand for each in modest if held_back and not each.reserve)):
        return f"only {sum(story.shares.values()):.1f} were in progress"
    return ""


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", STORIES)
def test_each_caller_has_its_share_and_what_it_does_not_want_is_lent(name: str, seed: int) -> None:
    assert wrong_with_shares(name, seed) == ""


def no_weights(slots: Slots, ask: SlotAsk, now: int) -> SlotReply:
    """All weigh alike."""
    return apply_slots(slots, msgspec.structs.replace(ask, weight=1), now)


def no_callers(slots: Slots, ask: SlotAsk, now: int) -> SlotReply:
    """Only lessees share, not callers."""
    reply = apply_slots(slots, msgspec.structs.replace(ask, caller=ask.holder), now)
    return msgspec.structs.replace(reply, most=ask.limit)


def nothing_held_back(slots: Slots, ask: SlotAsk, now: int) -> SlotReply:
    """What is held back is lent to everybody."""
    return apply_slots(slots, msgspec.structs.replace(ask, reserve=0), now)


@pytest.mark.parametrize(
    ("name", "mutant"),
    [("one of more weight", no_weights), ("one that wants little", no_callers), ("some held back", nothing_held_back)],
)
def test_shares_that_are_wrong_are_noticed(name: str, mutant: Callable[..., SlotReply]) -> None:
    assert any(wrong_with_shares(name, seed, mutant) for seed in range(4))


def test_the_ordinary_never_have_what_is_held_back() -> None:
    slots = Slots(0, 1)
    ask = SlotAsk("a", 1, 0, 0, 50, 0, 0, 1, 10, quota.slots.TTL, reserve=3)
    assert apply_slots(slots, ask, 1).held == 7
    more = msgspec.structs.replace(ask, holder="b", reserve=0)
    assert apply_slots(slots, more, 2).held == 3
    back = msgspec.structs.replace(ask, seq=2, keep=0, busy=0, need=0)
    assert apply_slots(slots, back, 3).held == 0
    assert apply_slots(slots, msgspec.structs.replace(more, seq=2, keep=3, busy=3), 4).held == 10  # nobody else wants any
