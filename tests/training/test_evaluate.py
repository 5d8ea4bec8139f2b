"""Evaluation: last real frames, whole clips, nothing left changed."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from model.config import ModelConfig
from model.network import Network
from tests.training.synthetic import clip_set
from training.evaluate import Evaluation, evaluate


@pytest.mark.parametrize("longest", [1, 40])
def test_scores_are_those_of_each_clip_alone_at_its_last_frame(lived_in: Callable[..., Network], longest: int) -> None:
    network, clips = lived_in(ModelConfig(kind="plain", layers=1, units=6), (2,)), clip_set(70, shortest=1, longest=longest)
    result = evaluate(network, clips)
    frames_right = frames = 0
    for i, clip in enumerate(clips.frames):
        with torch.no_grad():
            logits, _ = network(torch.from_numpy(clip)[None], torch.tensor([len(clip)]), network.initial_state(1))
        np.testing.assert_allclose(result.scores[i], torch.softmax(logits[0, -1], -1).numpy(), atol=1e-6)
        frames_right += int((logits[0].argmax(-1) == clips.labels[i]).sum())
        frames += len(clip)
    assert result.frame_accuracy == pytest.approx(frames_right / frames)
    assert result.loss == pytest.approx(-np.log(result.scores[np.arange(70), clips.labels]).mean(), rel=1e-5)
    if longest == 1:
        assert result.accuracy == pytest.approx(result.frame_accuracy)


@pytest.mark.parametrize("training", [True, False])
def test_leaves_the_network_as_it_was(lived_in: Callable[..., Network], training: bool) -> None:
    network = lived_in(ModelConfig(kind="plain", layers=1, units=6, dropout=0.5), (2,)).train(training)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    first, second = evaluate(network, clip_set(9)), evaluate(network, clip_set(9))
    assert np.array_equal(first.scores, second.scores)  # no dropout
    assert network.training is training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_confusion_counts_truth_by_guess() -> None:
    scores = np.eye(3, dtype=np.float32)[[0, 0, 1, 2, 1]]
    result = Evaluation(scores, np.array([0, 1, 1, 2, 0]), 0.0, 0.0)
    assert result.confusion.tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 1]]
    assert result.accuracy == 0.6


def test_a_class_without_clips_is_no_trouble(lived_in: Callable[..., Network]) -> None:
    clips = clip_set(4)
    result = evaluate(lived_in(ModelConfig(kind="plain", layers=1, units=6), (2,)), replace(clips, labels=np.zeros(4, np.int64)))
    assert result.confusion.sum() == 4
