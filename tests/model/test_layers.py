"""Layers that know about time: masked steps count for nothing, evaluation is the same at every step."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from model.layers import SequenceDropout, SequenceNorm, Standardise, at_end, step_mask


def case(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(12, 5, 4, generator=g) * torch.tensor([1.0, 10.0, 0.1, 3.0]) + torch.tensor([0.0, 5.0, -1.0, 100.0])
    return x, step_mask(torch.tensor([12, 7, 1, 0, 3]), 12)


def test_normalises_like_batch_norm_over_the_real_steps() -> None:
    x, mask = case()
    ours, theirs = SequenceNorm(4), nn.BatchNorm1d(4)
    torch.testing.assert_close(ours(x, mask)[mask], theirs(x[mask]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    torch.testing.assert_close(ours.eval()(x, mask)[mask], theirs.eval()(x[mask]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("garbage", [1e30, -7.0, float("nan"), float("inf")])
def test_masked_steps_never_reach_statistics_outputs_or_gradients(garbage: float) -> None:
    x, mask = case()
    dirty = torch.where(mask[..., None], x, garbage)
    results = []
    for inputs in (torch.where(mask[..., None], x, 0.0), dirty):
        norm, leaf = SequenceNorm(4), inputs.clone().requires_grad_()
        y = norm(leaf, mask)
        (gradient,) = torch.autograd.grad(y[mask].square().sum() + y[mask].sum(), leaf)
        results.append((y[mask], norm.running_mean, norm.running_var, gradient[mask]))
    for clean, other in zip(*results, strict=True):
        assert torch.equal(clean, other)
    assert torch.isfinite(results[1][3]).all()


@pytest.mark.parametrize("lengths", [[1], [0, 0], [1, 0, 0]])
def test_one_real_step_or_none_stays_finite(lengths: list[int]) -> None:
    norm = SequenceNorm(4)
    y = norm(torch.randn(3, len(lengths), 4, requires_grad=True), step_mask(torch.tensor(lengths), 3))
    y.sum().backward()
    assert torch.isfinite(y).all()
    assert torch.isfinite(norm.weight.grad).all() if norm.weight.grad is not None else False
    assert (norm.running_var > 0).all()


def test_evaluation_is_one_multiply_add_that_changes_no_statistics() -> None:
    x, mask = case()
    norm = SequenceNorm(4)
    norm(x, mask)
    before = norm.running_mean.clone()
    norm.eval()
    scale, shift = norm.affine()
    assert torch.equal(norm(x, mask), x * scale + shift)
    assert torch.equal(norm(x[3:4], mask[3:4]), norm(x, mask)[3:4])
    assert torch.equal(norm.running_mean, before)


def test_standardises_and_only_centres_what_never_changes() -> None:
    layer = Standardise(3)
    x = torch.randn(1000, 1, 3) * torch.tensor([5.0, 0.01, 0.0]) + 3
    layer.fit(x.mean((0, 1)), x.std((0, 1), unbiased=False))
    y = layer(x)
    torch.testing.assert_close(y.std((0, 1), unbiased=False), torch.tensor([1.0, 1.0, 0.0]), rtol=1e-3, atol=1e-3)
    assert y[..., 2].abs().max() < 1e-5
    assert layer.inverse[2] == 1
    assert set(layer.state_dict()) == {"mean", "inverse"}


def test_dropout_takes_one_mask_for_a_whole_sequence() -> None:
    torch.manual_seed(0)
    layer, x = SequenceDropout(0.4), torch.ones(9, 50, 40)
    y = layer(x)
    assert torch.equal(y, y[:1].expand_as(y))
    assert y.unique().tolist() == pytest.approx([0.0, 1 / 0.6])
    assert y.mean().item() == pytest.approx(1.0, abs=0.1)
    assert torch.equal(layer.eval()(x), x)
    assert torch.equal(SequenceDropout(0.0)(x), x)


@pytest.mark.parametrize("rate", [-0.1, 1.0, float("nan")])
def test_dropout_refuses_what_is_no_rate(rate: float) -> None:
    with pytest.raises(ValueError, match="dropout rate"):
        SequenceDropout(rate)


@settings(deadline=None, max_examples=40)
@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=6))
def test_at_end_takes_the_last_real_step_or_what_was_before(lengths: list[int]) -> None:
    sequence, before = torch.randn(9, len(lengths), 3), torch.randn(len(lengths), 3)
    ends = at_end(sequence, torch.tensor(lengths), before)
    mask = step_mask(torch.tensor(lengths), 9)
    for row, length in enumerate(lengths):
        assert torch.equal(ends[row], sequence[length - 1, row] if length else before[row])
        assert mask[:, row].tolist() == [t < length for t in range(9)]
