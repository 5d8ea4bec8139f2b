"""Clients and services over gRPC that end in the midst of it: cancelled, too late, killed, shut down."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from queue import Queue
from typing import Any

import httpx
import numpy as np
import pytest

from tests.server_process import Server
from tests.toy_models import SKELETON, example_frames
from tests.triton_clients import CLIP, whole
from tests.triton_over_grpc import FIXTURES, PREFIX, Blocking, figures, grpc, request_of, scores_of, service_pb2_grpc, serving, steps, triton_grpc, wait_until

models, served, server, triton, raw = FIXTURES

LONG = 40_000  # frames that take the service longer than it takes to ask how it stands
PATIENT = {"INDRNN_DEADLINE_S": "60", "INDRNN_DRAIN_S": "60"}


def waiting(server: Server, model: str) -> int:
    """Messages that wait or run."""
    return int(httpx.get(f"{server.url}/v1/models/{model}").json()["live"]["waiting"])


def test_who_leaves_before_his_turn_changes_nothing(models: Path, tmp_path: Path) -> None:
    with serving(models, tmp_path / "log", **PATIENT) as (server, address), grpc.insecure_channel(address) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        clip = example_frames(SKELETON, LONG)
        expected = whole(server, clip, "skeleton")
        ask: dict[str, Any] = {"model": "skeleton", "sequence": 1}
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
