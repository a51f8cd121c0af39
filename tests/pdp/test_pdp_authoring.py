"""What authors ask of the worker: types, tests with what they reach, formatting, measures. Problems say where, what, and what instead."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest
from envoy.service.auth.v3.attribute_context_pb2 import AttributeContext
from kept_world import Worker, a_worker, asking, policy

from mesh.http import NO_HEAD
from mesh.policy import EntryPoint, ReadSet
from pdp.authoring import Inspection, TestResult, inspect, measure, reformat, run_tests
from pdp.engines.engine import PolicyError
from pdp.input import document
from pdp.publish import publish, study
from pdp.report import Report, hit_rate, input_schema, node_at, report
from pdp.traffic import documents


def with_worker(use: Callable[[Worker], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        async with a_worker() as worker:
            return await use(worker)

    return asyncio.run(run())


def inspected(text: str, schemas: dict[str, Any] | None = None, **fields: Any) -> Inspection:
    modules = {"x.rego": f"package x\n\n{text}"}
    found = with_worker(lambda worker: inspect(worker, modules, b"{}", schemas or {"": input_schema()}, **fields))
    assert isinstance(found, Inspection)
    return found


def wrong(text: str, schemas: dict[str, Any] | None = None, **fields: Any) -> list[str]:
    with pytest.raises(PolicyError) as caught:
        inspected(text, schemas, **fields)
    return [str(problem) for problem in caught.value.problems]


HTTP = "input.attributes.request.http"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"allow if {HTTP}.methd", f'x.rego:3:10: {HTTP}.methd leads nowhere: {HTTP} has no "methd"; did you mean {HTTP}.method?'),
        ("allow if input.atributes", 'has no "atributes"; did you mean input.attributes?'),
        ("allow if input.attributes.source.principle", "did you mean input.attributes.source.principal?"),
        ("allow if input.parsed_pth[0]", "did you mean input.parsed_path?"),
        ("allow if input.nothing.like.it", "it has attributes, parsed_body, parsed_path, parsed_query, truncated_body, version"),
        (f"allow if {{ h := {HTTP}; h.pth }}", 'h has no "pth"; did you mean h.path?'),
        (f"h := {HTTP}\n\nallow if h.pth", "x.rego:5:10: data.x.h.pth leads nowhere"),
        (f"import {HTTP} as req\n\nallow if req.hots", "did you mean input.attributes.request.http.host?"),
        ("allow if input.parsed_path.first", "leads nowhere: input.parsed_path takes number"),
        ("allow if input.attributes.source.principal == 1", "match error"),
        ("allow if input.attributes.source.principal.name", "undefined ref"),
        (f"f(r) if r.methd\n\nallow if f({HTTP})", "did you mean"),
    ],
)
def test_a_path_that_no_document_has(text: str, said: str) -> None:
    if text.startswith("f("):
        assert inspected(text), "the type of an argument is not known to OPA: nothing is claimed about it"
        return
    assert any(said in problem for problem in wrong(text)), wrong(text)


@pytest.mark.parametrize(
    "text",
    [
        f'allow if {HTTP}.headers["x-anything"] == "1"',
        f'allow if {HTTP}.headers[":method"] == "GET"',
        "allow if input.attributes.contextExtensions.of_an_envoy",
        'allow if input.parsed_query.a[0] == "b"',
        "allow if input.parsed_body.any.thing[1]",
        "allow if input.attributes.metadataContext.filterMetadata.jwt.claims.sub",
        "allow if input.attributes.source.address.socketAddress.portValue > 1024",
        "allow if input.attributes.tlsSession.sni",
        'allow if some part in input.parsed_path\n\nnamed contains part if { some part in input.parsed_path; part != "" }',
        'test_a if allow with input as {"what": "is made up"}\n\nallow if input.attributes',
    ],
)
def test_paths_that_documents_may_have(text: str) -> None:
    assert "data.x.allow" in inspected(text).rules


def test_everything_is_told_at_once() -> None:
    text = "\n".join(
        [
            f"allow if {HTTP}.methd",
            'allow if http.send({"url": "http://x", "method": "GET"}).body',
            "allow if no_such(1)",
            "allow if count(1)",
            'allow if [1 | net.lookup_ip_addr("x")][0]',
        ]
    )
    found = wrong(text)
    assert [problem.split(":")[1] for problem in found] == ["3", "4", "5", "6", "7"], found
    assert "http.send is not allowed" in found[1]
    assert "undefined function no_such" in found[2]


def test_a_schema_of_the_folder_is_what_metadata_names() -> None:
    mine = {"type": "object", "properties": {"mine": {"type": "string"}}}
    text = "# METADATA\n# schemas:\n#   - input: schema.special.input\nallow if input.{}\n"
    schemas = {"": input_schema(), "special/input": mine}
    assert inspected(text.format("mine"), schemas)
    assert any("did you mean input.mine?" in problem for problem in wrong(text.format("minne"), schemas))
    assert any("undefined schema" in problem for problem in wrong(text.format("mine"), {"": input_schema()}))
    assert any("not JSON" in problem or "schema" in problem for problem in wrong("allow if input.a", {"": {"type": "nonsense"}}))


def test_a_schema_is_never_fetched() -> None:
    assert wrong("allow if input.a", {"": {"$ref": "http://127.0.0.1:9/schema.json"}})


def test_strict_mode_is_a_choice() -> None:
    unused = "import data.other\n\nallow if input.attributes"
    assert inspected(unused)
    assert "unused" in wrong(unused, strict=True)[0]


def test_entry_points_are_those_that_metadata_calls_so() -> None:
    found = inspected("# METADATA\n# entrypoint: true\nallow if input.attributes\n\nother := 1")
    assert found.entrypoints == ("data.x.allow",)
    assert found.packages == {"x.rego": "data.x"}


def test_our_documents_are_what_the_schema_says() -> None:
    """OPA's own validator, with all objects closed, is asked about documents of many kinds."""
    shown = [
        asking(),
        asking(query=b"a=1&b", headers=[(b"x-a", b"1"), (b"x-request-id", b"r")], principal="", via="spiffe://s/ns/a/sa/g", service=""),
        asking(headers=[(b"content-type", b"application/json")], body=b'{"a": [1]}'),
        asking(headers=[(b"content-type", b"application/octet-stream")], body=b"\xff\x00"),
    ]
    below = asking()
    below.head = NO_HEAD
    texts = [document(one, policy(body_limit=100)) for one in [*shown, below]]

    async def use(worker: Worker) -> list[Any]:
        rule = {"x.rego": "package x\n\nresult := json.match_schema(input.document, input.schema)\n"}
        revision = await publish(worker, rule, b"{}", ["x.result"])
        await worker.load(revision)
        asked = [msgspec.json.encode({"document": msgspec.Raw(text), "schema": closed(input_schema())}) for text in texts]
        asked.append(msgspec.json.encode({"document": {"atributes": {}}, "schema": closed(input_schema())}))
        return [json.loads(answer.value) for answer in await worker.evaluate(revision, "x.result", asked)]

    *ours, other = with_worker(use)
    assert ours == [[True, []]] * len(texts)
    assert other[0] is False


def closed(schema: Any) -> Any:
    """`schema` as OPA's type checker takes it: an object with properties has no others."""
    if isinstance(schema, dict):
        made = {key: closed(value) for key, value in schema.items() if key != "$schema"}
        return {**made, "additionalProperties": False} if schema.get("type") == "object" and "properties" in schema else made
    return schema


def test_the_schema_has_every_field_that_envoy_may_send() -> None:
    def check(descriptor: Any, node: Any, path: str) -> None:
        if "properties" not in node:
            return
        for field in descriptor.fields:
            assert field.json_name in node["properties"], f"{path}.{field.json_name}"
            if field.message_type is not None and field.message_type.full_name.startswith("envoy."):
                check(field.message_type, node["properties"][field.json_name], f"{path}.{field.json_name}")
        assert set(node["properties"]) == {field.json_name for field in descriptor.fields}, path

    check(AttributeContext.DESCRIPTOR, input_schema()["properties"]["attributes"], "attributes")


# Tests of policies


def outcome(text: str, more: str = "", **fields: Any) -> tuple[tuple[TestResult, ...], Any]:
    modules = {"x.rego": f"package x\n\n{text}", "x_test.rego": f"package x_test\n\nimport data.x\n\n{more}"}
    results, covered = with_worker(lambda worker: run_tests(worker, modules, b'{"limit": 3}', **fields))
    return results, covered


def test_a_failing_test_says_which_condition_and_why() -> None:
    (one, two), _ = outcome(
        'allow if {\n\tinput.method == "GET"\n\tinput.who in {"a", "b"}\n}',
        'test_a if {\n\tx.allow with input as {"method": "GET", "who": "c"}\n}\n\ntest_b if not x.allow with input as '
        '{"method": "GET", "who": "a"}\n',
    )
    assert one.failed is not None
    assert (one.failed.file, one.failed.row) == ("x_test.rego", 6)
    assert "x.allow is not there" in one.failed.said
    assert [(each.file, each.row, each.said) for each in one.because] == [
        ("x.rego", 5, 'input.who in {"a", "b"} is false (it is "c")'),
    ]
    assert two.failed is not None
    assert two.failed.said.endswith("is false (it is true)")


def test_cases_prints_errors_and_skipped_tests() -> None:
    results, _ = outcome(
        "a := 1",
        'test_cases[name] if {\n\tsome name, n in {"one": 1, "two": 2}\n\tn == x.a\n}\n\n'
        'test_said if {\n\tprint("a is", x.a)\n\tx.a == 2\n}\n\ntodo_test_later if false\n\n'
        "test_conflict if f(1)\n\nf(n) := n + 1\n\nf(n) := n + 2 if n > 0\n",
    )
    by_name = {each.name: each for each in results}
    assert by_name["test_cases/one"].passed
    assert not by_name["test_cases/two"].passed
    assert by_name["test_said"].printed == "a is 1\n"
    assert by_name["todo_test_later"].skipped
    assert "conflict" in by_name["test_conflict"].error


def test_some_tests_can_be_chosen() -> None:
    text = "test_a if true\n\ntest_b if true\n"
    assert [each.name for each in outcome("a := 1", text, run="test_b$")[0]] == ["test_b"]
    assert outcome("a := 1", text, run="nothing")[0] == ()


def test_coverage_tells_which_lines_no_test_reached() -> None:
    text = 'allow if {\n\tinput.a == 1\n\tinput.b == 2\n}\n\nnever if {\n\tinput.z\n\tcount("x") == 1\n}'
    _, covered = outcome(text, 'test_a if x.allow with input as {"a": 1, "b": 2}\n', coverage=True)
    (one,) = covered
    assert one.file == "x.rego", "files of tests are not counted"
    assert one.ranges == ((8, 10),)
    assert 0 < one.percent < 100
    assert outcome(text, "test_a if true", coverage=False)[1] == ()


def test_modules_are_formatted_as_opa_does() -> None:
    formatted = with_worker(lambda worker: reformat(worker, {"x.rego": "package x\nallow   if    {input.a==1}\n"}))
    assert formatted == {"x.rego": "package x\n\nallow if input.a == 1\n"}
    with pytest.raises(PolicyError, match=r"y\.rego:2"):
        with_worker(lambda worker: reformat(worker, {"x.rego": "package x\n", "y.rego": "package y\nallow if {"}))


def test_a_measure_has_numbers_and_an_error_is_one() -> None:
    modules = {"x.rego": "package x\n\nallow if input.a == 1\n\nconflict := 1 if input.a\n\nconflict := 2 if input.a\n"}
    got = with_worker(lambda worker: measure(worker, modules, b"{}", "x.allow", [b'{"a": 1}', b'{"a": 2}'], 0.05))
    assert got.count > 10
    assert 0 < got.median <= got.high
    assert got.expressions > 0
    assert got.undefined in (got.count // 2, (got.count - 1) // 2)
    with pytest.raises(PolicyError, match="conflict"):
        with_worker(lambda worker: measure(worker, modules, b"{}", "x.conflict", [b'{"a": 1}'], 0.05))


# Reports


def reported(text: str, sample: list[Any] | None = None) -> Report:
    async def use(worker: Worker) -> Report:
        revision, studied = await study(worker, {"x.rego": f"package x\n\n{text}"}, b"{}", ["x.allow"])
        return report(revision.entry_points["x.allow"], studied["x.allow"], sample or ())

    made = with_worker(use)
    assert isinstance(made, Report)
    return made


@pytest.mark.parametrize(
    ("text", "path", "row", "reason"),
    [
        (f"allow if {{\n\tsome k\n\t{HTTP}.headers[k]\n}}", f"{HTTP}.headers", 5, "all of it is gone through"),
        (f"allow if {HTTP}.headers[input.attributes.source.principal]", f"{HTTP}.headers", 3, "the key is not a constant"),
        ("allow if json.marshal(input.attributes.source)", "input.attributes.source", 3, "it is passed to json.marshal"),
        ("allow if f(input.attributes.source)\n\nf(s) if lower(json.marshal(s))", "input.attributes.source", 5, "json.marshal"),
        ("allow if input.parsed_query", "input.parsed_query", 3, "it is a condition by itself"),
        ("allow if input.parsed_path == input.version", "input.parsed_path", 3, "it is compared as a whole"),
        ("allow if walk(input.parsed_query, [_, 1])", "input.parsed_query", 3, "it is passed to walk"),
        ("allow if object.get(input.attributes, input.parsed_path[0], 1)", "input.attributes", 3, "object.get has a key"),
        (
            "allow if count(r) > 1\n\nr := input.parsed_path if input.attributes\n\nr := input.parsed_path if input.version",
            "input.parsed_path",
            5,
            "one of several values",
        ),
        ('allow if startswith(concat("/", input.parsed_path), "a/b")', "input.parsed_path", 3, "it is passed to concat"),
    ],
)
def test_where_and_why_a_read_set_is_wide(text: str, path: str, row: int, reason: str) -> None:
    wide = {each.path: each for each in reported(text).wide}
    assert wide[path].where == f"x.rego:{row}"
    assert reason in wide[path].reason


def test_what_a_decision_reaches_of_the_data() -> None:
    text = "allow if { data.users[input.attributes.source.principal].ok; not data.off; input.version }\n\nother if data.secret"
    assert reported(text).data == ("data.off", "data.users")
    assert reported("allow if input.version").data == ()


def test_what_is_narrow_is_not_called_wide() -> None:
    text = f'allow if {{ input.parsed_path[0] == "a"; {HTTP}.headers["x-a"] == "b"; input.parsed_query.a; count(input.parsed_path) < 3 }}'
    assert reported(text).wide == ()


def test_what_a_read_costs_in_hits() -> None:
    sample = documents(2000)
    narrow = reported('allow if input.parsed_path[0] == "orders"', sample)
    assert narrow.hits == 100.0
    wide = reported(f'allow if {{ input.parsed_path[0] == "orders"; {HTTP}.headers[lower("X")] }}', sample)
    assert wide.hits == 0.0, "each request has an id of its own"
    assert [each.hits_without for each in wide.wide] == [100.0]
    assert reported("allow if time.now_ns() > 1", sample).hits == 0.0
    assert reported("allow if input.parsed_body.a", sample).hits == 0.0


def test_hits_are_counted_as_they_come() -> None:
    point = EntryPoint(path="x", digest="", reads=ReadSet(values=(("a",),)))
    assert hit_rate(point, [{"a": n % 4} for n in range(100)]) == 100.0
    assert hit_rate(point, [{"a": n} for n in range(100)]) == 0.0
    assert hit_rate(point, [{"a": 1}] * 50 + [{"a": 1}] * 25 + [{"a": n} for n in range(100, 125)]) == 50.0
    assert hit_rate(point, [{"a": 1}, {"a": True}, {"a": 1}, {"a": "1"}]) == 50.0, "1, true and text are three values"


def test_paths_that_opa_does_not_look_at() -> None:
    got = reported('allow if object.get(input, ["attributes", "requst", "http", "method"], "") == "GET"')
    (problem,) = got.problems
    assert str(problem) == "x.rego:3:0: input.attributes.requst leads nowhere; did you mean input.attributes.request?"
    assert reported(f'allow if object.get({HTTP}, "method", "") == "GET"').problems == ()
    got = reported('allow if input.attributes.contextExtensions.gatway == "a"')
    assert got.problems == ()
    assert "did you mean input.attributes.contextExtensions.gateway?" in got.warnings[0].message
    assert reported("allow if input.attributes.contextExtensions.gateway").warnings == ()


def test_what_a_schema_says_of_a_path() -> None:
    schema = input_schema()
    assert node_at(schema, ("attributes", "request", "http", "headers", "x-a", "deeper")) is None
    assert node_at(schema, ("parsed_path", 3)) == {"type": "string"}
    assert node_at(schema, ("parsed_path", "first")) == "first"
    assert node_at(schema, ("attributes", "source", "principal", "name")) == "name"
    assert node_at(schema, ("truncated_body", 0)) == "0"
    assert node_at(schema, ()) is schema


def test_the_model_of_traffic_is_always_the_same() -> None:
    assert documents(50) == documents(50)
