from __future__ import annotations

import asyncio
import random
from typing import Any

import msgspec
import pytest
from gateway_world import (
    ALLOW,
    DENY,
    ERROR,
    LIMIT,
    NO,
    POLICY,
    WEB,
    XFCC,
    YES,
    Deciding,
    Lending,
    a_cluster,
    a_head,
    a_host,
    a_listener,
    a_match,
    a_peer,
    a_place,
    a_rule,
    an_outcome,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.driver import Driver
from gateway.explain import Explanation, Step, explain
from gateway.place import Place
from gateway.plan import Pending, Permit, Reply
from gateway.route import route
from mesh.filters import Redirect
from mesh.http import Header, RequestHead
from mesh.model import Cluster, Endpoint, Exemption
from mesh.peer import Peer
from mesh.questions import Decision
from mesh.refusals import Refusal

RULE = a_rule(decisions=(POLICY,), limits=(LIMIT,), origin="routes.yaml:14")


def a_shop(**changes: Any) -> Place:
    return a_place(
        a_listener(
            a_host(
                a_match(a_rule("shop/orders#post"), path=b"/orders", method=b"POST"),
                a_match(msgspec.structs.replace(RULE, **changes), path=b"/orders"),
                a_match(a_rule("shop/away#0", redirect=Redirect(scheme=b"https", port=443), backends=()), path=b"/away"),
            )
        )
    )


def explained(
    place: Place, head: RequestHead | None = None, decider: Deciding | None = None, lessee: Lending | None = None, **more: Any
) -> Explanation:
    async def run() -> Explanation:
        return await explain(
            head or a_head(),
            more.pop("peer", a_peer()),
            place,
            1_700_000_000.0,
            random.Random(1),
            decider or Deciding({POLICY.name: ALLOW}),
            lessee or Lending({LIMIT.name: YES}),
            clock=lambda: 1.0,
            **more,
        )

    return asyncio.run(run())


def named(explanation: Explanation, name: str) -> Step:
    found = [step for step in explanation.steps if step.name == name]
    assert len(found) == 1, [step.name for step in explanation.steps]
    return found[0]


def test_each_step_of_a_request_that_goes_on() -> None:
    lessee = Lending({LIMIT.name: YES})
    kept = Decision(verdict=ALLOW.verdict, kept=True, revision="sha256:1", rule="web_orders")
    told = explained(a_shop(), a_head(b"/orders//1?a=b"), Deciding({POLICY.name: kept}), lessee)
    assert [step.name for step in told.steps] == [
        "listener",
        "path",
        "caller",
        "host",
        "route",
        "backend",
        "decision",
        "quota",
        "upstream",
    ]
    assert (told.result, told.status, told.flag) == ("forward", 0, "-")
    assert named(told, "path").text == "/orders//1?a=b is read as /orders/1?a=b"
    assert named(told, "caller").details == {"principal": WEB, "via": ""}
    route_step = named(told, "route")
    assert route_step.text == "shop/orders#0 by /orders/** (routes.yaml:14)"
    assert [(way["rule"], way["why_not"]) for way in route_step.details["considered"]] == [
        ("shop/orders#post", "the method is not POST"),
        ("shop/orders#0", ""),
    ]
    decision = named(told, "decision")
    assert decision.text == "edge/access, shop.authz.decision: allow, web_orders, kept"
    assert decision.details["depends_on"] == ["input.attributes.source.principal", "input.attributes.request.http.method"]
    assert (decision.details["asked_revision"], decision.details["revision"], decision.details["kept"]) == ("sha256:1", "sha256:1", True)
    quota = named(told, "quota")
    assert quota.text == f"shop/orders/caller for {WEB}: 5 of 20 left"
    assert named(told, "upstream").text == ("shop/orders:80, 127.0.0.1:9001, first of 1 by round_robin: GET shop.example /orders/1?a=b")
    assert XFCC.decode() in dict(named(told, "upstream").details["headers"])
    assert (lessee.taken, lessee.returned, lessee.peeked) == ([], [], [LIMIT.name])
    msgspec.json.encode(told)


def test_the_balancers_choice_is_shown_when_it_is_known() -> None:
    def endpoints(cluster: Cluster) -> list[tuple[Endpoint, str]]:
        assert cluster == a_cluster()
        return [(Endpoint(address="127.0.0.9", port=1), "healthy"), (Endpoint(address="127.0.0.8", port=2), "ejected")]

    upstream = named(explained(a_shop(), endpoints=endpoints), "upstream")
    assert "127.0.0.9:1, first of 2" in upstream.text
    assert [endpoint["state"] for endpoint in upstream.details["endpoints"]] == ["healthy", "ejected"]


def test_a_denial_and_what_was_not_asked() -> None:
    told = explained(a_shop(), decider=Deciding({}, {POLICY.name: Decision(verdict=DENY.verdict, reason="not yours")}))
    assert (told.result, told.status, told.flag, told.reason) == ("refuse", 403, "UAEX", "not yours")
    assert named(told, "decision").text == "edge/access, shop.authz.decision: deny, not yours"
    assert named(told, "quota").text.endswith("not asked")
    assert named(told, "refused").text == "403 UAEX: not yours"


def test_over_quota_spends_nothing() -> None:
    lessee = Lending({LIMIT.name: NO})
    told = explained(a_shop(), lessee=lessee)
    assert (told.result, told.status, told.flag) == ("refuse", 429, "RL")
    assert named(told, "quota").text.endswith("none left")
    assert (lessee.taken, lessee.peeked) == ([], [LIMIT.name])


def test_stale_policy() -> None:
    told = explained(a_shop(), stale=lambda: True)
    assert (told.result, told.status, told.flag) == ("refuse", 503, "UAEE")


@pytest.mark.parametrize(
    ("head", "status", "steps"),
    [
        (a_head(b"/a%2fb"), 400, ["listener", "refused"]),
        (a_head(authority=b"no.example"), 404, ["listener", "path", "refused"]),
        (a_head(b"/none"), 404, ["listener", "path", "host", "route", "refused"]),
    ],
)
def test_requests_that_no_rule_takes(head: RequestHead, status: int, steps: list[str]) -> None:
    told = explained(a_shop(), head)
    assert (told.result, told.status) == ("refuse", status)
    assert [step.name for step in told.steps] == steps


def test_a_redirect() -> None:
    told = explained(a_shop(), a_head(b"/away"))
    assert (told.result, told.status) == ("answer", 302)
    assert named(told, "result").text == "302, to https://shop.example/away"


def test_a_broken_backend() -> None:
    told = explained(a_shop(backends=()))
    assert (told.result, told.status, told.flag) == ("refuse", 500, "NC")


def test_an_answer_that_takes_time() -> None:
    decider = Deciding()

    async def run() -> Explanation:
        decider.ask = lambda _, done: asyncio.get_running_loop().call_soon(done, ALLOW)  # type: ignore[method-assign,assignment]
        return await explain(
            a_head(), a_peer(), a_shop(), 0.0, random.Random(1), decider, Lending({LIMIT.name: YES}), clock=lambda: 1.0, body=b"x"
        )

    assert asyncio.run(run()).result == "forward"


def test_a_body_is_shown_as_far_as_the_policy_may_see_it() -> None:
    shows = msgspec.structs.replace(POLICY, body_limit=4, body_partial=True)
    decider = Deciding({}, {POLICY.name: ALLOW})
    asked: list[Any] = []
    at_once = decider.ask

    def ask(question: Any, done: Any) -> None:
        asked.append((question.asking.body, question.asking.body_complete))
        at_once(question, done)

    decider.ask = ask  # type: ignore[method-assign]
    explained(a_shop(decisions=(shows,)), decider=decider, body=b"123456")
    explained(a_shop(decisions=(shows,)), decider=decider)
    assert asked == [(b"1234", False), (b"", True)]


FIELDS = st.lists(st.sampled_from([(XFCC, b"x"), (b"accept", b"*/*"), (b"x-forwarded-for", b"6.6.6.6")]), max_size=3)


@settings(max_examples=120)
@given(
    st.sampled_from([b"/orders", b"/orders/1", b"/away/x", b"/none", b"/a%2f"]),
    st.sampled_from([b"GET", b"POST", b"TRACE"]),
    st.sampled_from([b"shop.example", b"no.example"]),
    FIELDS,
    st.sampled_from([WEB, ""]),
    st.sampled_from([ALLOW, DENY, ERROR]),
    st.sampled_from([YES, NO]),
    st.booleans(),
)
def test_what_is_explained_is_what_happens(
    target: bytes, method: bytes, authority: bytes, fields: list[Header], principal: str, decision: Decision, grant: Any, stale: bool
) -> None:
    place, peer = a_shop(), a_peer(principal)

    def head() -> RequestHead:
        return a_head(target, method, fields, authority)

    def decider() -> Deciding:
        return Deciding({}, {POLICY.name: decision})

    told = explained(place, head(), decider(), Lending({LIMIT.name: grant}), peer=peer, stale=lambda: stale)
    happened = driven(place, head(), peer, Driver(decider(), Lending({LIMIT.name: grant}), lambda: 1.0, lambda: stale))
    if isinstance(happened, Refusal):
        assert (told.result, told.status, told.flag) == ("refuse", happened.answer_status, happened.flag)
    elif isinstance(happened, Reply):
        assert (told.result, told.status) == ("answer", happened.answer.status)
    else:
        assert told.result == "forward"
        headers = named(told, "upstream").details["headers"]
        assert headers == [[name.decode(), value.decode()] for name, value in happened.headers]


def driven(place: Place, head: RequestHead, peer: Peer, driver: Driver) -> Permit | Reply | Refusal:
    routed = route(head, peer, place, 1_700_000_000.0, random.Random(1))
    if isinstance(routed, Refusal):
        return routed
    assert isinstance(routed, Pending)
    settled = driver.drive(routed, an_outcome(routed), lambda _: None)
    assert isinstance(settled, (Permit, Reply, Refusal))
    return settled


def test_who_is_let_out_of_a_policy_is_told() -> None:
    place = a_place(a_listener(a_host(a_match(a_rule(exempt=(Exemption("edge/access", "shop/health"),)), path=b"/orders"))))
    steps = {step.name: step for step in explained(place).steps}
    assert steps["exempt"].text == "edge/access is not asked: its owner lets the route out, as PolicyExemption shop/health asks for"
    assert steps["exempt"].details == {"policy": "edge/access", "by": "shop/health"}
