"""`Telemetry`: the one object that a process's parts report to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from mesh.outcome import Outcome
from mesh.peer import Peer
from mesh.questions import Decision, DecisionQuestion
from telemetry.access_log import AccessLog
from telemetry.background import Background
from telemetry.connections import ConnectionMetrics
from telemetry.decision_log import DecisionLog
from telemetry.metrics import Counter, Function, Gauge, Histogram, Labels, Metrics, Reading
from telemetry.quota_refusals import QuotaRefusals
from telemetry.requests import MAX_SERIES, RequestMetrics
from telemetry.trials import Trials
from telemetry.writer import STDOUT


class Telemetry:
    """Takes outcomes and events in; gives a metrics page and logs out. One for a process; its owner is the wiring."""

    __slots__ = (
        "_active",
        "_connections",
        "_datagrams",
        "_dropped",
        "_failures",
        "_flows",
        "_flows_active",
        "_logs",
        "_opened",
        "_requests",
        "access_log",
        "decision_log",
        "l4_record",
        "metrics",
        "quota_refusals",
        "record",
        "trials",
    )

    record: Callable[[Outcome], None]
    """Takes the outcome of one request, once, at its end."""
    l4_record: Callable[[Outcome], None]
    """The same for a connection below HTTP; `l4_closed` calls it."""

    def __init__(self, access_log: AccessLog | None = None, decision_log: DecisionLog | None = None, max_series: int = MAX_SERIES) -> None:
        """A log that is None costs nothing."""
        self.access_log = access_log
        self.decision_log = decision_log
        self.metrics = Metrics()
        listener = ("gateway", "listener")
        self._opened = self.counter("tollhouse_connections_total", "Connections accepted.", listener)
        self._active = self.gauge("tollhouse_connections_active", "Connections open now.", listener)
        self._failures = self.counter(
            "tollhouse_handshake_failures_total", "Connections that ended before anybody was known.", (*listener, "reason")
        )
        self._flows = self.counter(
            "tollhouse_udp_flows_total", "Flows of datagrams that ended.", (*listener, "service", "response_flags"), max_series=4096
        )
        self._flows_active = self.gauge("tollhouse_udp_flows_active", "Flows of datagrams that go on.", listener)
        self._datagrams = self.counter(
            "tollhouse_udp_datagrams_total", "Datagrams of flows that ended.", (*listener, "service", "direction"), max_series=4096
        )
        self._dropped = self.counter("tollhouse_udp_dropped_total", "Datagrams that went nowhere.", (*listener, "reason"))
        decisions = self.counter(
            "tollhouse_decisions_total", "Decisions, by policy and answer.", ("policy", "verdict", "kept", "shadow"), max_series=4096
        )
        tokens = self.counter(
            "tollhouse_quota_answers_total", "Questions for tokens, by limit and answer.", ("limit", "result", "shadow"), max_series=4096
        )
        tried = self.counter(
            "tollhouse_trial_decisions_total",
            "Decisions of what is tried (a shadow or canary revision, a policy in shadow mode), by what it changes.",
            ("kind", "policy", "revision", "change"),
            max_series=4096,
        )
        self.trials = Trials(tried)
        """What is tried, and what it changes for whom."""
        self.quota_refusals = QuotaRefusals()
        """The newest requests that a limit refused."""
        self._requests = RequestMetrics(decisions, tokens, self.trials, max_series)
        self.metrics.add(self._requests)
        self._connections = ConnectionMetrics()
        self.metrics.add(self._connections)
        self._logs: tuple[AccessLog | DecisionLog, ...] = tuple(log for log in (access_log, decision_log) if log is not None)
        self._count_logs()
        self.record = self._recorder()
        self.l4_record = self._l4_record

    def _recorder(self) -> Callable[[Outcome], None]:
        takers: tuple[Callable[[Outcome], None], ...] = (self._requests.record, *(log.record for log in self._logs))
        refused = self.quota_refusals.add

        def record(outcome: Outcome) -> None:
            for take in takers:
                take(outcome)
            if outcome.limit:
                refused(outcome)

        return record

    def _count_logs(self) -> None:
        workers: dict[Labels, list[Background[Any]]] = {}
        if self.access_log is not None:
            workers["access", "stdout" if self.access_log.writer.path == STDOUT else "file"] = [self.access_log.writer]
        decisions = self.decision_log
        if decisions is not None:
            for sink in decisions.sinks:
                workers.setdefault(("decision", sink.kind), []).append(sink.worker)
            workers["decision", "queue"] = [decisions]
            self.counter_function(
                "tollhouse_log_entries_filtered_total",
                "Entries that the policy's system.log.drop left out of a log.",
                lambda: {("decision",): decisions.filtered},
                ("log",),
            )

        def reading(field: str) -> Callable[[], Reading]:
            return lambda: {labels: sum(getattr(each, field) for each in found) for labels, found in workers.items()}

        for field, text in (
            ("written", "Entries written to a log, by where they went (queue: handed on to where they go)."),
            ("dropped", "Entries that there was no room for."),
            ("failed", "Entries that could not be made or written."),
        ):
            self.counter_function(f"tollhouse_log_entries_{field}_total", text, reading(field), ("log", "sink"))

    def handshake_failed(self, gateway: str, listener: str, reason: str) -> None:
        """A connection ended before its peer was known; `reason` is `identity.tls.handshake_problem`'s or an `IdentityProblem`'s."""
        self._failures.inc((gateway, listener, reason))

    def connection_opened(self, gateway: str, listener: str, peer: Peer) -> None:
        """A connection was accepted, and it is known who is at its other end."""
        labels = (gateway, listener)
        self._opened.inc(labels)
        self._active.inc(labels)
        self._connections.opened(gateway, peer.principal, peer.certificate_hash != "")

    def connection_closed(self, gateway: str, listener: str, peer: Peer, received: int, sent: int) -> None:
        """A connection that was reported as opened has ended, however it did; `received` and `sent` in bytes."""
        self._active.inc((gateway, listener), -1)
        self._connections.closed(gateway, peer.principal, peer.certificate_hash != "", received, sent)

    def l4_accepted(self, gateway: str, listener: str) -> None:
        """A connection below HTTP was accepted, and it is known who is at its other end."""
        self._opened.inc((gateway, listener))
        self._active.inc((gateway, listener))

    def l4_connected(self, outcome: Outcome) -> None:
        """A connection that was accepted is passed on to an endpoint."""
        self._connections.opened(*_ends(outcome))

    def l4_closed(self, outcome: Outcome, connected: bool) -> None:
        """A connection that was accepted has ended, whether it was ever connected or not; it leaves the one line in the logs."""
        self._active.inc((outcome.gateway, outcome.listener), -1)
        gateway, principal, mutual, service, upstream = _ends(outcome)
        if not connected:
            self._connections.opened(gateway, principal, mutual, service, upstream, outcome.flag)
        self._connections.closed(gateway, principal, mutual, outcome.bytes_received, outcome.bytes_sent, service, upstream, outcome.flag)
        self.l4_record(outcome)

    def flow_began(self, gateway: str, listener: str) -> None:
        """A flow of datagrams began."""
        self._flows_active.inc((gateway, listener))

    def flow_ended(self, outcome: Outcome, received: int, sent: int) -> None:
        """A flow that began has ended, or was refused; it leaves the one line in the logs. `received` and `sent` in datagrams."""
        labels = outcome.gateway, outcome.listener
        self._flows_active.inc(labels, -1)
        self._flows.inc((*labels, outcome.service, outcome.flag))
        self._datagrams.inc((*labels, outcome.service, "received"), received)
        self._datagrams.inc((*labels, outcome.service, "sent"), sent)
        self.l4_record(outcome)

    def datagram_dropped(self, gateway: str, listener: str, reason: str) -> None:
        """A datagram went nowhere."""
        self._dropped.inc((gateway, listener, reason))

    def refusals(self) -> bytes:
        """The newest decisions that did not allow, as the decision log has them, as JSON; none without one."""
        return self.decision_log.recent.page() if self.decision_log is not None else b'{"events":[]}'

    def late(self, outcome: Outcome, asked: DecisionQuestion, decision: Decision) -> None:
        """A decision that is not enforced has come when its request, `outcome`, had been recorded."""
        self._requests.record_late(outcome, asked, decision)
        if self.decision_log is not None:
            self.decision_log.offer_some(outcome, ((asked, decision),))

    def _l4_record(self, outcome: Outcome) -> None:
        self._requests.record_answers(outcome)
        if outcome.limit:
            self.quota_refusals.add(outcome)
        for log in self._logs:
            log.record(outcome)

    def certificates(self, function: Callable[[], Mapping[Labels, float]]) -> None:
        """Shows when certificates expire; `function` gives, for what is served now, its end (seconds since the epoch) by its SPIFFE ID
        or name and its serial number."""
        self.gauge_function(
            "tollhouse_certificate_expiry_timestamp_seconds",
            "When a certificate that is served now ends, in seconds since the epoch.",
            function,
            ("identity", "serial"),
        )

    def counter(self, name: str, text: str, labels: Sequence[str] = (), max_series: int = 1024) -> Counter:
        """A new counter on the page; raises ValueError if there is one of the name."""
        made = Counter(name, text, labels, max_series)
        self.metrics.add(made)
        return made

    def gauge(self, name: str, text: str, labels: Sequence[str] = (), max_series: int = 1024) -> Gauge:
        """A new gauge on the page."""
        made = Gauge(name, text, labels, max_series)
        self.metrics.add(made)
        return made

    def histogram(self, name: str, text: str, bounds: Sequence[float], labels: Sequence[str] = ()) -> Histogram:
        """A new histogram on the page."""
        made = Histogram(name, text, bounds, labels)
        self.metrics.add(made)
        return made

    def gauge_function(self, name: str, text: str, function: Callable[[], Reading], labels: Sequence[str] = ()) -> None:
        """A gauge that is read from `function` for each page: a number, or one for each labels."""
        self.metrics.add(Function(name, text, function, labels))

    def counter_function(self, name: str, text: str, function: Callable[[], Reading], labels: Sequence[str] = ()) -> None:
        """A counter that is read from `function` for each page: what other rooms count in plain attributes."""
        self.metrics.add(Function(name, text, function, labels, "counter"))

    def chunks(self) -> Iterator[bytes]:
        """The metrics page, a little at a time."""
        return self.metrics.chunks()

    def page(self) -> bytes:
        """The whole metrics page."""
        return self.metrics.page()

    def reopen(self) -> None:
        """Opens the logs' files anew (SIGHUP)."""
        if self.access_log is not None:
            self.access_log.writer.reopen()
        if self.decision_log is not None:
            self.decision_log.reopen()

    def close(self) -> None:
        """Writes what the logs still hold, within a bound, and ends them."""
        if self.access_log is not None:
            self.access_log.writer.close()
        if self.decision_log is not None:
            self.decision_log.close()


def _ends(outcome: Outcome) -> tuple[str, str, bool, str, str]:
    caller, peer = outcome.caller, outcome.peer
    principal = caller.principal if caller is not None else peer.principal
    return outcome.gateway, principal, peer.certificate_hash != "", outcome.service, outcome.upstream_principal
