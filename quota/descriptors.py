"""Which limit a rate-limit descriptor means: envoyproxy/ratelimit's YAML, and the limits of QuotaPolicies.

The YAML is the one of github.com/envoyproxy/ratelimit ("Configuration"): `domain`, and nested `descriptors` of `key`, `value`, `rate_limit`
(`unit`, `requests_per_unit`, `unlimited`, `name`, `replaces`), `shadow_mode` and `detailed_metric`. It is read strictly: an unknown or
misplaced field is an error that says where. A descriptor finds its limit level by level: the entry's key and value, then a value that ends
in `*`, then the key alone; a limit counts only when it is as deep as the descriptor is long.

It differs in one way: a limit of N per unit is a token bucket of N that is refilled all the time, not a counter that starts again with
every unit of the wall clock.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

import msgspec
import yaml

from mesh.model import QuotaLimit, Snapshot
from mesh.questions import TokenQuestion

UNITS: Final = {"second": 1, "minute": 60, "hour": 3600, "day": 86_400, "week": 604_800, "month": 2_592_000, "year": 31_536_000}
"""Seconds; a month is 30 days and a year 365, as there."""
DOMAIN: Final = "tollhouse"
"""The domain of the limits of QuotaPolicies."""
Entries = Sequence[tuple[str, str]]


class DescriptorError(ValueError):
    """A file that can't be used. Its text is for the one who wrote it, with file and line."""


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
    ours: bool = False
    """Whether the limit has a failure mode of its own: a QuotaPolicy's. Otherwise the asker's applies."""


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

    def __init__(self, limits: Iterable[QuotaLimit]) -> None:
        self._limits = {limit.name: limit for limit in limits}
        self._overrides = {name: dict(limit.overrides) for name, limit in self._limits.items() if limit.overrides}

    @property
    def names(self) -> tuple[str, ...]:
        """The limits that there are, `namespace/policy/limit` each."""
        return tuple(self._limits)

    def limit(self, name: str, values: tuple[str, ...]) -> QuotaLimit | None:
        """The limit of that name with the numbers that these values have."""
        return self._overrides.get(name, {}).get(values) or self._limits.get(name)

    @classmethod
    def of(cls, snapshot: Snapshot) -> PolicyLimits:
        """Those of all QuotaPolicies that are attached to something in `snapshot`."""
        found: dict[str, QuotaLimit] = {}
        for gateway in snapshot.gateways.values():
            for listener in gateway.listeners:
                for host in listener.hosts.values():
                    for matches in (*host.exact.values(), *host.prefix.values(), host.regex):
                        for match in matches:
                            found.update((limit.name, limit) for limit in match.rule.limits)
                            found.update((limit.name, limit) for backend in match.rule.backends for limit in backend.limits)
        return cls(found.values())

    def find(self, domain: str, entries: Entries, override: tuple[int, str] | None) -> Found | None:
        """See `Limits`. Such a limit cannot be overridden."""
        if domain != DOMAIN or not entries or entries[0][0] != "limit":
            return None
        limit = self._limits.get(entries[0][1])
        if limit is None or tuple(key for key, _ in entries[1:]) != tuple(descriptor.kind for descriptor in limit.per):
            return None
        values = tuple(value for _, value in entries[1:])
        if any(part.kind == "constant" and part.argument != value for part, value in zip(limit.per, values, strict=True)):
            return None
        limit = self._overrides.get(limit.name, {}).get(values, limit)
        unit = next((name for name, seconds in UNITS.items() if seconds >= limit.interval), "year")
        requests = int(limit.tokens * UNITS[unit] / limit.interval)
        return Found(TokenQuestion(limit, values, limit.cost), f"{DOMAIN}.{limit.name}", unit, requests, shadow=limit.shadow, ours=True)


class _Node:
    """One descriptor of a file."""

    __slots__ = ("children", "detailed", "limit", "name", "path", "replaces", "requests", "shadow", "unit", "wild")

    def __init__(self, path: str) -> None:
        self.path = path
        self.children: dict[tuple[str, str], _Node] = {}
        self.wild: list[tuple[str, str, _Node]] = []
        self.limit: QuotaLimit | None = None
        self.requests = 0
        self.unit: str | None = None
        """None without a `rate_limit`; empty for an unlimited one."""
        self.name = ""
        self.replaces: frozenset[str] = frozenset()
        self.shadow = False
        self.detailed = False

    def step(self, key: str, value: str) -> _Node | None:
        """The descriptor below for an entry."""
        found = self.children.get((key, value)) if value else None
        if found is None:
            found = next((node for of, start, node in self.wild if of == key and value.startswith(start)), None)
        return found or self.children.get((key, ""))


class Descriptors:
    """The limits of envoyproxy/ratelimit's files."""

    def __init__(self, texts: Mapping[str, str]) -> None:
        """`texts`: YAML by the file's name. Raises DescriptorError."""
        self._domains: dict[str, _Node] = {}
        for name, text in texts.items():
            _File(name, text).load(self._domains)

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
            return Found(TokenQuestion(_limit(rule, requests, unit), key), rule, unit, requests)
        for name, value in entries:
            node = node.step(name, value)
            if node is None:
                return None
        if node.unit is None:
            return None
        rule = f"{node.path}_{entries[-1][1]}" if node.detailed else node.path
        question = TokenQuestion(node.limit, key) if node.limit is not None else None
        return Found(question, rule, node.unit, node.requests, node.name, node.replaces, node.shadow)


def _limit(name: str, requests: int, unit: str, shadow: bool = False) -> QuotaLimit:
    return QuotaLimit(name=name, level="mesh", per=(), tokens=requests, interval=float(UNITS[unit]), burst=requests, shadow=shadow)


_ROOT: Final = {"domain": str, "descriptors": list}
_DESCRIPTOR: Final = {"key": str, "value": str, "rate_limit": dict, "descriptors": list, "shadow_mode": bool, "detailed_metric": bool}
_RATE_LIMIT: Final = {"unit": str, "requests_per_unit": int, "unlimited": bool, "name": str, "replaces": list}
_NAMES: Final = {str: "a text", int: "a whole number", bool: "true or false", list: "a list", dict: "a mapping"}


class _File:
    """Reads one file, knowing the line of everything."""

    def __init__(self, name: str, text: str) -> None:
        self.name = name
        try:
            self.root = yaml.compose(text, Loader=yaml.SafeLoader)
        except yaml.YAMLError as problem:
            mark = getattr(problem, "problem_mark", None)
            where = f"{name}:{mark.line + 1}" if mark else name
            raise DescriptorError(f"{where}: not YAML: {getattr(problem, 'problem', None) or problem}") from None

    def error(self, node: yaml.Node | None, message: str) -> DescriptorError:
        """An error at `node`."""
        return DescriptorError(f"{self.name}:{node.start_mark.line + 1 if node is not None else 1}: {message}")

    def load(self, domains: dict[str, _Node]) -> None:
        """Adds this file's domain."""
        fields = self.fields(self.root, _ROOT, "the file")
        domain = self.text(fields, "domain")
        if not domain:
            raise self.error(self.root, "domain is missing; say which domain these descriptors are for")
        if domain in domains:
            raise self.error(fields["domain"], f"domain {domain} is in another file already; put all its descriptors into one")
        if domain == DOMAIN:
            raise self.error(fields["domain"], f"domain {domain} is that of QuotaPolicies; use another")
        root = _Node(domain)
        self.children(fields, root)
        domains[domain] = root

    def children(self, fields: Mapping[str, yaml.Node], parent: _Node) -> None:
        """Reads `descriptors`."""
        listed = fields.get("descriptors")
        for item in listed.value if isinstance(listed, yaml.SequenceNode) else ():
            self.descriptor(item, parent)

    def descriptor(self, item: yaml.Node, parent: _Node) -> None:
        """Reads one descriptor and those below it."""
        fields = self.fields(item, _DESCRIPTOR, "a descriptor")
        key, value = self.text(fields, "key"), self.text(fields, "value")
        if not key:
            raise self.error(item, "a descriptor needs a key")
        node = _Node(f"{parent.path}.{key}_{value}" if value else f"{parent.path}.{key}")
        if (key, value) in parent.children:
            raise self.error(item, f"{node.path} is there twice")
        parent.children[(key, value)] = node
        if value.endswith("*"):
            parent.wild.append((key, value[:-1], node))
        node.shadow, node.detailed = self.flag(fields, "shadow_mode"), self.flag(fields, "detailed_metric")
        if "rate_limit" in fields:
            self.rate_limit(fields["rate_limit"], node)
        elif node.shadow or node.detailed:
            raise self.error(item, f"{node.path}: shadow_mode and detailed_metric are about a rate_limit, and there is none")
        self.children(fields, node)

    def rate_limit(self, item: yaml.Node, node: _Node) -> None:
        """Reads a `rate_limit`."""
        fields = self.fields(item, _RATE_LIMIT, "rate_limit")
        node.name = self.text(fields, "name")
        names: list[str] = []
        for entry in fields["replaces"].value if "replaces" in fields else ():
            name = self.text(self.fields(entry, {"name": str}, "replaces"), "name")
            if not name or name == node.name:
                raise self.error(entry, "replaces needs the name of another limit")
            names.append(name)
        node.replaces = frozenset(names)
        if self.flag(fields, "unlimited"):
            if "unit" in fields or "requests_per_unit" in fields:
                raise self.error(item, "an unlimited rate_limit has neither unit nor requests_per_unit")
            node.unit = ""
            return
        unit = self.text(fields, "unit").lower()
        if unit not in UNITS:
            raise self.error(fields.get("unit", item), f"unit {unit or 'is missing'}: use one of {', '.join(UNITS)}")
        if "requests_per_unit" not in fields:
            raise self.error(item, "requests_per_unit is missing")
        requests = int(self.scalar(fields["requests_per_unit"]))
        if not 0 <= requests < 2**32:
            raise self.error(fields["requests_per_unit"], "requests_per_unit is from 0 to 4294967295")
        node.unit, node.requests = unit, requests
        node.limit = _limit(node.path, requests, unit, node.shadow)

    def fields(self, node: yaml.Node | None, known: Mapping[str, type], what: str) -> dict[str, yaml.Node]:
        """The fields of a mapping, each known, of its type and there once."""
        if not isinstance(node, yaml.MappingNode):
            raise self.error(node, f"{what} has to be a mapping")
        found: dict[str, yaml.Node] = {}
        for key, value in node.value:
            name = str(key.value)
            if name not in known:
                raise self.error(key, f"{name} is not a field of {what}; there are {', '.join(known)}")
            if name in found:
                raise self.error(key, f"{name} is there twice")
            if not self.fits(value, known[name]):
                raise self.error(value, f"{name} has to be {_NAMES[known[name]]}")
            found[name] = value
        return found

    def fits(self, node: yaml.Node, kind: type) -> bool:
        """Whether a value is of the type of its field. A text may look like something else, as values of descriptors do."""
        if kind is list:
            return isinstance(node, yaml.SequenceNode)
        if kind is dict:
            return isinstance(node, yaml.MappingNode)
        if not isinstance(node, yaml.ScalarNode):
            return False
        return node.tag != "tag:yaml.org,2002:null" if kind is str else type(self.scalar(node)) is kind

    def scalar(self, node: yaml.Node) -> Any:
        """A scalar's value."""
        loader = yaml.SafeLoader("")
        try:
            return loader.construct_object(node)
        except (yaml.YAMLError, ValueError):
            raise self.error(node, f"{node.value} can't be read") from None
        finally:
            loader.dispose()

    def text(self, fields: Mapping[str, yaml.Node], name: str) -> str:
        """A text field, empty when it is not there."""
        return str(fields[name].value) if name in fields else ""

    def flag(self, fields: Mapping[str, yaml.Node], name: str) -> bool:
        """A true-or-false field, false when it is not there."""
        return bool(self.scalar(fields[name])) if name in fields else False
