"""A connection or a flow below HTTP that has gone on for long is asked about again, as `gateway.recheck` does it for requests.

Asked is what would be asked of it if it began now: of the newest configuration, in the revision in force. No tokens are taken. What does
not allow it ends it, with the flag that it would have had at its beginning; so does a client certificate that has ended meanwhile, and,
where a policy had allowed it, that there is no route any more.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec

from gateway.driver import Waiting
from gateway.l4_route import L4Table
from gateway.plan import Pending, Settled
from gateway.shared import Shared
from mesh.http import NO_HEAD
from mesh.outcome import Outcome
from mesh.peer import Peer
from mesh.refusals import Refusal, UnidentifiedPeer

DRAWS = 64
"""A rule with several backends is drawn from until it gives the service that is spoken to, so often at most."""


def ask_again(shared: Shared, table: L4Table, peer: Peer, pending: Pending, outcome: Outcome, ends: Callable[[Refusal], None]) -> None:
    """Asks about what was `pending` once; `ends` is called, now or later, when it may not go on, and must bear that it has ended meanwhile.

    `outcome` gets the decisions that end it.
    """
    now = time.time()
    if 0.0 < peer.not_after < now:
        ends(UnidentifiedPeer(reason="the client's certificate has ended"))
        return
    routed = table.route(peer, now, shared.rng)
    for _ in range(DRAWS):
        if isinstance(routed, Refusal) or routed.asking.service == pending.asking.service:
            break
        routed = table.route(peer, now, shared.rng)
    if isinstance(routed, Refusal):
        if pending.decisions:
            ends(routed)
        return
    if not routed.decisions:
        return
    scratch = Outcome(NO_HEAD, peer, shared.key, outcome.listener, now)

    def done(settled: Settled) -> None:
        # Whether its backend is there is not asked: the connection has one.
        if isinstance(settled, Refusal) and settled is not routed.plan:
            outcome.decisions += scratch.decisions
            ends(settled)

    settled = shared.driver.drive(msgspec.structs.replace(routed, tokens=()), scratch, done)
    if not isinstance(settled, Waiting):
        done(settled)
