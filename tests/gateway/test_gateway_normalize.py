from __future__ import annotations

import posixpath

import pytest
from gateway_world import a_head
from hypothesis import given
from hypothesis import strategies as st

from gateway.normalize import LONGEST_HOST, normal_authority, normal_path, normalize
from mesh.refusals import BadHeader, BadPath, BadRequest, MethodNotAllowed

ALIKE = [
    (b"/", b"/"),
    (b"/a/b", b"/a/b"),
    (b"/a/b/", b"/a/b/"),
    (b"//a///b", b"/a/b"),
    (b"/a//", b"/a/"),
    (b"/a/./b", b"/a/b"),
    (b"/a/.", b"/a/"),
    (b"/a/b/..", b"/a/"),
    (b"/a/b/../", b"/a/"),
    (b"/a/../../../b", b"/b"),
    (b"/..", b"/"),
    (b"/a//../b", b"/b"),
    (b"/%61%2e%2E/b", b"/a../b"),
    (b"/a/%2e%2e/b", b"/b"),
    (b"/a/%2e/b", b"/a/b"),
    (b"/%7Euser", b"/~user"),
    (b"/a%c3%a9", b"/a%C3%A9"),
    (b"/%252e%252e/a", b"/%252e%252e/a"),
    (b"/a%20b", b"/a%20b"),
    (b"/a|b", b"/a%7Cb"),
    (b"/a[1]", b"/a%5B1%5D"),
    (b"/a;v=1/b", b"/a;v=1/b"),
    (b"/a%3Bv", b"/a%3Bv"),
    (b"/.../a", b"/.../a"),
    (b"/.hidden", b"/.hidden"),
    (b"/a=b&c@d:e!$'()*+,", b"/a=b&c@d:e!$'()*+,"),
]

REFUSED = [
    b"",
    b"*",
    b"a/b",
    b"http://x/",
    b"/a%2fb",
    b"/a%2Fb",
    b"/a\\b",
    b"/a%5cb",
    b"/a%00",
    b"/a%0d%0ab",
    b"/a%7f",
    b"/a%",
    b"/a%2",
    b"/a%zz",
    b"/a%%41",
    b"/a b",
    b"/a\tb",
    b"/a\x00b",
    b"/a\x7fb",
    b"/a#b",
    b"/caf\xc3\xa9",
    b"/%c0%af",
    b"/%c0%ae%c0%ae/",
    b"/%ff",
    b"/%ed%a0%80",
    b"/a/..;/b",
    b"/a/.;x/b",
    b"/;x",
    b"/a/..%3b/b",
    b"/%2e%2e;/b",
    b"/a/;/b",
]


@pytest.mark.parametrize(("sent", "wanted"), ALIKE)
def test_spellings_of_one_path_become_one(sent: bytes, wanted: bytes) -> None:
    head = a_head(sent)
    assert normalize(head) is None
    assert head.path == wanted
    assert head.query is None
    assert head.target == sent


@pytest.mark.parametrize("sent", REFUSED)
def test_what_can_be_read_in_two_ways_is_refused(sent: bytes) -> None:
    refusal = normalize(a_head(sent))
    assert isinstance(refusal, BadPath)
    assert refusal.status == 400
    assert refusal.reason


def test_the_query_is_left_as_sent() -> None:
    head = a_head(b"/a?b=%2f..;//&c?d")
    assert normalize(head) is None
    assert (head.path, head.query) == (b"/a", b"b=%2f..;//&c?d")
    head = a_head(b"/a?")
    assert normalize(head) is None
    assert head.query == b""
    for query in (b" ", b"\t", b"a\x00", b"\x80", b"#"):
        assert isinstance(normalize(a_head(b"/a?" + query)), BadPath)


def test_dots_in_the_query_change_no_path() -> None:
    head = a_head(b"/public?/../admin")
    assert normalize(head) is None
    assert head.path == b"/public"


@pytest.mark.parametrize(
    ("sent", "wanted"),
    [
        (b"shop.example", b"shop.example"),
        (b"Shop.Example:8443", b"shop.example:8443"),
        (b"shop.example.", b"shop.example"),
        (b"shop.example.:80", b"shop.example:80"),
        (b"shop.example:", b"shop.example"),
        (b"127.0.0.1:80", b"127.0.0.1:80"),
        (b"[::1]:80", b"[::1]:80"),
        (b"[2001:DB8::1]", b"[2001:db8::1]"),
        (b"shop.example:65535", b"shop.example:65535"),
        (b"", None),
        (b".", None),
        (b"..", None),
        (b"shop.example..", None),
        (b":80", None),
        (b"shop.example:65536", None),
        (b"shop.example:x", None),
        (b"shop.example:-1", None),
        (b"shop.example:000000", None),
        (b"a@shop.example", None),
        (b"shop.example/x", None),
        (b"shop example", None),
        (b"shop,example", None),
        (b"[::1", None),
        (b"[::1]x", None),
        (b"[::1%eth0]", None),
        (b"a" * 254, None),
        (b"a" * 253, b"a" * 253),
    ],
)
def test_authorities(sent: bytes, wanted: bytes | None) -> None:
    assert normal_authority(sent) == wanted
    head = a_head(b"/", authority=sent)
    refusal = normalize(head)
    if wanted is None:
        assert isinstance(refusal, BadRequest)
        assert refusal.close
    else:
        assert refusal is None
        assert head.authority == wanted


@pytest.mark.parametrize("method", [b"CONNECT", b"TRACE"])
def test_methods_that_nothing_serves(method: bytes) -> None:
    assert isinstance(normalize(a_head(b"/", method)), MethodNotAllowed)


def test_names_with_underscores_end_at_the_edge_only() -> None:
    headers = [(b"x_real_ip", b"1")]
    assert isinstance(normalize(a_head(b"/", headers=headers)), BadHeader)
    assert normalize(a_head(b"/", headers=headers), edge=False) is None


PIECES = [
    *(b"/", b"//", b".", b"..", b";", b"a", b"B", b"|", b"~", b"?", b"\\", b"\xc3"),
    *(b"%2e", b"%2E%2e", b"%61", b"%41", b"%c3%a9", b"%25", b"%3b", b"%20", b"%2", b"%2f", b"%c0%af", b"%00"),
]
ODD = st.lists(st.sampled_from(PIECES), max_size=14).map(lambda parts: b"/" + b"".join(parts).partition(b"?")[0])


@given(ODD | st.binary(max_size=30).map(lambda tail: b"/" + tail.partition(b"?")[0]))
def test_the_one_form_is_safe_and_stays(path: bytes) -> None:
    normal = normal_path(path)
    if isinstance(normal, BadPath):
        return
    assert normal_path(normal) == normal
    assert normal.startswith(b"/")
    assert b"//" not in normal
    assert b"\\" not in normal
    assert all(0x20 < byte < 0x7F for byte in normal)
    assert not {b".", b".."} & set(normal.split(b"/"))
    lower = normal.lower()
    assert not any(escape in lower for escape in (b"%2f", b"%5c", b"%00", b"%0a", b"%0d", b"%2e", b"%7f"))
    # A server that resolves the path once more, with parameters cut off, stays where it is.
    bare = b"/".join(segment.partition(b";")[0] for segment in normal.split(b"/"))
    assert posixpath.normpath(bare.decode()).rstrip("/") == bare.decode().rstrip("/") or bare == b"/"


@given(ODD)
def test_normalize_agrees_with_normal_path(path: bytes) -> None:
    """The quick way past a path that needs no change takes no path that needs one."""
    head = a_head(path)
    refusal = normalize(head)
    wanted = normal_path(path)
    if isinstance(wanted, BadPath):
        assert isinstance(refusal, BadPath)
    else:
        assert refusal is None
        assert head.path == wanted


@given(st.text("aA.-_0:[]f@ \x00é", max_size=12).map(str.encode) | st.binary(max_size=LONGEST_HOST + 10))
def test_authorities_have_one_form(authority: bytes) -> None:
    head = a_head(b"/", authority=authority)
    refusal = normalize(head)
    wanted = normal_authority(authority)
    if wanted is None:
        assert refusal is not None
        return
    assert refusal is None
    assert head.authority == wanted == normal_authority(wanted) == wanted.lower()
