"""Whoever gives a question an answer: one interface, two siblings.

* `EngineAsker`           -- a Rego engine of this process
* `pdp.client.PdpClient`  -- our own decision points, or any ext_authz server, over gRPC
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from mesh.questions import Decision, DecisionQuestion
from pdp.answer import decision_of, error
from pdp.engines.engine import Engine, Evaluation
from pdp.input import document


class Asker(Protocol):
    """Gives questions answers. What is kept, shared and timed is not its business."""

    def ask(self, question: DecisionQuestion, done: Callable[[Decision], None]) -> None:
        """Gets an answer and gives it to `done`, exactly once, within about the policy's time; perhaps before this
        returns. Never raises."""
        ...


class EngineAsker:
    """Asks an engine for the policy's decision in the question's revision."""

    __slots__ = ("_engine",)

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def ask(self, question: DecisionQuestion, done: Callable[[Decision], None]) -> None:
        """As `Asker.ask`."""
        policy, revision = question.policy, question.revision
        if revision is None:
            done(error("unavailable", "no policy revision is active"))
            return
        digest = revision.digest
        try:
            text = document(question.asking, policy)
        except ValueError as problem:
            done(error("input", str(problem), digest))
            return

        def answered(evaluation: Evaluation) -> None:
            done(decision_of(evaluation, policy.decision, digest))

        self._engine.evaluate(revision, policy.decision, text, policy.timeout, answered)
