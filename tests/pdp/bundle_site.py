"""A real HTTP server with bundles on it; what it answers at each path is the test's to say."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from typing import Any

from aiohttp import web


class Site:
    """Answers with what is in `pages` (bytes, or a response), and remembers what it was asked."""

    def __init__(self, tls: ssl.SSLContext | None = None, port: int = 0) -> None:
        self.pages: dict[str, Any] = {}
        self.asked: list[web.Request] = []
        self.changed = asyncio.Event()
        self._tls = tls
        self.port = port
        self._runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        return f"{'https' if self._tls else 'http'}://localhost:{self.port}"

    async def __aenter__(self) -> Site:
        app = web.Application()
        app.router.add_get("/{path:.*}", self._answer)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port, ssl_context=self._tls)
        await site.start()
        self.port = site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._runner is not None
        await self._runner.cleanup()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(request)
        page = self.pages.get(request.path)
        if callable(page):
            page = page(request)
        if page is None:
            return web.Response(status=404)
        return page if isinstance(page, web.StreamResponse) else web.Response(body=page)


def moved(where: str, status: int = 302) -> Callable[[web.Request], web.Response]:
    """A redirect."""
    return lambda _: web.Response(status=status, headers={"Location": where})
