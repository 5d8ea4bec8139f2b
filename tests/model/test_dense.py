"""The dense stack: widths as the paper counts them, and where the norm and the long memories stand."""

from typing import Any

import pytest
import torch

from model.config import ModelConfig
from model.dense import Dense, DenseLayer
from model.indrnn import Recurrence, recurrent_bound
from model.layers import SequenceNorm


def dense(**changes: Any) -> Dense:
    torch.manual_seed(0)
    return Dense(5, ModelConfig(**{"kind": "dense", "growth": 4} | changes))


def test_widths_of_the_paper_s_stack() -> None:
    """First layer 6k; 4k and k in each dense layer; transitions halve what was reached: 24 + 32 -> 28, 28 + 24 -> 26, 26 + 16 -> 21."""
    made = dense()
    assert made.state_widths == [24, *[16, 4] * 8, 28, *[16, 4] * 6, 26, *[16, 4] * 4, 21]
    assert made.width == 21
    assert sum(isinstance(module, DenseLayer) for module in made.modules()) == 18


def test_a_dense_layer_keeps_what_it_was_given_and_adds_its_own() -> None:
    layer = DenseLayer(6, ModelConfig(kind="dense", growth=4)).eval()
    x = torch.randn(3, 2, 6)
    y, ends = layer(x, [torch.zeros(2, 16), torch.zeros(2, 4)], torch.ones(3, 2, dtype=torch.bool))
    assert torch.equal(y[..., :6], x)
    assert y.shape == (3, 2, 10)
    assert [end.shape for end in ends] == [(2, 16), (2, 4)]


@pytest.mark.parametrize(("norm", "parts"), [("before", "before"), ("after", "after"), ("none", "")])
def test_norm_stands_before_or_after_every_recurrence(norm: str, parts: str) -> None:
    made = dense(norm=norm)
    names = [name.rpartition(".")[2] for name, module in made.named_modules() if isinstance(module, SequenceNorm)]
    assert names == ([parts] * len(made.state_widths) if parts else [])


def test_each_part_has_its_own_dropout() -> None:
    made = dense(blocks=(1,), dropout=0.5, bottleneck_dropout=0.1, transition_dropout=0.3)
    assert [module.rate for module in made.modules() if hasattr(module, "rate")] == [0.5, 0.1, 0.5, 0.3]


def test_long_memories_are_for_the_last_transition() -> None:
    recurrences = [module for module in dense(memory="last", growth=40, blocks=(2, 1)).modules() if isinstance(module, Recurrence)]
    assert [bool((r.u >= recurrent_bound(16)).all()) for r in recurrences] == [False] * (len(recurrences) - 1) + [True]
