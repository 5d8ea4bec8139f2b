"""The Open Inference Protocol over gRPC with Triton's own client as it is, the one that blocks and the asynchronous one, against a running service.

What a case says holds for both: `triton` is either of them, called in the same way. What that client cannot send goes through gRPC's stubs (`raw`).
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import Queue
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import pytest

from tests import toy_models
from tests.server_process import ROOT, Server, running
from tests.toy_models import CHANNELS, SKELETON, Toy, example_frames

grpc = pytest.importorskip("grpc", reason="grpcio is not installed (extra `grpc`): the Open Inference Protocol is not tested over gRPC")
triton_grpc = pytest.importorskip("tritonclient.grpc", reason="tritonclient[grpc] is not installed (extra `test`): gRPC is not tested with it")
aio = pytest.importorskip("tritonclient.grpc.aio")
utils = pytest.importorskip("tritonclient.utils")
service_pb2 = pytest.importorskip("tritonclient.grpc.service_pb2")
service_pb2_grpc = pytest.importorskip("tritonclient.grpc.service_pb2_grpc")
http = pytest.importorskip("tritonclient.http")
json_format = pytest.importorskip("google.protobuf.json_format")

Floats = npt.NDArray[np.float32]
MANAGER = "one who manages"
LABELS = ("ruhen", "größer werden", "wave: left", "拍手")
CLIP = example_frames(CHANNELS, 40, seed=11)
SPOKEN = Toy(classes=LABELS)
PREFIX = "/inference.GRPCInferenceService/"


class Async:
    """The asynchronous client, called like the other: each call runs on a loop of its own until it is done."""

    def __init__(self, url: str) -> None:
        self._loop = asyncio.new_event_loop()

        async def dial() -> Any:
            return aio.InferenceServerClient(url)

        self.client = self._loop.run_until_complete(dial())

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            return self._loop.run_until_complete(getattr(self.client, name)(*arguments, **options))

        return call

    def together(self, calls: list[dict[str, Any]]) -> list[Any]:
        """Several inferences at a time."""

        async def run() -> list[Any]:
            return await asyncio.gather(*(self.client.infer(**call) for call in calls))

        return self._loop.run_until_complete(run())

    def stream(self, calls: list[dict[str, Any]], **options: Any) -> list[Any]:
        """All sent over one stream without waiting; what came back, results and errors. An error that ends the stream is the last."""

        async def run() -> list[Any]:
            async def requests() -> Any:
                for call in calls:
                    yield call

            found: list[Any] = []
            try:
                async for result, error in self.client.stream_infer(requests(), **options):
                    found.append(result or error)
            except grpc.RpcError as error:  # this client hands it on as it is
                found.append(utils.InferenceServerException(error.details(), str(error.code())))
            return found

        return self._loop.run_until_complete(asyncio.wait_for(run(), 30))

    def close(self) -> None:
        self._loop.run_until_complete(self.client.close())
        self._loop.close()


class Blocking:
    """The client that blocks."""

    def __init__(self, url: str) -> None:
        self.client = triton_grpc.InferenceServerClient(url)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.client, name)

    def together(self, calls: list[dict[str, Any]]) -> list[Any]:
        answers: dict[int, Any] = {}
        done = threading.Semaphore(0)

        def note(at: int) -> Any:
            def callback(result: Any, error: Any) -> None:
                answers[at] = result or error
                done.release()

            return callback

        for at, call in enumerate(calls):
            self.client.async_infer(callback=note(at), **call)
        for _ in calls:
            assert done.acquire(timeout=30)
        return [answers[at] for at in range(len(calls))]

    def stream(self, calls: list[dict[str, Any]], **options: Any) -> list[Any]:
        found: Queue[Any] = Queue()
        self.client.start_stream(lambda result, error: found.put(result or error), **options)
        try:
            for call in calls:
                self.client.async_stream_infer(**call)
        except utils.InferenceServerException:  # it has ended already; why, the callback was told
            pass
        finally:
            self.client.stop_stream()
        return list(found.queue)

    def close(self) -> None:
        self.client.close()


CLIENTS = {"blocking": Blocking, "async": Async}


@contextmanager
def serving(models: Path, log: Path, *options: str, **environment: str) -> Iterator[tuple[Server, str]]:
    """A service and the address of its gRPC port, as its greeting says."""
    with running(models, log, "--grpc-port", "0", *options, **environment) as server:
        yield server, _address(server)


def _address(server: Server) -> str:
    assert server.process.stdout is not None
    for line in server.process.stdout:
        if line.startswith("  gRPC "):
            return line.split()[-1]
    raise AssertionError(f"the greeting names no port for gRPC: {server.errors()}")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models")
    for version in ("1", "2"):
        toy_models.write_toy(directory, "channels", CHANNELS, version=version)
    toy_models.write_toy(directory, "spoken", SPOKEN)
    toy_models.write_toy(directory, "skeleton", SKELETON)
    toy_models.write_toy(directory, "moving", CHANNELS)
    toy_models.write_without_manifest(directory, "bare")
    return directory


@pytest.fixture(scope="module")
def served(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, str]]:
    with serving(models, tmp_path_factory.mktemp("server") / "log", INDRNN_MANAGEMENT_TOKEN=MANAGER, INDRNN_BODY_BYTES="500000") as started:
        yield started


@pytest.fixture(scope="module")
def server(served: tuple[Server, str]) -> Server:
    return served[0]


@pytest.fixture(scope="module", params=CLIENTS)
def triton(served: tuple[Server, str], request: pytest.FixtureRequest) -> Iterator[Any]:
    client = CLIENTS[request.param](served[1])
    yield client
    client.close()


@pytest.fixture(scope="module")
def raw(served: tuple[Server, str]) -> Iterator[Any]:
    with grpc.insecure_channel(served[1]) as channel:
        yield service_pb2_grpc.GRPCInferenceServiceStub(channel)


def tensor(frames: npt.NDArray[Any] = CLIP[None], *, name: str = "frames") -> Any:
    return triton_grpc.InferInput(name, list(frames.shape), utils.np_to_triton_dtype(frames.dtype)).set_data_from_numpy(frames)


def request_of(frames: npt.NDArray[Any] = CLIP[None], model: str = "channels", sequence: int | str | None = None, **flags: bool) -> Any:
    """As the stubs take it; sequences beyond int64 go as uint64."""
    message = service_pb2.ModelInferRequest(model_name=model, raw_input_contents=[frames.tobytes()])
    message.inputs.add(name="frames", datatype="FP32", shape=frames.shape)
    if isinstance(sequence, str):
        message.parameters["sequence_id"].string_param = sequence
    elif sequence is not None:
        message.parameters["sequence_id"].uint64_param = sequence
    for name, value in flags.items():
        message.parameters[f"sequence_{name}"].bool_param = value
    return message


def scores_of(response: Any) -> Floats:
    return np.frombuffer(response.raw_output_contents[0], np.float32).reshape(list(response.outputs[0].shape))


def whole(server: Server, frames: npt.NDArray[Any] = CLIP, model: str = "channels") -> Floats:
    """What `/v1` says of the clip."""
    answer = httpx.post(
        f"{server.url}/v1/models/{model}/predict?scores=all&answers=binary", content=frames.tobytes(), headers={"content-type": "application/octet-stream"}
    )
    return np.frombuffer(answer.raise_for_status().content[16:], np.float32).reshape(len(frames), -1)


def refused(status: str, words: str, call: Any, *arguments: Any, **options: Any) -> None:
    with pytest.raises(utils.InferenceServerException) as caught:
        call(*arguments, **options)
    assert caught.value.status() == f"StatusCode.{status}", caught.value
    assert words in caught.value.message()


def steps(clip: npt.NDArray[Any], sequence: int | str, size: int = 1, model: str = "channels") -> list[dict[str, Any]]:
    """A clip as the requests of a sequence; each one's id is the sequence and its first frame."""
    cuts = range(0, len(clip), size)
    return [
        {
            "model_name": model,
            "inputs": [tensor(clip[None, at : at + size])],
            "request_id": f"{sequence}/{at}",
            "sequence_id": sequence,
            "sequence_start": at == 0,
            "sequence_end": at == cuts[-1],
        }
        for at in cuts
    ]


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


# Health, metadata, repository


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


# Clips


def test_a_clip_has_the_bits_of_http(server: Server, triton: Any) -> None:
    result = triton.infer("channels", [tensor()], request_id="größer 7")
    with http.InferenceServerClient(server.url.removeprefix("http://")) as other:
        asked = http.InferInput("frames", [1, *CLIP.shape], "FP32").set_data_from_numpy(CLIP[None])
        assert result.as_numpy("scores").tobytes() == other.infer("channels", [asked]).as_numpy("scores").tobytes() == whole(server)[None].tobytes()
    response = result.get_response()
    assert (response.id, response.model_name, response.model_version, len(response.parameters)) == ("größer 7", "channels", "2", 0)
    assert triton.infer("channels", [tensor()], model_version="1").get_response().model_version == "1"
    named = triton.infer("channels", [tensor()], outputs=[triton_grpc.InferRequestedOutput("scores")])
    assert named.as_numpy("scores").tobytes() == whole(server)[None].tobytes()


def test_a_batch_of_clips_of_unequal_length(server: Server, triton: Any) -> None:
    clips = np.stack([example_frames(SKELETON, 12, seed) for seed in range(3)])
    lengths = np.array([12, 1, 7])
    scores = triton.infer("skeleton", [tensor(clips), tensor(lengths, name="lengths")]).as_numpy("scores")
    assert scores.shape == (3, 12, 4)
    for clip, length, found in zip(clips, lengths, scores, strict=True):
        assert found[:length].tobytes() == whole(server, clip[:length], "skeleton").tobytes()
        assert not found[length:].any()
    assert triton.infer("skeleton", [tensor(np.repeat(clips[:, :2], 70, 0))]).as_numpy("scores").shape == (210, 2, 4)


def test_classes_by_name(server: Server, triton: Any) -> None:
    scores = whole(server, CLIP, "spoken")[-1]
    best = triton.infer("spoken", [tensor()], outputs=[triton_grpc.InferRequestedOutput("scores", class_count=3)]).as_numpy("scores")
    assert best.shape == (1, 3)
    for index, text in zip(np.argsort(-scores), best[0], strict=False):
        score, number, label = text.decode().split(":", 2)
        assert (int(number), label) == (index, LABELS[index])
        assert float(score) == pytest.approx(scores[index], abs=1e-6)


def test_numbers_instead_of_bytes(server: Server, raw: Any) -> None:
    message = service_pb2.ModelInferRequest(model_name="channels")
    message.inputs.add(name="frames", datatype="FP32", shape=[1, 40, 3]).contents.fp32_contents.extend(CLIP.ravel())
    message.inputs.add(name="lengths", datatype="INT64", shape=[1]).contents.int64_contents.append(40)
    assert scores_of(raw.ModelInfer(message)).tobytes() == whole(server)[None].tobytes()


@pytest.mark.parametrize("algorithm", [None, "gzip", "deflate"])
def test_compressed(server: Server, triton: Any, algorithm: str | None) -> None:
    assert triton.infer("channels", [tensor()], compression_algorithm=algorithm).as_numpy("scores").tobytes() == whole(server)[None].tobytes()
    found = triton.stream(steps(CLIP[:3], "packed"), compression_algorithm=algorithm)
    assert np.concatenate([one.as_numpy("scores")[0] for one in found]).tobytes() == whole(server)[:3].tobytes()


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


# Sequences


@pytest.mark.parametrize("sequence", [1, 2**63 - 1, "1", "größer/Ω"])
def test_a_sequence_however_it_is_cut(server: Server, triton: Any, sequence: int | str) -> None:
    expected, rng, at = whole(server), np.random.default_rng(3), 0
    while at < len(CLIP):
        end = min(len(CLIP), at + int(rng.integers(1, 9)))
        step = {"sequence_id": sequence, "sequence_start": at == 0, "sequence_end": end == len(CLIP)}
        result = triton.infer("channels", [tensor(CLIP[None, at:end])], **step)
        assert result.as_numpy("scores")[0].tobytes() == expected[at:end].tobytes()
        told = result.get_response().parameters
        assert told["sequence_step"].int64_param == end
        assert (told["sequence_id"].string_param if isinstance(sequence, str) else told["sequence_id"].int64_param) == sequence
        at = end
    words = f"inference request for sequence {sequence} to model 'channels' must specify the START flag on the first request of the sequence"
    refused("INVALID_ARGUMENT", words, triton.infer, "channels", [tensor()], sequence_id=sequence)


def test_the_largest_numbers_of_sequences(server: Server, raw: Any) -> None:
    for sequence in (2**63 + 5, 2**64 - 1):
        first = raw.ModelInfer(request_of(CLIP[None, :9], sequence=sequence, start=True))
        rest = raw.ModelInfer(request_of(CLIP[None, 9:], sequence=sequence, end=True))
        assert np.concatenate([scores_of(first)[0], scores_of(rest)[0]]).tobytes() == whole(server).tobytes()
        assert rest.parameters["sequence_id"].uint64_param == sequence


def test_crossed_sequences_give_the_numbers_of_each_alone(server: Server, triton: Any) -> None:
    clips = [example_frames(CHANNELS, 12, seed) for seed in range(8)]
    ids: list[int | str] = [1, "1", 2, "2", 2**63 - 1, "a", "b", 9]
    found: list[list[Floats]] = [[] for _ in clips]
    cut = [steps(clip, one) for clip, one in zip(clips, ids, strict=True)]
    for at in range(12):
        for scores, result in zip(found, triton.together([one[at] for one in cut]), strict=True):
            scores.append(result.as_numpy("scores")[0])
    for clip, scores in zip(clips, found, strict=True):
        assert np.concatenate(scores).tobytes() == whole(server, clip).tobytes()


def test_started_twice_it_begins_anew_and_repeated_it_stands_still(server: Server, triton: Any) -> None:
    expected = whole(server)
    triton.infer("channels", [tensor(CLIP[None, 20:30])], sequence_id="twice", sequence_start=True)
    for at in range(0, 40, 10):
        for start in (at == 0, False):  # each step twice, as a proxy may do
            result = triton.infer("channels", [tensor(CLIP[None, at : at + 10])], sequence_id="twice", sequence_start=start, parameters={"sequence_step": at})
            assert result.as_numpy("scores")[0].tobytes() == expected[at : at + 10].tobytes()
    refused("FAILED_PRECONDITION", "next frame is 40", triton.infer, "channels", [tensor()], sequence_id="twice", parameters={"sequence_step": 41})
    triton.infer("channels", [tensor()], sequence_id="twice", sequence_end=True)


def test_faults_leave_a_sequence_alone(server: Server, triton: Any) -> None:
    expected, one = whole(server), {"sequence_id": 77}
    triton.infer("channels", [tensor(CLIP[None, :10])], **one, sequence_start=True)
    for start in (False, True):
        refused("INVALID_ARGUMENT", "batch size 1", triton.infer, "channels", [tensor(np.zeros((2, 1, 3), np.float32))], **one, sequence_start=start)
        refused("INVALID_ARGUMENT", "expected (frames, 3)", triton.infer, "channels", [tensor(np.zeros((1, 1, 2), np.float32))], **one, sequence_start=start)
        refused("DEADLINE_EXCEEDED", "", triton.infer, "channels", [tensor()], **one, sequence_start=start, sequence_end=True, timeout=1)
    rest = triton.infer("channels", [tensor(CLIP[None, 10:])], **one, sequence_end=True)
    assert rest.as_numpy("scores")[0].tobytes() == expected[10:].tobytes()


def test_sequences_and_sessions_are_the_same_over_http_and_grpc(server: Server, triton: Any) -> None:
    expected, found = whole(server), []
    with httpx.Client(base_url=server.url) as rest, http.InferenceServerClient(server.url.removeprefix("http://")) as other:
        session = rest.post("/v1/models/channels/sessions").json()["session"]
        rest.post(f"/v1/sessions/{session}/frames", json={"first": 0, "frames": CLIP[:10].tolist()}).raise_for_status()
        result = triton.infer("channels", [tensor(CLIP[None, 10:20])], sequence_id=session)
        assert result.as_numpy("scores")[0].tobytes() == expected[10:20].tobytes()
        answer = rest.post(f"/v1/sessions/{session}/frames?scores=all", json={"first": 20, "frames": CLIP[20:].tolist()}).json()
        assert np.array_equal(np.array(answer["scores"], np.float32), expected[20:])

        for at in range(0, 40, 5):  # by turns: over HTTP, over gRPC, over gRPC's stream
            flags = {"sequence_id": 42, "sequence_start": at == 0, "sequence_end": at == 35}
            if at % 15 == 0:
                asked = http.InferInput("frames", [1, 5, 3], "FP32").set_data_from_numpy(CLIP[None, at : at + 5])
                found.append(other.infer("channels", [asked], **flags))
            elif at % 15 == 5:
                found.append(triton.infer("channels", [tensor(CLIP[None, at : at + 5])], **flags))
            else:
                found += triton.stream([{"model_name": "channels", "inputs": [tensor(CLIP[None, at : at + 5])], **flags}])
            live = rest.get("/v1/sessions/channels:uint64:42")
            assert live.json().get("next_frame") == (at + 5 if at < 35 else None)
    assert np.concatenate([one.as_numpy("scores")[0] for one in found]).tobytes() == expected.tobytes()


# Streams of requests


def test_many_sequences_over_one_stream(server: Server, triton: Any) -> None:
    """Sent without waiting for any answer, each in order, many more than may be under way; clips between them."""
    clips = {f"person {i}": example_frames(CHANNELS, 12, seed=i) for i in range(40)}
    cut = [steps(clip, one) for one, clip in clips.items()]
    calls = [one[at] for at in range(12) for one in cut]
    calls[100:100] = [{"model_name": "channels", "inputs": [tensor()], "request_id": "clip"}]
    found = triton.stream(calls)
    assert len(found) == len(calls) == 481
    by_id = {one.get_response().id: one for one in found}
    for one, clip in clips.items():
        scores = np.concatenate([by_id[f"{one}/{at}"].as_numpy("scores")[0] for at in range(12)])
        assert scores.tobytes() == whole(server, clip).tobytes()
        order = [result.get_response().id for result in found if result.get_response().id.startswith(f"{one}/")]
        assert order == [f"{one}/{at}" for at in range(12)]
    assert by_id["clip"].as_numpy("scores").tobytes() == whole(server)[None].tobytes()
    assert all(one.get_response().parameters["triton_final_response"].bool_param for one in found)


def test_an_error_in_a_stream_belongs_to_its_request(server: Server, raw: Any) -> None:
    requests = [
        request_of(CLIP[None, :10], sequence=5, start=True),
        request_of(np.zeros((1, 1, 4), np.float32), sequence=5),
        request_of(CLIP[None, 10:], sequence=5, end=True),
        request_of(sequence=5),
        request_of(model="nothing"),
        service_pb2.ModelInferRequest(model_name="channels"),
    ]
    requests[3].parameters["sequence_step"].int64_param = 40
    for i, one in enumerate(requests):
        one.id = str(i)
    by_id = {one.infer_response.id: one for one in raw.ModelStreamInfer(iter(requests), timeout=30)}
    scores = np.concatenate([scores_of(by_id[i].infer_response)[0] for i in "02"])
    assert scores.tobytes() == whole(server).tobytes()
    for i, code, words in (
        ("1", "wrong_shape", "expected (frames, 3)"),
        ("3", "sequence_not_found", "START flag"),
        ("4", "model_not_found", "'nothing' is not found"),
        ("5", "malformed", "inputs must have"),
    ):
        assert words in by_id[i].error_message
        assert by_id[i].infer_response.parameters["error-code"].string_param == code
    assert len(by_id) == 6


def test_the_stock_client_sees_errors_of_a_stream(triton: Any) -> None:
    good = {"model_name": "channels", "inputs": [tensor()]}
    found = triton.stream([good, good | {"sequence_id": "not begun"}, good])
    assert sum(isinstance(one, utils.InferenceServerException) for one in found) == 1
    [error] = [one for one in found if isinstance(one, utils.InferenceServerException)]
    assert "START flag" in error.message()
    assert len(found) == 3


def test_a_stream_that_asks_for_it_ends_at_its_first_error(triton: Any) -> None:
    bad = {"model_name": "nothing", "inputs": [tensor()]}
    found = triton.stream([bad], headers={"triton_grpc_error": "true"})
    assert isinstance(found[-1], utils.InferenceServerException)
    assert (found[-1].status(), "unknown model" in found[-1].message()) == ("StatusCode.NOT_FOUND", True)


def test_a_stream_ends_when_its_time_is_over(triton: Any) -> None:
    assert triton.stream([], stream_timeout=20) == []
    began = time.monotonic()
    if isinstance(triton, Blocking):
        found: Queue[Any] = Queue()
        triton.client.start_stream(lambda result, error: found.put(error), stream_timeout=0.3)
        assert found.get(timeout=10).status() == "StatusCode.DEADLINE_EXCEEDED"
        triton.client.stop_stream()
        assert time.monotonic() - began < 5


def figures(server: Server, name: str) -> dict[str, float]:
    """Prometheus' samples that begin with this name."""
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line.startswith(name)}


def test_a_client_that_does_not_read_is_not_read(server: Server, served: tuple[Server, str]) -> None:
    """It keeps at most 256 requests under way, but for what its own window holds; others go on; when it reads, nothing is missing."""
    frames, key = np.zeros((1, 2000, 3), np.float32), f'indrnn_requests_total{{route="{PREFIX}ModelStreamInfer",status="OK"}}'
    sent = 700

    async def case() -> None:
        before = figures(server, "indrnn_requests_total").get(key, 0)
        async with grpc.aio.insecure_channel(served[1], options=[("grpc.http2.bdp_probe", 0)]) as channel:  # a window that stays as it is
            call = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelStreamInfer()

            async def send() -> None:
                for i in range(sent):
                    message = request_of(frames)
                    message.id = str(i)
                    await call.write(message)
                await call.done_writing()

            sending = asyncio.create_task(send())
            deadline, taken, calm = time.monotonic() + 20, -1.0, 0
            while calm < 3:  # until no more are taken
                await asyncio.sleep(0.2)
                now = (await asyncio.to_thread(figures, server, "indrnn_requests_total")).get(key, 0) - before
                calm, taken = (calm + 1 if now == taken and now > 0 else 0), now
                assert time.monotonic() < deadline
            assert 256 <= taken <= 256 + 8
            assert await asyncio.to_thread(lambda: len(whole(server))) == 40
            found = []
            while (one := await asyncio.wait_for(call.read(), 20)) is not grpc.aio.EOF:
                found.append(one.infer_response.id)
            await sending
            assert sorted(map(int, found)) == list(range(sent))

    asyncio.run(case())


# Cancelled, too late, killed

LONG = 40_000  # frames that take the service longer than it takes to ask how it stands
PATIENT = {"INDRNN_DEADLINE_S": "60", "INDRNN_DRAIN_S": "60"}


def waiting(server: Server, model: str) -> int:
    """Messages that wait or run."""
    return int(httpx.get(f"{server.url}/v1/models/{model}").json()["live"]["waiting"])


def wait_until(true: Callable[[], Any]) -> None:
    until = time.monotonic() + 20
    while not true():
        assert time.monotonic() < until
        time.sleep(0.005)


def test_who_leaves_before_his_turn_changes_nothing(models: Path, tmp_path: Path) -> None:
    with serving(models, tmp_path / "log", **PATIENT) as (server, address), grpc.insecure_channel(address) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        clip = example_frames(SKELETON, LONG)
        expected = whole(server, clip, "skeleton")
        ask = {"model": "skeleton", "sequence": 1}
        long = stub.ModelInfer.future(request_of(clip[None, :-20], start=True, **ask))
        wait_until(lambda: waiting(server, "skeleton"))
        others = [request_of(clip[None, -20:-15], **ask) for _ in range(3)]
        cancelled = stub.ModelInfer.future(others[0])
        stream = stub.ModelStreamInfer(iter([others[1]]))
        with pytest.raises(grpc.RpcError) as caught:
            stub.ModelInfer(others[2], timeout=0.05)
        assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        cancelled.cancel()
        stream.cancel()
        assert not long.done()
        assert scores_of(long.result(timeout=60))[0].tobytes() == expected[:-20].tobytes()
        rest = stub.ModelInfer(request_of(clip[None, -20:], end=True, **ask))
        assert scores_of(rest)[0].tobytes() == expected[-20:].tobytes()
        counted = figures(server, "indrnn_requests_total")
        assert counted[f'indrnn_requests_total{{route="{PREFIX}ModelInfer",status="OK"}}'] == 2
        assert sum(value for name, value in counted.items() if PREFIX in name and ("CANCELLED" in name or "DEADLINE" in name)) == 3
        assert server.stop() == 0
        assert "failed" not in server.errors()


KILLED = """
import sys, time
import numpy as np
import tritonclient.grpc as triton
client = triton.InferenceServerClient(sys.argv[1])
client.start_stream(lambda result, error: print(error or result.get_response().parameters["sequence_step"].int64_param, flush=True))
for at in range(20):
    frames = np.load(sys.argv[2])[None, at : at + 1]
    tensor = triton.InferInput("frames", frames.shape, "FP32").set_data_from_numpy(frames)
    client.async_stream_infer("channels", [tensor], sequence_id="orphan", sequence_start=at == 0)
time.sleep(60)
"""


def test_a_client_that_is_killed_leaves_its_sequence_to_be_gone_on_with(server: Server, served: tuple[Server, str], raw: Any, tmp_path: Path) -> None:
    np.save(tmp_path / "clip.npy", CLIP)
    client = subprocess.Popen([sys.executable, "-c", KILLED, served[1], str(tmp_path / "clip.npy")], stdout=subprocess.PIPE, text=True)
    assert client.stdout is not None
    try:
        assert [int(client.stdout.readline()) for _ in range(20)] == list(range(1, 21))
    finally:
        os.kill(client.pid, signal.SIGKILL)
        client.wait(10)
        client.stdout.close()
    rest = raw.ModelInfer(request_of(CLIP[None, 20:], sequence="orphan", end=True))
    assert scores_of(rest)[0].tobytes() == whole(server)[20:].tobytes()


def test_at_the_end_what_was_read_is_answered(models: Path, tmp_path: Path) -> None:
    with serving(models, tmp_path / "log", **PATIENT) as (server, address), grpc.insecure_channel(address) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        more: Queue[Any] = Queue()
        more.put(request_of(CLIP[None, :10], sequence=3, start=True))
        stream = stub.ModelStreamInfer(iter(more.get, None))
        assert next(stream).infer_response.parameters["sequence_step"].int64_param == 10
        idle = stub.ModelStreamInfer(iter(Queue().get, None))
        long = stub.ModelInfer.future(request_of(example_frames(SKELETON, LONG)[None], model="skeleton"))
        wait_until(lambda: waiting(server, "skeleton"))
        server.process.send_signal(signal.SIGTERM)
        for one in (stream, idle):
            with pytest.raises(grpc.RpcError) as caught:
                next(one)
            assert (caught.value.code(), "shutting down" in caught.value.details()) == (grpc.StatusCode.UNAVAILABLE, True)
            assert dict(caught.value.trailing_metadata())["error-code"] == "draining"
        assert long.result(timeout=60).outputs[0].shape == [1, LONG, 4]
        assert server.process.wait(60) == 0
        more.put(None)
        assert "failed" not in server.errors()


def test_a_sequence_outlives_the_process_that_serves_it(server: Server, models: Path, tmp_path: Path) -> None:
    """On a store: every answered step is kept, and another process goes on after a kill without warning; over a stream of requests, too."""
    expected, found = whole(server), []
    store = {"INDRNN_STORE": f"sqlite://{tmp_path / 'sessions'}"}
    cut = steps(CLIP, "kept", 5)
    with serving(models, tmp_path / "first", **store) as (first, address):
        with triton_grpc.InferenceServerClient(address) as client:
            found += [client.infer(**one) for one in cut[:3]]
        first.process.kill()
        first.process.wait(20)
    with serving(models, tmp_path / "second", **store) as (_, address):
        client = Blocking(address)
        found += client.stream(cut[3:6])
        found += [client.infer(**one) for one in cut[6:]]
        client.close()
    assert np.concatenate([one.as_numpy("scores")[0] for one in found]).tobytes() == expected.tobytes()


# Limits, tokens, figures, start


def test_a_token(models: Path, tmp_path: Path) -> None:
    changes = {"INDRNN_TOKEN": "correct horse", "INDRNN_MANAGEMENT_TOKEN": MANAGER, "INDRNN_CONNECTIONS": "1"}
    with serving(models, tmp_path / "log", **changes) as (server, address), both(address) as clients:
        for client in clients:
            assert client.is_server_live() is True
            assert client.is_server_ready() is True
            for headers in (None, {"authorization": "Bearer wrong horse"}, {"authorization": "correct horse"}):
                refused("UNAUTHENTICATED", "token", client.infer, "channels", [tensor()], headers=headers)
                refused("UNAUTHENTICATED", "token", client.get_server_metadata, headers=headers)
                refused("UNAUTHENTICATED", "token", client.is_model_ready, "channels", headers=headers)
                # The asynchronous client, which is refused before it has sent a message, may stumble over that itself.
                [error] = client.stream([{"model_name": "channels", "inputs": [tensor()]}], headers=headers)
                assert error.status() == "StatusCode.UNAUTHENTICATED" or (isinstance(client, Async) and "Internal error from Core" in error.message())
            for token in ("correct horse", MANAGER):
                headers = {"authorization": f"Bearer {token}"}
                assert client.infer("channels", [tensor()], headers=headers).as_numpy("scores").shape == (1, 40, 4)
                [result] = client.stream([{"model_name": "channels", "inputs": [tensor()]}], headers=headers)
                assert result.as_numpy("scores").shape == (1, 40, 4)
            origin = {"authorization": "Bearer correct horse", "origin": "http://elsewhere.example"}
            refused("PERMISSION_DENIED", "elsewhere", client.infer, "channels", [tensor()], sequence_id=1, sequence_start=True, headers=origin)
        text = httpx.get(f"{server.url}/metrics", headers={"authorization": "Bearer correct horse"}).text
        assert re.search(r'indrnn_errors_total\{code="unauthenticated"\} 2[4-9]', text)
        metadata = (("authorization", "Bearer correct horse"),)
        with grpc.insecure_channel(address) as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            held: list[Any] = []

            def full() -> Any:
                if not held or not held[-1].is_active():  # streams of before were still being ended
                    held.append(stub.ModelStreamInfer(iter(Queue().get, None), metadata=metadata))
                return refusal_of(stub, metadata)

            wait_until(full)
            assert refusal_of(stub, metadata) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "too_many")
            held[-1].cancel()


def refusal_of(stub: Any, metadata: Any) -> Any:
    """Why a stream is refused; None where it is not."""
    try:
        assert list(stub.ModelStreamInfer(iter([]), metadata=metadata)) == []
    except grpc.RpcError as error:
        return error.code(), dict(error.trailing_metadata())["error-code"]


@contextmanager
def both(address: str) -> Iterator[list[Any]]:
    """One client of each kind."""
    clients = [kind(address) for kind in CLIENTS.values()]
    try:
        yield clients
    finally:
        for client in clients:
            client.close()


def test_expiry_capacity_and_strictness(models: Path, tmp_path: Path) -> None:
    changes = {"INDRNN_SESSIONS": "2", "INDRNN_IDLE_S": "0.6", "INDRNN_RESTART_SEQUENCES": "false"}
    with serving(models, tmp_path / "log", **changes) as (_, address), both(address) as clients:
        for sequence, client in enumerate(clients, 1):
            client.infer("channels", [tensor()], sequence_id=sequence, sequence_start=True)
        for sequence, client in enumerate(clients, 1):
            refused("RESOURCE_EXHAUSTED", "2 sessions are live", client.infer, "channels", [tensor()], sequence_id=3, sequence_start=True)
            refused("ALREADY_EXISTS", "under way", client.infer, "channels", [tensor()], sequence_id=sequence, sequence_start=True)
        time.sleep(1)
        words = "must specify the START flag on the first request of the sequence; it has expired"
        for sequence, client in enumerate(clients, 1):
            refused("INVALID_ARGUMENT", words, client.infer, "channels", [tensor()], sequence_id=sequence)
            client.infer("channels", [tensor()], sequence_id=3, sequence_start=True, sequence_end=True)


def test_requests_are_counted(server: Server, triton: Any) -> None:
    def counted(method: str, status: str) -> float:
        return figures(server, "indrnn_requests_total").get(f'indrnn_requests_total{{route="{PREFIX}{method}",status="{status}"}}', 0)

    before = counted("ModelInfer", "OK"), counted("ModelInfer", "NOT_FOUND"), counted("ModelStreamInfer", "OK"), counted("ModelStreamInfer", "NOT_FOUND")
    triton.infer("channels", [tensor()])
    refused("NOT_FOUND", "", triton.infer, "nothing", [tensor()])
    triton.stream([{"model_name": "channels", "inputs": [tensor()]}] * 3 + [{"model_name": "nothing", "inputs": [tensor()]}])
    after = counted("ModelInfer", "OK"), counted("ModelInfer", "NOT_FOUND"), counted("ModelStreamInfer", "OK"), counted("ModelStreamInfer", "NOT_FOUND")
    assert np.subtract(after, before).tolist() == [1, 1, 3, 1]
    assert figures(server, f'indrnn_request_seconds_count{{route="{PREFIX}ModelInfer"}}').popitem()[1] >= 2


def start(*options: str, prelude: str = "pass", **environment: str) -> subprocess.CompletedProcess[str]:
    script = f"import sys; {prelude}; sys.argv[1:] = {list(options)!r}; from service.__main__ import app; app()"
    return subprocess.run([sys.executable, "-c", script], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=60)


def test_a_start_that_cannot_be_says_why(served: tuple[Server, str]) -> None:
    taken = served[1].rpartition(":")[2]
    done = start("--port", "0", INDRNN_GRPC_PORT=taken)
    assert (done.returncode, f"port {taken} on 127.0.0.1 is taken; choose another with INDRNN_GRPC_PORT" in done.stderr) == (1, True), done.stderr
    for missing in ("grpc", "google.protobuf"):
        done = start("--port", "0", "--grpc-port", "0", prelude=f"sys.modules[{missing!r}] = None")
        assert (done.returncode, "needs the extra `grpc`: pip install" in done.stderr) == (1, True), done.stderr


def test_without_the_setting_grpc_is_not_even_imported() -> None:
    script = "import sys, service.server, service.app; sys.exit(any(name.split('.')[0] == 'grpc' for name in sys.modules))"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, timeout=60)


def test_the_readmes_example_runs_as_written(served: tuple[Server, str], tmp_path: Path) -> None:
    """In a process of its own, as whoever pastes it does."""
    readme = (ROOT / "service" / "README.md").read_text()
    [code] = [one for one in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "tritonclient.grpc" in one]
    script = tmp_path / "example.py"
    script.write_text(code.replace("127.0.0.1:8001", served[1]))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "(1, 100, 4)"
    assert len(lines) == 4
