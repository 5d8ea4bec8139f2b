"""The load generator against servers that answer rightly, wrongly, in pieces and not at all: it measures the first and names the fault of the others."""

from __future__ import annotations

import contextlib
import itertools
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from tests.bench import load as load_module
from tests.bench.dialects import HEADER, Body, Dialect, Floats, RestSteps, Stream, Streaming
from tests.bench.load import Group, Result, run
from tests.bench.native import BINARY, CLOSE, PING, PONG, TEXT
from tests.bench.wire import Http, LoadError, Websocket, client_message

FRAMES = np.arange(24, dtype=np.float32).reshape(8, 3)
SECONDS = 0.1
Answer = Callable[[int, int, bytes], list[bytes]]  # number of the message, frames in it, its payload -> what is written


def server_message(opcode: int, payload: bytes) -> bytes:
    length = (
        bytes([len(payload)])
        if len(payload) < 126
        else b"\x7e" + struct.pack("!H", len(payload))
        if len(payload) < 65536
        else b"\x7f" + struct.pack("!Q", len(payload))
    )
    return bytes([0x80 | opcode]) + length + payload


def right(last_frame: int, classes: int = 4) -> bytes:
    return server_message(BINARY, HEADER.pack(1, 2, 0, 1, last_frame) + np.full(classes, 0.25, "<f4").tobytes())


class Peer:
    """A websocket server on threads that writes what `answer` says; `heard` is what else it was sent."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.heard: list[tuple[int, bytes]] = []
        self.firsts: list[int] = []
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listening.getsockname()[1]}"
        self.threads = [threading.Thread(target=self._accept)]
        self.threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self.listening.accept()
            except OSError:  # closed
                return
            connection.settimeout(10)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.threads.append(threading.Thread(target=self._serve, args=(connection,)))
            self.threads[-1].start()

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(ConnectionError), connection, connection.makefile("rb") as file:  # a client that finds a fault leaves
            while file.readline() not in (b"\r\n", b""):
                pass
            connection.sendall(b"HTTP/1.1 101 Switching Protocols\r\n\r\n")
            numbers = itertools.count()
            while head := file.read(2):
                length = head[1] & 0x7F
                length = int.from_bytes(file.read(2 if length == 126 else 8), "big") if length > 125 else length
                assert file.read(4) == bytes(4), "the key is 0"
                payload = file.read(length)
                if head[0] == 0x80 | TEXT:
                    connection.sendall(server_message(TEXT, b'{"type":"opened"}' if b"open" in payload else b'{"type":"closed"}'))
                elif head[0] == 0x80 | BINARY and payload[1] == 1:
                    _, _, _, count, first = HEADER.unpack_from(payload)
                    self.firsts.append(first)
                    for part in self.answer(next(numbers), count, payload):
                        if not part:
                            return
                        connection.sendall(part)
                else:
                    self.heard.append((head[0] & 0x0F, payload))

    def close(self) -> None:
        self.listening.shutdown(socket.SHUT_RDWR)
        self.listening.close()
        for thread in self.threads:
            thread.join(10)


@contextlib.contextmanager
def peer(answer: Answer) -> Iterator[Peer]:
    made = Peer(answer)
    try:
        yield made
    finally:
        made.close()


def loaded(found: Peer, streams: int = 3, per_message: int = 1, record: int = 0, **more: float) -> Result:
    return run([Group(Streaming(found.url, 4), streams, per_message, **more)], FRAMES, SECONDS, warmup=0.02, record=record)[0]  # type: ignore[arg-type]


def last_of(number: int, count: int) -> int:
    return (number + 1) * count - 1


@pytest.mark.parametrize("per_message", [1, 5])
def test_right_answers_are_counted_and_recorded(per_message: int) -> None:
    with peer(lambda number, count, _: [right(last_of(number, count))]) as found:
        result = loaded(found, per_message=per_message, record=2)
    assert result.messages > 30
    assert result.frames_per_s == pytest.approx(result.messages * per_message / result.seconds)
    assert 0 < result.p50_ms <= result.p99_ms < 1000 * SECONDS + 100
    assert result.seconds == pytest.approx(SECONDS, rel=0.5)
    assert 0 < result.least_share <= 1
    assert [HEADER.unpack_from(answer)[-1] for answer in result.recorded[1]] == [per_message - 1, 2 * per_message - 1]
    acknowledged = [HEADER.unpack(payload)[-1] for opcode, payload in found.heard if opcode == BINARY]
    assert acknowledged
    assert all(first % per_message == 0 for first in acknowledged)
    assert sorted(set(found.firsts))[:3] == [0, per_message, 2 * per_message]


def test_frames_go_round_in_the_messages() -> None:
    payloads: dict[int, bytes] = {}

    def answer(number: int, count: int, payload: bytes) -> list[bytes]:
        payloads[number] = payload[HEADER.size :]
        return [right(last_of(number, count))]

    with peer(answer) as found:
        loaded(found, streams=1, per_message=3)
    for number in range(10):  # 64 messages of 3 frames; 8 different frames
        wanted = np.take(FRAMES, range(number * 3, number * 3 + 3), axis=0, mode="wrap")
        assert payloads[number] == wanted.tobytes()


def test_answers_in_pieces_pings_and_other_texts_are_put_together() -> None:
    def answer(number: int, count: int, payload: bytes) -> list[bytes]:
        whole = server_message(TEXT, b'{"type":"durable","frame":1}') + server_message(PING, b"here") + right(last_of(number, count))
        return [whole[:1], whole[1:33], whole[33:40], whole[40:]]

    with peer(answer) as found:
        assert loaded(found).messages > 10
    assert (PONG, b"here") in found.heard


def test_several_messages_under_way() -> None:
    def answer(number: int, count: int, payload: bytes) -> list[bytes]:
        time.sleep(0.003)
        return [right(last_of(number, count))]

    with peer(answer) as found:
        alone, deep = loaded(found, streams=1), loaded(found, streams=1, depth=4)
    assert 3 <= alone.p50_ms < 9
    assert deep.p50_ms > 3 * 3  # three are before it


def test_a_pace_is_kept_and_latency_counts_from_when_a_message_was_due() -> None:
    with peer(lambda number, count, _: [right(last_of(number, count))]) as found:
        result = loaded(found, streams=4, pace=400.0)
    assert result.messages == pytest.approx(400 * result.seconds, rel=0.25)

    def answer(number: int, count: int, payload: bytes) -> list[bytes]:
        time.sleep(0.01)
        return [right(last_of(number, count))]

    with peer(answer) as found:
        late = loaded(found, streams=1, pace=200.0)  # twice what it can do: messages wait longer and longer before they are sent
    assert late.p99_ms > 25


def test_two_groups_share_a_run() -> None:
    with peer(lambda number, count, _: [right(last_of(number, count))]) as found:
        dialect = Streaming(found.url, 4)
        few, many = run([Group(dialect, 3), Group(dialect, 1, per_message=64)], FRAMES, SECONDS, warmup=0.02)
    assert (few.streams, few.per_message, many.streams, many.per_message) == (3, 1, 1, 64)
    assert few.messages > 10
    assert many.frames_per_s == pytest.approx(64 * many.messages / many.seconds)


WRONG: dict[str, tuple[Answer, str]] = {
    "number": (lambda number, count, _: [right(last_of(number, count) + (number == 5))], "for another frame"),
    "length": (lambda number, count, _: [right(last_of(number, count), 5)], "came b'"),
    "twice": (lambda number, count, _: [right(last_of(number, count)) * 2], "for another frame"),
    "error": (lambda number, count, _: [server_message(TEXT, b'{"type":"error","code":"gap"}')], "gap"),
    "close": (lambda number, count, _: [server_message(CLOSE, b"\x0f\xa0gone")], "gone"),
    "cut": (lambda number, count, _: [right(last_of(number, count))[:7], b""], "closed by the server"),
    "endless": (lambda number, count, _: [server_message(BINARY, bytes(70000))], "longer than"),
    "nothing": (lambda number, count, _: [], "had no answer within"),
    "not a number": (lambda number, count, _: [right(last_of(number, count))[:-4] + np.float32(np.nan).tobytes()], "finite scores"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_anything_else_is_an_error_that_says_what(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_module, "PATIENCE_S", 0.3)
    answer, said = WRONG[fault]
    with peer(answer) as found, pytest.raises(LoadError, match=said):
        loaded(found, streams=1)


class Posts(Dialect):
    """Plain requests, for servers that the tests write."""

    number = RestSteps.number

    def open(self, count: int, first: Floats, bodies: Sequence[Body], stack: ExitStack) -> list[Stream]:
        wires = [stack.enter_context(Http(self.url, f"client {index}")) for index in range(count)]
        return [Stream(wire, wire.head("POST", "/")) for wire in wires]

    def bodies(self, messages: list[Floats]) -> list[Body]:  # type: ignore[override]
        return RestSteps(self.url).bodies(messages)


@contextlib.contextmanager
def http_peer(*answers: bytes) -> Iterator[tuple[str, list[bytes]]]:
    """An HTTP server for one connection, which answers with these in turn, the last for ever; its address and the bodies that it was sent."""
    listening, bodies = socket.create_server(("127.0.0.1", 0)), []

    def serve() -> None:
        connection, _ = listening.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.suppress(ConnectionError), connection, connection.makefile("rb") as file:
            for answer in itertools.chain(answers, itertools.repeat(answers[-1])):
                head = list(iter(file.readline, b"\r\n")) if file.peek(1) else []
                if not head:
                    return
                bodies.append(file.read(next(int(line.split(b":")[1]) for line in head if line.lower().startswith(b"content-length"))))
                connection.sendall(answer[:20])
                connection.sendall(answer[20:])

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", bodies
    finally:
        thread.join(10)
        listening.close()


GOOD = b"HTTP/1.1 200 OK\r\ndate: today\r\nCONTENT-LENGTH: 2\r\nx: y\r\n\r\n{}"


def test_http_answers_are_cut_by_their_length() -> None:
    with http_peer(GOOD, GOOD.replace(b": 2", b": 11").replace(b"{}", b'{"a":"b\\n"}')) as (url, bodies):
        result = run([Group(Posts(url), 1)], FRAMES, SECONDS, warmup=0.02, record=2)[0]
    assert result.recorded == [[b"{}", b'{"a":"b\\n"}']]
    assert result.messages > 10
    sent = [json.loads(body) for body in bodies]
    assert [one["first"] for one in sent] == list(range(len(sent)))
    assert sent[9]["frames"] == [FRAMES[1].tolist()]


@pytest.mark.parametrize(
    ("answer", "said"),
    [(GOOD.replace(b"200 OK", b"503 Full"), "503 Full"), (GOOD.replace(b"CONTENT-LENGTH: 2\r\n", b""), "HTTP/1.1 200"), (GOOD + b"more", "came b'")],
)
def test_other_http_answers_are_errors(answer: bytes, said: str) -> None:
    with http_peer(answer) as (url, _), pytest.raises(LoadError, match=said):
        run([Group(Posts(url), 1)], FRAMES, SECONDS, warmup=0.02)


def test_messages_are_masked_websocket_frames_of_every_length() -> None:
    assert client_message(BINARY, b"ab") == b"\x82\x82\0\0\0\0ab"
    assert client_message(BINARY, bytes(300))[:8] == b"\x82\xfe\x01\x2c\0\0\0\0"
    assert client_message(BINARY, bytes(70000))[:10] == b"\x82\xff" + (70000).to_bytes(8, "big")


@pytest.mark.parametrize("wire", [Websocket, Http])
def test_load_goes_to_loopback_only(wire: type[Websocket] | type[Http]) -> None:
    with pytest.raises(LoadError, match="loopback"):
        wire("http://192.0.2.1:80/", "stream 0")


def test_the_program_for_experiments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    FRAMES.tofile(tmp_path / "frames.f32")
    with peer(lambda number, count, _: [right(last_of(number, count))]) as found:
        address = f"{found.url.replace('http', 'ws')}/v1/models/toy/stream"
        options = ["--frames", str(tmp_path / "frames.f32"), "--frame-bytes", "12", "--answer-bytes", "16", "--streams", "2", "--seconds", "0.1"]
        monkeypatch.setattr("sys.argv", ["load.py", address, *options])
        load_module.main()
    assert json.loads(capsys.readouterr().out)["streams"] == 2
