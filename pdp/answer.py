"""What a policy's result means: the answer forms of the OPA-Envoy plugin (openpolicyagent.org, "Envoy: Primer", "Output document").

A boolean, or an object with `allowed` (boolean), `headers` (an object of names to a string or strings, or a list of such objects: set on
the request when allowed, on the answer when denied), `response_headers_to_add`, `request_headers_to_remove`,
`query_parameters_to_set`, `query_parameters_to_remove`, `http_status`, `body`, `dynamic_metadata`; of ours also `reason` and `rule`, for
people. Other keys are the policy's own.

Nothing else is an answer: undefined, a string, an object without `allowed` are errors, never a denial and never an allow. A denial stays
one whatever else is wrong with it: what can't be used of it is left off, and its reason says so. An allow whose changes can't be made is
an error, because the upstream would get a request that the policy did not mean.
"""

from __future__ import annotations

from typing import Any

import msgspec

from mesh.http import Header
from mesh.questions import Decision, Verdict
from pdp.engines.engine import Evaluation
from pdp.fields import MOST_BODY, MOST_METADATA, field_problem, name_problem, size_problem

_ALLOW = Decision(verdict=Verdict.ALLOW)
_DENY = Decision(verdict=Verdict.DENY)
_decode = msgspec.json.Decoder().decode
_encode = msgspec.json.Encoder(order="deterministic").encode


def error(cause: str, reason: str, revision: str = "") -> Decision:
    """The answer to a question that could not be answered; `cause` is one stable word."""
    return Decision(verdict=Verdict.ERROR, cause=cause, reason=reason, revision=revision)


def decision_of(evaluation: Evaluation, path: str, revision: str) -> Decision:
    """The decision that an evaluation of `path` in `revision` (its digest) comes to. Total: whatever a policy says, this has an answer."""
    if evaluation.kind == "error":
        return error(evaluation.reason, evaluation.message, revision)
    if evaluation.kind == "undefined":
        return error("undefined", f"{path} is undefined for this request: the policy needs a rule or a default for it", revision)
    try:
        result = _decode(evaluation.value)
    except (msgspec.DecodeError, RecursionError) as problem:
        return error("internal", f"the result of {path} can't be read: {problem}", revision)
    if isinstance(result, bool):
        return Decision(verdict=Verdict.ALLOW if result else Verdict.DENY, revision=revision)
    if not isinstance(result, dict):
        return error("answer", f"{path} is {_kind(result)}: an answer is a boolean, or an object with `allowed`", revision)
    allowed = result.get("allowed")
    if not isinstance(allowed, bool):
        said = "has no `allowed`" if "allowed" not in result else f"has an `allowed` that is {_kind(allowed)}"
        return error("answer", f"{path} {said}: an answer is a boolean, or an object with `allowed`, true or false", revision)
    return _allow(result, path, revision) if allowed else _deny(result, path, revision)


def _allow(result: dict[str, Any], path: str, revision: str) -> Decision:
    problems: list[str] = []
    decision = Decision(
        verdict=Verdict.ALLOW,
        headers=_fields(result, "headers", problems),
        headers_to_remove=_names(result, "request_headers_to_remove", problems),
        response_headers=_fields(result, "response_headers_to_add", problems),
        query_set=_pairs(result, "query_parameters_to_set", problems),
        query_remove=_removed(result, "query_parameters_to_remove", problems),
        metadata=_metadata(result, problems),
        reason=_text(result, "reason"),
        rule=_text(result, "rule"),
        revision=revision,
    )
    if problem := size_problem(decision):
        problems.append(problem)
    if problems:
        return error("answer", f"{path} allows, but its answer can't be used: {'; '.join(problems[:3])}", revision)
    return decision


def _deny(result: dict[str, Any], path: str, revision: str) -> Decision:
    problems: list[str] = []
    headers = _fields(result, "headers", problems)
    body = result.get("body", "")
    if not isinstance(body, str):
        problems.append(f"`body` is {_kind(body)}, not a string")
        body = ""
    text = body.encode("utf-8", "replace")
    if len(text) > MOST_BODY:
        problems.append(f"`body` has {len(text)} bytes, at most {MOST_BODY} are allowed")
        text = b""
    decision = Decision(
        verdict=Verdict.DENY,
        status=_status(result, problems),
        headers=headers,
        body=text,
        metadata=_metadata(result, problems),
        rule=_text(result, "rule"),
        revision=revision,
    )
    if problem := size_problem(decision):
        problems.append(problem)
        decision = msgspec.structs.replace(decision, headers=())
    reason = _text(result, "reason")
    if problems:
        reason = f"{reason} ({path}: left off: {'; '.join(problems[:3])})".lstrip()
    return msgspec.structs.replace(decision, reason=reason) if reason else decision


def _status(result: dict[str, Any], problems: list[str]) -> int:
    status = result.get("http_status", 0)
    if isinstance(status, float) and status.is_integer():
        status = int(status)
    if isinstance(status, bool) or not isinstance(status, int) or not (status == 0 or 200 <= status <= 599):
        problems.append(f"`http_status` is {_show(status)}, not a status of HTTP")
        return 0
    return status


def _fields(result: dict[str, Any], key: str, problems: list[str]) -> tuple[Header, ...]:
    """The header fields at `key`; names in lower case."""
    if key not in result:
        return ()
    fields: list[Header] = []
    for name, value in _pairs(result, key, problems):
        field = (name.lower().encode("utf-8", "replace"), value.encode("utf-8", "replace").strip(b" \t"))
        if problem := field_problem(*field):
            problems.append(f"`{key}`: {problem}")
        else:
            fields.append(field)
    return tuple(fields)


def _names(result: dict[str, Any], key: str, problems: list[str]) -> tuple[bytes, ...]:
    if key not in result:
        return ()
    names = []
    for name in _strings(result[key], key, problems):
        lower = name.lower().encode("utf-8", "replace")
        if problem := name_problem(lower):
            problems.append(f"`{key}`: {problem}")
        else:
            names.append(lower)
    return tuple(names)


def _removed(result: dict[str, Any], key: str, problems: list[str]) -> tuple[str, ...]:
    return tuple(_strings(result[key], key, problems)) if key in result else ()


def _pairs(result: dict[str, Any], key: str, problems: list[str]) -> tuple[tuple[str, str], ...]:
    """An object of names to a string or strings, or a list of such objects."""
    if key not in result:
        return ()
    said = result[key]
    pairs: list[tuple[str, str]] = []
    for part in said if isinstance(said, list) else [said]:
        if not isinstance(part, dict):
            problems.append(f"`{key}` has {_kind(part)} where an object of names and values belongs")
            continue
        for name, values in part.items():
            if isinstance(values, str):
                pairs.append((name, values))
                continue
            for value in _strings(values if isinstance(values, list) else [values], f"{key}.{name}", problems):
                pairs.append((name, value))
    return tuple(pairs)


def _strings(values: object, key: str, problems: list[str]) -> list[str]:
    if not isinstance(values, list):
        problems.append(f"`{key}` is {_kind(values)}, not a list of strings")
        return []
    wrong = [value for value in values if not isinstance(value, str)]
    if wrong:
        problems.append(f"`{key}` has {_kind(wrong[0])} where a string belongs")
    return [value for value in values if isinstance(value, str)]


def _metadata(result: dict[str, Any], problems: list[str]) -> bytes:
    metadata = result.get("dynamic_metadata")
    if metadata is None:
        return b""
    if not isinstance(metadata, dict):
        problems.append(f"`dynamic_metadata` is {_kind(metadata)}, not an object")
        return b""
    text = _encode(metadata) if metadata else b""
    if len(text) > MOST_METADATA:
        problems.append(f"`dynamic_metadata` has {len(text)} bytes, at most {MOST_METADATA} are allowed")
        return b""
    return text


def _text(result: dict[str, Any], key: str) -> str:
    said = result.get(key, "")
    return said if isinstance(said, str) else _show(said)


def _kind(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, int | float):
        return "a number"
    if isinstance(value, str):
        return "a string"
    return "a list" if isinstance(value, list) else "an object"


def _show(value: object) -> str:
    return msgspec.json.encode(value).decode()[:200]
