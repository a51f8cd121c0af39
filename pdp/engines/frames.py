"""The frames that a worker and its parent exchange; `pdp/opa/frames.go` has the other half. No I/O."""

from __future__ import annotations

import struct
from typing import Final

EVALUATE: Final = ord("E")
QUERY: Final = ord("Q")
COMMAND: Final = ord("C")
RESULT: Final = ord("R")
UNDEFINED: Final = ord("U")
FAILURE: Final = ord("F")

LIMIT: Final = 256 << 20
"""Bytes that a frame may have."""
_HEAD: Final = struct.Struct(">IIB")
_EVALUATE: Final = struct.Struct(">IIBII")
_QUERY: Final = struct.Struct(">IIBI")

Frame = tuple[int, int, bytes]
"""Id, kind, payload."""


def evaluate(number: int, query: int, microseconds: int, document: bytes) -> bytes:
    """A question: evaluate `query` with `document` as its input."""
    return _EVALUATE.pack(len(document) + 13, number, EVALUATE, query, microseconds) + document


def name_query(query: int, text: bytes) -> bytes:
    """Binds `query` to a revision and a path. It is not answered."""
    return _QUERY.pack(len(text) + 9, 0, QUERY, query) + text


def command(number: int, text: bytes) -> bytes:
    """A command, as JSON."""
    return _HEAD.pack(len(text) + 5, number, COMMAND) + text


class FrameError(Exception):
    """What came is not a frame: the worker can't be trusted any more."""


class Reader:
    """Cuts a stream into frames."""

    __slots__ = ("_needed", "_rest")

    def __init__(self) -> None:
        self._rest = bytearray()
        self._needed = 0

    def feed(self, data: bytes) -> list[Frame]:
        """The frames that `data` completes. Raises `FrameError`."""
        if self._rest:
            self._rest += data
            if len(self._rest) < self._needed:
                return []
            data = bytes(self._rest)
            self._rest = bytearray()
        frames = []
        start, end = 0, len(data)
        self._needed = _HEAD.size
        while end - start >= _HEAD.size:
            length, number, kind = _HEAD.unpack_from(data, start)
            if not 5 <= length <= LIMIT:
                raise FrameError(f"a frame of {length} bytes")
            stop = start + 4 + length
            if stop > end:
                self._needed = stop - start
                break
            frames.append((number, kind, data[start + 9 : stop]))
            start = stop
        if start < end:
            self._rest += data[start:]
        return frames
