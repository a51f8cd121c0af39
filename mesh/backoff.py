"""How long to wait before trying again: doubled each time, and spread so that a fleet does not come back in step."""

from __future__ import annotations

import random


class Backoff:
    """One thing's waiting times. `first` and `most` are seconds."""

    __slots__ = ("_first", "_most", "_next", "_random")

    def __init__(self, first: float = 0.1, most: float = 5.0, rng: random.Random | None = None) -> None:
        self._first = first
        self._most = most
        self._next = first
        self._random = rng or random.Random()  # noqa: S311 -- spreads load, guards nothing

    def next(self) -> float:
        """Seconds to wait now: between half of the current step and all of it; the next step is twice as long."""
        step, self._next = self._next, min(self._next * 2, self._most)
        return step * (0.5 + self._random.random() / 2)

    def reset(self) -> None:
        """It worked: begin with the first step next time."""
        self._next = self._first
