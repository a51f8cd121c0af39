"""Tokens at a gateway process: keys from an issuer that rotates them, dies, stalls and answers nonsense; policies that read claims."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc
import pytest
from e2e_world import tollhouse
from routes_world import Edge, gateway

from tests import servers
from tests.tokens import ISSUER, jwks, mint

pytestmark = pytest.mark.e2e

ROUTES = """
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {{namespace: shop, name: web}}
spec:
  parentRefs: [{{namespace: edge, name: gw}}]
  hostnames: [shop.example]
  rules: [{{backendRefs: [{{name: v1, port: 80}}]}}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: GRPCRoute
metadata: {{namespace: shop, name: calls}}
spec:
  parentRefs: [{{namespace: edge, name: gw}}]
  hostnames: [grpc.example]
  rules: [{{backendRefs: [{{name: g1, port: 80}}]}}]
---
apiVersion: security.istio.io/v1
kind: RequestAuthentication
metadata: {{namespace: edge, name: users}}
spec:
  targetRefs: [{{group: gateway.networking.k8s.io, kind: Gateway, name: gw}}]
  jwtRules:
  - issuer: {issuer}
    jwksUri: {uri}
    timeout: {timeout}
    outputPayloadToHeader: x-payload
    outputClaimToHeaders: [{{header: x-user, claim: sub}}]
"""
POLICY = """
apiVersion: tollhouse.dev/v1
kind: AccessPolicy
metadata: {namespace: shop, name: admins}
spec:
  targetRefs: [{group: gateway.networking.k8s.io, kind: HTTPRoute, name: web}]
  decision: shop.authz.decision
  place: Local
  timeout: 20s
"""
REGO = """
package shop.authz

claims := input.attributes.metadataContext.filterMetadata["envoy.filters.http.jwt_authn"].payload

default decision := {"allowed": false, "reason": "not an admin"}

# METADATA
# entrypoint: true
decision := {"allowed": true, "headers": {"x-role": "admin"}} if "admin" in claims.roles
"""


class Issuer:
    """An HTTP server with a key set, which does as `mood` says: `well`, `stalled`, `nonsense`, `away` (500)."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.keys = jwks("r1")
        self.mood = "well"
        self.asked = 0
        self.released = threading.Event()
        self._server: ThreadingHTTPServer | None = None

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}/jwks"

    def start(self) -> None:
        issuer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None: ...

            def do_GET(self) -> None:
                issuer.asked += 1
                if issuer.mood == "stalled":
                    issuer.released.wait(30)
                if self.path.endswith("/openid-configuration"):
                    body = json.dumps({"jwks_uri": issuer.uri}).encode()
                    self.send_response(200)
                    self.send_header("content-length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body)
                    return
                body = b"<html>sorry</html>" if issuer.mood == "nonsense" else issuer.keys.encode()
                with contextlib.suppress(OSError):
                    self.send_response(500 if issuer.mood == "away" else 200)
                    self.send_header("content-length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body)

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            allow_reuse_address = True

        self._server = Server(("127.0.0.1", self.port), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None


@contextlib.contextmanager
def world(mood: str = "well", timeout: str = "5s", *, there: bool = True) -> Iterator[tuple[Edge, Issuer]]:
    issuer = Issuer(servers.free_port())
    issuer.mood = mood
    if there:
        issuer.start()
    try:
        with gateway(ROUTES.format(issuer=ISSUER, uri=issuer.uri, timeout=timeout)) as edge:
            yield edge, issuer
    finally:
        issuer.released.set()
        issuer.stop()


def with_token(edge: Edge, token: str, *more: str) -> Any:
    return edge.curl("/orders/1", "-H", f"authorization: Bearer {token}", *more)


def keys_of(edge: Edge) -> dict[str, Any]:
    import urllib.request

    with urllib.request.urlopen(f"http://127.0.0.1:{edge.admin}/status", timeout=5) as page:
        (found,) = json.load(page)["tokenKeys"]
    return dict(found)


def test_requests_with_tokens_and_without() -> None:
    with world() as (edge, _):
        token = mint("r1", roles=["admin"])
        answer = edge.curl("/orders/1", "-H", "x-user: mallory", "-H", "x-payload: e30")
        assert answer.status == 200
        assert not {"x-user", "x-payload"} & answer.json["headers"].keys()
        for version in ("--http1.1", "--http2-prior-knowledge"):
            answer = with_token(edge, token, "-H", "x-user: mallory", version)
            assert answer.status == 200
            seen = answer.json["headers"]
            assert (seen["x-user"], seen["x-payload"]) == ("alice", token.split(".")[1])
            assert "authorization" not in seen
        answer = edge.curl(f"/orders/1?a=1&access_token={token}&b=2")
        assert (answer.status, answer.json["path"]) == (200, "/orders/1?a=1&b=2")
        answer = with_token(edge, mint("r2", {"kid": "r1"}))
        assert (answer.status, answer.body) == (401, "Jwt verification fails\n")
        realm = f'Bearer realm="http://shop.example:{edge.port}/orders/1", error="invalid_token"'
        assert answer.headers["www-authenticate"] == realm
        with edge.channel("grpc.example") as channel:
            call = channel.unary_unary("/shop.v1.Orders/Echo")
            assert call(b"x", metadata=(("authorization", f"Bearer {token}"),), timeout=20) == b"g1 x"
            with pytest.raises(grpc.RpcError) as caught:
                call(b"x", metadata=(("authorization", "Bearer a.b.c"),), timeout=20)
            assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
            assert "Jwt header is an invalid" in caught.value.details()
        metrics = edge.metrics()
        assert f'tollhouse_jwt_tokens_total{{issuer="{ISSUER}",result="allowed"}} 1' in metrics
        assert f'tollhouse_jwt_tokens_total{{issuer="{ISSUER}",result="kept"}} 3' in metrics
        assert 'result="signature"} 1' in metrics
        assert "tollhouse_jwks_keys{" in metrics
        assert "tollhouse_jwks_fetched_timestamp_seconds{" in metrics
        servers.wait_for("the access log", lambda: edge.log.read_text().count("\n") >= 7)
        lines = [json.loads(line) for line in edge.log.read_text().splitlines()]
        assert [line["request_principal"] for line in lines[:2]] == [None, f"{ISSUER}/alice"]
        refused = next(line for line in lines if line["response_code"] == 401)
        assert (refused["response_flags"], refused["reason"]) == ("UAEX", "Jwt verification fails")
        assert refused["response_code_details"] == "jwt_authn_access_denied"
        shown = edge.log.read_text() + metrics
        assert token not in shown
        assert token.rpartition(".")[2] not in shown


def test_an_issuer_changes_its_keys() -> None:
    with world() as (edge, issuer):
        assert with_token(edge, mint("r1")).status == 200
        issuer.keys = jwks("r2")
        began = issuer.asked
        # Known keys are good until a token with a new one comes, which has them fetched; but not more often than every ten seconds.
        servers.wait_for("the new key", lambda: with_token(edge, mint("r2")).status == 200, 30)
        assert issuer.asked == began + 1
        assert with_token(edge, mint("r1")).body == "Jwks doesn't have key to match kid or alg from Jwt\n"
        for _ in range(20):
            assert with_token(edge, mint("r3")).status == 401
        assert issuer.asked <= began + 2


DISCOVERED = """
apiVersion: security.istio.io/v1
kind: RequestAuthentication
metadata: {{namespace: edge, name: users}}
spec:
  selector: {{matchLabels: {{gateway.networking.k8s.io/gateway-name: gw}}}}
  jwtRules: [{{issuer: "{issuer}"}}]
"""


def test_an_issuer_is_asked_where_its_keys_are() -> None:
    issuer = Issuer(servers.free_port())
    issuer.start()
    try:
        own = issuer.uri.removesuffix("/jwks")
        routes = ROUTES.partition("\n---\napiVersion: security")[0].replace("{{", "{").replace("}}", "}")
        with gateway(f"{routes}\n---\n{DISCOVERED.format(issuer=own)}") as edge:
            assert with_token(edge, mint("r1", iss=own)).status == 200
            assert with_token(edge, mint("r1")).body == "Jwt issuer is not configured\n"
            assert keys_of(edge)["source"] == f"{own} (discovery)"
            # Without the policy nobody looks at tokens any more.
            (edge.config / "routes.yaml").write_text(routes)
            servers.wait_for("the change", lambda: with_token(edge, "nonsense").status == 200, 60)
            assert with_token(edge, "nonsense").json["headers"]["authorization"] == "Bearer nonsense"
    finally:
        issuer.stop()


def test_an_issuer_that_is_away_at_first() -> None:
    with world(there=False) as (edge, issuer):
        assert edge.curl("/").status == 200
        answer = with_token(edge, mint("r1"))
        assert (answer.status, answer.body) == (401, "Jwks remote fetch is failed\n")
        assert keys_of(edge)["error"] != ""
        issuer.start()
        servers.wait_for("the keys", lambda: with_token(edge, mint("r1")).status == 200, 60)
        assert keys_of(edge)["error"] == ""


def unknown_refused(edge: Edge, error: str) -> bool:
    """Whether a token with an unknown key is refused, and the last fetch went wrong so."""
    assert with_token(edge, mint("r2")).status == 401
    return error in keys_of(edge)["error"]


def test_an_issuer_that_goes_away_and_one_that_answers_nonsense() -> None:
    with world() as (edge, issuer):
        assert with_token(edge, mint("r1")).status == 200
        for mood, said in (("nonsense", "the key set can't be read"), ("away", "answers with 500")):
            issuer.mood = mood
            # Only a token with an unknown key has them fetched before the twenty minutes are over.
            servers.wait_for("a fetch", partial(unknown_refused, edge, said), 90)
            assert with_token(edge, mint("r1", n=mood)).status == 200
        assert keys_of(edge)["ids"] == ["r1"]
        shown = tollhouse("status", "--admin", f"127.0.0.1:{edge.admin}", check=False)
        assert shown.returncode == 1
        assert f"keys: {issuer.uri}: {issuer.uri} answers with 500" in shown.stdout
        issuer.stop()
        assert with_token(edge, mint("r1", n="gone")).status == 200


def test_requests_wait_for_keys_and_not_for_ever(tmp_path: Path) -> None:
    with world("stalled") as (edge, issuer):
        answers: list[Any] = []
        data = tmp_path / "data"
        data.write_text("x" * 200_000)

        def ask() -> None:
            answers.append(with_token(edge, mint("r1"), "--data-binary", f"@{data}"))

        waiting = [threading.Thread(target=ask) for _ in range(5)]
        for thread in waiting:
            thread.start()
        servers.wait_for("requests that wait", lambda: keys_of(edge)["waiting"] == 5)
        assert edge.curl("/").status == 200
        assert issuer.asked == 1
        issuer.released.set()
        for thread in waiting:
            thread.join(20)
        assert [answer.status for answer in answers] == [200] * 5
        assert [len(answer.json["body"]) for answer in answers] == [200_000] * 5
    with world("stalled", "300ms") as (edge, _):
        began = time.monotonic()
        answer = with_token(edge, mint("r1"))
        assert (answer.status, answer.body) == (401, "Jwks remote fetch is failed\n")
        assert time.monotonic() - began < 15


def test_a_client_that_does_not_wait() -> None:
    with world("stalled") as (edge, issuer):
        given_up = with_token(edge, mint("r1"), "--max-time", "0.5")
        assert given_up.code == 28
        servers.wait_for("nobody to wait", lambda: keys_of(edge)["waiting"] == 0)
        issuer.released.set()
        servers.wait_for("the keys", lambda: with_token(edge, mint("r1")).status == 200)


def test_policies_read_claims() -> None:
    with world() as (edge, _):
        (edge.config / "policy").mkdir()
        (edge.config / "policy" / "authz.rego").write_text(REGO)
        (edge.config / "policy.yaml").write_text(POLICY)
        servers.wait_for("the policy", lambda: edge.curl("/").status == 403, 90)
        admin, user = mint("r1", roles=["admin"]), mint("r1", sub="bob", roles=["user"])
        for _ in range(3):
            answer = with_token(edge, admin)
            assert (answer.status, answer.json["headers"].get("x-role")) == (200, "admin")
            assert with_token(edge, user).status == 403
            assert with_token(edge, mint("r1", roles="admin")).status == 403
            assert with_token(edge, mint("r2", {"kid": "r1"}, roles=["admin"])).status == 401
            assert edge.curl("/").status == 403
        assert with_token(edge, mint("r1", sub="carol", n=1, roles=["admin"])).status == 200
        hits = [line for line in edge.metrics().splitlines() if line.startswith('tollhouse_decision_cache_total{result="hit"}')]
        assert float(hits[0].split()[-1]) >= 9


AUTHORIZATION = """
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{namespace: edge, name: users}}
spec:
  action: ALLOW
  rules:
  - from: [{{source: {{requestPrincipals: ["{issuer}/*"]}}}}]
    to: [{{operation: {{paths: [/orders/*]}}}}]
    when: [{{key: "request.auth.claims[scope]", values: [orders.read]}}]
  - to: [{{operation: {{paths: [/public]}}}}]
"""


def test_an_authorization_policy_asks_for_a_token() -> None:
    with world() as (edge, _):
        (edge.config / "authorization.yaml").write_text(AUTHORIZATION.format(issuer=ISSUER))
        servers.wait_for("the policy", lambda: edge.curl("/orders/1").status == 403, 90)
        servers.wait_for("its engine", lambda: edge.curl("/public").status == 200, 90)
        for _ in range(2):
            assert with_token(edge, mint("r1", scope="profile orders.read")).status == 200
            assert with_token(edge, mint("r1", scope="orders.readall")).status == 403
            assert with_token(edge, mint("r1", scope="orders.read", sub=None)).status == 403
            assert with_token(edge, mint("r1")).status == 403
            assert with_token(edge, mint("r2", {"kid": "r1"}, scope="orders.read")).status == 401
            assert edge.curl("/orders/1").status == 403
            assert edge.curl("/public", "-H", "authorization: Bearer nonsense").status == 401


def test_explain_tells_what_would_become_of_a_token() -> None:
    with world() as (edge, _):
        token = mint("r1", roles=["admin"])
        url = f"http://shop.example:{edge.port}/orders/1"
        explain = [sys.executable, "-m", "tollhouse", "explain", "--gateway", "edge/gw", "--config", str(edge.config)]

        def told(*more: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run([*explain, *more], capture_output=True, text=True, timeout=60, check=False)

        good = told("-H", f"authorization: Bearer {token}", "-H", f"x-copy: {token}", "--output", "json", "GET", url)
        assert good.returncode == 0, good.stderr
        steps = {step["name"]: step for step in json.loads(good.stdout)["steps"]}
        assert steps["token"]["details"]["principal"] == f"{ISSUER}/alice"
        assert ["x-user", "alice"] in steps["upstream"]["details"]["headers"]
        assert ["x-copy", "(token)"] in steps["upstream"]["details"]["headers"]
        assert token not in good.stdout
        bad = told("-H", f"authorization: Bearer {mint('r2', {'kid': 'r1'})}", "GET", url)
        assert bad.returncode == 1
        assert "401 UAEX: Jwt verification fails" in bad.stdout
        in_query = told("GET", f"{url}?access_token={token}&a=1")
        assert in_query.returncode == 0
        assert token not in in_query.stdout
        assert token.rpartition(".")[2] not in in_query.stdout + in_query.stderr
