"""Limits that a rate-limit service has: envoyproxy/ratelimit, and `tollhouse quota`, asked by a real gateway."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from routes_world import Edge, gateway

from bench.peer_ratelimit import ratelimit
from tests import servers

LIMITS = """
domain: shop
descriptors:
- {key: user, rate_limit: {unit: day, requests_per_unit: 3}}
- {key: heavy, rate_limit: {unit: day, requests_per_unit: 5}}
"""
MANIFESTS = """
apiVersion: tollhouse.dev/v1
kind: Mesh
metadata: {{name: shop}}
spec:
  trustDomain: shop.example
  extensionProviders:
  - {{name: limits, envoyRateLimitGrpc: {{service: shop/limits, port: 80, domain: shop}}}}
---
apiVersion: v1
kind: Service
metadata: {{namespace: shop, name: limits}}
spec: {{ports: [{{port: 80, appProtocol: kubernetes.io/h2c}}]}}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{namespace: shop, name: limits, labels: {{kubernetes.io/service-name: limits}}}}
addressType: IPv4
ports: [{{port: {port}}}]
endpoints: [{{addresses: [127.0.0.1]}}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {{namespace: shop, name: all}}
spec:
  parentRefs: [{{namespace: edge, name: gw}}]
  rules:
  - {{name: user, matches: [{{path: {{value: /user}}}}], backendRefs: [{{name: v1, port: 80}}]}}
  - {{name: heavy, matches: [{{path: {{value: /heavy}}}}], backendRefs: [{{name: v1, port: 80}}]}}
  - {{name: sent, matches: [{{path: {{value: /sent}}}}], backendRefs: [{{name: v1, port: 80}}]}}
  - {{name: open, matches: [{{path: {{value: /open}}}}], backendRefs: [{{name: v1, port: 80}}]}}
  - {{name: unknown, matches: [{{path: {{value: /unknown}}}}], backendRefs: [{{name: v1, port: 80}}]}}
"""
POLICY = """---
apiVersion: tollhouse.dev/v1
kind: QuotaPolicy
metadata: {{namespace: shop, name: {name}}}
spec:
  targetRefs: [{{group: gateway.networking.k8s.io, kind: HTTPRoute, name: all, sectionName: {name}}}]
  extensionProvider: limits
  failureMode: {mode}
  timeout: 5s
  limits: [{{{limit}}}]
"""
POLICIES = [
    ("user", "Deny", "name: per-user, per: [{header: x-user}], keys: [user]"),
    ("heavy", "Deny", "name: all, per: [{constant: all}], keys: [heavy], costFrom: {header: x-cost, most: 9}"),
    ("sent", "Deny", "name: two, per: [{header: x-user}], tokens: 2, interval: 24h"),
    ("open", "Allow", "name: per-user, per: [{header: x-user}], keys: [user]"),
    ("unknown", "Deny", "name: lost, per: [{header: x-user}], keys: [nobody-knows]"),
]


@pytest.fixture(scope="module", params=["ratelimit", "tollhouse"])
def edge(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Edge, servers.Server]]:
    """A gateway, and the service that it asks."""
    folder: Path = tmp_path_factory.mktemp("limits")
    with servers.redis() as redis:
        if request.param == "ratelimit":
            server = ratelimit(folder, redis.port, {"shop.yaml": LIMITS})
        else:
            (folder / "shop.yaml").write_text(LIMITS)
            port = servers.free_port()
            own = servers.tollhouse(
                "quota", "--descriptors", str(folder), "--listen", f"127.0.0.1:{port}", "--redis", redis.url + "?start=full", ready=bool
            )
            server = servers.Server("quota", port, own.command, f"127.0.0.1:{port}")
        policies = "".join(POLICY.format(name=name, mode=mode, limit=limit) for name, mode, limit in POLICIES)
        with servers.running(server), gateway(MANIFESTS.format(port=server.port) + policies) as running:
            yield running, server


def user(name: str) -> tuple[str, str]:
    return "-H", f"x-user: {name}"


def test_the_service_says_who_may_pass(edge: tuple[Edge, servers.Server]) -> None:
    running, _ = edge
    answers = [running.curl("/user", *user("ann")) for _ in range(4)]
    assert [answer.status for answer in answers] == [200, 200, 200, 429]
    assert int(answers[3].headers["retry-after"]) > 60
    assert running.curl("/user", *user("bob")).status == 200
    assert [running.curl("/heavy", "-H", f"x-cost: {cost}").status for cost in (4, 2)] == [200, 429]
    assert [running.curl("/sent", *user("ann")).status for _ in range(3)] == [200, 200, 429]
    assert 'tollhouse_quota_service_answers_total{limit="shop/user/per-user",result="refused"} 1' in running.metrics()

    def named() -> bool:
        lines = [line.replace('": "', '":"') for line in running.log.read_text().splitlines()]
        return any('"/user"' in line and '"refused_by_limit":"shop/user/per-user"' in line for line in lines)

    servers.wait_for("the refusal in the log, with its limit", named)


def test_a_limit_that_the_service_does_not_know_is_counted(edge: tuple[Edge, servers.Server]) -> None:
    running, _ = edge
    assert running.curl("/unknown", *user("ann")).status == 200
    assert 'tollhouse_quota_service_answers_total{limit="shop/unknown/lost",result="unlimited"} 1' in running.metrics()


def test_without_the_service_the_failure_mode_is_the_answer(edge: tuple[Edge, servers.Server]) -> None:
    running, server = edge
    server.kill()
    try:
        refused = running.curl("/user", *user("eve"))
        assert refused.status == 503
        assert running.curl("/open", *user("eve")).status == 200
        servers.wait_for("the refusal in the log", lambda: '"RLSE"' in running.log.read_text())
    finally:
        server.start()
    servers.wait_for("the service is asked again", lambda: running.curl("/user", *user("eve")).status == 200)
