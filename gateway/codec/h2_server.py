"""HTTP/2 towards clients (RFC 9113). Sans-io: see `gateway.codec.events` and `gateway.codec.h2`."""

from __future__ import annotations

from typing import Final

from gateway.codec import h2_frames as h2
from gateway.codec.events import Event, Refused, RequestReceived
from gateway.codec.h2 import RESETS, STREAM_WINDOW, H2Codec
from gateway.codec.h2_fields import HOP_BY_HOP, Malformed, check_values
from gateway.codec.h2_frames import Breach
from gateway.codec.h2_request import Limits, Read, read_request
from gateway.codec.h2_stream import Stream
from mesh.http import CONNECT, HTTP2, Header, RequestHead
from mesh.refusals import BadRequest, Refusal

KEPT: Final = 16
"""Heads of a connection that are kept as they were read."""
KEPT_BLOCK: Final = 1024
"""Bytes of the block of a head that is kept."""
_DATA: Final = bytes((h2.DATA,))
_OPENING: Final = frozenset((b"connection", b"upgrade", b"sec-websocket-accept", b"content-length", b"transfer-encoding"))
"""What an answer that opens a tunnel does not say in HTTP/2 (RFC 8441 section 5, RFC 9110 section 9.3.6)."""


class H2Server(H2Codec):
    """One connection's framing towards a client (`gateway.codec.events.ServerCodec`).

    With `websockets` clients are told that they may ask for them (RFC 8441): a request for one has `RequestHead.tunnel`, and an answer
    of 101 opens it.
    """

    __slots__ = ("_kept", "_kept_at", "_limits", "_max_streams", "_resets", "_scheme")

    def __init__(
        self,
        scheme: bytes,
        *,
        max_streams: int = 100,
        max_head: int = 60 * 1024,
        max_fields: int = 100,
        max_target: int = 16 * 1024,
        websockets: bool = False,
    ) -> None:
        settings = {h2.MAX_CONCURRENT_STREAMS: max_streams, h2.MAX_HEADER_LIST_SIZE: 2 * max_head}
        if websockets:
            settings[h2.ENABLE_CONNECT_PROTOCOL] = 1
        super().__init__(False, settings)
        self._max_streams = max_streams
        self._scheme = scheme
        self._limits = Limits(max_head, max_fields, max_target, websockets)
        self._resets = RESETS
        self._kept: dict[bytes, Read] = {}
        """What blocks have been read as. It holds as long as the decoder's table stays as it is."""
        self._kept_at = 0

    def _refusal(self, why: str) -> Refusal:
        return BadRequest(reason=why)

    def _began(self, number: int) -> bool:
        return number & 1 == 1 and number <= self._peer_last

    def _fields(self, number: int, block: bytes, ended: bool, events: list[Event]) -> None:
        stream = self._streams.get(number)
        if stream is not None:
            self._trailers(stream, block, ended, events)
        elif number > self._peer_last and number & 1:
            self._peer_last = number
            self._request(number, block, ended, events)
        elif number in self._dropped:
            self._not_open(number)
            self._decode(block)
        elif number in self._done:
            raise Breach(h2.STREAM_CLOSED, "a head on a stream that is over")
        else:
            raise Breach(h2.PROTOCOL_ERROR, "a stream number that no client may use now")

    def _request(self, number: int, block: bytes, ended: bool, events: list[Event]) -> None:
        if self._draining or len(self._streams) >= self._max_streams:
            self._decode(block)
            self._refuse(number, h2.REFUSED_STREAM)
            self._count_reset()
            return
        try:
            read = self._read(block)
            if isinstance(read, Refusal):
                stream = self._begin(number, b"", b"", ended)
                stream.deaf = True
                events.append(Refused(number, read))
                return
        except Malformed as problem:
            self._malformed(number, str(problem), events)
            return
        method, authority, target, headers, length, expects, tunnel = read
        if ended:
            if length > 0:
                self._malformed(number, "a Content-Length, and no body", events)
                return
            length = 0
        stream = self._begin(number, method, tunnel, ended)
        if not ended:
            stream.left = length
        head = RequestHead(method, self._scheme, authority, target, headers.copy(), HTTP2, length, tunnel=tunnel)
        events.append(RequestReceived(number, head, ended, expects))

    def _malformed(self, number: int, why: str, events: list[Event]) -> None:
        """A request that breaks the rules: its stream ends before it has begun."""
        self._refuse(number, h2.PROTOCOL_ERROR)
        events.append(Refused(number, BadRequest(reason=why)))
        self._count_reset()

    def _begin(self, number: int, method: bytes, tunnel: bytes, ended: bool) -> Stream:
        stream = self._streams[number] = Stream(number, method, tunnel, self._initial, STREAM_WINDOW)
        stream.answered = True
        stream.ended_by_peer = ended
        return stream

    def _read(self, block: bytes) -> Read | Refusal:
        """What the block of a request says. Raises `Malformed` and `Breach`."""
        kept, decoder = self._kept, self._decoder
        changes = decoder.changes
        if self._kept_at != changes:
            kept.clear()
            self._kept_at = changes
        known = kept.get(block)
        if known is not None:
            return known
        read = read_request(self._decode(block), self._limits)
        if decoder.changes == changes and len(block) <= KEPT_BLOCK and not isinstance(read, Refusal):
            if len(kept) >= KEPT:
                kept.clear()
            kept[block] = read
        return read

    def _count_reset(self) -> None:
        """A stream ends in a reset. A client that makes us send them gets its work for nothing just as well (CVE-2025-8671)."""
        self._resets -= 1
        if self._resets <= 0:
            raise Breach(h2.ENHANCE_YOUR_CALM, "a flood of resets")

    def _reset_by_peer(self, stream: Stream, code: int, events: list[Event]) -> None:
        self._count_reset()
        super()._reset_by_peer(stream, code, events)

    def _broken_stream(self, stream: Stream, code: int, why: str, events: list[Event]) -> None:
        super()._broken_stream(stream, code, why, events)
        self._count_reset()

    # Answers

    @property
    def in_head(self) -> bool:
        """Whether a request's head, or what comes before the first of them, has begun and not ended."""
        if self._block or (self._opening and self._opening != h2.PREFACE):
            return True
        buffer = self._buffer
        return bool(buffer) and buffer[3:4] != _DATA

    def too_slow(self) -> list[Event]:
        """What is `in_head` did not end in time: the connection does."""
        events: list[Event] = []
        self._fail(Breach(h2.ENHANCE_YOUR_CALM, "a head that does not end"), events)
        return events

    def send_informational(self, stream: int, status: int, headers: list[Header]) -> None:
        """Sends a 1xx answer; dropped once the answer has begun."""
        found = self._streams.get(stream)
        if found is not None and not found.began:
            self._write_head(stream, _fields(status, headers), False)

    def send_head(self, stream: int, status: int, headers: list[Header], ended: bool) -> None:
        """Sends a final answer's head. Raises ValueError for a header that HTTP/2 cannot carry, and for 101 to who did not ask for it."""
        found = self._streams.get(stream)
        if found is None or found.began:
            return
        if found.tunnel and (status == 101 if found.tunnel != CONNECT else 200 <= status < 300):
            headers = [field for field in headers if field[0] not in _OPENING]
            status = 200 if status == 101 else status
        else:
            if status == 101:
                raise ValueError("a change of protocol that nobody asked for")
            if status == 204:
                headers = [field for field in headers if field[0] != b"content-length"]
            found.tunnel = b""
        self._write_head(stream, _fields(status, headers), ended)
        found.began = True
        found.bodiless = found.method == b"HEAD" or status in {204, 304}
        if self._resets < RESETS:
            self._resets += 1
        if ended:
            self._sent(found)

    def _sent(self, stream: Stream) -> None:
        """The answer is complete; a request that is not, is asked to stop (RFC 9113 section 8.1), a tunnel has its other direction."""
        super()._sent(stream)
        if not stream.ended_by_peer and not (stream.tunnel and stream.began):
            self._drop(stream, h2.NO_ERROR)

    # Ends

    def drain(self) -> None:
        """Takes no new requests: GOAWAY with the last one that was taken."""
        if not self._draining and not self._closing:
            self._draining = True
            self._out.append(h2.goaway(self._peer_last, h2.NO_ERROR))

    def _goaway(self, last: int, events: list[Event]) -> None:
        """A client that goes away: what it has asked is still answered."""
        self._draining = True
        super()._goaway(last, events)


_STATUS: Final = {status: (b":status", b"%d" % status) for status in range(100, 600)}


def _fields(status: int, headers: list[Header]) -> list[Header]:
    """An answer's head. Raises ValueError for a value that would split it."""
    check_values(headers)
    return [_STATUS.get(status) or (b":status", b"%d" % status), *[field for field in headers if field[0] not in HOP_BY_HOP]]
