"""For the tests of bundles: keys in files, tars by hand, and a checker."""

from __future__ import annotations

import gzip
import io
import tarfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from mesh.policy import EntryPoint, ReadSet, Revision, digest_of
from pdp.build import worker_binary
from pdp.engines.worker import WorkerPool

KINDS = ("RS256", "ES256", "HS256")
_made: dict[str, tuple[str, str]] = {}


def key_texts(kind: str, which: int = 0) -> tuple[str, str]:
    """The private and the public key, PEM, or the secret twice."""
    name = f"{kind}{which}"
    if name not in _made:
        if kind == "HS256":
            _made[name] = (f"{which}secret" * 8, f"{which}secret" * 8)
        else:
            key = rsa.generate_private_key(65537, 2048) if kind == "RS256" else ec.generate_private_key(ec.SECP256R1())
            private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
            public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
            _made[name] = (private, public)
    return _made[name]


def key_files(folder: Path, kind: str, which: int = 0) -> tuple[Path, Path]:
    """The same in two files that only we may read."""
    paths = folder / f"{kind}{which}.key", folder / f"{kind}{which}.pub"
    for path, text in zip(paths, key_texts(kind, which), strict=True):
        path.write_text(text)
        path.chmod(0o600)
    return paths


def tar_of(files: Mapping[str, str]) -> bytes:
    """A gzipped tar."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, text in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(text.encode())
            tar.addfile(member, io.BytesIO(text.encode()))
    return gzip.compress(out.getvalue())


def files_in(packed: bytes) -> dict[str, str]:
    """What is in one."""
    with tarfile.open(fileobj=io.BytesIO(gzip.decompress(packed))) as tar:
        return {member.name: (tar.extractfile(member) or io.BytesIO()).read().decode() for member in tar.getmembers()}


def made(modules: Mapping[str, str], data: bytes = b"{}", *decisions: str) -> Revision:
    """A revision with its real digest."""
    points = {path: EntryPoint(path=path, digest="0" * 64, reads=ReadSet()) for path in decisions}
    return Revision(digest=digest_of(modules, data), modules=dict(modules), data=data, entry_points=points)


@asynccontextmanager
async def a_checker() -> AsyncIterator[WorkerPool]:
    """A pool for commands only."""
    pool = WorkerPool(binary=worker_binary(), workers=0)
    await pool.start()
    try:
        yield pool
    finally:
        await pool.close()
