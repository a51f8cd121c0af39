"""What a process's gateways show of their upstream sides on its metrics page. One for a process, however many gateways it runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Final, Literal, Protocol

from telemetry.metrics import Labels, Reading
from telemetry.record import Telemetry

Gauge = Literal["connections", "waiting", "active", "ejected"]
Count = Literal["connects", "retries", "ejections", "mirrors"]

GAUGES: Final[Mapping[Gauge, str]] = {
    "connections": "Connections to upstreams, open or being made.",
    "waiting": "Requests that wait for a connection.",
    "active": "Requests in progress at upstreams.",
    "ejected": "Endpoints that are left out.",
}
COUNTS: Final[Mapping[Count, str]] = {
    "connects": "Connections made (ok) or not (why).",
    "retries": "Requests that were tried again, by why.",
    "ejections": "Endpoints left out, by why.",
    "mirrors": "Copies of requests, by what became of them.",
}


class Reporting(Protocol):
    """What an upstream side can be asked."""

    def gauge(self, name: Gauge) -> Mapping[str, float]:
        """The present number of each cluster."""
        ...

    def count(self, name: Count) -> Counter[tuple[str, str]]:
        """How often, by cluster and result."""
        ...


class UpstreamReports:
    """Owns the upstream sides that are read for the page, by the `namespace/name` of their gateway."""

    __slots__ = ("sides",)

    def __init__(self, telemetry: Telemetry) -> None:
        self.sides: dict[str, Reporting] = {}
        for gauge, text in GAUGES.items():
            telemetry.gauge_function(f"tollhouse_upstream_{gauge}", text, self._gauge(gauge), ("gateway", "cluster"))
        for count, text in COUNTS.items():
            telemetry.counter_function(f"tollhouse_upstream_{count}_total", text, self._count(count), ("gateway", "cluster", "result"))

    def _gauge(self, name: Gauge) -> Callable[[], Reading]:
        def read() -> dict[Labels, float]:
            return {(key, cluster): value for key, side in self.sides.items() for cluster, value in side.gauge(name).items()}

        return read

    def _count(self, name: Count) -> Callable[[], Reading]:
        def read() -> dict[Labels, float]:
            return {(key, *labels): float(value) for key, side in self.sides.items() for labels, value in side.count(name).items()}

        return read
