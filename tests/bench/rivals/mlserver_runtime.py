"""MLServer: a runtime of its own for the model, with its adaptive batching; the stream's number is an input beside the frames."""

from __future__ import annotations

import os

import numpy as np
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse
from stepper import Stepper


class Streams(MLModel):  # type: ignore[misc]
    async def load(self) -> bool:
        self.stepper = Stepper(os.environ["BENCH_MODEL_FILE"])
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        inputs = {one.name: NumpyCodec.decode_input(one) for one in payload.inputs}
        scores = self.stepper.step(inputs["stream"].ravel().tolist(), inputs["frames"].astype(np.float32))
        return InferenceResponse(model_name=self.name, outputs=[NumpyCodec.encode_output("scores", scores)])
