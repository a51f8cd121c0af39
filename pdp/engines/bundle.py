"""A revision as an OPA bundle (openpolicyagent.org, "Bundles"), and the small HTTP server from which OPA servers fetch it.

The bundle's own revision, in its manifest, is the digest of ours. OPA activates a bundle in one transaction, so an OPA either holds all of
a revision or nothing of it. Long polling (`polling.long_polling_timeout_seconds`) brings a new one within milliseconds:

    services:  {tollhouse: {url: "http://127.0.0.1:8282"}}
    bundles:   {tollhouse: {service: tollhouse, resource: bundle.tar.gz,
                            polling: {min_delay_seconds: 1, max_delay_seconds: 5, long_polling_timeout_seconds: 8}}}
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import io
import re
import tarfile
import zlib
from typing import Final

import msgspec
from aiohttp import web

from mesh.policy import Revision

RESOURCE: Final = "/bundle.tar.gz"
_TYPE: Final = "application/vnd.openpolicyagent.bundles"
"""Tells OPA that long polling is understood."""
_WAIT: Final = re.compile(r"(?:^|[;,\s])wait=(\d{1,4})(?:$|[;,\s])")
_LONGEST: Final = 300.0
_CLIENTS: Final = 1000


def bundle_of(revision: Revision) -> bytes:
    """The bundle with a revision's modules and data: a gzipped tar, the same bytes for the same revision."""
    files = {"/.manifest": msgspec.json.encode({"revision": revision.digest, "roots": [""]}), "/data.json": revision.data or b"{}"}
    for number, (name, source) in enumerate(sorted(revision.modules.items())):
        inner = "/".join(part for part in name.split("/") if part not in {"", ".", ".."})
        files[f"/modules/{number}/{inner}" + ("" if inner.endswith(".rego") else ".rego")] = source.encode()
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(content), 0o644
            tar.addfile(member, io.BytesIO(content))
    packer = zlib.compressobj(wbits=31)
    return packer.compress(out.getvalue()) + packer.flush()


class BundleServer:
    """Serves the revision that was published last. Owned by one event loop."""

    def __init__(self, token: str = "") -> None:
        """With `token`, clients must send it as a bearer token (OPA: `credentials.bearer.token`): policy data may be secret."""
        self._token = token
        self._digest = ""
        self._bundle = b""
        self._changed = asyncio.Event()
        self._clients = 0
        self._runner: web.AppRunner | None = None

    def publish(self, revision: Revision) -> None:
        """Serves `revision` from now on, and tells those who wait."""
        if revision.digest == self._digest:
            return
        self._bundle = bundle_of(revision)
        self._digest = revision.digest
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def start(self, host: str, port: int) -> int:
        """Listens, and returns the port. Raises OSError."""
        app = web.Application()
        app.router.add_get(RESOURCE, self._get)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.5)
        await self._runner.setup()
        site = web.TCPSite(self._runner, host, port)
        await site.start()
        bound = self._runner.addresses[0]
        return int(bound[1])

    async def stop(self) -> None:
        """Ends it; those who wait are told that nothing changed."""
        self._changed.set()
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _get(self, request: web.Request) -> web.Response:
        sent = request.headers.get("Authorization", "")
        if self._token and not hmac.compare_digest(sent.encode(), f"Bearer {self._token}".encode()):
            return web.Response(status=401, headers={"WWW-Authenticate": "Bearer"})
        known = request.headers.get("If-None-Match", "").strip('"')
        if known and known == self._digest and self._clients < _CLIENTS:
            self._clients += 1
            try:
                await self._wait(request.headers.get("Prefer", ""))
            finally:
                self._clients -= 1
        if not self._bundle:
            return web.Response(status=503, headers={"Retry-After": "1"}, text="no revision is active")
        headers = {"ETag": f'"{self._digest}"', "Content-Type": _TYPE}
        if known == self._digest:
            return web.Response(status=304, headers=headers)
        return web.Response(body=self._bundle, headers=headers)

    async def _wait(self, prefer: str) -> None:
        """Until another revision is published, or as long as the client likes."""
        asked = _WAIT.search(prefer)
        if asked is not None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), min(float(asked[1]), _LONGEST))
