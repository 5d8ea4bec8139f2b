"""Evaluation: last real frames, whole clips, nothing left changed."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from model.config import ModelConfig
from model.network import Network
from tests.training.synthetic import clip_set
from training import evaluate as module
from training.config import StreamConfig
from training.distributed import Group
from training.evaluate import Evaluation, evaluate, evaluate_streams
from training.streams import NO_CLASS, Stream, Streams


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


def test_nothing_said_of_a_clip_is_wrong(lived_in: Callable[..., Network]) -> None:
    network, clips = lived_in(ModelConfig(kind="plain", layers=1, units=6), (2,), classes=4), clip_set(20)
    with torch.no_grad():
        network.head.bias[3] = 50.0
    result = evaluate(network, clips)
    assert result.scores.shape == (20, 4)
    assert result.accuracy == 0
    assert result.confusion[:, 3].sum() == 20


def by_hand(network: Network, streams: list[Stream]) -> tuple[float, ...]:
    """Accuracy of actions, of their frames, of nothing, and loss: stream by stream, frame by frame."""
    actions, frames, others, losses = [], [], [], []
    for stream in streams:
        state, guesses = network.initial_state(1), []
        for frame, label in zip(stream.frames, stream.labels.tolist(), strict=True):
            with torch.no_grad():
                logits, state = network(torch.from_numpy(frame)[None, None], torch.tensor([1]), state)
            guesses.append(int(logits[0, 0].argmax()))
            if label != NO_CLASS:
                losses.append(-float(torch.log_softmax(logits[0, 0], -1)[label]))
        inside = np.zeros(len(stream.frames), bool)
        for first, end, label in stream.segments.tolist():
            said = guesses[first:end]
            actions.append(max(range(network.classes), key=lambda k, said=said: (said.count(k), -k)) == label)
            frames += [guess == label for guess in said]
            inside[first:end] = True
        others += [guess == label for guess, label, there in zip(guesses, stream.labels.tolist(), inside, strict=True) if not there and label != NO_CLASS]
    return float(np.mean(actions)), float(np.mean(frames)), float(np.mean(others)) if others else float("nan"), float(np.mean(losses))


@pytest.mark.parametrize("nothing", ["nothing", ""])
def test_streams_are_left_running_and_counted_action_by_action(lived_in: Callable[..., Network], nothing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STREAM_CHUNK", 50)
    made = Streams(clip_set(30), StreamConfig(nothing=nothing, idle=5))
    network = lived_in(ModelConfig(kind="plain", layers=2, units=6, norm="after"), (2,), classes=len(made.classes)).train()
    streams = [made.stream("cuts" if i % 2 else "smooth", i, seed=0, actions=3 + i) for i in range(5)]
    result = evaluate_streams(network, streams)
    assert network.training
    found = result.accuracy, result.frame_accuracy, result.nothing_accuracy, result.loss
    assert found == pytest.approx(by_hand(network.eval(), streams), rel=1e-5, nan_ok=True)
    assert np.isnan(result.nothing_accuracy) == (nothing == "")


def test_processes_divide_the_streams(lived_in: Callable[..., Network], monkeypatch: pytest.MonkeyPatch) -> None:
    made = Streams(clip_set(30), StreamConfig(idle=5))
    network = lived_in(ModelConfig(kind="plain", layers=1, units=6), (2,), classes=4)
    streams = [made.stream("smooth", i, seed=0, actions=4) for i in range(3)]
    counts: list[torch.Tensor] = []
    monkeypatch.setattr(Group, "total", lambda _, own: counts.append(own.clone()) or own)
    whole = evaluate_streams(network, streams)
    for rank in range(4):  # the last has none
        evaluate_streams(network, streams, Group(rank, 4))
    torch.testing.assert_close(sum(counts[1:]), counts[0])
    assert whole.accuracy == float(counts[0][1] / 12)
