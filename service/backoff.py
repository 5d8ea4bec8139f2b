"""Backoff: how long to leave something alone that keeps failing. Pure: the caller has the clock."""

from __future__ import annotations

import random


class Backoff:
    """Doubles from `first_s` to `most_s`, each time less up to half of it at random, so that many clients of one server do not come back at once."""

    def __init__(self, first_s: float, most_s: float) -> None:
        self._first_s = first_s
        self._most_s = most_s
        self._failures = 0

    @property
    def failures(self) -> int:
        """In a row."""
        return self._failures

    def failed(self) -> float:
        """Seconds to wait now."""
        longest = min(self._most_s, self._first_s * 2.0 ** min(self._failures, 60))
        self._failures += 1
        return longest * random.uniform(0.5, 1.0)

    def succeeded(self) -> None:
        self._failures = 0
