"""The Autobahn suite's cases, for today's Python: what peers make of them through the gateway is what they make of them without it.

The suite itself needs Python 2. Its cases are of RFC 6455: framing, pings, reserved bits, opcodes, fragmentation, UTF-8, the closing
handshake, limits of size, and permessage-deflate (RFC 7692). Here each is a list of frames as bytes on the wire; the peer is `websockets`'
echo server, and the frames that come back until the connection ends are the case's result.
"""

from __future__ import annotations

import asyncio
import zlib
from contextlib import AsyncExitStack

import pytest
from test_gateway_websocket import MUTUAL, UPGRADE, echoing, through, trusting
from websockets.asyncio.server import serve

from mesh.model import ListenerTls

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10
MASK = b"\x37\xfa\x21\x3d"


def frame(opcode: int, payload: bytes = b"", fin: bool = True, rsv: int = 0, masked: bool = True, size: int = -1) -> bytes:
    """A client's frame (RFC 6455 section 5.2). `size`: the length that it claims, in place of its own."""
    length = len(payload) if size < 0 else size
    head = bytes([fin << 7 | rsv << 4 | opcode])
    bit = 0x80 if masked else 0
    if length < 126:
        head += bytes([bit | length])
    elif length < 65536:
        head += bytes([bit | 126]) + length.to_bytes(2, "big")
    else:
        head += bytes([bit | 127]) + length.to_bytes(8, "big")
    if not masked:
        return head + payload
    key = (MASK * (len(payload) // 4 + 1))[: len(payload)]
    return head + MASK + (int.from_bytes(payload, "big") ^ int.from_bytes(key, "big")).to_bytes(len(payload), "big")


def deflated(data: bytes) -> bytes:
    compressor = zlib.compressobj(wbits=-15)
    return (compressor.compress(data) + compressor.flush(zlib.Z_SYNC_FLUSH))[:-4]


def closing(code: int | None, reason: bytes = b"") -> bytes:
    return frame(CLOSE, b"" if code is None else code.to_bytes(2, "big") + reason)


BYE = closing(1000)
PIECES = "Hello-\u00b5@\u00df\u00f6\u00e4\u00fc\u00e0\u00e1-UTF-8!!".encode()
CASES: dict[str, list[bytes]] = {
    # 1: framing
    **{f"1.1 text of {size}": [frame(TEXT, b"*" * size), BYE] for size in (0, 1, 125, 126, 127, 128, 65535, 65536)},
    **{f"1.2 binary of {size}": [frame(BINARY, b"\xfe" * size), BYE] for size in (0, 125, 126, 127, 128, 65535, 65536)},
    "1.1 text in pieces of one byte": [bytes([byte]) for byte in frame(TEXT, b"chopped up")] + [BYE],
    # 2: pings and pongs
    "2.1 an empty ping": [frame(PING), BYE],
    "2.2 a ping with text": [frame(PING, b"Hello"), BYE],
    "2.4 a ping of 125": [frame(PING, b"\xfe" * 125), BYE],
    "2.5 a ping that is too long": [frame(PING, b"\xfe" * 126), BYE],
    "2.7 a pong that nobody asked for": [frame(PONG, b"x"), BYE],
    "2.9 a pong, then a ping": [frame(PONG, b"x"), frame(PING, b"y"), BYE],
    "2.10 ten pings": [frame(PING, b"payload-%d" % number) for number in range(10)] + [BYE],
    # 3: reserved bits
    **{f"3.{rsv} reserved bits {rsv}": [frame(TEXT, b"a"), frame(TEXT, b"b", rsv=rsv), frame(PING), BYE] for rsv in range(1, 8)},
    "3 reserved bits of a ping": [frame(PING, b"a", rsv=2), BYE],
    # 4: opcodes
    **{f"4 opcode {opcode}": [frame(TEXT, b"a"), frame(opcode, b"b"), frame(PING), BYE] for opcode in (3, 4, 5, 6, 7, 11, 12, 13, 14, 15)},
    # 5: fragmentation
    "5.1 a ping in fragments": [frame(PING, b"a", fin=False), frame(CONTINUATION, b"b"), BYE],
    "5.2 a pong in fragments": [frame(PONG, b"a", fin=False), frame(CONTINUATION, b"b"), BYE],
    "5.3 text in two fragments": [frame(TEXT, b"one ", fin=False), frame(CONTINUATION, b"two"), BYE],
    "5.6 a ping between fragments": [frame(TEXT, b"one ", fin=False), frame(PING, b"p"), frame(CONTINUATION, b"two"), BYE],
    "5.9 a continuation of nothing": [frame(CONTINUATION, b"a"), frame(TEXT, b"b"), BYE],
    "5.10 an open continuation of nothing": [frame(CONTINUATION, b"a", fin=False), frame(TEXT, b"b"), BYE],
    "5.15 a continuation after the end": [
        frame(TEXT, b"a", fin=False),
        frame(CONTINUATION, b"b"),
        frame(CONTINUATION, b"c", fin=False),
        frame(TEXT, b"d"),
        BYE,
    ],
    "5.18 text within text": [frame(TEXT, b"a", fin=False), frame(TEXT, b"b"), BYE],
    "5.19 five fragments with pings": [
        frame(TEXT, b"1", fin=False),
        frame(CONTINUATION, b"2", fin=False),
        frame(PING, b"p"),
        frame(CONTINUATION, b"3", fin=False),
        frame(CONTINUATION, b"4", fin=False),
        frame(PING, b"q"),
        frame(CONTINUATION, b"5"),
        BYE,
    ],
    "5 a thousand fragments": [
        frame(TEXT, b"a", fin=False),
        *[frame(CONTINUATION, b"b", fin=False)] * 1000,
        frame(CONTINUATION, b"c"),
        BYE,
    ],
    # 6: UTF-8
    "6.1 empty fragments": [frame(TEXT, b"", fin=False), frame(CONTINUATION, b"", fin=False), frame(CONTINUATION, b""), BYE],
    "6.2 UTF-8": [frame(TEXT, PIECES), BYE],
    "6.2 UTF-8, a byte a fragment": [
        frame(TEXT, PIECES[:1], fin=False),
        *[frame(CONTINUATION, PIECES[at : at + 1], fin=False) for at in range(1, len(PIECES))],
        frame(CONTINUATION),
        BYE,
    ],
    **{
        f"6 bytes {text.hex()}": [frame(TEXT, text), BYE]
        for text in (
            b"\xce\xba\xe1\xbd\xb9\xcf\x83\xce\xbc\xce\xb5\xed\xa0\x80edited",
            b"\xf4\x90\x80\x80",
            b"\xff",
            b"\x80",
            b"\xc0\xaf",
            b"\xe0\x80\xaf",
            b"\xed\xa0\x80",
            b"\xf8\x88\x80\x80\x80",
            b"\xc3",
            b"\xf4\x8f\xbf\xbf",
            b"\xef\xbf\xbf",
            b"\x00",
        )
    },
    # 7: closing
    "7.1 a close": [closing(1000)],
    "7.1 two closes": [closing(1000), closing(1000)],
    "7.1 a ping after the close": [closing(1000), frame(PING)],
    "7.1 text after the close": [closing(1000), frame(TEXT, b"late")],
    "7.1 a close within a message": [frame(TEXT, b"a", fin=False), closing(1000), frame(CONTINUATION, b"b")],
    "7.3 an empty close": [closing(None)],
    "7.3 a close of one byte": [frame(CLOSE, b"a")],
    "7.3 a close with a reason": [closing(1000, b"Hello World!")],
    "7.3 a close of 125": [closing(1000, b"*" * 123)],
    "7.3 a close that is too long": [closing(1000, b"*" * 124)],
    "7.5 a reason that is not UTF-8": [closing(1000, b"\xce\xba\xed\xa0\x80")],
    **{
        f"7 code {code}": [closing(code)]
        for code in (
            0,
            999,
            1001,
            1002,
            1003,
            1004,
            1005,
            1006,
            1007,
            1011,
            1012,
            1015,
            1016,
            2000,
            2999,
            3000,
            3999,
            4000,
            4999,
            5000,
            65535,
        )
    },
    # 9: sizes
    **{f"9.1 text of {size}": [frame(TEXT, b"BAsd7&jh23" * (size // 10)), BYE] for size in (262_140, 1_048_570, 4_194_300)},
    "9.3 a megabyte in fragments of 64": [
        frame(BINARY, b"x" * 64, fin=False),
        *[frame(CONTINUATION, b"y" * 64, fin=False)] * 4000,
        frame(CONTINUATION),
        BYE,
    ],
    "9.7 many messages": [*[frame(TEXT, b"m" * 64)] * 200, BYE],
    # what a client must not do
    "an unmasked frame": [frame(TEXT, b"a", masked=False), BYE],
    "bytes that are no frames": [b"GET /admin HTTP/1.1\r\nhost: shop.example\r\n\r\n"],
}
COMPRESSED: dict[str, list[bytes]] = {
    "12 a compressed message": [frame(TEXT, deflated(b"compressed " * 100), rsv=4), BYE],
    "12 compressed in fragments": [
        frame(TEXT, deflated(b"compressed " * 100)[:9], fin=False, rsv=4),
        frame(CONTINUATION, deflated(b"compressed " * 100)[9:]),
        BYE,
    ],
    "12 a plain message": [frame(TEXT, b"plain"), BYE],
    "12 what does not inflate": [frame(TEXT, b"\xff\xff\xff", rsv=4), BYE],
    "12 a compressed ping": [frame(PING, b"a", rsv=4), BYE],
}


def messages(frames: list[bytes]) -> list[int]:
    """How many whole messages have been sent before each frame, up to the first that breaks a rule of framing."""
    count, begun, broken, before, held = 0, False, False, [], b""
    for data in frames:
        before.append(count)
        held += data
        if broken or len(held) < 6 or len(held) < 6 + (held[1] & 127 if held[1] & 127 < 126 else 0):
            continue  # a piece of a frame
        opcode, fin, length = held[0] & 15, held[0] & 128, held[1] & 127
        control = opcode >= CLOSE
        broken = not held[1] & 128 or bool(held[0] & 0x30) or opcode not in {0, 1, 2, 9, 10} or (control and (not fin or length > 125))
        broken = broken or (not control and begun != (opcode == CONTINUATION))
        if not control and not broken:
            begun = not fin
            count += bool(fin)
        held = b""
    return before


async def play(port: int, tls: bool, frames: list[bytes], extension: bytes) -> bytes:
    """What comes back, from the answer's head on, until the connection ends."""
    context = trusting() if tls else None
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context, server_hostname="shop.example" if tls else None)
    writer.write(b"GET /case HTTP/1.1\r\nhost: shop.example\r\n" + UPGRADE + extension + b"\r\n")
    head = await reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 101 ")
    agreed = [line.lower() for line in head.split(b"\r\n") if line.lower().startswith(b"sec-websocket-")]

    got = bytearray()
    ended = asyncio.Event()
    came = asyncio.Event()

    async def send() -> None:
        # Else it is a matter of luck whether the server still answers what came before a frame that ends it all.
        for data, echoes in zip(frames, messages(frames), strict=True):
            while not ended.is_set() and echoes and sum(kind & 15 in {TEXT, BINARY} for kind, _ in told(b"\n\n" + bytes(got))) < echoes:
                came.clear()
                await came.wait()
            writer.write(data)
            await writer.drain()
            if len(data) == 1:
                await asyncio.sleep(0)

    async def receive() -> None:
        try:
            while data := await reader.read(65536):
                got.extend(data)
                came.set()
        except ConnectionError:
            pass
        ended.set()
        came.set()

    sending = asyncio.ensure_future(send())
    await asyncio.wait_for(receive(), 20)
    sending.cancel()
    await asyncio.gather(sending, return_exceptions=True)
    writer.close()
    return b"\n".join(sorted(agreed)) + b"\n\n" + bytes(got)


def results(cases: dict[str, list[bytes]], tls: ListenerTls | None, extension: bytes) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """The results of the cases without the gateway, and through it."""

    async def go() -> tuple[dict[str, bytes], dict[str, bytes]]:
        async with AsyncExitStack() as stack:
            server = await stack.enter_async_context(serve(echoing, "127.0.0.1", 0, max_size=None, max_queue=None))
            port: int = next(iter(server.sockets)).getsockname()[1]
            made = await stack.enter_async_context(through(port, tls=tls))
            direct = {name: await play(port, False, frames, extension) for name, frames in cases.items()}
            by_gateway = {name: await play(made.port, tls is not None, frames, extension) for name, frames in cases.items()}
            assert {outcome.status for outcome in made.outcomes} <= {101}
            return direct, by_gateway

    return asyncio.run(go())


def told(got: bytes) -> list[tuple[int, bytes]]:
    """A server's frames; of a connection that is cut off, those that are whole."""
    data, found = got.partition(b"\n\n")[2], []
    while len(data) >= 2:
        length, at = data[1] & 0x7F, 2
        if length >= 126:
            at = 4 if length == 126 else 10
            length = int.from_bytes(data[2:at], "big")
        if len(data) < at + length:
            break
        found.append((data[0], data[at : at + length]))
        data = data[at + length :]
    return found


@pytest.mark.parametrize("tls", [None, MUTUAL], ids=["plain", "tls"])
@pytest.mark.parametrize(
    ("cases", "extension"),
    [(CASES, b""), (COMPRESSED, b"sec-websocket-extensions: permessage-deflate; client_no_context_takeover\r\n")],
    ids=["plain", "deflate"],
)
def test_the_cases_come_out_as_they_do_without_the_gateway(
    cases: dict[str, list[bytes]], extension: bytes, tls: ListenerTls | None
) -> None:
    direct, by_gateway = results(cases, tls, extension)
    different = {name: (direct[name][-200:], by_gateway[name][-200:]) for name in cases if told(direct[name]) != told(by_gateway[name])}
    assert not different
    assert all(direct[name].partition(b"\n\n")[0] == by_gateway[name].partition(b"\n\n")[0] for name in cases)
    assert sum(len(told(direct[name])) for name in cases) > len(cases), "hardly anything was said at all"
