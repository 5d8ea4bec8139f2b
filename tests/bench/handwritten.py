"""What a user would write today: FastAPI and onnxruntime, the state of each stream in a dict, every message run as it comes.

    python tests/bench/handwritten.py MODEL_FILE     prints `Serving on URL` and serves until it is told to stop

The model runs on the event loop, in one thread: a thread pool (`def` instead of `async def`) makes it slower.
"""

from __future__ import annotations

import socket
import sys
import uuid
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import uvicorn
from fastapi import FastAPI, HTTPException, WebSocket, WebSocketDisconnect
from pydantic import BaseModel

Floats = npt.NDArray[np.float32]


class Frames(BaseModel):
    """The next frames of a stream, or a clip."""

    frames: list[list[float]]


class Model:
    """The file in one session of onnxruntime."""

    def __init__(self, path: str) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.state_width: int = next(one.shape[1] for one in self.session.get_inputs() if one.name == "state")
        self.frame_width: int = next(one.shape[2] for one in self.session.get_inputs() if one.name == "frames")

    def start(self) -> Floats:
        return np.zeros((1, self.state_width), np.float32)

    def step(self, frames: Floats, state: Floats) -> tuple[Floats, Floats]:
        """frames (time, width) -> scores (classes,) of the last, next state."""
        feeds = {"frames": frames[None], "lengths": np.array([len(frames)]), "state": state}
        scores, state = self.session.run(["scores", "next_state"], feeds)
        return scores[0, -1], state


def create_app(model: Model) -> FastAPI:
    app = FastAPI()
    states: dict[str, Floats] = {}

    @app.post("/streams")
    async def open_stream() -> dict[str, str]:
        name = uuid.uuid4().hex
        states[name] = model.start()
        return {"stream": name}

    @app.post("/streams/{name}/frames")
    async def step(name: str, body: Frames) -> dict[str, Any]:
        if name not in states:
            raise HTTPException(404, "no such stream")
        scores, states[name] = model.step(np.array(body.frames, np.float32), states[name])
        return {"label": int(scores.argmax()), "scores": scores.tolist()}

    @app.delete("/streams/{name}")
    async def close_stream(name: str) -> None:
        states.pop(name, None)

    @app.post("/predict")
    async def predict(body: Frames) -> dict[str, Any]:
        scores, _ = model.step(np.array(body.frames, np.float32), model.start())
        return {"label": int(scores.argmax()), "scores": scores.tolist()}

    @app.websocket("/stream")
    async def stream(websocket: WebSocket) -> None:
        await websocket.accept()
        state = model.start()
        try:
            while True:
                frames = np.frombuffer(await websocket.receive_bytes(), np.float32).reshape(-1, model.frame_width)
                scores, state = model.step(frames, state)
                await websocket.send_bytes(scores.tobytes())
        except WebSocketDisconnect:
            pass

    return app


def main() -> None:
    app = create_app(Model(sys.argv[1]))
    listening = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(
        app, loop="uvloop", http="httptools", ws="websockets-sansio", ws_per_message_deflate=False, log_config=None, access_log=False, server_header=False
    )
    print(f"Serving on http://127.0.0.1:{listening.getsockname()[1]}", flush=True)
    uvicorn.Server(config).run(sockets=[listening])


if __name__ == "__main__":
    main()
