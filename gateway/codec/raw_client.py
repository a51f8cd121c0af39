"""Towards an upstream that is sent what a client says through a tunnel, and nothing else: no framing at all.

Sans-io: see `gateway.codec.events`. A connection carries one tunnel. There is no answer's head on the wire: whoever begins a request here
takes the tunnel for open.
"""

from __future__ import annotations

from gateway.codec.events import BodyReceived, Ended, Event
from gateway.codec.h1 import HIGH_WATER
from mesh.http import Header, RequestHead

STREAM = 1


class RawClient:
    """`gateway.codec.events.ClientCodec` of a tunnel's own connection."""

    __slots__ = ("_out", "available", "closing")

    websockets = False

    def __init__(self) -> None:
        self._out: list[bytes] = []
        self.available = 1
        """1 until its tunnel has begun."""
        self.closing = False

    @property
    def streams(self) -> int:
        """1 once its tunnel has begun."""
        return 0 if self.available or self.closing else 1

    def request(self, head: RequestHead, headers: list[Header], target: bytes, authority: bytes, ended: bool) -> int:
        """Begins the tunnel. Raises ValueError if it has begun."""
        if not self.available:
            raise ValueError("a second tunnel on one connection")
        self.available = 0
        return STREAM

    def receive(self, data: bytes) -> list[Event]:
        """Takes bytes from the upstream. What comes before the tunnel has begun is for nobody, and ends the connection."""
        if self.available:
            self.reset(STREAM, 0)
        return [] if self.closing else [BodyReceived(STREAM, data)]

    def eof(self) -> list[Event]:
        """The upstream's direction has ended."""
        if self.available:
            self.reset(STREAM, 0)
        return [] if self.closing else [Ended(STREAM)]

    def take(self) -> bytes:
        """The bytes to write now."""
        data = b"".join(self._out)
        self._out.clear()
        return data

    def send_body(self, stream: int, data: bytes, ended: bool) -> None:
        """Sends some bytes."""
        if data and not self.closing:
            self._out.append(data)

    def send_trailers(self, stream: int, trailers: list[Header]) -> None:
        """There are none."""

    def reset(self, stream: int, code: int) -> None:
        """Gives the connection up."""
        self.closing = True
        self.available = 0

    def window(self, stream: int) -> int:
        """TCP's own is the only one: a very large number."""
        return HIGH_WATER

    def consumed(self, stream: int, credit: int) -> None:
        """Does nothing."""
