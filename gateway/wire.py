"""One connection's bytes: a socket, with TLS or without, on the event loop. docs/decisions/0001 says why it is built so.

A `Wire` knows nothing of HTTP. It reads when there is something to read and its owner wants it, writes what the owner gives it, keeps
what the kernel does not take, and says when that has gone. The poller watches it level-triggered, so in the steady state each read finds
something and each write goes through: one system call each, and no exception.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
import struct
from collections.abc import Callable
from time import monotonic
from typing import Any, Final, Protocol

from gateway.poller import Poller
from identity.close_notify import send_close_notify

log = logging.getLogger("tollhouse.gateway")

RECORD: Final = 16 * 1024
"""The longest TLS record: what one SSL_read returns at most."""
PLAIN_READ: Final = 64 * 1024
RECORDS_A_TURN: Final = 4
"""Records read in one callback before others get their turn."""
LEAST_READ: Final = 512
FIRST_READ: Final = 2 * 1024
LONG: Final = 0.004
"""Seconds of work that one read may make: beyond it the next one is half as large. A few bytes of HTTP/2 can be many requests."""
SHORT: Final = 0.001
"""Seconds of work below which the next read is twice as large."""
BUSY = (ssl.SSLWantReadError, ssl.SSLWantWriteError, BlockingIOError, InterruptedError)


class Owner(Protocol):
    """What a wire tells."""

    def received(self, data: bytes) -> None:
        """Bytes from the peer, never empty."""
        ...

    def ended(self, clean: bool) -> None:
        """The peer sends no more. `clean` is False when TLS ended without its close_notify (a truncation, for all that is known)."""
        ...

    def lost(self, reason: str) -> None:
        """The connection is gone. Called once at most, and not after the owner's own `abort`."""
        ...

    def drained(self) -> None:
        """Everything given to `write` has been taken by the kernel, after some of it had to wait."""
        ...


class Wire:
    """A connected socket. Its owner is the only one that calls it; it belongs to one event loop.

    A TLS socket must have been wrapped with `suppress_ragged_eofs=False`: else a truncation looks like a clean end.
    """

    __slots__ = (
        "_blocked",
        "_clean",
        "_fd",
        "_lingering",
        "_loop",
        "_most",
        "_out",
        "_poller",
        "_size",
        "_sock",
        "_ssl",
        "_still",
        "_tls",
        "_wants",
        "_writing",
        "backlog",
        "closed",
        "ending",
        "finished",
        "into",
        "owner",
        "reading",
        "received",
        "sent",
        "when_closed",
    )

    def __init__(self, poller: Poller, sock: socket.socket, owner: Owner) -> None:
        self._poller = poller
        self._loop = poller.loop
        self._sock = sock
        self.received = 0
        """Bytes that were read."""
        self.sent = 0
        """Bytes that were given to `write`."""
        self._fd = sock.fileno()
        self._tls = sock if isinstance(sock, ssl.SSLSocket) else None
        self._ssl: Any = None if self._tls is None else self._tls._sslobj  # type: ignore[attr-defined]
        """OpenSSL's side of it. `SSLSocket.read`, `send` and `pending` only hand on to it, and that is dear for every request."""
        self._most = RECORD if self._tls is not None else PLAIN_READ
        self._size = FIRST_READ
        """Bytes to read at once, by how long the owner took lately."""
        self._out: list[bytes] = []
        self.reading = False
        self._writing = False
        self._wants = False
        """A write waits for something to be read first."""
        self._blocked = False
        """A read waits for something to be written first."""
        self._lingering: asyncio.TimerHandle | None = None
        self._still = 0
        self.into: memoryview | None = None
        """Where to read into, when the owner is done with what was read by the time that `received` returns: it gets a view of this."""
        self.owner = owner
        self.when_closed: Callable[[], None] | None = None
        """Called once when the socket has been closed, however that came about."""
        self.backlog = 0
        """Bytes that the kernel has not taken yet."""
        self.ending = False
        """True once `end` has been called: what is written goes out, what is read is thrown away."""
        self.finished = ""
        """`` until `finish` has been called, then `wanted`, and `done` once everything is out and the peer has been told."""
        self._clean = True
        self.closed = False

    def start(self) -> None:
        """Begins to read."""
        self.resume()

    # Reading

    def pause(self) -> None:
        """Reads no more until `resume`: the peer's own window fills."""
        if self.reading:
            self.reading = False
            self._poller.remove_reader(self._fd)

    def resume(self) -> None:
        """Reads again."""
        if not self.reading and not self.closed:
            self.reading = True
            self._poller.add_reader(self._fd, self._discard if self.ending else self._read)
            if not self.ending and self._tls is not None and self._tls.pending():
                self._loop.call_soon(self._more)

    def _more(self) -> None:
        """Reads what TLS has already decrypted: the loop does not know of that."""
        if self.reading and not self.closed and not self.ending and self._tls is not None and self._tls.pending():
            self._read()

    def _read(self) -> None:
        tls = self._ssl
        if self.into is not None:
            self._read_into(self.into)
            return
        records = RECORDS_A_TURN
        while records:
            records -= 1
            size = self._size
            try:
                data = self._sock.recv(size) if tls is None else tls.read(size)
            except OSError as problem:
                self._unread(problem)
                return
            if not data:
                self._ended(True)
                return
            if self._wants:
                self._wants = False
                self._write_more()
            got = len(data)
            self.received += got
            if got < LEAST_READ:  # a read cannot be smaller: how long it takes changes nothing
                self.owner.received(data)
                return
            began = monotonic()
            self.owner.received(data)
            took = monotonic() - began
            if took > LONG:
                self._size = max(LEAST_READ, size // 2)
            elif size < self._most and took < SHORT:
                self._size = size * 2
            # OpenSSL decrypts one record at a time: when there was less than was asked for, it holds nothing more.
            if got < size or tls is None or not self.reading or self.closed or self.ending or not tls.pending():
                return
            if took > LONG:
                break
        self._loop.call_soon(self._more)

    def _read_into(self, buffer: memoryview) -> None:
        tls, room, got, last = self._ssl, len(buffer), 0, 0
        stopped: OSError | None = None
        try:
            if tls is None:
                got = last = self._sock.recv_into(buffer)
            else:
                got = last = tls.read(room, buffer)
                while last and room - got >= RECORD:  # what goes out together costs one call
                    last = tls.read(room - got, buffer[got:])
                    got += last
        except OSError as problem:
            stopped = problem
        if got:
            if self._wants:
                self._wants = False
                self._write_more()
            self.received += got
            self.owner.received(buffer[:got])  # type: ignore[arg-type]  # who reads into a buffer takes a view of it
            if self.closed or self.ending:
                return
        if stopped is not None:
            self._unread(stopped)
        elif not last:
            self._ended(True)
        elif tls is not None and self.reading:
            self._loop.call_soon(self._more)

    def _unread(self, problem: OSError) -> None:
        """Nothing could be read."""
        if isinstance(problem, BUSY):
            if isinstance(problem, ssl.SSLWantWriteError):
                self._blocked = True
                self._watch_writes()
        elif isinstance(problem, ssl.SSLZeroReturnError):
            self._ended(True)
        elif isinstance(problem, ssl.SSLEOFError):
            self._ended(False)
        else:
            self._fail(_reason(problem))

    def _ended(self, clean: bool) -> None:
        self.pause()
        self.owner.ended(clean)

    # Writing

    def write(self, data: bytes) -> None:
        """Writes `data`, now as far as the kernel takes it and the rest when it can."""
        if self.closed or self.ending or self.finished or not data:
            return
        size = len(data)
        self.sent += size
        if self._out:
            self._out.append(data)
            self.backlog += size
            return
        sent = self._send(data)
        if sent == size or self.closed:
            return
        self._out.append(data[sent:])
        self.backlog = size - sent
        if not self._wants:
            self._watch_writes()

    def write_view(self, view: memoryview) -> None:
        """As `write`, for bytes that are gone when this returns: what the kernel does not take is copied."""
        if self.closed or self.ending or self.finished:
            return
        size = len(view)
        self.sent += size
        sent = 0 if self._out else self._send(view)
        if sent == size or self.closed:
            return
        waited = bool(self._out)
        self._out.append(bytes(view[sent:]))
        self.backlog += size - sent
        if not waited and not self._wants:
            self._watch_writes()

    def _send(self, data: bytes | memoryview) -> int:
        """Sends as much as can be sent; 0 when nothing can. TLS takes all or nothing, and then wants to be given no less again. When the
        connection has failed, it is closed."""
        tls = self._ssl
        size = len(data)
        sent: int = 0
        try:
            sent = self._sock.send(data) if tls is None else tls.write(data)
            if sent < size:
                view = memoryview(data)
                while sent < size:
                    sent += self._sock.send(view[sent : sent + 4 * RECORD]) if tls is None else tls.write(view[sent:])
        except BUSY as busy:
            self._wants = isinstance(busy, ssl.SSLWantReadError)
        except OSError as problem:
            self._fail(_reason(problem))
        return sent

    def _watch_writes(self) -> None:
        if not self._writing and not self.closed:
            self._writing = True
            self._poller.add_writer(self._fd, self._write_more)

    def _write_more(self) -> None:
        if self._out:
            data = self._out[0] if len(self._out) == 1 else b"".join(self._out)
            sent = self._send(data)
            if self.closed:
                return
            rest = len(data) - sent
            self.backlog = rest
            self._out = [data[sent:]] if rest else []
            if rest:
                return
            waited = True
        else:
            waited = False
        if self.finished == "wanted" and not self._shut():
            return
        if self._writing:
            self._writing = False
            self._poller.remove_writer(self._fd)
        if self.ending:
            self._finish()
        elif waited or self.finished:
            self.owner.drained()
        if self._blocked:
            self._blocked = False
            self._loop.call_soon(self._again)

    def _again(self) -> None:
        """Reads once more after a read that had to wait for a write."""
        if self.reading and not self.closed and not self.ending:
            self._read()

    # Ending

    def finish(self, clean: bool = True) -> None:
        """Ends one direction: once what was written is out, the peer is told that no more will come, and reading goes on. With `clean`
        False a TLS peer is not sent the close_notify, so that it sees that something may be missing. `drained` is called when it is done,
        unless it is done at once."""
        if self.closed or self.ending or self.finished:
            return
        self.finished, self._clean = "wanted", clean
        if not self._out and not self._shut():
            self._watch_writes()

    def _shut(self) -> bool:
        if self._tls is not None and self._clean and not send_close_notify(self._tls):
            return False
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self._sock, socket.SHUT_WR)
        self.finished = "done"
        return True

    def end(self, linger: float) -> None:
        """Ends the connection in good order: writes what is left, says that no more will come, and then reads and throws away for up to
        `linger` seconds, so that bytes in flight from the peer do not make the kernel reset what it has not read yet (RFC 9112
        section 9.6). A peer that takes nothing for `linger` seconds is not waited for. The owner hears nothing more."""
        if self.closed or self.ending:
            return
        self.ending = True
        if self.reading:
            self._poller.add_reader(self._fd, self._discard)
        self._still = self.backlog
        self._lingering = self._loop.call_later(linger, self._lingered, linger)
        if not self._out:
            self._finish()

    def _lingered(self, linger: float) -> None:
        if self._still > 0 and self.backlog < self._still:  # it was still being written a moment ago
            self._still = self.backlog
            self._lingering = self._loop.call_later(linger, self._lingered, linger)
        else:
            self.abort()

    def _finish(self) -> None:
        if self._tls is not None:
            with contextlib.suppress(OSError, ValueError):
                self._tls.unwrap()
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)
        if not self.closed:
            self.resume()

    def _discard(self) -> None:
        try:
            data = socket.socket.recv(self._sock, PLAIN_READ)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""
        if not data:
            self.abort()

    def _fail(self, reason: str) -> None:
        if not self.closed:
            ending = self.ending
            self.abort()
            if not ending:
                self.owner.lost(reason)

    def cut(self) -> None:
        """Closes at once, in a way that the peer can tell from a good end: without TLS's close_notify, or by a reset."""
        if self._tls is None and not self.closed:
            with contextlib.suppress(OSError):
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.abort()

    def abort(self) -> None:
        """Closes at once; what has not been written is lost. The owner hears nothing more."""
        if self.closed:
            return
        self.closed = True
        if self.reading:
            self._poller.remove_reader(self._fd)
            self.reading = False
        if self._writing:
            self._poller.remove_writer(self._fd)
            self._writing = False
        if self._lingering is not None:
            self._lingering.cancel()
            self._lingering = None
        self._out.clear()
        self.backlog = 0
        self._sock.close()
        done, self.when_closed = self.when_closed, None
        if done is not None:
            done()

    @property
    def secure(self) -> bool:
        """Whether it is TLS."""
        return self._tls is not None

    @property
    def scratch(self) -> memoryview:
        """Memory of the loop's own, for `into`."""
        return self._poller.scratch

    @property
    def socket(self) -> socket.socket:
        """The socket, for facts about the connection."""
        return self._sock


def _reason(problem: OSError) -> str:
    """The operating system's or OpenSSL's word for what happened."""
    if isinstance(problem, ssl.SSLError):
        return f"tls: {(problem.reason or 'error').lower()}"
    return (problem.strerror or type(problem).__name__).lower()
