"""REST: thin handlers between requests and the predictor."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Query, Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError

from service import schemas, steps
from service.app_state import gate_of, predictor_of, settings_of
from service.bodies import media_type, read_body, read_frames_body, read_json
from service.errors import Draining, Malformed, ServiceError
from service.metrics import CONTENT_TYPE_LATEST
from service.options import NAMES, Options, read_options
from service.predictor import Predictor
from service.protocol import Answer, encode, frame_number
from service.record import Record
from service.schemas import frames_body, json_body, refusals
from service.sequences import may_be_guessed
from service.sessions import Cause, Session
from service.shortcut import Hot, Ready

router = APIRouter()
_DEFAULTS = Options()
_Query = TypeVar("_Query", bound=schemas.AnswerQuery)
_VERSION_BODY = {
    "requestBody": {
        "required": False,
        "content": {"application/json": {"schema": {"type": "object", "properties": {"version": {"type": "string"}}, "additionalProperties": False}}},
    }
}
_FIRST = {
    "first": {"type": "integer", "description": "number of the first frame"},
    "ack": {"type": "integer", "description": "every frame below was answered and received"},
}


@router.get("/", summary="Where things are", tags=["service"])
async def index() -> Response:
    described = {"docs": "/docs", "openapi": "/openapi.json", "ready": "/health/ready", "metrics": "/metrics"}
    return _json({"service": "indrnn", "models": "/v1/models", "open_inference": "/v2", **described})


@router.get("/health/live", summary="Whether the process runs", tags=["service"])
async def live() -> Response:
    return _json({"status": "live"})


@router.get("/health/ready", summary="Whether work is accepted", tags=["service"], responses=refusals(503))
async def ready(request: Request) -> Response:
    """Facts about models are shown to those who have the token, where one is asked for."""
    predictor = predictor_of(request)
    if predictor.draining:
        raise Draining("the service is shutting down", retry_after=5)
    predictor.check_store()
    facts = {} if predictor.keeper is None else {"store": predictor.keeper.facts()}
    return _json({"status": "ready", **facts, **(_models(predictor) if request.state.authorised else {})})


@router.get("/metrics", summary="Figures for Prometheus", tags=["service"])
async def metrics(request: Request) -> Response:
    return Response(predictor_of(request).metrics.text(), media_type=CONTENT_TYPE_LATEST)


@router.get("/v1/models", summary="All models", tags=["models"])
async def models(request: Request) -> Response:
    """Served models with their default version, and those that could not be loaded with the reason."""
    return _json(_models(predictor_of(request)))


@router.get("/v1/models/{name}", summary="One model", tags=["models"], response_model=None, responses={200: {"model": schemas.ModelBody}, **refusals(404)})
async def model(request: Request, name: str, version: str | None = None) -> Response:
    """Its manifest (frame shape, classes, data, measured accuracy), device, versions, and how busy it is."""
    return _json(predictor_of(request).describe(name, version))


@router.post(
    "/v1/models/{name}/load",
    summary="Load or reload (management)",
    tags=["management"],
    response_model=None,
    responses=refusals(400, 403, 404),
    openapi_extra=_VERSION_BODY,
)
async def load(request: Request, name: str) -> Response:
    """Makes what is served of the model, or of one `version` of it, what its folder holds; answers when that is done.

    New sessions go to what was loaded, those that are live stay on what they began with. A file that is refused leaves what was served before.
    """
    version = await _managed_version(request)
    return _json({"name": name, "loaded": await predictor_of(request).models.load(name, version)})


@router.post(
    "/v1/models/{name}/unload",
    summary="Unload (management)",
    tags=["management"],
    response_model=None,
    responses=refusals(400, 403, 404),
    openapi_extra=_VERSION_BODY,
)
async def unload(request: Request, name: str) -> Response:
    """Takes the model, or one `version` of it, from service at once; its sessions finish meanwhile. Its files stay."""
    version = await _managed_version(request)
    return _json({"name": name, "unloaded": await predictor_of(request).models.unload(name, version)})


@router.post(
    "/v1/models/{name}/predict",
    summary="Classify a clip",
    tags=["models"],
    response_model=None,
    responses={200: {"model": schemas.AnswerBody}, **refusals(400, 404, 408, 413, 422, 503)},
    openapi_extra=frames_body(),
)
async def predict(request: Request, name: str, query: Annotated[schemas.StreamQuery, Query()]) -> Response:
    """Runs all frames from the zero state. Nothing is kept: for streams, open a session."""
    return await _predict(request, (query.version, _given(query)))


async def _predict(request: Request, asked: _Clip) -> Response:
    predictor, name, (version, options) = predictor_of(request), request.path_params["name"], asked
    predictor.runner(name, version)  # an unknown model is said before a long body is read
    payload, fields = await read_frames_body(request, settings_of(request).body_bytes, (), ("t",))
    payload.t = fields.get("t")
    return answer_response(await predictor.predict(name, version, payload, chosen_options(options, _DEFAULTS)))


@router.post(
    "/v1/models/{name}/sessions",
    status_code=201,
    summary="Open a session",
    tags=["sessions"],
    response_model=None,
    responses={201: {"model": schemas.OpenedBody}, **refusals(400, 403, 404, 409, 413, 422, 429, 503)},
    openapi_extra=schemas.opening_body(),
)
async def open_session(request: Request, name: str, query: Annotated[schemas.StreamQuery, Query()]) -> Response:
    """The state is carried from one step to the next. Options may also come as a JSON body.

    With a session record as the body (`application/octet-stream`; management) the new session goes on where that of the record was, with the same bits.
    """
    predictor = predictor_of(request)
    if media_type(request) == "application/octet-stream":
        return await _restore(request, name, query)
    options, version = chosen_options(_given(query), _DEFAULTS), query.version
    if body := await read_body(request, 64 * 1024):
        fields = read_json(body, (), ("version", *NAMES))
        version = _version(fields.pop("version", None)) or version
        options = read_options(fields, options)
    predictor.check_store()
    return await _kept(predictor, predictor.open(name, version, options))


async def _restore(request: Request, name: str, query: schemas.StreamQuery) -> Response:
    gate_of(request).check_management(request.headers)
    if query.model_dump(exclude={"version"}, exclude_none=True):
        raise Malformed("a session record has its own options: only version may be given with it")
    predictor = predictor_of(request)
    predictor.runner(name, query.version)  # an unknown model is said before a long body is read
    record = Record.from_bytes(await read_body(request, settings_of(request).body_bytes))
    predictor.check_store()
    return await _kept(predictor, predictor.restore(name, query.version, record))


@router.post(
    "/v1/sessions/{session_id}/frames",
    summary="Send the next frames",
    tags=["sessions"],
    response_model=None,
    responses={200: {"model": schemas.AnswerBody}, **refusals(400, 404, 408, 409, 413, 422, 503)},
    openapi_extra=frames_body(_FIRST, ("first", "frames"), {"first": 0, "frames": [[0.1, 0.2], [0.3, 0.4]]}),
)
async def step(request: Request, session_id: str, query: Annotated[schemas.StepQuery, Query()]) -> Response:
    """Safe to repeat: frames that were taken are not run again, their kept answers are sent. A message that fails changes nothing."""
    return await _step(request, (query.first, query.ack, _given(query)))


async def _step(request: Request, asked: _Frames) -> Response:
    predictor, session_id = predictor_of(request), _checked_id(request, request.path_params["session_id"])
    await predictor.find(session_id)  # an unknown session is said before a long body is read
    payload, fields = await read_frames_body(request, settings_of(request).body_bytes, ("first",), ("ack", "t"))
    first, ack, options = asked
    if fields:
        payload.t = fields.get("t")
        first = frame_number(fields["first"], "first")
        ack = None if fields.get("ack") is None else frame_number(fields["ack"], "ack")
    elif first is None:
        raise Malformed("a binary body needs ?first=, the number of its first frame")
    asked_first = first

    async def work(session: Session) -> Answer:
        answer = await steps.advance(predictor, session, asked_first, payload, chosen_options(options, session.options))
        if ack is not None:
            predictor.acknowledge(session, ack)
        return answer

    return _said(predictor, answer_response(await predictor.through(session_id, work)))


@router.post(
    "/v1/sessions/{session_id}/reset",
    summary="Begin anew",
    tags=["sessions"],
    response_model=None,
    responses={200: {"model": schemas.ResetBody}, **refusals(400, 404, 408, 409, 503)},
    openapi_extra=json_body({"at": {"type": "integer", "description": "the next frame's number"}}, {"at": 120}),
)
async def reset(request: Request, session_id: str) -> Response:
    """Forgets the past at the next frame; numbering goes on, an event that is open ends. Repeating it changes nothing and gives the same answer."""
    predictor = predictor_of(request)
    await predictor.find(_checked_id(request, session_id))
    fields = read_json(await read_body(request, 64 * 1024), ("at",))

    async def work(session: Session) -> dict[str, Any]:
        events = await predictor.reset(session, frame_number(fields["at"], "at"))
        value: dict[str, Any] = {"next_frame": session.next_frame, "reset_at": session.resets_at}
        return {**value, "events": [event.to_dict() for event in events]} if session.options.events else value

    return _json(await predictor.through(session_id, work))


@router.get(
    "/v1/sessions/{session_id}",
    summary="Where a session stands",
    tags=["sessions"],
    response_model=None,
    responses={200: {"model": schemas.SessionBody}, **refusals(404)},
)
async def session_facts(request: Request, session_id: str) -> Response:
    sessions = predictor_of(request).sessions
    session = await predictor_of(request).resume(session_id)
    return _json({**session.facts(), "expires_in_s": sessions.expires_in_s(session)})


@router.get(
    "/v1/sessions/{session_id}/state",
    summary="Put a session away",
    tags=["sessions"],
    response_class=Response,
    response_model=None,
    responses={
        200: {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}, "description": "the session record"},
        **refusals(404, 408, 503),
    },
)
async def session_state(request: Request, session_id: str) -> Response:
    """The session's record, taken between two of its messages; the session goes on. It holds the session's id: keep it as secret."""
    record = await predictor_of(request).snapshot(await predictor_of(request).resume(_checked_id(request, session_id)))
    return Response(record.to_bytes(), media_type="application/octet-stream", headers={"cache-control": "no-store"})


@router.post(
    "/v1/sessions/{session_id}/touch",
    summary="Keep a session alive",
    tags=["sessions"],
    response_model=None,
    responses={200: {"model": schemas.TouchBody}, **refusals(404)},
)
async def touch(request: Request, session_id: str) -> Response:
    """As a message would, without one. A websocket keeps its sessions alive by itself."""
    predictor = predictor_of(request)
    session = await predictor.resume(_checked_id(request, session_id))
    predictor.touch(session)
    return _json({"next_frame": session.next_frame, "expires_in_s": predictor.sessions.expires_in_s(session)})


@router.delete(
    "/v1/sessions/{session_id}",
    summary="Close a session",
    tags=["sessions"],
    response_model=None,
    responses={200: {"model": schemas.PlaceBody}, **refusals(404)},
)
async def close_session(request: Request, session_id: str) -> Response:
    """Takes effect after the message under way. A manager closes other people's sessions by their digest."""
    predictor, gate = predictor_of(request), gate_of(request)
    by_digest = [session for session in predictor.sessions if session.digest == session_id] if gate.is_manager(request.headers) else []
    session = by_digest[0] if by_digest else await predictor.resume(session_id)
    cause: Cause = "deleted" if by_digest else "closed"
    await predictor.close(session, cause)
    return _json({"closed": True, "next_frame": session.next_frame})


@router.get("/v1/sessions", summary="All sessions (management)", tags=["management"], response_model=None, responses=refusals(403))
async def list_sessions(request: Request) -> Response:
    """Digests only: an id gives its session away."""
    gate_of(request).check_management(request.headers)
    return _json({"sessions": [session.facts() for session in predictor_of(request).sessions]})


def _checked_id(request: Request, session_id: str) -> str:
    """The id of the session to act on; pages of other origins must not act on one whose id they can guess."""
    if may_be_guessed(session_id):
        gate_of(request).check_origin(request.headers)
    return session_id


def _said(predictor: Predictor, response: Response) -> Response:
    """The answer to a step; that it is in memory alone is said in a header."""
    if predictor.keeper is not None and predictor.keeper.down:
        response.headers["warning"] = '199 - "the store of sessions is down: a crash would lose this step"'
    return response


async def _kept(predictor: Predictor, session: Session) -> Response:
    """The answer to opening it, which its client may take elsewhere at once."""
    if predictor.keeper is not None:
        predictor.keeper.changed(session.id, session.next_frame)
        try:
            await predictor.keeper.flush(session)
        except ServiceError:
            predictor.end(session, "failed")
            raise
    return _json(predictor.opened(session), 201, {"location": f"/v1/sessions/{session.id}"})


def _models(predictor: Predictor) -> dict[str, Any]:
    described = [predictor.describe(name) for name in predictor.catalog.names()]
    served = [
        {
            "name": value["name"],
            "version": value["version"],
            "versions": value["versions"],
            "roles": value["roles"],
            "task": value["manifest"]["task"],
            "frame_shape": value["manifest"]["frame_shape"],
            "layout": value["manifest"]["layout"],
            "fps": value["manifest"]["fps"],
            "classes": len(value["manifest"]["classes"]),
            "device": value["device"],
            "memory": {version: predictor.describe(value["name"], version)["memory"] for version in value["versions"]},
        }
        for value in described
    ]
    return {"models": served, "states": predictor.models.states(), "failed": [failure.to_dict() for failure in predictor.catalog.failures]}


# Queries that come with every frame are read once and remembered. What is not plain goes the long way, on which FastAPI reads it or says what is wrong.


_Given = tuple[tuple[str, Any], ...]  # options that the query names
_Clip = tuple[str | None, _Given]  # version, options
_Frames = tuple[int | None, int | None, _Given]  # first, ack, options
_PLAIN = re.compile(rb"[A-Za-z0-9_.=&-]{0,200}")
_PLACE = re.compile(rb"(?:^|&)(first|ack)=([0-9]{1,19})(?=&|$)")  # which differ from frame to frame
_NO_FRAMES: _Frames = (None, None, ())


def _given(query: BaseModel) -> _Given:
    return tuple(query.model_dump(include=set(NAMES), exclude_none=True).items())


def chosen_options(given: _Given, base: Options) -> Options:
    """`base` with what the query names on top; raises `Malformed`."""
    return _changed(given, base) if given else base


@lru_cache(1024)
def _changed(given: _Given, base: Options) -> Options:
    return read_options(dict(given), base)


def _read_frames_query(query: bytes) -> _Frames | None:
    if not query:
        return _NO_FRAMES
    place = _PLACE.findall(query)
    numbers = dict(place)
    rest = _PLACE.sub(b"", query).removeprefix(b"&")
    given = _read_answer_query(rest) if len(numbers) == len(place) and _PLAIN.fullmatch(rest) else None
    if given is None:
        return None
    first, ack = (int(numbers[name]) if name in numbers else None for name in (b"first", b"ack"))
    return first, ack, given


def _read_clip_query(query: bytes) -> _Clip | None:
    return _read_stream_query(query) if _PLAIN.fullmatch(query) else None


@lru_cache(256)
def _read_answer_query(query: bytes) -> _Given | None:
    read = _read_query(schemas.AnswerQuery, query)
    return None if read is None else _given(read)


@lru_cache(256)
def _read_stream_query(query: bytes) -> _Clip | None:
    read = _read_query(schemas.StreamQuery, query)
    return None if read is None else (read.version, _given(read))


def _read_query(kind: type[_Query], query: bytes) -> _Query | None:
    """The query if all of it is right and comes once."""
    parts = [part.partition("=")[::2] for part in query.decode().split("&")] if query else []
    try:
        return kind.model_validate(dict(parts)) if len(dict(parts)) == len(parts) and all(map(all, parts)) else None
    except ValidationError:
        return None


HOT = [
    Hot(route, read, handle)
    for endpoint, read, handle in ((step, _read_frames_query, _step), (predict, _read_clip_query, _predict))
    for route in router.routes
    if isinstance(route, APIRoute) and route.endpoint is endpoint
]


async def _managed_version(request: Request) -> str | None:
    """What a call asks for that needs the management token."""
    gate_of(request).check_management(request.headers)
    body = await read_body(request, 64 * 1024)
    return _version(read_json(body, (), ("version",)).get("version")) if body.strip() else None


def _version(value: Any) -> str | None:
    if not isinstance(value, str | None):
        raise Malformed(f"version must be a string, got {value!r:.60}")
    return value


def answer_response(answer: Answer) -> Response:
    """An answer in the form that its options ask for."""
    if answer.options.answers == "binary":
        return Ready(answer.to_binary(), b"application/octet-stream")
    return Ready(answer.to_json())


def _json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(encode(value), status, headers, "application/json")
