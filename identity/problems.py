"""What can be wrong with an identity: as a value (a peer's, on the data path) and as an error (our own, when it is loaded)."""

from __future__ import annotations

import msgspec


class IdentityProblem(msgspec.Struct, frozen=True):
    """Why a peer is not taken for whom it says it is. A value, because on the data path it is an ordinary outcome."""

    reason: str
    """A stable snake_case word for metrics (`no_certificate`, `no_spiffe_id`, `two_uris`, `expired`, ...)."""
    sentence: str
    """For the log; holds nothing secret."""

    def __str__(self) -> str:
        return self.sentence


class IdentityError(Exception):
    """An identity, key or trust bundle of our own that cannot be used; the message says what to do about it."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        """A stable snake_case word, as in `IdentityProblem.reason`."""
