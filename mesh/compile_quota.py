"""From a checked QuotaPolicy to its limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal

import msgspec

from mesh import formats
from mesh.compile_world import Trouble, World
from mesh.documents import Document, Problem
from mesh.model import Descriptor, Level, QuotaLimit
from mesh.quota_answers import QuotaAnswer, answer_of
from mesh.quota_changes import KIND, NUMBERS, LimitChange, change_name, instant, named_key, shown_key, values_of
from mesh.quota_cost import most_debt, usage_of
from mesh.quota_exempt import Exempt
from mesh.quota_services import RateLimitService, service_of
from mesh.quota_shares import shares_of
from mesh.quota_windows import Calendar
from mesh.schema import nearest

NO_CHANGES: Final[Mapping[str, Sequence[Any]]] = {}

DEFAULT_TIMEOUT: Final = "20ms"
LENGTHS: Final = {"Second": 1.0, "Minute": 60.0, "Hour": 3600.0, "Day": 86_400.0, "Week": 604_800.0, "Month": 2_592_000.0}
"""About how long a window of a calendar is, in seconds."""


def quota_limits(
    name: str, spec: Any, level: Level, services: Mapping[str, RateLimitService], changes: Mapping[str, Sequence[Any]] = NO_CHANGES
) -> tuple[QuotaLimit, ...]:
    """The limits of a checked QuotaPolicy at one level. `name`: the policy's `namespace/name`. `services`: the Mesh's, by name.
    `changes`: the items of its QuotaChanges, by the limit's name."""
    answer = answer_of(spec.get("response"))
    made = (_limit(name, spec, limit, level, answer, service_of(spec, limit, services)) for limit in spec["limits"])
    if not changes:
        return tuple(made)
    whole = zip(spec["limits"], made, strict=True)
    return tuple(_changed(limit, spec, said, level, answer, changes.get(said["name"], ())) for said, limit in whole)


def _changed(limit: QuotaLimit, spec: Any, said: Any, level: Level, answer: QuotaAnswer | None, items: Sequence[Any]) -> QuotaLimit:
    """A limit with what was changed of it. An item that does not fit the limit changes nothing: `change_problems` says why."""
    name = limit.name.rpartition("/")[0]
    overrides = {shown_key(limit, key): made for key, made in limit.overrides}
    changes: list[LimitChange] = []
    resets: list[tuple[tuple[str, ...], float]] = []
    for item in items:
        if change_problem(limit, item):
            continue
        values = values_of(item)
        if values is not None:
            values = named_key(limit, values)
        if item.get("reset"):
            resets.append((values or (), instant(item["reset"])))
            continue
        made: QuotaLimit | None
        if item.get("lift"):
            made = None
        elif item.get("block"):
            made = msgspec.structs.replace(limit, tokens=0, concurrency=0, overrides=())
        elif values is None:
            numbers = {number: item[number] for number in NUMBERS if item.get(number) is not None}
            kept = {key: value for key, value in said.items() if key != "burst" or "tokens" not in numbers}
            made = _limit(name, spec, {**kept, **numbers}, level, answer, None)
        else:
            base = overrides.get(values, limit)
            made = msgspec.structs.replace(_override(base, {"burst": base.burst}, item), overrides=())
        changes.append(LimitChange(values, made, instant(item["until"]) if item.get("until") else 0.0))
    return msgspec.structs.replace(limit, changes=tuple(changes), resets=tuple(resets))


def change_problem(limit: QuotaLimit, item: Any) -> str:
    """Why an item of a QuotaChange does not fit a limit; empty when it does."""
    values = values_of(item)
    count = len(limit.per)
    if values is not None and len(values) != count:
        return f"has {len(values)} values, and {limit.name} has {count or 'no'} descriptors" + (f": {_kinds(limit)}" if count else "")
    if values is None and item.get("reset") and count:
        return f"resets one bucket: it needs the values of {_kinds(limit)}"
    for part, value in zip(limit.per, values or (), strict=False):
        if part.kind == "constant" and part.argument != value:
            return f'has "{value}" where {limit.name} has always "{part.argument}"'
    if limit.service is not None and not item.get("lift"):
        return f"changes {limit.name}, whose numbers a rate-limit service has: change them there, or lift the limit"
    if limit.concurrency and item.get("reset"):
        return f"resets {limit.name}, which counts requests in progress: there is no bucket to fill"
    if item.get("lift") or item.get("block") or item.get("reset"):
        return ""
    if limit.concurrency:
        wrong = [name for name in NUMBERS if name != "concurrency" and item.get(name) is not None]
        return f"has {wrong[0]}, and {limit.name} counts requests in progress: it has concurrency alone" if wrong else ""
    if item.get("concurrency") is not None:
        return f"has concurrency, and {limit.name} has tokens"
    for field in ("interval", "burst"):
        if limit.calendar is not None and item.get(field) is not None:
            return f"has {field}, and {limit.name} goes by the calendar: only its tokens can be changed"
    shown = named_key(limit, values or ()) if values else ()
    base = next((made for key, made in limit.overrides if shown_key(limit, key) == shown), limit)
    burst = item.get("burst") or item.get("tokens") or base.burst
    dearest = max(limit.cost, limit.most_cost)
    if dearest > burst:
        return f"has a burst of {burst}, less than what a request may cost, {dearest}: such a request would never pass; block says so"
    return ""


def changes_of(world: World, document: Document) -> dict[str, Sequence[Any]]:
    """The items of the QuotaChanges of a QuotaPolicy, by the limit's name."""
    there = world.of(KIND)
    if not there:
        return {}
    found = {}
    for limit in document.body["spec"]["limits"]:
        change = there.get((document.key.namespace, change_name(document.key.name, limit["name"])))
        if change is not None:
            found[limit["name"]] = change.body["spec"]["changes"]
    return found


def check_changes(world: World) -> tuple[Problem, ...]:
    """QuotaChanges that change nothing, since there is no such limit, or since it is another than they think."""
    found: list[Problem] = []
    for (namespace, _), document in sorted(world.of(KIND).items()):
        trouble = Trouble(document)
        spec = document.body["spec"]
        policy = world.get("QuotaPolicy", namespace, spec["policy"])
        name = f"{namespace}/{spec['policy']}"
        if policy is None:
            near = nearest(spec["policy"], [other for space, other in world.of("QuotaPolicy") if space == namespace])
            hint = f"; did you mean {near}?" if near else ""
            trouble.add(("spec", "policy"), f"there is no QuotaPolicy {name} in force{hint}", "TargetNotFound")
        else:
            _check_limit(policy, name, spec, trouble)
        found += trouble.found
    return tuple(found)


def _check_limit(policy: Document, name: str, spec: Any, trouble: Trouble) -> None:
    limits = {limit.name.rpartition("/")[2]: limit for limit in quota_limits(name, policy.body["spec"], "mesh", {})}
    limit = limits.get(spec["limit"])
    if limit is None:
        near = nearest(spec["limit"], limits)
        hint = f"did you mean {near}?" if near else f"there is {', '.join(limits)}"
        trouble.add(("spec", "limit"), f"QuotaPolicy {name} has no limit {spec['limit']}; {hint}", "TargetNotFound")
        return
    for at, item in enumerate(spec["changes"]):
        if problem := change_problem(limit, item):
            trouble.add(("spec", "changes", at), problem)


def _kinds(limit: QuotaLimit) -> str:
    return ", ".join(f"{part.kind} {part.argument}" if part.argument else part.kind for part in limit.per)


def _limit(name: str, spec: Any, limit: Any, level: Level, answer: QuotaAnswer | None, service: RateLimitService | None) -> QuotaLimit:
    asked, said = limit.get("costFrom"), limit.get("calendar")
    calendar = Calendar(said["unit"], said.get("timeZone") or "UTC") if said else None
    made = QuotaLimit(
        name=f"{name}/{limit['name']}",
        level=level,
        per=tuple(_descriptor(item) for item in limit.get("per") or []),
        tokens=limit.get("tokens") or 0,
        concurrency=limit.get("concurrency") or 0,
        shares=shares_of(limit, _descriptor, _exempt),
        interval=LENGTHS[calendar.unit] if calendar is not None else formats.seconds(limit.get("interval") or "1s"),
        calendar=calendar,
        burst=limit.get("burst") or limit.get("tokens") or 0,
        cost=limit.get("cost") or 1,
        failure_mode=spec.get("failureMode") or "Deny",
        strict=bool(spec.get("strict")),
        timeout=formats.seconds(spec.get("timeout") or DEFAULT_TIMEOUT),
        shadow=spec.get("mode") == "Shadow",
        cost_header=(asked.get("header") or "").lower().encode() if asked else b"",
        most_cost=asked.get("most") or 1 if asked else 1,
        usage=usage_of(asked),
        most_debt=most_debt(limit, limit.get("burst") or limit.get("tokens") or 0),
        exempt=tuple(_exempt(item) for item in limit.get("exempt") or []),
        answer=answer,
        service=service,
        table=f"{name.partition('/')[0]}/{limit['overridesFrom']['name']}" if limit.get("overridesFrom") else "",
    )
    overrides = tuple((tuple(item["values"]), _override(made, limit, item)) for item in limit.get("overrides") or [])
    return msgspec.structs.replace(made, overrides=overrides) if overrides else made


def _override(limit: QuotaLimit, spec: Any, override: Any) -> QuotaLimit:
    """What an override does not say is as in the limit; a burst that neither says is the override's `tokens`."""
    if limit.concurrency:
        return msgspec.structs.replace(limit, concurrency=override["concurrency"])
    tokens = override.get("tokens") or limit.tokens
    burst = override.get("burst") or (tokens if override.get("tokens") else spec.get("burst")) or tokens
    return msgspec.structs.replace(
        limit,
        tokens=tokens,
        interval=formats.seconds(override["interval"]) if override.get("interval") else limit.interval,
        burst=burst,
        most_debt=most_debt(spec, burst),
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
