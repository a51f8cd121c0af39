"""The schema of QuotaPolicy. What each field means is in `docs/configuration.md`."""

from __future__ import annotations

from typing import Any, Final

from mesh import formats
from mesh.documents import FieldPath
from mesh.kinds_own import TARGET_REFS, positive
from mesh.quota_answers import RESPONSE
from mesh.quota_cost import COST_FROM, MOST_COST, MOST_DEBT, check_cost, is_after
from mesh.quota_services import KEYS, service_rule
from mesh.quota_shares import reserve_fields, shares_fields, shares_rule
from mesh.schema import Choice, Duration, Faults, Fields, Flag, Items, Number, Text

DESCRIPTORS: Final = ("identity", "namespace", "route", "template", "service", "gateway", "method", "address")
MOST_TOKENS: Final = 1_000_000_000
MOST_CONCURRENCY: Final = 1_000_000
LONGEST_INTERVAL: Final = 31 * 86_400
"""Seconds."""


def _some_length(network: Any, path: FieldPath, faults: Faults) -> None:
    if network.get("v4PrefixLength") is None and network.get("v6PrefixLength") is None:
        faults.add(path, "must have v4PrefixLength, v6PrefixLength or both; for single addresses write address alone")


class _Descriptor:
    """`identity`, or `{header: x-tenant}`, or `{claim: tenant}`, or `{constant: all}`, or `{address: {v4PrefixLength: 24}}`."""

    forms: Final = Fields(
        {},
        {
            "header": Text(formats.header_name),
            "cookie": Text(formats.header_name),
            "claim": Text(least=1, most=256),
            "constant": Text(least=1, most=256),
            "address": Fields({}, {"v4PrefixLength": Number(1, 32, "bits"), "v6PrefixLength": Number(1, 128, "bits")}, rule=_some_length),
        },
    )
    words: Final = Choice("a descriptor", *DESCRIPTORS, *(f"{{{name}: ...}}" for name in forms.known))

    def check(self, value: Any, path: FieldPath, faults: Faults) -> None:
        if not isinstance(value, dict):
            self.words.check(value, path, faults)
            return
        self.forms.check(value, path, faults)
        if len(value) != 1:
            faults.add(path, f"must have exactly one of {', '.join(self.forms.known)}")


def _only_one(item: Any, path: FieldPath, faults: Faults) -> None:
    if len(item) != 1:
        faults.add(path, "must have exactly one of identity, namespace, address, claim")


_EXEMPT: Final = Items(
    Fields(
        {},
        {
            "identity": Text(formats.spiffe_id),
            "namespace": Text(formats.label),
            "address": Text(formats.network),
            "claim": Fields({"name": Text(least=1, most=256), "value": Text(least=1, most=256)}),
        },
        rule=_only_one,
    ),
    most=256,
    unique=str,
)


def _override_rule(item: Any, path: FieldPath, faults: Faults) -> None:
    positive("interval")(item, path, faults)
    if not {"tokens", "interval", "burst", "concurrency"} & item.keys():
        faults.add(path, "must have another number than the limit: tokens, interval or burst, or concurrency")


_OVERRIDES: Final = Items(
    Fields(
        {"values": Items(Text(most=256), least=1, most=8)},
        {
            "tokens": Number(1, MOST_TOKENS, "tokens"),
            "interval": Duration(),
            "burst": Number(1, MOST_TOKENS, "tokens"),
            "concurrency": Number(1, MOST_CONCURRENCY, "requests"),
        },
        rule=_override_rule,
    ),
    most=10_000,
    unique=lambda item: tuple(item["values"]),
)


_CALENDAR: Final = Fields(
    {"unit": Choice("a unit of the calendar", "Second", "Minute", "Hour", "Day", "Week", "Month")},
    {"timeZone": Text(formats.time_zone, most=64)},
)
_NOT_WITH_CALENDAR: Final = {
    "interval": "does not go with calendar, whose unit is the interval",
    "burst": "does not go with calendar: a window has tokens, and they may be taken all at once",
}


def _calendar_rule(limit: Any, path: FieldPath, faults: Faults) -> None:
    """Of a calendar's limit, only `tokens` is a number that may be said."""
    if is_after(limit.get("costFrom")):
        faults.add((*path, "costFrom"), "does not go with calendar when it is known after the answer: a window begins without debts")
    places = [(limit, path)]
    places += [(override, (*path, "overrides", at)) for at, override in enumerate(limit.get("overrides") or [])]
    for holder, place in places:
        for name, message in _NOT_WITH_CALENDAR.items():
            if holder.get(name) is not None:
                faults.add((*place, name), message)


OF_TOKENS: Final = ("tokens", "interval", "calendar", "burst", "cost", "costFrom", "maxDebt")
"""Fields of a limit that mean nothing to a concurrency limit."""


def _concurrency_rule(limit: Any, path: FieldPath, faults: Faults) -> None:
    """What a limit of requests in progress may say."""
    for name in OF_TOKENS:
        if limit.get(name) is not None:
            faults.add(
                (*path, name), "does not go with concurrency, which counts each request in progress once; write another limit for it"
            )
    per = limit.get("per") or []
    for at, override in enumerate(limit.get("overrides") or []):
        here, there = (*path, "overrides", at), len(override["values"])
        if there != len(per):
            faults.add((*here, "values"), f"must be {len(per)}, one for each descriptor of per, and there are {there}")
        for name in ("tokens", "interval", "burst"):
            if override.get(name) is not None:
                faults.add((*here, name), "is for limits with tokens; write concurrency")


def _limit_rule(limit: Any, path: FieldPath, faults: Faults) -> None:
    if limit.get("overridesFrom") is not None and not limit.get("per"):
        faults.add((*path, "overridesFrom"), "needs per: a table says whom it is about by the values of descriptors")
    if limit.get("overridesFrom") is not None and limit.get("concurrency") is not None:
        faults.add((*path, "overridesFrom"), "is for limits with tokens; with concurrency write overrides")
    shares_rule(limit, path, faults)
    if limit.get("concurrency") is not None:
        _concurrency_rule(limit, path, faults)
        return
    for at, override in enumerate(limit.get("overrides") or []):
        if override.get("concurrency") is not None:
            faults.add((*path, "overrides", at, "concurrency"), "is for limits with concurrency; write tokens, interval or burst")
    positive("interval")(limit, path, faults)
    if limit.get("interval") and formats.seconds(limit["interval"]) > LONGEST_INTERVAL:
        faults.add((*path, "interval"), f"is longer than a month ({LONGEST_INTERVAL // 86_400} days)")
    if limit.get("calendar"):
        _calendar_rule(limit, path, faults)
    burst = limit.get("burst") or limit.get("tokens") or MOST_TOKENS
    dearest = check_cost(limit, burst, path, faults)
    per = limit.get("per") or []
    for at, override in enumerate(limit.get("overrides") or []):
        here = (*path, "overrides", at)
        there = len(override["values"])
        if there != len(per):
            faults.add((*here, "values"), f"must be {len(per)}, one for each descriptor of per, and there are {there}")
        most = override.get("burst") or override.get("tokens") or burst
        if dearest > most:
            faults.add(here, f"the burst of {most} is less than what a request may cost, {dearest}: such a request would never pass")


def _policy_rule(spec: Any, path: FieldPath, faults: Faults) -> None:
    positive("timeout")(spec, path, faults)
    service_rule(spec, path, faults)


QUOTA_POLICY: Final = Fields(
    {
        "limits": Items(
            Fields(
                {"name": Text(formats.label)},
                {
                    "tokens": Number(1, MOST_TOKENS, "tokens"),
                    "keys": KEYS,
                    "concurrency": Number(1, MOST_CONCURRENCY, "requests"),
                    "shares": shares_fields(_Descriptor()),
                    "reserve": reserve_fields(_EXEMPT),
                    "per": Items(_Descriptor(), most=8, unique=str),
                    "interval": Duration(),
                    "calendar": _CALENDAR,
                    "burst": Number(1, MOST_TOKENS, "tokens"),
                    "cost": Number(1, MOST_COST, "tokens"),
                    "costFrom": COST_FROM,
                    "maxDebt": Number(1, MOST_DEBT, "tokens"),
                    "exempt": _EXEMPT,
                    "overrides": _OVERRIDES,
                    "overridesFrom": Fields({"name": Text(formats.subdomain)}),
                },
                rule=_limit_rule,
            ),
            least=1,
            most=16,
            unique="name",
        ),
    },
    {
        "targetRefs": TARGET_REFS,
        "failureMode": Choice("a failure mode", "Deny", "Allow", "Local"),
        "strict": Flag(),
        "timeout": Duration(),
        "mode": Choice("a mode", "Enforce", "Shadow"),
        "response": RESPONSE,
        "extensionProvider": Text(least=1, most=253),
    },
    rule=_policy_rule,
)
