"""Who else was at work: processor time that other programs took on the cores that are measured on. Linux only."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

TICKS_PER_S = os.sysconf("SC_CLK_TCK")
# In a line of /proc/stat. Interrupts are left out: what they do for our own sockets is counted there, for no process.
USER, NICE, SYSTEM, STEAL = 1, 2, 3, 8
CPU_TIMES, SESSION = slice(11, 13), 3  # in /proc/PID/stat, after the name


@dataclass(frozen=True)
class Usage:
    """Seconds of processor time since the machine started: of everybody on these cores, and of the benchmark with its servers."""

    all_s: float
    own_s: float

    @classmethod
    def now(cls, cores: Iterable[int], sessions: Iterable[int]) -> Usage:
        """`sessions`: ids of the servers' first processes, each of which leads a session that its children belong to."""
        lines = {line.split()[0]: line.split() for line in Path("/proc/stat").read_text().splitlines() if line.startswith("cpu")}
        ticks = sum(int(lines[f"cpu{core}"][column]) for core in cores for column in (USER, NICE, SYSTEM, STEAL))
        wanted, own = {str(one) for one in sessions}, os.times()
        served = sum(_ticks(path, wanted) for path in Path("/proc").glob("[0-9]*/stat")) if wanted else 0
        return cls(ticks / TICKS_PER_S, own.user + own.system + served / TICKS_PER_S)

    def others_since(self, before: Usage, seconds: float) -> float:
        """Cores that others had since then."""
        return max(0.0, (self.all_s - before.all_s) - (self.own_s - before.own_s)) / seconds


def _ticks(path: Path, sessions: set[str]) -> int:
    try:
        fields = path.read_text().rpartition(")")[2].split()
    except OSError:  # it has ended since
        return 0
    return sum(map(int, fields[CPU_TIMES])) if fields[SESSION] in sessions else 0
