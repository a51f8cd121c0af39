from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest
from gateway_world import ALLOW, DENY, ERROR, LIMIT, NO, POLICY, XFCC, YES, a_head, a_rule, pending_of, place_of
from hypothesis import given
from hypothesis import strategies as st

from gateway.plan import Answers, Pending, Permit, Plan, Reply
from gateway.replies import named, refusal_answer
from gateway.settle import STALE, UNANSWERED, settle
from mesh.filters import Redirect
from mesh.http import Header
from mesh.model import DecisionPolicy, QuotaLimit
from mesh.outcome import Outcome
from mesh.questions import Decision, FieldChange, Grant, Verdict
from mesh.refusals import BrokenBackend, Denied, OverQuota, PolicyError, PolicyStale, QuotaError, Refusal

BAD = Decision(verdict=Verdict.ALLOW, headers=((b"x", b"a\r\nb"),))


def asked(*policies: dict[str, Any], limits: tuple[QuotaLimit, ...] = (), **rule: Any) -> Pending:
    decisions = tuple(msgspec.structs.replace(POLICY, name=f"p{at}", **policy) for at, policy in enumerate(policies))
    return pending_of(place_of(a_rule(decisions=decisions, limits=limits, **rule)), a_head(headers=[(b"a", b"1"), (b"b", b"1")]))


def allowed(**changes: Any) -> Decision:
    return Decision(verdict=Verdict.ALLOW, **changes)


OPEN = {"failure_mode": "Allow"}
SHADOW = {"shadow": True}


@pytest.mark.parametrize(
    ("policies", "answers", "wanted"),
    [
        ([], [], Permit),
        ([{}], [ALLOW], Permit),
        ([{}], [DENY], Denied),
        ([{}], [ERROR], PolicyError),
        ([{}], [], PolicyError),
        ([{}], [STALE], PolicyStale),
        ([{}], [UNANSWERED], PolicyError),
        ([{}], [BAD], PolicyError),
        ([OPEN], [ERROR], Permit),
        ([OPEN], [STALE], Permit),
        ([OPEN], [DENY], Denied),
        ([OPEN], [BAD], PolicyError),
        ([OPEN], [], PolicyError),
        ([SHADOW], [DENY], Permit),
        ([SHADOW], [ERROR], Permit),
        ([SHADOW], [BAD], Permit),
        ([SHADOW], [UNANSWERED], Permit),
        ([SHADOW, {}], [DENY, ALLOW], Permit),
        ([SHADOW, {}], [ALLOW, DENY], Denied),
        ([{}, {}], [ALLOW, DENY], Denied),
        ([{}, {}], [ERROR, DENY], PolicyError),
        ([{}, {}], [DENY, ERROR], Denied),
        ([{}, {}], [DENY], Denied),
        ([{}, {}], [ALLOW], PolicyError),
        ([OPEN, {}], [ERROR, DENY], Denied),
        ([OPEN, {}], [ERROR, ALLOW], Permit),
    ],
)
def test_the_first_that_is_not_allow_decides(policies: list[dict[str, Any]], answers: list[Decision], wanted: type) -> None:
    settled = settle(asked(*policies), Answers(decisions=tuple(answers)))
    assert type(settled) is wanted
    if isinstance(settled, Refusal):
        assert settled.reason


def test_three_answers_have_three_statuses_and_flags() -> None:
    found = {
        (settled.answer_status, settled.flag, settled.details)
        for answer in (DENY, ERROR, STALE)
        if isinstance(settled := settle(asked({}), Answers(decisions=(answer,))), Refusal)
    }
    assert found == {(403, "UAEX", "ext_authz_denied"), (503, "UAEE", "ext_authz_error"), (503, "UAEE", "policy_stale")}


@pytest.mark.parametrize(("status", "wanted"), [(0, 403), (401, 401), (302, 302), (418, 418), (100, 403), (999, 403), (-1, 403)])
def test_what_a_denial_tells_the_client(status: int, wanted: int) -> None:
    headers = ((b"WWW-Authenticate", b"Bearer"), (b"content-length", b"9"), (b"connection", b"close"))
    denial = Decision(verdict=Verdict.DENY, status=status, headers=headers, body=b"{}", reason="no token")
    settled = settle(asked({}), Answers(decisions=(denial,)))
    assert isinstance(settled, Denied)
    assert (settled.answer_status, settled.headers, settled.body, settled.reason) == (
        wanted,
        ((b"www-authenticate", b"Bearer"),),
        b"{}",
        "no token",
    )


@pytest.mark.parametrize(
    ("show", "reason", "body", "wanted"),
    [
        (False, "no token", b"", b"This request is not allowed.\n"),
        (True, "no token", b"", b"no token\n"),
        (True, "no token", b"{}", b"{}"),
        (True, "", b"", b"This request is not allowed.\n"),
    ],
)
def test_the_reason_is_told_where_the_author_lets_it(show: bool, reason: str, body: bytes, wanted: bytes) -> None:
    denial = Decision(verdict=Verdict.DENY, body=body, reason=reason)
    settled = settle(asked({"show_reason": show}), Answers(decisions=(denial,)))
    assert isinstance(settled, Denied)
    head = a_head()
    assert refusal_answer(settled, head, b"now")[2] == wanted.replace(b"This request is not allowed.", Denied.sentence.encode())
    called = refusal_answer(settled, a_head(method=b"POST", headers=[(b"content-type", b"application/grpc")]), b"now")
    assert (dict(called[1])[b"grpc-message"] == b"no token") is (show and reason != "")


def test_the_reason_of_an_error_is_not_told() -> None:
    settled = settle(asked({"show_reason": True}), Answers(decisions=(ERROR,)))
    assert isinstance(settled, PolicyError)
    assert settled.told == ""


@pytest.mark.parametrize("known", [b"known", b""])
def test_a_refusal_is_told_the_id_of_its_request(known: bytes) -> None:
    head = a_head()
    outcome = Outcome(head, pending_of(place_of(a_rule()), head).asking.peer, "edge/gw", "http", 0.0)
    outcome.request_id = known
    said = refusal_answer(Denied(), head, b"now")
    named(said, outcome, random.Random(1))
    (found,) = [value for name, value in said[1] if name == b"x-request-id"]
    assert found == outcome.request_id
    assert found == known or len(found) == 36


@pytest.mark.parametrize(("status", "wanted"), [(0, 503), (500, 500), (200, 503), (403, 403)])
def test_what_an_error_tells_the_client(status: int, wanted: int) -> None:
    settled = settle(asked({}), Answers(decisions=(Decision(verdict=Verdict.ERROR, status=status),)))
    assert isinstance(settled, PolicyError)
    assert settled.answer_status == wanted


ONE = msgspec.structs.replace(LIMIT, name="shop/q/one")
TWO = msgspec.structs.replace(LIMIT, name="shop/q/two")
DARK = msgspec.structs.replace(LIMIT, name="shop/q/dark", shadow=True)
BROKEN = Grant(admitted=False, error="the store is gone")
LET = Grant(admitted=True, error="the store is gone")


@pytest.mark.parametrize(
    ("limits", "grants", "wanted"),
    [
        ([ONE], [YES], Permit),
        ([ONE], [NO], OverQuota),
        ([ONE], [BROKEN], QuotaError),
        ([ONE], [LET], Permit),
        ([ONE], [], QuotaError),
        ([ONE, TWO], [YES, NO], OverQuota),
        ([ONE, TWO], [YES], QuotaError),
        ([ONE, TWO], [NO], OverQuota),
        ([DARK], [NO], Permit),
        ([DARK], [BROKEN], Permit),
        ([DARK, ONE], [NO, YES], Permit),
        ([DARK, ONE], [YES, NO], OverQuota),
    ],
)
def test_tokens(limits: list[QuotaLimit], grants: list[Grant], wanted: type) -> None:
    settled = settle(asked(limits=tuple(limits)), Answers(grants=tuple(grants)))
    assert type(settled) is wanted
    if isinstance(settled, OverQuota):
        assert dict(settled.headers)[b"retry-after"] == b"1"
        assert settled.answer_status == 429
    if isinstance(settled, QuotaError):
        assert settled.headers == ()


def test_a_denied_request_is_not_told_about_tokens() -> None:
    assert isinstance(settle(asked({}, limits=(ONE,)), Answers(decisions=(DENY,), grants=(NO,))), Denied)


def test_an_admitted_request_is_told_what_is_left() -> None:
    settled = settle(asked({}, limits=(ONE,)), Answers(decisions=(allowed(response_headers=((b"x-a", b"1"),)),), grants=(YES,)))
    assert isinstance(settled, Permit)
    assert [name for name, _ in settled.response_headers] == [b"x-a", b"ratelimit-policy", b"ratelimit"]


def test_a_broken_backend_shows_itself_to_those_who_may_pass() -> None:
    pending = asked({}, backends=())
    assert isinstance(settle(pending, Answers(decisions=(ALLOW,))), BrokenBackend)
    assert isinstance(settle(pending, Answers(decisions=(DENY,))), Denied)
    assert isinstance(settle(pending, Answers(decisions=(ERROR,))), PolicyError)
    assert isinstance(settle(pending, Answers()), PolicyError)


def test_a_redirect_is_given_to_those_who_may_pass() -> None:
    pending = asked({}, redirect=Redirect(), backends=())
    settled = settle(pending, Answers(decisions=(allowed(response_headers=((b"x-a", b"1"),), headers=((b"y", b"1"),)),)))
    assert isinstance(settled, Reply)
    assert settled.response_headers == ((b"x-a", b"1"),)
    assert isinstance(settle(pending, Answers(decisions=(DENY,))), Denied)


def test_header_changes_in_the_order_of_the_decisions() -> None:
    first = allowed(headers=((b"A", b"p0"), (b"c", b"p0")), changes=(FieldChange(b"b", b"p0", "add"),), headers_to_remove=(b"gone",))
    second = allowed(headers=((b"c", b"p1"),), changes=(FieldChange(b"a", b"p1", "add"),), headers_to_remove=(b"B",))
    pending = asked({}, {})
    before = list(pending.plan.headers)  # type: ignore[union-attr]
    settled = settle(pending, Answers(decisions=(first, second)))
    assert isinstance(settled, Permit)
    assert [field for field in settled.headers if len(field[0]) == 1] == [(b"a", b"p0"), (b"c", b"p1"), (b"a", b"p1")]
    assert pending.plan.headers == before  # type: ignore[union-attr]


def test_the_query_and_the_answer_are_changed_too() -> None:
    first = allowed(query_set=(("a", "1"),), response_changes=(FieldChange(b"x", b"1", "if_absent"),))
    second = allowed(query_set=(("a", "2"), ("b", "3")), query_remove=("c",), response_changes=(FieldChange(b"y", b"2", "if_present"),))
    pending = pending_of(place_of(a_rule(decisions=(POLICY, POLICY))), a_head(b"/x?c=1&k=2"))
    settled = settle(pending, Answers(decisions=(first, second)))
    assert isinstance(settled, Permit)
    assert settled.plan.target == b"/x?k=2&a=2&b=3"
    headers = [(b"y", b"old")]
    for edit in settled.plan.edits:
        headers = edit.apply(headers)
    assert headers == [(b"x", b"1"), (b"y", b"2")]
    assert pending.plan.target == b"/x?c=1&k=2"  # type: ignore[union-attr]


def test_a_redirect_has_its_answer_changed() -> None:
    pending = asked({}, redirect=Redirect(), backends=())
    settled = settle(pending, Answers(decisions=(allowed(response_changes=(FieldChange(b"location", b"/else"),)),)))
    assert isinstance(settled, Reply)
    assert dict(settled.answer.headers)[b"location"] == b"/else"


def test_an_error_says_what_its_server_wants_said() -> None:
    said = Decision(verdict=Verdict.ERROR, status=502, headers=((b"Retry-After", b"3"), (b"te", b"x")), body=b"later")
    settled = settle(asked({}), Answers(decisions=(said,)))
    assert isinstance(settled, PolicyError)
    assert (settled.answer_status, settled.headers, settled.body) == (502, ((b"retry-after", b"3"),), b"later")
    assert isinstance(settle(asked(OPEN), Answers(decisions=(said,))), Permit)
    assert settle(asked({}), Answers(decisions=(Decision(verdict=Verdict.ERROR, status=200),))).answer_status == 503  # type: ignore[union-attr]


def test_without_changes_nothing_is_copied() -> None:
    pending = asked({})
    settled = settle(pending, Answers(decisions=(ALLOW,)))
    assert isinstance(settled, Permit)
    assert isinstance(pending.plan, Plan)
    assert settled.headers is pending.plan.headers


@pytest.mark.parametrize("mode", [SHADOW, OPEN])
def test_changes_of_what_does_not_count_are_not_made(mode: dict[str, Any]) -> None:
    verdict = Verdict.ALLOW if mode is SHADOW else Verdict.ERROR
    decision = Decision(verdict=verdict, headers=((b"x", b"1"),), response_headers=((b"y", b"1"),))
    settled = settle(asked(mode), Answers(decisions=(decision,)))
    assert isinstance(settled, Permit)
    assert b"x" not in dict(settled.headers)
    assert settled.response_headers == ()


PROTECTED = [
    b"host", b"connection", b"transfer-encoding", b"content-length", b"te", b"upgrade", b"keep-alive", b"proxy-connection", b"trailer",
    b"Host", b"Content-Length",
]  # fmt: skip


@pytest.mark.parametrize("name", [*PROTECTED, XFCC, b"X-Forwarded-Client-Cert", b"x-forwarded-for"])
def test_what_a_policy_cannot_write(name: bytes) -> None:
    field = ((name, b"evil"),)
    pending = asked({})
    settled = settle(pending, Answers(decisions=(allowed(headers=field, changes=(FieldChange(name, b"evil"),)),)))
    assert isinstance(settled, Permit)
    assert sorted(settled.headers) == sorted(pending.plan.headers)  # type: ignore[union-attr]


def test_what_a_policy_cannot_take_off_or_answer() -> None:
    decision = allowed(headers_to_remove=(b"content-length", b"te", XFCC), response_headers=((b"Content-Length", b"0"), (b"x", b"1")))
    pending = pending_of(place_of(a_rule(decisions=(POLICY,))), a_head(headers=[(b"content-length", b"3"), (b"te", b"trailers")]))
    settled = settle(pending, Answers(decisions=(decision,)))
    assert isinstance(settled, Permit)
    headers = dict(settled.headers)
    assert headers[b"content-length"] == b"3"
    assert headers[b"te"] == b"trailers"
    assert XFCC not in headers
    assert settled.response_headers == ((b"x", b"1"),)


@pytest.mark.parametrize(
    "field", [(b"x", b"a\rb"), (b"x", b"a\nb"), (b"x", b"\x00"), (b"", b"x"), (b":path", b"/"), (b"a b", b"x"), (b"a\r", b"x")]
)
@pytest.mark.parametrize("place", ["headers", "changes", "response_headers", "response_changes"])
def test_a_field_that_would_split_a_head_is_the_policys_fault(field: Header, place: str) -> None:
    said = FieldChange(*field) if place.endswith("changes") else field
    assert isinstance(settle(asked({}), Answers(decisions=(allowed(**{place: (said,)}),))), PolicyError)


def test_a_denial_that_would_split_a_head_is_refused_all_the_same() -> None:
    denial = Decision(verdict=Verdict.DENY, headers=((b"x", b"a\r\nb"),))
    assert isinstance(settle(asked({}), Answers(decisions=(denial,))), PolicyError)


DECISIONS = st.sampled_from(
    [ALLOW, DENY, ERROR, STALE, UNANSWERED, BAD, allowed(headers=((b"x", b"1"),), response_headers=((b"y", b"2"),))]
)
POLICIES = st.tuples(st.sampled_from(["Deny", "Allow"]), st.booleans())


@given(
    st.lists(st.tuples(POLICIES, DECISIONS), max_size=5),
    st.lists(st.tuples(st.booleans(), st.sampled_from([YES, NO, BROKEN, LET])), max_size=4),
    st.integers(0, 5),
    st.integers(0, 4),
)
def test_a_permit_only_if_everything_allows(decided: list[Any], granted: list[Any], known: int, lent: int) -> None:
    policies = [{"failure_mode": mode, "shadow": shadow} for (mode, shadow), _ in decided]
    limits = tuple(msgspec.structs.replace(LIMIT, name=f"l{at}", shadow=shadow) for at, (shadow, _) in enumerate(granted))
    answers = Answers(decisions=tuple(decision for _, decision in decided[:known]), grants=tuple(grant for _, grant in granted[:lent]))
    settled = settle(asked(*policies, limits=limits), answers)

    def passes(entry: Any) -> bool:
        (mode, shadow), decision = entry
        if shadow:
            return True
        return (decision.verdict is Verdict.ALLOW and decision is not BAD) or (decision.verdict is Verdict.ERROR and mode == "Allow")

    complete = known >= len(decided) and lent >= len(granted)
    allowing = all(map(passes, decided)) and all(shadow or grant.admitted for shadow, grant in granted)
    assert isinstance(settled, Permit) == (complete and allowing)
    if not isinstance(settled, Permit):
        assert isinstance(settled, Refusal)


def test_nobody_else_makes_a_permit() -> None:
    from pathlib import Path

    root = Path(__file__).resolve().parents[2]
    makers = {
        path.name
        for room in ("gateway", "tollhouse", "pdp", "quota", "identity", "discovery", "telemetry", "mesh")
        for path in (root / room).rglob("*.py")
        if "Permit(" in path.read_text() and "class Permit(" not in path.read_text()
    }
    assert makers == {"settle.py"}


def test_policies_are_named_in_the_reason() -> None:
    policy = DecisionPolicy(name="shop/p", level="rule", decision="x")
    pending = pending_of(place_of(a_rule(decisions=(policy,))))
    settled = settle(pending, Answers(decisions=(ERROR,)))
    assert isinstance(settled, PolicyError)
    assert settled.reason == "shop/p: timeout"
