"""A deterministic simulation of a fleet that shares limits: real decision code (`quota.bucket`, `quota.lease`, `quota.lessee`,
`quota.breaker`) between models of processes, clocks, a network and Redis. A seed makes a story, and the same seed the same story.

* `tests.sim.world` -- virtual time, processes that pause and die, clocks that drift
* `tests.sim.redis` -- the model of Redis: what the script does beside the bucket, failovers, restarts, stalls, its wall clock
* `tests.sim.network` -- a store as a lessee sees it: delays, losses, doubles, partitions, its breaker
* `tests.sim.story` -- from a seed to a limit, a fleet, a load and faults; what is counted; what must hold
* `python -m tests.sim` (`make soak`) -- many seeds
"""
