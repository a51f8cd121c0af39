"""The HTTP server from which OPA servers fetch the active revision as a bundle (openpolicyagent.org, "Bundle Service API").

The bundle's own revision, in its manifest, is the digest of ours. OPA activates a bundle in one transaction, so an OPA either holds all of
a revision or nothing of it. Long polling (`polling.long_polling_timeout_seconds`) brings a new one within milliseconds. With a key every
bundle is signed, and an OPA with `bundles.NAME.signing` takes no other.

    services:  {tollhouse: {url: "http://127.0.0.1:8282"}}
    bundles:   {tollhouse: {service: tollhouse, resource: bundle.tar.gz,
                            polling: {min_delay_seconds: 1, max_delay_seconds: 5, long_polling_timeout_seconds: 8}}}
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import re
import socket
import ssl
from collections.abc import Callable
from typing import Final

from aiohttp import web

from mesh.policy import Revision
from pdp.bundle_files import files_of, packed, signature
from pdp.bundle_keys import BundleKey
from pdp.publish import Checker

RESOURCE: Final = "/bundle.tar.gz"
_TYPE: Final = "application/vnd.openpolicyagent.bundles"
"""Tells OPA that long polling is understood."""
_WAIT: Final = re.compile(r"(?:^|[;,\s])wait=(\d{1,4})(?:$|[;,\s])")
_LONGEST: Final = 300.0
_CLIENTS: Final = 1000


class BundleServer:
    """Serves the revision that was published last. Owned by one event loop."""

    def __init__(self, token: str = "", *, checker: Checker | None = None, key: BundleKey | None = None) -> None:
        """With `token`, clients must send it as a bearer token (OPA: `credentials.bearer.token`): policy data may be secret. With `key`,
        `checker` signs each bundle."""
        self._token = token
        self._checker = checker
        self._key = key
        self._digest = ""
        self._revision: Revision | None = None
        self._tag = ""
        self._bundle = b""
        self._turn = asyncio.Lock()
        self._changed = asyncio.Event()
        self._clients = 0
        self._actions: list[Callable[[], object]] = []
        self._runner: web.AppRunner | None = None

    async def publish(self, revision: Revision) -> None:
        """Serves `revision` from now on, and tells those who wait. Raises `PolicyError` and `EngineUnavailable` when it can't be signed:
        then what was served before is."""
        async with self._turn:
            if revision.digest == self._digest:
                return
            await self._serve(revision)

    async def renew(self, token: str, key: BundleKey | None) -> None:
        """Asks for another token from now on, and signs with another key, also what is served already. Raises as `publish`."""
        self._token = token
        async with self._turn:
            before, self._key = self._key, key
            if key == before or self._revision is None:
                return
            try:
                await self._serve(self._revision)
            except BaseException:
                self._key = before
                raise

    async def _serve(self, revision: Revision) -> None:
        files = await asyncio.to_thread(files_of, revision)
        if self._key is not None and self._checker is not None:
            files = {".signatures.json": await signature(self._checker, files, self._key), **files}
        self._bundle = await asyncio.to_thread(packed, files)
        self._digest = revision.digest
        # Not the signature: one by ECDSA is another each time, and replicas of this server shall have one tag for one content.
        self._tag = f"{revision.digest}.{self._key.name}" if self._key is not None else revision.digest
        self._revision = revision
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def start(self, host: str, port: int, tls: ssl.SSLContext | None = None, sock: socket.socket | None = None) -> int:
        """Listens, at `sock` if it listens already, and returns the port. Raises OSError."""
        app = web.Application()
        app.router.add_get(RESOURCE, self._get)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.5)
        await self._runner.setup()
        runner = self._runner
        at = web.TCPSite(runner, host, port, ssl_context=tls) if sock is None else web.SockSite(runner, sock, ssl_context=tls)
        await at.start()
        bound = self._runner.addresses[0]
        return int(bound[1])

    def on_stop(self, action: Callable[[], object]) -> None:
        """Calls `action` when it is ended."""
        self._actions.append(action)

    async def stop(self) -> None:
        """Ends it; those who wait are told that nothing changed."""
        for action in self._actions:
            action()
        self._changed.set()
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _get(self, request: web.Request) -> web.Response:
        sent = request.headers.get("Authorization", "")
        if self._token and not hmac.compare_digest(sent.encode(), f"Bearer {self._token}".encode()):
            return web.Response(status=401, headers={"WWW-Authenticate": "Bearer"})
        known = request.headers.get("If-None-Match", "").strip('"')
        if known and known == self._tag and self._clients < _CLIENTS:
            self._clients += 1
            try:
                await self._wait(request.headers.get("Prefer", ""))
            finally:
                self._clients -= 1
        if not self._bundle:
            return web.Response(status=503, headers={"Retry-After": "1"}, text="no revision is active")
        headers = {"ETag": f'"{self._tag}"', "Content-Type": _TYPE}
        if known == self._tag:
            return web.Response(status=304, headers=headers)
        return web.Response(body=self._bundle, headers=headers)

    async def _wait(self, prefer: str) -> None:
        """Until another revision is published, or as long as the client likes."""
        asked = _WAIT.search(prefer)
        if asked is not None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), min(float(asked[1]), _LONGEST))
