"""Whether a request that failed may be tried again, and after how long. Pure.

A request may be repeated without asking anybody when the upstream cannot have acted on it, or when its method says that acting twice is
acting once (RFC 9110 section 9.2.2). Anything more is the route's author's choice (Gateway API GEP-1731, `HTTPRouteRetry`). What has been
taken of a body and was not kept cannot be sent again, so then nothing is retried; and once an answer has begun to go to the client there
is nothing to retry.
"""

from __future__ import annotations

import enum
import random

import msgspec

from mesh.filters import RetryPolicy

IDEMPOTENT = frozenset((b"GET", b"HEAD", b"OPTIONS", b"PUT", b"DELETE"))
"""Methods of RFC 9110 section 9.2.2 that the gateway forwards."""
MOST_DOUBLINGS = 8
"""Of the backoff: 256 times the first."""


class Failure(enum.Enum):
    """How a try failed."""

    CONNECT = "connect"
    """No connection, no TLS, or not who it should be: the request was never sent."""
    UNPROCESSED = "unprocessed"
    """The upstream says that it did nothing with the request (REFUSED_STREAM, beyond its GOAWAY)."""
    STALE = "stale"
    """A kept connection ended before any byte of the answer: probably it was being closed when the request was sent."""
    RESET = "reset"
    """A connection ended before the answer's head, and it was not an old one."""
    TIMEOUT = "timeout"
    """The try took longer than the backend's timeout."""
    STATUS = "status"
    """There is an answer, with a status that the route would rather not pass on."""
    PROTOCOL = "protocol"
    """The answer is not HTTP."""
    REQUEST = "request"
    """The request's own fault."""


_FINAL = frozenset((Failure.PROTOCOL, Failure.REQUEST))
_BROKEN = frozenset((Failure.STALE, Failure.RESET, Failure.TIMEOUT))
_BLAMELESS = frozenset((Failure.CONNECT, Failure.STALE, Failure.UNPROCESSED, Failure.REQUEST))


class Try(msgspec.Struct, frozen=True):
    """What is known about a request when a try of it has failed."""

    failure: Failure
    status: int
    """That the client would get."""
    method: bytes
    taken: bool
    """Whether some of the request's body has been taken from the client, and is not kept."""
    tries: int
    """Tries so far, this one included."""
    answered: bool
    """Whether an answer's head has gone to the client."""


def may_retry(policy: RetryPolicy, tried: Try) -> bool:
    """Whether to try again."""
    if tried.answered or tried.taken or tried.tries > policy.attempts:
        return False
    failure = tried.failure
    if failure is Failure.CONNECT or failure is Failure.UNPROCESSED:
        return True
    if (failure is Failure.STALE or (policy.connection and failure in _BROKEN)) and tried.method in IDEMPOTENT:
        return True
    return failure not in _FINAL and tried.status in policy.statuses


def blames(failure: Failure) -> bool:
    """Whether a connection that broke so speaks against its endpoint (a failure to connect has been counted by who tried to)."""
    return failure not in _BLAMELESS


def pause(policy: RetryPolicy, failure: Failure, tries: int, elsewhere: bool, rng: random.Random) -> float:
    """Seconds to wait before the next try, after `tries` of them.

    None at all when the last one says nothing about the next: an old connection was closed, or another endpoint (`elsewhere`) is there for
    one that could not be reached and nobody asked for a pause. Else full jitter up to a doubling backoff, so that many clients do not come
    back together; or a little more than a doubling backoff where that is to be the least.
    """
    if failure is Failure.STALE:
        return 0.0
    doubled = policy.backoff * (1 << min(tries - 1, MOST_DOUBLINGS))
    if policy.at_least:
        return rng.uniform(doubled, doubled * 1.25)
    return 0.0 if failure is Failure.CONNECT and elsewhere else rng.uniform(0.0, doubled)
