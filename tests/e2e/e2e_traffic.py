"""Clients for the end-to-end tests: one request, a steady trickle of them, raw bytes; and more configuration for a running mesh.

with Trickle(mesh, "web", "/catalog/1") as trickle:
    ... break something ...
trickle.statuses() == {200}
"""

from __future__ import annotations

import http.client
import socket
import ssl
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from e2e_world import HOSTS, Mesh, spiffe, tollhouse

from tests import servers


def context(folder: Path, *alpn: str) -> ssl.SSLContext:
    """TLS for a client that shows the identity in `folder`; the gateway's name is checked."""
    made = ssl.create_default_context(cafile=str(folder / "ca.pem"))
    made.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    made.set_alpn_protocols(list(alpn or ("http/1.1",)))
    return made


class Connection(http.client.HTTPSConnection):
    """A connection to a gateway of the mesh, by its listener's name."""

    def __init__(self, mesh: Mesh, caller: str, gateway: str = "ingress", host: str = "", timeout: float = 20.0) -> None:
        self._tls = context(mesh.identity(f"shop-{caller}"))
        super().__init__(host or HOSTS[gateway][0], mesh.ports[gateway], context=self._tls, timeout=timeout)

    def connect(self) -> None:
        plain = socket.create_connection(("127.0.0.1", self.port), self.timeout)
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock = self._tls.wrap_socket(plain, server_hostname=self.host)


class Reply:
    """An answer, and how long it took."""

    def __init__(self, status: int, headers: Mapping[str, str], body: bytes, seconds: float) -> None:
        self.status, self.body, self.seconds = status, body, seconds
        self.headers = {name.lower(): value for name, value in headers.items()}

    def __repr__(self) -> str:
        return f"<{self.status} after {self.seconds:.3f} s: {self.body[:200]!r}>"


def exchange(connection: Connection, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None) -> Reply:
    begun = time.monotonic()
    connection.request(method, path, body, dict(headers or {}))
    answer = connection.getresponse()
    content = answer.read()
    return Reply(answer.status, dict(answer.getheaders()), content, time.monotonic() - begun)


def ask(mesh: Mesh, caller: str, path: str, method: str = "GET", body: Any = None, headers: Mapping[str, str] | None = None) -> Reply:
    """One request on a connection of its own."""
    connection = Connection(mesh, caller)
    try:
        return exchange(connection, method, path, body, headers)
    finally:
        connection.close()


class Trickle:
    """A thread that asks again and again on one kept connection, and opens another when it ends. Every answer and failure is in `seen`."""

    def __init__(self, mesh: Mesh, caller: str, path: str, method: str = "GET", period: float = 0.03) -> None:
        self.mesh, self.caller, self.path, self.method, self.period = mesh, caller, path, method, period
        self.seen: list[tuple[float, int | str]] = []
        """When (monotonic seconds), and the status or what went wrong."""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"trickle {path}")

    def _run(self) -> None:
        connection = Connection(self.mesh, self.caller, timeout=10.0)
        while not self._over.wait(self.period):
            try:
                self.seen.append((time.monotonic(), exchange(connection, self.method, self.path).status))
            except (OSError, http.client.HTTPException) as problem:
                self.seen.append((time.monotonic(), repr(problem)))
                connection.close()
        connection.close()

    def __enter__(self) -> Trickle:
        self._thread.start()
        self.more(3)
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def more(self, count: int, status: int | None = None) -> None:
        """Waits for that many more answers (of that status)."""
        begin = len(self.seen)
        servers.wait_for(
            f"{count} answers more", lambda: sum(status is None or got == status for _, got in self.seen[begin:]) >= count, seconds=30
        )

    def statuses(self) -> Counter[int | str]:
        return Counter(got for _, got in self.seen)


def apply(mesh: Mesh, *documents: dict[str, Any]) -> None:
    """Puts more into the configuration of a running mesh."""
    path = mesh.folder / f"more-{time.monotonic_ns()}.yaml"
    path.write_text(yaml.safe_dump_all(documents))
    tollhouse("apply", "-f", str(path), "--config", mesh.config)


def service(name: str, ports: Iterable[int], account: str, app: str = "") -> list[dict[str, Any]]:
    """A Service, an EndpointSlice for each of `ports`, and who its endpoints are."""
    port = {"name": "https", "port": 443, "protocol": "TCP", **({"appProtocol": app} if app else {})}
    made = [
        {"apiVersion": "v1", "kind": "Service", "metadata": {"namespace": "shop", "name": name}, "spec": {"ports": [port]}},
        {
            "apiVersion": "tollhouse.dev/v1",
            "kind": "ServiceIdentity",
            "metadata": {"namespace": "shop", "name": name},
            "spec": {"service": name, "identities": [spiffe(account)]},
        },
    ]
    return made + [endpoints(name, f"{name}-{number}", [number]) for number in ports]


def endpoints(name: str, slice_name: str, ports: Iterable[int]) -> dict[str, Any]:
    """An EndpointSlice of `name` (with no endpoint where there is no port)."""
    numbers = list(ports)
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"namespace": "shop", "name": slice_name, "labels": {"kubernetes.io/service-name": name}},
        "addressType": "IPv4",
        "ports": [{"name": "https", "port": number, "protocol": "TCP"} for number in numbers],
        "endpoints": [{"addresses": ["127.0.0.1"]}] if numbers else [],
    }


def route(name: str, prefix: str, backend: str, **rule: Any) -> dict[str, Any]:
    """An HTTPRoute of the ingress."""
    return {
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "HTTPRoute",
        "metadata": {"namespace": "shop", "name": name},
        "spec": {
            "parentRefs": [{"namespace": "edge", "name": "ingress"}],
            "hostnames": ["shop.example"],
            "rules": [
                {
                    "matches": [{"path": {"type": "PathPrefix", "value": prefix}}],
                    "backendRefs": [{"name": backend, "port": 443}],
                    **rule,
                }
            ],
        },
    }


def attached(kind: str, name: str, target: str, **spec: Any) -> dict[str, Any]:
    """An AccessPolicy or a QuotaPolicy on an HTTPRoute."""
    target_ref = {"group": "gateway.networking.k8s.io", "kind": "HTTPRoute", "name": target}
    return {
        "apiVersion": "tollhouse.dev/v1",
        "kind": kind,
        "metadata": {"namespace": "shop", "name": name},
        "spec": {"targetRefs": [target_ref], **spec},
    }


def page(mesh: Mesh, gateway: str, path: str) -> str:
    """A page of a gateway's admin port."""
    with urllib.request.urlopen(f"http://127.0.0.1:{mesh.ports[f'admin-{gateway}']}{path}", timeout=5) as answer:
        return str(answer.read().decode())


def reads(mesh: Mesh, path: str, caller: str = "web") -> Callable[[], int]:
    """Asks once and returns the status, for `wait_for` to compare."""
    return lambda: ask(mesh, caller, path).status
