"""`python -m tests.sim`: runs many seeds and prints those that break something, with how to see each again."""

from __future__ import annotations

import argparse
import logging
import sys
import time

from tests.sim.calendars import wrong_with_calendar
from tests.sim.slots import slots_wrong_with
from tests.sim.story import wrong_with


def main() -> int:
    """Returns 1 when a seed failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("--seeds", type=int, default=10_000)
    parser.add_argument("--from", dest="first", type=int, default=0)
    parser.add_argument("--calendar", action="store_true", help="limits by the calendar")
    parser.add_argument("--slots", action="store_true", help="stories of concurrency limits")
    options = parser.parse_args()
    logging.disable(logging.WARNING)  # that the store fails is what this is about
    began, failed = time.monotonic(), 0
    for seed in range(options.first, options.first + options.seeds):
        wrong = (slots_wrong_with if options.slots else wrong_with_calendar if options.calendar else wrong_with)(seed)
        if wrong:
            failed += 1
            print(wrong, flush=True)
    print(f"{options.seeds} seeds, {failed} failed, {time.monotonic() - began:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
