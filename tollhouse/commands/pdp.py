"""`tollhouse pdp`: the policy decision point."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from tollhouse.commands.bundle_options import BUNDLE_SERVICES, served_bundles
from tollhouse.opa_servers import OpaOptions, opa_choices
from tollhouse.output import example
from tollhouse.values import ADMIN, TARGET

if TYPE_CHECKING:
    from tollhouse.bundling import BundleOptions


@click.command(epilog=example("tollhouse pdp --config etcd://127.0.0.1:2379 --listen 127.0.0.1:9191"))
@click.option("--config", default="", help="Where the mesh is: a directory, or etcd://HOST:PORT[,HOST:PORT...].")
@click.option("--policy", type=click.Path(path_type=Path, exists=True, file_okay=False), help="In place of --config: a folder of Rego.")
@click.option("--decision", default="", help="The decision of a caller that names none: shop.authz.decision, or shop/authz/decision.")
@click.option("--listen", type=TARGET, default="127.0.0.1:9191", show_default=True, metavar="HOST:PORT", help="Where to listen (gRPC).")
@click.option(
    "--http", type=TARGET, default=None, metavar="HOST:PORT", help="Listen for checks over plain HTTP, too (Envoy, nginx, Traefik)."
)
@click.option("--dry-run", is_flag=True, help="With --policy: allow everything, and log and count what would have been.")
@opa_choices
@served_bundles(alone=True)
@BUNDLE_SERVICES
@click.option("--workers", type=click.IntRange(1, 64), default=1, show_default=True, help="OPA worker processes.")
@click.option("--threads", type=click.IntRange(1, 64), default=2, show_default=True, help="Evaluations at a time in each of them.")
@click.option("--allow-builtin", multiple=True, help="A builtin to allow although it is forbidden by default (http.send, for one).")
@click.option("--forbid-builtin", multiple=True, help="A builtin to forbid as well; may be given again.")
@click.option("--identity", type=click.Path(path_type=Path), help="Folder with cert.pem, key.pem, ca.pem: serve mTLS to gateways only.")
@click.option("--admin", type=ADMIN, default="off", show_default=True, metavar="HOST:PORT|off", help="Where the admin page is.")
@click.option("--state", type=click.Path(path_type=Path), help="Folder for the last good configuration, for a start without etcd.")
@click.option("--verbose", "-v", is_flag=True, help="Log more.")
def pdp(
    config: str,
    policy: Path | None,
    decision: str,
    listen: str,
    http: str | None,
    dry_run: bool,
    opa: OpaOptions,
    bundles: BundleOptions,
    bundle_services: Path | None,
    workers: int,
    threads: int,
    allow_builtin: tuple[str, ...],
    forbid_builtin: tuple[str, ...],
    identity: Path | None,
    admin: str,
    state: Path | None,
    verbose: bool,
) -> None:
    """Run the policy decision point: ext_authz v3 for our gateways, Envoy and Istio.

    With --config it serves the mesh's active revision; with --policy and --decision it serves a folder of Rego to any Envoy, in the
    place of the OPA-Envoy plugin.
    """
    from pdp.engines.engine import segments
    from tollhouse.pdp_process import PdpOptions, run_pdp
    from tollhouse.runtime import run as run_process

    if bool(config) == (policy is not None):
        raise click.UsageError("give either --config (a mesh) or --policy (a folder of Rego)")
    if policy is not None and not decision:
        raise click.UsageError("--policy needs --decision: the rule to ask for, for example shop.authz.decision")
    if dry_run and policy is None:
        raise click.UsageError("--dry-run goes with --policy alone; in a mesh, AccessPolicy has mode: Shadow")
    if decision:
        try:
            decision = ".".join(segments(decision))
        except ValueError as problem:
            raise click.UsageError(f"--decision: {problem}") from None
    options = PdpOptions(
        config=config,
        policy=policy,
        decision=decision,
        listen=listen,
        http=http or "",
        dry_run=dry_run,
        opa=opa,
        bundles=bundles,
        bundle_services=bundle_services,
        workers=workers,
        threads=threads,
        allow=allow_builtin,
        forbid=forbid_builtin,
        identity=identity,
        admin=admin,
        state=state,
    )
    run_process(lambda runtime: run_pdp(options, runtime), verbose)
