"""The last minute of the service's figures: what happened per second and how long it took, for people who look."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from dataclasses import dataclass

import numpy as np
from prometheus_client import Counter

from service.histogram import Counts, Histogram, quantile
from service.metrics import Metrics

EVERY_S = 1.0
KEPT_S = 60.0

Key = tuple[str, ...]  # label values: of a model, name and version


@dataclass(frozen=True, slots=True)
class Sample:
    """What was counted until `at`, on time.monotonic's clock."""

    at: float
    requests: float
    frames: dict[Key, float]
    padded: dict[Key, float]
    runs: dict[Key, tuple[int, float]]  # and their rows together
    took: dict[Key, Counts]
    waited: dict[Key, Counts]


class Period:
    """What happened between two samples. A figure is None where there is nothing that it could be of."""

    def __init__(self, metrics: Metrics, before: Sample, after: Sample) -> None:
        self._metrics = metrics
        self._before = before
        self._after = after
        self.seconds = after.at - before.at

    @property
    def requests_per_s(self) -> float:
        return self._per_s(self._after.requests - self._before.requests)

    def frames_per_s(self, model: Key) -> float:
        return self._per_s(self._frames(model))

    def messages_per_s(self, model: Key) -> float:
        return self._per_s(float(_more(self._after.took, self._before.took, model).sum()))

    def latency_s(self, model: Key, share: float) -> float | None:
        """Seconds from a message's being asked to its answer that this share of messages does not exceed."""
        return quantile(self._metrics.message_seconds.bounds, _more(self._after.took, self._before.took, model), share)

    def wait_s(self, model: Key, share: float) -> float | None:
        """The same, until the message's first run began."""
        return quantile(self._metrics.queue_seconds.bounds, _more(self._after.waited, self._before.waited, model), share)

    def batch_rows(self, model: Key) -> float | None:
        """Streams in one run, on average."""
        runs, rows = self._after.runs.get(model, (0, 0.0))
        earlier, earlier_rows = self._before.runs.get(model, (0, 0.0))
        return (rows - earlier_rows) / (runs - earlier) if runs > earlier else None

    def padding(self, model: Key) -> float | None:
        """Frames computed over frames taken: 1 is no waste."""
        frames = self._frames(model)
        return (self._after.padded.get(model, 0) - self._before.padded.get(model, 0)) / frames if frames else None

    def _frames(self, model: Key) -> float:
        return self._after.frames.get(model, 0) - self._before.frames.get(model, 0)

    def _per_s(self, count: float) -> float:
        return count / self.seconds if self.seconds > 0 else 0.0


class History:
    """Takes a sample every second and keeps those of a minute. Use it as `async with`."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._samples = deque([self._sample()], maxlen=int(KEPT_S / EVERY_S) + 2)
        self.began = self._samples[0].at
        self._sampler: asyncio.Task[None] | None = None

    async def __aenter__(self) -> History:
        self._sampler = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._sampler is not None:
            self._sampler.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._sampler

    @property
    def uptime_s(self) -> float:
        return time.monotonic() - self.began

    def last(self, seconds: float) -> Period:
        """What happened in the last `seconds`, at most a minute; since the start where that was later."""
        now = self._sample()
        before = next((sample for sample in reversed(self._samples) if now.at - sample.at >= seconds), self._samples[0])
        return Period(self._metrics, before, now)

    def take(self) -> None:
        """Keeps how things are now."""
        self._samples.append(self._sample())

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(EVERY_S)
            self.take()

    def _sample(self) -> Sample:
        metrics = self._metrics
        runs = {key: (int(child.counts().sum()), child.sum) for key, child in metrics.batch_rows.children().items()}
        return Sample(
            time.monotonic(),
            sum(totals(metrics.requests).values()),
            totals(metrics.frames),
            totals(metrics.padded),
            runs,
            _counts(metrics.message_seconds),
            _counts(metrics.queue_seconds),
        )


def totals(counter: Counter) -> dict[Key, float]:
    """A counter's values by label values, in the order of its labels."""
    return {tuple(sample.labels.values()): sample.value for family in counter.collect() for sample in family.samples if sample.name.endswith("_total")}


def _counts(histogram: Histogram) -> dict[Key, Counts]:
    return {key: child.counts() for key, child in histogram.children().items()}


def _more(after: dict[Key, Counts], before: dict[Key, Counts], key: Key) -> Counts:
    """What was added to the counts of a key."""
    if key not in after:
        return np.zeros(1, np.int64)
    return after[key] - before[key] if key in before else after[key]
