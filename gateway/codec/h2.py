"""HTTP/2 framing for both directions (RFC 9113). Sans-io: see `gateway.codec.events`.

`H2Sending` is the half that sends, this the half that receives; `H2Server` and `H2Client` add the heads of messages.

* What breaks the rules of the connection ends the connection (section 5.4.1); a malformed message costs its stream only (section 8.1.1).
* A GOAWAY ends nothing that is in progress (section 6.8).
* Floods of frames that cost us work and the peer nothing are counted against what the peer does in earnest: resets against requests
  (CVE-2023-44487), control and empty frames against bodies and heads, window updates against what we send. A head's frames and bytes
  are counted before any of it is decoded.
* Priorities are read and mean nothing (section 5.3.2); pushes are refused.
* What exceeds the peer's windows waits here, and `Writable` says when there is room.

The frames of ordinary messages are read where they lie, without an object for each.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Final

from gateway.codec import h2_frames as h2
from gateway.codec.events import BodyReceived, Ended, Event, GoAway, Refused, Reset
from gateway.codec.h1 import NOT_IN_TRAILERS
from gateway.codec.h2_fields import Malformed, check_trailers
from gateway.codec.h2_frames import FRAME, HEADER, LARGEST, Breach
from gateway.codec.h2_sending import H2Sending
from gateway.codec.h2_stream import Stream
from gateway.codec.hpack_decoder import BadBlock, Decoder
from mesh.http import Header
from mesh.refusals import Refusal

STREAM_WINDOW: Final = 64 * 1024
CONNECTION_WINDOW: Final = 1024 * 1024
RESETS: Final = 200
"""Streams that may end in a reset, whoever sends it, beyond those that are answered."""
IDLE_FRAMES: Final = 1000
"""Control and empty frames that may come without a head or a byte of a body between them, or a cause for them."""
BLOCK: Final = 128 * 1024
"""Bytes of one head as it is compressed, over all its frames."""
CONTINUATIONS: Final = 64
"""Frames of one head after its first."""
SETTINGS_AT_ONCE: Final = 32
"""Entries of one SETTINGS frame."""
GATHERED: Final = 4 * 1024
"""Bytes of a body beyond which what comes after it in other frames is told by itself; what is told together goes on as one frame."""
_HEADER: Final = 9


class H2Codec(H2Sending):
    """What both ends have in common."""

    __slots__ = ("_block", "_block_size", "_buffer", "_decoder", "_draining", "_greeted", "_last", "_opening", "_owed", "_room")

    def __init__(self, client: bool, settings: dict[int, int], window: int = CONNECTION_WINDOW) -> None:
        super().__init__()
        self._decoder = Decoder()
        self._buffer = b""
        """The beginning of a frame whose end has not come."""
        self._opening = b"" if client else h2.PREFACE
        """What the peer has to say before its first frame."""
        self._greeted = False
        """The peer's settings have come (section 3.4)."""
        self._block: list[bytes] = []
        """The payloads of a head's frames, while there are more to come (section 4.3): stream and flags first."""
        self._block_size = 0
        self._last = (0, 0)
        """The stream and the flags of that head."""
        self._room = window
        """Bytes of bodies that the peer may still send."""
        self._owed = 0
        """What has been consumed of them, and the peer has not been told."""
        self._draining = False
        settings[h2.INITIAL_WINDOW_SIZE] = STREAM_WINDOW
        if client:
            self._out.append(h2.PREFACE)
        self._out += (h2.settings(settings), h2.window_update(0, window - h2.WINDOW))

    @property
    def closing(self) -> bool:
        """True when the connection is to be closed once everything is written."""
        return self._closing or (self._draining and not self._streams)

    # Frames

    def receive(self, data: bytes) -> list[Event]:
        """Takes bytes from the peer."""
        events: list[Event] = []
        if self._closing:
            return events
        if self._buffer:
            data = self._buffer + data
            self._buffer = b""
        at = 0
        size = len(data)
        try:
            if self._opening:
                at = self._open_with(data)
            while size - at >= _HEADER:
                word, flags, number = HEADER.unpack_from(data, at)
                start = at + _HEADER
                end = start + (word >> 8)
                if end > size and end - start <= FRAME:
                    break
                kind = word & 0xFF
                if end - start > FRAME:
                    self._too_large()
                elif self._block:
                    self._continued(kind, flags, number & LARGEST, data[start:end], events)
                elif not self._greeted:
                    self._greet(kind, flags, number & LARGEST, data[start:end], events)
                elif kind == h2.DATA:
                    self._data(data, start, end, flags, number & LARGEST, events)
                elif kind == h2.HEADERS:
                    self._headers(data, start, end, flags, number & LARGEST, events)
                else:
                    self._control(kind, flags, number & LARGEST, data[start:end], events)
                at = end
        except Breach as problem:
            self._fail(problem, events)
            return events
        if at < size:
            self._buffer = data[at:] if at else data
        return events

    def _too_large(self) -> None:
        raise Breach(h2.FRAME_SIZE_ERROR, "a frame that is too large")

    def _open_with(self, data: bytes) -> int:
        """The client's preface, as far as it has come: how many bytes of it. Raises `Breach`."""
        opening = self._opening
        part = data[: len(opening)]
        if not opening.startswith(part):
            raise Breach(h2.PROTOCOL_ERROR, "no connection preface")
        self._opening = opening[len(part) :]
        return len(part)

    def _greet(self, kind: int, flags: int, number: int, payload: bytes, events: list[Event]) -> None:
        if kind != h2.SETTINGS or flags & h2.ACK:
            raise Breach(h2.PROTOCOL_ERROR, "a first frame that is not SETTINGS")
        self._greeted = True
        self._control(kind, flags, number, payload, events)

    def _count_idle(self) -> None:
        self._idle += 1
        if self._idle > IDLE_FRAMES:
            raise Breach(h2.ENHANCE_YOUR_CALM, "a flood of frames without a message")

    def _data(self, data: bytes, at: int, end: int, flags: int, number: int, events: list[Event]) -> None:
        credit = end - at
        if flags & h2.PADDED:
            at, end = h2.unpadded(data, at, end)
        if at < end:
            self._idle = 0
        else:
            self._count_idle()
        self._room -= credit
        if self._room < 0:
            raise Breach(h2.FLOW_CONTROL_ERROR, "more than the connection's window")
        stream = self._streams.get(number)
        if stream is None:
            self._not_open(number)
            self._give_back(credit)
            return
        if stream.ended_by_peer:
            raise Breach(h2.STREAM_CLOSED, "data after the end of its stream")
        stream.room -= credit
        if stream.room < 0:
            raise Breach(h2.FLOW_CONTROL_ERROR, "more than its stream's window")
        stream.held += credit
        if not stream.answered:
            self._broken_stream(stream, h2.PROTOCOL_ERROR, "a body before its head", events)
            return
        if stream.deaf or at == end:
            self.consumed(number, credit)
        else:
            if stream.left >= 0:
                stream.left -= end - at
                if stream.left < 0:
                    self._broken_stream(stream, h2.PROTOCOL_ERROR, "a body longer than its head says", events)
                    return
            last = events[-1] if events else None
            if isinstance(last, BodyReceived) and last.stream == number and len(last.data) < GATHERED:
                last.data += data[at:end]
                last.credit += credit
            else:
                events.append(BodyReceived(number, data[at:end], credit))
        if flags & h2.END_STREAM:
            self._ended(stream, None, events)

    def _headers(self, data: bytes, at: int, end: int, flags: int, number: int, events: list[Event]) -> None:
        if not number:
            raise Breach(h2.PROTOCOL_ERROR, "a head on stream 0")
        self._idle = 0
        if flags & h2.PADDED:
            at, end = h2.unpadded(data, at, end)
        if flags & h2.PRIORITISED:
            if end - at < 5:
                raise Breach(h2.FRAME_SIZE_ERROR, "a head without the priority that it says it has")
            self._prioritised(number, data[at : at + 4])
            at += 5
        if flags & h2.END_HEADERS:
            self._fields(number, data[at:end], flags & h2.END_STREAM != 0, events)
            return
        self._block = [data[at:end]]
        self._block_size = end - at
        self._last = (number, flags)

    def _continued(self, kind: int, flags: int, number: int, payload: bytes, events: list[Event]) -> None:
        """A frame within a head. Raises `Breach`."""
        begun, first = self._last
        if kind != h2.CONTINUATION or number != begun:
            raise Breach(h2.PROTOCOL_ERROR, "another frame within a head")
        block = self._block
        block.append(payload)
        self._block_size += len(payload)
        if len(block) > CONTINUATIONS + 1 or self._block_size > BLOCK:
            raise Breach(h2.ENHANCE_YOUR_CALM, "a head of more bytes, or frames, than any may have")
        if flags & h2.END_HEADERS:
            self._block = []
            self._fields(number, b"".join(block), first & h2.END_STREAM != 0, events)

    @staticmethod
    def _prioritised(number: int, on: bytes) -> None:
        if int.from_bytes(on, "big") & LARGEST == number:
            raise Breach(h2.PROTOCOL_ERROR, "a stream that depends on itself")

    def _control(self, kind: int, flags: int, number: int, payload: bytes, events: list[Event]) -> None:
        """A frame that is neither a head nor of a body. Raises `Breach`."""
        self._count_idle()
        size = len(payload)
        if kind == h2.WINDOW_UPDATE:
            if size != 4:
                raise Breach(h2.FRAME_SIZE_ERROR, "a window update of the wrong size")
            if number and number not in self._streams:
                self._not_idle(number)
            self._grow(number, int.from_bytes(payload, "big") & LARGEST, events)
        elif kind == h2.SETTINGS:
            self._settings(flags, number, payload, events)
        elif kind == h2.PING:
            if number:
                raise Breach(h2.PROTOCOL_ERROR, "a PING on a stream")
            if size != 8:
                raise Breach(h2.FRAME_SIZE_ERROR, "a PING of the wrong size")
            if not flags & h2.ACK:
                self._out.append(h2.frame(h2.PING, h2.ACK, 0, payload))
        elif kind == h2.RST_STREAM:
            if not number:
                raise Breach(h2.PROTOCOL_ERROR, "a reset of stream 0")
            if size != 4:
                raise Breach(h2.FRAME_SIZE_ERROR, "a reset of the wrong size")
            stream = self._streams.get(number)
            if stream is None:
                self._not_idle(number)
            else:
                self._reset_by_peer(stream, int.from_bytes(payload, "big"), events)
        elif kind == h2.GOAWAY:
            if number:
                raise Breach(h2.PROTOCOL_ERROR, "a GOAWAY on a stream")
            if size < 8:
                raise Breach(h2.FRAME_SIZE_ERROR, "a GOAWAY of the wrong size")
            self._goaway(int.from_bytes(payload[:4], "big") & LARGEST, events)
        elif kind == h2.PRIORITY:
            if not number:
                raise Breach(h2.PROTOCOL_ERROR, "a priority on stream 0")
            if size != 5:
                raise Breach(h2.FRAME_SIZE_ERROR, "a priority of the wrong size")
            self._prioritised(number, payload[:4])
        elif kind == h2.PUSH_PROMISE:
            raise Breach(h2.PROTOCOL_ERROR, "a push, which nobody asked for")
        elif kind == h2.CONTINUATION:
            raise Breach(h2.PROTOCOL_ERROR, "the continuation of no head")

    def _settings(self, flags: int, number: int, payload: bytes, events: list[Event]) -> None:
        if number:
            raise Breach(h2.PROTOCOL_ERROR, "settings on a stream")
        if len(payload) % 6 or (flags & h2.ACK and payload):
            raise Breach(h2.FRAME_SIZE_ERROR, "settings of the wrong size")
        if flags & h2.ACK:
            return
        if len(payload) > 6 * SETTINGS_AT_ONCE:
            raise Breach(h2.ENHANCE_YOUR_CALM, "a SETTINGS frame with too many entries")
        before = self._initial
        for code, value in h2.ENTRY.iter_unpack(payload):
            self._set(code, value, events)
        self._out.append(h2.frame(h2.SETTINGS, h2.ACK, 0))  # before anything that they allow (section 6.5.3)
        if self._initial > before:
            self._make_room(0, events)

    # Streams that are not open (section 5.1)

    def _not_idle(self, number: int) -> None:
        """Raises `Breach` for a stream that has not begun."""
        if not number or not self._began(number):
            raise Breach(h2.PROTOCOL_ERROR, "a frame on a stream that has not begun")

    def _not_open(self, number: int) -> None:
        """What comes for one that we have reset is thrown away, a peer that reset it itself is told so once; raises `Breach` for others."""
        by_peer = self._dropped.get(number)
        if by_peer is None:
            self._not_idle(number)
            raise Breach(h2.STREAM_CLOSED, "a frame on a stream that is over")
        if by_peer:
            self._refuse(number, h2.STREAM_CLOSED)

    @abstractmethod
    def _began(self, number: int) -> bool:
        """Whether the stream has begun, be it over since."""

    # Messages

    @abstractmethod
    def _fields(self, number: int, block: bytes, ended: bool, events: list[Event]) -> None:
        """A head or trailers have come. The block has to be decoded, whatever becomes of the message. Raises `Breach`."""

    def _decode(self, block: bytes) -> list[Header]:
        try:
            return self._decoder.decode(block)
        except BadBlock as problem:
            raise Breach(h2.COMPRESSION_ERROR, str(problem)) from None

    def _trailers(self, stream: Stream, block: bytes, ended: bool, events: list[Event]) -> None:
        fields = self._decode(block)
        if stream.ended_by_peer:
            raise Breach(h2.STREAM_CLOSED, "a head after the end of its stream")
        if not ended:
            self._broken_stream(stream, h2.PROTOCOL_ERROR, "trailers that do not end their stream", events)
        elif stream.deaf:
            self._ended(stream, None, events)
        else:
            try:
                check_trailers(fields)
            except Malformed as problem:
                self._broken_stream(stream, h2.PROTOCOL_ERROR, str(problem), events)
                return
            self._ended(stream, [field for field in fields if field[0] not in NOT_IN_TRAILERS] or None, events)

    def _ended(self, stream: Stream, trailers: list[Header] | None, events: list[Event]) -> None:
        if stream.left > 0 and not stream.deaf:
            self._broken_stream(stream, h2.PROTOCOL_ERROR, "a body shorter than its head says", events)
            return
        stream.ended_by_peer = True
        if not stream.deaf:
            events.append(Ended(stream.number, trailers))
        if stream.ended_by_us:
            self._forget(stream)

    def consumed(self, stream: int, credit: int) -> None:
        """Gives flow-control credit back."""
        found = self._streams.get(stream)
        if found is None or not credit or self._closing:
            return  # what was held has been given back when the stream ended
        credit = min(credit, found.held)
        found.held -= credit
        self._give_back(credit)
        if not found.ended_by_peer:
            found.owed += credit
            if found.owed >= STREAM_WINDOW // 2:
                self._out.append(h2.window_update(stream, found.owed))
                found.room += found.owed
                found.owed = 0

    def _give_back(self, credit: int) -> None:
        self._owed += credit
        if self._owed >= CONNECTION_WINDOW // 2 and not self._closing:
            self._out.append(h2.window_update(0, self._owed))
            self._room += self._owed
            self._owed = 0

    # Ends

    def _fail(self, problem: Breach, events: list[Event]) -> None:
        self._out.append(h2.goaway(self._peer_last, problem.code))
        self._closing = True
        self._streams.clear()
        self._buffer = b""
        self._block = []
        events.append(Refused(0, self._refusal(str(problem))))

    @abstractmethod
    def _refusal(self, why: str) -> Refusal:
        """What a breach of the protocol by the peer is called on this side."""

    def _broken_stream(self, stream: Stream, code: int, why: str, events: list[Event]) -> None:
        self._drop(stream, code)
        events.append(Refused(stream.number, self._refusal(why)))

    def _reset_by_peer(self, stream: Stream, code: int, events: list[Event]) -> None:
        self._forget(stream)
        self._remember(stream.number, True)
        events.append(Reset(stream.number, code, code == h2.REFUSED_STREAM))

    @abstractmethod
    def _goaway(self, last: int, events: list[Event]) -> None:
        """The peer takes no more streams than those up to `last`."""
        events.append(GoAway(last))

    def eof(self) -> list[Event]:
        """The peer will send no more: every stream is given up."""
        self._closing = True
        lost: list[Event] = [Reset(number, h2.CANCEL) for number in self._streams]
        self._streams.clear()
        self._starved.clear()
        return lost
