"""What the load generator says before and after it measures, in Python: websocket handshakes and messages, single HTTP requests."""

from __future__ import annotations

import base64
import json
import os
import socket
import struct
from collections.abc import Sequence
from http.client import HTTPConnection, HTTPException
from typing import Any, Self
from urllib.parse import urlsplit

from tests.bench.native import CLOSE, TEXT

LOOPBACK = ("127.0.0.1", "::1", "localhost")
PATIENCE_S = 20.0  # for a handshake or any answer


class LoadError(RuntimeError):
    """The server refused, failed or answered something else than scores; the message says what."""


def place(url: str) -> tuple[str, int]:
    """Host and port of a URL; raises `LoadError` for a host that is not this machine."""
    parts = urlsplit(url)
    if parts.hostname not in LOOPBACK:
        raise LoadError(f"load goes to loopback only, not to {parts.hostname}")
    return parts.hostname, parts.port or 80


def client_message(opcode: int, payload: bytes) -> bytes:
    """One final websocket message, masked with the key 0, which leaves the payload as it is."""
    if len(payload) < 126:
        length = struct.pack("!B", 0x80 | len(payload))
    elif len(payload) < 65536:
        length = struct.pack("!BH", 0x80 | 126, len(payload))
    else:
        length = struct.pack("!BQ", 0x80 | 127, len(payload))
    return bytes([0x80 | opcode]) + length + bytes(4) + payload


class Wire:
    """A connection that is closed at the end of a block."""

    socket: socket.socket

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.socket.close()


class Websocket(Wire):
    """A websocket as bytes. `shake_hands` says what `accepted` waits for, so that many can be opened side by side."""

    def __init__(self, url: str, subject: str) -> None:
        parts = urlsplit(url)
        host, port = place(url)
        self.subject = subject
        self.socket = socket.create_connection((host, port), timeout=PATIENCE_S)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._target, self._host = f"{parts.path or '/'}" + (f"?{parts.query}" if parts.query else ""), f"{host}:{port}"
        self._rest = b""

    def shake_hands(self) -> None:
        key = base64.b64encode(os.urandom(16)).decode()
        self.socket.sendall(
            f"GET {self._target} HTTP/1.1\r\nHost: {self._host}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )

    def accepted(self) -> None:
        while b"\r\n\r\n" not in self._rest:
            self._receive("during the handshake")
        head, _, self._rest = self._rest.partition(b"\r\n\r\n")
        if b" 101 " not in head.split(b"\r\n")[0]:
            raise LoadError(f"{self.subject}: handshake refused: {(head + self._rest)[:300]!r}")

    def say(self, **fields: Any) -> None:
        """Sends a text message."""
        self.socket.sendall(client_message(TEXT, json.dumps(fields).encode()))

    def hear(self, kind: str) -> dict[str, Any]:
        """Waits for the text message of type `kind`, passing over others."""
        while True:
            opcode, payload = self._next(f"before {kind!r}")
            if opcode == CLOSE:
                raise LoadError(f"{self.subject}: closed before {kind!r}: {payload[:200]!r}")
            if opcode == TEXT:
                value: dict[str, Any] = json.loads(payload)
                if value.get("type") == "error":
                    raise LoadError(f"{self.subject}: {value}")
                if value.get("type") == kind:
                    return value

    def _next(self, when: str) -> tuple[int, bytes]:
        while True:
            rest = self._rest
            if len(rest) >= 2:
                length, start = rest[1] & 0x7F, 2
                if length >= 126:
                    start = 4 if length == 126 else 10
                    length = int.from_bytes(rest[2:start], "big")
                if len(rest) >= start + length:
                    self._rest = rest[start + length :]
                    return rest[0] & 0x0F, rest[start : start + length]
            self._receive(when)

    def _receive(self, when: str) -> None:
        data = self.socket.recv(65536)
        if not data:
            raise LoadError(f"{self.subject}: connection closed {when}")
        self._rest += data


class Http(Wire):
    """A connection that is kept alive; `socket` is handed to the compiled loop between single requests."""

    def __init__(self, url: str, subject: str) -> None:
        self._host, self._port = place(url)
        self.subject = subject
        self._connection = HTTPConnection(self._host, self._port, timeout=PATIENCE_S)
        self._connection.connect()
        self.socket = self._connection.sock
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def head(self, method: str, path: str, **headers: str) -> bytes:
        """What a request begins with, without the empty line that ends its head."""
        lines = [f"{method} {path} HTTP/1.1", f"Host: {self._host}:{self._port}", *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items())]
        return "".join(f"{line}\r\n" for line in lines).encode()

    def ask(self, method: str, path: str, body: bytes = b"", **headers: str) -> bytes:
        """One request; the body of a good answer."""
        try:
            self._connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
            response = self._connection.getresponse()
            data = response.read()
        except HTTPException as error:
            raise LoadError(f"{self.subject}: {method} {path}: {error!r}") from error
        if response.status >= 300:
            raise LoadError(f"{self.subject}: {method} {path}: {response.status} {data[:300]!r}")
        return data

    def ask_many(self, requests: Sequence[tuple[str, str, bytes]], **headers: str) -> list[bytes]:
        """Sends all of (method, path, body) before it reads the first answer; the bodies of the answers, which must be good."""
        heads = [self.head(method, path, Content_Length=str(len(body)), **headers) for method, path, body in requests]
        self.socket.sendall(b"".join(head + b"\r\n" + body for head, (_, _, body) in zip(heads, requests, strict=True)))
        answers = []
        with self.socket.makefile("rb") as file:
            for method, path, _ in requests:
                status, length = file.readline(), 0
                while (line := file.readline()) not in (b"\r\n", b""):
                    name, _, value = line.partition(b":")
                    if name.lower() == b"content-length":
                        length = int(value)
                answers.append(file.read(length))
                if status.split(b" ")[1:2] not in ([b"200"], [b"201"]):
                    raise LoadError(f"{self.subject}: {method} {path}: {status!r} {answers[-1][:300]!r}")
        return answers
