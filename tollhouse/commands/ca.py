"""`tollhouse ca`: a small certificate authority for a mesh that has none."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import logging
from pathlib import Path

import click

from tollhouse.output import Complaint, emit, example, format_option
from tollhouse.values import DURATION

log = logging.getLogger("tollhouse.ca")


@click.group(epilog=example("tollhouse ca init --trust-domain shop.example --dir /var/lib/tollhouse/ca"))
def ca() -> None:
    """Make the authority, issue identities, keep them fresh.

    An identity is a folder with cert.pem, key.pem (mode 0600) and ca.pem: an X.509-SVID, its key and the trust bundle.
    """


@ca.command(epilog=example("tollhouse ca init --trust-domain shop.example --dir ca"))
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


@ca.command(epilog=example("tollhouse ca issue --dir ca spiffe://shop.example/ns/shop/sa/web --out identities/shop-web"))
@click.argument("spiffe_id")
@click.option(
    "--dir", "directory", type=click.Path(path_type=Path), default=Path("ca"), show_default=True, help="Where the authority is kept."
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to write cert.pem, key.pem and ca.pem to.")
@click.option("--dns", multiple=True, help="A DNS name that the certificate is also for; may be given again.")
@click.option("--ip", multiple=True, help="An IP address that the certificate is also for; may be given again.")
@click.option("--user", default="", help="The user (common name) that an etcd with --client-cert-auth takes its bearer for.")
@click.option("--lifetime", type=DURATION, default="24h", show_default=True, help="How long the certificate lasts.")
@format_option
def issue(
    spiffe_id: str, directory: Path, out: Path, dns: tuple[str, ...], ip: tuple[str, ...], user: str, lifetime: float, form: str
) -> None:
    """Issue the identity of one workload or gateway."""
    from identity.ca import Authority, write_identity
    from identity.problems import IdentityError

    try:
        made = Authority.load(directory).issue(spiffe_id, dns, ip, lifetime, common_name=user)
        write_identity(made, out)
    except IdentityError as problem:
        raise Complaint(str(problem)) from None
    shown = {"spiffeId": str(made.spiffe_id), "directory": str(out), "notAfter": day(made.not_after), "dns": list(dns)}
    emit(form, shown, [[str(made.spiffe_id), str(out), day(made.not_after)]], ["identity", "directory", "until"])


@ca.command(epilog=example("tollhouse ca run --dir /var/lib/tollhouse/ca /etc/tollhouse/identity/ingress"))
@click.argument("identities", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option(
    "--dir", "directory", type=click.Path(path_type=Path), default=Path("ca"), show_default=True, help="Where the authority is kept."
)
@click.option("--lifetime", type=DURATION, default="24h", show_default=True, help="How long each renewed certificate lasts.")
def run(identities: tuple[Path, ...], directory: Path, lifetime: float) -> None:
    """Keep the identities in these folders fresh: each is renewed when half to two thirds of its life are over.

    Each folder must hold an identity already (`tollhouse ca issue`); the names that it is for are kept. Gateways notice the new files by
    themselves.
    """
    from identity.ca import Authority
    from identity.problems import IdentityError, IdentityProblem
    from identity.renewal import Charge, Renewer
    from identity.svid import facts_of_pem, spiffe_id_of
    from telemetry.notify import Notifier
    from tollhouse.runtime import Runtime
    from tollhouse.runtime import run as run_process

    def charge(folder: Path) -> Charge:
        path = folder / "cert.pem"
        try:
            facts = facts_of_pem(path.read_bytes(), str(path))
        except OSError as problem:
            raise Complaint(f"{path}: {problem.strerror}; issue the identity first: tollhouse ca issue") from None
        found = spiffe_id_of(facts)
        if isinstance(found, IdentityProblem):
            raise Complaint(f"{path}: {found}")
        return Charge(
            directory=folder,
            spiffe_id=found,
            dns=facts.dns_names,
            ip=facts.ip_addresses,
            lifetime=lifetime,
            common_name=facts.common_name,
        )

    try:
        Authority.load(directory)
        renewer = Renewer(lambda: Authority.load(directory), [charge(folder) for folder in identities])
    except IdentityError as problem:
        raise Complaint(str(problem)) from None

    async def process(runtime: Runtime) -> None:
        notifier = Notifier()
        told: dict[Path, str] = {}
        while not runtime.stopping.is_set():
            before = renewer.renewed
            wait = await runtime.loop.run_in_executor(None, renewer.run_once)
            if renewer.renewed > before:
                log.info("renewed %d of %d identities", renewer.renewed - before, len(identities))
            for folder, why in renewer.problems.items():
                if told.get(folder) != why:
                    log.error("%s: %s", folder, why)
            told = dict(renewer.problems)
            notifier.ready(f"{len(identities)} identities, {len(renewer.problems)} with problems")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(runtime.stopping.wait(), wait)
        notifier.stopping()

    run_process(process)


def day(moment: float) -> str:
    """A wall-clock time in seconds as ISO 8601, UTC."""
    return datetime.datetime.fromtimestamp(moment, datetime.UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
