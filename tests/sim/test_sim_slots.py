"""Many stories of concurrency limits under faults, and decision code that is wrong on purpose."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from tests.sim.slot_mutants import SLOT_MUTANTS
from tests.sim.slots import slots_wrong_with

SEEDS = 120
CHUNK = 20


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)  # that the store fails is what this is about
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("first", range(0, SEEDS, CHUNK))
def test_no_story_of_slots_breaks_what_must_hold(first: int) -> None:
    wrong = [found for seed in range(first, first + CHUNK) if (found := slots_wrong_with(seed))]
    assert not wrong, "\n\n".join(wrong)


@pytest.mark.parametrize("name", SLOT_MUTANTS)
def test_slots_code_that_is_wrong_is_caught(name: str) -> None:
    assert any(slots_wrong_with(seed, **SLOT_MUTANTS[name]) for seed in range(SEEDS))
