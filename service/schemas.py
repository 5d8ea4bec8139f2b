"""Shapes of queries and answers for the API page; queries are also checked against them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from service.protocol import MOST_FRAMES


class AnswerQuery(BaseModel):
    """How answers look; on a session's frames these change one answer only."""

    model_config = ConfigDict(extra="forbid")

    scores: Literal["last", "all", "none"] | None = Field(None, description="scores of the last frame (default), of all frames, or none")
    answers: Literal["json", "binary"] | None = Field(None, description="`binary` answers with a binary message of kind 2 instead of JSON")
    top_k: int | None = Field(None, ge=0, le=10_000, description="how many labels, best first (default 5, at most all)")
    events: bool | None = Field(None, description="whether JSON answers tell what starts and ends (default: where the model has rules for it)")


class StreamQuery(AnswerQuery):
    """Options of a stream or a clip."""

    version: str | None = Field(None, description="of the model, or latest, stable or candidate; default: the stable one, else the highest")
    layout: str | None = Field(None, description="joint layout of the frames, if not the model's own; `layouts` of the model says which are understood")
    fps: float | None = Field(None, description="frame rate of the frames, if not the model's own; from 0.001 to 1000")


class StepQuery(AnswerQuery):
    """Options of one step; binary bodies name their first frame here."""

    first: int | None = Field(None, ge=0, le=MOST_FRAMES, description="number of the first frame, for binary bodies")
    ack: int | None = Field(None, ge=0, le=MOST_FRAMES, description="every frame below was answered and received, for binary bodies")


class Label(BaseModel):
    label: str
    score: float


class EventBody(BaseModel):
    """Something started or ended."""

    event: Literal["start", "end"]
    label: str
    score: float = Field(description="mean score: of a start over the frames that decided it, of an end over the whole event")
    frame: int = Field(description="where it happened, as the client counts frames; of an end the first frame after it")
    decided: int = Field(description="the frame at which it was known")
    time: float = Field(description="of `frame`, seconds since frame 0")
    cause: Literal["reset"] | None = Field(None, description="of an end that a reset brought about")


class AnswerBody(BaseModel):
    """Labels are there for classification only; `scores` as asked for."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "first": 0,
                "count": 2,
                "frame": 1,
                "time": 0.0333,
                "label": "wave",
                "score": 0.91,
                "top": [{"label": "wave", "score": 0.91}],
                "scores": [0.91, 0.09],
                "events": [{"event": "start", "label": "wave", "score": 0.88, "frame": 0, "decided": 1, "time": 0.0}],
            }
        }
    )

    first: int = Field(description="first frame of the message")
    count: int = Field(description="frames of the message")
    frame: int = Field(description="the last frame, which label, score and top are about")
    time: float = Field(description="of that frame, seconds since frame 0")
    label: str | None = None
    score: float | None = None
    top: list[Label] | None = None
    scores: list[Any] | None = Field(None, description="one value per class, or with scores=all a list of them per frame")
    events: list[EventBody] | None = Field(None, description="what these frames decided, where the model has events and they are not switched off")


class ErrorBody(BaseModel):
    """Every error has this shape; some add facts, such as `next_frame` or `retry_after`."""

    model_config = ConfigDict(
        extra="allow", json_schema_extra={"example": {"error": "frames 4 to 6 are missing; the session's next frame is 4", "code": "gap", "next_frame": 4}}
    )

    error: str = Field(description="one line for a person")
    code: str = Field(description="for a program")


class OpenedBody(BaseModel):
    """A new session. Whoever has its id has the session: keep it to yourself."""

    model_config = ConfigDict(extra="allow")

    session: str
    next_frame: int
    model: str
    version: str
    fingerprint: str = Field(description="digest of the model's graph")
    task: str
    classes: list[str]
    frame_shape: list[int] = Field(description="of the frames the client sends, in its layout")
    window: int = Field(description="frames whose answers are kept until they are acknowledged")
    limits: dict[str, Any]
    options: dict[str, Any]
    origin: float | None = Field(None, description="of a session that is resumed and whose frames carry their times: the `t` of frame 0")
    warning: str | None = None


class SessionBody(BaseModel):
    model_config = ConfigDict(extra="allow")

    digest: str = Field(description="names the session in lists and logs without giving it away")
    model: str
    version: str
    next_frame: int
    kept_from: int = Field(description="oldest frame whose answer is kept")
    reset_at: int
    options: dict[str, Any]
    created: float = Field(description="seconds since 1970")
    epoch: int = Field(description="how often the stream was taken up from a record")
    idle_s: float
    expires_in_s: float | None = Field(description="until it expires if nobody uses it; null while a websocket keeps it alive and no age is set")
    streaming: bool = Field(description="whether a websocket is attached")
    open_event: dict[str, Any] | None = Field(None, description="what has started and not ended, where the model has events")


class PlaceBody(BaseModel):
    """Where a session stands after a call."""

    model_config = ConfigDict(extra="allow")

    next_frame: int


class TouchBody(PlaceBody):
    """How long a session lives on."""

    expires_in_s: float | None


class ResetBody(PlaceBody):
    """Where a session began anew."""

    reset_at: int
    events: list[EventBody] | None = Field(None, description="the end of the event that was open")


class ModelBody(BaseModel):
    model_config = ConfigDict(extra="allow")

    name: str
    version: str
    versions: list[str]
    device: dict[str, Any]


_NUMBERS = {
    "type": "array",
    "items": {},
    "description": "(count, *frame shape) nested lists of numbers; null is a missing joint, body or channel where the model admits it",
}
_BINARY = {"schema": {"type": "string", "format": "binary"}}


_TIMES = {
    "type": "array",
    "items": {"type": "number"},
    "description": "the time of each frame in seconds, which must increase; for cameras that do not keep a rate. With every message of a session or with none",
}


def frames_body(extra: dict[str, Any] | None = None, required: tuple[str, ...] = ("frames",), example: Any = None) -> dict[str, Any]:
    """OpenAPI's description of a body that carries frames."""
    schema = {"type": "object", "required": list(required), "properties": {"frames": _NUMBERS, "t": _TIMES, **(extra or {})}, "additionalProperties": False}
    return {
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {"schema": schema, "example": example or {"frames": [[0.1, 0.2], [0.3, 0.4]]}},
                "application/octet-stream": {**_BINARY, "example": "float32, little-endian, frame after frame"},
                "application/x-npy": {**_BINARY, "example": "a NumPy file, (count, *frame shape)"},
            },
        }
    }


def opening_body() -> dict[str, Any]:
    """OpenAPI's description of what a session is opened with: options, or the record of another session."""
    described = "`version` and options, as in the query"
    schema = {"type": "object", "description": described, "additionalProperties": True}
    record = {**_BINARY["schema"], "description": "a session record, as GET /v1/sessions/{session_id}/state answers with it (management)"}
    content = {"application/json": {"schema": schema, "example": {"scores": "all"}}, "application/octet-stream": {"schema": record}}
    return {"requestBody": {"required": False, "content": content}}


def json_body(properties: dict[str, Any], example: Any) -> dict[str, Any]:
    """OpenAPI's description of a small JSON body."""
    schema = {"type": "object", "required": list(properties), "properties": properties, "additionalProperties": False}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema, "example": example}}}}


def refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """OpenAPI's description of the errors a route answers with."""
    titles = {
        400: "malformed, model_refused, sequence_not_found, sequence_expired",
        401: "unauthenticated",
        403: "forbidden",
        404: "model_not_found, session_not_found, session_expired",
        408: "deadline: waited too long, nothing changed",
        409: "gap, answers_forgotten, taken_over, sequence_live",
        413: "too_large",
        415: "unknown_encoding",
        422: "wrong_shape, not_finite, empty, diverged, layout_unknown, wrong_time, no_events",
        429: "too_many",
        501: "not_supported",
        503: "overloaded, draining, model_loading, model_not_ready; with Retry-After",
    }
    schema = {"content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{ErrorBody.__name__}"}}}}  # a model for each makes the start longer
    return {status: {"description": titles[status], **({"model": ErrorBody} if status == 401 else schema)} for status in (*statuses, 401)}
