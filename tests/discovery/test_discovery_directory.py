"""Configuration from a directory: what is taken, when, and what stays in force when a file is wrong."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from discovery_world import Receiver, body, key, until, yaml_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from discovery.directory import DirectorySource
from discovery.files import DirectoryProblem
from discovery.tree import PATIENCE, Tree
from mesh.rereading import Rereader


def with_source(root: Path, story: Callable[[DirectorySource, Receiver], Awaitable[None]]) -> None:
    async def main() -> None:
        source, receiver = DirectorySource(root), Receiver()
        await source.start(receiver)
        try:
            await story(source, receiver)
        finally:
            await source.stop()

    asyncio.run(main())


def replace(path: Path, text: str) -> None:
    beside = path.with_name(f".{path.name}.new")
    beside.write_text(text)
    touch(beside)
    beside.replace(path)


def touch(path: Path, times: list[int] = [0]) -> None:  # noqa: B006 -- counts
    """A time of change of its own, whatever the clock of the file system can tell apart."""
    times[0] += 1
    os.utime(path, ns=(times[0] * 1_000_000, times[0] * 1_000_000))


class Looker:
    """A tree with a clock of its own: every look is `step` seconds after the one before."""

    def __init__(self, root: Path) -> None:
        self.tree = Tree(root)
        self.now = 0.0
        self.receiver = Receiver()

    def look(self, times: int = 1, step: float = 0.02) -> None:
        for _ in range(times):
            self.now += step
            change = self.tree.look(self.now)
            if change is not None:
                self.receiver(change)

    def settle(self) -> Receiver:
        self.look(3)
        self.look(2, PATIENCE)
        assert not self.tree.pending
        return self.receiver


def test_first_state_and_what_counts(tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "a.yaml").write_text(yaml_of(body("a"), body("b")))
    (tmp_path / "deep" / "er" / "c.json").write_text(json.dumps(body("c")))
    (tmp_path / "deep" / "d.yml").write_text(yaml_of(body("d")))
    for left_out in (".hidden.yaml", "e.yaml~", "#f.yaml#", "~g.yaml", "notes.txt", "h.yaml.bak"):
        (tmp_path / left_out).write_text(yaml_of(body("never")))
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "i.yaml").write_text(yaml_of(body("never")))
    (tmp_path / "loop").symlink_to(tmp_path)

    async def story(source: DirectorySource, receiver: Receiver) -> None:
        assert len(receiver.changes) == 1 and receiver.changes[0].replace
        assert set(receiver.notes()) == {"a", "b", "c", "d"}
        assert receiver.documents[key("c")].origin.source == "deep/er/c.json"
        assert source.status.connected and not source.status.stale and source.status.revision
        assert "4 resources in 3 files" in source.status.text

    with_source(tmp_path, story)


def test_a_change_is_in_force_soon(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    """The time is reported, not asserted: machines differ."""
    for number in range(100):
        (tmp_path / f"r{number}.yaml").write_text(yaml_of(body(f"r{number}")))
    took: list[float] = []

    async def story(source: DirectorySource, receiver: Receiver) -> None:
        for number in range(10):
            began = time.monotonic()
            replace(tmp_path / "r7.yaml", yaml_of(body("r7", f"n{number}")))
            await until("the change", lambda number=number: receiver.notes()["r7"] == f"n{number}")
            took.append(receiver.at - began)

    with_source(tmp_path, story)
    record_property("milliseconds, 100 files", [round(each * 1000) for each in sorted(took)])
    print("in force after ms:", [round(each * 1000) for each in sorted(took)])


def test_word_of_a_change_is_enough_to_look(tmp_path: Path) -> None:
    """Nothing is looked for by the clock here: each change is found because the kernel told of it."""

    async def main() -> None:
        source, receiver = DirectorySource(tmp_path, interval=3600), Receiver()
        await source.start(receiver)
        deep = tmp_path / "deep" / "er"
        try:
            for number, folder in enumerate([tmp_path, deep, deep]):
                folder.mkdir(parents=True, exist_ok=True)
                replace(folder / "a.yaml", yaml_of(body(f"a{number}")))
                await until("what was renamed in", lambda number=number: f"a{number}" in receiver.notes())
                (folder / "b.yaml").write_text(yaml_of(body(f"b{number}")))
                await until("what was written", lambda number=number: f"b{number}" in receiver.notes())
                (folder / "b.yaml").unlink()
                await until("what was taken away", lambda number=number: f"b{number}" not in receiver.notes())
                if folder == deep:  # the next one is another folder of the same name
                    shutil.rmtree(deep.parent)
                    await until("the folder's end", lambda number=number: f"a{number}" not in receiver.notes())
        finally:
            await source.stop()

    asyncio.run(main())


def test_a_long_first_look_does_not_put_the_next_ones_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    look, slow = Tree.look, 0.5

    def slow_when_it_reads(tree: Tree, now: float) -> Any:
        change = look(tree, now)
        if change is not None:
            time.sleep(slow)
        return change

    monkeypatch.setattr(Tree, "look", slow_when_it_reads)
    replace(tmp_path / "a.yaml", yaml_of(body("a")))

    async def story(source: DirectorySource, receiver: Receiver) -> None:
        assert source._cost < slow, "a tenth of the time is for looking; what was read once does not count"
        replace(tmp_path / "b.yaml", yaml_of(body("b")))
        await until("the change", lambda: "b" in receiver.notes())

    with_source(tmp_path, story)


def test_deleting_a_file_deletes_its_resources(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(yaml_of(body("a")))
    (tmp_path / "b.yaml").write_text(yaml_of(body("b")))

    async def story(source: DirectorySource, receiver: Receiver) -> None:
        before = source.status.revision
        (tmp_path / "a.yaml").unlink()
        await until("the deletion", lambda: set(receiver.notes()) == {"b"})
        assert receiver.changes[-1].deletes == (key("a"),)
        assert source.status.revision != before
        (tmp_path / "a.yaml").write_text(yaml_of(body("a")))
        await until("it is back", lambda: set(receiver.notes()) == {"a", "b"})
        assert source.status.revision == before, "equal states have equal names"

    with_source(tmp_path, story)


def test_a_broken_file_keeps_its_last_good_resources(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(yaml_of(body("a"), body("b")))
    looker = Looker(tmp_path)
    looker.settle()
    replace(tmp_path / "a.yaml", yaml_of(body("a", "2")) + '---\n{"kind": [')
    receiver = looker.settle()
    assert receiver.notes() == {"a": "2", "b": "1"}
    (problem,) = receiver.problems
    assert problem.kept and problem.severity == "error" and "a.yaml" in problem.where
    replace(tmp_path / "a.yaml", yaml_of(body("a", "3")))
    assert looker.settle().notes() == {"a": "3"}
    assert looker.receiver.problems == ()


@pytest.mark.parametrize("content", [b"\xff\xfe", b"kind: [", b"just: a mapping"])
def test_a_file_that_never_was_good(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.yaml").write_bytes(content)
    (tmp_path / "b.yaml").write_text(yaml_of(body("b")))
    receiver = Looker(tmp_path).settle()
    assert set(receiver.notes()) == {"b"}
    (problem,) = receiver.problems
    assert not problem.kept and problem.where.startswith("a.yaml")


def test_two_files_with_one_resource(tmp_path: Path) -> None:
    (tmp_path / "b.yaml").write_text(yaml_of(body("cart", "second")))
    looker = Looker(tmp_path)
    looker.settle()
    (tmp_path / "a.yaml").write_text(yaml_of(body("cart", "first")))
    receiver = looker.settle()
    assert receiver.notes() == {"cart": "first"}
    (problem,) = receiver.problems
    assert problem.key == key() and "a.yaml" in problem.message and problem.where.startswith("b.yaml")
    (tmp_path / "a.yaml").unlink()
    assert looker.settle().notes() == {"cart": "second"}
    assert receiver.problems == ()


def test_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("discovery.files.MOST_FILE_BYTES", 1000)
    (tmp_path / "a.yaml").write_text(yaml_of(body("a")))
    looker = Looker(tmp_path)
    looker.settle()
    replace(tmp_path / "a.yaml", yaml_of(body("a", "x" * 2000)))
    assert looker.settle().notes() == {"a": "1"}
    assert "at most 1000" in looker.receiver.problems[0].message and looker.receiver.problems[0].kept


def test_too_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("discovery.files.MOST_FILES", 3)
    for number in range(5):
        (tmp_path / f"{number}.yaml").write_text(yaml_of(body(f"r{number}")))
    with pytest.raises(DirectoryProblem, match="more than 3 files"):
        Looker(tmp_path).settle()


def test_directory_that_is_not_there_and_comes(tmp_path: Path) -> None:
    root = tmp_path / "later"

    async def story(source: DirectorySource, receiver: Receiver) -> None:
        assert receiver.changes[0].replace and "later" in source.status.stale and source.status.last_contact is None
        root.mkdir()
        (root / "a.yaml").write_text(yaml_of(body("a")))
        await until("it is read", lambda: set(receiver.notes()) == {"a"})
        await until("contact", lambda: not source.status.stale and source.status.last_contact is not None)
        root.rename(tmp_path / "away")
        await until("it is missed", lambda: source.status.stale)
        assert set(receiver.notes()) == {"a"}, "what was last read stays in force"

    with_source(root, story)


def test_reload_reads_again(tmp_path: Path) -> None:
    """A file changed in place with its times put back: only a reload can see it."""
    path = tmp_path / "a.yaml"
    path.write_text(yaml_of(body("a", "1")))
    looker = Looker(tmp_path)
    looker.settle()
    assert looker.receiver.notes() == {"a": "1"}
    looker.tree.forget()
    count = len(looker.receiver.changes)
    looker.settle()
    assert len(looker.receiver.changes) == count, "nothing was different"

    async def story(source: DirectorySource, receiver: Receiver) -> None:
        first = source.status.last_contact
        source.reload()
        await until("another look", lambda: source.status.last_contact != first)
        assert len(receiver.changes) == 1

    with_source(tmp_path, story)


def test_kubernetes_swaps_a_link(tmp_path: Path) -> None:
    def version(note: str) -> str:
        folder = tmp_path / f"..{note}"
        folder.mkdir()
        for name in ("a", "b", "c"):
            (folder / f"{name}.yaml").write_text(yaml_of(body(name, note)))
        return folder.name

    (tmp_path / "..data").symlink_to(version("v1"))
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.yaml").symlink_to(f"..data/{name}.yaml")

    async def story(source: DirectorySource, receiver: Receiver) -> None:
        assert set(receiver.notes().values()) == {"v1"}
        for note in ("v2", "v3"):
            (tmp_path / "..data_tmp").symlink_to(version(note))
            (tmp_path / "..data_tmp").replace(tmp_path / "..data")
            await until("the swap", lambda note=note: note in receiver.notes().values())
            assert set(receiver.notes().values()) == {note}, "all of it at once"

    with_source(tmp_path, story)


def test_half_written_is_never_taken(tmp_path: Path) -> None:
    """The first half is valid YAML: only that somebody still writes tells that it isn't all."""
    path = tmp_path / "a.yaml"
    path.write_text(yaml_of(body("a"), body("b")))
    looker = Looker(tmp_path)
    looker.settle()
    with path.open("w") as file:
        looker.look(20)
        file.write(yaml_of(body("a", "2")))
        file.flush()
        looker.look(20)
        assert looker.receiver.notes() == {"a": "1", "b": "1"} and looker.tree.pending
        file.write("---\n" + yaml_of(body("b", "2")))
    assert looker.settle().notes() == {"a": "2", "b": "2"}
    assert len(looker.receiver.changes) == 2


def test_one_restless_file_does_not_hold_up_the_others(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(yaml_of(body("a")))
    (tmp_path / "b.yaml").write_text(yaml_of(body("b")))
    looker = Looker(tmp_path)
    looker.settle()
    with (tmp_path / "a.yaml").open("a") as file:
        replace(tmp_path / "b.yaml", yaml_of(body("b", "2")))
        for _ in range(int(PATIENCE / 0.02) + 5):
            file.write("# more\n")
            file.flush()
            looker.look()
        assert looker.receiver.notes() == {"a": "1", "b": "2"}
        assert looker.tree.pending


VALID = st.builds(lambda name, note: (name, note), st.sampled_from("abc"), st.integers(0, 999).map(str))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["replace", "in place", "in pieces", "truncate", "delete", "recreate"]),
            st.sampled_from(["x.yaml", "y.yaml"]),
            st.lists(st.integers(0, 999), min_size=1, max_size=3),
        ),
        max_size=8,
    ),
    st.randoms(use_true_random=False),
)
def test_interleavings(tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, str, list[int]]], rng: Any) -> None:
    """Whatever is done to the files between two looks: every state that is delivered for a file is one that was whole at some time."""
    root = tmp_path_factory.mktemp("tree")
    looker = Looker(root)
    whole: dict[str, set[tuple[str, ...]]] = {"x.yaml": {()}, "y.yaml": {()}}

    def text(name: str, notes: list[int]) -> str:
        bodies = [body(f"{name[0]}{index}", str(note)) for index, note in enumerate(notes)]
        whole[name].add(tuple(str(note) for note in notes))
        return yaml_of(*bodies)

    def looks() -> None:
        for _ in range(rng.randrange(4)):
            looker.look()
            for name, states in whole.items():
                notes = looker.receiver.notes()
                assert tuple(notes[each] for each in sorted(notes) if each[0] == name[0]) in states

    for action, name, notes in steps:
        path = root / name
        if action == "replace":
            replace(path, text(name, notes))
        elif action == "in place":
            path.write_text(text(name, notes))
            touch(path)
        elif action == "in pieces":
            content = text(name, notes)
            cuts = sorted(rng.randrange(len(content)) for _ in range(2))
            with path.open("w") as file:
                for start, end in zip([0, *cuts], [*cuts, len(content)], strict=True):
                    file.write(content[start:end])
                    file.flush()
                    looks()
        elif action == "truncate":
            whole[name].add(())
            path.write_text("")
            touch(path)
        else:
            path.unlink(missing_ok=True)
            if action == "recreate":
                looks()
                path.write_text(text(name, notes))
                touch(path)
        looks()
    looker.settle()
    for name in whole:
        documents = Rereader(name).read((root / name).read_text())[0] if (root / name).exists() else ()
        assert {each.key for each in documents} == {each for each in looker.receiver.documents if each.name[0] == name[0]}
        for each in documents:
            assert looker.receiver.documents[each.key] == each


def test_policy_files(tmp_path: Path) -> None:
    policy = tmp_path / "policy"
    (policy / "shop").mkdir(parents=True)
    (policy / "shop" / "authz.rego").write_text("package shop.authz\n")
    (policy / "shop" / "authz_test.rego").write_text("package shop.authz_test\n")
    (policy / "shop" / "data.yaml").write_text("admins: [ann, bob]\nsince: 2026-01-01\nempty: {}\n")
    (policy / "data.json").write_text('{"shop": {"limit": 1}, "other": true}')
    (policy / "notes.yaml").write_text("not: read\n")
    (tmp_path / "a.yaml").write_text(yaml_of(body("a")))
    looker = Looker(tmp_path)
    receiver = looker.settle()
    assert set(receiver.notes()) == {"a"} and receiver.problems == ()
    assert receiver.policy.modules == {"policy/shop/authz.rego": "package shop.authz\n"}
    assert json.loads(receiver.policy.data) == {
        "shop": {"limit": 1, "admins": ["ann", "bob"], "since": "2026-01-01", "empty": {}},
        "other": True,
    }
    (tmp_path / "a.yaml").write_text(yaml_of(body("a", "2")))
    looker.settle()
    assert receiver.changes[-1].policy is None, "the policy has not changed"
    replace(policy / "shop" / "data.yaml", "limit: 2\n")
    looker.settle()
    (problem,) = receiver.problems
    assert "data.shop.limit" in problem.message and "policy/data.json" in problem.message and problem.where == "policy/shop/data.yaml"
    assert json.loads(receiver.policy.data)["shop"]["limit"] == 1
    replace(policy / "shop" / "data.yaml", "x: &a [1]\ny: [*a, *a]\n")
    looker.settle()
    assert any("aliases" in problem.message and problem.kept for problem in receiver.problems)
    replace(policy / "data.json", "[1]")
    looker.settle()
    assert json.loads(receiver.policy.data)["other"] is True, "the last good one"


def test_owner_may_not_be_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the right to take a lease, a file that was just written in place has to lie still for a while."""
    monkeypatch.setattr("discovery.files._has_writers", lambda descriptor: None)
    path = tmp_path / "a.yaml"
    looker = Looker(tmp_path)
    looker.settle()
    path.write_text(yaml_of(body("a")))
    looker.look(4, 0.02)
    assert looker.receiver.notes() == {}
    looker.look(4, 0.02)
    assert looker.receiver.notes() == {"a": "1"}
    replace(path, yaml_of(body("a", "2")))
    looker.look(2, 0.02)
    assert looker.receiver.notes() == {"a": "2"}, "renamed in: whole"
