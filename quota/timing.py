"""What time is to a lessee: a clock, and timers."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol


class Handle(Protocol):
    """A timer that was set."""

    def cancel(self) -> None:
        """Takes it back."""
        ...


class Timers(Protocol):
    """What sets timers: an asyncio event loop, or a virtual one in tests."""

    def call_later(self, delay: float, callback: Callable[..., object], *args: Any) -> Handle:
        """Calls `callback(*args)` in `delay` seconds."""
        ...


def boottime() -> float:
    """Seconds on CLOCK_BOOTTIME, which goes on while the machine is suspended."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
