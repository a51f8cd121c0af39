"""Resources above, the snapshot that they make below: one file in `cases/compile/` for each."""

from __future__ import annotations

import pytest
from mesh_world import BASE, CASES, config_map, read, render, tls_secret

from mesh.workspace import Workspace

FILES = sorted((CASES / "compile").glob("*.txt"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_resources_make_this_snapshot(path: object) -> None:
    text = path.read_text()  # type: ignore[attr-defined]
    resources, _, expected = text.partition("=>\n")
    documents = list(read(resources, "case.yaml"))
    if "#BASE" in resources:
        documents += read(BASE, "base.yaml")
    if "#CERTIFICATES" in resources:
        documents += [config_map("shop", "ca"), config_map("edge", "ca"), tls_secret("edge", "cert"), tls_secret("other", "cert")]
    assert render(Workspace().update(upserts=documents, replace=True)) == expected


def test_there_are_cases() -> None:
    assert len(FILES) > 10
