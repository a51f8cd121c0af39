"""For the tests of the decision point: questions, a service over real workers on loopback, askers as futures."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
from engine_world import pool
from envoy.service.auth.v3.external_auth_pb2 import CheckRequest, CheckResponse
from grpc import aio

from gateway.grpc_channel import GrpcChannels
from identity.files import StaticIdentity
from identity.svid import Identity
from mesh.http import RequestHead
from mesh.model import DecisionPolicy
from mesh.peer import Caller, Peer
from mesh.policy import EntryPoint, ReadSet, Revision
from mesh.questions import Asking, Decision, DecisionQuestion
from pdp.asker import Asker
from pdp.client import PdpClient
from pdp.engines.worker import WorkerPool
from pdp.point import MAX_PENDING, DecisionPoint
from pdp.service import PolicyService

PRINCIPAL = ("attributes", "source", "principal")
PATH = ("attributes", "request", "http", "path")
SHOP = """package shop.authz

decision := {"allowed": true, "headers": {"x-caller": input.attributes.source.principal}, "rule": "web"} if {
	input.attributes.source.principal == "web"
}

else := {"allowed": false, "http_status": 401, "reason": "not you", "body": "no"} if input.attributes.source.principal == "nobody"

else := false if input.attributes.source.principal

timed := {"allowed": true, "reason": sprintf("%d", [time.now_ns()])}

word := "yes"

memory := bits.lsh(1, 100000000000)

query := {"allowed": true, "query_parameters_to_set": {"a": "1"}}

endless if {
	some i in numbers.range(1, 1000000)
	some j in numbers.range(1, 1000000)
	i + j < 0
}
"""


def shop(source: str = SHOP, digest: str = "sha256:shop") -> Revision:
    plain = ReadSet(values=(PRINCIPAL,))
    timed = ReadSet(volatile=("time.now_ns",))
    names = {"decision": plain, "word": plain, "query": plain, "endless": plain, "memory": plain, "timed": timed, "nothing": plain}
    points = {
        f"shop.authz.{name}": EntryPoint(path=f"shop.authz.{name}", digest=digest + name, reads=reads) for name, reads in names.items()
    }
    return Revision(digest=digest, modules={"shop.rego": source}, entry_points=points)


def asking(principal: str = "web", path: bytes = b"/orders") -> Asking:
    head = RequestHead(b"GET", b"https", b"shop.example", path, [(b"x-a", b"1")], b"HTTP/1.1", 0, path, None)
    return Asking(
        head, Peer(address="127.0.0.1", port=5), Caller(principal), "edge/in", "https", "shop/orders#0", "/orders", "shop/orders", 1e9
    )


def question(
    decision: str = "decision", principal: str = "web", revision: Revision | None = None, *, timeout: float = 5.0, **policy: Any
) -> DecisionQuestion:
    if "provider" not in policy:
        policy["decision"] = f"shop.authz.{decision}"
        revision = revision or shop()
    return DecisionQuestion(DecisionPolicy(name="shop/main", level="mesh", timeout=timeout, **policy), asking(principal), revision)


def answer(asker: Asker, what: DecisionQuestion) -> asyncio.Future[Decision]:
    """Asks; a second answer fails the test."""
    answered: asyncio.Future[Decision] = asyncio.get_running_loop().create_future()
    asker.ask(what, answered.set_result)
    return answered


@asynccontextmanager
async def service(
    *held: Revision, engine: WorkerPool | None = None, credentials: Any = None, **kwargs: Any
) -> AsyncIterator[tuple[PolicyService, str]]:
    """A service over real workers; the first revision is the active one."""
    async with pool() as own:
        for each in reversed(held):
            await (engine or own).load(each)
        by_digest = {each.digest: each for each in held}
        callers = kwargs.pop("callers", None)
        point = DecisionPoint(engine or own, active=lambda: held[0] if held else None, held=by_digest.get, **kwargs)
        made = PolicyService(point, callers=callers, max_calls=kwargs.get("max_pending", MAX_PENDING) + 50)
        port = await made.start("127.0.0.1:0", credentials)
        try:
            yield made, f"127.0.0.1:{port}"
        finally:
            await made.stop(0.2)


def client(*targets: str, identity: Identity | None = None, server_name: str = "", **kwargs: Any) -> PdpClient:
    """A client as a gateway has it, on its own HTTP/2; under mTLS with `identity`."""
    source = StaticIdentity(identity) if identity is not None else None
    return PdpClient(targets, GrpcChannels(asyncio.get_running_loop(), source, server_name), **kwargs)


Answer = Callable[[CheckRequest, Any], Any]


@asynccontextmanager
async def foreign(check: Answer) -> AsyncIterator[str]:
    """Somebody else's ext_authz server."""
    server = aio.server()
    handler = grpc.unary_unary_rpc_method_handler(
        check, request_deserializer=CheckRequest.FromString, response_serializer=CheckResponse.SerializeToString
    )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("envoy.service.auth.v3.Authorization", {"Check": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0)
