"""Who gets which connection."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.assign import Assignment, assign, casualties


@pytest.mark.parametrize(
    ("waiting", "free", "dialing", "slots", "room", "idle", "expected"),
    [
        (0, [], 0, 1, 9, 0, Assignment((), 0, 0)),
        (1, [], 0, 1, 9, 0, Assignment((), 1, 0)),
        (3, [], 0, 1, 9, 0, Assignment((), 3, 0)),
        (3, [], 2, 1, 9, 0, Assignment((), 1, 0)),
        (1, [], 2, 1, 9, 0, Assignment((), 0, 0)),
        (3, [1, 1], 0, 1, 9, 0, Assignment((1, 1), 1, 0)),
        (1, [1, 1], 0, 1, 9, 0, Assignment((1, 0), 0, 0)),
        (3, [], 0, 1, 2, 0, Assignment((), 2, 0)),
        (3, [], 0, 1, 0, 0, Assignment((), 0, 0)),
        (3, [], 0, 1, 0, 2, Assignment((), 2, 2)),
        (3, [], 0, 1, 2, 5, Assignment((), 3, 1)),
        (2, [], 0, 1, -1, 5, Assignment((), 2, 3)),
        (2, [], 0, 1, -9, 5, Assignment((), 0, 0)),
        (70, [], 0, 64, 9, 0, Assignment((), 2, 0)),
        (70, [10], 1, 64, 9, 0, Assignment((10,), 0, 0)),
        (5, [0, 3], 0, 64, 9, 0, Assignment((0, 3), 1, 0)),
    ],
)
def test_assign(waiting: int, free: list[int], dialing: int, slots: int, room: int, idle: int, expected: Assignment) -> None:
    assert assign(waiting, free, dialing, slots, room, idle) == expected


@given(
    st.integers(0, 200),
    st.lists(st.integers(0, 100), max_size=6),
    st.integers(0, 20),
    st.sampled_from([1, 64]),
    st.integers(-5, 20),
    st.integers(0, 8),
)
def test_assignments_fit(waiting: int, free: list[int], dialing: int, slots: int, room: int, idle: int) -> None:
    made = assign(waiting, free, dialing, slots, room, idle)
    assert len(made.grants) == len(free)
    assert all(0 <= granted <= have for granted, have in zip(made.grants, free, strict=True))
    assert sum(made.grants) == min(waiting, sum(free))
    assert 0 <= made.evictions <= idle
    assert made.dials <= max(0, room + made.evictions)
    left = waiting - sum(made.grants)
    # Nobody waits for nothing while there is room, and nothing is made that nobody waits for.
    if room + idle > 0 and left > dialing * slots:
        assert made.dials > 0
    assert (made.dials + dialing - 1) * slots < left or not made.dials


@pytest.mark.parametrize(
    ("waiting", "dialing", "slots", "opened", "expected"),
    [
        (0, 0, 1, 0, 0),
        (1, 0, 1, 0, 1),
        (3, 2, 1, 0, 1),
        (9, 0, 1, 0, 9),
        (9, 0, 1, 1, 1),
        (9, 0, 64, 0, 9),
        (9, 1, 64, 0, 0),
        (2, 2, 1, 0, 0),
    ],
)
def test_casualties(waiting: int, dialing: int, slots: int, opened: int, expected: int) -> None:
    assert casualties(waiting, dialing, slots, opened) == expected
