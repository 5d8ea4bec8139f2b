"""What the service counts, for Prometheus. One registry per service; labels never hold a session id."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

__all__ = ["CONTENT_TYPE_LATEST", "Metrics"]

_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """The service's metrics; attributes are updated where things happen."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("indrnn_requests", "HTTP requests", ["route", "status"], registry=registry)
        self.request_seconds = Histogram("indrnn_request_seconds", "time from request to answer", ["route"], buckets=_SECONDS, registry=registry)
        self.errors = Counter("indrnn_errors", "errors told to clients, by code", ["code"], registry=registry)
        self.queue_seconds = Histogram(
            "indrnn_queue_seconds", "time a message waited for its first model run", ["model", "version"], buckets=_SECONDS, registry=registry
        )
        self.run_seconds = Histogram("indrnn_run_seconds", "duration of a model run", ["model", "version"], buckets=_SECONDS, registry=registry)
        self.batch_rows = Histogram("indrnn_batch_rows", "streams in one model run", ["model", "version"], buckets=_ROWS, registry=registry)
        self.frames = Counter("indrnn_frames", "frames the model has taken", ["model", "version"], registry=registry)
        self.events = Counter("indrnn_events", "events decided, starts and ends", ["model", "version"], registry=registry)
        self.waiting = Gauge("indrnn_waiting", "messages waiting or running", ["model", "version"], registry=registry)
        self.sessions_live = Gauge("indrnn_sessions_live", "live sessions", ["model", "version"], registry=registry)
        self.sessions_opened = Counter("indrnn_sessions_opened", "sessions opened", ["model", "version"], registry=registry)
        self.sessions_ended = Counter("indrnn_sessions_ended", "sessions ended, by cause", ["model", "version", "cause"], registry=registry)
        self.sessions_refused = Counter("indrnn_sessions_refused", "sessions refused at the cap", registry=registry)
        self.sockets_live = Gauge("indrnn_sockets_live", "open websockets", registry=registry)
        self.device = Gauge("indrnn_device_info", "the device a model runs on", ["model", "version", "device", "provider"], registry=registry)
        self.model_bytes = Gauge("indrnn_model_bytes", "memory a loaded model takes, without its sessions", ["model", "version"], registry=registry)
        self.load_seconds = Gauge("indrnn_model_load_seconds", "how long the last loading of a model took", ["model", "version"], registry=registry)
        self.models_refused = Counter("indrnn_models_refused", "files refused while the service ran", ["model", "version"], registry=registry)

    def forget_version(self, model: str, version: str) -> None:
        """Takes out what is said of a version only while it is loaded; what was counted stays."""
        for gauge in (self.waiting, self.model_bytes, self.load_seconds):
            gauge.remove(model, version)
        self.device.remove_by_labels({"model": model, "version": version})

    def text(self) -> bytes:
        """The exposition that `/metrics` answers with."""
        return generate_latest(self.registry)
