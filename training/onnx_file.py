"""An exported file from outside: its fingerprint, its manifest, what its graph takes, and how it is written."""

from __future__ import annotations

import hashlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import ModelProto, TensorProto, helper

from model.contract import CONTRACT_VERSION, FRAMES, LENGTHS, MANIFEST_KEY, NEXT_STATE, SCORES, STATE, Manifest, ManifestError


def fingerprint(model: ModelProto) -> str:
    """SHA-256 over what decides the numbers: contract version, operator sets, interface, nodes, functions, weights; names of values and metadata left out.

    Two files with the same fingerprint continue each other's streams.
    """
    renamed: dict[str, str] = {}

    def canonical(names: object) -> list[str]:
        return [renamed.setdefault(name, str(len(renamed))) if name else "" for name in names]  # type: ignore[attr-defined]

    digest = hashlib.sha256(f"contract {CONTRACT_VERSION}".encode())
    graph = model.graph
    digest.update(f"{sorted((opset.domain, opset.version) for opset in model.opset_import)}".encode())
    for value in (*graph.input, *graph.output):
        digest.update(f"{value.name} {value.type.tensor_type.elem_type} {[d.dim_value for d in value.type.tensor_type.shape.dim]}".encode())
    canonical([value.name for value in graph.input])
    for weight in graph.initializer:
        digest.update(f"{canonical([weight.name])} {weight.data_type} {list(weight.dims)}".encode())
        digest.update(onnx.numpy_helper.to_array(weight).tobytes())
    for node in graph.node:
        attributes = sorted((a.name, a.SerializeToString(deterministic=True)) for a in node.attribute)
        digest.update(f"{node.domain} {node.op_type} {canonical(node.input)} {canonical(node.output)} {attributes}".encode())
    digest.update(f"{canonical([value.name for value in graph.output])}".encode())
    for function in sorted(model.functions, key=lambda f: f.name):
        digest.update(function.SerializeToString(deterministic=True))
    return digest.hexdigest()


_FLOATS = ((STATE, 1), (SCORES, 2), (NEXT_STATE, 1))  # name and free axes, in front of one of fixed size


@dataclass(frozen=True)
class Interface:
    """What a graph takes and gives, by the names of the contract."""

    frame_shape: tuple[int, ...]
    state_width: int
    classes: int


def interface(model: ModelProto) -> Interface:
    """Raises `ManifestError` naming the tensor that is missing, of another type or of another shape than the contract has it."""
    tensors = {value.name: value.type.tensor_type for value in (*model.graph.input, *model.graph.output)}
    sizes: dict[str, list[int]] = {}
    for name, kind, free in ((FRAMES, TensorProto.FLOAT, 2), (LENGTHS, TensorProto.INT64, 1), *((n, TensorProto.FLOAT, f) for n, f in _FLOATS)):
        if name not in tensors:
            raise ManifestError(f"the graph has no tensor {name!r}; there are: {', '.join(tensors) or 'none'}")
        sizes[name] = [dimension.dim_value for dimension in tensors[name].shape.dim]  # 0: free
        fixed = len(sizes[name]) - free
        fits = fixed >= 1 if name == FRAMES else fixed == (name != LENGTHS)
        if not fits or any(sizes[name][:free]) or not all(sizes[name][free:]) or tensors[name].elem_type != kind:
            raise ManifestError(f"the graph's tensor {name!r} has sizes {sizes[name]} (0: free), type {tensors[name].elem_type}: not what the contract says")
    return Interface(tuple(sizes[FRAMES][2:]), sizes[STATE][1], sizes[SCORES][2])


def with_manifest(model: ModelProto, manifest: Manifest) -> ModelProto:
    """A copy that carries the manifest in its metadata."""
    explained = ModelProto()
    explained.CopyFrom(model)
    helper.set_model_props(explained, {MANIFEST_KEY: manifest.to_json()})
    explained.producer_name, explained.producer_version = "indrnn-service", manifest.made_by.rpartition(" ")[2]
    return explained


def write_atomically(model: ModelProto, path: Path) -> None:
    """Writes beside `path` first, so that a reader never sees half a file and a failure leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".onnx.part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(model.SerializeToString(deterministic=True))
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_manifest(model: ModelProto) -> Manifest:
    """The manifest in a file; raises `ManifestError` when there is none or it is faulty."""
    for entry in model.metadata_props:
        if entry.key == MANIFEST_KEY:
            return Manifest.from_json(entry.value)
    raise ManifestError("the file has no manifest: it was not exported by `python -m training export`")
