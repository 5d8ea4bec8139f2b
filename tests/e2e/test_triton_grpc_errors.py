"""Errors over gRPC, as Triton's own client has them and as programs do: statuses, messages, codes."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from tests.server_process import Server
from tests.triton_clients import CLIP, refused
from tests.triton_over_grpc import FIXTURES, PREFIX, grpc, request_of, service_pb2, service_pb2_grpc, tensor, triton_grpc

models, served, server, triton, raw = FIXTURES


def test_errors_are_told_and_the_service_goes_on(triton: Any) -> None:
    infer = triton.infer
    refused("NOT_FOUND", "Request for unknown model: 'nothing' is not found", infer, "nothing", [tensor()])
    refused("NOT_FOUND", "Request for unknown model: '' is not found", infer, "", [tensor()])
    refused("NOT_FOUND", "'channels' version '3' is not found", infer, "channels", [tensor()], model_version="3")
    refused("UNAVAILABLE", "manifest", infer, "bare", [tensor()])
    for call in (triton.get_model_metadata, triton.get_model_config, triton.get_inference_statistics):
        refused("NOT_FOUND", "unknown model", call, "nothing")
    refused("INVALID_ARGUMENT", "inputs must have tensors", infer, "channels", [])
    refused("INVALID_ARGUMENT", "unknown input 'state'", infer, "channels", [tensor(name="state")])
    refused("INVALID_ARGUMENT", "frames comes twice", infer, "channels", [tensor(), tensor()])
    refused("INVALID_ARGUMENT", "unknown output 'next_state'", infer, "channels", [tensor()], outputs=[triton_grpc.InferRequestedOutput("next_state")])
    refused("INVALID_ARGUMENT", "input frames is missing", infer, "channels", [tensor(np.array([1]), name="lengths")])
    refused("INVALID_ARGUMENT", "frames is FP64 but the model takes FP32", infer, "channels", [tensor(np.zeros((1, 2, 3)))])
    refused("INVALID_ARGUMENT", "frames is BYTES but the model takes FP32", infer, "channels", [tensor(np.full((1, 1, 3), b"x", object))])
    refused("INVALID_ARGUMENT", "expected (frames, 3)", infer, "channels", [tensor(np.zeros((1, 2, 4), np.float32))])
    refused("INVALID_ARGUMENT", "(batch, time", infer, "channels", [tensor(np.zeros((2, 3), np.float32))])
    refused("INVALID_ARGUMENT", "no frames", infer, "channels", [tensor(np.zeros((1, 0, 3), np.float32))])
    refused("INVALID_ARGUMENT", "shape [1], got [2]", infer, "channels", [tensor(), tensor(np.array([1, 2]), name="lengths")])
    refused("INVALID_ARGUMENT", "from 0 to 40", infer, "channels", [tensor(), tensor(np.array([41]), name="lengths")])
    refused("DEADLINE_EXCEEDED", "waited", infer, "channels", [tensor()], timeout=1)
    refused("RESOURCE_EXHAUSTED", "larger than max", infer, "channels", [tensor(np.zeros((1, 50_000, 3), np.float32))])
    refused("RESOURCE_EXHAUSTED", "larger than max", infer, "channels", [tensor(np.zeros((1, 50_000, 3), np.float32))], compression_algorithm="gzip")
    spoilt = np.stack([CLIP, CLIP])
    spoilt[1, 5, 2] = np.inf
    refused("INVALID_ARGUMENT", "clip 1: frame 5", infer, "channels", [tensor(spoilt)])
    shared = triton_grpc.InferInput("frames", [1, 1, 3], "FP32")
    shared.set_shared_memory("region", 12)
    refused("INVALID_ARGUMENT", "shared memory", infer, "channels", [shared])
    assert infer("channels", [tensor()]).as_numpy("scores").shape == (1, 40, 4)


def test_what_is_not_offered(triton: Any) -> None:
    for call in (triton.get_system_shared_memory_status, triton.get_cuda_shared_memory_status, triton.get_trace_settings, triton.get_log_settings):
        refused("UNIMPLEMENTED", "is not supported", call)


def test_an_error_says_more_to_programs(raw: Any) -> None:
    raw.ModelInfer(request_of(CLIP[None, :3], sequence="gappy", start=True))
    message = request_of(CLIP[None, 5:], sequence="gappy")
    message.parameters["sequence_step"].int64_param = 5
    with pytest.raises(grpc.RpcError) as caught:
        raw.ModelInfer(message)
    trailing = dict(caught.value.trailing_metadata())
    assert (caught.value.code(), trailing["error-code"], trailing["next_frame"]) == (grpc.StatusCode.FAILED_PRECONDITION, "gap", "3")
    assert re.fullmatch("[0-9a-f]{16}", trailing["x-request-id"])
    with pytest.raises(grpc.RpcError) as caught:
        raw.ModelInfer(request_of(sequence="nobody's"))
    assert dict(caught.value.trailing_metadata())["error-code"] == "sequence_not_found"


def test_bytes_that_are_no_message(served: tuple[Server, str]) -> None:
    with grpc.insecure_channel(served[1]) as channel:
        for method in ("ModelInfer", "ModelReady"):
            with pytest.raises(grpc.RpcError) as caught:
                channel.unary_unary(PREFIX + method)(b"\xff\xff\xff")
            assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.INVALID_ARGUMENT, "the message cannot be read")
        with pytest.raises(grpc.RpcError) as caught:
            list(channel.stream_stream(f"{PREFIX}ModelStreamInfer")(iter([b"\xff\xff\xff"])))
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        for path in (f"{PREFIX}Nothing", "/other.Service/ModelInfer"):
            with pytest.raises(grpc.RpcError) as caught:
                channel.unary_unary(path)(b"")
            assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED
        assert service_pb2_grpc.GRPCInferenceServiceStub(channel).ServerLive(service_pb2.ServerLiveRequest()).live
