"""What needs no server: what the answers on a watch mean, keys, addresses, instances, and the tables behind an `EtcdSource`."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from aetcd import rpc
from discovery_world import Receiver, an_instance, body, key
from hypothesis import given
from hypothesis import strategies as st

from discovery.address import EtcdAddress, parse_etcd_url
from discovery.contents import Contents, encoded
from discovery.etcd import Entry, EtcdCompacted, EtcdDenied, EtcdOtherHistory, EtcdTooLarge, EtcdUnavailable, Listing
from discovery.instances import name_of, read_instance, write_instance
from discovery.keys import (
    WATCHED,
    config_key,
    config_prefix,
    end_of,
    instance_key,
    read_config_key,
    read_instance_key,
    read_report_key,
    report_key,
)
from discovery.watch import Batch, Stream, check_history
from mesh.backoff import Backoff
from mesh.documents import Instance, Key

# -- the answers on a watch --------------------------------------------------------------------------------------------------------


def answer(*revisions: int, header: int = 0, **more: Any) -> Any:
    """A WatchResponse with one event for each revision."""
    made = rpc.WatchResponse(**more)
    made.header.revision = header or max(revisions, default=0)
    for revision in revisions:
        event = made.events.add()
        event.kv.key, event.kv.value, event.kv.mod_revision = b"k%d" % revision, b"v", revision
    return made


def revisions(batch: Batch | None) -> list[int] | None:
    return None if batch is None else [event.revision for event in batch.events]


def test_resumes_behind_the_last_event_and_never_behind_a_header() -> None:
    stream = Stream(5)
    assert stream.take(answer(header=100, created=True)) is None
    assert (stream.revision, stream.reached) == (5, 5), "events from 6 to 100 may follow"
    assert revisions(stream.take(answer(6, 7, 7, header=100))) == [6, 7, 7]
    assert (stream.revision, stream.reached) == (7, 7)
    assert stream.take(answer(header=100)) is None
    assert (stream.revision, stream.reached) == (7, 100), "a progress answer says how far it has seen, not from where to resume"
    assert revisions(stream.take(answer(7, 101, header=101))) == [101], "nothing twice"


def test_fragments_are_put_together() -> None:
    stream = Stream(5)
    assert stream.take(answer(6, 7, fragment=True)) is None
    assert stream.take(answer(7, fragment=True)) is None
    assert stream.revision == 5, "a break now begins with 6 again"
    assert revisions(stream.take(answer(8))) == [6, 7, 7, 8]
    assert revisions(stream.take(answer(9))) == [9]


def test_deletions() -> None:
    made = answer(6)
    made.events[0].type = 1
    batch = Stream(5).take(made)
    assert batch is not None and batch.events[0].value is None


@pytest.mark.parametrize(
    ("made", "error"),
    [
        (answer(compact_revision=9, canceled=True), EtcdCompacted),
        (answer(canceled=True, cancel_reason="rpc error: code = PermissionDenied desc = etcdserver: permission denied"), EtcdDenied),
        (answer(canceled=True, created=True, cancel_reason="invalid auth token"), EtcdUnavailable),
        (answer(canceled=True), EtcdUnavailable),
    ],
)
def test_the_end_of_a_stream(made: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        Stream(5).take(made)


def test_too_much_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("discovery.watch.MOST_BYTES", 10)
    with pytest.raises(EtcdTooLarge):
        Stream(0).take(answer(*range(1, 20), fragment=True))


@pytest.mark.parametrize(
    ("now", "fine"),
    [
        (Listing(100, 1, (), 3), True), (Listing(100, 1, (), 4), True), (Listing(99, 1, (), 3), False), (Listing(200, 2, (), 9), False),
        (Listing(200, 1, (), 2), False),
    ],
)  # fmt: skip
def test_history(now: Listing, fine: bool) -> None:
    last = Listing(90, 1, (), 3)
    if fine:
        check_history(last, now, 100)
    else:
        with pytest.raises(EtcdOtherHistory):
            check_history(last, now, 100)


# -- keys, addresses, instances ----------------------------------------------------------------------------------------------------

PART = st.from_regex(r"[A-Za-z0-9]([A-Za-z0-9._:-]{0,20}[A-Za-z0-9])?", fullmatch=True)


@given(PART | st.just(""), PART, PART | st.just(""), PART)
def test_config_keys_round(group: str, kind: str, namespace: str, name: str) -> None:
    made = Key("" if group == "core" else group, kind, namespace, name)
    raw = config_key(made)
    assert read_config_key(raw) == made
    assert WATCHED[0] <= raw < WATCHED[1] and read_instance_key(raw) is None
    assert raw.startswith(config_prefix(made.group, kind, namespace)) and raw < end_of(config_prefix(made.group))


@given(PART, PART, PART)
def test_other_keys_round(one: str, two: str, three: str) -> None:
    assert read_instance_key(instance_key((one, two, three))) == (one, two, three)
    assert WATCHED[0] <= instance_key((one, two, three)) < WATCHED[1]
    assert read_report_key(report_key(one, two, three)) == (one, two, three)
    assert not WATCHED[0] <= report_key(one, two, three) < WATCHED[1], "what gateways report is not configuration"


@given(st.binary())
def test_any_key_is_read_or_refused(raw: bytes) -> None:
    for read in (read_config_key, read_instance_key, read_report_key):
        for prefix in (b"", b"/tollhouse/config/", b"/tollhouse/services/"):
            read(prefix + raw)


@pytest.mark.parametrize("name", ["", "-", "a/b", "../x", "a b", "ä", "-a", "a" * 254, "a\n"])
def test_names_that_can_not_be_part_of_a_key(name: str) -> None:
    with pytest.raises(ValueError, match="name"):
        instance_key(("shop", "cart", name))


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("etcd://a,b:1", EtcdAddress(endpoints=("a:2379", "b:1"))),
        ("http://[::1]:5/", EtcdAddress(endpoints=("[::1]:5",))),
        ("etcds://a?ca=/x/ca.pem", EtcdAddress(endpoints=("a:2379",), tls=True, ca=Path("/x/ca.pem"))),
        ("etcd://me%40x@a?password-file=/p", EtcdAddress(endpoints=("a:2379",), user="me@x", password_file=Path("/p"))),
    ],
)
def test_urls(url: str, expected: EtcdAddress) -> None:
    assert parse_etcd_url(url) == expected


@pytest.mark.parametrize(
    "url",
    ["", "a:2379", "redis://a", "etcd://", "etcd://a:0", "etcd://a:x", "etcd://a/path", "etcd://me:secret@a", "etcd://me@a", "etcd://a?x=1",
     "etcd://a?ca=/x", "etcds://a?cert=/x", "etcd://a?password-file=/p"],
)  # fmt: skip
def test_bad_urls(url: str) -> None:
    with pytest.raises(ValueError, match=r"etcd|URL|user|TLS|HOST|give|host") as caught:
        parse_etcd_url(url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "value",
    [b"", b"{}", b"[]", b'{"address": "localhost", "ports": {"": 1}}', b'{"address": "0.0.0.0", "ports": {"": 1}}',
     b'{"address": "224.0.0.1", "ports": {"": 1}}', b'{"address": "fe80::1%eth0", "ports": {"": 1}}',
     b'{"address": "10.0.0.1", "ports": {}}',
     b'{"address": "10.0.0.1", "ports": {"": 0}}', b'{"address": "10.0.0.1", "ports": {"": 65536}}',
     b'{"address": "10.0.0.1", "ports": {"": 1}, "weight": -1}', b'{"address": "10.0.0.1", "ports": {"": "1"}}', b"\xff"],
)  # fmt: skip
def test_instances_that_are_not_taken(value: bytes) -> None:
    with pytest.raises(ValueError, match=r"valid|address|port|weight"):
        read_instance(("shop", "cart", "one"), value)


def test_instances_round() -> None:
    one = Instance(namespace="shop", service="cart", instance="one", address="2001:DB8::1", ports={"http": 80, "": 1}, zone="z", weight=3)
    assert read_instance(name_of(one), write_instance(one)).address == "2001:db8::1"
    newer = json.loads(write_instance(one)) | {"field": "of a newer version"}
    assert read_instance(name_of(one), json.dumps(newer).encode()).weight == 3


def test_backoff_grows_and_is_spread() -> None:
    backoff = Backoff(0.1, 5.0, random.Random(1))
    waits = [backoff.next() for _ in range(12)]
    for number, wait in enumerate(waits):
        step = min(0.1 * 2**number, 5.0)
        assert step / 2 <= wait <= step
    backoff.reset()
    assert backoff.next() <= 0.1


# -- the tables --------------------------------------------------------------------------------------------------------------------

VALUES = st.sampled_from(["1", "2", "bad"])
OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.sampled_from("abc"), VALUES),
        st.tuples(st.just("delete"), st.sampled_from("abc"), st.none()),
        st.tuples(st.just("instance"), st.sampled_from("xyz"), VALUES),
        st.tuples(st.just("gone"), st.sampled_from("xyz"), st.none()),
        st.tuples(st.just("list"), st.dictionaries(st.sampled_from("abc"), VALUES), st.booleans()),
        st.tuples(st.just("take"), st.none(), st.none()),
    ),
    max_size=30,
)


@given(OPERATIONS)
def test_what_was_delivered_is_what_is_there(operations: list[tuple[str, Any, Any]]) -> None:
    """After any changes the reader has every resource's last good value, and every problem that there is."""
    contents, receiver = Contents(), Receiver()
    good: dict[str, str] = {}
    bad: set[str] = set()
    instances: dict[str, str] = {}
    bad_instances: set[str] = set()
    revision, now = 0, 0.0

    def entry(name: str, value: str) -> Entry:
        return Entry(config_key(key(name)), b"{" if value == "bad" else json.dumps(body(name, value)).encode(), revision)

    def learn(name: str, value: str) -> None:
        if value == "bad":
            bad.add(name)
        else:
            good[name] = value
            bad.discard(name)

    first = contents.change(now, replace=True)
    assert first is not None
    receiver(first)
    for action, what, value in operations:
        revision, now = revision + 1, now + 1000.0
        if action == "put":
            contents.put(entry(what, value))
            learn(what, value)
        elif action == "delete":
            contents.delete(config_key(key(what)), now)
            good.pop(what, None)
            bad.discard(what)
        elif action == "instance":
            one = an_instance(what, port=int(value) if value != "bad" else 1, ready=False)
            contents.put(Entry(instance_key(name_of(one)), b"{" if value == "bad" else write_instance(one), revision))
            if value == "bad":
                bad_instances.add(what)
            else:
                instances[what] = value
                bad_instances.discard(what)
        elif action == "gone":
            contents.delete(instance_key(name_of(an_instance(what))), now)
            instances.pop(what, None)
            bad_instances.discard(what)
        elif action == "list":
            for _ in contents.replace([entry(name, note) for name, note in what.items()], now, same_history=value):
                pass
            for name, note in what.items():
                learn(name, note)
            for name in [*good, *bad]:
                if name not in what:
                    good.pop(name, None)
                    bad.discard(name)
            instances.clear()
            bad_instances.clear()
        else:
            change = contents.change(now)
            if change is not None:
                receiver(change)
    change = contents.change(now)
    if change is not None:
        receiver(change)
    assert contents.change(now) is None, "nothing is left to tell"
    assert receiver.notes() == good
    assert {name[2]: str(each.ports["http"]) for name, each in receiver.instances.items()} == instances
    assert len(receiver.problems) == len(bad) + len(bad_instances)
    again = Contents()
    for _ in again.replace([Entry(raw, encoded(each), number) for raw, number, each in contents.entries()], now, same_history=False):
        pass
    saved = Receiver()
    state = again.change(now, replace=True)
    assert state is not None
    saved(state)
    assert saved.notes() == good and saved.instances == receiver.instances, "what goes to disk comes back"


def test_an_equal_body_is_no_change() -> None:
    """Written again as it was, perhaps by another cluster: the reader keeps what it has."""
    contents = Contents()
    contents.put(Entry(config_key(key("a")), json.dumps(body("a")).encode(), 1))
    assert contents.change(0.0) is not None
    contents.put(Entry(config_key(key("a")), json.dumps(body("a"), indent=3).encode(), 2))
    assert contents.change(0.0) is None


def test_many_problems_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("discovery.contents.MOST_PROBLEMS", 5)
    contents = Contents()
    for number in range(9):
        contents.put(Entry(config_key(key(f"r{number}")), b"{", 1))
    change = contents.change(0.0)
    assert change is not None and len(change.problems) == 6 and "4 more" in change.problems[-1].message
