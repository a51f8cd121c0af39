"""Where an etcd is and how to speak to it, from one URL.

    etcd://10.0.0.1:2379,10.0.0.2:2379
    etcds://etcd-a:2379,etcd-b:2379?ca=/etc/tollhouse/etcd/ca.pem&cert=...&key=...
    etcd://gateway@10.0.0.1:2379?password-file=/run/credentials/etcd

`http` and `https` are taken for `etcd` and `etcds`. A password is read from a file, so that it shows in no process list.
"""

from __future__ import annotations

from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlsplit

import msgspec

DEFAULT_PORT = 2379
_SCHEMES = {"etcd": False, "http": False, "etcds": True, "https": True}
_FILES = ("ca", "cert", "key", "password-file")


class EtcdAddress(msgspec.Struct, frozen=True, kw_only=True):
    """One etcd cluster. Files are read when a connection is made, so that what was rotated is used."""

    endpoints: tuple[str, ...]
    """`host:port` each."""
    tls: bool = False
    ca: Path | None = None
    """PEM of the trusted CAs; None for the system's."""
    cert: Path | None = None
    key: Path | None = None
    user: str = ""
    password_file: Path | None = None

    def password(self) -> str:
        """The password, read now. Raises OSError when it can't be read."""
        return self.password_file.read_text().rstrip("\r\n") if self.password_file else ""

    def __str__(self) -> str:
        return ("etcds://" if self.tls else "etcd://") + ",".join(self.endpoints)


def _endpoint(text: str, url: str) -> str:
    parts = urlsplit(f"//{text}")
    try:
        port = parts.port
    except ValueError:
        port = -1
    host = parts.hostname
    if not host or port in {-1, 0} or parts.path:
        raise ValueError(f"{url}: {text!r} is not HOST:PORT")
    return f"[{host}]:{port or DEFAULT_PORT}" if ":" in host else f"{host}:{port or DEFAULT_PORT}"


def parse_etcd_url(url: str) -> EtcdAddress:
    """The address that a URL names. Raises ValueError, worded for the one who typed it (without what might be a password)."""
    scheme, separator, rest = url.partition("://")
    if not separator or scheme not in _SCHEMES:
        raise ValueError(f"{scheme[:40]!r} is no etcd URL; write etcd://HOST:PORT[,HOST:PORT...], or etcds:// for TLS")
    where, _, query = rest.partition("?")
    user, at, hosts = where.rpartition("@")
    hosts = hosts.rstrip("/")
    shown = f"{scheme}://{hosts}"
    if at and ":" in user:
        raise ValueError(f"{shown}: a password in a URL can be seen by all here; write it to a file and add ?password-file=FILE")
    options = dict(parse_qsl(query, keep_blank_values=True))
    unknown = sorted(set(options) - set(_FILES))
    if unknown:
        raise ValueError(f"{shown}: unknown option {unknown[0]!r}; there are {', '.join(_FILES)}")
    files = {name: Path(value) for name, value in options.items() if value}
    address = EtcdAddress(
        endpoints=tuple(_endpoint(host, shown) for host in hosts.split(",") if host),
        tls=_SCHEMES[scheme],
        ca=files.get("ca"),
        cert=files.get("cert"),
        key=files.get("key"),
        user=unquote(user),
        password_file=files.get("password-file"),
    )
    if not address.endpoints:
        raise ValueError(f"{shown}: no host; write etcd://HOST:PORT[,HOST:PORT...]")
    if not address.tls and (address.ca or address.cert or address.key):
        raise ValueError(f"{shown}: ca, cert and key are for TLS; write etcds:// for it")
    if bool(address.cert) != bool(address.key):
        raise ValueError(f"{shown}: cert and key go together; give both")
    if bool(address.user) != bool(address.password_file):
        raise ValueError(f"{shown}: a user and a password-file go together; write etcd://USER@HOST:PORT?password-file=FILE")
    return address
