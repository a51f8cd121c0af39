"""OPA bundles as files: what is in one, and one made of a revision (openpolicyagent.org, "Bundle File Format").

OPA's own reader opens them, in a worker (`pdp/opa/bundles.go`): it checks form, roots and signature. The bundles that are made here keep
names of modules that are no paths in the manifest's metadata, so that whoever reads one gets the revision with the digest that it was made
of.
"""

from __future__ import annotations

import io
import re
import tarfile
import tempfile
import zlib
from collections.abc import Iterable, Mapping
from typing import Any, Final

import msgspec

from mesh.policy import Revision, digest_of_canonical
from pdp.bundle_keys import BundleKey
from pdp.canonical import canonical
from pdp.engines.engine import PolicyError, PolicyProblem
from pdp.publish import Checker, without_tests

MOST_PACKED: Final = 64 << 20
"""Bytes of a bundle as it comes."""
MOST_UNPACKED: Final = 192 << 20
"""Bytes of what is in it."""
FOLDER: Final = "policy/"
"""In front of the names of modules, as in a configuration directory."""
_RENAMED: Final = "renamed/"
"""In front of modules whose names could not be paths in a bundle."""
_CHUNK: Final = 1 << 20
_PLAIN: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(?:/[A-Za-z0-9_][A-Za-z0-9._-]*)*\.rego")


class Bundle(msgspec.Struct, frozen=True, kw_only=True):
    """What is in a bundle."""

    modules: dict[str, str]
    """As `Revision.modules`, tests left out."""
    data: bytes
    """As `Revision.data`, in canonical form."""
    revision: str = ""
    """What its maker calls it."""

    @property
    def digest(self) -> str:
        """Of the revision that it is."""
        return digest_of_canonical(self.modules, self.data)


class _Ours(msgspec.Struct):
    modules: dict[str, str] = {}


class _Metadata(msgspec.Struct):
    tollhouse: _Ours = msgspec.field(default_factory=_Ours)


class _Read(msgspec.Struct):
    modules: dict[str, str] | None = None
    data: str = "{}"
    revision: str = ""
    metadata: _Metadata = msgspec.field(default_factory=_Metadata)


class BundleProblem(ValueError):
    """A bundle that can't be used; the message says why."""


async def read_bundle(checker: Checker, packed: bytes, keys: Iterable[BundleKey] | None = (), key_id: str = "") -> Bundle:
    """Opens a bundle, a gzipped tar.

    With `keys` it must be signed by one of them, by the one called `key_id` if that is given. Without, it must not be signed: whoever signs
    wants it checked. `keys=None` looks at no signature, for a bundle whose digest is known. Raises `BundleProblem`, `EngineUnavailable`.
    """
    check_size(packed)
    known = None if keys is None else {key.id: {"key": key.text, "algorithm": key.algorithm, "scope": key.scope} for key in keys}
    with tempfile.NamedTemporaryFile(prefix="tollhouse-bundle-", suffix=".tar.gz") as file:
        file.write(packed)
        file.flush()
        request = {"file": file.name, "skip": known is None, "verify": bool(known), "keys": known or {}, "keyId": key_id}
        reply = await checker.command({"op": "bundle", "bundle": request})
    if problems := reply.get("problems"):
        raise BundleProblem(_worded("; ".join(str(msgspec.convert(each, PolicyProblem)) for each in problems)))
    try:
        read = msgspec.convert(reply["bundle"], _Read)
        names = read.metadata.tollhouse.modules
        given = read.modules or {}
        modules = {names.get(path, FOLDER + path): source for path, source in given.items()}
        data = await canonical(read.data.encode())
    except (msgspec.ValidationError, ValueError, RuntimeError) as problem:
        raise BundleProblem(f"it can't be used: {problem}") from None
    if len(modules) != len(given):
        raise BundleProblem("its manifest gives one name to several modules")
    return Bundle(modules=without_tests(modules), data=data, revision=read.revision)


def check_size(packed: bytes) -> None:
    """Raises `BundleProblem` for what is no gzip, or larger than is taken, without unpacking more of it than that."""
    if len(packed) > MOST_PACKED:
        raise BundleProblem(f"it has {len(packed)} bytes, at most {MOST_PACKED} are taken")
    unpacker, total, rest = zlib.decompressobj(wbits=31), 0, packed
    try:
        while rest and not unpacker.eof:
            total += len(unpacker.decompress(rest, _CHUNK))
            rest = unpacker.unconsumed_tail
            if total > MOST_UNPACKED:
                raise BundleProblem(f"unpacked it has more than {MOST_UNPACKED} bytes")
    except zlib.error as problem:
        raise BundleProblem(f"it is not a gzipped tar: {problem}") from None
    if not unpacker.eof:
        raise BundleProblem("it is cut off, or not a gzipped tar")


def _worded(said: str) -> str:
    """OPA's words for what somebody has to do something about."""
    if "verification key not provided" in said:
        return "it is signed, and no key to check it with was given"
    if "missing .signatures.json" in said:
        return "it is not signed, and a key to check its signature with is configured"
    if "delta bundles do not support" in said:
        return "it is a delta bundle (patch.json): only snapshots are taken, of which each is a whole revision"
    return said


# Made here


def files_of(revision: Revision) -> dict[str, bytes]:
    """The files of the bundle of a revision, without a signature."""
    names: dict[str, str] = {}
    files: dict[str, bytes] = {}
    for number, name in enumerate(sorted(revision.modules)):
        path = name.removeprefix(FOLDER)
        if not _PLAIN.fullmatch(path) or path.startswith(_RENAMED) or path in files:
            path = f"{_RENAMED}{number}.rego"
        if FOLDER + path != name:
            names[path] = name
        files[path] = revision.modules[name].encode()
    manifest: dict[str, Any] = {"revision": revision.digest, "roots": [""]}
    if names:
        manifest["metadata"] = {"tollhouse": {"modules": names}}
    return {".manifest": msgspec.json.encode(manifest), "data.json": revision.data or b"{}", **files}


def packed(files: Mapping[str, bytes]) -> bytes:
    """A gzipped tar, the same bytes for the same files."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo("/" + name)
            member.size, member.mode = len(content), 0o644
            tar.addfile(member, io.BytesIO(content))
    packer = zlib.compressobj(wbits=31)
    return packer.compress(out.getvalue()) + packer.flush()


async def signature(checker: Checker, files: Mapping[str, bytes], key: BundleKey) -> bytes:
    """`.signatures.json` for the files of a bundle. Raises `PolicyError` when the key can't sign, `EngineUnavailable`."""
    request = {
        "files": {name: content.decode() for name, content in files.items()},
        "key": key.text,
        "keyId": key.id,
        "algorithm": key.algorithm,
        "scope": key.scope,
    }
    reply = await checker.command({"op": "sign", "bundle": request})
    if problems := reply.get("problems"):
        raise PolicyError(msgspec.convert(problems, tuple[PolicyProblem, ...]))
    return msgspec.json.encode({"signatures": [reply["bundle"]["token"]]})


async def bundle_of(revision: Revision, checker: Checker | None = None, key: BundleKey | None = None) -> bytes:
    """The bundle of a revision, signed with `key` if there is one. Raises `PolicyError`, `EngineUnavailable`."""
    files = files_of(revision)
    if key is not None:
        if checker is None:
            raise ValueError("a worker is needed to sign")
        files = {".signatures.json": await signature(checker, files, key), **files}
    return packed(files)
