"""Request bodies: read against a limit while they arrive, and told apart by their content type."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.types import Message, Receive

from service.errors import Malformed, TooLarge
from service.frames import NPY_MAGIC, Payload
from service.protocol import check_fields, read_object

_JSON = ("application/json", "", "application/x-www-form-urlencoded")  # the last is what curl -d says when nobody tells it better
_RAW = ("application/octet-stream",)
_NPY = ("application/x-npy", "application/npy", "application/x-numpy")
_USUAL = {kind.encode(): kind for kind in ("application/json", "application/octet-stream")}  # as nearly all are written
KINDS = (*_JSON, *_RAW, *_NPY)  # of bodies that carry frames


def headers_of(request: Request) -> dict[bytes, bytes]:
    """Names in lower case; of headers that come twice the first. Starlette's own look through all of them for each that is asked for."""
    return dict(reversed(request.scope["headers"]))


def media_type(request: Request) -> str:
    """What the body is said to be, in lower case and without parameters; "" where nothing is said."""
    return media_type_of(headers_of(request))


async def read_body(request: Request, limit: int, headers: Mapping[bytes, bytes] | None = None) -> bytes:
    """The whole body; raises `TooLarge` as soon as it is longer than `limit` bytes, whatever its header announced."""
    announced = (headers_of(request) if headers is None else headers).get(b"content-length", b"")
    if announced.isdigit() and int(announced) > limit:
        raise _too_large(limit)
    receive = request.receive
    message = await _part(receive)
    body: bytes = message.get("body", b"")
    if len(body) > limit:
        raise _too_large(limit)
    if not message.get("more_body", False):
        return body
    parts, size = [body], len(body)
    while message.get("more_body", False):
        message = await _part(receive)
        size += len(message.get("body", b""))
        if size > limit:
            raise _too_large(limit)
        parts.append(message.get("body", b""))
    return b"".join(parts)


async def read_frames_body(request: Request, limit: int, required: tuple[str, ...], optional: tuple[str, ...] = ()) -> tuple[Payload, dict[str, Any]]:
    """Frames, and what else a JSON body says beside them (`required` and `optional` fields); raises `Malformed` or `TooLarge`."""
    headers = headers_of(request)
    encoding = headers.get(b"content-encoding", b"identity")
    if encoding.lower() != b"identity":
        raise Malformed(f"content-encoding {encoding.decode('latin-1')!r:.60} is not supported: send the body as it is")
    kind = media_type_of(headers)
    if kind not in KINDS:
        raise Malformed(
            f"content-type {kind!r:.60} is not supported; send application/json, application/octet-stream (float32, little-endian) or application/x-npy"
        )
    return frames_of(kind, await read_body(request, limit, headers), required, optional)


def frames_of(kind: str, body: bytes, required: tuple[str, ...], optional: tuple[str, ...] = ()) -> tuple[Payload, dict[str, Any]]:
    """As `read_frames_body`, for a whole body whose media type is known to be one that is read."""
    if kind in _JSON:
        fields = read_json(body, ("frames", *required), optional)
        literals = b"u" in body or b"l" in body  # letters of true, false and null that are in none of the names
        return Payload("json", fields.pop("frames"), len(body), literals=literals), fields
    is_npy = kind in _NPY or body.startswith(NPY_MAGIC)
    return Payload("npy" if is_npy else "raw", body, len(body)), {}


def read_json(body: bytes, required: tuple[str, ...], optional: tuple[str, ...] = ()) -> dict[str, Any]:
    """A JSON object with these fields; raises `Malformed`."""
    if not body.strip():
        raise Malformed("the body is empty: expected a JSON object")
    fields = read_object(body)
    check_fields(fields, required, optional)
    return fields


def media_type_of(headers: Mapping[bytes, bytes]) -> str:
    value = headers.get(b"content-type", b"")
    return _USUAL.get(value) or value.partition(b";")[0].strip().lower().decode("latin-1")


async def _part(receive: Receive) -> Message:
    """Raises `ClientDisconnect` where the rest will not come."""
    message = await receive()
    if message["type"] == "http.disconnect":
        raise ClientDisconnect
    return message


def _too_large(limit: int) -> TooLarge:
    return TooLarge(f"the body is larger than {limit} bytes; send long recordings in parts to a session", limit=limit)
