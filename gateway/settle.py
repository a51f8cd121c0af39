"""From answers to a permit. Pure, and the only maker of a `Permit`: what is not provably allowed is refused.

The order is written here once: decisions as they were asked (mesh, gateway, listener, route, rule, service), the first that is not *allow*
decides; then tokens; then the plan. Questions in shadow mode are recorded by the driver and change nothing here.

A decision's changes apply to the upstream's request, and to its answer, in the order of the decisions (`gateway.changed`). What belongs to
the connection, the framing or the proof of who calls is not theirs to write (`gateway.headers`) and is left as it is; a field that could
not be written safely (CR, LF or NUL in it, or no name) is a fault of the policy: `PolicyError`.
"""

from __future__ import annotations

from typing import Final

import msgspec

from gateway.changed import FieldChanges, changed_request, changed_target, changes
from gateway.headers import FRAMING, is_field
from gateway.plan import Answer, Answers, Edit, L4Permit, L4Plan, Pending, Permit, Plan, Reply, Settled
from gateway.quota_refusal import over_quota
from mesh.http import Header
from mesh.questions import Decision, DecisionQuestion, Grant, TokenQuestion, Verdict
from mesh.refusals import Denied, PolicyError, PolicyStale, QuotaError, Refusal
from quota.headers import rate_limit_headers

STALE: Final = Decision(verdict=Verdict.ERROR, reason="the policy in force is older than Mesh.policy.maxStaleness allows")
"""Stands for the answer of our own PDP once its policy is too old to be asked."""
UNANSWERED: Final = Decision(verdict=Verdict.ERROR, reason="the answer had not come when the request went on")
"""Stands for the answer to a shadow question, for which nobody waits."""


def settle(pending: Pending, answers: Answers) -> Settled:
    """The end of the questions: what the request may do, or why it may not.

    `answers` may stop at an answer that refuses; an answer that is missing otherwise refuses the request, too.
    """
    questions, decisions = pending.decisions, answers.decisions
    changed: list[Decision] | None = None
    for at, question in enumerate(questions) if questions else ():
        if at >= len(decisions):
            return PolicyError(reason=f"the policy {question.policy.name} was not asked")
        decision = decisions[at]
        refusal = objection(question, decision)
        if refusal is not None:
            return refusal
        if decision.verdict is Verdict.ALLOW and changes(decision) and not question.policy.shadow:
            changed = [decision] if changed is None else [*changed, decision]
    tokens, grants = pending.tokens, answers.grants
    for at, asked in enumerate(tokens) if tokens else ():
        if at >= len(grants):
            return QuotaError(reason=f"the limit {asked.limit.name} was not asked", limit=asked.limit.name)
        grant = grants[at]
        if refuses(asked, grant):
            return over_quota(pending, asked, grant, tuple(zip(tokens[: at + 1], grants, strict=False)))
    plan = pending.plan
    extra: tuple[Header, ...] = rate_limit_headers(tuple(zip(tokens, grants, strict=False))) if tokens else ()
    metered = _metered(tokens, grants) if tokens else ()
    if changed is not None:
        extra = (*(field for decision in changed for field in decision.response_headers if field[0].lower() not in FRAMING), *extra)
    if type(plan) is Plan:
        if changed is not None:
            edits = tuple([FieldChanges(decision.response_changes) for decision in changed if decision.response_changes])
            return _changed(plan, changed, edits, extra, metered)
        mirrors = tuple([inquiry(copy) for copy in plan.mirrors]) if plan.mirrors else ()
        return Permit(plan=plan, headers=plan.headers, response_headers=extra, mirrors=mirrors, metered=metered)
    if type(plan) is Answer:
        for decision in changed or ():
            if decision.response_changes:
                edited = FieldChanges(decision.response_changes).apply(list(plan.headers))
                plan = msgspec.structs.replace(plan, headers=tuple(edited))
        return Reply(answer=plan, response_headers=extra)
    return L4Permit(plan=plan) if type(plan) is L4Plan else plan


def inquiry(plan: Plan) -> Permit:
    """For a request of the gateway's own, by which an authorization service is asked whether a client's may pass (`gateway.external_auth`).
    It comes before any answer; what it may carry is its filter's to say, and where it goes was resolved and granted with the route."""
    return Permit(plan=plan, headers=plan.headers)


def _metered(tokens: tuple[TokenQuestion, ...], grants: tuple[Grant, ...]) -> tuple[TokenQuestion, ...]:
    """The questions whose buckets are charged after the answer: not those that nobody could be asked about."""
    return tuple(
        [
            asked
            for asked, grant in zip(tokens, grants, strict=False)
            if asked.limit.usage is not None and grant.admitted and not grant.error
        ]
    )


def _changed(
    plan: Plan,
    changed: list[Decision],
    edits: tuple[Edit, ...],
    extra: tuple[Header, ...],
    metered: tuple[TokenQuestion, ...] = (),
) -> Permit:
    """The permit of a request with what the decisions change; what permits it permits its copies, with the same changes."""
    target = changed_target(plan.target, changed) if plan.method != b"CONNECT" else plan.target
    if edits or target != plan.target:
        # The route's own edits come first, as they do in Envoy's order of filters.
        plan = msgspec.structs.replace(plan, target=target, edits=(*plan.edits, *edits))
    copies = tuple([_changed(copy, changed, (), ()) for copy in plan.mirrors])
    return Permit(plan=plan, headers=changed_request(plan.headers, changed), response_headers=extra, mirrors=copies, metered=metered)


def objection(question: DecisionQuestion, decision: Decision) -> Refusal | None:
    """Why the decision ends the request, or None when it does not."""
    policy, verdict = question.policy, decision.verdict
    if policy.shadow:
        return None
    if verdict is Verdict.ALLOW:
        return _unwritable(question, decision) if changes(decision) else None
    if verdict is Verdict.DENY:
        if decision.headers and (refusal := _unwritable(question, decision)) is not None:
            return refusal
        return Denied(
            code=decision.status if 200 <= decision.status <= 599 else 0,
            reason=decision.reason or f"denied by {policy.name}",
            told=decision.reason if policy.show_reason else "",
            headers=tuple([(name.lower(), value) for name, value in decision.headers if name.lower() not in FRAMING]),
            body=decision.body or None,
        )
    if policy.failure_mode == "Allow":
        return None
    if decision is STALE:
        return PolicyStale(reason=f"{policy.name}: {decision.reason}")
    if decision.headers and (refusal := _unwritable(question, decision)) is not None:
        return refusal
    return PolicyError(
        code=decision.status if 400 <= decision.status <= 599 else 0,
        reason=f"{policy.name}: {decision.reason or 'no answer'}",
        headers=tuple([(name.lower(), value) for name, value in decision.headers if name.lower() not in FRAMING]),
        body=decision.body or None,
    )


def refuses(question: TokenQuestion, grant: Grant) -> bool:
    """Whether the grant ends the request. What an error means, whoever asked the store has decided: `admitted` follows the failure mode."""
    return not grant.admitted and not question.limit.shadow


def _unwritable(question: DecisionQuestion, decision: Decision) -> PolicyError | None:
    fields = [*decision.headers, *decision.response_headers]
    fields += [(change.name, change.value) for change in (*decision.changes, *decision.response_changes)]
    for name, value in fields:
        if not is_field(name.lower(), value):
            return PolicyError(reason=f"{question.policy.name} answered with a header that can't be written: {name[:64]!r}")
    return None
