"""HTTP/2 towards upstreams (RFC 9113). Sans-io: see `gateway.codec.events` and `gateway.codec.h2`."""

from __future__ import annotations

from typing import Final

from gateway.codec import h2_frames as h2
from gateway.codec.events import Event, Informational, Reset, ResponseReceived
from gateway.codec.h1 import MAX_LENGTH_DIGITS
from gateway.codec.h2 import STREAM_WINDOW, H2Codec
from gateway.codec.h2_fields import HOP_BY_HOP, Malformed, check_fields, check_values
from gateway.codec.h2_frames import Breach
from gateway.codec.h2_stream import Stream
from mesh.http import CONNECT, HTTP2, UNKNOWN_LENGTH, Header, RequestHead
from mesh.refusals import Refusal, UpstreamProtocol

MAX_STREAMS: Final = 100
"""Requests at a time on one connection, if the upstream does not want fewer."""
MAX_INFORMATIONAL: Final = 32


class H2Client(H2Codec):
    """One connection's framing towards an upstream (`gateway.codec.events.ClientCodec`)."""

    __slots__ = ("_gone", "_max_fields", "_max_head", "_max_streams", "_next")

    def __init__(self, *, max_head: int = 60 * 1024, max_fields: int = 100, streams: int = MAX_STREAMS) -> None:
        """The connection's window holds all of its `streams`', so that whoever does not read an answer keeps no other from being read."""
        settings = {h2.ENABLE_PUSH: 0, h2.MAX_CONCURRENT_STREAMS: 0, h2.MAX_HEADER_LIST_SIZE: 2 * max_head}
        super().__init__(True, settings, streams * STREAM_WINDOW)
        self._max_streams = streams
        self._max_head = max_head
        self._max_fields = max_fields
        self._gone = False
        """No request may be begun any more."""
        self._next = 1

    def _refusal(self, why: str) -> Refusal:
        return UpstreamProtocol(reason=why)

    @property
    def closing(self) -> bool:
        """True when the connection is to be closed: it is broken, or has gone away and everything is answered."""
        return self._closing or (self._gone and not self._streams)

    # Requests

    @property
    def available(self) -> int:
        """How many more requests may be started now."""
        if self._closing or self._gone:
            return 0
        return max(0, min(self._max_streams, self._most) - len(self._streams))

    def request(self, head: RequestHead, headers: list[Header], target: bytes, authority: bytes, ended: bool) -> int:
        """Sends a request's head. Raises ValueError for a header that HTTP/2 cannot carry, when no stream is available, and for a WebSocket
        that the upstream does not take (`websockets`)."""
        if not self.available:
            raise ValueError("a request on a connection that takes no more")
        check_values(headers, head.method, target, authority)
        tunnel = head.tunnel
        if not tunnel:
            fields = [(b":method", head.method), (b":scheme", head.scheme), (b":authority", authority), (b":path", target), *headers]
        else:
            fields = self._tunnel(head, headers, target, authority)
            ended = False
        if not ended and head.body_length > 0 and not any(name == b"content-length" for name, _ in headers):
            fields.append((b"content-length", b"%d" % head.body_length))
        number = self._next
        self._next += 2
        self._write_head(number, fields, ended)
        stream = self._streams[number] = Stream(number, head.method, tunnel, self._initial, STREAM_WINDOW)
        stream.began = True
        stream.ended_by_us = ended
        if self._next > h2.LARGEST:
            self._gone = True
        return number

    def _tunnel(self, head: RequestHead, headers: list[Header], target: bytes, authority: bytes) -> list[Header]:
        """The fields of a request for a tunnel (RFC 9113 section 8.5, RFC 8441 section 4)."""
        fields = [(b":method", CONNECT), (b":authority", authority)]
        if head.tunnel != CONNECT:
            if not self.websockets:
                raise ValueError("a WebSocket on a connection that takes none")
            fields += [(b":protocol", head.tunnel), (b":scheme", head.scheme), (b":path", target)]
        return fields + [field for field in headers if field[0] not in HOP_BY_HOP and field[0] != b"sec-websocket-key"]

    # Answers

    def _began(self, number: int) -> bool:
        return number & 1 == 1 and number < self._next

    def _push(self, value: int) -> None:
        if value:
            raise Breach(h2.PROTOCOL_ERROR, "a server that says that it takes pushes")

    def _fields(self, number: int, block: bytes, ended: bool, events: list[Event]) -> None:
        stream = self._streams.get(number)
        if stream is None:
            self._not_open(number)
            self._decode(block)
        elif stream.answered:
            self._trailers(stream, block, ended, events)
        else:
            fields = self._decode(block)
            try:
                self._response(stream, fields, ended, events)
            except Malformed as problem:
                self._broken_stream(stream, h2.PROTOCOL_ERROR, str(problem), events)

    def _response(self, stream: Stream, fields: list[Header], ended: bool, events: list[Event]) -> None:
        if not fields or fields[0][0] != b":status" or len(fields[0][1]) != 3 or not fields[0][1].isdigit():
            raise Malformed("an answer without a status")
        headers = fields[1:]
        if len(headers) > self._max_fields or sum([len(name) + len(value) for name, value in headers]) > self._max_head:
            raise Malformed("a head that is too large")
        check_fields(headers)
        status = int(fields[0][1])
        number = stream.number
        if status < 200:
            stream.informational += 1
            if status < 100 or status == 101 or stream.informational > MAX_INFORMATIONAL:
                raise Malformed(f"status {status}, which was not asked for")
            if ended:
                raise Malformed("an informational answer that ends its stream")
            events.append(Informational(number, status, [field for field in headers if field[0] != b"content-length"]))
            return
        if status > 599:
            raise Malformed(f"status {status}")
        stream.answered = True
        if stream.tunnel:
            if 200 <= status < 300:
                self._opened(stream, status, headers, ended, events)
                return
            stream.tunnel = b""  # an answer like others, to a request that has no body
            self._write_data(stream, b"", True)
            self._sent(stream)
        length = _length(headers)
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

    def _opened(self, stream: Stream, status: int, headers: list[Header], ended: bool, events: list[Event]) -> None:
        """The tunnel that was asked for is open."""
        headers = [field for field in headers if field[0] != b"content-length"]
        status = status if stream.tunnel == CONNECT else 101
        events.append(ResponseReceived(stream.number, status, headers, HTTP2, UNKNOWN_LENGTH, False))
        if ended:
            self._ended(stream, None, events)

    # Ends

    def _reset_by_peer(self, stream: Stream, code: int, events: list[Event]) -> None:
        if stream.ended_by_peer and not stream.tunnel:  # the answer is complete; the rest of the request is not wanted
            self._forget(stream)
            self._remember(stream.number, True)
        else:
            super()._reset_by_peer(stream, code, events)

    def _goaway(self, last: int, events: list[Event]) -> None:
        """The upstream takes no more requests; those beyond `last` it has not looked at."""
        self._gone = True
        super()._goaway(last, events)
        for number in [number for number in self._streams if number > last]:
            self._forget(self._streams[number])
            self._remember(number, False)
            events.append(Reset(number, h2.REFUSED_STREAM, unprocessed=True))


def _length(headers: list[Header]) -> int:
    """The length of the body that an answer announces. Raises `Malformed`."""
    length = UNKNOWN_LENGTH
    for name, value in headers:
        if name == b"content-length":
            if length >= 0 or not value.isdigit() or len(value) > MAX_LENGTH_DIGITS:
                raise Malformed("a Content-Length that is not one number")
            length = int(value)
    return length
