"""Sequences over gRPC, with Triton's own client as it is: however they are cut, crossed, repeated or spoilt, the bits of the whole; sessions like any other."""

from __future__ import annotations

from typing import Any

import httpx
import numpy as np
import pytest

from tests.server_process import Server
from tests.toy_models import CHANNELS, example_frames
from tests.triton_clients import CLIP, Floats, refused, whole
from tests.triton_over_grpc import FIXTURES, request_of, scores_of, steps, tensor

http = pytest.importorskip("tritonclient.http")

models, served, server, triton, raw = FIXTURES


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
