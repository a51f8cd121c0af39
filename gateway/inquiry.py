"""Questions of the gateway itself to services of the mesh, over its own upstream side: what asks authorization and rate-limit services.

A service is one like any other: by its cluster it has endpoints, TLS, identities, ejections and bounds.
"""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import Final, Protocol

from gateway.exchange import Forwarder, Forwarding
from gateway.grpc_unary import whole_message
from gateway.headers import TE_TRAILERS
from gateway.plan import Plan
from gateway.settle import inquiry
from mesh.filters import RetryPolicy
from mesh.http import HTTP2, Header, RequestHead
from mesh.model import Backend, Cluster, Match, Rule
from mesh.outcome import Outcome
from mesh.questions import Asking
from mesh.refusals import Refusal, UpstreamTimeout

MOST_ANSWER: Final = 1 << 20
"""Bytes of an answer's body."""


class Hearer(Protocol):
    """Hears what came of a question: one of both, once."""

    def answered(self, status: int, headers: list[Header], trailers: list[Header], body: bytes) -> None:
        """The service's whole answer."""
        ...

    def failed(self, cause: str, reason: str) -> None:
        """There is none. `cause`: `timeout`, `unavailable` or `provider` (its answer can't be used)."""
        ...


def plan_of(name: str, cluster: str, asking: Asking, head: RequestHead, timeout: float) -> Plan:
    """What the forwarder is given: `head` to `cluster`. `name`: whose question it is, for its rule; `timeout`: seconds."""
    rule, match, backend = _rule(name, head.headers[0] == _GRPC)
    own = Asking(head, asking.peer, asking.caller, asking.gateway, asking.listener, rule.name, "", "", asking.received)
    return Plan(
        asking=own,
        match=match,
        rule=rule,
        backend=backend,
        # The forwarder has the cluster itself, as it is now.
        cluster=Cluster(name=cluster, namespace="", service="", port=0),
        method=head.method,
        target=head.target,
        authority=head.authority,
        headers=head.headers,
        request_id=b"",
        trace=b"",
        timeout=None,
        backend_timeout=timeout,
    )


_GRPC: Final = (b"content-type", b"application/grpc")


@lru_cache(maxsize=1024)
def _rule(name: str, grpc: bool) -> tuple[Rule, Match, Backend]:
    rule = Rule(name=name, route="", namespace="", grpc=grpc, retry=RetryPolicy())
    return rule, Match(rule=rule, path_kind="prefix", path=b"", template="/**"), Backend(weight=1)


def grpc_call(cluster: str, method: bytes, message: bytes) -> tuple[RequestHead, bytes]:
    """Head and body of a call with one message."""
    body = struct.pack(">BI", 0, len(message)) + message
    authority = cluster.encode().replace(b"/", b".")
    return RequestHead(b"POST", b"http", authority, method, [_GRPC, TE_TRAILERS], HTTP2, len(body), method), body


def grpc_message(status: int, fields: list[Header], body: bytes) -> bytes | str:
    """The one message of a gRPC answer, or what is wrong with it. `fields` are those of its head and its trailers."""
    said = next((value for name, value in fields if name == b"grpc-status"), b"")
    if status != 200 or said != b"0":
        message = next((value for name, value in fields if name == b"grpc-message"), b"").decode("latin-1")
        what = f"status {said.decode('latin-1')}" if said else f"HTTP status {status}"
        return f"the service answered with {what}" + (f": {message}" if message else "")
    if not whole_message(body) or body[0]:
        return "the service's answer is not one message"
    return body[5:]


def send(forwarder: Forwarder, plan: Plan, body: bytes, hearer: Hearer) -> None:
    """Asks; `hearer` hears the answer, perhaps before this returns."""
    _Inquiry(plan.asking, body, hearer).send(forwarder, plan)


class _Inquiry:
    """`gateway.exchange.Client` of one question: sends it, gathers the answer, and tells what it means, once."""

    __slots__ = ("_body", "_forwarding", "_gathered", "_headers", "_hearer", "_status", "_wanted", "outcome")

    def __init__(self, asking: Asking, body: bytes, hearer: Hearer) -> None:
        self.outcome = Outcome(None, asking.peer, asking.gateway, asking.listener, asking.received)
        self._body = body
        self._hearer: Hearer | None = hearer
        self._forwarding: Forwarding | None = None
        self._wanted = False
        self._status = 0
        self._headers: list[Header] = []
        self._gathered = bytearray()

    def send(self, forwarder: Forwarder, plan: Plan) -> None:
        """Asks."""
        self._forwarding = forwarder.forward(inquiry(plan), self, ended=not self._body)
        if self._wanted:
            self._pass_on()

    def request_wanted(self, wanted: bool) -> None:
        """As `Client.request_wanted`."""
        self._wanted = wanted
        if wanted and self._forwarding is not None:
            self._pass_on()

    def _pass_on(self) -> None:
        forwarding, body = self._forwarding, self._body
        if forwarding is not None and body:
            self._body = b""
            forwarding.body(body)
            forwarding.end(None)

    def informational(self, status: int, headers: list[Header]) -> None:
        """Nobody is told."""

    def answer(self, status: int, headers: list[Header], ended: bool) -> None:
        """As `Client.answer`."""
        self._status, self._headers = status, headers
        if ended:
            self._tell(None)

    def answer_body(self, data: bytes) -> bool:
        """As `Client.answer_body`."""
        self._gathered += data
        if len(self._gathered) > MOST_ANSWER:
            self._fail("provider", f"the service's answer is longer than {MOST_ANSWER} bytes")
            if self._forwarding is not None:
                self._forwarding.cancel()
        return True

    def answer_shut(self) -> None:
        """As `Client.answer_shut`: no question is a tunnel."""

    def answer_end(self, trailers: list[Header] | None) -> None:
        """As `Client.answer_end`."""
        self._tell(trailers)

    def refuse(self, refusal: Refusal) -> None:
        """As `Client.refuse`."""
        cause = "timeout" if isinstance(refusal, UpstreamTimeout) else "unavailable"
        self._fail(cause, refusal.reason or refusal.sentence)

    def _tell(self, trailers: list[Header] | None) -> None:
        hearer, self._hearer = self._hearer, None
        if hearer is not None:
            hearer.answered(self._status, self._headers, trailers or [], bytes(self._gathered))

    def _fail(self, cause: str, reason: str) -> None:
        hearer, self._hearer = self._hearer, None
        if hearer is not None:
            hearer.failed(cause, reason)
