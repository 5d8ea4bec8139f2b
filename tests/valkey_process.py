"""Real Valkey or Redis servers for tests, as processes that can be killed: installed ones, else of the image that docker/ uses."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest

IMAGE = "valkey/valkey:8-trixie"
OLDEST = (7, 2)
READY_WITHIN_S = 20.0


@dataclass(frozen=True)
class Program:
    """How a server is started, and with which name it is killed."""

    path: str | None  # None: in a container
    image: str = IMAGE


@cache
def find_program() -> Program | None:
    """An installed server that is new enough (VALKEY_SERVER names another), or the image, where an engine has it."""
    for name in filter(None, (os.environ.get("VALKEY_SERVER"), "valkey-server", "redis-server")):
        path = shutil.which(name)
        if path is not None:
            told = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20, check=True).stdout
            found = re.search(r"v=(\d+)\.(\d+)", told)
            if found and tuple(map(int, found.groups())) >= OLDEST:
                return Program(path)
    if shutil.which("docker") is not None:
        asked = subprocess.run(["docker", "image", "inspect", IMAGE], capture_output=True, timeout=60, check=False)
        if asked.returncode == 0:
            return Program(None)
    return None


def need_program() -> Program:
    """Skips the test where no server is to be had, saying so."""
    program = find_program()
    if program is None:
        pytest.skip(
            f"no Valkey 8 or Redis 7.2: install valkey-server, name one in VALKEY_SERVER, or have Docker with the image {IMAGE}. "
            "The store on a server is NOT tested here"
        )
    return program


@dataclass
class Valkey:
    """One server on 127.0.0.1; what it has written stays in its directory over `kill` and `start`."""

    directory: Path
    port: int
    options: tuple[str, ...] = ()
    tls: bool = False
    first: str = ""  # a file of settings
    process: subprocess.Popen[bytes] | None = None
    container: str = field(default_factory=lambda: f"store-test-{uuid.uuid4().hex[:12]}")

    def start(self) -> None:
        program = need_program()
        port = ["--port", "0", "--tls-port", str(self.port)] if self.tls else ["--port", str(self.port)]
        arguments = [*filter(None, [self.first]), "--bind", "127.0.0.1", *port, *self.options]
        if program.path is not None:
            command = [program.path, *arguments, "--dir", str(self.directory)]
        else:
            user = f"{os.getuid()}:{os.getgid()}"
            command = ["docker", "run", "--rm", "--name", self.container, "--network", "host", "--user", user, "--volume", f"{self.directory}:{self.directory}"]
            command += ["--workdir", str(self.directory), program.image, "valkey-server", *arguments, "--dir", str(self.directory)]
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        self._wait_until_ready()

    def kill(self) -> None:
        """As a crash: no time to write anything."""
        self._signal("KILL")
        assert self.process is not None
        self.process.wait(30)

    def freeze(self) -> None:
        """Connections stay, nothing answers: what a cut network looks like."""
        self._signal("STOP")

    def thaw(self) -> None:
        self._signal("CONT")

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.thaw()
            self.kill()

    def cli(self, *words: str) -> str:
        """The answer of one command, as text."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=10) as connection:
            connection.sendall(b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in map(str.encode, words)))
            return connection.recv(65536).decode(errors="replace")

    def _signal(self, name: str) -> None:
        assert self.process is not None
        if need_program().path is None:
            subprocess.run(["docker", "kill", "--signal", name, self.container], check=False, capture_output=True, timeout=60)
        else:
            subprocess.run(["kill", f"-{name}", str(self.process.pid)], check=False, timeout=20)

    def _wait_until_ready(self) -> None:
        assert self.process is not None
        end = time.monotonic() + READY_WITHIN_S
        while time.monotonic() < end and self.process.poll() is None:
            try:
                if self.tls:
                    socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                    return
                if self.cli("PING").startswith(("+PONG", "-NOAUTH")):
                    return
            except OSError:
                pass
            time.sleep(0.02)
        pytest.fail(f"the server did not start: {(self.directory / 'log').read_text()[-3000:]}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def running(directory: Path, *options: str, tls: bool = False, port: int | None = None) -> Iterator[Valkey]:
    """A server that has started; it ends with the block. Without options it keeps an append-only file."""
    directory.mkdir(parents=True, exist_ok=True)
    server = Valkey(directory, port or free_port(), options or ("--appendonly", "yes", "--save", ""), tls)
    try:
        server.start()
        yield server
    finally:
        server.stop()


def join(nodes: list[Valkey], slots: list[tuple[int, int]]) -> None:
    """Makes a Cluster of the nodes, each with its slots from first to last."""
    first, *others = nodes
    for node, (begin, end) in zip(nodes, slots, strict=True):
        assert node.cli("CLUSTER", "ADDSLOTSRANGE", str(begin), str(end)) == "+OK\r\n"
    for node in others:
        assert first.cli("CLUSTER", "MEET", "127.0.0.1", str(node.port), node.options[-1]) == "+OK\r\n"
    stop = time.monotonic() + READY_WITHIN_S
    while not all(f"cluster_known_nodes:{len(nodes)}" in (told := node.cli("CLUSTER", "INFO")) and "cluster_state:ok" in told for node in nodes):
        assert time.monotonic() < stop, nodes[0].cli("CLUSTER", "INFO")
        time.sleep(0.05)
