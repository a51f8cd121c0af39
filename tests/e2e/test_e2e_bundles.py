"""Bundles over real processes: the decision point as a bundle server to real OPAs that verify, and bundle servers as a source of policy."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from e2e_world import EXAMPLE, tollhouse

from identity.ca import Authority, write_identity
from tests import install, servers
from tests.servers import Process, Server, free_port, wait_for

pytestmark = pytest.mark.e2e
SECRET = "a secret of the bundle's test that is long enough"
TOKEN = "token-of-the-test"


def es256(folder: Path, name: str = "es256") -> tuple[Path, str]:
    """A private key in a file of ours alone, and the public key's text."""
    key = ec.generate_private_key(ec.SECP256R1())
    path = folder / f"{name}.pem"
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    path.chmod(0o600)
    return path, key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o600)
    return path


@contextmanager
def pdp(config: str, *more: str) -> Iterator[Process]:
    port = free_port()
    words = ["pdp", "--config", config, "--listen", f"127.0.0.1:{port}", *more]
    process = servers.tollhouse(*words, ready=lambda: servers.answers(port), name="pdp")
    try:
        process.start()
        yield process
    finally:
        process.close()


@contextmanager
def opa(folder: Path, url: str, key: dict[str, str] | None, scope: str = "", **service: Any) -> Iterator[Server]:
    """A real OPA that fetches its policy from us."""
    bundle: dict[str, Any] = {"service": "tollhouse", "resource": "bundle.tar.gz"}
    bundle["polling"] = {"min_delay_seconds": 1, "max_delay_seconds": 1, "long_polling_timeout_seconds": 5}
    settings: dict[str, Any] = {"services": {"tollhouse": {"url": url, **service}}, "bundles": {"tollhouse": bundle}}
    if key is not None:
        bundle["signing"] = {"keyid": "one", **({"scope": scope} if scope else {})}
        settings["keys"] = {"one": key}
    path = folder / f"opa-{free_port()}.json"
    path.write_text(json.dumps(settings))
    with servers.opa(f"--config-file={path}") as server:
        yield server


def holds(server: Server) -> str:
    """The revision that an OPA answers from; empty for none."""
    import urllib.request

    with urllib.request.urlopen(f"{server.url}/v1/data/shop?provenance=true", timeout=5) as answer:
        found = json.load(answer).get("provenance", {}).get("bundles", {}).get("tollhouse", {})
    return str(found.get("revision", ""))


def published(config: str, folder: Path, more: str = "") -> str:
    """A revision of the example's policy with something at its end; its digest."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(EXAMPLE / "policy", folder)
    rego = folder / "authz.rego"
    rego.write_text(rego.read_text() + more)
    done = tollhouse("policy", "publish", str(folder), "--config", config, "--decision", "shop.authz.decision")
    return done.stdout.split()[1].rstrip(":").replace("-", ":", 1)


def activate(config: str, digest: str) -> None:
    tollhouse("policy", "activate", digest, "--config", config)


def test_an_opa_that_verifies_follows_the_active_revision(tmp_path: Path) -> None:
    key, public = es256(tmp_path)
    _, stranger = es256(tmp_path, "stranger")
    token = written(tmp_path / "token", TOKEN + "\n")
    port = free_port()
    signed = ["--bundle-key", str(key), "--bundle-key-id", "one", "--bundle-scope", "live", "--bundle-token", str(token)]
    url, bearer = f"http://127.0.0.1:{port}", {"credentials": {"bearer": {"token": TOKEN}}}
    right = {"algorithm": "ES256", "key": public}
    with servers.etcd() as etcd:
        config = etcd.url
        first = published(config, tmp_path / "policy")
        second = published(config, tmp_path / "policy", "\nmore := 1\n")
        activate(config, first)
        with (
            pdp(config, "--opa-bundles", f"127.0.0.1:{port}", *signed) as running,
            opa(tmp_path, url, right, "live", **bearer) as follows,
            opa(tmp_path, url, {"algorithm": "ES256", "key": stranger}, "live", **bearer) as wrong_key,
            opa(tmp_path, url, right, "test", **bearer) as wrong_scope,
            opa(tmp_path, url, right, "live") as no_token,
        ):
            wait_for("the first revision", lambda: holds(follows) == first)
            for digest in (second, first, second):
                activate(config, digest)
                wait_for("the next revision", lambda: holds(follows) == digest)  # noqa: B023
            assert [holds(each) for each in (wrong_key, wrong_scope, no_token)] == ["", "", ""]
            running.kill()
            assert holds(follows) == second
        with pdp(config, "--opa-bundles", f"127.0.0.1:{port}", *signed), opa(tmp_path, url, right, "live", **bearer) as later:
            wait_for("a new OPA", lambda: holds(later) == second)


def test_off_this_machine_bundles_are_served_under_tls(tmp_path: Path) -> None:
    port = free_port()
    authority = Authority.create("shop.example")
    write_identity(authority.issue("spiffe://shop.example/ns/edge/sa/pdp", dns=("localhost",)), tmp_path / "identity")
    secret = written(tmp_path / "secret", SECRET)
    with servers.etcd() as etcd:
        first = published(etcd.url, tmp_path / "policy")
        activate(etcd.url, first)
        where = ["--opa-bundles", f"0.0.0.0:{port}", "--bundle-key", str(secret), "--bundle-key-id", "one"]
        with (
            pdp(etcd.url, *where, "--identity", str(tmp_path / "identity")),
            opa(
                tmp_path,
                f"https://localhost:{port}",
                {"algorithm": "HS256", "key": SECRET},
                tls={"ca_cert": str(tmp_path / "identity" / "ca.pem")},
            ) as server,
        ):
            wait_for("the revision", lambda: holds(server) == first)
        assert refused([*where]) == ["in plaintext"]


def refused(options: Sequence[str]) -> list[str]:
    done = tollhouse("pdp", "--policy", str(EXAMPLE / "policy"), "--decision", "shop.authz.decision", *options, check=False)
    assert done.returncode == 2, done.stderr
    return [word for word in ("in plaintext", "chmod 600", "does not go with", "No such file", "--opa-bundles") if word in done.stderr][:1]


def test_a_server_of_bundles_that_could_not_sign_does_not_start(tmp_path: Path) -> None:
    key, _ = es256(tmp_path)
    where = ["--opa-bundles", f"127.0.0.1:{free_port()}"]
    assert refused([*where, "--bundle-key", str(key), "--bundle-algorithm", "RS256"]) == ["does not go with"]
    assert refused(["--bundle-key", str(key)]) == ["--opa-bundles"]
    key.chmod(0o644)
    assert refused([*where, "--bundle-key", str(key)]) == ["chmod 600"]


def test_a_bundle_is_published_from_a_server_and_from_a_file(tmp_path: Path) -> None:
    key, public = es256(tmp_path)
    _, stranger = es256(tmp_path, "stranger")
    right, wrong = written(tmp_path / "right.pub", public), written(tmp_path / "wrong.pub", stranger)
    token = written(tmp_path / "token", TOKEN)
    port = free_port()
    url = f"http://127.0.0.1:{port}/bundle.tar.gz"
    with servers.etcd() as here, servers.etcd() as there:
        first = published(there.url, tmp_path / "policy")
        activate(there.url, first)
        signed = ["--bundle-key", str(key), "--bundle-scope", "live", "--bundle-token", str(token)]
        with pdp(there.url, "--opa-bundles", f"127.0.0.1:{port}", *signed):

            def publish(where: str, *more: str) -> tuple[int, str]:
                words = ("policy", "publish", where, "--config", here.url, "--decision", "shop.authz.decision", *more)
                done = tollhouse(*words, check=False)
                return done.returncode, done.stdout + done.stderr

            good = ("--verify-key", str(right), "--verify-scope", "live", "--token", str(token))
            for options, why in (
                (good[:4], "give --token"),
                (good[4:], "no key to check it"),
                (("--verify-key", str(wrong), *good[2:]), "failed to verify"),
                ((*good[:2], *good[4:]), "scope mismatch"),
                ((*good, "--verify-algorithm", "RS256"), "use ES256"),
            ):
                code, said = publish(url, *options)
                assert code != 0
                assert why in said
            assert json.loads(tollhouse("policy", "list", "--config", here.url, "-o", "json").stdout) == []
            code, said = publish(url, *good)
            assert (code, said.split()[1].rstrip(":").replace("-", ":", 1)) == (0, first)
        code, said = publish(url, *good)
        assert code == 1
        assert "onnect" in said
        packed = tmp_path / "bundle.tar.gz"
        command = [str(install.install("opa")), "build", "-b", str(tmp_path / "policy"), "-o", str(packed)]
        subprocess.run(command, check=True, capture_output=True)
        code, said = publish(str(packed))
        assert code == 0, said
        packed.write_bytes(packed.read_bytes()[:-20])
        code, said = publish(str(packed))
        assert (code, "cut off" in said) == (1, True)
        code, said = publish(str(tmp_path / "policy"), "--verify-key", str(right))
        assert (code, "a folder is not signed" in said) == (2, True)


def test_a_revision_has_a_name_and_a_name_one_revision(tmp_path: Path) -> None:
    with servers.etcd() as etcd:
        config = ("--config", etcd.url)

        def publish(more: str, *options: str) -> str:
            digest = published(etcd.url, tmp_path / "policy", more)
            tollhouse("policy", "publish", str(tmp_path / "policy"), *config, "--decision", "shop.authz.decision", *options)
            return digest.replace(":", "-", 1)

        def names() -> dict[str, str]:
            return {each["name"]: each["label"] for each in json.loads(tollhouse("policy", "list", *config, "-o", "json").stdout)}

        first = publish("", "--name", "stable")
        second = publish("\nmore := 1\n", "--name", "next")
        assert names() == {first: "stable", second: "next"}
        publish("")
        assert names()[first] == "stable", "published again it is called as before"
        assert first in tollhouse("policy", "activate", "stable", *config).stdout
        publish("\nmore := 1\n", "--name", "stable")
        assert names() == {first: "", second: "stable"}
        assert second in tollhouse("policy", "activate", "stable", *config).stdout
        assert tollhouse("policy", "activate", "next", *config, check=False).returncode == 1
        for bad in ("No!", second[:20], second[7:12]):
            assert tollhouse("policy", "publish", str(tmp_path / "policy"), *config, "--name", bad, check=False).returncode == 2


def test_opas_that_decide_for_a_mesh_take_signed_bundles_alone(tmp_path: Path) -> None:
    key, public = es256(tmp_path)
    token = written(tmp_path / "token", TOKEN)
    port, admin = free_port(), free_port()
    bearer = {"credentials": {"bearer": {"token": TOKEN}}}
    with opa(tmp_path, f"http://127.0.0.1:{port}", {"algorithm": "ES256", "key": public}, "live", **bearer) as server:
        words = ["up", "--state", str(tmp_path / "state"), "--admin", f"127.0.0.1:{admin}", "--opa", server.url]
        words += ["--opa-bundles", f"127.0.0.1:{port}", "--bundle-key", str(key), "--bundle-key-id", "one", "--bundle-scope", "live"]
        words += ["--bundle-token", str(token)]
        process = servers.tollhouse(*words, ready=lambda: servers.fetched(f"http://127.0.0.1:{admin}/readyz"), name="up")
        try:
            process.start()
            wait_for("the OPA to hold what is signed", lambda: holds(server).startswith("sha256:"))
        finally:
            process.close()
    done = tollhouse("up", "--state", str(tmp_path / "state"), "--bundle-key", str(key), check=False)
    assert done.returncode == 2
    assert "say where by --opa" in done.stderr
