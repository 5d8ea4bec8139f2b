"""The Open Inference Protocol with Triton's own client as it is, the one that blocks and the asynchronous one, against a running service.

What a case says holds for both: `triton` is either of them, called in the same way.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import pytest

from tests.server_process import Server, running
from tests.toy_models import CHANNELS, EXPLOSIVE, GAPPY, SKELETON, example_frames
from tests.triton_clients import CLIP, LABELS, MANAGER, Floats, OnLoop, each_of, refused, run_readmes_example, utils, whole, write_models

http = pytest.importorskip("tritonclient.http", reason="tritonclient is not installed (extra `test`): the Open Inference Protocol is not tested with it")
aio = pytest.importorskip("tritonclient.http.aio")


class Async(OnLoop):
    """The asynchronous client."""

    def __init__(self, url: str) -> None:
        super().__init__(lambda: aio.InferenceServerClient(url))


class Blocking:
    """The client that blocks; several inferences at a time go through its own pool of connections."""

    def __init__(self, url: str) -> None:
        self.client = http.InferenceServerClient(url, concurrency=8)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.client, name)

    def together(self, calls: list[dict[str, Any]]) -> list[Any]:
        return [request.get_result() for request in [self.client.async_infer(**call) for call in calls]]


CLIENTS: dict[str, Any] = {"blocking": Blocking, "async": Async}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("models"), gappy=GAPPY, explosive=EXPLOSIVE)


@pytest.fixture(scope="module")
def server(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(models, tmp_path_factory.mktemp("server") / "log", INDRNN_MANAGEMENT_TOKEN=MANAGER, INDRNN_BODY_BYTES="500000") as started:
        yield started


@pytest.fixture(scope="module", params=CLIENTS)
def triton(server: Server, request: pytest.FixtureRequest) -> Iterator[Any]:
    client = CLIENTS[request.param](server.url.removeprefix("http://"))
    yield client
    client.close()


def tensor(frames: npt.NDArray[Any] = CLIP[None], *, name: str = "frames", datatype: str | None = None, binary: bool = True) -> Any:
    one = http.InferInput(name, list(frames.shape), datatype or utils.np_to_triton_dtype(frames.dtype))
    return one.set_data_from_numpy(frames, binary_data=binary)


def wanted(**options: Any) -> list[Any]:
    return [http.InferRequestedOutput("scores", **options)]


def test_health(triton: Any) -> None:
    assert triton.is_server_live() is True
    assert triton.is_server_ready() is True
    assert triton.is_model_ready("channels") is True
    assert triton.is_model_ready("channels", "2") is True
    for name, version in (("nothing", ""), ("channels", "3"), ("bare", "")):
        assert triton.is_model_ready(name, version) is False


def test_metadata_and_configuration(triton: Any) -> None:
    server = triton.get_server_metadata()
    assert server["name"]
    assert {"binary_tensor_data", "sequence", "sequence(string_id)", "statistics", "model_configuration", "classification"} <= set(server["extensions"])
    model = triton.get_model_metadata("skeleton")
    assert (model["name"], model["versions"], model["platform"]) == ("skeleton", ["1"], "onnxruntime_onnx")
    assert model["inputs"] == [{"name": "frames", "datatype": "FP32", "shape": [-1, -1, 13, 3]}]
    assert model["outputs"] == [{"name": "scores", "datatype": "FP32", "shape": [-1, -1, 4]}]
    assert triton.get_model_metadata("channels")["versions"] == ["1", "2"]
    assert triton.get_model_metadata("channels", "1")["versions"] == ["1"]
    config = triton.get_model_config("channels", "2")
    assert config["input"] == [{"name": "frames", "data_type": "TYPE_FP32", "dims": [-1, 3]}]
    assert config["output"] == [{"name": "scores", "data_type": "TYPE_FP32", "dims": [-1, 4]}]
    assert config["max_batch_size"] > 0
    assert "oldest" in config["sequence_batching"]
    assert config["model_transaction_policy"] == {"decoupled": False}


def test_the_repositorys_index(triton: Any) -> None:
    listed = {(one["name"], one["version"]): one for one in triton.get_model_repository_index()}
    assert listed["channels", "2"] == {"name": "channels", "version": "2", "state": "READY", "reason": ""}
    assert listed["bare", "1"]["state"] == "UNAVAILABLE"
    assert "manifest" in listed["bare", "1"]["reason"]


@pytest.mark.parametrize("sends", ["bytes", "JSON"])
@pytest.mark.parametrize("asks", ["all outputs", "bytes", "JSON"])
def test_inference_in_every_form_gives_the_bits_of_the_rest_api(server: Server, triton: Any, sends: str, asks: str) -> None:
    outputs = None if asks == "all outputs" else wanted(binary_data=asks == "bytes")
    result = triton.infer("channels", [tensor(binary=sends == "bytes")], outputs=outputs, request_id="größer 7")
    assert result.as_numpy("scores").tobytes() == whole(server)[None].tobytes()
    response = result.get_response()
    assert (response["id"], response["model_name"], response["model_version"]) == ("größer 7", "channels", "2")
    assert "parameters" not in response
    assert triton.infer("channels", [tensor()], model_version="1").get_response()["model_version"] == "1"
    assert "id" not in triton.infer("channels", [tensor()]).get_response()


def test_a_batch_of_clips_of_unequal_length(server: Server, triton: Any) -> None:
    clips = np.stack([example_frames(SKELETON, 12, seed) for seed in range(3)])
    lengths = np.array([12, 1, 7])
    for binary, lengths_binary in ((True, True), (True, False), (False, True)):
        result = triton.infer("skeleton", [tensor(clips, binary=binary), tensor(lengths, name="lengths", binary=lengths_binary)])
        scores = result.as_numpy("scores")
        assert scores.shape == (3, 12, 4)
        for clip, length, found in zip(clips, lengths, scores, strict=True):
            assert found[:length].tobytes() == whole(server, clip[:length], "skeleton").tobytes()
            assert not found[length:].any()
    many = np.repeat(clips[:, :2], 70, 0)  # more than the service runs together
    assert triton.infer("skeleton", [tensor(many)]).as_numpy("scores").shape == (210, 2, 4)


def test_missing_joints(server: Server, triton: Any) -> None:
    frames = example_frames(GAPPY, 6)
    frames[2:4, 5] = np.nan
    expected = whole(server, frames, "gappy")
    assert triton.infer("gappy", [tensor(frames[None])]).as_numpy("scores").tobytes() == expected[None].tobytes()
    refused(422, "missing", triton.infer, "skeleton", [tensor(frames[None])])


def test_classes_by_name(server: Server, triton: Any) -> None:
    scores = whole(server, CLIP, "spoken")[-1]
    order = np.argsort(-scores)
    for binary in (True, False):
        best = triton.infer("spoken", [tensor()], outputs=wanted(binary_data=binary, class_count=3)).as_numpy("scores")
        assert best.shape == (1, 3)
        for index, text in zip(order, best[0], strict=False):
            score, number, label = (text.decode() if isinstance(text, bytes) else text).split(":", 2)
            assert (int(number), label) == (index, LABELS[index])
            assert float(score) == pytest.approx(scores[index], abs=1e-6)
    assert triton.infer("spoken", [tensor()], outputs=wanted(class_count=100)).as_numpy("scores").shape == (1, 4)
    speed = triton.infer("explosive", [tensor(example_frames(EXPLOSIVE, 2)[None])], outputs=wanted(class_count=1)).as_numpy("scores")
    assert re.fullmatch(rb"-?\d+\.\d{6}:[01]", speed[0, 0])  # a regression has no labels


DATATYPES: dict[str, Any] = {
    "BOOL": np.bool_, "UINT8": np.uint8, "UINT16": np.uint16, "UINT32": np.uint32, "UINT64": np.uint64,
    "INT8": np.int8, "INT16": np.int16, "INT32": np.int32, "INT64": np.int64, "FP16": np.float16, "FP32": np.float32, "FP64": np.float64, "BYTES": np.object_,
}  # fmt: skip


@pytest.mark.parametrize("datatype", DATATYPES)
def test_every_datatype(triton: Any, datatype: str) -> None:
    """The model takes one; the others are refused by name, and the service serves on."""
    values = [[[b"", "größer".encode(), b"x"]]] if datatype == "BYTES" else np.ones((1, 1, 3))
    frames = np.array(values, DATATYPES[datatype])
    if datatype == "FP32":
        assert triton.infer("channels", [tensor(frames)]).as_numpy("scores").shape == (1, 1, 4)
    else:
        refused(400, f"frames is {datatype} but the model takes FP32", triton.infer, "channels", [tensor(frames)])
    if datatype == "INT64":
        triton.infer("channels", [tensor(), tensor(np.array([3]), name="lengths")])
    lengths = np.array([b"1"] if datatype == "BYTES" else [1], DATATYPES[datatype])
    if datatype != "INT64":
        refused(400, f"lengths is {datatype} but the model takes INT64", triton.infer, "channels", [tensor(), tensor(lengths, name="lengths")])


@pytest.mark.parametrize("up", [None, "gzip", "deflate"])
@pytest.mark.parametrize("down", [None, "gzip", "deflate"])
def test_compressed_both_ways(server: Server, triton: Any, up: str | None, down: str | None) -> None:
    for binary in (True, False):
        options = {"request_compression_algorithm": up, "response_compression_algorithm": down}
        result = triton.infer("channels", [tensor(binary=binary)], outputs=wanted(binary_data=binary), **options)
        assert result.as_numpy("scores").tobytes() == whole(server)[None].tobytes()


def test_errors_are_told_and_the_service_goes_on(triton: Any) -> None:
    refused(404, "Request for unknown model: 'nothing' is not found", triton.infer, "nothing", [tensor()])
    refused(404, "Request for unknown model: 'channels' version '3' is not found", triton.infer, "channels", [tensor()], model_version="3")
    refused(503, "manifest", triton.infer, "bare", [tensor()])
    refused(404, "unknown model", triton.get_model_metadata, "nothing")
    refused(404, "unknown model", triton.get_model_config, "nothing")
    refused(404, "unknown model", triton.get_inference_statistics, "nothing")
    refused(400, "unknown input 'state'", triton.infer, "channels", [tensor(name="state")])
    refused(400, "unknown output 'next_state'", triton.infer, "channels", [tensor()], outputs=[http.InferRequestedOutput("next_state")])
    refused(400, "input frames is missing", triton.infer, "channels", [tensor(np.array([1]), name="lengths")])
    refused(422, "expected (frames, 3)", triton.infer, "channels", [tensor(np.zeros((1, 2, 4), np.float32))])
    refused(422, "(batch, time", triton.infer, "channels", [tensor(np.zeros((2, 3), np.float32))])
    refused(422, "no frames", triton.infer, "channels", [tensor(np.zeros((1, 0, 3), np.float32))])
    refused(422, "no frames", triton.infer, "channels", [tensor(np.zeros((0, 1, 3), np.float32))])
    refused(422, "shape [1], got [2]", triton.infer, "channels", [tensor(), tensor(np.array([1, 2]), name="lengths")])
    refused(400, "from 0 to 40", triton.infer, "channels", [tensor(), tensor(np.array([41]), name="lengths")])
    refused(408, "waited", triton.infer, "channels", [tensor()], timeout=1)
    spoilt = np.stack([CLIP, CLIP])
    spoilt[1, 5, 2] = np.inf
    refused(422, "clip 1: frame 5", triton.infer, "channels", [tensor(spoilt)])
    refused(413, "500000 bytes", triton.infer, "channels", [tensor(np.zeros((1, 50_000, 3), np.float32))])
    refused(413, "500000 bytes", triton.infer, "channels", [tensor(np.zeros((1, 50_000, 3), np.float32))], request_compression_algorithm="gzip")
    assert triton.infer("channels", [tensor()]).as_numpy("scores").shape == (1, 40, 4)


@pytest.mark.parametrize("sequence", [1, 2**63 + 5, 2**64 - 1, "1", "größer/Ω"])
def test_a_sequence_however_it_is_cut(server: Server, triton: Any, sequence: int | str) -> None:
    expected, rng, at = whole(server), np.random.default_rng(3), 0
    while at < len(CLIP):
        end = min(len(CLIP), at + int(rng.integers(1, 9)))
        step = {"sequence_id": sequence, "sequence_start": at == 0, "sequence_end": end == len(CLIP)}
        result = triton.infer("channels", [tensor(CLIP[None, at:end], binary=bool(end % 2))], **step)
        assert result.as_numpy("scores")[0].tobytes() == expected[at:end].tobytes()
        assert result.get_response()["parameters"] == {"sequence_id": sequence, "sequence_step": end}
        at = end
    words = f"inference request for sequence {sequence} to model 'channels' must specify the START flag on the first request of the sequence"
    refused(400, words, triton.infer, "channels", [tensor()], sequence_id=sequence)
    refused(400, words, triton.infer, "channels", [tensor()], sequence_id=sequence, sequence_end=True)


def test_a_sequence_of_one_request_again_and_again(server: Server, triton: Any) -> None:
    for _ in range(3):
        result = triton.infer("channels", [tensor()], sequence_id=5, sequence_start=True, sequence_end=True)
        assert result.as_numpy("scores")[0].tobytes() == whole(server).tobytes()


def test_crossed_sequences_give_the_numbers_of_each_alone(server: Server, triton: Any) -> None:
    clips = [example_frames(CHANNELS, 12, seed) for seed in range(8)]
    ids: list[int | str] = [1, "1", 2, "2", 2**64 - 1, "a", "b", 9]
    found: list[list[Floats]] = [[] for _ in clips]
    for at in range(12):
        calls = [
            {"model_name": "channels", "inputs": [tensor(clip[None, at : at + 1])], "sequence_id": one, "sequence_start": at == 0, "sequence_end": at == 11}
            for clip, one in zip(clips, ids, strict=True)
        ]
        for scores, result in zip(found, triton.together(calls), strict=True):
            scores.append(result.as_numpy("scores")[0])
    for clip, scores in zip(clips, found, strict=True):
        assert np.concatenate(scores).tobytes() == whole(server, clip).tobytes()


def test_started_twice_it_begins_anew(server: Server, triton: Any) -> None:
    expected = whole(server)
    triton.infer("channels", [tensor(CLIP[None, 20:30])], sequence_id="twice", sequence_start=True)
    again = triton.infer("channels", [tensor(CLIP[None, :10])], sequence_id="twice", sequence_start=True)
    assert again.as_numpy("scores")[0].tobytes() == expected[:10].tobytes()
    rest = triton.infer("channels", [tensor(CLIP[None, 10:])], sequence_id="twice", sequence_end=True)
    assert rest.as_numpy("scores")[0].tobytes() == expected[10:].tobytes()


def test_a_repeated_step_does_not_move_the_state(server: Server, triton: Any) -> None:
    expected, one = whole(server), {"sequence_id": "safe"}
    for at in range(0, 40, 10):
        for start in (at == 0, False):  # each step twice, as a proxy may do
            result = triton.infer("channels", [tensor(CLIP[None, at : at + 10])], **one, sequence_start=start, parameters={"sequence_step": at})
            assert result.as_numpy("scores")[0].tobytes() == expected[at : at + 10].tobytes()
    refused(409, "next frame is 40", triton.infer, "channels", [tensor()], **one, parameters={"sequence_step": 41})
    triton.infer("channels", [tensor()], **one, sequence_end=True)


def test_a_sequence_is_one_clip_at_a_time_and_faults_leave_it_alone(server: Server, triton: Any) -> None:
    expected, one = whole(server), {"sequence_id": 77}
    triton.infer("channels", [tensor(CLIP[None, :10])], **one, sequence_start=True)
    for start in (False, True):
        refused(400, "batch size 1", triton.infer, "channels", [tensor(np.zeros((2, 1, 3), np.float32))], **one, sequence_start=start)
        refused(422, "expected (frames, 3)", triton.infer, "channels", [tensor(np.zeros((1, 1, 2), np.float32))], **one, sequence_start=start)
        refused(408, "", triton.infer, "channels", [tensor()], **one, sequence_start=start, sequence_end=True, timeout=1)
        refused(422, "frame", triton.infer, "channels", [tensor(np.full((1, 1, 3), np.nan, np.float32))], **one, sequence_start=start, sequence_end=True)
    rest = triton.infer("channels", [tensor(CLIP[None, 10:])], **one, sequence_end=True)
    assert rest.as_numpy("scores")[0].tobytes() == expected[10:].tobytes()


def test_sequences_and_sessions_are_the_same(server: Server, triton: Any) -> None:
    expected = whole(server)
    with httpx.Client(base_url=server.url, headers={"authorization": f"Bearer {MANAGER}"}) as rest:
        session = rest.post("/v1/models/channels/sessions").json()["session"]
        rest.post(f"/v1/sessions/{session}/frames", json={"first": 0, "frames": CLIP[:10].tolist()}).raise_for_status()
        result = triton.infer("channels", [tensor(CLIP[None, 10:20])], sequence_id=session)
        assert result.as_numpy("scores")[0].tobytes() == expected[10:20].tobytes()
        answer = rest.post(f"/v1/sessions/{session}/frames?scores=all", json={"first": 20, "frames": CLIP[20:30].tolist()}).json()
        assert np.array_equal(np.array(answer["scores"], np.float32), expected[20:30])
        triton.infer("channels", [tensor(CLIP[None, 30:])], sequence_id=session, sequence_end=True)
        assert rest.get(f"/v1/sessions/{session}").status_code == 404

        triton.infer("channels", [tensor(CLIP[None, :10])], sequence_id=42, sequence_start=True)
        facts = rest.get("/v1/sessions/channels:uint64:42").json()
        assert facts["next_frame"] == 10
        assert facts["digest"] in [one["digest"] for one in rest.get("/v1/sessions").json()["sessions"]]
        rest.delete(f"/v1/sessions/{facts['digest']}").raise_for_status()
    refused(400, "START flag", triton.infer, "channels", [tensor()], sequence_id=42)


def test_statistics(triton: Any) -> None:
    def figures() -> Any:
        [one] = triton.get_inference_statistics("channels", "1")["model_stats"]
        return one

    before = figures()
    triton.infer("channels", [tensor(np.stack([CLIP] * 5))], model_version="1")
    with pytest.raises(utils.InferenceServerException):
        triton.infer("channels", [tensor(np.zeros((1, 1, 4), np.float32))], model_version="1")
    after = figures()
    assert (after["name"], after["version"]) == ("channels", "1")
    assert after["inference_count"] - before["inference_count"] == 5
    assert 1 <= after["execution_count"] - before["execution_count"] <= 10
    assert abs(after["last_inference"] / 1000 - time.time()) < 60
    for name in ("success", "queue", "compute_input", "compute_infer", "compute_output"):
        assert after["inference_stats"][name]["count"] - before["inference_stats"][name]["count"] == 5
        assert after["inference_stats"][name]["ns"] > before["inference_stats"][name]["ns"]
    assert after["inference_stats"]["fail"] == before["inference_stats"]["fail"]  # it could not be read: the model was not asked
    assert after["inference_stats"]["cache_hit"] == after["inference_stats"]["cache_miss"] == {"count": 0, "ns": 0}
    assert sum(one["compute_infer"]["count"] for one in after["batch_stats"]) == after["execution_count"]
    everything = triton.get_inference_statistics()["model_stats"]
    assert {("channels", "1"), ("channels", "2"), ("skeleton", "1")} <= {(one["name"], one["version"]) for one in everything}
    assert [one["version"] for one in triton.get_inference_statistics("channels")["model_stats"]] == ["1", "2"]


def test_models_are_loaded_and_unloaded(triton: Any) -> None:
    manager = {"Authorization": f"Bearer {MANAGER}"}
    for call in (triton.load_model, triton.unload_model):
        refused(403, "management token", call, "channels")
        refused(404, "no", call, "nobody", headers=manager)
    refused(400, "configuration", triton.load_model, "channels", headers=manager, config=json.dumps({}))
    triton.infer("moving", [tensor(CLIP[None, :2])], sequence_id=5, sequence_start=True)
    triton.unload_model("moving", headers=manager)
    assert triton.is_model_ready("moving") is False
    assert {one["state"] for one in triton.get_model_repository_index() if one["name"] == "moving"} == {"UNLOADING"}
    refused(503, "being unloaded", triton.infer, "moving", [tensor(CLIP[None, :2])], sequence_id=6, sequence_start=True)
    triton.infer("moving", [tensor(CLIP[None, 2:])], sequence_id=5, sequence_end=True)  # what was under way goes on to its end
    triton.load_model("moving", headers=manager)
    assert triton.is_model_ready("moving") is True
    files = {"file:1/model.onnx": b"onnx"}
    refused(403, "not taken over the network", triton.load_model, "channels", headers=manager, config=json.dumps({}), files=files)
    assert triton.is_model_ready("channels") is True


def test_what_is_not_offered(triton: Any) -> None:
    refused(501, "not supported", triton.get_system_shared_memory_status)
    refused(501, "not supported", triton.get_cuda_shared_memory_status)
    refused(501, "not supported", triton.get_trace_settings)
    refused(501, "not supported", triton.get_trace_settings, "channels")
    refused(501, "not supported", triton.get_log_settings)
    one = http.InferInput("frames", [1, 1, 3], "FP32")
    one.set_shared_memory("region", 12)
    refused(400, "shared memory", triton.infer, "channels", [one])


def both(server: Server) -> AbstractContextManager[list[Any]]:
    return each_of(CLIENTS.values(), server.url.removeprefix("http://"))


def test_a_token(models: Path, tmp_path: Path) -> None:
    with running(models, tmp_path / "log", INDRNN_TOKEN="correct horse") as server, both(server) as clients:
        for client in clients:
            assert client.is_server_live() is True
            assert client.is_server_ready() is True
            refused(401, "token", client.infer, "channels", [tensor()])
            refused(401, "token", client.get_server_metadata)
            headers = {"Authorization": "Bearer correct horse"}
            assert client.infer("channels", [tensor()], headers=headers).as_numpy("scores").shape == (1, 40, 4)


def test_expiry_capacity_and_strictness(models: Path, tmp_path: Path) -> None:
    changes = {"INDRNN_SESSIONS": "2", "INDRNN_IDLE_S": "0.6", "INDRNN_RESTART_SEQUENCES": "false"}
    with running(models, tmp_path / "log", **changes) as server, both(server) as clients:
        for sequence, client in enumerate(clients, 1):
            client.infer("channels", [tensor()], sequence_id=sequence, sequence_start=True)
        for sequence, client in enumerate(clients, 1):
            refused(429, "2 sessions are live", client.infer, "channels", [tensor()], sequence_id=3, sequence_start=True)
            refused(409, "under way", client.infer, "channels", [tensor()], sequence_id=sequence, sequence_start=True)
        time.sleep(1)
        words = "must specify the START flag on the first request of the sequence; it has expired"
        for sequence, client in enumerate(clients, 1):
            refused(400, words, client.infer, "channels", [tensor()], sequence_id=sequence)
            client.infer("channels", [tensor()], sequence_id=3, sequence_start=True, sequence_end=True)


def test_a_full_queue_changes_nothing(models: Path, tmp_path: Path) -> None:
    with running(models, tmp_path / "log", INDRNN_QUEUE="1", INDRNN_BODY_BYTES="8000000") as server, both(server) as clients:
        long = example_frames(SKELETON, 30_000)
        expected = whole(server, long[:40], "skeleton")
        for client in clients:
            client.infer("skeleton", [tensor(long[None, :20])], sequence_id=1, sequence_start=True)
            busy = threading.Thread(target=whole, args=(server, long, "skeleton"))
            busy.start()
            until = time.monotonic() + 10
            while httpx.get(f"{server.url}/v1/models/skeleton").json()["live"]["waiting"] == 0:
                assert time.monotonic() < until
            refused(503, "waiting", client.infer, "skeleton", [tensor(long[None, 20:40])], sequence_id=1)
            busy.join()
            rest = client.infer("skeleton", [tensor(long[None, 20:40])], sequence_id=1, sequence_end=True)
            assert rest.as_numpy("scores")[0].tobytes() == expected[20:].tobytes()


def test_the_readmes_example_runs_as_written(server: Server, tmp_path: Path) -> None:
    lines = run_readmes_example("tritonclient.http", "127.0.0.1:8000", server.url.removeprefix("http://"), tmp_path)
    assert lines[0] == "(1, 100, 4)"
    assert len(lines) == 4
