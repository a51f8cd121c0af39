"""A real OPA worker for tests: asked by `command` as `pdp.publish` does, and for evaluations."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

import msgspec

from mesh.http import Header, RequestHead
from mesh.model import DecisionPolicy
from mesh.peer import Caller, Peer
from mesh.policy import ReadSet, Revision
from mesh.questions import Asking
from mesh.tokens import Bearer, KeySource, TokenRule
from pdp.build import worker_binary
from pdp.engines.child import Child, Question
from pdp.engines.engine import Evaluation, segments
from pdp.values import Part, at, wanted_parts

WEB = "spiffe://shop.example/ns/shop/sa/web"


class Worker:
    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.child = Child(self, self._loop, 2)

    def answered(self, question: Question, answer: Evaluation) -> None:
        if question.done is not None:
            question.done(answer)

    def died(self, child: Child, why: str) -> None:
        for question in child.open.values():
            if question.done is not None:
                question.done(Evaluation("error", b"", why, "crashed"))

    async def command(self, request: dict[str, Any]) -> dict[str, Any]:
        reply: dict[str, Any] = json.loads(await self.child.command(msgspec.json.encode(request)))
        return reply

    async def load(self, revision: Revision) -> None:
        reply = await self.command(
            {"op": "load", "revision": revision.digest, "modules": revision.modules, "data": msgspec.Raw(revision.data)}
        )
        assert not reply.get("problems"), reply

    async def evaluate(self, revision: Revision, path: str, documents: Iterable[bytes]) -> list[Evaluation]:
        """The answers, in the order of the documents."""
        waiting: list[asyncio.Future[Evaluation]] = []
        answers: list[Evaluation] = []
        for document in documents:
            future: asyncio.Future[Evaluation] = self._loop.create_future()
            now = self._loop.time()
            self.child.ask(Question(revision, path, document, now + 20, _set(future)), now)
            waiting.append(future)
            if len(waiting) == 200:
                answers += await asyncio.gather(*waiting)
                waiting.clear()
        return answers + list(await asyncio.gather(*waiting))


def _set(future: asyncio.Future[Evaluation]) -> Any:
    return lambda answer: None if future.done() else future.set_result(answer)


@asynccontextmanager
async def a_worker() -> AsyncIterator[Worker]:
    worker = Worker()
    await worker.child.spawn(worker_binary(), [])
    try:
        yield worker
    finally:
        worker.child.close()
        await worker.child.gone


def sets(answer: Evaluation) -> Any:
    """An answer so that equal ones are equal: the result as canonical JSON (sets come sorted), or why there is none."""
    if answer.kind == "result":
        return "result", json.dumps(json.loads(answer.value), sort_keys=True)
    return answer.kind, answer.reason


def key_of(reads: ReadSet, tree: Any) -> tuple[Part, ...]:
    return tuple(part(at(tree, path)) for path, part in wanted_parts(reads))


def asking(
    *,
    method: bytes = b"GET",
    path: bytes = b"/orders/1",
    query: bytes | None = None,
    headers: list[Header] | None = None,
    principal: str = WEB,
    via: str = "",
    gateway: str = "edge/ingress",
    service: str = "shop/orders",
    authority: bytes = b"shop.example",
    received: float = 1_700_000_000.25,
    port: int = 4000,
    body: bytes | None = None,
    complete: bool = True,
    claims: dict[str, Any] | None = None,
) -> Asking:
    """`claims`: those of the request's token; None for a request without one."""
    target = path if query is None else path + b"?" + query
    head = RequestHead(method, b"https", authority, target, headers or [], b"HTTP/1.1", len(body or b""), path, query)
    if claims is not None:
        rule = TokenRule(name="edge/users#0", issuer="https://issuer.example", keys=KeySource(inline="-"))
        head.bearer = Bearer(rule=rule, principal="", claims=claims)
    peer = Peer(principal=principal, address="10.0.0.9", port=port, local_address="10.0.0.1", local_port=8443)
    made = Asking(head, peer, Caller(principal, via), gateway, "https", "shop/orders#0", "/orders/**", service, received)
    made.body, made.body_complete = body, complete
    return made


def policy(**fields: Any) -> DecisionPolicy:
    return DecisionPolicy(**{"name": "shop/policy", "level": "mesh", "decision": "shop.authz.decision", **fields})


def rego(name: str, text: str) -> dict[str, str]:
    """Modules of one text: `---` separates them."""
    parts = text.split("\n---\n")
    assert segments(name)
    return {f"m{index}.rego": part for index, part in enumerate(parts)}
