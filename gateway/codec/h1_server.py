"""HTTP/1.1 towards clients (RFC 9112). Sans-io: see `gateway.codec.events`.

One request is read at a time: what a client sends ahead (pipelining) waits here until the answer before it is complete, and the
connection stops reading when too much waits. Requests are numbered 1, 2, 3, ...
"""

from __future__ import annotations

from typing import Final

from gateway.codec.events import BodyReceived, Ended, Event, Refused, RequestReceived, Reset
from gateway.codec.h1 import (
    CONNECTION_FIELDS,
    CRLF,
    HEAD_END,
    HIGH_WATER,
    Chunks,
    Fields,
    SyntaxProblem,
    named_by_connection,
    read_length,
    split_head,
    write_fields,
)
from gateway.codec.h1 import TOKEN as TOKEN_CHARACTERS
from mesh.http import HTTP10, HTTP11, UNKNOWN_LENGTH, Header, RequestHead
from mesh.refusals import BadRequest, ExpectationFailed, HeadTooLarge, MethodNotAllowed, Refusal, TargetTooLong, VersionNotSupported

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

NO_ANSWER: Final = 0
ANSWER_SIZED: Final = 1
ANSWER_CHUNKED: Final = 2
ANSWER_UNTIL_CLOSE: Final = 3
ANSWER_BODILESS: Final = 4

REASONS: Final = {
    100: "Continue",
    102: "Processing",
    103: "Early Hints",
    200: "OK",
    201: "Created",
    202: "Accepted",
    204: "No Content",
    206: "Partial Content",
    301: "Moved Permanently",
    302: "Found",
    303: "See Other",
    304: "Not Modified",
    307: "Temporary Redirect",
    308: "Permanent Redirect",
    400: "Bad Request",
    401: "Unauthorized",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    408: "Request Timeout",
    409: "Conflict",
    413: "Content Too Large",
    414: "URI Too Long",
    417: "Expectation Failed",
    421: "Misdirected Request",
    429: "Too Many Requests",
    431: "Request Header Fields Too Large",
    500: "Internal Server Error",
    502: "Bad Gateway",
    503: "Service Unavailable",
    504: "Gateway Timeout",
    505: "HTTP Version Not Supported",
}
STATUS_LINES: Final = {status: f"HTTP/1.1 {status} {REASONS.get(status, '')}\r\n".encode() for status in range(100, 600)}
LENGTHS_KNOWN: Final = frozenset((b"GET", b"HEAD", b"POST", b"PUT", b"DELETE", b"OPTIONS", b"PATCH"))


class Unacceptable(Exception):
    """A request that is refused, with the refusal."""

    def __init__(self, refusal: Refusal) -> None:
        self.refusal = refusal


class H1Server:
    """One connection's framing towards a client (`gateway.codec.events.ServerCodec`)."""

    __slots__ = (
        "_answer",
        "_answer_left",
        "_buffer",
        "_chunks",
        "_closing",
        "_draining",
        "_fields",
        "_head_request",
        "_keep",
        "_left",
        "_max_fields",
        "_max_head",
        "_max_target",
        "_out",
        "_scheme",
        "_state",
        "_stream",
        "_version",
    )

    def __init__(
        self, scheme: bytes, fields: Fields, max_head: int = 60 * 1024, max_fields: int = 100, max_target: int = 16 * 1024
    ) -> None:
        self._scheme = scheme
        self._fields = fields
        self._max_head = max_head
        self._max_fields = max_fields
        self._max_target = max_target
        self._state = HEAD
        self._stream = 1
        self._buffer = b""
        self._chunks: Chunks | None = None
        self._left = 0
        self._out: list[bytes] = []
        self._answer = NO_ANSWER
        self._answer_left = 0
        self._head_request = False
        self._keep = True
        self._version = HTTP11
        self._closing = False
        self._draining = False

    @property
    def closing(self) -> bool:
        """True when the connection is to be closed once everything is written."""
        return self._closing

    @property
    def streams(self) -> int:
        """1 while a request is read or answered, else 0."""
        return 0 if self._state == HEAD or self._closing else 1

    @property
    def waiting(self) -> int:
        """Bytes that were sent ahead and wait for the answer in progress (or the part of a head that is there)."""
        return len(self._buffer)

    def receive(self, data: bytes) -> list[Event]:
        """Takes bytes from the client. With `b""` it goes on with what waits."""
        if self._state >= COMPLETE:
            if self._state == COMPLETE:
                self._buffer += data
            return []
        if self._buffer:
            data, self._buffer = self._buffer + data, b""
        events: list[Event] = []
        try:
            if self._state == HEAD:
                data = self._read_head(data, events)
            if data or self._chunks is not None:
                self._read_body(data, events)
        except SyntaxProblem as problem:
            self._refuse(BadRequest(reason=str(problem)), events)
        except Unacceptable as problem:
            self._refuse(problem.refusal, events)
        return events

    def _refuse(self, refusal: Refusal, events: list[Event]) -> None:
        self._state = CLOSED
        self._keep = False
        self._buffer = b""
        self._chunks = None
        events.append(Refused(self._stream, refusal))

    def _read_head(self, data: bytes, events: list[Event]) -> bytes:
        """Reads a head if all of it is there; returns what follows it."""
        if data[:2] == CRLF:  # RFC 9112 section 2.2: an empty line before a request is ignored
            data = data[2:]
        end = data.find(HEAD_END, 0, self._max_head + 4)
        if end < 0:
            self._check_partial(data)
            self._buffer = data
            return b""
        lines = split_head(data[:end])
        if len(lines) > self._max_fields + 1:
            raise Unacceptable(HeadTooLarge(reason="too many header fields"))
        parts = lines[0].split(b" ")
        if len(parts) != 3:
            raise SyntaxProblem("a request line that is not method, target and version")
        method, target, version = parts
        if version not in (HTTP11, HTTP10):
            if version[:5] == b"HTTP/":
                raise Unacceptable(VersionNotSupported(reason=f"version {version[:16]!r}"))
            raise SyntaxProblem("a request line without a version")
        if method not in LENGTHS_KNOWN and (not method or method.translate(None, TOKEN_CHARACTERS)):
            raise SyntaxProblem("a method that is not a token")
        if len(target) > self._max_target:
            raise Unacceptable(TargetTooLong(reason=f"{len(target)} bytes"))
        self._version = version
        self._head_request = method == b"HEAD"
        self._keep = version == HTTP11

        headers: list[Header] = []
        append = headers.append
        kept = self._fields.kept.get
        read = self._fields.read
        special = SPECIAL
        host: bytes | None = None
        length = -1
        chunked = expects = False
        options: list[bytes] | None = None
        del lines[0]
        for line in lines:
            field = kept(line) or read(line)
            name = field[0]
            if name not in special:
                append(field)
                continue
            value = field[1]
            if name == b"host":
                if host is not None:
                    raise SyntaxProblem("more than one Host")
                host = value.lower()
            elif name == b"content-length":
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
            elif name == b"expect":
                if value.lower() != b"100-continue":
                    raise Unacceptable(ExpectationFailed(reason=f"expectation {value[:64]!r}"))
                expects = version == HTTP11
        if options is not None:
            headers = self._connection_options(options, headers)
        if chunked and (length >= 0 or version == HTTP10):
            raise SyntaxProblem("Transfer-Encoding together with Content-Length, or in HTTP/1.0")
        if not host:
            raise SyntaxProblem("no Host")
        if target[:1] != b"/" or not target.isascii():
            target = self._other_target(method, target, host)

        data = data[end + 4 :]
        if chunked:
            self._chunks = Chunks(self._fields)
            self._state = CHUNKED
            body_length = UNKNOWN_LENGTH
        elif length > 0:
            self._left = body_length = length
            self._state = SIZED
        else:
            body_length = 0
            self._state = COMPLETE
            self._buffer, data = data, b""
        head = RequestHead(method, self._scheme, host, target, headers, version, body_length)
        events.append(RequestReceived(self._stream, head, self._state == COMPLETE, expects))
        return data

    def _check_partial(self, data: bytes) -> None:
        """Refuses a head whose end is not there yet as soon as it cannot become a good one."""
        line = data.find(CRLF)
        if line < 0 and len(data) > self._max_target + 64:
            raise Unacceptable(TargetTooLong(reason="a request line that does not end"))
        if len(data) > self._max_head:
            raise Unacceptable(HeadTooLarge(reason=f"more than {self._max_head} bytes"))
        if data.count(b"\n") != data.count(CRLF):
            raise SyntaxProblem("a bare LF")

    def _connection_options(self, values: list[bytes], headers: list[Header]) -> list[Header]:
        """Applies the Connection fields: persistence (RFC 9112 section 9.3), and the fields that they name are taken off."""
        options = named_by_connection(values)
        if b"close" in options:
            self._keep = False
        elif b"keep-alive" in options:
            self._keep = True
        named = options - {b"close", b"keep-alive"}
        if b"content-length" in named or b"host" in named:
            raise SyntaxProblem("a Connection field that names what frames or addresses the message")
        return [field for field in headers if field[0] not in named] if named else headers

    @staticmethod
    def _other_target(method: bytes, target: bytes, host: bytes) -> bytes:
        """Absolute form and asterisk form, as an origin form (RFC 9112 section 3.2)."""
        if not target.isascii():
            raise SyntaxProblem("a target with bytes beyond ASCII")
        if method == b"CONNECT":
            raise Unacceptable(MethodNotAllowed(reason="CONNECT"))
        if target == b"*" and method == b"OPTIONS":
            return target
        scheme, separator, rest = target.partition(b"://")
        if not separator or scheme.lower() not in (b"http", b"https"):
            raise SyntaxProblem("a target in none of the forms that are served")
        cut = min((at for at in (rest.find(b"/"), rest.find(b"?"), rest.find(b"#")) if at >= 0), default=len(rest))
        if rest[:cut].lower() != host:
            raise SyntaxProblem("an absolute target for another host than Host says")
        rest = rest[cut:]
        return rest if rest[:1] == b"/" else b"/" + rest

    def _read_body(self, data: bytes, events: list[Event]) -> None:
        stream = self._stream
        if self._state == SIZED:
            left = self._left
            if len(data) >= left:
                body, rest = data[:left], data[left:]
                self._left = 0
                self._state = COMPLETE
                self._buffer = rest
                events.append(BodyReceived(stream, body))
                events.append(Ended(stream))
            else:
                self._left = left - len(data)
                events.append(BodyReceived(stream, data))
        elif self._chunks is not None:
            chunks = self._chunks
            body, rest = chunks.feed(data)
            if body:
                events.append(BodyReceived(stream, body))
            if chunks.done:
                self._chunks = None
                self._state = COMPLETE
                self._buffer = rest
                events.append(Ended(stream, chunks.trailers))

    def eof(self) -> list[Event]:
        """The client will send no more: what is in progress is given up (a client that shuts its side down has gone, as in Envoy)."""
        state, self._state = self._state, CLOSED
        self._keep = False
        if state in (SIZED, CHUNKED, COMPLETE):
            return [Reset(self._stream, 8)]
        self._closing = True
        return []

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
        if stream == self._stream and self._version == HTTP11 and self._answer == NO_ANSWER:
            self._out.append(write_fields([STATUS_LINES[status]], headers))

    def send_head(self, stream: int, status: int, headers: list[Header], ended: bool) -> None:
        """Sends a final answer's head; adds what frames it. Raises ValueError for a header that would split the answer."""
        if stream != self._stream or self._answer != NO_ANSWER or self._closing:
            return
        length = -1
        for name, value in headers:
            if name == b"content-length":
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

    def send_body(self, stream: int, data: bytes, ended: bool) -> None:
        """Sends some of the answer's body, in its framing."""
        if stream != self._stream or self._closing:
            return
        answer = self._answer
        if data:
            if answer == ANSWER_SIZED:
                if len(data) > self._answer_left:
                    data = data[: self._answer_left]
                    self._keep = False
                self._answer_left -= len(data)
                self._out.append(data)
            elif answer == ANSWER_CHUNKED:
                self._out += (b"%x\r\n" % len(data), data, CRLF)
            elif answer == ANSWER_UNTIL_CLOSE:
                self._out.append(data)
        if ended:
            if answer == ANSWER_CHUNKED:
                self._out.append(b"0\r\n\r\n")
            self._answer_ended()

    def send_trailers(self, stream: int, trailers: list[Header]) -> None:
        """Ends the answer with trailers, in chunked framing; elsewhere without them."""
        if stream == self._stream and not self._closing and self._answer == ANSWER_CHUNKED and trailers:
            self._out.append(write_fields([b"0\r\n"], trailers))
            self._answer_ended()
        else:
            self.send_body(stream, b"", True)

    def _answer_ended(self) -> None:
        """The answer is complete: on to the next request, or to the end when the framing or somebody says so."""
        if self._answer == ANSWER_SIZED and self._answer_left:
            self._keep = False  # shorter than announced: only the connection's end tells the client
        self._answer = NO_ANSWER
        if self._keep and not self._draining and self._state == COMPLETE:
            self._stream += 1
            self._state = HEAD
        else:
            self._closing = True
            self._state = CLOSED
            self._buffer = b""

    def reset(self, stream: int, code: int) -> None:
        """Gives the request up: the connection ends, and the end of the body (if one was on its way) is missing."""
        if stream == self._stream:
            self._closing = True
            self._keep = False
            self._state = CLOSED
            self._buffer = b""
            self._chunks = None

    def window(self, stream: int) -> int:
        """There is none in HTTP/1.1: a very large number."""
        return HIGH_WATER

    def consumed(self, stream: int, credit: int) -> None:
        """Does nothing in HTTP/1.1."""

    def drain(self) -> None:
        """Takes no request after the one in progress; ends at once when there is none."""
        self._draining = True
        if self._state == HEAD:
            self._closing = True
            self._state = CLOSED


SPECIAL: Final = CONNECTION_FIELDS | {b"host", b"content-length", b"expect"}
"""Fields that the framing looks at; all but content-length are taken off."""
