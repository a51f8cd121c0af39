"""The two sides of one exchange: what the client's side and the upstream's side tell each other. No framing, no sockets.

The client's side (`gateway.stream`) owns the request and the outcome; the upstream's side (`gateway.forward`) owns the try that is in
progress. Neither knows which HTTP version the other speaks. Both live in one event loop and call each other directly; a call may be
answered by a call back before it returns.

Back-pressure: the request's body flows only while the upstream's side wants it (at first it does not: nobody is connected), the answer's
body only until `answer_body` says False. Whoever is told to stop stops reading its connection (HTTP/1.1) or withholds flow-control credit
(HTTP/2); data that has been passed over counts as consumed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from gateway.plan import L4Permit, Permit
from mesh.http import Header
from mesh.outcome import Outcome
from mesh.refusals import Refusal

if TYPE_CHECKING:
    from gateway.l4_upstream import Connecting, Done, FlowUpstream, OpeningFlow


class Client(Protocol):
    """The client's side, as the upstream's side sees it. `answer_end`, `answer(..., ended=True)` and `refuse` are the last calls."""

    outcome: Outcome
    """The upstream's side fills in `cluster`, `endpoint`, `upstream_principal`, `attempts`, `upstream_duration`, `response_version`,
    `grpc_status` and `details`."""

    def request_wanted(self, wanted: bool) -> None:
        """Whether the request's body (and its end) may be passed on now. The first True also lets `100 Continue` go to a client that waits
        for it. What has been held comes before this returns."""
        ...

    def informational(self, status: int, headers: list[Header]) -> None:
        """A 1xx answer of the upstream's, to be passed on (never 100 or 101)."""
        ...

    def answer(self, status: int, headers: list[Header], ended: bool) -> None:
        """The final answer's head, with every header change applied and hop-by-hop fields gone. `ended`: no body and no trailers follow.
        A status that opens the tunnel that was asked for (`RequestHead.opens`) makes both bodies the tunnel's; with another the request was
        complete with its head."""
        ...

    def answer_body(self, data: bytes) -> bool:
        """Some of the answer's body. False: stop until `Forwarding.answer_wanted` (this much has been taken)."""
        ...

    def answer_shut(self) -> None:
        """The upstream sends no more through the tunnel; what the client sends still goes. `answer_end` follows when that ends."""
        ...

    def answer_end(self, trailers: list[Header] | None) -> None:
        """The answer is complete."""
        ...

    def refuse(self, refusal: Refusal) -> None:
        """There will be no answer, or no more of it: answered by `refusal` when nothing has been sent, else the stream is cut off in a way
        that the client can tell from a complete answer."""
        ...


class Forwarding(Protocol):
    """One request on its way to an upstream, as the client's side sees it."""

    def body(self, data: bytes) -> None:
        """Some of the request's body; only while it is wanted."""
        ...

    def end(self, trailers: list[Header] | None) -> None:
        """The request is complete; only while it is wanted."""
        ...

    def answer_wanted(self) -> None:
        """The client takes the answer's body again."""
        ...

    def cancel(self) -> None:
        """The client has gone (or its time is over): give the upstream's stream up. Nothing is called back afterwards."""
        ...


class Forwarder(Protocol):
    """What carries permits out. There is one for a worker; it owns the connection pools."""

    def forward(self, permit: Permit, client: Client, *, ended: bool) -> Forwarding:
        """Begins to carry out `permit` for `client`; `ended`: the request has no body. Never raises; what goes wrong is told to `client`,
        perhaps before this returns."""
        ...

    def open_flow(self, permit: L4Permit, outcome: Outcome, done: Callable[[FlowUpstream | Refusal], None]) -> OpeningFlow | Refusal:
        """Begins to find an endpoint for a flow of datagrams, or says why not. `done` is called once, perhaps before this returns."""
        ...

    def connect(self, permit: L4Permit, outcome: Outcome, done: Done) -> Connecting | Refusal:
        """Begins to connect a client's connection to an endpoint, or says why not. `done` is called once, later."""
        ...
