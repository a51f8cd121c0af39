"""What a lessee tells of itself in metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING

from telemetry.record import Telemetry

if TYPE_CHECKING:
    from quota.lessee import QuotaLessee


def report(lessee: QuotaLessee, telemetry: Telemetry) -> None:
    """Adds the metrics of `lessee`."""
    telemetry.counter_function("tollhouse_quota_asks_total", "Asks sent to the store of buckets.", lambda: lessee.asks + lessee.slots.asks)
    telemetry.counter_function(
        "tollhouse_quota_failures_total",
        "Requests answered by their limit's failure mode, since the store did not.",
        lambda: {(mode,): float(count) for mode, count in lessee.failures.items()},
        ("mode",),
    )
    telemetry.counter_function(
        "tollhouse_quota_store_failures_total",
        "Asks that the store of buckets did not answer, by what was in the way.",
        lambda: {(kind,): float(count) for kind, count in lessee.unanswered.items()},
        ("reason",),
    )
    telemetry.gauge_function("tollhouse_quota_buckets", "Buckets known to this lessee.", lambda: lessee.state()["buckets"])
    telemetry.gauge_function("tollhouse_quota_tokens", "Tokens on lease and not spent.", lambda: lessee.state()["tokens"])
    telemetry.gauge_function(
        "tollhouse_quota_store_open",
        "1 while the store is left alone after failures (its breaker is open).",
        lambda: float(lessee.state()["store"].get("breaker") == "open"),
    )
    telemetry.counter_function(
        "tollhouse_quota_charged_total", "Tokens charged after answers, beyond what was taken in advance.", lambda: lessee.charged
    )
    telemetry.counter_function(
        "tollhouse_quota_uncharged_total",
        "Tokens of these that no bucket has paid: beyond maxDebt (forgiven), or with a store that was gone too long (lost).",
        lambda: {(why,): float(count) for why, count in lessee.uncharged.items()},
        ("why",),
    )
    telemetry.gauge_function("tollhouse_quota_waiting", "Requests that wait for the store.", lambda: lessee.state()["waiting"])
    lessee.slots.report(telemetry)
