"""What the cases of Triton's own clients have in common, over HTTP and over gRPC: a client that blocks and an asynchronous one, called in the same way."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import pytest

from tests import toy_models
from tests.server_process import ROOT, Server
from tests.toy_models import CHANNELS, SKELETON, Toy, example_frames

utils = pytest.importorskip("tritonclient.utils", reason="tritonclient is not installed (extra `test`): the Open Inference Protocol is not tested with it")

Floats = npt.NDArray[np.float32]
MANAGER = "one who manages"
LABELS = ("ruhen", "größer werden", "wave: left", "拍手")
CLIP = example_frames(CHANNELS, 40, seed=11)


class OnLoop:
    """An asynchronous client, called like one that blocks: each call runs on a loop of its own until it is done."""

    def __init__(self, dial: Callable[[], Any]) -> None:
        self._loop = asyncio.new_event_loop()

        async def dialled() -> Any:
            return dial()

        self.client = self.run(dialled())

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            return self.run(getattr(self.client, name)(*arguments, **options))

        return call

    def run(self, work: Awaitable[Any]) -> Any:
        return self._loop.run_until_complete(work)

    def together(self, calls: list[dict[str, Any]]) -> list[Any]:
        """Several inferences at a time."""

        async def run() -> list[Any]:
            return await asyncio.gather(*(self.client.infer(**call) for call in calls))

        return list(self.run(run()))

    def close(self) -> None:
        self.run(self.client.close())
        self._loop.close()


@contextmanager
def each_of(kinds: Iterable[Callable[[str], Any]], address: str) -> Iterator[list[Any]]:
    """One client of each kind."""
    clients = [kind(address) for kind in kinds]
    try:
        yield clients
    finally:
        for client in clients:
            client.close()


def write_models(directory: Path, **more: Toy) -> Path:
    """Two versions of one model, others, and a file that is refused."""
    for version in ("1", "2"):
        toy_models.write_toy(directory, "channels", CHANNELS, version=version)
    for name, toy in {"spoken": Toy(classes=LABELS), "skeleton": SKELETON, "moving": CHANNELS, **more}.items():
        toy_models.write_toy(directory, name, toy)
    toy_models.write_without_manifest(directory, "bare")
    return directory


def whole(server: Server, frames: npt.NDArray[Any] = CLIP, model: str = "channels") -> Floats:
    """What `/v1` says of the clip."""
    answer = httpx.post(
        f"{server.url}/v1/models/{model}/predict?scores=all&answers=binary", content=frames.tobytes(), headers={"content-type": "application/octet-stream"}
    )
    return np.frombuffer(answer.raise_for_status().content[16:], np.float32).reshape(len(frames), -1)


def refused(status: int | str, words: str, call: Any, *arguments: Any, **options: Any) -> None:
    """The call fails with this status, a number over HTTP and a name over gRPC, and a message with these words."""
    with pytest.raises(utils.InferenceServerException) as caught:
        call(*arguments, **options)
    assert caught.value.status() == (str(status) if isinstance(status, int) else f"StatusCode.{status}"), caught.value
    assert words in caught.value.message()


def run_readmes_example(library: str, written: str, address: str, folder: Path) -> list[str]:
    """What the README's example for this library prints, in a process of its own, as whoever pastes it has it; `written` is the address that stands there."""
    readme = (ROOT / "service" / "README.md").read_text()
    [code] = [one for one in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if library in one]
    script = folder / "example.py"
    script.write_text(code.replace(written, address))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()
