"""The way in and out of every HTTP request: its token, its id, figures, and an answer that tells nothing when our own code fails."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Mapping

import structlog
from prometheus_client import Counter
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service import notes
from service.errors import Draining, ServiceError, Unauthenticated
from service.gate import Gate
from service.histogram import Distribution
from service.metrics import Metrics
from service.protocol import encode
from service.tracing import Traces

log = structlog.get_logger("app")

_WITHOUT_TOKEN = ("/health/live", "/health/ready", "/v2/health/live", "/v2/health/ready")


class Edge:
    """Around every HTTP request. `spoken`: whether anybody listens to debug lines."""

    def __init__(self, gate: Gate, metrics: Metrics, traces: Traces | None, spoken: bool) -> None:
        self._gate = gate
        self._metrics = metrics
        self._traces = traces
        self._spoken = spoken
        self._counts: dict[tuple[str, int], tuple[Counter, Distribution]] = {}

    async def around(self, scope: Scope, receive: Receive, send: Send, app: ASGIApp) -> None:
        """`app` answers the request, or raises."""
        request_id, began, status = self.begin(), time.perf_counter(), 0
        if self._traces is not None:
            self._traces.begin(Headers(scope=scope))
        if scope["method"] == "HEAD":  # as GET; the server leaves the body out
            scope = {**scope, "method": "GET"}

        def sending(message: Message) -> Awaitable[None]:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
            return send(message)

        try:
            self._authorise(scope)
            await app(scope, receive, sending)
        except ServiceError as error:
            await self.refused(error)(scope, receive, sending)
        except ClientDisconnect:  # in the middle of its body: nobody is left to be answered
            status = status or 499
        except asyncio.CancelledError as error:
            if not status:
                await self.refused(error)(scope, receive, sending)
        except Exception as error:
            response = self.failed(error, request_id, scope["method"], _route(scope))
            if not status:
                await response(scope, receive, sending)
        route, seconds = _route(scope), time.perf_counter() - began
        self.count(route, status, seconds)
        if self._traces is not None:
            self._traces.request(scope["method"], route, status, seconds)
        if self._spoken:
            log.debug("request", method=scope["method"], route=route, status=status, ms=round(1000 * seconds, 2))

    # For requests that are answered without a task of their own

    def admits(self, headers: Mapping[bytes, bytes]) -> bool:
        """Whether the request may come in, and is of no interest but for its answer."""
        if self._traces is not None or self._spoken:
            return False
        if not self._gate.asks:
            return True
        try:
            self._gate.check_token({"authorization": headers.get(b"authorization", b"").decode("latin-1")})
        except Unauthenticated:
            return False
        return True

    def begin(self) -> str:
        """The request's id, which is noted for all that is done for it."""
        request_id = f"{random.getrandbits(64):016x}"
        notes.begin(request=request_id)
        return request_id

    def refused(self, error: ServiceError | asyncio.CancelledError) -> Response:
        """The answer to a request that cannot be done."""
        if not isinstance(error, ServiceError):  # at shutdown the server's patience ends with requests that do not
            error = Draining("the service is shutting down", retry_after=5)
        self._metrics.errors.labels(error.code).inc()
        return error_response(error)

    def failed(self, error: BaseException, request_id: str, method: str, route: str) -> Response:
        """The answer to a request at which our own code failed, which is logged."""
        log.error("request failed", method=method, route=route, exc_info=error)
        return self.refused(ServiceError(request=request_id))

    def count(self, route: str, status: int, seconds: float) -> None:
        found = self._counts.get((route, status))
        if found is None:  # to look a metric's labels up takes longer than to count
            found = self._metrics.requests.labels(route, str(status)), self._metrics.request_seconds.labels(route)
            self._counts[route, status] = found
        found[0].inc()
        found[1].observe(seconds)

    def _authorise(self, scope: Scope) -> None:
        state = scope.setdefault("state", {})
        if not self._gate.asks:
            state["authorised"] = True
            return
        try:
            self._gate.check_token(Headers(scope=scope))
            state["authorised"] = True
        except Unauthenticated:
            state["authorised"] = False
            if scope["path"] not in _WITHOUT_TOKEN:
                raise


class Inside:
    """The edge around what takes the long way, inside of what FastAPI puts around everything."""

    def __init__(self, app: ASGIApp, edge: Edge) -> None:
        self._app = app
        self._edge = edge

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        await self._edge.around(scope, receive, send, self._app)


def error_response(error: ServiceError) -> Response:
    """An error as an HTTP answer."""
    headers = {}
    if "retry_after" in error.facts:
        headers["retry-after"] = str(error.facts["retry_after"])
    for name in ("allow", "accept_encoding"):
        if name in error.facts:
            headers[name.replace("_", "-")] = error.facts[name]
    if isinstance(error, Unauthenticated):
        headers["www-authenticate"] = "Bearer"
    return Response(encode(error.to_dict()), error.status, headers, "application/json")


def _route(scope: Scope) -> str:
    return getattr(scope.get("route"), "path", "unmatched")
