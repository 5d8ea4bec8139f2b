"""The layer: initialisations, bound, chunks."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.indrnn import IndRNN, Recurrence, ScoreAverage, recurrent_bound
from model.layers import step_mask


def test_the_definition_step_by_step() -> None:
    torch.manual_seed(0)
    layer, x, h = IndRNN(3, 5), torch.randn(6, 2, 3), torch.rand(2, 5)
    y, end = layer(x, h, torch.ones(6, 2, dtype=torch.bool))
    w, b, u = layer.linear.weight, layer.linear.bias, layer.recurrence.u
    for t in range(6):
        h = torch.relu(x[t] @ w.T + b + u * h)
        torch.testing.assert_close(y[t], h)
    assert torch.equal(end, y[-1])


@settings(deadline=None, max_examples=30)
@given(cut=st.integers(1, 24), seed=st.integers(0, 99))
def test_two_chunks_equal_one_clip(cut: int, seed: int) -> None:
    torch.manual_seed(seed)
    layer, x, h = IndRNN(4, 6), torch.randn(25, 3, 4), torch.rand(3, 6)
    lengths = torch.tensor([25, seed % 26, 0])
    whole, end = layer(x, h, step_mask(lengths, 25))
    first, middle = layer(x[:cut], h, step_mask(lengths, cut))
    rest, end_of_rest = layer(x[cut:], middle, step_mask(lengths - cut, 25 - cut))
    torch.testing.assert_close(torch.cat([first, rest]), whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(end_of_rest, end, rtol=1e-5, atol=1e-6)
    assert torch.equal(end[2], h[2])


@pytest.mark.parametrize(("horizon", "bound"), [(1, 0.01), (2, 0.1), (150, 0.01 ** (1 / 150))])
def test_bound_leaves_a_hundredth_after_the_horizon(horizon: int, bound: float) -> None:
    assert recurrent_bound(horizon) == pytest.approx(bound)
    assert recurrent_bound(horizon) ** horizon == pytest.approx(0.01)


def test_a_horizon_below_one_frame_is_refused() -> None:
    with pytest.raises(ValueError, match="horizon must be at least 1 frame, got 0"):
        recurrent_bound(0)


def test_initialisation_for_a_score_at_every_step_covers_all_memories() -> None:
    u = Recurrence(20_000, bound=0.9).u
    assert 0 <= u.min() < 0.001
    assert 0.899 < u.max() <= 0.9
    assert u.mean().item() == pytest.approx(0.45, abs=0.01)


def test_initialisation_for_a_score_at_the_end_has_long_memories_only() -> None:
    u = Recurrence(20_000, bound=1.0, memory="last", horizon=20).u
    low = 0.01 ** (1 / 10)  # half the horizon
    assert low <= u.min() < low + 0.001
    assert 0.999 < u.max() <= 1.0
    assert u.mean().item() == pytest.approx((low + 1) / 2, abs=0.01)


def test_initialisation_with_the_longest_memory_there_is() -> None:
    assert Recurrence(9, bound=0.9, memory="ones").u.tolist() == pytest.approx([0.9] * 9)


def test_initialisation_for_language_models() -> None:
    u = Recurrence(20_000, memory="normal").u
    assert u.mean().item() == pytest.approx(0.4, abs=0.01)
    assert u.std().item() == pytest.approx(0.2, abs=0.01)
    assert Recurrence(20_000, bound=0.5, memory="normal").u.abs().max().item() == 0.5


def test_averaged_scores_are_the_mean_while_nothing_has_faded() -> None:
    logits = torch.randn(6, 2, 3, generator=torch.Generator().manual_seed(0))
    average = ScoreAverage(3, frames=10**7)
    said, _ = average(logits, torch.zeros(2, 4), torch.ones(6, 2, dtype=torch.bool))
    expected = torch.softmax(logits, -1).cumsum(0) / torch.arange(1, 7)[:, None, None]
    torch.testing.assert_close(said, expected, rtol=1e-4, atol=1e-5)


def test_a_step_counts_in_the_average_by_its_weight() -> None:
    logits, weight = torch.randn(6, 2, 3), torch.rand(6, 2, 1) + 0.1
    said, end = ScoreAverage(3, frames=10**7)(logits, torch.zeros(2, 4), torch.ones(6, 2, dtype=torch.bool), weight)
    p = torch.softmax(logits, -1)
    torch.testing.assert_close(said[-1], (p * weight).sum(0) / weight.sum(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(end[:, -1:], weight.sum(0), rtol=1e-4, atol=1e-5)


def test_averaged_scores_forget() -> None:
    one_way, other_way = torch.tensor([9.0, -9.0]), torch.tensor([-9.0, 9.0])
    logits = torch.stack([one_way] * 500 + [other_way] * 20)[:, None]
    said, end = ScoreAverage(2, frames=20)(logits, torch.zeros(1, 3), torch.ones(520, 1, dtype=torch.bool))
    assert said[-1, 0, 1] > 0.98
    assert end.max() < 5.0  # sums saturate: nothing depends on how long a stream has been running


def test_a_bound_of_the_same_horizon_leaves_long_memories_room_to_differ() -> None:
    u = Recurrence(1000, bound=recurrent_bound(150), memory="last", horizon=150).u
    assert u.min() < recurrent_bound(80) < recurrent_bound(145) < u.max()


def test_initialisation_never_leaves_the_bound() -> None:
    assert (Recurrence(100, bound=recurrent_bound(5), memory="last", horizon=500).u <= recurrent_bound(5)).all()


def test_weights_start_as_kaiming_has_it() -> None:
    layer = IndRNN(300, 400)
    limit = math.sqrt(6 / 300)
    assert layer.linear.weight.abs().max().item() == pytest.approx(limit, rel=0.01)
    assert not layer.linear.bias.any()


def test_weights_keep_the_size_of_what_passes_through_other_activations() -> None:
    assert IndRNN(300, 400, activation="identity").linear.weight.abs().max().item() == pytest.approx(math.sqrt(3 / 300), rel=0.01)
    assert IndRNN(300, 400, activation="tanh").linear.weight.abs().max().item() == pytest.approx(5 / 3 * math.sqrt(3 / 300), rel=0.01)


@pytest.mark.parametrize(("activation", "act"), [("tanh", torch.tanh), ("identity", lambda x: x)])
def test_other_activations(activation: Any, act: Callable[[torch.Tensor], torch.Tensor]) -> None:
    torch.manual_seed(0)
    recurrence, z, h = Recurrence(5, activation=activation), torch.randn(6, 2, 5), torch.randn(2, 5)
    y, _ = recurrence(z, h, torch.ones(6, 2, dtype=torch.bool))
    for t in range(6):
        h = act(z[t] + recurrence.u * h)
        torch.testing.assert_close(y[t], h)


def test_clamp_puts_u_back_on_both_sides() -> None:
    recurrence = Recurrence(4, bound=0.5)
    with torch.no_grad():
        recurrence.u.copy_(torch.tensor([-3.0, -0.25, 0.25, 3.0]))
    recurrence.clamp_()
    assert recurrence.u.tolist() == [-0.5, -0.25, 0.25, 0.5]
