"""What is kept for each open HTTP/2 stream."""

from __future__ import annotations

from collections import deque

from mesh.http import Header


class Stream:
    """The codec's own; streams that have ended both ways, or been reset, are forgotten."""

    __slots__ = (
        "answered",
        "began",
        "bodiless",
        "deaf",
        "ended_by_peer",
        "ended_by_us",
        "ending",
        "held",
        "informational",
        "left",
        "method",
        "number",
        "owed",
        "room",
        "starved",
        "trailers",
        "tunnel",
        "unsent",
        "window",
    )

    def __init__(self, number: int, method: bytes, tunnel: bytes, window: int, room: int) -> None:
        self.number = number
        self.method = method
        self.tunnel = tunnel
        """As `RequestHead.tunnel`."""
        self.window = window
        """Bytes of body that the peer takes; negative once it has made its windows smaller (RFC 9113 section 6.9.2)."""
        self.room = room
        """Bytes of body that the peer may still send."""
        self.owed = 0
        """What has been consumed of them, and the peer has not been told."""
        self.held = 0
        """Flow-control credit that has not been given back."""
        self.left = -1
        """Bytes of body that the peer has announced and not sent; negative when it announced nothing."""
        self.unsent: deque[bytes] | None = None
        """Body beyond the peer's window."""
        self.trailers: list[Header] | None = None
        self.began = False
        """The head of our message has been sent."""
        self.answered = False
        """The head of the peer's message has come, as is the case from the beginning for a client's."""
        self.informational = 0
        """How many 1xx answers have come."""
        self.bodiless = False
        """Our message has no body, whatever its head says."""
        self.ending = False
        """Our message ends after `unsent`."""
        self.starved = False
        """Somebody was told that the window is 0."""
        self.deaf = False
        """Whatever else the peer sends is thrown away."""
        self.ended_by_us = False
        self.ended_by_peer = False
