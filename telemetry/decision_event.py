"""One event of the decision log, in the shape of OPA's own (openpolicyagent.org, "Decision Logs", "Decision Log Service API").

What OPA has no field for is under `custom`, the place that it leaves for such things: which policy asked, at which level, whether the
answer was kept, and what the request was called.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Mapping
from typing import Any, Final

import msgspec

from mesh.model import DecisionPolicy
from mesh.outcome import Outcome
from mesh.questions import Asking, Decision, DecisionQuestion, FieldChange, Verdict
from telemetry.masks import Event
from telemetry.text import moment, shown

InputOf = Callable[[Asking, DecisionPolicy], Event]
"""Makes the document that a policy saw; in a tree of its own, which may be changed."""

BUNDLE: Final = "tollhouse"
"""The name under which an event has its revision, as OPA has one for each bundle."""

_encode = msgspec.json.Encoder(decimal_format="number").encode
_decode = msgspec.json.Decoder().decode
_BEYOND: Final = re.compile("[\x7f-\U0010ffff]")
_ALLOWED: Final = {Verdict.ALLOW: True, Verdict.DENY: False}


def event_of(outcome: Outcome, asked: DecisionQuestion, decision: Decision, labels: Mapping[str, str], input_of: InputOf) -> Event:
    """The event of one decision of a request, nothing masked yet. `labels` say which process it is of."""
    policy, peer, caller = asked.policy, outcome.peer, outcome.caller
    # What is kept may have been answered by another revision, of which nothing that it can reach has changed since.
    revision = asked.revision.policy if asked.revision is not None else decision.revision
    event: Event = {
        "labels": {**labels, "gateway": outcome.gateway, "listener": outcome.listener},
        "decision_id": str(uuid.uuid4()),
    }
    if outcome.trace:
        event["trace_id"] = outcome.trace[3:35].decode("latin-1")
    if revision:
        event["bundles"] = {BUNDLE: {"revision": revision}}
        if asked.revision is not None:
            event["bundles"] |= {f"data:{root}": {"revision": digest} for root, digest in asked.revision.parts}
    if policy.decision:
        event["path"] = policy.decision.replace(".", "/")
    event["input"] = input_of(asked.asking, policy)
    if decision.verdict in _ALLOWED:
        event["result"] = result_of(decision)
    else:
        event["error"] = {"code": decision.cause or "error", "message": decision.reason}
    event["requested_by"] = f"{peer.address}:{peer.port}"
    event["timestamp"] = moment(outcome.started)
    if decision.seconds:
        event["metrics"] = {"timer_server_handler_ns": int(decision.seconds * 1e9)}
    event["custom"] = {
        "request_id": shown(outcome.request_id) or "",
        "policy": policy.name,
        "level": policy.level,
        "verdict": decision.verdict.value,
        "kept": decision.kept,
        "shadow": policy.shadow,
        "trial": policy.trial,
        "caller": caller.principal if caller is not None else peer.principal,
        "via": caller.via if caller is not None else "",
        "route": outcome.route,
        "service": outcome.service,
        "rule": decision.rule,
        "reason": decision.reason,
        "provider": policy.provider,
        "response_code": outcome.status,
        "response_flags": outcome.flag,
    }
    return event


def result_of(decision: Decision) -> Any:
    """What the policy answered, as far as it means something to a gateway: a boolean, or an object as in OPA-Envoy's answers."""
    allowed = decision.verdict is Verdict.ALLOW
    said: dict[str, Any] = {
        "http_status": decision.status,
        "headers": _fields(decision.headers),
        "header_changes": _changes(decision.changes),
        "request_headers_to_remove": [name.decode("latin-1") for name in decision.headers_to_remove],
        "response_headers_to_add": _fields(decision.response_headers),
        "response_header_changes": _changes(decision.response_changes),
        "query_parameters_to_set": dict(decision.query_set),
        "query_parameters_to_remove": list(decision.query_remove),
        "body": decision.body.decode("utf-8", "replace"),
        "reason": decision.reason,
        "rule": decision.rule,
        "dynamic_metadata": _decode(decision.metadata) if decision.metadata else None,
    }
    there = {name: value for name, value in said.items() if value}
    return {"allowed": allowed, **there} if there else allowed


def _changes(changes: tuple[FieldChange, ...]) -> list[dict[str, str]]:
    """What another ext_authz server asks for, beyond what the plugin's answers can say."""
    return [
        {"header": each.name.decode("latin-1"), "value": each.value.decode("utf-8", "replace"), "action": each.action} for each in changes
    ]


def _fields(headers: tuple[tuple[bytes, bytes], ...]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in headers:
        found.setdefault(name.decode("latin-1"), []).append(value.decode("utf-8", "replace"))
    return {name: values[0] if len(values) == 1 else values for name, values in found.items()}


def event_json(event: Event) -> bytes:
    """The event as JSON, on one line and without a newline. Beyond ASCII all is escaped: a terminal takes some of it for commands."""
    text = _encode(event)
    if not text.isascii() or b"\x7f" in text:
        text = _BEYOND.sub(_escaped, text.decode()).encode()
    return text


def _escaped(match: re.Match[str]) -> str:
    units = match[0].encode("utf-16-be")
    return "".join(f"\\u{units[at]:02x}{units[at + 1]:02x}" for at in range(0, len(units), 2))
