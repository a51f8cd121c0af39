"""Upstreams that misbehave, over real connections with mTLS, and what is counted."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time

import pytest
from upstream_world import (
    GATEWAY,
    MESH,
    ORDERS,
    OTHER,
    PATIENCE,
    Connection,
    Handler,
    World,
    authority,
    cluster_of,
    identity,
    ok,
    permit,
    run,
    serves,
    snapshot_of,
    unused_port,
    upstream,
)

from gateway.forward import UpstreamForwarder
from gateway.upstream_reports import UpstreamReports
from identity.ca import Authority
from identity.files import StaticIdentity
from identity.svid import Identity
from mesh.filters import RetryPolicy
from mesh.model import Endpoint, OutlierDetection
from mesh.refusals import ConnectFailed, UpstreamIdentity, UpstreamProtocol, UpstreamReset, UpstreamTimeout
from telemetry.record import Telemetry

NEVER = RetryPolicy(attempts=0)


def before_the_answer(connection: Connection) -> None:
    connection.head()
    connection.end()


def with_a_reset(connection: Connection) -> None:
    connection.head()
    connection.reset()


def in_the_head(connection: Connection) -> None:
    connection.head()
    connection.send(b"HTTP/1.1 200 OK\r\ncontent-le")
    connection.end()


@pytest.mark.parametrize("handler", [before_the_answer, with_a_reset, in_the_head])
def test_no_answer(handler: Handler) -> None:
    with upstream(handler) as orders:

        async def conversation(world: World) -> None:
            client = await world.ask(permit(cluster_of(orders.endpoint())))
            assert isinstance(client.refusal, UpstreamReset)
            assert client.status == 0
            assert client.outcome.attempts == 1  # a new connection that is reset may have been acted on

        run(conversation)


@pytest.mark.parametrize(
    "answer", [b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf", b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n9\r\nhalf"]
)
def test_half_an_answer_is_cut_off(answer: bytes) -> None:
    with upstream(serves(answer, close=True)) as orders:

        async def conversation(world: World) -> None:
            client = await world.ask(permit(cluster_of(orders.endpoint()), retry=RetryPolicy(statuses=(502,))))
            assert (client.status, client.body) == (200, b"half")
            assert isinstance(client.refusal, UpstreamReset)
            assert client.outcome.attempts == 1

        run(conversation)


@pytest.mark.parametrize(
    "answer",
    [
        b"garbage\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n",
        b"HTTP/1.1 101 Switching\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nx: " + b"y" * 70_000 + b"\r\n\r\n",
    ],
)
def test_what_is_not_http(answer: bytes) -> None:
    with upstream(serves(answer)) as orders:

        async def conversation(world: World) -> None:
            client = await world.ask(permit(cluster_of(orders.endpoint())))
            assert isinstance(client.refusal, UpstreamProtocol)
            assert client.outcome.attempts == 1

        run(conversation)


def test_an_answer_nobody_asked_for_ends_an_idle_connection() -> None:
    go = threading.Event()

    def handler(connection: Connection) -> None:
        connection.head()
        connection.send(ok(b"mine"))
        go.wait(PATIENCE)
        connection.send(ok(b"smuggled"))
        connection.head()

    with upstream(handler) as orders:

        async def conversation(world: World) -> None:
            cluster = cluster_of(orders.endpoint())
            assert (await world.ask(permit(cluster))).body == b"mine"
            assert world.endpoint_state(cluster)["idle"] == 1
            go.set()
            await world.until(lambda: world.endpoint_state(cluster)["connections"] == 0)
            assert (await world.ask(permit(cluster))).body == b"mine"

        run(conversation)


def test_the_wrong_identity_is_refused() -> None:
    with upstream(serves(ok()), spiffe_id=OTHER) as impostor:

        async def conversation(world: World) -> None:
            client = await world.ask(permit(cluster_of(impostor.endpoint()), retry=NEVER))
            assert isinstance(client.refusal, UpstreamIdentity)
            assert OTHER in client.refusal.reason

        run(conversation)
        assert all(connection.buffer == b"" for connection in impostor.connections)


def test_no_identity_to_expect_is_nobody() -> None:
    with upstream(serves(ok())) as orders:

        async def conversation(world: World) -> None:
            nobody = Endpoint(address="127.0.0.1", port=orders.port)
            assert isinstance((await world.ask(permit(cluster_of(nobody), retry=NEVER))).refusal, UpstreamIdentity)

        run(conversation)


def test_plaintext_where_tls_is_expected() -> None:
    def handler(connection: Connection) -> None:
        connection.recv()
        connection.send(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    with upstream(handler, spiffe_id=None) as orders:

        async def conversation(world: World) -> None:
            client = await world.ask(permit(cluster_of(orders.endpoint()), retry=NEVER))
            assert isinstance(client.refusal, UpstreamIdentity)
            assert "not_tls" in client.refusal.reason

        run(conversation)


def test_our_own_certificate_expired() -> None:
    old = StaticIdentity(authority().issue(GATEWAY, lifetime=60, now=time.time() - 30))
    with upstream(serves(ok())) as orders:

        async def conversation(world: World) -> None:
            cluster = cluster_of(orders.endpoint())
            assert (await world.ask(permit(cluster))).status == 200
            old.replace(authority().issue(GATEWAY, lifetime=61, now=time.time() - 60))
            await world.until(lambda: time.time() > old.current.not_after)
            client = await world.ask(permit(cluster, retry=NEVER))
            assert isinstance(client.refusal, ConnectFailed)
            assert "expired" in client.refusal.reason
            assert world.endpoint_state(cluster)["errors"] == 0  # not the endpoint's fault

        run(conversation, source=old)


def test_a_backend_that_is_too_slow() -> None:
    def handler(connection: Connection) -> None:
        connection.head()
        connection.recv()

    with upstream(handler) as orders:

        async def conversation(world: World) -> None:
            cluster = cluster_of(orders.endpoint())
            client = await world.ask(permit(cluster, backend_timeout=0.2))
            assert isinstance(client.refusal, UpstreamTimeout)
            assert world.endpoint_state(cluster)["connections"] == 0
            retried = await world.ask(permit(cluster, backend_timeout=0.1, retry=RetryPolicy(attempts=1, statuses=(504,), backoff=0.01)))
            assert isinstance(retried.refusal, UpstreamTimeout)
            assert retried.outcome.attempts == 2

        run(conversation)


def test_an_early_answer_is_passed_on_and_the_body_stops() -> None:
    def handler(connection: Connection) -> None:
        connection.head()
        connection.send(b"HTTP/1.1 413 Too Large\r\ncontent-length: 3\r\n\r\nno!")
        connection.recv()

    with upstream(handler) as orders:

        async def conversation(world: World) -> None:
            cluster = cluster_of(orders.endpoint())
            client = await world.ask(permit(cluster, b"POST", body_length=1 << 40), itertools.repeat(b"x" * 16384))
            assert (client.status, client.body, client.refusal) == (413, b"no!", None)
            sent = client.sent
            await asyncio.sleep(0.05)
            assert client.sent == sent
            await world.until(lambda: world.endpoint_state(cluster)["connections"] == 0)

        run(conversation)


@pytest.mark.parametrize("tls", [True, False])
def test_an_early_answer_of_an_upstream_that_closes_at_once_is_not_lost(tls: bool) -> None:
    def handler(connection: Connection) -> None:
        connection.head()
        connection.send(b"HTTP/1.1 413 Too Large\r\nconnection: close\r\ncontent-length: 3\r\n\r\nno!")
        connection.cut()  # with what was not read of the body: the kernel sends a reset

    with upstream(handler, spiffe_id=ORDERS if tls else None) as orders:

        async def conversation(world: World) -> None:
            cluster = cluster_of(orders.endpoint(), tls=MESH if tls else None)
            for _ in range(20):
                client = await world.ask(permit(cluster, b"POST", body_length=1 << 40), itertools.repeat(b"x" * 16384))
                assert (client.status, client.body, client.refusal) == (413, b"no!", None)

        run(conversation)


def test_an_upstream_that_refuses_our_certificate() -> None:
    stranger = StaticIdentity(Authority.create("shop.example").trusting(authority().bundle).issue(GATEWAY))
    source = StaticIdentity(
        Identity(
            spiffe_id=stranger.current.spiffe_id,
            chain=stranger.current.chain,
            key=stranger.current.key,
            bundle=authority().bundle,
            not_before=stranger.current.not_before,
            not_after=stranger.current.not_after,
        )
    )
    with upstream(serves(ok())) as orders:

        async def conversation(world: World) -> None:
            cluster = cluster_of(orders.endpoint())
            client = await world.ask(permit(cluster, b"POST", retry=RetryPolicy(attempts=1, backoff=0.001)))
            assert isinstance(client.refusal, UpstreamIdentity), client.refusal
            assert client.outcome.attempts == 2  # nobody has seen the request
            assert world.endpoint_state(cluster)["errors"] == 2

        run(conversation, source=source)


def test_what_is_counted() -> None:
    telemetry = Telemetry()
    with upstream(serves(b"HTTP/1.1 500 Oops\r\ncontent-length: 0\r\n\r\n")) as orders:

        async def conversation(world: World) -> None:
            forwarder = UpstreamForwarder(world.loop, identity=identity(GATEWAY))
            UpstreamReports(telemetry).sides["edge/ingress"] = forwarder
            world.forwarder, before = forwarder, world.forwarder
            dead = Endpoint(address="127.0.0.1", port=unused_port(), identities=(ORDERS,))
            cluster = cluster_of(orders.endpoint(), dead, outlier=OutlierDetection(consecutive_5xx=1))
            forwarder.apply(snapshot_of(cluster))
            for _ in range(2):
                await world.ask(permit(cluster))
            page = telemetry.page().decode()
            name = 'gateway="edge/ingress",cluster="shop/orders:443"'
            assert f'tollhouse_upstream_connects_total{{{name},result="ok"}} 1' in page
            assert f"tollhouse_upstream_ejected{{{name}}} 1" in page
            assert f"tollhouse_upstream_ejections_total{{{name}," in page
            assert f"tollhouse_upstream_connections{{{name}}} 1" in page
            forwarder.apply(snapshot_of())
            assert name not in telemetry.page().decode()
            await before.close(0)

        run(conversation)
