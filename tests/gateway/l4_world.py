"""For the tests below HTTP: a gateway made from manifests, with its real upstream side, and backends that say who they are."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import ssl
import textwrap
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

from door_world import GATEWAY, KEY, Answers, authority, until

from gateway.forward import UpstreamForwarder
from gateway.gateway import Gateway
from gateway.limits import Limits
from gateway.poller import Poller
from gateway.timers import Sweeper
from identity.files import StaticIdentity
from mesh.model import Snapshot
from mesh.outcome import Outcome
from mesh.reading import read_documents
from mesh.workspace import Workspace
from telemetry.record import Telemetry
from tests import servers

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]

CLASS = """
apiVersion: gateway.networking.k8s.io/v1
kind: GatewayClass
metadata: {name: tollhouse}
spec: {controllerName: tollhouse.dev/gateway-controller}
"""
ACCESS = """
apiVersion: tollhouse.dev/v1
kind: AccessPolicy
metadata: {namespace: shop, name: p}
spec: {targetRefs: [{group: gateway.networking.k8s.io, kind: TCPRoute, name: r}], decision: a.b}
"""
PORTS: set[int] = set()


def conversation(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Runs a test on a loop of its own, with a bound in time."""

    @functools.wraps(test)
    def run(*arguments: Any, **named: Any) -> None:
        asyncio.run(asyncio.wait_for(test(*arguments, **named), 60))

    return run


def free_port() -> int:
    """A port that is free now and was not given away before."""
    while True:
        port = servers.free_port()
        if port not in PORTS:
            PORTS.add(port)
            return port


def gateway_yaml(*listeners: str, name: str = "ingress") -> str:
    """A Gateway; each listener in YAML's flow style."""
    lines = "\n".join(f"  - {{{listener}, allowedRoutes: {{namespaces: {{from: All}}}}}}" for listener in listeners)
    head = f"apiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\nmetadata: {{namespace: edge, name: {name}}}\n"
    return f"{head}spec:\n  gatewayClassName: tollhouse\n  listeners:\n{lines}\n"


def tcp(port: int, name: str = "tcp") -> str:
    """A TCP listener."""
    return f"name: {name}, port: {port}, protocol: TCP"


def route_yaml(kind: str, name: str, *backends: str, parent: str = "namespace: edge, name: ingress", more: str = "", made: str = "") -> str:
    """A route; `backends` are `name[:port][*weight]`, `more` further fields of its spec."""
    refs = []
    for backend in backends:
        target, _, weight = backend.partition("*")
        service, _, port = target.partition(":")
        refs.append(f"{{name: {service}, port: {port or 80}{f', weight: {weight}' if weight else ''}}}")
    created = f", creationTimestamp: '{made}'" if made else ""
    return (
        f"apiVersion: gateway.networking.k8s.io/v1\nkind: {kind}\nmetadata: {{namespace: shop, name: {name}{created}}}\n"
        f"spec:\n  parentRefs: [{{{parent}}}]\n{more}  rules:\n  - name: main\n    backendRefs: [{', '.join(refs)}]\n"
    )


def service_yaml(name: str, *ports: int, namespace: str = "shop", protocol: str = "TCP") -> str:
    """A Service with port 80, and endpoints at 127.0.0.1 on each of `ports`."""
    found = f"apiVersion: v1\nkind: Service\nmetadata: {{namespace: {namespace}, name: {name}}}\n"
    found += f"spec: {{ports: [{{port: 80, protocol: {protocol}}}]}}\n"
    for number, port in enumerate(ports):
        found += (
            f"---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n"
            f"metadata: {{namespace: {namespace}, name: {name}-{number}, labels: {{kubernetes.io/service-name: {name}}}}}\n"
            f"addressType: IPv4\nports: [{{port: {port}, protocol: {protocol}}}]\nendpoints: [{{addresses: [127.0.0.1]}}]\n"
        )
    return found


def secret_yaml(name: str, *dns: str, namespace: str = "edge") -> str:
    """A certificate for these names, of the mesh's authority."""
    made = authority().issue("spiffe://shop.example/ns/edge/sa/cert", dns=dns)
    chain, key = (base64.b64encode(part).decode() for part in (made.chain, made.key))
    return (
        f"apiVersion: v1\nkind: Secret\nmetadata: {{namespace: {namespace}, name: {name}}}\ntype: kubernetes.io/tls\n"
        f"data: {{tls.crt: {chain}, tls.key: {key}}}\n"
    )


def roots_yaml(name: str, namespace: str = "shop") -> str:
    """The mesh's authority in a ConfigMap."""
    pem = textwrap.indent(authority().bundle.decode(), "    ")
    return f"apiVersion: v1\nkind: ConfigMap\nmetadata: {{namespace: {namespace}, name: {name}}}\ndata:\n  ca.crt: |\n{pem}"


def server_context(*dns: str, alpn: tuple[str, ...] = ()) -> ssl.SSLContext:
    """TLS of a backend, by the stdlib alone."""
    import tempfile
    from pathlib import Path

    made = authority().issue("spiffe://shop.example/ns/shop/sa/backend", dns=dns)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "pair.pem")
        path.write_bytes(made.chain + b"\n" + made.key)
        context.load_cert_chain(path)
    if alpn:
        context.set_alpn_protocols(list(alpn))
    return context


def client_context() -> ssl.SSLContext:
    """TLS of a client that trusts the mesh's authority."""
    return ssl.create_default_context(cadata=authority().bundle.decode())


def says(name: bytes) -> Serve:
    """A backend that says its name and then gives back what it gets, to the end."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            writer.write(name + b"\n")
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
            if writer.can_write_eof():
                writer.write_eof()
        writer.close()

    return serve


class L4:
    """A running gateway, and what its connections left."""

    def __init__(self, gateway: Gateway, forwarder: UpstreamForwarder, telemetry: Telemetry, answers: Answers) -> None:
        self.gateway, self.forwarder, self.telemetry, self.answers = gateway, forwarder, telemetry, answers
        self.outcomes: list[Outcome] = []
        self.snapshot: Snapshot

    async def outcome(self, count: int = 1) -> Outcome:
        """The outcome number `count`, once it is there; and no more than that."""
        await until(lambda: len(self.outcomes) >= count)
        assert len(self.outcomes) == count, [(each.flag, each.reason) for each in self.outcomes]
        return self.outcomes[-1]

    def apply(self, *texts: str) -> Snapshot:
        """Puts manifests in force, in place of all before."""
        self.snapshot = compiled(*texts)
        self.forwarder.apply(self.snapshot)
        self.gateway.apply(self.snapshot)
        return self.snapshot

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that have these labels."""
        total = 0.0
        for line in self.telemetry.page().decode().splitlines():
            if line.startswith(name + "{") and all(f'{key}="{value}"' in line for key, value in labels.items()):
                total += float(line.rpartition(" ")[2])
        return total


def compiled(*texts: str) -> Snapshot:
    """The snapshot of some manifests; they must be readable."""
    workspace = Workspace()
    documents = []
    for number, text in enumerate((CLASS, *texts)):
        found, problems = read_documents(text, f"{number}.yaml")
        assert not problems, [str(problem) for problem in problems]
        documents += found
    return workspace.update(upserts=documents, replace=True)


@asynccontextmanager
async def l4(*texts: str, limits: Limits | None = None, drain: float = 0.0, address: str = "127.0.0.1") -> AsyncIterator[L4]:
    """A gateway `edge/ingress` with these manifests in force, bound to `address`."""
    loop = asyncio.get_running_loop()
    limits = limits or Limits()
    identity = StaticIdentity(authority().issue(GATEWAY, dns=["shop.example"]))
    poller, sweeper = Poller(loop), Sweeper(loop)
    sweeper.start()
    forwarder = UpstreamForwarder(loop, identity=identity, limits=limits, poller=poller, sweeper=sweeper)
    telemetry, answers = Telemetry(), Answers()
    gateway = Gateway(
        loop,
        KEY,
        identity=identity,
        decider=answers,
        lessee=answers,
        forwarder=forwarder,
        telemetry=telemetry,
        limits=limits,
        address=address,
        poller=poller,
        sweeper=sweeper,
    )
    made = L4(gateway, forwarder, telemetry, answers)
    record = telemetry.l4_record

    def kept(outcome: Outcome) -> None:
        made.outcomes.append(outcome)
        record(outcome)

    telemetry.l4_record = kept
    made.apply(*texts)
    try:
        yield made
    finally:
        await gateway.drain(drain)
        await forwarder.close(0.5)
        sweeper.stop()
        assert forwarder.state()["connections"] == 0


@asynccontextmanager
async def backend(serve: Serve, context: ssl.SSLContext | None = None) -> AsyncIterator[int]:
    """A backend on a port of its own."""
    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


async def ask(port: int, data: bytes = b"", name: str | None = None, context: ssl.SSLContext | None = None) -> bytes:
    """Connects, sends, ends its side (where it can), and reads to the end. A reset gives what came before it."""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context, server_hostname=name if context else None)
    except ConnectionResetError:  # so soon that the client had not noticed yet that it was connected
        return b""
    got = b""
    try:
        writer.write(data)
        if writer.can_write_eof():
            writer.write_eof()
            while piece := await asyncio.wait_for(reader.read(65536), 10):
                got += piece
        else:
            got = await asyncio.wait_for(reader.readline(), 10)
            if data:
                got += await asyncio.wait_for(reader.readexactly(len(data)), 10)
    except (OSError, asyncio.IncompleteReadError):
        pass
    finally:
        writer.close()
    return got
