"""Random changes of training clips: turned, scaled, played faster or slower, cut, shifted, noisy, with joints missing. Never exported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from model import skeletons
from training.config import AugmentConfig
from training.datasets.clips import Frames


@dataclass(frozen=True)
class Change:
    """One drawn change, which may be applied to several clips: how a camera stands, what a body is like and how fast it moves."""

    speed: float = 1.0  # times faster
    mirror: bool = False
    turns: tuple[float, ...] = ()  # radians: about the vertical axis and the two horizontal ones; in the plane for frames of two numbers
    scale: float = 1.0
    offset: npt.NDArray[np.float64] | None = None  # (numbers of a point,), in units of the data
    amplitude: float = 1.0  # how far each point goes from where it rests


class Augment:
    """Changes clips (T, *frame shape) by the generator it is given; the same generator state gives the same change.

    Called, it draws everything anew for the clip. On a stream one `Change` is drawn for a stretch (`draw`), and each clip of it is cut (`cut`),
    changed (`apply`), and made noisy and incomplete (`disturb`).
    """

    def __init__(self, config: AugmentConfig, layout: str | None) -> None:
        self.config, self.layout = config, layout
        self.mirrored = _mirrored(layout) if config.mirror and layout else None

    def __call__(self, clip: Frames, rng: np.random.Generator) -> Frames:
        clip = self.cut(clip, rng)
        change = self.draw(rng, clip.shape[1:])
        return self.disturb(self.apply(change, resample(clip, change.speed)), rng, self.config.noise)

    def cut(self, clip: Frames, rng: np.random.Generator) -> Frames:
        """The clip from a random frame of its first half on, or whole."""
        c = self.config
        return clip[rng.integers(0, len(clip) // 2 + 1) :] if c.cut_start and rng.random() < c.cut_start else clip

    def draw(self, rng: np.random.Generator, shape: tuple[int, ...]) -> Change:
        """A change for frames of this shape."""
        c = self.config
        speed = _factor(c.speed, rng)
        mirror = self.mirrored is not None and rng.random() < 0.5
        limits: tuple[float, ...] = ()
        if self.layout is not None and (c.rotate or c.tilt):
            limits = (c.rotate, c.tilt, c.tilt)
        elif self.layout is None and c.rotate and shape == (2,):
            limits = (c.rotate,)
        turns = tuple(float(np.radians(rng.uniform(-limit, limit))) for limit in limits)
        scale = 1 + rng.uniform(-c.scale, c.scale) if c.scale else 1.0
        offset = rng.normal(0, c.offset, shape[-1]) if c.offset else None
        return Change(speed, mirror, turns, scale, offset, _factor(c.amplitude, rng))

    def apply(self, change: Change, clip: Frames, centre: npt.NDArray[np.floating] | None = None, rest: Frames | None = None) -> Frames:
        """A changed copy, at the speed it has. Bodies are turned about `centre` (3,), by default the mean of the clip's points, and their movements
        made larger or smaller about the pose `rest` (*frame shape), by default the clip's first; points that it misses move as they did."""
        clip = clip.copy()
        if change.amplitude != 1:
            rest = clip[0] if rest is None else rest
            clip += (change.amplitude - 1) * np.nan_to_num(clip - rest)
        if change.mirror:
            clip[:] = clip[:, self.mirrored]
            clip[..., 0] *= -1
        if self.layout is not None and change.turns:
            centre = middle(clip) if centre is None else centre * (-1 if change.mirror else 1, 1, 1)
            centre = centre.astype(np.float32)
            clip[:] = _turned(clip - centre, change.turns, [(0, 2), (1, 2), (0, 1)]) + centre
        elif change.turns:
            clip = _turned(clip, change.turns, [(0, 1)])
        if change.scale != 1:
            clip *= change.scale
        if change.offset is not None:
            clip += change.offset
        return clip

    def disturb(self, clip: Frames, rng: np.random.Generator, noise: float) -> Frames:
        """With noise of this deviation, and in some clips joints missing for a while; changes the clip it is given."""
        c = self.config
        if noise:
            clip += rng.normal(0, noise, clip.shape)
        if c.drop_joints and rng.random() < c.drop_joints:
            self._drop(clip, rng)
        return clip.astype(np.float32, copy=False)

    @staticmethod
    def _drop(clip: Frames, rng: np.random.Generator) -> None:
        """Up to a third of the joints vanish for a random stretch: an occluded limb, a lost track."""
        points = clip.shape[1]
        gone = rng.choice(points, rng.integers(1, max(2, points // 3 + 1)), replace=False)
        start = rng.integers(0, len(clip))
        stop = rng.integers(start, len(clip)) + 1
        clip[start:stop, gone] = np.nan


def _factor(limit: float, rng: np.random.Generator) -> float:
    """Between 1 / limit and limit, as often below 1 as above; nothing is drawn where that is 1."""
    return float(np.exp(rng.uniform(-1, 1) * np.log(limit))) if limit > 1 else 1.0


def middle(clip: Frames) -> npt.NDArray[np.float32]:
    """The mean of all points of a clip (T, points, 3) that are not missing, (3,); zeros where all are."""
    points = clip[~np.isnan(clip).any(-1)]
    return points.mean(0) if len(points) else np.zeros(3, np.float32)


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


def _turned(vectors: npt.NDArray[np.floating], angles: Sequence[float], planes: list[tuple[int, int]]) -> Frames:
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
