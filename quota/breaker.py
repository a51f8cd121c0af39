"""A breaker: after several failures in a row nothing is tried for a while, then one attempt at a time, ever less often.

Pure: times are arguments (seconds on any monotonic clock), randomness is given. The pauses double and are jittered over half of
their length ("equal jitter", AWS Architecture Blog, "Exponential Backoff And Jitter"), so that a fleet does not come back at once.
"""

from __future__ import annotations

import random
from typing import Literal


class Breaker:
    """Counts failures. Its owner is the store that it protects."""

    __slots__ = ("_random", "base", "failures", "longest", "probing", "threshold", "until")

    def __init__(self, threshold: int = 3, base: float = 0.1, longest: float = 1.0, rng: random.Random | None = None) -> None:
        """`threshold` failures in a row open it; pauses go from `base` to `longest` seconds."""
        self.threshold = threshold
        self.base = base
        self.longest = longest
        self.failures = 0
        """In a row."""
        self.until = 0.0
        """When the pause ends."""
        self.probing = False
        """Whether the one attempt after a pause is under way."""
        self._random = rng or random.Random()  # noqa: S311 -- jitter, not a secret

    def allows(self, now: float) -> bool:
        """Whether something may be tried now. After a pause only one caller gets True, until `succeeded` or `failed`."""
        if self.failures < self.threshold:
            return True
        if self.probing or now < self.until:
            return False
        self.probing = True
        return True

    def succeeded(self) -> None:
        """An attempt came back with an answer."""
        self.failures = 0
        self.probing = False

    def failed(self, now: float) -> None:
        """An attempt came to nothing."""
        self.failures += 1
        self.probing = False
        if self.failures >= self.threshold:
            pause = min(self.longest, self.base * 2.0 ** min(self.failures - self.threshold, 16))
            self.until = now + pause * (0.5 + self._random.random() / 2)

    def state(self, now: float) -> Literal["closed", "open", "half-open"]:
        """For `status`."""
        if self.failures < self.threshold:
            return "closed"
        return "half-open" if self.probing or now >= self.until else "open"
