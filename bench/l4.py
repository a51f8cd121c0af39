"""Below HTTP, beside Envoy: bytes through one TCP connection, in plaintext and with TLS that ends here, and connections that come and go.

`python -m bench.l4` prints a table; `python -m bench` ends with it. Both proxies have the same upstream and the same load, in turn.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path

import yaml

from bench import envoy, procfs
from identity.ca import Authority, write_identity
from tests import install, servers

NAME = "Below HTTP"
CHUNK = 256 * 1024
MEGABYTE = 1 << 20


class Proxy:
    """One contender: a process with a port for plaintext and one for TLS, before the same upstream."""

    name = ""

    def __init__(self, folder: Path, identity: Path, upstream: int) -> None:
        folder.mkdir()
        self.folder, self.identity, self.upstream = folder, identity, upstream
        self.ports = {"tcp": servers.free_port(), "tls": servers.free_port()}
        self.process = self.make()
        self.process.start()

    @abstractmethod
    def make(self) -> servers.Process:
        """The process."""


class Envoy(Proxy):
    """Envoy's `tcp_proxy`, with one worker thread."""

    name = "Envoy"

    def make(self) -> servers.Process:
        """See `Proxy`."""
        listeners = []
        for name, port in self.ports.items():
            chain: dict[str, object] = {
                "filters": [
                    envoy.filter_(
                        "tcp",
                        "extensions.filters.network.tcp_proxy.v3.TcpProxy",
                        {"stat_prefix": name, "cluster": "upstream"},
                        name="tcp_proxy",
                    )
                ]
            }
            if name == "tls":
                context = {"common_tls_context": {"tls_certificates": envoy.common_tls(self.identity)["tls_certificates"]}}
                kind = "extensions.transport_sockets.tls.v3.DownstreamTlsContext"
                chain["transport_socket"] = {"name": "tls", "typed_config": envoy.typed(kind, context)}
            listeners.append({"name": name, "address": envoy.address(port), "filter_chains": [chain]})
        path = self.folder / "envoy.yaml"
        path.write_text(
            yaml.safe_dump({"static_resources": {"listeners": listeners, "clusters": [envoy.cluster("upstream", self.upstream)]}})
        )
        command = [str(install.install("envoy")), "-c", str(path), "--log-level", "error", "--disable-hot-restart", "--concurrency", "1"]
        return servers.Process(command, ready=lambda: servers.answers(self.ports["tcp"]), name="envoy")


class Tollhouse(Proxy):
    """A gateway with a TCPRoute and a TLSRoute."""

    name = "Tollhouse"

    def make(self) -> servers.Process:
        """See `Proxy`."""
        text = MANIFESTS.replace("@upstream", str(self.upstream))
        for name, port in self.ports.items():
            text = text.replace(f"@{name}", str(port))
        config = self.folder / "config"
        config.mkdir()
        (config / "all.yaml").write_text(text)
        admin = servers.free_port()
        return servers.tollhouse(
            "gateway", "default/gw", "--config", str(config), "--address", "127.0.0.1", "--identity", str(self.identity), "--access-log",
            "off", "--admin", f"127.0.0.1:{admin}", ready=lambda: servers.fetched(f"http://127.0.0.1:{admin}/readyz"), name="gateway",
            env=dict(os.environ),
        )  # fmt: skip


MANIFESTS = """
apiVersion: gateway.networking.k8s.io/v1
kind: GatewayClass
metadata: {name: tollhouse}
spec: {controllerName: tollhouse.dev/gateway-controller}
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: gw}
spec:
  gatewayClassName: tollhouse
  listeners:
  - {name: tcp, port: @tcp, protocol: TCP}
  - {name: tls, port: @tls, protocol: TLS, tls: {mode: Terminate, options: {tollhouse.dev/certificate: SVID}}}
---
apiVersion: gateway.networking.k8s.io/v1
kind: TCPRoute
metadata: {name: r}
spec:
  parentRefs: [{name: gw, sectionName: tcp}]
  rules: [{backendRefs: [{name: upstream, port: 1}]}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: TLSRoute
metadata: {name: r}
spec:
  parentRefs: [{name: gw, sectionName: tls}]
  hostnames: [bench.example]
  rules: [{backendRefs: [{name: upstream, port: 1}]}]
---
apiVersion: v1
kind: Service
metadata: {name: upstream}
spec: {ports: [{port: 1}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: upstream, labels: {kubernetes.io/service-name: upstream}}
addressType: IPv4
ports: [{port: @upstream}]
endpoints: [{addresses: [127.0.0.1]}]
"""


def upstream(port: int) -> None:
    """Reads to the end, and says how many bytes came. Runs for ever."""
    listening = socket.create_server(("127.0.0.1", port), backlog=1024)

    def serve(sock: socket.socket) -> None:
        buffer, count = bytearray(CHUNK), 0
        with contextlib.suppress(OSError), sock:
            while got := sock.recv_into(buffer):
                count += got
            sock.sendall(b"%d\n" % count)

    while True:
        threading.Thread(target=serve, args=(listening.accept()[0],), daemon=True).start()


def transfer(port: int, roots: str, megabytes: int) -> float:
    """Seconds to send so much through one connection (by TLS with `roots`), and to be told that it arrived."""
    data = bytes(CHUNK)
    began = time.perf_counter()
    with contextlib.ExitStack() as stack:
        sock: socket.socket = stack.enter_context(socket.create_connection(("127.0.0.1", port), 60))
        if roots:
            sock = stack.enter_context(ssl.create_default_context(cafile=roots).wrap_socket(sock, server_hostname="bench.example"))
        for _ in range(megabytes * MEGABYTE // CHUNK):
            sock.sendall(data)
        if isinstance(sock, ssl.SSLSocket):
            with contextlib.suppress(ssl.SSLError):
                sock.unwrap()  # ends our direction; the stdlib gives up reading with it
        else:
            sock.shutdown(socket.SHUT_WR)
            assert int(sock.makefile().readline()) == megabytes * MEGABYTE
    return time.perf_counter() - began


def connections(port: int, count: int, threads: int = 8) -> float:
    """Seconds for `count` connections that each carry 64 bytes and a number back."""

    def some() -> None:
        for _ in range(count // threads):
            with socket.create_connection(("127.0.0.1", port), 60) as sock:
                sock.sendall(bytes(64))
                sock.shutdown(socket.SHUT_WR)
                assert sock.recv(99) == b"64\n"

    began = time.perf_counter()
    running = [threading.Thread(target=some) for _ in range(threads)]
    for each in running:
        each.start()
    for each in running:
        each.join()
    return time.perf_counter() - began


def measured(proxy: Proxy, roots: str, megabytes: int, count: int) -> Iterator[tuple[str, float, float]]:
    """For each kind of load its name, microseconds of CPU for a megabyte or a connection, and how many of them a second."""
    loads = (
        ("TCP, MB", megabytes, lambda: transfer(proxy.ports["tcp"], "", megabytes)),
        ("TLS ends here, MB", megabytes // 2, lambda: transfer(proxy.ports["tls"], roots, megabytes // 2)),
        ("TCP, connections", count, lambda: connections(proxy.ports["tcp"], count)),
    )
    for name, units, load in loads:
        before = procfs.cpu(procfs.tree([proxy.process.pid]))
        seconds = load()
        yield name, (procfs.cpu(procfs.tree([proxy.process.pid])) - before) / units, units / seconds


def run(rounds: int, megabytes: int, count: int) -> str:
    """The table, in Markdown."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tollhouse-bench-l4-")))
        identity = folder / "gw"
        write_identity(Authority.create("bench.example").issue("spiffe://bench.example/ns/bench/sa/gw", dns=("bench.example",)), identity)
        port = servers.free_port()
        sink = subprocess.Popen([sys.executable, "-m", "bench.l4", "--upstream", str(port)])
        stack.callback(sink.kill)
        servers.wait_for("the upstream", lambda: servers.answers(port))
        proxies = [Envoy(folder / "envoy", identity, port), Tollhouse(folder / "tollhouse", identity, port)]
        for proxy in proxies:
            stack.callback(proxy.process.close)
        figures: dict[tuple[str, str], list[tuple[float, float]]] = {}
        for number in range(rounds + 1):
            for proxy in proxies:
                for name, cpu, rate in measured(proxy, str(identity / "ca.pem"), megabytes, count):
                    if number:  # the first round warms up
                        figures.setdefault((name, proxy.name), []).append((cpu, rate))
    lines = [f"### {NAME}", "", "| load | contender | CPU µs each | × Envoy | a second |", "| --- | --- | ---: | ---: | ---: |"]
    for (name, who), found in sorted(figures.items(), key=lambda item: (item[0][0], item[0][1] != "Envoy")):
        cpu, rate = (statistics.median(values) for values in zip(*found, strict=True))
        alone = statistics.median(each for each, _ in figures[name, "Envoy"])
        lines.append(f"| {name} | {who} | {cpu:.0f} | {cpu / alone:.2f} | {rate:.0f} |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Reads the options and runs it."""
    parser = argparse.ArgumentParser(prog="python -m bench.l4", description="Measures TCP and TLS below HTTP beside Envoy.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--megabytes", type=int, default=1024, help="through one connection in each round")
    parser.add_argument("--connections", type=int, default=2000, help="in each round")
    parser.add_argument("--upstream", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.upstream:
        upstream(options.upstream)
    print(run(options.rounds, options.megabytes, options.connections), flush=True)


if __name__ == "__main__":
    main()
