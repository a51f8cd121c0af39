"""Revisions behind a URL: brought here beside everything else, checked, kept on disk, and in force only when they are whole."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mesh.model import EMPTY, Snapshot
from mesh.policy import Revision
from mesh.policy_data import DataRevision, data_digest
from pdp.bundle_cache import MOST, BundleCache
from pdp.bundle_files import bundle_of
from pdp.bundle_keys import signing_key
from pdp.bundle_services import BundleServices
from tests.pdp.bundle_site import Site
from tests.pdp.bundle_world import a_checker, key_files, made
from tollhouse import policy_supply
from tollhouse.policy_supply import NotReady, Supply

REGO = "package shop.authz\n\ndecision := data.shop.open\n"
WHOLE = made({"policy/shop/authz.rego": REGO}, b'{"shop":{"open":true}}', "shop.authz.decision")
OTHER = made({"policy/shop/authz.rego": REGO}, b'{"shop":{"open":false}}', "shop.authz.decision")
NOTHING = BundleServices()


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy_supply, "FIRST", 0.01)
    monkeypatch.setattr(policy_supply, "MOST", 0.05)


def behind(url: str, revision: Revision = WHOLE) -> Revision:
    return msgspec.structs.replace(revision, modules={}, data=b"{}", bundle=url)


def with_policy(policy: Revision | None, **more: Any) -> Snapshot:
    return msgspec.structs.replace(EMPTY, policy=policy, **more)


async def until(true: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not true():  # noqa: ASYNC110 -- it is other tasks' state
            await asyncio.sleep(0.01)


def run(story: Callable[[Site, Any], Awaitable[None]]) -> None:
    async def whole() -> None:
        async with asyncio.timeout(60), Site() as site, a_checker() as checker:
            await story(site, checker)

    asyncio.run(whole())


def test_the_policy_before_stays_until_the_new_one_is_whole() -> None:
    async def story(site: Site, checker: Any) -> None:
        supply = Supply(checker, NOTHING)
        told: list[str] = []
        supply.on_progress(lambda: told.append(supply.waiting))
        snapshot, before = with_policy(behind(site.url + "/a")), with_policy(OTHER)
        filled = supply.fill(snapshot, before)
        assert filled.policy is OTHER
        assert supply.undecided
        await until(lambda: told)
        filled = supply.fill(snapshot, filled)
        assert filled.policy is OTHER
        assert [(each.reason, each.kept) for each in filled.problems] == [("RevisionNotReady", True)]
        assert f"{site.url}/a answered with 404" in supply.waiting
        site.pages["/a"] = await bundle_of(WHOLE)
        await supply.settle(10)
        filled = supply.fill(snapshot, filled)
        assert filled.policy is not None
        assert (filled.policy.digest, filled.policy.modules, filled.policy.data) == (WHOLE.digest, WHOLE.modules, WHOLE.data)
        assert filled.policy.entry_points == WHOLE.entry_points
        assert (supply.waiting, supply.undecided, filled.problems) == ("", False, ())
        assert supply.fill(snapshot, filled).policy is filled.policy
        await supply.close()

    run(story)


def test_with_none_before_there_is_none() -> None:
    async def story(site: Site, checker: Any) -> None:
        supply = Supply(checker, NOTHING)
        filled = supply.fill(with_policy(behind(site.url + "/a"), shadow=behind(site.url + "/b")), with_policy(None, shadow=OTHER))
        assert (filled.policy, filled.shadow) == (None, None)
        assert [each.kept for each in filled.problems] == [False, False]
        await supply.close()

    run(story)


def test_what_is_not_as_its_digest_says_is_never_in_force() -> None:
    async def story(site: Site, checker: Any) -> None:
        supply = Supply(checker, NOTHING)
        snapshot = with_policy(behind(site.url + "/a"))
        for page, why in (
            (await bundle_of(OTHER), "it was changed after"),
            (b"nonsense", "gzip"),
            ((await bundle_of(WHOLE))[:-9], "cut off"),
        ):
            site.pages["/a"] = page
            asked = len(site.asked)
            supply.fill(snapshot, EMPTY)
            await until(lambda asked=asked: len(site.asked) > asked + 1)
            assert supply.fill(snapshot, EMPTY).policy is None
            assert why in supply.waiting
        await supply.close()

    run(story)


def test_with_a_key_it_must_be_signed(tmp_path: Path) -> None:
    private, public = key_files(tmp_path, "ES256")

    async def story(site: Site, checker: Any) -> None:
        path = tmp_path / "services.yaml"
        path.write_text(
            f"services: {{a: {{url: '{site.url}', signing: {{keyid: one, scope: live}}}}}}\nkeys: {{one: {{key: {public.name}}}}}"
        )
        cache = BundleCache(tmp_path / "bundles")
        supply = Supply(checker, BundleServices(path), cache=cache)
        snapshot = with_policy(behind(site.url + "/a"))
        site.pages["/a"] = await bundle_of(WHOLE)
        cache.put(WHOLE.digest, site.pages["/a"])
        supply.fill(snapshot, EMPTY)
        await until(lambda: supply.fill(snapshot, EMPTY) and "not signed" in supply.waiting)
        site.pages["/a"] = await bundle_of(WHOLE, checker, signing_key(private, key_id="one", scope="test"))
        await until(lambda: supply.fill(snapshot, EMPTY) and "scope mismatch" in supply.waiting)
        site.pages["/a"] = await bundle_of(WHOLE, checker, signing_key(private, key_id="one", scope="live"))
        await supply.settle(10)
        assert supply.fill(snapshot, EMPTY).policy is not None
        await supply.close()

    run(story)


def test_a_restart_without_the_server_takes_it_from_disk(tmp_path: Path) -> None:
    async def story(site: Site, checker: Any) -> None:
        cache = BundleCache(tmp_path / "bundles")
        snapshot = with_policy(behind(site.url + "/a"))
        site.pages["/a"] = await bundle_of(WHOLE)
        for asked in (1, 1):
            supply = Supply(checker, NOTHING, cache=cache)
            supply.fill(snapshot, EMPTY)
            await supply.settle(10)
            policy = supply.fill(snapshot, EMPTY).policy
            assert policy is not None
            assert policy.modules == WHOLE.modules
            assert len(site.asked) == asked
            await supply.close()
        [file] = (tmp_path / "bundles").iterdir()
        assert file.stat().st_mode & 0o777 == 0o600
        for spoil in (lambda: file.write_bytes(b"damaged"), lambda: file.chmod(0o666)):
            asked = len(site.asked)
            spoil()
            supply = Supply(checker, NOTHING, cache=cache)
            supply.fill(snapshot, EMPTY)
            await supply.settle(10)
            assert supply.fill(snapshot, EMPTY).policy is not None
            assert len(site.asked) == asked + 1
            await supply.close()

    run(story)


def test_the_folder_is_bounded(tmp_path: Path) -> None:
    cache = BundleCache(tmp_path)
    digests = [f"sha256:{number:064x}" for number in range(MOST + 5)]
    for digest in digests:
        cache.put(digest, b"x", digests[:2])
    assert [cache.get(each) is not None for each in digests[:3]] == [True, True, False]
    assert len(list(tmp_path.iterdir())) == MOST + 3


def test_it_is_in_force_when_whoever_decides_holds_it_and_not_before() -> None:
    async def story(site: Site, checker: Any) -> None:
        held: list[str] = []

        async def prepare(revision: Revision, field: str, _: Snapshot) -> None:
            assert revision.modules == {}, "nothing is fetched for others"
            if not held:
                raise NotReady("no decision point holds it")

        supply = Supply(checker, NOTHING, needs=lambda _: False, prepare=prepare)
        snapshot = with_policy(behind(site.url + "/a"))
        await until(lambda: supply.fill(snapshot, EMPTY) and "no decision point" in supply.waiting)
        assert supply.fill(snapshot, EMPTY).policy is None
        held.append("yes")
        await supply.settle(10)
        policy = supply.fill(snapshot, EMPTY).policy
        assert policy is not None
        assert policy.digest == WHOLE.digest
        assert site.asked == []
        await supply.close()

    run(story)


def test_large_data_is_read_beside_the_loop() -> None:
    big = made(
        {"policy/shop/authz.rego": REGO}, b'{"shop":{"open":true,"list":[' + b",".join(b"%d.50" % each for each in range(200_000)) + b"]}}"
    )

    async def story(site: Site, checker: Any) -> None:
        site.pages["/a"] = await bundle_of(big)
        supply = Supply(checker, NOTHING)
        snapshot = with_policy(behind(site.url + "/a", big))
        supply.fill(snapshot, EMPTY)
        await supply.settle(20)
        policy = supply.fill(snapshot, EMPTY).policy
        assert policy is not None
        assert policy.digest == big.digest
        await supply.close()

    run(story)


def a_part(root: tuple[str, ...], value: bytes, url: str = "") -> DataRevision:
    return DataRevision(digest=data_digest(root, value), root=root, value=b"" if url else value, bundle=url)


def test_data_of_their_own_are_in_it_and_what_is_tried_waits() -> None:
    async def story(site: Site, checker: Any) -> None:
        supply = Supply(checker, NOTHING)
        part = a_part(("shop", "grants"), b"[1]")
        snapshot = with_policy(WHOLE, canary=OTHER, data=(part,))
        first = supply.fill(snapshot, with_policy(WHOLE, canary=OTHER))
        assert (first.policy, first.canary) == (WHOLE, None), "what decides stays, and what is tried is not tried by old data"
        await supply.settle(10)
        policy = supply.fill(snapshot, first).policy
        assert policy is not None
        assert (policy.policy, policy.parts) == (WHOLE.digest, (("shop/grants", part.digest),))
        assert policy.data == b'{"shop":{"open":true,"grants":[1]}}'
        assert supply.fill(snapshot, first).canary is not None
        await supply.close()

    run(story)


@pytest.mark.parametrize(
    ("part", "why"),
    [
        (a_part(("shop", "open"), b"false"), "has data.shop.open, too"),
        (a_part(("shop", "open", "x"), b"1"), "which is no object"),
        (a_part((), b"{}"), "it has data of its own"),
        (DataRevision(digest="sha256:" + "1" * 64, root=("a",)), "there is no DataRevision for a"),
    ],
)
def test_what_clashes_or_is_not_there_leaves_the_policy_before(part: DataRevision, why: str) -> None:
    async def story(site: Site, checker: Any) -> None:
        supply = Supply(checker, NOTHING)
        snapshot = with_policy(WHOLE, data=(part,))
        await until(lambda: supply.fill(snapshot, with_policy(OTHER)) and why in supply.waiting)
        assert supply.fill(snapshot, with_policy(OTHER)).policy is OTHER
        assert supply.fill(snapshot, EMPTY).policy is None
        await supply.close()

    run(story)


def test_data_may_lie_behind_a_url(tmp_path: Path) -> None:
    async def story(site: Site, checker: Any) -> None:
        holds = made({}, b'{"other":1,"shop":{"grants":{"ada":["GET"]}}}')
        site.pages["/wrong"] = site.pages["/data"] = await bundle_of(holds)
        part = a_part(("shop", "grants"), b'{"ada":["GET"]}', site.url + "/data")
        wrong = a_part(("shop", "grants"), b'{"ada":["PUT"]}', site.url + "/wrong")
        for _ in range(2):
            supply = Supply(checker, NOTHING, cache=BundleCache(tmp_path / "bundles"))
            supply.fill(with_policy(WHOLE, data=(part,)), EMPTY)
            await supply.settle(10)
            policy = supply.fill(with_policy(WHOLE, data=(part,)), EMPTY).policy
            assert policy is not None
            assert policy.data == b'{"shop":{"open":true,"grants":{"ada":["GET"]}}}'
            await supply.close()
        assert len(site.asked) == 1
        snapshot = with_policy(WHOLE, data=(wrong,))
        await until(lambda: supply.fill(snapshot, EMPTY) and "it was changed after" in supply.waiting)
        await supply.close()

    run(story)
