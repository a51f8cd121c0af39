"""`Mesh.policy.maxStaleness`: a gateway that can't hear is cut off from its own policy, and goes on when it hears again."""

from __future__ import annotations

import subprocess
import urllib.request
from pathlib import Path
from typing import Any

import yaml
from e2e_world import tollhouse

from tests import servers
from tests.faulty_link import Link
from tests.servers import wait_for

REGO = """package shop.authz

# METADATA
# entrypoint: true
decision := {"allowed": input.attributes.request.http.method in {"GET"%s}}
"""


def resources(port: int, app: int) -> list[dict[str, Any]]:
    def own(kind: str, name: str, spec: dict[str, Any], api: str = "tollhouse.dev/v1", space: str = "shop") -> dict[str, Any]:
        return {"apiVersion": api, "kind": kind, "metadata": {"namespace": space, "name": name} if space else {"name": name}, "spec": spec}

    api = "gateway.networking.k8s.io/v1"
    listener = {"name": "http", "port": port, "protocol": "HTTP", "allowedRoutes": {"namespaces": {"from": "All"}}}
    target = {"group": "gateway.networking.k8s.io", "kind": "Gateway", "name": "gw"}
    return [
        own("Mesh", "shop", {"trustDomain": "shop.example", "policy": {"maxStaleness": "2s"}}, space=""),
        own("GatewayClass", "tollhouse", {"controllerName": "tollhouse.dev/gateway-controller"}, api, ""),
        own("Gateway", "gw", {"gatewayClassName": "tollhouse", "listeners": [listener]}, api, "edge"),
        own("Service", "app", {"ports": [{"port": 80}]}, "v1"),
        {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {"namespace": "shop", "name": "app", "labels": {"kubernetes.io/service-name": "app"}},
            "addressType": "IPv4",
            "ports": [{"port": app}],
            "endpoints": [{"addresses": ["127.0.0.1"]}],
        },
        own(
            "HTTPRoute",
            "app",
            {"parentRefs": [{"namespace": "edge", "name": "gw"}], "rules": [{"backendRefs": [{"name": "app", "port": 80}]}]},
            api,
        ),
        own("AccessPolicy", "all", {"targetRefs": [target], "decision": "shop.authz.decision", "place": "Local"}, space="edge"),
    ]


def published(config: str, folder: Path, more: str = "") -> str:
    """The name of a revision that lets GET pass, and `more`."""
    folder.mkdir(exist_ok=True)
    (folder / "authz.rego").write_text(REGO % more)
    done = tollhouse("policy", "publish", str(folder), "--config", config, "--decision", "shop.authz.decision")
    return done.stdout.split()[1].rstrip(":")


def test_a_gateway_that_can_not_hear_is_cut_off_until_it_hears(tmp_path: Path) -> None:
    port, admin, app = (servers.free_port() for _ in range(3))
    (tmp_path / "mesh.yaml").write_text(yaml.safe_dump_all(resources(port, app)))
    echo = servers.tollhouse("echo", "--listen", f"127.0.0.1:{app}", ready=lambda: servers.answers(app), name="echo")

    def status(method: str = "GET") -> int:
        command = ["curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", "-X", method, "--max-time", "10", f"http://127.0.0.1:{port}/"]
        return int(subprocess.run(command, capture_output=True, text=True, check=False).stdout or 0)

    with servers.etcd() as etcd, Link(etcd.port) as link:
        tollhouse("apply", "-f", str(tmp_path / "mesh.yaml"), "--config", etcd.url)
        first = published(etcd.url, tmp_path / "policy")
        tollhouse("policy", "activate", first, "--config", etcd.url)
        gateway = servers.tollhouse(
            "gateway", "edge/gw", "--config", f"etcd://127.0.0.1:{link.port}", "--address", "127.0.0.1", "--admin", f"127.0.0.1:{admin}",
            ready=lambda: servers.fetched(f"http://127.0.0.1:{admin}/readyz"), name="gateway-stale",
        )  # fmt: skip
        try:
            echo.start()
            gateway.start()
            wait_for("the policy", lambda: (status(), status("PUT")) == (200, 403), 60)
            second = published(etcd.url, tmp_path / "policy", ', "PUT"')
            link.deaf = True
            told = tollhouse("policy", "activate", second, "--config", etcd.url, "--timeout", "3s", check=False)
            assert told.returncode == 1 and "edge/gw" in told.stdout + told.stderr
            wait_for("it to be cut off", lambda: status() == 503, 30)
            assert status("PUT") == 503
            with urllib.request.urlopen(f"http://127.0.0.1:{admin}/metrics", timeout=5) as page:
                assert b'response_flags="UAEE"' in page.read()
            link.deaf, link.refusing = False, True
            link.reset()
            assert status() == 503
            link.refusing = False
            wait_for("what it has missed", lambda: (status(), status("PUT")) == (200, 200), 60)
        finally:
            gateway.close()
            echo.close()
