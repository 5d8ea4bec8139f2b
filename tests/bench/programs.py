"""The processes of a run: the service, the echo and the load generator, each started, bounded in time and stopped here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.bench.load import Result

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
START_S, STOP_S = 60.0, 15.0


@dataclass(frozen=True)
class Shape:
    """What goes over the wire: bytes of one frame and of one answer's scores, and the file frames are taken from."""

    frames: Path
    frame_bytes: int
    answer_bytes: int


def pin(cores: int) -> list[int]:
    """Confines this process, and so all it starts, to the first `cores` cores it may use; all variants share them alike."""
    chosen = sorted(os.sched_getaffinity(0))[:cores]
    os.sched_setaffinity(0, chosen)
    return chosen


@contextmanager
def service(models: Path) -> Iterator[str]:
    """Our service on these models; gives its address."""
    with _serving([sys.executable, "-m", "service", "--models", str(models), "--port", "0", "--device", "cpu", "--log-level", "warning"]) as url:
        yield url


@contextmanager
def echo(answer_bytes: int) -> Iterator[str]:
    with _serving([sys.executable, str(HERE / "echo.py"), str(answer_bytes)]) as url:
        yield url


@contextmanager
def _serving(command: list[str]) -> Iterator[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("INDRNN_")}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        yield _address(process)
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
        if line.startswith("Serving on "):
            return line.split()[2]
    raise SystemExit(f"{process.args!r} ended with {process.wait(START_S)} before it served")


def load(url: str, shape: Shape, streams: int, per_message: int, seconds: float, *, warmup: float, record: int = 0) -> Result:
    """One run of the load generator against a websocket address."""
    command = [sys.executable, str(HERE / "load.py"), url.replace("http", "ws", 1), "--frames", str(shape.frames)]
    numbers = {"frame-bytes": shape.frame_bytes, "answer-bytes": shape.answer_bytes, "streams": streams, "per-message": per_message, "record": record}
    for name, value in {**numbers, "seconds": seconds, "warmup": warmup}.items():
        command += [f"--{name}", str(value)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + warmup + 120)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    return Result(**json.loads(done.stdout))
