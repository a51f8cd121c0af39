"""Text to documents and back: lines, lists, bounds, and what is refused."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mesh_world import check, read

from mesh import reading
from mesh.documents import Document, Key, Origin
from mesh.kinds import Fault, key_of
from mesh.reading import digest_of_body, document_from_json, document_of, read_documents
from mesh.scalars import scalar
from mesh.writing import document_to_json, document_to_yaml, documents_to_yaml

HEAD = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: a}\n"


def wrong(text: str | bytes) -> str:
    _, problems = read_documents(text, "a.yaml")
    assert len(problems) == 1
    return str(problems[0])


def test_documents_know_their_lines() -> None:
    first, second = read(
        "# comment\napiVersion: v1\nkind: ConfigMap\nmetadata:\n  name: a\ndata:\n  x: |\n    1\n    2\n  y: '3'\n---\n\n" + HEAD
    )
    assert first.key == Key("", "ConfigMap", "default", "a")
    assert first.body["data"] == {"x": "1\n2\n", "y": "3"}
    assert [first.origin.at(path) for path in ((), ("metadata", "name"), ("data", "x"), ("data", "y"), ("data", "z"))] == [
        "test.yaml:2",
        "test.yaml:5",
        "test.yaml:7",
        "test.yaml:10",
        "test.yaml:6",
    ]
    assert second.origin.at(()) == "test.yaml:13"


def test_a_list_is_taken_apart_and_its_items_keep_their_lines() -> None:
    text = (
        "apiVersion: v1\nkind: List\nitems:\n- apiVersion: v1\n  kind: Namespace\n  metadata: {name: a}\n"
        "- apiVersion: v1\n  kind: Namespace\n  metadata:\n    name: b\n"
    )
    documents = read(text)
    assert [str(document.key) for document in documents] == ["Namespace a", "Namespace b"]
    assert documents[1].origin.at(("metadata", "name")) == "test.yaml:10"


def test_empty_documents_are_no_documents() -> None:
    assert read("---\n---\n# nothing\n---\nnull\n") == ()


def test_the_version_is_that_of_the_body_alone() -> None:
    one, two = read(HEAD)[0], read("# moved\n\n" + HEAD)[0]
    assert one.version == two.version
    assert one.version != read(HEAD + "data: {a: b}\n")[0].version


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: [1, 2", "not valid YAML: while parsing a flow sequence, did not find expected ',' or ']' (a.yaml:2)"),
        ("a: 1\na: 2", 'a: the field "a" is there twice in one mapping, first in line 1 (a.yaml:2)'),
        (HEAD + "data:\n  x: '1'\n  y: '2'\n  x: '3'\n", 'data.x: the field "x" is there twice in one mapping, first in line 5 (a.yaml:7)'),
        ("- a", "a document is a mapping with apiVersion, kind and metadata (a.yaml:1)"),
        ("kind: X", "apiVersion: is missing; every document begins with apiVersion, kind and metadata (a.yaml:1)"),
        ("apiVersion: v1\nkind: Service\nmetadata: {}\n", "metadata.name: is missing; every Service needs a name (a.yaml:3)"),
        (
            "apiVersion: v1\nkind: Service\nmetadata:\n  name: A_b\n",
            "metadata.name: \"A_b\" is not a DNS name; use lower-case letters, digits, '-' and '.', at most 253, "
            "with a letter or digit at both ends (a.yaml:4)",
        ),
        ("apiVersion: v1\nkind: List\nitems: {}\n", "items: a List needs items: a list of resources (a.yaml:3)"),
        ("a: *b", "a: *b refers to an anchor that is not defined before it (a.yaml:1)"),
        (
            "a: !!python/object:os.system x",
            'a: the tag "tag:yaml.org,2002:python/object:os.system" is not supported: write plain values (a.yaml:1)',
        ),
        ("a: !!int x", 'a: "x" does not fit its tag !!int (a.yaml:1)'),
        ("? [a, b]\n: c", "the name of a field must be a string (a.yaml:1)"),
        ("a: {<<: [1]}", "a: << merges mappings, and this is not one (a.yaml:1)"),
        ("a: " + "[" * 80 + "]" * 80, "a" + "[0]" * 64 + ": more than 64 lists and mappings inside each other (a.yaml:1)"),
        (b"a: \xff", "not valid YAML: "),
    ],
)
def test_text_that_is_refused(text: str | bytes, expected: str) -> None:
    assert wrong(text).startswith(expected) if expected.endswith(": ") else wrong(text) == expected


def test_a_broken_place_does_not_hide_the_documents_before_it() -> None:
    documents, problems = read_documents(HEAD + "---\na: [\n", "a.yaml")
    assert [str(document.key) for document in documents] == ["ConfigMap default/a"]
    assert len(problems) == 1


def test_anchors_cannot_blow_up() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    assert "values (with all that its aliases stand for)" in wrong("\n".join(lines))


def test_merges_cannot_blow_up() -> None:
    first = "a0: &a0 {" + ", ".join(f"k{n}: 1" for n in range(1000)) + "}\n"
    more = "".join(f"b{n}: {{<<: *a0}}\n" for n in range(600))
    assert "values (with all that its aliases stand for)" in wrong(first + more)


def test_deep_nesting_is_refused_before_it_costs_a_stack() -> None:
    assert "inside each other" in wrong("[" * 500)
    assert wrong("[" * 200_000)
    assert "too deep" in str(document_from_json("[" * 200_000, "etcd", "1")[1][0])
    assert "inside each other" in str(document_from_json("[" * 80 + "]" * 80, "etcd", "1")[1][0])


def test_size_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MOST_BYTES", 10)
    assert wrong(HEAD) == f"the text has {len(HEAD)} bytes; at most 10 are read: split it (a.yaml)"
    assert document_from_json(b"{" + b" " * 20 + b"}", "etcd", "1")[0] is None


def test_nothing_in_a_file_can_begin_a_line_of_the_log() -> None:
    for text in (
        '"a\\nb": 1\n"a\\nb": 2\n',
        "a: !<x%0Ay> b",
        HEAD + '"x\\ny": 1\n',
        'apiVersion: v1\nkind: "A\\nB"\n',
        'apiVersion: v1\nkind: A\nmetadata: {name: "a\\nb"}\n',
    ):
        assert check(text)
        assert all(problem.isprintable() for problem in check(text)), check(text)


def test_anchors_and_merges_work() -> None:
    (document,) = read(HEAD + "data: {x: '1', <<: &more {x: '2', y: '3'}}\nbinaryData: *more\n")
    assert document.body["data"] == {"x": "1", "y": "3"}
    assert document.body["binaryData"] == {"x": "2", "y": "3"}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *[(word, True) for word in ("true", "True", "yes", "Yes", "on", "ON")],
        *[(word, False) for word in ("false", "no", "off", "OFF")],
        *[(word, None) for word in ("", "~", "null")],
        ("y", "y"),
        ("n", "n"),
        ("10", 10),
        ("-1", -1),
        ("010", 8),
        ("0o10", 8),
        ("0x1F", 31),
        ("0b11", 3),
        ("1_000", 1000),
        ("1.5", 1.5),
        ("1e3", 1000.0),
        (".5", 0.5),
        ("1:30", "1:30"),
        ("2026-01-01", "2026-01-01"),
        (".inf", ".inf"),
        (".nan", ".nan"),
        ("1e999", "1e999"),
        ("1.2.3.4", "1.2.3.4"),
        ("10s", "10s"),
        ("-", "-"),
        ("+", "+"),
        ("08", 8.0),
    ],
)
def test_plain_scalars(text: str, value: object) -> None:
    assert scalar(text) == value
    assert type(scalar(text)) is type(value)


def test_names_of_fields_stay_strings() -> None:
    assert read(HEAD + "data: {on: 'x', 8080: 'y', true: 'z'}\n")[0].body["data"] == {"on": "x", "8080": "y", "true": "z"}


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("{", "not valid JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1) (etcd)"),
        ('{"a": 1, "a": 2}', 'the field "a" is there twice in one mapping (etcd)'),
        ('{"a": NaN}', "NaN is not a JSON number (etcd)"),
        ("[]", "a document is a mapping with apiVersion, kind and metadata (etcd)"),
        ('{"a": "\\ud800"}', "a string has half a surrogate pair, which is no character (etcd)"),
    ],
)
def test_json_that_is_refused(body: str, expected: str) -> None:
    document, problems = document_from_json(body, "etcd", "1")
    assert document is None
    assert [str(problem) for problem in problems] == [expected]


def test_a_document_from_json_has_the_version_that_it_is_given() -> None:
    (document,) = read(HEAD)
    again, problems = document_from_json(document_to_json(document), "etcd", "17")
    assert again == Document(document.key, document.body, Origin("etcd"), "17")
    assert not problems


def test_a_body_that_is_no_resource_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^kind: is missing; every document begins with apiVersion, kind and metadata \(here\)$"):
        document_of({"apiVersion": "v1"}, "here")


TEXTS = st.text(st.characters(exclude_categories=("Cs",)), max_size=30) | st.sampled_from(
    [
        "",
        "yes",
        "on",
        "1e3",
        "010",
        "0x1",
        "null",
        "~",
        "- a",
        "a: b",
        "#",
        "<<",
        "=",
        "a\nb",
        "a\n",
        "\n",
        " a",
        "a ",
        "\t",
        "1_0",
        "'",
        '"',
        "|",
        "1:30",
    ]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=20,
)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.dictionaries(TEXTS, VALUES, max_size=4), min_size=1, max_size=3))
def test_what_is_printed_reads_the_same(bodies: list[dict[str, object]]) -> None:
    documents = []
    for number, body in enumerate(bodies):
        whole = {**body, "apiVersion": "example.org/v1", "kind": "Thing", "metadata": {"name": f"a{number}", "x": body}}
        documents.append(Document(Key("example.org", "Thing", "", f"a{number}"), whole, Origin("x"), digest_of_body(whole)))
    again = read(documents_to_yaml(documents))
    assert [(document.key, document.body, document.version) for document in again] == [
        (document.key, document.body, document.version) for document in documents
    ]
    assert repr([document.body for document in again]) == repr([document.body for document in documents])
    for document in documents:
        found, _ = document_from_json(document_to_json(document), "x", document.version)
        assert found is not None
        assert repr(found.body) == repr(document.body)


@settings(max_examples=300, deadline=None)
@given(
    st.text(max_size=200)
    | st.lists(st.sampled_from(["a", ":", " ", "\n", "- ", "[", "]", "{", "}", "&x ", "*x", "!!int ", "'", '"', "|", "<<"])).map("".join)
)
def test_any_text_gives_documents_and_problems_and_no_exception(text: str) -> None:
    read_documents(text, "a.yaml")
    document_from_json(text, "etcd", "1")


@given(VALUES)
def test_anything_has_a_key_or_a_reason(value: object) -> None:
    assert isinstance(key_of(value), (Key, Fault))


def test_printing_is_readable() -> None:
    (document,) = read(HEAD + "data:\n  policy.rego: |\n    package a\n    allow := true\n  yes: 'on'\n")
    assert document_to_yaml(document) == (
        'apiVersion: v1\nkind: ConfigMap\nmetadata:\n  name: a\ndata:\n  policy.rego: |\n    package a\n    allow := true\n  "yes": "on"\n'
    )
    assert json.loads(document_to_json(document)) == document.body
