"""CORS: what preflights and other answers say, by origin."""

from __future__ import annotations

import asyncio

import pytest
from door_world import answer, door, get
from gateway_world import DENY, LIMIT, POLICY, a_head, a_host, a_match, a_place, a_rule, pending_of, place_of, routed
from gateway_world import a_listener as a_plain_listener

from gateway.cors import CorsRule
from gateway.plan import Answer, Plan
from mesh.filters import Cors, OriginPattern, Redirect
from mesh.http import Header
from mesh.refusals import NoRoute

SHOP = Cors(
    origins=(b"https://shop.example", b"http://shop.example:8080"),
    patterns=(OriginPattern(b"https", b".bar.example", b""), OriginPattern(b"http", b"", b"81")),
    credentials=True,
    methods=b"GET, PUT",
    headers=b"x-a, x-b",
    expose=b"x-c",
    max_age=60,
)
ALL = Cors(any_origin=True, methods=b"*", headers=b"*")


@pytest.mark.parametrize(
    ("origin", "allowed"),
    [
        (b"https://shop.example", True),
        (b"https://shop.example:443", True),
        (b"HTTPS://Shop.Example", True),
        (b"https://shop.example:8443", False),
        (b"http://shop.example", False),
        (b"http://shop.example:8080", True),
        (b"https://a.bar.example", True),
        (b"https://a.b.bar.example", True),
        (b"https://a.bar.example:443", True),
        (b"https://a.bar.example:444", False),
        (b"http://a.bar.example", False),
        (b"https://bar.example", False),
        (b"https://.bar.example", False),
        (b"https://evilbar.example", False),
        (b"https://a.bar.example.evil.example", False),
        (b"http://anything:81", True),
        (b"http://[::1]:81", True),
        (b"http://:81", False),
        (b"https://shop.example,https://evil.example", False),
        (b"null", False),
        (b"", False),
        (b"shop.example", False),
    ],
)
def test_origins(origin: bytes, allowed: bool) -> None:
    assert CorsRule(SHOP).allows(origin) is allowed
    assert CorsRule(ALL).allows(origin)


def preflight(origin: bytes, method: bytes = b"PUT", *more: Header) -> list[Header]:
    return [(b"origin", origin), (b"access-control-request-method", method), *more]


def answer_of(cors: Cors, headers: list[Header]) -> dict[bytes, bytes]:
    pending = pending_of(place_of(a_rule(cors=cors, decisions=(POLICY,), limits=(LIMIT,))), a_head(method=b"OPTIONS", headers=headers))
    assert isinstance(pending.plan, Answer)
    assert (pending.decisions, pending.tokens) == ((), ())
    assert (pending.plan.status, pending.plan.details) == (204, "cors_preflight")
    return dict(pending.plan.headers)


def test_a_preflight_of_an_origin_that_is_allowed() -> None:
    asked = (b"access-control-request-headers", b"x-a")
    assert answer_of(SHOP, preflight(b"https://a.bar.example", b"PUT", asked)) == {
        b"access-control-allow-origin": b"https://a.bar.example",
        b"access-control-allow-credentials": b"true",
        b"access-control-allow-methods": b"GET, PUT",
        b"access-control-allow-headers": b"x-a, x-b",
        b"access-control-expose-headers": b"x-c",
        b"access-control-max-age": b"60",
        b"vary": b"Origin, Access-Control-Request-Method, Access-Control-Request-Headers",
    }


def test_a_preflight_of_another_origin_is_answered_and_allows_nothing() -> None:
    assert list(answer_of(SHOP, preflight(b"https://evil.example"))) == [b"vary"]


def test_a_preflight_where_everything_is_allowed() -> None:
    said = answer_of(ALL, preflight(b"https://a.example", b"PATCH", (b"access-control-request-headers", b"authorization, x-a")))
    assert said[b"access-control-allow-origin"] == b"*"
    assert said[b"access-control-allow-methods"] == b"PATCH"
    assert said[b"access-control-allow-headers"] == b"authorization, x-a"
    assert b"access-control-allow-credentials" not in said


def test_with_credentials_nothing_is_a_star() -> None:
    everything = Cors(any_origin=True, methods=b"*", headers=b"*", credentials=True)
    said = answer_of(everything, preflight(b"https://a.example", b"PUT", (b"access-control-request-headers", b"x-a")))
    assert b"*" not in said.values()
    assert said[b"access-control-allow-origin"] == b"https://a.example"


@pytest.mark.parametrize(
    ("method", "headers"),
    [
        (b"OPTIONS", [(b"origin", b"https://shop.example")]),
        (b"OPTIONS", [(b"access-control-request-method", b"GET")]),
        (b"GET", preflight(b"https://shop.example")),
    ],
)
def test_what_is_no_preflight_is_decided_and_goes_on(method: bytes, headers: list[Header]) -> None:
    pending = pending_of(place_of(a_rule(cors=SHOP, decisions=(POLICY,))), a_head(method=method, headers=headers))
    assert isinstance(pending.plan, Plan)
    assert len(pending.decisions) == 1


UPSTREAM = [(b"access-control-allow-origin", b"*"), (b"access-control-allow-methods", b"TRACE"), (b"x-a", b"1")]


@pytest.mark.parametrize(
    ("cors", "origin", "expected"),
    [
        (
            SHOP,
            b"https://shop.example",
            [
                (b"access-control-allow-origin", b"https://shop.example"),
                (b"access-control-allow-credentials", b"true"),
                (b"access-control-expose-headers", b"x-c"),
                (b"vary", b"Origin"),
            ],
        ),
        (SHOP, b"https://evil.example", [(b"vary", b"Origin")]),
        (SHOP, None, [(b"vary", b"Origin")]),
        (ALL, b"https://evil.example", [(b"access-control-allow-origin", b"*")]),
    ],
)
def test_the_route_has_the_word_on_answers(cors: Cors, origin: bytes | None, expected: list[Header]) -> None:
    headers = [] if origin is None else [(b"origin", origin)]
    plan = pending_of(place_of(a_rule(cors=cors)), a_head(headers=headers)).plan
    assert isinstance(plan, Plan)
    (edit,) = plan.edits
    assert edit.apply(UPSTREAM) == [(b"x-a", b"1"), *expected]


def test_a_redirect_says_it_too() -> None:
    rule = a_rule(cors=ALL, redirect=Redirect(hostname=b"other.example"), backends=())
    plan = pending_of(place_of(rule), a_head(headers=[(b"origin", b"https://a.example")])).plan
    assert isinstance(plan, Answer)
    assert (b"access-control-allow-origin", b"*") in plan.headers


def test_the_preflight_of_a_method_falls_under_the_rule_of_the_method() -> None:
    get, put = a_rule("get", cors=ALL), a_rule("put", cors=SHOP)
    host = a_host(a_match(get, method=b"GET"), a_match(put, method=b"PUT"))
    place = a_place(a_plain_listener(host))
    for method, rule in ((b"GET", "get"), (b"PUT", "put")):
        assert pending_of(place, a_head(method=b"OPTIONS", headers=preflight(b"https://a.example", method))).rule.name == rule
    assert isinstance(routed(place, a_head(method=b"OPTIONS", headers=preflight(b"https://a.example", b"PATCH"))), NoRoute)
    assert isinstance(routed(place, a_head(method=b"OPTIONS")), NoRoute)


def test_a_page_may_read_why_it_was_refused() -> None:
    async def test() -> None:
        async with door(decisions=(POLICY,), cors=ALL) as made:
            made.answers.decision = DENY
            reader, writer = await made.connect()
            writer.write(get(b"/hello", b"Origin: https://a.example\r\n"))
            status, headers, _ = await answer(reader)
            assert (status, headers[b"access-control-allow-origin"]) == (403, b"*")
            writer.write(get(b"/hello", b"Origin: https://a.example\r\nAccess-Control-Request-Method: GET\r\n", b"OPTIONS"))
            status, headers, body = await answer(reader)
            assert (status, headers[b"access-control-allow-methods"], body) == (204, b"GET", b"")
            assert not made.forwarder.exchanges

    asyncio.run(test())
