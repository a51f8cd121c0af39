"""What goes to one client: the half of a connection that writes, and decides from that what may be read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from gateway.codec.events import ServerCodec
from gateway.codec.h1_server import H1Server
from gateway.shared import Shared
from gateway.wire import Wire

if TYPE_CHECKING:
    from gateway.stream import Stream

REQUESTS_A_TURN: Final = 16
"""Of pipelined requests handled in one callback, before others get their turn."""


class Flushing(ABC):
    """`gateway.wire.Flushable`. `gateway.connection.Connection` adds what comes from the client, and the end."""

    __slots__ = (
        "_ahead",
        "_torn",
        "codec",
        "deadline",
        "h1",
        "half",
        "marked",
        "over",
        "queued",
        "shared",
        "stalled",
        "streams",
        "wire",
    )

    wire: Wire

    def __init__(self, shared: Shared) -> None:
        self.shared = shared
        self.h1: H1Server | None = None
        """The codec, when it is HTTP/1.1's."""
        self.codec: ServerCodec
        self.streams: dict[int, Stream] = {}
        self.queued = 0
        """Bytes of answers' bodies that the codec holds for the next flush."""
        self.stalled = False
        """A stream waits for room towards the client."""
        self.over = False
        """The connection has ended, or is only written out."""
        self.half = False
        """The client has shut its side down, and is still told something."""
        self._torn = False
        self.marked = False
        self._ahead = False
        self.deadline = shared.loop.time() + shared.limits.idle_connection

    def mark(self) -> None:
        """Has what the codec wrote flushed at the end of this callback."""
        if not self.marked:
            self.marked = True
            self.shared.poller.mark(self)

    def until(self, deadline: float) -> None:
        """Has the sweep look at this connection no later than at `deadline`."""
        self.deadline = min(self.deadline, deadline)

    @property
    def roomy(self) -> bool:
        """Whether the client keeps up with what it is sent."""
        return self.wire.backlog + self.queued < self.shared.limits.buffer

    def flush(self) -> None:
        """As `gateway.wire.Flushable`."""
        self.marked = False
        if self.over:
            return
        try:
            if self._ahead:
                self._go_on()
            self._write()
            if self._ahead and self.roomy and not self.over:
                self.shared.loop.call_soon(self.mark)  # what has been written made room, or others were to have their turn
        except Exception as problem:
            self._defect(problem)

    def _go_on(self) -> None:
        """Takes up the requests that were sent ahead of the answer before them (HTTP/1.1)."""
        h1 = self.h1
        self._ahead = False
        if h1 is None or not h1.waiting:
            return
        for _ in range(REQUESTS_A_TURN):
            if self.streams or not h1.waiting or not self.roomy:
                break
            self._take(h1.receive(b""))
            if not self._ahead:
                return
            self._ahead = False
        if not self.streams and h1.waiting and not h1.closing:
            self._ahead = True

    def _write(self) -> None:
        wire, codec = self.wire, self.codec
        data = codec.take()
        self.queued = 0
        if data:
            wire.write(data)
            if self.over:
                return
        if codec.closing and not (self.streams and not self._torn):
            self._end()
            return
        backlog = wire.backlog
        if backlog and not self.streams:
            self.until(self.shared.loop.time() + self.shared.limits.idle_stream)
        if self.stalled and backlog < self.shared.limits.buffer:
            self._rooms(None)
        if backlog or self.streams or self._ahead or not wire.reading:
            self._pace(backlog)

    def _rooms(self, stream: Stream | None) -> None:
        """Tells one stream, or all, that there is room again."""
        if stream is None:
            self.stalled = False
        for waiting in list(self.streams.values()) if stream is None else [stream]:
            try:
                waiting.room()
            except Exception as problem:
                self.broken(waiting, problem)

    def _pace(self, backlog: int) -> None:
        """Reads from the client as long as what it sends has a place to go."""
        if self.half:
            return
        limits = self.shared.limits
        read = backlog <= limits.buffer
        h1 = self.h1
        if h1 is not None and read:
            if h1.waiting > limits.pipelined and (self.streams or self._ahead):
                read = False
            else:
                for stream in self.streams.values():
                    if stream.full:
                        read = False
        if read:
            self.wire.resume()
        else:
            self.wire.pause()

    def shut(self) -> None:
        """Tells the client that no more comes through the tunnel, which its other direction may outlive."""
        if self.h1 is None:
            self.mark()
            return
        self.wire.write(self.codec.take())
        self.queued = 0
        if not self.over:
            self.wire.finish()

    @abstractmethod
    def _take(self, events: Sequence[Any]) -> None:
        """What the codec says."""

    @abstractmethod
    def broken(self, stream: Stream, problem: BaseException) -> None:
        """A defect of ours showed in one request."""

    @abstractmethod
    def _defect(self, problem: BaseException) -> None:
        """A defect of ours for the whole connection."""

    @abstractmethod
    def _end(self) -> None:
        """The connection ends in good order."""
