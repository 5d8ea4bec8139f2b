"""Figures of streams, held against cases worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from model.contract import EventRules
from training.stream_figures import detect, early, f1, match, measure

CLASSES = ("wave", "clap", "nothing")
RULES = EventRules(nothing="nothing", enter=0.5, leave=0.5, least=2, gap=2)


def scores(text: str) -> np.ndarray:
    """One frame a letter: w, c or n is sure of that class."""
    return np.eye(3, dtype=np.float32)[["wcn".index(letter) for letter in text]]


def segments(*rows: tuple[int, int, int]) -> np.ndarray:
    return np.array(rows, np.int64).reshape(-1, 3)


def test_frames_actions_and_nothing_are_counted_apart() -> None:
    figures = measure([scores("nnwwwncnnnww")], [segments((1, 6, 0), (6, 10, 1))], CLASSES, RULES)
    assert figures.frames == pytest.approx(4 / 9)  # www of five, c of four
    assert figures.nothing == pytest.approx(1 / 3)  # n, then ww at the end
    assert figures.actions == 1.0  # clap has one frame, and no other action has one
    assert figures.actions_strict == 0.5  # but most of its frames were called nothing
    assert figures.by_position.tolist() == [1.0, 1.0]


def test_an_action_that_is_called_nothing_throughout_is_missed() -> None:
    figures = measure([scores("nnnnwwww")], [segments((0, 4, 0), (4, 8, 0))], CLASSES, RULES)
    assert figures.by_position.tolist() == [0.0, 1.0]
    assert figures.slope == pytest.approx(1.0)


def test_actions_that_were_trained_on_are_left_out_of_a_figure_of_their_own() -> None:
    places, one = segments((0, 2, 0), (2, 4, 0), (4, 6, 0)), scores("wwccww")
    for copied, wanted in (([True, False, False], 0.5), ([True, False, True], 0.0), ([False, True, False], 1.0)):
        figures = measure([one], [places], CLASSES, RULES, [np.array(copied)])
        assert (figures.actions, figures.actions_without_copies) == (pytest.approx(2 / 3), wanted)
    for copied in ([False] * 3, [True] * 3):
        assert np.isnan(measure([one], [places], CLASSES, RULES, [np.array(copied)]).actions_without_copies)
    assert np.isnan(measure([one], [places], CLASSES, RULES).actions_without_copies)


def test_the_slope_has_an_interval_over_streams() -> None:
    good, late, bad = scores("ww" * 4), scores("wwwwcccc"), scores("cccccccc")
    places = segments((0, 2, 0), (2, 4, 0), (4, 6, 0), (6, 8, 0))
    figures = measure([good, late, bad], [places] * 3, CLASSES, RULES)
    changes = [0.0, -1.2, 0.0]  # by hand: line through 1, 1, 0, 0 at -1/2, -1/6, 1/6, 1/2
    assert figures.slope == pytest.approx(np.mean(changes))
    assert figures.slope_ci95 == pytest.approx(1.96 * np.std(changes, ddof=1) / np.sqrt(3))
    assert figures.by_position.tolist() == pytest.approx([2 / 3, 2 / 3, 1 / 3, 1 / 3])


def test_detections_match_once_each_by_label_and_overlap() -> None:
    found = detect(RULES, CLASSES, scores("nnwwwwnnnccccwwnn"))
    assert found.tolist() == [[2, 6, 0, 3], [9, 13, 1, 10], [13, 15, 0, 14]]
    held = match(segments((1, 6, 0), (9, 17, 1), (16, 17, 0)), found)
    assert held.matches.tolist() == [[0, 0], [1, 1]]  # four of eight frames are just enough
    assert held.delays.tolist() == [2, 1]
    assert held.boundaries.tolist() == [1, 0, 0, 4]
    assert f1([held]) == pytest.approx(2 * 2 / (3 + 3))


def test_streams_are_counted_right_where_as_many_events_are_found_as_there_are_actions() -> None:
    figures = measure([scores("wwnnwwnn"), scores("wwwwwwnn")], [segments((0, 2, 0), (4, 6, 0))] * 2, CLASSES, RULES)
    assert figures.counted == 0.5


def test_one_event_over_two_performances_counts_once() -> None:
    held = match(segments((0, 10, 0), (10, 14, 0)), detect(RULES, CLASSES, scores("w" * 14)))
    assert held.matches.tolist() == [[0, 0]]
    assert f1([held]) == pytest.approx(2 / 3)


def test_an_event_still_open_ends_with_the_stream() -> None:
    assert detect(RULES, CLASSES, scores("nnccc")).tolist() == [[2, 5, 1, 3]]
    assert detect(RULES, CLASSES, scores("nnn")).shape == (0, 4)


def test_without_a_class_for_nothing_every_class_is_an_action() -> None:
    rules = EventRules(nothing=None, enter=0.5, leave=0.5, least=1, gap=1)
    figures = measure([scores("nnww")], [segments((0, 2, 2), (2, 4, 0))], CLASSES, rules)
    assert (figures.actions, figures.actions_strict, figures.f1) == (1.0, 1.0, 1.0)
    assert np.isnan(figures.nothing)


def test_early_recognition_counts_frames_from_the_start_of_an_action() -> None:
    curve = early([scores("nnccwwwwww")], [segments((0, 10, 0))], parts=5)
    assert curve.tolist() == [0.0, 0.0, 1.0, 1.0, 1.0]


def test_streams_without_actions_are_refused() -> None:
    with pytest.raises(ValueError, match="without a single action"):
        measure([scores("nn")], [segments()], CLASSES, RULES)
