"""A gateway on plain manifests of Kubernetes and Gateway API: no object of our own, no identity, other kinds beside them."""

from __future__ import annotations

import http.client
import http.server
import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from tests import servers

MANIFESTS = """
apiVersion: gateway.networking.k8s.io/v1
kind: GatewayClass
metadata: {name: tollhouse}
spec: {controllerName: tollhouse.dev/gateway-controller}
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: web}
spec:
  gatewayClassName: tollhouse
  listeners: [{name: http, port: PORT, protocol: HTTP}]
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
spec: {replicas: 3}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: "system:web"}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: web}
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec: {selector: {app: web}, ports: [{port: 80, targetPort: http}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-1, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
ports: [{port: UPSTREAM}]
endpoints: [{addresses: [127.0.0.1], conditions: {ready: true}}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: web}
spec:
  parentRefs: [{name: web}]
  rules: [{backendRefs: [{name: web, port: 80}]}]
"""
DEADLINE = 60.0


class Seen(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = json.dumps({name.lower(): value for name, value in self.headers.items()}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 -- the name is the library's
        """Says nothing."""


def get(port: int, path: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def eventually(port: int, path: str, wanted: int) -> bytes:
    ends = time.monotonic() + DEADLINE
    while True:
        try:
            status, body = get(port, path)
        except OSError:
            status, body = 0, b""
        if status == wanted:
            return body
        assert time.monotonic() < ends, (status, body)
        time.sleep(0.05)


def test_a_gateway_serves_plain_manifests(tmp_path: Path) -> None:
    upstream = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Seen)
    threading.Thread(target=upstream.serve_forever, daemon=True).start()
    port, admin = servers.free_port(), servers.free_port()
    text = MANIFESTS.replace("PORT", str(port), 1).replace("UPSTREAM", str(upstream.server_address[1]))
    (tmp_path / "all.yaml").write_text(text)
    command = [sys.executable, "-m", "tollhouse", "gateway", "default/web", "--config", str(tmp_path), "--address", "127.0.0.1"]
    process = subprocess.Popen([*command, "--admin", f"127.0.0.1:{admin}", "--access-log", "off"], stderr=subprocess.PIPE, text=True)
    try:
        seen = json.loads(eventually(port, "/", 200))
        assert seen["x-forwarded-for"] == "127.0.0.1"
        assert "x-forwarded-client-cert" not in seen
        shown = json.loads(get(admin, "/status")[1])
        assert shown["problems"] == []
        (gateway,) = [each["status"] for each in shown["resources"] if each["kind"] == "Gateway"]
        assert [listener["attachedRoutes"] for listener in gateway["listeners"]] == [1]
        # What a changed directory says is in force; half a file never is.
        (tmp_path / "all.yaml").write_text(text.replace("rules: [{backendRefs", "rules: [{matches: [{path: {value: /new}}], backendRefs"))
        eventually(port, "/", 404)
        assert eventually(port, "/new", 200)
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
        upstream.shutdown()
        upstream.server_close()


def test_other_kinds_are_passed_over_and_not_stored(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "all.yaml").write_text(MANIFESTS.replace("PORT", "8080").replace("UPSTREAM", "9000"))
    (tmp_path / "out").mkdir()

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "tollhouse", *words], capture_output=True, text=True, timeout=120, check=False)

    checked = run("validate", "-f", str(tmp_path / "in"))
    assert checked.returncode == 0, checked.stdout
    assert "note: 1 of apps/Deployment passed over" in checked.stderr
    applied = run("apply", "-f", str(tmp_path / "in"), "--config", str(tmp_path / "out"), "-o", "json")
    assert json.loads(applied.stdout)["passedOver"] == {"apps/Deployment": 1, "ServiceAccount": 1}
    assert "Deployment" not in run("get", "--config", str(tmp_path / "out")).stdout
