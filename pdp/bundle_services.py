"""Which credentials go to which bundle server, and what a bundle from there must be signed with.

It is said in a file, in the words of OPA's own configuration (openpolicyagent.org, "Configuration", `services` and `keys`), of which what
bundles need is taken and everything else is an error:

    services:
      shop:
        url: https://bundles.example.com/shop     # every URL that begins so
        credentials: {bearer: {token_path: bundle.token}}   # or client_tls: {cert: ..., private_key: ...}
        tls: {ca_cert: ca.pem}
        signing: {keyid: shop, scope: live}
    keys:
      shop: {key: bundle.pub, algorithm: ES256}

Secrets are named by their files, relative to this one. All of it is read again each time that something is fetched, so that a renewed token
or certificate counts from then on.
"""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any, Final
from urllib.parse import SplitResult, urlsplit

import msgspec
import yaml

from mesh.formats import bundle_url
from pdp.bundle_keys import ALGORITHMS, BundleKey, KeyProblem, checking_key, secret_in

MOST_BYTES: Final = 1 << 20
"""Of the file."""
_PORTS: Final = {"http": 80, "https": 443}
_LOOPBACK: Final = frozenset(("127.0.0.1", "::1", "localhost"))


class ServicesProblem(ValueError):
    """Something is wrong with the file, or with one that it names; the message says what and where."""


class _Strict(msgspec.Struct, forbid_unknown_fields=True):
    """What has no other fields."""


class Bearer(_Strict):
    """A token that is sent."""

    token_path: str


class ClientTls(_Strict):
    """A certificate that is shown."""

    cert: str
    private_key: str


class Credentials(_Strict):
    """How a client says who it is."""

    bearer: Bearer | None = None
    client_tls: ClientTls | None = None


class Tls(_Strict):
    """Whom to trust."""

    ca_cert: str


class Signing(_Strict):
    """What bundles must be signed with."""

    keyid: str
    scope: str = ""


class Service(_Strict):
    """One bundle server."""

    url: str
    credentials: Credentials = msgspec.field(default_factory=Credentials)
    tls: Tls | None = None
    signing: Signing | None = None


class Key(_Strict):
    """One key by which signatures are checked."""

    key: str
    """A file."""
    algorithm: str = ""


class Services(_Strict):
    """The whole file."""

    services: dict[str, Service]
    keys: dict[str, Key] = {}


class Access(msgspec.Struct, frozen=True, kw_only=True):
    """What goes with one URL."""

    token: str = ""
    tls: ssl.SSLContext | None = None
    """None: the system's CAs, and no certificate of ours."""
    key: BundleKey | None = None
    """What its bundle must be signed with."""


NOBODY: Final = Access()


class BundleServices:
    """The file, read when it is needed. Without one, nothing goes with any URL."""

    def __init__(self, path: Path | None = None) -> None:
        self._path = path

    def check(self) -> None:
        """Reads the file and everything that it names. Blocks. Raises `ServicesProblem`."""
        for service in self._read().services.values():
            self.access(service.url)

    def access(self, url: str) -> Access:
        """What goes with `url`: as its service says, the one with the longest URL that it begins with. Blocks. Raises `ServicesProblem`."""
        if self._path is None:
            return NOBODY
        told = self._read()
        wanted = urlsplit(url)
        fitting = [(name, service) for name, service in told.services.items() if _covers(urlsplit(service.url), wanted)]
        if not fitting:
            return NOBODY
        name, service = max(fitting, key=lambda each: len(each[1].url))
        where = f"{self._path}: services.{name}"
        try:
            token = self._token(service, where)
            key = self._key(service, told, where)
        except KeyProblem as problem:
            raise ServicesProblem(f"{where}: {problem}") from None
        return Access(token=token, tls=self._tls(service, where), key=key)

    def _read(self) -> Services:
        path = self._path
        if path is None:
            return Services({})
        try:
            with path.open("rb") as file:
                content = file.read(MOST_BYTES + 1)
            if len(content) > MOST_BYTES:
                raise ServicesProblem(f"{path} has more than {MOST_BYTES} bytes")
            told = msgspec.convert(_loaded(content), Services)
        except OSError as problem:
            raise ServicesProblem(f"{path} can't be read: {problem.strerror}") from None
        except (yaml.YAMLError, UnicodeDecodeError) as problem:
            raise ServicesProblem(f"{path} is not YAML: {' '.join(str(problem).split())}") from None
        except msgspec.ValidationError as problem:
            raise ServicesProblem(f"{path}: {problem}") from None
        except RecursionError:
            raise ServicesProblem(f"{path}: too many values inside each other") from None
        for name, service in told.services.items():
            _check(service, told, f"{path}: services.{name}")
        for name, key in told.keys.items():
            if key.algorithm and key.algorithm not in ALGORITHMS:
                raise ServicesProblem(f"{path}: keys.{name}.algorithm: {key.algorithm!r} is none of {', '.join(ALGORITHMS)}")
        return told

    def _file(self, name: str) -> Path:
        assert self._path is not None
        return self._path.parent / name

    def _token(self, service: Service, where: str) -> str:
        bearer = service.credentials.bearer
        if bearer is None:
            return ""
        token = secret_in(self._file(bearer.token_path)).strip()
        if not token.isascii() or any(letter.isspace() for letter in token):
            raise ServicesProblem(f"{where}.credentials.bearer: {bearer.token_path} is to hold one word of ASCII")
        return token

    def _key(self, service: Service, told: Services, where: str) -> BundleKey | None:
        signing = service.signing
        if signing is None:
            return None
        key = told.keys[signing.keyid]
        return checking_key(self._file(key.key), key_id=signing.keyid, algorithm=key.algorithm, scope=signing.scope)

    def _tls(self, service: Service, where: str) -> ssl.SSLContext | None:
        client = service.credentials.client_tls
        if service.tls is None and client is None:
            return None
        what = str(service.tls and service.tls.ca_cert)
        try:
            context = ssl.create_default_context(cafile=str(self._file(service.tls.ca_cert)) if service.tls is not None else None)
            if client is not None:
                what = f"{client.cert} with {client.private_key}"
                context.load_cert_chain(self._file(client.cert), self._file(client.private_key), password=_no_password)
        except (OSError, ssl.SSLError, ValueError) as problem:
            raise ServicesProblem(f"{where}: {what} can't be used: {getattr(problem, 'strerror', None) or problem}") from None
        return context


def _no_password() -> str:
    raise ValueError("the key has a password")


def _loaded(content: bytes) -> Any:
    if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(content, yaml.SafeLoader)):
        raise yaml.YAMLError("aliases are not supported")
    return yaml.safe_load(content)


def _check(service: Service, told: Services, where: str) -> None:
    wrong = bundle_url(service.url)
    if wrong:
        raise ServicesProblem(f"{where}.url {wrong}")
    parts = urlsplit(service.url)
    said = service.credentials
    if parts.query:
        raise ServicesProblem(f"{where}.url: a service's URL has no query")
    if said.bearer is not None and said.client_tls is not None:
        raise ServicesProblem(f"{where}.credentials has bearer and client_tls; keep one of them")
    if said.bearer is not None and parts.scheme != "https" and parts.hostname not in _LOOPBACK:
        raise ServicesProblem(f"{where}.credentials.bearer: a token is not sent in plaintext over a network; use https")
    if parts.scheme != "https" and (service.tls is not None or said.client_tls is not None):
        raise ServicesProblem(f"{where}: tls and client_tls mean nothing for http; use https")
    if service.signing is not None and service.signing.keyid not in told.keys:
        there = ", ".join(sorted(told.keys)) or "none"
        raise ServicesProblem(f"{where}.signing.keyid: there is no key {service.signing.keyid!r} under keys; there is {there}")


def _covers(service: SplitResult, url: SplitResult) -> bool:
    """Whether a URL is one of a service's: the same origin, and a path at or below its own."""
    if service.scheme != url.scheme or service.hostname != url.hostname:
        return False
    if (service.port or _PORTS[service.scheme]) != (url.port or _PORTS[url.scheme]):
        return False
    base = service.path.rstrip("/")
    return url.path == base or url.path.startswith(base + "/")
