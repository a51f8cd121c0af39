"""Protocols by real clients, through one gateway on plain Gateway API manifests."""

from __future__ import annotations

import asyncio
import http.client
import http.server
import json
import socket
import ssl
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from e2e_world import tollhouse
from websockets.asyncio.client import connect
from websockets.asyncio.server import ServerConnection, serve

from identity.ca import Authority, write_identity
from tests import servers

MANIFESTS = """
apiVersion: gateway.networking.k8s.io/v1
kind: GatewayClass
metadata: {{name: tollhouse}}
spec: {{controllerName: tollhouse.dev/gateway-controller}}
---
apiVersion: v1
kind: Namespace
metadata: {{name: demo}}
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {{namespace: demo, name: gw}}
spec:
  gatewayClassName: tollhouse
  listeners:
  - {{name: http, port: {http}, protocol: HTTP}}
---
apiVersion: v1
kind: Service
metadata: {{namespace: demo, name: chat}}
spec: {{ports: [{{port: 80, appProtocol: kubernetes.io/ws}}]}}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{namespace: demo, name: chat-1, labels: {{kubernetes.io/service-name: chat}}}}
addressType: IPv4
ports: [{{port: {chat}}}]
endpoints: [{{addresses: [127.0.0.1]}}]
---
apiVersion: v1
kind: Service
metadata: {{namespace: demo, name: bank}}
spec: {{ports: [{{port: 443}}]}}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{namespace: demo, name: bank-1, labels: {{kubernetes.io/service-name: bank}}}}
addressType: IPv4
ports: [{{port: {bank}}}]
endpoints: [{{addresses: [127.0.0.1]}}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {{namespace: demo, name: chat}}
spec:
  parentRefs: [{{name: gw}}]
  hostnames: [chat.example]
  rules: [{{backendRefs: [{{name: chat, port: 80}}]}}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {{namespace: demo, name: bank}}
spec:
  parentRefs: [{{name: gw}}]
  hostnames: [bank.example]
  rules: [{{matches: [{{method: CONNECT}}], backendRefs: [{{name: bank, port: 443}}]}}]
"""


@dataclass
class World:
    """A gateway, and where its upstreams are to listen."""

    folder: Path
    ports: dict[str, int]
    authority: Authority = field(default_factory=lambda: Authority.create("outside.example"))

    def logged(self, **wanted: Any) -> dict[str, Any]:
        """The entry of the access log that has these values, once it is there."""
        found: list[dict[str, Any]] = []

        def there() -> bool:
            path = self.folder / "access.log"
            entries = [json.loads(line) for line in (path.read_text() if path.exists() else "").splitlines()]
            found[:] = [entry for entry in entries if all(entry[name] == value for name, value in wanted.items())]
            return bool(found)

        servers.wait_for(f"{wanted} in the access log", there)
        return found[-1]


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with tempfile.TemporaryDirectory(prefix="tollhouse-protocols-") as name:
        folder = Path(name)
        ports = {name: servers.free_port() for name in ("http", "chat", "bank", "admin")}
        made = World(folder, ports)
        write_identity(Authority.create("shop.example").issue("spiffe://shop.example/ns/demo/sa/gw", dns=["gw.example"]), folder / "gw")
        (folder / "config").mkdir()
        (folder / "config" / "all.yaml").write_text(MANIFESTS.format(**ports))
        tollhouse("validate", "-f", str(folder / "config"))
        process = servers.tollhouse(
            "gateway", "demo/gw", "--config", str(folder / "config"), "--identity", str(folder / "gw"), "--address", "127.0.0.1",
            "--admin", f"127.0.0.1:{ports['admin']}", "--access-log", str(folder / "access.log"),
            ready=lambda: servers.fetched(f"http://127.0.0.1:{ports['admin']}/readyz"), name="gateway-protocols",
        )  # fmt: skip
        try:
            process.start()
            yield made
        finally:
            process.close()


def test_a_websocket(world: World) -> None:
    async def echo(connection: ServerConnection) -> None:
        async for message in connection:
            await connection.send(message)

    async def go() -> None:
        async with (
            serve(echo, "127.0.0.1", world.ports["chat"]),
            connect(f"ws://chat.example:{world.ports['http']}/room", host="127.0.0.1", proxy=None) as client,
        ):
            for message in ("hello", b"\0" * 200_000):
                await client.send(message)
                assert await client.recv() == message

    asyncio.run(go())
    entry = world.logged(path="/room")
    assert (entry["response_code"], entry["response_flags"]) == (101, "-")


class Bank(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("content-length", "4")
        self.end_headers()
        self.wfile.write(b"gold")

    def log_message(self, *_: Any) -> None:
        """Says nothing."""


@pytest.fixture(scope="module")
def bank(world: World) -> Iterator[Path]:
    """An HTTPS server outside the mesh; where its root is."""
    folder = world.folder / "bank"
    write_identity(world.authority.issue("spiffe://outside.example/ns/a/sa/bank", dns=["bank.example"]), folder)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", world.ports["bank"]), Bank)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield folder / "ca.pem"
    server.shutdown()


def test_a_client_that_shuts_its_side_down_is_answered(world: World) -> None:
    with socket.create_connection(("127.0.0.1", world.ports["http"]), timeout=10) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\nhost: nowhere.example\r\n\r\n" * 2)
        sock.shutdown(socket.SHUT_WR)
        said = b""
        while data := sock.recv(65536):
            said += data
    assert said.count(b"HTTP/1.1 404 ") == 2


def test_explain_tells_where_a_tunnel_would_lead(world: World) -> None:
    said = tollhouse("explain", "CONNECT", "https://bank.example:443", "--gateway", "demo/gw", "--config", str(world.folder / "config"))
    assert "demo/bank:443" in said.stdout
    refused = tollhouse(
        "explain", "CONNECT", "https://bank.example:22", "--gateway", "demo/gw", "--config", str(world.folder / "config"), check=False
    )
    assert refused.returncode == 1
    assert "404" in refused.stdout


def curl(world: World, url: str, *more: str) -> subprocess.CompletedProcess[str]:
    command = ["curl", "-sS", "--max-time", "20", "--proxy", f"http://127.0.0.1:{world.ports['http']}", *more, url]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)


def test_curl_by_way_of_an_https_proxy(world: World, bank: Path) -> None:
    done = curl(world, "https://bank.example/", "--cacert", str(bank))
    assert (done.stdout, done.returncode) == ("gold", 0), done.stderr
    entry = world.logged(method="CONNECT", authority="bank.example:443")
    assert (entry["response_code"], entry["response_flags"], entry["upstream_cluster"]) == (200, "-", "demo/bank:443")


@pytest.mark.parametrize(
    ("url", "said"),
    [("https://bank.example:8443/", "404"), ("https://elsewhere.example/", "404"), ("https://chat.example/", "405")],
)
def test_curl_gets_no_further_than_the_configuration_says(world: World, url: str, said: str) -> None:
    done = curl(world, url)
    assert done.returncode == 56
    assert said in done.stderr


def test_pythons_client_by_way_of_an_https_proxy(world: World, bank: Path) -> None:
    context = ssl.create_default_context(cafile=str(bank))
    connection = http.client.HTTPSConnection("127.0.0.1", world.ports["http"], context=context, timeout=20)
    connection.set_tunnel("bank.example", 443)
    connection.request("GET", "/")
    assert connection.getresponse().read() == b"gold"
    connection.close()
