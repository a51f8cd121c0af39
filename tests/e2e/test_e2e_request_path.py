"""The enforced request path on real servers: allowed, denied with a reason, told to slow down; nobody gets around it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
from e2e_traffic import apply
from e2e_world import Mesh, shop, spiffe, tollhouse

from tests.servers import wait_for

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    with shop() as running:
        yield running


@pytest.mark.parametrize(
    ("caller", "method", "path", "status"),
    [
        ("web", "GET", "/catalog/1", 200),
        ("web", "POST", "/catalog/1", 403),
        ("web", "GET", "/orders/1", 200),
        ("web", "POST", "/orders/1", 200),
        ("web", "DELETE", "/orders/1", 403),
        ("web", "POST", "/payments/1", 403),
        ("batch", "GET", "/catalog/1", 200),
        ("batch", "GET", "/orders/1", 403),
        ("batch", "POST", "/payments/1", 403),
        ("orders", "POST", "/payments/1", 200),
        ("orders", "GET", "/payments/1", 403),
        ("web", "GET", "/nowhere", 404),
        ("web", "GET", "/catalog/%2e%2e/orders/1", 200),
        ("batch", "GET", "/catalog/../orders/1", 403),
        ("batch", "GET", "/catalog/%2fx", 400),
        ("batch", "GET", "//catalog//1", 200),
    ],
)
def test_who_may_do_what(mesh: Mesh, caller: str, method: str, path: str, status: int) -> None:
    answer = mesh.curl(caller, method, path)
    assert answer.status == status, answer
    if status == 200:
        assert answer.json["gateway"] in {spiffe("ingress", "edge"), spiffe("eastwest", "edge")}
        assert f"URI={spiffe(caller)}" in answer.json["headers"]["x-forwarded-client-cert"]
    if status == 403:
        assert "no rule lets this caller do that here" in answer.body


def test_the_original_caller_is_decided_for_through_two_gateways(mesh: Mesh) -> None:
    answer = mesh.curl("orders", "POST", "/payments/7")
    assert answer.status == 200
    assert answer.json["service"] == "payments"
    assert answer.json["gateway"] == spiffe("eastwest", "edge")
    assert answer.json["headers"]["x-forwarded-client-cert"].count("URI=") == 1
    logged = mesh.logged("eastwest", "/payments/7")
    assert logged["caller"] == spiffe("orders")
    assert logged["via"] == spiffe("ingress", "edge")


@pytest.mark.parametrize("gateway", ["ingress", "eastwest"])
def test_a_forged_identity_gets_nobody_anywhere(mesh: Mesh, gateway: str) -> None:
    forged = f"x-forwarded-client-cert: By=x;Hash={'0' * 64};URI={spiffe('orders')}"
    assert mesh.curl("web", "POST", "/payments/1", "-H", forged, gateway=gateway).status == 403
    answer = mesh.curl("web", "GET", "/catalog/1", "-H", forged)
    assert answer.status == 200
    assert spiffe("orders") not in answer.json["headers"]["x-forwarded-client-cert"]


def test_nobody_without_a_certificate_gets_in(mesh: Mesh) -> None:
    assert mesh.curl(None, "GET", "/catalog/1").code != 0


def test_the_services_refuse_peers_that_are_not_gateways(mesh: Mesh) -> None:
    port = mesh.ports["orders"]
    answer = mesh.curl("web", "GET", "/", "--connect-to", f"::127.0.0.1:{port}", "--insecure")
    assert answer.code != 0
    assert answer.status == 0


def test_quota_lets_a_burst_through_and_then_says_when_to_come_back(mesh: Mesh) -> None:
    import subprocess

    folder = mesh.identity("shop-web")
    port = mesh.ports["ingress"]
    command = ["curl", "-s", "--cacert", str(folder / "ca.pem"), "--cert", str(folder / "cert.pem"), "--key", str(folder / "key.pem")]
    command += ["--resolve", f"shop.example:{port}:127.0.0.1", "-o", "/dev/null", "-w", "%{http_code} %header{retry-after}\\n"]
    done = subprocess.run([*command, f"https://shop.example:{port}/orders/[1-60]"], capture_output=True, text=True, check=True)
    counted = Counter(line.split(" ")[0] for line in done.stdout.splitlines())
    assert set(counted) == {"200", "429"}, counted
    assert 1 <= counted["200"] <= 40
    assert all(int(line.split(" ")[1]) >= 1 for line in done.stdout.splitlines() if line.startswith("429"))
    answer = mesh.curl("web", "GET", "/orders/1")
    assert "ratelimit-policy" in answer.headers


def test_only_payments_leaves_the_mesh(mesh: Mesh) -> None:
    answer = mesh.curl("payments", "POST", "/transfer", "-d", "x", gateway="egress")
    assert answer.status == 200
    assert answer.json["service"] == "bank"
    assert not [name for name in answer.json["headers"] if name.startswith("x-") or name == "traceparent"]
    assert mesh.curl("web", "GET", "/transfer", gateway="egress").status == 403


def test_what_happened_is_in_the_log_and_on_the_page(mesh: Mesh) -> None:
    mesh.curl("batch", "POST", "/payments/99")
    entry = mesh.logged("ingress", "/payments/99")
    assert entry["response_flags"] == "UAEX"
    assert entry["policy"][0]["verdict"] == "deny"
    labels = {"response_code": "403", "response_flags": "UAEX", "source_principal": spiffe("batch")}
    assert mesh.metric("ingress", "istio_requests_total", **labels) >= 1
    assert mesh.metric("ingress", "tollhouse_decisions_total", verdict="deny") >= 1


def test_repeated_questions_are_answered_from_what_is_kept(mesh: Mesh) -> None:
    for _ in range(3):
        assert mesh.curl("web", "GET", "/catalog/1").status == 200
    assert mesh.metric("ingress", "tollhouse_decisions_total", kept="true") >= 2


def test_an_authorization_policy_at_the_second_gateway_is_about_the_original_caller(mesh: Mesh) -> None:
    def deny(*accounts: str) -> None:
        principals = [f"shop.example/ns/{account}" for account in accounts]
        target = {"group": "gateway.networking.k8s.io", "kind": "Gateway", "name": "eastwest"}
        policy = {
            "apiVersion": "security.istio.io/v1",
            "kind": "AuthorizationPolicy",
            "metadata": {"namespace": "edge", "name": "hop"},
            "spec": {"targetRefs": [target], "action": "DENY", "rules": [{"from": [{"source": {"principals": principals}}]}]},
        }
        apply(mesh, policy)

    deny("shop/sa/orders")
    try:
        wait_for("the caller to be denied", lambda: mesh.curl("orders", "POST", "/payments/551").status == 403, seconds=60)
        assert mesh.logged("eastwest", "/payments/551")["via"] == spiffe("ingress", "edge")
        deny("edge/sa/ingress", "shop/sa/nobody")
        wait_for("the caller to pass", lambda: mesh.curl("orders", "POST", "/payments/1").status == 200, seconds=60)
        for _ in range(3):
            assert mesh.curl("orders", "POST", "/payments/2").status == 200, "it is not about the gateway before"
    finally:
        tollhouse("delete", "AuthorizationPolicy", "edge/hop", "--config", mesh.config)
