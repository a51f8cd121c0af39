"""What the compiler sees: the documents in force by kind, the instances by service, and what others asked about them.

Each route and each gateway is compiled by a function that sees the rest of the world only through `look`. What it asked and what it was
told is remembered with the result: as long as its own document is the same and every answer is, so is the result (`Memo`). Nothing has to
know who depends on whom.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

import msgspec

from mesh.documents import Document, FieldPath, Instance, Key, Problem
from mesh.sharing import share

Name = tuple[str, str]
"""Namespace (empty for kinds that have none) and name."""
Look = Callable[..., Any]
"""Asks the world: the name of a question, and what it is about."""
T = TypeVar("T")


class World:
    """The documents that are in force and the instances. Owned by a `Workspace`, read by the compiler."""

    def __init__(self) -> None:
        self.documents: dict[str, dict[Name, Document]] = {}
        """By kind (kinds of the supported groups have different names)."""
        self.bad: dict[Key, Document] = {}
        """Documents that are wrong and have no good version."""
        self.instances: dict[Name, dict[str, Instance]] = {}
        """By namespace and service, then by instance."""
        self.dirty: set[str] = set()
        """Kinds that changed since the compiler last looked; `Instance` for instances."""
        self.dirty_services: set[Name] = set()
        """Services whose endpoints changed since then."""

    def of(self, kind: str) -> dict[Name, Document]:
        """The documents of one kind."""
        return self.documents.get(kind, {})

    def get(self, kind: str, namespace: str, name: str) -> Document | None:
        """One document."""
        return self.documents.get(kind, {}).get((namespace, name))


class Parts(Protocol):
    """What a compiled document is for the memo: a value that can be shared."""


class _Entry(Generic[T]):
    __slots__ = ("document", "log", "result")

    def __init__(self, document: Document, log: list[tuple[tuple[Any, ...], Any]], result: T) -> None:
        self.document = document
        self.log = log
        self.result = result


class Memo(Generic[T]):
    """The results of compiling documents one by one, each kept while everything that it was made from is the same."""

    def __init__(self, make: Callable[[Document, Look], T]) -> None:
        self.make = make
        self.entries: dict[Name, _Entry[T]] = {}

    def compile(self, documents: dict[Name, Document], look: Look) -> dict[Name, T]:
        """The result of each document, by name, in the order of the names."""
        before, self.entries = self.entries, {}
        results: dict[Name, T] = {}
        for name in sorted(documents):
            document = documents[name]
            entry = before.get(name)
            if entry is None or entry.document is not document or not _same(entry.log, look):
                entry = self._make(document, look, entry)
            self.entries[name] = entry
            results[name] = entry.result
        return results

    def _make(self, document: Document, look: Look, before: _Entry[T] | None) -> _Entry[T]:
        log: list[tuple[tuple[Any, ...], Any]] = []

        def traced(*question: Any) -> Any:
            answer = look(*question)
            log.append((question, answer))
            return answer

        result = self.make(document, traced)
        return _Entry(document, log, share(before.result, result) if before is not None else result)


def _same(log: list[tuple[tuple[Any, ...], Any]], look: Look) -> bool:
    for question, answer in log:
        now = look(*question)
        if now is not answer and now != answer:
            return False
    return True


class Trouble:
    """Gathers the problems of one document."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.found: list[Problem] = []

    def add(self, path: FieldPath, message: str, reason: str = "Invalid", severity: str = "error") -> None:
        """Reports one problem at the field `path`."""
        where = self.document.origin.at(path)
        self.found.append(Problem(key=self.document.key, path=path, message=message, where=where, reason=reason, severity=severity))

    def warn(self, path: FieldPath, message: str, reason: str = "Invalid") -> None:
        """Reports something that is in force all the same."""
        self.add(path, message, reason, "warning")


def age(document: Document) -> tuple[bool, str, str, str]:
    """Sorts the older of two documents first (Gateway API's rule for conflicts): by creation time, then by name. Undated ones come last."""
    created = document.body["metadata"].get("creationTimestamp") or ""
    return not created, created, document.key.namespace, document.key.name


def parent_key(document: Document, ref: Any) -> Key:
    """The resource that a `parentRef` of `document` names."""
    group = ref["group"] if ref.get("group") is not None else document.key.group
    return Key(group, ref.get("kind") or "Gateway", ref.get("namespace") or document.key.namespace, ref["name"])


def selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    """Whether a label selector of Kubernetes fits."""
    for name, value in (selector.get("matchLabels") or {}).items():
        if labels.get(name) != value:
            return False
    for item in selector.get("matchExpressions") or []:
        name, values, operator = item["key"], item.get("values") or [], item["operator"]
        fits = {
            "In": name in labels and labels[name] in values,
            "NotIn": name not in labels or labels[name] not in values,
            "Exists": name in labels,
            "DoesNotExist": name not in labels,
        }[operator]
        if not fits:
            return False
    return True


class PortFacts(msgspec.Struct, frozen=True):
    """What a route must know of a service's port."""

    cluster: str
    broken: str = ""
    """Why requests can't be sent there, in one sentence; empty when they can."""
    reason: str = ""
    """The condition's reason."""
    no_http: str = ""
    """Why routes for HTTP can't send anything there, in one sentence (its `appProtocol` is another protocol's); empty when they can."""
    no_grpc: str = ""
    """The same of GRPCRoutes."""
    within_tls: bool = False
    """As `mesh.model.Cluster.within_tls`."""


class ServiceFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What a route must know of a service. Endpoints are not part of it: they come and go without a route being compiled."""

    ports: dict[int, PortFacts] = {}
    """Those for TCP."""
    udp: dict[int, PortFacts] = {}
    gateway: bool = False
    """Whether it is a gateway of the mesh."""
