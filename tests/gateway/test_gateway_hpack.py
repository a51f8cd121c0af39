"""HPACK: tables, limits, and `hpack` as the oracle of both directions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import hpack
import pytest
from hpack.exceptions import HPACKError
from hpack.huffman_table import decode_huffman
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.codec import hpack_huffman
from gateway.codec.hpack_decoder import TABLE, BadBlock, Decoder
from gateway.codec.hpack_encoder import Encoder
from gateway.codec.hpack_static import STATIC
from mesh.http import Header

name = st.one_of(
    st.sampled_from([b"a", b"x-id", b"date", b":path", b":status", b"cookie", b"authorization", b"etag"]),
    st.binary(min_size=1, max_size=4),
)
value = st.one_of(st.sampled_from([b"", b"1", b"/", b"200", b"y" * 900, b"z" * 3000]), st.binary(max_size=40))
block = st.lists(st.tuples(name, value), max_size=6)
size = st.sampled_from([0, 31, 40, 100, 1000, 4095, 4096, 4097, 2**32 - 1])


def test_the_static_table_is_the_same() -> None:
    assert list(STATIC[1:]) == list(hpack.table.HeaderTable.STATIC_TABLE)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300))
def test_huffman(data: bytes) -> None:
    coded = hpack_huffman.encode(data)
    assert hpack_huffman.decode(coded) == data
    assert decode_huffman(coded) == data


@settings(max_examples=500, deadline=None)
@given(st.one_of(st.binary(max_size=30), st.binary(max_size=6).map(lambda end: hpack_huffman.encode(b"some text") + end)))
def test_huffman_that_no_encoder_writes(data: bytes) -> None:
    ours: bytes | None
    theirs: bytes | None
    try:
        ours = hpack_huffman.decode(data)
    except hpack_huffman.NotHuffman:
        ours = None
    try:
        theirs = decode_huffman(data)
    except HPACKError:
        theirs = None
    assert ours == theirs


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(block, st.booleans(), st.one_of(st.none(), size)), max_size=25))
def test_reads_what_others_write(blocks: Sequence[tuple[list[Header], bool, int | None]]) -> None:
    theirs, ours = hpack.Encoder(), Decoder()
    for fields, huffman, resized in blocks:
        if resized is not None and resized <= TABLE:
            theirs.header_table_size = resized
        secret = [hpack.NeverIndexedHeaderTuple(*field) if field[0] == b"authorization" else field for field in fields]
        assert ours.decode(theirs.encode(secret, huffman=huffman)) == fields
        assert ours._size == theirs.header_table._current_size
        assert ours._entries == list(reversed(theirs.header_table.dynamic_entries))


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(block, st.lists(size, max_size=3)), max_size=25))
def test_others_read_what_we_write(blocks: Sequence[tuple[list[Header], list[int]]]) -> None:
    ours, theirs = Encoder(), hpack.Decoder()
    theirs.max_allowed_table_size = 2**32
    for fields, sizes in blocks:
        for resized in sizes:
            ours.resize(resized)
        found = theirs.decode(ours.encode(fields), raw=True)
        assert [tuple(field) for field in found] == fields
        for field in found:
            guessable = field[0] == b"authorization" or (field[0] == b"cookie" and len(field[1]) < 20)
            assert isinstance(field, hpack.NeverIndexedHeaderTuple) == (guessable and tuple(field) not in STATIC)
        assert ours._entries == list(reversed(theirs.header_table.dynamic_entries))
        assert ours._size == theirs.header_table._current_size <= ours._limit
        assert len(ours._fields) <= len(ours._entries)
        assert len(ours._names) <= len(ours._entries)


@settings(max_examples=1000, deadline=None)
@given(st.lists(st.one_of(st.binary(max_size=40), block.map(lambda fields: hpack.Encoder().encode(fields))), max_size=8))
def test_blocks_that_no_encoder_writes(blocks: list[bytes]) -> None:
    ours, theirs = Decoder(), hpack.Decoder(max_header_list_size=2**31)
    for data in blocks:
        try:
            found = ours.decode(data)
        except BadBlock:
            found = None
        try:
            expected = [tuple(field) for field in theirs.decode(data, raw=True)]
        except HPACKError:
            expected = None
        assert found == expected, data
        if found is None:
            return
        assert ours._size <= TABLE
        assert ours._entries == list(reversed(theirs.header_table.dynamic_entries))


BAD: dict[str, bytes] = {
    "the index 0": b"\x80",
    "an index beyond the tables": b"\xbe",
    "a name beyond the tables": b"\x7e\x01a",
    "the end within an index": b"\xff",
    "the end within a name": b"\x40\x05ab",
    "the end before a value": b"\x40\x01a",
    "an endless integer": b"\xff" + b"\x80" * 20 + b"\x01",
    "an enormous integer": b"\xff\xff\xff\xff\xff\xff\x7f",
    "an enormous string": b"\x40\x7f\xff\xff\xff\xff\x0f",
    "a table that is too large": b"\x3f\xe2\x1f",
    "a new size after a field": b"\x82\x20",
    "Huffman with too much padding": b"\x40\x81\xff\x00",
    "Huffman padded with zeroes": b"\x40\x01a\x81\x00",
    "Huffman with an end within": b"\x40\x84\xff\xff\xff\xff\x00",
}


@pytest.mark.parametrize("case", BAD)
def test_refuses(case: str) -> None:
    with pytest.raises(BadBlock):
        Decoder().decode(BAD[case])


def test_what_changes_stays_out_of_the_table() -> None:
    encoder = Encoder()
    for number in range(500):
        encoder.encode([(b"x-id", b"%d" % number), (b"server", b"us")])
    assert encoder._entries == [(b"x-id", b"0"), (b"server", b"us")]
    assert len(encoder._once) <= 64
    again = [(b"x-id", b"499"), (b"server", b"us")]
    encoder.encode(again)
    assert len(encoder.encode(again)) == 2


@pytest.mark.parametrize(
    "field", [(b"authorization", b"Bearer x" * 9), (b"proxy-authorization", b"Basic y"), (b"cookie", b"sid=1"), (b"x", b"y" * 2000)]
)
def test_what_never_goes_into_the_table(field: Header) -> None:
    encoder = Encoder()
    for _ in range(4):
        encoder.encode([field])
    assert encoder._entries == []
    assert field not in encoder._once


@pytest.mark.parametrize("made", [lambda: b"\x40\x01a\x01b", lambda: b"\x20", lambda: b"\x3f\xe1\x1f"])
def test_a_decoder_tells_when_the_same_bytes_may_mean_something_else(made: Callable[[], bytes]) -> None:
    decoder = Decoder()
    decoder.decode(b"\x82\x00\x01a\x01b\x10\x01a\x01b")
    assert decoder.changes == 0
    decoder.decode(made())
    assert decoder.changes == 1
