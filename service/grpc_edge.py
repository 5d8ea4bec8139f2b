"""Around every gRPC call, as around HTTP's requests: a request id, figures, and an error that tells nothing when our own code fails."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, NoReturn

import structlog
from grpc import StatusCode

from service import notes
from service.errors import ServiceError
from service.grpc_status import facts_of, status_of
from service.metrics import Metrics
from service.tracing import Traces

log = structlog.get_logger("grpc")

_CLIENT_LEFT = 499  # what a call that was cancelled is in HTTP's terms, which spans have
_LONGEST = 500  # characters of an error's message: it goes as a header, and clients take 8 KB of those, in which one character has up to 12 bytes


class Edge:
    """Counts calls by their method, a path such as `/inference.GRPCInferenceService/ModelInfer`, and their status in gRPC.

    `spoken`: whether log lines tell of each.
    """

    def __init__(self, metrics: Metrics, traces: Traces | None, spoken: bool) -> None:
        self.metrics, self.traces, self.spoken = metrics, traces, spoken
        self.requests: dict[tuple[str, StatusCode], Any] = {}
        self.seconds: dict[str, Any] = {}

    def begin(self, headers: Mapping[str, str]) -> str:
        """A new request's id, which log lines and answers to errors have."""
        request = f"{random.getrandbits(64):016x}"
        notes.begin(request=request)
        if self.traces is not None:
            self.traces.begin(headers)
        return request

    def work(self, method: str) -> Work:
        return Work(self, method)

    def known(self, error: Exception, method: str, request: str) -> ServiceError:
        """What the client is told; what nobody foresaw is logged.

        Takes the error's traceback away: where a frame in it has the error, request and tensors would be kept until the collector looks, which is seldom.
        """
        known = error if isinstance(error, ServiceError) else ServiceError(request=request)
        if known is not error:
            log.exception("request failed", method=method)
        before: BaseException | None = error
        while before is not None:
            before.__traceback__, before = None, before.__context__
        self.metrics.errors.labels(known.code).inc()
        return known


class Work:
    """A call, or one request of a stream: `with` it, and `done` or `failed` before it ends. Who leaves before that has cancelled it."""

    __slots__ = ("_began", "_edge", "_method", "_said", "_status")

    def __init__(self, edge: Edge, method: str) -> None:
        self._edge, self._method = edge, method
        self._status, self._said = StatusCode.CANCELLED, _CLIENT_LEFT
        self._began = time.perf_counter()

    def __enter__(self) -> Work:
        return self

    def done(self) -> None:
        self._status, self._said = StatusCode.OK, 200

    def failed(self, error: ServiceError) -> None:
        self._status, self._said = status_of(error), error.status

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        edge, method, seconds = self._edge, self._method, time.perf_counter() - self._began
        if (requests := edge.requests.get((method, self._status))) is None:
            requests = edge.requests[method, self._status] = edge.metrics.requests.labels(method, self._status.name)
            edge.seconds[method] = edge.metrics.request_seconds.labels(method)
        requests.inc()
        edge.seconds[method].observe(seconds)
        if edge.traces is not None:
            edge.traces.request("POST", method, self._said, seconds)
        if edge.spoken:
            log.debug("request", method=method, status=self._status.name, ms=round(1000 * seconds, 2))


async def abort(context: Any, error: ServiceError, request: str) -> NoReturn:
    """Ends the call with this error."""
    facts = {**facts_of(error), "x-request-id": request}
    message = error.message if len(error.message) <= _LONGEST else f"{error.message[:_LONGEST]}..."
    await context.abort(status_of(error), message, tuple((name, str(value)) for name, value in facts.items()))
    raise AssertionError("an aborted call does not go on")
