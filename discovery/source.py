"""What a configuration source is: something that says what there is now, and then each change of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import msgspec

from mesh.documents import Document, Instance, Key, Problem

InstanceName = tuple[str, str, str]
"""Namespace, service and instance."""


class PolicyFiles(msgspec.Struct, frozen=True, kw_only=True):
    """The Rego that lies in a directory (everything below its folder `policy/`, laid out as an OPA bundle), not compiled yet.

    Tests (`*_test.rego`) are left out. In etcd there are `PolicyRevision`s instead.
    """

    modules: dict[str, str] = {}
    """File name (relative to the directory) to Rego source."""
    data: bytes = b"{}"
    """JSON of the base documents: `data.json` and `data.yaml` files, each at the path of its folder below `policy/`."""


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """What changed at one instant. All of it is applied together or not at all."""

    upserts: tuple[Document, ...] = ()
    deletes: tuple[Key, ...] = ()
    instances: tuple[Instance, ...] = ()
    gone_instances: tuple[InstanceName, ...] = ()
    problems: tuple[Problem, ...] = ()
    """Everything that is wrong with the source's content right now, not only what is new."""
    policy: PolicyFiles | None = None
    """The Rego files of a directory, all of them, when they have changed; None when they have not."""
    replace: bool = False
    """True when `upserts` and `instances` are all that there is: whatever else was known is gone."""


OnChange = Callable[[Change], None]


class SourceStatus(msgspec.Struct, frozen=True, kw_only=True):
    """How a source is doing."""

    connected: bool = False
    revision: str = ""
    """Names the state that was delivered last; equal revisions of one source mean equal states."""
    delivered: str = ""
    """The same for what has really been handed to `on_change`: `revision` may be ahead of it for a moment."""
    last_contact: float | None = None
    """Monotonic seconds at which the last probe that was answered had been *sent*: all that was written before then has been
    delivered. None before the first answer."""
    stale: str = ""
    """Why what was delivered may be out of date; empty when it is not."""
    text: str = ""
    """One line for people."""


class Source(Protocol):
    """Where configuration and instances come from."""

    @property
    def status(self) -> SourceStatus:
        """How it is doing now. Cheap: a gateway may ask for each decision."""
        ...

    async def start(self, on_change: OnChange) -> None:
        """Delivers the first state (`replace=True`) to `on_change` and returns; changes follow until `stop`.

        `on_change` is called in the event loop. When the source can't be reached, the first state is the one that was saved (or an
        empty one) and `status.stale` says so; the source goes on trying by itself.
        """
        ...

    async def stop(self) -> None:
        """Ends everything that `start` began. Nothing is delivered afterwards."""
        ...
