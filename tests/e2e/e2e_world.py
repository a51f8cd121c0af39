"""The example mesh as separate processes on real servers: etcd, Redis, OPA workers behind `tollhouse pdp`, three gateways, five services.

with shop() as mesh:
    mesh.curl("web", "GET", "/catalog/1").status == 200
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from identity.ca import Authority, write_identity
from tests import servers

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "conf" / "examples" / "shop"
DOMAIN = "shop.example"
SERVICES = {"catalog-v1": 9101, "catalog-v2": 9102, "orders": 9103, "payments": 9104, "bank": 9105}
GATEWAYS = {"ingress": 8443, "eastwest": 8444, "egress": 8445}
CALLERS = ("web", "batch", "orders", "payments", "catalog")
HOSTS = {"ingress": ["shop.example"], "eastwest": ["*.shop.example"], "egress": ["bank.example"]}


def spiffe(name: str, namespace: str = "shop") -> str:
    return f"spiffe://{DOMAIN}/ns/{namespace}/sa/{name}"


@dataclass
class Answer:
    """What curl got."""

    status: int
    headers: dict[str, str]
    body: str
    code: int
    """curl's exit code."""

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def tollhouse(*arguments: str, check: bool = True, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end."""
    done = subprocess.run([sys.executable, "-m", "tollhouse", *arguments], capture_output=True, text=True, timeout=timeout, check=False)
    if check and done.returncode:
        raise AssertionError(f"tollhouse {' '.join(arguments)} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return done


def with_ports(folder: Path, ports: dict[int, int]) -> None:
    """Puts free ports in place of those of the example."""
    for path in folder.rglob("*.yaml"):
        text = path.read_text()
        for before, after in ports.items():
            text = text.replace(f"port: {before}\n", f"port: {after}\n")
        path.write_text(text)


@dataclass
class Mesh:
    """A running mesh. Processes are by name: `gateway-ingress`, `pdp`, `echo-orders`, ..."""

    folder: Path
    stack: ExitStack
    etcd: servers.Server
    redis: servers.Server
    authority: Authority
    outside: Authority
    ports: dict[str, int]
    processes: dict[str, servers.Process] = field(default_factory=dict)

    @property
    def config(self) -> str:
        return self.etcd.url.replace("http://", "etcd://")

    def identity(self, name: str) -> Path:
        return self.folder / "identities" / name

    def issue(self, name: str, namespace: str = "shop", dns: Sequence[str] = ()) -> Path:
        """Writes (or renews) an identity."""
        folder = self.identity(f"{namespace}-{name}")
        write_identity(self.authority.issue(spiffe(name, namespace), dns=dns), folder)
        return folder

    def run(self, name: str, *arguments: str, ready: Any) -> servers.Process:
        """Starts a process of ours and keeps it."""
        process = servers.tollhouse(*arguments, ready=ready, name=name)
        self.stack.callback(process.close)
        process.start()
        self.processes[name] = process
        return process

    def gateway(self, name: str, *more: str) -> servers.Process:
        """Starts a gateway."""
        admin = self.ports.setdefault(f"admin-{name}", servers.free_port())
        return self.run(
            f"gateway-{name}",
            "gateway", f"edge/{name}", "--config", self.config, "--identity", str(self.identity(f"edge-{name}")),
            "--pdp", f"127.0.0.1:{self.ports['pdp']}", "--redis", self.redis.url + "?start=full", "--admin", f"127.0.0.1:{admin}",
            "--state", str(self.folder / f"state-{name}"), "--access-log", str(self.folder / f"{name}.log"), *more,
            ready=lambda: servers.fetched(f"http://127.0.0.1:{admin}/readyz"),
        )  # fmt: skip

    def pdp(self) -> servers.Process:
        """Starts the PDP."""
        port = self.ports.setdefault("pdp", servers.free_port())
        return self.run(
            "pdp", "pdp", "--config", self.config, "--listen", f"127.0.0.1:{port}", "--state", str(self.folder / "state-pdp"),
            ready=lambda: servers.answers(port),
        )  # fmt: skip

    def echo(self, name: str) -> servers.Process:
        """Starts an example service."""
        port = self.ports[name]
        who: list[str] = []
        if name == "bank":
            who = ["--identity", str(self.folder / "bank"), "--public"]
        else:
            account = name.partition("-v")[0]
            who = ["--identity", str(self.identity(f"shop-{account}"))]
            for gateway in GATEWAYS:
                who += ["--gateway", spiffe(gateway, "edge")]
        return self.run(f"echo-{name}", "echo", "--name", name, "--listen", f"127.0.0.1:{port}", *who, ready=lambda: servers.answers(port))

    def curl(
        self,
        caller: str | None,
        method: str,
        path: str,
        *more: str,
        gateway: str = "ingress",
        host: str = "",
    ) -> Answer:
        """One request by a real client."""
        host = host or HOSTS[gateway][0].replace("*", "payments")
        port = self.ports[gateway]
        url = f"https://{host}:{port}{path}"
        command = ["curl", "-sS", "-i", "--path-as-is", "-X", method, "--max-time", "20", "--resolve", f"{host}:{port}:127.0.0.1"]
        command += ["--cacert", str(self.identity("shop-web") / "ca.pem")]
        if caller is not None:
            folder = self.identity(f"shop-{caller}")
            command += ["--cert", str(folder / "cert.pem"), "--key", str(folder / "key.pem")]
        done = subprocess.run([*command, *more, url], capture_output=True, timeout=30, check=False)
        return answer_of(done.stdout.decode(errors="replace"), done.returncode)

    def metric(self, gateway: str, name: str, **labels: str) -> float:
        """The sum of a metric's samples that have these labels."""
        import urllib.request

        with urllib.request.urlopen(f"http://127.0.0.1:{self.ports[f'admin-{gateway}']}/metrics", timeout=5) as page:
            text = page.read().decode()
        total = 0.0
        for line in text.splitlines():
            named = line.startswith(name) and line[len(name) : len(name) + 1] in {"{", " "}
            if named and all(f'{key}="{value}"' in line for key, value in labels.items()):
                total += float(line.rpartition(" ")[2])
        return total

    def access_log(self, gateway: str) -> list[dict[str, Any]]:
        """What a gateway logged so far."""
        path = self.folder / f"{gateway}.log"
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    def logged(self, gateway: str, path: str) -> dict[str, Any]:
        """The newest entry of a gateway's access log for a path, once it is there: logs are written by a thread of their own."""
        found: list[dict[str, Any]] = []

        def there() -> bool:
            found[:] = [entry for entry in self.access_log(gateway) if entry["path"] == path]
            return bool(found)

        servers.wait_for(f"{path} in the access log of {gateway}", there)
        return found[-1]


def answer_of(text: str, code: int) -> Answer:
    """curl -i's output, its last answer."""
    status, headers, body = 0, {}, text
    while body.startswith("HTTP/"):
        head, _, body = body.partition("\r\n\r\n")
        lines = head.split("\r\n")
        status = int(lines[0].split(" ")[1])
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
    return Answer(status, headers, body, code)


def write_config(folder: Path, ports: dict[str, int], outside: Authority) -> None:
    """The example with free ports, and the root of the service outside the mesh."""
    shutil.copytree(EXAMPLE, folder)
    with_ports(folder, {number: ports[name] for name, number in {**SERVICES, **GATEWAYS}.items()})
    config_map = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"namespace": "shop", "name": "bank-ca"},
        "data": {"ca.crt": outside.bundle.decode()},
    }
    (folder / "bank-ca.yaml").write_text(yaml.safe_dump(config_map))


@contextlib.contextmanager
def shop(*, services: Sequence[str] = tuple(SERVICES), gateways: Sequence[str] = tuple(GATEWAYS)) -> Iterator[Mesh]:
    """The whole mesh, ready."""
    with ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="tollhouse-shop-"))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        ports = {name: servers.free_port() for name in (*SERVICES, *GATEWAYS, "pdp", "quota")}
        mesh = Mesh(
            folder,
            stack,
            stack.enter_context(servers.etcd()),
            stack.enter_context(servers.redis("--maxmemory-policy", "noeviction")),
            Authority.create(DOMAIN),
            Authority.create("outside.example"),
            ports,
        )
        for caller in CALLERS:
            mesh.issue(caller)
        for gateway in GATEWAYS:
            mesh.issue(gateway, "edge", HOSTS[gateway])
        write_identity(mesh.outside.issue("spiffe://outside.example/ns/bank/sa/bank", dns=("bank.example",)), folder / "bank")
        write_config(folder / "config", ports, mesh.outside)
        tollhouse("apply", "-f", str(folder / "config"), "--config", mesh.config)
        tollhouse("policy", "publish", str(folder / "config" / "policy"), "--config", mesh.config, "--activate", "--timeout", "0s")
        for name in services:
            mesh.echo(name)
        mesh.pdp()
        for gateway in gateways:
            mesh.gateway(gateway)
        yield mesh
