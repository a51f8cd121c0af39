"""The cases of `test_gateway_websocket_cases` the other way round, as the suite's fuzzing server has them: a server sends them.

What a client makes of them through the gateway is what it makes of them without it.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
from contextlib import AsyncExitStack

import pytest
from test_gateway_websocket import MUTUAL, through, trusting
from test_gateway_websocket_cases import BINARY, CASES, CLOSE, COMPRESSED, TEXT, messages
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from mesh.model import ListenerTls

NO_CONTEXT = b"server_no_context_takeover; client_no_context_takeover"
Frames = list[tuple[int, bytes]]


def unmasked(data: bytes) -> bytes:
    """A client's frame as a server's: one without a mask becomes one with, which is as wrong."""
    length = data[1] & 127
    at = {126: 4, 127: 10}.get(length, 2)
    if not data[1] & 128:
        return data[:1] + bytes([data[1] | 128]) + data[2:at] + bytes(4) + data[at:]
    key, payload = data[at : at + 4], data[at + 4 :]
    whole = (key * (len(payload) // 4 + 1))[: len(payload)]
    plain = (int.from_bytes(payload, "big") ^ int.from_bytes(whole, "big")).to_bytes(len(payload), "big")
    return data[:1] + bytes([length]) + data[2:at] + plain


def of_a_server(frames: list[bytes]) -> list[tuple[bytes, int]]:
    """A case as the server sends it, each piece with how many messages are to be back before it.

    A frame that comes in pieces of a byte is put together and cut again.
    """
    waits = messages(frames)
    if len(frames[0]) == 1:
        *pieces, last = frames
        return [*((bytes([byte]), 0) for byte in unmasked(b"".join(pieces))), (unmasked(last), waits[-1])]
    return [(data if data.startswith(b"GET ") else unmasked(data), count) for data, count in zip(frames, waits, strict=True)]


def told(data: bytes) -> Frames:
    """A client's whole frames, without their masks, which are different each time."""
    found = []
    while len(data) >= 6:
        length, at = data[1] & 127, 2
        if length >= 126:
            at = 4 if length == 126 else 10
            length = int.from_bytes(data[2:at], "big")
        if len(data) < at + 4 + length:
            break
        frame = unmasked(data[: at + 4 + length])
        found.append((data[0], frame[at:]))
        data = data[at + 4 + length :]
    return found


class Server:
    """Sends one case to each connection, and keeps what came back."""

    def __init__(self) -> None:
        self.frames: list[bytes] = []
        self.extension = b""
        self.got = b""
        self.done = asyncio.Event()

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        key = next(line.partition(b":")[2].strip() for line in head.split(b"\r\n") if line.lower().startswith(b"sec-websocket-key:"))
        accept = base64.b64encode(hashlib.sha1(key + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest())
        writer.write(b"HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: Upgrade\r\nsec-websocket-accept: " + accept)
        writer.write(b"\r\n" + self.extension + b"\r\n")
        got, came, ended = bytearray(), asyncio.Event(), asyncio.Event()

        async def send() -> None:
            for data, echoes in of_a_server(self.frames):
                while not ended.is_set() and echoes and sum(kind & 15 in (TEXT, BINARY) for kind, _ in told(bytes(got))) < echoes:
                    came.clear()
                    await came.wait()
                writer.write(data)
                await writer.drain()

        sending = asyncio.ensure_future(send())
        with contextlib.suppress(ConnectionError):
            # Whoever has said that it closes, or was told, waits for the server's end (RFC 6455, section 7.1.1).
            while not any(kind & 15 == CLOSE for kind, _ in told(bytes(got))[-3:]) and (data := await reader.read(65536)):
                got += data
                came.set()
        ended.set()
        came.set()
        with contextlib.suppress(ConnectionError):
            await sending
        writer.close()
        self.got = bytes(got)
        self.done.set()


async def play(server: Server, port: int, tls: bool, frames: list[bytes], extension: bytes) -> Frames:
    """What a client that gives messages back makes of a case."""
    server.frames, server.extension = frames, extension
    server.done.clear()
    more = {"ssl": trusting()} if tls else {}
    url = f"{'wss' if tls else 'ws'}://shop.example:{port}/case"
    compression = "deflate" if extension else None
    async with connect(url, host="127.0.0.1", proxy=None, max_size=None, max_queue=None, compression=compression, **more) as client:
        with contextlib.suppress(ConnectionClosed):
            async for message in client:
                await client.send(message)
    await asyncio.wait_for(server.done.wait(), 20)
    return told(server.got)


def results(cases: dict[str, list[bytes]], tls: ListenerTls | None, extension: bytes) -> tuple[dict[str, Frames], dict[str, Frames]]:
    """The results of the cases without the gateway, and through it."""

    async def go() -> tuple[dict[str, Frames], dict[str, Frames]]:
        async with AsyncExitStack() as stack:
            server = Server()
            listening = await stack.enter_async_context(await asyncio.start_server(server, "127.0.0.1", 0))
            port: int = listening.sockets[0].getsockname()[1]
            made = await stack.enter_async_context(through(port, tls=tls))
            direct = {name: await play(server, port, False, frames, extension) for name, frames in cases.items()}
            by_gateway = {name: await play(server, made.port, tls is not None, frames, extension) for name, frames in cases.items()}
            return direct, by_gateway

    return asyncio.run(go())


@pytest.mark.parametrize("tls", [None, MUTUAL], ids=["plain", "tls"])
@pytest.mark.parametrize(
    ("cases", "extension"),
    [
        (CASES, b""),
        (COMPRESSED, b"sec-websocket-extensions: permessage-deflate; server_no_context_takeover; client_no_context_takeover\r\n"),
    ],
    ids=["plain", "deflate"],
)
def test_the_cases_come_out_as_they_do_without_the_gateway(
    cases: dict[str, list[bytes]], extension: bytes, tls: ListenerTls | None
) -> None:
    direct, by_gateway = results(cases, tls, extension)
    assert {name: (direct[name][-2:], by_gateway[name][-2:]) for name in cases if direct[name] != by_gateway[name]} == {}
    assert sum(map(len, direct.values())) > len(cases), "hardly anything was said at all"
