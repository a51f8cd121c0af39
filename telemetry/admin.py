"""The admin page: `/metrics`, `/healthz`, `/readyz`, `/config`, and what else a process shows.

For people and scrapers on the same machine. It answers GET and HEAD, one request a connection, and is bounded in everything; it says
no to an address that is not loopback unless told otherwise, and to a `Host` that is a name of somebody else's (DNS rebinding).
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import ipaddress
import os
import socket
import stat
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Protocol

import msgspec

from mesh.http import host_of
from telemetry.metrics import CONTENT_TYPE

MAX_HEAD = 8192
"""Bytes of a request."""
MAX_CONNECTIONS = 32
READ_TIMEOUT = 5.0
"""Seconds for a request to arrive."""
WRITE_TIMEOUT = 30.0
"""Seconds for an answer to be taken."""

JSON = "application/json"
TEXT = "text/plain; charset=utf-8"

Shown = Callable[[], bytes | Awaitable[bytes]]


class Page(Protocol):
    """Where the metrics come from: a `Telemetry`."""

    def chunks(self) -> Iterable[bytes]:
        """The metrics page, a little at a time."""
        ...


class AdminError(Exception):
    """The admin page cannot be served there; the message says what to do."""


class Reply(msgspec.Struct, frozen=True):
    """What a request gets."""

    status: int
    kind: str
    body: bytes | Iterable[bytes]


class Admin:
    """A running admin page. Owns its sockets; `close` ends it."""

    __slots__ = ("_server", "_unix", "address")

    def __init__(self, server: asyncio.Server, address: str, unix: Path | None) -> None:
        self._server = server
        self._unix = unix
        self.address = address
        """`host:port` that it listens at (with the port that port 0 became), or the path of its socket."""

    async def close(self) -> None:
        """Stops listening."""
        self._server.close()
        if self._unix is not None:
            with contextlib.suppress(OSError):
                self._unix.unlink()
        await self._server.wait_closed()


async def serve_admin(
    host: str,
    port: int,
    telemetry: Page,
    config: Shown,
    ready: Callable[[], tuple[bool, str]],
    extra: Mapping[str, Shown] | None = None,
    *,
    allow_remote: bool = False,
    names: Collection[str] = (),
) -> Admin:
    """Serves at `host`:`port` (0: any free port), or at the socket `host` when it is an absolute path.

    `config` gives JSON without secrets; `ready` gives whether the process can serve, and why not; `extra` maps more paths (`/stats`) to
    what gives their JSON, or takes the place of one of ours. `names` are host names to answer to besides loopback's. Raises `AdminError`
    for an address that is not loopback (unless `allow_remote`), and for one that cannot be had.
    """
    routes = _routes(telemetry, config, ready, extra or {})
    site = _Site(routes, None if allow_remote or host.startswith("/") else frozenset({"localhost", *names}))
    if host.startswith("/"):
        path = Path(host)
        try:
            server = await asyncio.start_unix_server(site.serve, sock=_unix_socket(path), limit=MAX_HEAD)
        except OSError as error:
            raise AdminError(f"the admin socket {path} cannot be made: {error.strerror or error}") from None
        return Admin(server, host, path)
    if not allow_remote and not await _is_loopback(host):
        raise AdminError(f"the admin page shows the configuration to anybody who asks; {host} is not a loopback address: use 127.0.0.1")
    try:
        server = await asyncio.start_server(site.serve, host, port, limit=MAX_HEAD)
    except OSError as error:
        raise AdminError(f"the admin page cannot listen at {host}:{port}: {error.strerror or error}; choose another --admin") from None
    bound = server.sockets[0].getsockname()
    return Admin(server, f"[{bound[0]}]:{bound[1]}" if ":" in bound[0] else f"{bound[0]}:{bound[1]}", None)


def _routes(telemetry: Page, config: Shown, ready: Callable[[], tuple[bool, str]], extra: Mapping[str, Shown]) -> dict[str, _Handler]:
    async def metrics() -> Reply:
        return Reply(200, CONTENT_TYPE, telemetry.chunks())

    async def healthz() -> Reply:
        return Reply(200, TEXT, b"ok\n")

    async def readyz() -> Reply:
        good, why = ready()
        return Reply(200, TEXT, b"ready\n") if good else Reply(503, TEXT, f"not ready: {why}\n".encode())

    def showing(source: Shown, kind: str = JSON) -> _Handler:
        async def show() -> Reply:
            found = source()
            return Reply(200, kind, await found if inspect.isawaitable(found) else found)

        return show

    routes: dict[str, _Handler] = {"/metrics": metrics, "/healthz": healthz, "/readyz": readyz, "/config": showing(config)}
    for path, source in extra.items():
        routes[path] = showing(source, CONTENT_TYPE if path == "/metrics" else JSON)
    return routes


_Handler = Callable[[], Awaitable[Reply]]

_REASONS = {200: "OK", 400: "Bad Request", 404: "Not Found", 405: "Method Not Allowed", 421: "Misdirected Request"}
_REASONS |= {431: "Request Header Fields Too Large", 500: "Internal Server Error", 503: "Service Unavailable"}


class _Site:
    """Answers one request a connection."""

    __slots__ = ("_names", "_open", "_routes")

    def __init__(self, routes: Mapping[str, _Handler], names: Collection[str] | None) -> None:
        self._routes = routes
        self._names = names
        """Names that `Host` may hold besides IP addresses; None for any."""
        self._open = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._open >= MAX_CONNECTIONS:
            writer.close()
            return
        self._open += 1
        try:
            async with asyncio.timeout(READ_TIMEOUT):
                head, reply = await self._read(reader)
            async with asyncio.timeout(WRITE_TIMEOUT):
                await _write(writer, reply if isinstance(reply, Reply) else await _ask(reply), bare=head)
        except (TimeoutError, OSError, asyncio.IncompleteReadError):
            writer.transport.abort()
        finally:
            self._open -= 1
            writer.close()

    async def _read(self, reader: asyncio.StreamReader) -> tuple[bool, _Handler | Reply]:
        """Whether only the head of the answer is wanted, and what to answer."""
        try:
            data = await reader.readuntil(b"\r\n\r\n")
        except asyncio.LimitOverrunError:
            return False, _plain(431, f"a request may have {MAX_HEAD} bytes")
        lines = data[:-4].decode("latin-1").split("\r\n")
        words = lines[0].split(" ")
        if len(words) != 3 or not words[2].startswith("HTTP/1.") or not words[1].startswith("/"):
            return False, _plain(400, "this is not an HTTP/1.1 request")
        method, target, _ = words
        if method not in {"GET", "HEAD"}:
            return False, _plain(405, "only GET and HEAD are served here")
        hosts = [line[5:].strip() for line in lines[1:] if line[:5].lower() == "host:"]
        if len(hosts) > 1 or (not hosts and words[2] != "HTTP/1.0"):
            return False, _plain(400, "a request has one Host")
        if hosts and not self._knows(hosts[0]):
            return False, _plain(421, "this host is not served here; use 127.0.0.1 or localhost")
        handler = self._routes.get(target.partition("?")[0])
        if handler is None:
            return method == "HEAD", _plain(404, "there is " + ", ".join(sorted(self._routes)))
        return method == "HEAD", handler

    def _knows(self, authority: str) -> bool:
        if self._names is None:
            return True
        host = host_of(authority.encode("latin-1")).decode("latin-1").lower()
        if host in self._names:
            return True
        try:
            ipaddress.ip_address(host.strip("[]"))
        except ValueError:
            return False
        return True  # a page that was rebound has a name, never an address


async def _ask(handler: _Handler) -> Reply:
    try:
        return await handler()
    except OSError as error:
        return _plain(503, f"this cannot be shown now: {error}")
    except Exception as error:  # what a room cannot say must not end the page
        return _plain(500, f"this cannot be shown: {type(error).__name__}")


def _plain(status: int, why: str) -> Reply:
    return Reply(status, TEXT, f"{why}\n".encode())


async def _write(writer: asyncio.StreamWriter, reply: Reply, *, bare: bool) -> None:
    length = f"content-length: {len(reply.body)}\r\n" if isinstance(reply.body, bytes) else ""
    writer.write(
        f"HTTP/1.1 {reply.status} {_REASONS.get(reply.status, 'Unknown')}\r\ncontent-type: {reply.kind}\r\n{length}"
        "cache-control: no-store\r\nx-content-type-options: nosniff\r\nconnection: close\r\n\r\n".encode("latin-1")
    )
    if not bare:
        async for chunk in _chunks(reply.body):
            writer.write(chunk)
            await writer.drain()
    await writer.drain()


async def _chunks(body: bytes | Iterable[bytes]) -> AsyncIterator[bytes]:
    if isinstance(body, bytes):
        yield body
        return
    for chunk in body:
        yield chunk
        await asyncio.sleep(0)  # requests first


async def _is_loopback(host: str) -> bool:
    if not host:
        return False
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        raise AdminError(f"{host} is not an address; use 127.0.0.1") from None
    return all(ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback for *_, address in found)


def _unix_socket(path: Path) -> socket.socket:
    _make_room(path)
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        made.bind(os.fspath(path))
        path.chmod(0o660)  # before it listens: nobody has connected yet
    except OSError:
        made.close()
        raise
    return made


def _make_room(path: Path) -> None:
    """Takes away the socket of a process that died; a live one's, or any other file, stays."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise FileExistsError(17, "there is a file of that name")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            path.unlink()
            return
    raise FileExistsError(17, "another process listens there")
