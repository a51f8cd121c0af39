"""The command line, and the wiring of each process.

* `main`      -- the one parser: every command, its help, the exit codes
* `runtime`   -- the reactor, the signals, readiness: what every long-running process has in common
* `parts`     -- which source, engine, store and clock a process is made of, read top to bottom like a parts list
* `commands/` -- one file for each command, or for a few that belong together
* `output`    -- tables, JSON and YAML
"""
