"""From QuotaOverrides to the tables of a snapshot, and what is wrong between them and the limits that name them."""

from __future__ import annotations

from mesh.compile_quota import quota_limits
from mesh.compile_world import Trouble, World
from mesh.documents import Document, Problem
from mesh.model import QuotaLimit
from mesh.quota_tables import KIND, Row, Table, table_of
from mesh.schema import nearest


def compile_tables(world: World) -> dict[str, Table]:
    """Every table by `namespace/name`."""
    return {f"{namespace}/{name}": table_of(document.body["spec"]) for (namespace, name), document in sorted(world.of(KIND).items())}


def check_tables(world: World, tables: dict[str, Table]) -> tuple[Problem, ...]:
    """Limits whose table is not there (they go by their own numbers), and rows that don't fit the limits that name their table."""
    found: list[Problem] = []
    users: dict[str, list[QuotaLimit]] = {}
    for (namespace, name), document in sorted(world.of("QuotaPolicy").items()):
        for at, limit in enumerate(quota_limits(f"{namespace}/{name}", document.body["spec"], "mesh", {})):
            if not limit.table:
                continue
            users.setdefault(limit.table, []).append(limit)
            if limit.table not in tables:
                found += _missing(world, document, at, limit)
    for (namespace, name), document in sorted(world.of(KIND).items()):
        trouble = Trouble(document)
        for limit in users.get(f"{namespace}/{name}", ()):
            for at, row in enumerate(tables[f"{namespace}/{name}"].rows):
                if message := misfit(limit, row):
                    trouble.add(("spec", "rows", at), message, "Invalid")
                    break  # one of thousands tells what is wrong with them
        found += trouble.found
    return tuple(found)


def _missing(world: World, document: Document, at: int, limit: QuotaLimit) -> list[Problem]:
    trouble = Trouble(document)
    namespace, _, name = limit.table.partition("/")
    near = nearest(name, [other for space, other in world.of(KIND) if space == namespace])
    hint = f"; did you mean {near}?" if near else ""
    message = f"there is no {KIND} {limit.table} in force, and all go by the limit's own numbers{hint}"
    trouble.add(("spec", "limits", at, "overridesFrom", "name"), message, "TargetNotFound")
    return trouble.found


def misfit(limit: QuotaLimit, row: Row) -> str:
    """Why a row changes nothing for a limit; empty when it fits."""
    if len(row.values) != len(limit.per):
        return f"has {len(row.values)} values, and {limit.name} has {len(limit.per)} descriptors: the row changes nothing for it"
    if row.exempt:
        return ""
    if limit.calendar is not None and (row.interval or row.burst):
        return f"has {'interval' if row.interval else 'burst'}, and {limit.name} goes by the calendar: the row changes nothing for it"
    dearest, burst = max(limit.cost, limit.most_cost), row.burst or row.tokens or limit.burst
    if dearest > burst:
        return f"has a burst of {burst}, less than what a request may cost by {limit.name}, {dearest}: the row changes nothing for it"
    return ""
