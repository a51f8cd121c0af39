"""`tollhouse gateway` as a process: its parts, put together, run and taken down in order."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from pathlib import Path
from typing import Any

import msgspec

from discovery.etcd import Etcd, EtcdError
from discovery.reports import Reporter, reports
from gateway.grpc_channel import GrpcChannels
from gateway.limits import Limits
from gateway.meter import costs_of
from gateway.rate_limits import answers_of
from gateway.reports import Reports
from gateway.upstream_reports import UpstreamReports
from identity.authenticator import Tokens
from mesh.model import EMPTY, Snapshot
from mesh.policies import tried_text
from mesh.status_gateways import with_unserved
from pdp.asker import EngineAsker
from pdp.client import Providers
from pdp.decider import PolicyDecider
from pdp.engines.apart import Apart
from pdp.kept import KeptDecisions
from quota.descriptors import PolicyLimits
from quota.lessee import QuotaLessee
from telemetry.admin import AdminError, Shown, serve_admin
from telemetry.notify import Notifier
from tollhouse.authorization import Authorizer
from tollhouse.bundling import BundleOptions, given, place_of
from tollhouse.deciding import asks_itself, check_pdp, open_channels, open_client, preload, readiness
from tollhouse.keeper import Keeper
from tollhouse.logs import DecisionLogOptions, open_telemetry
from tollhouse.node import Node, Shared
from tollhouse.opa_servers import OpaOptions, shown_opa
from tollhouse.output import Complaint
from tollhouse.parts import (
    Configuration,
    LazyPool,
    holder,
    open_engine,
    open_identity,
    open_store,
    open_tokens,
    state_directory,
)
from tollhouse.policy_masks import follow_masks
from tollhouse.policy_supply import open_supply
from tollhouse.runtime import Runtime
from tollhouse.shown import config_page, data_in, rfc3339, staleness, trial_shown, tried_in
from tollhouse.sockets import Where, inherited
from tollhouse.workers import Fleet, Link, wanted_addresses

log = logging.getLogger("tollhouse.gateway")

HELD_WITHIN = 5.0
"""Seconds that a new policy revision waits at most for a decision point that holds it; the one before decides meanwhile."""
COUNT_EVERY = 5.0
"""Seconds between two counts of who shares the limits."""
TELL_EVERY = 0.2
"""Seconds between two looks at whether what is in force has changed."""


class GatewayOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What the command line says."""

    name: str
    config: str
    address: str = ""
    pdp: tuple[str, ...] = ()
    pdp_name: str = ""
    opa: OpaOptions = OpaOptions()
    bundles: BundleOptions = BundleOptions()
    bundle_services: Path | None = None
    redis: str = ""
    identity: Path | None = None
    jwks_ca: Path | None = None
    admin: str = "127.0.0.1:15000"
    state: Path | None = None
    drain: float = 30.0
    access_log: str = "-"
    decision_log: DecisionLogOptions = DecisionLogOptions()
    limits: Limits = Limits()

    def arguments(self) -> list[str]:
        """The command line of a worker, without `--admin`."""
        words = ["gateway", self.name, "--config", self.config, "--drain", f"{self.drain:g}s"]
        words += ["--access-log", self.access_log, *self.decision_log.arguments(), *self.bundles.arguments()]
        for option, value in (
            ("--address", self.address),
            ("--pdp", ",".join(self.pdp)),
            ("--pdp-name", self.pdp_name),
            *self.opa.arguments(),
            ("--bundle-services", str(self.bundle_services or "")),
            ("--state", str(self.state or "")),
            ("--redis", self.redis),
            ("--identity", str(self.identity or "")),
            ("--jwks-ca", str(self.jwks_ca or "")),
        ):
            if value:
                words += [option, value]
        for name in Limits.__struct_fields__:
            wanted = getattr(self.limits, name)
            if wanted != getattr(Limits(), name):
                words += ["--limit", f"{name}={wanted:g}s" if isinstance(wanted, float) else f"{name}={wanted}"]
        return words


async def run_gateway(options: GatewayOptions, runtime: Runtime) -> None:
    """Runs one gateway until it is told to stop, and drains it. Raises `Complaint`, `OSError`."""
    link = Link()
    notifier = Notifier()
    state = state_directory(options.state)
    configuration = Configuration(options.config, state)
    identity = open_identity(options.identity, runtime)
    telemetry = open_telemetry(options.access_log, options.decision_log, runtime)
    runtime.on_reload(configuration.reload)
    pool = LazyPool(telemetry=telemetry)
    bundles = given(options.bundles) if link.there else options.bundles
    engine = await open_engine(options.opa, bundles, pool, identity if options.identity is not None else None, telemetry)
    apart = Apart(engine, None if options.opa.fetch else LazyPool(1, threads=1))
    local = EngineAsker(apart)
    channels, plain = open_channels(options, identity), GrpcChannels(runtime.loop)
    client, aside = (open_client(options.pdp, channels) for _ in range(2))
    decider = PolicyDecider(
        central=client or local,
        local=local,
        own=EngineAsker(pool),
        aside=aside,
        kept=KeptDecisions(),
        providers=Providers(plain),
        clock=runtime.loop.time,
        telemetry=telemetry,
    )
    lessee = QuotaLessee(open_store(options.redis), holder=holder(), telemetry=telemetry)
    tokens, fetcher = open_tokens(options.jwks_ca, telemetry)
    supply = open_supply(
        pool,
        options.bundle_services,
        state,
        # Masks are asked here, too.
        needs=lambda snapshot: telemetry.decision_log is not None or asks_itself(snapshot, remote=client is not None),
        prepare=readiness(client, engine),
    )
    keeper = Keeper(configuration.source, pool.compile, authorizer=Authorizer(pool.compile), supply=supply)
    shared = Shared(
        loop=runtime.loop,
        tokens=tokens,
        decider=decider,
        services=decider.services,
        lessee=lessee,
        telemetry=telemetry,
        upstreams=UpstreamReports(telemetry),
        answers=answers_of(telemetry),
        costs=costs_of(telemetry),
        limits=options.limits,
        reports=Reports(telemetry),
        stale=staleness(keeper, runtime.loop),
    )
    streams, datagrams = worker_sockets(options.address)
    node = Node(shared, options.name, identity, options.address, streams, datagrams, binds=not link.there)
    told: list[str] = []

    async def prepare(snapshot: Snapshot) -> None:
        """Before `snapshot` is in force, whoever decides must be able to decide by its policy."""
        nonlocal told
        await preload(snapshot, decider, apart, pool, remote=client is not None)
        digests = [revision.digest for revision in (snapshot.policy, snapshot.canary) if revision is not None]
        for digest in digests:
            if client is not None and digest not in told and not await client.holds(digest, HELD_WITHIN):
                log.warning("after %g s no decision point holds policy %s; it is put in force all the same", HELD_WITHIN, digest)
        told = digests

    keeper.add(prepare)
    mask_pool = follow_masks(telemetry, keeper, runtime.loop, engine if options.opa else None)
    keeper.add(lambda snapshot: tokens.follow(snapshot, (options.name,)))
    keeper.add(node.apply)
    keeper.add(decider.enact)
    reporter: Reporter | None = None
    telling: asyncio.Task[None] | None = None
    try:
        await keeper.start()
        if options.name not in keeper.snapshot.gateways and not configuration.source.status.stale:
            raise Complaint(unknown_gateway(options.name, keeper.snapshot))
        check_pdp(options, keeper.snapshot)
        if configuration.etcd is not None:
            namespace, _, short = options.name.partition("/")
            reporter = Reporter(configuration.etcd, namespace, short, holder())
            telling_of = reporter
            tell(reporter, keeper)
            keeper.on_force(lambda: tell(telling_of, keeper))
            await reporter.start()
            telling = asyncio.create_task(keep_telling(reporter, keeper, lessee, configuration.etcd, options.name))

        def ready() -> tuple[bool, str]:
            source = configuration.source.status
            if options.name not in keeper.in_force.gateways:
                if source.stale:
                    return False, f"there is no configuration yet: {source.text}"
                known = options.name in keeper.snapshot.gateways
                return False, "the configuration is not in force yet" if known else unknown_gateway(options.name, keeper.snapshot)
            if node.gateway.ready:
                return True, ""
            return False, "; ".join(f"{name}: {why}" for name, why in node.gateway.problems().items()) or "it drains"

        more: dict[str, Shown] = {
            "/status": lambda: msgspec.json.encode(status_of(keeper, [node], tokens, engine)),
            "/quota": lambda: msgspec.json.encode({"lessees": [lessee.usage()]}),
            "/trials": telemetry.trials.page,
            "/refusals": telemetry.refusals,
            "/quota/refusals": telemetry.quota_refusals.page,
        }
        pages = await open_admin(options.admin, telemetry, keeper, ready, more)
        log.info("gateway %s serves %s", options.name, ", ".join(f"{a or '*'}:{p}" for a, p, _ in node.gateway.listening) or "nothing yet")
        link.ready()
        notifier.ready(f"serving {len(node.gateway.listening)} ports")
        watchdog = asyncio.create_task(keep_alive(notifier))
        gone = asyncio.create_task(link.parent_gone())
        stopped = asyncio.create_task(runtime.stopping.wait())
        await asyncio.wait({gone, stopped}, return_when=asyncio.FIRST_COMPLETED)
        notifier.stopping("draining")
        notifier.extend(options.drain + 10)
        log.info("draining for at most %g s", options.drain)
        await node.drain(options.drain)
        for task in (watchdog, gone, stopped, *([telling] if telling is not None else [])):
            task.cancel()
        if pages is not None:
            await pages.close()
    finally:
        node.gateway.close()
        if reporter is not None:
            await reporter.stop()
        await keeper.stop()
        await supply.close()
        await tokens.store.close()
        await fetcher.close()
        await lessee.close()
        await decider.close()
        # What the log still holds may have to be masked first, which takes the loop and the engine.
        await asyncio.to_thread(telemetry.close)
        if mask_pool is not None:
            await mask_pool.close()
        for each in (client, aside):
            if each is not None:
                await each.close()
        channels.close()
        plain.close()
        await apart.close()
        await engine.close()
        await pool.close()
        await configuration.close()


def tell(reporter: Reporter, keeper: Keeper) -> None:
    """Writes to etcd what is in force."""
    snapshot, status = keeper.in_force, keeper.source.status
    reporter.report(
        snapshot=snapshot.version,
        policy=snapshot.policy.policy if snapshot.policy is not None else "",
        data=data_in(snapshot, keeper.waiting),
        shadow=snapshot.shadow.policy if snapshot.shadow is not None else "",
        tried=tried_text(*tried_in(snapshot)),
        source=keeper.position,
        waiting=keeper.waiting,
        stale=status.stale,
        problems=len(snapshot.problems),
    )


async def keep_telling(reporter: Reporter, keeper: Keeper, lessee: QuotaLessee, etcd: Etcd, name: str) -> None:
    """Writes it again whenever it is another, looking a few times a second; and counts who else runs the gateway `name`: the copies of a
    gateway share its limits."""
    count_at = 0.0
    while True:
        await asyncio.sleep(TELL_EVERY)
        tell(reporter, keeper)
        now = asyncio.get_running_loop().time()
        if now >= count_at:
            count_at = now + COUNT_EVERY
            try:
                found = await reports(etcd)
            except EtcdError:
                continue
            lessee.sharers = max(1, sum(f"{each.namespace}/{each.name}" == name for each in found))


def worker_sockets(address: str) -> tuple[dict[Where, socket.socket], dict[Where, socket.socket]]:
    """The sockets that were handed over, those for TCP and those for UDP, by the address that the gateway knows them by: all addresses are
    the empty one."""
    try:
        found = inherited()
    except (ValueError, OSError) as problem:
        raise Complaint(f"the sockets that were handed over cannot be used: {problem}") from None
    streams: dict[Where, socket.socket] = {}
    datagrams: dict[Where, socket.socket] = {}
    for (host, port, kind), sock in found.items():
        named = streams if kind == socket.SOCK_STREAM else datagrams
        named["" if host in {"::", "0.0.0.0"} and not address else host, port] = sock
    return streams, datagrams


def unknown_gateway(name: str, snapshot: Snapshot) -> str:
    """Why there is no gateway `name`, and which there are."""
    import difflib

    known = sorted(snapshot.gateways)
    near = difflib.get_close_matches(name, known, 1)
    hint = f"did you mean {near[0]}?" if near else f"there is {', '.join(known)}" if known else "there is none"
    wrong = [str(problem) for problem in snapshot.problems if problem.key is not None and problem.key.kind in {"Gateway", "GatewayClass"}]
    return f"the configuration has no Gateway {name} of our class; {hint}" + (f" ({wrong[0]})" if wrong else "")


async def keep_alive(notifier: Notifier) -> None:
    """Tells systemd's watchdog that the loop turns."""
    while notifier.watchdog:
        notifier.alive()
        await asyncio.sleep(notifier.watchdog)


async def open_admin(where: str, telemetry: Any, keeper: Keeper | None, ready: Any, extra: dict[str, Shown]) -> Any:
    """The admin page at `where` (`HOST:PORT`, the path of a socket, or `off`). Raises `Complaint`."""
    if where == "off":
        return None
    host, port = (where, 0) if where.startswith("/") else split_address(where)
    try:
        return await serve_admin(host, port, telemetry, lambda: config_page(keeper.snapshot if keeper is not None else EMPTY), ready, extra)
    except AdminError as problem:
        raise Complaint(str(problem)) from None


def split_address(text: str) -> tuple[str, int]:
    """`HOST:PORT` as a pair. Raises `Complaint`."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise Complaint(f"{text!r} is not HOST:PORT; write for example 127.0.0.1:15000", 2)
    return host.strip("[]"), int(port)


def status_of(keeper: Keeper, nodes: list[Node], tokens: Tokens | None = None, engine: object = None) -> dict[str, Any]:
    """What `/status` shows."""
    snapshot, source = keeper.in_force, keeper.source.status
    statuses = keeper.workspace.statuses(rfc3339()).in_sight()
    unserved: dict[tuple[str, str], dict[str, str]] = {(key.kind, f"{key.namespace}/{key.name}"): {} for key in statuses}
    for node in nodes:
        for name, why in node.gateway.problems().items():
            owner, _, section = name.rpartition("/")  # a listener of a ListenerSet has its set's name in front
            unserved.setdefault(("ListenerSet", owner) if owner else ("Gateway", node.key), {})[section] = why
    return {
        "snapshot": snapshot.version,
        "policy": snapshot.policy.policy if snapshot.policy is not None else None,
        "data": data_in(snapshot, keeper.waiting),
        "waiting": keeper.waiting,
        "authorization": snapshot.authorization.digest if snapshot.authorization is not None else None,
        "shadow": trial_shown(snapshot.shadow, snapshot.shadow_share),
        "canary": trial_shown(snapshot.canary, snapshot.canary_share),
        "source": {"connected": source.connected, "revision": source.revision, "stale": source.stale, "text": source.text},
        "problems": [{"severity": each.severity, "kept": each.kept, "text": str(each)} for each in snapshot.problems],
        "gateways": [node.state() for node in nodes],
        **shown_opa(engine),
        **({"tokenKeys": tokens.store.state()} if tokens is not None else {}),
        "resources": [
            {
                "kind": key.kind,
                "namespace": key.namespace,
                "name": key.name,
                "status": with_unserved(status, unserved[key.kind, f"{key.namespace}/{key.name}"]),
            }
            for key, status in statuses.items()
        ],
    }


async def run_workers(options: GatewayOptions, count: int, runtime: Runtime, *, verbose: bool) -> None:
    """Runs the parent of `count` workers. Raises `Complaint`, `OSError`."""
    notifier = Notifier()
    state = state_directory(options.state)
    configuration = Configuration(options.config, state)
    telemetry = open_telemetry("off", DecisionLogOptions(), runtime)
    pool = LazyPool(0)
    keeper = Keeper(configuration.source, pool.compile)
    words = [*options.arguments(), *(["--verbose"] if verbose else [])]
    bundles = place_of(options.bundles) if options.opa.fetch else None
    fleet = Fleet(options.name, options.address, count, words, options.drain, bundles)
    telemetry.gauge_function("tollhouse_workers", "Workers that serve.", lambda: sum(worker.ready for worker in fleet.workers))
    telemetry.counter_function("tollhouse_worker_restarts_total", "Workers started in the place of others.", lambda: fleet.restarts)
    pages = None
    try:
        await keeper.start()
        wanted = wanted_addresses(keeper.snapshot, options.name, options.address)
        if not wanted:
            raise Complaint(unknown_gateway(options.name, keeper.snapshot))
        if not options.redis and PolicyLimits.of(keeper.snapshot).names:
            raise Complaint("quotas need --redis with several workers: each would count for itself in its own memory")
        if not await fleet.start(wanted):
            raise Complaint("the workers did not become ready; the lines above say why")
        keeper.add(fleet.apply)
        runtime.on_reload(lambda: fleet.signal(signal.SIGHUP))
        runtime.loop.add_signal_handler(signal.SIGUSR2, fleet.roll)

        async def metrics() -> bytes:
            return telemetry.page() + await fleet.metrics()

        pages = await open_admin(
            options.admin,
            telemetry,
            keeper,
            lambda: (fleet.ready, "" if fleet.ready else "a worker is being started"),
            {
                "/metrics": metrics,
                "/status": lambda: fleet.first("/status"),
                "/quota": lambda: fleet.every("/quota", "lessees"),
                "/trials": fleet.trials,
                "/refusals": lambda: fleet.every("/refusals", "events"),
                "/quota/refusals": lambda: fleet.every("/quota/refusals", "refusals"),
            },
        )
        watching = asyncio.create_task(fleet.watch())
        notifier.ready(f"{count} workers")
        watchdog = asyncio.create_task(keep_alive(notifier))
        await runtime.stopping.wait()
        notifier.stopping("draining")
        notifier.extend(options.drain + 10)
        watching.cancel()
        watchdog.cancel()
    finally:
        await fleet.stop()
        if pages is not None:
            await pages.close()
        await keeper.stop()
        await pool.close()
        await configuration.close()
        telemetry.close()
