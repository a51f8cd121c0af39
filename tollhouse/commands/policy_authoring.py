"""`tollhouse policy init`, `check`, `test` and `fmt`: what an author does with a folder before it is shipped."""

from __future__ import annotations

import difflib
import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tollhouse.output import Complaint, coloured, emit, example, format_option, printable, show_table
from tollhouse.policy_work import ALLOW_BUILTIN, DECISIONS, FOLDER, FORBID_BUILTIN, as_value, relabelled, text, with_paths, with_pool

if TYPE_CHECKING:
    from pdp.authoring import Condition, Coverage, TestResult
    from pdp.report import Report
    from tollhouse.policy_folder import PolicyFolder

_LOOKED_AT = 0.3
"""Seconds between two looks at the files of `--watch`."""
_MEASURED = 0.2
"""Seconds that `check` measures a decision for."""


@click.command(epilog=example("tollhouse policy init policy --package shop.authz"))
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--package", default="app.authz", show_default=True, help="The package of the decision.")
@click.option("--trust-domain", default="shop.example", show_default=True, help="That of the callers in the example's data.")
def init(folder: Path, package: str, trust_domain: str) -> None:
    """Make a folder of policy to begin with: a decision, a small library, their tests, data, and the input document's JSON schema.

    What `opa`, Regal and editors look for is where they look for it. Nothing that is there is overwritten.
    """
    from identity.problems import IdentityError
    from identity.spiffe import SpiffeId
    from tollhouse.policy_starter import is_package, starter

    if not is_package(package):
        raise Complaint(f"--package: {package!r} can't be the package here; write small letters with dots between them: shop.authz", 2)
    try:
        parsed = SpiffeId.parse(f"spiffe://{trust_domain}/ns/a/sa/b").trust_domain
    except IdentityError as problem:
        raise Complaint(f"--trust-domain: {problem}", 2) from None
    if parsed != trust_domain:
        raise Complaint(f"--trust-domain: {trust_domain!r} is not a trust domain; write for example shop.example", 2)
    files = starter(package, trust_domain)
    there = [name for name in files if (folder / name).exists()]
    if there:
        raise Complaint(f"{folder / there[0]} is there already; name another folder, or remove it: nothing is overwritten", 2)
    try:
        for name, content in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content, encoding="utf-8")
    except OSError as problem:
        raise Complaint(f"{problem.filename}: {problem.strerror}") from None
    for name in files:
        click.echo(f"made {folder / name}")
    click.echo(f"next: tollhouse policy test {folder}; tollhouse policy check {folder}")


@click.command(epilog=example("tollhouse policy check conf/examples/shop/policy"))
@FOLDER
@DECISIONS
@click.option("--strict", is_flag=True, help="OPA's strict mode: unused imports and variables are errors, too.")
@click.option(
    "--input",
    "sample",
    type=click.Path(path_type=Path, exists=True, dir_okay=False, allow_dash=True),
    help="Input documents, one in a line (a decision log will do), to count hits with; a model of traffic without it.",
)
@ALLOW_BUILTIN
@FORBID_BUILTIN
@format_option
def check(
    folder: Path, decisions: tuple[str, ...], strict: bool, sample: Path | None, allow: tuple[str, ...], forbid: tuple[str, ...], form: str
) -> None:
    """Compile a folder of Rego against the input document's type, and say for each decision what it reads and what it costs.

    The decisions are those that METADATA calls `entrypoint: true`, or those given. A path that no input document has is an error, and so
    are forbidden builtins and what is outside of the roots in .manifest. Exit code 1 when there is an error.
    """
    from pdp.authoring import inspect, measure
    from pdp.engines.engine import EngineUnavailable, PolicyError
    from pdp.publish import study, without_tests
    from pdp.report import input_schema, report
    from pdp.traffic import documents
    from tollhouse.policy_folder import outside_roots, read_folder
    from tollhouse.policy_request import read_inputs

    inputs = read_inputs(sample) if sample is not None else documents()

    async def work(pool: Any) -> tuple[str, list[Report], list[Any], PolicyFolder]:
        import msgspec

        found = read_folder(folder)
        schemas = {"input": input_schema(), **found.schemas, "": input_schema()}
        inside = await inspect(pool, found.modules, found.data, schemas, strict=strict)
        wrong = list(outside_roots(found, inside.packages))
        wanted = decisions or tuple(each.removeprefix("data.") for each in inside.entrypoints)
        revision, studied = await study(pool, found.modules, found.data, wanted)
        reports = [report(point, studied[name], inputs) for name, point in revision.entry_points.items()]
        wrong += [problem for each in reports for problem in each.problems]
        if wrong:
            raise PolicyError(tuple(dict.fromkeys(wrong)))
        shipped = without_tests(found.modules)
        some = [msgspec.json.encode(document) for document in inputs[:20]]
        costs: list[Any] = []
        for each in reports:
            try:
                costs.append(await measure(pool, shipped, found.data, each.path, some, _MEASURED))
            except (PolicyError, EngineUnavailable) as problem:
                costs.append(with_paths(str(problem), folder))
        return revision.digest, reports, costs, found

    digest, reports, costs, found = with_pool(folder, work, form=form, allow=allow, forbid=forbid)
    traffic = f"the {len(inputs)} inputs" if sample is not None else "modelled traffic"
    rows = [row for each, cost in zip(reports, costs, strict=True) for row in _check_rows(each, cost, found, traffic)]
    for warning in dict.fromkeys(warning for each in reports for warning in each.warnings):
        Complaint(f"warning: {text(relabelled(warning, folder))}").show()
    value = [_check_value(each, cost, found) for each, cost in zip(reports, costs, strict=True)]
    empty = "it compiles; no rule's METADATA says `entrypoint: true`: name a --decision to see what it reads"
    emit(form, {"digest": digest, "decisions": value}, rows, ["decision", "", "what"], empty)


def _check_rows(report: Report, cost: Any, found: PolicyFolder, traffic: str) -> list[list[str]]:
    rows = [
        ["kept", "yes" if report.keepable and report.hits else "no"],
        ["hits", f"{report.hits or 0.0:.1f} % of {traffic} is answered from what is kept"],
        [
            "cost",
            f"it fails: {cost}"
            if isinstance(cost, str)
            else f"{cost.median:.0f} µs and {cost.expressions:.0f} expressions an answer; {report.statements} statements",
        ],
        *(["reads", path] for path in (*report.reads, *report.data)),
    ]
    if isinstance(cost, str):
        rows[:2] = [["kept", "no: it is an error for a request as others are, and errors are never kept"]]
    elif cost.undefined:
        share = 100.0 * cost.undefined / cost.count
        rows.append(["note", f"it is undefined for {share:.0f} % of them, which is an error that is never kept: give it a default"])
    for each in report.wide:
        place = found.shown(each.file) + f":{each.row}: " if each.where else ""
        said = f"{place}all of {each.path} is read" + (f": {each.reason}" if each.reason else "")
        rows.append(["widened", said + f" (hits without it: {each.hits_without or 0.0:.1f} %)"])
    rows += [["note", note] for note in report.notes]
    return [[report.path if index == 0 else "", *row] for index, row in enumerate(rows)]


def _check_value(report: Report, cost: Any, found: PolicyFolder) -> dict[str, Any]:
    import msgspec

    return {
        "decision": report.path,
        "kept": report.keepable,
        "hits": report.hits,
        "reads": list(report.reads),
        "data": list(report.data),
        "widened": [
            {
                "path": each.path,
                "file": found.shown(each.file) if each.file else "",
                "row": each.row,
                "reason": each.reason,
                "hits_without": each.hits_without,
            }
            for each in report.wide
        ],
        "notes": list(report.notes),
        "statements": report.statements,
        "cost": {"error": cost} if isinstance(cost, str) else msgspec.to_builtins(cost),
        "warnings": [as_value(relabelled(each, found.path)) for each in report.warnings],
    }


@click.command(epilog=example("tollhouse policy test conf/examples/shop/policy --coverage"))
@FOLDER
@click.option("--run", "-r", default="", metavar="REGEX", help="Only tests whose full names (data.shop.authz_test.test_x) it is found in.")
@click.option("--coverage", "-c", is_flag=True, help="Say how much of each file the tests reached, and which lines they did not.")
@click.option("--threshold", type=click.FloatRange(0, 100), metavar="PERCENT", help="Fail when the tests reach less than this.")
@click.option("--watch", "-w", is_flag=True, help="Run them again whenever a file changes.")
@ALLOW_BUILTIN
@FORBID_BUILTIN
@format_option
def test(
    folder: Path, run: str, coverage: bool, threshold: float | None, watch: bool, allow: tuple[str, ...], forbid: tuple[str, ...], form: str
) -> None:
    """Run the tests of a folder of Rego (`test_...` rules). Exit code 1 when one fails, or when they reach less than --threshold."""
    try:
        re.compile(run)
    except re.error as problem:
        raise Complaint(f"--run: {run!r} is not a regular expression: {problem}", 2) from None

    def once() -> bool:
        return _test(folder, run, coverage or threshold is not None, threshold, allow, forbid, form)

    if watch:
        _watch(folder, once)
    elif not once():
        raise SystemExit(1)


def _test(folder: Path, run: str, coverage: bool, threshold: float | None, allow: Sequence[str], forbid: Sequence[str], form: str) -> bool:
    from pdp.authoring import run_tests
    from tollhouse.policy_folder import read_folder

    async def work(pool: Any) -> Any:
        found = read_folder(folder)
        return found, await run_tests(pool, found.modules, found.data, run=run, coverage=coverage)

    found, (results, covered) = with_pool(folder, work, form=form, allow=allow, forbid=forbid)
    failed = [each for each in results if not each.passed and not each.skipped]
    skipped = sum(each.skipped for each in results)
    lines, missed = sum(each.covered for each in covered), sum(each.missed for each in covered)
    percent = 100.0 * lines / (lines + missed) if lines + missed else 100.0
    if form == "table":
        _show_tests(found, results, run)
        if coverage:
            _show_coverage(found, covered, percent)
    else:
        value: dict[str, Any] = {"passed": len(results) - len(failed) - skipped, "failed": len(failed), "skipped": skipped}
        value["tests"] = [_test_value(found, each) for each in results]
        if coverage:
            files = [{"file": found.shown(each.file), "percent": each.percent, "not_reached": list(each.ranges)} for each in covered]
            value["coverage"] = {"percent": percent, "files": files}
        emit(form, value, (), ())
    if threshold is not None and percent < threshold:
        Complaint(f"the tests reach {percent:.1f} % of the lines, and --threshold wants {threshold:g} %").show()
        return False
    return not failed


def _show_tests(found: PolicyFolder, results: Sequence[TestResult], run: str) -> None:
    if not results:
        click.echo(f"no test has a name that {run!r} is found in" if run else "there are no tests: rules whose names begin with test_")
        return
    rows = [
        [
            f"{found.shown(each.file)}:{each.row}",
            f"{each.package.removeprefix('data.')}.{each.name}",
            "passed" if each.passed else "skipped" if each.skipped else "FAILED",
        ]
        for each in results
    ]
    show_table(rows, ["where", "test", "result"])
    failed = [each for each in results if not each.passed and not each.skipped]
    for each in failed:
        name = f"{each.package.removeprefix('data.')}.{each.name}"
        click.echo(f"\n{click.style('FAILED', fg='red') if coloured(sys.stdout) else 'FAILED'} {name}")
        if each.error:
            click.echo(printable(f"  {found.shown(each.file)}:{each.row}: {each.error}"))
        if each.failed is not None:
            click.echo(printable(f"  {_where(found, each.failed)}: {each.failed.said}"))
        for reason in each.because:
            click.echo(printable(f"    {_where(found, reason)}: {reason.said}"))
        for line in each.printed.splitlines():
            click.echo(printable(f"  printed: {line}"))
    skipped = sum(each.skipped for each in results)
    passed = len(results) - len(failed) - skipped
    click.echo(f"\n{passed} passed, {len(failed)} failed" + (f", {skipped} skipped" if skipped else ""))


def _where(found: PolicyFolder, condition: Condition) -> str:
    return f"{found.shown(condition.file)}:{condition.row}"


def _test_value(found: PolicyFolder, each: TestResult) -> dict[str, Any]:
    def told(condition: Condition) -> dict[str, Any]:
        return {"file": found.shown(condition.file), "row": condition.row, "said": condition.said}

    return {
        "file": found.shown(each.file),
        "row": each.row,
        "package": each.package,
        "name": each.name,
        "passed": each.passed,
        "skipped": each.skipped,
        "error": each.error,
        "failed": told(each.failed) if each.failed is not None else None,
        "because": [told(reason) for reason in each.because],
        "printed": each.printed,
        "seconds": each.seconds,
    }


def _show_coverage(found: PolicyFolder, covered: Sequence[Coverage], percent: float) -> None:
    click.echo("")
    rows = []
    for each in covered:
        lines = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in each.ranges)
        rows.append([found.shown(each.file), f"{each.percent:.1f} %", lines])
    show_table([*rows, ["all", f"{percent:.1f} %", ""]], ["file", "reached", "not reached"])


def _watch(folder: Path, once: Callable[[], bool]) -> None:
    seen: object = None
    try:
        while True:
            now = fingerprint(folder)
            if now != seen:
                seen = now
                if sys.stdout.isatty():
                    click.clear()
                try:
                    once()
                except Complaint as problem:
                    problem.show()
                click.echo(f"waiting for changes in {folder} (Ctrl-C ends it)")
                sys.stdout.flush()
            time.sleep(_LOOKED_AT)
    except KeyboardInterrupt:
        click.echo("")


def fingerprint(folder: Path) -> Mapping[str, tuple[int, int]]:
    """Another value whenever a file of the folder is another; also of one file alone."""
    from tollhouse.policy_folder import files

    found = {}
    for file in [*files(folder), folder / ".manifest"] if folder.is_dir() else [folder]:
        try:
            about = file.stat()
        except OSError:
            continue
        found[str(file)] = about.st_mtime_ns, about.st_size
    return found


@click.command(epilog=example("tollhouse policy fmt conf/examples/shop/policy --check"))
@click.argument("path", type=click.Path(path_type=Path, exists=True))
@click.option("--check", "only_check", is_flag=True, help="Write nothing; exit code 1 when a file is not formatted.")
@click.option("--diff", is_flag=True, help="Write nothing; show what would change. Exit code 1 when something would.")
@format_option
def fmt(path: Path, only_check: bool, diff: bool, form: str) -> None:
    """Format Rego as `opa fmt` does: all files of a folder, or one. Nothing is written while one of them can't be read."""
    from pdp.authoring import reformat
    from pdp.engines.engine import PolicyError, PolicyProblem
    from tollhouse.policy_folder import files

    sources: dict[str, str] = {}
    problems = []
    for file in files(path) if path.is_dir() else [path]:
        if file.suffix == ".rego":
            try:
                sources[str(file)] = file.read_bytes().decode()
            except OSError as problem:
                problems.append(PolicyProblem(file=str(file), message=problem.strerror or str(problem)))
            except UnicodeDecodeError as problem:
                problems.append(PolicyProblem(file=str(file), message=f"it is not UTF-8: {problem.reason} at byte {problem.start}"))
    if not sources and not problems:
        raise Complaint(f"{path} has no .rego file" if path.is_dir() else f"{path} is not a .rego file", 2)

    async def work(pool: Any) -> dict[str, str]:
        if problems:
            raise PolicyError(tuple(problems))
        return await reformat(pool, sources)

    formatted = with_pool(Path("policy"), work, form=form)  # files are named as they are found here
    changed = [name for name, source in sources.items() if formatted[name] != source]
    if not diff and not only_check:
        for name in changed:
            _replace(Path(name), formatted[name])
    if diff:
        for name in changed:
            lines = difflib.unified_diff(
                sources[name].splitlines(keepends=True), formatted[name].splitlines(keepends=True), name, name, n=3
            )
            click.echo("".join(line if line.endswith("\n") else line + "\n" for line in lines), nl=False)
    else:
        wrong = "would change" if only_check else "formatted"
        emit(form, {"changed": changed}, [[name, wrong] for name in changed], ["file", ""], f"{len(sources)} files are formatted already")
    if (diff or only_check) and changed:
        raise SystemExit(1)


def _replace(file: Path, content: str) -> None:
    """Writes a file so that it is the old one or the new one, never half of it."""
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        partial.write_text(content, encoding="utf-8", newline="")
        partial.chmod(file.stat().st_mode)
        partial.replace(file.resolve())
    except OSError as problem:
        partial.unlink(missing_ok=True)
        raise Complaint(f"{file}: {problem.strerror}") from None
