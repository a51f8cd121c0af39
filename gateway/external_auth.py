"""Asks authorization services that filters of routes name, over the gateway's own upstream side (Gateway API GEP-1494).

A service is one like any other: by its cluster it has endpoints, TLS, identities, ejections and bounds. With `GRPC` it is asked as Envoy
asks its ext_authz servers. With `HTTP` it gets the request's method, path, host, `authorization`, and the headers that the filter names.
Then 200 lets the request pass, and headers of the answer go on with it; an answer of 500 or more is an error; any other is a denial that
the client gets.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from envoy.service.auth.v3.external_auth_pb2 import CheckResponse
from google.protobuf.message import DecodeError

from gateway.exchange import Forwarder
from gateway.headers import FRAMING
from gateway.inquiry import grpc_call, grpc_message, plan_of, send
from gateway.plan import Plan
from gateway.redirect import with_query
from mesh.filters import ExternalAuth
from mesh.http import NO_HEAD, Header, RequestHead
from mesh.questions import Decision, DecisionQuestion, Verdict
from pdp.answer import error
from pdp.body import PARTIAL
from pdp.check import decision_of_check
from pdp.fields import MOST_FIELDS, field_problem
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
        send(self._forwarder, plan, body, _Hearer(auth, done))


class _Hearer:
    """Makes a decision of what came of a question."""

    __slots__ = ("_auth", "_done")

    def __init__(self, auth: ExternalAuth, done: Done) -> None:
        self._auth = auth
        self._done = done

    def answered(self, status: int, headers: list[Header], trailers: list[Header], body: bytes) -> None:
        """As `gateway.inquiry.Hearer.answered`."""
        if self._auth.protocol == "GRPC":
            self._done(grpc_decision(status, [*headers, *trailers], body))
        else:
            self._done(http_decision(self._auth, status, headers, body))

    def failed(self, cause: str, reason: str) -> None:
        """As `gateway.inquiry.Hearer.failed`."""
        self._done(error(cause, reason))


def _plan(question: DecisionQuestion, auth: ExternalAuth, head: RequestHead) -> Plan:
    return plan_of(question.policy.name, auth.cluster, question.asking, head, question.policy.timeout)


def _grpc_plan(question: DecisionQuestion, auth: ExternalAuth) -> tuple[Plan, bytes]:
    request = check_request(question.asking, question.policy)
    if auth.headers:
        shown = request.attributes.request.http.headers
        for name in [name for name in shown if name[:1] != ":" and name.encode() not in auth.headers]:
            del shown[name]
    head, body = grpc_call(auth.cluster, CHECK, request.SerializeToString())
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


def grpc_decision(status: int, fields: list[Header], body: bytes) -> Decision:
    """What an ext_authz answer means: `fields` are those of its head and its trailers."""
    message = grpc_message(status, fields, body)
    if isinstance(message, str):
        return error("provider", message)
    try:
        return decision_of_check(CheckResponse.FromString(message))
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
