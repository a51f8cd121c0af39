"""What a connection and a flow below HTTP have in common: each is routed once, and asked about, before anything is forwarded."""

from __future__ import annotations

from gateway.driver import Waiting
from gateway.plan import Pending, Settled
from gateway.serving import Serving
from gateway.shared import Shared
from gateway.trace import identifiers
from mesh.outcome import Outcome
from mesh.peer import Peer
from mesh.refusals import Refusal


class L4Asked:
    """Owns the questions on their way. What the answers lead to is the subclass's: `_settled` or `_refuse` is called, once."""

    __slots__ = ("_pending", "_waiting", "outcome", "peer")

    def __init__(self, peer: Peer, outcome: Outcome) -> None:
        self.peer = peer
        self.outcome = outcome
        self._pending: Pending | None = None
        self._waiting: Waiting | None = None

    def _ask(self, shared: Shared, serving: Serving | None) -> None:
        """Routes it and drives its questions; what can be settled at once is."""
        assert serving is not None
        assert serving.table is not None
        routed = serving.table.route(self.peer, self.outcome.started, shared.rng)
        if isinstance(routed, Refusal):
            self._refuse(routed)
            return
        self._pending = routed
        self.outcome.request_id = identifiers(shared.rng)[0]
        settled = shared.driver.drive(routed, self.outcome, self._later_settled)
        if not isinstance(settled, Waiting):
            self._settled(settled)
        elif self._settling:
            self._waiting = settled

    def _later_settled(self, settled: Settled) -> None:
        self._waiting = None
        try:
            self._settled(settled)
        except Exception as problem:  # one connection's defect is nobody else's
            self._defect(problem)

    @property
    def _settling(self) -> bool:
        """Whether an answer still matters."""
        raise NotImplementedError

    def _settled(self, settled: Settled) -> None:
        raise NotImplementedError

    def _refuse(self, refusal: Refusal) -> None:
        raise NotImplementedError

    def _defect(self, problem: Exception) -> None:
        raise NotImplementedError
