"""Generated answers of one ext_authz server, given to a real Envoy and to our gateway: clients and upstreams see the same of both.

Left out is what is known to differ (docs/policy.md): what we refuse to do for a policy though Envoy does it, and `append_action` on a
request's headers, which this Envoy does not look at.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pytest
import yaml
from authz_world import Said, Script, envoy, scripted
from envoy.config.core.v3.base_pb2 import HeaderValueOption
from envoy.service.auth.v3.external_auth_pb2 import CheckResponse
from routes_world import Edge, gateway

pytestmark = pytest.mark.e2e
ACTION = HeaderValueOption.HeaderAppendAction
CASES = 600
SEEN = ("x-t", "x-u", "x-v", "cookie", "x-seen-by", "x-new", "set-cookie", "location", "content-type", "www-authenticate")
"""Headers that are compared; the others are each proxy's own."""


def manifests(provider: int, **more: Any) -> str:
    """A route to `v1`, and the policy before it."""
    route = {
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "HTTPRoute",
        "metadata": {"namespace": "shop", "name": "all"},
        "spec": {
            "parentRefs": [{"namespace": "edge", "name": "gw"}],
            "hostnames": ["shop.example"],
            "rules": [{"backendRefs": [{"name": "v1", "port": 80}]}],
        },
    }
    target = {"group": "gateway.networking.k8s.io", "kind": "HTTPRoute", "name": "all"}
    policy = {
        "apiVersion": "tollhouse.dev/v1",
        "kind": "AccessPolicy",
        "metadata": {"namespace": "shop", "name": "scripted"},
        "spec": {"targetRefs": [target], "provider": f"127.0.0.1:{provider}", "timeout": "5s", **more},
    }
    return yaml.safe_dump_all([route, policy])


@pytest.fixture(scope="module")
def both() -> Iterator[tuple[Script, Edge, int]]:
    """The script, our gateway, and the port of an Envoy, with the same service behind them."""
    with (
        scripted() as (script, at),
        gateway(manifests(at)) as edge,
        envoy(edge.services["v1"].server_address[1], at, status_on_error={"code": 503}) as port,
    ):
        yield script, edge, port


def an_option(rng: random.Random, name: str, actions: list[int | None], appends: list[bool | None]) -> HeaderValueOption:
    option = HeaderValueOption()
    option.header.key = name.upper() if rng.random() < 0.1 else name
    option.header.value = rng.choice(["1", "two", "a, b", "three=3; four", "", "é"])
    append, action = rng.choice(appends), rng.choice(actions)
    if append is not None:
        option.append.value = append
    if action is not None:
        option.append_action = action
    return option


def an_allow(rng: random.Random) -> CheckResponse:
    response = CheckResponse()
    ok = response.ok_response
    ok.SetInParent()
    names = ["x-t", "x-u", "x-v", "cookie"]
    plain = [None, ACTION.APPEND_IF_EXISTS_OR_ADD, ACTION.OVERWRITE_IF_EXISTS_OR_ADD]
    for _ in range(rng.choice([0, 1, 2, 4])):
        ok.headers.append(an_option(rng, rng.choice(names), plain, [None, None, True, False]))
    ok.headers_to_remove.extend(rng.choice(names) for _ in range(rng.choice([0, 0, 1, 2])))
    for _ in range(rng.choice([0, 0, 1, 3])):
        answered = ["x-seen-by", "x-new", "set-cookie"]
        ok.response_headers_to_add.append(an_option(rng, rng.choice(answered), [None, *ACTION.values()], [None, None, True, False]))
    for _ in range(rng.choice([0, 0, 1, 2])):
        ok.query_parameters_to_set.add(key=rng.choice("abcz"), value=rng.choice(["1", "x/y", "%20", "a+b", "", "q=r", "ok"]))
    ok.query_parameters_to_remove.extend(rng.choice("abcz") for _ in range(rng.choice([0, 0, 1, 2])))
    if rng.random() < 0.3:
        response.dynamic_metadata.update({"who": "ann"})
    return response


def a_denial(rng: random.Random) -> CheckResponse:
    response = CheckResponse()
    response.status.code = rng.choice([7, 16, 3, 14])
    if rng.random() < 0.1:
        response.ok_response.headers.append(an_option(rng, "x-t", [None], [None]))
        return response
    denied = response.denied_response
    denied.body = rng.choice(["no\n", '{"error": "no"}', "nein, danke: ß"])
    denied.status.code = rng.choice([0, 200, 204, 302, 401, 403, 404, 429, 503, 511])
    for _ in range(rng.choice([0, 1, 3])):
        names = ["x-t", "x-new", "set-cookie", "www-authenticate"]
        denied.headers.append(an_option(rng, rng.choice(names), [None, *ACTION.values()], [None, False]))
    if rng.random() < 0.3:
        denied.headers.append(an_option(rng, "location", [None], [None]))  # of several Envoy makes one
    return response


def an_error(rng: random.Random) -> CheckResponse:
    response = CheckResponse()
    response.status.code = rng.choice([13, 14])
    failed = response.error_response
    failed.body = rng.choice(["later\n", '{"error": "later"}'])
    failed.status.code = rng.choice([0, 429, 500, 502, 503])
    for _ in range(rng.choice([0, 1, 3])):
        failed.headers.append(an_option(rng, rng.choice(["x-t", "retry-after"]), [None, *ACTION.values()], [None, False]))
    return response


def a_path(rng: random.Random) -> str:
    query = "&".join(rng.choice(["a=1", "b=2", "a=3", "c=%20x", "b=", "y=a+b", "y=%C3%A9"]) for _ in range(rng.randrange(4)))
    return "/orders/7" + ("?" + query if query else rng.choice(["", "?"]))


def same(said: Said) -> dict[str, Any]:
    """All that two good proxies have to agree in."""
    upstream = said.upstream
    found: dict[str, Any] = {"status": said.status, "headers": sorted((name, value) for name, value in said.headers if name in SEEN)}
    if upstream is None:
        found["body"] = said.body
        # What Envoy says of a body that there is none of, and the charset of its own words, are its own.
        found["headers"] = [field for field in found["headers"] if field[0] != "content-type"]
        return found
    path = urlsplit(upstream["path"])
    shown = {name: value for name, value in upstream["headers"].items() if name in SEEN}
    return {**found, "path": path.path, "query": sorted(parse_qsl(path.query, keep_blank_values=True)), "upstream": shown}


def test_the_same_of_both(both: tuple[Script, Edge, int]) -> None:
    script, edge, port = both
    rng = random.Random(20)
    kinds = {"allowed": 0, "denied": 0}
    for number in range(CASES):
        answer = rng.choice([an_allow, an_allow, an_allow, a_denial, a_denial, an_error])(rng)
        script.answers[str(number)] = answer
        headers = [(name, value) for name, value in (("x-t", "0"), ("x-u", "0, 1"), ("cookie", "k=v")) if rng.random() < 0.6]
        path = a_path(rng)
        theirs, ours = (same(Said(at, str(number), path, headers)) for at in (port, edge.port))
        if not (answer.denied_response.body or answer.error_response.body) and "body" in ours:
            ours.pop("body")  # ours says in a sentence why, where nobody else says anything
            theirs.pop("body")
        assert ours == theirs, f"case {number}: {path} {headers}\n{answer}"
        kinds["allowed" if "upstream" in ours else "denied"] += 1
    assert min(kinds.values()) > CASES / 5


def test_an_access_policy_may_ask_a_service_of_the_mesh() -> None:
    mesh = {
        "apiVersion": "tollhouse.dev/v1",
        "kind": "Mesh",
        "metadata": {"name": "shop"},
        "spec": {
            "trustDomain": "shop.example",
            "extensionProviders": [{"name": "authz", "envoyExtAuthzGrpc": {"service": "shop/g2", "port": 80, "timeout": "5s"}}],
        },
    }
    route, policy = yaml.safe_load_all(manifests(1))
    del policy["spec"]["provider"], policy["spec"]["timeout"]
    policy["spec"]["extensionProvider"] = "authz"
    with gateway(yaml.safe_dump_all([mesh, route, policy])) as edge:
        allowed = Said(edge.port, "1", "/a?b", [("x-user", "ann")])
        assert allowed.upstream is not None, allowed.body
        assert allowed.upstream["headers"]["x-checked"] == "ann by g2"
        denied = Said(edge.port, "2", "/a?b", [])
        assert (denied.status, denied.body.split()[:2]) == (401, ["GET", "/a?b"])
