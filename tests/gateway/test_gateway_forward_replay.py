"""Requests that are sent again because their route says so (GEP-1731), bodies included, over real connections."""

from __future__ import annotations

import h2.config
import h2.connection
import h2.events
import pytest
from upstream_world import Connection, Handler, Recorder, World, cluster_of, echoes, ok, permit, run, upstream

from gateway.limits import Limits
from mesh.filters import RetryPolicy
from mesh.http import UNKNOWN_LENGTH
from mesh.refusals import UpstreamReset, UpstreamTimeout

RETRY = RetryPolicy(attempts=2, statuses=(503,), connection=True, replay=True, backoff=0.001)
UNAVAILABLE = b"HTTP/1.1 503 No\r\ncontent-length: 2\r\n\r\nno"


def after(failures: int, fail: Handler, bodies: list[bytes]) -> Handler:
    """Lets `fail` answer the first requests and keeps the bodies of all that are complete; the others are answered with their body."""
    seen = [0]

    def handler(connection: Connection) -> None:
        while head := connection.head():
            seen[0] += 1
            if seen[0] <= failures:
                fail(connection)
                continue
            if b"transfer-encoding: chunked" in head:
                body = connection.until(b"0\r\n\r\n")
            else:
                body = connection.body(int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0] or 0))
            bodies.append(body)
            connection.send(ok(body))

    return handler


def refuses(connection: Connection) -> None:
    connection.send(UNAVAILABLE)
    connection.cut()


def vanishes(connection: Connection) -> None:
    connection.cut()


@pytest.mark.parametrize("failures", [1, 2])
def test_a_body_is_sent_again(failures: int) -> None:
    bodies: list[bytes] = []
    with upstream(after(failures, refuses, bodies)) as orders:

        async def conversation(world: World) -> None:
            asked = permit(cluster_of(orders.endpoint()), b"POST", retry=RETRY, body_length=6, headers=[(b"content-length", b"6")])
            client = await world.ask(asked, [b"abc", b"def"])
            assert (client.status, client.body, client.outcome.attempts) == (200, b"abcdef", failures + 1)

        run(conversation)
    assert bodies == [b"abcdef"]


def test_a_body_of_unknown_length_and_its_trailers_are_sent_again() -> None:
    bodies: list[bytes] = []
    with upstream(after(1, refuses, bodies)) as orders:

        async def conversation(world: World) -> None:
            asked = permit(cluster_of(orders.endpoint()), b"POST", retry=RETRY, body_length=UNKNOWN_LENGTH)
            client = await world.ask(asked, [b"abc"])
            assert client.status == 200

        run(conversation)
    assert bodies == [b"3\r\nabc\r\n0\r\n\r\n"]


def test_a_longer_body_is_sent_once() -> None:
    with upstream(after(9, refuses, [])) as orders:

        async def conversation(world: World) -> None:
            asked = permit(cluster_of(orders.endpoint()), b"POST", retry=RETRY, body_length=20, headers=[(b"content-length", b"20")])
            client = await world.ask(asked, [b"x" * 10, b"y" * 10])
            assert (client.status, client.outcome.attempts) == (503, 1)

        run(conversation, Limits(retry_buffer=15))


class Late(Recorder):
    """A client whose second piece of body comes once a try has failed."""

    def pump(self) -> None:
        if not self.wanted or self.forwarding is None or self.ended:
            return
        if not self.sent:
            self.sent = 3
            self.forwarding.body(b"abc")
        elif self.sent == 3 and self.outcome.attempts > 1:
            self.sent = 6
            self.forwarding.body(b"def")
            self.forwarding.end(None)


def test_what_comes_after_a_failed_try_follows_what_was_kept() -> None:
    bodies: list[bytes] = []
    with upstream(after(1, refuses, bodies)) as orders:

        async def conversation(world: World) -> None:
            asked = permit(cluster_of(orders.endpoint()), b"POST", retry=RETRY, body_length=6, headers=[(b"content-length", b"6")])
            client = Late(world.loop)
            client.started(world.forwarder.forward(asked, client, ended=False))
            await world.until(lambda: client.ended)
            assert (client.status, client.body) == (200, b"abcdef")

        run(conversation)
    assert bodies == [b"abcdef"]


@pytest.mark.parametrize(("method", "answered"), [(b"GET", True), (b"PUT", True), (b"POST", False)])
def test_a_connection_that_breaks_is_no_reason_to_act_twice(method: bytes, answered: bool) -> None:
    with upstream(after(1, vanishes, [])) as orders:

        async def conversation(world: World) -> None:
            client = await world.ask(permit(cluster_of(orders.endpoint()), method, retry=RETRY))
            if answered:
                assert (client.status, client.outcome.attempts) == (200, 2)
            else:
                assert isinstance(client.refusal, UpstreamReset)

        run(conversation)


def test_without_a_word_about_it_a_broken_connection_is_told() -> None:
    with upstream(after(1, vanishes, [])) as orders:

        async def conversation(world: World) -> None:
            client = await world.ask(permit(cluster_of(orders.endpoint())))
            assert isinstance(client.refusal, UpstreamReset)

        run(conversation)


def test_a_try_that_takes_too_long_is_made_again_and_the_last_answer_counts() -> None:
    def sleeps(connection: Connection) -> None:
        connection.recv()

    with upstream(after(9, sleeps, [])) as orders:

        async def conversation(world: World) -> None:
            client = await world.ask(permit(cluster_of(orders.endpoint()), retry=RETRY, backend_timeout=0.05))
            assert isinstance(client.refusal, UpstreamTimeout)
            assert client.outcome.attempts == 3

        run(conversation)


def test_when_no_try_is_left_the_upstreams_answer_is_passed_on() -> None:
    with upstream(after(9, refuses, [])) as orders:

        async def conversation(world: World) -> None:
            client = await world.ask(permit(cluster_of(orders.endpoint()), b"POST", retry=RETRY))
            assert (client.status, client.body, client.outcome.attempts) == (503, b"no", 3)

        run(conversation)


def test_an_answer_that_is_not_named_is_passed_on_at_once() -> None:
    with upstream(echoes) as orders:

        async def conversation(world: World) -> None:
            client = await world.ask(permit(cluster_of(orders.endpoint()), b"POST", retry=RETRY))
            assert (client.status, client.outcome.attempts) == (200, 1)

        run(conversation)


def over_http2(failures: int, bodies: list[bytes]) -> Handler:
    """As `after(failures, refuses, bodies)`, over HTTP/2."""
    seen = [0]

    def handler(connection: Connection) -> None:
        conn = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False, header_encoding=None))
        conn.initiate_connection()
        connection.send(conn.data_to_send())
        body = bytearray()
        while data := connection.recv():
            for event in conn.receive_data(data):
                if isinstance(event, h2.events.DataReceived):
                    body += event.data
                    conn.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                elif isinstance(event, h2.events.StreamEnded):
                    seen[0] += 1
                    bodies.append(bytes(body))
                    body.clear()
                    status = "503" if seen[0] <= failures else "200"
                    conn.send_headers(event.stream_id, [(":status", status)])
                    conn.send_data(event.stream_id, status.encode(), end_stream=True)
            connection.send(conn.data_to_send())

    return handler


@pytest.mark.parametrize("body", [[b"abc", b"def"], [b"x" * 40_000, b"y" * 25_000], []])
def test_over_http2_as_well(body: list[bytes]) -> None:
    bodies: list[bytes] = []
    with upstream(over_http2(2, bodies), alpn=("h2",)) as orders:

        async def conversation(world: World) -> None:
            cluster = cluster_of(orders.endpoint(), http2="always")
            asked = permit(cluster, b"POST", retry=RETRY, body_length=UNKNOWN_LENGTH)
            client = await world.ask(asked, body)
            assert (client.status, client.body, client.outcome.attempts) == (200, b"200", 3)

        run(conversation)
    assert bodies == [b"".join(body)] * 3
