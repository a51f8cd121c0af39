"""One client's connection: its wire, its codec and its streams. docs/architecture.md has the picture.

A connection is the boundary of every defect: what goes wrong for one request ends that request, what goes wrong in the codec ends this
connection, and nothing of either reaches another one.
"""

from __future__ import annotations

import logging
import socket
import ssl
import time
from collections.abc import Sequence
from typing import Any, Final

from gateway.codec import events as ev
from gateway.codec.events import Refused, RequestReceived, ServerCodec
from gateway.codec.h1_server import H1Server
from gateway.codec.h2_server import H2Server
from gateway.ending import Ending
from gateway.flushing import Flushing
from gateway.gathering import GatheringWire
from gateway.protocol import PREFACE, codec_for
from gateway.replies import note
from gateway.serving import Serving
from gateway.shared import Shared
from gateway.stream import Stream
from gateway.tunnel_stream import TunnelStream
from gateway.wire import Wire
from mesh.outcome import Outcome
from mesh.peer import Peer
from mesh.refusals import HeadTimeout, InternalError, Refusal

log = logging.getLogger("tollhouse.gateway")

INF: Final = float("inf")
GRACE: Final = 1.0
"""Seconds that an idle HTTP/1.1 connection still takes a request after the drain began: one may be under way."""


class Connection(Flushing):
    """Owns what belongs to one client connection (`gateway.wire.Owner`, `Flushable`, `gateway.timers.Timed`)."""

    __slots__ = ("_head_began", "_last", "_sniffed", "closes", "draining", "peer", "serving")

    def __init__(self, shared: Shared, serving: Serving, sock: socket.socket, peer: Peer) -> None:
        super().__init__(shared)
        self.serving = serving
        self.peer = peer
        self._use(codec_for(shared, serving.listener, peer.alpn == "h2"))
        self._sniffed: bytes | None = None if isinstance(sock, ssl.SSLSocket) else b""
        """In plaintext, what has come before it is known which protocol it is; None once that is settled."""
        self.closes = False
        """The next answer must say that it is the last, because the codec does not know it."""
        self.draining = False
        self._last = 0
        self._head_began = 0.0
        self.wire = (GatheringWire if self.h1 is None else Wire)(shared.poller, sock, self)

    def _use(self, codec: ServerCodec) -> None:
        self.codec = codec
        self.h1 = codec if isinstance(codec, H1Server) else None

    def start(self) -> None:
        """Begins to serve."""
        shared, serving = self.shared, self.serving
        serving.connections.add(self)
        shared.sweeper.watched.add(self)
        shared.telemetry.connection_opened(shared.key, serving.name, self.peer)
        self.wire.start()
        if self.h1 is None:
            self.mark()

    # From the wire

    def received(self, data: bytes) -> None:
        """As `gateway.wire.Owner`."""
        try:
            if self._sniffed is not None:
                data = self._sniffed + data
                if len(data) < len(PREFACE) and PREFACE.startswith(data):
                    self._sniffed = data
                    return
                self._sniffed = None
                if data.startswith(PREFACE):
                    self._use(codec_for(self.shared, self.serving.listener, True))
            events = self.codec.receive(data)
            self._take(events)
        except Exception as problem:
            self._defect(problem)
            return
        h1 = self.h1
        if h1 is None or h1.waiting or len(events) != 1 or events[0].kind != ev.REQUEST:
            self.mark()  # else it was one request, and whoever answers it marks

    def ended(self, clean: bool) -> None:
        """As `gateway.wire.Owner`. A client of HTTP/1.1 that shuts its side down is still answered what it has asked completely
        (`docs/decisions/0004-half-closed-clients.md`); in HTTP/2, or under TLS outside of a tunnel, it has gone."""
        try:
            events = self.h1.shut(tunnel_only=self.wire.secure) if clean and self.h1 is not None else None
            if events is not None:
                self.half = True
                self._take(events)
                self.mark()
                return
            self._take(self.codec.eof())
        except Exception as problem:
            self._defect(problem)
            return
        self._gone("the client ended the connection" if clean else "the connection was cut off")
        self._end()

    def lost(self, reason: str) -> None:
        """As `gateway.wire.Owner`."""
        self._gone(reason)
        self._cleanup()

    def drained(self) -> None:
        """As `gateway.wire.Owner`."""
        if not self.streams:
            self.deadline = self.shared.loop.time() + self.shared.limits.idle_connection
        self.mark()

    def _gone(self, reason: str) -> None:
        for stream in list(self.streams.values()):
            try:
                stream.gone(reason)
            except Exception:
                log.exception("a request of a client that has gone could not be given up")
        self.streams.clear()

    # From the codec

    def _take(self, events: Sequence[Any]) -> None:
        """Any: an event is told by its `kind`; a cast for each would be a call for each."""
        streams = self.streams
        for event in events:
            kind = event.kind
            if kind == ev.REQUEST:
                self._request(event)
                continue
            stream = streams.get(event.stream)
            try:
                if kind == ev.BODY:
                    if stream is not None:
                        stream.body(event.data, event.credit)
                    elif event.credit:
                        self.codec.consumed(event.stream, event.credit)
                elif kind == ev.REFUSED:
                    self._refused(event, stream)
                elif kind == ev.WRITABLE:
                    self._rooms(stream)
                elif stream is None:
                    continue
                elif kind == ev.END:
                    stream.end(event.trailers)
                elif kind == ev.RESET:
                    stream.gone(f"reset by the client ({event.code})")
            except Exception as problem:
                if stream is None:
                    raise
                self.broken(stream, problem)
        h1 = self.h1
        if h1 is not None:
            if not self.streams:
                self._watch_head(h1.waiting and not self._ahead)
        elif isinstance(self.codec, H2Server):
            self._watch_head(self.codec.in_head)

    def _request(self, event: RequestReceived) -> None:
        shared = self.shared
        now = time.monotonic()
        started = time.time()
        began = now
        if self._head_began:
            began, self._head_began = self._head_began, 0.0
            started -= now - began
        head = event.head
        self._last = event.stream
        outcome = Outcome(head, self.peer, shared.key, self.serving.name, started)
        stream = (TunnelStream if head.tunnel else Stream)(self, event.stream, head, outcome, now)
        self.streams[event.stream] = stream
        shared.requests += 1
        idle = now + shared.first_look
        if len(self.streams) == 1 or idle < self.deadline:
            self.deadline = idle
        if 0.0 < self.peer.not_after < started and not self.draining:
            self.drain()  # its certificate has ended meanwhile: the next request is to come with a new one
        if self.draining and self.h1 is not None:
            self.h1.drain()
        try:
            stream.begin(self.serving.place, event.ended, event.expects_continue)
        except Exception as problem:
            self.broken(stream, problem)

    def _refused(self, event: Refused, stream: Stream | None) -> None:
        if stream is not None:
            stream.malformed(event.refusal)
        elif event.stream:
            self._refuse_head(event.stream, event.refusal)
        else:
            outcome = Outcome(None, self.peer, self.shared.key, self.serving.name, time.time())
            note(outcome, event.refusal, True)
            self.shared.telemetry.record(outcome)
            self._gone("the connection was ended for a breach of the protocol")

    def _refuse_head(self, number: int, refusal: Refusal) -> None:
        """Answers a request whose head could not be read."""
        shared = self.shared
        now = shared.loop.time()
        began = self._head_began or now
        self._head_began = 0.0
        self._last = number
        outcome = Outcome(None, self.peer, shared.key, self.serving.name, time.time() - (now - began))
        stream = Stream(self, number, None, outcome, began)
        self.streams[number] = stream
        shared.requests += 1
        self.deadline = min(self.deadline, now + shared.limits.idle_stream)
        stream.malformed(refusal)

    def _watch_head(self, begun: object) -> None:
        """Has a head begun to come, it must be complete in time; in HTTP/1.1 that is between two requests."""
        if not begun:
            self._head_began = 0.0
        elif not self._head_began:
            self._head_began = self.shared.loop.time()
            self.until(self._head_began + self.shared.limits.head_timeout)

    # For the streams

    def last_answer(self) -> None:
        """The answer that is about to be sent is the connection's last (HTTP/1.1)."""
        if self.h1 is not None:
            if self.h1.streams:
                self.h1.drain()
            else:
                self.closes = True

    def tear(self, number: int) -> None:
        """Cuts an answer off so that its client can tell it from a complete one."""
        self.codec.reset(number, 2)
        if self.h1 is not None:
            self._torn = True
        self.mark()

    def left(self, stream: Ending) -> None:
        """A stream is over."""
        if self.streams.pop(stream.number, None) is None:
            return
        if not self.streams:
            self.deadline = time.monotonic() + self.shared.limits.idle_connection
            self._ahead = True
        if not self.marked:
            self.mark()

    def opened(self) -> None:
        """A tunnel is open: what was sent ahead of the answer is its own."""
        if self.h1 is not None:
            self._take(self.h1.receive(b""))

    def broken(self, stream: Stream, problem: BaseException) -> None:
        """A defect of ours showed in one request: that one ends."""
        log.error("a request could not be carried out", exc_info=problem)
        try:
            stream.refuse_request(InternalError(reason="see the log"))
        except Exception as second:
            self._defect(second)

    def _defect(self, problem: BaseException) -> None:
        """A defect of ours for the whole connection: nothing that it would still say can be believed."""
        log.error("a connection is given up", exc_info=problem)
        self._drop("given up")

    # The end

    def expired(self, now: float) -> None:
        """As `gateway.timers.Timed`."""
        for stream in list(self.streams.values()):
            try:
                if stream.deadline <= now:
                    stream.expired(now)
            except Exception as problem:
                self.broken(stream, problem)
        if self.over:
            return
        limits = self.shared.limits
        due = self._head_began + limits.head_timeout if self._head_began else INF
        if due <= now and isinstance(self.codec, H2Server):
            self._take(self.codec.too_slow())
            self.mark()
            return
        if self.streams:
            self.deadline = min(due, *[stream.deadline for stream in self.streams.values()])
            return
        if self.deadline > now:
            return
        if self._head_began and now >= self._head_began + limits.head_timeout:
            self.deadline = now + limits.idle_stream
            self.closes = True
            self._refuse_head(self._last + 1, HeadTimeout(reason=f"not complete after {limits.head_timeout:g} s"))
        elif self.wire.backlog:
            self._drop("the client takes nothing")
        else:
            self.codec.drain()
            self.mark()

    def drain(self, grace: float = GRACE) -> None:
        """Takes no more requests than are under way; an idle HTTP/1.1 connection ends after `grace` seconds (0: at once)."""
        if self.over or (self.draining and grace > 0):
            return
        self.draining = True
        if self.h1 is None or self.streams or grace <= 0:
            self.codec.drain()
            self.mark()
        else:
            self.deadline = min(self.deadline, self.shared.loop.time() + grace)

    def abort(self) -> None:
        """Ends at once; requests in progress are recorded as given up."""
        self._drop("the gateway ended")

    def _drop(self, reason: str) -> None:
        self._gone(reason)
        self.wire.abort()
        self._cleanup()

    def _end(self) -> None:
        if self.over:
            return
        self._gone("the connection is over")
        if self._torn:
            self.wire.cut()
        else:
            self.wire.end(self.shared.limits.linger)
        self._cleanup()

    def _cleanup(self) -> None:
        if self.over:
            return
        self.over = True
        shared, serving = self.shared, self.serving
        serving.connections.discard(self)
        shared.sweeper.watched.discard(self)
        wire = self.wire
        shared.telemetry.connection_closed(shared.key, serving.name, self.peer, wire.received, wire.sent)
