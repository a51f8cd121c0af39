"""Where limits hold: what a request is charged for when policies are attached at several places of its way."""

from __future__ import annotations

from gateway.choice import Choice
from mesh.model import Backend, Cluster, QuotaLimit, Rule, Snapshot


def a_limit(name: str, level: str) -> QuotaLimit:
    return QuotaLimit(name=name, level=level, per=(), tokens=1)  # type: ignore[arg-type]


def charged(*limits: QuotaLimit, service: tuple[QuotaLimit, ...] = (), gateway: bool = False) -> list[tuple[str, str]]:
    cluster = Cluster(name="shop/web:80", namespace="shop", service="web", port=80, gateway=gateway)
    backend = Backend(weight=1, cluster=cluster.name, limits=service)
    rule = Rule(name="shop/r#0", route="HTTPRoute shop/r", namespace="shop", backends=(backend,), limits=limits)
    choice = Choice(rule, backend, Snapshot(version="1", clusters={cluster.name: cluster}))
    return [(bucket.limit.level, bucket.limit.name) for bucket in choice.buckets]


def test_a_limit_is_charged_once_wherever_its_policy_is_attached() -> None:
    found = charged(
        a_limit("edge/a/l", "gateway"), a_limit("edge/a/l", "route"), a_limit("shop/b/l", "rule"), service=(a_limit("edge/a/l", "service"),)
    )
    assert found == [("gateway", "edge/a/l"), ("rule", "shop/b/l")]


def test_the_default_of_the_mesh_is_charged_by_the_last_gateway_alone() -> None:
    limits = a_limit("edge/all/l", "mesh"), a_limit("edge/gw/l", "gateway")
    assert charged(*limits, gateway=True) == [("gateway", "edge/gw/l")]
    assert charged(*limits) == [("mesh", "edge/all/l"), ("gateway", "edge/gw/l")]
