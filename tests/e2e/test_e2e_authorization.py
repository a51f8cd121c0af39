"""Istio's AuthorizationPolicy over real processes: several callers over mTLS, in force and gone again, below HTTP, in the decision log."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from itertools import count
from typing import Any

import pytest
import yaml
from e2e_traffic import apply, ask
from e2e_world import EXAMPLE, Mesh, shop, spiffe, tollhouse

from tests import servers

pytestmark = pytest.mark.e2e
fresh = count()


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    with shop(services=("catalog-v1", "catalog-v2", "orders"), gateways=()) as running:
        gateway = next(
            each for each in yaml.safe_load_all((EXAMPLE / "gateways.yaml").read_text()) if each["metadata"]["name"] == "ingress"
        )
        running.ports["tcp"] = servers.free_port()
        gateway["spec"]["listeners"][0]["port"] = running.ports["ingress"]
        below = {"name": "tcp", "port": running.ports["tcp"], "protocol": "TCP", "allowedRoutes": {"namespaces": {"from": "All"}}}
        gateway["spec"]["listeners"].append(below)
        route = {
            "apiVersion": "gateway.networking.k8s.io/v1",
            "kind": "TCPRoute",
            "metadata": {"namespace": "shop", "name": "orders-tcp"},
            "spec": {
                "parentRefs": [{"namespace": "edge", "name": "ingress", "sectionName": "tcp"}],
                "rules": [{"backendRefs": [{"name": "orders", "port": 443}]}],
            },
        }
        apply(running, gateway, route)
        tollhouse("delete", "Mesh", "shop", "--config", running.config)
        domain = {"trustDomain": "shop.example", "trustedGateways": [spiffe("ingress", "edge")]}
        apply(running, {"apiVersion": "tollhouse.dev/v1", "kind": "Mesh", "metadata": {"name": "shop"}, "spec": domain})
        running.gateway("ingress", "--decision-log", str(running.folder / "decisions.log"))
        yield running


def policy(name: str, namespace: str = "edge", annotations: dict[str, str] | None = None, **spec: Any) -> dict[str, Any]:
    metadata = {"namespace": namespace, "name": name, "annotations": annotations or {}}
    return {"apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy", "metadata": metadata, "spec": spec}


def until(mesh: Mesh, caller: str, path: str, status: int, method: str = "GET") -> None:
    servers.wait_for(f"{method} {path} of {caller} is {status}", lambda: ask(mesh, caller, path, method).status == status, seconds=20)


def connects(mesh: Mesh) -> bool:
    """Whether a connection below HTTP reaches the service: its answer comes through."""
    connection = http.client.HTTPConnection("127.0.0.1", mesh.ports["tcp"], timeout=10)
    try:
        connection.request("GET", "/tcp", headers={"Host": "orders"})
        return connection.getresponse().read() != b""
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def decisions(mesh: Mesh, path: str) -> list[dict[str, Any]]:
    """The decision log's events about requests for a path."""
    found = []
    for line in (mesh.folder / "decisions.log").read_text().splitlines():
        event = json.loads(line)
        http_request = event["input"]["attributes"].get("request", {}).get("http", {})
        if http_request.get("path") == path:
            found.append(event)
    return found


def test_who_may_what_where(mesh: Mesh) -> None:
    assert ask(mesh, "web", "/catalog/1").status == 200
    assert connects(mesh)
    apply(
        mesh,
        policy("no-internals", action="DENY", rules=[{"to": [{"operation": {"paths": ["/catalog/internal/{**}"]}}]}]),
        policy(
            "orders",
            "shop",
            targetRefs=[{"kind": "Service", "name": "orders"}],
            rules=[
                {"from": [{"source": {"principals": ["cluster.local/ns/shop/sa/web"]}}], "to": [{"operation": {"methods": ["GET"]}}]},
                {"from": [{"source": {"serviceAccounts": ["shop/batch"]}}], "when": [{"key": "request.headers[x-why]", "values": ["*"]}]},
            ],
        ),
    )
    until(mesh, "web", "/catalog/internal/1", 403)
    until(mesh, "web", "/orders/1", 403, "POST")
    for caller, method, path, headers, status in [
        ("web", "GET", "/catalog/1", {}, 200),
        ("batch", "POST", "/catalog/1", {}, 200),
        ("batch", "GET", "/catalog/internal", {}, 200),
        ("batch", "GET", "/catalog//internal/1", {}, 403),
        ("batch", "GET", "/catalog/x/../internal/%31", {}, 403),
        ("web", "GET", "/orders/1", {}, 200),
        ("web", "DELETE", "/orders/1", {}, 403),
        ("batch", "GET", "/orders/1", {}, 403),
        ("batch", "GET", "/orders/1", {"X-Why": ""}, 200),
        ("catalog", "GET", "/orders/1", {"x-why": "1"}, 403),
    ]:
        assert ask(mesh, caller, path, method, headers=headers).status == status, (caller, method, path)
    assert not connects(mesh), "below HTTP the rules of ALLOW policies about requests allow nobody"
    assert mesh.logged("ingress", "/orders/1")["response_flags"] in ("UAEX", "-")

    explained = tollhouse(
        "explain", "--gateway", "edge/ingress", "--as", spiffe("batch"), "--config", mesh.config, "DELETE", "https://shop.example/orders/1",
        check=False,
    )  # fmt: skip
    assert explained.returncode == 1
    assert "no ALLOW policy matches" in explained.stdout
    explained = tollhouse(
        "explain", "--gateway", "edge/ingress", "--as", spiffe("web"), "--config", mesh.config, "GET", "https://shop.example/catalog/internal/x",
        check=False,
    )  # fmt: skip
    assert "DENY edge/no-internals rules[0]" in explained.stdout
    shown = tollhouse("get", "AuthorizationPolicy", "shop/orders", "--config", mesh.config, "-o", "yaml").stdout
    assert "It is in force at Service shop/orders." in shown

    tollhouse("delete", "AuthorizationPolicy", "edge/no-internals", "shop/orders", "--config", mesh.config)
    until(mesh, "web", "/catalog/internal/1", 200)
    until(mesh, "catalog", "/orders/1", 200)
    assert connects(mesh)


def test_marks_and_dry_runs_are_in_the_decision_log(mesh: Mesh) -> None:
    apply(
        mesh,
        policy("watch", action="AUDIT", rules=[{"from": [{"source": {"principals": ["*/sa/batch"]}}]}]),
        policy("rehearsal", annotations={"istio.io/dry-run": "true"}, action="DENY", rules=[{"to": [{"operation": {"methods": ["GET"]}}]}]),
    )

    def marked() -> bool:
        path = f"/catalog/marked{next(fresh)}"
        assert ask(mesh, "batch", path).status == 200
        found: list[dict[str, Any]] = []

        def there() -> bool:
            found[:] = decisions(mesh, path)
            return len(found) > 0

        try:
            servers.wait_for("the decision log", there, seconds=3)
        except AssertionError:
            return False
        audits = [each["result"]["dynamic_metadata"] for each in found if isinstance(each["result"], dict) and not each["custom"]["shadow"]]
        dry = [each for each in found if each["custom"]["shadow"]]
        if not dry:
            return False
        assert audits == [{"audit": ["edge/watch"]}]
        assert [each["custom"]["policy"] for each in dry] == ["AuthorizationPolicy (dry run)"]
        assert dry[0]["custom"]["rule"] == "DENY edge/rehearsal rules[0]"
        assert dry[0]["custom"]["verdict"] == "deny"
        return True

    servers.wait_for("a marked decision", marked, seconds=30)
    tollhouse("delete", "AuthorizationPolicy", "edge/watch", "edge/rehearsal", "--config", mesh.config)


def test_a_policy_that_is_wrong_leaves_the_last_good_one_and_one_that_never_was_right_refuses(mesh: Mesh) -> None:
    apply(mesh, policy("p", action="DENY", rules=[{"to": [{"operation": {"methods": ["PUT"]}}]}]))
    until(mesh, "web", "/catalog/1", 403, "PUT")
    wrong = yaml.safe_dump(policy("p", action="DENY", rules=[{"to": [{"operation": {"method": ["GET"]}}]}]))
    path = mesh.folder / "wrong.yaml"
    path.write_text(wrong)
    refused = tollhouse("apply", "-f", str(path), "--config", mesh.config, check=False)
    assert refused.returncode == 1
    assert "did you mean methods?" in refused.stdout + refused.stderr
    assert ask(mesh, "web", "/catalog/1", "PUT").status == 403
    assert ask(mesh, "web", "/catalog/1").status == 200
    tollhouse("delete", "AuthorizationPolicy", "edge/p", "--config", mesh.config)
    until(mesh, "web", "/catalog/1", 200, "PUT")
