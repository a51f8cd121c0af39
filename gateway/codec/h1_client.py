"""HTTP/1.1 towards upstreams (RFC 9112). Sans-io: see `gateway.codec.events`."""

from __future__ import annotations

from typing import Final

from gateway.codec.bytesets import without
from gateway.codec.events import BodyReceived, Ended, Event, Informational, Refused, Reset, ResponseReceived
from gateway.codec.h1 import (
    CONNECTION_FIELDS,
    CRLF,
    HEAD_END,
    HIGH_WATER,
    Chunks,
    Fields,
    PartialHead,
    SyntaxProblem,
    check_line,
    named_by_connection,
    read_length,
    write_fields,
)
from gateway.codec.websocket_key import ACCEPT, KEY, accepted, new_key, value_of
from mesh.http import CONNECT, UNKNOWN_LENGTH, Header, RequestHead
from mesh.refusals import UpstreamProtocol

IDLE: Final = 0
HEAD: Final = 1
SIZED: Final = 2
CHUNKED: Final = 3
UNTIL_CLOSE: Final = 4
CLOSED: Final = 5
TUNNEL: Final = 6
"""Not HTTP any more."""

REQUEST_COMPLETE: Final = 0
REQUEST_SIZED: Final = 1
REQUEST_CHUNKED: Final = 2

MAX_INFORMATIONAL: Final = 32
SPECIAL: Final = CONNECTION_FIELDS | {b"content-length"}
START_SAFE: Final = without(b" \t\r\n\0")
LENGTH_EXPECTED: Final = frozenset((b"POST", b"PUT", b"PATCH"))


class H1Client:
    """One connection's framing towards an upstream (`gateway.codec.events.ClientCodec`)."""

    __slots__ = (
        "_chunks",
        "_fields",
        "_informational",
        "_keep",
        "_key",
        "_left",
        "_max_fields",
        "_max_head",
        "_method",
        "_out",
        "_partial",
        "_request",
        "_request_left",
        "_state",
        "_stream",
        "_tunnel",
        "available",
        "closing",
    )

    websockets = True

    def __init__(self, fields: Fields, max_head: int = 60 * 1024, max_fields: int = 100) -> None:
        self._fields = fields
        self._max_head = max_head
        self._max_fields = max_fields
        self._state = IDLE
        self._stream = 0
        self._method = b""
        self._partial: PartialHead | None = None
        self._chunks: Chunks | None = None
        self._left = 0
        self._out: list[bytes] = []
        self._request = REQUEST_COMPLETE
        self._request_left = 0
        self._keep = True
        self.closing = False
        """True when the connection is to be closed once everything is written."""
        self.available = 1
        """1 when idle and fit for another request."""
        self._informational = 0
        self._tunnel = b""
        """As `RequestHead.tunnel`, of the request in progress."""
        self._key = b""
        """The WebSocket's key, when it is our own."""

    @property
    def streams(self) -> int:
        """1 while a request is sent or answered, else 0."""
        return 0 if self._state in (IDLE, CLOSED) else 1

    def request(self, head: RequestHead, headers: list[Header], target: bytes, authority: bytes, ended: bool) -> int:
        """Sends a request's head and what frames it. Raises ValueError for a header that would split the request, or when busy."""
        if self._state != IDLE:
            raise ValueError("a request on a connection that is busy")
        method = head.method
        start = b"%b %b HTTP/1.1\r\nhost: %b\r\n" % (method, authority if head.tunnel == CONNECT else target, authority)
        said = method + target + authority
        if said.translate(START_SAFE) != said:
            raise ValueError("a method, target or authority with white space in it")
        parts = [start]
        self._tunnel = head.tunnel
        if head.tunnel:
            self._request = REQUEST_COMPLETE
            self._key = b""
            if head.tunnel != CONNECT:
                parts.append(b"connection: upgrade\r\n")
                if not value_of(headers, KEY):  # its client speaks HTTP/2
                    self._key = new_key()
                    parts.append(b"%b: %b\r\n" % (KEY, self._key))
        elif ended:
            self._request = REQUEST_COMPLETE
            if method in LENGTH_EXPECTED and head.body_length == 0 and not any(name == b"content-length" for name, _ in headers):
                parts.append(b"content-length: 0\r\n")
        elif head.body_length != UNKNOWN_LENGTH:
            self._request = REQUEST_SIZED
            self._request_left = head.body_length
            if not any(name == b"content-length" for name, _ in headers):
                parts.append(b"content-length: %d\r\n" % head.body_length)
        else:
            self._request = REQUEST_CHUNKED
            parts.append(b"transfer-encoding: chunked\r\n")
        self._out.append(write_fields(parts, headers))
        self._method = method
        self._state = HEAD
        self.available = 0
        self._stream += 1
        self._informational = 0
        return self._stream

    def send_body(self, stream: int, data: bytes, ended: bool) -> None:
        """Sends some of the request's body, in its framing."""
        if stream != self._stream or self.closing:
            return
        if self._request == REQUEST_COMPLETE:
            if data and self._state == TUNNEL:
                self._out.append(data)
            return
        if data:
            if self._request == REQUEST_CHUNKED:
                self._out += (b"%x\r\n" % len(data), data, CRLF)
            else:
                if len(data) > self._request_left:
                    self.reset(stream, 1)
                    return
                self._request_left -= len(data)
                self._out.append(data)
        if ended:
            if self._request == REQUEST_CHUNKED:
                self._out.append(b"0\r\n\r\n")
            elif self._request_left:
                self.reset(stream, 1)
                return
            self._request = REQUEST_COMPLETE

    def send_trailers(self, stream: int, trailers: list[Header]) -> None:
        """Ends the request with trailers, in chunked framing; elsewhere without them."""
        if stream == self._stream and not self.closing and self._request == REQUEST_CHUNKED and trailers:
            self._out.append(write_fields([b"0\r\n"], trailers))
            self._request = REQUEST_COMPLETE
        else:
            self.send_body(stream, b"", True)

    def receive(self, data: bytes) -> list[Event]:
        """Takes bytes from the upstream."""
        state = self._state
        if state in (IDLE, CLOSED):
            if data:  # an answer that nobody asked for: nothing after it can be trusted
                self._close()
            return []
        events: list[Event] = []
        try:
            if state == HEAD:
                partial = self._partial
                if partial is not None:
                    if not partial.add(data):
                        return events
                    data = bytes(partial.data)
                    self._partial = None
                while self._state == HEAD:
                    end = data.find(HEAD_END, 0, self._max_head + 4)
                    if end < 0:
                        if data:
                            self._partial = partial = PartialHead(self._max_head, self._max_head)
                            partial.add(data)
                        return events
                    self._read_head(data[:end], events)
                    data = data[end + 4 :]
            if data:
                if self._state == TUNNEL:
                    events.append(BodyReceived(self._stream, data))
                else:
                    self._read_body(data, events)
        except SyntaxProblem as problem:
            self._close()
            events.append(Refused(self._stream, UpstreamProtocol(reason=str(problem))))
        return events

    def _read_head(self, head: bytes, events: list[Event]) -> None:
        lines = head.split(CRLF)
        if len(lines) > self._max_fields + 1:
            raise SyntaxProblem("too many header fields")
        start = lines[0]
        check_line(start)
        version = start[:8]
        digits = start[9:12]
        if (version not in {b"HTTP/1.1", b"HTTP/1.0"}) or start[8:9] != b" " or start[12:13] not in (b" ", b"") or not digits.isdigit():
            raise SyntaxProblem("a status line that is not version and status")
        status = int(digits)
        keep = version == b"HTTP/1.1"
        headers: list[Header] = []
        append = headers.append
        kept = self._fields.kept.get
        read = self._fields.read
        special = SPECIAL
        length = -1
        chunked = False
        options: list[bytes] | None = None
        upgrade = b""
        del lines[0]
        for line in lines:
            field = kept(line) or read(line)
            name = field[0]
            if name not in special:
                append(field)
                continue
            value = field[1]
            if name == b"content-length":
                if length >= 0:
                    raise SyntaxProblem("more than one Content-Length")
                length = read_length(value)
                append(field)
            elif name == b"transfer-encoding":
                if chunked or value.lower() != b"chunked":
                    raise SyntaxProblem("a transfer coding other than chunked, once")
                chunked = True
            elif name == b"connection":
                options = [value] if options is None else [*options, value]
            elif name == b"upgrade":
                upgrade = value.lower()
        if self._tunnel and self._opened(status, version, headers, upgrade, events):
            return
        if options is not None:
            named = named_by_connection(options)
            keep = b"close" not in named and (keep or b"keep-alive" in named)
            named -= {b"close", b"keep-alive", b"content-length"}
            if named:
                headers = [field for field in headers if field[0] not in named]
        if chunked and (length >= 0 or version == b"HTTP/1.0"):
            raise SyntaxProblem("Transfer-Encoding together with Content-Length, or in HTTP/1.0")
        if status < 200:
            self._informational += 1
            if status < 100 or status == 101 or self._informational > MAX_INFORMATIONAL:
                raise SyntaxProblem(f"status {status}, which was not asked for")
            events.append(Informational(self._stream, status, headers))
            return
        if status > 599:
            raise SyntaxProblem(f"status {status}")
        self._keep = keep
        ended = False
        body_length = UNKNOWN_LENGTH
        if self._method == b"HEAD" or status in {204, 304}:
            ended = True
            body_length = 0
            if status == 204 and (chunked or length > 0):
                self._keep = False  # it may well be about to send a body (RFC 9112 section 6.1)
        elif chunked:
            self._chunks = Chunks(self._fields)
            self._state = CHUNKED
        elif length >= 0:
            body_length = self._left = length
            self._state = SIZED
            ended = not length
        else:
            self._keep = False
            self._state = UNTIL_CLOSE
        events.append(ResponseReceived(self._stream, status, headers, version, body_length, ended))
        if ended:
            self._answered()

    def _opened(self, status: int, version: bytes, headers: list[Header], upgrade: bytes, events: list[Event]) -> bool:
        """Whether the answer opens the tunnel that was asked for, which is then open. What would frame a body has no meaning in it
        (RFC 9110 section 9.3.6). Raises SyntaxProblem for a change to another protocol than the one that was asked for."""
        if status == 101:
            if self._tunnel != upgrade or version != b"HTTP/1.1":
                raise SyntaxProblem("a change to a protocol that was not asked for")
            if self._key and value_of(headers, ACCEPT) != accepted(self._key):
                raise SyntaxProblem("a WebSocket whose key was not accepted")
        elif self._tunnel != CONNECT or not 200 <= status < 300:
            if status >= 200:
                self._tunnel = b""
            return False
        self._state = TUNNEL
        self._keep = False
        headers = [field for field in headers if field[0] != b"content-length"]
        events.append(ResponseReceived(self._stream, status, headers, version, UNKNOWN_LENGTH, False))
        return True

    def _read_body(self, data: bytes, events: list[Event]) -> None:
        stream = self._stream
        state = self._state
        if state == SIZED:
            left = self._left - len(data)
            if left > 0:
                self._left = left
                events.append(BodyReceived(stream, data))
                return
            rest = data[self._left :]
            events.append(BodyReceived(stream, data[: self._left] if rest else data))
            self._answered()
            events.append(Ended(stream))
            if rest:
                self._close()
        elif state == CHUNKED and self._chunks is not None:
            chunks = self._chunks
            body, rest = chunks.feed(data)
            if body:
                events.append(BodyReceived(stream, body))
            if chunks.done:
                self._answered()
                events.append(Ended(stream, chunks.trailers))
                if rest:
                    self._close()
        elif state == UNTIL_CLOSE:
            events.append(BodyReceived(stream, data))
        else:  # bytes after an answer that is complete
            self._close()

    def _answered(self) -> None:
        """The answer is complete: ready for another request, unless either side wants or needs the connection to end."""
        self._chunks = None
        if self._keep and self._request == REQUEST_COMPLETE:
            self._state = IDLE
            self.available = 1
        else:
            self._close()

    def _close(self) -> None:
        self.closing = True
        self.available = 0
        self._state = CLOSED
        self._partial = None
        self._chunks = None

    def eof(self) -> list[Event]:
        """The upstream will send no more: that ends a body without a length, and resets everything else."""
        state = self._state
        if state == TUNNEL:  # one direction of it; its owner ends the connection once the other has ended, too
            return [Ended(self._stream)]
        self._close()
        if state == UNTIL_CLOSE:
            return [Ended(self._stream)]
        if state in (HEAD, SIZED, CHUNKED):
            return [Reset(self._stream, 2)]
        return []

    def take(self) -> bytes:
        """The bytes to write now."""
        out = self._out
        if not out:
            return b""
        data = out[0] if len(out) == 1 else b"".join(out)
        out.clear()
        return data

    def reset(self, stream: int, code: int) -> None:
        """Gives the request up: the connection ends."""
        if stream == self._stream:
            self._close()

    def window(self, stream: int) -> int:
        """There is none in HTTP/1.1: a very large number."""
        return HIGH_WATER

    def consumed(self, stream: int, credit: int) -> None:
        """Does nothing in HTTP/1.1."""
