"""Windows of the calendar, as a limit names them; `quota.calendar` says which one an instant lies in."""

from __future__ import annotations

from typing import Literal

import msgspec


class Calendar(msgspec.Struct, frozen=True):
    """Windows of the calendar in a time zone."""

    unit: Literal["Second", "Minute", "Hour", "Day", "Week", "Month"]
    zone: str = "UTC"
    """A name of the IANA's time zone database."""
