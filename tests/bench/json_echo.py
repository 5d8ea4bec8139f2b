"""The limit of a session step with JSON: a FastAPI app as it is written without further thought, that takes the same body and answers as much.

Of the ways to write it this is the fastest: a model of pydantic for the body costs more, an answer without a type much more.

python tests/bench/json_echo.py ANSWER_FILE      prints `Serving on URL` and serves until it is told to stop
"""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI

app = FastAPI()
ANSWER: dict[str, Any] = {}


@app.post("/v1/sessions/{session_id}/frames")
async def step(session_id: str, body: dict[str, Any]) -> dict[str, Any]:
    return ANSWER


def main() -> None:
    ANSWER.update(json.loads(Path(sys.argv[1]).read_text()))
    listening = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app, loop="uvloop", http="httptools", log_config=None, access_log=False, server_header=False)
    print(f"Serving on http://127.0.0.1:{listening.getsockname()[1]}", flush=True)
    uvicorn.Server(config).run(sockets=[listening])


if __name__ == "__main__":
    main()
