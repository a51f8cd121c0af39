"""Sessions: a token in a cookie or a header says which endpoint served a client before (Gateway API GEP-1619). Pure.

A token is `time | endpoint | proof`, in base64url: the seconds since the epoch at which it was given, a keyed digest of the cluster and the
endpoint's address, and a keyed digest of both. It tells a client nothing, and can name only endpoints of the rule's own backends, among
which it is looked up. One that is not genuine, too old, or of an endpoint that is gone is as good as none, and the client gets another
with the answer.
"""

from __future__ import annotations

import base64
import binascii
import hmac
from functools import lru_cache
from hashlib import blake2b
from typing import TYPE_CHECKING, Final

from mesh.filters import Session
from mesh.http import Header, RequestHead

if TYPE_CHECKING:
    from gateway.choice import Choice

Key = tuple[str, int]
"""Address and port of an endpoint, as `gateway.lane.Place` has them."""
TAG: Final = 12
PROOF: Final = 12
TIME: Final = 5
LENGTH: Final = (TIME + TAG + PROOF + 2) // 3 * 4
"""Characters of a token, with padding."""
SKEW: Final = 60.0
"""Seconds that another gateway's clock may be ahead."""


@lru_cache(maxsize=65536)
def _tag(key: bytes, cluster: str, address: str, port: int) -> bytes:
    return blake2b(f"{cluster}\0{address}\0{port}".encode(), key=key, digest_size=TAG).digest()


class Stay:
    """What is known of one request's session: where it wants to go, and how it is told where it went."""

    __slots__ = ("_keeper", "_now", "_secure", "place")

    def __init__(self, keeper: SessionKeeper, place: Key | None, now: float, secure: bool) -> None:
        self._keeper = keeper
        self.place = place
        """The endpoint that a genuine token names; None without one."""
        self._now = now
        self._secure = secure

    def told(self, headers: list[Header], cluster: str, place: Key) -> list[Header]:
        """The answer's `headers`, with a new token when another endpoint answered than the client's token names."""
        if place == self.place:
            return headers
        return [*headers, self._keeper.header(cluster, place, self._now, self._secure)]


class SessionKeeper:
    """The sessions of one rule, for one snapshot."""

    __slots__ = ("_places", "session")

    def __init__(self, session: Session, choices: tuple[Choice, ...]) -> None:
        self.session = session
        self._places: dict[bytes, tuple[Choice, Key]] = {}
        for choice in choices:
            for endpoint in choice.cluster.endpoints:
                tag = _tag(session.key, choice.cluster.name, endpoint.address, endpoint.port)
                self._places.setdefault(tag, (choice, (endpoint.address, endpoint.port)))

    def find(self, head: RequestHead, now: float) -> tuple[Choice, Key] | None:
        """The choice and the endpoint that the request's token names; None when it has none that counts. `now`: wall clock, seconds."""
        for token in self._tokens(head):
            found = self._read(token, now)
            if found is not None:
                return found
        return None

    def _tokens(self, head: RequestHead) -> list[bytes]:
        name = self.session.name
        if self.session.header:
            value = head.header(name)
            return [] if value is None else [value]
        return [
            value.strip()
            for field, cookies in head.headers
            if field == b"cookie"
            for own, equals, value in (part.partition(b"=") for part in cookies.split(b";"))
            if equals and own.strip() == name
        ]

    def _read(self, token: bytes, now: float) -> tuple[Choice, Key] | None:
        if not LENGTH - 2 <= len(token) <= LENGTH:
            return None
        try:
            raw = base64.b64decode(token.rstrip(b"=") + b"=" * (-len(token.rstrip(b"=")) % 4), b"-_", validate=True)
        except binascii.Error:
            return None
        said, proof = raw[: TIME + TAG], raw[TIME + TAG :]
        if not hmac.compare_digest(proof, self._proof(said)):
            return None
        age = now - int.from_bytes(said[:TIME], "big")
        lifetime = self.session.lifetime
        if age < -SKEW or (lifetime is not None and age >= lifetime):
            return None
        return self._places.get(said[TIME:])

    def _proof(self, said: bytes) -> bytes:
        return blake2b(said, key=self.session.key, digest_size=PROOF, person=b"proof").digest()

    def header(self, cluster: str, place: Key, now: float, secure: bool) -> Header:
        """The field of an answer that gives the client a token for `place`."""
        session = self.session
        said = int(now).to_bytes(TIME, "big") + _tag(session.key, cluster, *place)
        token = base64.urlsafe_b64encode(said + self._proof(said)).rstrip(b"=")
        if session.header:
            return session.name, token
        cookie = b"%s=%s; Path=%s; HttpOnly" % (session.name, token, session.path)
        if session.permanent and session.lifetime is not None:
            cookie += b"; Max-Age=%d" % session.lifetime
        return b"set-cookie", cookie + b"; Secure" if secure else cookie

    def stay(self, place: Key | None, now: float, secure: bool) -> Stay:
        """What one request's upstream side needs."""
        return Stay(self, place, now, secure)
