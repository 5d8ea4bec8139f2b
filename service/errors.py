"""Everything that can go wrong, as one tree. Inner code raises; the edge translates once, for HTTP and websocket alike.

StartupError                                  ends the program before it serves, with one line for a person
ServiceError           500 / 1011  internal
├── Malformed          400 / 4400  malformed
├── ModelRefused       400 / 4400  model_refused
├── SequenceNotFound   400 / 4400  sequence_not_found   (a sequence of the Open Inference Protocol)
│   └── SequenceExpired            sequence_expired
├── Unauthenticated    401 / 4401  unauthenticated
├── Forbidden          403 / 4403  forbidden
├── NotFound           404 / 4404  not_found            (a path that does not exist)
│   ├── ModelNotFound              model_not_found
│   └── SessionNotFound            session_not_found
│       └── SessionExpired         session_expired
├── MethodNotAllowed   405 / 4400  method_not_allowed
├── Deadline           408 / 1013  deadline
├── Conflict           409 / 4409  conflict
│   ├── Gap                        gap
│   ├── AnswersForgotten           answers_forgotten
│   ├── TakenOver                  taken_over
│   ├── TrackNotOpen               track_not_open
│   ├── FingerprintMismatch        fingerprint_mismatch
│   └── SequenceLive               sequence_live
├── TooLarge           413 / 1009  too_large
├── UnknownEncoding    415 / 4400  unknown_encoding
├── Unprocessable      422 / 4422  unprocessable
│   ├── WrongShape                 wrong_shape
│   ├── NotFinite                  not_finite
│   ├── Empty                      empty
│   ├── Diverged                   diverged
│   ├── LayoutUnknown              layout_unknown
│   ├── WrongTime                  wrong_time
│   └── NoEvents                   no_events
├── TooMany            429 / 4429  too_many
├── NotSupported       501 / 4400  not_supported
└── Unavailable        503 / 1013  unavailable          (with Retry-After)
    ├── Overloaded                 overloaded
    ├── Draining                   draining
    ├── ModelLoading               model_loading
    ├── ModelNotReady              model_not_ready
    └── StoreUnavailable           store_unavailable
"""

from __future__ import annotations

from typing import Any, ClassVar


class StartupError(Exception):
    """The service cannot start; the message says what is wrong and what to do about it."""


class ServiceError(Exception):
    """An answer other than the one asked for: `message` is one line for a person, `facts` are for a program."""

    status: ClassVar[int] = 500
    close_code: ClassVar[int] = 1011
    code: ClassVar[str] = "internal"

    def __init__(self, message: str = "the service failed; the failure was logged", **facts: Any) -> None:
        super().__init__(message)
        self.message = message
        self.facts = facts

    def to_dict(self) -> dict[str, Any]:
        """What goes over the wire: `{"error": ..., "code": ..., ...facts}`."""
        return {"error": self.message, "code": self.code, **self.facts}


class Malformed(ServiceError):
    """The message cannot be read at all: syntax, header, type or unknown field."""

    status, close_code, code = 400, 4400, "malformed"


class ModelRefused(ServiceError):
    """A model's file was to be loaded and cannot be served; what was served before still is."""

    status, close_code, code = 400, 4400, "model_refused"


class SequenceNotFound(ServiceError):
    """A step of a sequence that was not started, or ended. Its status is the one that clients of that protocol know."""

    status, close_code, code = 400, 4400, "sequence_not_found"


class SequenceExpired(SequenceNotFound):
    code = "sequence_expired"


class Unauthenticated(ServiceError):
    status, close_code, code = 401, 4401, "unauthenticated"


class Forbidden(ServiceError):
    status, close_code, code = 403, 4403, "forbidden"


class NotFound(ServiceError):
    status, close_code, code = 404, 4404, "not_found"


class ModelNotFound(NotFound):
    code = "model_not_found"


class SessionNotFound(NotFound):
    code = "session_not_found"


class SessionExpired(SessionNotFound):
    code = "session_expired"


class MethodNotAllowed(ServiceError):
    status, close_code, code = 405, 4400, "method_not_allowed"


class Deadline(ServiceError):
    """The message waited longer than allowed; it changed nothing and may be sent again."""

    status, close_code, code = 408, 1013, "deadline"


class SlowReader(ServiceError):
    """The client does not read its answers; its session stays, to be resumed."""

    status, close_code, code = 408, 4408, "slow_reader"


class Conflict(ServiceError):
    status, close_code, code = 409, 4409, "conflict"


class Gap(Conflict):
    """Frames are missing between what the session has and what was sent; `next_frame` says where to go on."""

    code = "gap"


class AnswersForgotten(Conflict):
    code = "answers_forgotten"


class TakenOver(Conflict):
    code = "taken_over"


class TrackNotOpen(Conflict):
    """The message is for a track that was never opened on its connection, or was closed."""

    code = "track_not_open"


class FingerprintMismatch(Conflict):
    code = "fingerprint_mismatch"


class SequenceLive(Conflict):
    """A sequence was started that is under way, where the settings forbid to begin it anew."""

    code = "sequence_live"


class TooLarge(ServiceError):
    status, close_code, code = 413, 1009, "too_large"


class UnknownEncoding(ServiceError):
    """The body is compressed in a way that is not understood; `accept_encoding` lists those that are."""

    status, close_code, code = 415, 4400, "unknown_encoding"


class Unprocessable(ServiceError):
    """The message reads well, but its frames are not what the model takes."""

    status, close_code, code = 422, 4422, "unprocessable"


class WrongShape(Unprocessable):
    code = "wrong_shape"


class NotFinite(Unprocessable):
    code = "not_finite"


class Empty(Unprocessable):
    code = "empty"


class Diverged(Unprocessable):
    """A legal but extreme input made the scores or the state non-finite; the state was left as it was."""

    code = "diverged"


class LayoutUnknown(Unprocessable):
    code = "layout_unknown"


class WrongTime(Unprocessable):
    """The times of frames do not go on, or are not there for all of them; `frame` says where."""

    code = "wrong_time"


class NoEvents(Unprocessable):
    """Events were asked for, and the model has no rules for them."""

    code = "no_events"


class TooMany(ServiceError):
    status, close_code, code = 429, 4429, "too_many"


class NotSupported(ServiceError):
    """A call of a known protocol that this service does not offer."""

    status, close_code, code = 501, 4400, "not_supported"


class Unavailable(ServiceError):
    """Not now; `retry_after` (seconds) says when to try again."""

    status, close_code, code = 503, 1013, "unavailable"

    def __init__(self, message: str, *, retry_after: int = 1, **facts: Any) -> None:
        super().__init__(message, retry_after=retry_after, **facts)


class Overloaded(Unavailable):
    code = "overloaded"


class Draining(Unavailable):
    code = "draining"


class ModelLoading(Unavailable):
    code = "model_loading"


class ModelNotReady(Unavailable):
    """The model is there but cannot be served; the message says why."""

    code = "model_not_ready"


class StoreUnavailable(Unavailable):
    """The store of session records cannot be reached or cannot take what it was asked to; what was asked may or may not have happened."""

    code = "store_unavailable"
