"""The half of an HTTP/2 connection that sends: heads, bodies as far as the peer's windows go, the peer's settings (RFC 9113)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from typing import Final

from gateway.codec import h2_frames as h2
from gateway.codec.events import Event, Writable
from gateway.codec.h2_fields import check_values
from gateway.codec.h2_frames import HEADER, LARGEST, Breach
from gateway.codec.h2_stream import Stream
from gateway.codec.hpack_encoder import Encoder
from mesh.http import Header

CONTROL_FOR_DATA: Final = 16
"""Control frames (window updates, most of all) that each frame of a body that we send gives the peer cause to send."""
DROPPED: Final = 1024
"""Streams that have been reset and are remembered, as the peer may still be sending on them."""
DONE: Final = 128
"""Other streams that are over and remembered."""


class H2Sending(ABC):
    """Owns what is to be written, and the streams; `gateway.codec.h2.H2Codec` adds the half that receives."""

    __slots__ = (
        "_closing",
        "_done",
        "_dropped",
        "_encoder",
        "_frame",
        "_idle",
        "_initial",
        "_most",
        "_out",
        "_peer_last",
        "_starved",
        "_streams",
        "_tail",
        "_window",
        "websockets",
    )

    def __init__(self) -> None:
        self._streams: dict[int, Stream] = {}
        self._dropped: dict[int, bool] = {}
        """Streams that were reset: True by the peer, who may send nothing on them after it."""
        self._done: deque[int] = deque(maxlen=DONE)
        self._starved: dict[int, None] = {}
        """Streams that wait for room, the one that has waited for longest first."""
        self._out: list[bytes] = []
        self._tail = (0, 0)
        """The stream of the DATA frame that was written last, and its header's place in `_out`."""
        self._encoder = Encoder()
        self._window = h2.WINDOW
        """Bytes of bodies that the peer takes on all streams."""
        self._initial = h2.WINDOW
        """Bytes of body that it takes on a new stream."""
        self._frame = h2.FRAME
        """Bytes of a frame that it takes."""
        self._most = LARGEST
        """Streams of ours at a time that it takes."""
        self._idle = 0
        """Frames that have come and were no head and no byte of a body, less those that there was a cause for."""
        self._peer_last = 0
        """The last stream that the peer has begun."""
        self._closing = False
        self.websockets = False
        """The peer takes WebSockets (SETTINGS_ENABLE_CONNECT_PROTOCOL, RFC 8441)."""

    @property
    def streams(self) -> int:
        """How many streams are open."""
        return len(self._streams)

    def take(self) -> bytes:
        """The bytes to write now."""
        out = self._out
        if not out:
            return b""
        data = b"".join(out)
        out.clear()
        self._tail = (0, 0)
        return data

    def ping(self) -> None:
        """Asks whether the peer is there (section 6.7): if it is, something will be received."""
        self._out.append(h2.frame(h2.PING, 0, 0, bytes(8)))

    # Messages

    def _write_head(self, number: int, fields: list[Header], ended: bool) -> None:
        """HEADERS, and CONTINUATION for what is more than one frame."""
        block = self._encoder.encode(fields)
        size = len(block)
        flags = h2.END_STREAM if ended else 0
        if size <= self._frame:
            self._out += (HEADER.pack(size << 8 | h2.HEADERS, flags | h2.END_HEADERS, number), block)
            return
        kind = h2.HEADERS
        for at in range(0, size, self._frame):
            part = block[at : at + self._frame]
            if at + self._frame >= size:
                flags |= h2.END_HEADERS
            self._out.append(h2.frame(kind, flags, number, part))
            kind, flags = h2.CONTINUATION, 0

    def send_body(self, stream: int, data: bytes, ended: bool) -> None:
        """Sends some of the body."""
        found = self._open(stream)
        if found is None:
            return
        if found.bodiless:
            data = b""
        found.ending = ended
        size = len(data)
        if found.unsent is None and size <= found.window and size <= self._window and size <= self._frame:
            self._write_data(found, data, ended)
            if ended:
                self._sent(found)
            return
        if data:
            if found.unsent is None:
                found.unsent = deque()
            found.unsent.append(data)
        self._pump(found)

    def _write_data(self, stream: Stream, data: bytes, last: bool) -> None:
        """One DATA frame; an end alone goes with the one that has just been written."""
        out = self._out
        number = stream.number
        if data:
            size = len(data)
            stream.window -= size
            self._window -= size
            self._tail = (number, len(out))
            out += (HEADER.pack(size << 8, h2.END_STREAM if last else 0, number), data)
            if self._idle > 0:
                self._idle -= CONTROL_FOR_DATA
        elif last:
            tail, at = self._tail
            if tail == number and at == len(out) - 2:
                out[at] = HEADER.pack(len(out[at + 1]) << 8, h2.END_STREAM, number)
            else:
                out.append(HEADER.pack(0, h2.END_STREAM, number))

    def send_trailers(self, stream: int, trailers: list[Header]) -> None:
        """Ends the message with trailers."""
        found = self._open(stream)
        if found is None:
            return
        check_values(trailers)
        found.trailers = None if found.bodiless else trailers or None
        found.ending = True
        self._pump(found)

    def _open(self, number: int) -> Stream | None:
        """The stream, if there is more to send on it. One whose head has not been sent is given up: a body alone means nothing."""
        found = self._streams.get(number)
        if found is None or found.ended_by_us or found.ending:
            return None
        if not found.began:
            self._drop(found, h2.INTERNAL_ERROR)
            return None
        return found

    def _pump(self, stream: Stream) -> None:
        """Sends what the windows allow."""
        unsent = stream.unsent
        if unsent is not None:
            while unsent:
                data = unsent.popleft()
                at, size = 0, len(data)
                while at < size:
                    most = min(stream.window, self._window, self._frame)
                    if most <= 0:
                        unsent.appendleft(data[at:] if at else data)
                        stream.starved = True
                        self._starved[stream.number] = None
                        return
                    part = data if size <= most else data[at : at + most]
                    at += len(part)
                    self._write_data(stream, part, stream.ending and at >= size and not unsent and stream.trailers is None)
            stream.unsent = None
            if stream.ending and stream.trailers is None:
                self._sent(stream)
                return
        if stream.ending:
            if stream.trailers is not None:
                self._write_head(stream.number, stream.trailers, True)
            else:
                self._write_data(stream, b"", True)
            self._sent(stream)

    def _sent(self, stream: Stream) -> None:
        """Our message is complete."""
        stream.ended_by_us = True
        if stream.ended_by_peer:
            self._forget(stream)

    def window(self, stream: int) -> int:
        """Bytes of body that may be sent on `stream` now."""
        found = self._streams.get(stream)
        if found is None or found.ended_by_us:
            return 0
        if found.unsent is None:
            room = min(found.window, self._window)
            if room > 0:
                return room
        found.starved = True
        self._starved[stream] = None
        return 0

    def _make_room(self, number: int, events: list[Event]) -> None:
        """The window of a stream, or (0) that of the connection or of all streams, has grown."""
        for waiting in (number,) if number else list(self._starved):
            if self._window <= 0:
                break  # those who come first next time are those who were not reached
            stream = self._streams.get(waiting)
            if stream is None or not stream.starved:
                continue
            self._starved.pop(waiting, None)
            stream.starved = False
            self._pump(stream)
            if not stream.starved and waiting in self._streams and not stream.ending:
                if stream.window > 0 and self._window > 0:
                    events.append(Writable(waiting))
                else:
                    stream.starved = True
                    self._starved[waiting] = None

    # What the peer says of what it takes

    def _set(self, code: int, value: int, events: list[Event]) -> None:
        """One of the peer's settings (section 6.5.2); those that nobody knows are ignored. Raises `Breach`."""
        if code == h2.HEADER_TABLE_SIZE:
            self._encoder.resize(value)
        elif code == h2.INITIAL_WINDOW_SIZE:
            if value > LARGEST:
                raise Breach(h2.FLOW_CONTROL_ERROR, "an initial window that is too large")
            by, self._initial = value - self._initial, value
            for stream in self._streams.values():
                stream.window += by
                if stream.window > LARGEST:
                    raise Breach(h2.FLOW_CONTROL_ERROR, "a window that grows beyond its bounds")
        elif code == h2.MAX_FRAME_SIZE:
            if not h2.FRAME <= value <= h2.LARGEST_FRAME:
                raise Breach(h2.PROTOCOL_ERROR, "a largest frame that none may set")
            self._frame = value
        elif code == h2.MAX_CONCURRENT_STREAMS:
            if value > self._most:
                events.append(Writable(0))
            self._most = value
        elif code == h2.ENABLE_PUSH:
            self._push(value)
        elif code == h2.ENABLE_CONNECT_PROTOCOL:
            if value > 1 or (self.websockets and not value):
                raise Breach(h2.PROTOCOL_ERROR, "a setting for extended CONNECT that none may make")
            self.websockets = value == 1

    def _push(self, value: int) -> None:
        """Whether the peer takes pushes; we never send any."""
        if value > 1:
            raise Breach(h2.PROTOCOL_ERROR, "a setting for pushes that is neither 0 nor 1")

    def _grow(self, number: int, by: int, events: list[Event]) -> None:
        """WINDOW_UPDATE. Raises `Breach`."""
        if not number:
            if not by:
                raise Breach(h2.PROTOCOL_ERROR, "a window update of nothing")
            self._window += by
            if self._window > LARGEST:
                raise Breach(h2.FLOW_CONTROL_ERROR, "a window that grows beyond its bounds")
            self._make_room(0, events)
            return
        stream = self._streams.get(number)
        if stream is None:
            return
        if not by:
            self._broken_stream(stream, h2.PROTOCOL_ERROR, "a window update of nothing", events)
            return
        stream.window += by
        if stream.window > LARGEST:
            self._broken_stream(stream, h2.FLOW_CONTROL_ERROR, "a window that grows beyond its bounds", events)
        elif stream.starved:
            self._make_room(number, events)

    @abstractmethod
    def _broken_stream(self, stream: Stream, code: int, why: str, events: list[Event]) -> None:
        """The peer broke the protocol on one stream, which ends (section 5.4.2)."""

    # Ends

    def reset(self, stream: int, code: int) -> None:
        """Gives one stream up."""
        found = self._streams.get(stream)
        if found is not None:
            self._drop(found, code)

    def _drop(self, stream: Stream, code: int) -> None:
        self._forget(stream)
        self._refuse(stream.number, code)

    def _refuse(self, number: int, code: int) -> None:
        """Resets a stream; what the peer has sent on it before it hears of that is thrown away."""
        self._out.append(h2.rst_stream(number, code))
        self._remember(number, False)

    def _remember(self, number: int, by_peer: bool) -> None:
        dropped = self._dropped
        if len(dropped) >= DROPPED:
            del dropped[next(iter(dropped))]
        dropped[number] = by_peer

    def _forget(self, stream: Stream) -> None:
        self._streams.pop(stream.number, None)
        self._starved.pop(stream.number, None)
        self._done.append(stream.number)
        if stream.held:
            self._give_back(stream.held)
            stream.held = 0
        stream.unsent = None

    @abstractmethod
    def _give_back(self, credit: int) -> None:
        """Bytes of the connection's window are no longer held."""
