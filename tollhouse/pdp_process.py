"""`tollhouse pdp` as a process."""

from __future__ import annotations

import asyncio
import logging
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import msgspec

from discovery.directory import DirectorySource
from discovery.source import Change, OnChange, Source, SourceStatus
from mesh.backoff import Backoff
from mesh.documents import Document
from mesh.model import Snapshot
from mesh.policy import Revision
from mesh.reading import document_of
from pdp.engines.apart import Apart
from pdp.engines.bundle import BundleServer
from pdp.engines.engine import EngineUnavailable, PolicyError
from pdp.http_service import PolicyHttp
from pdp.point import DecisionPoint
from pdp.service import PolicyService, server_credentials
from telemetry.admin import Shown
from telemetry.notify import Notifier
from tollhouse.bundling import BundleOptions, open_bundles
from tollhouse.gateway_process import keep_alive, open_admin, split_address, status_of
from tollhouse.keeper import Keeper
from tollhouse.logs import DecisionLogOptions, open_telemetry
from tollhouse.opa_servers import OpaOptions
from tollhouse.output import Complaint
from tollhouse.parts import Configuration, LazyPool, look_at_port, open_engine, open_identity, state_directory
from tollhouse.policy_supply import open_supply
from tollhouse.runtime import Runtime

log = logging.getLogger("tollhouse.pdp")

HELD = 4
"""Revisions that are answered for: gateways may ask for the one before while a new one spreads."""


class PdpOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What the command line says."""

    config: str = ""
    policy: Path | None = None
    decision: str = ""
    dry_run: bool = False
    http: str = ""
    listen: str = "127.0.0.1:9191"
    opa: OpaOptions = OpaOptions()
    bundles: BundleOptions = BundleOptions()
    bundle_services: Path | None = None
    workers: int = 1
    threads: int = 2
    allow: tuple[str, ...] = ()
    forbid: tuple[str, ...] = ()
    identity: Path | None = None
    admin: str = "off"
    state: Path | None = None


class Revisions:
    """The revisions that this process answers for; the newest is the active one. Its owner calls `apply` with each snapshot."""

    def __init__(self, engine: Apart, bundles: BundleServer | None = None) -> None:
        """`bundles`: where the active one is served, besides."""
        self._engine = engine
        self._bundles = bundles
        self._held: OrderedDict[str, Revision] = OrderedDict()
        self._tasks: set[asyncio.Task[None]] = set()
        self._turn = asyncio.Lock()
        self.active: Revision | None = None

    def held(self, digest: str) -> Revision | None:
        """The revision `digest`, if it is held."""
        return self._held.get(digest)

    def apply(self, snapshot: Snapshot) -> None:
        """Holds what `snapshot` names, each once the engine has loaded it: gateways put a revision in force when it is held."""
        task = asyncio.get_running_loop().create_task(self._follow(snapshot))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _follow(self, snapshot: Snapshot) -> None:
        async with self._turn:  # one that loads slowly must not end up active after its successor
            await self._load(snapshot)

    async def _load(self, snapshot: Snapshot) -> None:
        policy = snapshot.policy
        for revision in self._engine.follow(snapshot):
            try:
                await self._engine.load(revision)
            except (PolicyError, EngineUnavailable) as problem:
                log.error("policy revision %s cannot be loaded: %s", revision.digest, problem)
                if self.active is not None:
                    continue
            # Another object of the same digest may have other entry points.
            self._held[revision.digest] = revision
            self._held.move_to_end(revision.digest)
            while len(self._held) > HELD:
                self._held.popitem(last=False)
            if revision is policy and self.active is not revision:
                if self.active is None or self.active.digest != revision.digest:
                    log.info("policy revision %s is active", revision.digest)
                self.active = revision
                await self._serve(revision)

    async def _serve(self, revision: Revision) -> None:
        """Offers the active revision as a bundle. When it can't be signed now, the one before stays offered."""
        if self._bundles is None:
            return
        backoff = Backoff(0.1, 5.0)
        while self.active is revision:
            try:
                await self._bundles.publish(revision)
            except (PolicyError, EngineUnavailable) as problem:
                log.error("the bundle of policy revision %s can't be made: %s", revision.digest, problem)
                await asyncio.sleep(backoff.next())
            else:
                return

    async def settled(self) -> None:
        """Waits until what was to be loaded is."""
        while self._tasks:
            await asyncio.wait(set(self._tasks))


class PolicyFolder:
    """A `Source` for a folder of Rego alone: its files, and one AccessPolicy that names the decision.

    To the reader of directories it is one whose `policy/` is a link to the folder.
    """

    def __init__(self, folder: Path, decision: str) -> None:
        self._around = Path(tempfile.mkdtemp(prefix="tollhouse-policy-"))
        (self._around / "policy").symlink_to(folder.resolve(), target_is_directory=True)
        self._inner = DirectorySource(self._around)
        body = {
            "apiVersion": "tollhouse.dev/v1",
            "kind": "AccessPolicy",
            "metadata": {"namespace": "default", "name": "default"},
            "spec": {"decision": decision},
        }
        self._policy: Document = document_of(body, "--decision", "1")

    @property
    def status(self) -> SourceStatus:
        """As `Source.status`."""
        return self._inner.status

    async def start(self, on_change: OnChange) -> None:
        """As `Source.start`."""

        def changed(change: Change) -> None:
            documents = (self._policy,) if change.replace else ()
            on_change(msgspec.structs.replace(change, upserts=documents, deletes=()))

        await self._inner.start(changed)

    async def stop(self) -> None:
        """As `Source.stop`."""
        await self._inner.stop()
        shutil.rmtree(self._around, ignore_errors=True)

    def reload(self) -> None:
        """Reads the folder again at once."""
        self._inner.reload()


async def run_pdp(options: PdpOptions, runtime: Runtime) -> None:
    """Runs the decision point until it is told to stop. Raises `Complaint`, `OSError`."""
    notifier = Notifier()
    telemetry = open_telemetry("off", DecisionLogOptions(), runtime)
    identity = open_identity(options.identity, runtime) if options.identity is not None else None
    state = state_directory(options.state)
    configuration: Configuration | None = None
    source: Source
    if options.policy is not None:
        folder = PolicyFolder(options.policy, options.decision)
        runtime.on_reload(folder.reload)
        source = folder
    else:
        configuration = Configuration(options.config, state)
        runtime.on_reload(configuration.reload)
        source = configuration.source
    pool = LazyPool(options.workers, threads=options.threads, allow=options.allow, forbid=options.forbid, telemetry=telemetry)
    engine = await open_engine(options.opa, options.bundles, pool, identity, telemetry)
    supply = open_supply(pool, options.bundle_services, state)
    keeper = Keeper(source, pool.compile, supply=supply)
    apart = Apart(engine, None if options.opa.fetch else LazyPool(1, threads=1, allow=options.allow, forbid=options.forbid))
    endpoint = await open_bundles(options.bundles, pool, identity) if options.bundles.listen and not options.opa.fetch else None
    revisions = Revisions(apart, endpoint)
    keeper.add(revisions.apply)
    callers: Callable[[], frozenset[str]] | None = None
    if identity is not None and options.policy is None:
        callers = lambda: keeper.snapshot.mesh.trusted_gateways  # noqa: E731 -- read anew at each question
    point = DecisionPoint(
        apart,
        active=lambda: revisions.active,
        held=revisions.held,
        decision=options.decision,
        dry_run=options.dry_run,
        telemetry=telemetry,
    )
    service = PolicyService(point, callers=callers)
    web = PolicyHttp(point, callers=callers)
    pages = None
    try:
        await keeper.start()
        await revisions.settled()
        if options.policy is not None:
            if revisions.active is None:
                wrong = [str(each) for each in keeper.snapshot.problems if each.severity == "error"]
                why = "; ".join(wrong) or "there is no .rego file in it that is not a test"
                raise Complaint(f"--policy: {options.policy} cannot be used: {why}")
            if options.decision not in revisions.active.entry_points:
                raise Complaint(f"--decision: {options.decision} leads to nothing: no module in {options.policy} has such a rule")
        look_at_port(options.listen)
        port = await service.start(options.listen, server_credentials(identity) if identity is not None else None)

        def ready() -> tuple[bool, str]:
            return revisions.active is not None, "no policy revision is active yet"

        status: dict[str, Shown] = {"/status": lambda: msgspec.json.encode(status_of(keeper, [], engine=engine))}
        pages = await open_admin(options.admin, telemetry, keeper, ready, status)
        active = revisions.active
        if options.http:
            host, number = split_address(options.http)
            at = await web.start(host, number, identity)
            log.info("decisions over HTTP at %s:%d", host, at)
        log.info("decisions at %s:%d, revision %s", options.listen.rpartition(":")[0], port, active.digest if active else "none yet")
        notifier.ready(f"revision {active.digest if active else 'none yet'}")
        watchdog = asyncio.create_task(keep_alive(notifier))
        await runtime.stopping.wait()
        notifier.stopping("finishing checks")
        await service.stop(5.0)
        watchdog.cancel()
    finally:
        await web.stop()
        await service.stop(0.1)
        if pages is not None:
            await pages.close()
        await keeper.stop()
        await supply.close()
        await apart.close()
        if endpoint is not None:
            await endpoint.stop()
        await engine.close()
        await pool.close()
        if configuration is not None:
            await configuration.close()
        telemetry.close()
