"""A trained network becomes an ONNX graph.

The recurrence of every layer is one `indrnn::Recurrence` node, or `indrnn::GatedRecurrence` where the network resets itself. Its meaning is an
ONNX local function whose body is a `Scan`, so the file is standard ONNX, any batch and time fit, and the body can be exchanged per device
without touching the weights.
"""

from __future__ import annotations

import copy
import functools
import logging
import warnings
from collections.abc import Callable
from typing import Any

import onnx
import torch
from onnx import ModelProto, TensorProto, helper
from torch import Tensor, nn

from model.backbones import Plain
from model.baselines import FUNCTIONS, Baseline, BaselineLayer
from model.contract import INPUTS, OUTPUTS
from model.dense import DenseCell
from model.indrnn import IndRNN
from model.layers import SequenceNorm
from model.network import Network
from model.recurrence import GATED_RECURRENCES, HOLD, ONNX_DOMAIN, RECURRENCES

OPSET = 20


class Served(nn.Module):
    """The network as the contract has it: scores instead of logits."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, frames: Tensor, lengths: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return self.network.scores(frames, lengths, state)


def to_onnx(network: Network) -> ModelProto:
    """The network as an ONNX model without a manifest: inputs and outputs as `model.contract` names them."""
    network = fold(network).eval()
    frames = torch.zeros(3, 7, *network.frame_shape)
    example = frames, torch.tensor([7, 5, 2]), torch.zeros(3, network.state_width)
    batch, time = torch.export.Dim("batch"), torch.export.Dim("time")
    with warnings.catch_warnings(), _quiet():
        warnings.simplefilter("ignore")  # the exporter warns of its own internals
        program = torch.onnx.export(
            Served(network), example, dynamo=True, opset_version=OPSET, verbose=False, optimize=True,
            dynamic_shapes=({0: batch, 1: time}, {0: batch}, {0: batch}), input_names=list(INPUTS), output_names=list(OUTPUTS),
        )  # fmt: skip
    assert program is not None
    model = program.model_proto
    _strip_traces(model)
    used = {node.op_type for node in model.graph.node if node.domain == ONNX_DOMAIN}
    model.functions.extend(function() for name, function in _functions().items() if name in used)
    if not any(opset.domain == ONNX_DOMAIN for opset in model.opset_import):
        model.opset_import.append(helper.make_opsetid(ONNX_DOMAIN, 1))
    onnx.checker.check_model(model, full_check=True)
    return model


def fold(network: Network) -> Network:
    """A copy in which each normalisation whose neighbour is linear on all paths has gone into that neighbour's weights.

    That is so in plain stacks and in the baselines, where a norm before the recurrence follows a Linear and one after it precedes the next
    linear map or the head; and in dense stacks for norms before the recurrence.
    """
    network = copy.deepcopy(network).eval()
    heads = {network.boundary.stack: network.boundary.head} if network.boundary else {}
    for module in network.modules():
        if isinstance(module, Plain):
            _fold_plain(module, heads.get(module, network.head))
        elif isinstance(module, Baseline):
            _fold_baseline(module, network.head)
        elif isinstance(module, DenseCell) and isinstance(module.before, SequenceNorm):
            _scale_outputs(module.indrnn.linear, *module.before.affine())
            module.before = nn.Identity()
    return network


def _fold_plain(stack: Plain, head: nn.Linear) -> None:
    linears = [*(cell.linear for cell in stack.cells if isinstance(cell, IndRNN)), head]
    for i, (before, after) in enumerate(zip(stack.before, stack.after, strict=True)):
        if isinstance(before, SequenceNorm):
            _scale_outputs(linears[i], *before.affine())
            stack.before[i] = nn.Identity()
        if isinstance(after, SequenceNorm):
            _scale_inputs(linears[i + 1].weight, linears[i + 1].bias, *after.affine())
            stack.after[i] = nn.Identity()


def _fold_baseline(stack: Baseline, head: nn.Linear) -> None:
    maps = [*(layer.weights("ih") for layer in stack.layers if isinstance(layer, BaselineLayer)), (head.weight, head.bias)]
    for i, after in enumerate(stack.after):
        if isinstance(after, SequenceNorm):
            _scale_inputs(*maps[i + 1], *after.affine())
            stack.after[i] = nn.Identity()


@torch.no_grad()
def _scale_outputs(linear: nn.Linear, scale: Tensor, shift: Tensor) -> None:
    linear.weight.mul_(scale[:, None])
    linear.bias.mul_(scale).add_(shift)


@torch.no_grad()
def _scale_inputs(weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor) -> None:
    bias.add_(weight @ shift)
    weight.mul_(scale[None, :])


def _functions() -> dict[str, Callable[[], onnx.FunctionProto]]:
    """What makes each local function, by name."""
    activations = {"relu": "Relu", "tanh": "Tanh", "identity": "Identity"}
    recurrences = {name: functools.partial(_recurrence, name, activations[activation]) for activation, name in RECURRENCES.items()}
    gated = {name: functools.partial(_recurrence, name, activations[activation], gated=True) for activation, name in GATED_RECURRENCES.items()}
    cells = {"rnn": _rnn("Tanh"), "irnn": _rnn("Relu"), "gru": _gru(), "lstm": _lstm()}
    return {**recurrences, **gated, HOLD: _hold, **{name: functools.partial(_baseline, name, cells[kind]) for kind, name in FUNCTIONS.items()}}


def _recurrence(name: str, activation: str, *, gated: bool = False) -> onnx.FunctionProto:
    """h[t] = mask[t] ? activation(z[t] + u * h[t-1]) : h[t-1]; inputs z (T, B, N), u (N), h (B, N), mask (T, B, 1).

    Gated, with keep (T, B, 1) as the last input and keep[t] * h[t-1] in the place of the h[t-1] that u weighs.
    """
    body = helper.make_graph(
        [
            *([helper.make_node("Mul", ["keep_t", "h"], ["kept"])] if gated else []),
            helper.make_node("Mul", ["kept" if gated else "h", "u"], ["remembered"]),
            helper.make_node("Add", ["z_t", "remembered"], ["sum"]),
            helper.make_node(activation, ["sum"], ["moved"]),
            helper.make_node("Where", ["mask_t", "moved", "h"], ["h_next"]),
            helper.make_node("Identity", ["h_next"], ["y_t"]),
        ],
        "step",
        [_float("h", "b", "n"), _float("z_t", "b", "n"), _bool("mask_t", "b", 1), *([_float("keep_t", "b", 1)] if gated else [])],
        [_float("h_next", "b", "n"), _float("y_t", "b", "n")],
    )  # u is taken from the function's own inputs
    scanned = ["z", "mask", "keep"] if gated else ["z", "mask"]
    scan = helper.make_node("Scan", ["h0", *scanned], ["h_last", "y"], body=body, num_scan_inputs=len(scanned))
    return helper.make_function(ONNX_DOMAIN, name, ["z", "u", "h0", *scanned[1:]], ["y"], [scan], [helper.make_opsetid("", OPSET)])


def _baseline(name: str, step: list[onnx.NodeProto]) -> onnx.FunctionProto:
    """h[t] = mask[t] ? step(z[t], h[t-1]) : h[t-1]; inputs z (T, B, G), r (G, N), c (G), h (B, S), mask (T, B, 1).

    z is the input's share of the gates; r and c, the recurrent matrix and its bias, are in the order in which torch keeps gates. For
    LSTM, S is 2 N: what is let out and the memory. A Scan rather than ONNX's own RNN, GRU and LSTM: rows stand still as everywhere else.
    """
    body = helper.make_graph(
        [
            *step,
            helper.make_node("Where", ["mask_t", "moved", "h"], ["h_next"]),
            helper.make_node("Identity", ["h_next"], ["y_t"]),
        ],
        "step",
        [_float("h", "b", "s"), _float("z_t", "b", "g"), _bool("mask_t", "b", 1)],
        [_float("h_next", "b", "s"), _float("y_t", "b", "s")],
    )
    scan = helper.make_node("Scan", ["h0", "z", "mask"], ["h_last", "y"], body=body, num_scan_inputs=2)
    return helper.make_function(ONNX_DOMAIN, name, ["z", "r", "c", "h0", "mask"], ["y"], [scan], [helper.make_opsetid("", OPSET)])


def _rnn(activation: str) -> list[onnx.NodeProto]:
    return [_node("Gemm", "h r c", "remembered", transB=1), _node("Add", "z_t remembered", "sum"), _node(activation, "sum", "moved")]


def _gru() -> list[onnx.NodeProto]:
    """Gates in torch's order: reset, update, new."""
    return [
        _node("Gemm", "h r c", "remembered", transB=1),
        _node("Split", "z_t", "z_reset z_update z_new", axis=1, num_outputs=3),
        _node("Split", "remembered", "r_reset r_update r_new", axis=1, num_outputs=3),
        _node("Add", "z_reset r_reset", "sum_reset"),
        _node("Sigmoid", "sum_reset", "reset"),
        _node("Add", "z_update r_update", "sum_update"),
        _node("Sigmoid", "sum_update", "update"),
        _node("Mul", "reset r_new", "let_through"),
        _node("Add", "z_new let_through", "sum_new"),
        _node("Tanh", "sum_new", "new"),
        _node("Sub", "h new", "difference"),
        _node("Mul", "update difference", "kept"),
        _node("Add", "new kept", "moved"),  # (1 - update) * new + update * h
    ]


def _lstm() -> list[onnx.NodeProto]:
    """Gates in torch's order: input, forget, cell, output; the state is what was let out, then the memory."""
    return [
        _node("Split", "h", "out memory", axis=1, num_outputs=2),
        _node("Gemm", "out r c", "remembered", transB=1),
        _node("Add", "z_t remembered", "sum"),
        _node("Split", "sum", "sum_input sum_forget sum_cell sum_output", axis=1, num_outputs=4),
        _node("Sigmoid", "sum_input", "gate_input"),
        _node("Sigmoid", "sum_forget", "gate_forget"),
        _node("Tanh", "sum_cell", "cell"),
        _node("Sigmoid", "sum_output", "gate_output"),
        _node("Mul", "gate_forget memory", "kept"),
        _node("Mul", "gate_input cell", "added"),
        _node("Add", "kept added", "memory_next"),
        _node("Tanh", "memory_next", "shown"),
        _node("Mul", "gate_output shown", "out_next"),
        _node("Concat", "out_next memory_next", "moved", axis=1),
    ]


def _node(kind: str, inputs: str, outputs: str, **attributes: Any) -> onnx.NodeProto:
    """A node from names with spaces between them."""
    return helper.make_node(kind, inputs.split(), outputs.split(), **attributes)


def _hold() -> onnx.FunctionProto:
    """y[t] = valid[t] ? x[t] : y[t-1]; inputs x (T, B, N), valid (T, B, N), h (B, N)."""
    body = helper.make_graph(
        [helper.make_node("Where", ["valid_t", "x_t", "h"], ["h_next"]), helper.make_node("Identity", ["h_next"], ["y_t"])],
        "step",
        [_float("h", "b", "n"), _float("x_t", "b", "n"), _bool("valid_t", "b", "n")],
        [_float("h_next", "b", "n"), _float("y_t", "b", "n")],
    )
    scan = helper.make_node("Scan", ["h0", "x", "valid"], ["h_last", "y"], body=body, num_scan_inputs=2)
    return helper.make_function(ONNX_DOMAIN, HOLD, ["x", "valid", "h0"], ["y"], [scan], [helper.make_opsetid("", OPSET)])


def _float(name: str, *shape: str | int) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape))


def _bool(name: str, *shape: str | int) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.BOOL, list(shape))


def _strip_traces(model: ModelProto) -> None:
    """Removes what the exporter notes for debugging: stack traces with the paths of the machine that exported."""
    model.ClearField("metadata_props")
    model.graph.ClearField("metadata_props")
    for element in (*model.graph.node, *model.graph.value_info, *model.graph.initializer, *model.graph.input, *model.graph.output):
        element.ClearField("metadata_props")
    for node in model.graph.node:
        node.ClearField("doc_string")
    for function in model.functions:
        function.ClearField("metadata_props")


class _quiet:
    """Silences the exporter's loggers while it runs."""

    def __enter__(self) -> None:
        self.loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
        self.levels = [logger.level for logger in self.loggers]
        for logger in self.loggers:
            logger.setLevel(logging.ERROR)

    def __exit__(self, *_: object) -> None:
        for logger, level in zip(self.loggers, self.levels, strict=True):
            logger.setLevel(level)
