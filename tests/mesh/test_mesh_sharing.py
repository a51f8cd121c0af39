"""A snapshot that came about step by step equals one made at once, and shares with the one before all that is equal."""

from __future__ import annotations

import json
from typing import Any

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st
from mesh_world import activated, shop_documents

from mesh.documents import Document, Instance
from mesh.model import Snapshot
from mesh.sharing import changed, share
from mesh.workspace import Workspace

INSTANCES = [
    Instance(namespace="shop", service=service, instance=f"i{number}", address=f"127.0.1.{number}", ports={"https": 9000 + number})
    for service in ("orders", "payments", "nobody")
    for number in (1, 2)
]


def edit(document: Document, path: tuple[Any, ...], value: Any) -> Document:
    body = json.loads(json.dumps(document.body))
    inner = body
    for part in path[:-1]:
        inner = inner[part]
    inner[path[-1]] = value
    return Document(document.key, body, document.origin, f"{document.version}+{path}={value}")


def variants() -> list[Document]:
    """Every document of the example, and changed versions of some: good ones, bad ones."""
    documents = [*shop_documents(), *activated("shop.authz.decision")]
    found = list(documents)
    for document in documents:
        spec = document.body.get("spec")
        match document.key.kind:
            case "HTTPRoute":
                found.append(edit(document, ("spec", "rules", 0, "timeouts"), {"request": "3s"}))
                found.append(edit(document, ("spec", "rules", 0, "matches"), [{"path": {"value": "/new"}}]))
                found.append(edit(document, ("spec", "rules", 0, "backendRefs", 0, "port"), 1))
                found.append(edit(document, ("spec", "rulez"), []))
                found.append(edit(document, ("spec", "hostnames"), ["*.example"]))
            case "Gateway":
                found.append(edit(document, ("spec", "listeners", 0, "hostname"), "other.example"))
                found.append(edit(document, ("spec", "listeners", 0, "port"), 8444))
            case "AccessPolicy":
                found.append(edit(document, ("spec", "timeout"), "1s"))
                found.append(edit(document, ("spec", "decision"), "no"))
                found.append(edit(document, ("spec", "targetRefs"), [{"kind": "Service", "name": "eastwest"}]))
            case "Mesh":
                found.append(edit(document, ("spec", "trustedGateways"), []))
                found.append(edit(document, ("spec", "upstream"), "Permissive"))
            case "EndpointSlice":
                found.append(edit(document, ("endpoints", 0, "addresses"), ["10.0.0.1"]))
                found.append(edit(document, ("endpoints",), []))
            case "Service" if spec:
                found.append(edit(document, ("spec", "ports", 0, "port"), 444))
            case "QuotaPolicy":
                found.append(edit(document, ("spec", "limits", 0, "tokens"), 11))
    return found


VARIANTS = variants()
STEP = st.fixed_dictionaries(
    {},
    optional={
        "upserts": st.lists(st.sampled_from(VARIANTS), min_size=1, max_size=3, unique_by=lambda document: document.key),
        "deletes": st.lists(st.sampled_from(sorted({document.key for document in VARIANTS})), min_size=1, max_size=2),
        "instances": st.lists(st.sampled_from(INSTANCES), min_size=1, max_size=2),
        "gone_instances": st.lists(st.sampled_from([(i.namespace, i.service, i.instance) for i in INSTANCES]), min_size=1, max_size=2),
    },
)


def in_force(snapshot: Snapshot) -> Snapshot:
    """Without the problems, which tell of the past (what was kept)."""
    return msgspec.structs.replace(snapshot, problems=())


def parts(snapshot: Snapshot) -> dict[tuple[str, ...], Any]:
    found: dict[tuple[str, ...], Any] = {("cluster", name): cluster for name, cluster in snapshot.clusters.items()}
    for name, gateway in snapshot.gateways.items():
        found["gateway", name] = gateway
        for listener in gateway.listeners:
            found["listener", name, listener.name] = listener
            for host in listener.hosts.values():
                found["host", name, listener.name, host.hostname] = host
                for match in (match for ways in (*host.exact.values(), host.regex, *host.prefix.values()) for match in ways):
                    found["rule", name, listener.name, host.hostname, match.rule.name] = match.rule
    return found


@settings(max_examples=150, deadline=None)
@given(st.lists(STEP, min_size=1, max_size=6))
def test_step_by_step_is_the_same_as_all_at_once(steps: list[dict[str, Any]]) -> None:
    made = Workspace()
    made.update(upserts=[*shop_documents(), *activated("shop.authz.decision")], instances=INSTANCES[:1], replace=True)
    for step in steps:
        before = made.snapshot
        after = made.update(**step)
        old, new = parts(before), parts(after)
        for name, part in new.items():
            assert part is old.get(name) or part != old.get(name), name
        told = changed(before, after)
        assert told.gateways == {name for name, gateway in after.gateways.items() if before.gateways.get(name) != gateway}
        assert told.clusters == {name for name, cluster in after.clusters.items() if before.clusters.get(name) != cluster}
        assert (before.version == after.version) == (in_force(before) == in_force(after))
    fresh = Workspace()
    instances = [instance for known in made._world.instances.values() for instance in known.values()]
    active = made.snapshot.policy
    fresh.update(upserts=made.in_force.values(), instances=instances, replace=True)
    if active == fresh.snapshot.policy and not made._world.bad:
        assert in_force(fresh.snapshot) == in_force(made.snapshot)
        assert fresh.snapshot.version == made.snapshot.version


def test_versions_are_equal_wherever_the_same_is_served() -> None:
    documents = [*shop_documents(), *activated("shop.authz.decision")]
    one = Workspace().update(upserts=documents, replace=True)
    other = Workspace().update(upserts=reversed(documents), replace=True)
    assert one.version == other.version
    assert len(one.version) == 32


class Part(msgspec.Struct, frozen=True):
    name: str
    inner: tuple[Any, ...] = ()
    table: dict[str, Any] = {}


PARTS = st.recursive(
    st.builds(Part, st.sampled_from("ab")),
    lambda inner: st.builds(
        Part, st.sampled_from("ab"), st.lists(inner, max_size=3).map(tuple), st.dictionaries(st.sampled_from("xy"), inner, max_size=2)
    ),
    max_leaves=12,
)


@given(PARTS, PARTS)
def test_sharing_changes_no_value(old: Part, new: Part) -> None:
    shared = share(old, new)
    assert shared == new
    assert (shared is old) == (old == new)


@given(PARTS, PARTS)
def test_sharing_keeps_what_is_equal_in_its_place(old: Part, new: Part) -> None:
    def look(before: Any, after: Any) -> None:
        assert after is before or after != before
        if isinstance(before, Part) and isinstance(after, Part):
            for name in before.table.keys() & after.table.keys():
                look(before.table[name], after.table[name])

    look(old, share(old, new))


def test_sharing_finds_an_item_that_moved() -> None:
    hashable = msgspec.defstruct("hashable", [("name", str), ("inner", tuple[int, ...], ())], frozen=True)
    first, second = hashable("a", (1,)), hashable("b", (2,))
    assert share((first, second), (hashable("b", (2,)),))[0] is second
    assert share((first,), (hashable("z"), hashable("a", (1,))))[1] is first
