"""What a policy's result means, and that a decision survives the way through `envoy.service.auth.v3`."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from envoy.service.auth.v3.external_auth_pb2 import CheckResponse
from hypothesis import given
from hypothesis import strategies as st

from mesh.questions import Decision, Verdict
from pdp.answer import decision_of
from pdp.check import check_response, decision_of_check
from pdp.engines.engine import UNDEFINED, Evaluation, failure
from pdp.fields import FRAMING

ALLOW, DENY, ERROR = Verdict.ALLOW, Verdict.DENY, Verdict.ERROR


def meaning(result: object) -> Decision:
    return decision_of(Evaluation("result", msgspec.json.encode(result)), "shop.authz.decision", "sha256:1")


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        (True, {"verdict": ALLOW}),
        (False, {"verdict": DENY}),
        ({"allowed": True}, {"verdict": ALLOW}),
        ({"allowed": False}, {"verdict": DENY}),
        ({"allowed": False, "http_status": 401, "body": "no\n", "reason": "because", "rule": "r"}, {
            "verdict": DENY, "status": 401, "body": b"no\n", "reason": "because", "rule": "r"}),
        ({"allowed": False, "http_status": 302, "headers": {"Location": "/login"}}, {
            "verdict": DENY, "status": 302, "headers": ((b"location", b"/login"),)}),
        ({"allowed": True, "headers": {"X-A": "1", "x-b": ["2", "3"]}}, {
            "verdict": ALLOW, "headers": ((b"x-a", b"1"), (b"x-b", b"2"), (b"x-b", b"3"))}),
        ({"allowed": True, "headers": [{"x-a": "1"}, {"x-a": "2"}]}, {"verdict": ALLOW, "headers": ((b"x-a", b"1"), (b"x-a", b"2"))}),
        ({"allowed": True, "response_headers_to_add": {"x-r": "é"}, "request_headers_to_remove": ["X-Secret"]}, {
            "verdict": ALLOW, "response_headers": ((b"x-r", "é".encode()),), "headers_to_remove": (b"x-secret",)}),
        ({"allowed": True, "query_parameters_to_set": {"a": "1"}, "query_parameters_to_remove": ["b"]}, {
            "verdict": ALLOW, "query_set": (("a", "1"),), "query_remove": ("b",)}),
        ({"allowed": True, "dynamic_metadata": {"b": 1, "a": [True]}}, {"verdict": ALLOW, "metadata": b'{"a":[true],"b":1}'}),
        ({"allowed": True, "of_the_policy": {"own": 1}}, {"verdict": ALLOW}),
    ],
)  # fmt: skip
def test_the_plugin_s_answers(result: object, expected: dict[str, Any]) -> None:
    assert meaning(result) == Decision(revision="sha256:1", **expected)


@pytest.mark.parametrize(
    ("result", "words"),
    [
        ("yes", "a string"),
        ("true", "a string"),
        (1, "a number"),
        (None, "null"),
        ([True], "a list"),
        ({}, "no `allowed`"),
        ({"allowed": "true"}, "`allowed` that is a string"),
        ({"allowed": 1}, "`allowed` that is a number"),
        ({"allow": True}, "no `allowed`"),
        ({"allowed": True, "headers": {"x": 1}}, "a number where a string belongs"),
        ({"allowed": True, "headers": "x"}, "a string where an object"),
        ({"allowed": True, "headers": {"x": "a\r\nb: c"}}, "characters that no header may have"),
        ({"allowed": True, "headers": {"x y": "a"}}, "not a header's name"),
        ({"allowed": True, "headers": {":path": "/admin"}}, "not a header's name"),
        ({"allowed": True, "headers": {"Transfer-Encoding": "chunked"}}, "not a policy's to change"),
        ({"allowed": True, "request_headers_to_remove": ["Host"]}, "not a policy's to change"),
        ({"allowed": True, "request_headers_to_remove": "x"}, "not a list of strings"),
        ({"allowed": True, "dynamic_metadata": 1}, "not an object"),
        ({"allowed": True, "headers": {f"x-{n}": "" for n in range(101)}}, "at most 100"),
        ({"allowed": True, "headers": {"x": "a" * 70_000}}, "at most 61440"),
    ],
)
def test_what_is_no_answer_is_an_error_that_says_so(result: object, words: str) -> None:
    decision = meaning(result)
    assert (decision.verdict, decision.cause) == (ERROR, "answer")
    assert words in decision.reason
    assert "shop.authz.decision" in decision.reason


@pytest.mark.parametrize(
    "wrong",
    [
        {"headers": {"x": 1, "x-good": "yes"}},
        {"headers": {"x": "\n", "x-good": "yes"}},
        {"headers": {"content-length": "5", "x-good": "yes"}},
        {"headers": {"x-good": "yes"}, "http_status": 7},
        {"headers": {"x-good": "yes"}, "http_status": "403"},
        {"headers": {"x-good": "yes"}, "http_status": True},
        {"headers": {"x-good": "yes"}, "body": 5},
        {"headers": {"x-good": "yes"}, "body": "x" * (1 << 21)},
        {"headers": {"x-good": "yes"}, "dynamic_metadata": []},
    ],
)
def test_a_denial_stays_one_whatever_else_is_wrong_with_it(wrong: dict[str, Any]) -> None:
    decision = meaning({"allowed": False, "reason": "because", **wrong})
    assert decision.verdict is DENY
    assert decision.headers == ((b"x-good", b"yes"),)
    assert decision.status == 0
    assert decision.reason.startswith("because (shop.authz.decision: left off: ")
    assert decision.body == b""


def test_what_an_engine_could_not_say_is_an_error() -> None:
    assert decision_of(UNDEFINED, "a.b", "").verdict is ERROR
    assert "a.b is undefined" in decision_of(UNDEFINED, "a.b", "").reason
    assert decision_of(UNDEFINED, "a.b", "").cause == "undefined"
    assert decision_of(failure("crashed", "it ended"), "a.b", "") == Decision(verdict=ERROR, cause="crashed", reason="it ended")
    assert decision_of(Evaluation("result", b"{"), "a.b", "").verdict is ERROR
    assert decision_of(Evaluation("result", b"[" * 100_000), "a.b", "").verdict is ERROR


json = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)
KEYS = (
    "allowed", "headers", "response_headers_to_add", "request_headers_to_remove", "query_parameters_to_set", "query_parameters_to_remove",
    "http_status", "body", "dynamic_metadata", "reason", "rule",
)  # fmt: skip


@given(json | st.dictionaries(st.sampled_from(KEYS), json, max_size=6))
def test_every_result_has_exactly_the_meaning_of_its_verdict(result: object) -> None:
    decision = meaning(result)
    said = result.get("allowed") if isinstance(result, dict) else result
    if said is True:
        assert decision.verdict in {ALLOW, ERROR}
    else:
        assert decision.verdict is (DENY if said is False else ERROR)
    assert (decision.verdict is ERROR) == bool(decision.cause)
    for name, value in (*decision.headers, *decision.response_headers):
        assert name == name.lower()
        assert not set(b"\r\n\0 :") & set(name)
        assert not set(b"\r\n\0") & set(value)


token = st.text("abcdefghijklmnopqrstuvwxyz0123456789-_.", min_size=1, max_size=12).map(str.encode).filter(lambda name: name not in FRAMING)
value = st.binary(max_size=12).filter(lambda each: not set(each) & {*range(9), *range(10, 32), 127}).map(lambda each: each.strip(b" \t"))
fields = st.lists(st.tuples(token, value), max_size=4).map(tuple)
metadata = st.dictionaries(st.text("abc", min_size=1, max_size=3), json, max_size=3).map(
    lambda said: msgspec.json.encode(said, order="deterministic") if said else b""
)
words = st.text(max_size=10)
allows = st.builds(
    Decision,
    verdict=st.just(ALLOW), headers=fields, response_headers=fields,
    headers_to_remove=st.lists(token, max_size=3).map(tuple),
    query_set=st.lists(st.tuples(words, words), max_size=2).map(tuple), query_remove=st.lists(words, max_size=2).map(tuple),
    reason=words, rule=words, revision=words, metadata=metadata,
)  # fmt: skip
denies = st.builds(
    Decision,
    verdict=st.just(DENY), status=st.just(0) | st.integers(200, 599), headers=fields, body=words.map(str.encode), reason=words, rule=words,
    revision=words, metadata=metadata,
)  # fmt: skip


@given(allows | denies)
def test_a_decision_survives_the_wire(decision: Decision) -> None:
    sent = check_response(decision).SerializeToString()
    got = decision_of_check(CheckResponse.FromString(sent))
    assert msgspec.structs.replace(got, metadata=b"") == msgspec.structs.replace(decision, metadata=b"")
    assert (msgspec.json.decode(got.metadata) if got.metadata else {}) == (
        msgspec.json.decode(decision.metadata) if decision.metadata else {}
    )


def test_an_error_is_never_sent_as_an_answer() -> None:
    with pytest.raises(ValueError, match="not an answer"):
        check_response(Decision(verdict=ERROR))


def foreign(code: int = 0, **fields: Any) -> CheckResponse:
    response = CheckResponse(**fields)
    response.status.code = code
    return response


@pytest.mark.parametrize(
    ("response", "verdict"),
    [
        (foreign(), ALLOW),
        (foreign(ok_response={}), ALLOW),
        (foreign(7), DENY),
        (foreign(13), DENY),
        (foreign(7, denied_response={"status": {"code": 401}}), DENY),
        (foreign(0, denied_response={}), ERROR),
        (foreign(7, ok_response={}), DENY),
        (foreign(14, error_response={"body": "down"}), ERROR),
        (foreign(0, error_response={}), ERROR),
        (foreign(0, ok_response={"headers": [{"header": {"key": "x", "value": "a\nb"}}]}), ERROR),
        (foreign(7, denied_response={"headers": [{"header": {"key": "x", "value": "a\nb"}}]}), DENY),
        (foreign(0, ok_response={"headers": [{"header": {"key": "x", "value": "1"}, "append_action": 77}]}), ERROR),
        (foreign(0, ok_response={"headers_to_remove": [":path"]}), ERROR),
    ],
)
def test_what_other_servers_say(response: CheckResponse, verdict: Verdict) -> None:
    assert decision_of_check(response).verdict is verdict


def test_a_denial_without_a_status_is_the_gateways_own() -> None:
    assert decision_of_check(foreign(16)).status == 0
    assert decision_of_check(foreign(16, denied_response={"status": {"code": 401}})).status == 401
    assert decision_of_check(foreign(7, denied_response={"status": {"code": 100}})).status == 0


def option(name: str = "x", *, action: int | None = None, append: bool | None = None) -> dict[str, Any]:
    said: dict[str, Any] = {"header": {"key": name, "value": "1"}}
    if append is not None:
        said["append"] = {"value": append}
    if action is not None:
        said["append_action"] = action
    return said


@pytest.mark.parametrize(
    ("options", "request_side", "answer_side"),
    [
        ([option()], ["set"], ["add"]),
        ([option(action=0)], ["set"], ["add"]),
        ([option(action=1)], ["if_absent"], ["if_absent"]),
        ([option(action=2)], ["set"], ["set"]),
        ([option(action=3)], ["if_present"], ["if_present"]),
        ([option(append=True)], ["append"], ["add"]),
        ([option(append=False)], ["set"], ["set"]),
        ([option(action=1, append=True)], ["append"], ["add"]),
        ([option(append=True), option(action=2)], ["set", "append"], ["add", "set"]),
        (
            [option(action=3), option(action=1), option(append=True)],
            ["if_present", "if_absent", "append"],
            ["add", "if_absent", "if_present"],
        ),
    ],
)
def test_append_actions(options: list[Any], request_side: list[str], answer_side: list[str]) -> None:
    decision = decision_of_check(foreign(0, ok_response={"headers": options, "response_headers_to_add": options}))
    assert [change.action for change in decision.changes] == (request_side if set(request_side) != {"set"} else [])
    assert len(decision.headers) == (len(options) if set(request_side) == {"set"} else 0)
    assert [change.action for change in decision.response_changes] == (answer_side if set(answer_side) != {"add"} else [])
    assert len(decision.response_headers) == (len(options) if set(answer_side) == {"add"} else 0)
    again = decision_of_check(check_response(decision))
    assert again == decision


def test_an_error_may_have_words_of_its_own() -> None:
    said = {"status": {"code": 502}, "headers": [option("retry-after")], "body": "later"}
    decision = decision_of_check(foreign(14, error_response=said))
    assert (decision.verdict, decision.status, decision.headers, decision.body) == (ERROR, 502, ((b"retry-after", b"1"),), b"later")
    assert decision_of_check(foreign(14, error_response={"status": {"code": 200}})).status == 0


def test_metadata_is_bounded() -> None:
    response = foreign()
    response.dynamic_metadata.update({"x": "y" * 100_000})
    assert decision_of_check(response) == Decision(verdict=ALLOW)
    assert meaning({"allowed": False, "dynamic_metadata": {"x": "y" * 100_000}}).metadata == b""
