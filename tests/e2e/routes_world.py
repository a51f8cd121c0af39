"""One gateway process in plaintext over a folder of manifests, and the services behind it: HTTP and gRPC, in threads of the test.

with gateway(ROUTES) as edge:
    edge.curl("/path").status == 200
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import grpc
import yaml
from e2e_world import Answer, answer_of
from envoy.config.core.v3.base_pb2 import HeaderValue
from envoy.service.auth.v3.external_auth_pb2 import CheckRequest, CheckResponse

from identity.ca import Authority, write_identity
from tests import servers

SERVICES = ("v1", "v2", "v3")


class _Service(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, name: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.name = name
        self.seen: list[dict[str, Any]] = []
        self.failed: Counter[str] = Counter()
        """How often each `id` was to fail so far."""
        threading.Thread(target=self.serve_forever, daemon=True).start()


class _Handler(BaseHTTPRequestHandler):
    """Answers with what it was sent. `?delay=S`, `?fail=STATUS&times=N&id=X`: the first N of X get STATUS, or for 0 no answer at all."""

    server: _Service
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16

    def log_message(self, *_: object) -> None: ...

    def _answer(self) -> None:
        asked = {name: values[0] for name, values in parse_qs(urlsplit(self.path).query).items()}
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        status = 200
        if "fail" in asked:
            self.server.failed[asked["id"]] += 1
            status = int(asked["fail"]) if self.server.failed[asked["id"]] <= int(asked["times"]) else 200
        said = {
            "service": self.server.name,
            "method": self.command,
            "path": self.path,
            "headers": {name.lower(): ",".join(self.headers.get_all(name) or ()) for name in self.headers},
            "body": body.decode(),
        }
        self.server.seen.append(said)
        if "delay" in asked:
            time.sleep(float(asked["delay"]))
        if not status:
            self.close_connection = True
            return
        data = json.dumps(said).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.send_header("x-seen-by", self.server.name)
        self.send_header("access-control-allow-origin", "https://said-by-the-upstream.example")
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_PUT = do_DELETE = do_OPTIONS = do_PATCH = _answer


class Calls(grpc.GenericRpcHandler):
    """Answers every gRPC method with the service's name; `Fail` with a status, `Stream` with what it is sent."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.seen: list[tuple[str, dict[str, Any]]] = []

    def service(self, details: Any) -> Any:
        name = self.name.encode()
        if details.method.endswith("Authorization/Check"):
            return grpc.unary_unary_rpc_method_handler(
                self._check, request_deserializer=CheckRequest.FromString, response_serializer=CheckResponse.SerializeToString
            )
        self.seen.append((details.method, dict(details.invocation_metadata)))
        if details.method.endswith("/Stream"):
            return grpc.stream_stream_rpc_method_handler(lambda pieces, _: (name + b" " + piece for piece in pieces))
        if details.method.endswith("/Fail"):
            return grpc.unary_unary_rpc_method_handler(lambda _, context: context.abort(grpc.StatusCode.FAILED_PRECONDITION, "not so"))
        return grpc.unary_unary_rpc_method_handler(lambda request, _: name + b" " + request)

    def _check(self, request: CheckRequest, _: object) -> CheckResponse:
        """Lets those pass who say who they are; everybody else is told what the service was shown."""
        http = request.attributes.request.http
        answer = CheckResponse()
        user = http.headers.get("x-user")
        if user:
            answer.ok_response.headers.add().header.MergeFrom(HeaderValue(key="x-checked", value=f"{user} by {self.name}"))
        else:
            answer.status.code = 7
            answer.denied_response.status.code = 401
            answer.denied_response.body = f"{http.method} {http.path} {sorted(http.headers)} {http.body}"
        return answer


class Edge:
    """The running gateway."""

    def __init__(self, port: int, admin: int, config: Path, services: dict[str, _Service], calls: dict[str, Calls], log: Path) -> None:
        self.port, self.admin, self.config, self.log = port, admin, config, log
        self.services, self.calls = services, calls

    def curl(self, path: str, *more: str, host: str = "shop.example") -> Answer:
        """One request by a real client."""
        command = ["curl", "-sS", "-i", "--max-time", "20", "--resolve", f"{host}:{self.port}:127.0.0.1", *more]
        done = subprocess.run([*command, f"http://{host}:{self.port}{path}"], capture_output=True, timeout=30, check=False)
        return answer_of(done.stdout.decode(errors="replace"), done.returncode)

    def channel(self, host: str) -> grpc.Channel:
        return grpc.insecure_channel(f"127.0.0.1:{self.port}", options=[("grpc.default_authority", host)])

    def metrics(self) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.admin}/metrics", timeout=5) as page:
            text: str = page.read().decode()
        return text


def _service(name: str, *ports: int, **more: Any) -> list[dict[str, Any]]:
    metadata = {"namespace": "shop", "name": name}
    slices = [
        {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {"namespace": "shop", "name": f"{name}-{port}", "labels": {"kubernetes.io/service-name": name}},
            "addressType": "IPv4",
            "ports": [{"port": port}],
            "endpoints": [{"addresses": ["127.0.0.1"]}],
        }
        for port in ports
    ]
    return [{"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": {"ports": [{"port": 80, **more}]}}, *slices]


@contextlib.contextmanager
def gateway(routes: str, *arguments: str, rego: str = "") -> Iterator[Edge]:
    """A gateway `edge/gw` with these routes at its listener `http`; HTTP Services `v1`, `v2`, `v3` and `all`, `g1`, `g2`, for gRPC.
    `arguments` are more for its command line, `rego` is policy in force."""
    with contextlib.ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="tollhouse-routes-"))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        port, admin = servers.free_port(), servers.free_port()
        services = {name: _Service(name) for name in SERVICES}
        calls = {name: Calls(name) for name in ("g1", "g2")}
        resources: list[dict[str, Any]] = [
            {
                "apiVersion": "gateway.networking.k8s.io/v1",
                "kind": "GatewayClass",
                "metadata": {"name": "tollhouse"},
                "spec": {"controllerName": "tollhouse.dev/gateway-controller"},
            },
            {
                "apiVersion": "gateway.networking.k8s.io/v1",
                "kind": "Gateway",
                "metadata": {"namespace": "edge", "name": "gw"},
                "spec": {
                    "gatewayClassName": "tollhouse",
                    "listeners": [
                        {"name": "http", "port": port, "protocol": "HTTP", "allowedRoutes": {"namespaces": {"from": "All"}}},
                    ],
                },
            },
        ]
        for name, service in services.items():
            stack.callback(service.server_close)
            stack.callback(service.shutdown)
            resources += _service(name, service.server_address[1])
        resources += _service("all", *(service.server_address[1] for service in services.values()))
        for name, handler in calls.items():
            server = grpc.server(ThreadPoolExecutor(4))
            server.add_generic_rpc_handlers((handler,))
            at = server.add_insecure_port("127.0.0.1:0")
            server.start()
            stack.callback(server.stop, None)
            resources += _service(name, at, **({"appProtocol": "kubernetes.io/h2c"} if name == "g2" else {}))
        config = folder / "config"
        config.mkdir()
        (config / "base.yaml").write_text(yaml.safe_dump_all(resources))
        (config / "routes.yaml").write_text(routes)
        if rego:
            (config / "policy").mkdir()
            (config / "policy" / "policy.rego").write_text(rego)
        write_identity(Authority.create("shop.example").issue("spiffe://shop.example/ns/edge/sa/gw"), folder / "identity")
        log = folder / "access.log"
        process = servers.tollhouse(
            "gateway", "edge/gw", "--config", str(config), "--address", "127.0.0.1", "--identity", str(folder / "identity"),
            "--admin", f"127.0.0.1:{admin}", "--access-log", str(log), *arguments,
            ready=lambda: servers.fetched(f"http://127.0.0.1:{admin}/readyz"), name="gateway-routes",
        )  # fmt: skip
        stack.callback(process.close)
        process.start()
        yield Edge(port, admin, config, services, calls, log)
