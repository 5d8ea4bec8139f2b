"""The table of gRPC's messages against the ones that Triton's client carries, which were made from the protocol's own files."""

from __future__ import annotations

import math

import pytest

pytest.importorskip("google.protobuf", reason="protobuf is not installed (extra `grpc`): gRPC's messages are not tested")
service_pb2 = pytest.importorskip("tritonclient.grpc.service_pb2", reason="tritonclient[grpc] is not installed (extra `test`): the messages are not compared")

from service import grpc_messages  # noqa: E402
from service.grpc_messages import TABLE, ModelInferRequest, ModelInferResponse, message_class  # noqa: E402

NAMES = [line for line in TABLE.splitlines() if line and not line.startswith(" ")]
THEIRS = service_pb2.DESCRIPTOR.pool


def test_the_table_has_every_call_that_is_served() -> None:
    calls = ("ServerLive", "ServerReady", "ModelReady", "ServerMetadata", "ModelMetadata", "ModelInfer", "ModelConfig", "ModelStatistics")
    calls += ("RepositoryIndex", "RepositoryModelLoad", "RepositoryModelUnload")
    assert {f"{call}{end}" for call in calls for end in ("Request", "Response")} | {"ModelStreamInferResponse"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_message_is_that_of_the_protocol(name: str) -> None:
    """Fields that are not served may be missing; those that are there are the protocol's to the letter."""
    ours, theirs = message_class(name).DESCRIPTOR, THEIRS.FindMessageTypeByName(f"inference.{name}")
    assert ours.full_name == theirs.full_name
    for field in ours.fields:
        other = theirs.fields_by_number[field.number]
        assert (field.name, field.type, field.is_repeated, field.has_presence) == (other.name, other.type, other.is_repeated, other.has_presence)
        for kind in ("message_type", "enum_type", "containing_oneof"):
            assert getattr(getattr(field, kind), "full_name", None) == getattr(getattr(other, kind), "full_name", None)
        if field.message_type is not None:
            assert field.message_type.GetOptions().map_entry == other.message_type.GetOptions().map_entry


@pytest.mark.parametrize("name", ["ModelInferRequest", "ModelInferResponse", "ModelStreamInferResponse"])
def test_what_clips_and_sequences_need_is_complete(name: str) -> None:
    theirs = THEIRS.FindMessageTypeByName(f"inference.{name}")
    assert len(message_class(name).DESCRIPTOR.fields) == len(theirs.fields)


def test_datatypes_have_the_protocols_numbers() -> None:
    theirs = THEIRS.FindEnumTypeByName("inference.DataType").values_by_name
    assert {name: theirs[name].number for name in grpc_messages.DATA_TYPES} == grpc_messages.DATA_TYPES


def test_a_request_of_the_client_is_read_and_an_answer_is_read_by_it() -> None:
    """Both live in one process: the pools do not clash."""
    request = service_pb2.ModelInferRequest(model_name="größer", id="7", raw_input_contents=[b"\x00\xff"])
    request.inputs.add(name="frames", datatype="FP32", shape=[1, 2**40])
    request.parameters["sequence_id"].uint64_param = 2**64 - 1
    request.parameters["scale"].double_param = math.pi
    ours = ModelInferRequest.FromString(request.SerializeToString())
    assert (ours.model_name, ours.id, list(ours.inputs[0].shape), list(ours.raw_input_contents)) == ("größer", "7", [1, 2**40], [b"\x00\xff"])
    assert (ours.parameters["sequence_id"].uint64_param, ours.parameters["scale"].double_param) == (2**64 - 1, math.pi)
    response = ModelInferResponse(model_name="m", raw_output_contents=[b"xyz"])
    response.outputs.add(name="scores", datatype="FP32", shape=[1, 3])
    response.parameters["sequence_id"].string_param = "a"
    theirs = service_pb2.ModelInferResponse.FromString(response.SerializeToString())
    assert (theirs.outputs[0].name, theirs.raw_output_contents[0], theirs.parameters["sequence_id"].string_param) == ("scores", b"xyz", "a")
