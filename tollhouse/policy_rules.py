"""`tollhouse explain --rules`: what the rules did for each of the questions that a gateway would ask."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mesh.questions import Decider, Decision, DecisionQuestion
from tollhouse.policy_steps import lines, values

if TYPE_CHECKING:
    from gateway.explain import Explanation as WholeExplanation
    from pdp.publish import Checker

_SECONDS = 5.0


class Noting:
    """A `Decider` that remembers what it was asked."""

    def __init__(self, decider: Decider) -> None:
        self._decider = decider
        self.questions: dict[int, DecisionQuestion] = {}

    def recall(self, question: DecisionQuestion, now: float) -> Decision | None:
        """As `Decider.recall`."""
        self.questions[id(question)] = question
        return self._decider.recall(question, now)

    def ask(self, question: DecisionQuestion, done: Callable[[Decision], None]) -> None:
        """As `Decider.ask`."""
        self.questions[id(question)] = question
        self._decider.ask(question, done)

    def renewed(self, question: DecisionQuestion) -> DecisionQuestion:
        """As `Decider.renewed`."""
        return self._decider.renewed(question)


async def add_rules(explanation: WholeExplanation, noted: Noting, checker: Checker) -> None:
    """Puts into the steps of an explanation that are decisions of our own policies what their rules did, under `rules`."""
    from pdp.authoring import explain
    from pdp.engines.engine import EngineUnavailable, PolicyError
    from pdp.input import document

    for question in noted.questions.values():
        policy, revision = question.policy, question.revision
        if revision is None or policy.provider or policy.authorization:
            continue
        details: dict[str, Any] = next(
            (
                step.details
                for step in explanation.steps
                if step.name == "decision" and "rules" not in step.details and step.details.get("policy") == policy.name
            ),
            {},
        )
        if not revision.modules:
            details |= {"rules": [], "rules_told": ["its modules are in a bundle, not in the configuration"]}
            continue
        try:
            shown = document(question.asking, policy)
            told = await explain(checker, revision.modules, revision.data, policy.decision, shown, _SECONDS)
        except (ValueError, PolicyError, EngineUnavailable) as problem:
            details |= {"rules": [], "rules_told": [str(problem)]}
            continue
        details |= {"rules": values(told, str), "rules_told": list(lines(told, str, "> "))}
