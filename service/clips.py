"""Batches of clips, as the Open Inference Protocol sends them: out of a request, through the model, into the tensors of its answer."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from model.contract import FRAMES, LENGTHS, Manifest
from service.errors import Empty, Malformed, ServiceError, WrongShape
from service.frames import Payload
from service.options import Options
from service.predictor import Predictor
from service.protocol import Answer
from service.runner import Runner
from service.tensors import InferRequest

Tensor = npt.NDArray[Any]

_OPTIONS = Options(scores="all", events=False)


def read(asked: InferRequest) -> list[Tensor]:
    """Each clip's real frames, (count, ...)."""
    frames, lengths = asked.inputs.get(FRAMES), asked.inputs.get(LENGTHS)
    if frames is None:
        raise Malformed(f"input {FRAMES} is missing")
    if frames.ndim < 3:
        raise WrongShape(f"expected {FRAMES} of shape (batch, time, *frame shape), got {list(frames.shape)}")
    if not frames.size:  # said here, for many clips of nothing would be much work
        raise Empty(f"no frames: {FRAMES} has shape {list(frames.shape)}")
    if lengths is None:
        return list(frames)
    if lengths.shape != frames.shape[:1]:
        raise WrongShape(f"{LENGTHS} must have one number for each clip, shape [{len(frames)}], got {list(lengths.shape)}")
    if not ((lengths >= 0) & (lengths <= frames.shape[1])).all():
        raise Malformed(f"{LENGTHS} must be from 0 to {frames.shape[1]}, the time axis of {FRAMES}, got {lengths.tolist()!r:.60}")
    return [clip[:length] for clip, length in zip(frames, lengths.tolist(), strict=True)]


async def run(predictor: Predictor, runner: Runner, clips: list[Tensor], size: int, wait_s: float | None) -> list[Answer]:
    """All by the same load of the model, some at a time: a long list does not fill its queue, where others wait too."""
    with runner.held():
        return await _run(predictor, runner, clips, size, wait_s)


async def _run(predictor: Predictor, runner: Runner, clips: list[Tensor], size: int, wait_s: float | None) -> list[Answer]:

    async def one(number: int, clip: Tensor) -> Answer:
        try:
            return await predictor.classify(runner, Payload("array", clip, size // len(clips)), _OPTIONS, wait_s)
        except ServiceError as error:
            raise error if len(clips) == 1 else type(error)(f"clip {number}: {error.message}", **error.facts) from None

    if len(clips) == 1:
        return [await one(0, clips[0])]
    answers: list[Answer] = []
    for first in range(0, len(clips), runner.most_rows):
        some = enumerate(clips[first : first + runner.most_rows], first)
        for answer in await asyncio.gather(*(one(number, clip) for number, clip in some), return_exceptions=True):
            if isinstance(answer, BaseException):
                raise answer
            answers.append(answer)
    return answers


def scores(answers: Sequence[Answer], steps: int) -> Tensor:
    """(batch, steps, classes); zeros beyond a clip's length."""
    if len(answers) == 1 and len(answers[0].scores) == steps:
        return answers[0].scores[None]
    scores = np.zeros((len(answers), steps, answers[0].scores.shape[1]), np.float32)
    for i, answer in enumerate(answers):
        scores[i, : len(answer.scores)] = answer.scores
    return scores


def best(answers: Sequence[Answer], count: int) -> Tensor:
    """The classification extension: (batch, count) of `score:index:label` as bytes, the best classes of each last frame first."""
    manifest = answers[0].manifest
    return np.array([[_spoken(manifest, answer.scores[-1], i) for i in np.argsort(-answer.scores[-1], kind="stable")[:count]] for answer in answers], object)


def _spoken(manifest: Manifest, scores: Tensor, index: int) -> bytes:
    label = f":{manifest.classes[index]}" if manifest.task == "classification" else ""
    return f"{scores[index]:f}:{index}{label}".encode()
