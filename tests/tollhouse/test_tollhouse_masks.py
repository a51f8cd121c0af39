"""The masks of a policy, applied by our worker and by a real OPA: the same events come of both."""

from __future__ import annotations

import asyncio
import copy
import gzip
import json
import random
import threading
import time
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from mesh.model import Snapshot
from mesh.policy import Revision, digest_of
from tests import servers
from tollhouse.parts import LazyPool
from tollhouse.policy_masks import PolicyMasks, rules_of

POLICY = {
    "log.rego": """package system.log

mask contains rule if some rule in input.input.masks

drop if input.input.drop == "yes"
""",
    "a.rego": "package a\n\nallow := input.answer\n",
}
VALUE = "**"
TABLE: list[tuple[Any, Any]] = [
    ({"a": 1}, ["/input/a"]),
    ({"a": {"b": {"c": 1}}}, ["/input/a/b/c"]),
    ({"a": {"b": {"c": 1}}}, ["/input/a/x/c"]),
    ({"a": [1, 2, 3]}, ["/input/a/1"]),
    ({"a": [1, 2, 3]}, ["/input/a/+1", "/input/a/-0", "/input/a/-1", "/input/a/9", "/input/a/x", "/input/a/01"]),
    ({"a": [[1, 2], [3]]}, ["/input/a/0/1"]),
    ({"a": "text"}, ["/input/a/b", {"op": "upsert", "path": "/input/a/b", "value": VALUE}]),
    ({"a b": 1, "a%20b": 2}, ["/input/a b", "/input/a%20b"]),
    ({"x/y": 1, "x~1y": 2}, ["/input/x/y", "/input/x~1y", "/input/x%2Fy"]),
    ({":path": "/x?y", "x@y": 1, "ü": 1}, ["/input/:path", "/input/x@y", "/input/ü"]),
    ({"a": 1}, [{"op": "upsert", "path": "/input/a", "value": VALUE}]),
    ({"a": 1}, [{"op": "upsert", "path": "/input/new", "value": VALUE}]),
    ({"a": 1}, [{"op": "upsert", "path": "/input/new/deep/er", "value": {"x": [1]}}]),
    ({"a": 1}, [{"op": "upsert", "path": "/input/a"}]),
    ({"a": [1, 2]}, [{"op": "upsert", "path": "/input/a/1", "value": VALUE}]),
    ({"a": [1, 2]}, [{"op": "upsert", "path": "/input/a/2", "value": VALUE}]),
    ({"a": [{"b": 1}]}, [{"op": "upsert", "path": "/input/a/0/b", "value": VALUE}]),
    ({"a": [{"b": 1}]}, [{"op": "upsert", "path": "/input/a/5/b", "value": VALUE}]),
    ({"answer": {"x": 1, "y": 2}}, ["/result/x", {"op": "upsert", "path": "/result/y", "value": VALUE}]),
    ({"answer": True}, ["/result/x", "/result"]),
    ({"answer": True}, [{"op": "upsert", "path": "/result", "value": {"gone": True}}]),
    ({"a": 1}, ["/input"]),
    ({"a": 1}, ["/input", "/input/a"]),
    ({"a": 1}, [{"op": "upsert", "path": "/input", "value": VALUE}]),
    ({"a": 1}, ["/nd_builtin_cache", "/nd_builtin_cache/x"]),
    ({"a": {"b": 1}}, ["/input/a/", "/input//a", "/input/"]),
    ({"a": None}, ["/input/a/b", "/input/a"]),
    ({"a": 1}, ["/labels/id"]),
    ({"a": 1}, ["input/a"]),
    ({"a": 1}, ["/input/%zz"]),
    ({"a": 1}, [{"op": "erase", "path": "/input/a"}]),
    ({"a": 1}, [7]),
    ({"drop": "yes"}, []),
    ({"drop": "no"}, []),
]
KEYS = ("a", "b", "0", "1", "x y", ":p", "ü")


def generated(count: int) -> list[tuple[Any, Any]]:
    source = random.Random(20)

    def value(depth: int) -> Any:
        kind = source.randrange(6 if depth else 3)
        if kind < 3:
            return (1, "text", None)[kind]
        if kind < 5:
            return {key: value(depth - 1) for key in source.sample(KEYS, source.randrange(4))}
        return [value(depth - 1) for _ in range(source.randrange(4))]

    def mask() -> Any:
        path = "/" + "/".join([source.choice(("input", "input", "result")), *source.choices(KEYS, k=source.randrange(1, 4))])
        return path if source.random() < 0.5 else {"op": source.choice(("upsert", "remove")), "path": path, "value": value(1)}

    return [
        ({**{key: value(3) for key in KEYS}, "answer": value(3)}, [mask() for _ in range(source.randrange(1, 6))]) for _ in range(count)
    ]


CASES = TABLE + generated(300)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, dict[str, Any]]]:
    """OPA's own events, by the number of the case."""
    found: dict[str, dict[str, Any]] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            for event in json.loads(gzip.decompress(self.rfile.read(int(self.headers["content-length"])))):
                found[event["decision_id"]] = event
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    folder = tmp_path_factory.mktemp("policy")
    for name, source in POLICY.items():
        (folder / name).write_text(source)
    taker = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=taker.serve_forever, daemon=True).start()
    reporting = "decision_logs.reporting"
    settings = [
        f"services.taker.url=http://127.0.0.1:{taker.server_address[1]}",
        "decision_logs.service=taker",
        f"{reporting}.min_delay_seconds=1",
        f"{reporting}.max_delay_seconds=1",
    ]
    with servers.opa(*(f"--set={setting}" for setting in settings), str(folder)) as server:
        ids: dict[str, int] = {}
        for number, (document, masks) in enumerate(CASES):
            body = json.dumps({"input": {**document, "masks": masks}}).encode()
            request = urllib.request.Request(f"{server.url}/v1/data/a/allow", body, {"content-type": "application/json"})
            with urllib.request.urlopen(request, timeout=10) as answer:
                ids[json.loads(answer.read())["decision_id"]] = number
        last, seen = time.monotonic(), -1
        while time.monotonic() - last < 4:  # until nothing more has come for several uploads
            if len(found) != seen:
                last, seen = time.monotonic(), len(found)
            time.sleep(0.05)
        yield {ids[key]: event for key, event in found.items()}
    taker.shutdown()
    taker.server_close()


def ours() -> dict[int, dict[str, Any] | Exception]:
    """What comes of the same cases here; a case that is dropped is not there."""
    events: list[dict[str, Any]] = []
    for document, masks in CASES:
        event: dict[str, Any] = {"decision_id": "x", "path": "a/allow", "input": copy.deepcopy({**document, "masks": masks})}
        if "answer" in document:
            event["result"] = copy.deepcopy(document["answer"])
        events.append(event)

    async def work() -> list[Any]:
        pool = LazyPool(1, threads=1)
        masks = PolicyMasks(pool, asyncio.get_running_loop())
        revision = Revision(digest=digest_of(POLICY, b"{}"), modules=POLICY)
        try:
            await masks.apply(Snapshot(version="1", policy=revision))
            found: list[Any] = []
            for at in range(0, len(events), 16):
                found += await asyncio.to_thread(masks, events[at : at + 16])
            return found
        finally:
            await pool.close()

    return {number: event for number, event in enumerate(asyncio.run(work())) if event is not None}


def test_masks_do_what_they_do_in_opa(theirs: dict[int, dict[str, Any]]) -> None:
    mine = ours()
    wrong = []
    for number in range(len(CASES)):
        here, there = mine.get(number), theirs.get(number)
        shown = None if here is None or isinstance(here, Exception) else fields(here)
        if shown != (None if there is None else fields(there)):
            wrong.append((CASES[number], shown, None if there is None else fields(there)))
    assert not wrong, wrong[:3]
    assert len(theirs) > 300


def fields(event: dict[str, Any]) -> dict[str, Any]:
    return {name: event[name] for name in ("input", "result", "erased", "masked") if name in event}


@pytest.mark.parametrize(
    ("modules", "data", "expected"),
    [
        ({"a.rego": "package a\n# mask, drop\n"}, b"{}", ()),
        ({"a.rego": "package system.log\n\nmask contains 1\n"}, b"{}", ("system.log.mask",)),
        ({"a.rego": "package system\n\nlog.drop if true\n"}, b"{}", ("system.log.drop",)),
        ({"a.rego": "package a\n"}, b'{"system":{"log":{"mask":["/input/a"]}}}', ("system.log.drop", "system.log.mask")),
    ],
)
def test_only_a_policy_that_may_have_such_rules_is_asked(modules: dict[str, str], data: bytes, expected: tuple[str, ...]) -> None:
    assert rules_of(Revision(digest="sha256:1", modules=modules, data=data)) == expected


def test_masks_that_can_not_be_asked_keep_the_event_back(tmp_path: Path) -> None:
    modules = {"a.rego": 'package system.log\n\nmask contains "/input/a" if count(numbers.range(1, 100000000)) > 1\n'}

    async def work() -> Any:
        pool = LazyPool(1, threads=1)
        masks = PolicyMasks(pool, asyncio.get_running_loop())
        try:
            await masks.apply(Snapshot(version="1", policy=Revision(digest=digest_of(modules, b"{}"), modules=modules)))
            return await asyncio.to_thread(masks, [{"input": {"a": 1}}])
        finally:
            await pool.close()

    (found,) = asyncio.run(work())
    assert isinstance(found, Exception)
