"""What `apply`, `get` and `delete` do to an etcd and to a directory: the same stories for both where they can be the same."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from aetcd import rpc
from discovery_world import body, client, key, yaml_of

from discovery.directory_store import MARK, DirectoryStore
from discovery.etcd import Etcd, EtcdUnavailable
from discovery.etcd_store import EtcdStore
from discovery.store import ABSENT, Store, StoreConflict, StoreError, StorePartly, open_store
from mesh.documents import Document
from mesh.reading import read_documents
from tests import servers

Open = Callable[[], Store]


@pytest.fixture(scope="module")
def server() -> Iterator[servers.Server]:
    with servers.etcd() as etcd:
        yield etcd


@pytest.fixture(params=["etcd", "directory"])
def opened(request: pytest.FixtureRequest, server: servers.Server, tmp_path: Path) -> Open:
    if request.param == "directory":
        return lambda: open_store(str(tmp_path / "mesh"))

    async def empty() -> None:
        etcd = client(server.url)
        await etcd.call(lambda at: at.kv.DeleteRange, rpc.DeleteRangeRequest(key=b"\0", range_end=b"\0"), again=True)
        await etcd.close()

    asyncio.run(empty())
    return lambda: open_store(server.url)


def documents(*pairs: tuple[str, str]) -> tuple[Document, ...]:
    found, problems = read_documents(yaml_of(*(body(name, note) for name, note in pairs)), "typed.yaml")
    assert not problems
    return found


def run(opened: Open, story: Callable[[Store], Awaitable[None]]) -> None:
    async def main() -> None:
        store = opened()
        try:
            await story(store)
        finally:
            await store.close()

    asyncio.run(main())


def test_apply_get_list_delete(opened: Open) -> None:
    async def story(store: Store) -> None:
        assert await store.get(key("a")) is None
        assert await store.list() == ((), ())
        first = await store.apply(documents(("a", "1"), ("b", "1")))
        assert first.created == (key("a"), key("b")) and not first.changed and not first.unchanged
        second = await store.apply(documents(("a", "1"), ("b", "2"), ("c", "1")))
        assert (second.created, second.changed, second.unchanged) == ((key("c"),), (key("b"),), (key("a"),))
        found = await store.get(key("b"))
        assert found is not None and found.body == body("b", "2")
        listed, problems = await store.list()
        assert [each.key.name for each in listed] == ["a", "b", "c"] and not problems
        assert (await store.list(kind="Gateway"))[0] == () and len(
            (await store.list("gateway.networking.k8s.io", "HTTPRoute", "shop"))[0]
        ) == 3
        assert (await store.list(namespace="other"))[0] == ()
        assert await store.delete([key("a"), key("never")]) == (key("a"),)
        assert await store.get(key("a")) is None

    run(opened, story)


def test_nothing_is_lost_between_two_writers(opened: Open) -> None:
    async def story(store: Store) -> None:
        await store.apply(documents(("a", "0")), expect={key("a"): ABSENT})
        with pytest.raises(StoreConflict):
            await store.apply(documents(("a", "other")), expect={key("a"): ABSENT})

        async def add(letter: str) -> None:
            while True:
                seen = await store.get(key("a"))
                assert seen is not None
                note = seen.body["metadata"]["annotations"]["note"] + letter
                try:
                    await store.apply(documents(("a", note)), expect={key("a"): seen.version})
                except StoreConflict:
                    await asyncio.sleep(0)
                else:
                    return

        letters = "abcdefgh"
        await asyncio.gather(*(add(letter) for letter in letters))
        final = await store.get(key("a"))
        assert final is not None and sorted(final.body["metadata"]["annotations"]["note"]) == sorted("0" + letters)
        with pytest.raises(StoreConflict, match="read it again"):
            await store.delete([key("a")], expect={key("a"): "1"})

    run(opened, story)


def test_all_or_nothing_where_a_version_is_old(opened: Open) -> None:
    async def story(store: Store) -> None:
        await store.apply(documents(("a", "1")))
        with pytest.raises(StoreConflict) as caught:
            await store.apply(documents(("b", "1"), ("a", "2")), expect={key("a"): "long ago"})
        assert caught.value.keys == (key("a"),)
        assert await store.get(key("b")) is None
        wanted = await store.apply(documents(("a", "1")), expect={key("a"): "long ago"})
        assert wanted.unchanged == (key("a"),), "what is as wanted already is no conflict"

    run(opened, story)


def test_twice_the_same(opened: Open) -> None:
    async def story(store: Store) -> None:
        with pytest.raises(StoreError, match="twice"):
            await store.apply(documents(("a", "1"), ("a", "2")))

    run(opened, story)


def test_more_than_a_transaction_holds(server: servers.Server) -> None:
    async def story(store: Store) -> None:
        many = documents(*((f"r{number}", "1") for number in range(300)))
        applied = await store.apply(many)
        assert len(applied.created) == 300 and not applied.atomic
        assert (await store.apply(many[:128])).atomic
        with pytest.raises(StoreConflict):
            await store.apply(documents(*((f"r{number}", "2") for number in range(128))), expect={key("r9"): "1"})
        late = documents(*((f"r{number}", "2") for number in range(200)))
        with pytest.raises(StorePartly, match="apply again") as caught:
            await store.apply(late, expect={key("r199"): "1"})
        assert len(caught.value.done.changed) == 128
        with pytest.raises(StoreError, match="bytes"):
            await store.apply(documents(("big", "x" * 1_500_000)))
        assert len(await store.delete([each.key for each in many])) == 300

    run(lambda: open_store(server.url), story)


def test_an_answer_that_got_lost(server: servers.Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it was written is not known: it is read again, and found done."""
    real = Etcd.commit
    lost = []

    async def losing(self: Etcd, *arguments: object) -> int | None:
        done = await real(self, *arguments)  # type: ignore[arg-type]
        if not lost:
            lost.append(done)
            raise EtcdUnavailable("no answer")
        return done

    async def story(store: Store) -> None:
        monkeypatch.setattr(Etcd, "commit", losing)
        applied = await store.apply(documents(("lost", "1")), expect={key("lost"): ABSENT})
        assert applied.created == (key("lost"),) and lost
        lost.clear()
        assert await store.delete([key("lost")]) == (key("lost"),) and lost

    run(lambda: EtcdStore(client(server.url)), story)


def test_etcd_that_is_not_there() -> None:
    async def story(store: Store) -> None:
        for attempt in (store.get(key()), store.list(), store.apply(documents(("a", "1"))), store.delete([key()])):
            with pytest.raises(StoreError, match="etcd 127"):
                await attempt

    run(lambda: EtcdStore(client(f"etcd://127.0.0.1:{servers.free_port()}", timeout=0.3)), story)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (yaml_of(body("a"), body("b")), "with others"),
        ("# mine\n" + yaml_of(body("a")), "comments"),
        (yaml_of(body("a")) + "---\nkind: [\n", "with others"),
    ],
)
def test_what_people_wrote_stays_theirs(tmp_path: Path, text: str, part: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)

    async def story(store: Store) -> None:
        with pytest.raises(StoreError, match=part) as caught:
            await store.apply(documents(("c", "1"), ("a", "2")))
        assert "mine.yaml" in str(caught.value)
        assert path.read_text() == text and not (tmp_path / "httproute-shop-c.yaml").exists()
        if part == "with others":
            with pytest.raises(StoreError, match=part):
                await store.delete([key("a")])

    run(lambda: DirectoryStore(tmp_path), story)


def test_files_of_a_directory(tmp_path: Path) -> None:
    (tmp_path / "plain.json").write_text(json.dumps(body("a")))
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "b.yaml").write_text(yaml_of(body("b")))
    (tmp_path / "httproute-shop-c.yaml").write_text("# somebody's\n")

    def paths() -> list[Path]:
        return list(tmp_path.iterdir())

    async def story(store: Store) -> None:
        await store.apply(documents(("a", "2"), ("b", "2"), ("c", "2")))
        assert json.loads((tmp_path / "plain.json").read_text()) == body("a", "2")
        assert (tmp_path / "deep" / "b.yaml").read_text().startswith(MARK)
        (made,) = (path for path in paths() if path.name.startswith("httproute-shop-c-"))
        assert (await store.apply(documents(("c", "3")))).changed == (key("c"),)
        assert "note: '3'" in made.read_text() or 'note: "3"' in made.read_text()
        assert {each.name for each in paths()} == {"plain.json", "deep", "httproute-shop-c.yaml", made.name, ".tollhouse.lock"}
        await store.delete([key("c")])
        assert not made.exists()

    run(lambda: DirectoryStore(tmp_path), story)


def test_directory_that_can_not_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    async def story(store: Store) -> None:
        with pytest.raises(StoreError, match="can't be written"):
            await store.apply(documents(("a", "1")))

    run(lambda: DirectoryStore(tmp_path / "file"), story)
