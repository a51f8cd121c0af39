"""The page about the configuration names every field of our own kinds, and its examples are right."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from mesh_world import check

from mesh import kinds_gateway
from mesh.compatibility import page
from mesh.kinds import KINDS, OWN_GROUP, UNSUPPORTED
from mesh.kinds_filters import FILTERS
from mesh.kinds_own import TARGET_REFS
from mesh.kinds_quota import DESCRIPTORS
from mesh.schema import Fields, Items

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "configuration.md").read_text()
OWN = sorted(kind for group, kind in KINDS if group == OWN_GROUP)


def section(title: str) -> str:
    return PAGE.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]


def names(node: object) -> set[str]:
    """Every field's name in a schema."""
    if isinstance(node, Items):
        return names(node.item)
    if isinstance(node, Fields):
        return set(node.known).union(*map(names, node.known.values()))
    return set()


@pytest.mark.parametrize("kind", OWN)
def test_every_field_of_our_own_kinds_is_described(kind: str) -> None:
    words = set(re.findall(r"[A-Za-z]+", section(kind)))
    missing = names(KINDS[OWN_GROUP, kind].body.known["spec"]) - words
    if "targetRefs" in words and kind == "QuotaPolicy":
        missing -= names(TARGET_REFS)  # described with AccessPolicy
    assert missing == set()


@pytest.mark.parametrize("text", re.findall(r"```yaml\n(apiVersion.*?)```", PAGE, re.DOTALL))
def test_examples_are_right(text: str) -> None:
    assert check(text) == []


def test_the_page_on_compatibility_is_what_the_code_says() -> None:
    shown = (Path(__file__).resolve().parents[2] / "docs" / "compatibility.md").read_text()
    assert shown == page(), "run `make docs`"


def test_whatever_is_refused_has_a_reason() -> None:
    lines = [line for line in page().splitlines() if "| refused |" in line]
    assert len(lines) > 10
    assert [line for line in lines if len(line.split("|")[3].split()) < 3 or " yet" in line] == []


def test_what_works_and_what_does_not_is_named() -> None:
    words = [kind.name for kind in KINDS.values()] + [
        kind for kind in UNSUPPORTED["gateway.networking.k8s.io"] if kind != "BackendTrafficPolicy"
    ]
    words += [*FILTERS, *DESCRIPTORS]
    words += [value for name, value in vars(kinds_gateway).items() if name.startswith("OPTION_")]
    assert [word for word in words if f"`{word}`" not in PAGE and f"\n## {word}\n" not in PAGE] == []
