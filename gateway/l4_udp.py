"""UDP listeners: one socket for each address and port, and the flows of its clients.

Datagrams are told apart by the client's address and port and by the address that they were sent to; answers leave from that address, also
where the socket is bound to all of them (RFC 3542 section 6, ip(7) IP_PKTINFO). There are only so many flows: when all places are taken,
those that are not answered or not used make room, and datagrams of new flows are dropped when there are none such.
"""

from __future__ import annotations

import logging
import socket
import struct
from typing import Any, Final

from gateway.l4_flow import LARGEST, Flow
from gateway.listening import plain_address
from gateway.serving import Serving
from gateway.shared import Shared
from mesh.peer import Peer

log = logging.getLogger("tollhouse.gateway")

ANSWERED_BY: Final = 1.0
"""Seconds after which a flow without an answer is the first to make room for others."""
DATAGRAMS_A_TURN: Final = 64
RECEIVE_BUFFER: Final = 4 << 20
"""Bytes that are asked of the kernel for datagrams that wait (it gives no more than net.core.rmem_max)."""
_IP_PKTINFO: Final = 8
"""ip(7); Python has no name for it."""
_V4: Final = struct.Struct("=I4s4s")
"""struct in_pktinfo: interface, the address to send from, the address that was sent to."""
_V6: Final = struct.Struct("=16sI")
"""struct in6_pktinfo: address, interface."""
_SPACE: Final = socket.CMSG_SPACE(_V6.size) + socket.CMSG_SPACE(_V4.size)


class UdpPort:
    """Owns one bound socket and its flows. With `serving` None it takes no new flows, and those that there are go on."""

    __slots__ = ("_family", "_reading", "_sock", "_wild", "address", "flows", "number", "serving", "shared", "unanswered")

    def __init__(self, shared: Shared, address: str, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.shared = shared
        self.address = address
        name = sock.getsockname()
        self.number: int = name[1]
        self.serving: Serving | None = None
        self.flows: dict[tuple[Any, ...], Flow] = {}
        """By client and local address; the one whose client has been still for longest is first."""
        self.unanswered: dict[Flow, None] = {}
        """Those that no endpoint has answered yet, the oldest first."""
        self._sock: socket.socket | None = sock
        self._family = sock.family
        self._wild = name[0] in {"0.0.0.0", "::"}
        if self._wild:
            if sock.family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
            else:
                sock.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)
        self._reading = False
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)

    @property
    def open(self) -> bool:
        """Whether the socket is there."""
        return self._sock is not None

    def serve(self, serving: Serving) -> None:
        """Takes flows for this listener from now on; the flows that there are keep what they have."""
        self.serving = serving
        if self._sock is not None and not self._reading:
            self._reading = True
            self.shared.poller.add_reader(self._sock.fileno(), self._readable)

    def retire(self) -> None:
        """Takes no new flows. The socket closes with the last flow."""
        self.serving = None
        if not self.flows:
            self._close()

    def finish(self) -> None:
        """Takes no more datagrams from clients: another process may have the same socket. Answers still go out."""
        self._unread()

    def _unread(self) -> None:
        if self._reading and self._sock is not None:
            self._reading = False
            self.shared.poller.remove_reader(self._sock.fileno())

    def stop(self) -> None:
        """Ends everything."""
        self.serving = None
        for flow in list(self.flows.values()):
            flow.end()
        self._close()

    def _close(self) -> None:
        self._unread()
        sock, self._sock = self._sock, None
        if sock is not None:
            sock.close()
            self.shared.emptied.set()

    # Datagrams

    def _readable(self) -> None:
        for _ in range(DATAGRAMS_A_TURN):
            sock = self._sock
            if sock is None:
                return
            try:
                if self._wild:
                    data, ancillary, _, client = sock.recvmsg(LARGEST, _SPACE)
                    local = _local_of(ancillary)
                else:
                    data, client = sock.recvfrom(LARGEST)
                    local = b""
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                continue  # an ICMP error of an answer that was sent: nobody in particular is meant
            self._take(data, client, local)

    def _take(self, data: bytes, client: tuple[Any, ...], local: bytes) -> None:
        key = (client[0], client[1], local)
        flow = self.flows.pop(key, None)
        if flow is not None:
            self.flows[key] = flow  # the one that has been used last is last
            if flow.datagram(data):
                return
        if self.serving is None:
            self.dropped("not_served")
            return
        if len(self.flows) >= self.shared.limits.flows and not self._made_room():
            self.dropped("full")
            return
        address = self._text(local) if local else plain_address(self._bound())
        peer = Peer(address=plain_address(client[0]), port=client[1], local_address=address, local_port=self.number)
        flow = self.flows[key] = Flow(self, key, client, local, peer)
        self.unanswered[flow] = None
        flow.datagram(data)
        flow.begin()

    def _made_room(self) -> bool:
        """Ends the flow that is missed least: one that should have been answered by now, one that has been still for long, or at last the
        oldest of those that wait for an answer. False when all of them are in use."""
        now = self.shared.loop.time()
        waiting = next(iter(self.unanswered), None)
        still = next(iter(self.flows.values()))
        if waiting is not None and waiting.began + ANSWERED_BY <= now:
            waiting.make_room()
        elif still.last + self.shared.limits.idle_when_full <= now:
            still.make_room()
        elif waiting is not None:
            waiting.make_room()
        else:
            return False
        return True

    def _bound(self) -> str:
        name: str = self._sock.getsockname()[0] if self._sock is not None else ""
        return name

    def _text(self, local: bytes) -> str:
        return plain_address(socket.inet_ntop(socket.AF_INET if len(local) == 4 else socket.AF_INET6, local))

    def send(self, flow: Flow, data: bytes) -> None:
        """Sends an answer to the client of `flow`, from the address that it knows."""
        sock, local = self._sock, flow.local
        if sock is None:
            return
        try:
            if not local:
                sock.sendto(data, flow.client)
            elif len(local) == 4:
                info = socket.IPPROTO_IP, _IP_PKTINFO, _V4.pack(0, local, b"\0\0\0\0")
                sock.sendmsg([data], [info], 0, flow.client)
            else:
                sock.sendmsg([data], [(socket.IPPROTO_IPV6, socket.IPV6_PKTINFO, _V6.pack(local, 0))], 0, flow.client)
        except (BlockingIOError, InterruptedError):
            self.dropped("client_full")
        except OSError:
            self.dropped("client_unreachable")

    def dropped(self, reason: str) -> None:
        """Counts one datagram that went nowhere."""
        serving = self.serving
        self.shared.telemetry.datagram_dropped(self.shared.key, serving.name if serving is not None else "", reason)

    def forget(self, flow: Flow) -> None:
        """A flow has ended."""
        if self.flows.get(flow.key) is flow:
            del self.flows[flow.key]
        self.unanswered.pop(flow, None)
        if self.serving is None and not self.flows:
            self._close()


def _local_of(ancillary: list[tuple[int, int, bytes]]) -> bytes:
    """The address that a datagram was sent to, packed; empty when the system does not say."""
    for level, kind, data in ancillary:
        if level == socket.IPPROTO_IPV6 and kind == socket.IPV6_PKTINFO:
            return data[:16]
        if level == socket.IPPROTO_IP and kind == _IP_PKTINFO:
            return data[8:12]
    return b""


def bind_udp(address: str, port: int) -> socket.socket:
    """A socket bound to `address` (empty: all, IPv4 and IPv6) and `port`. Raises OSError, with what was to be bound as its filename."""
    if not address and not socket.has_dualstack_ipv6():
        address = "0.0.0.0"
    family = socket.AF_INET6 if not address or ":" in address else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_DGRAM)
    try:
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0 if not address else 1)
        sock.bind((address or "::", port))
    except OSError as problem:
        sock.close()
        raise OSError(problem.errno, problem.strerror, f"{address or '*'}:{port}/udp") from None
    return sock
