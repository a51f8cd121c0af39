"""Rate-limit services that limits of QuotaPolicies may be asked of instead of our own buckets: `Mesh.extensionProviders` of the kind
`envoyRateLimitGrpc`, and what a policy says for them. They speak `envoy.service.ratelimit.v3`, as Envoy's rate limit filter does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import msgspec

from mesh import formats
from mesh.documents import FieldPath
from mesh.quota_cost import is_after
from mesh.schema import Faults, Items, Text

DOMAIN: Final = "tollhouse"
"""The domain of a service that the Mesh gives none."""
UNITS: Final = {1.0: 1, 60.0: 2, 3600.0: 3, 86_400.0: 4, 2_592_000.0: 5}
"""Seconds, and the number of `RateLimitUnit` (envoy.type.v3): second, minute, hour, day, month (of 30 days)."""
KEYS: Final = Items(Text(least=1, most=256), most=8)
_NO_BUCKET: Final = {
    "burst": "the service's own limits say it",
    "overrides": "the service's own limits say them",
    "overridesFrom": "the service's own limits say them",
    "calendar": "the service counts as it does",
    "concurrency": "nothing tells a service when a request has ended",
    "strict": "the service's store is its own",
}


class RateLimitService(msgspec.Struct, frozen=True, kw_only=True):
    """Where one limit is asked, and as what."""

    cluster: str
    """Name of a cluster of the snapshot; empty when the Mesh has no such provider: then it can't be asked."""
    domain: str = DOMAIN
    keys: tuple[str, ...] = ()
    """The keys of the descriptor's entries, one for each of the limit's `per`. Empty: `limit` with the limit's name comes first, and then
    each of `per` by its kind, as `tollhouse quota` reads them."""
    requests: int = 0
    """Requests a `unit` that the question carries along as the descriptor's limit; 0 when the service knows the limit."""
    unit: int = 0
    """Of `RateLimitUnit`."""


def service_of(spec: Any, limit: Any, services: Mapping[str, RateLimitService]) -> RateLimitService | None:
    """Where a limit of a checked QuotaPolicy is asked; None for our own buckets. `services`: those of the Mesh, by name."""
    name = spec.get("extensionProvider")
    if not name:
        return None
    found = services.get(name) or RateLimitService(cluster="")
    tokens = limit.get("tokens") or 0
    unit = UNITS[formats.seconds(limit.get("interval") or "1s")] if tokens else 0
    return msgspec.structs.replace(found, keys=tuple(limit.get("keys") or ()), requests=tokens, unit=unit)


def service_rule(spec: Any, path: FieldPath, faults: Faults) -> None:
    """What a QuotaPolicy may say only with an extension provider, and what it may not say then."""
    asked = bool(spec.get("extensionProvider"))
    if asked and spec.get("failureMode") == "Local":
        faults.add((*path, "failureMode"), "Local needs the numbers of our own buckets; with an extensionProvider write Deny or Allow")
    if asked and spec.get("strict"):
        faults.add((*path, "strict"), f"does not go with extensionProvider: {_NO_BUCKET['strict']}")
    for at, limit in enumerate(spec["limits"]):
        where = (*path, "limits", at)
        if not asked:
            if limit.get("tokens") is None and limit.get("concurrency") is None:
                faults.add((*where, "tokens"), "is missing; it is required, unless concurrency says how many may be in progress at once")
            if limit.get("keys") is not None:
                faults.add((*where, "keys"), "are for the limits of an extensionProvider")
            continue
        _asked_limit(limit, where, faults)


def _asked_limit(limit: Any, where: FieldPath, faults: Faults) -> None:
    for name, reason in _NO_BUCKET.items():
        if limit.get(name) is not None:
            faults.add((*where, name), f"does not go with extensionProvider: {reason}")
    if is_after(limit.get("costFrom")):
        faults.add((*where, "costFrom"), "is known after the answer, and the service of an extensionProvider is asked before it")
    keys, per = limit.get("keys"), limit.get("per") or []
    if keys is not None and len(keys) != len(per):
        faults.add((*where, "keys"), f"must be {len(per)}, one for each descriptor of per, and there are {len(keys)}")
    if keys is not None and not keys:
        faults.add((*where, "keys"), "must be one at least: a service is asked about entries")
    interval = limit.get("interval")
    if interval and limit.get("tokens") is None:
        faults.add((*where, "interval"), "says nothing without tokens")
    elif interval and formats.seconds(interval) not in UNITS:
        faults.add((*where, "interval"), "must be 1s, 1m, 1h, 24h or 720h: a service counts by second, minute, hour, day or month")
