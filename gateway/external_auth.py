"""Asks authorization services that filters of routes name, over the gateway's own upstream side (Gateway API GEP-1494).

A service is one like any other: by its cluster it has endpoints, TLS, identities, ejections and bounds. With `GRPC` it is asked as Envoy
asks its ext_authz servers. With `HTTP` it gets the request's method, path, host, `authorization`, and the headers that the filter names.
Then 200 lets the request pass, and headers of the answer go on with it; an answer of 500 or more is an error; any other is a denial that
the client gets.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from functools import lru_cache
from typing import Final

from envoy.service.auth.v3.external_auth_pb2 import CheckResponse
from google.protobuf.message import DecodeError

from gateway.exchange import Forwarder, Forwarding
from gateway.headers import FRAMING, TE_TRAILERS
from gateway.plan import Plan
from gateway.redirect import with_query
from gateway.settle import inquiry
from mesh.filters import ExternalAuth, RetryPolicy
from mesh.http import HTTP2, NO_HEAD, Header, RequestHead
from mesh.model import Backend, Cluster, Match, Rule
from mesh.outcome import Outcome
from mesh.questions import Asking, Decision, DecisionQuestion, Verdict
from mesh.refusals import Refusal, UpstreamTimeout
from pdp.answer import error
from pdp.body import PARTIAL
from pdp.check import decision_of_check
from pdp.fields import MOST_BODY, MOST_FIELDS, field_problem
from pdp.input import check_request, shown_body

CHECK: Final = b"/envoy.service.auth.v3.Authorization/Check"
_PARTIAL: Final = PARTIAL.encode()
AUTHORIZATION: Final = b"authorization"
_OWN: Final = FRAMING | {b"date", b"server", b"vary", b"set-cookie", b"alt-svc"}
"""Fields of an answer that are about it, its sender or its connection; so are those that begin with `content-`."""
Done = Callable[[Decision], None]


class ServiceAsker:
    """As `pdp.asker.Asker`, for the questions of one gateway."""

    __slots__ = ("_forwarder",)

    def __init__(self, forwarder: Forwarder) -> None:
        self._forwarder = forwarder

    def ask(self, question: DecisionQuestion, done: Done) -> None:
        """As `Asker.ask`."""
        auth = question.policy.auth
        if auth is None:
            done(error("internal", "the policy names no service"))
            return
        try:
            plan, body = (_grpc_plan if auth.protocol == "GRPC" else _http_plan)(question, auth)
        except ValueError as problem:
            done(error("input", str(problem)))
            return
        _Inquiry(question, body, done).send(self._forwarder, plan)


@lru_cache(maxsize=1024)
def _rule(name: str, grpc: bool) -> tuple[Rule, Match, Backend]:
    rule = Rule(name=name, route="", namespace="", grpc=grpc, retry=RetryPolicy())
    return rule, Match(rule=rule, path_kind="prefix", path=b"", template="/**"), Backend(weight=1)


def _plan(question: DecisionQuestion, auth: ExternalAuth, head: RequestHead) -> Plan:
    asking = question.asking
    rule, match, backend = _rule(question.policy.name, auth.protocol == "GRPC")
    # The forwarder has the cluster itself, as it is now.
    cluster = Cluster(name=auth.cluster, namespace="", service="", port=0)
    own = Asking(head, asking.peer, asking.caller, asking.gateway, asking.listener, rule.name, "", "", asking.received)
    return Plan(
        asking=own,
        match=match,
        rule=rule,
        backend=backend,
        cluster=cluster,
        method=head.method,
        target=head.target,
        authority=head.authority,
        headers=head.headers,
        request_id=b"",
        trace=b"",
        timeout=None,
        backend_timeout=question.policy.timeout,
    )


def _grpc_plan(question: DecisionQuestion, auth: ExternalAuth) -> tuple[Plan, bytes]:
    request = check_request(question.asking, question.policy)
    if auth.headers:
        shown = request.attributes.request.http.headers
        for name in [name for name in shown if name[:1] != ":" and name.encode() not in auth.headers]:
            del shown[name]
    message = request.SerializeToString()
    body = struct.pack(">BI", 0, len(message)) + message
    authority = auth.cluster.encode()
    headers = [(b"content-type", b"application/grpc"), TE_TRAILERS]
    head = RequestHead(b"POST", b"http", authority.replace(b"/", b"."), CHECK, headers, HTTP2, len(body), CHECK)
    return _plan(question, auth, head), body


def _http_plan(question: DecisionQuestion, auth: ExternalAuth) -> tuple[Plan, bytes]:
    asked = question.asking.head
    if asked is NO_HEAD:
        raise ValueError("a service that is asked over HTTP can say nothing about connections that are not HTTP")
    body, partial = shown_body(question.asking, question.policy)
    shown = auth.headers
    headers = [field for field in asked.headers if (field[0] in shown or field[0] == AUTHORIZATION) and field[0] not in FRAMING]
    target = auth.path + with_query(asked.path, asked.query)
    if auth.added:
        ours = {name for name, _ in auth.added}
        headers = [field for field in headers if field[0] not in ours]
        headers += [field for field in auth.added if field[0] not in FRAMING]
    if body:
        headers.append((_PARTIAL, b"true" if partial else b"false"))
    headers.append((b"content-length", b"%d" % len(body)))
    path = auth.path + asked.path
    head = RequestHead(asked.method, asked.scheme, asked.authority, target, headers, asked.version, len(body), path, asked.query)
    return _plan(question, auth, head), body


class _Inquiry:
    """`gateway.exchange.Client` of one question: sends it, gathers the answer, and tells what it means, once."""

    __slots__ = ("_body", "_done", "_forwarding", "_gathered", "_headers", "_question", "_status", "_wanted", "outcome")

    def __init__(self, question: DecisionQuestion, body: bytes, done: Done) -> None:
        asking = question.asking
        self.outcome = Outcome(None, asking.peer, asking.gateway, asking.listener, asking.received)
        self._question = question
        self._body = body
        self._done: Done | None = done
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
        if len(self._gathered) > MOST_BODY:
            self._finish(error("provider", f"the service's answer is longer than {MOST_BODY} bytes"))
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
        self._finish(error(cause, refusal.reason or refusal.sentence))

    def _tell(self, trailers: list[Header] | None) -> None:
        auth = self._question.policy.auth
        if auth is None or auth.protocol == "GRPC":
            self._finish(grpc_decision(self._status, [*self._headers, *(trailers or ())], bytes(self._gathered)))
        else:
            self._finish(http_decision(auth, self._status, self._headers, bytes(self._gathered)))

    def _finish(self, decision: Decision) -> None:
        done, self._done = self._done, None
        if done is not None:
            done(decision)


def grpc_decision(status: int, fields: list[Header], body: bytes) -> Decision:
    """What an ext_authz answer means: `fields` are those of its head and its trailers."""
    said = next((value for name, value in fields if name == b"grpc-status"), b"")
    if status != 200 or said != b"0":
        message = next((value for name, value in fields if name == b"grpc-message"), b"").decode("latin-1")
        what = f"status {said.decode('latin-1')}" if said else f"HTTP status {status}"
        return error("provider", f"the service answered with {what}" + (f": {message}" if message else ""))
    if len(body) < 5 or body[0] or len(body) - 5 != int.from_bytes(body[1:5], "big"):
        return error("provider", "the service's answer is not one message")
    try:
        return decision_of_check(CheckResponse.FromString(body[5:]))
    except DecodeError:
        return error("provider", "the service's answer is not one of ext_authz")


def http_decision(auth: ExternalAuth, status: int, headers: list[Header], body: bytes) -> Decision:
    """What an answer over HTTP means."""
    if status >= 500:
        return error("provider", f"the service answered with {status}")
    if status == 200:
        wanted = auth.copied
        every = auth.copies_all and not wanted
        chosen = [field for field in headers if (not _about_itself(field[0]) if every else field[0] in wanted) and field[0] not in FRAMING]
        told = tuple([field for field in headers if field[0] in auth.told and field[0] not in FRAMING and not field_problem(*field)])
        if len(chosen) > MOST_FIELDS or any(field_problem(name, value) for name, value in chosen):
            return error("provider", "the service allows, but with headers that can't go on")
        return Decision(verdict=Verdict.ALLOW, headers=tuple(chosen), response_headers=told)
    some = auth.told_denied
    passed = tuple(field for field in headers if (not some or field[0] in some) and field[0] not in FRAMING and not field_problem(*field))
    return Decision(verdict=Verdict.DENY, status=status, headers=passed, body=body, reason=f"the service answered with {status}")


def _about_itself(name: bytes) -> bool:
    return name in _OWN or name.startswith(b"content-")
