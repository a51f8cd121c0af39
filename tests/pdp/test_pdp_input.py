"""The input document: as the OPA-Envoy plugin makes it, and the same by both ways."""

from __future__ import annotations

import json
import re
import string
from typing import Any
from unittest import mock

import pytest
from envoy.service.auth.v3.external_auth_pb2 import CheckRequest
from google.protobuf.json_format import MessageToDict, ParseDict
from hypothesis import given, settings
from hypothesis import strategies as st
from kept_world import WEB, asking, policy

from identity.jwt import normal
from mesh.http import NO_HEAD
from mesh.peer import Caller, Peer
from mesh.policy import ReadSet
from mesh.questions import Asking
from pdp.body import PARTIAL, BodyError, parse_body
from pdp.input import check_request, document, document_of_check, document_tree
from pdp.target import TargetError, parse_query, split_target
from pdp.values import (
    _ALWAYS,
    _OF_REQUESTS,
    _TEXTS,
    ABSENT,
    BODY,
    HTTP,
    Values,
    at,
    defined_part,
    reader_of,
    reads_body,
    value_part,
    values_at,
    wanted_parts,
)


def read(made: Asking, **fields: Any) -> Any:
    return json.loads(document(made, policy(**fields)))


def test_a_whole_document() -> None:
    made = asking(
        method=b"POST",
        path=b"/orders/a%20b",
        query=b"lang=en&lang=de&x",
        headers=[(b"accept", b"*/*"), (b"x-a", b"1"), (b"x-a", b"2"), (b"cookie", b"a=b"), (b"cookie", b"c=d"), (b"x-request-id", b"r1")],
        via="spiffe://shop.example/ns/edge/sa/gw",
    )
    assert read(made) == {
        "attributes": {
            "source": {"address": {"socketAddress": {"address": "10.0.0.9", "portValue": 4000}}, "principal": WEB},
            "destination": {"address": {"socketAddress": {"address": "10.0.0.1", "portValue": 8443}}},
            "request": {
                "time": "2023-11-14T22:13:20.250Z",
                "http": {
                    "id": "r1",
                    "method": "POST",
                    "headers": {
                        ":authority": "shop.example",
                        ":method": "POST",
                        ":path": "/orders/a%20b?lang=en&lang=de&x",
                        ":scheme": "https",
                        "accept": "*/*",
                        "x-a": "1,2",
                        "cookie": "a=b; c=d",
                        "x-request-id": "r1",
                    },
                    "path": "/orders/a%20b?lang=en&lang=de&x",
                    "host": "shop.example",
                    "scheme": "https",
                    "protocol": "HTTP/1.1",
                },
            },
            "contextExtensions": {
                "gateway": "edge/ingress",
                "listener": "https",
                "route": "shop/orders#0",
                "template": "/orders/**",
                "service": "shop/orders",
                "via": "spiffe://shop.example/ns/edge/sa/gw",
            },
            "metadataContext": {},
        },
        "parsed_path": ["orders", "a b"],
        "parsed_query": {"lang": ["en", "de"], "x": [""]},
        "parsed_body": None,
        "truncated_body": False,
        "version": {"ext_authz": "v3", "encoding": "protojson"},
    }


def test_nobody_has_no_principal() -> None:
    attributes = read(asking(principal="", service=""))["attributes"]
    assert "principal" not in attributes["source"]
    assert "service" not in attributes["contextExtensions"]
    assert "via" not in attributes["contextExtensions"]


def test_a_client_cannot_write_pseudo_headers_or_say_that_a_body_was_cut() -> None:
    made = asking(headers=[(b":path", b"/admin"), (PARTIAL.encode(), b"true")])
    headers = read(made)["attributes"]["request"]["http"]["headers"]
    assert headers[":path"] == "/orders/1"
    assert PARTIAL not in headers


JSON_BODY = [(b"content-type", b"application/json")]


@given(st.text(string.ascii_letters + string.digits + "/.:;=&?#%+ -_~!$'()*,@\x00\x7fé", max_size=12))
def test_a_plain_target_is_taken_apart_as_any_other(target: str) -> None:
    def taken_apart() -> Any:
        try:
            return split_target(target)
        except TargetError as problem:
            return str(problem)

    quickly = taken_apart()
    with mock.patch("pdp.target._PLAIN", re.compile("(?!)")):
        assert taken_apart() == quickly


@pytest.mark.parametrize(
    ("body", "limit", "complete", "parsed", "truncated"),
    [
        (b'{"a": [1, 2.50, "x"]}', 100, True, {"a": [1, 2.5, "x"]}, False),
        (b"[1]", 0, True, None, False),
        (None, 100, True, None, False),
        (b"", 100, True, None, False),
        (b"[1, 2]", 4, True, None, True),
        (b"[1, 2]", 100, False, None, True),
    ],
)
def test_bodies(body: bytes | None, limit: int, complete: bool, parsed: Any, truncated: bool) -> None:
    made = asking(headers=JSON_BODY, body=body, complete=complete)
    got = read(made, body_limit=limit)
    assert (got["parsed_body"], got["truncated_body"]) == (parsed, truncated)
    assert json.loads(document_of_check(check_request(made, policy(body_limit=limit)))) == got


def test_a_body_that_is_no_text_is_raw() -> None:
    made = asking(headers=[(b"content-type", b"image/png")], body=b"\x89PNG")
    http = read(made, body_limit=10)["attributes"]["request"]["http"]
    assert (http["rawBody"], http["size"], http["headers"][PARTIAL], http.get("body")) == ("iVBORw==", 4, "false", None)


def test_numbers_of_a_body_keep_their_spelling() -> None:
    made = asking(headers=JSON_BODY, body=b'{"n": 12345678901234567890123, "f": 0.10000000000000000001}')
    assert b'"parsed_body":{"n":12345678901234567890123,"f":0.10000000000000000001}' in document(made, policy(body_limit=100))


@pytest.mark.parametrize("body", [b"{", b'{"a": 1} {"attributes": 1}', b'{"a": NaN}', b"[" * 20000, b"1" * 5000])
def test_a_body_that_is_no_json_is_an_error(body: bytes) -> None:
    with pytest.raises(ValueError, match="JSON"):
        document(asking(headers=JSON_BODY, body=body), policy(body_limit=100_000))


@pytest.mark.parametrize(
    ("kind", "length", "body", "expected"),
    [
        ("application/x-www-form-urlencoded", None, b"a=1&a=2&b=%41+x", ({"a": ["1", "2"], "b": ["A x"]}, False)),
        ("application/x-www-form-urlencoded", "100", b"a=1", (None, True)),
        ("application/json; charset=utf-8", "2", b"{}", ({}, False)),
        ("application/vnd.api+json", None, b"{}", (None, False)),
        ("application/grpc", None, b"\0\0\0\0\0", (None, False)),
        ("text/plain", None, b"x", (None, False)),
        (
            "multipart/form-data; boundary=xx",
            None,
            b'--xx\r\nContent-Disposition: form-data; name="a"\r\n\r\none\r\n'
            b'--xx\r\ncontent-disposition: form-data; name=b; filename="f"\r\nContent-Type: application/json\r\n\r\n{"k": 1}\r\n--xx--\r\n',
            ({"a": ["one"], "b": [{"k": 1}]}, False),
        ),
        ("multipart/form-data", None, b"--xx", (None, False)),
    ],
)
def test_parsed_bodies(kind: str, length: str | None, body: bytes, expected: tuple[Any, bool]) -> None:
    headers = {"content-type": kind} | ({"content-length": length} if length else {})
    assert parse_body(headers, body) == expected


@pytest.mark.parametrize(
    ("kind", "length", "body"),
    [
        ("application/json", "many", b"{}"),
        ("application/json", None, b'{"admin": false, "admin": true}'),
        ("application/json", None, b'{"a": [{"b": 1, "b": 1}]}'),
        ("application/x-www-form-urlencoded", None, b"a=%zz"),
        ("application/x-www-form-urlencoded", None, b"a=1;b=2"),
        ("multipart/form-data; boundary=xx", None, b"--xx\r\n\r\none"),
        ("multipart/form-data; boundary=xx", None, b"--xxy\r\n\r\none\r\n--xx--"),
        ("multipart/form-data; boundary=xx", None, b'--xx\r\nContent-Disposition: form-data; name="a"\r\none\r\n--xx--'),
    ],
)
def test_bodies_that_are_not_what_they_say(kind: str, length: str | None, body: bytes) -> None:
    headers = {"content-type": kind} | ({"content-length": length} if length else {})
    with pytest.raises((BodyError, TargetError)):
        parse_body(headers, body)


@pytest.mark.parametrize(
    ("target", "path", "query"),
    [
        ("/", [""], {}),
        ("/a/b", ["a", "b"], {}),
        ("/a/", ["a", ""], {}),
        ("/a%20b/c?x=1#f?y=2", ["a b", "c"], {"x": ["1"]}),
        ("///a", ["a"], {}),
        ("//host/a", ["a"], {}),
        ("/a+b?c+d=e+f", ["a+b"], {"c d": ["e f"]}),
        ("/?a=%zz&b=1&;c=2&d&=e&&f=1=2", [""], {"b": ["1"], "d": [""], "": ["e"], "f": ["1=2"]}),
        ("*", ["*"], {}),
        ("", [""], {}),
    ],
)
def test_targets(target: str, path: list[str], query: dict[str, list[str]]) -> None:
    assert split_target(target) == (path, query)


@pytest.mark.parametrize("target", ["/a%zz", "/a%2", "http://x/", "/a\x00", "/a?b=\x7f", "//h%zz/"])
def test_targets_that_go_does_not_take(target: str) -> None:
    with pytest.raises(TargetError):
        split_target(target)


def test_a_form_is_strict_where_a_query_is_not() -> None:
    assert parse_query("a=%zz&b=1", strict=False) == {"b": ["1"]}
    with pytest.raises(TargetError):
        parse_query("a=%zz&b=1", strict=True)


def test_a_check_without_http_is_none() -> None:
    with pytest.raises(ValueError, match=r"no attributes\.request\.http"):
        document_of_check(CheckRequest())


def a_connection(sni: str = "") -> Asking:
    peer = Peer(address="10.0.0.1", port=4711, local_address="10.0.0.2", local_port=5432, sni=sni)
    return Asking(NO_HEAD, peer, Caller("spiffe://shop.example/ns/shop/sa/web"), "edge/gw", "tcp", "shop/db#0", "", "shop/db", 1.5)


@pytest.mark.parametrize("sni", ["", "db.example"])
def test_a_connection_has_no_request(sni: str) -> None:
    tree = json.loads(document(a_connection(sni), policy()))
    expected = {
        "source": {
            "address": {"socketAddress": {"address": "10.0.0.1", "portValue": 4711}},
            "principal": "spiffe://shop.example/ns/shop/sa/web",
        },
        "destination": {"address": {"socketAddress": {"address": "10.0.0.2", "portValue": 5432}}},
        "contextExtensions": {"gateway": "edge/gw", "listener": "tcp", "route": "shop/db#0", "service": "shop/db"},
        "metadataContext": {},
    } | ({"tlsSession": {"sni": sni}} if sni else {})
    assert tree == {
        "attributes": expected,
        "parsed_path": [""],
        "parsed_query": {},
        "parsed_body": None,
        "truncated_body": False,
        "version": {"ext_authz": "v3", "encoding": "protojson"},
    }
    assert json.loads(document_of_check(check_request(a_connection(sni), policy()))) == tree


@pytest.mark.parametrize("path", sorted(_ALWAYS | _OF_REQUESTS | set(_TEXTS), key=str))
def test_every_short_way_reads_a_connection_as_the_document_has_it(path: tuple[str | int, ...]) -> None:
    made = a_connection("db.example")
    there = at(document_tree(made, policy()), path)
    assert values_at(made, policy(), ReadSet(values=(path,))) == (value_part(there),)
    if path not in _ALWAYS:
        assert values_at(made, policy(), ReadSet(defined=(path,))) == (defined_part(there),)
    else:
        assert there is not ABSENT


def test_what_envoy_sends() -> None:
    """Fields that our gateways don't send come through as JSON of protobuf has them."""
    attributes = {
        "source": {"address": {"pipe": {"path": "/x"}}, "service": "s", "labels": {"a": "b"}, "certificate": "c"},
        "destination": {"address": {"socketAddress": {"address": "::1", "portValue": 1, "protocol": "UDP"}}, "principal": "p"},
        "request": {
            "time": "2024-01-01T00:00:00.123456789Z",
            "http": {
                "method": "GET",
                "path": "/a?b=c",
                "query": "q",
                "fragment": "f",
                "size": "7",
                "headerMap": {"headers": [{"key": "a", "value": "b"}]},
            },
        },
        "contextExtensions": {"x": ""},
        "metadataContext": {"filterMetadata": {"envoy.filters.http.jwt_authn": {"sub": "me", "n": 5}}},
        "routeMetadataContext": {},
        "tlsSession": {"sni": "shop.example"},
    }
    request = ParseDict({"attributes": attributes}, CheckRequest())
    expected = MessageToDict(request)["attributes"]
    expected["request"]["http"]["size"] = 7
    got = json.loads(document_of_check(request))
    assert got["attributes"] == expected
    assert (got["parsed_path"], got["parsed_query"]) == (["a"], {"b": ["c"]})


def test_the_claims_of_a_token_are_where_istio_has_them() -> None:
    made = asking(claims={"sub": "alice", "roles": ["a"]})
    assert read(made)["attributes"]["metadataContext"] == {
        "filterMetadata": {"envoy.filters.http.jwt_authn": {"payload": {"sub": "alice", "roles": ["a"]}}}
    }


# Both ways, and the short ways to a value

segment = st.text(string.ascii_letters + string.digits + "-._~!$&'()*+,=:@", min_size=1, max_size=4).filter(
    lambda text: text not in (".", "..")
)
escaped = st.sampled_from(["%20", "%C3%A9", "%25", "%3F", "%23", "a%2Bb"])
paths = st.lists(segment | escaped, max_size=4).map(lambda parts: ("/" + "/".join(parts)).encode())
queries = st.none() | st.text("ab=&%+;41", max_size=12).map(str.encode)
names = st.sampled_from([b"x-a", b"x-b", b"cookie", b"accept", b"content-type", b"content-length", b"x-request-id", PARTIAL.encode()])
values = st.sampled_from([b"", b"a", b"b", b"\xff\xfe", "é".encode(), b"application/json", b"text/plain", b"3"])
numbers = st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)
scalars = st.none() | st.booleans() | numbers | st.text(max_size=4)
claims = st.dictionaries(
    st.sampled_from(["sub", "roles", "aud", "x"]),
    scalars | st.lists(scalars, max_size=2) | st.dictionaries(st.sampled_from(["a", "0"]), scalars),
).map(normal)
requests = st.builds(
    asking,
    method=st.sampled_from([b"GET", b"POST"]),
    path=paths,
    query=queries,
    headers=st.lists(st.tuples(names, values), max_size=5),
    principal=st.sampled_from(["", WEB]),
    via=st.sampled_from(["", WEB]),
    gateway=st.sampled_from(["", "edge/ingress"]),
    service=st.sampled_from(["", "shop/orders"]),
    authority=st.sampled_from([b"shop.example", b"shop.example:8443", b""]),
    received=st.sampled_from([0.0, 1.0, 1.5, 1_700_000_000.123456]),
    port=st.sampled_from([0, 1]),
    body=st.sampled_from([None, b"", b"{}", b"{}x", b"\xff", b"[1, 2]"]),
    complete=st.booleans(),
    claims=st.none() | claims,
)
policies = st.builds(policy, body_limit=st.sampled_from([0, 2, 100]))


@settings(deadline=None)
@given(requests, policies)
def test_both_ways_give_the_same_document(made: Asking, asked: Any) -> None:
    try:
        direct: Any = json.loads(document(made, asked))
    except ValueError as problem:
        with pytest.raises(type(problem)):
            document_of_check(CheckRequest.FromString(check_request(made, asked).SerializeToString()))
        return
    assert json.loads(document_of_check(CheckRequest.FromString(check_request(made, asked).SerializeToString()))) == direct


EXTENSIONS = ("attributes", "contextExtensions")
TOKEN = ("attributes", "metadataContext", "filterMetadata", "envoy.filters.http.jwt_authn", "payload")
SHORT = [
    ("attributes", "source", "principal"),
    ("attributes", "source", "address", "socketAddress", "address"),
    *((*HTTP, name) for name in ("method", "path", "host", "scheme", "protocol")),
    *((*HTTP, "headers", name) for name in ("x-a", "cookie", "accept", "nope")),
    *((*EXTENSIONS, name) for name in ("gateway", "listener", "route", "template", "service", "via")),
    ("parsed_path",),
    *(("parsed_path", index) for index in range(4)),
    ("parsed_query",),
    ("parsed_query", "a"),
    ("parsed_query", "a", 0),
    ("parsed_query", "a", 1),
    ("attributes", "metadataContext"),
    ("attributes", "metadataContext", "filterMetadata"),
    TOKEN[:-1],
    TOKEN,
    *((*TOKEN, name) for name in ("sub", "roles", "aud", "nope")),
    (*TOKEN, "roles", 0),
    (*TOKEN, "roles", "a"),
    (*TOKEN, "x", "0"),
    (*TOKEN, "sub", "a"),
]
LONG = [
    (),
    ("attributes", "request", "time"),
    ("attributes", "source", "address", "socketAddress", "portValue"),
    (*HTTP, "id"),
    (*HTTP, "headers"),
    (*HTTP, "headers", ":path"),
    (*HTTP, "headers", PARTIAL),
    EXTENSIONS,
    (*EXTENSIONS, "nope"),
    ("parsed_path", "0"),
    ("parsed_query", "a", "0"),
    ("version", "encoding"),
    ("nope",),
]
EVERY = ReadSet(values=(*SHORT, *LONG), lengths=(*SHORT, *LONG), kinds=(*SHORT, *LONG), defined=(*SHORT, *LONG))


@pytest.mark.parametrize("path", SHORT)
def test_there_is_a_short_way(path: tuple[str | int, ...]) -> None:
    assert reader_of(path) is not None


@settings(deadline=None)
@given(requests)
def test_the_short_way_reads_what_the_document_has(made: Asking) -> None:
    tree = json.loads(document(made, policy()))
    for path in SHORT:
        reader = reader_of(path)
        assert reader is not None
        assert reader(made) == at(tree, path), path
    single = [read_one(made, policy()) for read_one in ALONE]
    assert [parts for parts in single if parts] == [
        (part(at(document_tree(made, policy()), path)),) for path, part in wanted_parts(EVERY) if not always(path, part)
    ]
    assert sorted(Values(EVERY)(made, policy()), key=repr) == sorted((parts[0] for parts in single if parts), key=repr)


ALONE = [Values(ReadSet(**{kind: (path,)})) for kind in ("values", "lengths", "kinds", "defined") for path in getattr(EVERY, kind)]


def always(path: tuple[str | int, ...], part: Any) -> bool:
    """Left out of the key, since every document has it."""
    return part is defined_part and not Values(ReadSet(defined=(path,)))(asking(), policy())


@settings(deadline=None)
@given(requests, policies)
def test_what_is_left_out_of_keys_is_always_there(made: Asking, asked: Any) -> None:
    try:
        tree = document_tree(made, asked)
    except ValueError:
        return
    for path in (*SHORT, *LONG, ("attributes", "destination"), ("parsed_body",), ("truncated_body",), ("version",)):
        if always(path, defined_part):
            assert at(tree, path) is not ABSENT, path


def test_values_are_never_equal_across_types() -> None:
    """In Python 1 == 1.0 == True; in a key they are not."""
    made = asking(query=b"a=1")
    parts = values_at(made, policy(), ReadSet(values=(("parsed_query", "a", 0), ("truncated_body",), ("parsed_body",), ("nope",))))
    assert parts == ("1", b"false", b"null", None)


@pytest.mark.parametrize("path", [*BODY, (), ("attributes",), HTTP, (*HTTP, "headers"), ("parsed_body", "a", 0)])
def test_reads_of_the_body(path: tuple[str | int, ...]) -> None:
    assert reads_body(ReadSet(values=(path,)))
    assert reads_body(ReadSet(defined=(path,)))


def test_reads_beside_the_body() -> None:
    assert not reads_body(ReadSet(values=(("attributes", "source"), (*HTTP, "method"), ("parsed_path", 0))))
