"""Kept scores: come back as they were, and average only with scores of the same clips."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from training.evaluate import Evaluation
from training.scores import ScoresError, average, load, save

LABELS = np.array([0, 1, 2, 1])


def result(*scores: list[float]) -> Evaluation:
    return Evaluation.of(np.array(scores, np.float32), LABELS[: len(scores)], 0.5)


FIRST = result([0.6, 0.4, 0.0], [0.5, 0.3, 0.2], [0.1, 0.5, 0.4], [0.1, 0.8, 0.1])
SECOND = result([0.4, 0.6, 0.0], [0.1, 0.9, 0.0], [0.2, 0.2, 0.6], [0.6, 0.3, 0.1])


def test_come_back_as_they_were(tmp_path: Path) -> None:
    save(FIRST, tmp_path / "test.npz")
    found = load(tmp_path / "test.npz")
    assert np.array_equal(found.scores, FIRST.scores)
    assert np.array_equal(found.labels, FIRST.labels)
    assert (found.accuracy, found.loss) == (FIRST.accuracy, FIRST.loss)


def test_clips_that_training_has_as_well_are_left_out_of_one_figure(tmp_path: Path) -> None:
    assert (FIRST.copies, FIRST.accuracy_without_copies) == (0, FIRST.accuracy)
    known = replace(FIRST, copied=FIRST.scores.argmax(1) == FIRST.labels)  # what it gets right, it has seen
    save(known, tmp_path / "test.npz")
    for found in (load(tmp_path / "test.npz"), average([known, known])):
        assert (found.copies, found.accuracy, found.accuracy_without_copies) == (2, 0.5, 0.0)
    assert np.isnan(replace(FIRST, copied=np.ones(4, bool)).accuracy_without_copies)


def test_networks_that_are_wrong_in_different_places_are_right_together() -> None:
    assert (FIRST.accuracy, SECOND.accuracy) == (0.5, 0.5)
    assert average([FIRST]).accuracy == 0.5
    together = average([FIRST, SECOND])
    np.testing.assert_allclose(together.scores[1], [0.3, 0.6, 0.1], atol=1e-6)
    assert together.accuracy == 1


def test_other_clips_are_refused(tmp_path: Path) -> None:
    for other in (result([1, 0, 0]), Evaluation.of(FIRST.scores, LABELS[::-1].copy()), Evaluation.of(FIRST.scores[:, :2], np.array([0, 1, 1, 1]))):
        with pytest.raises(ScoresError, match="other clips"):
            average([FIRST, other])


def test_what_is_not_there_or_damaged_is_said(tmp_path: Path) -> None:
    with pytest.raises(ScoresError, match=r"test\.npz: no scores were kept; delete test\.json"):
        load(tmp_path / "test.npz")
    for content in (b"", b"PK\x03\x04 cut short", b"nothing"):
        (tmp_path / "test.npz").write_bytes(content)
        with pytest.raises(ScoresError, match="not scores of an evaluation"):
            load(tmp_path / "test.npz")
