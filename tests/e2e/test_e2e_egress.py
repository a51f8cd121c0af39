"""An egress gateway under policy as an HTTPS proxy with mutual TLS: CONNECT over HTTP/1.1 and HTTP/2, by curl and by a newer libcurl."""

from __future__ import annotations

import http.server
import io
import json
import os
import ssl
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pycurl
import pytest

from identity.ca import Authority, write_identity
from tests import servers

pytestmark = pytest.mark.e2e
HTTPS2 = 3
"""libcurl's CURLPROXY_HTTPS2, which pycurl has no name for."""
MANIFESTS = """
apiVersion: gateway.networking.k8s.io/v1
kind: GatewayClass
metadata: {{name: tollhouse}}
spec: {{controllerName: tollhouse.dev/gateway-controller}}
---
apiVersion: tollhouse.dev/v1
kind: Mesh
metadata: {{name: shop}}
spec: {{trustDomain: shop.example}}
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {{namespace: edge, name: egress}}
spec:
  gatewayClassName: tollhouse
  listeners:
  - name: proxy
    port: {proxy}
    protocol: HTTPS
    allowedRoutes: {{namespaces: {{from: All}}}}
    tls: {{options: {{tollhouse.dev/certificate: SVID, tollhouse.dev/client-validation: TrustBundle}}}}
---
apiVersion: v1
kind: Service
metadata: {{namespace: shop, name: bank}}
spec: {{ports: [{{port: 443}}]}}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{namespace: shop, name: bank-1, labels: {{kubernetes.io/service-name: bank}}}}
addressType: IPv4
ports: [{{port: {bank}}}]
endpoints: [{{addresses: [127.0.0.1]}}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {{namespace: shop, name: bank}}
spec:
  parentRefs: [{{namespace: edge, name: egress}}]
  hostnames: [bank.example, other.example]
  rules: [{{matches: [{{method: CONNECT}}], backendRefs: [{{name: bank, port: 443}}]}}]
---
apiVersion: tollhouse.dev/v1
kind: AccessPolicy
metadata: {{namespace: edge, name: egress}}
spec:
  targetRefs: [{{group: gateway.networking.k8s.io, kind: Gateway, name: egress}}]
  decision: egress.allow
  place: Local
"""
REGO = """package egress

# METADATA
# entrypoint: true
default allow := false

allow if {
	input.attributes.source.principal == "spiffe://shop.example/ns/shop/sa/payments"
	input.attributes.request.http.method == "CONNECT"
	input.attributes.request.http.host == "bank.example:443"
}
"""


class Bank(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("content-length", "4")
        self.end_headers()
        self.wfile.write(b"gold")

    def log_message(self, *_: Any) -> None: ...


@dataclass
class World:
    """A running egress gateway, and an HTTPS server behind it."""

    folder: Path
    port: int

    def identity(self, who: str, name: str) -> str:
        return str(self.folder / who / name)

    def logged(self, **wanted: Any) -> dict[str, Any]:
        """The newest entry of the access log that has these values, once it is there."""
        found: list[dict[str, Any]] = []

        def there() -> bool:
            path = self.folder / "access.log"
            text = path.read_text() if path.exists() else ""
            entries = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
            found[:] = [entry for entry in entries if all(entry[name] == value for name, value in wanted.items())]
            return bool(found)

        servers.wait_for(f"{wanted} in the access log", there)
        return found[-1]


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with tempfile.TemporaryDirectory(prefix="tollhouse-egress-") as name:
        folder = Path(name)
        authority, outside = Authority.create("shop.example"), Authority.create("outside.example")
        for who in ("payments", "web"):
            write_identity(authority.issue(f"spiffe://shop.example/ns/shop/sa/{who}"), folder / who)
        write_identity(authority.issue("spiffe://shop.example/ns/edge/sa/egress", dns=["egress.example"]), folder / "egress")
        dns = ["bank.example", "other.example"]
        write_identity(outside.issue("spiffe://outside.example/ns/a/sa/bank", dns=dns), folder / "bank")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(folder / "bank" / "cert.pem", folder / "bank" / "key.pem")
        bank = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Bank)
        bank.socket = context.wrap_socket(bank.socket, server_side=True)
        threading.Thread(target=bank.serve_forever, daemon=True).start()
        proxy, admin = servers.free_port(), servers.free_port()
        (folder / "config" / "policy").mkdir(parents=True)
        (folder / "config" / "policy" / "egress.rego").write_text(REGO)
        (folder / "config" / "all.yaml").write_text(MANIFESTS.format(proxy=proxy, bank=bank.server_address[1]))
        process = servers.tollhouse(
            "gateway", "edge/egress", "--config", str(folder / "config"), "--identity", str(folder / "egress"), "--address", "127.0.0.1",
            "--admin", f"127.0.0.1:{admin}", "--access-log", str(folder / "access.log"),
            ready=lambda: servers.fetched(f"http://127.0.0.1:{admin}/readyz"), name="gateway-egress",
        )  # fmt: skip
        try:
            process.start()
            yield World(folder, proxy)
        finally:
            process.close()
            bank.shutdown()
            bank.server_close()


def by_libcurl(world: World, who: str, url: str, kind: int) -> tuple[int, bytes]:
    """libcurl's error, and the answer."""
    got = io.BytesIO()
    curl = pycurl.Curl()
    for option, value in {
        pycurl.URL: url,
        pycurl.PROXY: "https://egress.example",
        pycurl.PROXYPORT: world.port,
        pycurl.PROXYTYPE: kind,
        pycurl.RESOLVE: [f"egress.example:{world.port}:127.0.0.1"],
        pycurl.PROXY_CAINFO: world.identity("egress", "ca.pem"),
        pycurl.PROXY_SSLCERT: world.identity(who, "cert.pem"),
        pycurl.PROXY_SSLKEY: world.identity(who, "key.pem"),
        pycurl.CAINFO: world.identity("bank", "ca.pem"),
        pycurl.TIMEOUT: 20,
        pycurl.WRITEDATA: got,
    }.items():
        curl.setopt(option, value)
    try:
        curl.perform()
        error = 0
    except pycurl.error as problem:
        error = problem.args[0]
    curl.close()
    return error, got.getvalue()


@pytest.mark.parametrize(("kind", "protocol"), [(2, "HTTP/1.1"), (HTTPS2, "HTTP/2")])
def test_policy_decides_who_gets_a_tunnel_and_where_to(world: World, kind: int, protocol: str) -> None:
    assert by_libcurl(world, "payments", "https://bank.example/", kind) == (0, b"gold")
    payments, web = (f"spiffe://shop.example/ns/shop/sa/{name}" for name in ("payments", "web"))
    entry = world.logged(protocol=protocol, method="CONNECT", caller=payments, response_code=200)
    assert (entry["upstream_cluster"], entry["authority"]) == ("shop/bank:443", "bank.example:443")
    assert entry["response_flags"] in ("-", "DC")  # libcurl need not end a tunnel in good order
    for who, caller, host, status, flag in (
        ("web", web, "bank.example:443", 403, "UAEX"),
        ("payments", payments, "other.example:443", 403, "UAEX"),
        ("payments", payments, "bank.example:8443", 404, "NR"),
    ):
        error, body = by_libcurl(world, who, f"https://{host}/", kind)
        assert (bool(error), body) == (True, b"")
        entry = world.logged(protocol=protocol, caller=caller, authority=host, response_code=status)
        assert entry["response_flags"] == flag


def test_curl_takes_the_proxy_from_its_environment(world: World) -> None:
    def curl(who: str) -> subprocess.CompletedProcess[str]:
        command = ["curl", "-sS", "--max-time", "20", "--cacert", world.identity("bank", "ca.pem"), "https://bank.example/"]
        command += ["--proxy-cacert", world.identity("egress", "ca.pem"), "--resolve", f"egress.example:{world.port}:127.0.0.1"]
        command += ["--proxy-cert", world.identity(who, "cert.pem"), "--proxy-key", world.identity(who, "key.pem")]
        proxy = {"HTTPS_PROXY": f"https://egress.example:{world.port}"}
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False, env={**os.environ, **proxy})

    assert curl("payments").stdout == "gold"
    refused = curl("web")
    assert (refused.returncode, refused.stdout) == (56, "")
    assert "403" in refused.stderr
