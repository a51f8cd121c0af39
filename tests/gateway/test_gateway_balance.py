"""Balancers: shares, smoothness, and that no choice falls on who may not be chosen."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.balance import LeastRequest, RoundRobin, elsewhere, make, usable


class Place:
    def __init__(self, name: str, weight: int = 1, active: int = 0) -> None:
        self.name = name
        self.weight = weight
        self.active = active


def places(**weights: int) -> list[Place]:
    return [Place(name, weight) for name, weight in weights.items()]


class First(random.Random):
    def randrange(self, *_: object) -> int:  # type: ignore[override]
        return 0


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ({"a": 1}, "aaa"),
        ({"a": 1, "b": 1, "c": 1}, "abcabc"),
        ({"a": 7, "b": 7}, "abab"),
        ({"a": 5, "b": 1, "c": 1}, "aabacaaaabacaa"),
        ({"a": 2, "b": 1}, "abaaba"),
    ],
)
def test_round_robin_is_smooth(weights: dict[str, int], expected: str) -> None:
    balancer = RoundRobin(places(**weights), First())
    assert "".join(balancer.pick().name for _ in expected) == expected


@given(st.lists(st.integers(1, 20), min_size=1, max_size=8), st.integers(0, 2**32))
def test_a_round_gives_each_its_weight(weights: list[int], seed: int) -> None:
    them = [Place(str(at), weight) for at, weight in enumerate(weights)]
    balancer = RoundRobin(them, random.Random(seed))
    picked = Counter(balancer.pick().name for _ in range(sum(weights)))
    assert all(picked[place.name] == place.weight for place in them)


def test_who_stays_keeps_the_turn() -> None:
    a, b, _ = them = places(a=5, b=1, c=1)
    balancer = RoundRobin(them, First())
    assert [balancer.pick() for _ in range(2)] == [a, a]
    balancer.replace([a, b])
    assert [balancer.pick() for _ in range(2)].count(b) == 1
    balancer.replace(them)
    assert Counter(balancer.pick().name for _ in range(7))["c"] >= 1


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=6), st.integers(0, 2**32))
def test_least_request_takes_the_less_busy_of_two(them: list[tuple[int, int]], seed: int) -> None:
    made = [Place(str(at), weight, active) for at, (weight, active) in enumerate(them)]
    balancer = LeastRequest(made, random.Random(seed))
    for _ in range(30):
        picked = balancer.pick()
        # Only the strictly busiest for its weight can never win against another.
        if len(made) > 1:
            assert any(picked.active * other.weight <= other.active * picked.weight for other in made if other is not picked)


def test_least_request_goes_by_weight_when_all_are_idle() -> None:
    them = places(a=3, b=1)
    balancer = LeastRequest(them, random.Random(5))
    picked = Counter(balancer.pick().name for _ in range(4000))
    assert 2700 < picked["a"] < 3300


def test_least_request_prefers_the_idle_one() -> None:
    busy, idle = Place("busy", 1, 10), Place("idle", 1, 0)
    balancer = LeastRequest([busy, idle], random.Random(5))
    assert {balancer.pick().name for _ in range(50)} == {"idle"}


@pytest.mark.parametrize(
    ("weights", "ejected", "expected"),
    [
        ({"a": 1, "b": 1}, "", "ab"),
        ({"a": 1, "b": 1}, "a", "b"),
        ({"a": 1, "b": 1}, "ab", "ab"),
        ({"a": 0, "b": 1}, "", "b"),
        ({"a": 0, "b": 1}, "b", "b"),
        ({"a": 0}, "", ""),
        ({}, "", ""),
    ],
)
def test_who_may_be_chosen(weights: dict[str, int], ejected: str, expected: str) -> None:
    them = places(**weights)
    assert "".join(place.name for place in usable(them, {place for place in them if place.name in ejected})) == expected


def test_elsewhere_is_somewhere_new() -> None:
    a, b = places(a=1, b=1)
    rng = random.Random(1)
    assert elsewhere([a, b], (a,), rng) is b
    assert elsewhere([a, b], (a, b), rng) is None


def test_made_by_name() -> None:
    rng = random.Random(1)
    assert isinstance(make("round_robin", places(a=1), rng), RoundRobin)
    assert isinstance(make("least_request", places(a=1), rng), LeastRequest)
