"""Where things are: the configuration store and the registry of running instances, over etcd or over files.

What goes in: a directory of YAML, JSON and Rego files, or an etcd. What comes out: `Change`s (documents and instances that
came, went or are wrong), in the shape that `mesh.workspace` takes. Other rooms use:

* `discovery.source`      -- `Source`, `Change` and `SourceStatus`: the one interface to both
* `discovery.directory`   -- `DirectorySource`: files, watched
* `discovery.etcd_source` -- `EtcdSource`: etcd, watched, with the last good state on disk
* `discovery.etcd`        -- `Etcd`, the client; `discovery.address` reads its URL
* `discovery.store`       -- `Store`, what `apply`, `get` and `delete` write to (`open_store` finds the right one);
  `discovery.etcd_store` and `discovery.directory_store` are the two of them
* `discovery.register`    -- `Registrar`: keeps an instance registered while its health check (`discovery.health`) passes
* `discovery.reports`     -- `Reporter` and `reports`: what each gateway has in force; `discovery.acknowledged` waits for all of them
* `discovery.audit`       -- who changed policy, when and why
* `discovery.rights`      -- who may change what in an etcd
"""
