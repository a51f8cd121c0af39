"""Plain Gateway API, core and EndpointSlice manifests, and nothing of our own: no Mesh, no identity, no decision point."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests import servers

MANIFESTS = """
apiVersion: gateway.networking.k8s.io/v1
kind: GatewayClass
metadata: {name: tollhouse}
spec: {controllerName: tollhouse.dev/gateway-controller}
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: web, namespace: edge}
spec:
  gatewayClassName: tollhouse
  listeners:
    - {name: http, port: %(port)d, protocol: HTTP}
    - {name: mesh, port: %(other)d, protocol: HTTPS, tls: {options: {tollhouse.dev/certificate: SVID}}}
---
apiVersion: v1
kind: Service
metadata: {name: hello, namespace: edge}
spec: {ports: [{name: http, port: 80}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: hello, namespace: edge, labels: {kubernetes.io/service-name: hello}}
addressType: IPv4
endpoints: [{addresses: [127.0.0.1]}]
ports: [{name: http, port: %(echo)d}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: hello, namespace: edge}
spec:
  parentRefs: [{name: web}]
  rules: [{backendRefs: [{name: hello, port: 80}]}]
"""


@pytest.mark.e2e
def test_a_gateway_needs_nothing_of_ours(tmp_path: Path) -> None:
    port, other, echo, admin = (servers.free_port() for _ in range(4))
    (tmp_path / "all.yaml").write_text(MANIFESTS % {"port": port, "other": other, "echo": echo})
    upstream = servers.tollhouse(
        "echo", "--name", "hello", "--listen", f"127.0.0.1:{echo}", ready=lambda: servers.answers(echo), name="echo"
    )
    gateway = servers.tollhouse(
        "gateway", "edge/web", "--config", tmp_path, "--address", "127.0.0.1", "--admin", f"127.0.0.1:{admin}",
        ready=lambda: servers.answers(port), name="gateway",
    )  # fmt: skip
    try:
        upstream.start()
        gateway.start()
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/x?y=1", timeout=10) as answer:
            assert json.load(answer)["path"].startswith("/x")
        with urllib.request.urlopen(f"http://127.0.0.1:{admin}/status", timeout=10) as answer:
            shown = json.load(answer)["gateways"][0]
        assert shown["identity"] == ""
        assert "--identity" in shown["problems"]["mesh"]
        with pytest.raises((urllib.error.URLError, OSError)):
            urllib.request.urlopen(f"https://127.0.0.1:{other}/", timeout=10)
    finally:
        gateway.close()
        upstream.close()
