"""One connection of a gRPC channel: a wire, the codec of HTTP/2, and the calls on it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from gateway.codec.events import BODY, END, GOAWAY, RESPONSE, WRITABLE, Refused, Reset
from gateway.codec.h2_client import H2Client
from gateway.connect import Connected
from gateway.grpc_calls import BY_RESET, UNKNOWN
from gateway.grpc_unary import UnaryCall
from gateway.wire import Wire
from mesh.http import Header
from pdp.rpc import MAX_ANSWER, Code, Result

if TYPE_CHECKING:
    from gateway.grpc_channel import GrpcChannel

STREAMS: Final = 1000
"""Calls at a time on one connection, if the server does not want fewer; more wait for their turn."""
SILENT: Final = 10.0
"""Seconds without a byte from the server, though there were calls, until it is asked whether it is there."""
GRACE: Final = 5.0
"""Seconds for the answer to that."""
LINGER: Final = 1.0
"""Seconds in which a connection that we end is still written to."""
CANCEL: Final = 8
"""RFC 9113 section 7."""


class GrpcConnection:
    """One connection of a channel, and the calls on it. Its wire's owner."""

    __slots__ = ("_before", "_marked", "_timer", "answered", "calls", "channel", "codec", "over", "retired", "wire")

    def __init__(self, channel: GrpcChannel, connected: Connected) -> None:
        self.channel = channel
        self.codec = H2Client(streams=STREAMS)
        self.calls: dict[int, UnaryCall] = {}
        self.retired = False
        """It takes no more calls, and ends with its last."""
        self.answered = False
        """It has served a call."""
        self.over = False
        self._marked = False
        self._timer: asyncio.TimerHandle | None = None
        self._before = 0
        self.wire = Wire(channel.poller, connected.sock, self)
        self.wire.start()

    # Calls

    def begin(self, call: UnaryCall) -> None:
        """Sends a call. Raises ValueError for metadata that HTTP/2 can't carry."""
        codec = self.codec
        head = call.head
        number = codec.request(head, head.headers, head.target, head.authority, False)
        codec.send_body(number, call.message, True)
        call.connection, call.number = self, number
        self.calls[number] = call
        if self._timer is None:
            self._before = self.wire.received
            self._timer = self.channel.loop.call_later(SILENT, self._look)
        self._mark()

    def abandon(self, call: UnaryCall) -> None:
        """Gives a call up, whose owner hears nothing more."""
        if self.calls.pop(call.number, None) is not None:
            self.codec.reset(call.number, CANCEL)
            self._mark()
            self.settle()

    def _mark(self) -> None:
        if not self._marked:
            self._marked = True
            self.channel.poller.mark(self)

    def flush(self) -> None:
        """As `gateway.poller.Flushable.flush`."""
        self._marked = False
        data = self.codec.take()
        if data:
            self.wire.write(data)

    # The wire's owner

    def received(self, data: bytes) -> None:
        """As `gateway.wire.Owner.received`."""
        codec = self.codec
        events: Sequence[Any] = codec.receive(data)  # told by their `kind`, as in `gateway.upstream`
        for event in events:
            kind = event.kind
            call = self.calls.get(event.stream)
            if kind == BODY:
                codec.consumed(event.stream, event.credit)
                if call is not None:
                    self._more(call, event.data)
            elif kind == RESPONSE:
                if call is not None:
                    call.status, call.headers = event.status, event.headers
                    if event.ended:
                        self._complete(call, event.headers)
            elif kind == END:
                if call is not None:
                    self._complete(call, event.trailers or [])
            elif kind == GOAWAY:
                self.retire()
            elif kind == WRITABLE:
                if not event.stream:
                    self.channel.pump()
            elif isinstance(event, Reset):
                if call is not None:
                    self._reset(call, event)
            elif isinstance(event, Refused):
                self._refused(call, event)
        self._mark()
        self.settle()

    def _more(self, call: UnaryCall, data: bytes) -> None:
        if len(call.gathered) + len(data) > MAX_ANSWER + 5:
            call.wrong = Result(Code.RESOURCE_EXHAUSTED, f"an answer of more than {MAX_ANSWER} bytes")
            self._over(call)
            call.complete([])
        else:
            call.gathered += data

    def _complete(self, call: UnaryCall, trailers: list[Header]) -> None:
        self.answered = True
        self._over(call)
        call.complete(trailers)

    def _over(self, call: UnaryCall) -> None:
        self.calls.pop(call.number, None)
        self.codec.reset(call.number, CANCEL)  # what it has not read of the question, it need not; nothing when all is said

    def _reset(self, call: UnaryCall, event: Reset) -> None:
        self.calls.pop(call.number, None)
        if event.unprocessed and (self.channel.again(call) if self.retired else self.channel.later(call)):
            return
        code = Code(int(BY_RESET.get(event.code, UNKNOWN)))
        call.end(Result(code, f"reset by the server, code {event.code}"))

    def _refused(self, call: UnaryCall | None, event: Refused) -> None:
        if call is not None:
            self.calls.pop(call.number, None)
            call.end(Result(Code.INTERNAL, f"the server broke the protocol: {event.refusal.reason}"))
        elif not event.stream:
            self._fail(f"the server broke the protocol: {event.refusal.reason}")

    def ended(self, clean: bool) -> None:
        """As `gateway.wire.Owner.ended`."""
        self._fail("the server has closed the connection" if clean else "the connection was cut off: TLS ended without close_notify")

    def lost(self, reason: str) -> None:
        """As `gateway.wire.Owner.lost`."""
        self._fail(reason)

    def drained(self) -> None:
        """As `gateway.wire.Owner.drained`."""

    # The end

    def retire(self, *, ours: bool = False) -> None:
        """Takes no more calls; `ours` when that is our own wish and not the server's. To be followed by `settle`."""
        if not self.retired:
            self.retired = True
            self.channel.retired(self, rest=not ours and not self.answered)

    def settle(self) -> None:
        """After something has happened: ends what is over, and uses the room that there is."""
        if self.over:
            return
        if self.codec.closing and not self.retired:
            self.retire()
        if self.codec.closing or (self.retired and not self.calls):
            self._fail("the connection was ended")
        elif not self.retired:
            self.channel.pump()

    def _fail(self, why: str) -> None:
        """Ends the connection; calls on it end as `UNAVAILABLE`."""
        if self.over:
            return
        self.over = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self.flush()
        self.wire.end(LINGER)
        self.retired = True
        calls, self.calls = self.calls, {}
        self.channel.gone(self, why)
        for call in calls.values():
            # A connection that has served may just have been closed by the other side; to ask once more harms nobody.
            if not (self.answered and self.channel.again(call)):
                call.end(Result(Code.UNAVAILABLE, why))

    def close(self) -> None:
        """Ends it now."""
        self._fail("the channel was closed")

    # Silence

    def _look(self) -> None:
        """`SILENT` seconds ago there was a call."""
        self._timer = None
        if self.wire.received != self._before:
            if self.calls:
                self._before = self.wire.received
                self._timer = self.channel.loop.call_later(SILENT, self._look)
        elif self.channel.pings:
            self.codec.ping()
            self._mark()
            self._timer = self.channel.loop.call_later(GRACE, self._judge)
        else:
            self.retire()  # a slow server still answers what it was asked, and a dead one is asked nothing more
            self.settle()

    def _judge(self) -> None:
        self._timer = None
        if self.wire.received == self._before:
            self._fail(f"the server has said nothing for {SILENT + GRACE:g} s")
        elif self.calls:
            self._before = self.wire.received
            self._timer = self.channel.loop.call_later(SILENT, self._look)
