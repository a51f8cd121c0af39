"""Breakers, back-offs and quarantine: pure, over a made-up clock."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from mesh.backoff import Backoff
from pdp.breaker import Breaker
from pdp.engines.quarantine import Quarantine

BAD = ("sha256:1", "shop.authz.bad")


def test_waits_double_up_to_a_bound_and_begin_anew() -> None:
    backoff = Backoff(0.1, 0.5, random.Random(1))
    waits = [backoff.next() for _ in range(6)]
    for wait, step in zip(waits, (0.1, 0.2, 0.4, 0.5, 0.5, 0.5), strict=True):
        assert step / 2 <= wait <= step
    backoff.reset()
    assert backoff.next() <= 0.1


def test_a_breaker_opens_lets_one_through_and_closes() -> None:
    breaker = Breaker(2, Backoff(1.0, 8.0))
    breaker.failed(0.0)
    assert breaker.ready(0.0)
    breaker.failed(0.0)
    assert not breaker.ready(0.4)
    assert breaker.ready(1.0)
    breaker.begin(1.0, 0.5)
    assert not breaker.ready(1.1), "there is one trial at a time"
    assert breaker.ready(1.5), "a trial that never ends does not block the next for ever"
    breaker.begin(1.5, 0.5)
    breaker.failed(1.6)
    assert not breaker.ready(2.5), "the second wait is longer"
    assert breaker.ready(3.6)
    breaker.succeeded()
    assert breaker.ready(0.0)
    assert breaker.opened == 2


def test_what_was_on_its_way_when_a_breaker_opened_does_not_make_the_wait_longer() -> None:
    breaker = Breaker(2, Backoff(1.0, 1000.0))
    for _ in range(50):
        breaker.failed(0.1)
    assert breaker.ready(1.2)
    assert breaker.opened == 1


@given(st.lists(st.tuples(st.sampled_from(["ok", "bad", "begin"]), st.floats(0, 3)), max_size=60))
def test_a_breaker_is_never_open_for_good(steps: list[tuple[str, float]]) -> None:
    breaker, now = Breaker(3, Backoff(0.1, 2.0)), 0.0
    for what, later in steps:
        now += later
        if what == "ok":
            breaker.succeeded()
            assert breaker.ready(now)
        elif what == "bad":
            breaker.failed(now)
        elif breaker.ready(now):
            breaker.begin(now, 0.5)
    assert breaker.ready(now + 2.5)


def test_what_ends_workers_is_put_aside_longer_each_time() -> None:
    quarantine = Quarantine(deaths=2, window=60.0, term=10.0, longest=40.0)
    assert not quarantine
    assert not quarantine.blame(BAD, 0.0)
    assert quarantine.remaining(BAD, 0.0) == 0.0
    assert quarantine.blame(BAD, 30.0)
    assert quarantine.remaining(BAD, 31.0) == 9.0
    assert quarantine.remaining(BAD, 41.0) == 0.0
    assert quarantine.remaining(("sha256:1", "other"), 31.0) == 0.0
    assert quarantine.blame(BAD, 50.0), "one more is enough now"
    assert quarantine.remaining(BAD, 50.0) == 20.0
    assert quarantine.blame(BAD, 80.0)
    assert quarantine.blame(BAD, 130.0)
    assert quarantine.remaining(BAD, 130.0) == 40.0, "there is a bound"
    assert not quarantine.blame(BAD, 500.0), "a long quiet time clears it"


def test_deaths_far_apart_put_nothing_aside() -> None:
    quarantine = Quarantine(deaths=2, window=60.0)
    assert not any(quarantine.blame(BAD, 61.0 * n) for n in range(10))


def test_what_is_remembered_is_bounded() -> None:
    quarantine = Quarantine(deaths=1)
    for n in range(3000):
        quarantine.blame(("sha256:1", str(n)), 0.0)
    assert quarantine.remaining(("sha256:1", "2999"), 0.0) > 0
    assert quarantine.remaining(("sha256:1", "0"), 0.0) == 0.0
