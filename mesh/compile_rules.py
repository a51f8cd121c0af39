"""From a rule of a route to what is done with the requests that match it. What does not depend on the listener is made once for all."""

from __future__ import annotations

from typing import Any

from mesh import formats
from mesh.compile_filters import compile_filters, reference
from mesh.compile_policies import Attached
from mesh.compile_session import compile_session
from mesh.compile_world import Look, Trouble
from mesh.documents import Document, FieldPath
from mesh.filters import RetryPolicy
from mesh.model import Backend, Rule

DEFAULT_TIMEOUT = 15.0
"""Seconds; Envoy's default for a route."""


def compile_rule(document: Document, index: int, body: Any, attached: Attached, look: Look, trouble: Trouble) -> Rule:
    """The rule number `index` of a route; `attached` is of the levels route and rule."""
    key = document.key
    grpc = key.kind == "GRPCRoute"
    path: FieldPath = ("spec", "rules", index)
    filters = compile_filters(document, body.get("filters"), (*path, "filters"), look, trouble)
    attached = attached.joined(filters.attached)
    refs = body.get("backendRefs") or []
    backends = [_backend(document, ref, (*path, "backendRefs", number), look, trouble) for number, ref in enumerate(refs)]
    if filters.redirect is not None:
        _idle(body, path, trouble)
    if filters.broken:
        backends = [Backend(weight=1)]
    elif not refs and filters.redirect is None:
        trouble.warn(
            (*path, "backendRefs"),
            f"the rule has no backend: what it matches is answered with {'UNAVAILABLE' if grpc else 500}",
            "BackendNotFound",
        )
        backends.append(Backend(weight=1))
    # A stream of gRPC may go on for days, and a call says itself how long it may take.
    whole, one = (None, None) if grpc else _timeouts(body.get("timeouts") or {})
    name = f"{key.namespace}/{key.name}#{body.get('name') or _number(document, index)}"
    session = None
    if body.get("sessionPersistence") is not None:
        session = compile_session(document, name, body["sessionPersistence"], body.get("matches") or [{}], look, trouble)
    return Rule(
        name=name,
        route=str(key),
        namespace=key.namespace,
        backends=tuple(backends),
        request_headers=filters.request_headers,
        response_headers=filters.response_headers,
        rewrite=filters.rewrite,
        redirect=None if filters.broken else filters.redirect,
        cors=filters.cors,
        mirrors=filters.mirrors,
        timeout=whole,
        timeout_unsaid=whole is not None and not (body.get("timeouts") or {}).get("request"),
        backend_timeout=one,
        retry=_retry(body["retry"]) if body.get("retry") is not None else RetryPolicy(),
        session=session,
        decisions=attached.decisions,
        limits=attached.limits,
        grpc=grpc,
        origin=document.origin.at(path),
    )


def _number(document: Document, index: int) -> str:
    """What a rule without a name is called: its index, unless another rule has that for a name."""
    taken = {other.get("name") for other in document.body["spec"].get("rules") or []}
    return f"{index}" if str(index) not in taken else f"{index}-unnamed"


def _idle(body: Any, path: FieldPath, trouble: Trouble) -> None:
    """Says what means nothing beside a redirect, which goes to no upstream."""
    message = "does nothing here: the rule redirects, and no upstream gets the request"
    for number, item in enumerate(body["filters"]):
        if item["type"] in ("RequestHeaderModifier", "RequestMirror"):
            trouble.warn((*path, "filters", number), f"{item['type']} {message}", "IncompatibleFilters")
    for field in ("retry", "sessionPersistence"):
        if body.get(field) is not None:
            trouble.warn((*path, field), message, "IncompatibleFilters")


def _timeouts(body: Any) -> tuple[float | None, float | None]:
    """Seconds for the whole request, and for one try; `0s` is no limit."""
    whole = formats.seconds(body["request"]) if body.get("request") else DEFAULT_TIMEOUT
    one = formats.seconds(body["backendRequest"]) if body.get("backendRequest") else 0.0
    if not body.get("request") and one > whole:
        whole = one
    return whole or None, one or None


def _retry(body: Any) -> RetryPolicy:
    """What the author wrote, GEP-1731; errors of the connection are tried again with any `retry`, also an empty one."""
    default = RetryPolicy()
    pause = formats.seconds(body["backoff"]) if body.get("backoff") else 0.0
    return RetryPolicy(
        attempts=default.attempts if body.get("attempts") is None else body["attempts"],
        statuses=tuple(body.get("codes") or ()),
        connection=True,
        replay=True,
        # `0s` asks for no least pause; none at all would be a storm.
        backoff=pause or default.backoff,
        at_least=bool(pause),
    )


def _backend(document: Document, ref: Any, path: FieldPath, look: Look, trouble: Trouble) -> Backend:
    filters = compile_filters(document, ref.get("filters"), (*path, "filters"), look, trouble)
    found = reference(document, ref, path, look, trouble)
    attached = filters.attached + found.attached
    return Backend(
        weight=ref["weight"] if ref.get("weight") is not None else 1,
        cluster="" if filters.broken else found.cluster,
        service=found.service,
        request_headers=filters.request_headers,
        response_headers=filters.response_headers,
        rewrite=filters.rewrite,
        redirect=None if filters.broken else filters.redirect,
        mirrors=filters.mirrors,
        decisions=attached.decisions,
        limits=attached.limits,
        authentication=found.authentication,
    )
