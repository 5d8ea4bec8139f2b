"""gRPC's messages to arrays and back, without a socket; faults are named."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytest.importorskip("google.protobuf", reason="protobuf is not installed (extra `grpc`): gRPC's messages are not tested")

from service.calls import Inference
from service.errors import Malformed
from service.grpc_messages import ModelInferRequest
from service.grpc_tensors import read_request, sequence_of, size_of, write_response
from service.metadata import INPUTS, OUTPUTS
from service.tensors import InferRequest, Step, Wanted

FRAMES = np.arange(6, dtype=np.float32).reshape(1, 2, 3)


def message(frames: np.ndarray[Any, Any] = FRAMES, **fields: Any) -> Any:
    request = ModelInferRequest(model_name="m", **fields)
    request.inputs.add(name="frames", datatype="FP32", shape=frames.shape)
    request.raw_input_contents.append(frames.tobytes())
    return request


def read(request: Any, wait_s: float | None = None) -> InferRequest:
    return read_request(ModelInferRequest.FromString(request.SerializeToString()), INPUTS, OUTPUTS, wait_s)


def parameters(request: Any, **values: Any) -> Any:
    kinds = {bool: "bool_param", int: "int64_param", str: "string_param", float: "double_param"}
    for name, value in values.items():
        setattr(request.parameters[name], kinds[type(value)], value)
    return request


def test_a_clip_in_raw_bytes() -> None:
    asked = read(message(id="7"))
    assert (asked.id, asked.step, asked.wait_s, asked.outputs) == ("7", None, None, (Wanted("scores", True),))
    assert asked.inputs["frames"].tobytes() == FRAMES.tobytes()
    assert asked.inputs["frames"].shape == FRAMES.shape
    assert read(message()).id is None


def test_a_clip_in_numbers() -> None:
    request = ModelInferRequest()
    request.inputs.add(name="frames", datatype="FP32", shape=[1, 2, 3]).contents.fp32_contents.extend([*range(5), np.nan])
    request.inputs.add(name="lengths", datatype="INT64", shape=[1]).contents.int64_contents.append(2**62)
    inputs = read(request).inputs
    assert inputs["frames"].dtype == np.float32
    assert np.array_equal(inputs["frames"].ravel(), [*range(5), np.nan], equal_nan=True)
    assert inputs["lengths"].tolist() == [2**62]


def test_tensors_without_elements() -> None:
    assert read(message(np.empty((1, 0, 3), np.float32))).inputs["frames"].shape == (1, 0, 3)
    request = ModelInferRequest()
    request.inputs.add(name="frames", datatype="FP32", shape=[0, 1, 3])
    assert read(request).inputs["frames"].shape == (0, 1, 3)


@pytest.mark.parametrize(("kind", "value"), [("int64_param", 5), ("uint64_param", 2**64 - 1), ("string_param", "größer")])
def test_a_step_of_a_sequence(kind: str, value: int | str) -> None:
    request = parameters(message(), sequence_start=True, sequence_end=False, sequence_step=40)
    setattr(request.parameters["sequence_id"], kind, value)
    assert read(request).step == Step(value, True, False, 40)
    assert sequence_of(request) == value


def test_no_sequence() -> None:
    for value in (0, ""):
        request = parameters(message(), sequence_id=value)
        assert read(request).step is None
        assert sequence_of(request) is None
    assert sequence_of(message()) is None


def test_the_shortest_wait_counts() -> None:
    request = parameters(message(), timeout=2_000_000)
    assert [read(request).wait_s, read(request, 5.0).wait_s, read(request, 0.5).wait_s, read(message(), 0.5).wait_s] == [2.0, 2.0, 0.5, 0.5]


def test_what_clients_of_other_models_ask_for_is_let_pass() -> None:
    read(parameters(message(), triton_enable_empty_final_response=True, priority=1, mine="x"))


def test_outputs_and_the_best_classes() -> None:
    request = message()
    request.outputs.add(name="scores").parameters["classification"].int64_param = 3
    assert read(request).outputs == (Wanted("scores", True, 3),)


def no_inputs(request: Any) -> None:
    del request.inputs[:]


def twice(request: Any) -> None:
    request.inputs.append(request.inputs[0])
    request.raw_input_contents.append(request.raw_input_contents[0])


def more_bytes(request: Any) -> None:
    request.raw_input_contents[0] += b"\0"


def more_contents(request: Any) -> None:
    request.raw_input_contents.append(b"")


def both(request: Any) -> None:
    request.inputs[0].contents.fp32_contents.append(1)


def other_numbers(request: Any) -> None:
    del request.raw_input_contents[:]
    request.inputs[0].contents.fp64_contents.extend([0.0] * 6)


def few_numbers(request: Any) -> None:
    del request.raw_input_contents[:]
    request.inputs[0].contents.fp32_contents.extend([0.0] * 5)


def shared(request: Any) -> None:
    request.inputs[0].parameters["shared_memory_region"].string_param = "x"


def shared_output(request: Any) -> None:
    request.outputs.add(name="scores").parameters["shared_memory_region"].string_param = "x"


def change(**fields: Any) -> Callable[[Any], None]:
    def apply(request: Any) -> None:
        for name, value in fields.items():
            if name == "shape":
                request.inputs[0].shape[:] = value
            else:
                setattr(request.inputs[0], name, value)

    return apply


def having(**values: Any) -> Callable[[Any], None]:
    def apply(request: Any) -> None:
        parameters(request, **values)

    return apply


def unset(request: Any) -> None:
    request.parameters["sequence_id"].SetInParent()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (no_inputs, "inputs must have tensors"),
        (twice, "frames comes twice"),
        (more_bytes, "makes 24 bytes, raw_input_contents has 25"),
        (more_contents, "2 entries for 1 inputs"),
        (both, "either in raw_input_contents or in contents"),
        (other_numbers, "belong into contents.fp32_contents, not into fp64_contents"),
        (few_numbers, "makes 6 elements, contents.fp32_contents has 5"),
        (shared, "shared memory is not supported"),
        (shared_output, "shared memory is not supported"),
        (change(name="state"), "unknown input 'state'"),
        (change(name=""), "unknown input ''"),
        (change(datatype="FP64"), "frames is FP64 but the model takes FP32"),
        (change(datatype="float"), "'float', which is no datatype,"),
        (change(shape=[-1, 2, 3]), "from 0 on, got [-1, 2, 3]"),
        (change(shape=[2**62, 2**62, 4]), "bytes"),
        (change(shape=[0, 2**62, 2**62]), "too large"),
        (change(shape=[1] * 40), "too large"),
        (having(sequence_id=-1), "got -1"),
        (having(sequence_id=1.0), "got 1.0"),
        (having(sequence_id=True), "got True"),
        (having(sequence_id="x" * 129), "longer than 128 bytes"),
        (having(sequence_start=True), "need a sequence_id"),
        (having(sequence_id=1, sequence_start=1), "true or false, got 1"),
        (having(sequence_id=1, sequence_step=-1), "from 0 on, got -1"),
        (having(timeout=-1), "from 0 on, got -1"),
        (having(timeout="1"), "got '1'"),
        (having(triton_x="1"), "'triton_x' is reserved"),
        (unset, "parameter 'sequence_id' of the request has no value"),
    ],
)
def test_faults_are_named(spoil: Callable[[Any], None], words: str) -> None:
    request = message()
    spoil(request)
    with pytest.raises(Malformed, match=r"\w") as caught:
        read(request)
    assert words in caught.value.message


def test_an_answer() -> None:
    scores, best = np.ones((1, 2, 4), np.float32)[:, ::-1], np.array([["0.5:1:größer".encode(), b""]], object)
    asked = InferRequest("7", {}, (Wanted("scores", True), Wanted("best", True, 2)), None, None)
    response = write_response(asked, "m", Inference("3", {"sequence_id": 2**64 - 1, "sequence_step": 2}, [scores, best]))
    assert (response.model_name, response.model_version, response.id) == ("m", "3", "7")
    assert [(one.name, one.datatype, list(one.shape)) for one in response.outputs] == [("scores", "FP32", [1, 2, 4]), ("best", "BYTES", [1, 2])]
    assert list(response.raw_output_contents) == [scores.tobytes(), b"\x0e\0\0\0" + "0.5:1:größer".encode() + b"\0\0\0\0"]
    assert (response.parameters["sequence_id"].uint64_param, response.parameters["sequence_step"].int64_param) == (2**64 - 1, 2)


def test_the_size_is_that_of_the_whole_request() -> None:
    """Wherever its bytes lie: what is under way of a stream is counted by it."""
    assert FRAMES.nbytes <= size_of(message()) < FRAMES.nbytes + 100
    request = ModelInferRequest()
    request.inputs.add(name="frames", datatype="FP32", shape=[1, 2, 3]).contents.fp32_contents.extend([1.0] * 6)
    assert size_of(request) >= FRAMES.nbytes
    assert size_of(message(id="x" * 10_000)) > 10_000
    both(more := message())
    more.inputs[0].contents.fp32_contents.extend([1.0] * 10_000)
    assert size_of(more) > 40_000


def many_outputs(request: Any) -> None:
    request.outputs.extend(type(request).InferRequestedOutputTensor() for _ in range(COUNT))


def many_axes(request: Any) -> None:
    request.inputs[0].shape.extend([0] * COUNT)


def many_parameters(request: Any) -> None:
    for number in range(COUNT):
        request.parameters[str(number)].bool_param = True


COUNT = 500_000


@pytest.mark.parametrize(
    ("spoil", "words"), [(many_outputs, "unknown output ''"), (many_axes, "too large"), (many_parameters, f"the request has {COUNT} parameters, more than")]
)
def test_lists_without_end_are_not_read_to_their_end(spoil: Callable[[Any], None], words: str) -> None:
    """A message of 64 MB has room for thirty million of them, and nothing else goes on meanwhile."""
    request = message()
    spoil(request)
    request = ModelInferRequest.FromString(request.SerializeToString())
    began = time.process_time()
    with pytest.raises(Malformed) as caught:
        read_request(request, INPUTS, OUTPUTS)
    assert words in caught.value.message
    assert time.process_time() - began < 0.02
