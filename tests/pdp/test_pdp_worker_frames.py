"""The frames between a worker and its parent, and the decision paths that they name."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdp.engines import frames
from pdp.engines.engine import segments

FRAMES = st.lists(st.tuples(st.integers(0, 2**31), st.sampled_from(b"RUFC"), st.binary(max_size=300)), max_size=8)


@given(FRAMES, st.data())
def test_frames_come_out_as_they_went_in_however_they_are_cut(sent: list[frames.Frame], data: st.DataObject) -> None:
    stream = b"".join(struct.pack(">IIB", len(payload) + 5, number, kind) + payload for number, kind, payload in sent)
    reader, got, at = frames.Reader(), [], 0
    while at < len(stream):
        step = data.draw(st.integers(1, len(stream) - at))
        got += reader.feed(stream[at : at + step])
        at += step
    assert got == sent


@pytest.mark.parametrize("length", [0, 4, frames.LIMIT + 1, 2**32 - 1])
def test_a_length_that_can_not_be_is_refused(length: int) -> None:
    with pytest.raises(frames.FrameError):
        frames.Reader().feed(struct.pack(">IIB", length, 1, ord("R")))


def test_questions_have_the_worker_s_layout() -> None:
    assert frames.evaluate(7, 9, 500, b"{}") == b"\0\0\0\x0f\0\0\0\x07E\0\0\0\x09\0\0\x01\xf4{}"
    assert frames.name_query(9, b"[]") == b"\0\0\0\x0b\0\0\0\0Q\0\0\0\x09[]"
    assert frames.command(7, b"{}") == b"\0\0\0\x07\0\0\0\x07C{}"


@pytest.mark.parametrize(
    ("path", "parts"),
    [
        ("shop.authz.decision", ("shop", "authz", "decision")),
        ("data.shop.authz", ("shop", "authz")),
        ("/shop/authz.v1/x", ("shop", "authz.v1", "x")),
        ("data", ("data",)),
    ],
)
def test_ways_to_write_a_decision(path: str, parts: tuple[str, ...]) -> None:
    assert segments(path) == parts


@pytest.mark.parametrize("path", ["", ".", "a..b", "/", "a//b", "data."])
def test_a_path_with_a_hole_is_none(path: str) -> None:
    with pytest.raises(ValueError, match="path of a decision"):
        segments(path)
