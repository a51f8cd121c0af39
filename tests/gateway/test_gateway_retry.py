"""What may be retried, as a table; and the pause before."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.retry import IDEMPOTENT, Failure, Try, blames, may_retry, pause
from mesh.filters import RetryPolicy

F = Failure
PLAIN = RetryPolicy(attempts=2)
CONNECTION = RetryPolicy(attempts=2, connection=True)
STATUSES = RetryPolicy(attempts=2, statuses=(503, 504, 502))


def a_try(failure: Failure, status: int = 503, method: bytes = b"GET", taken: bool = False, tries: int = 1, answered: bool = False) -> Try:
    return Try(failure, status, method, taken, tries, answered)


@pytest.mark.parametrize(
    ("policy", "tried", "expected"),
    [
        (PLAIN, a_try(F.CONNECT), True),
        (PLAIN, a_try(F.CONNECT, method=b"POST"), True),
        (PLAIN, a_try(F.CONNECT, tries=2), True),
        (PLAIN, a_try(F.CONNECT, tries=3), False),
        (RetryPolicy(attempts=0), a_try(F.CONNECT), False),
        (PLAIN, a_try(F.UNPROCESSED, method=b"POST"), True),
        (PLAIN, a_try(F.UNPROCESSED, method=b"POST", taken=True), False),
        (PLAIN, a_try(F.STALE), True),
        (PLAIN, a_try(F.STALE, method=b"DELETE"), True),
        (PLAIN, a_try(F.STALE, method=b"POST"), False),
        (PLAIN, a_try(F.STALE, method=b"PATCH"), False),
        (PLAIN, a_try(F.STALE, method=b"PUT", taken=True), False),
        (PLAIN, a_try(F.STALE, answered=True), False),
        (PLAIN, a_try(F.RESET, 502), False),
        (STATUSES, a_try(F.RESET, 502), True),
        (PLAIN, a_try(F.TIMEOUT, 504), False),
        (STATUSES, a_try(F.TIMEOUT, 504), True),
        (STATUSES, a_try(F.TIMEOUT, 504, answered=True), False),
        (PLAIN, a_try(F.STATUS, 503), False),
        (STATUSES, a_try(F.STATUS, 503), True),
        (STATUSES, a_try(F.STATUS, 500), False),
        (STATUSES, a_try(F.STATUS, 503, method=b"POST", taken=True), False),
        (CONNECTION, a_try(F.RESET, 502), True),
        (CONNECTION, a_try(F.TIMEOUT, 504, method=b"PUT"), True),
        (CONNECTION, a_try(F.RESET, 502, method=b"POST"), False),
        (CONNECTION, a_try(F.STALE, method=b"POST"), False),
        (CONNECTION, a_try(F.RESET, 502, taken=True), False),
        (CONNECTION, a_try(F.STATUS, 503), False),
        (CONNECTION, a_try(F.PROTOCOL, 502), False),
        (STATUSES, a_try(F.PROTOCOL, 502), False),
        (STATUSES, a_try(F.REQUEST, 502), False),
    ],
)
def test_what_may_be_retried(policy: RetryPolicy, tried: Try, expected: bool) -> None:
    assert may_retry(policy, tried) is expected


TRIES = st.builds(
    Try,
    st.sampled_from(list(Failure)),
    st.integers(400, 599),
    st.sampled_from([b"GET", b"POST", b"PUT", b"PATCH", b"X"]),
    st.booleans(),
    st.integers(1, 9),
    st.booleans(),
)


@given(TRIES, st.integers(0, 5), st.lists(st.integers(400, 599), max_size=5), st.booleans())
def test_never_twice_what_may_have_been_done(tried: Try, attempts: int, statuses: list[int], connection: bool) -> None:
    policy = RetryPolicy(attempts=attempts, statuses=tuple(statuses), connection=connection)
    if may_retry(policy, tried):
        assert not tried.answered
        assert not tried.taken
        assert tried.tries <= attempts
        never_acted = tried.failure in (F.CONNECT, F.UNPROCESSED)
        harmless = (tried.failure is F.STALE or connection) and tried.method in IDEMPOTENT
        assert never_acted or harmless or tried.status in statuses


@given(st.sampled_from(list(Failure)), st.integers(1, 40), st.booleans(), st.integers(0, 2**32))
def test_pauses_are_bounded(failure: Failure, tries: int, elsewhere: bool, seed: int) -> None:
    seconds = pause(RetryPolicy(backoff=0.02), failure, tries, elsewhere, random.Random(seed))
    assert 0 <= seconds <= 0.02 * min(2 ** (tries - 1), 256)
    if failure is F.STALE or (failure is F.CONNECT and elsewhere):
        assert seconds == 0


@given(st.sampled_from(list(Failure)), st.integers(1, 40), st.booleans(), st.integers(0, 2**32))
def test_the_least_pause_is_kept(failure: Failure, tries: int, elsewhere: bool, seed: int) -> None:
    seconds = pause(RetryPolicy(backoff=0.02, at_least=True), failure, tries, elsewhere, random.Random(seed))
    if failure is F.STALE:
        assert seconds == 0
    else:
        assert 0.02 <= seconds <= 0.02 * 1.25 * min(2 ** (tries - 1), 256)


def test_whose_fault_it_is() -> None:
    assert {failure for failure in Failure if blames(failure)} == {F.RESET, F.TIMEOUT, F.STATUS, F.PROTOCOL}
