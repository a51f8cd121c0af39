"""HTTP/2 frames before the library sees them: cut whole, GOAWAY taken out, floods counted (RFC 9113 sections 4.1, 6.8 and 10.5)."""

from __future__ import annotations

from typing import Final

FRAME: Final = 16384
"""Bytes of a frame's payload that we take (SETTINGS_MAX_FRAME_SIZE)."""
TOO_LARGE: Final = -1
"""What stands for a frame that is larger. The library would wait for all of it, up to 16 MiB, before it looks at its size."""
IDLE_FRAMES: Final = 1000
"""Control and empty frames that may come without a head or a byte of a body between them."""
BLOCK: Final = 128 * 1024
"""Bytes of one head as it is compressed, over all its frames. The library takes 64 of them, a mebibyte, before it looks at any."""
SETTINGS_AT_ONCE: Final = 32
"""Entries of one SETTINGS frame: the library keeps what it has read, also of settings that nobody knows."""

_DATA: Final = 0
_HEADERS: Final = 1
_SETTINGS: Final = 4
_GOAWAY: Final = 7
_CONTINUATION: Final = 9
_PADDED: Final = 0x8


class Flooded(Exception):
    """The peer sends what costs us work and itself nothing; the text is for the log."""


class Frames:
    """Cuts one connection's bytes into whole frames. What is not whole waits: one frame at most."""

    __slots__ = ("block", "buffer", "idle", "preface")

    def __init__(self, preface: int) -> None:
        self.buffer = b""
        self.preface = preface
        """Bytes of the client's preface that have not come yet."""
        self.block = 0
        """Bytes of the head whose frames are coming."""
        self.idle = 0

    def cut(self, data: bytes) -> list[bytes | int]:
        """What `data` completes, in order: bytes for the library, and for each GOAWAY its last stream. Raises `Flooded`.

        Nothing comes after `TOO_LARGE`.
        """
        if self.buffer:
            data, self.buffer = self.buffer + data, b""
        at = 0
        size = len(data)
        if self.preface:
            at = min(self.preface, size)
            self.preface -= at
        found: list[bytes | int] = []
        start = 0
        while size - at >= 9:
            length = data[at] << 16 | data[at + 1] << 8 | data[at + 2]
            if length > FRAME:
                return [*found, data[start:at], TOO_LARGE]
            end = at + 9 + length
            if end > size:
                break
            kind = data[at + 3]
            if (kind == _DATA and length and not (data[at + 4] & _PADDED and data[at + 9] + 1 >= length)) or kind == _HEADERS:
                self.idle = 0
                self.block = length
            elif kind == _CONTINUATION:  # the library bounds their number
                self.block += length
                if self.block > BLOCK:
                    raise Flooded("a head of more bytes than any may have")
            else:
                self.idle += 1
                if self.idle > IDLE_FRAMES:
                    raise Flooded("a flood of frames without a message")
                if kind == _SETTINGS and length > 6 * SETTINGS_AT_ONCE:
                    raise Flooded("a SETTINGS frame with too many entries")
            if kind == _GOAWAY and length >= 8 and data[at + 5 : at + 9] in (b"\0\0\0\0", b"\x80\0\0\0"):
                found += (data[start:at], int.from_bytes(data[at + 9 : at + 13], "big") & 0x7FFFFFFF)
                start = end
            at = end
        if at < size:
            self.buffer = data[at:]
            data = data[:at]
        found.append(data[start:] if start else data)
        return found
