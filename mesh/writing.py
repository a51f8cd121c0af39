"""From documents to text. What `mesh.reading` reads of it is equal to what was printed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, Final

import yaml

from mesh.documents import Document
from mesh.scalars import scalar

_BASE: Final[Any] = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


class _Dumper(_BASE):  # type: ignore[misc]
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: Any, value: str) -> Any:
    style = None
    if "\n" in value and value.isprintable() is False and all(ch.isprintable() or ch == "\n" for ch in value) and value.isascii():
        style = "|"
    elif not isinstance(scalar(value), str):
        style = '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _text)


def document_to_yaml(document: Document) -> str:
    """One document, without a separator."""
    return body_to_yaml(document.body)


def documents_to_yaml(documents: Iterable[Document]) -> str:
    """Several documents, separated by `---`."""
    return "---\n".join(document_to_yaml(document) for document in documents)


def body_to_yaml(body: Mapping[str, Any]) -> str:
    """The YAML of a document's body (plain JSON types), fields in the order that they have."""
    text: str = yaml.dump(dict(body), Dumper=_Dumper, sort_keys=False, default_flow_style=False, allow_unicode=True, width=120)
    return text


def document_to_json(document: Document) -> bytes:
    """The JSON of a document, as it is kept in etcd."""
    return json.dumps(document.body, ensure_ascii=False, separators=(",", ":")).encode()
