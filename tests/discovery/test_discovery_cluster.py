"""Three etcd members: one that was cut off from the others must not look alive, and any of them will do."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from discovery_world import Receiver, body, client, key, until

from discovery.etcd import Etcd, EtcdError, Put
from discovery.etcd_source import EtcdSource
from discovery.keys import config_key
from tests import install, servers


@pytest.fixture(scope="module")
def members() -> Iterator[list[servers.Server]]:
    folder = Path(tempfile.mkdtemp(prefix="tollhouse-etcd-cluster-"))
    ports = [(servers.free_port(), servers.free_port()) for _ in range(3)]
    cluster = ",".join(f"m{number}=http://127.0.0.1:{peer}" for number, (_, peer) in enumerate(ports))
    made = []
    for number, (port, peer) in enumerate(ports):
        command = [
            str(install.install("etcd")), f"--name=m{number}", f"--data-dir={folder}/{number}", f"--listen-client-urls=http://127.0.0.1:{port}",
            f"--advertise-client-urls=http://127.0.0.1:{port}", f"--listen-peer-urls=http://127.0.0.1:{peer}", "--unsafe-no-fsync",
            f"--initial-advertise-peer-urls=http://127.0.0.1:{peer}", f"--initial-cluster={cluster}", "--log-level=error",
        ]  # fmt: skip
        made.append(servers.Server(f"etcd-m{number}", port, command, f"http://127.0.0.1:{port}", lambda: True))
    with ExitStack() as stack:
        for member in made:
            stack.callback(member.close)
            member.start()
        for member in made:
            servers.wait_for("a leader", lambda member=member: servers.fetched(member.url + "/health"))
        yield made
    shutil.rmtree(folder, ignore_errors=True)


async def write(etcd: Etcd, note: str) -> None:
    """Writes until it is surely done."""
    end = time.monotonic() + 20
    while True:
        try:
            await etcd.commit([Put(config_key(key("a")), json.dumps(body("a", note)).encode())])
        except EtcdError:
            if time.monotonic() > end:
                raise
            await asyncio.sleep(0.05)
        else:
            return


def test_cut_off_from_the_majority(members: list[servers.Server]) -> None:
    """The member that is asked runs and answers on the watch's stream, but knows nothing of what the others agree on."""

    async def main() -> None:
        etcd = client(members[0].url, timeout=1.0)
        await write(etcd, "1")
        source, receiver = EtcdSource(etcd, probe_every=0.1), Receiver()
        await source.start(receiver)
        for other in members[1:]:
            other.signal(signal.SIGSTOP)
        stopped = time.monotonic()
        await until("it is noticed", lambda: source.status.stale)
        contact = source.status.last_contact
        assert contact is not None and contact <= stopped + 0.5, "a question on its way may still have been answered"
        assert receiver.notes() == {"a": "1"}
        for other in members[1:]:
            other.signal(signal.SIGCONT)
        await write(etcd, "2")
        await until("it goes on", lambda: receiver.notes() == {"a": "2"} and not source.status.stale)
        await source.stop()
        await etcd.close()

    asyncio.run(main())


def test_any_member_will_do(members: list[servers.Server]) -> None:
    """Each in turn is ended and comes back; nothing is lost and the resources are never taken for gone."""

    async def main() -> None:
        url = "etcd://" + ",".join(f"127.0.0.1:{member.port}" for member in members)
        reader, writer = client(url, timeout=1.0), client(url, timeout=1.0)
        await write(writer, "0")
        source, receiver = EtcdSource(reader, probe_every=0.1), Receiver()
        await source.start(receiver)
        for number, member in enumerate(members):
            member.kill()
            await write(writer, f"without {number}")
            await until("the change", lambda number=number: receiver.notes() == {"a": f"without {number}"})
            await asyncio.to_thread(member.start)
            await asyncio.to_thread(servers.wait_for, "it is back", lambda member=member: servers.fetched(member.url + "/health"))
        await until("all is well", lambda: not source.status.stale)
        assert not any(change.deletes or (change.replace and number) for number, change in enumerate(receiver.changes))
        await source.stop()
        await reader.close()
        await writer.close()

    asyncio.run(main())
