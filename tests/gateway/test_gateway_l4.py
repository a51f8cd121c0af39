"""TCPRoute on real sockets: from manifests to bytes."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections import Counter

import msgspec
import pytest
from door_world import until
from hypothesis import given, settings
from hypothesis import strategies as st
from l4_world import (
    ask,
    backend,
    conversation,
    free_port,
    gateway_yaml,
    l4,
    route_yaml,
    says,
    service_yaml,
    tcp,
)

from gateway.limits import Limits


@conversation
async def test_bytes_go_both_ways_and_the_connection_is_recorded() -> None:
    port = free_port()
    async with backend(says(b"one")) as one:
        manifests = gateway_yaml(tcp(port)), route_yaml("TCPRoute", "r", "a"), service_yaml("a", one)
        async with l4(*manifests) as made:
            assert await ask(port, b"x" * 300_000) == b"one\n" + b"x" * 300_000
            outcome = await made.outcome()
            assert (outcome.flag, outcome.status, outcome.route, outcome.service) == ("-", 0, "shop/r#main", "shop/a")
            assert (outcome.bytes_received, outcome.bytes_sent, outcome.attempts) == (300_000, 300_004, 1)
            assert outcome.endpoint == f"127.0.0.1:{one}"
            labels = {"destination_service": "a.shop", "request_protocol": "tcp", "response_flags": "-"}
            for name in ("opened", "closed"):
                assert made.metric(f"istio_tcp_connections_{name}_total", **labels) == 1
            assert made.metric("istio_tcp_sent_bytes_total", **labels) == 300_004
            assert made.metric("istio_tcp_received_bytes_total", **labels) == 300_000
            assert made.metric("tollhouse_connections_active") == 0
            assert made.metric("istio_requests_total") == 0
            await until(lambda: made.gateway.connections == 0)
            assert made.forwarder.state()["connections"] == 0


@conversation
async def test_a_half_closed_connection_goes_on_in_the_other_direction() -> None:
    port = free_port()
    asked = asyncio.Event()

    async def talks_after_the_end(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert await reader.read() == b"all of it"
        asked.set()
        for _ in range(20):
            writer.write(b"y" * 5000)
            await writer.drain()
            await asyncio.sleep(0)
        writer.close()

    async with (
        backend(talks_after_the_end) as one,
        l4(gateway_yaml(tcp(port)), route_yaml("TCPRoute", "r", "a"), service_yaml("a", one)),
    ):
        assert await ask(port, b"all of it") == b"y" * 100_000
        assert asked.is_set()


@conversation
async def test_the_backend_may_end_its_side_first() -> None:
    port = free_port()
    got = asyncio.get_running_loop().create_future()

    async def ends_first(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"bye")
        writer.write_eof()
        got.set_result(await reader.read())
        writer.close()

    async with (
        backend(ends_first) as one,
        l4(gateway_yaml(tcp(port)), route_yaml("TCPRoute", "r", "a"), service_yaml("a", one)) as made,
    ):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        assert await asyncio.wait_for(reader.read(), 10) == b"bye"
        writer.write(b"still here")
        writer.write_eof()
        assert await asyncio.wait_for(got, 10) == b"still here"
        assert (await made.outcome()).flag == "-"
        writer.close()


@conversation
async def test_whoever_reads_slowly_slows_the_sender_down() -> None:
    """Back-pressure: the gateway holds no more than its buffer, one read, and what kernels hold."""
    port = free_port()
    sent = 0
    total = 64 << 20

    async def floods(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        with contextlib.suppress(ConnectionError):
            while sent < total:
                writer.write(b"z" * 65536)
                await writer.drain()
                sent += 65536
        writer.close()

    async with backend(floods) as one, l4(gateway_yaml(tcp(port)), route_yaml("TCPRoute", "r", "a"), service_yaml("a", one)) as made:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
        before = -1
        while not sent or before < sent:  # until it stands still
            before = sent
            await asyncio.sleep(0.2)
        assert 0 < sent < total / 2
        connection = next(iter(next(iter(made.gateway._ports.values())).servings[0].connections))
        assert connection.wire.backlog <= Limits().buffer + 4 * 65536
        count = 0
        while data := await asyncio.wait_for(reader.read(1 << 20), 10):
            count += len(data)
        assert count == total == sent
        writer.close()


@pytest.mark.parametrize("side", ["client", "backend"])
@conversation
async def test_a_reset_is_passed_on_as_a_reset(side: str) -> None:
    port = free_port()
    seen = asyncio.get_running_loop().create_future()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"hello\n")
        try:
            assert await reader.readline() == b"go\n"
            if side == "backend":
                reset(writer)
                return
            seen.set_result(await reader.read())
        except ConnectionError as problem:
            seen.set_result(problem)
        writer.close()

    async with backend(serve) as one, l4(gateway_yaml(tcp(port)), route_yaml("TCPRoute", "r", "a"), service_yaml("a", one)) as made:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        assert await reader.readline() == b"hello\n"
        writer.write(b"go\n")
        if side == "client":
            await until(lambda: next(iter(made.forwarder.state()["clusters"].values()))["connections"] == 1)
            await asyncio.sleep(0.05)
            reset(writer)
            assert isinstance(await asyncio.wait_for(seen, 10), ConnectionResetError)
            assert (await made.outcome()).flag == "DC"
        else:
            with pytest.raises(ConnectionResetError):
                await asyncio.wait_for(reader.read(), 10)
            assert (await made.outcome()).flag == "UC"
            writer.close()


def reset(writer: asyncio.StreamWriter) -> None:
    sock = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


@conversation
async def test_weights_and_broken_backends_get_their_shares() -> None:
    port = free_port()
    async with backend(says(b"one")) as one, backend(says(b"two")) as two:
        manifests = (
            gateway_yaml(tcp(port)),
            route_yaml("TCPRoute", "r", "a*60", "b*20", "zero*0", "missing*20"),
            service_yaml("a", one),
            service_yaml("b", two),
            service_yaml("zero", one),
        )
        async with l4(*manifests) as made:
            assert any(problem.reason == "BackendNotFound" for problem in made.snapshot.problems)
            made.gateway._shared.rng.seed(7)
            counts: Counter[bytes] = Counter()
            for _ in range(300):
                counts[await ask(port)] += 1
            # Four standard deviations around the expected share, with a fixed seed.
            assert abs(counts[b"one\n"] - 180) < 34
            assert abs(counts[b"two\n"] - 60) < 28
            assert abs(counts[b""] - 60) < 28
            await made.outcome(300)
            assert {outcome.flag for outcome in made.outcomes} == {"-", "NC"}


@conversation
async def test_all_weights_zero_takes_no_connection() -> None:
    port = free_port()
    async with (
        backend(says(b"one")) as one,
        l4(gateway_yaml(tcp(port)), route_yaml("TCPRoute", "r", "a*0"), service_yaml("a", one)) as made,
    ):
        assert await ask(port) == b""
        assert (await made.outcome()).flag == "NC"


@conversation
async def test_a_listener_without_a_route_refuses() -> None:
    port = free_port()
    async with l4(gateway_yaml(tcp(port))) as made:
        assert await ask(port) == b""
        outcome = await made.outcome()
        assert (outcome.flag, outcome.details) == ("NR", "route_not_found")
        assert made.metric("istio_tcp_connections_closed_total", response_flags="NR") == 1


@conversation
async def test_the_oldest_of_two_routes_has_the_listener() -> None:
    port = free_port()
    async with backend(says(b"one")) as one, backend(says(b"two")) as two:
        manifests = (
            gateway_yaml(tcp(port)),
            route_yaml("TCPRoute", "a-newer", "b", made="2026-01-02T00:00:00Z"),
            route_yaml("TCPRoute", "b-older", "a", made="2026-01-01T00:00:00Z"),
            service_yaml("a", one),
            service_yaml("b", two),
        )
        async with l4(*manifests) as made:
            assert {await ask(port) for _ in range(20)} == {b"one\n"}
            assert [(problem.key.name, problem.severity) for problem in made.snapshot.problems if problem.reason == "Overshadowed"] == [
                ("a-newer", "warning")
            ]


@conversation
async def test_endpoints_that_cannot_be_reached_are_passed_over_and_left_out() -> None:
    port, closed = free_port(), free_port()
    async with (
        backend(says(b"one")) as one,
        l4(gateway_yaml(tcp(port)), route_yaml("TCPRoute", "r", "a"), service_yaml("a", closed, one)) as made,
    ):
        for count in range(1, 13):
            assert await ask(port) == b"one\n"
            await made.outcome(count)
        state = made.forwarder.state()["clusters"]["shop/a:80"]
        assert [endpoint["ejections"] for endpoint in state["endpoints"]] == [1, 0]


@conversation
async def test_what_a_client_gets_when_nothing_is_there() -> None:
    port, closed = free_port(), free_port()
    manifests = gateway_yaml(tcp(port)), route_yaml("TCPRoute", "r", "a")
    async with l4(*manifests, service_yaml("a", closed)) as made:
        assert await ask(port) == b""
        assert (await made.outcome()).flag == "UF"
        made.apply(*manifests, service_yaml("a"))
        assert await ask(port) == b""
        assert (await made.outcome(2)).flag == "UH"


@conversation
async def test_a_cluster_has_only_so_many_connections() -> None:
    port = free_port()
    async with (
        backend(says(b"one")) as one,
        l4(gateway_yaml(tcp(port)), route_yaml("TCPRoute", "r", "a"), service_yaml("a", one)) as made,
    ):
        cluster = msgspec.structs.replace(made.snapshot.clusters["shop/a:80"], max_connections=1)
        made.forwarder.apply(msgspec.structs.replace(made.snapshot, clusters={cluster.name: cluster}))
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        assert await reader.readline() == b"one\n"
        assert await ask(port) == b""
        assert (await made.outcome()).flag == "UO"
        writer.close()
        await made.outcome(2)
        assert await ask(port) == b"one\n"


@conversation
async def test_an_idle_connection_ends() -> None:
    port = free_port()
    async with backend(says(b"one")) as one:
        manifests = gateway_yaml(tcp(port)), route_yaml("TCPRoute", "r", "a"), service_yaml("a", one)
        async with l4(*manifests, limits=Limits(idle_connection=0.5)) as made:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            assert await reader.readline() == b"one\n"
            with contextlib.suppress(ConnectionError):
                assert await asyncio.wait_for(reader.read(), 10) == b""
            assert (await made.outcome()).flag == "SI"
            writer.close()


@conversation
async def test_a_removed_listener_refuses_and_lets_what_goes_on_finish() -> None:
    port, other = free_port(), free_port()
    async with backend(says(b"one")) as one:
        rest = route_yaml("TCPRoute", "r", "a"), service_yaml("a", one)
        async with l4(gateway_yaml(tcp(port), tcp(other, "other")), *rest) as made:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            assert await reader.readline() == b"one\n"
            made.apply(gateway_yaml(tcp(other, "other")), *rest)
            with pytest.raises(ConnectionRefusedError):
                await ask(port)
            writer.write(b"on\n")
            assert await reader.readline() == b"on\n"
            assert await ask(other) == b"one\n"
            writer.close()


@conversation
async def test_a_drain_waits_for_connections_and_then_ends_them() -> None:
    port = free_port()
    async with (
        backend(says(b"one")) as one,
        l4(gateway_yaml(tcp(port)), route_yaml("TCPRoute", "r", "a"), service_yaml("a", one)) as made,
    ):
        stays = await asyncio.open_connection("127.0.0.1", port)
        leaves = await asyncio.open_connection("127.0.0.1", port)
        assert (await stays[0].readline(), await leaves[0].readline()) == (b"one\n", b"one\n")
        draining = asyncio.ensure_future(made.gateway.drain(1.0))
        await until(lambda: not made.gateway.listening)
        leaves[1].write(b"more\n")
        assert await leaves[0].readline() == b"more\n"
        leaves[1].write_eof()
        assert await leaves[0].read() == b""
        await asyncio.wait_for(draining, 10)
        with contextlib.suppress(ConnectionError):
            assert await stays[0].read() == b""
        assert sorted(outcome.flag for outcome in made.outcomes) == ["-", "LR"]


steps = st.lists(
    st.tuples(st.sampled_from(["client", "backend"]), st.sampled_from([1, 100, 4000, 70_000, 300_000]) | st.just(0)), max_size=12
)


@settings(max_examples=25, deadline=None)
@given(steps)
def test_all_that_a_side_sends_arrives_in_order_whoever_ends_first(script: list[tuple[str, int]]) -> None:
    """A script of both sides: so many bytes, or (0) the end of the side's direction."""

    async def talk() -> None:
        port = free_port()
        connected: asyncio.Future[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.get_running_loop().create_future()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            connected.set_result((reader, writer))

        config = gateway_yaml(tcp(port)), route_yaml("TCPRoute", "r", "a")
        async with backend(serve) as one, l4(*config, service_yaml("a", one)) as made:
            client = await asyncio.open_connection("127.0.0.1", port)
            sides = {"client": client, "backend": await connected}
            got = {name: asyncio.ensure_future(reader.read()) for name, (reader, _) in sides.items()}
            sent = {"client": b"", "backend": b""}
            ended: set[str] = set()
            for number, (name, size) in enumerate([*script, ("client", 0), ("backend", 0)]):
                if name in ended:
                    continue
                writer = sides[name][1]
                if size:
                    data = bytes([number]) * size
                    sent[name] += data
                    writer.write(data)
                else:
                    ended.add(name)
                    writer.write_eof()
            assert await got["backend"] == sent["client"]
            assert await got["client"] == sent["backend"]
            outcome = await made.outcome()
            assert (outcome.flag, outcome.bytes_received, outcome.bytes_sent) == ("-", len(sent["client"]), len(sent["backend"]))
            for _, writer in sides.values():
                writer.close()

    asyncio.run(asyncio.wait_for(talk(), 60))
