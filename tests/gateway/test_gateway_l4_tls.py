"""TLSRoute on real sockets: passed through and terminated."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from door_world import WEB, authority, until, web_identity
from l4_world import (
    ACCESS,
    L4,
    Serve,
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

from identity.files import StaticIdentity
from identity.tls import client_context as mutual
from identity.tls import server_context as mutual_server
from mesh.model import ClientValidation, ListenerTls, UpstreamTls
from mesh.questions import Decision, Verdict


def tls(port: int, mode: str, name: str = "tls", host: str = "", more: str = "") -> str:
    hostname = f", hostname: '{host}'" if host else ""
    return f"name: {name}, port: {port}, protocol: TLS{hostname}, tls: {{mode: {mode}{more}}}"


CERT = ", certificateRefs: [{name: cert}]"


def hosts(*names: str) -> str:
    return "  hostnames: [" + ", ".join(f"'{name}'" for name in names) + "]\n"


@conversation
async def test_passthrough_goes_by_the_name_and_touches_nothing() -> None:
    port = free_port()
    context = server_context("abc.shop.example", "other.shop.example", "deep.abc.shop.example", alpn=("x-proto",))
    async with backend(says(b"one"), context) as one, backend(says(b"two"), context) as two:
        manifests = (
            gateway_yaml(tls(port, "Passthrough", host="*.shop.example")),
            route_yaml("TLSRoute", "exact", "a", more=hosts("abc.shop.example", "elsewhere.example")),
            route_yaml("TLSRoute", "wild", "b", more=hosts("*.example")),
            service_yaml("a", one),
            service_yaml("b", two),
        )
        async with l4(*manifests) as made:
            client = client_context()
            client.set_alpn_protocols(["x-proto"])
            reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=client, server_hostname="abc.shop.example")
            assert writer.get_extra_info("ssl_object").selected_alpn_protocol() == "x-proto"
            assert await reader.readline() == b"one\n"
            writer.close()
            assert await ask(port, b"ping", "other.shop.example", client) == b"two\nping"
            assert await ask(port, b"ping", "deep.abc.shop.example", client) == b"two\nping"
            await until(lambda: len(made.outcomes) == 3)
            assert {outcome.peer.sni for outcome in made.outcomes} == {"abc.shop.example", "other.shop.example", "deep.abc.shop.example"}
            for wrong in ("elsewhere.example", "shop.example", "abc.shop.exampl"):
                with contextlib.suppress(ssl.SSLError, ConnectionError):
                    assert await ask(port, b"", wrong, client) == b""
            assert made.metric("tollhouse_handshake_failures_total", reason="unknown_name") == 3


@conversation
async def test_a_client_hello_in_single_bytes_is_put_together() -> None:
    port = free_port()
    async with backend(says(b"one"), server_context("abc.shop.example")) as one:
        manifests = (
            gateway_yaml(tls(port, "Passthrough")),
            route_yaml("TLSRoute", "r", "a", more=hosts("abc.shop.example")),
            service_yaml("a", one),
        )
        async with l4(*manifests):
            incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
            client = client_context().wrap_bio(incoming, outgoing, server_hostname="abc.shop.example")
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with pytest.raises(ssl.SSLWantReadError):
                client.do_handshake()
            hello = outgoing.read()
            for at in range(len(hello)):
                writer.write(hello[at : at + 1])
                await writer.drain()
                await asyncio.sleep(0.0005)
            while True:
                try:
                    client.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    writer.write(outgoing.read())
                    incoming.write(await asyncio.wait_for(reader.read(65536), 10))
            writer.write(outgoing.read())
            while True:
                try:
                    assert client.read() == b"one\n"
                    break
                except ssl.SSLWantReadError:
                    incoming.write(await asyncio.wait_for(reader.read(65536), 10))
            writer.close()


@pytest.mark.parametrize("data", [b"GET / HTTP/1.1\r\n\r\n", b"\x00" * 20, b"\x16\x03\x01\x00\x05\x02\x00\x00\x01\x00"])
@conversation
async def test_what_is_not_tls_is_not_passed_through(data: bytes) -> None:
    port = free_port()
    async with backend(says(b"one")) as one:
        manifests = (
            gateway_yaml(tls(port, "Passthrough")),
            route_yaml("TLSRoute", "r", "a", more=hosts("*.shop.example")),
            service_yaml("a", one),
        )
        async with l4(*manifests) as made:
            assert b"one" not in await ask(port, data)
            assert made.outcomes == []
            assert made.metric("tollhouse_handshake_failures_total") == 1


@conversation
async def test_terminated_tls_goes_on_in_plaintext() -> None:
    port = free_port()
    async with backend(says(b"one")) as one:
        manifests = (
            gateway_yaml(tls(port, "Terminate", more=CERT)),
            secret_yaml("cert", "abc.shop.example", "no.shop.example"),
            route_yaml("TLSRoute", "r", "a", more=hosts("abc.shop.example")),
            service_yaml("a", one),
        )
        async with l4(*manifests) as made:
            client = client_context()
            client.set_alpn_protocols(["http/1.1", "h2"])
            reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=client, server_hostname="abc.shop.example")
            assert writer.get_extra_info("ssl_object").selected_alpn_protocol() is None
            assert await reader.readline() == b"one\n"
            writer.write(b"q" * 200_000)
            assert await reader.readexactly(200_000) == b"q" * 200_000
            writer.close()
            assert (await made.outcome()).peer.tls_version == "TLSv1.3"
            with contextlib.suppress(ssl.SSLError, ConnectionError):
                assert await ask(port, b"", "no.shop.example", client_context()) == b""
            assert (await made.outcome(2)).flag == "NR"


@conversation
async def test_https_passthrough_and_terminate_share_a_port() -> None:
    port = free_port()
    async with backend(says(b"passed"), server_context("pass.shop.example")) as one, backend(says(b"ended")) as two:
        manifests = (
            gateway_yaml(
                f"name: https, port: {port}, protocol: HTTPS, hostname: www.shop.example, tls: {{certificateRefs: [{{name: cert}}]}}",
                tls(port, "Passthrough", "pass", "pass.shop.example"),
                tls(port, "Terminate", "end", "*.shop.example", CERT),
            ),
            secret_yaml("cert", "www.shop.example", "end.shop.example"),
            route_yaml("TLSRoute", "p", "a", more=hosts("pass.shop.example")),
            route_yaml("TLSRoute", "t", "b", more=hosts("end.shop.example")),
            service_yaml("a", one),
            service_yaml("b", two),
        )
        async with l4(*manifests) as made:
            assert not made.snapshot.problems, made.snapshot.problems
            client = client_context()
            assert await ask(port, b"", "pass.shop.example", client) == b"passed\n"
            assert await ask(port, b"", "end.shop.example", client) == b"ended\n"
            reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=client, server_hostname="www.shop.example")
            writer.write(b"GET / HTTP/1.1\r\nhost: www.shop.example\r\n\r\n")
            assert (await reader.readline()).startswith(b"HTTP/1.1 404")
            writer.close()


@pytest.mark.parametrize("identity", ["web", "none"])
@conversation
async def test_the_certificate_is_the_identity_that_is_asked_about(identity: str) -> None:
    port = free_port()
    option = ", options: {tollhouse.dev/certificate: SVID, tollhouse.dev/client-validation: TrustBundle}"
    async with backend(says(b"one")) as one:
        manifests = (
            gateway_yaml(tls(port, "Terminate", more=option)),
            route_yaml("TLSRoute", "r", "a", more=hosts("shop.example")),
            service_yaml("a", one),
            ACCESS.replace("TCPRoute", "TLSRoute"),
            "apiVersion: tollhouse.dev/v1\nkind: Mesh\nmetadata: {name: m}\nspec: {trustDomain: shop.example}\n",
        )
        async with l4(*manifests) as made:
            made.answers.decision = Decision(verdict=Verdict.ALLOW)
            if identity == "web":
                context = mutual(UpstreamTls(mode="mesh"), web_identity(), ())
                assert await ask(port, b"hi", "shop.example", context) == b"one\nhi"
                outcome = await made.outcome()
                assert outcome.decisions[0][0].asking.caller.principal == WEB
                assert made.metric("istio_tcp_connections_opened_total", source_principal=WEB, destination_service="a.shop") == 1
            else:
                with contextlib.suppress(ssl.SSLError, ConnectionError):
                    assert await ask(port, b"", "shop.example", client_context()) == b""
                assert made.outcomes == []


@conversation
async def test_a_terminated_connection_goes_on_by_the_backends_own_tls() -> None:
    port = free_port()
    policy = """
apiVersion: gateway.networking.k8s.io/v1
kind: BackendTLSPolicy
metadata: {namespace: shop, name: b}
spec:
  targetRefs: [{group: '', kind: Service, name: a}]
  validation: {hostname: HOST, caCertificateRefs: [{group: '', kind: ConfigMap, name: roots}]}
"""
    async with backend(says(b"one"), server_context("backend.example")) as one:
        rest = (
            gateway_yaml(tcp(port)),
            route_yaml("TCPRoute", "r", "a"),
            roots_yaml("roots"),
            service_yaml("a", one),
        )
        async with l4(*rest, policy.replace("HOST", "backend.example")) as made:
            assert await ask(port, b"ping") == b"one\nping"
            assert (await made.outcome()).flag == "-"
            made.apply(*rest, policy.replace("HOST", "other.example"))
            assert await ask(port) == b""
            assert (await made.outcome(2)).flag == "UF"


@conversation
async def test_a_mesh_service_must_prove_who_it_is() -> None:
    port = free_port()
    orders = "spiffe://shop.example/ns/shop/sa/orders"
    context = mutual_server(ListenerTls(svid=True, client=ClientValidation(), alpn=()), StaticIdentity(authority().issue(orders)))
    identity = """
apiVersion: tollhouse.dev/v1
kind: ServiceIdentity
metadata: {namespace: shop, name: a}
spec: {service: a, identities: [ID]}
"""
    async with backend(says(b"mesh"), context) as one:
        rest = gateway_yaml(tcp(port)), route_yaml("TCPRoute", "r", "a"), service_yaml("a", one)
        async with l4(*rest, identity.replace("ID", orders)) as made:
            assert await ask(port, b"hi") == b"mesh\nhi", made.outcomes[0].reason
            outcome = await made.outcome()
            assert (outcome.upstream_principal, outcome.flag) == (orders, "-")
            made.apply(*rest, identity.replace("ID", orders + "-other"))
            assert await ask(port) == b""
            assert (await made.outcome(2)).flag == "UF"


# Half-closed, and cut off


class TlsClient:
    """A TLS client that can end one direction alone, which asyncio's can't."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, name: str) -> None:
        self.reader, self.writer = reader, writer
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = client_context().wrap_bio(self.incoming, self.outgoing, server_hostname=name)

    async def _do(self, step: Callable[[], Any]) -> Any:
        while True:
            try:
                return step()
            except ssl.SSLWantReadError:
                self.flush()
                data = await asyncio.wait_for(self.reader.read(65536), 10)
                if not data:
                    raise EOFError from None
                self.incoming.write(data)
            finally:
                self.flush()

    def flush(self) -> None:
        self.writer.write(self.outgoing.read())

    async def handshake(self) -> None:
        await self._do(self.tls.do_handshake)

    def write(self, data: bytes) -> None:
        self.tls.write(data)
        self.flush()

    async def read(self) -> bytes:
        """Some bytes; empty after the peer's close_notify. EOFError when the connection ends without one."""
        try:
            data: bytes = await self._do(lambda: self.tls.read(65536))
        except ssl.SSLZeroReturnError:
            return b""
        return data

    async def rest(self) -> bytes:
        got = b""
        while data := await self.read():
            got += data
        return got

    def close_notify(self) -> None:
        with contextlib.suppress(ssl.SSLWantReadError):  # for the peer's own, if it has not come yet
            self.tls.unwrap()
        self.flush()


@asynccontextmanager
async def terminated(serve: Serve) -> AsyncIterator[tuple[L4, TlsClient]]:
    port = free_port()
    async with backend(serve) as one:
        manifests = (
            gateway_yaml(tls(port, "Terminate", more=CERT)),
            secret_yaml("cert", "abc.shop.example"),
            route_yaml("TLSRoute", "r", "a", more=hosts("abc.shop.example")),
            service_yaml("a", one),
        )
        async with l4(*manifests) as made:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            client = TlsClient(reader, writer, "abc.shop.example")
            await client.handshake()
            yield made, client
            writer.close()


@conversation
async def test_a_clients_close_notify_ends_one_direction() -> None:
    async def answers_at_the_end(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        data = await reader.read()
        writer.write(data * 50)
        writer.close()

    async with terminated(answers_at_the_end) as (made, client):
        client.write(b"k" * 10_000)
        client.close_notify()
        assert await client.rest() == b"k" * 500_000
        assert (await made.outcome()).flag == "-"


@conversation
async def test_the_backends_end_is_a_close_notify_and_the_client_may_go_on() -> None:
    got: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
    started = asyncio.Event()

    async def ends_first(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(1)
        writer.write(b"bye")
        writer.write_eof()
        started.set()
        got.set_result(await reader.read())
        writer.close()

    async with terminated(ends_first) as (made, client):
        client.write(b"!")
        await started.wait()
        # Application data crosses the close_notify on its way: it must not break the connection.
        for _ in range(50):
            client.write(b"on and on ")
            await asyncio.sleep(0)
        assert await client.rest() == b"bye"
        client.write(b"end")
        client.close_notify()
        assert await asyncio.wait_for(got, 10) == b"on and on " * 50 + b"end"
        assert (await made.outcome()).flag == "-"


@conversation
async def test_a_client_that_ends_without_close_notify_loses_nothing() -> None:
    got: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    async def keeps(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        got.set_result(await reader.read())
        writer.close()

    async with terminated(keeps) as (_, client):
        client.write(b"log line\n" * 1000)
        client.writer.write_eof()
        assert await asyncio.wait_for(got, 10) == b"log line\n" * 1000


@conversation
async def test_what_has_been_taken_out_of_tls_never_goes_to_a_port_for_tls_in_plaintext() -> None:
    port = free_port()
    wss = "port: 80, appProtocol: kubernetes.io/wss"
    async with backend(says(b"plain")) as plain, backend(says(b"tls"), server_context("pass.example")) as inside:
        manifests = (
            gateway_yaml(
                tls(port, "Passthrough", "pass", "pass.example"),
                tls(port, "Terminate", "end", "end.example", CERT),
            ),
            secret_yaml("cert", "end.example"),
            route_yaml("TLSRoute", "r", "a", more=hosts("pass.example")),
            route_yaml("TLSRoute", "s", "b", more=hosts("end.example")),
            service_yaml("a", inside).replace("port: 80, protocol: TCP", wss),
            service_yaml("b", plain).replace("port: 80, protocol: TCP", wss),
        )
        async with l4(*manifests) as made:
            assert await ask(port, b"", "pass.example", client_context()) == b"tls\n"
            assert await ask(port, b"", "end.example", client_context()) == b""
            await made.outcome(2)
            assert [outcome.flag for outcome in made.outcomes] == ["-", "NC"]
