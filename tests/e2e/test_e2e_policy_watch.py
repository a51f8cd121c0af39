"""`policy publish --watch` over real processes: a bundle server that is followed by long polling, and a folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from e2e_world import EXAMPLE, tollhouse

from tests import servers
from tests.servers import Process, free_port, wait_for

pytestmark = pytest.mark.e2e
DECISION = ("--decision", "shop.authz.decision")


def folder(path: Path, more: str = "") -> Path:
    """The example's policy, with something at its end."""
    path.mkdir(exist_ok=True)
    for file in (EXAMPLE / "policy").iterdir():
        shutil.copy(file, path / file.name)
    rego = path / "authz.rego"
    rego.write_text(rego.read_text() + more)
    return path


def published(config: str, path: Path) -> str:
    done = tollhouse("policy", "publish", str(path), "--config", config, "--activate", *DECISION)
    return done.stdout.split()[1].rstrip(":")


def active(config: str) -> str:
    listed = json.loads(tollhouse("policy", "list", "--config", config, "-o", "json").stdout)
    return next((str(each["name"]) for each in listed if each["active"]), "")


@contextmanager
def watching(source: str, config: str, *more: str) -> Iterator[Process]:
    words = ["policy", "publish", source, "--watch", "--activate", "--config", config, *DECISION, *more]
    process = servers.tollhouse(*words, ready=lambda: "following" in process.output(), name="watch")
    try:
        process.start()
        yield process
    finally:
        process.close()


def test_a_bundle_server_is_followed_through_its_outage(tmp_path: Path) -> None:
    port, grpc = free_port(), free_port()
    with servers.etcd() as there, servers.etcd() as here:
        first = published(there.url, folder(tmp_path / "policy"))
        words = ["pdp", "--config", there.url, "--listen", f"127.0.0.1:{grpc}", "--opa-bundles", f"127.0.0.1:{port}"]
        server = servers.tollhouse(*words, ready=lambda: servers.answers(grpc), name="pdp")
        try:
            server.start()
            with watching(f"http://127.0.0.1:{port}/bundle.tar.gz", here.url, "--interval", "1h") as watcher:
                wait_for("the first to be active", lambda: active(here.url) == first)
                second = published(there.url, folder(tmp_path / "policy", "\nmore := 1\n"))
                wait_for("the second, by long polling alone", lambda: active(here.url) == second)
                server.stop()
                wait_for("the outage to be told", lambda: "it is tried again" in watcher.output())
                third = published(there.url, folder(tmp_path / "policy", "\nmore := 2\n"))
                assert active(here.url) == second
                server.start()
                wait_for("the third", lambda: active(here.url) == third, 60)
                assert "it works again" in watcher.output()
                here.stop()
                fourth = published(there.url, folder(tmp_path / "policy", "\nmore := 3\n"))
                wait_for("etcd's outage to be told", lambda: watcher.output().count("it is tried again") > 1, 60)
                here.start()
                wait_for("the fourth", lambda: active(here.url) == fourth, 60)
                assert watcher.process is not None
                watcher.signal(2)
                assert watcher.process.wait(10) == 0
        finally:
            server.close()


def test_a_folder_is_followed_and_what_is_wrong_there_changes_nothing(tmp_path: Path) -> None:
    with servers.etcd() as etcd:
        source = folder(tmp_path / "policy")
        with watching(str(source), etcd.url) as watcher:
            wait_for("the first to be active", lambda: active(etcd.url))
            first = active(etcd.url)
            folder(source, "\nwrong := \n")
            wait_for("the error to be told", lambda: "authz.rego:" in watcher.output() and "stays" in watcher.output())
            assert active(etcd.url) == first
            folder(source, "\nright := 1\n")
            wait_for("the next to be active", lambda: active(etcd.url) != first)
    done = tollhouse("policy", "publish", "http://localhost/x", "--watch", "--by-reference", "--config", "etcd://localhost:1", check=False)
    assert done.returncode == 2
    assert "--by-reference" in done.stderr
