"""Accepting: a connection is taken, its ClientHello chooses the listener, the handshake runs, and who is at the other end is known.

Handshakes cost a millisecond of the one loop that everybody shares: only a few steps are made in one turn of it, first come, first served,
and there may be only so many at once. Until the peer is known a connection has no codec and nothing that it sends is looked at.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
import ssl
import time
from collections import deque
from collections.abc import Sequence
from typing import Final

from gateway.connection import Connection
from gateway.serving import Serving
from gateway.shared import Shared
from gateway.wire import Wire
from identity.hello import MAX_BYTES, read_hello
from identity.problems import IdentityProblem
from identity.tls import handshake_problem, peer_of

log = logging.getLogger("tollhouse.gateway")

ACCEPTS_A_TURN: Final = 32
EXHAUSTED: Final = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM))
REST: Final = 1.0
"""Seconds without accepting after the system had no more sockets to give."""
PEEK_AGAIN: Final = 0.05
"""Seconds until a ClientHello that has not grown is looked at again."""
ALERT_LINGER: Final = 0.5
"""Seconds for a refused client to read why."""
MAPPED: Final = "::ffff:"
_PLAIN_TEXT: Final = b"This port speaks HTTPS, and plain HTTP came in.\n"
PLAIN_ANSWER: Final = (
    b"HTTP/1.1 400 Bad Request\r\ncontent-type: text/plain; charset=utf-8\r\ncontent-length: %d\r\n"
    b"server: tollhouse\r\nconnection: close\r\n\r\n%b" % (len(_PLAIN_TEXT), _PLAIN_TEXT)
)


class Steps:
    """Makes the handshakes' steps, `limit` in a turn of the loop. One for a worker."""

    __slots__ = ("_limit", "_loop", "_scheduled", "_waiting")

    def __init__(self, loop: asyncio.AbstractEventLoop, limit: int) -> None:
        self._loop = loop
        self._limit = limit
        self._waiting: deque[Handshake] = deque()
        self._scheduled = False

    def want(self, handshake: Handshake) -> None:
        """Has one step of `handshake` made when its turn comes."""
        self._waiting.append(handshake)
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._turn)

    def _turn(self) -> None:
        self._scheduled = False
        waiting = self._waiting
        for _ in range(min(self._limit, len(waiting))):
            waiting.popleft().step()
        if waiting and not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._turn)


class Handshake:
    """A connection on its way to being one. States: HELLO (peeking, `_tls` is None), SHAKING, over (`_sock` is handed on or closed)."""

    __slots__ = ("_fd", "_look", "_low", "_port", "_reading", "_remote", "_serving", "_sock", "_tls", "_writing", "deadline", "over")

    def __init__(self, port: Port, sock: socket.socket, remote: tuple[str, int], deadline: float) -> None:
        self._port = port
        self._sock = sock
        self._fd = sock.fileno()
        self._remote = remote
        self._tls: ssl.SSLSocket | None = None
        self._serving: Serving | None = None
        self._low = 1
        self._look: asyncio.TimerHandle | None = None
        self._reading = self._writing = False
        self.deadline = deadline
        self.over = False
        self._read()

    def _read(self) -> None:
        self._reading = True
        self._port.shared.loop.add_reader(self._fd, self._ready)

    def _ready(self) -> None:
        self._unwatch()
        self._port.steps.want(self)

    def _unwatch(self) -> None:
        loop = self._port.shared.loop
        if self._reading:
            self._reading = False
            loop.remove_reader(self._fd)
        if self._writing:
            self._writing = False
            loop.remove_writer(self._fd)
        if self._look is not None:
            self._look.cancel()
            self._look = None

    def step(self) -> None:
        """Goes as far as it can without waiting."""
        if self.over:
            return
        try:
            if self._tls is None and not self._hello():
                return
            assert self._tls is not None
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            self._read()
        except ssl.SSLWantWriteError:
            self._writing = True
            self._port.shared.loop.add_writer(self._fd, self._ready)
        except OSError as problem:
            self.fail(handshake_problem(problem))
        except Exception:  # one connection's defect is nobody else's
            log.exception("a handshake could not be carried out")
            self.fail("other")
        else:
            self._known()

    def _hello(self) -> bool:
        """Reads the ClientHello and chooses the listener; False when it is not all there, or no good. Nothing is consumed."""
        try:
            data = self._sock.recv(MAX_BYTES + 1, socket.MSG_PEEK)
        except (BlockingIOError, InterruptedError):
            self._read()
            return False
        if not data:
            self.fail("closed")
            return False
        hello = read_hello(data)
        if hello is None:
            self._wait_for_more(len(data))
            return False
        if isinstance(hello, IdentityProblem):
            self.fail(hello.reason)
            return False
        serving = self._serving = self._port.choose(hello.server_name)
        if serving is None:
            self.fail("unknown_name")
            return False
        context = serving.context
        if context is None or time.time() >= serving.ends:
            self.fail("not_serving")
            return False
        if self._low > 1:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)
        self._tls = tls = context.wrap_socket(self._sock, server_side=True, do_handshake_on_connect=False, suppress_ragged_eofs=False)
        self._sock = tls
        return True

    def _wait_for_more(self, size: int) -> None:
        """The socket stays readable by what is only looked at: it is to be readable again when there is more."""
        if size >= self._low:
            self._low = size + 1
            with contextlib.suppress(OSError):
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, self._low)
            self._read()
        else:
            self._look = self._port.shared.loop.call_later(PEEK_AGAIN, self._ready)

    def _known(self) -> None:
        """The handshake is done: who is it?"""
        serving, tls, port = self._serving, self._tls, self._port
        assert serving is not None
        assert tls is not None
        client = serving.listener.tls.client if serving.listener.tls is not None else None
        peer = peer_of(tls, client, self._remote, port.local_address(tls), serving.domains)
        if isinstance(peer, IdentityProblem):
            self.fail(peer.reason)
            return
        if serving not in port.servings:  # it was removed, or what clients must prove has changed, while the handshake ran
            self.fail("listener_changed")
            return
        self.over = True
        port.shaking.pop(self, None)
        port.connect(serving, tls, Connection(port.shared, serving, tls, peer))

    def fail(self, reason: str) -> None:
        """Ends it; `reason` is a label of the metric. A client that spoke plain HTTP is told so, the others get TLS's alert."""
        if self.over:
            return
        self.over = True
        self._unwatch()
        port = self._port
        port.shaking.pop(self, None)
        serving = self._serving or (port.servings[0] if len(port.servings) == 1 else None)
        port.shared.telemetry.handshake_failed(port.shared.key, serving.name if serving is not None else "", reason)
        sock = self._sock
        if sock.fileno() < 0:  # it vanished while it was wrapped
            port.closed()
            return
        if isinstance(sock, ssl.SSLSocket):
            sock = socket.socket(fileno=sock.detach())
            sock.setblocking(False)
        wire = Wire(port.shared.poller, sock, NOBODY)
        wire.when_closed = port.closed
        if reason == "plain_http":
            wire.write(PLAIN_ANSWER)
        if reason in {"timeout", "crowded_out", "closed", "not_serving", "ended"}:
            wire.abort()
        else:
            wire.end(ALERT_LINGER)


class Nobody:
    """The owner of a wire that is only written out."""

    def received(self, data: bytes) -> None:
        """Not called: the wire is ending."""

    def ended(self, clean: bool) -> None:
        """Not called."""

    def lost(self, reason: str) -> None:
        """The client has gone first."""

    def drained(self) -> None:
        """Not called."""


NOBODY: Final = Nobody()


class Port:
    """Owns one listening socket, the listeners behind it, the handshakes and the count of its connections."""

    __slots__ = (
        "_accepting",
        "_any",
        "_exact",
        "_ours",
        "_resting",
        "_sock",
        "_wildcard",
        "address",
        "count",
        "number",
        "servings",
        "shaking",
        "shared",
        "steps",
        "tls",
    )

    def __init__(self, shared: Shared, steps: Steps, address: str, sock: socket.socket, ours: bool = True) -> None:
        """`ours`: nobody else has the listening socket, so what is in its queue when it closes is ours to serve."""
        sock.setblocking(False)
        self._ours = ours
        self.shared = shared
        self.steps = steps
        self.address = address
        self.number: int = sock.getsockname()[1]
        self.count = 0
        """Sockets open, whether they have shaken hands or not."""
        self.shaking: dict[Handshake, None] = {}
        """The oldest first."""
        self.servings: tuple[Serving, ...] = ()
        self.tls = False
        self._sock: socket.socket | None = sock
        self._accepting = False
        self._resting: asyncio.TimerHandle | None = None
        self._exact: dict[str, Serving] = {}
        self._wildcard: dict[str, Serving] = {}
        self._any: Serving | None = None

    def serve(self, servings: Sequence[Serving]) -> None:
        """Takes connections for these listeners from now on; one port speaks TLS or does not (the first listener says)."""
        self.servings = tuple(servings)
        self.tls = bool(servings) and servings[0].listener.tls is not None
        self._exact, self._wildcard, self._any = {}, {}, None
        for serving in servings:
            if (serving.listener.tls is not None) != self.tls:
                continue
            hostname = serving.listener.hostname
            if hostname in {"", "*"}:
                self._any = self._any or serving
            elif hostname.startswith("*."):
                self._wildcard.setdefault(hostname[1:].lower(), serving)
            else:
                self._exact.setdefault(hostname.lower(), serving)
        self._accept_more()

    def choose(self, server_name: str) -> Serving | None:
        """The listener of an SNI: the exact name, the longest wildcard, `*`; None if there is none."""
        found = self._exact.get(server_name)
        if found is not None:
            return found
        rest = server_name
        while rest and self._wildcard:
            _, dot, rest = rest.partition(".")
            found = self._wildcard.get(dot + rest)
            if found is not None:
                return found
        return self._any

    @property
    def open(self) -> bool:
        """Whether the port is listened on."""
        return self._sock is not None

    def _accept_more(self) -> None:
        if self._sock is not None and not self._accepting and self._resting is None and self.count < self.shared.limits.connections:
            self._accepting = True
            self.shared.loop.add_reader(self._sock.fileno(), self._acceptable)

    def _accept_no_more(self) -> None:
        if self._accepting and self._sock is not None:
            self._accepting = False
            self.shared.loop.remove_reader(self._sock.fileno())

    def _acceptable(self) -> None:
        listening = self._sock
        for _ in range(ACCEPTS_A_TURN):
            if listening is None or not self._accepting:
                return
            if self.count >= self.shared.limits.connections:
                self._accept_no_more()
                return
            try:
                sock, address = listening.accept()
            except (BlockingIOError, InterruptedError):
                return
            except OSError as problem:
                if problem.errno in EXHAUSTED:
                    log.error("port %d: no more connections can be taken: %s; raise LimitNOFILE", self.number, problem.strerror)
                    self._accept_no_more()
                    self._resting = self.shared.loop.call_later(REST, self._rested)
                    return
                continue  # the client gave up before it was taken (accept(2), "Error handling")
            self.count += 1
            try:
                self._begin(sock, (plain_address(address[0]), address[1]))
            except Exception:
                log.exception("a connection could not be begun")
                sock.close()
                self.closed()

    def _rested(self) -> None:
        self._resting = None
        self._accept_more()

    def _begin(self, sock: socket.socket, remote: tuple[str, int]) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if not self.tls:
            serving = self._any or self.servings[0]
            peer = peer_of(None, None, remote, self.local_address(sock))
            assert not isinstance(peer, IdentityProblem)
            self.connect(serving, sock, Connection(self.shared, serving, sock, peer))
            return
        limits = self.shared.limits
        if len(self.shaking) >= limits.handshakes:
            next(iter(self.shaking)).fail("crowded_out")
        self.shaking[Handshake(self, sock, remote, self.shared.loop.time() + limits.handshake_timeout)] = None

    def connect(self, serving: Serving, sock: socket.socket, connection: Connection) -> None:
        """A connection whose peer is known begins."""
        connection.wire.when_closed = self.closed
        connection.start()
        if self._sock is None:
            connection.drain()

    def closed(self) -> None:
        """One of the port's sockets has been closed."""
        self.count -= 1
        if self._sock is None:
            self.shared.emptied.set()
        elif not self._accepting:
            self._accept_more()

    @staticmethod
    def local_address(sock: socket.socket) -> tuple[str, int]:
        """Where the client reached us."""
        name = sock.getsockname()
        return plain_address(name[0]), name[1]

    def sweep(self, now: float) -> None:
        """Ends the handshakes whose time is over and, when the port is full, connections that nobody uses."""
        for handshake in [shaking for shaking in self.shaking if shaking.deadline <= now]:
            handshake.fail("timeout")
        if self.count >= self.shared.limits.connections:
            for serving in self.servings:
                serving.make_room(now, self.shared.limits)

    def stop(self) -> None:
        """Closes the listening socket: new connections are refused. Those that the kernel has already accepted for us are taken first."""
        before = -1
        while self._ours and self._accepting and before < self.count:
            before = self.count
            self._acceptable()
        self._accept_no_more()
        if self._resting is not None:
            self._resting.cancel()
            self._resting = None
        sock, self._sock = self._sock, None
        if sock is not None:
            sock.close()

    def abandon(self) -> None:
        """Ends the handshakes that run."""
        for handshake in list(self.shaking):
            handshake.fail("ended")


def plain_address(address: str) -> str:
    """An IPv4 address that came in by an IPv6 socket, as what it is; a scope is taken off."""
    if address.startswith(MAPPED) and "." in address:
        return address[len(MAPPED) :]
    return address.partition("%")[0]


def bind(address: str, port: int) -> socket.socket:
    """A socket that listens on `address` (empty: on all, IPv4 and IPv6) and `port`. Raises OSError, with what was bound as its filename."""
    if not address and not socket.has_dualstack_ipv6():
        address = "0.0.0.0"
    family = socket.AF_INET6 if not address or ":" in address else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0 if not address else 1)
        sock.bind((address or "::", port))
        sock.listen(socket.SOMAXCONN)
    except OSError as problem:
        sock.close()
        raise OSError(problem.errno, problem.strerror, f"{address or '*'}:{port}") from None
    return sock
