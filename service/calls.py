"""The calls of the Open Inference Protocol on the predictor, whatever carries them: HTTP or gRPC."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from model.contract import FRAMES
from service import clips
from service.errors import Draining, Forbidden, Malformed, ModelNotFound, ModelNotReady
from service.frames import Payload
from service.metadata import model_metadata
from service.predictor import Predictor
from service.runner import Runner
from service.sequences import Sequences
from service.tensors import InferRequest

Tensor = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Inference:
    """What an inference gave. `outputs` are as the request wants them, in its order: float32, or bytes of classes; `parameters` say where a sequence stands."""

    version: str
    parameters: dict[str, int | str]
    outputs: list[Tensor]


async def infer(predictor: Predictor, sequences: Sequences, name: str, version: str | None, asked: InferRequest, size: int) -> Inference:
    """A batch of clips, or a step of a sequence. `size` is how many bytes the request had."""
    frames = clips.read(asked)
    parameters: dict[str, int | str] = {}
    if asked.step is None:
        runner = find_runner(predictor, name, version)
        answers, served = await clips.run(predictor, runner, frames, size, asked.wait_s), runner.version
    else:
        if len(frames) != 1:
            raise Malformed(f"a sequence has batch size 1, got {len(frames)}")
        payload = Payload("array", frames[0], size)
        session, answer = await sequences.step(name, version, asked.step, payload, len(frames[0]), asked.wait_s)
        answers, served = [answer], session.version
        parameters = {"sequence_id": asked.step.sequence, "sequence_step": answer.first + answer.count}
    steps = asked.inputs[FRAMES].shape[1]
    outputs = [clips.best(answers, wanted.classes) if wanted.classes else clips.scores(answers, steps) for wanted in asked.outputs]
    return Inference(served, parameters, outputs)


def find_runner(predictor: Predictor, name: str, version: str | None) -> Runner:
    """The model of that name. Raises `ModelNotFound`, or `ModelNotReady` where its file is there but cannot be served."""
    try:
        return predictor.runner(name, version)
    except ModelNotFound as error:
        if any(failure.name == name and version in (None, failure.version) for failure in predictor.catalog.failures):
            raise ModelNotReady(error.message) from None
        spoken = f"{name!r:.140}" if version is None else f"{name!r:.140} version {version!r:.140}"
        raise ModelNotFound(f"Request for unknown model: {spoken} is not found", **error.facts) from None


def check_open(predictor: Predictor) -> None:
    """Raises `Draining` when no more work is accepted."""
    if predictor.draining:
        raise Draining("the service is shutting down", retry_after=5)


def metadata(predictor: Predictor, name: str, version: str | None) -> dict[str, Any]:
    """The model's inputs and outputs; without a version, with all of them listed."""
    runner = find_runner(predictor, name, version)
    return model_metadata(runner.name, _versions(predictor, runner, version), runner.manifest)


def statistics(predictor: Predictor, name: str | None, version: str | None) -> list[dict[str, Any]]:
    """Of one version of a model, of all its versions, or of all models."""
    if name is None:
        return [_statistics(predictor.runner(entry.name, entry.version)) for entry in predictor.catalog]
    runner = find_runner(predictor, name, version)
    return [_statistics(predictor.runner(runner.name, one)) for one in _versions(predictor, runner, version)]


def index(predictor: Predictor, only_ready: bool) -> list[dict[str, str]]:
    """All models with their state; while the service drains, none is ready."""
    listed = predictor.models.states()
    if predictor.draining:
        listed = [one | {"state": "UNAVAILABLE", "reason": "the service is shutting down"} if one["state"] == "READY" else one for one in listed]
    return [one for one in listed if one["state"] == "READY" or not only_ready]


async def load(predictor: Predictor, name: str, parameters: Mapping[str, Any]) -> None:
    """Makes what is served of the model what its folder holds. Raises what `Repository.load` raises, and for files and configurations sent along."""
    if any(one.startswith("file:") for one in parameters):
        raise Forbidden("model files are not taken over the network: put them into the models directory")
    if "config" in parameters:
        raise Malformed("a configuration is not taken: everything about a model is in its file")
    await predictor.models.load(name)


def _versions(predictor: Predictor, runner: Runner, version: str | None) -> list[str]:
    return predictor.catalog.versions(runner.name) if version is None else [runner.version]


def _statistics(runner: Runner) -> dict[str, Any]:
    return {"name": runner.name, "version": runner.version, **runner.statistics.to_dict()}
