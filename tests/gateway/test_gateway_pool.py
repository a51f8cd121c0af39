"""A pool under everything at once: whatever upstreams, clients and the configuration do, the books balance in the end."""

from __future__ import annotations

import asyncio
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from upstream_world import Recorder, World, cluster_of, ok, permit, run, snapshot_of

from gateway.limits import Limits
from mesh.model import Cluster, Endpoint, OutlierDetection, RetryPolicy

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
        assert all(not connection.streams for connection in lane.free)
        # Nobody waits while a connection is free.
        assert not (lane.waiting and any(not connection.spent for connection in lane.free))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 6), st.sampled_from(["round_robin", "least_request"]), st.sampled_from([0, 2]))
def test_the_books_balance(seed: int, most: int, balancer: str, attempts: int) -> None:
    async def conversation(world: World) -> None:
        rng = random.Random(seed)
        chaos = Chaos(rng)
        endpoints = [await chaos.start() for _ in range(3)]
        endpoints.append(Endpoint(address="127.0.0.1", port=1))

        def some() -> Cluster:
            chosen = rng.sample(endpoints, rng.randint(1, 4))
            outlier = OutlierDetection(consecutive_5xx=3, base_ejection=0.02)
            return cluster_of(*chosen, tls=None, max_connections=most, max_pending=20, balancer=balancer, outlier=outlier)

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
