"""Where a connection below HTTP goes: the rule for the name that was asked for, one of its weighted backends, and what to ask first.

Pure, as `gateway.route` is for requests; what comes out goes the same way, through the driver and `settle`. A connection is one question
to each policy, and one request's worth of tokens. The caller is the peer alone: in bytes that are not looked at, nobody can vouch for
another one.
"""

from __future__ import annotations

import random

from gateway.buckets import questions
from gateway.caller import caller_of
from gateway.choice import Chooser
from gateway.match import ByHost
from gateway.place import Place
from gateway.plan import L4Plan, Pending
from mesh.http import NO_HEAD
from mesh.peer import Peer
from mesh.questions import Asking, DecisionQuestion
from mesh.refusals import BrokenBackend, NoRoute, Refusal


class L4Table:
    """A listener's rules, prepared for look-up. Made for a snapshot and a listener; its owner is the `gateway.serving.Serving`."""

    __slots__ = ("_rules", "place")

    def __init__(self, place: Place) -> None:
        self.place = place
        snapshot = place.snapshot
        self._rules: ByHost[Chooser] = ByHost({pattern: Chooser(rule, snapshot) for pattern, rule in place.listener.rules.items()})

    def route(self, peer: Peer, received: float, rng: random.Random) -> Refusal | Pending:
        """What is to be done with a connection of `peer`, whose `sni` is the name that it asked for. `received`: wall clock, seconds."""
        place = self.place
        listener = place.listener
        chooser = self._rules.find(peer.sni.encode("latin-1", "replace"))
        if chooser is None:
            asked = f"the name {peer.sni[:256]}" if peer.sni else "a client that asks for no name" if listener.encrypted else "it"
            return NoRoute(reason=f"no route of the listener {listener.name} is for {asked}")
        caller = caller_of(peer, [], place.snapshot.mesh)
        if isinstance(caller, Refusal):
            return caller
        choice = chooser.choose(rng)
        rule, backend = chooser.rule, choice.backend
        asking = Asking(NO_HEAD, peer, caller, place.gateway.key, listener.name, rule.name, "", choice.service, received)
        plan: L4Plan | BrokenBackend
        if choice.broken is not None or backend is None:
            plan = choice.broken or BrokenBackend(reason=f"{rule.name} has no backends")
        elif choice.cluster.within_tls and listener.encrypted and not listener.passthrough:
            plan = BrokenBackend(reason=f"{choice.cluster.name} is for TLS, which ends here, and nothing says whom to trust there")
        else:
            plan = L4Plan(asking=asking, rule=rule, backend=backend, cluster=choice.cluster, passthrough=listener.passthrough)
        return Pending(
            plan=plan,
            asking=asking,
            rule=rule,
            decisions=tuple([DecisionQuestion(policy, asking, revision) for policy, revision in choice.asked])
            if choice.trial is None
            else choice.trial.questions(asking, rng),
            tokens=questions(choice.buckets, asking, peer.address),
        )
