"""What the tool of the measurements counts as right, as wrong, and as no answer: a gateway that answers wrongly must not look fast."""

from __future__ import annotations

import base64
import hashlib
import json
import socket
import ssl
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from bench import build
from bench.contenders import EnvoyAlone, TollhouseBare
from bench.report import Figures, bad, table
from bench.scenarios import scenarios
from identity.ca import Authority, write_identity
from tests import servers

pytestmark = pytest.mark.e2e

HOST = "bench.example"
RIGHT = bytes(ord("a") + (at ^ at >> 8) % 26 for at in range(256))
"""The body of every answer of 256 bytes."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("bench")
    authority = Authority.create(HOST)
    for name in ("gw", "caller"):
        write_identity(authority.issue(f"spiffe://{HOST}/ns/bench/sa/{name}", dns=(HOST,)), made / name)
    return made


@pytest.fixture(scope="module")
def upstream(folder: Path) -> Iterator[tuple[int, int]]:
    http, rpc = servers.free_port(), servers.free_port()
    command = [str(build.binary("tool")), "upstream", "-listen", f"127.0.0.1:{http}", "-grpc", f"127.0.0.1:{rpc}"]
    process = servers.Process(
        [*command, "-identity", str(folder / "gw")], ready=lambda: servers.answers(http) and servers.answers(rpc), name="upstream"
    )
    try:
        process.start()
        yield http, rpc
    finally:
        process.close()


def load(folder: Path, port: int, *more: str) -> dict[str, Any]:
    command = [str(build.binary("tool")), "load", "-address", f"127.0.0.1:{port}", "-identities", str(folder / "caller")]
    command += ["-requests", "40", "-connections", "2", "-workers", "2", *more]
    done = subprocess.run(command, capture_output=True, text=True, input="go\n", timeout=60, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def counts(found: dict[str, Any]) -> tuple[int, int, int]:
    return found["requests"], found["errors"], found["wrong"]


KINDS = {
    "http/1.1": (0, ("-kind", "h1")),
    "http/2": (0, ("-kind", "h2")),
    "held": (0, ("-kind", "h2", "-hold")),
    "large answers": (0, ("-kind", "h1", "-answer", "100000")),
    "uploads": (0, ("-kind", "h1", "-upload", "100000")),
    "uploads by http/2": (0, ("-kind", "h2", "-upload", "100000", "-answer", "70000")),
    "grpc": (1, ("-kind", "grpc", "-upload", "128")),
    "grpc stream": (1, ("-kind", "stream", "-upload", "128")),
    "grpc stream, many on their way": (1, ("-kind", "stream", "-upload", "128", "-window", "8")),
    "websocket": (0, ("-kind", "websocket", "-upload", "128")),
    "websocket, long": (0, ("-kind", "websocket", "-upload", "100000", "-window", "3", "-hold")),
}


@pytest.mark.parametrize("kind", KINDS)
def test_right_answers(folder: Path, upstream: tuple[int, int], kind: str) -> None:
    port, arguments = KINDS[kind]
    found = load(folder, upstream[port], *arguments)
    assert counts(found) == (40, 0, 0), found["first"]
    assert found["p99"] >= found["p50"] > 0


def serving(folder: Path, answer: Callable[[BinaryIO, BinaryIO], None]) -> Iterator[int]:
    """A server by TLS, with one connection at a time for each thread; `answer` serves one of them until it raises."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "gw" / "cert.pem", folder / "gw" / "key.pem")
    listening = socket.create_server(("127.0.0.1", 0))

    def one(sock: socket.socket) -> None:
        with suppress(OSError, ValueError), context.wrap_socket(sock, server_side=True) as tls, tls.makefile("rwb", 0) as both:
            reading: Any = tls.makefile("rb")
            while True:
                answer(reading, both)  # type: ignore[arg-type]

    def all_of_them() -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=one, args=(listening.accept()[0],), daemon=True).start()

    threading.Thread(target=all_of_them, daemon=True).start()
    yield listening.getsockname()[1]
    listening.close()


def head(reading: BinaryIO) -> dict[str, str]:
    """The fields of a request's head. Raises ValueError when there is no request any more."""
    if not reading.readline():
        raise ValueError
    fields = {}
    while (line := reading.readline().strip()) != b"":
        name, _, value = line.decode().partition(": ")
        fields[name] = value
    return fields


ANSWERS = {
    "right": (b"200 OK", RIGHT, RIGHT, (40, 0, 0)),
    "another status": (b"503 Not now", RIGHT, RIGHT, (0, 0, 40)),
    "too short": (b"200 OK", RIGHT[:-1], RIGHT[:-1], (0, 0, 40)),
    "too long": (b"200 OK", RIGHT + b"x", RIGHT + b"x", (0, 0, 40)),
    "one other byte": (b"200 OK", RIGHT[:99] + b"X" + RIGHT[100:], RIGHT, (0, 0, 40)),
    "cut off": (b"200 OK", RIGHT, RIGHT[:100], (0, 40, 0)),
}


@pytest.mark.parametrize("kind", ANSWERS)
def test_answers_over_http(folder: Path, kind: str) -> None:
    status, body, sent, expected = ANSWERS[kind]

    def answer(reading: BinaryIO, writing: BinaryIO) -> None:
        head(reading)
        writing.write(b"HTTP/1.1 %b\r\ncontent-length: %d\r\n\r\n%b" % (status, len(body), body if body != RIGHT else sent))
        if len(sent) < len(body):
            raise ValueError("enough")

    for port in serving(folder, answer):
        assert counts(load(folder, port)) == expected


def test_an_upload_that_did_not_arrive(folder: Path) -> None:
    def answer(reading: BinaryIO, writing: BinaryIO) -> None:
        reading.read(int(head(reading)["content-length"]))
        writing.write(b"HTTP/1.1 200 OK\r\ncontent-length: 256\r\nx-request-bytes: 99\r\n\r\n" + RIGHT)

    for port in serving(folder, answer):
        found = load(folder, port, "-upload", "100")
        assert counts(found) == (0, 0, 40)
        assert '"99"' in found["first"]


@pytest.mark.parametrize(("turn", "expected"), [(0, (40, 0, 0)), (1, (0, 0, 40))])
def test_messages_that_come_back_as_others(folder: Path, turn: int, expected: tuple[int, int, int]) -> None:
    opened: set[int] = set()

    def answer(reading: BinaryIO, writing: BinaryIO) -> None:
        if id(reading) not in opened:
            opened.add(id(reading))
            key = head(reading)["sec-websocket-key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
            accept = base64.b64encode(hashlib.sha1(key.encode()).digest())
            writing.write(b"HTTP/1.1 101 Switch\r\nconnection: upgrade\r\nupgrade: websocket\r\nsec-websocket-accept: %b\r\n\r\n" % accept)
            frame(reading, writing, 0)  # the one that it is opened with
        frame(reading, writing, turn)

    def frame(reading: BinaryIO, writing: BinaryIO, turn: int) -> None:
        kind, size = reading.read(2)
        mask = reading.read(4)
        payload = bytearray(byte ^ mask[at % 4] for at, byte in enumerate(reading.read(size & 0x7F)))
        if kind == 0x82:
            payload[50] ^= turn
        writing.write(struct.pack("BB", kind, len(payload)) + payload)

    for port in serving(folder, answer):
        assert counts(load(folder, port, "-kind", "websocket", "-upload", "100")) == expected


def test_what_is_no_grpc(folder: Path, upstream: tuple[int, int]) -> None:
    found = load(folder, upstream[0], "-kind", "grpc", "-upload", "128")
    assert counts(found) == (0, 0, 40)
    assert "content-type" in found["first"]


def test_a_table_says_what_was_wrong() -> None:
    scenario = next(each for each in scenarios(20000, 10) if "WebSocket" in each.name)
    results = {kind.name: Figures() for kind in (EnvoyAlone, TollhouseBare)}
    fine = {"requests": 100, "errors": 0, "wrong": 0, "first": "", "p50": 1.0, "p99": 2.0, "rate": 1000.0}
    for figures in results.values():
        figures.add(fine, 2000.0)
    assert bad(results) == []
    results[TollhouseBare.name].add({**fine, "requests": 0, "wrong": 100, "first": "status 503"}, 2000.0)
    assert [name for name, _ in bad(results)] == [TollhouseBare.name]
    text = table("WebSockets", scenario, results)
    assert "CPU µs/message" in text
    assert "0 errors, 100 wrong; the first: status 503" in text
    assert "| Envoy | 20.0 | 1.00 | 1000 |" in text
    assert f"| {TollhouseBare.name} | 1010 | 50.50 |" in text


def test_every_scenario_can_be_chosen() -> None:
    names = [each.name for each in scenarios(20000, 1000)]
    assert len(set(names)) == len(names)
    for part in ("HTTP/2 to HTTP/2", "gRPC unary", "gRPC streaming", "WebSocket", "100 kB answers", "100 kB uploads"):
        assert [name for name in names if part in name]
