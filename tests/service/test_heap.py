"""Each case in a process of its own: what a process was told once, it keeps."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RUNS, BYTES = 200, 800 * 1024  # what the states of 64 streams of a wide model take

PROGRAM = f"""
import resource, sys
import numpy as np
from service import heap
from service.engine import resident_bytes

print(heap.keep_buffers() if "keep" in sys.argv else None)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range({RUNS}):
    one, other = np.ones({BYTES}, np.uint8), np.ones({BYTES}, np.uint8)
    del one, other
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
clips = [np.ones(8 * heap.BUFFER, np.uint8) for _ in range(4)]
much = resident_bytes()
del clips
print(much - resident_bytes())
parts = [np.ones(heap.BUFFER // 8, np.uint8) for _ in range(100)]
much = resident_bytes()
del parts[:99]
heap.give_back()
print(much - resident_bytes())
"""

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc, of which this is")


def run(*arguments: str, **environment: str) -> list[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run([sys.executable, "-c", PROGRAM, *arguments], cwd=ROOT, env={**kept, **environment}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_buffers_of_a_run_are_kept_for_the_next_and_large_ones_given_back() -> None:
    told, faults, clips, parts = run("keep")
    assert told == "True"
    once = 2 * BYTES // 4096
    assert int(faults) < 5 * once, "their pages came once, not with every run"
    assert int(run()[1]) > 20 * once, "else glibc takes them again and again, so that there is something to gain"
    assert int(clips) > 100 * 2**20
    assert int(parts) > 40 * 2**20


def test_who_has_told_glibc_something_is_not_talked_over() -> None:
    assert run("keep", MALLOC_TRIM_THRESHOLD_="100000")[0] == "False"
