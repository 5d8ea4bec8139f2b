"""How frames are sent to others' servers. Each keeps the state of a stream under a name that the client chose or was given."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np

from tests.bench.dialects import JSON, Body, Dialect, Floats, Stream, json_body, read_object
from tests.bench.native import BINARY, WEBSOCKET
from tests.bench.wire import Http, Websocket, client_message


class HandWritten(Dialect):
    """`handwritten.py`: frames and scores as JSON."""

    def open(self, count: int, first: Floats) -> list[Stream]:
        wires = [Http(self.url, f"stream {index}") for index in range(count)]
        names = [json.loads(wire.ask("POST", "/streams"))["stream"] for wire in wires]
        return [Stream(wire, wire.head("POST", f"/streams/{name}/frames", Content_Type=JSON), name) for wire, name in zip(wires, names, strict=True)]

    def bodies(self, messages: Sequence[Floats]) -> list[Body]:
        return [json_body(b'{"frames":', message) for message in messages]

    def close(self, streams: Sequence[Stream], first: Floats) -> None:
        for stream in streams:
            assert isinstance(stream.wire, Http)
            stream.wire.ask("DELETE", f"/streams/{stream.name}")
            stream.wire.socket.close()

    def _scores(self, answer: bytes, frames: int) -> Floats:
        return np.array(read_object(answer).get("scores", ()), np.float32)


class HandWrittenWebsocket(Dialect):
    """`handwritten.py`: a message is frames as they lie in memory, its answer the scores of the last."""

    kind = WEBSOCKET

    def open(self, count: int, first: Floats) -> list[Stream]:
        wires = [Websocket(f"{self.url.replace('http', 'ws', 1)}/stream", f"stream {index}") for index in range(count)]
        for wire in wires:
            wire.shake_hands()
        for wire in wires:
            wire.accepted()
        return [Stream(wire) for wire in wires]

    def bodies(self, messages: Sequence[Floats]) -> list[Body]:
        return [Body(client_message(BINARY, message.tobytes())) for message in messages]

    @property
    def answer_bytes(self) -> int:
        return 4 * self.classes
