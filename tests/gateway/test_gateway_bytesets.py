"""The tables that tell whether bytes are all of one set."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gateway.codec.bytesets import only, without


@given(st.binary(min_size=1), st.binary())
def test_what_is_all_allowed_and_nothing_else_stays_as_it_is(allowed: bytes, text: bytes) -> None:
    assert (text.translate(only(allowed)) == text) is set(text).issubset(allowed)


@given(st.binary(max_size=255), st.binary())
def test_what_has_nothing_forbidden_and_nothing_else_stays_as_it_is(forbidden: bytes, text: bytes) -> None:
    assert (text.translate(without(forbidden)) == text) is set(text).isdisjoint(forbidden)
