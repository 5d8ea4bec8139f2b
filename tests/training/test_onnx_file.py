"""A file from outside: fingerprint, interface, manifest, writing."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from model.contract import ManifestError
from tests import toy_models
from training import onnx_file
from training.onnx_file import fingerprint, interface, read_manifest, with_manifest, write_atomically


def toy() -> ModelProto:
    return toy_models.build(toy_models.CHANNELS)


def _nudge(model: ModelProto) -> None:
    weight = next(w for w in model.graph.initializer if w.data_type == TensorProto.FLOAT)
    value = numpy_helper.to_array(weight).copy()
    value.flat[0] = np.nextafter(value.flat[0], np.float32(9))
    weight.CopyFrom(numpy_helper.from_array(value, weight.name))


def _other_operator(model: ModelProto) -> None:
    next(node for node in model.graph.node if node.op_type == "Softmax").op_type = "LogSoftmax"


def _other_attribute(model: ModelProto) -> None:
    next(node for node in model.graph.node if node.op_type == "Softmax").attribute[0].i = 1


def _other_wiring(model: ModelProto) -> None:
    node = next(node for node in model.graph.node if node.op_type == "MatMul")
    node.input[0], node.input[1] = node.input[1], node.input[0]


def _one_node_less(model: ModelProto) -> None:
    del model.graph.node[-1]


def _other_operator_set(model: ModelProto) -> None:
    model.opset_import[0].version = 19


def _other_shape(model: ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 4


def _outputs_exchanged(model: ModelProto) -> None:
    """The same nodes, but the other value called `scores`."""
    for node in model.graph.node:
        for i, name in enumerate(node.output):
            node.output[i] = {"scores": "next_state", "next_state": "scores"}.get(name, name)


@pytest.mark.parametrize(
    "change", [_nudge, _other_operator, _other_attribute, _other_wiring, _one_node_less, _other_operator_set, _other_shape, _outputs_exchanged]
)
def test_fingerprint_changes_with_weights_and_structure(change: Callable[[ModelProto], None]) -> None:
    model = toy()
    change(model)
    assert fingerprint(model) != fingerprint(toy())


def test_fingerprint_of_a_local_function_counts(exported: Any) -> None:
    model = exported["channels"]
    before = fingerprint(model)
    recurrence = next(function for function in model.functions if function.name == "Recurrence")
    recurrence.node[0].attribute[0].g.node[2].op_type = "Tanh"
    assert fingerprint(model) != before


def test_fingerprint_leaves_names_and_metadata_out(exported: Any) -> None:
    model, before = exported["channels"], fingerprint(exported["channels"])
    helper.set_model_props(model, {"note": "hello"})
    model.producer_name, model.doc_string, model.graph.name = "other", "words", "g"
    for node in model.graph.node:
        node.name, node.doc_string = f"n-{node.name}", "words"
        for names in (node.input, node.output):
            for i, name in enumerate(names):
                names[i] = name if name in ("frames", "lengths", "state", "scores", "next_state", "") else f"{name}_renamed"
    for weight in model.graph.initializer:
        weight.name += "_renamed"
    onnx.checker.check_model(model)
    assert fingerprint(model) == before


def test_manifest_travels_in_a_copy() -> None:
    model = toy()
    manifest = toy_models.manifest_of(toy_models.CHANNELS, model, "x")
    explained = with_manifest(model, manifest)
    assert read_manifest(explained) == manifest
    assert fingerprint(explained) == fingerprint(model)
    assert not model.metadata_props


def test_a_file_without_manifest_says_so() -> None:
    with pytest.raises(ManifestError, match="the file has no manifest"):
        read_manifest(toy())


def test_interface_reads_the_sizes() -> None:
    found = interface(toy_models.build(toy_models.SKELETON))
    assert (found.frame_shape, found.state_width, found.classes) == ((13, 3), toy_models.SKELETON.width, 4)


@pytest.mark.parametrize("name", ["frames", "lengths", "state", "scores", "next_state"])
def test_a_graph_without_one_of_the_tensors_is_refused(name: str) -> None:
    model = toy()
    next(value for value in (*model.graph.input, *model.graph.output) if value.name == name).name = "other"
    with pytest.raises(ManifestError, match=f"no tensor '{name}'"):
        interface(model)


@pytest.mark.parametrize("name", ["frames", "lengths", "state", "scores", "next_state"])
@pytest.mark.parametrize("fault", ["type", "fixed batch", "rank"])
def test_a_tensor_that_is_not_the_contracts_is_refused(name: str, fault: str) -> None:
    model = toy()
    tensor = next(value for value in (*model.graph.input, *model.graph.output) if value.name == name).type.tensor_type
    if fault == "type":
        tensor.elem_type = TensorProto.DOUBLE
    elif fault == "fixed batch":
        tensor.shape.dim[0].dim_value = 3
    else:
        del tensor.shape.dim[-1]
    with pytest.raises(ManifestError, match=f"'{name}'"):
        interface(model)


def test_writing_makes_folders_and_leaves_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "a" / "1" / "model.onnx"
    write_atomically(toy(), target)
    assert fingerprint(onnx.load(target)) == fingerprint(toy())
    assert list(target.parent.iterdir()) == [target]
    assert target.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("failing", ["replace", "fsync", "chmod"])
def test_a_failure_leaves_the_old_file_and_no_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    target = tmp_path / "model.onnx"
    target.write_bytes(b"old")

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(onnx_file.os, failing, fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(toy(), target)
    monkeypatch.undo()
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["model.onnx"]
