"""Names of endpoints to addresses, off the loop, bounded in time and number, kept for a while.

Only endpoints outside the mesh have names (Istio's `resolution: DNS`). A name that does not resolve any more keeps its last
addresses: an outage of DNS is not one of the service.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

from gateway.limits import Limits

Address = tuple[socket.AddressFamily, tuple[str, int] | tuple[str, int, int, int]]
"""What `socket.socket` and `connect` take."""
Done = Callable[[list[Address], str], None]
"""Called with addresses, or with none and why."""

MOST_ADDRESSES = 8
"""Of one name."""
MOST_NAMES = 4096
"""Kept at once."""


class Resolver:
    """Owns the names that have been looked up. One for a worker."""

    __slots__ = ("_kept", "_limits", "_loop", "_running", "_waiting")

    def __init__(self, loop: asyncio.AbstractEventLoop, limits: Limits) -> None:
        self._loop = loop
        self._limits = limits
        self._kept: dict[tuple[str, int], tuple[float, list[Address]]] = {}
        self._running: dict[tuple[str, int], asyncio.Task[None]] = {}
        self._waiting: dict[tuple[str, int], list[Done]] = {}

    def find(self, host: str, port: int, done: Done) -> None:
        """Calls `done` once, at once for an address in text or a name that is kept."""
        literal = address_of(host, port)
        if literal is not None:
            done([literal], "")
            return
        key = (host, port)
        kept = self._kept.get(key)
        if kept is not None and kept[0] > self._loop.time():
            done(kept[1], "")
            return
        # Asked once, however many want to know: a look-up holds one of few threads until the system's resolver gives up.
        self._waiting.setdefault(key, []).append(done)
        if key not in self._running:
            self._running[key] = self._loop.create_task(self._look_up(key))
        self._loop.call_later(self._limits.resolve_timeout, self._late, key, done)

    async def _look_up(self, key: tuple[str, int]) -> None:
        host, port = key
        problem = ""
        try:
            found = await self._loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            found = []
            problem = getattr(error, "strerror", None) or "the name cannot be looked up"
        finally:
            self._running.pop(key, None)
        addresses: list[Address] = [
            (family, sockaddr)  # type: ignore[misc]  # a Python without IPv6 gives other tuples
            for family, _, _, _, sockaddr in found[:MOST_ADDRESSES]
        ]
        if addresses:
            if len(self._kept) >= MOST_NAMES:
                self._kept.clear()
            self._kept[key] = (self._loop.time() + self._limits.resolve_ttl, addresses)
        self._tell(key, addresses, "" if addresses else problem or "the name has no address")

    def _tell(self, key: tuple[str, int], addresses: list[Address], problem: str) -> None:
        for done in self._waiting.pop(key, ()):
            self._answer(key, addresses, problem, done)

    def _answer(self, key: tuple[str, int], addresses: list[Address], problem: str, done: Done) -> None:
        last = self._kept.get(key)
        if addresses or last is None:
            done(addresses, problem)
        else:
            done(last[1], "")

    def _late(self, key: tuple[str, int], done: Done) -> None:
        waiting = self._waiting.get(key)
        if waiting is not None and done in waiting:
            waiting.remove(done)
            self._answer(key, [], "the name was not resolved in time", done)

    def close(self) -> None:
        """Looks nothing up any more; nobody who waits is called."""
        self._waiting.clear()
        for task in self._running.values():
            task.cancel()
        self._running.clear()


def address_of(host: str, port: int) -> Address | None:
    """An address that is written as one (IPv6 without brackets), or None for a name."""
    if _is(socket.AF_INET, host):
        return socket.AF_INET, (host, port)
    return (socket.AF_INET6, (host, port, 0, 0)) if _is(socket.AF_INET6, host) else None


def _is(family: socket.AddressFamily, host: str) -> bool:
    try:
        socket.inet_pton(family, host)
    except (OSError, ValueError):
        return False
    return True
