"""The phases of a request, in their order. SETTLING may be passed in one call, and each may lead to ANSWERING by a refusal."""

from __future__ import annotations

from typing import Final

GATHERING: Final = 1
"""The body that a policy is shown is collected."""
SETTLING: Final = 2
"""Questions have been asked and are not all answered."""
FORWARDING: Final = 3
"""The upstream's side has it; the answer flows as it comes."""
ANSWERING: Final = 4
"""The answer is all here, and waits for room towards the client."""
DRAINING: Final = 5
"""Answered before all of an HTTP/1.1 request had come: the rest of it is read and thrown away, within bounds."""
OVER: Final = 6
"""Recorded, and forgotten by its connection."""
