"""Fetches key sets over HTTP, by their address or by OpenID Connect Discovery (section 4), with aiohttp.

Bounded in bytes, in redirects and, by whoever asks, in time. Never followed: a redirect from https to http; never connected to: addresses
of the link (where clouds tell instances their secrets), multicast, and the unspecified one.
"""

from __future__ import annotations

import ipaddress
import ssl
from pathlib import Path
from typing import Any, Final
from urllib.parse import urljoin, urlsplit

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.resolver import DefaultResolver

from identity.jwks import FetchError
from mesh.jwks import MOST_BYTES, strict_json
from mesh.kinds_jwt import key_uri
from mesh.tokens import KeySource

REDIRECTS: Final = 3
WELL_KNOWN: Final = "/.well-known/openid-configuration"
_MOVED: Final = frozenset((301, 302, 303, 307, 308))


class JwksFetcher:
    """Owns the HTTP client. Made in a running event loop."""

    def __init__(self, roots: Path | None = None) -> None:
        """`roots`: PEM of the CAs that key servers' certificates are verified by, in place of the system's. Raises OSError."""
        self._tls = ssl.create_default_context(cafile=str(roots) if roots is not None else None)
        self._session: aiohttp.ClientSession | None = None

    async def __call__(self, source: KeySource) -> bytes:
        """As `identity.jwks.Fetch`."""
        uri = source.uri or await self._discover(source.issuer)
        return await self._get(uri)

    async def close(self) -> None:
        """Ends the client."""
        if self._session is not None:
            await self._session.close()

    async def _discover(self, issuer: str) -> str:
        where = issuer + WELL_KNOWN
        try:
            body: Any = strict_json(await self._get(where))
        except ValueError as problem:
            raise FetchError(f"the OpenID configuration at {where} can't be read: {problem}") from None
        uri = body.get("jwks_uri") if isinstance(body, dict) else None
        if not isinstance(uri, str) or key_uri(uri):
            raise FetchError(f"the OpenID configuration at {where} has no jwks_uri to fetch keys from")
        if where.startswith("https:") and not uri.startswith("https:"):
            raise FetchError(f"the OpenID configuration at {where} names a jwks_uri without TLS")
        return uri

    async def _get(self, uri: str) -> bytes:
        for _ in range(REDIRECTS + 1):
            check_host(uri)
            try:
                found = await self._once(uri)
            except (aiohttp.ClientError, OSError, ValueError) as problem:
                raise FetchError(f"{uri}: {str(problem) or type(problem).__name__}") from None
            if isinstance(found, bytes):
                return found
            target = urljoin(uri, found)
            if key_uri(target) or (uri.startswith("https:") and not target.startswith("https:")):
                raise FetchError(f"{uri} redirects to where keys are not fetched from")
            uri = target
        raise FetchError(f"{uri}: more than {REDIRECTS} redirects")

    async def _once(self, uri: str) -> bytes | str:
        """The body, or where it has moved to."""
        if self._session is None:
            connector = aiohttp.TCPConnector(ssl=self._tls, resolver=PublicResolver(), limit=16, force_close=True)
            self._session = aiohttp.ClientSession(
                connector=connector, auto_decompress=False, cookie_jar=aiohttp.DummyCookieJar(), trust_env=False
            )
        headers = {"accept": "application/json", "accept-encoding": "identity", "user-agent": "tollhouse"}
        async with self._session.get(uri, allow_redirects=False, headers=headers) as answer:
            if answer.status in _MOVED and "location" in answer.headers:
                return answer.headers["location"]
            if answer.status != 200:
                raise FetchError(f"{uri} answers with {answer.status}")
            body = bytearray()
            async for chunk in answer.content.iter_chunked(65536):
                body += chunk
                if len(body) > MOST_BYTES:
                    raise FetchError(f"{uri} answers with more than {MOST_BYTES} bytes")
            return bytes(body)


def check_host(uri: str) -> None:
    """An address that is written in the URI itself must be one to connect to. Raises `FetchError`."""
    host = urlsplit(uri).hostname or ""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return
    if not is_public(str(address)):
        raise FetchError(f"{uri}: nothing is fetched from {host}")


def is_public(text: str) -> bool:
    """Whether something may be fetched from an IP address."""
    address = ipaddress.ip_address(text.partition("%")[0])
    mapped = getattr(address, "ipv4_mapped", None) or address
    return not (mapped.is_link_local or mapped.is_multicast or mapped.is_unspecified)


class PublicResolver(AbstractResolver):
    """Resolves names to the addresses that may be connected to."""

    def __init__(self) -> None:
        self._inner = DefaultResolver()

    async def resolve(self, host: str, port: int = 0, family: Any = 0) -> list[ResolveResult]:
        """As `AbstractResolver.resolve`."""
        found = [each for each in await self._inner.resolve(host, port, family) if is_public(each["host"])]
        if not found:
            raise OSError(f"{host} has no address that may be connected to")
        return found

    async def close(self) -> None:
        """As `AbstractResolver.close`."""
        await self._inner.close()
