"""The PROXY protocol on real sockets: read from trusted proxies alone, written for services that ask for it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import threading
from typing import Any

import pytest
from door_world import closed, until
from l4_world import (
    ACCESS,
    ask,
    backend,
    client_context,
    conversation,
    free_port,
    gateway_yaml,
    l4,
    roots_yaml,
    route_yaml,
    says,
    secret_yaml,
    server_context,
    service_yaml,
    tcp,
)

from gateway.limits import Limits
from gateway.proxy_header import Version, read_proxy_header, write_proxy_header
from mesh.outcome import Outcome
from mesh.questions import Decision, Verdict

MESH = "apiVersion: tollhouse.dev/v1\nkind: Mesh\nmetadata: {name: m}\nspec: {trustDomain: shop.example, trustedProxies: [127.0.0.1/32]}\n"
CLIENT, TARGET = ("203.0.113.9", 4711), ("198.51.100.1", 443)


def proxied(text: str, value: str) -> str:
    """The Gateway or Service with the annotation."""
    head, brace, rest = text.partition("metadata: {")
    return f"{head}{brace}annotations: {{tollhouse.dev/proxy-protocol: '{value}'}}, {rest}"


@pytest.mark.parametrize("header", [write_proxy_header("v1", CLIENT, TARGET), write_proxy_header("v2", CLIENT, TARGET)])
@conversation
async def test_what_a_trusted_proxy_says_is_who_is_asked_about(header: bytes) -> None:
    port = free_port()
    async with backend(says(b"one")) as one:
        gateway = proxied(gateway_yaml(tcp(port)), str(port))
        async with l4(gateway, MESH, route_yaml("TCPRoute", "r", "a"), service_yaml("a", one), ACCESS) as made:
            assert not made.snapshot.problems or all(problem.severity == "warning" for problem in made.snapshot.problems)
            made.answers.decision = Decision(verdict=Verdict.ALLOW)
            assert await ask(port, header + b"payload") == b"one\npayload"
            outcome = await made.outcome()
            peer = outcome.decisions[0][0].asking.peer
            assert ((peer.address, peer.port), (peer.local_address, peer.local_port)) == (CLIENT, TARGET)
            assert outcome.bytes_received == len(b"payload")


@conversation
async def test_a_header_in_single_bytes_is_put_together() -> None:
    port = free_port()
    async with backend(says(b"one")) as one:
        gateway = proxied(gateway_yaml(tcp(port)), "*")
        async with l4(gateway, MESH, route_yaml("TCPRoute", "r", "a"), service_yaml("a", one)) as made:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            header = write_proxy_header("v2", CLIENT, TARGET) + b"tail"
            for at in range(len(header)):
                writer.write(header[at : at + 1])
                await writer.drain()
                await asyncio.sleep(0.0005)
            writer.write_eof()
            assert await reader.read() == b"one\ntail"
            assert (await made.outcome()).peer.address == CLIENT[0]
            writer.close()


@conversation
async def test_the_proxy_speaks_for_itself() -> None:
    port = free_port()
    async with backend(says(b"one")) as one:
        gateway = proxied(gateway_yaml(tcp(port)), "*")
        async with l4(gateway, MESH, route_yaml("TCPRoute", "r", "a"), service_yaml("a", one)) as made:
            for number, header in enumerate((b"PROXY UNKNOWN\r\n", write_proxy_header("v2", None, None)), 1):
                assert await ask(port, header + b"x") == b"one\nx"
                outcome = await made.outcome(number)
                assert (outcome.peer.address, outcome.peer.local_port) == ("127.0.0.1", port)


@pytest.mark.parametrize("data", [b"hello", b"PROXY TCP4 1.2.3.4 nowhere 1 2\r\n", b"GET / HTTP/1.1\r\n\r\n"])
@conversation
async def test_a_trusted_proxy_without_a_good_header_gets_nowhere(data: bytes) -> None:
    port = free_port()
    async with backend(says(b"one")) as one:
        gateway = proxied(gateway_yaml(tcp(port)), "*")
        async with l4(gateway, MESH, route_yaml("TCPRoute", "r", "a"), service_yaml("a", one)) as made:
            assert await ask(port, data) == b""
            await until(lambda: made.metric("tollhouse_handshake_failures_total", reason="proxy_header") == 1)
            assert made.outcomes == []
            await until(lambda: made.gateway.connections == 0)


@conversation
async def test_a_header_that_does_not_come_ends_the_connection() -> None:
    port = free_port()
    async with backend(says(b"one")) as one:
        gateway = proxied(gateway_yaml(tcp(port)), "*")
        config = gateway, MESH, route_yaml("TCPRoute", "r", "a"), service_yaml("a", one)
        async with l4(*config, limits=Limits(handshake_timeout=0.3)) as made:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"PROXY TCP4 1.2.3.4")
            assert await closed(reader) == b""
            assert made.metric("tollhouse_handshake_failures_total", reason="timeout") == 1
            writer.close()


@conversation
async def test_from_others_a_header_is_bytes_like_any() -> None:
    port = free_port()
    elsewhere = MESH.replace("127.0.0.1/32", "10.0.0.0/8")
    async with backend(says(b"one")) as one:
        gateway = proxied(gateway_yaml(tcp(port)), "*")
        async with l4(gateway, elsewhere, route_yaml("TCPRoute", "r", "a"), service_yaml("a", one)) as made:
            header = write_proxy_header("v1", CLIENT, TARGET)
            assert await ask(port, header) == b"one\n" + header
            assert (await made.outcome()).peer.address == "127.0.0.1"
            # And a port that does not speak it does not read one from a proxy either.
            made.apply(gateway_yaml(tcp(port)), MESH, route_yaml("TCPRoute", "r", "a"), service_yaml("a", one))
            assert await ask(port, header) == b"one\n" + header


@conversation
async def test_before_tls_and_before_http() -> None:
    port, plain = free_port(), free_port()
    seen: list[bytes] = []

    async def http(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nok")
        writer.close()

    async with backend(http) as one:
        gateway = proxied(
            gateway_yaml(
                f"name: https, port: {port}, protocol: HTTPS, tls: {{certificateRefs: [{{name: cert}}]}}",
                f"name: http, port: {plain}, protocol: HTTP",
            ),
            f"{port}, {plain}",
        )
        config = gateway, MESH, secret_yaml("cert", "shop.example"), route_yaml("HTTPRoute", "r", "a"), service_yaml("a", one)
        async with l4(*config) as made:
            outcomes: list[Outcome] = []
            made.telemetry.record = outcomes.append
            request = b"GET / HTTP/1.1\r\nhost: shop.example\r\nx-forwarded-for: 6.6.6.6\r\nconnection: close\r\n\r\n"
            reader, writer = await asyncio.open_connection("127.0.0.1", plain)
            writer.write(write_proxy_header("v1", CLIENT, TARGET) + request)
            assert (await asyncio.wait_for(reader.read(), 10)).endswith(b"ok")
            writer.close()
            assert (await asyncio.to_thread(over_tls, port, write_proxy_header("v2", CLIENT, TARGET), request)).endswith(b"ok")
            assert len(seen) == 2
            await until(lambda: len(outcomes) == 2)
            assert {(outcome.peer.address, outcome.peer.local_address) for outcome in outcomes} == {(CLIENT[0], TARGET[0])}


def over_tls(port: int, header: bytes, data: bytes) -> bytes:
    """A client that sends a header, and then speaks TLS."""
    with socket.create_connection(("127.0.0.1", port), 10) as sock:
        sock.sendall(header)
        with client_context().wrap_socket(sock, server_hostname="shop.example") as tls:
            tls.sendall(data)
            got = b""
            while piece := tls.recv(65536):
                got += piece
            return got


class Headed:
    """A backend that wants a PROXY protocol header first, and then perhaps TLS; each connection in a thread."""

    def __init__(self, context: ssl.SSLContext | None = None) -> None:
        self.context = context
        self.headers: list[Any] = []
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.listening.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self._serve, args=(self.listening.accept()[0],), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        sock.settimeout(10)
        data = b""
        while (found := read_proxy_header(data)) is None:
            data += sock.recv(1)
        self.headers.append(found)
        if self.context is not None:
            sock = self.context.wrap_socket(sock, server_side=True)
        with contextlib.suppress(OSError), sock:
            sock.sendall(b"headed\n")
            sock.recv(99)


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("encrypted", [False, True])
@conversation
async def test_a_service_is_told_whose_connection_it_is(version: Version, encrypted: bool) -> None:
    port = free_port()
    serve = Headed(server_context("backend.example") if encrypted else None)
    policy = """
apiVersion: gateway.networking.k8s.io/v1
kind: BackendTLSPolicy
metadata: {namespace: shop, name: b}
spec:
  targetRefs: [{group: '', kind: Service, name: a}]
  validation: {hostname: backend.example, caCertificateRefs: [{group: '', kind: ConfigMap, name: roots}]}
"""
    config = [gateway_yaml(tcp(port)), route_yaml("TCPRoute", "r", "a"), proxied(service_yaml("a", serve.port), version)]
    config += [policy, roots_yaml("roots")] if encrypted else []
    async with l4(*config) as made:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        mine = writer.get_extra_info("sockname")
        assert await reader.readline() == b"headed\n"
        (header,) = serve.headers
        assert (header.source, header.destination) == (mine, ("127.0.0.1", port))
        writer.close()
        await made.outcome()
        serve.listening.close()


@conversation
async def test_a_shared_connection_is_the_gateways_own() -> None:
    port = free_port()
    headers: list[Any] = []

    async def http(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        data = b""
        while (found := read_proxy_header(data)) is None:
            data += await reader.readexactly(1)
        headers.append(found)
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nok")
        writer.close()

    async with backend(http) as one:
        config = gateway_yaml(f"name: http, port: {port}, protocol: HTTP"), route_yaml("HTTPRoute", "r", "a")
        async with l4(*config, proxied(service_yaml("a", one), "v2")):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
            assert (await asyncio.wait_for(reader.read(), 10)).endswith(b"ok")
            assert [(header.source, header.destination) for header in headers] == [(None, None)]
            writer.close()


@conversation
async def test_a_service_that_begins_to_want_a_header_gets_new_connections() -> None:
    port = free_port()
    first: list[bytes] = []

    async def http(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                first.append(head.partition(b"\r\n")[0])
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
        writer.close()

    async with backend(http) as one:
        config = gateway_yaml(f"name: http, port: {port}, protocol: HTTP"), route_yaml("HTTPRoute", "r", "a")
        async with l4(*config, service_yaml("a", one)) as made:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            for number in range(2):
                writer.write(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
                assert (await reader.readuntil(b"\r\n\r\nok")).startswith(b"HTTP/1.1 200")
                if not number:
                    made.apply(*config, proxied(service_yaml("a", one), "v1"))
            assert first == [b"GET / HTTP/1.1", b"PROXY UNKNOWN"]
            writer.close()
