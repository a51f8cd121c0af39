"""What has gone on for long is asked about again."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import msgspec
import pytest
from door_world import POLICY, Answers, a_listener, a_snapshot, answer, closed, get, until
from test_gateway_websocket import SWITCHED, UPGRADE, peer
from through_world import Through, through

from gateway.limits import Limits
from mesh.model import DecisionPolicy
from mesh.questions import Decision, Verdict

OFTEN = Limits(linger=0.1, stream_recheck=0.4)
ALLOW = Decision(verdict=Verdict.ALLOW)
DENY = Decision(verdict=Verdict.DENY)
ERROR = Decision(verdict=Verdict.ERROR)


async def endless(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """An upstream that never stops: a WebSocket if asked for one, else an answer in pieces."""
    head = await reader.readuntil(b"\r\n\r\n")
    tunnel = b"upgrade: websocket" in head
    writer.write(SWITCHED if tunnel else b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
    while True:
        writer.write(b"tick" if tunnel else b"4\r\ntick\r\n")
        await writer.drain()
        await asyncio.sleep(0.02)


class Counting(Answers):
    """Answers at once, and counts."""

    def __init__(self) -> None:
        super().__init__()
        self.recalled = self.taken = 0

    def renewed(self, question):  # type: ignore[no-untyped-def]
        return question

    def recall(self, question, now):  # type: ignore[no-untyped-def]
        self.recalled += 1
        return self.decision

    def take(self, question, now):  # type: ignore[no-untyped-def]
        self.taken += 1
        return super().take(question, now)


def run(test: Callable[[Through, Counting], Awaitable[None]], **rule: object) -> None:
    async def go() -> None:
        async with asyncio.timeout(30), peer(endless) as port, through(port, limits=OFTEN, timeout=None, **rule) as made:
            answers = Counting()
            made.gateway._shared.driver._decider = answers
            made.gateway._shared.driver._lessee = answers
            await test(made, answers)

    asyncio.run(go())


@pytest.mark.parametrize("head", [get(b"/chat", UPGRADE), get(b"/stream")])
@pytest.mark.parametrize(("verdict", "flag"), [(DENY, "UAEX"), (ERROR, "UAEE")])
def test_what_is_no_longer_allowed_is_cut_off(head: bytes, verdict: Decision, flag: str) -> None:
    async def test(made: Through, answers: Counting) -> None:
        answers.decision = ALLOW
        reader, writer = await made.plain()
        writer.write(head)
        await reader.readuntil(b"tick")
        await until(lambda: answers.recalled >= 3)
        await reader.readuntil(b"tick")
        assert made.outcomes == []
        answers.decision = verdict
        await closed(reader)
        outcome = await made.outcome()
        assert outcome.flag == flag
        assert outcome.status in {101, 200}
        assert [decision for _, decision in outcome.decisions] == [ALLOW, verdict]
        assert answers.taken == 0
        await until(lambda: made.pooled() == 0)
        writer.close()

    run(test, decisions=(POLICY,))


def test_a_policy_that_fails_open_goes_on() -> None:
    open_policy = DecisionPolicy(name="shop/policy", level="rule", decision="shop.allow", failure_mode="Allow")

    async def test(made: Through, answers: Counting) -> None:
        answers.decision = ERROR
        reader, writer = await made.plain()
        writer.write(get(b"/stream"))
        await until(lambda: answers.recalled >= 3)
        await reader.readuntil(b"tick")
        assert made.outcomes == []
        writer.close()

    run(test, decisions=(open_policy,))


def test_an_answer_that_comes_later_counts_as_well() -> None:
    async def test(made: Through, answers: Counting) -> None:
        answers.decision = ALLOW
        reader, writer = await made.plain()
        writer.write(get(b"/stream"))
        await reader.readuntil(b"tick")
        answers.decision = None
        await until(lambda: bool(answers.asked))
        await reader.readuntil(b"tick")
        answers.asked[0][1](DENY)
        await closed(reader)
        assert (await made.outcome()).flag == "UAEX"
        writer.close()

    run(test, decisions=(POLICY,))


def test_the_newest_configuration_is_asked() -> None:
    """A policy that was attached later decides, too; a route that is gone ends nothing that no policy had to allow."""

    async def test(made: Through, answers: Counting) -> None:
        reader, writer = await made.plain()
        writer.write(get(b"/stream"))
        await reader.readuntil(b"tick")
        before = made.gateway._snapshot
        gone = msgspec.structs.replace(a_listener(made.port, "http", None), hosts={})
        made.gateway.apply(msgspec.structs.replace(a_snapshot(gone, version="2"), clusters=before.clusters))
        for _ in range(40):
            await reader.readuntil(b"tick")
        answers.decision = DENY
        listener = a_listener(made.port, "http", None, decisions=(POLICY,), timeout=None)
        made.gateway.apply(msgspec.structs.replace(a_snapshot(listener, version="3"), clusters=before.clusters))
        await closed(reader)
        assert (await made.outcome()).flag == "UAEX"
        reader, writer = await made.plain()
        writer.write(get(b"/stream"))
        assert (await answer(reader))[0] == 403
        writer.close()

    run(test)


def test_a_route_that_is_gone_ends_what_a_policy_had_allowed() -> None:
    async def test(made: Through, answers: Counting) -> None:
        answers.decision = ALLOW
        reader, writer = await made.plain()
        writer.write(get(b"/stream"))
        await reader.readuntil(b"tick")
        gone = msgspec.structs.replace(a_listener(made.port, "http", None), hosts={})
        made.gateway.apply(a_snapshot(gone, version="2"))
        await closed(reader)
        assert (await made.outcome()).flag == "NR"
        writer.close()

    run(test, decisions=(POLICY,))
