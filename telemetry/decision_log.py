"""The decision log: every decision of a request, in OPA's format, to files, to standard output and to servers that take OPA's own logs.

The gateway writes it, since most decisions never reach the PDP. On the data path an outcome is queued; a thread makes the events, has
the active policy's masks applied to them, and hands them to the sinks, each of which has a thread and a bounded queue of its own: one that
stalls holds neither the others nor a request. What finds no room is counted.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Final, Literal

from mesh.outcome import Outcome
from mesh.questions import Decision, DecisionQuestion, Verdict
from telemetry.background import Background
from telemetry.decision_event import InputOf, event_json, event_of
from telemetry.log_upload import LogUpload
from telemetry.masks import Event, hide_secrets
from telemetry.writer import STDOUT, LineWriter

log = logging.getLogger("tollhouse.decisions")

Which = Literal["all", "refused"]
Masker = Callable[[list[Event]], Sequence[Event | Exception | None]]
"""Applies the active policy's masks to events; None for one that it drops, and why for one that could not be masked. Runs in the log's
thread."""

MOST_RECENT: Final = 500
"""Refusals that are kept in memory."""
RECENT_BYTES: Final = 4 << 20
_BASE: Final = 1500
"""Bytes that an outcome takes besides its head and its body, about."""


class Sink:
    """Where events go: a file or standard output by the line, or an HTTP server in batches."""

    __slots__ = ("kind", "worker")

    def __init__(self, worker: LineWriter[bytes] | LogUpload) -> None:
        self.worker = worker
        self.kind = "http" if isinstance(worker, LogUpload) else "stdout" if worker.path == STDOUT else "file"


class Recent:
    """The newest refusals, in memory: what the admin page shows of them."""

    __slots__ = ("_bytes", "_events")

    def __init__(self) -> None:
        self._events: deque[bytes] = deque()
        self._bytes = 0

    def add(self, event: bytes) -> None:
        """Takes an event; the oldest go when there are too many, or when they are too large."""
        self._events.append(event)
        self._bytes += len(event)
        while len(self._events) > MOST_RECENT or self._bytes > RECENT_BYTES:
            self._bytes -= len(self._events.popleft())

    def page(self) -> bytes:
        """The events as JSON, the oldest first."""
        while True:
            try:
                return b'{"events":[' + b",".join(self._events) + b"]}"
            except RuntimeError:  # the log's thread added one meanwhile
                continue


def line_sink(path: str) -> Sink:
    """A file, or `-` for standard output. Raises OSError when the file cannot be opened."""
    return Sink(LineWriter(path, lambda event: event + b"\n", weigh=len))


Asked = tuple[tuple[DecisionQuestion, Decision], ...]


class DecisionLog(Background[tuple[Outcome, Asked]]):
    """Where decisions are written to."""

    def __init__(
        self,
        sinks: Sequence[Sink],
        input_of: InputOf,
        which: Which = "all",
        *,
        full: bool = False,
        labels: Mapping[str, str] | None = None,
    ) -> None:
        """`input_of` makes the document that a policy saw. `which`: all decisions, or those that were not *allow*. `full`: write secrets,
        queries and bodies, too, but for what the policy's own masks say. `labels` say which process it is."""
        super().__init__("decisions", weigh=_weight)
        self.sinks = tuple(sinks)
        self.recent = Recent()
        self.masker: Masker | None = None
        """Set by the wiring, once there is a policy to ask for its masks."""
        self.filtered = 0
        """Events that the policy's `system.log.drop` left out."""
        self._input_of = input_of
        self._which = which
        self._full = full
        self._labels = dict(labels or {})
        self.begin()

    def record(self, outcome: Outcome) -> None:
        """Queues an outcome if it holds a decision to log."""
        decisions = outcome.decisions
        if not decisions:
            return
        if self._which == "refused":
            for _, decision in decisions:
                if decision.verdict is not Verdict.ALLOW:
                    break
            else:
                return
        self.offer((outcome, tuple(decisions)))

    def offer_some(self, outcome: Outcome, decisions: Asked) -> None:
        """Queues some decisions of a request on their own."""
        if self._which == "all" or any(decision.verdict is not Verdict.ALLOW for _, decision in decisions):
            self.offer((outcome, decisions))

    def reopen(self) -> None:
        """Opens the files anew."""
        for sink in self.sinks:
            if isinstance(sink.worker, LineWriter):
                sink.worker.reopen()

    def close(self, timeout: float = 2.0) -> None:
        """Writes what waits, within `timeout` seconds for each queue."""
        super().close(timeout)
        for sink in self.sinks:
            sink.worker.close(timeout)

    def _work(self, batch: list[tuple[Outcome, Asked]]) -> None:
        events: list[Event] = []
        for outcome, decisions in batch:
            for asked, decision in decisions:
                if self._which == "all" or decision.verdict is not Verdict.ALLOW:
                    self._add(outcome, asked, decision, events)
        masked: Sequence[Event | Exception | None]
        try:
            masked = events if self.masker is None else self.masker(events)
        except Exception as problem:  # what could not be masked is not written
            masked = [problem] * len(events)
        for event in masked:
            if event is None:
                self.filtered += 1
            elif isinstance(event, Exception):
                self._spoilt("masked", event)
            else:
                self._hand_on(event)

    def _hand_on(self, event: Event) -> None:
        try:
            text = event_json(event)
        except Exception as problem:
            self._spoilt("made", problem)
            return
        for sink in self.sinks:
            sink.worker.offer(text)
        if event["custom"]["verdict"] != "allow":
            self.recent.add(text)
        self.written += 1
        self.problem = ""

    def _add(self, outcome: Outcome, asked: DecisionQuestion, decision: Decision, events: list[Event]) -> None:
        try:
            event = event_of(outcome, asked, decision, self._labels, self._input_of)
            if not self._full:
                hide_secrets(event)
        except Exception as problem:  # one that cannot be shown must not end the log
            self._spoilt("made", problem)
        else:
            events.append(event)

    def _spoilt(self, what: str, problem: Exception) -> None:
        self.failed += 1
        if not self.problem:
            self.problem = f"a decision could not be {what} for the log, and is not in it: {problem!r}"
            log.warning("%s", self.problem)


def _weight(item: tuple[Outcome, Asked]) -> int:
    outcome, decisions = item
    head = outcome.head
    weight = _BASE
    if head is not None:
        weight += 2 * len(head.target) + sum([len(value) for _, value in head.headers])
    body = decisions[0][0].asking.body
    return weight if body is None else weight + 2 * len(body)
