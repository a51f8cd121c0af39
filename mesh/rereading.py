"""A text that is read again and again: of many resources in one file, those whose text is as it was are not parsed again.

A line that begins with `---` begins a document wherever it stands (YAML 1.2.2, 9.1.2 "Document Markers"): not even a quoted or a block
scalar may hold one. So the parts between such lines can be read one by one. Where a text has what could change that (directives, ends of
documents, line breaks that only YAML takes for such) it is read as a whole.
"""

from __future__ import annotations

import re
from typing import Final

import msgspec

from mesh.documents import Document, Problem
from mesh.reading import MOST_BYTES, read_documents

_BEGINS: Final = re.compile(r"^(?=---(?:[ \t\r\n]|\Z))", re.MULTILINE)
_WHOLE: Final = re.compile(r"^(?:%|\.\.\.)|[\x85\u2028\u2029]|\r(?!\n)", re.MULTILINE)


class Rereader:
    """Reads the versions of one text, one after the other. Not for several threads at a time."""

    def __init__(self, source: str) -> None:
        """`source` names the text for people (a file's path)."""
        self._source = source
        self._known: dict[str, tuple[Document, ...]] = {}

    def read(self, text: str) -> tuple[tuple[Document, ...], tuple[Problem, ...]]:
        """As `mesh.reading.read_documents`; where YAML itself is broken, the documents after that place are returned, too. A document that
        has neither changed nor moved is the same object as before."""
        before, self._known = self._known, {}
        if len(text) > MOST_BYTES or _WHOLE.search(text) is not None:
            return read_documents(text, self._source)
        documents: list[Document] = []
        problems: list[Problem] = []
        above = 0
        for part in _BEGINS.split(text):
            known = before.get(part)
            if known is None:
                found, wrong = read_documents(part, self._source, above)
                problems += wrong
            else:
                found, wrong = tuple([_moved(document, above) for document in known]), ()
            if not wrong:
                self._known[part] = found
            documents += found
            above += part.count("\n")
        return tuple(documents), tuple(problems)


def _moved(document: Document, above: int) -> Document:
    origin = document.origin
    if origin.above == above:
        return document
    return msgspec.structs.replace(document, origin=msgspec.structs.replace(origin, above=above))
