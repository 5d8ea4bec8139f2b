"""Around every gRPC call, as around HTTP's requests: a request id, figures, and an error that tells nothing when our own code fails."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import structlog
from grpc import StatusCode

from service import notes
from service.errors import ServiceError
from service.grpc_status import facts_of, status_of
from service.metrics import Metrics

log = structlog.get_logger("grpc")


class Work:
    """A call, or one request of a stream, that is under way. Who leaves before it is answered has cancelled it."""

    __slots__ = ("status",)

    def __init__(self) -> None:
        self.status = StatusCode.CANCELLED


class Edge:
    """Counts work by its method, a path such as `/inference.GRPCInferenceService/ModelInfer`, and its status in gRPC."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._requests: dict[tuple[str, StatusCode], Any] = {}
        self._seconds: dict[str, Any] = {}

    def begin(self) -> str:
        """A new request's id, which log lines and answers to errors have."""
        request = secrets.token_hex(8)
        notes.begin(request=request)
        return request

    @contextmanager
    def counted(self, method: str) -> Iterator[Work]:
        began, work = time.perf_counter(), Work()
        try:
            yield work
        finally:
            key = method, work.status
            if (requests := self._requests.get(key)) is None:
                requests = self._requests[key] = self._metrics.requests.labels(method, work.status.name)
                self._seconds[method] = self._metrics.request_seconds.labels(method)
            requests.inc()
            self._seconds[method].observe(time.perf_counter() - began)

    def known(self, error: Exception, method: str, request: str) -> ServiceError:
        """What the client is told; what nobody foresaw is logged."""
        if not isinstance(error, ServiceError):
            log.exception("request failed", method=method)
            error = ServiceError(request=request)
        self._metrics.errors.labels(error.code).inc()
        return error


async def abort(context: Any, error: ServiceError, request: str) -> NoReturn:
    """Ends the call with this error."""
    facts = {**facts_of(error), "x-request-id": request}
    await context.abort(status_of(error), error.message, tuple((name, str(value)) for name, value in facts.items()))
    raise AssertionError("an aborted call goes on")
