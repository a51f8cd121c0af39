"""`tollhouse apply`, `get`, `delete`, `validate`: the configuration, in etcd or in a directory."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from tollhouse.output import Complaint, emit, example, format_option

if TYPE_CHECKING:
    from discovery.store import Store
    from mesh.documents import Document, Key, Problem
    from mesh.workspace import Workspace

T = TypeVar("T")

CONFIG = click.option("--config", required=True, help="Where the configuration is: a directory, or etcd://HOST:PORT[,HOST:PORT...].")
SUFFIXES = (".yaml", ".yml", ".json")


@click.command(epilog=example("tollhouse apply -f routes.yaml --config etcd://127.0.0.1:2379"))
@click.option("-f", "--file", "files", multiple=True, required=True, help="A file, a directory or - (standard input); may be given again.")
@CONFIG
@format_option
def apply(files: tuple[str, ...], config: str, form: str) -> None:
    """Put resources into the configuration: all of them, or none when one of them is wrong.

    They are checked first, together with what is there already: see tollhouse validate. A status that they carry is not stored.
    """
    documents, problems = read(files)
    refuse(problems)
    documents, others = apart([without_status(document) for document in documents])

    async def work(store: Store) -> Any:
        there, _ = await store.list()
        wanted = {document.key: document for document in documents}
        whole = [*(document for document in there if document.key not in wanted), *documents]
        wrong = [problem for problem in check(whole) if problem.key is None or problem.key in wanted]
        refuse([problem for problem in wrong if problem.severity == "error" and unreadable(problem)])
        applied = await store.apply(documents)
        return applied, [problem for problem in wrong if not unreadable(problem)]

    applied, left = with_store(config, work, "apply")
    rows: list[list[str]] = []
    names: dict[str, list[str]] = {}
    for what in ("created", "changed", "unchanged"):
        keys: Sequence[Key] = getattr(applied, what)
        rows += [[key.kind, f"{key.namespace}/{key.name}" if key.namespace else key.name, what] for key in keys]
        names[what] = [str(key) for key in keys]
    rows += [[kind, f"{count} resources", "passed over"] for kind, count in others.items()]
    shown = {**names, "passedOver": others, "problems": [str(problem) for problem in left]}
    emit(form, shown, rows, ["kind", "name", "result"], "nothing to apply")
    for problem in left:
        click.echo(f"{problem.severity}: {problem}", err=True)


@click.command(epilog=example("tollhouse get HTTPRoute shop/orders --config etcd://127.0.0.1:2379 -o yaml"))
@click.argument("kind", default="")
@click.argument("name", default="")
@click.option("-n", "--namespace", default="", help="Only those of this namespace.")
@CONFIG
@format_option
def get(kind: str, name: str, namespace: str, config: str, form: str) -> None:
    """Show resources, their status and what is wrong with them: all, those of a KIND, or the one of that NAME ([NAMESPACE/]NAME).

    The status is what these resources come to together, as of now; a status that came with a resource is replaced by it.
    """
    from mesh.kinds import is_passed_over
    from mesh.writing import body_to_yaml
    from tollhouse.shown import rfc3339

    wanted = kind_named(kind) if kind else ""
    if "/" in name:
        namespace, _, name = name.partition("/")
    found, wrong = with_store(config, lambda store: store.list())
    workspace = together(found)
    whole = workspace.snapshot.problems
    statuses = workspace.statuses(rfc3339())
    chosen = [
        document
        for document in found
        if not is_passed_over(document.key)
        and (not wanted or document.key.kind == wanted)
        and (not namespace or document.key.namespace == namespace)
        and (not name or document.key.name == name)
    ]
    if name and not chosen:
        raise Complaint(f"there is no {wanted} {namespace + '/' if namespace else ''}{name} in {config}")
    bodies = [with_status(document.body, statuses.of(document.key)) for document in chosen]
    if form == "yaml":
        click.echo("---\n".join(map(body_to_yaml, bodies)), nl=False)
    else:
        problems = {
            document.key: [problem for problem in (*whole, *wrong) if problem.key == document.key and problem.severity == "error"]
            for document in chosen
        }
        rows = [
            [
                document.key.kind,
                document.key.namespace or "-",
                document.key.name,
                status_text(body.get("status") if statuses.of(document.key) else None),
                problem_text(problems[document.key]),
            ]
            for document, body in zip(chosen, bodies, strict=True)
        ]
        emit(form, bodies, rows, ["kind", "namespace", "name", "status", "problem"], "no resources")
    for problem in wrong:
        click.echo(f"{problem.severity}: {problem}", err=True)
    if any(problem.severity == "error" for problem in wrong):  # what is shown may not be all that there is
        raise SystemExit(1)


@click.command(epilog=example("tollhouse delete HTTPRoute shop/orders --config etcd://127.0.0.1:2379"))
@click.argument("kind")
@click.argument("names", nargs=-1, required=True)
@CONFIG
@format_option
def delete(kind: str, names: tuple[str, ...], config: str, form: str) -> None:
    """Take resources out of the configuration: those of a KIND with these NAMES ([NAMESPACE/]NAME)."""
    wanted = kind_named(kind)

    async def work(store: Store) -> Any:
        found, _ = await store.list()
        keys = []
        for name in names:
            namespace, slash, last = name.rpartition("/")
            fitting = [
                each.key
                for each in found
                if each.key.kind == wanted and each.key.name == last and (not slash or each.key.namespace == namespace)
            ]
            if len(fitting) > 1:
                where = ", ".join(f"{key.namespace}/{key.name}" for key in fitting)
                raise Complaint(f"{wanted} {name} is not one resource: there is {where}; say which", 2)
            if not fitting:
                raise Complaint(f"there is no {wanted} {name} in {config}; nothing was deleted")
            keys += fitting
        return await store.delete(keys)

    gone: Sequence[Key] = with_store(config, work, "delete")
    emit(form, [str(key) for key in gone], [[key.kind, key.namespace or "-", key.name] for key in gone], ["kind", "namespace", "name"])


@click.command(epilog=example("tollhouse validate -f conf/"))
@click.option("-f", "--file", "files", multiple=True, required=True, help="A file, a directory or - (standard input); may be given again.")
@click.option("--config", default="", help="Look at them together with what is there: a directory, or etcd://HOST:PORT.")
@click.option("--strict", is_flag=True, help="Take warnings for errors.")
@click.option(
    "--workers", type=click.IntRange(1, 1024), default=1, show_default=True, help="Of each gateway: tells which limits can't be leased."
)
@format_option
def validate(files: tuple[str, ...], config: str, strict: bool, workers: int, form: str) -> None:
    """Check resources, and the Rego in a directory's folder policy/, without touching anything. Exit code 1 when one is wrong."""
    from mesh.quota_leasing import lessees, unleased

    documents, problems = read(files)
    documents, others = apart(documents)
    whole = list(documents)
    if config:
        there, _ = with_store(config, lambda store: store.list())
        keys = {document.key for document in documents}
        whole += [document for document in there if document.key not in keys]
    policy, compiled = asyncio.run(policy_of(files, documents))
    checked = check([*whole, *compiled])
    wrong = {problem.key for problem in checked if problem.severity == "error"}
    quotas = [document for document in documents if document.key.kind == "QuotaPolicy" and document.key not in wrong]
    found = [*problems, *checked, *policy, *unleased(quotas, lessees(whole, workers))]
    mine = {document.key for document in documents}
    shown = [problem for problem in found if problem.key is None or problem.key in mine]
    rows = [[problem.severity, str(problem)] for problem in shown]
    value = [{"severity": problem.severity, "reason": problem.reason, "where": problem.where, "text": str(problem)} for problem in shown]
    emit(form, value, rows, ["severity", "problem"], f"{len(documents)} resources, nothing wrong with them")
    for kind, count in others.items():
        click.echo(f"note: {count} of {kind} passed over: they mean nothing here", err=True)
    if any(problem.severity == "error" or strict for problem in shown):
        raise SystemExit(1)


# What they share


def with_store(config: str, work: Callable[[Store], Awaitable[T]], action: str = "write", reason: str = "") -> T:
    """Does `work` with the store that `config` names, and closes it; changes of policy are written down as `action`, with the `reason` for
    it. Raises `Complaint`."""
    from discovery.audit import Audit
    from discovery.store import StoreError, open_store
    from tollhouse.parts import is_etcd, unreachable

    if not is_etcd(config) and not Path(config).is_dir():
        raise Complaint(f"--config: {config} is not a directory; name a directory of YAML files, or etcd://HOST:PORT", 2)

    async def run() -> T:
        store = open_store(config, Audit(action=action, reason=reason))
        try:
            return await work(store)
        finally:
            await store.close()

    try:
        return asyncio.run(run())
    except ValueError as problem:
        raise Complaint(f"--config: {problem}", 2) from None
    except StoreError as problem:
        raise Complaint(unreachable(problem)) from None


def read(files: Sequence[str]) -> tuple[list[Document], list[Problem]]:
    """The documents in files, directories (without their folder policy/) and standard input, and what cannot be read.

    Raises `Complaint`.
    """
    from mesh.rereading import Rereader

    documents: list[Document] = []
    problems: list[Problem] = []
    for name in files:
        for label, text in texts(name):
            found, wrong = Rereader(label).read(text)
            documents += found
            problems += wrong
    return documents, problems


def apart(documents: Sequence[Document]) -> tuple[list[Document], dict[str, int]]:
    """The resources of kinds that are read here, and how many there are of each other kind (`apps/Deployment`)."""
    from mesh.kinds import is_passed_over

    others: dict[str, int] = {}
    for document in documents:
        if is_passed_over(document.key):
            name = f"{document.key.group}/{document.key.kind}" if document.key.group else document.key.kind
            others[name] = others.get(name, 0) + 1
    return [document for document in documents if not is_passed_over(document.key)], others


def texts(name: str) -> list[tuple[str, str]]:
    """Where each text comes from, and the text."""
    if name == "-":
        return [("standard input", sys.stdin.read())]
    path = Path(name)
    try:
        if not path.is_dir():
            return [(name, path.read_text())]
        inside = [each for each in sorted(path.rglob("*")) if each.suffix in SUFFIXES and each.is_file()]
        shown = [each.relative_to(path) for each in inside]
        return [
            (str(path / each), (path / each).read_text())
            for each in shown
            if each.parts[0] != "policy" and not any(part.startswith(".") for part in each.parts)
        ]
    except OSError as problem:
        raise Complaint(f"{problem.filename or name}: {problem.strerror}", 2) from None
    except UnicodeDecodeError:
        raise Complaint(f"{name}: it is not UTF-8 text", 2) from None


def check(documents: Sequence[Document]) -> tuple[Problem, ...]:
    """What is wrong with resources that are in force together."""
    return together(documents).snapshot.problems


def together(documents: Sequence[Document]) -> Workspace:
    """Resources that are in force together."""
    from mesh.workspace import Workspace

    made = Workspace()
    made.update(upserts=tuple(documents), replace=True)
    return made


def with_status(body: Mapping[str, Any], status: Any) -> dict[str, Any]:
    """A resource with this `status`, where it has one, in the place of its own."""
    return {**{name: value for name, value in body.items() if name != "status"}, "status": status} if status else dict(body)


def without_status(document: Document) -> Document:
    """A resource as its author wrote it: its status is for whoever serves it to tell."""
    import msgspec

    if "status" not in document.body:
        return document
    return msgspec.structs.replace(document, body={name: value for name, value in document.body.items() if name != "status"})


def status_text(status: Any) -> str:
    """One cell for a status: its conditions, or those of the first of its parents that is not as one would wish."""
    from tollhouse.shown import conditions_text

    if not status:
        return "-"
    lists = [status["conditions"]] if "conditions" in status else []
    lists += [each["conditions"] for each in (*status.get("parents", ()), *status.get("ancestors", ()))]
    texts = [conditions_text(each) for each in lists]
    return next((text for text in texts if "=" in text), texts[0] if texts else "attached to nothing")


UNREADABLE = ("Invalid", "InvalidKind", "Conflict", "Duplicate")


def unreadable(problem: Problem) -> bool:
    """Whether a resource is wrong by itself, and not only for what it refers to: such a one is never stored."""
    return problem.severity == "error" and problem.reason in UNREADABLE


def refuse(problems: Sequence[Problem]) -> None:
    """Ends the command when there is a problem: nothing has been changed."""
    errors = [problem for problem in problems if problem.severity == "error"]
    for problem in errors[:-1]:
        Complaint(str(problem)).show()
    if errors:
        raise Complaint(f"{errors[-1]}; nothing was changed")


def problem_text(problems: Sequence[Problem]) -> str:
    """One cell for what is wrong."""
    if not problems:
        return ""
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return problems[0].message + more


def kind_named(text: str) -> str:
    """The kind that somebody means: any case, and the plural. Raises `Complaint`."""
    import difflib

    from mesh.workspace import known_kinds

    kinds = {kind.lower(): kind for kind in known_kinds()}
    low = text.lower()
    for name in (low, low.removesuffix("s"), low.removesuffix("es"), low.removesuffix("ies") + "y"):
        if name in kinds:
            return kinds[name]
    near = difflib.get_close_matches(low, kinds, 1)
    hint = f"did you mean {kinds[near[0]]}?" if near else f"there is {', '.join(sorted(kinds.values()))}"
    raise Complaint(f"there is no kind {text!r}; {hint}", 2)


async def policy_of(files: Sequence[str], documents: Sequence[Document]) -> tuple[list[Problem], list[Document]]:
    """What is wrong with the Rego in the directories among `files`; and the documents that it becomes."""
    from mesh.policies import active_policy_body, revision_body
    from mesh.reading import document_of
    from pdp.engines.engine import EngineUnavailable, PolicyError
    from tollhouse.keeper import decisions_of, policy_problems
    from tollhouse.parts import LazyPool
    from tollhouse.seed import read_directory

    problems: list[Problem] = []
    made: list[Document] = []
    pool = LazyPool(0)
    try:
        for name in files:
            if name == "-" or not (Path(name) / "policy").is_dir():
                continue
            policy = (await read_directory(Path(name))).policy
            if policy is None or not policy.modules:
                continue
            revision = await pool.compile(policy.modules, policy.data, decisions_of(documents))
            made = [document_of(body, "policy/") for body in (revision_body(revision), active_policy_body(revision.digest))]
    except PolicyError as wrong:
        problems += policy_problems(wrong)
    except EngineUnavailable as wrong:
        raise Complaint(str(wrong)) from None
    finally:
        await pool.close()
    return problems, made
