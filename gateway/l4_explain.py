"""What would happen to a connection or a flow below HTTP, and why, as `gateway.explain` tells it of requests. Nothing is spent."""

from __future__ import annotations

import random
from collections.abc import Callable

from gateway.driver import never
from gateway.explain import Explanation, Step, by_identity, caller_step, decision_step, exempt_steps, listener_step, quota_step, settled_of
from gateway.l4_route import L4Table
from gateway.place import Place
from gateway.plan import L4Permit
from mesh.peer import Peer
from mesh.questions import Decider, Lessee
from mesh.refusals import Refusal


async def explain_connection(
    peer: Peer,
    place: Place,
    received: float,
    rng: random.Random,
    decider: Decider,
    lessee: Lessee,
    *,
    clock: Callable[[], float],
    stale: Callable[[], bool] = never,
) -> Explanation:
    """What a connection of `peer`, which asks for the name `peer.sni`, would come to at `place`. The parameters are those of
    `gateway.explain.explain`."""
    steps = [listener_step(place, peer)]
    routed = L4Table(place).route(peer, received, rng)
    if isinstance(routed, Refusal):
        names = sorted(place.listener.rules)
        steps.append(Step(name="route", text=f"none; the listener has {', '.join(names) or 'no routes'}", details={"names": names}))
        return _refused(routed, steps)
    rule = routed.rule
    steps.append(caller_step(routed))
    names = [name for name, own in place.listener.rules.items() if own is rule]
    origin = f" ({rule.origin})" if rule.origin else ""
    steps.append(Step(name="route", text=f"{rule.name} by {', '.join(names)}{origin}", details={"rule": rule.name, "names": names}))
    service = routed.asking.service or "none that is there"
    weights = [{"service": backend.service, "cluster": backend.cluster, "weight": backend.weight} for backend in rule.backends]
    steps.append(Step(name="backend", text=f"{service}, one of {len(weights)}", details={"service": service, "backends": weights}))
    settled, outcome = await settled_of(routed, peer, place, decider, lessee, clock, stale, None)
    answered = dict(by_identity(outcome.decisions))
    steps += exempt_steps(routed)
    steps += [decision_step(question, answered.get(id(question))) for question in routed.decisions]
    granted = dict(by_identity(outcome.grants))
    steps += [quota_step(asked, granted.get(id(asked))) for asked in routed.tokens]
    if isinstance(settled, Refusal):
        return _refused(settled, steps)
    assert isinstance(settled, L4Permit), "connections are not requests"
    steps.append(_upstream(settled))
    return Explanation(result="forward", status=0, flag="-", reason="", steps=tuple(steps))


def _upstream(permit: L4Permit) -> Step:
    plan, cluster = permit.plan, permit.plan.cluster
    shown = [
        {"address": endpoint.address, "port": endpoint.port, "name": endpoint.name, "identities": list(endpoint.identities)}
        for endpoint in cluster.endpoints
    ]
    first = f"{shown[0]['address']}:{shown[0]['port']}, first of {len(shown)} by {cluster.balancer}" if shown else "no endpoints: UH"
    how = "the client's own TLS, untouched" if plan.passthrough else f"TLS ({cluster.tls.mode})" if cluster.tls is not None else "as it is"
    details = {
        "cluster": cluster.name,
        "balancer": cluster.balancer,
        "passthrough": plan.passthrough,
        "tls": "" if plan.passthrough or cluster.tls is None else cluster.tls.mode,
        "proxy_protocol": cluster.proxy_protocol,
        "endpoints": shown,
    }
    return Step(name="upstream", text=f"{cluster.name}, {first}: {how}", details=details)


def _refused(refusal: Refusal, steps: list[Step]) -> Explanation:
    reason = refusal.reason or refusal.sentence
    details = {"flag": refusal.flag, "details": refusal.details, "reason": refusal.reason}
    steps.append(Step(name="refused", text=f"{refusal.flag}: {reason}", details=details))
    return Explanation(result="refuse", status=0, flag=refusal.flag, reason=reason, steps=tuple(steps))
