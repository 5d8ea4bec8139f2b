"""The application: routes, errors and the way in and out of every request, put together."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from typing import Any

import structlog
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from prometheus_client import Counter
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket

from service import notes
from service.errors import Draining, Malformed, MethodNotAllowed, NotFound, ServiceError, Unauthenticated
from service.gate import Gate
from service.histogram import Distribution
from service.history import History
from service.metrics import Metrics
from service.open_inference import HOT as HOT_TENSORS
from service.open_inference import router as open_inference
from service.predictor import Predictor
from service.protocol import encode
from service.routes import HOT as HOT_FRAMES
from service.routes import router
from service.sequences import Sequences
from service.settings import Settings
from service.shortcut import Service
from service.stats import router as stats
from service.streaming import Sockets
from service.tracing import Traces, start_traces

log = structlog.get_logger("app")

_WITHOUT_TOKEN = ("/health/live", "/health/ready", "/v2/health/live", "/v2/health/ready")
_DESCRIPTION = """
Recurrent (IndRNN) models on clips and live streams.

* **A clip**: `POST /v1/models/{name}/predict`.
* **A stream over REST**: open a session, send its frames in steps; the state is carried between. Every frame has a number, so a step may be repeated safely.
* **A stream over a websocket**: `/v1/models/{name}/stream`, JSON or binary messages. It is the same kind of session: what one began, the other may go on with.
* **The Open Inference Protocol, version 2**, as Triton's clients speak it: `/v2`. Its sequences are sessions too.

Every error is `{"error": "one line for a person", "code": "...", ...}`.
"""


def create_app(predictor: Predictor, settings: Settings) -> FastAPI:
    """The service as an ASGI application; its lifespan starts and stops the predictor."""

    history = History(predictor.metrics)
    predictor.traces = traces = start_traces(settings, predictor.metrics)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with predictor, history:
            yield
        if traces is not None:
            await asyncio.to_thread(traces.close)

    app = Service(title="IndRNN service", description=_DESCRIPTION, version="1", lifespan=lifespan, separate_input_output_schemas=False, redirect_slashes=False)
    gate = Gate(settings)
    sockets = Sockets(predictor, gate, settings.connections)
    app.state.predictor, app.state.settings, app.state.gate, app.state.sockets = predictor, settings, gate, sockets
    app.state.history = history
    app.state.sequences = Sequences(predictor, settings.restart_sequences)
    app.include_router(router)
    app.include_router(stats)
    app.include_router(open_inference)

    @app.websocket("/v1/models/{name}/stream")
    async def stream(websocket: WebSocket, name: str) -> None:
        await sockets.serve(websocket, name)

    edge = Edge(gate, predictor.metrics, traces, spoken=settings.log_level == "debug")
    app.add_middleware(Inside, edge=edge)
    app.open_shortcut([*HOT_FRAMES, *HOT_TENSORS], edge.around)
    for kind in (ServiceError, HTTPException, RequestValidationError):
        app.add_exception_handler(kind, _refuse)
    return app


class Edge:
    """Around every HTTP request: the token, a request id, figures, and an answer that tells nothing when our own code fails."""

    def __init__(self, gate: Gate, metrics: Metrics, traces: Traces | None, spoken: bool) -> None:
        self._gate = gate
        self._metrics = metrics
        self._traces = traces
        self._spoken = spoken  # whether anybody listens to debug lines
        self._counts: dict[tuple[str, int], tuple[Counter, Distribution]] = {}

    async def around(self, scope: Scope, receive: Receive, send: Send, app: ASGIApp) -> None:
        """`app` answers the request, or raises."""
        request_id, began, status = f"{random.getrandbits(64):016x}", time.perf_counter(), 0
        notes.begin(request=request_id)
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
            await self._answer(error, scope, receive, sending)
        except ClientDisconnect:  # in the middle of its body: nobody is left to be answered
            status = status or 499
        except asyncio.CancelledError:  # at shutdown the server's patience ends with requests that do not
            if not status:
                await self._answer(Draining("the service is shutting down", retry_after=5), scope, receive, sending)
        except Exception:
            log.exception("request failed", method=scope["method"], route=_route(scope))
            if not status:
                await self._answer(ServiceError(request=request_id), scope, receive, sending)
        route, seconds = _route(scope), time.perf_counter() - began
        self._count(route, status, seconds)
        if self._traces is not None:
            self._traces.request(scope["method"], route, status, seconds)
        if self._spoken:
            log.debug("request", method=scope["method"], route=route, status=status, ms=round(1000 * seconds, 2))

    def _count(self, route: str, status: int, seconds: float) -> None:
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

    async def _answer(self, error: ServiceError, scope: Scope, receive: Receive, send: Send) -> None:
        self._metrics.errors.labels(error.code).inc()
        await error_response(error)(scope, receive, send)


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


async def _refuse(request: Request, error: Exception) -> Response:
    known = _translate(request, error)
    request.app.state.predictor.metrics.errors.labels(known.code).inc()
    return error_response(known)


def _translate(request: Request, error: Exception) -> ServiceError:
    """FastAPI's own refusals in our shape."""
    if isinstance(error, ServiceError):
        return error
    if isinstance(error, RequestValidationError):
        return _malformed(error.errors()[0])
    status = getattr(error, "status_code", 500)
    if status == 404:
        return NotFound("no such path; / says where things are")
    if status == 405:
        return MethodNotAllowed(f"{request.method} is not possible here", allow=(getattr(error, "headers", None) or {}).get("Allow", ""))
    return Malformed(str(getattr(error, "detail", "the request cannot be read"))) if 400 <= status < 500 else ServiceError()


def _malformed(fault: Any) -> Malformed:
    name = str(fault["loc"][-1])
    if fault["type"] == "extra_forbidden":
        return Malformed(f"unknown query parameter {name!r:.60}")
    return Malformed(f"{name}: {fault['msg']}, got {fault.get('input')!r:.60}")


def _route(scope: Scope) -> str:
    return getattr(scope.get("route"), "path", "unmatched")
