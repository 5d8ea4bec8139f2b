"""onnxruntime alone: the model stepped in a loop, state fed back, no server around it. The other limit to compare with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np
import numpy.typing as npt
import onnxruntime

from model.contract import FRAMES, LENGTHS, OUTPUTS, STATE, Manifest

Floats = npt.NDArray[np.float32]
CLIP_BATCHES = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Steps:
    """What a loop of steps measured."""

    batch: int
    frames_per_s: float
    p50_ms: float
    p99_ms: float


class Alone:
    """The model in one onnxruntime session with one thread, as the service has it where two cores are there."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._width = manifest.state_width

    def step(self, frames: Floats, state: Floats) -> tuple[Floats, Floats]:
        """frames (batch, time, ...) -> scores (batch, time, classes), next state."""
        lengths = np.full(len(frames), frames.shape[1], np.int64)
        scores, state = self._session.run(OUTPUTS, {FRAMES: frames, LENGTHS: lengths, STATE: state})
        return scores, state

    def start(self, batch: int) -> Floats:
        return np.zeros((batch, self._width), np.float32)

    def measure(self, frames: Floats, batch: int, seconds: float, warmup: float) -> Steps:
        """Steps of one frame for `batch` streams, for so long; `frames` (count, ...) is gone round in."""
        batches = [np.take(frames, range(at, at + batch), axis=0, mode="wrap")[:, None] for at in range(0, len(frames), 7)]
        state = self._run(batches, self.start(batch), warmup, [])
        took: list[float] = []
        began = perf_counter()
        self._run(batches, state, seconds, took)
        elapsed = perf_counter() - began
        p50, p99 = np.percentile(np.array(took), [50, 99]) * 1e3
        return Steps(batch, batch * len(took) / elapsed, float(p50), float(p99))

    def clips(self, frames: Floats, time: int, seconds: float, warmup: float) -> Steps:
        """Whole clips of `time` frames from the zero state, with the batch size of `CLIP_BATCHES` that is fastest; each has its part of the seconds."""
        found = []
        for batch in CLIP_BATCHES:
            clips = np.take(frames, range(batch * time), axis=0, mode="wrap").reshape(batch, time, *frames.shape[1:])
            start = self.start(batch)
            self._repeat(clips, start, warmup / len(CLIP_BATCHES))
            took = self._repeat(clips, start, seconds / len(CLIP_BATCHES))
            p50, p99 = np.percentile(np.array(took), [50, 99]) * 1e3
            found.append(Steps(batch, batch * time * len(took) / sum(took), float(p50), float(p99)))
        return max(found, key=lambda one: one.frames_per_s)

    def _repeat(self, clips: Floats, start: Floats, seconds: float) -> list[float]:
        took: list[float] = []
        until = perf_counter() + seconds
        while not took or perf_counter() < until:
            before = perf_counter()
            self.step(clips, start)
            took.append(perf_counter() - before)
        return took

    def _run(self, batches: list[Floats], state: Floats, seconds: float, took: list[float]) -> Floats:
        now = perf_counter()
        until, count = now + seconds, 0
        while now < until or not count:
            _, state = self.step(batches[count % len(batches)], state)
            before, now = now, perf_counter()
            took.append(now - before)
            count += 1
        return state

    def stream(self, messages: list[Floats]) -> list[Floats]:
        """Scores (classes,) at the end of each message (count, ...) of one stream from the zero state, frame by frame."""
        state, ends = self.start(1), []
        for message in messages:
            for frame in message:
                scores, state = self.step(frame[None, None], state)
            ends.append(scores[0, -1])
        return ends
