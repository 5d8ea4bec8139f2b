"""What finds boundaries: its logit, the share it keeps, the state it has of its own."""

import pytest
import torch

from model.boundary import START, Boundary
from model.config import ModelConfig
from model.indrnn import Recurrence, recurrent_bound
from model.layers import step_mask

CONFIG = ModelConfig(kind="residual", layers=2, units=16, horizon=90, dropout=0.5, reset="soft", boundary_units=6, boundary_layers=3, boundary_horizon=15)


def made() -> Boundary:
    torch.manual_seed(3)
    boundary = Boundary(4, CONFIG).eval()
    torch.nn.init.normal_(boundary.head.weight)
    return boundary


def zeros(boundary: Boundary, rows: int) -> list[torch.Tensor]:
    return [torch.zeros(rows, width) for width in boundary.state_widths]


def test_keep_is_what_a_sigmoid_leaves() -> None:
    boundary, x = made(), torch.randn(9, 2, 4) * 5
    with torch.no_grad():
        logit, keep, ends = boundary(x, zeros(boundary, 2), torch.ones(9, 2, dtype=torch.bool))
    assert logit.shape == keep.shape == (9, 2)
    torch.testing.assert_close(keep, 1 - torch.sigmoid(logit), rtol=1e-5, atol=1e-7)
    assert keep.std() > 0.1
    assert [end.shape for end in ends] == [(2, 6)] * 3


def test_logits_of_any_size_give_a_share() -> None:
    boundary = made()
    torch.nn.init.constant_(boundary.head.bias, 1e6)
    one = boundary(torch.randn(2, 1, 4), zeros(boundary, 1), torch.ones(2, 1, dtype=torch.bool))[1]
    torch.nn.init.constant_(boundary.head.bias, -1e6)
    other = boundary(torch.randn(2, 1, 4), zeros(boundary, 1), torch.ones(2, 1, dtype=torch.bool))[1]
    assert (one.tolist(), other.tolist()) == ([[0.0]] * 2, [[1.0]] * 2)


def test_nearly_everything_is_kept_at_first() -> None:
    torch.manual_seed(0)
    boundary = Boundary(30, ModelConfig(reset="soft")).eval()
    logit, keep, _ = boundary(torch.randn(50, 4, 30), zeros(boundary, 4), torch.ones(50, 4, dtype=torch.bool))
    assert logit.mean().item() == pytest.approx(START, abs=1.5)
    assert keep.mean() > 0.8


def test_its_memory_is_as_short_as_configured_whatever_that_of_the_network() -> None:
    bounds = [module.bound for module in made().modules() if isinstance(module, Recurrence)]
    assert bounds == [recurrent_bound(15)] * 3


def test_two_chunks_equal_one_clip_and_rows_stand_still_beyond_their_length() -> None:
    boundary, x, lengths = made(), torch.randn(12, 3, 4), torch.tensor([12, 5, 0])
    with torch.no_grad():
        _, keep, ends = boundary(x, zeros(boundary, 3), step_mask(lengths, 12))
        _, first, middle = boundary(x[:7], zeros(boundary, 3), step_mask(lengths, 7))
        _, rest, last = boundary(x[7:], middle, step_mask(lengths - 7, 5))
    mask = step_mask(lengths, 12)
    torch.testing.assert_close(torch.cat([first, rest])[mask], keep[mask], rtol=1e-5, atol=1e-6)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(last, ends, strict=True))
    assert not any(end[2].any() for end in ends)
