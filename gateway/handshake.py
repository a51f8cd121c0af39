"""From an accepted TLS connection to a known peer: its ClientHello chooses the listener, the handshake runs, and who is there is known.

Handshakes cost a millisecond of the one loop that everybody shares: only a few steps are made in one turn of it, first come, first served,
and there may be only so many at once. Until the peer is known a connection has no codec and nothing that it sends is looked at.
Where TLS is passed through there is no handshake here: the ClientHello is only looked at, and goes on with everything after it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
import time
from collections import deque
from typing import TYPE_CHECKING, Final

import msgspec

from gateway.serving import Serving
from gateway.wire import Wire
from identity.hello import MAX_BYTES, ClientHello, read_hello
from identity.problems import IdentityProblem
from identity.tls import handshake_problem, peer_of

if TYPE_CHECKING:
    from gateway.listening import Port

log = logging.getLogger("tollhouse.gateway")

PEEK_AGAIN: Final = 0.05
"""Seconds until a ClientHello that has not grown is looked at again."""
ALERT_LINGER: Final = 0.5
"""Seconds for a refused client to read why."""
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

    __slots__ = (
        "_fd",
        "_local",
        "_look",
        "_low",
        "_port",
        "_reading",
        "_remote",
        "_serving",
        "_sock",
        "_tls",
        "_writing",
        "deadline",
        "over",
    )

    def __init__(self, port: Port, sock: socket.socket, remote: tuple[str, int], local: tuple[str, int], deadline: float) -> None:
        """`remote` and `local`: from where the client comes, and where it connected to; perhaps as a trusted proxy says."""
        self._port = port
        self._sock = sock
        self._fd = sock.fileno()
        self._remote = remote
        self._local = local
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
        if serving.listener.passthrough:
            self._pass_through(serving, hello)
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

    def _pass_through(self, serving: Serving, hello: ClientHello) -> None:
        port, sock = self._port, self._sock
        if self._low > 1:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)
        peer = peer_of(None, None, self._remote, self._local)
        assert not isinstance(peer, IdentityProblem)
        self.over = True
        port.shaking.pop(self, None)
        port.begin(serving, sock, msgspec.structs.replace(peer, sni=hello.server_name))

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
        peer = peer_of(tls, client, self._remote, self._local, serving.domains)
        if isinstance(peer, IdentityProblem):
            self.fail(peer.reason)
            return
        if serving not in port.servings:  # it was removed, or what clients must prove has changed, while the handshake ran
            self.fail("listener_changed")
            return
        self.over = True
        port.shaking.pop(self, None)
        port.begin(serving, tls, peer)

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
