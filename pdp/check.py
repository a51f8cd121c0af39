"""A decision as an answer of envoy.service.auth.v3.Authorization, and back.

An error is not an answer there: it is a gRPC status (`pdp.service` ends the call with one), which every Envoy counts as an error. Of a
foreign server's answers all are understood; an allow that asks for a change which can't be made here is an error, a denial stays one.

What the protocol has no field for travels in the dynamic metadata, under `tollhouse.dev`: the rule and the revision that answered.
Envoy shows it to its access log (`%DYNAMIC_METADATA(envoy.filters.http.ext_authz:tollhouse.dev:rule)%`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import msgspec
from envoy.config.core.v3.base_pb2 import HeaderValueOption
from envoy.service.auth.v3.external_auth_pb2 import CheckResponse
from google.protobuf.json_format import MessageToDict, ParseError
from google.protobuf.struct_pb2 import Struct

from mesh.http import Header
from mesh.questions import Decision, Verdict
from pdp.answer import error
from pdp.fields import MOST_BODY, MOST_BYTES, MOST_FIELDS, field_problem, name_problem

OURS: Final = "tollhouse.dev"
"""Key of the dynamic metadata that is ours."""
_PERMISSION_DENIED: Final = 7
_UNAUTHENTICATED: Final = 16
_ACTION: Final = HeaderValueOption.HeaderAppendAction


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
        for field in decision.headers_to_add:
            option = ok.headers.add()
            option.append.value = True
            _put(option, field)
        ok.headers_to_remove.extend(name.decode() for name in decision.headers_to_remove)
        for field in decision.response_headers:
            _put(ok.response_headers_to_add.add(), field)
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
    metadata: dict[str, Any] = msgspec.json.decode(decision.metadata) if decision.metadata else {}
    ours = {key: value for key, value in (("rule", decision.rule), ("revision", decision.revision)) if value}
    if ours:
        metadata[OURS] = ours
    if metadata:
        _fill(response.dynamic_metadata, metadata)
    return response


def decision_of_check(response: CheckResponse) -> Decision:
    """What an ext_authz server's answer means. Total."""
    kind = response.WhichOneof("http_response")
    allowed = response.status.code == 0
    if kind == "error_response":
        return error("provider", response.status.message or response.error_response.body or "the server said that it could not decide")
    if allowed and kind == "denied_response":
        return error("provider", "the server's answer has an OK status and a denial")
    problems: list[str] = []
    metadata, rule, revision = _metadata(response, problems)
    if not allowed:
        return _denied(response, problems, metadata, rule, revision)
    ok = response.ok_response
    replaced = [option for option in ok.headers if not option.append.value]
    decision = Decision(
        verdict=Verdict.ALLOW,
        headers=_fields(replaced, problems, (_ACTION.APPEND_IF_EXISTS_OR_ADD, _ACTION.OVERWRITE_IF_EXISTS_OR_ADD)),
        headers_to_add=_fields((option for option in ok.headers if option.append.value), problems, (_ACTION.APPEND_IF_EXISTS_OR_ADD,)),
        headers_to_remove=tuple(_names(ok.headers_to_remove, problems)),
        response_headers=_fields(ok.response_headers_to_add, problems, (_ACTION.APPEND_IF_EXISTS_OR_ADD,)),
        query_set=tuple((parameter.key, parameter.value) for parameter in ok.query_parameters_to_set),
        query_remove=tuple(ok.query_parameters_to_remove),
        metadata=metadata,
        reason=response.status.message,
        rule=rule,
        revision=revision,
    )
    problems += [
        f"the header {option.header.key} of the answer would have to be replaced, which is not done here"
        for option in ok.response_headers_to_add
        if option.HasField("append") and not option.append.value
    ]
    fields = (*decision.headers, *decision.headers_to_add, *decision.response_headers)
    if len(fields) > MOST_FIELDS or sum(len(name) + len(value) for name, value in fields) > MOST_BYTES:
        problems.append("it changes too many headers")
    if problems:
        return error("provider", f"the server allows, but its answer can't be used: {'; '.join(problems[:3])}", revision)
    return decision


def _denied(response: CheckResponse, problems: list[str], metadata: bytes, rule: str, revision: str) -> Decision:
    denied = response.denied_response
    headers = _fields(denied.headers, problems, _ACTION.values())
    if len(headers) > MOST_FIELDS or sum(len(name) + len(value) for name, value in headers) > MOST_BYTES:
        problems.append("too many headers")
        headers = ()
    body = denied.body.encode()
    if len(body) > MOST_BODY:
        problems.append("its body is too long")
        body = b""
    status = denied.status.code
    if status and not 200 <= status <= 599:
        problems.append(f"{status} is not a status of HTTP")
        status = 0
    if not status and response.status.code == _UNAUTHENTICATED:
        status = 401
    reason = response.status.message
    if problems:
        reason = f"{reason} (left off: {'; '.join(problems[:3])})".lstrip()
    return Decision(
        verdict=Verdict.DENY, status=status, headers=headers, body=body, reason=reason, rule=rule, revision=revision, metadata=metadata
    )


def _put(option: HeaderValueOption, field: Header) -> None:
    name, value = field
    option.header.key = name.decode()
    try:
        option.header.value = value.decode()
    except UnicodeDecodeError:
        option.header.raw_value = value
    if not value:
        option.keep_empty_value = True


def _fields(options: Iterable[HeaderValueOption], problems: list[str], known: Iterable[int]) -> tuple[Header, ...]:
    fields = []
    for option in options:
        name = option.header.key.lower().encode()
        value = (option.header.raw_value or option.header.value.encode()).strip(b" \t")
        if option.append_action not in known:
            problems.append(f"the header {option.header.key} asks for append action {option.append_action}, which is not done here")
        elif problem := field_problem(name, value):
            problems.append(problem)
        else:
            fields.append((name, value))
    return tuple(fields)


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
    try:
        said: dict[str, Any] = MessageToDict(struct)
    except (ValueError, RecursionError) as problem:
        problems.append(f"its dynamic metadata can't be read ({problem})")
        return b"", "", ""
    ours = said.pop(OURS, None)
    rule, revision = (ours.get("rule"), ours.get("revision")) if isinstance(ours, dict) else (None, None)
    metadata = msgspec.json.encode(_whole(said), order="deterministic") if said else b""
    return metadata, rule if isinstance(rule, str) else "", revision if isinstance(revision, str) else ""


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
