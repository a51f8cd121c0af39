"""A pool under everything at once: whatever upstreams, clients and the configuration do, the books balance in the end."""

from __future__ import annotations

import asyncio
import contextlib
import random

import h2.config
import h2.connection
import h2.events
import h2.exceptions
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from upstream_world import Recorder, World, cluster_of, ok, permit, run, serves, snapshot_of, upstream

from gateway.limits import Limits
from mesh.filters import RetryPolicy
from mesh.model import Cluster, Endpoint, OutlierDetection

BEHAVIOURS = ("ok", "ok", "ok", "close", "reset", "half", "garbage", "error", "slow", "last", "chunked", "early")


class Chaos:
    """A plaintext upstream on the same loop that draws what to do for each request."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.servers: list[asyncio.Server] = []

    async def start(self) -> Endpoint:
        server = await asyncio.start_server(self.serve, "127.0.0.1", 0)
        self.servers.append(server)
        return Endpoint(address="127.0.0.1", port=server.sockets[0].getsockname()[1])

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                what = self.rng.choice(BEHAVIOURS)
                if b"content-length: 3\r\n" in head and what != "early":
                    await reader.readexactly(3)
                if what == "ok":
                    writer.write(ok())
                elif what == "chunked":
                    writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\nfine\r\n0\r\n\r\n")
                elif what == "error":
                    writer.write(b"HTTP/1.1 503 Busy\r\ncontent-length: 4\r\n\r\nbusy")
                elif what == "slow":
                    await asyncio.sleep(0.02)
                    writer.write(ok())
                elif what == "last":
                    writer.write(b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 4\r\n\r\nfine")
                    return
                elif what == "early":
                    writer.write(b"HTTP/1.1 413 No\r\ncontent-length: 0\r\n\r\n")
                    return
                elif what == "half":
                    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nfi")
                    return
                elif what == "garbage":
                    writer.write(b"not HTTP at all\r\n\r\n")
                elif what == "reset":
                    writer.transport.abort()
                    return
                else:
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            with contextlib.suppress(RuntimeError):  # the loop may have ended before
                writer.close()


H2_BEHAVIOURS = ("ok", "ok", "ok", "refused", "reset", "half", "error", "slow", "early", "goaway", "close", "garbage")


class H2Chaos(Chaos):
    """The same over HTTP/2, with streams that are refused, connections that go away, and few streams at a time."""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        conn = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False, header_encoding=None))
        conn.local_settings.max_concurrent_streams = 3
        conn.initiate_connection()
        writer.write(conn.data_to_send())
        later: set[asyncio.TimerHandle] = set()
        loop = asyncio.get_running_loop()

        def answer(number: int, status: str, body: bytes) -> None:
            with contextlib.suppress(h2.exceptions.ProtocolError):
                conn.send_headers(number, [(":status", status)])
                conn.send_data(number, body, end_stream=True)
            if not writer.is_closing():
                writer.write(conn.data_to_send())

        try:
            while data := await reader.read(65536):
                for event in conn.receive_data(data):
                    number = getattr(event, "stream_id", 0)
                    if isinstance(event, h2.events.DataReceived):
                        with contextlib.suppress(h2.exceptions.ProtocolError):
                            conn.acknowledge_received_data(event.flow_controlled_length, number)
                    if isinstance(event, h2.events.RequestReceived):
                        what = self.rng.choice(H2_BEHAVIOURS)
                        if what == "early":
                            conn.send_headers(number, [(":status", "413")], end_stream=True)
                        elif what == "refused":
                            conn.reset_stream(number, 7)
                        elif what == "reset":
                            conn.reset_stream(number, 2)
                        elif what == "half":
                            conn.send_headers(number, [(":status", "200"), ("content-length", "4")])
                            conn.send_data(number, b"fi")
                            conn.reset_stream(number, 2)
                        elif what == "goaway":
                            conn.close_connection(0, last_stream_id=max(0, number - 2 * self.rng.randint(0, 2)))
                            return
                        elif what == "garbage":
                            writer.write(b"not HTTP/2 at all, and long enough to be a frame")
                            return
                        elif what == "close":
                            return
                        elif what == "slow":
                            later.add(loop.call_later(0.01, answer, number, "200", b"fine"))
                        else:
                            answer(number, "503" if what == "error" else "200", b"busy" if what == "error" else b"fine")
                writer.write(conn.data_to_send())
        except (ConnectionError, h2.exceptions.ProtocolError):
            pass
        finally:
            for handle in later:
                handle.cancel()
            with contextlib.suppress(ConnectionError, RuntimeError):  # the loop may have ended before
                writer.write(conn.data_to_send())
                writer.close()


def check(world: World, cluster: Cluster) -> None:
    pool = world.forwarder._pools.get(cluster.name)
    if pool is None:
        return
    lanes = [lane for place in pool.places.values() for lane in place.lanes.values()]
    assert pool.waiting == sum(len(lane.waiting) for lane in lanes)
    assert pool.waiting <= cluster.max_pending
    for lane in lanes:
        assert len(set(lane.free)) == len(lane.free)
        assert all(connection.listed for connection in lane.free)
        assert all(connection.multiplexed or not connection.streams for connection in lane.free)
        # Nobody waits while a connection is free, unless it is for a new one.
        patient = [waiter for waiter in lane.waiting if not waiter._fresh]  # type: ignore[attr-defined]
        assert not (patient and any(not connection.spent and connection.codec.available for connection in lane.free))


@settings(max_examples=25, deadline=None)
@pytest.mark.parametrize("http2", ["never", "always"])
@given(
    seed=st.integers(0, 2**32),
    most=st.integers(1, 6),
    balancer=st.sampled_from(["round_robin", "least_request"]),
    attempts=st.sampled_from([0, 2]),
)
def test_the_books_balance(http2: str, seed: int, most: int, balancer: str, attempts: int) -> None:
    async def conversation(world: World) -> None:
        rng = random.Random(seed)
        chaos = H2Chaos(rng) if http2 == "always" else Chaos(rng)
        endpoints = [await chaos.start() for _ in range(3)]
        endpoints.append(Endpoint(address="127.0.0.1", port=1))

        def some() -> Cluster:
            chosen = rng.sample(endpoints, rng.randint(1, 4))
            outlier = OutlierDetection(consecutive_5xx=3, base_ejection=0.02)
            more = {"max_connections": most, "max_pending": 20, "balancer": balancer, "outlier": outlier, "http2": http2}
            return cluster_of(*chosen, tls=None, **more)

        cluster = some()
        world.forwarder.apply(snapshot_of(cluster))
        clients: list[Recorder] = []
        for _ in range(60):
            what = rng.random()
            if what < 0.7:
                retry = RetryPolicy(attempts=attempts, statuses=(503,), backoff=0.001)
                body = [b"abc"] if rng.random() < 0.4 else None
                method = b"GET" if body is None else b"PUT"
                limit = 0.01 if rng.random() < 0.1 else None
                headers = [(b"content-length", b"3")] if body else []
                asked = permit(cluster, method, retry=retry, body_length=3 if body else 0, headers=headers, backend_timeout=limit)
                clients.append(world.begin(asked, body))
            elif what < 0.8 and clients:
                client = rng.choice(clients)
                if not client.ended:
                    client.cancelled = True
                    client.forwarding.cancel()
            elif what < 0.85:
                cluster = some()
                world.forwarder.apply(snapshot_of(cluster))
            else:
                await asyncio.sleep(rng.choice([0, 0, 0.001, 0.005]))
            check(world, cluster)
        await world.until(lambda: all(client.ended or client.cancelled for client in clients))
        for client in clients:
            assert not client.calls_after_end
            if client.ended and client.refusal is None:
                assert (client.status, client.body) in {(200, b"fine"), (413, b""), (503, b"busy")}
        check(world, cluster)
        pool = world.forwarder._pools[cluster.name]
        assert pool.active == pool.waiting == 0
        assert pool.connections <= most + sum(len(lane.dials) for place in pool.places.values() for lane in place.lanes.values())
        for server in chaos.servers:
            server.close()
        world.forwarder.apply(snapshot_of())
        await world.until(lambda: world.forwarder.state()["connections"] == 0)
        assert not {thing for thing in world.forwarder._shared.sweeper.watched if type(thing).__name__ == "Attempt"}

    run(conversation, Limits(linger=0.05))


@pytest.mark.parametrize(("strict", "reached"), [(False, True), (True, False)])
def test_plaintext_off_loopback_is_refused_under_strict(strict: bool, reached: bool) -> None:
    from mesh.model import MeshSettings, Snapshot
    from mesh.refusals import ConnectFailed

    async def conversation(world: World) -> None:
        # An address of documentation (RFC 5737): nothing is ever there.
        far = cluster_of(Endpoint(address="192.0.2.1", port=80), tls=None, connect_timeout=0.05)
        mesh = MeshSettings(upstream="Strict" if strict else "Permissive")
        world.forwarder.apply(Snapshot(version="1", mesh=mesh, clusters={far.name: far}))
        client = await world.ask(permit(far, retry=RetryPolicy(attempts=0)))
        assert isinstance(client.refusal, ConnectFailed)
        assert ("Strict" in client.refusal.reason) is strict

    run(conversation)


def test_a_connection_that_nobody_waits_for_any_more_makes_way() -> None:
    """The only one that there may be was being made for a request that is given up: whoever waits for another endpoint gets its place."""

    async def conversation(world: World) -> None:
        with upstream(serves(ok()), None) as one, upstream(serves(ok()), None) as two:
            cluster = cluster_of(one.endpoint(), two.endpoint(), tls=None, max_connections=1)
            world.forwarder.apply(snapshot_of(cluster))
            first, second = world.begin(permit(cluster)), world.begin(permit(cluster))
            first.cancelled = True
            first.forwarding.cancel()
            await world.until(lambda: second.ended)
            assert second.status == 200
            assert world.forwarder.state()["connections"] == 1

    run(conversation)
