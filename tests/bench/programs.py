"""The processes of a run: the service and the echo, each started, bounded in time and stopped here."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
START_S, STOP_S = 60.0, 15.0


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
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True)
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
