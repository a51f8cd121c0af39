"""Accepting: connections are taken from a listening socket, and go to the listener that they are for.

In plaintext that is the port's one listener (or, for HTTP, any of them: the host is looked at later); under TLS the name in the ClientHello
chooses (`gateway.handshake`).
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections.abc import Sequence
from typing import Final

from gateway.caller import is_proxy
from gateway.connection import Connection
from gateway.handshake import Handshake, Steps
from gateway.l4_connection import L4Connection
from gateway.preface import Preface
from gateway.serving import Serving
from gateway.shared import Shared
from identity.problems import IdentityProblem
from identity.tls import peer_of
from mesh.peer import Peer

log = logging.getLogger("tollhouse.gateway")

ACCEPTS_A_TURN: Final = 32
EXHAUSTED: Final = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM))
REST: Final = 1.0
"""Seconds without accepting after the system had no more sockets to give."""
MAPPED: Final = "::ffff:"


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
        "proxies",
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
        self.shaking: dict[Handshake | Preface, None] = {}
        """The oldest first."""
        self.servings: tuple[Serving, ...] = ()
        self.tls = False
        self.proxies: tuple[str, ...] = ()
        """CIDRs from which connections begin with a PROXY protocol header; empty when the port does not speak it."""
        self._sock: socket.socket | None = sock
        self._accepting = False
        self._resting: asyncio.TimerHandle | None = None
        self._exact: dict[str, Serving] = {}
        self._wildcard: dict[str, Serving] = {}
        self._any: Serving | None = None

    def serve(self, servings: Sequence[Serving], proxies: tuple[str, ...] = ()) -> None:
        """Takes connections for these listeners from now on; one port speaks TLS or does not (the first listener says)."""
        self.servings = tuple(servings)
        self.proxies = proxies
        self.tls = bool(servings) and servings[0].listener.encrypted
        self._exact, self._wildcard, self._any = {}, {}, None
        for serving in servings:
            if serving.listener.encrypted != self.tls:
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
        if self.proxies and is_proxy(remote[0], self.proxies):
            self.shaking[Preface(self, sock, remote, self._deadline())] = None
        else:
            self.known(sock, remote, self.local_address(sock))

    def _deadline(self) -> float:
        """Until when a connection must have said who it is; the one that has taken longest makes room if there are too many."""
        limits = self.shared.limits
        if len(self.shaking) >= limits.handshakes:
            next(iter(self.shaking)).fail("crowded_out")
        return self.shared.loop.time() + limits.handshake_timeout

    def known(self, sock: socket.socket, remote: tuple[str, int], local: tuple[str, int]) -> None:
        """It is known from where a connection comes, and where it was sent to."""
        if self.tls:
            self.shaking[Handshake(self, sock, remote, local, self._deadline())] = None
            return
        serving = self._any or (self.servings[0] if self.servings else None)
        if serving is None:  # the listeners have gone meanwhile
            sock.close()
            self.closed()
            return
        peer = peer_of(None, None, remote, local)
        assert not isinstance(peer, IdentityProblem)
        self.begin(serving, sock, peer)

    def begin(self, serving: Serving, sock: socket.socket, peer: Peer) -> None:
        """A connection whose peer is known begins."""
        kind = L4Connection if serving.table is not None else Connection
        connection = kind(self.shared, serving, sock, peer)
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
