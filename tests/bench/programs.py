"""The processes of a run: each started, bounded in time and stopped here."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
START_S, STOP_S = 60.0, 15.0
GREETING = "Serving on "  # and an address: how every program says that it takes requests


@dataclass(frozen=True)
class Program:
    """A running server."""

    url: str
    process_id: int

    def memory(self) -> int:
        """Bytes of it that are in memory (VmRSS), its children left out."""
        status = Path(f"/proc/{self.process_id}/status").read_text()
        return 1024 * int(status.partition("VmRSS:")[2].split()[0])


def pin(cores: int) -> list[int]:
    """Confines this process, and so all it starts, to the first `cores` cores it may use; all variants share them alike."""
    chosen = sorted(os.sched_getaffinity(0))[:cores]
    os.sched_setaffinity(0, chosen)
    return chosen


@contextmanager
def service(models: Path, **settings: object) -> Iterator[Program]:
    """Our service on these models, as it ships but for `settings` (names as in the environment, without the prefix)."""
    command = [sys.executable, "-m", "service", "--models", str(models), "--port", "0", "--device", "cpu", "--log-level", "warning"]
    with serving(command, {f"INDRNN_{name.upper()}": str(value) for name, value in settings.items()}) as program:
        yield program


@contextmanager
def script(name: str, *arguments: object) -> Iterator[Program]:
    """A server of this folder."""
    with serving([sys.executable, str(HERE / name), *map(str, arguments)]) as program:
        yield program


@contextmanager
def answering(command: list[str], url: str, ready: str, environment: Mapping[str, str], log: Path) -> Iterator[Program]:
    """Runs a server that says nothing of ours, until the block ends; begins when it answers `ready` with 200. What it writes goes to `log`."""
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=HERE, env={**os.environ, **environment}, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        until = time.monotonic() + START_S
        while not _answers(url + ready):
            if process.poll() is not None or time.monotonic() > until:
                raise SystemExit(f"{' '.join(command)} does not serve:\n{log.read_text()[-2000:]}")
            time.sleep(0.1)
        yield Program(url, process.pid)
    finally:
        _end_all(process)


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on, for programs that cannot say which they took."""
    with contextlib.ExitStack() as stack:
        return [stack.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1] for _ in range(count)]


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def _end_all(process: subprocess.Popen[bytes]) -> None:
    """The process and those it started, which are all of its session."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)


@contextmanager
def serving(command: list[str], environment: Mapping[str, str] | None = None) -> Iterator[Program]:
    """Runs `command` until the block ends; begins when it has said where it serves."""
    base = {name: value for name, value in os.environ.items() if not name.startswith("INDRNN_")}
    # In a session of its own: Ctrl-C ends the benchmark, which then stops it.
    process = subprocess.Popen(command, cwd=ROOT, env={**base, **(environment or {})}, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        yield Program(_address(process), process.pid)
    finally:
        process.terminate()
        try:
            process.communicate(timeout=STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


def _address(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    for line in process.stdout:  # ends when the process does
        if line.startswith(GREETING):
            return line.removeprefix(GREETING).split()[0]
    raise SystemExit(f"{process.args!r} ended with {process.wait(START_S)} before it served")
