"""Requests and answers as bytes: what goes in comes out in every form, and every fault is named."""

from __future__ import annotations

import contextlib
import json
import re
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from service.errors import Malformed
from service.tensors import DATATYPES, InferRequest, Step, Wanted, read_request, write_response

INPUTS, OUTPUTS = {"frames": "FP32", "lengths": "INT64"}, ("scores", "more")
FRAMES = np.arange(12, dtype=np.float32).reshape(2, 2, 3) / 7
Change = dict[str, Any]


def tensor(array: npt.NDArray[Any] = FRAMES, name: str = "frames", **changes: Any) -> dict[str, Any]:
    return {"name": name, "shape": list(array.shape), "datatype": INPUTS.get(name, "FP32"), "data": array.ravel().tolist(), **changes}


def binary(array: npt.NDArray[Any] = FRAMES, name: str = "frames", size: Any = None) -> dict[str, Any]:
    value = tensor(array, name, parameters={"binary_data_size": array.nbytes if size is None else size})
    del value["data"]
    return value


def read(value: Any, after: bytes | None = None, header: str | None = None) -> InferRequest:
    head = value if isinstance(value, bytes) else json.dumps(value).encode()
    if after is not None and header is None:
        header = str(len(head))
    return read_request(head + (after or b""), header, INPUTS, OUTPUTS)


def padded(spaces: int) -> bytes:
    """JSON of any length, so that the bytes behind it begin anywhere."""
    return json.dumps({"inputs": [binary()]}).encode() + b" " * spaces


def test_lists_flat_or_nested_and_bytes_are_the_same() -> None:
    for one in (
        read({"inputs": [tensor()]}),
        read({"inputs": [tensor(data=FRAMES.tolist())]}),
        read({"inputs": [tensor(data=FRAMES.reshape(2, 6).tolist())]}),
        *(read(padded(spaces), FRAMES.tobytes()) for spaces in range(8)),
    ):
        assert np.array_equal(one.inputs["frames"].astype(np.float32), FRAMES)
        assert one.inputs["frames"].flags.aligned


def test_tensors_may_lie_in_the_json_and_behind_it_in_any_order() -> None:
    lengths = np.array([2, 1])
    for listed, after in (
        ([binary(lengths, "lengths"), binary()], lengths.tobytes() + FRAMES.tobytes()),
        ([tensor(lengths, "lengths"), binary()], FRAMES.tobytes()),
        ([binary(), tensor(lengths, "lengths")], FRAMES.tobytes()),
    ):
        found = read({"inputs": listed}, after).inputs
        assert np.array_equal(found["frames"], FRAMES)
        assert np.array_equal(found["lengths"], lengths)


def test_bytes_are_not_copied_where_they_lie_well() -> None:
    spaces = -len(padded(0)) % 16
    assert not read(padded(spaces), FRAMES.tobytes()).inputs["frames"].flags.owndata


def test_a_tensor_of_no_elements() -> None:
    nothing = np.zeros((1, 0, 3), np.float32)
    for one in (read({"inputs": [tensor(nothing)]}), read({"inputs": [binary(nothing)]}, b""), read({"inputs": [tensor(nothing, data=[[]])]})):
        assert one.inputs["frames"].shape == (1, 0, 3)


def test_null_is_what_is_missing() -> None:
    flat = read({"inputs": [tensor(data=[0, None, 2, *range(9)])]}).inputs["frames"]
    assert np.isnan(flat).sum() == 1
    assert np.isnan(flat[0, 0, 1])
    joint = read({"inputs": [tensor(data=[[[0, 1, 2], None], [[3, 4, 5], [6, 7, 8]]])]}).inputs["frames"]
    assert np.isnan(joint).sum() == 3
    assert np.isnan(joint[0, 1]).all()


def test_what_is_said_beside_the_tensors() -> None:
    value = {"id": "a", "model_name": "ignored", "inputs": [tensor(unknown=1)], "parameters": {"timeout": 1500, "priority": 1, "own": "x"}}
    one = read(value)
    assert (one.id, one.step, one.wait_s) == ("a", None, 0.0015)
    assert one.outputs == (Wanted("scores", False), Wanted("more", False))
    value["parameters"] = {"sequence_id": 2**64 - 1, "sequence_start": True, "sequence_step": 3, "timeout": 0, "binary_data_output": True}
    value["outputs"] = [{"name": "more", "parameters": {"binary_data": False}}, {"name": "scores", "parameters": {"classification": 2}}]
    one = read(value)
    assert (one.step, one.wait_s) == (Step(2**64 - 1, True, False, 3), None)
    assert one.outputs == (Wanted("more", False), Wanted("scores", True, 2))
    for nothing in (0, "", None):
        parameters = {} if nothing is None else {"sequence_id": nothing}
        assert read({"inputs": [tensor()], "outputs": [], "parameters": parameters}).step is None
    assert read({"inputs": [tensor()], "parameters": {"sequence_id": "7"}}).step == Step("7", False, False, None)


FAULTS: dict[str, tuple[Any, str]] = {
    "no inputs": ({}, "inputs must be a list"),
    "an empty list of inputs": ({"inputs": []}, "inputs must be a list"),
    "a list": ([], "expected a JSON object"),
    "no object": ({"inputs": ["frames"]}, "each input must be an object"),
    "no name": ({"inputs": [{}]}, "with a name"),
    "an unknown name": ({"inputs": [tensor(name="state")]}, "unknown input 'state'; the model has frames, lengths"),
    "twice": ({"inputs": [tensor(), tensor()]}, "frames comes twice"),
    "no datatype": ({"inputs": [tensor(datatype=None)]}, "None, which is no datatype"),
    "no shape": ({"inputs": [tensor(shape=None)]}, "shape of input frames"),
    "a negative size": ({"inputs": [tensor(shape=[2, -2, -3])]}, "shape of input frames"),
    "a size that is true": ({"inputs": [tensor(shape=[True, 4, 3])]}, "shape of input frames"),
    "a size beyond all memory": ({"inputs": [tensor(shape=[2**63, 2**63])]}, "elements, data has 12"),
    "a size beyond 64 bits": ({"inputs": [tensor(shape=[2**64])]}, "shape of input frames"),
    "nothing of too many": ({"inputs": [tensor(shape=[0, 2**62, 3], data=[])]}, "too large"),
    "too many axes": ({"inputs": [tensor(shape=[1] * 70, data=[1])]}, "too large"),
    "neither data nor bytes": ({"inputs": [{"name": "frames", "shape": [1], "datatype": "FP32"}]}, "either data or"),
    "data and bytes": ({"inputs": [tensor(parameters={"binary_data_size": 48})]}, "either data or"),
    "bytes without the header": ({"inputs": [binary()]}, "header Inference-Header-Content-Length is missing"),
    "shared memory": ({"inputs": [tensor(parameters={"shared_memory_region": "a"})]}, "shared memory"),
    "shared memory for an output": ({"inputs": [tensor()], "outputs": [{"name": "scores", "parameters": {"shared_memory_region": "a"}}]}, "shared memory"),
    "too few elements": ({"inputs": [tensor(data=[1.0])]}, "makes 12 elements, data has 1"),
    "lists and numbers": ({"inputs": [tensor(data=[[1], 2])]}, "side by side"),
    "nested too deeply": ({"inputs": [tensor(data=[FRAMES.tolist()])]}, "nested more deeply"),
    "a string among numbers": ({"inputs": [tensor(data=["1", *range(11)])]}, "'1' is not a number"),
    "true among numbers": ({"inputs": [tensor(data=[True, *range(11)])]}, "True is not a number"),
    "half a frame": ({"inputs": [tensor(np.array([1]), "lengths", data=[0.5])]}, "0.5 is not a whole number"),
    "a length that is null": ({"inputs": [tensor(np.array([1]), "lengths", data=[None])]}, "None is not a whole number"),
    "a length beyond 64 bits": ({"inputs": [tensor(np.array([1]), "lengths", data=[2**63])]}, "out of the range"),
    "null for a clip as long as one likes": ({"inputs": [tensor(shape=[2, 2**40], data=[None, [1]])]}, "null stands for more"),
    "many nulls for long clips": ({"inputs": [tensor(shape=[1, 2**24], data=[[1], *[None] * 1000])]}, "null stands for more"),
    "data that is no list": ({"inputs": [tensor(data="abc")]}, "must be a list"),
    "NaN": (b'{"inputs": [{"name": "frames", "shape": [1], "datatype": "FP32", "data": [NaN]}]}', "not JSON"),
    "cut JSON": (b'{"inputs": [', "not JSON"),
    "deep JSON": (b'{"inputs": ' + b"[" * 3000 + b"]" * 3000 + b"}", "not JSON"),
    "an id that is a number": ({"inputs": [tensor()], "id": 7}, "id must be a string"),
    "parameters that are a list": ({"inputs": [tensor()], "parameters": []}, "parameters of the request must be an object"),
    "a parameter that is a list": ({"inputs": [tensor()], "parameters": {"a": []}}, "parameter 'a'"),
    "a reserved parameter": ({"inputs": [tensor()], "parameters": {"triton_x": 1}}, "reserved"),
    "headers": ({"inputs": [tensor()], "parameters": {"headers": "x"}}, "reserved"),
    "a negative timeout": ({"inputs": [tensor()], "parameters": {"timeout": -1}}, "parameter timeout"),
    "a negative sequence": ({"inputs": [tensor()], "parameters": {"sequence_id": -1}}, "sequence_id must be"),
    "a sequence beyond 64 bits": ({"inputs": [tensor()], "parameters": {"sequence_id": 2**64}}, "sequence_id must be"),
    "a sequence that is true": ({"inputs": [tensor()], "parameters": {"sequence_id": True}}, "sequence_id must be"),
    "a long sequence": ({"inputs": [tensor()], "parameters": {"sequence_id": "a" * 129}}, "longer than 128 bytes"),
    "a start that is a number": ({"inputs": [tensor()], "parameters": {"sequence_id": 1, "sequence_start": 1}}, "sequence_start must be true or false"),
    "a start of nothing": ({"inputs": [tensor()], "parameters": {"sequence_start": True}}, "need a sequence_id"),
    "a step of nothing": ({"inputs": [tensor()], "parameters": {"sequence_step": 0}}, "need a sequence_id"),
    "a step that is a float": ({"inputs": [tensor()], "parameters": {"sequence_id": 1, "sequence_step": 1.0}}, "sequence_step must be a whole number"),
    "an unknown output": ({"inputs": [tensor()], "outputs": [{"name": "state"}]}, "unknown output 'state'; the model has scores, more"),
    "an output twice": ({"inputs": [tensor()], "outputs": [{"name": "more"}, {"name": "more"}]}, "more comes twice"),
    "outputs that are an object": ({"inputs": [tensor()], "outputs": {"name": "more"}}, "outputs must be a list"),
    "a form that is a string": ({"inputs": [tensor()], "outputs": [{"name": "more", "parameters": {"binary_data": "yes"}}]}, "binary_data must be true"),
    "a negative number of classes": ({"inputs": [tensor()], "outputs": [{"name": "more", "parameters": {"classification": -1}}]}, "classification must be"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_of_the_json_are_named(name: str) -> None:
    value, words = FAULTS[name]
    with pytest.raises(Malformed, match=re.escape(words)):
        read(value)


@pytest.mark.parametrize("datatype", [*DATATYPES, "FP31"])
@pytest.mark.parametrize("name", INPUTS)
def test_only_the_models_own_datatype_is_taken(name: str, datatype: str) -> None:
    array = np.ones((1, 1, 3), np.float32 if name == "frames" else np.int64)
    for value, after in ((tensor(array, name, datatype=datatype), None), ({**binary(array, name), "datatype": datatype}, array.tobytes())):
        if datatype == INPUTS[name]:
            assert np.array_equal(read({"inputs": [value]}, after).inputs[name], array)
        else:
            with pytest.raises(Malformed, match=f"input {name} is .*{datatype}.*the model takes {INPUTS[name]}"):
                read({"inputs": [value]}, after)


BINARY_FAULTS: dict[str, tuple[Any, bytes, str | None, str]] = {
    "a byte too few": (binary(), FRAMES.tobytes()[:-1], None, "48 bytes are announced, 47 are left"),
    "a byte too many": (binary(), FRAMES.tobytes() + b"x", None, "1 bytes after the last tensor"),
    "another size than the shape's": (binary(size=44), FRAMES.tobytes()[:44], None, "makes 48 bytes, binary_data_size is 44"),
    "a size that is a float": (binary(size=48.0), FRAMES.tobytes(), None, "binary_data_size must be a whole number"),
    "a negative size": (binary(size=-48), FRAMES.tobytes(), None, "binary_data_size must be a whole number"),
    "a size beyond 64 bits": (binary(size=2**63), FRAMES.tobytes(), None, "are announced"),
    "a negative header": (binary(), FRAMES.tobytes(), "-1", "must be a whole number"),
    "a header that is no number": (binary(), FRAMES.tobytes(), "all", "must be a whole number"),
    "a header of odd digits": (binary(), FRAMES.tobytes(), "²", "must be a whole number"),
    "a header of many digits": (binary(), FRAMES.tobytes(), "9" * 5000, "must be a whole number"),
    "a header beyond the body": (binary(), FRAMES.tobytes(), "100000", "the body has"),
    "a header that cuts the JSON": (binary(), FRAMES.tobytes(), "20", "not JSON"),
    "no JSON at all": (binary(), FRAMES.tobytes(), "0", "without JSON"),
}


@pytest.mark.parametrize("name", BINARY_FAULTS)
def test_faults_of_the_bytes_are_named(name: str) -> None:
    value, after, header, words = BINARY_FAULTS[name]
    with pytest.raises(Malformed, match=re.escape(words)):
        read({"inputs": [value]}, after, header)


def test_an_empty_body() -> None:
    with pytest.raises(Malformed, match="empty"):
        read_request(b"", None, INPUTS, OUTPUTS)


@given(st.binary(max_size=300), st.none() | st.integers(-1, 310).map(str))
def test_whatever_comes_is_read_or_refused(body: bytes, header: str | None) -> None:
    with contextlib.suppress(Malformed):
        assert read_request(body, header, INPUTS, OUTPUTS).inputs


SCORES = arrays.arrays(np.float32, arrays.array_shapes(max_dims=3, max_side=4), elements=st.floats(width=32, allow_nan=False, allow_infinity=False))


@given(SCORES, SCORES, st.booleans(), st.booleans())
def test_answers_are_the_same_bits_in_every_form(scores: npt.NDArray[Any], more: npt.NDArray[Any], one_binary: bool, other_binary: bool) -> None:
    request = InferRequest("id", {}, (Wanted("more", one_binary), Wanted("scores", other_binary)), None, None)
    body, length = write_response(request, "m", "3", {"sequence_id": 2**64 - 1}, [more, scores])
    assert (length is None) == (not one_binary and not other_binary)
    value, rest = json.loads(body[:length]), body[length:] if length is not None else b""
    assert {name: value[name] for name in ("id", "model_name", "model_version")} == {"id": "id", "model_name": "m", "model_version": "3"}
    assert value["parameters"] == {"sequence_id": 2**64 - 1}
    assert [one["name"] for one in value["outputs"]] == ["more", "scores"]
    for one, expected in zip(value["outputs"], (more, scores), strict=True):
        if "data" in one:
            found = np.array(one["data"], np.float32)
        else:
            size = one["parameters"]["binary_data_size"]
            found, rest = np.frombuffer(rest[:size], "<f4"), rest[size:]
        assert one["datatype"] == "FP32"
        assert found.reshape(one["shape"]).tobytes() == expected.tobytes()
    assert not rest


def test_bytes_as_answers() -> None:
    labels = np.array([[b"", "größer".encode()]], object)
    request = InferRequest(None, {}, (Wanted("scores", False, 2), Wanted("more", True, 2)), None, None)
    body, length = write_response(request, "m", "1", {}, [labels, labels])
    value = json.loads(body[:length])
    assert set(value) == {"model_name", "model_version", "outputs"}
    assert value["outputs"][0] == {"name": "scores", "datatype": "BYTES", "shape": [1, 2], "data": ["", "größer"]}
    assert value["outputs"][1]["parameters"] == {"binary_data_size": 16}
    assert body[length:] == b"\0\0\0\0\x08\0\0\0" + "größer".encode()


def test_a_head_that_comes_again_is_read_with_the_bytes_that_come_with_it() -> None:
    lengths = np.array([2, 1])
    head = {"inputs": [tensor(lengths, "lengths"), binary()], "parameters": {"sequence_id": 7}, "id": "one"}
    for factor in (1, 2, 3):
        one = read(head, (factor * FRAMES).tobytes())
        assert np.array_equal(one.inputs["frames"], factor * FRAMES)
        assert np.array_equal(one.inputs["lengths"], lengths)
        assert (one.id, one.step) == ("one", Step(7, False, False, None))
    for after in (FRAMES.tobytes()[:-1], FRAMES.tobytes() + b"x"):
        for _ in range(2):
            with pytest.raises(Malformed, match=r"left of the body|after the last tensor"):
                read(head, after)
    with pytest.raises(Malformed, match="the model has lengths"):
        read_request(json.dumps(head).encode() + FRAMES.tobytes(), str(len(json.dumps(head))), {"lengths": "INT64"}, OUTPUTS)
