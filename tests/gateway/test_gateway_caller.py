from __future__ import annotations

import pytest
from gateway_world import BATCH, INGRESS, MESH, WEB, XFCC, a_peer
from hypothesis import given
from hypothesis import strategies as st

from gateway.caller import caller_of, forwarded_for, namespace_of, vouch, vouched_principal
from mesh.model import MeshSettings
from mesh.peer import Caller
from mesh.refusals import BadHeader

ABOUT_BATCH = vouch(BATCH, "cd" * 32, INGRESS)
GATEWAY = a_peer(INGRESS)


@pytest.mark.parametrize(
    ("peer", "headers", "wanted"),
    [
        (a_peer(WEB), [], Caller(WEB)),
        (a_peer(WEB), [(XFCC, ABOUT_BATCH)], Caller(WEB)),
        (a_peer(""), [(XFCC, ABOUT_BATCH)], Caller("")),
        (GATEWAY, [(XFCC, ABOUT_BATCH)], Caller(BATCH, INGRESS)),
        (GATEWAY, [], Caller("", INGRESS)),
        (GATEWAY, [(XFCC, vouch("", "cd" * 32, INGRESS))], Caller("", INGRESS)),
    ],
)
def test_whom_a_request_is_decided_for(peer: object, headers: list[tuple[bytes, bytes]], wanted: Caller) -> None:
    assert caller_of(peer, headers, MESH) == wanted  # type: ignore[arg-type]


def test_a_mesh_with_an_empty_name_among_its_gateways_trusts_nobody() -> None:
    mesh = MeshSettings(trusted_gateways=frozenset(("",)))
    assert caller_of(a_peer(""), [(XFCC, ABOUT_BATCH)], mesh) == Caller("")


@pytest.mark.parametrize(
    "headers",
    [
        [(XFCC, ABOUT_BATCH), (XFCC, ABOUT_BATCH)],
        [(XFCC, ABOUT_BATCH + b"," + ABOUT_BATCH)],
        [(XFCC, ABOUT_BATCH + b";URI=" + WEB.encode())],
        [(XFCC, ABOUT_BATCH + b";")],
        [(XFCC, ABOUT_BATCH + b"\n")],
        [(XFCC, b"")],
        [(XFCC, b"URI=https://shop.example/ns/shop/sa/web")],
        [(XFCC, b"URI=spiffe://shop.example")],
        [(XFCC, b"URI=spiffe://shop.example/a/../b")],
        [(XFCC, b"URI=spiffe://Shop.example/a")],
        [(XFCC, b"URI=spiffe://shop.example/a b")],
        [(XFCC, b'URI="spiffe://shop.example/a')],
        [(XFCC, b"Nonsense=1;URI=" + WEB.encode())],
        [(XFCC, b"URI=spiffe://shop.example/" + b"a" * 20000)],
    ],
)
def test_a_trusted_gateway_that_says_odd_things_is_refused(headers: list[tuple[bytes, bytes]]) -> None:
    assert isinstance(caller_of(GATEWAY, headers, MESH), BadHeader)


def test_envoys_own_form_is_read() -> None:
    value = (
        b"By=spiffe://shop.example/ns/edge/sa/ingress;Hash=" + b"ab" * 32 + b';Subject="CN=web,O=\\"Shop\\"; Ltd";'
        b"URI=" + WEB.encode() + b";DNS=web.shop.example;DNS=www.shop.example"
    )
    assert vouched_principal(value) == WEB


SEGMENTS = st.lists(st.from_regex(r"[A-Za-z0-9_-]{1,8}", fullmatch=True), min_size=1, max_size=5)


@given(SEGMENTS, st.sampled_from(["", "ab" * 32]))
def test_what_is_vouched_is_read_back(segments: list[str], digest: str) -> None:
    principal = "spiffe://shop.example/" + "/".join(segments)
    value = vouch(principal, digest, INGRESS)
    assert vouched_principal(value) == principal
    assert not set(value) & set(b"\r\n\x00")


@given(
    st.binary(max_size=80)
    | st.lists(st.sampled_from([b"URI=", b"By=", WEB.encode(), b";", b",", b'"', b"\\", b" ", b"=", b"x"])).map(b"".join)
)
def test_no_header_gives_something_that_is_no_spiffe_id(value: bytes) -> None:
    principal = vouched_principal(value)
    assert not principal or (principal.startswith("spiffe://") and principal.isascii() and not set(principal) & set(' ,;="\\'))


@given(st.lists(st.tuples(st.sampled_from([XFCC, b"x-forwarded-for", b"cookie"]), st.sampled_from([ABOUT_BATCH, WEB.encode(), b"x"]))))
def test_headers_of_a_peer_that_is_no_gateway_never_change_the_caller(headers: list[tuple[bytes, bytes]]) -> None:
    assert caller_of(a_peer(WEB), headers, MESH) == Caller(WEB)
    assert caller_of(a_peer(""), headers, MESH) == Caller("")


@pytest.mark.parametrize(
    ("peer", "sent", "gateway", "header", "address"),
    [
        ("192.0.2.7", None, False, b"192.0.2.7", "192.0.2.7"),
        ("192.0.2.7", b"1.1.1.1", False, b"192.0.2.7", "192.0.2.7"),
        ("10.0.0.1", b"1.1.1.1", False, b"1.1.1.1, 10.0.0.1", "1.1.1.1"),
        ("10.0.0.1", b"6.6.6.6, 1.1.1.1", False, b"1.1.1.1, 10.0.0.1", "1.1.1.1"),
        ("10.0.0.1", b"6.6.6.6,1.1.1.1 , 10.0.0.9", False, b"1.1.1.1, 10.0.0.9, 10.0.0.1", "1.1.1.1"),
        ("10.0.0.1", b"unknown", False, b"10.0.0.1", "10.0.0.1"),
        ("10.0.0.1", b"fe80::1%x", False, b"10.0.0.1", "10.0.0.1"),
        ("10.0.0.1", b"10.0.0.2, 10.0.0.3", False, b"10.0.0.2, 10.0.0.3, 10.0.0.1", "10.0.0.2"),
        ("::ffff:10.0.0.1", b"2001:db8::1", False, b"2001:db8::1, ::ffff:10.0.0.1", "2001:db8::1"),
        ("127.0.0.1", b"192.0.2.7", True, b"192.0.2.7, 127.0.0.1", "192.0.2.7"),
        ("127.0.0.1", b"192.0.2.7, 127.0.0.2", True, b"192.0.2.7, 127.0.0.2, 127.0.0.1", "192.0.2.7"),
        ("127.0.0.1", None, True, b"127.0.0.1", "127.0.0.1"),
    ],
)
def test_where_a_client_is(peer: str, sent: bytes | None, gateway: bool, header: bytes, address: str) -> None:
    assert forwarded_for(a_peer(address=peer), sent, gateway, MESH) == (header, address)


@given(st.binary(max_size=200))
def test_nobody_but_a_proxy_writes_addresses(sent: bytes) -> None:
    assert forwarded_for(a_peer(address="192.0.2.7"), sent, False, MESH) == (b"192.0.2.7", "192.0.2.7")
    header, address = forwarded_for(a_peer(address="10.0.0.1"), sent, False, MESH)
    assert header.split(b",")[0].decode() == address
    assert header.endswith(b"10.0.0.1")
    assert not header.translate(None, b"0123456789abcdefABCDEF.:, ")


@pytest.mark.parametrize(
    ("principal", "wanted"),
    [
        (WEB, "shop"),
        ("spiffe://bank.example/ns/pay/sa/x", "bank.example/pay"),
        ("spiffe://shop.example/other", ""),
        ("", ""),
        ("spiffe://shop.example/x/ns/pay/sa/y", ""),
    ],
)
def test_namespaces(principal: str, wanted: str) -> None:
    assert namespace_of(principal, "shop.example") == wanted
