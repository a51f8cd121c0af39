"""Accepting: which listener, which certificate, who is there; and everything that may go wrong before anybody is known."""

from __future__ import annotations

import asyncio
import socket
import ssl
import time
from collections.abc import Awaitable, Callable

import msgspec
import pytest
from door_world import (
    GATEWAY,
    KEY,
    MUTUAL,
    SIMPLE,
    WEB,
    Answers,
    Door,
    Echo,
    a_listener,
    a_snapshot,
    answer,
    authority,
    closed,
    door,
    gateway_identity,
    get,
    listening_socket,
    until,
    web_identity,
)

from gateway.gateway import Gateway
from gateway.limits import Limits
from gateway.listening import plain_address
from identity.ca import Authority
from identity.files import StaticIdentity
from mesh.model import ClientValidation, ListenerTls, MeshSettings
from telemetry.record import Telemetry


def run(test: Callable[[Door], Awaitable[None]], *listeners: object, **options: object) -> None:
    async def whole() -> None:
        async with door(*listeners, **options) as made:  # type: ignore[arg-type]
            await test(made)

    asyncio.run(whole())


def trusting_all(identity: StaticIdentity | None = None, alpn: tuple[str, ...] = ("http/1.1",)) -> ssl.SSLContext:
    """A client that accepts any server, and shows `identity` or nothing."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(list(alpn))
    if identity is not None:
        from identity.tls import _load_pair

        _load_pair(context, identity.current.chain, identity.current.key, "test")
    return context


async def is_refused(made: Door, context: ssl.SSLContext) -> None:
    """With TLS 1.3 a client learns of it when it reads."""
    with pytest.raises((ssl.SSLError, ConnectionError, asyncio.IncompleteReadError)):
        reader, writer = await made.connect(context=context)
        writer.write(get(b"/hello"))
        await answer(reader)


FOREIGN = Authority.create("other.example")


def expired() -> StaticIdentity:
    return StaticIdentity(authority().issue(WEB, lifetime=3600, now=time.time() - 7200))


@pytest.mark.parametrize(
    ("client", "reason"),
    [
        (lambda: None, "no_certificate"),
        (lambda: StaticIdentity(FOREIGN.issue("spiffe://other.example/ns/shop/sa/web")), "unknown_ca"),
        (lambda: StaticIdentity(Authority.create("shop.example").issue(WEB)), "unknown_ca"),
        (expired, "expired"),
    ],
)
def test_clients_that_are_not_who_they_should_be(client: Callable[[], StaticIdentity | None], reason: str) -> None:
    async def test(made: Door) -> None:
        await is_refused(made, trusting_all(client()))
        await until(lambda: made.failures(reason) == 1)
        await until(lambda: made.gateway.connections == 0)
        assert not made.outcomes

    run(test)


def test_a_trust_domain_that_is_not_the_meshs() -> None:
    both = authority().trusting(FOREIGN.bundle)

    async def test(made: Door) -> None:
        await is_refused(made, trusting_all(StaticIdentity(FOREIGN.issue("spiffe://other.example/ns/shop/sa/web"))))
        await until(lambda: made.failures("foreign_trust_domain") == 1)

    run(test, identity=StaticIdentity(both.issue(GATEWAY, dns=["shop.example"])))


def test_plain_http_is_told_so() -> None:
    async def test(made: Door) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", made.port)
        writer.write(get(b"/"))
        status, headers, body = await answer(reader)
        assert (status, headers[b"connection"]) == (400, b"close")
        assert b"HTTPS" in body
        assert await closed(reader) == b""
        writer.close()
        assert made.failures("plain_http") == 1
        await until(lambda: made.gateway.connections == 0)

    run(test)


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (b"\0\1\2garbage", "not_tls"),
        (b"\x16\x03\x01\x00\x05\x02\0\0\1\0", "bad_record"),
        (b"\x16\x03\x01\x00\x05\x01\0\0\1\0", "bad_record"),
        (b"", "closed"),
    ],
)
def test_what_is_no_client_hello(sent: bytes, reason: str) -> None:
    async def test(made: Door) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", made.port)
        writer.write(sent)
        if not sent:
            writer.write_eof()
        await closed(reader)
        writer.close()
        await until(lambda: made.failures(reason) == 1)

    run(test)


def test_a_client_hello_that_comes_byte_by_byte() -> None:
    async def test(made: Door) -> None:
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        stream = trusting_all(web_identity()).wrap_bio(incoming, outgoing, server_hostname="shop.example")
        with pytest.raises(ssl.SSLWantReadError):
            stream.do_handshake()
        hello = outgoing.read()
        reader, writer = await asyncio.open_connection("127.0.0.1", made.port)
        for at in range(0, len(hello), 40):
            writer.write(hello[at : at + 40])
            await asyncio.sleep(0.002)
        while True:
            incoming.write(await asyncio.wait_for(reader.read(65536), 5))
            try:
                stream.do_handshake()
                break
            except ssl.SSLWantReadError:
                writer.write(outgoing.read())
        stream.write(get(b"/hello"))
        writer.write(outgoing.read())
        incoming.write(await asyncio.wait_for(reader.read(65536), 5))
        assert stream.read(65536).endswith(b"hello")
        writer.close()

    run(test)


@pytest.mark.parametrize("piece", [b"", b"\x16\x03\x01\x02\x00\x01"])
def test_a_handshake_that_does_not_end(piece: bytes) -> None:
    async def test(made: Door) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", made.port)
        writer.write(piece)
        started = time.monotonic()
        await closed(reader)
        assert 0.3 <= time.monotonic() - started < 3
        writer.close()
        assert made.failures("timeout", "https") == 1
        assert made.gateway.connections == 0

    run(test, limits=Limits(handshake_timeout=0.4))


def test_a_storm_of_handshakes_crowds_out_the_oldest() -> None:
    async def test(made: Door) -> None:
        waiting = [await asyncio.open_connection("127.0.0.1", made.port) for _ in range(6)]
        await until(lambda: made.failures("crowded_out") == 2)
        assert await closed(waiting[0][0]) == b""
        reader, writer = await made.connect()
        writer.write(get(b"/hello"))
        assert (await answer(reader))[2] == b"hello"
        for _, other in waiting:
            other.close()

    run(test, limits=Limits(handshakes=4))


def test_many_handshakes_at_once_all_succeed() -> None:
    async def test(made: Door) -> None:
        async def one() -> bytes:
            reader, writer = await made.connect()
            writer.write(get(b"/hello"))
            body = (await answer(reader))[2]
            writer.close()
            return body

        assert await asyncio.gather(*[one() for _ in range(40)]) == [b"hello"] * 40
        await until(lambda: made.gateway.connections == 0)

    run(test)


def test_connections_beyond_the_limit_wait() -> None:
    async def test(made: Door) -> None:
        first = await made.connect()
        second = await made.connect()
        third = asyncio.create_task(made.connect())
        await asyncio.sleep(0.1)
        assert not third.done()
        assert made.gateway.connections == 2
        first[1].close()
        reader, writer = await asyncio.wait_for(third, 5)
        writer.write(get(b"/hello"))
        assert (await answer(reader))[2] == b"hello"
        second[1].close()

    run(test, limits=Limits(connections=2, linger=0.1))


@pytest.mark.parametrize("sent", [b"", b"GET /hello HTTP/1.1\r\nhost: sh", get(b"/hello")])
def test_nobody_keeps_others_out_by_doing_nothing(sent: bytes) -> None:
    async def test(made: Door) -> None:
        idle = [await made.connect() for _ in range(2)]
        for reader, writer in idle:
            writer.write(sent)
            if sent.endswith(b"\r\n\r\n"):
                assert (await answer(reader))[0] == 200
        async with asyncio.timeout(5.0):
            reader, writer = await made.connect()
            writer.write(get(b"/hello"))
            assert (await answer(reader))[2] == b"hello"
        for reader, _ in idle:
            async with asyncio.timeout(5.0):
                assert await closed(reader) == b""

    run(test, limits=Limits(connections=2, linger=0.1, idle_when_full=0.3))


def test_a_full_port_keeps_who_is_served() -> None:
    async def test(made: Door) -> None:
        busy, busy_writer = await made.connect()
        busy_writer.write(get(b"/echo", b"content-length: 5\r\n", b"POST"))
        idle, _ = await made.connect()
        assert await closed(idle) == b""
        busy_writer.write(b"hello")
        assert (await answer(busy))[0] == 200

    run(test, limits=Limits(connections=2, linger=0.1, idle_when_full=0.3))


def test_sni_chooses_the_listener() -> None:
    async def test(made: Door) -> None:
        for name, listener, client in [
            ("shop.example", "exact", None),
            ("a.shop.example", "wild", web_identity()),
            ("a.b.shop.example", "wild", web_identity()),
            ("x.deep.shop.example", "deeper", web_identity()),
            ("elsewhere.example", "any", None),
        ]:
            reader, writer = await made.connect(context=trusting_all(client), name=name)
            writer.write(get(b"/hello").replace(b"host: shop.example", b"host: " + name.encode()))
            status, _, body = await answer(reader)
            assert (status, body) == (200, b"hello"), name
            assert made.outcomes[-1].listener == listener
            assert made.outcomes[-1].peer.sni == name
            writer.write(get(b"/hello").replace(b"host: shop.example", b"host: a.shop.example"))
            assert (await answer(reader))[0] == (200 if listener == "wild" else 421)
            writer.close()
        with pytest.raises(ssl.SSLError):
            reader, writer = await made.connect(context=trusting_all(), name="a.shop.example")
            writer.write(get(b"/hello"))
            await answer(reader)
        assert made.failures("no_certificate", "wild") == 1

    run(
        test,
        lambda port: a_listener(port, "exact", SIMPLE, "shop.example"),
        lambda port: a_listener(port, "wild", MUTUAL, "*.shop.example"),
        lambda port: a_listener(port, "deeper", MUTUAL, "*.deep.shop.example"),
        lambda port: a_listener(port, "any", SIMPLE, "*"),
    )


def test_a_name_that_no_listener_has() -> None:
    async def test(made: Door) -> None:
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await made.connect(context=trusting_all(), name="elsewhere.example")
        assert made.failures("unknown_name") == 1

    run(test, lambda port: a_listener(port, "https", SIMPLE, "shop.example"))


def test_an_identity_that_has_expired_is_not_served(caplog: pytest.LogCaptureFixture) -> None:
    async def test(made: Door) -> None:
        reader, writer = await made.connect()
        assert made.gateway.ready
        ((identity, serial),) = made.gateway.certificates()
        assert identity == GATEWAY
        await until(lambda: not made.gateway.ready, 8)
        assert "expired" in made.gateway.problems()["https"]
        assert made.gateway.certificates() == {}
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await made.connect()
        assert made.failures("not_serving") == 1
        writer.write(get(b"/hello"))
        assert (await answer(reader))[2] == b"hello", "the connections that there are stay"
        made.identity.replace(gateway_identity().current)
        assert made.gateway.ready
        reader, writer = await made.connect()
        writer.write(get(b"/hello"))
        assert (await answer(reader))[2] == b"hello"
        assert (GATEWAY, serial) not in made.gateway.certificates()

    run(test, identity=StaticIdentity(authority().issue(GATEWAY, dns=["shop.example"], lifetime=60, now=time.time() - 58)))
    assert "is not served" in caplog.text


def served_serial(writer: asyncio.StreamWriter) -> str:
    from identity.svid import facts_of

    return facts_of(writer.get_extra_info("ssl_object").getpeercert(True)).serial  # type: ignore[union-attr]


def test_a_renewed_identity_is_for_new_connections() -> None:
    async def test(made: Door) -> None:
        reader, writer = await made.connect()
        made.identity.replace(gateway_identity().current)
        _, other = await made.connect()
        assert served_serial(other) == made.identity.current.serial != served_serial(writer)
        writer.write(get(b"/hello"))
        assert b"connection" not in (await answer(reader))[1]
        assert f'serial="{made.identity.current.serial}"' in made.telemetry.page().decode()

    run(test)


def test_a_root_more_closes_nothing_and_a_root_less_drains() -> None:
    both = authority().trusting(FOREIGN.bundle)

    async def test(made: Door) -> None:
        reader, writer = await made.connect()
        writer.write(get(b"/hello"))
        await answer(reader)
        made.identity.replace(both.issue(GATEWAY, dns=["shop.example"]))
        writer.write(get(b"/hello"))
        assert b"connection" not in (await answer(reader))[1]
        busy_reader, busy = await made.connect()
        busy.write(get(b"/never"))
        await until(lambda: len(made.forwarder.exchanges) == 3)
        made.identity.replace(gateway_identity().current)
        assert await closed(reader) == b""
        made.forwarder.exchanges[-1].client.answer(204, [], True)
        status, headers, _ = await answer(busy_reader)
        assert (status, headers[b"connection"]) == (204, b"close")
        await until(lambda: made.gateway.connections == 0)

    run(test, limits=Limits(linger=0.1))


def test_what_a_snapshot_changes() -> None:
    async def test(made: Door) -> None:
        reader, writer = await made.connect()
        for change in [
            a_listener(made.port, timeout=3.0),
            a_listener(made.port, tls=msgspec.structs.replace(MUTUAL, alpn=("http/1.1",))),
            a_listener(made.port, tls=msgspec.structs.replace(MUTUAL, min_version="1.3")),
        ]:
            made.gateway.apply(a_snapshot(change, version="next"))
            writer.write(get(b"/hello"))
            status, headers, _ = await answer(reader)
            assert (status, b"connection" in headers) == (200, False)
        # The same listener asks for something else of its clients.
        made.gateway.apply(a_snapshot(a_listener(made.port, tls=ListenerTls(svid=True, client=ClientValidation(mode="optional")))))
        assert await closed(reader) == b""
        reader, writer = await made.connect()
        made.gateway.apply(a_snapshot(a_listener(made.port, tls=SIMPLE)))
        assert await closed(reader) == b""
        reader, writer = await made.connect(context=trusting_all())
        writer.write(get(b"/never"))
        await until(lambda: made.forwarder.exchanges[-1].path == b"/never")
        made.gateway.apply(a_snapshot())
        assert made.gateway.listening == ()
        with pytest.raises(OSError):
            await made.connect()
        made.forwarder.exchanges[-1].client.answer(200, [(b"content-length", b"0")], True)
        assert (await answer(reader))[1][b"connection"] == b"close"
        assert made.outcomes[-1].flag == "-"
        await until(lambda: made.gateway.connections == 0)

    run(test, limits=Limits(linger=0.1))


def test_another_trust_domain_drains() -> None:
    async def test(made: Door) -> None:
        reader, _ = await made.connect()
        mesh = MeshSettings(trust_domain="shop.example", aliases=("old.example",))
        made.gateway.apply(a_snapshot(a_listener(made.port), mesh=mesh))
        await asyncio.sleep(0.05)
        assert not reader.at_eof()
        made.gateway.apply(a_snapshot(a_listener(made.port)))
        assert await closed(reader) == b""

    run(test)


def test_a_request_uses_the_newest_snapshot() -> None:
    async def test(made: Door) -> None:
        reader, writer = await made.connect()
        made.gateway.apply(a_snapshot(a_listener(made.port, name="https", backends=())))
        writer.write(get(b"/hello"))
        assert (await answer(reader))[0] == 500

    run(test)


def a_gateway(telemetry: Telemetry | None = None, **options: object) -> Gateway:
    answers = Answers()
    return Gateway(
        asyncio.get_running_loop(),
        KEY,
        identity=gateway_identity(),
        decider=answers,
        lessee=answers,
        forwarder=Echo(),
        telemetry=telemetry or Telemetry(),
        address="127.0.0.1",
        **options,  # type: ignore[arg-type]
    )


def test_a_port_that_is_taken(caplog: pytest.LogCaptureFixture) -> None:
    async def whole() -> None:
        taken = listening_socket()
        number = taken.getsockname()[1]
        gateway = a_gateway()
        with pytest.raises(OSError, match=str(number)):
            gateway.apply(a_snapshot(a_listener(number)))
        assert not gateway.ready
        free = listening_socket()
        other = free.getsockname()[1]
        free.close()
        gateway.apply(a_snapshot(a_listener(other, "other")))
        assert gateway.ready
        gateway.apply(a_snapshot(a_listener(other, "other"), a_listener(number, "taken")))
        assert "cannot be bound" in gateway.problems()["taken"]
        assert [names for _, _, names in gateway.listening] == [("other",)]
        assert gateway.ready
        taken.close()
        gateway._bind_at = 0.0
        await until(lambda: not gateway.problems(), 8)
        assert len(gateway.listening) == 2
        gateway.close()
        assert gateway.listening == ()

    asyncio.run(whole())
    assert "cannot be bound" in caplog.text


def test_a_certificate_that_cannot_be_used_is_its_listeners_problem() -> None:
    async def whole() -> None:
        telemetry = Telemetry()
        first, second = listening_socket(), listening_socket()
        ports = [sock.getsockname()[1] for sock in (first, second)]
        gateway = a_gateway(telemetry, sockets={("127.0.0.1", port): sock for port, sock in zip(ports, (first, second), strict=True)})
        broken = ListenerTls(certificates=((b"no certificate", b"no key"),))
        gateway.apply(a_snapshot(a_listener(ports[0], "good"), a_listener(ports[1], "bad", broken)))
        assert list(gateway.problems()) == ["bad"]
        assert 'tollhouse_listener_problems{gateway="edge/ingress",listener="bad"} 1' in telemetry.page().decode()
        assert gateway.ready
        gateway.close()

    asyncio.run(whole())


def test_the_client_that_gives_up_first() -> None:
    async def test(made: Door) -> None:
        for _ in range(20):
            sock = socket.socket()
            sock.setblocking(False)
            sock.connect_ex(("127.0.0.1", made.port))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            await asyncio.sleep(0)
            sock.close()
        await until(lambda: made.gateway.connections == 0)
        reader, writer = await made.connect()
        writer.write(get(b"/hello"))
        assert (await answer(reader))[2] == b"hello"

    run(test)


@pytest.mark.parametrize(
    ("seen", "address"),
    [("::ffff:192.0.2.1", "192.0.2.1"), ("fe80::1%eth0", "fe80::1"), ("2001:db8::1", "2001:db8::1"), ("192.0.2.1",) * 2],
)
def test_addresses_are_written_in_one_way(seen: str, address: str) -> None:
    assert plain_address(seen) == address


@pytest.mark.parametrize("plain_first", [False, True])
def test_a_port_speaks_tls_or_does_not(plain_first: bool) -> None:
    async def test(made: Door) -> None:
        assert list(made.gateway.problems()) == ["secret" if plain_first else "plain"]
        if plain_first:
            reader, writer = await asyncio.open_connection("127.0.0.1", made.port)
            writer.write(get(b"/hello").replace(b"host: shop.example", b"host: secret.example"))
            assert (await answer(reader))[0] == 404
        else:
            with pytest.raises((ssl.SSLError, ConnectionError)):
                await made.connect(name="plain.example")
            reader, writer = await made.connect(name="secret.example")
            writer.write(get(b"/hello").replace(b"host: shop.example", b"host: plain.example"))
            assert (await answer(reader))[0] == 404

    listeners = [
        lambda port: a_listener(port, "secret", MUTUAL, "secret.example"),
        lambda port: a_listener(port, "plain", None, "plain.example"),
    ]
    run(test, *(reversed(listeners) if plain_first else listeners))


def test_a_client_whose_certificate_ends_meanwhile_is_asked_to_come_again() -> None:
    async def test(made: Door) -> None:
        now = time.time()
        short = StaticIdentity(authority().issue(WEB, lifetime=60, now=now - 58.5))
        reader, writer = await made.connect(short)
        writer.write(get(b"/hello"))
        assert b"connection" not in (await answer(reader))[1]
        await asyncio.sleep(max(0.0, short.current.not_after - time.time()) + 0.05)
        writer.write(get(b"/hello"))
        status, headers, _ = await answer(reader)
        assert (status, headers[b"connection"]) == (200, b"close")

    run(test)


def test_what_the_kernel_has_accepted_is_served_at_the_end() -> None:
    async def whole() -> None:
        free = listening_socket()
        number = free.getsockname()[1]
        free.close()
        gateway = a_gateway()
        gateway.apply(a_snapshot(a_listener(number, "http", None)))
        socks = [socket.create_connection(("127.0.0.1", number)) for _ in range(40)]
        for sock in socks:
            sock.sendall(get(b"/hello"))
        draining = asyncio.create_task(gateway.drain(4))

        def read() -> None:
            for sock in socks:
                sock.settimeout(5)
                assert sock.recv(4096).endswith(b"hello")
                sock.close()

        await asyncio.to_thread(read)
        await draining

    asyncio.run(whole())
