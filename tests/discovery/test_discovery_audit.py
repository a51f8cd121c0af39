"""The audit log: written with its change, or not at all."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
from aetcd import rpc
from discovery_world import body, client, yaml_of

from discovery.audit import MOST, Audit, Change, Unnoted, before_of, history, trim, unnoted_among
from discovery.audit import Entry as Noted
from discovery.etcd import Entry as Stored
from discovery.etcd import Etcd
from discovery.etcd_store import EtcdStore
from discovery.store import StoreConflict
from mesh.documents import Document, Key
from mesh.policies import active_policy_body
from mesh.reading import document_of, read_documents
from tests import servers


@pytest.fixture(scope="module")
def server() -> Iterator[servers.Server]:
    with servers.etcd() as etcd:
        yield etcd


@pytest.fixture
def run(server: servers.Server) -> Callable[[Callable[[Etcd], Awaitable[None]]], None]:
    def run(story: Callable[[Etcd], Awaitable[None]]) -> None:
        async def main() -> None:
            etcd = client(server.url)
            await etcd.call(lambda at: at.kv.DeleteRange, rpc.DeleteRangeRequest(key=b"\0", range_end=b"\0"), again=True)
            try:
                await story(etcd)
            finally:
                await etcd.close()

        asyncio.run(main())

    return run


def active(name: str, shadow: str = "") -> Document:
    return document_of(active_policy_body(name, shadow), "test")


def routes(count: int) -> tuple[Document, ...]:
    return read_documents(yaml_of(*(body(f"r{number}", "x") for number in range(count))), "typed.yaml")[0]


def test_a_change_is_written_down_with_who_and_why(run: Any) -> None:
    async def story(etcd: Etcd) -> None:
        await EtcdStore(etcd, Audit(action="activate", reason="first")).apply([active("sha256-1")])
        await EtcdStore(etcd, Audit(action="rollback", reason="x" * 5000)).apply([active("sha256-2", "sha256-3")])
        newest, oldest = await history(etcd)
        assert (oldest.action, oldest.reason) == ("activate", "first")
        assert "@" in oldest.who
        assert oldest.active == Change(kind="ActivePolicy", name="active", verb="created", after={"revision": "sha256-1"})
        assert newest.active is not None
        assert newest.active.before == {"revision": "sha256-1"}
        assert newest.active.after == {"revision": "sha256-2", "shadow": "sha256-3"}
        assert len(newest.reason) == 1000
        assert newest.time >= oldest.time

    run(story)


def test_what_changes_nothing_and_what_is_no_policy_is_not_written_down(run: Any) -> None:
    async def story(etcd: Etcd) -> None:
        store = EtcdStore(etcd)
        await store.apply([active("sha256-1")])
        await store.apply([active("sha256-1"), *routes(3)])
        assert len(await history(etcd)) == 1

    run(story)


def test_a_change_that_is_refused_is_not_written_down(run: Any) -> None:
    async def story(etcd: Etcd) -> None:
        store = EtcdStore(etcd)
        await store.apply([active("sha256-1")])
        with pytest.raises(StoreConflict):
            await store.apply([active("sha256-2")], expect={active("x").key: "1"})
        assert len(await history(etcd)) == 1

    run(story)


def quota(kind: str, name: str, spec: dict[str, Any]) -> Document:
    return document_of(
        {"apiVersion": "tollhouse.dev/v1", "kind": kind, "metadata": {"namespace": "shop", "name": name}, "spec": spec}, "test"
    )


def test_quota_has_a_log_of_its_own(run: Any) -> None:
    async def story(etcd: Etcd) -> None:
        store = EtcdStore(etcd, Audit(action="set", reason="too much"))
        one = {"policy": "orders", "limit": "a", "changes": [{"lift": True}]}
        limits = {"limits": [{"name": "a", "tokens": 1}]}
        await store.apply([active("sha256-1"), quota("QuotaPolicy", "orders", limits), quota("QuotaChange", "orders.a", one)])
        assert [[change.kind for change in entry.changes] for entry in await history(etcd)] == [["ActivePolicy"]]
        (entry,) = await history(etcd, "quota")
        assert [(each.kind, each.name, each.after) for each in entry.changes] == [
            ("QuotaPolicy", "orders", limits),
            ("QuotaChange", "orders.a", one),
        ]
        large = {"limits": [{"name": "a", "tokens": 1, "overrides": [{"values": [f"{at:0250}"], "tokens": 2} for at in range(300)]}]}
        await store.apply([quota("QuotaPolicy", "orders", large)])
        assert (await history(etcd, "quota"))[0].changes == (
            Change(kind="QuotaPolicy", namespace="shop", name="orders", verb="changed", before=limits),
        )
        await trim(etcd, 0, "quota")
        assert (len(await history(etcd)), len(await history(etcd, "quota"))) == (1, 0)
        assert len(await store.delete([quota("QuotaPolicy", "orders", {}).key, active("x").key])) == 2
        assert (len(await history(etcd)), len(await history(etcd, "quota"))) == (2, 1)

    run(story)


def test_deletions_are_written_down_too(run: Any) -> None:
    async def story(etcd: Etcd) -> None:
        store = EtcdStore(etcd, Audit(action="delete"))
        await store.apply([active("sha256-1")])
        await store.delete([active("x").key])
        newest = (await history(etcd))[0]
        assert newest.active == Change(kind="ActivePolicy", name="active", verb="deleted", before={"revision": "sha256-1"})

    run(story)


def test_a_full_transaction_has_room_for_its_entry(run: Any) -> None:
    async def story(etcd: Etcd) -> None:
        store = EtcdStore(etcd)
        many = routes(127)
        assert not (await store.apply([*many, active("sha256-1")])).atomic
        assert (await store.apply([active("sha256-2"), *routes(126)])).atomic
        assert len(await history(etcd)) == 2
        assert len(await store.delete([*(document.key for document in many), active("x").key])) == 128
        assert len(await history(etcd)) == 3

    run(story)


def test_the_log_is_bounded_and_the_oldest_go(run: Any) -> None:
    async def story(etcd: Etcd) -> None:
        store = EtcdStore(etcd)
        for number in range(8):
            await store.apply([active(f"sha256-{number}")])
        await trim(etcd, 3)
        found = [entry.active.after for entry in await history(etcd) if entry.active is not None]
        assert found == [{"revision": f"sha256-{number}"} for number in (7, 6, 5)]

    run(story)


def entry(before: str, after: str) -> Noted:
    specs = [{"revision": name} if name else None for name in (before, after)]
    change = Change(kind="ActivePolicy", name="active", verb="changed", before=specs[0], after=specs[1])
    return Noted(time=0, action="activate", who="ada", changes=(change,))


PUBLISHED = Noted(time=0, action="publish", who="ada", changes=(Change(kind="PolicyRevision", name="c", verb="created"),))


@pytest.mark.parametrize(
    ("entries", "current", "before"),
    [
        ([], "a", ""),
        ([entry("", "a")], "a", ""),
        ([entry("a", "b"), entry("", "a")], "b", "a"),
        ([PUBLISHED, entry("a", "b"), entry("", "a")], "b", "a"),
        ([entry("b", "a"), entry("a", "b"), entry("", "a")], "a", "b"),
        ([entry("a", "a"), entry("b", "a")], "a", "b"),
        ([entry("a", "b")], "c", "b"),
        ([entry("a", "")], "b", "a"),
    ],
)
def test_the_revision_before(entries: list[Noted], current: str, before: str) -> None:
    assert before_of(entries, current) == before


def test_what_is_older_than_the_log_is_not_judged() -> None:
    def noted(number: int) -> Stored:
        return Stored(b"/tollhouse/audit/policy/%020d-0" % number, b"{}", number)

    name = ("AccessPolicy", "edge", "one")
    keys = {name: Key("tollhouse.dev", *name)}
    full = [noted(number) for number in range(10, 10 + MOST)]
    for stored, revision, found in (
        (full[:5], 10, False),
        (full[:5], 3, True),
        (full[:5], 99, True),
        (full, 3, False),
        (full, 10 + MOST, True),
    ):
        seen = unnoted_among(stored, {name: Stored(b"", b"", revision)}, keys)
        assert seen == ((Unnoted(keys[name], revision),) if found else ()), (len(stored), revision)
