"""HTTP/1.1 towards clients (RFC 9112). Sans-io: see `gateway.codec.events`.

One request is read at a time: what a client sends ahead (pipelining) waits here until the answer before it is complete, and the
connection stops reading when too much waits. Requests are numbered 1, 2, 3, ...

What comes after a request for a tunnel waits as well: it is the tunnel's if the answer opens it, and else the next request.
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
    LineTooLong,
    PartialHead,
    SyntaxProblem,
    TooLarge,
    check_line,
    read_length,
)
from gateway.codec.h1_answers import CHUNKED, CLOSED, COMPLETE, HEAD, NO_ANSWER, SIZED, TUNNEL, H1Answers
from gateway.codec.h1_request import (
    ROOM_FOR_LINE,
    USUAL_METHODS,
    Unacceptable,
    check_method,
    connection_options,
    origin_form,
    tunnel_to,
    wants_websocket,
)
from gateway.codec.websocket_key import KEY, value_of
from mesh.http import CONNECT, HTTP10, HTTP11, UNKNOWN_LENGTH, WEBSOCKET, Header, RequestHead
from mesh.refusals import BadRequest, ExpectationFailed, HeadTooLarge, Refusal, TargetTooLong, VersionNotSupported


class H1Server(H1Answers):
    """One connection's framing towards a client (`gateway.codec.events.ServerCodec`)."""

    __slots__ = ("_chunks", "_fields", "_left", "_max_fields", "_max_head", "_max_target", "_partial", "_scheme")

    def __init__(
        self, scheme: bytes, fields: Fields, max_head: int = 60 * 1024, max_fields: int = 100, max_target: int = 16 * 1024
    ) -> None:
        super().__init__()
        self._scheme = scheme
        self._fields = fields
        self._max_head = max_head
        self._max_fields = max_fields
        self._max_target = max_target
        self._partial: PartialHead | None = None
        self._chunks: Chunks | None = None
        self._left = 0

    @property
    def streams(self) -> int:
        """1 while a request is read or answered, else 0."""
        return 0 if self._state == HEAD or self.closing else 1

    @property
    def waiting(self) -> int:
        """Bytes that were sent ahead and wait for the answer in progress (or the part of a head that is there)."""
        return len(self._buffer) if self._partial is None else len(self._partial.data)

    def receive(self, data: bytes) -> list[Event]:
        """Takes bytes from the client. With `b""` it goes on with what waits."""
        if self._state >= COMPLETE:
            if self._state == COMPLETE:
                self._buffer += data
            elif self._state == TUNNEL:
                data, self._buffer = self._buffer + data, b""
                if data:
                    return [BodyReceived(self._stream, data)]
            return []
        if self._buffer:
            data, self._buffer = self._buffer + data, b""
        events: list[Event] = []
        try:
            if self._state == HEAD:
                if self._partial is not None:
                    data = self._join(self._partial, data)
                data = self._read_head(data, events)
            if data or self._chunks is not None:
                self._read_body(data, events)
        except LineTooLong as problem:
            self._refuse(TargetTooLong(reason=str(problem)), events)
        except TooLarge as problem:
            self._refuse(HeadTooLarge(reason=str(problem)), events)
        except SyntaxProblem as problem:
            self._refuse(BadRequest(reason=str(problem)), events)
        except Unacceptable as problem:
            self._refuse(problem.refusal, events)
        return events

    def _refuse(self, refusal: Refusal, events: list[Event]) -> None:
        self._state = CLOSED
        self._keep = False
        self._buffer = b""
        self._partial = None
        self._chunks = None
        events.append(Refused(self._stream, refusal))

    def _join(self, partial: PartialHead, data: bytes) -> bytes:
        """The head so far, if it is complete now or turns out not to have begun; else nothing."""
        if not partial.add(data) and not partial.data.startswith(CRLF):
            return b""
        self._partial = None
        return bytes(partial.data)

    def _read_head(self, data: bytes, events: list[Event]) -> bytes:
        """Reads a head if all of it is there; returns what follows it."""
        if data[:2] == CRLF:  # RFC 9112 section 2.2: empty lines before a request are ignored
            at = 2
            while data.startswith(CRLF, at):
                at += 2
            data = data[at:]
        end = data.find(HEAD_END, 0, self._max_head + 4)
        if end < 0:
            if data:
                self._partial = partial = PartialHead(self._max_head, self._max_target + ROOM_FOR_LINE)
                partial.add(data)
            if self._no_more:  # it will never be complete
                self.closing = True
                self._state = CLOSED
            return b""
        lines = data[:end].split(CRLF)
        if len(lines) > self._max_fields + 1:
            raise Unacceptable(HeadTooLarge(reason="too many header fields"))
        start = lines[0]
        check_line(start)
        parts = start.split(b" ")
        if len(parts) != 3:
            raise SyntaxProblem("a request line that is not method, target and version")
        method, target, version = parts
        if version not in (HTTP11, HTTP10):
            if version[:5] == b"HTTP/":
                raise Unacceptable(VersionNotSupported(reason=f"version {version[:16]!r}"))
            raise SyntaxProblem("a request line without a version")
        if method not in USUAL_METHODS:
            check_method(method)
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
        upgrade: bytes | None = None
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
            elif name == b"upgrade":
                upgrade = value if upgrade is None else upgrade + b"," + value
        if options is not None:
            headers, self._keep = connection_options(options, headers, self._keep)
        if chunked and (length >= 0 or version == HTTP10):
            raise SyntaxProblem("Transfer-Encoding together with Content-Length, or in HTTP/1.0")
        self._tunnel = tunnel = b""
        if method == CONNECT:
            if chunked or length > 0:
                raise SyntaxProblem("a CONNECT with a body")
            host, target = tunnel_to(target, host), b"/"
            self._tunnel = tunnel = CONNECT
        if not host:
            raise SyntaxProblem("no Host")
        if target[:1] != b"/" or not target.isascii():
            target = origin_form(method, target, host)
        if upgrade is not None and wants_websocket(method, version, upgrade, options, chunked or length > 0):
            self._tunnel = tunnel = WEBSOCKET
            self._key = value_of(headers, KEY)
            headers.append((b"upgrade", WEBSOCKET))

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
        if self._no_more and not data and not self._buffer:
            self._keep = False
        head = RequestHead(method, self._scheme, host, target, headers, version, body_length, tunnel=tunnel)
        events.append(RequestReceived(self._stream, head, self._state == COMPLETE and not tunnel, expects))
        return data

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
        self.closing = True
        return []

    def shut(self, tunnel_only: bool) -> list[Event] | None:
        """The client sends no more, and may still read: None when there is nothing left to tell it, else what comes of it. What it has sent
        completely is answered, unless `tunnel_only`; in a tunnel, its direction ends."""
        if self._state == TUNNEL:
            known, self._no_more = self._no_more, True
            if self._answer == NO_ANSWER:
                self.closing = True
                self._state = CLOSED
            return [] if known else [Ended(self._stream)]
        if self._state == COMPLETE and not self._tunnel and not tunnel_only:
            self._no_more = True
            if not self._buffer:
                self._keep = False
            return []
        return None

    def reset(self, stream: int, code: int) -> None:
        """Gives the request up: the connection ends, and the end of the body (if one was on its way) is missing."""
        if stream == self._stream:
            self.closing = True
            self._keep = False
            self._state = CLOSED
            self._buffer = b""
            self._partial = None
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
            self.closing = True
            self._state = CLOSED


SPECIAL: Final = CONNECTION_FIELDS | {b"host", b"content-length", b"expect"}
"""Fields that the framing looks at; all but content-length are taken off."""
