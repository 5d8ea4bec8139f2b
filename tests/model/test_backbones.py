"""Stacks: chunks, masks, bounds."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from model.backbones import Plain, Residual, backbone
from model.baselines import Baseline
from model.config import ModelConfig
from model.dense import Dense
from model.indrnn import Recurrence, recurrent_bound
from model.layers import SequenceNorm, step_mask

IndRNNStack = Plain | Residual | Dense
KINDS: dict[str, dict[str, Any]] = {
    "plain, norm after": {"kind": "plain", "layers": 3, "norm": "after"},
    "plain, norm before": {"kind": "plain", "layers": 3, "norm": "before"},
    "plain": {"kind": "plain", "layers": 1, "norm": "none"},
    "residual": {"kind": "residual", "layers": 4},
    "plain, tanh": {"kind": "plain", "layers": 2, "activation": "tanh"},
    "residual, identity": {"kind": "residual", "layers": 2, "activation": "identity"},
    "dense": {"kind": "dense", "blocks": (2, 1), "growth": 3},
    "dense, norm before": {"kind": "dense", "blocks": (1, 1), "growth": 3, "norm": "before", "activation": "tanh"},
}


def stack(kind: str, **changes: Any) -> IndRNNStack:
    torch.manual_seed(1)
    made = backbone(5, ModelConfig(**{"units": 7} | KINDS[kind] | changes))
    assert not isinstance(made, Baseline)
    for module in made.modules():
        if isinstance(module, SequenceNorm):  # as after training
            nn.init.normal_(module.running_mean, 0, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, -1, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
    return made


def zeros(made: IndRNNStack, rows: int) -> list[torch.Tensor]:
    return [torch.zeros(rows, width) for width in made.state_widths]


@pytest.mark.parametrize("kind", KINDS)
def test_has_one_state_per_recurrence(kind: str) -> None:
    made = stack(kind)
    assert len(made.state_widths) == sum(isinstance(module, Recurrence) for module in made.modules())
    assert all(recurrence.activation == KINDS[kind].get("activation", "relu") for recurrence in made.modules() if isinstance(recurrence, Recurrence))
    y, ends = made(torch.randn(4, 2, 5), zeros(made, 2), torch.ones(4, 2, dtype=torch.bool))
    assert y.shape == (4, 2, made.width)
    assert [end.shape[1] for end in ends] == made.state_widths


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=12)
@given(cut=st.integers(1, 19), length=st.integers(0, 20))
def test_two_chunks_equal_one_clip_in_a_ragged_batch(kind: str, cut: int, length: int) -> None:
    made = stack(kind).eval()
    x, lengths = torch.randn(20, 3, 5), torch.tensor([20, length, 0])
    whole, ends = made(x, zeros(made, 3), step_mask(lengths, 20))
    first, middle = made(x[:cut], zeros(made, 3), step_mask(lengths, cut))
    rest, last = made(x[cut:], middle, step_mask(lengths - cut, 20 - cut))
    both = torch.cat([first, rest])
    for row, n in enumerate(lengths.tolist()):
        torch.testing.assert_close(both[:n, row], whole[:n, row], rtol=1e-5, atol=1e-6)
    for end, other in zip(ends, last, strict=True):
        torch.testing.assert_close(end, other, rtol=1e-5, atol=1e-6)
        assert not end[2].any()


@pytest.mark.parametrize("kind", KINDS)
def test_what_stands_in_masked_steps_never_shows_in_training(kind: str) -> None:
    """Neither in outputs nor in statistics nor in gradients, whatever finite values there are."""
    x, mask = torch.randn(9, 4, 5), step_mask(torch.tensor([9, 5, 1, 0]), 9)
    results = []
    for garbage in (0.0, 1e3):
        made = stack(kind, dropout=0.0).train()
        y, ends = made(torch.where(mask[..., None], x, garbage), zeros(made, 4), mask)
        y[mask].square().sum().backward()
        statistics = [module.running_var for module in made.modules() if isinstance(module, SequenceNorm)]
        gradients = [p.grad for p in made.parameters() if p.grad is not None]
        assert len(gradients) == len(list(made.parameters()))
        results.append([y[mask], *ends, *statistics, *gradients])
    for clean, dirty in zip(*results, strict=True):
        torch.testing.assert_close(dirty, clean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("horizon", "bound"), [(0, 1.0), (30, recurrent_bound(30))])
def test_horizon_bounds_every_recurrence(kind: str, horizon: int, bound: float) -> None:
    recurrences = [module for module in stack(kind, horizon=horizon).modules() if isinstance(module, Recurrence)]
    assert [recurrence.bound for recurrence in recurrences] == [bound] * len(recurrences)
    assert all(recurrence.u.abs().max() <= bound for recurrence in recurrences)


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_last_recurrence_takes_the_long_memories(kind: str) -> None:
    recurrences = [module for module in stack(kind, memory="last", units=400, growth=60).modules() if isinstance(module, Recurrence)]
    low = recurrent_bound(16)  # half the horizon that stands in where none is set
    assert [bool((r.u >= low).all()) for r in recurrences] == [False] * (len(recurrences) - 1) + [True]


def test_a_bounded_stack_forgets_what_is_older_than_its_horizon() -> None:
    made = stack("plain", horizon=10, norm="none").eval()
    with torch.no_grad():
        recurrence = next(module for module in made.modules() if isinstance(module, Recurrence))
        recurrence.u.fill_(recurrence.bound)
        mask = torch.ones(11, 1, dtype=torch.bool)
        x = torch.rand(11, 1, 5)
        cold, _ = made(x, zeros(made, 1), mask)
        warm, _ = made(x, [torch.ones(1, 7)], mask)
    assert (warm - cold)[10].abs().max() <= 0.01
