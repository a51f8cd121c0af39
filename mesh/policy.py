"""Policy revisions as the fleet carries them.

A `Revision` is one whole version of all policy: modules, data, and for each entry point what its answer can depend on. It
is made once, when it is published, and is named by its digest everywhere.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping

import msgspec

Path = tuple[str | int, ...]
"""A path below `input`: a string is an object's key (never an array's), an integer a constant array index (never an object's)."""


class ReadSet(msgspec.Struct, frozen=True, kw_only=True):
    """What an entry point can read of `input`: a decision can differ only between requests that differ in one of these.

    A path in `values` covers everything below it. `values == ((),)` is the whole input.
    """

    values: tuple[Path, ...] = ()
    """The value at a path, present or absent."""
    defined: tuple[Path, ...] = ()
    """Only whether there is something at a path."""
    lengths: tuple[Path, ...] = ()
    """Only the length of the array, object or string at a path (or that it has none)."""
    kinds: tuple[Path, ...] = ()
    """Only of which JSON type the value at a path is: object, array, string, number, boolean, null, or absent."""
    volatile: tuple[str, ...] = ()
    """Builtins whose answer is not a function of their arguments, or that are not on the audited list: not kept without a `ttl`."""
    widened: tuple[str, ...] = ()
    """For people: where the analysis had to widen, and why."""


class EntryPoint(msgspec.Struct, frozen=True, kw_only=True):
    """One decision that may be asked for."""

    path: str
    """As written in `AccessPolicy.spec.decision`: `shop.authz.decision` (below `data`)."""
    digest: str
    """SHA-256 over the plan and the data roots that it can reach: kept decisions of an equal digest stay valid across revisions."""
    reads: ReadSet
    data: tuple[Path, ...] | None = None
    """Paths below `data` whose values it can reach; `()` among them is all of it. None when that is not known."""
    data_defined: tuple[Path, ...] = ()
    """Paths of which it can reach only whether there is something."""
    ttl: float | None = None
    """Seconds that the author lets a decision be kept in spite of `volatile` builtins; None for not at all."""

    @property
    def keepable(self) -> bool:
        """Whether an answer may be kept at all (for ever, or for `ttl`)."""
        return not self.reads.volatile or self.ttl is not None


class Revision(msgspec.Struct, frozen=True, kw_only=True):
    """One whole version of policy."""

    digest: str
    """`sha256:<hex>` over modules and data; names the revision."""
    modules: dict[str, str] = {}
    """File name to Rego source; empty where a bundle URL is given."""
    data: bytes = b"{}"
    """JSON of the base documents."""
    bundle: str = ""
    """URL of an OPA bundle with the modules and data, when they are not inline."""
    entry_points: dict[str, EntryPoint] = {}
    opa: str = ""
    """The OPA version that compiled it."""
    published: str = ""
    """With data that have revisions of their own in it: the digest of the policy that was published. Empty without."""
    parts: tuple[tuple[str, str], ...] = ()
    """Those data: root and digest of each."""

    @property
    def policy(self) -> str:
        """The digest that its PolicyRevision is named by."""
        return self.published or self.digest


class Share(msgspec.Struct, frozen=True, kw_only=True):
    """The requests that a revision is tried on."""

    percent: int = 100
    identities: tuple[str, ...] = ()
    """Callers of whom it is all of them."""
    by_identity: bool = False
    """Whether `percent` is of callers, of whom it is all requests or none, and not of requests. Who has no identity is drawn by request."""

    @property
    def whole(self) -> bool:
        """Whether it is every request."""
        return self.percent >= 100

    def has(self, principal: str, draw: float) -> bool:
        """Whether a request of the caller `principal` is one of them; `draw` is a random number, at least 0 and below 1."""
        if self.by_identity and principal:
            draw = place_of(principal)
        return draw * 100.0 < self.percent or (principal != "" and principal in self.identities)


@functools.lru_cache(maxsize=4096)
def place_of(principal: str) -> float:
    """Where a caller stands among all, at least 0 and below 1: the same at every gateway, so that a share that grows keeps whom it had."""
    return int.from_bytes(hashlib.blake2b(principal.encode("utf-8", "surrogatepass"), digest_size=6).digest(), "big") / (1 << 48)


def digest_of(modules: Mapping[str, str], data: bytes) -> str:
    """The digest (`sha256:<hex>`) that names a revision: over every module and the data in canonical form.

    Equal for equal content however it is laid out (the order of modules and of the data's keys, white space in the data). Raises ValueError
    when `data` is not a JSON object.
    """
    return digest_of_canonical(modules, canonical_data(data))


def digest_of_canonical(modules: Mapping[str, str], data: bytes) -> str:
    """As `digest_of`, of `data` that is in canonical form."""
    whole = hashlib.sha256(b"tollhouse revision 1\n")
    for name in sorted(modules):
        for part in (name.encode("utf-8", "surrogatepass"), modules[name].encode("utf-8", "surrogatepass")):
            whole.update(len(part).to_bytes(8, "big"))
            whole.update(part)
    whole.update(b"\xff" * 8)
    whole.update(data)
    return "sha256:" + whole.hexdigest()


def canonical_data(data: bytes) -> bytes:
    """The one form of a JSON object: keys sorted, no white space. Raises ValueError when it is not a JSON object."""
    try:
        value = json.loads(data or b"{}", parse_constant=_no_constant)
        if not isinstance(value, dict):
            raise ValueError("the data of a policy must be a JSON object")  # noqa: TRY004 - one error for a caller to catch
        return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
    except RecursionError:
        raise ValueError("the data of a policy is nested too deep") from None


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")
