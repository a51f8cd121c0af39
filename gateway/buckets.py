"""Which bucket a request takes its token from: the values of a limit's descriptors, one tiny function for each kind."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Final

import msgspec

from gateway.caller import namespace_of
from mesh.model import MeshSettings, QuotaLimit
from mesh.questions import Asking, SlotQuestion, TokenQuestion
from mesh.quota_exempt import Exempt
from mesh.quota_shares import Shares
from mesh.quota_tables import NO_TABLE, Table
from quota.changes import Numbers

LONGEST: Final = 256
"""Bytes of a value that the client chooses; of a longer one the digest counts, so that nobody fills the store with long names."""

_DIGITS: Final = 9
"""Of a cost that a header says; more are more than anybody may."""

Value = Callable[[Asking, str, str, MeshSettings], str]
"""From the request, the client's address, the descriptor's argument and the mesh to the text that names the bucket."""


def _identity(asking: Asking, _address: str, _argument: str, _mesh: MeshSettings) -> str:
    return asking.caller.principal


def _namespace(asking: Asking, _address: str, _argument: str, mesh: MeshSettings) -> str:
    return namespace_of(asking.caller.principal, mesh.trust_domain)


def _route(asking: Asking, _address: str, _argument: str, _mesh: MeshSettings) -> str:
    return asking.route.partition("#")[0]


def _template(asking: Asking, _address: str, _argument: str, _mesh: MeshSettings) -> str:
    return asking.template


def _service(asking: Asking, _address: str, _argument: str, _mesh: MeshSettings) -> str:
    return asking.service


def _gateway(asking: Asking, _address: str, _argument: str, _mesh: MeshSettings) -> str:
    return asking.gateway


def _method(asking: Asking, _address: str, _argument: str, _mesh: MeshSettings) -> str:
    return _bounded(asking.head.method)


def _header(asking: Asking, _address: str, argument: str, _mesh: MeshSettings) -> str:
    return _bounded(asking.head.header(argument.lower().encode("latin-1", "replace")) or b"")


def _cookie(asking: Asking, _address: str, argument: str, _mesh: MeshSettings) -> str:
    wanted = argument.encode("latin-1", "replace")
    for name, value in asking.head.headers:
        if name == b"cookie":
            for part in value.split(b";"):
                own, equals, said = part.partition(b"=")
                if equals and own.strip() == wanted:
                    return _bounded(said.strip())
    return ""


def _claim(asking: Asking, _address: str, argument: str, _mesh: MeshSettings) -> str:
    return _bounded(claim_of(asking, argument).encode())


def claim_of(asking: Asking, name: str) -> str:
    """What a claim of the request's verified token says: text as it is, anything else as JSON; empty without one."""
    bearer = asking.head.bearer
    said = bearer.claims.get(name) if bearer is not None else None
    return said if isinstance(said, str) else "" if said is None else msgspec.json.encode(said, order="sorted").decode()


def _address(_asking: Asking, address: str, argument: str, _mesh: MeshSettings) -> str:
    return network_of(address, argument) if argument else address


@lru_cache(maxsize=4096)
def network_of(address: str, lengths: str) -> str:
    """The network that an address lies in, `10.1.2.0/24`; `lengths` are its bits, for IPv4 and IPv6 (`24/64`)."""
    at = _ip(address)
    if at is None:
        return address
    v4, _, v6 = lengths.partition("/")
    return str(ip_network((at.packed, int(v4 if at.version == 4 else v6)), strict=False))


def _constant(_asking: Asking, _address: str, argument: str, _mesh: MeshSettings) -> str:
    return argument


VALUES: Final[dict[str, Value]] = {
    "identity": _identity,
    "namespace": _namespace,
    "route": _route,
    "template": _template,
    "service": _service,
    "gateway": _gateway,
    "method": _method,
    "header": _header,
    "cookie": _cookie,
    "claim": _claim,
    "address": _address,
    "constant": _constant,
}
"""What each kind of descriptor stands for. `route` is the route's `namespace/name`, whichever of its rules matched."""


def _bounded(value: bytes) -> str:
    if len(value) > LONGEST:
        return "sha256:" + hashlib.sha256(value).hexdigest()
    try:
        return value.decode()  # as an author writes it in overrides
    except UnicodeDecodeError:
        return value.decode("latin-1")


class Exemptions:
    """Whom a limit is not for."""

    __slots__ = ("_claims", "_identities", "_namespaces", "_networks")

    def __init__(self, exempt: tuple[Exempt, ...]) -> None:
        self._identities = frozenset(each.identity for each in exempt if each.identity)
        self._namespaces = frozenset(each.namespace for each in exempt if each.namespace)
        self._networks = tuple(ip_network(each.address, strict=False) for each in exempt if each.address)
        self._claims = tuple((each.claim, each.value) for each in exempt if each.claim)

    def hold(self, asking: Asking, address: str, mesh: MeshSettings) -> bool:
        """Whether a request of a client at `address` is exempt."""
        if asking.caller.principal in self._identities:
            return True
        if self._namespaces and namespace_of(asking.caller.principal, mesh.trust_domain) in self._namespaces:
            return True
        if self._networks and (at := _ip(address)) is not None and any(at in network for network in self._networks):
            return True
        return any(claim_of(asking, name) == value for name, value in self._claims)


@lru_cache(maxsize=4096)
def _ip(address: str) -> IPv4Address | IPv6Address | None:
    try:
        found = ip_address(address.partition("%")[0])
    except ValueError:
        return None
    return (found.ipv4_mapped or found) if isinstance(found, IPv6Address) else found


class Bucket:
    """A limit, prepared to name a request's bucket."""

    __slots__ = ("_exempt", "_mesh", "_numbers", "_only", "_overrides", "_values", "limit")

    def __init__(self, limit: QuotaLimit, mesh: MeshSettings, table: Table = NO_TABLE) -> None:
        """`table`: the one that the limit names."""
        self.limit = limit
        self._mesh = mesh
        self._values = tuple((VALUES[descriptor.kind], descriptor.argument) for descriptor in limit.per)
        self._only = self._values[0] if len(self._values) == 1 else None
        self._exempt = Exemptions(limit.exempt) if limit.exempt else None
        self._overrides = dict(limit.overrides)
        self._numbers = Numbers(limit, table) if limit.changes or limit.resets or table.rows else None

    def question(self, asking: Asking, address: str) -> TokenQuestion | None:
        """The question of a request by a client at `address` (text); None when the limit is not for it, or lifted."""
        limit, mesh = self.limit, self._mesh
        if self._exempt is not None and self._exempt.hold(asking, address, mesh):
            return None
        if self._only is not None:
            value, argument = self._only
            key: tuple[str, ...] = (value(asking, address, argument, mesh),)
        else:
            key = tuple([value(asking, address, argument, mesh) for value, argument in self._values])
        if self._numbers is not None:
            changed = self._numbers.of(key, asking.received)
            if changed is None:
                return None
            limit = changed
        elif self._overrides:
            limit = self._overrides.get(key, limit)
        return TokenQuestion(limit, key, limit.cost if not limit.cost_header else _cost(limit, asking))


class SharedBucket(Bucket):
    """A concurrency limit whose slots are shared among callers, or held back from some."""

    __slots__ = ("_argument", "_important", "_kind", "_shares", "_weights")

    def __init__(self, limit: QuotaLimit, mesh: MeshSettings, table: Table, shares: Shares) -> None:
        super().__init__(limit, mesh, table)
        self._shares = shares
        self._kind = VALUES[shares.kind] if shares.kind else None
        self._argument = shares.argument
        self._weights = dict(shares.weights)
        self._important = Exemptions(shares.important) if shares.important else None

    def question(self, asking: Asking, address: str) -> TokenQuestion | None:
        """As `Bucket.question`."""
        plain = super().question(asking, address)
        if plain is None or not plain.limit.concurrency:
            return plain
        caller = self._kind(asking, address, self._argument, self._mesh) if self._kind is not None else ""
        held_back = 0
        if self._important is not None and not self._important.hold(asking, address, self._mesh):
            held_back = self._shares.reserve(plain.limit.concurrency)
        return SlotQuestion(plain.limit, plain.key, 1, caller, self._weights.get(caller, 1), held_back)


def bucket_for(limit: QuotaLimit, mesh: MeshSettings, table: Table = NO_TABLE) -> Bucket:
    """A limit, prepared; `table` as `Bucket`'s."""
    return Bucket(limit, mesh, table) if limit.shares is None else SharedBucket(limit, mesh, table, limit.shares)


def _cost(limit: QuotaLimit, asking: Asking) -> int:
    """What a request says that it takes: at least one token, at most what the limit's author allows. What is no number costs the most,
    so that nobody gains by nonsense; a request that says nothing costs what the limit says."""
    said = asking.head.header(limit.cost_header)
    if said is None:
        return limit.cost
    if not said.isdigit() or len(said) > _DIGITS:
        return limit.most_cost
    return max(1, min(int(said), limit.most_cost))


def questions(buckets: tuple[Bucket, ...], asking: Asking, address: str) -> tuple[TokenQuestion, ...]:
    """The questions of a request, in the order of the limits."""
    return tuple([question for bucket in buckets if (question := bucket.question(asking, address)) is not None])
