"""What is counted, traced and told of calls, whatever they do."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("grpc", reason="grpcio is not installed (extra `grpc`): what surrounds gRPC's calls is not tested")

from service import notes
from service.errors import Malformed, Overloaded
from service.grpc_edge import Edge
from service.metrics import Metrics

PATH = "/inference.GRPCInferenceService/ModelInfer"


def drive(edge: Edge) -> None:
    """A call that is answered, one that is refused, one that fails at our end, one that is cancelled."""
    with edge.work(PATH) as work:
        work.done()
    for error in (Malformed("no"), Overloaded("not now")):
        with edge.work(PATH) as work:
            work.failed(error)
    with edge.work(PATH):
        pass


def test_calls_are_counted_by_status() -> None:
    metrics = Metrics()
    drive(Edge(metrics, None, spoken=False))
    drive(Edge(metrics, None, spoken=True))
    text = metrics.text().decode()
    counted = dict(re.findall(rf'indrnn_requests_total{{route="{PATH}",status="(\w+)"}} (\S+)', text))
    assert counted == {"OK": "2.0", "INVALID_ARGUMENT": "2.0", "UNAVAILABLE": "2.0", "CANCELLED": "2.0"}
    assert f'indrnn_request_seconds_count{{route="{PATH}"}} 8' in text


def test_what_nobody_foresaw_tells_nothing_of_our_insides() -> None:
    metrics = Metrics()
    edge = Edge(metrics, None, spoken=False)
    request = edge.begin({})
    assert notes.current() == {"request": request}
    told = edge.known(RuntimeError("secret"), PATH, request)
    assert (told.code, told.facts) == ("internal", {"request": request})
    assert "secret" not in str(told.to_dict())
    error = Malformed("no")
    assert edge.known(error, PATH, request) is error
    text = metrics.text().decode()
    for code in ("internal", "malformed"):
        assert f'indrnn_errors_total{{code="{code}"}} 1.0' in text


def test_calls_are_traced() -> None:
    pytest.importorskip("opentelemetry.sdk", reason="OpenTelemetry is not installed (extra `otel`): traces of gRPC's calls are not tested")
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    from service.tracing import Traces

    kept = InMemorySpanExporter()
    traces = Traces(SimpleSpanProcessor(kept), Metrics())
    edge = Edge(Metrics(), traces, spoken=False)
    edge.begin({"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"})
    drive(edge)
    spans = kept.get_finished_spans()
    traces.close()
    assert [span.attributes["http.response.status_code"] for span in spans] == [200, 400, 503, 499]
    assert {span.name for span in spans} == {f"POST {PATH}"}
    assert {f"{span.context.trace_id:x}" for span in spans} == {"af7651916cd43dd8448eb211c80319c"}
