from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from identity.problems import IdentityError
from identity.spiffe import SpiffeId

SEGMENT = st.text(string.ascii_letters + string.digits + ".-_", min_size=1, max_size=20).filter(lambda s: s not in {".", ".."})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "https://shop.example/ns/a/sa/b",
        "SPIFFE://shop.example/a",
        "spiffe:/shop.example/a",
        "spiffe://",
        "spiffe:///a",
        "spiffe://Shop.example/a",
        "spiffe://shop.example:8443/a",
        "spiffe://user@shop.example/a",
        "spiffe://shop.example/",
        "spiffe://shop.example/a/",
        "spiffe://shop.example//a",
        "spiffe://shop.example/a/./b",
        "spiffe://shop.example/a/../b",
        "spiffe://shop.example/a%2fb",
        "spiffe://shop.example/a?b",
        "spiffe://shop.example/a#b",
        "spiffe://shop.example/é",
        "spiffe://shop.example/a b",
        "spiffe://shop.example/a\x00",
        "spiffe://shop.example/a\n",
        "spiffe://" + "a" * 256 + "/a",
        "spiffe://shop.example/" + "a" * 2048,
        " spiffe://shop.example/a",
        "spiffe://ſhop.example/a",
        "spiffe://shop.example/\udcff",
    ],
)
def test_what_is_not_a_spiffe_id_is_refused(text: str) -> None:
    with pytest.raises(IdentityError) as caught:
        SpiffeId.parse(text)
    assert caught.value.reason == "bad_spiffe_id"


def test_a_workload_is_named_by_namespace_and_service_account() -> None:
    found = SpiffeId.parse("spiffe://shop.example/ns/shop/sa/web")
    assert (found.trust_domain, found.namespace, found.service_account) == ("shop.example", "shop", "web")
    assert found == SpiffeId.workload("shop.example", "shop", "web")


@pytest.mark.parametrize("path", ["/a", "/ns/shop", "/ns/shop/sa/web/more", "/x/shop/sa/web", ""])
def test_other_paths_have_no_namespace(path: str) -> None:
    found = SpiffeId.parse(f"spiffe://shop.example{path}")
    assert (found.namespace, found.service_account) == ("", "")


@pytest.mark.parametrize(("namespace", "account"), [("", "web"), ("shop", ""), ("a/sa/b", "web"), ("..", "web"), ("shop", "we b")])
def test_a_workload_cannot_be_named_into_another_path(namespace: str, account: str) -> None:
    with pytest.raises(IdentityError):
        SpiffeId.workload("shop.example", namespace, account)


@given(st.lists(SEGMENT, max_size=6))
def test_an_id_reads_back_as_it_is_written(segments: list[str]) -> None:
    text = "spiffe://shop.example" + "".join(f"/{segment}" for segment in segments)
    assert str(SpiffeId.parse(text)) == text


@given(st.text(max_size=80))
def test_any_text_is_read_or_refused(text: str) -> None:
    for candidate in (text, f"spiffe://{text}", f"spiffe://shop.example/{text}"):
        try:
            found = SpiffeId.parse(candidate)
        except IdentityError:
            continue
        assert str(found) == candidate
