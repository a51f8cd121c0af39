"""The configuration as it is now: takes changes, checks each document, and gives the snapshot that is in force.

A document that is wrong never replaces a good one: the last good version stays in force, and the problem says so. A name that two files
use is in force in neither of its new meanings: the version that was in force before stays, and both places are named.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from mesh.compile import Compiler
from mesh.compile_clusters import service_of_slice
from mesh.compile_world import World, parent_key
from mesh.documents import Document, Instance, Key, Problem
from mesh.kinds import KINDS, check_document, is_passed_over
from mesh.kinds_gateway import CONTROLLER, GATEWAY_GROUP
from mesh.model import Snapshot
from mesh.status import Statuses

InstanceName = tuple[str, str, str]
"""Namespace, service and instance."""


class Workspace:
    """Owns every document, in force or not, and every instance. One for a process; not for several threads."""

    def __init__(self) -> None:
        self._documents: dict[Key, Document] = {}
        self._good: dict[Key, Document] = {}
        self._problems: dict[Key, tuple[Problem, ...]] = {}
        self._source_problems: tuple[Problem, ...] = ()
        self._last_problems: tuple[Problem, ...] = ()
        self._troubled: set[Key | None] = set()
        """Resources about which something is said now."""
        self._world = World()
        self._compiler = Compiler()
        self._snapshot = self._compiler.snapshot

    @property
    def snapshot(self) -> Snapshot:
        """What is in force."""
        return self._snapshot

    @property
    def documents(self) -> dict[Key, Document]:
        """The newest version of every resource, wrong ones too. Not to be changed."""
        return self._documents

    @property
    def in_force(self) -> dict[Key, Document]:
        """The newest good version of every resource. Not to be changed."""
        return self._good

    def problems_of(self, key: Key) -> tuple[Problem, ...]:
        """Everything that is wrong with one resource."""
        return tuple(problem for problem in self._snapshot.problems if problem.key == key)

    def statuses(self, now: str) -> Statuses:
        """The `status` of every resource, as of `now` (RFC 3339). To be asked before the next update."""
        return Statuses(
            now=now,
            documents=self._documents,
            in_force=self._good,
            problems=self._snapshot.problems,
            gateways=self._compiler.parts,
            parents=self._compiler.parents,
            places=self._compiler.places,
            foreign=frozenset(key for key, document in self._documents.items() if self._is_foreign(document)),
        )

    def update(
        self,
        *,
        upserts: Iterable[Document] = (),
        deletes: Iterable[Key] = (),
        instances: Iterable[Instance] = (),
        gone_instances: Iterable[InstanceName] = (),
        problems: Iterable[Problem] = (),
        replace: bool = False,
    ) -> Snapshot:
        """Applies one change, all of it at once, and returns the new snapshot (the same one when nothing has changed).

        `problems` are all that the source has right now. With `replace`, `upserts` and `instances` are all that there is. A document in
        `upserts` wins over the same key in `deletes`.
        """
        incoming: dict[Key, list[Document]] = {}
        for document in upserts:
            if is_passed_over(document.key):
                continue
            incoming.setdefault(document.key, []).append(document)
        gone = [key for key in deletes if key not in incoming]
        self._source_problems = tuple(problems)
        self._troubled = {problem.key for problem in self._snapshot.problems}
        if replace:
            # What a source can't read at the moment is not gone: its last good version stays, as for any other document that is wrong.
            unread = {problem.key for problem in self._source_problems if problem.key is not None}
            gone = [key for key in self._documents if key not in incoming and key not in unread]
            gone_instances = self._replaced_instances(instances := tuple(instances))
        for key in gone:
            self._delete(key)
        for key, documents in incoming.items():
            self._upsert(key, documents)
        for name in gone_instances:
            self._drop_instance(name)
        for instance in instances:
            self._put_instance(instance)
        self._snapshot = self._compile()
        return self._snapshot

    def _compile(self) -> Snapshot:
        found = [self._kept(problem) for problem in self._source_problems]
        for key, problems in self._problems.items():
            if not self._is_foreign(self._documents[key]):
                found += problems
        if not self._world.dirty and self._compiler.snapshot.version and tuple(found) == self._last_problems:
            return self._snapshot
        self._last_problems = tuple(found)
        before = self._snapshot
        after = self._compiler.compile(self._world, tuple(found))
        # Parts that are equal are the same by now, and the version is a digest of them.
        unchanged = before.version == after.version and before.problems == after.problems
        return before if unchanged else after

    def _is_foreign(self, document: Document) -> bool:
        """Whether a wrong document is somebody else's business: a Gateway of another implementation's class, or a route at such only."""
        spec = document.body.get("spec")
        if not isinstance(spec, dict):
            return False
        if document.key.kind == "Gateway":
            wanted = spec.get("gatewayClassName")
            known = self._world.get("GatewayClass", "", wanted) if isinstance(wanted, str) else None
            return known is not None and known.body["spec"]["controllerName"] != CONTROLLER
        refs = [spec.get("parentRef")] if document.key.kind == "ListenerSet" else spec.get("parentRefs")
        if document.key.group != GATEWAY_GROUP or not isinstance(refs, list) or not refs:
            return False
        for ref in refs:
            if not isinstance(ref, dict) or not isinstance(ref.get("name"), str):
                return False
            parent = parent_key(document, ref)
            if not all(isinstance(each, str) for each in (parent.group, parent.kind, parent.namespace)):
                return False
            if parent.kind not in ("Gateway", "ListenerSet"):
                return False
            known = self._documents.get(parent)
            if known is None or not self._is_foreign(known):
                return False
        return True

    def _kept(self, problem: Problem) -> Problem:
        if problem.key is not None and problem.key in self._good and not problem.kept and problem.severity == "error":
            return msgspec.structs.replace(problem, kept=True)
        return problem

    def _upsert(self, key: Key, documents: list[Document]) -> None:
        document = documents[-1]
        known = self._documents.get(key)
        self._documents[key] = document
        if len(documents) == 1 and known is not None and known.version == document.version and known.version:
            if known.origin == document.origin:
                return
            if self._good.get(key) is known and key not in self._troubled:
                # It has moved in its file: nothing depends on where it is but what is said of it.
                self._good[key] = self._world.documents[key.kind][key.namespace, key.name] = document
                return
        if len(documents) > 1:
            places = [item.origin.at(()) for item in documents]
            message = f"it is there {len(documents)} times, in {' and in '.join(places)}; keep one"
            problems: tuple[Problem, ...] = (Problem(key=key, message=message, where=places[-1], reason="Conflicted"),)
        else:
            problems = check_document(document)
        if not problems:
            self._problems.pop(key, None)
            self._put(key, document)
            return
        kept = key in self._good
        self._problems[key] = tuple(msgspec.structs.replace(problem, kept=kept) for problem in problems)
        if not kept:
            self._world.bad[key] = document
            self._world.dirty.add(key.kind)

    def _put(self, key: Key, document: Document) -> None:
        before = self._good.get(key)
        self._good[key] = document
        self._world.bad.pop(key, None)
        self._world.documents.setdefault(key.kind, {})[key.namespace, key.name] = document
        self._touch(key, before, document)

    def _delete(self, key: Key) -> None:
        self._documents.pop(key, None)
        self._problems.pop(key, None)
        before = self._good.pop(key, None)
        if self._world.bad.pop(key, None) is not None:
            self._world.dirty.add(key.kind)
        if before is not None:
            del self._world.documents[key.kind][key.namespace, key.name]
            self._touch(key, before, None)

    def _touch(self, key: Key, before: Document | None, after: Document | None) -> None:
        self._world.dirty.add(key.kind)
        if key.kind == "EndpointSlice":
            self._world.dirty_services.update(service_of_slice(document) for document in (before, after) if document is not None)

    def _replaced_instances(self, instances: tuple[Instance, ...]) -> list[InstanceName]:
        there = {(instance.namespace, instance.service, instance.instance) for instance in instances}
        return [(*service, name) for service, known in self._world.instances.items() for name in known if (*service, name) not in there]

    def _put_instance(self, instance: Instance) -> None:
        service = (instance.namespace, instance.service)
        known = self._world.instances.setdefault(service, {})
        if known.get(instance.instance) != instance:
            known[instance.instance] = instance
            self._touch_instance(service)

    def _drop_instance(self, name: InstanceName) -> None:
        service = name[:2]
        known = self._world.instances.get(service)
        if known is not None and known.pop(name[2], None) is not None:
            if not known:
                del self._world.instances[service]
            self._touch_instance(service)

    def _touch_instance(self, service: tuple[str, str]) -> None:
        self._world.dirty.add("Instance")
        self._world.dirty_services.add(service)


def known_kinds() -> tuple[str, ...]:
    """The kinds that a workspace reads, in alphabetical order."""
    return tuple(sorted(kind.name for kind in KINDS.values()))
