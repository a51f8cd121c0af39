"""Istio's standard TCP metrics (istio.io, "Istio Standard Metrics") for the connections of clients: how many, and how many bytes.

The destination of a connection is the gateway that accepts it. Bytes are those inside TLS, heads and framing included, and are counted
when a connection ends.
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
    "destination_app",
    "request_protocol",
    "response_flags",
    "connection_security_policy",
)
MAX_SERIES = 2048

Key = tuple[str, str, bool]
"""Gateway, the peer's principal, mutual TLS."""


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

    def opened(self, gateway: str, principal: str, mutual: bool) -> None:
        """A client's connection has been accepted, and it is known who it is."""
        self._counts((gateway, principal, mutual)).opened += 1

    def closed(self, gateway: str, principal: str, mutual: bool, received: int, sent: int) -> None:
        """A connection that was `opened` has ended; `received` and `sent` in bytes."""
        counts = self._counts((gateway, principal, mutual))
        counts.closed += 1
        counts.received += received
        counts.sent += sent

    def _counts(self, key: Key) -> _Counts:
        found = self._series.get(key)
        if found is None:
            if len(self._series) >= self._max_series:
                self.overflowed += 1
                key = (key[0], OVERFLOW, key[2])
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
    gateway, principal, mutual = key
    source, source_namespace = workload(principal)
    namespace, _, name = gateway.partition("/")
    security = "mutual_tls" if mutual else "none"
    return "source", gateway, source, source_namespace, principal or UNKNOWN, source, name, namespace, name, "tcp", "-", security
