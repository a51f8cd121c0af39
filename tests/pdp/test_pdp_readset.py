"""Policies above, what they read below; and what makes a policy volatile."""

from __future__ import annotations

import asyncio
import json

import pytest
from kept_world import a_worker, rego

from mesh.policy import ReadSet
from pdp.builtins import PURE
from pdp.plan import read_plan
from pdp.publish import publish
from pdp.reach import Reach
from pdp.readset import read_set


def parse(path: str) -> tuple[str | int, ...]:
    return tuple(int(part) if part.isdigit() else part for part in path.split(".")) if path != "*" else ()


def reads(values: str = "", defined: str = "", lengths: str = "", kinds: str = "", volatile: str = "") -> ReadSet:
    def paths(text: str) -> tuple[tuple[str | int, ...], ...]:
        return tuple(sorted((parse(word) for word in text.split()), key=repr))

    return ReadSet(
        values=paths(values),
        defined=paths(defined),
        lengths=paths(lengths),
        kinds=paths(kinds),
        volatile=tuple(volatile.split()),
    )


POLICIES: dict[str, tuple[str, ReadSet]] = {
    "one value": ("allow if input.a.b == 1", reads("a.b")),
    "truth of a value": ("allow if input.a.b", reads("a.b")),
    "an alias of an alias": ("allow if { v := input.a; w := v.b; w.c == 1 }", reads("a.b.c", "a a.b")),
    "an alias and its absence": ("allow if { v := input.a; not v.b }", reads("a.b", "a")),
    "unused alias": ("allow if { _ := input.a; input.c == 1 }", reads("c", "a")),
    "definedness only": ("allow if { not has }\nhas if { _ = input.a.b }", reads("", "a.b")),
    "whole input": ('allow if { x := input; json.marshal(x) == "{}" }', reads("*")),
    "compared with an empty object": ("allow if { x := input; x == {} }", reads("", "", "*", "*")),
    "constant array index": ('allow if input.p[0] == "a"', reads("p.0")),
    "negative index is never": ("allow if input.p[-1] == 1", reads("p")),
    "fraction as an index is never": ("allow if input.p[1.5] == 1", reads("p")),
    "number as text is a key": ('allow if input.p["0"] == 1', ReadSet(values=(("p", "0"),))),
    "length": ("allow if count(input.x) > 2", reads("", "x", "x")),
    "length of what is read anyway": ('allow if { count(input.x) > 2; input.x[_] == "a" }', reads("x")),
    "type": ("allow if is_string(input.z)", reads("", "", "", "z")),
    "type by name": ('allow if type_name(input.z) == "null"', reads("", "", "", "z")),
    "array pattern": ("allow if { [a, b] = input.pair; a == 1 }", reads("pair.0", "pair.1", "pair", "pair")),
    "object pattern": ('allow if { {"k": v} = input.obj; v == 1 }', reads("obj.k", "", "obj", "obj")),
    "compared with an empty array": ("allow if input.e == []", reads("", "", "e", "e")),
    "some in": ('allow if { some x in input.l; x == "b" }', reads("l")),
    "some key": ("allow if { some k; input.h[k] == 1 }", reads("h")),
    "every": ("allow if { every x in input.l { x > input.min } }", reads("l min")),
    "comprehension": ('allow if { s := {u.name | u := input.users[_]}; "x" in s }', reads("users")),
    "dynamic key": ("allow if input.m[input.k] == 1", reads("m k")),
    "dynamic key of data": ("allow if data.users[input.u].ok", reads("u")),
    "walk": ("allow if { walk(input.t, [_, v]); v == 1 }", reads("t")),
    "object.get": ('allow if object.get(input.a, "b", 0) == 1', reads("a.b", "", "", "a")),
    "object.get along a path": ('allow if object.get(input, ["a", "b", 0], 0) == 1', reads("a.b.0", "", "", "*")),
    "object.get with a key of the input": ("allow if object.get(input.a, input.k, 0) == 1", reads("a k")),
    "object.get whose default is read": ('allow if object.get(input.a, "b", input.d) == 1', reads("a.b d", "", "", "a")),
    "json.filter": ('allow if json.filter(input.a, ["b/c"]) == {}', reads("a")),
    "negation": ("allow if not input.a.b == 1", reads("a.b")),
    "default": ("default allow := false\nallow if input.a == 1", reads("a")),
    "else": ("allow := 1 if input.a == 1\nelse := 2 if input.b == 2\nelse := input.c", reads("a b c")),
    "one definition passes an alias": ("allow if r.x == 1\nr := input.a", reads("a.x", "a")),
    "two definitions may conflict": ("allow if is_string(r)\nr := input.a\nr := input.b", reads("a b")),
    "two definitions of a function may conflict": ("allow if is_string(f(1))\nf(_) := input.a\nf(_) := input.b", reads("a b")),
    "definedness of a rule": ("allow if { not r }\nr if input.a", reads("a")),
    "partial set": ("allow if s.admin\ns contains x if some x in input.roles", reads("roles")),
    "partial object": ("allow if o.k == 1\no[k] := v if some k, v in input.pairs", reads("pairs")),
    "ref head": ("allow if t.u.v == 1\nt.u.v := input.a\nt.u.w := input.b", reads("a")),
    "ref head with a variable": ("allow if t.x.d == 1\nt[k].d := v if some k, v in input.m", reads("m")),
    "function with an argument": (
        "allow if f(input.attributes)\nf(x) if x.source.principal == 1",
        reads("attributes.source.principal", "attributes"),
    ),
    "function by pattern": ('allow if f("a", input.b)\nf("a", x) if x == 1\nf("b", x) if x.z == 2', reads("b")),
    "function in a function": ("allow if f(input)\nf(x) if g(x.a)\ng(y) if y.b == 1", reads("a.b", "a")),
    "with input": ('allow if g with input as {"a": input.z}\ng if input.a == 1', reads("z")),
    "with a part of input": ("allow if g with input.a as input.z\ng if { input.a == 1; input.b == 2 }", reads("a b z")),
    "length of what with puts something into": ("allow if { count(input.a) == 1 with input.a.p as 2 }", reads("a")),
    "with in with": ('allow if g with input as {"a": 1}\ng if h with input as {"b": input.a}\nh if input.b == 1', reads()),
    "with a function replaced": ("allow if f(input.a) with f as m\nf(x) if x.b == 1\nm(x) if x.c == 1", reads("a.c", "a")),
    "with a builtin replaced": ("allow if g with time.now_ns as 5\ng if time.now_ns() < input.t", reads("t")),
    "with data": ('allow if g with data.cfg as {"k": input.z}\ng if data.cfg.k == 1', reads("z")),
    "string interpolation": ('allow if $"a-{input.x.y}" == "a-1"', reads("x.y")),
    "import of a part": ("import input.attributes.request as req\nallow if req.method == 1", reads("attributes.request.method")),
    "clock": ("allow if time.now_ns() > input.t", reads("t", volatile="time.now_ns")),
    "chance": ('allow if rand.intn("x", 2) == input.t', reads("t", volatile="rand.intn")),
    "token checked against the clock": (
        'allow if io.jwt.decode_verify(input.t, {"secret": "s"})[0]',
        reads("t", volatile="io.jwt.decode_verify"),
    ),
    "certificate checked against the clock": (
        "allow if crypto.x509.parse_and_verify_certificates(input.c)[0]",
        reads("c", volatile="crypto.x509.parse_and_verify_certificates"),
    ),
    "schema that may be fetched": ("allow if json.match_schema(input.c, {})[0]", reads("c", volatile="json.match_schema")),
    "token that is only read": ("allow if { [_, p, _] := io.jwt.decode(input.t); p.sub == 1 }", reads("t")),
    "dynamic reference over packages": (
        "allow if data.y[input.sel].ok\n---\npackage y.p\nok if input.a\n---\npackage y.q\nok if input.b",
        reads("a b sel"),
    ),
    "dynamic reference that passes aliases": (
        "allow if is_string(data.y[input.sel].v)\n---\npackage y.p\nv := input.a\n---\npackage y.q\nv := input.b",
        reads("sel", "", "", "a b"),
    ),
    "loop over packages may conflict": (
        'allow if is_string(r)\nr := v if { some k in ["p", "q"]; v := data.y[k].v }'
        "\n---\npackage y.p\nv := input.a\n---\npackage y.q\nv := input.b",
        reads("a b"),
    ),
    "definitions of one rule after one another": (
        "allow if count(r) > 0\nr contains 1 if input.h.x == input.p[0]\n"
        "r contains 2 if input.h.x in graph.reachable(data.users, [input.p[0]])\nr contains 3 if input.h.y in data.cfg",
        reads("h.x h.y p.0"),
    ),
    "a helper of another package, by another name": (
        "import data.lib.who as w\nallow if w.known(input.source)\n---\npackage lib.who\nimport data.lib.parts\n"
        "known(s) if parts.name(s) in data.users\n"
        '---\npackage lib.parts\nname(s) := split(s.principal, "/")[1]',
        reads("source.principal", "source"),
    ),
    "a default of a function": ('default f(_) := "none"\nf(x) := x.a if x.b\nallow if f(input.o) == "none"', reads("o.a o.b", "o")),
    "a function that is negated": ("allow if not f(input.o)\nf(x) if x.a == 1", reads("o.a", "o")),
    "data that is gone through with a value": (
        "allow if { some k, v in data.users; k == input.u; v.ok }",
        reads("u"),
    ),
    "every over data": ("allow if every v in data.users { v.ok != input.u }", reads("u")),
    "comprehensions in one another": (
        "allow if { s := {y | some x in input.l; y := [z | z := x[_]; z != input.m]}; count(s) > 0 }",
        reads("l m"),
    ),
    "object.get in a function": (
        'allow if header(input.http, "x-a") == "1"\nheader(h, n) := object.get(h.headers, n, "")',
        reads("http.headers.x-a", "http", "", "http.headers"),
    ),
    "an element at a constant index of what a rule passes on": ("allow if parts[1] == 1\nparts := input.p", reads("p.1", "p")),
    "an element behind a length": ("allow if { count(input.p) == 2; input.p[1] == 1 }", reads("p.1", "p", "p")),
    "walk over data": ("allow if { walk(data.users, [p, v]); v == input.u }", reads("u")),
    "a set asked for a value of the input": ('allow if {"a", "b"}[input.a]', reads("a")),
    "an object asked for a value of the input": ('allow if {"a": 1}[input.a] == input.b', reads("a b")),
    "with on a rule": ("allow if g with data.x.h as input.z\ng if h == 1\nh := input.a", reads("z")),
    "the same function with two arguments": ("allow if { f(input.a); f(input.b) }\nf(x) if x.n == 1", reads("a.n b.n", "a b")),
    "a value through several rules": ("allow if c == 1\na := input.v\nb := a.w\nc := b.x", reads("v.w.x", "v v.w")),
    "a part of a value that rules pass on by key": ('allow if t["k"] == 1\nt := {"k": input.a, "l": input.b}', reads("a b")),
    "a conflict that cannot be": ("allow if is_string(r)\nr := input.a if input.k == 1\nr := input.b if input.k == 2", reads("a b k")),
    "else of a function": ("allow if f(input.o)\nf(x) if x.a == 1\nelse if x.b == 2", reads("o.a o.b", "o")),
    "a package as a value": ("allow if count(data.y) > 0\n---\npackage y\na := input.a if input.b", reads("a b")),
}


@pytest.fixture(scope="module")
def found() -> dict[str, ReadSet]:
    async def plan_all() -> dict[str, ReadSet]:
        data = json.dumps({"users": {"u": {"ok": True}}, "cfg": {"k": 2}}).encode()
        async with a_worker() as worker:
            sets = {}
            for name, (text, _) in POLICIES.items():
                modules = rego("x.allow", f"package x\n{text}")
                sets[name] = (await publish(worker, modules, data, ["x.allow"])).entry_points["x.allow"].reads
            return sets

    return asyncio.run(plan_all())


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_reads(name: str, found: dict[str, ReadSet]) -> None:
    expected, got = POLICIES[name][1], found[name]
    shown = ReadSet(
        values=tuple(sorted(got.values, key=repr)),
        defined=tuple(sorted(got.defined, key=repr)),
        lengths=tuple(sorted(got.lengths, key=repr)),
        kinds=tuple(sorted(got.kinds, key=repr)),
        volatile=got.volatile,
        widened=got.widened,
    )
    assert shown == expected


def interpret(
    *statements: tuple[str, dict[str, object]], strings: tuple[str, ...] = (), functions: tuple[dict[str, object], ...] = ()
) -> Reach:
    block = {"stmts": [{"type": kind, "stmt": fields} for kind, fields in statements]}
    return read_set(
        read_plan(
            {
                "static": {"strings": [{"value": text} for text in strings]},
                "plans": {"plans": [{"name": "x", "blocks": [block]}]},
                "funcs": {"funcs": list(functions)},
            }
        )
    )


def test_an_unknown_statement_reads_everything() -> None:
    got = interpret(("TeleportStmt", {"target": 3}))
    assert got.reads.values == ((),)
    assert got.data == {()}
    assert "TeleportStmt" in got.reads.widened[0]


def test_a_statement_of_an_unknown_form_reads_everything() -> None:
    got = interpret(("DotStmt", {"source": {"type": "local", "value": 0}, "key": {"type": "wave", "value": 1}, "target": 3}))
    assert got.reads.values == ((),)
    assert got.reads.widened


def test_a_function_that_calls_itself_reads_everything() -> None:
    arguments = [{"type": "local", "value": 0}]
    call = {"type": "CallStmt", "stmt": {"func": "f", "args": arguments, "result": 5}}
    loop = {"name": "f", "params": [0], "return": 1, "blocks": [{"stmts": [call]}]}
    got = interpret(("CallStmt", {"func": "f", "args": arguments, "result": 3}), functions=(loop,))
    assert got.reads.values == ((),)
    assert "calls itself" in got.reads.widened[0]


def test_a_path_that_grows_in_a_loop_ends() -> None:
    step = {"type": "DotStmt", "stmt": {"source": {"type": "local", "value": 3}, "key": {"type": "string_index", "value": 0}, "target": 3}}
    got = interpret(
        ("AssignVarStmt", {"source": {"type": "local", "value": 0}, "target": 3}),
        ("ScanStmt", {"source": 1, "key": 4, "value": 5, "block": {"stmts": [step]}}),
        strings=("k",),
    )
    assert max(len(path) for path in got.reads.values) <= 40
    assert got.data == {()}


def test_nothing_that_has_a_clock_or_a_dice_is_on_the_list() -> None:
    async def about() -> dict[str, object]:
        async with a_worker() as worker:
            return await worker.command({"op": "version"})

    reply = asyncio.run(about())
    known = reply["builtins"]
    assert isinstance(known, list)
    assert set(known) >= PURE
    assert sorted(set(known) - PURE) == [
        "crypto.x509.parse_and_verify_certificates",
        "crypto.x509.parse_and_verify_certificates_with_options",
        "http.send",
        "internal.print",
        "internal.test_case",
        "io.jwt.decode_verify",
        "io.jwt.encode_sign",
        "io.jwt.encode_sign_raw",
        "json.match_schema",
        "json.verify_schema",
        "net.lookup_ip_addr",
        "opa.runtime",
        "print",
        "providers.aws.sign_req",
        "rand.intn",
        "time.now_ns",
        "trace",
        "uuid.rfc4122",
    ]
