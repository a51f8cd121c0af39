"""May this call pass. What goes in: a request's facts and the active policy revision. What comes out: allow, deny or error, never mixed up.

* `pdp.decider`   -- `PolicyDecider`, a `mesh.questions.Decider`: kept decisions first, then whoever is to be asked
* `pdp.kept`, `pdp.readset` -- what is kept, under which key, and why that is sound
* `pdp.publish`   -- modules and data in, a checked `mesh.policy.Revision` out
* `pdp.engines`   -- who evaluates Rego: our worker processes, or the user's own OPA servers
* `pdp.point`     -- the decision point's own part; `pdp.service` is ext_authz v3 over gRPC, `pdp.http_service` the same over plain HTTP
* `pdp.client`    -- asks ext_authz servers, ours and others'; `pdp.asker` asks an engine of this process
* `pdp.input`, `pdp.answer` -- the OPA-Envoy plugin's input document and answer forms; `pdp.check` puts a decision on the wire and back
* `pdp.build`     -- builds the worker (`pdp/opa/`, Go) once for each version
"""
