"""From a rule's `sessionPersistence` to what tokens are made with."""

from __future__ import annotations

import hashlib
from typing import Any

from mesh import formats, material
from mesh.compile_world import Look, Trouble
from mesh.documents import Document
from mesh.filters import Session

KEY_ANNOTATION = "tollhouse.dev/session-key"
"""On a route: the Secret of its namespace whose `key` its tokens are made with."""
LEAST_KEY = 16
"""Bytes."""


def compile_session(document: Document, name: str, body: Any, matches: Any, look: Look, trouble: Trouble) -> Session | None:
    """The session persistence of the rule called `name`; None when its key can't be had (the rule works without it then)."""
    key = _key(document, name, look, trouble)
    if key is None:
        return None
    kind = body.get("type") or "Cookie"
    default = "tollhouse-session-" + hashlib.sha256(name.encode()).hexdigest()[:8]
    called = body.get("sessionName") or default
    lifetime = body.get("absoluteTimeout")
    return Session(
        name=(called if kind == "Cookie" else called.lower()).encode(),
        header=kind == "Header",
        key=key,
        lifetime=formats.seconds(lifetime) if lifetime else None,
        permanent=(body.get("cookieConfig") or {}).get("lifetimeType") == "Permanent",
        path=_cookie_path(matches),
    )


def _cookie_path(matches: Any) -> bytes:
    """The rule's own path if it has just one; else all of the host (GEP-1619, "Path")."""
    path = matches[0].get("path") or {} if len(matches) == 1 else {}
    if (path.get("type") or "PathPrefix") == "RegularExpression":
        return b"/"
    value: str = path.get("value") or "/"
    # A semicolon would end the attribute.
    return b"/" if ";" in value else (value.rstrip("/") or "/").encode("ascii", "replace")


def _key(document: Document, name: str, look: Look, trouble: Trouble) -> bytes | None:
    """From a Secret, or else from what every gateway knows of the route: then a token tells nothing, but is no secret to who knows that."""
    metadata = document.body["metadata"]
    secret = (metadata.get("annotations") or {}).get(KEY_ANNOTATION)
    seed = "\0".join((name, str(document.key), str(metadata.get("uid") or ""))).encode()
    if secret is None:
        return hashlib.sha256(b"tollhouse session\0" + seed).digest()
    found = material.secret_key(look("document", "Secret", document.key.namespace, secret), f"{document.key.namespace}/{secret}", LEAST_KEY)
    if isinstance(found, material.Unusable):
        trouble.add(("metadata", "annotations", KEY_ANNOTATION), found.message, found.reason)
        return None
    return hashlib.sha256(found + b"\0" + seed).digest()
