"""Continuous batching: whatever streams are ready form the next batch, as soon as the last one is done. Knows no tensors.

One thread per model runs the batches. Only that thread touches the line of jobs, only the event loop touches the count of them:
the two meet in a queue one way, once per turn of the event loop, and in one `call_soon_threadsafe` per batch the other way.

Each way costs as much as a short step of a model. So work that is alone, and short as the last run shows, runs on the event loop itself.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any, Protocol

from service.errors import Deadline, Draining, Overloaded

MOST_STEPS = 32  # longest slice: a long chunk does not hold up streams that wait for one frame
MOST_PADDED = 1024  # rows x steps of a batch, for the same reason
WASTE = 1.5  # padded size over real frames
INLINE_S = 0.0003  # longest run that may hold up the event loop


class Work(Protocol):
    """What a batch is made of: `stream` tells whose frames they are (0: nobody else's), `frames` how many are left to run."""

    @property
    def stream(self) -> int: ...
    @property
    def frames(self) -> int: ...


class Job:
    """One piece of work on its way; `settled` once nothing will happen to it any more."""

    __slots__ = ("begun", "cancelled", "deadline", "error", "future", "queued", "settled", "work")

    def __init__(self, work: Any, deadline: float, future: asyncio.Future[None]) -> None:
        self.work = work
        self.deadline = deadline  # on time.monotonic's clock
        self.future = future
        self.queued = time.monotonic()
        self.begun = self.cancelled = self.settled = False
        self.error: BaseException | None = None


class Observer(Protocol):
    """Told what happens, by whoever runs the batch."""

    def waited(self, seconds: float) -> None: ...
    def ran(self, rows: int, seconds: float) -> None: ...


Step = Callable[[Sequence[Any], int], Sequence[Exception | None]]


class Batcher:
    """Runs `step(works, steps)` on batches of ready work, one batch after another.

    `step` advances every work by up to `steps` frames and returns one entry per work: None, or the error that this work alone gets.
    """

    def __init__(self, name: str, step: Step, observer: Observer, *, most_rows: int, most_waiting: int) -> None:
        self._step = step
        self._observer = observer
        self._most_rows = most_rows
        self._most_waiting = most_waiting
        self._fresh: list[Job] = []  # of this turn of the event loop
        self._inbox: SimpleQueue[list[Job]] = SimpleQueue()
        self._thread = threading.Thread(target=self._dispatch, name=f"batcher {name}", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping = False
        self._frame_alone_s = math.inf  # seconds per frame of the last run if it had one row; whoever runs a batch writes it
        self.waiting = 0  # jobs not settled; owned by the event loop
        self._quiet = asyncio.Event()
        self._quiet.set()

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """Ends the thread after the batch it is running; whoever still waits gets `Draining`."""
        self._stopping = True
        self._inbox.put([])
        await asyncio.to_thread(self._thread.join)
        await asyncio.sleep(0)  # the thread's last word to the loop

    async def run(self, work: Work, deadline: float, settled: Callable[[], None]) -> None:
        """Waits until all frames of `work` ran; raises the work's error, `Overloaded`, `Deadline` or `Draining`.

        `settled` is called once on the event loop when the work has run without error, even if the caller has left meanwhile.
        A caller that leaves (is cancelled) before the work begins costs nothing; after that the work is dropped between two slices,
        and the caller is held until no thread touches it any more.
        """
        if self._stopping:
            raise Draining("the service is shutting down")
        if self.waiting >= self._most_waiting:
            raise Overloaded(f"{self.waiting} messages are waiting for this model", retry_after=1)
        assert self._loop is not None
        job = Job(work, deadline, self._loop.create_future())
        self.waiting += 1
        self._quiet.clear()
        if not self._fresh:
            self._loop.call_soon(self._submit)
        self._fresh.append(job)
        try:
            await job.future
        except asyncio.CancelledError:
            job.cancelled = True
            await self._settlement(job)
            if job.error is None:
                settled()
            raise
        if job.error is not None:
            raise job.error
        settled()

    async def idle(self) -> None:
        """Waits until every job is settled."""
        await self._quiet.wait()

    async def _settlement(self, job: Job) -> None:
        while not job.settled:
            assert self._loop is not None
            job.future = self._loop.create_future()
            try:
                await job.future
            except asyncio.CancelledError:
                continue

    def _submit(self) -> None:
        """Hands over what came in this turn of the event loop."""
        fresh, self._fresh = self._fresh, []
        if self._stopping:
            self._deliver([(job, Draining("the service is shutting down")) for job in fresh])
        elif self.waiting == 1 and fresh[0].work.frames * self._frame_alone_s < INLINE_S:
            line = deque(fresh)
            self._deliver(self._run_next(line))  # nobody else waits, so the thread has nothing to do
            if line:
                self._inbox.put(list(line))
        else:
            self._inbox.put(fresh)

    # From here on the dispatcher's thread, but for `_run_next`, which the event loop calls when the thread has nothing to do.

    def _dispatch(self) -> None:
        line: deque[Job] = deque()
        while True:
            if not line:
                line.extend(self._inbox.get())
            while not self._inbox.empty():
                line.extend(self._inbox.get())
            if self._stopping:
                return self._settle([(job, Draining("the service is shutting down")) for job in line])
            self._settle(self._run_next(line))

    def _run_next(self, line: deque[Job]) -> list[tuple[Job, BaseException | None]]:
        """Runs one batch from the head of the line; unfinished jobs go to its end."""
        done = _drop_idle(line)
        batch, steps = form_batch(line, self._most_rows)
        if not batch:
            return done
        began = time.monotonic()
        for job in batch:
            if not job.begun:
                job.begun = True
                self._observer.waited(began - job.queued)
        try:
            errors = self._step([job.work for job in batch], steps)
            outcomes = list(zip(batch, errors, strict=True))
        except Exception as error:  # a failing batch fails its own callers, and the thread lives on
            outcomes = [(job, error) for job in batch]
        seconds = time.monotonic() - began
        self._frame_alone_s = seconds / steps if len(batch) == 1 else math.inf
        self._observer.ran(len(batch), seconds)
        for job, outcome in outcomes:
            if outcome is None and job.work.frames:
                line.append(job)
            else:
                done.append((job, outcome))
        return done

    def _settle(self, done: list[tuple[Job, BaseException | None]]) -> None:
        if done and self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._deliver, done)

    # On the event loop again.

    def _deliver(self, done: list[tuple[Job, BaseException | None]]) -> None:
        self.waiting -= len(done)
        for job, error in done:
            job.error = error
            job.settled = True
            if not job.future.done():
                job.future.set_result(None)
        if not self.waiting:
            self._quiet.set()


def _drop_idle(line: deque[Job]) -> list[tuple[Job, BaseException | None]]:
    """Takes jobs out of the line whose caller has left or whose time is over."""
    now = time.monotonic()
    dropped: list[tuple[Job, BaseException | None]] = []
    for job in [job for job in line if job.cancelled or job.deadline < now]:
        line.remove(job)
        dropped.append((job, asyncio.CancelledError() if job.cancelled else _too_late(job, now)))
    return dropped


def _too_late(job: Job, now: float) -> Deadline:
    passed = f"{now - job.queued:.1f} s"
    if job.begun:
        return Deadline(f"the message was not done after {passed}, {job.work.frames} steps of the model were left: send fewer frames at once")
    return Deadline(f"the message waited {passed} for its turn, which is as long as it may: send it again when the service is less busy")


def form_batch(line: deque[Job], most_rows: int) -> tuple[list[Job], int]:
    """Takes the next batch from the line and says by how many steps it advances.

    The oldest job always goes and sets the number of steps; others join in order as long as no stream comes twice and padding stays
    below `WASTE`. Jobs that do not fit keep their places at the head, so that they lead soon.
    """
    if not line:
        return [], 0
    steps = min(line[0].work.frames, MOST_STEPS)
    most_rows = max(1, min(most_rows, MOST_PADDED // steps))
    batch: list[Job] = []
    passed: list[Job] = []
    streams: set[int] = set()
    real = 0
    while line and len(batch) < most_rows:
        job = line.popleft()
        grown = real + min(job.work.frames, steps)
        stream = job.work.stream
        if stream in streams or (len(batch) + 1) * steps >= WASTE * grown:
            passed.append(job)
            continue
        if stream:
            streams.add(stream)
        batch.append(job)
        real = grown
    line.extendleft(reversed(passed))
    return batch, steps
