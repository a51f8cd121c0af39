"""`tollhouse quota` as a process."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import msgspec

from mesh.model import Snapshot
from quota.descriptor_file import DescriptorError
from quota.descriptors import Both, Descriptors, Limits, PolicyLimits
from quota.lessee import QuotaLessee
from quota.service import QuotaService
from telemetry.admin import Shown
from telemetry.notify import Notifier
from tollhouse.gateway_process import keep_alive, open_admin, status_of
from tollhouse.keeper import Keeper
from tollhouse.logs import DecisionLogOptions, open_telemetry
from tollhouse.output import Complaint
from tollhouse.parts import Configuration, LazyPool, holder, look_at_port, open_store, state_directory
from tollhouse.runtime import Runtime

log = logging.getLogger("tollhouse.quota")


class QuotaOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What the command line says."""

    config: str = ""
    descriptors: Path | None = None
    listen: str = "127.0.0.1:8081"
    redis: str = ""
    admin: str = "off"
    state: Path | None = None


def read_descriptors(folder: Path | None) -> Descriptors | None:
    """The limits of a folder. Raises `Complaint`."""
    if folder is None:
        return None
    try:
        return Descriptors.read(folder)
    except DescriptorError as problem:
        raise Complaint(str(problem)) from None


async def run_quota(options: QuotaOptions, runtime: Runtime) -> None:
    """Runs the rate-limit service until it is told to stop. Raises `Complaint`, `OSError`."""
    notifier = Notifier()
    telemetry = open_telemetry("off", DecisionLogOptions(), runtime)
    files = read_descriptors(options.descriptors)
    store = open_store(options.redis)
    lessee = QuotaLessee(store, holder=holder(), telemetry=telemetry)
    configuration = Configuration(options.config, state_directory(options.state)) if options.config else None
    pool = LazyPool(0)
    keeper = Keeper(configuration.source, pool.compile) if configuration is not None else None
    service = QuotaService(lessee, Both(), telemetry=telemetry)
    sources: dict[str, Limits] = {"files": files} if files is not None else {}

    def use() -> None:
        service.use(Both(*sources.values()))

    def follow(snapshot: Snapshot) -> None:
        sources["mesh"] = PolicyLimits.of(snapshot)
        use()

    def reload() -> None:
        if options.descriptors is not None:
            try:
                sources["files"] = Descriptors.read(options.descriptors)
            except (DescriptorError, OSError) as problem:
                log.error("the last good limits stay in force: %s", problem)
        use()
        if configuration is not None:
            configuration.reload()

    runtime.on_reload(reload)
    use()
    pages = None
    try:
        if keeper is not None:
            keeper.add(follow)
            await keeper.start()
        look_at_port(options.listen)
        port = await service.start(options.listen)
        shown: dict[str, Shown] = {"/quota": lambda: msgspec.json.encode({"lessees": [lessee.usage()]})}
        shown["/quota/refusals"] = lambda: b'{"refusals":[]}'  # what it says no to are askers' requests, which it does not know
        if keeper is not None:
            shown["/status"] = lambda: msgspec.json.encode(status_of(keeper, []))
        pages = await open_admin(options.admin, telemetry, keeper, lambda: (True, ""), shown)
        log.info("limits at %s:%d, buckets in %s", options.listen.rpartition(":")[0], port, options.redis or "memory")
        notifier.ready()
        watchdog = asyncio.create_task(keep_alive(notifier))
        await runtime.stopping.wait()
        notifier.stopping()
        await service.stop(5.0)
        watchdog.cancel()
    finally:
        await service.stop(0.1)
        if pages is not None:
            await pages.close()
        if keeper is not None:
            await keeper.stop()
        await lessee.close()
        await store.close()
        await pool.close()
        if configuration is not None:
            await configuration.close()
        telemetry.close()
