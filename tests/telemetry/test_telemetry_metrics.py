from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from telemetry_world import CATALOG, WEB, an_outcome, of, samples

from mesh.peer import Peer
from mesh.questions import Verdict
from telemetry.connections import ConnectionMetrics
from telemetry.merge import merge
from telemetry.metrics import Counter, Function, Gauge, Histogram, Metrics
from telemetry.record import Telemetry
from telemetry.requests import LABELS, OVERFLOW_SERIES, labels_of

NAME = st.text(max_size=12)


def page_of(*families: Counter | Histogram | Function) -> bytes:
    metrics = Metrics()
    for family in families:
        metrics.add(family)
    return metrics.page()


def test_a_request_is_counted_with_istios_labels() -> None:
    telemetry = Telemetry()
    for _ in range(3):
        telemetry.record(an_outcome())
    labels = {
        "reporter": "source",
        "gateway": "edge/eastwest",
        "source_workload": "web",
        "source_workload_namespace": "shop",
        "source_principal": WEB,
        "source_version": "unknown",
        "destination_workload": "catalog",
        "destination_principal": CATALOG,
        "destination_service": "catalog.shop",
        "destination_service_name": "catalog",
        "destination_service_namespace": "shop",
        "request_protocol": "http",
        "response_code": "200",
        "response_flags": "-",
        "grpc_response_status": "",
        "connection_security_policy": "mutual_tls",
    }
    page = telemetry.page()
    assert of(page, "istio_requests_total", **labels) == 3
    assert of(page, "istio_request_duration_milliseconds_count", **labels) == 3
    assert of(page, "istio_request_duration_milliseconds_sum", **labels) == pytest.approx(9.3)
    assert of(page, "istio_request_duration_milliseconds_bucket", le="1", **labels) == 0
    assert of(page, "istio_request_duration_milliseconds_bucket", le="5", **labels) == 3
    assert of(page, "istio_request_bytes_sum", **labels) == 30
    assert of(page, "istio_response_bytes_bucket", le="+Inf", **labels) == 3
    assert of(page, "tollhouse_decisions_total", policy="shop/main", verdict="allow", kept="true", shadow="false") == 3
    assert of(page, "tollhouse_quota_answers_total", limit="shop/orders/caller", result="admitted", shadow="false") == 3
    assert of(page, "process_open_fds") > 0


def test_the_three_answers_are_three_series() -> None:
    telemetry = Telemetry()
    for verdict in Verdict:
        telemetry.record(an_outcome(verdict=verdict, admitted=None))
    for verdict in ("allow", "deny", "error"):
        assert of(telemetry.page(), "tollhouse_decisions_total", verdict=verdict) == 1


def test_what_is_not_known_is_said_to_be_unknown() -> None:
    outcome = an_outcome(caller="", service="", status=404, flag="NR", verdict=None, admitted=None)
    outcome.upstream_principal = ""
    outcome.head = None
    telemetry = Telemetry()
    telemetry.record(outcome)
    page = telemetry.page()
    unknown = dict.fromkeys(("source_workload", "source_principal", "destination_service", "destination_principal"), "unknown")
    assert of(page, "istio_requests_total", response_flags="NR", **unknown) == 1


@pytest.mark.parametrize(
    ("method", "kind", "status", "protocol"),
    [
        (b"POST", b"application/grpc", "", "grpc"),
        (b"POST", b"application/grpc+proto", "13", "grpc"),
        (b"POST", b"application/grpc-web", "", "http"),
        (b"POST", b"application/json", "", "http"),
        (b"GET", b"application/grpc", "", "http"),
    ],
)
def test_grpc_is_told_by_its_content_type(method: bytes, kind: bytes, status: str, protocol: str) -> None:
    outcome = an_outcome(method=method, headers=[(b"content-type", kind)])
    outcome.grpc_status = status
    telemetry = Telemetry()
    telemetry.record(outcome)
    assert of(telemetry.page(), "istio_requests_total", request_protocol=protocol, grpc_response_status=status) == 1


def test_callers_without_end_do_not_make_series_without_end() -> None:
    telemetry = Telemetry(max_series=50)
    for at in range(500):
        telemetry.record(an_outcome(caller=f"{WEB}{at}", verdict=None))
    for status in range(1000, 1000 + 2 * OVERFLOW_SERIES):
        telemetry.record(an_outcome(caller=WEB, status=status, verdict=None))
    page = telemetry.page()
    lines = [key for key in samples(page) if key[0] == "istio_requests_total"]
    assert len(lines) <= 50 + OVERFLOW_SERIES + 1
    assert of(page, "istio_requests_total") == 500 + 2 * OVERFLOW_SERIES
    assert of(page, "istio_requests_total", source_workload="overflow", destination_service_name="catalog", response_code="200") == 450
    assert of(page, "istio_requests_total", gateway="overflow") > 0
    assert of(page, "tollhouse_metrics_overflow_total", metric="istio_requests_total") > 0


def test_histograms_are_shared_before_counts_are() -> None:
    telemetry = Telemetry()
    for at in range(700):
        telemetry.record(an_outcome(caller=f"{WEB}{at}", verdict=None, admitted=None))
    page = telemetry.page()
    assert len([key for key in samples(page) if key[0] == "istio_requests_total"]) == 700
    assert len([key for key in samples(page) if key[0] == "istio_request_duration_milliseconds_count"]) == 513
    assert of(page, "istio_request_duration_milliseconds_count") == 700


def test_labels_are_all_filled_in() -> None:
    found = labels_of(("edge/ingress", WEB, "shop/catalog", "", 200, "-", "-", True))
    assert len(found) == len(LABELS)
    assert dict(zip(LABELS, found, strict=True))["destination_workload"] == "catalog"


def test_connections_and_handshakes_are_counted() -> None:
    telemetry = Telemetry()
    peer = Peer(principal=WEB, certificate_hash="ab" * 32)
    telemetry.connection_opened("edge/ingress", "https", peer)
    telemetry.connection_opened("edge/ingress", "https", peer)
    telemetry.connection_closed("edge/ingress", "https", peer, 100, 2000)
    telemetry.handshake_failed("edge/ingress", "https", "plain_http")
    telemetry.certificates(lambda: {(WEB, "1a"): 1_800_000_000.0})
    page = telemetry.page()
    assert of(page, "tollhouse_connections_total", gateway="edge/ingress") == 2
    assert of(page, "tollhouse_connections_active", listener="https") == 1
    assert of(page, "tollhouse_handshake_failures_total", reason="plain_http") == 1
    assert of(page, "tollhouse_certificate_expiry_timestamp_seconds", identity=WEB) == 1_800_000_000


def test_a_counter_is_bounded_and_checks_its_labels() -> None:
    counter = Counter("a_total", "A.", ("x", "y"), max_series=2)
    for at in range(5):
        counter.inc((str(at), ""), 2)
    assert (counter.total(), counter.value(("1", "")), counter.value(("overflow", "overflow")), counter.overflowed) == (10, 2, 6, 3)
    with pytest.raises(ValueError, match="labels"):
        counter.inc(("1",))
    assert of(page_of(counter), "a_total") == 10


def test_a_gauge_goes_both_ways() -> None:
    gauge = Gauge("g", "G.", ("x",))
    gauge.set(5, ("a",))
    gauge.inc(("a",), -7)
    gauge.set(1.5, ("b",))
    page = page_of(gauge)
    assert (of(page, "g", x="a"), of(page, "g", x="b")) == (-2, 1.5)
    gauge.remove(("a",))
    assert b'x="a"' not in page_of(gauge)


def test_two_metrics_of_one_name_are_an_error() -> None:
    telemetry = Telemetry()
    telemetry.counter("twice_total", "Once.")
    with pytest.raises(ValueError, match="twice_total"):
        telemetry.gauge("twice_total", "Twice.")


def test_a_room_that_cannot_say_how_it_is_does_not_take_the_page_with_it() -> None:
    telemetry = Telemetry()

    def broken() -> float:
        raise RuntimeError

    telemetry.gauge_function("broken", "B.", broken)
    telemetry.gauge_function("odd", "O.", lambda: {("one", "too many"): 1.0}, ("a",))
    telemetry.counter_function("fine_total", "F.", lambda: 3)
    telemetry.page()
    page = telemetry.page()
    assert of(page, "fine_total") == 3
    assert b"broken " not in page.replace(b'"broken"', b"")
    assert of(page, "tollhouse_metrics_failures_total", metric="broken") >= 1
    assert of(page, "tollhouse_metrics_failures_total", metric="odd") >= 1


@given(st.lists(st.tuples(NAME, NAME), max_size=5), st.text(max_size=40))
def test_any_text_can_be_a_label(values: list[tuple[str, str]], text: str) -> None:
    counter = Counter("c_total", text, ("a", "b"))
    for pair in values:
        counter.inc(pair)
    assert of(page_of(counter), "c_total") == len(values)


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False, min_value=-1e9, max_value=1e9), max_size=30))
def test_a_histogram_adds_up(values: list[float]) -> None:
    histogram = Histogram("h", "H.", (-5, 0, 0.5, 10))
    for value in values:
        histogram.observe(value)
    page = page_of(histogram)
    if values:
        assert of(page, "h_count") == len(values)
        assert of(page, "h_bucket", le="+Inf") == len(values)
        for bound in (-5, 0, 0.5, 10):
            assert of(page, "h_bucket", le=str(bound)) == sum(value <= bound for value in values)
        assert of(page, "h_sum") == pytest.approx(math.fsum(values), abs=1e-3)


def test_odd_numbers_are_written_as_prometheus_reads_them() -> None:
    gauge = Gauge("g", "G.", ("x",))
    for name, value in (("nan", math.nan), ("inf", math.inf), ("low", -math.inf), ("big", 1e300), ("small", 1e-9), ("int", 2**60)):
        gauge.set(value, (name,))
    page = page_of(gauge)
    assert math.isnan(of(page, "g", x="nan"))
    assert (of(page, "g", x="inf"), of(page, "g", x="low")) == (math.inf, -math.inf)
    assert (of(page, "g", x="big"), of(page, "g", x="small"), of(page, "g", x="int")) == (1e300, 1e-9, 2.0**60)


def test_workers_pages_add_up_to_what_one_would_have_counted() -> None:
    workers = [Telemetry(), Telemetry(), Telemetry()]
    one = Telemetry()
    for at in range(30):
        outcome = an_outcome(caller=f"{WEB}{at % 7}", status=200 + at % 3)
        workers[at % 3].record(outcome)
        one.record(outcome)
    for at, worker in enumerate(workers):
        worker.certificates(lambda at=at: {("x", "1"): 1000.0 + at})  # type: ignore[misc]
    merged = merge([worker.page() for worker in workers])
    expected = {
        key: value for key, value in samples(one.page()).items() if key[0].startswith(("istio", "tollhouse_dec", "tollhouse_quota"))
    }
    found = {key: value for key, value in samples(merged).items() if key in expected}
    assert found == pytest.approx(expected)
    assert of(merged, "tollhouse_certificate_expiry_timestamp_seconds") == 1000
    assert merged.count(b"# TYPE istio_requests_total counter\n") == 1
    assert samples(merge([merged])) == samples(merged)


def test_a_page_that_broke_off_costs_no_more_than_itself() -> None:
    one = Telemetry()
    one.record(an_outcome())
    page = one.page()
    for end in range(0, len(page), 997):
        merged = merge([page, page[:end], b"\xff\xfe nonsense\n# HELP\n#\n{ 3\n"])
        assert 1 <= of(merged, "istio_requests_total") <= 2
        samples(merged)


def test_connections_are_counted_with_istios_tcp_metrics() -> None:
    metrics = ConnectionMetrics(max_series=2)
    metrics.opened("edge/ingress", WEB, True)
    metrics.opened("edge/ingress", WEB, True)
    metrics.closed("edge/ingress", WEB, True, 100, 2000)
    metrics.opened("edge/ingress", "", False)
    metrics.opened("edge/ingress", CATALOG, True)  # one too many: counted, without saying whose it is
    page = "".join(metrics.lines())
    found = {
        (sample.name, sample.labels["source_principal"]): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
    }
    assert found["istio_tcp_connections_opened_total", WEB] == 2
    assert found["istio_tcp_connections_closed_total", WEB] == 1
    assert found["istio_tcp_received_bytes_total", WEB] == 100
    assert found["istio_tcp_sent_bytes_total", WEB] == 2000
    assert found["istio_tcp_connections_opened_total", "unknown"] == 1
    assert found["istio_tcp_connections_opened_total", "overflow"] == 1
    assert metrics.overflowed == 1
    assert 'connection_security_policy="mutual_tls"' in page
    assert 'destination_workload="ingress"' in page
