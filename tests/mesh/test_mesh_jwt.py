"""RequestAuthentications, good and bad: what is written is in force, or refused and guarded all the same."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mesh_world import BASE, read

from mesh.formats import decimal_duration, decimal_seconds
from mesh.jwks import parse_keys
from mesh.reading import document_of
from mesh.workspace import Workspace
from tests.tokens import jwk, jwks

JUNK = st.sampled_from([None, False, 7, "", "x", [], [7], {}, {"x": 1}, "https://a.example/\ud800", "http://[", "http://a:99999/", "é"])
URIS = st.sampled_from(["https://a.example", "http://127.0.0.1:1/jwks", "ftp://a.example", "https://a.example:0/"]) | JUNK
HEADERS = st.sampled_from(["x-a", "X-B", "host", "x_c", "x d"]) | JUNK
PREFIXES = st.sampled_from(["", "a "]) | JUNK
RULE = st.fixed_dictionaries(
    {},
    optional={
        "issuer": URIS,
        "audiences": st.lists(st.sampled_from(["a", ""]) | JUNK, max_size=2) | JUNK,
        "jwksUri": URIS,
        "jwks_uri": URIS,
        "jwks": st.sampled_from([jwks("d1"), '{"keys": []}', "{"]) | JUNK,
        "fromHeaders": st.lists(
            st.fixed_dictionaries({}, optional={"name": HEADERS, "prefix": st.sampled_from(["", "a "]) | JUNK}), max_size=2
        ),
        "fromParams": st.lists(st.sampled_from(["a"]) | JUNK, max_size=2) | JUNK,
        "fromCookies": st.lists(st.sampled_from(["a", "b c"]) | JUNK, max_size=2) | JUNK,
        "outputPayloadToHeader": HEADERS,
        "forwardOriginalToken": st.booleans() | JUNK,
        "outputClaimToHeaders": st.lists(st.fixed_dictionaries({}, optional={"header": HEADERS, "claim": st.sampled_from(["a.b"]) | JUNK})),
        "timeout": st.sampled_from(["1s", "1.5s", ".5s", "0.0s", "0s", "1h", "x"]) | JUNK,
        "spaceDelimitedClaims": st.lists(st.sampled_from(["a"]) | JUNK, max_size=1) | JUNK,
        "clockSkew": st.just("1s"),
    },
)
GROUPS = st.sampled_from(["gateway.networking.k8s.io", ""]) | JUNK
KINDS = st.sampled_from(["Gateway", "Service"]) | JUNK
REF = st.fixed_dictionaries({}, optional={"group": GROUPS, "kind": KINDS, "name": st.sampled_from(["gw", "web"]) | JUNK})
SPEC = (
    st.fixed_dictionaries(
        {},
        optional={
            "selector": st.sampled_from([{}, {"matchLabels": {"app": "x"}}, {"matchLabels": {"app": 7}}]) | JUNK,
            "targetRef": REF | JUNK,
            "targetRefs": st.lists(REF | JUNK, max_size=2) | JUNK,
            "jwtRules": st.lists(RULE | JUNK, max_size=3) | JUNK,
        },
    )
    | JUNK
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(SPEC, st.sampled_from(["edge", "istio-system", "other"]))
def test_whatever_is_written_is_in_force_or_refused_and_guards_all_the_same(spec: Any, namespace: str) -> None:
    workspace = Workspace()
    body = {
        "apiVersion": "security.istio.io/v1",
        "kind": "RequestAuthentication",
        "metadata": {"namespace": namespace, "name": "p"},
        "spec": spec,
    }
    document = document_of(body, "test", "1")
    found = workspace.update(upserts=[*read(BASE), document], replace=True)
    wrong = [problem for problem in found.problems if problem.key == document.key and problem.severity == "error"]
    assert workspace.statuses("2026-01-01T00:00:00Z").of(document.key) is not None
    here = found.gateways["edge/gw"].authentication
    if document.key in workspace.in_force:
        assert not here.broken
        rules = spec.get("jwtRules") if isinstance(spec, dict) else None
        assert len(here.rules) in {0, len(rules or [])}
        assert all(rule.keys.inline or rule.keys.uri or rule.keys.issuer for rule in here.rules)
    else:
        assert wrong
        assert here.rules == ()
        refs = (spec.get("targetRefs") or spec.get("targetRef")) if isinstance(spec, dict) else None
        selector = spec.get("selector") if isinstance(spec, dict) else None
        if namespace != "other" and not refs and not selector:
            assert here.broken
    for each in found.service_authentications:
        assert each.broken or document.key in workspace.in_force


MEMBERS = ("kty", "kid", "use", "alg", "key_ops", "crv", "n", "e", "x", "y", "k", "d")
VALUES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(max_size=8)
    | st.sampled_from(["RSA", "EC", "OKP", "oct", "P-256", "sig", "AQAB", "A" * 400])
)


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(["r1", "e1", "d1", "h1"]), st.dictionaries(st.sampled_from(MEMBERS), VALUES, max_size=3))
def test_whatever_a_key_is_the_others_are_read(name: str, changes: dict[str, Any]) -> None:
    found = parse_keys(json.dumps({"keys": [{**jwk(name), **changes}, jwk("f1")]}))
    assert found.keys[-1].kid == "f1"
    assert len(found.keys) + len(found.left_out) == 2


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1.5s", 1.5), ("500ms", 0.5), (".25s", 0.25), ("2.s", 2.0), ("1m1.5s", 61.5), ("0.5h", 1800.0), ("1.5", None), (".s", None),
        ("1..5s", None), ("-1s", None), ("1e3s", None), ("1.5 s", None), ("", None), ("s", None), ("1.5s ", None), ("\u0661s", None),
    ],
)  # fmt: skip
def test_durations_have_decimals_as_istio_has_them(text: str, seconds: float | None) -> None:
    assert (not decimal_duration(text)) == (seconds is not None)
    if seconds is not None:
        assert decimal_seconds(text) == seconds
