"""Depth: deep stacks learn from scratch, and gradients reach the first layer of a very deep one."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model.backbones import backbone
from model.config import ModelConfig
from model.indrnn import Recurrence
from model.layers import step_mask

STEPS = 10
BASELINE = 1 / 6  # squared error of answering 1 whatever comes: the variance of the sum of two uniform numbers


def adding_problem(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Numbers in [0, 1] and two marks, one in each half: (T, rows, 2); wanted at the end is the sum of the marked numbers (Hochreiter, Schmidhuber 1997)."""
    g = torch.Generator().manual_seed(seed)
    numbers, marks = torch.rand(STEPS, rows, generator=g), torch.zeros(STEPS, rows)
    for half in range(2):
        marks[torch.randint(STEPS // 2, (rows,), generator=g) + half * STEPS // 2, torch.arange(rows)] = 1.0
    return torch.stack([numbers, marks], -1), (numbers * marks).sum(0)


@pytest.mark.parametrize(
    "settings",
    [{"kind": "residual", "layers": 20, "units": 24}, {"kind": "dense", "blocks": (8, 6, 4), "growth": 4}],
    ids=["residual, 21 recurrent layers", "dense (8, 6, 4)"],
)
def test_deep_stacks_learn_to_add_from_scratch(settings: dict[str, Any]) -> None:
    """From memory alone: to less than a third of the error of a constant answer."""
    torch.manual_seed(0)
    dropouts = {"dropout": 0.0, "bottleneck_dropout": 0.0, "transition_dropout": 0.0}
    made = backbone(2, ModelConfig(**settings | dropouts | {"memory": "last", "horizon": 0}))
    head, rows = nn.Linear(made.width, 1), 50
    mask = torch.ones(STEPS, rows, dtype=torch.bool)
    optimizer = torch.optim.Adam([*made.parameters(), *head.parameters()], lr=3e-3)
    errors = []
    for i in range(120):
        x, wanted = adding_problem(rows, i)
        y, _ = made(x, [torch.zeros(rows, width) for width in made.state_widths], mask)
        loss = (head(y[-1])[:, 0] - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(made.parameters(), 1.0)
        optimizer.step()
        for module in made.modules():
            if isinstance(module, Recurrence):
                module.clamp_()
        errors.append(loss.item())
    assert sum(errors[-20:]) / 20 < BASELINE / 3


def test_gradients_reach_the_first_of_a_hundred_layers() -> None:
    """Finite, and in the first block no smaller than a hundredth, nor larger than a hundred times, of what they are in the last."""
    torch.manual_seed(0)
    made = backbone(8, ModelConfig(kind="residual", layers=100, units=32, dropout=0.0))
    x, mask = torch.randn(50, 8, 8), step_mask(torch.tensor([50] * 6 + [20, 1]), 50)
    y, _ = made(x, [torch.zeros(8, width) for width in made.state_widths], mask)
    (y[-1] * torch.randn_like(y[-1])).sum().backward()
    sizes = {name: parameter.grad.norm().item() for name, parameter in made.named_parameters() if parameter.grad is not None}
    assert len(sizes) == len(list(made.parameters()))
    assert all(0 < size < float("inf") for size in sizes.values())
    for part in ("linears.0.weight", "recurrences.0.u"):
        ratio = sizes[f"blocks.0.{part}"] / sizes[f"blocks.49.{part}"]
        assert 0.01 < ratio < 100, f"{part}: {ratio}"
