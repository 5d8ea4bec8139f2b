"""BentoML: one worker, frames and scores as JSON."""

from __future__ import annotations

import os
from typing import Any

import bentoml
import numpy as np
from stepper import Stepper


@bentoml.service(workers=1, logging={"access": {"enabled": False}}, metrics={"enabled": False}, traffic={"timeout": 60})
class Streams:
    def __init__(self) -> None:
        self.stepper = Stepper(os.environ["BENCH_MODEL_FILE"])

    @bentoml.api
    async def step(self, stream: str, frames: list[list[float]]) -> dict[str, Any]:
        scores = self.stepper.step([stream], np.array([frames], np.float32))[0]
        return {"label": int(scores.argmax()), "scores": scores.tolist()}
