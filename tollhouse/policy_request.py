"""The input of a decision as the command line gives it: a file, or a request described as `tollhouse explain` takes it."""

from __future__ import annotations

import base64
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
import msgspec

from tollhouse.output import Complaint
from tollhouse.values import NAMED

if TYPE_CHECKING:
    from mesh.tokens import Bearer

F = TypeVar("F", bound=Callable[..., Any])

LARGEST = 64 << 20
"""Bytes of one input."""
MOST = 200_000
"""Inputs in one file."""


class Described(msgspec.Struct, frozen=True, kw_only=True):
    """What the options say."""

    method: str = ""
    url: str = ""
    input_file: str = ""
    principal: str = ""
    via: str = ""
    headers: tuple[str, ...] = ()
    address: str = "127.0.0.1"
    body: str = ""
    claims: str = ""
    gateway: str = ""
    listener: str = ""
    route: str = ""
    template: str = ""
    service: str = ""


def request_options(function: F) -> F:
    """Adds the arguments and options of a request to a command, which gets them as keywords for `Described`."""
    for each in reversed(
        (
            click.argument("method", required=False, default=""),
            click.argument("url", required=False, default=""),
            click.option(
                "--input",
                "input_file",
                default="",
                metavar="FILE",
                help="The input, or a line of a decision log; - for standard input.",
            ),
            click.option("--as", "principal", default="", metavar="SPIFFE-ID", help="Who asks; nobody in particular without it."),
            click.option("--via", default="", metavar="SPIFFE-ID", help="The gateway that passed the request on."),
            click.option("--header", "-H", "headers", multiple=True, metavar="'NAME: VALUE'", help="A header; may be given again."),
            click.option("--address", default="127.0.0.1", show_default=True, metavar="IP", help="Where it comes from."),
            click.option("--body", default="", help="The request's body, as a policy with `withBody` is shown it."),
            click.option("--claims", default="", metavar="JSON", help="The claims of a verified token."),
            click.option("--gateway", type=NAMED, default="edge/ingress", show_default=True, metavar="NAME", help="The gateway that asks."),
            click.option("--listener", default="https", show_default=True, help="Its listener."),
            click.option("--route", default="", help="The matched rule (shop/orders#0)."),
            click.option("--template", default="", help="The path as the route has it (/orders/**)."),
            click.option("--service", default="", metavar="NAMESPACE/NAME", help="The service that the request goes to."),
        )
    ):
        function = each(function)
    return function


def input_of(asked: Described) -> bytes:
    """The input document, as JSON. Raises `Complaint`."""
    if asked.input_file:
        if asked.method or asked.url:
            raise Complaint("give either --input or a METHOD and a URL, not both", 2)
        (document,) = _inputs(_read(asked.input_file), asked.input_file, one=True)
        return msgspec.json.encode(document)
    if not asked.url:
        raise Complaint("which request? Write for example GET https://shop.example/orders/1, or --input FILE", 2)
    return _document(asked)


def read_inputs(file: Path) -> list[Any]:
    """All inputs of a file: a JSON document, or one in a line; of a decision log's lines, their `input`. Raises `Complaint`."""
    return _inputs(_read(str(file)), str(file), one=False)


def _read(name: str) -> bytes:
    try:
        content = sys.stdin.buffer.read(LARGEST + 1) if name == "-" else Path(name).read_bytes()
    except OSError as problem:
        raise Complaint(f"--input: {name}: {problem.strerror}", 2) from None
    if name == "-" and len(content) > LARGEST:
        raise Complaint(f"--input: more than {LARGEST >> 20} MiB; write it to a file", 2)
    return content


def _inputs(content: bytes, name: str, *, one: bool) -> list[Any]:
    try:
        documents = [json.loads(content)]
    except (ValueError, RecursionError) as whole:
        if one:
            raise Complaint(f"--input: {name} is not JSON: {whole}", 2) from None
        documents = []
        for number, line in enumerate(content.splitlines(), 1):
            if not line.strip():
                continue
            try:
                documents.append(json.loads(line))
            except (ValueError, RecursionError) as problem:
                raise Complaint(f"--input: {name}:{number} is not JSON: {problem}; it is one document, or one in a line", 2) from None
    if len(documents) == 1 and isinstance(documents[0], list):
        documents = documents[0]
        if one:
            raise Complaint(f"--input: {name} is a list; give one input document, an object", 2)
    found = []
    for number, document in enumerate(documents, 1):
        if isinstance(document, dict) and "decision_id" in document:
            if "input" not in document:
                raise Complaint(f"--input: {name}: record {number} of the decision log has no input; it was not logged", 2)
            document = document["input"]  # noqa: PLW2901 -- unwrapped
        if not isinstance(document, dict):
            raise Complaint(f"--input: {name}: {'it' if one else f'input {number}'} is not an object", 2)
        found.append(document)
    if not found or len(found) > MOST:
        raise Complaint(f"--input: {name} has {len(found)} inputs; at least one and at most {MOST} are allowed", 2)
    return found


def _document(asked: Described) -> bytes:
    """The document of a described request, its path in the normal form."""
    from urllib.parse import urlsplit

    from gateway.normalize import normalize
    from identity.problems import IdentityError
    from identity.spiffe import SpiffeId
    from mesh.model import DecisionPolicy
    from mesh.peer import Caller, Peer
    from mesh.questions import Asking
    from pdp.input import document
    from tollhouse.request import head_of

    for name in (asked.principal, asked.via):
        if name:
            try:
                SpiffeId.parse(name)
            except IdentityError as problem:
                raise Complaint(str(problem), 2) from None
    parts = urlsplit(asked.url)
    if parts.scheme not in {"http", "https"} or not parts.netloc:
        raise Complaint(f"{asked.url!r} is not a URL; write for example https://shop.example/orders/1", 2)
    head = head_of(asked.method, asked.url, asked.headers, asked.body, parts.scheme)
    refusal = normalize(head)
    if refusal is not None:
        raise Complaint(f"{asked.method} {asked.url}: it is refused before any policy is asked: {refusal.reason or refusal.sentence}", 2)
    if asked.claims:
        head.bearer = _bearer(asked.claims)
    peer_id = asked.via or asked.principal
    port = parts.port or (443 if parts.scheme == "https" else 80)
    peer = Peer(principal=peer_id, address=asked.address, port=40000, local_address="127.0.0.1", local_port=port)
    caller = Caller(asked.principal, asked.via)
    asking = Asking(head, peer, caller, asked.gateway, asked.listener, asked.route, asked.template, asked.service, round(time.time(), 3))
    limit = 0
    if asked.body:
        asking.body, limit = asked.body.encode(), len(asked.body.encode())
    try:
        return document(asking, DecisionPolicy(name="described", level="mesh", decision="described", body_limit=limit))
    except ValueError as problem:
        raise Complaint(f"--body: {problem}", 2) from None


def _bearer(claims: str) -> Bearer:
    """What a verified token that says `claims` (JSON) says to policies. Raises `Complaint`."""
    from identity.jwt import Bad, bearer_of, read_token
    from mesh.tokens import KeySource, TokenRule

    head, payload = (base64.urlsafe_b64encode(part.encode()).decode().rstrip("=") for part in ('{"alg":"RS256"}', claims))
    token = read_token(f"{head}.{payload}.AAAA")
    if isinstance(token, Bad):
        raise Complaint(f'--claims: {token.message}; write for example \'{{"sub": "alice", "roles": ["admin"]}}\'', 2)
    return bearer_of(token, TokenRule(name="described", issuer="", keys=KeySource()))


def decision_of_folder(wanted: str, entrypoints: Sequence[str]) -> str:
    """The decision that is meant: the one that is named, or the only entry point. Raises `Complaint`."""
    if wanted:
        return wanted
    names = [each.removeprefix("data.") for each in entrypoints]
    if len(names) == 1:
        return names[0]
    there = f"one of {', '.join(names)}" if names else "no rule's METADATA says `entrypoint: true`"
    raise Complaint(f"which decision? Name it with --decision (shop.authz.decision): {there}", 2)
