"""Generated HTTPRoutes and requests: the gateway answers as an Envoy does that was told the same in its own words."""

from __future__ import annotations

import http.client
import json
import random
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from envoy_routes import Body, bootstrap
from routes_world import gateway

from tests import servers

HOSTS = ["a.example", "b.example", "x.a.example", "y.x.a.example", "other.test"]
PATTERNS = ["a.example", "b.example", "*.a.example", "*.example", "x.a.example"]
PATHS = ["/", "/a", "/a/b", "/a/b/c", "/ab", "/b", "/b/", "/c/d", "/a.b", "/%C3%A9"]
EXPRESSIONS = ["/a.*", "/[bc]/.*", "/a/./c", ".*d", "/(a|b)"]
TARGETS = [
    *PATHS, "/a/", "/a/b/x", "/a//b", "/a/./b", "/x/../a", "/%61/b", "/a%2fb", "/abc", "/c/d/e", "/nowhere", "/a/b/c/d", "/b/x?b=1",
    "/a.b/", "/..%2fa", "/%C3%A9/x", "/a/b%20c", "/a;v=1/b", "/*",
]  # fmt: skip
QUERIES = ["", "?a=1", "?a=2&b=1", "?b=2", "?a=1&a=2", "?a", "?c=3&a=1"]
METHODS = ["GET", "POST", "DELETE"]
ROUNDS = 4
ROUTES = 60
REQUESTS = 1000


def maybe(rng: random.Random, share: float, value: Any) -> Any:
    return value if rng.random() < share else None


def without_none(body: Body) -> Body:
    return {name: value for name, value in body.items() if value is not None}


def a_condition(rng: random.Random, name: str) -> Body:
    if rng.random() < 0.3:
        return {"name": name, "type": "RegularExpression", "value": rng.choice(["[12]", "1.*", ".+"])}
    return {"name": name, "value": rng.choice("12")}


def a_match(rng: random.Random) -> Body:
    kind = rng.choice(["Exact", "PathPrefix", "PathPrefix", "PathPrefix", "RegularExpression"])
    value = rng.choice(EXPRESSIONS if kind == "RegularExpression" else PATHS)
    return without_none(
        {
            "path": maybe(rng, 0.9, {"type": kind, "value": value}),
            "method": maybe(rng, 0.2, rng.choice(METHODS)),
            "headers": maybe(rng, 0.3, [a_condition(rng, name) for name in rng.sample(["x-a", "x-b"], rng.randint(1, 2))]),
            "queryParams": maybe(rng, 0.2, [a_condition(rng, name) for name in rng.sample(["a", "b"], rng.randint(1, 2))]),
        }
    )


def a_change(rng: random.Random, names: list[str]) -> Body:
    chosen = rng.sample(names, 3)
    found = {
        "set": maybe(rng, 0.6, [{"name": chosen[0], "value": rng.choice(["s1", "s2"])}]),
        "add": maybe(rng, 0.5, [{"name": chosen[1], "value": "added"}]),
        "remove": maybe(rng, 0.5, [chosen[2]]),
    }
    return without_none(found) or {"set": [{"name": chosen[0], "value": "only"}]}


def a_path_change(rng: random.Random, matches: list[Body]) -> Body | None:
    single = len(matches) == 1 and (matches[0].get("path") or {"type": "PathPrefix"})["type"] == "PathPrefix"
    if single and rng.random() < 0.6:
        return {"type": "ReplacePrefixMatch", "replacePrefixMatch": rng.choice(["/", "/new", "/new/er"])}
    return {"type": "ReplaceFullPath", "replaceFullPath": rng.choice(["/", "/full", "/full/path"])} if rng.random() < 0.5 else None


def a_rule(rng: random.Random) -> Body:
    matches = [a_match(rng) for _ in range(rng.choice([1, 1, 1, 2]))]
    filters: list[Body] = []
    # Which goes first, a rule's filter or its backend's, is nowhere said, and Envoy has an order of its own: they change other headers.
    requests, inner = ["x-a", "x-b", "x-c"], ["x-d", "x-e", "x-f"]
    answers = ["x-new", "access-control-allow-origin", "x-other"]
    if rng.random() < 0.3:
        filters.append({"type": "RequestHeaderModifier", "requestHeaderModifier": a_change(rng, requests)})
    if rng.random() < 0.3:
        filters.append({"type": "ResponseHeaderModifier", "responseHeaderModifier": a_change(rng, answers)})
    if rng.random() < 0.2:
        wanted = without_none(
            {
                "scheme": maybe(rng, 0.4, rng.choice(["http", "https"])),
                "hostname": maybe(rng, 0.4, "elsewhere.example"),
                "port": maybe(rng, 0.3, 8443),
                "statusCode": maybe(rng, 0.7, rng.choice([301, 302, 303, 307, 308])),
                "path": a_path_change(rng, matches),
            }
        )
        return {"matches": matches, "filters": [*filters, {"type": "RequestRedirect", "requestRedirect": wanted}]}
    if rng.random() < 0.3:
        change = without_none({"hostname": maybe(rng, 0.5, "inside.example"), "path": a_path_change(rng, matches)})
        if change:
            filters.append({"type": "URLRewrite", "urlRewrite": change})
    backends: list[Body] = [{"name": rng.choice(["v1", "v2", "v3"]), "port": 80}]
    if rng.random() < 0.3:
        backends[0]["filters"] = [{"type": "RequestHeaderModifier", "requestHeaderModifier": a_change(rng, inner)}]
    if rng.random() < 0.2:
        backends.append({"name": rng.choice(["v1", "v2", "v3"]), "port": 80, "weight": 0})  # which of two is chosen is a matter of chance
    if rng.random() < 0.05:
        backends = [{"name": "missing", "port": 80}]
    return without_none({"matches": matches, "filters": filters or None, "backendRefs": backends})


def a_route(rng: random.Random, number: int) -> Body:
    hosts = maybe(rng, 0.85, rng.sample(PATTERNS, rng.choice([1, 1, 2])))
    rules = [a_rule(rng) for _ in range(rng.choice([1, 2, 3]))]
    return {
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "HTTPRoute",
        "metadata": {"namespace": "shop", "name": f"r{number:03}"},
        "spec": without_none({"parentRefs": [{"name": "gw", "namespace": "edge"}], "hostnames": hosts, "rules": rules}),
    }


def a_request(rng: random.Random) -> tuple[str, str, dict[str, str]]:
    headers = {"host": rng.choice(HOSTS)}
    for name in ("x-a", "x-b", "x-e"):
        if rng.random() < 0.5:
            headers[name] = rng.choice(["1", "2", "12"])
    return rng.choice(METHODS), rng.choice(TARGETS) + rng.choice(QUERIES), headers


class Asker:
    """Sends requests to one port over a kept connection."""

    def __init__(self, port: int) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)

    def ask(self, method: str, target: str, headers: dict[str, str]) -> dict[str, Any]:
        """What came of a request, with everything left out in which two good proxies may differ."""
        self.connection.putrequest(method, target, skip_host=True, skip_accept_encoding=True)
        for name, value in headers.items():
            self.connection.putheader(name, value)
        if method == "POST":
            self.connection.putheader("content-length", "0")
        self.connection.endheaders()
        answer = self.connection.getresponse()
        body = answer.read()
        found: dict[str, Any] = {"status": answer.status}
        for name in ("x-new", "access-control-allow-origin", "x-other"):
            values = answer.headers.get_all(name)
            if values and answer.status < 400:  # refusals of the gateway's own are nobody's to change
                found[name] = ",".join(values)
        if answer.status == 200:
            seen = json.loads(body)
            found |= {"service": seen["service"], "path": seen["path"], "host": seen["headers"]["host"]}
            found |= {name: seen["headers"].get(name) for name in ("x-a", "x-b", "x-c", "x-d", "x-e", "x-f")}
        if 300 <= answer.status < 400:
            where = urlsplit(answer.headers["location"])
            found["location"] = where._replace(netloc=f"{where.hostname}:{where.port or {'http': 80, 'https': 443}[where.scheme]}").geturl()
        return found


@pytest.mark.e2e
@pytest.mark.parametrize("seed", range(ROUNDS))
def test_the_gateway_answers_as_envoy_does(seed: int) -> None:
    rng = random.Random(seed)
    routes = [a_route(rng, number) for number in range(ROUTES)]
    with gateway(yaml.safe_dump_all(routes)) as edge:
        port = servers.free_port()
        # Where a redirect names no port it is the listener's own: Envoy is told the gateway's.
        config = bootstrap(routes, edge.port, {name: service.server_address[1] for name, service in edge.services.items()})
        config = config.replace(f'"address": "127.0.0.1", "port_value": {edge.port}', f'"address": "127.0.0.1", "port_value": {port}')
        with servers.envoy(config, port):
            ours, theirs = Asker(edge.port), Asker(port)
            wrong = []
            for _ in range(REQUESTS):
                request = a_request(rng)
                got, wanted = ours.ask(*request), theirs.ask(*request)
                if got != wanted:
                    wrong.append(f"{request}\n  ours   {got}\n  Envoy's {wanted}")
            assert not wrong, f"{len(wrong)} of {REQUESTS} differ:\n" + "\n".join(wrong[:12])
