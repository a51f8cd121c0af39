"""Policy revisions as documents: the body of a `PolicyRevision`, the body of the `ActivePolicy`, and back.

A revision's name is its digest in a form that DNS allows (`sha256-<hex>`), so that equal revisions are one resource and nobody can give a
revision the name of another. Whoever reads one computes the digest again (`mesh.kinds` refuses a wrong one).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from mesh import formats
from mesh.policy import EntryPoint, Path, ReadSet, Revision, Share, canonical_data, digest_of
from mesh.policy_data import DataRevision, Root, canonical_value, root_of, root_text

API_VERSION: Final = "tollhouse.dev/v1"
ACTIVE_NAME: Final = "active"
"""The name of the one ActivePolicy."""


def revision_name(digest: str) -> str:
    """`sha256:<hex>` as the name of a resource: `sha256-<hex>`."""
    return digest.replace(":", "-", 1)


def revision_digest(name: str) -> str:
    """The digest of the revision that is named `name`."""
    return name.replace("-", ":", 1)


def revision_body(revision: Revision) -> dict[str, Any]:
    """The JSON body of the PolicyRevision document. Raises ValueError when the revision's data is not a JSON object."""
    spec: dict[str, Any] = {"digest": revision.digest}
    if revision.bundle:
        spec["bundle"] = revision.bundle
    else:
        spec["modules"] = dict(revision.modules)
        spec["data"] = json.loads(canonical_data(revision.data))
    spec["entryPoints"] = [_entry_body(entry) for _, entry in sorted(revision.entry_points.items())]
    if revision.opa:
        spec["opa"] = revision.opa
    return {"apiVersion": API_VERSION, "kind": "PolicyRevision", "metadata": {"name": revision_name(revision.digest)}, "spec": spec}


def active_policy_body(name: str, shadow: str = "") -> dict[str, Any]:
    """The JSON body of the ActivePolicy document: `name` and `shadow` are names of PolicyRevisions (or their digests)."""
    spec = {"revision": revision_name(name)}
    if shadow:
        spec["shadow"] = revision_name(shadow)
    return spec_body(spec)


def spec_body(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON body of the ActivePolicy document that says `spec`."""
    return {"apiVersion": API_VERSION, "kind": "ActivePolicy", "metadata": {"name": ACTIVE_NAME}, "spec": dict(spec)}


def trial_of(said: Any) -> tuple[str, Share]:
    """The revision's name and the share of what ActivePolicy has under `shadow` or `canary` (or `revision`): a name, or an object."""
    if not isinstance(said, Mapping):
        return said or "", Share()
    identities = tuple(said.get("identities") or ())
    percent = said.get("percent")
    share = (0 if identities else 100) if percent is None else int(percent)
    return said["revision"], Share(percent=share, identities=identities, by_identity=said.get("by") == "Identity")


def tried_text(shadow: tuple[str, Share], canary: tuple[str, Share]) -> str:
    """What is tried on whom, in one form: equal for equal trials, empty for none. Each is a revision's digest or name, and its share."""
    found = {
        field: [revision_digest(name), share.percent, sorted(share.identities), *(["Identity"] if share.by_identity else [])]
        for field, (name, share) in (("shadow", shadow), ("canary", canary))
        if name
    }
    return json.dumps(found, sort_keys=True) if found else ""


def trial_spec(name: str, percent: int | None, identities: Sequence[str], *, by_identity: bool = False) -> dict[str, Any]:
    """What ActivePolicy has under `shadow` or `canary`; `trial_of` reads it."""
    spec: dict[str, Any] = {"revision": revision_name(name)}
    if percent is not None:
        spec["percent"] = percent
    if by_identity:
        spec["by"] = "Identity"
    if identities:
        spec["identities"] = list(identities)
    return spec


def revision_from_body(body: Mapping[str, Any]) -> Revision:
    """The revision of a PolicyRevision document that has been checked (`mesh.kinds.check_document`)."""
    spec = body["spec"]
    return Revision(
        digest=spec["digest"],
        modules=dict(spec.get("modules") or {}),
        data=canonical_data(json.dumps(spec.get("data") or {}).encode()),
        bundle=spec.get("bundle") or "",
        entry_points={entry["path"]: _entry(entry) for entry in spec.get("entryPoints") or []},
        opa=spec.get("opa") or "",
    )


def data_body(revision: DataRevision) -> dict[str, Any]:
    """The JSON body of the DataRevision document."""
    spec: dict[str, Any] = {"digest": revision.digest, "root": root_text(revision.root)}
    if revision.bundle:
        spec["bundle"] = revision.bundle
    else:
        spec["data"] = json.loads(revision.value)
    return {"apiVersion": API_VERSION, "kind": "DataRevision", "metadata": {"name": revision_name(revision.digest)}, "spec": spec}


def data_from_body(body: Mapping[str, Any]) -> DataRevision:
    """The revision of a DataRevision document that has been checked (`mesh.kinds.check_document`)."""
    spec = body["spec"]
    bundle = spec.get("bundle") or ""
    value = b"" if bundle else canonical_value(spec.get("data"))
    return DataRevision(digest=spec["digest"], root=root_of(spec["root"]), value=value, bundle=bundle)


def active_data_body(active: Mapping[Root, str]) -> dict[str, Any]:
    """The JSON body of the ActiveData document: the digest in force at each root."""
    roots = [{"root": root_text(root), "revision": revision_name(digest)} for root, digest in sorted(active.items())]
    return {"apiVersion": API_VERSION, "kind": "ActiveData", "metadata": {"name": ACTIVE_NAME}, "spec": {"roots": roots}}


def active_data_of(spec: Mapping[str, Any] | None) -> dict[Root, str]:
    """The digest in force at each root, by the `spec` of the ActiveData."""
    return {root_of(each["root"]): revision_digest(each["revision"]) for each in (spec or {}).get("roots") or ()}


def digest_of_spec(spec: Mapping[str, Any]) -> str:
    """The digest that the modules and data of a PolicyRevision's spec really have. Raises ValueError when there is none."""
    return digest_of(spec.get("modules") or {}, json.dumps(spec.get("data") or {}, allow_nan=False).encode())


def _entry_body(entry: EntryPoint) -> dict[str, Any]:
    reads = entry.reads
    lists = {
        "values": [list(path) for path in reads.values],
        "defined": [list(path) for path in reads.defined],
        "lengths": [list(path) for path in reads.lengths],
        "kinds": [list(path) for path in reads.kinds],
        "volatile": list(reads.volatile),
        "widened": list(reads.widened),
    }
    body: dict[str, Any] = {"path": entry.path, "digest": entry.digest, "reads": {name: items for name, items in lists.items() if items}}
    if entry.data is not None:
        body["data"] = [list(path) for path in entry.data]
    if entry.data_defined:
        body["dataDefined"] = [list(path) for path in entry.data_defined]
    if entry.ttl is not None:
        body["ttl"] = formats.duration_text(entry.ttl)
    return body


def _entry(body: Mapping[str, Any]) -> EntryPoint:
    reads = body["reads"]

    def paths(name: str) -> tuple[Path, ...]:
        return tuple(tuple(path) for path in reads.get(name) or [])

    return EntryPoint(
        path=body["path"],
        digest=body["digest"],
        reads=ReadSet(
            values=paths("values"),
            defined=paths("defined"),
            lengths=paths("lengths"),
            kinds=paths("kinds"),
            volatile=tuple(reads.get("volatile") or ()),
            widened=tuple(reads.get("widened") or ()),
        ),
        data=None if body.get("data") is None else tuple(tuple(path) for path in body["data"]),
        data_defined=tuple(tuple(path) for path in body.get("dataDefined") or ()),
        ttl=formats.seconds(body["ttl"]) if body.get("ttl") else None,
    )
