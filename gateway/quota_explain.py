"""Which limits a request meets, and what is left for it: the gateway's own `route`, and a look at each bucket. No policy is asked."""

from __future__ import annotations

import asyncio
import random

import msgspec

from gateway.buckets import Bucket
from gateway.choice import counted
from gateway.explain import Explanation, Step, caller_step, keys_there, listener_step, quota_step, refused
from gateway.place import Place
from gateway.plan import Pending, Plan
from gateway.quota_refusal import over_quota
from gateway.route import route
from gateway.settle import refuses
from identity.authenticator import KeysWanted
from mesh.http import RequestHead
from mesh.model import QuotaLimit
from mesh.peer import Peer
from mesh.questions import Grant, Lessee, TokenQuestion
from mesh.quota_changes import instant_text, shown_key
from mesh.refusals import Refusal
from quota.changes import Numbers


async def explain_quota(head: RequestHead, peer: Peer, place: Place, received: float, rng: random.Random, lessee: Lessee) -> Explanation:
    """What the limits make of a request with `head` that `peer` sends to `place`, at `received` (wall clock, seconds). Nothing is spent.

    All limits are looked at, also those behind one that refuses; in shadow mode one refuses nothing.
    """
    steps = [listener_step(place, peer)]
    routed = route(head, peer, place, received, rng)
    if isinstance(routed, KeysWanted):
        await keys_there(routed)
        routed = route(head, peer, place, received, rng, waited=True)
    if isinstance(routed, Refusal):
        return refused(routed, steps)
    assert not isinstance(routed, KeysWanted), "it has been waited for"
    steps += [caller_step(routed), Step(name="route", text=f"{routed.rule.name} by {routed.asking.template}")]
    pairs: list[tuple[TokenQuestion, Grant]] = []
    culprit: Refusal | None = None
    questions = {asked.limit.name: asked for asked in routed.tokens}
    for limit in _limits(routed):
        question = questions.get(limit.name)
        if question is None:
            steps.append(_not_asked(limit, routed, place))
            continue
        grant = await _peeked(lessee, question)
        pairs.append((question, grant))
        steps.append(_with_change(quota_step(question, grant), limit, question, received))
        if culprit is None and refuses(question, grant):
            culprit = over_quota(routed, question, grant, tuple(pairs))
    if not pairs and len(steps) == 3:
        steps.append(Step(name="quota", text="no limit is in force there"))
    if culprit is not None:
        return refused(culprit, steps)
    steps.append(Step(name="result", text="no limit refuses it; what policies say is told by tollhouse explain"))
    return Explanation(result="forward", status=0, flag="-", reason="", steps=tuple(steps))


def _limits(routed: Pending) -> tuple[QuotaLimit, ...]:
    plan = routed.plan
    if type(plan) is Plan:
        return counted(routed.rule.limits + plan.backend.limits, plan.cluster)
    return tuple({limit.name: limit for limit in routed.rule.limits}.values())


async def _peeked(lessee: Lessee, question: TokenQuestion) -> Grant:
    answer: asyncio.Future[Grant] = asyncio.get_running_loop().create_future()
    lessee.peek(question, answer.set_result)
    return await answer


def _not_asked(limit: QuotaLimit, routed: Pending, place: Place) -> Step:
    """A limit that says nothing about the request: it was lifted by hand, or its author lets the request out."""
    asking = routed.asking
    found = Bucket(msgspec.structs.replace(limit, changes=()), place.snapshot.mesh).question(asking, asking.client or asking.peer.address)
    details = {"limit": limit.name, "level": limit.level}
    if found is None:
        return Step(name="quota", text=f"{limit.name}: not asked, the request is exempt", details={**details, "exempt": True})
    change = Numbers(limit).change(found.key, asking.received)
    until = f" until {instant_text(change.until)}" if change is not None and change.until else ""
    key = list(shown_key(limit, found.key))
    text = f"{limit.name} for {'/'.join(key) or 'all'}: not asked, lifted by hand{until}"
    return Step(name="quota", text=text, details={**details, "key": key, "lifted": True})


def _with_change(step: Step, limit: QuotaLimit, question: TokenQuestion, now: float) -> Step:
    """A limit's step, with what was changed of it by hand."""
    numbers = question.limit
    policy = limit.name.rpartition("/")[0]
    size = (
        f"{numbers.concurrency} at once" if numbers.concurrency else f"{numbers.tokens} each {numbers.interval:g} s, burst {numbers.burst}"
    )
    told = f"{step.text}; {size}" + ("" if numbers.concurrency else f", cost {question.cost}")
    told += f"; QuotaPolicy {policy} at the level {limit.level}"
    change = Numbers(limit).change(question.key, now) if limit.changes else None
    details = {**step.details, "policy": policy, "tokens": numbers.tokens, "interval": numbers.interval, "changed": change is not None}
    if change is not None:
        until = f" until {instant_text(change.until)}" if change.until else ""
        told += f"; changed by hand{until}"
        details["until"] = instant_text(change.until) if change.until else None
    return msgspec.structs.replace(step, text=told, details=details)
