"""An answer's way to the client: as much as its window takes, the rest held until there is room."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Final

from gateway.codec.h1 import HIGH_WATER
from gateway.phases import FORWARDING, GATHERING
from mesh.http import Header
from mesh.outcome import Outcome

if TYPE_CHECKING:
    from gateway.connection import Connection

INTERNAL: Final = 2
"""HTTP/2's INTERNAL_ERROR (RFC 9113 section 7)."""


class Sending(ABC):
    """The half of a stream that faces the client. Owns what the client has no room for; `gateway.stream.Stream` adds the rest."""

    __slots__ = ("_ending", "_out", "_stopped", "connection", "moved", "number", "outcome", "phase")

    def __init__(self, connection: Connection, number: int, outcome: Outcome, began: float) -> None:
        self.connection = connection
        self.number = number
        self.outcome = outcome
        self.phase = GATHERING
        self.moved = began
        """When something last moved (monotonic seconds), to within a sweep."""
        self._out: list[bytes] = []
        self._ending: tuple[list[Header] | None] | None = None
        """The trailers of an answer that is all here, while some of it waits for room."""
        self._stopped = False
        """The upstream's side has been told to stop."""

    def _send(self, data: bytes) -> bool:
        """Sends as much of `data` as the client's window takes, and holds the rest. False when the window is used up."""
        connection = self.connection
        if self._out:
            self._out.append(data)
            return False
        size = len(data)
        window = HIGH_WATER if connection.h1 is not None else connection.codec.window(self.number)
        if window < size:
            self._out.append(data[window:])
            data = data[:window]
        if data:
            connection.codec.send_body(self.number, data, False)
            size = len(data)
            connection.queued += size
            self.outcome.bytes_sent += size
            if not connection.marked:
                connection.mark()
        return not self._out and window > size

    def answer_body(self, data: bytes) -> bool:
        """As `gateway.exchange.Client`."""
        if self.phase != FORWARDING:
            return False
        connection = self.connection
        self.moved = connection.shared.sweeper.now
        if self._send(data) and connection.wire.backlog + connection.queued < connection.shared.limits.buffer:
            return True
        self._stopped = connection.stalled = True
        return False

    def _finish(self, trailers: list[Header] | None) -> None:
        """Ends the answer in its framing."""
        codec = self.connection.codec
        try:
            if trailers:
                codec.send_trailers(self.number, trailers)
            else:
                codec.send_body(self.number, b"", True)
        except ValueError:  # trailers that cannot be written: the answer is none that can be believed
            codec.reset(self.number, INTERNAL)
        if not self.connection.marked:
            self.connection.mark()

    def room(self) -> None:
        """The client takes data again."""
        connection = self.connection
        if self._out:
            out, self._out = self._out, []
            self.moved = connection.shared.sweeper.now
            self._send(out[0] if len(out) == 1 else b"".join(out))
        if self._out:
            connection.stalled = True
        elif self._ending is not None:
            (trailers,), self._ending = self._ending, None
            self._complete(trailers)
        elif self._stopped:
            if connection.roomy and connection.codec.window(self.number) > 0:
                self._stopped = False
                self._go_on()
            else:
                connection.stalled = True

    def _forget(self) -> None:
        """Lets go of what waits: nothing more is sent."""
        self._out = []
        self._ending = None
        self._stopped = False

    @abstractmethod
    def _complete(self, trailers: list[Header] | None) -> None:
        """All of the answer has been sent but its end."""

    @abstractmethod
    def _go_on(self) -> None:
        """The upstream's side may send again."""
