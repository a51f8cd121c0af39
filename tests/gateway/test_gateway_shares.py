"""Weights, percentages and fractions, from manifests to what is chosen: by statistics, with fixed seeds and stated bounds.

Each count is of independent draws, so that it has a binomial distribution: it is within five of its standard deviations of what is expected
but for one case in two million, and with a seed that is fixed it always is or never.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping

import pytest
from gateway_world import INGRESS, a_head, a_peer
from l4_world import compiled, gateway_yaml, route_yaml, service_yaml

from gateway.l4_route import L4Table
from gateway.place import Place
from gateway.plan import L4Plan, Pending, Plan, Routed
from gateway.route import route
from mesh.peer import Peer
from mesh.refusals import BrokenBackend

DRAWS = 20_000
SIGMAS = 5.0
BROKEN = "500"
WEIGHTS: list[dict[str, int]] = [
    {"a": 1},
    {"a": 1, "b": 1},
    {"a": 9, "b": 1, "zero": 0},
    {"a": 1, "b": 2, "c": 3, "d": 4},
    {"a": 1_000_000, "b": 500_000, "c": 1_000},
    {"a": 70, "missing": 30},
    {"a": 0, "missing": 1, "b": 1},
    {"missing": 0, "a": 3, "b": 1},
    {"a": 5, "missing": 1, "absent": 2, "other:81": 2},
]
"""By Service and port; `missing` and `absent` are not there, and `other` has no port 81: their shares are broken."""
SERVICES = ("a", "b", "c", "d", "zero", "other")


def within(counts: Mapping[str, int], shares: Mapping[str, float], draws: int) -> None:
    """Whether each count is within its bound; a share of nothing, or of everything, is met to the one."""
    assert set(counts) <= set(shares), "something else was chosen"
    for name, share in shares.items():
        bound = SIGMAS * (draws * share * (1 - share)) ** 0.5
        assert abs(counts.get(name, 0) - draws * share) <= bound, f"{name}: {counts.get(name, 0)} of {draws} for a share of {share}"


def shares_of(weights: Mapping[str, int]) -> dict[str, float]:
    """What each Service, and what is broken, is to get."""
    found: dict[str, float] = {BROKEN: 0.0}
    for name, weight in weights.items():
        key = f"shop/{name}" if name in SERVICES else BROKEN
        found[key] = found.get(key, 0.0) + weight / sum(weights.values())
    return found


def place(kind: str, route: str, *services: str) -> Place:
    """The one listener of a Gateway with this route."""
    protocol = {"TCPRoute": "protocol: TCP", "UDPRoute": "protocol: UDP", "TLSRoute": "protocol: TLS, tls: {mode: Passthrough}"}
    listener = f"name: one, port: 8443, {protocol.get(kind, 'protocol: HTTP')}"
    snapshot = compiled(gateway_yaml(listener), route, *services)
    gateway = snapshot.gateways["edge/ingress"]
    return Place(snapshot, gateway, gateway.listeners[0], gateway.listeners, INGRESS)


def of_requests(place: Place, rng: random.Random) -> Callable[[], Routed]:
    head, peer = a_head(b"/shop.v1.Orders/Get", b"POST"), a_peer()
    return lambda: route(head, peer, place, 0.0, rng)


def of_connections(place: Place, rng: random.Random) -> Callable[[], Routed]:
    table, peer = L4Table(place), Peer(address="192.0.2.7", port=50000, sni="shop.example")
    return lambda: table.route(peer, 0.0, rng)


@pytest.mark.parametrize("weights", WEIGHTS, ids=lambda weights: ",".join(f"{name}={weight}" for name, weight in weights.items()))
@pytest.mark.parametrize(
    ("kind", "more", "drawing"),
    [
        ("HTTPRoute", "", of_requests),
        ("GRPCRoute", "", of_requests),
        ("TCPRoute", "", of_connections),
        ("UDPRoute", "", of_connections),
        ("TLSRoute", "  hostnames: [shop.example]\n", of_connections),
    ],
)
def test_weights(kind: str, more: str, drawing: Callable[[Place, random.Random], Callable[[], Routed]], weights: dict[str, int]) -> None:
    protocol = "UDP" if kind == "UDPRoute" else "TCP"
    refs = (f"{name}*{weight}" for name, weight in weights.items())
    services = (service_yaml(name, 9000, protocol=protocol) for name in SERVICES)
    draw = drawing(place(kind, route_yaml(kind, "r", *refs, more=more), *services), random.Random(7))
    counts: Counter[str] = Counter()
    for _ in range(DRAWS):
        pending = draw()
        assert isinstance(pending, Pending)
        if isinstance(pending.plan, BrokenBackend):
            assert pending.plan.status == 500
            counts[BROKEN] += 1
        else:
            assert isinstance(pending.plan, Plan | L4Plan)
            assert pending.plan.cluster.service == pending.asking.service.partition("/")[2]
            counts[pending.asking.service] += 1
    within(counts, shares_of(weights), DRAWS)


MIRRORS: list[tuple[str, float]] = [
    ("", 1.0),
    ("percent: 0", 0.0),
    ("percent: 1", 0.01),
    ("percent: 42", 0.42),
    ("percent: 100", 1.0),
    ("fraction: {numerator: 0}", 0.0),
    ("fraction: {numerator: 25}", 0.25),
    ("fraction: {numerator: 1, denominator: 3}", 1 / 3),
    ("fraction: {numerator: 1, denominator: 1000}", 0.001),
    ("fraction: {numerator: 999999, denominator: 1000000}", 0.999999),
    ("fraction: {numerator: 7, denominator: 7}", 1.0),
]
"""What says how many are copied, and the share that it stands for."""


def a_mirror(service: str, part: str) -> str:
    return f"{{type: RequestMirror, requestMirror: {{backendRef: {{name: {service}, port: 80}}{f', {part}' if part else ''}}}}}"


def with_mirrors(rule: str, *services: str) -> Place:
    text = route_yaml("HTTPRoute", "r").replace("    backendRefs: []\n", rule)
    return place("HTTPRoute", text, *(service_yaml(name, 9000) for name in services))


@pytest.mark.parametrize("level", ["rule", "backend"])
@pytest.mark.parametrize(("part", "share"), MIRRORS)
def test_mirrors(part: str, share: float, level: str) -> None:
    one = f"[{a_mirror('m', part)}]"
    rule, backend = (f"    filters: {one}\n", "") if level == "rule" else ("", f", filters: {one}")
    draw = of_requests(with_mirrors(f"{rule}    backendRefs: [{{name: a, port: 80{backend}}}]\n", "a", "m"), random.Random(7))
    counts: Counter[str] = Counter()
    for _ in range(DRAWS):
        pending = draw()
        assert isinstance(pending, Pending)
        assert isinstance(pending.plan, Plan)
        counts.update(copy.cluster.service for copy in pending.plan.mirrors)
    within(counts, {"m": share}, DRAWS)


def test_mirrors_and_weights_are_drawn_independently_of_each_other() -> None:
    rule = (
        f"    filters: [{a_mirror('m', 'percent: 50')}, {a_mirror('n', 'percent: 30')}, {a_mirror('missing', 'percent: 50')}]\n"
        "    backendRefs: [{name: a, port: 80, weight: 3}, {name: b, port: 80, weight: 1}]\n"
    )
    draw = of_requests(with_mirrors(rule, "a", "b", "m", "n"), random.Random(7))
    counts: Counter[str] = Counter()
    for _ in range(DRAWS):
        pending = draw()
        assert isinstance(pending, Pending)
        assert isinstance(pending.plan, Plan)
        counts["".join((pending.plan.cluster.service, *(copy.cluster.service for copy in pending.plan.mirrors)))] += 1
    weights, ms, ns = {"a": 0.75, "b": 0.25}, {"m": 0.5, "": 0.5}, {"n": 0.3, "": 0.7}
    within(counts, {a + m + n: weights[a] * ms[m] * ns[n] for a in weights for m in ms for n in ns}, DRAWS)
