"""Which bucket a request takes its token from: the values of a limit's descriptors, one tiny function for each kind."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Final

from gateway.caller import namespace_of
from mesh.model import MeshSettings, QuotaLimit
from mesh.questions import Asking, TokenQuestion

LONGEST: Final = 256
"""Bytes of a value that the client chooses; of a longer one the digest counts, so that nobody fills the store with long names."""

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


def _address(_asking: Asking, address: str, _argument: str, _mesh: MeshSettings) -> str:
    return address


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
    "address": _address,
    "constant": _constant,
}
"""What each kind of descriptor stands for. `route` is the route's `namespace/name`, whichever of its rules matched."""


def _bounded(value: bytes) -> str:
    if len(value) > LONGEST:
        return "sha256:" + hashlib.sha256(value).hexdigest()
    return value.decode("latin-1")


class Bucket:
    """A limit, prepared to name a request's bucket."""

    __slots__ = ("_limit", "_mesh", "_only", "_values")

    def __init__(self, limit: QuotaLimit, mesh: MeshSettings) -> None:
        self._limit = limit
        self._mesh = mesh
        self._values = tuple((VALUES[descriptor.kind], descriptor.argument) for descriptor in limit.per)
        self._only = self._values[0] if len(self._values) == 1 else None

    def question(self, asking: Asking, address: str) -> TokenQuestion:
        """The question of a request by a client at `address` (text)."""
        limit = self._limit
        if self._only is not None:
            value, argument = self._only
            return TokenQuestion(limit, (value(asking, address, argument, self._mesh),), limit.cost)
        return TokenQuestion(limit, tuple([value(asking, address, argument, self._mesh) for value, argument in self._values]), limit.cost)
