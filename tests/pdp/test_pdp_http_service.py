"""Which request a call over HTTP is about, and what a decision is in the words of HTTP."""

from __future__ import annotations

import asyncio
import socket
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from engine_world import pool
from grpc_world import SHOP, shop

from identity.ca import Authority, write_identity
from identity.files import IdentityFiles, StaticIdentity
from mesh.policy import Revision
from mesh.questions import Decision, Verdict
from pdp.http_service import MOST_BODY, PolicyHttp, answer_of
from pdp.point import DecisionPoint

ECHO = """package shop.authz

http := input.attributes.request.http

decision := {"allowed": true, "headers": {
	"x-method": http.method, "x-path": http.path, "x-host": http.host, "x-scheme": http.scheme, "x-body": object.get(http, "body", ""),
	"x-from": object.get(input.attributes, ["source", "address", "socketAddress", "address"], ""),
	"x-shown": concat(" ", sort([name | some name, _ in http.headers])),
}}
"""


@asynccontextmanager
async def serving(*held: Revision, callers: Any = None, identity: Any = None, **kwargs: Any) -> AsyncIterator[tuple[str, DecisionPoint]]:
    async with pool() as engine:
        for each in held:
            await engine.load(each)
        point = DecisionPoint(engine, active=lambda: held[0] if held else None, decision="shop.authz.decision", **kwargs)
        web = PolicyHttp(point, callers=callers)
        port = await web.start("127.0.0.1", 0, identity)
        try:
            yield f"http{'s' if identity else ''}://127.0.0.1:{port}", point
        finally:
            await web.stop()


ORIGINAL = {"x-original-method": "GET", "x-original-uri": "/a?b=%20", "host": "shop.example"}
FORWARDED = {"x-forwarded-method": "PUT", "x-forwarded-uri": "/a?b=1", "x-forwarded-host": "shop.example", "x-forwarded-proto": "https"}


@pytest.mark.parametrize(
    ("method", "path", "headers", "wanted"),
    [
        ("DELETE", "/envoy/a/b?c=%20d", {"host": "shop.example"}, ("DELETE", "/a/b?c=%20d", "shop.example", "http")),
        ("GET", "/envoy", {"host": "shop.example", "x-forwarded-proto": "https"}, ("GET", "/", "shop.example", "https")),
        ("GET", "/envoy?c", {"host": "shop.example"}, ("GET", "/?c", "shop.example", "http")),
        ("GET", "/envoy//a/../b", {"host": "h"}, ("GET", "//a/../b", "h", "http")),
        ("GET", "/envoy/x", {"host": "h", "x-original-uri": "/y", "x-forwarded-uri": "/z"}, ("GET", "/x", "h", "http")),
        ("GET", "/for/shop.authz.decision/envoy/x", {"host": "h"}, ("GET", "/x", "h", "http")),
        ("GET", "/forwarded", FORWARDED, ("PUT", "/a?b=1", "shop.example", "https")),
        ("POST", "/for/shop.authz.decision/forwarded", FORWARDED, ("PUT", "/a?b=1", "shop.example", "https")),
        ("GET", "/original", ORIGINAL, ("GET", "/a?b=%20", "shop.example", "http")),
        (
            "GET",
            "/original",
            {"x-original-method": "POST", "x-original-url": "https://shop.example:8443/a//b?c=d#e"},
            ("POST", "/a//b?c=d#e", "shop.example:8443", "https"),
        ),
        ("GET", "/original", {"x-original-method": "POST", "x-original-url": "https://h?c"}, ("POST", "/?c", "h", "https")),
    ],
)
def test_which_request_is_meant(method: str, path: str, headers: dict[str, str], wanted: tuple[str, ...]) -> None:
    async def run() -> None:
        async with serving(shop(ECHO)) as (url, _), aiohttp.ClientSession() as session:
            got = await raw(url, method, path, headers)
            assert got[0] == 200, got
            assert tuple(got[1][name] for name in ("x-method", "x-path", "x-host", "x-scheme")) == wanted
            async with session.get(f"{url}/readyz") as ready:
                assert ready.status == 200

    asyncio.run(run())


async def raw(url: str, method: str, path: str, headers: dict[str, str], body: bytes = b"") -> tuple[int, dict[str, str], bytes]:
    """One request, whose path nobody tidies up."""
    host, _, port = url.partition("//")[2].partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in {"host": "x", **headers, "connection": "close"}.items())]
    if body:
        lines.append(f"content-length: {len(body)}")
    writer.write("\r\n".join([*lines, "", ""]).encode("latin-1") + body)
    answer = await asyncio.wait_for(reader.read(), 20)
    writer.close()
    head, _, rest = answer.partition(b"\r\n\r\n")
    first, *fields = head.decode("latin-1").split("\r\n")
    return int(first.split()[1]), {name.lower(): value for name, _, value in (field.partition(": ") for field in fields)}, rest


@pytest.mark.parametrize(
    ("path", "headers"),
    [
        ("/forwarded", {}),
        ("/forwarded", {**FORWARDED, "x-forwarded-uri": ""}),
        ("/forwarded", {**FORWARDED, "X-Forwarded-Uri": "/twice"}),
        ("/forwarded", {**FORWARDED, "x-forwarded-uri": "http://evil/"}),
        ("/forwarded", {**FORWARDED, "x-forwarded-proto": "gopher"}),
        ("/forwarded", {name: value for name, value in FORWARDED.items() if name != "x-forwarded-method"}),
        ("/original", {}),
        ("/original", {"x-original-uri": "/a"}),
        ("/original", {**ORIGINAL, "x-original-url": "http://h/a"}),
        ("/original", {"x-original-method": "GET", "x-original-url": "/a"}),
        ("/for/shop.authz.nope/envoy/a", {}),
        ("/envoy/a%zz", {}),
    ],
)
def test_what_does_not_say_what_it_is_about_is_an_error(path: str, headers: dict[str, str]) -> None:
    async def run() -> None:
        async with serving(shop(ECHO)) as (url, point):
            status, fields, _ = await raw(url, "GET", path, headers)
            assert (status, fields["x-tollhouse-cause"]) == (503, "input")
            assert point.pending == 0

    asyncio.run(run())


@pytest.mark.parametrize("path", ["/", "/Envoy/a", "/envoyx", "/for//envoy", "/for/a/b/envoy", "/check", "//envoy/a", "/for/x/readyz"])
def test_other_paths_lead_nowhere(path: str) -> None:
    async def run() -> None:
        async with serving(shop(ECHO)) as (url, _):
            assert (await raw(url, "GET", path, {}))[0] == 404

    asyncio.run(run())


def test_bodies_and_headers_are_shown_and_bounded() -> None:
    async def run() -> None:
        async with serving(shop(ECHO)) as (url, _):
            status, fields, _ = await raw(url, "POST", "/envoy/a", {"x-forwarded-for": "6.6.6.6, 192.0.2.7", "cookie": "a=b"}, b"hello")
            assert (status, fields["x-body"], fields["x-from"]) == (200, "hello", "192.0.2.7")
            assert fields["x-shown"] == ":authority :method :path :scheme content-length cookie x-forwarded-for"
            status, fields, _ = await raw(url, "POST", "/envoy/a", {}, b"x" * (MOST_BODY + 1))
            assert (status, fields["x-tollhouse-cause"]) == (503, "input")
            assert (await raw(url, "GET", "/envoy/" + "x" * 20_000, {"x-long": "y" * 20_000}))[0] == 200
            assert (await raw(url, "GET", "/envoy/\xff", {}))[0] == 400, "a denial"

    asyncio.run(run())


@pytest.mark.parametrize(
    ("decision", "form", "status", "headers"),
    [
        (Decision(verdict=Verdict.ALLOW, headers=((b"x", b"1"),), response_headers=((b"y", b"2"),)), "original", 200, {"x": "1", "y": "2"}),
        (Decision(verdict=Verdict.ALLOW, headers_to_remove=(b"a", b"b")), "envoy", 200, {"x-envoy-auth-headers-to-remove": "a,b"}),
        (Decision(verdict=Verdict.ALLOW, headers_to_remove=(b"a",)), "original", 503, {"x-tollhouse-cause": "answer"}),
        (Decision(verdict=Verdict.ALLOW, headers_to_remove=(b"a",)), "forwarded", 503, {"x-tollhouse-cause": "answer"}),
        (Decision(verdict=Verdict.ALLOW, query_set=(("a", "1"),)), "envoy", 503, {"x-tollhouse-cause": "answer"}),
        (Decision(verdict=Verdict.ALLOW, query_remove=("a",)), "envoy", 503, {"x-tollhouse-cause": "answer"}),
        (Decision(verdict=Verdict.DENY), "envoy", 403, {}),
        (Decision(verdict=Verdict.DENY, status=200), "envoy", 403, {}),
        (Decision(verdict=Verdict.DENY, status=204), "original", 403, {}),
        (Decision(verdict=Verdict.DENY, status=302, headers=((b"location", b"/login"),)), "forwarded", 302, {"location": "/login"}),
        (
            Decision(verdict=Verdict.DENY, status=401, headers=((b"content-type", b"text/html"),)),
            "envoy",
            401,
            {"content-type": "text/html"},
        ),
        (Decision(verdict=Verdict.ERROR, cause="timeout"), "envoy", 503, {"x-tollhouse-cause": "timeout"}),
        (Decision(verdict=Verdict.ERROR, status=200), "envoy", 503, {"x-tollhouse-cause": "error"}),
    ],
)
def test_decisions_as_answers(decision: Decision, form: str, status: int, headers: dict[str, str]) -> None:
    answer = answer_of(decision, form)
    assert answer.status == status
    assert {name: answer.headers[name] for name in headers} == headers


def test_only_so_many_checks_are_pending_and_slow_policies_are_timeouts() -> None:
    async def run() -> None:
        async with serving(shop(), max_pending=1) as (url, point):
            slow = {"host": "h", "x-envoy-expected-rq-timeout-ms": "500"}
            first = asyncio.ensure_future(raw(url, "GET", "/for/shop.authz.endless/envoy/", slow))
            while not point.pending:  # noqa: ASYNC110 -- it is on its way
                await asyncio.sleep(0.005)
            status, fields, _ = await raw(url, "GET", "/envoy/", {})
            assert (status, fields["x-tollhouse-cause"]) == (503, "overloaded")
            status, fields, _ = await first
            assert (status, fields["x-tollhouse-cause"]) == (503, "timeout")
        async with serving() as (url, _):
            assert (await raw(url, "GET", "/envoy/", {}))[1]["x-tollhouse-cause"] == "unavailable"
            assert (await raw(url, "GET", "/readyz", {}))[0] == 503

    asyncio.run(run())


def context(folder: Path | None, authority: Path) -> ssl.SSLContext:
    made = ssl.create_default_context(cafile=str(authority))
    made.check_hostname = False
    if folder is not None:
        made.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    return made


def test_only_gateways_may_ask_under_mtls_and_a_renewal_is_followed(tmp_path: Path) -> None:
    authority = Authority.create("shop.example")
    names = {name: f"spiffe://shop.example/ns/edge/sa/{name}" for name in ("pdp", "gateway", "stranger")}
    for name, spiffe_id in names.items():
        write_identity(authority.issue(spiffe_id), tmp_path / name)
    other = tmp_path / "other"
    write_identity(Authority.create("shop.example").issue(names["gateway"]), other)
    identity = StaticIdentity(IdentityFiles(tmp_path / "pdp").current)
    trusted = tmp_path / "pdp" / "ca.pem"

    async def run() -> None:
        async with serving(shop(SHOP.replace("web", "")), callers=lambda: frozenset((names["gateway"],)), identity=identity) as (url, _):

            async def asked(folder: Path | None) -> int:
                connector = aiohttp.TCPConnector(ssl=context(folder, trusted), force_close=True)
                async with aiohttp.ClientSession(connector=connector) as session, session.get(f"{url}/envoy/a") as answer:
                    return answer.status

            assert await asked(tmp_path / "gateway") == 503  # no rule of the policy knows it: an answer it is
            assert await asked(tmp_path / "stranger") == 403
            for nobody in (None, other):
                with pytest.raises((aiohttp.ClientError, ssl.SSLError, ConnectionError)):
                    await asked(nobody)
            before = await serial(url, tmp_path / "gateway", trusted)
            write_identity(authority.issue(names["pdp"]), tmp_path / "pdp")
            identity.replace(IdentityFiles(tmp_path / "pdp").current)
            end = time.monotonic() + 20
            while await serial(url, tmp_path / "gateway", trusted) == before:
                assert time.monotonic() < end, "the renewed certificate is not shown"
                await asyncio.sleep(0.02)
            assert await asked(tmp_path / "gateway") == 503

    asyncio.run(run())


async def serial(url: str, folder: Path, authority: Path) -> bytes:
    """The certificate that is shown."""
    port = int(url.rpartition(":")[2])

    def look() -> bytes:
        with socket.create_connection(("127.0.0.1", port), 5) as plain, context(folder, authority).wrap_socket(plain) as tls:
            return tls.getpeercert(binary_form=True) or b""

    return await asyncio.to_thread(look)
