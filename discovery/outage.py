"""A registry outage is not a service outage: which instances to keep although they have vanished from the registry.

When a lease ends because its owner can't reach etcd, etcd deletes the instance just as if it had stopped. One instance that
vanishes is believed to have stopped. When more than half of a service's, or of all, vanish within a short time, they are kept and
asked themselves: as long as one accepts a connection it stays (Envoy calls the like panic mode; Eureka self-preservation).

An instance that says that it is not ready before it goes has left on purpose (`discovery.register` does that when it is stopped):
it is never kept. Pure: time is an argument.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from discovery.source import InstanceName
from mesh.documents import Instance, Problem

WINDOW = 30.0
"""Seconds within which instances count as having vanished together; leases end within one TTL of each other."""
ASK_EVERY = 5.0
"""Seconds between two questions to a kept instance."""
FAILURES = 2
"""Questions in a row without an answer after which a kept instance is let go; a refused connection lets it go at once."""


LONGEST = 900.0
"""Seconds after which a kept instance is let go all the same: by then somebody has seen to the registry, or meant it to be gone."""


class _Vanished:
    """One instance that is no longer registered."""

    __slots__ = ("at", "confirmed", "due", "failures", "instance", "kept")

    def __init__(self, instance: Instance, at: float, confirmed: bool) -> None:
        self.instance = instance
        self.at = at
        self.confirmed = confirmed
        self.kept = False
        self.due = at
        self.failures = 0


class Keeper:
    """Who has vanished lately, and who of them is kept. Owned by one `Contents`."""

    __slots__ = ("_vanished",)

    def __init__(self) -> None:
        self._vanished: dict[InstanceName, _Vanished] = {}

    def vanished(self, name: InstanceName, instance: Instance, now: float, *, confirmed: bool = True) -> None:
        """An instance that was registered no longer is. `confirmed` False: it is known from long ago, and serves only once it answers."""
        if instance.ready:
            self._vanished[name] = _Vanished(instance, now, confirmed)

    def returned(self, name: InstanceName) -> None:
        """It is registered (again)."""
        self._vanished.pop(name, None)

    def judge(self, registered: Iterable[InstanceName], now: float) -> None:
        """Decides who of those that vanished within `WINDOW` is kept. `registered`: who still is."""
        for name in [name for name, each in self._vanished.items() if not each.kept and now - each.at > WINDOW]:
            del self._vanished[name]
        if all(each.kept for each in self._vanished.values()):
            return
        left: Counter[tuple[str, str]] = Counter((namespace, service) for namespace, service, _ in registered)
        gone: Counter[tuple[str, str]] = Counter((namespace, service) for namespace, service, _ in self._vanished)
        everywhere = gone.total() > left.total()
        for (namespace, service, _), each in self._vanished.items():
            if everywhere or gone[namespace, service] > left[namespace, service]:
                each.kept = True

    def kept(self) -> Iterator[tuple[InstanceName, Instance]]:
        """Who is to be used although it isn't registered."""
        return ((name, each.instance) for name, each in self._vanished.items() if each.kept and each.confirmed)

    def serves(self, name: InstanceName) -> Instance | None:
        """The instance of that name if it is kept and to be used."""
        each = self._vanished.get(name)
        return each.instance if each is not None and each.kept and each.confirmed else None

    def due(self, now: float, most: int) -> list[tuple[InstanceName, Instance]]:
        """At most `most` kept instances that are to be asked now; each is due again `ASK_EVERY` later."""
        found: list[tuple[InstanceName, Instance]] = []
        for name, each in self._vanished.items():
            if each.kept and each.due <= now and len(found) < most:
                each.due = now + ASK_EVERY
                found.append((name, each.instance))
        return found

    def answered(self, name: InstanceName, instance: Instance) -> None:
        """A kept instance accepted a connection."""
        each = self._vanished.get(name)
        if each is not None and each.instance is instance:
            each.failures, each.confirmed = 0, True

    def overdue(self, name: InstanceName, now: float) -> bool:
        """Whether an instance has been kept for so long that it is let go although it answers."""
        each = self._vanished.get(name)
        return each is not None and now - each.at > LONGEST

    def silent(self, name: InstanceName, instance: Instance, now: float, *, refused: bool) -> None:
        """A kept instance did not."""
        each = self._vanished.get(name)
        if each is None or each.instance is not instance:
            return
        each.failures += 1
        each.due = now + 1.0
        if refused or each.failures >= FAILURES:
            del self._vanished[name]

    @property
    def active(self) -> bool:
        """Whether anybody is kept."""
        return any(each.kept for each in self._vanished.values())

    def problems(self) -> Iterator[Problem]:
        """One warning for each service that has kept instances."""
        counts = Counter(f"{namespace}/{service}" for (namespace, service, _), _ in self.kept())
        for service, count in sorted(counts.items()):
            yield Problem(
                key=None,
                message=f"{count} instances of {service} vanished from the registry together and are kept while they answer; "
                "see whether they can reach etcd",
                where="etcd",
                reason="RegistryOutage",
                severity="warning",
                kept=True,
            )
