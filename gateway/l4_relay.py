"""Bytes between two wires, both ways, until both directions have ended.

* What one side sends is written to the other at once. While the other's peer takes less than comes, at most `buffer` bytes and one read
  (32 KiB, or 256 KiB when it begins to) are held, and the sender's own window fills.
* An end is passed on alone: the other direction goes on (a half-closed connection, RFC 9293 section 3.6). TLS's close_notify counts as
  the end; a side that ends without it has perhaps been cut off, and then a TLS peer at the other side is not sent one either.
* A side that breaks takes the other with it: by a reset, or, when there are bytes that have yet to arrive, by an end after these
  (without a close_notify).
"""

from __future__ import annotations

import contextlib
import fcntl
import termios
from collections.abc import Callable

from gateway.wire import Wire

LESS = 32 * 1024
"""Bytes read at once from one side while the other is slow."""
LINGER = 10.0
"""Seconds for the bytes that are left, when the other side has broken."""


class Side:
    """One side of a relay: the owner of its wire (`gateway.wire.Owner`)."""

    __slots__ = ("_relay", "ended_reading", "other", "wire")

    other: Side

    def __init__(self, relay: Relay, wire: Wire) -> None:
        self._relay = relay
        self.wire = wire
        self.ended_reading = False
        """The peer sends no more."""
        wire.owner = self

    def received(self, data: bytes | memoryview) -> None:
        """As `gateway.wire.Owner`; it is always a view, which is gone afterwards (`gateway.wire.Wire.into`)."""
        relay = self._relay
        relay.moved()
        other = self.other.wire
        other.write_view(memoryview(data))
        if other.backlog:
            self.wire.into = relay.less
            if other.backlog > relay.buffer:
                self.wire.pause()
        else:
            self.wire.into = relay.most

    def drained(self) -> None:
        """As `gateway.wire.Owner`."""
        self._relay.moved()
        other = self.other
        if not other.ended_reading:
            other.wire.resume()
        self._relay.look()

    def ended(self, clean: bool) -> None:
        """As `gateway.wire.Owner`."""
        self.ended_reading = True
        self._relay.moved()
        self.other.wire.finish(clean)
        self._relay.look()

    def lost(self, reason: str) -> None:
        """As `gateway.wire.Owner`."""
        self._relay.broken(self, reason)


class Relay:
    """Owns two connected wires from `start` on. Ends by one call of `over`, or with `abort`."""

    __slots__ = ("_closed", "_later", "_over", "buffer", "client", "less", "most", "moved", "upstream")

    def __init__(
        self,
        client: Wire,
        upstream: Wire,
        buffer: int,
        moved: Callable[[], None],
        over: Callable[[str, bool], None],
        later: Callable[[float, Callable[[], None]], object],
    ) -> None:
        """`buffer`: bytes. `moved`: called whenever something moves. `over`: what broke (empty when both directions have ended in good
        order), and whether it was the upstream's side. `later`: calls something after so many seconds."""
        self.buffer = buffer
        # What is read is written at once or copied, so that one piece of memory does for all relays of a loop. Much is read at once where
        # it goes on as it comes; where the other side is slow, little, since it is held.
        self.most = client.scratch
        self.less = self.most[:LESS]
        self.moved = moved
        self._over = over
        self._later = later
        self._closed = False
        self.client = Side(self, client)
        self.upstream = Side(self, upstream)
        self.client.other, self.upstream.other = self.upstream, self.client

    def start(self) -> None:
        """Begins to read on both sides."""
        self.client.wire.into = self.upstream.wire.into = self.less
        self.client.wire.start()
        self.upstream.wire.start()

    def look(self) -> None:
        """Closes both sides once there is nothing left to do."""
        for side in (self.client, self.upstream):
            if not side.ended_reading or side.wire.finished != "done":
                return
        if not self._closed:
            self._closed = True
            self.client.wire.abort()
            self.upstream.wire.abort()
            self._over("", False)

    def broken(self, side: Side, reason: str) -> None:
        """One side's connection has failed."""
        if self._closed:
            return
        self._closed = True
        side.wire.cut()
        other = side.other.wire
        if other.backlog or unsent(other):
            other.pause()
            other.finish(clean=False)
            other.owner = Leaving(other)
            if other.finished == "done":
                other.abort()
            else:
                self._later(LINGER, other.abort)
        else:
            other.cut()
        self._over(reason, side is self.upstream)

    def abort(self) -> None:
        """Ends both sides at once; `over` is not called."""
        if not self._closed:
            self._closed = True
            self.client.wire.cut()
            self.upstream.wire.cut()


class Leaving:
    """The owner of a wire that is written out and closed."""

    __slots__ = ("_wire",)

    def __init__(self, wire: Wire) -> None:
        self._wire = wire

    def received(self, data: bytes) -> None:
        """Not called: nothing is read."""

    def ended(self, clean: bool) -> None:
        """Not called."""

    def lost(self, reason: str) -> None:
        """The peer has gone first."""

    def drained(self) -> None:
        """Everything is out: the kernel does the rest."""
        self._wire.abort()


def unsent(wire: Wire) -> bool:
    """Whether the kernel still holds bytes that the peer has not confirmed: a reset would throw them away."""
    left = b"\0\0\0\0"
    with contextlib.suppress(OSError):
        left = fcntl.ioctl(wire.socket.fileno(), termios.TIOCOUTQ, left)
    return any(left)
