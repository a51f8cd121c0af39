"""Our own look at the deadlines of questions: a timer for all that are due at about the same time, not one for each."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from pdp.engines.child import Question

TICK: Final = 0.02
"""Seconds: how finely deadlines are kept; a question is never given up before its own."""


class Deadlines:
    """Tells its owner of questions that are past their deadline and have no answer."""

    __slots__ = ("_due", "_loop", "_overdue")

    def __init__(self, loop: asyncio.AbstractEventLoop, overdue: Callable[[list[Question]], None]) -> None:
        self._loop = loop
        self._overdue = overdue
        self._due: dict[int, list[Question]] = {}

    def expect(self, question: Question) -> None:
        """Looks at `question` when its deadline has passed."""
        tick = int(question.deadline / TICK) + 1
        due = self._due.get(tick)
        if due is None:
            self._due[tick] = [question]
            self._loop.call_at(tick * TICK, self._look, tick)
        else:
            due.append(question)

    def _look(self, tick: int) -> None:
        late = [question for question in self._due.pop(tick) if question.done is not None]
        if late:
            self._overdue(late)
