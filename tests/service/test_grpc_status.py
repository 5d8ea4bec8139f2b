"""Every error has a status in gRPC."""

from __future__ import annotations

import pytest

pytest.importorskip("grpc", reason="grpcio is not installed (extra `grpc`): gRPC's statuses are not tested")

from grpc import StatusCode

from service import errors
from service.grpc_status import facts_of, status_of


def all_errors(kind: type[errors.ServiceError] = errors.ServiceError) -> list[type[errors.ServiceError]]:
    return [kind, *(one for child in kind.__subclasses__() for one in all_errors(child))]


@pytest.mark.parametrize("kind", all_errors(), ids=lambda kind: kind.__name__)
def test_every_error_has_a_status_and_none_is_success(kind: type[errors.ServiceError]) -> None:
    assert status_of(kind("what went wrong")) not in (StatusCode.OK, StatusCode.UNKNOWN)


def test_the_statuses_that_clients_branch_on() -> None:
    expected = {
        errors.Malformed: "INVALID_ARGUMENT",
        errors.WrongShape: "INVALID_ARGUMENT",
        errors.SequenceNotFound: "INVALID_ARGUMENT",
        errors.SequenceExpired: "INVALID_ARGUMENT",
        errors.ModelRefused: "FAILED_PRECONDITION",
        errors.Unauthenticated: "UNAUTHENTICATED",
        errors.Forbidden: "PERMISSION_DENIED",
        errors.ModelNotFound: "NOT_FOUND",
        errors.Deadline: "DEADLINE_EXCEEDED",
        errors.Gap: "FAILED_PRECONDITION",
        errors.TakenOver: "ABORTED",
        errors.SequenceLive: "ALREADY_EXISTS",
        errors.SlowReader: "RESOURCE_EXHAUSTED",
        errors.TooLarge: "RESOURCE_EXHAUSTED",
        errors.TooMany: "RESOURCE_EXHAUSTED",
        errors.NotSupported: "UNIMPLEMENTED",
        errors.Overloaded: "UNAVAILABLE",
        errors.Draining: "UNAVAILABLE",
        errors.ModelNotReady: "UNAVAILABLE",
        errors.ServiceError: "INTERNAL",
    }
    assert {kind: status_of(kind("...")).name for kind in expected} == expected


def test_facts_are_the_code_and_what_is_a_number() -> None:
    assert facts_of(errors.Gap("...", next_frame=40)) == {"error-code": "gap", "next_frame": 40}
    assert facts_of(errors.Draining("...", retry_after=5)) == {"error-code": "draining", "retry_after": 5}
    assert facts_of(errors.ModelNotFound("...", models=["größer"])) == {"error-code": "model_not_found"}
