"""What decisions change of heads and queries."""

from __future__ import annotations

from urllib.parse import parse_qsl

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.changed import changed_fields, changed_request, changed_target
from mesh.http import Header
from mesh.questions import Decision, FieldChange, Verdict

HEAD: list[Header] = [(b"x", b"1"), (b"y", b"a"), (b"x", b"2"), (b"cookie", b"k=v"), (b"empty", b"")]


@pytest.mark.parametrize(
    ("change", "there", "gone"),
    [
        (FieldChange(b"x", b"3"), [(b"x", b"3")], 1),
        (FieldChange(b"X", b"3"), [(b"x", b"3")], 1),
        (FieldChange(b"z", b"3"), [(b"z", b"3")], -1),
        (FieldChange(b"x", b"3", "add"), [(b"x", b"1"), (b"x", b"2"), (b"x", b"3")], -1),
        (FieldChange(b"x", b"3", "append"), [(b"x", b"1,3"), (b"x", b"2")], 0),
        (FieldChange(b"x", b"", "append"), [(b"x", b"1"), (b"x", b"2")], 0),
        (FieldChange(b"empty", b"3", "append"), [(b"empty", b"3")], 0),
        (FieldChange(b"cookie", b"a=b", "append"), [(b"cookie", b"k=v; a=b")], 0),
        (FieldChange(b"z", b"3", "append"), [], 0),
        (FieldChange(b"x", b"3", "if_absent"), [(b"x", b"1"), (b"x", b"2")], 0),
        (FieldChange(b"z", b"3", "if_absent"), [(b"z", b"3")], -1),
        (FieldChange(b"x", b"3", "if_present"), [(b"x", b"3")], 1),
        (FieldChange(b"z", b"3", "if_present"), [], 0),
    ],
)
def test_actions(change: FieldChange, there: list[Header], gone: int) -> None:
    before = list(HEAD)
    made = changed_fields(HEAD, (change,), frozenset())
    assert [field for field in made if field[0] == change.name.lower()] == there
    assert len(HEAD) - len(made) == gone
    assert before == HEAD
    assert changed_fields(HEAD, (change,), frozenset((change.name.lower(),))) == HEAD


def test_one_after_the_other() -> None:
    changes = (FieldChange(b"a", b"1", "if_absent"), FieldChange(b"a", b"2", "if_absent"), FieldChange(b"a", b"3", "append"))
    assert changed_fields([], changes, frozenset()) == [(b"a", b"1,3")]
    decision = Decision(verdict=Verdict.ALLOW, headers=((b"a", b"0"),), changes=changes, headers_to_remove=(b"b",))
    assert changed_request([(b"b", b"x"), (b"te", b"trailers")], [decision]) == [(b"te", b"trailers"), (b"a", b"0,3")]
    assert changed_request([], [decision, Decision(verdict=Verdict.ALLOW, headers_to_remove=(b"A",))]) == []


@pytest.mark.parametrize(
    ("target", "sets", "removes", "wanted"),
    [
        (b"/a", (("z", "1"),), (), b"/a?z=1"),
        (b"/a?", (("z", "1"),), (), b"/a?z=1"),
        (b"/a?q=1&r=2&q=3", (("q", "9"),), (), b"/a?q=9&r=2"),
        (b"/a?q=1&r=2&q=3", (), ("q",), b"/a?r=2"),
        (b"/a?q=1&q=3", (), ("q",), b"/a"),
        (b"/a?q=1&r=2", (("q", "9"), ("q", "10")), (), b"/a?q=10&r=2"),
        (b"/a?q=1&r=2", (("q", "9"), ("n", "1")), ("q", "n"), b"/a?r=2"),
        (b"/a?r&b=%20", (), ("k",), b"/a?r&b=%20"),
        (b"/a?%71=1&r=2", (), ("q",), b"/a?r=2"),
        (b"/a?%71=1&r=2", (("q", "2"),), (), b"/a?q=2&r=2"),
        (b"/a?a+b=1", (), ("a b",), b"/a"),
        (b"/a", (("a b", "x y"),), (), b"/a?a%20b=x%20y"),
        (b"/a", (("z", "1&admin=1"),), (), b"/a?z=1%26admin=1"),
        (b"/a", (("z", "1#x"),), (), b"/a?z=1%23x"),
        (b"/a", (("z", "%20+%zz"),), (), b"/a?z=%20+%25zz"),
        (b"/a", (("z", "\r\nx: y"),), (), b"/a?z=%0D%0Ax:%20y"),
        (b"/a", (("\u00e9=&", "\u00e9"),), (), b"/a?%C3%A9%3D%26=%C3%A9"),
        (b"/a?x=1?y=2", (("z", "1"),), (), b"/a?x=1?y=2&z=1"),
    ],
)
def test_queries(target: bytes, sets: tuple[tuple[str, str], ...], removes: tuple[str, ...], wanted: bytes) -> None:
    assert changed_target(target, [Decision(verdict=Verdict.ALLOW, query_set=sets, query_remove=removes)]) == wanted


names = st.text("ab%+ &=\u00e9", max_size=4)


@given(st.text("ab=&%41+", max_size=20), st.lists(st.tuples(names, names), max_size=3), st.lists(names, max_size=3))
def test_what_is_removed_is_gone_and_what_is_set_is_there_once(query: str, sets: list[tuple[str, str]], removes: list[str]) -> None:
    decision = Decision(verdict=Verdict.ALLOW, query_set=tuple(sets), query_remove=tuple(removes))
    target = changed_target(b"/a?" + query.encode(), [decision])
    assert set(target) <= set(b"/a?") | set(range(0x21, 0x7F))
    if not (sets or removes):
        assert target == b"/a?" + query.encode()
        return
    found = [name for name, _ in parse_qsl(target.partition(b"?")[2].decode(), keep_blank_values=True, errors="surrogateescape")]
    assert not set(found) & set(removes)
    for name, _ in sets:
        assert found.count(name) == (0 if name in removes else 1)
