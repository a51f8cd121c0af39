"""Generated AuthorizationPolicies and requests: our library says what a real Envoy's RBAC filters say, told the same in their own words."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import http.client
import json
import random
import socket
import ssl
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from envoy_rbac import Body, bootstrap, http_listener, negated, tcp_listener, tls
from google.protobuf.json_format import ParseDict
from google.protobuf.struct_pb2 import Value

from identity.ca import Authority, write_identity
from tests import servers
from tests.conf.authorization_world import BASE, MESH, Judge, Request, compiled

pytestmark = pytest.mark.e2e

SETS = 60
REQUESTS = 50
"""For each set of policies."""
TCP_SETS = 24
TCP_CONNECTIONS = 12
CALLERS = (
    "",
    "spiffe://shop.example/ns/shop/sa/web",
    "spiffe://shop.example/ns/shop-dev/sa/web",
    "spiffe://shop.example/ns/edge/sa/batch",
    "spiffe://old.example/ns/shop/sa/web",
    "spiffe://bank.example/ns/shop/sa/web",
    "spiffe://bank.example/other",
)
IPS = ("127.0.0.1", "127.0.7.9")
CLIENTS = ("", "203.0.113.7", "127.0.7.9")
NAMES = ("a.example", "B.a.example", "")
CLAIMS: tuple[Any, ...] = (
    None,
    {"iss": "https://i.example/v2", "sub": "ann"},
    {"iss": "i", "sub": "bob", "aud": ["shop", "admin-1"], "azp": "c1", "groups": "ops", "realm": {"roles": ["writer", "x"]}},
    {"iss": "i", "sub": "", "aud": "shop", "groups": ["ops", "dev-1"], "realm": {"roles": "writer"}, "level": 3},
    {"iss": "prefixed", "sub": "carl", "groups": [], "realm": "roles", "azp": ["c1"]},
)
SOURCES = {
    "principals": (
        "*", "cluster.local/ns/shop/sa/web", "old.example/ns/edge/sa/batch", "shop.example/ns/shop*", "*/sa/web", "*example/ns/shop/sa/web",
        "bank.example/*", "shop.example/ns/shop/sa/web",
    ),
    "namespaces": ("shop", "shop-*", "*", "*dge", "s*p"),
    "serviceAccounts": ("batch", "shop/web", "shop-dev/web"),
    "ipBlocks": ("127.0.0.1", "127.0.0.0/16", "10.0.0.0/8", "127.0.7.0/24"),
    "remoteIpBlocks": ("203.0.113.0/24", "127.0.7.9", "127.0.0.1"),
    "requestPrincipals": ("*", "i/bob", "https://i.example/v2/ann", "i/*", "*/carl", "pre*", "*n", "*ple/v2/ann", "i"),
}  # fmt: skip
OPERATIONS = {
    "paths": ("/", "/a", "/a*", "*.html", "*", "/a/{*}", "/{*}/b", "/a/{**}", "/a/{*}/{**}", "/a/{**}/", "/*"),
    "methods": ("GET", "P*", "*T", "*"),
    "hosts": ("A.example", "*.a.example", "b*", "*", "*:8080", "a.example:*"),
    "ports": ("8080", "9999"),
}
CONDITIONS = {
    "request.headers[x-a]": ("*", "1", "2*", "*2"),
    "request.headers[X-B]": ("1", "*"),
    "request.headers[:method]": ("GET",),
    "request.auth.claims[groups]": ("ops", "dev-*", "*"),
    "request.auth.claims[realm][roles]": ("writer", "*x"),
    "request.auth.claims[level]": ("3", "*"),
    "request.auth.audiences": ("shop", "admin-*", "*"),
    "request.auth.presenter": ("c1", "*"),
    "request.auth.principal": ("i/bob", "*"),
    "source.ip": ("127.0.7.9",),
    "remote.ip": ("203.0.113.7", "127.0.0.0/8"),
    "source.namespace": ("shop", "*-dev"),
    "source.principal": ("*/sa/batch", "*"),
    "source.serviceAccount": ("shop/web",),
    "destination.ip": ("127.0.0.1", "10.0.0.0/8"),
    "destination.port": ("8080", "9999"),
    "connection.sni": ("a.example", "*.a.example", "*"),
}
TARGETS = (
    "/",
    "/a",
    "/a/",
    "/a/b",
    "/a/b/c",
    "/a/b/",
    "/ab",
    "/x/b",
    "/a.html",
    "/a?x=.html",
    "/a/b?q=1",
    "/a/b%20c",
    "/x.html?a=/a/b",
    "/a/~x!/b",
)
HOSTS = ("a.example", "A.EXAMPLE", "x.a.example", "b.example:8080", "a.example:8080", "other")


def some(rng: random.Random, table: dict[str, tuple[str, ...]], most: int) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for field in rng.sample(sorted(table), rng.randint(1, most)):
        name = field if rng.random() < 0.7 else negated(field)
        found[name] = rng.sample(table[field], rng.randint(1, min(3, len(table[field]))))
    return found


def a_source(rng: random.Random) -> dict[str, list[str]]:
    found = some(rng, SOURCES, 2)
    if any("erviceAccounts" in name for name in found):
        found = {
            name: values for name, values in found.items() if name not in ("principals", "notPrincipals", "namespaces", "notNamespaces")
        }
    return found


def a_condition(rng: random.Random) -> Body:
    key = rng.choice(sorted(CONDITIONS))
    found: Body = {"key": key}
    for name in rng.choice((("values",), ("notValues",), ("values", "notValues"))):
        found[name] = rng.sample(CONDITIONS[key], rng.randint(1, min(2, len(CONDITIONS[key]))))
    return found


def a_rule(rng: random.Random) -> Body:
    rule: Body = {}
    if rng.random() < 0.65:
        rule["from"] = [{"source": a_source(rng)} for _ in range(rng.randint(1, 2))]
    if rng.random() < 0.6:
        rule["to"] = [{"operation": some(rng, OPERATIONS, 2)} for _ in range(rng.randint(1, 2))]
    if rng.random() < 0.45:
        rule["when"] = [a_condition(rng) for _ in range(rng.randint(1, 2))]
    return rule


def a_set(rng: random.Random) -> list[Body]:
    found = []
    for number in range(rng.randint(1, 3)):
        action = rng.choice(("ALLOW", "ALLOW", "DENY"))
        rules = [a_rule(rng) for _ in range(rng.randint(0 if action == "ALLOW" and rng.random() < 0.1 else 1, 3))]
        metadata = {"namespace": "edge", "name": f"p{number}"}
        spec = {"action": action, **({"rules": rules} if rules else {})}
        found.append({"apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy", "metadata": metadata, "spec": spec})
    return found


def a_request(rng: random.Random) -> Request:
    names = rng.sample(("x-a", "x-b"), rng.randint(0, 2))
    headers = [(name, rng.choice(("1", "22", "12"))) for name in names]
    if names and rng.random() < 0.2:
        headers.append((names[0], "22"))
    return Request(
        method=rng.choice(("GET", "POST", "PUT")),
        target=rng.choice(TARGETS),
        caller=rng.choice(CALLERS),
        host=rng.choice(HOSTS),
        ip=rng.choice(IPS),
        client=rng.choice(CLIENTS),
        local="127.0.0.1",
        sni=rng.choice(NAMES),
        headers=tuple(headers),
        claims=rng.choice(CLAIMS),
    )


class Clients:
    """Identities, and connections with them that are kept."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        authorities = {domain: Authority.create(domain) for domain in ("shop.example", "old.example", "bank.example")}
        self.roots = b"".join(authority.bundle for authority in authorities.values()).decode()
        self.server = authorities["shop.example"].issue("spiffe://shop.example/ns/edge/sa/envoy", dns=("a.example",))
        for number, caller in enumerate(CALLERS):
            if caller:
                write_identity(authorities[caller.split("/")[2]].issue(caller), folder / str(number))
        self.open: dict[Any, http.client.HTTPConnection] = {}

    def context(self, caller: str) -> ssl.SSLContext:
        made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        made.check_hostname = False
        made.verify_mode = ssl.CERT_NONE
        if caller:
            own = self.folder / str(CALLERS.index(caller))
            made.load_cert_chain(own / "cert.pem", own / "key.pem")
        return made

    def dial(self, port: int, caller: str, ip: str, sni: str) -> ssl.SSLSocket:
        plain = socket.create_connection(("127.0.0.1", port), timeout=10, source_address=(ip, 0))
        return self.context(caller).wrap_socket(plain, server_hostname=sni or None)

    def status(self, port: int, number: int, request: Request) -> int:
        key = request.caller, request.ip, request.sni
        connection = self.open.get(key)
        if connection is None:
            connection = self.open[key] = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
            connection.sock = self.dial(port, *key)
        connection.putrequest(request.method, request.target, skip_host=True, skip_accept_encoding=True)
        connection.putheader("Host", request.host)
        connection.putheader("x-set", str(number))
        for name, value in request.headers:
            connection.putheader(name, value)
        if request.client:
            connection.putheader("x-forwarded-for", request.client)
        if request.claims is not None:
            connection.putheader("x-claims", base64.b64encode(ParseDict(request.claims, Value()).SerializeToString()).decode())
        if request.method != "GET":
            connection.putheader("content-length", "0")
        connection.endheaders()
        answer = connection.getresponse()
        answer.read()
        return answer.status

    def let_in(self, port: int, request: Request) -> bool:
        """Whether what a connection sends comes back."""
        try:
            with self.dial(port, request.caller, request.ip, request.sni) as sock:
                sock.sendall(b"x")
                return sock.recv(1) == b"x"
        except OSError:
            return False

    def close(self) -> None:
        for connection in self.open.values():
            connection.close()


@contextlib.contextmanager
def clients() -> Iterator[Clients]:
    with tempfile.TemporaryDirectory(prefix="tollhouse-rbac-") as folder:
        made = Clients(Path(folder))
        try:
            yield made
        finally:
            made.close()


async def said(sets: list[list[Body]], asked: list[list[Request]]) -> list[list[bool]]:
    """Whether our library lets each request pass."""
    async with Judge() as judge:
        found = []
        for policies, requests in zip(sets, asked, strict=True):
            snapshot = compiled(BASE, MESH, yaml.safe_dump_all(policies))
            assert not [problem for problem in snapshot.problems if problem.severity == "error"], (snapshot.problems, policies)
            ready = await judge.ready(snapshot)
            found.append([(await judge.judge(ready, request))[0].startswith("allow") for request in requests])
        return found


def repeats(request: Request) -> bool:
    """Whether a header is there twice. What lets such a request pass must fit the whole of it here, and with Envoy any field: we may refuse
    what Envoy lets pass, and never the other way round."""
    return len({name for name, _ in request.headers}) < len(request.headers)


def differences(sets: list[list[Body]], asked: list[list[Request]], ours: list[list[bool]], theirs: list[list[bool]]) -> list[str]:
    return [
        f"we say {us}, Envoy {them}: {msgspec.json.encode(request).decode()}\n{yaml.safe_dump_all([each['spec'] for each in policies])}"
        for policies, requests, own, others in zip(sets, asked, ours, theirs, strict=True)
        for request, us, them in zip(requests, own, others, strict=True)
        if us != them and not (repeats(request) and them)
    ]


@pytest.mark.parametrize("seed", [1, 2])
def test_requests_are_judged_as_by_envoy(seed: int) -> None:
    rng = random.Random(seed)
    sets = [a_set(rng) for _ in range(SETS)]
    asked = [[a_request(rng) for _ in range(REQUESTS)] for _ in sets]
    ours = asyncio.run(said(sets, asked))
    port = servers.free_port()
    with clients() as made:
        security = tls(made.server.chain.decode(), made.server.key.decode(), made.roots)
        config = json.dumps(bootstrap([http_listener(port, sets, security)]))
        with servers.envoy(config, port):
            statuses = [[made.status(port, number, request) for request in requests] for number, requests in enumerate(asked)]
    assert {status for each in statuses for status in each} == {200, 403}
    found = differences(sets, asked, ours, [[status == 200 for status in each] for each in statuses])
    assert not found, f"{len(found)} differences\n" + "\n".join(found[:5])
    passed = Counter(answer for each in ours for answer in each)
    assert min(passed.values()) > SETS * REQUESTS // 10, passed


def test_connections_are_judged_as_by_envoy() -> None:
    rng = random.Random(3)
    sets = [a_set(rng) for _ in range(TCP_SETS)]
    asked = [
        [
            Request(method="tcp", caller=rng.choice(CALLERS), ip=rng.choice(IPS), local="127.0.0.1", sni=rng.choice(NAMES))
            for _ in range(TCP_CONNECTIONS)
        ]
        for _ in sets
    ]
    ours = asyncio.run(said(sets, asked))
    ports = [servers.free_port() for _ in sets]
    with clients() as made:
        security = tls(made.server.chain.decode(), made.server.key.decode(), made.roots)
        config = json.dumps(bootstrap([tcp_listener(port, each, security) for port, each in zip(ports, sets, strict=True)]))
        with servers.envoy(config, ports[0]):
            for port in ports:
                servers.wait_for(f"port {port}", lambda port=port: servers.answers(port))
            theirs = [[made.let_in(port, request) for request in requests] for port, requests in zip(ports, asked, strict=True)]
    found = differences(sets, asked, ours, theirs)
    assert not found, f"{len(found)} differences\n" + "\n".join(found[:5])
    passed = Counter(answer for each in ours for answer in each)
    assert min(passed.values()) > 20, passed
