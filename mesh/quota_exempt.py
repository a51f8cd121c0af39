"""Whom a limit is not for."""

from __future__ import annotations

import msgspec


class Exempt(msgspec.Struct, frozen=True, kw_only=True):
    """Whom a limit is not for: one of these is there."""

    identity: str = ""
    namespace: str = ""
    address: str = ""
    """A network, or one address."""
    claim: str = ""
    value: str = ""
    """What the claim says."""
