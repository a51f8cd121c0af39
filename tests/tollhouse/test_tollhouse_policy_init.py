"""`tollhouse policy init`: a folder that passes everything, ours and OPA's, and works in a mesh."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from policy_world import WEB, opa, run

import conf


@pytest.mark.parametrize("package", ["app.authz", "shop.authz", "authz", "a.b.c"])
def test_a_starter_passes_everything_ours_and_opas(package: str, tmp_path: Path) -> None:
    made = tmp_path / "policy"
    done = run("init", made, "--package", package, "--trust-domain", "acme.example")
    assert done.returncode == 0, done.stderr
    tested = run("test", made, "--coverage", "-o", "json")
    assert tested.returncode == 0, tested.stdout + tested.stderr
    assert json.loads(tested.stdout)["passed"] >= 13
    assert json.loads(tested.stdout)["coverage"]["percent"] == 100.0
    checked = run("check", made, "--strict", "-o", "json")
    assert checked.returncode == 0, checked.stderr
    (decision,) = json.loads(checked.stdout)["decisions"]
    assert decision["decision"] == f"{package}.decision"
    assert decision["kept"]
    assert decision["widened"] == decision["notes"] == decision["warnings"] == []
    assert decision["hits"] > 95
    assert run("fmt", made, "--check").returncode == 0
    assert "shop.example" not in (made / package.replace(".", "/") / "data.yaml").read_text() if package == "authz" else True
    asked = run("eval", made, "--as", "spiffe://acme.example/ns/shop/sa/web", "GET", "https://shop.example/catalog/1", "-o", "json")
    assert json.loads(asked.stdout)["rule"] == "web reads the catalog"
    assert run("eval", made, "GET", "https://shop.example/healthz").returncode == 0
    for arguments in (
        ("check", "--strict", "--schema", made / "schemas", made),
        ("check", "--strict", "--bundle", "--schema", made / "schemas", made),
        ("test", made),
        ("test", "--bundle", made),
        ("fmt", "--list", "--fail", made),
        ("build", "--bundle", made, "--output", tmp_path / "bundle.tar.gz"),
    ):
        theirs = opa(*arguments)
        assert theirs.returncode == 0, (arguments, theirs.stdout, theirs.stderr)


def test_opa_finds_the_misspelt_path_in_the_same_folder(tmp_path: Path) -> None:
    run("init", tmp_path / "policy")
    file = tmp_path / "policy/lib/request.rego"
    file.write_text(file.read_text().replace("http.method", "http.methd"))
    theirs = opa("check", "--schema", tmp_path / "policy/schemas", tmp_path / "policy")
    assert theirs.returncode == 1
    assert "methd" in theirs.stderr
    ours = run("check", tmp_path / "policy")
    assert ours.returncode == 1
    assert f"{file}:9:11: input.attributes.request.http.methd leads nowhere" in ours.stderr
    assert "did you mean input.attributes.request.http.method?" in ours.stderr


def test_init_overwrites_nothing(tmp_path: Path) -> None:
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib/caller.rego").write_text("mine")
    done = run("init", tmp_path)
    assert done.returncode == 2
    assert "lib/caller.rego is there already" in done.stderr
    assert [path.name for path in tmp_path.rglob("*")] == ["lib", "caller.rego"]
    assert (tmp_path / "lib/caller.rego").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--package", "Shop"), "can't be the package"),
        (("--package", "a..b"), "can't be the package"),
        (("--package", "lib.x"), "can't be the package"),
        (("--package", "a.if"), "can't be the package"),
        (("--trust-domain", "no/domain"), "--trust-domain"),
    ],
)
def test_init_refuses_names_that_would_not_work(arguments: tuple[str, ...], said: str, tmp_path: Path) -> None:
    done = run("init", tmp_path / "new", *arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert not (tmp_path / "new").exists()


def test_a_starter_is_in_force_in_a_directory(tmp_path: Path) -> None:
    """The whole folder, schemas and manifest too, as `policy/` of a configuration directory."""
    example = Path(conf.__file__).parent / "examples/shop"
    shutil.copytree(example, tmp_path / "shop", ignore=shutil.ignore_patterns("policy"))
    assert run("init", tmp_path / "shop/policy", "--package", "shop.authz").returncode == 0
    command = [sys.executable, "-m", "tollhouse", "explain", "--config", str(tmp_path / "shop"), "--gateway", "edge/ingress"]
    for method, code in (("GET", 0), ("DELETE", 1)):
        done = subprocess.run(
            [*command, "--as", WEB, method, "https://shop.example/catalog/1"], capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == code, done.stdout + done.stderr
