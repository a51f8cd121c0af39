"""UDPRoute on real sockets: flows by the client's address, and answers from where they were asked."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from door_world import until
from l4_world import ACCESS, conversation, free_port, gateway_yaml, l4, route_yaml, service_yaml

from gateway.limits import Limits
from mesh.questions import Decision, Verdict


def udp(port: int, name: str = "udp") -> str:
    return f"name: {name}, port: {port}, protocol: UDP"


def manifests(port: int, *backends: int) -> tuple[str, str, str]:
    return gateway_yaml(udp(port)), route_yaml("UDPRoute", "r", "a"), service_yaml("a", *backends, protocol="UDP")


class Backend(asyncio.DatagramProtocol):
    """Answers each datagram with its own name in front, unless it is told to be silent."""

    def __init__(self, name: bytes) -> None:
        self.name = name
        self.silent = False
        self.got: list[tuple[bytes, Any]] = []
        self.transport: asyncio.DatagramTransport

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.port: int = transport.get_extra_info("sockname")[1]

    def datagram_received(self, data: bytes, address: Any) -> None:
        self.got.append((data, address))
        if not self.silent:
            self.transport.sendto(self.name + b":" + data, address)


@asynccontextmanager
async def answering(name: bytes) -> AsyncIterator[Backend]:
    transport, made = await asyncio.get_running_loop().create_datagram_endpoint(lambda: Backend(name), ("127.0.0.1", 0))
    try:
        yield made
    finally:
        transport.close()


class Client:
    """One client's socket."""

    def __init__(self, port: int, host: str = "127.0.0.1", bound: str = "") -> None:
        self.sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
        self.sock.setblocking(False)
        if bound:
            self.sock.bind((bound, 0))
        self.to = (host, port)

    def send(self, data: bytes) -> None:
        self.sock.sendto(data, self.to)

    async def recv(self, seconds: float = 5.0) -> bytes:
        """The next datagram, and that it comes from where the last one was sent to."""
        data, address = await asyncio.wait_for(asyncio.get_running_loop().sock_recvfrom(self.sock, 65535), seconds)
        assert address[:2] == self.to
        return data

    async def ask(self, data: bytes) -> bytes:
        self.send(data)
        return await self.recv()

    def nothing(self) -> bool:
        try:
            self.sock.recv(65535)
        except BlockingIOError:
            return True
        return False


@conversation
async def test_a_flow_keeps_its_endpoint_and_is_recorded_when_it_is_idle() -> None:
    port = free_port()
    async with answering(b"one") as one, answering(b"two") as two:
        config = manifests(port, one.port, two.port)
        async with l4(*config, limits=Limits(idle_flow=0.6)) as made:
            client, other = Client(port), Client(port)
            first = await client.ask(b"1")
            assert first in {b"one:1", b"two:1"}
            for number in range(2, 6):
                assert await client.ask(b"%d" % number) == first[:4] + b"%d" % number
            assert (await other.ask(b"1"))[:3] != first[:3]  # round robin
            big = b"x" * 60_000
            assert await client.ask(big) == first[:4] + big
            assert len({address for _, address in (*one.got, *two.got)}) == 2
            assert made.gateway.listening == (("127.0.0.1", port, ("udp",)),)
            await made.outcome(2)
            outcome = max(made.outcomes, key=lambda each: each.bytes_received)
            assert (outcome.flag, outcome.route, outcome.service, outcome.attempts) == ("-", "shop/r#main", "shop/a", 1)
            assert (outcome.bytes_received, outcome.bytes_sent) == (60_005, 60_005 + 6 * 4)
            assert made.metric("tollhouse_udp_flows_total", service="shop/a", response_flags="-") == 2
            assert made.metric("tollhouse_udp_datagrams_total", direction="received") == 7
            assert made.metric("tollhouse_udp_flows_active") == 0
            assert await client.ask(b"again")  # a flow of its own


@conversation
async def test_several_answers_to_one_datagram_and_none_asked_for() -> None:
    port = free_port()
    async with answering(b"one") as one, l4(*manifests(port, one.port)):
        client = Client(port)
        await client.ask(b"hello")
        address = one.got[0][1]
        for number in range(5):
            one.transport.sendto(b"push %d" % number, address)
        assert [await client.recv() for _ in range(5)] == [b"push %d" % number for number in range(5)]
        assert await client.ask(b"") == b"one:"  # an empty datagram is one


@conversation
async def test_weights_and_broken_backends_get_their_shares() -> None:
    port = free_port()
    async with answering(b"one") as one, answering(b"two") as two:
        config = (
            gateway_yaml(udp(port)),
            route_yaml("UDPRoute", "r", "a*60", "b*20", "missing*20"),
            service_yaml("a", one.port, protocol="UDP"),
            service_yaml("b", two.port, protocol="UDP"),
        )
        async with l4(*config) as made:
            made.gateway._shared.rng.seed(7)
            clients = [Client(port) for _ in range(300)]
            for number, client in enumerate(clients):
                client.send(b"x")  # one by one: the kernel's queue is short
                await until(lambda: len(one.got) + len(two.got) + len(made.outcomes) > number)  # noqa: B023
            # Four standard deviations around the expected share, with a fixed seed.
            assert abs(len(one.got) - 180) < 34
            assert abs(len(two.got) - 60) < 28
            assert {outcome.flag for outcome in made.outcomes} == {"NC"}


@conversation
async def test_the_oldest_of_two_routes_has_the_listener() -> None:
    port = free_port()
    async with answering(b"one") as one, answering(b"two") as two:
        config = (
            gateway_yaml(udp(port)),
            route_yaml("UDPRoute", "newer", "b", made="2026-01-02T00:00:00Z"),
            route_yaml("UDPRoute", "older", "a", made="2026-01-01T00:00:00Z"),
            service_yaml("a", one.port, protocol="UDP"),
            service_yaml("b", two.port, protocol="UDP"),
        )
        async with l4(*config):
            assert {await Client(port).ask(b"") for _ in range(10)} == {b"one:"}


@conversation
async def test_a_port_speaks_tcp_and_udp_for_two_listeners() -> None:
    from l4_world import ask, backend, says, tcp

    port = free_port()
    async with answering(b"one") as one, backend(says(b"stream")) as two:
        config = (
            gateway_yaml(udp(port), tcp(port)),
            route_yaml("UDPRoute", "u", "a"),
            route_yaml("TCPRoute", "t", "b"),
            service_yaml("a", one.port, protocol="UDP"),
            service_yaml("b", two),
        )
        async with l4(*config) as made:
            assert not made.snapshot.problems
            assert await Client(port).ask(b"x") == b"one:x"
            assert await ask(port) == b"stream\n"


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize(
    ("decision", "flag"),
    [(Decision(verdict=Verdict.ALLOW), "-"), (Decision(verdict=Verdict.DENY), "UAEX"), (Decision(verdict=Verdict.ERROR), "UAEE")],
)
@conversation
async def test_a_flow_is_decided_once_before_anything_reaches_the_backend(decision: Decision, flag: str, later: bool) -> None:
    port = free_port()
    async with answering(b"one") as one, l4(*manifests(port, one.port), ACCESS.replace("TCPRoute", "UDPRoute")) as made:
        if not later:
            made.answers.decision = decision
        client = Client(port)
        for number in range(40):
            client.send(b"%d" % number)
        if later:
            await until(lambda: bool(made.answers.asked))
            await until(lambda: made.metric("tollhouse_udp_dropped_total", reason="waiting") == 24)
            assert one.got == []
            (question, done), *more = made.answers.asked
            assert not more
            assert question.asking.peer.address == "127.0.0.1"
            assert question.asking.caller.principal == ""
            done(decision)
        if flag == "-":
            expected = 16 if later else 40
            assert [await client.recv() for _ in range(expected)] == [b"one:%d" % number for number in range(expected)]
        else:
            outcome = await made.outcome()
            assert outcome.flag == flag
            client.send(b"again")
            await until(lambda: made.metric("tollhouse_udp_dropped_total", reason="refused") == (17 if later else 41))
            assert (one.got, len(made.outcomes)) == ([], 1)


@conversation
async def test_when_all_places_are_taken_the_unanswered_make_room() -> None:
    port = free_port()
    async with answering(b"one") as one, l4(*manifests(port, one.port), limits=Limits(flows=3)) as made:
        kept = Client(port)
        await kept.ask(b"1")
        one.silent = True
        forged = [Client(port) for _ in range(10)]
        for client in forged:
            client.send(b"x")
        await until(lambda: len(one.got) == 11)
        assert len(made.outcomes) == 8
        one.silent = False
        assert await kept.ask(b"2") == b"one:2"
        assert await Client(port).ask(b"3") == b"one:3"
        assert await Client(port).ask(b"4") == b"one:4"
        full = Client(port)
        full.send(b"5")
        await until(lambda: made.metric("tollhouse_udp_dropped_total", reason="full") == 1)
        assert await kept.ask(b"6") == b"one:6"


@conversation
async def test_an_endpoint_that_is_not_there_is_passed_over() -> None:
    port, closed = free_port(), free_port()
    async with answering(b"one") as one, l4(*manifests(port, closed, one.port)) as made:
        client = Client(port)
        answered = 0
        for number in range(200):
            client.send(b"%d" % number)
            try:
                answered += bool(await client.recv(0.1))
            except TimeoutError:
                await asyncio.sleep(0)
            if answered > 20:
                break
        assert answered > 20
        assert "UC" in {outcome.flag for outcome in made.outcomes} or made.outcomes == []


@conversation
async def test_no_endpoint_no_route_and_a_removed_listener() -> None:
    port = free_port()
    async with answering(b"one") as one, l4(*manifests(port)) as made:
        Client(port).send(b"x")
        assert (await made.outcome()).flag == "UH"
        made.apply(gateway_yaml(udp(port)))
        Client(port).send(b"x")
        assert (await made.outcome(2)).flag == "NR"
        made.apply(*manifests(port, one.port))
        client = Client(port)
        assert await client.ask(b"x") == b"one:x"
        made.apply(gateway_yaml(udp(free_port())))
        assert await client.ask(b"y") == b"one:y"  # the flow goes on
        late = Client(port)
        late.send(b"z")
        await until(lambda: made.metric("tollhouse_udp_dropped_total", reason="not_served") == 1)
        made.apply(*manifests(port, one.port))
        assert await late.ask(b"z") == b"one:z"
        assert await client.ask(b"w") == b"one:w"


@pytest.mark.parametrize(("host", "bound"), [("127.0.0.2", ""), ("127.0.0.1", "127.0.0.3"), ("::1", "")])
@conversation
async def test_answers_come_from_the_address_that_was_asked(host: str, bound: str) -> None:
    """Also when the socket is bound to all addresses; `Client.recv` looks."""
    port = free_port()
    async with answering(b"one") as one, l4(*manifests(port, one.port), address="") as made:
        client = Client(port, host, bound)
        assert await client.ask(b"hello") == b"one:hello"
        made.gateway.close()
        outcome = await made.outcome()
        assert outcome.peer.local_address == host
        assert outcome.peer.address in {bound, host, "127.0.0.1"}


@conversation
async def test_a_drain_lets_answers_arrive_and_then_ends() -> None:
    port = free_port()
    async with answering(b"one") as one, l4(*manifests(port, one.port)) as made:
        one.silent = True
        client = Client(port)
        client.send(b"slow")
        await until(lambda: bool(one.got))
        draining = asyncio.ensure_future(made.gateway.drain(4.0))
        await asyncio.sleep(0)
        one.transport.sendto(b"here", one.got[0][1])
        assert await client.recv() == b"here"
        await asyncio.wait_for(draining, 10)
        assert (await made.outcome()).flag == "LR"
        assert made.gateway.listening == ()


@conversation
async def test_forged_and_odd_senders_disturb_nobody() -> None:
    port = free_port()
    async with answering(b"one") as one, l4(*manifests(port, one.port)):
        good = Client(port)
        assert await good.ask(b"1") == b"one:1"
        gone = Client(port)
        gone.send(b"x")
        gone.sock.close()  # answers to it come back as ICMP errors on the listener's socket
        for number in range(20):
            assert await good.ask(b"%d" % number) == b"one:%d" % number


@conversation
async def test_a_flow_that_goes_on_is_asked_about_again() -> None:
    port = free_port()
    config = ACCESS.replace("TCPRoute", "UDPRoute")
    async with answering(b"one") as one, l4(*manifests(port, one.port), config, limits=Limits(stream_recheck=0.3)) as made:
        made.answers.decision = Decision(verdict=Verdict.ALLOW)
        client = Client(port)
        assert await client.ask(b"1") == b"one:1"
        made.answers.decision = Decision(verdict=Verdict.DENY)
        outcome = await made.outcome()
        assert (outcome.flag, outcome.bytes_sent) == ("UAEX", 5)
        client.send(b"2")
        await until(lambda: made.metric("tollhouse_udp_dropped_total", reason="refused") == 1)


@conversation
async def test_when_all_places_are_taken_what_is_not_used_makes_room() -> None:
    port = free_port()
    async with answering(b"one") as one, l4(*manifests(port, one.port), limits=Limits(flows=3, idle_when_full=0.5)) as made:
        clients = [Client(port) for _ in range(3)]
        for client in clients:
            await client.ask(b"1")
        late = Client(port)
        late.send(b"dropped")
        await until(lambda: made.metric("tollhouse_udp_dropped_total", reason="full") == 1)
        loop = asyncio.get_running_loop()
        began = loop.time()
        while loop.time() < began + 0.8:  # two of them go on
            await clients[0].ask(b"2")
            await clients[2].ask(b"2")
            await asyncio.sleep(0.05)
        assert await late.ask(b"3") == b"one:3"
        (outcome,) = made.outcomes
        assert (outcome.flag, outcome.peer.port) == ("-", clients[1].sock.getsockname()[1])
        assert await clients[0].ask(b"4") == await clients[2].ask(b"4")


@conversation
async def test_a_port_that_another_has_is_told_and_tried_again() -> None:
    port = free_port()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("gateway.gateway.BIND_AGAIN", 0.2)
        async with answering(b"one") as one, l4(gateway_yaml(udp(free_port(), "first"))) as made:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
                taken.bind(("127.0.0.1", port))
                made.apply(*manifests(port, one.port))
                assert made.gateway.problems() == {"udp": f"UDP port {port} cannot be bound: Address already in use"}
                assert not made.gateway.ready
            await until(lambda: made.gateway.problems() == {} and made.gateway.ready)
            assert await Client(port).ask(b"x") == b"one:x"


@conversation
async def test_a_port_that_another_has_ends_the_start() -> None:
    port = free_port()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
        taken.bind(("127.0.0.1", port))
        with pytest.raises(OSError, match="in use") as refused:
            async with l4(*manifests(port)):
                pass
        assert refused.value.filename == f"127.0.0.1:{port}/udp"
