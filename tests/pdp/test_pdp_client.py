"""Our client and our service over real gRPC and real workers: answers, revisions, replicas that fail, freeze or lag, and other servers."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from engine_world import pool, until
from envoy.service.auth.v3.external_auth_pb2 import CheckRequest, CheckResponse
from grpc import aio
from grpc_world import answer, foreign, question, service, shop
from grpc_world import client as client_of

from gateway.grpc_channel import GrpcChannels
from identity.ca import Authority
from identity.files import StaticIdentity
from identity.svid import Identity
from mesh.questions import Verdict
from pdp.client import PdpClient, Providers
from pdp.point import DecisionPoint
from pdp.rpc import CAUSE, DECISION, SERVICE
from pdp.service import PolicyService, server_credentials
from telemetry.record import Telemetry
from tests.servers import free_port

ALLOW, DENY, ERROR = Verdict.ALLOW, Verdict.DENY, Verdict.ERROR


@pytest.mark.parametrize(
    ("decision", "principal", "verdict", "expected"),
    [
        ("decision", "web", ALLOW, {"headers": ((b"x-caller", b"web"),), "rule": "web", "revision": "sha256:shop"}),
        ("decision", "nobody", DENY, {"status": 401, "reason": "not you", "body": b"no"}),
        ("decision", "other", DENY, {"status": 0}),
        ("decision", "", ERROR, {"cause": "undefined"}),
        ("word", "web", ERROR, {"cause": "answer"}),
        ("nothing", "web", ERROR, {"cause": "undefined"}),
        ("memory", "web", ERROR, {"cause": "crashed"}),
        ("unheard_of", "web", ERROR, {"cause": "input"}),
        ("query", "web", ALLOW, {"query_set": (("a", "1"),)}),
    ],
)
def test_an_answer_is_the_same_as_without_the_wire(decision: str, principal: str, verdict: Verdict, expected: dict[str, Any]) -> None:
    async def run() -> None:
        async with service(shop()) as (_, target):
            client = client_of(target)
            got = await answer(client, question(decision, principal))
            assert got.verdict is verdict, got
            assert {key: getattr(got, key) for key in expected} == expected
            assert client.pending == 0
            await client.close()

    asyncio.run(run())


def test_many_questions_at_once() -> None:
    async def run() -> None:
        telemetry = Telemetry()
        async with service(shop(), telemetry=telemetry) as (made, target):
            client = client_of(target)
            got = await asyncio.gather(*(answer(client, question(principal=("web", "nobody")[n % 2])) for n in range(400)))
            assert [each.verdict for each in got] == [ALLOW, DENY] * 200
            assert made.point.pending == 0
            assert b'tollhouse_pdp_checks_total{verdict="allow",cause=""} 200' in telemetry.page()
            await client.close()

    asyncio.run(run())


def test_a_question_names_its_revision_and_gets_no_other_s_answer() -> None:
    new = shop("package shop.authz\n\ndecision := false\n", "sha256:new")
    unknown = shop(digest="sha256:unknown")

    async def run() -> None:
        async with service(new, shop()) as (_, both), service(shop()) as (_, old):
            client = client_of(both)
            assert (await answer(client, question(revision=new))).verdict is DENY
            assert (await answer(client, question(revision=shop()))).verdict is ALLOW
            lost = await answer(client, question(revision=unknown, timeout=0.1))
            assert (lost.verdict, lost.cause) == (ERROR, "unavailable")
            assert "sha256:unknown is not held" in lost.reason
            await client.close()
            lagging = client_of(old, both)
            for _ in range(6):
                assert (await answer(lagging, question(revision=new))).verdict is DENY
            assert all(replica.well for replica in lagging.state())
            await lagging.close()

    asyncio.run(run())


def test_a_revision_that_comes_in_time_is_waited_for() -> None:
    new = shop("package shop.authz\n\ndecision := false\n", "sha256:new")

    async def run() -> None:
        held = [shop()]
        async with pool() as engine:
            made = PolicyService(DecisionPoint(engine, active=lambda: held[0]))
            client = client_of(f"127.0.0.1:{await made.start('127.0.0.1:0')}")
            waiting = answer(client, question(revision=new))
            await asyncio.sleep(0.1)
            assert not waiting.done()
            held[0] = new
            assert (await waiting).verdict is DENY
            await client.close()
            await made.stop(0)

    asyncio.run(run())


def test_an_answer_for_another_revision_is_thrown_away() -> None:
    async def check(_: CheckRequest, __: object) -> CheckResponse:
        response = CheckResponse(ok_response={})
        response.dynamic_metadata.update({"tollhouse.dev": {"revision": "sha256:other"}})
        return response

    async def run() -> None:
        async with foreign(check) as target:
            client = client_of(target)
            got = await answer(client, question(timeout=0.2))
            assert (got.verdict, got.cause) == (ERROR, "unavailable")
            assert "sha256:other" in got.reason
            await client.close()

    asyncio.run(run())


def test_another_replica_takes_over_at_once() -> None:
    dead = f"127.0.0.1:{free_port()}"

    async def run() -> None:
        async with service(shop()) as (_, target):
            client = client_of(dead, target)
            started = time.monotonic()
            got = await asyncio.gather(*(answer(client, question(timeout=3.0)) for _ in range(20)))
            assert {each.verdict for each in got} == {ALLOW}
            assert time.monotonic() - started < 1.5
            await until("the breaker", lambda: not client.state()[0].well or client.state()[0].opened)
            await client.close()
        client = client_of(dead, failures=2)
        for _ in range(2):
            got_none = await answer(client, question(timeout=0.5))
            assert (got_none.verdict, got_none.cause) == (ERROR, "unavailable")
        assert not client.state()[0].well
        assert "have failed just now" in (await answer(client, question(timeout=0.5))).reason
        await client.close()

    asyncio.run(run())


REPLICA = """
import asyncio, sys
sys.path[:0] = [{tests!r}]
from grpc_world import service, shop
async def run():
    async with service(shop()) as (_, target):
        print(target, flush=True)
        await asyncio.Event().wait()
asyncio.run(run())
"""


@contextmanager
def replica() -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A decision point in a process of its own."""
    script = REPLICA.format(tests=str(Path(__file__).parent))
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process, process.stdout.readline().strip()
        finally:
            process.send_signal(signal.SIGCONT)
            process.kill()


def test_a_frozen_replica_is_given_company_and_then_left_alone() -> None:
    async def run() -> None:
        with replica() as (frozen, one), replica() as (_, two):
            client = client_of(one, two)
            for _ in range(4):
                assert (await answer(client, question())).verdict is ALLOW
            frozen.send_signal(signal.SIGSTOP)
            got = [await answer(client, question(timeout=0.6)) for _ in range(10)]
            assert {each.verdict for each in got} == {ALLOW}
            assert client.state()[0].opened >= 1
            frozen.send_signal(signal.SIGCONT)

            async def well() -> bool:
                await answer(client, question())
                return client.state()[0].well

            end = time.monotonic() + 10
            while not await well():
                assert time.monotonic() < end
                await asyncio.sleep(0.05)
            frozen.kill()
            assert {(await answer(client, question(timeout=2.0))).verdict for _ in range(10)} == {ALLOW}
            await client.close()

    asyncio.run(run())


def test_a_slow_policy_is_nobody_s_failure() -> None:
    async def run() -> None:
        async with service(shop()) as (_, one), service(shop()) as (_, two):
            client = client_of(one, two)
            slow = await asyncio.gather(*(answer(client, question("endless", timeout=0.3)) for _ in range(5)))
            assert {(each.verdict, each.cause) for each in slow} == {(ERROR, "timeout")}
            assert (await answer(client, question(timeout=5.0))).verdict is ALLOW
            await client.close()
            alone = client_of(one)
            for _ in range(4):
                assert (await answer(alone, question("endless", timeout=0.2))).cause == "timeout"
            assert alone.state()[0].well
            await alone.close()

    asyncio.run(run())


def test_what_waits_is_bounded_and_closing_answers_it() -> None:
    async def check(_: CheckRequest, __: object) -> CheckResponse:
        await asyncio.sleep(30)
        return CheckResponse()

    async def run() -> None:
        async with foreign(check) as target:
            client = client_of(target, ours=False, max_pending=3)
            waiting = [answer(client, question(provider=target, timeout=20.0)) for _ in range(5)]
            assert [each.done() and each.result().cause for each in waiting] == [False, False, False, "overloaded", "overloaded"]
            assert (await answer(client_of(target, ours=False), question(provider=target, timeout=0.2))).cause == "timeout"
            await client.close()
            assert {each.result().cause for each in waiting[:3]} == {"unavailable"}
            assert (await answer(client, question())).cause == "unavailable"

    asyncio.run(run())


def test_somebody_else_s_server_is_asked_without_our_metadata() -> None:
    seen = []

    async def check(request: CheckRequest, context: Any) -> CheckResponse:
        seen.append(
            (request.attributes.request.http.path, {key for key, _ in context.invocation_metadata() if key.startswith("tollhouse")})
        )
        if request.attributes.source.principal == "broken":
            await context.abort(grpc.StatusCode.INTERNAL, "no idea")
        response = CheckResponse(ok_response={"headers": [{"header": {"key": "X-User", "value": "u"}}]})
        response.status.code = 7 if request.attributes.source.principal == "nobody" else 0
        return response

    async def run() -> None:
        async with foreign(check) as target:
            providers = Providers(GrpcChannels(asyncio.get_running_loop()))
            client = providers.asker(target)
            assert providers.asker(target) is client
            allowed = await answer(client, question(provider=target))
            assert (allowed.verdict, allowed.headers) == (ALLOW, ((b"x-user", b"u"),))
            assert (await answer(client, question(principal="nobody", provider=target))).verdict is DENY
            broken = await answer(client, question(principal="broken", provider=target))
            assert (broken.verdict, broken.cause) == (ERROR, "provider")
            assert client.state()[0].well
            await providers.keep([])
            assert (await answer(client, question(provider=target))).cause == "unavailable"
        assert seen == [("/orders", set())] * 3

    asyncio.run(run())


async def call(target: str, request: CheckRequest, metadata: tuple[tuple[str, str], ...] = ()) -> Any:
    async with aio.insecure_channel(target) as channel:
        method = channel.unary_unary(
            f"/{SERVICE}/Check", request_serializer=CheckRequest.SerializeToString, response_deserializer=CheckResponse.FromString
        )
        return await method(request, metadata=metadata)


def of_envoy(principal: str = "web", **extensions: str) -> CheckRequest:
    request = CheckRequest()
    request.attributes.source.principal = principal
    request.attributes.request.http.path = "/orders"
    request.attributes.context_extensions.update(extensions)
    return request


def test_which_decision_is_asked_for() -> None:
    async def run() -> None:
        async with service(shop(), decision="shop.authz.decision") as (_, target):
            assert (await call(target, of_envoy())).HasField("ok_response")
            assert (await call(target, of_envoy("nobody"))).denied_response.status.code == 401
            assert (await call(target, of_envoy(decision="shop.authz.timed"))).status.message.isdigit()
            chosen = await call(target, of_envoy(decision="shop.authz.word"), ((DECISION, "shop.authz.timed"),))
            assert chosen.status.message.isdigit()
            for request, code, cause in (
                (of_envoy(decision="shop.authz.word"), grpc.StatusCode.INTERNAL, "answer"),
                (of_envoy(decision="shop.other"), grpc.StatusCode.INVALID_ARGUMENT, "input"),
                (CheckRequest(), grpc.StatusCode.INVALID_ARGUMENT, "input"),
            ):
                with pytest.raises(aio.AioRpcError) as caught:
                    await call(target, request)
                assert caught.value.code() is code
                assert dict(caught.value.trailing_metadata() or ())[CAUSE] == cause
        async with service(shop()) as (_, target):
            with pytest.raises(aio.AioRpcError, match="no decision"):
                await call(target, of_envoy())
        async with service() as (_, target):
            with pytest.raises(aio.AioRpcError, match="no policy revision"):
                await call(target, of_envoy())

    asyncio.run(run())


async def health(target: str, name: bytes = b"") -> bytes:
    async with aio.insecure_channel(target) as channel:
        answered: bytes = await channel.unary_unary("/grpc.health.v1.Health/Check")(name)
        return answered


def test_health_is_that_of_grpc() -> None:
    async def run() -> None:
        async with service(shop()) as (_, target):
            assert await health(target) == b"\x08\x01"
            assert await health(target, b"\x0a" + bytes([len(SERVICE)]) + SERVICE.encode()) == b"\x08\x01"
            with pytest.raises(aio.AioRpcError, match="no such service"):
                await health(target, b"\x0a\x01x")
        async with service() as (_, target):
            assert await health(target) == b"\x08\x02"

    asyncio.run(run())


def test_too_many_checks_are_refused_in_words() -> None:
    async def run() -> None:
        async with service(shop(), max_pending=4) as (made, target):
            client = client_of(target)
            got = await asyncio.gather(*(answer(client, question("endless", timeout=0.5)) for _ in range(20)))
            assert sorted({each.cause for each in got}) == ["timeout", "unavailable"]
            assert any("too many checks" in each.reason for each in got)
            await until("all answered", lambda: made.point.pending == 0)
            assert (await answer(client, question())).verdict is ALLOW
            await client.close()

    asyncio.run(run())


def test_a_port_that_is_taken_is_said_at_once() -> None:
    async def run() -> None:
        async with service(shop()) as (made, target):
            with pytest.raises(OSError, match="can't listen"):
                await made.start(target)

    asyncio.run(run())


def test_mutual_tls_and_who_may_ask() -> None:
    authority = Authority.create("shop.example")

    def issue(name: str) -> Identity:
        return authority.issue(f"spiffe://shop.example/ns/edge/sa/{name}", dns=[f"{name}.pdp"])

    gateway, stranger, server = issue("gateway"), issue("stranger"), StaticIdentity(issue("pdp"))
    callers = frozenset((gateway.spiffe_id,))

    async def run() -> None:
        async with service(shop(), credentials=server_credentials(server), callers=lambda: callers) as (_, target):

            async def verdict(identity: Identity | None, server_name: str = "pdp.pdp") -> tuple[Verdict, str]:
                client = client_of(target, identity=identity, server_name=server_name)
                got = await answer(client, question(timeout=2.0))
                await client.close()
                return got.verdict, got.reason

            assert (await verdict(gateway))[0] is ALLOW
            refused = await verdict(stranger)
            assert refused[0] is ERROR
            assert "may not ask" in refused[1]
            assert (await verdict(gateway, "somebody.else"))[0] is ERROR
            assert (await verdict(None))[0] is ERROR
            server.replace(issue("renewed"))
            assert (await verdict(gateway, "renewed.pdp"))[0] is ALLOW
            source = StaticIdentity(stranger)
            client = PdpClient((target,), GrpcChannels(asyncio.get_running_loop(), source, "renewed.pdp"))
            assert (await answer(client, question(timeout=2.0))).verdict is ERROR
            source.replace(gateway)
            assert (await answer(client, question(timeout=2.0))).verdict is ALLOW
            await client.close()

    asyncio.run(run())
