"""HTTP/2 framing for both directions, over the `h2` library (RFC 9113). Sans-io: see `gateway.codec.events`.

The library keeps the state machines, HPACK and the windows. Here is what a proxy needs beyond it:

* A GOAWAY ends nothing that is in progress (RFC 9113 section 6.8): the library would close the connection, so the frame is taken out of the
  stream of bytes before the library sees it, and the one that we send is written beside it.
* Header fields and the length of bodies are checked here, strictly and quickly, and a malformed message costs its stream only
  (section 8.1.1).
* Floods of frames that cost us work and the peer nothing are counted against what the peer does in earnest: resets against requests
  (CVE-2023-44487), control and empty frames against bodies and heads.
* What exceeds the peer's windows waits here, and `Writable` says when there is room.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from typing import Final

from h2.config import H2Configuration
from h2.errors import ErrorCodes
from h2.events import DataReceived, RemoteSettingsChanged, StreamEnded, StreamReset, TrailersReceived, WindowUpdated
from h2.events import Event as LibraryEvent
from h2.exceptions import H2Error, ProtocolError, StreamClosedError
from h2.settings import SettingCodes
from hyperframe.frame import GoAwayFrame

from gateway.codec.events import BodyReceived, Ended, Event, GoAway, Refused, Reset, Writable
from gateway.codec.h1 import NOT_IN_TRAILERS
from gateway.codec.h2_fields import Malformed, check_trailers, check_values
from gateway.codec.h2_frames import TOO_LARGE, Flooded, Frames
from gateway.codec.h2_library import Connection, Stream
from mesh.http import Header
from mesh.refusals import Refusal

STREAM_WINDOW: Final = 64 * 1024
CONNECTION_WINDOW: Final = 1024 * 1024
RESETS: Final = 200
"""Streams that may end in a reset, whoever sends it, beyond those that are answered."""
ENCODER_TABLE: Final = 4096
"""Bytes of header fields that our encoder remembers at most, however many the peer would let it: it looks through all of them."""


class H2Codec(ABC):
    """What both ends have in common; `H2Server` and `H2Client` add heads."""

    __slots__ = ("_closing", "_conn", "_draining", "_frames", "_out", "_starved", "_streams")

    def __init__(self, *, client: bool, max_streams: int, max_head: int) -> None:
        config = H2Configuration(
            client_side=client,
            header_encoding=None,
            validate_outbound_headers=False,
            normalize_outbound_headers=False,
            validate_inbound_headers=False,
            normalize_inbound_headers=False,
        )
        self._conn = conn = Connection(config)
        conn.local_settings.initial_window_size = STREAM_WINDOW
        conn.local_settings.max_concurrent_streams = max_streams
        conn.local_settings.max_header_list_size = 2 * max_head
        if client:
            conn.local_settings.enable_push = 0
        conn.local_settings.acknowledge()
        conn.decoder.max_header_list_size = 2 * max_head
        conn.initiate_connection()
        conn.increment_flow_control_window(CONNECTION_WINDOW - 65535)
        self._streams: dict[int, Stream] = {}
        self._starved: set[int] = set()
        self._out: list[bytes] = []
        self._frames = Frames(0 if client else 24)
        self._closing = False
        self._draining = False

    @property
    def closing(self) -> bool:
        """True when the connection is to be closed once everything is written."""
        return self._closing or (self._draining and not self._streams)

    @property
    def streams(self) -> int:
        """How many streams are open."""
        return len(self._streams)

    # What comes

    def receive(self, data: bytes) -> list[Event]:
        """Takes bytes from the peer."""
        events: list[Event] = []
        if self._closing:
            return events
        try:
            for frames in self._frames.cut(data):
                if isinstance(frames, int):
                    if frames == TOO_LARGE:
                        self._conn.close_connection(ErrorCodes.FRAME_SIZE_ERROR)
                        self._fail("a frame that is too large", events)
                    else:
                        self._goaway(frames, events)
                elif frames:
                    for event in self._conn.receive_data(frames):
                        self._translate(event, events)
        except Flooded as problem:
            self._conn.close_connection(ErrorCodes.ENHANCE_YOUR_CALM)
            self._fail(str(problem), events)
        except ProtocolError as problem:
            self._fail(str(problem), events)
        except H2Error as problem:
            self._conn.close_connection(ErrorCodes.INTERNAL_ERROR)
            self._fail(str(problem), events)
        return events

    def _fail(self, why: str, events: list[Event]) -> None:
        """The peer broke the protocol: the connection ends, with the GOAWAY that the library has written."""
        self._closing = True
        self._streams.clear()
        events.append(Refused(0, self._broken(why)))

    @abstractmethod
    def _broken(self, why: str) -> Refusal:
        """What a breach of the protocol by the peer is called on this side."""

    def _goaway(self, last: int, events: list[Event]) -> None:
        events.append(GoAway(last))

    def _translate(self, event: LibraryEvent, events: list[Event]) -> None:
        """One of the library's events, as ours."""
        if isinstance(event, DataReceived):
            number, credit = event.stream_id or 0, event.flow_controlled_length or 0
            stream = self._streams.get(number)
            if stream is None or stream.deaf or stream.ended_by_peer or not event.data:
                self._conn.acknowledge_received_data(credit, number)
                return
            stream.held += credit
            if stream.left >= 0:
                stream.left -= len(event.data)
                if stream.left < 0:
                    self._malformed(number, "a body longer than its head says", events)
                    return
            events.append(BodyReceived(number, event.data, credit))
        elif isinstance(event, StreamEnded):
            stream = self._streams.get(event.stream_id or 0)
            if stream is not None and not stream.ended_by_peer:
                self._ended(stream, None, events)
        elif isinstance(event, WindowUpdated):
            self._make_room(event.stream_id or 0, events)
        elif isinstance(event, TrailersReceived):
            stream = self._streams.get(event.stream_id or 0)
            if stream is not None and not stream.ended_by_peer:
                self._trailers(stream, list(event.headers or ()), events)
        elif isinstance(event, RemoteSettingsChanged):
            self._settings(event, events)
        elif isinstance(event, StreamReset):
            self._reset_by_peer(event.stream_id or 0, int(event.error_code or 0), bool(event.remote_reset), events)
        else:
            self._head(event, events)

    @abstractmethod
    def _head(self, event: LibraryEvent, events: list[Event]) -> None:
        """A head of a message has come."""

    def _settings(self, event: RemoteSettingsChanged, events: list[Event]) -> None:
        """The peer's settings: what they could make the library keep is bounded, and its initial window moves that of each stream."""
        conn = self._conn
        for code in event.changed_settings:
            if not isinstance(code, SettingCodes):
                conn.remote_settings.pop(code, None)
        if SettingCodes.HEADER_TABLE_SIZE in event.changed_settings:
            encoder = conn.encoder
            encoder.header_table_size = min(conn.remote_settings.header_table_size, ENCODER_TABLE)
            sizes = encoder.table_size_changes
            if len(sizes) > 2:
                sizes[:] = [min(sizes), sizes[-1]]
        if SettingCodes.INITIAL_WINDOW_SIZE in event.changed_settings:
            self._make_room(0, events)

    def _trailers(self, stream: Stream, headers: list[Header], events: list[Event]) -> None:
        if stream.deaf:
            self._ended(stream, None, events)
            return
        try:
            check_trailers(headers)
        except Malformed as problem:
            self._malformed(stream.number, str(problem), events)
            return
        self._ended(stream, [field for field in headers if field[0] not in NOT_IN_TRAILERS] or None, events)

    def _ended(self, stream: Stream, trailers: list[Header] | None, events: list[Event]) -> None:
        if stream.left > 0 and not stream.deaf:
            self._malformed(stream.number, "a body shorter than its head says", events)
            return
        stream.ended_by_peer = True
        if not stream.deaf:
            events.append(Ended(stream.number, trailers))
        if stream.ended_by_us:
            self._forget(stream)

    def _malformed(self, number: int, why: str, events: list[Event]) -> None:
        """A message that breaks the rules: its stream ends."""
        self._end_stream(number, int(ErrorCodes.PROTOCOL_ERROR))
        events.append(Refused(number, self._broken(why)))

    def _reset_by_peer(self, number: int, code: int, remote: bool, events: list[Event]) -> None:
        stream = self._streams.get(number)
        if stream is not None:
            self._forget(stream)
            events.append(Reset(number, code, remote and code == ErrorCodes.REFUSED_STREAM))

    def eof(self) -> list[Event]:
        """The peer will send no more: every stream is given up."""
        self._closing = True
        lost: list[Event] = [Reset(number, int(ErrorCodes.CANCEL)) for number in self._streams]
        self._streams.clear()
        return lost

    # What goes

    def take(self) -> bytes:
        """The bytes to write now."""
        data = self._conn.data_to_send()
        if self._out:
            self._out.append(data)
            data = b"".join(self._out)
            self._out.clear()
        return data

    def send_body(self, stream: int, data: bytes, ended: bool) -> None:
        """Sends some of the body."""
        found = self._open(stream)
        if found is None:
            return
        if data and not found.bodiless:
            found.unsent.append(data)
        found.ending = ended
        self._pump(found)

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
            self._end_stream(number, int(ErrorCodes.INTERNAL_ERROR))
            return None
        return found

    def _pump(self, stream: Stream) -> None:
        """Sends what the windows allow."""
        conn, number = self._conn, stream.number
        try:
            window = conn.local_flow_control_window(number) if stream.unsent else 0
            unsent = stream.unsent
            while unsent and window > 0:
                data = unsent.popleft()
                most = min(window, conn.max_outbound_frame_size)
                if len(data) > most:
                    unsent.appendleft(data[most:])
                    data = data[:most]
                window -= len(data)
                last = stream.ending and not unsent and stream.trailers is None
                conn.send_data(number, data, end_stream=last)
                if last:
                    self._sent(stream)
                    return
            if unsent:
                stream.starved = True
                self._starved.add(number)
            elif stream.ending:
                if stream.trailers is not None:
                    conn.send_headers(number, stream.trailers, end_stream=True)
                else:
                    conn.end_stream(number)
                self._sent(stream)
        except (StreamClosedError, ProtocolError):
            self._end_stream(number, int(ErrorCodes.INTERNAL_ERROR))

    def _sent(self, stream: Stream) -> None:
        """Our message is complete."""
        stream.ended_by_us = True
        if stream.ended_by_peer:
            self._forget(stream)

    def _make_room(self, number: int, events: list[Event]) -> None:
        for waiting in [number] if number else list(self._starved):
            stream = self._streams.get(waiting)
            if stream is None or not stream.starved:
                continue
            self._starved.discard(waiting)
            stream.starved = False
            self._pump(stream)
            if not stream.starved and waiting in self._streams and not stream.ending:
                if self._conn.local_flow_control_window(waiting) > 0:
                    events.append(Writable(waiting))
                else:
                    stream.starved = True
                    self._starved.add(waiting)

    def window(self, stream: int) -> int:
        """Bytes of body that may be sent on `stream` now."""
        found = self._streams.get(stream)
        if found is None or found.ended_by_us:
            return 0
        if not found.unsent:
            try:
                room = self._conn.local_flow_control_window(stream)
            except ProtocolError:
                return 0
            if room > 0:
                return room
        found.starved = True
        self._starved.add(stream)
        return 0

    def consumed(self, stream: int, credit: int) -> None:
        """Gives flow-control credit back."""
        found = self._streams.get(stream)
        if found is None or not credit or self._closing:
            return  # what was held has been given back when the stream ended
        credit = min(credit, found.held)
        found.held -= credit
        self._conn.acknowledge_received_data(credit, stream)

    def reset(self, stream: int, code: int) -> None:
        """Gives one stream up."""
        if stream in self._streams:
            self._end_stream(stream, code)

    def _end_stream(self, number: int, code: int) -> None:
        stream = self._streams.get(number)
        with contextlib.suppress(ProtocolError, StreamClosedError):  # it may be over already
            self._conn.reset_stream(number, code)
        if stream is not None:
            self._forget(stream)

    def _forget(self, stream: Stream) -> None:
        self._streams.pop(stream.number, None)
        self._starved.discard(stream.number)
        if stream.held and not self._closing:
            self._conn.acknowledge_received_data(stream.held, stream.number)
            stream.held = 0
        stream.unsent.clear()

    def _say_goaway(self, last: int) -> None:
        """Writes a GOAWAY of ours without closing the library's connection."""
        frame = GoAwayFrame(0, last_stream_id=last, error_code=int(ErrorCodes.NO_ERROR))
        self._out += (self._conn.data_to_send(), frame.serialize())
