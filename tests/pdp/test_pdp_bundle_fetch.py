"""Bundles from real servers: what is sent to whom, what is followed, and what is too much."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from bundle_site import Site, moved
from bundle_world import key_files

from identity.ca import Authority, write_identity
from pdp import bundle_fetch
from pdp.bundle_fetch import LONG_POLL, Fetched, FetchProblem, fetch
from pdp.bundle_services import BundleServices, ServicesProblem

NOTHING = BundleServices()


def secret(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o600)
    return path


def identity(folder: Path, name: str, authority: Authority) -> Path:
    write_identity(authority.issue(f"spiffe://shop.example/ns/shop/sa/{name}", dns=["localhost"]), folder / name)
    return folder / name


def server_tls(folder: Path, authority: Authority, *, mutual: bool = False) -> ssl.SSLContext:
    made = identity(folder, "server", authority)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(made / "cert.pem", made / "key.pem")
    if mutual:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(made / "ca.pem")
    return context


def run(coroutine: Any) -> Any:
    async def bounded() -> Any:
        async with asyncio.timeout(30):
            return await coroutine

    return asyncio.run(bounded())


async def refused(url: str, services: BundleServices = NOTHING, **more: Any) -> str:
    with pytest.raises(FetchProblem) as found:
        await fetch(url, services, **more)
    return str(found.value)


def test_it_is_fetched_once_and_asked_about_after_that() -> None:
    async def story() -> None:
        async with Site() as site:
            site.pages["/a"] = lambda request: (
                web.Response(status=304, headers={"ETag": '"one"'})
                if request.headers.get("If-None-Match") == '"one"'
                else web.Response(body=b"a bundle", headers={"ETag": '"one"', "Content-Type": LONG_POLL})
            )
            first = await fetch(site.url + "/a", NOTHING)
            assert (first.body, first.etag, first.long_poll) == (b"a bundle", '"one"', True)
            again = await fetch(site.url + "/a", NOTHING, etag=first.etag, wait=7)
            assert (again.body, again.etag) == (None, '"one"')
            assert site.asked[-1].headers["Prefer"] == "modes=snapshot;wait=7"
            assert await refused(site.url + "/none") == f"{site.url}/none answered with 404"

    run(story())


def test_redirects_are_followed_a_few_times_and_never_out_of_tls(tmp_path: Path) -> None:
    authority = Authority.create("shop.example")

    async def story() -> None:
        async with Site() as plain, Site(server_tls(tmp_path, authority)) as secure:
            services = BundleServices(
                secret(tmp_path / "s.yaml", f"services: {{a: {{url: '{secure.url}', tls: {{ca_cert: server/ca.pem}}}}}}")
            )
            plain.pages |= {"/a": moved("/b"), "/b": moved(secure.url + "/c", 307), "/loop": moved("/loop"), "/end": b"bundle"}
            secure.pages |= {"/c": b"bundle", "/out": moved(plain.url + "/end")}
            assert (await fetch(plain.url + "/a", services)).body == b"bundle"
            assert "no TLS" in await refused(secure.url + "/out", services)
            assert "more than 5 redirects" in await refused(plain.url + "/loop", services)
            for target in ("http://169.254.169.254/x", "ftp://localhost/x", "http://a:b@localhost/x"):
                plain.pages["/bad"] = moved(target)
                said = await refused(plain.url + "/bad", services)
                assert "169.254.169.254" in said or "address of a bundle" in said or "password" in said
            assert "CERTIFICATE_VERIFY_FAILED" in await refused(secure.url + "/c")

    run(story())


def test_a_token_goes_to_its_service_only_and_a_new_one_counts_at_once(tmp_path: Path) -> None:
    async def story() -> None:
        async with Site() as one, Site() as other:
            secret(tmp_path / "token", "first\n")
            text = f"services: {{a: {{url: '{one.url}/shop', credentials: {{bearer: {{token_path: token}}}}}}}}"
            services = BundleServices(secret(tmp_path / "s.yaml", text))
            one.pages |= {"/shop/a": b"x", "/shop/moved": moved(other.url + "/a"), "/shopping": b"y"}
            other.pages["/a"] = b"z"
            for path in ("/shop/a", "/shop/moved", "/shopping"):
                await fetch(one.url + path, services)
            secret(tmp_path / "token", "second")
            await fetch(one.url + "/shop/a", services)
            assert [each.headers.get("Authorization") for each in one.asked] == ["Bearer first", "Bearer first", None, "Bearer second"]
            assert [each.headers.get("Authorization") for each in other.asked] == [None]
            (tmp_path / "token").chmod(0o644)
            assert "chmod 600" in await refused(one.url + "/shop/a", services)

    run(story())


def test_a_certificate_is_shown_to_its_service(tmp_path: Path) -> None:
    authority = Authority.create("shop.example")
    identity(tmp_path, "client", authority)

    async def story() -> None:
        async with Site(server_tls(tmp_path, authority, mutual=True)) as site:
            site.pages["/a"] = b"x"
            mine = "credentials: {client_tls: {cert: client/cert.pem, private_key: client/key.pem}}, "
            for more in (mine, ""):
                text = f"services: {{a: {{url: '{site.url}', {more}tls: {{ca_cert: server/ca.pem}}}}}}"
                services = BundleServices(secret(tmp_path / "s.yaml", text))
                if more:
                    assert (await fetch(site.url + "/a", services)).body == b"x"
                else:
                    await refused(site.url + "/a", services)

    run(story())


def test_it_is_bounded_in_bytes_and_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle_fetch, "MOST_PACKED", 1000)

    async def slow(request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse()
        await answer.prepare(request)
        for _ in range(1000):
            await answer.write(b"x")
            await asyncio.sleep(0.05)
        return answer

    async def story() -> None:
        async with Site() as site:
            site.pages |= {"/big": b"x" * 1001, "/fits": b"x" * 1000}
            assert isinstance(await fetch(site.url + "/fits", NOTHING), Fetched)
            assert "more than 1000 bytes" in await refused(site.url + "/big")
        app = web.Application()
        app.router.add_get("/slow", slow)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        where = web.TCPSite(runner, "127.0.0.1", 0)
        await where.start()
        port = where._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]
        assert "within 0.3 s" in await refused(f"http://127.0.0.1:{port}/slow", budget=0.3)
        await runner.cleanup()
        assert "onnect" in await refused(f"http://127.0.0.1:{port}/slow")

    run(story())


BEARER = "credentials: {bearer: {token_path: token}}"
WRONG = [
    ("services: [", "is not YAML"),
    ("services: &a {b: *a}", "is not YAML"),
    ("keys: {}", "missing required field `services`"),
    ("services: {a: {url: 'https://a', polling: {}}}", "unknown field `polling`"),
    ("services: {a: {url: 'https://a', credentials: {bearer: {token: secret}}}}", "`token`"),
    ("services: {a: {url: 'ftp://a'}}", "services.a.url"),
    ("services: {a: {url: 'https://a/../b'}}", "write out where it leads"),
    ("services: {a: {url: 'https://a?x=1'}}", "no query"),
    (f"services: {{a: {{url: 'http://bundles.example', {BEARER}}}}}", "plaintext"),
    (f"services: {{a: {{url: 'https://a', {BEARER}}}}}", "token can't be read"),
    ("services: {a: {url: 'https://a', credentials: {bearer: {token_path: t}, client_tls: {cert: c, private_key: k}}}}", "keep one"),
    ("services: {a: {url: 'http://localhost', tls: {ca_cert: x}}}", "mean nothing for http"),
    ("services: {a: {url: 'https://a', tls: {ca_cert: none.pem}}}", "none.pem can't be used"),
    ("services: {a: {url: 'https://a', signing: {keyid: b}}}\nkeys: {c: {key: x}}", "there is no key 'b' under keys; there is c"),
    ("services: {a: {url: 'https://a', signing: {keyid: b}}}\nkeys: {b: {key: none}}", "none can't be read"),
    ("services: {a: {url: 'https://a'}}\nkeys: {b: {key: x, algorithm: none}}", "is none of RS256"),
]


@pytest.mark.parametrize(("text", "why"), WRONG)
def test_a_file_of_services_that_is_wrong_is_an_error(tmp_path: Path, text: str, why: str) -> None:
    path = secret(tmp_path / "services.yaml", text)
    with pytest.raises(ServicesProblem) as found:
        BundleServices(path).check()
    assert why in str(found.value)
    assert str(path) in str(found.value)


def test_the_service_with_the_longest_url_says_what_goes_with_it(tmp_path: Path) -> None:
    _, public = key_files(tmp_path, "ES256")
    text = (
        "services: {all: {url: 'https://a.example'}, shop: {url: 'https://a.example:443/shop/', signing: {keyid: one, scope: live}}}\n"
        f"keys: {{one: {{key: {public.name}}}}}"
    )
    services = BundleServices(secret(tmp_path / "s.yaml", text))
    services.check()
    for url, signed in [
        ("https://a.example/shop/x", True),
        ("https://a.example/shop", True),
        ("https://a.example/shopping", False),
        ("https://a.example:444/shop/x", False),
        ("http://a.example/shop/x", False),
        ("https://b.example/shop/x", False),
    ]:
        key = services.access(url).key
        assert (key is not None) is signed
        assert key is None or (key.id, key.scope, key.algorithm) == ("one", "live", "ES256")
