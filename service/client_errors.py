"""What goes wrong between a client and its service: the service's own errors as they were raised there, and the client's."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from service.errors import ServiceError, TooMany, Unavailable

_COME_BACK_CODES = (1000, 1001, 1005, 1006, 1011, 1012, 1013, 1014)  # connections closed with these are tried again, others were refused
_COME_BACK_STATUSES = (502, 503, 504)  # the same for handshakes: a proxy without its server


class ClientError(Exception):
    """The service could not be reached or does not speak the protocol; what the service itself refuses is a `ServiceError`."""


class Unreachable(ClientError):
    """No connection: nothing listens there, or the connection was lost and did not come back within the retries."""


class NobodyThere(Unreachable):
    """No connection came about, so that nothing was heard of what was asked."""


class StreamClosed(ClientError):
    """The stream was closed; it takes and gives nothing any more."""


ELSEWHERE = (Unreachable, Unavailable, TooMany)  # reasons of one server, for which another need not refuse


def error_from(value: Mapping[str, Any]) -> ServiceError:
    """The service's error as it was raised there: the class by its `code`, with message and facts; a newer code than ours keeps its name."""
    facts = {key: fact for key, fact in value.items() if key not in ("type", "track", "code", "error")}
    code, message = value.get("code", "internal"), str(value.get("error", "no reason given"))
    kind = _CLASSES.get(code)
    if kind is None:
        error = ServiceError(message, **facts)
        error.code = code  # type: ignore[misc]
        return error
    return kind(message, **facts)


def _tree(kind: type[ServiceError]) -> Iterator[type[ServiceError]]:
    yield kind
    for below in kind.__subclasses__():
        yield from _tree(below)


_CLASSES = {kind.code: kind for kind in _tree(ServiceError)}


def http_refusal(status: int, body: bytes) -> ServiceError | ClientError:
    """What a response stands for that is no success."""
    try:
        value = json.loads(body)
        return error_from({"code": value["code"], **value})
    except (ValueError, KeyError, TypeError):
        kind = Unreachable if status in _COME_BACK_STATUSES else ClientError
        return kind(f"answered with status {status}, not by this service: {body[:200].decode(errors='replace')!r}")


def close_refusal(code: int, reason: str) -> ServiceError | Unreachable:
    """What a closed connection means: a refusal by its close code, or a loss after which one may come back."""
    if code in _COME_BACK_CODES:
        return Unreachable(f"the connection was closed with {code} {reason}".rstrip())
    kind = next((kind for kind in _CLASSES.values() if kind.code == reason or kind.close_code == code), ServiceError)
    return kind(reason or f"the connection was closed with {code}")


def nobody_at(url: str, error: Exception) -> NobodyThere:
    return NobodyThere(f"no service at {url} ({str(error) or type(error).__name__}); start it with `python -m service`, or name another address")
