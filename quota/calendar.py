"""Windows of the calendar: from a unit, a time zone and an instant to the window that the instant lies in.

Days, weeks (from Monday) and months begin at midnight of the time zone: at the first one where a clock that is set back has two, and
where a clock that is set forward has none, when it is set. So a day has 23 to 25 hours. Hours, minutes and seconds begin as the zone's
clocks show them. Windows never overlap and leave nothing out; a day that a zone skips has no window.

Pure. Which window it is *now* is the store's to say, by its own time (`quota.clock`): an ask names the window that its asker believes in
and the one after it, and the store takes the one that its time lies in.
"""

from __future__ import annotations

import datetime
import math
from functools import lru_cache
from typing import Final
from zoneinfo import ZoneInfo

from mesh.quota_windows import Calendar

_CLOCK: Final = {"Second": 1, "Minute": 60, "Hour": 3600}
_EARLIEST: Final = 0.0
_LATEST: Final = 2.5e11
"""Seconds since the epoch that a date can be told of, with a window before and after."""

Windows = tuple[int, int, int]
"""In microseconds since the epoch: where a window begins, where it ends, and where the one after it ends."""


def window(calendar: Calendar, at: float) -> tuple[float, float]:
    """The window that `at` lies in: from when and until when, in seconds since the epoch."""
    at = min(max(at, _EARLIEST), _LATEST)
    zone = _zone(calendar.zone)
    local = datetime.datetime.fromtimestamp(math.floor(at), zone)  # of fractions it would make the next second
    length = _CLOCK.get(calendar.unit)
    if length is not None:
        offset = (local.utcoffset() or datetime.timedelta()).total_seconds()
        begin = math.floor((at + offset) / length) * length - offset
        return begin, begin + length
    first = local.date()
    if calendar.unit == "Week":
        first -= datetime.timedelta(days=first.weekday())
    elif calendar.unit == "Month":
        first = first.replace(day=1)
    begin = _midnight(first, zone)
    while True:
        first = _next(calendar.unit, first)
        end = _midnight(first, zone)
        if end > at:
            return begin, end
        begin = end


def windows(calendar: Calendar, now: int) -> Windows:
    """What an ask says of a calendar when its asker believes that it is `now` (microseconds since the epoch)."""
    begin, end = window(calendar, now / 1e6)
    return round(begin * 1e6), round(end * 1e6), round(window(calendar, end)[1] * 1e6)


@lru_cache(maxsize=256)
def _zone(name: str) -> ZoneInfo:
    return ZoneInfo(name)


def _midnight(day: datetime.date, zone: ZoneInfo) -> float:
    return datetime.datetime(day.year, day.month, day.day, tzinfo=zone).timestamp()


def _next(unit: str, first: datetime.date) -> datetime.date:
    if unit == "Month":
        return (first + datetime.timedelta(days=32)).replace(day=1)
    return first + datetime.timedelta(days=7 if unit == "Week" else 1)
