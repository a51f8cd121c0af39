"""HTTP/2 conformance: h2spec, all of it and strictly, against the server codec behind a bare socket."""

from __future__ import annotations

import asyncio
import subprocess

from gateway.codec import events
from gateway.codec.h2_server import H2Server
from tests import install


class Answering(asyncio.Protocol):
    """Answers each request with a few bytes, once it is complete."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.codec = H2Server(b"http")
        self.pending: set[int] = set()
        self.flush()

    def data_received(self, data: bytes) -> None:
        for event in self.codec.receive(data):
            if isinstance(event, events.RequestReceived):
                self.pending.add(event.stream)
                if event.ended:
                    self.answer(event.stream)
            elif isinstance(event, events.BodyReceived):
                self.codec.consumed(event.stream, event.credit)
            elif isinstance(event, events.Ended):
                self.answer(event.stream)
            elif isinstance(event, events.Refused) and event.stream:
                self.codec.send_head(event.stream, event.refusal.answer_status, [(b"content-length", b"0")], True)
        self.flush()

    def answer(self, stream: int) -> None:
        if stream in self.pending:
            self.pending.discard(stream)
            self.codec.send_head(stream, 200, [(b"content-length", b"5")], False)
            self.codec.send_body(stream, b"hello", True)

    def flush(self) -> None:
        data = self.codec.take()
        if data:
            self.transport.write(data)
        if self.codec.closing and self.transport.can_write_eof():
            self.transport.write_eof()  # not closed at once: what is still to come would have the kernel reset the connection

    def connection_lost(self, exc: Exception | None) -> None:
        self.codec.eof()


async def conformance() -> tuple[int, str]:
    server = await asyncio.get_running_loop().create_server(Answering, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    command = [str(install.install("h2spec")), "--strict", "-h", "127.0.0.1", "-p", str(port), "-o", "3"]
    process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    output, _ = await asyncio.wait_for(process.communicate(), 110)
    server.close()
    return process.returncode or 0, output.decode(errors="replace")


def test_the_server_codec_passes_h2spec_strictly() -> None:
    code, output = asyncio.run(conformance())
    assert " 0 failed" in output, output[-6000:]
    assert code == 0, output[-3000:]
