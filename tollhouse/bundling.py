"""The bundle server of a process: where the user's own OPA servers fetch the active revision, signed if there is a key."""

from __future__ import annotations

import ipaddress
import logging
import ssl
from pathlib import Path

import msgspec

from identity.files import IdentitySource
from identity.problems import IdentityError
from identity.svid import Identity
from identity.tls import server_context
from mesh.model import ListenerTls
from mesh.policy import Revision
from pdp.bundle_keys import BundleKey, KeyProblem, secret_in, signing_key
from pdp.engines.bundle import BundleServer
from pdp.engines.engine import EngineUnavailable, PolicyError
from pdp.publish import Checker
from tollhouse.output import Complaint

log = logging.getLogger("tollhouse.pdp")

DEFAULT = "127.0.0.1:8282"
_SAMPLE = Revision(digest="sha256:" + "0" * 64, modules={"policy/sample.rego": "package sample\n"})


class BundleOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What the command line says about bundles that are served."""

    listen: str = ""
    """`HOST:PORT`; empty for nowhere."""
    key: Path | None = None
    key_id: str = "default"
    algorithm: str = ""
    scope: str = ""
    token: Path | None = None


class _Renewed:
    """A server's TLS context that follows the identity: each handshake is done with the newest."""

    def __init__(self, identity: IdentitySource) -> None:
        self._identity = identity
        self.context = self._make()
        self._newest = self.context
        self.context.sni_callback = self._choose
        identity.on_change(self._changed)

    def _make(self) -> ssl.SSLContext:
        return server_context(ListenerTls(svid=True, alpn=("http/1.1",)), self._identity)

    def _changed(self, _: Identity) -> None:
        try:
            self._newest = self._make()
        except IdentityError as problem:
            log.error("bundles are served with the certificate from before: %s", problem)

    def _choose(self, stream: ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> None:
        if self._newest is not self.context:
            stream.context = self._newest


async def open_bundles(options: BundleOptions, checker: Checker, identity: IdentitySource | None = None) -> BundleServer:
    """A bundle server that listens; on other addresses than this machine's own under TLS, with `identity`. Raises `Complaint`."""
    host, port = _address(options.listen)
    try:
        key = (
            signing_key(options.key, key_id=options.key_id, algorithm=options.algorithm, scope=options.scope)
            if options.key is not None
            else None
        )
        token = secret_in(options.token) if options.token is not None else ""
    except KeyProblem as problem:
        raise Complaint(f"the bundles at {options.listen}: {problem}", 2) from None
    if not token.isascii() or any(letter.isspace() for letter in token):
        raise Complaint(f"--bundle-token: {options.token} is to hold one word of ASCII", 2)
    here = _is_here(host)
    if identity is None and not here:
        raise Complaint(
            f"--opa-bundles: in plaintext {options.listen} shows policy to anybody on the way: give --identity, or bind to 127.0.0.1",
            2,
        )
    await _try(checker, key, options)
    server = BundleServer(token, checker=checker, key=key)
    try:
        tls = _Renewed(identity).context if identity is not None and not here else None
        await server.start(host, port, tls)
    except IdentityError as problem:
        raise Complaint(f"--identity: {problem}") from None
    except OSError as problem:
        raise Complaint(f"--opa-bundles: {options.listen}: {problem.strerror or problem}; choose another port") from None
    log.info("bundles at %s://%s%s", "http" if tls is None else "https", options.listen, ", signed" if key is not None else "")
    return server


async def _try(checker: Checker, key: BundleKey | None, options: BundleOptions) -> None:
    """A key that can't sign is found at the start, and not with the first revision."""
    from pdp.bundle_files import bundle_of

    try:
        await bundle_of(_SAMPLE, checker, key)
    except PolicyError as problem:
        raise Complaint(f"--bundle-key: {options.key}: {problem}", 2) from None
    except EngineUnavailable as problem:
        raise Complaint(str(problem)) from None


def _address(listen: str) -> tuple[str, int]:
    host, _, port = listen.rpartition(":")
    if not host or not port.isdigit():
        raise Complaint(f"--opa-bundles: {listen!r} is not HOST:PORT; write for example {DEFAULT}", 2)
    return host.strip("[]"), int(port)


def _is_here(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
