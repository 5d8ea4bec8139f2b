from __future__ import annotations

import asyncio
import gc
import math
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Collection, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.batcher import AHEAD, AHEAD_FRAMES, MOST_STEPS, WASTE, Batcher, Job, form_batch
from service.errors import Deadline, Draining, Overloaded
from service.inline import Inline


class Toy(Job):
    """Work that counts its frames down."""

    __slots__ = ("ran",)

    def __init__(self, stream: int, frames: int, deadline: float = math.inf) -> None:
        super().__init__(stream, frames, time.monotonic(), deadline)
        self.ran: list[int] = []


Compute = Callable[[Sequence[Toy], int], Sequence[Exception | None]]


def nothing_else(works: Sequence[Toy], steps: int) -> Sequence[Exception | None]:
    return [None] * len(works)


class Model:
    """Whatever `compute` does with a batch, on the thread that runs it; then its jobs are counted down."""

    def __init__(self, compute: Compute) -> None:
        self._compute = compute
        self.accounted: list[list[int]] = []  # streams of each batch

    def prepare(self, jobs: Sequence[Toy], steps: int) -> tuple[list[Toy], int]:
        return list(jobs), steps

    def compute(self, prepared: tuple[list[Toy], int]) -> Sequence[Exception | None]:
        return self._compute(*prepared)

    def commit(self, jobs: Sequence[Toy], prepared: tuple[list[Toy], int], result: Sequence[Exception | None]) -> Sequence[Exception | None]:
        advance([job for job, error in zip(jobs, result, strict=False) if error is None], prepared[1])
        return result

    def account(self, prepared: tuple[list[Toy], int], seconds: float) -> None:
        assert seconds >= 0
        self.accounted.append([work.stream for work in prepared[0]])
        for work in prepared[0]:
            assert work.over or work.frames or work.future.done(), "answers first"


def advance(works: Sequence[Toy], steps: int) -> None:
    for work in works:
        count = min(steps, work.frames)
        work.frames -= count
        work.ran.append(count)


def soon() -> float:
    return time.monotonic() + 60


async def ask(batcher: Batcher, stream: int, frames: int, deadline: float = math.inf, settled: Callable[[], None] = lambda: None) -> Toy:
    toy = Toy(stream, frames, deadline)
    await batcher.run(toy, settled)
    return toy


class Long:
    """A message that takes much memory."""


def test_what_a_refused_caller_holds_is_let_go_of_at_once() -> None:
    held: list[weakref.ref[Long]] = []

    async def caller(batcher: Batcher, deadline: float) -> None:
        message = Long()
        held.append(weakref.ref(message))
        await ask(batcher, 1, 1, deadline)

    async def scenario(batcher: Batcher) -> None:
        for deadline, refusal in ((time.monotonic() - 1, Deadline), (soon(), ValueError)):
            try:
                await caller(batcher, deadline)
            except refusal:
                pass
            else:
                raise AssertionError(refusal)

    def fail(works: Sequence[Toy], steps: int) -> Sequence[Exception | None]:
        raise ValueError("no")

    gc.disable()
    try:
        with_batcher(scenario, fail)
        assert [one() for one in held] == [None, None]
    finally:
        gc.enable()


def with_batcher(scenario: Callable[[Batcher], Any], step: Compute = nothing_else, most_waiting: int = 100) -> Any:
    async def run() -> Any:
        batcher = Batcher("toy", Model(step), most_rows=8, most_waiting=most_waiting)
        batcher.start()
        try:
            return await scenario(batcher)
        finally:
            await batcher.stop()
            assert batcher.waiting == 0

    return asyncio.run(run())


class Gate:
    """A step that waits to be let through, so that tests say what happens meanwhile."""

    def __init__(self) -> None:
        self.entered, self.open = threading.Event(), threading.Event()
        self.batches: list[list[int]] = []

    def __call__(self, works: Sequence[Toy], steps: int) -> list[Exception | None]:
        self.batches.append([work.stream for work in works])
        self.entered.set()
        assert self.open.wait(30)
        return [None] * len(works)


def test_what_is_ready_forms_the_next_batch() -> None:
    gate = Gate()

    async def scenario(batcher: Batcher) -> None:
        first = asyncio.create_task(ask(batcher, 1, 1))
        await asyncio.to_thread(gate.entered.wait, 30)
        others = [asyncio.create_task(ask(batcher, stream, 1)) for stream in (2, 3, 3, 0, 0, 4)]
        await asyncio.sleep(0)
        gate.open.set()
        await asyncio.gather(first, *others)

    with_batcher(scenario, gate)
    assert gate.batches == [[1], [2, 3, 0, 0, 4], [3]]  # a stream never twice in a batch


def test_a_failing_work_fails_alone_and_a_failing_batch_fails_its_own() -> None:
    def step(works: Sequence[Toy], steps: int) -> list[Exception | None]:
        if any(work.stream == 13 for work in works):
            raise RuntimeError("the whole batch")
        return [ValueError("this one") if work.stream == 7 else None for work in works]

    async def scenario(batcher: Batcher) -> list[Any]:
        results = await asyncio.gather(*(ask(batcher, stream, 1) for stream in (6, 7, 8)), return_exceptions=True)
        for stream in (13, 14):
            results.append(*await asyncio.gather(ask(batcher, stream, 1), return_exceptions=True))
        return results

    results = with_batcher(scenario, step)
    assert [type(result) for result in results] == [Toy, ValueError, Toy, RuntimeError, Toy]


def test_a_result_too_few_is_an_error_not_a_shift() -> None:
    async def scenario(batcher: Batcher) -> None:
        with pytest.raises(ValueError):
            await ask(batcher, 1, 1)

    with_batcher(scenario, lambda works, steps: [])


def test_the_queue_is_bounded() -> None:
    gate = Gate()

    async def scenario(batcher: Batcher) -> None:
        waiting = [asyncio.create_task(ask(batcher, stream, 1)) for stream in (1, 2)]
        await asyncio.to_thread(gate.entered.wait, 30)
        with pytest.raises(Overloaded) as caught:
            await ask(batcher, 3, 1)
        assert caught.value.facts["retry_after"] == 1
        gate.open.set()
        await asyncio.gather(*waiting)

    with_batcher(scenario, gate, most_waiting=2)


def test_a_deadline_passes() -> None:
    gate = Gate()

    async def scenario(batcher: Batcher) -> None:
        first = asyncio.create_task(ask(batcher, 1, 1))
        await asyncio.to_thread(gate.entered.wait, 30)
        late = asyncio.create_task(ask(batcher, 2, 1, time.monotonic() - 0.001))
        await asyncio.sleep(0)
        gate.open.set()
        await first
        with pytest.raises(Deadline, match="send it again when the service is less busy"):
            await late

    with_batcher(scenario, gate)
    assert gate.batches == [[1]]


def test_work_that_takes_too_long_is_told_to_be_shorter() -> None:
    def slow(works: Sequence[Toy], steps: int) -> list[Exception | None]:
        time.sleep(0.02)
        return [None] * len(works)

    async def scenario(batcher: Batcher) -> None:
        work = Toy(1, 100 * MOST_STEPS, time.monotonic() + 0.05)
        with pytest.raises(Deadline, match=r"(\d+) steps of the model were left: send fewer frames at once"):
            await batcher.run(work, lambda: None)
        assert 0 < len(work.ran) < 100

    with_batcher(scenario, slow)


def test_a_caller_that_leaves_before_its_turn_costs_nothing() -> None:
    gate = Gate()
    settled: list[int] = []

    async def scenario(batcher: Batcher) -> None:
        first = asyncio.create_task(ask(batcher, 1, 1, settled=lambda: settled.append(1)))
        await asyncio.to_thread(gate.entered.wait, 30)
        left = asyncio.create_task(ask(batcher, 2, 1, settled=lambda: settled.append(2)))
        await asyncio.sleep(0)
        left.cancel()
        await asyncio.sleep(0)
        gate.open.set()
        await first
        with pytest.raises(asyncio.CancelledError):
            await left

    with_batcher(scenario, gate)
    assert gate.batches == [[1]]
    assert settled == [1]


def test_a_caller_that_leaves_meanwhile_is_held_until_its_work_has_taken_effect() -> None:
    gate = Gate()
    settled: list[int] = []

    async def scenario(batcher: Batcher) -> None:
        task = asyncio.create_task(ask(batcher, 1, 1, settled=lambda: settled.append(1)))
        await asyncio.to_thread(gate.entered.wait, 30)
        task.cancel()
        await asyncio.sleep(0.01)
        assert not task.done()
        gate.open.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert settled == [1]

    with_batcher(scenario, gate)


def test_stopping_turns_waiting_work_away() -> None:
    gate = Gate()

    async def scenario(batcher: Batcher) -> None:
        tasks = [asyncio.create_task(ask(batcher, stream, 1)) for stream in (1, 1)]
        await asyncio.to_thread(gate.entered.wait, 30)
        stopping = asyncio.create_task(batcher.stop())
        await asyncio.sleep(0)
        gate.open.set()
        await stopping
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(result) for result in results] == [Toy, Draining]
        with pytest.raises(Draining):
            await ask(batcher, 3, 1)

    async def run() -> None:
        batcher = Batcher("toy", Model(gate), most_rows=8, most_waiting=10)
        batcher.start()
        await scenario(batcher)

    asyncio.run(run())


class Ordered(Inline):
    """Allows as it is told."""

    active = 0

    def __init__(self, allowed: bool, active: int = 0) -> None:
        super().__init__()
        self.active = active
        self.allowed = allowed
        self.told: list[str] = []

    def saw(self, streams: Collection[int], now: float) -> None:
        self.told.append(f"saw {len(streams)}")

    def allows(self, rows: int, steps: int) -> bool:
        self.told.append(f"asked {rows} x {steps}")
        return self.allowed

    def ran_here(self, frames: int, seconds: float) -> None:
        self.told.append(f"here {frames}")
        assert seconds >= 0

    def ran_there(self, frames: int, seconds: float) -> None:
        self.told.append(f"there {frames}")
        assert seconds >= 0


def test_short_batches_run_on_the_event_loop() -> None:
    here: list[bool] = []

    def step(works: Sequence[Toy], steps: int) -> list[Exception | None]:
        here.append(threading.current_thread() is threading.main_thread())
        return [None] * len(works)

    async def together(batcher: Batcher, *frames: int) -> None:
        await asyncio.gather(*(ask(batcher, 1 + i, count) for i, count in enumerate(frames)))

    async def scenario(batcher: Batcher) -> None:
        batcher._inline = inline = Ordered(True)
        await together(batcher, 3)
        await together(batcher, 2, 2, 2)
        assert (inline.told, here) == (["saw 1", "asked 1 x 3", "here 3", "saw 3", "asked 3 x 2", "here 6"], [True, True])
        inline.told, inline.allowed = [], False
        await together(batcher, 2)
        assert (inline.told, here[2:]) == (["saw 1", "asked 1 x 2", "there 2"], [False])
        inline.told = []
        await together(batcher, MOST_STEPS, 1)  # not one batch
        assert inline.told[:3] == ["saw 1", f"there {MOST_STEPS}", "saw 1"]
        assert here[3] is False

    with_batcher(scenario, step)


def test_a_long_job_on_the_event_loop_lets_others_have_it_between_slices() -> None:
    """However many slices it has."""
    turns = 0

    def step(works: Sequence[Toy], steps: int) -> list[Exception | None]:
        return [None]

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async def scenario(batcher: Batcher) -> None:
        batcher._inline = Ordered(True)
        other = asyncio.create_task(others())
        await ask(batcher, 1, 2000 * MOST_STEPS)
        other.cancel()
        assert turns >= 2000

    with_batcher(scenario, step)


@pytest.mark.parametrize("here", [True, False])
def test_a_batch_is_accounted_for_once_and_after_its_answers_unless_it_fails(here: bool) -> None:
    def step(works: Sequence[Toy], steps: int) -> list[Exception | None]:
        if works[0].stream == 2:
            raise RuntimeError("the whole batch")
        return [ValueError("it alone") if work.stream == 3 else None for work in works]

    async def run() -> None:
        model = Model(step)
        batcher = Batcher("toy", model, most_rows=8, most_waiting=10)
        batcher._inline = Ordered(here)
        batcher.start()
        for streams in ((1,), (2,), (3, 4)):
            await asyncio.gather(*(ask(batcher, stream, 1) for stream in streams), return_exceptions=True)
        await ask(batcher, 1, MOST_STEPS + 1)
        await batcher.stop()
        assert model.accounted == [[1], [3, 4], [1], [1]]

    asyncio.run(run())


def test_a_failure_on_the_event_loop_is_its_callers() -> None:
    def step(works: Sequence[Toy], steps: int) -> list[Exception | None]:
        assert threading.current_thread() is threading.main_thread()
        raise RuntimeError("the whole batch")

    async def scenario(batcher: Batcher) -> None:
        batcher._inline = Ordered(True)
        for _ in range(2):
            with pytest.raises(RuntimeError, match="the whole batch"):
                await ask(batcher, 1, 1)

    with_batcher(scenario, step)


def test_work_that_stopping_overtakes_is_turned_away() -> None:
    async def run() -> None:
        batcher = Batcher("toy", Model(nothing_else), most_rows=8, most_waiting=10)
        batcher.start()
        async with asyncio.timeout(30):
            results = await asyncio.gather(ask(batcher, 1, 1), batcher.stop(), return_exceptions=True)
        assert [type(result) for result in results] == [Draining, type(None)]
        assert batcher.waiting == 0

    asyncio.run(run())


def line_of(*pairs: tuple[int, int]) -> deque[Toy]:
    return deque(Toy(stream, frames) for stream, frames in pairs)


def test_a_long_chunk_does_not_hold_up_short_ones() -> None:
    batch, steps, _ = form_batch(line_of((1, 1), (2, 1000), (3, 1)), 8, set())
    assert steps == 1
    assert [job.stream for job in batch] == [1, 2, 3]
    line = line_of((1, 1000), (2, 1), (3, 1000))
    batch, steps, _ = form_batch(line, 8, set())
    assert steps == MOST_STEPS
    assert [job.stream for job in batch] == [1, 3]
    assert [job.stream for job in line] == [2]  # it leads the next one


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 100)), min_size=1, max_size=40), st.integers(1, 16))
def test_batches_are_full_of_real_frames_and_everything_runs(pairs: list[tuple[int, int]], most_rows: int) -> None:
    line = line_of(*pairs)
    everything = list(line)
    runs = 0
    while line:
        oldest = line[0]
        batch, steps, dropped = form_batch(line, most_rows, set())
        assert not dropped
        assert batch[0] is oldest
        assert len(batch) <= most_rows
        streams = [job.stream for job in batch if job.stream]
        assert len(streams) == len(set(streams))
        real = sum(min(job.frames, steps) for job in batch)
        assert len(batch) * steps < WASTE * real
        advance(batch, steps)
        line.extend(job for job in batch if job.frames)
        runs += 1
    assert all(sum(job.ran) == frames for job, (_, frames) in zip(everything, pairs, strict=True))
    assert runs <= sum(frames for _, frames in pairs)


@pytest.mark.parametrize(
    ("waiting", "prepared"),
    [([1] * (AHEAD - 1), 1), ([1] * AHEAD, 2), ([AHEAD_FRAMES // 2] * 2, 2), ([AHEAD_FRAMES - 1], 1), ([1] * 3 * AHEAD, 2)],
)
def test_a_second_batch_is_made_while_one_runs_if_it_is_worth_it(waiting: list[int], prepared: int) -> None:
    gate = Gate()
    made: list[int] = []

    class Counting(Model):
        def prepare(self, jobs: Sequence[Toy], steps: int) -> tuple[list[Toy], int]:
            made.append(len(jobs))
            return super().prepare(jobs, steps)

    async def run() -> None:
        batcher = Batcher("toy", Counting(gate), most_rows=8, most_waiting=100)
        batcher.start()
        first = asyncio.create_task(ask(batcher, 1, 1))
        await asyncio.to_thread(gate.entered.wait, 30)
        others = [asyncio.create_task(ask(batcher, 2 + i, frames)) for i, frames in enumerate(waiting)]
        for _ in range(5):
            await asyncio.sleep(0)
        assert len(made) == prepared
        gate.open.set()
        await asyncio.gather(first, *others)
        await batcher.stop()

    asyncio.run(run())


class Timed(Ordered):
    """A batch of the first size runs for so long, of others no time."""

    def __init__(self, frames: int, seconds: float) -> None:
        super().__init__(False)
        self.known = (frames, seconds)

    def takes(self, frames: int) -> float:
        return self.known[1] if frames == self.known[0] else 0.0


async def rows_of_batches(inline: Inline, gate: Gate, most_rows: int, *, at_once: int, then: Sequence[float], after: Callable[[], Any]) -> list[int]:
    """How many rows batches of jobs of 64 frames have: the first come together, the others after pauses; the model is let go on when `after` is done."""
    batcher = Batcher("toy", Model(gate), most_rows=most_rows, most_waiting=100)
    batcher._inline = inline
    batcher.start()
    asked = [asyncio.create_task(ask(batcher, 0, 64)) for _ in range(at_once)]
    await asyncio.to_thread(gate.entered.wait, 30)
    for pause in then:
        await asyncio.sleep(pause)
        asked.append(asyncio.create_task(ask(batcher, 0, 64)))
    await after()
    gate.open.set()
    await asyncio.gather(*asked)
    await batcher.stop()
    return [len(batch) for batch in gate.batches]


def test_a_batch_behind_a_long_one_is_formed_late_of_all_that_has_come() -> None:
    async def meanwhile() -> None:
        await asyncio.sleep(0.4)  # beyond the end of the first, as far as is known: the one behind it is formed by then

    rows = asyncio.run(rows_of_batches(Timed(2 * MOST_STEPS, 0.3), Gate(), 8, at_once=2, then=[0.02] * 5, after=meanwhile))
    assert rows[:2] == [2, 5]
    rows = asyncio.run(rows_of_batches(Timed(2 * MOST_STEPS, 0.0), Gate(), 8, at_once=2, then=[0.02] * 5, after=meanwhile))
    assert rows[:2] == [2, 1], "behind a short one, of the first that is enough"


def test_a_batch_behind_a_long_one_that_can_grow_no_more_is_formed_at_once() -> None:
    async def run() -> None:
        gate = Gate()
        batcher = Batcher("toy", Model(gate), most_rows=3, most_waiting=100)
        batcher._inline = Timed(2 * MOST_STEPS, 60.0)
        batcher.start()
        asked = [asyncio.create_task(ask(batcher, 0, 64)) for _ in range(2)]
        await asyncio.to_thread(gate.entered.wait, 30)
        for expected in (1, 1, 2):
            asked.append(asyncio.create_task(ask(batcher, 0, 64)))
            for _ in range(3):
                await asyncio.sleep(0)
            assert batcher._flying == expected
        gate.open.set()
        await asyncio.gather(*asked)
        await batcher.stop()

    asyncio.run(run())


def test_long_jobs_that_come_together_go_in_halves() -> None:
    async def nothing() -> None: ...

    long = Timed(16 * MOST_STEPS, 0.01)
    assert asyncio.run(rows_of_batches(long, Gate(), 64, at_once=16, then=[], after=nothing))[:2] == [8, 8]
    assert asyncio.run(rows_of_batches(Timed(8 * MOST_STEPS, 0.01), Gate(), 64, at_once=8, then=[], after=nothing))[0] == 8, "of so few the model takes longer"
    assert asyncio.run(rows_of_batches(Timed(16 * MOST_STEPS, 0.001), Gate(), 64, at_once=16, then=[], after=nothing))[0] == 16, "not worth two"


def test_of_many_streams_half_go_at_a_time() -> None:
    """So that one half runs while the other is answered: all in one would keep model and event loop waiting for each other."""
    batches: list[int] = []

    def step(works: Sequence[Toy], steps: int) -> list[Exception | None]:
        batches.append(len(works))
        return [None] * len(works)

    async def stream(batcher: Batcher, number: int) -> None:
        end = time.monotonic() + 0.3
        while time.monotonic() < end:
            await ask(batcher, number, 1)

    async def largest(count: int) -> int:
        batches.clear()
        batcher = Batcher("toy", Model(step), most_rows=64, most_waiting=100)
        batcher._inline = Ordered(False, count)
        batcher.start()
        await asyncio.gather(*(stream(batcher, 1 + number) for number in range(count)))
        await batcher.stop()
        return max(batches)

    assert asyncio.run(largest(2 * AHEAD + 8)) == AHEAD + 4
    assert asyncio.run(largest(2 * AHEAD - 1)) == 2 * AHEAD - 1, "too few for two batches"
