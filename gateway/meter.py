"""What requests cost that is known after their answer: read off it or counted as it goes by, and charged to their buckets.

A meter stands between a request's two sides, as a copy's tee does; a request without such a limit has none. What an answer's head says is
charged when the head is there, bytes as they pass, so that a long stream is paid for while it goes on; a trailer at the end. What was taken
in advance counts: only what goes beyond it is charged. The stream itself is never cut for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import msgspec

from gateway.exchange import Client, Forwarding
from gateway.plan import Permit
from mesh.http import Header
from mesh.questions import TokenQuestion
from mesh.quota_cost import Usage
from mesh.refusals import Refusal
from telemetry.metrics import Counter
from telemetry.record import Telemetry

DIGITS: Final = 18
"""Of what an answer says; more are more than anybody may."""
Charge = Callable[[TokenQuestion, int], None]
Count = Callable[[tuple[str, str]], None]


def costs_of(telemetry: Telemetry) -> Counter:
    """What counts how costs are told after answers; one for a process."""
    return telemetry.counter(
        "tollhouse_quota_costs_total", "How the cost of requests was told after their answers.", ("limit", "result"), max_series=4096
    )


class Charging(msgspec.Struct, frozen=True):
    """Where costs go."""

    charge: Charge
    """As `mesh.questions.Lessee.charge`."""
    count: Count
    """Counts how a limit's cost was told: (limit, `said`, `unsaid`, `invalid` or `capped`)."""


def told(usage: Usage, values: list[bytes]) -> tuple[int, str]:
    """The tokens that an answer's fields of that name say, and how (`Charging.count`). What is no whole number, or is said twice, costs
    the most, so that nobody gains by nonsense."""
    if not values:
        return usage.unsaid, "unsaid"
    said = values[0].strip(b" \t")
    if len(values) > 1 or not said.isdigit():
        return usage.most, "invalid"
    tokens = -(-int(said) // usage.per_token) if len(said) <= DIGITS else usage.most + 1
    return (usage.most, "capped") if tokens > usage.most else (tokens, "said")


class Account:
    """One limit's account of one request."""

    __slots__ = ("charging", "open", "paid", "question", "usage")

    def __init__(self, question: TokenQuestion, usage: Usage, charging: Charging) -> None:
        self.question = question
        self.usage = usage
        self.charging = charging
        self.paid = question.cost
        """Tokens, in advance and since."""
        self.open = True
        """What it costs in the end is not known yet."""

    def owe(self, tokens: int) -> None:
        """It costs `tokens` in all, so far."""
        if tokens > self.paid:
            self.charging.charge(self.question, tokens - self.paid)
            self.paid = tokens

    def close(self, values: list[bytes]) -> None:
        """What the answer's fields say is the end of it."""
        if self.open:
            self.open = False
            tokens, how = told(self.usage, values)
            self.charging.count((self.question.limit.name, how))
            self.owe(tokens)


class Meter:
    """`gateway.exchange.Client` to the upstream's side, `gateway.exchange.Forwarding` to the client's, and the first `gateway.plan.Edit` of
    the answer's headers: it sees them as the upstream sent them, whatever the client is to see."""

    __slots__ = ("_begun", "_bytes", "_client", "_fields", "_heads", "_received", "_sent", "_trailers", "forwarding", "outcome", "permit")

    def __init__(self, client: Client, permit: Permit, charging: Charging) -> None:
        self._client = client
        self.outcome = client.outcome
        self.forwarding: Forwarding | None = None
        """The request's way to its upstream: to be set by who began it."""
        accounts = [Account(each, each.limit.usage, charging) for each in permit.metered if each.limit.usage is not None]
        self._heads = [each for each in accounts if each.usage.source == "header"]
        self._trailers = [each for each in accounts if each.usage.source == "trailer"]
        self._bytes = [each for each in accounts if each.usage.source == "bytes"]
        self._fields: list[Header] = []
        self._received = self._sent = 0
        self._begun = False
        plan = msgspec.structs.replace(permit.plan, edits=(self, *permit.plan.edits))
        self.permit = msgspec.structs.replace(permit, plan=plan)
        """What the upstream's side is to carry out."""

    def apply(self, headers: list[Header]) -> list[Header]:
        """As `gateway.plan.Edit.apply`: reads, and changes nothing."""
        self._begun = True
        self._fields = headers
        close(self._heads, headers)
        return headers

    def _passed(self, *, ended: bool = False) -> None:
        for account in self._bytes:
            usage = account.usage
            size = (self._received if usage.request else 0) + (self._sent if usage.response else 0)
            account.owe(-(-size // usage.per_token) if ended else size // usage.per_token)

    def _end(self, trailers: list[Header]) -> None:
        self._passed(ended=True)
        close(self._heads, [])
        close(self._trailers, trailers)

    # To the upstream's side

    def body(self, data: bytes) -> None:
        """As `Forwarding.body`."""
        self._received += len(data)
        self._passed()
        if self.forwarding is not None:
            self.forwarding.body(data)

    def end(self, trailers: list[Header] | None) -> None:
        """As `Forwarding.end`."""
        if self.forwarding is not None:
            self.forwarding.end(trailers)

    def answer_wanted(self) -> None:
        """As `Forwarding.answer_wanted`."""
        if self.forwarding is not None:
            self.forwarding.answer_wanted()

    def cancel(self) -> None:
        """As `Forwarding.cancel`. Whoever goes before the answer has said what it costs pays as for one that does not say it."""
        if self.forwarding is not None:
            self.forwarding.cancel()
        self._end([])

    # To the client's side

    def request_wanted(self, wanted: bool) -> None:
        """As `Client.request_wanted`."""
        self._client.request_wanted(wanted)

    def informational(self, status: int, headers: list[Header]) -> None:
        """As `Client.informational`."""
        self._client.informational(status, headers)

    def answer(self, status: int, headers: list[Header], ended: bool) -> None:
        """As `Client.answer`. An answer of trailers only (gRPC) has them in its head."""
        if ended:
            self._end(self._fields)
        self._client.answer(status, headers, ended)

    def answer_body(self, data: bytes) -> bool:
        """As `Client.answer_body`."""
        self._sent += len(data)
        self._passed()
        return self._client.answer_body(data)

    def answer_shut(self) -> None:
        """As `Client.answer_shut`."""
        self._client.answer_shut()

    def answer_end(self, trailers: list[Header] | None) -> None:
        """As `Client.answer_end`."""
        self._end(trailers or [])
        self._client.answer_end(trailers)

    def refuse(self, refusal: Refusal) -> None:
        """As `Client.refuse`. A request that no upstream has begun to answer costs no more than what was taken, but for its bytes."""
        if self._begun:
            self._end([])
        else:
            self._passed(ended=True)
        self._client.refuse(refusal)


def close(accounts: list[Account], fields: list[Header]) -> None:
    """Closes accounts by what `fields` say."""
    for account in accounts:
        wanted = account.usage.name
        account.close([value for name, value in fields if name == wanted])
