"""gRPC through the gateway, with the client and the server that the gRPC project gives."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from door_world import POLICY, H2Client, authority, gateway_identity, until, web_identity
from through_world import MUTUAL, QUICK, Through, through

from gateway.limits import Limits
from mesh.model import Endpoint, UpstreamTls
from mesh.questions import Decision, Verdict

METHOD = "/shop.Orders/"


class Orders(grpc.GenericRpcHandler):
    """All four forms over plain bytes; what it does goes by the first message."""

    def __init__(self) -> None:
        self.cancelled = asyncio.Event()
        self.deadlines: list[float | None] = []

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        name = details.method.rpartition("/")[2]
        made = {
            "unary": grpc.unary_unary_rpc_method_handler(self.unary),
            "server": grpc.unary_stream_rpc_method_handler(self.server),
            "client": grpc.stream_unary_rpc_method_handler(self.client),
            "both": grpc.stream_stream_rpc_method_handler(self.both),
        }
        return made.get(name)

    async def unary(self, request: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> bytes:
        self.deadlines.append(context.time_remaining())
        if request == b"fail":
            context.set_trailing_metadata((("x-why", "broken"),))
            await context.abort(grpc.StatusCode.DATA_LOSS, "lost: 100 % \u00e9")
        if request == b"hang":
            try:
                await asyncio.sleep(60)
            finally:
                self.cancelled.set()
        await context.send_initial_metadata((("x-first", "1"),))
        context.set_trailing_metadata((("x-last", "2"), ("x-bytes-bin", b"\0\xff")))
        return request.upper()

    async def server(self, request: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[bytes]:
        try:
            for number in range(int(request)):
                yield b"%d" % number
                if number % 100 == 99:
                    await asyncio.sleep(0)
            if request == b"3":
                await asyncio.sleep(60)
        finally:
            self.cancelled.set()

    async def client(self, requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext[Any, Any]) -> bytes:
        return b"%d" % sum([len(request) async for request in requests])

    async def both(self, requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[bytes]:
        async for request in requests:
            yield request.upper()


class World:
    def __init__(self, made: Through, orders: Orders, channel: grpc.aio.Channel) -> None:
        self.made, self.orders, self.channel = made, orders, channel

    async def unary(self, request: bytes, **more: Any) -> bytes:
        answer: bytes = await self.channel.unary_unary(METHOD + "unary")(request, **more)
        return answer


@asynccontextmanager
async def world(secure: bool, limits: Limits = QUICK, **rule: Any) -> AsyncIterator[World]:
    orders = Orders()
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((orders,))
    cluster: dict[str, Any] = {"http2": "always"}
    if secure:
        own = gateway_identity().current
        pair = ((own.key, own.chain),)
        port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials(pair, authority().bundle, require_client_auth=True))
        endpoint = Endpoint(address="127.0.0.1", port=port, identities=(own.spiffe_id,))
        cluster |= {"tls": UpstreamTls(mode="mesh", sni="shop.example"), "endpoints": (endpoint,)}
    else:
        port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with through(port, tls=MUTUAL if secure else None, limits=limits, cluster=cluster, **rule) as made:
            if secure:
                who = web_identity().current
                credentials = grpc.ssl_channel_credentials(authority().bundle, who.key, who.chain)
                options = (("grpc.ssl_target_name_override", "shop.example"), ("grpc.default_authority", "shop.example"))
                channel = grpc.aio.secure_channel(f"127.0.0.1:{made.port}", credentials, options)
            else:
                channel = grpc.aio.insecure_channel(f"127.0.0.1:{made.port}", (("grpc.default_authority", "shop.example"),))
            async with channel:
                yield World(made, orders, channel)
    finally:
        await server.stop(0)


def run(test: Callable[[World], Awaitable[None]], secure: bool = False, **more: Any) -> None:
    async def go() -> None:
        async with asyncio.timeout(40), world(secure, **more) as made:
            await test(made)

    asyncio.run(go())


@pytest.mark.parametrize("secure", [False, True])
def test_all_four_forms(secure: bool) -> None:
    async def test(made: World) -> None:
        channel = made.channel
        call = channel.unary_unary(METHOD + "unary")(b"hello")
        assert await call == b"HELLO"
        assert dict(await call.initial_metadata())["x-first"] == "1"
        assert dict(await call.trailing_metadata()) == {"x-last": "2", "x-bytes-bin": b"\0\xff"}
        assert [int(number) async for number in channel.unary_stream(METHOD + "server")(b"1000")] == list(range(1000))

        async def many() -> AsyncIterator[bytes]:
            for _ in range(100):
                yield b"x" * 10_000

        assert await channel.stream_unary(METHOD + "client")(many()) == b"1000000"
        both = channel.stream_stream(METHOD + "both")()
        for word in (b"one", b"two", b"three" * 30_000):
            await both.write(word)
            assert await both.read() == word.upper()
        await both.done_writing()
        assert await both.read() is grpc.aio.EOF
        assert await both.code() == grpc.StatusCode.OK
        await until(lambda: len(made.made.outcomes) == 4)
        for outcome in made.made.outcomes:
            assert (outcome.status, outcome.flag, outcome.grpc_status, outcome.response_version) == (200, "-", "0", "HTTP/2")
        assert made.made.pooled() == 1

    run(test, secure)


def test_a_failing_call_is_passed_on_as_it_is() -> None:
    async def test(made: World) -> None:
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await made.unary(b"fail")
        assert failed.value.code() == grpc.StatusCode.DATA_LOSS
        assert failed.value.details() == "lost: 100 % \u00e9"
        assert dict(failed.value.trailing_metadata())["x-why"] == "broken"
        outcome = await made.made.outcome()
        assert (outcome.status, outcome.flag, outcome.grpc_status) == (200, "-", "15")
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await made.channel.unary_unary(METHOD + "nothing")(b"")
        assert failed.value.code() == grpc.StatusCode.UNIMPLEMENTED

    run(test)


def test_a_client_that_cancels_reaches_the_server() -> None:
    async def test(made: World) -> None:
        call = made.channel.unary_unary(METHOD + "unary")(b"hang")
        await until(lambda: bool(made.orders.deadlines))
        call.cancel()
        await asyncio.wait_for(made.orders.cancelled.wait(), 10)
        outcome = await made.made.outcome()
        assert (outcome.status, outcome.flag) == (499, "DC")
        assert made.made.pooled() == 1

    run(test)


async def raw(made: World, headers: tuple[tuple[bytes, bytes], ...], path: bytes = b"/shop.Orders/unary", body: bytes = b"hang") -> Any:
    """A call by a client that keeps no deadline of its own."""
    client = H2Client(*await made.made.plain())
    message = b"\0" + len(body).to_bytes(4, "big") + body
    fields = ((b"content-type", b"application/grpc"), (b"te", b"trailers"), *headers)
    return await client.answer(client.request(path, b"POST", message, fields))


@pytest.mark.parametrize(
    ("sent", "timeout"), [((b"grpc-timeout", b"300m"), 15.0), ((b"grpc-timeout", b"10S"), 0.3), ((b"x-none", b""), 0.3)]
)
def test_the_smaller_of_the_callers_time_and_the_routes_holds(sent: tuple[bytes, bytes], timeout: float) -> None:
    async def test(made: World) -> None:
        found = await raw(made, (sent,))
        assert found["status"] == 200
        assert found["headers"][b"grpc-status"] == b"4"
        assert found["headers"][b"content-type"] == b"application/grpc"
        outcome = await made.made.outcome()
        assert (outcome.status, outcome.flag, outcome.grpc_status) == (200, "UT", "4")
        await asyncio.wait_for(made.orders.cancelled.wait(), 10)

    run(test, timeout=timeout)


def test_a_server_sees_the_callers_deadline_and_an_invalid_one_means_nothing() -> None:
    async def test(made: World) -> None:
        assert await made.unary(b"a", timeout=20) == b"A"
        left = made.orders.deadlines[0]
        assert left is not None
        assert 0 < left <= 20
        for wrong in (b"x", b"1", b"S", b"123456789S", b"-1S", b"1 S"):
            found = await raw(made, ((b"grpc-timeout", wrong),), body=b"a")
            assert found["status"] in {200, 400}
        assert await made.unary(b"b") == b"B"

    run(test)


@pytest.mark.parametrize("unsaid", [True, False])
def test_the_timeout_that_goes_without_saying_ends_no_stream(unsaid: bool) -> None:
    async def test(made: World) -> None:
        call = made.channel.unary_stream(METHOD + "server")(b"3")
        for _ in range(3):
            await call.read()
        if unsaid:
            await asyncio.sleep(1.5)
            assert not call.done()
            call.cancel()
        else:
            with pytest.raises(grpc.aio.AioRpcError) as ended:
                await call.read()
            assert ended.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        await asyncio.wait_for(made.orders.cancelled.wait(), 10)

    run(test, timeout=1.0, timeout_unsaid=unsaid)


def test_a_callers_own_time_ends_a_stream_all_the_same() -> None:
    async def test(made: World) -> None:
        found = await raw(made, ((b"grpc-timeout", b"500m"),), b"/shop.Orders/server", b"3")
        assert found["status"] == 200
        assert found["trailers"][b"grpc-status"] == b"4"

    run(test, timeout=0.1, timeout_unsaid=True)


@pytest.mark.parametrize(
    ("verdict", "code"), [(Verdict.DENY, grpc.StatusCode.PERMISSION_DENIED), (Verdict.ERROR, grpc.StatusCode.UNAVAILABLE)]
)
def test_a_refusal_has_grpcs_own_status(verdict: Verdict, code: grpc.StatusCode) -> None:
    async def test(made: World) -> None:
        made.made.answers.decision = Decision(verdict=verdict)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await made.unary(b"a")
        assert refused.value.code() == code
        assert refused.value.details()

    run(test, decisions=(POLICY,))


def test_a_stream_that_is_no_longer_allowed_ends_with_a_status() -> None:
    async def test(made: World) -> None:
        made.made.answers.decision = Decision(verdict=Verdict.ALLOW)
        call = made.channel.unary_stream(METHOD + "server")(b"3")
        assert await call.read() == b"0"
        made.made.answers.decision = Decision(verdict=Verdict.DENY)
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            while True:
                await call.read()
        assert ended.value.code() == grpc.StatusCode.PERMISSION_DENIED
        outcome = await made.made.outcome()
        assert (outcome.status, outcome.flag, outcome.grpc_status) == (200, "UAEX", "7")

    run(test, limits=Limits(linger=0.1, stream_recheck=0.3), decisions=(POLICY,))


def test_an_upstream_that_is_not_there() -> None:
    async def go() -> None:
        async with (
            through(1, cluster={"http2": "always"}) as made,
            grpc.aio.insecure_channel(f"127.0.0.1:{made.port}", (("grpc.default_authority", "shop.example"),)) as channel,
        ):
            with pytest.raises(grpc.aio.AioRpcError) as failed:
                await channel.unary_unary(METHOD + "unary")(b"")
            assert failed.value.code() == grpc.StatusCode.UNAVAILABLE

    asyncio.run(go())
