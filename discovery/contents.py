"""What an etcd holds for us: keys and values in, documents, instances and problems out, as one `Change` at a time.

No I/O. A value that can't be used never takes the last good one away; it is a `Problem` that names the key and the revision.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import msgspec

from discovery.etcd import Entry
from discovery.instances import name_of, read_instance, write_instance
from discovery.keys import CONFIG, SERVICES, instance_key, read_config_key, read_instance_key
from discovery.outage import Keeper
from discovery.source import Change, InstanceName
from mesh.documents import Document, Instance, Key, Problem
from mesh.reading import document_from_json
from mesh.writing import document_to_json

CHUNK = 100
"""Entries that are read without a pause."""
MOST_PROBLEMS = 1_000
_CONFIG, _SERVICES = CONFIG.encode(), SERVICES.encode()


class Contents:
    """The tables of one etcd. Its one owner is an `EtcdSource`."""

    def __init__(self) -> None:
        self.keeper = Keeper()
        self._documents: dict[bytes, Document] = {}
        self._instances: dict[bytes, Instance] = {}
        self._revisions: dict[bytes, int] = {}
        """Of every key that is there, usable or not."""
        self._problems: dict[bytes, Problem] = {}
        self._delivered: dict[bytes, Document | Instance] = {}
        self._dirty: set[bytes] = set()
        self._shown: tuple[Problem, ...] = ()

    @property
    def has_documents(self) -> bool:
        """Whether there is any resource."""
        return bool(self._documents)

    def counts(self) -> tuple[int, int]:
        """How many resources and instances there are (not those that are kept)."""
        return len(self._documents), len(self._instances)

    # -- in ------------------------------------------------------------------------------------------------------------------------

    def put(self, entry: Entry) -> None:
        """A key has this value now."""
        key = entry.key
        self._revisions[key] = entry.revision
        if key.startswith(_CONFIG):
            self._put_document(entry)
        elif key.startswith(_SERVICES):
            self._put_instance(entry)

    def delete(self, key: bytes, now: float, *, confirmed: bool = True) -> None:
        """A key isn't there any more. `now`: monotonic seconds; `confirmed`: see `Keeper.vanished`."""
        self._revisions.pop(key, None)
        self._problems.pop(key, None)
        self._documents.pop(key, None)
        instance = self._instances.pop(key, None)
        if instance is not None:
            self.keeper.vanished(name_of(instance), instance, now, confirmed=confirmed)
        self._dirty.add(key)

    def replace(
        self, entries: Iterable[Entry], now: float, *, same_history: bool, keep_documents: bool = False, confirmed: bool = True
    ) -> Iterator[None]:
        """Everything that is there, from a listing. To be run through, with a pause wherever it yields: a long listing takes a while.

        With `same_history` an entry of a revision that is known is not read again; `keep_documents` leaves the resources as they are.
        """
        seen: set[bytes] = set()
        for number, entry in enumerate(entries):
            seen.add(entry.key)
            if not (same_history and self._revisions.get(entry.key) == entry.revision):
                self.put(entry)
            if number % CHUNK == CHUNK - 1:
                yield
        for key in [key for key in self._revisions if key not in seen]:
            if not (keep_documents and key.startswith(_CONFIG)):
                self.delete(key, now, confirmed=confirmed)

    def _put_document(self, entry: Entry) -> None:
        key = read_config_key(entry.key)
        where = where_in_etcd(entry)
        if key is None:
            self._wrong(entry.key, None, where, "this is not the key of a resource; delete it, and write resources with `tollhouse apply`")
            return
        document, problems = document_from_json(entry.value, where, str(entry.revision))
        if document is None:
            text = problems[0] if problems else Problem(key=None, message="it holds nothing")
            self._wrong(entry.key, key, text.where or where, text.message, text)
        elif document.key != key:
            self._wrong(entry.key, key, where, f"it holds {document.key}; write it with `tollhouse apply`, which finds the right key")
        else:
            self._good(entry.key)
            known = self._documents.get(entry.key)
            if known is None or known.body != document.body:
                self._documents[entry.key] = document
                self._dirty.add(entry.key)

    def _put_instance(self, entry: Entry) -> None:
        name = read_instance_key(entry.key)
        where = where_in_etcd(entry)
        if name is None:
            self._wrong(entry.key, None, where, "this is not the key of an instance; delete it")
            return
        try:
            instance = read_instance(name, entry.value)
        except ValueError as error:
            self._wrong(entry.key, None, where, f"instance {'/'.join(name)}: {error}")
            return
        self._good(entry.key)
        self.keeper.returned(name)
        if self._instances.get(entry.key) != instance:
            self._instances[entry.key] = instance
        self._dirty.add(entry.key)

    def _good(self, key: bytes) -> None:
        if self._problems.pop(key, None) is not None:
            self._dirty.add(key)

    def _wrong(self, at: bytes, key: Key | None, where: str, message: str, base: Problem | None = None) -> None:
        kept = at in self._documents or at in self._instances
        self._problems[at] = Problem(
            key=key, path=base.path if base else (), message=message, where=where, kept=kept, reason=base.reason if base else "Invalid"
        )
        self._dirty.add(at)

    # -- out -----------------------------------------------------------------------------------------------------------------------

    def change(self, now: float, *, replace: bool = False) -> Change | None:
        """What is different from the last change that was taken; None for nothing. `replace`: everything."""
        self.keeper.judge((name_of(each) for each in self._instances.values()), now)
        upserts: list[Document] = []
        instances: list[Instance] = []
        deletes: list[Key] = []
        gone: list[InstanceName] = []
        if replace:
            self._delivered.clear()
        keys = {*self._documents, *self._instances} if replace else self._dirty
        for key in sorted({*keys, *self._kept_keys()}):
            new = self._documents.get(key) or self._instances.get(key) or self._kept(key)
            old = self._delivered.get(key)
            if new is old or (new is not None and isinstance(new, Instance) and new == old):
                continue
            if isinstance(new, Document):
                upserts.append(new)
            elif isinstance(new, Instance):
                instances.append(new)
            elif isinstance(old, Document):
                deletes.append(old.key)
            elif isinstance(old, Instance):
                gone.append(name_of(old))
            if new is None:
                del self._delivered[key]
            else:
                self._delivered[key] = new
        self._dirty = set()
        problems = self._all_problems()
        if not (replace or upserts or instances or deletes or gone or problems != self._shown):
            return None
        self._shown = problems
        return Change(
            upserts=tuple(upserts),
            deletes=tuple(deletes),
            instances=tuple(instances),
            gone_instances=tuple(gone),
            problems=problems,
            replace=replace,
        )

    def kept_answered(self, instance: Instance) -> None:
        """A kept instance accepted a connection."""
        self.keeper.answered(name_of(instance), instance)
        self._dirty.add(instance_key(name_of(instance)))

    def kept_silent(self, instance: Instance, now: float, *, refused: bool) -> None:
        """A kept instance did not."""
        self.keeper.silent(name_of(instance), instance, now, refused=refused)
        self._dirty.add(instance_key(name_of(instance)))

    def entries(self) -> Iterator[tuple[bytes, int, Document | Instance]]:
        """All that is good, as etcd would hold it: key, revision, and what it means. `encoded` makes the value."""
        for key, document in self._documents.items():
            yield key, self._revisions.get(key, 0), document
        for key, instance in self._instances.items():
            yield key, self._revisions.get(key, 0), instance
        for name, instance in self.keeper.kept():
            yield instance_key(name), 0, instance

    def _kept_keys(self) -> Iterator[bytes]:
        return (instance_key(name) for name, _ in self.keeper.kept())

    def _kept(self, key: bytes) -> Instance | None:
        name = read_instance_key(key) if key.startswith(_SERVICES) else None
        return self.keeper.serves(name) if name else None

    def _all_problems(self) -> tuple[Problem, ...]:
        found = [*self.keeper.problems(), *(self._problems[key] for key in sorted(self._problems))]
        if len(found) > MOST_PROBLEMS:
            more = len(found) - MOST_PROBLEMS
            found = [*found[:MOST_PROBLEMS], Problem(key=None, message=f"and {more} more problems like these", where="etcd")]
        return tuple(found)


def where_in_etcd(entry: Entry) -> str:
    """The place of a key's value, for people (`Origin.source`)."""
    return f"etcd {entry.key.decode(errors='backslashreplace')} at revision {entry.revision}"


def encoded(what: Document | Instance) -> bytes:
    """The value that etcd holds for a document or an instance."""
    return document_to_json(what) if isinstance(what, Document) else write_instance(what)


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """The contents of an etcd as they are kept on disk."""

    cluster: int
    revision: int
    term: int
    saved: float
    """Wall clock, seconds since the epoch."""
    entries: tuple[tuple[bytes, int, bytes], ...]
    """Key, revision, value."""
