"""Batches of clips: each row as if it had come alone."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service import clips
from service.catalog import Catalog
from service.errors import Empty, Malformed, NotFinite, Overloaded, ServiceError, WrongShape
from service.frames import Payload
from service.metrics import Metrics
from service.options import Options
from service.predictor import Predictor
from service.protocol import Answer
from service.settings import Settings
from service.tensors import InferRequest
from tests.toy_models import CHANNELS, example_frames

BATCH = np.stack([example_frames(CHANNELS, 9, seed) for seed in range(100)])


def asked(**inputs: Any) -> InferRequest:
    return InferRequest(None, inputs, (), None, None)


def answers_of(models: Path, some: list[Any], **changes: Any) -> tuple[list[Answer], list[Answer]]:
    """Together, and one after another."""

    async def scenario() -> tuple[list[Answer], list[Answer]]:
        async with Predictor(Catalog.load([models], "cpu", 1), Settings(**changes), Metrics()) as predictor:
            together = await clips.run(predictor, predictor.runner("channels"), some, 1000, None)
            alone = [await predictor.predict("channels", None, Payload("array", one, 100), Options(scores="all")) for one in some]
            return together, alone

    return asyncio.run(scenario())


def test_a_batch_larger_than_a_run_and_than_the_queue(models: Path) -> None:
    lengths = np.random.default_rng(0).integers(1, 10, len(BATCH))
    some = clips.read(asked(frames=BATCH, lengths=lengths))
    assert [len(one) for one in some] == lengths.tolist()
    together, alone = answers_of(models, some, max_batch=8, queue=8)
    assert [one.scores.tobytes() for one in together] == [one.scores.tobytes() for one in alone]
    scores = clips.scores(together, 9)
    assert scores.shape == (100, 9, 4)
    for found, expected, length in zip(scores, alone, lengths, strict=True):
        assert found[:length].tobytes() == expected.scores.tobytes()
        assert not found[length:].any()
    best = clips.best(together, 2)
    assert best.shape == (100, 2)
    for row, expected in zip(best, alone, strict=True):
        index = int(expected.scores[-1].argmax())
        assert row[0].decode() == f"{expected.scores[-1][index]:f}:{index}:{CHANNELS.classes[index]}"


def test_a_fault_names_its_clip(models: Path) -> None:
    spoilt = BATCH[:5].copy()
    spoilt[3, 2, 1] = np.nan
    with pytest.raises(NotFinite, match=r"clip 3: frame 2: ") as caught:
        answers_of(models, list(spoilt))
    assert caught.value.facts == {"frame": 2}
    with pytest.raises(NotFinite, match=r"^frame 2: "):
        answers_of(models, list(spoilt[3:4]))
    with pytest.raises(Overloaded, match="clip 1: ") as overloaded:
        answers_of(models, list(BATCH[:3]), max_batch=8, queue=1)
    assert overloaded.value.facts["retry_after"] == 1


@pytest.mark.parametrize(
    ("inputs", "error"),
    [
        ({}, Malformed),
        ({"lengths": np.array([1])}, Malformed),
        ({"frames": np.zeros((2, 3))}, WrongShape),
        ({"frames": np.zeros((0, 1, 3))}, Empty),
        ({"frames": np.zeros((1, 0, 3))}, Empty),
        ({"frames": np.zeros((2**24, 1, 0))}, Empty),
        ({"frames": np.zeros((2, 5, 3)), "lengths": np.array([5])}, WrongShape),
        ({"frames": np.zeros((2, 5, 3)), "lengths": np.array([[5, 5]])}, WrongShape),
        ({"frames": np.zeros((2, 5, 3)), "lengths": np.array([5, 6])}, Malformed),
        ({"frames": np.zeros((2, 5, 3)), "lengths": np.array([-1, 5])}, Malformed),
    ],
)
def test_faults_of_a_batch(inputs: dict[str, Any], error: type[ServiceError]) -> None:
    with pytest.raises(error):
        clips.read(asked(**inputs))


def test_a_clip_of_length_zero_is_empty(models: Path) -> None:
    with pytest.raises(Empty, match="clip 1: "):
        answers_of(models, clips.read(asked(frames=BATCH[:2], lengths=np.array([3, 0]))))
