from __future__ import annotations

import asyncio
import os
import shutil
import ssl
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from identity_world import GATEWAY, WEB

from identity.ca import Authority, write_atomically, write_identity
from identity.files import IdentityFiles, StaticIdentity
from identity.hello import ClientHello, read_hello
from identity.problems import IdentityError, IdentityProblem
from identity.renewal import Charge, Renewer, due, needs
from identity.spiffe import SpiffeId
from identity.svid import Identity, facts_of_pem, spiffe_id_of


@pytest.fixture
def directory(authority: Authority, tmp_path: Path) -> Path:
    write_identity(authority.issue(GATEWAY, dns=["a.example"]), tmp_path / "id")
    return tmp_path / "id"


def test_a_directory_is_an_identity(directory: Path) -> None:
    source = IdentityFiles(directory)
    assert (source.current.spiffe_id, source.current.dns_names, source.problem) == (GATEWAY, ("a.example",), "")
    assert source.current.trust_domain == "shop.example"
    assert not source.reload()
    assert (directory / "key.pem").stat().st_mode & 0o777 == 0o600


Spoil = Callable[[Path, Authority], None]


def other_key(directory: Path, authority: Authority) -> None:
    write_atomically(directory / "key.pem", authority.issue(GATEWAY).key, 0o600)


def other_ca(directory: Path, authority: Authority) -> None:
    write_atomically(directory / "ca.pem", Authority.create("shop.example").bundle, 0o644)


def expired(directory: Path, authority: Authority) -> None:
    old = Authority.create("shop.example", now=time.time() - 7200)
    write_identity(old.issue(GATEWAY, lifetime=3600, now=time.time() - 7200), directory)


SPOILED: list[tuple[Spoil, str, str]] = [
    (lambda d, a: (d / "cert.pem").unlink(), "unreadable", "cert.pem is not there"),
    (lambda d, a: (d / "key.pem").unlink(), "unreadable", "key.pem is not there"),
    (lambda d, a: (d / "ca.pem").unlink(), "unreadable", "ca.pem is not there"),
    (lambda d, a: (d / "key.pem").chmod(0o644), "key_exposed", "chmod 600"),
    (lambda d, a: (d / "key.pem").chmod(0o640), "key_exposed", "chmod 600"),
    (lambda d, a: write_atomically(d / "cert.pem", b"", 0o644), "bad_pem", "cert.pem"),
    (lambda d, a: write_atomically(d / "cert.pem", b"x" * (1 << 21), 0o644), "bad_pem", "longer"),
    (lambda d, a: write_atomically(d / "key.pem", b"nonsense", 0o600), "bad_pem", "key.pem"),
    (lambda d, a: write_atomically(d / "ca.pem", a.issue(WEB).chain, 0o644), "bad_bundle", "not a CA"),
    (lambda d, a: write_atomically(d / "cert.pem", a.certificate, 0o644), "key_mismatch", "not the key"),
    (other_key, "key_mismatch", "not the key"),
    (other_ca, "unknown_ca", "not issued by any CA"),
    (expired, "expired", "expired"),
]


@pytest.mark.parametrize(("spoil", "reason", "words"), SPOILED)
def test_a_bad_directory_is_refused_at_the_start_and_kept_out_later(
    directory: Path, authority: Authority, spoil: Spoil, reason: str, words: str
) -> None:
    source = IdentityFiles(directory)
    good = source.current
    told: list[Identity] = []
    source.on_change(told.append)
    spoil(directory, authority)
    with pytest.raises(IdentityError, match=words) as caught:
        IdentityFiles(directory)
    assert caught.value.reason == reason
    assert "PRIVATE" not in str(caught.value)
    assert not source.poll()
    assert source.current is good
    assert words in source.problem
    write_identity(authority.issue(GATEWAY), directory)
    assert source.poll()
    assert (source.problem, len(told)) == ("", 1)


def test_a_key_for_a_group_must_be_allowed(directory: Path) -> None:
    (directory / "key.pem").chmod(0o640)
    assert IdentityFiles(directory, group_readable=True).current.spiffe_id == GATEWAY
    (directory / "key.pem").chmod(0o644)
    with pytest.raises(IdentityError, match="chmod"):
        IdentityFiles(directory, group_readable=True)


def test_a_key_that_is_put_right_is_taken(directory: Path) -> None:
    source = IdentityFiles(directory)
    (directory / "key.pem").chmod(0o644)
    assert not source.poll()
    assert source.problem
    (directory / "key.pem").chmod(0o600)
    assert not source.poll()
    assert not source.problem


def test_a_swapped_link_is_seen(authority: Authority, tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_identity(authority.issue(GATEWAY), tmp_path / name)
    (tmp_path / "now").symlink_to("one")
    source = IdentityFiles(tmp_path / "now")
    assert not source.poll()
    (tmp_path / "next").symlink_to("two")
    (tmp_path / "next").replace(tmp_path / "now")
    assert source.poll()


def test_an_identity_that_expires_says_so(directory: Path) -> None:
    now = time.time()
    source = IdentityFiles(directory, clock=lambda: now)
    assert not source.problem
    now = source.current.not_after + 5
    assert "expired 5 s ago" in source.problem
    static = StaticIdentity(source.current, clock=lambda: now)
    assert "expired" in static.problem


def test_everybody_is_told_even_if_one_fails(directory: Path, authority: Authority) -> None:
    source = IdentityFiles(directory)
    told: list[Identity] = []

    def fail(identity: Identity) -> None:
        raise RuntimeError("no room")

    source.on_change(fail)
    stop = source.on_change(told.append)
    write_identity(authority.issue(GATEWAY), directory)
    assert source.poll()
    assert len(told) == 1
    assert "no room" in source.problem
    stop()
    stop()
    write_identity(authority.issue(GATEWAY), directory)
    assert source.poll()
    assert len(told) == 1


def test_a_directory_is_watched(directory: Path, authority: Authority) -> None:
    async def scene() -> None:
        source = IdentityFiles(directory)
        changed = asyncio.Event()
        source.on_change(lambda identity: changed.set())
        stop = source.watch(asyncio.get_running_loop(), interval=0.01)
        write_identity(authority.issue(GATEWAY), directory)
        await asyncio.wait_for(changed.wait(), 10)
        stop()

    asyncio.run(scene())


def test_an_authority_is_made_once_and_loaded(tmp_path: Path) -> None:
    made = Authority.init(tmp_path / "ca", "shop.example")
    assert (tmp_path / "ca" / "ca.key").stat().st_mode & 0o777 == 0o600
    with pytest.raises(IdentityError) as caught:
        Authority.init(tmp_path / "ca", "shop.example")
    assert caught.value.reason == "exists"
    again = Authority.load(tmp_path / "ca")
    assert (again.trust_domain, again.bundle) == ("shop.example", made.bundle)
    issued = again.issue(WEB)
    assert issued.bundle == made.bundle
    (tmp_path / "ca" / "ca.key").chmod(0o644)
    with pytest.raises(IdentityError, match="chmod 600"):
        Authority.load(tmp_path / "ca")
    with pytest.raises(IdentityError, match="tollhouse ca init"):
        Authority.load(tmp_path / "nowhere")


@pytest.mark.parametrize("domain", ["", "Shop.Example", "shop.example:1", "a/b"])
def test_a_bad_trust_domain_begins_nothing(tmp_path: Path, domain: str) -> None:
    with pytest.raises(IdentityError):
        Authority.init(tmp_path / "ca", domain)
    assert not (tmp_path / "ca").exists()


def test_an_unwritable_place_is_said_plainly(authority: Authority, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(IdentityError, match="cannot be made"):
        write_identity(authority.issue(WEB), tmp_path / "file" / "id")


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("spiffe://other.example/ns/a/sa/b", {}),
        ("spiffe://shop.example", {}),
        ("nonsense", {}),
        (WEB, {"ip": ["300.1.1.1"]}),
        (WEB, {"dns": ["a" * 70 + ".example"]}),
        (WEB, {"lifetime": 1.0}),
        (WEB, {"lifetime": float("nan")}),
    ],
)
def test_an_authority_issues_nothing_odd(authority: Authority, name: str, changes: dict[str, object]) -> None:
    with pytest.raises(IdentityError):
        authority.issue(name, **changes)  # type: ignore[arg-type]


def test_a_request_is_signed_for_its_key_alone(authority: Authority) -> None:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec, rsa

    key = ec.generate_private_key(ec.SECP256R1())
    wish = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(GATEWAY), x509.DNSName("evil.example")])
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).add_extension(wish, critical=False)
    request = builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    signed = x509.load_pem_x509_certificate(authority.sign(request, WEB))
    names = signed.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [name.value for name in names] == [WEB]
    assert signed.public_key() == key.public_key()
    weak = builder.sign(rsa.generate_private_key(65537, 2048), hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    for bad in (weak, b"nonsense", request.replace(request[80:84], b"AAAA", 1)):
        with pytest.raises(IdentityError):
            authority.sign(bad, WEB)


def test_a_leaf_never_outlives_its_authority() -> None:
    short = Authority.create("shop.example", lifetime=600)
    assert short.issue(WEB).not_after <= short.not_after
    with pytest.raises(IdentityError) as caught:
        short.issue(WEB, now=short.not_after + 1)
    assert caught.value.reason == "expired"


def test_renewal_comes_between_half_and_two_thirds(authority: Authority) -> None:
    spread = set()
    for _ in range(20):
        made = authority.issue(WEB, lifetime=3600)
        life = made.not_after - made.not_before
        assert life / 2 <= due(made) - made.not_before <= life * 2 / 3 + 1
        assert due(made) == due(made)
        spread.add(round(due(made) - made.not_before))
    assert len(spread) > 5


def test_a_renewer_keeps_its_directories_fresh(tmp_path: Path) -> None:
    Authority.init(tmp_path / "ca", "shop.example")
    now = time.time()
    charge = Charge(directory=tmp_path / "web", spiffe_id=SpiffeId.parse(WEB), lifetime=3600)
    renewer = Renewer(lambda: Authority.load(tmp_path / "ca"), [charge], clock=lambda: now)
    assert 0 < renewer.run_once() <= 60
    first = IdentityFiles(charge.directory).current
    renewer.run_once()
    assert IdentityFiles(charge.directory).current == first
    now = due(first) + 1
    renewer.run_once()
    second = IdentityFiles(charge.directory, clock=lambda: now).current
    assert second.not_after > first.not_after
    assert renewer.renewed == 2
    # A rotated bundle reaches everybody without waiting for the certificates' time.
    authority = Authority.load(tmp_path / "ca").trusting(Authority.create("shop.example").certificate)
    authority.save(tmp_path / "ca")
    renewer.run_once()
    assert IdentityFiles(charge.directory, clock=lambda: now).current.bundle == authority.bundle
    shutil.rmtree(tmp_path / "ca")
    assert renewer.run_once() == 10
    assert "ca init" in renewer.problems[charge.directory]
    authority.save(tmp_path / "ca")
    renewer.run_once()
    assert not renewer.problems


def test_a_renewer_says_what_it_could_not_write(authority: Authority, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    bad = Charge(directory=tmp_path / "file" / "web", spiffe_id=SpiffeId.parse(WEB))
    good = Charge(directory=tmp_path / "web", spiffe_id=SpiffeId.parse(WEB))
    renewer = Renewer(lambda: authority, [bad, good])
    assert renewer.run_once() == 10
    assert list(renewer.problems) == [bad.directory]
    assert IdentityFiles(good.directory).current.spiffe_id == WEB


def test_what_a_charge_needs(authority: Authority, tmp_path: Path) -> None:
    held = authority.issue(WEB, dns=["a.example"])
    charge = Charge(directory=tmp_path, spiffe_id=SpiffeId.parse(WEB), dns=("a.example",))
    now = time.time()
    assert needs(charge, held, authority.bundle, now) == ""
    assert "none" in needs(charge, None, authority.bundle, now)
    assert GATEWAY in needs(charge, authority.issue(GATEWAY), authority.bundle, now)
    assert "DNS" in needs(charge, authority.issue(WEB), authority.bundle, now)
    assert "bundle" in needs(charge, held, b"", now)
    assert "due" in needs(charge, held, authority.bundle, held.not_after)


def hello(name: str | None, alpn: list[str]) -> bytes:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    if alpn:
        context.set_alpn_protocols(alpn)
    outgoing = ssl.MemoryBIO()
    with pytest.raises(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=name).do_handshake()
    return outgoing.read()


def test_a_hello_is_read_whole_and_by_the_byte() -> None:
    context = ClientHello("shop.example", ("h2", "http/1.1"))
    data = hello("Shop.Example", ["h2", "http/1.1"])
    assert read_hello(data) == context
    assert read_hello(data + b"more") == context
    for length in range(len(data)):
        assert read_hello(data[:length]) is None
    assert read_hello(hello(None, [])) == ClientHello()
    # Split over records of 10 bytes, as RFC 8446 section 5.1 allows.
    body = data[5:]
    pieces = [body[at : at + 10] for at in range(0, len(body), 10)]
    assert read_hello(b"".join(b"\x16\x03\x01" + len(piece).to_bytes(2, "big") + piece for piece in pieces)) == context


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"GET / HTTP/1.1\r\n", "plain_http"),
        (b"PRI * HTTP/2.0\r\n", "plain_http"),
        (b"SSH-2.0", "not_tls"),
        (b"\x16\x02\x00\x00\x05hello", "not_tls"),
        (b"\x16\x03\x01\x00\x00", "not_tls"),
        (b"\x16\x03\x01\xff\xff" + b"x" * 10, "not_tls"),
        (b"\x16\x03\x01\x00\x05hello", "bad_record"),
        (b"\x16\x03\x01\x00\x06\x01\x00\x00\x02\x03\x03", "bad_record"),
        (b"\x16\x03\x01\x40\x00" + (b"\x01\xff\xff\xff" + b"\x00" * 16380) + (b"\x16\x03\x01\x40\x00" + b"\x00" * 16384) * 4, "bad_record"),
    ],
)
def test_what_is_no_hello_is_told_apart(data: bytes, reason: str) -> None:
    found = read_hello(data)
    assert isinstance(found, IdentityProblem)
    assert found.reason == reason


def _named(*names: bytes, extensions: int = 1, tail: bytes = b"") -> bytes:
    """A ClientHello by hand, with these names in each of so many server_name extensions."""
    entries = b"".join(b"\0" + len(name).to_bytes(2, "big") + name for name in names)
    body = len(entries).to_bytes(2, "big") + entries + tail
    extension = (b"\0\0" + len(body).to_bytes(2, "big") + body) * extensions
    fields = b"\x03\x03" + b"r" * 32 + b"\0" + b"\0\x02\x13\x01" + b"\x01\0" + len(extension).to_bytes(2, "big") + extension
    message = b"\x01" + len(fields).to_bytes(3, "big") + fields
    return b"\x16\x03\x01" + len(message).to_bytes(2, "big") + message


def test_a_name_that_two_readers_could_read_in_two_ways_is_refused() -> None:
    assert read_hello(_named(b"Shop.Example.")) == ClientHello("shop.example")
    for wrong in (
        _named(b"a.example", b"b.example"),
        _named(b"a.example", extensions=2),
        _named(b"a.example\0.b.example"),
        _named(b""),
        _named(b"a.example", tail=b"more"),
        _named("ä.example".encode()),
    ):
        found = read_hello(wrong)
        assert isinstance(found, IdentityProblem)
        assert found.reason == "bad_record"


def test_a_mangled_hello_never_raises() -> None:
    data = hello("shop.example", ["h2"])
    for at in range(5, len(data)):
        for value in (0, 255, data[at] ^ 1):
            mangled = data[:at] + bytes([value]) + data[at + 1 :]
            read_hello(mangled)
    read_hello(os.urandom(100))
    assert read_hello(b"GE") is None


def test_whom_an_etcd_knows_is_kept_when_renewed(tmp_path: Path) -> None:
    charge = Charge(directory=tmp_path, spiffe_id=SpiffeId.parse(WEB), common_name="web")
    Renewer(lambda: Authority.create("shop.example"), [charge]).run_once()
    facts = facts_of_pem((tmp_path / "cert.pem").read_bytes(), "here")
    assert (facts.common_name, spiffe_id_of(facts)) == ("web", SpiffeId.parse(WEB))
