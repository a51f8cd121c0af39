"""HTTP/2 towards upstreams (RFC 9113). Sans-io: see `gateway.codec.events` and `gateway.codec.h2`."""

from __future__ import annotations

from typing import Final

from h2.errors import ErrorCodes
from h2.events import Event as LibraryEvent
from h2.events import InformationalResponseReceived
from h2.events import ResponseReceived as LibraryResponse
from hpack import NeverIndexedHeaderTuple

from gateway.codec.events import Event, Informational, Reset, ResponseReceived
from gateway.codec.h2 import H2Codec
from gateway.codec.h2_fields import Malformed, check_fields, check_values
from gateway.codec.h2_library import Stream
from mesh.http import HTTP2, UNKNOWN_LENGTH, Header, RequestHead
from mesh.refusals import Refusal, UpstreamProtocol

MAX_STREAMS: Final = 100
"""Requests at a time on one connection, if the upstream does not want fewer."""
MAX_NUMBER: Final = 2**31 - 1
MAX_INFORMATIONAL: Final = 32
SECRET: Final = frozenset((b"authorization", b"proxy-authorization"))
"""Kept out of the compression that all callers of a connection share (RFC 7541 section 7.1.3), as are cookies that could be guessed."""
SHORT_COOKIE: Final = 20


class H2Client(H2Codec):
    """One connection's framing towards an upstream (`gateway.codec.events.ClientCodec`)."""

    __slots__ = ("_gone", "_informational", "_max_fields", "_max_head")

    def __init__(self, *, max_head: int = 60 * 1024, max_fields: int = 100) -> None:
        super().__init__(client=True, max_streams=0, max_head=max_head)
        self._max_head = max_head
        self._max_fields = max_fields
        self._gone = False
        self._informational: dict[int, int] = {}

    def _broken(self, why: str) -> Refusal:
        return UpstreamProtocol(reason=why)

    @property
    def closing(self) -> bool:
        """True when the connection is to be closed: it is broken, or has gone away and everything is answered."""
        return self._closing or (self._gone and not self._streams)

    @property
    def available(self) -> int:
        """How many more requests may be started now."""
        if self._closing or self._gone:
            return 0
        most = min(MAX_STREAMS, self._conn.remote_settings.max_concurrent_streams)
        return max(0, most - len(self._streams))

    def request(self, head: RequestHead, headers: list[Header], target: bytes, authority: bytes, ended: bool) -> int:
        """Sends a request's head. Raises ValueError for a header that HTTP/2 cannot carry, or when no stream is available."""
        if not self.available:
            raise ValueError("a request on a connection that takes no more")
        check_values(headers, head.method, target, authority)
        number: int = self._conn.get_next_available_stream_id()
        fields = [(b":method", head.method), (b":scheme", head.scheme), (b":authority", authority), (b":path", target)]
        for field in headers:
            name = field[0]
            guessable = name in SECRET or (name == b"cookie" and len(field[1]) < SHORT_COOKIE)
            fields.append(NeverIndexedHeaderTuple(*field) if guessable else field)
        if not ended and head.body_length > 0 and not any(name == b"content-length" for name, _ in headers):
            fields.append((b"content-length", b"%d" % head.body_length))
        self._conn.send_headers(number, fields, end_stream=ended)
        stream = self._streams[number] = Stream(number, head.method)
        stream.began = True
        stream.ended_by_us = ended
        if number >= MAX_NUMBER - 2:
            self._gone = True
        return number

    def _head(self, event: LibraryEvent, events: list[Event]) -> None:
        if isinstance(event, LibraryResponse | InformationalResponseReceived):
            stream = self._streams.get(event.stream_id or 0)
            if stream is None:
                return
            ended = isinstance(event, LibraryResponse) and event.stream_ended is not None
            try:
                self._response(stream, list(event.headers or ()), ended, events)
            except Malformed as problem:
                self._malformed(stream.number, str(problem), events)

    def _response(self, stream: Stream, fields: list[Header], ended: bool, events: list[Event]) -> None:
        if not fields or fields[0][0] != b":status" or len(fields[0][1]) != 3 or not fields[0][1].isdigit():
            raise Malformed("an answer without a status")
        headers = fields[1:]
        check_fields(headers)
        if len(headers) > self._max_fields or sum([len(name) + len(value) for name, value in headers]) > self._max_head:
            raise Malformed("a head that is too large")
        status = int(fields[0][1])
        number = stream.number
        if status < 200:
            seen = self._informational[number] = self._informational.get(number, 0) + 1
            if status < 100 or status == 101 or seen > MAX_INFORMATIONAL:
                raise Malformed(f"status {status}, which was not asked for")
            events.append(Informational(number, status, headers))
            return
        if status > 599:
            raise Malformed(f"status {status}")
        self._informational.pop(number, None)
        length = UNKNOWN_LENGTH
        for name, value in headers:
            if name == b"content-length":
                if length >= 0 or not value.isdigit() or len(value) > 18:
                    raise Malformed("a Content-Length that is not one number")
                length = int(value)
        if stream.method == b"HEAD" or status in {204, 304}:
            length = 0
        elif ended and length > 0:
            raise Malformed("a Content-Length, and no body")
        stream.left = length
        if ended:
            length = 0
            stream.ended_by_peer = True
        events.append(ResponseReceived(number, status, headers, HTTP2, length, ended))
        if ended and stream.ended_by_us:
            self._forget(stream)

    def _reset_by_peer(self, number: int, code: int, remote: bool, events: list[Event]) -> None:
        stream = self._streams.get(number)
        if stream is not None and stream.ended_by_peer:  # the answer is complete; the rest of the request is not wanted
            self._forget(stream)
        else:
            super()._reset_by_peer(number, code, remote, events)

    def _forget(self, stream: Stream) -> None:
        self._informational.pop(stream.number, None)
        super()._forget(stream)

    def _goaway(self, last: int, events: list[Event]) -> None:
        """The upstream takes no more requests; those beyond `last` it has not looked at."""
        self._gone = True
        super()._goaway(last, events)
        for number in [number for number in self._streams if number > last]:
            self._forget(self._streams[number])
            events.append(Reset(number, int(ErrorCodes.REFUSED_STREAM), unprocessed=True))
