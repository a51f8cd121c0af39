"""Is an instance fit to be used: one question asked again and again, and how many answers it takes to believe it."""

from __future__ import annotations

import asyncio
from typing import Protocol
from urllib.parse import urlsplit

import msgspec

MOST_ANSWER = 4096
"""Bytes of an HTTP answer that are looked at."""


class HealthCheck(Protocol):
    """One way to ask."""

    async def ask(self) -> str:
        """What is wrong, in a few words; empty when nothing is. Ends within its own time budget and raises nothing."""
        ...


class TcpCheck(msgspec.Struct, frozen=True):
    """Fine when a TCP connection is accepted."""

    host: str
    port: int
    timeout: float = 2.0
    """Seconds."""

    async def ask(self) -> str:
        """See `HealthCheck.ask`."""
        try:
            async with asyncio.timeout(self.timeout):
                _, writer = await asyncio.open_connection(self.host, self.port)
        except TimeoutError:
            return f"no connection to {self.host}:{self.port} within {self.timeout:g} s"
        except OSError as error:
            return f"no connection to {self.host}:{self.port}: {error.strerror or error}"
        writer.transport.abort()
        return ""


class HttpCheck(msgspec.Struct, frozen=True):
    """Fine when a GET is answered with a status from 200 to 399 (Kubernetes' httpGet probe)."""

    host: str
    port: int
    path: str = "/"
    timeout: float = 2.0
    """Seconds."""

    async def ask(self) -> str:
        """See `HealthCheck.ask`."""
        where = f"http://{self.host}:{self.port}{self.path}"
        try:
            async with asyncio.timeout(self.timeout):
                status = await self._get()
        except TimeoutError:
            return f"{where}: no answer within {self.timeout:g} s"
        except OSError as error:
            return f"{where}: {error.strerror or error}"
        except ValueError as error:
            return f"{where}: {error}"
        return "" if 200 <= status < 400 else f"{where}: status {status}"

    async def _get(self) -> int:
        reader, writer = await asyncio.open_connection(self.host, self.port, limit=MOST_ANSWER)
        try:
            host = f"[{self.host}]" if ":" in self.host else self.host
            head = f"GET {self.path} HTTP/1.1\r\nHost: {host}:{self.port}\r\nUser-Agent: tollhouse-health\r\nConnection: close\r\n\r\n"
            writer.write(head.encode())
            line = (await reader.readline()).split()
        finally:
            writer.transport.abort()
        if len(line) < 2 or not line[0].startswith(b"HTTP/1.") or not line[1].isdigit():
            raise ValueError("what answers is not HTTP")
        return int(line[1])


def parse_check(text: str) -> HealthCheck:
    """The check that `tcp://HOST:PORT` or `http://HOST:PORT/PATH` names. Raises ValueError, worded for people."""
    parts = urlsplit(text)
    try:
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise ValueError(f"{text!r}: {error}") from error
    if parts.scheme not in {"tcp", "http"} or not host:
        raise ValueError(f"{text!r} is no health check; write tcp://HOST:PORT or http://HOST:PORT/PATH")
    if parts.scheme == "http":
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        if not path.isascii() or any(ord(each) <= 32 or ord(each) == 127 for each in path):
            raise ValueError(f"{text!r}: percent-encode the path")
        return HttpCheck(host, port or 80, path)
    if not port or parts.path or parts.query:
        raise ValueError(f"{text!r} is no health check; write tcp://HOST:PORT")
    return TcpCheck(host, port)


class Verdict:
    """Whether to believe that something is well: it takes `fall` bad answers in a row to doubt it, and `rise` good ones to trust it again.

    Before the first good answer nothing is believed, and that one is enough. Owned by whoever asks.
    """

    __slots__ = ("_count", "_fall", "_known", "_rise", "well")

    def __init__(self, *, fall: int = 3, rise: int = 2) -> None:
        self._fall = fall
        self._rise = rise
        self._count = 0
        self._known = False
        self.well = False

    def answer(self, good: bool) -> bool:
        """Takes one answer. Returns whether `well` has changed."""
        if good == self.well:
            self._count = 0
            return False
        self._count += 1
        if self._count < (self._rise if good and self._known else 1 if good else self._fall):
            return False
        self.well, self._known, self._count = good, True, 0
        return True
