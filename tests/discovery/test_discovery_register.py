"""Instances that register themselves, gateways that report, and a registry that loses many at once."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable, Iterator

import pytest
from aetcd import rpc
from discovery_world import Receiver, an_instance, client, until

from discovery.acknowledged import Standing, wait_until
from discovery.etcd import Delete, Etcd, EtcdError, Put
from discovery.etcd_source import EtcdSource
from discovery.health import HttpCheck, TcpCheck, Verdict, parse_check
from discovery.instances import name_of, read_instance, write_instance
from discovery.keys import instance_key, report_key
from discovery.outage import ASK_EVERY, FAILURES, LONGEST, WINDOW, Keeper
from discovery.register import Registrar
from discovery.reports import Report, Reporter, reports
from mesh.documents import Instance
from tests import servers


@pytest.fixture(scope="module")
def shared() -> Iterator[servers.Server]:
    with servers.etcd() as etcd:
        yield etcd


def with_etcd(server: servers.Server, story: Callable[[Etcd], Awaitable[None]]) -> None:
    async def main() -> None:
        etcd = client(server.url, timeout=1.0)
        try:
            await etcd.call(lambda at: at.kv.DeleteRange, rpc.DeleteRangeRequest(key=b"\0", range_end=b"\0"), again=True)
            await story(etcd)
        finally:
            await etcd.close()

    asyncio.run(main())


async def registered(etcd: Etcd, instance: Instance) -> Instance | None:
    try:
        entry = await etcd.get(instance_key(name_of(instance)))
    except EtcdError:
        return None
    return read_instance(name_of(instance), entry.value) if entry and entry.value != b"{}" else None


async def until_registered(etcd: Etcd, instance: Instance | None, one: Instance, seconds: float = 15) -> None:
    for _ in range(int(seconds / 0.02)):
        if await registered(etcd, one) == instance:
            return
        await asyncio.sleep(0.02)
    raise AssertionError(f"waited for {instance}, have {await registered(etcd, one)}")


def applies_new(report: Report) -> bool:
    return report.policy == "sha256:new"


def test_registered_and_taken_away(shared: servers.Server) -> None:
    async def story(etcd: Etcd) -> None:
        one = an_instance()
        registrar = Registrar(etcd, one, ttl=2)
        await registrar.start()
        await until("it is registered", lambda: registrar.status.registered)
        assert await registered(etcd, one) == one and "ready" in registrar.status.text
        entry = await etcd.get(instance_key(name_of(one)))
        assert entry is not None and entry.lease
        for hands_on in (Put(entry.key, b"{}"), Delete(entry.key)):
            await etcd.commit([hands_on])
            await until_registered(etcd, one, one)
        await etcd.commit([Put(entry.key, write_instance(one), await etcd.grant(3))])
        await until("it is noticed", lambda: "another process" in registrar.status.text)
        await until("the other one ends", lambda: registrar.status.registered)
        await etcd.revoke((await etcd.get(entry.key) or entry).lease)
        await until_registered(etcd, one, one)
        await until("it is registered again", lambda: registrar.status.registered)
        registrar.set_ready(False)
        await until("it says so", lambda: registrar.status.registered and not registrar.status.ready)
        await registrar.stop()
        assert await registered(etcd, one) is None

    with_etcd(shared, story)


def test_it_goes_with_its_process(shared: servers.Server) -> None:
    async def story(etcd: Etcd) -> None:
        one = an_instance()
        registrar = Registrar(etcd, one, ttl=2)
        await registrar.start()
        await until("it is registered", lambda: registrar.status.registered)
        assert registrar._leased._task is not None
        registrar._leased._task.cancel()  # as a kill would
        await until_registered(etcd, None, one)

    with_etcd(shared, story)


def test_registrar_outlives_etcd(shared: servers.Server) -> None:
    async def story(etcd: Etcd) -> None:
        one = an_instance()
        shared.stop()
        registrar = Registrar(etcd, one, ttl=2)
        await registrar.start()
        await until("it says so", lambda: "not registered" in registrar.status.text and "etcd" in registrar.status.text)
        await asyncio.to_thread(shared.start)
        await until_registered(etcd, one, one)
        shared.kill()
        await until("it is missed", lambda: not registrar.status.registered)
        await asyncio.to_thread(shared.start)
        await until("it is registered", lambda: registrar.status.registered)
        shared.signal(signal.SIGSTOP)
        await until("it is missed", lambda: not registrar.status.registered)
        shared.signal(signal.SIGCONT)
        await until("it is registered", lambda: registrar.status.registered)
        await until_registered(etcd, one, one)
        await registrar.stop()
        assert await registered(etcd, one) is None

    with_etcd(shared, story)


class Listener:
    """Something that answers at a port, while it is open; `status` is its HTTP answer."""

    def __init__(self) -> None:
        self.port = servers.free_port()
        self.status = 200

    async def open(self) -> None:
        self.server = await asyncio.start_server(self.serve, "127.0.0.1", self.port)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if await reader.readline():
                writer.write(f"HTTP/1.1 {self.status} X\r\nContent-Length: 0\r\n\r\n".encode())
                await writer.drain()
        except OSError:
            pass
        writer.close()

    def close(self) -> None:
        self.server.close()


@pytest.mark.parametrize("kind", ["tcp", "http"])
def test_readiness_follows_the_health_check(shared: servers.Server, kind: str) -> None:
    async def story(etcd: Etcd) -> None:
        listener = Listener()
        one, down = an_instance(port=listener.port), an_instance(port=listener.port, ready=False)
        check = TcpCheck("127.0.0.1", listener.port) if kind == "tcp" else HttpCheck("127.0.0.1", listener.port, "/healthz")
        registrar = Registrar(etcd, one, ttl=5, check=check, interval=0.02)
        await registrar.start()
        await until_registered(etcd, down, one)
        await listener.open()
        await until_registered(etcd, one, one)
        if kind == "http":
            listener.status = 503
            await until_registered(etcd, down, one)
            assert "status 503" in registrar.status.text
            listener.status = 204
            await until_registered(etcd, one, one)
        listener.close()
        await until_registered(etcd, down, one)
        await registrar.stop()
        assert await registered(etcd, one) is None

    with_etcd(shared, story)


@pytest.mark.parametrize(
    ("answers", "changes"),
    [
        ("+", {0: True}), ("---", {}), ("+--+", {0: True}), ("+---", {0: True, 3: False}), ("+---+", {0: True, 3: False}),
        ("+---++", {0: True, 3: False, 5: True}), ("+---+-++", {0: True, 3: False, 7: True}), ("+--+--+---", {0: True, 9: False}),
        ("-+", {1: True}),
    ],
)  # fmt: skip
def test_verdicts(answers: str, changes: dict[int, bool]) -> None:
    verdict = Verdict(fall=3, rise=2)
    assert {number: verdict.well for number, answer in enumerate(answers) if verdict.answer(answer == "+")} == changes


@pytest.mark.parametrize(
    ("text", "check"),
    [
        ("tcp://127.0.0.1:80", TcpCheck("127.0.0.1", 80)), ("http://[::1]:8080/healthz?x=1", HttpCheck("::1", 8080, "/healthz?x=1")),
        ("http://app", HttpCheck("app", 80, "/")), ("tcp://app", None), ("tcp://app:80/x", None), ("https://app", None), ("app:80", None),
        ("http://app/a b", None), ("http://app:x/", None),
    ],
)  # fmt: skip
def test_checks_from_text(text: str, check: object) -> None:
    if check is None:
        with pytest.raises(ValueError, match="app"):
            parse_check(text)
    else:
        assert parse_check(text) == check


def test_reports(shared: servers.Server) -> None:
    async def story(etcd: Etcd) -> None:
        one, two = Reporter(etcd, "edge", "ingress", "one", ttl=2), Reporter(etcd, "edge", "ingress", "two", ttl=2)
        for each in (one, two):
            await each.start()
            each.report(snapshot="s1", policy="sha256:old", source="7", problems=1, now=5.0)
        await until("both are written", lambda: one.written and two.written)
        first, second = await reports(etcd)
        assert (first.instance, second.instance, first.policy, first.source, first.problems, first.time) == (
            "one",
            "two",
            "sha256:old",
            "7",
            1,
            5.0,
        )
        assert instances(await wait_until(etcd, applies_new, 7, 0.2)) == ["one", "two"]
        one.report(snapshot="s2", policy="sha256:new", source="6")
        await until("it is written", lambda: one.written)
        assert instances(await wait_until(etcd, applies_new, 7, 0.2)) == ["one", "two"], "it was active before, too"
        one.report(snapshot="s2", policy="sha256:new", source="7")
        await until("it is written", lambda: one.written)
        assert instances(await wait_until(etcd, applies_new, 7, 0.2)) == ["two"]
        told: list[Standing] = []
        waiting = asyncio.create_task(wait_until(etcd, applies_new, 7, 10, progress=told.append))
        await until("it looks", lambda: bool(told))
        two.report(snapshot="s2", policy="sha256:new", source="8")
        assert (await waiting).missing == ()
        assert [(each.applied, len(each.missing)) for each in told] == [(1, 1), (2, 0)]
        await etcd.commit([Put(report_key("edge", "ingress", "odd"), b"{")])
        assert instances(await wait_until(etcd, applies_new, 7, 0)) == ["odd"]
        await one.stop()
        await two.stop()
        assert [each.instance for each in await reports(etcd)] == ["odd"]

    with_etcd(shared, story)


def instances(standing: Standing) -> list[str]:
    return sorted(each.instance for each in standing.missing)


def test_one_that_ends_as_it_should_is_not_waited_for_and_one_that_is_lost_is(shared: servers.Server) -> None:
    async def story(etcd: Etcd) -> None:
        kind, lost = Reporter(etcd, "edge", "ingress", "kind", ttl=2), Reporter(etcd, "edge", "ingress", "lost", ttl=2)
        for each in (kind, lost):
            await each.start()
            each.report(snapshot="s1", policy="sha256:old")
        await until("both are written", lambda: kind.written and lost.written)
        told: list[Standing] = []
        waiting = asyncio.create_task(wait_until(etcd, applies_new, 7, 2.0, progress=told.append))
        await until("it looks", lambda: bool(told))
        assert lost._leased._task is not None
        lost._leased._task.cancel()  # it can't reach etcd any more
        await kind.stop()
        await etcd.revoke(lost._leased._lease)
        standing = await waiting
        assert (instances(standing), [each.instance for each in standing.lost]) == (["lost"], ["lost"])
        assert (await wait_until(etcd, applies_new, 7, 0)).missing == (), "who was lost before is not known any more"
        lost = Reporter(etcd, "edge", "ingress", "lost", ttl=2)
        await lost.start()
        lost.report(snapshot="s1", policy="sha256:old")
        await until("it is back", lambda: lost.written)
        told.clear()
        waiting = asyncio.create_task(wait_until(etcd, applies_new, 7, 30.0, cut_off_after=0.5, progress=told.append))
        await until("it looks", lambda: bool(told))
        assert lost._leased._task is not None
        lost._leased._task.cancel()
        await etcd.revoke(lost._leased._lease)
        standing = await waiting
        assert (standing.missing, [each.instance for each in standing.cut_off]) == ((), ["lost"])
        await lost.stop()

    with_etcd(shared, story)


# -- many at once ------------------------------------------------------------------------------------------------------------------


def names(*instances: Instance) -> list[tuple[str, str, str]]:
    return [name_of(each) for each in instances]


def some(count: int, service: str = "cart") -> list[Instance]:
    return [an_instance(f"i{number}", port=8000 + number, service=service) for number in range(count)]


@pytest.mark.parametrize(
    ("count", "vanished", "kept"), [(4, 1, False), (4, 2, False), (4, 3, True), (1, 1, True), (3, 1, False), (3, 2, True), (100, 51, True)]
)
def test_more_than_half_of_a_service(count: int, vanished: int, kept: bool) -> None:
    keeper, instances = Keeper(), some(count)
    others = some(300, "other")
    for each in instances[:vanished]:
        keeper.vanished(name_of(each), each, 10.0)
    keeper.judge(names(*instances[vanished:], *others), 10.0)
    assert [instance for _, instance in keeper.kept()] == (instances[:vanished] if kept else [])


def test_one_after_the_other_counts_together_and_brings_back_the_first() -> None:
    keeper, instances = Keeper(), some(3)
    rest = some(50, "other")
    for number, each in enumerate(instances):
        keeper.vanished(name_of(each), each, 10.0 + number)
        keeper.judge(names(*instances[number + 1 :], *rest), 10.0 + number)
        assert len(list(keeper.kept())) == (0, 2, 3)[number]


def test_slowly_is_not_together() -> None:
    keeper, instances = Keeper(), some(3)
    rest = some(50, "other")
    for number, each in enumerate(instances[:2]):
        keeper.vanished(name_of(each), each, number * (WINDOW + 1))
        keeper.judge(names(*instances[number + 1 :], *rest), number * (WINDOW + 1))
        assert not keeper.active


def test_more_than_half_of_everything() -> None:
    keeper, services = Keeper(), [some(2, f"s{number}") for number in range(10)]
    for first, _ in services:
        keeper.vanished(name_of(first), first, 0.0)
    keeper.judge(names(*(second for _, second in services)), 0.0)
    assert not keeper.active, "half is not more than half"
    last = services[0][1]
    keeper.vanished(name_of(last), last, 1.0)
    keeper.judge(names(*(second for _, second in services[1:])), 1.0)
    assert len(list(keeper.kept())) == 11


def test_who_left_on_purpose_is_not_kept() -> None:
    keeper = Keeper()
    gone = an_instance(ready=False)
    keeper.vanished(name_of(gone), gone, 0.0)
    keeper.judge([], 0.0)
    assert not keeper.active


def test_kept_while_it_answers() -> None:
    keeper, one = Keeper(), an_instance()
    keeper.vanished(name_of(one), one, 0.0)
    keeper.judge([], 0.0)
    assert keeper.due(0.0, 9) == [(name_of(one), one)] and keeper.due(0.1, 9) == []
    keeper.answered(name_of(one), one)
    assert keeper.due(ASK_EVERY, 9)
    for number in range(FAILURES):
        assert keeper.serves(name_of(one)) is one
        keeper.silent(name_of(one), one, 20.0 + number, refused=False)
    assert not keeper.active
    keeper.vanished(name_of(one), one, 40.0)
    keeper.judge([], 40.0)
    keeper.silent(name_of(one), one, 40.0, refused=True)
    assert not keeper.active, "refused: nobody is there"
    keeper.vanished(name_of(one), one, 50.0, confirmed=False)
    keeper.judge([], 50.0)
    assert keeper.active and not list(keeper.kept())
    keeper.answered(name_of(one), one)
    assert list(keeper.kept()) == [(name_of(one), one)]
    keeper.returned(name_of(one))
    assert not keeper.active and not list(keeper.problems())


def test_leases_end_all_at_once(shared: servers.Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three instances whose leases end: two answer and are kept, one doesn't. One that is back is registered as ever."""

    async def story(etcd: Etcd) -> None:
        monkeypatch.setattr("discovery.outage.ASK_EVERY", 0.2)
        listeners = [Listener() for _ in range(3)]
        for listener in listeners[:2]:
            await listener.open()
        instances = [an_instance(f"i{number}", port=listener.port) for number, listener in enumerate(listeners)]
        leases = [await etcd.grant(2) for _ in instances]
        await etcd.commit([Put(instance_key(name_of(each)), write_instance(each), leases[n]) for n, each in enumerate(instances)])
        source, receiver = EtcdSource(client(shared.url), probe_every=0.1), Receiver()
        await source.start(receiver)
        assert len(receiver.instances) == 3
        await until("the dead one is gone", lambda: len(receiver.instances) == 2 and receiver.problems)
        assert set(receiver.instances) == set(names(*instances[:2]))
        (problem,) = receiver.problems
        assert problem.severity == "warning" and "2 instances of shop/cart" in problem.message
        assert (await etcd.list(b"/tollhouse/services/")).entries == ()
        listeners[0].close()
        await until("the other goes when it does not answer", lambda: len(receiver.instances) == 1)
        await etcd.commit([Put(instance_key(name_of(instances[1])), write_instance(instances[1]))])
        await until("it is back", lambda: not receiver.problems)
        assert set(receiver.instances) == set(names(instances[1]))
        listeners[1].close()
        await source.stop()

    with_etcd(shared, story)


def test_a_stopped_registrar_is_believed(shared: servers.Server) -> None:
    """Its port answers still, and yet it is gone: it said so."""

    async def story(etcd: Etcd) -> None:
        listener = Listener()
        await listener.open()
        registrar = Registrar(etcd, an_instance(port=listener.port), ttl=5)
        await registrar.start()
        source, receiver = EtcdSource(client(shared.url), probe_every=0.1), Receiver()
        await source.start(receiver)
        await until("it is there", lambda: receiver.instances)
        await registrar.stop()
        await until("it is gone", lambda: not receiver.instances)
        assert not receiver.problems
        listener.close()
        await source.stop()

    with_etcd(shared, story)


def test_nobody_is_kept_for_ever() -> None:
    keeper, instances = Keeper(), some(3)
    for instance in instances:
        keeper.vanished(name_of(instance), instance, 0.0)
    keeper.judge((), 0.0)
    assert not keeper.overdue(name_of(instances[0]), LONGEST)
    assert keeper.overdue(name_of(instances[0]), LONGEST + 1)
    keeper.silent(name_of(instances[0]), instances[0], LONGEST + 1, refused=True)
    assert name_of(instances[0]) not in dict(keeper.kept())
