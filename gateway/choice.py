"""What a rule leads to: one of its weighted backends, a redirect, or nothing that works; each with the questions to ask first.

Prepared once for a rule and a snapshot, so that a request only picks one and fills in its own values.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from itertools import accumulate
from typing import Literal

import msgspec

from gateway.authentication import Authenticated
from gateway.buckets import bucket_for
from gateway.cors import CorsRule
from gateway.headers import Changes, changes_of
from gateway.session import SessionKeeper
from identity.authenticator import Tokens
from mesh.filters import Mirror, RetryPolicy, Rewrite
from mesh.model import Backend, Cluster, DecisionPolicy, QuotaLimit, Rule, Snapshot
from mesh.policy import Revision, Share
from mesh.questions import Asking, DecisionQuestion
from mesh.quota_tables import NO_TABLE
from mesh.refusals import BrokenBackend
from mesh.tokens import NOT_AUTHENTICATED

Asked = tuple[DecisionPolicy, Revision | None]
"""A policy, and the revision that it is asked in."""

NO_CLUSTER = Cluster(name="", namespace="", service="", port=0)


class Choice:
    """One thing that a rule can lead to. Immutable once made."""

    __slots__ = (
        "asked",
        "authentication",
        "backend",
        "body_limit",
        "body_partial",
        "bridges",
        "broken",
        "buckets",
        "changes",
        "cluster",
        "cors",
        "edits",
        "external",
        "mirrors",
        "redirect",
        "rewrite",
        "service",
        "trial",
    )

    def __init__(self, rule: Rule, backend: Backend | None, snapshot: Snapshot, why: str = "", tokens: Tokens | None = None) -> None:
        self.backend = backend
        """None when the rule answers by itself or has no backend that could be chosen."""
        self.redirect = rule.redirect or (backend.redirect if backend is not None else None)
        cluster = snapshot.clusters.get(backend.cluster) if backend is not None and backend.cluster else None
        if backend is not None and cluster is None and self.redirect is None:
            why = f"the backend {backend.service or backend.cluster or 'reference'} of {rule.name} is missing, forbidden or unknown"
        self.broken = BrokenBackend(reason=why) if why else None
        """What the request gets once policy has allowed it."""
        self.cluster = cluster if cluster is not None else NO_CLUSTER
        self.external = self.cluster.external and not snapshot.mesh.standalone
        self.bridges = self.cluster.http2 == "always" or (rule.grpc and self.cluster.http2 != "never")
        """Whether gRPC-Web is translated: the port or the route says that gRPC or HTTP/2 is spoken, which a browser's request is not."""
        self.service = backend.service if backend is not None else ""
        config = backend.authentication if backend is not None and self.redirect is None else NOT_AUTHENTICATED
        self.authentication = Authenticated(config, tokens or Tokens()) if config != NOT_AUTHENTICATED else None
        """How tokens are verified before its service."""
        policies = rule.decisions + (backend.decisions if backend is not None else ())
        limits = counted(rule.limits + (backend.limits if backend is not None else ()), self.cluster)
        self.asked = asked(policies, snapshot)
        self.trial = trial_of(policies, snapshot, self.asked)
        self.buckets = tuple(bucket_for(limit, snapshot.mesh, snapshot.quota_tables.get(limit.table, NO_TABLE)) for limit in limits)
        self.body_limit, self.body_partial = body_settings(policies)
        # What the backend says comes after what the rule says: the more special one has the later word.
        self.changes: tuple[Changes, ...] = changes_of(rule.request_headers, backend.request_headers if backend is not None else None)
        self.edits: tuple[Changes, ...] = changes_of(rule.response_headers, backend.response_headers if backend is not None else None)
        """Of the answer's headers."""
        self.cors = CorsRule(rule.cors) if rule.cors is not None else None
        self.rewrite = combined(rule.rewrite, backend.rewrite if backend is not None else None)
        self.mirrors = copies(rule, rule.mirrors + (backend.mirrors if backend is not None else ()), snapshot)


def counted(limits: tuple[QuotaLimit, ...], cluster: Cluster) -> tuple[QuotaLimit, ...]:
    """What a request is charged for here. One limit is charged once, wherever its policy is attached; the mesh's are charged by the last
    gateway on the way, not by one that passes the request on to another."""
    found: dict[str, QuotaLimit] = {}
    for limit in limits:
        if limit.level != "mesh" or not cluster.gateway:
            found.setdefault(limit.name, limit)
    return tuple(found.values())


class Copy:
    """A mirror, prepared."""

    __slots__ = ("cluster", "denominator", "external", "numerator", "rule")

    def __init__(self, mirror: Mirror, rule: Rule, cluster: Cluster, *, standalone: bool) -> None:
        self.rule = rule
        """What is done with the copy: no answer of its upstream is a reason to send it again."""
        self.cluster = cluster
        self.external = cluster.external and not standalone
        self.numerator = mirror.numerator
        self.denominator = mirror.denominator

    def drawn(self, rng: random.Random) -> bool:
        """Whether this request is copied."""
        return self.numerator >= self.denominator or rng.random() * self.denominator < self.numerator


def copies(rule: Rule, mirrors: tuple[Mirror, ...], snapshot: Snapshot) -> tuple[Copy, ...]:
    """The mirrors that there is something to send to."""
    if not mirrors:
        return ()
    own = msgspec.structs.replace(rule, retry=RetryPolicy(), mirrors=())
    found = ((mirror, snapshot.clusters.get(mirror.cluster)) for mirror in mirrors)
    return tuple(Copy(mirror, own, cluster, standalone=snapshot.mesh.standalone) for mirror, cluster in found if cluster is not None)


def combined(rule: Rewrite | None, backend: Rewrite | None) -> Rewrite | None:
    """The rewrite of a request to one backend: the backend's for what it names, the host and the path each, else the rule's."""
    if rule is None or backend is None:
        return rule or backend
    path = backend if backend.path_mode else rule
    return Rewrite(hostname=backend.hostname or rule.hostname, path_mode=path.path_mode, path=path.path)


def asked(policies: tuple[DecisionPolicy, ...], snapshot: Snapshot) -> tuple[Asked, ...]:
    """Each policy with the revision that it is asked in: the active one for our own, that of the AuthorizationPolicies for what they
    ask, none for another provider's.

    With a shadow revision for all requests, each of our own is asked in that one as well, after all others; these answers are recorded and
    never enforced.
    """
    found = _enforced(policies, snapshot, snapshot.policy)
    if snapshot.shadow is not None and snapshot.shadow_share.whole:
        found += _shadows(policies, snapshot.shadow, "shadow")
    return tuple(found)


class Trial:
    """Revisions that are tried on some requests only: which of them a request is one of is drawn for each."""

    __slots__ = ("_active", "_canary", "_canary_share", "_shadow", "_shadow_share")

    def __init__(self, policies: tuple[DecisionPolicy, ...], snapshot: Snapshot) -> None:
        self._active = tuple(_enforced(policies, snapshot, snapshot.policy))
        self._canary = self._active
        if snapshot.canary is not None:
            beside = _shadows(policies, snapshot.policy, "active") if snapshot.policy is not None else []
            self._canary = (*_enforced(policies, snapshot, snapshot.canary), *beside)
        self._canary_share = snapshot.canary_share if snapshot.canary is not None else NOBODY
        self._shadow = () if snapshot.shadow is None else tuple(_shadows(policies, snapshot.shadow, "shadow"))
        self._shadow_share = snapshot.shadow_share

    def questions(self, asking: Asking, rng: random.Random) -> tuple[DecisionQuestion, ...]:
        """What is to be decided about one request."""
        principal = asking.caller.principal
        found = self._canary if self._canary_share.has(principal, rng.random()) else self._active
        if self._shadow and self._shadow_share.has(principal, rng.random()):
            found += self._shadow
        return tuple([DecisionQuestion(policy, asking, revision) for policy, revision in found])


NOBODY = Share(percent=0)


def trial_of(policies: tuple[DecisionPolicy, ...], snapshot: Snapshot, always: tuple[Asked, ...]) -> Trial | None:
    """What is tried on some requests of those that `policies` are asked about; None when all of them are asked `always`."""
    some = snapshot.canary is not None or (snapshot.shadow is not None and not snapshot.shadow_share.whole)
    return Trial(policies, snapshot) if always and some else None


def _enforced(policies: tuple[DecisionPolicy, ...], snapshot: Snapshot, own: Revision | None) -> list[Asked]:
    found: list[Asked] = []
    for policy in policies:
        of_istio = policy.authorization or policy.gate is not None
        found.append((policy, snapshot.authorization if of_istio else None if policy.provider else own))
    return found


def _shadows(policies: tuple[DecisionPolicy, ...], revision: Revision, trial: Literal["shadow", "active"]) -> list[Asked]:
    return [
        (msgspec.structs.replace(policy, shadow=True, trial=trial), revision)
        for policy in policies
        if not policy.provider and not policy.authorization
    ]


def body_settings(policies: tuple[DecisionPolicy, ...]) -> tuple[int, bool]:
    """How many bytes of body to gather, and whether a longer one is cut (True) or refused.

    A body that one enforced policy refuses is refused for all, so the smallest such limit holds; if all of them take a part, the largest
    does. A policy in shadow mode never has a body refused.
    """
    strict = [policy.body_limit for policy in policies if policy.body_limit and not policy.body_partial and not policy.shadow]
    if strict:
        return min(strict), False
    limits = [policy.body_limit for policy in policies if policy.body_limit]
    return (max(limits), True) if limits else (0, False)


class Chooser:
    """Picks one of a rule's choices by weight. A broken backend keeps its share (Gateway API, `HTTPBackendRef`: 500 for it)."""

    __slots__ = ("_choices", "_only", "_sums", "_total", "rule", "sessions")

    def __init__(self, rule: Rule, snapshot: Snapshot, tokens: Tokens | None = None) -> None:
        self.rule = rule
        self._choices: tuple[Choice, ...] = ()
        self._sums: tuple[int, ...] = ()
        self._total = 0
        self._only: Choice | None = None
        self.sessions: SessionKeeper | None = None
        weighted = [backend for backend in rule.backends if backend.weight > 0]
        if rule.redirect is not None:
            self._only = Choice(rule, None, snapshot)
        elif not weighted:
            why = f"all weights of {rule.name} are zero" if rule.backends else f"{rule.name} has no backends"
            self._only = Choice(rule, None, snapshot, why)
        elif len(weighted) == 1:
            self._only = Choice(rule, weighted[0], snapshot, tokens=tokens)
        else:
            self._choices = tuple(Choice(rule, backend, snapshot, tokens=tokens) for backend in weighted)
            self._sums = tuple(accumulate(backend.weight for backend in weighted))
            self._total = self._sums[-1]
        if rule.session is not None:
            # A session outlives the weight of its backend (GEP-1619): those of weight 0 take nobody new.
            unweighted = tuple(Choice(rule, backend, snapshot, tokens=tokens) for backend in rule.backends if backend.weight == 0)
            drawn = self._choices if self._only is None else (self._only,)
            self.sessions = SessionKeeper(rule.session, tuple(choice for choice in drawn + unweighted if choice.redirect is None))

    def choose(self, rng: random.Random) -> Choice:
        """One of the choices."""
        if self._only is not None:
            return self._only
        return self._choices[bisect_right(self._sums, int(rng.random() * self._total))]
