"""Random changes of clips: what each may change and what not."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model import skeletons
from training.augment import Augment, Change, _mirrored, middle, resample
from training.config import AugmentConfig

ALL: dict[str, Any] = {
    "rotate": 40.0, "tilt": 10.0, "scale": 0.2, "speed": 1.5, "noise": 0.01, "drop_joints": 1.0, "mirror": True, "offset": 0.3, "cut_start": 0.5,
}  # fmt: skip
Array = npt.NDArray[np.float32]


def clip(steps: int = 20, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(0, 0.5, (steps, 13, 3)).astype(np.float32)


def changed(original: Array, seed: int = 0, layout: str | None = "body-13", **config: Any) -> Array:
    return Augment(AugmentConfig(**config), layout)(original, np.random.default_rng(seed))


def distances(x: Array) -> npt.NDArray[np.floating]:
    return np.linalg.norm(x[:, :, None] - x[:, None], axis=-1)


def test_without_changes_nothing_changes() -> None:
    assert np.array_equal(changed(clip()), clip())


@settings(deadline=None, max_examples=60)
@given(steps=st.integers(1, 30), seed=st.integers(0, 1000))
def test_clips_of_any_length_stay_clips_and_the_original_stays_itself(steps: int, seed: int) -> None:
    original = clip(steps)
    y = changed(original, seed, **ALL)
    assert y.dtype == np.float32
    assert len(y) >= 1
    assert y.shape[1:] == (13, 3)
    assert np.array_equal(original, clip(steps))


def test_same_generator_same_change() -> None:
    assert np.array_equal(changed(clip(), 4, **ALL), changed(clip(), 4, **ALL), equal_nan=True)
    assert not np.array_equal(changed(clip(), 4, rotate=10.0), changed(clip(), 5, rotate=10.0))


def test_turning_keeps_heights_and_shapes() -> None:
    y = changed(clip(), rotate=180.0)
    np.testing.assert_allclose(distances(y), distances(clip()), atol=1e-5)
    np.testing.assert_allclose(y[..., 1], clip()[..., 1], atol=1e-5)
    assert abs(y - clip()).max() > 0.1


def test_tilting_keeps_shapes_but_not_heights() -> None:
    y = changed(clip(), tilt=30.0)
    np.testing.assert_allclose(distances(y), distances(clip()), atol=1e-5)
    assert abs(y[..., 1] - clip()[..., 1]).max() > 0.01


def test_turning_ignores_what_is_missing() -> None:
    gone = clip()
    gone[3:9, 4] = np.nan
    y = changed(gone, rotate=90.0, tilt=5.0)
    assert np.array_equal(np.isnan(y), np.isnan(gone))


def test_a_clip_in_which_all_is_missing_passes() -> None:
    assert np.isnan(changed(np.full((4, 13, 3), np.nan, np.float32), rotate=30.0, mirror=True)).all()


@pytest.mark.parametrize("name", [name for name, layout in skeletons.LAYOUTS.items()])
def test_mirror_swaps_every_left_with_its_right(name: str) -> None:
    joints = skeletons.layout(name).joints
    order = _mirrored(name)
    assert sorted(order) == list(range(len(joints)))
    assert order[order].tolist() == list(range(len(joints)))
    for joint, other in zip(joints, order, strict=True):
        assert ("left" in joint, "right" in joint) == ("right" in joints[other], "left" in joints[other])


def test_mirror_flips_sideways_alone_in_half_the_clips() -> None:
    order, flipped = _mirrored("body-13"), 0
    for seed in range(100):
        y = changed(clip(), seed, mirror=True)
        if np.array_equal(y, clip()):
            continue
        flipped += 1
        assert np.array_equal(y, clip()[:, order] * np.array([-1, 1, 1], np.float32))
    assert 30 < flipped < 70


def test_plane_paths_turn_in_their_plane() -> None:
    path = np.random.default_rng(0).normal(size=(9, 2)).astype(np.float32)
    y = changed(path, layout=None, rotate=90.0)
    np.testing.assert_allclose(np.linalg.norm(y, axis=1), np.linalg.norm(path, axis=1), rtol=1e-5)


def test_dropped_joints_vanish_for_a_stretch() -> None:
    for seed in range(30):
        gone = np.isnan(changed(clip(), seed, drop_joints=1.0))
        assert 1 <= gone.any((0, 2)).sum() <= 5
        assert np.array_equal(gone.any(2), gone.all(2))
        steps = np.flatnonzero(gone.any((1, 2)))
        assert len(steps) == steps[-1] - steps[0] + 1


def test_cut_start_leaves_the_second_half() -> None:
    for seed in range(30):
        y = changed(clip(11), seed, cut_start=1.0)
        assert len(y) >= 6
        assert np.array_equal(y, clip(11)[-len(y) :])


@settings(deadline=None, max_examples=50)
@given(steps=st.integers(1, 40), speed=st.floats(0.3, 3))
def test_resampling_keeps_ends_and_straight_lines(steps: int, speed: float) -> None:
    line = np.linspace(0, 1, steps, dtype=np.float32)[:, None]
    y = resample(line, speed)
    assert len(y) == max(1, round(steps / speed))
    if len(y) > 1 and steps > 1:
        np.testing.assert_allclose(y[:, 0], np.linspace(0, 1, len(y)), atol=1e-6)


def test_a_drawn_change_is_the_same_for_every_clip_it_is_applied_to() -> None:
    augment = Augment(AugmentConfig(rotate=40.0, tilt=10.0, scale=0.2, speed=1.5, mirror=True, offset=0.3), "body-13")
    change = augment.draw(np.random.default_rng(3), (13, 3))
    whole, cut = clip(20), 7
    centre = middle(whole)
    parts = [augment.apply(change, whole[:cut], centre), augment.apply(change, whole[cut:], centre)]
    np.testing.assert_allclose(np.concatenate(parts), augment.apply(change, whole), atol=1e-5)
    order = _mirrored("body-13") if change.mirror else np.arange(13)
    np.testing.assert_allclose(distances(parts[0]), change.scale * distances(whole[:cut][:, order]), atol=1e-4)
    assert np.array_equal(whole, clip(20))


def test_movements_become_larger_or_smaller_about_the_pose_of_rest() -> None:
    augment = Augment(AugmentConfig(amplitude=2.0), "body-13")
    drawn = [augment.draw(np.random.default_rng(seed), (13, 3)).amplitude for seed in range(200)]
    assert 0.5 <= min(drawn) < 0.6
    assert 1.8 < max(drawn) <= 2.0
    body = clip(20)
    change = Change(amplitude=0.5)
    np.testing.assert_allclose(augment.apply(change, body) - body[0], 0.5 * (body - body[0]), atol=1e-6)
    np.testing.assert_allclose(augment.apply(change, body, rest=body[7]) - body[7], 0.5 * (body - body[7]), atol=1e-6)
    rest, missing = body[0].copy(), body.copy()
    rest[3], missing[5, 4] = np.nan, np.nan  # a joint of which no rest is known moves as it did, a missing one stays missing
    y = augment.apply(change, missing, rest=rest)
    np.testing.assert_allclose(y[:, 3], body[:, 3])
    assert np.flatnonzero(np.isnan(y).any((1, 2))).tolist() == [5]
    assert np.array_equal(body, clip(20))


def test_a_mirrored_body_is_turned_about_its_own_mirrored_place() -> None:
    augment = Augment(AugmentConfig(mirror=True, rotate=1.0), "body-13")
    change = Change(mirror=True, turns=(0.4, 0.0, 0.0))
    far = clip() + np.array([5, 0, 2], np.float32)
    np.testing.assert_allclose(augment.apply(change, far, middle(far)), augment.apply(change, far), atol=1e-4)


def test_no_change_is_a_copy() -> None:
    original = clip()
    same = Augment(AugmentConfig(**ALL), "body-13").apply(Change(), original)
    assert np.array_equal(same, original)
    assert same is not original
