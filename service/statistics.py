"""How often one model ran and how long everything took since it was loaded, as the Open Inference Protocol tells it."""

from __future__ import annotations

import time
from collections import defaultdict
from typing import Any


class Tally:
    """How many there were, and how many nanoseconds they took together."""

    __slots__ = ("count", "ns")

    def __init__(self) -> None:
        self.count = self.ns = 0

    def add(self, count: int, ns: int) -> None:
        self.count += count
        self.ns += ns

    def to_dict(self) -> dict[str, int]:
        return {"count": self.count, "ns": self.ns}


class Statistics:
    """Of one version of a model, whatever protocol its work came by. An inference is one message of a stream or one clip.

    Counted on the event loop, once for each batch.
    """

    def __init__(self) -> None:
        self._last_ms = 0
        self._executions = 0
        self._success, self._fail, self._queue = Tally(), Tally(), Tally()
        self._input, self._infer, self._output = Tally(), Tally(), Tally()
        self._batches: defaultdict[int, tuple[Tally, Tally, Tally]] = defaultdict(lambda: (Tally(), Tally(), Tally()))

    def succeeded(self, ns: int, count: int = 1) -> None:
        """`ns`: from the model's being asked to its answer, of all of them together."""
        self._success.add(count, ns)
        self._last_ms = time.time_ns() // 1_000_000

    def failed(self, ns: int) -> None:
        self._fail.add(1, ns)

    def waited(self, ns: int, count: int = 1) -> None:
        """`ns`: until the first run of each began, of all of them together."""
        self._queue.add(count, ns)

    def ran(self, rows: int, finished: int, input_ns: int, infer_ns: int, output_ns: int) -> None:
        """One run of the model. Every inference in it took as long as the run; those that go on in a later run are counted there."""
        self._executions += 1
        together = (self._input, self._infer, self._output)
        for total, batch, ns in zip(together, self._batches[rows], (input_ns, infer_ns, output_ns), strict=True):
            total.add(finished, rows * ns)
            batch.add(1, ns)

    def to_dict(self) -> dict[str, Any]:
        """The protocol's form, without name and version; nothing is ever answered from a cache."""
        nothing = Tally()
        tallies = {
            "success": self._success, "fail": self._fail, "queue": self._queue,
            "compute_input": self._input, "compute_infer": self._infer, "compute_output": self._output,
            "cache_hit": nothing, "cache_miss": nothing,
        }  # fmt: skip
        parts = ("compute_input", "compute_infer", "compute_output")
        return {
            "last_inference": self._last_ms,
            "inference_count": self._success.count,
            "execution_count": self._executions,
            "inference_stats": {name: tally.to_dict() for name, tally in tallies.items()},
            "response_stats": {},
            "batch_stats": [
                {"batch_size": rows, **{part: tally.to_dict() for part, tally in zip(parts, batch, strict=True)}}
                for rows, batch in sorted(self._batches.copy().items())
            ],
            "memory_usage": [],
        }
