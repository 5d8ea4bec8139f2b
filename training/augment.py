"""Random changes of training clips: turned, scaled, played faster or slower, cut, shifted, noisy, with joints missing. Never exported."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from model import skeletons
from training.config import AugmentConfig
from training.datasets.clips import Frames


class Augment:
    """Changes clips (T, *frame shape) by the generator it is given; the same generator state gives the same change."""

    def __init__(self, config: AugmentConfig, layout: str | None) -> None:
        self.config, self.layout = config, layout
        self.mirrored = _mirrored(layout) if config.mirror and layout else None

    def __call__(self, clip: Frames, rng: np.random.Generator) -> Frames:
        c = self.config
        if c.cut_start and rng.random() < c.cut_start:
            clip = clip[rng.integers(0, len(clip) // 2 + 1) :]
        if c.speed > 1:
            clip = resample(clip, float(np.exp(rng.uniform(-1, 1) * np.log(c.speed))))
        clip = clip.copy()
        if self.layout is not None:
            self._move_body(clip, rng)
        elif c.rotate and clip.shape[1:] == (2,):
            clip = _turned(clip, [np.radians(rng.uniform(-c.rotate, c.rotate))], [(0, 1)])
        if c.scale:
            clip *= 1 + rng.uniform(-c.scale, c.scale)
        if c.offset:
            clip += rng.normal(0, c.offset, clip.shape[-1])
        if c.noise:
            clip += rng.normal(0, c.noise, clip.shape)
        if c.drop_joints and rng.random() < c.drop_joints:
            self._drop(clip, rng)
        return clip.astype(np.float32, copy=False)

    def _move_body(self, clip: Frames, rng: np.random.Generator) -> None:
        c = self.config
        if self.mirrored is not None and rng.random() < 0.5:
            clip[:] = clip[:, self.mirrored]
            clip[..., 0] *= -1
        if c.rotate or c.tilt:
            turns = [np.radians(rng.uniform(-limit, limit)) for limit in (c.rotate, c.tilt, c.tilt)]
            points = clip[~np.isnan(clip).any(-1)]
            centre = points.mean(0) if len(points) else np.zeros(3, np.float32)
            clip[:] = _turned(clip - centre, turns, [(0, 2), (1, 2), (0, 1)]) + centre

    @staticmethod
    def _drop(clip: Frames, rng: np.random.Generator) -> None:
        """Up to a third of the joints vanish for a random stretch: an occluded limb, a lost track."""
        points = clip.shape[1]
        gone = rng.choice(points, rng.integers(1, max(2, points // 3 + 1)), replace=False)
        start = rng.integers(0, len(clip))
        stop = rng.integers(start, len(clip)) + 1
        clip[start:stop, gone] = np.nan


def resample(clip: Frames, speed: float) -> Frames:
    """Plays the clip `speed` times faster, by linear interpolation; at least one frame is left."""
    steps = max(1, round(len(clip) / speed))
    if steps == len(clip):
        return clip
    place = np.linspace(0, len(clip) - 1, steps)
    below = np.floor(place).astype(int)
    above = np.minimum(below + 1, len(clip) - 1)
    share = (place - below).reshape(-1, *[1] * (clip.ndim - 1)).astype(np.float32)
    between: Frames = clip[below] * (1 - share) + clip[above] * share
    return between.astype(np.float32, copy=False)


def _turned(vectors: npt.NDArray[np.floating], angles: list[float], planes: list[tuple[int, int]]) -> Frames:
    size = vectors.shape[-1]
    matrix = np.eye(size)
    for angle, (i, j) in zip(angles, planes, strict=True):
        turn = np.eye(size)
        turn[i, i] = turn[j, j] = np.cos(angle)
        turn[i, j], turn[j, i] = -np.sin(angle), np.sin(angle)
        matrix = turn @ matrix
    turned: Frames = (vectors @ matrix.T.astype(np.float32)).astype(np.float32)
    return turned


def _mirrored(layout: str) -> npt.NDArray[np.int64]:
    """Index of each joint's counterpart on the other side."""
    names = skeletons.layout(layout).joints
    swap = {"left": "right", "right": "left"}
    others = ("_".join(swap.get(word, word) for word in name.split("_")) for name in names)
    return np.array([names.index(other) for other in others])
