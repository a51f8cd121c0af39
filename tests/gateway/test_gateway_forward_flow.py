"""Clients that go, configurations that change, the end, and back-pressure, over real connections with mTLS."""

from __future__ import annotations

import asyncio
import gc
import threading
import time

import pytest
from upstream_world import (
    GATEWAY,
    ORDERS,
    OTHER,
    Connection,
    World,
    authority,
    cluster_of,
    echoes,
    identity,
    ok,
    permit,
    run,
    serves,
    slow,
    snapshot_of,
    upstream,
)

from identity.files import StaticIdentity
from mesh.filters import RetryPolicy
from mesh.model import UpstreamTls
from mesh.refusals import UpstreamIdentity, UpstreamReset

NEVER = RetryPolicy(attempts=0)


# Giving up


@pytest.mark.parametrize("moment", ["waiting", "sending", "answering"])
def test_a_client_that_goes(moment: str) -> None:
    seen = threading.Event()

    def handler(connection: Connection) -> None:
        connection.head()
        if moment == "answering":
            connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\nsome")
        if not connection.recv():
            seen.set()

    with upstream(handler) as orders:

        async def conversation(world: World) -> None:
            cluster = cluster_of(orders.endpoint())
            client = world.begin(permit(cluster))
            if moment == "sending":
                await world.until(lambda: client.outcome.upstream_principal == ORDERS)
            if moment == "answering":
                await world.until(lambda: client.received == 4)
            client.cancelled = True
            client.forwarding.cancel()
            client.forwarding.cancel()
            state = world.endpoint_state(cluster)
            assert (state["active"], state["waiting"]) == (0, 0)
            if moment != "waiting":
                await world.until(seen.is_set)
                assert state["connections"] == 0
            await asyncio.sleep(0.05)
            assert client.calls_after_end == 0

        run(conversation)


# Changes


def test_endpoints_come_and_go() -> None:
    with upstream(serves(ok(b"a"))) as a, upstream(slow(0.3)) as b:

        async def conversation(world: World) -> None:
            before = cluster_of(a.endpoint(), b.endpoint())
            world.forwarder.apply(snapshot_of(before))
            for _ in range(2):
                await world.ask(permit(before))
            busy = [world.begin(permit(before)) for _ in range(2)]
            after = cluster_of(a.endpoint())
            world.forwarder.apply(snapshot_of(after))
            await world.until(lambda: all(client.ended for client in busy))
            assert [client.status for client in busy] == [200, 200]  # the busy one finished
            assert [(await world.ask(permit(before))).body for _ in range(3)] == [b"a"] * 3
            assert a.accepted == 1
            world.forwarder.apply(snapshot_of())
            await world.until(lambda: world.forwarder.state()["connections"] == 0)

        run(conversation)


def test_requests_that_wait_for_an_endpoint_that_goes_choose_anew() -> None:
    def deaf(connection: Connection) -> None:
        connection.recv()

    with upstream(deaf, spiffe_id=None) as a, upstream(serves(ok())) as b:

        async def conversation(world: World) -> None:
            before = cluster_of(a.endpoint())
            world.forwarder.apply(snapshot_of(before))
            clients = [world.begin(permit(before, retry=NEVER)) for _ in range(3)]
            world.forwarder.apply(snapshot_of(cluster_of(b.endpoint())))
            await world.until(lambda: all(client.ended for client in clients))
            assert [(client.status, client.outcome.attempts) for client in clients] == [(200, 1)] * 3

        run(conversation)


@pytest.mark.parametrize("change", ["identities", "tls", "identity"])
def test_what_a_connection_was_made_with_changes(change: str) -> None:
    source = StaticIdentity(identity(GATEWAY).current)
    with upstream(serves(ok())) as orders:

        async def conversation(world: World) -> None:
            cluster = cluster_of(orders.endpoint())
            world.forwarder.apply(snapshot_of(cluster))
            await world.ask(permit(cluster))
            if change == "identities":
                cluster = cluster_of(orders.endpoint(OTHER))
            elif change == "tls":
                cluster = cluster_of(orders.endpoint(), tls=UpstreamTls(mode="mesh", sni="other.shop"))
            else:
                source.replace(authority().issue(GATEWAY))
            world.forwarder.apply(snapshot_of(cluster))
            assert world.endpoint_state(cluster)["connections"] == 0
            client = await world.ask(permit(cluster, retry=NEVER))
            if change == "identities":
                assert isinstance(client.refusal, UpstreamIdentity)
            else:
                assert client.status == 200
                assert orders.accepted == 2

        run(conversation, source=source)


def test_closing_lets_requests_finish_and_then_ends_them() -> None:
    with upstream(slow(0.2)) as orders, upstream(slow(30)) as stuck:

        async def conversation(world: World) -> None:
            fine = world.begin(permit(cluster_of(orders.endpoint())))
            cluster = cluster_of(stuck.endpoint(), name="shop/stuck:1")
            never = world.begin(permit(cluster))
            await world.forwarder.close(0.8)
            assert fine.status == 200
            assert isinstance(never.refusal, UpstreamReset)
            late = world.begin(permit(cluster))
            assert late.refusal is not None
            assert world.forwarder.state()["connections"] == 0

        run(conversation)


# Back-pressure


def test_a_large_upload_to_a_slow_reader_stays_in_bounds() -> None:
    size = 200 << 20
    got = [0]

    def handler(connection: Connection) -> None:
        connection.head()
        got[0] = len(connection.buffer)
        view = memoryview(bytearray(256 * 1024))
        while got[0] < size:
            time.sleep(0.0002)
            count = connection.sock.recv_into(view)
            if not count:
                return
            got[0] += count
        connection.send(ok())

    with upstream(handler, spiffe_id=None) as orders:

        async def conversation(world: World) -> None:
            piece = bytes(64 * 1024)
            cluster = cluster_of(orders.endpoint(), tls=None)
            client = world.begin(permit(cluster, b"POST", body_length=size), (piece for _ in range(size // len(piece))))
            most = held = 0
            while not client.ended:
                most = max(most, client.sent - got[0])
                pool = world.forwarder._pools[cluster.name]
                wires = [connection.wire for place in pool.places.values() for lane in place.lanes.values() for connection in lane.opened]
                held = max([held, *(wire.backlog for wire in wires)])
                await asyncio.sleep(0.002)
            assert client.status == 200
            assert client.asked.count(False) > 10
            # What is on the way is what the kernel's buffers of both ends hold (up to 4 and 6 MiB), and not much of ours.
            assert most < 24 << 20
            assert 0 < held <= (32 + 64) * 1024

        run(conversation)
        gc.collect()


def test_a_download_waits_for_a_slow_client() -> None:
    size = 32 << 20
    sent = [0]

    def handler(connection: Connection) -> None:
        connection.head()
        connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % size)
        piece = bytes(64 * 1024)
        for _ in range(size // len(piece)):
            connection.sock.sendall(piece)
            sent[0] += len(piece)
        connection.head()

    with upstream(handler) as orders:

        async def conversation(world: World) -> None:
            cluster = cluster_of(orders.endpoint())
            client = world.begin(permit(cluster), takes=False)
            client.keep_body = False
            await world.until(lambda: client.received > 0)
            taken = client.received
            await asyncio.sleep(0.2)
            assert client.received == taken  # told once to stop, it stopped
            assert sent[0] < size
            client.takes = True
            client.forwarding.answer_wanted()
            await world.until(lambda: client.ended)
            assert client.received == size
            assert (await world.until(lambda: world.endpoint_state(cluster)["idle"] == 1)) is None

        run(conversation)


def test_many_at_once() -> None:
    with upstream(echoes) as a, upstream(echoes) as b:

        async def conversation(world: World) -> None:
            cluster = cluster_of(a.endpoint(), b.endpoint(), balancer="least_request", max_connections=8)
            clients = [
                world.begin(
                    permit(cluster, b"POST", target=b"/%d" % at, body_length=5, headers=[(b"content-length", b"5")]), [b"%05d" % at]
                )
                for at in range(300)
            ]
            most = 0

            def all_ended() -> bool:
                nonlocal most
                most = max(most, world.forwarder.state()["connections"])
                return all(client.ended for client in clients)

            await world.until(all_ended)
            for at, client in enumerate(clients):
                assert client.status == 200
                assert client.body.startswith(b"POST /%d " % at)
                assert client.body.endswith(b"\n\n%05d" % at)
            assert most == 8
            assert world.endpoint_state(cluster)["active"] == 0

        run(conversation)
