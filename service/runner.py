"""One model at work: its engine, its streams' state rows and its batcher joined."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter_ns
from typing import Any

import numpy as np
import numpy.typing as npt

from service.batcher import Batcher
from service.engine import Floats, Lengths
from service.errors import Diverged
from service.frames import FrameReader
from service.metrics import Metrics
from service.model_files import Entry
from service.sessions import Rows
from service.statistics import Statistics

Flags = npt.NDArray[np.bool_]


class Stretch:
    """Consecutive frames (count, *frame_shape) of one stream on their way through the model; a batcher's `Work`.

    It starts from its row and writes it back when all frames are done: a message takes effect as a whole or not at all.
    """

    __slots__ = ("_frames", "at", "carry", "scores", "stream")

    def __init__(self, row: int, frames: Floats) -> None:
        self.stream = row
        self._frames = frames
        self.at = 0
        self.carry: Floats | None = None  # the state between two slices
        self.scores: list[Floats] = []

    @property
    def frames(self) -> int:
        return len(self._frames) - self.at

    def ahead(self, steps: int) -> Floats:
        return self._frames[self.at : self.at + steps]


class Runner:
    """Runs stretches of frames of many streams together. `name` and `version` are the served ones."""

    def __init__(self, entry: Entry, metrics: Metrics, *, most_rows: int, most_waiting: int) -> None:
        self.entry = entry
        self.name = name = entry.name
        self.version = version = entry.version
        self.engine = engine = entry.engine
        self.manifest = engine.manifest
        self.most_rows = most_rows
        self.rows = Rows(engine.manifest.state_width)
        self.statistics = Statistics()
        self._batcher = Batcher(name, self._step, self, most_rows=most_rows, most_waiting=most_waiting)
        self._readers: dict[str | None, FrameReader] = {}
        self._holders = 0
        self._metrics = metrics
        self._waited = metrics.queue_seconds.labels(name, version)
        self._ran = metrics.run_seconds.labels(name, version)
        self._batch_rows = metrics.batch_rows.labels(name, version)
        self._frames = metrics.frames.labels(name, version)
        self.frames_run = self.batches_run = self.rows_run = 0

    @property
    def needed(self) -> bool:
        """Whether a session or a clip depends on it, or anything waits."""
        return bool(self.rows.taken or self._holders or self._batcher.waiting)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keeps it at work for a clip, which has no session."""
        self._holders += 1
        try:
            yield
        finally:
            self._holders -= 1

    def reader(self, layout: str | None) -> FrameReader:
        """Reads frames of clients with this layout; raises `LayoutUnknown`."""
        reader = self._readers.get(layout)
        if reader is None:
            reader = self._readers[layout] = FrameReader(self.manifest, layout)
        return reader

    def start(self) -> None:
        """From here on it stands in the figures under its name and version, also in the place of one that came before it."""
        name, version, engine = self.name, self.version, self.engine
        self._metrics.waiting.labels(name, version).set_function(lambda: self._batcher.waiting)
        self._metrics.device.labels(name, version, engine.device.name, engine.device.provider).set(1)
        self._metrics.model_bytes.labels(name, version).set(self.entry.memory_bytes)
        self._metrics.load_seconds.labels(name, version).set(self.entry.seconds)
        self._batcher.start()

    async def stop(self) -> None:
        await self._batcher.stop()

    async def run(self, row: int, frames: Floats, deadline: float, commit: Callable[[Floats], None] | None = None) -> Floats:
        """frames (count, *frame_shape) from the state in `row` -> scores (count, classes); the row moves on.

        `commit` gets the scores once the row has moved on, even if the caller has left by then. `Rows.ZERO` stays as it is.
        Raises `Diverged`, `Overloaded`, `Deadline` or `Draining`, with the row unchanged.
        """
        began = perf_counter_ns()
        stretch = Stretch(row, frames)
        result: list[Floats] = []

        def settled() -> None:
            result.append(stretch.scores[0] if len(stretch.scores) == 1 else np.concatenate(stretch.scores))
            if commit is not None:
                commit(result[0])

        try:
            await self._batcher.run(stretch, deadline, settled)
        except BaseException:
            self.statistics.failed(perf_counter_ns() - began)
            raise
        self.statistics.succeeded(perf_counter_ns() - began)
        return result[0]

    async def idle(self) -> None:
        """Waits until nothing waits or runs."""
        await self._batcher.idle()

    def live_figures(self) -> dict[str, Any]:
        return {
            "sessions": self.rows.taken,
            "waiting": self._batcher.waiting,
            "frames": self.frames_run,
            "batches": self.batches_run,
            "mean_batch_rows": round(self.rows_run / self.batches_run, 2) if self.batches_run else None,
        }

    # On the dispatcher's thread.

    def waited(self, seconds: float) -> None:
        self._waited.observe(seconds)
        self.statistics.waited(int(1e9 * seconds))

    def ran(self, rows: int, seconds: float) -> None:
        self._ran.observe(seconds)
        self._batch_rows.observe(rows)
        self.batches_run += 1
        self.rows_run += rows

    def _step(self, stretches: Sequence[Stretch], steps: int) -> list[Exception | None]:
        """Advances every stretch by up to `steps` frames in one run of the model; a stretch that diverges fails alone."""
        began = perf_counter_ns()
        slices = [stretch.ahead(steps) for stretch in stretches]
        lengths = np.fromiter(map(len, slices), np.int64, len(slices))
        state = self.rows.gather([stretch.stream for stretch in stretches])
        for i, stretch in enumerate(stretches):
            if stretch.carry is not None:
                state[i] = stretch.carry
        padded = _padded(slices, steps, self.manifest.frame_shape)
        ready = perf_counter_ns()
        scores, next_state = self.engine.run_batch(padded, lengths, state)
        ran = perf_counter_ns()
        fine = _finite_rows(scores, lengths) & np.asarray(np.isfinite(next_state).all(axis=1))
        count = int(lengths.sum())
        self._frames.inc(count)
        self.frames_run += count
        outcomes = self._take(stretches, lengths, scores, next_state, fine)
        done = len(stretches) - sum(1 for stretch in stretches if stretch.frames)
        self.statistics.ran(len(stretches), done, ready - began, ran - ready, perf_counter_ns() - ran)
        return outcomes

    def _take(self, stretches: Sequence[Stretch], lengths: Lengths, scores: Floats, next_state: Floats, fine: Flags) -> list[Exception | None]:
        outcomes: list[Exception | None] = []
        finished: list[int] = []
        for i, (stretch, length) in enumerate(zip(stretches, lengths.tolist(), strict=True)):
            if not fine[i]:
                outcomes.append(Diverged("these frames drive the model's scores or state out of the finite numbers; the state was left as it was"))
                continue
            stretch.scores.append(scores[i, :length].copy())  # a view would keep the whole batch alive
            stretch.at += length
            if stretch.frames:
                stretch.carry = next_state[i].copy()
            elif stretch.stream != Rows.ZERO:
                finished.append(i)
            outcomes.append(None)
        if finished:
            self.rows.scatter([stretches[i].stream for i in finished], next_state if len(finished) == len(stretches) else next_state[finished])
        return outcomes


def _padded(slices: Sequence[Floats], steps: int, shape: tuple[int, ...]) -> Floats:
    """(batch, steps, *shape), zeros beyond each slice's end, where the model does not look."""
    if len(slices) == 1:
        return slices[0][None]
    padded = np.zeros((len(slices), steps, *shape), np.float32)
    for i, frames in enumerate(slices):
        padded[i, : len(frames)] = frames
    return padded


def _finite_rows(scores: Floats, lengths: Lengths) -> Flags:
    """(batch,): whether a row's real scores are all finite; beyond a row's length they mean nothing."""
    finite = np.isfinite(scores)
    if finite.all():
        return np.ones(len(scores), np.bool_)
    beyond = np.arange(scores.shape[1]) >= lengths[:, None]
    return np.asarray((finite | beyond[:, :, None]).all(axis=(1, 2)))
