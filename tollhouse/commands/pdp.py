"""`tollhouse pdp`: the policy decision point."""

from __future__ import annotations

from pathlib import Path

import click

from tollhouse.output import example
from tollhouse.values import ADMIN, TARGET

FILE = click.Path(path_type=Path, exists=True, dir_okay=False)
ALGORITHMS = tuple(f"{family}{bits}" for family in ("RS", "PS", "ES", "HS") for bits in (256, 384, 512))


@click.command(epilog=example("tollhouse pdp --config etcd://127.0.0.1:2379 --listen 127.0.0.1:9191"))
@click.option("--config", default="", help="Where the mesh is: a directory, or etcd://HOST:PORT[,HOST:PORT...].")
@click.option("--policy", type=click.Path(path_type=Path, exists=True, file_okay=False), help="In place of --config: a folder of Rego.")
@click.option("--decision", default="", help="The decision of a caller that names none: shop.authz.decision, or shop/authz/decision.")
@click.option("--listen", type=TARGET, default="127.0.0.1:9191", show_default=True, metavar="HOST:PORT", help="Where to listen (gRPC).")
@click.option(
    "--http", type=TARGET, default=None, metavar="HOST:PORT", help="Listen for checks over plain HTTP, too (Envoy, nginx, Traefik)."
)
@click.option("--dry-run", is_flag=True, help="With --policy: allow everything, and log and count what would have been.")
@click.option("--opa", default="", metavar="URL[,...]", help="OPA servers that evaluate in place of the workers.")
@click.option(
    "--opa-bundles",
    type=TARGET,
    metavar="HOST:PORT",
    help="Where OPA servers fetch the active revision as a bundle (off this machine: with --identity).  [with --opa: 127.0.0.1:8282]",
)
@click.option("--bundle-key", type=FILE, help="Private key (PEM) or shared secret that signs those bundles; chmod 600.")
@click.option("--bundle-key-id", default="default", show_default=True, metavar="ID", help="What OPA knows the key by.")
@click.option("--bundle-algorithm", type=click.Choice(ALGORITHMS), help="How to sign.  [default: RS256, ES256 or HS256, by the key]")
@click.option("--bundle-scope", default="", metavar="TEXT", help="What bundles are signed for (OPA: signing.scope).")
@click.option("--bundle-token", type=FILE, help="File with the bearer token that a client of those bundles must send; chmod 600.")
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
    opa: str,
    opa_bundles: str | None,
    bundle_key: Path | None,
    bundle_key_id: str,
    bundle_algorithm: str | None,
    bundle_scope: str,
    bundle_token: Path | None,
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
    from tollhouse.bundling import DEFAULT, BundleOptions
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
    if opa and not opa_bundles:
        opa_bundles = DEFAULT
    if not opa_bundles and (bundle_key or bundle_token or bundle_scope or bundle_algorithm):
        raise click.UsageError("--bundle-... is for bundles that are served: say where by --opa-bundles")
    bundles = BundleOptions(
        listen=opa_bundles or "",
        key=bundle_key,
        key_id=bundle_key_id,
        algorithm=bundle_algorithm or "",
        scope=bundle_scope,
        token=bundle_token,
    )
    options = PdpOptions(
        config=config,
        policy=policy,
        decision=decision,
        listen=listen,
        http=http or "",
        dry_run=dry_run,
        opa=opa,
        bundles=bundles,
        workers=workers,
        threads=threads,
        allow=allow_builtin,
        forbid=forbid_builtin,
        identity=identity,
        admin=admin,
        state=state,
    )
    run_process(lambda runtime: run_pdp(options, runtime), verbose)
