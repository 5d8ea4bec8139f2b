"""What a run is fed with: the same for the same epoch, measured on what was recorded, judged on streams that are the same for every seed."""

from typing import Any

import numpy as np
import pytest
import torch

from model.config import ModelConfig
from model.network import Network
from tests.training.synthetic import clip_set, config, recording_set
from training.batches import Batch
from training.config import Config
from training.distributed import Group
from training.evaluate import evaluate, evaluate_streams
from training.feed import ClipFeed, Feed, StreamFeed, feed
from training.splits import split

SHORT: dict[str, Any] = {"steps": 3, "frames": 20, "validation": [4, 5], "together": ["subject"]}


def made(settings: Config, data: Any) -> Feed:
    parts = split(settings, data)
    return feed(settings, parts.whole("training"), parts.whole("validation"))


def frames(batches: Any) -> list[bytes]:
    return [batch.frames.numpy().tobytes() for batch in batches]


@pytest.mark.parametrize("sections", [{}, {"streams": SHORT}])
def test_an_epoch_is_the_same_for_the_same_seed_and_number(sections: dict[str, Any]) -> None:
    one, same, other = (made(config(seed=seed, **sections), clip_set(48)) for seed in (0, 0, 1))
    first = frames(one.epoch(2))
    assert len(first) == one.per_epoch
    assert first == frames(one.epoch(2)) == frames(same.epoch(2))
    assert first != frames(one.epoch(3))
    assert first != frames(other.epoch(2))


def test_recordings_are_cut_into_clips_unless_streams_are_wanted() -> None:
    clips, streams = (made(config(**sections), recording_set(16)) for sections in ({}, {"streams": SHORT}))
    assert isinstance(clips, ClipFeed)
    assert isinstance(streams, StreamFeed)
    assert not clips.carries
    assert streams.carries
    assert clips.subject.classes == ("rising", "falling", "waving")
    assert streams.subject.classes == ("rising", "falling", "waving", "nothing")
    assert list(streams.validation or {}) == ["cuts", "smooth", "whole"]
    assert [len(one) for one in (streams.validation or {}).values()] == [4, 4, 4]  # of the form whole as many as recordings
    assert all(len(one.segments) == 5 for one in (streams.validation or {})["cuts"])


def test_features_are_measured_on_what_was_recorded() -> None:
    """Not on streams: raw cuts are movements that no body makes."""
    clips = clip_set(48)
    parts = split(config(), clips)
    known = {clip.tobytes() for clip in parts.training.frames}
    for sections in ({}, {"streams": SHORT}):
        samples = feed(config(**sections), parts.training, None).samples()
        rows = [row[:n].numpy() for batch, lengths in samples for row, n in zip(batch, lengths.tolist(), strict=True)]
        assert {row.tobytes() for row in rows} == known
    recordings = split(config(), recording_set(16)).recordings["training"]
    samples = feed(config(streams=SHORT), recordings, None).samples()
    rows = [row[:n].numpy() for batch, lengths in samples for row, n in zip(batch, lengths.tolist(), strict=True)]
    assert np.array_equal(np.concatenate(rows), np.concatenate(recordings.frames))
    assert max(len(row) for row in rows) == 20


def test_clips_are_judged_clip_by_clip_and_streams_action_by_action() -> None:
    torch.manual_seed(0)
    parts = split(config(), clip_set(48))
    network = Network(ModelConfig(kind="plain", layers=1, units=6), (2,), 3).eval()
    found = feed(config(), parts.training, parts.validation).validate(network, Group())
    assert found is not None
    assert found["validation_accuracy"] == evaluate(network, parts.named("validation")).accuracy
    assert feed(config(), parts.training, None).validate(network, Group()) is None
    with_nothing = Network(ModelConfig(kind="plain", layers=1, units=6), (2,), 4).eval()
    source = feed(config(streams=SHORT), parts.training, parts.validation)
    assert isinstance(source, StreamFeed)
    found = source.validate(with_nothing, Group())
    assert found is not None
    each = [evaluate_streams(with_nothing, streams) for streams in (source.validation or {}).values()]
    assert found["validation_accuracy"] == pytest.approx(np.mean([one.accuracy for one in each]))
    assert [found["validation_cuts"], found["validation_smooth"]] == [one.accuracy for one in each]
    assert found["validation_loss"] == pytest.approx(np.mean([one.loss for one in each]))
    assert found["validation_nothing_accuracy"] == pytest.approx(each[1].nothing_accuracy)  # raw cuts have no such frames
    assert feed(config(streams=SHORT), parts.training, None).validate(with_nothing, Group()) is None


def test_without_a_class_for_nothing_no_figure_is_made_up_for_it() -> None:
    parts = split(config(), clip_set(48))
    network = Network(ModelConfig(kind="plain", layers=1, units=6), (2,), 3).eval()
    found = feed(config(streams=SHORT | {"nothing": ""}), parts.training, parts.validation).validate(network, Group())
    assert found is not None
    assert "validation_nothing_accuracy" not in found
    assert all(np.isfinite(value) for value in found.values())


def test_validation_streams_are_the_same_for_every_seed() -> None:
    parts = split(config(), clip_set(48))
    one, other = (feed(config(seed=seed, streams=SHORT), parts.training, parts.validation) for seed in (0, 1))
    assert isinstance(one, StreamFeed)
    assert isinstance(other, StreamFeed)
    assert one.validation
    for form, streams in one.validation.items():
        assert all(np.array_equal(a.frames, b.frames) for a, b in zip(streams, (other.validation or {})[form], strict=True))


def test_weights_of_classes_and_of_nothing_reach_the_batches() -> None:
    clips = clip_set(48)
    few = clips.take(np.flatnonzero((clips.labels != 2) | (np.arange(48) % 4 == 2)))
    settings = config(train={"class_weights": "balanced", "early": 1.0}, streams=SHORT | {"nothing_weight": 0.25, "cuts": 0.0})
    batches: list[Batch] = list(feed(settings, few, None).epoch(0))
    labels, weights = batches[1].labels, batches[1].weights
    of_class = [weights[labels == label] for label in range(4)]
    assert all(len(one) and torch.allclose(one, one[0]) for one in of_class)
    counts = np.bincount(few.labels)
    assert float(of_class[2][0] / of_class[0][0]) == pytest.approx(counts[0] / counts[2], rel=1e-4)
    assert float(of_class[3][0] / of_class[0][0]) == pytest.approx(0.25 / (len(few) / (3 * counts[0])), rel=1e-4)


@pytest.mark.parametrize("sections", [{}, {"streams": SHORT}])
def test_other_data_have_another_outline(sections: dict[str, Any]) -> None:
    one, same, other = (made(config(**sections), clip_set(48, seed=seed)) for seed in (0, 0, 1))
    assert one.outline == same.outline
    assert one.outline != other.outline
