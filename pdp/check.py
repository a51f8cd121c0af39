"""A decision as an answer of envoy.service.auth.v3.Authorization, and back.

An error is not an answer there: it is a gRPC status (`pdp.service` ends the call with one), which every Envoy counts as an error. Of a
foreign server's answers all are understood; an allow that asks for a change which can't be made here is an error, a denial stays one.

What the protocol has no field for travels in the dynamic metadata, under `tollhouse.dev`: the rule and the revision that answered.
Envoy shows it to its access log (`%DYNAMIC_METADATA(envoy.filters.http.ext_authz:tollhouse.dev:rule)%`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final, Literal

import msgspec
from envoy.config.core.v3.base_pb2 import HeaderValueOption
from envoy.service.auth.v3.external_auth_pb2 import CheckResponse
from google.protobuf.json_format import MessageToDict, ParseError
from google.protobuf.struct_pb2 import Struct

from mesh.http import Header
from mesh.questions import Decision, FieldChange, Verdict
from pdp.answer import error
from pdp.fields import MOST_BODY, MOST_BYTES, MOST_FIELDS, MOST_METADATA, field_problem, name_problem, size_problem

OURS: Final = "tollhouse.dev"
"""Key of the dynamic metadata that is ours."""
_PERMISSION_DENIED: Final = 7
_UNAUTHENTICATED: Final = 16
_ACTION: Final = HeaderValueOption.HeaderAppendAction
Action = Literal["set", "add", "append", "if_absent", "if_present"]
_ACTIONS: Final[dict[int, Action]] = {
    _ACTION.APPEND_IF_EXISTS_OR_ADD: "add",
    _ACTION.ADD_IF_ABSENT: "if_absent",
    _ACTION.OVERWRITE_IF_EXISTS_OR_ADD: "set",
    _ACTION.OVERWRITE_IF_EXISTS: "if_present",
}
_RESPONSE_ORDER: Final = ("add", "set", "if_absent", "if_present", "append")
"""Envoy's, whatever the order in the answer."""


def check_response(decision: Decision) -> CheckResponse:
    """The answer to send for an allow or a denial. Raises ValueError for an error, which has no such form."""
    response = CheckResponse()
    if decision.verdict is Verdict.ERROR:
        raise ValueError("an error is not an answer")
    if decision.verdict is Verdict.ALLOW:
        ok = response.ok_response
        ok.SetInParent()
        for field in decision.headers:
            _put(ok.headers.add(append_action=_ACTION.OVERWRITE_IF_EXISTS_OR_ADD), field)
        for change in decision.changes:
            _put_change(ok.headers.add(), change)
        ok.headers_to_remove.extend(name.decode() for name in decision.headers_to_remove)
        for field in decision.response_headers:
            _put(ok.response_headers_to_add.add(), field)
        for change in decision.response_changes:
            _put_change(ok.response_headers_to_add.add(), change)
        for key, value in decision.query_set:
            ok.query_parameters_to_set.add(key=key, value=value)
        ok.query_parameters_to_remove.extend(decision.query_remove)
    else:
        denied = response.denied_response
        denied.SetInParent()
        response.status.code = _UNAUTHENTICATED if decision.status == 401 else _PERMISSION_DENIED
        if decision.status:
            denied.status.code = decision.status
        for field in decision.headers:
            _put(denied.headers.add(append_action=_ACTION.APPEND_IF_EXISTS_OR_ADD), field)
        denied.body = decision.body.decode("utf-8", "replace")
    response.status.message = decision.reason
    if decision.metadata:
        _fill(response.dynamic_metadata, {key: value for key, value in msgspec.json.decode(decision.metadata).items() if key != OURS})
    if decision.rule or decision.revision:
        ours = response.dynamic_metadata.fields[OURS].struct_value.fields
        if decision.rule:
            ours["rule"].string_value = decision.rule
        if decision.revision:
            ours["revision"].string_value = decision.revision
    return response


def decision_of_check(response: CheckResponse) -> Decision:
    """What an ext_authz server's answer means. Total."""
    kind = response.WhichOneof("http_response")
    allowed = response.status.code == 0
    problems: list[str] = []
    if kind == "error_response":
        return _failed(response, problems)
    if allowed and kind == "denied_response":
        return error("provider", "the server's answer has an OK status and a denial")
    metadata, rule, revision = _metadata(response, problems)
    if not allowed:
        return _denied(response, problems, metadata, rule, revision)
    ok = response.ok_response
    headers, changes = _request_changes(ok.headers, problems)
    response_headers, response_changes = _response_changes(ok.response_headers_to_add, problems)
    decision = Decision(
        verdict=Verdict.ALLOW,
        headers=headers,
        changes=changes,
        headers_to_remove=tuple(_names(ok.headers_to_remove, problems)) if ok.headers_to_remove else (),
        response_headers=response_headers,
        response_changes=response_changes,
        query_set=tuple([(parameter.key, parameter.value) for parameter in ok.query_parameters_to_set]),
        query_remove=tuple(ok.query_parameters_to_remove),
        metadata=metadata,
        reason=response.status.message,
        rule=rule,
        revision=revision,
    )
    if problem := size_problem(decision):
        problems.append(problem)
    if problems:
        return error("provider", f"the server allows, but its answer can't be used: {'; '.join(problems[:3])}", revision)
    return decision


def _denied(response: CheckResponse, problems: list[str], metadata: bytes, rule: str, revision: str) -> Decision:
    denied = response.denied_response
    headers, body = _local(denied, problems)
    status = denied.status.code
    if status and not 200 <= status <= 599:
        problems.append(f"{status} is not a status of HTTP")
        status = 0
    reason = response.status.message
    if problems:
        reason = f"{reason} (left off: {'; '.join(problems[:3])})".lstrip()
    return Decision(
        verdict=Verdict.DENY, status=status, headers=headers, body=body, reason=reason, rule=rule, revision=revision, metadata=metadata
    )


def _failed(response: CheckResponse, problems: list[str]) -> Decision:
    """The server says that it could not decide: with a status, fields and a body for a client that is refused for it."""
    failed = response.error_response
    headers, body = _local(failed, problems)
    status = failed.status.code
    reason = response.status.message or "the server said that it could not decide"
    return Decision(
        verdict=Verdict.ERROR, cause="provider", status=status if 400 <= status <= 599 else 0, headers=headers, body=body, reason=reason
    )


def _local(said: Any, problems: list[str]) -> tuple[tuple[Header, ...], bytes]:
    """Fields and body of an answer that the client gets in place of the upstream's. Every field is one more, whatever its append action
    says: what a denial's fields could replace is the gateway's own."""
    headers = tuple([(change.name, change.value) for change in _options(said.headers, problems)])
    if len(headers) > MOST_FIELDS or sum(len(name) + len(value) for name, value in headers) > MOST_BYTES:
        problems.append("too many headers")
        headers = ()
    body = said.body.encode()
    if len(body) > MOST_BODY:
        problems.append("its body is too long")
        body = b""
    return headers, body


def _put(option: HeaderValueOption, field: Header) -> None:
    name, value = field
    option.header.key = name.decode()
    try:
        option.header.value = value.decode()
    except UnicodeDecodeError:
        option.header.raw_value = value
    if not value:
        option.keep_empty_value = True


def _put_change(option: HeaderValueOption, change: FieldChange) -> None:
    if change.action == "append":
        option.append.value = True
    else:
        option.append_action = next(number for number, action in _ACTIONS.items() if action == change.action)
    _put(option, (change.name, change.value))


def _request_changes(options: Iterable[HeaderValueOption], problems: list[str]) -> tuple[tuple[Header, ...], tuple[FieldChange, ...]]:
    """What an allow changes of the request: fields that are plainly set, or all changes in the order in which they are made.

    As in Envoy, `append: true` comes after all others, and a field without a word about it is set.
    """
    made = _options(options, problems)
    if not made:
        return (), ()
    order = [_as(change, "set") if change.action == "add" else change for change in made]
    order.sort(key=lambda change: change.action == "append")
    if all(change.action == "set" for change in order):
        return tuple([(change.name, change.value) for change in order]), ()
    return (), tuple(order)


def _response_changes(options: Sequence[HeaderValueOption], problems: list[str]) -> tuple[tuple[Header, ...], tuple[FieldChange, ...]]:
    """What an allow changes of the upstream's answer: fields that are added, or all changes in the order in which they are made."""
    if not options:
        return (), ()
    made = [_as(change, "add") if change.action == "append" else change for change in _options(options, problems)]
    made.sort(key=lambda change: _RESPONSE_ORDER.index(change.action))
    if all(change.action == "add" for change in made):
        return tuple([(change.name, change.value) for change in made]), ()
    return (), tuple(made)


def _options(options: Iterable[HeaderValueOption], problems: list[str]) -> list[FieldChange]:
    changes = []
    for option in options:
        name = option.header.key.lower().encode()
        value = (option.header.raw_value or option.header.value.encode()).strip(b" \t")
        action = _ACTIONS.get(option.append_action)
        if option.HasField("append"):  # the older word for it, which goes before the newer one
            action = "append" if option.append.value else "set"
        if action is None:
            problems.append(f"the header {option.header.key} asks for the append action {option.append_action}, which there is not")
        elif problem := field_problem(name, value):
            problems.append(problem)
        else:
            changes.append(FieldChange(name, value, action))
    return changes


def _as(change: FieldChange, action: Action) -> FieldChange:
    return FieldChange(change.name, change.value, action)


def _names(names: Iterable[str], problems: list[str]) -> Iterable[bytes]:
    for name in names:
        lower = name.lower().encode()
        if problem := name_problem(lower):
            problems.append(problem)
        else:
            yield lower


def _metadata(response: CheckResponse, problems: list[str]) -> tuple[bytes, str, str]:
    """Dynamic metadata as JSON, and of ours the rule and the revision."""
    if not response.HasField("dynamic_metadata") and not response.ok_response.HasField("dynamic_metadata"):
        return b"", "", ""
    struct = response.dynamic_metadata if response.HasField("dynamic_metadata") else response.ok_response.dynamic_metadata
    fields = struct.fields
    if len(fields) == 1 and OURS in fields:  # as nearly always, and told much quicker than by `MessageToDict`
        told = fields[OURS].struct_value.fields
        return b"", _text(told, "rule"), _text(told, "revision")
    try:
        said: dict[str, Any] = MessageToDict(struct)
    except (ValueError, RecursionError) as problem:
        problems.append(f"its dynamic metadata can't be read ({problem})")
        return b"", "", ""
    ours = said.pop(OURS, None)
    rule, revision = (ours.get("rule"), ours.get("revision")) if isinstance(ours, dict) else (None, None)
    metadata = msgspec.json.encode(_whole(said), order="deterministic") if said else b""
    if len(metadata) > MOST_METADATA:
        metadata = b""  # for logs alone: nothing depends on it
    return metadata, rule if isinstance(rule, str) else "", revision if isinstance(revision, str) else ""


def _text(fields: Any, name: str) -> str:
    value: str = fields[name].string_value if name in fields else ""
    return value


def _whole(value: Any) -> Any:
    """Numbers of a protobuf Struct are floating-point: whole ones become integers again."""
    if isinstance(value, dict):
        return {key: _whole(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_whole(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else value


def _fill(struct: Struct, values: dict[str, Any]) -> None:
    try:
        struct.update(values)
    except (ValueError, TypeError, OverflowError, ParseError) as problem:
        raise ValueError(f"dynamic metadata that protobuf can't carry: {problem}") from problem
