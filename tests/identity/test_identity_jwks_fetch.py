"""Fetching keys from real servers that do what they should, and from others."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from identity.ca import Authority, write_identity
from identity.jwks import FetchError
from identity.jwks_fetch import JwksFetcher, check_host, is_public
from mesh.jwks import MOST_BYTES
from mesh.tokens import KeySource
from tests.tokens import jwks


class Issuer:
    """An HTTP server; what it answers at each path is the test's to say."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.pages: dict[str, Any] = {"/jwks": jwks("r1")}
        self.asked: list[str] = []
        self._tls = tls
        self.url = ""

    async def __aenter__(self) -> Issuer:
        app = web.Application()
        app.router.add_get("/{path:.*}", self._answer)
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0, ssl_context=self._tls)
        await site.start()
        port = site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]
        self.url = f"{'https' if self._tls else 'http'}://localhost:{port}"
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(request.path)
        page = self.pages.get(request.path)
        if page is None:
            return web.Response(status=404)
        return page if isinstance(page, web.StreamResponse) else web.Response(body=page, content_type="application/json")


def run(test: Callable[[Issuer, JwksFetcher], Awaitable[None]]) -> None:
    async def body() -> None:
        fetcher = JwksFetcher()
        try:
            async with asyncio.timeout(20), Issuer() as issuer:
                await test(issuer, fetcher)
        finally:
            await fetcher.close()

    asyncio.run(body())


def moved(where: str, status: int = 302) -> web.Response:
    return web.Response(status=status, headers={"location": where})


def test_by_address_and_by_discovery() -> None:
    async def test(issuer: Issuer, fetch: JwksFetcher) -> None:
        assert await fetch(KeySource(uri=issuer.url + "/jwks")) == jwks("r1").encode()
        issuer.pages["/realm/.well-known/openid-configuration"] = json.dumps({"issuer": "x", "jwks_uri": issuer.url + "/jwks"})
        assert await fetch(KeySource(issuer=issuer.url + "/realm")) == jwks("r1").encode()
        assert issuer.asked == ["/jwks", "/realm/.well-known/openid-configuration", "/jwks"]

    run(test)


def test_redirects_are_followed_within_bounds() -> None:
    async def test(issuer: Issuer, fetch: JwksFetcher) -> None:
        issuer.pages |= {"/a": moved("/b", 301), "/b": moved(issuer.url + "/c", 307), "/c": moved("jwks", 308), "/loop": moved("/loop")}
        assert await fetch(KeySource(uri=issuer.url + "/a")) == jwks("r1").encode()
        issuer.pages["/loop"] = moved("/loop2")
        issuer.pages["/loop2"] = moved("/loop3")
        issuer.pages["/loop3"] = moved("/loop4")
        issuer.pages["/loop4"] = moved("/jwks")
        with pytest.raises(FetchError, match="more than 3 redirects"):
            await fetch(KeySource(uri=issuer.url + "/loop"))

    run(test)


@pytest.mark.parametrize(
    ("page", "why"),
    [
        (None, "answers with 404"),
        (web.Response(status=503), "answers with 503"),
        (web.Response(status=204), "answers with 204"),
        (b"x" * (MOST_BYTES + 1), f"answers with more than {MOST_BYTES} bytes"),
        (moved("ftp://127.0.0.1/jwks"), "redirects to where keys are not fetched from"),
        (moved("file:///etc/passwd"), "redirects to where keys are not fetched from"),
        (moved("http://169.254.169.254/latest/meta-data"), "nothing is fetched from 169.254.169.254"),
    ],
)
def test_what_is_not_taken(page: Any, why: str) -> None:
    async def test(issuer: Issuer, fetch: JwksFetcher) -> None:
        issuer.pages["/jwks"] = page
        with pytest.raises(FetchError, match=why):
            await fetch(KeySource(uri=issuer.url + "/jwks"))

    run(test)


@pytest.mark.parametrize("body", ["", "[]", "{}", '{"jwks_uri": 7}', '{"jwks_uri": "ftp://x/"}', '{"jwks_uri": "a", "jwks_uri": "b"}'])
def test_openid_configurations_without_an_address(body: str) -> None:
    async def test(issuer: Issuer, fetch: JwksFetcher) -> None:
        issuer.pages["/.well-known/openid-configuration"] = body
        with pytest.raises(FetchError, match="the OpenID configuration at"):
            await fetch(KeySource(issuer=issuer.url))

    run(test)


def test_nobody_there() -> None:
    async def test(issuer: Issuer, fetch: JwksFetcher) -> None:
        with pytest.raises(FetchError, match=r"127\.0\.0\.1:1/"):
            await fetch(KeySource(uri="http://127.0.0.1:1/"))
        with pytest.raises(FetchError):
            await fetch(KeySource(uri="http://no-such-host.invalid/"))

    run(test)


def test_over_tls_the_server_must_prove_itself(tmp_path: Path) -> None:
    authority = Authority.create("issuer.example")
    write_identity(authority.issue("spiffe://issuer.example/ns/a/sa/b", dns=("localhost",)), tmp_path)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")

    async def body() -> None:
        trusting, strict = JwksFetcher(tmp_path / "ca.pem"), JwksFetcher()
        try:
            async with asyncio.timeout(20), Issuer(context) as issuer, Issuer() as plain:
                assert await trusting(KeySource(uri=issuer.url + "/jwks")) == jwks("r1").encode()
                with pytest.raises(FetchError, match="certificate verify failed"):
                    await strict(KeySource(uri=issuer.url + "/jwks"))
                with pytest.raises(FetchError, match=r"Hostname mismatch|IP address mismatch|certificate is not valid for"):
                    await trusting(KeySource(uri=issuer.url.replace("localhost", "127.0.0.1") + "/jwks"))
                issuer.pages["/down"] = moved(plain.url + "/jwks")
                with pytest.raises(FetchError, match="redirects to where keys are not fetched from"):
                    await trusting(KeySource(uri=issuer.url + "/down"))
                issuer.pages["/.well-known/openid-configuration"] = json.dumps({"jwks_uri": plain.url + "/jwks"})
                with pytest.raises(FetchError, match="names a jwks_uri without TLS"):
                    await trusting(KeySource(issuer=issuer.url))
                assert plain.asked == []
        finally:
            await trusting.close()
            await strict.close()

    asyncio.run(body())


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("127.0.0.1", True),
        ("10.0.0.1", True),
        ("::1", True),
        ("169.254.169.254", False),
        ("fe80::1", False),
        ("fe80::1%eth0", False),
        ("::ffff:169.254.169.254", False),
        ("224.0.0.1", False),
        ("0.0.0.0", False),
        ("::", False),
    ],
)
def test_where_nothing_is_fetched_from(address: str, public: bool) -> None:
    assert is_public(address) is public
    host = f"[{address}]" if ":" in address else address
    if public:
        check_host(f"http://{host}:80/")
    elif "%" not in address:
        with pytest.raises(FetchError):
            check_host(f"http://{host}:80/")
