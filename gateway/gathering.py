"""A wire of a connection that carries many streams (HTTP/2): what lies ready in many TLS records is read, and handed on, together.

Peers write each frame, or little more, as a record of its own, and OpenSSL gives one record for each call. Who handles one in a turn
answers one in a turn, with a write for each: what could have gone out together wakes the other side over and over. On a connection with
one request at a time there is nothing to gather, and to look for it would be a system call for nothing: those have a plain `Wire`.
"""

from __future__ import annotations

import fcntl
import socket
import termios
from time import monotonic
from typing import Final

from gateway.poller import Poller
from gateway.wire import LEAST_READ, LONG, RECORD, SHORT, Owner, Wire

MOST: Final = 256 * 1024
"""Bytes read at once, give or take a record, from a peer whose messages are little work."""
NOTHING: Final = bytes(4)


class GatheringWire(Wire):
    """As `gateway.wire.Wire`."""

    __slots__ = ()

    def __init__(self, poller: Poller, sock: socket.socket, owner: Owner) -> None:
        super().__init__(poller, sock, owner)
        self._most = MOST

    def _read(self) -> None:
        tls = self._ssl
        if tls is None:
            super()._read()
            return
        size, got = self._size, 0
        one = min(size, RECORD)
        pieces: list[bytes] = []
        stopped: OSError | None = None
        data = b""
        try:
            while True:
                data = tls.read(one)
                if not data:
                    break
                pieces.append(data)
                got += len(data)
                if got >= size or not (tls.pending() or self._more_has_come()):
                    break
        except OSError as problem:
            stopped = problem
        if got:
            if self._wants:
                self._wants = False
                self._write_more()
            self.received += got
            began = monotonic()
            self.owner.received(pieces[0] if len(pieces) == 1 else b"".join(pieces))
            took = monotonic() - began
            if took > LONG:
                self._size = max(LEAST_READ, size // 2)
            elif size < self._most and took < SHORT:
                self._size = size * 2
            if self.closed or self.ending or not self.reading:
                return  # the end is found again by whoever reads on
        if stopped is not None:
            self._unread(stopped)
        elif not data:
            self._ended(True)
        elif tls.pending():
            self._loop.call_soon(self._more)

    def _more_has_come(self) -> bool:
        return fcntl.ioctl(self._fd, termios.FIONREAD, NOTHING) != NOTHING
