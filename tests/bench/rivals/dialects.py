"""How frames are sent to others' servers. Each keeps the state of a stream under a name that the client chose or was given."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import orjson

from tests.bench.dialects import ENDS_HEAD, JSON, Body, Dialect, Floats, SequenceSteps, Stream, json_body, read_object
from tests.bench.native import BINARY, WEBSOCKET
from tests.bench.wire import Http, Websocket, client_message

_names = itertools.count(1)  # no two streams of a run share one


class HandWritten(Dialect):
    """`handwritten.py`: frames and scores as JSON."""

    def open(self, count: int, first: Floats, bodies: Sequence[Body], stack: ExitStack) -> list[Stream]:
        wires = [stack.enter_context(Http(self.url, f"stream {index}")) for index in range(count)]
        names = [json.loads(wire.ask("POST", "/streams"))["stream"] for wire in wires]
        return [Stream(wire, wire.head("POST", f"/streams/{name}/frames", Content_Type=JSON), name) for wire, name in zip(wires, names, strict=True)]

    def bodies(self, messages: Sequence[Floats]) -> list[Body]:
        return [json_body(b'{"frames":', message) for message in messages]

    def close(self, streams: Sequence[Stream], first: Floats) -> None:
        for stream in streams:
            assert isinstance(stream.wire, Http)
            stream.wire.ask("DELETE", f"/streams/{stream.name}")

    def _scores(self, answer: bytes, frames: int) -> Floats:
        return np.array(read_object(answer).get("scores", ()), np.float32)


class HandWrittenClips(HandWritten):
    """`handwritten.py`: whole clips as JSON."""

    stateless = True

    def open(self, count: int, first: Floats, bodies: Sequence[Body], stack: ExitStack) -> list[Stream]:
        wires = [stack.enter_context(Http(self.url, f"client {index}")) for index in range(count)]
        return [Stream(wire, wire.head("POST", "/predict", Content_Type=JSON)) for wire in wires]

    def close(self, streams: Sequence[Stream], first: Floats) -> None:
        pass


class HandWrittenWebsocket(Dialect):
    """`handwritten.py`: a message is frames as they lie in memory, its answer the scores of the last."""

    kind = WEBSOCKET

    def open(self, count: int, first: Floats, bodies: Sequence[Body], stack: ExitStack) -> list[Stream]:
        wires = [stack.enter_context(Websocket(f"{self.url.replace('http', 'ws', 1)}/stream", f"stream {index}")) for index in range(count)]
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


class Named(Dialect):
    """JSON whose beginning names the stream. Spaces at the end give all bodies one length, which a stream's head can say."""

    path = "/"

    def begin(self, name: int) -> str:
        """The body up to the frames. The name of a clip is 0."""
        raise NotImplementedError

    def frames(self, message: Floats) -> bytes:
        """The frames and the rest of the body."""
        return orjson.dumps(message, option=orjson.OPT_SERIALIZE_NUMPY) + b"}"

    def open(self, count: int, first: Floats, bodies: Sequence[Body], stack: ExitStack) -> list[Stream]:
        streams = []
        for index in range(count):
            wire, begin = stack.enter_context(Http(self.url, f"stream {index}")), self.begin(0 if self.stateless else next(_names)).encode()
            head = wire.head("POST", self.path, Content_Type=JSON, Content_Length=str(len(begin) + len(bodies[0].data)))
            streams.append(Stream(wire, head + ENDS_HEAD + begin))
        return streams

    def bodies(self, messages: Sequence[Floats]) -> list[Body]:
        made = [self.frames(message) for message in messages]
        longest = max(map(len, made))
        return [Body(data.ljust(longest)) for data in made]

    def _scores(self, answer: bytes, frames: int) -> Floats:
        return np.array(read_object(answer).get("scores", ()), np.float32)


class LitServe(Named):
    path = "/predict"

    def begin(self, name: int) -> str:
        return f'{{"stream":"{name or ""}","frames":'


class BentoML(LitServe):
    path = "/step"


class MLServer(Named):
    path = "/v2/models/bench/infer"

    def begin(self, name: int) -> str:
        stream = {"name": "stream", "shape": [1, 1], "datatype": "INT64", "data": [name]}
        return f'{{"inputs":[{json.dumps(stream)},{{"name":"frames","datatype":"FP32",'

    def frames(self, message: Floats) -> bytes:
        data = orjson.dumps(message.ravel(), option=orjson.OPT_SERIALIZE_NUMPY)
        return b'"shape":%b,"data":%b}]}' % (orjson.dumps([1, *message.shape]), data)

    def _scores(self, answer: bytes, frames: int) -> Floats:
        outputs: list[dict[str, Any]] = read_object(answer).get("outputs", [{}])
        return np.array(outputs[0].get("data", ()), np.float32)


class Triton(SequenceSteps):
    """Its sequences tell no step."""

    def _scores(self, answer: bytes, frames: int) -> Floats:
        return Dialect._scores(self, answer, frames)


class LitServeClips(LitServe):
    stateless = True


class BentoMLClips(BentoML):
    stateless = True


class MLServerClips(MLServer):
    stateless = True


class TritonClips(Triton):
    """A sequence of one request, which is its first and its last."""

    stateless = True
    opening = 0
