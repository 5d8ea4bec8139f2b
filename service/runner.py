"""One model at work: its engine, its streams' state rows and its batcher joined."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from service import notes
from service.batcher import Batcher, Job
from service.engine import Floats, Lengths
from service.errors import Diverged
from service.frames import FrameReader, all_fine
from service.histogram import Distribution
from service.metrics import Metrics
from service.model_files import Entry
from service.record import manifest_digest
from service.sessions import Rows
from service.statistics import Statistics

Flags = npt.NDArray[np.bool_]
_F4 = np.dtype("<f4")


class Suspect(Exception):
    """Among frames that were sent on unread is a number that is no measurement: they must be read with care, which tells what is wrong. Nothing has changed."""


class Stretch(Job):
    """Consecutive frames of one stream on their way through the model.

    It starts from its row and writes it back when all frames are done: a message takes effect as a whole or not at all.
    """

    __slots__ = ("at", "carry", "frame_bytes", "noted", "payload", "scores", "unread")

    def __init__(self, row: int, payload: bytes | memoryview, count: int, queued: float, deadline: float, unread: bool = False) -> None:
        """`payload`: float32 values of `count` frames in C order; `unread`: nobody has looked at them yet."""
        self.stream = row  # what a job has as well, without a call more for each message
        self.frames = count
        self.queued = queued
        self.deadline = deadline
        self.begun = self.cancelled = self.over = False
        self.error = None
        self.payload = payload
        self.frame_bytes = len(payload) // count
        self.unread = unread
        self.at = 0  # bytes of the payload that ran
        self.carry: Floats | None = None  # the state between two slices
        self.scores = b""  # float32 (frames that ran, classes)
        self.noted: dict[str, Any] | None = None  # notes of the request that waits for it

    def ahead(self, steps: int) -> bytes | memoryview:
        return self.payload[self.at : self.at + steps * self.frame_bytes]


class Slices:
    """One batch as the model takes it, (rows, steps, ...) with `lengths` frames in each row."""

    __slots__ = ("began", "came", "frames", "lengths", "state", "steps", "suspects", "took", "waits")

    def __init__(self, frames: Floats, lengths: Lengths, state: Floats, steps: int, suspects: list[bool] | None, began: float, waits: list[float]) -> None:
        self.frames = frames
        self.lengths = lengths
        self.state = state
        self.steps = steps
        self.suspects = suspects  # for each row whether it holds numbers that are none; None: no row does
        self.began = began
        self.waits = waits  # seconds, of those of which this is the first slice
        self.came = began
        self.took: list[float] = []  # seconds, of those of which this was the last slice


class Runner:
    """Runs stretches of frames of many streams together; the `Model` of its batcher. `name` and `version` are the served ones."""

    def __init__(self, entry: Entry, metrics: Metrics, *, most_rows: int, most_waiting: int) -> None:
        self.entry = entry
        self.name = name = entry.name
        self.version = version = entry.version
        self.engine = engine = entry.engine
        self.manifest = engine.manifest
        self.manifest_digest = manifest_digest(engine.manifest)
        self.most_rows = most_rows
        self.rows = Rows(engine.manifest.state_width)
        self.statistics = Statistics()
        self._batcher = Batcher(name, self, most_rows=most_rows, most_waiting=most_waiting)
        self._readers: dict[str | None, FrameReader] = {}
        self._holders = 0
        self._classes = len(self.manifest.classes)
        self.row_bytes = 4 * self._classes  # of one frame's scores
        self._metrics = metrics
        self._waited = metrics.queue_seconds.labels(name, version)
        self._answered = metrics.message_seconds.labels(name, version)
        self._ran = metrics.run_seconds.labels(name, version)
        self._batch_rows = metrics.batch_rows.labels(name, version)
        self._frames = metrics.frames.labels(name, version)
        self._padded = metrics.padded.labels(name, version)
        self.frames_run = self.frames_computed = self.batches_run = self.rows_run = 0

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

    def table(self, scores: bytes) -> Floats:
        """float32 scores as `run` gives them, (count, classes)."""
        return np.frombuffer(scores, _F4).reshape(-1, self._classes)

    def start(self) -> None:
        """From here on it stands in the figures under its name and version, also in the place of one that came before it."""
        name, version, engine = self.name, self.version, self.engine
        self._metrics.waiting.labels(name, version).set_function(lambda: self._batcher.waiting)
        self._metrics.state_rows.labels(name, version, "taken").set_function(lambda: self.rows.taken)
        self._metrics.state_rows.labels(name, version, "capacity").set_function(lambda: self.rows.capacity)
        self._metrics.device.labels(name, version, engine.device.name, engine.device.provider).set(1)
        self._metrics.model_bytes.labels(name, version).set(self.entry.memory_bytes)
        self._metrics.load_seconds.labels(name, version).set(self.entry.seconds)
        self._batcher.start()

    async def stop(self) -> None:
        await self._batcher.stop()

    async def run(self, row: int, frames: Floats, deadline: float, commit: Callable[[bytes], None] | None = None) -> bytes:
        """frames (count, *frame_shape) from the state in `row` -> float32 scores (count, classes) in C order; the row moves on.

        `commit` gets the scores once the row has moved on, even if the caller has left by then. `Rows.ZERO` stays as it is.
        Raises `Diverged`, `Overloaded`, `Deadline` or `Draining`, with the row unchanged.
        """
        stretch = Stretch(row, np.ascontiguousarray(frames, _F4).data.cast("B"), len(frames), time.monotonic(), deadline)
        stretch.noted = notes.current()

        def settled() -> None:
            if commit is not None:
                commit(stretch.scores)

        try:
            await self._batcher.run(stretch, settled)
        except BaseException:
            self.statistics.failed(int(1e9 * (time.monotonic() - stretch.queued)))
            raise
        finally:
            del stretch.settled  # which knows the stretch: in a circle they would keep its frames until the collector comes
        return stretch.scores

    def launch(self, stretch: Stretch) -> None:
        """As `run` without waiting: the stretch's `done` is called. Raises `Overloaded` or `Draining`."""
        self._batcher.submit(stretch)

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
            "padding": round(self.frames_computed / self.frames_run, 3) if self.frames_run else None,
        }

    # ---- the model of its batcher

    def prepare(self, stretches: Sequence[Stretch], steps: int) -> Slices:
        """Gathers frames and state of a batch."""
        began = time.monotonic()
        size = stretches[0].frame_bytes
        parts: list[bytes | memoryview] = []
        lengths: list[int] = []
        padding = unread = False
        for stretch in stretches:
            count = stretch.frames
            if count == steps and not stretch.at:
                parts.append(stretch.payload)
            elif count >= steps:
                count = steps
                parts.append(stretch.ahead(steps))
            else:
                padding = True
                parts.append(stretch.ahead(steps))
                parts.append(bytes((steps - count) * size))
            lengths.append(count)
            unread = unread or stretch.unread
            if stretch.noted is not None and not stretch.at:
                stretch.noted.update(rows=len(stretches), queue_ms=round(1000 * (began - stretch.queued), 3))
        frames = np.frombuffer(parts[0] if len(parts) == 1 else b"".join(parts), _F4).reshape(len(stretches), steps, *self.manifest.frame_shape)
        suspects = None
        if unread and not all_fine(frames):
            suspects = [stretch.unread and not all_fine(row) for stretch, row in zip(stretches, frames, strict=True)]
        state = self.rows.gather([stretch.stream for stretch in stretches])
        for i, stretch in enumerate(stretches):
            if stretch.carry is not None:
                state[i] = stretch.carry
        counts = np.array(lengths, np.int64) if padding else np.full(len(stretches), steps, np.int64)
        return Slices(frames, counts, state, steps, suspects, began, [began - stretch.queued for stretch in stretches if not stretch.at])

    def compute(self, slices: Slices) -> tuple[Floats, Floats]:
        return self.engine.run_batch(slices.frames, slices.lengths, slices.state)

    def commit(self, stretches: Sequence[Stretch], slices: Slices, result: tuple[Floats, Floats]) -> list[Exception | None]:
        """Advances every stretch; one that diverges fails alone."""
        slices.came = came = time.monotonic()
        scores, next_state = result
        diverged = _not_finite_rows(scores, next_state, slices.lengths)
        size, row_size = self.row_bytes, self.row_bytes * slices.steps
        values = scores.tobytes()
        outcomes: list[Exception | None] = []
        finished: list[int] = []
        took = slices.took
        for i, (stretch, length) in enumerate(zip(stretches, slices.lengths.tolist(), strict=True)):
            if slices.suspects is not None and slices.suspects[i]:
                outcomes.append(Suspect())
                continue
            if diverged is not None and diverged[i]:
                outcomes.append(Diverged("these frames drive the model's scores or state out of the finite numbers; the state was left as it was"))
                continue
            part = values[i * row_size : i * row_size + length * size]
            stretch.scores = stretch.scores + part if stretch.at else part
            stretch.at += length * stretch.frame_bytes
            stretch.frames -= length
            if stretch.frames:
                stretch.carry = next_state[i].copy()
            else:
                took.append(came - stretch.queued)
                if stretch.stream != Rows.ZERO:
                    finished.append(i)
            outcomes.append(None)
        if finished:
            whole = len(finished) == len(stretches)
            self.rows.scatter([stretches[i].stream for i in finished], next_state if whole else next_state[finished])
        return outcomes

    def account(self, slices: Slices, seconds: float) -> None:
        """Counts a batch whose answers are out: nobody waits for figures."""
        rows, frames, done, came = len(slices.lengths), int(slices.lengths.sum()), len(slices.took), slices.came
        _observe(self._waited, slices.waits)
        _observe(self._answered, slices.took)
        self._ran.observe(seconds)
        self._batch_rows.observe(rows)
        self._frames.inc(frames)
        self._padded.inc(rows * slices.steps)
        self.batches_run += 1
        self.rows_run += rows
        self.frames_run += frames
        self.frames_computed += rows * slices.steps
        waited = max(0.0, came - slices.began - seconds)  # from its being formed to its result, without the run
        self.statistics.waited(int(1e9 * math.fsum(slices.waits)), len(slices.waits))
        self.statistics.succeeded(int(1e9 * math.fsum(slices.took)), done)
        self.statistics.ran(rows, done, int(1e9 * waited), int(1e9 * seconds), int(1e9 * (time.monotonic() - came)))


def _observe(child: Distribution, values: list[float]) -> None:
    if len(values) == 1:
        child.observe(values[0])
    elif values:
        child.observe_many(np.array(values))


def _not_finite_rows(scores: Floats, next_state: Floats, lengths: Lengths) -> Flags | None:
    """(batch,): whether a row's real scores or its next state are not all finite; beyond a row's length scores mean nothing. None: all are fine.

    A sum is finite only if what it sums is, and costs half of looking at each; one that overflows makes us look at each.
    """
    with np.errstate(all="ignore"):
        if math.isfinite(float(scores.sum())) and math.isfinite(float(next_state.sum())):
            return None
    finite = np.isfinite(scores) | (np.arange(scores.shape[1]) >= lengths[:, None])[:, :, None]
    return np.asarray(~(finite.all(axis=(1, 2)) & np.isfinite(next_state).all(axis=1)))
