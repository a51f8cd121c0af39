"""From a checked QuotaPolicy to its limits."""

from __future__ import annotations

from typing import Any, Final, Literal

import msgspec

from mesh import formats
from mesh.model import Calendar, Descriptor, Exempt, Level, QuotaLimit
from mesh.quota_answers import QuotaAnswer, answer_of

DEFAULT_TIMEOUT: Final = "20ms"
LENGTHS: Final = {"Second": 1.0, "Minute": 60.0, "Hour": 3600.0, "Day": 86_400.0, "Week": 604_800.0, "Month": 2_592_000.0}
"""About how long a window of a calendar is, in seconds."""


def quota_limits(name: str, spec: Any, level: Level) -> tuple[QuotaLimit, ...]:
    """The limits of a checked QuotaPolicy at one level. `name`: the policy's `namespace/name`."""
    answer = answer_of(spec.get("response"))
    return tuple(_limit(name, spec, limit, level, answer) for limit in spec["limits"])


def _limit(name: str, spec: Any, limit: Any, level: Level, answer: QuotaAnswer | None) -> QuotaLimit:
    asked, said = limit.get("costFrom"), limit.get("calendar")
    calendar = Calendar(said["unit"], said.get("timeZone") or "UTC") if said else None
    made = QuotaLimit(
        name=f"{name}/{limit['name']}",
        level=level,
        per=tuple(_descriptor(item) for item in limit.get("per") or []),
        tokens=limit["tokens"],
        interval=LENGTHS[calendar.unit] if calendar is not None else formats.seconds(limit.get("interval") or "1s"),
        calendar=calendar,
        burst=limit.get("burst") or limit["tokens"],
        cost=limit.get("cost") or 1,
        failure_mode=spec.get("failureMode") or "Deny",
        strict=bool(spec.get("strict")),
        timeout=formats.seconds(spec.get("timeout") or DEFAULT_TIMEOUT),
        shadow=spec.get("mode") == "Shadow",
        cost_header=asked["header"].lower().encode() if asked else b"",
        most_cost=asked["most"] if asked else 1,
        exempt=tuple(_exempt(item) for item in limit.get("exempt") or []),
        answer=answer,
    )
    overrides = tuple((tuple(item["values"]), _override(made, limit, item)) for item in limit.get("overrides") or [])
    return msgspec.structs.replace(made, overrides=overrides) if overrides else made


def _override(limit: QuotaLimit, spec: Any, override: Any) -> QuotaLimit:
    """What an override does not say is as in the limit; a burst that neither says is the override's `tokens`."""
    tokens = override.get("tokens") or limit.tokens
    return msgspec.structs.replace(
        limit,
        tokens=tokens,
        interval=formats.seconds(override["interval"]) if override.get("interval") else limit.interval,
        burst=override.get("burst") or (tokens if override.get("tokens") else spec.get("burst")) or tokens,
    )


def _exempt(item: Any) -> Exempt:
    claim = item.get("claim")
    if claim:
        return Exempt(claim=claim["name"], value=claim["value"])
    return Exempt(**item)


def _descriptor(item: Any) -> Descriptor:
    if isinstance(item, str):
        kind: Literal["identity"] = item  # type: ignore[assignment]
        return Descriptor(kind)
    ((name, argument),) = item.items()
    if name == "address":
        return Descriptor("address", f"{argument.get('v4PrefixLength') or 32}/{argument.get('v6PrefixLength') or 128}")
    return Descriptor(name, argument.lower() if name == "header" else argument)
