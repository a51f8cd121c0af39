"""From an AuthorizationPolicy to rules that `conf/istio/authz.rego` understands: data, with every pattern taken apart.

A rule has `from` and `to` (lists of groups, of which one must hold; none for any) and `when` (conditions that must all hold). A condition
names a fact (an attribute of Istio's) and has matchers: `in`, of which one must match one of the fact's values, and `out`, of which none
may. What a matcher means follows what Istio makes of it for Envoy (istio.io, "Authorization Policy", and its tables of RBAC filters).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from typing import Any, Final

from mesh.compile_matches import normal_path
from mesh.documents import Document
from mesh.kinds_istio import OPERATIONS, REST, SINGLE, SOURCES, names_in, negative

Matcher = dict[str, Any]
Json = dict[str, Any]

HTTP_ONLY: Final = ("request.", "host", "method", "path")
"""How the names of facts begin that a connection below HTTP doesn't have."""
EACH: Final = ", whole or in part"
"""Behind the name of a header: its fields one by one, too."""
LOCAL_DOMAIN: Final = "cluster.local"
"""In a policy: whatever the mesh's trust domain is called (Istio, "Trust Domain Migration")."""


def rules_of(document: Document, trust: tuple[str, ...]) -> list[Json]:
    """The rules of a checked policy. `trust`: the mesh's trust domain, then its aliases."""
    key = document.key
    name = f"{key.namespace}/{key.name}"
    found = []
    spec = document.body.get("spec") or {}
    grants = (spec.get("action") or "ALLOW") == "ALLOW"
    for index, rule in enumerate(spec.get("rules") or []):
        sources = [_group(item["source"], SOURCES, key.namespace, trust) for item in rule.get("from") or []]
        operations = [_group(item["operation"], OPERATIONS, key.namespace, trust) for item in rule.get("to") or []]
        conditions = [
            condition
            for item in rule.get("when") or []
            for condition in _directed(_condition(item["key"], item, "values", "notValues", key.namespace, trust), grants)
        ]
        found.append({"policy": name, "index": index, "from": sources, "to": operations, "when": conditions})
    return found


def below_http(rules: Iterable[Json], *, allow: bool) -> list[Json]:
    """What rules mean for connections without HTTP: a rule of an ALLOW policy that looks at a request allows none of them; of others,
    what looks at a request is left out, so that they hold for more (Istio, "Authorization for TCP traffic")."""
    found = []
    for rule in rules:
        if allow and any(_of_http(condition) for condition in _conditions(rule)):
            continue
        kept = {name: [[each for each in group if not _of_http(each)] for group in rule[name]] for name in ("from", "to")}
        found.append({**rule, **kept, "when": [each for each in rule["when"] if not _of_http(each)]})
    return found


def looks_at_requests(document: Document) -> bool:
    """Whether a checked policy has something that only a request has."""
    return any(_of_http(condition) for rule in rules_of(document, ("",)) for condition in _conditions(rule))


def facts_of(rules: Iterable[Json]) -> tuple[str, ...]:
    """The facts that rules look at."""
    return tuple(sorted({condition["fact"] for rule in rules for condition in _conditions(rule)}))


def expression(fact: str, port: int) -> str:
    """The Rego that gives a fact. `port`: of the service that is asked about; 0 for that of the connection."""
    if fact == "destination.port" and port:
        return f'["{port}"]'
    if fact.startswith("request.headers["):
        return f"authz.{'header_parts' if fact.endswith(EACH) else 'header'}({json.dumps(names_in(fact)[0])})"
    if fact.startswith("request.auth.claims["):
        return _claim(names_in(fact))
    return _EXPRESSIONS[fact]


def _read(names: tuple[str, ...]) -> str:
    path = "".join(f"[{json.dumps(name)}]" for name in ("envoy.filters.http.jwt_authn", "payload", *names))
    return f"[value | value := input.attributes.metadataContext.filterMetadata{path}]"


def _claim(names: tuple[str, ...]) -> str:
    spaced = len(names) == 1 and names[0] in ("scope", "permission")
    return f"authz.{'words' if spaced else 'claim'}({_read(names)})"


_EXPRESSIONS: Final = {
    "source.principal": "authz.principal",
    "source.namespace": "authz.namespace",
    "source.serviceAccount": "authz.service_account",
    "source.ip": "authz.source_ip",
    "remote.ip": "authz.remote_ip",
    "destination.ip": "authz.destination_ip",
    "destination.port": "authz.destination_port",
    "connection.sni": "authz.sni",
    "host": "authz.host",
    "method": "authz.method",
    "path": "authz.path",
    "request.auth.principal": f"authz.request_principal({_read(('iss',))}, {_read(('sub',))})",
    "request.auth.audiences": _claim(("aud",)),
    "request.auth.presenter": _claim(("azp",)),
}


def _conditions(rule: Json) -> list[Json]:
    return [condition for group in (*rule["from"], *rule["to"], rule["when"]) for condition in group]


def _of_http(condition: Json) -> bool:
    return str(condition["fact"]).startswith(HTTP_ONLY)


def _group(item: Any, table: Any, namespace: str, trust: tuple[str, ...]) -> list[Json]:
    return [
        _condition(fact, item, field, negative(field), namespace, trust)
        for field, (fact, _) in table.items()
        if item.get(field) or item.get(negative(field))
    ]


def _condition(key: str, item: Any, field: str, other: str, namespace: str, trust: tuple[str, ...]) -> Json:
    name = key
    if key.startswith("request.headers["):
        name = key.lower()  # names of header fields are not case-sensitive
    made: Json = {"fact": name}
    for side, values in (("in", item.get(field)), ("out", item.get(other))):
        if values:
            made[side] = [matcher for value in values for matcher in _matchers(name, value, namespace, trust)]
    return made


def _directed(condition: Json, grants: bool) -> list[Json]:
    """A condition on a header that may be there several times: what lets a request pass must fit the whole of them, and what holds it up
    need fit one only. (Envoy looks at each field by itself, and so would let pass by the one that fits.)"""
    fact = condition["fact"]
    if not fact.startswith("request.headers["):
        return [condition]
    found = []
    for side, matchers in condition.items():
        if side != "fact":
            whole = (side == "in") == grants
            found.append({"fact": fact if whole else fact + EACH, side: matchers})
    return found


def _matchers(fact: str, value: str, namespace: str, trust: tuple[str, ...]) -> list[Matcher]:
    if fact == "source.principal":
        return [_prefixed(named, "spiffe://") for named in _aliases(value, trust)]
    if fact.startswith("request.headers["):
        return [{"prefix": ""} if value == "*" else _string(value)]
    return [_BY_FACT.get(fact, _string)(value if fact != "source.serviceAccount" or "/" in value else f"{namespace}/{value}")]


def _string(value: str) -> Matcher:
    if value == "*":
        return {"present": True}
    if value.startswith("*"):
        return {"suffix": value[1:]}
    if value.endswith("*"):
        return {"prefix": value[:-1]}
    return {"exact": value}


def _exact(value: str) -> Matcher:
    return {"exact": value}


def _prefixed(value: str, prefix: str) -> Matcher:
    """As `_string`, of what comes after a prefix that values have and patterns don't."""
    if value == "*":
        return {"present": True}
    if value.startswith("*"):
        return {"regex": f"^{re.escape(prefix)}(?s:.*){_quoted(value[1:])}$"}
    return _string(prefix + value)


def _quoted(value: str) -> str:
    """As an expression of RE2 that stands for itself."""
    return "".join(char if char.isalnum() or char in "/_-" else f"\\x{{{ord(char):x}}}" for char in value)


def _aliases(value: str, trust: tuple[str, ...]) -> list[str]:
    """A principal in each of the mesh's trust domains, if it is of one of them (Istio, "Trust Domain Migration")."""
    domain, slash, rest = value.partition("/")
    if not slash or value.count("/") != 4 or (domain != LOCAL_DOMAIN and not any(_fits(domain, each) for each in trust)):
        return [value]
    # A pattern that stands for the domain already stays as it is.
    return list(dict.fromkeys(value if "*" in domain and _fits(domain, each) else f"{each}/{rest}" for each in trust))


def _fits(pattern: str, domain: str) -> bool:
    if pattern.startswith("*"):
        return domain.endswith(pattern[1:])
    return domain.startswith(pattern[:-1]) if pattern.endswith("*") else domain == pattern


def _namespace(value: str) -> Matcher:
    if "*" not in value:
        return {"exact": value}
    return {"regex": "^" + "(?s:.*)".join(map(_quoted, value.split("*"))) + "$"}


def _network(value: str) -> Matcher:
    return {"network": value if "/" in value else f"{value}/{128 if ':' in value else 32}"}


def _host(value: str) -> Matcher:
    return _string(value.lower())


def _path(value: str) -> Matcher:
    if SINGLE not in value and REST not in value:
        return _string(_normal(value))
    words = {SINGLE: "[^/]+", REST: "(?s:.*)"}
    return {"regex": "^" + "/".join(words.get(part) or _quoted(_normal(part)) for part in value.split("/")) + "$"}


def _normal(path: str) -> str:
    return normal_path(path).decode("ascii")


def _request_principal(value: str) -> Matcher:
    """The issuer and the subject: what comes before the last `/`, since issuers may be URLs, and what comes after it."""
    issuer, slash, subject = value.rpartition("/")
    anything = {"present": True}
    if value == "*":
        return {"issuer": anything, "subject": anything}
    if not slash:
        if value.startswith("*"):
            return {"issuer": anything, "subject": {"suffix": value[1:]}}
        if value.endswith("*"):
            return {"issuer": {"prefix": value[:-1]}, "subject": anything}
        return {"issuer": _exact(value), "subject": _exact("")}
    if value.startswith("*"):
        return {"issuer": anything if issuer == "*" else {"suffix": issuer[1:]}, "subject": _exact(subject)}
    if value.endswith("*"):
        return {"issuer": _exact(issuer), "subject": anything if subject == "*" else {"prefix": subject[:-1]}}
    return {"issuer": _exact(issuer), "subject": _exact(subject)}


_BY_FACT: Final[dict[str, Callable[[str], Matcher]]] = {
    "source.namespace": _namespace,
    "source.serviceAccount": _exact,
    "source.ip": _network,
    "remote.ip": _network,
    "destination.ip": _network,
    "destination.port": _exact,
    "host": _host,
    "connection.sni": _host,
    "path": _path,
    "request.auth.principal": _request_principal,
}
