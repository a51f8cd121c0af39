"""Who evaluates Rego: one interface (`engine.Engine`), two siblings.

* `worker.WorkerPool` -- OPA as child processes of ours (`pdp/opa/`), asked over socketpairs
* `server.OpaServer`  -- the user's own OPA servers, asked over their REST API; `bundle.BundleServer` is where they fetch a revision

A question goes in as (revision, path, input document), an `Evaluation` comes out: a result, undefined, or an error that
says why. Errors are never results: what they mean for a request is the caller's to decide.
"""

from pdp.engines.engine import Engine, Evaluation, PolicyError, PolicyProblem

__all__ = ["Engine", "Evaluation", "PolicyError", "PolicyProblem"]
