"""What IndRNNs are held against, behind the same call: RNN with tanh, IRNN, GRU and LSTM, one `torch.nn` module per layer.

Each layer turns (T, B, inputs) into (T, B, units); its state is one (B, state width) tensor, h and c side by side for LSTM. Rows stand
still beyond their length. Under `torch.export` the recurrence of a layer becomes one node (`indrnn::RNNTanh`, ...), to which the exporter
gives meaning by an ONNX local function, as it does for `model.recurrence`.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from model.config import ModelConfig
from model.layers import SequenceDropout, SequenceNorm, at_end, normed
from model.recurrence import ONNX_DOMAIN

FUNCTIONS: dict[str, str] = {"rnn": "RNNTanh", "irnn": "RNNRelu", "gru": "GRU", "lstm": "LSTM"}  # local functions in the exported file


class BaselineLayer(nn.Module):
    """One layer of `kind`. IRNN is an RNN with ReLU whose recurrent matrix starts as the identity, its other weights near zero
    (Le, Jaitly, Hinton, *A simple way to initialize recurrent networks of rectified linear units*, 2015); the rest start as torch has it.
    """

    def __init__(self, kind: str, inputs: int, units: int) -> None:
        super().__init__()
        self.kind, self.units = kind, units
        self.state_width = 2 * units if kind == "lstm" else units
        self.cell = _cell(kind, inputs, units)

    def forward(self, x: Tensor, state: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """x (T, B, inputs), state (B, state_width), mask (T, B) -> outputs (T, B, units), unspecified in masked steps, and the next state.

        The mask must be that of lengths: a row's real steps come first. Needs T >= 1.
        """
        if torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export():
            states = self._symbol(nn.functional.linear(x, *self.weights("ih")), state, mask)
            return states[..., : self.units], states[-1]
        x = torch.where(mask[..., None], x, 0.0)  # gradients of a matrix would let NaN of masked steps through
        lengths = mask.sum(0)
        if self.kind == "lstm":
            return self._lstm(x, state, lengths)
        y, _ = self.cell(x, state[None].contiguous())
        return y, at_end(y, lengths, state)

    def _lstm(self, x: Tensor, state: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """The memory c is not among the outputs, so that of a row which ends early comes from a packed sequence."""
        start = tuple(part[None].contiguous() for part in torch.split(state, self.units, 1))
        if bool((lengths == len(x)).all()):
            y, ends = self.cell(x, start)
            return y, torch.cat(ends, -1)[0]
        packed = pack_padded_sequence(x, lengths.clamp(min=1).cpu(), enforce_sorted=False)  # a length of 0 is refused
        y, ends = self.cell(packed, start)
        end = torch.where(lengths[:, None] > 0, torch.cat(ends, -1)[0], state)
        return pad_packed_sequence(y, total_length=len(x))[0], end

    def weights(self, part: str) -> tuple[Tensor, Tensor]:
        """Matrix and bias of the input ("ih") or of the recurrence ("hh")."""
        return self.cell.get_parameter(f"weight_{part}_l0"), self.cell.get_parameter(f"bias_{part}_l0")

    def _symbol(self, z: Tensor, state: Tensor, mask: Tensor) -> Tensor:
        """All states (T, B, state_width); masked steps repeat the state."""
        shape = (*z.shape[:2], self.state_width)
        inputs = (z, *self.weights("hh"), state, mask[..., None])
        symbol: Tensor = torch.onnx.ops.symbolic(f"{ONNX_DOMAIN}::{FUNCTIONS[self.kind]}", inputs, dtype=z.dtype, shape=shape, version=1)
        return symbol


class Baseline(nn.Module):
    """(recurrent layer, [norm], dropout) x layers, as `model.backbones.Plain` has it."""

    def __init__(self, inputs: int, config: ModelConfig) -> None:
        super().__init__()
        widths = [inputs] + [config.units] * config.layers
        layers = [BaselineLayer(config.kind, a, b) for a, b in pairwise(widths)]
        self.layers = nn.ModuleList(layers)
        self.after = nn.ModuleList(SequenceNorm(config.units) if config.norm == "after" else nn.Identity() for _ in layers)
        self.dropout = SequenceDropout(config.dropout)
        self.state_widths, self.width = [layer.state_width for layer in layers], config.units

    def forward(self, x: Tensor, states: list[Tensor], mask: Tensor) -> tuple[Tensor, list[Tensor]]:
        ends = []
        for layer, after, state in zip(self.layers, self.after, states, strict=True):
            x, end = layer(x, state, mask)
            x = self.dropout(normed(after, x, mask))
            ends.append(end)
        return x, ends


def _cell(kind: str, inputs: int, units: int) -> nn.RNN | nn.GRU | nn.LSTM:
    if kind == "gru":
        return nn.GRU(inputs, units)
    if kind == "lstm":
        return nn.LSTM(inputs, units)
    if kind == "rnn":
        return nn.RNN(inputs, units, nonlinearity="tanh")
    cell = nn.RNN(inputs, units, nonlinearity="relu")
    nn.init.eye_(cell.get_parameter("weight_hh_l0"))
    nn.init.normal_(cell.get_parameter("weight_ih_l0"), std=0.001)
    for bias in ("bias_ih_l0", "bias_hh_l0"):
        nn.init.zeros_(cell.get_parameter(bias))
    return cell
