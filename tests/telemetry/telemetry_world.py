"""For the telemetry tests: an outcome as a gateway leaves it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from mesh.http import Header, RequestHead
from mesh.model import DecisionPolicy, QuotaLimit
from mesh.outcome import Outcome
from mesh.peer import Caller, Peer
from mesh.questions import Asking, Decision, DecisionQuestion, Grant, TokenQuestion, Verdict
from telemetry.decision_log import DecisionLog, Which, line_sink

WEB = "spiffe://shop.example/ns/shop/sa/web"
CATALOG = "spiffe://shop.example/ns/shop/sa/catalog"
GATEWAY = "spiffe://shop.example/ns/edge/sa/ingress"


def an_outcome(
    caller: str = WEB,
    status: int = 200,
    flag: str = "-",
    headers: Sequence[Header] = ((b"user-agent", b"curl/8"), (b"x-forwarded-for", b"192.0.2.1")),
    method: bytes = b"GET",
    path: bytes = b"/catalog/1",
    query: bytes | None = b"token=secret",
    service: str = "shop/catalog",
    verdict: Verdict | None = Verdict.ALLOW,
    admitted: bool | None = True,
    shadow: bool = False,
) -> Outcome:
    peer = Peer(principal=GATEWAY, address="127.0.0.1", port=5, certificate_hash="ab" * 32, tls_version="TLSv1.3", sni="shop.example")
    target = path if query is None else path + b"?" + query
    request = RequestHead(method, b"https", b"shop.example", target, list(headers), b"HTTP/1.1", 0, path, query)
    made = Outcome(request, peer, "edge/eastwest", "https", 1_700_000_000.1234)
    made.caller = Caller(caller, GATEWAY)
    made.status, made.flag, made.service = status, flag, service
    made.upstream_principal = CATALOG
    made.duration, made.upstream_duration = 0.0031, 0.0021
    made.bytes_received, made.bytes_sent = 10, 1234
    made.details, made.request_id, made.endpoint = "via_upstream", b"1111-2222", "127.0.0.1:9000"
    asking = Asking(request, peer, made.caller, "edge/eastwest", "https", "shop/catalog#0", "/catalog/**", service, 0.0)
    if verdict is not None:
        policy = DecisionPolicy(name="shop/main", level="mesh", decision="shop.authz.decision", shadow=shadow)
        answer = Decision(verdict=verdict, kept=True, revision="sha256:1", reason="because", rule="web_reads")
        made.decisions.append((DecisionQuestion(policy, asking, None), answer))
    if admitted is not None:
        limit = QuotaLimit(name="shop/orders/caller", level="route", per=(), tokens=10, shadow=shadow)
        made.grants.append((TokenQuestion(limit, (caller,)), Grant(admitted=admitted)))
    return made


def the_document(asking: Asking, policy: DecisionPolicy) -> dict[str, Any]:
    """What a policy saw, in short."""
    head = asking.head
    headers = {name.decode(): value.decode("latin-1") for name, value in head.headers}
    target = head.target.decode("latin-1")
    http = {"method": head.method.decode("latin-1"), "path": target, "headers": {":path": target, **headers}}
    tree: dict[str, Any] = {"attributes": {"source": {"principal": asking.caller.principal}, "request": {"http": http}}}
    tree["parsed_query"] = {"token": ["secret"]} if head.query else {}
    tree["parsed_body"] = None
    if asking.body:
        http["body"] = asking.body.decode("latin-1")
        tree["parsed_body"] = {"password": "secret"}
    return tree


def a_decision_log(path: Path, which: Which = "all", *, full: bool = False) -> DecisionLog:
    """A decision log in a file."""
    return DecisionLog([line_sink(str(path))], the_document, which, full=full, labels={"id": "one"})


Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def samples(page: bytes) -> Samples:
    """What the reference parser reads from a page; fails on a sample that is there twice."""
    found: Samples = {}
    for family in text_string_to_metric_families(page.decode()):
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in found, key
            found[key] = sample.value
    return found


def of(page: bytes, name: str, **labels: str) -> float:
    """The sum of a metric's samples with at least these labels."""
    return sum(value for (found, has), value in samples(page).items() if found == name and set(labels.items()) <= has)
