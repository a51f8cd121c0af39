"""gRPC calls with one message each way, over one HTTP/2 connection to each server: `pdp.rpc.Channel` on our own codec and wires.

A channel connects when the first call comes, and calls wait for that. Once it has failed to, calls fail at once until it has tried
again, which it does by itself with growing pauses (github.com/grpc/grpc, doc/connection-backoff.md). A connection that the server wants
to end (GOAWAY) takes no more calls, and the next call makes a new one; what a server says that it has not looked at is sent once more.

Nothing here has a timer for each call: whoever calls also gives up. A connection on which nothing has come for a while though calls were
made is asked by a PING, and given up if it does not answer: a machine that vanished says nothing.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from gateway.connect import H2, Connected, Contexts, Dial, Dialer, Failed, Target
from gateway.grpc_connection import GrpcConnection
from gateway.grpc_unary import CONTENT, UnaryCall, timeout_text
from gateway.limits import Limits
from gateway.poller import Poller
from gateway.resolve import Resolver
from identity.files import IdentitySource, NoIdentity
from identity.svid import Identity
from mesh.backoff import Backoff
from mesh.http import HTTP2, UNKNOWN_LENGTH, Header, RequestHead
from mesh.model import UpstreamTls
from pdp.rpc import Code, Done, Result

CONNECT: Final = 5.0
"""Seconds for a connection to be made, TLS and all."""
HELD: Final = 64 << 20
"""Bytes of all questions of a channel without an answer; further calls are refused."""
REFUSALS: Final = 20
"""How often a call is sent that the server refuses to look at."""
PAUSE: Final = 0.005
"""Seconds between that."""
_TE: Final = (b"te", b"trailers")
_AGENT: Final = (b"user-agent", b"tollhouse")


class GrpcChannel:
    """A `pdp.rpc.Channel`. Owned by one event loop."""

    __slots__ = (
        "_authority",
        "_backoff",
        "_closed",
        "_connection",
        "_dial",
        "_dialer",
        "_old",
        "_pause",
        "_retry",
        "_tls",
        "_waiting",
        "_why",
        "held",
        "host",
        "loop",
        "pings",
        "poller",
        "port",
        "scheme",
        "when_closed",
    )

    def __init__(self, dialer: Dialer, poller: Poller, target: str, tls: Callable[[str], UpstreamTls | None], *, pings: bool) -> None:
        """`tls` gives how to speak TLS to a host, anew for each connection. Raises ValueError for a target that is not `host:port`."""
        self.loop = dialer.loop
        self.poller = poller
        self.pings = pings
        self.host, self.port = split_target(target)
        self._authority = (f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}").encode()
        self._dialer = dialer
        self._tls = tls
        self.scheme = b"https" if tls(self.host) is not None else b"http"
        self._connection: GrpcConnection | None = None
        """The one that takes calls."""
        self._old: set[GrpcConnection] = set()
        """Those that take no more."""
        self._dial: Dial | None = None
        self._waiting: deque[UnaryCall] = deque()
        self._backoff = Backoff(0.1, 2.0)
        self._retry: asyncio.TimerHandle | None = None
        """Runs while calls fail at once, and connects at its end."""
        self._pause: asyncio.TimerHandle | None = None
        """Runs while nothing that waits is sent."""
        self._why = ""
        self._closed = False
        self.held = 0
        """Bytes of the questions that have no answer."""
        self.when_closed: Callable[[GrpcChannel], None] | None = None

    def start(self, method: bytes, metadata: Sequence[Header], message: bytes, seconds: float, done: Done) -> UnaryCall:
        """As `pdp.rpc.Channel.start`."""
        fields = [_TE, CONTENT, _AGENT, (b"grpc-timeout", timeout_text(seconds)), *metadata]
        head = RequestHead(b"POST", self.scheme, self._authority, method, fields, HTTP2, UNKNOWN_LENGTH)
        call = UnaryCall(self, head, b"\0" + len(message).to_bytes(4, "big") + message, done)
        if self._closed:
            self._fail_soon(call, Result(Code.UNAVAILABLE, "the channel is closed"))
        elif self.held > HELD:
            self._fail_soon(call, Result(Code.RESOURCE_EXHAUSTED, f"questions with {self.held} bytes wait for the server"))
        elif self._retry is not None:
            self._fail_soon(call, Result(Code.UNAVAILABLE, self._why))
        else:
            self.take_back(call)
        return call

    def _fail_soon(self, call: UnaryCall, result: Result) -> None:
        self.loop.call_soon(call.end, result)

    def take_back(self, call: UnaryCall) -> None:
        """A call is to be sent, now or when it can be."""
        connection = self._connection
        if connection is not None and not self._waiting and connection.codec.available:
            self._send(connection, call)
            return
        self._waiting.append(call)
        self._connect()

    def again(self, call: UnaryCall) -> bool:
        """Sends a call once more, of which nothing has come; False if it has had that already."""
        if call.again or self._closed or self._retry is not None or call.gathered or call.status:
            return False
        call.again += 1
        call.connection = None
        self.take_back(call)
        return True

    def later(self, call: UnaryCall) -> bool:
        """Sends a call once more that the server has refused to look at now, after a moment: a stream that is over for us may not be for
        the server. False if it has had that often enough."""
        if call.again >= REFUSALS or self._closed:
            return False
        call.again += 1
        call.connection = None
        self._waiting.append(call)
        if self._pause is None:
            self._pause = self.loop.call_later(PAUSE, self._paused)
        return True

    def _paused(self) -> None:
        self._pause = None
        self._connect()
        self.pump()

    def _send(self, connection: GrpcConnection, call: UnaryCall) -> None:
        try:
            connection.begin(call)
        except ValueError as problem:
            self._fail_soon(call, Result(Code.INTERNAL, f"the call can't be sent: {problem}"))

    def withdraw(self, call: UnaryCall) -> None:
        """A call that waits is given up."""
        if call in self._waiting:
            self._waiting.remove(call)

    def pump(self) -> None:
        """Sends what waits, as far as there is room."""
        connection, waiting = self._connection, self._waiting
        if self._pause is not None:
            return
        while waiting and connection is not None and connection is self._connection and connection.codec.available:
            call = waiting.popleft()
            if call.done is not None:
                self._send(connection, call)

    # The connection

    def _connect(self) -> None:
        if self._connection is not None or self._dial is not None or self._retry is not None or self._closed:
            return
        target = Target(host=self.host, port=self.port, tls=self._tls(self.host), alpn=H2, identities=(), timeout=CONNECT)
        self._dial = self._dialer.dial(target, self._dialled)

    def _dialled(self, result: Connected | Failed) -> None:
        self._dial = None
        if isinstance(result, Failed):
            self._rest(result.refusal.reason or result.reason)
            return
        self._connection = GrpcConnection(self, result)
        self.pump()

    def _rest(self, why: str) -> None:
        """There is no connection, and none is tried for a while. All who wait hear of it."""
        self._why = why
        self._retry = self.loop.call_later(self._backoff.next(), self._rested)
        waiting, self._waiting = self._waiting, deque()
        for call in waiting:
            call.end(Result(Code.UNAVAILABLE, why))

    def _rested(self) -> None:
        self._retry = None
        self._connect()

    def retired(self, connection: GrpcConnection, *, rest: bool) -> None:
        """A connection takes no more calls. `rest`: it was of no use, and another is not to be had at once."""
        self._old.add(connection)
        if self._connection is connection:
            self._connection = None
            if connection.answered:
                self._backoff.reset()
            if rest:
                self._rest("the server takes no calls on its connections")
            elif self._waiting:
                self._connect()

    def gone(self, connection: GrpcConnection, why: str) -> None:
        """A connection has ended."""
        self._old.discard(connection)
        if self._connection is connection:
            self._connection = None
            if connection.answered:
                self._backoff.reset()
                if self._waiting:
                    self._connect()
            elif not self._closed:
                self._rest(why)

    def renew(self) -> None:
        """Makes a new connection for the calls from now on; those on the old one are still answered."""
        if self._connection is not None:
            connection = self._connection
            connection.retire(ours=True)
            connection.settle()
        dial, self._dial = self._dial, None
        if dial is not None:
            dial.cancel()
            self._connect()

    def close(self) -> None:
        """As `pdp.rpc.Channel.close`."""
        self._closed = True
        if self._dial is not None:
            self._dial.cancel()
            self._dial = None
        for timer in (self._retry, self._pause):
            if timer is not None:
                timer.cancel()
        self._retry = self._pause = None
        for connection in [*self._old, *([self._connection] if self._connection is not None else [])]:
            connection.close()
        waiting, self._waiting = self._waiting, deque()
        for call in waiting:
            call.end(Result(Code.UNAVAILABLE, "the channel was closed"))
        done, self.when_closed = self.when_closed, None
        if done is not None:
            done(self)


class GrpcChannels:
    """`pdp.rpc.Channels`: in plaintext, or under mutual TLS with this process's identity. Owned by one event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, identity: IdentitySource | None = None, server_name: str = "") -> None:
        """With `identity` under TLS: it is shown, and the server's certificate must be for `server_name` (else for the target's host) and
        of the trust bundle. A renewed identity is used for every connection from then on."""
        self._identity = identity
        self._server_name = server_name
        self._resolver = Resolver(loop, Limits())
        self._contexts = Contexts(identity or NoIdentity())
        self._dialer = Dialer(loop, self._resolver, self._contexts, Limits().handshake_steps)
        self._poller = Poller(loop)
        self._channels: set[GrpcChannel] = set()
        self._forget = identity.on_change(self._renew) if identity is not None else None

    def open(self, target: str, *, pings: bool) -> GrpcChannel:
        """As `pdp.rpc.Channels.open`."""
        channel = GrpcChannel(self._dialer, self._poller, target, self._tls, pings=pings)
        self._channels.add(channel)
        channel.when_closed = self._channels.discard
        return channel

    def _tls(self, host: str) -> UpstreamTls | None:
        if self._identity is None:
            return None
        bundle = self._identity.current.bundle
        return UpstreamTls(mode="validate", hostname=self._server_name or host, roots=bundle, present_svid=True)

    def _renew(self, _: Identity) -> None:
        self._contexts.clear()
        for channel in self._channels:
            channel.renew()

    def close(self) -> None:
        """Ends all channels."""
        if self._forget is not None:
            self._forget()
        for channel in list(self._channels):
            channel.close()
        self._resolver.close()


def split_target(target: str) -> tuple[str, int]:
    """Host (IPv6 without brackets) and port. Raises ValueError."""
    host, colon, port = target.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        colon = ""
    if not colon or not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"{target!r} is not HOST:PORT")
    return host, int(port)
