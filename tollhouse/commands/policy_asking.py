"""`tollhouse policy eval`, `explain` and `bench`: a decision of a folder on one request, or on many."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from tollhouse.output import emit, example, format_option, printable
from tollhouse.policy_request import Described, decision_of_folder, input_of, read_inputs, request_options
from tollhouse.policy_work import ALLOW_BUILTIN, FOLDER, FORBID_BUILTIN, with_paths, with_pool
from tollhouse.values import DURATION

if TYPE_CHECKING:
    from mesh.questions import Decision
    from pdp.authoring import Explanation
    from pdp.engines.engine import Evaluation
    from tollhouse.policy_folder import PolicyFolder

F = TypeVar("F", bound=Callable[..., Any])

DECISION = click.option("--decision", default="", help="The decision (shop.authz.decision).  [default: the only `entrypoint: true`]")
TIMEOUT = click.option("--timeout", type=DURATION, default="5s", show_default=True, help="How long the evaluation may take.")
_IN_FLIGHT = 8


@click.command(
    "eval",
    epilog=example(
        "tollhouse policy eval conf/examples/shop/policy --as spiffe://shop.example/ns/shop/sa/web GET https://shop.example/catalog/1"
    ),
)
@FOLDER
@DECISION
@request_options
@click.option("--show-input", is_flag=True, help="Show the input document, too.")
@TIMEOUT
@ALLOW_BUILTIN
@FORBID_BUILTIN
@format_option
def evaluate(
    folder: Path,
    decision: str,
    show_input: bool,
    timeout: float,
    allow: tuple[str, ...],
    forbid: tuple[str, ...],
    form: str,
    **described: Any,
) -> None:
    """Evaluate a decision of a folder on an input document, or on a request that METHOD, URL and options describe.

    Exit code 0 when it allows, 1 when it denies or is an error.
    """
    from tollhouse.policy_folder import read_folder

    document = input_of(Described(**described))

    async def work(pool: Any) -> tuple[str, Evaluation, str]:
        found = read_folder(folder)
        name = await _chosen(pool, found, decision)
        revision = await pool.compile(found.modules, found.data, frozenset([name]))
        await pool.load(revision)
        answered: asyncio.Future[Evaluation] = asyncio.get_running_loop().create_future()
        pool.evaluate(revision, name, document, timeout, answered.set_result)
        return name, await answered, revision.digest

    name, evaluation, digest = with_pool(folder, work, form=form, workers=1, allow=allow, forbid=forbid)
    answer = _answer(evaluation, name, digest, folder)
    value: dict[str, Any] = {"decision": name, **_answer_value(answer), "result": _result(evaluation.value)}
    rows = [*_answer_rows(name, answer), ["result", _short(evaluation.value) or evaluation.kind]]
    if show_input:
        value["input"] = json.loads(document)
        rows.append(["input", document.decode()])
    emit(form, value, rows, ["", "what"])
    if value["verdict"] != "allow":
        raise SystemExit(1)


@click.command(
    epilog=example(
        "tollhouse policy explain conf/examples/shop/policy --as spiffe://shop.example/ns/shop/sa/web POST https://shop.example/payments/1"
    )
)
@FOLDER
@DECISION
@request_options
@TIMEOUT
@ALLOW_BUILTIN
@FORBID_BUILTIN
@format_option
def explain(
    folder: Path, decision: str, timeout: float, allow: tuple[str, ...], forbid: tuple[str, ...], form: str, **described: Any
) -> None:
    """Tell which rules held for a request, and of the others which condition did not, with its values.

    The request is an input document, or METHOD, URL and options describe it. Exit code 0 when it is allowed, 1 when not.
    """
    from pdp.authoring import explain as ask
    from pdp.publish import without_tests
    from tollhouse.policy_folder import read_folder
    from tollhouse.policy_steps import show_steps, values

    document = input_of(Described(**described))

    async def work(pool: Any) -> tuple[PolicyFolder, str, str, Explanation]:
        found = read_folder(folder)
        name = await _chosen(pool, found, decision)
        revision = await pool.compile(found.modules, found.data, frozenset([name]))
        return found, name, revision.digest, await ask(pool, without_tests(found.modules), found.data, name, document, timeout)

    found, name, digest, told = with_pool(folder, work, form=form, allow=allow, forbid=forbid)
    answer = _answer(told.evaluation, name, digest, folder)
    if form == "table":
        emit(form, None, [*_answer_rows(name, answer), ["result", _short(bytes(told.value)) or told.kind]], ["", "what"])
        show_steps(told, found.shown)
    else:
        value = {"decision": name, **_answer_value(answer), "result": _result(bytes(told.value))}
        value |= {"steps": values(told, found.shown), "complete": not told.more}
        value |= {"errors": list(told.errors), "printed": told.printed}
        emit(form, value, (), ())
    if answer.verdict.value != "allow":
        raise SystemExit(1)


@click.command(epilog=example("tollhouse policy bench conf/examples/shop/policy GET https://shop.example/catalog/1"))
@FOLDER
@DECISION
@request_options
@click.option("--seconds", type=click.FloatRange(0.1, 60), default=2.0, show_default=True, help="How long each measurement takes.")
@ALLOW_BUILTIN
@FORBID_BUILTIN
@format_option
def bench(
    folder: Path, decision: str, seconds: float, allow: tuple[str, ...], forbid: tuple[str, ...], form: str, **described: Any
) -> None:
    """Measure how long a decision takes: in the engine, and through a worker as a gateway asks it, with 8 questions in flight.

    Over the inputs of --input (one in a line) in turn, the described request, or without either a model of traffic. What is kept plays
    no part in it: these are decisions made anew.
    """
    from pdp.authoring import measure
    from pdp.engines.engine import PolicyError, PolicyProblem
    from pdp.publish import without_tests
    from pdp.traffic import documents
    from tollhouse.policy_folder import read_folder

    asked = Described(**described)
    if asked.input_file and not asked.method:
        inputs = [json.dumps(each).encode() for each in read_inputs(Path(asked.input_file))]
    elif asked.input_file or asked.url or asked.method:
        inputs = [input_of(asked)]
    else:
        inputs = [json.dumps(each).encode() for each in documents(500)]

    async def work(pool: Any) -> tuple[str, Any, float, int]:
        found = read_folder(folder)
        name = await _chosen(pool, found, decision)
        revision = await pool.compile(found.modules, found.data, frozenset([name]))
        await pool.load(revision)
        measured = await measure(pool, without_tests(found.modules), found.data, name, inputs[:1000], seconds)
        rate, failed = await _asked_in_flight(pool, revision, name, inputs, seconds)
        if failed:
            raise PolicyError((PolicyProblem(message=f"{name}: {failed}"),))
        return name, measured, rate, len(inputs)

    name, measured, rate, count = with_pool(folder, work, form=form, workers=1, allow=allow, forbid=forbid)
    rows = [
        ["decision", name],
        ["inputs", str(count)],
        ["engine", f"{measured.median:.1f} µs (median), {measured.high:.1f} µs (99 %), {measured.mean:.1f} µs (mean); on one core"],
        ["expressions", f"{measured.expressions:.1f} a decision"],
        ["decisions", f"{1e6 / measured.mean:,.0f} a second in the engine, on one core"],
        ["asked", f"{rate:,.0f} a second from a worker with 2 threads, {_IN_FLIGHT} in flight"],
    ]
    if measured.undefined:
        rows.append(["undefined", f"{measured.undefined} of {measured.count} decisions had no result: that is an error for a request"])
    value = {"decision": name, "inputs": count, "evaluations": measured.count, "undefined": measured.undefined}
    value |= {"engine_us": {"median": measured.median, "p99": measured.high, "mean": measured.mean}, "expressions": measured.expressions}
    value |= {"engine_per_second": 1e6 / measured.mean, "asked_per_second": rate}
    emit(form, value, rows, ["", "what"])


async def _asked_in_flight(pool: Any, revision: Any, name: str, inputs: list[bytes], seconds: float) -> tuple[float, str]:
    """Questions a second that a worker answers with several in flight; and why it stopped, if it did."""
    loop = asyncio.get_running_loop()
    began, failed, answered = loop.time(), "", 0
    end = began + seconds

    async def one(first: int) -> None:
        nonlocal failed, answered
        number = first
        while loop.time() < end and not failed:
            done: asyncio.Future[Any] = loop.create_future()
            pool.evaluate(revision, name, inputs[number % len(inputs)], 10.0, done.set_result)
            evaluation = await done
            if evaluation.kind == "error":
                failed = evaluation.message
            answered += 1
            number += _IN_FLIGHT

    await asyncio.gather(*(one(number) for number in range(_IN_FLIGHT)))
    return answered / (loop.time() - began), failed


async def _chosen(pool: Any, found: PolicyFolder, wanted: str) -> str:
    from pdp.authoring import inspect

    return decision_of_folder(wanted, () if wanted else (await inspect(pool, found.modules, found.data)).entrypoints)


def _result(value: bytes) -> Any:
    return json.loads(value) if value else None


def _short(value: bytes) -> str:
    return printable(value.decode() if len(value) <= 2000 else value[:2000].decode("utf-8", "ignore") + "...")


def _answer(evaluation: Evaluation, name: str, digest: str, folder: Path) -> Decision:
    from msgspec.structs import replace

    from pdp.answer import decision_of

    answer = decision_of(evaluation, name, digest)
    return replace(answer, reason=with_paths(answer.reason, folder))


def _answer_value(answer: Decision) -> dict[str, Any]:
    def pairs(fields: Sequence[tuple[bytes, bytes]]) -> list[list[str]]:
        return [[name.decode("utf-8", "replace"), value.decode("utf-8", "replace")] for name, value in fields]

    return {
        "verdict": answer.verdict.value,
        "status": answer.status,
        "rule": answer.rule,
        "reason": answer.reason,
        "headers": pairs(answer.headers),
        "headers_to_remove": [name.decode() for name in answer.headers_to_remove],
        "response_headers": pairs(answer.response_headers),
        "query_set": [list(pair) for pair in answer.query_set],
        "query_remove": list(answer.query_remove),
        "metadata": _result(answer.metadata),
        "body": answer.body.decode("utf-8", "replace"),
    }


def _answer_rows(name: str, answer: Decision) -> list[list[str]]:
    verdict = answer.verdict.value
    if verdict == "deny":
        verdict += f" ({answer.status or 403})"
    rows = [["decision", name], ["answer", verdict]]
    rows += [[what, printable(said)] for what, said in (("rule", answer.rule), ("reason", answer.reason)) if said]
    return rows
