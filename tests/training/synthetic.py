"""Clips that can be learnt in seconds, and configurations small enough for it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w

from model.contract import DataSource
from training.config import Config, from_dict
from training.datasets.clips import ClipSet, Frames
from training.datasets.recordings import Recordings

CLASSES = ("rising", "falling", "waving")
SOURCE = DataSource(name="synthetic", terms="public domain", citation="none")


def clip_set(count: int = 60, *, seed: int = 0, shortest: int = 8, longest: int = 24, joints: int = 0) -> ClipSet:
    """Three movements in two channels, or of `joints` joints in space; subjects "a" to "d", the last of them split "test"."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % len(CLASSES)
    frames = [_clip(int(label), int(rng.integers(shortest, longest + 1)), rng, joints) for label in labels]
    subjects = np.array(["abcd"[(i // len(CLASSES)) % 4] for i in range(count)])
    groups = {"subject": subjects, "split": np.where(subjects == "d", "test", "train")}
    return ClipSet(tuple(frames), labels.astype(np.int64), CLASSES, groups, 30.0, "metres", SOURCE, "body-13" if joints == 13 else None)


def _clip(label: int, steps: int, rng: np.random.Generator, joints: int) -> Frames:
    clock = np.arange(steps)
    path = (0.1 * clock, -0.1 * clock, 0.5 * np.sin(clock))[label]
    if not joints:
        clip = np.stack([path, np.full(steps, label - 1.0)], 1) + rng.normal(0, 0.1, (steps, 2)) + rng.normal(0, 0.2, 2)
    else:
        body = np.random.default_rng(7).normal(0, 0.4, (joints, 3))
        clip = np.repeat((body + rng.normal(0, 0.5, 3))[None], steps, 0) + rng.normal(0, 0.02, (steps, joints, 3))
        clip[:, joints // 2 :, 1] += path[:, None]
    return clip.astype(np.float32)


def cued_clips(count: int = 120, *, seed: int = 0) -> ClipSet:
    """What an action is shows in its first four frames alone, so that a network must remember it, and forget the one before; groups as above."""
    rng, labels = np.random.default_rng(seed), np.arange(count) % 3
    frames = [rng.normal(0, 0.15, (int(rng.integers(14, 24)), 2)).astype(np.float32) for _ in labels]
    for clip, label in zip(frames, labels, strict=True):
        clip[:4] += np.array([(1, 0), (0, 1), (1, 1)], np.float32)[label]
    return replace(clip_set(count), frames=tuple(frames), classes=("left", "right", "both"))


def recording_set(count: int = 8, *, actions: int = 5, seed: int = 0) -> Recordings:
    """Recordings of two channels, the first of which is the class of the frame: actions with "nothing" before, between and after most of them."""
    rng, frames, segments = np.random.default_rng(seed), [], []
    for _ in range(count):
        lengths, gaps = rng.integers(4, 12, actions), rng.integers(0, 9, actions + 1)
        ends = np.cumsum(lengths + gaps[:-1])
        rows = np.column_stack([ends - lengths, ends, rng.permutation(actions) % len(CLASSES)])
        recording = np.stack([np.full(ends[-1] + gaps[-1], len(CLASSES)), np.arange(ends[-1] + gaps[-1])], 1).astype(np.float32)
        for first, end, label in rows:
            recording[first:end, 0] = label
        frames.append(recording)
        segments.append(rows.astype(np.int64))
    subjects = np.array(["abcd"[i % 4] for i in range(count)])
    groups = {"subject": subjects, "split": np.where(subjects == "d", "test", "train"), "recording": np.arange(count).astype(np.str_)}
    return Recordings(tuple(frames), tuple(segments), (*CLASSES, "nothing"), "nothing", groups, 30.0, "metres", SOURCE)


def settings(**sections: dict[str, Any] | Any) -> dict[str, Any]:
    """A configuration as TOML has it, small; sections given are laid over it."""
    value: dict[str, Any] = {
        "name": "tiny",
        "data": {"reader": "clip_folder", "test": {"split": ["test"]}, "validation": {"subject": ["c"]}, "options": {"units": "metres", "fps": 30}},
        "model": {"kind": "plain", "layers": 2, "units": 8, "horizon": 20, "dropout": 0.1},
        "train": {"epochs": 4, "batch": 8, "learning_rate": 1e-2, "max_frames": 16, "ema": 0.9, "threads": 1},
        "augment": {"noise": 0.02, "speed": 1.2, "cut_start": 0.3, "scale": 0.1},
    }
    for name, section in sections.items():
        value[name] = value.get(name, {}) | section if isinstance(section, dict) else section
    return value


def config(**sections: dict[str, Any] | Any) -> Config:
    return from_dict(settings(**sections))


def write_folder(folder: Path, clips: ClipSet) -> Path:
    """The clips as a clip folder."""
    folder.mkdir(parents=True)
    rows = ["file,label,split,subject"]
    for i, clip in enumerate(clips.frames):
        np.save(folder / f"{i}.npy", clip)
        rows.append(f"{i}.npy,{clips.classes[clips.labels[i]]},{clips.groups['split'][i]},{clips.groups['subject'][i]}")
    (folder / "index.csv").write_text("\n".join(rows) + "\n")
    return folder


def write_recordings(folder: Path, recordings: Recordings) -> Path:
    """The recordings as a recording folder."""
    folder.mkdir(parents=True)
    segments, listed = ["file,first,last,label"], ["file,subject,split"]
    for i, frames in enumerate(recordings.frames):
        np.save(folder / f"{i}.npy", frames)
        listed.append(f"{i}.npy,{recordings.groups['subject'][i]},{recordings.groups['split'][i]}")
        segments += [f"{i}.npy,{first},{end - 1},{recordings.classes[label]}" for first, end, label in recordings.segments[i]]
    (folder / "segments.csv").write_text("\n".join(segments) + "\n")
    (folder / "recordings.csv").write_text("\n".join(listed) + "\n")
    return folder


def write_config(path: Path, **sections: dict[str, Any] | Any) -> Path:
    path.write_text(tomli_w.dumps(settings(**sections)))
    return path
