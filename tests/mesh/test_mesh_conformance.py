"""The manifests of Gateway API's conformance tests: all of them are read, and the statuses that the tests ask for are what ours say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from mesh_world import config_map, tls_secret

from mesh.documents import Document, Key
from mesh.kinds_gateway import CONTROLLER, GATEWAY_GROUP
from mesh.reading import read_documents
from mesh.workspace import Workspace
from tests.install import install

HOME = install("gateway-api-conformance")
FILES = sorted((HOME / "tests").glob("*.yaml"))
INFRA = "gateway-conformance-infra"
CLASS = f"""
apiVersion: {GATEWAY_GROUP}/v1
kind: GatewayClass
metadata: {{name: tollhouse}}
spec: {{controllerName: {CONTROLLER}}}
"""
PLACEHOLDERS = {"PLACEHOLDER_UNUSABLE_ADDRS": "203.0.113.77", "PLACEHOLDER_USABLE_ADDRS": "127.0.0.1", "{GATEWAY_CLASS_NAME}": "tollhouse"}
PLACEHOLDERS["{GATEWAY_CONTROLLER_NAME}"] = CONTROLLER


def documents(path: Path) -> list[Document]:
    text = path.read_text()
    for name, value in PLACEHOLDERS.items():
        text = text.replace(name, value)
    found, problems = read_documents(text, path.name)
    assert problems == ()
    return list(found)


BASE = documents(HOME / "base" / "manifests.yaml")
MADE = [
    *(
        tls_secret(INFRA, name)
        for name in ("tls-validity-checks-certificate", "tls-checks-certificate", "tls-passthrough-checks-certificate")
    ),
    *(tls_secret("gateway-conformance-web-backend", name) for name in ("certificate",)),
    config_map(INFRA, "tls-checks-ca-certificate"),
    config_map(INFRA, "tls-validity-checks-ca-certificate"),
]
"""What the tests make when they run."""


def world(name: str) -> Workspace:
    made = Workspace()
    own = documents(HOME / "tests" / f"{name}.yaml")
    made.update(upserts=[*BASE, *MADE, *read_documents(CLASS, "class")[0], *own], replace=True)
    return made


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_nothing_in_the_manifests_is_refused_by_its_schema(path: Path) -> None:
    found = world(path.stem).snapshot.problems
    assert [str(problem) for problem in found if problem.reason in ("Invalid", "UnsupportedValue") and problem.severity == "error"] == []


def conditions(name: str, resource: str, part: str) -> dict[str, str]:
    """The conditions of a resource (`Kind name`, or `Kind namespace/name`), or of its listener, parent or ancestor `part`."""
    kind, _, full = resource.partition(" ")
    namespace, _, last = full.rpartition("/")
    status: Any = world(name).statuses("2026-01-01T00:00:00Z").of(Key(GATEWAY_GROUP, kind, namespace or INFRA, last))
    assert status is not None
    lists = {"": status.get("conditions", [])}
    lists |= {each["name"]: each["conditions"] for each in status.get("listeners", ())}
    lists |= {each["parentRef"]["name"]: each["conditions"] for each in status.get("parents", ())}
    lists |= {each["ancestorRef"]["name"]: each["conditions"] for each in status.get("ancestors", ())}
    return {each["type"]: f"{each['status']} {each['reason']}" for each in lists[part]}


SAME = "same-namespace"
CASES = [
    (
        "gateway-invalid-listeners-unsupported-protocol",
        "Gateway gateway-only-unsupported-protocols",
        "",
        "Accepted",
        "False ListenersNotValid",
    ),
    (
        "gateway-invalid-listeners-unsupported-protocol",
        "Gateway gateway-only-unsupported-protocols",
        "invalid",
        "Accepted",
        "False UnsupportedProtocol",
    ),
    (
        "gateway-invalid-listeners-unsupported-protocol",
        "Gateway gateway-supported-and-unsupported-protocols",
        "",
        "Accepted",
        "True ListenersNotValid",
    ),
    (
        "gateway-invalid-listeners-unsupported-protocol",
        "Gateway gateway-supported-and-unsupported-protocols",
        "http",
        "Accepted",
        "True Accepted",
    ),
    ("gateway-invalid-parameters-ref", "Gateway gateway-invalid-parameters-ref", "", "Accepted", "False InvalidParameters"),
    ("gateway-invalid-route-kind", "Gateway gateway-only-invalid-route-kind", "http", "ResolvedRefs", "False InvalidRouteKinds"),
    ("gateway-invalid-route-kind", "Gateway gateway-supported-and-invalid-route-kind", "http", "ResolvedRefs", "False InvalidRouteKinds"),
    *(
        ("gateway-invalid-tls-configuration", f"Gateway gateway-certificate-{what}", "https", "ResolvedRefs", "False InvalidCertificateRef")
        for what in ("nonexistent-secret", "unsupported-group", "unsupported-kind", "malformed-secret")
    ),
    *(
        (
            "gateway-invalid-tls-backend-configuration",
            f"Gateway gateway-client-certificate-{what}",
            "",
            "ResolvedRefs",
            "False InvalidClientCertificateRef",
        )
        for what in ("nonexistent-secret", "unsupported-group", "unsupported-kind", "malformed-secret")
    ),
    (
        "gateway-invalid-tls-backend-configuration",
        "Gateway gateway-client-certificate-missing-reference-grant",
        "",
        "ResolvedRefs",
        "False RefNotPermitted",
    ),
    (
        "gateway-secret-missing-reference-grant",
        "Gateway gateway-secret-missing-reference-grant",
        "https",
        "ResolvedRefs",
        "False RefNotPermitted",
    ),
    (
        "gateway-secret-invalid-reference-grant",
        "Gateway gateway-secret-invalid-reference-grant",
        "https",
        "ResolvedRefs",
        "False RefNotPermitted",
    ),
    (
        "gateway-secret-reference-grant-specific",
        "Gateway gateway-secret-reference-grant-specific",
        "https",
        "Programmed",
        "True Programmed",
    ),
    ("gateway-static-addresses", "Gateway gateway-static-addresses", "", "Accepted", "False UnsupportedAddress"),
    ("httproute-disallowed-kind", "HTTPRoute disallowed-kind", "tlsroutes-only", "Accepted", "False NotAllowedByListeners"),
    ("httproute-invalid-backendref-unknown-kind", "HTTPRoute invalid-backend-ref-unknown-kind", SAME, "ResolvedRefs", "False InvalidKind"),
    (
        "httproute-invalid-cross-namespace-backend-ref",
        "HTTPRoute invalid-cross-namespace-backend-ref",
        SAME,
        "ResolvedRefs",
        "False RefNotPermitted",
    ),
    (
        "httproute-invalid-cross-namespace-parent-ref",
        "HTTPRoute gateway-conformance-web-backend/invalid-cross-namespace-parent-ref",
        SAME,
        "Accepted",
        "False NotAllowedByListeners",
    ),
    (
        "httproute-invalid-nonexistent-backendref",
        "HTTPRoute invalid-nonexistent-backend-ref",
        SAME,
        "ResolvedRefs",
        "False BackendNotFound",
    ),
    (
        "httproute-invalid-parentref-not-matching-listener-port",
        "HTTPRoute httproute-listener-not-matching-route-port",
        SAME,
        "Accepted",
        "False NoMatchingParent",
    ),
    (
        "httproute-invalid-parentref-not-matching-section-name",
        "HTTPRoute httproute-listener-not-matching-section-name",
        SAME,
        "Accepted",
        "False NoMatchingParent",
    ),
    ("httproute-invalid-reference-grant", "HTTPRoute reference-grant", SAME, "ResolvedRefs", "False RefNotPermitted"),
    ("httproute-reference-grant", "HTTPRoute reference-grant", SAME, "ResolvedRefs", "True ResolvedRefs"),
    ("listenerset-allowed-namespace-none", "ListenerSet listenerset-not-allowed", "", "Accepted", "False NotAllowed"),
    ("listenerset-default-not-allowed", "ListenerSet listenerset-default-not-allowed", "", "Programmed", "False NotAllowed"),
    (
        "listenerset-allowed-namespace-selector",
        "ListenerSet gateway-api-listenerset-selector-allowed-ns/listenerset-in-selected-namespace",
        "",
        "Accepted",
        "True Accepted",
    ),
    *(
        (
            f"listenerset-{what}-conflict",
            f"ListenerSet listenerset-with-{what}-conflict-with-{with_}-{number}",
            "",
            "Programmed",
            "True Programmed" if number == 1 else "False ListenersNotValid",
        )
        for what in ("hostname", "protocol")
        for with_ in ("gateway", "listener-set")
        for number in (1, 2)
    ),
    (
        "listenerset-hostname-conflict",
        "ListenerSet listenerset-with-hostname-conflict-with-gateway-1",
        "hostname-conflict-with-gateway-listener",
        "Conflicted",
        "True HostnameConflict",
    ),
    (
        "listenerset-protocol-conflict",
        "Gateway gateway-with-listenerset-protocol-conflict",
        "protocol-conflict-with-gateway-listener",
        "Conflicted",
        "False NoConflicts",
    ),
    ("listenerset-dual-parentref-independence", "HTTPRoute route-dual-parentref-one", "ls-dual-parentref", "Accepted", "True Accepted"),
    (
        "listenerset-dual-parentref-independence",
        "HTTPRoute route-dual-parentref-one",
        "gateway-dual-parentref",
        "Accepted",
        "False NoMatchingParent",
    ),
    ("backendtlspolicy-conflict-resolution", "BackendTLSPolicy conflicted-without-section-name-1", SAME, "Accepted", "True Accepted"),
    ("backendtlspolicy-conflict-resolution", "BackendTLSPolicy conflicted-without-section-name-2", SAME, "Accepted", "False Conflicted"),
    ("backendtlspolicy-conflict-resolution", "BackendTLSPolicy not-conflicted-with-section-name", SAME, "Accepted", "True Accepted"),
    (
        "backendtlspolicy-invalid-ca-certificate-ref",
        "BackendTLSPolicy nonexistent-ca-certificate-ref",
        SAME,
        "Accepted",
        "False NoValidCACertificate",
    ),
    (
        "backendtlspolicy-invalid-ca-certificate-ref",
        "BackendTLSPolicy malformed-ca-certificate-ref",
        SAME,
        "ResolvedRefs",
        "False InvalidCACertificateRef",
    ),
    ("backendtlspolicy-invalid-kind", "BackendTLSPolicy invalid-kind", SAME, "ResolvedRefs", "False InvalidKind"),
    ("tcproute-invalid-non-tcp-listener", "TCPRoute tcp-route", "tcp-mixed-protocol-gateway", "Accepted", "False NotAllowedByListeners"),
    (
        "udproute-not-allowed-by-listeners",
        "UDPRoute udproute-not-allowed-by-listeners",
        "udproute-tls-only-gateway",
        "Accepted",
        "False NotAllowedByListeners",
    ),
    (
        "tlsroute-invalid-no-matching-listener-hostname",
        "TLSRoute tlsroute-hostname-mismatch-1",
        "gateway-tls-exact-hostname",
        "Accepted",
        "False NoMatchingListenerHostname",
    ),
]


@pytest.mark.parametrize(("name", "resource", "part", "condition", "wanted"), CASES)
def test_statuses_are_those_that_conformance_asks_for(name: str, resource: str, part: str, condition: str, wanted: str) -> None:
    assert conditions(name, resource, part)[condition] == wanted
