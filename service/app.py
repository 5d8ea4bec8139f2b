"""The application: routes, errors and what is around them, put together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.websockets import WebSocket

from service.departures import Departures
from service.edge import Edge, Inside, error_response
from service.errors import Malformed, MethodNotAllowed, NotFound, ServiceError
from service.gate import Gate
from service.history import History
from service.open_inference import HOT as HOT_TENSORS
from service.open_inference import router as open_inference
from service.predictor import Predictor
from service.reference import add_reference
from service.routes import HOT as HOT_FRAMES
from service.routes import router
from service.sequences import Sequences
from service.settings import Settings
from service.shortcut import Service
from service.stats import router as stats
from service.streaming import Sockets
from service.tracing import start_traces

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

    app = Service(
        title="IndRNN service",
        description=_DESCRIPTION,
        version="1",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        separate_input_output_schemas=False,
        redirect_slashes=False,
    )
    gate = Gate(settings)
    sockets = Sockets(predictor, gate, settings.connections)
    app.state.predictor, app.state.settings, app.state.gate, app.state.sockets = predictor, settings, gate, sockets
    app.state.history = history
    app.state.sequences = Sequences(predictor, settings.restart_sequences)
    app.include_router(router)
    app.include_router(stats)
    app.include_router(open_inference)
    add_reference(app)

    @app.websocket("/v1/models/{name}/stream")
    async def stream(websocket: WebSocket, name: str) -> None:
        await sockets.serve(websocket, name)

    edge = Edge(gate, predictor.metrics, traces, spoken=settings.log_level == "debug")
    app.add_middleware(Inside, edge=edge)
    app.open_shortcut([*HOT_FRAMES, *HOT_TENSORS], edge, Departures(predictor, app.state.sequences, gate).readers)
    for kind in (ServiceError, HTTPException, RequestValidationError):
        app.add_exception_handler(kind, _refuse)
    return app


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
