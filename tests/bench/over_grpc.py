"""Sequence steps over gRPC, unary and in one stream, beside the same over HTTP and beside an echo on gRPC's own server, interleaved in one run.

python -m tests.bench.over_grpc [--rounds 5] [--seconds 2] [--sequences 64] [--quick]

The client speaks just enough of HTTP/2 for this, from ready bytes, since gRPC's Python client takes more time for a call than the server.
"""

from __future__ import annotations

import argparse
import os
import socket
import struct
import sys
import tempfile
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter_ns
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from service.grpc_messages import ModelInferRequest, ModelInferResponse, ModelStreamInferResponse
from tests import toy_models
from tests.bench import programs
from tests.bench.dialects import SequenceSteps, Streaming
from tests.bench.figures import conditions
from tests.bench.load import Group, run
from tests.bench.wire import PATIENCE_S, LoadError

Floats = npt.NDArray[np.float32]

TOY = toy_models.WIDE
CORES = 2
PATH = "/inference.GRPCInferenceService/"
DATA, HEADERS, RST, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
END_STREAM, ACK, END_HEADERS = 1, 1, 4
WINDOW = 2**31 - 1
FRAME = struct.Struct("!HBBBI")  # length (high 16 bits, low 8 bits), type, flags, stream


@dataclass(frozen=True)
class Result:
    """Steps a second, round trips, and processor time of the server for a step."""

    steps_per_s: float
    p50_ms: float
    p99_ms: float
    server_us: float


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return FRAME.pack(len(payload) >> 8, len(payload) & 0xFF, kind, flags, stream) + payload


def literal(name: bytes, value: bytes) -> bytes:
    """A header that the server is to remember, so that later requests name it by a number, as gRPC's clients do."""
    return b"\x40" + bytes([len(name)]) + name + bytes([len(value)]) + value


class Http2:
    """One connection with calls of gRPC on it, in closed loops: `answered(stream, message)` is called for each message that comes."""

    def __init__(self, address: str, method: str) -> None:
        host, _, port = address.rpartition(":")
        self.socket = socket.create_connection((host, int(port)), timeout=PATIENCE_S)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        settings = struct.pack("!HIHIHI", 1, 0, 2, 0, 4, WINDOW)  # no table of headers, no push, a window that never closes
        self.socket.sendall(
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(SETTINGS, 0, 0, settings) + frame(WINDOW_UPDATE, 0, 0, struct.pack("!I", WINDOW - 65535))
        )
        names = [(b":authority", address.encode()), (b":path", (PATH + method).encode()), (b"te", b"trailers"), (b"content-type", b"application/grpc")]
        self._first = b"\x83\x86" + b"".join(literal(*one) for one in names)  # POST, http
        self._later = b"\x83\x86\xc1\xc0\xbf\xbe"
        self._next = 1
        self._rest = b""
        self._window = 65535
        self._held: deque[bytes] = deque()
        self._out = b""
        self._parts: dict[int, bytes] = {}  # of messages that lie in several frames

    def call(self) -> int:
        """Begins a call, without its message; returns its stream."""
        stream, self._next = self._next, self._next + 2
        self.send(frame(HEADERS, END_HEADERS, stream, self._first if stream == 1 else self._later))
        return stream

    def message(self, stream: int, message: bytes, end: bool) -> None:
        data = frame(DATA, END_STREAM * end, stream, b"\0" + len(message).to_bytes(4, "big") + message)
        if len(data) - 9 > self._window or self._held:
            self._held.append(data)
        else:
            self._window -= len(data) - 9
            self.send(data)

    def end(self, stream: int) -> None:
        self.send(frame(DATA, END_STREAM, stream))

    def send(self, data: bytes) -> None:
        self._out += data

    def flush(self) -> None:
        if self._out:
            self.socket.sendall(self._out)
            self._out = b""

    def receive(self, answered: Callable[[int, bytes], None]) -> bool:
        """Takes what has come; whether the server has ended a call meanwhile without another message."""
        data = self.socket.recv(2**18)
        if not data:
            raise LoadError("gRPC: the server closed the connection")
        rest, at, ended = self._rest + data, 0, False
        while len(rest) - at >= 9:
            high, low, kind, flags, stream = FRAME.unpack_from(rest, at)
            end = at + 9 + (high << 8 | low)
            if len(rest) < end:
                break
            payload = rest[at + 9 : end]
            at = end
            if kind == DATA:
                payload = self._parts.pop(stream, b"") + payload
                while len(payload) >= 5 and len(payload) >= 5 + (size := int.from_bytes(payload[1:5], "big")):
                    answered(stream, payload[5 : 5 + size])
                    payload = payload[5 + size :]
                if payload:
                    self._parts[stream] = payload
            elif kind == HEADERS and flags & END_STREAM:
                ended = True
                if b"grpc-status" in payload and b"grpc-status\x010" not in payload:
                    raise LoadError(f"gRPC: a call was refused: {payload[:300]!r}")
            elif kind == WINDOW_UPDATE and stream == 0:
                self._window += int.from_bytes(payload, "big")
                while self._held and len(self._held[0]) - 9 <= self._window:
                    self._window -= len(self._held[0]) - 9
                    self.send(self._held.popleft())
            elif kind == SETTINGS and not flags & ACK:
                self.send(frame(SETTINGS, ACK, 0))
            elif kind == PING and not flags & ACK:
                self.send(frame(PING, ACK, 0, payload))
            elif kind in (RST, GOAWAY):
                raise LoadError(f"gRPC: the server gave up: {payload[:300]!r}")
        self._rest = rest[at:]
        return ended


class Steps:
    """`sequences` that each have one step under way, as unary calls on one connection or all in one stream."""

    def __init__(self, address: str, frames: Floats, sequences: int, first_id: int, streaming: bool) -> None:
        self.streaming = streaming
        self._http2 = Http2(address, "ModelStreamInfer" if streaming else "ModelInfer")
        self._stream = self._http2.call() if streaming else 0
        self._messages = [[request(frames[(at + i) % len(frames)], first_id + i, i) for at in range(8)] for i in range(sequences)]
        self._opening = [request(frames[i % len(frames)], first_id + i, i, start=True) for i in range(sequences)]
        self._closing = [request(frames[0], first_id + i, i, end=True) for i in range(sequences)]
        self._owners: dict[int, int] = {}
        self._taken = [0] * sequences
        self._sent_ns = [0] * sequences
        self._under_way = 0
        self.latencies: list[int] = []
        self.scores: list[bytes] = []  # the first of the first sequence
        self._again = False

    def drive(self, seconds: float) -> float:
        """Keeps all sequences busy for so long and then waits for the last answers; returns how long that took."""
        began = perf_counter_ns()
        until, patience = began + int(seconds * 1e9), began + int((seconds + PATIENCE_S) * 1e9)
        self._again, self.latencies = seconds > 0, []
        for i in range(len(self._taken)):
            self._send(i)
        self._http2.flush()
        while self._under_way:
            self._http2.receive(self._answered)
            now = perf_counter_ns()
            self._again = now < until
            self._http2.flush()
            if now > patience:
                raise LoadError(f"gRPC: {self._under_way} sequences had no answer within {PATIENCE_S} s")
        return (perf_counter_ns() - began) / 1e9

    def close(self) -> None:
        """Ends all sequences."""
        self._messages = [[one] * 8 for one in self._closing]
        self.drive(0)
        self._http2.socket.close()

    def _send(self, i: int) -> None:
        message = self._messages[i][self._taken[i] % 8] if self._taken[i] else self._opening[i]
        self._sent_ns[i] = perf_counter_ns()
        self._under_way += 1
        if self.streaming:
            self._http2.message(self._stream, message, False)
        else:
            stream = self._http2.call()
            self._owners[stream] = i
            self._http2.message(stream, message, True)

    def _answered(self, stream: int, data: bytes) -> None:
        if self.streaming:
            told = ModelStreamInferResponse.FromString(data)
            if told.error_message:
                raise LoadError(f"gRPC: {told.error_message}")
            response = told.infer_response
            i = int(response.id)
        else:
            response, i = ModelInferResponse.FromString(data), self._owners.pop(stream)
        self._taken[i] += 1
        if "sequence_step" in response.parameters and response.parameters["sequence_step"].int64_param != self._taken[i]:
            raise LoadError(f"gRPC: sequence {i}: step {self._taken[i]} was expected, not {response}")
        if i == 0 and len(self.scores) < 32:
            self.scores.append(response.raw_output_contents[0])
        self.latencies.append(perf_counter_ns() - self._sent_ns[i])
        self._under_way -= 1
        if self._again:
            self._send(i)


def request(frame: Floats, sequence: int, number: int, start: bool = False, end: bool = False) -> bytes:
    """As Triton's client sends it."""
    message = ModelInferRequest(model_name="bench", id=str(number), raw_input_contents=[frame.tobytes()])
    message.inputs.add(name="frames", datatype="FP32", shape=[1, 1, *frame.shape])
    message.parameters["sequence_id"].int64_param = sequence
    message.parameters["sequence_start"].bool_param = start
    message.parameters["sequence_end"].bool_param = end
    data: bytes = message.SerializeToString()
    return data


class Bench:
    """The service with both ports, and the echo."""

    def __init__(self, folder: Path, args: argparse.Namespace, stack: ExitStack) -> None:
        self.args = args
        toy_models.write_toy(folder, "bench", TOY)
        self.frames = toy_models.example_frames(TOY, 64)
        [port] = programs.free_ports(1)
        self._service = stack.enter_context(programs.service(folder, grpc_port=port))
        self._echo = stack.enter_context(programs.script("grpc_echo.py", len(TOY.classes)))
        self._address = f"127.0.0.1:{port}"
        self._sequences = 0
        run([Group(Streaming(self._service.url, len(TOY.classes)), 1)], self.frames, 0.01)  # compiles, for seconds, which connections over HTTP do not wait for
        self.scores: dict[str, list[bytes]] = {}

    def measure(self, who: str) -> Result:
        echo = who.startswith("echo")
        process = (self._echo if echo else self._service).process_id
        if who == "HTTP":
            before = cpu_s(process)
            group = Group(SequenceSteps(self._service.url, len(TOY.classes)), self.args.sequences)
            found = run([group], self.frames, self.args.seconds, warmup=self.args.warmup)[0]
            spent = (cpu_s(process) - before) / found.messages * found.seconds / (found.seconds + self.args.warmup)
            return Result(found.frames_per_s, found.p50_ms, found.p99_ms, 1e6 * spent)
        address = urlsplit(self._echo.url).netloc if echo else self._address
        self._sequences += 1000
        steps = Steps(address, self.frames, self.args.sequences, self._sequences, who.endswith("stream"))
        steps.drive(self.args.warmup)
        before = cpu_s(process)
        seconds = steps.drive(self.args.seconds)
        spent = cpu_s(process) - before
        latencies = steps.latencies
        steps.close()
        if not echo:
            self.scores[who] = steps.scores
        p50, p99 = np.percentile(latencies, [50, 99]) / 1e6
        return Result(len(latencies) / seconds, p50, p99, 1e6 * spent / len(latencies))


def cpu_s(process: int) -> float:
    """Processor time that the process has taken, all its threads."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


VARIANTS = ("HTTP", "gRPC", "gRPC stream", "echo", "echo stream")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.over_grpc", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="medians are over these (default 5)")
    parser.add_argument("--seconds", type=float, default=2.0, help="for one variant in one round (default 2)")
    parser.add_argument("--warmup", type=float, default=0.3, help="seconds before each (default 0.3)")
    parser.add_argument("--sequences", type=int, default=64, help="each has one step under way (default 64)")
    parser.add_argument("--quick", action="store_true", help="one round of moments: shows that it works, its figures mean nothing")
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.seconds, args.warmup = 1, 0.2, 0.1
    told = conditions(programs.pin(CORES), rounds=args.rounds, seconds=args.seconds, sequences=args.sequences)
    found: dict[str, list[Result]] = {who: [] for who in VARIANTS}
    try:
        with ExitStack() as stack:
            bench = Bench(Path(stack.enter_context(tempfile.TemporaryDirectory())), args, stack)
            for number in range(args.rounds):
                for who in VARIANTS if number % 2 == 0 else VARIANTS[::-1]:
                    found[who].append(bench.measure(who))
    except LoadError as error:
        sys.exit(f"bench: {error}")
    console = Console(width=120)
    table = Table("variant", "steps/s", "over HTTP", "p50 ms", "p99 ms", "server us/step")
    for who, results in found.items():
        ratio = median(one.steps_per_s / http.steps_per_s for one, http in zip(results, found["HTTP"], strict=True))
        middle = [median(getattr(one, name) for one in results) for name in ("steps_per_s", "p50_ms", "p99_ms", "server_us")]
        table.add_row(who, f"{middle[0]:,.0f}", f"{ratio:.2f}", f"{middle[1]:.2f}", f"{middle[2]:.2f}", f"{middle[3]:.0f}")
    console.print(table)
    same = bench.scores["gRPC"][:16] == bench.scores["gRPC stream"][:16]
    console.print(f"scores of unary calls and of the stream: {'the same bits' if same else 'NOT the same bits'}")
    console.print(", ".join(f"{name} {value}" for name, value in told.items()))
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
