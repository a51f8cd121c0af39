"""What the answers of authorization services mean, and what becomes of questions that are not answered."""

from __future__ import annotations

import asyncio
import struct
from typing import Any

import pytest
from envoy.service.auth.v3.external_auth_pb2 import CheckResponse
from gateway_world import a_head, a_rule, pending_of, place_of
from hypothesis import given
from hypothesis import strategies as st
from upstream_world import Connection, Handler, World, cluster_of, ok, run, serves, snapshot_of, upstream

from gateway.external_auth import ServiceAsker, grpc_decision, http_decision
from mesh.filters import ExternalAuth
from mesh.http import Header
from mesh.model import Cluster, DecisionPolicy
from mesh.questions import Asking, Decision, DecisionQuestion, Verdict

ALLOW, DENY, ERROR = Verdict.ALLOW, Verdict.DENY, Verdict.ERROR
OK: list[Header] = [(b"content-type", b"application/grpc"), (b"grpc-status", b"0")]
HTTP = ExternalAuth(cluster="shop/orders:443", protocol="HTTP", path=b"/check")
NAMED = ExternalAuth(cluster="shop/orders:443", protocol="HTTP", copied=frozenset((b"x-user",)))


def message(response: CheckResponse) -> bytes:
    data = response.SerializeToString()
    return struct.pack(">BI", 0, len(data)) + data


def a_denial(status: int = 401) -> CheckResponse:
    response = CheckResponse()
    response.status.code = 7
    response.denied_response.status.code = status
    return response


@pytest.mark.parametrize(
    ("status", "fields", "body", "verdict"),
    [
        (200, OK, message(CheckResponse()), ALLOW),
        (200, OK, message(a_denial()), DENY),
        (200, [], message(CheckResponse()), ERROR),
        (200, [(b"grpc-status", b"7")], message(CheckResponse()), ERROR),
        (200, [(b"grpc-status", b"12"), (b"grpc-message", b"no such method")], b"", ERROR),
        (404, OK, message(CheckResponse()), ERROR),
        (200, OK, b"", ERROR),
        (200, OK, message(CheckResponse()) + b"x", ERROR),
        (200, OK, b"\1" + message(CheckResponse())[1:], ERROR),
        (200, OK, message(a_denial()) + message(CheckResponse()), ERROR),
        (200, OK, struct.pack(">BI", 0, 3) + b"\xff\xff\xff", ERROR),
    ],
)
def test_answers_of_grpc(status: int, fields: list[Header], body: bytes, verdict: Verdict) -> None:
    assert grpc_decision(status, fields, body).verdict is verdict


@given(st.integers(100, 599), st.binary(max_size=40))
def test_noise_never_lets_anybody_pass(status: int, body: bytes) -> None:
    decision = grpc_decision(status, OK, b"\x01" + body)
    assert decision.verdict is ERROR
    assert http_decision(HTTP, status if status != 200 else 201, [], body).verdict is not ALLOW


ABOUT: list[Header] = [(b"content-type", b"text/plain"), (b"content-length", b"0"), (b"date", b"x"), (b"server", b"x"), (b"host", b"evil")]


@pytest.mark.parametrize(
    ("auth", "headers", "passed"),
    [
        (HTTP, [*ABOUT, (b"x-user", b"ann"), (b"x-more", b"1")], ((b"x-user", b"ann"), (b"x-more", b"1"))),
        (NAMED, [*ABOUT, (b"x-user", b"ann"), (b"x-more", b"1")], ((b"x-user", b"ann"),)),
        (HTTP, [], ()),
    ],
)
def test_what_goes_on_with_the_request(auth: ExternalAuth, headers: list[Header], passed: tuple[Header, ...]) -> None:
    decision = http_decision(auth, 200, headers, b"")
    assert (decision.verdict, decision.headers) == (ALLOW, passed)


@pytest.mark.parametrize("status", [201, 204, 302, 401, 403, 404, 429])
def test_what_is_not_200_is_a_denial(status: int) -> None:
    decision = http_decision(HTTP, status, [(b"www-authenticate", b"Basic"), (b"content-length", b"2")], b"no")
    assert (decision.verdict, decision.status, decision.body) == (DENY, status, b"no")
    assert decision.headers == ((b"www-authenticate", b"Basic"),)


@pytest.mark.parametrize("status", [500, 502, 503, 599])
def test_a_service_that_fails_has_not_denied(status: int) -> None:
    assert http_decision(HTTP, status, [], b"").verdict is ERROR


# Over connections


def asked(auth: ExternalAuth, timeout: float = 5.0, body: bytes | None = None, **head: Any) -> DecisionQuestion:
    pending = pending_of(place_of(a_rule()), a_head(**head))
    asking: Asking = pending.asking
    asking.body = body
    policy = DecisionPolicy(name="shop/r externalAuth", level="rule", provider=auth.cluster, auth=auth, timeout=timeout, body_limit=100)
    return DecisionQuestion(policy, asking, None)


async def answer_to(world: World, question: DecisionQuestion, cluster: Cluster) -> Decision:
    world.forwarder.apply(snapshot_of(cluster))
    found: asyncio.Future[Decision] = asyncio.get_running_loop().create_future()
    ServiceAsker(world.forwarder).ask(question, found.set_result)
    return await asyncio.wait_for(found, 10)


def test_the_service_gets_the_request_again() -> None:
    heads: list[bytes] = []

    def handler(connection: Connection) -> None:
        while head := connection.head():
            heads.append(head)
            connection.send(ok())

    with upstream(handler) as service:

        async def conversation(world: World) -> None:
            question = asked(HTTP, target=b"/orders/1?a=b", headers=[(b"authorization", b"Basic x"), (b"cookie", b"secret")])
            assert (await answer_to(world, question, cluster_of(service.endpoint()))).verdict is ALLOW

        run(conversation)
    lines = heads[0].split(b"\r\n")
    assert lines[0] == b"GET /check/orders/1?a=b HTTP/1.1"
    assert sorted(line.lower() for line in lines[1:]) == [b"authorization: basic x", b"content-length: 0", b"host: shop.example"]


def silent(connection: Connection) -> None:
    connection.head()
    connection.recv()


def garbage(connection: Connection) -> None:
    connection.head()
    connection.send(b"no HTTP\r\n\r\n")
    connection.cut()


def half(connection: Connection) -> None:
    connection.head()
    connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nhalf")
    connection.cut()


@pytest.mark.parametrize(
    ("handler", "timeout", "cause"),
    [
        (silent, 0.1, "timeout"),
        (garbage, 5.0, "unavailable"),
        (half, 5.0, "unavailable"),
        (serves(ok(b"x" * (2 << 20))), 5.0, "provider"),
    ],
)
def test_a_service_that_does_not_answer_lets_nobody_pass(handler: Handler, timeout: float, cause: str) -> None:
    with upstream(handler) as service:

        async def conversation(world: World) -> None:
            decision = await answer_to(world, asked(HTTP, timeout), cluster_of(service.endpoint()))
            assert (decision.verdict, decision.cause) == (ERROR, cause)

        run(conversation)


def test_a_service_that_is_not_there() -> None:
    async def conversation(world: World) -> None:
        for auth in (HTTP, ExternalAuth(cluster="shop/orders:443", protocol="GRPC")):
            decision = await answer_to(world, asked(auth, body=b"x"), cluster_of())
            assert (decision.verdict, decision.cause) == (ERROR, "unavailable")
        gone = await answer_to(world, asked(HTTP), cluster_of(name="shop/another:1"))
        assert (gone.verdict, gone.cause) == (ERROR, "unavailable")

    run(conversation)


def test_providers_of_istio_say_which_fields_go_where() -> None:
    auth = ExternalAuth(
        cluster="shop/authz:80",
        protocol="HTTP",
        copies_all=False,
        copied=frozenset((b"x-user",)),
        told=frozenset((b"x-for-client",)),
        told_denied=frozenset((b"location",)),
    )
    fields = [(b"x-user", b"ann"), (b"x-other", b"1"), (b"x-for-client", b"2"), (b"location", b"/login"), (b"content-length", b"0")]
    allowed = http_decision(auth, 200, fields, b"")
    assert allowed.headers == ((b"x-user", b"ann"),)
    assert allowed.response_headers == ((b"x-for-client", b"2"),)
    assert http_decision(auth, 302, fields, b"").headers == ((b"location", b"/login"),)
    bare = ExternalAuth(cluster="shop/authz:80", protocol="HTTP", copies_all=False)
    assert http_decision(bare, 200, fields, b"").headers == ()
    assert (b"x-other", b"1") in http_decision(bare, 401, fields, b"").headers
