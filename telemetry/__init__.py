"""What happened. What goes in: one `Outcome` for each request and a few events; what comes out: metrics, logs and an admin page.

* `telemetry.record`  -- `Telemetry`, which a process's parts report to, and on which they register counters of their own
* `telemetry.metrics` -- counters, gauges and histograms, bounded, cheap on the data path; `telemetry.merge` adds workers' pages up
* `telemetry.requests` -- Istio's standard metrics from outcomes
* `telemetry.access_log`, `telemetry.decision_log` -- lines of JSON, written by a thread (`telemetry.writer`)
* `telemetry.admin`   -- `/metrics`, `/healthz`, `/readyz`, `/config` on a loopback address
* `telemetry.notify`  -- systemd is told that we are ready, alive, reloading or stopping
"""
