"""A new connection to an endpoint: its name resolved, the socket connected, TLS shaken hands, and the endpoint's identity verified.

Every step is a callback on the loop; nothing blocks, and one deadline bounds the whole. Only what has proved who it is comes out as
`Connected`. Sessions are never resumed: a resumed one would carry an identity that nobody verified again.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import ssl
import time
from collections import deque
from collections.abc import Callable
from typing import Literal

import msgspec

from gateway.proxy_header import write_proxy_header
from gateway.resolve import Address, Resolver
from identity.files import IdentitySource, expiry_problem
from identity.problems import IdentityError, IdentityProblem
from identity.tls import client_context, handshake_problem, server_name, verify_upstream
from mesh.model import UpstreamTls
from mesh.refusals import ConnectFailed, Refusal, UpstreamIdentity

H1 = ("http/1.1",)
H2 = ("h2",)
EITHER = ("h2", "http/1.1")
MOST_CONTEXTS = 1024


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """Where to connect to, and whom to find there."""

    host: str
    port: int
    tls: UpstreamTls | None
    alpn: tuple[str, ...]
    identities: tuple[str, ...]
    timeout: float
    """Seconds for all of it."""
    plaintext: bool = True
    """Whether an address off loopback may be spoken to without TLS (not under `Mesh.upstream: Strict`)."""
    name: str = ""
    """The name to ask for in TLS, in place of the cluster's."""
    proxy: Literal["", "v1", "v2"] = ""
    """The version of the PROXY protocol header that is sent first, before TLS."""
    proxied: tuple[tuple[str, int], tuple[str, int]] | None = None
    """Whom the header is about: the client's address, and where it connected to. None: the gateway speaks for itself, as on a connection
    that many clients' requests share."""


class Connected:
    """A connection that may be used."""

    __slots__ = ("alpn", "principal", "sock")

    def __init__(self, sock: socket.socket, principal: str, alpn: str) -> None:
        self.sock = sock
        self.principal = principal
        """What the endpoint proved: its SPIFFE ID or name; empty in plaintext."""
        self.alpn = alpn


class Failed(msgspec.Struct, frozen=True):
    """No connection."""

    refusal: Refusal
    reason: str
    """A stable snake_case word for the metric."""
    blame: bool = True
    """Whether it is the endpoint's doing (not so when our own certificate has expired, say)."""


Result = Connected | Failed


class Contexts:
    """TLS contexts for upstreams, made once for each way to use them, and anew when the identity changes."""

    __slots__ = ("_identity", "_kept", "certificate", "missing")

    def __init__(self, identity: IdentitySource) -> None:
        self._identity = identity
        self.certificate: tuple[bytes, bytes] | None = None
        """Chain and key (PEM) that upstreams outside of the mesh are shown. Whoever changes it calls `clear`."""
        self.missing = ""
        """Why there is no `certificate` though there should be one: an upstream might let anybody in, and tell later who has been there."""
        self._kept: dict[tuple[UpstreamTls, tuple[str, ...]], ssl.SSLContext] = {}

    def get(self, tls: UpstreamTls, alpn: tuple[str, ...]) -> ssl.SSLContext:
        """Raises IdentityError when a certificate of our own is needed and is not there or has expired, or a root cannot be used."""
        if tls.mode == "mesh" or tls.present_svid:
            own = self._identity.current
            expired = expiry_problem(own, time.time())
            if expired:
                raise IdentityError("expired" if own.chain else "no_identity", expired)
        elif self.missing:
            raise IdentityError("no_client_certificate", f"the Gateway has no certificate to show: {self.missing}")
        key = (tls, alpn)
        context = self._kept.get(key)
        if context is None:
            context = client_context(tls, self._identity, alpn, certificate=self.certificate)
            if len(self._kept) >= MOST_CONTEXTS:
                self._kept.clear()
            self._kept[key] = context
        return context

    def clear(self) -> None:
        """Makes them anew from the present identity."""
        self._kept.clear()


class Steps:
    """A bound on how many handshake steps (about a millisecond each) run in one turn of the loop, so that many of them delay no request."""

    __slots__ = ("_left", "_loop", "_most", "_queue", "_scheduled")

    def __init__(self, loop: asyncio.AbstractEventLoop, most: int) -> None:
        self._loop = loop
        self._most = self._left = max(1, most)
        self._queue: deque[Callable[[], None]] = deque()
        self._scheduled = False

    def run(self, step: Callable[[], None]) -> None:
        """Runs `step` now, or in one of the next turns."""
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._turn)
        if self._left:
            self._left -= 1
            step()
        else:
            self._queue.append(step)

    def _turn(self) -> None:
        self._scheduled = False
        self._left = self._most
        queue = self._queue
        for _ in range(min(len(queue), self._most)):
            self.run(queue.popleft())


class Dialer:
    """What all dials of a worker share."""

    __slots__ = ("contexts", "loop", "resolver", "steps")

    def __init__(self, loop: asyncio.AbstractEventLoop, resolver: Resolver, contexts: Contexts, steps: int) -> None:
        self.loop = loop
        self.resolver = resolver
        self.contexts = contexts
        self.steps = Steps(loop, steps)

    def dial(self, target: Target, done: Callable[[Result], None]) -> Dial:
        """Begins to connect. `done` is called once, never before this returns, and not after `Dial.cancel`."""
        return Dial(self, target, done)


class Dial:
    """One connection that is being made."""

    __slots__ = ("_addresses", "_context", "_deadline", "_dialer", "_done", "_fd", "_slice", "_sock", "_target", "_timer", "_why")

    def __init__(self, dialer: Dialer, target: Target, done: Callable[[Result], None]) -> None:
        loop = dialer.loop
        self._dialer = dialer
        self._target = target
        self._done: Callable[[Result], None] | None = done
        self._sock: socket.socket | None = None
        self._fd = -1
        self._addresses: list[Address] = []
        self._why = "no address"
        self._context: ssl.SSLContext | None = None
        self._slice: asyncio.TimerHandle | None = None
        self._deadline = loop.time() + target.timeout
        self._timer: asyncio.TimerHandle | None = loop.call_later(target.timeout, self._late)
        loop.call_soon(self._begin)

    def _begin(self) -> None:
        if self._done is None:
            return
        target = self._target
        if target.tls is not None:
            try:
                self._context = self._dialer.contexts.get(target.tls, target.alpn)
            except IdentityError as error:
                self._fail(Failed(ConnectFailed(reason=str(error)), error.reason, blame=False))
                return
        self._dialer.resolver.find(target.host, target.port, self._resolved)

    def _resolved(self, addresses: list[Address], problem: str) -> None:
        if self._done is None:
            return
        if not addresses:
            self._fail(Failed(ConnectFailed(reason=f"{self._target.host}: {problem}"), "unresolved"))
            return
        self._addresses = list(addresses)
        self._next()

    # Connecting

    def _next(self) -> None:
        """Tries the next address until one is on its way."""
        self._drop()
        target = self._target
        while self._addresses:
            family, address = self._addresses.pop(0)
            if target.tls is None and not target.plaintext and not is_loopback(address[0]):
                self._fail(Failed(ConnectFailed(reason="plaintext off loopback, and Mesh.upstream is Strict"), "plaintext", blame=False))
                return
            try:
                sock = socket.socket(family, socket.SOCK_STREAM)
            except OSError as error:
                self._fail(Failed(ConnectFailed(reason=_word(error.errno)), "no_socket", blame=False))
                return
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            code = sock.connect_ex(address)
            self._sock = sock
            self._fd = sock.fileno()
            if code in (0, errno.EINPROGRESS):
                loop = self._dialer.loop
                loop.add_writer(self._fd, self._connected)
                if self._addresses:  # each address gets its share of the time that is left
                    left = (self._deadline - loop.time()) / (len(self._addresses) + 1)
                    self._slice = loop.call_later(max(0.0, left), self._next)
                return
            self._why = _word(code)
            self._drop()
        self._fail(Failed(ConnectFailed(reason=self._why), "refused" if self._why == "connection refused" else "unreachable"))

    def _connected(self) -> None:
        sock = self._sock
        if sock is None:
            return
        self._dialer.loop.remove_writer(self._fd)
        code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            self._why = _word(code)
            self._next()
            return
        if self._slice is not None:
            self._slice.cancel()
            self._slice = None
        if self._target.proxy and not self._said(sock, self._target.proxy):
            return
        context = self._context
        if context is None:
            self._succeed("", "")
            return
        tls = self._target.tls
        assert tls is not None
        try:
            # Ragged ends must be seen: to TLS a connection that ends without close_notify may have been cut off.
            self._sock = context.wrap_socket(
                sock, do_handshake_on_connect=False, suppress_ragged_eofs=False, server_hostname=self._target.name or server_name(tls)
            )
        except (OSError, ValueError) as error:
            self._fail(Failed(ConnectFailed(reason=f"tls: {error}"), "tls"))
            return
        self._dialer.steps.run(self._shake)

    def _said(self, sock: socket.socket, version: Literal["v1", "v2"]) -> bool:
        """Says for whom the connection is. A new connection has room for that, or is broken."""
        header = write_proxy_header(version, *(self._target.proxied or (None, None)))
        try:
            whole = sock.send(header) == len(header)
        except OSError as error:
            self._why, whole = _word(error.errno), False
        if not whole:
            self._next()
        return whole

    # TLS

    def _shake(self) -> None:
        sock = self._sock
        if not isinstance(sock, ssl.SSLSocket):
            return
        loop = self._dialer.loop
        try:
            sock.do_handshake()
        except ssl.SSLWantReadError:
            loop.add_reader(self._fd, self._ready)
            return
        except ssl.SSLWantWriteError:
            loop.add_writer(self._fd, self._ready)
            return
        except (OSError, ValueError) as error:
            word = handshake_problem(error)
            kind = ConnectFailed if word == "closed" else UpstreamIdentity
            self._fail(Failed(kind(reason=f"tls handshake: {word}"), word))
            return
        self._verify(sock)

    def _ready(self) -> None:
        self._dialer.loop.remove_reader(self._fd)
        self._dialer.loop.remove_writer(self._fd)
        self._dialer.steps.run(self._shake)

    def _verify(self, sock: ssl.SSLSocket) -> None:
        target = self._target
        assert target.tls is not None
        found = verify_upstream(sock, target.tls, target.identities)
        if isinstance(found, IdentityProblem):
            self._fail(Failed(UpstreamIdentity(reason=str(found)), found.reason))
            return
        alpn = sock.selected_alpn_protocol() or ""
        if alpn != "h2" and target.alpn == H2:
            self._fail(Failed(ConnectFailed(reason="the upstream does not speak HTTP/2, and its port says that it does"), "no_http2"))
            return
        self._succeed(found, alpn)

    # The end

    def _succeed(self, principal: str, alpn: str) -> None:
        sock = self._sock
        self._sock = None
        done = self._finish()
        if done is not None and sock is not None:
            done(Connected(sock, principal, alpn))

    def _late(self) -> None:
        self._fail(Failed(ConnectFailed(reason=f"not connected within {self._target.timeout:g} s"), "timeout"))

    def _fail(self, failed: Failed) -> None:
        done = self._finish()
        if done is not None:
            done(failed)

    def cancel(self) -> None:
        """Gives the connection up; nobody is told."""
        self._finish()

    def _finish(self) -> Callable[[Result], None] | None:
        done, self._done = self._done, None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._drop()
        return done

    def _drop(self) -> None:
        if self._slice is not None:
            self._slice.cancel()
            self._slice = None
        sock, self._sock = self._sock, None
        if sock is not None:
            self._dialer.loop.remove_reader(self._fd)
            self._dialer.loop.remove_writer(self._fd)
            with contextlib.suppress(OSError):
                sock.close()


def is_loopback(host: str) -> bool:
    """Whether an address in text is of the machine itself."""
    return host.startswith("127.") or host == "::1"


def _word(code: int | None) -> str:
    return os.strerror(code).lower() if code else "error"
