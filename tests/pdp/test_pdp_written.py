"""Revisions that are written to OPA servers: real ones, which somebody else changes, ends and starts anew."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
from engine_world import ask, pool, revision, until

from mesh.policy import Revision
from pdp.engines import Engine
from pdp.engines.engine import EngineUnavailable, Evaluation, PolicyError
from pdp.engines.worker import WorkerPool
from pdp.engines.written import Written, WrittenOpaServers, written
from pdp.publish import publish
from tests import servers
from tests.servers import Server, free_port
from tollhouse.policy_folder import read_folder

D = "shop.authz."
OTHER = revision("package shop.authz\n\ndecision := false\n\nadmin := true\n")
EXAMPLE = Path(__file__).resolve().parents[2] / "conf" / "examples" / "shop" / "policy"


@asynccontextmanager
async def engine(count: int = 1) -> AsyncIterator[tuple[WrittenOpaServers, list[Server], WorkerPool]]:
    with contextlib.ExitStack() as stack:
        started = [stack.enter_context(servers.opa()) for _ in range(count)]
        async with pool() as workers:
            made = WrittenOpaServers([server.url for server in started], workers, patience=10.0)
            try:
                yield made, started, workers
            finally:
                await made.close()


async def call(server: Server, method: str, path: str, body: str = "", **headers: str) -> tuple[int, bytes]:
    """What somebody else does to an OPA."""
    async with aiohttp.ClientSession() as session, session.request(method, server.url + path, data=body, headers=headers) as response:
        return response.status, await response.read()


async def texts(server: Server) -> dict[str, str]:
    return {each["id"]: each["raw"] for each in msgspec.json.decode((await call(server, "GET", "/v1/policies"))[1])["result"]}


def shown(answer: Evaluation) -> Any:
    return (answer.kind, answer.reason, msgspec.json.decode(answer.value) if answer.value else None)


def test_it_answers_as_a_worker_does() -> None:
    async def run() -> None:
        async with engine() as (made, _, workers):
            for which in (revision(), OTHER):
                await made.load(which)
                await workers.load(which)
            for path, who in (
                (D + "decision", "web"),
                ("data.shop.authz.decision", "x"),
                (D + "admin", "admin"),
                (D + "admin", "web"),
                (D + "nothing", "web"),
                (D + "conflict", "web"),
                ("a..b", "web"),
            ):
                for which in (revision(), OTHER):
                    one, other = shown(await ask(made, which, path, who)), shown(await ask(workers, which, path, who))
                    assert one == other, (path, who)
            assert (await ask(made, revision(), D + "endless", timeout=0.3)).reason == "timeout"
            many = await asyncio.gather(*(ask(made, revision(), D + "decision") for _ in range(300)))
            assert {answer.value for answer in many} == {b'{"allowed":true,"rule":"web reads"}'}
        assert (await ask(made, revision(), D + "decision")).reason == "unavailable"

    asyncio.run(run())


TRICKY = {
    "lib.rego": """package lib.request

import data.shop.limits as limits
import input.attributes as attributes

default small := false

small if attributes.size < limits["max-size"]

f(x) := y if y := x * limits.factor

f(x) := 0 if x < 0

g(x) := concat("-", [x, data.shop.authz.word])

names[name] := size if some name, size in data.shop.grants

parts.one.two := 12

parts.one[key] := value if some key, value in {"three": 3}
""",
    "authz.rego": """package shop.authz

import data.lib.request
import data.lib.request.f

word := "yes"

answers := [x | x = input.list[_]]

grants contains name if some name in object.keys(data.shop.grants)

grants contains "more"

default decision := {"allowed": false}

decision := {"allowed": true, "list": answers} if {
\tevery x in input.list { f(x) > 1 }
\tnot request.names.nobody
} else := {"allowed": false, "why": "else", "g": request.g("a")} if request.small

mocked := x if { x := request.small with data.shop.limits as {"max-size": 1000} with input.attributes.size as 999 }

replaced := x if { x := f(3) with data.lib.request.f as 7 }

all := [path | walk(data.shop.grants, [path, _])]

under := data.lib.request.parts

text := $"{word} and {data.shop.limits.factor}"

uni if { data.shop.grants.web = size; size > 1 }
""",
    "other.rego": "package other\n\ndynamic := data.shop[input.name]\n\nwhole := count(data.shop)\n\nkeys := object.keys(data.shop)\n",
    "deep.rego": "package shop.limits.inner\n\nx := data.shop.limits.factor\n",
}
DATA = b'{"shop": {"grants": {"web": 2, "caf\\u00e9 \\"x\\"": null}, "limits": {"factor": 1.50, "max-size": 10, "if": [1, {"a": {}}]}}}'
INPUTS: tuple[dict[str, Any], ...] = (
    {},
    {"list": [2, 3], "name": "grants", "attributes": {"size": 3}},
    {"list": [0], "name": "limits", "attributes": {"size": 3}},
    {"list": [-1, 5], "name": "none", "attributes": {"size": 30}},
)


async def compare(made: Engine, workers: WorkerPool, what: Revision, inputs: tuple[dict[str, Any], ...], decisions: frozenset[str]) -> None:
    await made.load(what)
    await workers.load(what)
    for path in sorted(decisions):
        for document in inputs:
            said = []
            for each in (made, workers):
                answer: asyncio.Future[Evaluation] = asyncio.get_running_loop().create_future()
                each.evaluate(what, path, msgspec.json.encode(document), 5.0, answer.set_result)
                said.append(shown(await answer))
            assert said[0] == said[1], (path, document)


def test_every_rule_means_the_same_when_it_is_written_anew() -> None:
    async def run() -> None:
        async with engine() as (made, _, workers):
            what = await publish(workers, TRICKY, DATA, ())
            await compare(made, workers, what, INPUTS, (await written(workers, what)).decisions)
            folder = read_folder(EXAMPLE)
            example = await publish(workers, {k: v for k, v in folder.modules.items() if "_test" not in k}, folder.data, ())
            web = {"attributes": {"source": {"principal": "spiffe://shop.example/ns/shop/sa/web"}, "request": {"http": {"method": "GET"}}}}
            paths = ({**web, "parsed_path": ["catalog", "1"]}, {**web, "parsed_path": ["payments"]}, {})
            await compare(made, workers, example, paths, (await written(workers, example)).decisions)

    asyncio.run(run())


def test_what_can_not_be_written_is_refused_with_its_place() -> None:
    async def run() -> None:
        async with engine() as (made, _, _):
            source = "# METADATA\n# title: a\npackage a\n\ndecision := rego.metadata.chain()\n"
            with pytest.raises(PolicyError, match=r"authz.rego:5:13: rego.metadata.chain tells of METADATA"):
                await made.load(revision(source))

    asyncio.run(run())


def test_drift_is_found_and_mended_and_decides_nothing() -> None:
    """Each way in which an OPA can come to hold something else, by somebody with the right to do that."""

    async def run() -> None:
        async with engine() as (made, (server,), workers):
            await made.load(revision())
            mine: Written = await written(workers, revision())
            right = b'{"allowed":true,"rule":"web reads"}'
            gone = ("DELETE", f"/v1/policies/{mine.id}", "")
            edited = ("PUT", f"/v1/policies/{mine.id}", mine.text.replace('"allowed": true', '"allowed": false'))
            emptied = ("PUT", f"/v1/policies/{mine.id}", "package tollhouse\n")
            beside = ("PUT", "/v1/policies/mine", f"package tollhouse.r_{mine.name}.shop.authz\n\nadmin := true\n")
            within = ("PUT", "/v1/policies/tollhouse/0ff", f"package tollhouse\n\nr_{mine.name}.shop.authz.admin := true\n")
            data = ("PUT", f"/v1/data/tollhouse/r_{mine.name}/shop/more", '{"x": 1}')
            for method, path, body in (gone, emptied, edited, beside, within, data):
                before = made.state()[0].drifts
                status, text = await call(server, method, path, body)
                assert status in {200, 204}, text
                if (method, path, body) in (gone, emptied):  # found by the very answer
                    assert (await ask(made, revision(), D + "decision", timeout=5.0)).value == right
                end = asyncio.get_running_loop().time() + 10
                while await texts(server) != {mine.id: mine.text} or not made.state()[0].revisions or made.state()[0].drifts == before:
                    assert asyncio.get_running_loop().time() < end, (method, path)
                    await asyncio.sleep(0.02)
                assert (await ask(made, revision(), D + "decision")).value == right
                assert (await ask(made, revision(), D + "admin")).kind == "undefined"
            assert (await call(server, "GET", f"/v1/data/tollhouse/r_{mine.name}/shop/more"))[1].strip() == b"{}"
            # What is others' is left alone.
            await call(server, "PUT", "/v1/policies/theirs", "package theirs\n\nx := 1\n")
            await call(server, "PUT", "/v1/data/theirs/more", "1")
            made._look()
            await made.load(OTHER)
            assert "theirs" in await texts(server)
            assert b"1" in (await call(server, "GET", "/v1/data/theirs/more"))[1]

    asyncio.run(run())


GUARD = """package system.authz

default allow := false

allow if input.method in {"GET", "POST", "DELETE"}

allow if input.identity == "admin"
"""


def test_an_edited_module_is_not_asked_once_it_is_found(tmp_path: Path) -> None:
    """Between finding and mending, here because the OPA takes no writes of ours, it decides nothing."""

    async def run(server: Server) -> None:
        async with pool() as workers:
            mine = await written(workers, revision())
            admin = {"Authorization": "Bearer admin"}
            await call(server, "PUT", f"/v1/policies/{mine.id}", mine.text, **admin)
            made = WrittenOpaServers([server.url], workers, patience=2.0)
            await made.load(revision())
            assert (await ask(made, revision(), D + "decision")).kind == "result"
            status, _ = await call(server, "PUT", f"/v1/policies/{mine.id}", mine.text.replace("web reads", "other"), **admin)
            assert status == 200
            await until("it is found", lambda: "does not let us" in made.state()[0].problem)
            answer = await ask(made, revision(), D + "decision", timeout=0.3)
            assert answer.reason == "unavailable"
            assert "allow it there" in answer.message
            with pytest.raises(EngineUnavailable, match="allow it there"):
                await made.load(OTHER)
            await call(server, "PUT", f"/v1/policies/{mine.id}", mine.text, **admin)
            await call(server, "PUT", "/v1/policies/tollhouse/" + OTHER.digest[7:], (await written(workers, OTHER)).text, **admin)
            await made.load(OTHER)
            assert (await ask(made, revision(), D + "decision")).kind == "result"
            await made.close()

    guard = tmp_path / "guard.rego"
    guard.write_text(GUARD)
    with servers.opa("--authentication=token", "--authorization=basic", str(guard)) as server:
        asyncio.run(run(server))


def test_a_restart_and_another_server() -> None:
    async def run() -> None:
        async with engine(2) as (made, started, _):
            await made.load(revision())
            await until("both hold it", lambda: all(each.revisions for each in made.state()))
            started[0].kill()
            await asyncio.to_thread(started[0].start)
            got = [await ask(made, revision(), D + "decision", timeout=2.0) for _ in range(8)]
            assert {answer.kind for answer in got} == {"result"}, "it was empty, and the other one answered meanwhile"
            await until("it holds it again", lambda: all(each.revisions for each in made.state()))
            started[1].signal(signal.SIGSTOP)
            got = [await ask(made, revision(), D + "decision", timeout=1.0) for _ in range(8)]
            assert {answer.kind for answer in got} == {"result"}
            started[1].signal(signal.SIGCONT)
            for server in started:
                server.kill()
            assert (await ask(made, revision(), D + "decision", timeout=1.0)).reason == "unavailable"
            await until("it is said", lambda: all(each.problem for each in made.state()))

    asyncio.run(run())


def test_old_revisions_are_taken_away_and_those_of_others_stay() -> None:
    async def run() -> None:
        async with engine() as (made, (server,), workers):
            other = WrittenOpaServers([server.url], workers)
            theirs = revision("package shop.authz\n\ndecision := 99\n")
            await other.load(theirs)
            many = [revision(f"package shop.authz\n\ndecision := {number}\n") for number in range(6)]
            for number, each in enumerate(many):
                await made.load(each)
                assert shown(await ask(made, each, D + "decision")) == ("result", "", number)
            wanted = {f"tollhouse/{each.digest[7:]}" for each in (*many[-4:], theirs)}
            end = asyncio.get_running_loop().time() + 10
            while set(await texts(server)) != wanted:
                assert asyncio.get_running_loop().time() < end
                await asyncio.sleep(0.05)
            assert (await ask(made, many[0], D + "decision", timeout=0.2)).reason == "unavailable"
            assert shown(await ask(other, theirs, D + "decision")) == ("result", "", 99)
            await other.close()

    asyncio.run(run())


def test_servers_that_are_not_there() -> None:
    async def run() -> None:
        async with pool() as workers:
            made = WrittenOpaServers([f"http://127.0.0.1:{free_port()}"], workers, patience=0.1)
            with pytest.raises(EngineUnavailable, match="no OPA server holds"):
                await made.load(revision())
            assert made.state()[0].problem
            await made.close()
            with pytest.raises(EngineUnavailable):
                await made.load(revision())

    asyncio.run(run())
