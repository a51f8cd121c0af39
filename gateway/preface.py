"""What a trusted proxy says before a connection's own bytes: the PROXY protocol header is read, and nothing after it.

As in a handshake, nobody is known until it is over; one that takes too long, or is no header, ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from typing import TYPE_CHECKING, Final

from gateway.proxy_header import LONGEST, BadProxyHeader, read_proxy_header

if TYPE_CHECKING:
    from gateway.listening import Port

log = logging.getLogger("tollhouse.gateway")

PEEK_AGAIN: Final = 0.05
"""Seconds until bytes that have not grown are looked at again."""


class Preface:
    """A connection whose header is being read. Owned by the port; over once it has been handed on or closed."""

    __slots__ = ("_fd", "_look", "_low", "_port", "_reading", "_remote", "_sock", "deadline", "over")

    def __init__(self, port: Port, sock: socket.socket, remote: tuple[str, int], deadline: float) -> None:
        self._port = port
        self._sock = sock
        self._fd = sock.fileno()
        self._remote = remote
        self._low = 1
        self._look: asyncio.TimerHandle | None = None
        self._reading = False
        self.deadline = deadline
        self.over = False
        self._read()

    def _read(self) -> None:
        self._look = None
        if not self.over and not self._reading:
            self._reading = True
            self._port.shared.loop.add_reader(self._fd, self._ready)

    def _unwatch(self) -> None:
        if self._reading:
            self._reading = False
            self._port.shared.loop.remove_reader(self._fd)
        if self._look is not None:
            self._look.cancel()
            self._look = None

    def _ready(self) -> None:
        self._unwatch()
        try:
            data = self._sock.recv(LONGEST, socket.MSG_PEEK)
        except (BlockingIOError, InterruptedError):
            self._read()
            return
        except OSError:
            data = b""
        if not data:
            self.fail("closed")
            return
        found = read_proxy_header(data)
        if found is None:
            self._wait_for_more(len(data))
        elif isinstance(found, BadProxyHeader):
            log.info("port %d: a proxy at %s sent no good header: %s", self._port.number, self._remote[0], found.reason)
            self.fail("proxy_header")
        else:
            self._sock.recv(found.length)
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)
            self.over = True
            port, sock = self._port, self._sock
            port.shaking.pop(self, None)
            try:
                port.known(sock, found.source or self._remote, found.destination or port.local_address(sock))
            except Exception:
                log.exception("a connection could not be begun")
                sock.close()
                port.closed()

    def _wait_for_more(self, size: int) -> None:
        """The socket stays readable by what is only looked at: it is to be readable again when there is more."""
        if size >= self._low:
            self._low = size + 1
            with contextlib.suppress(OSError):
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, self._low)
            self._read()
        else:
            self._look = self._port.shared.loop.call_later(PEEK_AGAIN, self._read)

    def fail(self, reason: str) -> None:
        """Ends it; `reason` is a label of the metric."""
        if self.over:
            return
        self.over = True
        self._unwatch()
        port = self._port
        port.shaking.pop(self, None)
        serving = port.servings[0] if len(port.servings) == 1 else None
        port.shared.telemetry.handshake_failed(port.shared.key, serving.name if serving is not None else "", reason)
        self._sock.close()
        port.closed()
