"""The data plane. It reads in the order of a request's way:

    listening -> connection -> codec -> normalize -> route -> driver -> settle -> forward -> record

What goes in: bytes of clients, a `mesh.model.Snapshot`, and the two that answer questions (`mesh.questions.Decider` and `Lessee`).
What comes out: requests that have a `Permit`, and one `mesh.outcome.Outcome` each. Only the command line imports this room. It uses:

* `gateway.gateway`  -- `Gateway`: the listeners of one Gateway resource; `apply` a snapshot, `drain`
* `gateway.route`, `gateway.settle`, `gateway.explain` -- the pure core, and the same core telling what it does
* `gateway.limits`   -- `Limits`: how much of everything
"""
