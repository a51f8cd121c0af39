"""Data with revisions of their own: names, digests, what clashes, and what a change of them changes."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.kinds import check_document
from mesh.policies import active_data_body, active_data_of, data_body, data_from_body
from mesh.policy import EntryPoint, ReadSet, Revision, digest_of
from mesh.policy_data import DataRevision, Root, canonical_value, clash, data_digest, root_of, value_at, with_data
from mesh.reading import document_of

NAMES = st.sampled_from(["a", "b", "größe", "x.y", " "])
ROOTS = st.lists(NAMES, max_size=3).map(tuple)
JSON: Any = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats(-2, 2) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=8,
)
OBJECTS = st.dictionaries(NAMES, JSON, max_size=3)


def revision(data: Any, *points: EntryPoint) -> Revision:
    text = canonical_value(data)
    return Revision(digest=digest_of({}, text), data=text, entry_points={each.path: each for each in points})


def part(root: Root, value: Any) -> DataRevision:
    text = canonical_value(value)
    return DataRevision(digest=data_digest(root, text), root=root, value=text)


def put(data: Any, root: Root, value: Any) -> Any:
    """As `with_data` does it, another way."""
    if not root:
        return value
    return {**data, root[0]: put(data.get(root[0], {}), root[1:], value)}


def has_room(data: Any, root: Root) -> bool:
    if not root:
        return data == {}
    return isinstance(data, dict) and (root[0] not in data or (len(root) > 1 and has_room(data[root[0]], root[1:])))


def point(*paths: tuple[str | int, ...], defined: tuple[tuple[str | int, ...], ...] = ()) -> EntryPoint:
    return EntryPoint(path="p", digest="d", reads=ReadSet(), data=paths, data_defined=defined)


@given(data=OBJECTS, root=ROOTS, value=JSON)
def test_they_are_where_their_root_is_and_everything_else_stays(data: Any, root: Root, value: Any) -> None:
    if not root and not isinstance(value, dict):
        value = {"a": value}
    room = has_room(data, root)
    assert (clash(canonical_value(data), root) == "") is room
    if not room:
        with pytest.raises(ValueError, match="clash"):
            with_data(revision(data), [part(root, value)])
        return
    made = with_data(revision(data), [part(root, value)])
    assert json.loads(made.data) == put(data, root, value)
    assert value_at(made.data, root) == canonical_value(value)
    assert made.policy == revision(data).digest != made.digest


@given(data=OBJECTS, other=OBJECTS, path=st.lists(NAMES | st.integers(0, 2), max_size=3).map(tuple))
def test_an_entry_point_is_another_exactly_when_what_it_reaches_is(data: Any, other: Any, path: tuple[str | int, ...]) -> None:
    root: Root = ("a",)

    def digest(value: Any, reached: EntryPoint) -> str:
        return with_data(revision({}, reached), [part(root, value)]).entry_points["p"].digest

    def reads(value: Any) -> Any:
        return value_at(canonical_value({"a": value}), path)

    assert (digest(data, point(path)) == digest(other, point(path))) is (reads(data) == reads(other))
    defined = point(defined=(path,))
    assert (digest(data, defined) == digest(other, defined)) is ((reads(data) is None) == (reads(other) is None))


def test_what_is_not_reached_keeps_its_digest_and_what_is_not_known_does_not() -> None:
    parts = [part(("shop", "grants"), {"a": 1})]
    for reached, same in [((("shop", "other"),), True), ((("shop", "grants", "a"),), False), ((("shop",),), False), (((),), False)]:
        made = with_data(revision({}, point(*reached)), parts)
        assert (made.entry_points["p"].digest == "d") is same
    unknown = EntryPoint(path="p", digest="d", reads=ReadSet())
    assert with_data(revision({}, unknown), parts).entry_points["p"].digest != "d"


def test_a_revision_is_named_by_its_policy_and_its_data_whatever_their_order() -> None:
    one, two = part(("a",), 1), part(("b",), 2)
    base = revision({})
    assert with_data(base, [one, two]).digest == with_data(base, [two, one]).digest
    found = {with_data(base, parts).digest for parts in ([one], [two], [one, two], [part(("a",), 2)])} | {base.digest}
    assert len(found) == 5
    assert data_digest(("a", "b"), b"1") != data_digest(("a/b",), b"1")


@given(root=ROOTS, value=JSON)
def test_documents_and_back(root: Root, value: Any) -> None:
    made = part(root, {"x": value} if not root else value)
    document = document_of(json.loads(json.dumps(data_body(made))), "test")
    assert check_document(document) == ()
    assert data_from_body(document.body) == made
    active = {root: made.digest}
    document = document_of(active_data_body(active), "test")
    assert check_document(document) == ()
    assert active_data_of(document.body["spec"]) == active


GOOD = data_body(part(("a",), {"b": 1}))["spec"]


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        ({**GOOD, "data": {"b": 2}}, "was changed after it was made"),
        ({**GOOD, "root": "c"}, "was changed after it was made"),
        ({**GOOD, "bundle": "https://a/b"}, "does not go with data"),
        ({**GOOD, "root": "a//b"}, "not a path below data"),
        ({**GOOD, "root": "", "data": 1}, "must be an object"),
        ({each: GOOD[each] for each in ("digest", "root")}, "is required, or bundle"),
        ({**GOOD, "more": 1}, "more"),
    ],
)
def test_a_revision_that_is_wrong_is_refused(spec: dict[str, Any], why: str) -> None:
    body = {**data_body(part(("a",), {"b": 1})), "spec": spec}
    problems = check_document(document_of(body, "test"))
    assert any(why in str(each) for each in problems), problems


def test_active_data_are_one_and_do_not_overlap() -> None:
    body = active_data_body({("a",): "sha256:" + "1" * 64, ("a", "b"): "sha256:" + "2" * 64})
    assert any("overlap" in str(each) for each in check_document(document_of(body, "test")))
    body = {**active_data_body({}), "metadata": {"name": "other"}}
    assert any("must be active" in str(each) for each in check_document(document_of(body, "test")))
    with pytest.raises(ValueError, match="path below data"):
        root_of("a\nb")
