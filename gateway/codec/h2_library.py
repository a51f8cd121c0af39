"""What is kept of each HTTP/2 stream: by the `h2` library, and beside it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any

from h2.connection import H2Connection
from h2.stream import H2Stream

from mesh.http import Header


class _LibraryStream(H2Stream):
    """The library's stream without its look at lengths, which would end the connection, and which trailers make it forget."""

    def _initialize_content_length(self, headers: Iterable[Any]) -> None:
        pass

    def _track_content_length(self, length: int, end_stream: bool) -> None:
        pass


class Connection(H2Connection):
    """The library's connection, remembering fewer of the streams that are over."""

    MAX_CLOSED_STREAMS = 1024

    def _begin_new_stream(self, stream_id: int, allowed_ids: Any) -> H2Stream:
        stream = super()._begin_new_stream(stream_id, allowed_ids)
        stream.__class__ = _LibraryStream
        return stream


class Stream:
    """What is kept for one open stream."""

    __slots__ = (
        "began",
        "bodiless",
        "deaf",
        "ended_by_peer",
        "ended_by_us",
        "ending",
        "held",
        "left",
        "method",
        "number",
        "starved",
        "trailers",
        "unsent",
    )

    def __init__(self, number: int, method: bytes = b"") -> None:
        self.number = number
        self.method = method
        self.unsent: deque[bytes] = deque()
        """Body beyond the peer's window."""
        self.began = False
        """True when the head of our message has been sent."""
        self.bodiless = False
        """True when our message has no body, whatever its head says."""
        self.ending = False
        """True when the message ends after `unsent`."""
        self.trailers: list[Header] | None = None
        self.starved = False
        """True when somebody was told that the window is 0."""
        self.held = 0
        """Flow-control credit that has not been given back."""
        self.left = -1
        """Bytes of body that the peer has announced and not sent; negative when it announced nothing."""
        self.deaf = False
        """True when whatever else the peer sends is thrown away."""
        self.ended_by_us = False
        self.ended_by_peer = False
