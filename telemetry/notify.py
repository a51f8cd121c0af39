"""Tells systemd how the process is doing (sd_notify(3), sd_watchdog_enabled(3)). Where there is no systemd it does nothing.

Some thirty lines of our own: the protocol is a datagram, and the packages for it are no longer looked after.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Mapping


class Notifier:
    """Talks to `$NOTIFY_SOCKET`."""

    __slots__ = ("_address", "watchdog")

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        environment = os.environ if environment is None else environment
        address = environment.get("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self.watchdog = _watchdog(environment)
        """Seconds between two `alive` that systemd is content with (half of what it allows); 0 when it does not watch."""

    def ready(self, status: str = "") -> None:
        """Start-up is over, or a reload is."""
        self._send("READY=1", status)

    def reloading(self) -> None:
        """A reload has begun; `ready` ends it."""
        self._send("RELOADING=1", "", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self, status: str = "") -> None:
        """The drain has begun."""
        self._send("STOPPING=1", status)

    def status(self, text: str) -> None:
        """One line for `systemctl status`."""
        self._send("", text)

    def alive(self) -> None:
        """To be called each `watchdog` seconds from the event loop, so that a loop that hangs is noticed."""
        self._send("WATCHDOG=1", "")

    def extend(self, seconds: float) -> None:
        """Start or stop takes longer: at most `seconds` from now."""
        self._send(f"EXTEND_TIMEOUT_USEC={int(seconds * 1e6)}", "")

    def _send(self, state: str, status: str, *more: str) -> None:
        if not self._address:
            return
        lines = [state, *more, f"STATUS={' '.join(status.split())}" if status else ""]
        # A notification that is lost must never stop the process: systemd's own timeouts say what happens then.
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as out:
            out.setblocking(False)
            out.sendto("\n".join(line for line in lines if line).encode(), self._address)


def _watchdog(environment: Mapping[str, str]) -> float:
    if environment.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return 0.0
    try:
        return max(0.0, int(environment.get("WATCHDOG_USEC", "0")) / 2e6)
    except ValueError:
        return 0.0
