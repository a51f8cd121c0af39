"""Schemas of the kinds of `tollhouse.dev/v1`. What each field means is in `docs/configuration.md`."""

from __future__ import annotations

from typing import Any, Final

from mesh import formats, policies
from mesh.documents import FieldPath
from mesh.extension_providers import EXTENSION_PROVIDERS
from mesh.kinds_gateway import NAME, NAMESPACE, SECTION
from mesh.schema import Choice, Duration, Faults, Fields, Flag, Free, Items, Node, Number, Table, Text

ONLY_SERVICES: Final = "nothing is sent where no Service says so; describe it as one of type ExternalName"
MOST_BODY: Final = 1 << 20
TARGETS: Final = {
    "Gateway": "gateway.networking.k8s.io",
    "ListenerSet": "gateway.networking.k8s.io",
    "HTTPRoute": "gateway.networking.k8s.io",
    "GRPCRoute": "gateway.networking.k8s.io",
    "TLSRoute": "gateway.networking.k8s.io",
    "TCPRoute": "gateway.networking.k8s.io",
    "UDPRoute": "gateway.networking.k8s.io",
    "Service": "",
}
"""Kinds that a policy can be attached to, with their groups."""


def positive(field: str) -> Any:
    """A rule: the duration in a field is longer than nothing."""

    def rule(spec: Any, path: FieldPath, faults: Faults) -> None:
        if spec.get(field) is not None and formats.seconds(spec[field]) <= 0:
            faults.add((*path, field), "must be longer than nothing")

    return rule


MESH: Final = Fields(
    {"trustDomain": Text(formats.trust_domain)},
    {
        "trustDomainAliases": Items(Text(formats.trust_domain), most=64, unique=lambda item: item),
        "trustedGateways": Items(Text(formats.spiffe_id), unique=lambda item: item),
        "defaultAccessPolicy": Fields({"namespace": NAMESPACE, "name": NAME}),
        "defaultQuotaPolicy": Fields({"namespace": NAMESPACE, "name": NAME}),
        "outboundPolicy": Choice(
            "an outbound policy",
            "REGISTRY_ONLY",
            unsupported={"ALLOW_ANY": ONLY_SERVICES},
        ),
        "upstream": Choice("a mode of upstreams", "Strict", "Permissive"),
        "trustedProxies": Items(Text(formats.network), most=256),
        "rootNamespace": NAMESPACE,
        "extensionProviders": EXTENSION_PROVIDERS,
        "policy": Fields({}, {"maxStaleness": Duration()}, rule=positive("maxStaleness")),
    },
)


def _target_rule(ref: Any, path: FieldPath, faults: Faults) -> None:
    group = TARGETS[ref["kind"]]
    if (ref.get("group") or "") != group:
        faults.add(
            (*path, "group"), f"{formats.shown(ref.get('group') or '')} is not the group of {ref['kind']}; use {formats.shown(group)}"
        )
    if ref["kind"] == "Service" and ref.get("sectionName"):
        faults.add((*path, "sectionName"), "is not supported here for a Service; the policy holds for all of its ports")


_MESH_WIDE: Final = "what holds at every gateway is the Mesh's to say, in defaultAccessPolicy and defaultQuotaPolicy"
TARGET_REFS: Final = Items(
    Fields(
        {"kind": Choice("a kind that a policy can be attached to", *TARGETS, unsupported={"Mesh": _MESH_WIDE}), "name": NAME},
        {"group": Text(), "sectionName": SECTION},
        rule=_target_rule,
    ),
    most=16,
    unique=lambda ref: (ref["kind"], ref["name"], ref.get("sectionName") or ""),
)


def _access_rule(spec: Any, path: FieldPath, faults: Faults) -> None:
    there = [name for name in ("decision", "provider", "extensionProvider") if spec.get(name)]
    if len(there) != 1:
        faults.add((*path, there[1] if there else "decision"), "one of decision, provider and extensionProvider must be there, and no more")
    elif there != ["decision"] and spec.get("place"):
        faults.add((*path, "place"), f"does not go with {there[0]}: another server decides where it runs")
    positive("timeout")(spec, path, faults)


_EXEMPTED: Final = Choice("a kind that can be exempt", *(kind for kind in TARGETS if kind.endswith("Route")))
_ROUTE_GROUP: Final = Choice("the group of routes", "gateway.networking.k8s.io")
_GRANTS: Final = Items(
    Fields({"kind": _EXEMPTED, "namespace": NAMESPACE}, {"group": _ROUTE_GROUP, "name": NAME, "sectionName": SECTION}),
    most=64,
    unique=lambda grant: (grant["kind"], grant["namespace"], grant.get("name") or "", grant.get("sectionName") or ""),
)
POLICY_EXEMPTION: Final = Fields(
    {
        "targetRefs": Items(
            Fields({"kind": _EXEMPTED, "name": NAME}, {"group": _ROUTE_GROUP, "sectionName": SECTION}),
            least=1,
            most=16,
            unique=lambda ref: (ref["kind"], ref["name"], ref.get("sectionName") or ""),
        ),
        "policies": Items(
            Fields({"name": NAME}, {"namespace": NAMESPACE}),
            least=1,
            most=16,
            unique=lambda ref: (ref.get("namespace") or "", ref["name"]),
        ),
    }
)

ACCESS_POLICY: Final = Fields(
    {},
    {
        "targetRefs": TARGET_REFS,
        "decision": Text(formats.decision, most=512),
        "provider": Text(formats.host_port, most=300),
        "extensionProvider": Text(least=1, most=253),
        "place": Choice("a place", "Central", "Local"),
        "failureMode": Choice("a failure mode", "Deny", "Allow"),
        "timeout": Duration(),
        "withBody": Fields({"maxBytes": Number(1, MOST_BODY, "bytes")}, {"allowPartial": Flag()}),
        "mode": Choice("a mode", "Enforce", "Shadow"),
        "exemptions": _GRANTS,
        "showReason": Flag(),
    },
    rule=_access_rule,
)


SERVICE_IDENTITY: Final = Fields(
    {
        "service": Text(formats.subdomain),
        "identities": Items(Text(formats.spiffe_id), least=1, most=64, unique=lambda item: item),
    }
)


class _Path:
    """A path below `input`: names and array indexes."""

    def check(self, value: Any, path: FieldPath, faults: Faults) -> None:
        if not isinstance(value, list) or not all(isinstance(part, (str, int)) and not isinstance(part, bool) for part in value):
            faults.add(path, "must be a list of names and indexes")


_PATHS: Final = Items(_Path(), most=10_000)
_WORDS: Final = Items(Text(most=1024), most=10_000)

POLICY_REVISION: Final = Fields(
    {"digest": Text(formats.digest)},
    {
        "modules": Table(Text(most=1 << 20)),
        "data": Table(Free(), most=1_000_000),
        "bundle": Text(formats.bundle_url, most=2048),
        "entryPoints": Items(
            Fields(
                {
                    "path": Text(least=1, most=512),
                    "digest": Text(least=1, most=128),
                    "reads": Fields(
                        {},
                        {"values": _PATHS, "defined": _PATHS, "lengths": _PATHS, "kinds": _PATHS, "volatile": _WORDS, "widened": _WORDS},
                    ),
                },
                {"ttl": Duration(), "data": _PATHS, "dataDefined": _PATHS},
            ),
            most=1000,
            unique="path",
        ),
        "opa": Text(most=64),
    },
)


def revision_rule(body: Any, path: FieldPath, faults: Faults) -> None:
    """A revision is what its digest and its name say."""
    spec = body["spec"]
    name = policies.revision_name(spec["digest"])
    if body["metadata"]["name"] != name:
        faults.add((*path, "metadata", "name"), f"must be {name}, after the digest")
    if spec.get("bundle"):
        if spec.get("modules") or spec.get("data"):
            faults.add((*path, "spec", "bundle"), "does not go with modules or data: the bundle has them")
        return
    try:
        found = policies.digest_of_spec(spec)
    except ValueError as error:
        faults.add((*path, "spec", "data"), str(error))
        return
    if found != spec["digest"]:
        faults.add(
            (*path, "spec", "digest"),
            f"the modules and data have the digest {found}: this revision was changed after it was made; publish it again",
        )


_SHARE: Final[dict[str, Node]] = {
    "percent": Number(0, 100, "percent of the requests"),
    "identities": Items(Text(formats.spiffe_id), most=64, unique=lambda item: item),
    "by": Choice("Request", "Identity"),
}


def _share_rule(trial: Any, path: FieldPath, faults: Faults) -> None:
    if trial.get("by") is not None and trial.get("percent") is None:
        faults.add((*path, "by"), "says what percent is of, which is missing")


def _canary_rule(trial: Any, path: FieldPath, faults: Faults) -> None:
    _share_rule(trial, path, faults)
    if trial.get("percent") is None and not trial.get("identities"):
        faults.add(path, "must have percent or identities: it decides for those requests alone")


class Trial(Fields):
    """A revision that is tried on some requests; also written as the revision's name alone, for all."""

    def check(self, value: Any, path: FieldPath, faults: Faults) -> None:
        """See `Node`."""
        if isinstance(value, str):
            NAME.check(value, path, faults)
        else:
            super().check(value, path, faults)


ACTIVE_POLICY: Final = Fields(
    {"revision": NAME},
    {"shadow": Trial({"revision": NAME}, _SHARE, rule=_share_rule), "canary": Fields({"revision": NAME}, _SHARE, rule=_canary_rule)},
)


def active_rule(body: Any, path: FieldPath, faults: Faults) -> None:
    """There is one."""
    if body["metadata"]["name"] != policies.ACTIVE_NAME:
        faults.add((*path, "metadata", "name"), f"must be {policies.ACTIVE_NAME}: there is one ActivePolicy")
