"""Baselines behind the stacks' call: torch's own numbers, rows that stand still, chunks."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from model.backbones import backbone
from model.baselines import Baseline, BaselineLayer
from model.config import BASELINES, ModelConfig
from model.layers import SequenceNorm, step_mask

NAN = float("nan")


def stack(kind: Any, **changes: Any) -> Baseline:
    torch.manual_seed(1)
    made = backbone(5, ModelConfig(**{"kind": kind, "units": 7, "layers": 2} | changes))
    assert isinstance(made, Baseline)
    for module in made.modules():
        if isinstance(module, SequenceNorm):  # as after training
            nn.init.normal_(module.running_mean, 0, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return made


def states(made: Baseline, rows: int) -> list[Tensor]:
    return [torch.randn(rows, width) for width in made.state_widths]


@pytest.mark.parametrize("kind", BASELINES)
def test_each_row_alone_is_what_torch_says_of_it(kind: Any) -> None:
    torch.manual_seed(0)
    layer, x, lengths = BaselineLayer(kind, 5, 7), torch.randn(9, 4, 5), torch.tensor([9, 4, 1, 0])
    state = torch.randn(4, layer.state_width)
    y, end = layer(x, state, step_mask(lengths, 9))
    for row, n in enumerate(lengths.tolist()):
        if n == 0:
            assert torch.equal(end[row], state[row])
            continue
        start = state[None, row : row + 1]
        theirs, last = layer.cell(x[:n, row : row + 1], tuple(part.contiguous() for part in start.split(7, 2)) if kind == "lstm" else start)
        torch.testing.assert_close(y[:n, row], theirs[:, 0])
        torch.testing.assert_close(end[row], torch.cat(last, -1)[0, 0] if kind == "lstm" else last[0, 0])


@pytest.mark.parametrize("kind", BASELINES)
@settings(deadline=None, max_examples=12)
@given(cut=st.integers(1, 19), length=st.integers(0, 20))
def test_two_chunks_equal_one_clip_in_a_ragged_batch(kind: Any, cut: int, length: int) -> None:
    made = stack(kind).eval()
    x, lengths, start = torch.randn(20, 3, 5), torch.tensor([20, length, 0]), states(made, 3)
    whole, ends = made(x, start, step_mask(lengths, 20))
    first, middle = made(x[:cut], start, step_mask(lengths, cut))
    rest, last = made(x[cut:], middle, step_mask(lengths - cut, 20 - cut))
    both = torch.cat([first, rest])
    for row, n in enumerate(lengths.tolist()):
        torch.testing.assert_close(both[:n, row], whole[:n, row], rtol=1e-5, atol=1e-6)
    for end, other, begin in zip(ends, last, start, strict=True):
        torch.testing.assert_close(end, other, rtol=1e-5, atol=1e-6)
        assert torch.equal(end[2], begin[2])


@pytest.mark.parametrize("kind", BASELINES)
@pytest.mark.parametrize("garbage", [1e3, NAN, float("inf")])
def test_what_stands_in_masked_steps_never_shows_in_training(kind: Any, garbage: float) -> None:
    """Neither in outputs nor in statistics nor in gradients."""
    x, mask, results = torch.randn(9, 4, 5), step_mask(torch.tensor([9, 5, 1, 0]), 9), []
    for filling in (0.0, garbage):
        made = stack(kind, dropout=0.0).train()
        y, ends = made(torch.where(mask[..., None], x, filling), [torch.zeros(4, width) for width in made.state_widths], mask)
        (y[mask].square().sum() + sum(end.square().sum() for end in ends)).backward()
        statistics = [module.running_var for module in made.modules() if isinstance(module, SequenceNorm)]
        gradients = [p.grad for p in made.parameters() if p.grad is not None]
        assert len(gradients) == len(list(made.parameters()))
        results.append([y[mask], *ends, *statistics, *gradients])
    for clean, dirty in zip(*results, strict=True):
        torch.testing.assert_close(dirty, clean, rtol=1e-5, atol=1e-6)


def test_irnn_starts_as_an_integrator_of_small_pushes() -> None:
    """Le, Jaitly, Hinton 2015: identity, no bias, the other weights of deviation 0.001."""
    cell = BaselineLayer("irnn", 200, 50).cell
    assert torch.equal(cell.weight_hh_l0, torch.eye(50))
    assert not cell.bias_hh_l0.any()
    assert not cell.bias_ih_l0.any()
    assert cell.weight_ih_l0.std().item() == pytest.approx(0.001, rel=0.05)


def test_lstm_keeps_output_and_memory_in_its_row() -> None:
    assert stack("lstm").state_widths == [14, 14]
    assert stack("gru").state_widths == [7, 7]


def test_dropout_and_norm_stand_where_a_plain_stack_has_them() -> None:
    torch.manual_seed(0)
    made = stack("gru", dropout=0.5).train()
    y, _ = made(torch.randn(30, 64, 5), [torch.zeros(64, 7)] * 2, torch.ones(30, 64, dtype=torch.bool))
    off = (y == 0).all(0)  # one mask per sequence: a unit is off at every step or at none
    assert torch.equal(off, (y == 0).any(0))
    assert 0.4 < off.float().mean() < 0.6
    assert sum(isinstance(module, SequenceNorm) for module in made.modules()) == 2
    assert not any(isinstance(module, SequenceNorm) for module in stack("gru", norm="none").modules())
