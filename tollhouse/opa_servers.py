"""The user's own OPA servers as the engine of a process: how it is told of them, and what it shows of them."""

from __future__ import annotations

import functools
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

import click
import msgspec

from tollhouse.output import Complaint

if TYPE_CHECKING:
    from identity.files import IdentitySource
    from mesh.policy import Revision
    from pdp.engines.bundle import BundleServer
    from pdp.engines.engine import Done
    from pdp.engines.server import OpaServer, ServerState
    from telemetry.record import Telemetry
    from tollhouse.bundling import BundleOptions
    from tollhouse.parts import LazyPool

BUNDLE: Final = "bundle"
REST: Final = "rest"
_FILE: Final = click.Path(path_type=Path, exists=True, dir_okay=False)


class OpaOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What the command line says of OPA servers."""

    urls: tuple[str, ...] = ()
    """None: our workers evaluate."""
    by: str = BUNDLE
    """How they come by revisions: they fetch a `bundle`, or it is written to them by `rest`."""
    token: Path | None = None
    ca: Path | None = None

    def __bool__(self) -> bool:
        return bool(self.urls)

    @property
    def fetch(self) -> bool:
        """Whether they fetch bundles, and hold one revision at a time."""
        return bool(self.urls) and self.by == BUNDLE

    def arguments(self) -> tuple[tuple[str, str], ...]:
        """The options as they were given."""
        if not self:
            return ()
        files = (("--opa-token", str(self.token or "")), ("--opa-ca", str(self.ca or "")))
        return (("--opa", ",".join(self.urls)), ("--opa-by", self.by), *files)


def opa_choices(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options about OPA servers, as one argument `opa`: an `OpaOptions`."""

    @functools.wraps(command)
    def called(opa: str, opa_by: str | None, opa_token: Path | None, opa_ca: Path | None, **more: Any) -> Any:
        urls = tuple(url.strip() for url in opa.split(",") if url.strip())
        if not urls and (opa_by or opa_token or opa_ca):
            raise click.UsageError("--opa-by, --opa-token and --opa-ca are about OPA servers: say which by --opa")
        return command(opa=OpaOptions(urls=urls, by=opa_by or BUNDLE, token=opa_token, ca=opa_ca), **more)

    for option in (
        click.option("--opa-ca", type=_FILE, metavar="FILE", help="CAs (PEM) of the OPA servers.  [default: the system's]"),
        click.option("--opa-token", type=_FILE, metavar="FILE", help="File with the bearer token for the OPA servers; chmod 600."),
        click.option(
            "--opa-by",
            type=click.Choice([BUNDLE, REST]),
            help="Whether they fetch revisions as bundles, or get them written by REST and are kept in step.  [default: bundle]",
        ),
        click.option("--opa", default="", metavar="URL[,...]", help="OPA servers that evaluate in place of the workers."),
    ):
        called = option(called)
    return called


class OpaServers:
    """The user's own OPA servers as an `Engine`, with the endpoint that they fetch revisions from, if they do."""

    def __init__(self, server: OpaServer, bundles: BundleServer | None) -> None:
        self._server = server
        self._bundles = bundles

    def evaluate(self, revision: Revision, path: str, document: bytes, timeout: float, done: Done) -> None:
        """As `Engine.evaluate`."""
        self._server.evaluate(revision, path, document, timeout, done)

    async def load(self, revision: Revision) -> None:
        """As `Engine.load`."""
        await self._server.load(revision)

    def state(self) -> tuple[ServerState, ...]:
        """How the servers are doing."""
        return self._server.state()

    async def close(self) -> None:
        """As `Engine.close`."""
        await self._server.close()
        if self._bundles is not None:
            await self._bundles.stop()


async def open_opa(
    options: OpaOptions, bundles: BundleOptions, pool: LazyPool, identity: IdentitySource | None, telemetry: Telemetry | None
) -> OpaServers:
    """The engine that `options` name. Raises `Complaint`."""
    from pdp.engines.server import OpaServer
    from pdp.engines.written import WrittenOpaServers
    from tollhouse.bundling import open_bundles

    token, tls = _credentials(options)
    if options.fetch:
        endpoint = await open_bundles(bundles, pool, identity) if bundles.listen else None
        engine = OpaServers(OpaServer(options.urls, bundles=endpoint, token=token, tls=tls), endpoint)
    else:
        engine = OpaServers(WrittenOpaServers(options.urls, pool, token=token, tls=tls), None)
    if telemetry is not None:
        telemetry.gauge_function(
            "tollhouse_opa_server_well",
            "Whether an OPA server answers and holds what it should (1), or not (0).",
            lambda: {(each.url,): float(each.well and not each.problem) for each in engine.state()},
            ("server",),
        )
        telemetry.counter_function(
            "tollhouse_opa_server_drifts_total",
            "Times that an OPA server was found to hold something else than it should.",
            lambda: {(each.url,): float(each.drifts) for each in engine.state()},
            ("server",),
        )
    return engine


def shown_opa(engine: object) -> dict[str, Any]:
    """What `/status` shows of OPA servers; nothing for another engine."""
    if not isinstance(engine, OpaServers):
        return {}
    rows = [
        {
            "url": each.url,
            "well": each.well and not each.problem,
            "revisions": list(each.revisions),
            "problem": each.problem,
            "drifts": each.drifts,
        }
        for each in engine.state()
    ]
    return {"opaServers": rows}


def _credentials(options: OpaOptions) -> tuple[str, ssl.SSLContext | None]:
    """The token, and how to check certificates. Raises `Complaint`."""
    from pdp.bundle_keys import KeyProblem, secret_in

    for url in options.urls:
        parts = urlsplit(url)
        try:
            fine = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
        except ValueError:
            fine = False
        if not fine or parts.query or parts.fragment or parts.username:
            raise Complaint(f"--opa: {url.rpartition('@')[2]!r} is no URL of an OPA server; write for example http://127.0.0.1:8181", 2)
        if options.token is not None and parts.scheme == "http" and parts.hostname not in {"127.0.0.1", "::1", "localhost"}:
            raise Complaint(f"--opa-token: {url} would show it to anybody on the way; use https", 2)
    try:
        token = secret_in(options.token) if options.token is not None else ""
    except KeyProblem as problem:
        raise Complaint(f"--opa-token: {problem}", 2) from None
    if not token.isascii() or any(letter.isspace() for letter in token) or (options.token is not None and not token):
        raise Complaint(f"--opa-token: {options.token} is to hold one word of ASCII", 2)
    try:
        tls = ssl.create_default_context(cafile=str(options.ca)) if options.ca is not None else None
    except (OSError, ssl.SSLError) as problem:
        raise Complaint(f"--opa-ca: {options.ca}: {problem}", 2) from None
    return token, tls
