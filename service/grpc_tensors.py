"""Requests and answers of the Open Inference Protocol between gRPC's messages and arrays. No I/O.

A tensor's data lie in `raw_input_contents`, for all inputs in their order, little-endian and row-major, or as numbers in the field of its `contents`
that goes with its datatype. Answers are always raw.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from service.calls import Inference
from service.errors import Malformed
from service.grpc_messages import ModelInferResponse
from service.tensors import NUMPY, InferRequest, check_datatype, check_name, pack, read_outputs, read_shape, read_step, read_wait, refuse_reserved

_CONTENTS = {"FP32": "fp32_contents", "INT64": "int64_contents"}
_MOST_INT64 = 2**63 - 1
_MOST_AXES = 64  # that are looked at: `read_shape` refuses as many
_MOST_PARAMETERS = 1000
_OPTIONAL_END = "triton_enable_empty_final_response"  # asks for a message that only models with many answers to a request would send


def sequence_of(message: Any) -> int | str | None:
    """The sequence that a request says it belongs to, unchecked; None for a clip."""
    if "sequence_id" not in message.parameters:
        return None
    return _value(message.parameters["sequence_id"]) or None


def size_of(message: Any) -> int:
    """Bytes of the whole request, wherever in it they are."""
    size: int = message.ByteSize()
    return size


def read_request(message: Any, inputs: Mapping[str, str], outputs: Sequence[str], wait_s: float | None = None) -> InferRequest:
    """`inputs` are the names a request may send and their datatypes, `outputs` those it may ask for; it waits at most `wait_s`, and less where it says so.

    Raises `Malformed` naming the fault.
    """
    parameters = _parameters(message.parameters, "the request")
    parameters.pop(_OPTIONAL_END, None)
    refuse_reserved(parameters)
    own_wait_s = read_wait(parameters)
    asked = message.outputs[: len(outputs) + 1]  # among more than there are, one is unknown or comes twice
    listed = [{"name": one.name, "parameters": _parameters(one.parameters, f"output {one.name:.60}")} for one in asked]
    return InferRequest(
        message.id or None,
        _read_inputs(message, inputs),
        read_outputs(listed, outputs, True),
        read_step(parameters),
        min((one for one in (own_wait_s, wait_s) if one is not None), default=None),
    )


def write_response(asked: InferRequest, model: str, done: Inference) -> Any:
    """The answer as a message."""
    response = ModelInferResponse(model_name=model, model_version=done.version, id=asked.id or "")
    for name, value in done.parameters.items():
        set_parameter(response.parameters[name], value)
    for wanted, array in zip(asked.outputs, done.outputs, strict=True):
        text = array.dtype.hasobject
        response.outputs.add(name=wanted.name, datatype="BYTES" if text else "FP32", shape=array.shape)
        response.raw_output_contents.append(pack(array) if text else np.ascontiguousarray(array, NUMPY["FP32"]).tobytes())
    return response


def _parameters(given: Any, where: str) -> dict[str, Any]:
    if len(given) > _MOST_PARAMETERS:
        raise Malformed(f"{where} has {len(given)} parameters, more than {_MOST_PARAMETERS}")
    parameters = {}
    for name in given:
        value = _value(given[name])
        if value is None:
            raise Malformed(f"parameter {name!r:.60} of {where} has no value")
        parameters[name] = value
    return parameters


def _value(parameter: Any) -> Any:
    kind = parameter.WhichOneof("parameter_choice")
    return None if kind is None else getattr(parameter, kind)


def set_parameter(parameter: Any, value: int | float | str) -> None:
    """Gives a parameter of an answer its value."""
    if isinstance(value, str):
        parameter.string_param = value
    elif isinstance(value, float):
        parameter.double_param = value
    elif value <= _MOST_INT64:
        parameter.int64_param = value
    else:
        parameter.uint64_param = value


def _read_inputs(message: Any, known: Mapping[str, str]) -> dict[str, npt.NDArray[Any]]:
    tensors, raw = message.inputs, message.raw_input_contents
    if not tensors:
        raise Malformed(f"inputs must have tensors: {', '.join(known)}")
    arrays: dict[str, npt.NDArray[Any]] = {}
    for at, tensor in enumerate(tensors):
        name, datatype = tensor.name, tensor.datatype
        check_name(name, "input", known, arrays)
        shape = read_shape(list(tensor.shape[:_MOST_AXES]), name)
        check_datatype(name, datatype, known[name])
        if tensor.parameters and any(one.startswith("shared_memory") for one in _parameters(tensor.parameters, f"input {name}")):
            raise Malformed(f"input {name}: shared memory is not supported; send the data")
        if raw:
            arrays[name] = _from_raw(raw, at, len(tensors), tensor, shape)
        else:
            arrays[name] = _from_contents(tensor, shape)
    return arrays


def _from_raw(raw: Sequence[bytes], at: int, tensors: int, tensor: Any, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    name, dtype = tensor.name, NUMPY[tensor.datatype]
    if len(raw) != tensors:
        raise Malformed(f"raw_input_contents has {len(raw)} entries for {tensors} inputs: it has the data of all inputs, in their order, or nothing")
    if tensor.HasField("contents"):
        raise Malformed(f"input {name} must have its data either in raw_input_contents or in contents")
    data, count = raw[at], math.prod(shape)
    if len(data) != count * dtype.itemsize:
        raise Malformed(f"input {name}: shape {list(shape)} {tensor.datatype} makes {count * dtype.itemsize} bytes, raw_input_contents has {len(data)}")
    return np.frombuffer(data, dtype).reshape(shape) if count else np.empty(shape, dtype)


def _from_contents(tensor: Any, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    name, wanted = tensor.name, _CONTENTS[tensor.datatype]
    if others := [field.name for field, _ in tensor.contents.ListFields() if field.name != wanted]:
        raise Malformed(f"input {name}: numbers of {tensor.datatype} belong into contents.{wanted}, not into {', '.join(others)}")
    data, count = getattr(tensor.contents, wanted), math.prod(shape)
    if len(data) != count:
        raise Malformed(f"input {name}: shape {list(shape)} makes {count} elements, contents.{wanted} has {len(data)}")
    return np.array(data, NUMPY[tensor.datatype]).reshape(shape)
