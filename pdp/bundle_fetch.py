"""Bundles over HTTP, as a client of the Bundle Service API (openpolicyagent.org, "Bundles").

Bounded in bytes, in time and in redirects. Never followed: a redirect from https to http; never connected to: addresses of the link (where
clouds tell instances their secrets), multicast, and the unspecified one. Credentials go to the URLs that they are for, and not after a
redirect to others.
"""

from __future__ import annotations

import asyncio
from typing import Final
from urllib.parse import urljoin, urlsplit

import aiohttp
import msgspec

from identity.jwks import FetchError
from identity.jwks_fetch import PublicResolver, check_host
from mesh.formats import bundle_url
from pdp.bundle_files import MOST_PACKED
from pdp.bundle_services import Access, BundleServices, ServicesProblem

BUDGET: Final = 120.0
"""Seconds that a server has for all of a bundle, besides those that it was asked to wait for a new one."""
CONNECT: Final = 10.0
"""Seconds until it must have taken the connection."""
REDIRECTS: Final = 5
LONG_POLL: Final = "application/vnd.openpolicyagent.bundles"
"""The type of answers of servers that understand long polling."""
_MOVED: Final = frozenset((301, 302, 303, 307, 308))


class FetchProblem(Exception):
    """Why a bundle can't be had now, in one sentence."""


class Fetched(msgspec.Struct, frozen=True):
    """What a server answered."""

    body: bytes | None
    """The bundle; None when it is the one that is known."""
    access: Access
    """What went with the URL that was asked for."""
    etag: str = ""
    long_poll: bool = False
    """Whether the server holds a request until there is a new one."""


async def fetch(
    url: str, services: BundleServices, *, access: Access | None = None, etag: str = "", wait: int = 0, budget: float = BUDGET
) -> Fetched:
    """Fetches the bundle at `url`, unless it is the one that has the `etag`; `wait` is for how many seconds the server may hold the request
    until there is another. What goes with it is `services`' to say, or `access` for the first URL. Raises `FetchProblem`."""
    headers = {"Accept-Encoding": "identity", "User-Agent": "tollhouse"}
    headers |= {"If-None-Match": etag} if etag else {}
    # Not the modes=snapshot,delta of OPA's own client: a delta is no revision.
    headers |= {"Prefer": f"modes=snapshot;wait={wait}" if wait else "modes=snapshot"}
    first: Access | None = access
    where = url
    try:
        async with asyncio.timeout(budget + wait):
            for _ in range(REDIRECTS + 1):
                if wrong := bundle_url(where):
                    raise FetchProblem(f"{url} leads to what {wrong}")
                check_host(where)
                used = access if where == url and access is not None else await asyncio.to_thread(services.access, where)
                first = first or used
                found = await _once(where, used, headers)
                if isinstance(found, str):
                    target = urljoin(where, found)
                    if where.startswith("https:") and not target.startswith("https:"):
                        raise FetchProblem(f"{where} redirects to where there is no TLS, which is not followed")
                    where = target
                    continue
                return msgspec.structs.replace(found, access=first)
    except TimeoutError:
        raise FetchProblem(f"{where} did not send all of the bundle within {budget + wait:g} s") from None
    except (FetchError, ServicesProblem) as problem:
        raise FetchProblem(str(problem)) from None
    except (aiohttp.ClientError, OSError, ValueError) as problem:
        raise FetchProblem(f"{where}: {str(problem) or type(problem).__name__}") from None
    raise FetchProblem(f"{url}: more than {REDIRECTS} redirects")


async def _once(url: str, access: Access, headers: dict[str, str]) -> Fetched | str:
    """What one server says, or where it sends us."""
    sent = headers | ({"Authorization": f"Bearer {access.token}"} if access.token else {})
    connector = aiohttp.TCPConnector(ssl=access.tls or True, resolver=PublicResolver(), force_close=True)
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT)
    async with (
        aiohttp.ClientSession(
            connector=connector, timeout=timeout, auto_decompress=False, cookie_jar=aiohttp.DummyCookieJar(), trust_env=False
        ) as session,
        session.get(url, headers=sent, allow_redirects=False) as answer,
    ):
        if answer.status in _MOVED and "location" in answer.headers:
            return answer.headers["location"]
        etag, waits = answer.headers.get("etag", ""), answer.content_type == LONG_POLL
        if answer.status == 304 and "If-None-Match" in headers:
            return Fetched(None, access, etag or headers["If-None-Match"], waits)
        if answer.status != 200:
            raise FetchProblem(f"{url} answered with {answer.status}{_hint(answer.status, access, url)}")
        body = bytearray()
        async for chunk in answer.content.iter_any():
            body += chunk
            if len(body) > MOST_PACKED:
                raise FetchProblem(f"{url} sends more than {MOST_PACKED} bytes")
        return Fetched(bytes(body), access, etag, waits)


def _hint(status: int, access: Access, url: str) -> str:
    if status not in {401, 403}:
        return ""
    return ": it does not take this token" if access.token else f": it wants credentials; there are none for {urlsplit(url).hostname}"
