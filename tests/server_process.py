"""The service as a process of its own, as a user starts it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parents[1]
START_WITHIN_S = 60.0


@dataclass
class Server:
    """A service that runs; `stop` ends it and returns its exit status."""

    process: subprocess.Popen[str]
    url: str
    log: Path

    @property
    def ws(self) -> str:
        return self.url.replace("http", "ws", 1)

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(30)

    def errors(self) -> str:
        return self.log.read_text()


@contextmanager
def running(models: Path, log: Path, *options: str, **environment: str) -> Iterator[Server]:
    """Starts `python -m service` and waits for the line that says where it serves."""
    with log.open("w") as stderr:
        command = [sys.executable, "-W", "error", "-m", "service", "--models", str(models), "--port", "0", "--log-format", "json", *options]
        own = {name: value for name, value in os.environ.items() if not name.startswith("INDRNN_")}
        process = subprocess.Popen(command, cwd=ROOT, env={**own, **environment}, stdout=subprocess.PIPE, stderr=stderr, text=True)
        try:
            yield Server(process, _address(process.stdout, log), log)
        finally:
            process.kill()
            process.wait(30)
            if process.stdout is not None:
                process.stdout.close()


def _address(output: IO[str] | None, log: Path) -> str:
    assert output is not None
    line = output.readline()
    assert line.startswith("Serving on http"), f"the service did not start: {log.read_text()}"
    return line.split()[-1]
