"""Gateway API's own conformance suite, run against real gateways.

`python -m tests.conformance` needs no Kubernetes: a small API of its kind keeps what the suite applies (`api`, `store`), starts the
echo programs that Deployments ask for (`pods`), writes everything as files into a directory, and runs one `tollhouse gateway` for each
Gateway over that directory (`gateways`).

The suite itself and its echo program are the upstream's Go modules, built as they are; only the address that the echo program binds is
ours, so
that each pod has a loopback address of its own.
"""
