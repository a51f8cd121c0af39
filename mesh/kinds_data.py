"""The kinds of data that change without the policy: DataRevision and ActiveData (group `tollhouse.dev`)."""

from __future__ import annotations

from itertools import combinations
from typing import Any, Final

from mesh import formats, policies
from mesh.documents import FieldPath
from mesh.policy_data import canonical_value, data_digest, overlap, root_of
from mesh.schema import Faults, Fields, Free, Items, Text

MOST_ROOTS: Final = 32


def _root(value: str) -> str:
    """A path below `data`, with slashes; empty for all of it."""
    try:
        root_of(value)
    except ValueError as problem:
        return str(problem)
    return ""


_NAME: Final = Text(formats.subdomain)
_ROOT: Final = Text(_root, most=512)

DATA_REVISION: Final = Fields(
    {"digest": Text(formats.digest), "root": _ROOT},
    {"data": Free(), "bundle": Text(formats.bundle_url, most=2048)},
)

ACTIVE_DATA: Final = Fields({}, {"roots": Items(Fields({"root": _ROOT, "revision": _NAME}), most=MOST_ROOTS, unique="root")})


def data_rule(body: Any, path: FieldPath, faults: Faults) -> None:
    """A revision is what its digest and its name say."""
    spec = body["spec"]
    name = policies.revision_name(spec["digest"])
    if body["metadata"]["name"] != name:
        faults.add((*path, "metadata", "name"), f"must be {name}, after the digest")
    if spec.get("bundle"):
        if "data" in spec:
            faults.add((*path, "spec", "bundle"), "does not go with data: the bundle has them")
        return
    if "data" not in spec:
        faults.add((*path, "spec", "data"), "is required, or bundle")
        return
    root = root_of(spec["root"])
    if not root and not isinstance(spec["data"], dict):
        faults.add((*path, "spec", "data"), "must be an object where it is all of data")
        return
    try:
        found = data_digest(root, canonical_value(spec["data"]))
    except ValueError as problem:
        faults.add((*path, "spec", "data"), str(problem))
        return
    if found != spec["digest"]:
        message = f"the data have the digest {found}: this revision was changed after it was made; publish it again"
        faults.add((*path, "spec", "digest"), message)


def active_data_rule(body: Any, path: FieldPath, faults: Faults) -> None:
    """There is one, and no root is inside of another."""
    if body["metadata"]["name"] != policies.ACTIVE_NAME:
        faults.add((*path, "metadata", "name"), f"must be {policies.ACTIVE_NAME}: there is one ActiveData")
    named = [(number, each["root"]) for number, each in enumerate(body["spec"].get("roots") or ())]
    for (_, one), (number, other) in combinations(named, 2):
        if one != other and overlap(root_of(one), root_of(other)):
            where = (*path, "spec", "roots", number, "root")
            faults.add(where, f"{other or 'all of data'} and {one or 'all of data'} overlap: one would be a part of the other")
