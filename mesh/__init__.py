"""The vocabulary and the configuration model. No I/O, and no other room of ours is imported here.

What goes in: documents (Gateway API, core, Istio and `tollhouse.dev/v1` resources, with where each was written).
What comes out: one immutable `Snapshot` of listeners, routes, clusters and endpoints, and the problems found on the way.

The words that every room shares live in small modules, one idea each:

* `mesh.http`      -- `RequestHead` and the header helpers
* `mesh.peer`      -- `Peer`, who is on the wire, and `Caller`, whom the request is decided for
* `mesh.refusals`  -- one class for each way that a request ends without reaching its upstream
* `mesh.questions` -- what is asked about a request (`DecisionQuestion`, `TokenQuestion`) and the answers
* `mesh.outcome`   -- `Outcome`, the one record that a request leaves
* `mesh.model`     -- the compiled configuration: `Snapshot`, `Listener`, `VirtualHost`, `Rule`, `Cluster`, `Endpoint`
* `mesh.policy`    -- policy revisions as the fleet carries them: `Revision`, `EntryPoint`, `ReadSet`
* `mesh.backoff`   -- `Backoff`: how long to wait before something is tried again
* `mesh.documents` -- a resource as it was written: `Document`, its `Key` and its `Origin`

And what works on them:

* `mesh.reading`   -- `read_documents` (YAML), `document_from_json`, `document_of`: text to documents; `mesh.rereading`: a text that changes
* `mesh.writing`   -- `document_to_yaml`, `document_to_json`: and back
* `mesh.kinds`     -- `KINDS`, every kind that is read; `check_document`: what is wrong with a resource by itself
* `mesh.policies`  -- `revision_body`, `active_policy_body`: policy revisions as documents
* `mesh.workspace` -- `Workspace`: takes changes, gives the `Snapshot` in force (it owns a `mesh.compile.Compiler`)
* `mesh.sharing`   -- `changed`: what is different between two snapshots
"""
