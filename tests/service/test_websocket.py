"""Websockets as bytes against a real server: what RFC 6455 asks of a server, and what becomes of clients that do not read."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from service import protocol, streaming
from tests.server_process import Server, running
from tests.toy_models import CHANNELS, example_frames

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0x0, 0x1, 0x2, 0x8, 0x9, 0xA
CLIP = example_frames(CHANNELS, 40, seed=41)
GUID = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
MOST = 6_400_000  # frames
OPEN = b'{"type":"open"}'


class Wire:
    """A websocket client that may break every rule."""

    def __init__(self, server: Server, path: str = "/v1/models/channels/stream", receive_buffer: int | None = None, **headers: str) -> None:
        host, port = server.url.removeprefix("http://").split(":")
        self.socket = socket.socket()
        if receive_buffer is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.settimeout(30)
        self.socket.connect((host, int(port)))
        self.rest = b""
        self.key = base64.b64encode(os.urandom(16)).decode()
        lines = {"Host": f"{host}:{port}", "Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Key": self.key, "Sec-WebSocket-Version": "13"}
        asked = "".join(
            f"{name}: {value}\r\n" for name, value in {**lines, **{name.replace("_", "-"): value for name, value in headers.items()}}.items() if value
        )
        self.socket.sendall(f"GET {path} HTTP/1.1\r\n{asked}\r\n".encode())
        while b"\r\n\r\n" not in self.rest:
            self.read()
        head, _, self.rest = self.rest.partition(b"\r\n\r\n")
        self.status, *answered = head.decode().split("\r\n")
        self.headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in answered)}

    def read(self) -> None:
        data = self.socket.recv(65536)
        if not data:
            raise EOFError
        self.rest += data

    def send(self, opcode: int, payload: bytes, *, final: bool = True, masked: bool = True, reserved: int = 0, size: int | None = None) -> None:
        length = len(payload) if size is None else size
        head = bytes([final << 7 | reserved << 4 | opcode])
        if length < 126:
            head += bytes([masked << 7 | length])
        elif length < 65536:
            head += bytes([masked << 7 | 126]) + struct.pack("!H", length)
        else:
            head += bytes([masked << 7 | 127]) + struct.pack("!Q", length)
        mask = os.urandom(4) if masked else b""
        hidden = bytes(byte ^ mask[i % 4] for i, byte in enumerate(payload)) if masked else payload
        self.socket.sendall(head + mask + hidden)

    def need(self, count: int) -> bytes:
        while len(self.rest) < count:
            self.read()
        part, self.rest = self.rest[:count], self.rest[count:]
        return part

    def hear(self) -> tuple[int, bytes]:
        first, second = self.need(2)
        assert first & 0x80, "the server sends whole messages"
        assert not second & 0x80, "a server masks nothing"
        length = second
        if length == 126:
            (length,) = struct.unpack("!H", self.need(2))
        elif length == 127:
            (length,) = struct.unpack("!Q", self.need(8))
        return first & 0x0F, self.need(length)

    def text(self) -> Any:
        opcode, payload = self.hear()
        assert opcode == TEXT, (opcode, payload)
        return json.loads(payload)

    def closed(self) -> int:
        """Reads on to the goodbye; its code."""
        while True:
            opcode, payload = self.hear()
            if opcode == CLOSE:
                return int.from_bytes(payload[:2], "big")

    def ended(self) -> bool:
        try:
            while True:
                self.read()
        except (EOFError, ConnectionResetError):
            return True


@pytest.fixture
def wire(server: Server) -> Iterator[Any]:
    with ExitStack() as stack:

        def connect(path: str = "/v1/models/channels/stream", **options: Any) -> Wire:
            made = Wire(server, path, **options)
            stack.callback(made.socket.close)
            return made

        yield connect


def test_the_handshake(wire: Any) -> None:
    answer = wire(Sec_WebSocket_Protocol="other, indrnn")
    assert answer.status == "HTTP/1.1 101 Switching Protocols"
    assert answer.headers["sec-websocket-accept"] == base64.b64encode(hashlib.sha1((answer.key + GUID).encode()).digest()).decode()
    assert answer.headers["sec-websocket-protocol"] == "indrnn"
    assert "sec-websocket-protocol" not in wire().headers
    assert "sec-websocket-extensions" not in wire(Sec_WebSocket_Extensions="permessage-deflate").headers


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/v1/nothing/here", {}, "403"),
        ("/v1/models/channels/stream", {"Sec_WebSocket_Key": "short"}, "400"),
        ("/v1/models/channels/stream", {"Sec_WebSocket_Key": ""}, "400"),
        ("/v1/models/channels/stream", {"Sec_WebSocket_Version": "8"}, "400"),
    ],
)
def test_handshakes_that_are_refused(wire: Any, path: str, headers: dict[str, str], status: str) -> None:
    assert wire(path, **headers).status.split()[1] == status


def test_messages_in_pieces_pings_between_them_and_a_goodbye(wire: Any) -> None:
    client = wire("/v1/models/channels/stream")
    client.send(TEXT, OPEN[:5], final=False)
    client.send(PING, b"between")
    client.send(CONTINUATION, OPEN[5:9], final=False)
    client.send(CONTINUATION, OPEN[9:])
    assert client.hear() == (PONG, b"between")
    assert client.text()["type"] == "opened"
    message = protocol.write_frames(0, CLIP[:4])
    client.send(BINARY, message[:7], final=False)
    client.send(CONTINUATION, message[7:])
    assert client.text()["count"] == 4
    client.send(PONG, b"nobody asked")
    client.send(BINARY, protocol.write_frames(4, CLIP[4:5]))
    assert client.text()["first"] == 4
    client.send(CLOSE, struct.pack("!H", 4321) + b"thanks")
    assert client.hear() == (CLOSE, struct.pack("!H", 4321))
    assert client.ended()
    silent = wire()
    silent.send(CLOSE, b"")
    assert silent.closed() == 1000
    assert silent.ended()


def test_an_empty_message_in_pieces(wire: Any) -> None:
    client = wire()
    client.send(TEXT, b"", final=False)
    client.send(CONTINUATION, b"")
    assert client.text()["code"] == "malformed"
    assert client.closed() == 4400


@pytest.mark.parametrize(
    ("breaks", "code"),
    [
        (lambda client: client.send(BINARY, b"x" * 16, masked=False), 1002),
        (lambda client: client.send(0x3, b""), 1002),
        (lambda client: client.send(PING, b"", final=False), 1002),
        (lambda client: client.send(PING, b"x" * 126), 1002),
        (lambda client: client.send(CONTINUATION, b"nothing to go on with"), 1002),
        (lambda client: (client.send(TEXT, b"{", final=False), client.send(TEXT, b"}")), 1002),
        (lambda client: client.send(TEXT, b"\xff\xfe"), 1007),
        (lambda client: client.send(BINARY, b"", size=2**21), 1009),
        (lambda client: client.send(BINARY, b"", size=2**62), 1009),
        (lambda client: [client.send(TEXT if not i else CONTINUATION, b"x" * 2**18, final=False) for i in range(5)], 1009),
        (lambda client: client.send(CLOSE, struct.pack("!H", 999)), 1002),
    ],
    ids=["unmasked", "opcode", "ping in pieces", "long ping", "continuation", "text in text", "utf-8", "too large", "far too large", "pieces", "close code"],
)
def test_what_breaks_the_rules_ends_that_connection_alone(wire: Any, breaks: Any, code: int) -> None:
    other, client = wire(), wire()
    for one in (other, client):
        one.send(TEXT, OPEN)
        assert one.text()["type"] == "opened"
    breaks(client)
    assert client.closed() == code
    assert client.ended()
    other.send(BINARY, protocol.write_frames(0, CLIP[:1]))
    assert other.text()["first"] == 0


def test_a_client_that_vanishes_leaves_its_session(wire: Any, http: httpx.Client) -> None:
    client = wire()
    client.send(TEXT, OPEN)
    session = client.text()["session"]
    client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.socket.close()  # with a reset
    for _ in range(100):
        if not http.get(f"/v1/sessions/{session}").json()["streaming"]:
            break
        time.sleep(0.05)
    else:
        pytest.fail("the session is still streamed by a client that is gone")


@contextmanager
def impatient(models: Path, tmp_path: Path, patience_s: float) -> Iterator[Server]:
    """A server of its own that leaves slow readers soon."""
    starter = tmp_path / "sitecustomize.py"
    starter.write_text(f"import service.streaming as streaming\nstreaming.SLOW_S = {patience_s}\n")
    path = os.pathsep.join(filter(None, [str(tmp_path), str(Path(streaming.__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    with running(models, tmp_path / "log", "--deadline-s", "60", PYTHONPATH=path) as server:
        yield server


def resident_kb(server: Server) -> int:
    return int(next(line.split()[1] for line in Path(f"/proc/{server.process.pid}/status").read_text().splitlines() if line.startswith("VmRSS")))


def test_a_client_that_does_not_read_is_bounded_and_then_left_and_may_come_back(models: Path, tmp_path: Path) -> None:
    """It never acknowledges and never reads, but sends for as long as it is let."""
    with impatient(models, tmp_path, 1.0) as server:
        client = Wire(server, "/v1/models/channels/stream?top_k=4", receive_buffer=2048)
        session = client.text()["session"]
        before, first = resident_kb(server), MOST
        client.socket.settimeout(3)
        with suppress(TimeoutError, ConnectionError):
            for first in range(0, MOST, 32):
                client.send(BINARY, protocol.write_frames(first, np.repeat(CLIP[:1], 32, axis=0)))
                client.send(BINARY, protocol.HEADER.pack(1, protocol.KIND_ACK, 0, 0, first))
        assert first < MOST - 32, "it was let send for ever"
        assert resident_kb(server) < before + 20_000
        facts = httpx.get(f"{server.url}/v1/sessions/{session}").json()
        assert facts["next_frame"] > 0
        for _ in range(100):
            if not httpx.get(f"{server.url}/v1/sessions/{session}").json()["streaming"]:
                break
            time.sleep(0.05)
        assert "slow_reader" in httpx.get(f"{server.url}/metrics").text
        client.socket.close()
        again = Wire(server, f"/v1/models/channels/stream?session={session}")
        opened = again.text()
        assert opened["type"] == "opened"
        assert opened["next_frame"] >= facts["next_frame"]
        again.socket.close()
