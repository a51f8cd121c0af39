"""Masks of a decision log, as OPA has them: what `system.log.mask` says is erased from an event, or replaced in it.

Follows OPA's own reading of it (openpolicyagent.org, "Decision Logs", "Masking Sensitive Data"; `plugins/logs/mask.go` of OPA 1.x), its
corners too: a part of a path is looked up in its percent-encoded form, a path that leads nowhere changes nothing and is not listed, and an
array never grows.
"""

from __future__ import annotations

import re
from typing import Any, Final
from urllib.parse import quote

import msgspec

Event = dict[str, Any]

ROOTS: Final = frozenset({"input", "result", "nd_builtin_cache"})
_BROKEN: Final = re.compile("%(?![0-9A-Fa-f]{2})")
_INDEX: Final = re.compile(r"[+-]?[0-9]+")
_PLAIN: Final = "$&+=:@"
"""What Go's `url.PathEscape` leaves as it is, besides letters, digits and `-._~`."""
_GONE: Final = object()

SECRETS: Final = (
    "authorization",
    "cookie",
    "proxy-authorization",
    "set-cookie",
    "x-api-key",
    "x-forwarded-client-cert",
)
"""Header fields whose values are never written, whatever a policy's own masks say."""
_TOKEN: Final = re.compile(r"\beyJ[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+")
"""What looks like a JSON Web Token is one, in whatever field it is forwarded."""
HIDDEN: Final = "**"
"""Stands for a value that is not written."""


class MaskError(ValueError):
    """What `system.log.mask` says is no list of masks: the event may not be written at all."""


class Mask(msgspec.Struct, frozen=True):
    """One change of an event."""

    parts: tuple[str, ...]
    """The path, its first part among `ROOTS`."""
    upsert: bool = False
    value: Any = None
    """What is put there, with `upsert`."""

    def __str__(self) -> str:
        return "/" + "/".join(self.parts)


def masks_of(said: Any) -> tuple[Mask, ...]:
    """The masks that a policy's `mask` says (the JSON of a set or list). Raises `MaskError`."""
    if not isinstance(said, list):
        raise MaskError(f"system.log.mask is {type(said).__name__}, not a set of masks")
    return tuple(_mask(each) for each in said)


def _mask(said: Any) -> Mask:
    if isinstance(said, str):
        return Mask(_parts(said))
    if not isinstance(said, dict):
        raise MaskError(f"a mask is {type(said).__name__}, not a path or an object")
    op = said.get("op", "")
    if op not in {"remove", "upsert"}:
        raise MaskError(f"a mask's op is {op!r}, not remove or upsert")
    path = said.get("path", "")
    if not isinstance(path, str):
        raise MaskError("a mask's path is not a string")
    return Mask(_parts(path), op == "upsert", said.get("value"))


def _parts(path: str) -> tuple[str, ...]:
    if not path.startswith("/"):
        raise MaskError(f"the mask {path!r} is not a path: write it as in /input/password")
    parts = path[1:].split("/")
    if parts[0] not in ROOTS:
        raise MaskError(f"the mask {path!r} is not below one of {', '.join(sorted(ROOTS))}")
    if any(_BROKEN.search(part) for part in parts):
        raise MaskError(f"the mask {path!r} has a broken escape")
    return tuple(quote(part, safe=_PLAIN) for part in parts)


def apply(masks: tuple[Mask, ...], event: Event) -> None:
    """Changes `event` as `masks` say, and lists them under `erased` and `masked` in the order in which they were applied."""
    for mask in masks:
        done = _upsert(mask, event) if mask.upsert else _remove(mask, event)
        if done:
            event.setdefault("masked" if mask.upsert else "erased", []).append(str(mask))


def _remove(mask: Mask, event: Event) -> bool:
    root, *way = mask.parts
    if root not in event:
        return False
    if not way:
        del event[root]
        return True
    node = event[root]
    for part in way[:-1]:
        node = _child(node, part)
    last = way[-1]
    if isinstance(node, dict) and last in node:
        del node[last]
        return True
    index = _index(last, node)
    if index is None:
        return False
    del node[index]
    return True


def _upsert(mask: Mask, event: Event) -> bool:
    root, *way = mask.parts
    if root not in event:
        return False
    if not way:
        event[root] = mask.value
        return True
    node = event[root]
    for part in way[:-1]:
        if isinstance(node, dict) and part not in node:
            node[part] = {}
        node = _child(node, part)
    last = way[-1]
    if isinstance(node, dict):
        node[last] = mask.value
        return True
    index = _index(last, node)
    if index is None:
        return False
    node[index] = mask.value
    return True


def _child(node: Any, part: str) -> Any:
    if isinstance(node, dict):
        return node.get(part, _GONE)
    index = _index(part, node)
    return _GONE if index is None else node[index]


def _index(part: str, node: Any) -> int | None:
    """The index that `part` is in the array `node`; None when it is none."""
    if not isinstance(node, list) or len(part) > 19 or not _INDEX.fullmatch(part):
        return None
    index = int(part)
    return index if 0 <= index < len(node) else None


def hide_secrets(event: Event) -> None:
    """Hides what may be a secret in the input and the result: header fields in `SECRETS` or with a token in them, the query's values,
    the body. What was hidden is listed as masked."""
    tree = event.get("input")
    if isinstance(tree, dict):
        _hide_input(tree, event)
    result = event.get("result")
    if isinstance(result, dict):
        for field in ("headers", "response_headers_to_add"):
            _hide(result.get(field), SECRETS, ("result", field), event)


def _hide_input(tree: Event, event: Event) -> None:
    http = tree.get("attributes")
    for part in ("request", "http"):
        http = http.get(part) if isinstance(http, dict) else None
    if not isinstance(http, dict):
        return
    where = ("input", "attributes", "request", "http")
    headers = http.get("headers")
    _hide(headers, SECRETS, (*where, "headers"), event)
    if isinstance(headers, dict):
        tokens = tuple(name for name, value in headers.items() if isinstance(value, str) and _TOKEN.search(value))
        _hide(headers, tuple(name for name in tokens if not name.startswith(":")), (*where, "headers"), event)
    for holder, name, path in ((http, "path", (*where, "path")), (headers, ":path", (*where, "headers", ":path"))):
        target = holder.get(name) if isinstance(holder, dict) else None
        if isinstance(target, str) and "?" in target:
            holder[name] = target.partition("?")[0] + "?" + HIDDEN  # type: ignore[index]
            _note(path, event)
    query = tree.get("parsed_query")
    if isinstance(query, dict):
        for name in query:
            query[name] = [HIDDEN]
            _note(("input", "parsed_query", quote(name, safe=_PLAIN)), event)
    _hide(http, ("body", "rawBody"), where, event)
    if tree.get("parsed_body") is not None:
        _hide(tree, ("parsed_body",), ("input",), event)


def _hide(holder: Any, names: tuple[str, ...], where: tuple[str, ...], event: Event) -> None:
    if isinstance(holder, dict):
        for name in names:
            if name in holder:
                holder[name] = HIDDEN
                _note((*where, name), event)


def _note(path: tuple[str, ...], event: Event) -> None:
    event.setdefault("masked", []).append("/" + "/".join(path))
