"""Below HTTP, from outside: a `tollhouse gateway` process on plain Gateway API manifests, and clients that know nothing of it."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import ssl
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from identity.ca import Authority, write_identity
from tests import servers
from tests.servers import wait_for

pytestmark = pytest.mark.e2e

MANIFESTS = """
apiVersion: gateway.networking.k8s.io/v1
kind: GatewayClass
metadata: {name: tollhouse}
spec: {controllerName: tollhouse.dev/gateway-controller}
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {namespace: default, name: gw}
spec:
  gatewayClassName: tollhouse
  listeners:
  - {name: tcp, port: @tcp, protocol: TCP}
  - {name: udp, port: @tcp, protocol: UDP}
  - {name: pass, port: @tls, protocol: TLS, hostname: "*.pass.example", tls: {mode: Passthrough}}
  - {name: end, port: @tls, protocol: TLS, hostname: end.example, tls: {mode: Terminate, certificateRefs: [{name: cert}]}}
---
apiVersion: gateway.networking.k8s.io/v1
kind: TCPRoute
metadata: {name: tcp}
spec:
  parentRefs: [{name: gw, sectionName: tcp}]
  rules: [{backendRefs: [{name: @service, port: 1}]}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: UDPRoute
metadata: {name: udp}
spec:
  parentRefs: [{name: gw, sectionName: udp}]
  rules: [{backendRefs: [{name: datagrams, port: 1}]}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: TLSRoute
metadata: {name: pass}
spec:
  parentRefs: [{name: gw, sectionName: pass}]
  hostnames: [a.pass.example]
  rules: [{backendRefs: [{name: tls, port: 1}]}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: TLSRoute
metadata: {name: end}
spec:
  parentRefs: [{name: gw, sectionName: end}]
  hostnames: [end.example]
  rules: [{backendRefs: [{name: one, port: 1}]}]
"""


def service(name: str, port: int, protocol: str = "TCP") -> str:
    return f"""---
apiVersion: v1
kind: Service
metadata: {{name: {name}}}
spec: {{ports: [{{port: 1, protocol: {protocol}}}]}}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{name: {name}, labels: {{kubernetes.io/service-name: {name}}}}}
addressType: IPv4
ports: [{{port: {port}, protocol: {protocol}}}]
endpoints: [{{addresses: [127.0.0.1]}}]
"""


def says(name: bytes, context: ssl.SSLContext | None = None) -> int:
    """A backend that says its name, and gives back what it gets once that has ended."""
    listening = socket.create_server(("127.0.0.1", 0))

    def serve(raw: socket.socket) -> None:
        with contextlib.suppress(OSError), context.wrap_socket(raw, server_side=True) if context else raw as sock:
            sock.sendall(name + b"\n")
            data = b""
            while piece := sock.recv(65536):
                data += piece
                if context is not None:
                    break
            sock.sendall(data)
            if isinstance(sock, ssl.SSLSocket):
                sock.unwrap()

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=serve, args=(listening.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    port: int = listening.getsockname()[1]
    return port


def answers() -> int:
    """A backend that gives datagrams back."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            data, address = sock.recvfrom(65535)
            sock.sendto(b"udp:" + data, address)

    threading.Thread(target=serve, daemon=True).start()
    port: int = sock.getsockname()[1]
    return port


class Running:
    """A gateway process, its folder and its ports."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.folder = folder
        self.config = folder / "config"
        self.config.mkdir()
        self.tcp, self.tls, self.admin = (servers.free_port() for _ in range(3))
        authority = Authority.create("shop.example")
        write_identity(authority.issue("spiffe://shop.example/ns/edge/sa/gw"), folder / "gw")
        made = authority.issue("spiffe://shop.example/ns/edge/sa/end", dns=["end.example", "a.pass.example"])
        pair = folder / "pair.pem"
        pair.write_bytes(made.chain + b"\n" + made.key)
        self.roots = folder / "roots.pem"
        self.roots.write_bytes(authority.bundle)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(pair)
        secret = {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": "cert"},
            "type": "kubernetes.io/tls",
            "stringData": {"tls.crt": made.chain.decode(), "tls.key": made.key.decode()},
        }
        (self.config / "secret.yaml").write_text(json.dumps(secret))
        one, two, tls = says(b"one"), says(b"two"), says(b"tls", context)
        self.services = service("one", one) + service("two", two) + service("tls", tls) + service("datagrams", answers(), "UDP")
        self.log = folder / "access.log"
        self.write("one")
        self.process = servers.tollhouse(
            "gateway", "default/gw", "--config", str(self.config), "--address", "127.0.0.1", "--identity", str(folder / "gw"),
            "--admin", f"127.0.0.1:{self.admin}", "--access-log", str(self.log), *options,
            ready=lambda: servers.fetched(f"http://127.0.0.1:{self.admin}/readyz"), name="gateway",
        )  # fmt: skip

    def write(self, to: str) -> None:
        text = MANIFESTS.replace("@tcp", str(self.tcp)).replace("@tls", str(self.tls)).replace("@service", to)
        new = self.folder / "new.yaml"
        new.write_text(text + self.services)
        new.rename(self.config / "all.yaml")

    def ask(self, data: bytes = b"") -> bytes:
        """By TCP; what comes until the end."""
        got = b""
        with socket.create_connection(("127.0.0.1", self.tcp), 10) as sock, contextlib.suppress(ConnectionError):
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            while piece := sock.recv(65536):
                got += piece
        return got

    def datagram(self, data: bytes) -> bytes:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.settimeout(10)
            sock.connect(("127.0.0.1", self.tcp))
            sock.send(data)
            return sock.recv(65535)

    def openssl(self, name: str, data: bytes = b"") -> str:
        """What `openssl s_client` shows, with the name and the chain verified."""
        command = ["openssl", "s_client", "-connect", f"127.0.0.1:{self.tls}", "-servername", name, "-verify_hostname", name]
        command += ["-CAfile", str(self.roots), "-verify_return_error", "-quiet"]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as client:
            assert client.stdin is not None
            assert client.stdout is not None
            client.stdin.write(data)
            client.stdin.flush()
            got = client.stdout.readline() + (client.stdout.read(len(data)) if data else b"")
            client.stdin.close()
            client.kill()
        return got.decode()

    def logged(self, fits: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        found: list[dict[str, Any]] = []

        def there() -> bool:
            text = self.log.read_text() if self.log.exists() else ""
            found[:] = [entry for line in text[: text.rfind("\n") + 1].splitlines() if fits(entry := json.loads(line))]
            return bool(found)

        wait_for("a line in the access log", there)
        return found[-1]


@contextlib.contextmanager
def running(folder: Path, *options: str) -> Iterator[Running]:
    made = Running(folder, *options)
    made.process.start()
    try:
        yield made
    finally:
        made.process.close()


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("l4")) as made:
        yield made


def test_tcp_udp_and_tls_just_work(gateway: Running) -> None:
    assert gateway.ask(b"x" * 1_000_000) == b"one\n" + b"x" * 1_000_000
    assert gateway.datagram(b"hello") == b"udp:hello"
    assert gateway.openssl("a.pass.example", b"ping\n") == "tls\nping\n"
    assert gateway.openssl("end.example") == "one\n"
    assert gateway.openssl("b.pass.example") == ""
    assert gateway.openssl("elsewhere.example") == ""
    entry = gateway.logged(lambda entry: entry["listener"] == "tcp")
    assert (entry["response_flags"], entry["bytes_received"], entry["upstream_cluster"]) == ("-", 1_000_000, "default/one:1")
    assert gateway.logged(lambda entry: entry["requested_server_name"] == "b.pass.example")["response_flags"] == "NR"
    with urllib.request.urlopen(f"http://127.0.0.1:{gateway.admin}/metrics", timeout=5) as page:
        metrics = page.read().decode()
    assert 'destination_service="one.default"' in metrics
    assert "istio_tcp_sent_bytes_total" in metrics


def test_explain_tells_what_the_gateway_does(gateway: Running) -> None:
    def told(url: str) -> tuple[int, str]:
        command = [sys.executable, "-m", "tollhouse", "explain", "--gateway", "default/gw", "--config", str(gateway.config), "-", url]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        return done.returncode, done.stdout

    code, text = told(f"tls://a.pass.example:{gateway.tls}")
    assert code == 0
    assert "default/tls:1" in text
    assert "untouched" in text
    code, text = told(f"udp://127.0.0.1:{gateway.tcp}")
    assert code == 0
    assert "default/datagrams:1/udp" in text
    code, text = told(f"tls://b.pass.example:{gateway.tls}")
    assert code == 1
    assert "NR: no route" in text


def test_a_change_of_the_directory_is_in_force_for_new_connections(gateway: Running) -> None:
    with socket.create_connection(("127.0.0.1", gateway.tcp), 10) as old:
        assert old.recv(99) == b"one\n"
        gateway.write("two")
        wait_for("the new backend", lambda: gateway.ask() == b"two\n")
        old.sendall(b"still")
        old.shutdown(socket.SHUT_WR)
        assert old.recv(99) == b"still"
    gateway.write("absent")
    wait_for("no backend", lambda: gateway.ask() == b"")
    gateway.write("one")
    wait_for("the first backend", lambda: gateway.ask() == b"one\n")


def test_workers_share_the_ports_and_a_drain_lets_a_connection_finish(tmp_path: Path) -> None:
    with running(tmp_path, "--workers", "2") as made:
        for number in range(20):
            assert made.ask() == b"one\n"
            assert made.datagram(b"%d" % number) == b"udp:%d" % number
        with socket.create_connection(("127.0.0.1", made.tcp), 10) as open_one:
            assert open_one.recv(99) == b"one\n"
            made.process.signal(signal.SIGTERM)

            def refused() -> bool:
                try:
                    socket.create_connection(("127.0.0.1", made.tcp), 1).close()
                except ConnectionRefusedError:
                    return True
                return False

            wait_for("the port to close", refused)
            open_one.sendall(b"the rest")
            open_one.shutdown(socket.SHUT_WR)
            assert open_one.recv(99) == b"the rest"


REGO = """package l4

# METADATA
# entrypoint: true
default allow := false

# Connections have no request; a name that is asked for, and where they came in.
allow if {
	not input.attributes.request
	input.attributes.tlsSession.sni == "end.example"
	input.attributes.source.address.socketAddress.address == "127.0.0.1"
}

allow if {
	input.attributes.contextExtensions.listener == "udp"
	input.attributes.contextExtensions.service == "default/datagrams"
}
"""
GUARDS = "".join(
    f"""---
apiVersion: tollhouse.dev/v1
kind: AccessPolicy
metadata: {{name: {name}}}
spec:
  targetRefs: [{{group: gateway.networking.k8s.io, kind: {kind}, name: {name}}}]
  decision: l4.allow
  place: Local
"""
    for kind, name in (("TCPRoute", "tcp"), ("TLSRoute", "end"), ("TLSRoute", "pass"), ("UDPRoute", "udp"))
)


def test_rego_decides_about_connections_and_flows(tmp_path: Path) -> None:
    made = Running(tmp_path)
    policy = made.config / "policy"
    policy.mkdir()
    (policy / "l4.rego").write_text(REGO)
    (made.config / "guards.yaml").write_text(GUARDS)
    made.process.start()
    try:
        assert made.openssl("end.example") == "one\n"
        assert made.ask(b"not me") == b""
        assert made.openssl("a.pass.example") == ""
        assert made.datagram(b"me") == b"udp:me"
        denied = made.logged(lambda entry: entry["listener"] == "tcp")
        assert (denied["response_flags"], denied["policy"][0]["verdict"]) == ("UAEX", "deny")
        allowed = made.logged(lambda entry: entry["listener"] == "end")
        assert (allowed["response_flags"], allowed["policy"][0]["verdict"]) == ("-", "allow")
        assert allowed["request_id"] != denied["request_id"]
    finally:
        made.process.close()
