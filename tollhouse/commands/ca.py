"""`tollhouse ca`: a small certificate authority for a mesh that has none."""

from __future__ import annotations

import asyncio
import datetime
import logging
from pathlib import Path

import click

from tollhouse.output import Complaint, emit, format_option
from tollhouse.values import DURATION

log = logging.getLogger("tollhouse.ca")


@click.group(epilog="Example: tollhouse ca init --trust-domain shop.example --dir /var/lib/tollhouse/ca")
def ca() -> None:
    """Make the authority, issue identities, keep them fresh.

    An identity is a folder with cert.pem, key.pem (mode 0600) and ca.pem: an X.509-SVID, its key and the trust bundle.
    """


@ca.command(epilog="Example: tollhouse ca init --trust-domain shop.example --dir ca")
@click.option(
    "--dir", "directory", type=click.Path(path_type=Path), default=Path("ca"), show_default=True, help="Where the authority is kept."
)
@click.option("--trust-domain", required=True, help="The SPIFFE trust domain, for example shop.example.")
@click.option("--lifetime", type=DURATION, default="3650d", show_default=True, help="How long the root certificate lasts.")
def init(directory: Path, trust_domain: str, lifetime: float) -> None:
    """Make a new root key and certificate."""
    from identity.ca import Authority
    from identity.problems import IdentityError

    try:
        made = Authority.init(directory, trust_domain, lifetime)
    except IdentityError as problem:
        raise Complaint(str(problem)) from None
    click.echo(f"root of {made.trust_domain} in {directory}, until {day(made.not_after)}; keep {directory / 'ca.key'} secret")


@ca.command(epilog="Example: tollhouse ca issue --dir ca spiffe://shop.example/ns/shop/sa/web --out identities/shop-web")
@click.argument("spiffe_id")
@click.option(
    "--dir", "directory", type=click.Path(path_type=Path), default=Path("ca"), show_default=True, help="Where the authority is kept."
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to write cert.pem, key.pem and ca.pem to.")
@click.option("--dns", multiple=True, help="A DNS name that the certificate is also for; may be given again.")
@click.option("--ip", multiple=True, help="An IP address that the certificate is also for; may be given again.")
@click.option("--lifetime", type=DURATION, default="24h", show_default=True, help="How long the certificate lasts.")
@format_option
def issue(spiffe_id: str, directory: Path, out: Path, dns: tuple[str, ...], ip: tuple[str, ...], lifetime: float, form: str) -> None:
    """Issue the identity of one workload or gateway."""
    from identity.ca import Authority, write_identity
    from identity.problems import IdentityError

    try:
        made = Authority.load(directory).issue(spiffe_id, dns, ip, lifetime)
        write_identity(made, out)
    except IdentityError as problem:
        raise Complaint(str(problem)) from None
    shown = {"spiffeId": str(made.spiffe_id), "directory": str(out), "notAfter": day(made.not_after), "dns": list(dns)}
    emit(form, shown, [[str(made.spiffe_id), str(out), day(made.not_after)]], ["identity", "directory", "until"])


@ca.command(epilog="Example: tollhouse ca run --dir /var/lib/tollhouse/ca /etc/tollhouse/identity/ingress")
@click.argument("identities", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option(
    "--dir", "directory", type=click.Path(path_type=Path), default=Path("ca"), show_default=True, help="Where the authority is kept."
)
@click.option("--lifetime", type=DURATION, default="24h", show_default=True, help="How long each renewed certificate lasts.")
@click.option("--check", type=DURATION, default="60s", show_default=True, help="How often to look.")
def run(identities: tuple[Path, ...], directory: Path, lifetime: float, check: float) -> None:
    """Keep the identities in these folders fresh: each is renewed when half of its life is over.

    The names that a certificate is for are kept. Gateways notice the new files by themselves.
    """
    from identity.ca import Authority
    from identity.problems import IdentityError
    from identity.renewer import Renewer
    from telemetry.notify import Notifier
    from tollhouse.runtime import Runtime
    from tollhouse.runtime import run as run_process

    try:
        renewer = Renewer(Authority.load(directory), identities, lifetime=lifetime)
    except IdentityError as problem:
        raise Complaint(str(problem)) from None

    async def process(runtime: Runtime) -> None:
        notifier = Notifier()
        while not runtime.stopping.is_set():
            for line in renewer.renew():
                log.info("%s", line)
            notifier.ready(f"{len(identities)} identities")
            try:
                await asyncio.wait_for(runtime.stopping.wait(), check)
            except TimeoutError:
                continue
        notifier.stopping()

    run_process(process)


def day(moment: float) -> str:
    """A wall-clock time in seconds as ISO 8601, UTC."""
    return datetime.datetime.fromtimestamp(moment, datetime.UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
