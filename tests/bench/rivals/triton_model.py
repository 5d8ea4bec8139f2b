"""Triton's python backend: steps of sequences that its sequence batcher has made a batch of; their ids and beginnings come as control inputs."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

sys.path[:0] = os.environ["PYTHONPATH"].split(os.pathsep)  # the backend's interpreter does not look at it

import numpy as np  # noqa: E402
import triton_python_backend_utils as backend  # noqa: E402
from stepper import Stepper  # noqa: E402


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        parameters = json.loads(args["model_config"])["parameters"]
        self.stepper = Stepper(parameters["model_file"]["string_value"])

    def execute(self, requests: list[Any]) -> list[Any]:
        def array(request: Any, name: str) -> Any:
            return backend.get_input_tensor_by_name(request, name).as_numpy()

        streams = [int(array(request, "CORRID").ravel()[0]) for request in requests]
        for request, stream in zip(requests, streams, strict=True):
            if array(request, "START").any():
                self.stepper.forget(stream)
        scores = self.stepper.step(streams, np.concatenate([array(request, "frames") for request in requests]))
        return [backend.InferenceResponse([backend.Tensor("scores", row[None, None])]) for row in scores]
