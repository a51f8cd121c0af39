"""Renewal: new certificates for the directories that an authority looks after, well before the old ones end.

`needs` decides, `Renewer` does. A certificate is renewed at a moment between half and two thirds of its life that follows from its
serial number: spread out over a fleet, and the same however often it is asked.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from identity.ca import LEAF_LIFETIME, Authority, write_identity
from identity.files import IdentityFiles
from identity.problems import IdentityError
from identity.spiffe import SpiffeId
from identity.svid import Identity

RETRY = 10.0
"""Seconds until a failed renewal is tried again."""
SHORTEST_SLEEP = 1.0
"""Seconds: an authority that is about to end itself issues ever shorter certificates."""
LONGEST_SLEEP = 60.0
"""Seconds: directories are looked at at least this often, and a clock that jumps is noticed."""


class Charge(msgspec.Struct, frozen=True, kw_only=True):
    """One directory to keep an identity in."""

    directory: Path
    spiffe_id: SpiffeId
    dns: tuple[str, ...] = ()
    ip: tuple[str, ...] = ()
    lifetime: float = LEAF_LIFETIME
    """Seconds."""
    common_name: str = ""


def due(identity: Identity) -> float:
    """When to renew (wall clock, seconds since the epoch): at half to two thirds of its life."""
    share = random.Random(identity.serial).uniform(1 / 2, 2 / 3)  # noqa: S311 -- spreads load, keeps no secret
    return identity.not_before + share * (identity.not_after - identity.not_before)


def needs(charge: Charge, held: Identity | None, bundle: bytes, now: float) -> str:
    """Why `charge` needs a new certificate at `now` in place of `held`; empty when it does not."""
    if held is None:
        return "there is none that can be served"
    if held.spiffe_id != str(charge.spiffe_id):
        return f"it is for {held.spiffe_id}"
    if set(held.dns_names) != set(charge.dns):
        return "its DNS names are others"
    if held.bundle != bundle:
        return "the trust bundle has changed"
    return "it is due" if now >= due(held) else ""


class Renewer:
    """Keeps the directories' identities fresh. Owns `problems`: what could not be renewed, by directory."""

    __slots__ = ("_authority", "_charges", "_clock", "problems", "renewed")

    def __init__(self, authority: Callable[[], Authority], charges: Sequence[Charge], clock: Callable[[], float] = time.time) -> None:
        """`authority` is asked on each round, so that a rotated root or bundle is picked up (`lambda: Authority.load(directory)`)."""
        self._authority = authority
        self._charges = tuple(charges)
        self._clock = clock
        self.problems: dict[Path, str] = {}
        self.renewed = 0
        """Certificates issued so far."""

    def run_once(self) -> float:
        """Renews what needs it; returns the seconds to wait before the next round."""
        now = self._clock()
        try:
            authority = self._authority()
        except IdentityError as error:
            self.problems = {charge.directory: str(error) for charge in self._charges}
            return RETRY
        waits = [self._one(authority, charge, now) for charge in self._charges]
        return max(SHORTEST_SLEEP, min([LONGEST_SLEEP, *waits]))

    async def run(self) -> None:
        """Renews until cancelled."""
        while True:
            # Signing and fsync are brief but block: not in the loop that others use.
            wait = await asyncio.get_running_loop().run_in_executor(None, self.run_once)
            await asyncio.sleep(wait)

    def _one(self, authority: Authority, charge: Charge, now: float) -> float:
        try:
            held: Identity | None = IdentityFiles(charge.directory, self._clock).current
        except IdentityError:
            held = None
        try:
            if needs(charge, held, authority.bundle, now):
                held = authority.issue(charge.spiffe_id, charge.dns, charge.ip, charge.lifetime, now, charge.common_name)
                write_identity(held, charge.directory)
                self.renewed += 1
        except IdentityError as error:
            self.problems[charge.directory] = str(error)
            return RETRY
        self.problems.pop(charge.directory, None)
        return due(held) - now if held else RETRY
