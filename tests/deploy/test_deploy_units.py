"""The units and the job file: parsed by the tools that will read them, and held against the command line that they call."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import click
import hcl2
import pytest

from tollhouse.main import cli

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
TOLLHOUSE = "/opt/tollhouse/bin/tollhouse"


def options_of(name: str) -> set[str]:
    context = click.Context(cli)
    command: click.Command | None = cli
    for part in name.split():
        assert isinstance(command, click.Group)
        command = command.get_command(context, part)
        assert command is not None
    assert command is not None
    return {text for parameter in command.params for text in parameter.opts}


def check_command(words: list[str]) -> None:
    name = " ".join(words[:2]) if words[0] in {"ca", "policy"} else words[0]
    unknown = {word for word in words if word.startswith("--")} - options_of(name)
    assert not unknown, f"tollhouse {name} has no {unknown}"


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.name)
def test_units_are_well_formed_and_hardened(unit: Path) -> None:
    checked = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False)
    complaints = [line for line in checked.stderr.splitlines() if unit.name.partition("@")[0] in line and "is not executable" not in line]
    assert not complaints
    scored = subprocess.run(["systemd-analyze", "security", "--offline=true", str(unit)], capture_output=True, text=True, check=True)
    score = re.search(r"Overall exposure level for \S+: ([0-9.]+) (\w+)", scored.stdout)
    assert score, scored.stdout[-500:]
    assert score.group(2) in {"OK", "SAFE"}, score.group(0)


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.name)
def test_units_call_commands_that_there_are(unit: Path) -> None:
    line = next(line for line in unit.read_text().splitlines() if line.startswith("ExecStart="))
    program, *words = shlex.split(line.removeprefix("ExecStart="))
    assert program == TOLLHOUSE
    check_command(words)


def bare(value: Any) -> Any:
    """What the parser gives, without its quotes."""
    return value.strip('"') if isinstance(value, str) else value


def test_the_nomad_job_is_hcl_and_calls_commands_that_there_are() -> None:
    with (DEPLOY / "nomad" / "tollhouse.nomad.hcl").open() as file:
        job = hcl2.load(file)
    jobs = {bare(name): body for entry in job["job"] for name, body in entry.items()}
    groups = {bare(name): body for entry in jobs["tollhouse"]["group"] for name, body in entry.items()}
    assert set(groups) == {"gateway", "pdp", "quota"}
    for group in groups.values():
        for entry in group["task"]:
            for body in entry.values():
                if isinstance(body, dict):
                    config = body["config"][0] if isinstance(body["config"], list) else body["config"]
                    assert bare(config["command"]) == TOLLHOUSE
                    check_command([str(bare(word)) for word in config["args"]])
