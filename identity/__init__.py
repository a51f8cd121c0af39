"""Who is on the wire. What goes in: certificates, keys, trust bundles; what comes out: TLS contexts, and a `Peer` for a connection.

* `identity.spiffe` -- `SpiffeId`, read strictly
* `identity.svid`   -- `Identity`, our own certificate with key and bundle, and the rules of X.509-SVIDs
* `identity.files`  -- `IdentityFiles` (a directory, reloaded as it changes) and `StaticIdentity`, both an `IdentitySource`
* `identity.tls`    -- `server_context`, `client_context`, and after the handshake `peer_of`, `verify_upstream`; `handshake_problem`
* `identity.hello`  -- `read_hello`: the name that a client asks for, before OpenSSL sees it
* `identity.ca`     -- `Authority`, the small CA behind `tollhouse ca`; `identity.renewal` renews what it issued

What is wrong with a peer is a value (`IdentityProblem`); what is wrong with our own files is raised (`IdentityError`).
"""
