"""Copies of requests over real connections: they arrive whole, and nothing that becomes of them is felt by the request."""

from __future__ import annotations

import threading

import msgspec
from gateway_world import DENY, POLICY, a_cluster, a_head, a_rule, pending_of, place_of
from upstream_world import Connection, Recorder, Upstream, World, cluster_of, echoes, ok, permit, run, serves, unused_port, upstream

from gateway.limits import Limits
from gateway.plan import Answers, Permit, Plan
from gateway.settle import settle
from mesh.filters import HeaderChange, Mirror
from mesh.model import Backend, Cluster, Endpoint
from mesh.questions import Decision, Verdict
from mesh.refusals import Denied


class Collector:
    """An upstream's handler that keeps what it was sent, and answers as it is told to."""

    def __init__(self, answer: bytes = ok(b"from the copy")) -> None:
        self.answer = answer
        self.got: list[tuple[bytes, bytes]] = []

    def __call__(self, connection: Connection) -> None:
        while head := connection.head():
            length = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0] or 0)
            self.got.append((head, connection.body(length)))
            connection.send(self.answer)


class Half(Recorder):
    """A client that sends a piece of a body and then no more."""

    def pump(self) -> None:
        if self.wanted and self.forwarding is not None and not self.sent:
            self.sent = 4
            self.forwarding.body(b"half")


def half(world: World, permitted: Permit) -> Half:
    client = Half(world.loop)
    client.started(world.forwarder.forward(permitted, client, ended=False))
    return client


def copied(cluster: Cluster, *to: Cluster, method: bytes = b"GET", body_length: int = 0) -> Permit:
    own = permit(cluster, method, body_length=body_length)
    return msgspec.structs.replace(own, mirrors=tuple(permit(other, method, body_length=body_length) for other in to))


def second(other: Upstream, name: str = "shop/copy:443") -> Cluster:
    return cluster_of(other.endpoint(), name=name)


def results(world: World, name: str = "shop/copy:443") -> dict[str, int]:
    return {result: number for (cluster, result), number in world.forwarder.count("mirrors").items() if cluster == name}


def test_several_copies_arrive_whole_and_their_answers_go_nowhere() -> None:
    one, two = Collector(b"HTTP/1.1 500 Oh\r\ncontent-length: 2\r\n\r\noh"), Collector()
    with upstream(echoes) as orders, upstream(one) as first, upstream(two) as other:

        async def conversation(world: World) -> None:
            to = (second(first), second(other, "shop/other:443"))
            client = await world.ask(copied(cluster_of(orders.endpoint()), *to, method=b"POST", body_length=6), [b"abc", b"def"])
            assert client.status == 200
            assert client.body.endswith(b"\n\nabcdef")
            await world.until(lambda: results(world) == results(world, "shop/other:443") == {"answered": 1})
            assert (await world.ask(copied(cluster_of(orders.endpoint()), *to))).status == 200
            await world.until(lambda: len(one.got) == len(two.got) == 2)

        run(conversation)
    assert [body for _, body in one.got] == [body for _, body in two.got] == [b"abcdef", b""]


def test_a_copy_that_cannot_be_sent_is_not_felt() -> None:
    with upstream(echoes) as orders:

        async def conversation(world: World) -> None:
            gone = cluster_of(Endpoint(address="127.0.0.1", port=unused_port(), identities=("spiffe://x/y",)), name="shop/copy:443")
            nobody = cluster_of(name="shop/nobody:443")
            client = await world.ask(copied(cluster_of(orders.endpoint()), gone, nobody, method=b"POST", body_length=3), [b"abc"])
            assert (client.status, client.body[-3:]) == (200, b"abc")
            await world.until(lambda: results(world) == results(world, "shop/nobody:443") == {"failed": 1})
            assert client.outcome.cluster == "shop/orders:443"

        run(conversation)


def test_a_copy_whose_upstream_does_not_read_is_given_up_and_the_request_goes_on() -> None:
    stop = threading.Event()

    def reads_nothing(connection: Connection) -> None:
        connection.head()
        stop.wait(20)

    def counts(connection: Connection) -> None:
        connection.head()
        left = pieces * size - len(connection.buffer)
        while left > 0:
            left -= len(connection.recv())
        connection.send(ok(b"all of it"))

    pieces, size = 300, 65536
    with upstream(counts) as orders, upstream(reads_nothing) as other:

        async def conversation(world: World) -> None:
            permitted = copied(cluster_of(orders.endpoint()), second(other), method=b"POST", body_length=pieces * size)
            client = await world.ask(permitted, (b"x" * size for _ in range(pieces)))
            assert (client.status, client.body) == (200, b"all of it")
            assert results(world) == {"overflow": 1}
            assert world.forwarder._shared.mirroring == 0
            stop.set()

        run(conversation)


def test_a_copy_that_is_not_answered_in_time_is_forgotten() -> None:
    def silent(connection: Connection) -> None:
        connection.head()
        connection.recv()

    with upstream(echoes) as orders, upstream(silent) as other:

        async def conversation(world: World) -> None:
            permitted = copied(cluster_of(orders.endpoint()), second(other))
            plan = msgspec.structs.replace(permitted.mirrors[0].plan, timeout=0.05)
            permitted = msgspec.structs.replace(permitted, mirrors=(msgspec.structs.replace(permitted.mirrors[0], plan=plan),))
            assert (await world.ask(permitted)).status == 200
            await world.until(lambda: results(world) == {"timeout": 1})

        run(conversation)


def test_a_request_that_is_given_up_takes_its_half_copies_with_it() -> None:
    with upstream(echoes) as orders, upstream(echoes) as other:

        async def conversation(world: World) -> None:
            permitted = copied(cluster_of(orders.endpoint()), second(other), method=b"POST", body_length=10)
            client = half(world, permitted)
            await world.until(lambda: client.sent == 4)
            client.cancelled = True
            client.forwarding.cancel()
            assert results(world) == {"cut": 1}
            assert world.forwarder._shared.mirroring == 0

        run(conversation)


def test_an_early_answer_ends_a_copy_that_is_not_complete() -> None:
    with upstream(serves(ok())) as orders, upstream(echoes) as other:

        async def conversation(world: World) -> None:
            permitted = copied(cluster_of(orders.endpoint()), second(other), method=b"POST", body_length=10)
            client = half(world, permitted)
            await world.until(lambda: client.ended)
            assert client.status == 200
            await world.until(lambda: results(world) == {"cut": 1})

        run(conversation)


def test_copies_in_progress_are_bounded() -> None:
    stop = threading.Event()

    def silent(connection: Connection) -> None:
        connection.head()
        stop.wait(20)

    with upstream(echoes) as orders, upstream(silent) as other:

        async def conversation(world: World) -> None:
            for _ in range(5):
                assert (await world.ask(copied(cluster_of(orders.endpoint()), second(other)))).status == 200
            assert results(world) == {"busy": 3}
            stop.set()

        run(conversation, Limits(mirrors=2))


def test_a_request_without_an_upstream_is_not_copied() -> None:
    kept = Collector()
    with upstream(kept) as other:

        async def conversation(world: World) -> None:
            client = await world.ask(copied(cluster_of(), second(other)))
            assert client.refusal is not None
            assert results(world) == {}

        run(conversation)
    assert kept.got == []


# Which requests are copied, and with what


def mirrored(**changes: object) -> Plan:
    rule = a_rule(mirrors=(Mirror(cluster="shop/copy:80", service="shop/copy"),), **changes)  # type: ignore[arg-type]
    plan = pending_of(place_of(rule, clusters=(a_cluster(), a_cluster("shop/copy:80", external=True)))).plan
    assert isinstance(plan, Plan)
    return plan


def test_a_copy_has_the_rules_changes_and_what_its_own_upstream_may_know() -> None:
    plan = mirrored(request_headers=HeaderChange(set=((b"x-a", b"1"),)))
    (copy,) = plan.mirrors
    assert copy.cluster.name == "shop/copy:80"
    assert copy.headers == [(b"x-a", b"1")]
    assert (b"x-a", b"1") in plan.headers
    assert len(plan.headers) > 3
    assert (copy.target, copy.authority) == (plan.target, plan.authority)


def test_a_mirror_to_what_is_not_there_is_left_out() -> None:
    rule = a_rule(mirrors=(Mirror(cluster="shop/gone:80", service="shop/gone"),))
    plan = pending_of(place_of(rule)).plan
    assert isinstance(plan, Plan)
    assert plan.mirrors == ()


def test_a_backend_has_mirrors_of_its_own() -> None:
    backend = Backend(
        weight=1, cluster="shop/orders:80", service="shop/orders", mirrors=(Mirror(cluster="shop/orders:80", service="shop/orders"),)
    )
    plan = pending_of(place_of(a_rule(backends=(backend,)))).plan
    assert isinstance(plan, Plan)
    assert len(plan.mirrors) == 1


def test_only_permitted_requests_are_copied_and_with_the_decisions_changes() -> None:
    rule = a_rule(decisions=(POLICY,), mirrors=(Mirror(cluster="shop/orders:80", service="shop/orders"),))
    pending = pending_of(place_of(rule), a_head())
    assert isinstance(settle(pending, Answers(decisions=(DENY,))), Denied)
    settled = settle(pending, Answers(decisions=(Decision(verdict=Verdict.ALLOW, headers=((b"x-who", b"web"),)),)))
    assert isinstance(settled, Permit)
    assert (b"x-who", b"web") in settled.headers
    assert (b"x-who", b"web") in settled.mirrors[0].headers
