"""The load generator: closed-loop websocket streams from one process, as cheap as Python allows. Standard library only.

One epoll loop over raw sockets. Messages are built once, masked with the key 0 (which leaves the payload as it is), so that sending one is
writing eight bytes of frame number into a ready buffer; an answer is recognised by its length. Everything is bounded in time and count.

    python tests/bench/load.py URL --frames FILE --frame-bytes 600 --answer-bytes 240 --streams 64 --per-message 1 --seconds 2

prints one JSON object, see `Result`.
"""

from __future__ import annotations

import argparse
import base64
import dataclasses
import json
import os
import select
import socket
import struct
import sys
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter_ns, process_time_ns
from typing import Any
from urllib.parse import urlsplit

HEADER = struct.Struct("<BBHIQ")  # version, kind, track, count, first
FRAMES, SCORES, ACK = 1, 2, 3
TEXT, BINARY, CLOSE, PING, PONG = 0x1, 0x2, 0x8, 0x9, 0xA
ACK_EVERY = 32  # frames; well inside the 64 whose answers a server keeps
LOOPBACK = ("127.0.0.1", "::1", "localhost")
PATIENCE_S = 20.0  # for a handshake or the last answers


class LoadError(RuntimeError):
    """The server refused, failed or answered something else than scores; the message says what."""


@dataclass(frozen=True)
class Result:
    """What one run measured."""

    streams: int
    per_message: int
    messages: int
    seconds: float
    frames_per_s: float
    p50_ms: float
    p99_ms: float
    client_us: float  # processor time of this process for one message
    recorded: list[list[str]] = field(default_factory=list)  # [stream][message], base64 of a message's answer


class Wire:
    """A websocket as bytes: builds client messages, cuts server messages out of what arrived."""

    def __init__(self, url: str, subject: str) -> None:
        parts = urlsplit(url)
        if parts.hostname not in LOOPBACK:
            raise LoadError(f"load goes to loopback only, not to {parts.hostname}")
        self.subject = subject
        self.socket = socket.create_connection((parts.hostname, parts.port or 80), timeout=PATIENCE_S)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.rest = b""
        self._shake_hands(f"{parts.path}?{parts.query}", f"{parts.hostname}:{parts.port}")

    def _shake_hands(self, target: str, host: str) -> None:
        key = base64.b64encode(os.urandom(16)).decode()
        self.socket.sendall(
            f"GET {target} HTTP/1.1\r\nHost: {host}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        while b"\r\n\r\n" not in self.rest:
            self._receive("during the handshake")
        head, _, self.rest = self.rest.partition(b"\r\n\r\n")
        if b" 101 " not in head.split(b"\r\n")[0]:
            raise LoadError(f"{self.subject}: handshake refused: {(head + self.rest)[:300]!r}")

    def _receive(self, when: str) -> None:
        data = self.socket.recv(65536)
        if not data:
            raise LoadError(f"{self.subject}: connection closed {when}")
        self.rest += data

    def cut(self) -> tuple[int, bytes] | None:
        """The next whole message as (opcode, payload), or None where more bytes are needed."""
        rest = self.rest
        if len(rest) < 2:
            return None
        length, start = rest[1] & 0x7F, 2
        if length == 126:
            length, start = int.from_bytes(rest[2:4], "big"), 4
        elif length == 127:
            length, start = int.from_bytes(rest[2:10], "big"), 10
        if len(rest) < start + length:
            return None
        self.rest = rest[start + length :]
        return rest[0] & 0x0F, rest[start : start + length]

    def next_text(self, kind: str) -> dict[str, Any]:
        """Waits for the text message of type `kind`, passing over others."""
        while True:
            message = self.cut()
            if message is None:
                self._receive(f"before {kind!r}")
                continue
            if message[0] == CLOSE:
                raise LoadError(f"{self.subject}: closed before {kind!r}: {message[1][:200]!r}")
            if message[0] == TEXT:
                value: dict[str, Any] = json.loads(message[1])
                if value.get("type") == "error":
                    raise LoadError(f"{self.subject}: {value}")
                if value.get("type") == kind:
                    return value


def client_message(opcode: int, payload: bytes) -> bytearray:
    """One final websocket message, masked with the key 0."""
    if len(payload) < 126:
        length = struct.pack("!B", 0x80 | len(payload))
    elif len(payload) < 65536:
        length = struct.pack("!BH", 0x80 | 126, len(payload))
    else:
        length = struct.pack("!BQ", 0x80 | 127, len(payload))
    return bytearray(bytes([0x80 | opcode]) + length + bytes(4) + payload)


def frame_messages(frames: bytes, frame_bytes: int, per_message: int) -> list[bytearray]:
    """Messages of `per_message` frames each; the first frame's number is filled in when one is sent."""
    size = frame_bytes * per_message
    chunks = [frames[start : start + size] for start in range(0, len(frames) - size + 1, size)]
    return [client_message(BINARY, HEADER.pack(1, FRAMES, 0, per_message, 0) + chunk) for chunk in chunks]


@dataclass
class Stream:
    """One closed loop: a message is sent when the one before it is answered."""

    wire: Wire
    index: int
    sent: int = 0  # messages
    answered: int = 0
    sent_ns: int = 0
    record: list[bytes] = field(default_factory=list)


class Load:
    """All streams of a run. `latencies` holds nanoseconds, one per message answered while measuring."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.messages = frame_messages(Path(args.frames).read_bytes(), args.frame_bytes, args.per_message)
        self.number_at = len(self.messages[0]) - args.frame_bytes * args.per_message - 8
        self.ack = client_message(BINARY, HEADER.pack(1, ACK, 0, 0, 0))
        self.ack_every = max(1, ACK_EVERY // args.per_message)  # messages
        payload = HEADER.size + args.answer_bytes
        self.answer_head = bytes([0x80 | BINARY]) + (bytes([payload]) if payload < 126 else bytes([126]) + payload.to_bytes(2, "big"))
        self.answer_size = len(self.answer_head) + payload
        self.latencies = array("q")
        self.streams = [self._open(index) for index in range(args.streams)]
        self.by_fd = {stream.wire.socket.fileno(): stream for stream in self.streams}

    def _open(self, index: int) -> Stream:
        wire = Wire(self.args.url, f"stream {index}")
        wire.socket.sendall(client_message(TEXT, json.dumps({"type": "open", "answers": "binary", "scores": "last"}).encode()))
        wire.next_text("opened")
        wire.socket.setblocking(False)
        return Stream(wire, index)

    def send(self, stream: Stream) -> None:
        message = self.messages[(stream.index + stream.sent) % len(self.messages)]
        message[self.number_at : self.number_at + 8] = (stream.sent * self.args.per_message).to_bytes(8, "little")
        data: bytes | bytearray = message
        if stream.sent % self.ack_every == self.ack_every - 1:
            self.ack[-8:] = (stream.sent * self.args.per_message).to_bytes(8, "little")
            data = self.ack + message
        stream.sent += 1
        stream.sent_ns = perf_counter_ns()
        done = stream.wire.socket.send(data)
        if done < len(data):  # a full socket buffer: one message is in flight, so only a very large one gets here
            self._finish_sending(stream, bytes(data[done:]))

    def _finish_sending(self, stream: Stream, data: bytes) -> None:
        stream.wire.socket.settimeout(PATIENCE_S)
        stream.wire.socket.sendall(data)
        stream.wire.socket.setblocking(False)

    def receive(self, stream: Stream) -> bool:
        """Whether the stream's message has been answered."""
        data = stream.wire.socket.recv(65536)
        if len(data) == self.answer_size and not stream.wire.rest and data.startswith(self.answer_head):
            self._answered(stream, data[-self.args.answer_bytes :])
            return True
        return self._receive_slowly(stream, data)

    def _receive_slowly(self, stream: Stream, data: bytes) -> bool:
        if not data:
            raise LoadError(f"stream {stream.index}: connection closed by the server after {stream.answered} answers")
        stream.wire.rest += data
        answered = False
        while message := stream.wire.cut():
            opcode, payload = message
            if opcode == BINARY:
                self._answered(stream, payload[HEADER.size :])
                answered = True
            elif opcode == PING:
                stream.wire.socket.send(client_message(PONG, payload))
            elif opcode == CLOSE or (opcode == TEXT and json.loads(payload).get("type") == "error"):
                raise LoadError(f"stream {stream.index}: {payload[:300]!r}")
        return answered

    def _answered(self, stream: Stream, scores: bytes) -> None:
        stream.answered += 1
        if len(stream.record) < self.args.record:
            stream.record.append(scores)

    def run(self) -> Result:
        self._loop(self.args.warmup)
        self.latencies = array("q")
        cpu, started = process_time_ns(), perf_counter_ns()
        messages = self._loop(self.args.seconds)
        seconds = (perf_counter_ns() - started) / 1e9
        cpu = process_time_ns() - cpu
        self._close()
        ordered = sorted(self.latencies)
        return Result(
            streams=len(self.streams),
            per_message=self.args.per_message,
            messages=messages,
            seconds=seconds,
            frames_per_s=messages * self.args.per_message / seconds,
            p50_ms=ordered[len(ordered) // 2] / 1e6,
            p99_ms=ordered[int(len(ordered) * 0.99)] / 1e6,
            client_us=cpu / 1e3 / messages,
            recorded=[[base64.b64encode(scores).decode() for scores in stream.record] for stream in self.streams if stream.record],
        )

    def _loop(self, seconds: float) -> int:
        """Keeps one message per stream in flight for so long, then waits for the last answers; returns how many messages were answered."""
        poll = select.epoll()
        for fd in self.by_fd:
            poll.register(fd, select.EPOLLIN)
        for stream in self.streams:
            self.send(stream)
        now = perf_counter_ns()
        until, patience = now + int(seconds * 1e9), now + int((seconds + PATIENCE_S) * 1e9)
        flying, count, note = len(self.streams), 0, self.latencies.append
        while flying:
            for fd, _ in poll.poll(1.0):
                stream = self.by_fd[fd]
                if not self.receive(stream):
                    continue
                now = perf_counter_ns()
                note(now - stream.sent_ns)
                count += 1
                if now < until and count < self.args.max_messages:
                    self.send(stream)
                else:
                    flying -= 1
            if now > patience or (now := perf_counter_ns()) > patience:
                raise LoadError(f"{flying} streams had no answer within {PATIENCE_S} s")
        poll.close()
        return count

    def _close(self) -> None:
        for stream in self.streams:
            stream.wire.socket.settimeout(PATIENCE_S)
            stream.wire.socket.sendall(client_message(TEXT, b'{"type":"close"}'))
            stream.wire.next_text("closed")
            stream.wire.socket.close()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("url", help="ws://127.0.0.1:PORT/PATH")
    parser.add_argument("--frames", required=True, help="file of raw float32 frames; streams go round in it")
    parser.add_argument("--frame-bytes", type=int, required=True)
    parser.add_argument("--answer-bytes", type=int, required=True, help="scores of one answer, without its header")
    parser.add_argument("--streams", type=int, default=1)
    parser.add_argument("--per-message", type=int, default=1, help="frames in a message")
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--warmup", type=float, default=0.3, help="seconds before measuring")
    parser.add_argument("--max-messages", type=int, default=10_000_000)
    parser.add_argument("--record", type=int, default=0, help="keep the answers to each stream's first N messages")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        print(json.dumps(dataclasses.asdict(Load(arguments()).run())))
    except (LoadError, OSError) as error:
        sys.exit(f"load: {error}")
