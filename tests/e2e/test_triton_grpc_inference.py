"""Clips over gRPC, with Triton's own client as it is: the bits of HTTP, batches, classes, numbers, compression."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.server_process import Server
from tests.toy_models import SKELETON, example_frames
from tests.triton_clients import CLIP, LABELS, run_readmes_example, whole
from tests.triton_over_grpc import FIXTURES, scores_of, service_pb2, steps, tensor, triton_grpc

http = pytest.importorskip("tritonclient.http")

models, served, server, triton, raw = FIXTURES


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


def test_the_readmes_example_runs_as_written(served: tuple[Server, str], tmp_path: Path) -> None:
    lines = run_readmes_example("tritonclient.grpc", "127.0.0.1:8001", served[1], tmp_path)
    assert lines[0] == "(1, 100, 4)"
    assert len(lines) == 4
