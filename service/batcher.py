"""Continuous batching: whatever streams are ready form the next batch, as soon as the model is free. Knows no tensors.

The event loop forms batches and takes them apart; a thread does nothing but run the model, which needs no interpreter while it does. So answers are
written and messages read while the next batch runs: where enough work is ready, a second batch waits at the thread's door, and the model does not
stand still while the event loop is busy.

Going through the thread costs as much as a short step of a model. So a batch that is all there is to do, and short as the latest runs show, runs on the
event loop itself.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, Protocol

import structlog

from service.errors import Deadline, Draining, Overloaded
from service.inline import Inline

MOST_STEPS = 32  # longest slice: a long chunk does not hold up streams that wait for one frame
MOST_PADDED = 1024  # rows x steps of a batch, for the same reason
WASTE = 1.5  # padded size over real frames
AHEAD = 16  # jobs that are worth a batch of their own while another is running; fewer wait for more,
AHEAD_FRAMES = 32  # unless they have so many frames together
SOON_S = 0.002  # before the running batch ends the next one is formed, of all that has come until then
HALF = 8  # rows: of fewer, a long batch takes the model markedly longer for each
LOOK_S = 0.05  # how often those that wait are looked at for deadlines that have passed

log = structlog.get_logger("batcher")


class Job:
    """One piece of work: `stream` tells whose frames they are (0: nobody else's), `frames` how many are left to run."""

    __slots__ = ("begun", "cancelled", "deadline", "error", "frames", "future", "over", "queued", "settled", "stream")

    def __init__(self, stream: int, frames: int, queued: float, deadline: float) -> None:
        self.stream = stream
        self.frames = frames
        self.queued = queued  # on time.monotonic's clock, like the deadline
        self.deadline = deadline
        self.begun = self.cancelled = self.over = False
        self.error: BaseException | None = None
        self.future: asyncio.Future[None]  # of who waits for it with `Batcher.run`
        self.settled: Callable[[], None]

    def done(self, error: BaseException | None) -> None:
        """Called once, on the event loop: with None when all frames ran, else with the error that this job alone gets."""
        self.error, self.over = error, True
        if error is None:
            self.settled()
        if not self.future.done():
            self.future.set_result(None)


class Model(Protocol):
    """What runs batches. `prepare` and `commit` are called on the event loop, `compute` anywhere, for one batch at a time."""

    def prepare(self, jobs: Sequence[Any], steps: int) -> Any:
        """What `compute` takes to advance each job by up to `steps` frames. While it runs another batch may be prepared, of other streams."""

    def compute(self, prepared: Any) -> Any: ...

    def commit(self, jobs: Sequence[Any], prepared: Any, result: Any) -> Sequence[Exception | None]:
        """Takes the result, counts `frames` of each job down, and returns for each None or the error that it alone gets."""

    def account(self, prepared: Any, seconds: float) -> None:
        """Told last of a batch that was committed, when its jobs are done: how long `compute` took."""


@dataclass(slots=True)
class _Batch:
    jobs: list[Any]
    prepared: Any
    steps: int
    result: Any = None
    error: Exception | None = None
    seconds: float = 0.0


class Batcher:
    """Runs batches of ready jobs, one after another. All but `start` is for the event loop it was started on."""

    def __init__(self, name: str, model: Model, *, most_rows: int, most_waiting: int) -> None:
        self._model = model
        self._most_rows = most_rows
        self._most_waiting = most_waiting
        self._line: deque[Any] = deque()
        self._aboard: set[int] = set()  # streams of batches that are with the thread
        self._flying = 0  # batches that are with the thread: one that runs, one that waits for it
        self._inbox: SimpleQueue[_Batch | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run_batches, name=f"batcher {name}", daemon=True)
        self._loop: asyncio.AbstractEventLoop
        self._ends = 0.0  # when the thread will have run what it has been given, on time.monotonic's clock, as far as earlier runs tell
        self._late: asyncio.TimerHandle | None = None  # for a batch that is not formed yet
        self._due = False  # whether `_pump` will be called
        self._watch: asyncio.TimerHandle | None = None
        self._stopping = False
        self._inline = Inline()
        self.waiting = 0  # jobs that are not done
        self._quiet = asyncio.Event()
        self._quiet.set()
        self._landed = asyncio.Event()

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """Ends the thread after what it has been given; who still waits gets `Draining`."""
        self._stopping = True
        self._turn_away()
        while self._flying:
            self._landed.clear()
            await self._landed.wait()
        self._inbox.put(None)
        await asyncio.to_thread(self._thread.join)

    def submit(self, job: Job) -> None:
        """Puts a job into the line, and calls its `done` later; raises `Overloaded` or `Draining`, and then never does."""
        if self._stopping:
            raise Draining("the service is shutting down")
        if self.waiting >= self._most_waiting:
            raise Overloaded(f"{self.waiting} messages are waiting for this model", retry_after=1)
        if not self.waiting:
            self._quiet.clear()
        self.waiting += 1
        self._line.append(job)
        self._call_pump()  # what else comes in this turn of the event loop joins it

    async def run(self, job: Job, settled: Callable[[], None]) -> None:
        """Waits until all frames of the job ran; raises the job's error, `Overloaded`, `Deadline` or `Draining`.

        `settled` is called once when the job has run without error, even if the caller has left meanwhile.
        A caller that leaves (is cancelled) before the job begins costs nothing; after that the job is dropped between two slices,
        and the caller is held until nothing touches it any more.
        """
        job.future, job.settled = self._loop.create_future(), settled
        self.submit(job)
        try:
            await job.future
        except asyncio.CancelledError:
            job.cancelled = True
            if not job.begun and not job.over:
                self._line.remove(job)
                self._settle([(job, asyncio.CancelledError())])
            while not job.over:
                job.future = self._loop.create_future()
                try:
                    await job.future
                except asyncio.CancelledError:
                    continue
            raise
        if job.error is not None:
            try:
                raise job.error
            finally:
                job.error = None  # it knows its callers, and so the job: in a circle they would keep a long message until the collector comes

    async def idle(self) -> None:
        """Waits until every job is done."""
        await self._quiet.wait()

    # ---- on the event loop

    def _call_pump(self) -> None:
        if self._line and not self._due:
            self._due = True
            self._loop.call_soon(self._pump)

    def _pump(self) -> None:
        """Hands batches to the thread as long as it can use them."""
        self._due = False
        if self._stopping:
            return self._turn_away()
        while self._line and not self._due and (not self._flying or (self._flying == 1 and self._is_worth())):
            jobs, steps, dropped = form_batch(self._line, self._rows(), self._aboard)
            if dropped:
                self._settle(dropped)
            if not jobs:
                break
            self._launch(jobs, steps)
        if self._line and self._watch is None:
            self._watch = self._loop.call_later(LOOK_S, self._look)

    def _is_worth(self) -> bool:
        """Whether what is in the line is enough for a batch that waits at the thread's door, and time to form it: one that waits grows no more."""
        if len(self._line) < AHEAD and sum(job.frames for job in self._line) < AHEAD_FRAMES:
            return False
        left = self._ends - time.monotonic()
        if left <= SOON_S or len(self._line) >= self._most_rows:
            return True
        if self._late is None:
            self._late = self._loop.call_later(left - SOON_S, self._form_late)
        return False

    def _form_late(self) -> None:
        self._late = None
        self._pump()

    def _rows(self) -> int:
        """The most that the next batch may have. Of much work that is half: one half is answered, and what comes upon that read, while the other runs."""
        active, rows = self._inline.active, min(len(self._line), self._most_rows)
        if active >= 2 * AHEAD:
            return min(self._most_rows, (active + 1) // 2)
        steps = min(self._line[0].frames, MOST_STEPS)
        if not self._flying and rows > HALF and self._inline.takes(min(rows * steps, MOST_PADDED)) > 2 * SOON_S:
            return max(HALF, (rows + 1) // 2)
        return self._most_rows

    def _launch(self, jobs: list[Any], steps: int) -> None:
        try:
            batch = _Batch(jobs, self._model.prepare(jobs, steps), steps)
        except Exception as error:
            return self._settle([(job, error) for job in jobs])
        streams = [job.stream for job in jobs]
        self._inline.saw(streams, time.monotonic())
        if not self._flying and not self._line and self._inline.allows(len(jobs), steps):
            self._run(batch)
            self._inline.ran_here(len(jobs) * steps, batch.seconds)
            self._settle(self._take_apart(batch))
            self._account(batch)
            return self._call_pump()  # not at once: others than this model want the event loop as well
        self._ends = max(time.monotonic(), self._ends if self._flying else 0.0) + self._inline.takes(len(jobs) * steps)
        self._flying += 1
        self._aboard.update(streams)
        self._inbox.put(batch)

    def _land(self, batch: _Batch) -> None:
        """A batch is back from the thread."""
        self._inline.ran_there(len(batch.jobs) * batch.steps, batch.seconds)
        self._flying -= 1
        self._aboard.difference_update([job.stream for job in batch.jobs])
        self._landed.set()
        done = self._take_apart(batch)
        self._pump()  # first of all the model gets its next batch
        self._settle(done)
        self._account(batch)

    def _take_apart(self, batch: _Batch) -> list[tuple[Any, BaseException | None]]:
        """Who is done and with what error; those with frames left are in the line again."""
        jobs, error = batch.jobs, batch.error
        outcomes: Sequence[Exception | None] = ()
        if error is None:
            try:
                outcomes = self._model.commit(jobs, batch.prepared, batch.result)
                if len(outcomes) != len(jobs):
                    raise ValueError(f"{len(outcomes)} outcomes of {len(jobs)} jobs")
            except Exception as caught:
                error = batch.error = caught
        done: list[tuple[Any, BaseException | None]]
        if error is not None:  # a failing batch fails its own callers, and nobody else
            done = [(job, error) for job in jobs]
        else:
            done = []
            for job, outcome in zip(jobs, outcomes, strict=True):
                if outcome is None and job.frames:
                    self._line.append(job)
                else:
                    done.append((job, outcome))
        return done

    def _settle(self, done: Sequence[tuple[Any, BaseException | None]]) -> None:
        self.waiting -= len(done)
        if not self.waiting:
            self._quiet.set()
        for job, error in done:
            try:
                job.done(error)
            except Exception:  # the others of the batch must hear of it all the same
                log.exception("an answer failed")

    def _account(self, batch: _Batch) -> None:
        if batch.error is None:
            self._model.account(batch.prepared, batch.seconds)
        batch.error = None  # which knows the batch, by the frame that it came from

    def _look(self) -> None:
        """Tells those whose time is over while they wait."""
        self._watch = None
        now = time.monotonic()
        late = [job for job in self._line if job.cancelled or job.deadline < now]
        for job in late:
            self._line.remove(job)
        self._settle([(job, _why_dropped(job, now)) for job in late])
        if self._line:
            self._watch = self._loop.call_later(LOOK_S, self._look)

    def _turn_away(self) -> None:
        line, self._line = list(self._line), deque()
        self._settle([(job, Draining("the service is shutting down")) for job in line])

    # ---- on the thread, and for short batches on the event loop

    def _run_batches(self) -> None:
        while (batch := self._inbox.get()) is not None:
            self._run(batch)
            if self._loop.is_closed():
                return
            self._loop.call_soon_threadsafe(self._land, batch)
            del batch  # while it waits for the next, the thread holds nobody's frames

    def _run(self, batch: _Batch) -> None:
        began = time.monotonic()
        try:
            batch.result = self._model.compute(batch.prepared)
        except Exception as error:
            batch.error = error
        batch.seconds = time.monotonic() - began


def _why_dropped(job: Job, now: float) -> BaseException:
    if job.cancelled:
        return asyncio.CancelledError()
    passed = f"{now - job.queued:.1f} s"
    if job.begun:
        return Deadline(f"the message was not done after {passed}, {job.frames} steps of the model were left: send fewer frames at once")
    return Deadline(f"the message waited {passed} for its turn, which is as long as it may: send it again when the service is less busy")


def form_batch(line: deque[Any], most_rows: int, aboard: set[int]) -> tuple[list[Any], int, list[tuple[Any, BaseException | None]]]:
    """Takes the next batch from the line: its jobs, the number of steps it advances, and jobs whose caller has left or whose time is over.

    The oldest job always goes and sets the number of steps; others join in order as long as no stream comes twice, here or among those `aboard`,
    and padding stays below `WASTE`. Jobs that do not fit keep their places at the head, so that they lead soon.
    """
    now = time.monotonic()
    jobs: list[Any] = []
    passed: list[Any] = []
    dropped: list[tuple[Any, BaseException | None]] = []
    streams: set[int] = set()
    real = steps = 0
    while line and len(jobs) < most_rows:
        job = line.popleft()
        if job.cancelled or job.deadline < now:
            dropped.append((job, _why_dropped(job, now)))
            continue
        stream, frames = job.stream, job.frames
        if stream and (stream in streams or stream in aboard):
            passed.append(job)
            continue
        if not jobs:
            steps = frames if frames < MOST_STEPS else MOST_STEPS
            most_rows = max(1, min(most_rows, MOST_PADDED // steps))
        grown = real + (frames if frames < steps else steps)
        if jobs and (len(jobs) + 1) * steps >= WASTE * grown:
            passed.append(job)
            continue
        streams.add(stream)
        job.begun = True
        jobs.append(job)
        real = grown
    line.extendleft(reversed(passed))
    return jobs, steps, dropped
