"""Metrics: counters, gauges and histograms that cost the data path a dictionary look-up, and their page for Prometheus.

Every family is bounded: past `max_series` label values are put into one series whose labels all say `overflow`, and that is counted.

The page is written here, in chunks between which the event loop goes on: a page has 60 lines for each combination of caller, service and
status, and `prometheus_client` makes all of it in one go. That library gives the process's own metrics, and reads the page in the tests.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest

Labels = tuple[str, ...]
Reading = float | Mapping[Labels, float]

MAX_SERIES = 1024
"""Of one family, unless it says otherwise."""
OVERFLOW = "overflow"
CHUNK = 32 * 1024
"""Characters written between two looks at the event loop."""

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Family(Protocol):
    """One metric with all its series."""

    @property
    def name(self) -> str:
        """As on the page."""
        ...

    def lines(self) -> Iterator[str]:
        """Its part of the page: HELP and TYPE, then text for a series or more at a time, each ending with a newline."""
        ...


class Counter:
    """Counts up. Owned by whoever made it; nobody else increments."""

    __slots__ = ("_head", "_labels", "_overflow", "_series", "max_series", "name", "overflowed")

    def __init__(self, name: str, text: str, labels: Sequence[str] = (), max_series: int = MAX_SERIES, kind: str = "counter") -> None:
        self.name = name
        self.max_series = max_series
        self.overflowed = 0
        """Increments that went to the overflow series."""
        self._head = head(name, text, kind)
        self._labels = tuple(labels)
        self._overflow = (OVERFLOW,) * len(self._labels)
        self._series: dict[Labels, float] = {} if labels else {(): 0}

    def inc(self, labels: Labels = (), by: float = 1) -> None:
        """Adds `by` to the series of `labels` (one text for each label, in their order)."""
        series = self._series
        try:
            series[labels] += by
        except KeyError:
            self._new(labels, by)

    def _new(self, labels: Labels, by: float) -> None:
        if len(labels) != len(self._labels):
            raise ValueError(f"{self.name} has the labels {self._labels}, not {labels!r}")
        if len(self._series) >= self.max_series:
            self.overflowed += 1
            labels = self._overflow
        self._series[labels] = self._series.get(labels, 0) + by

    def value(self, labels: Labels = ()) -> float:
        """What the series of `labels` stands at."""
        return self._series.get(labels, 0)

    def total(self) -> float:
        """The sum over all series."""
        return sum(self._series.values())

    def lines(self) -> Iterator[str]:
        """As `Family.lines`."""
        yield self._head
        for labels, value in tuple(self._series.items()):
            yield f"{self.name}{label_text(self._labels, labels)} {number(value)}\n"


class Gauge(Counter):
    """Goes up and down."""

    __slots__ = ()

    def __init__(self, name: str, text: str, labels: Sequence[str] = (), max_series: int = MAX_SERIES) -> None:
        super().__init__(name, text, labels, max_series, kind="gauge")

    def set(self, value: float, labels: Labels = ()) -> None:
        """Makes the series of `labels` stand at `value`."""
        if labels in self._series:
            self._series[labels] = value
        else:
            self._new(labels, value)

    def remove(self, labels: Labels) -> None:
        """Takes a series off the page."""
        self._series.pop(labels, None)


class Function:
    """A gauge or counter that is read when the page is written: for what other rooms keep as plain attributes."""

    __slots__ = ("_function", "_head", "_labels", "failures", "name")

    def __init__(self, name: str, text: str, function: Callable[[], Reading], labels: Sequence[str] = (), kind: str = "gauge") -> None:
        self.name = name
        self.failures = 0
        """Times that `function` raised: the metric is then left off the page."""
        self._head = head(name, text, kind)
        self._function = function
        self._labels = tuple(labels)

    def lines(self) -> Iterator[str]:
        """As `Family.lines`."""
        try:
            found = self._function()
            readings = found.items() if isinstance(found, Mapping) else [((), found)]
            text = "".join(f"{self.name}{label_text(self._labels, labels)} {number(value)}\n" for labels, value in readings)
        except Exception:  # a room that cannot say how it is must not take the page with it
            self.failures += 1
            return
        yield self._head
        yield text


class Distribution:
    """One histogram's counts for one series: plain integers, added to by the data path."""

    __slots__ = ("counts", "total")

    def __init__(self, buckets: int) -> None:
        self.counts = [0] * (buckets + 1)
        """By bucket, not cumulated; the last is beyond the greatest bound."""
        self.total = 0.0

    def lines(self, heads: Sequence[str], name: str, labels: str) -> str:
        """The samples of a series; `heads` are the bucket lines up to the value, `labels` the text with braces."""
        running = 0
        parts = []
        for start, count in zip(heads, self.counts, strict=True):
            running += count
            parts.append(f"{start}{running}\n")
        parts.append(f"{name}_sum{labels} {number(self.total)}\n{name}_count{labels} {running}\n")
        return "".join(parts)


class Histogram:
    """Counts values by bucket."""

    __slots__ = ("_bounds", "_head", "_labels", "_overflow", "_series", "max_series", "name", "overflowed")

    def __init__(self, name: str, text: str, bounds: Sequence[float], labels: Sequence[str] = (), max_series: int = MAX_SERIES) -> None:
        if list(bounds) != sorted(set(bounds)):
            raise ValueError(f"{name}: bucket bounds must rise")
        self.name = name
        self.max_series = max_series
        self.overflowed = 0
        self._head = head(name, text, "histogram")
        self._bounds = tuple(bounds)
        self._labels = tuple(labels)
        self._overflow = (OVERFLOW,) * len(self._labels)
        self._series: dict[Labels, Distribution] = {}

    def observe(self, value: float, labels: Labels = ()) -> None:
        """Adds one value to the series of `labels`."""
        series = self._series.get(labels) or self._new(labels)
        series.counts[bisect_left(self._bounds, value)] += 1
        series.total += value

    def _new(self, labels: Labels) -> Distribution:
        if len(labels) != len(self._labels):
            raise ValueError(f"{self.name} has the labels {self._labels}, not {labels!r}")
        if len(self._series) >= self.max_series:
            self.overflowed += 1
            labels = self._overflow
        return self._series.setdefault(labels, Distribution(len(self._bounds)))

    def lines(self) -> Iterator[str]:
        """As `Family.lines`."""
        yield self._head
        for labels, series in tuple(self._series.items()):
            text = label_text(self._labels, labels)
            yield series.lines(bucket_heads(self.name, text, self._bounds), self.name, text)


class Metrics:
    """The families of one process, in the order in which they were added."""

    __slots__ = ("_families", "_process")

    def __init__(self) -> None:
        self._families: dict[str, Family] = {}
        self._process = CollectorRegistry()
        ProcessCollector(registry=self._process)
        kind = "counter"
        self.add(Function("tollhouse_metrics_overflow_total", "Values that no series was left for.", self._overflowed, ["metric"], kind))
        self.add(Function("tollhouse_metrics_failures_total", "Metrics that could not be read.", self._failures, ["metric"], kind))

    def add(self, family: Family) -> None:
        """Puts a family on the page. Raises ValueError for a second one of the same name."""
        if family.name in self._families:
            raise ValueError(f"there is a metric {family.name} already")
        self._families[family.name] = family

    def chunks(self) -> Iterator[bytes]:
        """The page, a millisecond's work or less at a time."""
        waiting: list[str] = []
        size = 0
        for family in tuple(self._families.values()):
            for text in family.lines():
                waiting.append(text)
                size += len(text)
                if size >= CHUNK:
                    yield "".join(waiting).encode()
                    waiting.clear()
                    size = 0
        yield "".join(waiting).encode()
        yield generate_latest(self._process)

    def page(self) -> bytes:
        """The whole page at once, in Prometheus' text format."""
        return b"".join(self.chunks())

    def _overflowed(self) -> Mapping[Labels, float]:
        counted = {name: int(getattr(family, "overflowed", 0)) for name, family in self._families.items()}
        return {(name,): count for name, count in counted.items() if count}

    def _failures(self) -> Mapping[Labels, float]:
        counted = {name: int(getattr(family, "failures", 0)) for name, family in self._families.items()}
        return {(name,): count for name, count in counted.items() if count}


def head(name: str, text: str, kind: str) -> str:
    """The two lines that introduce a family."""
    escaped = text.replace("\\", r"\\").replace("\n", r"\n")
    return f"# HELP {name} {escaped}\n# TYPE {name} {kind}\n"


def label_text(names: Sequence[str], values: Sequence[str]) -> str:
    """`{a="b",c="d"}`, or nothing without labels."""
    if not names:
        return ""
    return "{" + ",".join(f'{name}="{escape(value)}"' for name, value in zip(names, values, strict=True)) + "}"


def bucket_heads(name: str, labels: str, bounds: Sequence[float]) -> list[str]:
    """`name_bucket{...,le="0.5"} ` for each bound and for infinity."""
    start = f"{name}_bucket{labels[:-1]}," if labels else f"{name}_bucket{{"
    return [f'{start}le="{number(bound)}"}} ' for bound in bounds] + [f'{start}le="+Inf"}} ']


def escape(value: str) -> str:
    """A label's value, for between its quotes; what UTF-8 cannot carry is replaced."""
    if "\\" in value or "\n" in value or '"' in value:
        value = value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
    return value if value.isascii() else value.encode("utf-8", "replace").decode()


def number(value: float) -> str:
    """A value as Prometheus writes it; whole numbers without a point."""
    if isinstance(value, float):
        if value != value:  # noqa: PLR0124 -- NaN is what differs from itself
            return "NaN"
        if value in {float("inf"), float("-inf")}:
            return "+Inf" if value > 0 else "-Inf"
        return str(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)
    return str(int(value))
