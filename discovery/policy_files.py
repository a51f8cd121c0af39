"""The Rego and the data below `policy/`, laid out as an OPA bundle (openpolicyagent.org, "Bundle File Format").

`policy/shop/authz.rego` is a module; `policy/shop/data.yaml` holds what is at `data.shop`. Files that disagree about a path are a
problem, and the first of them (by path) counts.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
import yaml

from discovery.source import PolicyFiles
from mesh.documents import Problem

FOLDER = "policy"
DATA_NAMES = frozenset({"data.json", "data.yaml", "data.yml"})
_BASE: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class PolicyFile(msgspec.Struct, frozen=True):
    """One good file: a module's text, or the JSON value of a data file."""

    module: str = ""
    value: Any = None


class _Loader(_BASE):  # type: ignore[misc]
    """Plain values only; a date is a string, as it is in JSON."""


_Loader.add_constructor("tag:yaml.org,2002:timestamp", lambda loader, node: loader.construct_scalar(node))


def belongs(parts: tuple[str, ...]) -> bool:
    """Whether a file's path (relative to the directory) is one of policy that counts."""
    if parts[0] != FOLDER or len(parts) < 2:
        return False
    name = parts[-1]
    return name in DATA_NAMES or (name.endswith(".rego") and not name.endswith("_test.rego"))


def read_policy_file(path: str, content: bytes) -> PolicyFile:
    """What a file holds. Raises ValueError, worded for people."""
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8: {error.reason} at byte {error.start}") from error
    if path.endswith(".rego"):
        return PolicyFile(module=text)
    try:
        value = json.loads(text) if path.endswith(".json") else _load_yaml(text)
        value = json.loads(json.dumps(value, allow_nan=False))
    except RecursionError as error:
        raise ValueError("too many values inside each other") from error
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise ValueError(f"not valid {'JSON' if path.endswith('.json') else 'YAML'}: {' '.join(str(error).split())}") from error
    if path.count("/") == 1 and not isinstance(value, dict):
        raise ValueError("the data at the root must be an object (a mapping)")
    return PolicyFile(value=value)


def _load_yaml(text: str) -> Any:
    if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, _Loader)):  # a few lines of them can stand for any size
        raise ValueError("aliases are not supported in data files; write the values out")
    value = yaml.load(text, _Loader)  # noqa: S506 -- a safe loader
    return {} if value is None else value


def put_together(files: Mapping[str, PolicyFile]) -> tuple[PolicyFiles, tuple[Problem, ...]]:
    """All good files, by path, as one, and what does not fit together."""
    modules: dict[str, str] = {}
    data: dict[str, Any] = {}
    owners: dict[tuple[str, ...], str] = {}
    problems: list[Problem] = []
    for path in sorted(files):
        file = files[path]
        if path.endswith(".rego"):
            modules[path] = file.module
            continue
        for at in _merge(data, tuple(path.split("/")[1:-1]), file.value, owners, path):
            other = next((owners[at[:length]] for length in range(len(at), 0, -1) if at[:length] in owners), "another file")
            problems.append(
                Problem(
                    key=None,
                    message=f"data.{'.'.join(at)} is given here and, differently, in {other}, which counts; give it once",
                    where=path,
                    reason="Conflict",
                )
            )
    return PolicyFiles(modules=modules, data=json.dumps(data, sort_keys=True, separators=(",", ":")).encode()), tuple(problems)


def _merge(
    data: dict[str, Any], at: tuple[str, ...], value: Any, owners: dict[tuple[str, ...], str], path: str
) -> Iterable[tuple[str, ...]]:
    """Puts `value` into `data` at a path; gives the paths at which there is something else already."""
    if isinstance(value, dict) and (not at or isinstance(_at(data, at), dict)):
        for name, inner in value.items():
            yield from _merge(data, (*at, name), inner, owners, path)
        return
    here: Any = data
    for length, name in enumerate(at[:-1], 1):
        here = here.setdefault(name, {})
        if not isinstance(here, dict):
            yield at[:length]
            return
    if at[-1] not in here:
        here[at[-1]] = _copy(value)
        _own(at, value, owners, path)
    elif here[at[-1]] != value or type(here[at[-1]]) is not type(value):
        yield at


def _at(data: Any, at: tuple[str, ...]) -> Any:
    for name in at:
        if not isinstance(data, dict) or name not in data:
            return None
        data = data[name]
    return data


def _copy(value: Any) -> Any:
    return {name: _copy(inner) for name, inner in value.items()} if isinstance(value, dict) else value


def _own(at: tuple[str, ...], value: Any, owners: dict[tuple[str, ...], str], path: str) -> None:
    owners[at] = path
    if isinstance(value, dict):
        for name, inner in value.items():
            _own((*at, name), inner, owners, path)
