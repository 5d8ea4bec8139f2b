"""Scores of an evaluation as a file, so that networks can be averaged without running the clips again."""

from __future__ import annotations

import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from training.checkpoint import Checkpoint
from training.evaluate import Evaluation


class ScoresError(ValueError):
    """Kept scores are missing, damaged, or of other clips than those they are to be averaged with."""


def save(result: Evaluation, path: Path) -> None:
    """Writes scores (N, classes), labels (N,) and which clips are copies (N,), in the order of the split."""
    copied = np.zeros(len(result.labels), bool) if result.copied is None else result.copied
    with path.open("wb") as file:
        np.savez(file, scores=result.scores, labels=result.labels, copied=copied)


def load(path: Path) -> Evaluation:
    """What `save` wrote; the accuracy along clips is not among it."""
    try:
        with path.open("rb") as file, np.load(file) as arrays:  # opened here, as numpy leaves a damaged one open
            return replace(Evaluation.of(arrays["scores"], arrays["labels"]), copied=arrays["copied"])
    except FileNotFoundError:
        raise ScoresError(f"{path}: no scores were kept; delete {path.with_suffix('.json').name} beside it and evaluate again") from None
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ScoresError(f"{path}: not scores of an evaluation: {error}") from None


def check_same_clips(runs: dict[Path, Checkpoint], part: str) -> None:
    """Raises `ScoresError` unless this part of the data, its classes included, is the same in all runs by their configurations."""

    def clips(run: Checkpoint) -> tuple[object, ...]:
        data = run.config.data
        held_out = (data.validation, data.validation_share, data.folds, data.fold, data.fold_by) if part != "test" else ()
        return run.subject.classes, data.reader, data.test, held_out

    first, *others = runs
    for other in others:
        if clips(runs[other]) != clips(runs[first]):
            raise ScoresError(f"{other}: its {part} clips or its classes are not those of {first}; scores are averaged clip by clip")


def average(results: list[Evaluation]) -> Evaluation:
    """The mean of several networks' scores on the same clips."""
    first = results[0]
    for result in results[1:]:
        if result.scores.shape != first.scores.shape or not np.array_equal(result.labels, first.labels):
            raise ScoresError(f"these runs were evaluated on other clips: {len(first.labels)} and {len(result.labels)}, or with other labels or classes")
    return replace(Evaluation.of(np.stack([result.scores for result in results]).mean(0), first.labels), copied=first.copied)
