"""What is wrong in a directory while a gateway runs on it: told at the field, by `validate`, `status` and `get`; all else goes on."""

from __future__ import annotations

import json
import socket
import ssl
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from e2e_world import tollhouse
from routes_world import Edge, gateway

from tests import servers

pytestmark = pytest.mark.e2e
GROUP = "gateway.networking.k8s.io"
GOOD = """
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {namespace: shop, name: good}
spec:
  parentRefs: [{namespace: edge, name: gw}]
  hostnames: [shop.example]
  rules: [{backendRefs: [{name: v1, port: 80}]}]
"""
TEN = """
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {namespace: shop, name: ten}
spec:
  parentRefs: [{namespace: edge, name: gw}]
  hostnames: [ten.example, 1.2.3.4]
  rules:
  - matches: [{path: {type: RegularExpression, value: "("}}]
    filters: [{type: URLRewrite, urlRewrite: {path: {type: ReplaceFullPath, replaceFullPath: no slash}}}]
    backendRefs: [{name: v1, port: 70000, weight: -1}]
  - matches: [{headers: [{name: "x y", value: a}]}, {method: FETCH}]
    filters: [{type: RequestHeaderModifier, requestHeaderModifier: {set: [{name: a, value: "b\\r\\nc: d"}]}}]
    timeouts: {request: 5x}
    retry: {codes: [200]}
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {namespace: shop, name: between}
spec:
  parentRefs: [{namespace: edge, name: gw}]
  hostnames: [between.example]
  rules: [{backendRefs: [{name: v2, port: 80}]}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTProute
metadata: {namespace: shop, name: kind}
spec: {}
"""
FIELDS = (
    "spec.hostnames[1]",
    "spec.rules[0].matches[0].path.value",
    "spec.rules[0].filters[0].urlRewrite.path.replaceFullPath",
    "spec.rules[0].backendRefs[0].port",
    "spec.rules[0].backendRefs[0].weight",
    "spec.rules[1].matches[0].headers[0].name",
    "spec.rules[1].matches[1].method",
    "spec.rules[1].filters[0].requestHeaderModifier.set[0].value",
    "spec.rules[1].timeouts.request",
    "spec.rules[1].retry.codes[0]",
)
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{after}: &{after} [{', '.join([f'*{before}'] * 9)}]\n" for before, after in zip("abcdefgh", "bcdefghi", strict=True)
)
CROSS = """
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {namespace: other, name: cross}
spec:
  parentRefs: [{namespace: edge, name: gw}]
  hostnames: [cross.example]
  rules: [{backendRefs: [{namespace: shop, name: v1, port: 80}]}]
"""
GRANT = """
apiVersion: gateway.networking.k8s.io/v1beta1
kind: ReferenceGrant
metadata: {namespace: shop, name: cross}
spec:
  from: [{group: gateway.networking.k8s.io, kind: HTTPRoute, namespace: other}]
  to: [{group: "", kind: Service}]
"""


@pytest.fixture
def edge() -> Iterator[Edge]:
    with gateway(GOOD) as running:
        yield running


def write(edge: Edge, name: str, text: str) -> None:
    new = edge.config.parent / "new"
    new.write_text(text)
    new.rename(edge.config / name)


def problems(edge: Edge) -> list[str]:
    """What `tollhouse status` of the running gateway tells of its configuration, as text."""
    done = tollhouse("status", "--admin", f"127.0.0.1:{edge.admin}", "-o", "json", check=False)
    return [json.dumps(each) for each in json.loads(done.stdout)["problems"]]


def condition(edge: Edge, kind: str, name: str, wanted: str) -> tuple[str, str]:
    """Status and reason of a route's condition, as `tollhouse get` shows it."""
    done = tollhouse("get", kind, name, "--config", str(edge.config), "-o", "json")
    status = json.loads(done.stdout)[0]["status"]
    conditions = status["parents"][0]["conditions"] if "parents" in status else status["conditions"]
    (found,) = [each for each in conditions if each["type"] == wanted]
    return found["status"], found["reason"]


def test_a_file_with_ten_errors_tells_all_ten_and_the_rest_goes_on(edge: Edge) -> None:
    write(edge, "ten.yaml", TEN)
    servers.wait_for("what is right in the file", lambda: edge.curl("/", host="between.example").status == 200)
    assert edge.curl("/").status == 200
    assert edge.curl("/", host="ten.example").status == 404
    told = tollhouse("validate", "-f", str(edge.config), check=False)
    assert told.returncode == 1
    shown = problems(edge)
    for field in FIELDS:
        assert f"HTTPRoute shop/ten: {field}: " in told.stdout
        assert any(field in each for each in shown), field
    assert "HTTProute" in told.stdout
    assert "did you mean HTTPRoute" in told.stdout


@pytest.mark.parametrize(
    "text",
    [BOMB, "[" * 10_000, "a: !!python/object/apply:os.system [id]\n", "\x00\x01", "a: b: c: d\n"],
    ids=["bomb", "deep", "tag", "binary", "no YAML"],
)
def test_a_file_that_is_no_manifest_takes_nothing_with_it(edge: Edge, text: str) -> None:
    write(edge, "bad.yaml", text)
    servers.wait_for("the problem", lambda: any("bad.yaml" in each for each in problems(edge)))
    assert edge.curl("/").status == 200
    write(edge, "more.yaml", GOOD.replace("name: good", "name: more").replace("shop.example", "more.example"))
    servers.wait_for("a change after it", lambda: edge.curl("/", host="more.example").status == 200)


def test_a_grant_that_is_withdrawn_closes_what_it_had_opened(edge: Edge) -> None:
    write(edge, "cross.yaml", CROSS)
    servers.wait_for("the route", lambda: edge.curl("/", host="cross.example").status == 500)
    write(edge, "grant.yaml", GRANT)
    servers.wait_for("the grant", lambda: edge.curl("/", host="cross.example").status == 200)
    assert condition(edge, "httproute", "other/cross", "ResolvedRefs") == ("True", "ResolvedRefs")
    (edge.config / "grant.yaml").unlink()
    servers.wait_for("its end", lambda: edge.curl("/", host="cross.example").status == 500)
    assert condition(edge, "httproute", "other/cross", "ResolvedRefs") == ("False", "RefNotPermitted")
    assert any("ReferenceGrant" in each for each in problems(edge))
    assert edge.curl("/").status == 200


def pair(days: int) -> tuple[str, str]:
    """A certificate that ends in so many days, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a.example")])
    end = datetime.now(UTC) + timedelta(days=days)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(end - timedelta(days=30))
        .not_valid_after(end)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return made.public_bytes(serialization.Encoding.PEM).decode(), private.decode()


def secret(name: str, chain: str, key: str) -> dict[str, Any]:
    metadata = {"namespace": "edge", "name": name}
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": metadata,
        "type": "kubernetes.io/tls",
        "stringData": {"tls.crt": chain, "tls.key": key},
    }


def test_listeners_that_cannot_be_served_are_told_and_the_others_are_served(edge: Edge) -> None:
    chain, key = pair(10)
    expired = pair(-1)
    base = (edge.config / "base.yaml").read_text()
    documents = [document for document in yaml.safe_load_all(base) if document is not None]
    gw = next(document for document in documents if document["kind"] == "Gateway")
    port, collision = servers.free_port(), servers.free_port()

    def listener(name: str, refs: list[str]) -> dict[str, Any]:
        tls = {"certificateRefs": [{"name": ref} for ref in refs]}
        return {"name": name, "hostname": f"{name}.example", "port": port, "protocol": "HTTPS", "tls": tls}

    gw["spec"]["listeners"] += [
        listener("fine", ["fine"]),
        listener("nowhere", ["nowhere"]),
        listener("expired", ["expired"]),
        listener("mismatched", ["mismatched"]),
        listener("secure", ["fine"]) | {"port": collision},
        {"name": "plain", "port": collision, "protocol": "HTTP"},
    ]
    secrets = [secret("fine", chain, key), secret("expired", *expired), secret("mismatched", chain, pair(10)[1])]
    write(edge, "base.yaml", yaml.safe_dump_all([*documents, *secrets]))

    def handshake(name: str) -> bool:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        try:
            with socket.create_connection(("127.0.0.1", port), 10) as sock, context.wrap_socket(sock, server_hostname=f"{name}.example"):
                return True
        except OSError:
            return False

    servers.wait_for("the new listener", lambda: handshake("fine"))
    assert not any(handshake(name) for name in ("nowhere", "expired", "mismatched"))
    assert edge.curl("/").status == 200
    status = json.loads(tollhouse("get", "gateway", "edge/gw", "--config", str(edge.config), "-o", "json").stdout)[0]["status"]
    found = {each["name"]: {item["type"]: (item["status"], item["reason"]) for item in each["conditions"]} for each in status["listeners"]}
    for name in ("nowhere", "expired", "mismatched"):
        assert found[name]["ResolvedRefs"] == ("False", "InvalidCertificateRef")
        assert found[name]["Programmed"][0] == "False"
    assert found["plain"]["Conflicted"] == found["secure"]["Conflicted"] == ("True", "ProtocolConflict")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", collision), 10)
    assert found["fine"]["Programmed"][0] == found["http"]["Programmed"][0] == "True"
    shown = "\n".join(problems(edge))
    assert "there is no Secret edge/nowhere" in shown
    assert "is not the key of its tls.crt" in shown
