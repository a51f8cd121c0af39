"""Bundles on disk, for a start while their server is away.

One file for each, named after the digest of its content, which whoever opens one works out again. All calls block.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Final

from pdp.bundle_files import MOST_PACKED

MOST: Final = 8
"""Bundles that are kept besides those that are wanted now."""
SUFFIX: Final = ".tar.gz"
_NAME: Final = re.compile(r"sha256-[0-9a-f]{64}\.tar\.gz")


class BundleCache:
    """A folder of ours alone."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def get(self, digest: str) -> bytes | None:
        """The bundle whose content has the digest, if it is here and nobody else can have written it."""
        try:
            with self._file(digest).open("rb") as file:
                status = os.fstat(file.fileno())
                if status.st_mode & 0o022 or status.st_uid not in {0, os.geteuid()}:
                    return None
                os.utime(file.fileno())  # used now: the last one to go
                return file.read(MOST_PACKED + 1)
        except OSError:
            return None

    def put(self, digest: str, packed: bytes, wanted: Collection[str] = ()) -> None:
        """Keeps a bundle, and lets go of those that were used longest ago. Raises OSError."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = self._file(digest)
        descriptor, name = tempfile.mkstemp(prefix=".bundle-", dir=self._folder)  # made with mode 0600
        try:
            with open(descriptor, "wb") as file:  # noqa: PTH123 -- a descriptor
                file.write(packed)
                file.flush()
                os.fsync(file.fileno())
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        self._trim({path.name, *(self._file(each).name for each in wanted)})

    def _trim(self, wanted: Collection[str]) -> None:
        others = [path for path in self._folder.iterdir() if _NAME.fullmatch(path.name) and path.name not in wanted]
        for path in sorted(others, key=lambda each: each.stat().st_mtime, reverse=True)[MOST:]:
            path.unlink(missing_ok=True)

    def _file(self, digest: str) -> Path:
        return self._folder / (digest.replace(":", "-", 1) + SUFFIX)
