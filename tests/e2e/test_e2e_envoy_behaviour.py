"""Generated rules that do more than change heads: tries, timeouts, copies, CORS and weights are those of an Envoy told the same."""

from __future__ import annotations

import contextlib
import http.client
import json
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

import pytest
import yaml
from envoy_routes import Body, bootstrap
from routes_world import Edge, gateway
from test_e2e_envoy_routes import a_change, maybe, without_none

from tests import servers

ROUNDS = 3
RULES = 40
ASKED = 10
"""Requests to a rule."""
SPREAD = 80
"""Requests to a rule with several backends. The smallest share is 1 in 5: one rule in fifty million would seem to leave a backend out."""
TOGETHER = 16
LATE = "3"
"""Seconds that a service takes which is to be late; the rules' timeouts are well below, and well above what an answer takes."""
ORIGINS = [
    "https://shop.example",
    "https://shop.example:443",
    "https://www.shop.example",
    "https://evil.example",
    "http://shop.example",
    "null",
]
PREFLIGHTS: list[tuple[str, str | None]] = [("PUT", None), ("GET", "x-a"), ("PATCH", "x-b"), ("DELETE", "x-a,x-b")]
# 502 and 504 go together: Envoy has one switch for what is the gateway's own of both.
CODES = [[500], [503], [502, 504], [500, 502, 503, 504]]


def a_cors(rng: random.Random) -> Body:
    credentials = rng.random() < 0.4
    known = ["https://shop.example", "https://*.shop.example", "http://*.example", "https://evil.example:8443", "https://shop.example:443"]
    # With credentials the asked method takes the place of "*" (HTTPCORSFilter, "allowMethods"), which Envoy leaves as it is.
    methods = rng.choice([["PUT"], ["GET", "PUT", "DELETE"], ["GET", "POST"], *([] if credentials else [["*"]])])
    headers = rng.choice([["x-a"], ["x-a", "x-b"], *([] if credentials else [["*"]])])
    return without_none(
        {
            "allowOrigins": rng.choice([["*"], rng.sample(known, 1), rng.sample(known, 2)]),
            "allowMethods": maybe(rng, 0.8, methods),
            "allowHeaders": maybe(rng, 0.7, headers),
            "exposeHeaders": maybe(rng, 0.3, ["x-seen-by"]),
            "allowCredentials": maybe(rng, 0.9, credentials),
            "maxAge": maybe(rng, 0.5, 600),
        }
    )


def a_mirror(rng: random.Random, service: str) -> Body:
    # What is in between is a matter of chance: tests/gateway/test_gateway_shares.py.
    parts = [
        {},
        {},
        {"percent": 0},
        {"percent": 100},
        {"fraction": {"numerator": 0}},
        {"fraction": {"numerator": 10_000, "denominator": 10_000}},
    ]
    return {"type": "RequestMirror", "requestMirror": {"backendRef": {"name": service, "port": 80}, **rng.choice(parts)}}


def a_backend(rng: random.Random, name: str) -> Body:
    filters: list[Body] = []
    if rng.random() < 0.5:
        filters.append({"type": "RequestHeaderModifier", "requestHeaderModifier": a_change(rng, ["x-d", "x-e", "x-f"])})
    if rng.random() < 0.5:
        filters.append({"type": "ResponseHeaderModifier", "responseHeaderModifier": a_change(rng, ["x-seen-by", "x-inner", "x-other"])})
    return without_none({"name": name, "port": 80, "filters": filters or None})


def a_rule(rng: random.Random, number: int) -> Body:
    if rng.random() < 0.3:
        names = [rng.choice(["v1", "v2", "v3", "missing"]) for _ in range(3)]
        weights = rng.choice([(1, 0, 2), (1, 1, 1), (2, 1, 0), (1, 2, 2), (0, 0, 0)])
        backends = [a_backend(rng, name) | {"weight": weight} for name, weight in zip(names, weights, strict=True)]
    else:
        backends = [a_backend(rng, rng.choice(["v1", "v1", "v1", "v1", "v1", "closed", "missing"]))]
    filters: list[Body] = []
    if rng.random() < 0.4:
        filters.append({"type": "CORS", "cors": a_cors(rng)})
    if len(backends) == 1 and rng.random() < 0.4:
        filters += [a_mirror(rng, name) for name in rng.sample(["v2", "v3", "missing"], rng.choice([1, 2]))]
    if rng.random() < 0.3:
        filters.append({"type": "RequestHeaderModifier", "requestHeaderModifier": a_change(rng, ["x-a", "x-b", "x-c"])})
    if rng.random() < 0.3:
        filters.append({"type": "ResponseHeaderModifier", "responseHeaderModifier": a_change(rng, ["x-new", "x-newer", "x-outer"])})
    codes, attempts = maybe(rng, 0.7, rng.choice(CODES)), maybe(rng, 0.7, rng.choice([1, 2, 3]))
    retry = without_none({"codes": codes, "attempts": attempts, "backoff": "10ms"})
    times = rng.choice([{"request": "1500ms"}, {"backendRequest": "1s"}, {"request": "0s"}, {"request": "30s", "backendRequest": "1s"}])
    return without_none(
        {
            "matches": [{"path": {"value": f"/r{number}"}}],
            "filters": filters or None,
            "backendRefs": backends,
            "retry": maybe(rng, 0.5, retry),
            "timeouts": maybe(rng, 0.5, times),
        }
    )


class Wanted:
    """One request to a rule."""

    def __init__(self, rng: random.Random, number: int, rule: Body) -> None:
        self.rule, self.number = rule, number
        self.method = rng.choice(["GET", "GET", "PUT", "POST"])
        self.query: dict[str, str] = {}
        self.headers = {"host": "shop.example", "x-d": "1", "x-e": "2"}
        if rng.random() < 0.4:
            self.headers["origin"] = rng.choice(ORIGINS)
        if rule["backendRefs"][0]["name"] == "closed":
            self.method = "GET"  # copies end with a request whose body nobody took: docs/routes.md
        if len(rule["backendRefs"]) > 1:
            return
        chance = rng.random()
        if chance < 0.35:
            self.query = {"fail": str(rng.choice([404, 500, 502, 503, 504])), "times": str(rng.choice([1, 2, 3, 9]))}
        elif chance < 0.5 and "retry" in rule and not any(item["type"] == "RequestMirror" for item in rule.get("filters") or []):
            # Without a `retry`, as for a copy, it matters whether a connection had been used before (RFC 9112, section 9.3.1): Envoy has no
            # words for that.
            self.query = {"fail": "0", "times": str(rng.choice([1, 2, 9]))}
        elif chance < 0.6 and rule.get("timeouts") != {"request": "0s"}:
            self.query = {"delay": LATE}
        elif chance < 0.8 and any(item["type"] == "CORS" for item in rule.get("filters") or []):
            self.method = "OPTIONS"
            method, names = rng.choice(PREFLIGHTS)
            self.headers |= {"origin": rng.choice(ORIGINS), "access-control-request-method": method}
            if names:
                self.headers["access-control-request-headers"] = names

    def ask(self, port: int, identity: str) -> dict[str, Any]:
        """What came of it, sent to a port under a name of its own, with everything left out in which two good proxies may differ."""
        path = self.rule["matches"][0]["path"]["value"]
        target = f"{path}/x?{urlencode({**self.query, 'id': identity})}"
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        body = b"a body" if self.method in ("POST", "PUT") else None
        connection.request(self.method, target, body, self.headers)
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        # Which status a connection that broke has, is nowhere said.
        status = {204: 200, 502: 503}.get(answer.status, answer.status)
        found: dict[str, Any] = {"status": status, "cors": self._as_browsers_read(answer)}
        if data.startswith(b"{"):  # refusals of the gateway's own are nobody's to change
            found["service"] = json.loads(data)["service"]
            for name in ("x-seen-by", "x-inner", "x-other", "x-new", "x-newer", "x-outer"):
                found[name] = ",".join(answer.headers.get_all(name) or ()) or None
        return found

    def _as_browsers_read(self, answer: http.client.HTTPResponse) -> Any:
        """What a browser makes of what an answer says about CORS (Fetch standard, "CORS check" and "CORS-preflight fetch")."""
        origin, said = self.headers.get("origin"), answer.headers.get("access-control-allow-origin")
        if origin is None or not any(item["type"] == "CORS" for item in self.rule.get("filters") or []) or said not in ("*", origin):
            return None
        credentials = said == origin and answer.headers.get("access-control-allow-credentials") == "true"

        def listed(name: str) -> set[str]:
            return {value.strip().lower() for value in ",".join(answer.headers.get_all(name) or ()).split(",") if value.strip()}

        def allowed(name: str, asked: Sequence[str]) -> bool:
            values = listed(name)
            return ("*" in values and not credentials) or {value.lower() for value in asked} <= values

        if self.method != "OPTIONS":
            return credentials, listed("access-control-expose-headers")
        method = self.headers["access-control-request-method"]
        names = self.headers.get("access-control-request-headers", "").split(",")
        return (
            credentials,
            method in ("GET", "HEAD", "POST") or allowed("access-control-allow-methods", [method]),
            names == [""] or allowed("access-control-allow-headers", names),
            answer.headers.get("access-control-max-age"),
        )


def arrived(edge: Edge) -> dict[str, list[tuple[Any, ...]]]:
    """What arrived at the services, by the name of the request: the request itself, its further tries and its copies."""
    found: dict[str, list[tuple[Any, ...]]] = {}
    for name, service in edge.services.items():
        for seen in list(service.seen):
            url = urlsplit(seen["path"])
            headers = seen["headers"]
            values = [headers.get(field) for field in ("host", "x-a", "x-b", "x-c", "x-d", "x-e", "x-f")]
            found.setdefault(parse_qs(url.query)["id"][0], []).append((name, seen["method"], url.path, seen["body"], *map(str, values)))
    return {name: sorted(sightings) for name, sightings in found.items()}


def compared(edge: Edge, port: int, wanted: list[Wanted]) -> list[str]:
    """What is different, in words."""
    with ThreadPoolExecutor(TOGETHER) as pool:
        ours = list(pool.map(lambda item: item[1].ask(edge.port, f"o{item[0]}"), enumerate(wanted)))
        theirs = list(pool.map(lambda item: item[1].ask(port, f"e{item[0]}"), enumerate(wanted)))
    single = [number for number, item in enumerate(wanted) if len(item.rule["backendRefs"]) == 1]

    def unequal() -> list[int]:
        there = arrived(edge)
        return [number for number in single if there.get(f"o{number}") != there.get(f"e{number}")]

    with contextlib.suppress(AssertionError):
        servers.wait_for("the copies", lambda: not unequal(), 10)
    there, wrong = arrived(edge), []
    for number in sorted({*unequal(), *(number for number in single if ours[number] != theirs[number])}):
        item = wanted[number]
        lines = [f"{item.method} {item.query} {item.headers}", json.dumps(item.rule), f"ours {ours[number]}", f"Envoy's {theirs[number]}"]
        wrong.append("\n  ".join([*lines, f"ours arrived {there.get(f'o{number}')}", f"Envoy's arrived {there.get(f'e{number}')}"]))
    spread: dict[int, tuple[set[str], set[str]]] = {}
    for number, item in enumerate(wanted):
        if number not in single:
            sets = spread.setdefault(id(item.rule), (set(), set()))
            for found, answers, letter in zip(sets, (ours, theirs), "oe", strict=True):
                kept = {name: value for name, value in answers[number].items() if name != "cors"}
                found.add(f"{kept} {sorted({(name, *values) for name, _, _, _, *values in there.get(f'{letter}{number}', [])})}")
    for item in wanted:
        if id(item.rule) in spread:
            ours_set, theirs_set = spread.pop(id(item.rule))
            if ours_set != theirs_set:
                lines = ["only ours", *sorted(ours_set - theirs_set), "only Envoy's", *sorted(theirs_set - ours_set)]
                wrong.append("\n  ".join([json.dumps(item.rule), *lines]))
    return wrong


@pytest.mark.e2e
@pytest.mark.parametrize("seed", range(ROUNDS))
def test_the_gateway_does_what_envoy_does(seed: int) -> None:
    rng = random.Random(seed)
    rules = [a_rule(rng, number) for number in range(RULES)]
    routes = [
        {
            "apiVersion": "gateway.networking.k8s.io/v1",
            "kind": "HTTPRoute",
            "metadata": {"namespace": "shop", "name": f"r{number // 10}"},
            "spec": {"parentRefs": [{"name": "gw", "namespace": "edge"}], "rules": rules[number : number + 10]},
        }
        for number in range(0, RULES, 10)
    ]
    nobody = servers.free_port()
    closed: list[Body] = [
        {"apiVersion": "v1", "kind": "Service", "metadata": {"namespace": "shop", "name": "closed"}, "spec": {"ports": [{"port": 80}]}},
        {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {"namespace": "shop", "name": "closed", "labels": {"kubernetes.io/service-name": "closed"}},
            "addressType": "IPv4",
            "ports": [{"port": nobody}],
            "endpoints": [{"addresses": ["127.0.0.1"]}],
        },
    ]
    with gateway(yaml.safe_dump_all([*routes, *closed])) as edge:
        port = servers.free_port()
        at = {name: service.server_address[1] for name, service in edge.services.items()}
        with servers.envoy(bootstrap(routes, port, {**at, "closed": nobody}), port):
            wanted = [
                Wanted(rng, number, rule)
                for number, rule in enumerate(rules)
                for _ in range(ASKED if len(rule["backendRefs"]) == 1 else SPREAD)
            ]
            wrong = compared(edge, port, wanted)
            assert not wrong, f"{len(wrong)} of {len(wanted)} differ:\n" + "\n".join(wrong[:12])
