"""Istio's standard metrics (istio.io, "Istio Standard Metrics"), and ours for decisions and tokens, from outcomes.

A gateway reports as `source`, which is what Istio's gateways do. The source is the original caller and the destination the
service; a workload is named by its service account, the one name of it that is proven. `gateway` says who reported, so that a request
through two gateways is not taken for two.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator

from mesh.outcome import Outcome
from telemetry.metrics import OVERFLOW, Counter, Distribution, Labels, bucket_heads, head, label_text

BOUNDS = (0.5, 1, 5, 10, 25, 50, 100, 250, 500, 1000, 2500, 5000, 10000, 30000, 60000, 300000, 600000, 1800000, 3600000)
"""Envoy's default histogram buckets, for milliseconds and bytes alike."""

LABELS = (
    "reporter",
    "gateway",
    "source_workload",
    "source_workload_namespace",
    "source_principal",
    "source_app",
    "source_version",
    "source_canonical_service",
    "source_canonical_revision",
    "source_cluster",
    "destination_workload",
    "destination_workload_namespace",
    "destination_principal",
    "destination_app",
    "destination_version",
    "destination_service",
    "destination_service_name",
    "destination_service_namespace",
    "destination_canonical_service",
    "destination_canonical_revision",
    "destination_cluster",
    "request_protocol",
    "response_code",
    "grpc_response_status",
    "response_flags",
    "connection_security_policy",
)

REQUESTS = "istio_requests_total"
DURATION = "istio_request_duration_milliseconds"
REQUEST_BYTES = "istio_request_bytes"
RESPONSE_BYTES = "istio_response_bytes"
TCP_OPENED = "istio_tcp_connections_opened_total"
TCP_CLOSED = "istio_tcp_connections_closed_total"
TCP_SENT = "istio_tcp_sent_bytes_total"
TCP_RECEIVED = "istio_tcp_received_bytes_total"

MAX_SERIES = 4096
OVERFLOW_SERIES = 256
"""More series, without caller and destination, once `MAX_SERIES` are there; past them all is one."""

UNKNOWN = "unknown"

Key = tuple[str, str, str, str, int, str, str, bool]
"""Gateway, caller, service, upstream principal, status, flag, gRPC status (`-` for HTTP), mutual TLS."""


_FLAG = ("false", "true")


class Series:
    """The counts of one combination of labels; the data path adds to them."""

    __slots__ = ("count", "duration", "received", "sent")

    def __init__(self) -> None:
        self.count = 0
        self.duration = Distribution(len(BOUNDS))
        self.received = Distribution(len(BOUNDS))
        self.sent = Distribution(len(BOUNDS))


class RequestMetrics:
    """Takes outcomes in, gives pages out: a `telemetry.metrics.Family` of four metrics that share their labels."""

    __slots__ = ("_max_series", "_series", "decisions", "overflowed", "tokens")

    name = REQUESTS

    def __init__(self, decisions: Counter, tokens: Counter, max_series: int = MAX_SERIES) -> None:
        self._series: dict[Key, Series] = {}
        self._max_series = max_series
        self.overflowed = 0
        self.decisions = decisions
        self.tokens = tokens

    def record(self, outcome: Outcome) -> None:
        """Counts one request. No text is made here: labels are written when the page is."""
        caller, peer = outcome.caller, outcome.peer
        key = (
            outcome.gateway,
            caller.principal if caller is not None else peer.principal,
            outcome.service,
            outcome.upstream_principal,
            outcome.status,
            outcome.flag,
            outcome.grpc_status if _is_grpc(outcome) else "-",
            peer.certificate_hash != "",
        )
        series = self._series.get(key)
        if series is None:
            series = self._new(key)
        series.count += 1
        milliseconds = outcome.duration * 1000.0
        kept = series.duration
        kept.counts[bisect_left(BOUNDS, milliseconds)] += 1
        kept.total += milliseconds
        kept = series.received
        kept.counts[bisect_left(BOUNDS, outcome.bytes_received)] += 1
        kept.total += outcome.bytes_received
        kept = series.sent
        kept.counts[bisect_left(BOUNDS, outcome.bytes_sent)] += 1
        kept.total += outcome.bytes_sent
        for asked, decision in outcome.decisions:
            policy = asked.policy
            self.decisions.inc((policy.name, decision.verdict.value, _FLAG[decision.kept], _FLAG[policy.shadow]))
        for question, grant in outcome.grants:
            limit = question.limit
            result = "error" if grant.error else "admitted" if grant.admitted else "refused"
            self.tokens.inc((limit.name, result, _FLAG[limit.shadow]))

    def _new(self, key: Key) -> Series:
        if len(self._series) >= self._max_series:
            self.overflowed += 1
            gateway, _, _, _, status, flag, grpc, mutual = key
            key = (gateway, OVERFLOW, OVERFLOW, OVERFLOW, status, flag, grpc, mutual)
            if key not in self._series and len(self._series) >= self._max_series + OVERFLOW_SERIES:
                key = (OVERFLOW, OVERFLOW, OVERFLOW, OVERFLOW, 0, OVERFLOW, "-", False)
        return self._series.setdefault(key, Series())

    def lines(self) -> Iterator[str]:
        """As `telemetry.metrics.Family.lines`."""
        everything = [(label_text(LABELS, labels_of(key)), series) for key, series in tuple(self._series.items())]
        yield head(REQUESTS, "Requests, by who asked whom and what came of it.", "counter")
        for text, series in everything:
            yield f"{REQUESTS}{text} {series.count}\n"
        yield head(DURATION, "Milliseconds from a request's first byte to its answer's last.", "histogram")
        for text, series in everything:
            yield series.duration.lines(bucket_heads(DURATION, text, BOUNDS), DURATION, text)
        yield head(REQUEST_BYTES, "Bytes of request bodies.", "histogram")
        for text, series in everything:
            yield series.received.lines(bucket_heads(REQUEST_BYTES, text, BOUNDS), REQUEST_BYTES, text)
        yield head(RESPONSE_BYTES, "Bytes of response bodies.", "histogram")
        for text, series in everything:
            yield series.sent.lines(bucket_heads(RESPONSE_BYTES, text, BOUNDS), RESPONSE_BYTES, text)


def _is_grpc(outcome: Outcome) -> bool:
    if outcome.grpc_status:
        return True
    request = outcome.head
    if request is None or request.method != b"POST":
        return False
    # A loop and no call of `header`: this is run for every POST.
    for name, value in request.headers:
        if name == b"content-type":
            return value.startswith(b"application/grpc") and value[16:17] in {b"", b"+", b";", b" "}
    return False


def labels_of(key: Key) -> Labels:
    """The text of each of `LABELS` for a key."""
    gateway, caller, service, upstream, status, flag, grpc, mutual = key
    source, source_namespace = workload(caller)
    destination, destination_namespace = workload(upstream)
    namespace, slash, name = service.partition("/")
    if not slash:
        namespace, name = UNKNOWN if service != OVERFLOW else OVERFLOW, service or UNKNOWN
    if not upstream:
        destination, destination_namespace = name, namespace
    return (
        "source",
        gateway,
        source,
        source_namespace,
        caller or UNKNOWN,
        source,
        UNKNOWN,
        source,
        "latest",
        UNKNOWN,
        destination,
        destination_namespace,
        upstream or UNKNOWN,
        name,
        UNKNOWN,
        f"{name}.{namespace}" if slash else name,
        name,
        namespace,
        name,
        "latest",
        UNKNOWN,
        "http" if grpc == "-" else "grpc",
        str(status),
        "" if grpc == "-" else grpc,
        flag,
        "mutual_tls" if mutual else "none",
    )


def workload(principal: str) -> tuple[str, str]:
    """The service account and the namespace of a SPIFFE ID; `unknown` where it names none."""
    if principal == OVERFLOW:
        return OVERFLOW, OVERFLOW
    parts = principal.split("/")
    if len(parts) == 7 and parts[0] == "spiffe:" and parts[3] == "ns" and parts[5] == "sa":
        return parts[6], parts[4]
    return UNKNOWN, UNKNOWN
