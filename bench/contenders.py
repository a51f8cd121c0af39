"""The contenders: each is a set of processes in front of the same upstream, with one address to ask at."""

from __future__ import annotations

import json
import os
import re
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

import yaml

from bench import build, envoy, peer_ratelimit
from tests import install, servers

Speech = Literal["http1", "http2", "rpc", "websocket"]
"""What is spoken towards the upstream."""
HTTP1: Speech = "http1"
HTTP2: Speech = "http2"
RPC: Speech = "rpc"
WEBSOCKET: Speech = "websocket"

APP_PROTOCOL: dict[Speech, dict[str, str]] = {
    HTTP1: {},
    HTTP2: {"appProtocol": "http2"},
    RPC: {"appProtocol": "grpc"},
    WEBSOCKET: {"appProtocol": "kubernetes.io/wss"},
}

POLICY = """package bench.authz

caller := trim_prefix(input.attributes.source.principal, "spiffe://bench.example/ns/callers/sa/")

decision := {"allowed": true} if {
	some grant in data.bench.grants[caller]
	input.attributes.request.http.method in grant.methods
	glob.match(grant.path, ["/"], input.attributes.request.http.path)
}

else := {"allowed": false}
"""
"""The same policy for everybody who asks one: caller, method and the whole path, against a table of grants."""

BY_AREA = """package bench.authz

caller := trim_prefix(input.attributes.source.principal, "spiffe://bench.example/ns/callers/sa/")

decision := {"allowed": true} if {
	some grant in data.bench.grants[caller]
	input.attributes.request.http.method in grant.methods
	trim_suffix(grant.path, "/*") == sprintf("/%s", [input.parsed_path[0]])
}

else := {"allowed": false}
"""
"""The same grants, by a policy that reads no more of the path than it needs: the first segment."""


def grants(callers: Sequence[str]) -> str:
    """The table, as OPA data: four grants for each caller."""
    rows = [
        {"methods": ["POST"], "path": "/orders/*"},
        {"methods": ["GET", "HEAD"], "path": "/stock/*"},
        {"methods": ["GET", "HEAD"], "path": "/catalog/*"},
        {"methods": ["POST"], "path": "/bench.Echo/*"},
    ]
    return json.dumps({"bench": {"grants": dict.fromkeys(callers, rows)}})


class Contender(ABC):
    """One way to do the job. `start` brings all of its processes up, `close` ends them."""

    name: str

    def __init__(self, folder: Path, identity: Path, upstream: int, callers: Sequence[str], policy: str, speech: Speech) -> None:
        self.folder = folder
        self.speech = speech
        self.identity = identity
        self.upstream = upstream
        self.port = servers.free_port()
        self.processes: list[servers.Process] = []
        self.stack = ExitStack()
        self.policy = folder / "policy"
        self.policy.mkdir(parents=True, exist_ok=True)
        (self.policy / "authz.rego").write_text(policy)
        (self.policy / "data.json").write_text(grants(callers))

    @abstractmethod
    def start(self) -> None:
        """Starts everything and waits until it answers."""

    def run(self, process: servers.Process) -> servers.Process:
        """Starts one process and keeps it among this contender's."""
        self.stack.callback(process.close)
        process.start()
        self.processes.append(process)
        return process

    def pids(self) -> list[int]:
        """Its processes, without their children."""
        return [process.pid for process in self.processes]

    def gateway(self) -> int:
        """The process that terminates connections."""
        return self.processes[-1].pid

    def note(self) -> str:
        """What else is worth a column: the hit rate of kept decisions."""
        return ""

    def close(self) -> None:
        """Ends all of its processes."""
        self.stack.close()

    def redis(self) -> servers.Server:
        """A Redis of its own."""
        server = self.stack.enter_context(servers.redis())
        self.processes.append(server)
        return server


class Envoy(Contender):
    """A real Envoy with one worker thread, in one of `envoy.STRENGTHS`."""

    strength = "alone"

    def start(self) -> None:
        """Envoy, and what it asks."""
        authz = ratelimit = 0
        if self.strength == "asking":
            authz = servers.free_port()
            command = [str(build.binary("authz")), "-listen", f"127.0.0.1:{authz}", "-policy", str(self.policy)]
            self.run(servers.Process(command, ready=lambda: servers.answers(authz), name="authz"))
            ratelimit = self.ratelimit(self.redis().port)
        path = self.folder / "envoy.yaml"
        http2, streams = self.speech in {HTTP2, RPC}, self.speech in {RPC, WEBSOCKET}
        path.write_text(
            envoy.bootstrap(self.strength, self.port, self.upstream, self.identity, authz, ratelimit, http2=http2, streams=streams)
        )
        command = [str(install.install("envoy")), "-c", str(path), "--log-level", "error", "--disable-hot-restart", "--concurrency", "1"]
        self.run(servers.Process(command, ready=lambda: servers.answers(self.port), name="envoy"))

    def ratelimit(self, redis: int) -> int:
        """envoyproxy/ratelimit over Redis; returns its gRPC port."""
        server = peer_ratelimit.ratelimit(self.folder, redis, {"bench.yaml": envoy.RATELIMIT})
        self.run(server)
        return server.port


class EnvoyAlone(Envoy):
    """mTLS to mTLS, nothing asked."""

    name = "Envoy"


class EnvoyOwn(Envoy):
    """With its own RBAC and local rate limit."""

    name = "Envoy, own RBAC and local rate limit"
    strength = "own"


class EnvoyAsking(Envoy):
    """With OPA and a rate-limit service."""

    name = "Envoy + OPA + ratelimit + Redis"
    strength = "asking"


class Tollhouse(Contender):
    """One gateway process, on a directory of resources."""

    enforcing = False
    place = "Central"

    def start(self) -> None:
        """The gateway, and what it asks."""
        config = self.folder / "config"
        config.mkdir(parents=True)
        (config / "mesh.yaml").write_text(yaml.safe_dump_all(self.resources(), sort_keys=False))
        self.admin = servers.free_port()
        gateway = ["gateway", "bench/gw", "--config", str(config), "--identity", str(self.identity), "--admin", f"127.0.0.1:{self.admin}"]
        gateway += ["--address", "127.0.0.1", "--access-log", "off"]
        if self.enforcing:
            (config / "policy").mkdir()
            for path in self.policy.iterdir():
                (config / "policy" / path.name).write_bytes(path.read_bytes())
            gateway += ["--redis", self.redis().url + "?start=full"]
            if self.place == "Central":
                pdp = servers.free_port()
                command = ["pdp", "--config", str(config), "--listen", f"127.0.0.1:{pdp}"]
                self.run(servers.tollhouse(*command, ready=lambda: servers.answers(pdp), name="pdp"))
                gateway += ["--pdp", f"127.0.0.1:{pdp}"]
        ready = f"http://127.0.0.1:{self.admin}/readyz"
        self.run(servers.tollhouse(*gateway, ready=lambda: servers.fetched(ready), name="gateway", env=dict(os.environ)))

    def resources(self) -> list[dict[str, object]]:
        """The mesh, as it would be written by hand."""
        options = {"tollhouse.dev/certificate": "SVID", "tollhouse.dev/client-validation": "TrustBundle"}
        listener = {
            "name": "https",
            "port": self.port,
            "protocol": "HTTPS",
            "hostname": "bench.example",
            "tls": {"mode": "Terminate", "options": options},
        }
        group = "gateway.networking.k8s.io"
        kind = "GRPCRoute" if self.speech == RPC else "HTTPRoute"
        made: list[dict[str, object]] = [
            resource(f"{group}/v1", "GatewayClass", "tollhouse", "", {"controllerName": "tollhouse.dev/gateway-controller"}),
            resource(f"{group}/v1", "Gateway", "gw", "bench", {"gatewayClassName": "tollhouse", "listeners": [listener]}),
            resource(
                f"{group}/v1",
                kind,
                "all",
                "bench",
                {
                    "parentRefs": [{"name": "gw"}],
                    "hostnames": ["bench.example"],
                    "rules": [{"backendRefs": [{"name": "upstream", "port": 443}]}],
                },
            ),
            resource("v1", "Service", "upstream", "bench", {"ports": [{"name": "https", "port": 443, **APP_PROTOCOL[self.speech]}]}),
            {
                "apiVersion": "discovery.k8s.io/v1",
                "kind": "EndpointSlice",
                "metadata": {"name": "upstream", "namespace": "bench", "labels": {"kubernetes.io/service-name": "upstream"}},
                "addressType": "IPv4",
                "ports": [{"name": "https", "port": self.upstream}],
                "endpoints": [{"addresses": ["127.0.0.1"]}],
            },
            resource(
                "tollhouse.dev/v1",
                "ServiceIdentity",
                "upstream",
                "bench",
                {"service": "upstream", "identities": ["spiffe://bench.example/ns/bench/sa/gw"]},
            ),
        ]
        mesh: dict[str, object] = {"trustDomain": "bench.example", "trustedGateways": []}
        if self.enforcing:
            mesh["defaultAccessPolicy"] = {"namespace": "bench", "name": "default"}
            made.append(
                resource("tollhouse.dev/v1", "AccessPolicy", "default", "bench", {"decision": "bench.authz.decision", "place": self.place})
            )
            limit = {"name": "per-caller", "per": ["identity"], "tokens": 1000000, "interval": "1s", "burst": 1000000}
            target = {"group": group, "kind": kind, "name": "all"}
            made.append(resource("tollhouse.dev/v1", "QuotaPolicy", "all", "bench", {"targetRefs": [target], "limits": [limit]}))
        made.append(resource("tollhouse.dev/v1", "Mesh", "bench", "", mesh))
        return made

    def note(self) -> str:
        """The hit rate, from the gateway's metrics."""
        if not self.enforcing:
            return ""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.admin}/metrics", timeout=5) as answer:
            text = answer.read().decode()
        kept = dict.fromkeys(("true", "false"), 0.0)
        for line in text.splitlines():
            found = re.match(r"tollhouse_decisions_total\{.*kept=\"(true|false)\".*\} ([0-9.e+]+)", line)
            if found:
                kept[found.group(1)] += float(found.group(2))
        asked = sum(kept.values())
        return f"{100 * kept['true'] / asked:.1f} % kept" if asked else ""


def resource(version: str, kind: str, name: str, namespace: str, spec: dict[str, object]) -> dict[str, object]:
    """One resource."""
    return {
        "apiVersion": version,
        "kind": kind,
        "metadata": {"name": name, **({"namespace": namespace} if namespace else {})},
        "spec": spec,
    }


class TollhouseBare(Tollhouse):
    """mTLS to mTLS, nothing asked."""

    name = "Tollhouse, bare"


class TollhouseCentral(Tollhouse):
    """Policy from the PDP, quota from Redis."""

    name = "Tollhouse, enforcing, Central"
    enforcing = True


class TollhouseLocal(Tollhouse):
    """Policy from a worker of the gateway's own, quota from Redis."""

    name = "Tollhouse, enforcing, Local"
    enforcing = True
    place = "Local"


ALL: tuple[type[Contender], ...] = (EnvoyAlone, EnvoyOwn, EnvoyAsking, TollhouseBare, TollhouseCentral, TollhouseLocal)
BARE: tuple[type[Contender], ...] = (EnvoyAlone, TollhouseBare)
"""Those that ask nothing: where a question is asked once for many messages, or bytes are what costs."""
