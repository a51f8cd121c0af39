"""The access log: one line of JSON for each request, with the fields of Istio's and Envoy's JSON log and a few of ours.

Nothing is formatted on the data path: an outcome is queued, and a thread writes it.
"""

from __future__ import annotations

from typing import Any

import msgspec

from mesh.http import RequestHead
from mesh.outcome import Outcome
from mesh.questions import Decision, DecisionQuestion
from telemetry.text import json_line, moment, path_of, shown
from telemetry.writer import LineWriter

CROWDED = 512
"""Outcomes waiting from which on only small ones are queued."""
SMALL = 4096
"""Bytes of header values of a small outcome: what waits must stay bounded in bytes, too."""


class AccessLog:
    """Where outcomes are written to. `LineWriter` has the counts (`writer.dropped`, `writer.failed`)."""

    __slots__ = ("_every", "_query", "_seen", "writer")

    def __init__(self, path: str = "-", *, query: bool = False, every: int = 1) -> None:
        """`path`: a file, or `-` for stdout. `query`: log the query string, too. `every`: one in so many of the requests that
        went well; those that did not are always logged. Raises OSError when the file cannot be opened."""
        self._query = query
        self._every = every
        self._seen = 0
        self.writer: LineWriter[Outcome] = LineWriter(path, self._render)

    def record(self, outcome: Outcome) -> None:
        """Queues an outcome, which nobody may write to from now on."""
        if self._every > 1 and outcome.flag == "-" and outcome.status < 500:
            self._seen += 1
            if self._seen % self._every:
                return
        if len(self.writer) > CROWDED and outcome.head is not None and _weight(outcome.head) > SMALL:
            self.writer.dropped += 1
            return
        self.writer.offer(outcome)

    def _render(self, outcome: Outcome) -> bytes:
        return json_line(fields_of(outcome, query=self._query))


def _weight(head: RequestHead) -> int:
    return sum(len(value) for _, value in head.headers) + len(head.target)


def _decided(asked: DecisionQuestion, answer: Decision) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "policy": asked.policy.name,
        "verdict": answer.verdict.value,
        "kept": answer.kept,
        "shadow": asked.policy.shadow,
    }
    if answer.metadata:
        fields["metadata"] = msgspec.json.decode(answer.metadata)
    return fields


def fields_of(outcome: Outcome, *, query: bool = False) -> dict[str, Any]:
    """The fields of one line, in the order in which they are written."""
    request, peer, caller = outcome.head, outcome.peer, outcome.caller
    fields: dict[str, Any] = {
        "start_time": moment(outcome.started),
        "method": None,
        "path": None,
        "protocol": None,
        "response_code": outcome.status,
        "response_flags": outcome.flag,
        "response_code_details": outcome.details,
        "reason": outcome.reason or None,
        "refused_by_limit": outcome.limit or None,
        "bytes_received": outcome.bytes_received,
        "bytes_sent": outcome.bytes_sent,
        "duration": round(outcome.duration * 1000.0, 3),
        "upstream_service_time": round(outcome.upstream_duration * 1000.0, 3) if outcome.upstream_duration >= 0 else None,
        "x_forwarded_for": None,
        "user_agent": None,
        "request_id": shown(outcome.request_id) or None,
        "traceparent": shown(outcome.trace) or None,
        "authority": None,
        "gateway": outcome.gateway,
        "listener": outcome.listener,
        "route_name": outcome.route or None,
        "path_template": outcome.template or None,
        "service": outcome.service or None,
        "upstream_cluster": outcome.cluster or None,
        "upstream_host": outcome.endpoint or None,
        "upstream_peer_principal": outcome.upstream_principal or None,
        "upstream_request_attempt_count": outcome.attempts,
        "grpc_status": outcome.grpc_status or None,
        "downstream_remote_address": f"{peer.address}:{peer.port}",
        "downstream_local_address": f"{peer.local_address}:{peer.local_port}",
        "downstream_tls_version": peer.tls_version or None,
        "requested_server_name": shown(peer.sni.encode("utf-8", "replace")) or None,
        "downstream_peer_principal": peer.principal or None,
        "downstream_peer_serial": peer.serial or None,
        "caller": (caller.principal if caller is not None else peer.principal) or None,
        "request_principal": (request.bearer.principal or None) if request is not None and request.bearer is not None else None,
        "via": (caller.via if caller is not None else "") or None,
        "policy": [_decided(asked, answer) for asked, answer in outcome.decisions],
        "quota": [
            {"limit": asked.limit.name, "admitted": grant.admitted, "shadow": asked.limit.shadow, "error": grant.error or None}
            for asked, grant in outcome.grants
        ],
    }
    if request is not None:
        fields["method"] = shown(request.method)
        fields["path"] = path_of(request, query=query)
        fields["protocol"] = shown(request.version)
        fields["x_forwarded_for"] = shown(request.header(b"x-forwarded-for"))
        fields["user_agent"] = shown(request.header(b"user-agent"))
        fields["authority"] = shown(request.authority)
    return fields
