"""Decision logs as files: lines of JSON, or uploads as a server got them (arrays of events), plain or gzipped."""

from __future__ import annotations

import gzip
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Final

import msgspec

from tollhouse.output import Complaint

STDIN: Final = "-"
_MAGIC: Final = b"\x1f\x8b"
_decode = msgspec.json.Decoder().decode


class Events:
    """The events of some files, which can be gone through more than once. `unreadable` counts the lines that are none, of the last time."""

    def __init__(self, files: list[tuple[str, Path]]) -> None:
        self._files = files
        self.unreadable = 0
        self.where = ""
        """The first line that could not be read."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.unreadable = 0
        for name, path in self._files:
            with _opened(path) as lines:
                try:
                    for number, line in enumerate(lines, 1):
                        yield from self._events(line, f"{name}:{number}")
                except (OSError, EOFError) as problem:
                    raise Complaint(f"{name} cannot be read: {problem}") from None

    def _events(self, line: bytes, where: str) -> Iterator[dict[str, Any]]:
        if not line.strip():
            return
        try:
            found = _decode(line)
        except (msgspec.DecodeError, RecursionError):
            found = None
        for event in found if isinstance(found, list) else [found]:
            if isinstance(event, dict):
                yield event
            else:
                self.unreadable += 1
                self.where = self.where or where


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    with path.open("rb") as file:
        magic = file.read(2)
        file.seek(0)
        if magic == _MAGIC:
            with gzip.open(file) as unpacked:
                yield unpacked  # type: ignore[misc]
        else:
            yield file


@contextmanager
def decision_files(names: tuple[str, ...]) -> Iterator[Events]:
    """The events in files; `-` is standard input. Raises `Complaint`."""
    with tempfile.TemporaryDirectory(prefix="tollhouse-log-") as folder:
        files = []
        for name in names:
            path = Path(name)
            if name == STDIN:
                path = Path(folder) / "stdin"
                with path.open("wb") as copy:
                    shutil.copyfileobj(sys.stdin.buffer, copy)
            elif not path.is_file():
                raise Complaint(f"{name} is not a file: name a decision log (--decision-log of a gateway), or - for standard input", 2)
            files.append((name, path))
        yield Events(files)
