"""The table of kept decisions: its keys, its bounds, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
from kept_world import asking, policy

from mesh.policy import EntryPoint, ReadSet
from mesh.questions import Decision, Verdict
from pdp.kept import KeptDecisions, why_not
from pdp.values import HTTP

ALLOW = Decision(verdict=Verdict.ALLOW, rule="r")
METHOD = ReadSet(values=((*HTTP, "method"),))


def point(reads: ReadSet = METHOD, digest: str = "d1", **fields: Any) -> EntryPoint:
    return EntryPoint(**{"path": "shop.authz.decision", "digest": digest, "reads": reads, **fields})


def test_kept_until_it_is_forgotten() -> None:
    kept, mine, entry = KeptDecisions(), policy(), point()
    key = kept.key_for(asking(), mine, entry)
    assert key is not None
    assert kept.get(key, 0.0) is None
    assert kept.put(key, ALLOW, 0.0, None)
    found = kept.get(kept.key_for(asking(path=b"/other"), mine, entry), 1e9)
    assert found is not None
    assert (found.kept, found.rule, found.verdict) == (True, "r", Verdict.ALLOW)
    assert kept.get(kept.key_for(asking(method=b"POST"), mine, entry), 0.0) is None
    assert (kept.hits, kept.misses, len(kept)) == (1, 2, 1)
    kept.clear()
    assert (len(kept), kept.bytes) == (0, 0)
    assert kept.get(key, 0.0) is None


def test_kept_for_as_long_as_its_author_lets_it() -> None:
    kept = KeptDecisions()
    kept.put("k", ALLOW, 10.0, 5.0)
    assert kept.get("k", 14.999) is not None
    assert kept.get("k", 15.0) is None
    assert (kept.expired, kept.bytes, len(kept)) == (1, 0, 0)


@pytest.mark.parametrize(
    "other",
    [
        (policy(), point(digest="d2")),
        (policy(decision="x"), point(path="x")),
        (policy(body_limit=10), point()),
        (policy(body_limit=10, body_partial=True), point()),
        (policy(body_limit=11), point()),
    ],
)
def test_keys_of_other_questions_differ(other: tuple[Any, Any]) -> None:
    kept = KeptDecisions()
    keys = {kept.key_for(asking(), policy(), point()), kept.key_for(asking(), *other)}
    assert len(keys) == 2
    assert None not in keys


def test_keys_of_other_engines_differ() -> None:
    assert KeptDecisions(engine="a").key_for(asking(), policy(), point()) != KeptDecisions(engine="b").key_for(asking(), policy(), point())


def test_keys_do_not_depend_on_how_the_policy_is_attached_or_on_the_revision() -> None:
    kept = KeptDecisions()
    one = kept.key_for(asking(), policy(level="mesh", timeout=0.1), point())
    assert one == kept.key_for(asking(), policy(level="route", name="other/name", place="Local", shadow=True), point())


@pytest.mark.parametrize(
    ("asked", "entry", "why"),
    [
        (policy(), point(), ""),
        (policy(provider="authz:9000", decision=""), point(), "provider"),
        (policy(), point(ReadSet(volatile=("time.now_ns",))), "volatile"),
        (policy(), point(ReadSet(volatile=("time.now_ns",)), ttl=1.0), ""),
        (policy(body_limit=10), point(), ""),
        (policy(body_limit=10), point(ReadSet(values=(("parsed_body", "a"),))), "body"),
        (policy(body_limit=10), point(ReadSet(values=((),))), "body"),
        (policy(body_limit=10), point(ReadSet(lengths=((*HTTP, "body"),))), "body"),
        (policy(), point(ReadSet(values=(("parsed_body", "a"),))), ""),
    ],
)
def test_what_is_not_kept(asked: Any, entry: EntryPoint, why: str) -> None:
    assert why_not(asked, entry) == why
    kept = KeptDecisions()
    assert (kept.key_for(asking(body=b"{}"), asked, entry) is None) == bool(why)
    counted = {"volatile": kept.refused_volatile, "body": kept.refused_body, "provider": kept.refused_provider}
    assert [reason for reason, count in counted.items() if count] == ([why] if why else [])


def test_a_request_without_a_document_has_no_key() -> None:
    kept = KeptDecisions()
    made = asking(headers=[(b"content-type", b"application/json")], body=b"{")
    entry = point(ReadSet(values=(("attributes", "request", "time"),)))
    assert kept.key_for(made, policy(body_limit=10), entry) is None
    assert kept.refused_document == 1


def test_errors_are_not_kept() -> None:
    kept = KeptDecisions()
    assert not kept.put("k", Decision(verdict=Verdict.ERROR), 0.0, None)
    assert kept.get("k", 0.0) is None
    assert kept.refused_error == 1


def test_denials_are() -> None:
    kept = KeptDecisions()
    kept.put("k", Decision(verdict=Verdict.DENY, status=401), 0.0, None)
    found = kept.get("k", 0.0)
    assert found is not None
    assert found.status == 401


class Colliding(str):
    """A text whose hash is that of every other."""

    __slots__ = ()

    def __hash__(self) -> int:
        return 7


def test_a_collision_of_hashes_is_not_a_hit() -> None:
    kept = KeptDecisions()
    ours, others = ("p", Colliding("ann")), ("p", Colliding("eve"))
    assert hash(ours) == hash(others)
    kept.put(ours, Decision(verdict=Verdict.ALLOW), 0.0, None)
    assert kept.get(others, 0.0) is None
    kept.put(others, Decision(verdict=Verdict.DENY), 0.0, None)
    for key, verdict in ((ours, Verdict.ALLOW), (others, Verdict.DENY)):
        found = kept.get(key, 0.0)
        assert found is not None
        assert found.verdict is verdict


def test_the_one_used_longest_ago_goes_first() -> None:
    kept = KeptDecisions(max_entries=2)
    kept.put("a", ALLOW, 0.0, None)
    kept.put("b", ALLOW, 0.0, None)
    assert kept.get("a", 0.0) is not None
    kept.put("c", ALLOW, 0.0, None)
    assert [name for name in "abc" if kept.get(name, 0.0)] == ["a", "c"]
    assert kept.evicted == 1


def test_bytes_are_bounded() -> None:
    kept = KeptDecisions(max_entries=1000, max_bytes=64 << 10)
    for number in range(200):
        kept.put(("k", str(number)), Decision(verdict=Verdict.DENY, body=b"x" * 2000), 0.0, None)
        assert kept.bytes <= 64 << 10
    assert 0 < len(kept) < 40
    assert not kept.put("large", Decision(verdict=Verdict.DENY, body=b"x" * 10_000), 0.0, None)
    assert kept.refused_size == 1
    assert kept.get("large", 0.0) is None


def test_putting_again_replaces() -> None:
    kept = KeptDecisions()
    kept.put("k", Decision(verdict=Verdict.DENY, body=b"x" * 100), 0.0, None)
    kept.put("k", ALLOW, 0.0, None)
    found = kept.get("k", 0.0)
    assert found is not None
    assert found.verdict is Verdict.ALLOW
    before = kept.bytes
    kept.put("k", ALLOW, 0.0, None)
    assert kept.bytes == before


def test_key_makers_are_bounded() -> None:
    kept = KeptDecisions()
    for number in range(10_000):
        assert kept.key_for(asking(), policy(), point(digest=str(number))) is not None
    assert len(kept._keyers) <= 4096


@pytest.mark.parametrize("bounds", [{"max_entries": 0}, {"max_bytes": 0}])
def test_bounds_are_checked(bounds: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="keep nothing"):
        KeptDecisions(**bounds)
