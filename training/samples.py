"""A few held-out recordings as files that people can play into a service or post to it; together they are a clip folder."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from training.datasets.clips import ClipSet, DataError, Frames
from training.streams import Stream, Streams

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
    """For every class one person who does it again and again; the recording stops in the middle of the repetition after `whole` ones.

    That is the first recording of nothing else, as it was recorded; where there is none, clips of one person one after another, with pauses.
    Classes that nobody does twice are left out. Raises `DataError` when that is all of them.
    """
    chosen: dict[int, tuple[int, Frames]] = {}
    for clip, stream in _repeated(streams):
        label = int(streams.clips.labels[clip])
        if label not in chosen:
            first, end, _ = stream.segments[min(whole, len(stream.segments) - 1)].tolist()
            chosen[label] = clip, stream.frames[: (first + end) // 2 + 1]
    if not chosen:
        raise DataError(f"{streams.clips.source.name}: nobody does one thing twice in a row, so there is nothing to show how repetitions are told apart")
    clips, frames = zip(*(chosen[label] for label in sorted(chosen)), strict=True)
    return replace(streams.clips.take(clips), frames=tuple(frames))


def _repeated(streams: Streams) -> Iterator[tuple[int, Stream]]:
    """Streams of one action done twice or more, each with the number of its first clip: recorded ones, then made ones."""
    clip = 0
    for number, segments in enumerate(streams.recordings.segments if streams.recordings else ()):
        if len(segments) > 1 and len(set(segments[:, 2].tolist())) == 1:
            yield clip, streams.stream("whole", number, seed=0)
        clip += len(segments)
    for number, group in enumerate(streams.repeats):
        yield int(group[0]), streams.stream("repeats", number, seed=0)


def _plain(frames: Frames, decimals: int) -> object:
    """Nested lists; a value that is missing is None."""
    rounded = np.round(frames.astype(float), decimals)
    return np.where(np.isnan(rounded), None, rounded).tolist()  # type: ignore[call-overload]
