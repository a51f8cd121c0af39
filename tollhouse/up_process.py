"""`tollhouse up` as a process: every part of a mesh, plugged together in one event loop."""

from __future__ import annotations

import asyncio
import importlib.resources
import logging
import tempfile
from collections.abc import Collection, Coroutine, Mapping
from pathlib import Path
from typing import Any

import msgspec
from rich.markup import escape
from rich.table import Table

from gateway.grpc_channel import GrpcChannels
from gateway.limits import Limits
from gateway.meter import costs_of
from gateway.rate_limits import answers_of
from gateway.reports import Reports
from gateway.upstream_reports import UpstreamReports
from identity.problems import IdentityError
from mesh.documents import Document
from mesh.model import Snapshot
from pdp.asker import EngineAsker
from pdp.client import Providers
from pdp.decider import PolicyDecider
from pdp.engines.apart import Apart
from pdp.engines.engine import EngineUnavailable
from pdp.kept import KeptDecisions
from quota.lessee import QuotaLessee
from telemetry.admin import Shown
from telemetry.notify import Notifier
from telemetry.record import Telemetry
from tollhouse.authorization import Authorizer
from tollhouse.bundling import BundleOptions
from tollhouse.deciding import preload
from tollhouse.deciding import readiness as holds
from tollhouse.embedded import Embedded
from tollhouse.gateway_process import open_admin, status_of
from tollhouse.keeper import Extra, Keeper
from tollhouse.logs import DecisionLogOptions, open_telemetry
from tollhouse.node import Node, Shared
from tollhouse.opa_servers import OpaOptions
from tollhouse.output import Complaint, console
from tollhouse.parts import Configuration, LazyPool, holder, open_directory, open_engine, open_store, open_tokens, state_directory
from tollhouse.policy_masks import follow_masks
from tollhouse.policy_supply import open_supply
from tollhouse.runtime import Runtime
from tollhouse.seed import seed
from tollhouse.shown import staleness

log = logging.getLogger("tollhouse.up")


class UpOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What the command line says."""

    config: str = ""
    state: Path = Path(".tollhouse")
    etcd: str = ""
    redis: str = ""
    opa: OpaOptions = OpaOptions()
    bundles: BundleOptions = BundleOptions()
    bundle_services: Path | None = None
    jwks_ca: Path | None = None
    admin: str = "127.0.0.1:15000"
    drain: float = 10.0
    access_log: str = "off"
    decision_log: DecisionLogOptions = DecisionLogOptions()
    limits: Limits = Limits()


def example() -> Path:
    """The directory of the example mesh."""
    return Path(str(importlib.resources.files("conf"))) / "examples" / "shop"


class House:
    """The gateways of a mesh in one process: one node for each, made and ended as the configuration says."""

    def __init__(self, shared: Shared, embedded: Embedded) -> None:
        self._shared = shared
        self._embedded = embedded
        self.nodes: dict[str, Node] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._serving = asyncio.Lock()

    async def begin(self, snapshot: Snapshot) -> None:
        """Starts services and gateways for the first time. Raises OSError, `Complaint`."""
        await self._embedded.serve(snapshot, snapshot.mesh.trusted_gateways)
        self._follow(snapshot)

    def apply(self, snapshot: Snapshot) -> None:
        """Follows `snapshot`."""
        try:
            self._follow(snapshot)
        except (OSError, Complaint) as problem:
            log.error("a gateway could not be started: %s", problem)
        self._keep(self._services(snapshot))

    def _follow(self, snapshot: Snapshot) -> None:
        for key in [key for key in self.nodes if key not in snapshot.gateways]:
            self._keep(self.nodes.pop(key).drain(10.0))
        for key in snapshot.gateways:
            if key not in self.nodes:
                try:
                    identity = self._embedded.gateway_identity(key)
                except IdentityError as problem:
                    raise Complaint(str(problem)) from None
                identity.watch(self._shared.loop, 5.0)
                node = Node(self._shared, key, identity, "127.0.0.1")
                node.apply(snapshot)
                self.nodes[key] = node
            else:
                self.nodes[key].apply(snapshot)

    async def _services(self, snapshot: Snapshot) -> None:
        async with self._serving:
            try:
                await self._embedded.serve(snapshot, snapshot.mesh.trusted_gateways)
            except OSError as problem:
                log.error("an example service could not be started: %s", problem)

    def _keep(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._shared.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def drain(self, seconds: float) -> None:
        """Ends all gateways, then the services."""
        await asyncio.gather(*(node.drain(seconds) for node in self.nodes.values()))
        await self._embedded.close()


async def run_up(options: UpOptions, runtime: Runtime) -> None:
    """Runs the mesh until it is told to stop. Raises `Complaint`, `OSError`."""
    state = state_directory(options.state) or options.state
    telemetry = open_telemetry(options.access_log, options.decision_log, runtime)
    pool = LazyPool(telemetry=telemetry)
    starting = runtime.loop.create_task(pool.start())
    try:
        await run_house(options, runtime, state, telemetry, pool, starting)
    except EngineUnavailable as problem:
        raise Complaint(str(problem)) from None
    finally:
        await asyncio.wait({starting})
        if not starting.cancelled():
            starting.exception()  # it has been told, or is of no interest any more
        await pool.close()
        telemetry.close()


async def run_house(
    options: UpOptions, runtime: Runtime, state: Path, telemetry: Telemetry, pool: LazyPool, starting: asyncio.Task[Any]
) -> None:
    """Runs it with a pool of OPA workers that is being started. Raises `Complaint`, `OSError`, `EngineUnavailable`."""
    loop = runtime.loop
    engine = await open_engine(options.opa, options.bundles, pool, telemetry=telemetry)
    directory = options.config or str(example())
    if options.etcd:
        await seed(options.etcd, open_directory(directory), pool, Embedded(state).look)
    configuration = Configuration(options.etcd or directory, state if options.etcd else None)
    runtime.on_reload(configuration.reload)
    embedded = Embedded(state)
    supply = open_supply(pool, options.bundle_services, state, prepare=holds(None, engine))
    keeper = Keeper(configuration.source, pool.compile, embedded.look, Authorizer(pool.compile), supply)
    apart = Apart(engine, None if options.opa.fetch else LazyPool(1, threads=1))
    asker = EngineAsker(apart)
    channels = GrpcChannels(loop)
    providers = Providers(channels)
    decider = PolicyDecider(
        central=asker, own=EngineAsker(pool), kept=KeptDecisions(), providers=providers, clock=loop.time, telemetry=telemetry
    )
    store = open_store(options.redis)
    lessee = QuotaLessee(store, holder=holder(), telemetry=telemetry)
    tokens, fetcher = open_tokens(options.jwks_ca, telemetry)
    shared = Shared(
        limits=options.limits,
        tokens=tokens,
        loop=loop,
        decider=decider,
        services=decider.services,
        lessee=lessee,
        telemetry=telemetry,
        reports=Reports(telemetry),
        upstreams=UpstreamReports(telemetry),
        answers=answers_of(telemetry),
        costs=costs_of(telemetry),
        stale=staleness(keeper, loop),
    )
    house = House(shared, embedded)
    keeper.add(lambda snapshot: preload(snapshot, decider, apart, pool, remote=False))
    mask_pool = follow_masks(telemetry, keeper, loop, engine if options.opa else None)
    keeper.add(lambda snapshot: tokens.follow(snapshot, snapshot.gateways))
    pages = None
    try:
        await starting
        await keeper.start()
        if not keeper.snapshot.gateways:
            stale = configuration.source.status.stale
            raise Complaint(
                stale or f"{options.etcd or directory} has no Gateway of our class that could be used" + first_problem(keeper.snapshot)
            )
        await house.begin(keeper.snapshot)
        decider.enact(keeper.snapshot)
        keeper.add(house.apply)
        keeper.add(decider.enact)
        embedded.start_renewing()
        status: dict[str, Shown] = {
            "/status": lambda: msgspec.json.encode(status_of(keeper, list(house.nodes.values()), tokens, engine)),
            "/quota": lambda: msgspec.json.encode({"lessees": [lessee.usage()]}),
            "/trials": telemetry.trials.page,
            "/refusals": telemetry.refusals,
            "/quota/refusals": telemetry.quota_refusals.page,
        }
        pages = await open_admin(options.admin, telemetry, keeper, lambda: readiness(house), status)
        show(options, keeper.snapshot, house, embedded, directory, store.state())
        notifier = Notifier()
        notifier.ready()
        await runtime.stopping.wait()
        notifier.stopping()
        console().print("\nfinishing what is in progress")
        await house.drain(options.drain)
    finally:
        for node in house.nodes.values():
            node.gateway.close()
        if pages is not None:
            await pages.close()
        await keeper.stop()
        await supply.close()
        await tokens.store.close()
        await fetcher.close()
        await lessee.close()
        await decider.close()
        channels.close()
        await asyncio.to_thread(telemetry.close)
        if mask_pool is not None:
            await mask_pool.close()
        await apart.close()
        await engine.close()
        await configuration.close()


def readiness(house: House) -> tuple[bool, str]:
    """Whether every gateway can serve, and if not, why."""
    waiting = [node.key for node in house.nodes.values() if not node.gateway.ready]
    return not waiting, f"{', '.join(waiting)} can't serve" if waiting else ""


def first_problem(snapshot: Snapshot) -> str:
    """The first problem, to end a sentence with."""
    return f": {snapshot.problems[0]}" if snapshot.problems else ""


def short(path: Path) -> str:
    """A path as one would type it here."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def show(options: UpOptions, snapshot: Snapshot, house: House, embedded: Embedded, directory: str, quota: Mapping[str, Any]) -> None:
    """The one screen: what runs where, where the identities are, and what to try."""
    out = console()
    trust = snapshot.mesh.trust_domain
    out.print(
        f"[bold]Tollhouse is up.[/] The mesh [bold]{escape(trust)}[/] is read from {escape(options.etcd or short(Path(directory)))}.\n"
    )
    table = Table(box=None, pad_edge=False, header_style="bold", show_edge=False)
    for column in ("GATEWAY", "ADDRESS", "SERVES"):
        table.add_column(column, overflow="fold")
    for key, node in sorted(house.nodes.items()):
        listeners = {listener.name: listener for listener in snapshot.gateways[key].listeners}
        for address, port, names in node.gateway.listening:
            served = [listeners[name] for name in names if name in listeners]
            schemes = sorted({listener.protocol.lower() for listener in served})
            hosts = sorted({host for listener in served for host in (*listener.hosts, *listener.rules)})
            table.add_row(key, f"{'|'.join(schemes)}://{address or '*'}:{port}", ", ".join(hosts))
    for key, node in sorted(house.nodes.items()):
        for listener, why in node.gateway.problems().items():
            table.add_row(key, f"listener {listener}", f"not served: {why}")
    out.print(table)
    out.print()
    table = Table(box=None, pad_edge=False, header_style="bold", show_edge=False)
    for column in ("SERVICE", "ENDPOINTS", "MUST PROVE TO BE"):
        table.add_column(column, overflow="fold")
    for cluster in sorted(snapshot.clusters.values(), key=lambda each: each.name):
        proof = sorted({identity for endpoint in cluster.endpoints for identity in endpoint.identities})
        named = [cluster.tls.hostname] if cluster.tls is not None and cluster.tls.hostname else []
        where = ", ".join(f"{endpoint.address}:{endpoint.port}" for endpoint in cluster.endpoints) or "none"
        table.add_row(f"{cluster.namespace}/{cluster.service}", where, ", ".join(proof or named) or "nobody")
    out.print(table)
    out.print(f"\nIdentities: {escape(short(embedded.identities))}/<namespace>-<service account>/{{cert,key,ca}}.pem")
    if options.admin != "off":
        out.print(f"Admin page: http://{escape(options.admin)}/  (metrics, readyz, config, status)")
    none = "none is in force: what has to be decided is refused until there is one" if snapshot.policies else "none"
    out.print(f"Policy:     {escape(snapshot.policy.digest if snapshot.policy is not None else none)}")
    buckets = "this process's memory" if quota["store"] == "memory" else quota["store"]
    failing = f"; [bold red]it can't be asked:[/] {escape(quota['lastError'])}" if quota.get("lastError") else ""
    out.print(f"Quota:      buckets are in {escape(buckets)}{failing}")
    for problem in snapshot.problems:
        colour = "red" if problem.severity == "error" else "yellow"
        out.print(f"[bold {colour}]{problem.severity}:[/] {escape(str(problem))}")
    suggestions = Path(directory) / "try.txt"
    if suggestions.exists():
        out.print("\nTry, in another terminal:")
        for line in suggestions.read_text().splitlines():
            text = escape(line.replace("{identities}", short(embedded.identities)))
            out.print(f"\n  [bold]{text}[/]" if line.startswith("#") else f"  {text}", soft_wrap=True)
    out.print("\nCtrl-C ends it.")


def bundled(config: str) -> tuple[str, Extra | None]:
    """The configuration to read: `config`, or the example with the documents that `tollhouse up` makes for it."""
    if config:
        return config, None
    return str(example()), example_documents


def example_documents(documents: Collection[Document]) -> tuple[Document, ...]:
    """What the example lacks when nobody has issued anything yet: the ConfigMap with the root of the service outside the mesh."""
    with tempfile.TemporaryDirectory(prefix="tollhouse-example-") as scratch:
        return Embedded(Path(scratch)).look(documents)
