"""Several workers' metrics pages added up into one (`--workers N`)."""

from __future__ import annotations

from collections.abc import Sequence

from telemetry.metrics import number

EARLIEST = "_timestamp_seconds"
STARTED = "process_start_time_seconds"
SAME = "_info"


def merge(pages: Sequence[bytes]) -> bytes:
    """One page from several in Prometheus' text format, as `Metrics.page` writes them.

    Counters, histograms and gauges are summed, sample by sample. Two kinds of gauge are not: of `..._timestamp_seconds` (and the
    process's start) the earliest counts, since the first certificate to expire is the one to know of; of `..._info` one is as good
    as another. A line that cannot be read is left out: a worker that died in the middle of its page costs what it did not say.
    """
    heads: dict[str, list[str]] = {}
    families: dict[str, dict[str, float]] = {}
    for page in pages:
        current = ""
        # What comes after the last newline was cut off somewhere: half a name, or half a number.
        for line in page.decode("utf-8", "replace").rpartition("\n")[0].splitlines():
            if line.startswith("#"):
                _, kind, name, *_ = [*line.split(" ", 3), "", "", ""]
                if kind in {"HELP", "TYPE"} and name:
                    current = name
                    known = heads.setdefault(name, [])
                    if not any(other.startswith(f"# {kind} ") for other in known):
                        known.append(line)
                continue
            sample, space, text = line.rpartition(" ")
            try:
                value = float(text)
            except ValueError:
                continue
            if not space or not sample.startswith(current):
                continue
            _add(families.setdefault(current, {}), sample, value)
    out: list[str] = []
    for name, lines in heads.items():
        out += lines
        out += [f"{sample} {number(value)}" for sample, value in families.get(name, {}).items()]
    return "".join(f"{line}\n" for line in out).encode()


def _add(samples: dict[str, float], sample: str, value: float) -> None:
    name = sample.partition("{")[0]
    if sample not in samples or name.endswith(SAME):
        samples[sample] = value
    elif name.endswith(EARLIEST) or name == STARTED:
        samples[sample] = min(samples[sample], value)
    else:
        samples[sample] += value
