"""Bundles as files: read back as they were made, signed as OPA signs, and refused when anything about them is wrong."""

from __future__ import annotations

import asyncio
import json
import subprocess
from pathlib import Path

import pytest
from bundle_world import KINDS, a_checker, files_in, key_files, made, tar_of
from hypothesis import given
from hypothesis import strategies as st

from pdp.bundle_files import MOST_UNPACKED, BundleProblem, bundle_of, check_size, files_of, packed, read_bundle
from pdp.bundle_keys import KeyProblem, checking_key, signing_key
from tests import install

REGO = "package shop.authz\n\ndecision := data.shop.open\n"
ONE = made({"policy/shop/authz.rego": REGO}, b'{"shop":{"open":true}}')
CLASH = json.dumps({"metadata": {"tollhouse": {"modules": {"x.rego": "policy/shop/authz.rego"}}}})
PLAIN = {"/shop/authz.rego": REGO, "/shop/data.json": '{"open": true}'}


@pytest.mark.parametrize(
    "modules",
    [
        {"policy/shop/authz.rego": REGO},
        {"authz.rego": REGO, "policy/authz.rego": "package other\n"},
        {
            "policy/renamed/0.rego": REGO,
            "../../odd name.rego": "package a\n",
            "policy/a/../b.rego": "package b\n",
            "no-suffix": "package c\n",
        },
    ],
)
def test_a_revision_comes_out_as_it_went_in(modules: dict[str, str]) -> None:
    revision = made(modules, '{"größe":1.50,"deep":{"a":[1,null,"<&>"]}}'.encode())

    async def run() -> None:
        async with a_checker() as checker:
            content = await bundle_of(revision)
            assert content == await bundle_of(revision)
            read = await read_bundle(checker, content)
            assert (read.digest, read.revision) == (revision.digest, revision.digest)
            assert read.modules == modules

    asyncio.run(run())


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_signed_is_taken_with_its_key_only(tmp_path: Path, kind: str) -> None:
    private, public = key_files(tmp_path, kind)
    _, stranger = key_files(tmp_path, kind, 1)
    _, other_kind = key_files(tmp_path, "ES256" if kind != "ES256" else "RS256", 2)

    async def run() -> None:
        async with a_checker() as checker:
            content = await bundle_of(ONE, checker, signing_key(private, key_id="one", scope="live"))
            right = checking_key(public, key_id="one", scope="live")
            assert right.algorithm == kind
            assert (await read_bundle(checker, content, [right])).digest == ONE.digest
            assert (await read_bundle(checker, content, [right], "one")).digest == ONE.digest
            assert (await read_bundle(checker, content, None)).digest == ONE.digest
            for keys, key_id, why in (
                ([checking_key(stranger, key_id="one", scope="live")], "", "failed to verify"),
                ([checking_key(other_kind, key_id="one", scope="live")], "", "verif"),
                ([checking_key(public, key_id="two", scope="live")], "", "ID one not found"),
                ([checking_key(public, key_id="one")], "", "scope mismatch"),
                ([checking_key(public, key_id="one", scope="test")], "", "scope mismatch"),
                ([right], "two", "ID two not found"),
                ([], "", "no key to check it"),
            ):
                with pytest.raises(BundleProblem, match=why):
                    await read_bundle(checker, content, keys, key_id)

    asyncio.run(run())


def test_nothing_can_be_changed_added_or_taken_away_under_a_signature(tmp_path: Path) -> None:
    private, public = key_files(tmp_path, "ES256")

    async def run() -> None:
        async with a_checker() as checker:
            key, right = signing_key(private), [checking_key(public)]
            signed = files_in(await bundle_of(ONE, checker, key))
            assert (await read_bundle(checker, tar_of(signed), right)).digest == ONE.digest
            for change, why in (
                ({"/shop/authz.rego": REGO + "other := 1\n"}, "digest mismatch"),
                ({"/data.json": '{"shop":{"open":false}}'}, "digest mismatch"),
                ({"/.manifest": '{"revision":"2","roots":[""]}'}, "digest mismatch"),
                ({"/more.rego": "package more\n"}, "not included in bundle signature"),
                ({"/more/data.json": "{}"}, "not included in bundle signature"),
                ({"/.signatures.json": '{"signatures":[]}'}, "missing JWT|not signed"),
                ({"/.signatures.json": "{}"}, "not signed"),
                ({"/.signatures.json": '{"signatures":["a.b.c"]}'}, "JWT|decode|illegal"),
            ):
                with pytest.raises(BundleProblem, match=why):
                    await read_bundle(checker, tar_of({**signed, **change}), right)
            for gone in ("/shop/authz.rego", "/data.json", "/.signatures.json"):
                with pytest.raises(BundleProblem):
                    await read_bundle(checker, tar_of({name: text for name, text in signed.items() if name != gone}), right)
            with pytest.raises(BundleProblem, match="not signed"):
                await read_bundle(checker, await bundle_of(ONE), right)

    asyncio.run(run())


@pytest.mark.parametrize("kind", KINDS)
def test_ours_and_opas_signatures_are_each_others(tmp_path: Path, kind: str) -> None:
    private, public = key_files(tmp_path, kind)
    opa = str(install.install("opa"))
    folder = tmp_path / "folder"
    for name, text in PLAIN.items():
        path = folder / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def built() -> bytes:
        out = tmp_path / "out.tar.gz"
        command = [opa, "build", "-b", ".", "-o", str(out), "--signing-alg", kind, "--signing-key", str(private)]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
        return out.read_bytes()

    async def run() -> None:
        async with a_checker() as checker:
            right = checking_key(public)
            theirs = await asyncio.to_thread(built)
            read = await read_bundle(checker, theirs, [right], "default")
            assert read.data == b'{"shop":{"open":true}}'
            assert list(read.modules) == ["policy/shop/authz.rego"]
            ours = tmp_path / "ours.tar.gz"
            ours.write_bytes(await bundle_of(ONE, checker, signing_key(private)))
            check = [opa, "eval", "-b", str(ours), "data.shop.authz.decision", "--format", "raw"]
            said = await asyncio.to_thread(subprocess.run, check, check=False, capture_output=True, text=True)
            assert said.stdout.strip() == "true", said.stderr

    asyncio.run(run())


@pytest.mark.parametrize(
    ("files", "why"),
    [
        ({"/patch.json": '{"data": [{"op": "upsert", "path": "/a", "value": 1}]}'}, "delta bundle"),
        ({**PLAIN, "/policy.wasm": "x"}, "WebAssembly"),
        ({**PLAIN, "/.manifest": '{"rego_version": 0}'}, "rego_version 0"),
        ({**PLAIN, "/.manifest": '{"file_rego_versions": {"/shop/*.rego": 0}}'}, "Rego v0"),
        ({**PLAIN, "/.manifest": '{"roots": ["other"]}'}, "roots"),
        ({**PLAIN, "/.manifest": "{"}, "manifest"),
        ({**PLAIN, "/shop/data.json": "{"}, "data.json"),
        ({"/a.rego": "package"}, "a.rego"),
        ({**PLAIN, "/./shop/authz.rego": REGO}, "twice"),
        ({**PLAIN, "/.manifest": '{"roots": [""], "metadata": {"tollhouse": {"modules": {"shop/authz.rego": 1}}}}'}, "can't be used"),
        ({**PLAIN, "/x.rego": "package x\n", "/.manifest": CLASH}, "one name"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_refused_in_words(files: dict[str, str], why: str) -> None:
    async def run() -> None:
        async with a_checker() as checker:
            with pytest.raises(BundleProblem, match=why):
                await read_bundle(checker, tar_of(files))

    asyncio.run(run())


def test_tests_are_left_out() -> None:
    async def run() -> None:
        async with a_checker() as checker:
            read = await read_bundle(checker, tar_of({**PLAIN, "/shop/authz_test.rego": "package shop.authz_test\n\ntest_it := true\n"}))
            assert read.digest == ONE.digest

    asyncio.run(run())


@pytest.mark.parametrize("content", [b"", b"x", b"\x1f\x8b\x08", tar_of(PLAIN)[:-9], tar_of(PLAIN)[:40]], ids=range(5))
def test_what_is_no_gzip_is_refused(content: bytes) -> None:
    with pytest.raises(BundleProblem):
        check_size(content)


def test_a_bomb_is_not_unpacked() -> None:
    content = packed({"data.json": b" " * (MOST_UNPACKED + 1)})
    assert len(content) < 1 << 20
    with pytest.raises(BundleProblem, match="unpacked"):
        check_size(content)


def test_keys_say_what_is_wrong_with_them(tmp_path: Path) -> None:
    private, public = key_files(tmp_path, "RS256")
    curve, _ = key_files(tmp_path, "ES256")
    secret, _ = key_files(tmp_path, "HS256")
    short = tmp_path / "short"
    short.write_text("abc\n")
    short.chmod(0o600)
    for path, more, why in (
        (tmp_path / "none", {}, "No such file"),
        (public, {}, "no private key"),
        (private, {"algorithm": "ES256"}, "does not go with this key"),
        (curve, {"algorithm": "RS256"}, "use ES256"),
        (secret, {"algorithm": "RS256"}, "use HS256"),
        (short, {}, "too short"),
    ):
        with pytest.raises(KeyProblem, match=why):
            signing_key(path, **more)
    with pytest.raises(KeyProblem, match="it is a private one"):
        checking_key(private)
    assert signing_key(private, algorithm="PS256").algorithm == "PS256"
    for path in (private, secret):
        path.chmod(0o640)
        with pytest.raises(KeyProblem, match="chmod 600"):
            signing_key(path)
    with pytest.raises(KeyProblem, match="chmod 600"):
        checking_key(secret)
    assert "secret" not in repr(signing_key(curve).name)


@given(st.dictionaries(st.text(max_size=12), st.text(max_size=5), max_size=6))
def test_no_two_modules_share_a_file(modules: dict[str, str]) -> None:
    files = files_of(made(modules))
    assert len(files) == len(modules) + 2
    assert all(".." not in name.split("/") and not name.startswith("/") for name in files)
