"""Policy and quota for connections below HTTP."""

from __future__ import annotations

import asyncio
import contextlib

import pytest
from door_world import until
from l4_world import (
    ACCESS,
    ask,
    backend,
    compiled,
    conversation,
    free_port,
    gateway_yaml,
    l4,
    route_yaml,
    says,
    service_yaml,
    tcp,
)

from gateway.limits import Limits
from mesh.questions import Decision, Grant, Verdict

QUOTA = """
apiVersion: tollhouse.dev/v1
kind: QuotaPolicy
metadata: {namespace: shop, name: q}
spec:
  targetRefs: [{group: gateway.networking.k8s.io, kind: TCPRoute, name: r}]
  limits: [{name: each, per: [address], tokens: 1}]
"""


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize(
    ("decision", "flag"),
    [
        (Decision(verdict=Verdict.ALLOW), "-"),
        (Decision(verdict=Verdict.DENY, reason="no"), "UAEX"),
        (Decision(verdict=Verdict.ERROR, reason="down"), "UAEE"),
    ],
)
@conversation
async def test_a_connection_is_decided_before_anything_reaches_the_backend(decision: Decision, flag: str, later: bool) -> None:
    port = free_port()
    reached = 0

    async def counts(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal reached
        reached += 1
        await says(b"one")(reader, writer)

    async with (
        backend(counts) as one,
        l4(gateway_yaml(tcp(port)), route_yaml("TCPRoute", "r", "a"), service_yaml("a", one), ACCESS) as made,
    ):
        if not later:
            made.answers.decision = decision
        asking = asyncio.ensure_future(ask(port))
        if later:
            await until(lambda: bool(made.answers.asked))
            assert reached == 0
            question, done = made.answers.asked[0]
            assert question.asking.route == "shop/r#main"
            done(decision)
        assert await asking == (b"one\n" if flag == "-" else b"")
        outcome = await made.outcome()
        assert (outcome.flag, reached) == (flag, 1 if flag == "-" else 0)
        assert made.metric("tollhouse_decisions_total", policy="shop/p") == 1


@conversation
async def test_a_connection_takes_one_token() -> None:
    port = free_port()
    async with (
        backend(says(b"one")) as one,
        l4(gateway_yaml(tcp(port)), route_yaml("TCPRoute", "r", "a"), service_yaml("a", one), QUOTA) as made,
    ):
        keys = []
        left = [Grant(admitted=True), Grant(admitted=False)]
        made.answers.take = lambda question, now: (keys.append(question.key), left.pop(0))[1]  # type: ignore[method-assign,func-returns-value]
        assert await ask(port) == b"one\n"
        await made.outcome()
        assert await ask(port) == b""
        assert (await made.outcome(2)).flag == "RL"
        assert keys == [("127.0.0.1",)] * 2


@conversation
async def test_a_client_that_leaves_while_it_is_decided_leaves_nothing_behind() -> None:
    port = free_port()
    async with (
        backend(says(b"one")) as one,
        l4(gateway_yaml(tcp(port)), route_yaml("TCPRoute", "r", "a"), service_yaml("a", one), ACCESS) as made,
    ):
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        await until(lambda: bool(made.answers.asked))
        writer.close()
        made.gateway.close()
        assert (await made.outcome()).flag == "LR"
        made.answers.asked[0][1](Decision(verdict=Verdict.ALLOW))
        assert made.forwarder.state()["connections"] == 0


def test_what_only_requests_have_is_told_at_the_policy() -> None:
    body = ACCESS.replace("decision: a.b", "decision: a.b, withBody: {maxBytes: 10}")
    quota = QUOTA.replace("per: [address]", "per: [identity, method, {header: x-a}]")
    found = compiled(gateway_yaml(tcp(7)), route_yaml("TCPRoute", "r", "a"), service_yaml("a", 1), body, quota)
    assert [(problem.key.kind, ".".join(map(str, problem.path))) for problem in found.problems if problem.reason == "NoHttp"] == [
        ("AccessPolicy", "spec.withBody"),
        ("QuotaPolicy", "spec.limits.0.per.1"),
        ("QuotaPolicy", "spec.limits.0.per.2"),
    ]


@pytest.mark.parametrize("verdict", [Verdict.DENY, Verdict.ERROR, Verdict.ALLOW])
@conversation
async def test_what_was_allowed_once_is_asked_about_again(verdict: Verdict) -> None:
    port = free_port()
    async with backend(says(b"one")) as one:
        config = gateway_yaml(tcp(port)), route_yaml("TCPRoute", "r", "a"), service_yaml("a", one), ACCESS, QUOTA
        async with l4(*config, limits=Limits(stream_recheck=0.3)) as made:
            made.answers.decision = Decision(verdict=Verdict.ALLOW)
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            assert await reader.readline() == b"one\n"
            made.answers.decision = None
            await until(lambda: bool(made.answers.asked))
            question, done = made.answers.asked[-1]
            assert question.asking.route == "shop/r#main"
            done(Decision(verdict=verdict))
            if verdict is Verdict.ALLOW:
                writer.write(b"on")
                writer.write_eof()
                assert await reader.read() == b"on"
            else:
                with contextlib.suppress(ConnectionError):
                    assert await reader.read() == b""
            outcome = await made.outcome()
            assert outcome.flag == {Verdict.DENY: "UAEX", Verdict.ERROR: "UAEE", Verdict.ALLOW: "-"}[verdict]
            assert len(outcome.grants) == 1
            writer.close()


@pytest.mark.parametrize("guarded", [False, True])
@conversation
async def test_a_connection_whose_route_is_gone_ends_where_a_policy_had_let_it_in(guarded: bool) -> None:
    port = free_port()
    async with backend(says(b"one")) as one:
        config = gateway_yaml(tcp(port)), service_yaml("a", one), *((ACCESS,) if guarded else ())
        async with l4(*config, route_yaml("TCPRoute", "r", "a"), limits=Limits(stream_recheck=0.3)) as made:
            made.answers.decision = Decision(verdict=Verdict.ALLOW)
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            assert await reader.readline() == b"one\n"
            made.apply(*config)
            if guarded:
                assert (await made.outcome()).flag == "NR"
            else:
                await asyncio.sleep(0.8)  # more than one look
                writer.write(b"on\n")
                assert await reader.readline() == b"on\n"
            writer.close()


@pytest.mark.parametrize(
    ("namespace", "target", "level"),
    [
        ("edge", "group: gateway.networking.k8s.io, kind: Gateway, name: ingress", "gateway"),
        ("edge", "group: gateway.networking.k8s.io, kind: Gateway, name: ingress, sectionName: tcp", "listener"),
        ("shop", "group: gateway.networking.k8s.io, kind: TCPRoute, name: r", "route"),
        ("shop", "group: gateway.networking.k8s.io, kind: TCPRoute, name: r, sectionName: main", "rule"),
        ("shop", "group: '', kind: Service, name: a", "service"),
        ("", "", "mesh"),
    ],
)
@conversation
async def test_policies_of_every_level_are_asked(namespace: str, target: str, level: str) -> None:
    port = free_port()
    policy = "apiVersion: tollhouse.dev/v1\nkind: AccessPolicy\nmetadata: {namespace: %s, name: p}\nspec: {%s decision: a.b}\n"
    made_policy = policy.replace("%s", namespace or "edge", 1).replace("%s", f"targetRefs: [{{{target}}}]," if target else "", 1)
    mesh = "apiVersion: tollhouse.dev/v1\nkind: Mesh\nmetadata: {name: m}\nspec: {trustDomain: shop.example, MORE}\n"
    mesh = mesh.replace("MORE", "" if target else "defaultAccessPolicy: {namespace: edge, name: p}")
    async with backend(says(b"one")) as one:
        config = gateway_yaml(tcp(port)), route_yaml("TCPRoute", "r", "a"), service_yaml("a", one), mesh, made_policy
        async with l4(*config) as made:
            made.answers.decision = Decision(verdict=Verdict.DENY)
            assert await ask(port) == b""
            outcome = await made.outcome()
            assert [question.policy.level for question, _ in outcome.decisions] == [level]
            assert outcome.flag == "UAEX"
