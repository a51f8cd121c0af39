"""AuthorizationPolicies about verified tokens and about clients behind proxies, at a gateway process that reads a directory."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from routes_world import Edge, gateway

from tests import servers
from tests.tokens import ISSUER, jwks, mint

pytestmark = pytest.mark.e2e

CONFIG = f"""
apiVersion: tollhouse.dev/v1
kind: Mesh
metadata: {{name: m}}
spec: {{trustDomain: shop.example, trustedProxies: [127.0.0.0/8], rootNamespace: root}}
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {{namespace: shop, name: web}}
spec:
  parentRefs: [{{namespace: edge, name: gw}}]
  hostnames: [shop.example]
  rules: [{{backendRefs: [{{name: v1, port: 80}}]}}]
---
apiVersion: security.istio.io/v1
kind: RequestAuthentication
metadata: {{namespace: edge, name: users}}
spec:
  selector: {{matchLabels: {{gateway.networking.k8s.io/gateway-name: gw}}}}
  jwtRules: [{{issuer: {ISSUER}, jwks: '{jwks("r1")}'}}]
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{namespace: root, name: banned}}
spec:
  action: DENY
  rules: [{{from: [{{source: {{remoteIpBlocks: [203.0.113.0/24]}}}}]}}]
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{namespace: edge, name: who}}
spec:
  targetRefs: [{{group: gateway.networking.k8s.io, kind: Gateway, name: gw}}]
  rules:
  - to: [{{operation: {{paths: [/public]}}}}]
  - to: [{{operation: {{paths: ["/users/{{*}}"]}}}}]
    from: [{{source: {{requestPrincipals: ["*"]}}}}]
  - to: [{{operation: {{paths: [/alice]}}}}]
    when: [{{key: request.auth.principal, values: ["{ISSUER}/alice"]}}]
  - to: [{{operation: {{paths: [/admin]}}}}]
    when: [{{key: "request.auth.claims[realm][roles]", values: [admin], notValues: [guest]}}]
  - to: [{{operation: {{paths: [/scope]}}}}]
    when: [{{key: "request.auth.claims[scope]", values: ["orders:read"]}}]
  - to: [{{operation: {{paths: [/aud]}}}}]
    when: [{{key: request.auth.audiences, values: [shop]}}, {{key: request.auth.presenter, values: [client]}}]
"""


@pytest.fixture(scope="module")
def edge() -> Iterator[Edge]:
    with gateway(CONFIG) as running:
        yield running


@pytest.mark.parametrize(
    ("path", "claims", "status"),
    [
        ("/public", None, 200),
        ("/other", None, 403),
        ("/users/1", None, 403),
        ("/users/1", {}, 200),
        ("/users/1/keys", {}, 403),
        ("/alice", {}, 200),
        ("/alice", {"sub": "bob"}, 403),
        ("/admin", {"realm": {"roles": ["admin"]}}, 200),
        ("/admin", {"realm": {"roles": ["admin", "guest"]}}, 403),
        ("/admin", {"realm": {"roles": "admin"}}, 200),
        ("/admin", {"roles": ["admin"]}, 403),
        ("/scope", {"scope": "openid orders:read"}, 200),
        ("/scope", {"scope": "openid"}, 403),
        ("/aud", {"aud": ["x", "shop"], "azp": "client"}, 200),
        ("/aud", {"aud": "shop", "azp": "other"}, 403),
    ],
)
def test_what_a_token_lets_pass(edge: Edge, path: str, claims: dict[str, object] | None, status: int) -> None:
    more = () if claims is None else ("-H", f"authorization: Bearer {mint('r1', **claims)}")
    assert edge.curl(path, *more).status == status
    assert edge.curl(path, *more).status == status, "what is kept says the same"


def test_a_token_that_is_not_valid_is_401_and_one_that_is_for_somebody_else_403(edge: Edge) -> None:
    assert edge.curl("/public", "-H", "authorization: Bearer a.b.c").status == 401
    assert edge.curl("/users/1", "-H", f"authorization: Bearer {mint('r2')}").status == 401


def test_tokens_of_one_user_share_what_is_kept(edge: Edge) -> None:
    def hits() -> float:
        lines = [line for line in edge.metrics().splitlines() if line.startswith('tollhouse_decision_cache_total{result="hit"}')]
        return float(lines[0].split()[-1]) if lines else 0.0

    assert edge.curl("/users/9", "-H", f"authorization: Bearer {mint('r1', jti='1')}").status == 200
    before = hits()
    assert edge.curl("/users/9", "-H", f"authorization: Bearer {mint('r1', jti='2')}").status == 200
    assert hits() > before, "what no policy reads is in no key"


def test_the_clients_address_is_what_trusted_proxies_say(edge: Edge) -> None:
    assert edge.curl("/public", "-H", "x-forwarded-for: 203.0.113.7").status == 403
    assert edge.curl("/public", "-H", "x-forwarded-for: 203.0.113.7, 198.51.100.1").status == 200, "of which this one is the client"
    assert edge.curl("/public", "-H", "x-forwarded-for: 198.51.100.1").status == 200

    def denied() -> bool:
        lines = [json.loads(line) for line in edge.log.read_text().splitlines() if line.endswith("}")]
        return any(line.get("response_code") == 403 and "root/banned" in (line["reason"] or "") for line in lines)

    servers.wait_for("the denial in the access log", denied)
