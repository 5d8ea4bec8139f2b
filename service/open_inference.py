"""The Open Inference Protocol, version 2, over HTTP: thin handlers between its tensors and the predictor.

Bodies are read without regard to their content type, which its clients do not set; every error is JSON with `error`; success is always 200.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.routing import APIRoute

from model.contract import FRAMES
from service import calls
from service.app_state import gate_of, predictor_of, settings_of
from service.bodies import headers_of, read_body
from service.compression import ENCODINGS, deflate, inflate
from service.errors import Malformed, NotSupported
from service.metadata import INPUTS, OUTPUTS, model_config, server_metadata
from service.protocol import encode, read_object
from service.runner import Runner
from service.schemas import refusals
from service.sequences import Sequences
from service.shortcut import Hot, Ready
from service.tensors import InferRequest, Step, read_request, split_lean, write_lean_response, write_response

router = APIRouter(tags=["open inference"])

Handler = Callable[[Request], Coroutine[Any, Any, Response]]

_LARGE = 2**20  # bytes; bodies above are read and written in a thread, so that the event loop goes on
LENGTH = b"inference-header-content-length"
_BODY = {"requestBody": {"required": False, "content": {"application/json": {"schema": {"type": "object"}}}}}
_INFER_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {"type": "object", "required": ["inputs"]},
                "example": {"inputs": [{"name": FRAMES, "shape": [1, 2, 3], "datatype": "FP32", "data": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]}]},
            },
            "application/octet-stream": {"schema": {"type": "string", "format": "binary"}, "example": "JSON, then the tensors it describes"},
        },
    }
}


def _of_model(method: str, path: str, summary: str, statuses: Sequence[int] = (404, 503), body: dict[str, Any] | None = None) -> Callable[[Handler], Handler]:
    """Registers a handler for a model, and for one version of it."""

    def register(handler: Handler) -> Handler:
        for place, names in (("/v2/models/{name}", ("name",)), ("/v2/models/{name}/versions/{version}", ("name", "version"))):
            parameters = [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names]
            router.add_api_route(
                place + path,
                handler,
                methods=[method],
                summary=summary,
                response_model=None,
                responses=refusals(*statuses),
                openapi_extra={"parameters": parameters, **(body or {})},
            )
        return handler

    return register


# Health and metadata


@router.get("/v2/", include_in_schema=False)
@router.get("/v2", summary="What the server is")
async def server(request: Request) -> Response:
    return _json(server_metadata())


@router.get("/v2/health/live", summary="Whether the process runs")
async def live(request: Request) -> Response:
    return _json({"live": True})


@router.get("/v2/health/ready", summary="Whether work is accepted", responses=refusals(503))
async def ready(request: Request) -> Response:
    """As `/health/ready`: a model that could not be loaded does not stop the others; the repository index names it."""
    calls.check_open(predictor_of(request))
    return _json({"ready": True})


@router.get("/v2/models/stats", summary="Statistics of all models")
async def all_statistics(request: Request) -> Response:
    return _json({"model_stats": calls.statistics(predictor_of(request), None, None)})


@_of_model("GET", "/stats", "Statistics of a model")
async def statistics(request: Request) -> Response:
    """Counts and times since the model was loaded, of all its work, whatever protocol it came by; without a version, of each version."""
    return _json({"model_stats": calls.statistics(predictor_of(request), request.path_params["name"], request.path_params.get("version"))})


@_of_model("GET", "/ready", "Whether a model takes requests")
async def model_ready(request: Request) -> Response:
    runner = _runner(request)
    calls.check_open(predictor_of(request))
    return _json({"name": runner.name, "ready": True})


@_of_model("GET", "/config", "A model's configuration")
async def config(request: Request) -> Response:
    runner = _runner(request)
    return _json(model_config(runner.name, runner.manifest, settings_of(request)))


@_of_model("GET", "", "A model's inputs and outputs")
async def metadata(request: Request) -> Response:
    """`lengths` (INT64, one for each clip) may be sent beside the input that is listed: how many frames of each are real."""
    return _json(calls.metadata(predictor_of(request), request.path_params["name"], request.path_params.get("version")))


# Inference


@_of_model("POST", "/infer", "Clips, or the next frames of a sequence", (400, 404, 408, 409, 413, 415, 422, 429, 503), _INFER_BODY)
async def infer(request: Request) -> Response:
    """Without `sequence_id`: a batch of clips, each from the zero state. With it: frames of one stream, which is a session.

    `sequence_step` is the number of the first frame, from 0: frames that were taken already are not run again, their kept answers are sent.
    """
    if not predictor_of(request).models.at_work(request.path_params["name"]):
        _runner(request)  # raises: an unknown model is said before a long body is read
    headers, limit = headers_of(request), settings_of(request).body_bytes
    body = await read_body(request, limit, headers)
    encoding, announced = headers.get(b"content-encoding", b"").decode("latin-1"), headers.get(LENGTH)
    length = None if announced is None else announced.decode("latin-1")
    if length is not None and not encoding and len(body) <= _LARGE:
        answer = await _fly(request, headers, body, length)
        if answer is not None:
            return await _write(headers, *answer) if b"accept-encoding" in headers else written(*answer)
    asked, size = await _read(body, encoding, length, limit)
    _check_origin(request, headers, asked.step)
    name = request.path_params["name"]
    done = await calls.infer(predictor_of(request), _sequences(request), name, request.path_params.get("version"), asked, size)
    return await _write(headers, *write_response(asked, name, done.version, done.parameters, done.outputs))


async def _fly(request: Request, headers: Mapping[bytes, bytes], body: bytes, length: str) -> tuple[bytes, int] | None:
    """The answer to what streams send again and again; None for everything else."""
    found = split_lean(body, length, INPUTS, OUTPUTS)
    if found is None:
        return None
    head, rest = found
    step, path = head.step, request.scope["path_params"]
    assert step is not None
    _check_origin(request, headers, step)
    done = await _sequences(request).fly(path["name"], path.get("version"), step, head.tensors[0].shape, rest)
    if done is None:
        return None
    session, flight = done
    return write_lean_response(head, step, path["name"], session.version, flight.first + flight.count, flight.count, flight.scores)


def _check_origin(request: Request, headers: Mapping[bytes, bytes], step: Step | None) -> None:
    """The id of a sequence may be guessed, by any page that the user has open."""
    if step is not None and b"origin" in headers:
        gate_of(request).check_origin(request.headers)


async def _read(body: bytes, encoding: str, length: str | None, limit: int) -> tuple[InferRequest, int]:
    """The request, and how many bytes it had."""

    def read() -> tuple[InferRequest, int]:
        plain = inflate(body, encoding, limit)
        return read_request(plain, length, INPUTS, OUTPUTS), len(plain)

    return read() if len(body) <= _LARGE and not encoding else await asyncio.to_thread(read)


async def _write(asked: Mapping[bytes, bytes], body: bytes, length: int | None) -> Response:
    """Compressed only where just one encoding is asked for: some clients name what they cannot read."""
    encoding = asked.get(b"accept-encoding", b"").decode("latin-1")
    if encoding not in ENCODINGS:
        return written(body, length)
    body = await asyncio.to_thread(deflate, body, encoding) if len(body) > _LARGE else deflate(body, encoding)
    return written(body, length, (b"content-encoding", encoding.encode()), (b"vary", b"accept-encoding"))


def written(body: bytes, length: int | None, *headers: tuple[bytes, bytes]) -> Response:
    """The answer to an inference; `length` is that of the JSON in it where bytes follow."""
    if length is None:
        return Ready(body, b"application/json", headers)
    return Ready(body, b"application/octet-stream", ((LENGTH, b"%d" % length), *headers))


# The model repository


@router.post("/v2/repository/index", summary="All models with their state", responses=refusals(400), openapi_extra=_BODY)
async def index(request: Request) -> Response:
    fields = await _read_fields(request)
    only_ready = fields.get("ready", False)
    if not isinstance(only_ready, bool):
        raise Malformed(f"ready must be true or false, got {only_ready!r:.60}")
    return _json(calls.index(predictor_of(request), only_ready))


@router.post("/v2/repository/models/{name}/load", summary="Load a model (management)", responses=refusals(400, 403, 404), openapi_extra=_BODY)
async def load(request: Request, name: str) -> Response:
    """Makes what is served of the model what its folder holds; answers when that is done. A file that is refused leaves what was served before."""
    await calls.load(predictor_of(request), name, await _read_management(request))
    return Response()


@router.post("/v2/repository/models/{name}/unload", summary="Unload a model (management)", responses=refusals(400, 403, 404), openapi_extra=_BODY)
async def unload(request: Request, name: str) -> Response:
    """Takes all versions from service at once; sequences that are live finish meanwhile."""
    await _read_management(request)
    await predictor_of(request).models.unload(name)
    return Response()


# What belongs to the protocol's family and is not offered


async def not_supported(request: Request) -> Response:
    raise NotSupported(f"{request.url.path[:140]} is not supported")


for _path in ("systemsharedmemory/{rest:path}", "cudasharedmemory/{rest:path}", "trace/setting", "logging", "models/{name}/trace/setting"):
    router.add_api_route(f"/v2/{_path}", not_supported, methods=["GET", "POST"], include_in_schema=False)
for _path in ("generate", "generate_stream"):
    router.add_api_route(f"/v2/models/{{name}}/{_path}", not_supported, methods=["POST"], include_in_schema=False)
    router.add_api_route(f"/v2/models/{{name}}/versions/{{version}}/{_path}", not_supported, methods=["POST"], include_in_schema=False)


HOT = [Hot(route, lambda query: (), lambda request, _: infer(request)) for route in router.routes if isinstance(route, APIRoute) and route.endpoint is infer]


async def _read_fields(request: Request) -> dict[str, Any]:
    """A small JSON object; an empty body is `{}`."""
    body = await read_body(request, settings_of(request).body_bytes)
    return read_object(body) if body.strip() else {}


async def _read_management(request: Request) -> dict[str, Any]:
    """The parameters of a call that needs the management token."""
    gate_of(request).check_management(request.headers)
    parameters = (await _read_fields(request)).get("parameters", {})
    if not isinstance(parameters, dict):
        raise Malformed(f"parameters must be an object, got {parameters!r:.60}")
    return parameters


def _sequences(request: Request) -> Sequences:
    sequences: Sequences = request.app.state.sequences
    return sequences


def _runner(request: Request) -> Runner:
    """The model that the path names; raises what `calls.find_runner` raises."""
    return calls.find_runner(predictor_of(request), request.path_params["name"], request.path_params.get("version"))


def _json(value: Any) -> Response:
    return Response(encode(value), media_type="application/json")
