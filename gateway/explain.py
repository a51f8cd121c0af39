"""What would happen to a request, and why, step by step: the gateway's own `route`, driver and `settle`, told as they go.

Nothing is spent: tokens are looked at (`Lessee.peek`) and nothing is forwarded. Decisions are really asked, since only the policy can say.
"""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any, Final

import msgspec

from gateway.driver import Driver, never
from gateway.place import Place, Served
from gateway.plan import Answer, L4Permit, Pending, Permit, Plan, Reply, Settled
from gateway.redirect import with_query
from gateway.route import route
from identity.authenticator import KeysWanted
from mesh.http import RequestHead
from mesh.model import Cluster, Endpoint
from mesh.outcome import Outcome
from mesh.peer import Peer
from mesh.policy import Path
from mesh.questions import Decider, Decision, DecisionQuestion, Grant, Lessee, TokenQuestion
from mesh.quota_changes import shown_key
from mesh.refusals import InvalidToken, Refusal
from mesh.tokens import NOT_AUTHENTICATED

HIDDEN: Final = b"(token)"
_JWT: Final = re.compile(rb"\beyJ[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]*")
CONSIDERED: Final = 50
"""Rules that did not match and are named."""


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """One step of a request's way."""

    name: str
    """`listener`, `path`, `caller`, `host`, `route`, `decision`, `quota`, `backend`, `upstream`, `mirror`, `result`, `refused`."""
    text: str
    """One line for people."""
    details: dict[str, Any] = {}
    """The same and more, as plain JSON types."""


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    """What would happen to a request."""

    result: str
    """`forward`, `answer` or `refuse`."""
    status: int
    """That the client would get from the gateway; 0 when the upstream would say."""
    flag: str
    """Response flag; `-` for none."""
    reason: str
    steps: tuple[Step, ...]


Endpoints = Callable[[Cluster], Iterable[tuple[Endpoint, str]]]
"""The endpoints of a cluster in the order in which they would be tried, each with how it is doing (`healthy`, `ejected`, ...)."""


class Peeking:
    """A `Lessee` that looks and takes nothing."""

    __slots__ = ("_lessee",)

    def __init__(self, lessee: Lessee) -> None:
        self._lessee = lessee

    def take(self, _question: TokenQuestion, _now: float) -> Grant | None:
        """Nothing is ever in hand."""
        return None

    def ask(self, question: TokenQuestion, done: Callable[[Grant], None]) -> None:
        """Looks."""
        self._lessee.peek(question, done)

    def give_back(self, _question: TokenQuestion) -> None:
        """Nothing was taken."""

    def charge(self, _question: TokenQuestion, _tokens: int) -> None:
        """Nothing was answered."""

    def peek(self, question: TokenQuestion, done: Callable[[Grant], None]) -> None:
        """Looks."""
        self._lessee.peek(question, done)


async def explain(
    head: RequestHead,
    peer: Peer,
    place: Place,
    received: float,
    rng: random.Random,
    decider: Decider,
    lessee: Lessee,
    *,
    clock: Callable[[], float],
    stale: Callable[[], bool] = never,
    endpoints: Endpoints | None = None,
    body: bytes | None = None,
) -> Explanation:
    """What would happen to a request with `head` (and `body`) that `peer` sends to `place`.

    `received`: wall clock in seconds; `clock`: monotonic seconds. `stale` as in `gateway.driver.Driver`. `endpoints` tells the balancer's
    choice; without it the cluster's own list is shown.
    """
    steps = [listener_step(place, peer)]
    hidden = _tokens(head, place)
    routed = route(head, peer, place, received, rng)
    if isinstance(routed, KeysWanted):
        await keys_there(routed)
        routed = route(head, peer, place, received, rng, waited=True)
    if head.path:
        sent, query = without(head.target, hidden), None if head.query is None else without(head.query, hidden)
        text = f"{_text(sent)} is read as {_text(with_query(head.path, query))}"
        steps.append(Step(name="path", text=text, details={"sent": _text(sent), "path": _text(head.path), "query": _text(query)}))
    if isinstance(routed, Refusal):
        if isinstance(routed, InvalidToken):
            return refused(routed, [*steps, _token_step(head, hidden)])
        steps += _unrouted(head, place)
        return refused(routed, steps)
    assert not isinstance(routed, KeysWanted), "it has been waited for"
    steps.append(caller_step(routed))
    if place.gateway.authentication != NOT_AUTHENTICATED or head.reserved:
        steps.append(_token_step(head, hidden))
    steps += _route(routed, place)
    steps += exempt_steps(routed)
    settled, outcome = await settled_of(routed, peer, place, decider, lessee, clock, stale, body)
    answered = dict(by_identity(outcome.decisions))
    for question in routed.decisions:
        steps.append(decision_step(question, answered.get(id(question))))
    granted = dict(by_identity(outcome.grants))
    for asked in routed.tokens:
        steps.append(quota_step(asked, granted.get(id(asked))))
    if isinstance(settled, Refusal):
        return refused(settled, steps)
    assert not isinstance(settled, L4Permit), "requests are not connections"
    if isinstance(settled, Reply):
        return _answered(settled.answer, steps)
    steps += _upstream(settled, endpoints, hidden)
    return Explanation(result="forward", status=0, flag="-", reason="", steps=tuple(steps))


async def settled_of(
    routed: Pending,
    peer: Peer,
    place: Place,
    decider: Decider,
    lessee: Lessee,
    clock: Callable[[], float],
    stale: Callable[[], bool],
    body: bytes | None,
) -> tuple[Settled, Outcome]:
    """What the driver makes of `routed`, without spending anything, and what it wrote down."""
    asking = routed.asking
    if routed.body_limit:
        sent = body or b""
        asking.body = sent[: routed.body_limit]
        asking.body_complete = len(sent) <= routed.body_limit
    outcome = Outcome(asking.head, peer, asking.gateway, place.listener.name, asking.received)
    future: asyncio.Future[Settled] = asyncio.get_running_loop().create_future()
    settled = Driver(decider, Peeking(lessee), clock, stale).drive(routed, outcome, future.set_result)
    if isinstance(settled, (Permit, Reply, L4Permit, Refusal)):
        return settled, outcome
    try:
        return await future, outcome
    finally:
        settled.cancel()


def by_identity(pairs: Iterable[tuple[Any, Any]]) -> Iterable[tuple[int, Any]]:
    """Answers by their questions."""
    return ((id(question), answer) for question, answer in pairs)


def listener_step(place: Place, peer: Peer) -> Step:
    """Where it comes in."""
    listener = place.listener
    tls = peer.tls_version or ("TLS is passed through" if listener.passthrough else "plaintext")
    name = f"{place.gateway.key}, listener {listener.name}"
    return Step(
        name="listener",
        text=f"{name}: port {listener.port}, {listener.protocol}, hostname {listener.hostname}, {tls}",
        details={
            "gateway": place.gateway.key,
            "listener": listener.name,
            "port": listener.port,
            "protocol": listener.protocol,
            "hostname": listener.hostname,
            "snapshot": place.snapshot.version,
            "sni": peer.sni,
        },
    )


def caller_step(routed: Pending) -> Step:
    """Whom it is decided for."""
    caller = routed.asking.caller
    who = caller.principal or "nobody who proved an identity"
    return Step(
        name="caller",
        text=f"{who}, passed on by {caller.via}" if caller.via else who,
        details={"principal": caller.principal, "via": caller.via},
    )


def _unrouted(head: RequestHead, place: Place) -> list[Step]:
    """How far a request got that no rule took."""
    if not head.path:
        return []
    served = place.table.served(head.authority)
    if not isinstance(served, Served):
        return []
    return [_host(served), _considered(served, head, "no rule matches")]


def _route(routed: Pending, place: Place) -> list[Step]:
    served = place.table.served(routed.asking.head.authority)
    rule = routed.rule
    text = f"{rule.name} by {routed.asking.template}" + (f" ({rule.origin})" if rule.origin else "")
    steps = [_host(served), _considered(served, routed.asking.head, text)] if isinstance(served, Served) else []
    if not isinstance(routed.plan, Answer):
        service = routed.asking.service or "none that is there"
        weights = [{"service": backend.service, "cluster": backend.cluster, "weight": backend.weight} for backend in rule.backends]
        steps.append(Step(name="backend", text=f"{service}, one of {len(weights)}", details={"service": service, "backends": weights}))
    return steps


def _host(served: Served) -> Step:
    name = served.table.host.hostname
    return Step(
        name="host", text=f"{name} on the listener {served.listener.name}", details={"host": name, "listener": served.listener.name}
    )


def _considered(served: Served, head: RequestHead, text: str) -> Step:
    ways: list[dict[str, str]] = []
    for way, reason in islice(served.table.considered(head), CONSIDERED):
        match = way.match
        ways.append(
            {"rule": match.rule.name, "kind": match.path_kind, "path": match.template, "why_not": reason, "origin": match.rule.origin}
        )
    return Step(name="route", text=text, details={"considered": ways})


def exempt_steps(pending: Pending) -> list[Step]:
    """The policies that are not asked."""
    return [
        Step(
            name="exempt",
            text=f"{each.policy} is not asked: its owner lets the route out, as PolicyExemption {each.by} asks for",
            details={"policy": each.policy, "by": each.by},
        )
        for each in pending.rule.exempt
    ]


def decision_step(question: DecisionQuestion, decision: Decision | None) -> Step:
    """What a policy says, and what that depends on."""
    policy, revision = question.policy, question.revision
    entry = revision.entry_points.get(policy.decision) if revision is not None else None
    what = policy.decision or policy.provider
    mode = " (shadow)" if policy.shadow else ""
    details: dict[str, Any] = {
        "policy": policy.name,
        "level": policy.level,
        "decision": policy.decision,
        "provider": policy.provider,
        "asked_revision": revision.digest if revision is not None else "",
        "shadow": policy.shadow,
        "failure_mode": policy.failure_mode,
    }
    if entry is not None:
        details["depends_on"] = [_path(path) for path in entry.reads.values]
        details["depends_on_whether_defined"] = [_path(path) for path in entry.reads.defined]
        details["depends_on_length"] = [_path(path) for path in entry.reads.lengths]
        details["depends_on_type"] = [_path(path) for path in entry.reads.kinds]
        details["volatile"] = list(entry.reads.volatile)
        details["keepable"] = entry.keepable
    if decision is None:
        return Step(name="decision", text=f"{policy.name}, {what}{mode}: not asked", details=details)
    details |= {
        "verdict": decision.verdict.value,
        "reason": decision.reason,
        "rule": decision.rule,
        "revision": decision.revision,
        "kept": decision.kept,
        "status": decision.status,
    }
    because = decision.rule or decision.reason
    text = (
        f"{policy.name}, {what}{mode}: {decision.verdict.value}" + (f", {because}" if because else "") + (", kept" if decision.kept else "")
    )
    return Step(name="decision", text=text, details=details)


def _path(path: Path) -> str:
    return "input" + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)


def quota_step(question: TokenQuestion, grant: Grant | None) -> Step:
    """What is left of a bucket."""
    limit = question.limit
    key = "/".join(shown_key(limit, question.key)) or "all"
    details: dict[str, Any] = {
        "limit": limit.name,
        "level": limit.level,
        "per": [f"{part.kind} {part.argument}".strip() for part in limit.per],
        "key": list(shown_key(limit, question.key)),
        "shadow": limit.shadow,
    }
    if limit.concurrency:
        details["concurrency"] = limit.concurrency
    else:
        details |= {"cost": question.cost, "rate": limit.rate, "burst": limit.burst}
    mode = " (shadow)" if limit.shadow else ""
    if grant is None:
        return Step(name="quota", text=f"{limit.name} for {key}{mode}: not asked", details=details)
    details |= {
        "admitted": grant.admitted,
        "remaining": grant.remaining,
        "reset": grant.reset,
        "retry_after": grant.retry_after,
        "error": grant.error,
    }
    whole = f"{limit.concurrency} slots" if limit.concurrency else f"{limit.burst}"
    text = f"{limit.name} for {key}{mode}: " + (f"{grant.remaining} of {whole} left" if grant.admitted else "none left")
    return Step(name="quota", text=f"{text}, {grant.error}" if grant.error else text, details=details)


def _tokens(head: RequestHead, place: Place) -> list[bytes]:
    """The tokens of a request, which nobody is to read in what is told of it; also as they are written in the query."""
    authentication = place.table.authentication
    found = list(authentication.tokens(head)) if authentication is not None else []
    # Whatever looks like one, too: an AccessPolicy or a Service may look elsewhere.
    found += [match.group() for _, value in head.headers for match in _JWT.finditer(value)]
    found += [match.group() for match in _JWT.finditer(head.target)]
    return sorted({token for token in found if token}, key=len, reverse=True)


async def keys_there(wanted: KeysWanted) -> None:
    """Waits until keys have been fetched, or can't be."""
    done = asyncio.Event()
    forget = wanted.keys.wait(done.set)
    try:
        await done.wait()
    finally:
        forget()


def _token_step(head: RequestHead, tokens: list[bytes]) -> Step:
    """Who bears the request's token. What is in the token is told, as a policy sees it; the token is not."""
    bearer = head.bearer
    if bearer is None:
        return Step(name="token", text="not believed" if tokens else "none: nobody's name is borne", details={"principal": ""})
    said = [name.decode() for name, _ in bearer.headers]
    text = f"{bearer.principal or 'no subject'}, by {bearer.rule.name}" + (f"; the service is told by {', '.join(said)}" if said else "")
    return Step(
        name="token",
        text=text,
        details={
            "principal": bearer.principal,
            "rule": bearer.rule.name,
            "issuer": bearer.rule.issuer,
            "claims": bearer.claims,
            "headers": said,
            "forwarded": bearer.rule.forward,
        },
    )


def _upstream(permit: Permit, endpoints: Endpoints | None, hidden: list[bytes]) -> list[Step]:
    plan: Plan = permit.plan
    cluster = plan.cluster
    listed = endpoints(cluster) if endpoints is not None else [(endpoint, "") for endpoint in cluster.endpoints]
    shown = [
        {"address": found.address, "port": found.port, "name": found.name, "identities": list(found.identities), "state": state}
        for found, state in listed
    ]
    if shown:
        first = f"{shown[0]['address']}:{shown[0]['port']}, first of {len(shown)} by {cluster.balancer}"
    else:
        first = "no endpoints: the client would get 503 UH"
    target = without(plan.target, hidden)
    request = f"{_text(plan.method)} {_text(plan.authority)} {_text(target)}"
    details: dict[str, Any] = {
        "cluster": cluster.name,
        "balancer": cluster.balancer,
        "tls": cluster.tls.mode if cluster.tls is not None else "",
        "external": cluster.external,
        "endpoints": shown,
        "method": _text(plan.method),
        "authority": _text(plan.authority),
        "target": _text(target),
        "headers": [[_text(name), _text(without(value, hidden))] for name, value in permit.headers],
        "response_headers": [[_text(name), _text(value)] for name, value in permit.response_headers],
        "timeout": plan.timeout,
    }
    if plan.stay is not None:
        kept = plan.stay.place
        details["session"] = "" if kept is None else f"{kept[0]}:{kept[1]}"
        first = "for a new session, " + first if kept is None else f"{kept[0]}:{kept[1]}, kept by the client's session"
    steps = [Step(name="upstream", text=f"{cluster.name}, {first}: {request}", details=details)]
    for copy in permit.mirrors:
        copied = [[_text(name), _text(without(value, hidden))] for name, value in copy.headers]
        text = f"a copy goes to {copy.plan.cluster.name}; nobody waits for its answer"
        steps.append(Step(name="mirror", text=text, details={"cluster": copy.plan.cluster.name, "headers": copied}))
    return steps


def _answered(answer: Answer, steps: list[Step]) -> Explanation:
    where = dict(answer.headers).get(b"location", b"").decode("latin-1")
    where = where and f", to {where}"
    if answer.details == "cors_preflight":
        where = ", the answer to a preflight; no policy or quota is asked about it"
    details = {"status": answer.status, "headers": [[_text(name), _text(value)] for name, value in answer.headers]}
    steps.append(Step(name="result", text=f"{answer.status}{where}", details=details))
    return Explanation(result="answer", status=answer.status, flag="-", reason=answer.details, steps=tuple(steps))


def refused(refusal: Refusal, steps: list[Step]) -> Explanation:
    """The end of what would be refused."""
    status = refusal.answer_status
    reason = refusal.reason or refusal.sentence
    details = {"status": status, "flag": refusal.flag, "details": refusal.details, "reason": refusal.reason, "sentence": refusal.sentence}
    steps.append(Step(name="refused", text=f"{status} {refusal.flag}: {reason}", details=details))
    return Explanation(result="refuse", status=status, flag=refusal.flag, reason=reason, steps=tuple(steps))


def without(value: bytes, hidden: list[bytes]) -> bytes:
    """`value` without what is not to be read."""
    for token in hidden:
        value = value.replace(token, HIDDEN)
    return value


def _text(data: bytes | None) -> str:
    return "" if data is None else data.decode("latin-1")
