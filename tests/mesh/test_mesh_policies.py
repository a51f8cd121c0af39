"""Policy revisions as documents."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mesh.kinds import check_document
from mesh.policies import active_policy_body, revision_body, revision_digest, revision_from_body, revision_name
from mesh.policy import EntryPoint, ReadSet, Revision, canonical_data, digest_of
from mesh.reading import document_from_json, document_of, read_documents
from mesh.writing import document_to_json, document_to_yaml

TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=10)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
DATA = st.dictionaries(TEXT, JSON, max_size=3)
PATHS = st.lists(st.lists(TEXT | st.integers(0, 9), max_size=3).map(tuple), max_size=3).map(tuple)
READS = st.builds(
    ReadSet,
    values=PATHS,
    defined=PATHS,
    lengths=PATHS,
    kinds=PATHS,
    volatile=st.lists(TEXT, max_size=2).map(tuple),
    widened=st.lists(TEXT, max_size=2).map(tuple),
)


@st.composite
def revisions(draw: st.DrawFn) -> Revision:
    modules = draw(st.dictionaries(TEXT, TEXT, max_size=3))
    data = json.dumps(draw(DATA)).encode()
    points = {
        path: EntryPoint(path=path, digest="d", reads=draw(READS), ttl=draw(st.none() | st.sampled_from([0.0, 0.5, 30.0, 3600.0])))
        for path in draw(st.lists(st.sampled_from(["a.b", "c.d", "e.f.g"]), unique=True))
    }
    return Revision(
        digest=digest_of(modules, data),
        modules=modules,
        data=canonical_data(data),
        entry_points=points,
        opa=draw(st.sampled_from(["", "1.9.0"])),
    )


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(revisions())
def test_a_revision_survives_being_written_and_read(revision: Revision) -> None:
    document = document_of(revision_body(revision), "x")
    assert check_document(document) == ()
    assert revision_from_body(document.body) == revision
    from_json, _ = document_from_json(document_to_json(document), "x", "1")
    assert from_json is not None
    (from_yaml,), problems = read_documents(document_to_yaml(document), "x")
    assert not problems
    for again in (from_json, from_yaml):
        assert check_document(again) == ()
        assert revision_from_body(again.body) == revision


@given(st.dictionaries(TEXT, TEXT, max_size=3), DATA, st.randoms())
def test_the_digest_is_about_content_and_not_layout(modules: dict[str, str], data: dict[str, Any], random: Any) -> None:
    names = list(modules)
    random.shuffle(names)
    fields = list(data)
    random.shuffle(fields)
    shuffled = json.dumps({field: data[field] for field in fields}, indent=2).encode()
    assert digest_of({name: modules[name] for name in names}, shuffled) == digest_of(modules, json.dumps(data).encode())


@pytest.mark.parametrize(
    ("modules", "data"),
    [
        ({"a": "x"}, b"{}"),
        ({"a": "", "b": "y"}, b"{}"),
        ({"ab": "y"}, b"{}"),
        ({"a": "by"}, b"{}"),
        ({"a": "y"}, b'{"a": 1}'),
        ({"a": "y"}, b'{"a": 1.0}'),
        ({"a": "y"}, b'{"a": true}'),
        ({"a": "y"}, b'{"a": "1"}'),
        ({"a": "y"}, b'{"a": null}'),
        ({}, b"{}"),
    ],
)
def test_other_content_has_another_digest(modules: dict[str, str], data: bytes) -> None:
    assert digest_of(modules, data) != digest_of({"a": "y"}, b"{}")


@pytest.mark.parametrize("data", [b"[]", b"1", b"{", b'{"a": NaN}', b'{"a": 1e999}', b"[" * 100_000])
def test_data_that_is_no_json_object_has_no_digest(data: bytes) -> None:
    with pytest.raises(ValueError, match=r".+"):
        digest_of({}, data)


def test_names_are_digests_that_dns_allows() -> None:
    digest = digest_of({}, b"{}")
    assert revision_name(digest) == digest.replace(":", "-")
    assert revision_digest(revision_name(digest)) == digest
    assert revision_name(revision_name(digest)) == revision_name(digest)


def test_the_active_policy() -> None:
    digest = digest_of({}, b"{}")
    document = document_of(active_policy_body(digest, revision_name(digest)), "x")
    assert check_document(document) == ()
    assert document.body["spec"] == {"revision": revision_name(digest), "shadow": revision_name(digest)}
    assert "shadow" not in active_policy_body(digest)["spec"]


def test_a_bundle_elsewhere_has_no_modules_here() -> None:
    revision = Revision(digest=digest_of({}, b"{}"), bundle="https://bundles.example/b.tar.gz")
    body = revision_body(revision)
    assert revision_from_body(body) == revision
    assert check_document(document_of(body, "x")) == ()
    body["spec"]["modules"] = {"a.rego": "package a"}
    assert "does not go with modules or data" in str(check_document(document_of(body, "x"))[0])
