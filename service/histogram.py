"""Histograms for Prometheus that cost little where they are fed: for every message and every run of a model.

The client library's own takes a lock and walks through its buckets for each value, about a microsecond; here a value costs a search
and an addition, and an array of values one pass of numpy.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
from prometheus_client import CollectorRegistry
from prometheus_client import metrics as client_metrics
from prometheus_client.metrics_core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

Counts = npt.NDArray[np.int64]
Values = npt.NDArray[np.float64]

_FEW = 12  # values up to which one by one is faster than numpy
_PER_DECADE = 20  # finer bounds, for quantiles: 12 % from one to the next


class Distribution:
    """How often values fell between bounds, for one set of labels. To be fed by one thread at a time; anybody may read."""

    __slots__ = ("_bounds", "_edges", "_many", "_single", "created", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = list(bounds)
        self._edges = np.array(bounds, np.float64)
        self._single = [0] * (len(bounds) + 1)
        self._many = np.zeros(len(bounds) + 1, np.int64)
        self.sum = 0.0
        self.created = time.time()

    def observe(self, value: float) -> None:
        self._single[bisect_left(self._bounds, value)] += 1
        self.sum += value

    def observe_many(self, values: Values) -> None:
        """values (count,): as `observe` for each."""
        if len(values) <= _FEW:
            for value in values.tolist():
                self.observe(value)
            return
        self._many += np.bincount(self._edges.searchsorted(values), minlength=len(self._many))
        self.sum += float(values.sum())

    def counts(self) -> Counts:
        """(bounds + 1,): how many values were at most each bound and above the one before; the last: above all. A copy."""
        return self._many + np.array(self._single, np.int64)


class Histogram(Collector):
    """As `prometheus_client.Histogram` in name, labels, buckets and exposition; `labels(...)` is to be kept where values come often.

    `fine` counts between finer bounds than the exposed ones, so that `quantile` is within a tenth; the exposition is the same.
    """

    def __init__(
        self, name: str, documentation: str, labels: Sequence[str], *, buckets: Sequence[float], registry: CollectorRegistry, fine: bool = False
    ) -> None:
        self._name = name
        self._documentation = documentation
        self._labels = tuple(labels)
        self._buckets = [float(bound) for bound in buckets]
        self.bounds = _finer(self._buckets) if fine else self._buckets
        self._exposed = np.searchsorted(self.bounds, self._buckets)
        self._children: dict[tuple[str, ...], Distribution] = {}
        registry.register(self)

    def labels(self, *values: str) -> Distribution:
        """The distribution of these label values, in the order of the names; raises `ValueError` unless there is one for each."""
        child = self._children.get(values)
        if child is None:
            if len(values) != len(self._labels):
                raise ValueError(f"{self._name} has the labels {', '.join(self._labels)}, got {len(values)} values")
            child = self._children[values] = Distribution(self.bounds)
        return child

    def children(self) -> dict[tuple[str, ...], Distribution]:
        """By label values. A copy."""
        return self._children.copy()

    def describe(self) -> Iterator[Metric]:
        """The name alone, so that the registry refuses a second of it."""
        yield HistogramMetricFamily(self._name, self._documentation, labels=self._labels)

    def collect(self) -> Iterator[Metric]:
        family = HistogramMetricFamily(self._name, self._documentation, labels=self._labels)
        spoken = [*map(floatToGoString, self._buckets), "+Inf"]
        for values, child in self.children().items():
            running = np.cumsum(child.counts())
            at_most = [*running[self._exposed].tolist(), int(running[-1])]
            family.add_metric(values, list(zip(spoken, at_most, strict=True)), child.sum)
            if getattr(client_metrics, "_use_created", True):  # the library's own switch, PROMETHEUS_DISABLE_CREATED_SERIES
                family.add_sample(self._name + "_created", dict(zip(self._labels, values, strict=True)), child.created)
        yield family


def quantile(bounds: Sequence[float], counts: Counts, share: float) -> float | None:
    """The value that `share` of all values do not exceed, from counts as `Distribution.counts` gives them; None if there are none.

    Inside a bucket values count as evenly spread; above the last bound the bound is all that is known.
    """
    running = np.cumsum(counts)
    if not running[-1]:
        return None
    wanted = share * float(running[-1])
    i = min(int(np.searchsorted(running, wanted)), len(counts) - 1)
    if i >= len(bounds):
        return bounds[-1]
    low, high = bounds[i - 1] if i else 0.0, bounds[i]
    before = float(running[i - 1]) if i else 0.0
    return low + (high - low) * (wanted - before) / max(1.0, float(counts[i]))


def _finer(bounds: Sequence[float]) -> list[float]:
    """The same bounds with others between and below them."""
    low, high = math.floor(math.log10(bounds[0])) - 1, math.log10(bounds[-1])
    grid = [10 ** (low + step / _PER_DECADE) for step in range(int((high - low) * _PER_DECADE) + 1)]
    apart = 10 ** (0.5 / _PER_DECADE)
    kept = [one for one in grid if all(max(one / bound, bound / one) > apart for bound in bounds)]
    return sorted([*bounds, *kept])
