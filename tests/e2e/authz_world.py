"""An ext_authz server that answers as it was told, and an Envoy that asks it: beside ours, what does a client see and what an upstream?"""

from __future__ import annotations

import contextlib
import http.client
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from envoy.service.auth.v3.external_auth_pb2 import CheckRequest, CheckResponse

from tests import servers

TYPE = "type.googleapis.com/envoy.extensions."
CASE = "x-case"


class Script(grpc.GenericRpcHandler):
    """Answers each check as its header `x-case` says, with one of `answers`; keeps what it was asked last for each."""

    def __init__(self) -> None:
        self.answers: dict[str, CheckResponse] = {}
        self.asked: dict[str, CheckRequest] = {}

    def service(self, details: Any) -> Any:
        return grpc.unary_unary_rpc_method_handler(
            self._check, request_deserializer=CheckRequest.FromString, response_serializer=CheckResponse.SerializeToString
        )

    def _check(self, request: CheckRequest, context: Any) -> CheckResponse:
        case = request.attributes.request.http.headers[CASE]
        self.asked[case] = request
        return self.answers[case]


@contextlib.contextmanager
def scripted() -> Iterator[tuple[Script, int]]:
    """The server, and its port."""
    script = Script()
    server = grpc.server(ThreadPoolExecutor(4))
    server.add_generic_rpc_handlers((script,))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield script, port
    finally:
        server.stop(None)


def cluster(name: str, port: int, *, http2: bool) -> dict[str, Any]:
    """One of Envoy's clusters, at a loopback port."""
    where = {"endpoint": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": port}}}}
    made: dict[str, Any] = {
        "name": name,
        "type": "STATIC",
        "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": [where]}]},
    }
    if http2:
        options = {"@type": f"{TYPE}upstreams.http.v3.HttpProtocolOptions", "explicit_http_config": {"http2_protocol_options": {}}}
        made["typed_extension_protocol_options"] = {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": options}
    return made


def bootstrap(port: int, upstream: int, authz: dict[str, Any], *more: dict[str, Any], settings: dict[str, Any] | None = None) -> str:
    """An Envoy that has `authz` (an ext_authz filter) answered before each request to `upstream`; `more` clusters, for it to ask."""
    filters = [
        {"name": "authz", "typed_config": {"@type": f"{TYPE}filters.http.ext_authz.v3.ExtAuthz", **authz}},
        {"name": "router", "typed_config": {"@type": f"{TYPE}filters.http.router.v3.Router"}},
    ]
    route: dict[str, Any] = {"match": {"prefix": "/"}, "route": {"cluster": "up"}}
    if settings:
        per_route = {"@type": f"{TYPE}filters.http.ext_authz.v3.ExtAuthzPerRoute", "check_settings": settings}
        route["typed_per_filter_config"] = {"authz": per_route}
    manager = {
        "@type": f"{TYPE}filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "in",
        "normalize_path": True,
        "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [route]}]},
        "http_filters": filters,
    }
    listener = {
        "address": {"socket_address": {"address": "127.0.0.1", "port_value": port}},
        "filter_chains": [{"filters": [{"name": "hcm", "typed_config": manager}]}],
    }
    return json.dumps({"static_resources": {"listeners": [listener], "clusters": [cluster("up", upstream, http2=False), *more]}})


class Said:
    """What came of one request at a port."""

    def __init__(self, port: int, case: str, path: str, headers: list[tuple[str, str]], method: str = "GET", body: bytes = b"") -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        for name, value in [("host", "shop.example"), (CASE, case), *headers]:
            connection.putheader(name, value)
        if body:
            connection.putheader("content-length", str(len(body)))
        connection.endheaders(body or None)
        answer = connection.getresponse()
        self.status = answer.status
        self.headers = [(name.lower(), value) for name, value in answer.getheaders()]
        self.body = answer.read().decode()
        connection.close()

    @property
    def upstream(self) -> dict[str, Any] | None:
        """What the upstream was sent; None when it was not asked."""
        if ("x-seen-by", "v1") not in self.headers and not any(name == "x-seen-by" for name, _ in self.headers):
            return None
        try:
            found: dict[str, Any] = json.loads(self.body)
        except ValueError:
            return None
        return found if isinstance(found, dict) and "service" in found else None


def options() -> dict[str, Any]:
    """The ext_authz filter of an Envoy that asks the cluster `authz`."""
    return {"transport_api_version": "V3", "grpc_service": {"envoy_grpc": {"cluster_name": "authz"}, "timeout": "5s"}}


@contextlib.contextmanager
def envoy(upstream: int, authz: int, **more: Any) -> Iterator[int]:
    """An Envoy that asks the server at the port `authz`; gives its own."""
    port = servers.free_port()
    with servers.envoy(bootstrap(port, upstream, {**options(), **more}, cluster("authz", authz, http2=True)), port):
        yield port
