"""Outlier detection: what counts, how long, and how many at once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.outlier import LONGEST, Health, Result, may_eject, observe, result_of
from mesh.model import OutlierDetection

S, E, G = Result.SUCCESS, Result.SERVER_ERROR, Result.GATEWAY_ERROR
SETTINGS = OutlierDetection(consecutive_5xx=5, consecutive_gateway_errors=3, base_ejection=10.0)


@pytest.mark.parametrize(
    ("status", "expected"), [(200, S), (304, S), (404, S), (499, S), (500, E), (501, E), (502, G), (503, G), (504, G), (505, E)]
)
def test_what_a_status_means(status: int, expected: Result) -> None:
    assert result_of(status) is expected


@pytest.mark.parametrize(
    ("results", "reason"),
    [
        ([E] * 4, None),
        ([E] * 5, E),
        ([G] * 2, None),
        ([G] * 3, G),
        ([G, G, E, G, G], E),  # five errors, never three gateway errors in a row
        ([G, G, S, G, G], None),
        ([E] * 4 + [S] + [E] * 4, None),
    ],
)
def test_what_leads_to_an_ejection(results: list[Result], reason: Result | None) -> None:
    health = Health()
    found = [observe(health, result, SETTINGS, 100.0, 0, 2) for result in results]
    assert all(ejection is None for ejection in found[:-1])
    last = found[-1]
    assert (last.reason if last else None) is reason
    if last:
        assert last.until == 110.0
        assert health.ejected(109.9)
        assert not health.ejected(110.0)


def eject(health: Health, now: float) -> float:
    for _ in range(2):
        observe(health, G, SETTINGS, now, 0, 2)
    ejection = observe(health, G, SETTINGS, now, 0, 2)
    assert ejection is not None
    return ejection.until - now


def test_each_ejection_is_longer_and_time_heals() -> None:
    health = Health()
    assert eject(health, 0.0) == 10.0
    assert eject(health, 10.0) == 20.0
    assert eject(health, 30.0) == 30.0
    # Returned at 60; after 25 s two of the three are forgotten.
    assert eject(health, 85.0) == 20.0
    assert eject(health, 10_000.0) == 10.0


def test_there_is_a_longest() -> None:
    health = Health()
    now = 0.0
    for _ in range(50):
        lasted = eject(health, now)
        assert lasted <= LONGEST
        now = health.until
    assert lasted == LONGEST


def test_zero_switches_off() -> None:
    settings = OutlierDetection(consecutive_5xx=0, consecutive_gateway_errors=0)
    health = Health()
    assert all(observe(health, G, settings, 0.0, 0, 9) is None for _ in range(100))


@pytest.mark.parametrize(
    ("ejected", "total", "percent", "expected"),
    [
        (0, 0, 100, False),
        (0, 1, 100, False),
        (0, 2, 0, True),
        (0, 2, 50, True),
        (1, 2, 50, False),
        (1, 2, 100, True),
        (1, 4, 50, True),
        (2, 4, 50, False),
        (2, 5, 50, False),
        (4, 4, 100, False),
    ],
)
def test_how_many_at_once(ejected: int, total: int, percent: int, expected: bool) -> None:
    assert may_eject(ejected, total, percent) is expected


@given(
    st.lists(st.tuples(st.integers(0, 5), st.sampled_from([S, E, G]), st.floats(0, 30)), max_size=200),
    st.integers(1, 6),
    st.integers(0, 100),
)
def test_never_more_than_allowed(results: list[tuple[int, Result, float]], total: int, percent: int) -> None:
    settings = OutlierDetection(consecutive_5xx=2, consecutive_gateway_errors=2, base_ejection=10.0, max_ejection_percent=percent)
    them = [Health() for _ in range(total)]
    now = 0.0
    for at, result, passed in results:
        now += passed
        out = sum(health.ejected(now) for health in them)
        health = them[at % total]
        before = health.ejected(now)
        ejection = observe(health, result, settings, now, out, total)
        assert not (before and ejection)
        out = sum(one.ejected(now) for one in them)
        assert out <= max(1 if total > 1 else 0, total * percent // 100)
        if result is S:
            assert health.errors == health.gateway_errors == 0
