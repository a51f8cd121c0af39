"""A policy that comes as an OPA bundle: from a file, or from a bundle server."""

from __future__ import annotations

import ssl
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from pdp.bundle_fetch import Fetched, FetchProblem, fetch
from pdp.bundle_files import MOST_PACKED, Bundle, BundleProblem, read_bundle
from pdp.bundle_keys import KeyProblem, checking_key, secret_in
from pdp.bundle_services import Access, BundleServices, ServicesProblem
from pdp.publish import Checker
from tollhouse.output import Complaint


class BundleSource(msgspec.Struct, frozen=True, kw_only=True):
    """What the command line says about where a bundle is, and how it is checked."""

    where: str
    """A path, or an http(s) URL."""
    key: Path | None = None
    """What its signature is checked with; without one it must not be signed."""
    algorithm: str = ""
    scope: str = ""
    token: Path | None = None
    ca: Path | None = None
    services: Path | None = None
    """In place of all that: a file that says it of bundle servers."""


def is_url(where: str) -> bool:
    """Whether a source is a bundle server's."""
    return where.startswith(("http://", "https://"))


async def open_bundle(source: BundleSource, checker: Checker) -> Bundle:
    """Fetches, checks and opens a bundle. Raises `Complaint`, `EngineUnavailable`."""
    access = access_of(source)
    try:
        packed = (await fetched(source, access)).body or b"" if is_url(source.where) else _read(Path(source.where))
        return await opened(source, packed, access, checker)
    except FetchProblem as problem:
        raise Complaint(f"{problem}{_hint(str(problem), source)}") from None
    except BundleProblem as problem:
        raise Complaint(f"the bundle {source.where} can't be used: {problem}") from None


async def fetched(source: BundleSource, access: Access, *, etag: str = "", wait: int = 0) -> Fetched:
    """What a bundle server answers. Raises `FetchProblem`."""
    own = access if source.services is None else None
    return await fetch(source.where, BundleServices(source.services), access=own, etag=etag, wait=wait)


async def opened(source: BundleSource, packed: bytes, access: Access, checker: Checker) -> Bundle:
    """What is in a bundle. Raises `BundleProblem`, `EngineUnavailable`."""
    # With one key it is the one, whatever the signature calls it; but a file of services names it.
    key_id = access.key.id if access.key is not None else ""
    return await read_bundle(checker, packed, [access.key] if access.key is not None else [], key_id)


def access_of(source: BundleSource) -> Access:
    """What goes with the source. Raises `Complaint`."""
    url = source.where
    try:
        if source.services is not None:
            return BundleServices(source.services).access(url)
        key = checking_key(source.key, algorithm=source.algorithm, scope=source.scope) if source.key is not None else None
        token = secret_in(source.token) if source.token is not None else ""
    except ServicesProblem as problem:
        raise Complaint(f"--bundle-services: {problem}", 2) from None
    except KeyProblem as problem:
        raise Complaint(str(problem), 2) from None
    if token and urlsplit(url).scheme != "https" and urlsplit(url).hostname not in {"127.0.0.1", "::1", "localhost"}:
        raise Complaint(f"{url}: a token is not sent in plaintext over a network; use https", 2)
    try:
        tls = ssl.create_default_context(cafile=str(source.ca)) if source.ca is not None else None
    except (OSError, ssl.SSLError) as problem:
        raise Complaint(f"--ca: {source.ca} can't be used: {problem}", 2) from None
    return Access(token=token, tls=tls, key=key)


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(MOST_PACKED + 1)
    except OSError as problem:
        raise Complaint(f"{path}: {problem.strerror}") from None


def _hint(problem: str, source: BundleSource) -> str:
    wants = "it wants credentials" in problem and source.services is None
    return "; give --token FILE, or --bundle-services FILE" if wants else ""
