"""`Mesh.extensionProviders`: the authorization services that AuthorizationPolicies with the action CUSTOM ask, with the fields of Istio's
`MeshConfig.ExtensionProvider` (istio.io, "Global Mesh Options"), and the rate-limit services that QuotaPolicies may ask, for which Istio
has no field. A service is named as there, and is one of the Services that are read."""

from __future__ import annotations

import re
from typing import Any, Final

import msgspec

from mesh import formats
from mesh.documents import FieldPath
from mesh.filters import ExternalAuth
from mesh.formats import shown
from mesh.kinds_core import PORT
from mesh.quota_services import DOMAIN, RateLimitService
from mesh.schema import Duration, Faults, Fields, Flag, Items, Number, Table, Text, listed

TIMEOUT: Final = 0.5
"""Seconds for one question, unless the provider says otherwise. (Istio's default of ten minutes is no bound for a request.)"""
MOST_BODY: Final = 1 << 20
_STATUS: Final = re.compile(r"[45][0-9][0-9]")
_HOST: Final = re.compile(r"(?:([a-z0-9-]+)/)?([a-z0-9-]+)(?:\.([a-z0-9-]+)(?:\.svc(?:\.[a-z0-9.-]+)?)?)?")


class Provider(msgspec.Struct, frozen=True, kw_only=True):
    """One provider."""

    namespace: str
    service: str
    port: int
    auth: ExternalAuth
    timeout: float = TIMEOUT
    fail_open: bool = False
    status: int = 0
    """What a client gets when the provider can't be asked; 0 for 503."""
    body_limit: int = 0
    body_partial: bool = False


def service_host(value: str) -> str:
    """A Service as Istio names it: `NAME.NAMESPACE.svc.cluster.local`, or with `NAMESPACE/` in front."""
    found = _HOST.fullmatch(value)
    if found is None or not (found[1] or found[3]):
        return f"{shown(value)} is not a Service; write it as in authz.shop.svc.cluster.local"
    if found[1] and found[3] and found[1] != found[3]:
        return f"{shown(value)} names two namespaces"
    return ""


def status_code(value: str) -> str:
    """A status of HTTP from 400 to 599, in quotes."""
    return "" if _STATUS.fullmatch(value) else f'{shown(value)} is not a status of a refusal; write it as in "403"'


def _header(value: str) -> str:
    if "*" in value:
        return f"{shown(value)}: patterns are not supported here; name each header"
    return formats.header_name(value)


_NAMES: Final = Items(Text(_header), most=64)
_BODY: Final = Fields(
    {"maxRequestBytes": Number(1, MOST_BODY, "bytes")},
    {"allowPartialMessage": Flag()},
    unsupported={"packAsBytes": "text goes as text, and anything else as bytes"},
)
_COMMON: Final[dict[str, Any]] = {
    "timeout": Duration(),
    "failOpen": Flag(),
    "statusOnError": Text(status_code),
    "includeRequestBodyInCheck": _BODY,
}
_UNSUPPORTED: Final = {"clearRouteCache": "a request is routed once, by what its client sent"}


_OTHERS: Final = (
    "zipkin",
    "lightstep",
    "datadog",
    "stackdriver",
    "opencensus",
    "skywalking",
    "opentelemetry",
    "prometheus",
    "envoyFileAccessLog",
    "envoyHttpAls",
    "envoyTcpAls",
    "envoyOtelAls",
    "sds",
)


def _positive(value: Any, where: FieldPath, faults: Faults) -> None:
    if value.get("timeout") is not None and formats.seconds(value["timeout"]) <= 0:
        faults.add((*where, "timeout"), "must be longer than nothing")


_GRPC: Final = Fields({"service": Text(service_host), "port": PORT}, _COMMON, unsupported=_UNSUPPORTED, rule=_positive)
_HTTP: Final = Fields(
    {"service": Text(service_host), "port": PORT},
    {
        **_COMMON,
        "pathPrefix": Text(formats.path),
        "includeRequestHeadersInCheck": _NAMES,
        "includeHeadersInCheck": _NAMES,
        "includeAdditionalHeadersInCheck": Table(Text(formats.header_match_value), name=formats.header_name, most=64),
        "headersToUpstreamOnAllow": _NAMES,
        "headersToDownstreamOnAllow": _NAMES,
        "headersToDownstreamOnDeny": _NAMES,
    },
    unsupported=_UNSUPPORTED,
    rule=_positive,
)


_RATE_LIMIT: Final = Fields({"service": Text(service_host), "port": PORT}, {"domain": Text(least=1, most=256)})
_KINDS: Final = {"envoyExtAuthzGrpc": _GRPC, "envoyExtAuthzHttp": _HTTP, "envoyRateLimitGrpc": _RATE_LIMIT}


def _one_kind(value: Any, where: FieldPath, faults: Faults) -> None:
    if len([name for name in _KINDS if value.get(name)]) != 1:
        faults.add(where, f"must have exactly one of {listed(_KINDS)}")


EXTENSION_PROVIDERS: Final = Items(
    Fields(
        {"name": Text(least=1, most=253)},
        _KINDS,
        unsupported=dict.fromkeys(_OTHERS, "only providers of authorization and of rate limits are read here"),
        rule=_one_kind,
    ),
    most=64,
    unique="name",
)


def providers_of(mesh: Any) -> dict[str, Provider]:
    """The providers of authorization of a checked Mesh's `spec`, by name."""
    return {item["name"]: _provider(item) for item in mesh.get("extensionProviders") or [] if not item.get("envoyRateLimitGrpc")}


def rate_limit_services(mesh: Any) -> dict[str, RateLimitService]:
    """The rate-limit services of a checked Mesh's `spec`, by name."""
    found = {}
    for item in mesh.get("extensionProviders") or []:
        body = item.get("envoyRateLimitGrpc")
        if body:
            namespace, service = service_name(body)
            cluster = f"{namespace}/{service}:{body['port']}"
            found[item["name"]] = RateLimitService(cluster=cluster, domain=body.get("domain") or DOMAIN)
    return found


def provider_services(mesh: Any) -> list[tuple[str, str, str, int]]:
    """Of each provider of a checked Mesh's `spec`, in their order: its name, and namespace, name and port of its Service."""
    found = []
    for item in mesh.get("extensionProviders") or []:
        body = next(item[kind] for kind in _KINDS if item.get(kind))
        found.append((item["name"], *service_name(body), body["port"]))
    return found


def service_name(body: Any) -> tuple[str, str]:
    """Namespace and name of a checked provider's Service."""
    found = _HOST.fullmatch(body["service"])
    assert found is not None
    return found[1] or found[3], found[2]


def _provider(item: Any) -> Provider:
    http = item.get("envoyExtAuthzHttp")
    body = http or item["envoyExtAuthzGrpc"]
    (namespace, service), port = service_name(body), body["port"]
    wanted = body.get("includeRequestBodyInCheck") or {}
    return Provider(
        namespace=namespace,
        service=service,
        port=port,
        auth=ExternalAuth(
            cluster=f"{namespace}/{service}:{port}",
            protocol="HTTP" if http else "GRPC",
            path=(body.get("pathPrefix") or "").rstrip("/").encode(),
            headers=_names(body, "includeRequestHeadersInCheck") | _names(body, "includeHeadersInCheck"),
            copied=_names(body, "headersToUpstreamOnAllow"),
            copies_all=False,
            added=tuple(
                (name.lower().encode(), value.encode()) for name, value in (body.get("includeAdditionalHeadersInCheck") or {}).items()
            ),
            told=_names(body, "headersToDownstreamOnAllow"),
            told_denied=_names(body, "headersToDownstreamOnDeny"),
        ),
        timeout=formats.seconds(body["timeout"]) if body.get("timeout") else TIMEOUT,
        fail_open=bool(body.get("failOpen")),
        status=int(body.get("statusOnError") or 0),
        body_limit=wanted.get("maxRequestBytes") or 0,
        body_partial=bool(wanted.get("allowPartialMessage")),
    )


def _names(body: Any, field: str) -> frozenset[bytes]:
    return frozenset(name.lower().encode() for name in body.get(field) or [])
