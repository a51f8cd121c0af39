"""Reads header blocks (RFC 7541). Every block has to be given, in order, also those of messages that nobody wants.

Bounded by what it is given: a block makes no more fields than it has bytes, those of the dynamic table are shared and not copied, and that
table is no larger than `TABLE`. How much a list of fields comes to is for the caller to look at before it copies any of it.
"""

from __future__ import annotations

from typing import Final

from gateway.codec import hpack_huffman
from gateway.codec.hpack_static import SIZE, STATIC
from mesh.http import Header

TABLE: Final = 4096
"""Bytes of the dynamic table (SETTINGS_HEADER_TABLE_SIZE, left as it is by default), each field counted with 32 more."""
MOST: Final = 2**32
"""Integers beyond it are none that anybody needs."""


class BadBlock(ValueError):
    """A header block that no encoder writes: the tables of the two sides no longer agree. The text is for the log."""


class Decoder:
    """One direction of one connection."""

    __slots__ = ("_entries", "_limit", "_size", "changes")

    def __init__(self) -> None:
        self._entries: list[Header] = []
        """The dynamic table, the newest last."""
        self._size = 0
        self._limit = TABLE
        self.changes = 0
        """Goes up with whatever changes what a block means: while it stays the same, the same bytes are the same fields."""

    def decode(self, block: bytes) -> list[Header]:
        """The fields of one block. Raises `BadBlock`, after which there is nothing more to decode."""
        fields: list[Header] = []
        entries = self._entries
        at = 0
        end = len(block)
        try:
            while at < end:
                byte = block[at]
                at += 1
                if byte & 0x80:
                    index = byte & 0x7F
                    if index == 0x7F:
                        index, at = _integer(block, at, index)
                    if index > SIZE:
                        fields.append(entries[SIZE - index])
                    elif index:
                        fields.append(STATIC[index])
                    else:
                        raise BadBlock("the index 0")
                    continue
                if byte & 0x60 == 0x20:
                    if fields:
                        raise BadBlock("a change of the table's size within a block")
                    size = byte & 0x1F
                    if size == 0x1F:
                        size, at = _integer(block, at, size)
                    self._resize(size)
                    continue
                mask = 0x3F if byte & 0x40 else 0x0F
                index = byte & mask
                if index == mask:
                    index, at = _integer(block, at, index)
                if index:
                    name = STATIC[index][0] if index <= SIZE else entries[SIZE - index][0]
                else:
                    name, at = _string(block, at)
                value, at = _string(block, at)
                field = (name, value)
                fields.append(field)
                if byte & 0x40:
                    self._insert(field)
        except IndexError:
            raise BadBlock("an index that there is not, or the end of the block within a field") from None
        except hpack_huffman.NotHuffman as problem:
            raise BadBlock(str(problem)) from None
        return fields

    def _insert(self, field: Header) -> None:
        size = len(field[0]) + len(field[1]) + 32
        self.changes += 1
        self._evict(self._limit - size)
        if size <= self._limit:
            self._entries.append(field)
            self._size += size

    def _resize(self, size: int) -> None:
        if size > TABLE:
            raise BadBlock("a table larger than it may be")
        self.changes += 1
        self._limit = size
        self._evict(size)

    def _evict(self, most: int) -> None:
        """Drops the oldest fields until the table has no more than `most` bytes."""
        size, entries, count = self._size, self._entries, 0
        while size > most and count < len(entries):
            name, value = entries[count]
            size -= len(name) + len(value) + 32
            count += 1
        if count:
            del entries[:count]
            self._size = size


def _integer(block: bytes, at: int, value: int) -> tuple[int, int]:
    """The rest of an integer whose prefix is full (section 5.1), and where it ends. Raises `BadBlock`, IndexError at the block's end."""
    shift = 0
    while True:
        byte = block[at]
        at += 1
        value += (byte & 0x7F) << shift
        if value > MOST or shift > 35:
            raise BadBlock("an integer that is too large")
        if not byte & 0x80:
            return value, at
        shift += 7


def _string(block: bytes, at: int) -> tuple[bytes, int]:
    """A string (section 5.2), and where it ends. Raises `BadBlock` and `NotHuffman`, IndexError at the block's end."""
    byte = block[at]
    length = byte & 0x7F
    at += 1
    if length == 0x7F:
        length, at = _integer(block, at, length)
    end = at + length
    if end > len(block):
        raise BadBlock("a string that goes on beyond its block")
    data = block[at:end]
    return (hpack_huffman.decode(data) if byte & 0x80 else data), end
