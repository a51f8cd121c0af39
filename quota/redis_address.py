"""Addresses of Redis, as `--redis` takes them.

`redis://[user:password@]host:port/db`, `rediss://` (TLS), `unix:///path?db=0`,
`redis+sentinel://[user:password@]host:port,host:port/service[/db][?sentinel_password=...]` (`rediss+sentinel://`: TLS to the master and the
Sentinels) and `redis+cluster://[user:password@]host:port,host:port` (`rediss+cluster://`). Any of them may say `?start=full` (see
`quota.redis_store`), and those with TLS `ssl_ca_certs`, `ssl_certfile` and `ssl_keyfile`, paths of PEM files.
"""

from __future__ import annotations

import re
from typing import Final, Literal, cast
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

import msgspec
import redis.asyncio as aioredis

SCHEMES: Final = ("redis", "rediss", "unix", "redis+sentinel", "rediss+sentinel", "redis+cluster", "rediss+cluster")


TLS_FILES: Final[tuple[str, ...]] = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")


class Address(msgspec.Struct, frozen=True, kw_only=True):
    """A Redis URL, read."""

    kind: Literal["single", "sentinel", "cluster"]
    url: str = ""
    """For redis-py, of a single server."""
    hosts: tuple[tuple[str, int], ...] = ()
    service: str = ""
    db: int = 0
    username: str | None = None
    password: str | None = None
    sentinel_password: str | None = None
    tls: bool = False
    files: dict[str, str] = {}
    """Of TLS, by `TLS_FILES`."""
    start: Literal["empty", "full"] = "empty"

    def __repr__(self) -> str:
        return f"<Address {self.kind} {self.shown}>"

    @property
    def shown(self) -> str:
        """For people: without secrets."""
        if self.kind == "single":
            parts = urlsplit(self.url)
            return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
        scheme = ("rediss+" if self.tls else "redis+") + self.kind
        hosts = ",".join(f"{host}:{port}" for host, port in self.hosts)
        return f"{scheme}://{hosts}" + (f"/{self.service}/{self.db}" if self.service else "")


def read_url(url: str) -> Address:
    """Reads a Redis URL (see the module). Raises ValueError that says what is wrong; never with the password in it."""
    parts = urlsplit(url)
    if parts.scheme not in SCHEMES:
        known = ", ".join(SCHEMES)
        raise ValueError(f"{parts.scheme or 'nothing'}:// is not a Redis address; write for example redis://127.0.0.1:6379/0 ({known})")
    options = dict(parse_qsl(parts.query))
    start = options.pop("start", "empty")
    if start not in {"empty", "full"}:
        raise ValueError(f"start={start}: use empty or full")
    begin = cast(Literal["empty", "full"], start)
    tls = parts.scheme.startswith("rediss")
    if "+" not in parts.scheme:
        clean = f"{parts.scheme}://{parts.netloc}{parts.path}" + (f"?{urlencode(options)}" if options else "")
        try:
            aioredis.connection.parse_url(clean)
        except ValueError as problem:
            raise ValueError(f"{parts.scheme}:// address: {problem}") from None
        return Address(kind="single", url=clean, tls=tls, start=begin)
    login, _, where = parts.netloc.rpartition("@")
    username, _, password = login.partition(":")
    kind: Literal["sentinel", "cluster"] = "sentinel" if parts.scheme.endswith("sentinel") else "cluster"
    path = [part for part in parts.path.split("/") if part]
    if kind == "sentinel" and not (len(path) == 1 or (len(path) == 2 and path[1].isdigit())):
        raise ValueError("a Sentinel address ends with the service's name, and perhaps a database: redis+sentinel://host:26379/service/0")
    if kind == "cluster" and path not in ([], ["0"]):
        raise ValueError("a cluster has no databases: redis+cluster://host:6379")
    secret = options.pop("sentinel_password", None) if kind == "sentinel" else None
    files: dict[str, str] = {name: options.pop(name) for name in TLS_FILES if tls and name in options}
    if options:
        raise ValueError(f"{', '.join(options)}: not an option of a {kind} address")
    return Address(
        kind=kind,
        hosts=tuple(_host(item, 26379 if kind == "sentinel" else 6379) for item in where.split(",")),
        service=unquote(path[0]) if kind == "sentinel" else "",
        db=int(path[1]) if len(path) == 2 else 0,
        username=unquote(username) or None,
        password=unquote(password) or None,
        sentinel_password=secret,
        tls=tls,
        files=files,
        start=begin,
    )


def _host(text: str, port: int) -> tuple[str, int]:
    found = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[^:\[\]]+)(?::(\d{1,5}))?", text)
    if not found:
        raise ValueError(f"{text or 'nothing'}: not a host or host:port")
    return found[1].strip("[]"), int(found[2] or port)
