"""What the service counts, for Prometheus. One registry per service; labels never hold a session id."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from service.histogram import Histogram

__all__ = ["CONTENT_TYPE_LATEST", "Metrics"]

_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """The service's metrics; attributes are updated where things happen.

    Where things happen often, `labels(...)` of a metric is looked up once and kept. The histograms are `service.histogram`'s:
    `observe(value)`, or `observe_many(values)` for an array.

    - `queue_seconds`, `message_seconds`: one value for each message of a stream or clip; the first until its first run began, the second until its answer.
    - `run_seconds`, `batch_rows`: one value for each run of a model.
    - `frames`, `padded`: frames that the model took, and frames that it computed: rows times steps of each run, so with padding.
    - `state_rows`: the pool of state rows, `kind` is `taken` or `capacity`.
    """

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        model = ["model", "version"]
        ProcessCollector(registry=registry)  # memory, processor time and files of the process, under the names that all services have
        self.requests = Counter("indrnn_requests", "HTTP requests", ["route", "status"], registry=registry)
        self.request_seconds = Histogram("indrnn_request_seconds", "time from request to answer", ["route"], buckets=_SECONDS, registry=registry, fine=True)
        self.errors = Counter("indrnn_errors", "errors told to clients, by code", ["code"], registry=registry)
        self.message_seconds = Histogram(
            "indrnn_message_seconds", "time from a message's being asked of the model to its answer", model, buckets=_SECONDS, registry=registry, fine=True
        )
        self.queue_seconds = Histogram(
            "indrnn_queue_seconds", "time a message waited for its first model run", model, buckets=_SECONDS, registry=registry, fine=True
        )
        self.run_seconds = Histogram("indrnn_run_seconds", "duration of a model run", model, buckets=_SECONDS, registry=registry, fine=True)
        self.batch_rows = Histogram("indrnn_batch_rows", "streams in one model run", model, buckets=_ROWS, registry=registry)
        self.frames = Counter("indrnn_frames", "frames the model has taken", model, registry=registry)
        self.padded = Counter("indrnn_padded_frames", "frames the model has computed, padding included", model, registry=registry)
        self.events = Counter("indrnn_events", "events decided, starts and ends", model, registry=registry)
        self.waiting = Gauge("indrnn_waiting", "messages waiting or running", model, registry=registry)
        self.state_rows = Gauge("indrnn_state_rows", "state rows of streams: taken, and room for them", [*model, "kind"], registry=registry)
        self.sessions_live = Gauge("indrnn_sessions_live", "live sessions", model, registry=registry)
        self.sessions_opened = Counter("indrnn_sessions_opened", "sessions opened", model, registry=registry)
        self.sessions_ended = Counter("indrnn_sessions_ended", "sessions ended, by cause", [*model, "cause"], registry=registry)
        self.sessions_refused = Counter("indrnn_sessions_refused", "sessions refused at the cap", registry=registry)
        self.sessions_taken_up = Counter("indrnn_sessions_taken_up", "sessions taken up from the store", registry=registry)
        self.store_saves = Counter("indrnn_store_saves", "session records that the store has confirmed", registry=registry)
        self.store_bytes = Counter("indrnn_store_bytes", "bytes of session records sent to the store", registry=registry)
        self.store_unsaved = Gauge("indrnn_store_unsaved", "sessions that have changed since they were last saved", registry=registry)
        self.store_degraded = Gauge("indrnn_store_degraded", "1 while the store of sessions cannot be reached", registry=registry)
        self.sockets_live = Gauge("indrnn_sockets_live", "open websockets", registry=registry)
        self.device = Gauge("indrnn_device_info", "the device a model runs on", [*model, "device", "provider"], registry=registry)
        self.model_bytes = Gauge("indrnn_model_bytes", "memory a loaded model takes, without its sessions", model, registry=registry)
        self.load_seconds = Gauge("indrnn_model_load_seconds", "how long the last loading of a model took", model, registry=registry)
        self.models_refused = Counter("indrnn_models_refused", "files refused while the service ran", model, registry=registry)

    def forget_version(self, model: str, version: str) -> None:
        """Takes out what is said of a version only while it is loaded; what was counted stays."""
        for gauge in (self.waiting, self.model_bytes, self.load_seconds):
            gauge.remove(model, version)
        for gauge in (self.device, self.state_rows):
            gauge.remove_by_labels({"model": model, "version": version})

    def text(self) -> bytes:
        """The exposition that `/metrics` answers with."""
        return generate_latest(self.registry)
