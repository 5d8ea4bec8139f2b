from __future__ import annotations

import asyncio
import time

import numpy as np
import pytest

from service import history as module
from service.history import History, totals
from service.metrics import Metrics

MODEL = ("m", "1")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that stands until it is moved."""
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def work(metrics: Metrics, frames: int, seconds: float = 0.002, rows: int = 4) -> None:
    """One run of `rows` messages with `frames` frames together, half as much again with padding."""
    metrics.frames.labels(*MODEL).inc(frames)
    metrics.padded.labels(*MODEL).inc(frames * 1.5)
    metrics.batch_rows.labels(*MODEL).observe(rows)
    metrics.message_seconds.labels(*MODEL).observe_many(np.full(rows, seconds))
    metrics.queue_seconds.labels(*MODEL).observe_many(np.full(rows, seconds / 2))
    metrics.requests.labels("/", "200").inc()


def test_rates_are_those_of_the_time_that_is_asked_for(clock: list[float]) -> None:
    metrics = Metrics()
    history = History(metrics)
    for second in range(100):
        work(metrics, 10 if second < 90 else 100)
        clock[0] += 1
        history.take()
    assert history.last(10).frames_per_s(MODEL) == pytest.approx(100)
    assert history.last(60).frames_per_s(MODEL) == pytest.approx((50 * 10 + 10 * 100) / 60)
    assert history.last(10).messages_per_s(MODEL) == pytest.approx(4)
    assert history.last(10).requests_per_s == pytest.approx(1)
    assert history.last(60).seconds == pytest.approx(60)
    assert history.uptime_s == pytest.approx(100)


def test_what_happened_before_is_not_in_it(clock: list[float]) -> None:
    metrics = Metrics()
    history = History(metrics)
    for second in range(120):
        work(metrics, 8, seconds=1.0 if second < 55 else 0.002, rows=1 if second < 55 else 8)
        clock[0] += 1
        history.take()
    minute = history.last(60)
    for share in (0.5, 0.99):
        assert minute.latency_s(MODEL, share) == pytest.approx(0.002, rel=0.15)
        assert minute.wait_s(MODEL, share) == pytest.approx(0.001, rel=0.15)
    assert minute.batch_rows(MODEL) == 8
    assert minute.padding(MODEL) == pytest.approx(1.5)


def test_a_young_service_tells_since_its_start(clock: list[float]) -> None:
    metrics = Metrics()
    history = History(metrics)
    assert history.last(10).frames_per_s(MODEL) == 0  # no time has passed
    work(metrics, 10)
    clock[0] += 2
    period = history.last(60)
    assert (period.seconds, period.frames_per_s(MODEL)) == (2, 5)


def test_where_nothing_happened_there_are_no_times(clock: list[float]) -> None:
    metrics = Metrics()
    history = History(metrics)
    work(metrics, 10)
    history.take()
    clock[0] += 100
    history.take()
    clock[0] += 100
    period = history.last(60)
    assert period.frames_per_s(MODEL) == 0
    assert (period.latency_s(MODEL, 0.5), period.wait_s(MODEL, 0.5), period.batch_rows(MODEL), period.padding(MODEL)) == (None,) * 4
    unknown = ("nobody", "1")
    assert (period.frames_per_s(unknown), period.latency_s(unknown, 0.5), period.batch_rows(unknown)) == (0, None, None)


def test_it_keeps_a_minute_and_no_more(clock: list[float]) -> None:
    metrics = Metrics()
    history = History(metrics)
    for _ in range(500):
        clock[0] += 1
        history.take()
    assert len(history._samples) < 65


def test_it_samples_by_itself_and_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EVERY_S", 0.01)

    async def run() -> tuple[int, int, int]:
        history = History(Metrics())
        async with history:
            before = len(history._samples)
            while len(history._samples) < before + 3:  # noqa: ASYNC110 - it has nothing to wait for
                await asyncio.sleep(0.01)
        after = len(history._samples)
        await asyncio.sleep(0.05)
        return before, after, len(history._samples)

    before, after, later = asyncio.run(run())
    assert before + 3 <= after == later


def test_a_sample_is_cheap() -> None:
    """It is taken every second beside the work: with 20 models in under 10 ms, a hundredth of the time at the very most."""
    metrics = Metrics()
    for number in range(20):
        for histogram in (metrics.batch_rows, metrics.message_seconds, metrics.queue_seconds):
            histogram.labels(f"m{number}", "1").observe(1)
        metrics.frames.labels(f"m{number}", "1").inc()
        metrics.requests.labels(f"/{number}", "200").inc()
    history = History(metrics)
    spent = []
    for _ in range(20):
        began = time.perf_counter()
        history.take()
        spent.append(time.perf_counter() - began)
    assert sorted(spent)[10] < 0.01


def test_totals_are_by_label_values() -> None:
    metrics = Metrics()
    metrics.sessions_ended.labels("m", "1", "closed").inc(2)
    metrics.sessions_refused.inc()
    assert totals(metrics.sessions_ended) == {("m", "1", "closed"): 2}
    assert totals(metrics.sessions_refused) == {(): 1}
