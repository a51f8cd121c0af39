"""A folder of policy as its author has it: modules, tests, data, JSON schemas, and OPA's `.manifest`.

The layout is OPA's ("Bundle File Format", and `opa check --schema schemas` for the schemas): `data.json` and `data.yaml` hold what
is at their folder's path below `data`, `schemas/a/b.json` is what METADATA calls `schema.a.b`. Hidden folders are passed over.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec

from discovery.policy_files import DATA_NAMES, FOLDER, PolicyFile, put_together, read_policy_file
from pdp.engines.engine import PolicyError, PolicyProblem
from tollhouse.output import Complaint

MANIFEST: Final = ".manifest"
SCHEMAS: Final = "schemas"

T = TypeVar("T")


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """OPA's `.manifest`."""

    revision: str = ""
    roots: tuple[str, ...] = ("",)
    """Paths below `data` that the folder owns; everything is below one of them. `""` is everything."""
    rego_version: int = 1
    file_rego_versions: dict[str, int] = {}
    wasm: tuple[Any, ...] = ()
    metadata: dict[str, Any] = {}

    def owns(self, path: str) -> bool:
        """Whether `a/b` is within a root."""
        return any(not root or path == root or path.startswith(root + "/") for root in self.roots)


class PolicyFolder(msgspec.Struct, frozen=True, kw_only=True):
    """What is in a folder. Files are named as in a revision: `policy/shop/authz.rego`."""

    path: Path
    modules: dict[str, str]
    """Tests too."""
    data: bytes
    schemas: dict[str, Any]
    """By path below `schemas/`, without `.json`."""
    manifest: Manifest

    def shown(self, file: str) -> str:
        """Where the user finds a file that is named as in a revision."""
        below = file.removeprefix(f"{FOLDER}/")
        return str(self.path / below) if below != file else file


def read_folder(path: Path) -> PolicyFolder:
    """Reads a folder. Raises `PolicyError` with all files that can't be used, and `Complaint` when there is no Rego at all."""
    problems: list[PolicyProblem] = []

    def take(file: Path, read: Callable[[bytes], T]) -> T | None:
        try:
            return read(file.read_bytes())
        except OSError as problem:
            problems.append(PolicyProblem(file=_label(path, file), message=problem.strerror or str(problem)))
        except ValueError as problem:
            problems.append(PolicyProblem(file=_label(path, file), message=str(problem)))
        return None

    found: dict[str, PolicyFile] = {}
    schemas: dict[str, Any] = {}
    for file in files(path):
        below = file.relative_to(path)
        if below.parts[0] == SCHEMAS and file.suffix == ".json":
            schema = take(file, _schema)
            if schema is not None:
                schemas["/".join(below.with_suffix("").parts[1:])] = schema
        elif file.suffix == ".rego" or file.name in DATA_NAMES:
            label = _label(path, file)
            one = take(file, lambda content, label=label: read_policy_file(label, content))  # type: ignore[misc]  # a default binds it
            if one is not None:
                found[label] = one
    manifest = take(path / MANIFEST, _manifest) if (path / MANIFEST).is_file() else Manifest()
    together, clashes = put_together(found)
    problems += [PolicyProblem(file=clash.where, message=clash.message) for clash in clashes]
    if problems:
        raise PolicyError(tuple(problems))
    if not together.modules:
        raise Complaint(f"{path} has no .rego file; `tollhouse policy init {path}` makes a policy to begin with", 2)
    return PolicyFolder(path=path, modules=dict(together.modules), data=together.data, schemas=schemas, manifest=manifest or Manifest())


def _label(path: Path, file: Path) -> str:
    return f"{FOLDER}/{file.relative_to(path)}"


def files(path: Path) -> Iterator[Path]:
    """The files of a folder that may matter, in order; nothing hidden."""
    for file in sorted(path.rglob("*")):
        if not any(part.startswith(".") for part in file.relative_to(path).parts) and file.is_file():
            yield file


def outside_roots(folder: PolicyFolder, packages: Mapping[str, str]) -> tuple[PolicyProblem, ...]:
    """What is not within the roots of the manifest; `packages` are those of the modules (`data.shop.authz`)."""
    manifest, problems = folder.manifest, []
    roots = ", ".join(repr(root) for root in manifest.roots)
    for file, package in sorted(packages.items()):
        path = package.removeprefix("data.").replace(".", "/")
        if not manifest.owns(path):
            said = f"package {package.removeprefix('data.')} is outside of the roots in {MANIFEST} ({roots}); add {path.split('/', 1)[0]!r}"
            problems.append(PolicyProblem(file=file, row=1, message=said))
    for path in _leaves(json.loads(folder.data), ()):
        if not manifest.owns(path):
            said = f"data.{path.replace('/', '.')} is outside of the roots in {MANIFEST} ({roots}); add {path.split('/', 1)[0]!r}"
            problems.append(PolicyProblem(file=f"{FOLDER}/{MANIFEST}", message=said))
            break
    return tuple(problems)


def _leaves(value: Any, at: tuple[str, ...]) -> Iterator[str]:
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from _leaves(inner, (*at, name))
    elif at:
        yield "/".join(at)


def _schema(content: bytes) -> Any:
    try:
        schema = json.loads(content)
    except (ValueError, RecursionError) as problem:
        raise ValueError(f"not a JSON schema: {problem}") from None
    if not isinstance(schema, dict | bool):
        raise ValueError("not a JSON schema: that is an object")  # noqa: TRY004 -- as any other file that can't be used
    return schema


def _manifest(content: bytes) -> Manifest:
    try:
        manifest = msgspec.json.decode(content, type=Manifest)
    except (msgspec.DecodeError, RecursionError) as problem:
        raise ValueError(f"not a manifest of an OPA bundle: {problem}") from None
    if manifest.rego_version != 1 or any(version != 1 for version in manifest.file_rego_versions.values()):
        raise ValueError("Rego of version 0 is not supported here: `opa fmt --v0-v1 -w` rewrites it, then rego_version is 1")
    if manifest.wasm:
        raise ValueError("wasm is not supported here: the folder's Rego is what is evaluated")
    roots = tuple(root.strip("/") for root in manifest.roots)
    for one in roots:
        for other in roots:
            if one != other and (not one or other.startswith(one + "/")):
                raise ValueError(f"the roots {one!r} and {other!r} are one in the other; name the outer one only")
    return msgspec.structs.replace(manifest, roots=roots)
