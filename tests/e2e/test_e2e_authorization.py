"""Istio's AuthorizationPolicy over real processes: several callers over mTLS, in force and gone again, below HTTP, in the decision log."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from typing import Any

import pytest
import yaml
from e2e_traffic import apply, ask, service
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


PROVIDER = """package authz

default allow := false

allow if input.attributes.request.http.headers["x-pass"] == "yes"

allow if not input.attributes.request
"""


def test_a_provider_is_asked_about_what_custom_policies_match(mesh: Mesh) -> None:
    folder = mesh.folder / "provider"
    folder.mkdir()
    (folder / "authz.rego").write_text(PROVIDER)
    port = servers.free_port()
    asked: list[bytes] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            shown, key = self.headers.get("x-shown", ""), self.headers.get("x-key", "")
            asked.append(f"{self.path} {shown} {key}".encode())
            allowed = self.headers.get("authorization") == "let me"
            self.send_response(200 if allowed else 401)
            self.send_header("x-user", "ann")
            self.send_header("x-hidden", "1")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    plain = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=plain.serve_forever, daemon=True).start()
    mesh.run(
        "provider", "pdp", "--policy", str(folder), "--decision", "authz.allow", "--listen", f"127.0.0.1:{port}",
        ready=lambda: servers.answers(port),
    )  # fmt: skip
    documents = []
    for name, at in (("authz", port), ("checker", plain.server_address[1])):
        documents += [each for each in service(name, [int(at)], "authz") if each["kind"] != "ServiceIdentity"]
    providers = [
        {"name": "opa", "envoyExtAuthzGrpc": {"service": "authz.shop.svc.cluster.local", "port": 443}},
        {
            "name": "plain",
            "envoyExtAuthzHttp": {
                "service": "checker.shop.svc.cluster.local",
                "port": 443,
                "pathPrefix": "/check",
                "includeRequestHeadersInCheck": ["x-shown"],
                "includeAdditionalHeadersInCheck": {"x-key": "k"},
                "headersToUpstreamOnAllow": ["x-user"],
            },
        },
        {"name": "gone", "envoyExtAuthzGrpc": {"service": "shop/nobody", "port": 443, "statusOnError": "429"}},
    ]
    nobody = [each for each in service("nobody", [servers.free_port()], "authz") if each["kind"] != "ServiceIdentity"]
    spec = {"trustDomain": "shop.example", "trustedGateways": [spiffe("ingress", "edge")], "extensionProviders": providers}
    apply(mesh, *documents, *nobody, {"apiVersion": "tollhouse.dev/v1", "kind": "Mesh", "metadata": {"name": "shop"}, "spec": spec})
    apply(
        mesh,
        *(
            policy(name, action="CUSTOM", provider={"name": name}, rules=[{"to": [{"operation": {"paths": [f"/catalog/{name}*"]}}]}])
            for name in ("opa", "plain", "gone")
        ),
    )
    until(mesh, "web", "/catalog/gone", 429)
    until(mesh, "web", "/catalog/opa", 403)
    assert ask(mesh, "web", "/catalog/opa", headers={"x-pass": "yes"}).status == 200
    assert ask(mesh, "web", "/catalog/1").status == 200
    assert asked == []
    assert ask(mesh, "web", "/catalog/plain?q=1", headers={"x-shown": "s", "x-key": "mine"}).status == 401
    assert asked[-1] == b"/check/catalog/plain?q=1 s k"
    passed = ask(mesh, "web", "/catalog/plain", headers={"authorization": "let me"})
    assert passed.status == 200
    seen = json.loads(passed.body)["headers"]
    assert seen["x-user"] == "ann"
    assert "x-hidden" not in seen
    # Below HTTP rules about requests match every connection; what is to be asked of a provider that speaks HTTP only is denied.
    assert not connects(mesh)
    tollhouse("delete", "AuthorizationPolicy", "edge/plain", "edge/gone", "--config", mesh.config)
    servers.wait_for("connections are asked about and let in", lambda: connects(mesh), seconds=20)
    tollhouse("delete", "AuthorizationPolicy", "edge/opa", "--config", mesh.config)
    plain.shutdown()
