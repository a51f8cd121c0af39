"""Conditions of a `status`, as Kubernetes writes them (`metav1.Condition`)."""

from __future__ import annotations

from typing import Any

from mesh.documents import Document

MOST_MESSAGE = 32768
"""Characters of a condition's message."""


class Conditions:
    """A list of conditions about one version of one resource."""

    def __init__(self, document: Document, now: str) -> None:
        metadata = document.body.get("metadata")
        generation = metadata.get("generation") if isinstance(metadata, dict) else None
        self.generation = generation if isinstance(generation, int) and not isinstance(generation, bool) else None
        self.now = now
        self.found: list[dict[str, Any]] = []

    def add(self, condition: str, holds: bool, reason: str, message: str) -> None:
        """Adds one: whether `condition` holds, why in one word, and why in a sentence."""
        entry: dict[str, Any] = {
            "type": condition,
            "status": "True" if holds else "False",
            "reason": reason,
            "message": message[:MOST_MESSAGE],
        }
        if self.generation is not None:
            entry["observedGeneration"] = self.generation
        entry["lastTransitionTime"] = self.now
        self.found.append(entry)

    def beside(self) -> Conditions:
        """An empty list about the same version of the same resource."""
        made = Conditions.__new__(Conditions)
        made.generation, made.now, made.found = self.generation, self.now, []
        return made
