"""`python -m bench.scale`: how compiling, one change, and the choice of a route grow with the configuration. Prints Markdown."""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

from gateway.place import Place
from mesh.documents import Document
from mesh.http import HTTP11, RequestHead
from mesh.model import Snapshot
from mesh.reading import document_from_json
from mesh.workspace import Workspace

Body = dict[str, Any]
GROUP = "gateway.networking.k8s.io"
PER_SERVICE, PER_ROUTE, PER_HOST = 10, 5, 20
"""Endpoints for each service, route and host: 10,000 endpoints make 1,000 services, 2,000 routes, 500 hosts."""


def gateway() -> list[Body]:
    """A class and a Gateway with one listener that lets all routes in."""
    listener = {"name": "http", "port": 8080, "protocol": "HTTP", "allowedRoutes": {"namespaces": {"from": "All"}}}
    return [
        resource(f"{GROUP}/v1", "GatewayClass", "", "tollhouse", {"controllerName": "tollhouse.dev/gateway-controller"}),
        resource(f"{GROUP}/v1", "Gateway", "edge", "gw", {"gatewayClassName": "tollhouse", "listeners": [listener]}),
    ]


def resource(version: str, kind: str, namespace: str, name: str, spec: Body) -> Body:
    """One resource."""
    return {
        "apiVersion": version,
        "kind": kind,
        "metadata": {"name": name, **({"namespace": namespace} if namespace else {})},
        "spec": spec,
    }


def endpoints(number: int, port: int = 9000) -> Body:
    """The EndpointSlice of one service."""
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": f"s{number}-1", "namespace": "app", "labels": {"kubernetes.io/service-name": f"s{number}"}},
        "addressType": "IPv4",
        "ports": [{"port": port}],
        "endpoints": [{"addresses": [f"127.{number // 250}.{number % 250}.{at + 1}"]} for at in range(PER_SERVICE)],
    }


def route(number: int, host: str, path: str, service: int) -> Body:
    """One HTTPRoute with two rules."""
    backend = [{"name": f"s{service}", "port": 80}]
    rules = [
        {"matches": [{"path": {"type": "PathPrefix", "value": path}}], "backendRefs": backend},
        {"matches": [{"path": {"type": "Exact", "value": path + "/exactly"}, "method": "GET"}], "backendRefs": backend},
    ]
    parents = [{"name": "gw", "namespace": "edge"}]
    return resource(f"{GROUP}/v1", "HTTPRoute", "app", f"r{number}", {"parentRefs": parents, "hostnames": [host], "rules": rules})


def world(size: int) -> list[Body]:
    """A configuration with `size` endpoints."""
    services, routes, hosts = max(1, size // PER_SERVICE), max(1, size // PER_ROUTE), max(1, size // PER_HOST)
    bodies = gateway()
    for number in range(services):
        bodies.append(resource("v1", "Service", "app", f"s{number}", {"ports": [{"port": 80}]}))
        bodies.append(endpoints(number))
    bodies += [route(number, f"h{number % hosts}.example", f"/r{number // hosts}", number % services) for number in range(routes)]
    return bodies


_versions = itertools.count(1)


def read(text: str) -> Document:
    """As from etcd: JSON in, a document out."""
    found, problems = document_from_json(text, "etcd", str(next(_versions)))
    assert found is not None, problems
    return found


def document(body: Body) -> Document:
    """The same for a body."""
    return read(json.dumps(body))


def timed(work: Callable[[], object], times: int = 5) -> float:
    """The median of `times` runs in seconds."""
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def place(snapshot: Snapshot) -> Place:
    """The listener's place in a snapshot."""
    config = snapshot.gateways["edge/gw"]
    return Place(snapshot=snapshot, gateway=config, listener=config.listeners[0], siblings=config.listeners, identity="")


def choice(where: Place, heads: list[RequestHead]) -> float:
    """Microseconds to find the rule of a request."""
    table = where.table

    def work() -> None:
        for head in heads:
            served = table.served(head.authority)
            assert served.table.find(head) is not None  # type: ignore[union-attr]

    work()
    return timed(work) / len(heads) * 1e6


def head(host: str, path: str) -> RequestHead:
    """A request."""
    made = RequestHead(b"GET", b"http", host.encode(), path.encode(), [], HTTP11, 0)
    made.path = made.target
    return made


def row(size: int, rng: random.Random) -> list[str]:
    """The figures for one size."""
    bodies = [json.dumps(body) for body in world(size)]
    gc.collect()
    started = time.perf_counter()
    workspace = Workspace()
    snapshot = workspace.update(upserts=[read(text) for text in bodies], replace=True)
    cold = time.perf_counter() - started
    assert not snapshot.problems, snapshot.problems[0]
    services = max(1, size // PER_SERVICE)
    ports = iter(range(9001, 30000))

    def change() -> None:
        workspace.update(upserts=[document(endpoints(rng.randrange(services), next(ports)))])

    one = timed(change, 15)

    def reroute() -> None:
        number = rng.randrange(max(1, size // PER_ROUTE))
        hosts = max(1, size // PER_HOST)
        body = route(number, f"h{number % hosts}.example", f"/changed{next(ports)}", number % services)
        workspace.update(upserts=[document(body)])

    routed = timed(reroute, 15)
    hosts, routes = max(1, size // PER_HOST), max(1, size // PER_ROUTE)
    numbers = [rng.randrange(routes) for _ in range(500)]
    heads = [head(f"h{number % hosts}.example", f"/r{number // hosts}/a/b") for number in numbers]
    fresh = Workspace()
    found = choice(place(fresh.update(upserts=[read(text) for text in bodies], replace=True)), heads)
    paths = Workspace()
    many = [*gateway(), resource("v1", "Service", "app", "s0", {"ports": [{"port": 80}]}), endpoints(0)]
    many += [route(number, "one.example", f"/p{number}", 0) for number in range(size)]
    deep = choice(
        place(paths.update(upserts=[document(body) for body in many], replace=True)),
        [head("one.example", f"/p{rng.randrange(size)}/a/b") for _ in range(500)],
    )
    shape = [f"{size:,}", f"{services:,}", f"{routes:,}", f"{hosts:,}"]
    return [*shape, f"{cold:.2f} s", f"{one * 1e3:.1f} ms", f"{routed * 1e3:.1f} ms", f"{found:.2f} µs", f"{deep:.2f} µs"]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.scale", description=__doc__)
    parser.add_argument("sizes", nargs="*", type=int, default=[10, 100, 1_000, 10_000])
    options = parser.parse_args()
    names = ["endpoints", "services", "routes", "hosts", "cold", "one endpoint", "one route", "choice", "choice, as many paths on one host"]
    print("| " + " | ".join(names) + " |")
    print("| " + " | ".join("---" for _ in names) + " |")
    for size in options.sizes:
        print("| " + " | ".join(row(size, random.Random(size))) + " |", flush=True)


if __name__ == "__main__":
    main()
