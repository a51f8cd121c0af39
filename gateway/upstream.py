"""One connection to an upstream: a wire, a codec, and the streams on it. It belongs to a pool, which alone opens and closes it."""

from __future__ import annotations

import math
import socket
import ssl
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from gateway.codec.events import (
    BODY,
    END,
    GOAWAY,
    INFORMATIONAL,
    RESPONSE,
    WRITABLE,
    ClientCodec,
    Refused,
    Reset,
    ResponseReceived,
)
from gateway.gathering import GatheringWire
from gateway.poller import Poller
from gateway.retry import Failure
from gateway.wire import Owner, Wire
from mesh.http import Header, RequestHead
from mesh.refusals import BadRequest, Refusal, UpstreamIdentity, UpstreamReset

if TYPE_CHECKING:
    from gateway.lane import Lane

CANCEL = 8
"""RFC 9113 section 7."""


class Stream(Protocol):
    """One request on a connection, as the connection sees it."""

    tunnelling: bool
    """It is an open tunnel: its end comes by `answer_shut`, and it leaves by `Upstream.leave`."""

    def answer_shut(self) -> None:
        """The upstream sends no more through the tunnel; what is sent to it still goes."""
        ...

    def informational(self, status: int, headers: list[Header]) -> None:
        """A 1xx answer."""
        ...

    def answer(self, event: ResponseReceived) -> None:
        """The answer's head. If it is `ended`, the connection has forgotten the stream already."""
        ...

    def answer_body(self, data: bytes, credit: int) -> None:
        """Some of its body."""
        ...

    def answer_end(self, trailers: list[Header] | None) -> None:
        """The answer is complete; the connection has forgotten the stream already."""
        ...

    def broken(self, failure: Failure, refusal: Refusal) -> None:
        """There will be no more of the answer; the connection has forgotten the stream already."""
        ...

    def writable(self) -> None:
        """Whether the request's body may be sent has changed: look at `Upstream.room`."""
        ...


class Keeper(Protocol):
    """The pool, as a connection of it sees it."""

    def released(self, connection: Upstream) -> None:
        """The connection may have room for another stream, unless it is `spent`."""
        ...

    def gone(self, connection: Upstream) -> None:
        """The connection carries no more requests: close it."""
        ...

    def turned_away(self, connection: Upstream) -> None:
        """The upstream did not accept our certificate: there never was a connection."""
        ...


class UpstreamWire(Wire):
    """A wire that, when it cannot write any more, still reads what has arrived.

    An upstream that does not want a body answers early and closes; what it had not read of the body makes its kernel reset the
    connection (RFC 9112 section 9.6), and our next write fails. The answer has arrived all the same.
    """

    __slots__ = ("_failing",)

    def __init__(self, poller: Poller, sock: socket.socket, owner: Owner) -> None:
        super().__init__(poller, sock, owner)
        self._failing = False

    def _fail(self, reason: str) -> None:
        if not self._failing:
            self._failing = True
            try:
                while self.reading and not self.closed and not self.ending:
                    data = self._sock.recv(self._size)
                    if not data:
                        break
                    self.owner.received(data)
            except ssl.SSLError as problem:
                # What the other side says about it tells more than that we could not write.
                if "ALERT" in (problem.reason or ""):
                    reason = f"tls: {problem.reason.lower()}"
            except OSError:
                pass
        super()._fail(reason)


class GatheringUpstreamWire(UpstreamWire, GatheringWire):
    """The same for HTTP/2."""

    __slots__ = ()


class Upstream:
    """Mutable; its streams' owners and its pool call it, its wire calls it back."""

    __slots__ = (
        "_buffer",
        "_ever_heard",
        "_half",
        "_heard",
        "_keeper",
        "_marked",
        "_paused",
        "_poller",
        "blocked",
        "codec",
        "deadline",
        "generation",
        "lane",
        "listed",
        "multiplexed",
        "principal",
        "retired",
        "served",
        "spoiled",
        "streams",
        "wire",
    )

    def __init__(
        self, keeper: Keeper, codec: ClientCodec, poller: Poller, *, multiplexed: bool, principal: str, buffer: int, generation: int
    ) -> None:
        self._keeper = keeper
        self._poller = poller
        self._buffer = buffer
        self._heard = False
        self._ever_heard = False
        self._marked = False
        self._paused = False
        self._half = False
        """The upstream has shut its side of a tunnel down."""
        self.codec = codec
        self.wire: Wire
        """Set by the pool, before anything else is called."""
        self.multiplexed = multiplexed
        self.principal = principal
        """What the endpoint proved."""
        self.generation = generation
        """Of the identity and settings that the connection was made with."""
        self.lane: Lane
        """Set by the pool, as `wire`."""
        self.streams: dict[int, Stream] = {}
        self.served = 0
        """Requests begun."""
        self.blocked = False
        """Whether more waits to be written than may."""
        self.retired = False
        """Takes no more requests; closed when the last stream ends."""
        self.spoiled = False
        """Whether something was given up in the middle, so that it can't end in good order."""
        self.listed = False
        """Whether the pool has it among those with room."""
        self.deadline = math.inf
        """When it is closed for being idle."""

    @property
    def spent(self) -> bool:
        """Whether it can take no further request, ever."""
        return self.retired or self.codec.closing or self.wire.closed or self.wire.ending

    # The request

    def begin(self, stream: Stream, head: RequestHead, headers: list[Header], target: bytes, authority: bytes, ended: bool) -> int:
        """Sends a request's head; returns the stream's number. Raises ValueError for a head that cannot be sent."""
        number = self.codec.request(head, headers, target, authority, ended)
        self.streams[number] = stream
        self.served += 1
        self.deadline = math.inf
        self._heard = False
        if not self._marked:
            self._marked = True
            self._poller.mark(self)
        return number

    def send_body(self, number: int, data: bytes) -> None:
        """Sends some of a request's body."""
        self.codec.send_body(number, data, False)
        self._sent()

    def send_end(self, number: int, trailers: list[Header] | None) -> None:
        """Ends a request."""
        if trailers:
            self.codec.send_trailers(number, trailers)
        else:
            self.codec.send_body(number, b"", True)
        self._sent()

    def send_shut(self, number: int) -> None:
        """Ends our direction of a tunnel."""
        self.codec.send_body(number, b"", True)
        if self.multiplexed:
            self.mark()
        else:
            self.flush()
            self.wire.finish()

    def leave(self, number: int) -> None:
        """A tunnel has ended in both directions. In HTTP/1.1 its connection ends with it."""
        self.streams.pop(number, None)
        if not self.multiplexed:
            self.retired = True
        self._keeper.released(self)

    def _sent(self) -> None:
        self.mark()
        if self.codec.closing and not self.multiplexed and self.streams:
            self.retired = True
            self._keeper.gone(self)
            self._break(Failure.REQUEST, BadRequest(reason="the request's body is not as long as its head says"))

    def room(self, number: int) -> bool:
        """Whether body may be sent on a stream."""
        return not self.blocked and (not self.multiplexed or self.codec.window(number) > 0)

    def abandon(self, number: int) -> None:
        """Gives a stream up, whose owner hears nothing more: RST_STREAM, or the end of an HTTP/1.1 connection."""
        self.streams.pop(number, None)
        self.codec.reset(number, CANCEL)
        if self.multiplexed:
            self.mark()
        else:
            self.spoiled = True
        self._keeper.released(self)

    def mark(self) -> None:
        """Has what the codec wants to write written soon."""
        if not self._marked:
            self._marked = True
            self._poller.mark(self)

    def flush(self) -> None:
        """As `gateway.wire.Flushable.flush`."""
        self._marked = False
        wire = self.wire
        data = self.codec.take()
        if data and not wire.ending:
            wire.write(data)
            if wire.backlog > self._buffer and not self.blocked:
                self.blocked = True
                self._tell_writable()

    def drained(self) -> None:
        """As `gateway.wire.Owner.drained`."""
        if self.blocked:
            self.blocked = False
            self._tell_writable()

    def _tell_writable(self) -> None:
        for stream in tuple(self.streams.values()):
            stream.writable()

    # The answer

    def hold(self) -> None:
        """Stops reading, for the sake of the one stream of an HTTP/1.1 connection."""
        if not self.multiplexed:
            self._paused = True
            self.wire.pause()

    def unhold(self) -> None:
        """Reads again."""
        if self._paused:
            self._paused = False
            if not self._half:
                self.wire.resume()

    def consumed(self, number: int, credit: int) -> None:
        """Gives flow-control credit back."""
        if credit:
            self.codec.consumed(number, credit)
            self.mark()

    def received(self, data: bytes) -> None:
        """As `gateway.wire.Owner.received`."""
        self._heard = self._ever_heard = True
        codec = self.codec
        self._tell(codec.receive(data))
        if self.multiplexed:
            self.mark()
        if codec.closing:
            self._end()
        elif self.retired and not self.streams:
            self._keeper.gone(self)

    def _tell(self, events: Sequence[Any]) -> None:
        """Any: an event is told by its `kind`; a cast for each would be a call for each."""
        for event in events:
            kind = event.kind
            number = event.stream
            stream = self.streams.get(number)
            if kind == BODY:
                if stream is not None:
                    stream.answer_body(event.data, event.credit)
                elif event.credit:
                    self.codec.consumed(number, event.credit)
            elif kind == RESPONSE:
                if stream is not None:
                    if event.ended:
                        self._over(number)
                    stream.answer(event)
            elif kind == END:
                if stream is not None:
                    if stream.tunnelling:
                        stream.answer_shut()
                        continue
                    self._over(number)
                    stream.answer_end(event.trailers)
            elif kind == WRITABLE:
                if stream is not None:
                    stream.writable()
                elif not number:
                    self._tell_writable()
                    self._keeper.released(self)  # the upstream may take more streams than before
            elif kind == INFORMATIONAL:
                if stream is not None:
                    stream.informational(event.status, event.headers)
            elif kind == GOAWAY:
                self.retired = True
            else:
                self._tell_bad(event, stream)

    def _tell_bad(self, event: Reset | Refused, stream: Stream | None) -> None:
        number = event.stream
        if stream is not None:
            self._over(number)
        if isinstance(event, Refused):
            if stream is not None:
                stream.broken(Failure.PROTOCOL, event.refusal)
            elif not number:
                self.retired = True
                self._break(Failure.PROTOCOL, event.refusal)
        elif stream is not None:
            failure = Failure.UNPROCESSED if event.unprocessed else self._kind_of_reset()
            if self.multiplexed:
                refusal = UpstreamReset(reason=f"reset by the upstream, code {event.code}", reset=event.code)
            else:
                refusal = UpstreamReset(reason="ended by the upstream")
            stream.broken(failure, refusal)

    def _over(self, number: int) -> None:
        """A stream has ended: the connection is free for another before anybody hears of it, so that who asks at once gets it."""
        self.streams.pop(number, None)
        if self._paused:
            self.unhold()
        self._keeper.released(self)

    def _kind_of_reset(self) -> Failure:
        """A connection that has served before, and on which nothing was heard since, was probably being closed by the other side."""
        if self.served > 1 and (self.multiplexed or not self._heard):
            return Failure.STALE
        return Failure.RESET

    # The end

    def ended(self, clean: bool) -> None:
        """As `gateway.wire.Owner.ended`."""
        if clean:
            if not self.multiplexed and any(stream.tunnelling for stream in self.streams.values()):
                self._half = True
                self._tell(self.codec.eof())
                return
            self._tell(self.codec.eof())
        self._fail(UpstreamReset(reason="closed by the upstream" if clean else "cut off: TLS ended without close_notify"))

    def lost(self, reason: str) -> None:
        """As `gateway.wire.Owner.lost`."""
        if (
            not self._ever_heard
            and reason.startswith("tls: ")
            and "alert" in reason
            and ("certificate" in reason or "unknown_ca" in reason)
        ):
            # In TLS 1.3 the upstream looks at our certificate after we have begun to send: it has read nothing of a request.
            self.retired = True
            self._keeper.gone(self)
            self._keeper.turned_away(self)
            self._break(Failure.CONNECT, UpstreamIdentity(reason=f"the upstream refuses our certificate ({reason})"))
        else:
            self._fail(UpstreamReset(reason=reason))

    def expired(self, now: float) -> None:
        """As `gateway.timers.Timed.expired`: idle for too long."""
        self.retired = True
        self._keeper.gone(self)

    def _fail(self, refusal: Refusal) -> None:
        kind = self._kind_of_reset()
        self.retired = True
        self._keeper.gone(self)
        self._break(kind, refusal)

    def _end(self) -> None:
        """The codec wants no more of this connection."""
        self.retired = True
        self.flush()
        if self.streams:
            self._break(Failure.RESET, UpstreamReset(reason="the connection was ended"))
        self._keeper.gone(self)

    def _break(self, failure: Failure, refusal: Refusal) -> None:
        streams, self.streams = self.streams, {}
        for stream in streams.values():
            stream.broken(failure, refusal)
