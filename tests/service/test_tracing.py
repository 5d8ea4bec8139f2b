"""Spans, by the SDK's own exporter in memory; and those of a real server, by a collector that listens on a port."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode
from websockets.sync.client import connect

from service import notes, protocol
from service.errors import StartupError
from service.metrics import Metrics
from service.sessions import digest
from service.settings import load_settings
from service.tracing import Traces, start_traces
from tests.server_process import ROOT
from tests.toy_models import CHANNELS, example_frames

CLIP = example_frames(CHANNELS, 6)
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
HEADERS = {"traceparent": f"00-{TRACE}-{PARENT}-01"}


class OfSession:
    """What of a session is told."""

    def __init__(self) -> None:
        self.id, self.digest, self.model, self.version, self.next_frame = "secret", "shown", "m", "2", 10


class Book:
    """Traces whose spans stay in memory."""

    def __init__(self) -> None:
        self.metrics = Metrics()
        self._exporter = InMemorySpanExporter()
        self.traces = Traces(SimpleSpanProcessor(self._exporter), self.metrics)

    def spans(self) -> tuple[ReadableSpan, ...]:
        return self._exporter.get_finished_spans()

    def only(self) -> ReadableSpan:
        (span,) = self.spans()
        return span


@pytest.fixture
def book() -> Iterator[Book]:
    token = notes._current.set({"request": "r"})
    yield Book()
    notes._current.reset(token)


def test_a_request_is_a_span_with_what_is_noted_of_it(book: Book) -> None:
    notes.note(model="m", version="1", rows=3, queue_ms=0.5, unknown="not told")
    before = time.time_ns()
    book.traces.request("POST", "/v1/models/{name}/predict", 200, 0.25)
    span = book.only()
    assert (span.name, span.kind.name, span.status.status_code) == ("POST /v1/models/{name}/predict", "SERVER", StatusCode.UNSET)
    assert span.attributes == {
        "http.request.method": "POST", "http.route": "/v1/models/{name}/predict", "http.response.status_code": 200,
        "indrnn.request": "r", "indrnn.model": "m", "indrnn.version": "1", "indrnn.batch_rows": 3, "indrnn.queue_ms": 0.5,
    }  # fmt: skip
    assert span.start_time is not None
    assert span.end_time is not None
    assert span.end_time - span.start_time == 250_000_000
    assert before <= span.end_time <= time.time_ns()
    assert span.parent is None
    assert span.resource.attributes["service.name"] == "indrnn-service"


def test_a_session_is_told_by_its_digest_with_its_model(book: Book) -> None:
    notes.note(session=OfSession())
    book.traces.request("POST", "/v1/sessions/{session_id}/frames", 409, 0.1)
    told = book.only().attributes or {}
    assert (told["indrnn.session"], told["indrnn.model"], told["indrnn.version"]) == ("shown", "m", "2")
    assert "secret" not in str(book.only().to_json())


def test_our_own_failures_are_marked_and_those_of_clients_are_not(book: Book) -> None:
    for status in (422, 500):
        book.traces.request("POST", "/v2", status, 0.1)
    fine, failed = book.spans()
    assert (fine.status.status_code, failed.status.status_code) == (StatusCode.UNSET, StatusCode.ERROR)
    assert (failed.attributes or {})["error.type"] == "500"


@pytest.mark.parametrize("route", ["/health/live", "/health/ready", "/v2/health/live", "/v2/health/ready", "/metrics"])
def test_what_machines_ask_every_few_seconds_is_left_out(book: Book, route: str) -> None:
    book.traces.request("GET", route, 200, 0.1)
    assert not book.spans()


def test_the_clients_trace_goes_on_and_lines_of_the_log_name_it(book: Book) -> None:
    book.traces.begin(HEADERS)
    assert notes.spoken()["trace"] == TRACE
    book.traces.request("GET", "/", 200, 0.1)
    span = book.only()
    assert span.parent is not None
    assert (f"{span.context.trace_id:032x}", f"{span.parent.span_id:016x}", span.parent.is_remote) == (TRACE, PARENT, True)


@pytest.mark.parametrize("header", ["", "nonsense", f"00-{'0' * 32}-{PARENT}-01"])
def test_a_broken_traceparent_is_as_none(book: Book, header: str) -> None:
    book.traces.begin({"traceparent": header})
    book.traces.request("GET", "/", 200, 0.1)
    assert book.only().parent is None


def test_a_trace_that_the_client_does_not_sample_is_not_sent(book: Book) -> None:
    book.traces.begin({"traceparent": f"00-{TRACE}-{PARENT}-00"})
    book.traces.request("GET", "/", 200, 0.1)
    assert not book.spans()


def test_a_stream_is_a_span_from_its_beginning_to_its_end(book: Book) -> None:
    session: Any = OfSession()
    owner = object()
    book.metrics.batch_rows.labels("m", "2").observe(1)  # before: not its work
    book.traces.begin(HEADERS)
    notes.note(track=3)
    book.traces.attached(session, owner)
    for rows, waited in ((4, 0.001), (6, 0.003)):
        book.metrics.batch_rows.labels("m", "2").observe(rows)
        book.metrics.queue_seconds.labels("m", "2").observe(waited)
    session.next_frame = 30
    book.traces.detached(session, owner)
    book.traces.detached(session, owner)  # at its end once
    span = book.only()
    assert span.name == "stream m"
    assert span.attributes == {
        "indrnn.request": "r", "indrnn.session": "shown", "indrnn.model": "m", "indrnn.version": "2", "indrnn.track": 3,
        "indrnn.first_frame": 10, "indrnn.frames": 20, "indrnn.batch_rows": 5.0, "indrnn.queue_ms": 2.0,
    }  # fmt: skip
    assert f"{span.context.trace_id:032x}" == TRACE


def test_traces_are_off_unless_asked_for() -> None:
    assert start_traces(load_settings({}), Metrics()) is None


def test_variables_of_the_sdk_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment=test")
    book = Book()
    book.traces.request("GET", "/", 200, 0.1)
    told = book.only().resource.attributes
    assert (told["service.name"], told["deployment.environment"]) == ("mine", "test")


def test_without_the_packages_the_start_says_what_to_install() -> None:
    script = """
import sys
for name in ("opentelemetry.sdk", "opentelemetry.exporter"):
    sys.modules[name] = None
import service.app
from service.errors import StartupError
from service.metrics import Metrics
from service.settings import load_settings
from service.tracing import start_traces
try:
    start_traces(load_settings(traces="http://127.0.0.1:4318"), Metrics())
except StartupError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert "need the extra `otel`" in done.stdout, done.stderr


def test_nothing_of_the_sdk_is_imported_when_traces_are_off() -> None:
    script = "import sys, service.app; print([name for name in sys.modules if name.startswith(('opentelemetry.sdk', 'opentelemetry.exporter'))])"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


class Collector:
    """An OpenTelemetry collector as far as OTLP over HTTP needs one: keeps what it is sent."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.services: set[str] = set()
        self.spans: list[Any] = []

    def take(self, path: str, body: bytes) -> None:
        assert path == "/v1/traces"
        for one in ExportTraceServiceRequest.FromString(body).resource_spans:
            self.services |= {item.value.string_value for item in one.resource.attributes if item.key == "service.name"}
            self.spans += [span for scope in one.scope_spans for span in scope.spans]

    def of(self, route: str) -> list[dict[str, Any]]:
        return [told for span in self.spans if (told := attributes(span)).get("http.route") == route]


def attributes(span: Any) -> dict[str, Any]:
    return {item.key: getattr(item.value, item.value.WhichOneof("value")) for item in span.attributes}


@pytest.fixture
def collector() -> Iterator[Collector]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            kept.take(self.path, gzip.decompress(body) if self.headers.get("content-encoding") == "gzip" else body)
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as sink:
        kept = Collector(f"http://127.0.0.1:{sink.server_address[1]}")
        thread = threading.Thread(target=sink.serve_forever, args=(0.05,))
        thread.start()
        yield kept
        sink.shutdown()
        thread.join()


@pytest.mark.parametrize("variable", ["INDRNN_TRACES", "OTEL_EXPORTER_OTLP_ENDPOINT"])
def test_a_server_sends_its_traces(start: Callable[..., Any], collector: Collector, variable: str) -> None:
    with start(**{variable: collector.url}) as server:
        with httpx.Client(base_url=server.url, timeout=60, headers=HEADERS) as http:
            session = http.post("/v1/models/channels/sessions").json()["session"]
            answer = http.post(f"/v1/sessions/{session}/frames", json={"first": 0, "frames": CLIP.tolist()})
            http.post("/v1/models/channels/predict?version=9", json={"frames": CLIP.tolist()}).raise_for_status()
            assert http.get("/v1/models/nothing").status_code == 404
        with connect(f"{server.ws}/v1/models/channels/stream?scores=last", additional_headers=HEADERS) as stream:
            streamed = json.loads(stream.recv(timeout=60))["session"]
            stream.send(protocol.write_frames(0, CLIP))
            stream.recv(timeout=60)
        assert server.stop() == 0  # what was not yet sent is sent before the end
        assert "Traceback" not in server.errors()
    assert collector.services == {"indrnn-service"}
    assert {span.trace_id.hex() for span in collector.spans} == {TRACE}
    assert {span.parent_span_id.hex() for span in collector.spans} == {PARENT}
    (step,) = collector.of("/v1/sessions/{session_id}/frames")
    assert (step["indrnn.session"], step["indrnn.request"]) == (digest(session), answer.headers["x-request-id"])
    assert (step["indrnn.model"], step["indrnn.version"], step["http.response.status_code"]) == ("channels", "10", 200)
    assert step["indrnn.batch_rows"] == 1
    assert step["indrnn.queue_ms"] >= 0
    (clip,) = collector.of("/v1/models/{name}/predict")
    assert (clip["indrnn.model"], clip["indrnn.version"], clip["indrnn.batch_rows"]) == ("channels", "9", 1)
    (missed,) = collector.of("/v1/models/{name}")
    assert missed["http.response.status_code"] == 404
    (told,) = [attributes(span) for span in collector.spans if span.name == "stream channels"]
    assert (told["indrnn.session"], told["indrnn.frames"], told["indrnn.batch_rows"]) == (digest(streamed), 6, 1)
    for secret in (session, streamed):
        assert secret not in str(collector.spans)


def test_a_collector_that_is_not_there_costs_nothing(start: Callable[..., Any]) -> None:
    with start(INDRNN_TRACES="http://127.0.0.1:9", INDRNN_DRAIN_S="1") as server:
        for _ in range(3):
            assert httpx.get(f"{server.url}/v1/models", timeout=60).status_code == 200
        began = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - began < 6
        assert "Traceback" not in server.errors()


@pytest.mark.parametrize("variable", ["INDRNN_TRACES", "OTEL_EXPORTER_OTLP_ENDPOINT"])
def test_a_wrong_address_stops_the_start(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "collector:4317")
    with pytest.raises(StartupError, match="INDRNN_TRACES: the address of an OpenTelemetry collector"):
        load_settings()
