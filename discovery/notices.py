"""Word from the kernel (inotify(7)) that something below a directory has changed, so that the next look at it is not waited for.

A hint and no more: what has changed is found by looking, which goes on where no word comes from (network file systems, links swapped
elsewhere, more folders than may be watched).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable, Mapping

log = logging.getLogger("tollhouse.discovery")

MOST_FOLDERS = 1024
"""Folders that are watched; changes in others are found by looking."""

Identity = tuple[int, int]
"""Device and inode: a folder that was made anew is another one."""


class Notices:
    """Owns one inotify instance. Made, used and closed in one event loop."""

    def __init__(self, on_notice: Callable[[], None]) -> None:
        """`on_notice` is called for every batch of events. Raises OSError where there is no inotify, or no instance left."""
        from asyncinotify import Inotify  # it looks for the C library when it is imported

        self._inotify = Inotify()
        self._watched: dict[str, Identity] = {}
        self._full = False
        self._on_notice = on_notice
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._inotify.fd, self._read)

    def watch(self, folders: Mapping[str, Identity]) -> None:
        """Watches these folders, by path, from now on; those that are not among them have gone, and their watches with them."""
        from asyncinotify import Mask

        mask = Mask.CREATE | Mask.DELETE | Mask.MOVE | Mask.CLOSE_WRITE | Mask.MODIFY | Mask.ATTRIB | Mask.ONLYDIR
        self._watched = {path: identity for path, identity in self._watched.items() if folders.get(path) == identity}
        for path, identity in folders.items():
            if path in self._watched or self._full or len(self._watched) >= MOST_FOLDERS:
                continue
            try:
                self._inotify.add_watch(path, mask)
            except FileNotFoundError:
                continue
            except OSError as problem:
                self._full = True
                log.info("%s is not watched (%s): changes are found by looking", path, problem.strerror)
                continue
            self._watched[path] = identity

    def _read(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._inotify.fd, 1 << 16)
            self._on_notice()

    def close(self) -> None:
        """Watches no more."""
        self._loop.remove_reader(self._inotify.fd)
        self._inotify.close()
