"""Which route a connection gets: equal to a slow and obvious reading of Gateway API, for any listener, routes and name."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st
from l4_world import compiled, gateway_yaml, route_yaml, service_yaml

from gateway.l4_route import L4Table
from gateway.place import Place
from gateway.plan import L4Plan, Pending
from mesh.peer import Peer
from mesh.refusals import NoRoute

labels = st.sampled_from(["a", "b", "c"])
names = st.lists(labels, min_size=1, max_size=4).map(".".join)
patterns = names | names.map(lambda name: f"*.{name}")


def holds(pattern: str, name: str) -> bool:
    """Whether a pattern stands for a name: itself, or with one label or more in place of the star."""
    if pattern == "*":
        return True
    if pattern.startswith("*."):
        head, dot, _ = name.rpartition(pattern[1:])
        return bool(dot) and name.endswith(pattern[1:]) and bool(head)
    return pattern == name


def precision(pattern: str) -> tuple[bool, int]:
    """Exact names before wildcards, longer wildcards before shorter ones."""
    return not pattern.startswith("*"), pattern.count(".") if pattern != "*" else -1


def expected(listener: str, routes: list[list[str]], name: str) -> int | None:
    """The number of the route, the oldest being 0."""
    if not holds(listener, name):
        return None
    best: tuple[tuple[bool, int], int] | None = None
    for number, hostnames in enumerate(routes):
        for hostname in hostnames:
            # What the route says within the listener: the more special of the two.
            narrow = max(hostname, listener, key=precision)
            if holds(hostname, name) and holds(narrow, name):
                found = precision(narrow), -number
                best = found if best is None or found > best else best
    return None if best is None else -best[1]


@settings(max_examples=150, deadline=None)
@given(
    st.just("*") | patterns,
    st.lists(st.lists(patterns, min_size=1, max_size=3, unique=True), max_size=4),
    st.lists(names, min_size=1, max_size=8),
)
def test_the_route_is_that_of_a_slow_reading(listener: str, routes: list[list[str]], asked: list[str]) -> None:
    hostname = "" if listener == "*" else f", hostname: '{listener}'"
    texts = [gateway_yaml(f"name: tls, port: 443, protocol: TLS{hostname}, tls: {{mode: Passthrough}}"), service_yaml("s", 1)]
    for number, hostnames in enumerate(routes):
        more = "  hostnames: [" + ", ".join(f"'{each}'" for each in hostnames) + "]\n"
        texts.append(route_yaml("TLSRoute", f"r{number}", "s", more=more, made=f"2026-01-01T00:00:0{number}Z"))
    snapshot = compiled(*texts)
    config = snapshot.gateways["edge/ingress"]
    made = config.listeners[0]
    table = L4Table(Place(snapshot=snapshot, gateway=config, listener=made, siblings=(), identity=""))
    for name in asked:
        if not holds(listener, name):
            continue  # another listener's, or nobody's: it is not asked here
        found = table.route(Peer(address="10.0.0.1", sni=name), 0.0, random.Random(1))
        wanted = expected(listener, routes, name)
        if wanted is None:
            assert isinstance(found, NoRoute), (name, found)
        else:
            assert isinstance(found, Pending), (name, found)
            assert isinstance(found.plan, L4Plan)
            assert found.rule.name == f"shop/r{wanted}#main", name
