"""Models over gRPC, with Triton's own client as it is: health, metadata, configuration, statistics, loading and unloading."""

from __future__ import annotations

import json
import time
from typing import Any

import httpx
import numpy as np
import pytest

from tests.server_process import Server
from tests.triton_clients import CLIP, MANAGER, refused
from tests.triton_over_grpc import FIXTURES, tensor

json_format = pytest.importorskip("google.protobuf.json_format")

models, served, server, triton, raw = FIXTURES


def plain(message: Any) -> Any:
    """A message as JSON would have it."""
    return json_format.MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)


def alike(value: Any, other: Any) -> None:
    """Everything that HTTP says is said; int64 is text in a message's JSON."""
    if isinstance(value, dict):
        for name, one in value.items():
            alike(one, other[name])
    elif isinstance(value, list):
        assert len(value) == len(other)
        for one, its in zip(value, other, strict=True):
            alike(one, its)
    else:
        assert value == (int(other) if isinstance(value, int) and isinstance(other, str) else other)


def test_health(triton: Any) -> None:
    assert triton.is_server_live() is True
    assert triton.is_server_ready() is True
    assert triton.is_model_ready("channels") is True
    assert triton.is_model_ready("channels", "2") is True
    for name, version in (("nothing", ""), ("channels", "3"), ("bare", "")):
        assert triton.is_model_ready(name, version) is False


def test_metadata_and_configuration_are_those_of_http(server: Server, triton: Any) -> None:
    with httpx.Client(base_url=f"{server.url}/v2") as rest:
        alike(rest.get("").json(), plain(triton.get_server_metadata()))
        for path, where in (("skeleton", ("skeleton",)), ("channels", ("channels",)), ("channels/versions/1", ("channels", "1"))):
            alike(rest.get(f"/models/{path}").json(), plain(triton.get_model_metadata(*where)))
            alike(rest.get(f"/models/{path}/config").json(), plain(triton.get_model_config(*where))["config"])
        alike(rest.post("/repository/index").json(), plain(triton.get_model_repository_index())["models"])
    model = triton.get_model_metadata("channels")
    assert (list(model.versions), model.platform, list(model.inputs[0].shape)) == (["1", "2"], "onnxruntime_onnx", [-1, -1, 3])
    config = triton.get_model_config("channels", as_json=True)["config"]
    assert config["input"] == [{"name": "frames", "data_type": "TYPE_FP32", "dims": ["-1", "3"]}]
    assert "oldest" in config["sequence_batching"]


def test_statistics_are_those_of_http(server: Server, triton: Any) -> None:
    triton.infer("channels", [tensor(np.stack([CLIP] * 5))], model_version="1")
    ours = triton.get_inference_statistics("channels", "1")
    alike(httpx.get(f"{server.url}/v2/models/channels/versions/1/stats").json(), plain(ours))
    assert ours.model_stats[0].inference_stats.success.count >= 5
    assert abs(ours.model_stats[0].last_inference / 1000 - time.time()) < 60
    assert [one.version for one in triton.get_inference_statistics("channels").model_stats] == ["1", "2"]
    assert {"channels", "skeleton", "spoken", "moving"} <= {one.name for one in triton.get_inference_statistics().model_stats}


def test_models_are_loaded_and_unloaded(triton: Any) -> None:
    manager = {"authorization": f"Bearer {MANAGER}"}
    for call in (triton.load_model, triton.unload_model):
        refused("PERMISSION_DENIED", "management token", call, "channels")
        refused("NOT_FOUND", "no", call, "nobody", headers=manager)
    refused("INVALID_ARGUMENT", "configuration", triton.load_model, "channels", headers=manager, config=json.dumps({}))
    refused("FAILED_PRECONDITION", "manifest", triton.load_model, "bare", headers=manager)
    triton.infer("moving", [tensor(CLIP[None, :2])], sequence_id=5, sequence_start=True)
    triton.unload_model("moving", headers=manager)
    assert triton.is_model_ready("moving") is False
    refused("UNAVAILABLE", "being unloaded", triton.infer, "moving", [tensor(CLIP[None, :2])], sequence_id=6, sequence_start=True)
    triton.infer("moving", [tensor(CLIP[None, 2:])], sequence_id=5, sequence_end=True)  # what was under way goes on to its end
    triton.load_model("moving", headers=manager)
    assert triton.is_model_ready("moving") is True
    files = {"file:1/model.onnx": b"onnx"}
    refused("PERMISSION_DENIED", "not taken over the network", triton.load_model, "channels", headers=manager, config=json.dumps({}), files=files)
