"""A small world for the tests of `mesh`: text in, snapshot out, and a snapshot as text that can be compared."""

from __future__ import annotations

import datetime
import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from mesh.documents import Document, Instance, Problem
from mesh.filters import HeaderChange, RetryPolicy
from mesh.kinds import check_document
from mesh.model import Backend, Cluster, DecisionPolicy, Listener, Match, QuotaLimit, Rule, Snapshot
from mesh.policies import active_policy_body, revision_body
from mesh.policy import EntryPoint, ReadSet, Revision, digest_of
from mesh.quota_services import RateLimitService
from mesh.reading import document_of, read_documents
from mesh.tokens import Authentication
from mesh.workspace import Workspace

CASES = Path(__file__).parent / "cases"
SHOP = Path(__file__).resolve().parents[2] / "conf" / "examples" / "shop"

BASE = """
apiVersion: gateway.networking.k8s.io/v1
kind: GatewayClass
metadata: {name: tollhouse}
spec: {controllerName: tollhouse.dev/gateway-controller}
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {namespace: edge, name: gw}
spec:
  gatewayClassName: tollhouse
  listeners:
  - {name: http, port: 8080, protocol: HTTP, allowedRoutes: {namespaces: {from: All}}}
---
apiVersion: v1
kind: Service
metadata: {namespace: shop, name: web}
spec: {ports: [{port: 80}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {namespace: shop, name: web-1, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
ports: [{port: 9000}]
endpoints: [{addresses: [127.0.0.1]}]
"""
"""A gateway and a service; tests add routes."""


def read(text: str, source: str = "test.yaml") -> tuple[Document, ...]:
    documents, problems = read_documents(text, source)
    assert not problems, [str(problem) for problem in problems]
    return documents


def check(text: str, source: str = "test.yaml") -> list[str]:
    """What is wrong with the documents of a text by themselves."""
    documents, problems = read_documents(text, source)
    return [str(problem) for problem in problems] + [str(problem) for document in documents for problem in check_document(document)]


def workspace(*texts: str, instances: Iterable[Instance] = ()) -> Workspace:
    made = Workspace()
    made.update(upserts=[document for text in texts for document in read(text)], instances=instances, replace=True)
    return made


def snapshot(*texts: str, instances: Iterable[Instance] = ()) -> Snapshot:
    return workspace(*texts, instances=instances).snapshot


def revision(*decisions: str, module: str = "package shop.authz\n") -> Revision:
    modules = {"authz.rego": module}
    points = {path: EntryPoint(path=path, digest="d-" + path, reads=ReadSet(values=(("parsed_path", 0),))) for path in decisions}
    return Revision(digest=digest_of(modules, b"{}"), modules=modules, entry_points=points, opa="1.9.0")


def activated(*decisions: str) -> list[Document]:
    """A PolicyRevision with these decisions, and the ActivePolicy that names it."""
    made = revision(*decisions)
    return [document_of(body, "policy") for body in (revision_body(made), active_policy_body(made.digest))]


@functools.cache
def authority() -> tuple[str, str]:
    """A self-signed certificate and its key, PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    now = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now)
        .not_valid_after(now + datetime.timedelta(days=36500))
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return certificate.public_bytes(serialization.Encoding.PEM).decode(), private.decode()


def config_map(namespace: str, name: str) -> Document:
    body = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"namespace": namespace, "name": name}, "data": {"ca.crt": authority()[0]}}
    return document_of(body, "made")


def tls_secret(namespace: str, name: str, **changes: Any) -> Document:
    chain, key = authority()
    body = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"namespace": namespace, "name": name},
        "type": "kubernetes.io/tls",
        "stringData": {"tls.crt": chain, "tls.key": key},
        **changes,
    }
    return document_of(body, "made")


def shop_documents() -> list[Document]:
    """The example mesh, with what is made for it at run time."""
    found = [document for path in sorted(SHOP.glob("*.yaml")) for document in read(path.read_text(), path.name)]
    return [*found, config_map("shop", "bank-ca")]


def problems_of(found: Snapshot) -> list[str]:
    return [describe(problem) for problem in found.problems]


def describe(problem: Problem) -> str:
    kept = ", kept" if problem.kept else ""
    return f"{problem.severity} {problem.reason}{kept}: {problem}"


def render(found: Snapshot) -> str:
    """A snapshot as text."""
    lines: list[str] = []
    for gateway in found.gateways.values():
        shows = " shows a certificate" if gateway.client_certificate else " lacks its certificate" if gateway.no_client_certificate else ""
        lines.append(f"gateway {gateway.key} {' '.join(gateway.addresses)}".rstrip() + shows)
        lines += [f"  {each}" for each in _authentication(gateway.authentication)]
        if gateway.proxy_ports:
            lines.append(f"  proxy protocol at {', '.join(map(str, gateway.proxy_ports))}")
        for listener in gateway.listeners:
            lines.append("  " + _listener(listener))
            lines += [f"    name {name} => {_rule(rule)}" for name, rule in listener.rules.items()]
            for host in listener.hosts.values():
                lines.append(f"    host {host.hostname}")
                matches = [*host.exact.values(), host.regex, *host.prefix.values()]
                lines += [f"      {_match(match)}" for group in matches for match in group]
    lines += [_cluster(cluster) for cluster in found.clusters.values()]
    lines += problems_of(found)
    return "\n".join(lines) + "\n"


def _listener(listener: Listener) -> str:
    tls = ""
    if listener.tls is not None:
        client = listener.tls.client
        tls = " tls " + ("svid" if listener.tls.svid else f"{len(listener.tls.certificates)} certificates")
        tls += f" >={listener.tls.min_version}" + (f" clients {client.mode} by {client.source}" if client else "")
    if listener.passthrough:
        tls = " tls passthrough"
    return f"listener {listener.name} {listener.protocol} {listener.port} {listener.hostname}{tls}"


def _match(match: Match) -> str:
    conditions = [match.method.decode()] if match.method else []
    conditions += [f"{item.name.decode()}{'~' + item.regex if item.regex else '=' + item.value.decode()}" for item in match.headers]
    conditions += [f"?{item.name}{'~' + item.regex if item.regex else '=' + item.value}" for item in match.queries]
    wanted = f" [{' '.join(conditions)}]" if conditions else ""
    return f"{match.path_kind} {match.path.decode() or '(root)'} {match.template}{wanted} => {_rule(match.rule)}"


def _rule(rule: Rule) -> str:
    parts = [rule.name]
    parts += [f"exempt from {each.policy} by {each.by}" for each in rule.exempt]
    parts += [f"ask {policy.level}:{policy.name}({policy.decision or policy.provider}{_auth(policy)})" for policy in rule.decisions]
    parts += [f"take {limit.level}:{limit.name}{_per(limit)}" for limit in rule.limits]
    parts += _headers("request", rule.request_headers) + _headers("response", rule.response_headers)
    parts += _filters(rule)
    if rule.cors is not None:
        cors = rule.cors
        allowed = ["*"] if cors.any_origin else [origin.decode() for origin in cors.origins]
        allowed += [f"{pattern.scheme.decode()}://*{pattern.suffix.decode()}:{pattern.port.decode()}" for pattern in cors.patterns]
        said = [cors.methods.decode(), cors.headers.decode(), cors.expose.decode()]
        parts.append(f"cors {' '.join(allowed)} {'with' if cors.credentials else 'without'} credentials {said} {cors.max_age}s")
    if rule.retry != RetryPolicy():
        retry = rule.retry
        pause = f"{'least' if retry.at_least else 'most'} {retry.backoff}"
        parts.append(f"retry {retry.attempts} on {list(retry.statuses)}{' and broken connections' * retry.connection} {pause}")
    if rule.session is not None:
        kept = rule.session
        kind = "header" if kept.header else f"cookie for {kept.path.decode()}" + ", permanent" * kept.permanent
        parts.append(f"session {kept.name.decode()} ({kind}) {kept.lifetime}")
    if rule.timeout != 15.0 or rule.backend_timeout is not None:
        parts.append(f"timeout {rule.timeout} try {rule.backend_timeout}")
    return " ".join([*parts, *(f"-> {_backend(backend)}" for backend in rule.backends)])


def _backend(backend: Backend) -> str:
    parts = [f"{backend.weight}*{backend.cluster or '(broken)'}"]
    parts += [f"ask {policy.level}:{policy.name}" for policy in backend.decisions]
    parts += [f"take {limit.name}{_per(limit)}" for limit in backend.limits]
    parts += _headers("request", backend.request_headers) + _headers("response", backend.response_headers)
    return " ".join(parts + _filters(backend) + _authentication(backend.authentication))


def _authentication(found: Authentication) -> list[str]:
    lines = [f"nothing passes: {found.broken}"] if found.broken else []
    for rule in found.rules:
        parts = [f"token {rule.name} of {rule.issuer or 'anybody'} by {rule.keys.name}"]
        parts += [f"within {rule.keys.timeout}s"] if not rule.keys.inline else []
        parts += [f"for {','.join(rule.audiences)}"] if rule.audiences else []
        places = [f"{name.decode()}[{prefix}]" for name, prefix in rule.headers]
        parts.append(f"in {' '.join([*places, *(f'?{name}' for name in rule.params), *(f'={name}' for name in rule.cookies)])}")
        parts += ["forwarded"] if rule.forward else []
        parts += [f"payload in {rule.payload_header.decode()}"] if rule.payload_header else []
        parts += [f"{'.'.join(path)} in {name.decode()}" for name, path in rule.claim_headers]
        if rule.space_delimited != ("permission", "scope"):
            parts.append(f"words of {','.join(rule.space_delimited)}")
        lines.append(" ".join(parts))
    return lines


def _per(limit: QuotaLimit) -> str:
    per = [f"{part.kind}[{part.argument}]" if part.argument else part.kind for part in limit.per]
    asked = limit.service
    where = f" asked {asked.cluster or 'nobody'} in {asked.domain}" + _sent(asked) if asked is not None else ""
    calendar = f" each {limit.calendar.unit} of {limit.calendar.zone};" if limit.calendar is not None else ""
    where += f" at most {limit.concurrency} at once{_shares(limit)}" if limit.concurrency else ""
    return where + (f" per {' '.join(per)};" if per else "") + calendar


def _shares(limit: QuotaLimit) -> str:
    shares = limit.shares
    if shares is None:
        return ""
    weights = [f"{value}*{weight}" for value, weight in shares.weights]
    by = " ".join([f", shared by {shares.kind}", *weights]) if shares.kind else ""
    return by + (f", {shares.reserve(limit.concurrency)} held back for {len(shares.important)}" if shares.important else "")


def _sent(service: RateLimitService) -> str:
    sent = f" sends {service.requests}/{service.unit}" if service.requests else ""
    return (f" keys {','.join(service.keys)}" if service.keys else "") + sent


def _auth(policy: DecisionPolicy) -> str:
    auth = policy.auth
    if auth is None:
        return ""
    shown = [b",".join(sorted(names)).decode() or "-" for names in (auth.headers, auth.copied)]
    return f" by {auth.protocol} path={auth.path.decode()} shows {shown[0]} copies {shown[1]} body {policy.body_limit}"


def _filters(holder: Rule | Backend) -> list[str]:
    parts = []
    if holder.rewrite is not None:
        parts.append(f"rewrite host={holder.rewrite.hostname.decode()} {holder.rewrite.path_mode}={holder.rewrite.path.decode()}")
    if holder.redirect is not None:
        to = holder.redirect
        parts.append(f"redirect {to.status} {to.scheme.decode()}://{to.hostname.decode()}:{to.port} {to.path_mode}={to.path.decode()}")
    return parts + [f"mirror {mirror.cluster} {mirror.numerator}/{mirror.denominator}" for mirror in holder.mirrors]


def _headers(which: str, change: HeaderChange | None) -> list[str]:
    if change is None:
        return []
    parts = [f"set {name.decode()}={value.decode()}" for name, value in change.set]
    parts += [f"add {name.decode()}={value.decode()}" for name, value in change.add]
    parts += [f"remove {name.decode()}" for name in change.remove]
    return [f"{which}({', '.join(parts)})"]


def _cluster(cluster: Cluster) -> str:
    words = [f"cluster {cluster.name}"]
    words += [
        word for word, there in (("gateway", cluster.gateway), ("external", cluster.external), ("within-tls", cluster.within_tls)) if there
    ]
    if cluster.tls is not None:
        words.append(f"tls={cluster.tls.mode}" + (f"({cluster.tls.hostname})" if cluster.tls.hostname else ""))
    if cluster.http2 != "auto":
        words.append(f"http2={cluster.http2}")
    if cluster.proxy_protocol:
        words.append(f"proxy={cluster.proxy_protocol}")
    for endpoint in cluster.endpoints:
        weight = f"*{endpoint.weight}" if endpoint.weight != 1 else ""
        words.append(f"{endpoint.address}:{endpoint.port}{weight}" + (f"<{','.join(endpoint.identities)}>" if endpoint.identities else ""))
    return " ".join(words)
