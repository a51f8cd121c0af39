"""Who decides for a gateway: its decision points and its own engine, and that they hold a policy before it is in force."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
from typing import Protocol

from gateway.grpc_channel import GrpcChannels
from identity.files import MISSING, IdentitySource
from mesh.model import Snapshot
from mesh.policy import Revision
from pdp.client import PdpClient
from pdp.decider import PolicyDecider
from pdp.engines.apart import Apart
from pdp.engines.engine import Engine, EngineUnavailable, PolicyError
from tollhouse.output import Complaint
from tollhouse.policy_supply import NotReady, Prepare

log = logging.getLogger("tollhouse.gateway")

HOLDS = 2.0
"""Seconds that a decision point is asked for a revision that it may still be fetching, before that is told."""
PRELOAD = 10.0
"""Seconds that a new configuration waits at most for its policy to be loaded."""


class Asks(Protocol):
    """What the command line says about decision points."""

    @property
    def pdp(self) -> tuple[str, ...]:
        """`HOST:PORT` each."""
        ...

    @property
    def pdp_name(self) -> str:
        """For whom their certificate must be; empty for plaintext."""
        ...


def open_channels(options: Asks, identity: IdentitySource) -> GrpcChannels:
    """The ways to the decision points, under mTLS with this gateway's identity when `--pdp-name` says whose certificate to expect."""
    loop = asyncio.get_running_loop()
    if not options.pdp or not options.pdp_name:
        return GrpcChannels(loop)
    if not identity.current.chain:
        raise Complaint(f"--pdp-name asks for mutual TLS with the decision point, and {MISSING}", 2)
    return GrpcChannels(loop, identity, options.pdp_name)


def open_client(targets: tuple[str, ...], channels: GrpcChannels) -> PdpClient | None:
    """The client of the decision points at `targets`; None when there are none. Raises `Complaint` for one that is not `HOST:PORT`."""
    if not targets:
        return None
    try:
        return PdpClient(targets, channels)
    except ValueError as problem:
        raise Complaint(f"--pdp: {problem}", 2) from None


def check_pdp(options: Asks, snapshot: Snapshot) -> None:
    """Decisions in plaintext off this machine can be turned around by anybody on the way. Raises `Complaint` where the mesh is strict."""
    away = [target for target in options.pdp if not is_loopback(target)]
    if not away or options.pdp_name:
        return
    why = f"the decision point at {away[0]} is asked in plaintext, and not on this machine: give --pdp-name, and run it with --identity"
    if snapshot.mesh.upstream == "Strict":
        raise Complaint(f"{why} (Mesh.spec.upstream is Strict)")
    log.warning("%s", why)


def is_loopback(target: str) -> bool:
    """Whether `host:port` is on this machine."""
    host = target.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def asks_itself(snapshot: Snapshot, *, remote: bool) -> bool:
    """Whether anything of the active revision is asked of this process's own engine: with `remote` decision points only policies with
    `place: Local` are."""
    return not remote or any(policy.place == "Local" for policy in snapshot.policies.values())


def readiness(client: PdpClient | None, engine: Engine) -> Prepare:
    """What must be true of a revision that had to be brought here before it decides: whoever is asked holds it."""

    async def prepare(revision: Revision, field: str, snapshot: Snapshot) -> None:
        if field != "shadow" and asks_itself(snapshot, remote=client is not None):
            await engine.load(revision)
        if client is not None and not await client.holds(revision.digest, HOLDS):
            raise NotReady("no decision point holds it; the log of `tollhouse pdp` says why")

    return prepare


async def preload(snapshot: Snapshot, decider: PolicyDecider, engine: Apart, own: Engine, *, remote: bool) -> None:
    """Has the engine hold the revisions of `snapshot` before it is in force, if anything is asked of it (`asks_itself`).
    AuthorizationPolicies are always asked of `own`."""
    await decider.apply(snapshot)
    following = engine.follow(snapshot) if asks_itself(snapshot, remote=remote) else ()
    wanted: list[tuple[Engine, Revision | None]] = [(engine, revision) for revision in following]
    for holder_of, revision in (*wanted, (own, snapshot.authorization)):
        if revision is not None:
            try:
                async with asyncio.timeout(PRELOAD):
                    await holder_of.load(revision)
            except (PolicyError, EngineUnavailable, TimeoutError) as problem:
                log.error("policy revision %s cannot be loaded here: %s", revision.digest, problem)
