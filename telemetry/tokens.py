"""Metrics of tokens and of the keys that they are verified by."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

from telemetry.record import Telemetry


class TokenMetrics:
    """What `identity.authenticator` and `identity.jwks` report to. One for a process."""

    __slots__ = ("_fetches", "_tokens")

    def __init__(self, telemetry: Telemetry) -> None:
        self._tokens = telemetry.counter("tollhouse_jwt_tokens_total", "Tokens of requests, by issuer and result.", ("issuer", "result"))
        self._fetches = telemetry.counter("tollhouse_jwks_fetches_total", "Fetches of key sets.", ("source", "result"))

    def judged(self, issuer: str, result: str) -> None:
        """A token was judged by a rule of `issuer`; empty when no rule was its own."""
        self._tokens.inc((issuer, result))

    def fetched(self, source: str, result: str) -> None:
        """A fetch ended: `ok` or `failed`."""
        self._fetches.inc((source, result))


def show_keys(telemetry: Telemetry, state: Callable[[], Iterable[dict[str, Any]]], kept: Callable[[], int]) -> None:
    """Has the metrics page show the sources of keys (`identity.jwks.KeyStore.state`), and how many verified tokens are kept."""

    def reading(value: Callable[[dict[str, Any]], float | None]) -> Callable[[], dict[tuple[str, ...], float]]:
        return lambda: {(each["source"],): found for each in state() if (found := value(each)) is not None}

    def fetched(each: dict[str, Any]) -> float | None:
        return None if each["age"] is None else time.time() - each["age"]

    telemetry.gauge_function(
        "tollhouse_jwks_keys",
        "Usable keys in hand; those of several workers are added up.",
        reading(lambda each: each["keys"]),
        ("source",),
    )
    telemetry.gauge_function(
        "tollhouse_jwks_fetched_timestamp_seconds",
        "When the keys in hand were fetched; by the worker with the oldest.",
        reading(fetched),
        ("source",),
    )
    telemetry.gauge_function("tollhouse_jwt_tokens_kept", "Verified tokens that are kept.", kept)
