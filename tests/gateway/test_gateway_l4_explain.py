"""What is told of a connection is what would happen to it, step by step."""

from __future__ import annotations

import asyncio
import random
import time

import pytest
from door_world import Answers
from l4_world import ACCESS, compiled, gateway_yaml, route_yaml, service_yaml, tcp

from gateway.explain import Explanation
from gateway.l4_explain import explain_connection
from gateway.place import Place
from mesh.peer import Peer
from mesh.questions import Decision, Verdict

MISSING = "the backend shop/missing of shop/gone#main is missing, forbidden or unknown"
LISTENERS = (tcp(5432), "name: tls, port: 443, protocol: TLS, tls: {mode: Passthrough}")
ROUTES = (
    route_yaml("TCPRoute", "r", "a*1", parent="namespace: edge, name: ingress, sectionName: tcp"),
    route_yaml("TLSRoute", "t", "a*1", more="  hostnames: ['*.shop.example']\n"),
    route_yaml("TLSRoute", "gone", "missing", more="  hostnames: [gone.shop.example]\n"),
)


def told(listener: str, sni: str = "", verdict: Verdict = Verdict.ALLOW, *more: str) -> Explanation:
    snapshot = compiled(gateway_yaml(*LISTENERS), *ROUTES, service_yaml("a", 9000), *more)
    config = snapshot.gateways["edge/ingress"]
    made = next(each for each in config.listeners if each.name == listener)
    place = Place(snapshot=snapshot, gateway=config, listener=made, siblings=(), identity="")
    answers = Answers()
    answers.decision = Decision(verdict=verdict, reason="because")
    peer = Peer(address="10.0.0.1", sni=sni)

    async def tell() -> Explanation:
        return await explain_connection(peer, place, 0.0, random.Random(1), answers, answers, clock=time.monotonic)

    return asyncio.run(tell())


def texts(explanation: Explanation) -> dict[str, str]:
    return {step.name: step.text for step in explanation.steps}


def test_a_connection_that_goes_on() -> None:
    found = told("tcp")
    assert (found.result, found.flag, found.status) == ("forward", "-", 0)
    assert list(texts(found)) == ["listener", "caller", "route", "backend", "upstream"]
    assert texts(found)["upstream"] == "shop/a:80, 127.0.0.1:9000, first of 1 by round_robin: as it is"


def test_tls_that_is_passed_through() -> None:
    found = texts(told("tls", "x.shop.example"))
    assert found["listener"].endswith("TLS is passed through")
    assert found["route"].startswith("shop/t#main by *.shop.example (")
    assert found["upstream"].endswith("the client's own TLS, untouched")


@pytest.mark.parametrize(
    ("listener", "sni", "verdict", "more", "flag", "text"),
    [
        ("tls", "elsewhere.example", Verdict.ALLOW, (), "NR", "NR: no route of the listener tls is for the name elsewhere.example"),
        (
            "tls",
            "gone.shop.example",
            Verdict.ALLOW,
            (),
            "NC",
            "NC: the backend shop/missing of shop/gone#main is missing, forbidden or unknown",
        ),
        ("tcp", "", Verdict.DENY, (ACCESS,), "UAEX", "UAEX: because"),
        ("tcp", "", Verdict.ERROR, (ACCESS,), "UAEE", "UAEE: shop/p: because"),
    ],
)
def test_why_it_does_not(listener: str, sni: str, verdict: Verdict, more: tuple[str, ...], flag: str, text: str) -> None:
    found = told(listener, sni, verdict, *more)
    assert (found.result, found.flag) == ("refuse", flag)
    assert texts(found)["refused"] == text
    assert ("decision" in texts(found)) == bool(more)
