"""OPA's own servers as the engine: real ones, that fetch real bundles from us."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import aiohttp
import msgspec
import pytest
from engine_world import ask, revision, until

from pdp.bundle_files import bundle_of
from pdp.engines.bundle import RESOURCE, BundleServer
from pdp.engines.engine import EngineUnavailable, Evaluation
from pdp.engines.server import OpaServer
from tests import servers
from tests.servers import Server, free_port

D = "shop.authz."
OTHER = revision("package shop.authz\n\ndecision := false\n\nadmin := true\n")


@contextmanager
def opa(bundles: int, token: str = "") -> Iterator[Server]:
    """An OPA that fetches its policy at our port."""
    settings = [
        f"services.tollhouse.url=http://127.0.0.1:{bundles}",
        "bundles.own.service=tollhouse",
        f"bundles.own.resource={RESOURCE}",
        "bundles.own.polling.min_delay_seconds=1",
        "bundles.own.polling.max_delay_seconds=1",
        "bundles.own.polling.long_polling_timeout_seconds=5",
    ]
    if token:
        settings.append(f"services.tollhouse.credentials.bearer.token={token}")
    with servers.opa(*(f"--set={setting}" for setting in settings)) as server:
        yield server


@asynccontextmanager
async def engine(count: int = 1, token: str = "") -> AsyncIterator[tuple[OpaServer, list[Server]]]:
    bundles = BundleServer(token)
    port = await bundles.start("127.0.0.1", 0)
    contexts = [opa(port, token) for _ in range(count)]
    # An OPA starts in a thread: it must be able to reach us meanwhile.
    started = [await asyncio.to_thread(context.__enter__) for context in contexts]
    made = OpaServer([server.url for server in started], bundles=bundles, patience=10.0)
    try:
        yield made, started
    finally:
        await made.close()
        await bundles.stop()
        for context in contexts:
            await asyncio.to_thread(context.__exit__, None, None, None)


def test_an_opa_server_answers_as_a_worker_does() -> None:
    async def run() -> None:
        async with engine(token="of-the-test") as (made, _):
            await made.load(revision())
            for path, who, kind, value in (
                (D + "decision", "web", "result", {"allowed": True, "rule": "web reads"}),
                ("data.shop.authz.decision", "x", "result", {"allowed": False, "reason": "not you"}),
                (D + "admin", "admin", "result", True),
                (D + "admin", "web", "undefined", None),
                (D + "nothing", "web", "undefined", None),
            ):
                answer = await ask(made, revision(), path, who)
                assert answer.kind == kind
                assert (msgspec.json.decode(answer.value) if answer.value else None) == value
            assert (await ask(made, revision(), D + "conflict")).reason == "conflict"
            assert (await ask(made, revision(), D + "endless", timeout=0.3)).reason == "timeout"
            assert (await ask(made, revision(), "a..b")).reason == "eval"
            broken: asyncio.Future[Evaluation] = asyncio.get_running_loop().create_future()
            made.evaluate(revision(), D + "decision", b"{", 2.0, broken.set_result)
            assert (await broken).reason == "input"
            many = await asyncio.gather(*(ask(made, revision(), D + "decision") for _ in range(300)))
            assert {answer.kind for answer in many} == {"result"}
            assert made.pending == 0
        assert (await ask(made, revision(), D + "decision")).reason == "unavailable"

    asyncio.run(run())


def test_no_answer_is_taken_from_another_revision() -> None:
    """While revisions change, every question gets an answer of its own revision, or none."""

    async def run() -> None:
        async with engine() as (made, _):
            await made.load(revision())
            answer = await ask(made, OTHER, D + "decision", timeout=0.2)
            assert answer.reason == "unavailable"
            assert revision().digest in answer.message
            seen: list[tuple[str, Evaluation]] = []
            going = True

            async def keep_asking() -> None:
                while going:
                    for which, what in (("good", revision()), ("other", OTHER)):
                        seen.append((which, await ask(made, what, D + "decision", timeout=0.05)))

            asking = [asyncio.create_task(keep_asking()) for _ in range(4)]
            for which, what in (("other", OTHER), ("good", revision())) * 2:
                seen_before = len(seen)
                await made.load(what)
                assert (await ask(made, what, D + "decision")).kind == "result"
                await until("an answer", lambda: any(each == which and answer.value for each, answer in seen[seen_before:]))  # noqa: B023
            going = False
            await asyncio.gather(*asking)
            values = {(which, answer.value) for which, answer in seen if answer.kind == "result"}
            assert values == {("good", b'{"allowed":true,"rule":"web reads"}'), ("other", b"false")}

    asyncio.run(run())


def test_another_server_takes_over() -> None:
    async def run() -> None:
        async with engine(2) as (made, started):
            await made.load(revision())
            end = time.monotonic() + 10
            while not all(each.revisions for each in made.state()):
                assert time.monotonic() < end
                await ask(made, revision(), D + "decision")
            started[0].signal(signal.SIGSTOP)
            got = [await ask(made, revision(), D + "decision", timeout=1.0) for _ in range(8)]
            assert {answer.kind for answer in got} == {"result"}
            assert not made.state()[0].well
            started[0].signal(signal.SIGCONT)
            started[0].kill()
            got = [await ask(made, revision(), D + "decision", timeout=1.0) for _ in range(8)]
            assert {answer.kind for answer in got} == {"result"}
            started[1].kill()
            failed = await ask(made, revision(), D + "decision", timeout=1.0)
            assert failed.reason == "unavailable"
            await asyncio.to_thread(started[1].start)
            end = time.monotonic() + 10
            while (await ask(made, revision(), D + "decision", timeout=1.0)).kind != "result":
                assert time.monotonic() < end

    asyncio.run(run())


def test_servers_that_are_not_there_and_bounds() -> None:
    async def run() -> None:
        made = OpaServer([f"http://127.0.0.1:{free_port()}"], max_pending=2, patience=0.1)
        waiting = [ask(made, revision(), D + "decision", timeout=0.5) for _ in range(3)]
        assert waiting[2].result().reason == "overloaded"
        assert {(await each).reason for each in waiting[:2]} == {"unavailable"}
        with pytest.raises(EngineUnavailable, match="no OPA server holds"):
            await made.load(revision())
        await made.close()
        with pytest.raises(EngineUnavailable):
            await made.load(revision())

    asyncio.run(run())


def test_a_plain_opa_without_our_bundle_answers_nothing() -> None:
    async def run(url: str) -> None:
        made = OpaServer([url], patience=0.1)
        answer = await ask(made, revision(), D + "decision", timeout=0.2)
        assert answer.reason == "unavailable"
        assert "holds no bundle" in answer.message
        await made.close()

    with servers.opa() as server:
        asyncio.run(run(server.url))


def test_bundles_are_served_to_those_who_wait_and_may() -> None:
    async def run() -> None:
        bundles = BundleServer("right")
        port = await bundles.start("127.0.0.1", 0)
        url = f"http://127.0.0.1:{port}{RESOURCE}"
        async with aiohttp.ClientSession() as session:

            async def get(token: str = "right", **headers: str) -> tuple[int, bytes, str]:
                async with session.get(url, headers={"Authorization": f"Bearer {token}", **headers}) as response:
                    return response.status, await response.read(), response.headers.get("ETag", "")

            assert (await get("wrong"))[0] == 401
            assert (await get())[0] == 503
            await bundles.publish(revision())
            status, body, etag = await get()
            assert (status, body) == (200, await bundle_of(revision()))
            assert (await get(**{"If-None-Match": etag}))[0] == 304
            assert (await get(**{"If-None-Match": etag, "Prefer": "modes=snapshot,delta;wait=0"}))[0] == 304
            waiting = asyncio.create_task(get(**{"If-None-Match": etag, "Prefer": "modes=snapshot,delta;wait=30"}))
            await until("somebody waits", lambda: bundles._clients == 1)
            await bundles.publish(OTHER)
            assert (await waiting)[:2] == (200, await bundle_of(OTHER))
        await bundles.stop()

    asyncio.run(run())
