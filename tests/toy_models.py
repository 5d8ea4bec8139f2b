"""Small IndRNN files that keep the contract, written with `onnx.helper` alone: what the service's tests serve.

Each is a real network: linear input, one or more recurrent layers as `Scan` with masking by length, linear head, softmax.
"""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from model import skeletons
from model.contract import CONTRACT_VERSION, MANIFEST_KEY, MODEL_FILE, Architecture, DataSource, EventRules, Manifest, Metrics, Parity, SelfTest, StreamReport

Floats = npt.NDArray[np.float32]
OPSET, IR_VERSION = 20, 10


@dataclass(frozen=True)
class Toy:
    """What a toy looks like. `gain` multiplies the first layer's weights: with a huge one, legal but extreme frames overflow the state."""

    shape: tuple[int, ...] = (3,)
    layers: int = 2
    units: int = 16
    classes: tuple[str, ...] = ("rest", "wave", "point", "clap")
    layout: str | None = None
    missing: bool = False
    gain: float = 1.0
    task: Any = "classification"
    fps: float = 30.0
    stream: StreamReport | None = None
    events: EventRules | None = None
    seed: int = 7

    @property
    def width(self) -> int:
        return self.layers * self.units + (int(np.prod(self.shape)) if self.missing else 0)


CHANNELS = Toy(stream=StreamReport(verified_frames=100_000, horizon=256, accuracy_first=0.9, accuracy_last=0.9))
SKELETON = Toy(shape=(13, 3), layout="body-13", units=24)
GAPPY = Toy(shape=(13, 3), layout="body-13", missing=True, seed=3)
GAPPY_CHANNELS = Toy(missing=True, seed=4)
EXPLOSIVE = Toy(shape=(2,), layers=1, units=4, classes=("speed", "lean"), gain=1e33, task="regression", seed=5)
GESTURES = Toy(events=EventRules(nothing="rest", enter=0.5, leave=0.4, least=3, gap=2))
GAPPY_GESTURES = Toy(missing=True, seed=4, fps=25.0, events=EventRules(nothing=None, enter=0.5, leave=0.3, least=2, gap=3))
WIDE = Toy(shape=(150,), layers=6, units=512, classes=tuple(f"class {i}" for i in range(60)), seed=6)


def write_toy(directory: Path, name: str, toy: Toy = CHANNELS, version: str = "1", **changes: Any) -> Path:
    """Writes `<directory>/<name>/<version>/model.onnx`; `changes` replace fields of the manifest, rightly or wrongly."""
    model = build(toy)
    manifest = manifest_of(toy, model, name)
    onnx.helper.set_model_props(model, {MANIFEST_KEY: dataclasses.replace(manifest, **changes).to_json()})
    path = directory / name / version / MODEL_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)
    return path


def write_without_manifest(directory: Path, name: str) -> Path:
    path = directory / name / "1" / MODEL_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(build(CHANNELS), path)
    return path


def write_failing_self_test(directory: Path, name: str) -> Path:
    """A file whose scores are not what its manifest promises."""
    honest = manifest_of(CHANNELS, build(CHANNELS), name).self_test
    return write_toy(directory, name, self_test=dataclasses.replace(honest, scores=[[1 - v for v in row] for row in honest.scores]))


def example_frames(toy: Toy, count: int, seed: int = 0) -> Floats:
    """(count, *shape) of plausible coordinates."""
    return np.random.default_rng(seed).normal(0, 0.5, (count, *toy.shape)).astype(np.float32)


def moving_frames(toy: Toy, count: int, seed: int = 0) -> Floats:
    """(count, *shape) that move about slowly, so that what a toy says of them holds for some frames."""
    corners = np.random.default_rng(seed).normal(0, 1, (count // 15 + 2, *toy.shape))
    place = np.arange(count) / 15
    part = (place % 1).reshape(-1, *[1] * len(toy.shape))
    whole = place.astype(int)
    return (corners[whole] * (1 - part) + corners[whole + 1] * part).astype(np.float32)


def build(toy: Toy) -> onnx.ModelProto:
    """The graph, with free batch and time axes."""
    graph = _Graph(np.random.default_rng(toy.seed))
    size = int(np.prod(toy.shape))
    info = helper.make_tensor_value_info
    graph.add("Reshape", ["frames", graph.constant("flat", np.array([0, 0, size]))], "flat_frames")
    x, widths, ends = "flat_frames", [toy.units] * toy.layers, []
    graph.add("Transpose", [x], "steps", perm=[1, 0, 2])
    _mask(graph)
    states = [f"h{i}" for i in range(toy.layers)] + (["seen"] if toy.missing else [])
    sizes = graph.constant("sizes", np.array(widths + ([size] if toy.missing else [])))
    graph.nodes.append(helper.make_node("Split", ["state", sizes], states, axis=1))
    x = "steps"
    if toy.missing:
        x = _hold_missing(graph, x, size)
        ends.append("seen_end")
    for layer in range(toy.layers):
        x = _layer(graph, toy, layer, x, size if layer == 0 else toy.units)
    ends = [f"end{i}" for i in range(toy.layers)] + ends
    graph.add("Concat", ends, "next_state", axis=1)
    graph.add("MatMul", [x, graph.weight("V", (toy.units, len(toy.classes)), 1 / toy.gain)], "logits")
    graph.add("Softmax" if toy.task == "classification" else "Identity", ["logits"], "time_major", **({"axis": -1} if toy.task == "classification" else {}))
    graph.add("Transpose", ["time_major"], "scores", perm=[1, 0, 2])
    inputs = [
        info("frames", TensorProto.FLOAT, ["batch", "time", *toy.shape]),
        info("lengths", TensorProto.INT64, ["batch"]),
        info("state", TensorProto.FLOAT, ["batch", toy.width]),
    ]
    outputs = [info("scores", TensorProto.FLOAT, ["batch", "time", len(toy.classes)]), info("next_state", TensorProto.FLOAT, ["batch", toy.width])]
    made = helper.make_graph(graph.nodes, "toy", inputs, outputs, graph.constants)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    onnx.checker.check_model(model, full_check=True)
    return model


def manifest_of(toy: Toy, model: onnx.ModelProto, name: str) -> Manifest:
    frames = example_frames(toy, 16, seed=99)
    listed: Any = frames.tolist()
    if toy.missing:
        listed[3][1] = None if toy.layout is None else [None] * toy.shape[-1]
        frames[3, 1] = np.nan
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    scores, _ = session.run(["scores", "next_state"], {"frames": frames[None], "lengths": np.array([16]), "state": np.zeros((1, toy.width), np.float32)})
    return Manifest(
        contract=CONTRACT_VERSION,
        model=name,
        task=toy.task,
        frame_shape=toy.shape,
        units="metres",
        layout=toy.layout,
        joints=skeletons.layout(toy.layout).joints if toy.layout else (),
        axes=skeletons.COMMON_AXES if toy.layout else "",
        fps=toy.fps,
        classes=toy.classes,
        missing=toy.missing,
        state_width=toy.width,
        chunk=8,
        stream=toy.stream,
        architecture=Architecture(kind="plain", layers=toy.layers, units=toy.units, parameters=sum(int(np.prod(t.dims)) for t in model.graph.initializer)),
        data=DataSource(name="none: random weights", terms="public domain", citation=""),
        metrics=Metrics(protocol="none", values={}),
        parity=Parity(scores_abs=0.0, state_rel=0.0, chunked_abs=0.0, batched_abs=0.0, clips=0),
        self_test=SelfTest(frames=listed, scores=scores[0].tolist()),
        fingerprint=hashlib.sha256(model.SerializeToString()).hexdigest(),
        made_by="tests",
        events=toy.events,
    )


class _Graph:
    """Nodes and constants as they are added."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.rng = rng

    def add(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    def constant(self, name: str, value: npt.NDArray[Any]) -> str:
        self.constants.append(numpy_helper.from_array(value, name))
        return name

    def weight(self, name: str, shape: tuple[int, ...], scale: float = 1.0) -> str:
        return self.constant(name, self.rng.normal(0, 1.5 * scale / np.sqrt(shape[0]), shape).astype(np.float32))


def _mask(graph: _Graph) -> None:
    """`mask` (time, batch, 1): whether a step is real."""
    graph.constant("zero", np.array(0))
    graph.constant("one", np.array(1))
    graph.constant("time_axis", np.array([0]))
    graph.constant("last_axes", np.array([1]))
    graph.constant("mask_axes", np.array([2]))
    graph.add("Shape", ["steps"], "steps_shape")
    graph.add("Gather", ["steps_shape", "zero"], "time_length")
    graph.add("Range", ["zero", "time_length", "one"], "clock")
    graph.add("Unsqueeze", ["clock", "last_axes"], "clock_column")
    graph.add("Unsqueeze", ["lengths", "time_axis"], "lengths_row")
    graph.add("Less", ["clock_column", "lengths_row"], "real")
    graph.add("Unsqueeze", ["real", "mask_axes"], "mask")


def _scan(graph: _Graph, name: str, body_nodes: list[onnx.NodeProto], width: int, start: str, sequence: str, end: str, output: str) -> None:
    """Scans `body_nodes` (h, z_t, m_t -> h_next) over time; masked rows keep their state."""
    info = helper.make_tensor_value_info
    keep = [helper.make_node("Where", ["m_t", "moved", "h"], ["h_next"]), helper.make_node("Identity", ["h_next"], ["y_t"])]
    inputs = [info("h", TensorProto.FLOAT, ["b", width]), info("z_t", TensorProto.FLOAT, ["b", width]), info("m_t", TensorProto.BOOL, ["b", 1])]
    outputs = [info("h_next", TensorProto.FLOAT, ["b", width]), info("y_t", TensorProto.FLOAT, ["b", width])]
    body = helper.make_graph([*body_nodes, *keep], name, inputs, outputs)
    graph.nodes.append(helper.make_node("Scan", [start, sequence, "mask"], [end, output], body=body, num_scan_inputs=2))


def _hold_missing(graph: _Graph, x: str, width: int) -> str:
    """Replaces NaN by the last value seen, zero before the first."""
    body = [helper.make_node("IsNaN", ["z_t"], ["gone"]), helper.make_node("Where", ["gone", "h", "z_t"], ["moved"])]
    _scan(graph, "hold", body, width, "seen", x, "seen_end", "held")
    return "held"


def _layer(graph: _Graph, toy: Toy, layer: int, x: str, inputs: int) -> str:
    """One recurrent layer: h = relu(W x + u * h)."""
    z, u = f"z{layer}", f"u{layer}"
    graph.add("MatMul", [x, graph.weight(f"W{layer}", (inputs, toy.units), toy.gain if layer == 0 else 1.0)], z)
    graph.constant(u, graph.rng.uniform(-0.9, 0.97, toy.units).astype(np.float32))
    body = [helper.make_node("Mul", ["h", u], ["uh"]), helper.make_node("Add", ["z_t", "uh"], ["sum"]), helper.make_node("Relu", ["sum"], ["moved"])]
    _scan(graph, f"layer{layer}", body, toy.units, f"h{layer}", z, f"end{layer}", f"y{layer}")
    return f"y{layer}"
