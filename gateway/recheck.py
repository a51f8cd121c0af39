"""A stream that has gone on for long is asked about again: what was allowed once is not allowed for ever.

Asked is what would be asked of the same request now: by the policies of the newest configuration, in the revision in force, of the same
caller. No tokens are taken, for the request has paid. What does not allow it cuts the stream off, with the flag that it would have had at
its beginning: a denial, an error where the failure mode is Deny, a client certificate that has ended meanwhile; and, for a request that a
policy had allowed, that there is no route any more.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import msgspec

from gateway.driver import Waiting
from gateway.phases import OVER
from gateway.plan import Pending, Settled
from identity.authenticator import KeysWanted
from mesh.outcome import Outcome
from mesh.refusals import Refusal, UnidentifiedPeer

if TYPE_CHECKING:
    from gateway.ending import Ending

DRAWS = 64
"""A rule with several backends is drawn from until it gives the service that the stream goes to, so often at most."""


def ask_again(stream: Ending, pending: Pending) -> None:
    """Asks about `stream`, whose request was `pending`, and refuses it if need be: now or when the answers are here."""
    connection, shared = stream.connection, stream.connection.shared
    peer, before = connection.peer, pending.asking
    now = time.time()
    if 0.0 < peer.not_after < now:
        stream.refuse_request(UnidentifiedPeer(reason="the client's certificate has ended"))
        return
    routed = shared.route(before.head, peer, connection.serving.place, now, shared.rng)
    for _ in range(DRAWS):
        if not isinstance(routed, Pending) or routed.asking.service == before.service:
            break
        routed = shared.route(before.head, peer, connection.serving.place, now, shared.rng)
    if isinstance(routed, KeysWanted):
        return  # the keys are on their way, and the stream is looked at again
    if isinstance(routed, Refusal):
        if pending.decisions:
            stream.refuse_request(routed)
        return
    if not routed.decisions:
        return
    routed.asking.body, routed.asking.body_complete = before.body, before.body_complete
    scratch = Outcome(before.head, peer, shared.key, connection.serving.name, now)

    def done(settled: Settled) -> None:
        if isinstance(settled, Refusal) and stream.phase != OVER:
            stream.outcome.decisions += scratch.decisions
            stream.refuse_request(settled)

    settled = shared.driver.drive(msgspec.structs.replace(routed, tokens=()), scratch, done)
    if not isinstance(settled, Waiting):
        done(settled)
