"""How frames are sent over each protocol: what streams are opened with, what their messages look like, what answers must be.

Messages are built here once; the compiled loop only fills in the number of a message's first frame. A dialect that is `bare` opens and
closes nothing: it sends the same bytes to a program that keeps no streams.
"""

from __future__ import annotations

import itertools
import json
import struct
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import orjson

from tests.bench.native import BINARY, DECIMAL, DIGITS, HTTP, LITTLE_ENDIAN, NO_NUMBER, WEBSOCKET
from tests.bench.wire import Http, LoadError, Websocket, client_message

Floats = npt.NDArray[np.float32]
Wire = Websocket | Http
HEADER = struct.Struct("<BBHIQ")  # version, kind, track, count, first
FRAMES, ACK = 1, 3
ACKNOWLEDGED = 32  # frames, at least; well inside the 64 whose answers a server keeps
ACK_MESSAGE = client_message(BINARY, HEADER.pack(1, ACK, 0, 0, 0))
JSON, OCTETS = "application/json", "application/octet-stream"
ENDS_HEAD = b"\r\n"

_sequences = itertools.count(1)  # ids that no two streams of a run share


@dataclass(frozen=True)
class Body:
    """What follows a stream's head, and where in it the number of its first frame goes."""

    data: bytes
    number_at: int = 0


@dataclass(frozen=True)
class Stream:
    """An open stream: its connection, what each of its messages begins with, and what it is called where it is."""

    wire: Wire
    head: bytes = b""
    name: str = ""


@dataclass(frozen=True)
class Dialect:
    """One protocol to one address. `classes` is how many scores an answer has; 0 where it has none."""

    url: str
    classes: int = 0
    model: str = "bench"
    bare: bool = False

    kind: ClassVar[int] = HTTP
    number: ClassVar[int] = NO_NUMBER
    opening: ClassVar[int] = 0  # frames that opening a stream takes
    stateless: ClassVar[bool] = False  # whether every message begins from the zero state

    def open(self, count: int, first: Floats, bodies: Sequence[Body], stack: ExitStack) -> list[Stream]:
        """`count` streams, which will send these bodies, on connections that `stack` closes.

        `first` (1, ...) is the frame that is sent where opening takes one. Raises `LoadError`.
        """
        raise NotImplementedError

    def bodies(self, messages: Sequence[Floats]) -> list[Body]:
        """One for each message (frames, ...)."""
        raise NotImplementedError

    def close(self, streams: Sequence[Stream], first: Floats) -> None:
        """Says that the streams are at their end, where that is said."""

    def ack_every(self, per_message: int) -> int:
        """Messages between two acknowledgements; 0: never."""
        return 0

    @property
    def answer_bytes(self) -> int:
        """Of every answer without the transport's header; 0 where they differ."""
        return 0

    @property
    def numbered(self) -> bool:
        """Whether the compiled loop finds the number of the last frame in a binary header."""
        return False

    def scores(self, answer: bytes, frames: int) -> Floats:
        """(classes,) of the last frame, out of an answer to a stream that has taken `frames` by then. Raises `LoadError` for any other answer."""
        scores = self._scores(answer, frames)
        if scores.shape != (self.classes,) or not np.isfinite(scores).all():
            raise LoadError(f"{type(self).__name__}: {self.classes} finite scores were expected, not {answer[:200]!r}")
        return scores

    def _scores(self, answer: bytes, frames: int) -> Floats:
        return np.frombuffer(answer[len(answer) - 4 * self.classes :], "<f4")


class Streaming(Dialect):
    """Our websocket: binary messages with a header, binary answers of the last frame."""

    kind = WEBSOCKET
    number = LITTLE_ENDIAN

    def open(self, count: int, first: Floats, bodies: Sequence[Body], stack: ExitStack) -> list[Stream]:
        address = f"{self.url.replace('http', 'ws', 1)}/v1/models/{self.model}/stream"
        wires: list[Websocket] = []
        for start in range(0, count, 64):  # side by side, but no more than a server's backlog holds
            some = [stack.enter_context(Websocket(address, f"stream {index}")) for index in range(start, min(count, start + 64))]
            for wire in some:
                wire.shake_hands()
            for wire in some:
                wire.accepted()
                wire.say(type="open", answers="binary", scores="last")
            for wire in some:
                wire.hear("opened")
            wires += some
        return [Stream(wire) for wire in wires]

    def close(self, streams: Sequence[Stream], first: Floats) -> None:
        for stream in streams:
            assert isinstance(stream.wire, Websocket)
            stream.wire.say(type="close")
        for stream in streams:
            assert isinstance(stream.wire, Websocket)
            stream.wire.hear("closed")

    def bodies(self, messages: Sequence[Floats]) -> list[Body]:
        made = [client_message(BINARY, HEADER.pack(1, FRAMES, 0, len(message), 0) + message.tobytes()) for message in messages]
        return [Body(data, len(data) - message.nbytes - 8) for data, message in zip(made, messages, strict=True)]

    def ack_every(self, per_message: int) -> int:
        return max(1, ACKNOWLEDGED // per_message)

    @property
    def answer_bytes(self) -> int:
        return HEADER.size + 4 * self.classes

    @property
    def numbered(self) -> bool:
        return not self.bare


class RestSteps(Dialect):
    """A REST session: frames and answers as JSON."""

    number = DECIMAL

    def open(self, count: int, first: Floats, bodies: Sequence[Body], stack: ExitStack) -> list[Stream]:
        wires = [stack.enter_context(Http(self.url, f"session {index}")) for index in range(count)]
        names = ["bare" if self.bare else json.loads(wire.ask("POST", f"/v1/models/{self.model}/sessions"))["session"] for wire in wires]
        return [Stream(wire, wire.head("POST", f"/v1/sessions/{name}/frames", Content_Type=JSON), name) for wire, name in zip(wires, names, strict=True)]

    def bodies(self, messages: Sequence[Floats]) -> list[Body]:
        return [json_body(b'{"first":%b,"frames":' % (b" " * DIGITS), message) for message in messages]

    def close(self, streams: Sequence[Stream], first: Floats) -> None:
        for stream in streams:
            if not self.bare:
                assert isinstance(stream.wire, Http)
                stream.wire.ask("DELETE", f"/v1/sessions/{stream.name}")

    def _scores(self, answer: bytes, frames: int) -> Floats:
        value = read_object(answer)
        if not self.bare and value.get("frame") != frames - 1:
            raise LoadError(f"session: an answer for frame {frames - 1} was expected, not {answer[:200]!r}")
        return np.array(value.get("scores", ()), np.float32)


class SequenceSteps(Dialect):
    """A sequence of the Open Inference Protocol with binary tensors, as its stock client sends it; all messages have as many frames."""

    opening = 1

    def open(self, count: int, first: Floats, bodies: Sequence[Body], stack: ExitStack) -> list[Stream]:
        streams = []
        for index in range(count):
            wire, name = stack.enter_context(Http(self.url, f"sequence {index}")), next(_sequences)
            if not self.bare and not self.stateless:
                self._ask(wire, name, first, start=True)
            size = len(bodies[0].data)
            asked = self._asked(name, size, first, self.stateless, self.stateless)
            length = str(len(asked) + size)
            head = wire.head("POST", self._path, Content_Length=length, Inference_Header_Content_Length=str(len(asked)))
            streams.append(Stream(wire, head + ENDS_HEAD + asked, str(name)))
        return streams

    def bodies(self, messages: Sequence[Floats]) -> list[Body]:
        return [Body(message.tobytes()) for message in messages]

    def close(self, streams: Sequence[Stream], first: Floats) -> None:
        for stream in streams:
            if not self.bare and not self.stateless:
                assert isinstance(stream.wire, Http)
                self._ask(stream.wire, int(stream.name), first, end=True)

    def sample(self, first: Floats) -> bytes:
        """An answer as every step gets it."""
        with Http(self.url, "sample") as wire:
            name = next(_sequences)
            self._ask(wire, name, first, start=True)
            return self._ask(wire, name, first, end=True)

    @property
    def _path(self) -> str:
        return f"/v2/models/{self.model}/infer"

    def _ask(self, wire: Http, name: int, frame: Floats, *, start: bool = False, end: bool = False) -> bytes:
        asked = self._asked(name, frame.nbytes, frame, start, end)
        return wire.ask("POST", self._path, asked + frame.tobytes(), Inference_Header_Content_Length=str(len(asked)))

    def _asked(self, name: int, size: int, frame: Floats, start: bool, end: bool) -> bytes:
        """What a request says before `size` bytes of frames like `frame` (1, ...)."""
        tensor = {"name": "frames", "shape": [1, size // frame.nbytes, *frame.shape[1:]], "datatype": "FP32", "parameters": {"binary_data_size": size}}
        sequence = {"sequence_id": name, "sequence_start": start, "sequence_end": end}
        outputs = [{"name": "scores", "parameters": {"binary_data": True}}]
        return orjson.dumps({"id": "", "inputs": [tensor], "outputs": outputs, "parameters": sequence})

    def _scores(self, answer: bytes, frames: int) -> Floats:
        if not self.bare:
            step = read_object(answer[: len(answer) - 4 * self.classes]).get("parameters", {}).get("sequence_step")
            if step != frames:
                raise LoadError(f"sequence: step {frames} was expected, not {answer[:200]!r}")
        return super()._scores(answer, frames)


class Clips(Dialect):
    """Whole clips, binary, each from the zero state."""

    stateless = True

    def open(self, count: int, first: Floats, bodies: Sequence[Body], stack: ExitStack) -> list[Stream]:
        wires = [stack.enter_context(Http(self.url, f"client {index}")) for index in range(count)]
        return [Stream(wire, wire.head("POST", f"/v1/models/{self.model}/predict?answers=binary&scores=last", Content_Type=OCTETS)) for wire in wires]

    def bodies(self, messages: Sequence[Floats]) -> list[Body]:
        return [_with_length(message.tobytes()) for message in messages]

    @property
    def answer_bytes(self) -> int:
        return HEADER.size + 4 * self.classes


def _with_length(body: bytes, number_at: int = 0) -> Body:
    head = b"Content-Length: %d\r\n\r\n" % len(body)
    return Body(head + body, len(head) + number_at)


def json_body(begin: bytes, message: Floats) -> Body:
    """`begin` and the frames, each number with as many digits as tell its float32 from all others."""
    frames = orjson.dumps(message, option=orjson.OPT_SERIALIZE_NUMPY)
    return _with_length(begin + frames + b"}", begin.find(b" " * DIGITS))


def read_object(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except ValueError as error:
        raise LoadError(f"JSON was expected, not {data[:200]!r}") from error
    if not isinstance(value, dict):
        raise LoadError(f"an object was expected, not {data[:200]!r}")
    return value
