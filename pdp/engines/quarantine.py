"""Which policies are not asked because they keep ending their workers. Pure: takes the time, answers."""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

Culprit = tuple[str, str]
"""A revision's digest and the path of an entry point."""

_ENTRIES: Final = 1024


class _Record:
    __slots__ = ("deaths", "term", "until")

    def __init__(self) -> None:
        self.deaths: list[float] = []
        self.term = 0.0
        self.until = 0.0


class Quarantine:
    """Counts the deaths that each entry point caused. Times are seconds on a monotonic clock.

    `deaths` of them within `window` put it aside for `term` seconds; after that a single one does so again, each time for
    twice as long, up to `longest`. A quiet `longest` clears it.
    """

    def __init__(self, deaths: int = 2, window: float = 60.0, term: float = 10.0, longest: float = 600.0) -> None:
        self._deaths = deaths
        self._window = window
        self._term = term
        self._longest = longest
        self._records: OrderedDict[Culprit, _Record] = OrderedDict()

    def __bool__(self) -> bool:
        return bool(self._records)

    def blame(self, culprit: Culprit, now: float) -> bool:
        """Notes that `culprit` ended a worker; True when it is in quarantine from now on."""
        record = self._records.pop(culprit, None)
        if record is None or (record.deaths and now - record.deaths[-1] > self._longest + record.term):
            record = _Record()
        self._records[culprit] = record
        while len(self._records) > _ENTRIES:
            self._records.popitem(last=False)
        record.deaths = [*(death for death in record.deaths if now - death <= self._window), now]
        if record.term:
            record.term = min(2 * record.term, self._longest)
        elif len(record.deaths) >= self._deaths:
            record.term = self._term
        record.until = now + record.term
        return record.term > 0

    def remaining(self, culprit: Culprit, now: float) -> float:
        """Seconds that `culprit` is still put aside; 0 when it may be asked."""
        record = self._records.get(culprit)
        return max(0.0, record.until - now) if record is not None and record.term else 0.0
