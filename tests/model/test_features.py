"""Causal features: chunks, missing values, degenerate bodies, views."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.features import ChannelFeatures, LastSeen, SkeletonFeatures

Features = ChannelFeatures | SkeletonFeatures

# Joints 0 and 1 are the hips, 2 and 3 the shoulders, left first; the rest hang on.
JOINTS, HIPS, LEFT, RIGHT = 6, (0, 1), (0, 2), (1, 3)
PARENTS = (0, 0, 0, 1, 3, 2)
NAN = float("nan")


def skeleton(*, view: str = "camera", missing: bool = True, positions: bool = True, motion: bool = True, bones: bool = False) -> SkeletonFeatures:
    parents = PARENTS if bones else ()
    return SkeletonFeatures(JOINTS, HIPS, LEFT, RIGHT, view=view, positions=positions, motion=motion, missing=missing, parents=parents)


def channels(*, missing: bool = True, positions: bool = True, motion: bool = True) -> ChannelFeatures:
    return ChannelFeatures(3, positions=positions, motion=motion, missing=missing)


MAKERS: dict[str, tuple[Callable[[], Features], tuple[int, ...]]] = {
    "camera": (skeleton, (JOINTS, 3)),
    "body": (lambda: skeleton(view="body"), (JOINTS, 3)),
    "body without gaps": (lambda: skeleton(view="body", missing=False), (JOINTS, 3)),
    "body, motion alone": (lambda: skeleton(view="body", positions=False), (JOINTS, 3)),
    "body, bones as well": (lambda: skeleton(view="body", bones=True), (JOINTS, 3)),
    "bones alone": (lambda: skeleton(positions=False, motion=False, bones=True), (JOINTS, 3)),
    "channels": (channels, (3,)),
    "channels, motion alone": (lambda: channels(positions=False), (3,)),
    "channels without gaps": (lambda: channels(missing=False, motion=False), (3,)),
}


def body(steps: int, rows: int, seed: int = 0) -> Tensor:
    """Someone of human size who wanders about, turning."""
    g = torch.Generator().manual_seed(seed)
    joints = torch.tensor([[-0.1, 0, 0], [0.1, 0, 0], [-0.2, 0.5, 0], [0.2, 0.5, 0], [0, 0.7, 0.1], [-0.4, 0.2, -0.1]])
    noise = torch.randn(steps, rows, JOINTS, 3, generator=g) * 0.02
    path = torch.randn(steps, rows, 1, 3, generator=g).cumsum(0) * 0.05 + torch.tensor([0.3, 0.1, 2.5])
    return turned(joints, torch.linspace(0, 2, steps)[:, None, None]) + noise + path


def turned(x: Tensor, angle: Tensor | float) -> Tensor:
    """(..., 3) about the vertical axis."""
    angle = torch.as_tensor(angle)
    cosine, sine = torch.cos(angle), torch.sin(angle)
    return torch.stack([cosine * x[..., 0] + sine * x[..., 2], x[..., 1].expand_as(cosine * x[..., 0]), cosine * x[..., 2] - sine * x[..., 0]], -1)


def example(shape: tuple[int, ...], steps: int, rows: int, *, gaps: bool, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    x = body(steps, rows, seed) if len(shape) == 2 else torch.randn(steps, rows, *shape, generator=g)
    if gaps:
        x[torch.rand(x.shape, generator=g) < 0.15] = NAN
    return x


def run(features: Features, x: Tensor, lengths: list[int] | None = None, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    at = torch.tensor(lengths if lengths is not None else [len(x)] * x.shape[1])
    y, end = features(x, at, state if state is not None else torch.zeros(x.shape[1], features.state_width))
    return y, end


@pytest.mark.parametrize("kind", MAKERS)
def test_says_how_wide_it_is(kind: str) -> None:
    maker, shape = MAKERS[kind]
    features = maker()
    y, end = run(features, example(shape, 4, 2, gaps=False, seed=0))
    assert y.shape == (4, 2, features.width)
    assert end.shape == (2, features.state_width)


@pytest.mark.parametrize("kind", MAKERS)
@settings(deadline=None, max_examples=15)
@given(cut=st.integers(1, 19), seed=st.integers(0, 99))
def test_two_chunks_equal_one_clip(kind: str, cut: int, seed: int) -> None:
    maker, shape = MAKERS[kind]
    features = maker()
    x = example(shape, 20, 3, gaps="without" not in kind, seed=seed)
    lengths = [20, seed % 21, 0]
    whole, end = run(features, x, lengths)
    first, middle = run(features, x[:cut], [min(n, cut) for n in lengths])
    rest, end_of_rest = run(features, x[cut:], [max(0, n - cut) for n in lengths], middle)
    for row, n in enumerate(lengths):
        torch.testing.assert_close(torch.cat([first, rest])[:n, row], whole[:n, row], rtol=1e-6, atol=1e-6)
    assert torch.equal(end_of_rest, end)
    assert not end[2].any()


@pytest.mark.parametrize("kind", MAKERS)
def test_a_row_alone_equals_a_row_in_a_ragged_batch(kind: str) -> None:
    maker, shape = MAKERS[kind]
    features = maker()
    x, lengths = example(shape, 15, 4, gaps="without" not in kind, seed=3), [15, 1, 8, 0]
    together, ends = run(features, x, lengths)
    for row, n in enumerate(lengths[:3]):
        alone, end = run(features, x[:n, row : row + 1])
        torch.testing.assert_close(alone[:, 0], together[:n, row], rtol=0, atol=1e-6)
        assert torch.equal(end[0], ends[row])


@pytest.mark.parametrize("kind", MAKERS)
def test_a_row_of_no_length_stands_still_whatever_is_in_its_padding(kind: str) -> None:
    maker, shape = MAKERS[kind]
    features = maker()
    _, state = run(features, example(shape, 5, 2, gaps=False, seed=1))
    for garbage in (NAN, 1e30, float("inf")):
        _, end = run(features, torch.full((3, 2, *shape), garbage), [0, 0], state)
        assert torch.equal(end, state)


def test_no_feature_looks_ahead() -> None:
    features, x = skeleton(view="body"), example((JOINTS, 3), 12, 1, gaps=True, seed=5)
    before, _ = run(features, x)
    x[7:] = 9.0
    after, _ = run(features, x)
    assert torch.equal(before[:7], after[:7])


def test_missing_values_are_held_and_marked() -> None:
    x = torch.tensor([[1.0, 2.0, 3.0], [NAN, 4.0, NAN], [5.0, NAN, NAN]])[:, None]
    y, end = run(channels(), x)
    values, motion, marks = y[:, 0].split(3, dim=1)
    assert values.tolist() == [[1, 2, 3], [1, 4, 3], [5, 4, 3]]
    assert motion.tolist() == [[0, 0, 0], [0, 2, 0], [4, 0, 0]]
    assert marks.tolist() == [[0, 0, 0], [1, 0, 1], [0, 1, 1]]
    assert end.reshape(3, 2).tolist() == [[5, 1], [4, 1], [3, 1]]


def test_a_point_misses_as_a_whole() -> None:
    x = torch.tensor([[[1.0, 2.0, 3.0]], [[7.0, NAN, 9.0]]])[:, None]
    now, before, valid, _ = LastSeen(1, 3, missing=True)(x, torch.tensor([2]), torch.zeros(1, 4))
    assert now[1, 0, 0].tolist() == [1, 2, 3, 1]
    assert before[:, 0, 0].tolist() == [[0, 0, 0, 0], [1, 2, 3, 1]]
    assert valid.flatten().tolist() == [True, False]


def test_a_joint_never_seen_gives_zeros_and_no_motion_when_it_appears() -> None:
    features = skeleton()
    x = body(6, 1)
    x[:4, :, 5] = NAN
    y, _ = run(features, x)
    positions, motion, marks = y[:, 0].split([3 * JOINTS, 3 * JOINTS, JOINTS], dim=1)
    assert not positions[:4, 15:].any()
    assert positions[4:, 15:].all()
    assert not motion[:5, 15:].any()
    assert motion[5, 15:].all()
    assert marks[:, 5].tolist() == [1, 1, 1, 1, 0, 0]


def test_a_bone_is_its_joint_seen_from_the_parent() -> None:
    x = body(3, 1)
    x[:2, :, 3] = NAN
    y, _ = run(skeleton(positions=False, motion=False, bones=True), x)
    bones = y[:, 0, : 3 * JOINTS].reshape(3, JOINTS, 3)
    assert not bones[:, 0].any(), "the root hangs on nothing"
    torch.testing.assert_close(bones[:, [1, 2, 5]], x[:, 0, [1, 2, 5]] - x[:, 0, [0, 0, 2]])
    assert not bones[:2, [3, 4]].any(), "a bone needs both of its joints"
    torch.testing.assert_close(bones[2, [3, 4]], x[2, 0, [3, 4]] - x[2, 0, [1, 3]])


@pytest.mark.parametrize("view", ["camera", "body"])
def test_nothing_ever_seen_is_all_zeros(view: str) -> None:
    features = skeleton(view=view)
    y, end = run(features, torch.full((4, 2, JOINTS, 3), NAN))
    assert not y[..., :-JOINTS].any()
    assert (y[..., -JOINTS:] == 1).all()
    assert not end.any()


@pytest.mark.parametrize("unseen", [HIPS, LEFT, RIGHT, (0, 3), (0, 1, 2, 3)])
@pytest.mark.parametrize("view", ["camera", "body"])
def test_where_the_body_stands_never_matters(unseen: tuple[int, ...], view: str) -> None:
    """Also while hips or one side have not been seen: positions are about the body, not about the camera."""
    features, x = skeleton(view=view), body(10, 1)
    x[:, :, list(unseen)] = NAN
    here, _ = run(features, x)
    there, _ = run(features, x + torch.tensor([1.5, -0.5, 3.0]))
    torch.testing.assert_close(here, there, rtol=0, atol=1e-5)
    assert here.abs().max() < 3


@pytest.mark.parametrize("unseen", [(), (4,), LEFT, (0, 3)])
@settings(deadline=None, max_examples=20)
@given(angle=st.floats(-3.2, 3.2), seed=st.integers(0, 99))
def test_body_view_is_the_same_from_every_side(unseen: tuple[int, ...], angle: float, seed: int) -> None:
    features, x = skeleton(view="body"), body(12, 2, seed)
    x[:, :, list(unseen)] = NAN
    front, _ = run(features, x)
    side, _ = run(features, turned(x, angle) + torch.tensor([0.7, 0.0, -1.0]))
    if unseen in ((), (4,)):
        torch.testing.assert_close(side, front, rtol=0, atol=1e-4)
    else:  # a body with no pair of joints has no direction: its lengths are what is left
        torch.testing.assert_close(
            side[..., : 3 * JOINTS].reshape(12, 2, JOINTS, 3).norm(dim=-1), front[..., : 3 * JOINTS].reshape(12, 2, JOINTS, 3).norm(dim=-1)
        )
        assert not side[..., 6 * JOINTS : 6 * JOINTS + 2].any()


def test_camera_view_is_not_and_keeps_the_directions() -> None:
    features, x = skeleton(), body(5, 1)
    assert (run(features, x)[0] - run(features, turned(x, 1.0))[0]).abs().max() > 0.1


def test_body_view_says_how_the_body_turns() -> None:
    """A stiff body turning on the spot has still positions; the turn itself is given."""
    features = skeleton(view="body", missing=False)
    stiff = body(1, 1)
    x = turned(stiff[0, 0] - stiff[0, 0].mean(0), torch.arange(6)[:, None] * 0.1)[:, None]
    y, _ = run(features, x)
    positions, turning = y[:, 0, : 3 * JOINTS], y[:, 0, -2:]
    torch.testing.assert_close(positions, positions[:1].expand_as(positions), rtol=0, atol=1e-5)
    assert turning[0].tolist() == [0, 0]
    torch.testing.assert_close(turning[1:, 0], torch.full((5,), torch.cos(torch.tensor(0.1)).item() - 1), rtol=0, atol=1e-5)
    assert (turning[1:, 1].abs() - torch.sin(torch.tensor(0.1))).abs().max() < 1e-5


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("view", ["camera", "body"])
@pytest.mark.parametrize("place", [0.0, 2.5, 1e6])
def test_all_joints_in_one_place_give_finite_features_and_gradients(view: str, missing: bool, place: float) -> None:
    features = skeleton(view=view, missing=missing)
    x = torch.full((5, 2, JOINTS, 3), place, requires_grad=True)
    y, end = run(features, x)
    y.square().sum().backward()
    assert torch.isfinite(y).all()
    assert torch.isfinite(end).all()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("kind", MAKERS)
def test_huge_legal_coordinates_stay_finite(kind: str) -> None:
    maker, shape = MAKERS[kind]
    y, end = run(maker(), torch.randn(8, 2, *shape) * 1e6)
    assert torch.isfinite(y).all()
    assert torch.isfinite(end).all()


@pytest.mark.parametrize("kind", MAKERS)
def test_one_row_out_of_its_mind_leaves_the_others_alone(kind: str) -> None:
    maker, shape = MAKERS[kind]
    features, x = maker(), example(shape, 8, 3, gaps=False, seed=2)
    clean, clean_end = run(features, x)
    for poison in (NAN, float("inf"), 3e38):
        x[:, 1] = poison
        y, end = run(features, x)
        assert torch.equal(y[:, [0, 2]], clean[:, [0, 2]])
        assert torch.equal(end[[0, 2]], clean_end[[0, 2]])
