"""`Registrar`: keeps an instance registered under a lease, and says whether it is ready.

While its health check fails the instance stays registered as not ready: gateways stop using it, and nobody takes it for a registry
outage. The same is written before it goes, so that what a stop takes away is known to have left on purpose (`discovery.outage`).
"""

from __future__ import annotations

import asyncio
import logging

import msgspec

from discovery.etcd import Etcd
from discovery.health import HealthCheck, Verdict
from discovery.instances import name_of, write_instance
from discovery.keys import instance_key
from discovery.leased import LeasedKey
from mesh.documents import Instance

log = logging.getLogger("tollhouse.discovery")


class RegistrarStatus(msgspec.Struct, frozen=True, kw_only=True):
    """How a registration is doing."""

    registered: bool
    """Whether etcd has the instance as it is now."""
    ready: bool
    """Whether it is registered as ready (if it is registered)."""
    text: str
    """One line for people."""


class Registrar:
    """One instance's registration. Owns its lease and its health check; made, started and stopped in one event loop."""

    def __init__(
        self,
        etcd: Etcd,
        instance: Instance,
        *,
        ttl: int = 10,
        check: HealthCheck | None = None,
        interval: float = 2.0,
        fall: int = 3,
        rise: int = 2,
    ) -> None:
        """`ttl`: seconds after which it goes when this process is gone. Asked every `interval` seconds; see `Verdict` for the others.

        Raises ValueError for an instance that may not be registered.
        """
        self._instance = msgspec.structs.replace(instance, ready=instance.ready and check is None)
        self._can_be_ready = instance.ready
        self._leased = LeasedKey(etcd, instance_key(name_of(instance)), ttl=ttl)
        self._leased.set(write_instance(self._instance))
        self._check = check
        self._interval = interval
        self._verdict = Verdict(fall=fall, rise=rise)
        self._wrong = "not asked yet" if check else ""
        self._task: asyncio.Task[None] | None = None

    @property
    def status(self) -> RegistrarStatus:
        """How it is doing now."""
        name = "/".join(name_of(self._instance))
        registered, ready = self._leased.written, self._instance.ready
        state = ("ready" if ready else "not ready") if registered else "not registered"
        why = self._leased.problem or self._wrong
        return RegistrarStatus(registered=registered, ready=ready, text=f"instance {name}: {state}" + (f" ({why})" if why else ""))

    async def start(self) -> None:
        """Begins to register and to ask; goes on trying when etcd is away."""
        self._leased.start()
        if self._check is not None:
            self._task = asyncio.get_running_loop().create_task(self._ask(self._check))

    async def stop(self) -> None:
        """Takes the instance away."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._instance = msgspec.structs.replace(self._instance, ready=False)
        await self._leased.stop(last=write_instance(self._instance))

    def set_ready(self, ready: bool) -> None:
        """Whether it may be used at all (a process that drains says no); its health check has to agree."""
        self._can_be_ready = ready
        self._write()

    def _write(self) -> None:
        ready = self._can_be_ready and (self._check is None or self._verdict.well)
        self._instance = msgspec.structs.replace(self._instance, ready=ready)
        self._leased.set(write_instance(self._instance))

    async def _ask(self, check: HealthCheck) -> None:
        while True:
            try:
                self._wrong = await check.ask()
            except Exception as error:
                log.exception("the health check failed")
                self._wrong = f"the health check failed: {error}"
            if self._verdict.answer(not self._wrong):
                log.info("instance %s is %s%s", self._instance.instance, "well" if self._verdict.well else "not well: ", self._wrong)
                self._write()
            await asyncio.sleep(self._interval)
