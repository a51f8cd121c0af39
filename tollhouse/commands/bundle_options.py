"""The options of bundles that are served to OPA servers, and of those that are fetched; the same for every command that has them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from tollhouse.values import TARGET

if TYPE_CHECKING:
    from tollhouse.opa_servers import OpaOptions

F = TypeVar("F", bound=Callable[..., Any])
FILE = click.Path(path_type=Path, exists=True, dir_okay=False)
ALGORITHMS = tuple(f"{family}{bits}" for family in ("RS", "PS", "ES", "HS") for bits in (256, 384, 512))

BUNDLE_SERVICES = click.option(
    "--bundle-services",
    type=FILE,
    metavar="FILE",
    help="Credentials, CAs and keys (YAML) for the servers that bundles are fetched from; docs/policy.md has its form.",
)


def served_bundles(*, alone: bool) -> Callable[[F], F]:
    """The options of bundles that are served, as `bundles: BundleOptions`, beside the command's own `opa`. `alone`: also without OPA
    servers that are asked."""

    def decorate(command: F) -> F:
        @functools.wraps(command)
        def with_bundles(
            *,
            opa: OpaOptions,
            opa_bundles: str | None,
            bundle_key: Path | None,
            bundle_key_id: str,
            bundle_algorithm: str | None,
            bundle_scope: str,
            bundle_token: Path | None,
            **others: Any,
        ) -> Any:
            from tollhouse.bundling import DEFAULT, BundleOptions

            more = bundle_key or bundle_token or bundle_scope or bundle_algorithm
            if not alone and not opa and (opa_bundles or more):
                raise click.UsageError("--opa-bundles and --bundle-... are for OPA servers that are asked: say where by --opa")
            if not alone and not opa.fetch and (opa_bundles or more):
                raise click.UsageError("--opa-bundles and --bundle-... are for OPA servers that fetch bundles, not for --opa-by rest")
            listen = opa_bundles or (DEFAULT if opa.fetch else "")
            if not listen and more:
                raise click.UsageError("--bundle-... is for bundles that are served: say where by --opa-bundles")
            bundles = BundleOptions(
                listen=listen,
                key=bundle_key,
                key_id=bundle_key_id,
                algorithm=bundle_algorithm or "",
                scope=bundle_scope,
                token=bundle_token,
            )
            return command(opa=opa, bundles=bundles, **others)

        where = "Where OPA servers fetch the active revision as a bundle (off this machine: with --identity)."
        for option in (
            click.option(
                "--bundle-token", type=FILE, help="File with the bearer token that a client of those bundles must send; chmod 600."
            ),
            click.option("--bundle-scope", default="", metavar="TEXT", help="What bundles are signed for (OPA: signing.scope)."),
            click.option(
                "--bundle-algorithm", type=click.Choice(ALGORITHMS), help="How to sign.  [default: RS256, ES256 or HS256, by the key]"
            ),
            click.option("--bundle-key-id", default="default", show_default=True, metavar="ID", help="What OPA knows the key by."),
            click.option("--bundle-key", type=FILE, help="Private key (PEM) or shared secret that signs those bundles; chmod 600."),
            click.option("--opa-bundles", type=TARGET, metavar="HOST:PORT", help=f"{where}  [with --opa: 127.0.0.1:8282]"),
        ):
            with_bundles = option(with_bundles)
        return with_bundles  # type: ignore[return-value]

    return decorate
