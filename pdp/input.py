"""The document that a policy sees as `input`: that of the OPA-Envoy plugin, so that policies written for it run unchanged.

It is made in two ways that give the same: from an `Asking` (`document`), and from a `CheckRequest` as Envoy or our own client sends it
(`check_request`, `document_of_check`). Field names are those of `envoy.service.auth.v3.AttributeContext` in JSON; what is empty is left
out, as JSON of protobuf has it; `size` is a number and `time` is text, as in OPA's documentation ("Envoy: policy primer").

* `attributes.source.principal` is the original caller's SPIFFE ID; absent when nobody proved who they are
* `attributes.contextExtensions` has `gateway`, `listener`, `route`, `template`, `service`, and `via` when a trusted gateway passed the
  request on; `client`, its address as trusted proxies and gateways tell it, when it is not that of the connection; each is absent when
  there is none
* `attributes.tlsSession.sni` is the name that the client asked for by TLS; absent without one
* `attributes.request.http.headers` has lower-case names and Envoy's pseudo headers (`:method`, `:path`, `:authority`, `:scheme`);
  several values are joined by `,` (cookies by `; `)
* `attributes.request.http.path` is the normalised path with its query
* `attributes.metadataContext.filterMetadata["envoy.filters.http.jwt_authn"].payload` has the claims of a verified token, as Istio
  configures Envoy; `metadataContext` is empty for a request without one

A connection below HTTP has no `attributes.request` (as with Envoy's network filter), and `parsed_path` is `[""]`.

Which revision is to answer is not in the document: over gRPC it travels as metadata, under `REVISION`.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Final

import msgspec
from envoy.service.auth.v3.attribute_context_pb2 import AttributeContext
from envoy.service.auth.v3.external_auth_pb2 import CheckRequest
from google.protobuf.json_format import MessageToDict

from mesh.http import NO_HEAD, RequestHead
from mesh.model import DecisionPolicy
from mesh.questions import Asking
from pdp.body import PARTIAL, parse_body
from pdp.target import split_target

REVISION: Final = "tollhouse-revision"
"""gRPC metadata that names the revision which is to answer, by its digest."""

VERSION: Final = {"ext_authz": "v3", "encoding": "protojson"}

Json = dict[str, Any]

_encode = msgspec.json.Encoder(decimal_format="number").encode
_COOKIE: Final = b"cookie"
_PARTIAL: Final = PARTIAL.encode()
_PSEUDO: Final = frozenset((":authority", ":method", ":path", ":scheme"))


def document(asking: Asking, policy: DecisionPolicy) -> bytes:
    """The input document, as JSON. Raises ValueError when there is none (a body that is not what its content type says)."""
    return _encode(document_tree(asking, policy))


def document_tree(asking: Asking, policy: DecisionPolicy) -> Json:
    """The input document, as plain JSON types (numbers of a body may be `Decimal`). Raises ValueError."""
    return _complete(attributes_tree(asking, policy))


def document_of_check(request: CheckRequest) -> bytes:
    """The input document of a request that came over gRPC, as JSON. Raises ValueError when there is none."""
    attributes = request.attributes
    # Envoy's network filter asks about a connection: there is no request then.
    if not attributes.request.HasField("http") and (attributes.HasField("request") or not attributes.HasField("source")):
        raise ValueError("the check request has no attributes.request.http, and is not about a connection: no attributes.source alone")
    return _encode(_complete(_attributes(attributes)))


def shown_body(asking: Asking, policy: DecisionPolicy) -> tuple[bytes, bool]:
    """What `policy` is shown of the body, and whether that is less than all of it."""
    body = asking.body
    if policy.body_limit <= 0 or body is None:
        return b"", False
    return body[: policy.body_limit], not asking.body_complete or len(body) > policy.body_limit


def check_request(asking: Asking, policy: DecisionPolicy) -> CheckRequest:
    """What an ext_authz server is sent (envoy.service.auth.v3). The revision goes into the call's metadata, see `REVISION`."""
    request = CheckRequest()
    attributes = request.attributes
    peer, head = asking.peer, asking.head
    source = attributes.source
    address = source.address.socket_address
    address.address, address.port_value = peer.address, peer.port
    source.principal = asking.caller.principal
    address = attributes.destination.address.socket_address
    address.address, address.port_value = peer.local_address, peer.local_port
    shown = attributes.context_extensions
    for name, value in extensions(asking).items():
        shown[name] = value
    attributes.metadata_context.SetInParent()
    if peer.sni:
        attributes.tls_session.sni = peer.sni
    if head.bearer is not None:
        for name, fields in head.bearer.metadata.items():
            attributes.metadata_context.filter_metadata[name].update(fields)
    if head is NO_HEAD:
        return request
    whole = attributes.request
    seconds, microseconds = _instant(asking.received)
    time = whole.time
    time.seconds, time.nanos = seconds, microseconds * 1000
    http = whole.http
    headers = header_map(asking, policy)
    http.id = headers.get("x-request-id", "")
    http.method, http.scheme, http.host = headers[":method"], headers[":scheme"], headers[":authority"]
    http.path, http.protocol = headers[":path"], text(head.version)
    shown = http.headers
    for name, value in headers.items():
        shown[name] = value
    body, _ = shown_body(asking, policy)
    if body:
        http.size = len(asking.body or b"")
        try:
            http.body = body.decode()
        except UnicodeDecodeError:
            http.raw_body = body
    return request


def attributes_tree(asking: Asking, policy: DecisionPolicy) -> Json:
    """`input.attributes`."""
    peer, head = asking.peer, asking.head
    source: Json = {"address": {"socketAddress": _socket(peer.address, peer.port)}}
    if asking.caller.principal:
        source["principal"] = asking.caller.principal
    destination = {"address": {"socketAddress": _socket(peer.local_address, peer.local_port)}}
    tree: Json = {"source": source, "destination": destination, "metadataContext": metadata(asking)}
    if peer.sni:
        tree["tlsSession"] = {"sni": peer.sni}
    if more := extensions(asking):
        tree["contextExtensions"] = more
    if head is NO_HEAD:
        return tree
    headers = header_map(asking, policy)
    http: Json = {
        "method": headers[":method"],
        "headers": headers,
        "path": headers[":path"],
        "host": headers[":authority"],
        "scheme": headers[":scheme"],
        "protocol": text(head.version),
        "id": headers.get("x-request-id", ""),
    }
    if not all(http.values()):
        http = _filled(http)
    body, _ = shown_body(asking, policy)
    if body:
        http["size"] = len(asking.body or b"")
        try:
            http["body"] = body.decode()
        except UnicodeDecodeError:
            http["rawBody"] = base64.b64encode(body).decode()
    seconds, microseconds = _instant(asking.received)
    tree["request"] = {"time": _rfc3339(seconds, microseconds * 1000), "http": http}
    return tree


def metadata(asking: Asking) -> Json:
    """`input.attributes.metadataContext`."""
    bearer = asking.head.bearer
    return {} if bearer is None else {"filterMetadata": bearer.metadata}


def extensions(asking: Asking) -> dict[str, str]:
    """`input.attributes.contextExtensions`."""
    found = {"gateway": asking.gateway, "listener": asking.listener, "route": asking.route, "template": asking.template}
    if not (asking.gateway and asking.listener and asking.route and asking.template):
        found = _filled(found)
    if asking.service:
        found["service"] = asking.service
    if asking.caller.via:
        found["via"] = asking.caller.via
    if asking.client:
        found["client"] = asking.client
    return found


def header_map(asking: Asking, policy: DecisionPolicy) -> dict[str, str]:
    """`input.attributes.request.http.headers`."""
    head = asking.head
    found = {
        ":authority": head.authority.decode("utf-8", "replace"),
        ":method": head.method.decode("utf-8", "replace"),
        ":path": target_of(head),
        ":scheme": head.scheme.decode("utf-8", "replace"),
    }
    for name, value in head.headers:
        key = name.decode("utf-8", "replace")  # as `text`, without a call for each
        if key in found:
            if key not in _PSEUDO:
                found[key] += ("; " if name == _COOKIE else ",") + text(value)
        elif name != _PARTIAL:
            found[key] = value.decode("utf-8", "replace")
    if policy.body_limit > 0 and asking.body is not None:
        found[PARTIAL] = "true" if shown_body(asking, policy)[1] else "false"
    return found


def header_text(head: RequestHead, name: bytes) -> str | None:
    """One value of `header_map`, for a name that is neither a pseudo header nor `PARTIAL`."""
    found: str | None = None
    for key, value in head.headers:
        if key == name:
            found = text(value) if found is None else found + ("; " if name == _COOKIE else ",") + text(value)
    return found


def target_of(head: RequestHead) -> str:
    """`input.attributes.request.http.path`: the normalised path and the query."""
    return text(head.path) if head.query is None else f"{text(head.path)}?{text(head.query)}"


def text(value: bytes) -> str:
    """Bytes as text; what is no UTF-8 becomes U+FFFD."""
    return value.decode("utf-8", "replace")


def _complete(attributes: Json) -> Json:
    http: Json = attributes["request"]["http"] if "request" in attributes else {}
    path, query = split_target(http.get("path", ""))
    parsed, truncated = None, False
    if "body" in http or "rawBody" in http:
        body = http["body"].encode() if "body" in http else base64.b64decode(http["rawBody"])
        parsed, truncated = parse_body(http.get("headers", {}), body)
    return {
        "attributes": attributes,
        "parsed_path": path,
        "parsed_query": query,
        "parsed_body": parsed,
        "truncated_body": truncated,
        "version": VERSION,
    }


def _socket(address: str, port: int) -> Json:
    return {"address": address, "portValue": port} if address else {"portValue": port}


def _filled(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value}


def _instant(seconds: float) -> tuple[int, int]:
    """Whole seconds and microseconds."""
    return divmod(round(seconds * 1e6), 1_000_000)


def _rfc3339(seconds: int, nanos: int) -> str:
    """As JSON of protobuf writes an instant: with 0, 3, 6 or 9 digits."""
    whole = _whole_second(seconds)
    if not nanos:
        return f"{whole}Z"
    digits = 3 if nanos % 1_000_000 == 0 else 6 if nanos % 1000 == 0 else 9
    return f"{whole}.{nanos:09d}"[: len(whole) + 1 + digits] + "Z"


@lru_cache(maxsize=16)
def _whole_second(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")


# From protobuf. The fields that every request has are read by hand, since `MessageToDict` costs several times as much.


def _attributes(attributes: AttributeContext) -> Json:
    tree: Json = {}
    for name in ("source", "destination"):
        if attributes.HasField(name):
            tree[name] = _peer(getattr(attributes, name))
    if attributes.HasField("request"):
        tree["request"] = _request(attributes.request)
    if attributes.context_extensions:
        tree["contextExtensions"] = dict(attributes.context_extensions)
    for field, name in (
        ("metadata_context", "metadataContext"),
        ("route_metadata_context", "routeMetadataContext"),
        ("tls_session", "tlsSession"),
    ):
        if attributes.HasField(field):
            message = getattr(attributes, field)
            tree[name] = MessageToDict(message) if message.ByteSize() else {}
    return tree


def _peer(peer: Any) -> Json:
    tree: Json = {}
    if peer.HasField("address"):
        address = peer.address
        socket = address.socket_address
        plain = {"address", "port_value"}
        if address.WhichOneof("address") == "socket_address" and all(field.name in plain for field, _ in socket.ListFields()):
            tree["address"] = {"socketAddress": _filled({"address": socket.address})}
            if socket.WhichOneof("port_specifier"):
                tree["address"]["socketAddress"]["portValue"] = socket.port_value
        else:
            tree["address"] = MessageToDict(address)
    if peer.labels:
        tree["labels"] = dict(peer.labels)
    return tree | _filled({"service": peer.service, "principal": peer.principal, "certificate": peer.certificate})


def _request(request: Any) -> Json:
    tree: Json = {}
    if request.HasField("time"):
        tree["time"] = _rfc3339(request.time.seconds, request.time.nanos)
    http = request.http
    fields = _filled(
        {
            "id": http.id,
            "method": http.method,
            "headers": dict(http.headers),
            "path": http.path,
            "host": http.host,
            "scheme": http.scheme,
            "query": http.query,
            "fragment": http.fragment,
            "size": http.size,
            "protocol": http.protocol,
            "body": http.body,
        }
    )
    if http.raw_body:
        fields["rawBody"] = base64.b64encode(http.raw_body).decode()
    if http.HasField("header_map"):
        fields["headerMap"] = MessageToDict(http.header_map)
    tree["http"] = fields
    return tree
