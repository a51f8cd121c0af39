"""Where an identity comes from: a directory with cert.pem, key.pem and ca.pem, or memory.

A directory is watched by its files' inodes, sizes and times, so that an atomic rename, a rewrite and a swapped symbolic link are
all seen. What is new is taken only when it is whole and right; until then the last good identity stays, and `problem` says why.
"""

from __future__ import annotations

import asyncio
import math
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from identity.problems import IdentityError
from identity.svid import Identity, identity_from_pem

CERT, KEY, CA = "cert.pem", "key.pem", "ca.pem"
MAX_BYTES = 1 << 20
"""Of one file: nobody's chain or bundle is longer, and a wrong path might be."""

NOBODY = Identity(spiffe_id="", chain=b"", key=b"", bundle=b"", not_before=0.0, not_after=math.inf)
MISSING = "this gateway has no identity of its own; start it with --identity DIR"

Clock = Callable[[], float]


class IdentitySource(Protocol):
    """What TLS contexts are made from."""

    @property
    def current(self) -> Identity:
        """The identity to serve. Look at `problem` before serving it: it may have expired."""
        ...

    @property
    def problem(self) -> str:
        """Why `current` is not as it should be, in one sentence; empty when all is well."""
        ...

    def on_change(self, callback: Callable[[Identity], None]) -> Callable[[], None]:
        """Calls `callback` with each new identity; call what is returned to stop that."""
        ...


class StaticIdentity:
    """An identity in memory (`tollhouse up`, tests); `replace` stands for a renewal."""

    __slots__ = ("_callbacks", "_clock", "_current", "_problem")

    def __init__(self, identity: Identity, clock: Clock = time.time) -> None:
        self._current = identity
        self._clock = clock
        self._callbacks: list[Callable[[Identity], None]] = []
        self._problem = ""

    @property
    def current(self) -> Identity:
        """The identity to serve."""
        return self._current

    @property
    def problem(self) -> str:
        """Says so when the identity has expired, or could not be taken up."""
        return "; ".join(part for part in (expiry_problem(self._current, self._clock()), self._problem) if part)

    def on_change(self, callback: Callable[[Identity], None]) -> Callable[[], None]:
        """As `IdentitySource.on_change`."""
        return _subscribe(self._callbacks, callback)

    def replace(self, identity: Identity) -> None:
        """Serves `identity` from now on and tells those who asked to know."""
        self._current = identity
        self._problem = _tell(self._callbacks, identity)


class NoIdentity:
    """The identity of a gateway that was given none: it serves what needs none, and whatever needs one says so."""

    __slots__ = ()

    @property
    def current(self) -> Identity:
        """An identity that names nobody, with no key and no CA."""
        return NOBODY

    @property
    def problem(self) -> str:
        """None: it is as the author wanted."""
        return ""

    def on_change(self, callback: Callable[[Identity], None]) -> Callable[[], None]:
        """As `IdentitySource.on_change`; nothing ever changes."""
        return lambda: None


class IdentityFiles:
    """The identity in a directory. Owns the last good one; everything else sees it through `current`."""

    __slots__ = ("_callbacks", "_clock", "_current", "_group_readable", "_problem", "_seen", "directory")

    def __init__(self, directory: str | Path, clock: Clock = time.time, *, group_readable: bool = False) -> None:
        """Loads the directory. Raises `IdentityError` when there is nothing in it that can be served.

        `group_readable` allows a key with mode 0640 or 0440, as Kubernetes mounts secrets for a group.
        """
        self.directory = Path(directory)
        self._clock = clock
        self._group_readable = group_readable
        self._callbacks: list[Callable[[Identity], None]] = []
        self._problem = ""
        self._seen = self._signature()
        self._current = self._load()

    @property
    def current(self) -> Identity:
        """The last good identity."""
        return self._current

    @property
    def problem(self) -> str:
        """Why the files are not in force, or that what is served has expired; empty when all is well."""
        expired = expiry_problem(self._current, self._clock())
        return "; ".join(part for part in (expired, self._problem) if part)

    def on_change(self, callback: Callable[[Identity], None]) -> Callable[[], None]:
        """As `IdentitySource.on_change`."""
        return _subscribe(self._callbacks, callback)

    def reload(self) -> bool:
        """Reads the files again. True when there is a new identity; False when it is the same, or bad (see `problem`)."""
        self._seen = self._signature()
        try:
            found = self._load()
        except IdentityError as error:
            self._problem = f"the last good identity stays in force: {error}"
            return False
        self._problem = ""
        if found == self._current:
            return False
        self._current = found
        self._problem = _tell(self._callbacks, found)
        return True

    def poll(self) -> bool:
        """Reloads if a file has changed since it was last read; returns as `reload`."""
        return self._signature() != self._seen and self.reload()

    def watch(self, loop: asyncio.AbstractEventLoop, interval: float = 1.0) -> Callable[[], None]:
        """Polls each `interval` seconds on `loop` until what is returned is called."""
        handle: asyncio.TimerHandle

        def tick() -> None:
            nonlocal handle
            handle = loop.call_later(interval, tick)
            self.poll()

        def stop() -> None:
            handle.cancel()

        handle = loop.call_later(interval, tick)
        return stop

    def _signature(self) -> tuple[tuple[int, int, int, int, int] | None, ...]:
        return tuple(_stat(self.directory / name) for name in (CERT, KEY, CA))

    def _load(self) -> Identity:
        key = self.directory / KEY
        chain = _read(self.directory / CERT)
        self._check_mode(key)
        return identity_from_pem(chain, _read(key), _read(self.directory / CA), now=self._clock(), where=str(self.directory))

    def _check_mode(self, key: Path) -> None:
        try:
            mode = stat.S_IMODE(key.stat().st_mode)
        except OSError as error:
            raise IdentityError("unreadable", _unreadable(key, error)) from None
        if mode & (0o037 if self._group_readable else 0o077):
            raise IdentityError("key_exposed", f"{key} can be read by others (mode {mode:04o}); run: chmod 600 {key}")


def expiry_problem(identity: Identity, now: float) -> str:
    """One sentence when `identity` may not be served at `now` (wall clock, seconds); else empty."""
    if not identity.chain:
        return MISSING
    if identity.expired(now):
        return f"the certificate of {identity.spiffe_id} expired {now - identity.not_after:.0f} s ago; issue a new one"
    return ""


def _subscribe(callbacks: list[Callable[[Identity], None]], callback: Callable[[Identity], None]) -> Callable[[], None]:
    callbacks.append(callback)

    def stop() -> None:
        if callback in callbacks:
            callbacks.remove(callback)

    return stop


def _tell(callbacks: list[Callable[[Identity], None]], identity: Identity) -> str:
    """Tells every subscriber, also when one of them fails; returns what went wrong."""
    problems = []
    for callback in tuple(callbacks):
        try:
            callback(identity)
        except Exception as error:  # one listener that cannot take the identity must not keep it from the others
            problems.append(f"{identity!r} could not be taken up: {error}")
    return "; ".join(problems)


def _stat(path: Path) -> tuple[int, int, int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    # ctime and mode: a key whose permissions were put right is worth another look.
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise IdentityError("unreadable", _unreadable(path, error)) from None
    if len(data) > MAX_BYTES:
        raise IdentityError("bad_pem", f"{path} is longer than {MAX_BYTES} bytes; PEM is expected")
    return data


def _unreadable(path: Path, error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return f"{path} is not there; run `tollhouse ca issue` to make it, or name another directory"
    return f"{path} cannot be read: {error.strerror or error}"
