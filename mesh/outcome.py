"""The one record that a request leaves: metrics, access log, decision log and trace are all fed from it."""

from __future__ import annotations

from mesh.http import RequestHead
from mesh.peer import Caller, Peer
from mesh.questions import Decision, DecisionQuestion, Grant, TokenQuestion


class Outcome:
    """Filled in on the request's way, handed to `telemetry` once, at its end. Mutable; its owner is the stream."""

    __slots__ = (
        "attempts",
        "bytes_received",
        "bytes_sent",
        "caller",
        "cluster",
        "decisions",
        "details",
        "duration",
        "endpoint",
        "flag",
        "gateway",
        "grants",
        "grpc_status",
        "head",
        "limit",
        "listener",
        "peer",
        "reason",
        "request_id",
        "response_version",
        "route",
        "service",
        "started",
        "status",
        "template",
        "trace",
        "upstream_duration",
        "upstream_principal",
    )

    def __init__(self, head: RequestHead | None, peer: Peer, gateway: str, listener: str, started: float) -> None:
        self.head = head
        """None when no head could be read."""
        self.peer = peer
        self.caller: Caller | None = None
        self.gateway = gateway
        """`namespace/name`."""
        self.listener = listener
        """Section name."""
        self.started = started
        """Wall clock, seconds since the epoch, of the first byte of the head."""
        self.duration = 0.0
        """Seconds from `started` to the last byte of the answer."""
        self.upstream_duration = -1.0
        """Seconds from the permit to the first byte of the upstream's answer; negative when there was none."""
        self.status = 0
        """What the client got; 0 when it got nothing."""
        self.flag = "-"
        """Response flag, `-` for none."""
        self.details = ""
        """Response code details (`via_upstream` for an answer of the upstream's)."""
        self.reason = ""
        """What a refusal says for the log."""
        self.limit = ""
        """The quota limit that refused it (`namespace/policy/limit`)."""
        self.route = ""
        """The rule's name."""
        self.template = ""
        self.service = ""
        """`namespace/name` of the backend's service."""
        self.cluster = ""
        self.endpoint = ""
        """`address:port` that answered or was tried last."""
        self.upstream_principal = ""
        """SPIFFE ID that the endpoint proved."""
        self.attempts = 0
        """Tries to reach an upstream."""
        self.bytes_received = 0
        """Body bytes from the client."""
        self.bytes_sent = 0
        """Body bytes to the client."""
        self.request_id = b""
        self.trace = b""
        """The `traceparent` that the upstream got."""
        self.grpc_status = ""
        """The answer's `grpc-status`, from its trailers or its head; empty when it had none."""
        self.response_version = ""
        self.decisions: list[tuple[DecisionQuestion, Decision]] = []
        self.grants: list[tuple[TokenQuestion, Grant]] = []
