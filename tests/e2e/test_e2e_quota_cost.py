"""Costs that are known after the answer, through two gateway processes over one Redis, as clients see them."""

from __future__ import annotations

import pytest
from routes_world import gateway

from tests import servers

pytestmark = pytest.mark.e2e

ROUTES = """
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {namespace: shop, name: web}
spec:
  parentRefs: [{namespace: edge, name: gw}]
  hostnames: [shop.example]
  rules:
  - name: said
    matches: [{path: {value: /said}}]
    filters: [{type: ResponseHeaderModifier, responseHeaderModifier: {remove: [x-seen-by]}}]
    backendRefs: [{name: v1, port: 80}]
  - name: bytes
    matches: [{path: {value: /bytes}}]
    backendRefs: [{name: v1, port: 80}]
  - name: nonsense
    matches: [{path: {value: /nonsense}}]
    filters: [{type: ResponseHeaderModifier, responseHeaderModifier: {remove: [x-seen-by]}}]
    backendRefs: [{name: v1, port: 80}]
---
apiVersion: tollhouse.dev/v1
kind: QuotaPolicy
metadata: {namespace: shop, name: said}
spec:
  targetRefs: [{group: gateway.networking.k8s.io, kind: HTTPRoute, name: web, sectionName: said}]
  timeout: 2s
  limits: [{name: length, tokens: 1, interval: 1h, burst: 50, maxDebt: 5000, costFrom: {responseHeader: content-length, most: 4000}}]
---
apiVersion: tollhouse.dev/v1
kind: QuotaPolicy
metadata: {namespace: shop, name: bytes}
spec:
  targetRefs: [{group: gateway.networking.k8s.io, kind: HTTPRoute, name: web, sectionName: bytes}]
  timeout: 2s
  limits: [{name: sent, tokens: 1, interval: 1h, burst: 50, maxDebt: 30, costFrom: {bytes: Both, perToken: 4}}]
---
apiVersion: tollhouse.dev/v1
kind: QuotaPolicy
metadata: {namespace: shop, name: nonsense}
spec:
  targetRefs: [{group: gateway.networking.k8s.io, kind: HTTPRoute, name: web, sectionName: nonsense}]
  timeout: 2s
  limits: [{name: who, tokens: 1, interval: 1h, burst: 50, costFrom: {responseHeader: x-seen-by, most: 200}}]
"""


@pytest.mark.parametrize("name", ["said", "bytes", "nonsense"])
def test_the_first_answer_costs_more_than_there_is_and_the_next_request_pays_at_another_gateway(name: str) -> None:
    with servers.redis() as redis, gateway(ROUTES, "--redis", f"{redis.url}?start=full") as one:
        first = one.curl(f"/{name}")
        assert first.status == 200
        assert len(first.body) > 50
        with gateway(ROUTES, "--redis", f"{redis.url}?start=full") as other:
            for edge in (one, other):
                refused = edge.curl(f"/{name}")
                assert refused.status == 429, refused
                owed = {"said": len(first.body) - 50, "bytes": 29, "nonsense": 149}[name]  # at a token an hour
                assert 3600 * owed <= int(refused.headers["retry-after"]) <= 3600 * (owed + 2)
