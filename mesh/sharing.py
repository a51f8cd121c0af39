"""New values that keep what they have in common with old ones, so that `is` tells what changed; and what changed between two snapshots."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from mesh.model import Snapshot

T = TypeVar("T")
_PARTS = (msgspec.Struct, dict, tuple, frozenset)
"""What is worth sharing: of strings and numbers nobody asks whether they are the same object."""


def share(old: Any, new: T) -> T:
    """A value equal to `new` that has every part of `old` that is equal to its own in that place (or, in a tuple, in another place)."""
    shared: T = _share(old, new)
    return shared


def _share(old: Any, new: Any) -> Any:
    if old is new or type(old) is not type(new) or not isinstance(new, _PARTS):
        return new
    if old == new:
        return old
    if isinstance(new, msgspec.Struct):
        return _share_struct(old, new)
    if isinstance(new, dict):
        return {key: _share(old[key], value) if key in old else value for key, value in new.items()}
    if isinstance(new, tuple):
        return _share_tuple(old, new)
    return new


def _share_struct(old: Any, new: msgspec.Struct) -> msgspec.Struct:
    changes: dict[str, Any] = {}
    for field in new.__struct_fields__:
        value = getattr(new, field)
        shared = share(getattr(old, field), value)
        if shared is not value:
            changes[field] = shared
    return msgspec.structs.replace(new, **changes) if changes else new


def _share_tuple(old: tuple[Any, ...], new: tuple[Any, ...]) -> tuple[Any, ...]:
    try:
        known = {item: item for item in old}
        found = [known.get(item) for item in new]
    except TypeError:
        # Parts with dictionaries have no hash: only the same place is looked at.
        found = [None] * len(new)
    return tuple(
        match if match is not None else share(old[index], item) if index < len(old) else item
        for index, (match, item) in enumerate(zip(found, new, strict=True))
    )


class Changes(msgspec.Struct, frozen=True, kw_only=True):
    """What is different in a newer snapshot. A name that is in neither `changed` nor gone means the very same object."""

    gateways: frozenset[str] = frozenset()
    """`namespace/name` of those that came or changed."""
    gone_gateways: frozenset[str] = frozenset()
    clusters: frozenset[str] = frozenset()
    gone_clusters: frozenset[str] = frozenset()
    mesh: bool = False
    policy: bool = False
    """The active revision is another one."""
    shadow: bool = False
    """What is tried (shadow and canary) or on whom is other."""
    policies: frozenset[str] = frozenset()
    """AccessPolicies that came, changed or went."""
    problems: bool = False

    def __bool__(self) -> bool:
        parts = (self.gateways, self.gone_gateways, self.clusters, self.gone_clusters, self.policies)
        return any(parts) or self.mesh or self.policy or self.shadow or self.problems


def changed(old: Snapshot, new: Snapshot) -> Changes:
    """What is different in `new`."""

    def differ(before: dict[str, Any], after: dict[str, Any]) -> frozenset[str]:
        return frozenset(name for name, value in after.items() if before.get(name) is not value)

    def gone(before: dict[str, Any], after: dict[str, Any]) -> frozenset[str]:
        return frozenset(before.keys() - after.keys())

    def digest(revision: Any) -> str:
        return revision.digest if revision is not None else ""

    def tried(snapshot: Snapshot) -> tuple[Any, ...]:
        return digest(snapshot.shadow), snapshot.shadow_share, digest(snapshot.canary), snapshot.canary_share

    return Changes(
        gateways=differ(old.gateways, new.gateways),
        gone_gateways=gone(old.gateways, new.gateways),
        clusters=differ(old.clusters, new.clusters),
        gone_clusters=gone(old.clusters, new.clusters),
        mesh=old.mesh is not new.mesh and old.mesh != new.mesh,
        policy=digest(old.policy) != digest(new.policy),
        shadow=tried(old) != tried(new),
        policies=differ(old.policies, new.policies) | gone(old.policies, new.policies),
        problems=old.problems is not new.problems and old.problems != new.problems,
    )
