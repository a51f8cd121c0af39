"""When to stop asking something that does not answer, and when to try it again. Pure: takes the time, answers.

Waiting times are doubled each time and spread, so that a fleet does not come back in step; after a wait, one question is let through to
find out, and the others wait for what comes of it.
"""

from __future__ import annotations

from mesh.backoff import Backoff


class Breaker:
    """One replica's: closed (asked) → open (not asked until a time) → trying (one question is on its way) → closed or open.

    `failures` in a row open it. Times are monotonic seconds.
    """

    __slots__ = ("_backoff", "_failures", "_limit", "_trial", "_until", "opened")

    def __init__(self, failures: int = 3, backoff: Backoff | None = None) -> None:
        self._limit = failures
        self._backoff = backoff or Backoff()
        self._failures = 0
        self._until = 0.0
        self._trial = 0.0
        self.opened = 0
        """Times that it opened, ever."""

    @property
    def closed(self) -> bool:
        """Whether the replica is taken to be well."""
        return self._failures < self._limit

    def ready(self, now: float) -> bool:
        """Whether the replica may be asked at `now`; changes nothing."""
        return self.closed or (now >= self._until and now >= self._trial)

    def begin(self, now: float, budget: float) -> None:
        """A question goes to the replica. One that finds the breaker open is the trial: for `budget` seconds there is no other."""
        if not self.closed:
            self._trial = now + budget

    def succeeded(self) -> None:
        """The replica has answered."""
        self._failures = 0
        self._trial = 0.0
        self._backoff.reset()

    def failed(self, now: float, *, certain: bool = False) -> None:
        """The replica has not answered. `certain`: it is known to be away, one such failure is enough."""
        was_closed = self.closed
        self._failures = self._limit if certain else self._failures + 1
        if self.closed:
            return
        if was_closed or now >= self._until:  # what was on its way when it opened does not make the wait longer
            self._until = now + self._backoff.next()
            self._trial = 0.0
            self.opened += 1
