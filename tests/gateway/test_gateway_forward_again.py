"""Trying again, ejections and bounds, over real connections with mTLS."""

from __future__ import annotations

import threading

import pytest
from upstream_world import (
    ORDERS,
    OTHER,
    Connection,
    World,
    cluster_of,
    echoes,
    ok,
    permit,
    run,
    serves,
    slow,
    snapshot_of,
    unused_port,
    upstream,
)

from gateway.limits import Limits
from mesh.filters import RetryPolicy
from mesh.model import Endpoint, OutlierDetection
from mesh.refusals import ConnectFailed, NoEndpoint, Overflow, UpstreamReset

NEVER = RetryPolicy(attempts=0)


def test_the_second_endpoint_answers() -> None:
    with upstream(echoes) as orders:

        async def conversation(world: World) -> None:
            dead = Endpoint(address="127.0.0.1", port=unused_port(), identities=(ORDERS,))
            cluster = cluster_of(dead, orders.endpoint())
            clients = [
                await world.ask(permit(cluster, b"POST", body_length=3, headers=[(b"content-length", b"3")]), [b"abc"]) for _ in range(2)
            ]
            assert [client.status for client in clients] == [200, 200]
            assert sorted(client.outcome.attempts for client in clients) == [1, 2]
            assert {client.outcome.endpoint for client in clients} == {f"127.0.0.1:{orders.port}"}

        run(conversation)


def test_an_impostor_is_gone_around() -> None:
    with upstream(serves(ok()), spiffe_id=OTHER) as impostor, upstream(serves(ok())) as orders:

        async def conversation(world: World) -> None:
            cluster = cluster_of(impostor.endpoint(), orders.endpoint())
            for _ in range(4):
                client = await world.ask(permit(cluster))
                assert client.status == 200
                assert client.outcome.endpoint == f"127.0.0.1:{orders.port}"
                assert client.outcome.upstream_principal == ORDERS

        run(conversation)


def test_nowhere_to_go() -> None:
    async def conversation(world: World) -> None:
        dead = [Endpoint(address="127.0.0.1", port=unused_port(), identities=(ORDERS,)) for _ in range(2)]
        client = await world.ask(permit(cluster_of(*dead), retry=RetryPolicy(attempts=3, backoff=0.001)))
        assert isinstance(client.refusal, ConnectFailed)
        assert client.outcome.attempts == 4
        empty = await world.ask(permit(cluster_of(name="shop/none:1")))
        assert isinstance(empty.refusal, NoEndpoint)
        assert empty.outcome.attempts == 0

    run(conversation)


def second_request_is_not_answered(connection: Connection) -> None:
    connection.head()
    connection.send(ok())
    connection.head()
    connection.end()


@pytest.mark.parametrize(("method", "answered"), [(b"GET", True), (b"PUT", True), (b"POST", False)])
def test_a_kept_connection_that_ends_when_it_is_used(method: bytes, answered: bool) -> None:
    with upstream(second_request_is_not_answered) as orders:

        async def conversation(world: World) -> None:
            cluster = cluster_of(orders.endpoint())
            assert (await world.ask(permit(cluster))).status == 200
            client = await world.ask(permit(cluster, method))
            if answered:
                assert client.status == 200
                assert client.outcome.attempts == 2
                assert orders.accepted == 2
            else:
                assert isinstance(client.refusal, UpstreamReset)
            assert world.endpoint_state(cluster)["errors"] == 0  # an old connection that ended says nothing about the endpoint

        run(conversation)


def test_a_body_that_has_been_taken_is_not_sent_again() -> None:
    with upstream(second_request_is_not_answered) as orders:

        async def conversation(world: World) -> None:
            cluster = cluster_of(orders.endpoint())
            assert (await world.ask(permit(cluster))).status == 200
            client = await world.ask(permit(cluster, b"PUT", body_length=3), [b"abc"])
            assert isinstance(client.refusal, UpstreamReset)
            assert client.outcome.attempts == 1

        run(conversation)


def test_statuses_that_the_route_wants_retried() -> None:
    with upstream(serves(b"HTTP/1.1 503 Busy\r\ncontent-length: 4\r\n\r\nbusy")) as busy, upstream(serves(ok())) as orders:

        async def conversation(world: World) -> None:
            cluster = cluster_of(busy.endpoint(), orders.endpoint())
            retry = RetryPolicy(attempts=1, statuses=(503,), backoff=0.001)
            assert [(await world.ask(permit(cluster, retry=retry))).status for _ in range(3)] == [200] * 3
            last = await world.ask(permit(cluster_of(busy.endpoint(), name="shop/busy:1"), retry=retry))
            assert (last.status, last.body, last.outcome.attempts) == (503, b"busy", 2)

        run(conversation)


# Ejection


def test_an_endpoint_is_ejected_and_comes_back() -> None:
    healthy = threading.Event()

    def handler(connection: Connection) -> None:
        while connection.head():
            connection.send(ok(b"back") if healthy.is_set() else b"HTTP/1.1 500 Oops\r\ncontent-length: 0\r\n\r\n")

    with upstream(handler) as sick, upstream(serves(ok(b"well"))) as well:

        async def conversation(world: World) -> None:
            cluster = cluster_of(
                sick.endpoint(), well.endpoint(), outlier=OutlierDetection(consecutive_5xx=3, base_ejection=0.5), balancer="round_robin"
            )
            world.forwarder.apply(snapshot_of(cluster))
            statuses = [(await world.ask(permit(cluster))).status for _ in range(6)]
            assert statuses.count(500) == 3
            assert world.endpoint_state(cluster)["ejected"] > 0
            assert [(await world.ask(permit(cluster))).body for _ in range(6)] == [b"well"] * 6
            world.forwarder.apply(snapshot_of(cluster_of(*cluster.endpoints, outlier=cluster.outlier)))  # equal: nothing is reset
            assert world.endpoint_state(cluster)["ejected"] > 0
            healthy.set()
            await world.until(lambda: world.endpoint_state(cluster)["ejected"] == 0)
            assert sorted([(await world.ask(permit(cluster))).body for _ in range(2)]) == [b"back", b"well"]

        run(conversation)


def test_when_all_are_ejected_all_are_used() -> None:
    with upstream(serves(b"HTTP/1.1 500 Oops\r\ncontent-length: 0\r\n\r\n")) as a, upstream(serves(ok())) as b:

        async def conversation(world: World) -> None:
            outlier = OutlierDetection(consecutive_5xx=1, max_ejection_percent=100)
            cluster = cluster_of(a.endpoint(), b.endpoint(weight=1), outlier=outlier)
            for _ in range(2):
                await world.ask(permit(cluster))
            b.handler = a.handler
            for connection in b.connections:
                connection.cut()
            await world.until(lambda: world.endpoint_state(cluster, 1)["connections"] == 0)
            assert (await world.ask(permit(cluster))).status == 500
            assert [world.endpoint_state(cluster, at)["ejected"] > 0 for at in (0, 1)] == [True, True]
            assert (await world.ask(permit(cluster))).status == 500

        run(conversation)


# Bounds


def test_connections_and_waiting_requests_are_bounded() -> None:
    with upstream(slow(0.1)) as orders:

        async def conversation(world: World) -> None:
            cluster = cluster_of(orders.endpoint(), max_connections=2, max_pending=3)
            clients = [world.begin(permit(cluster)) for _ in range(4)]
            assert sum(isinstance(client.refusal, Overflow) for client in clients) == 1
            await world.until(lambda: all(client.ended for client in clients))
            assert sum(client.status == 200 for client in clients) == 3
            assert orders.accepted == 2

        run(conversation)


def test_a_busy_endpoint_is_not_starved_by_an_idle_one() -> None:
    with upstream(serves(ok())) as a, upstream(serves(ok())) as b:

        async def conversation(world: World) -> None:
            cluster = cluster_of(a.endpoint(), b.endpoint(), max_connections=1)
            assert [(await world.ask(permit(cluster))).status for _ in range(4)] == [200] * 4
            assert (a.accepted, b.accepted) == (2, 2)

        run(conversation)


def test_idle_connections_end() -> None:
    with upstream(serves(ok())) as orders:

        async def conversation(world: World) -> None:
            cluster = cluster_of(orders.endpoint())
            await world.ask(permit(cluster))
            assert world.endpoint_state(cluster)["idle"] == 1
            await world.until(lambda: world.endpoint_state(cluster)["connections"] == 0)

        run(conversation, Limits(idle_upstream=0.2))


def test_a_connection_that_is_not_made_in_time() -> None:
    def deaf(connection: Connection) -> None:
        connection.recv()

    with upstream(deaf, spiffe_id=None) as orders:

        async def conversation(world: World) -> None:
            client = await world.ask(permit(cluster_of(orders.endpoint(), connect_timeout=0.2), retry=NEVER))
            assert isinstance(client.refusal, ConnectFailed)
            assert "0.2 s" in client.refusal.reason

        run(conversation)
