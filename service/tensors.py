"""Requests and answers of the Open Inference Protocol (version 2, REST) between bytes and arrays. No I/O, and nothing of models but their tensors' names.

A request is a JSON object; tensors lie in it as lists, flat or nested, or behind it as bytes, little-endian and row-major, each as long as its
`binary_data_size` says. Then a header tells how long the JSON is. Answers are the same the other way round.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Collection, Container, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from service.errors import Malformed
from service.protocol import encode, read_object

DATATYPES = (
    "BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64", "FP16", "BF16", "FP32", "FP64", "BYTES",
)  # fmt: skip
MOST_SEQUENCES = 2**64 - 1  # the largest number a sequence may have
LONGEST_ID = 128  # bytes of a sequence's or a session's id

NUMPY: dict[str, np.dtype[Any]] = {"FP32": np.dtype("<f4"), "INT64": np.dtype("<i8")}  # of what models take
_LONG = struct.Struct("<I")
_LONGEST_HEAD = 1024  # bytes of JSON that are worth remembering
_MOST_AXES = 32
_MOST_NULLS = 2**24  # elements of a tensor in which null may stand for many: a short request must not make a large array


@dataclass(frozen=True, slots=True)
class Wanted:
    """An output as the client wants it: as bytes or JSON, whole or (`classes` > 0) as that many best classes."""

    name: str
    binary: bool
    classes: int = 0


@dataclass(frozen=True, slots=True)
class Step:
    """Where a request stands in a sequence. `first` is the number of its first frame, where the client counts them."""

    sequence: int | str
    start: bool
    end: bool
    first: int | None


@dataclass(frozen=True, slots=True)
class InferRequest:
    """A request that reads well; whether its shapes fit the model is not yet said."""

    id: str | None
    inputs: dict[str, npt.NDArray[Any]]
    outputs: tuple[Wanted, ...]
    step: Step | None  # None: a clip
    wait_s: float | None  # longest time to wait for the model


@dataclass(frozen=True, slots=True)
class Tensor:
    """An input as the JSON describes it: with its elements, or with the number of bytes behind the JSON that are its own."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    size: int
    elements: npt.NDArray[Any] | None


@dataclass(frozen=True, slots=True)
class Head:
    """All that the JSON of a request says."""

    id: str | None
    tensors: tuple[Tensor, ...]
    outputs: tuple[Wanted, ...]
    step: Step | None
    wait_s: float | None

    def is_lean(self) -> bool:
        """Whether this is nothing but frames of a sequence under way, behind the JSON, whose scores are wanted as bytes: what streams send again and again."""
        step, outputs = self.step, self.outputs
        if step is None or step.start or step.end or self.wait_s is not None or len(self.tensors) != 1 or len(outputs) != 1:
            return False
        only = self.tensors[0]
        fits = only.elements is None and len(only.shape) > 2 and only.shape[0] == 1 and only.size == 4 * math.prod(only.shape)
        return fits and only.datatype == "FP32" and outputs[0].binary and not outputs[0].classes


def read_request(body: bytes, header: str | None, inputs: Mapping[str, str], outputs: Sequence[str]) -> InferRequest:
    """`header` is that of the JSON's length, `inputs` the names a request may send and their datatypes, `outputs` those it may ask for.

    Raises `Malformed` naming the fault.
    """
    text, rest = _split(body, header)
    if rest is None or len(text) > _LONGEST_HEAD:
        head = _read_head(text, inputs, outputs)
    else:
        head, _ = _remembered_head(text, tuple(inputs.items()), tuple(outputs))
    return InferRequest(head.id, _arrays(head.tensors, rest), head.outputs, head.step, head.wait_s)


def split_lean(body: bytes, header: str, inputs: Mapping[str, str], outputs: Sequence[str]) -> tuple[Head, memoryview] | None:
    """The JSON of a request that is lean, and the bytes behind it; None for any other. Arguments and errors as of `read_request`."""
    text, rest = _split(body, header)
    if rest is None or len(text) > _LONGEST_HEAD:
        return None
    head, lean = _remembered_head(text, tuple(inputs.items()), tuple(outputs))
    return (head, rest) if lean else None


@lru_cache(512)
def _remembered_head(text: bytes, inputs: tuple[tuple[str, str], ...], outputs: tuple[str, ...]) -> tuple[Head, bool]:
    """The requests of a stream begin with the same JSON again and again, and only the bytes behind it differ. Says also whether it is lean."""
    head = _read_head(text, dict(inputs), outputs)
    return head, head.is_lean()


def _read_head(text: bytes, inputs: Mapping[str, str], outputs: Sequence[str]) -> Head:
    value = read_object(text)
    parameters = _parameters(value, "the request")
    request_id = value.get("id")
    if not isinstance(request_id, str | None):
        raise Malformed(f"id must be a string, got {request_id!r:.60}")
    refuse_reserved(parameters)
    return Head(
        request_id,
        _read_inputs(value.get("inputs"), inputs),
        read_outputs(value.get("outputs"), outputs, _flag(parameters, "binary_data_output")),
        read_step(parameters),
        read_wait(parameters),
    )


def write_response(
    request: InferRequest, model: str, version: str, parameters: Mapping[str, Any], outputs: Sequence[npt.NDArray[Any]]
) -> tuple[bytes, int | None]:
    """The body, and how long the JSON in it is where bytes follow; `outputs` are float32 or bytes, in the order the request wants them."""
    described, parts = [], []
    for wanted, array in zip(request.outputs, outputs, strict=True):
        value: dict[str, Any] = {"name": wanted.name, "datatype": "BYTES" if array.dtype.hasobject else "FP32", "shape": array.shape}
        if wanted.binary:
            part = pack(array) if array.dtype.hasobject else np.ascontiguousarray(array, NUMPY["FP32"]).tobytes()
            value["parameters"] = {"binary_data_size": len(part)}
            parts.append(part)
        else:
            value["data"] = [item.decode() for item in array.ravel()] if array.dtype.hasobject else np.ascontiguousarray(array).ravel()
        described.append(value)
    answer: dict[str, Any] = {"model_name": model, "model_version": version, "outputs": described}
    if request.id is not None:
        answer["id"] = request.id
    if parameters:
        answer["parameters"] = parameters
    head = encode(answer)
    return (b"".join([head, *parts]), len(head)) if parts else (head, None)


def write_lean_response(head: Head, step: Step, model: str, version: str, next_step: int, count: int, scores: bytes) -> tuple[bytes, int]:
    """As `write_response` to a lean request: `scores` of `count` frames, and the sequence's next step."""
    written = _lean_prefix(head.id, model, version, head.outputs[0].name, step.sequence, count, len(scores)) + b"%d}}" % next_step
    return written + scores, len(written)


@lru_cache(512)
def _lean_prefix(request_id: str | None, model: str, version: str, name: str, sequence: int | str, count: int, size: int) -> bytes:
    """All but the number of the step, which is what differs between the answers of a sequence."""
    shape = (1, count, size // count // 4)
    output = {"name": name, "datatype": "FP32", "shape": shape, "parameters": {"binary_data_size": size}}
    answer: dict[str, Any] = {"model_name": model, "model_version": version, "outputs": [output]}
    if request_id is not None:
        answer["id"] = request_id
    answer["parameters"] = {"sequence_id": sequence, "sequence_step": 0}
    return encode(answer).removesuffix(b"0}}")


def _split(body: bytes, header: str | None) -> tuple[bytes, memoryview | None]:
    if not body:
        raise Malformed("the body is empty: expected a JSON object with inputs")
    if header is None:
        return body, None
    if not (header.isascii() and header.isdecimal()) or len(header) > 18:
        raise Malformed(f"the header Inference-Header-Content-Length must be a whole number, got {header!r:.60}")
    size = int(header)
    if size > len(body):
        raise Malformed(f"the header Inference-Header-Content-Length says {size} bytes, the body has {len(body)}")
    if size == 0:
        raise Malformed("a body without JSON is not supported here: describe the inputs in a JSON object before their bytes")
    return body[:size], memoryview(body)[size:]


def _parameters(value: Mapping[str, Any], where: str) -> dict[str, Any]:
    parameters = value.get("parameters")
    if parameters is None:
        return {}
    if not isinstance(parameters, dict):
        raise Malformed(f"parameters of {where} must be an object, got {parameters!r:.60}")
    for name, one in parameters.items():
        if not isinstance(one, str | int | float):
            raise Malformed(f"parameter {name!r:.60} of {where} must be a string, a number, true or false, got {one!r:.60}")
    return parameters


def refuse_reserved(parameters: Mapping[str, Any]) -> None:
    """Raises `Malformed` for names that the protocol keeps for itself."""
    for name in parameters:
        if name == "headers" or name.startswith("triton_"):
            raise Malformed(f"parameter {name!r:.60} is reserved and means nothing here")


def _flag(parameters: Mapping[str, Any], name: str) -> bool:
    value = parameters.get(name, False)
    if not isinstance(value, bool):
        raise Malformed(f"parameter {name} must be true or false, got {value!r:.60}")
    return value


def _number(parameters: Mapping[str, Any], name: str) -> int | None:
    value = parameters.get(name)
    if value is not None and (type(value) is not int or value < 0):
        raise Malformed(f"parameter {name} must be a whole number from 0 on, got {value!r:.60}")
    return value


def read_step(parameters: Mapping[str, Any]) -> Step | None:
    """The step of a sequence that the request is, None for a clip."""
    sequence = parameters.get("sequence_id", 0)
    start, end, first = _flag(parameters, "sequence_start"), _flag(parameters, "sequence_end"), _number(parameters, "sequence_step")
    if isinstance(sequence, str):
        if len(sequence.encode("utf-8", "surrogatepass")) > LONGEST_ID:
            raise Malformed(f"sequence_id is longer than {LONGEST_ID} bytes")
    elif type(sequence) is not int or not 0 <= sequence <= MOST_SEQUENCES:
        raise Malformed(f"sequence_id must be a string or a whole number from 0 to 2**64 - 1, got {sequence!r:.60}")
    if sequence:
        return Step(sequence, start, end, first)
    if start or end or first is not None:
        raise Malformed("sequence_start, sequence_end and sequence_step need a sequence_id other than 0 or the empty string")
    return None


def read_wait(parameters: Mapping[str, Any]) -> float | None:
    """Seconds that the request may wait for the model, None where it does not say."""
    _number(parameters, "priority")  # no request goes before another here
    microseconds = _number(parameters, "timeout")
    return microseconds / 1e6 if microseconds else None


def _read_inputs(listed: Any, known: Mapping[str, str]) -> tuple[Tensor, ...]:
    if not isinstance(listed, list) or not listed:
        raise Malformed(f"inputs must be a list of tensors: {', '.join(known)}")
    tensors: dict[str, Tensor] = {}
    for tensor in listed:
        name = _name(tensor, "input", known, tensors)
        datatype, shape = tensor.get("datatype"), read_shape(tensor.get("shape"), name)
        check_datatype(name, datatype, known[name])
        parameters = _parameters(tensor, f"input {name}")
        if any(one.startswith("shared_memory") for one in parameters):
            raise Malformed(f"input {name}: shared memory is not supported; send the data")
        size = _number(parameters, "binary_data_size")
        if (size is None) == ("data" not in tensor):
            raise Malformed(f"input {name} must have either data or parameters.binary_data_size")
        tensors[name] = Tensor(name, datatype, shape, size or 0, _from_json(tensor["data"], name, datatype, shape) if size is None else None)
    return tuple(tensors.values())


def _arrays(tensors: Sequence[Tensor], rest: memoryview | None) -> dict[str, npt.NDArray[Any]]:
    arrays: dict[str, npt.NDArray[Any]] = {}
    at = 0
    for tensor in tensors:
        arrays[tensor.name] = _from_bytes(tensor, rest, at) if tensor.elements is None else tensor.elements
        at += tensor.size
    if rest is not None and at < len(rest):
        raise Malformed(f"unexpected additional input data: {len(rest) - at} bytes after the last tensor")
    return arrays


def _name(tensor: Any, kind: str, known: Any, seen: Any) -> str:
    name = tensor.get("name") if isinstance(tensor, dict) else None
    if not isinstance(name, str):
        raise Malformed(f"each {kind} must be an object with a name, got {tensor!r:.60}")
    check_name(name, kind, known, seen)
    return name


def check_name(name: str, kind: str, known: Collection[str], seen: Container[str]) -> None:
    """Raises `Malformed` for a tensor that the model does not have or that came before; `kind` is input or output."""
    if name not in known:
        raise Malformed(f"unknown {kind} {name!r:.60}; the model has {', '.join(known)}")
    if name in seen:
        raise Malformed(f"{kind} {name} comes twice")


def check_datatype(name: str, datatype: Any, wanted: str) -> None:
    """Raises `Malformed` unless the input has the datatype that the model takes: nothing is cast."""
    if datatype != wanted:
        spoken = datatype if datatype in DATATYPES else f"{datatype!r:.60}, which is no datatype,"
        raise Malformed(f"input {name} is {spoken} but the model takes {wanted}")


def read_shape(value: Any, name: str) -> tuple[int, ...]:
    """The shape of an input; raises `Malformed` for what is none or too large."""
    if not isinstance(value, list) or not all(type(size) is int and size >= 0 for size in value):
        raise Malformed(f"shape of input {name} must be a list of whole numbers from 0 on, got {value!r:.60}")
    if len(value) > _MOST_AXES or (math.prod(value) == 0 and math.prod(filter(None, value)) > _MOST_NULLS):  # NumPy makes no array of these
        raise Malformed(f"shape {value!r:.60} of input {name} is too large")
    return tuple(value)


def _from_bytes(tensor: Tensor, rest: memoryview | None, at: int) -> npt.NDArray[Any]:
    name, datatype, shape, size = tensor.name, tensor.datatype, tensor.shape, tensor.size
    if rest is None:
        raise Malformed(f"input {name} has a binary_data_size, but the header Inference-Header-Content-Length is missing")
    if at + size > len(rest):
        raise Malformed(f"input {name}: {size} bytes are announced, {len(rest) - at} are left of the body")
    dtype = NUMPY[datatype]
    count = math.prod(shape)
    if size != count * dtype.itemsize:
        raise Malformed(f"input {name}: shape {list(shape)} {datatype} makes {count * dtype.itemsize} bytes, binary_data_size is {size}")
    array = np.frombuffer(rest, dtype, count, at).reshape(shape) if count else np.empty(shape, dtype)
    return array if array.flags.aligned else array.copy()  # the JSON before it may have any length


def _from_json(data: Any, name: str, datatype: str, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """Numbers; where they may be missing, None is, or in lists nested as `shape` says, for all below it."""
    if not isinstance(data, list):
        raise Malformed(f"data of input {name} must be a list, got {type(data).__name__}")
    kinds = set(map(type, data))
    for level in range(1, len(shape)):
        if list not in kinds:
            break
        if not kinds <= {list, type(None)}:
            raise Malformed(f"data of input {name}: lists and numbers side by side")
        if type(None) in kinds and not len(data) * shape[level] <= math.prod(shape) <= _MOST_NULLS:
            raise Malformed(f"data of input {name}: null stands for more than its shape {list(shape)} has, or than a request may leave out")
        data = list(chain.from_iterable([None] * shape[level] if item is None else item for item in data))
        kinds = set(map(type, data))
    if list in kinds:
        raise Malformed(f"data of input {name} is nested more deeply than its shape {list(shape)}")
    allowed = {int} if datatype == "INT64" else {int, float, type(None)}
    if not kinds <= allowed:
        wrong = next(item for item in data if type(item) not in allowed)
        raise Malformed(f"data of input {name}: {wrong!r:.60} is not {'a whole number' if datatype == 'INT64' else 'a number'}")
    if len(data) != math.prod(shape):
        raise Malformed(f"input {name}: shape {list(shape)} makes {math.prod(shape)} elements, data has {len(data)}")
    if type(None) in kinds:
        data = [math.nan if item is None else item for item in data]
    try:
        array = np.array(data, np.int64 if datatype == "INT64" else np.float64).reshape(shape)
    except OverflowError:
        raise Malformed(f"data of input {name}: a number is out of the range of {datatype}") from None
    array.setflags(write=False)  # it may be remembered
    return array


def read_outputs(listed: Any, known: Sequence[str], binary: bool) -> tuple[Wanted, ...]:
    """No list, or an empty one, asks for all outputs."""
    if listed is None or listed == []:
        return tuple(Wanted(name, binary) for name in known)
    if not isinstance(listed, list):
        raise Malformed(f"outputs must be a list, got {listed!r:.60}")
    wanted: dict[str, Wanted] = {}
    for tensor in listed:
        name = _name(tensor, "output", known, wanted)
        parameters = _parameters(tensor, f"output {name}")
        if any(one.startswith("shared_memory") for one in parameters):
            raise Malformed(f"output {name}: shared memory is not supported")
        wanted[name] = Wanted(name, _flag({"binary_data": binary, **parameters}, "binary_data"), _number(parameters, "classification") or 0)
    return tuple(wanted.values())


def pack(array: npt.NDArray[Any]) -> bytes:
    """BYTES: before each element its length."""
    return b"".join(part for item in array.ravel() for part in (_LONG.pack(len(item)), item))
