"""`EtcdStore`: resources in etcd. One `apply` is one transaction where it fits into one."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator, Mapping, Sequence

from discovery.audit import LOGS, MOST_SPEC, Audit, Change, Log, audited, author_of, change_of, puts_of, trim
from discovery.contents import where_in_etcd
from discovery.etcd import MOST_OPERATIONS, Delete, Entry, Etcd, EtcdError, EtcdUnavailable, Put, Unchanged
from discovery.keys import config_key, config_prefix, read_config_key
from discovery.store import ABSENT, Applied, StoreConflict, StoreError, StorePartly, check_once
from mesh.documents import Document, Key, Problem
from mesh.reading import document_from_json
from mesh.writing import document_to_json

MOST_REQUEST = 1_400_000
"""Bytes of keys and values in a transaction (etcd's `--max-request-bytes` is 1.5 MiB)."""
TRIES = 5
AT_ONCE = 32
"""Reads in flight."""


class EtcdStore:
    """A `Store` over one etcd. Owns its client."""

    def __init__(self, etcd: Etcd, audit: Audit | None = None) -> None:
        """`audit` is what changes of policy are written down with."""
        self._etcd = etcd
        self._audit = audit or Audit()
        self._written: set[Log] = set()
        """Audit logs that something was written to."""

    @property
    def where(self) -> str:
        """The store, for people."""
        return str(self._etcd.address)

    async def close(self) -> None:
        """Ends the connection."""
        await self._etcd.close()

    async def apply(self, documents: Sequence[Document], *, expect: Mapping[Key, str] | None = None) -> Applied:
        """See `Store.apply`. More than one transaction holds is written in order, and `Applied.atomic` is False then."""
        check_once(documents)
        try:
            puts = [Put(config_key(document.key), document_to_json(document)) for document in documents]
        except ValueError as error:
            raise StoreError(str(error)) from error
        for document, put in zip(documents, puts, strict=True):
            if len(put.key) + len(put.value) > MOST_REQUEST:
                raise StoreError(f"{document.key} has {len(put.value)} bytes; etcd takes {MOST_REQUEST} at once")
        verdicts: dict[Key, str] = {}
        batches = list(_batches(documents, puts))
        for number, batch in enumerate(batches):
            try:
                await self._apply(batch, expect or {}, verdicts)
            except (StoreError, EtcdError) as error:
                if number:
                    written = {document.key for each in batches[:number] for document, _ in each}
                    raise StorePartly(str(error), _applied({key: verdicts[key] for key in written}, 2)) from error
                raise error if isinstance(error, StoreError) else StoreError(str(error)) from error
        await self._trim()
        return _applied(verdicts, len(batches))

    async def _trim(self) -> None:
        """Keeps the audit logs bounded, after something was written there."""
        for log in self._written:
            with contextlib.suppress(EtcdError):  # the next change does it
                await trim(self._etcd, log=log)
        self._written.clear()

    def _noted(self, changes: list[Change]) -> list[Put]:
        """What writes `changes` into the audit logs."""
        if not changes:
            return []
        puts = puts_of(self._audit, changes, author_of(self._etcd.address))
        self._written.update(puts)
        return list(puts.values())

    async def _apply(self, batch: list[tuple[Document, Put]], expect: Mapping[Key, str], verdicts: dict[Key, str]) -> None:
        unknown: EtcdUnavailable | None = None
        for _ in range(TRIES):
            entries = await self._read([put.key for _, put in batch])
            operations: list[Put] = []
            conditions: list[Unchanged] = []
            conflicts: list[Key] = []
            changes: list[Change] = []
            for (document, put), entry in zip(batch, entries, strict=True):
                verdict = "created" if entry is None else "unchanged" if _same(document, entry) else "changed"
                verdicts.setdefault(document.key, verdict)
                if verdict == "unchanged":
                    continue
                if document.key in expect and expect[document.key] != _version(entry):
                    conflicts.append(document.key)
                operations.append(put)
                conditions.append(Unchanged(put.key, entry.revision if entry else 0))
                if audited(document.key):
                    changes.append(change_of(document.key, verdict, None if entry is None else _document(entry)[0], document))
            if conflicts:
                raise StoreConflict(conflicts)
            if not operations:
                return
            try:
                if await self._etcd.commit([*operations, *self._noted(changes)], conditions) is not None:
                    return
            except EtcdUnavailable as error:  # perhaps it was done: read again
                unknown = error
        if unknown is not None:
            raise unknown
        raise StoreConflict([document.key for document, _ in batch])

    async def get(self, key: Key) -> Document | None:
        """See `Store.get`."""
        try:
            entry = await self._etcd.get(config_key(key))
        except (EtcdError, ValueError) as error:
            raise StoreError(str(error)) from error
        if entry is None:
            return None
        document, problems = _document(entry)
        if document is None:
            raise StoreError(f"{key}: {problems[0].message if problems else 'it holds nothing'} ({where_in_etcd(entry)})")
        return document

    async def list(
        self, group: str | None = None, kind: str | None = None, namespace: str | None = None
    ) -> tuple[tuple[Document, ...], tuple[Problem, ...]]:
        """See `Store.list`."""
        try:
            listing = await self._etcd.list(config_prefix(group, kind, namespace))
        except (EtcdError, ValueError) as error:
            raise StoreError(str(error)) from error
        documents: list[Document] = []
        problems: list[Problem] = []
        for entry in listing.entries:
            key = read_config_key(entry.key)
            if key is not None and ((kind or key.kind) != key.kind or (namespace is not None and namespace != key.namespace)):
                continue
            document, wrong = _document(entry)
            problems += wrong
            if document is not None:
                documents.append(document)
        return tuple(sorted(documents, key=lambda document: document.key)), tuple(problems)

    async def delete(self, keys: Sequence[Key], *, expect: Mapping[Key, str] | None = None) -> tuple[Key, ...]:
        """See `Store.delete`. Up to 128 go in one transaction (126, and the entries of the audit logs, where there are any)."""
        expect = expect or {}
        gone: list[Key] = []
        keys = list(dict.fromkeys(keys))
        try:
            most = MOST_OPERATIONS - len(LOGS) * any(map(audited, keys))
            for start in range(0, len(keys), most):
                gone += await self._delete(keys[start : start + most], expect)
        except (EtcdError, ValueError) as error:
            raise StoreError(f"{error}; {len(gone)} resources before that are deleted" if gone else str(error)) from error
        await self._trim()
        return tuple(gone)

    async def _delete(self, keys: Sequence[Key], expect: Mapping[Key, str]) -> Sequence[Key]:
        there: dict[Key, None] = {}
        unknown: EtcdUnavailable | None = None
        for _ in range(TRIES):
            entries = dict(zip(keys, await self._read([config_key(key) for key in keys]), strict=True))
            there |= dict.fromkeys(key for key, entry in entries.items() if entry is not None)
            conflicts = [key for key, entry in entries.items() if entry is not None and key in expect and expect[key] != _version(entry)]
            if conflicts:
                raise StoreConflict(conflicts)
            present = [entry for entry in entries.values() if entry is not None]
            if not present:
                return list(there)
            try:
                gone = [change_of(key, "deleted", _document(each)[0], None) for key, each in entries.items() if each and audited(key)]
                noted = self._noted(gone)
                operations = [Delete(each.key) for each in present]
                if await self._etcd.commit([*operations, *noted], [Unchanged(each.key, each.revision) for each in present]):
                    return list(there)
            except EtcdUnavailable as error:
                unknown = error
        raise unknown or StoreConflict(keys)

    async def _read(self, keys: Sequence[bytes]) -> Sequence[Entry | None]:
        found: list[Entry | None] = []
        for start in range(0, len(keys), AT_ONCE):
            found += await asyncio.gather(*(self._etcd.get(key) for key in keys[start : start + AT_ONCE]))
        return found


def _document(entry: Entry) -> tuple[Document | None, tuple[Problem, ...]]:
    return document_from_json(entry.value, where_in_etcd(entry), str(entry.revision))


def _version(entry: Entry | None) -> str:
    return ABSENT if entry is None else str(entry.revision)


def _same(document: Document, entry: Entry) -> bool:
    known, _ = _document(entry)
    return known is not None and known.body == document.body


def _batches(documents: Sequence[Document], puts: Sequence[Put]) -> Iterator[list[tuple[Document, Put]]]:
    batch: list[tuple[Document, Put]] = []
    size = operations = 0
    for document, put in zip(documents, puts, strict=True):
        # Of what is audited, its specs before and after are in the entry.
        more = len(put.key) * 2 + len(put.value) + 64 + (2 * MOST_SPEC + 512 if audited(document.key) else 0)
        if batch and (operations + 1 + audited(document.key) > MOST_OPERATIONS or size + more > MOST_REQUEST):
            yield batch
            batch, size, operations = [], 0, 0
        batch.append((document, put))
        size += more
        # Entries of the audit log are one operation together; counting one for each is on the safe side.
        operations += 1 + audited(document.key)
    if batch:
        yield batch


def _applied(verdicts: Mapping[Key, str], batches: int) -> Applied:
    def those(verdict: str) -> tuple[Key, ...]:
        return tuple(key for key, each in verdicts.items() if each == verdict)

    return Applied(created=those("created"), changed=those("changed"), unchanged=those("unchanged"), atomic=batches <= 1)
