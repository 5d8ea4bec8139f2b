"""Traces for OpenTelemetry, off unless asked for: a span for each HTTP request, and one for each time that a websocket streams a session.

Spans are made when their work is over, so nothing is done on the way of a message. They carry the ids that log lines have, never a
session's own id: paths, which may hold one, stand as their routes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from service import notes
from service.errors import StartupError
from service.metrics import Metrics
from service.sessions import Session
from service.settings import Settings

if TYPE_CHECKING:  # the extra `otel` is only there where traces are wanted
    from opentelemetry.sdk.trace import SpanProcessor

CLOSE_S = 2.0
_PATH = "/v1/traces"  # of the protocol, OTLP over HTTP
_UNTRACED = ("/health/", "/v2/health/", "/metrics")  # asked every few seconds by machines
_SPOKEN = {"request": "indrnn.request", "session": "indrnn.session", "rows": "indrnn.batch_rows", "queue_ms": "indrnn.queue_ms", "track": "indrnn.track"}

_Start = tuple[int, int, dict[str, Any], "_Work"]  # when (ns), at which frame, what was noted


def start_traces(settings: Settings, metrics: Metrics) -> Traces | None:
    """Traces to the collector that the settings name, None without one; raises `StartupError` where the packages for it are not installed."""
    if not settings.traces:
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise StartupError(f"traces are on (INDRNN_TRACES, OTEL_EXPORTER_OTLP_ENDPOINT) and need the extra `otel`: {error}") from None
    url = settings.traces.rstrip("/")
    return Traces(BatchSpanProcessor(OTLPSpanExporter(endpoint=url if url.endswith(_PATH) else url + _PATH)), metrics)


class Traces:
    """Makes spans and hands them to a processor of OpenTelemetry's SDK. Its variables (`OTEL_SERVICE_NAME`, `OTEL_TRACES_SAMPLER`, ...) hold."""

    def __init__(self, processor: SpanProcessor, metrics: Metrics) -> None:
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.trace import SpanKind, Status, StatusCode
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        resource = Resource.create({"service.name": "indrnn-service"}).merge(OTELResourceDetector().detect())
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("indrnn-service")
        self._read_parent = TraceContextTextMapPropagator().extract
        self._server, self._failed = SpanKind.SERVER, Status(StatusCode.ERROR)
        self._metrics = metrics
        self._streams: dict[object, _Start] = {}

    def begin(self, headers: Mapping[str, str]) -> None:
        """Work begins whose request had these headers (lower-case names): where they have a `traceparent` it is a part of that trace, and log lines say so."""
        if "traceparent" in headers:
            notes.note(trace=_Trace(self._read_parent({name: headers[name] for name in ("traceparent", "tracestate") if name in headers})))

    def request(self, method: str, route: str, status: int, seconds: float) -> None:
        """A request was answered just now, with what is noted of it."""
        if route.startswith(_UNTRACED):
            return
        end, noted = time.time_ns(), notes.current() or {}
        said = {"http.request.method": method, "http.route": route, "http.response.status_code": status}
        failed = {"error.type": str(status)} if status >= 500 else {}
        self._emit(f"{method} {route}", noted, end - int(1e9 * seconds), end, {**said, **failed})

    def attached(self, session: Session, owner: object) -> None:
        """`owner` begins to stream the session."""
        noted = {**(notes.current() or {}), "session": session}
        self._streams[owner] = (time.time_ns(), session.next_frame, noted, _Work(self._metrics, session))

    def detached(self, session: Session, owner: object) -> None:
        """`owner` streams it no more."""
        started = self._streams.pop(owner, None)
        if started is None:
            return
        began, first, noted, work = started
        said = {"indrnn.first_frame": first, "indrnn.frames": session.next_frame - first, **work.means()}
        self._emit(f"stream {session.model}", noted, began, time.time_ns(), said)

    def close(self) -> None:
        """Sends what is left; where the collector does not answer that is given up after a while, which its own patience is longer than."""
        closing = threading.Thread(target=self._provider.shutdown, name="traces", daemon=True)
        closing.start()
        closing.join(CLOSE_S)

    def _emit(self, name: str, noted: Mapping[str, Any], began: int, ended: int, said: dict[str, Any]) -> None:
        trace = noted.get("trace")
        parent = None if trace is None else trace.context
        span = self._tracer.start_span(name, parent, kind=self._server, attributes={**_facts(noted), **said}, start_time=began)
        if "error.type" in said:
            span.set_status(self._failed)
        span.end(ended)


class _Trace:
    """What a client's work belongs to; where notes are shown, its id."""

    __slots__ = ("context", "digest")

    def __init__(self, context: Any) -> None:
        from opentelemetry.trace import format_trace_id, get_current_span

        self.context = context
        self.digest = format_trace_id(get_current_span(context).get_span_context().trace_id)


class _Work:
    """How the batches of a session's model were while it was streamed: means over all streams, since none is asked on its way."""

    __slots__ = ("_before", "_rows", "_waits")

    def __init__(self, metrics: Metrics, session: Session) -> None:
        self._rows = metrics.batch_rows.labels(session.model, session.version)
        self._waits = metrics.queue_seconds.labels(session.model, session.version)
        self._before = self._now()

    def means(self) -> dict[str, float]:
        runs, rows, messages, waited = (after - before for after, before in zip(self._now(), self._before, strict=True))
        return {
            **({"indrnn.batch_rows": round(rows / runs, 2)} if runs else {}),
            **({"indrnn.queue_ms": round(1000 * waited / messages, 3)} if messages else {}),
        }

    def _now(self) -> tuple[float, float, float, float]:
        return int(self._rows.counts().sum()), self._rows.sum, int(self._waits.counts().sum()), self._waits.sum


def _facts(noted: Mapping[str, Any]) -> dict[str, Any]:
    """Notes as attributes of a span; a session says which model it is of."""
    session = noted.get("session")
    model, version = (session.model, session.version) if session is not None else (noted.get("model"), noted.get("version"))
    facts = {_SPOKEN[name]: getattr(value, "digest", value) for name, value in noted.items() if name in _SPOKEN}
    return {**facts, **({} if model is None else {"indrnn.model": model, "indrnn.version": version})}
