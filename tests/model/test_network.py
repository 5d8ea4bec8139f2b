"""The whole network: one state row, batch first, every promise of the contract that torch can show."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from model.config import ModelConfig
from model.indrnn import Recurrence
from model.layers import SequenceNorm
from model.network import Network

NAN = float("nan")
RESET = {"reset": "soft", "boundary_units": 5, "boundary_layers": 2}
KINDS: dict[str, tuple[dict[str, Any], tuple[int, ...], str | None]] = {
    "channels": ({"kind": "plain", "layers": 2, "norm": "after"}, (4,), None),
    "channels, missing": ({"kind": "plain", "layers": 2, "norm": "before", "missing": True, "horizon": 20}, (4,), None),
    "averaged": ({"kind": "plain", "layers": 2, "average": 12, "horizon": 20}, (4,), None),
    "skeleton": ({"kind": "residual", "layers": 2, "horizon": 50}, (13, 3), "body-13"),
    "body, missing": ({"kind": "residual", "layers": 2, "view": "body", "missing": True}, (13, 3), "body-13"),
    "convolved": ({"kind": "plain", "layers": 1, "filters": 2, "view": "body", "missing": True}, (13, 3), "body-13"),
    "dense": ({"kind": "dense", "blocks": (2, 1), "growth": 3, "filters": 2, "horizon": 20}, (4,), None),
    "gru": ({"kind": "gru", "layers": 2}, (4,), None),
    "averaged, weighted": ({"kind": "residual", "layers": 2, "average": 12, "weighted": True, "horizon": 20}, (4,), None),
    "lstm, averaged": ({"kind": "lstm", "layers": 2, "average": 12}, (4,), None),
    "reset": ({"kind": "plain", "layers": 2, "average": 12, "weighted": True, "horizon": 30, "missing": True} | RESET, (4,), None),
    "reset, residual": ({"kind": "residual", "layers": 2, "horizon": 30} | RESET, (13, 3), "body-13"),
    "reset, dense": ({"kind": "dense", "blocks": (2, 1), "growth": 3, "filters": 2, "average": 9, "horizon": 10} | RESET, (4,), None),
}


def network(kind: str, **changes: Any) -> Network:
    settings_, shape, layout = KINDS[kind]
    torch.manual_seed(2)
    made = Network(ModelConfig(units=8, **settings_ | changes), shape, 3, layout)
    for module in made.modules():
        if isinstance(module, SequenceNorm):
            nn.init.normal_(module.running_mean, 0, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
    if made.boundary:
        nn.init.normal_(made.boundary.head.weight)
        nn.init.zeros_(made.boundary.head.bias)
    return made.eval()


def clips(made: Network, rows: int, steps: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, steps, *made.frame_shape, generator=g)
    if made.config.missing:
        x[torch.rand(x.shape[:3], generator=g) < 0.2] = NAN
    return x


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=12)
@given(cut=st.integers(1, 23), seed=st.integers(0, 50))
def test_two_chunks_equal_one_clip(kind: str, cut: int, seed: int) -> None:
    made = network(kind)
    x, lengths = clips(made, 3, 24, seed), torch.tensor([24, seed % 25, 0])
    with torch.no_grad():
        whole, end = made(x, lengths, made.initial_state(3))
        first, middle = made(x[:, :cut], lengths.clamp(max=cut), made.initial_state(3))
        rest, last = made(x[:, cut:], (lengths - cut).clamp(min=0), middle)
    both = torch.cat([first, rest], dim=1)
    for row, n in enumerate(lengths.tolist()):
        torch.testing.assert_close(both[row, :n], whole[row, :n], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(last, end, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_alone_equals_a_row_in_a_ragged_batch(kind: str) -> None:
    made = network(kind)
    lengths = torch.tensor([11, 1, 30, 0, 29])
    x, state = clips(made, 5, 30), torch.rand(5, made.state_width)
    with torch.no_grad():
        together, ends = made(x, lengths, state)
        for row, n in enumerate(lengths.tolist()):
            if n:
                alone, end = made(x[row : row + 1, :n], lengths[row : row + 1], state[row : row + 1])
                torch.testing.assert_close(alone[0], together[row, :n], rtol=1e-6, atol=1e-6)
                torch.testing.assert_close(end[0], ends[row], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("garbage", [0.0, NAN, float("inf"), 1e38])
def test_a_row_of_no_length_keeps_its_state_to_the_bit(kind: str, garbage: float) -> None:
    made = network(kind)
    x, state = clips(made, 2, 6), torch.rand(2, made.state_width)
    x[1] = garbage
    with torch.no_grad():
        _, end = made(x, torch.tensor([6, 0]), state)
    assert torch.equal(end[1], state[1])
    assert not torch.equal(end[0], state[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("garbage", [NAN, float("inf"), 1e38])
def test_padding_is_never_read(kind: str, garbage: float) -> None:
    made = network(kind)
    x, lengths = clips(made, 2, 9), torch.tensor([9, 4])
    with torch.no_grad():
        clean, clean_end = made(x, lengths, made.initial_state(2))
        x[1, 4:] = garbage
        dirty, dirty_end = made(x, lengths, made.initial_state(2))
    assert torch.equal(dirty[0], clean[0])
    assert torch.equal(dirty[1, :4], clean[1, :4])
    assert torch.equal(dirty_end, clean_end)


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_are_the_start(kind: str) -> None:
    made = network(kind)
    assert made.initial_state(3).shape == (3, made.state_width)
    assert not made.initial_state(3).any()
    assert made.state_width == sum(made.state_widths)


@pytest.mark.parametrize("kind", ["channels, missing", "body, missing"])
def test_scores_are_finite_whatever_is_missing(kind: str) -> None:
    made = network(kind)
    x = clips(made, 4, 10)
    x[1] = NAN  # nothing at all
    x[2, 3:] = NAN  # lost for good
    x[3, :, 2] = NAN  # one joint never seen
    with torch.no_grad():
        scores, end = made(x, torch.full((4,), 10), made.initial_state(4))
    assert torch.isfinite(scores).all()
    assert torch.isfinite(end).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [0.0, 1e6])
def test_degenerate_and_huge_frames_give_finite_scores_and_gradients(kind: str, scale: float) -> None:
    made = network(kind).train()
    x = torch.full((2, 6, *made.frame_shape), 1.0) * scale
    scores, _ = made(x, torch.tensor([6, 3]), made.initial_state(2))
    scores[:, :3].sum().backward()
    assert torch.isfinite(scores).all()
    for name, parameter in made.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
    with torch.no_grad():
        random_scores, _ = made.eval()(torch.randn(2, 6, *made.frame_shape) * scale, torch.tensor([6, 3]), made.initial_state(2))
    assert torch.isfinite(random_scores).all()


def test_clamps_every_recurrent_weight() -> None:
    made = network("skeleton")
    recurrences = [module for module in made.modules() if isinstance(module, Recurrence)]
    with torch.no_grad():
        for recurrence in recurrences:
            recurrence.u.fill_(-5.0)
    made.clamp_recurrent_()
    assert len(recurrences) == 3
    assert all(bool((r.u == -r.bound).all()) and r.bound < 1 for r in recurrences)


def test_penalised_weights_stay_where_training_put_them_at_a_price() -> None:
    clamped, made = network("skeleton"), network("skeleton", bound="penalty")
    assert made.penalty() == clamped.penalty() == 0
    recurrences = [module for module in made.modules() if isinstance(module, Recurrence)]
    with torch.no_grad():
        for recurrence in recurrences:
            recurrence.u.fill_(-recurrence.bound - 0.01)
    made.clamp_recurrent_()
    assert all(bool((r.u < -r.bound).all()) for r in recurrences)
    penalty = made.penalty()
    assert penalty.item() == pytest.approx(3 * 8 * 100 * 0.01**2, rel=1e-3)
    penalty.backward()
    assert all(r.u.grad is not None and bool((r.u.grad < 0).all()) for r in recurrences)  # a step against it leads back


def test_a_penalty_alone_brings_the_weights_back_to_their_bound() -> None:
    made = network("skeleton", bound="penalty")
    recurrences = [module for module in made.modules() if isinstance(module, Recurrence)]
    with torch.no_grad():
        for recurrence in recurrences:
            recurrence.u.add_(0.5)
    optimizer = torch.optim.Adam([r.u for r in recurrences], lr=0.02)
    for _ in range(200):
        optimizer.zero_grad()
        made.penalty().backward()
        optimizer.step()
    assert all(bool((r.u.abs() < r.bound + 0.01).all()) for r in recurrences)


def test_horizon_is_what_the_weights_came_to_where_nothing_clamps_them() -> None:
    assert network("skeleton").horizon() == 50
    made = network("skeleton", bound="penalty")
    recurrences = [module for module in made.modules() if isinstance(module, Recurrence)]
    with torch.no_grad():
        for recurrence in recurrences:
            recurrence.u.fill_(0.5)
        recurrences[1].u[3] = -0.97
    horizon = made.horizon()
    assert 0.97**horizon <= 0.01 < 0.97 ** (horizon - 1)
    with torch.no_grad():
        recurrences[2].u[0] = 1.0
    assert made.horizon() == 0


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("channels", ("plain", 2, 8)),
        ("skeleton", ("residual", 2, 8)),
        ("convolved", ("plain, convolution", 2, 8)),
        ("dense", ("dense, convolution", 10, 18)),
        ("gru", ("gru", 2, 8)),
        ("reset", ("plain, soft reset", 2, 8)),
        ("reset, dense", ("dense, convolution, soft reset", 10, 18)),
    ],
)
def test_architecture_says_what_the_network_is(kind: str, said: tuple[str, int, int]) -> None:
    made = network(kind)
    architecture = made.architecture()
    assert (architecture.kind, architecture.layers, architecture.units) == said
    assert architecture.parameters == sum(p.numel() for p in made.parameters())
    assert network("channels", activation="tanh").architecture().kind == "plain, tanh"


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith("reset")])
def test_a_full_reset_leaves_nothing_of_the_past_in_any_layer(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the state was: after a step that keeps nothing, all of it but the features' and the boundary stack's own is the same."""
    made = network(kind)
    assert made.boundary is not None
    run = made.boundary.forward
    monkeypatch.setattr(
        made.boundary, "forward", lambda x, states, mask: (*(y * (i == 0) for i, y in enumerate(run(x, states, mask)[:2])), run(x, states, mask)[2])
    )
    x, lengths = clips(made, 2, 1), torch.ones(2, dtype=torch.int64)
    x[1] = x[0]
    state = made.initial_state(2)
    first, last = made.state_widths[0], sum(made.boundary.state_widths)
    state[1, first:-last] = torch.rand(made.state_width - first - last)
    with torch.no_grad():
        logits, end = made(x, lengths, state)
        monkeypatch.undo()
        others, other_end = made(x, lengths, state)
    torch.testing.assert_close(logits[0], logits[1])
    torch.testing.assert_close(end[0, first:-last], end[1, first:-last])
    assert (others[0] - others[1]).abs().max() > 0.01
    assert (other_end[0, first:-last] - other_end[1, first:-last]).abs().max() > 0.1
    assert torch.equal(other_end[:, -last:], end[:, -last:])  # it is not cleared itself


def test_boundaries_come_with_the_outputs_and_leave_networks_without_them_as_they_are() -> None:
    made, plain = network("reset"), network("reset", reset="none")
    x, lengths = clips(made, 2, 7), torch.tensor([7, 3])
    found, without = made.outputs(x, lengths, made.initial_state(2)), plain.outputs(x, lengths, plain.initial_state(2))
    assert found.boundary is not None
    assert found.boundary.shape == (2, 7)
    assert without.boundary is None
    weights = dict(made.named_parameters())
    assert all(torch.equal(value, weights[name]) for name, value in plain.named_parameters())  # the same seed gives the same network
    assert made.state_widths == [*plain.state_widths, 5, 5]


def test_what_is_wrong_in_the_scores_reaches_what_clears_the_state() -> None:
    made = network("reset").train()
    x = clips(made, 3, 9)
    made(x, torch.tensor([9, 9, 4]), made.initial_state(3))[0][:, :4].square().sum().backward()
    assert made.boundary is not None
    assert all(p.grad is not None and bool(p.grad.any()) for p in made.boundary.parameters())


def test_a_boundary_stack_that_looks_back_further_than_the_others_is_the_horizon() -> None:
    assert network("reset").horizon() == 30
    assert network("reset, dense").horizon() == 20
    assert network("reset", horizon=0).horizon() == 0  # nothing bounds the others


def test_features_say_of_which_blocks_they_are_made() -> None:
    for kind in KINDS:
        features = network(kind).features
        assert sum(points * numbers for points, numbers in features.blocks) == features.width


def test_features_are_fitted_on_real_steps_alone() -> None:
    made = network("channels", motion=False)
    frames, lengths = torch.randn(6, 20, 4) * 3 + 5, torch.tensor([20, 3, 7, 20, 1, 12])
    real = torch.cat([row[:n] for row, n in zip(frames, lengths.tolist(), strict=True)])
    for row, n in zip(frames, lengths.tolist(), strict=True):
        row[n:] = 1e9
    made.fit_features([(frames[:2], lengths[:2]), (frames[2:], lengths[2:])])
    torch.testing.assert_close(made.features.standardise.mean, real.mean(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(made.features.standardise.inverse, 1 / real.std(0, unbiased=False), rtol=1e-5, atol=1e-5)


def test_clips_of_one_frame_leave_motion_as_it_is() -> None:
    made = network("channels")
    made.fit_features([(torch.randn(5, 1, 4), torch.ones(5, dtype=torch.int64))])
    assert made.features.standardise.inverse[4:].tolist() == [1] * 4


@pytest.mark.parametrize(
    ("shape", "layout", "message"),
    [
        ((5, 3), None, "name the skeleton's layout"),
        ((12, 3), "body-13", r"frames of shape \(13, 3\), got \(12, 3\)"),
        ((17, 2), "coco-17", "has 2 coordinates a joint; skeleton features need three"),
        ((4,), "body-14", "unknown layout 'body-14'"),
    ],
)
def test_frames_that_do_not_fit_the_layout_are_refused(shape: tuple[int, ...], layout: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Network(ModelConfig(), shape, 2, layout)


def test_bones_need_a_skeleton() -> None:
    with pytest.raises(ValueError, match="bones = true needs a skeleton"):
        Network(ModelConfig(bones=True), (3,), 2)
    with_bones = Network(ModelConfig(bones=True), (13, 3), 2, "body-13")
    assert with_bones.features.width == Network(ModelConfig(), (13, 3), 2, "body-13").features.width + 3 * 13
