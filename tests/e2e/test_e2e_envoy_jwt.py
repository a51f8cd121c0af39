"""Generated rules, tokens and requests: the gateway answers as Envoy's jwt_authn filter does, configured as Istio configures it.

Left out is what differs on purpose (docs/jwt.md): two tokens that differ, several locations of one token, white space and padding after a
token, `bearer` in other cases, headers that the token names as critical, `exp: 0`; cookies, which Envoy leaves in; spoofed headers of
several rules and preflights, which Envoy lets through; fractions and negative numbers as headers.
"""

from __future__ import annotations

import http.client
import json
import random
from typing import Any

import pytest
import yaml
from envoy_jwt import Body, bootstrap
from routes_world import gateway

from tests import servers
from tests.tokens import ISSUER, b64, claims_of, forged, jwk, jwks, mint

ROUTE = {
    "apiVersion": "gateway.networking.k8s.io/v1",
    "kind": "HTTPRoute",
    "metadata": {"namespace": "shop", "name": "all"},
    "spec": {"parentRefs": [{"name": "gw", "namespace": "edge"}], "rules": [{"backendRefs": [{"name": "v1", "port": 80}]}]},
}
ISSUERS = {ISSUER: ("r1", "e1", "d1"), "https://second.example": ("r2", "f1"), "third": ("h1", "r3")}
HEADERS = [None, [{"name": "x-jwt"}], [{"name": "authorization", "prefix": "Bearer "}, {"name": "x-pre", "prefix": "jwt "}]]
PARAMS = [None, ["token"], ["access_token", "token"]]
CLAIMS = ["sub", "a.b", "n", "yes", "roles", "a", "missing", "null", "empty", "sub.x"]
ROUNDS = 4
REQUESTS = 700


def a_rule(rng: random.Random, issuer: str) -> Body:
    headers, params = rng.choice(HEADERS), rng.choice(PARAMS)
    keys = [jwk(name, **rng.choice([{}, {}, {"kid": None}, {"alg": None}])) for name in ISSUERS[issuer]]
    names = rng.sample(CLAIMS, rng.randint(0, 5))
    found = {
        "issuer": issuer,
        "jwks": jwks(*keys),
        "audiences": rng.choice([None, None, ["me"], ["https://me.example", "other"]]),
        "fromHeaders": headers,
        "fromParams": params,
        "forwardOriginalToken": rng.random() < 0.4,
        "outputPayloadToHeader": rng.choice([None, "x-payload"]),
        "outputClaimToHeaders": [{"header": f"x-claim-{index}", "claim": name} for index, name in enumerate(names)],
    }
    return {name: value for name, value in found.items() if value is not None}


def a_token(rng: random.Random) -> tuple[str, bool]:
    """A token, and whether it is damaged: what of it is found wrong first is nobody's promise."""
    issuer = rng.choice(list(ISSUERS))
    name = rng.choice(ISSUERS[issuer])
    claims: Body = {"iss": issuer, "a": {"b": rng.choice(["c", 7, True, ["x"]])}, "n": rng.choice([0, 7, 2**53, 10**15]), "yes": False}
    claims |= {"roles": rng.choice([["a", "b"], [1, 2], [], [{"x": "y"}], "a b"]), "null": None, "empty": ""}
    claims |= rng.choice(
        [
            {},
            {},
            {"aud": rng.choice(["me", ["x", "me"], "me.example", "http://me.example/", "Me", []])},
            {"aud": "me"},
            {"aud": "other", "sub": None},
            {"exp": rng.choice([1, None, 2**63, -1, "soon", 2**65])},
            {"nbf": rng.choice([1, 2**40, "x", -1])},
            {"iss": rng.choice([None, "nobody", 7, ISSUER + "/"])},
            {"sub": rng.choice([None, 7, "é", "x" * 2000])},
            {"iat": rng.choice([2**40, "x", 1.5])},
        ]
    )
    header: Body = rng.choice([{}, {}, {}, {"kid": None}, {"kid": "unknown"}, {"kid": 7}, {"typ": "JWT", "x": 1}, {"kid": "r1"}])
    kind = rng.random()
    if kind < 0.05:
        token = forged({"alg": rng.choice(["none", "HS256", "RS256", "ES256", "", 7, "XX"]), "kid": name}, b"x" * 32, **claims)
        return token, False
    if kind < 0.08:
        token = rng.choice(["x", "a.b", "a.b.c", "....", b64("{}") + "." + b64("{}") + ".AAAA", b64({"alg": "RS256"}) + ".e30.AAAA"])
        return token, False
    if kind < 0.11:
        return mint(name, header, rng.choice(["[]", "{", '{"iss": "a", "iss": "b"}', '{"iss": NaN}'])), False
    token = mint(name, header, **claims)
    if kind < 0.16:
        at = rng.randrange(len(token) - 8)
        return token[:at] + ("A" if token[at] != "A" else "B") + token[at + 1 :], True
    if kind > 0.95:
        token = mint(rng.choice(["r4", "e4"]), {"kid": name}, json.dumps(claims_of(**claims)))
    return token, False


def a_request(rng: random.Random, rules: list[Body], token: str) -> tuple[str, list[tuple[str, str]]]:
    """A target and headers, with the token in one place."""
    headers: list[tuple[str, str]] = []
    target = rng.choice(["/", "/a?b=1", "/a/b?x=1&y=2"])
    glue = "&" if "?" in target else "?"
    where = rng.randrange(8)
    if where < 3:
        headers.append(("authorization", "Bearer " + token))
    elif where == 3:
        headers.append(("x-jwt", token))
    elif where == 4:
        headers.append(("x-pre", "jwt " + token))
    elif where == 5:
        target += f"{glue}token={token}"
    elif where == 6:
        target += f"{glue}access_token={token}&z=1"
    if where > 6 or (where > 3 and rng.random() < 0.3):
        headers.append(("authorization", "Basic eDp5"))
    if len(rules) == 1 and rng.random() < 0.4:
        headers += [("x-payload", "forged"), ("x-claim-0", "forged"), ("x-claim-4", "forged")]
    return target, headers


class Asker:
    """Sends requests to one port over a kept connection."""

    def __init__(self, port: int) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)

    def ask(self, target: str, headers: list[tuple[str, str]]) -> Body:
        """What came of a request."""
        self.connection.putrequest("GET", target, skip_accept_encoding=True)
        for name, value in headers:
            self.connection.putheader(name, value)
        self.connection.endheaders()
        answer = self.connection.getresponse()
        body = answer.read()
        found: Body = {"status": answer.status}
        if answer.status == 200:
            seen = json.loads(body)
            names = ["authorization", "x-jwt", "x-pre", "x-payload", *(f"x-claim-{number}" for number in range(5))]
            return found | {"path": seen["path"]} | {name: seen["headers"].get(name) for name in names}
        challenge = answer.headers.get("www-authenticate", "")
        return found | {"challenge": (challenge[:14], challenge.partition("error=")[2])}


@pytest.mark.e2e
@pytest.mark.parametrize("seed", range(ROUNDS))
def test_tokens_fare_as_with_envoy(seed: int) -> None:
    rng = random.Random(seed)
    rules = [a_rule(rng, issuer) for issuer in rng.sample(list(ISSUERS), seed % 3 + 1)]
    policy: dict[str, Any] = {
        "apiVersion": "security.istio.io/v1",
        "kind": "RequestAuthentication",
        "metadata": {"namespace": "edge", "name": "tokens"},
        "spec": {"jwtRules": rules},
    }
    with gateway(yaml.safe_dump_all([ROUTE, policy])) as edge:
        port = servers.free_port()
        with servers.envoy(bootstrap(rules, port, edge.services["v1"].server_address[1]), port):
            ours, theirs = Asker(edge.port), Asker(port)
            wrong, statuses = [], set()
            for _ in range(REQUESTS):
                token, damaged = a_token(rng)
                request = a_request(rng, rules, token)
                got, wanted = ours.ask(*request), theirs.ask(*request)
                if damaged and wanted["status"] in {401, 403}:
                    wanted["status"] = got["status"] = 401 if got["status"] in {401, 403} else got["status"]
                statuses.add(wanted["status"])
                if got != wanted:
                    wrong.append(f"{request}\n  ours   {got}\n  Envoy's {wanted}")
            assert not wrong, f"{len(wrong)} of {REQUESTS} differ (rules: {rules}):\n" + "\n".join(wrong[:8])
            assert {200, 401} <= statuses
