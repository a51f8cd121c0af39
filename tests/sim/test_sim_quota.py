"""Many stories of fleets under faults, and decision code that is wrong on purpose."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator

import pytest

from mesh.model import QuotaLimit
from quota.store import bucket_key
from tests.sim.calendars import wrong_with_calendar
from tests.sim.mutants import MUTANTS, OF_CALENDARS
from tests.sim.network import Weather
from tests.sim.story import END, MEASURED_FROM, Shape, Story, wrong_with

SEEDS = 1000
CALENDAR_SEEDS = 300
CHUNK = 50


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)  # that the store fails is what this is about
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("first", range(0, SEEDS, CHUNK))
def test_no_story_breaks_what_must_hold(first: int) -> None:
    wrong = [found for seed in range(first, first + CHUNK) if (found := wrong_with(seed))]
    assert not wrong, "\n\n".join(wrong)


@pytest.mark.parametrize("first", range(0, CALENDAR_SEEDS, CHUNK))
def test_no_story_of_a_calendar_breaks_what_must_hold(first: int) -> None:
    wrong = [found for seed in range(first, first + CHUNK) if (found := wrong_with_calendar(seed))]
    assert not wrong, "\n\n".join(wrong)


@pytest.mark.parametrize("name", MUTANTS)
def test_decision_code_that_is_wrong_is_caught(name: str) -> None:
    wrong = wrong_with_calendar if name in OF_CALENDARS else wrong_with
    assert any(wrong(seed, **MUTANTS[name]) for seed in range(SEEDS))


def test_a_seed_is_a_story() -> None:
    one, other = Story(7).run(), Story(7).run()
    assert [(each.at, each.cost) for each in one.admitted["k0"]] == [(each.at, each.cost) for each in other.admitted["k0"]]
    assert one.told == other.told


def fair(gateways: int, tokens: int, burst: int, demand: float, interval: float = 1.0) -> Shape:
    limit = QuotaLimit(name="sim/limit", level="route", per=(), tokens=tokens, interval=interval, burst=burst)
    return Shape(limit, gateways, 1, (1,), demand, 0.0, Weather(delay=0.0005), (), (), True)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("tokens", "burst"), [(200, 100), (200, 400), (500, 2000)])
def test_ten_gateways_of_unequal_and_shifting_load_use_a_limit_up(tokens: int, burst: int, seed: int) -> None:
    assert Story(seed, shape=fair(10, tokens, burst, 1.5)).run().used(MEASURED_FROM, END) >= 0.97


@pytest.mark.parametrize("lost", [0.0, 0.2])
def test_one_a_minute_for_fifty_gateways(lost: float) -> None:
    """Three are asked for each minute, for a quarter of an hour: never more than one is admitted, and a lost answer loses one at most."""
    shape = fair(50, 1, 1, 3.0, 60.0)
    shape.weather.lost = lost
    story = Story(1, shape=shape)
    story.until(900.0)
    admitted = [each.at for each in story.admitted["k0"]]
    gaps = [later - earlier for earlier, later in itertools.pairwise(admitted)]
    assert min(gaps) >= 60.0 - 1e-3
    waited_for = sum(gap - 60.0 for gap in gaps) / 60.0  # minutes in which a token was there and nobody got it, or nobody came
    assert len(admitted) + sum(link.lost for link in story.links) + waited_for >= 14
    assert story.redis.granted[bucket_key(shape.limit.name, ("k0",))] >= len(admitted)
