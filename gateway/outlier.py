"""Outlier detection: which endpoints of a cluster to stop using, and when to try them again.

Pure: results and the time in, ejections out. Envoy's consecutive-5xx and consecutive-gateway-failure detection (envoyproxy.io, "Outlier
detection"): a try that got no answer counts as a gateway error; an ejection lasts `base_ejection` times the number of ejections that the
endpoint has had, and one of these is forgotten for each `base_ejection` in which it was not ejected.
"""

from __future__ import annotations

import enum

import msgspec

from mesh.model import OutlierDetection

LONGEST = 300.0
"""Seconds that an ejection lasts at most (Envoy's `max_ejection_time`), or `base_ejection` if that is longer."""
GATEWAY_ERRORS = frozenset((502, 503, 504))


class Result(enum.Enum):
    """What came of one try."""

    SUCCESS = "success"
    """Any answer below 500."""
    SERVER_ERROR = "consecutive_5xx"
    GATEWAY_ERROR = "consecutive_gateway_errors"
    """502, 503, 504, or no answer: not connected, not who it should be, reset, too late, not HTTP."""


class Ejection(msgspec.Struct, frozen=True):
    """One endpoint is to be left out until `until` (monotonic seconds)."""

    until: float
    reason: Result


class Health:
    """What is known of one endpoint. Mutable; owned by the endpoint's place in its cluster."""

    __slots__ = ("errors", "gateway_errors", "times", "until")

    def __init__(self) -> None:
        self.errors = 0
        """Errors of either kind in a row."""
        self.gateway_errors = 0
        """Gateway errors in a row."""
        self.times = 0
        """Ejections that have not been forgotten."""
        self.until = 0.0
        """End of the last ejection, monotonic seconds; 0 if there was none."""

    def ejected(self, now: float) -> bool:
        """Whether the endpoint is out at `now`."""
        return now < self.until


def result_of(status: int) -> Result:
    """What an answer's status means for its endpoint."""
    if status < 500:
        return Result.SUCCESS
    return Result.GATEWAY_ERROR if status in GATEWAY_ERRORS else Result.SERVER_ERROR


def may_eject(ejected: int, total: int, percent: int) -> bool:
    """Whether one more of `total` endpoints may be out: never the only one, always a first one, else up to `percent`."""
    if total < 2 or ejected + 1 > total:
        return False
    return ejected == 0 or (ejected + 1) * 100 <= total * percent


def observe(health: Health, result: Result, settings: OutlierDetection, now: float, ejected: int, total: int) -> Ejection | None:
    """Takes one result into account. `ejected` of the cluster's `total` endpoints are out at `now` (monotonic seconds).

    Returns the ejection that follows, already noted in `health`.
    """
    if result is Result.SUCCESS:
        health.errors = health.gateway_errors = 0
        return None
    health.errors += 1
    health.gateway_errors = health.gateway_errors + 1 if result is Result.GATEWAY_ERROR else 0
    if health.ejected(now):
        return None
    reason = _reached(health, settings)
    if reason is None or not may_eject(ejected, total, settings.max_ejection_percent):
        return None
    base = settings.base_ejection
    if health.times and base > 0:
        health.times = max(0, health.times - int((now - health.until) / base))
    health.times += 1
    health.errors = health.gateway_errors = 0
    health.until = now + min(base * health.times, max(LONGEST, base))
    return Ejection(health.until, reason)


def _reached(health: Health, settings: OutlierDetection) -> Result | None:
    """Which limit has been reached; a limit of 0 is switched off."""
    if 0 < settings.consecutive_gateway_errors <= health.gateway_errors:
        return Result.GATEWAY_ERROR
    if 0 < settings.consecutive_5xx <= health.errors:
        return Result.SERVER_ERROR
    return None
