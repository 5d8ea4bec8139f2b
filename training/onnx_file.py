"""An exported file from outside: its fingerprint, its manifest, what its graph takes, and how it is written."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

import onnx
from onnx import ModelProto, helper

from model.contract import CONTRACT_VERSION, FRAMES, MANIFEST_KEY, STATE, Manifest, ManifestError


def fingerprint(model: ModelProto) -> str:
    """SHA-256 over what decides the numbers: contract version, interface, nodes, functions, weights; names of values and metadata left out.

    Two files with the same fingerprint continue each other's streams.
    """
    renamed: dict[str, str] = {}

    def canonical(names: object) -> list[str]:
        return [renamed.setdefault(name, str(len(renamed))) if name else "" for name in names]  # type: ignore[attr-defined]

    digest = hashlib.sha256(f"contract {CONTRACT_VERSION}".encode())
    graph = model.graph
    for value in (*graph.input, *graph.output):
        digest.update(f"{value.name} {[d.dim_value for d in value.type.tensor_type.shape.dim]}".encode())
    canonical([value.name for value in graph.input])
    for weight in graph.initializer:
        digest.update(f"{canonical([weight.name])} {weight.data_type} {list(weight.dims)}".encode())
        digest.update(onnx.numpy_helper.to_array(weight).tobytes())
    for node in graph.node:
        attributes = sorted((a.name, a.SerializeToString(deterministic=True)) for a in node.attribute)
        digest.update(f"{node.domain} {node.op_type} {canonical(node.input)} {canonical(node.output)} {attributes}".encode())
    for function in sorted(model.functions, key=lambda f: f.name):
        digest.update(function.SerializeToString(deterministic=True))
    return digest.hexdigest()


def state_width(model: ModelProto) -> int:
    """Width of the state row that the graph takes."""
    state = next(value for value in model.graph.input if value.name == STATE)
    return int(state.type.tensor_type.shape.dim[1].dim_value)


def frame_shape(model: ModelProto) -> tuple[int, ...]:
    frames = next(value for value in model.graph.input if value.name == FRAMES)
    return tuple(int(d.dim_value) for d in frames.type.tensor_type.shape.dim[2:])


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
