"""What people get wrong, and what they are told: each sentence whole, since the sentence is the product."""

from __future__ import annotations

import pytest
from mesh_world import CASES, check

from mesh import formats
from mesh.kinds import KINDS, UNSUPPORTED, check_document
from mesh.reading import document_of
from mesh.schema import MOST_FAULTS

ROUTE = """apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {namespace: shop, name: cart}
spec:
  parentRefs: [{namespace: edge, name: gw}]
"""
GW = """apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {namespace: edge, name: gw}
spec:
  gatewayClassName: tollhouse
"""
TLS = """apiVersion: gateway.networking.k8s.io/v1
kind: BackendTLSPolicy
metadata: {namespace: shop, name: a}
spec:
  targetRefs: [{group: '', kind: Service, name: web}]
"""
Q = "targetRefs: [{group: gateway.networking.k8s.io, kind: HTTPRoute, name: cart}]\n"


def rule(text: str) -> str:
    return ROUTE + "  rules:\n  - " + text.replace("\n", "\n    ") + "\n"


def filt(text: str) -> str:
    return rule("filters:\n- " + text.replace("\n", "\n  "))


def lis(text: str) -> str:
    return GW + "  listeners:\n  - " + text.replace("\n", "\n    ") + "\n"


def own(kind: str, spec: str, namespace: str = "namespace: shop, ") -> str:
    return f"apiVersion: tollhouse.dev/v1\nkind: {kind}\nmetadata: {{{namespace}name: a}}\nspec:\n  " + spec.replace("\n", "\n  ") + "\n"


def core(kind: str, spec: str) -> str:
    return f"apiVersion: v1\nkind: {kind}\nmetadata: {{namespace: shop, name: a}}\n" + spec + "\n"


WRONG = [block.split("=>\n") for path in sorted(CASES.glob("wrong*.txt")) for block in path.read_text().split("########\n")]
"""A document that is wrong, and every sentence about it."""


@pytest.mark.parametrize(("text", "expected"), WRONG)
def test_what_is_wrong_is_said_with_its_place_and_a_way_out(text: str, expected: str) -> None:
    assert check(text) == expected.splitlines()


RIGHT = [
    rule("matches: [{path: {type: RegularExpression, value: '/a/[0-9]+'}, method: PATCH, headers: [{name: X-A, value: a}]}]"),
    rule(
        "name: main\nbackendRefs: [{name: web, port: 80, weight: 0, group: '', kind: Service}]\ntimeouts: {request: 0s, backendRequest: 1m}"
    ),
    rule("backendRefs: [{name: web, port: 80, filters: [{type: RequestHeaderModifier, requestHeaderModifier: {remove: [a]}}]}]"),
    filt("type: URLRewrite\nurlRewrite: {hostname: a.b, path: {type: ReplacePrefixMatch, replacePrefixMatch: ''}}"),
    filt("type: RequestRedirect\nrequestRedirect: {scheme: https, port: 8443, statusCode: 308}"),
    ROUTE + "  hostnames: ['*.shop.example', shop.example]\n  rules: null\n",
    ROUTE.replace("/v1", "/v1beta1") + "status: {parents: []}\n",
    ROUTE.replace("name: cart", "name: cart, labels: {a: b}, annotations: {c: d}, uid: x, generation: 3, managedFields: [{}]"),
    lis("{name: a, port: 443, protocol: HTTPS, tls: {certificateRefs: [{name: x}], options: {tollhouse.dev/min-tls-version: '1.3'}}}"),
    lis("{name: a, port: 80, protocol: HTTP, allowedRoutes: {namespaces: {from: Selector, selector: {matchLabels: {a: b}}}}}"),
    GW + "  listeners: [{name: a, port: 80, protocol: HTTP, hostname: a.b}, {name: b, port: 80, protocol: HTTP, hostname: b.b}]\n",
    TLS.replace("/v1", "/v1alpha3") + "  validation: {hostname: a.b, wellKnownCACertificates: System}\n",
    core(
        "Service",
        "spec: {clusterIP: 10.0.0.1, selector: {a: b}, sessionAffinity: None, ports: [{port: 80, targetPort: http, nodePort: 30000}]}",
    ),
    core("Secret", "type: Opaque\ndata: {a: YWJj}\nstringData: {b: c}"),
    own("Mesh", "trustDomain: a.b\ntrustDomainAliases: [old.b]\ntrustedProxies: [10.0.0.0/8, '::1/128']\npolicy: {maxStaleness: 5m}", ""),
    own("AccessPolicy", "provider: '[::1]:9191'\nmode: Shadow\nwithBody: {maxBytes: 1024, allowPartial: true}"),
    own("QuotaPolicy", Q + "strict: true\nlimits: [{name: a, tokens: 5, per: [identity, {header: X-Tenant}, {constant: all}]}]"),
]


@pytest.mark.parametrize("text", RIGHT)
def test_what_is_right_is_taken(text: str) -> None:
    assert check(text) == []


@pytest.mark.parametrize(("group", "kind"), [(group, kind) for group, kinds in UNSUPPORTED.items() for kind in kinds])
def test_kinds_that_do_not_work_here_are_refused_by_name(group: str, kind: str) -> None:
    (problem,) = check(f"apiVersion: {group}/v1\nkind: {kind}\nmetadata: {{name: a}}\nspec: {{}}\n")
    assert problem == f"{kind} a: kind: {group}/{kind} is not supported here; {UNSUPPORTED[group][kind]} (test.yaml:2)"
    assert (group, kind) not in KINDS


def test_one_document_never_gives_more_faults_than_can_be_read() -> None:
    assert len(check(core("ConfigMap", "data: {" + ", ".join(f"k{n}: 1" for n in range(500)) + "}"))) == 50


def test_a_secret_is_never_part_of_a_sentence() -> None:
    (problem,) = check(core("Secret", "data: {a: 'hunter2!'}"))
    assert "hunter2" not in problem


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("500ms", 0.5), ("15s", 15.0), ("1m30s", 90.0), ("1h", 3600.0), ("0s", 0.0), ("1h1m1s1ms", 3661.001), ("10s5s", 15.0)],
)
def test_durations(text: str, seconds: float) -> None:
    assert formats.duration(text) == ""
    assert formats.seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "1", "s", "1.5s", "-1s", "1d", "123456s", "1h1h1h1h1h", "1s ", "1S"])
def test_what_is_no_duration(text: str) -> None:
    assert formats.duration(text)


@pytest.mark.parametrize("value", [0.0, 0.001, 0.5, 1.0, 59.999, 90.0, 3661.001, 86400.0])
def test_durations_are_written_as_they_are_read(value: float) -> None:
    text = formats.duration_text(value)
    assert formats.duration(text) == ""
    assert formats.seconds(text) == value


def test_rules_see_no_wrong_values_however_much_is_wrong_before_them() -> None:
    rules = [{"fromCookies": [7] * 60}, {"issuer": "https://a", "outputClaimToHeaders": [{"header": [], "claim": "a"}]}]
    body = {"apiVersion": "security.istio.io/v1", "kind": "RequestAuthentication", "metadata": {"name": "q"}, "spec": {"jwtRules": rules}}
    assert len(check_document(document_of(body, "x"))) == MOST_FAULTS
