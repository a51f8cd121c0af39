"""Key and token of bundles that are served: read again when their files change."""

from __future__ import annotations

import asyncio
from pathlib import Path

import aiohttp
import pytest

from pdp.bundle_files import BundleProblem, read_bundle
from pdp.bundle_keys import checking_key
from tests.pdp.bundle_world import a_checker, key_files, made
from tests.servers import free_port
from tollhouse import bundling
from tollhouse.bundling import BundleOptions, open_bundles

ONE = made({"policy/shop/authz.rego": "package shop.authz\n\ndecision := true\n"})


def secret(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o600)
    return path


def test_what_is_served_has_the_newest_key_and_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundling, "EVERY", 0.02)
    first, first_public = key_files(tmp_path, "ES256")
    second, second_public = key_files(tmp_path, "ES256", 1)
    key, token = secret(tmp_path / "key", first.read_text()), secret(tmp_path / "token", "one")
    port = free_port()

    async def story() -> None:
        async with a_checker() as checker, aiohttp.ClientSession() as session:
            server = await open_bundles(BundleOptions(listen=f"127.0.0.1:{port}", key=key, token=token), checker)
            await server.publish(ONE)

            async def get(bearer: str, **headers: str) -> tuple[int, str, bytes]:
                headers["Authorization"] = f"Bearer {bearer}"
                async with session.get(f"http://127.0.0.1:{port}/bundle.tar.gz", headers=headers) as answer:
                    return answer.status, answer.headers.get("ETag", ""), await answer.read()

            async def until(bearer: str, status: int) -> None:
                while (await get(bearer))[0] != status:  # noqa: ASYNC110 -- it is on a wire
                    await asyncio.sleep(0.02)

            status, tag, content = await get("one")
            assert status == 200
            await read_bundle(checker, content, [checking_key(first_public)], "default")
            waiting = asyncio.create_task(get("one", **{"If-None-Match": tag, "Prefer": "modes=snapshot,delta;wait=60"}))
            secret(key, second.read_text())
            status, newer, content = await waiting
            assert (status, newer != tag) == (200, True)
            await read_bundle(checker, content, [checking_key(second_public)], "default")
            with pytest.raises(BundleProblem):
                await read_bundle(checker, content, [checking_key(first_public)], "default")
            secret(token, "two")
            await until("one", 401)
            assert (await get("two"))[0] == 200
            for spoil in (lambda: key.write_text("no key"), lambda: key.chmod(0o644), lambda: token.write_text("")):
                spoil()
                await asyncio.sleep(0.1)
                assert (await get("two"))[:2] == (200, newer)
            await server.stop()

    async def bounded() -> None:
        async with asyncio.timeout(30):
            await story()

    asyncio.run(bounded())
