"""Forwarding over real connections with mTLS: answers, requests, and upstreams that misbehave."""

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
    UNKNOWN,
    Connection,
    Handler,
    World,
    authority,
    cluster_of,
    echoes,
    ok,
    permit,
    run,
    serves,
    upstream,
)

from gateway.limits import Limits
from identity.files import StaticIdentity
from mesh.model import Backend, Endpoint, HeaderChange, RetryPolicy
from mesh.refusals import ConnectFailed, UpstreamIdentity, UpstreamProtocol, UpstreamReset, UpstreamTimeout

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


@pytest.mark.parametrize(
    ("length", "pieces", "trailers", "arrives"),
    [
        (6, [b"abc", b"def"], None, b"abcdef"),
        (UNKNOWN, [b"abc", b"de"], None, b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"),
        (UNKNOWN, [b"abc"], [(b"x-sum", b"3")], b"3\r\nabc\r\n0\r\nx-sum: 3\r\n\r\n"),
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
                client = await world.ask(permit(cluster, b"POST", headers=headers, body_length=length), pieces, trailers)
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


# Upstreams that misbehave


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
