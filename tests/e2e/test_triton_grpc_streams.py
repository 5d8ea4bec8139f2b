"""Streams of requests over gRPC, with Triton's own client as it is: order, errors, time, a client that does not read."""

from __future__ import annotations

import asyncio
import time
from queue import Queue
from typing import Any

import numpy as np

from tests.server_process import Server
from tests.toy_models import CHANNELS, example_frames
from tests.triton_clients import CLIP, utils, whole
from tests.triton_over_grpc import FIXTURES, PREFIX, Blocking, figures, grpc, request_of, scores_of, service_pb2, service_pb2_grpc, steps, tensor

models, served, server, triton, raw = FIXTURES


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
