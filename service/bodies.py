"""Request bodies: read against a limit while they arrive, and told apart by their content type."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request

from service.errors import Malformed, TooLarge
from service.frames import NPY_MAGIC, Payload
from service.protocol import check_fields, read_object

_JSON = ("application/json", "", "application/x-www-form-urlencoded")  # the last is what curl -d says when nobody tells it better
_RAW = ("application/octet-stream",)
_NPY = ("application/x-npy", "application/npy", "application/x-numpy")


def media_type(request: Request) -> str:
    """What the body is said to be, in lower case and without parameters; "" where nothing is said."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def read_body(request: Request, limit: int) -> bytes:
    """The whole body; raises `TooLarge` as soon as it is longer than `limit` bytes, whatever its header announced."""
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > limit:
        raise _too_large(limit)
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise _too_large(limit)
        parts.append(part)
    return b"".join(parts)


async def read_frames_body(request: Request, limit: int, required: tuple[str, ...], optional: tuple[str, ...] = ()) -> tuple[Payload, dict[str, Any]]:
    """Frames, and what else a JSON body says beside them (`required` and `optional` fields); raises `Malformed` or `TooLarge`."""
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise Malformed(f"content-encoding {request.headers['content-encoding']!r:.60} is not supported: send the body as it is")
    kind = media_type(request)
    if kind not in (*_JSON, *_RAW, *_NPY):
        raise Malformed(
            f"content-type {kind!r:.60} is not supported; send application/json, application/octet-stream (float32, little-endian) or application/x-npy"
        )
    body = await read_body(request, limit)
    if kind in _JSON:
        fields = read_json(body, ("frames", *required), optional)
        return Payload("json", fields.pop("frames"), len(body)), fields
    is_npy = kind in _NPY or body.startswith(NPY_MAGIC)
    return Payload("npy" if is_npy else "raw", body, len(body)), {}


def read_json(body: bytes, required: tuple[str, ...], optional: tuple[str, ...] = ()) -> dict[str, Any]:
    """A JSON object with these fields; raises `Malformed`."""
    if not body.strip():
        raise Malformed("the body is empty: expected a JSON object")
    fields = read_object(body)
    check_fields(fields, required, optional)
    return fields


def _too_large(limit: int) -> TooLarge:
    return TooLarge(f"the body is larger than {limit} bytes; send long recordings in parts to a session", limit=limit)
