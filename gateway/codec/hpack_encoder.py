"""Writes header blocks (RFC 7541).

What is the same in most messages of a connection goes into the table and costs one byte from then on. What changes from message to
message (a path, a request's id, a length) stays out of it, as it would only push the rest out: a name goes in with its first value, and
with another one when that has been seen before. Credentials never do (section 7.1.3), nor does a cookie that is short enough to be guessed.
"""

from __future__ import annotations

from typing import Final

from gateway.codec import hpack_huffman
from gateway.codec.hpack_static import FIELDS, NAMES, SIZE
from mesh.http import Header

TABLE: Final = 4096
"""Bytes of the dynamic table at most, however many the peer would let us have; each field counts with 32 more."""
LARGEST: Final = 1024
"""Bytes of a field that goes into the table."""
SEEN: Final = 64
"""Fields that are remembered for having been sent once."""
SECRET: Final = frozenset((b"authorization", b"proxy-authorization"))
SHORT_COOKIE: Final = 20


def _number(value: int, prefix: int, first: int) -> bytes:
    """An integer (section 5.1) in the lower `prefix` bits of `first` and what more it needs."""
    most = (1 << prefix) - 1
    if value < most:
        return bytes((first | value,))
    out = bytearray((first | most,))
    value -= most
    while value >= 0x80:
        out.append(0x80 | value & 0x7F)
        value >>= 7
    out.append(value)
    return bytes(out)


_INDEXED: Final = tuple(_number(index, 7, 0x80) for index in range(SIZE + TABLE // 32 + 1))


class Encoder:
    """One direction of one connection. What it has encoded has to be sent, in order."""

    __slots__ = ("_dropped", "_entries", "_fields", "_inserted", "_limit", "_names", "_once", "_resized", "_size")

    def __init__(self) -> None:
        self._entries: list[Header] = []
        """The dynamic table, the newest last."""
        self._dropped = 0
        """How many fields have left the table."""
        self._inserted = 0
        """How many have entered it; a field's place is how many had before it."""
        self._fields: dict[Header, int] = {}
        self._names: dict[bytes, int] = {}
        """The places of fields and, for each name, of the latest field that has it."""
        self._size = 0
        self._limit = TABLE
        self._resized: list[int] = []
        """Sizes of the table that the peer is to be told: the smallest that there was, and the present one (section 4.2)."""
        self._once: set[Header] = set()

    def resize(self, size: int) -> None:
        """The peer takes a table of `size` bytes."""
        size = min(size, TABLE)
        if size == self._limit:
            return
        self._limit = size
        self._evict(size)
        self._resized = [size] if not self._resized or size <= self._resized[0] else [self._resized[0], size]

    def encode(self, fields: list[Header]) -> bytes:
        """One block."""
        out = []
        if self._resized:
            out = [_number(size, 5, 0x20) for size in self._resized]
            self._resized = []
        places = self._fields
        last = SIZE + self._inserted
        for field in fields:
            place = places.get(field)
            if place is not None:
                out.append(_INDEXED[last - place])
            elif field in FIELDS:
                out.append(FIELDS[field])
            else:
                out.append(self._literal(field))
                last = SIZE + self._inserted
        return b"".join(out)

    def _literal(self, field: Header) -> bytes:
        name, value = field
        index = NAMES.get(name, 0)
        if not index and (place := self._names.get(name)) is not None:
            index = SIZE + self._inserted - place
        size = len(name) + len(value) + 32
        if name in SECRET or (name == b"cookie" and len(value) < SHORT_COOKIE):
            start = _number(index, 4, 0x10)
        elif size <= LARGEST and size <= self._limit and self._worth(field):
            start = _number(index, 6, 0x40) + (b"" if index else _huffman(name))
            self._insert(field, size)
            return start + _huffman(value)
        else:
            start = _number(index, 4, 0)
        if not index:
            start += _number(len(name), 7, 0) + name
        return b"%b%b%b" % (start, _number(len(value), 7, 0), value)

    def _worth(self, field: Header) -> bool:
        """Whether the field is likely to come again."""
        once = self._once
        if field[0] not in self._names or field in once:
            once.discard(field)
            return True
        if len(once) >= SEEN:
            once.clear()
        once.add(field)
        return False

    def _insert(self, field: Header, size: int) -> None:
        self._evict(self._limit - size)
        self._fields[field] = self._names[field[0]] = self._inserted
        self._entries.append(field)
        self._inserted += 1
        self._size += size

    def _evict(self, most: int) -> None:
        """Drops the oldest fields until the table has no more than `most` bytes."""
        entries, count = self._entries, 0
        while self._size > most and count < len(entries):
            field = entries[count]
            place = self._dropped + count
            count += 1
            self._size -= len(field[0]) + len(field[1]) + 32
            if self._fields.get(field) == place:
                del self._fields[field]
            if self._names.get(field[0]) == place:
                del self._names[field[0]]
        if count:
            del entries[:count]
            self._dropped += count


def _huffman(data: bytes) -> bytes:
    """A string in its shorter form (section 5.2)."""
    short = hpack_huffman.encode(data)
    if len(short) < len(data):
        return _number(len(short), 7, 0x80) + short
    return _number(len(data), 7, 0) + data
