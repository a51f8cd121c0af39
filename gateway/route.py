"""From a request's head to what is to be done with it and what must be asked first. Pure: no I/O, no clock; chance is an argument.

The order: one form of the path (`gateway.normalize`), the caller (`gateway.caller`), the token (`gateway.authentication`), the virtual host
(`gateway.place`), what only the mesh may say taken off (`gateway.headers`), the rule (`gateway.match`), one of its backends
(`gateway.choice`), the token before its service, the questions, the plan.

Forged internal fields are taken off the head itself, before anything reads it: routes, policies and quotas see what a trusted gateway
said or nothing (Envoy does so, too, before its filters). The same goes for headers that tell of a token's claims.
"""

from __future__ import annotations

import random

import msgspec

from gateway.authentication import Checked
from gateway.buckets import questions
from gateway.caller import XFCC, XFF, caller_of, forwarded_for, vouch
from gateway.choice import Choice, Copy
from gateway.cors import is_preflight
from gateway.grpc_web import to_grpc, web_content
from gateway.headers import PROTO, REQUEST_ID, TE_TRAILERS, TRACESTATE, Fields, without_internal
from gateway.match import Way
from gateway.normalize import normalize
from gateway.place import Place, Served, Table
from gateway.plan import Answer, Edit, Pending, Plan, Routed
from gateway.redirect import redirected, rewritten
from gateway.session import Stay
from gateway.trace import TRACEPARENT, identifiers, passed_on
from identity.authenticator import KeysWanted
from mesh.http import CONNECT, NO_NAMES, Header, RequestHead
from mesh.peer import Caller, Peer
from mesh.questions import Asking, DecisionQuestion
from mesh.refusals import BrokenBackend, MethodNotAllowed, NoRoute


def route(
    head: RequestHead, peer: Peer, place: Place, received: float, rng: random.Random, *, normalized: bool = False, waited: bool = False
) -> Routed:
    """What is to be done with a request of `peer`, with the questions that come first, or why nothing is.

    `received` is the wall clock (seconds since the epoch) at the head's last byte. Unless they are `normalized` already, `head.path`,
    `head.query` and `head.authority` are brought to their one form; forged internal fields are removed from `head.headers`, and its
    token is verified and taken off. Doing it twice changes nothing more: a token that has been verified is not looked for again.
    `KeysWanted`: it can be told once these keys have been fetched, or not; `waited` says that they were.
    """
    table = place.table
    trusted = bool(peer.principal) and peer.principal in table.trusted
    if not normalized:
        refusal = normalize(head, not trusted)
        if refusal is not None:
            return refusal
    caller = caller_of(peer, head.headers, table.mesh)
    if type(caller) is not Caller:
        return caller
    authentication = table.authentication
    checked: Checked | None = None
    before: tuple[list[Header], bytes | None, bytes] | None = None
    again = head.bearer is not None
    if authentication is not None:
        said = Checked(authentication, head.bearer, False) if again else authentication.check(head, received, waited=waited)
        if not isinstance(said, Checked):
            return said
        checked, before = said, (head.headers, head.query, head.target)
    served = table.served(head.authority)
    if type(served) is not Served:
        return served
    fields = Fields(head.headers, trusted)
    believed, address = forwarded_for(peer, fields.forwarded_for, trusted, table.mesh)
    if fields.spoofed:
        head.headers = without_internal(head.headers)
        # What a trusted proxy said stays to be seen; the last element is the peer, which nobody had to say.
        if proxies := believed.rpartition(b", ")[0]:
            head.headers.append((XFF, proxies))
    if checked is not None:
        _authenticate(head, fields, checked, NO_NAMES)
    way = served.table.find(head) if head.tunnel != CONNECT else served.table.find_tunnel(head)
    if way is None:
        if head.tunnel == CONNECT and not served.table.tunnels:
            return MethodNotAllowed(reason=f"no route of the host {served.table.host.hostname} takes CONNECT")
        return NoRoute(reason=f"no rule of the host {served.table.host.hostname} matches")
    chooser = way.chooser
    stay: Stay | None = None
    if chooser.sessions is None:
        choice = chooser.choose(rng)
    else:
        found = chooser.sessions.find(head, received)
        choice = chooser.choose(rng) if found is None else found[0]
        stay = chooser.sessions.stay(None if found is None else found[1], received, head.scheme == b"https")
    if choice.authentication is not None:
        own = choice.authentication
        said_to = Checked(own, head.bearer, False) if again else own.check(head, received, waited=waited)
        if not isinstance(said_to, Checked):
            if before is not None and isinstance(said_to, KeysWanted):
                head.headers, head.query, head.target = before
                head.bearer = None
            return said_to
        _authenticate(head, fields, said_to, authentication.outputs if authentication is not None else NO_NAMES)
    match = way.match
    rule = match.rule
    asking = Asking(head, peer, caller, table.key, served.listener.name, rule.name, match.template, choice.service, received)
    if address != peer.address:
        asking.client = address
    plan: Plan | Answer | BrokenBackend
    edits: tuple[Edit, ...] = choice.edits
    cors: Edit | None = None
    if choice.cors is not None:
        if is_preflight(head):
            return Pending(plan=choice.cors.preflight(head), asking=asking, rule=rule, decisions=(), tokens=())
        cors = choice.cors.said(head)
        edits = (*edits, cors)
    if choice.broken is not None:
        plan = choice.broken
    elif choice.redirect is not None:
        plan = redirected(head, match, choice.redirect, served.listener.port, edits)
    elif head.tunnel == CONNECT and not choice.cluster.gateway and not head.authority.endswith(b":%d" % choice.cluster.port):
        return NoRoute(reason=f"CONNECT to {head.authority.decode('latin-1')}, and the route leads to port {choice.cluster.port}")
    else:
        plan = _plan(asking, way, choice, fields, believed, table, rng, edits, stay)
    decisions: tuple[DecisionQuestion, ...] = ()
    if choice.trial is not None:
        decisions = choice.trial.questions(asking, rng)
    elif choice.asked:  # a comprehension is a call, so it is not made for nothing
        decisions = tuple([DecisionQuestion(policy, asking, revision) for policy, revision in choice.asked])
    return Pending(
        plan=plan,
        asking=asking,
        rule=rule,
        decisions=decisions,
        tokens=questions(choice.buckets, asking, address) if choice.buckets else (),
        body_limit=choice.body_limit,
        body_partial=choice.body_partial,
        cors=cors,
    )


def _authenticate(head: RequestHead, fields: Fields, checked: Checked, reserved: frozenset[bytes]) -> None:
    """Has everybody from here on see a request as the service will: without its token unless that is forwarded, with what it says.
    `reserved`: headers that are ours already."""
    by = checked.by
    head.headers = by.edited(head.headers, checked, reserved)
    fields.kept = by.edited(fields.kept, checked, reserved)
    if checked.strips:
        by.rewrite_query(head)
    if checked.bearer is not None:
        head.bearer = checked.bearer
    head.reserved = by.reserved | head.reserved if head.reserved else by.reserved


def _plan(
    asking: Asking,
    way: Way,
    choice: Choice,
    fields: Fields,
    believed: bytes,
    table: Table,
    rng: random.Random,
    edits: tuple[Edit, ...],
    stay: Stay | None,
) -> Plan:
    head, match, backend = asking.head, way.match, choice.backend
    assert backend is not None, "a choice without a backend is broken or a redirect"
    rule = match.rule
    request_id, trace_id, parent_id = identifiers(rng)
    request_id = fields.request_id or request_id
    trace, goes_on = passed_on(fields.parent, trace_id, parent_id)
    state = fields.state if goes_on else None
    target, authority = rewritten(head, match, choice.rewrite)
    bridge = web_content(head.headers) if choice.bridges and head.method == b"POST" else b""
    if bridge:
        fields.kept = to_grpc(fields.kept, bridge)
        fields.trailers = True
    # What only an upstream in the mesh is told.
    told = [(XFF, believed)] if fields.proto else [(XFF, believed), (PROTO, head.scheme)]
    told.append((REQUEST_ID, request_id))
    peer = asking.peer
    if asking.caller.via:
        if fields.vouched is not None:
            told.append((XFCC, fields.vouched))
    elif peer.principal or peer.certificate_hash:
        told.append((XFCC, vouch(peer.principal, peer.certificate_hash, table.identity)))
    told.append((TRACEPARENT, trace))
    if state is not None:
        told.append((TRACESTATE, state))
    if fields.trailers:
        told.append(TE_TRAILERS)
    headers = fields.kept
    copies: list[tuple[Copy, list[Header]]] = []
    if choice.mirrors:
        copies += [(copy, _outside(headers, fields) if copy.external else headers + told) for copy in choice.mirrors if copy.drawn(rng)]
    headers = _outside(headers, fields) if choice.external else headers + told
    for change in choice.changes:
        headers = change.apply(headers)
    plan = Plan(
        asking=asking,
        match=match,
        rule=rule,
        backend=backend,
        cluster=choice.cluster,
        method=head.method,
        target=target,
        authority=authority,
        headers=headers,
        request_id=request_id,
        trace=trace,
        timeout=rule.timeout,
        backend_timeout=rule.backend_timeout,
        edits=edits,
        bridge=bridge,
        stay=stay,
    )
    return _with_copies(plan, copies, choice) if copies else plan


def _with_copies(plan: Plan, copies: list[tuple[Copy, list[Header]]], choice: Choice) -> Plan:
    """`plan` with one of its own for each copy, whose headers are changed as the request's are."""
    mirrors = []
    for copy, kept in copies:
        headers = kept
        for change in choice.changes:
            headers = change.apply(headers)
        mirrors.append(msgspec.structs.replace(plan, rule=copy.rule, cluster=copy.cluster, headers=headers, edits=(), stay=None))
    return msgspec.structs.replace(plan, mirrors=tuple(mirrors))


def _outside(headers: list[Header], fields: Fields) -> list[Header]:
    """What an upstream outside of the mesh gets."""
    kept = without_internal(headers)
    if fields.trailers:
        kept.append(TE_TRAILERS)
    return kept
