from __future__ import annotations

import ssl
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from identity_world import GATEWAY, WEB, mesh_pair, mutual, shake

from identity.ca import Authority
from identity.files import NoIdentity, StaticIdentity
from identity.openssl import SESSION_CACHE_OFF
from identity.problems import IdentityError, IdentityProblem
from identity.svid import Identity
from identity.tls import client_context, handshake_problem, peer_of, server_context, server_name, verify_upstream
from mesh.model import ClientValidation, ListenerTls, UpstreamTls
from mesh.peer import Peer

HERE = ("127.0.0.1", 443)
THERE = ("192.0.2.7", 40000)
MESH = UpstreamTls(mode="mesh")
DOMAINS = ("shop.example",)


def odd(authority: Authority, uris: list[str], **changes: object) -> StaticIdentity:
    """A client whose certificate the authority signed although it should not have."""
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.now(UTC)
    names = [x509.UniformResourceIdentifier(uri) for uri in uris]
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([]))
        .issuer_name(authority._certificate.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + timedelta(seconds=float(changes.get("begin", -3600))))  # type: ignore[arg-type]
        .not_valid_after(now + timedelta(seconds=float(changes.get("end", 3600))))  # type: ignore[arg-type]
        .add_extension(x509.BasicConstraints(ca=bool(changes.get("ca", False)), path_length=None), critical=True)
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=True)
    if "usage" in changes:
        builder = builder.add_extension(x509.ExtendedKeyUsage([x509.ObjectIdentifier(str(changes["usage"]))]), critical=False)
    chain = builder.sign(authority._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return StaticIdentity(
        Identity(
            spiffe_id=WEB, chain=chain, key=pem, bundle=authority.bundle, not_before=0, not_after=(now + timedelta(days=1)).timestamp()
        )
    )


def seen(server: ssl.SSLObject, validation: ClientValidation | None = ClientValidation()) -> Peer | IdentityProblem:  # noqa: B008
    return peer_of(server, validation, THERE, HERE, DOMAINS)


def test_both_ends_of_the_mesh_know_each_other(gateway: StaticIdentity, web: StaticIdentity) -> None:
    server, client = mesh_pair(gateway, web, name="Shop.Example")
    peer = seen(server)
    assert isinstance(peer, Peer)
    assert (peer.principal, peer.trust_domain) == (WEB, "shop.example")
    assert (peer.tls_version, peer.alpn, peer.sni) == ("TLSv1.3", "h2", "shop.example")
    assert (peer.address, peer.local_port, len(peer.certificate_hash)) == ("192.0.2.7", 443, 64)
    assert verify_upstream(client, MESH, [GATEWAY]) == GATEWAY


def test_an_upstream_that_is_somebody_else_is_refused(gateway: StaticIdentity, web: StaticIdentity) -> None:
    _, client = mesh_pair(gateway, web)
    for expected in ([WEB], []):
        problem = verify_upstream(client, MESH, expected)
        assert isinstance(problem, IdentityProblem)
        assert problem.reason == "wrong_identity"


@pytest.mark.parametrize(
    ("uris", "changes", "reason"),
    [
        ([], {}, "no_spiffe_id"),
        ([WEB, GATEWAY], {}, "two_uris"),
        ([WEB, WEB], {}, "two_uris"),
        ([WEB, "https://shop.example/"], {}, "two_uris"),
        (["https://shop.example/web"], {}, "bad_spiffe_id"),
        (["spiffe://shop.example"], {}, "bad_spiffe_id"),
        (["spiffe://shop.example/a/../b"], {}, "bad_spiffe_id"),
        (["spiffe://other.example/ns/shop/sa/web"], {}, "foreign_trust_domain"),
        ([WEB], {"ca": True}, "authority_as_leaf"),
    ],
)
def test_an_odd_certificate_gives_nobody_an_identity(
    authority: Authority, gateway: StaticIdentity, uris: list[str], changes: dict[str, object], reason: str
) -> None:
    server, _ = mesh_pair(gateway, odd(authority, uris, **changes))
    problem = seen(server)
    assert isinstance(problem, IdentityProblem)
    assert problem.reason == reason


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"end": -5}, "expired"), ({"begin": 60}, "not_yet_valid"), ({"usage": "1.3.6.1.5.5.7.3.1"}, "bad_purpose")],
)
def test_a_certificate_that_is_not_good_now_fails_the_handshake(
    authority: Authority, gateway: StaticIdentity, changes: dict[str, object], reason: str
) -> None:
    with pytest.raises(ssl.SSLError) as caught:
        mesh_pair(gateway, odd(authority, [WEB], **changes))
    assert handshake_problem(caught.value) == reason


def test_a_certificate_of_another_authority_fails_the_handshake(gateway: StaticIdentity) -> None:
    stranger = StaticIdentity(Authority.create("shop.example").issue(WEB))
    listener, client = server_context(mutual(), gateway), client_context(MESH, stranger)
    with pytest.raises(ssl.SSLError) as caught:
        shake(listener, client)
    # Each refuses the other; the client is the first to see a certificate.
    assert handshake_problem(caught.value) in {"unknown_ca", "refused_by_peer_unknown_ca"}
    client.verify_mode = ssl.CERT_NONE
    with pytest.raises(ssl.SSLError) as caught:
        shake(listener, client)
    assert handshake_problem(caught.value) == "unknown_ca"


def test_a_self_signed_certificate_fails_the_handshake(gateway: StaticIdentity) -> None:
    root = Authority.create("shop.example")
    forged = odd(root, [WEB])
    client = client_context(MESH, forged)
    client.verify_mode = ssl.CERT_NONE
    with pytest.raises(ssl.SSLError) as caught:
        shake(server_context(mutual(), gateway), client)
    assert handshake_problem(caught.value) == "unknown_ca"


def anonymous() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def test_without_a_certificate(gateway: StaticIdentity) -> None:
    with pytest.raises(ssl.SSLError) as caught:
        shake(server_context(mutual(), gateway), anonymous())
    assert handshake_problem(caught.value) == "no_certificate"
    for mode in ("optional", "insecure_fallback"):
        validation = ClientValidation(mode=mode)  # type: ignore[arg-type]
        server, _ = shake(server_context(mutual(client=validation), gateway), anonymous())
        peer = seen(server, validation)
        assert isinstance(peer, Peer)
        assert (peer.principal, peer.certificate_hash) == ("", "")


def test_an_optional_certificate_must_still_be_good(authority: Authority, gateway: StaticIdentity, web: StaticIdentity) -> None:
    validation = ClientValidation(mode="optional")
    server, _ = mesh_pair(gateway, web, mutual(client=validation))
    peer = seen(server, validation)
    assert isinstance(peer, Peer)
    assert peer.principal == WEB
    server, _ = mesh_pair(gateway, odd(authority, []), mutual(client=validation))
    assert isinstance(seen(server, validation), IdentityProblem)


def test_insecure_fallback_lets_a_bad_certificate_in_as_nobody(gateway: StaticIdentity) -> None:
    stranger = StaticIdentity(Authority.create("shop.example").issue(WEB))
    client = client_context(MESH, stranger)
    client.verify_mode = ssl.CERT_NONE
    validation = ClientValidation(mode="insecure_fallback")
    server, _ = shake(server_context(mutual(client=validation), gateway), client)
    assert server.getpeercert(True), "it was asked for, and shown"
    peer = seen(server, validation)
    assert isinstance(peer, Peer)
    assert (peer.principal, peer.certificate_hash, peer.dns_names) == ("", "", ())


def test_roots_of_a_listeners_own_identify_but_give_no_spiffe_id(gateway: StaticIdentity) -> None:
    partner = Authority.create("shop.example")
    validation = ClientValidation(source="roots", roots=partner.certificate)
    client = client_context(MESH, StaticIdentity(partner.issue(WEB, dns=["partner.example"])))
    client.verify_mode = ssl.CERT_NONE
    server, _ = shake(server_context(mutual(client=validation), gateway), client)
    peer = seen(server, validation)
    assert isinstance(peer, Peer)
    assert (peer.principal, peer.dns_names) == ("", ("partner.example",))
    assert peer.certificate_hash


def test_plaintext_has_a_peer_without_a_name() -> None:
    peer = peer_of(None, None, THERE, HERE)
    assert isinstance(peer, Peer)
    assert (peer.principal, peer.tls_version, peer.address) == ("", "", "192.0.2.7")


def test_a_peer_whose_certificate_has_ended_since_is_refused(gateway: StaticIdentity, web: StaticIdentity) -> None:
    server, client = mesh_pair(gateway, web)
    late = web.current.not_after + 1
    for problem in (
        peer_of(server, ClientValidation(), THERE, HERE, DOMAINS, now=late),
        verify_upstream(client, MESH, [GATEWAY], now=late),
    ):
        assert isinstance(problem, IdentityProblem)
        assert problem.reason == "expired"


def test_sni_chooses_the_certificate(gateway: StaticIdentity, authority: Authority) -> None:
    def pair(*names: str) -> tuple[bytes, bytes]:
        made = authority.issue(GATEWAY, dns=names)
        return made.chain, made.key

    listener = ListenerTls(certificates=(pair("a.example"), pair("b.example"), pair("*.c.example"), pair("d.c.example")))
    context = server_context(listener, gateway)
    for asked, shown in [
        ("a.example", "a.example"),
        ("B.Example", "b.example"),
        ("x.c.example", "*.c.example"),
        ("d.c.example", "d.c.example"),
        ("x.y.c.example", "a.example"),
        ("c.example", "a.example"),
        ("other.example", "a.example"),
        (None, "a.example"),
    ]:
        server, client = shake(context, anonymous(), asked)
        der = client.getpeercert(True)
        assert der is not None
        names = x509.load_der_x509_certificate(der).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert names.get_values_for_type(x509.DNSName) == [shown], asked
        peer = seen(server, None)
        assert isinstance(peer, Peer)
        assert (peer.sni, peer.alpn) == ((asked or "").lower(), "")


def test_every_certificate_of_a_listener_demands_the_clients(gateway: StaticIdentity, web: StaticIdentity, authority: Authority) -> None:
    made = authority.issue(GATEWAY, dns=["a.example"])
    listener = mutual(certificates=((made.chain, made.key),))
    with pytest.raises(ssl.SSLError):
        shake(server_context(listener, gateway), anonymous(), "a.example")
    server, _ = mesh_pair(gateway, web, listener, name="a.example")
    peer = seen(server)
    assert isinstance(peer, Peer)
    assert (peer.principal, peer.alpn) == (WEB, "h2")


@pytest.mark.parametrize("name", [None, "a.example"])
def test_no_session_is_ever_resumed(gateway: StaticIdentity, web: StaticIdentity, authority: Authority, name: str | None) -> None:
    assert SESSION_CACHE_OFF
    made = authority.issue(GATEWAY, dns=["a.example"])
    context = server_context(mutual(certificates=((made.chain, made.key),)), gateway)
    for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
        client = client_context(MESH, web)
        client.maximum_version = version
        session = None
        for _ in range(3):
            to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
            server = context.wrap_bio(to_server, to_client, server_side=True)
            asking = client.wrap_bio(to_client, to_server, server_hostname=name, session=session)
            for stream in (asking, server) * 4:
                try:
                    stream.do_handshake()
                    if stream is server:
                        server.write(b"x")
                    else:
                        asking.read(1)
                except ssl.SSLWantReadError:
                    pass
            session = asking.session
            assert not server.session_reused
            assert not asking.session_reused
        assert context.session_stats()["number"] == 0


def test_old_versions_are_refused(gateway: StaticIdentity, web: StaticIdentity) -> None:
    client = client_context(MESH, web)
    client.maximum_version = ssl.TLSVersion.TLSv1_2
    server, _ = shake(server_context(mutual(), gateway), client)
    assert server.version() == "TLSv1.2"
    with pytest.raises(ssl.SSLError) as caught:
        shake(server_context(mutual(min_version="1.3"), gateway), client)
    assert handshake_problem(caught.value) == "protocol_version"


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (b"GET / HTTP/1.1\r\nhost: shop.example\r\n\r\n", "plain_http"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "not_tls"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "not_tls"),
        (b"\x16\x03\x01\x00\x05hello", "bad_record"),
        (b"\x00" * 50, "not_tls"),
    ],
)
def test_what_is_not_tls_is_told_apart(gateway: StaticIdentity, sent: bytes, reason: str) -> None:
    incoming = ssl.MemoryBIO()
    incoming.write(sent)
    server = server_context(mutual(), gateway).wrap_bio(incoming, ssl.MemoryBIO(), server_side=True)
    with pytest.raises(ssl.SSLError) as caught:
        server.do_handshake()
    assert handshake_problem(caught.value) == reason


def test_a_client_that_goes_away_is_told_apart(gateway: StaticIdentity) -> None:
    incoming = ssl.MemoryBIO()
    incoming.write_eof()
    server = server_context(mutual(), gateway).wrap_bio(incoming, ssl.MemoryBIO(), server_side=True)
    with pytest.raises(ssl.SSLError) as caught:
        server.do_handshake()
    assert handshake_problem(caught.value) == "closed"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (TimeoutError(), "timeout"),
        (ConnectionResetError(), "closed"),
        (BrokenPipeError(), "closed"),
        (IdentityError("expired", "x"), "expired"),
        (ValueError(), "other"),
    ],
)
def test_other_errors_have_words_too(error: Exception, reason: str) -> None:
    assert handshake_problem(error) == reason


def test_a_listener_needs_something_good_to_serve(gateway: StaticIdentity, authority: Authority) -> None:
    one, two = authority.issue(GATEWAY), authority.issue(GATEWAY)
    for listener, reason in [
        (ListenerTls(), "no_certificate"),
        (ListenerTls(certificates=((one.chain, two.key),)), "key_mismatch"),
        (ListenerTls(certificates=((one.chain, b"nonsense"),)), "bad_pem"),
        (ListenerTls(certificates=((b"nonsense", one.key),)), "bad_pem"),
        (mutual(client=ClientValidation(source="roots", roots=b"")), "bad_bundle"),
        (mutual(client=ClientValidation(source="roots", roots=b"nonsense")), "bad_bundle"),
        (mutual(client=ClientValidation(source="roots", roots=one.chain)), "bad_bundle"),
    ]:
        with pytest.raises(IdentityError) as caught:
            server_context(listener, gateway)
        assert caught.value.reason == reason, listener
        assert b"PRIVATE" not in str(caught.value).encode()


def test_an_encrypted_key_is_refused_without_asking_anybody(gateway: StaticIdentity, authority: Authority) -> None:
    made = authority.issue(GATEWAY)
    key = serialization.load_pem_private_key(made.key, None)
    locked = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"secret")
    )
    with pytest.raises(IdentityError, match="encrypted"):
        server_context(ListenerTls(certificates=((made.chain, locked),)), gateway)


def test_an_expired_identity_is_not_served_as_if_it_were_fine(gateway: StaticIdentity) -> None:
    late = gateway.current.not_after + 1
    for make in (lambda: server_context(mutual(), gateway, now=late), lambda: client_context(MESH, gateway, now=late)):
        with pytest.raises(IdentityError) as caught:
            make()
        assert caught.value.reason == "expired"


def test_keys_leave_no_file_and_no_descriptor_behind(gateway: StaticIdentity) -> None:
    server_context(mutual(), gateway)
    before = sum(1 for _ in Path("/proc/self/fd").iterdir())
    for _ in range(5):
        server_context(mutual(), gateway)
        with pytest.raises(IdentityError):
            server_context(ListenerTls(certificates=((b"x", b"y"),)), gateway)
    assert sum(1 for _ in Path("/proc/self/fd").iterdir()) == before
    assert "PRIVATE" not in repr(gateway.current) + str(gateway.current)


def test_root_rotation_keeps_both_sides_talking(authority: Authority) -> None:
    following = Authority.create("shop.example").trusting(authority.certificate)
    both = authority.trusting(following.certificate)
    old, new = StaticIdentity(both.issue(GATEWAY)), StaticIdentity(following.issue(WEB))
    server, client = mesh_pair(old, new)
    assert isinstance(seen(server), Peer)
    assert verify_upstream(client, MESH, [GATEWAY]) == GATEWAY


@pytest.mark.parametrize(
    ("tls", "proven"),
    [
        (UpstreamTls(mode="validate", hostname="api.example"), "api.example"),
        (UpstreamTls(mode="validate", hostname="API.example"), "API.example"),
        (UpstreamTls(mode="validate", hostname="x.wild.example"), "x.wild.example"),
        (UpstreamTls(mode="validate", hostname="127.0.0.1"), "127.0.0.1"),
        (UpstreamTls(mode="validate", sni="other.example", hostname="api.example"), "api.example"),
        (UpstreamTls(mode="validate", hostname="other.example", sans=(("DNS", "no.example"), ("URI", GATEWAY))), GATEWAY),
        (UpstreamTls(mode="validate", hostname="other.example", sans=(("DNS", "api.example"),)), "api.example"),
        (UpstreamTls(mode="validate", hostname="other.example"), ""),
        (UpstreamTls(mode="validate", hostname="x.y.wild.example"), ""),
        (UpstreamTls(mode="validate", hostname="wild.example"), ""),
        (UpstreamTls(mode="validate", hostname="api.example", sans=(("DNS", "other.example"),)), ""),
        (UpstreamTls(mode="validate", hostname="api.example", sans=(("URI", WEB),)), ""),
        (UpstreamTls(mode="validate", sni="api.example", hostname="other.example"), ""),
        (UpstreamTls(mode="validate"), ""),
    ],
)
def test_an_external_upstream_must_be_whom_the_policy_names(web: StaticIdentity, tls: UpstreamTls, proven: str) -> None:
    outside = Authority.create("outside.example")
    served = outside.issue("spiffe://outside.example/x", dns=["api.example", "*.wild.example"], ip=["127.0.0.1"])
    # The certificate names another SPIFFE ID too; only what the policy asks for counts.
    if any(kind == "URI" for kind, _ in tls.sans):
        shown = odd(outside, [GATEWAY]).current
        served = Identity(spiffe_id=GATEWAY, chain=shown.chain, key=shown.key, bundle=shown.bundle, not_before=0, not_after=shown.not_after)
    tls = UpstreamTls(mode="validate", sni=tls.sni, hostname=tls.hostname, sans=tls.sans, roots=outside.certificate)
    listener = server_context(ListenerTls(svid=True), StaticIdentity(served))
    try:
        _, client = shake(listener, client_context(tls, web), server_name(tls))
    except ssl.SSLError as error:
        assert not proven
        assert handshake_problem(error) == "wrong_name"
        return
    found = verify_upstream(client, tls)
    if proven:
        assert found == proven
    else:
        assert isinstance(found, IdentityProblem)
        assert found.reason == "wrong_name"


def test_our_certificate_is_shown_outside_only_when_told(web: StaticIdentity) -> None:
    outside = Authority.create("outside.example")
    served = StaticIdentity(outside.issue("spiffe://outside.example/x", dns=["api.example"]))
    validation = ClientValidation(mode="optional", source="roots", roots=web.current.bundle)
    listener = server_context(ListenerTls(svid=True, client=validation), served)
    for shown in (False, True):
        tls = UpstreamTls(mode="validate", hostname="api.example", roots=outside.certificate, present_svid=shown)
        server, _ = shake(listener, client_context(tls, web), "api.example")
        assert (server.getpeercert(True) is not None) is shown


def test_contexts_can_be_made_in_several_threads(gateway: StaticIdentity) -> None:
    failures: list[BaseException] = []

    def make() -> None:
        try:
            for _ in range(10):
                server_context(mutual(), gateway)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=make) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_without_an_identity_what_needs_one_says_so() -> None:
    certificate = Authority.create("shop.example").issue(GATEWAY)
    own = ListenerTls(certificates=((certificate.chain, certificate.key),))
    server_context(own, NoIdentity())
    for needs in (ListenerTls(svid=True), msgspec.structs.replace(own, client=ClientValidation())):
        with pytest.raises(IdentityError, match="--identity") as told:
            server_context(needs, NoIdentity())
        assert told.value.reason == "no_identity"
    client_context(UpstreamTls(mode="validate", hostname="bank.example"), NoIdentity())
    for upstream in (MESH, UpstreamTls(mode="validate", hostname="bank.example", present_svid=True)):
        with pytest.raises(IdentityError, match="--identity"):
            client_context(upstream, NoIdentity())
