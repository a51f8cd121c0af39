"""`tollhouse policy publish --watch`: a folder, a bundle file or a bundle server is followed, and what is new there is published.

Of a server it is a client as OPA is one (openpolicyagent.org, "Bundles"): it sends the tag of what it has, and a server that understands
long polling holds the request until there is another bundle; others are asked again after `interval`.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import click

from mesh.backoff import Backoff
from pdp.bundle_fetch import FetchProblem
from tollhouse.bundle_source import BundleSource, access_of, fetched
from tollhouse.output import Complaint

LOOKED_AT: Final = 0.3
"""Seconds between two looks at files."""
LEAST: Final = 1.0
"""Seconds between two requests to a server that has nothing new."""
HELD: Final = 30
"""Seconds that a server may hold a request."""
FIRST: Final = 1.0
"""Seconds until the second try of what failed."""
MOST: Final = 30.0

Publish = Callable[[bytes | None], None]
"""Publishes what is there now: of a server, the bundle that it sent. Raises `Unusable` or `Complaint`."""


class Unusable(Exception):
    """What is there can't be published, and trying again won't help."""

    def __init__(self, complaint: Complaint) -> None:
        super().__init__(str(complaint))
        self.complaint = complaint


class Teller:
    """Says what is wrong once, and that it is over."""

    def __init__(self) -> None:
        self._said = ""

    def wrong(self, problem: Exception) -> None:
        """It is so now."""
        if str(problem) != self._said:
            self._said = str(problem)
            click.echo(f"{time.strftime('%H:%M:%S')} error: {problem}; what is in force stays, and it is tried again", err=True)

    def well(self) -> None:
        """Nothing is wrong."""
        if self._said:
            self._said = ""
            click.echo(f"{time.strftime('%H:%M:%S')} it works again", err=True)


def watch_files(source: Path, fingerprint: Callable[[], object], publish: Publish) -> None:
    """Publishes a folder or a file whenever `fingerprint` is another, until it is interrupted."""
    teller, backoff = Teller(), Backoff(FIRST, MOST)
    seen: object = None
    again_at: float | None = None
    _begin(str(source))
    while True:
        now = fingerprint()
        if now != seen or (again_at is not None and time.monotonic() >= again_at):
            if now != seen:
                backoff.reset()
            seen, again_at = now, None
            try:
                publish(None)
                teller.well()
            except Unusable as problem:
                problem.complaint.show()
                click.echo(f"{time.strftime('%H:%M:%S')} what is in force stays", err=True)
            except Complaint as problem:
                teller.wrong(problem)
                again_at = time.monotonic() + backoff.next()
            _flush()
        time.sleep(LOOKED_AT)


def watch_server(source: BundleSource, interval: float, publish: Publish) -> None:
    """Publishes each bundle that a server has, until it is interrupted."""
    teller, backoff = Teller(), Backoff(FIRST, MOST)
    etag, waits, known, owed = "", False, b"", b""
    _begin(source.where)
    while True:
        try:
            if not owed:
                asked = time.monotonic()
                answer = asyncio.run(fetched(source, access_of(source), etag=etag, wait=HELD if waits and etag else 0))
                waits = answer.long_poll
                digest = hashlib.sha256(answer.body).digest() if answer.body is not None else known
                if digest == known:
                    etag = answer.etag
                    teller.well()
                    if waits and etag:  # one that says that it holds requests, and does not, is not asked all the time
                        time.sleep(max(0.0, LEAST - (time.monotonic() - asked)))
                    else:
                        time.sleep(interval * random.uniform(0.8, 1.2))  # noqa: S311 -- spreads load
                    continue
                owed = answer.body or b""
            publish(owed)
            etag, known, owed = answer.etag, digest, b""
            teller.well()
            backoff.reset()
            _flush()
        except Unusable as problem:  # another key, or another bundle, may help
            owed = b""
            teller.wrong(problem)
            time.sleep(backoff.next())
        except (FetchProblem, Complaint) as problem:
            teller.wrong(problem)
            time.sleep(backoff.next())


def _begin(source: str) -> None:
    click.echo(f"following {source} (Ctrl-C ends it)", err=True)


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
