"""Judges the tokens of requests by the rules of one place, and keeps those that it has verified.

A verified token is kept, whole, with the place and the rules that it was found by, until it ends, until its rule's keys are others, or
until there is no room: the next request with it costs a look-up. What was refused is not kept.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from time import monotonic
from typing import Final, Protocol

import msgspec

from identity.jwks import Keys, KeyStore
from identity.jwt import MALFORMED, NO_KEY, NO_KEYS, NOT_VERIFIED, UNKNOWN_ISSUER, Bad, bearer_of, check, read_token, verify
from mesh.jwks import KeySet
from mesh.model import Snapshot
from mesh.tokens import Bearer, TokenRule

MOST_KEPT: Final = 50_000
"""Tokens."""
MOST_KEPT_BYTES: Final = 32 << 20
"""Of their text; what they say takes about three times as much."""

_Key = tuple[bytes, int, int]
"""A token, the authenticator, and the rules in whose locations it was found."""


class KeysWanted(msgspec.Struct, frozen=True, gc=False):
    """It can't be said before these keys have been fetched."""

    keys: Keys


class Results(Protocol):
    """What is told of each token."""

    def judged(self, issuer: str, result: str) -> None:
        """`issuer`: of a rule, empty for none; `result`: `allowed`, `kept`, or a `Bad.word`."""
        ...


class _Entry:
    __slots__ = ("bearer", "keys", "set", "until")

    def __init__(self, bearer: Bearer, keys: Keys, used: KeySet | None) -> None:
        self.bearer = bearer
        self.until = bearer.expires + 1
        """The last second counts as a whole."""
        self.keys = keys
        self.set = used


class KeptTokens:
    """Verified tokens, of all places of a process; the one used longest ago goes first."""

    __slots__ = ("_entries", "_most", "_most_bytes", "bytes")

    def __init__(self, most: int = MOST_KEPT, most_bytes: int = MOST_KEPT_BYTES) -> None:
        self._entries: OrderedDict[_Key, _Entry] = OrderedDict()
        self._most = most
        self._most_bytes = most_bytes
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: _Key, now: float) -> Bearer | None:
        """The bearer of a token that is still what it was at `now` (seconds since the epoch)."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        if now >= entry.until or entry.keys.set is not entry.set:
            self._drop(key)
            return None
        self._entries.move_to_end(key)
        return entry.bearer

    def put(self, key: _Key, bearer: Bearer, keys: Keys) -> None:
        """Keeps a token that was verified just now by `keys`."""
        self._entries[key] = _Entry(bearer, keys, keys.set)
        self.bytes += len(key[0])
        while len(self._entries) > self._most or self.bytes > self._most_bytes:
            self._drop(next(iter(self._entries)))

    def _drop(self, key: _Key) -> None:
        del self._entries[key]
        self.bytes -= len(key[0])


class Authenticator:
    """For the rules of one place."""

    __slots__ = ("_kept", "_keys", "_number", "_results", "rules")

    def __init__(
        self, rules: tuple[TokenRule, ...], keys: tuple[Keys, ...], kept: KeptTokens, number: int, results: Results | None
    ) -> None:
        """`keys`: of each rule. `number`: no other authenticator of `kept` has it."""
        self.rules = rules
        self._keys = keys
        self._kept = kept
        self._number = number
        self._results = results

    def judge(self, token: bytes, found: int, now: float, *, waited: bool = False) -> Bearer | Bad | KeysWanted:
        """Whether to believe `token`, which was found where the rules look whose bits are set in `found`, at `now` (seconds since the
        epoch). Once one has `waited` for keys, no others are wanted."""
        key = (token, self._number, found)
        bearer = self._kept.get(key, now)
        if bearer is None:
            return self._fresh(key, now, waited)
        if self._results is not None:
            self._results.judged(bearer.rule.issuer, "kept")
        return bearer

    def _fresh(self, key: _Key, now: float, waited: bool) -> Bearer | Bad | KeysWanted:
        try:
            token = read_token(key[0].decode("ascii"))
        except UnicodeDecodeError:
            token = MALFORMED
        if isinstance(token, Bad):
            return self._told("", token)
        worst, issuer = UNKNOWN_ISSUER, ""
        wanted: KeysWanted | None = None
        for index, rule in enumerate(self.rules):
            if not key[2] >> index & 1:
                continue
            bad = check(token, rule, now)
            if bad is None:
                keys = self._keys[index]
                bad = verify(token, keys.set) if keys.set is not None else NO_KEYS
                if bad is None:
                    bearer = bearer_of(token, rule)
                    self._kept.put(key, bearer, keys)
                    if self._results is not None:
                        self._results.judged(rule.issuer, "allowed")
                    return bearer
                # Keys without an id are not told apart: one that does not fit may be an old one.
                newer = bad in (NO_KEYS, NO_KEY) or (bad is NOT_VERIFIED and not token.kid)
                if newer and not waited and wanted is None and keys.wanted:
                    wanted = KeysWanted(keys)
            if bad is not UNKNOWN_ISSUER:
                worst, issuer = bad, rule.issuer
        return wanted or self._told(issuer, worst)

    def _told(self, issuer: str, bad: Bad) -> Bad:
        if self._results is not None:
            self._results.judged(issuer, bad.word)
        return bad

    def refused(self, bad: Bad) -> Bad:
        """Counts a request that was refused without a look at its tokens."""
        return self._told("", bad)


class Tokens:
    """The authenticators of a process, with the keys and the verified tokens that they share. Belongs to one event loop."""

    def __init__(
        self,
        store: KeyStore | None = None,
        *,
        clock: Callable[[], float] = monotonic,
        results: Results | None = None,
        kept: KeptTokens | None = None,
    ) -> None:
        """Without a `store` no keys are fetched, and only those that are written into rules are there."""
        self.store = store or KeyStore(clock=clock)
        self.kept = kept if kept is not None else KeptTokens()
        self._results = results
        self._known: dict[tuple[TokenRule, ...], Authenticator] = {}
        self._number = 0

    def of(self, rules: tuple[TokenRule, ...]) -> Authenticator:
        """The authenticator for `rules`; the same one as long as they are in use."""
        found = self._known.get(rules)
        if found is None:
            self._number += 1
            keys = tuple(self.store.of(rule.keys) for rule in rules)
            found = self._known[rules] = Authenticator(rules, keys, self.kept, self._number, self._results)
        return found

    def follow(self, snapshot: Snapshot, gateways: Iterable[str]) -> None:
        """Has the keys fetched that these gateways (`namespace/name`) need by `snapshot`, and forgets what nobody needs."""
        ours = [snapshot.gateways[key].authentication for key in gateways if key in snapshot.gateways]
        wanted = {each.rules for each in (*ours, *snapshot.service_authentications)}
        self._known = {rules: known for rules, known in self._known.items() if rules in wanted}
        self.store.follow([rule.keys for rules in wanted for rule in rules])
