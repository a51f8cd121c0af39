"""Three real gateways under load while their Redis is killed, paused, slow, cut off or failed over.

`python -m bench.redis_faults` is the same, with more faults and for longer. A table is printed (`pytest -s`).
"""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from bench.redis_faults import GATEWAYS, HEAD, LIMITS, PATHS, RATE, TOPOLOGIES, Fleet, Outcome

pytestmark = pytest.mark.e2e
PAYS = 0.05
"""The most that a fault may add to a request, in seconds."""
FAULTS = {
    "single": ("killed and started anew", "paused", "100 ms slow", "network drops everything"),
    "sentinel": ("master killed",),
    "cluster": ("a master killed, its replica takes over",),
}


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_no_fault_of_redis_passes_a_limit_or_holds_a_request_up(topology: str) -> None:
    with ExitStack() as stack:
        fleet = Fleet(stack.enter_context(TOPOLOGIES[topology]()), stack)
        lines = [HEAD]
        for name in FAULTS[topology]:
            outcome = fleet.suffer(topology, name, 1.5)
            # On a machine that others use something may come between once. What holds requests up does so each time.
            for _ in range(2):
                if outcome.added <= allowed(outcome):
                    break
                lines.append(outcome.line() + " once more")
                outcome = fleet.suffer(topology, name, 1.5)
            lines.append(outcome.line())
            right(outcome, "\n".join(lines))
        print("\n".join(lines))
        for gateway in fleet.gateways:
            assert "Traceback" not in gateway.output()


def allowed(outcome: Outcome) -> float:
    """`PAYS`, and as much as the machine held up requests that have no quota, where that was a lot."""
    return PAYS + (outcome.calm if outcome.calm > PAYS / 2 else 0.0)


def right(outcome: Outcome, table: str) -> None:
    for path in PATHS:
        assert set(outcome.statuses[path]) <= {302, 429, 503}, table
    for path in ("exact", "small"):
        rate, burst, _ = LIMITS[path]
        # An answer comes up to a tenth of a second after the token was taken, on a machine that others use.
        assert outcome.excess[path] <= burst + rate * 0.1, table
    assert set(outcome.statuses["local"]) <= {302, 429}, "a local bucket refuses like any other"
    assert not outcome.statuses["allow"][503]
    assert outcome.recovered < 20, table
    assert outcome.calls <= 2 * RATE * len(PATHS) * GATEWAYS, "coming back is no stampede"
    assert outcome.added <= allowed(outcome), table
