"""A wire of a connection that carries many streams (HTTP/2): what lies ready in many TLS records is read, and handed on, together.

Peers write each frame, or little more, as a record of its own, and OpenSSL gives one record for each call. Who handles one in a turn
answers one in a turn, with a write for each: what could have gone out together wakes the other side over and over. On a connection with
one request at a time there is nothing to gather, and to look for it would be a system call for nothing: those have a plain `Wire`.
"""

from __future__ import annotations

import fcntl
import termios
from time import monotonic
from typing import Final

from gateway.wire import LEAST_READ, LONG, RECORD, SHORT, Wire

MOST: Final = 256 * 1024
"""Bytes read in one turn, give or take a record, if they are little work; else it ends after `LONG` seconds."""
NOTHING: Final = bytes(4)


class GatheringWire(Wire):
    """As `gateway.wire.Wire`."""

    __slots__ = ()

    def _read(self) -> None:
        tls = self._ssl
        if tls is None:
            super()._read()
            return
        total = 0
        began = started = monotonic()
        while True:
            size, got = self._size, 0
            pieces: list[bytes] = []
            stopped: OSError | None = None
            more = True
            try:
                while got < size and more:
                    data = tls.read(size)
                    if not data:
                        break
                    pieces.append(data)
                    got += len(data)
                    more = tls.pending() > 0 or self._more_has_come()
            except OSError as problem:
                stopped = problem
            if got:
                if self._wants:
                    self._wants = False
                    self._write_more()
                self.received += got
                self.owner.received(pieces[0] if len(pieces) == 1 else b"".join(pieces))
                now = monotonic()
                took, began = now - began, now
                if took > LONG:
                    self._size = max(LEAST_READ, size // 2)
                elif size < RECORD and took < SHORT:
                    self._size = size * 2
                if self.closed or self.ending or not self.reading:
                    return  # the end is found again by whoever reads on
            if stopped is not None:
                self._unread(stopped)
                return
            if more and got < size:
                self._ended(True)
                return
            total += got
            if not more:
                return
            if total >= MOST or began - started > LONG:
                break
        if tls.pending() and not self._more_has_come():
            self._loop.call_soon(self._more)  # else the poller calls again, and two calls would make four

    def _more_has_come(self) -> bool:
        """Whether the kernel has bytes for us."""
        return fcntl.ioctl(self._fd, termios.FIONREAD, NOTHING) != NOTHING
