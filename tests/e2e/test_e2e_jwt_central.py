"""Claims of a verified token in a policy that the decision point decides: over the wire, and the same answers as in the gateway."""

from __future__ import annotations

from routes_world import gateway

from tests import servers
from tests.tokens import ISSUER, jwks, mint

ROUTE = """
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {{namespace: shop, name: {name}}}
spec:
  parentRefs: [{{namespace: edge, name: gw}}]
  hostnames: [shop.example]
  rules: [{{matches: [{{path: {{type: PathPrefix, value: /{name}}}}}], backendRefs: [{{name: v1, port: 80}}]}}]
---
apiVersion: tollhouse.dev/v1
kind: AccessPolicy
metadata: {{namespace: shop, name: {name}}}
spec:
  targetRefs: [{{group: gateway.networking.k8s.io, kind: HTTPRoute, name: {name}}}]
  decision: shop.authz.decision
  place: {place}
  timeout: 5s
"""
USERS = """
apiVersion: security.istio.io/v1
kind: RequestAuthentication
metadata: {{namespace: edge, name: users}}
spec:
  targetRefs: [{{group: gateway.networking.k8s.io, kind: Gateway, name: gw}}]
  jwtRules: [{{issuer: "{issuer}", jwks: '{keys}'}}]
"""
REGO = """
package shop.authz

claims := input.attributes.metadataContext.filterMetadata["envoy.filters.http.jwt_authn"].payload

default decision := {"allowed": false}

# METADATA
# entrypoint: true
decision := {"allowed": true, "headers": {"x-role": "admin"}} if "admin" in claims.roles
"""


def test_central_and_local_policies_read_the_same_claims() -> None:
    port = servers.free_port()
    routes = USERS.format(issuer=ISSUER, keys=jwks("r1"))
    routes += "".join(ROUTE.format(name=place.lower(), place=place) for place in ("Central", "Local"))
    with gateway(routes, "--pdp", f"127.0.0.1:{port}", rego=REGO) as edge:
        words = ["pdp", "--config", str(edge.config), "--listen", f"127.0.0.1:{port}"]
        pdp = servers.tollhouse(*words, ready=lambda: servers.answers(port), name="pdp-claims")
        try:
            pdp.start()
            admin = f"authorization: Bearer {mint('r1', roles=['admin'])}"
            for path in ("/central", "/local"):
                servers.wait_for(f"the policy of {path}", lambda path=path: edge.curl(path, "-H", admin).status == 200, 60)
                assert edge.curl(path, "-H", admin).json["headers"].get("x-role") == "admin", path
                user = mint("r1", sub="bob", roles=["user"])
                assert edge.curl(path, "-H", f"authorization: Bearer {user}").status == 403, path
                forged = mint("r2", {"kid": "r1"}, roles=["admin"])
                assert edge.curl(path, "-H", f"authorization: Bearer {forged}").status == 401, path
                assert edge.curl(path).status == 403, path
            pdp.stop()
            other = f"authorization: Bearer {mint('r1', sub='carol', roles=['admin', 'other'])}"
            assert edge.curl("/central", "-H", other).status == 503, "what is not kept can't be decided without the decision point"
            assert edge.curl("/local", "-H", other).status == 200
        finally:
            pdp.close()
