"""A few held-out recordings as files that people can play into a service or post to it; together they are a clip folder."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np

from training.datasets.clips import ClipSet, Frames
from training.streams import Streams

INDEX = "index.csv"


def write_samples(clips: ClipSet, folder: Path, longest: int, decimals: int = 3) -> list[Path]:
    """One clip of every class, the one of median length, cut to `longest` frames, as FOLDER/CLASS.json beside index.csv.

    A file is `{"frames": [...]}`, the body of a request as it stands. Numbers are rounded to `decimals`; missing values are null.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written: list[tuple[Path, str]] = []
    slugs: set[str] = set()
    for label, name in enumerate(clips.classes):
        of_class = np.flatnonzero(clips.labels == label)
        if not len(of_class):
            continue
        by_length = sorted(of_class.tolist(), key=lambda i: (len(clips.frames[i]), i))
        frames = clips.frames[by_length[len(by_length) // 2]][:longest]
        slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
        path = folder / (f"{slug}.json" if slug and slug not in slugs else f"{slug or 'class'}-{label}.json")
        slugs.add(slug)
        path.write_text(json.dumps({"frames": _plain(frames, decimals)}, separators=(",", ":")) + "\n")
        written.append((path, name))
    with (folder / INDEX).open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([("file", "label"), *((path.name, name) for path, name in written)])
    return [path for path, _ in written]


def repetitions(streams: Streams, whole: int = 2) -> ClipSet:
    """For every class one person who does it again and again, with pauses; the recording stops in the middle of the repetition after `whole` ones.

    Classes that nobody does twice are left out. Raises `DataError` when that is all of them.
    """
    clips, numbers, frames = streams.clips, dict[int, int](), []
    for number, group in enumerate(streams.repeats):
        numbers.setdefault(int(clips.labels[group[0]]), number)
    chosen = [numbers[label] for label in sorted(numbers)]
    for number in chosen:
        stream = streams.stream("repeats", number, seed=0)
        first, end, _ = stream.segments[min(whole, len(stream.segments) - 1)].tolist()
        frames.append(stream.frames[: (first + end) // 2 + 1])
    if not frames:
        streams.stream("repeats", 0, seed=0)  # says why there are none
    return replace(clips.take([streams.repeats[number][0] for number in chosen]), frames=tuple(frames))


def _plain(frames: Frames, decimals: int) -> object:
    """Nested lists; a value that is missing is None."""
    rounded = np.round(frames.astype(float), decimals)
    return np.where(np.isnan(rounded), None, rounded).tolist()  # type: ignore[call-overload]
