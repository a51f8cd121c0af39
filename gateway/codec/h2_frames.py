"""HTTP/2's frames: their types, flags and codes, and how they are written (RFC 9113 sections 4, 6 and 7)."""

from __future__ import annotations

import struct
from typing import Final

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

DATA: Final = 0
HEADERS: Final = 1
PRIORITY: Final = 2
RST_STREAM: Final = 3
SETTINGS: Final = 4
PUSH_PROMISE: Final = 5
PING: Final = 6
GOAWAY: Final = 7
WINDOW_UPDATE: Final = 8
CONTINUATION: Final = 9

END_STREAM: Final = 0x1
ACK: Final = 0x1
END_HEADERS: Final = 0x4
PADDED: Final = 0x8
PRIORITISED: Final = 0x20

HEADER_TABLE_SIZE: Final = 1
ENABLE_PUSH: Final = 2
MAX_CONCURRENT_STREAMS: Final = 3
INITIAL_WINDOW_SIZE: Final = 4
MAX_FRAME_SIZE: Final = 5
MAX_HEADER_LIST_SIZE: Final = 6
ENABLE_CONNECT_PROTOCOL: Final = 8
"""RFC 8441 section 3."""

NO_ERROR: Final = 0
PROTOCOL_ERROR: Final = 1
INTERNAL_ERROR: Final = 2
FLOW_CONTROL_ERROR: Final = 3
STREAM_CLOSED: Final = 5
FRAME_SIZE_ERROR: Final = 6
REFUSED_STREAM: Final = 7
CANCEL: Final = 8
COMPRESSION_ERROR: Final = 9
ENHANCE_YOUR_CALM: Final = 11

FRAME: Final = 16384
"""Bytes of a frame's payload that every peer takes, and that we take."""
LARGEST_FRAME: Final = 2**24 - 1
WINDOW: Final = 65535
"""Bytes of every window at first (section 6.9.2)."""
LARGEST: Final = 2**31 - 1
"""The largest window, and the last stream's number."""

HEADER: Final = struct.Struct(">IBI")
"""A frame's header: length and type in one (`length << 8 | type`), flags, stream (with the reserved bit)."""
ENTRY: Final = struct.Struct(">HI")
"""One entry of a SETTINGS frame."""


class Breach(Exception):
    """The peer broke the protocol in a way that ends the connection (section 5.4.1)."""

    def __init__(self, code: int, why: str) -> None:
        super().__init__(why)
        self.code = code


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """A frame."""
    return HEADER.pack(len(payload) << 8 | kind, flags, stream) + payload


def settings(entries: dict[int, int]) -> bytes:
    """A SETTINGS frame."""
    return frame(SETTINGS, 0, 0, b"".join([ENTRY.pack(*entry) for entry in entries.items()]))


def rst_stream(stream: int, code: int) -> bytes:
    """RST_STREAM."""
    return frame(RST_STREAM, 0, stream, code.to_bytes(4, "big"))


def window_update(stream: int, by: int) -> bytes:
    """WINDOW_UPDATE."""
    return frame(WINDOW_UPDATE, 0, stream, by.to_bytes(4, "big"))


def goaway(last: int, code: int) -> bytes:
    """GOAWAY."""
    return frame(GOAWAY, 0, 0, last.to_bytes(4, "big") + code.to_bytes(4, "big"))


def unpadded(data: bytes, at: int, end: int) -> tuple[int, int]:
    """Where a padded payload begins and ends (section 6.1). Raises `Breach`."""
    if at == end:
        raise Breach(FRAME_SIZE_ERROR, "a padded frame without its length of padding")
    end -= data[at]
    if at >= end:
        raise Breach(PROTOCOL_ERROR, "padding as long as its frame")
    return at + 1, end
