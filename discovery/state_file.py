"""The last good contents of an etcd on disk, for a start while etcd is away.

One file: a line that says what it is and its SHA-256, then MessagePack. Written beside and renamed over, mode 0600 (there are
Secrets in it). A file that is damaged, of another version or readable by others is not used.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

import msgspec

from discovery.contents import Snapshot

MAGIC = b"tollhouse-state 1 sha256="
MOST_BYTES = 1 << 30
_HEAD = len(MAGIC) + 64 + 1
_DECODER = msgspec.msgpack.Decoder(Snapshot)


class StateFileError(Exception):
    """Why the file can't be used, in one sentence."""


def save(path: Path, snapshot: Snapshot) -> None:
    """Writes the file; what is there stays whole until the new one is. Blocks. Raises OSError."""
    body = msgspec.msgpack.encode(snapshot)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # made with mode 0600
    try:
        with open(descriptor, "wb") as file:  # noqa: PTH123 -- a descriptor
            file.write(MAGIC + hashlib.sha256(body).hexdigest().encode() + b"\n")
            file.write(body)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def load(path: Path) -> Snapshot | None:
    """What was saved; None when there is no file. Blocks. Raises StateFileError."""
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            if status.st_mode & 0o022 or status.st_uid not in {0, os.geteuid()}:
                raise StateFileError(f"{path} can be written by others and is not used; run: chmod 600 {path}")
            if status.st_size > MOST_BYTES:
                raise StateFileError(f"{path} has {status.st_size} bytes and is not used")
            content = file.read(MOST_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StateFileError(f"{path} can't be read: {error.strerror}") from error
    if not content.startswith(MAGIC):
        raise StateFileError(f"{path} was not written by this version and is not used")
    body = memoryview(content)[_HEAD:]
    if hashlib.sha256(body).hexdigest().encode() != content[len(MAGIC) : _HEAD - 1]:
        raise StateFileError(f"{path} is damaged and is not used")
    try:
        return _DECODER.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise StateFileError(f"{path} is damaged and is not used: {error}") from error
