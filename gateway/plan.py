"""What `route` and `settle` return: the values that carry a request from one step to the next.

A `Permit` is the only thing that `forward` takes. It can be made by `settle` alone, from answers that all allow the request:
a reviewer can see by this one type that nothing reaches an upstream unchecked.
"""

from __future__ import annotations

from typing import Protocol, final

import msgspec

from gateway.session import Stay
from identity.authenticator import KeysWanted
from mesh.http import Header
from mesh.model import Backend, Cluster, Match, Rule
from mesh.questions import Asking, Decision, DecisionQuestion, Grant, TokenQuestion
from mesh.refusals import BrokenBackend, Refusal


class Edit(Protocol):
    """A change of an answer's headers."""

    def apply(self, headers: list[Header]) -> list[Header]:
        """`headers` with the change made; another list."""
        ...


@final
class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """The gateway answers by itself: a redirect."""

    status: int
    headers: tuple[Header, ...] = ()
    body: bytes = b""
    details: str = "direct_response"


@final
class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What to do with a request once it may go on."""

    asking: Asking
    match: Match
    rule: Rule
    backend: Backend
    cluster: Cluster
    method: bytes
    target: bytes
    """Path and query for the upstream: the normalised path, with the rule's rewrite."""
    authority: bytes
    headers: list[Header]
    """For the upstream: hop-by-hop and spoofed fields stripped, forwarding fields set, the rule's and the backend's changes applied."""
    request_id: bytes
    trace: bytes
    """The `traceparent` that was passed on or begun."""
    timeout: float | None
    backend_timeout: float | None
    edits: tuple[Edit, ...] = ()
    """Changes of the answer's headers: the rule's, then the backend's, then what CORS says."""
    bridge: bytes = b""
    """The content type of a gRPC-Web request that its upstream gets as gRPC; empty for any other."""
    stay: Stay | None = None
    """The request's session; None when the rule keeps none."""
    mirrors: tuple[Plan, ...] = ()
    """Copies of the request, each with a cluster and headers of its own."""


@final
class L4Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What to do with a connection (or a flow of datagrams) below HTTP once it may go on."""

    asking: Asking
    rule: Rule
    backend: Backend
    cluster: Cluster
    passthrough: bool
    """The client's own TLS goes on to the endpoint untouched; nothing is wrapped around it."""


@final
class Pending(msgspec.Struct, frozen=True, kw_only=True):
    """A routed request with the questions that must be answered before it may go on."""

    plan: Plan | Answer | BrokenBackend | L4Plan
    """A broken backend is a plan like others: it shows itself only to those whom policy lets through."""
    asking: Asking
    rule: Rule
    decisions: tuple[DecisionQuestion, ...]
    """In the order asked; the first that is not *allow* decides."""
    tokens: tuple[TokenQuestion, ...]
    """Asked after all decisions have allowed the request."""
    body_limit: int = 0
    """Bytes of body to gather into `asking.body` before the decisions can be asked; 0 for none."""
    body_partial: bool = False
    cors: Edit | None = None
    """What CORS says on an answer of the gateway's own."""


class Answers(msgspec.Struct, frozen=True, kw_only=True):
    """One answer for each question of a `Pending`, in the same order; shorter when an earlier answer already refuses."""

    decisions: tuple[Decision, ...] = ()
    grants: tuple[Grant, ...] = ()


@final
class Permit(msgspec.Struct, frozen=True, kw_only=True):
    """A request that passed identity, policy and quota. Made by `gateway.settle.settle` and nowhere else."""

    plan: Plan
    headers: list[Header]
    """The plan's headers with the decisions' changes applied, in order."""
    response_headers: tuple[Header, ...] = ()
    """To be added to the answer: the decisions' and the quota's (`RateLimit`, `RateLimit-Policy`)."""
    mirrors: tuple[Permit, ...] = ()
    """For the copies of the request."""
    metered: tuple[TokenQuestion, ...] = ()
    """What was admitted and is charged further after the answer (`gateway.meter`)."""


class L4Permit(msgspec.Struct, frozen=True, kw_only=True):
    """A connection that passed identity, policy and quota. Made by `gateway.settle.settle` and nowhere else."""

    plan: L4Plan


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """A permitted request that the gateway answers by itself (a redirect that policy allowed)."""

    answer: Answer
    response_headers: tuple[Header, ...] = ()


Routed = Refusal | Pending | KeysWanted
Settled = Permit | Reply | L4Permit | Refusal
