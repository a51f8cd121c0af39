"""The other end of an HTTP/2 connection, frame by frame: it can say what no well-behaved peer would."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from hpack import Decoder, Encoder
from hyperframe.frame import (
    ContinuationFrame,
    DataFrame,
    Frame,
    GoAwayFrame,
    HeadersFrame,
    PingFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
)

from gateway.codec.events import Codec

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
Fields = Sequence[tuple[bytes, bytes]]
GET: Fields = ((b":method", b"GET"), (b":scheme", b"https"), (b":authority", b"shop"), (b":path", b"/"))
POST: Fields = ((b":method", b"POST"), *GET[1:])
OK: Fields = ((b":status", b"200"),)


def raw(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """Any frame at all."""
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def data(stream: int, body: bytes = b"", *, ended: bool = False, padding: int | None = None) -> bytes:
    """A DATA frame."""
    if padding is not None:
        return raw(0, 8 | ended, stream, bytes([padding]) + body + bytes(padding))
    return raw(0, int(ended), stream, body)


def rst(stream: int, code: int = 8) -> bytes:
    """RST_STREAM."""
    return raw(3, 0, stream, code.to_bytes(4, "big"))


def settings(*entries: tuple[int, int]) -> bytes:
    """SETTINGS."""
    return raw(4, 0, 0, b"".join(code.to_bytes(2, "big") + value.to_bytes(4, "big") for code, value in entries))


def ping() -> bytes:
    """PING."""
    return raw(6, 0, 0, b"01234567")


def goaway(last: int, code: int = 0) -> bytes:
    """GOAWAY."""
    return raw(7, 0, 0, last.to_bytes(4, "big") + code.to_bytes(4, "big"))


def window(stream: int, by: int) -> bytes:
    """WINDOW_UPDATE."""
    return raw(8, 0, stream, by.to_bytes(4, "big"))


class Peer:
    """Talks to one codec: writes heads, and reads what the codec writes."""

    def __init__(self, codec: Codec, *, client: bool = True) -> None:
        self.codec = codec
        self.encoder = Encoder()
        self.decoder = Decoder()
        self.decoder.max_allowed_table_size = 65536
        self._left = b""
        self._block: tuple[int, bool] | None = None
        if client:
            codec.receive(PREFACE + settings())
        else:
            codec.receive(settings())
        self.read(codec.take().removeprefix(PREFACE))

    def head(self, stream: int, fields: Iterable[tuple[bytes, bytes]], *, ended: bool = True, cut: int = 16384) -> bytes:
        """HEADERS, and CONTINUATION where the block is longer than `cut` bytes."""
        block = self.encoder.encode(list(fields))
        parts = [block[at : at + cut] for at in range(0, len(block), cut)]
        frames = [
            raw(1 if not at else 9, (int(ended) if not at else 0) | (4 if at == len(parts) - 1 else 0), stream, part)
            for at, part in enumerate(parts)
        ]
        return b"".join(frames)

    def wrote(self) -> list[tuple[Any, ...]]:
        """What the codec has to say, frame by frame; acknowledgements of settings are left out."""
        return self.read(self.codec.take())

    def read(self, written: bytes) -> list[tuple[Any, ...]]:
        """Frames as tuples."""
        out: list[tuple[Any, ...]] = []
        view = self._left + written
        while view:
            frame, length = Frame.parse_frame_header(memoryview(view[:9]))
            frame.parse_body(memoryview(view[9 : 9 + length]))
            view = view[9 + length :]
            match frame:
                case HeadersFrame():
                    assert "END_HEADERS" in frame.flags
                    fields = tuple((bytes(name), bytes(value)) for name, value in self.decoder.decode(frame.data, raw=True))
                    out.append(("headers", frame.stream_id, fields, "END_STREAM" in frame.flags))
                case DataFrame():
                    out.append(("data", frame.stream_id, frame.data, "END_STREAM" in frame.flags))
                case RstStreamFrame():
                    out.append(("rst", frame.stream_id, frame.error_code))
                case GoAwayFrame():
                    out.append(("goaway", frame.last_stream_id, frame.error_code))
                case WindowUpdateFrame():
                    out.append(("window", frame.stream_id, frame.window_increment))
                case PingFrame():
                    out.append(("ping", "ACK" in frame.flags))
                case SettingsFrame():
                    pass
                case ContinuationFrame():
                    raise AssertionError("not expected here")
        return out
