"""Texts of many resources that are read again: what changed is parsed, and everything is where it is."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.documents import Document
from mesh.reading import read_documents
from mesh.rereading import Rereader
from mesh.workspace import Workspace

MAP = "apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: {0}}}\ndata:\n  a: |\n    --- no document\n  b: '{0}\n\n    ---'\n"
PARTS = st.one_of(
    st.sampled_from(
        ["", "# nothing\n", "{}\n", "\n\n", "--- # with a comment\n", "---x: 1\n", "...\n", "a: [\n", "&x a: *x\n", "\u2028\n", "\r"]
    ),
    st.integers(0, 5).map(lambda number: MAP.format(f"m{number}")),
    st.integers(0, 3).map(lambda number: "# moved\n" * number + MAP.format("one")),
)
TEXTS = st.lists(PARTS, max_size=8).map("---\n".join)


def placed(documents: tuple[Document, ...]) -> list[tuple[object, ...]]:
    return [
        (document.key, document.body, document.version, [document.origin.at(path) for path in document.origin.lines])
        for document in documents
    ]


@settings(deadline=None)
@given(st.lists(TEXTS, min_size=1, max_size=4))
def test_reading_again_is_reading(versions: list[str]) -> None:
    reader = Rereader("a.yaml")
    for text in versions:
        documents, problems = reader.read(text)
        whole, wrong = read_documents(text, "a.yaml")
        assert placed(documents)[: len(whole)] == placed(whole)
        assert [str(problem) for problem in problems][: len(wrong)] == [str(problem) for problem in wrong]
        assert wrong or len(documents) == len(whole)


def test_what_did_not_change_is_the_same_object_and_what_moved_says_so() -> None:
    reader = Rereader("a.yaml")
    texts = [MAP.format(name) for name in "xyz"]
    first, _ = reader.read("---\n".join(texts))
    texts[1] = "# new\n" + texts[1]
    second, _ = reader.read("---\n".join(texts))
    assert second[0] is first[0]
    assert second[2] == first[2].__class__(first[2].key, first[2].body, second[2].origin, first[2].version)
    assert second[2].origin.lines is first[2].origin.lines
    assert [document.origin.at(("kind",)) for document in first] == ["a.yaml:2", "a.yaml:12", "a.yaml:22"]
    assert [document.origin.at(("kind",)) for document in second] == ["a.yaml:2", "a.yaml:13", "a.yaml:23"]


def test_a_broken_document_hides_none_of_the_others() -> None:
    documents, problems = Rereader("a.yaml").read("---\n".join([MAP.format("x"), "a: [\n", MAP.format("y"), "b: *c\n"]))
    assert [document.key.name for document in documents] == ["x", "y"]
    assert [problem.where for problem in problems] == ["a.yaml:12", "a.yaml:23"]


def test_a_resource_that_has_moved_is_in_force_at_its_new_place() -> None:
    reader, workspace = Rereader("a.yaml"), Workspace()
    service = "apiVersion: v1\nkind: Service\nmetadata: {name: s, namespace: n}\nspec: {ports: [{port: 80}]}\n"
    before = workspace.update(upserts=reader.read(service)[0], replace=True)
    after = workspace.update(upserts=reader.read("# moved\n" + service)[0], replace=True)
    assert after is before
    ((_, document),) = workspace.in_force.items()
    assert document.origin.at(("spec",)) == "a.yaml:5"
    broken, _ = reader.read("# moved\n# again\n" + service.replace("80", "0"))
    (problem,) = workspace.update(upserts=broken, replace=True).problems
    assert problem.where == "a.yaml:6"
