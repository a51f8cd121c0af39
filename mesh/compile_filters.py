"""From the filters of a rule or a backend, and from what they refer to, to what is done with a request."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from mesh.compile_matches import normal_path
from mesh.compile_policies import NOTHING, Attached
from mesh.compile_world import Look, PortFacts, Trouble
from mesh.documents import Document, FieldPath
from mesh.filters import Cors, ExternalAuth, HeaderChange, Mirror, OriginPattern, Redirect, Rewrite
from mesh.http import Header
from mesh.kinds_l4 import L4_KINDS
from mesh.model import DecisionPolicy
from mesh.schema import listed
from mesh.tokens import NOT_AUTHENTICATED, Authentication


class Reference(msgspec.Struct, frozen=True, kw_only=True):
    """What a `backendRef` leads to."""

    service: str
    """`namespace/name`."""
    cluster: str = ""
    """Empty when nothing can be sent there; why, has been reported."""
    attached: Attached = NOTHING
    """At the service; nothing when it is another gateway, which asks itself."""
    named: bool = False
    """Whether a policy is attached to the service by name, rather than to all of its namespace or mesh."""
    authentication: Authentication = NOT_AUTHENTICATED
    """How tokens are verified before it."""


def reference(document: Document, ref: Any, path: FieldPath, look: Look, trouble: Trouble) -> Reference:
    """Resolves `ref`, which is at `path`, and reports why it can't be."""
    namespace = ref.get("namespace") or document.key.namespace
    service = f"{namespace}/{ref['name']}"
    kind = document.key.kind
    if (ref.get("kind") or "Service") != "Service" or ref.get("group"):
        what = f"{ref.get('group') or 'core'}/{ref.get('kind') or 'Service'}"
        trouble.add((*path, "kind"), f"{what} can't be a backend here; use a Service", "InvalidKind")
    elif not look("granted", kind, document.key.namespace, "", "Service", namespace, ref["name"]):
        message = f"Service {service} is in another namespace, which has not granted it; apply a ReferenceGrant in {namespace}"
        trouble.add(path, f"{message} from {kind} in {document.key.namespace}", "RefNotPermitted")
    else:
        facts = look("service", namespace, ref["name"])
        udp = kind == "UDPRoute"
        known = {} if isinstance(facts, str) else facts.udp if udp else facts.ports
        if isinstance(facts, str):
            trouble.add((*path, "name"), facts, "BackendNotFound")
        elif ref["port"] not in known:
            ports = ", ".join(str(port) for port in sorted(known)) or "none"
            what = f"{'UDP' if udp else 'TCP'} port {ref['port']}"
            trouble.add((*path, "port"), f"Service {service} has no {what}; it has {ports}", "BackendNotFound")
        elif known[ref["port"]].broken:
            port = known[ref["port"]]
            trouble.add(path, f"nothing is sent to Service {service} port {ref['port']}: {port.broken}", port.reason)
        elif why := _unspoken(kind, known[ref["port"]]):
            trouble.add((*path, "port"), f"nothing is sent to Service {service} port {ref['port']}: {why}", "UnsupportedProtocol")
        else:
            cluster = known[ref["port"]].cluster
            if facts.gateway:
                return Reference(service=service, cluster=cluster)
            attached = look("attached", "Service", namespace, ref["name"], "")
            authentication = look("service_authentication", namespace, ref["name"])
            named = attached is not NOTHING or authentication != NOT_AUTHENTICATED or look("names_service", namespace, ref["name"])
            attached = look("authorized_service", namespace, ref["name"], ref["port"], kind in L4_KINDS) + attached
            return Reference(service=service, cluster=cluster, attached=attached, named=named, authentication=authentication)
    return Reference(service=service)


def _unspoken(kind: str, port: PortFacts) -> str:
    """Why a route of this kind can't send anything to a port, by the protocol that the port is for (GEP-1911, "Supporting Protocols")."""
    if kind == "GRPCRoute":
        return port.no_http or port.no_grpc
    return port.no_http if kind == "HTTPRoute" else ""


class Filters(msgspec.Struct, frozen=True, kw_only=True):
    """The compiled filters of one rule or backend."""

    request_headers: HeaderChange | None = None
    response_headers: HeaderChange | None = None
    rewrite: Rewrite | None = None
    redirect: Redirect | None = None
    cors: Cors | None = None
    mirrors: tuple[Mirror, ...] = ()
    attached: Attached = NOTHING
    """What an `ExtensionRef` names, at level rule."""
    broken: bool = False
    """Whether one of the filters can't be had: then nothing may pass (Gateway API: 500)."""


def compile_filters(document: Document, items: Any, path: FieldPath, look: Look, trouble: Trouble) -> Filters:
    """The `items` of a list of filters, which is at `path`."""
    if not items:
        return NO_FILTERS
    once = {item["type"]: item for item in items}
    mirrors = []
    attached, broken = NOTHING, False
    for index, item in enumerate(items):
        if item["type"] == "ExtensionRef":
            found = _extension(document, item["extensionRef"], (*path, index, "extensionRef"), look, trouble)
            broken = broken or found is None
            attached = attached + found if found is not None else attached
        if item["type"] == "ExternalAuth":
            found = _auth(document, item["externalAuth"], (*path, index, "externalAuth"), look, trouble)
            broken = broken or found is None
            attached = attached + found if found is not None else attached
        if item["type"] == "RequestMirror":
            mirror = _mirror(document, item["requestMirror"], (*path, index, "requestMirror"), look, trouble)
            if mirror is not None:
                mirrors.append(mirror)
    return Filters(
        request_headers=_header_change(once.get("RequestHeaderModifier", {}).get("requestHeaderModifier")),
        response_headers=_header_change(once.get("ResponseHeaderModifier", {}).get("responseHeaderModifier")),
        rewrite=_rewrite(once["URLRewrite"]["urlRewrite"]) if "URLRewrite" in once else None,
        redirect=_redirect(once["RequestRedirect"]["requestRedirect"]) if "RequestRedirect" in once else None,
        cors=_cors(once["CORS"]["cors"]) if "CORS" in once else None,
        mirrors=tuple(mirrors),
        attached=attached,
        broken=broken,
    )


NO_FILTERS = Filters()


AUTH_TIMEOUT = 0.5
"""Seconds for one question to an authorization service, as for any other decision."""


def _names(items: Any) -> frozenset[bytes]:
    return frozenset(name.lower().encode() for name in items or [])


def _auth(document: Document, body: Any, path: FieldPath, look: Look, trouble: Trouble) -> Attached | None:
    found = reference(document, body["backendRef"], (*path, "backendRef"), look, trouble)
    if not found.cluster:
        return None
    if found.named:
        message = f"Service {found.service} has a policy of its own, which is not asked about questions to it"
        trouble.add((*path, "backendRef"), f"{message}; use a Service without one ({_MEANWHILE})", "RefNotPermitted")
        return None
    own = body.get("grpc") or body.get("http") or {}
    auth = ExternalAuth(
        cluster=found.cluster,
        protocol=body["protocol"],
        path=normal_path(own.get("path") or "").rstrip(b"/"),
        headers=_names(own.get("allowedHeaders")),
        copied=_names(own.get("allowedResponseHeaders")),
    )
    policy = DecisionPolicy(
        name=f"{document.key.namespace}/{document.key.name} externalAuth",
        level="rule",
        provider=found.cluster,
        auth=auth,
        timeout=AUTH_TIMEOUT,
        body_limit=(body.get("forwardBody") or {}).get("maxSize") or 0,
    )
    return Attached((policy,))


EXTENSIONS = ("AccessPolicy", "QuotaPolicy")
_MEANWHILE = "what it stands before is answered with 500 until then"


def _extension(document: Document, ref: Any, path: FieldPath, look: Look, trouble: Trouble) -> Attached | None:
    if ref["group"] != "tollhouse.dev" or ref["kind"] not in EXTENSIONS:
        what = f"{ref['group'] or 'core'}/{ref['kind']}"
        message = f"{what} is no filter that is known here; use {listed(f'tollhouse.dev/{kind}' for kind in EXTENSIONS)}"
        trouble.add((*path, "kind"), f"{message} ({_MEANWHILE})", "InvalidKind")
        return None
    found: Attached | str = look("extension", ref["kind"], document.key.namespace, ref["name"])
    if isinstance(found, str):
        trouble.add((*path, "name"), f"{found} ({_MEANWHILE})", "BackendNotFound")
        return None
    return found


def _mirror(document: Document, body: Any, path: FieldPath, look: Look, trouble: Trouble) -> Mirror | None:
    found = reference(document, body["backendRef"], (*path, "backendRef"), look, trouble)
    if not found.cluster:
        return None
    if found.attached.decisions or found.attached.limits or found.authentication != NOT_AUTHENTICATED:
        # A copy is sent once the request itself is permitted, and nobody is asked again: it must not be a way around these.
        message = f"nothing is copied to Service {found.service}: it has a policy of its own, which is not asked about copies"
        trouble.add((*path, "backendRef"), f"{message}; mirror to a Service without one", "RefNotPermitted")
        return None
    fraction = body.get("fraction") or {}
    numerator, denominator = 100, 100
    if body.get("percent") is not None:
        numerator = body["percent"]
    elif fraction:
        numerator = fraction["numerator"]
        denominator = fraction["denominator"] if fraction.get("denominator") is not None else 100
    return Mirror(cluster=found.cluster, service=found.service, numerator=numerator, denominator=denominator) if numerator else None


_OWN_PORTS = {"http": "80", "https": "443"}


def _origin(value: str) -> tuple[str, str, str]:
    """Scheme, host and port (empty for the scheme's own) of an origin."""
    scheme, _, rest = value.lower().partition("://")
    host, _, port = rest.partition(":")
    port = port.lstrip("0")
    return scheme, host, "" if port == _OWN_PORTS[scheme] else port


def _cors(body: Any) -> Cors:
    allowed = body.get("allowOrigins") or []
    parts = [_origin(value) for value in allowed if value != "*"]
    credentials = bool(body.get("allowCredentials"))
    expose = body.get("exposeHeaders") or []
    if "*" in expose:
        # With credentials a star is a name like any other to a client.
        expose = [name for name in expose if name != "*"] if credentials else ["*"]
    return Cors(
        any_origin="*" in allowed,
        origins=tuple(f"{scheme}://{host}{':' + port if port else ''}".encode() for scheme, host, port in parts if "*" not in host),
        patterns=tuple(OriginPattern(scheme.encode(), host[1:].encode(), port.encode()) for scheme, host, port in parts if "*" in host),
        credentials=credentials,
        methods=", ".join(body.get("allowMethods") or []).encode(),
        headers=", ".join(body.get("allowHeaders") or []).encode(),
        expose=", ".join(expose).encode(),
        max_age=body.get("maxAge") or 5,
    )


def _pairs(items: Any) -> tuple[Header, ...]:
    return tuple((item["name"].lower().encode(), item["value"].encode("latin-1")) for item in items or [])


def _header_change(body: Any) -> HeaderChange | None:
    if not body:
        return None
    removed = tuple(name.lower().encode() for name in body.get("remove") or [])
    return HeaderChange(set=_pairs(body.get("set")), add=_pairs(body.get("add")), remove=removed)


def _path_change(body: Any) -> tuple[Literal["", "full", "prefix"], bytes]:
    modifier = body.get("path")
    if not modifier:
        return "", b""
    if modifier["type"] == "ReplaceFullPath":
        return "full", normal_path(modifier["replaceFullPath"])
    return "prefix", normal_path(modifier["replacePrefixMatch"]).rstrip(b"/")


def _rewrite(body: Any) -> Rewrite:
    mode, path = _path_change(body)
    return Rewrite(hostname=(body.get("hostname") or "").encode(), path_mode=mode, path=path)


def _redirect(body: Any) -> Redirect:
    mode, path = _path_change(body)
    return Redirect(
        scheme=(body.get("scheme") or "").encode(),
        hostname=(body.get("hostname") or "").encode(),
        port=body.get("port") or 0,
        path_mode=mode,
        path=path,
        status=body.get("statusCode") or 302,
    )
