from __future__ import annotations

from mesh.policy import EntryPoint, ReadSet, Revision
from pdp.difference import DecisionChange, difference


def point(path: str, digest: str, *reads: str, volatile: tuple[str, ...] = ()) -> EntryPoint:
    return EntryPoint(path=path, digest=digest, reads=ReadSet(values=tuple((name,) for name in reads), volatile=volatile))


def revision(modules: dict[str, str], data: bytes = b"{}", *points: EntryPoint) -> Revision:
    return Revision(digest="sha256:x", modules=modules, data=data, entry_points={each.path: each for each in points})


def test_modules() -> None:
    found = difference(revision({"a": "1\n2\n", "b": "x\n", "c": "same"}), revision({"a": "1\n3\n4\n", "d": "y\n", "c": "same"}))
    assert [(each.name, each.change, each.added, each.removed) for each in found.modules] == [
        ("a", "changed", 2, 1),
        ("b", "removed", 0, 1),
        ("d", "added", 1, 0),
    ]
    assert found.modules[0].text.splitlines() == ["--- a/a", "+++ b/a", "@@ -1,2 +1,3 @@", " 1", "-2", "+3", "+4"]


def test_a_line_that_looks_like_a_head_is_counted() -> None:
    (found,) = difference(revision({"a": "-- x\n"}), revision({"a": "++ y\n"})).modules
    assert (found.added, found.removed) == (1, 1)


def test_data() -> None:
    before = b'{"a":{"b":{"c":{"d":1}},"gone":1,"same":[1]},"x":1}'
    after = b'{"a":{"b":{"c":{"d":2}},"new":1,"same":[1]},"x":[1]}'
    assert difference(revision({}, before), revision({}, after)).data == (
        ("data.a.b.c", "changed"),
        ("data.a.gone", "removed"),
        ("data.a.new", "added"),
        ("data.x", "changed"),
    )


def test_decisions() -> None:
    old = (point("a.same", "1", "x"), point("a.changed", "1", "x", "y"), point("a.gone", "1", "x"))
    new = (point("a.same", "1", "x"), point("a.changed", "2", "x", "z", volatile=("time.now_ns",)), point("a.new", "1", "x"))
    found = difference(revision({}, b"{}", *old), revision({}, b"{}", *new))
    assert found.same == ("a.same",)
    assert found.decisions == (
        DecisionChange(path="a.changed", change="changed", reads_more=("input.z",), reads_less=("input.y",), keepable=(True, False)),
        DecisionChange(path="a.gone", change="removed", reads_less=("input.x",)),
        DecisionChange(path="a.new", change="added", reads_more=("input.x",)),
    )
