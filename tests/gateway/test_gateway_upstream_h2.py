"""HTTP/2 to upstreams: many requests on one connection, trailers, flow control both ways, and streams that are given up."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Callable

import h2.config
import h2.connection
import h2.events
import h2.settings
import msgspec
import pytest
from upstream_world import ORDERS, UNKNOWN, Connection, Upstream, World, cluster_of, ok, permit, run, serves, upstream

from gateway.forward import wants_http2
from gateway.limits import Limits
from mesh.filters import RetryPolicy
from mesh.http import HTTP2, HTTP11
from mesh.model import Cluster
from mesh.refusals import ConnectFailed, UpstreamReset

FINE = [(":status", "200"), ("content-type", "text/plain")]
NEVER = RetryPolicy(attempts=0)


class Peer:
    """An HTTP/2 upstream on `h2`, in a thread: what it does goes by the request's path."""

    def __init__(self) -> None:
        self.refused = 0
        self.gone = 0
        self.resets: list[int] = []
        self.uploaded = 0
        self.requests: list[list[tuple[bytes, bytes]]] = []
        self.sent = 0
        self.read = threading.Event()
        self.most_open = 0

    def __call__(self, connection: Connection) -> None:
        conn = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False, header_encoding=None))
        conn.initiate_connection()
        connection.send(conn.data_to_send())
        paths: dict[int, bytes] = {}
        bodies: dict[int, bytearray] = {}
        waiting: dict[int, int] = {}
        while data := connection.recv():
            for event in conn.receive_data(data):
                number = getattr(event, "stream_id", 0)
                if isinstance(event, h2.events.RequestReceived):
                    self.requests.append(event.headers)
                    paths[number] = dict(event.headers)[b":path"]
                    bodies[number] = bytearray()
                    self._begin(conn, number, paths[number], waiting)
                    self.most_open = max(self.most_open, conn.open_inbound_streams)
                elif isinstance(event, h2.events.DataReceived):
                    self.uploaded += len(event.data)
                    if paths[number] == b"/echo":
                        bodies[number] += event.data
                    if paths[number] != b"/stuck":
                        conn.acknowledge_received_data(event.flow_controlled_length, number)
                elif isinstance(event, h2.events.StreamEnded):
                    self._end(conn, number, paths[number], bytes(bodies[number]))
                elif isinstance(event, h2.events.StreamReset):
                    self.resets.append(event.error_code)
                    waiting.pop(number, None)
            for number in tuple(waiting):
                self._send_more(conn, number, waiting)
            connection.send(conn.data_to_send())

    def _begin(self, conn: h2.connection.H2Connection, number: int, path: bytes, waiting: dict[int, int]) -> None:
        if path == b"/refused":
            self.refused += 1
            if self.refused == 1:
                conn.reset_stream(number, 7)
        elif path == b"/gone":
            self.gone += 1
            if self.gone == 1:
                conn.close_connection(0, last_stream_id=number - 2)
        elif path == b"/reset":
            conn.reset_stream(number, 2)
        elif path == b"/half":
            conn.send_headers(number, FINE)
            conn.send_data(number, b"half")
            conn.reset_stream(number, 2)
        elif path == b"/early":
            conn.send_headers(number, [(":status", "413")], end_stream=True)
        elif path == b"/big":
            conn.send_headers(number, FINE)
            waiting[number] = 4 << 20
        elif path == b"/hints":
            conn.send_headers(number, [(":status", "103"), ("link", "</a.css>")])

    def _end(self, conn: h2.connection.H2Connection, number: int, path: bytes, body: bytes) -> None:
        if path == b"/gone" and self.gone == 1:
            return
        if path in {b"/ok", b"/refused", b"/gone", b"/hints", b"/upload"} and number in conn.streams and not conn.streams[number].closed:
            conn.send_headers(number, FINE)
            conn.send_data(number, b"fine", end_stream=True)
        elif path == b"/echo":
            conn.send_headers(number, FINE)
            conn.send_data(number, body, end_stream=True)
        elif path == b"/grpc":
            conn.send_headers(number, [(":status", "200"), ("content-type", "application/grpc")])
            conn.send_data(number, b"\0\0\0\0\0")
            conn.send_headers(number, [("grpc-status", "7")], end_stream=True)
        elif path == b"/grpc-error":
            conn.send_headers(number, [(":status", "200"), ("grpc-status", "5")], end_stream=True)

    def _send_more(self, conn: h2.connection.H2Connection, number: int, waiting: dict[int, int]) -> None:
        while waiting[number]:
            size = min(conn.local_flow_control_window(number), conn.max_outbound_frame_size, waiting[number])
            if not size:
                return
            waiting[number] -= size
            self.sent += size
            conn.send_data(number, bytes(size), end_stream=not waiting[number])
        del waiting[number]


def with_peer(conversation: Callable[[World, Cluster, Peer, Upstream], object], limits: Limits | None = None) -> None:
    peer = Peer()
    with upstream(peer, alpn=("h2",)) as orders:

        async def talk(world: World) -> None:
            await conversation(world, cluster_of(orders.endpoint(), http2="always"), peer, orders)  # type: ignore[misc]

        run(talk, limits)


def test_many_requests_share_a_connection() -> None:
    async def conversation(world: World, cluster: Cluster, peer: Peer, orders: Upstream) -> None:
        clients = [
            world.begin(permit(cluster, b"POST", b"/echo", body_length=5, headers=[(b"content-length", b"5")]), [b"%05d" % at])
            for at in range(60)
        ]
        await world.until(lambda: all(client.ended for client in clients))
        assert [client.body for client in clients] == [b"%05d" % at for at in range(60)]
        assert {client.outcome.response_version for client in clients} == {"HTTP/2"}
        assert {client.outcome.upstream_principal for client in clients} == {ORDERS}
        assert orders.accepted == 1
        assert world.endpoint_state(cluster)["idle"] == 1
        assert dict(peer.requests[0])[b":authority"] == b"orders.shop"

    with_peer(conversation)


def test_prior_knowledge_in_plaintext() -> None:
    with upstream(Peer(), spiffe_id=None) as orders:

        async def conversation(world: World) -> None:
            client = await world.ask(permit(cluster_of(orders.endpoint(), tls=None, http2="always"), target=b"/ok"))
            assert (client.status, client.body, client.outcome.response_version) == (200, b"fine", "HTTP/2")

        run(conversation)


@pytest.mark.parametrize(("path", "status", "trailers"), [(b"/grpc", "7", [(b"grpc-status", b"7")]), (b"/grpc-error", "5", None)])
def test_grpc_status(path: bytes, status: str, trailers: list[tuple[bytes, bytes]] | None) -> None:
    async def conversation(world: World, cluster: Cluster, peer: Peer, orders: Upstream) -> None:
        client = await world.ask(permit(cluster, b"POST", path, body_length=UNKNOWN, version=HTTP2), [b"\0\0\0\0\0"])
        assert (client.status, client.trailers, client.outcome.grpc_status) == (200, trailers, status)

    with_peer(conversation)


def test_informational() -> None:
    async def conversation(world: World, cluster: Cluster, peer: Peer, orders: Upstream) -> None:
        client = await world.ask(permit(cluster, target=b"/hints"))
        assert (client.infos, client.status) == ([(103, [(b"link", b"</a.css>")])], 200)

    with_peer(conversation)


@pytest.mark.parametrize(("path", "accepted"), [(b"/refused", 1), (b"/gone", 2)])
@pytest.mark.parametrize("method", [b"GET", b"POST"])
def test_what_was_not_processed_is_sent_again(path: bytes, accepted: int, method: bytes) -> None:
    async def conversation(world: World, cluster: Cluster, peer: Peer, orders: Upstream) -> None:
        assert (await world.ask(permit(cluster, target=b"/ok"))).status == 200
        client = await world.ask(permit(cluster, method, path))
        assert (client.status, client.outcome.attempts) == (200, 2)
        assert orders.accepted == accepted

    with_peer(conversation)


def test_a_stream_that_is_reset() -> None:
    async def conversation(world: World, cluster: Cluster, peer: Peer, orders: Upstream) -> None:
        client = await world.ask(permit(cluster, b"POST", b"/reset"))
        assert isinstance(client.refusal, UpstreamReset)
        half = await world.ask(permit(cluster, target=b"/half"))
        assert (half.status, half.body) == (200, b"half")
        assert isinstance(half.refusal, UpstreamReset)
        assert (await world.ask(permit(cluster, target=b"/ok"))).status == 200
        assert orders.accepted == 1

    with_peer(conversation)


def test_an_early_answer_leaves_the_connection_usable() -> None:
    async def conversation(world: World, cluster: Cluster, peer: Peer, orders: Upstream) -> None:
        client = await world.ask(permit(cluster, b"POST", b"/early", body_length=1 << 40), itertools.repeat(b"x" * 16384))
        assert (client.status, client.refusal) == (413, None)
        assert (await world.ask(permit(cluster, target=b"/ok"))).status == 200
        await world.until(lambda: peer.resets == [8])
        assert orders.accepted == 1

    with_peer(conversation)


def test_a_client_that_goes_ends_its_stream_only() -> None:
    async def conversation(world: World, cluster: Cluster, peer: Peer, orders: Upstream) -> None:
        gone = world.begin(permit(cluster, target=b"/never"))
        await world.until(lambda: len(peer.requests) == 1)
        gone.cancelled = True
        gone.forwarding.cancel()
        await world.until(lambda: peer.resets == [8])
        assert (await world.ask(permit(cluster, target=b"/ok"))).status == 200
        assert orders.accepted == 1

    with_peer(conversation)


def test_a_stuck_upload_stops_at_the_window() -> None:
    async def conversation(world: World, cluster: Cluster, peer: Peer, orders: Upstream) -> None:
        client = world.begin(permit(cluster, b"POST", b"/stuck", body_length=UNKNOWN), itertools.repeat(b"x" * 16384))
        await world.until(lambda: peer.uploaded == 65535)
        sent = client.sent
        assert client.asked == [True, False]
        await asyncio.sleep(0.1)
        assert client.sent == sent <= 65535 + 2 * 16384
        client.cancelled = True
        client.forwarding.cancel()

    with_peer(conversation)


def test_an_upload_through_windows() -> None:
    async def conversation(world: World, cluster: Cluster, peer: Peer, orders: Upstream) -> None:
        client = await world.ask(permit(cluster, b"POST", b"/upload", body_length=UNKNOWN), [b"x" * 16384] * 200)
        assert (client.status, peer.uploaded) == (200, 200 * 16384)

    with_peer(conversation)


def test_a_slow_client_holds_its_own_stream_only() -> None:
    async def conversation(world: World, cluster: Cluster, peer: Peer, orders: Upstream) -> None:
        slow = world.begin(permit(cluster, target=b"/big"), takes=False)
        slow.keep_body = False
        await world.until(lambda: slow.received > 0)
        assert (await world.ask(permit(cluster, target=b"/ok"))).status == 200
        await asyncio.sleep(0.1)
        assert slow.received == peer.sent < 4 << 20
        slow.takes = True
        slow.forwarding.answer_wanted()
        await world.until(lambda: slow.ended)
        assert slow.received == 4 << 20

    with_peer(conversation)


def test_clients_that_go_while_they_hold_credit_do_not_use_up_the_connection() -> None:
    async def conversation(world: World, cluster: Cluster, peer: Peer, orders: Upstream) -> None:
        for _ in range(140):  # more than fit into the connection's window
            slow = world.begin(permit(cluster, target=b"/big"), takes=False)
            slow.keep_body = False
            await world.until(lambda slow=slow: slow.received > 0)  # type: ignore[misc]
            slow.cancelled = True
            slow.forwarding.cancel()
        client = await world.ask(permit(cluster, target=b"/big"))
        assert client.received == 4 << 20
        assert orders.accepted == 1

    with_peer(conversation)


def test_clients_that_take_nothing_do_not_keep_the_others_from_their_answers() -> None:
    async def conversation(world: World, cluster: Cluster, peer: Peer, orders: Upstream) -> None:
        slow = [world.begin(permit(cluster, target=b"/big"), takes=False) for _ in range(60)]
        for client in slow:
            client.keep_body = False
        await world.until(lambda: all(client.received > 0 for client in slow))
        await asyncio.sleep(0.3)
        assert (await world.ask(permit(cluster, target=b"/ok"))).status == 200
        assert orders.accepted == 1
        for client in slow:
            client.cancelled = True
            assert client.forwarding is not None
            client.forwarding.cancel()

    with_peer(conversation)


def test_an_upstream_that_lost_http2() -> None:
    with upstream(serves(ok())) as orders:

        async def conversation(world: World) -> None:
            client = await world.ask(permit(cluster_of(orders.endpoint(), http2="always"), retry=NEVER))
            assert isinstance(client.refusal, ConnectFailed)

        run(conversation)


GRPC = [(b"content-type", b"application/grpc+proto")]


def test_auto_takes_http2_for_grpc_and_http1_for_the_rest() -> None:
    with upstream(Peer(), alpn=("h2",)) as orders:

        async def conversation(world: World) -> None:
            cluster = cluster_of(orders.endpoint())
            client = await world.ask(permit(cluster, b"POST", b"/grpc", GRPC, UNKNOWN, HTTP2), [b"\0\0\0\0\0"])
            assert client.outcome.grpc_status == "7"

        run(conversation)
    with upstream(serves(ok())) as orders:

        async def conversation(world: World) -> None:
            cluster = cluster_of(orders.endpoint())
            client = await world.ask(permit(cluster, b"POST", b"/grpc", GRPC, version=HTTP2))
            assert (client.status, client.outcome.response_version) == (200, "HTTP/1.1")  # it speaks nothing better

        run(conversation)


@pytest.mark.parametrize(
    ("http2", "tls", "version", "headers", "expected"),
    [
        ("auto", True, HTTP2, GRPC, True),
        ("auto", True, HTTP2, [(b"te", b"trailers")], True),
        ("auto", True, HTTP2, [(b"content-type", b"text/plain")], False),
        ("auto", True, HTTP11, GRPC, False),
        ("auto", False, HTTP2, GRPC, False),
        ("never", True, HTTP2, GRPC, False),
        ("always", True, HTTP11, [], True),
        ("always", False, HTTP11, [], True),
    ],
)
def test_which_protocol(http2: str, tls: bool, version: bytes, headers: list[tuple[bytes, bytes]], expected: bool) -> None:
    cluster = cluster_of(http2=http2) if tls else cluster_of(http2=http2, tls=None)
    plan = permit(cluster, b"POST", version=version).plan
    assert wants_http2(cluster, plan, headers) is expected
    of_grpc = msgspec.structs.replace(plan, rule=msgspec.structs.replace(plan.rule, grpc=True))
    assert wants_http2(cluster, of_grpc, headers) is (http2 != "never")
