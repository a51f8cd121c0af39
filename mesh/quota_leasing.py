"""Which limits can't be leased: what `tollhouse validate` warns of.

The store lends at most half of a bucket's burst, in equal parts to the lessees at it (`quota.bucket`): with less than two tokens for each
there is nothing to lend, and each request that is admitted costs a call to Redis. For limits that admit a few in a minute that is as it
should be.
"""

from __future__ import annotations

from collections.abc import Sequence

from mesh.compile_quota import quota_limits
from mesh.compile_world import Trouble
from mesh.documents import Document, Problem
from mesh.kinds_gateway import CONTROLLER
from mesh.model import QuotaLimit

FEW = 1.0
"""Calls a second, for one bucket, that nobody needs to be warned of."""


def lessees(documents: Sequence[Document], workers: int) -> int:
    """How many there are at least, with so many workers for each gateway: every Gateway of our class may lease from every bucket."""
    ours = {
        document.key.name
        for document in documents
        if document.key.kind == "GatewayClass" and (document.body.get("spec") or {}).get("controllerName") == CONTROLLER
    }
    gateways = sum(
        document.key.kind == "Gateway" and (document.body.get("spec") or {}).get("gatewayClassName") in ours for document in documents
    )
    return max(1, gateways) * workers


def unleased(documents: Sequence[Document], count: int) -> list[Problem]:
    """Warnings about the limits of QuotaPolicies (which have passed their check) that `count` lessees can't lease."""
    found: list[Problem] = []
    for document in documents:
        trouble = Trouble(document)
        name = f"{document.key.namespace}/{document.key.name}"
        for at, limit in enumerate(quota_limits(name, document.body["spec"], "mesh", {})):
            if message := why_not(limit, count):
                trouble.warn(("spec", "limits", at), message, "NotLeased")
        found += trouble.found
    return found


def why_not(limit: QuotaLimit, count: int) -> str:
    """Why a limit is not leased, and what that costs; empty when it is, or when it costs next to nothing."""
    calls = limit.tokens / limit.interval / limit.cost
    if limit.service is not None or limit.burst >= 2 * count or calls <= FEW:
        return ""
    whom = "one lessee needs 2" if count == 1 else f"{count} lessees (gateways times workers) need {2 * count}"
    return (
        f"a burst of {limit.burst} can't be leased, {whom}: each request that is admitted is a call to Redis, "
        f"up to {calls:g} a second for each bucket; raise burst if that is too many"
    )
