"""How right scores are along streams: per frame, per action, and as events that start and end.

Streams are told by their segments (k, 3), first frame, end and label, as in `training.datasets.recordings`; frames outside them are of no action.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from model import events
from model.contract import EventRules
from training.datasets.recordings import Segments

Scores = npt.NDArray[np.float32]

OVERLAP = 0.5  # intersection over union from which a detected action is the true one
NO_EVENT = -1


@dataclass(frozen=True)
class Detections:
    """Found events held against what happened: `matches` (m, 2), true and found index, of which each occurs once."""

    true: int
    found: int
    matches: npt.NDArray[np.int64]
    delays: npt.NDArray[np.int64]  # of each match: frames from its true start until its start was decided
    boundaries: npt.NDArray[np.int64]  # of each match: how far start and end lie from the true ones, in frames (2 m,)


@dataclass(frozen=True)
class StreamFigures:
    """Fractions and frames over all streams.

    An action counts as recognised when most of its frames that were given any action were given this one (`actions`); or, stricter, when most of
    all its frames were, those called nothing included (`actions_strict`).
    """

    frames: float  # right frames among those of an action
    nothing: float  # right frames among the others; NaN where there are none, or no class for them
    actions: float
    actions_strict: float
    actions_without_copies: float  # `actions` among those the network was not trained on, frame for frame; NaN where none is such a copy, or all are
    by_position: npt.NDArray[np.float64]  # share recognised (`actions`) at each place of a stream, first to last
    slope: float  # change of that share from first to last place, by a straight line through each stream
    slope_ci95: float  # half width of its 95 % interval over streams
    f1: float  # of detected events, at an overlap of one half
    delay: float  # mean frames from the true start until the start was decided; NaN where nothing matched
    boundary: float  # mean frames by which start and end are off
    counted: float  # share of streams in which as many events were found as there are actions


def detect(rules: EventRules, classes: Sequence[str], scores: Scores) -> npt.NDArray[np.int64]:
    """Events of one stream (n, 4): first frame, end, label, and the frame in which its start was decided. One still open ends with the stream."""
    _, found = events.advance(rules, classes, events.EventState(), scores, np.arange(len(scores)))
    rows: list[list[int]] = []
    for event in found:
        if event.event == "start":
            rows.append([event.frame, len(scores), classes.index(event.label), event.decided])
        else:
            rows[-1][1] = event.frame
    return np.array(rows, np.int64).reshape(-1, 4)


def match(segments: Segments, found: npt.NDArray[np.int64], overlap: float = OVERLAP) -> Detections:
    """Pairs each true action with the found event of its label that overlaps it most, the largest overlaps first."""
    pairs: list[tuple[float, int, int]] = []
    for i, (first, end, label) in enumerate(segments.tolist()):
        near = np.flatnonzero((found[:, 2] == label) & (found[:, 0] < end) & (found[:, 1] > first))
        for j in near.tolist():
            both = min(end, found[j, 1]) - max(first, found[j, 0])
            either = max(end, found[j, 1]) - min(first, found[j, 0])
            pairs.append((both / either, i, j))
    taken_true: set[int] = set()
    taken_found: set[int] = set()
    matches = []
    for share, i, j in sorted(pairs, reverse=True):
        if share >= overlap and i not in taken_true and j not in taken_found:
            matches.append((i, j))
            taken_true.add(i)
            taken_found.add(j)
    chosen = np.array(sorted(matches), np.int64).reshape(-1, 2)
    true, seen = segments[chosen[:, 0]], found[chosen[:, 1]]
    boundaries = np.abs(np.concatenate([seen[:, 0] - true[:, 0], seen[:, 1] - true[:, 1]]))
    return Detections(len(segments), len(found), chosen, seen[:, 3] - true[:, 0], boundaries)


def f1(detections: Sequence[Detections]) -> float:
    """Harmonic mean of precision and recall over all streams; 0 where nothing was there or found."""
    every = sum(one.true + one.found for one in detections)
    return 2 * sum(len(one.matches) for one in detections) / every if every else 0.0


def measure(
    scores: Sequence[Scores], streams: Sequence[Segments], classes: Sequence[str], rules: EventRules, copied: Sequence[npt.NDArray[np.bool_]] | None = None
) -> StreamFigures:
    """`scores[i]` (T_i, classes) of the stream with the actions `streams[i]`; `rules.nothing` names the class of no action, if there is one.

    `copied[i]` tells which of its actions are training clips as well. Raises `ValueError` when streams have no action at all.
    """
    outside = classes.index(rules.nothing) if rules.nothing is not None else NO_EVENT
    right_frames = frames = right_nothing = nothing = 0
    strict: list[bool] = []
    recognised: list[npt.NDArray[np.bool_]] = []
    for one, segments in zip(scores, streams, strict=True):
        predicted, inside = one.argmax(1), np.zeros(len(one), bool)
        row = np.zeros(len(segments), bool)
        for i, (first, end, label) in enumerate(segments.tolist()):
            counts = np.bincount(predicted[first:end], minlength=len(classes))
            inside[first:end] = True
            right_frames += int(counts[label])
            strict.append(bool(counts.argmax() == label))
            if outside != NO_EVENT:
                counts[outside] = 0
            row[i] = counts[label] > 0 and counts.argmax() == label
        recognised.append(row)
        frames += int(inside.sum())
        nothing += int((~inside).sum())
        right_nothing += int((predicted[~inside] == outside).sum())
    if not strict:
        raise ValueError("streams without a single action: nothing to measure")
    slope, interval = _slope(recognised)
    new = ~np.concatenate(copied) if copied is not None else np.zeros(0, bool)
    detections = [match(segments, detect(rules, classes, one)) for one, segments in zip(scores, streams, strict=True)]
    delays = np.concatenate([one.delays for one in detections])
    boundaries = np.concatenate([one.boundaries for one in detections])
    return StreamFigures(
        frames=right_frames / frames,
        nothing=right_nothing / nothing if nothing and outside != NO_EVENT else float("nan"),
        actions=float(np.concatenate(recognised).mean()),
        actions_strict=float(np.mean(strict)),
        actions_without_copies=float(np.concatenate(recognised)[new].mean()) if 0 < new.sum() < len(new) else float("nan"),
        by_position=_by_position(recognised),
        slope=slope,
        slope_ci95=interval,
        f1=f1(detections),
        delay=float(delays.mean()) if len(delays) else float("nan"),
        boundary=float(boundaries.mean()) if len(boundaries) else float("nan"),
        counted=float(np.mean([one.found == one.true for one in detections])),
    )


def early(scores: Sequence[Scores], streams: Sequence[Segments], parts: int = 10) -> npt.NDArray[np.float64]:
    """Share of actions whose best class is right after 1/parts, 2/parts, ... of their frames, (parts,)."""
    right = np.zeros(parts)
    for one, segments in zip(scores, streams, strict=True):
        for first, end, label in segments.tolist():
            places = first + np.maximum(np.ceil(np.arange(1, parts + 1) / parts * (end - first)).astype(int) - 1, 0)
            right += one[places].argmax(1) == label
    return right / max(1, sum(len(segments) for segments in streams))


def _by_position(recognised: list[npt.NDArray[np.bool_]]) -> npt.NDArray[np.float64]:
    longest = max(len(row) for row in recognised)
    return np.array([np.mean([row[i] for row in recognised if len(row) > i]) for i in range(longest)])


def _slope(recognised: list[npt.NDArray[np.bool_]]) -> tuple[float, float]:
    """Of a straight line through each stream of at least two actions: mean change from its first to its last place, and 1.96 standard errors."""
    changes = []
    for row in recognised:
        if len(row) >= 2:
            place = np.linspace(-0.5, 0.5, len(row))
            changes.append(float((place * row).sum() / (place * place).sum()))
    if len(changes) < 2:
        return (changes[0] if changes else 0.0), float("nan")
    return float(np.mean(changes)), float(1.96 * np.std(changes, ddof=1) / np.sqrt(len(changes)))
