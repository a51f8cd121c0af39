"""Reads the files of envoyproxy/ratelimit: what `quota.descriptors.Descriptors` looks limits up in.

The YAML is the one of github.com/envoyproxy/ratelimit ("Configuration"): `domain`, and nested `descriptors` of `key`, `value`, `rate_limit`
(`unit`, `requests_per_unit`, `unlimited`, `name`, `replaces`), `shadow_mode`, `quota_mode`, `detailed_metric`, `value_to_metric` and
`share_threshold`. It is read strictly: an unknown or misplaced field is an error that says where.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import yaml

from mesh.model import QuotaLimit

UNITS: Final = {"second": 1, "minute": 60, "hour": 3600, "day": 86_400, "week": 604_800, "month": 2_592_000, "year": 31_536_000}
"""Seconds; a month is 30 days and a year 365, as there."""
DOMAIN: Final = "tollhouse"
"""The domain of the limits of QuotaPolicies."""


class DescriptorError(ValueError):
    """A file that can't be used. Its text is for the one who wrote it, with file and line."""


class Node:
    """One descriptor of a file."""

    __slots__ = (
        "by_value",
        "children",
        "detailed",
        "limit",
        "name",
        "path",
        "quota",
        "replaces",
        "requests",
        "shadow",
        "shared",
        "unit",
        "value",
        "wild",
    )

    def __init__(self, path: str, value: str = "") -> None:
        self.path = path
        self.value = value
        """As in the file: it may end in `*`, or be empty for any."""
        self.children: dict[tuple[str, str], Node] = {}
        self.wild: list[tuple[str, str, Node]] = []
        self.limit: QuotaLimit | None = None
        self.requests = 0
        self.unit: str | None = None
        """None without a `rate_limit`; empty for an unlimited one."""
        self.name = ""
        self.replaces: frozenset[str] = frozenset()
        self.shadow = False
        self.quota = False
        """Over the limit is OK, and said in the answer's metadata."""
        self.detailed = False
        self.by_value = False
        """`value_to_metric`."""
        self.shared = False
        """`share_threshold`: all values that match share a bucket."""

    def step(self, key: str, value: str) -> Node | None:
        """The descriptor below for an entry."""
        found = self.children.get((key, value)) if value else None
        if found is None:
            found = next((node for of, start, node in self.wild if of == key and value.startswith(start)), None)
        return found or self.children.get((key, ""))


def limit_of(name: str, requests: int, unit: str, shadow: bool = False) -> QuotaLimit:
    """The bucket of `requests` a `unit`."""
    return QuotaLimit(name=name, level="mesh", per=(), tokens=requests, interval=float(UNITS[unit]), burst=requests, shadow=shadow)


_ROOT: Final = {"domain": str, "descriptors": list}
_FLAGS: Final = ("shadow_mode", "quota_mode", "detailed_metric", "value_to_metric", "share_threshold")
_DESCRIPTOR: Final = {"key": str, "value": str, "rate_limit": dict, "descriptors": list, **dict.fromkeys(_FLAGS, bool)}
_RATE_LIMIT: Final = {"unit": str, "requests_per_unit": int, "unlimited": bool, "name": str, "replaces": list}
_NAMES: Final = {str: "a text", int: "a whole number", bool: "true or false", list: "a list", dict: "a mapping"}


class File:
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

    def load(self, domains: dict[str, Node]) -> None:
        """Adds this file's domain."""
        fields = self.fields(self.root, _ROOT, "the file")
        domain = self.text(fields, "domain")
        if not domain:
            raise self.error(self.root, "domain is missing; say which domain these descriptors are for")
        if domain in domains:
            raise self.error(fields["domain"], f"domain {domain} is in another file already; put all its descriptors into one")
        if domain == DOMAIN:
            raise self.error(fields["domain"], f"domain {domain} is that of QuotaPolicies; use another")
        root = Node(domain)
        self.children(fields, root)
        domains[domain] = root

    def children(self, fields: Mapping[str, yaml.Node], parent: Node) -> None:
        """Reads `descriptors`."""
        listed = fields.get("descriptors")
        for item in listed.value if isinstance(listed, yaml.SequenceNode) else ():
            self.descriptor(item, parent)

    def descriptor(self, item: yaml.Node, parent: Node) -> None:
        """Reads one descriptor and those below it."""
        fields = self.fields(item, _DESCRIPTOR, "a descriptor")
        key, value = self.text(fields, "key"), self.text(fields, "value")
        if not key:
            raise self.error(item, "a descriptor needs a key")
        node = Node(f"{parent.path}.{key}_{value}" if value else f"{parent.path}.{key}", value)
        if (key, value) in parent.children:
            raise self.error(item, f"{node.path} is there twice")
        parent.children[(key, value)] = node
        if value.endswith("*"):
            parent.wild.append((key, value[:-1], node))
        node.shadow, node.quota = self.flag(fields, "shadow_mode"), self.flag(fields, "quota_mode")
        node.detailed, node.by_value = self.flag(fields, "detailed_metric"), self.flag(fields, "value_to_metric")
        node.shared = self.flag(fields, "share_threshold")
        if node.shared and not value.endswith("*"):
            raise self.error(fields["share_threshold"], f"{node.path}: share_threshold is for values that end in *")
        if node.shadow and node.quota:
            raise self.error(fields["quota_mode"], f"{node.path}: shadow_mode and quota_mode exclude each other")
        if "rate_limit" in fields:
            self.rate_limit(fields["rate_limit"], node)
        elif node.shadow or node.quota or node.detailed:
            raise self.error(item, f"{node.path}: shadow_mode, quota_mode and detailed_metric are about a rate_limit, and there is none")
        self.children(fields, node)

    def rate_limit(self, item: yaml.Node, node: Node) -> None:
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
        node.limit = limit_of(node.path, requests, unit, node.shadow or node.quota)

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
