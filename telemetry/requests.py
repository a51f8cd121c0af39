"""Istio's standard metrics (istio.io, "Istio Standard Metrics"), and ours for decisions and tokens, from outcomes.

A gateway reports as `source`, which is what Istio's gateways do. The source is the original caller and the destination the
service; a workload is named by its service account, the one name of it that is proven. `gateway` says who reported, so that a request
through two gateways is not taken for two.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence

from mesh.outcome import Outcome
from mesh.questions import Decision, DecisionQuestion
from telemetry.metrics import OVERFLOW, Counter, Distribution, Labels, bucket_heads, head, label_text
from telemetry.trials import Trials

MILLISECONDS = (0.5, 1, 5, 10, 25, 50, 100, 250, 500, 1000, 2500, 5000, 10000, 30000, 60000)
"""Envoy's default histogram bounds, as far as a request may take."""
BYTES = (0, 100, 1000, 10_000, 100_000, 1_000_000, 10_000_000, 100_000_000)

LABELS = (
    "reporter",
    "gateway",
    "source_workload",
    "source_workload_namespace",
    "source_principal",
    "source_app",
    "source_version",
    "source_canonical_service",
    "destination_workload",
    "destination_workload_namespace",
    "destination_principal",
    "destination_app",
    "destination_version",
    "destination_service",
    "destination_service_name",
    "destination_service_namespace",
    "destination_canonical_service",
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

MAX_SERIES = 4096
MAX_HISTOGRAMS = 512
"""A series' histograms are forty lines, some 25 kB of page: past so many, callers share theirs, and are still counted one by one."""
OVERFLOW_SERIES = 256
"""Room for what overflows, told apart by gateway, service and status; past that all is one."""

UNKNOWN = "unknown"

Key = tuple[str, str, str, str, int, str, str, bool]
"""Gateway, caller, service, upstream principal, status, flag, gRPC status (`-` for HTTP), mutual TLS."""


_FLAG = ("false", "true")


class Sizes:
    """How long and how large requests were: three histograms with the same labels."""

    __slots__ = ("duration", "received", "sent")

    def __init__(self) -> None:
        self.duration = Distribution(len(MILLISECONDS))
        self.received = Distribution(len(BYTES))
        self.sent = Distribution(len(BYTES))


class Series:
    """The counts of one combination of labels; the data path adds to them."""

    __slots__ = ("count", "sizes")

    def __init__(self, sizes: Sizes) -> None:
        self.count = 0
        self.sizes = sizes


class RequestMetrics:
    """Takes outcomes in, gives pages out: a `telemetry.metrics.Family` of four metrics."""

    __slots__ = ("_max_histograms", "_max_series", "_series", "_sizes", "decisions", "overflowed", "tokens", "trials")

    name = REQUESTS

    def __init__(
        self, decisions: Counter, tokens: Counter, trials: Trials, max_series: int = MAX_SERIES, max_histograms: int = MAX_HISTOGRAMS
    ) -> None:
        self._series: dict[Key, Series] = {}
        self._sizes: dict[Key, Sizes] = {}
        self._max_series = max_series
        self._max_histograms = max_histograms
        self.overflowed = 0
        """Combinations of labels, as they came, that were given no series or no histograms of their own."""
        self.decisions = decisions
        self.tokens = tokens
        self.trials = trials

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
        sizes = series.sizes
        milliseconds = outcome.duration * 1000.0
        kept = sizes.duration
        kept.counts[bisect_left(MILLISECONDS, milliseconds)] += 1
        kept.total += milliseconds
        kept = sizes.received
        kept.counts[bisect_left(BYTES, outcome.bytes_received)] += 1
        kept.total += outcome.bytes_received
        kept = sizes.sent
        kept.counts[bisect_left(BYTES, outcome.bytes_sent)] += 1
        kept.total += outcome.bytes_sent
        self.record_answers(outcome)

    def record_answers(self, outcome: Outcome) -> None:
        """Counts the decisions and grants of a request, or of a connection."""
        for asked, decision in outcome.decisions:
            policy = asked.policy
            self.decisions.inc((policy.name, decision.verdict.value, _FLAG[decision.kept], _FLAG[policy.shadow]))
            if policy.shadow:
                self.trials.compare(outcome, asked, decision)
        for question, grant in outcome.grants:
            limit = question.limit
            result = "error" if grant.error else "admitted" if grant.admitted else "refused"
            self.tokens.inc((limit.name, result, _FLAG[limit.shadow]))

    def record_late(self, outcome: Outcome, asked: DecisionQuestion, decision: Decision) -> None:
        """Counts a decision that nobody waited for, and that came when its request was over."""
        self.decisions.inc((asked.policy.name, decision.verdict.value, _FLAG[decision.kept], _FLAG[asked.policy.shadow]))
        self.trials.compare(outcome, asked, decision)

    def _new(self, key: Key) -> Series:
        if len(self._series) >= self._max_series:
            self.overflowed += 1
            key = _without_caller(key)
            if key not in self._series and len(self._series) >= self._max_series + OVERFLOW_SERIES:
                key = _REST
            if key in self._series:
                return self._series[key]
        made = self._series[key] = Series(self._sizes_of(key))
        return made

    def _sizes_of(self, key: Key) -> Sizes:
        if len(self._sizes) >= self._max_histograms:
            self.overflowed += 1
            key = _without_caller(key)
            if key not in self._sizes and len(self._sizes) >= self._max_histograms + OVERFLOW_SERIES:
                key = _REST
        return self._sizes.setdefault(key, Sizes())

    def lines(self) -> Iterator[str]:
        """As `telemetry.metrics.Family.lines`."""
        yield head(REQUESTS, "Requests, by who asked whom and what came of it.", "counter")
        for key, series in tuple(self._series.items()):
            yield f"{REQUESTS}{label_text(LABELS, labels_of(key))} {series.count}\n"
        everything = [(labels_of(key), sizes) for key, sizes in tuple(self._sizes.items())]
        yield head(DURATION, "Milliseconds from a request's first byte to its answer's last.", "histogram")
        for labels, sizes in everything:
            yield _histogram(DURATION, labels, MILLISECONDS, sizes.duration)
        yield head(REQUEST_BYTES, "Bytes of request bodies.", "histogram")
        for labels, sizes in everything:
            yield _histogram(REQUEST_BYTES, labels, BYTES, sizes.received)
        yield head(RESPONSE_BYTES, "Bytes of response bodies.", "histogram")
        for labels, sizes in everything:
            yield _histogram(RESPONSE_BYTES, labels, BYTES, sizes.sent)


_REST: Key = (OVERFLOW, OVERFLOW, OVERFLOW, OVERFLOW, 0, OVERFLOW, "-", False)


def _without_caller(key: Key) -> Key:
    gateway, _, service, _, status, flag, grpc, mutual = key
    return gateway, OVERFLOW, service, OVERFLOW, status, flag, grpc, mutual


def _histogram(name: str, labels: Labels, bounds: Sequence[float], counts: Distribution) -> str:
    text = label_text(LABELS, labels)
    return counts.lines(bucket_heads(name, text, bounds), name, text)


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
        destination,
        destination_namespace,
        upstream or UNKNOWN,
        name,
        UNKNOWN,
        f"{name}.{namespace}" if slash else name,
        name,
        namespace,
        name,
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
