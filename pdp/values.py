"""The values at a read set's paths: the part of a kept decision's key that is about the request.

For the paths that policies mostly read there are readers that go straight to the `Asking`; a read set with any other path has the whole
document made, once a request. Both give the same parts:

* a value: the string as it is, canonical JSON as bytes for anything else, None when it is absent. Never a raw Python value: there
  `True`, `1` and `1.0` are equal.
* whether it is defined: a bool
* a length: a number of elements or characters, -1 for what has none
* a type: its name, empty when it is absent

Which part stands where is fixed by the read set, so that parts of different meaning never meet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import Any, Final

import msgspec

from mesh.http import NO_HEAD, RequestHead
from mesh.model import DecisionPolicy
from mesh.policy import Path, ReadSet
from mesh.questions import Asking
from pdp.body import PARTIAL
from pdp.input import document_tree, header_text, metadata, target_of, text
from pdp.target import parse_query, split_target

Part = str | bytes | bool | int | None
Reader = Callable[[Asking], Any]
"""The value at one path, as it is in the document; `ABSENT` for none."""

ABSENT: Final[Any] = type("Absent", (), {"__slots__": (), "__repr__": lambda _: "ABSENT"})()

HTTP: Final = ("attributes", "request", "http")
BODY: Final[tuple[Path, ...]] = (
    (*HTTP, "body"),
    (*HTTP, "rawBody"),
    (*HTTP, "size"),
    (*HTTP, "headers", PARTIAL),
    ("parsed_body",),
    ("truncated_body",),
)
"""What there is of a body in a document."""

_canonical = msgspec.json.Encoder(order="sorted", decimal_format="number").encode


def values_at(asking: Asking, policy: DecisionPolicy, reads: ReadSet) -> tuple[Part, ...]:
    """The parts of the key that `reads` asks for. Raises ValueError when the request has no document."""
    return Values(reads)(asking, policy)


class Values:
    """Reads the key's parts of one read set: made once, called for each request."""

    __slots__ = ("_plain", "_whole")

    def __init__(self, reads: ReadSet) -> None:
        self._plain: list[Callable[[Asking], Part]] = []
        self._whole: list[tuple[Path, Callable[[Any], Part]]] = []
        for path, part in wanted_parts(reads):
            if part is defined_part and path in _ALWAYS:
                continue
            if part is defined_part and path in _OF_REQUESTS:
                self._plain.append(_is_http)
                continue
            direct = text_reader(path) if part is value_part else None
            reader = reader_of(path)
            if direct is not None:
                self._plain.append(direct)
            elif reader is not None:
                self._plain.append(_through(reader, part))
            else:
                self._whole.append((path, part))

    def __call__(self, asking: Asking, policy: DecisionPolicy) -> tuple[Part, ...]:
        """The parts. Raises ValueError when the request has no document."""
        parts = [read(asking) for read in self._plain]
        if self._whole:
            tree = document_tree(asking, policy)
            parts += [part(at(tree, path)) for path, part in self._whole]
        return tuple(parts)


def wanted_parts(reads: ReadSet) -> Iterator[tuple[Path, Callable[[Any], Part]]]:
    """Every path that is read, and what makes its part of the value there."""
    for paths, part in (
        (reads.values, value_part),
        (reads.lengths, length_part),
        (reads.kinds, kind_part),
        (reads.defined, defined_part),
    ):
        for path in paths:
            yield path, part


def reads_body(reads: ReadSet) -> bool:
    """Whether any read is of the body, of something in it, or of something that has it in it."""
    for path in (*reads.values, *reads.defined, *reads.lengths, *reads.kinds):
        for body in BODY:
            shorter = min(len(path), len(body))
            if path[:shorter] == body[:shorter]:
                return True
    return False


def at(tree: Any, path: Path) -> Any:
    """What is at `path` of a document; `ABSENT` for nothing."""
    for part in path:
        known = part in tree if isinstance(tree, dict) else isinstance(tree, list) and isinstance(part, int) and part < len(tree)
        if not known:
            return ABSENT
        tree = tree[part]
    return tree


def value_part(value: Any) -> Part:
    """The part for a value."""
    return value if isinstance(value, str) else None if value is ABSENT else _canonical(value)


def defined_part(value: Any) -> Part:
    """The part for whether there is a value."""
    return value is not ABSENT


def length_part(value: Any) -> Part:
    """The part for a value's length."""
    return len(value) if isinstance(value, str | list | dict) else -1


def kind_part(value: Any) -> Part:
    """The part for a value's type."""
    if value is ABSENT:
        return ""
    if isinstance(value, str):
        return "string"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int | float | Decimal):
        return "number"
    return "null" if value is None else "array" if isinstance(value, list) else "object"


def text_reader(path: Path) -> Callable[[Asking], str | None] | None:
    """Reads a value that is a string or absent, if there is a short way to it: then its part is the string or None."""
    simple = _TEXTS.get(path)
    if simple is not None:
        return simple
    match path:
        case ("attributes", "request", "http", "headers", str(name)) if _plain_header(name):
            return _header(name.encode())
        case ("parsed_path", 0):
            return _first_segment
        case ("parsed_path", int(index)):
            return _segment(index)
        case ("parsed_query", str(name), int(index)):
            return _query_value(name, index)
        case _:
            return None


def reader_of(path: Path) -> Reader | None:
    """Reads the value at `path`, if there is a shorter way to it than by the document."""
    direct = text_reader(path)
    if direct is not None:
        return lambda asking: ABSENT if (found := direct(asking)) is None else found
    match path:
        case ("parsed_path",):
            return _segments
        case ("attributes", "metadataContext", "filterMetadata", "envoy.filters.http.jwt_authn", "payload", *names):
            return _claim(tuple(names))
        case ("attributes", "metadataContext", *names):
            return _metadata(tuple(names))
        case ("parsed_query",):
            return _query
        case ("parsed_query", str(name)):
            return lambda asking: _query(asking).get(name, ABSENT)
        case _:
            return None


def _through(reader: Reader, part: Callable[[Any], Part]) -> Callable[[Asking], Part]:
    return lambda asking: part(reader(asking))


def _plain_header(name: str) -> bool:
    return name.isascii() and not name.startswith(":") and name != PARTIAL


def _header(name: bytes) -> Callable[[Asking], str | None]:
    return lambda asking: header_text(asking.head, name)


def _segments(asking: Asking) -> list[str]:
    head = asking.head
    path = head.path
    if path[:1] == b"/" and path[1:2] != b"/" and b"%" not in path:
        return text(path)[1:].split("/")
    return split_target(target_of(head))[0]


def _first_segment(asking: Asking) -> str | None:
    path = asking.head.path
    if path[:1] == b"/" and path[1:2] != b"/" and b"%" not in path:
        end = path.find(b"/", 1)
        return (path[1:] if end < 0 else path[1:end]).decode("utf-8", "replace")
    return _segments(asking)[0]


def _segment(index: int) -> Callable[[Asking], str | None]:
    def read(asking: Asking) -> str | None:
        segments = _segments(asking)
        return segments[index] if index < len(segments) else None

    return read


def _claim(path: Path) -> Reader:
    def read(asking: Asking) -> Any:
        bearer = asking.head.bearer
        return ABSENT if bearer is None else at(bearer.claims, path)

    return read


def _metadata(path: Path) -> Reader:
    return lambda asking: at(metadata(asking), path)


def _query(asking: Asking) -> dict[str, list[str]]:
    query = asking.head.query
    return parse_query(text(query), strict=False) if query else {}


def _query_value(name: str, index: int) -> Callable[[Asking], str | None]:
    def read(asking: Asking) -> str | None:
        values = _query(asking).get(name, ())
        return values[index] if index < len(values) else None

    return read


def _of_head(field: Callable[[RequestHead], bytes]) -> Callable[[Asking], str | None]:
    return lambda asking: field(asking.head).decode("utf-8", "replace") or None


def _is_http(asking: Asking) -> bool:
    return asking.head is not NO_HEAD


_TEXTS: Final[dict[Path, Callable[[Asking], str | None]]] = {
    ("attributes", "tlsSession", "sni"): lambda asking: asking.peer.sni or None,
    ("attributes", "source", "principal"): lambda asking: asking.caller.principal or None,
    ("attributes", "source", "address", "socketAddress", "address"): lambda asking: asking.peer.address or None,
    (*HTTP, "method"): _of_head(lambda head: head.method),
    (*HTTP, "host"): _of_head(lambda head: head.authority),
    (*HTTP, "scheme"): _of_head(lambda head: head.scheme),
    (*HTTP, "protocol"): _of_head(lambda head: head.version),
    (*HTTP, "path"): lambda asking: target_of(asking.head) or None,
    ("attributes", "contextExtensions", "gateway"): lambda asking: asking.gateway or None,
    ("attributes", "contextExtensions", "listener"): lambda asking: asking.listener or None,
    ("attributes", "contextExtensions", "route"): lambda asking: asking.route or None,
    ("attributes", "contextExtensions", "template"): lambda asking: asking.template or None,
    ("attributes", "contextExtensions", "service"): lambda asking: asking.service or None,
    ("attributes", "contextExtensions", "via"): lambda asking: asking.caller.via or None,
    ("attributes", "contextExtensions", "client"): lambda asking: asking.client or None,
}

_ALWAYS: Final[frozenset[Path]] = frozenset(
    (
        (),
        ("attributes",),
        ("attributes", "source"),
        ("attributes", "source", "address"),
        ("attributes", "source", "address", "socketAddress"),
        ("attributes", "source", "address", "socketAddress", "portValue"),
        ("attributes", "destination"),
        ("attributes", "destination", "address"),
        ("attributes", "destination", "address", "socketAddress"),
        ("attributes", "destination", "address", "socketAddress", "portValue"),
        ("attributes", "metadataContext"),
        ("parsed_path",),
        ("parsed_path", 0),
        ("parsed_query",),
        ("parsed_body",),
        ("truncated_body",),
        ("version",),
    )
)
"""What every document of ours has: whether it is defined needs no place in a key."""

_OF_REQUESTS: Final[frozenset[Path]] = frozenset((("attributes", "request"), ("attributes", "request", "time"), HTTP, (*HTTP, "headers")))
"""What every document of a request has, and none of a connection below HTTP."""
