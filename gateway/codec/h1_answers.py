"""HTTP/1.1 towards clients, what is sent: the half of `gateway.codec.h1_server` that frames answers (RFC 9112 sections 4, 6 and 7)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Final

from gateway.codec.h1 import CRLF, write_fields
from gateway.codec.status_lines import STATUS_LINES
from gateway.codec.websocket_key import ACCEPT, accepted, value_of
from mesh.http import CONNECT, HTTP10, HTTP11, WEBSOCKET, Header

HEAD: Final = 0
"""Waiting for a request's head, or in the middle of it."""
SIZED: Final = 1
"""In a body of known length."""
CHUNKED: Final = 2
"""In a chunked body."""
COMPLETE: Final = 3
"""The request is complete; its answer is not."""
CLOSED: Final = 4
"""Nothing more is read."""
TUNNEL: Final = 5
"""Not HTTP any more."""

NO_ANSWER: Final = 0
ANSWER_SIZED: Final = 1
ANSWER_CHUNKED: Final = 2
ANSWER_UNTIL_CLOSE: Final = 3
ANSWER_BODILESS: Final = 4
ANSWER_TUNNEL: Final = 5


class H1Answers(ABC):
    """What is known of the request in progress, and of its answer. `H1Server` adds the reading."""

    __slots__ = (
        "_answer",
        "_answer_left",
        "_buffer",
        "_draining",
        "_head_request",
        "_keep",
        "_key",
        "_no_more",
        "_out",
        "_state",
        "_stream",
        "_tunnel",
        "_version",
        "closing",
    )

    def __init__(self) -> None:
        self._state = HEAD
        self._stream = 1
        self._buffer = b""
        """What was sent ahead of the answer in progress."""
        self._out: list[bytes] = []
        self._answer = NO_ANSWER
        self._answer_left = 0
        self._head_request = False
        self._keep = True
        self._version = HTTP11
        self.closing = False
        """True when the connection is to be closed once everything is written."""
        self._draining = False
        self._no_more = False
        """The client has shut its side down."""
        self._tunnel = b""
        """As `RequestHead.tunnel`, of the request in progress."""
        self._key = b""
        """The WebSocket's key, of the request that asked for one last."""

    def take(self) -> bytes:
        """The bytes to write now."""
        out = self._out
        if not out:
            return b""
        data = out[0] if len(out) == 1 else b"".join(out)
        out.clear()
        return data

    def send_informational(self, stream: int, status: int, headers: list[Header]) -> None:
        """Sends a 1xx answer; dropped for HTTP/1.0 clients and once the answer has begun."""
        if stream == self._stream and self._version == HTTP11 and self._answer == NO_ANSWER and not self.closing:
            self._out.append(write_fields([STATUS_LINES[status]], headers))

    def send_head(self, stream: int, status: int, headers: list[Header], ended: bool) -> None:
        """Sends a final answer's head; adds what frames it. Raises ValueError for a header that would split the answer, and KeyError for a
        status that is none."""
        if stream != self._stream or self._answer != NO_ANSWER or self.closing:
            return
        if self._tunnel or status == 101:
            if self._opened(status, headers):
                return
            if self._tunnel == CONNECT:  # what the client sent ahead was for somebody else, and is no request
                self._keep = False
                self._buffer = b""
            self._tunnel = b""
        length = -1
        for name, value in headers:
            if name == b"content-length":
                if not value.isdigit():
                    raise ValueError("a content-length that is not a number")
                length = int(value)
                break
        parts = [STATUS_LINES[status]]
        if self._head_request or status in {304, 204}:
            answer = ANSWER_BODILESS
            if status == 204 and length >= 0:
                headers = [field for field in headers if field[0] != b"content-length"]
        elif length >= 0:
            answer = ANSWER_SIZED
            self._answer_left = length
        elif ended:
            answer = ANSWER_SIZED
            self._answer_left = 0
            parts.append(b"content-length: 0\r\n")
        elif self._version == HTTP11:
            answer = ANSWER_CHUNKED
            parts.append(b"transfer-encoding: chunked\r\n")
        else:
            answer = ANSWER_UNTIL_CLOSE
            self._keep = False
        if self._draining:
            self._keep = False
        if not self._keep:
            parts.append(b"connection: close\r\n")
        elif self._version == HTTP10:
            parts.append(b"connection: keep-alive\r\n")
        self._out.append(write_fields(parts, headers))
        self._answer = answer
        if ended:
            self._answer_ended()

    def _opened(self, status: int, headers: list[Header]) -> bool:
        """Whether the answer opens the tunnel that was asked for, which is then open. Raises ValueError for a tunnel that was not."""
        if status == 101:
            if self._tunnel != WEBSOCKET:
                raise ValueError("a change of protocol that was not asked for")
            parts = [STATUS_LINES[101], b"connection: upgrade\r\nupgrade: %b\r\n" % self._tunnel]
            if self._key and not value_of(headers, ACCEPT):  # its upstream speaks HTTP/2
                parts.append(b"%b: %b\r\n" % (ACCEPT, accepted(self._key)))
        elif self._tunnel == CONNECT and 200 <= status < 300:
            parts = [STATUS_LINES[status]]
        else:
            return False
        self._out.append(write_fields(parts, [field for field in headers if field[0] not in {b"content-length", b"upgrade"}]))
        self._answer = ANSWER_TUNNEL
        self._state = TUNNEL
        return True

    def send_body(self, stream: int, data: bytes, ended: bool) -> None:
        """Sends some of the answer's body, in its framing."""
        if stream != self._stream or self.closing:
            return
        answer = self._answer
        if answer == NO_ANSWER:  # a body of no answer: nothing that follows could be understood
            if self._state != TUNNEL:
                self.reset(stream, 2)
            return
        if data:
            if answer == ANSWER_SIZED:
                if len(data) > self._answer_left:
                    data = data[: self._answer_left]
                    self._keep = False
                self._answer_left -= len(data)
                self._out.append(data)
            elif answer == ANSWER_CHUNKED:
                self._out += (b"%x\r\n" % len(data), data, CRLF)
            elif answer >= ANSWER_UNTIL_CLOSE and answer != ANSWER_BODILESS:
                self._out.append(data)
        if ended:
            if answer == ANSWER_TUNNEL:
                self._answer = NO_ANSWER
                if self._no_more:
                    self.closing = True
                    self._state = CLOSED
                return
            if answer == ANSWER_CHUNKED:
                self._out.append(b"0\r\n\r\n")
            self._answer_ended()

    def send_trailers(self, stream: int, trailers: list[Header]) -> None:
        """Ends the answer with trailers, in chunked framing; elsewhere without them."""
        if stream == self._stream and not self.closing and self._answer == ANSWER_CHUNKED and trailers:
            self._out.append(write_fields([b"0\r\n"], trailers))
            self._answer_ended()
        else:
            self.send_body(stream, b"", True)

    def _answer_ended(self) -> None:
        """The answer is complete: on to the next request, or to the end when the framing or somebody says so."""
        if self._answer == ANSWER_SIZED and self._answer_left:
            self._keep = False  # shorter than announced: only the connection's end tells the client
        self._answer = NO_ANSWER
        self._head_request = False
        if self._keep and not self._draining and self._state == COMPLETE and (self._buffer or not self._no_more):
            self._stream += 1
            self._state = HEAD
        else:
            self.closing = True
            self._state = CLOSED
            self._buffer = b""

    @abstractmethod
    def reset(self, stream: int, code: int) -> None:
        """Gives the request up."""
