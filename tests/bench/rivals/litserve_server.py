"""LitServe: one worker, its own batching on, frames and scores as JSON.

python litserve_server.py MODEL_FILE PORT
"""

from __future__ import annotations

import sys
from typing import Any

import litserve
import numpy as np
from stepper import Floats, Stepper

MOST, WAIT_S = 64, 0.0005


class Streams(litserve.LitAPI):  # type: ignore[misc]
    def setup(self, device: str) -> None:
        self.stepper = Stepper(sys.argv[1])

    def decode_request(self, request) -> tuple[str, Floats]:  # type: ignore[no-untyped-def]  # an annotation would make it a parameter of the query
        return request["stream"], np.array(request["frames"], np.float32)

    def batch(self, inputs: list[tuple[str, Floats]]) -> list[tuple[str, Floats]]:
        return inputs

    def predict(self, batch: list[tuple[str, Floats]]) -> Floats:
        return self.stepper.step([stream for stream, _ in batch], np.stack([frames for _, frames in batch]))

    def unbatch(self, output: Floats) -> list[Floats]:
        return list(output)

    def encode_response(self, output: Floats) -> dict[str, Any]:
        return {"label": int(output.argmax()), "scores": output.tolist()}


if __name__ == "__main__":
    api = Streams(max_batch_size=MOST, batch_timeout=WAIT_S)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1)
    server.run(host="127.0.0.1", port=int(sys.argv[2]), generate_client_file=False, log_level="warning")
