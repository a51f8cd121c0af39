"""Every kind that is read: its group, versions and schema, in one table; and the two questions asked about a resource.

`key_of` says what a body is; `check_document` says what is wrong with it. Where one resource refers to another, `mesh.compile` looks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import msgspec

from mesh import (
    formats,
    kinds_core,
    kinds_data,
    kinds_gateway,
    kinds_grpc,
    kinds_istio,
    kinds_jwt,
    kinds_l4,
    kinds_own,
    kinds_quota,
    kinds_route,
    proxy_protocol,
    quota_changes,
    quota_tables,
)
from mesh.documents import Document, FieldPath, Key, Problem
from mesh.kinds_gateway import GATEWAY_GROUP
from mesh.schema import Faults, Fields, Free, Node, Rule, Table, Text, listed, nearest

DISCOVERY_GROUP: Final = "discovery.k8s.io"
OWN_GROUP: Final = "tollhouse.dev"
ISTIO_GROUP: Final = "security.istio.io"
DEFAULT_NAMESPACE: Final = "default"


class Fault(msgspec.Struct, frozen=True):
    """Why a body is not a resource."""

    path: FieldPath
    message: str


class Kind(msgspec.Struct, frozen=True, kw_only=True):
    """One kind that is read."""

    group: str
    name: str
    versions: tuple[str, ...]
    """Of `apiVersion`, the one to write first."""
    namespaced: bool
    body: Any
    """The schema (`Fields`) of the whole document."""
    note: str = ""
    """What `tollhouse` uses it for, for `docs` and help."""

    @property
    def api_versions(self) -> tuple[str, ...]:
        """`apiVersion` as it is written."""
        return tuple(f"{self.group}/{version}" if self.group else version for version in self.versions)


def _kind(
    group: str,
    name: str,
    versions: tuple[str, ...],
    required: Mapping[str, Node] | None = None,
    optional: Mapping[str, Node] | None = None,
    *,
    namespaced: bool = True,
    rule: Rule | None = None,
) -> Kind:
    metadata = Fields(
        {"name": Text(formats.subdomain)},
        {
            **({"namespace": Text(formats.label)} if namespaced else {}),
            "labels": Table(Text()),
            "annotations": Table(Text(most=262144)),
            "creationTimestamp": Text(),
            **dict.fromkeys(_GENERATED, Free()),
        },
        unsupported={} if namespaced else {"namespace": f"a {name} belongs to no namespace: leave it out"},
    )
    body = Fields(
        {"apiVersion": Text(), "kind": Text(), "metadata": metadata, **(required or {})},
        {"status": Free(), **(optional or {})},
        rule=rule,
    )
    return Kind(group=group, name=name, versions=versions, namespaced=namespaced, body=body)


_GENERATED: Final = (
    "uid",
    "resourceVersion",
    "generation",
    "generateName",
    "selfLink",
    "managedFields",
    "ownerReferences",
    "finalizers",
    "deletionTimestamp",
    "deletionGracePeriodSeconds",
)

_GATEWAY_V1: Final = ("v1", "v1beta1")

KINDS: Final[dict[tuple[str, str], Kind]] = {
    (kind.group, kind.name): kind
    for kind in (
        _kind("", "Namespace", ("v1",), {}, {"spec": Free()}, namespaced=False),
        _kind("", "Service", ("v1",), {"spec": kinds_core.SERVICE}, rule=proxy_protocol.service_rule),
        _kind("", "Secret", ("v1",), {}, kinds_core.SECRET),
        _kind("", "ConfigMap", ("v1",), {}, kinds_core.CONFIG_MAP),
        _kind(DISCOVERY_GROUP, "EndpointSlice", ("v1",), *kinds_core.ENDPOINT_SLICE, rule=kinds_core.slice_rule),
        _kind(GATEWAY_GROUP, "GatewayClass", _GATEWAY_V1, {"spec": kinds_gateway.GATEWAY_CLASS}, namespaced=False),
        _kind(GATEWAY_GROUP, "Gateway", _GATEWAY_V1, {"spec": kinds_gateway.GATEWAY}, rule=proxy_protocol.gateway_rule),
        _kind(GATEWAY_GROUP, "ListenerSet", ("v1",), {"spec": kinds_gateway.LISTENER_SET}),
        _kind(GATEWAY_GROUP, "HTTPRoute", _GATEWAY_V1, {"spec": kinds_route.HTTP_ROUTE}),
        _kind(GATEWAY_GROUP, "GRPCRoute", ("v1",), {"spec": kinds_grpc.GRPC_ROUTE}),
        _kind(GATEWAY_GROUP, "TCPRoute", ("v1", "v1alpha2"), {"spec": kinds_l4.L4_ROUTE}),
        _kind(GATEWAY_GROUP, "UDPRoute", ("v1", "v1alpha2"), {"spec": kinds_l4.L4_ROUTE}),
        _kind(
            GATEWAY_GROUP,
            "TLSRoute",
            ("v1", "v1alpha3", "v1alpha2"),
            {"spec": kinds_l4.TLS_ROUTE},
            rule=kinds_l4.tls_route_rule,
        ),
        _kind(GATEWAY_GROUP, "ReferenceGrant", ("v1", "v1beta1"), {"spec": kinds_gateway.REFERENCE_GRANT}),
        _kind(GATEWAY_GROUP, "BackendTLSPolicy", ("v1", "v1alpha3"), {"spec": kinds_gateway.BACKEND_TLS_POLICY}),
        _kind(
            ISTIO_GROUP,
            "AuthorizationPolicy",
            ("v1", "v1beta1"),
            {},
            {"spec": kinds_istio.AUTHORIZATION_POLICY},
            rule=kinds_istio.document_rule,
        ),
        _kind(ISTIO_GROUP, "RequestAuthentication", ("v1", "v1beta1"), {}, {"spec": kinds_jwt.REQUEST_AUTHENTICATION}),
        _kind(OWN_GROUP, "Mesh", ("v1",), {"spec": kinds_own.MESH}, namespaced=False),
        _kind(OWN_GROUP, "AccessPolicy", ("v1",), {"spec": kinds_own.ACCESS_POLICY}),
        _kind(OWN_GROUP, "PolicyExemption", ("v1",), {"spec": kinds_own.POLICY_EXEMPTION}),
        _kind(OWN_GROUP, quota_tables.KIND, ("v1",), {"spec": quota_tables.QUOTA_OVERRIDES}),
        _kind(OWN_GROUP, "QuotaPolicy", ("v1",), {"spec": kinds_quota.QUOTA_POLICY}),
        _kind(OWN_GROUP, quota_changes.KIND, ("v1",), {"spec": quota_changes.QUOTA_CHANGE}, rule=quota_changes.document_rule),
        _kind(OWN_GROUP, "ServiceIdentity", ("v1",), {"spec": kinds_own.SERVICE_IDENTITY}),
        _kind(OWN_GROUP, "PolicyRevision", ("v1",), {"spec": kinds_own.POLICY_REVISION}, namespaced=False, rule=kinds_own.revision_rule),
        _kind(OWN_GROUP, "DataRevision", ("v1",), {"spec": kinds_data.DATA_REVISION}, namespaced=False, rule=kinds_data.data_rule),
        _kind(OWN_GROUP, "ActiveData", ("v1",), {"spec": kinds_data.ACTIVE_DATA}, namespaced=False, rule=kinds_data.active_data_rule),
        _kind(OWN_GROUP, "ActivePolicy", ("v1",), {"spec": kinds_own.ACTIVE_POLICY}, namespaced=False, rule=kinds_own.active_rule),
    )
}
"""By group and kind."""

UNSUPPORTED: Final[dict[str, dict[str, str]]] = {
    GATEWAY_GROUP: {"BackendTrafficPolicy": "write retries and session persistence into the route"},
    "gateway.networking.x-k8s.io": {
        "XBackend": "write a Service of type ExternalName, with a BackendTLSPolicy",
        "XBackendTrafficPolicy": "write retries and session persistence into the route",
        "XListenerSet": "it has become ListenerSet of gateway.networking.k8s.io/v1",
        "XMesh": "write a Mesh of tollhouse.dev/v1",
    },
    "networking.istio.io": {
        "Gateway": "write a Gateway of gateway.networking.k8s.io/v1",
        "VirtualService": "write an HTTPRoute, TLSRoute or TCPRoute",
        "DestinationRule": "write a BackendTLSPolicy for TLS; balancing and outlier detection have fixed defaults",
        "ServiceEntry": "write a Service of type ExternalName, or one with an EndpointSlice",
        "WorkloadEntry": "write an EndpointSlice, or run tollhouse register",
        "WorkloadGroup": "run tollhouse register for each instance",
        "Sidecar": "there are no sidecars",
    },
    "security.istio.io": {
        "PeerAuthentication": "what clients must show is an option of a listener (tollhouse.dev/client-validation)",
    },
    "telemetry.istio.io": {"Telemetry": "logs and metrics are options of each process"},
}
"""Kinds that are known and do not work here: refused by name, so that nobody takes them for being in force."""


READ_GROUPS: Final = frozenset(("", DISCOVERY_GROUP, OWN_GROUP, *UNSUPPORTED))
PASSED_OVER: Final = frozenset(
    (
        "ComponentStatus",
        "Endpoints",
        "Event",
        "LimitRange",
        "Node",
        "PersistentVolume",
        "PersistentVolumeClaim",
        "Pod",
        "PodTemplate",
        "ReplicationController",
        "ResourceQuota",
        "ServiceAccount",
    )
)
"""Kinds of Kubernetes' core group that mean nothing here."""


def is_passed_over(key: Key) -> bool:
    """Whether a resource is of a kind that is somebody else's business, such as `apps/Deployment`: it may lie in a directory of manifests,
    and means nothing here. A kind of ours under another group is a mistake, and so is an unknown kind of a group that is read."""
    if key.group not in READ_GROUPS:
        return all(kind.name != key.kind for kind in KINDS.values())
    return not key.group and key.kind in PASSED_OVER


def is_foreign_group(body: Any) -> bool:
    """Whether `body` says that it is of an API group of which nothing is read."""
    version = body.get("apiVersion") if isinstance(body, dict) else None
    group, slash, _ = version.rpartition("/") if isinstance(version, str) else ("", "", "")
    return bool(slash) and group not in READ_GROUPS and isinstance(body.get("kind"), str)


def key_of(body: Any) -> Key | Fault:
    """What resource `body` is, or why it is none. Says nothing about its `spec`."""
    if not isinstance(body, dict):
        return Fault((), "a document is a mapping with apiVersion, kind and metadata")
    for name in ("apiVersion", "kind"):
        if not isinstance(body.get(name), str) or not body[name]:
            return Fault((name,), "is missing; every document begins with apiVersion, kind and metadata")
    if len(body["apiVersion"]) > 253 or len(body["kind"]) > 63 or not body["kind"].isalnum() or not body["kind"].isascii():
        return Fault(("kind",), f"{formats.shown(body['kind'])} is not the name of a kind")
    group, slash, _ = body["apiVersion"].rpartition("/")
    if slash and formats.subdomain(group):
        return Fault(("apiVersion",), f"{formats.shown(body['apiVersion'])} is not an apiVersion; write it as in {OWN_GROUP}/v1")
    metadata = body.get("metadata")
    if not isinstance(metadata, dict) or not isinstance(metadata.get("name"), str):
        return Fault(("metadata", "name"), f"is missing; every {body['kind']} needs a name")
    if wrong := formats.subdomain(metadata["name"]):
        return Fault(("metadata", "name"), wrong)
    namespace = metadata.get("namespace") or ""
    if not isinstance(namespace, str) or (namespace and formats.label(namespace)):
        return Fault(("metadata", "namespace"), formats.label(str(namespace)))
    kind = KINDS.get((group, body["kind"]))
    if kind is not None:
        namespace = (namespace or DEFAULT_NAMESPACE) if kind.namespaced else ""
    return Key(group, body["kind"], namespace, metadata["name"])


def check_document(document: Document) -> tuple[Problem, ...]:
    """Everything that is wrong with a resource by itself."""
    faults = Faults()
    key = document.key
    kind = KINDS.get((key.group, key.kind))
    if is_passed_over(key):
        return ()
    if kind is None:
        path, message = _unknown(key)
        faults.add(path, message)
    elif document.body["apiVersion"] not in kind.api_versions:
        version = formats.shown(document.body["apiVersion"])
        faults.add(("apiVersion",), f"{version} is not a version of {key.kind} that is read here; use {listed(kind.api_versions)}")
    else:
        kind.body.check(document.body, (), faults)
    return tuple(
        Problem(
            key=key,
            path=path,
            message=message,
            where=document.origin.at(path),
            reason="UnsupportedValue" if "not supported" in message else "Invalid",
        )
        for path, message in faults.found
    )


def _unknown(key: Key) -> tuple[FieldPath, str]:
    if key.kind in UNSUPPORTED.get(key.group, {}):
        return ("kind",), f"{key.group}/{key.kind} is not supported here; {UNSUPPORTED[key.group][key.kind]}"
    groups = [kind.group for kind in KINDS.values() if kind.name == key.kind]
    if groups:
        versions = [text for group in groups for text in KINDS[group, key.kind].api_versions]
        return ("apiVersion",), f"there is no {key.kind} in the group {formats.shown(key.group)}; use {listed(versions)}"
    near = nearest(key.kind, [kind.name for kind in KINDS.values()])
    hint = f"did you mean {near}?" if near else f"the kinds are {listed(sorted(kind.name for kind in KINDS.values()), 'and')}"
    return ("kind",), f"{formats.shown(key.kind)} is not a kind that is read here; {hint}"
