"""Copies of requests to other upstreams, which nobody waits for (Gateway API, `HTTPRequestMirrorFilter`).

A copy has a permit of its own, made with that of its request. It gets the request's body as the request's own upstream takes it; what its
upstream has no room for is held up to a bound, and beyond that the copy is given up. Nothing that becomes of a copy is felt by the request;
its answer is read and thrown away. A request that ends before all of it has come takes its copies with it: half of one is worth nothing.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Final

from gateway.exchange import Client, Forwarding
from gateway.plan import Permit
from mesh.http import Header
from mesh.outcome import Outcome
from mesh.refusals import Refusal

if TYPE_CHECKING:
    from gateway.attempt import Attempt
    from gateway.lane import Shared

NEVER: Final = float("inf")
ANSWER_TIME: Final = 15.0
"""Seconds that the answer to a copy may take when the rule has no timeout."""


class MirrorRequest:
    """One copy on its way: `gateway.exchange.Client` of its upstream's side, and `gateway.timers.Timed`. Owns what is held of the body."""

    __slots__ = (
        "_attempt",
        "_counted",
        "_ended",
        "_held",
        "_over",
        "_shared",
        "_size",
        "_timeout",
        "_trailers",
        "_wanted",
        "deadline",
        "outcome",
    )

    def __init__(self, shared: Shared, permit: Permit) -> None:
        plan = permit.plan
        asking = plan.asking
        self.outcome = Outcome(asking.head, asking.peer, asking.gateway, asking.listener, asking.received)
        self.outcome.cluster = plan.cluster.name
        self.deadline = NEVER
        self._shared = shared
        self._timeout = plan.timeout or ANSWER_TIME
        self._attempt: Attempt | None = None
        self._held: list[bytes] = []
        self._size = 0
        self._ended = False
        self._trailers: list[Header] | None = None
        self._wanted = False
        self._over = False
        self._counted = False

    def begin(self, attempt: Attempt, ended: bool) -> None:
        """Sends the copy by `attempt`; `ended`: it has no body."""
        self._shared.mirroring += 1
        self._attempt = attempt
        if ended:
            self._ended = True
            self._watch()
        attempt.begin()

    # From the request

    def body(self, data: bytes) -> None:
        """Some of the request's body."""
        if self._over:
            return
        self._held.append(data)
        self._size += len(data)
        if self._wanted:
            self._pass_on()
        elif self._size > self._shared.limits.mirror_buffer:
            self._give_up("overflow")

    def end(self, trailers: list[Header] | None) -> None:
        """The request is complete."""
        if self._over or self._ended:
            return
        self._ended = True
        self._trailers = trailers
        self._watch()
        if self._wanted:
            self._pass_on()

    def cut(self) -> None:
        """The request is over. A copy that has all of it goes on."""
        if not self._ended:
            self._give_up("cut")

    def _pass_on(self) -> None:
        attempt = self._attempt
        assert attempt is not None, "nothing is wanted before there is a try"
        if self._held:
            data, self._held, self._size = b"".join(self._held), [], 0
            attempt.body(data)
        if self._ended and self._wanted and not self._held and not self._over:
            attempt.end(self._trailers)

    def _watch(self) -> None:
        self.deadline = self._shared.loop.time() + self._timeout
        self._shared.sweeper.watched.add(self)

    # From its upstream's side (gateway.exchange.Client)

    def request_wanted(self, wanted: bool) -> None:
        """As `Client.request_wanted`."""
        self._wanted = wanted
        if wanted and not self._over:
            self._pass_on()

    def informational(self, status: int, headers: list[Header]) -> None:
        """Nobody is told."""

    def answer(self, status: int, headers: list[Header], ended: bool) -> None:
        """The copy has been answered, however: what its upstream makes of it is not the gateway's business."""
        self._count("answered")
        if ended:
            self._finish()

    def answer_body(self, data: bytes) -> bool:
        """As `Client.answer_body`: thrown away."""
        return True

    def answer_shut(self) -> None:
        """As `gateway.exchange.Client`: tunnels are not mirrored."""
        raise NotImplementedError("there is no tunnel")

    def answer_end(self, trailers: list[Header] | None) -> None:
        """As `Client.answer_end`."""
        self._finish()

    def refuse(self, refusal: Refusal) -> None:
        """There is no answer, or not all of one."""
        self._count("failed")
        self._finish()

    def expired(self, now: float) -> None:
        """As `gateway.timers.Timed.expired`."""
        self._give_up("timeout")

    # Its end

    def _give_up(self, why: str) -> None:
        if self._over:
            return
        self._count(why)
        self._finish()
        if self._attempt is not None:
            self._attempt.cancel()

    def _finish(self) -> None:
        if not self._over:
            self._over = True
            self._held = []
            self._shared.mirroring -= 1
            self._shared.sweeper.watched.discard(self)

    def _count(self, result: str) -> None:
        if not self._counted:
            self._counted = True
            count(self._shared.mirrors, self.outcome.cluster, result)


class Tee:
    """Between a request's two sides: passes on what they say to each other, and the body to the copies as well.

    `gateway.exchange.Client` to the upstream's side and `gateway.exchange.Forwarding` to the client's.
    """

    __slots__ = ("_client", "_copies", "_forwarding", "outcome", "over")

    def __init__(self, client: Client) -> None:
        self._client = client
        self._copies: tuple[MirrorRequest, ...] = ()
        self._forwarding: Forwarding | None = None
        self.outcome = client.outcome
        self.over = False
        """The request has been answered or refused, or has gone."""

    def join(self, forwarding: Forwarding, copies: tuple[MirrorRequest, ...]) -> None:
        """`forwarding` is the request's own, on its way since before the copies."""
        self._forwarding = forwarding
        self._copies = copies

    def _ended(self) -> None:
        self.over = True
        for copy in self._copies:
            copy.cut()

    # To the upstream's side

    def body(self, data: bytes) -> None:
        """As `Forwarding.body`."""
        for copy in self._copies:
            copy.body(data)
        if self._forwarding is not None and not self.over:
            self._forwarding.body(data)

    def end(self, trailers: list[Header] | None) -> None:
        """As `Forwarding.end`."""
        for copy in self._copies:
            copy.end(trailers)
        if self._forwarding is not None and not self.over:
            self._forwarding.end(trailers)

    def answer_wanted(self) -> None:
        """As `Forwarding.answer_wanted`."""
        if self._forwarding is not None:
            self._forwarding.answer_wanted()

    def cancel(self) -> None:
        """As `Forwarding.cancel`."""
        if self._forwarding is not None:
            self._forwarding.cancel()
        self._ended()

    # To the client's side

    def request_wanted(self, wanted: bool) -> None:
        """As `Client.request_wanted`."""
        self._client.request_wanted(wanted)

    def informational(self, status: int, headers: list[Header]) -> None:
        """As `Client.informational`."""
        self._client.informational(status, headers)

    def answer(self, status: int, headers: list[Header], ended: bool) -> None:
        """As `Client.answer`."""
        if ended:
            self._ended()
        self._client.answer(status, headers, ended)

    def answer_body(self, data: bytes) -> bool:
        """As `Client.answer_body`."""
        return self._client.answer_body(data)

    def answer_shut(self) -> None:
        """As `gateway.exchange.Client`: tunnels are not mirrored."""
        raise NotImplementedError("there is no tunnel")

    def answer_end(self, trailers: list[Header] | None) -> None:
        """As `Client.answer_end`."""
        self._ended()
        self._client.answer_end(trailers)

    def refuse(self, refusal: Refusal) -> None:
        """As `Client.refuse`."""
        self._ended()
        self._client.refuse(refusal)


def count(counts: Counter[tuple[str, str]], cluster: str, result: str) -> None:
    """One more copy to `cluster` that ended so: `answered`, `failed`, `timeout`, `cut`, `overflow`, or `busy` when it was never sent."""
    counts[cluster, result] += 1
