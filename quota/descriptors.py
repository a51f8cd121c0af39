"""Which limit a rate-limit descriptor means: envoyproxy/ratelimit's YAML, and the limits of QuotaPolicies.

A descriptor finds its limit level by level, as in envoyproxy/ratelimit: the entry's key and value, then a value that ends in `*`, then the
key alone; a limit counts only when it is as deep as the descriptor is long. `quota.descriptor_file` reads the files.

It differs in one way: a limit of N per unit is a token bucket of N that is refilled all the time, not a counter that starts again with
every unit of the wall clock.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import msgspec

from mesh.model import QuotaLimit, Rule, Snapshot
from mesh.questions import TokenQuestion
from mesh.quota_tables import NO_TABLE, Table
from quota.changes import Numbers
from quota.descriptor_file import DOMAIN, UNITS, DescriptorError, File, Node, limit_of

Entries = Sequence[tuple[str, str]]

NO_TABLES: Mapping[str, Table] = {}


class Found(msgspec.Struct, frozen=True):
    """What a descriptor means."""

    question: TokenQuestion | None
    """At the cost of one hit; None when the limit is `unlimited`."""
    rule: str
    """The limit's place in the configuration, for metrics (`domain.key_value.key`)."""
    unit: str
    """A key of `UNITS`; empty for an unlimited one."""
    requests: int
    """Per `unit`."""
    name: str = ""
    replaces: frozenset[str] = frozenset()
    shadow: bool = False
    quota: bool = False
    """In quota mode: over the limit is OK, and said in the answer's metadata."""
    ours: bool = False
    """Whether the limit has a failure mode of its own: a QuotaPolicy's. Otherwise the asker's applies."""

    @property
    def softness(self) -> str:
        """Why nobody is refused by this limit: `shadow`, `quota`, or empty for one that refuses."""
        return "shadow" if self.shadow else "quota" if self.quota else ""


class Limits(Protocol):
    """A source of limits."""

    def find(self, domain: str, entries: Entries, override: tuple[int, str] | None) -> Found | None:
        """The limit for a descriptor, or None. `override`: requests and unit that the asker sent along."""
        ...


class Both:
    """QuotaPolicies and descriptors, together."""

    def __init__(self, *sources: Limits) -> None:
        self._sources = sources

    def find(self, domain: str, entries: Entries, override: tuple[int, str] | None) -> Found | None:
        """The first source's that knows one."""
        for source in self._sources:
            found = source.find(domain, entries, override)
            if found is not None:
                return found
        return None


class PolicyLimits:
    """The limits of QuotaPolicies, in the domain `tollhouse`.

    A descriptor names the limit and gives a value for each of its `per` descriptors, in their order: the entry (`limit`,
    `namespace/policy/limit`), then one with the descriptor's kind as key (`identity`, `header`, ...). The gateways use the same buckets.
    """

    def __init__(self, limits: Iterable[QuotaLimit], tables: Mapping[str, Table] = NO_TABLES) -> None:
        found = tuple(limits)
        self._limits = {limit.name: limit for limit in found if limit.service is None}
        self.elsewhere = {limit.name: limit.service.cluster for limit in found if limit.service is not None}
        """Limits whose tokens another rate-limit service has, and its cluster."""
        self._numbers = {name: Numbers(limit, tables.get(limit.table, NO_TABLE)) for name, limit in self._limits.items()}

    @property
    def names(self) -> tuple[str, ...]:
        """The limits that there are, `namespace/policy/limit` each."""
        return tuple(self._limits)

    def get(self, name: str) -> QuotaLimit | None:
        """The limit of that name, as its QuotaPolicy has it, with what was changed by hand."""
        return self._limits.get(name)

    def numbers(self, name: str) -> Numbers:
        """Which numbers hold for the buckets of a limit that there is."""
        return self._numbers[name]

    @classmethod
    def of(cls, snapshot: Snapshot) -> PolicyLimits:
        """Those of all QuotaPolicies that are attached to something in `snapshot`."""
        found: dict[str, QuotaLimit] = {}
        for rule in _rules(snapshot):
            found.update((limit.name, limit) for limit in rule.limits)
            found.update((limit.name, limit) for backend in rule.backends for limit in backend.limits)
        return cls(found.values(), snapshot.quota_tables)

    def find(self, domain: str, entries: Entries, override: tuple[int, str] | None) -> Found | None:
        """See `Limits`. Such a limit cannot be overridden. Raises ValueError for a concurrency limit."""
        if domain != DOMAIN or not entries or entries[0][0] != "limit":
            return None
        limit = self._limits.get(entries[0][1])
        if limit is None or tuple(key for key, _ in entries[1:]) != tuple(descriptor.kind for descriptor in limit.per):
            return None
        values = tuple(value for _, value in entries[1:])
        if any(part.kind == "constant" and part.argument != value for part, value in zip(limit.per, values, strict=True)):
            return None
        rule = f"{DOMAIN}.{limit.name}"
        numbers = self._numbers[limit.name].of(values, time.time())
        if numbers is None:  # lifted by hand
            return Found(None, rule, "", 0, shadow=limit.shadow, ours=True)
        limit = numbers
        if limit.concurrency:
            raise ValueError(f"{limit.name} counts requests in progress, and nothing in this protocol says when one has ended")
        unit = next((name for name, seconds in UNITS.items() if seconds >= limit.interval), "year")
        requests = int(limit.tokens * UNITS[unit] / limit.interval)
        return Found(TokenQuestion(limit, values, limit.cost), rule, unit, requests, shadow=limit.shadow, ours=True)


def _rules(snapshot: Snapshot) -> Iterator[Rule]:
    for gateway in snapshot.gateways.values():
        for listener in gateway.listeners:
            yield from listener.rules.values()
            for host in listener.hosts.values():
                for matches in (*host.exact.values(), *host.prefix.values(), host.regex):
                    for match in matches:
                        yield match.rule


class Descriptors:
    """The limits of envoyproxy/ratelimit's files."""

    def __init__(self, texts: Mapping[str, str]) -> None:
        """`texts`: YAML by the file's name. Raises DescriptorError."""
        self._domains: dict[str, Node] = {}
        for name, text in texts.items():
            File(name, text).load(self._domains)

    @classmethod
    def read(cls, folder: Path) -> Descriptors:
        """All `*.yaml` and `*.yml` of a folder. Raises DescriptorError and OSError."""
        files = sorted(path for path in folder.iterdir() if path.suffix in {".yaml", ".yml"} and not path.name.startswith("."))
        if not files:
            raise DescriptorError(f"{folder}: there is no .yaml file in it")
        return cls({str(path): path.read_text("utf-8") for path in files})

    @property
    def domains(self) -> tuple[str, ...]:
        """The domains that there are limits for."""
        return tuple(self._domains)

    def find(self, domain: str, entries: Entries, override: tuple[int, str] | None) -> Found | None:
        """See `Limits`."""
        node = self._domains.get(domain)
        if node is None:
            return None
        key = tuple(part for entry in entries for part in entry)
        if override is not None:
            requests, unit = override
            rule = f"{domain}.({requests} a {unit})"
            return Found(TokenQuestion(limit_of(rule, requests, unit), key), rule, unit, requests)
        path: list[Node] = []
        for name, value in entries:
            node = node.step(name, value)
            if node is None:
                return None
            path.append(node)
        if node.unit is None:
            return None
        if any(one.shared for one in path):
            key = tuple(
                part for (name, value), one in zip(entries, path, strict=True) for part in (name, one.value if one.shared else value)
            )
        question = TokenQuestion(node.limit, key) if node.limit is not None else None
        return Found(question, _rule(domain, entries, path), node.unit, node.requests, node.name, node.replaces, node.shadow, node.quota)


def _rule(domain: str, entries: Entries, path: Sequence[Node]) -> str:
    """A limit's name in metrics: its place in the file, with values of the descriptor where the file asks for them."""
    parts = [domain]
    for (name, value), node in zip(entries, path, strict=True):
        seen = value if (path[-1].detailed or node.by_value) and not node.shared else node.value
        parts.append(f"{name}_{seen}" if seen else name)
    return ".".join(parts)
