"""The folder that `tollhouse policy init` makes: `conf/policy/starter`, with the author's package and trust domain in it."""

from __future__ import annotations

import json
import re
from importlib import resources
from typing import Final

from pdp.report import input_schema

PACKAGE: Final = "app.authz"
TRUST_DOMAIN: Final = "shop.example"
_FILES: Final = (
    "app/authz.rego",
    "app/authz_test.rego",
    "app/data.yaml",
    "lib/caller.rego",
    "lib/caller_test.rego",
    "lib/request.rego",
    "lib/request_test.rego",
)
_NAME: Final = re.compile(r"[a-z_][a-z0-9_]*(\.[a-z_][a-z0-9_]*)*")
# fmt: off
_TAKEN: Final = frozenset((
    "as", "contains", "data", "default", "else", "every", "false", "if", "import", "in", "input", "not", "null", "package", "some", "true",
    "with",
    "asked", "by_nobody", "caller", "grants", "request",
))
# fmt: on
"""Words of Rego, and names in the files here."""


def is_package(name: str) -> bool:
    """Whether a starter can be made for a package of this name."""
    parts = name.split(".")
    return _NAME.fullmatch(name) is not None and parts[0] != "lib" and not _TAKEN.intersection(parts)


def starter(package: str = PACKAGE, trust_domain: str = TRUST_DOMAIN) -> dict[str, str]:
    """The files, by their paths in the folder, for a `package` for which `is_package` is true: `shop.authz` is in `shop/authz.rego`."""
    *outer, name = package.split(".")
    outer = outer or [name]
    source = resources.files("conf").joinpath("policy", "starter")
    roots = {package.split(".", maxsplit=1)[0], f"{package}_test".split(".")[0], "lib"}
    made = {".manifest": _json({"roots": sorted(roots), "rego_version": 1})}
    words = {"app.authz": package, "authz.decision": f"{name}.decision", "data.app": f"data.{'.'.join(outer)}", TRUST_DOMAIN: trust_domain}
    pattern = re.compile(r"(?:data\.)?app\.authz(?=\b|_)|\bauthz\.decision|data\.app\b|" + re.escape(TRUST_DOMAIN))
    for path in _FILES:
        text = source.joinpath(path).read_text(encoding="utf-8")
        text = pattern.sub(lambda found: words.get(found[0]) or f"data.{package}", text)
        folder, file = path.split("/")
        made["/".join([*outer, file.replace("authz", name)] if folder == "app" else [folder, file])] = text
    made["schemas/input.json"] = _json(input_schema())
    return made


def _json(value: object) -> str:
    return json.dumps(value, indent=2) + "\n"
