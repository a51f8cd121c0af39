"""What a process's gateways show on its metrics page beside their requests. One for a process, however many gateways it runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from telemetry.metrics import Labels
from telemetry.record import Telemetry


class Reporting(Protocol):
    """What a gateway can be asked."""

    key: str
    """`namespace/name`."""

    @property
    def requests(self) -> int:
        """Requests in progress."""
        ...

    def problems(self) -> dict[str, str]:
        """What cannot be served, by listener, and why."""
        ...

    def certificates(self) -> dict[tuple[str, str], float]:
        """When each certificate that is served ends."""
        ...


class Reports:
    """Owns the list of the gateways that are read for the page."""

    __slots__ = ("gateways",)

    def __init__(self, telemetry: Telemetry) -> None:
        self.gateways: list[Reporting] = []
        telemetry.certificates(self._certificates)
        telemetry.gauge_function("tollhouse_requests_active", "Requests in progress.", self._requests, ("gateway",))
        text = "1 for each listener that cannot be served; the log says why."
        telemetry.gauge_function("tollhouse_listener_problems", text, self._problems, ("gateway", "listener"))

    def _certificates(self) -> Mapping[Labels, float]:
        return {labels: ends for gateway in self.gateways for labels, ends in gateway.certificates().items()}

    def _requests(self) -> Mapping[Labels, float]:
        return {(gateway.key,): gateway.requests for gateway in self.gateways}

    def _problems(self) -> Mapping[Labels, float]:
        return {(gateway.key, name): 1 for gateway in self.gateways for name in gateway.problems()}
