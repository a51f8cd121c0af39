"""Forwarding over real connections with mTLS: answers and requests."""

from __future__ import annotations

import pytest
from upstream_world import (
    ORDERS,
    UNKNOWN,
    Connection,
    World,
    cluster_of,
    echoes,
    ok,
    permit,
    run,
    serves,
    upstream,
)

from gateway.limits import Limits
from mesh.filters import HeaderChange, RetryPolicy
from mesh.model import Backend, Endpoint
from mesh.refusals import ConnectFailed, UpstreamReset

NEVER = RetryPolicy(attempts=0)


# Answers


def test_a_plain_exchange() -> None:
    with upstream(serves(ok())) as orders:

        async def conversation(world: World) -> None:
            cluster = cluster_of(orders.endpoint())
            client = await world.ask(permit(cluster))
            outcome = client.outcome
            assert (client.status, client.body, client.trailers) == (200, b"fine", None)
            assert client.headers == [(b"content-length", b"4")]
            assert (outcome.cluster, outcome.endpoint) == ("shop/orders:443", f"127.0.0.1:{orders.port}")
            assert (outcome.upstream_principal, outcome.attempts, outcome.response_version) == (ORDERS, 1, "HTTP/1.1")
            assert outcome.upstream_duration > 0
            assert outcome.details == "via_upstream"
            assert world.endpoint_state(cluster)["idle"] == 1
            for _ in range(5):
                assert (await world.ask(permit(cluster))).status == 200
            assert orders.accepted == 1

        run(conversation)


@pytest.mark.parametrize(
    ("method", "answer", "status", "body", "trailers"),
    [
        (b"GET", b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n", 200, b"abcde", None),
        (b"GET", b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n0\r\nx-sum: 1\r\n\r\n", 200, b"a", [(b"x-sum", b"1")]),
        (b"GET", b"HTTP/1.1 204 No Content\r\n\r\n", 204, b"", None),
        (b"GET", b"HTTP/1.1 304 Not Modified\r\ncontent-length: 77\r\n\r\n", 304, b"", None),
        (b"HEAD", b"HTTP/1.1 200 OK\r\ncontent-length: 77\r\n\r\n", 200, b"", None),
        (b"GET", b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n", 200, b"", None),
    ],
)
def test_framings_that_leave_the_connection_usable(
    method: bytes, answer: bytes, status: int, body: bytes, trailers: list[tuple[bytes, bytes]] | None
) -> None:
    with upstream(serves(answer)) as orders:

        async def conversation(world: World) -> None:
            for _ in range(3):
                client = await world.ask(permit(cluster_of(orders.endpoint()), method))
                assert (client.status, client.body, client.trailers or None) == (status, body, trailers)
            assert orders.accepted == 1

        run(conversation)


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\n\r\nall of it",
        b"HTTP/1.0 200 OK\r\n\r\nall of it",
        b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 9\r\n\r\nall of it",
    ],
)
def test_an_answer_after_which_the_connection_ends(answer: bytes) -> None:
    with upstream(serves(answer, close=True)) as orders:

        async def conversation(world: World) -> None:
            cluster = cluster_of(orders.endpoint())
            for _ in range(2):
                client = await world.ask(permit(cluster))
                assert (client.status, client.body, client.refusal) == (200, b"all of it", None)
            assert orders.accepted == 2
            await world.until(lambda: world.endpoint_state(cluster)["connections"] == 0)

        run(conversation)


def test_an_answer_until_close_that_is_cut_off_is_not_complete() -> None:
    def handler(connection: Connection) -> None:
        connection.head()
        connection.send(b"HTTP/1.1 200 OK\r\n\r\nhalf")
        connection.cut()

    with upstream(handler) as orders:

        async def conversation(world: World) -> None:
            client = await world.ask(permit(cluster_of(orders.endpoint())))
            assert client.status == 200
            assert isinstance(client.refusal, UpstreamReset)

        run(conversation)


def test_informational_answers_are_passed_on() -> None:
    answer = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: </a.css>\r\n\r\n" + ok()
    with upstream(serves(answer)) as orders:

        async def conversation(world: World) -> None:
            client = await world.ask(permit(cluster_of(orders.endpoint())))
            assert client.infos == [(103, [(b"link", b"</a.css>")])]
            assert client.status == 200

        run(conversation)


def test_the_changes_of_an_answers_headers_in_order() -> None:
    answer = b"HTTP/1.1 200 OK\r\nx-a: 1\r\nx-b: 1\r\nx-c: 1\r\ncontent-length: 0\r\n\r\n"
    with upstream(serves(answer)) as orders:

        async def conversation(world: World) -> None:
            rule = HeaderChange(set=((b"x-a", b"rule"),), add=((b"x-b", b"rule"),), remove=(b"x-c",))
            backend = Backend(weight=1, response_headers=HeaderChange(set=((b"x-a", b"backend"),)))
            permitted = permit(
                cluster_of(orders.endpoint()), rule_headers=rule, backend=backend, response_headers=((b"ratelimit", b"quota"),)
            )
            client = await world.ask(permitted)
            assert client.headers == [
                (b"x-b", b"1"),
                (b"content-length", b"0"),
                (b"x-b", b"rule"),
                (b"x-a", b"backend"),
                (b"ratelimit", b"quota"),
            ]

        run(conversation)


# Requests


def test_what_the_upstream_gets() -> None:
    with upstream(echoes) as orders:

        async def conversation(world: World) -> None:
            client = await world.ask(permit(cluster_of(orders.endpoint()), target=b"/new?x=1", headers=[(b"x-id", b"7")]))
            assert client.body == b"GET /new?x=1 HTTP/1.1\r\nhost: orders.shop\r\nx-id: 7\n\n"

        run(conversation)


FORGED = [
    (b"x-forwarded-client-cert", b"URI=spiffe://shop.example/ns/shop/sa/orders"),
    (b"x-forwarded-for", b"10.0.0.1"),
    (b"x-real-ip", b"10.0.0.1"),
    (b"x-request-id", b"mine"),
    (b"x-envoy-peer", b"mine"),
    (b"traceparent", b"00-1"),
    (b"x-user", b"mallory"),
    (b"x_forwarded_client_cert", b"URI=spiffe://shop.example/ns/shop/sa/orders"),
]
"""What a server that takes trailers for headers would believe."""


@pytest.mark.parametrize(
    ("length", "pieces", "trailers", "arrives"),
    [
        (6, [b"abc", b"def"], None, b"abcdef"),
        (UNKNOWN, [b"abc", b"de"], None, b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"),
        (UNKNOWN, [b"abc"], [(b"x-sum", b"3")], b"3\r\nabc\r\n0\r\nx-sum: 3\r\n\r\n"),
        (UNKNOWN, [b"abc"], [*FORGED, (b"x-sum", b"3")], b"3\r\nabc\r\n0\r\nx-sum: 3\r\n\r\n"),
    ],
)
def test_bodies(length: int, pieces: list[bytes], trailers: list[tuple[bytes, bytes]] | None, arrives: bytes) -> None:
    headers = [(b"content-length", b"6")] if length == 6 else []
    if trailers:
        headers = [(b"x-trailers", b"yes")]
    with upstream(echoes) as orders:

        async def conversation(world: World) -> None:
            cluster = cluster_of(orders.endpoint())
            for _ in range(2):
                made = permit(cluster, b"POST", headers=headers, body_length=length)
                made.plan.asking.head.reserved = frozenset((b"x-user",))
                client = await world.ask(made, pieces, trailers)
                assert client.body.partition(b"\n\n")[2] == arrives
                assert client.asked == [True]
            assert orders.accepted == 1

        run(conversation)


def test_plaintext_and_a_name() -> None:
    with upstream(serves(ok()), spiffe_id=None) as orders:

        async def conversation(world: World) -> None:
            named = Endpoint(address="localhost", port=orders.port)
            client = await world.ask(permit(cluster_of(named, tls=None)))
            assert client.status == 200
            assert client.outcome.upstream_principal == ""
            assert client.outcome.endpoint == f"localhost:{orders.port}"

        run(conversation)


def test_a_name_that_is_not_there() -> None:
    async def conversation(world: World) -> None:
        client = await world.ask(permit(cluster_of(Endpoint(address="nobody.invalid", port=1), tls=None), retry=NEVER))
        assert isinstance(client.refusal, ConnectFailed)

    run(conversation, Limits(resolve_timeout=3))
