"""Events uploaded in batches, as OPA uploads its decision logs: `POST URL/logs`, a JSON array, gzipped (openpolicyagent.org, "Decision Log
Service API").

A batch that is not taken is tried again after a jittered back-off, for as long as it takes; what is offered meanwhile waits in a queue
that is bounded, and what finds no room there is counted.
"""

from __future__ import annotations

import gzip
import http.client
import logging
import random
import ssl
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import msgspec

from telemetry.background import MOST_BYTES, Background

log = logging.getLogger("tollhouse.decisions")

UPLOAD_LIMIT: Final = 32768
"""Bytes of a compressed body at most (OPA's `upload_size_limit_bytes`)."""
EVERY: Final = 1.0
"""Seconds that events gather before they are uploaded."""
TIMEOUT: Final = 10.0
"""Seconds that the server may be silent."""
FIRST_RETRY: Final = 0.5
LAST_RETRY: Final = 60.0
"""Seconds between two tries, before the jitter."""
_ITEMS: Final = 100_000
_AT_ONCE: Final = 1000
_ANSWER: Final = 65536
_TOO_LARGE: Final = 413


class UploadOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Where to, and how."""

    url: str
    """`/logs` is put behind it."""
    token: str = ""
    """A file with the bearer token; read again for each connection."""
    ca: str = ""
    """A file with the CAs to trust; the system's without one."""
    upload_limit: int = UPLOAD_LIMIT
    buffer_limit: int = MOST_BYTES
    """Bytes of events that may wait."""


def check_url(url: str) -> None:
    """Raises ValueError unless `url` is one to upload to."""
    parts = urlsplit(url)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ValueError(f"{url!r} is not the URL of a server: write it as in https://logs.example/tollhouse")
    _ = parts.port  # raises ValueError itself
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ValueError(f"{parts.scheme}://{parts.hostname} may have no user, query or fragment: a token is given as a file")


class LogUpload(Background[bytes]):
    """Owns the connection besides the queue and the thread. Items are events as JSON."""

    def __init__(self, options: UploadOptions) -> None:
        """Raises ValueError for a bad URL, OSError for a file that can't be read."""
        check_url(options.url)
        super().__init__("decision upload", _ITEMS, len, options.buffer_limit, _AT_ONCE)
        parts = urlsplit(options.url)
        self._options = options
        self._host, self._port = parts.hostname or "", parts.port
        self._path = f"{parts.path.rstrip('/')}/logs"
        self._tls = ssl.create_default_context(cafile=options.ca or None) if parts.scheme == "https" else None
        self._headers()
        self._connection: http.client.HTTPConnection | None = None
        self._ratio = 4.0
        """How many times smaller compression makes a batch, as seen last."""
        self.uploads = 0
        """Batches that were taken."""
        self.retries = 0
        self.begin()

    def _work(self, batch: list[bytes]) -> None:
        while batch:
            room = self._options.upload_limit * self._ratio * 0.8
            size = count = 0
            while count < len(batch) and (not count or size + len(batch[count]) < room):
                size += len(batch[count])
                count += 1
            self._upload(batch[:count])
            batch = batch[count:]

    def _upload(self, events: list[bytes]) -> None:
        """Uploads a batch, in parts where it is too large. Returns when it is taken, lost and counted, or the process ends."""
        whole = b"[" + b",".join(events) + b"]"
        body = gzip.compress(whole, 5)
        self._ratio = max(1.0, len(whole) / len(body))
        status = _TOO_LARGE if len(body) > self._options.upload_limit else self._persist(body)
        if status == _TOO_LARGE and len(events) > 1:
            half = len(events) // 2
            self._upload(events[:half])
            self._upload(events[half:])
        elif status == _TOO_LARGE:
            self.failed += 1
            self._say(f"an event of {len(whole)} bytes ({len(body)} compressed) is too large to be uploaded")
        elif not status:
            self.failed += len(events)
        else:
            self.written += len(events)
            self.uploads += 1

    def _persist(self, body: bytes) -> int:
        """Tries until the batch is taken or too large, and returns that status; 0 when the process ended before."""
        wait = FIRST_RETRY
        while True:
            last = self._stop
            try:
                status = self._post(body)
                why = f"it answers {status}"
            except (OSError, http.client.HTTPException, ValueError) as problem:
                status, why = 0, str(problem) or type(problem).__name__
            if 200 <= status <= 299 or status == _TOO_LARGE:
                if self.problem:
                    log.info("decisions are uploaded to %s again", self._options.url)
                self.problem = ""
                return status
            self._drop_connection()
            if not self.problem:
                self._say(f"decisions can't be uploaded to {self._options.url}: {why}; they wait, and it is tried again")
            if last:
                return 0
            self.retries += 1
            self._closing.wait(wait * random.uniform(0.5, 1.0))  # noqa: S311 -- spreads load
            wait = min(wait * 2, LAST_RETRY)

    def _post(self, body: bytes) -> int:
        if self._connection is None:
            if self._tls is not None:
                self._connection = http.client.HTTPSConnection(self._host, self._port, timeout=TIMEOUT, context=self._tls)
            else:
                self._connection = http.client.HTTPConnection(self._host, self._port, timeout=TIMEOUT)
        self._connection.request("POST", self._path, body, self._headers())
        answer = self._connection.getresponse()
        answer.read(_ANSWER)
        if answer.will_close or not answer.isclosed():
            self._drop_connection()
        return answer.status

    def _headers(self) -> dict[str, str]:
        headers = {"content-type": "application/json", "content-encoding": "gzip", "user-agent": "tollhouse"}
        if self._options.token:
            headers["authorization"] = f"Bearer {Path(self._options.token).read_text().strip()}"
        return headers

    def _drop_connection(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _say(self, problem: str) -> None:
        self.problem = problem
        log.warning("%s", problem)

    def _gather(self) -> None:
        self._closing.wait(EVERY)

    def _ended(self) -> None:
        self._drop_connection()
