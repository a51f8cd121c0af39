"""HTTP/2 towards clients (RFC 9113). Sans-io: see `gateway.codec.events` and `gateway.codec.h2`."""

from __future__ import annotations

from typing import Final

from h2.errors import ErrorCodes
from h2.events import Event as LibraryEvent
from h2.events import RequestReceived as LibraryRequest

from gateway.codec.events import Event, Refused, RequestReceived
from gateway.codec.h1 import TOKEN
from gateway.codec.h2 import RESETS, H2Codec
from gateway.codec.h2_fields import HOP_BY_HOP, MALFORMED, Malformed, check_fields, check_values
from gateway.codec.h2_frames import Flooded
from gateway.codec.h2_library import Stream
from mesh.http import HTTP2, UNKNOWN_LENGTH, Header, RequestHead
from mesh.refusals import BadRequest, ExpectationFailed, HeadTooLarge, MethodNotAllowed, Refusal, TargetTooLong

STREAMS_AHEAD: Final = 100
"""Streams beyond the limit that cost themselves only: a client may send them before it has seen our settings."""
_PSEUDO: Final = frozenset((b":method", b":scheme", b":authority", b":path", b":protocol"))


class H2Server(H2Codec):
    """One connection's framing towards a client (`gateway.codec.events.ServerCodec`)."""

    __slots__ = ("_last", "_max_fields", "_max_head", "_max_streams", "_max_target", "_resets", "_scheme")

    def __init__(
        self, scheme: bytes, *, max_streams: int = 100, max_head: int = 60 * 1024, max_fields: int = 100, max_target: int = 16 * 1024
    ) -> None:
        super().__init__(client=False, max_streams=max_streams, max_head=max_head)
        self._conn.local_settings.max_concurrent_streams = max_streams + STREAMS_AHEAD
        self._conn.local_settings.acknowledge()
        self._max_streams = max_streams
        self._scheme = scheme
        self._max_head = max_head
        self._max_fields = max_fields
        self._max_target = max_target
        self._last = 0
        self._resets = RESETS

    def _broken(self, why: str) -> Refusal:
        return BadRequest(reason=why)

    def _head(self, event: LibraryEvent, events: list[Event]) -> None:
        if isinstance(event, LibraryRequest):
            self._request(event, events)

    def _request(self, event: LibraryRequest, events: list[Event]) -> None:
        number = event.stream_id or 0
        self._last = max(self._last, number)
        if self._draining or len(self._streams) >= self._max_streams:
            if not self._draining:
                self._count_reset()
            self._end_stream(number, int(ErrorCodes.REFUSED_STREAM))
            return
        ended = event.stream_ended is not None
        self._streams[number] = stream = Stream(number)
        stream.ended_by_peer = ended
        try:
            read = self._read(list(event.headers or ()), ended)
        except Malformed as problem:
            self._malformed(number, str(problem), events)
            return
        if isinstance(read, Refusal):
            stream.deaf = True
            events.append(Refused(number, read))
            return
        head, expects = read
        stream.method = head.method
        if not ended:
            stream.left = head.body_length
        events.append(RequestReceived(number, head, ended, expects))

    def _read(self, fields: list[Header], ended: bool) -> tuple[RequestHead, bool] | Refusal:
        """The head that `fields` make up, and whether the client waits for `100 Continue`; or why it is refused. Raises `Malformed`."""
        pseudo: dict[bytes, bytes] = {}
        at = 0
        for name, value in fields:
            if name[:1] != b":":
                break
            if name not in _PSEUDO or name in pseudo:
                raise Malformed(f"the pseudo-header {name[:64]!r}, which is unknown or there twice")
            pseudo[name] = value
            at += 1
        regular = fields[at:]
        check_fields(regular)
        method = pseudo.get(b":method", b"")
        if not method or method.translate(None, TOKEN):
            raise Malformed("no method, or one that is not a token")
        authority = pseudo.get(b":authority", b"")
        target = pseudo.get(b":path", b"")
        if method == b"CONNECT" or b":protocol" in pseudo:
            return MethodNotAllowed(reason="CONNECT")
        if not target or b":scheme" not in pseudo:
            raise Malformed("no path or no scheme")
        all_pseudo = b"".join(pseudo.values())
        if len(all_pseudo.translate(None, MALFORMED + b" ")) != len(all_pseudo):
            raise Malformed("a pseudo-header with a control character or white space")
        if len(target) > self._max_target:
            return TargetTooLong(reason=f"{len(target)} bytes")
        if len(regular) > self._max_fields:
            return HeadTooLarge(reason="too many header fields")
        if sum([len(name) + len(value) for name, value in fields]) > self._max_head:
            return HeadTooLarge(reason=f"more than {self._max_head} bytes")
        headers: list[Header] = []
        cookies: list[bytes] = []
        length = UNKNOWN_LENGTH
        expects = False
        host: bytes | None = None
        for field in regular:
            name, value = field
            if name == b"cookie":
                cookies.append(value)
                continue
            if name == b"host":
                if host is not None:
                    raise Malformed("more than one Host")
                host = value
                continue
            if name == b"content-length":
                if length >= 0 or not value.isdigit() or len(value) > 18:
                    raise Malformed("a Content-Length that is not one number")
                length = int(value)
            elif name == b"expect":
                if value.lower() != b"100-continue":
                    return ExpectationFailed(reason=f"expectation {value[:64]!r}")
                expects = True
                continue
            if value[:1] in (b" ", b"\t") or value[-1:] in (b" ", b"\t"):
                headers.append((name, value.strip(b" \t")))
            else:
                headers.append(field)
        if cookies:
            headers.append((b"cookie", b"; ".join(cookies)))
        if host is not None and authority and host.lower() != authority.lower():
            raise Malformed("a Host that is not the authority")
        authority = authority or host or b""
        if not authority:
            raise Malformed("no authority")
        if ended and length > 0:
            raise Malformed("a Content-Length, and no body")
        return RequestHead(method, self._scheme, authority.lower(), target, headers, HTTP2, 0 if ended else length), expects

    def _count_reset(self) -> None:
        """A stream ends in a reset. A client that makes us send them gets its work for nothing just as well (CVE-2025-8671)."""
        self._resets -= 1
        if self._resets <= 0:
            raise Flooded("a flood of resets")

    def _reset_by_peer(self, number: int, code: int, remote: bool, events: list[Event]) -> None:
        self._count_reset()
        super()._reset_by_peer(number, code, remote, events)

    def _malformed(self, number: int, why: str, events: list[Event]) -> None:
        super()._malformed(number, why, events)
        self._count_reset()

    def send_informational(self, stream: int, status: int, headers: list[Header]) -> None:
        """Sends a 1xx answer; dropped once the answer has begun."""
        found = self._streams.get(stream)
        if found is not None and not found.began:
            self._conn.send_headers(stream, self._fields(status, headers))

    def send_head(self, stream: int, status: int, headers: list[Header], ended: bool) -> None:
        """Sends a final answer's head. Raises ValueError for a header that HTTP/2 cannot carry."""
        found = self._streams.get(stream)
        if found is None or found.began:
            return
        if status == 204:
            headers = [field for field in headers if field[0] != b"content-length"]
        self._conn.send_headers(stream, self._fields(status, headers), end_stream=ended)
        found.began = True
        found.bodiless = found.method == b"HEAD" or status in {204, 304}
        if self._resets < RESETS:
            self._resets += 1
        if ended:
            self._sent(found)

    @staticmethod
    def _fields(status: int, headers: list[Header]) -> list[Header]:
        check_values(headers)
        return [(b":status", b"%d" % status), *[field for field in headers if field[0] not in HOP_BY_HOP]]

    def _sent(self, stream: Stream) -> None:
        """The answer is complete; a request that is not, is asked to stop (RFC 9113 section 8.1)."""
        super()._sent(stream)
        if stream.number in self._streams:
            self._end_stream(stream.number, int(ErrorCodes.NO_ERROR))

    def drain(self) -> None:
        """Takes no new requests: GOAWAY with the last one that was taken."""
        if not self._draining and not self._closing:
            self._draining = True
            self._say_goaway(self._last)

    def _goaway(self, last: int, events: list[Event]) -> None:
        """A client that goes away: what it has asked is still answered."""
        self._draining = True
        super()._goaway(last, events)
