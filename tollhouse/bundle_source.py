"""A policy that comes as an OPA bundle: from a file, or from a bundle server."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import aiohttp
import msgspec

from pdp.bundle_files import MOST_PACKED, Bundle, BundleProblem, read_bundle
from pdp.bundle_keys import BundleKey, KeyProblem, checking_key, secret_in
from pdp.publish import Checker
from tollhouse.output import Complaint

BUDGET: Final = 60.0
"""Seconds that a bundle server has for all of a bundle."""


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


def is_url(where: str) -> bool:
    """Whether a source is a bundle server's."""
    return where.startswith(("http://", "https://"))


async def open_bundle(source: BundleSource, checker: Checker) -> Bundle:
    """Fetches, checks and opens a bundle. Raises `Complaint`, `EngineUnavailable`."""
    keys: list[BundleKey] = []
    try:
        if source.key is not None:
            keys.append(checking_key(source.key, algorithm=source.algorithm, scope=source.scope))
        token = secret_in(source.token) if source.token is not None else ""
    except KeyProblem as problem:
        raise Complaint(str(problem), 2) from None
    packed = await fetched(source, token) if is_url(source.where) else _read(Path(source.where))
    try:
        # With one key it is the one, whatever the signature calls it.
        return await read_bundle(checker, packed, keys, keys[0].id if keys else "")
    except BundleProblem as problem:
        raise Complaint(f"the bundle {source.where} can't be used: {problem}") from None


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(MOST_PACKED + 1)
    except OSError as problem:
        raise Complaint(f"{path}: {problem.strerror}") from None


async def fetched(source: BundleSource, token: str) -> bytes:
    """What a bundle server answers. Raises `Complaint`."""
    url = source.where
    if token and urlsplit(url).scheme != "https" and urlsplit(url).hostname not in {"127.0.0.1", "::1", "localhost"}:
        raise Complaint(f"{url}: a token is not sent in plaintext over a network; use https", 2)
    try:
        tls = ssl.create_default_context(cafile=str(source.ca) if source.ca is not None else None)
    except (OSError, ssl.SSLError) as problem:
        raise Complaint(f"--ca: {source.ca} can't be used: {problem}", 2) from None
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    received = bytearray()
    try:
        async with (
            asyncio.timeout(BUDGET),
            aiohttp.ClientSession(auto_decompress=False) as session,
            session.get(url, headers=headers, ssl=tls, allow_redirects=False) as answer,
        ):
            if answer.status != 200:
                raise Complaint(f"{url} answered with {answer.status}{_hint(answer.status, bool(token))}")
            async for chunk in answer.content.iter_any():
                received += chunk
                if len(received) > MOST_PACKED:
                    raise Complaint(f"{url} sends more than {MOST_PACKED} bytes")
    except TimeoutError:
        raise Complaint(f"{url} did not send all of the bundle within {BUDGET:g} s") from None
    except (aiohttp.ClientError, aiohttp.InvalidURL, OSError, ValueError) as problem:
        raise Complaint(f"{url}: {problem}") from None
    return bytes(received)


def _hint(status: int, token: bool) -> str:
    if status in {401, 403}:
        return ": it does not take this token" if token else ": it wants a token, give --token FILE"
    return ": redirects are not followed, give the URL that it leads to" if 300 <= status < 400 else ""
