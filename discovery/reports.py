"""What each gateway has in force, written by itself under a lease: a report that is there is of a gateway that runs."""

from __future__ import annotations

import time
from collections.abc import Mapping

import msgspec

from discovery.etcd import Etcd
from discovery.keys import GATEWAYS, read_report_key, report_key
from discovery.leased import LeasedKey

TTL = 15
"""Seconds."""


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What one gateway has in force."""

    namespace: str
    name: str
    instance: str
    """Tells the copies of one gateway apart."""
    snapshot: str = ""
    """The version of its snapshot."""
    policy: str = ""
    """The digest of the policy revision that it applies; empty for none."""
    data: dict[str, str] = {}
    """Root and digest of the data with revisions of their own that are in it."""
    shadow: str = ""
    tried: str = ""
    """What is tried on whom (`mesh.policies.tried_text`); empty for nothing."""
    source: str = ""
    """Up to which revision of its configuration source it has followed, with what it says here."""
    waiting: str = ""
    """Why the policy that its configuration names is not in force there; empty when it is."""
    stale: str = ""
    """Why its configuration may be out of date; empty when it is not."""
    problems: int = 0
    """How many problems its configuration has."""
    leaving: bool = False
    """It is the last one: the gateway has ended as it should, and decides nothing any more."""
    time: float = 0.0
    """Wall clock, seconds since the epoch, at which it was so."""


_DECODER = msgspec.json.Decoder(Report)


class Reporter:
    """Writes one gateway's report. Owns its lease; made, started and stopped in one event loop."""

    def __init__(self, etcd: Etcd, namespace: str, name: str, instance: str, *, ttl: int = TTL) -> None:
        """`ttl`: seconds after which the report goes when its gateway is gone. Raises ValueError for a bad name."""
        self._leased = LeasedKey(etcd, report_key(namespace, name, instance), ttl=ttl)
        self._report = Report(namespace=namespace, name=name, instance=instance)

    async def start(self) -> None:
        """Begins to write; goes on trying when etcd is away."""
        self._leased.start()

    async def stop(self) -> None:
        """Takes the report away, after saying that this gateway has ended."""
        await self._leased.stop(msgspec.json.encode(msgspec.structs.replace(self._report, leaving=True, time=time.time())))

    @property
    def written(self) -> bool:
        """Whether etcd has the last report."""
        return self._leased.written

    def report(
        self,
        *,
        snapshot: str,
        policy: str = "",
        data: Mapping[str, str] | None = None,
        shadow: str = "",
        tried: str = "",
        source: str = "",
        waiting: str = "",
        stale: str = "",
        problems: int = 0,
        now: float | None = None,
    ) -> None:
        """This is in force now (`now`: wall clock, seconds). Cheap, and nothing is written when nothing has changed."""
        new = msgspec.structs.replace(
            self._report,
            snapshot=snapshot,
            policy=policy,
            data=dict(data or {}),
            shadow=shadow,
            tried=tried,
            source=source,
            waiting=waiting,
            stale=stale,
            problems=problems,
        )
        if new != self._report or not self._report.time:
            self._report = msgspec.structs.replace(new, time=time.time() if now is None else now)
            self._leased.set(msgspec.json.encode(self._report))


async def reports(etcd: Etcd) -> tuple[Report, ...]:
    """All reports, by name. One that can't be read has nothing in force. Raises EtcdError."""
    found = []
    for entry in (await etcd.list(GATEWAYS.encode())).entries:
        read = read_report(entry.key, entry.value)
        if read is not None and not read.leaving:
            found.append(read)
    return tuple(found)


def read_report(key: bytes, value: bytes) -> Report | None:
    """The report in a key; None for a key that holds none."""
    names = read_report_key(key)
    if names is None:
        return None
    namespace, name, instance = names
    try:
        read = _DECODER.decode(value)
    except (msgspec.DecodeError, UnicodeDecodeError):
        read = Report(namespace=namespace, name=name, instance=instance, stale="its report can't be read")
    return msgspec.structs.replace(read, namespace=namespace, name=name, instance=instance)
