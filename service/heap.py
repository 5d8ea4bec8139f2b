"""What glibc does with memory that was freed. Elsewhere (other C libraries) it does as it likes."""

from __future__ import annotations

import ctypes
import os

BUFFER = 4 * 2**20  # bytes; frames, states and scores of a batch are smaller, and are asked for and freed with every run
KEPT = 16 * 2**20  # bytes at the end of a heap that stay there although they are free
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt
_SAID = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def keep_buffers() -> bool:
    """Keeps the memory of such buffers for the next run, where glibc would give it back and take it again page by page; says whether it does.

    Larger ones, of long clips, are still given back when they are freed. Who has told glibc something by the environment is not talked over.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or any(name in os.environ for name in _SAID):
        return False
    return bool(mallopt(_MMAP_THRESHOLD, BUFFER) and mallopt(_TRIM_THRESHOLD, KEPT))


def give_back() -> None:
    """Gives all that is free back to the system, which takes a while; after large pieces of work that are not done again soon."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
