"""What errors are called in gRPC, and what goes with them.

The status follows from the one that HTTP has, but for a few errors that gRPC knows more exactly:

400 malformed, sequence_not_found, sequence_expired  INVALID_ARGUMENT    413 too_large             RESOURCE_EXHAUSTED
400 model_refused                                    FAILED_PRECONDITION 415 unknown_encoding      UNIMPLEMENTED
401 unauthenticated                                  UNAUTHENTICATED     422 wrong_shape, ...      INVALID_ARGUMENT
403 forbidden                                        PERMISSION_DENIED   429 too_many              RESOURCE_EXHAUSTED
404 model_not_found, ...                             NOT_FOUND           500 internal              INTERNAL
408 deadline                                         DEADLINE_EXCEEDED   501 not_supported         UNIMPLEMENTED
409 gap, answers_forgotten, fingerprint_mismatch     FAILED_PRECONDITION 503 overloaded, draining, UNAVAILABLE
409 sequence_live                                    ALREADY_EXISTS          model_loading, ...
409 taken_over                                       ABORTED             408 slow_reader           RESOURCE_EXHAUSTED

Of an error the trailing metadata tell more: `error-code`, which is the same as in JSON, and numbers such as `next_frame` and `retry_after` (seconds).
In a stream, where an error belongs to one request, they are parameters of its answer.
"""

from __future__ import annotations

from grpc import StatusCode

from service.errors import ModelRefused, SequenceLive, ServiceError, SlowReader, TakenOver

_BY_STATUS = {
    400: StatusCode.INVALID_ARGUMENT,
    401: StatusCode.UNAUTHENTICATED,
    403: StatusCode.PERMISSION_DENIED,
    404: StatusCode.NOT_FOUND,
    405: StatusCode.UNIMPLEMENTED,
    408: StatusCode.DEADLINE_EXCEEDED,
    409: StatusCode.FAILED_PRECONDITION,
    413: StatusCode.RESOURCE_EXHAUSTED,
    415: StatusCode.UNIMPLEMENTED,
    422: StatusCode.INVALID_ARGUMENT,
    429: StatusCode.RESOURCE_EXHAUSTED,
    500: StatusCode.INTERNAL,
    501: StatusCode.UNIMPLEMENTED,
    503: StatusCode.UNAVAILABLE,
}
_BY_KIND: dict[type[ServiceError], StatusCode] = {
    ModelRefused: StatusCode.FAILED_PRECONDITION,
    SequenceLive: StatusCode.ALREADY_EXISTS,
    TakenOver: StatusCode.ABORTED,
    SlowReader: StatusCode.RESOURCE_EXHAUSTED,
}


def status_of(error: ServiceError) -> StatusCode:
    """The error's status in gRPC."""
    return _BY_KIND.get(type(error)) or _BY_STATUS[error.status]


def facts_of(error: ServiceError) -> dict[str, int | float | str]:
    """What a program may want to know of the error beside its status: its code, and numbers such as `next_frame` or `retry_after` (seconds)."""
    return {"error-code": error.code, **{name: value for name, value in error.facts.items() if isinstance(value, int | float)}}
