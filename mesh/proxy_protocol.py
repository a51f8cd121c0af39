"""The PROXY protocol in the configuration: an annotation of a Gateway says at which ports it is read, one of a Service in which version it
is written. Gateway API has no fields for it.
"""

from __future__ import annotations

from typing import Any, Final, Literal

from mesh import formats
from mesh.documents import FieldPath
from mesh.schema import Faults, listed, nearest

ANNOTATION: Final = "tollhouse.dev/proxy-protocol"
_PREFIX: Final = "tollhouse.dev/"
VERSIONS: Final = ("v1", "v2")


def _text(body: Any) -> str:
    return str((body["metadata"].get("annotations") or {}).get(ANNOTATION) or "").strip()


def ports_of(body: Any) -> tuple[int, ...] | None:
    """The ports at which a checked Gateway reads the header; None for all of them."""
    text = _text(body)
    return None if text == "*" else tuple(int(part) for part in text.split(",") if part.strip())


def version_of(body: Any) -> Literal["", "v1", "v2"]:
    """The version in which a checked Service is sent the header; empty for none."""
    found: Literal["", "v1", "v2"] = _text(body)  # type: ignore[assignment]
    return found


def gateway_rule(body: Any, path: FieldPath, faults: Faults) -> None:
    """What is wrong with a Gateway's annotation."""
    _known(body, path, faults)
    text = _text(body)
    if text == "*":
        return
    for part in text.split(",") if text else ():
        if not part.strip().isdigit() or not 1 <= int(part) <= 65535:
            faults.add(
                (*path, "metadata", "annotations", ANNOTATION),
                f'{formats.shown(part)} is not a port; write the ports of listeners as in "443,5432", or "*" for all',
            )
            return


def service_rule(body: Any, path: FieldPath, faults: Faults) -> None:
    """What is wrong with a Service's annotation."""
    _known(body, path, faults)
    text = _text(body)
    if text and text not in VERSIONS:
        faults.add(
            (*path, "metadata", "annotations", ANNOTATION),
            f"{formats.shown(text)} is not a version of the PROXY protocol; use {listed(VERSIONS)}",
        )


def _known(body: Any, path: FieldPath, faults: Faults) -> None:
    """Annotations are anybody's; one of our own prefix that nearly has the name was meant to do something."""
    for name in body["metadata"].get("annotations") or {}:
        if name != ANNOTATION and name.startswith(_PREFIX) and nearest(name.removeprefix(_PREFIX), [ANNOTATION.removeprefix(_PREFIX)]):
            faults.add((*path, "metadata", "annotations", name), f"unknown annotation; did you mean {ANNOTATION}?")
