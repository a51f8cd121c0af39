"""A real etcd, and everything that can happen to it while it is watched."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from aetcd import rpc
from discovery_world import Receiver, an_instance, body, client, key, until

from discovery.etcd import Delete, Etcd, EtcdDenied, EtcdUnavailable, Put, Unchanged
from discovery.etcd_source import EtcdSource
from discovery.instances import name_of, write_instance
from discovery.keys import config_key, instance_key
from identity.ca import Authority
from mesh.documents import Instance
from tests import servers

Story = Callable[[Etcd, EtcdSource, Receiver], Awaitable[None]]


@pytest.fixture(scope="module")
def shared() -> Iterator[servers.Server]:
    with servers.etcd() as etcd:
        yield etcd


@pytest.fixture
def server(shared: servers.Server) -> servers.Server:
    """An empty etcd that runs."""

    async def empty() -> None:
        etcd = client(shared.url)
        await etcd.call(lambda at: at.kv.DeleteRange, rpc.DeleteRangeRequest(key=b"\0", range_end=b"\0"), again=True)
        await etcd.close()

    asyncio.run(empty())
    return shared


def put(name: str = "cart", note: str = "1") -> Put:
    return Put(config_key(key(name)), json.dumps(body(name, note)).encode())


def put_instance(instance: Instance, lease: int = 0) -> Put:
    return Put(instance_key(name_of(instance)), write_instance(instance), lease)


def with_source(url: str, story: Story, *, state_file: Path | None = None, first: tuple[Put, ...] = ()) -> None:
    """Runs `story` with a client to write with and a started source that has a client of its own."""

    async def main() -> None:
        writer, reader = client(url), client(url, timeout=1.0)
        if first:
            await writer.commit(first)
        source, receiver = EtcdSource(reader, state_file=state_file, probe_every=0.1), Receiver()
        await source.start(receiver)
        try:
            await story(writer, source, receiver)
        finally:
            await source.stop()
            await reader.close()
            await writer.close()

    asyncio.run(main())


async def eventually(write: Callable[[], Awaitable[object]], seconds: float = 20) -> None:
    """Writes, as often as it takes while the server comes back."""
    end = time.monotonic() + seconds
    while True:
        try:
            await write()
        except EtcdUnavailable:
            if time.monotonic() > end:
                raise
            await asyncio.sleep(0.05)
        else:
            return


def test_first_state_and_changes(server: servers.Server) -> None:
    async def story(writer: Etcd, source: EtcdSource, receiver: Receiver) -> None:
        assert len(receiver.changes) == 1 and receiver.changes[0].replace
        assert receiver.notes() == {"a": "1"} and list(receiver.instances) == [("shop", "cart", "one")]
        assert source.status.connected and not source.status.stale
        document = receiver.documents[key("a")]
        assert document.version == str(document.origin.source.rpartition(" ")[2])
        began = time.monotonic()
        revision = await writer.commit([put("b"), put("a", "2"), Delete(instance_key(("shop", "cart", "one")))])
        await until("the change", lambda: len(receiver.changes) == 2)
        change = receiver.changes[1]
        assert {each.key.name for each in change.upserts} == {"a", "b"} and not change.replace
        assert source.status.revision == str(revision)
        await writer.commit([Delete(config_key(key("a")))])
        await until("the deletion", lambda: receiver.notes() == {"b": "1"})
        await until("contact with what was written", lambda: (source.status.last_contact or 0) > began)

    with_source(server.url, story, first=(put("a"), put_instance(an_instance())))


def test_contact_goes_on_while_nothing_changes(server: servers.Server) -> None:
    async def story(_writer: Etcd, source: EtcdSource, receiver: Receiver) -> None:
        for _ in range(3):
            contact = source.status.last_contact
            await until("another probe that was caught up with", lambda contact=contact: source.status.last_contact != contact, seconds=3.0)
        assert not source.status.stale
        assert len(receiver.changes) == 1

    with_source(server.url, story, first=(put("a"),))


def test_a_transaction_is_one_change(server: servers.Server) -> None:
    async def story(writer: Etcd, source: EtcdSource, receiver: Receiver) -> None:
        for round_ in range(20):
            await writer.commit([put(f"r{number}", str(round_)) for number in range(100)])
        await until("the last round", lambda: receiver.notes().get("r0") == "19")

    torn: list[set[str]] = []
    taken = Receiver.__call__

    def watching(self: Receiver, change: object) -> None:
        taken(self, change)  # type: ignore[arg-type]
        if len(set(self.notes().values())) > 1:
            torn.append(set(self.notes().values()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Receiver, "__call__", watching)
        with_source(server.url, story)
    assert not torn


def test_large_changes_arrive_in_fragments(server: servers.Server) -> None:
    """Some 30 MiB in revisions of 1.2 MiB, caught up with at once."""

    async def story(writer: Etcd, source: EtcdSource, receiver: Receiver) -> None:
        server.signal(signal.SIGSTOP)
        await until("it is missed", lambda: not source.status.connected)
        server.signal(signal.SIGCONT)
        for number in range(25):
            await eventually(lambda number=number: writer.commit([put(f"big{number}", "x" * 1_200_000)]))
        await until("all of it", lambda: len(receiver.documents) == 25, 30)

    with_source(server.url, story)


@pytest.mark.parametrize(
    ("value", "part"),
    [(b"{", "JSON"), (b"[1]", ""), (b"\xff", ""), (json.dumps(body("other")).encode(), "HTTPRoute shop/other"), (b"[" * 100_000, "")],
)  # fmt: skip
def test_bad_value_keeps_the_last_good_one(server: servers.Server, value: bytes, part: str) -> None:
    async def story(writer: Etcd, source: EtcdSource, receiver: Receiver) -> None:
        revision = await writer.commit([Put(config_key(key("a")), value)])
        await until("the problem", lambda: receiver.problems)
        (problem,) = receiver.problems
        assert problem.kept and problem.key == key("a") and part in problem.message
        assert "/shop/a" in problem.where and str(revision) in problem.where
        assert receiver.notes() == {"a": "1"}
        await writer.commit([put("a", "2")])
        await until("it is right again", lambda: receiver.notes() == {"a": "2"} and not receiver.problems)
        await writer.commit(
            [Put(b"/tollhouse/config/odd", b"{}"), Put(b"/tollhouse/services/shop/cart/x", b'{"address": "localhost", "ports": {}}')]
        )
        await until("the problems", lambda: len(receiver.problems) == 2)
        assert not receiver.instances

    with_source(server.url, story, first=(put("a"),))


def test_restart_loses_nothing(server: servers.Server) -> None:
    async def story(writer: Etcd, source: EtcdSource, receiver: Receiver) -> None:
        for round_ in range(3):
            server.kill()
            await until("it is missed", lambda: not source.status.connected)
            assert source.status.stale
            await asyncio.to_thread(server.start)
            await eventually(lambda round_=round_: writer.commit([put("a", f"n{round_}"), put(f"b{round_}")]))
            await until("what was written", lambda round_=round_: receiver.notes().get("a") == f"n{round_}")
            await until("contact", lambda: source.status.connected and not source.status.stale)
        assert set(receiver.notes()) == {"a", "b0", "b1", "b2"}
        assert not any(change.replace for change in receiver.changes[1:])

    with_source(server.url, story, first=(put("a"),))


def test_frozen(server: servers.Server) -> None:
    async def story(writer: Etcd, source: EtcdSource, receiver: Receiver) -> None:
        server.signal(signal.SIGSTOP)
        frozen = time.monotonic()
        await until("it is missed", lambda: not source.status.connected)
        assert source.status.last_contact is not None and source.status.last_contact <= frozen
        server.signal(signal.SIGCONT)
        await eventually(lambda: writer.commit([put("a", "2")]))
        await until("it goes on", lambda: receiver.notes() == {"a": "2"} and not source.status.stale)

    with_source(server.url, story, first=(put("a"),))


def test_compacted_while_away(server: servers.Server) -> None:
    """Deleted, changed and made while the source was cut off, and the history of it gone."""

    async def main() -> None:
        writer = client(server.url)
        await writer.commit([put("gone"), put("changed"), put("same")])
        through = await Proxy(server.port).start()
        reader = client(f"http://127.0.0.1:{through.port}", timeout=1.0)
        source, receiver = EtcdSource(reader, probe_every=0.1), Receiver()
        await source.start(receiver)
        same = receiver.documents[key("same")]
        through.cut()
        await until("it is missed", lambda: not source.status.connected)
        await writer.commit([Delete(config_key(key("gone"))), put("changed", "2"), put("new")])
        revision = (await writer.list(b"/tollhouse/")).revision
        await writer.call(lambda at: at.kv.Compact, rpc.CompactionRequest(revision=revision, physical=True), again=True)
        through.mend()
        await until("it lists again", lambda: receiver.notes() == {"changed": "2", "same": "1", "new": "1"})
        assert receiver.documents[key("same")] is same
        change = receiver.changes[-1]
        assert not change.replace and change.deletes == (key("gone"),) and len(change.upserts) == 2
        await writer.commit([put("new", "2")])
        await until("it watches again", lambda: receiver.notes()["new"] == "2")
        await source.stop()
        await through.stop()
        await reader.close()
        await writer.close()

    asyncio.run(main())


class Proxy:
    """A TCP proxy that can be cut."""

    def __init__(self, to: int) -> None:
        self.to = to
        self.port = servers.free_port()
        self.open = True
        self.writers: list[asyncio.StreamWriter] = []

    async def start(self) -> Proxy:
        self.server = await asyncio.start_server(self.serve, "127.0.0.1", self.port)
        return self

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not self.open:
            writer.close()
            return
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.to)
        self.writers += [writer, far_writer]
        await asyncio.gather(self.copy(reader, far_writer), self.copy(far_reader, writer))

    async def copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        writer.close()

    def cut(self) -> None:
        self.open = False
        for writer in self.writers:
            writer.close()
        self.writers.clear()

    def mend(self) -> None:
        self.open = True

    async def stop(self) -> None:
        self.cut()
        self.server.close()


def data_folder(server: servers.Server) -> Path:
    return Path(next(each.removeprefix("--data-dir=") for each in server.command if each.startswith("--data-dir=")))


def test_comes_back_empty(tmp_path: Path) -> None:
    """Its data is lost: what is in force stays until something is written again, also over a restart of the reader."""
    state = tmp_path / "state"
    with servers.etcd() as server:

        async def story(writer: Etcd, source: EtcdSource, receiver: Receiver) -> None:
            await writer.commit([put("a", str(number)) for number in range(1)])
            server.kill()
            shutil.rmtree(data_folder(server))
            await asyncio.to_thread(server.start)
            await until("it is noticed", lambda: "lost its data" in source.status.stale)
            assert set(receiver.notes()) == {"a", "b"}

        async def again(writer: Etcd, source: EtcdSource, receiver: Receiver) -> None:
            assert set(receiver.notes()) == {"a", "b"} and "lost its data" in source.status.stale
            await writer.commit([put("c")])
            await until("it is taken", lambda: set(receiver.notes()) == {"c"})
            await until("all is well", lambda: not source.status.stale)

        with_source(server.url, story, first=(put("a"), put("b")), state_file=state)
        with_source(server.url, again, state_file=state)


def test_restored_from_an_older_backup() -> None:
    """The revision goes back, and the history behind it is another one."""
    with servers.etcd() as server:
        backup = data_folder(server).with_suffix(".backup")

        async def story(writer: Etcd, source: EtcdSource, receiver: Receiver) -> None:
            server.stop()
            shutil.copytree(data_folder(server), backup)
            await asyncio.to_thread(server.start)
            for number in range(5):
                await eventually(lambda number=number: writer.commit([put("a", f"late{number}")]))
            await until("the late ones", lambda: receiver.notes() == {"a": "late4"})
            server.kill()
            shutil.rmtree(data_folder(server))
            backup.rename(data_folder(server))
            await asyncio.to_thread(server.start)
            await until("the old state", lambda: receiver.notes() == {"a": "1"})
            await eventually(lambda: writer.commit([put("b")]))
            await until("what comes then", lambda: set(receiver.notes()) == {"a", "b"})

        with_source(server.url, story, first=(put("a"),))


def test_state_on_disk_for_a_start_without_etcd(server: servers.Server, tmp_path: Path) -> None:
    state = tmp_path / "deep" / "state"

    async def story(writer: Etcd, source: EtcdSource, receiver: Receiver) -> None:
        await writer.commit([put("b")])
        await until("the change", lambda: set(receiver.notes()) == {"a", "b"})

    with_source(server.url, story, state_file=state, first=(put("a"), put_instance(an_instance())))
    assert state.stat().st_mode & 0o777 == 0o600

    async def without(writer: Etcd, source: EtcdSource, receiver: Receiver) -> None:
        assert set(receiver.notes()) == {"a", "b"} and list(receiver.instances) == [("shop", "cart", "one")]
        assert ", saved 20" in source.status.text
        assert receiver.changes[0].replace and source.status.stale and not source.status.connected and source.status.last_contact is None
        await asyncio.to_thread(server.start)
        await until("contact", lambda: source.status.connected and not source.status.stale)
        await writer.commit([put("a", "2")])
        await until("the change", lambda: receiver.notes()["a"] == "2")

    server.stop()
    try:
        with_source(server.url, without, state_file=state)
    finally:
        if server.process is None or server.process.poll() is not None:
            server.start()


@pytest.mark.parametrize("damage", ["cut", "flipped", "foreign", "exposed"])
def test_damaged_state_is_not_used(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    from discovery.contents import Snapshot
    from discovery.state_file import StateFileError, load, save

    path = tmp_path / "state"
    save(path, Snapshot(cluster=1, revision=2, term=3, saved=4.0, entries=((put().key, 2, put().value),)))
    assert load(path) is not None
    content = path.read_bytes()
    if damage == "cut":
        path.write_bytes(content[:-3])
    elif damage == "flipped":
        path.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
    elif damage == "foreign":
        path.write_bytes(b"something else")
    else:
        path.chmod(0o666)
    with pytest.raises(StateFileError, match="state"):
        load(path)


def test_user_and_password(tmp_path: Path) -> None:
    password = tmp_path / "password"
    password.write_text("secret\n")
    with servers.etcd("--auth-token-ttl=1") as server:
        named = server.url.replace("http://", "http://reader@") + f"?password-file={password}"
        root = server.url.replace("http://", "http://root@") + f"?password-file={password}"

        async def main() -> None:
            etcd = client(server.url)
            auth = etcd.endpoint().auth
            for user in ("root", "reader"):
                await auth.UserAdd(rpc.AuthUserAddRequest(name=user, password="secret"))
                await auth.RoleAdd(rpc.AuthRoleAddRequest(name=user))
                await auth.UserGrantRole(rpc.AuthUserGrantRoleRequest(user=user, role=user))
            perm = rpc.Permission(permType=rpc.Permission.READ, key=b"/tollhouse/", range_end=b"/tollhouse0")
            await auth.RoleGrantPermission(rpc.AuthRoleGrantPermissionRequest(name="reader", perm=perm))
            await auth.AuthEnable(rpc.AuthEnableRequest())
            with pytest.raises(EtcdDenied, match="wants a user"):
                await etcd.get(b"/tollhouse/x")
            await etcd.close()
            writer, reader = client(root), client(named, timeout=1.0)
            await writer.commit([put("a")])
            with pytest.raises(EtcdDenied):
                await reader.commit([put("b")])
            source, receiver = EtcdSource(reader, probe_every=1.5), Receiver()
            await source.start(receiver)
            assert receiver.notes() == {"a": "1"}
            for note in ("2", "3"):  # the token ends meanwhile: it has a second, less than from one probe to the next
                contact = source.status.last_contact
                await until("another probe", lambda contact=contact: source.status.last_contact != contact)
                await writer.commit([put("a", note)])
                await until("the change", lambda note=note: receiver.notes() == {"a": note})
            server.kill()
            await asyncio.to_thread(server.start)  # tokens are gone
            await eventually(lambda: writer.commit([put("a", "4")]))
            await until("after a restart", lambda: receiver.notes() == {"a": "4"})
            await source.stop()
            await reader.close()
            await writer.close()
            password.write_text("wrong\n")
            denied = client(named)
            source = EtcdSource(denied)
            await source.start(Receiver())
            assert "authentication failed" in source.status.stale
            await source.stop()
            await denied.close()

        asyncio.run(main())


def test_two_endpoints(server: servers.Server) -> None:
    async def main() -> None:
        writer = client(server.url)
        await writer.commit([put("a")])
        one, two = await Proxy(server.port).start(), await Proxy(server.port).start()
        reader = client(f"etcd://127.0.0.1:{servers.free_port()},127.0.0.1:{one.port},127.0.0.1:{two.port}", timeout=1.0)
        source, receiver = EtcdSource(reader, probe_every=0.1), Receiver()
        await source.start(receiver)
        assert receiver.notes() == {"a": "1"}, "the first endpoint is not there"
        for note, (away, back) in enumerate([(one, two), (two, one), (one, two)]):
            back.mend()
            away.cut()
            await writer.commit([put("a", f"n{note}")])
            await until("the change", lambda note=note: receiver.notes() == {"a": f"n{note}"})
        await source.stop()
        await reader.close()
        await writer.close()
        await one.stop()
        await two.stop()

    asyncio.run(main())


def test_tls(tmp_path: Path) -> None:
    authority = Authority.create("shop.example")
    mine = authority.issue("spiffe://shop.example/ns/mesh/sa/etcd", ip=["127.0.0.1"], dns=["localhost"])
    (tmp_path / "cert.pem").write_bytes(mine.chain)
    (tmp_path / "key.pem").write_bytes(mine.key)
    (tmp_path / "ca.pem").write_bytes(authority.bundle)
    files = [
        f"--cert-file={tmp_path}/cert.pem",
        f"--key-file={tmp_path}/key.pem",
        f"--trusted-ca-file={tmp_path}/ca.pem",
        "--client-cert-auth",
    ]
    with servers.etcd() as template:
        command, port = list(template.command), template.port
        template.stop()
        command = [each.replace("http://", "https://") if "client-urls" in each else each for each in command] + files
        with servers.running(servers.Server("etcd", port, command, f"https://127.0.0.1:{port}")) as server:
            url = f"etcds://127.0.0.1:{port}?ca={tmp_path}/ca.pem&cert={tmp_path}/cert.pem&key={tmp_path}/key.pem"

            async def story(writer: Etcd, source: EtcdSource, receiver: Receiver) -> None:
                await eventually(lambda: writer.commit([put("a")]))
                await until("the change", lambda: receiver.notes() == {"a": "1"})
                server.kill()
                await asyncio.to_thread(server.start)
                await eventually(lambda: writer.commit([put("a", "2")]))
                await until("the change", lambda: receiver.notes() == {"a": "2"})

            with_source(url, story)

            async def strangers() -> None:
                other = tmp_path / "other.pem"
                other.write_bytes(Authority.create("else.example").bundle)
                for wrong in (f"etcds://127.0.0.1:{port}?ca={other}", f"etcds://127.0.0.1:{port}?ca={tmp_path}/ca.pem"):
                    etcd = client(wrong, timeout=0.5)
                    with pytest.raises(EtcdUnavailable):
                        await etcd.get(b"/tollhouse/x")
                    await etcd.close()

            asyncio.run(strangers())


def test_conditions(server: servers.Server) -> None:
    async def main() -> None:
        etcd = client(server.url)
        first = await etcd.commit([put("a")], [Unchanged(put("a").key, 0)])
        assert first is not None
        assert await etcd.commit([put("a", "2")], [Unchanged(put("a").key, 0)]) is None
        assert await etcd.commit([put("a", "2")], [Unchanged(put("a").key, first)])
        assert await etcd.commit([put("a", "3"), put("b")], [Unchanged(put("a").key, first)]) is None
        assert await etcd.get(put("b").key) is None
        await etcd.close()

    asyncio.run(main())
