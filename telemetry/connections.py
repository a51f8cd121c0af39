"""Istio's standard TCP metrics (istio.io, "Istio Standard Metrics") for the connections of clients: how many, and how many bytes.

The destination of a connection that speaks HTTP is the gateway that accepts it (requests have metrics of their own); of one below HTTP
it is the service that it is passed on to. Bytes are those inside a TLS that ends here, heads and framing included, and are counted when a
connection ends.
"""

from __future__ import annotations

from collections.abc import Iterator

from telemetry.metrics import OVERFLOW, Labels, head, label_text
from telemetry.requests import UNKNOWN, workload

OPENED = "istio_tcp_connections_opened_total"
CLOSED = "istio_tcp_connections_closed_total"
SENT = "istio_tcp_sent_bytes_total"
RECEIVED = "istio_tcp_received_bytes_total"

LABELS = (
    "reporter",
    "gateway",
    "source_workload",
    "source_workload_namespace",
    "source_principal",
    "source_app",
    "destination_workload",
    "destination_workload_namespace",
    "destination_principal",
    "destination_app",
    "destination_service",
    "destination_service_name",
    "destination_service_namespace",
    "request_protocol",
    "response_flags",
    "connection_security_policy",
)
MAX_SERIES = 2048

Key = tuple[str, str, bool, str, str, str]
"""Gateway, the caller's principal, mutual TLS; below HTTP the service (`namespace/name`), the endpoint's principal, the response flag."""


class _Counts:
    __slots__ = ("closed", "opened", "received", "sent")

    def __init__(self) -> None:
        self.opened = self.closed = self.sent = self.received = 0


class ConnectionMetrics:
    """Counts connections: a `telemetry.metrics.Family` of four metrics."""

    __slots__ = ("_max_series", "_series", "overflowed")

    name = OPENED

    def __init__(self, max_series: int = MAX_SERIES) -> None:
        self._series: dict[Key, _Counts] = {}
        self._max_series = max_series
        self.overflowed = 0
        """Connections that were counted without saying whose they were."""

    def opened(self, gateway: str, principal: str, mutual: bool, service: str = "", upstream: str = "", flag: str = "-") -> None:
        """A connection has been accepted (below HTTP: passed on), and it is known who is there. `service`: `namespace/name`, below HTTP;
        `upstream`: what its endpoint proved."""
        self._counts((gateway, principal, mutual, service, upstream, flag)).opened += 1

    def closed(
        self, gateway: str, principal: str, mutual: bool, received: int, sent: int, service: str = "", upstream: str = "", flag: str = "-"
    ) -> None:
        """A connection that was `opened` has ended; `received` and `sent` in bytes, `flag` as in the access log."""
        counts = self._counts((gateway, principal, mutual, service, upstream, flag))
        counts.closed += 1
        counts.received += received
        counts.sent += sent

    def _counts(self, key: Key) -> _Counts:
        found = self._series.get(key)
        if found is None:
            if len(self._series) >= self._max_series:
                self.overflowed += 1
                key = (key[0], OVERFLOW, key[2], "", "", key[5])
            found = self._series.setdefault(key, _Counts())
        return found

    def lines(self) -> Iterator[str]:
        """As `telemetry.metrics.Family.lines`."""
        series = [(label_text(LABELS, labels_of(key)), counts) for key, counts in tuple(self._series.items())]
        for name, text, field in (
            (OPENED, "Connections of clients that were opened.", "opened"),
            (CLOSED, "Connections of clients that were closed.", "closed"),
            (SENT, "Bytes sent on connections that have ended.", "sent"),
            (RECEIVED, "Bytes received on connections that have ended.", "received"),
        ):
            yield head(name, text, "counter")
            for labels, counts in series:
                yield f"{name}{labels} {getattr(counts, field)}\n"


def labels_of(key: Key) -> Labels:
    """The text of each of `LABELS` for a key."""
    gateway, principal, mutual, service, upstream, flag = key
    source, source_namespace = workload(principal)
    namespace, _, name = (service or gateway).partition("/")
    destination, destination_namespace = workload(upstream) if upstream else (name, namespace)
    return (
        "source",
        gateway,
        source,
        source_namespace,
        principal or UNKNOWN,
        source,
        destination,
        destination_namespace,
        upstream or UNKNOWN,
        name,
        f"{name}.{namespace}" if service else UNKNOWN,
        name if service else UNKNOWN,
        namespace if service else UNKNOWN,
        "tcp",
        flag,
        "mutual_tls" if mutual else "none",
    )
