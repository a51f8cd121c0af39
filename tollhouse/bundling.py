"""The bundle server of a process: where the user's own OPA servers fetch the active revision, signed if there is a key."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import socket
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
from tollhouse.sockets import BUNDLES, bind

log = logging.getLogger("tollhouse.pdp")

DEFAULT = "127.0.0.1:8282"
EVERY = 1.0
"""Seconds between two looks at the files of key and token."""
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
    fd: int = -1
    """A listening socket that was handed over, in the place of one of its own at `listen`."""

    def arguments(self) -> list[str]:
        """The command line that says the same."""
        if not self.listen:
            return []
        said = (
            ("--opa-bundles", self.listen),
            ("--bundle-key", str(self.key or "")),
            ("--bundle-key-id", self.key_id),
            ("--bundle-algorithm", self.algorithm),
            ("--bundle-scope", self.scope),
            ("--bundle-token", str(self.token or "")),
        )
        return [word for option, value in said if value for word in (option, value)]


def place_of(options: BundleOptions) -> socket.socket | None:
    """For the parent of several workers: the socket at which one of them serves bundles; None for nowhere. Raises `Complaint`."""
    if not options.listen:
        return None
    try:
        return bind((*_address(options.listen), socket.SOCK_STREAM), shared=False)
    except OSError as problem:
        raise Complaint(f"--opa-bundles: {options.listen}: {problem.strerror or problem}; choose another port") from None


def given(options: BundleOptions) -> BundleOptions:
    """For one of several workers: what it has of the bundles that they serve, which is all or nothing."""
    number = os.environ.pop(BUNDLES, "")
    return msgspec.structs.replace(options, fd=int(number)) if number else BundleOptions()


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
        token, key = secrets_of(options)
    except KeyProblem as problem:
        raise Complaint(f"the bundles at {options.listen}: {problem}", 2) from None
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
        await server.start(host, port, tls, socket.socket(fileno=options.fd) if options.fd >= 0 else None)
    except IdentityError as problem:
        raise Complaint(f"--identity: {problem}") from None
    except OSError as problem:
        raise Complaint(f"--opa-bundles: {options.listen}: {problem.strerror or problem}; choose another port") from None
    server.on_stop(asyncio.create_task(renew(server, options, (token, key))).cancel)
    log.info("bundles at %s://%s%s", "http" if tls is None else "https", options.listen, ", signed" if key is not None else "")
    return server


def secrets_of(options: BundleOptions) -> tuple[str, BundleKey | None]:
    """The token that clients must send (empty for none), and the key that signs. Blocks. Raises `KeyProblem`."""
    key = None
    if options.key is not None:
        key = signing_key(options.key, key_id=options.key_id, algorithm=options.algorithm, scope=options.scope)
    token = secret_in(options.token) if options.token is not None else ""
    if not token.isascii() or any(letter.isspace() for letter in token):
        raise KeyProblem(f"{options.token} is to hold one word of ASCII")
    return token, key


async def renew(server: BundleServer, options: BundleOptions, known: tuple[str, BundleKey | None]) -> None:
    """Reads key and token again and again, and has the server use those that are others. What can't be used leaves the last good ones."""
    said = ""
    while options.key is not None or options.token is not None:
        await asyncio.sleep(EVERY)
        try:
            found = await asyncio.to_thread(secrets_of, options)
            if found != known:
                await server.renew(*found)
                log.info("bundles have a new %s", "key" if found[1] != known[1] else "token")
            known, said = found, ""
        except (KeyProblem, PolicyError, EngineUnavailable) as problem:
            if str(problem) != said:
                said = str(problem)
                log.error("bundles are served with the key and token from before: %s", problem)


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
