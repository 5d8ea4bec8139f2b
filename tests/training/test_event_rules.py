"""Rules are those that find most."""

from __future__ import annotations

import numpy as np

from training.event_rules import choose_rules
from training.stream_figures import detect, f1, match

CLASSES = ("wave", "clap", "nothing")


def stream(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Actions of 30 frames whose score is 0.55 with one frame in ten dropping out, and short bursts of something else that are nothing."""
    rng = np.random.default_rng(seed)
    scores, segments = [np.full((20, 3), [0.1, 0.1, 0.8])], []
    at = 20
    for _ in range(8):
        label = int(rng.integers(2))
        action = np.full((30, 3), 0.15)
        action[:, label] = 0.55
        action[rng.random(30) < 0.1, label] = 0.05
        burst = np.full((3, 3), 0.1)
        burst[:, 1 - label] = 0.8
        rest = np.full((20, 3), [0.1, 0.1, 0.8])
        rest[8:11] = burst
        scores += [action, rest]
        segments.append((at, at + 30, label))
        at += 50
    return np.concatenate(scores).astype(np.float32), np.array(segments, np.int64)


def test_the_rules_chosen_pass_over_bursts_and_dropouts() -> None:
    streams = [stream(i) for i in range(4)]
    scores, segments = [one[0] for one in streams], [one[1] for one in streams]
    rules, value = choose_rules(scores, segments, CLASSES, "nothing")
    assert rules.least > 3  # bursts last three frames
    assert rules.gap > 1
    assert rules.enter <= 0.55
    fresh = [stream(i) for i in range(10, 14)]
    again = f1([match(truth, detect(rules, CLASSES, one)) for one, truth in fresh])
    assert value > 0.95
    assert again > 0.9


def test_among_equals_the_quickest_is_taken() -> None:
    clear = np.repeat(np.eye(3, dtype=np.float32)[[2, 0, 2, 1, 2]], 40, axis=0)
    rules, value = choose_rules([clear], [np.array([(40, 80, 0), (120, 160, 1)], np.int64)], CLASSES, "nothing")
    assert value == 1.0
    assert (rules.least, rules.gap) == (2, 2)


def test_where_one_action_is_taken_for_two_in_turns_rules_are_pooled() -> None:
    """Actions of 30 frames whose first and last third is called one class and the second another, with twelve frames of nothing between."""
    action = np.repeat(np.array([[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.8, 0.1, 0.1]], np.float32), 10, axis=0)
    rest = np.tile(np.array([[0.05, 0.05, 0.9]], np.float32), (12, 1))
    scores = np.concatenate([rest, *[action, rest] * 4])
    segments = np.array([(12 + 42 * i, 42 + 42 * i, 0) for i in range(4)], np.int64)
    rules, value = choose_rules([scores], [segments], CLASSES, "nothing")
    assert rules.pooled
    assert value == 1.0
    assert not choose_rules([scores], [segments], CLASSES, None)[0].pooled, "without a class for nothing there is no telling that nothing happens"
