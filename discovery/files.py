"""Finding the files of a configuration directory, and reading one only when nobody is in the middle of writing it."""

from __future__ import annotations

import fcntl
import os
import signal
import stat
import time
from pathlib import Path
from typing import NamedTuple

from discovery import policy_files

MOST_FILES = 10_000
MOST_FILE_BYTES = 8 << 20
MOST_FOLDERS_DEEP = 32
RESOURCES = (".yaml", ".yml", ".json")
_F_SETSIG = 10
"""fcntl(2); the module has no name for it."""


class Stamp(NamedTuple):
    """What tells one version of a file from another without reading it."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int


class Busy(Exception):
    """A file is being written, or was replaced between being looked at and being read."""


class DirectoryProblem(Exception):
    """The directory as a whole can't be read."""


def stamp_of(status: os.stat_result) -> Stamp:
    """The stamp in a file's status."""
    return Stamp(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def wanted(parts: tuple[str, ...]) -> bool:
    """Whether a file counts, by its path relative to the directory. Hidden files and what editors leave behind don't."""
    name = parts[-1]
    if name.startswith((".", "#", "~")) or name.endswith("~"):
        return False
    return policy_files.belongs(parts) if parts[0] == policy_files.FOLDER and len(parts) > 1 else name.endswith(RESOURCES)


def scan(root: Path, folders: dict[str, tuple[int, int]] | None = None) -> dict[str, Stamp]:
    """All files that count, by path relative to `root` (with `/`), symbolic links followed. `folders` is filled with the device and inode
    of each folder that was looked into, by its path. Raises DirectoryProblem."""
    found: dict[str, Stamp] = {}
    folders = {} if folders is None else folders
    try:
        status = root.stat()
        identity = (status.st_dev, status.st_ino)
        folders[str(root)] = identity
        _scan(str(root), (), found, folders, {identity})
    except OSError as error:
        raise DirectoryProblem(f"{error.filename or root}: {error.strerror}") from error
    return found


def _scan(
    folder: str,
    parts: tuple[str, ...],
    found: dict[str, Stamp],
    folders: dict[str, tuple[int, int]],
    above: set[tuple[int, int]],
) -> None:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            try:
                status = entry.stat()
            except FileNotFoundError:  # gone since, or a link to nowhere
                continue
            here = (*parts, entry.name)
            if stat.S_ISDIR(status.st_mode):
                identity = (status.st_dev, status.st_ino)
                if identity not in above and len(here) < MOST_FOLDERS_DEEP:
                    folders[entry.path] = identity
                    try:
                        _scan(entry.path, here, found, folders, above | {identity})
                    except FileNotFoundError:
                        continue
            elif stat.S_ISREG(status.st_mode) and wanted(here):
                found["/".join(here)] = stamp_of(status)
                if len(found) > MOST_FILES:
                    raise DirectoryProblem(f"more than {MOST_FILES} files; name a directory that holds the configuration only")


def read(path: Path, stamp: Stamp, quiet_for: float) -> bytes:
    """A file's content. Raises Busy when it isn't the one of `stamp` any more, or may be half-written; OSError; ValueError: too large.

    A file that was renamed in after its last write is whole (its ctime is past its mtime). So is one that no process has open for
    writing, which a read lease tells (fcntl(2), F_SETLEASE) about files of our own user. Otherwise it must not have changed for
    `quiet_for` seconds, at least 0.1.
    """
    if stamp.size > MOST_FILE_BYTES:
        raise ValueError(f"it has {stamp.size} bytes; at most {MOST_FILE_BYTES} are taken")
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError as error:
        raise Busy from error
    with open(descriptor, "rb") as file:  # noqa: PTH123 -- a descriptor
        writers = _has_writers(descriptor)
        if writers or (writers is None and stamp.ctime_ns == stamp.mtime_ns and quiet_for < 0.1 and time.time() - stamp.mtime_ns / 1e9 < 1):
            raise Busy
        content = file.read(MOST_FILE_BYTES + 1)
        if stamp_of(os.fstat(descriptor)) != stamp:
            raise Busy
    return content


def _has_writers(descriptor: int) -> bool | None:
    """Whether a process has the file open for writing; None when we may not know."""
    try:
        fcntl.fcntl(descriptor, _F_SETSIG, signal.SIGURG)  # what a writer who comes right now makes the kernel send: ignored by default
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except BlockingIOError:
        return True
    except OSError:
        return None
    fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return False
